"""What becomes of an evaluation: a table on the terminal, files, figures.

A *summary* is what `metrics.summarize` returns. *meta* says what was evaluated; `write_report` lists its
keys. Conditions ('clean', 'fgsm', ...) are taken from the summary, never assumed, but for the first, 'clean',
and the last, 'worst'.
"""

import csv
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, LogLocator, MultipleLocator, NullFormatter, ScalarFormatter
from rich import box
from rich.console import Console
from rich.table import Table

from robal_jax.errors import InputError

# Order and names of the known keys of meta in the report.
_META_LABELS = {
    "method": "Method",
    "dataset": "Data set",
    "imbalance": "Imbalance",
    "n": "Test images",
    "norm": "Threat model: norm",
    "epsilon": "Threat model: radius",
    "steps": "Attack steps",
    "step_size": "Attack step size",
    "start": "Attack start",
    "head": "Head under attack",
    "logit_scale": "Logit scale under attack",
    "prior_adjustment": "Prior adjustment at test time",
    "main_attack": "Main attack",
    "checkpoint": "Checkpoint",
    "checkpoint_sha256": "Checkpoint SHA-256",
    "seed": "Seed",
    "evaluation_seed": "Seed of the attacks",
    "precision": "Precision of products",
    "test_set_sha256": "Test set SHA-256",
    "versions": "Versions",
    "device": "Device",
    "date": "Date",
}
_META_ELSEWHERE = ("class_names",)

# Okabe and Ito's colours: told apart in every common form of colour blindness.
_BLUE, _ORANGE, _GREEN, _GRAY = "#0072B2", "#D55E00", "#009E73", "#D9D9D9"
_DPI = 150
_MANY_CLASSES = 20  # from here on figures name every tenth class only

_READING_NOTE = """\
- Every share of test images has a 95 % Wilson interval; macro means have a 95 % percentile interval of a
  bootstrap within classes. Both cover the choice of test images only, not the spread over training seeds.
- *Accuracy* looks at the attacked image alone. Natural error (wrong when clean) plus boundary error (right
  when clean, wrong under the attack) is the robust error; an image that is wrong when clean counts as broken.
- *Worst* counts an image as right only if it is right under every condition of the table.
- Attacks that follow the gradient of the cross-entropy (FGSM, PGD, MIM) depend on the scale of the logits: a
  large scale saturates the softmax, a small one flattens it, and either can raise the accuracy without making
  the model more robust. Compare models at several scales, or by an attack that does not depend on the scale.
- Attacks with a fixed step size are no AutoAttack: they bound robust accuracy from above, less tightly than
  the standard ensemble does.
"""


def display_name(condition: str) -> str:
    """Give the name of a condition for people: 'clean' -> 'Clean', 'pgd_20' -> 'PGD-20'."""
    if condition in ("clean", "worst"):
        return condition.capitalize()
    return condition.upper().replace("_", "-")


def terminal() -> Console:
    """Where tables go: as wide as the terminal is, 100 columns where there is none."""
    console = Console()
    return console if console.is_terminal else Console(width=100)


def evaluation_table(summary: Mapping[str, Any], console: Console) -> None:
    """Print one row per condition, in percent; `write_report` has the intervals of all columns.

    Args:
        summary: see `metrics.summarize`.
        console: where to print.
    """
    groups = list(summary["groups"])
    figures = (*groups, "balanced_accuracy", "f_score", "natural_error", "boundary_error")
    headers = (*map(str.capitalize, groups), "Balanced", "Macro F", "Nat. err.", "Bound. err.")
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), title="Percent of test images [95 % interval]")
    table.add_column("Condition", no_wrap=True)
    for header in ("Accuracy", *headers):
        table.add_column(header, justify="right", no_wrap=True)
    for name, condition in summary["conditions"].items():
        cells = [_percent(condition[figure]) for figure in figures]
        table.add_row(display_name(name), with_interval(condition["accuracy"]), *cells)
    console.print(table)


def write_report(folder: Path, summary: Mapping[str, Any], meta: Mapping[str, Any]) -> list[Path]:
    """Write results.json, per_class.csv, report.md, per_class.png and attacks.png.

    Each file is written under another name and then renamed, so that it is never found half written.

    Args:
        folder: where to write; made if it is missing.
        summary: see `metrics.summarize`.
        meta: JSON values. Needed: 'method', 'dataset' and 'main_attack' (the condition that stands for
            robustness in figures). Known: 'imbalance', 'n', 'norm', 'epsilon', 'steps', 'step_size',
            'start', 'logit_scale', 'prior_adjustment', 'checkpoint', 'checkpoint_sha256', 'seed',
            'versions' ({package: version}), 'device', 'date', 'class_names' (list of K). The report prints
            any other key as it is.

    Returns:
        The files written.

    Raises:
        InputError: the main attack was not evaluated, or the folder cannot be written.
    """
    if meta["main_attack"] not in summary["conditions"]:
        raise InputError(
            f"The main attack '{meta['main_attack']}' is not among the evaluated conditions: "
            f"{', '.join(summary['conditions'])}."
        )
    contents = {
        "results.json": json.dumps({"meta": meta, "summary": summary}, indent=1, allow_nan=False).encode(),
        "per_class.csv": _per_class_csv(summary, meta).encode(),
        "per_class.png": _png(per_class_figure(summary, meta)),
        "attacks.png": _png(attacks_figure(summary, meta)),
        "report.md": _report(summary, meta).encode(),
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in contents.items():
            partial = folder / f".{name}.partial"
            partial.write_bytes(content)
            partial.replace(folder / name)
    except OSError as error:
        raise InputError(f"Cannot write the report to {folder}: {error.strerror}.") from error
    return [folder / name for name in contents]


def per_class_figure(summary: Mapping[str, Any], meta: Mapping[str, Any]) -> Figure:
    """Draw clean, main-attack and worst-case accuracy class by class over the training counts.

    Args:
        summary: see `metrics.summarize`.
        meta: see `write_report`.

    Returns:
        The figure; classes are sorted from head to tail.
    """
    groups = summary["groups"]
    order = np.concatenate(list(groups.values()))
    positions = np.arange(len(order))
    many = len(order) > _MANY_CLASSES
    figure = Figure(figsize=(14, 5.5) if many else (9, 5), layout="constrained")
    axes = figure.subplots()
    counts_axes = axes.twinx()
    axes.set_zorder(counts_axes.get_zorder() + 1)  # accuracies in front of the counts
    axes.patch.set_visible(False)

    counts = np.asarray(summary["class_counts"])[order]
    counts_axes.bar(positions, counts, width=1.0 if many else 0.9, color=_GRAY, label="Training images")
    counts_axes.set_yscale("log")
    # A bar of the smallest class keeps a visible height.
    counts_axes.set_ylim(max(counts.min(), 1) / 2, 2 * counts.max())
    counts_axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    counts_axes.yaxis.set_major_formatter(ScalarFormatter())  # 500, not 5 x 10^2
    counts_axes.yaxis.set_minor_formatter(NullFormatter())
    counts_axes.set_ylabel("Training images of the class (log scale)")

    styles = ((-0.25, _BLUE, "o"), (0.0, _ORANGE, "s"), (0.25, _GREEN, "v"))
    for name, (shift, color, marker) in zip(headline(meta), styles, strict=False):
        recall = summary["conditions"][name]["per_class"]["recall"]
        _errorbar(
            axes,
            positions + shift,
            [recall[k] for k in order],
            color=color,
            marker=marker,
            markersize=3.5 if many else 6,
            elinewidth=0.7 if many else 1.4,
            label=display_name(name),
        )
    _accuracy_axis(axes, "Accuracy on the test images of the class (%)")
    axes.set_ylim(-2, 110)  # room for whole markers at 0 and for the group names above 100
    start = 0
    for name, classes in groups.items():
        axes.text(start + (len(classes) - 1) / 2, 105, name, ha="center", va="center", style="italic")
        start += len(classes)
        if start < len(order):
            axes.axvline(start - 0.5, color="black", linewidth=0.8, linestyle=":")

    shown = positions[::10] if many else positions
    names = [_class_name(meta, k) for k in order[shown]]
    long_names = max(map(len, names)) > 4
    axes.xaxis.set_major_locator(FixedLocator(list(shown)))
    axes.set_xticklabels(names, rotation=30 if long_names else 0, ha="right" if long_names else "center")
    axes.set_xlabel(
        "Class, from the most to the fewest training images" + (" (every tenth named)" if many else "")
    )
    axes.set_xlim(-0.7, len(order) - 0.3)
    axes.set_title(f"{_title(meta)}: accuracy by class, 95 % intervals")
    figure.legend(loc="outside lower center", ncols=4, frameon=False)
    return figure


def attacks_figure(summary: Mapping[str, Any], meta: Mapping[str, Any]) -> Figure:
    """Draw accuracy under each attack, of all classes and of the tail side by side.

    Args:
        summary: see `metrics.summarize`.
        meta: see `write_report`.

    Returns:
        The figure; the clean accuracy stands first for scale.
    """
    conditions = summary["conditions"]
    positions = np.arange(len(conditions))
    figure = Figure(figsize=(max(6.0, 2.0 + 0.9 * len(conditions)), 4.5), layout="constrained")
    axes = figure.subplots()
    series = [("accuracy", "All classes", _BLUE, "o")]
    if "tail" in summary["groups"]:
        series.append(("tail", "Tail classes", _ORANGE, "s"))
    for shift, (figure_name, label, color, marker) in zip((-0.12, 0.12), series, strict=False):
        values = [condition[figure_name] for condition in conditions.values()]
        _errorbar(
            axes, positions + shift, values, color=color, marker=marker, markersize=4, capsize=4, label=label
        )
        for x, value in zip(positions + shift, values, strict=True):
            # Outwards, so that the numbers of the two series never meet.
            offset, side = (-7, "right") if shift < 0 else (7, "left")
            axes.annotate(
                _percent(value),
                (x, 100 * value["value"]),
                xytext=(offset, 0),
                textcoords="offset points",
                ha=side,
                va="center",
                fontsize=8,
                color=color,
            )
    _accuracy_axis(axes, "Accuracy (% of test images)")
    axes.margins(y=0.1)
    axes.set_ylim(bottom=-2)
    axes.axvline(0.5, color="black", linewidth=0.8, linestyle=":")
    axes.set_xticks(positions, [display_name(name) for name in conditions])
    axes.set_xlim(-0.6, len(conditions) - 0.4)
    axes.set_xlabel("Attack")
    axes.set_title(f"{_title(meta)}: robust accuracy by attack, 95 % intervals")
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    return figure


def _errorbar(axes: Axes, x: np.ndarray, values: Sequence[Mapping[str, float]], **style: Any) -> None:
    """Draw figures with their intervals, in percent."""
    value, low, high = (100 * np.array([entry[key] for entry in values]) for key in ("value", "low", "high"))
    axes.errorbar(x, value, yerr=(value - low, high - value), linestyle="none", **style)


def _accuracy_axis(axes: Axes, label: str) -> None:
    axes.yaxis.set_major_locator(MultipleLocator(20))
    axes.grid(axis="y", linewidth=0.5, alpha=0.6)
    axes.set_ylabel(label)


def _title(meta: Mapping[str, Any]) -> str:
    return f"{meta['method']} on {meta['dataset']}"


def headline(meta: Mapping[str, Any]) -> list[str]:
    """The conditions to see at a glance; the main attack may itself be 'clean' or 'worst'."""
    return list(dict.fromkeys(("clean", meta["main_attack"], "worst")))


def _class_name(meta: Mapping[str, Any], index: int) -> str:
    return meta["class_names"][index] if meta.get("class_names") else str(index)


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=_DPI)
    return buffer.getvalue()


def _per_class_csv(summary: Mapping[str, Any], meta: Mapping[str, Any]) -> str:
    rows = [
        {
            "class": index,
            "name": _class_name(meta, index),
            "train_count": count,
            "support": figures["support"][index],
            "condition": name,
            "recall": figures["recall"][index]["value"],
            "recall_low": figures["recall"][index]["low"],
            "recall_high": figures["recall"][index]["high"],
            "precision": figures["precision"][index],
            "f_score": figures["f_score"][index],
        }
        for index, count in enumerate(summary["class_counts"])
        for name, figures in ((name, entry["per_class"]) for name, entry in summary["conditions"].items())
    ]
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue()


def _report(summary: Mapping[str, Any], meta: Mapping[str, Any]) -> str:
    known = [key for key in _META_LABELS if key in meta]
    others = [key for key in meta if key not in _META_LABELS and key not in _META_ELSEWHERE]
    settings = ((_META_LABELS.get(key, key), printed(meta[key])) for key in known + others)
    parts = [
        f"# {_title(meta)}",
        "## What was evaluated",
        _markdown(("Setting", "Value"), settings),
        *_condition_section(summary["conditions"]),
        *_group_section(summary),
        *_class_section(summary, meta),
        "## How to read this",
        _READING_NOTE,
    ]
    return "\n\n".join(parts)


def _by_condition(figures: Mapping[str, str], conditions: Mapping[str, Any]) -> str:
    """Table of figures (key: heading) with intervals, a row per condition."""
    rows = (
        (display_name(name), *(with_interval(row[key]) for key in figures))
        for name, row in conditions.items()
    )
    return _markdown(("Condition", *figures.values()), rows)


def _condition_section(conditions: Mapping[str, Any]) -> list[str]:
    accuracies = {
        "accuracy": "Accuracy",
        "balanced_accuracy": "Balanced accuracy",
        "precision": "Macro precision",
        "f_score": "Macro F-score",
    }
    errors = {
        "natural_error": "Natural error",
        "boundary_error": "Boundary error",
        "robust_accuracy": "Right on both",
    }
    return [
        "## All conditions",
        "Percent, with 95 % intervals. Macro recall is the balanced accuracy.",
        _by_condition(accuracies, conditions),
        "Natural error + boundary error + right on both = 100 %.",
        _by_condition(errors, {name: row for name, row in conditions.items() if name != "clean"}),
        "![Robust accuracy by attack](attacks.png)",
    ]


def _group_section(summary: Mapping[str, Any]) -> list[str]:
    conditions, groups, counts = summary["conditions"], summary["groups"], summary["class_counts"]

    def count_range(classes: Sequence[int]) -> str:
        return f"{min(counts[k] for k in classes)} to {max(counts[k] for k in classes)}"

    parts = [
        "## Head, medium and tail classes",
        "Accuracy in percent over the test images of the group, with 95 % intervals.",
        _markdown(
            ("Group", "Classes", "Training images per class"),
            ((name, len(classes), count_range(classes)) for name, classes in groups.items()),
        ),
        _by_condition({name: name.capitalize() for name in groups}, conditions),
    ]
    if "groups_of_ten" in conditions["clean"]:
        rows = (
            (display_name(name), *(f"{100 * mean:.1f}" for mean in condition["groups_of_ten"]))
            for name, condition in conditions.items()
        )
        parts += [
            "## Ten groups of consecutive classes",
            "Mean recall of the classes in percent, from the first tenth of the class indices to the last.",
            _markdown(("Condition", *range(1, 11)), rows),
        ]
    return parts


def _class_section(summary: Mapping[str, Any], meta: Mapping[str, Any]) -> list[str]:
    conditions, shown = summary["conditions"], headline(meta)
    support = conditions["clean"]["per_class"]["support"]
    rows = (
        (
            index,
            _class_name(meta, index),
            count,
            support[index],
            *(_percent(conditions[name]["per_class"]["recall"][index]) for name in shown),
        )
        for index, count in enumerate(summary["class_counts"])
    )
    return [
        "## Classes",
        "![Accuracy by class](per_class.png)",
        "Accuracy in percent; all conditions, intervals, precision and F-score are in per_class.csv.",
        _markdown(("Class", "Name", "Training images", "Test images", *map(display_name, shown)), rows),
    ]


def _markdown(header: Iterable[Any], rows: Iterable[Iterable[Any]]) -> str:
    def line(cells: Iterable[Any]) -> str:
        return "| " + " | ".join(str(cell).replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"

    header = list(header)
    return "\n".join((line(header), "|" + " --- |" * len(header), *map(line, rows)))


def printed(value: Any) -> str:
    """Print a value of meta on one line."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {printed(entry)}" for key, entry in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(printed, value))
    if isinstance(value, float):
        return f"{value:.6g}"
    return "none" if value is None else str(value)


def _percent(figure: Mapping[str, float]) -> str:
    return f"{100 * figure['value']:.1f}"


def with_interval(figure: Mapping[str, float], sign: str = "", space: str = " ") -> str:
    """A figure with its interval, in percent: '70.1 [66.7, 73.4]'."""
    value, low, high = (format(100 * figure[key], f"{sign}.1f") for key in ("value", "low", "high"))
    return f"{value}{space}[{low}, {high}]"
