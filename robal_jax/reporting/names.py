"""Names of conditions, and numbers, as people read them.

A *condition* is the clean images or an attack on them. Two rooms say which exist:
``evaluation.steps.CONDITIONS``, made for every model, and ``attacks.autoattack.CONDITIONS``, the outcomes of
ensembles. 'worst' follows from all of them.
"""

from collections.abc import Collection, Mapping
from typing import Any

AUTOATTACK = ("autoattack_plus", "autoattack_rand", "autoattack")
"""Conditions that are AutoAttack, the strongest first."""

ENSEMBLES = (*AUTOATTACK, "custom", "robal_aa")
"""Conditions that are ensembles of attacks, the strongest first."""

_NAMES = {
    "clean": "Clean",
    "worst": "Worst",
    "square": "Square",
    "robal_aa": "APGD-CE + APGD-T",
    "autoattack": "AutoAttack",
    "autoattack_plus": "AutoAttack plus",
    "autoattack_rand": "AutoAttack rand",
    "custom": "Own ensemble",
}

_NAMES_IN_PAPER = {"robal_aa": "AA"}


def display_name(condition: str) -> str:
    """Returns the name of a condition for people: 'clean' -> 'Clean', 'pgd_20' -> 'PGD-20'."""
    return _NAMES.get(condition, condition.upper().replace("_", "-"))


def paper_name(condition: str) -> str:
    """Returns the name of a condition in the tables of the RoBal paper."""
    return _NAMES_IN_PAPER.get(condition, display_name(condition))


def headline_attack(conditions: Collection[str], main_attack: str) -> str:
    """Returns the condition whose accuracy counts as the robust accuracy.

    It is the strongest ensemble that was evaluated, in the order of ``ENSEMBLES``, or the main attack if no
    ensemble was evaluated.
    """
    return next((name for name in ENSEMBLES if name in conditions), main_attack)


def headline(conditions: Collection[str], main_attack: str) -> list[str]:
    """Returns the conditions to see at a glance; the main attack may itself be 'clean' or 'worst'."""
    names = ("clean", main_attack, headline_attack(conditions, main_attack), "worst")
    return [name for name in dict.fromkeys(names) if name in conditions]


def printed(value: Any) -> str:
    """Returns a JSON value on one line."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {printed(entry)}" for key, entry in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(printed, value))
    if isinstance(value, float):
        return f"{value:.6g}"
    return "none" if value is None else str(value)


def percent(figure: Mapping[str, float]) -> str:
    """Returns a FIGURE in percent: '70.1'."""
    return f"{100 * figure['value']:.1f}"


def interval(figure: Mapping[str, float], sign: str = "") -> str:
    """Returns the interval of a FIGURE in percent: '[66.7, 73.4]'."""
    low, high = (format(100 * figure[key], f"{sign}.1f") for key in ("low", "high"))
    return f"[{low}, {high}]"


def with_interval(figure: Mapping[str, float], sign: str = "", space: str = " ") -> str:
    """Returns a FIGURE with its interval in percent: '70.1 [66.7, 73.4]'."""
    return f"{100 * figure['value']:{sign}.1f}{space}{interval(figure, sign)}"
