"""Training: the pure step, its compiled loop over a chunk of steps, and the run that saves and resumes.

Everything random in step ``t`` comes from ``fold_in(key(seed), t)`` and, from there, from the position of
the image in the batch; the images of step ``t`` are a function of (seed, t). So a checkpoint is arrays and a
step number, and a run that goes on from one makes the same numbers as one that was never interrupted.
"""

import contextlib
import importlib.metadata
import json
import os
import pathlib
import platform
import time
from collections.abc import Callable, Generator
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
from robal_jax import build, checkpoints, folders, hosts, logs, parallel
from robal_jax.data import Images, to_float
from robal_jax.errors import DivergedError, InputError
from robal_jax.models import Model, update_statistics
from robal_jax.objectives import Batch, Objective
from robal_jax.state import TrainState

LONG_DISPATCH = 10.0  # seconds


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
    accumulation_steps: int = 1,
) -> tuple[TrainState, dict[str, chex.Array]]:
    """One update.

    ``g = mean over parts and devices of grad (mean loss of the part's images on the device)``; metrics and
    batch-norm moments are averaged in the same way.

    Args:
      state: before it.
      batch: what it sees; this device's part.
      model: the network.
      objective: what is minimised.
      optimizer: how.
      axis_name: mapped axis over which the batch is spread, if any.
      accumulation_steps: parts ``A`` in which the device takes its images, one after the other, to need the
        memory of one. What an objective or batch norm takes from the images together, it takes from a part.

    Returns:
      The state after it, and scalars: ``loss``, ``grad_norm`` (global, before clipping) and the objective's.
    """

    def gradients_of(part: tuple[chex.Array, chex.Array, chex.PRNGKey]) -> tuple[chex.ArrayTree, ...]:
        def loss_fn(params: chex.ArrayTree) -> tuple[chex.Array, Any]:
            return objective(model, params, state.stats, Batch(*part, epoch=batch.epoch))

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
        stats=update_statistics(state.stats, moments),
        opt_state=opt_state,
    )
    return new_state, {**metrics, "grad_norm": optax.tree.norm(gradients)}


def _mean_over(function: Callable[[Any], Any], parts: chex.ArrayTree) -> chex.ArrayTree:
    """Mean of ``function`` over the leading axis of ``parts``, one after the other."""
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
    """Several steps in one compiled loop; it ends early after a step that is not finite.

    Args:
      state: before the first step.
      data: the training set; None where the rows bring the images along.
      rows: ``[T, A, b]``, which images of ``data`` each step sees in each part of its batch; or they
        themselves.
      count: how many of the ``T`` steps to make; not static, so one compilation serves any number.
      key: of the run.
      positions: ``[A, b]``, positions of these images in the whole batch.
      step_fn: ``(state, batch) -> (state, metrics)``.
      steps_per_epoch: to count the epochs.
      pixel_max: pixel value that stands for 1.
      augment: ``(keys [n], images [n, H, W, C]) -> images``, integers to integers.

    Returns:
      The state, and the metrics summed over the steps made (their number is the growth of ``state.step``).
    """

    def one(i: chex.Array, state: TrainState) -> tuple[TrainState, dict[str, chex.Array]]:
        keys = example_keys(key, state.step, positions.reshape(-1))
        keys = jax.vmap(partial(jax.random.split, num=2))(keys)
        row = jax.tree.map(lambda x: x[i].reshape(-1, *x.shape[3:]), rows)
        images, labels = row if data is None else (data.images[row], data.labels[row])
        images = augment(keys[:, 0], images)
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
    images = jnp.zeros((1, *job.data.test_images.shape[1:]))  # as training images are once augmented
    # A stream of its own: the steps' keys fold in 0, 1, 2, ...
    key = jax.random.fold_in(jax.random.key(job.seed), 2**32 - 1)
    params, stats = job.model.init(key, images)
    return TrainState(jnp.int32(0), params, stats, job.optimizer.init(params))


def fine_tuned_state(
    job: build.Training, start: checkpoints.Found[dict[str, Any]], say: Callable[[str], None]
) -> TrainState:
    """:func:`initial_state` with the weights and statistics of a checkpoint.

    What the checkpoint lacks (a scale that the new head learns) keeps its initial value.

    Raises:
      InputError: it has arrays that the model has no place for.
    """
    state = jax.device_get(jax.jit(partial(initial_state, job))())
    ours = flatten_dict({"params": state.params, "stats": state.stats}, sep="/")
    arrays = {"params": start.tree["params"], "stats": start.tree.get("stats", {})}
    theirs = flatten_dict(arrays, sep="/")
    for name, array in theirs.items():
        if name not in ours or ours[name].shape != array.shape:
            raise InputError(
                f"config.train.start_from: checkpoint {start.path} has {name} {array.shape}, which does not "
                "fit the model; it must be of the same backbone and a head with parameters of the same names"
            )
    kept = sorted(set(ours) - set(theirs))
    say(f"starting from {start.path} sha256 {start.sha256}" + (f"; new: {', '.join(kept)}" if kept else ""))
    merged = unflatten_dict({**ours, **theirs}, sep="/")
    return state.replace(params=merged["params"], stats=merged.get("stats", {}))


def compiled_chunk(
    job: build.Training, devices: list[jax.Device]
) -> Callable[..., tuple[TrainState, dict[str, chex.Array]]]:
    """:func:`train_chunk` over the devices, compiled once."""
    step_fn = partial(
        train_step,
        model=job.model,
        objective=job.objective,
        optimizer=job.optimizer,
        axis_name=parallel.AXIS,
        accumulation_steps=job.accumulation_steps,
    )
    chunk = partial(
        train_chunk,
        step_fn=step_fn,
        steps_per_epoch=job.steps_per_epoch,
        pixel_max=job.data.pixel_max,
        augment=job.augment,
    )
    return parallel.LAYOUTS[job.layout](chunk, devices)


def step_ids(job: build.Training, step: int) -> np.ndarray:
    """The images that a step sees, by part of its batch: ``[A, B / A]``."""
    epoch, offset = divmod(step, job.steps_per_epoch)
    first = offset * job.batch_size
    return job.order(epoch)[first : first + job.batch_size].reshape(job.accumulation_steps, -1)


def positions(job: build.Training) -> np.ndarray:
    """The positions in the whole batch of the images that this process feeds, by part: ``[A, b]``."""
    everyone = np.arange(job.batch_size).reshape(job.accumulation_steps, -1)
    return everyone[:, parallel.share(everyone.shape[1])]


def chunks(job: build.Training, step: int) -> Generator[tuple[np.ndarray | Examples, int]]:
    """What this process feeds to chunk after chunk of steps, from ``step`` to the end of the run.

    A chunk ends where an epoch does. It is a function of the job and the step: nothing is replayed.

    Yields:
      Rows ``[steps_per_dispatch, A, b]`` for :func:`train_chunk`, of which the first ``count`` are meant, and
      ``count``: numbers of images where all are on the device, or else images, read ahead of their use.
    """
    images, labels = job.data.train_images, job.data.train_labels

    def ids_of(step: int) -> np.ndarray:
        ids = step_ids(job, step)
        return ids[:, parallel.share(ids.shape[1])]

    def filled(rows: list[np.ndarray]) -> np.ndarray:
        missing = job.steps_per_dispatch - len(rows)
        return np.stack(rows + [np.zeros_like(rows[0])] * missing)

    read = None
    if not isinstance(images, np.ndarray):
        steps, ahead = range(step, job.total_steps), job.steps_per_dispatch  # the next chunk's
        read = folders.stream(images, ids_of, steps, threads=job.reading_threads, ahead=ahead)
    while step < job.total_steps:
        left = job.steps_per_epoch - step % job.steps_per_epoch
        count = min(job.steps_per_dispatch, left, job.total_steps - step)
        ids = [ids_of(step + i) for i in range(count)]
        if read is None:
            yield filled(ids), count
        else:
            yield Examples(filled([next(read) for _ in ids]), filled([labels[row] for row in ids])), count
        step += count


def versions() -> dict[str, str]:
    """What a result may depend on: versions of the libraries, of Python, and the device."""
    names = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
    return {
        "robal_jax": robal_jax.__version__,
        **{name: importlib.metadata.version(name) for name in names},
        "python": platform.python_version(),
        "device": jax.devices()[0].device_kind,
    }


def fingerprint(images: Images) -> np.ndarray:
    """What stands for images in a digest: they themselves, or the names and sizes of their files."""
    return images.identity() if isinstance(images, folders.ImageFiles) else np.asarray(images)


def data_digest(job: build.Training) -> str:
    """Sha256 of the training and the test set."""
    fields = job.data._asdict()
    arrays = {name: fields[name] for name in ("train_labels", "test_labels")}
    files = {name: fingerprint(fields[name]) for name in ("train_images", "test_images")}
    return checkpoints.digest(arrays | files)


def prepare_workdir(config: ConfigDict, digest: str, workdir: pathlib.Path) -> None:
    """Makes the folder of a run, or checks that it is this run's; ``digest`` is that of the data.

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
    path = workdir / "config.json"
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
    say, folder = hosts.speaker(say), workdir / "checkpoints"
    with hosts.stop_signals() as stop:
        job = build.training(config)
        _check_devices(job)
        digest = data_digest(job)
        hosts.check_agreement("the config", build.to_json(config))
        hosts.check_agreement("the data", digest)
        # Looked at before anything is written: what is named may be missing, or not fit.
        like = jax.eval_shape(partial(initial_state, job))
        start = _weights_to_start_from(job, folder)
        state = fine_tuned_state(job, start, say) if start else None
        hosts.by_first(partial(prepare_workdir, config, digest, workdir))
        found = _newest_whole(workdir, like, say)
        if found:
            state = found.tree
            say(f"going on from step {int(state.step)} of {job.total_steps} ({found.path})")
        elif state is None:
            state = jax.device_get(jax.jit(partial(initial_state, job))())
        path, sha256 = _run(job, workdir, state, found and (found.path, found.sha256), stop, say)
        if stop:
            say(f"stopped at step {path.name} of {job.total_steps}; the same command goes on from there")
        say(f"checkpoint {path} sha256 {sha256}")
        return path


def _check_devices(job: build.Training) -> None:
    """Refuses a batch that cannot be spread evenly."""
    devices, parts = jax.device_count(), job.accumulation_steps
    if job.batch_size % (devices * parts):
        raise InputError(
            f"config.train.batch_size is {job.batch_size}; it must be a multiple of the number of devices, "
            f"{devices}" + (f", times config.train.accumulation_steps, {parts}" if parts > 1 else "")
        )


def _weights_to_start_from(
    job: build.Training, folder: pathlib.Path
) -> checkpoints.Found[dict[str, Any]] | None:
    found = None
    if job.start_from and not checkpoints.steps(folder):
        found = checkpoints.read_latest(pathlib.Path(job.start_from))
    hosts.check_agreement("config.train.start_from", found.sha256 if found else "none")
    return found


def _newest_whole(
    workdir: pathlib.Path, like: TrainState, say: Callable[[str], None]
) -> checkpoints.Found[TrainState] | None:
    """The checkpoint to go on from, if any; newer ones are damaged, and set aside."""
    damaged: list[tuple[pathlib.Path, str]] = []
    found = checkpoints.restore_latest(
        workdir / "checkpoints", like, on_damage=lambda path, why: damaged.append((path, why))
    )
    state = found.sha256 if found else "none"
    hosts.check_agreement(f"what is in {workdir}", f"{(workdir / 'config.json').is_file()} {state}")
    for path, why in damaged:
        hosts.by_first(partial(_set_aside, workdir, say, path, why))
    return found


def _run(
    job: build.Training,
    workdir: pathlib.Path,
    state: TrainState,
    newest: tuple[pathlib.Path, str] | None,
    stop: hosts.Stop,
    say: Callable[[str], None],
) -> tuple[pathlib.Path, str]:
    """Steps from ``state`` to the end or a stop; ``newest`` and the result: a checkpoint and its sha256."""
    step, total, slow = int(state.step), job.total_steps, False
    first = step  # its dispatch waits for the compilation
    devices = parallel.devices_for(job.layout)
    chunk, where = compiled_chunk(job, devices), positions(job)
    in_memory = isinstance(job.data.train_images, np.ndarray)
    data = Examples(job.data.train_images, job.data.train_labels) if in_memory else None
    state, data, key = parallel.replicate((state, data, jax.random.key(job.seed)), devices)
    with (
        contextlib.closing(chunks(job, step)) as upcoming,
        checkpoints.Saver(workdir / "checkpoints", job.keep_checkpoints) as saver,
        hosts.only_first(lambda: logs.Scalars(workdir, step)) as scalars,
        hosts.only_first(lambda: logs.Meter("train", total, step)) as meter,
    ):
        rows = next(upcoming, None)
        while rows is not None and not stop:
            started = time.perf_counter()
            count = rows[1]
            state, sums = chunk(state, data, rows[0], count, key, where)
            rows = next(upcoming, None)  # read while the devices work
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
            if seconds > LONG_DISPATCH and step > first and not slow:
                slow = True
                say(
                    f"{count} steps take {seconds:.0f} s, and a signal to stop waits for them; a machine "
                    "that is taken away gives 30 s: lower config.train.steps_per_dispatch"
                )
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
