"""The state of an interrupted evaluation, from which the same command resumes."""

import json
import pathlib
import time
from collections.abc import Mapping
from typing import Any

import numpy as np

from robal_jax.devices import hosts
from robal_jax.storage.config_file import evaluation_fields
from robal_jax.storage.files import replacing

SAVE_SECONDS = 30.0  # between two saves


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
            of ``config``, only the :func:`evaluation_fields` are compared.
        """
        self._path, self._identity = path, json.loads(json.dumps(identity))
        self.arrays = hosts.by_first(self._read)
        self.seconds, self._saved = float(self.arrays.pop("seconds", 0.0)), time.monotonic()

    def _read(self) -> dict[str, np.ndarray]:
        try:
            with self._path.open("rb") as file, np.load(file) as content:
                arrays = dict(content)
            written = _compared(json.loads(str(arrays.pop("settings"))))
            if "method" in written:  # robal_jax 0.1.0 stored everything that its report said
                written = {name: written.get(name) for name in self._identity}
            return arrays if written == _compared(self._identity) else {}
        except Exception:  # whatever is wrong with the file, the job starts from the beginning
            return {}

    @property
    def due(self) -> bool:
        """Whether it is time to save again."""
        return time.monotonic() - self._saved > SAVE_SECONDS

    def save(self, arrays: Mapping[str, Any]) -> None:
        """Replaces the saved arrays; only the first process writes."""
        now = time.monotonic()
        self.seconds, self._saved = self.seconds + now - self._saved, now
        if not hosts.is_first():
            return
        self._path.parent.mkdir(exist_ok=True)
        with replacing(self._path) as file:
            np.savez(
                file, settings=np.array(json.dumps(self._identity)), seconds=np.array(self.seconds), **arrays
            )


def _compared(identity: dict[str, Any]) -> dict[str, Any]:
    """Reduces the config in ``identity`` to the fields that an evaluation depends on."""
    config = {"config": evaluation_fields(identity["config"])} if "config" in identity else {}
    return identity | config
