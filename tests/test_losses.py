"""Losses against NumPy written from the equations (robal_jax.losses)."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from robal_jax import attacks, class_terms, losses

B, K = 6, 5
COUNTS = np.array([100, 40, 16, 6, 2])


def random_logits(seed, size=3.0, classes=K):
    return (size * np.random.RandomState(seed).randn(B, classes)).astype(np.float32)


def random_labels(seed, classes=K):
    return np.random.RandomState(seed).randint(0, classes, B).astype(np.int32)


# ---------------------------------------------------------------- the equations in float64


def softmax(row):
    shifted = np.exp(np.float64(row) - np.max(row))
    return shifted / shifted.sum()


def numpy_cross_entropy(logits, labels):
    return np.array([-np.log(softmax(row)[y]) for row, y in zip(logits, labels, strict=True)])


def numpy_margins(counts, scale, margin, tau_m):
    return np.array([tau_m / scale * np.log(n / min(counts)) + margin for n in counts])


def numpy_biases(counts, tau_b):
    return np.array([tau_b * np.log(n / sum(counts)) for n in counts])


def numpy_margin_adjusted(cosines, labels, margins, biases, scale):
    adjusted = np.float64(cosines).copy()
    for b, y in enumerate(labels):
        adjusted[b, y] -= margins[y]
    return numpy_cross_entropy(scale * adjusted + biases, labels)


def numpy_kl(logits, other):
    return np.array(
        [
            np.sum(p * (np.log(p) - np.log(q)))
            for p, q in zip(map(softmax, logits), map(softmax, other), strict=True)
        ]
    )


def numpy_effective_number_weights(counts, beta):
    weights = np.array([(1 - beta) / (1 - beta ** float(n)) for n in counts])
    return weights / weights.mean()


def numpy_ldam_margins(counts, max_margin, exponent, inverse=False):
    margins = np.array([float(n) ** (exponent if inverse else -exponent) for n in counts])
    return max_margin * margins / max(margins)


def numpy_binary(row, y, gamma):
    """Focal terms of one example, one per class."""
    q = 1 / (1 + np.exp(-np.where(np.arange(len(row)) == y, 1, -1) * np.float64(row)))
    return -((1 - q) ** gamma) * np.log(q)


def numpy_smoothed(row, y, confidence):
    target = np.full(len(row), (1 - confidence) / (len(row) - 1))
    target[y] = confidence
    return -np.sum(target * np.log(softmax(row)))


def numpy_binary_softmax(row, y):
    p = softmax(row)
    return -np.log(np.where(np.arange(len(row)) == y, p, 1 - p))


def numpy_focal_softmax(row, y, gamma, weight=1.0):
    p = softmax(row)[y] ** weight
    return 0.5 * (1 - p) ** gamma * -np.log(p)


def numpy_soft_margin(row, y):
    return np.log(np.sum(np.exp(np.delete(np.float64(row), y)))) - row[y]


def numpy_boosted(row, y):
    p = softmax(row)
    return -np.log(p[y]) - np.log(1 - max(np.delete(p, y)))


def numpy_inverse_ldam(row, y, margins):
    """As the released code writes it: the margin added to all wrong logits."""
    return -np.log(softmax(np.float64(row) + margins[y] * (np.arange(len(row)) != y))[y])


def each(one, **options):
    """A loss of one example made one of a batch."""
    return lambda logits, labels: np.array(
        [np.mean(one(row, y, **options)) for row, y in zip(logits, labels, strict=True)]
    )


def cases(counts):
    """By name: our loss with everything bound, and the same from its equation in NumPy."""
    classes, column = len(counts), np.linspace(0.5, 2.0, len(counts))
    bind = functools.partial(functools.partial, class_counts=counts)
    balance = numpy_effective_number_weights(counts, 0.99)
    margins = numpy_ldam_margins(counts, 0.5, 0.25)
    inverse = numpy_ldam_margins(counts, 0.4, 0.5, inverse=True)
    temperatures = np.array([(max(counts) / n) ** 0.3 for n in counts])
    zeros = np.zeros(classes)
    return {
        "smoothed": (
            functools.partial(losses.smoothed_cross_entropy, confidence=0.8),
            each(numpy_smoothed, confidence=0.8),
        ),
        "binary": (losses.binary_cross_entropy, each(numpy_binary, gamma=0)),
        "binary_cold": (
            functools.partial(losses.binary_cross_entropy, temperature=2.0),
            lambda z, y: 2 * each(numpy_binary, gamma=0)(z / 2, y),
        ),
        "binary_columns": (
            functools.partial(losses.binary_cross_entropy, class_weights=column),
            each(lambda row, y: column * numpy_binary(row, y, 0)),
        ),
        "focal": (losses.focal, lambda z, y: classes * each(numpy_binary, gamma=2)(z, y)),
        "focal_columns": (
            functools.partial(losses.focal, gamma=1.5, class_weights=column),
            each(lambda row, y: classes * column * numpy_binary(row, y, 1.5)),
        ),
        "focal_softmax": (
            functools.partial(losses.focal_softmax, gamma=1.5),
            each(numpy_focal_softmax, gamma=1.5),
        ),
        "focal_softmax_weighted": (
            functools.partial(losses.focal_softmax, class_weights=column),
            each(lambda row, y: numpy_focal_softmax(row, y, gamma=2, weight=column[y])),
        ),
        "soft_margin": (losses.soft_logit_margin, each(numpy_soft_margin)),
        "boosted": (losses.boosted_cross_entropy, each(numpy_boosted)),
        "balanced_focal": (
            bind(losses.class_balanced_focal, beta=0.99, gamma=1.0, alpha=0.5),
            each(lambda row, y: 0.5 * balance[y] * classes * numpy_binary(row, y, 1)),
        ),
        "balanced_sigmoid": (
            bind(losses.class_balanced_sigmoid, beta=0.99, alpha=0.7),
            each(lambda row, y: 0.7 * balance[y] * numpy_binary(row, y, 0)),
        ),
        "balanced_softmax": (
            bind(losses.class_balanced_softmax, beta=0.99, alpha=2.0, class_weights=column),
            each(lambda row, y: 2 * balance[y] * column * numpy_binary_softmax(row, y)),
        ),
        "class_temperature": (
            bind(losses.class_temperature, tau=0.3),
            lambda z, y: numpy_cross_entropy(z / temperatures, y),
        ),
        "logit_adjustment": (
            bind(losses.logit_adjustment, tau=1.2),
            lambda z, y: numpy_cross_entropy(z + numpy_biases(counts, 1.2), y),
        ),
        "uniform_margin": (
            functools.partial(losses.uniform_margin, margin=0.2, scale=4.0),
            lambda z, y: numpy_margin_adjusted(z, y, zeros + 0.2, zeros, 4.0),
        ),
        "ldam": (
            bind(losses.ldam, scale=4.0),
            lambda z, y: numpy_margin_adjusted(z, y, margins, zeros, 4.0),
        ),
        "ldam_inverse": (
            bind(losses.ldam, max_margin=0.4, exponent=0.5, inverse=True),
            each(numpy_inverse_ldam, margins=inverse),
        ),
        "deferred": (
            bind(losses.deferred, base=losses.focal_softmax, epoch=50, reweight=False, max_margin=0.5),
            lambda z, y: each(numpy_focal_softmax, gamma=2)(z - margins * np.eye(classes)[y], y),
        ),
    }


ROBAL = {"scale": 10.0, "margin": 0.1, "tau_m": 0.3, "tau_b": 1.5}
robal = functools.partial(losses.robal, class_counts=COUNTS, **ROBAL)


@pytest.mark.parametrize("size", [0.1, 3.0, 50.0])
@pytest.mark.parametrize("seed", [0, 1])
def test_cross_entropy(seed, size):
    logits, labels = random_logits(seed, size), random_labels(seed)
    # float32 of logits up to 150: absolute rounding of a few 2^-23 * 150.
    np.testing.assert_allclose(
        losses.cross_entropy(logits, labels), numpy_cross_entropy(logits, labels), rtol=1e-5, atol=1e-4
    )


def test_cross_entropy_of_known_values():
    logits = np.array([[0.0, 0.0], [0.0, np.log(3)]], np.float32)
    np.testing.assert_allclose(losses.cross_entropy(logits, np.array([0, 1])), np.log([2, 4 / 3]), rtol=1e-6)


@pytest.mark.parametrize("tau_m", [0.0, 0.3])
@pytest.mark.parametrize("scale", [1.0, 10.0])
def test_margins(scale, tau_m):
    found = losses.robal_margins(COUNTS, scale=scale, margin=0.1, tau_m=tau_m)
    np.testing.assert_allclose(found, numpy_margins(COUNTS, scale, 0.1, tau_m), rtol=1e-6)
    assert float(found[-1]) == pytest.approx(0.1)  # the rarest class gets m_0 only


@pytest.mark.parametrize("tau_b", [0.0, 1.0, 1.5])
def test_biases(tau_b):
    np.testing.assert_allclose(
        losses.robal_biases(COUNTS, tau_b=tau_b), numpy_biases(COUNTS, tau_b), rtol=1e-6
    )


def test_balanced_counts_give_constant_margins_and_biases():
    counts = np.full(K, 17)
    margins = losses.robal_margins(counts, scale=10.0, margin=0.2, tau_m=0.3)
    np.testing.assert_array_equal(margins, np.full(K, 0.2, np.float32))
    np.testing.assert_allclose(losses.robal_biases(counts, tau_b=1.5), 1.5 * np.log(1 / K), rtol=1e-6)


@pytest.mark.parametrize("seed", [0, 1])
def test_margin_adjusted_cross_entropy(seed):
    cosines, labels = np.tanh(random_logits(seed)), random_labels(seed)
    rng = np.random.RandomState(seed)
    margins, biases = rng.rand(K).astype(np.float32), rng.randn(K).astype(np.float32)
    found = losses.margin_adjusted_cross_entropy(cosines, labels, margins=margins, biases=biases, scale=10.0)
    expected = numpy_margin_adjusted(cosines, labels, margins, biases, 10.0)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("seed", [0, 1])
def test_robal(seed):
    cosines, labels = np.tanh(random_logits(seed)), random_labels(seed)
    margins = numpy_margins(COUNTS, ROBAL["scale"], ROBAL["margin"], ROBAL["tau_m"])
    biases = numpy_biases(COUNTS, ROBAL["tau_b"])
    expected = numpy_margin_adjusted(cosines, labels, margins, biases, ROBAL["scale"])
    np.testing.assert_allclose(robal(cosines, labels), expected, rtol=1e-5, atol=1e-5)


def test_robal_without_adjustments_is_scaled_cross_entropy():
    cosines, labels = np.tanh(random_logits(2)), random_labels(2)
    plain = losses.robal(cosines, labels, class_counts=COUNTS, scale=10.0, margin=0.0, tau_m=0.0, tau_b=0.0)
    np.testing.assert_array_equal(plain, losses.cross_entropy(10.0 * cosines, labels))


@pytest.mark.parametrize("seed", [0, 1])
def test_kl_divergence(seed):
    logits, other = random_logits(seed), random_logits(seed + 10)
    np.testing.assert_allclose(
        losses.kl_divergence(logits, other), numpy_kl(logits, other), rtol=1e-5, atol=1e-6
    )


def test_kl_divergence_of_equal_predictions_is_zero():
    logits = random_logits(0)
    # Both logarithms are roundings of numbers up to about 15.
    np.testing.assert_allclose(losses.kl_divergence(logits, logits + 1.0), 0.0, atol=1e-5)


def test_kl_divergence_is_finite_where_a_prediction_underflows():
    sure, other_sure = np.float32([[200.0, 0.0]]), np.float32([[0.0, 200.0]])
    value = losses.kl_divergence(sure, other_sure)
    np.testing.assert_allclose(value, 200.0, rtol=1e-5)
    for argument in (0, 1):
        gradient = jax.grad(lambda *z: losses.kl_divergence(*z).sum(), argument)(sure, other_sure)
        assert np.isfinite(gradient).all()


@pytest.mark.parametrize("counts", [COUNTS, np.array([30, 3])], ids=["five_classes", "two_classes"])
@pytest.mark.parametrize("name", cases(COUNTS))
def test_equations(name, counts):
    loss, expected = cases(counts)[name]
    logits, labels = random_logits(0, classes=len(counts)), random_labels(0, len(counts))
    np.testing.assert_allclose(loss(logits, labels), expected(logits, labels), rtol=2e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["cross_entropy", *cases(COUNTS)])
def test_finite_for_large_logits(name):
    loss = losses.cross_entropy if name == "cross_entropy" else cases(COUNTS)[name][0]
    logits = np.float32(1e3) * np.array([[1, -1, -1, 0, -1], [-1, 1, 1, 0, 0], [0, 0, 0, 0, 0]], np.float32)
    logits, labels = np.repeat(logits, K, axis=0), np.tile(np.arange(K), 3)  # each label with each row
    value, gradient = jax.value_and_grad(lambda z: loss(z, labels).sum())(logits)
    assert np.isfinite(value)
    assert np.isfinite(gradient).all()


@pytest.mark.parametrize(
    ("loss", "label", "expected"),
    [
        (losses.focal, 1, 2000.0),  # two binary problems, each solved wrongly by 1000
        (losses.focal_softmax, 1, 1000.0),
        (losses.soft_logit_margin, 0, -2000.0),
        (losses.boosted_cross_entropy, 0, 0.0),
        (losses.boosted_cross_entropy, 1, 4000.0),
        (functools.partial(losses.class_balanced_softmax, class_counts=np.array([7, 7])), 1, 100.0),
    ],
)
def test_values_of_large_logits(loss, label, expected):
    value = loss(np.array([[1000.0, -1000.0]], np.float32), np.array([label]))
    np.testing.assert_allclose(value, [expected], rtol=1e-6)


def test_boosted_cross_entropy_tells_near_certainties_apart():
    # 1 - p of the wrong class is exp(-20), less than float32 resolves next to 1.
    value = losses.boosted_cross_entropy(np.array([[20.0, 0.0]], np.float32), np.array([1]))
    np.testing.assert_allclose(value, [40.0], rtol=1e-6)


@pytest.mark.parametrize("beta", [0.9, 0.9999])
def test_effective_number_weights(beta):
    counts = np.array([5000, 700, 100])
    found = losses.effective_number_weights(counts, beta=beta)
    expected = numpy_effective_number_weights(counts, beta)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    np.testing.assert_allclose(np.sum(found), 3, rtol=1e-6)


def test_effective_number_weights_of_extreme_beta():
    np.testing.assert_array_equal(losses.effective_number_weights(COUNTS, beta=0.0), np.ones(K))
    found = losses.effective_number_weights(COUNTS, beta=1 - 1e-9)
    np.testing.assert_allclose(found * COUNTS, K / np.sum(1 / COUNTS), rtol=1e-5)


@pytest.mark.parametrize(("inverse", "largest"), [(False, K - 1), (True, 0)])
def test_ldam_margins(inverse, largest):
    found = losses.ldam_margins(COUNTS, max_margin=0.4, exponent=0.5, inverse=inverse)
    np.testing.assert_allclose(found, numpy_ldam_margins(COUNTS, 0.4, 0.5, inverse), rtol=1e-6)
    assert float(found[largest]) == pytest.approx(0.4)
    assert np.argmax(found) == largest


def test_temperatures():
    np.testing.assert_allclose(losses.temperatures(np.array([16, 4, 1]), tau=0.5), [1, 2, 4], rtol=1e-6)
    np.testing.assert_array_equal(losses.temperatures(COUNTS, tau=0.0), np.ones(K))


def test_smoothing_by_one_confidence_per_example():
    logits, labels, confidence = (
        random_logits(0),
        random_labels(0),
        np.linspace(0.1, 1.0, B, dtype=np.float32),
    )
    found = losses.smoothed_cross_entropy(logits, labels, confidence=confidence)
    expected = [numpy_smoothed(*example) for example in zip(logits, labels, confidence, strict=True)]
    np.testing.assert_allclose(found, expected, rtol=1e-5)


TAKES_WEIGHTS = {
    "cross_entropy": losses.cross_entropy,
    "uniform_margin": functools.partial(losses.uniform_margin, margin=0.2, scale=4.0),
    "ldam": functools.partial(losses.ldam, class_counts=COUNTS),
}


@pytest.mark.parametrize("name", TAKES_WEIGHTS)
def test_mean_of_weighted_losses_is_the_weighted_mean(name):
    loss, logits, labels = TAKES_WEIGHTS[name], random_logits(0), random_labels(0)
    weights = np.linspace(0.2, 3.0, K)
    weighted = loss(logits, labels, class_weights=weights)
    plain = loss(logits, labels)
    np.testing.assert_allclose(weighted.mean(), np.average(plain, weights=weights[labels]), rtol=1e-6)
    np.testing.assert_allclose(weighted / plain, weights[labels] / weights[labels].mean(), rtol=1e-5)
    np.testing.assert_allclose(loss(logits, labels, class_weights=np.full(K, 2.0)), plain, rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", TAKES_WEIGHTS)
def test_weighted_losses_of_a_batch_over_a_mapped_axis(name):
    loss = functools.partial(TAKES_WEIGHTS[name], class_weights=np.linspace(0.2, 3.0, K))
    logits, labels = jnp.asarray(random_logits(0)), jnp.arange(B) % K
    spread = jax.vmap(functools.partial(loss, axis_name="devices"), axis_name="devices")
    found = spread(logits.reshape(2, B // 2, K), labels.reshape(2, B // 2)).reshape(B)
    np.testing.assert_allclose(found, loss(logits, labels), rtol=1e-5)
    apart = jax.vmap(loss)(logits.reshape(2, B // 2, K), labels.reshape(2, B // 2)).reshape(B)
    assert not np.allclose(apart, found)


@pytest.mark.parametrize("reweight", [False, True])
@pytest.mark.parametrize("margins", [False, True])
def test_deferred_by_a_traced_epoch(margins, reweight):
    logits, labels, traces = random_logits(0), random_labels(0), []

    def base(logits, labels, **weights):
        traces.append(set(weights))
        return losses.cross_entropy(logits, labels, **weights)

    @jax.jit
    def loss(epoch):
        return losses.deferred(
            logits,
            labels,
            base=base,
            class_counts=COUNTS,
            epoch=epoch,
            start=3,
            beta=0.99,
            max_margin=0.4,
            margins=margins,
            reweight=reweight,
        )

    plain = losses.cross_entropy(logits, labels)
    values = numpy_margin_adjusted(
        logits, labels, margins * numpy_ldam_margins(COUNTS, 0.4, 0.25), np.zeros(K), 1.0
    )
    weights = numpy_effective_number_weights(COUNTS, 0.99)[labels] if reweight else np.ones(B)
    for epoch in (1, 2):
        np.testing.assert_allclose(loss(epoch), plain, rtol=1e-6)
    for epoch in (3, 4):
        np.testing.assert_allclose(loss(epoch), values * weights / weights.mean(), rtol=1e-5, atol=1e-6)
    assert traces == [{"class_weights"} if reweight else set()]


def test_losses_leave_their_logits_alone():
    logits, labels = random_logits(0), random_labels(0)
    for loss, _ in cases(COUNTS).values():
        loss(logits, labels)
    np.testing.assert_array_equal(logits, random_logits(0))


LOSSES = {
    **{name: loss for name, (loss, _) in cases(COUNTS).items()},
    "cross_entropy": losses.cross_entropy,
    "robal": functools.partial(robal, scale=4.0),
    "kl": lambda logits, labels: losses.kl_divergence(logits, random_logits(7)[: len(logits)]),
    "kl_other": lambda logits, labels: losses.kl_divergence(random_logits(7)[: len(logits)], logits),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", LOSSES)
def test_gradients_agree_with_finite_differences(name):
    labels = random_labels(3)
    # Central differences with step e = 1e-2 of values up to 20: rounding 20 * 2^-23 / 2e = 1e-4, and
    # truncation e^2 / 6 * f''' with f''' up to about s^3 = 64: 1e-3; 5e-3 leaves room for their sums.
    check_grads(lambda z: LOSSES[name](z, labels), (random_logits(3, 1.0),), 1, ["rev"], 5e-3, 5e-3, 1e-2)


def test_gradient_of_cross_entropy_is_prediction_minus_label():
    logits, labels = random_logits(4), random_labels(4)
    gradient = jax.grad(lambda z: losses.cross_entropy(z, labels).sum())(logits)
    expected = np.stack([softmax(row) for row in logits]) - np.eye(K)[labels]
    np.testing.assert_allclose(gradient, expected, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", LOSSES)
def test_one_value_per_example_whatever_the_batch(name):
    loss, logits, labels = LOSSES[name], jnp.asarray(random_logits(5)), jnp.asarray(random_labels(5))
    eager = loss(logits, labels)
    assert eager.shape == (B,)
    assert eager.dtype == jnp.float32
    np.testing.assert_allclose(jax.jit(loss)(logits, labels), eager, rtol=2e-6, atol=2e-6)
    if not name.startswith("kl"):  # their other argument is fixed to the batch
        alone = jax.vmap(lambda z, y: loss(z[None], y[None])[0])(logits, labels)
        np.testing.assert_allclose(alone, eager, rtol=2e-6, atol=2e-6)


Z, Y = random_logits(8), random_labels(8)
CHECKED = {
    **{name: loss for name, (loss, _) in cases(COUNTS).items()},
    **TAKES_WEIGHTS,
    "robal": robal,
    "margins": functools.partial(losses.subtract_margins, margins=np.ones(K)),
    "margins_and_biases": functools.partial(
        losses.margin_adjusted_cross_entropy, margins=np.ones(K), biases=np.ones(K), scale=2.0
    ),
    "deferred_foreign": functools.partial(
        losses.deferred, base=lambda logits, labels: logits, class_counts=COUNTS, epoch=1, reweight=False
    ),
}
WRONG = {
    "labels [B, 1]": (Z, Y[:, None], r"labels have shape \[6, 1\]"),
    "one-hot labels": (Z, np.eye(K, dtype=int)[Y], r"labels have shape \[6, 5\]"),
    "fewer labels": (Z, Y[:-1], r"labels have shape \[5\]"),
    "float labels": (Z, Y.astype(np.float32), "labels have dtype float32"),
    "label K": (Z, Y + K - Y.max(), "labels are in .*5; with 5 logits they must be in 0..4"),
    "label -1": (Z, Y - 1 - Y.min(), "labels are in -1.."),
    "logits [B]": (Z[:, 0], Y, r"logits have shape \[6\]"),
    "logits [1, B, K]": (Z[None], Y, r"logits have shape \[1, 6, 5\]"),
    "integer logits": (Z.astype(np.int32), Y, "logits have dtype int32"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_logits_and_labels_are_refused(wrong):
    logits, labels, message = WRONG[wrong]
    for loss in CHECKED.values():
        with pytest.raises(ValueError, match=message):
            loss(logits, labels)
    if "label " not in wrong:  # values are not known there
        with pytest.raises(ValueError, match=message):
            jax.jit(losses.focal)(logits, labels)


@pytest.mark.parametrize("keyword", ["class_counts", "class_weights", "margins", "biases"])
@pytest.mark.parametrize(
    "values", [np.ones(K + 1), np.ones((1, K)), 2.0, []], ids=["K + 1", "1, K", "one", "0"]
)
def test_vectors_of_the_wrong_size_are_refused(keyword, values):
    taking = [
        loss
        for name, loss in CHECKED.items()
        if keyword in inspect.signature(loss).parameters and (keyword, name[:8]) != ("margins", "deferred")
    ]
    assert taking
    for loss in taking:
        with pytest.raises(ValueError, match=rf"the shape of {keyword} is .*; it must be \[5\]"):
            loss(Z, Y, **{keyword: values})


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        (np.ones((1, K)), r"the shape of class_counts is \[1, 5\]; it must be \[K\]"),
        (5, r"the shape of class_counts is \[\]"),
        (COUNTS - 2, "class_counts have the entry 0; every class needs at least 1 training image"),
        (COUNTS * np.nan, "class_counts have the entry nan"),
        (COUNTS * np.inf, "class_counts have the entry inf"),
        (dict(enumerate(COUNTS)), r"class_counts is \{.*; it must be \[K\], one number per class"),
        ("auto", r"class_counts is 'auto'; it must be \[K\]"),
        (["5", "4"], r"class_counts is \['5', '4'\]; it must be"),
        ([[3], [2, 1]], r"class_counts is \[\[3\], \[2, 1\]\]; it must be"),
        (COUNTS > 0, "class_counts is .*True.*; it must be"),
        (None, r"class_counts is None; it must be \[K\]"),
    ],
)
def test_wrong_class_counts_are_refused(counts, message):
    for function in (
        class_terms.log_prior,
        functools.partial(losses.effective_number_weights, beta=0.9),
        functools.partial(losses.temperatures, tau=1.0),
        losses.ldam_margins,
        functools.partial(losses.robal_margins, scale=1.0, margin=0.1, tau_m=0.1),
        functools.partial(losses.robal_biases, tau_b=1.0),
    ):
        with pytest.raises(ValueError, match=message):
            function(counts)


@pytest.mark.parametrize(
    ("logits", "other", "message"),
    [
        (Z, Z[:, :-1], r"other_logits have shape \[6, 4\]; they must be \[6, 5\]"),
        (Z, Z[:1], r"other_logits have shape \[1, 5\]"),
        (Z[0], Z[0], r"logits have shape \[5\]; they must be \[B, K\]"),
        (Z, Z.astype(np.int32), "other_logits have dtype int32; they must be floats"),
    ],
)
def test_wrong_logits_of_the_divergence_are_refused(logits, other, message):
    with pytest.raises(ValueError, match=message):
        losses.kl_divergence(logits, other)


def test_checks_leave_nothing_in_a_compiled_loss():
    program = str(jax.make_jaxpr(losses.focal)(Z, Y))  # has no minimum of its own
    assert not any(name in program for name in ("reduce_min", "reduce_max", "callback"))


def test_kl_divergence_under_vmap():
    logits, other = jnp.asarray(random_logits(5)), jnp.asarray(random_logits(6))
    alone = jax.vmap(lambda p, q: losses.kl_divergence(p[None], q[None])[0])(logits, other)
    np.testing.assert_allclose(alone, losses.kl_divergence(logits, other), rtol=2e-6, atol=2e-6)


def test_table_of_losses():
    assert all(name == loss.__name__ for name, loss in losses.LOSSES.items())
    tested = {loss.func if isinstance(loss, functools.partial) else loss for loss in LOSSES.values()}
    of_the_step = {losses.harl, losses.rebalanced, losses.staged, losses.weighted_by_radius}
    assert set(losses.LOSSES.values()) <= tested | of_the_step  # see test_followup_losses.py


@pytest.mark.parametrize("scale", [0.0, -1.0, np.nan, np.inf, 1e37, "10", None, [1.0, 2.0]])
def test_scales_and_temperatures_out_of_range_are_refused(scale):
    message = r"(scale|temperature) is .*; it must be (in 1e-06\.\.1e\+06|a number)"
    for loss in (
        functools.partial(losses.robal, class_counts=COUNTS, scale=scale, margin=0.1, tau_m=0.3, tau_b=1.0),
        functools.partial(losses.uniform_margin, margin=0.1, scale=scale),
        functools.partial(losses.ldam, class_counts=COUNTS, scale=scale),
        functools.partial(losses.binary_cross_entropy, temperature=scale),
    ):
        with pytest.raises(ValueError, match=message):
            loss(Z, Y)


@pytest.mark.parametrize("beta", [1.0, -0.1, 1.5, np.nan])
def test_betas_out_of_range_are_refused(beta):
    with pytest.raises(ValueError, match=r"beta is .*; it must be in \[0, 1\)"):
        losses.effective_number_weights(COUNTS, beta=beta)


@pytest.mark.parametrize("weight", [-1.0, np.nan, np.inf])
def test_class_weights_out_of_range_are_refused(weight):
    weights = np.ones(K)
    weights[1] = weight
    for loss in (losses.cross_entropy, losses.focal, losses.focal_softmax, losses.binary_cross_entropy):
        with pytest.raises(ValueError, match=r"class_weights are in .*; they must be finite and >= 0"):
            loss(Z, Y, class_weights=weights)


def test_a_batch_whose_classes_weigh_nothing_has_no_loss():
    value, gradient = jax.value_and_grad(
        lambda z: losses.cross_entropy(z, jnp.array([0, 0]), class_weights=jnp.array([0.0, 1.0])).sum()
    )(jnp.array([[1.0, 2.0], [0.0, 0.0]]))
    assert value == 0
    assert not gradient.any()


@pytest.mark.parametrize(
    "loss",
    [
        losses.soft_logit_margin,
        losses.boosted_cross_entropy,
        functools.partial(losses.smoothed_cross_entropy, confidence=0.5),
        attacks.margin,
        attacks.probability_margin,
    ],
)
def test_one_class_is_refused_where_there_must_be_a_wrong_one(loss):
    with pytest.raises(ValueError, match="num_classes is 1; it must be at least 2"):
        loss(jnp.zeros((2, 1)), jnp.array([0, 0]))


@pytest.mark.parametrize("confidence", [90, -0.1, np.nan, [0.5, 1.5], "sure"])
def test_a_confidence_is_a_probability(confidence):
    with pytest.raises(ValueError, match=r"confidence is .*; it must be in \[0, 1\]"):
        losses.smoothed_cross_entropy(jnp.zeros((2, 3)), jnp.array([0, 1]), confidence=confidence)


# ---------------------------------------------------------------- label smoothing

SMOOTHED = {
    name: loss
    for name, loss in LOSSES.items()
    if not {"class_weights", "axis_name"} & set(getattr(loss, "keywords", {}))
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SMOOTHED)
def test_label_smoothing_mixes_a_loss_with_its_mean_over_the_classes(name):
    loss = SMOOTHED[name]
    hard, mean = np.asarray(loss(Z, Y)), np.mean([loss(Z, jnp.full(B, k)) for k in range(K)], axis=0)
    for smoothing in (0.0, 0.1, 0.7):
        found = losses.label_smoothed(Z, Y, base=loss, smoothing=smoothing)
        expected = (1 - smoothing) * hard + smoothing * mean
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def numpy_label_smoothed(logits, labels, smoothing):
    """torch.nn.CrossEntropyLoss(label_smoothing=s): the target keeps 1 - s and every class gets s / K."""
    target = (1 - smoothing) * np.eye(logits.shape[1])[labels] + smoothing / logits.shape[1]
    logarithms = np.log([softmax(row) for row in logits])
    return -(target * logarithms).sum(1)


def as_any_loss(logits, labels):
    """The cross entropy, without being known as it."""
    return losses.cross_entropy(logits, labels)


@pytest.mark.parametrize("base", [losses.cross_entropy, as_any_loss])
def test_label_smoothing_of_the_cross_entropy_is_pytorch_s(base):
    """By its own way, and as any loss."""
    found = losses.label_smoothed(Z, Y, base=base, smoothing=0.2)
    np.testing.assert_allclose(found, numpy_label_smoothed(Z, Y, 0.2), rtol=1e-5)


@pytest.mark.slow
@pytest.mark.usefixtures("float64")
def test_both_ways_to_smooth_a_cross_entropy_agree():
    """Value and gradient, with logits at which a softmax is 0 or 1."""
    logits = np.float64(Z) * np.array([1.0, 10.0, 1e3, 1e-3, 1.0, 1.0])[:, None]

    def mean(logits, base):
        return losses.label_smoothed(logits, Y, base=base, smoothing=0.3).mean()

    ways = [jax.value_and_grad(mean)(logits, base) for base in (losses.cross_entropy, as_any_loss)]
    for found, expected in zip(*map(jax.tree.leaves, ways), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-13)


def test_weights_that_are_divided_by_their_mean_do_not_act_in_the_smoothing_term():
    weights = np.linspace(0.5, 2.0, K)
    weighted = functools.partial(losses.cross_entropy, class_weights=weights)
    found = losses.label_smoothed(Z, Y, base=weighted, smoothing=0.2)
    every = np.mean([numpy_cross_entropy(Z, np.full(B, k)) for k in range(K)], axis=0)
    np.testing.assert_allclose(found, 0.8 * np.asarray(weighted(Z, Y)) + 0.2 * every, rtol=1e-5)


def test_label_smoothing_of_many_classes_keeps_no_more_than_a_few_logits():
    """The gradient of 300 losses on [B, 300] holds some arrays [B, 300], not 300 of them."""
    logits, labels = random_logits(0, classes=300), random_labels(1, classes=300)

    def mean(logits):
        base = functools.partial(losses.ldam, class_counts=np.arange(300, 0, -1))
        return losses.label_smoothed(logits, labels, base=base, smoothing=0.1).mean()

    compiled = jax.jit(jax.grad(mean)).lower(logits).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 30 * logits.nbytes


@pytest.mark.parametrize("smoothing", [1.0, -0.1, np.nan, "0.1"])
def test_a_smoothing_out_of_range_is_refused(smoothing):
    with pytest.raises(ValueError, match=r"smoothing is .*; it must be (in \[0, 1\)|a number)"):
        losses.label_smoothed(Z, Y, base=losses.cross_entropy, smoothing=smoothing)


@pytest.mark.parametrize("gamma", [0.5, -1.0, np.nan])
def test_gamma_of_the_focal_softmax(gamma):
    with pytest.raises(ValueError, match="gamma is"):
        losses.focal_softmax(Z, Y, gamma=gamma)
