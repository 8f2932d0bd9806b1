"""Budgets by class: the rules, the ramp over epochs, and the arithmetic of those that learn."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from robal_jax import budgets
from robal_jax.errors import InputError

COUNTS = np.array([100, 40, 40, 7, 1])


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.9])
def test_by_frequency_keeps_the_mean_over_training_images_and_orders_the_classes(alpha):
    radii = budgets.by_frequency(COUNTS, 0.1, alpha=alpha)
    assert np.sum(COUNTS * radii) / COUNTS.sum() == pytest.approx(0.1, rel=1e-12)
    assert radii[0] == pytest.approx((1 - alpha) * 0.1)
    assert (np.diff(radii) >= 0).all()
    assert radii[1] == radii[2]


def test_ramp_at_its_edges():
    """The first epoch is natural training, epoch beta T + 1 the first at full radius; T need not reach it."""
    traces = []

    @jax.jit
    def rise(epoch):
        traces.append(1)
        return budgets.ramp(epoch, 10, 0.8)

    found = [float(rise(jnp.int32(epoch))) for epoch in range(1, 11)]
    assert found == pytest.approx([0, 1 / 8, 2 / 8, 3 / 8, 4 / 8, 5 / 8, 6 / 8, 7 / 8, 1, 1])
    assert found[0] == 0
    assert found[7] < 1
    assert found[8] == 1
    assert len(traces) == 1


def test_ramp_over_all_epochs_never_reaches_1():
    assert float(budgets.ramp(10, 10, 1.0)) == pytest.approx(0.9)


def test_dafa_moves_weight_from_easy_classes_to_the_hard_ones_like_them():
    similarity = jnp.array([[0.9, 0.05, 0.05], [0.6, 0.3, 0.1], [0.05, 0.05, 0.9]])
    weights = budgets.dafa_weights(similarity)
    expected = np.ones(3)  # pairs of a harder and an easier class, by the equation
    for hard, easy in ((1, 0), (1, 2)):
        moved = similarity[hard, easy] * similarity[easy, easy]
        expected += np.array([moved if k == hard else -moved if k == easy else 0 for k in range(3)])
    # Classes 0 and 2 tie: both give.
    expected[[0, 2]] -= 0.05 * 0.9
    np.testing.assert_allclose(weights, expected, rtol=1e-6)


@pytest.mark.slow
def test_dafa_weights_are_never_negative():
    taken = jnp.concatenate(
        [jnp.array([[0.9] + [0.1 / 9] * 9]), jnp.tile(jnp.array([[0.8] + [0.2 / 9] * 9]), (9, 1))]
    )
    weights = budgets.dafa_weights(taken)
    assert float(1 - 9 * 0.8 * 0.9) < 0
    assert weights[0] == 0
    assert (weights[1:] > 1).all()


@pytest.mark.slow
def test_classes_without_images():
    counts = jnp.array([4, 0])
    np.testing.assert_array_equal(budgets.class_accuracy(jnp.array([3, 0]), counts), [0.75, 0])
    similarity = budgets.dafa_similarity(jnp.array([[3.0, 1.0], [0.0, 0.0]]), counts)
    np.testing.assert_array_equal(budgets.dafa_weights(similarity), [1, 1])


WRONG = [
    (
        budgets.by_frequency,
        {"class_counts": np.full(3, 500)},
        "all classes have 500 training images.*'constant'",
    ),
    (budgets.by_frequency, {"class_counts": np.array([5, 0])}, "class_counts have the entry 0"),
    (budgets.by_frequency, {"alpha": 1.0}, r"alpha is 1; it must be in \[0, 1\)"),
    (budgets.by_frequency, {"alpha": -0.1}, r"alpha is -0.1; it must be in \[0, 1\)"),
    (budgets.given, {"epsilons": (0.1, 0.2)}, r"the shape of epsilons is \[2\]; it must be \[5\]"),
    (budgets.given, {"epsilons": (0.1, 0.1, 0.1, 0.1, 0.0)}, "epsilons has the entry 0; each must be .* > 0"),
    (budgets.given, {"epsilons": (0.1,) * 4 + (np.nan,)}, "epsilons has the entry nan"),
    (budgets.given, {"epsilons": "0.1"}, r"the shape of epsilons|epsilons is '0.1'"),
]


@pytest.mark.parametrize(("rule", "settings", "message"), WRONG)
def test_settings_that_give_no_radii(rule, settings, message):
    with pytest.raises((InputError, ValueError), match=message):
        rule(**{"class_counts": COUNTS, "epsilon": 0.1, **settings})
