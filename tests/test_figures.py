"""Figures show what they are given: read back from the axes, not from the pixels."""

import numpy as np
import pytest
from helpers import AUDIT, META, curve, fake_evaluation, fake_results, gallery, norms
from matplotlib.figure import Figure

from robal_jax import metrics
from robal_jax.attacks import autoattack
from robal_jax.reporting import curves, figures
from robal_jax.reporting.comparison import Paired
from robal_jax.reporting.names import ENSEMBLES, display_name, headline, headline_attack, paper_name
from robal_jax.reporting.results import Results

WITH_RADII = AUDIT["curves"] | {
    "epsilon": curve([0, 0.00775, 0.0155, 0.031, 0.062, 0.124], **{"PGD-20": [0.9, 0.8, 0.7, 0.5, 0.2, 0]})
}
TRAINING = {
    "epoch": [1, 2, 3],
    "adv_accuracy": [0.1, 0.3, 0.4],
    "nat_accuracy": [0.2, 0.5, 0.7],
    "loss": [2.3, 1.9, 1.5],
    "learning_rate": [0.1, 0.1, 0.01],
}


def labels_of(axis):
    return [text.get_text() for text in axis.get_ticklabels()]


def ticks_in_view(axis):
    low, high = sorted(axis.get_view_interval())
    ticks = [tick.label1 for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high]
    return [label for label in ticks if axis.get_visible() and label.get_visible()]


def overlapping(texts):
    """Pairs of texts that cover each other."""
    boxes = [(text.get_text(), text.get_window_extent()) for text in texts if text.get_text()]
    return [(a, b) for i, (a, one) in enumerate(boxes) for b, other in boxes[:i] if one.overlaps(other)]


def test_overlapping_texts_are_found():
    axes = Figure().subplots()
    assert overlapping([axes.text(0.5, 0.5, "one"), axes.text(0.51, 0.5, "other")]) == [("other", "one")]


def test_display_names():
    names = {
        "clean": "Clean",
        "pgd_20": "PGD-20",
        "cw_20": "CW-20",
        "apgd_ce": "APGD-CE",
        "robal_aa": "APGD-CE + APGD-T",
        "autoattack": "AutoAttack",
        "square": "Square",
        "worst": "Worst",
    }
    assert {name: display_name(name) for name in names} == names
    assert [paper_name(name) for name in ("robal_aa", "pgd_20")] == ["AA", "PGD-20"]
    ensembles = {*autoattack.CONDITIONS.values(), "custom", autoattack.CUSTOM_OWN, "robal_aa"}
    with_bpda = {name + autoattack.BPDA for name in (*ensembles, "pgd_20")}
    assert set(ENSEMBLES) == ensembles | with_bpda | {"apgd_ce"}


@pytest.mark.parametrize(
    ("conditions", "main", "attack", "shown"),
    [
        ("clean pgd_20 worst", "pgd_20", "pgd_20", "clean pgd_20 worst"),
        ("clean pgd_20 apgd_ce worst", "pgd_20", "apgd_ce", "clean pgd_20 apgd_ce worst"),
        ("clean pgd_20 apgd_ce robal_aa worst", "pgd_20", "robal_aa", "clean pgd_20 robal_aa worst"),
        ("clean pgd_20 robal_aa autoattack worst", "pgd_20", "autoattack", "clean pgd_20 autoattack worst"),
        ("clean apgd_ce robal_aa custom_bpda worst", "pgd_20", "custom_bpda", "clean custom_bpda worst"),
        ("clean autoattack worst", "autoattack", "autoattack", "clean autoattack worst"),
        ("clean pgd_20 autoattack union worst", "pgd_20", "union", "clean pgd_20 autoattack union worst"),
        (
            "clean pgd_20 autoattack custom_own worst",
            "pgd_20",
            "custom_own",
            "clean pgd_20 autoattack custom_own worst",
        ),
        ("clean apgd_ce custom_own_bpda worst", "pgd_20", "custom_own_bpda", "clean custom_own_bpda worst"),
        ("clean worst", "clean", "clean", "clean worst"),
        ("clean worst", "pgd_20", "pgd_20", "clean worst"),  # shared conditions of a comparison
    ],
)
def test_headline(conditions, main, attack, shown):
    assert headline_attack(conditions.split(), main) == attack
    assert headline(conditions.split(), main) == shown.split()


def test_classes_are_sorted_by_count():
    labels, predictions = fake_evaluation(4)
    results = Results(META, metrics.summarize(labels, predictions, [5, 40, 10, 20]))
    for draw in (figures.per_class_figure, figures.errors_figure, figures.confusion_figure):
        assert labels_of(draw(results).axes[0].xaxis) == ["1", "3", "2", "0"]


@pytest.mark.slow
@pytest.mark.parametrize("num_classes", [2, 10, pytest.param(100, marks=pytest.mark.slow)])
def test_figures_of_a_summary_have_no_labels_on_top_of_each_other(num_classes):
    meta = META | {
        "class_names": [f"very long name {k} that ends late" for k in range(num_classes)],
        "training": TRAINING,
    }
    results = fake_results(num_classes, meta, audit=AUDIT | {"curves": WITH_RADII}, norms=norms(num_classes))
    drawn = [
        figures.per_class_figure(results),
        figures.attacks_figure(results),
        figures.errors_figure(results),
        figures.confusion_figure(results),
        figures.norms_figure(results),
        curves.curves_figure(results),
        curves.radius_figure(results),
        curves.training_figure(results),
    ]
    for figure in drawn:
        assert isinstance(figure, Figure)
        figure.draw_without_rendering()
        for axes in figure.axes:
            texts = [*ticks_in_view(axes.xaxis), *ticks_in_view(axes.yaxis), *axes.texts, axes.title]
            # The box around slanted text is wider than the text, so slanted names are left out.
            assert not overlapping([text for text in texts if text.get_rotation() in (0, 90)])
            for text in (*texts, axes.xaxis.label, axes.yaxis.label):
                if text.get_text():
                    box = text.get_window_extent()
                    assert min(box.x0, box.y0) > -1, text.get_text()  # whole, not cut at the edge
                    assert box.x1 < figure.bbox.x1 + 1, text.get_text()
                    assert box.y1 < figure.bbox.y1 + 1, text.get_text()


def test_accuracies_of_the_class_figure():
    results = fake_results()
    axes = figures.per_class_figure(results).axes[0]
    lines = {container.get_label(): container.lines[0].get_ydata() for container in axes.containers}
    assert list(lines) == ["Clean", "PGD-20", "Worst"]
    recall = results.conditions["pgd_20"]["per_class"]["recall"]
    np.testing.assert_allclose(lines["PGD-20"], [100 * entry["value"] for entry in recall])


@pytest.mark.parametrize("num_classes", [10, 100])
def test_errors_stack_to_all_images(num_classes):
    results = fake_results(num_classes)
    figure = figures.errors_figure(results)
    heights = np.array([[bar.get_height() for bar in bars] for bars in figure.axes[0].containers])
    np.testing.assert_allclose(heights.sum(0), 100)
    condition = results.conditions["pgd_20"]
    for row, key in zip(heights, ("robust_accuracy", "boundary_error", "natural_error"), strict=True):
        assert row.mean() == pytest.approx(100 * condition[key]["value"])  # classes of equal size


@pytest.mark.parametrize(("num_classes", "annotated"), [(20, True), (21, False)])
def test_confusion_is_normalised_by_row(num_classes, annotated):
    results = fake_results(num_classes)
    axes = figures.confusion_figure(results).axes[0]
    shares = np.asarray(axes.images[0].get_array())
    np.testing.assert_allclose(shares.sum(-1), 100)
    recall = results.conditions["pgd_20"]["per_class"]["recall"]
    np.testing.assert_allclose(np.diagonal(shares), [100 * entry["value"] for entry in recall])
    assert bool(axes.texts) == annotated
    if annotated:
        assert f"{shares[0, 0]:.0f}" in [text.get_text() for text in axes.texts]


@pytest.mark.parametrize("panels", [("scale",), ("steps", "restarts"), ("scale", "steps", "restarts")])
def test_curves(panels):
    measured = {name: AUDIT["curves"][name] for name in panels}
    figure = curves.curves_figure(Results(META, {}, {"curves": measured}))
    assert len(figure.axes) == len(panels)
    for axes, name in zip(figure.axes, panels, strict=True):
        assert axes.get_xscale() == ("linear" if name == "restarts" else "log")
        lines = {line.get_label(): line for line in axes.lines}
        for series, values in measured[name]["series"].items():
            np.testing.assert_array_equal(lines[series].get_xdata(), measured[name]["x"])
            np.testing.assert_allclose(lines[series].get_ydata(), [100 * entry["value"] for entry in values])
        assert len(axes.collections) == len(measured[name]["series"])  # the intervals
    entries = [text.get_text() for text in figure.legends[0].get_texts()]
    assert len(entries) == len(set(entries))
    assert ("The model as it is (factor 1)" in entries) == ("scale" in panels)
    if "scale" in panels:
        ticks = labels_of(figure.axes[0].xaxis)
        assert "1" in ticks
        assert len(ticks) < len(measured["scale"]["x"])  # those that would meet are left out


def test_radii():
    results = fake_results(audit={"curves": WITH_RADII})
    axes = curves.radius_figure(results).axes[0]
    measured = WITH_RADII["epsilon"]
    line, mark = axes.lines
    assert (axes.get_xscale(), line.get_label()) == ("linear", "PGD-20")
    np.testing.assert_array_equal(line.get_xdata(), measured["x"])
    np.testing.assert_allclose(
        line.get_ydata(), [100 * entry["value"] for entry in measured["series"]["PGD-20"]]
    )
    assert axes.get_xlim()[0] <= 0
    assert mark.get_xdata()[0] == META["epsilon"]
    assert mark.get_label() == "Threat model (Linf 0.031)"
    assert labels_of(axes.xaxis)[:2] == ["0", "0.031"]


@pytest.mark.parametrize("largest", [1, 16, 1024])
@pytest.mark.parametrize("radius", [8 / 255, 0.1, 3.0])
def test_radii_far_beyond_the_threat_model(radius, largest):
    x = [0, *(radius * 2.0**power for power in range(-2, largest.bit_length()))]
    audit = {"curves": {"epsilon": curve(x, **{"PGD-20": [0.5] * len(x)})}}
    figure = curves.radius_figure(fake_results(meta=META | {"epsilon": radius}, audit=audit))
    figure.draw_without_rendering()
    assert not overlapping(ticks_in_view(figure.axes[0].xaxis))


def test_training():
    figure = curves.training_figure(fake_results(meta=META | {"training": TRAINING}))
    loss, accuracy, rate = figure.axes
    np.testing.assert_array_equal(loss.lines[0].get_ydata(), TRAINING["loss"])
    np.testing.assert_array_equal(rate.lines[0].get_ydata(), TRAINING["learning_rate"])
    lines = {line.get_label(): line.get_ydata() for line in accuracy.lines}
    np.testing.assert_allclose(lines["Accuracy under attack"], [10, 30, 40])
    np.testing.assert_allclose(lines["Clean accuracy"], [20, 50, 70])
    only = {"epoch": [7], "loss": [0.5]}  # as much as there is
    axes = curves.training_figure(fake_results(meta=META | {"training": only})).axes
    assert len(axes) == 1
    assert axes[0].lines[0].get_marker() == "o"  # a line of one point would not be seen


def test_class_names_in_figures():
    names = ["a cat with a very long name, that is", "$x_{$ and $", "猫", "dog\n2"]
    labels, predictions = fake_evaluation(4)
    meta = META | {"class_names": names, "method": "$m$ 猫"}
    results = Results(meta, metrics.summarize(labels, predictions, [4, 3, 2, 1]))
    for draw in (figures.per_class_figure, figures.errors_figure, figures.confusion_figure):
        figure = draw(results)
        figures.png(figure)  # no warning about a character, no formula
        assert labels_of(figure.axes[0].xaxis) == ["a cat with a very…", r"\$x_{\$ and \$", "2", "dog 2"]
        assert figure.get_suptitle().startswith(r"\$m\$ □ on digits-LT:")


@pytest.mark.slow
def test_every_class_is_named_up_to_a_hundred():
    for num_classes, named in ((100, 100), (101, 51)):
        axes = figures.errors_figure(fake_results(num_classes)).axes[0]
        assert len(labels_of(axes.xaxis)) == named
        assert ("one in 2 named" in axes.get_xlabel()) == (named < num_classes)


def test_equal_conditions_are_drawn_once():
    labels, predictions = fake_evaluation()
    predictions = {name: predictions[name] for name in ("clean", "pgd_20")}
    predictions["other"] = predictions["pgd_20"]
    results = Results(META, metrics.summarize(labels, predictions, range(20, 10, -1)))
    ticks = labels_of(figures.attacks_figure(results).axes[0].xaxis)
    assert ticks == ["Clean", "PGD-20\n= OTHER\n= Worst"]
    bars = figures.per_class_figure(results).axes[0].containers
    assert [bar.get_label() for bar in bars] == ["Clean", "PGD-20 = Worst"]


@pytest.mark.parametrize(
    "groups", [{"all": range(4)}, {"medium": range(4)}, {"head": [0], "tail": [1, 2, 3]}]
)
def test_groups_are_named_if_there_are_several(groups):
    labels, predictions = fake_evaluation(4)
    results = Results(META, metrics.summarize(labels, predictions, [4, 3, 2, 1], groups=groups))
    shown = [text.get_text() for text in figures.errors_figure(results).axes[0].texts]
    assert shown == (list(groups) if len(groups) > 1 else [])
    legend = figures.attacks_figure(results).legends[0].get_texts()
    assert [text.get_text() for text in legend] == ["All classes", "Tail classes"][: len(groups)]


@pytest.mark.parametrize("seeds", [(None,), (0, 1, 2, 3, 4)])
def test_differences(seeds):
    generator = np.random.default_rng(0)

    def figures_of():
        return {
            group: {"value": value, "low": value - 0.03, "high": value + 0.03}
            for group, value in zip(("all", "head", "tail"), generator.normal(0, 0.05, 3), strict=True)
        }

    pairs = [
        Paired(condition, row, seed, figures_of())
        for condition in ("clean", "autoattack")
        for row in ("A", "B $")
        for seed in seeds
    ]
    pairs += [pair._replace(condition="worst") for pair in pairs if pair.condition == "autoattack"]
    figure = figures.differences_figure(pairs, "first")
    figure.draw_without_rendering()
    assert [axes.get_title() for axes in figure.axes] == ["Clean", "AutoAttack\n= Worst"]
    for axes, condition in zip(figure.axes, ("clean", "autoattack"), strict=True):
        shown = [container.lines[0].get_ydata() for container in axes.containers]
        wanted = [
            [100 * entry["value"] for entry in pair.figures.values()]
            for pair in pairs
            if pair.condition == condition
        ]
        np.testing.assert_allclose(shown, wanted)
        assert labels_of(axes.xaxis) == ["All", "Head", "Tail"]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["A", r"B \$"]


def test_folders_keep_the_end_of_their_names_in_the_legend():
    figures_of = {"all": {"value": 0.1, "low": 0.0, "high": 0.2}}
    folder = "/home/somebody/projects/robustness/runs/cifar10_lt"
    rows = [f"{folder}/ablation_{letter}" for letter in "abc"]
    figure = figures.differences_figure([Paired("clean", row, None, figures_of) for row in rows[1:]], rows[0])
    texts = [text.get_text() for text in figure.legends[0].get_texts()]
    assert texts == ["ablation_b", "ablation_c"]
    assert "ablation" in figure.axes[0].get_ylabel()


def test_norms():
    both = norms(10)
    figure = figures.norms_figure(fake_results(norms=both))
    assert len(figure.axes) == 3
    np.testing.assert_array_equal(figure.axes[1].lines[0].get_ydata(), both["weights"])
    np.testing.assert_array_equal(figure.axes[2].lines[0].get_ydata(), both["features"])
    alone = figures.norms_figure(fake_results(norms={**both, "weights": None}))
    assert len(alone.axes) == 2
    np.testing.assert_array_equal(alone.axes[1].lines[0].get_ydata(), both["features"])


@pytest.mark.parametrize(("count", "channels", "size"), [(1, 1, 8), (5, 3, 32), (12, 1, 8)])
def test_gallery(count, channels, size):
    shown = gallery(count, channels, size)
    names = [f"<{k}>" for k in range(12)]
    figure = figures.gallery_figure(shown, Results(META | {"class_names": names}, {}))
    filled = [axes for axes in figure.axes if axes.images]
    assert filled[0].get_title() == "<0> → <0> (not fooled)"
    assert len(filled) == count
    last = count - 1
    if last:
        assert filled[last].get_title() == f"<{last}> → <{shown.predictions[last]}>"
    strip = np.asarray(filled[last].images[0].get_array())
    np.testing.assert_allclose(strip[:, :size], np.broadcast_to(shown.images[last], (size, size, 3)))
    difference = shown.adversarial[last] - shown.images[last]
    np.testing.assert_allclose(strip[:, -size:], np.broadcast_to(0.5 + 5 * difference, (size, size, 3)))
    assert labels_of(filled[0].xaxis) == ["image", "adversarial", "difference × 5"]


def test_magnification():
    image = np.full((1, 2, 2, 1), 0.5)
    for change, factor in ((8 / 255, 15), (0.1, 5), (0.1000001, 5), (0.5, 1), (1.0, 1), (0.0, 1)):
        assert gallery()._replace(images=image, adversarial=image + change).magnification == factor


def test_svg_is_the_same_each_time_and_loads_nothing():
    first, second = (figures.svg(figures.attacks_figure(fake_results())).decode() for _ in range(2))
    assert first == second
    assert "url(http" not in first
    assert 'href="http' not in first
    assert "<text" not in first  # letters are shapes: no font is needed
