"""The parts of the ensemble 'fast': probability margin, PMA, MALT's targets; the whole on a small model."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_nothing_twice, interrupt

import robal_jax
from robal_jax import attacks
from robal_jax.attacks import ThreatModel
from robal_jax.reporting import figures

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
    assert list(found.robust)[:4] == ["clean", "pma", "apgd_malt", "square"]
    broken = ~list(found.robust.values())[-1]
    assert broken.any()
    delta = (np.float64(found.images) - IMAGES).reshape(COUNT, -1)
    distance = np.abs(delta).max(1) if norm == "linf" else np.linalg.norm(delta, axis=1)
    # Each of 8 pixels is rounded by 2^-25 at most, and the radius by as much.
    assert distance.max() <= EPSILONS[norm] + 4 * 2.0**-24
    assert found.images.min() >= 0
    assert found.images.max() <= 1
    np.testing.assert_array_equal(np.asarray(logits_fn(found.images)).argmax(-1) != LABELS, broken)


@pytest.mark.long
@pytest.mark.slow
def test_an_evaluation_stopped_in_the_full_square_ends_as_if_it_had_not_been(tmp_path, monkeypatch):
    """Between two batches of it; the short Square has broken an image that gradients left."""
    for name in "png", "svg":
        monkeypatch.setattr(figures, name, lambda figure: b"a picture")
    rng = np.random.RandomState(1)
    weight = jnp.asarray(rng.randn(16, CLASSES), jnp.float32)
    images = rng.uniform(size=(12, 4, 4, 1)).astype(np.float32)

    def stepped(x):
        """A linear model of rounded pixels, which has no gradient."""
        return ((jnp.round(4 * x).reshape(len(x), -1, 1) / 4 - 0.5) * weight[None]).sum(1)

    evaluate = partial(
        robal_jax.evaluate_model, stepped, images, np.asarray(stepped(images)).argmax(-1),
        threat=ThreatModel(0.06), version="fast", audit=0, batch_size=4, say=lambda line: None,
    )  # fmt: skip
    whole = evaluate(folder=tmp_path / "whole")
    looks = interrupt(monkeypatch, lambda looks: looks[-1].title == "square_full")
    assert evaluate(folder=tmp_path / "run") is None
    assert looks[-1].title == "square_full"
    found = evaluate(folder=tmp_path / "run")
    assert [look.title for look in looks].count("square_full") > 1, "nothing was left to do"
    assert_nothing_twice(looks)
    for name, values in whole.examples.items():
        np.testing.assert_array_equal(found.examples[name], values, name)
    stages = found.meta["stages"]
    assert stages == whole.meta["stages"]
    assert list(stages) == ["pma", "apgd_malt", "square", "square_full"]
    assert stages["apgd_malt"] > stages["square"]
