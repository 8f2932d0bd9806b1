"""Learning rates by epoch, and SGD in PyTorch's order."""

import functools
import re
from collections.abc import Callable, Sequence

import chex
import flax.traverse_util
import jax.numpy as jnp
import numpy as np
import optax

from robal_jax import checks
from robal_jax.errors import InputError


def learning_rates(
    lr: float,
    epochs: int,
    *,
    milestones: Sequence[int] = (),
    decay: float = 0.1,
    warmup: int = 0,
    compounding: bool = False,
    first_epoch: int = 1,
) -> np.ndarray:
    """Computes the learning rate of every epoch.

    Epochs count from 1. Epoch ``e`` has the factor ``f_e = decay^(milestones reached by e)``, times
    ``(e + 1) / warmup`` while that is below 1. Then

    - ``lr_e = lr * f_e``: the schedule of the paper's text;
    - ``lr_e = lr_{e-1} * f_e`` if ``compounding``: the schedule of the released code, which multiplies the
      *current* rate again in every epoch. With milestones 60 and 75 the weights stand still from about epoch
      63 on, and a warm-up never reaches ``lr``.

    Args:
      lr: > 0.
      epochs: number of epochs.
      milestones: epochs at which the rate is multiplied by ``decay``.
      decay: factor at each milestone.
      warmup: epochs of linear warm-up; 0 for none.
      compounding: whether the factors multiply.
      first_epoch: number of the first epoch (the released code starts again at ``lr`` when it resumes).

    Returns:
      float64 ``[epochs]``.

    Source: RoBal (Wu et al., CVPR 2021) and its released code.
    """
    epoch = np.arange(first_epoch, first_epoch + epochs)
    factor = decay ** (epoch[:, None] >= np.asarray(milestones, int)[None, :]).sum(1).astype(float)
    if warmup:
        factor = factor * np.minimum((epoch + 1) / warmup, 1.0)
    return lr * (np.cumprod(factor) if compounding else factor)


SCHEDULES: dict[str, Callable[..., np.ndarray]] = {
    "paper": learning_rates,
    "released": functools.partial(learning_rates, compounding=True),
}
"""Schedules by name: functions of ``epochs`` that return one finite learning rate >= 0 per epoch."""


def per_step(rates: np.ndarray, steps_per_epoch: int) -> optax.Schedule:
    """Turns learning rates by epoch into an Optax schedule of the step; the last rate stays."""
    table = jnp.asarray(rates)

    def schedule(step: chex.Numeric) -> chex.Numeric:
        return table[jnp.minimum(step // steps_per_epoch, len(rates) - 1)]

    return schedule


def sgd(
    schedule: optax.Schedule,
    *,
    momentum: float = 0.9,
    weight_decay: float = 2e-4,
    clip_norm: float = 0.0,
    trainable: str = "",
) -> optax.GradientTransformation:
    """SGD with momentum and with weight decay on every parameter, in PyTorch's order.

    ``g <- g + weight_decay * p``;  ``v <- momentum * v + g``;  ``p <- p - lr * v``

    Args:
      schedule: learning rate of each step.
      momentum: of ``v``, in [0, 1).
      weight_decay: at least 0; on batch norm and biases too, as in the released code.
      clip_norm: largest global norm of the loss's gradient, before weight decay; 0 does not clip.
      trainable: regular expression that matches the beginning of a parameter's name (``classifier/weight``);
        parameters that it does not match stay as they are. '' trains all.

    Returns:
      The optimiser.

    Raises:
      ValueError: a number is out of its range.

    Example:
      >>> sgd(lambda step: 0.1, momentum=1.5)
      Traceback (most recent call last):
      ValueError: momentum is 1.5; it must be in [0, 1)
    """
    checks.below_one(momentum=momentum)
    checks.not_negative(weight_decay=weight_decay, clip_norm=clip_norm)
    clip = [optax.clip_by_global_norm(clip_norm)] if clip_norm else []
    update = optax.chain(
        *clip,
        optax.add_decayed_weights(weight_decay),
        optax.trace(decay=momentum),
        optax.scale_by_learning_rate(schedule),
    )
    if not trainable:
        return update
    parts = {True: update, False: optax.set_to_zero()}
    return optax.partition(parts, functools.partial(_begins_with, trainable))


def _begins_with(pattern: str, params: chex.ArrayTree) -> chex.ArrayTree:
    """Tells for each parameter whether the pattern matches the beginning of its name."""
    names = flax.traverse_util.flatten_dict(params, sep="/")
    try:
        chosen = {name: bool(re.match(pattern, name)) for name in names}
    except re.error as error:
        raise InputError(
            f"config.optimizer.trainable {pattern!r} is not a regular expression ({error}); correct it"
        ) from error
    if not any(chosen.values()):
        raise InputError(
            f"config.optimizer.trainable {pattern!r} matches no parameter; use the beginning of one of "
            f"{', '.join(names)}"
        )
    return flax.traverse_util.unflatten_dict(chosen, sep="/")


OPTIMIZERS: dict[str, Callable[..., optax.GradientTransformation]] = {"sgd": sgd}
"""Optimizers by name: functions that return an ``optax.GradientTransformation`` whose updates are like the
parameters."""
