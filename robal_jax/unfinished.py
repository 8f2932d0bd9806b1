"""What an interrupted job leaves behind, so that the same command goes on where it was."""

import json
import pathlib
import time
import zipfile
from collections.abc import Mapping
from typing import Any

import numpy as np

from robal_jax import hosts, logs

SAVE_SECONDS = 30.0  # between two saves


class Unfinished:
    """What a part of a job has found so far, in a file that only a job of the same settings reads.

    Attributes:
      arrays: what was saved; empty at the first start.
      seconds: that the part had taken, in all processes, when it was last saved.
    """

    def __init__(self, path: pathlib.Path, settings: Mapping[str, Any]) -> None:
        self._path, self._settings = path, json.dumps(settings, sort_keys=True)
        self.arrays = hosts.by_first(self._read)
        self.seconds, self._saved = float(self.arrays.pop("seconds", 0.0)), time.monotonic()

    def _read(self) -> dict[str, np.ndarray]:
        try:
            with self._path.open("rb") as file, np.load(file) as content:
                arrays = dict(content)
            return arrays if str(arrays.pop("settings")) == self._settings else {}
        except (OSError, ValueError, KeyError, EOFError, TypeError, RuntimeError, zipfile.BadZipFile):
            return {}  # whatever is wrong with it, the job starts anew

    @property
    def due(self) -> bool:
        """Whether the last save lies long enough back."""
        return time.monotonic() - self._saved > SAVE_SECONDS

    def save(self, arrays: Mapping[str, Any]) -> None:
        """Keeps the arrays in the place of those before; the first process does."""
        now = time.monotonic()
        self.seconds, self._saved = self.seconds + now - self._saved, now
        if not hosts.is_first():
            return
        self._path.parent.mkdir(exist_ok=True)
        with logs.replacing(self._path) as file:
            np.savez(file, settings=np.array(self._settings), seconds=np.array(self.seconds), **arrays)
