"""Averages of the weights over a training run, which are kept in the state and evaluated in their place.

An average is a pair of pure functions: where it starts, and what it becomes in a step. It is a tree with the
entry ``params``, and ``stats`` if it has batch-norm statistics of its own; otherwise it is evaluated with
those of the current weights.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp

from robal_jax import checks
from robal_jax.errors import InputError


class Weights(NamedTuple):
    """Weights of a network: trainable parameters and running statistics."""

    params: chex.ArrayTree
    stats: chex.ArrayTree


class Average(NamedTuple):
    """An average of the weights.

    Attributes:
      init: weights before the first step to the average's first value, a dictionary of ``params`` and perhaps
        ``stats``; {} for no average.
      update: ``(average, step, before, after) -> average``: weights before and after a step; ``step`` is the
        number of steps made after it, 1, 2, ...
      estimates: whether the training step estimates ``stats`` anew: it folds the moments of the averaged
        network's own passes on the training images.
    """

    init: Callable[[Weights], dict[str, chex.ArrayTree]]
    update: Callable[[dict[str, chex.ArrayTree], chex.Numeric, Weights, Weights], dict[str, chex.ArrayTree]]
    estimates: bool = False


def moved(average: chex.ArrayTree, new: chex.ArrayTree, share: chex.Numeric) -> chex.ArrayTree:
    """Moves an average towards new values: ``a <- a + share (x - a)``.

    Written like this, and not as ``(1 - share) a + share x``, an average of equal values keeps their bits;
    with a share of 1 it is a copy.

    Example:
      >>> print(moved({"w": jnp.array([1.0, 2.0])}, {"w": jnp.array([2.0, 2.0])}, 0.25))
      {'w': Array([1.25, 2.  ], dtype=float32)}
    """

    def move(a: chex.Array, x: chex.Array) -> chex.Array:
        part = jnp.asarray(share, a.dtype)
        return jnp.where(part == 1, x, a + part * (x - a))

    return jax.tree.map(move, average, new)


def ema_decay(
    step: chex.Numeric, *, decay: float, warmup: chex.Numeric = 0, count_from: int = 1
) -> chex.Array:
    """Computes the decay of an exponential moving average, which rises from 2/11 (or 1/10) to ``decay``.

    ``d_t = 0`` for ``t < w``, else ``min(decay, (1 + t - w) / (10 + t - w))``

    Args:
      step: steps made, 1, 2, ...; may be traced.
      decay: its largest value, in [0, 1).
      warmup: ``w``, the number of steps during which the average is a copy.
      count_from: what ``t`` is at the first step: 1 in the code of Wang et al., 0 in DeepMind's.

    Returns:
      The decay, a scalar.

    Source: Wang et al. (ICML 2023, arXiv 2302.04638) and their code; Rebuffi et al. (NeurIPS 2021).

    Example:
      >>> print(ema_decay(jnp.array([1, 2, 5000]), decay=0.995))
      [0.18181819 0.25       0.995     ]
    """
    t = jnp.asarray(step, float) - 1 + count_from - warmup
    return jnp.where(t < 0, 0.0, jnp.minimum(decay, (1 + t) / (10 + t)))


def none(steps_per_epoch: int) -> Average:
    """No average."""
    del steps_per_epoch
    return Average(lambda weights: {}, lambda average, step, before, after: average)


def ema(steps_per_epoch: int, decay: float = 0.995, warmup: float = 0.0, count_from: int = 1) -> Average:
    """Exponential moving average of the parameters over steps: ``a <- d_t a + (1 - d_t) theta_t``.

    Args:
      steps_per_epoch: to count the warm-up in steps.
      decay: see :func:`ema_decay`.
      warmup: epochs during which the average is a copy; Wang et al. take 0.025 of the run.
      count_from: see :func:`ema_decay`.

    Returns:
      The average; it is evaluated with the batch-norm statistics of the current weights.
    """
    checks.below_one(decay=decay)
    checks.not_negative(warmup=warmup)
    if count_from not in (0, 1):
        raise ValueError(f"count_from is {count_from}; use 1 (Wang et al.) or 0 (DeepMind)")
    first = round(warmup * steps_per_epoch)
    if first >= 2**31:
        raise ValueError(f"warmup is {warmup:g} epochs; give fewer, so that its steps are below 2^31")

    def update(
        average: dict[str, chex.ArrayTree], step: chex.Numeric, before: Weights, after: Weights
    ) -> dict[str, chex.ArrayTree]:
        del before
        share = 1 - ema_decay(step, decay=decay, warmup=first, count_from=count_from)
        return {"params": moved(average["params"], after.params, share)}

    return Average(lambda weights: {"params": weights.params}, update)


def per_epoch(steps_per_epoch: int, decay: float = 0.88) -> Average:
    """Moving average over epochs of parameters *and* statistics: ``a <- decay a + (1 - decay) theta``.

    During the first epoch the average is a copy. The released code of CFA (FAWA) leaves out the epochs whose
    worst class is too weak on validation images; here every epoch counts.

    Args:
      steps_per_epoch: an epoch's end is a multiple of it.
      decay: in [0, 1).

    Returns:
      The average.

    Source: Wei et al. (CVPR 2023) and their code.
    """
    checks.below_one(decay=decay)

    def update(
        average: dict[str, chex.ArrayTree], step: chex.Numeric, before: Weights, after: Weights
    ) -> dict[str, chex.ArrayTree]:
        del before
        ends = step % steps_per_epoch == 0
        share = jnp.where(step <= steps_per_epoch, 1.0, jnp.where(ends, 1 - decay, 0.0))
        return moved(average, after._asdict(), share)

    return Average(Weights._asdict, update)


def swa(steps_per_epoch: int, start: int = 0) -> Average:
    """Stochastic weight averaging: the mean of the parameters at the ends of epochs, all with equal weight.

    ``a <- a + (theta - a) / (k + 1)`` for the epoch's end number ``k = 0, 1, ...`` after ``start``

    The weights at the end of an epoch join the average in the first step of the next one. So those of the
    last epoch do not: that epoch estimates the average's own batch-norm statistics, as every epoch before did
    for the average of its time.

    Args:
      steps_per_epoch: an epoch's end is a multiple of it.
      start: epochs before the first one whose end is averaged; until then the average is a copy.

    Returns:
      The average, whose statistics the training step estimates.

    Source: Izmailov et al. (UAI 2018); with adversarial training Chen et al. (ICLR 2021).
    """
    checks.at_least(0, start=start)

    def update(
        average: dict[str, chex.ArrayTree], step: chex.Numeric, before: Weights, after: Weights
    ) -> dict[str, chex.ArrayTree]:
        epochs, offset = (step - 1) // steps_per_epoch, (step - 1) % steps_per_epoch  # made before the step
        ended = epochs - start  # epochs that count, this one included
        share = jnp.where(offset == 0, 1 / jnp.maximum(ended, 1).astype(float), 0.0)
        averaged = moved(average["params"], before.params, share)
        averaged = moved(averaged, after.params, jnp.where(ended <= 0, 1.0, 0.0))
        return {"params": averaged, "stats": average["stats"]}

    return Average(Weights._asdict, update, estimates=True)


def estimation_share(step: chex.Numeric, steps_per_epoch: int) -> chex.Array:
    """Weight of a step's moments in the statistics of an average: their mean over the steps of the epoch.

    Example:
      >>> print(estimation_share(jnp.array([1, 2, 3, 11]), 10))
      [1.         0.5        0.33333334 1.        ]
    """
    return 1 / (1 + (step - 1) % steps_per_epoch).astype(float)


AVERAGES: dict[str, Callable[..., Average]] = {"none": none, "ema": ema, "per_epoch": per_epoch, "swa": swa}
"""Averages by name: functions that return an :class:`Average`; they may ask for ``steps_per_epoch``."""

WEIGHTS = ("current", "average")
"""What can be evaluated: the weights after the last step, or their average."""


def chosen(checkpoint: Mapping[str, Any], which: str) -> dict[str, Any]:
    """Returns the weights in the state of a run that are evaluated, ``params`` and ``stats``.

    Args:
      checkpoint: the state: ``params``, ``stats`` and ``average``; empty entries may be missing.
      which: one of ``WEIGHTS``.

    Raises:
      InputError: there is no average, or nothing else, or ``which`` is another text.

    Example:
      >>> state = {"params": {"w": 1}, "stats": {"m": 2}, "average": {"params": {"w": 3}}}
      >>> chosen(state, "average")
      {'params': {'w': 3}, 'stats': {'m': 2}}
    """
    if which not in WEIGHTS:
        raise InputError(f"weights is {which!r}; use {' or '.join(WEIGHTS)}")
    current = {name: checkpoint.get(name, {}) for name in Weights._fields}
    if which == "current":
        if checkpoint.get("average") and not current["params"]:
            raise InputError(
                "config.evaluation.weights is 'current', but the checkpoint has only an average; "
                "use 'average'"
            )
        return current
    if not checkpoint.get("average"):
        raise InputError(
            "config.evaluation.weights is 'average', but the checkpoint has none; use 'current', or train "
            "with config.average.name=ema"
        )
    return {**current, **checkpoint["average"]}
