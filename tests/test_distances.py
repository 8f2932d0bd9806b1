"""Figures of merit from distances: curves, medians and optimality against plain definitions (distances)."""

import numpy as np
import pytest
from scipy.stats import binom

from robal_jax import distances
from robal_jax.errors import InputError


def some_distances(n, seed=0):
    """Distances with ties, zeros and infinities."""
    rng = np.random.RandomState(seed)
    values = rng.exponential(0.2, n).round(2)
    values[rng.rand(n) < 0.1] = 0
    values[rng.rand(n) < 0.1] = np.inf
    return values


@pytest.mark.parametrize("n", [1, 2, 7, 200])
def test_curve_is_the_share_that_is_farther(n):
    values = some_distances(n)
    epsilons = np.random.RandomState(1).permutation(np.append(np.linspace(0, 1, 101).round(2), 9))
    curve = distances.robust_accuracy_curve(values, epsilons)
    np.testing.assert_allclose(curve, [(values > epsilon).mean() for epsilon in epsilons], atol=1e-15)
    assert (np.diff(curve[np.argsort(epsilons)]) <= 0).all()
    assert curve[epsilons == 0] == pytest.approx(np.mean(values != 0))


@pytest.mark.parametrize("n", [1, 5, 6, 7, 20, 101])
def test_interval_of_a_median_covers_it_with_no_image_to_spare(n):
    figure = distances.median_distances(np.zeros(n, int), np.arange(1.0, n + 1), [3])["all"]
    assert figure["value"] == (n + 1) / 2
    if not figure["low"]:  # then not even the extremes cover it
        assert figure["high"] == np.inf
        assert 2 * binom.cdf(0, n, 0.5) > 0.05
        return
    rank = int(figure["low"])  # the distances are their ranks
    assert figure["high"] == n + 1 - rank
    assert 2 * binom.cdf(rank - 1, n, 0.5) <= 0.05 < 2 * binom.cdf(rank, n, 0.5)


def test_medians_by_class_and_group():
    labels, values = np.arange(300) % 10, some_distances(300)
    counts = np.arange(100, 0, -10)
    found = distances.median_distances(labels, values, counts)
    assert [figure["value"] for figure in found["per_class"]] == [
        np.median(values[labels == number]) for number in range(10)
    ]
    assert list(found["groups"]) == ["head", "medium", "tail"]
    assert found["groups"]["tail"]["value"] == np.median(values[labels >= 7])
    assert found["all"]["low"] <= found["all"]["value"] == np.median(values) <= found["all"]["high"]
    given = distances.median_distances(labels, values, counts, groups={"odd": [1, 3, 5, 7, 9]})
    assert given["groups"] == {"odd": distances.median_distances(labels % 2, values, [2, 1])["per_class"][1]}


def test_optimality_is_a_ratio_of_areas_below_the_clean_accuracy():
    clean = some_distances(300) > 0
    found = {name: np.where(clean, some_distances(300, seed) + 0.01, 0) for seed, name in enumerate("abc", 5)}
    best = np.minimum.reduce(list(found.values()))
    last = best[np.isfinite(best)].max()
    corners = np.unique(np.append(np.concatenate([v[v <= last] for v in found.values()]), [0, last]))

    def area(values):  # of a curve that is constant between two corners
        return np.sum(distances.robust_accuracy_curve(values, corners[:-1]) * np.diff(corners))

    most = clean.mean() * last - area(best)
    expected = {name: (clean.mean() * last - area(values)) / most for name, values in found.items()}
    assert distances.attack_optimality(found) == pytest.approx(expected, rel=1e-12)
    assert all(0 < value < 1 for value in expected.values())


def test_optimality_of_the_extremes():
    strong, none = np.array([0, 0.1, 0.3, np.inf]), np.array([0, np.inf, np.inf, np.inf])
    assert distances.attack_optimality({"none": none, "strong": strong}) == {"none": 0, "strong": 1}
    assert distances.attack_optimality({"alone": strong}) == {"alone": 1}


def test_optimality_is_that_of_attackbench_up_to_the_corners():
    n = 1000
    strong = np.sort(np.random.RandomState(0).exponential(0.2, n))
    strong[:50] = 0
    weak = np.append(1.3 * strong[:-1], strong[-1])
    last = strong[-1]

    def area(values):  # straight lines between the corners of the curve
        places, counts = np.unique(np.minimum(values, last), return_counts=True)
        return np.trapezoid(1 - np.cumsum(counts) / n, places)

    theirs = (0.95 * last - area(weak)) / (0.95 * last - area(strong))
    ours = distances.attack_optimality({"weak": weak, "strong": strong})["weak"]
    # A line cuts half of a step: half of the gap between two corners, times the share of the images there.
    places, counts = np.unique(np.minimum(weak, last), return_counts=True)
    cut = np.sum(np.diff(places) * counts[1:]) / 2 / n
    assert abs(ours - theirs) <= 2 * cut / (0.95 * last - area(strong))
    assert ours < 0.99


WRONG = {
    "negative": (
        distances.robust_accuracy_curve,
        ([0.1, -0.2], [0.1]),
        "distances have the entry -0.2",
    ),
    "NaN": (distances.robust_accuracy_curve, ([0.1, np.nan], [0.1]), "distances have the entry nan"),
    "a column": (distances.robust_accuracy_curve, ([[0.1]], [0.1]), r"shape of distances is \[1, 1\]"),
    "no radius": (distances.robust_accuracy_curve, ([0.1], []), r"shape of epsilons is \[0\]"),
    "an infinite radius": (
        distances.robust_accuracy_curve,
        ([0.1], [0, np.inf]),
        "epsilons has the entry inf",
    ),
    "one label": (distances.median_distances, ([0], [0.1, 0.2], [3]), r"labels have shape \[1\].* \[2\]"),
    "an unknown class": (
        distances.median_distances,
        ([0, 2], [0.1, 0.2], [3, 1]),
        "labels are in 0..2; pass classes in 0..1",
    ),
    "an absent class": (distances.median_distances, ([0, 0], [0.1, 0.2], [3, 1]), "no image of class 1"),
    "an empty group": (
        lambda **groups: distances.median_distances([0, 1], [0.1, 0.2], [3, 1], **groups),
        {"groups": {"a": [0], "b": []}},
        "group 'b' has no class",
    ),
    "a group of unknown classes": (
        lambda **groups: distances.median_distances([0, 1], [0.1, 0.2], [3, 1], **groups),
        {"groups": {"a": [0, 7]}},
        "classes of group 'a' are in 0..7",
    ),
    "no attack": (distances.attack_optimality, ({},), "distances has no attack"),
    "other images": (
        distances.attack_optimality,
        ({"a": [0.1, 0], "b": [0.1, 0.2]},),
        "attacks disagree",
    ),
    "fewer images": (distances.attack_optimality, ({"a": [0.1, 0.2], "b": [0.1]},), "distances of 'b'"),
    "one step": (distances.attack_optimality, ({"a": [0.1, 0.1]},), "fewer than two different distances"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_arguments_are_refused(wrong):
    function, arguments, message = WRONG[wrong]
    with pytest.raises((InputError, ValueError), match=message):
        function(**arguments) if isinstance(arguments, dict) else function(*arguments)
