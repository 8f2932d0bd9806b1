"""The state of a training run, and where it starts: at random weights or at those of a checkpoint."""

from collections.abc import Callable
from functools import partial
from typing import Any

import chex
import flax.traverse_util
import jax
import jax.numpy as jnp
import optax
from flax.traverse_util import flatten_dict, unflatten_dict

from robal_jax import builder
from robal_jax.averages import Weights
from robal_jax.errors import InputError
from robal_jax.keys import INITIAL_WEIGHTS, key_of
from robal_jax.storage import checkpoints


@flax.struct.dataclass
class TrainState:
    """All that a run needs to resume: arrays and a step number.

    Randomness and the order of the data are functions of (seed, step), so they are not part of it.

    Attributes:
      step: number of updates made, int32 scalar.
      params: trainable parameters.
      stats: running batch-norm statistics, and the statistics of a head.
      opt_state: state of the optimiser.
      average: an average of the weights: ``params``, and ``stats`` if it has its own; {} for none.
      classes: what the budgets know of the classes, see ``budgets.Budget``; {} for nothing.
      delta: perturbations that free steps carry over, by position in the batch ``[B, H, W, C]``; {} for none.
    """

    step: chex.Array
    params: chex.ArrayTree
    stats: chex.ArrayTree
    opt_state: optax.OptState
    average: dict[str, chex.ArrayTree] = flax.struct.field(default_factory=dict)
    classes: dict[str, chex.Array] = flax.struct.field(default_factory=dict)
    delta: Any = flax.struct.field(default_factory=dict)


def initial_state(job: builder.Training) -> TrainState:
    """Makes the state before step 0, a function of the seed."""
    images = jnp.zeros(
        (1, *job.data.test_images.shape[1:])
    )  # training images have this size after augmentation
    key = jax.random.fold_in(key_of(job.seed), INITIAL_WEIGHTS)
    params, stats = job.model.init(key, images)
    return _before_step_0(job, params, stats)


def _before_step_0(job: builder.Training, params: chex.ArrayTree, stats: chex.ArrayTree) -> TrainState:
    """Makes the state before step 0 from given weights."""
    return TrainState(
        jnp.int32(0),
        params,
        stats,
        job.optimizer.init(params),
        job.average.init(Weights(params, stats)),
        job.budget.init() if job.budget else {},
        jnp.zeros((job.settings.batch_size, *job.data.test_images.shape[1:])) if job.free_steps else {},
    )


def fine_tuned_state(
    job: builder.Training, start: checkpoints.Found[dict[str, Any]], say: Callable[[str], None]
) -> TrainState:
    """Makes :func:`initial_state` with the weights and statistics of a checkpoint.

    Arrays that the checkpoint lacks (a scale that the new head learns) keep their initial values.

    Raises:
      InputError: the checkpoint has arrays that the model lacks.
    """
    state = jax.device_get(jax.jit(partial(initial_state, job))())
    ours = flatten_dict({"params": state.params, "stats": state.stats}, sep="/")
    arrays = {"params": start.tree["params"], "stats": start.tree.get("stats", {})}
    theirs = flatten_dict(arrays, sep="/")
    for name, array in theirs.items():
        if name not in ours or ours[name].shape != array.shape:
            raise InputError(
                f"config.train.start_from: checkpoint {start.path} has {name} {array.shape}, which does not "
                "fit the model; name a run with the same backbone and the same parameters in its head"
            )
    kept = sorted(set(ours) - set(theirs))
    say(f"starting from {start.path} sha256 {start.sha256}" + (f"; new: {', '.join(kept)}" if kept else ""))
    merged = unflatten_dict({**ours, **theirs}, sep="/")
    return jax.device_get(_before_step_0(job, merged["params"], merged.get("stats", {})))
