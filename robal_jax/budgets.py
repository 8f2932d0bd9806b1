"""Budgets."""

from collections.abc import Callable
from typing import NamedTuple

import chex
import jax.numpy as jnp
import numpy as np


class Budget(NamedTuple):
    """Radii by class in training, and what is learned of the classes to choose them.

    Attributes:
      init: makes the arrays that the state keeps of the classes; {} for none.
      radii: ``(classes, epoch) -> [K]``, radius of each class in an epoch, counted from 1.
      seen: ``(labels [B], logits [B, K]) -> sums`` over the adversarial images of a training step; None if
        nothing is learned.
      update: ``(classes, sums, epoch, ends) -> classes`` after each step; ``ends`` is whether the epoch does.
    """

    init: Callable[[], dict[str, chex.Array]]
    radii: Callable[[dict[str, chex.Array], chex.Numeric], chex.Array]
    seen: Callable[[chex.Array, chex.Array], dict[str, chex.Array]] | None = None
    update: Callable[..., dict[str, chex.Array]] = lambda classes, sums, epoch, ends: classes


def fixed(of_class: np.ndarray) -> Budget:
    """Turns radii ``[K]`` into a budget that learns nothing."""
    return Budget(lambda: {}, lambda classes, epoch: jnp.asarray(of_class, float))


def ramped(budget: Budget, *, epochs: int, beta: float) -> Budget:
    """Multiplies the radii of a budget by :func:`ramp`."""
    return budget._replace(
        radii=lambda classes, epoch: budget.radii(classes, epoch) * ramp(epoch, epochs, beta)
    )


def ramp(epoch: chex.Numeric, epochs: int, beta: float) -> chex.Array:
    """Rises from 0 in the first epoch to 1: ``min((epoch - 1) / (beta epochs), 1)``."""
    return jnp.minimum((epoch - 1) / (beta * epochs), 1.0)


def constant(class_counts: np.ndarray, epsilon: float) -> np.ndarray:
    """Gives every class the common radius."""
    return np.full(len(class_counts), epsilon)


BUDGETS: dict[str, Callable[..., np.ndarray]] = {"constant": constant}

LEARNED: dict[str, Callable[..., Budget]] = {}
"""Budgets that learn from the training, by name."""
