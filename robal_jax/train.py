"""Training: the pure step, its compiled loop over a chunk of steps, and the run that saves and resumes.

Everything random in step ``t`` comes from ``fold_in(key(seed), t)`` and, from there, from the position of
the image in the batch; the images of step ``t`` are a function of (seed, t). So a checkpoint is arrays and a
step number, and a run that goes on from one makes the same numbers as one that was never interrupted.
"""

import importlib.metadata
import json
import os
import pathlib
import platform
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import lax
from ml_collections import ConfigDict

import robal_jax
from robal_jax import build, checkpoints, logs, parallel
from robal_jax.data import epoch_order, random_crop_flip, to_float
from robal_jax.errors import DivergedError, InputError
from robal_jax.models import Model, update_statistics
from robal_jax.objectives import Batch, Objective
from robal_jax.state import TrainState


def example_keys(key: chex.PRNGKey, step: chex.Numeric, positions: chex.Array) -> chex.PRNGKey:
    """One key for each image of one step.

    By the image's position in the batch and not by its place in the data set: a sampler may draw an image
    twice into one batch, and the two shall be augmented and attacked differently.

    Args:
      key: of the run.
      step: number of the step.
      positions: ``[B]`` in the whole batch, over all devices.

    Returns:
      Keys ``[B]``.
    """
    return jax.vmap(partial(jax.random.fold_in, jax.random.fold_in(key, step)))(positions)


def train_step(
    state: TrainState,
    batch: Batch,
    *,
    model: Model,
    objective: Objective,
    optimizer: optax.GradientTransformation,
    axis_name: str | None = None,
) -> tuple[TrainState, dict[str, chex.Array]]:
    """One update.

    Args:
      state: before it.
      batch: what it sees; this device's part.
      model: the network.
      objective: what is minimised.
      optimizer: how.
      axis_name: mapped axis over which the batch is spread, if any; gradients and metrics are averaged.

    Returns:
      The state after it, and scalars: ``loss``, ``grad_norm`` (global, before clipping) and the objective's.
    """

    def loss_fn(params: chex.ArrayTree) -> tuple[chex.Array, Any]:
        return objective(model, params, state.stats, batch)

    (loss, outcome), gradients = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
    metrics = {"loss": loss, **outcome.metrics}
    if axis_name is not None:
        gradients, metrics = lax.pmean((gradients, metrics), axis_name)
    updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
    new_state = TrainState(
        step=state.step + 1,
        params=optax.apply_updates(state.params, updates),
        stats=update_statistics(state.stats, outcome.moments),
        opt_state=opt_state,
    )
    return new_state, {**metrics, "grad_norm": optax.tree.norm(gradients)}


class DeviceData(NamedTuple):
    """A training set on the device: images uint8 ``[N, H, W, C]``, labels int32 ``[N]``."""

    images: chex.Array
    labels: chex.Array


def train_chunk(
    state: TrainState,
    data: DeviceData,
    ids: chex.Array,
    count: chex.Numeric,
    key: chex.PRNGKey,
    positions: chex.Array,
    *,
    step_fn: Callable[..., tuple[TrainState, dict[str, chex.Array]]],
    steps_per_epoch: int,
    pixel_max: int,
    crop_flip: bool,
) -> tuple[TrainState, dict[str, chex.Array]]:
    """Several steps in one compiled loop; it ends early after a step that is not finite.

    Args:
      state: before the first step.
      data: the training set.
      ids: ``[T, B]``, which images each step sees.
      count: how many of the ``T`` steps to make; not static, so one compilation serves any number.
      key: of the run.
      positions: ``[B]``, positions of these images in the whole batch.
      step_fn: ``(state, batch) -> (state, metrics)``.
      steps_per_epoch: to count the epochs.
      pixel_max: pixel value that stands for 1.
      crop_flip: whether to augment.

    Returns:
      The state, and the metrics summed over the steps made (their number is the growth of ``state.step``).
    """

    def one(i: chex.Array, state: TrainState) -> tuple[TrainState, dict[str, chex.Array]]:
        keys = jax.vmap(partial(jax.random.split, num=2))(example_keys(key, state.step, positions))
        images, labels = data.images[ids[i]], data.labels[ids[i]]
        if crop_flip:
            images = random_crop_flip(keys[:, 0], images)
        epoch = state.step // steps_per_epoch + 1
        return step_fn(state, Batch(to_float(images, pixel_max), labels, keys[:, 1], epoch))

    def body(carry: tuple[Any, ...]) -> tuple[Any, ...]:
        i, state, sums, _ = carry
        state, metrics = one(i, state)
        finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(metrics["grad_norm"])
        return i + 1, state, jax.tree.map(jnp.add, sums, metrics), finite

    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(one, 0, state)[1])
    first = (jnp.int32(0), state, zeros, jnp.bool_(True))
    _, state, sums, _ = lax.while_loop(lambda carry: (carry[0] < count) & carry[3], body, first)
    return state, sums


def initial_state(job: build.Training) -> TrainState:
    """The state before step 0, a function of the seed."""
    images = jnp.zeros((1, *job.data.train_images.shape[1:]))
    # A stream of its own: the steps' keys fold in 0, 1, 2, ...
    key = jax.random.fold_in(jax.random.key(job.seed), 2**32 - 1)
    params, stats = job.model.init(key, images)
    return TrainState(jnp.int32(0), params, stats, job.optimizer.init(params))


def fine_tuned_state(job: build.Training, say: Callable[[str], None]) -> TrainState:
    """:func:`initial_state` with the weights and statistics of the run or checkpoint ``job.start_from``.

    What the checkpoint lacks (a scale that the new head learns) keeps its initial value.

    Raises:
      InputError: there is no such checkpoint, or it has arrays that the model has no place for.
    """
    path, arrays, sha256 = checkpoints.read_latest(pathlib.Path(job.start_from))
    state = jax.jit(partial(initial_state, job))()
    ours = flatten_dict({"params": state.params, "stats": state.stats}, sep="/")
    theirs = flatten_dict({"params": arrays["params"], "stats": arrays.get("stats", {})}, sep="/")
    for name, array in theirs.items():
        if name not in ours or ours[name].shape != array.shape:
            raise InputError(
                f"config.train.start_from: checkpoint {path} has {name} {array.shape}, which does not fit "
                "the model; it must be of the same backbone and of a head with parameters of the same names"
            )
    kept = sorted(set(ours) - set(theirs))
    say(f"starting from {path} sha256 {sha256}" + (f"; new: {', '.join(kept)}" if kept else ""))
    merged = unflatten_dict({**ours, **theirs}, sep="/")
    return state.replace(params=merged["params"], stats=merged.get("stats", {}))


def compiled_chunk(job: build.Training) -> Callable[..., tuple[TrainState, dict[str, chex.Array]]]:
    """:func:`train_chunk` over all devices of this process, compiled once."""
    step_fn = partial(
        train_step,
        model=job.model,
        objective=job.objective,
        optimizer=job.optimizer,
        axis_name=job.axis_name,
    )
    chunk = partial(
        train_chunk,
        step_fn=step_fn,
        steps_per_epoch=job.steps_per_epoch,
        pixel_max=job.data.pixel_max,
        crop_flip=job.crop_flip,
    )
    return parallel.LAYOUTS[job.layout](chunk, jax.local_devices())


def chunk_ids(job: build.Training, step: int) -> tuple[np.ndarray, int]:
    """The images of the steps from ``step`` on, to the end of a chunk, of the epoch or of the run.

    Returns:
      Ids ``[steps_per_dispatch, B]``, of which the first ``count`` rows are meant, and ``count``.
    """
    epoch, offset = divmod(step, job.steps_per_epoch)
    count = min(job.steps_per_dispatch, job.steps_per_epoch - offset, job.total_steps - step)
    order = epoch_order(job.sampler, job.data.train_labels, job.seed, epoch)
    ids = np.zeros((job.steps_per_dispatch, job.batch_size), np.int32)
    first = offset * job.batch_size
    ids[:count] = order[first : first + count * job.batch_size].reshape(count, job.batch_size)
    return ids, count


def versions() -> dict[str, str]:
    """What a result may depend on: versions of the libraries, of Python, and the device."""
    names = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
    return {
        "robal_jax": robal_jax.__version__,
        **{name: importlib.metadata.version(name) for name in names},
        "python": platform.python_version(),
        "device": jax.devices()[0].device_kind,
    }


def data_digest(job: build.Training) -> str:
    """Sha256 of the training and the test set."""
    return checkpoints.digest({k: v for k, v in job.data._asdict().items() if isinstance(v, np.ndarray)})


def prepare_workdir(config: ConfigDict, job: build.Training, workdir: pathlib.Path) -> None:
    """Makes the folder of a run, or checks that it is this run's.

    Raises:
      InputError: it cannot be written to, or another config or other data made it.
    """
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        writable = os.access(workdir, os.W_OK | os.X_OK)
    except OSError as error:
        raise InputError(f"cannot make workdir {workdir}: {error.strerror}") from error
    if not writable:
        raise InputError(f"workdir {workdir} is not writable; choose another with --workdir")
    path, digest = workdir / "config.json", data_digest(job)
    if path.exists():
        try:
            data_before = json.loads((workdir / "versions.json").read_text())["data_sha256"]
        except FileNotFoundError as error:
            raise InputError(
                f"workdir {workdir} was not made by training; to train on from its weights give another "
                f"--workdir and --config.train.start_from={workdir}"
            ) from error
        except (OSError, ValueError, KeyError) as error:
            raise InputError(f"{workdir / 'versions.json'} cannot be read: {error!r}") from error
        changed = build.differences(config, build.read_config(workdir))
        if not changed and data_before != digest:
            changed = [f"data: sha256 {digest[:12]}… here, {data_before[:12]}… there"]
        if changed:
            raise InputError(
                f"workdir {workdir} was made with another config ({'; '.join(changed)}); "
                "choose another with --workdir, or the same config to go on"
            )
    elif checkpoints.steps(workdir / "checkpoints"):
        raise InputError(
            f"workdir {workdir} has checkpoints but no config.json; choose another with --workdir"
        )
    else:
        logs.replace(
            workdir / "versions.json",
            (json.dumps({**versions(), "data_sha256": digest}, indent=2) + "\n").encode(),
        )
    logs.replace(path, build.to_json(config).encode())


def train(config: ConfigDict, workdir: pathlib.Path, *, say: Callable[[str], None] = print) -> pathlib.Path:
    """Trains to the end, or goes on with what is in the workdir; saves, and ends early, on SIGTERM.

    Args:
      config: resolved.
      workdir: gets ``config.json``, ``versions.json``, ``metrics.jsonl``, ``tensorboard/``, ``checkpoints/``.
      say: told, in lines, what a person should know; the last line names the checkpoint and its sha256.

    Returns:
      The newest checkpoint's folder.

    Raises:
      InputError: the config, the data or the workdir cannot be used; nothing was changed.
      DivergedError: a loss or gradient was not finite; the last good checkpoint is kept.
    """
    with logs.stop_signals() as stop:
        job, folder = build.training(config), workdir / "checkpoints"
        like = jax.eval_shape(partial(initial_state, job))
        # Made before anything is written: weights to start from may be missing.
        first = fine_tuned_state(job, say) if job.start_from and not checkpoints.steps(folder) else None
        prepare_workdir(config, job, workdir)
        found = checkpoints.restore_latest(folder, like, on_damage=partial(_set_aside, workdir, say))
        if found is not None:
            state, *_ = found
            say(f"going on from step {int(state.step)} of {job.total_steps} ({found[1]})")
        else:
            state = first or jax.jit(partial(initial_state, job))()
        path, sha256 = _run(job, workdir, state, found and found[1:], stop)
        if stop:
            say(f"stopped at step {path.name} of {job.total_steps}; the same command goes on from there")
        say(f"checkpoint {path} sha256 {sha256}")
        return path


def _run(
    job: build.Training,
    workdir: pathlib.Path,
    state: TrainState,
    newest: tuple[pathlib.Path, str] | None,
    stop: logs.Stop,
) -> tuple[pathlib.Path, str]:
    """Steps from ``state`` to the end or a stop; ``newest`` and the result: a checkpoint and its sha256."""
    step, total = int(state.step), job.total_steps
    chunk = compiled_chunk(job)
    data = DeviceData(job.data.train_images, job.data.train_labels)
    key, positions = jax.random.key(job.seed), jnp.arange(job.batch_size)
    state, data, key = parallel.replicate((state, data, key), jax.local_devices())
    with (
        checkpoints.Saver(workdir / "checkpoints", job.keep_checkpoints) as saver,
        logs.Scalars(workdir, step) as scalars,
        logs.Meter("train", total, step) as meter,
    ):
        while step < total and not stop:
            started = time.perf_counter()
            ids, count = chunk_ids(job, step)
            state, sums = chunk(state, data, ids, count, key, positions)
            made, sums = jax.device_get((state.step, sums))
            means = {name: float(value) / (int(made) - step) for name, value in sums.items()}
            epoch = step // job.steps_per_epoch + 1
            if not np.isfinite(means["loss"] + means["grad_norm"]):
                kept = f"the last good checkpoint is {newest[0]}" if newest else "there is no checkpoint yet"
                raise DivergedError(
                    f"loss or gradient is not finite at step {int(made)} (epoch {epoch}); {kept}; "
                    "try a lower config.schedule.lr, a warm-up or config.optimizer.clip_norm"
                )
            seconds = time.perf_counter() - started
            rate = {
                "learning_rate": float(job.schedule(step)),
                "images_per_second": count * job.batch_size / seconds,
            }
            step += count
            scalars.write(step, {"epoch": epoch, **means, **rate})
            meter.update(
                step, f"epoch {epoch}  loss {means['loss']:.3f}  {rate['images_per_second']:.0f} images/s"
            )
            if step == total or step % (job.steps_per_epoch * job.checkpoint_epochs) == 0:
                newest = saver.save(step, state)
        if newest is None or newest[0].name != str(step):
            newest = saver.save(step, state)
    return newest


def _set_aside(workdir: pathlib.Path, say: Callable[[str], None], path: pathlib.Path, why: str) -> None:
    """Moves a damaged checkpoint out of the way of the one that will be written in its place."""
    target = workdir / "damaged" / f"{path.name}-{time.strftime('%Y%m%dT%H%M%S')}"
    target.parent.mkdir(exist_ok=True)
    path.rename(target)
    say(f"checkpoint {path} is damaged ({why}); moved to {target}, using the one before")
