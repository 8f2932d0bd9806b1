"""Certified accuracy, which no attack can undercut, beside that under attack, which a better one may."""

from collections.abc import Mapping
from typing import Any

from robal_jax.reporting import page
from robal_jax.reporting.names import group_columns, part_of_radius, threat, with_interval
from robal_jax.reporting.results import Results


def certified_section(results: Results) -> list[page.Block]:
    """Returns both accuracies with their gap, then the certified ones by radius; or nothing."""
    found = results.certified
    if not found:
        return []
    columns = group_columns(results.groups)
    return [
        page.section("Certified"),
        page.paragraph(
            f"Certified images have no adversarial image within {_where(results)}, whatever the attack. "
            "Linear bounds of the network (CROWN) show this, rounding included. The robust accuracy on these "
            "images lies between the certified accuracy and that under the worst of all attacks here. "
            "Accuracies are in percent, with 95 % intervals; gaps are in points."
        ),
        _between(results, columns),
        page.paragraph(_contradictions(results)),
        page.paragraph("Certified accuracy by radius:"),
        _by_radius(results, columns),
    ]


def bounds_in_words(results: Results) -> str:
    """Returns both bounds of the robust accuracy in one sentence.

    Args:
      results: with certified accuracies.

    Returns:
      'At L∞ 0.1, 11.3 % [9.1, 13.9] of the images are certified, and 69.1 % are right under all attacks.'
    """
    share = with_interval(_whole(results)["accuracy"], space=" % ")
    worst = 100 * results.conditions["worst"]["accuracy"]["value"]
    more = f" {_contradictions(results)}" if results.certified["broken"] else ""
    return (
        f"At {_where(results)}, {share} of the images are certified, and {worst:.1f} % are right under all "
        f"attacks.{more}"
    )


def _whole(results: Results) -> Mapping[str, Any]:
    """Returns the accuracies at the threat model's own radius."""
    return results.certified["by_factor"][-1]


def _where(results: Results) -> str:
    return threat(results.meta) or "the radius"


def _contradictions(results: Results) -> str:
    broken = results.certified["broken"]
    if not broken and not _whole(results)["accuracy"]["value"]:
        return f"No image is certified within {_where(results)}."
    if not broken:
        return "No certified image is broken by an attack."
    return (
        f"Contradiction: {broken} certified images are misclassified, clean or under an attack. Trust no "
        "number here; see the audit."
    )


def _between(results: Results, columns: Mapping[str, str]) -> page.Block:
    """Returns lower bound, upper estimate and gap, of all classes and by group."""
    low, high = _whole(results), results.conditions["worst"]
    rows = [
        (name, *(with_interval(row[key]) for key in columns))
        for name, row in (("Certified (lower bound)", low), ("Worst attack (upper estimate)", high))
    ]
    gaps = (f"{100 * (high[key]['value'] - low[key]['value']):.1f}" for key in columns)
    return page.table(("Accuracy", *columns.values()), [*rows, ("Gap", *gaps)])


def _by_radius(results: Results, columns: Mapping[str, str]) -> page.Block:
    """Returns a row per part of the radius."""
    rows = (
        (
            part_of_radius(factor, results.meta),
            *(with_interval(row[key]) for key in columns),
        )
        for factor, row in zip(results.certified["factors"], results.certified["by_factor"], strict=True)
    )
    return page.table(("Radius", *columns.values()), rows)
