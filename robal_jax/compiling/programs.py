"""The programs of a run, lowered for devices that need not be there: nothing is put on a device."""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from robal_jax import builder, evaluation, training
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
    data = training.Examples(
        shape(job.images.shape, jnp.uint8), shape(job.labels.shape, jnp.int32)
    )
    if not isinstance(job.images, np.ndarray):
        rows, data = training.Examples(shape((*rows.shape, *job.images.shape[1:]), jnp.uint8), rows), None
    return parallel.lower_chunk(
        training.chunk_of(job),
        devices,
        jax.eval_shape(partial(training.initial_state, job)),
        data,
        rows,
        shape((), jnp.int32),
        jax.eval_shape(partial(key_of, job.seed)),
        shape(by_part, jnp.int32),
    )


def evaluation_steps(
    job: builder.Evaluation, devices: Sequence[jax.Device]
) -> Iterator[tuple[str, jax.stages.Lowered]]:
    """Lowers the step with the conditions of RoBal's tables, and a round of each attack of the ensemble."""
    count, shape = job.batch_size * len(devices), jax.ShapeDtypeStruct
    images = shape((count, *job.test.images.shape[1:]), job.test.images.dtype)
    parts = shape((count,), jnp.int32), images, shape((count,), jnp.int32)
    weights = job.variables["params"], job.variables["stats"]
    key = jax.eval_shape(partial(key_of, job.seed))

    def lower(work: Any, **shared: Any) -> jax.stages.Lowered:
        function = on_batch(work, job.predict, job.test.pixel_max)
        return parallel.lower_spread(function, devices, parts, ((*weights, key), shared))

    yield "conditions", lower(partial(eval_step, threat=job.threat, step_size=job.step_size))
    for stage in job.ensemble:
        work = partial(attack_step, stage=stage, threat=job.threat, random=job.version == "rand")
        yield stage.name, lower(work, number=shape((), jnp.int32))
