"""Weights & Biases and trackio, which may receive the metrics of a run too.

All that training knows of a tracker is one function, :data:`Track`.
"""

import contextlib
import importlib
import json
import pathlib
import re
import secrets
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from robal_jax.devices import hosts
from robal_jax.errors import InputError, one_line
from robal_jax.storage import buckets
from robal_jax.storage.files import write_whole
from robal_jax.storage.names import CONFIG, TRACKED

Track = Callable[[int, Mapping[str, float]], None]
"""``(step, {name: value})``: receives the metrics of one dispatch. Its failure does not end the training."""

_OWN: dict[str, Callable[[str, pathlib.Path], dict[str, Any]]] = {
    "wandb": lambda name, workdir: {"id": name, "dir": str(workdir)},
    "trackio": lambda name, workdir: {},
}
"""Name of each package to the arguments that only its ``init`` takes."""


@contextlib.contextmanager
def tracking(flag: str, workdir: pathlib.Path) -> Iterator[Track | None]:
    """Yields the tracker that ``--track`` names; None for '', and in all processes but the first.

    It opens the package's run when it receives the first metrics. A resumed training continues that run.

    Args:
      flag: 'wandb' or 'trackio', with ':PROJECT' if the project is not to be 'robal_jax'.
      workdir: folder of the run; its config is sent along.

    Raises:
      InputError: there is no such tracker, or its package is not installed.
    """
    package, _, project = flag.partition(":")
    if flag and package not in _OWN:
        raise InputError(f"unknown tracker {package!r}; use --track=wandb or --track=trackio")
    if not flag or not hosts.is_first():
        yield None
        return
    module = _import(package)
    opened = False

    def track(step: int, values: Mapping[str, float]) -> None:
        nonlocal opened
        if not opened:
            name = _name(workdir)
            module.init(
                project=project or "robal_jax",
                name=name,
                config=json.loads((workdir / CONFIG).read_text()),
                resume="allow",
                **_OWN[package](name, workdir),
            )
            opened = True
        module.log(dict(values), step=step)

    try:
        yield track
    finally:
        if opened:
            with contextlib.suppress(Exception):  # what it has not sent by now is in metrics.jsonl
                module.finish()


def _import(package: str) -> Any:
    try:
        module = importlib.import_module(package)
    except Exception as error:  # a damaged installation may raise anything
        raise InputError(_missing(package, one_line(error))) from error
    if not hasattr(module, "init"):  # a folder ./wandb, which wandb leaves, can be imported too
        raise InputError(_missing(package, "no such package"))
    return module


def _missing(package: str, why: str) -> str:
    return f"cannot import {package} ({why}); install it, pip install {package}, or leave out --track"


def _name(workdir: pathlib.Path) -> str:
    """Returns the name of the tracker's run, which is drawn once per workdir."""
    path = workdir / TRACKED
    if not path.exists():
        place = buckets.url_of(workdir) or str(workdir.resolve())
        stem = re.sub(r"[^\w-]+", "-", place.rpartition("/")[2])
        write_whole(path, f"{stem}-{secrets.token_hex(4)}\n".encode())
    return path.read_text().strip()
