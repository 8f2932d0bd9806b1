"""Progress of a long job on the terminal, and the scalars of a training run."""

import json
import math
import pathlib
import sys
import time
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from tensorboardX import SummaryWriter

from robal_jax.storage.files import write_whole
from robal_jax.storage.names import METRICS, TENSORBOARD


class Meter:
    """Progress of a long job: a bar on a terminal, otherwise a plain line from time to time.

    Attributes:
      total: number of steps of the job.
      every: seconds between two plain lines.
    """

    def __init__(self, title: str, total: int, done: int = 0, every: float = 10.0) -> None:
        self.total, self.every = total, every
        self._title, self._started, self._initial = title, time.monotonic(), done
        self._last_line = self._started
        self._bar: Progress | None = None
        if sys.stderr.isatty():
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
            )
            self._bar = Progress(*columns, TextColumn("{task.fields[note]}"), console=Console(stderr=True))
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
            print(
                f"{self._title} {done}/{self.total}  {note}  {left:.0f} s left", file=sys.stderr, flush=True
            )

    def __enter__(self) -> "Meter":
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()


class Scalars:
    """Scalars of a run as JSON lines, which are the source of truth, and for TensorBoard.

    When it is opened at step ``step``, it drops what an interrupted run logged after that step, so that no
    step is logged twice.
    """

    def __init__(self, workdir: pathlib.Path, step: int) -> None:
        path = workdir / METRICS
        kept = [line for line in _whole_lines(path) if json.loads(line)["step"] <= step]
        write_whole(path, "".join(kept).encode())
        self._lines = path.open("a", buffering=1)
        self._board = SummaryWriter(str(workdir / TENSORBOARD), purge_step=step + 1 if step else None)

    def write(self, step: int, values: dict[str, Any]) -> None:
        """Writes one row."""
        self._lines.write(json.dumps({"step": step, **values}) + "\n")
        for name, value in values.items():
            self._board.add_scalar(name, value, step)

    def __enter__(self) -> "Scalars":
        return self

    def __exit__(self, *_: object) -> None:
        self._lines.close()
        self._board.close()


def training_curve(workdir: pathlib.Path, last: float = math.inf) -> dict[str, list[float]]:
    """Returns the course of a training by epoch.

    Args:
      workdir: folder of the run.
      last: the last step that counts, such as that of a checkpoint.

    Returns:
      'epoch', and every metric that is finite in all rows of the run: its mean over the steps of each epoch.
      Empty if there are no metrics.
    """
    try:
        lines = _whole_lines(workdir / METRICS)
    except (OSError, ValueError):  # not ours to read, or no text
        lines = []
    rows = [row for line in lines if (row := _row(line)) and row["step"] <= last]
    if not rows:
        return {}
    names = [
        name
        for name in rows[0]
        if name not in ("step", "epoch", "images_per_second")
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
    """Returns a line of metrics; None if it is damaged."""
    try:
        row = json.loads(line)
    except ValueError:
        return None
    known = isinstance(row, dict) and all(isinstance(row.get(name), int) for name in ("step", "epoch"))
    return row if known else None


def _whole_lines(path: pathlib.Path) -> list[str]:
    """Reads the complete lines of a file; a killed process may leave a part of a line."""
    if not path.exists():
        return []
    return [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
