"""Training: the pure step, its compiled loop over a chunk of steps, and the run that saves and resumes.

Everything random in step ``t`` comes from ``fold_in(key(seed), t)`` and, from there, from the position of
the image in the batch; the images of step ``t`` are a function of (seed, t). So a checkpoint is arrays and a
step number, and a run that goes on from one makes the same numbers as one that was never interrupted.
"""

import contextlib
import pathlib
import time
from collections.abc import Callable, Generator
from functools import partial
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from robal_jax import builder
from robal_jax.data import image_folder
from robal_jax.devices import hosts, parallel
from robal_jax.errors import DivergedError, InputError
from robal_jax.storage import checkpoints
from robal_jax.storage.config_file import to_json
from robal_jax.storage.names import CHECKPOINTS
from robal_jax.storage.progress import Meter, Scalars
from robal_jax.storage.workdir import data_digest, newest_whole, prepare_workdir
from robal_jax.training.state import TrainState, fine_tuned_state, initial_state
from robal_jax.training.step import Examples, compiled_chunk

LONG_DISPATCH = 10.0  # seconds


def step_ids(job: builder.Training, step: int) -> np.ndarray:
    """The images that a step sees, by part of its batch: ``[A, B / A]``."""
    epoch, offset = divmod(step, job.steps_per_epoch)
    first = offset * job.settings.batch_size
    return job.order(epoch)[first : first + job.settings.batch_size].reshape(
        job.settings.accumulation_steps, -1
    )


def positions(job: builder.Training) -> np.ndarray:
    """The positions in the whole batch of the images that this process feeds, by part: ``[A, b]``."""
    everyone = np.arange(job.settings.batch_size).reshape(job.settings.accumulation_steps, -1)
    return everyone[:, parallel.share(everyone.shape[1])]


def chunks(job: builder.Training, step: int) -> Generator[tuple[np.ndarray | Examples, int]]:
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
        missing = job.settings.steps_per_dispatch - len(rows)
        return np.stack(rows + [np.zeros_like(rows[0])] * missing)

    read = None
    if not isinstance(images, np.ndarray):
        steps, ahead = range(step, job.total_steps), job.settings.steps_per_dispatch  # the next chunk's
        read = image_folder.stream(images, ids_of, steps, threads=job.settings.reading_threads, ahead=ahead)
    while step < job.total_steps:
        left = job.steps_per_epoch - step % job.steps_per_epoch
        count = min(job.settings.steps_per_dispatch, left, job.total_steps - step)
        ids = [ids_of(step + i) for i in range(count)]
        if read is None:
            yield filled(ids), count
        else:
            yield Examples(filled([next(read) for _ in ids]), filled([labels[row] for row in ids])), count
        step += count


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
    say, folder = hosts.speaker(say), workdir / CHECKPOINTS
    with hosts.stop_signals() as stop:
        job = builder.training(config)
        _check_devices(job)
        digest = data_digest(job.data)
        hosts.check_agreement("the config", to_json(config))
        hosts.check_agreement("the data", digest)
        # Looked at before anything is written: what is named may be missing, or not fit.
        like = jax.eval_shape(partial(initial_state, job))
        start = _weights_to_start_from(job, folder)
        state = fine_tuned_state(job, start, say) if start else None
        hosts.by_first(partial(prepare_workdir, config, digest, workdir))
        found = newest_whole(workdir, like, say)
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


def _check_devices(job: builder.Training) -> None:
    """Refuses a batch that cannot be spread evenly."""
    batch_size, parts = job.settings.batch_size, job.settings.accumulation_steps
    devices = jax.device_count()
    if batch_size % (devices * parts):
        raise InputError(
            f"config.train.batch_size is {batch_size}; it must be a multiple of the number of devices, "
            f"{devices}" + (f", times config.train.accumulation_steps, {parts}" if parts > 1 else "")
        )


def _weights_to_start_from(
    job: builder.Training, folder: pathlib.Path
) -> checkpoints.Found[dict[str, Any]] | None:
    found = None
    if job.settings.start_from and not checkpoints.steps(folder):
        found = checkpoints.read_latest(pathlib.Path(job.settings.start_from))
    hosts.check_agreement("config.train.start_from", found.sha256 if found else "none")
    return found


def _run(
    job: builder.Training,
    workdir: pathlib.Path,
    state: TrainState,
    newest: tuple[pathlib.Path, str] | None,
    stop: hosts.Stop,
    say: Callable[[str], None],
) -> tuple[pathlib.Path, str]:
    """Steps from ``state`` to the end or a stop; ``newest`` and the result: a checkpoint and its sha256."""
    step, total, slow = int(state.step), job.total_steps, False
    first = step  # its dispatch waits for the compilation
    devices = parallel.devices_for(job.settings.layout)
    chunk, where = compiled_chunk(job, devices), positions(job)
    in_memory = isinstance(job.data.train_images, np.ndarray)
    data = Examples(job.data.train_images, job.data.train_labels) if in_memory else None
    state, data, key = parallel.replicate((state, data, jax.random.key(job.seed)), devices)
    with (
        contextlib.closing(chunks(job, step)) as upcoming,
        checkpoints.Saver(workdir / CHECKPOINTS, job.settings.keep_checkpoints) as saver,
        hosts.only_first(lambda: Scalars(workdir, step)) as scalars,
        hosts.only_first(lambda: Meter("train", total, step)) as meter,
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
                "images_per_second": count * job.settings.batch_size / seconds,
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
            if step == total or step % (job.steps_per_epoch * job.settings.checkpoint_epochs) == 0:
                newest = saver.save(step, state)
        if newest is None or newest[0].name != str(step):
            newest = saver.save(step, state)
    return newest
