"""Progress of a long job on the terminal, and the scalars of a training run."""

import contextlib
import json
import pathlib
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from tensorboardX import SummaryWriter

from robal_jax.errors import one_line
from robal_jax.storage.files import write_whole
from robal_jax.storage.names import METRICS, TENSORBOARD
from robal_jax.storage.trackers import Track


@contextlib.contextmanager
def announced(text: str, after: float = 2.0) -> Iterator[None]:
    """Shows ``text`` on stderr if the work inside takes longer than ``after`` seconds."""
    timer = threading.Timer(after, partial(print, text, file=sys.stderr, flush=True))
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


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
    """Scalars of a run as JSON lines, which are the source of truth, for TensorBoard, and for a tracker.

    When it is opened at step ``step``, it drops what an interrupted run logged after that step, so that no
    step is logged twice.
    """

    def __init__(
        self,
        workdir: pathlib.Path,
        step: int,
        say: Callable[[str], None] = print,
        track: Track | None = None,
    ) -> None:
        path = workdir / METRICS
        kept = [line for line in _whole_lines(path) if json.loads(line)["step"] <= step]
        write_whole(path, "".join(kept).encode())
        self._lines = path.open("a", buffering=1)
        self._say, self._track = say, track
        self._board = SummaryWriter(str(workdir / TENSORBOARD), purge_step=step + 1 if step else None)

    def write(self, step: int, values: dict[str, Any]) -> None:
        """Writes one row."""
        self._lines.write(json.dumps({"step": step, **values}) + "\n")
        for name, value in values.items():
            self._board.add_scalar(name, value, step)
        if self._track is not None:
            try:
                self._track(step, values)
            except Exception as error:  # of a package, or of the network
                self._track = None
                self._say(
                    f"warning: the tracker failed ({one_line(error)}); training continues without it, and "
                    f"{METRICS} has all metrics"
                )

    def __enter__(self) -> "Scalars":
        return self

    def __exit__(self, *_: object) -> None:
        self._lines.close()
        self._board.close()


def _whole_lines(path: pathlib.Path) -> list[str]:
    """Reads the complete lines of a file; a killed process may leave a part of a line."""
    if not path.exists():
        return []
    return [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
