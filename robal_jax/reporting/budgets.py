"""Radii that differ by class: what a report says of them, and the accuracy at the common radius beside it."""

import contextlib
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

from robal_jax.errors import InputError
from robal_jax.reporting import page
from robal_jax.reporting.names import BY_CLASS, display_name, folded, group_name, radius, with_interval
from robal_jax.reporting.results import MANY_CLASSES, Results
from robal_jax.storage.config_file import evaluation_fields

# What may differ between an evaluation at the common radius and one at radii by class.
_MAY_DIFFER = (
    "evaluation.budget.", "evaluation.autoattack", "evaluation.audit.", "evaluation.minimum_norm",
    "evaluation.corruptions", "evaluation.certified", "evaluation.optimality",
)  # fmt: skip


def at_common_radius(folders: Iterable[pathlib.Path], meta: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the accuracies of the same weights at the common radius, as ``meta`` holds them.

    Args:
      folders: of evaluations of the run, finished or not; the first that fits is taken.
      meta: of the evaluation at radii by class.

    Returns:
      'common_epsilon'; {} if there is no such evaluation.
    """
    for folder in folders:
        with contextlib.suppress(InputError):  # it is not finished, or not an evaluation
            common = Results.read(folder)
            if "class_epsilon" not in common.meta and _settled(common.meta) == _settled(meta):
                return _as_common(common, folder, meta)
    return {}


def _as_common(common: Results, folder: pathlib.Path, meta: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the accuracies of an evaluation, of all images and of the rarest group, as 'common_epsilon'."""
    groups = ["accuracy", *filter(None, [common.rarest])]
    same = common.meta.get("autoattack") == meta.get("autoattack")
    rows = {name: row for name, row in common.conditions.items() if same or not name.startswith("custom")}
    figures = {group: {name: row[group] for name, row in rows.items()} for group in groups}
    return {"common_epsilon": {"folder": str(folder), **figures}}


def _settled(meta: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what two evaluations of the same weights on the same images agree in."""
    fields = evaluation_fields(meta.get("config", {}))
    kept = {name: value for name, value in fields.items() if not name.startswith(_MAY_DIFFER)}
    return kept | {key: meta.get(key) for key in ("checkpoint_sha256", "test_set_sha256")}


def budget_section(results: Results) -> list[page.Block]:
    """Returns the radii of the classes, and the accuracies at the common radius; nothing for one radius."""
    meta, counts = results.meta, results.summary["class_counts"]
    if "class_epsilon" not in meta:
        return []
    radii = zip(map(results.class_name, range(len(counts))), counts, meta["class_epsilon"], strict=True)
    rows = [(name, count, f"{value:.6g}") for name, count, value in radii]
    table = page.table(("Class", "Training images", "Radius"), rows)
    common = f"; the common radius is {radius(meta['epsilon'])}" if "epsilon" in meta else ""
    return [
        page.section("Budgets by class"),
        page.paragraph(
            f"{BY_CLASS.capitalize()}. Each class has its own radius, by the rule {meta['budget']}{common}. "
            "Do not compare these accuracies with others, which are at one radius for all classes."
        ),
        table if len(rows) <= MANY_CLASSES else page.folded(f"Radii of all {len(rows)} classes", table),
        *_beside(results),
    ]


def _beside(results: Results) -> list[page.Block]:
    """Returns the accuracies at radii by class and at the common radius in one table."""
    common = results.meta.get("common_epsilon")
    if common is None:
        return []
    names = {"accuracy": "all", results.rarest: group_name(results.rarest)}
    groups = {key: name for key, name in names.items() if key in common}
    header = [f"{name.capitalize()}, {where}" for name in groups.values() for where in ("by class", "common")]
    rows = folded(
        (display_name(name), [with_interval(of) for key in groups for of in (row[key], common[key][name])])
        for name, row in results.conditions.items()
        if name in common["accuracy"]
    )
    text = f"The same weights at the common radius, from {common['folder']}, in percent with 95 % intervals:"
    return [
        page.paragraph(text),
        page.table(("Condition", *header), ((name, *cells) for name, cells in rows)),
    ]
