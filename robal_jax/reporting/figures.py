"""The figures of a report, and the names that figures and tables have in common.

A *summary* is what `metrics.summarize` returns; `reporting.write_report` says what *meta*, *curves*, *norms*
and *gallery* hold. Each function returns a figure that belongs to no window and no global state. Series are
told apart by colour and by marker; intervals are 95 %.
"""

import io
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import (
    FixedLocator,
    LogLocator,
    MaxNLocator,
    MultipleLocator,
    NullFormatter,
    NullLocator,
    ScalarFormatter,
)

from robal_jax.reporting.names import class_name, display_name, headline, headline_attack, report_title

# Okabe and Ito's colours: told apart in every common form of colour blindness.
_BLUE, _ORANGE, _GREEN, _PURPLE, _GRAY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#D9D9D9"

_STYLES = ((_BLUE, "o"), (_ORANGE, "s"), (_GREEN, "v"), (_PURPLE, "D"), ("#000000", "x"), ("#56B4E9", "^"))

_DPI = 150

_MANY_CLASSES = 20  # from here on figures name every tenth class only


def per_class_figure(summary: Mapping[str, Any], meta: Mapping[str, Any]) -> Figure:
    """Draw the accuracies of the headline class by class over the training counts.

    Args:
        summary: see `metrics.summarize`.
        meta: see `reporting.write_report`.

    Returns:
        The figure; classes are sorted from head to tail.
    """
    order = _order(summary)
    positions = np.arange(len(order))
    many = len(order) > _MANY_CLASSES
    figure = Figure(figsize=(14, 5.5) if many else (10, 5), layout="constrained")
    axes = figure.subplots()
    counts_axes = axes.twinx()
    axes.set_zorder(counts_axes.get_zorder() + 1)  # accuracies in front of the counts
    axes.patch.set_visible(False)
    _count_bars(counts_axes, np.asarray(summary["class_counts"])[order], many)
    counts_axes.set_ylabel("Training images of the class (log scale)")

    shown = headline(summary, meta)[: 3 if many else None]  # four in so little space nobody could read
    shifts = 0.22 * (np.arange(len(shown)) - (len(shown) - 1) / 2)
    for name, shift, (color, marker) in zip(shown, shifts, _STYLES, strict=False):
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
    axes.set_ylim(-2, 102)  # whole markers at 0 and 100
    _class_axis(axes, summary, meta)
    figure.suptitle(f"{report_title(meta)}: accuracy by class, 95 % intervals")
    figure.legend(loc="outside lower center", ncols=5, frameon=False)
    return figure


def attacks_figure(summary: Mapping[str, Any], meta: Mapping[str, Any]) -> Figure:
    """Draw accuracy under each attack, of all classes and of the tail side by side.

    Args:
        summary: see `metrics.summarize`.
        meta: see `reporting.write_report`.

    Returns:
        The figure; the clean accuracy stands first for scale.
    """
    conditions = summary["conditions"]
    positions = np.arange(len(conditions))
    figure = Figure(figsize=(max(6.5, 1.2 + 1.1 * len(conditions)), 4.5), layout="constrained")
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
                f"{100 * value['value']:.1f}",
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
    axes.set_xticks(positions, [display_name(name).replace(" + ", "\n+ ") for name in conditions])
    axes.set_xlim(-0.6, len(conditions) - 0.4)
    axes.set_xlabel("Attack")
    axes.set_title(f"{report_title(meta)}: robust accuracy by attack, 95 % intervals")
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    return figure


def curves_figure(curves: Mapping[str, Any], meta: Mapping[str, Any]) -> Figure:
    """Draw accuracy over the scale of the logits, over steps and over restarts, as far as they were measured.

    Args:
        curves: see `reporting.write_report`; at least one.
        meta: see there.

    Returns:
        The figure, a panel for each curve.

    Source:
        The panel of scales is figure 2 of RoBal, CVPR 2021.
    """
    labels = {
        "scale": "Factor on the model's logits",
        "steps": "Steps of the attack",
        "restarts": "Restarts of the attack",
    }
    panels = [name for name in labels if name in curves]
    series = list(dict.fromkeys(name for panel in panels for name in curves[panel]["series"]))
    styles = {name: _STYLES[index % len(_STYLES)] for index, name in enumerate(series)}
    figure = Figure(figsize=(max(6.5, 4.6 * len(panels)), 4.4), layout="constrained")
    handles: dict[str, Any] = {}
    for axes, panel in zip(
        figure.subplots(1, len(panels), sharey=True, squeeze=False)[0], panels, strict=True
    ):
        x = np.asarray(curves[panel]["x"], np.float64)
        for name, values in curves[panel]["series"].items():
            color, marker = styles[name]
            value, low, high = _percents(values)
            (handles[name],) = axes.plot(x, value, color=color, marker=marker, markersize=4, label=name)
            axes.fill_between(x, low, high, color=color, alpha=0.15, linewidth=0)
        if panel == "scale":
            own = axes.axvline(1, color="black", linestyle="--", linewidth=1)
        if panel != "restarts":
            axes.set_xscale("log")
        _plain_ticks(axes, x)
        axes.grid(axis="y", linewidth=0.5, alpha=0.6)
        axes.set_xlabel(labels[panel] + ("" if panel == "restarts" else " (log scale)"))
        axes.set_ylabel("Accuracy (% of images)")
        axes.label_outer()
    if "scale" in panels:
        handles["The model as it is (factor 1)"] = own
    figure.suptitle(f"{report_title(meta)}: accuracy under stronger and weaker attacks, 95 % intervals")
    figure.legend(
        handles.values(),
        handles.keys(),
        loc="outside lower center",
        ncols=max(2, 2 * len(panels)),
        frameon=False,
    )
    return figure


def errors_figure(summary: Mapping[str, Any], meta: Mapping[str, Any]) -> Figure:
    """Stack natural error, boundary error and robust accuracy of each class to 100 %.

    Args:
        summary: see `metrics.summarize`.
        meta: see `reporting.write_report`.

    Returns:
        The figure, under the headline attack; classes are sorted from head to tail.

    Source:
        The decomposition is that of TRADES (Zhang et al., ICML 2019).
    """
    order, attack = _order(summary), headline_attack(summary, meta)
    per_class = summary["conditions"][attack]["per_class"]
    natural, boundary = (
        100 * np.asarray(per_class[key])[order] for key in ("natural_error", "boundary_error")
    )
    many = len(order) > _MANY_CLASSES
    figure = Figure(figsize=(14, 5) if many else (10, 4.5), layout="constrained")
    axes = figure.subplots()
    parts = (
        ("Robust accuracy (right on both)", 100 - natural - boundary, _BLUE, ""),
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
    _accuracy_axis(axes, "Test images of the class (%)")
    axes.set_axisbelow(True)
    axes.set_ylim(0, 100)
    _class_axis(axes, summary, meta)
    figure.suptitle(f"{report_title(meta)}: errors by class under {display_name(attack)}")
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    return figure


def confusion_figure(summary: Mapping[str, Any], meta: Mapping[str, Any]) -> Figure:
    """Draw which classes the headline attack turns into which, each row as shares of the true class.

    Args:
        summary: see `metrics.summarize`.
        meta: see `reporting.write_report`.

    Returns:
        The figure; classes are sorted from head to tail, cells carry percentages up to 20 classes.
    """
    order, attack = _order(summary), headline_attack(summary, meta)
    counts = np.asarray(summary["conditions"][attack]["confusion"])[np.ix_(order, order)]
    shares = 100 * counts / counts.sum(-1, keepdims=True)
    many = len(order) > _MANY_CLASSES
    side = 7.5 if many else max(5.0, 2.2 + 0.5 * len(order))
    figure = Figure(figsize=(side + 0.8, side), layout="constrained")
    axes = figure.subplots()
    # Of many classes each takes a small share: there the square root of the share sets the colour.
    norm = PowerNorm(0.5 if many else 1, vmin=0, vmax=100)
    image = axes.imshow(shares, cmap="Blues", norm=norm, interpolation="nearest")
    figure.colorbar(image, ax=axes, shrink=0.8, label="Test images of the true class (%)")
    for i, j in np.ndindex(*shares.shape) if not many else ():
        if counts[i, j]:  # an empty cell says so by itself
            color = "white" if shares[i, j] > 55 else "black"
            text = f"{shares[i, j]:.0f}" if shares[i, j] >= 0.5 else "<1"
            axes.text(j, i, text, ha="center", va="center", fontsize=8, color=color)
    shown, names = _named_classes(order, meta)
    axes.set_xticks(shown, names, rotation=90 if max(map(len, names)) > 3 else 0)
    axes.set_yticks(shown, names)
    every = " (every tenth named)" if many else ""
    axes.set_xlabel(f"Predicted class, from head to tail{every}")
    axes.set_ylabel(f"True class, from head to tail{every}")
    for boundary in np.cumsum([len(classes) for classes in summary["groups"].values()])[:-1] - 0.5:
        axes.axhline(boundary, color="black", linewidth=0.8, linestyle=":")
        axes.axvline(boundary, color="black", linewidth=0.8, linestyle=":")
    figure.suptitle(f"{report_title(meta)}:\nconfusion under {display_name(attack)}")
    return figure


def norms_figure(norms: Mapping[str, Any], summary: Mapping[str, Any], meta: Mapping[str, Any]) -> Figure:
    """Draw the training images of each class above the norms of its weights and of its features.

    Args:
        norms: see `reporting.write_report`; one of the two at least.
        summary: see `metrics.summarize`.
        meta: see `reporting.write_report`.

    Returns:
        The figure, a panel each; classes are sorted from head to tail.

    Source:
        Weight norms that fall from head to tail are the bias that RoBal's cosine head removes.
    """
    order = _order(summary)
    positions = np.arange(len(order))
    many = len(order) > _MANY_CLASSES
    labels = {"weights": "Norm of the class\nweight vector", "features": "Mean norm of the\nclass's features"}
    panels = [name for name in labels if norms.get(name) is not None]
    figure = Figure(figsize=(14 if many else 10, 1.4 + 1.9 * (1 + len(panels))), layout="constrained")
    counts_axes, *rest = figure.subplots(1 + len(panels), sharex=True)
    _count_bars(counts_axes, np.asarray(summary["class_counts"])[order], many)
    counts_axes.set_ylabel("Training images\n(log scale)")
    for axes, name, (color, marker) in zip(rest, panels, _STYLES, strict=False):
        values = np.asarray(norms[name])[order]
        axes.plot(positions, values, color=color, marker=marker, markersize=3.5 if many else 6)
        axes.set_ylim(0, 1.12 * values.max() or 1)
        axes.grid(axis="y", linewidth=0.5, alpha=0.6)
        axes.set_ylabel(labels[name])
    for axes in (counts_axes, *rest):
        _class_axis(axes, summary, meta, named=axes is counts_axes)
        axes.label_outer()
    figure.suptitle(f"{report_title(meta)}: training images and norms by class")
    return figure


def gallery_figure(gallery: Mapping[str, Any], meta: Mapping[str, Any]) -> Figure:
    """Show images, their adversarial images and the magnified difference between the two.

    Args:
        gallery: see `reporting.write_report`; at least one image.
        meta: see there.

    Returns:
        The figure, three pictures for each image under 'true class -> predicted class'.
    """
    images, adversarial = (np.asarray(gallery[key], np.float64) for key in ("images", "adversarial"))
    factor = magnification(gallery)
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
    for axes, strip, label, found in zip(
        grid, strips, gallery["labels"], gallery["predictions"], strict=False
    ):
        axes.set_axis_on()
        axes.imshow(strip, vmin=0, vmax=1, interpolation="nearest")
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0, labelsize=8, colors="#555555")
        axes.set_xticks(centers, ["image", "adversarial", f"difference × {factor}"])
        axes.set_yticks([])
        kept = " (not fooled)" if label == found else ""
        text = f"{class_name(meta, int(label))} → {class_name(meta, int(found))}{kept}"
        axes.set_title(text, fontsize=10)
    figure.suptitle(f"{report_title(meta)}: true class → class under {display_name(gallery['condition'])}")
    return figure


def magnification(gallery: Mapping[str, Any]) -> int:
    """The whole factor by which the largest change of a gallery just fills the range of grey."""
    change = np.abs(np.asarray(gallery["adversarial"], np.float64) - np.asarray(gallery["images"])).max()
    return max(1, int(0.5 / change + 1e-3)) if change > 0 else 1  # float32 may make 0.1 a little more


def png(figure: Figure) -> bytes:
    """The figure as a PNG file."""
    return _file(figure, "png")


def svg(figure: Figure) -> bytes:
    """The figure as an SVG file that holds its letters as shapes, the same bytes each time."""
    with matplotlib.rc_context({"svg.hashsalt": "robal_jax", "svg.fonttype": "path"}):
        return _file(figure, "svg", metadata={"Date": None})


def _file(figure: Figure, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format=kind, dpi=_DPI, **options)
    return buffer.getvalue()


def _order(summary: Mapping[str, Any]) -> np.ndarray:
    """Classes from the most to the fewest training images."""
    return np.concatenate(list(summary["groups"].values()))


def _named_classes(order: np.ndarray, meta: Mapping[str, Any]) -> tuple[np.ndarray, list[str]]:
    """Positions that bear a name, and these names."""
    shown = np.arange(len(order))[:: 10 if len(order) > _MANY_CLASSES else 1]
    return shown, [class_name(meta, k) for k in order[shown]]


def _class_axis(
    axes: Axes, summary: Mapping[str, Any], meta: Mapping[str, Any], *, named: bool = True
) -> None:
    """Classes from head to tail below the axes, the names of their groups above if `named`."""
    order = _order(summary)
    shown, names = _named_classes(order, meta)
    long_names = max(map(len, names)) > 4
    axes.xaxis.set_major_locator(FixedLocator(list(shown)))
    axes.set_xticklabels(names, rotation=30 if long_names else 0, ha="right" if long_names else "center")
    every = " (every tenth named)" if len(shown) < len(order) else ""
    axes.set_xlabel(f"Class, from the most to the fewest training images{every}")
    axes.set_xlim(-0.7, len(order) - 0.3)
    start = 0
    for name, classes in summary["groups"].items():
        if named:
            place = (start + (len(classes) - 1) / 2, 1.01)
            axes.text(
                *place, name, transform=axes.get_xaxis_transform(), ha="center", va="bottom", style="italic"
            )
        start += len(classes)
        if start < len(order):
            axes.axvline(start - 0.5, color="black", linewidth=0.8, linestyle=":")


def _count_bars(axes: Axes, counts: np.ndarray, many: bool) -> None:
    """Training images per class as grey bars on a log scale with plain numbers."""
    axes.bar(np.arange(len(counts)), counts, width=1.0 if many else 0.9, color=_GRAY, label="Training images")
    axes.set_yscale("log")
    # A bar of the smallest class keeps a visible height.
    axes.set_ylim(max(counts.min(), 1) / 2, 2 * counts.max())
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(ScalarFormatter())  # 500, not 5 x 10^2
    axes.yaxis.set_minor_formatter(NullFormatter())


def _plain_ticks(axes: Axes, x: np.ndarray) -> None:
    """Plain numbers at the measured places, less those whose labels would meet."""
    if axes.get_xscale() != "log":
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        return
    places = np.log(x)
    apart = 0.09 * max(np.ptp(places), 1e-9)
    # The model's own scale, 1, keeps its number before any other.
    kept: list[int] = np.flatnonzero(x == 1).tolist()
    for index in range(len(x)):
        if all(abs(places[index] - places[other]) >= apart for other in kept):
            kept.append(index)
    ticks = sorted(float(x[index]) for index in kept)
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.xaxis.set_minor_locator(NullLocator())


def _percents(values: Sequence[Mapping[str, float]]) -> Iterable[np.ndarray]:
    """Values, lower and upper bounds of figures, in percent."""
    return (100 * np.array([entry[key] for entry in values]) for key in ("value", "low", "high"))


def _errorbar(axes: Axes, x: np.ndarray, values: Sequence[Mapping[str, float]], **style: Any) -> None:
    """Draw figures with their intervals, in percent."""
    value, low, high = _percents(values)
    axes.errorbar(x, value, yerr=(value - low, high - value), linestyle="none", **style)


def _accuracy_axis(axes: Axes, label: str) -> None:
    axes.yaxis.set_major_locator(MultipleLocator(20))
    axes.grid(axis="y", linewidth=0.5, alpha=0.6)
    axes.set_ylabel(label)
