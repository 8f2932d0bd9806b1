"""Losses against NumPy written from the equations (robal_jax.losses)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from robal_jax import losses

B, K = 6, 5
COUNTS = np.array([100, 40, 16, 6, 2])


def random_logits(seed, size=3.0):
    return (size * np.random.RandomState(seed).randn(B, K)).astype(np.float32)


def random_labels(seed):
    return np.random.RandomState(seed).randint(0, K, B).astype(np.int32)


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
            np.sum(p * (np.log(p) - np.log(q + 1e-12)))
            for p, q in zip(map(softmax, logits), map(softmax, other), strict=True)
        ]
    )


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
    # log p and log(p + 1e-12) are two roundings of numbers up to about 15.
    np.testing.assert_allclose(losses.kl_divergence(logits, logits + 1.0), 0.0, atol=1e-5)


def test_kl_divergence_is_finite_where_a_prediction_underflows():
    sure, other_sure = np.float32([[200.0, 0.0]]), np.float32([[0.0, 200.0]])
    value = losses.kl_divergence(sure, other_sure)
    np.testing.assert_allclose(value, -np.log(1e-12), rtol=1e-5)
    for argument in (0, 1):
        gradient = jax.grad(lambda *z: losses.kl_divergence(*z).sum(), argument)(sure, other_sure)
        assert np.isfinite(gradient).all()


LOSSES = {
    "cross_entropy": losses.cross_entropy,
    "robal": functools.partial(robal, scale=4.0),
    "kl": lambda logits, labels: losses.kl_divergence(logits, random_logits(7)[: len(logits)]),
    "kl_other": lambda logits, labels: losses.kl_divergence(random_logits(7)[: len(logits)], logits),
}


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


def test_kl_divergence_under_vmap():
    logits, other = jnp.asarray(random_logits(5)), jnp.asarray(random_logits(6))
    alone = jax.vmap(lambda p, q: losses.kl_divergence(p[None], q[None])[0])(logits, other)
    np.testing.assert_allclose(alone, losses.kl_divergence(logits, other), rtol=2e-6, atol=2e-6)


def test_table_of_losses():
    assert {"cross_entropy": losses.cross_entropy, "robal": losses.robal} == losses.LOSSES
