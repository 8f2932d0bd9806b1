"""PMA's loss and phases, MALT's order of classes, and the ensemble that is made of both."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from robal_jax import attacks, autoattack
from robal_jax.attacks import ThreatModel
from robal_jax.attacks.autoattack import stages

SIDE, CLASSES, COUNT = 3, 5, 8
WEIGHT = np.random.RandomState(0).randn(SIDE * SIDE, CLASSES).astype(np.float32)
IMAGES = np.random.RandomState(1).rand(COUNT, SIDE, SIDE, 1).astype(np.float32)
# Columns of different sizes, so that the order of the logits is not that of the distances.
SCALED = WEIGHT * np.array([0.2, 1.0, 3.0, 0.5, 2.0], np.float32)


def linear(weight, images):
    return images.reshape(len(images), -1) @ weight


LABELS = np.argmax(linear(SCALED, IMAGES), -1).astype(np.int32)


def numpy_margin(logits, labels):
    logits = np.float64(logits)
    scores = np.exp(logits / logits.std(-1, keepdims=True))
    scores /= scores.sum(-1, keepdims=True)
    true = scores[np.arange(len(labels)), labels]
    others = np.where(np.eye(CLASSES)[labels] == 1, -1, scores)
    return others.max(-1) - true


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
def test_margin_of_probabilities_knows_no_scale(scale):
    logits = np.random.RandomState(2).randn(6, CLASSES).astype(np.float32)
    labels = np.arange(6, dtype=np.int32) % CLASSES
    found = attacks.probability_margin(scale * jnp.asarray(logits), jnp.asarray(labels))
    # A softmax in float32 of at most 5 terms: a few units of 2^-24, and the division's.
    np.testing.assert_allclose(found, numpy_margin(logits, labels), atol=1e-6)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_nearest_classes_are_those_of_a_linear_model(norm):
    """Exactly: the distance to a hyperplane is the lead over the dual norm of its normal."""
    logits, order = np.float64(linear(SCALED, IMAGES)), 1 if norm == "linf" else 2
    lead = logits[np.arange(COUNT), LABELS][:, None] - logits
    normals = np.float64(SCALED).T[LABELS][:, None] - np.float64(SCALED).T[None]
    with np.errstate(invalid="ignore"):
        distance = lead / np.linalg.norm(normals, ord=order, axis=-1)
    distance[np.arange(COUNT), LABELS] = np.inf
    expected = np.argsort(distance, axis=-1)[:, : CLASSES - 1]
    threat = ThreatModel(0.1, norm)
    find = partial(attacks.nearest_classes, partial(linear, SCALED), threat=threat, candidates=CLASSES - 1)
    np.testing.assert_array_equal(find(IMAGES, LABELS), expected)
    by_logit = np.argsort(np.where(np.eye(CLASSES)[LABELS] == 1, -np.inf, logits), axis=-1)[:, ::-1]
    assert (by_logit[:, : CLASSES - 1] != expected).any()


def test_fast_finds_what_a_linear_model_gives_away():
    """Which images of a linear model can be broken is known exactly."""
    epsilon, logits = 0.05, np.float64(linear(SCALED, IMAGES))
    lead = logits[np.arange(COUNT), LABELS][:, None] - logits
    normals = np.float64(SCALED).T[LABELS][:, None] - np.float64(SCALED).T[None]
    # The box [0, 1] keeps pixels from moving: what the best corner gives, pixel by pixel.
    pixels = np.float64(IMAGES).reshape(COUNT, 1, -1)
    low, high = np.clip(pixels - epsilon, 0, 1), np.clip(pixels + epsilon, 0, 1)
    most = (np.maximum(normals * (pixels - low), normals * (pixels - high))).sum(-1)
    can = ((most > lead) & (np.eye(CLASSES)[LABELS] == 0)).any(-1)
    assert 0 < can.sum() < COUNT
    found = autoattack(
        partial(linear, SCALED),
        jax.random.key(0),
        IMAGES,
        LABELS,
        threat=ThreatModel(epsilon),
        version="fast",
    )
    np.testing.assert_array_equal(found.robust["apgd_malt"], ~can)
    assert np.abs(found.images - IMAGES).max() <= epsilon + 2.0**-23


def test_rounds_of_fast():
    ensemble = stages("fast", CLASSES, threat=ThreatModel(0.1))
    assert [(stage.name, stage.rounds) for stage in ensemble] == [("pma", 2), ("apgd_malt", 3)]


def test_phases_of_pma():
    """With one class that leads and none that gains, raising the others moves nothing; lowering it does."""
    logits_fn = lambda x: jnp.concatenate([4 * x.reshape(-1, 1), jnp.zeros((len(x), 2))], -1)  # noqa: E731
    images, labels = jnp.full((1, 1, 1, 1), 0.5), jnp.zeros(1, int)
    shown = attacks.pma(
        logits_fn, jax.random.key(0), images, labels, threat=ThreatModel(0.2), steps=10, raised=True
    )
    np.testing.assert_allclose(shown.ravel(), 0.3, atol=1e-6)
