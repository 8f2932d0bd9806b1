"""Logits that are not finite: no attack prefers them to a misclassified image, and none hides them."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from robal_jax import attacks, losses
from robal_jax.attacks import ThreatModel, clean_start
from robal_jax.attacks.attempts import best_found, record

KEY, THREAT = jax.random.key(0), ThreatModel(0.1)


class Seen(NamedTuple):
    """Fields of a search's state."""

    best: jax.Array
    best_gradient: jax.Array
    best_loss: jax.Array
    robust: jax.Array
    adversarial: jax.Array


RIGHT, WRONG, NOT_FINITE, OVERFLOWN = [1.0, 0.0], [0.0, 1.0], [0.0, np.nan], [0.0, np.inf]


@pytest.mark.parametrize(
    ("logits", "kept"),
    [
        ((RIGHT, RIGHT), 0),
        ((WRONG, WRONG), 2),
        ((WRONG, NOT_FINITE), 1),
        ((WRONG, OVERFLOWN), 1),
        ((OVERFLOWN, WRONG), 2),
        ((NOT_FINITE, NOT_FINITE), 1),
        ((RIGHT, OVERFLOWN), 2),
    ],
)
def test_a_search_prefers_a_misclassified_image(logits, kept):
    x, values, labels = jnp.zeros((1, 1)), jnp.zeros(1), jnp.array([0])
    search = Seen(x, x, values, jnp.ones(1, bool), x)
    for number, of_image in enumerate(logits, 1):
        search = Seen(**record(search, x + number, jnp.array([of_image]), values, x, labels))
    assert search.adversarial == kept
    assert search.robust == (logits == (RIGHT, RIGHT))


def test_restarts_prefer_a_misclassified_image():
    logits = jnp.array([RIGHT, OVERFLOWN, NOT_FINITE, WRONG])
    images = jnp.zeros((1, 1))
    for last, kept in ((4, 3), (3, 1), (1, 0)):
        found = best_found(
            lambda number: images + number,
            jnp.arange(last),
            lambda x: logits[x[:, 0].astype(int)],
            losses.cross_entropy,
            images,
            jnp.array([0]),
        )
        assert found == kept


DARK = jnp.array([1])  # argmax takes NaN for class 0


def holed(first, last, lead_of):
    """A model that is right where the lead is negative, and whose logits are NaN between two brightnesses."""

    def model(x):
        x = x.reshape(-1)
        lead = jnp.where((first < x) & (x < last), jnp.nan, lead_of(x))
        return jnp.stack([lead, -lead], -1)

    return model


@pytest.mark.slow
def test_pma_prefers_a_misclassified_image():
    # The first step leads down to a misclassified image, the next one up into the hole.
    model = holed(0.57, 1, lambda x: jnp.where(x < 0.41, 1 + x, 1 - x))
    images = jnp.full((1, 1, 1, 1), 0.5)
    start = attacks.pma(model, KEY, images, DARK, threat=ThreatModel(0.1), steps=1)
    found = attacks.pma(model, KEY, images, DARK, threat=ThreatModel(0.1), steps=10)
    np.testing.assert_allclose(start, 0.4, rtol=1e-6)
    np.testing.assert_array_equal(found, start)


@pytest.mark.slow
def test_fab_prefers_a_misclassified_image():
    images = jnp.full((1, 1, 1, 1), 0.45)
    attack = partial(attacks.fab, key=None, images=images, labels=DARK, threat=THREAT, n_iter=10)
    # The first step leads beyond the hole, all others into it.
    np.testing.assert_allclose(attack(holed(0.5, 0.5015, lambda x: x - 0.5)), 0.5025, rtol=1e-6)
    assert 0.5 < attack(holed(0.5, 1, lambda x: x - 0.5)) < 1


@pytest.mark.slow
def test_shortest_adversarial_ends_at_a_misclassified_image():
    images = jnp.full((1, 1, 1, 1), 0.44)
    model = holed(0.5, 0.52, lambda x: x - 0.5)
    attack = partial(attacks.pgd, threat=THREAT, steps=1, step_size=0.1, start=clean_start)
    _, length = attacks.shortest_adversarial(
        model, KEY, images, DARK, attack=attack, threat=THREAT, max_epsilon=0.1
    )
    np.testing.assert_allclose(length, 0.08, atol=1e-3)


@pytest.mark.parametrize(("hole", "hidden"), [((0.0, 1.0), False), ((0.52, 1.0), True)])
def test_square_does_not_hide_that_all_it_met_is_not_finite(hole, hidden):
    """One that it can compare, it keeps; a misclassified one it prefers."""
    images = jnp.full((1, 1, 1, 1), 0.45)
    model = holed(*hole, lambda x: x - 0.7)
    found = attacks.square(model, KEY, images, DARK, threat=THREAT, queries=20)
    assert found != images
    assert jnp.isfinite(model(found)).all() == hidden
    wrong = holed(0.46, 0.52, lambda x: x - 0.5)
    found = attacks.square(wrong, KEY, images, DARK, threat=THREAT, queries=20)
    assert wrong(found).argmax(-1) == 0
    assert jnp.isfinite(wrong(found)).all()
