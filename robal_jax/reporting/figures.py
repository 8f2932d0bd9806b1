"""The figures of a report by class, by attack and by image; ``curves`` has the others.

Each function returns a figure that belongs to no window and no global state. Series are told apart by colour
and by marker; intervals are 95 %. Classes are sorted from head to tail, that is from the most to the fewest
training images.
"""

import functools
import io
import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import (
    FixedLocator,
    LogLocator,
    MultipleLocator,
    NullFormatter,
    ScalarFormatter,
)

from robal_jax.reporting import page
from robal_jax.reporting.comparison import Paired
from robal_jax.reporting.names import display_name, folded, group_name, shortened
from robal_jax.reporting.results import MANY_CLASSES, Gallery, Results

# Okabe and Ito's colours: told apart in every common form of colour blindness.
BLUE, ORANGE, _GREEN, _PURPLE, _GRAY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#D9D9D9"

STYLES = ((BLUE, "o"), (ORANGE, "s"), (_GREEN, "v"), (_PURPLE, "D"), ("#000000", "x"), ("#56B4E9", "^"))

_DPI = 150

_WIDE = 10.5  # inches; a small screen shows wider figures larger

_MOST_NAMES = 100  # with more classes, figures name some of them only


def per_class_figure(results: Results) -> Figure:
    """Draws the accuracies of the headline by class, in front of the numbers of training images."""
    order = _order(results)
    positions = np.arange(len(order))
    many = len(order) > MANY_CLASSES
    figure = Figure(figsize=(14, 5.5) if many else (10, 5), layout="constrained")
    axes = figure.subplots()
    counts_axes = axes.twinx()
    axes.set_zorder(counts_axes.get_zorder() + 1)  # accuracies in front of the counts
    axes.patch.set_visible(False)
    _count_bars(counts_axes, np.asarray(results.summary["class_counts"])[order], many)
    counts_axes.set_ylabel("Training images of the class (log scale)")

    shown = folded(
        (display_name(name), results.conditions[name]["per_class"]["recall"]) for name in results.headline
    )[: 3 if many else None]  # four would be too many to read
    shifts = 0.22 * (np.arange(len(shown)) - (len(shown) - 1) / 2)
    for (name, recall), shift, (color, marker) in zip(shown, shifts, STYLES, strict=False):
        errorbar(
            axes,
            positions + shift,
            [recall[k] for k in order],
            color=color,
            marker=marker,
            markersize=3.5 if many else 6,
            elinewidth=0.7 if many else 1.4,
            label=name,
        )
    accuracy_axis(axes, "Accuracy on the test images of the class (%)")
    axes.set_ylim(-2, 102)  # whole markers at 0 and 100
    _class_axis(axes, results)
    figure.suptitle(f"{title(results)}: accuracy by class, 95 % intervals")
    figure.legend(loc="outside lower center", ncols=5, frameon=False)
    return figure


def attacks_figure(results: Results) -> Figure:
    """Draws the accuracy under each attack, of all classes and of the rarest group side by side."""
    series = [("accuracy", "All classes", BLUE, "o")]
    if results.rarest:
        label = f"{group_name(results.rarest).capitalize()} classes"
        series.append((results.rarest, label, ORANGE, "s"))
    conditions = folded(
        (display_name(name), [condition[shown] for shown, *_ in series])
        for name, condition in results.conditions.items()
    )
    positions = np.arange(len(conditions))
    figure = Figure(figsize=(max(6.5, 1.2 + 1.1 * len(conditions)), 4.5), layout="constrained")
    axes = figure.subplots()
    for number, (shift, (_, label, color, marker)) in enumerate(zip((-0.12, 0.12), series, strict=False)):
        values = [figures[number] for _, figures in conditions]
        errorbar(
            axes, positions + shift, values, color=color, marker=marker, markersize=4, capsize=4, label=label
        )
        for x, value in zip(positions + shift, values, strict=True):
            # Outwards, so that the numbers of the two series never overlap.
            offset, side = (-7, "right") if shift < 0 else (7, "left")
            axes.annotate(
                f"{100 * value['value']:.1f}",
                (x, 100 * value["value"]),
                xytext=(offset, 0),
                textcoords="offset points",
                ha=side,
                va="center",
                fontsize=8,
                color=color,
            )
    accuracy_axis(axes, "Accuracy (% of test images)")
    axes.margins(y=0.1)
    axes.set_ylim(bottom=-2)
    axes.axvline(0.5, color="black", linewidth=0.8, linestyle=":")
    axes.set_xticks(positions, [re.sub(" (?=[+=] )", "\n", name) for name, _ in conditions])
    axes.set_xlim(-0.6, len(conditions) - 0.4)
    axes.set_xlabel("Attack")
    axes.set_title(f"{title(results)}: robust accuracy by attack, 95 % intervals")
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    return figure


def differences_figure(pairs: Sequence[Paired], reference: str) -> Figure:
    """Draws differences of runs to a reference with their intervals, by group of classes and by condition."""
    panels = folded(
        (display_name(condition), [pair[1:] for pair in pairs if pair.condition == condition])
        for condition in dict.fromkeys(pair.condition for pair in pairs)
    )
    rows = list(dict.fromkeys(pair.row for pair in pairs))
    groups = list(pairs[0].figures)
    width = max(2.6, 0.5 + 0.5 * len(groups) * max(1.0, len(panels[0][1]) / 3))
    size = (min(max(6.5, 0.9 + width * len(panels)), 12), 4.4)
    figure = Figure(figsize=size, layout="constrained")
    handles: dict[str, Any] = {}
    names = {name: plain(shortened(short, 40)) for name, short in _below_common([*rows, reference]).items()}
    for axes, (name, shown) in zip(
        figure.subplots(1, len(panels), sharey=True, squeeze=False)[0], panels, strict=True
    ):
        shifts = (np.arange(len(shown)) - (len(shown) - 1) / 2) * min(0.2, 0.7 / len(shown))
        for (row, _, figures), shift in zip(shown, shifts, strict=True):
            color, marker = STYLES[rows.index(row) % len(STYLES)]
            places = np.arange(len(groups)) + shift
            handles[row] = errorbar(
                axes, places, list(figures.values()), color=color, marker=marker, markersize=5, capsize=3
            )
        axes.axhline(0, color="black", linewidth=1)
        axes.grid(axis="y", linewidth=0.5, alpha=0.6)
        axes.set_xticks(range(len(groups)), [group_name(group).capitalize() for group in groups])
        axes.set_xlim(-0.6, len(groups) - 0.4)
        axes.set_title(re.sub(" (?=[+=] )", "\n", name), fontsize=11)
        axes.set_ylabel(f"Difference to {names[reference]} (points)")
        axes.label_outer()
    legend = map(names.__getitem__, handles)
    figure.legend(handles.values(), legend, loc="outside lower center", ncols=3, frameon=False)
    return figure


def _below_common(names: Sequence[str]) -> dict[str, str]:
    """Returns names that may be folders without the folders that all of them begin with.

    Example:
      >>> _below_common(["runs/a/first", "runs/a/second"])
      {'runs/a/first': 'first', 'runs/a/second': 'second'}
    """
    parts = [name.split("/") for name in names]
    common = len(list(itertools.takewhile(lambda each: len(set(each)) == 1, zip(*parts, strict=False))))
    return {name: "/".join(each[common:]) or name for name, each in zip(names, parts, strict=True)}


def errors_figure(results: Results) -> Figure:
    """Stacks natural error, boundary error and robust accuracy of each class, under the headline attack.

    Source: the decomposition of TRADES (Zhang et al., ICML 2019).
    """
    order, attack = _order(results), results.headline_attack
    per_class = results.conditions[attack]["per_class"]
    natural, boundary = (
        100 * np.asarray(per_class[key])[order] for key in ("natural_error", "boundary_error")
    )
    many = len(order) > MANY_CLASSES
    figure = Figure(figsize=(14, 5) if many else (10, 4.5), layout="constrained")
    axes = figure.subplots()
    parts = (
        ("Robust accuracy (right on both)", 100 - natural - boundary, BLUE, ""),
        ("Boundary error (right only when clean)", boundary, "#F0C48A", "//"),
        ("Natural error (wrong when clean)", natural, "#8C2D04", ""),
    )
    bottom = np.zeros(len(order))
    for label, height, color, hatch in parts:
        axes.bar(
            np.arange(len(order)),
            height,
            width=1.0 if many else 0.85,
            bottom=bottom,
            color=color,
            hatch=hatch,
            edgecolor="white",
            linewidth=0.3 if many else 0.8,
            label=label,
        )
        bottom += height
    accuracy_axis(axes, "Test images of the class (%)")
    axes.set_axisbelow(True)
    axes.set_ylim(0, 100)
    _class_axis(axes, results)
    figure.suptitle(f"{title(results)}: errors by class under {display_name(attack)}")
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    return figure


def confusion_figure(results: Results) -> Figure:
    """Draws the confusion under the headline attack, in percent of the true class.

    Cells carry their numbers up to 20 classes.
    """
    order, attack = _order(results), results.headline_attack
    counts = np.asarray(results.conditions[attack]["confusion"])[np.ix_(order, order)]
    shares = 100 * counts / counts.sum(-1, keepdims=True)
    many = len(order) > MANY_CLASSES
    side = min(11.0, 6.5 + 0.045 * len(order)) if many else max(5.0, 2.2 + 0.5 * len(order))
    figure = Figure(figsize=(side + 0.8, side), layout="compressed")
    axes = figure.subplots()
    # With many classes most shares are small; then the square root of the share sets the colour.
    norm = PowerNorm(0.5 if many else 1, vmin=0, vmax=100)
    image = axes.imshow(shares, cmap="Blues", norm=norm, interpolation="nearest")
    figure.colorbar(image, ax=axes, shrink=0.8, label="Test images of the true class (%)")
    for i, j in np.ndindex(*shares.shape) if not many else ():
        if counts[i, j]:  # an empty cell needs no 0
            color = "white" if shares[i, j] > 55 else "black"
            text = f"{shares[i, j]:.0f}" if shares[i, j] >= 0.5 else "<1"
            axes.text(j, i, text, ha="center", va="center", fontsize=8, color=color)
    shown, names, remark = _named_classes(order, results)
    size = min(8, 600 / len(shown)) if many else 10
    upright = 0.1 * max(map(len, names)) > (side - 2.2) / len(order)  # inches
    axes.set_xticks(shown, names, rotation=90 if upright else 0, fontsize=size)
    axes.set_yticks(shown, names, fontsize=size)
    axes.set_xlabel(f"Predicted class, from head to tail{remark}")
    axes.set_ylabel(f"True class, from head to tail{remark}")
    for boundary in np.cumsum([len(classes) for classes in results.groups.values()])[:-1] - 0.5:
        axes.axhline(boundary, color="black", linewidth=0.8, linestyle=":")
        axes.axvline(boundary, color="black", linewidth=0.8, linestyle=":")
    figure.suptitle(f"{title(results)}:\nconfusion under {display_name(attack)}")
    return figure


def norms_figure(results: Results) -> Figure:
    """Draws the training images of each class above the norms of its weights and of its features.

    Source: weight norms that fall from head to tail are the bias that RoBal's cosine head removes.
    """
    order = _order(results)
    positions = np.arange(len(order))
    many = len(order) > MANY_CLASSES
    norms = results.norms or {}
    labels = {"weights": "Norm of the class\nweight vector", "features": "Mean norm of the\nclass's features"}
    panels = [name for name in labels if norms.get(name) is not None]
    figure = Figure(figsize=(14 if many else 10, 1.4 + 1.9 * (1 + len(panels))), layout="constrained")
    counts_axes, *rest = figure.subplots(1 + len(panels), sharex=True)
    _count_bars(counts_axes, np.asarray(results.summary["class_counts"])[order], many)
    counts_axes.set_ylabel("Training images\n(log scale)")
    for axes, name, (color, marker) in zip(rest, panels, STYLES, strict=False):
        values = np.asarray(norms[name])[order]
        axes.plot(positions, values, color=color, marker=marker, markersize=3.5 if many else 6)
        axes.set_ylim(0, 1.12 * values.max() or 1)
        axes.grid(axis="y", linewidth=0.5, alpha=0.6)
        axes.set_ylabel(labels[name])
    for axes in (counts_axes, *rest):
        _class_axis(axes, results, named=axes is counts_axes)
        axes.label_outer()
    figure.suptitle(f"{title(results)}: training images and norms by class")
    return figure


def gallery_figure(gallery: Gallery, results: Results) -> Figure:
    """Draws images, adversarial images and their magnified difference, with true and predicted class."""
    images, adversarial = (np.asarray(shown, np.float64) for shown in gallery[:2])
    factor = gallery.magnification
    difference = np.clip(0.5 + factor * (adversarial - images), 0, 1)
    height, width = images.shape[1:3]
    gap = np.ones((len(images), height, max(1, width // 10), images.shape[3]))
    strips = np.concatenate([images, gap, adversarial, gap, difference], axis=2)
    strips = np.broadcast_to(strips, (*strips.shape[:3], 3))  # one channel is grey
    columns = min(3, len(images))
    rows = -(-len(images) // columns)
    figure = Figure(figsize=(max(6.5, 4.3 * columns), 0.8 + 1.75 * rows))
    figure.set_layout_engine("constrained", wspace=0.08)
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    centers = [(width - 1) / 2 + place * (width + gap.shape[2]) for place in range(3)]
    for axes in grid:
        axes.set_axis_off()
    for axes, strip, label, found in zip(grid, strips, gallery.labels, gallery.predictions, strict=False):
        axes.set_axis_on()
        axes.imshow(strip, vmin=0, vmax=1, interpolation="nearest")
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0, labelsize=8, colors="#555555")
        axes.set_xticks(centers, ["image", "adversarial", f"difference × {factor}"])
        axes.set_yticks([])
        kept = " (not fooled)" if label == found else ""
        text = f"{_class_label(results, label)} → {_class_label(results, found)}{kept}"
        axes.set_title(text, fontsize=10)
    figure.suptitle(f"{title(results)}: true class → class under {display_name(gallery.condition)}")
    return figure


def block(figure: Figure, name: str, caption: str) -> page.Block:
    """Returns the figure as a part of a page; ``name`` is that of its file."""
    return page.figure(name, caption, svg(figure), wide=figure.get_figwidth() > _WIDE)


def png(figure: Figure) -> bytes:
    """Returns the figure as a PNG file."""
    return _file(figure, "png")


def svg(figure: Figure) -> bytes:
    """Returns the figure as an SVG file with its letters as shapes, the same bytes each time."""
    with matplotlib.rc_context({"svg.hashsalt": "robal_jax", "svg.fonttype": "path"}):
        return _file(figure, "svg", metadata={"Date": None})


def _file(figure: Figure, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format=kind, dpi=_DPI, **options)
    figure.set_layout_engine("none")  # the next file has the same layout
    return buffer.getvalue()


def _order(results: Results) -> np.ndarray:
    """Returns the classes from head to tail."""
    return np.concatenate(list(results.summary["groups"].values()))


def title(results: Results) -> str:
    """Returns model and data set for the title of a figure."""
    return plain(shortened(results.title, 60))


def plain(text: str) -> str:
    """Returns a text that matplotlib shows as it is: no mathematics, no character that its font lacks."""
    known = _characters(font_manager.findfont(font_manager.FontProperties()))
    return "".join(sign if ord(sign) in known else "□" for sign in text).replace("$", "\\$")


@functools.cache
def _characters(font: str) -> frozenset[int]:
    return frozenset(font_manager.get_font(font).get_charmap())


def _class_label(results: Results, index: int) -> str:
    """Returns the name of a class, shortened; its number if the font lacks the name's characters."""
    name = plain(shortened(results.class_name(index)))
    return str(index) if "□" in name else name


def _named_classes(order: np.ndarray, results: Results) -> tuple[np.ndarray, list[str], str]:
    """Returns the positions that have a name, these names, and a remark if others have none."""
    step = -(-len(order) // _MOST_NAMES)
    shown = np.arange(len(order))[::step]
    remark = f" (one in {step} named)" if step > 1 else ""
    return shown, [_class_label(results, k) for k in order[shown]], remark


def _class_axis(axes: Axes, results: Results, *, named: bool = True) -> None:
    """Puts the classes below the axes, and the names of their groups above if ``named``."""
    order = _order(results)
    shown, names, remark = _named_classes(order, results)
    axes.xaxis.set_major_locator(FixedLocator(list(shown)))
    if len(order) > MANY_CLASSES:
        axes.set_xticklabels(names, rotation=90, fontsize=min(8, 650 / len(shown)))
    else:
        slanted = 0.1 * max(map(len, names)) > 9 / len(order)  # inches
        axes.set_xticklabels(names, rotation=30 if slanted else 0, ha="right" if slanted else "center")
    axes.set_xlabel(f"Class, from the most to the fewest training images{remark}")
    axes.set_xlim(-0.7, len(order) - 0.3)
    start = 0
    for name, classes in results.groups.items():
        if named:
            place = (start + (len(classes) - 1) / 2, 1.01)
            style: Any = {"ha": "center", "va": "bottom", "style": "italic"}
            axes.text(*place, group_name(name), transform=axes.get_xaxis_transform(), **style)
        start += len(classes)
        if start < len(order):
            axes.axvline(start - 0.5, color="black", linewidth=0.8, linestyle=":")


def _count_bars(axes: Axes, counts: np.ndarray, many: bool) -> None:
    """Draws the training images per class as grey bars on a log scale with plain numbers."""
    axes.bar(np.arange(len(counts)), counts, width=1.0 if many else 0.9, color=_GRAY, label="Training images")
    axes.set_yscale("log")
    # A bar of the smallest class keeps a visible height.
    axes.set_ylim(max(counts.min(), 1) / 2, 2 * counts.max())
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(ScalarFormatter())  # 500, not 5 x 10^2
    axes.yaxis.set_minor_formatter(NullFormatter())


def percents(values: Sequence[Mapping[str, float]]) -> Iterable[np.ndarray]:
    """Returns values, lower and upper bounds of FIGUREs, in percent."""
    return (100 * np.array([entry[key] for entry in values]) for key in ("value", "low", "high"))


def errorbar(axes: Axes, x: np.ndarray, values: Sequence[Mapping[str, float]], **style: Any) -> Any:
    """Draws FIGUREs with their intervals, in percent; returns what a legend needs."""
    value, low, high = percents(values)
    return axes.errorbar(x, value, yerr=(value - low, high - value), linestyle="none", **style)


def accuracy_axis(axes: Axes, label: str) -> None:
    """Puts percents on the vertical axis."""
    axes.yaxis.set_major_locator(MultipleLocator(20))
    axes.grid(axis="y", linewidth=0.5, alpha=0.6)
    axes.set_ylabel(label)
