"""The state of a training run, and where it starts: at random weights or at those of a checkpoint."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import chex
import flax.traverse_util
import jax
import jax.numpy as jnp
import optax
from flax.traverse_util import flatten_dict, unflatten_dict

from robal_jax import averages, builder
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
      classes: what is known of the classes, see ``budgets.Budget`` and ``class_statistics``; {} for nothing.
      delta: perturbations that free steps carry over, by position in the batch ``[B, H, W, C]``; {} for none.
      teacher: ``params`` and ``stats`` of the network that teaches; {} for none.
    """

    step: chex.Array
    params: chex.ArrayTree
    stats: chex.ArrayTree
    opt_state: optax.OptState
    average: dict[str, chex.ArrayTree] = flax.struct.field(default_factory=dict)
    classes: dict[str, chex.Array] = flax.struct.field(default_factory=dict)
    delta: Any = flax.struct.field(default_factory=dict)
    teacher: dict[str, chex.ArrayTree] = flax.struct.field(default_factory=dict)


def initial_state(job: builder.Training) -> TrainState:
    """Makes the state before step 0, a function of the seed; a teacher has the same weights as the student.

    See :func:`taught_state` for a teacher's own weights.
    """
    images = jnp.zeros(
        (1, *job.data.test_images.shape[1:])
    )  # training images have this size after augmentation
    key = jax.random.fold_in(key_of(job.seed), INITIAL_WEIGHTS)
    params, stats = job.model.init(key, images)
    return _before_step_0(job, params, stats)


def first_state(job: builder.Training) -> TrainState:
    """Makes :func:`initial_state` on the host."""
    return jax.device_get(jax.jit(partial(initial_state, job))())


def _before_step_0(job: builder.Training, params: chex.ArrayTree, stats: chex.ArrayTree) -> TrainState:
    """Makes the state before step 0 from given weights."""
    size = (job.settings.batch_size, *job.data.test_images.shape[1:])
    return TrainState(
        jnp.int32(0),
        params,
        stats,
        job.optimizer.init(params),
        average=job.average.init(Weights(params, stats)),
        classes=builder.gathered_arrays(job.budget, job.class_statistics),
        delta=jnp.zeros(size) if job.free_steps else {},
        teacher={"params": params, "stats": stats} if job.settings.teacher else {},
    )


def fine_tuned_state(
    job: builder.Training, start: checkpoints.Found[dict[str, Any]], say: Callable[[str], None]
) -> TrainState:
    """Makes :func:`initial_state` with the weights and statistics of a checkpoint.

    Arrays that the checkpoint lacks (a scale that the new head learns) keep their initial values.

    Raises:
      InputError: the checkpoint has arrays that the model lacks.
    """
    state = first_state(job)
    ours, theirs = _flat(state.params, state.stats), _of_checkpoint(start)
    _check_fits("config.train.start_from", start, ours, theirs)
    kept = sorted(set(ours) - set(theirs))
    say(f"starting from {start.path} sha256 {start.sha256}" + (f"; new: {', '.join(kept)}" if kept else ""))
    merged = unflatten_dict({**ours, **theirs}, sep="/")
    return jax.device_get(_before_step_0(job, merged["params"], merged.get("stats", {})))


def taught_state(
    state: TrainState, teacher: checkpoints.Found[dict[str, Any]], say: Callable[[str], None]
) -> TrainState:
    """Returns a state before step 0 with the teacher's weights and statistics, those of a checkpoint.

    Raises:
      InputError: the checkpoint is not of the student's network.
    """
    ours, theirs = _flat(state.params, state.stats), _of_checkpoint(teacher)
    _check_fits("config.train.teacher", teacher, ours, theirs)
    missing = sorted(set(ours) - set(theirs))
    if missing:
        raise InputError(
            f"config.train.teacher: checkpoint {teacher.path} has no {missing[0]}, which the student's "
            "network has; name a run with the same backbone and head"
        )
    say(f"taught by {teacher.path} sha256 {teacher.sha256}")
    weights = unflatten_dict(theirs, sep="/")
    return replace(state, teacher={"params": weights["params"], "stats": weights.get("stats", {})})


def _flat(params: chex.ArrayTree, stats: chex.ArrayTree) -> dict[str, Any]:
    """Returns weights and statistics by their full names."""
    return flatten_dict({"params": params, "stats": stats}, sep="/")


def _of_checkpoint(found: checkpoints.Found[dict[str, Any]]) -> dict[str, Any]:
    """Returns the weights of a checkpoint: the current ones, or the average if it has no others."""
    which = "current" if found.tree.get("params") else "average"
    return _flat(**averages.chosen(found.tree, which))


def _check_fits(
    field: str,
    found: checkpoints.Found[dict[str, Any]],
    ours: Mapping[str, Any],
    theirs: Mapping[str, Any],
) -> None:
    """Raises an ``InputError`` if a checkpoint has arrays that the network lacks."""
    for name, array in theirs.items():
        if name not in ours or ours[name].shape != array.shape:
            raise InputError(
                f"{field}: checkpoint {found.path} has {name} {array.shape}, which does not "
                "fit the model; name a run with the same backbone and the same parameters in its head"
            )
