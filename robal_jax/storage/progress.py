"""Progress of a long job on the terminal, and the scalars of a training run."""

import contextlib
import json
import math
import pathlib
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from robal_jax.devices.output import Tolerant
from robal_jax.errors import one_line
from robal_jax.storage.files import write_whole
from robal_jax.storage.names import METRICS, TENSORBOARD
from robal_jax.storage.trackers import Track


@contextlib.contextmanager
def announced(text: str, after: float = 2.0) -> Iterator[None]:
    """Shows ``text`` on stderr if the work inside takes longer than ``after`` seconds."""
    timer = threading.Timer(after, partial(print, text, file=Tolerant(sys.stderr), flush=True))
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


FLUSH_SECONDS = 30.0  # between two times at which TensorBoard sees what is new


class Meter:
    """Progress of a long job: a bar on a terminal, otherwise a plain line from time to time.

    It never ends the job: what stderr does not take is lost.

    Attributes:
      total: number of steps of the job.
      every: seconds between two plain lines.
    """

    def __init__(self, title: str, total: int, done: int = 0, every: float = 10.0) -> None:
        self.total, self.every = total, every
        self._title, self._started, self._initial = title, time.monotonic(), done
        self._last_line = self._started
        self._bar: Progress | None = None
        stream: Any = Tolerant(sys.stderr)
        self._file = stream
        if stream.isatty():
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
            )
            self._bar = Progress(*columns, TextColumn("{task.fields[note]}"), console=Console(file=stream))
            self._task = self._bar.add_task(title, total=total, completed=done, note="")

    def update(self, done: int, note: str = "") -> None:
        """Shows that ``done`` steps are done, followed by ``note``."""
        if self._bar is not None:
            self._bar.update(self._task, completed=done, note=note)
            return
        now = time.monotonic()
        if now - self._last_line >= self.every or done >= self.total:
            self._last_line = now
            left = (now - self._started) * (self.total - done) / max(done - self._initial, 1)
            self._print(done, f"{note}  {left:.0f} s left")

    def _print(self, done: int, note: str) -> None:
        print(f"{self._title} {done}/{self.total}  {note}", file=self._file, flush=True)

    def __enter__(self) -> "Meter":
        if self._bar is not None:
            self._bar.start()
        elif 0 < self._initial < self.total:
            self._print(self._initial, "resumed")
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()


class Scalars:
    """Scalars of a run as JSON lines, which are the source of truth, for TensorBoard, and for a tracker.

    When it is opened at step ``step``, it drops what an interrupted run logged after that step, so that no
    step is logged twice, and says how many lines were broken.
    """

    def __init__(
        self,
        workdir: pathlib.Path,
        step: int,
        say: Callable[[str], None] = print,
        track: Track | None = None,
    ) -> None:
        path = workdir / METRICS
        lines = _lines(path)
        rows = [_row(line) for line in lines]
        kept = [line for line, row in zip(lines, rows, strict=True) if row and row["step"] <= step]
        write_whole(path, "".join(kept).encode())
        if broken := rows.count(None):
            say(f"dropped {broken} broken line{'s' if broken > 1 else ''} of {path}")
        self._lines = path.open("a", buffering=1)
        self._say, self._track = say, track
        self._board = Board(workdir / TENSORBOARD, step, say)

    def write(self, step: int, values: dict[str, Any]) -> None:
        """Writes one row."""
        self._lines.write(json.dumps({"step": step, **values}) + "\n")
        if self._track is not None:
            try:
                self._track(step, values)
            except Exception as error:  # of a package, or of the network
                self._track = None
                self._say(
                    f"warning: the tracker failed ({one_line(error)}); training continues without it, and "
                    f"{METRICS} has all metrics"
                )
        self._board.write(step, values)

    def __enter__(self) -> "Scalars":
        return self

    def __exit__(self, *_: object) -> None:
        self._lines.close()
        self._board.close()


class Board:
    """Scalars for TensorBoard, for looking at only: a write that fails ends the board, but not the run."""

    def __init__(self, folder: pathlib.Path, step: int, say: Callable[[str], None]) -> None:
        # Imported here, because it imports what is installed for cloud storage, which takes a second.
        from tensorboardX import event_file_writer, summary
        from tensorboardX.proto.event_pb2 import Event, SessionLog

        self._folder, self._say, self._flushed = folder, say, 0.0
        self._file: Any = None
        self._event, self._scalar = Event, summary.scalar
        with self._lost_if_it_fails():
            folder.mkdir(exist_ok=True)
            self._file = event_file_writer.EventsWriter(str(folder / "events"))
            if step:  # hides what an interrupted run logged after it
                self._add(step + 1, session_log=SessionLog(status=SessionLog.START))

    def write(self, step: int, values: dict[str, Any]) -> None:
        """Writes one row."""
        with self._lost_if_it_fails():
            for name, value in values.items():
                self._add(step, summary=self._scalar(name, value))
            if self._file and time.monotonic() - self._flushed > FLUSH_SECONDS:
                self._file.flush()
                self._flushed = time.monotonic()

    def _add(self, step: int, **content: Any) -> None:
        if self._file:
            self._file.write_event(self._event(step=step, wall_time=time.time(), **content))

    @contextlib.contextmanager
    def _lost_if_it_fails(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self._file = None
            self._say(f"warning: cannot write {self._folder} ({error.strerror}); {METRICS} has all scalars")

    def close(self) -> None:
        """Writes what is left to the disk."""
        with self._lost_if_it_fails():
            if self._file:
                self._file.close()


def _lines(path: pathlib.Path) -> list[str]:
    """Reads the lines of a file, with their ends; the last one may lack its end."""
    text = path.read_bytes().decode(errors="replace") if path.exists() else ""
    return [f"{line}\n" for line in text.split("\n")[:-1]] + [line for line in text.split("\n")[-1:] if line]


JUDGED = {"held-out": "held_out_", "test": "test_"}
"""Beginnings of the names of accuracies that were measured during the training, by the images they are of."""


def judged_course(workdir: pathlib.Path) -> dict[str, Any]:
    """Returns how weights were judged during a training, to its end.

    Args:
      workdir: folder of the run.

    Returns:
      'images' (a key of ``JUDGED``), 'epoch', and by name ('clean', 'pgd_tail', ...) the accuracy after each
      of these epochs. Empty if there are none.
    """
    for images, beginning in JUDGED.items():
        rows = [row for row in _rows(workdir) if f"{beginning}pgd_balanced" in row]
        if rows:
            names = [name for name in rows[0] if name.startswith(beginning)]
            values = {name.removeprefix(beginning): [row.get(name) for row in rows] for name in names}
            return {"images": images, "epoch": [row["epoch"] for row in rows], **values}
    return {}


def _rows(workdir: pathlib.Path) -> list[dict[str, Any]]:
    """Reads the rows of the metrics that are whole."""
    try:
        found = [_row(line) for line in _lines(workdir / METRICS)]
    except OSError:  # not ours to read
        return []
    return [row for row in found if row and type(row.get("epoch")) is int]


def training_curve(workdir: pathlib.Path, last: float = math.inf) -> dict[str, list[float]]:
    """Returns the course of a training by epoch.

    Args:
      workdir: folder of the run.
      last: the last step that counts, such as that of a checkpoint.

    Returns:
      'epoch', and every metric that is finite in all rows of the run: its mean over the steps of each epoch.
      Empty if there are no metrics.
    """
    rows = [row for row in _rows(workdir) if row["step"] <= last]
    if not rows:
        return {}
    names = [
        name
        for name in rows[0]
        if name not in ("step", "epoch", "images_per_second")
        and not name.startswith(tuple(JUDGED.values()))
        and all(type(row.get(name)) in (int, float) and math.isfinite(row[name]) for row in rows)
    ]
    steps = np.maximum(np.diff([0, *(row["step"] for row in rows)]), 1)
    epochs, places = np.unique([row["epoch"] for row in rows], return_inverse=True)
    weights = np.bincount(places, steps)
    means = {
        name: np.bincount(places, steps * np.array([row[name] for row in rows])) / weights for name in names
    }
    return {"epoch": epochs.tolist(), **{name: values.tolist() for name, values in means.items()}}


def _row(line: str) -> dict[str, Any] | None:
    """Returns a line of metrics; None if it is broken.

    A killed process may leave a part of a line, and a loss of power zeros in its place.
    """
    try:
        row = json.loads(line)
        whole = line.endswith("\n") and type(row["step"]) is int
    except (ValueError, LookupError, TypeError, RecursionError):
        return None
    return row if whole else None
