"""Shared by all benchmarks: timing in turn, medians with their spread, and a record in JSON."""

import contextlib
import datetime
import importlib.metadata
import json
import multiprocessing
import os
import pathlib
import platform
import reprlib
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import numpy as np

from robal_jax.data import Dataset
from robal_jax.data.sources import SOURCES
from robal_jax.storage.workdir import processor

# Leaves memory of a GPU to PyTorch and other processes; JAX reads it when it looks for its devices.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

DIGITS_MODELS = ("digits_lt/at_small_cnn", "digits_lt/robal_n_small_cnn")  # of the zoo

LIBRARIES = ("jax", "jaxlib", "flax", "torch", "torchattacks", "foolbox")


class Times(NamedTuple):
    """Seconds of several calls of one way to do the work."""

    median: float
    low: float
    high: float

    def __format__(self, spec: str) -> str:
        """Formats milliseconds as '812 (803-840)'; ``spec`` is that of each number."""
        median, low, high = (format(1e3 * seconds, spec or ".3g") for seconds in self)
        return f"{median} ({low}-{high})"

    def per(self, count: float) -> "Times":
        """Returns the times of one of ``count`` equal parts."""
        return Times(*(seconds / count for seconds in self))


def digits_of(model: Any, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns images, floats in [0, 1], and labels, spread evenly over a zoo model's test set."""
    config = model.card["config"]
    fields = {key: value for key, value in config["data"].items() if key != "name"}
    data = SOURCES[config["data"]["name"]](**fields)
    ids = np.linspace(0, len(data.test_labels) - 1, count).round().astype(int)
    return np.asarray(data.test_images[ids], np.float32) / np.float32(data.pixel_max), data.test_labels[ids]


def interleaved(ways: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, Times]:
    """Times each way in turn, so that other load on the machine affects all of them alike.

    Args:
      ways: each returns when its work is done; one untimed call comes first.
      repeats: timed calls of each.
    """
    for way in ways.values():
        way()
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, way in ways.items():
            started = time.perf_counter()
            way()
            seconds[name].append(time.perf_counter() - started)
    return {name: Times(statistics.median(all_), min(all_), max(all_)) for name, all_ in seconds.items()}


def in_own_process(make: Callable[..., Callable[[], Any]], *arguments: Any) -> Callable[[], Any]:
    """Returns ``make(*arguments)``, run in a process of its own that lives as long as this one.

    Two libraries then share no allocator, no threads and no memory of a GPU.

    Args:
      make: a function of a module. It and the function that it returns run in the other process; the results
        of the latter are returned here.
      *arguments: of ``make``.
    """
    ours, theirs = multiprocessing.Pipe()
    context = multiprocessing.get_context("spawn")
    context.Process(target=_serve, args=(theirs, make, arguments), daemon=True).start()
    theirs.close()

    def answer() -> Any:
        try:
            return ours.recv()
        except EOFError as error:
            name = f"{make.__name__}{reprlib.repr(arguments)}"
            raise RuntimeError(f"{name} failed; see its message above") from error

    def run() -> Any:
        ours.send(True)
        return answer()

    answer()  # when it is made
    return run


def _serve(connection: Connection, make: Callable[..., Callable[[], Any]], arguments: Any) -> None:
    run = make(*arguments)
    connection.send(True)
    with contextlib.suppress(EOFError):  # the other side has ended
        while connection.recv():
            connection.send(run())


def device() -> str:
    """Returns the name and number of the accelerators, or of the cores of the CPU, that JAX computes on."""
    import jax

    if jax.default_backend() != "cpu":
        return f"{jax.device_count()} x {jax.devices()[0].device_kind}"
    return f"{os.cpu_count()} x {processor()}"


def versions() -> dict[str, str]:
    """Returns the versions of Python and of those compared libraries that are installed."""
    found = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def heading() -> str:
    """Returns the line above a table: device, date, versions and the compiler's flags."""
    said = ", ".join(f"{name} {version}" for name, version in versions().items())
    flags = f", XLA_FLAGS {os.environ['XLA_FLAGS']}" if os.environ.get("XLA_FLAGS") else ""
    return f"{device()}, {datetime.date.today()}, {said}{flags}"


def record(path: str, rows: list[dict[str, Any]]) -> None:
    """Writes the measurements with device, versions, date and command; nothing if the path is ''."""
    if not path:
        return
    fields = {
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "command": shlex.join(["python", *(a for a in sys.argv if not a.startswith("--json"))]),
        "device": device(),
        "cores": os.cpu_count(),
        "versions": versions(),
        "XLA_FLAGS": os.environ.get("XLA_FLAGS", ""),
        "rows": rows,
    }
    target = pathlib.Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(fields, indent=2) + "\n")


def random_images(*, pixels: int, channels: int = 3, images: int = 512, num_classes: int = 10) -> Dataset:
    """Returns a data set of noise, for training where only the time matters."""
    rng = np.random.default_rng(0)
    shown = rng.integers(0, 256, (images, pixels, pixels, channels), dtype=np.uint8)
    labels = (np.arange(images) % num_classes).astype(np.int32)
    names = tuple(str(label) for label in range(num_classes))
    tests = 2 * num_classes
    return Dataset(shown, labels, shown[:tests], labels[:tests], 255, names)
