"""TODO reporting.names."""

from collections.abc import Mapping
from typing import Any

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

_ENSEMBLES = (
    "autoattack_plus",
    "autoattack_rand",
    "autoattack",
    "custom",
    "robal_aa",
)  # one of an evaluation


def display_name(condition: str) -> str:
    """Give the name of a condition for people: 'clean' -> 'Clean', 'pgd_20' -> 'PGD-20'."""
    return _NAMES.get(condition, condition.upper().replace("_", "-"))


def report_title(meta: Mapping[str, Any]) -> str:
    """What was evaluated, in a few words."""
    return f"{meta['method']} on {meta['dataset']}"


def class_name(meta: Mapping[str, Any], index: int) -> str:
    """The name of a class, or its index where classes have none."""
    return str(meta["class_names"][index]) if meta.get("class_names") else str(index)


def headline_attack(summary: Mapping[str, Any], meta: Mapping[str, Any]) -> str:
    """The condition that stands for robustness: the strongest ensemble evaluated, or else the main attack."""
    return next((name for name in _ENSEMBLES if name in summary["conditions"]), meta["main_attack"])


def headline(summary: Mapping[str, Any], meta: Mapping[str, Any]) -> list[str]:
    """The conditions to see at a glance; the main attack may itself be 'clean' or 'worst'."""
    names = ("clean", meta["main_attack"], headline_attack(summary, meta), "worst")
    return [name for name in dict.fromkeys(names) if name in summary["conditions"]]


def printed(value: Any) -> str:
    """Print a value of meta on one line."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {printed(entry)}" for key, entry in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(printed, value))
    if isinstance(value, float):
        return f"{value:.6g}"
    return "none" if value is None else str(value)


def percent(figure: Mapping[str, float]) -> str:
    """Returns a figure in percent: '70.1'."""
    return f"{100 * figure['value']:.1f}"


def interval(figure: Mapping[str, float], sign: str = "") -> str:
    """Returns a figure's interval in percent: '[66.7, 73.4]'."""
    low, high = (format(100 * figure[key], f"{sign}.1f") for key in ("low", "high"))
    return f"[{low}, {high}]"


def with_interval(figure: Mapping[str, float], sign: str = "", space: str = " ") -> str:
    """A figure with its interval, in percent: '70.1 [66.7, 73.4]'."""
    return f"{100 * figure['value']:{sign}.1f}{space}{interval(figure, sign)}"
