"""Metrics against scikit-learn, worked cases and the released code (robal_jax.metrics)."""

import itertools
import json
from functools import partial

import numpy as np
import pytest
from helpers import fake_evaluation
from scipy.special import betaincinv
from scipy.stats import binom, binomtest, multinomial
from sklearn.metrics import balanced_accuracy_score, precision_recall_fscore_support
from sklearn.metrics import confusion_matrix as sklearn_confusion

from robal_jax import metrics
from robal_jax.data.long_tail import long_tailed_counts
from robal_jax.errors import InputError


def random_case(num_classes, n, seed=0):
    generator = np.random.default_rng(seed)
    labels = generator.permutation(np.arange(n) % num_classes)
    predictions = np.where(generator.random(n) < 0.5, labels, generator.integers(0, num_classes, n))
    return labels, predictions


def test_confusion_matrix_has_true_classes_in_rows():
    result = metrics.confusion_matrix([0, 0, 1, 2], [0, 2, 1, 0], 3)
    assert result.dtype == np.int64
    np.testing.assert_array_equal(result, [[1, 0, 1], [0, 1, 0], [1, 0, 0]])


@pytest.mark.parametrize("bad", [-1, 3])
def test_confusion_matrix_refuses_classes_out_of_range(bad):
    with pytest.raises(InputError, match=r"pass classes in 0\.\.2"):
        metrics.confusion_matrix([0, 1], [0, bad], 3)


@pytest.mark.parametrize("num_classes", [2, 10, 100])
def test_precision_recall_f_equal_scikit_learn(num_classes):
    labels, predictions = random_case(num_classes, 700)
    # Class 1 is never predicted, class 0 has no test image: both zero divisions occur.
    predictions[predictions == 1] = 0
    labels[labels == 0] = 1
    confusion = metrics.confusion_matrix(labels, predictions, num_classes)
    np.testing.assert_array_equal(
        confusion, sklearn_confusion(labels, predictions, labels=range(num_classes))
    )
    expected = precision_recall_fscore_support(
        labels, predictions, labels=range(num_classes), zero_division=0
    )
    result = metrics.precision_recall_f(confusion)
    np.testing.assert_allclose(result, expected[:3], rtol=1e-14)


def test_precision_recall_f_keep_leading_axes():
    confusions = np.random.default_rng(0).integers(0, 5, (2, 3, 4, 4))
    batched = np.stack(metrics.precision_recall_f(confusions))
    for index in np.ndindex(2, 3):
        single = metrics.precision_recall_f(confusions[index])
        np.testing.assert_array_equal(batched[(slice(None), *index)], single)


@pytest.mark.parametrize(("num_classes", "sizes"), [(10, [3, 4, 3]), (100, [33, 34, 33]), (3, [1, 1, 1])])
def test_groups_are_thirds_by_default(num_classes, sizes):
    groups = metrics.class_groups(np.arange(num_classes, 0, -1))
    assert list(groups) == ["head", "medium", "tail"]
    assert [len(classes) for classes in groups.values()] == sizes
    np.testing.assert_array_equal(np.concatenate(list(groups.values())), np.arange(num_classes))


def test_groups_follow_counts_and_break_ties_by_label():
    groups = metrics.class_groups([5, 9, 5, 1, 9], head_classes=2, tail_classes=2)
    assert {name: classes.tolist() for name, classes in groups.items()} == {
        "head": [1, 4],
        "medium": [0],
        "tail": [2, 3],
    }


def test_empty_groups_are_left_out():
    assert list(metrics.class_groups([5, 4, 3, 2], 2, 2)) == ["head", "tail"]


def in_lists(groups):
    return {name: classes.tolist() for name, classes in groups.items()}


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        ([9] * 5 + [2] * 5, {"head": [0, 1, 2, 3, 4], "tail": [5, 6, 7, 8, 9]}),  # a step profile
        ([2, 9, 2, 9, 9], {"head": [1, 3, 4], "tail": [0, 2]}),
        ([9, 9, 9, 2], {"head": [0, 1, 2], "tail": [3]}),
        ([9] + [2] * 9, {"head": [0], "tail": list(range(1, 10))}),
        ([4, 2], {"head": [0], "tail": [1]}),
        ([4, 4], {"all": [0, 1]}),
        ([7] * 10, {"all": list(range(10))}),
        ([5], {"all": [0]}),
        ([9, 9, 9, 9, 5, 1], {"head": [0, 1, 2, 3], "medium": [4], "tail": [5]}),
        ([9, 9, 9, 5, 5, 2, 1], {"head": [0, 1], "medium": [2, 3, 4], "tail": [5, 6]}),  # four counts: thirds
    ],
)
def test_groups_of_few_different_counts_are_those_counts(counts, expected):
    assert in_lists(metrics.class_groups(counts)) == expected


def test_sizes_that_are_given_count_before_equal_counts():
    assert in_lists(metrics.class_groups([9] * 5 + [2] * 5, head_classes=4)) == {
        "head": [0, 1, 2, 3],
        "medium": [4, 5, 6],
        "tail": [7, 8, 9],
    }


@pytest.mark.parametrize("data", ["digits", "cifar10", "cifar100"])
def test_groups_of_exponential_profiles_are_thirds(data):
    n_max, num_classes, ratio = {
        "digits": (104, 10, 0.05), "cifar10": (5000, 10, 0.02), "cifar100": (500, 100, 0.1),
    }[data]  # fmt: skip
    for part in (ratio, ratio / 5, 5 * ratio):
        counts = long_tailed_counts(n_max, num_classes, part)
        third = num_classes // 3
        groups = metrics.class_groups(counts)
        np.testing.assert_array_equal(groups["head"], np.arange(third))
        np.testing.assert_array_equal(groups["tail"], np.arange(num_classes - third, num_classes))


@pytest.mark.parametrize("sizes", [(-1, 0), (0, -1), (3, 3), (5, 0)])
def test_groups_refuse_impossible_sizes(sizes):
    with pytest.raises(InputError):
        metrics.class_groups([5, 4, 3, 2, 1], *sizes)


PROTOCOLS = {
    "last_80_percent": (
        {"head": [1], "tail": [0, 2, 3, 4]},
        {"head": 2, "tail": 8},
        {"head": 20, "tail": 80},
    ),
    "few": ({"rest": [1, 0, 2, 3], "few": [4]}, {"rest": 10}, {"rest": 81, "few": 19}),
    "last_five": ({"last_five": [1, 0, 2, 3, 4]}, {"rest": 5, "last_five": 5}, {"rest": 95, "last_five": 5}),
    "shots": (
        {"many": [1], "medium": [0, 2, 3], "few": [4]},
        {"many": 6, "medium": 4},
        {"medium": 81, "few": 19},
    ),
}
"""By protocol: the groups of five classes, and the sizes for ten large classes and for 100 small ones."""


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_groups_follow_the_protocol(protocol):
    classes, of_ten, of_hundred = PROTOCOLS[protocol]
    assert in_lists(metrics.GROUPS[protocol]([100, 101, 100, 20, 19])) == classes
    for counts, sizes in ((range(40, 240, 20), of_ten), (range(100, 0, -1), of_hundred)):
        groups = metrics.GROUPS[protocol](np.array(counts))
        assert {name: len(found) for name, found in groups.items()} == sizes
        order = np.concatenate(list(groups.values()))
        assert sorted(order) == list(range(len(counts)))
        assert (np.diff(np.array(counts)[order]) <= 0).all()


def test_the_few_of_few_are_those_of_shots():
    counts = np.random.default_rng(0).integers(1, 200, 50)
    np.testing.assert_array_equal(metrics.few(counts)["few"], metrics.shots(counts)["few"])


def test_protocols_are_in_the_order_of_the_list_and_sizes_are_for_thirds():
    counts = np.arange(60, 0, -10)
    found = metrics.groups_by_protocol("thirds,last_five", counts, 1, 1)
    assert list(found) == ["thirds", "last_five"]
    assert in_lists(found["thirds"]) == {"head": [0], "medium": [1, 2, 3, 4], "tail": [5]}
    for names in ("last_five", "last_five,thirds"):
        with pytest.raises(
            InputError, match=r"head_classes is 0 and tail_classes 1, but groups is 'last_five"
        ):
            metrics.groups_by_protocol(names, counts, 0, 1)


@pytest.mark.parametrize("names", ["", "halves", "few,few", "few, shots", ["few"], None])
def test_unknown_protocols_are_refused(names):
    with pytest.raises(InputError, match=r"groups is .*; use one of thirds, last_80_percent, few"):
        metrics.groups_by_protocol(names, [3, 2, 1])


def test_groups_without_a_class_are_named():
    """In thirds the groups depend on the counts, so that none is missing."""
    protocols = metrics.groups_by_protocol(",".join(metrics.GROUPS), [30, 30, 20])
    assert metrics.absent_groups(protocols) == [
        "groups 'last_80_percent': no class is one of the first 20 %",
        "groups 'few': no class has fewer than 20 training images",
        "groups 'last_five': no class is outside of the last five",
        "groups 'shots': no class has more than 100 training images",
        "groups 'shots': no class has fewer than 20 training images",
    ]


def test_figures_of_protocols_are_those_of_their_groups():
    labels, predictions = fake_evaluation()
    counts = np.arange(50, 0, -5)
    protocols = metrics.groups_by_protocol("last_five,few", counts)
    summary = metrics.summarize(labels, predictions, counts, groups=protocols["few"], protocols=protocols)
    assert "protocols" not in metrics.summarize(labels, predictions, counts, groups=protocols["few"])
    for name, group in summary["protocols"]["few"].items():
        assert group["classes"] == summary["groups"][name]
        assert group["training_images"] == counts[group["classes"]].sum()
        figures = {condition: row[name] for condition, row in summary["conditions"].items()}
        assert group["accuracy"] == figures
    json.dumps(summary, allow_nan=False)


def test_groups_of_ten_are_means():
    np.testing.assert_allclose(metrics.groups_of_ten(np.arange(100)), 4.5 + 10 * np.arange(10))


def test_wilson_interval_of_known_cases():
    np.testing.assert_allclose(metrics.wilson_interval(8, 10), (0.4902, 0.9433), atol=5e-5)
    # At 0 of n the bounds are 0 and z^2 / (n + z^2).
    z2 = metrics.Z95**2
    np.testing.assert_allclose(metrics.wilson_interval(0, 50), (0, z2 / (50 + z2)), atol=1e-15)
    np.testing.assert_allclose(metrics.wilson_interval(50, 50), (50 / (50 + z2), 1), atol=1e-15)


def test_wilson_interval_contains_the_share():
    total = np.arange(1, 60)[:, None]
    successes = np.minimum(np.arange(60), total)
    low, high = metrics.wilson_interval(successes, total)
    assert np.all((low >= 0) & (low <= successes / total) & (successes / total <= high) & (high <= 1))


def within(truth, interval):
    """Whether an interval holds the truth; the edges belong to it, and rounding does not matter."""
    low, high = interval
    return (low <= truth + 1e-12) & (truth <= high + 1e-12)


def binomial_low(share, draws):
    """What a share of draws falls below in one of 100 000 simulations."""
    return binom.ppf(1e-5, draws, share) / draws


def long_tailed(num_classes):
    return np.geomspace(0.9, 0.02, num_classes)


SIZES = {  # test images per class
    "5": lambda count: np.full(count, 5),
    "10": lambda count: np.full(count, 10),
    "100": lambda count: np.full(count, 100),
    "mixed": lambda count: np.geomspace(100, 10, count).astype(int),
    "one small": lambda count: np.where(np.arange(count) == 0, 10, 1000),
}
RECALLS = {
    **{str(share): partial(np.full, fill_value=share) for share in (0.0, 0.01, 0.1, 0.5, 0.9, 0.99, 1.0)},
    "mixed": lambda count: np.linspace(0, 1, count),
    "long-tailed": long_tailed,
    "rising": lambda count: long_tailed(count)[::-1],
    "one bad": lambda count: np.where(np.arange(count) == 0, 0.5, 1.0),
}


def recall_coverage(num_classes, size, recall, draws):
    sizes, shares = SIZES[size](num_classes), RECALLS[recall](num_classes)
    hits = np.random.default_rng(1).binomial(sizes, shares, (draws, num_classes))
    return within(shares.mean(), metrics.macro_interval(hits, sizes)).mean()


@pytest.mark.parametrize(
    ("num_classes", "size", "recall"),
    [
        (10, "10", "0.99"),
        (10, "10", "1.0"),
        (100, "10", "0.01"),
        (10, "mixed", "long-tailed"),
        (2, "10", "0.5"),
        (10, "one small", "one bad"),
        (100, "100", "0.5"),
    ],
)
def test_macro_interval_covers_macro_recall(num_classes, size, recall):
    draws = 4000
    assert recall_coverage(num_classes, size, recall, draws) >= binomial_low(0.93, draws)


@pytest.mark.long
@pytest.mark.slow
def test_macro_interval_covers_macro_recall_everywhere():
    draws = 10_000
    found = {
        case: recall_coverage(*case, draws) for case in itertools.product((2, 3, 10, 100), SIZES, RECALLS)
    }
    print(sorted((coverage, *case) for case, coverage in found.items())[:10])
    assert min(found.values()) >= binomial_low(0.93, draws)


def confusion_coverage(num_classes, size, recall, errors, draws):
    """Coverage of macro precision and F-score; ``errors`` are shares of the classes that errors name."""
    sizes, shares = SIZES[size](num_classes), RECALLS[recall](num_classes)
    others = np.tile(errors, (num_classes, 1)) * (1 - np.eye(num_classes))
    cells = np.diag(shares) + (1 - shares)[:, None] * others / others.sum(-1, keepdims=True)
    precision, _, f_score = np.mean(metrics.precision_recall_f(cells * sizes[:, None]), axis=-1)
    generator, covered = np.random.default_rng(1), []
    for _ in range(draws // 100):
        drawn = generator.multinomial(sizes, cells / cells.sum(-1, keepdims=True), (100, num_classes))
        hits, support, predicted = np.diagonal(drawn, axis1=1, axis2=2), drawn.sum(2), drawn.sum(1)
        of_precision = within(precision, metrics.macro_interval(hits, predicted))
        of_f_score = within(f_score, metrics.macro_interval(hits, (support + predicted) / 2))
        covered.append([of_precision, of_f_score])
    return np.mean(covered, axis=(0, 2))


def errors_of(kind, num_classes):
    return np.ones(num_classes) if kind == "anywhere" else np.geomspace(1, 0.02, num_classes)


@pytest.mark.parametrize(
    ("size", "recall", "errors"),
    [("10", "0.99", "anywhere"), ("10", "long-tailed", "to the head"), ("mixed", "0.5", "anywhere")],
)
def test_macro_interval_covers_precision_and_f_score(size, recall, errors):
    draws = 2000
    found = confusion_coverage(10, size, recall, errors_of(errors, 10), draws)
    assert np.all(found >= binomial_low(0.93, draws)), found


@pytest.mark.slow
@pytest.mark.parametrize("num_classes", [2, 10, pytest.param(100, marks=pytest.mark.long)])
def test_macro_interval_covers_precision_and_f_score_everywhere(num_classes):
    draws = 1000 if num_classes == 100 else 5000
    low = binomial_low(0.93, draws)
    sizes = [size for size in ("10", "100", "mixed") if SIZES[size](num_classes).min() >= num_classes]
    kinds = ("anywhere", "to the head")
    for size, recall, kind in itertools.product(("10", "100", "mixed"), RECALLS, kinds):
        if num_classes == 2 and recall == "rising":
            continue  # as long-tailed
        of_precision, of_f_score = confusion_coverage(
            num_classes, size, recall, errors_of(kind, num_classes), draws
        )
        case = (size, recall, kind)
        assert of_f_score >= low, (case, of_f_score)
        assert of_precision >= low or size not in sizes, (case, of_precision)


def test_macro_interval_of_one_class_is_that_of_clopper_and_pearson():
    for hits, total in [(0, 10), (3, 10), (10, 10), (1, 700)]:
        exact = binomtest(hits, total).proportion_ci(method="exact")
        np.testing.assert_allclose(metrics.macro_interval([hits], [total]), exact, rtol=1e-8, atol=1e-12)


def test_macro_interval_of_equal_classes_is_that_of_all_their_images():
    whole = metrics.macro_interval([13], [60])
    np.testing.assert_allclose(metrics.macro_interval([2, 4, 7], [20, 20, 20]), whole, rtol=1e-9)


@pytest.mark.parametrize("hits", [[1, 4, 40], [5, 13, 190], [0, 0, 3], [5, 19, 200]])
def test_macro_interval_has_the_size_of_the_largest_variance(hits):
    totals = np.array([5, 20, 200])
    mean = np.mean(hits / totals)
    shares = np.random.default_rng(0).dirichlet(np.ones(3), 20_000) * 3 * min(mean, 1 - mean)
    shares = shares[(shares <= 1).all(-1)]  # of all shares with this mean, or one minus them
    largest = np.max(np.sum(shares * (1 - shares) / totals, axis=-1)) / 9
    size = mean * (1 - mean) / largest
    expected = betaincinv(mean * size, size - mean * size + 1, 0.025) if mean else 0
    assert metrics.macro_interval(hits, totals)[0] == pytest.approx(expected, rel=5e-3)


@pytest.mark.parametrize("num_classes", [1, 2, 10, 100])
def test_macro_interval_is_nowhere_a_point_and_holds_the_value(num_classes):
    generator = np.random.default_rng(num_classes)
    totals = generator.integers(0, 30, (200, num_classes))
    hits = generator.binomial(totals, generator.random((200, 1)))
    hits[:20], hits[20:40] = 0, totals[20:40]
    low, high = metrics.macro_interval(hits, totals)
    mean = np.mean(hits / np.maximum(totals, 1), axis=-1)
    assert np.all((low >= 0) & (low <= mean) & (mean <= high) & (high <= 1) & (low < high))
    np.testing.assert_array_equal([low[7], high[7]], metrics.macro_interval(hits[7], totals[7]))


def test_macro_interval_of_a_mirrored_mean_is_mirrored():
    low, high = metrics.macro_interval([1, 7, 30], [5, 20, 200])
    mirrored = metrics.macro_interval([4, 13, 170], [5, 20, 200])
    np.testing.assert_allclose(mirrored, (1 - high, 1 - low), rtol=1e-12)


def test_macro_interval_of_a_class_that_is_never_predicted_is_that_of_one_wrong_image():
    unknown, wrong = (metrics.macro_interval([0, 9], [total, 10]) for total in (0, 1))
    np.testing.assert_array_equal(unknown, wrong)


def paired(gained, lost, n):
    """The difference of two models where the second gains and loses so many of n images."""
    place = np.arange(n)
    return metrics.paired_difference((gained <= place) & (place < gained + lost), place < gained)


def test_paired_difference_by_hand():
    first = np.array([1, 1, 1, 0, 0, 0, 0, 0], bool)
    second = np.array([1, 1, 0, 1, 1, 1, 0, 0], bool)
    # b = 3 gained, c = 1 lost, n = 8: shares 4 / 10 and 2 / 10, half width z sqrt((0.6 - 0.04) / 10).
    # P(at most 1 of 4 or at least 3 of 4 | 1/2) = 2 (1 + 4) / 16.
    half = metrics.Z95 * np.sqrt(0.056)
    expected = {"value": 0.25, "low": 0.2 - half, "high": 0.2 + half, "p_value": 0.625}
    assert metrics.paired_difference(first, second) == pytest.approx(expected)
    mirrored = metrics.paired_difference(second, first)
    assert mirrored["value"] == -0.25
    assert mirrored["low"] == pytest.approx(-expected["high"])
    assert mirrored["p_value"] == pytest.approx(0.625)
    assert metrics.paired_difference(first, first)["p_value"] == 1


@pytest.mark.parametrize("n", [1, 2, 5, 6, 12, 40, 300])
def test_interval_and_p_value_never_contradict_each_other(n):
    differ = np.unique(np.linspace(0, n, 13).astype(int))
    for total in differ:
        for gained in np.unique(np.linspace(0, total, 25).astype(int)):
            found = paired(gained, total - gained, n)
            assert -1 <= found["low"] <= found["value"] <= found["high"] <= 1
            assert (found["low"] <= 0 <= found["high"]) == (found["p_value"] >= 0.05), found


@pytest.mark.slow
def test_interval_leaves_out_zero_wherever_the_exact_test_rejects():
    # At the least significant numbers, and an infinite number of images, where the interval is widest.
    differ = np.arange(6, 200_000)
    lost = binom.ppf(0.025, differ, 0.5) - 1  # the most with P(at most so many) < 0.025
    assert np.all((binom.cdf(lost, differ, 0.5) < 0.025) & (lost >= 0))
    assert np.all(differ - 2 * lost > metrics.Z95 * np.sqrt(differ + 2))


@pytest.mark.parametrize(("gained", "lost", "n"), [(5, 0, 10), (11, 3, 700), (16, 6, 700), (17, 7, 10_000)])
def test_interval_is_extended_to_zero_where_the_exact_test_does_not_reject(gained, lost, n):
    found, mirrored = paired(gained, lost, n), paired(lost, gained, n)
    p, q = (gained + 1) / (n + 2), (lost + 1) / (n + 2)
    assert p - q > metrics.Z95 * np.sqrt((p + q - (p - q) ** 2) / (n + 2))  # would leave out 0
    assert found["p_value"] >= 0.05
    assert found["low"] == mirrored["high"] == 0
    assert found["high"] == -mirrored["low"] > 0


@pytest.mark.parametrize(("n", "least"), [(10, 0.89), (40, 0.93), (100, 0.93)])
def test_paired_interval_covers_the_difference(n, least):
    """Summed over all outcomes, without draws."""
    outcomes = [(gained, lost) for gained in range(n + 1) for lost in range(n + 1 - gained)]
    bounds = [paired(gained, lost, n) for gained, lost in outcomes]
    interval = np.array([[found[key] for found in bounds] for key in ("low", "high")])
    shares = [0, 0.001, 0.003, 0.01, 0.03, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9, 0.97, 0.99, 0.999, 1]
    for gain, loss in itertools.product(shares, repeat=2):
        if loss <= gain <= 1 - loss + 1e-12:
            chance = multinomial.pmf(
                [(*o, n - sum(o)) for o in outcomes], n, [gain, loss, max(0, 1 - gain - loss)]
            )
            assert chance[within(gain - loss, interval)].sum() >= least, (gain, loss)


@pytest.mark.parametrize(("gained", "lost"), [(0, 0), (1, 0), (3, 4), (12, 30), (500, 420)])
def test_p_value_is_that_of_scipy(gained, lost):
    expected = binomtest(gained, gained + lost).pvalue if gained + lost else 1
    assert paired(gained, lost, 1000)["p_value"] == pytest.approx(expected, rel=1e-9)


def test_p_value_of_an_improvement():
    first, second = np.zeros(20, bool), np.arange(20) < 8
    assert metrics.paired_difference(first, second)["p_value"] == pytest.approx(2 / 2**8)


def test_worst_case_takes_the_first_wrong_prediction():
    labels = np.array([0, 1, 2, 3])
    predictions = {
        "clean": np.array([0, 1, 2, 0]),
        "a": np.array([0, 2, 2, 3]),
        "b": np.array([0, 3, 1, 1]),
    }
    np.testing.assert_array_equal(metrics.worst_case(labels, predictions), [0, 2, 1, 0])


def test_summary_of_a_case_worked_by_hand():
    labels = np.array([0, 0, 0, 0, 1, 1, 2, 2])
    predictions = {
        "clean": np.array([0, 0, 0, 1, 1, 1, 2, 0]),
        "attack": np.array([0, 0, 1, 0, 1, 2, 0, 2]),
    }
    summary = metrics.summarize(labels, predictions, [9, 5, 1])
    assert summary["class_counts"] == [9, 5, 1]
    assert summary["groups"] == {"head": [0], "medium": [1], "tail": [2]}
    assert list(summary["conditions"]) == ["clean", "attack", "worst"]

    values = {
        name: {key: entry["value"] for key, entry in figures.items() if "value" in entry}
        for name, figures in summary["conditions"].items()
    }
    assert values["clean"]["accuracy"] == 6 / 8
    # The attack breaks three images and repairs two that were wrong when clean.
    assert values["attack"]["accuracy"] == 5 / 8
    assert values["attack"]["natural_error"] == 2 / 8
    assert values["attack"]["boundary_error"] == 3 / 8
    assert values["attack"]["robust_accuracy"] == 3 / 8
    assert values["worst"]["accuracy"] == values["worst"]["robust_accuracy"] == 3 / 8
    assert values["attack"]["head"] == 3 / 4
    assert values["attack"]["medium"] == values["attack"]["tail"] == 1 / 2
    assert values["attack"]["recall"] == pytest.approx((3 / 4 + 1 / 2 + 1 / 2) / 3)
    assert values["attack"]["precision"] == pytest.approx((3 / 4 + 1 / 2 + 1 / 2) / 3)
    per_class = summary["conditions"]["clean"]["per_class"]
    assert per_class["support"] == [4, 2, 2]
    assert per_class["precision"] == pytest.approx([3 / 4, 2 / 3, 1])
    assert [entry["value"] for entry in per_class["recall"]] == [3 / 4, 1, 1 / 2]
    assert per_class["recall"][1]["low"] < 1  # 2 of 2 is no certainty


@pytest.mark.parametrize("num_classes", [2, 10, 100])
def test_summary_is_consistent(num_classes):
    labels, clean = random_case(num_classes, 40 * num_classes)
    predictions = {"clean": clean, "weak": random_case(num_classes, len(labels), 1)[1], "strong": 0 * labels}
    summary = metrics.summarize(labels, predictions, np.arange(num_classes, 0, -1))
    assert json.loads(json.dumps(summary, allow_nan=False)) == summary
    for name, condition in summary["conditions"].items():
        parts = ("natural_error", "boundary_error", "robust_accuracy")
        assert sum(condition[part]["value"] for part in parts) == pytest.approx(1)
        assert condition["accuracy"]["value"] >= condition["robust_accuracy"]["value"]
        assert ("groups_of_ten" in condition) == (num_classes == 100)
        confusion, per_class = np.array(condition["confusion"]), condition["per_class"]
        np.testing.assert_array_equal(confusion.sum(-1), per_class["support"])
        assert np.trace(confusion) / confusion.sum() == condition["accuracy"]["value"]
        for part in ("natural_error", "boundary_error"):
            mean = np.average(per_class[part], weights=per_class["support"])
            assert mean == pytest.approx(condition[part]["value"])
        for key in ("accuracy", "precision", "recall", "f_score", *summary["groups"], *parts):
            assert 0 <= condition[key]["low"] <= condition[key]["value"] <= condition[key]["high"] <= 1
            assert condition[key]["low"] < condition[key]["high"]
        assert condition["balanced_accuracy"] == condition["recall"]
        hits, predicted, support = np.diagonal(confusion), confusion.sum(0), confusion.sum(1)
        totals = {"precision": predicted, "recall": support, "f_score": (predicted + support) / 2}
        for key, total in totals.items():
            interval = condition[key]["low"], condition[key]["high"]
            assert interval == metrics.macro_interval(hits, total)
        if name in predictions:
            expected = balanced_accuracy_score(labels, predictions[name])
            assert condition["balanced_accuracy"]["value"] == pytest.approx(expected)
        sizes = [np.isin(labels, classes).sum() for classes in summary["groups"].values()]
        shares = [condition[group]["value"] for group in summary["groups"]]
        assert np.average(shares, weights=sizes) == pytest.approx(condition["accuracy"]["value"])
    worst = summary["conditions"]["worst"]["accuracy"]["value"]
    assert worst <= min(entry["accuracy"]["value"] for entry in summary["conditions"].values())


Y, RIGHT, SQUARE = np.array([0, 1, 2]), np.array([True, False, True]), np.eye(3, dtype=int)
WRONG = {
    # function, arguments, message
    "labels [n, 1]": (metrics.confusion_matrix, (Y[:, None], Y, 3), r"labels have shape \[3, 1\]"),
    "one-hot labels": (metrics.confusion_matrix, (SQUARE, Y, 3), r"labels have shape \[3, 3\]"),
    "float labels": (metrics.confusion_matrix, (Y / 1, Y, 3), "labels have .* dtype float64; pass integers"),
    "logits": (metrics.confusion_matrix, (Y, np.eye(3), 3), r"predictions have shape \[3, 3\]"),
    "one prediction": (metrics.confusion_matrix, (Y, Y[:1], 3), "predictions have 1 entries, labels 3"),
    "no square": (metrics.precision_recall_f, (SQUARE[:2],), r"confusion has shape \[2, 3\]"),
    "a vector": (metrics.precision_recall_f, (Y,), r"confusion has shape \[3\]"),
    "counts [1, K]": (metrics.class_groups, (Y[None],), r"the shape of class_counts is \[1, 3\]"),
    "a class without images": (metrics.class_groups, ([3, 0],), "class_counts have the entry 0"),
    "fewer than no images": (
        metrics.summarize,
        (Y, {"clean": Y}, [3, 2, -1]),
        "class_counts have the entry -1",
    ),
    "counts by name": (
        metrics.class_groups,
        ({"a": 3, "b": 1},),
        "class_counts is {'a': 3, 'b': 1}; it must",
    ),
    "counts as text": (metrics.class_groups, (["3", "1"],), r"class_counts is \['3', '1'\]; it must"),
    "NaN images": (metrics.class_groups, ([3, np.nan],), "class_counts have the entry nan"),
    "no counts": (metrics.class_groups, ([],), r"the shape of class_counts is \[0\]"),
    "nine figures": (metrics.groups_of_ten, (np.ones(9),), "values has 9 entries"),
    "11 of 10": (metrics.wilson_interval, (11, 10), "successes are not in 0..total"),
    "-1 of 10": (metrics.wilson_interval, ([3, -1], 10), "successes are not in 0..total"),
    "NaN of 10": (metrics.wilson_interval, (np.nan, 10), "successes are not in 0..total"),
    "0 of 0": (metrics.wilson_interval, (0, 0), "total is below 1"),
    "11 of 10 in a class": (metrics.macro_interval, ([1, 11], [10, 10]), "hits are not whole numbers"),
    "-1 of 10 in a class": (metrics.macro_interval, ([1, -1], [10, 10]), "hits are not whole numbers"),
    "NaN in a class": (metrics.macro_interval, ([1, np.nan], 10), "hits are not whole numbers"),
    "no class": (metrics.macro_interval, ([], []), r"hits are not .* per class \[\.\.\., K\]"),
    "a number": (metrics.macro_interval, (1, 2), r"hits are not .* per class \[\.\.\., K\]"),
    "predictions": (metrics.paired_difference, (Y, Y), "first has .* dtype int64; pass booleans"),
    "other images": (metrics.paired_difference, (RIGHT, RIGHT[:2]), "second has 2 entries, first 3"),
    "hits [n, 1]": (metrics.paired_difference, (RIGHT, RIGHT[:, None]), r"second has shape \[3, 1\]"),
    "no images": (metrics.paired_difference, (RIGHT[:0], RIGHT[:0]), r"first has shape \[0\]"),
    "no hits": (metrics.share, (RIGHT[:0],), r"hits has shape \[0\] and dtype bool"),
    "numbers": (metrics.share, (Y,), "hits has .* dtype int64"),
    "a column": (metrics.worst_case, (Y[:, None], {"clean": Y}), r"labels have shape \[3, 1\]"),
    "a short condition": (metrics.worst_case, (Y, {"pgd": Y[:2]}), "predictions of 'pgd' have 2 entries"),
    "no condition": (metrics.worst_case, (Y, {}), "predictions has no condition"),
    "float classes": (metrics.summarize, (Y, {"clean": Y / 1}, [3, 2, 1]), "predictions of 'clean' have"),
    "counts": (metrics.summarize, (Y, {"clean": Y}, 3), r"the shape of class_counts is \[\]"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_arguments_are_refused(wrong):
    function, arguments, message = WRONG[wrong]
    with pytest.raises(InputError, match=message):
        function(*arguments)


def test_no_group_replaces_a_figure():
    with pytest.raises(InputError, match="group 'accuracy' has the name of a figure; choose another"):
        metrics.summarize(Y, {"clean": Y}, [3, 2, 1], groups={"accuracy": [2]})
    found = metrics.summarize(Y, {"clean": Y}, [3, 2, 1])["conditions"]["clean"]
    assert set(found) - {"head", "medium", "tail"} <= set(metrics.FIGURES)


@pytest.mark.parametrize(
    ("tail", "message"),
    [
        ([], "group 'tail' has no class; give it one, or leave it out"),
        ([2, 3], r"classes of group 'tail' are in 2\.\.3; pass classes in 0\.\.2"),
    ],
)
def test_groups_without_test_images_are_refused(tail, message):
    groups = {"head": [0, 1], "tail": tail}
    with pytest.raises(InputError, match=message):
        metrics.summarize(Y, {"clean": Y}, [3, 2, 1], groups=groups)
    with pytest.raises(InputError, match=message):
        metrics.summarize_corruptions(Y, {"fog": Y[None]}, [3, 2, 1], groups=groups)


def test_summary_refuses_a_class_without_test_images():
    with pytest.raises(InputError, match="no image of class 1"):
        metrics.summarize(np.array([0, 2]), {"clean": np.array([0, 2])}, [3, 2, 1])


@pytest.mark.parametrize("names", [[], ["pgd_20", "clean"], ["clean", "worst"]])
def test_summary_refuses_other_conditions(names):
    labels = np.array([0, 1])
    with pytest.raises(InputError, match="start with 'clean'"):
        metrics.summarize(labels, dict.fromkeys(names, labels), [2, 1])


@pytest.mark.parity
@pytest.mark.parametrize("case", ["random10", "random100", "missing_pred", "missing_both", "ties"])
def test_metrics_equal_the_released_code(golden, case):
    arrays = golden("metrics")
    outputs, labels = arrays[f"{case}/outputs"], arrays[f"{case}/labels"]
    predictions = outputs.argmax(-1)
    confusion = metrics.confusion_matrix(labels, predictions, outputs.shape[1])
    accuracy = metrics.share(labels == predictions)["value"]
    assert accuracy == arrays[f"{case}/accuracy"] == np.trace(confusion) / confusion.sum()

    per_class = dict(
        zip(("precision", "recall", "f_score"), metrics.precision_recall_f(confusion), strict=True)
    )
    # The released code drops classes that neither labels nor predictions name; ours keep their place.
    present = np.union1d(labels, predictions)
    for key, values in per_class.items():
        np.testing.assert_allclose(values[present], arrays[f"{case}/{key}"], rtol=1e-14, atol=0)
    np.testing.assert_array_equal(confusion.sum(-1)[present], arrays[f"{case}/true_sum"])
    means = [values[present].mean() for values in per_class.values()]
    np.testing.assert_allclose(means, arrays[f"{case}/mean_prf"], rtol=1e-14)
    if outputs.shape[1] >= 100:
        # There the groups are sums over ten classes, here means.
        for key, values in per_class.items():
            sums = 10 * metrics.groups_of_ten(values)
            np.testing.assert_allclose(sums, arrays[f"{case}/g_{key}"], rtol=1e-14)


def test_numbers_of_classes_are_integers():
    with pytest.raises(InputError, match=r"num_classes is 4\.0; pass an integer"):
        metrics.confusion_matrix([0, 1], [0, 1], 4.0)
    with pytest.raises(InputError, match=r"head_classes is 0\.5; pass an integer"):
        metrics.class_groups([90, 20, 10, 1], head_classes=0.5)
