"""Names of conditions, and numbers, as people read them.

A *condition* is the clean images or an attack on them. Two places say which exist:
``evaluation.steps.CONDITIONS``, made for every model, and ``attacks.autoattack.CONDITIONS``, the outcomes of
ensembles. 'worst' follows from all of them.
"""

from collections.abc import Collection, Iterable, Mapping
from typing import Any, TypeVar

T = TypeVar("T")

BPDA = "_bpda"
"""End of the names of attacks that follow the gradient of an approximation, and of ensembles with them."""

_WHOLE = ("union", "autoattack_plus", "autoattack")
OWN = "custom_own"
"""An ensemble with attacks of the evaluator's own; at least as strong as all parts of it that have a name."""

_OTHERS = ("autoattack_rand", "torchattacks", "fast", "custom", "robal_aa")

AUTOATTACK = (*(name + BPDA for name in _WHOLE), *_WHOLE)
"""Conditions with all attacks of AutoAttack, the strongest first."""

ENSEMBLES = (
    *(name + BPDA for name in (OWN, *_WHOLE, *_OTHERS, "pgd_20")), OWN, *_WHOLE, *_OTHERS, "apgd_ce",
)  # fmt: skip
"""Conditions that are ensembles of attacks, the strongest first."""

_NAMES = {
    "clean": "Clean",
    "worst": "Worst",
    "square": "Square",
    "square_full": "Square in full",
    "robal_aa": "APGD-CE + APGD-T",
    "autoattack": "AutoAttack",
    "autoattack_plus": "AutoAttack plus",
    "autoattack_rand": "AutoAttack rand",
    "torchattacks": "torchattacks (10 iterations)",
    "fast": "fast (PMA + APGD-MALT + Square)",
    "union": "union (AutoAttack + PMA + APGD-MALT)",
    "custom": "Listed attacks",
    OWN: "Ensemble with own attacks",
}

_NAMES_IN_PAPER = {"robal_aa": "AA"}


def display_name(condition: str) -> str:
    """Returns the name of a condition for people; an attack of the evaluator's own has that of the function.

    Example:
      >>> display_name("clean"), display_name("pgd_20"), display_name("autoattack_bpda")
      ('Clean', 'PGD-20', 'AutoAttack + BPDA')
      >>> display_name("my_attacks:noise")
      'noise (own)'
    """
    plain = condition.removesuffix(BPDA)
    own = plain.partition(":")[2]
    name = f"{own} (own)" if own else _NAMES.get(plain, plain.upper().replace("_", "-"))
    return name + " + BPDA" * (plain != condition)


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
    """Returns the conditions to see at a glance; the main attack may itself be 'clean' or 'worst'.

    AutoAttack stands beside 'union' and an ensemble with own attacks, which are no figures to compare.
    """
    strongest = headline_attack(conditions, main_attack)
    beside = ("autoattack",) if strongest in ("union", OWN) else ()
    names = ("clean", main_attack, *beside, strongest, "worst")
    return [name for name in dict.fromkeys(names) if name in conditions]


def folded(rows: Iterable[tuple[str, T]]) -> list[tuple[str, T]]:
    """Returns rows (name, content) in their order; those with equal contents are one row with all names.

    Example:
      >>> folded([("PGD", [70]), ("AutoAttack", [68]), ("Worst", [68])])
      [('PGD', [70]), ('AutoAttack = Worst', [68])]
    """
    found: list[tuple[list[str], T]] = []
    for name, content in rows:
        equal = next((names for names, other in found if other == content), None)
        if equal is None:
            found.append(([name], content))
        else:
            equal.append(name)
    return [(" = ".join(names), content) for names, content in found]


def corruption_name(corruption: str) -> str:
    """Returns the name of a corruption for people: 'gaussian_noise' -> 'Gaussian noise'."""
    return corruption.replace("_", " ").capitalize().replace("Jpeg", "JPEG")


_GROUPS = {"few": "few-shot", "many": "many-shot", "rest": "other"}

PROTOCOLS = {
    "thirds": "Thirds",
    "last_80_percent": "Last 80 %",
    "few": "Fewer than 20 images",
    "last_five": "Last five",
    "shots": "Many, medium, few shot",
}
"""Protocols of ``metrics.GROUPS`` for people."""


def group_name(group: str) -> str:
    """Returns the name of a group of classes in a sentence.

    Example:
      >>> group_name("tail"), group_name("few"), group_name("last_five")
      ('tail', 'few-shot', 'last five')
    """
    return _GROUPS.get(group, group.replace("_", " "))


def group_columns(groups: Iterable[str]) -> dict[str, str]:
    """Headings of the figures of all classes, and of each group."""
    return {"accuracy": "All classes", **{name: group_name(name).capitalize() for name in groups}}


def shortened(name: str, length: int = 18) -> str:
    """Returns a name of at most ``length`` characters: 'African hunting dog' -> 'African hunting d…'."""
    name = " ".join(name.split())
    return name if len(name) <= length else name[: length - 1].rstrip(" ,") + "…"


def radius(epsilon: float) -> str:
    """Returns the radius of a threat model as papers print it.

    Example:
      >>> radius(8 / 255), radius(0.1), radius(0.031), radius(0.2), radius(128 / 255)
      ('8/255', '0.1', '0.031', '0.2', '128/255')
    """
    text, pixels = f"{epsilon:.6g}", 255 * epsilon
    return f"{pixels:.0f}/255" if len(text) > len("0.125") and abs(pixels - round(pixels)) < 1e-3 else text


def part_of_radius(factor: float, meta: Mapping[str, Any]) -> str:
    """A part of the radius of an evaluation, which may differ by class."""
    if "class_epsilon" in meta:
        return f"{printed(factor)} times its own"
    return radius(factor * meta["epsilon"])


def threat(meta: Mapping[str, Any]) -> str:
    """Returns norm and radius of the threat model, as far as they are known: 'L∞ 8/255'.

    Example:
      >>> threat({"norm": "L-infinity", "epsilon": 8 / 255}), threat({"norm": "L2", "epsilon": 0.5})
      ('L∞ 8/255', 'L2 0.5')
      >>> threat({"norm": "L-infinity", "epsilon": 0.1, "class_epsilon": [0.07, 0.1476391]})
      'L∞ 0.07 to 0.148 by class'
    """
    norm = str(meta.get("norm", "")).replace("L-infinity", "L∞")
    if "class_epsilon" in meta:
        ends = (radius(of(meta["class_epsilon"])) for of in (min, max))
        lowest, highest = (end if "/" in end else f"{float(end):.3g}" for end in ends)
        return f"{norm} {lowest} to {highest} by class".strip()
    return " ".join(part for part in (norm, "epsilon" in meta and radius(meta["epsilon"])) if part)


BY_CLASS = "budgets by class: not the standard threat model"
"""Label of every result at radii that differ by class."""


def training_name(metric: str) -> str:
    """Returns the name of a metric of the training: 'adv_accuracy' -> 'accuracy under attack'."""
    kind, _, what = metric.rpartition("_")
    words = {"nat": "clean {}", "adv": "{} under attack", "mixed": "{} on mixed images"}
    return words[kind].format(what) if kind in words else metric.replace("_", " ")


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
