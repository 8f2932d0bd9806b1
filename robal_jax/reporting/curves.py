"""The figures of a report with a line over a number: radius, logit scale, steps, restarts, epochs.

Each function returns a figure that belongs to no window and no global state, like those of ``figures``.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullLocator

from robal_jax.reporting.figures import STYLES, accuracy_axis, percents, plain, title
from robal_jax.reporting.names import group_name, radius, threat, training_name
from robal_jax.reporting.results import Results

PANELS = {
    "scale": "Factor on the model's logits",
    "steps": "Steps of the attack",
    "restarts": "Restarts of the attack",
}
"""The curves of the audit that share a figure, with the name of their horizontal axis."""


def curves_figure(results: Results) -> Figure:
    """Draws the audit's curves, as far as they were measured: accuracy by logit scale, steps and restarts.

    Source: the panel of scales is figure 2 of RoBal (CVPR 2021).
    """
    curves = results.curves
    panels = [name for name in PANELS if name in curves]
    series = list(dict.fromkeys(name for panel in panels for name in curves[panel]["series"]))
    styles = {name: STYLES[index % len(STYLES)] for index, name in enumerate(series)}
    figure = Figure(figsize=(max(6.5, 4.6 * len(panels)), 4.4), layout="constrained")
    handles: dict[str, Any] = {}
    for axes, panel in zip(
        figure.subplots(1, len(panels), sharey=True, squeeze=False)[0], panels, strict=True
    ):
        x = np.asarray(curves[panel]["x"], np.float64)
        for name, values in curves[panel]["series"].items():
            color, marker = styles[name]
            value, low, high = percents(values)
            (handles[name],) = axes.plot(x, value, color=color, marker=marker, markersize=4, label=name)
            axes.fill_between(x, low, high, color=color, alpha=0.15, linewidth=0)
        if panel == "scale":
            own = axes.axvline(1, color="black", linestyle="--", linewidth=1)
        if panel != "restarts":
            axes.set_xscale("log")
        _plain_ticks(axes, x)
        axes.grid(axis="y", linewidth=0.5, alpha=0.6)
        axes.set_xlabel(PANELS[panel] + ("" if panel == "restarts" else " (log scale)"))
        axes.set_ylabel("Accuracy (% of images)")
        axes.label_outer()
    if "scale" in panels:
        handles["The model as it is (factor 1)"] = own
    figure.suptitle(f"{title(results)}: accuracy under stronger and weaker attacks, 95 % intervals")
    figure.legend(
        handles.values(),
        handles.keys(),
        loc="outside lower center",
        ncols=max(2, 2 * len(panels)),
        frameon=False,
    )
    return figure


def radius_figure(results: Results) -> Figure:
    """Draws the accuracy by radius of the attack, from 0, with a mark at the threat model's radius.

    If classes have their own radii, the curve is over multiples of each image's own.

    A model without defence falls to 0 soon, and every model falls to 0 in the end: a curve that does not is a
    sign that the attack fails (Carlini et al., 2019).
    """
    curve = results.curves["epsilon"]
    x = np.asarray(curve["x"], np.float64)
    figure = Figure(figsize=(8, 4.2), layout="constrained")
    axes = figure.subplots()
    for (name, values), (color, marker) in zip(curve["series"].items(), STYLES, strict=False):
        value, low, high = percents(values)
        axes.plot(x, value, color=color, marker=marker, markersize=4, label=plain(name))
        axes.fill_between(x, low, high, color=color, alpha=0.15, linewidth=0)
    by_class = "class_epsilon" in results.meta
    if by_class or "epsilon" in results.meta:
        own = 1.0 if by_class else results.meta["epsilon"]
        axes.axvline(
            own, color="black", linestyle="--", linewidth=1, label=f"Threat model ({threat(results.meta)})"
        )
        if x.max() <= 20 * own:
            ticks = np.unique(np.concatenate([[0, own], x[x >= 2 * own]]))
            far = [tick for tick in ticks if tick in (0, own) or tick - own > 0.07 * x.max()]
            axes.set_xticks(far, [radius(tick) for tick in far])
    accuracy_axis(axes, "Accuracy (% of images)")
    axes.set_ylim(-2, 102)
    axes.set_xlim(left=0 - 0.02 * x.max())
    axes.set_xlabel("Radius of the attack" + (" in multiples of each image's own" if by_class else ""))
    axes.set_title(f"{title(results)}: accuracy by radius, 95 % intervals")
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    return figure


def training_figure(results: Results) -> Figure:
    """Draws loss, accuracy and learning rate of the training by epoch, as far as they are known."""
    curve = results.training
    panels = training_panels(curve)
    figure = Figure(figsize=(max(6.5, 4.6 * len(panels)), 3.8), layout="constrained")
    for axes, (label, names) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        factor = 100 if "%" in label else 1
        for name, (color, _), line in zip(names, STYLES, ("-", "--", ":", "-."), strict=False):
            values = factor * np.asarray(curve[name])
            marker = "o" if len(values) == 1 else ""
            axes.plot(
                curve["epoch"],
                values,
                line,
                color=color,
                marker=marker,
                label=training_name(name).capitalize(),
            )
        if factor == 100:
            accuracy_axis(axes, label)
            axes.set_ylim(-2, 102)
        else:
            axes.grid(axis="y", linewidth=0.5, alpha=0.6)
            axes.set_ylabel(label)
            axes.set_ylim(bottom=min(0, axes.get_ylim()[0]))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("Epoch")
        if len(names) > 1:
            axes.legend(frameon=False, fontsize=9)
    figure.suptitle(f"{title(results)}: training")
    return figure


def judged_figure(results: Results) -> Figure:
    """Draws the accuracy on held-out or test images by epoch: clean and PGD-10, all and rare classes.

    The mean of the classes under PGD-10, by which the best checkpoint is chosen, has a mark where it is
    highest.
    """
    course = results.judged
    epochs = course["epoch"]
    figure = Figure(figsize=(8, 4.2), layout="constrained")
    axes = figure.subplots()
    (clean, _), (attacked, marker), *_ = STYLES
    rarest, rare = results.rarest, f"{group_name(results.rarest)} classes"
    lines = {
        "clean": (clean, "-", "Clean, all images"),
        f"clean_{rarest}": (clean, ":", f"Clean, {rare}"),
        "pgd": (attacked, "-", "PGD-10, all images"),
        "pgd_balanced": (attacked, "--", "PGD-10, mean of the classes"),
        f"pgd_{rarest}": (attacked, ":", f"PGD-10, {rare}"),
    }
    dot = "o" if len(epochs) == 1 else ""
    for name, (color, line, label) in lines.items():
        if name in course:
            axes.plot(epochs, 100 * np.asarray(course[name]), line, color=color, marker=dot, label=label)
    score = 100 * np.asarray(course["pgd_balanced"])
    best = int(score.argmax())  # the first of equal ones
    label = f"Highest mean of the classes (epoch {epochs[best]})"
    axes.plot(epochs[best], score[best], marker, color=attacked, markersize=9, label=label)
    accuracy_axis(axes, f"Accuracy (% of {course['images']} images)")
    axes.set_ylim(-2, 102)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("Epoch")
    axes.set_title(f"{title(results)}: {course['images']} images during the training")
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    return figure


def training_panels(curve: Mapping[str, Any]) -> list[tuple[str, list[str]]]:
    """Returns the panels of a course of training, each with its label and the metrics to draw."""
    kinds = {
        "Loss": [name for name in curve if name.endswith("loss")],
        "Accuracy (% of training images)": [name for name in curve if name.endswith("accuracy")],
        "Learning rate": [name for name in curve if name == "learning_rate"],
    }
    return [(label, names) for label, names in kinds.items() if names]


def _plain_ticks(axes: Axes, x: np.ndarray) -> None:
    """Writes plain numbers at the measured places, but for those whose labels would overlap."""
    if axes.get_xscale() != "log":
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        return
    places = np.log(x)
    apart = 0.09 * max(np.ptp(places), 1e-9)
    # The model's own scale, 1, always has its number.
    kept: list[int] = np.flatnonzero(x == 1).tolist()
    for index in range(len(x)):
        if all(abs(places[index] - places[other]) >= apart for other in kept):
            kept.append(index)
    ticks = sorted(float(x[index]) for index in kept)
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.xaxis.set_minor_locator(NullLocator())
