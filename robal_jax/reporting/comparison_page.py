"""The comparison of runs as one page of HTML, which loads nothing."""

from collections.abc import Mapping, Sequence

import numpy as np

from robal_jax.reporting import comparison, figures, page
from robal_jax.reporting.names import BY_CLASS, display_name, group_name, threat, with_interval
from robal_jax.reporting.results import EvaluatedRun


def comparison_html(runs: Sequence[EvaluatedRun]) -> str:
    """Returns the tables of :func:`comparison.compare`, and the differences as sentences and as a figure.

    Args:
      runs: at least one; every other run is compared with the first.

    Raises:
      InputError: the runs cannot be compared.
    """
    tables, pairs = comparison.compare(runs), comparison.paired(runs)
    first = comparison.shared_conditions(runs)[0]
    reference = next(iter(comparison.by_method(runs)))
    facts = [f"{len(runs)} runs on {first.meta['dataset']}", f"{len(first.examples['labels'])} test images"]
    facts += [threat(first.meta), BY_CLASS if "class_epsilon" in first.meta else ""]
    blocks = [page.paragraph(" · ".join(filter(None, facts)))]
    if pairs:
        attack = first.headline_attack if first.headline_attack in first.conditions else "worst"
        blocks += [
            page.lead(f"Compared with {reference} under {display_name(attack)}, image by image:"),
            page.points(_sentences([pair for pair in pairs if pair.condition == attack])),
            page.section("Differences"),
            page.paragraph(
                "Accuracy of the run minus that of the reference, in points, with paired 95 % intervals. An "
                "interval that contains 0 shows no clear difference."
            ),
            figures.block(
                figures.differences_figure(pairs, reference),
                "differences.png",
                f"Differences to {reference} by class group",
            ),
        ]
    for heading, table in reversed(list(zip(("Runs", "Accuracy", "", ""), tables, strict=False))):
        blocks += [page.section(heading)] if heading else []
        blocks += [page.paragraph(f"{table.title}:")] if table.title not in (heading, *table.header) else []
        blocks.append(page.table(table.header, table.rows))
    return page.to_html(comparison.TITLE, blocks)


def _sentences(pairs: Sequence[comparison.Paired]) -> list[tuple[str, str]]:
    """Returns the differences of each method in all classes and in the rarest group, in words."""
    rows: dict[str, list[comparison.Paired]] = {}
    for pair in pairs:
        rows.setdefault(pair.row, []).append(pair)
    _, *groups = pairs[0].figures if pairs else ("all",)
    places = {"all": "on all test images"}
    places |= {rarest: f"in the {group_name(rarest)} classes" for rarest in groups[-1:]}
    return [
        (
            row,
            "; ".join(
                f"{_in_words([pair.figures[group] for pair in members])} {where}"
                for group, where in places.items()
                if group in members[0].figures
            ),
        )
        for row, members in rows.items()
    ]


def _in_words(differences: Sequence[Mapping[str, float]]) -> str:
    """Returns one difference with its interval and p-value, or the mean of several with their range."""
    if len(differences) == 1:
        p_value = comparison.printed_p(differences[0]["p_value"])
        return f"{with_interval(differences[0], '+', ' points ')} ({p_value})"
    values = [100 * figure["value"] for figure in differences]
    mean, low, high = (f"{value:+.1f}" for value in (np.mean(values), min(values), max(values)))
    return f"{mean} points (mean of {len(values)} seeds, {low} to {high})"
