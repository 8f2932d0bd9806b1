"""The first line of a report: the outcome of the evaluation in words."""

from collections.abc import Mapping
from typing import Any

from robal_jax.reporting.names import (
    AUTOATTACK,
    BPDA,
    BY_CLASS,
    OWN,
    display_name,
    group_name,
    percent,
    threat,
    with_interval,
)
from robal_jax.reporting.results import Results


def in_words(results: Results) -> str:
    """Returns how many images are right under the headline attack, in all classes and in the tail.

    Args:
      results: with the headline attack among its conditions.

    Returns:
      One or two sentences, in percent with the 95 % interval: 'Of 700 test images 69.1 % [65.6, 72.4] are
      still classified correctly under AutoAttack at L∞ 8/255; in the tail classes 55.2 % [48.5, 61.8], 21.3
      points less than in the head classes.'
    """
    attack = results.headline_attack
    row, number = results.conditions[attack], sum(results.conditions["clean"]["per_class"]["support"])
    share = with_interval(row["accuracy"], space=" % ")
    if attack == "clean":
        right = f"Of {number} test images {share} are classified correctly{_tail(results, row)}."
        return f"{right} No attack was run."
    name = "the worst of all conditions" if attack == "worst" else display_name(attack)
    where = threat(results.meta)
    sentence = (
        f"Of {number} test images {share} are still classified correctly under {name}"
        + (f" at {where}" if where else "")
        + f"{_tail(results, row)}."
    )
    if attack == "union" or (attack == OWN and "autoattack" in results.conditions):
        sentence += f" {beside_autoattack(results)}"
    elif attack == "union" + BPDA:
        sentence += " This is no figure of AutoAttack; do not compare it with one."
    elif attack not in AUTOATTACK:
        version = "'s standard version" * attack.startswith("autoattack_rand")
        sentence += f" AutoAttack{version} was not run; it may find a lower number."
    if "class_epsilon" in results.meta:
        sentence += f" {BY_CLASS.capitalize()}."
    return sentence


def beside_autoattack(results: Results) -> str:
    """Returns AutoAttack's accuracy, and how far that of an ensemble that begins with it lies below it.

    This is 'union' or one with own attacks; both must be among the conditions.

    'AutoAttack alone leaves 70.0 % [63.3, 75.9]; PMA and APGD-MALT lower it by 0.5 points. Compare
    only AutoAttack's with published figures.'
    """
    whole = "union" if "union" in results.conditions else OWN
    later = "PMA and APGD-MALT" if whole == "union" else "the attacks after it"
    alone, both = (results.conditions[name]["accuracy"] for name in ("autoattack", whole))
    points = 100 * (alone["value"] - both["value"])
    return (
        f"AutoAttack alone leaves {with_interval(alone, space=' % ')}; {later} lower it "
        f"by {points:.1f} points. Compare only AutoAttack's with published figures."
    )


def tail_notes(results: Results, condition: str) -> list[str]:
    """Returns the accuracy in the rarest group under a condition: ['tail 55.2 %']; nothing without groups."""
    row, rarest = results.conditions[condition], results.rarest
    return [f"{group_name(rarest)} {percent(row[rarest])} %"] if rarest else []


def _tail(results: Results, row: Mapping[str, Any]) -> str:
    if not results.rarest:
        return ""
    first, last = next(iter(results.groups)), results.rarest
    text = f"; in the {group_name(last)} classes {with_interval(row[last], space=' % ')}"
    if first == "medium":
        return text
    points = round(100 * (row[first]["value"] - row[last]["value"]), 1)
    if not points:
        return f"{text}, as in the {group_name(first)} classes"
    than = f"{'less' if points > 0 else 'more'} than in the {group_name(first)} classes"
    return f"{text}, {abs(points):.1f} points {than}"
