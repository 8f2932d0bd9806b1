"""The state of an interrupted evaluation, from which the same command resumes."""

import json
import pathlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from robal_jax.devices import hosts
from robal_jax.errors import UNREACHABLE
from robal_jax.storage.config_file import WITHOUT_ATTACKS, evaluation_fields
from robal_jax.storage.files import replacing

SAVE_SECONDS = 30.0  # between two saves, at least

SHARE_OF_SAVING = 0.1  # of the time, at most

PARTS = ("conditions", "ensemble", "distances", "audit", "corruptions", "certified", "optimality")
"""Names of the parts of an evaluation, each with a file of its own."""


class Unfinished:
    """The results of a part of a job so far, in a file that only the same job reads.

    Attributes:
      arrays: the saved arrays; empty at the first start.
      seconds: run time of the part until it was last saved.
    """

    def __init__(self, path: pathlib.Path, identity: Mapping[str, Any]) -> None:
        """Reads the file if it belongs to this job.

        Args:
          path: of the file.
          identity: JSON values on which the results depend. The file is read only if it has the same values;
            of ``config``, only the fields of :func:`compared` count.
        """
        self._path, self._identity = path, json.loads(json.dumps(identity))
        self.arrays = hosts.by_first(self._read)
        self.seconds = float(self.arrays.pop("seconds", 0.0))
        self._counted = self._saved = time.monotonic()
        self._took = 0.0

    def _read(self) -> dict[str, np.ndarray]:
        arrays = _arrays(self._path)
        written = _settings(arrays)
        same = written is not None and compared(written, self._identity) == compared(
            self._identity, self._identity
        )
        return {name: values for name, values in arrays.items() if name != "settings"} if same else {}

    @property
    def due(self) -> bool:
        """Whether it is time to save again; what takes long to save is saved less often."""
        return time.monotonic() - self._saved > max(SAVE_SECONDS, self._took / SHARE_OF_SAVING)

    def save(self, arrays: Mapping[str, Any] | Callable[[], Mapping[str, Any]]) -> None:
        """Replaces the saved arrays, or those that a function makes; only in the first process."""
        started = time.monotonic()
        self.seconds, self._counted = self.seconds + started - self._counted, started
        if hosts.is_first():
            self._write(arrays() if callable(arrays) else arrays)
        self._saved = time.monotonic()
        self._took = self._saved - started

    def _write(self, arrays: Mapping[str, Any]) -> None:
        self._path.parent.mkdir(exist_ok=True)
        with replacing(self._path) as file:
            np.savez(
                file, settings=np.array(json.dumps(self._identity)), seconds=np.array(self.seconds), **arrays
            )


def read_identity(path: pathlib.Path) -> dict[str, Any] | None:
    """Returns the identity of the job that left a file; None if the file is missing or damaged."""
    return _settings(_arrays(path, ["settings"]))


def _arrays(path: pathlib.Path, names: Sequence[str] = ()) -> dict[str, np.ndarray]:
    """Reads the arrays of a file, or some of them; empty if it is missing or damaged.

    Raises:
      OSError: the drive cannot be read now; what it holds may be whole.
    """
    try:
        with path.open("rb") as file, np.load(file) as content:
            return {name: content[name] for name in names or content.files}
    except Exception as error:  # whatever is wrong with the file, the job starts from the beginning
        if isinstance(error, OSError) and error.errno in UNREACHABLE:
            raise
        return {}


def _settings(arrays: Mapping[str, np.ndarray]) -> dict[str, Any] | None:
    try:
        settings = json.loads(str(arrays["settings"]))
    except (LookupError, ValueError):
        return None
    return settings if isinstance(settings, dict) else None


LATER = ("gradients", "near", "surrogate_sha256", "surrogate_code_sha256", "code_sha256")
"""Values of an identity that older evaluations lack; there, nothing tells them from those of today."""


def compared(written: dict[str, Any], identity: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the part of ``written`` to compare with ``identity``.

    Of ``config``, it has the fields on which what an evaluation finds depends.
    """
    if "method" in written:  # robal_jax 0.1.0 stored everything that its report said
        written = {name: written.get(name) for name in identity if name in written or name not in LATER}
    written = {name: identity[name] for name in LATER if name in identity} | written
    config = written.get("config")
    if not isinstance(config, dict):
        return written
    fields = evaluation_fields(config)
    return {**written, "config": {name: fields[name] for name in fields if name not in WITHOUT_ATTACKS}}
