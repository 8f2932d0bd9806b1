"""Accuracies on corrupted images, beside those on clean and on attacked ones."""

from robal_jax.reporting import page
from robal_jax.reporting.names import (
    corruption_name,
    display_name,
    group_columns,
    group_name,
    percent,
    with_interval,
)
from robal_jax.reporting.results import MANY_CLASSES, Results

CORRUPTED = "Corrupted, mean"

NOTE = (
    "The strengths are CIFAR-10-C's, in pixels: images smaller than 32 x 32 are corrupted more, larger ones "
    "less. Frost is drawn, not photographed, so that its figures and the mean are not comparable with "
    "CIFAR-10-C's."
)


def corruption_section(results: Results) -> list[page.Block]:
    """Returns the mean accuracy beside the robust one, then those by corruption and by class; or nothing."""
    found = results.corruptions
    if not found:
        return []
    return [
        page.section("Common corruptions"),
        page.paragraph(
            f"Accuracy in percent on test images that are corrupted and not attacked: {_kinds(results)}. "
            f"Intervals hold at least 95 %. {NOTE}"
        ),
        _beside(results),
        page.paragraph("By corruption: means over the strengths, and the accuracy at each strength."),
        _by_corruption(results),
        *_by_class(results),
    ]


def mean_in_words(results: Results) -> str:
    """Returns the mean accuracy on corrupted images in one sentence.

    Args:
      results: with corruptions.

    Returns:
      'Of corrupted images 87.5 % [84.8, 89.7] are classified correctly (mean of 15 common corruptions at 5
      strengths); in the tail classes 83.5 %.'
    """
    mean, rarest = results.corruptions["mean"], results.rarest
    tail = f"; in the {group_name(rarest)} classes {percent(mean[rarest])} %" if rarest else ""
    share = with_interval(mean["accuracy"], space=" % ")
    return f"Of corrupted images {share} are classified correctly ({_kinds(results)}){tail}."


def _kinds(results: Results) -> str:
    """Returns how many corruptions and strengths there are."""
    kinds = results.corruptions["by_corruption"]
    strengths = len(next(iter(kinds.values()))["strengths"])
    return f"mean of {len(kinds)} common corruptions at {strengths} strengths"


def _beside(results: Results) -> page.Block:
    """Returns the accuracies on clean, corrupted and attacked images, of all classes and by group."""
    columns = group_columns(results.groups)
    attack = results.headline_attack
    rows = {
        "Clean": results.conditions["clean"],
        CORRUPTED: results.corruptions["mean"],
        display_name(attack): results.conditions[attack],
    }
    cells = ((name, *(with_interval(row[key]) for key in columns)) for name, row in rows.items())
    return page.table(("Images", *columns.values()), cells)


def _by_corruption(results: Results) -> page.Block:
    """Returns a row per corruption."""
    kinds, groups = results.corruptions["by_corruption"], list(results.groups)
    strengths = range(1, 1 + len(next(iter(kinds.values()))["strengths"]))
    rows = (
        (
            corruption_name(name),
            with_interval(row["accuracy"]),
            *(percent(row[group]) for group in groups),
            *(percent(one["accuracy"]) for one in row["strengths"]),
        )
        for name, row in kinds.items()
    )
    header = ("Corruption", *group_columns(groups).values())
    return page.table((*header, *(f"Strength {number}" for number in strengths)), rows)


def _by_class(results: Results) -> list[page.Block]:
    """Returns a row per class."""
    counts, attack = results.summary["class_counts"], results.headline_attack
    clean, attacked = (results.conditions[name]["per_class"]["recall"] for name in ("clean", attack))
    names = [results.class_name(index) for index in range(len(counts))]
    shares = zip(clean, results.corruptions["mean"]["per_class"], attacked, strict=True)
    rows = [(*one, *map(percent, row)) for *one, row in zip(names, counts, shares, strict=True)]
    table = page.table(("Class", "Training images", "Clean", CORRUPTED, display_name(attack)), rows)
    if len(rows) > MANY_CLASSES:
        return [page.folded(f"All {len(rows)} classes", table)]
    return [page.paragraph("By class:"), table]
