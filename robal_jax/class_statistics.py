"""Statistics of the classes that a training gathers in one epoch and uses in the next.

They are arrays in the state of the training: sums over the images of all devices, saved in every
checkpoint. A loss, the loss of the attack or an objective that has a parameter ``class_statistics``
receives them in each step, as they are before it.
"""

from collections.abc import Callable
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np


class ClassStatistics(NamedTuple):
    """Arrays that are gathered of the classes: how they begin, and how a step changes them.

    Attributes:
      init: makes the arrays before the first step, by name.
      seen: ``(labels [B], logits [B, K]) -> sums`` over the adversarial images of a training step; the logits
        are those of its training pass.
      update: ``(arrays, sums, epoch, ends) -> arrays`` after each step: ``sums`` are those of all devices,
        ``epoch`` is counted from 1, and ``ends`` is whether it ends with this step.
      logged: whether ``seen`` gets the logits of the logged pass of the adversarial images, at the new
        weights, in place of those of the training pass.
    """

    init: Callable[[], dict[str, chex.Array]]
    seen: Callable[[chex.Array, chex.Array], dict[str, chex.Array]]
    update: Callable[..., dict[str, chex.Array]]
    logged: bool = False


def predictions(class_counts: np.ndarray, logged: bool = False) -> ClassStatistics:
    """Counts how often each class is predicted for adversarial images, epoch by epoch.

    Args:
      class_counts: training images per class ``[K]``, which stand for the counts in the first epoch.
      logged: counts the predictions of the logged pass, as the code of RobustLT does around REAT.

    Returns:
      Statistics with ``predicted [K]``, the counts of the last whole epoch, and ``predicting [K]``, those of
      the epoch so far.

    Source: REAT (Li et al., arXiv:2307.10205) and its code.

    Example:
      >>> statistics, logits = predictions(np.array([2, 1])), jnp.array([[3.0, 1.0], [2.0, 0.0]])
      >>> arrays, sums = statistics.init(), statistics.seen(jnp.array([0, 1]), logits)
      >>> for ends in (False, True):
      ...     arrays = statistics.update(arrays, sums, 1, jnp.bool_(ends))
      ...     print(arrays["predicted"], arrays["predicting"])
      [2. 1.] [2. 0.]
      [4. 0.] [0. 0.]
    """
    size = len(class_counts)

    def seen(labels: chex.Array, logits: chex.Array) -> dict[str, chex.Array]:
        del labels
        return {"predicting": jax.nn.one_hot(jnp.argmax(logits, axis=-1), size).sum(0)}

    def update(
        arrays: dict[str, chex.Array], sums: dict[str, chex.Array], epoch: chex.Numeric, ends: chex.Array
    ) -> dict[str, chex.Array]:
        del epoch
        so_far = arrays["predicting"] + sums["predicting"]
        return {
            "predicted": jnp.where(ends, so_far, arrays["predicted"]),
            "predicting": jnp.where(ends, 0, so_far),
        }

    first = {"predicted": jnp.asarray(class_counts, float), "predicting": jnp.zeros(size)}
    return ClassStatistics(lambda: first, seen, update, logged)


def none() -> None:
    """No statistics."""


CLASS_STATISTICS: dict[str, Callable[..., ClassStatistics | None]] = {
    "none": none,
    "predictions": predictions,
}
"""Class statistics by name: functions that return :class:`ClassStatistics`, or None."""
