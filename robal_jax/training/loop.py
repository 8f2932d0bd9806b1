"""A training run: chunks of steps on the devices, metrics, checkpoints, stopping and resuming.

Everything random in step ``t`` comes from ``fold_in(key(seed), t)`` and, from there, from the position of
the image in the batch; the images of step ``t`` are a function of (seed, t). So a checkpoint is arrays and a
step number, and a resumed run makes the same numbers as a run that was never interrupted.
"""

import contextlib
import pathlib
import time
from collections.abc import Callable, Generator, Mapping
from functools import partial
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from robal_jax import builder
from robal_jax.data import image_folder
from robal_jax.devices import hosts, parallel
from robal_jax.errors import DivergedError, InputError
from robal_jax.keys import key_of
from robal_jax.storage import buckets, checkpoints, mirror
from robal_jax.storage.config_file import to_json
from robal_jax.storage.lock import alone_in
from robal_jax.storage.names import CHECKPOINTS
from robal_jax.storage.progress import Meter, Scalars, announced
from robal_jax.storage.trackers import Track
from robal_jax.storage.user_code import changed_code, code_of, record_resume
from robal_jax.storage.workdir import (
    check_there,
    make_workdir,
    newest_whole,
    prepare_workdir,
    versions,
)
from robal_jax.training.judging import watch
from robal_jax.training.state import TrainState, fine_tuned_state, first_state, initial_state, taught_state
from robal_jax.training.step import Examples, compiled_chunk

LONG_DISPATCH = 10.0  # seconds; a longer dispatch is warned about


def step_ids(job: builder.Training, step: int) -> np.ndarray:
    """Returns the numbers of the images that a step sees, by part of its batch: ``[A, B / A]``.

    With free steps, steps that see the same batch count as one step of the order of the images.
    """
    number = step // job.free_steps.showings if job.free_steps else step
    epoch, offset = divmod(number, job.steps_per_epoch)
    first = offset * job.settings.batch_size
    return job.order(epoch)[first : first + job.settings.batch_size].reshape(
        job.settings.accumulation_steps, -1
    )


def positions(job: builder.Training) -> np.ndarray:
    """Returns the positions in the whole batch of the images that this process feeds, by part: ``[A, b]``."""
    everyone = np.arange(job.settings.batch_size).reshape(job.settings.accumulation_steps, -1)
    return everyone[:, parallel.share(everyone.shape[1])]


def chunks(job: builder.Training, step: int) -> Generator[tuple[np.ndarray | Examples, int]]:
    """Yields the input of this process to one chunk of steps after another, from ``step`` to the end.

    No chunk crosses the end of an epoch. Chunks are functions of the job and the step: nothing is replayed.

    Yields:
      Rows ``[steps_per_dispatch, A, b]`` for :func:`train_chunk`, and ``count``, how many of them to use. The
      rows are numbers of images if all images are on the device, or else images, read ahead of their use.
    """
    images, labels = job.images, job.labels

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


def train(
    config: ConfigDict,
    workdir: str | pathlib.Path,
    *,
    say: Callable[[str], None] = print,
    track: Track | None = None,
) -> pathlib.Path:
    """Trains to the end, or resumes from the newest checkpoint in the workdir; on SIGTERM saves and stops.

    Args:
      config: the resolved config.
      workdir: folder of the run, see ``storage.workdir``; or its URL, see ``storage.buckets``.
      say: receives messages for the user, line by line; the last one names the checkpoint and its sha256.
      track: receives every row of the metrics too, as ``(step, {name: value})``.

    Returns:
      The folder of the newest checkpoint; with a URL that in the copy on this machine.

    Raises:
      InputError: the config, the data or the workdir cannot be used; nothing was changed.
      DivergedError: a loss or gradient was not finite; the last good checkpoint is kept.
    """
    say = hosts.speaker(say)
    with hosts.stop_signals() as stop:
        with mirror.kept(workdir, say, stop.ask) as (folder, speak):
            path, sha256, total = _train(config, folder, stop, speak, track)
        if stop and path.name != str(total):
            say(f"stopped at step {path.name} of {total}; the same command resumes from there")
        say(f"checkpoint {buckets.shown(path)} sha256 {sha256}")
        return path


def _train(
    config: ConfigDict,
    workdir: pathlib.Path,
    stop: hosts.Stop,
    say: Callable[[str], None],
    track: Track | None,
) -> tuple[pathlib.Path, str, int]:
    """Trains in a folder of this machine; returns the newest checkpoint, its sha256, the number of steps."""
    folder = workdir / CHECKPOINTS
    with hosts.only_first(lambda: announced("reading the data")):
        job = builder.training(config)
        check_spread(job, jax.device_count())
    code = code_of(config, "training")
    hosts.check_agreement("the config", to_json(config))
    hosts.check_agreement("the data", job.data_sha256 + str(job.stored))
    # Before anything is written, because this checkpoint may be missing or may not fit the model.
    like = jax.eval_shape(partial(initial_state, job))
    others = {name: _weights_of(job, name, folder, say) for name in ("start_from", "teacher")}
    start, teacher = others.values()
    state = fine_tuned_state(job, start, say) if start else None
    if teacher:
        state = taught_state(state or first_state(job), teacher, say)
    hosts.by_first(partial(make_workdir, workdir))
    with hosts.held_by_first(partial(alone_in, workdir, on_loss=partial(hosts.lost, say, stop))):
        kept = hosts.by_first(
            partial(
                prepare_workdir, config, job.data_sha256, workdir, {**job.stored, **code}, job.total_steps
            )
        )
        found = newest_whole(workdir, like, say)
        if found:
            state = found.tree
            say(f"resuming at step {int(state.step)} of {job.total_steps} ({found.path})")
        for line in [*filter(None, [kept]), *job.data.notes, *_about(job, like, workdir)]:
            say(line)
        begun = -(-job.total_steps // job.steps_per_epoch)  # epochs
        doubts = [] if found else builder.doubts(config, begun)
        left = state is None or int(state.step) < job.total_steps
        if left and (changed := changed_code(code, workdir, "started")):
            doubts.append(f"{changed}; what follows uses the new code")
        for name, other in others.items():
            doubts += builder.doubts_of_other(config, name, other.path) if other else []
        for doubt in doubts:
            say(f"warning: {doubt}")
        if state is None:
            state = first_state(job)
        if left:
            hosts.by_first(partial(record_resume, code, workdir))
        path, sha256 = _run(job, workdir, state, found and (found.path, found.sha256), stop, say, track)
        hosts.by_first(partial(check_there, workdir, path))
    return path, sha256, job.total_steps


def _about(job: builder.Training, like: TrainState, workdir: pathlib.Path) -> list[str]:
    """Returns what the user sees before the compilation: devices, what is trained and how, and the folder."""
    made_with, about = versions(), dict(job.about)
    size = sum(leaf.size for leaf in jax.tree.leaves(like.params))
    about["network"] += f", {size:,} parameters"
    processes = f" in {jax.process_count()} processes" if jax.process_count() > 1 else ""
    device = f"{jax.device_count()} x {made_with['device']}{processes}, JAX {made_with['jax']}"
    return [f"{name:8} {text}" for name, text in {"device": device, **about, "folder": workdir}.items()]


def check_spread(job: builder.Training, devices: int) -> None:
    """Checks that a batch can be spread evenly over so many devices.

    Raises:
      InputError: it cannot.
    """
    batch_size, parts = job.settings.batch_size, job.settings.accumulation_steps
    if batch_size % (devices * parts):
        raise InputError(
            f"config.train.batch_size is {batch_size}; it must be a multiple of the number of devices, "
            f"{devices}" + (f", times config.train.accumulation_steps, {parts}" if parts > 1 else "")
        )


def _weights_of(
    job: builder.Training, field: str, folder: pathlib.Path, say: Callable[[str], None]
) -> checkpoints.Found[dict[str, Any]] | None:
    """Reads the checkpoint of another run that a field names; None if there is none, or this run has its own.

    Args:
      job: the training.
      field: 'start_from' for the one that a new run fine-tunes, 'teacher' for the one that teaches it.
      folder: of this run's checkpoints.
      say: receives messages for the user.
    """
    found, workdir = None, getattr(job.settings, field)
    if workdir and not checkpoints.steps(folder):
        on_damage = checkpoints.previous_instead(say)
        found = checkpoints.read_latest(buckets.fetched(workdir), on_damage=on_damage)
    hosts.check_agreement(f"config.train.{field}", found.sha256 if found else "none")
    return found


def _run(
    job: builder.Training,
    workdir: pathlib.Path,
    state: TrainState,
    newest: tuple[pathlib.Path, str] | None,
    stop: hosts.Stop,
    say: Callable[[str], None],
    track: Track | None,
) -> tuple[pathlib.Path, str]:
    """Trains from ``state`` to the end or a stop; ``newest`` and the result: a checkpoint and its sha256."""
    first = step = int(state.step)
    total, warned = job.total_steps, False
    devices = parallel.devices_for(job.settings.layout)
    chunk, where = compiled_chunk(job, devices), positions(job)
    state, data, key = _on_devices(job, state, devices)
    look = watch(job, workdir, devices, say)

    def save() -> tuple[pathlib.Path, str]:
        hosts.by_first(partial(check_there, workdir))
        return saver.save(step, state)

    with (
        contextlib.closing(chunks(job, step)) as upcoming,
        checkpoints.Saver(workdir / CHECKPOINTS, job.settings.keep_checkpoints) as saver,
        hosts.only_first(lambda: Scalars(workdir, step, say, track)) as scalars,
        hosts.only_first(lambda: Meter("train", total, step)) as meter,
    ):
        rows = next(upcoming, None)
        if rows is not None:
            say("compiling the training step")
        while rows is not None and not stop:
            started = time.perf_counter()
            count = rows[1]
            state, sums = chunk(state, data, rows[0], count, key, where)
            rows = next(upcoming, None)  # read while the devices work
            made, sums = jax.device_get((state.step, sums))
            seconds = time.perf_counter() - started
            row = _metrics(job, step, int(made), sums, seconds)
            _check_finite(row, int(made), newest)
            if step > first and not warned:  # the first dispatch waits for the compilation
                warned = _warn_if_long(count, seconds, say)
            step += count
            row |= look(step, state)  # before the checkpoint: what a resumed run has passed is looked at
            scalars.write(step, row)
            speed = f"{row['images_per_second']:.0f} images/s"
            meter.update(step, f"epoch {row['epoch']}  loss {row['loss']:.3f}  {speed}")
            if step == total or step % (job.steps_per_epoch * job.settings.checkpoint_epochs) == 0:
                newest = save()
        if newest is None or newest[0].name != str(step):
            newest = save()
    return newest


def _on_devices(
    job: builder.Training, state: TrainState, devices: list[jax.Device]
) -> tuple[TrainState, Examples | None, jax.Array]:
    """Copies the state, the training set (None if it is read from files) and the key to all devices."""
    data = Examples(job.images, job.labels) if isinstance(job.images, np.ndarray) else None
    hosts.check_agreement("the state before the first step", checkpoints.digest(state))
    return parallel.replicate((state, data, key_of(job.seed)), devices)


def _metrics(
    job: builder.Training, step: int, made: int, sums: Mapping[str, Any], seconds: float
) -> dict[str, Any]:
    """Returns the row of metrics of one dispatch: the epoch, means over its steps, learning rate and speed.

    Args:
      job: the training.
      step: steps made before the dispatch.
      made: steps made after it.
      sums: metrics summed over the steps between.
      seconds: duration of the dispatch.
    """
    return {
        "epoch": step // job.steps_per_epoch + 1,
        **{name: float(value) / (made - step) for name, value in sums.items()},
        "learning_rate": float(job.schedule(step)),
        "images_per_second": (made - step) * job.settings.batch_size / seconds,
    }


def _check_finite(row: Mapping[str, Any], made: int, newest: tuple[pathlib.Path, str] | None) -> None:
    """Raises a ``DivergedError`` if the loss or the gradient of a dispatch is not finite."""
    if not np.isfinite(row["loss"] + row["grad_norm"]):
        kept = f"the last good checkpoint is {newest[0]}" if newest else "there is no checkpoint yet"
        advice = (
            "try a lower config.schedule.lr, a warm-up or config.optimizer.clip_norm"
            if made > 1
            else "no step was made before it: check config.loss, config.attack.loss and config.model"
        )
        raise DivergedError(
            f"loss or gradient is not finite at step {made} (epoch {row['epoch']}); {kept}; {advice}"
        )


def _warn_if_long(count: int, seconds: float, say: Callable[[str], None]) -> bool:
    """Warns if a dispatch would delay a signal to stop for too long; returns whether it warned."""
    if seconds <= LONG_DISPATCH:
        return False
    say(
        f"{count} steps take {seconds:.0f} s, and a signal to stop waits for them; preempted machines give "
        "30 s: lower config.train.steps_per_dispatch"
    )
    return True
