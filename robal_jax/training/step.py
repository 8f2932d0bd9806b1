"""One update as a pure function, and several updates in one compiled loop."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax
from jax import lax

from robal_jax import builder, models, objectives
from robal_jax.data import to_float
from robal_jax.devices import parallel
from robal_jax.keys import example_keys
from robal_jax.training.state import TrainState


def train_step(
    state: TrainState,
    batch: objectives.Batch,
    *,
    model: models.Model,
    objective: objectives.Objective,
    optimizer: optax.GradientTransformation,
    axis_name: str | None = None,
    accumulation_steps: int = 1,
) -> tuple[TrainState, dict[str, chex.Array]]:
    """Makes one update.

    ``g = mean over parts and devices of grad (mean loss of the part's images on the device)``; metrics and
    batch-norm moments are averaged in the same way.

    Args:
      state: before the update.
      batch: this device's part of the batch.
      model: the network.
      objective: the function to minimise.
      optimizer: turns gradients into updates.
      axis_name: mapped axis over which the batch is spread, if any.
      accumulation_steps: number of parts ``A`` in which the device takes its images, one after the other, so
        that it needs the memory of one part. Objectives and batch norm then see one part at a time.

    Returns:
      The state after the update, and scalars: ``loss``, ``grad_norm`` (global, before clipping) and the
      metrics of the objective.
    """

    def gradients_of(part: tuple[chex.Array, chex.Array, chex.PRNGKey]) -> tuple[chex.ArrayTree, ...]:
        def loss_fn(params: chex.ArrayTree) -> tuple[chex.Array, Any]:
            return objective(model, params, state.stats, objectives.Batch(*part, epoch=batch.epoch))

        (loss, outcome), gradients = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
        return gradients, outcome.moments, {"loss": loss, **outcome.metrics}

    examples = (batch.images, batch.labels, batch.keys)
    if accumulation_steps == 1:
        found = gradients_of(examples)
    else:
        parts = jax.tree.map(lambda x: x.reshape(accumulation_steps, -1, *x.shape[1:]), examples)
        found = _mean_over(gradients_of, parts)
    if axis_name is not None:
        found = lax.pmean(found, axis_name)
    gradients, moments, metrics = found
    updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
    new_state = TrainState(
        step=state.step + 1,
        params=optax.apply_updates(state.params, updates),
        stats=models.update_statistics(state.stats, moments),
        opt_state=opt_state,
    )
    return new_state, {**metrics, "grad_norm": optax.tree.norm(gradients)}


def _mean_over(function: Callable[[Any], Any], parts: chex.ArrayTree) -> chex.ArrayTree:
    """Returns the mean of ``function`` over the leading axis of ``parts``, computed one after the other."""
    count = jax.tree.leaves(parts)[0].shape[0]
    shapes = jax.eval_shape(function, jax.tree.map(lambda x: x[0], parts))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    total, _ = lax.scan(lambda sums, part: (jax.tree.map(jnp.add, sums, function(part)), None), zeros, parts)
    return jax.tree.map(lambda x: x / count, total)


class Examples(NamedTuple):
    """Training images on the device: the whole set ``[N, ...]``, or those of some steps ``[T, A, b]``."""

    images: chex.Array  # uint8 [..., H, W, C]
    labels: chex.Array  # int32 [...]


def train_chunk(
    state: TrainState,
    data: Examples | None,
    rows: chex.Array | Examples,
    count: chex.Numeric,
    key: chex.PRNGKey,
    positions: chex.Array,
    *,
    step_fn: Callable[..., tuple[TrainState, dict[str, chex.Array]]],
    steps_per_epoch: int,
    pixel_max: int,
    augment: Callable[[chex.PRNGKey, chex.Array], chex.Array],
) -> tuple[TrainState, dict[str, chex.Array]]:
    """Makes several steps in one compiled loop, which ends early after a step that is not finite.

    Args:
      state: before the first step.
      data: the training set; None if ``rows`` holds the images themselves.
      rows: ``[T, A, b]``, numbers of the images in ``data`` that each step sees in each part of its batch; or
        these images themselves.
      count: how many of the ``T`` steps to make; not static, so one compilation serves any number.
      key: of the run.
      positions: ``[A, b]``, positions of these images in the whole batch.
      step_fn: ``(state, batch) -> (state, metrics)``.
      steps_per_epoch: to count the epochs.
      pixel_max: the pixel value that becomes 1.
      augment: ``(keys [n], images [n, H, W, C]) -> images``, integers to integers.

    Returns:
      The state, and the metrics summed over the steps made (their number is the increase of ``state.step``).
    """

    def one(i: chex.Array, state: TrainState) -> tuple[TrainState, dict[str, chex.Array]]:
        keys = example_keys(key, state.step, positions.reshape(-1))
        keys = jax.vmap(partial(jax.random.split, num=2))(keys)
        row = jax.tree.map(lambda x: x[i].reshape(-1, *x.shape[3:]), rows)
        images, labels = row if data is None else (data.images[row], data.labels[row])
        images = augment(keys[:, 0], images)
        epoch = state.step // steps_per_epoch + 1
        return step_fn(state, objectives.Batch(to_float(images, pixel_max), labels, keys[:, 1], epoch))

    def body(carry: tuple[Any, ...]) -> tuple[Any, ...]:
        i, state, sums, _ = carry
        state, metrics = one(i, state)
        finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(metrics["grad_norm"])
        return i + 1, state, jax.tree.map(jnp.add, sums, metrics), finite

    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(one, 0, state)[1])
    first = (jnp.int32(0), state, zeros, jnp.bool_(True))
    _, state, sums, _ = lax.while_loop(lambda carry: (carry[0] < count) & carry[3], body, first)
    return state, sums


def compiled_chunk(
    job: builder.Training, devices: list[jax.Device]
) -> Callable[..., tuple[TrainState, dict[str, chex.Array]]]:
    """Compiles :func:`train_chunk` for all devices."""
    step_fn = partial(
        train_step,
        model=job.model,
        objective=job.objective,
        optimizer=job.optimizer,
        axis_name=parallel.AXIS,
        accumulation_steps=job.settings.accumulation_steps,
    )
    chunk = partial(
        train_chunk,
        step_fn=step_fn,
        steps_per_epoch=job.steps_per_epoch,
        pixel_max=job.data.pixel_max,
        augment=job.augment,
    )
    return parallel.LAYOUTS[job.settings.layout](chunk, devices)
