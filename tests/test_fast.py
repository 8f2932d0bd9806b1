"""The parts of the ensemble 'fast': probability margin, PMA, MALT's targets; the whole on a small model."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import robal_jax
from robal_jax import attacks
from robal_jax.attacks import ThreatModel

CLASSES, SIZE, COUNT = 5, 8, 7
RNG = np.random.RandomState(0)
WEIGHT = jnp.asarray(RNG.randn(SIZE, CLASSES), jnp.float32)
IMAGES = RNG.uniform(size=(COUNT, 2, 2, 2)).astype(np.float32)
EPSILONS = {"linf": 0.08, "l2": 0.3}


def logits_fn(x):
    return 100 * jnp.tanh((x.reshape(len(x), SIZE, 1) * WEIGHT[None]).sum(1))


LABELS = np.asarray(logits_fn(IMAGES)).argmax(-1)


def test_the_probability_margin_is_that_of_standardised_logits():
    logits, labels = RNG.randn(40, CLASSES), RNG.randint(0, CLASSES, 40)
    scores = np.exp(logits / logits.std(1, keepdims=True))
    scores /= scores.sum(1, keepdims=True)
    expected = [np.delete(p, y).max() - p[y] for p, y in zip(scores, labels, strict=True)]
    logits = logits.astype(np.float32)
    # A power of two rounds nothing; the other scale and the shift round each logit, by 2^-24 of at most 400.
    for scaled in logits, 1024 * logits, 100 * logits + 3:
        found = attacks.probability_margin(scaled, labels)
        np.testing.assert_allclose(found, expected, atol=2e-6)
    np.testing.assert_array_equal(
        attacks.probability_margin(1024 * logits, labels), attacks.probability_margin(logits, labels)
    )
    np.testing.assert_array_equal(np.array(expected) > 0, logits.argmax(-1) != labels)


@pytest.mark.slow
def test_level_logits_have_no_gradient():
    margin = lambda z: attacks.probability_margin(z, jnp.zeros(2, int)).sum()  # noqa: E731
    assert margin(jnp.zeros((2, CLASSES))) == 0
    assert jnp.isfinite(jax.grad(margin)(jnp.zeros((2, CLASSES)))).all()


@pytest.mark.parametrize(("norm", "order"), [("linf", [3, 2, 1]), ("l2", [3, 1, 2])])
def test_targets_are_ordered_by_distance_and_not_by_logit(norm, order):
    """Leads 1, 2, 3 over norms 1, 2.4, 4 (L1, for L-infinity) and 1, 1.39, 4 (L2): 1, 0.83 or 1.44, 0.75."""
    slopes = jnp.array([[0.0, 0.0, 0.0], [1.0, 0.0, 0.0], [0.8, 0.8, 0.8], [0.0, 0.0, 4.0]])
    logits_fn = lambda x: x.reshape(len(x), 3) @ slopes.T - jnp.arange(4.0)[None]  # noqa: E731
    images, labels = jnp.zeros((2, 1, 3, 1)), jnp.zeros(2, int)
    threat = ThreatModel(0.1, norm)
    ranked = attacks.nearest_classes(logits_fn, images, labels, threat=threat, candidates=3)
    np.testing.assert_array_equal(ranked, [order] * 2)
    np.testing.assert_array_equal(attacks.ranked_class(logits_fn(images), 2), 1)


@pytest.mark.slow
def test_malt_reaches_the_nearest_class():
    """Class 2 is out of reach of the radius; class 1 has the higher logit, and 3 changes faster."""
    slopes = jnp.array([0.0, 1.0, 0.5, 8.0])
    logits_fn = lambda x: jnp.outer(x.reshape(-1), slopes) + jnp.array([[2.0, 1.0, 0.5, 0.0]])  # noqa: E731
    attack = partial(attacks.malt_apgd, threat=ThreatModel(0.5), candidates=3, steps=5)
    found = attack(logits_fn, jax.random.key(0), jnp.zeros((1, 1, 1, 1)), jnp.array([0]), rank=1)
    assert logits_fn(found).argmax() == 3
    with pytest.raises(ValueError, match="rank is 4; with 3 classes"):
        attack(logits_fn, jax.random.key(0), jnp.zeros((1, 1, 1, 1)), jnp.array([0]), rank=4)


@pytest.mark.slow
@pytest.mark.parametrize("norm", EPSILONS)
def test_fast_stays_in_the_threat_model_and_breaks_what_large_logits_hide(norm):
    threat = ThreatModel(EPSILONS[norm], norm)
    run = partial(robal_jax.autoattack, logits_fn, jax.random.key(0), IMAGES, LABELS, threat=threat)
    found = run(version="fast", steps=6, queries=6)
    assert list(found.robust) == ["clean", "pma", "apgd_malt", "square"]
    broken = ~found.robust["square"]
    assert broken.any()
    delta = (np.float64(found.images) - IMAGES).reshape(COUNT, -1)
    distance = np.abs(delta).max(1) if norm == "linf" else np.linalg.norm(delta, axis=1)
    # Each of 8 pixels is rounded by 2^-25 at most, and the radius by as much.
    assert distance.max() <= EPSILONS[norm] + 4 * 2.0**-24
    assert found.images.min() >= 0
    assert found.images.max() <= 1
    np.testing.assert_array_equal(np.asarray(logits_fn(found.images)).argmax(-1) != LABELS, broken)
