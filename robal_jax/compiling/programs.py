"""The programs of a run, lowered for devices that need not be there: nothing is put on a device."""

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from robal_jax import builder, training
from robal_jax.devices import parallel
from robal_jax.evaluation.steps import attack_step, eval_step
from robal_jax.evaluation.victim import on_batch
from robal_jax.keys import key_of


def training_chunk(job: builder.Training, devices: Sequence[jax.Device]) -> jax.stages.Lowered:
    """Lowers the steps of a dispatch, with the whole training set on each device if it is in memory."""
    settings, shape = job.settings, jax.ShapeDtypeStruct
    steps = settings.steps_per_dispatch
    by_part = settings.accumulation_steps, settings.batch_size // settings.accumulation_steps
    rows: Any = shape((steps, *by_part), jnp.int32)
    data: training.Examples | None = None
    if isinstance(job.images, np.ndarray):
        data = training.Examples(shape(job.images.shape, jnp.uint8), shape(job.labels.shape, jnp.int32))
    else:
        rows = training.Examples(shape((*rows.shape, *job.images.shape[1:]), jnp.uint8), rows)
    state = jax.eval_shape(partial(training.initial_state, job))
    if settings.teacher:
        state = dataclasses.replace(state, teacher={"params": state.params, "stats": state.stats})
    return parallel.lower_chunk(
        training.chunk_of(job),
        settings.layout,
        devices,
        state,
        data,
        rows,
        shape((), jnp.int32),
        jax.eval_shape(partial(key_of, job.seed)),
        shape(by_part, jnp.int32),
    )


def evaluation_names(job: builder.Evaluation) -> list[str]:
    """Returns the names of an evaluation's programs: the conditions of RoBal's tables, then the attacks."""
    return ["conditions", *(stage.name for stage in job.ensemble)]


def evaluation_step(job: builder.Evaluation, name: str, devices: Sequence[jax.Device]) -> jax.stages.Lowered:
    """Lowers the step of the conditions, or a round of one attack, for a batch on all devices."""
    count, shape = job.batch_size * len(devices), jax.ShapeDtypeStruct
    numbers = shape((count,), jnp.int32)
    parts = numbers, shape((count, *job.test.images.shape[1:]), job.test.images.dtype), numbers
    weights = job.variables["params"], job.variables["stats"]
    shared: dict[str, Any] = {}
    work: Any = partial(eval_step, threat=job.threat, step_size=job.step_size)
    for stage in job.ensemble:
        if stage.name == name:
            work = partial(attack_step, stage=stage, threat=job.threat, random=job.version == "rand")
            shared = {"number": numbers.update(shape=())}
    function = on_batch(work, job.predict, job.test.pixel_max)
    key = jax.eval_shape(partial(key_of, job.seed))
    return parallel.lower_spread(function, job.layout, devices, parts, ((*weights, key), shared))
