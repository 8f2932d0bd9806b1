"""Learning rates by epoch or by step, and SGD in PyTorch's order."""

import functools
import re
from collections.abc import Callable, Sequence

import chex
import flax.traverse_util
import jax
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


BY = ("step", "epoch")
"""How often the rate of a schedule changes."""


def _moments(epochs: int, steps_per_epoch: int, by: str) -> tuple[np.ndarray, int]:
    """Returns the number of the moment, 0, 1, ..., that decides each step's rate, and how many there are."""
    if by not in BY:
        raise InputError(f"by is {by!r}; use one of {', '.join(BY)}")
    steps = np.arange(epochs * steps_per_epoch)
    return (steps, len(steps)) if by == "step" else (steps // steps_per_epoch, epochs)


def piecewise(
    lr: float,
    epochs: int,
    steps_per_epoch: int,
    *,
    milestones: Sequence[int] = (),
    decay: float = 0.1,
    warmup: float = 0.0,
) -> np.ndarray:
    """Computes a rate that falls at milestones and grows step by step in a warm-up.

    With ``e = (t + 1) / steps_per_epoch``, the part of the training that is over after step ``t``:
    ``lr_t = lr * decay^(milestones <= e) * min(e / warmup, 1)``. Unlike in :func:`learning_rates`, milestones
    are numbers of epochs that are over: at 100, the last step of epoch 100 has the lower rate.

    Args:
      lr: > 0.
      epochs: of the whole run.
      steps_per_epoch: number of steps.
      milestones: numbers of epochs after which the rate is multiplied by ``decay``.
      decay: factor at each milestone.
      warmup: epochs of linear warm-up; 0 for none.

    Returns:
      float64 ``[epochs * steps_per_epoch]``.

    Source: AWP (Wu et al., NeurIPS 2020), whose rate follows the fraction of an epoch; the warm-up of Goyal
    et al. (2017).

    Example:
      >>> piecewise(1.0, epochs=2, steps_per_epoch=2, milestones=(1,), warmup=1)
      array([0.5, 0.1, 0.1, 0.1])
    """
    over = np.arange(1, epochs * steps_per_epoch + 1) / steps_per_epoch
    factor = decay ** (over[:, None] >= np.asarray(milestones, float)[None, :]).sum(1).astype(float)
    return lr * factor * (np.minimum(over / warmup, 1.0) if warmup else 1.0)


def cosine(
    lr: float,
    epochs: int,
    steps_per_epoch: int,
    *,
    warmup: float = 0.0,
    start: float = 0.0,
    final: float = 0.0,
    by: str = "step",
) -> np.ndarray:
    """Computes a rate that grows along a line and then falls along half a cosine.

    Of ``T`` steps (or epochs) ``w`` are the warm-up. In step ``t = 0, 1, ..., T - 1``

    - ``lr_t = lr * (start + (1 - start) t / w)`` below ``w``;
    - ``lr_t = lr * (final + (1 - final) (1 + cos(pi (t - w) / (T - w))) / 2)`` from ``w`` on.

    Args:
      lr: the largest rate, > 0.
      epochs: of the whole run.
      steps_per_epoch: number of steps.
      warmup: epochs of linear warm-up, below ``epochs``; 0 for none.
      start: rate at the beginning of the warm-up as a part of ``lr``. With 0 the first step stands still; if
        the rate changes by epoch, this is the whole first epoch.
      final: rate that would follow the last step, as a part of ``lr``.
      by: how often the rate changes, 'step' or 'epoch'.

    Returns:
      float64 ``[epochs * steps_per_epoch]``.

    Source: Loshchilov & Hutter (SGDR), ICLR 2017, without restarts; Rebuffi et al., NeurIPS 2021.

    Example:
      >>> print(cosine(1.0, epochs=6, steps_per_epoch=1, warmup=2).round(4))
      [0.     0.5    1.     0.8536 0.5    0.1464]
    """
    moment, total = _moments(epochs, steps_per_epoch, by)
    ramp = round(warmup * total / epochs)
    if not 0 <= ramp < total:
        raise InputError(f"warmup is {warmup:g} epochs of {epochs}; give fewer")
    schedule = optax.warmup_cosine_decay_schedule(start * lr, lr, ramp, total, final * lr)
    return np.asarray(schedule(moment), float)


def one_cycle(
    lr: float,
    epochs: int,
    steps_per_epoch: int,
    *,
    pct_start: float = 0.3,
    div_factor: float = 25.0,
    final_div_factor: float = 1e4,
    by: str = "step",
) -> np.ndarray:
    """Computes a rate that grows and falls along half cosines, as PyTorch's ``OneCycleLR``.

    With ``h(u) = (1 - cos(pi u)) / 2``, ``T`` steps (or epochs) and the peak at ``k = pct_start T - 1``, in
    step ``t = 0, 1, ..., T - 1``

    - ``lr_t = lr (1/d + (1 - 1/d) h(t / k))`` up to ``k``, ``d = div_factor``;
    - ``lr_t = lr (1 + (1/(d f) - 1) h((t - k) / (T - 1 - k)))`` from ``k`` on, ``f = final_div_factor``.

    Optax's schedule of this name rounds the place of its peak down, so that it is the same only if ``k`` is a
    whole number. PyTorch also moves the momentum unless it is told not to; here the momentum stays.

    Args:
      lr: the largest rate, > 0.
      epochs: of the whole run.
      steps_per_epoch: number of steps.
      pct_start: part of the run in which the rate grows, in (0, 1).
      div_factor: ``lr`` over the first rate, > 0.
      final_div_factor: the first rate over the last one, > 0.
      by: how often the rate changes, 'step' or 'epoch'.

    Returns:
      float64 ``[epochs * steps_per_epoch]``.

    Source: Smith & Topin (super-convergence), 2018; by epoch, with ``pct_start`` 0.025, in Wang et al., ICML
    2023.

    Example:
      >>> print(one_cycle(1.0, epochs=5, steps_per_epoch=1, pct_start=0.6).round(4))
      [0.04 0.52 1.   0.5  0.  ]
    """
    if not 0 < pct_start < 1:
        raise InputError(f"pct_start is {pct_start:g}; it must be in (0, 1)")
    for name, value in (("div_factor", div_factor), ("final_div_factor", final_div_factor)):
        if not value > 0:
            raise InputError(f"{name} is {value:g}; it must be > 0")
    moment, total = _moments(epochs, steps_per_epoch, by)
    first, last = lr / div_factor, lr / (div_factor * final_div_factor)
    peak, end = pct_start * total - 1, total - 1
    half = lambda u: (1 - np.cos(np.pi * np.clip(u, 0, 1))) / 2  # noqa: E731
    growing = first + (lr - first) * half(moment / peak if peak > 0 else np.ones(len(moment)))
    falling = lr + (last - lr) * half((moment - peak) / max(end - peak, 1e-9))
    return np.where(moment <= peak, growing, falling)


SCHEDULES: dict[str, Callable[..., np.ndarray]] = {
    "paper": learning_rates,
    "released": functools.partial(learning_rates, compounding=True),
    "piecewise": piecewise,
    "cosine": cosine,
    "one_cycle": one_cycle,
}
"""Schedules by name: functions of ``epochs`` that return one finite learning rate >= 0 per epoch; or, if they
take ``steps_per_epoch`` too, one per step."""


def per_step(rates: np.ndarray, steps_per_epoch: int) -> optax.Schedule:
    """Turns learning rates by epoch into an Optax schedule of the step; the last rate stays.

    Args:
      rates: ``[epochs]``; or one per step, with ``steps_per_epoch`` 1.
      steps_per_epoch: steps that have the same rate.
    """
    table = jnp.asarray(rates)

    def schedule(step: chex.Numeric) -> chex.Numeric:
        return table[jnp.minimum(step // steps_per_epoch, len(rates) - 1)]

    return schedule


def _weights(params: chex.ArrayTree) -> chex.ArrayTree:
    """Tells for each parameter whether it has two axes or more."""
    return jax.tree.map(lambda param: param.ndim > 1, params)


def _not_batch_norm(params: chex.ArrayTree) -> chex.ArrayTree:
    """Tells for each parameter whether it is not one of batch norm's pair, scale and bias."""
    if set(params) == {"scale", "bias"}:
        return dict.fromkeys(params, False)
    return {name: _not_batch_norm(part) if isinstance(part, dict) else True for name, part in params.items()}


DECAYED: dict[str, Callable[[chex.ArrayTree], chex.ArrayTree] | None] = {
    "all": None,
    "weights": _weights,
    "not_batch_norm": _not_batch_norm,
}
"""Which parameters the weight decay reaches, by name; None: all."""


def sgd(
    schedule: optax.Schedule,
    *,
    momentum: float = 0.9,
    weight_decay: float = 2e-4,
    clip_norm: float = 0.0,
    trainable: str = "",
    nesterov: bool = False,
    decayed: str = "all",
) -> optax.GradientTransformation:
    """SGD with momentum and weight decay, in PyTorch's order.

    ``g <- g + weight_decay * p``;  ``v <- momentum * v + g``;  ``p <- p - lr * v``, or, with ``nesterov``,
    ``p <- p - lr * (g + momentum * v)``

    The parameters that the update is given enter the weight decay only, so they may be others than those that
    the result is added to.

    Args:
      schedule: learning rate of each step.
      momentum: of ``v``, in [0, 1).
      weight_decay: at least 0.
      clip_norm: largest global norm of the loss's gradient, before weight decay; 0 does not clip.
      trainable: regular expression that matches the beginning of a parameter's name (``classifier/weight``);
        parameters that it does not match stay as they are. '' trains all.
      nesterov: whether the update looks ahead; ``momentum`` must be above 0.
      decayed: which parameters the weight decay reaches, a key of ``DECAYED``: 'all', as in the released
        code; 'weights', those with two axes or more: no batch norm, no bias; or 'not_batch_norm', all but
        these, as in the code of Wang et al. (ICML 2023).

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
    if nesterov and not momentum:
        raise InputError("nesterov needs a momentum; set momentum above 0, or nesterov=False")
    if decayed not in DECAYED:
        raise InputError(f"decayed is {decayed!r}; use one of {', '.join(DECAYED)}")
    clip = [optax.clip_by_global_norm(clip_norm)] if clip_norm else []
    update = optax.chain(
        *clip,
        optax.add_decayed_weights(weight_decay, DECAYED[decayed]),
        optax.trace(decay=momentum, nesterov=nesterov),
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
