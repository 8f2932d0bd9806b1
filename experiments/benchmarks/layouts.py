"""One run on many layouts: python experiments/benchmarks/layouts.py [--steps=20] [--out=FILE.md].

Trains RoBal-N on the digits with augmentation, or another config, on fake CPU devices: with jit and
with pmap on 1, 2, 4 and 8 of them, and in two processes with two each; in float64 and in float32. Prints the
largest differences from one device: of the parameters and of the batch-norm statistics after the last step,
and of the loss at any step, relative to it.

The differences arise because each layout rounds a sum over the batch in a different order. In float64 this is
the only effect. In float32 the gradient of a pixel may be so close to 0 that rounding decides its sign; the
attack then moves this pixel in the opposite direction, and the runs differ from there on, as if a different
noise had been drawn for this pixel.
"""

import json
import os
import pathlib
import re
import socket
import subprocess
import sys
import tempfile
from typing import NamedTuple

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

import numpy as np
from flax.traverse_util import flatten_dict

from robal_jax import cli
from robal_jax.errors import InputError
from robal_jax.storage import checkpoints

ROOT = pathlib.Path(__file__).resolve().parents[2]


class Layout(NamedTuple):
    """Number of processes, devices of each, and ``config.train.layout``."""

    name: str = "jit"
    devices: int = 1
    processes: int = 1

    def __str__(self) -> str:
        if self.processes > 1:
            return f"{self.name}, {self.processes} processes of {self.devices}"
        return f"{self.name}, {self.devices} device{'s' * (self.devices > 1)}"


class Trained(NamedTuple):
    """The result of a run: parameters with their average, statistics, and the loss of every step."""

    params: dict[str, np.ndarray]
    stats: dict[str, np.ndarray]
    losses: np.ndarray


LAYOUTS = (
    *(Layout(name, devices) for name in ("jit", "pmap") for devices in (1, 2, 4, 8)),
    *(Layout(name, 2, 2) for name in ("jit", "pmap")),
)


GLOO = re.compile(r"\[Gloo\] Rank|is connected to|peer ranks\.|Expected number of connected peer ranks is :")


def free_port() -> int:
    """Returns a port of this machine that is not in use."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]


def start(
    layout: Layout, arguments: list[str], *, script: str = "train", **env: str
) -> list[subprocess.Popen]:
    """Starts a script's processes on a layout of fake CPU devices; ``env`` is added to the environment."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={layout.devices}"
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, **env}
    command = [sys.executable, str(ROOT / f"experiments/{script}.py"), *arguments]
    together = [f"--coordinator=127.0.0.1:{free_port()}", f"--processes={layout.processes}"]
    more = [[*together, f"--process={i}"] for i in range(layout.processes)] if layout.processes > 1 else [[]]
    pipe = subprocess.PIPE
    return [
        subprocess.Popen([*command, *flags], env=env, stdout=pipe, stderr=pipe, text=True) for flags in more
    ]


def finish(processes: list[subprocess.Popen]) -> list[str]:
    """Waits for processes; returns their stdout without the messages of JAX's CPU collectives.

    Raises:
      RuntimeError: a process failed.
    """
    said = [process.communicate() for process in processes]
    for process, (_, errors) in zip(processes, said, strict=True):
        if process.returncode:
            raise RuntimeError(f"status {process.returncode}: {errors[-2000:]}")
    # Several threads write these messages at the same time, so that their pieces mix.
    kept = [GLOO.sub("", out).splitlines(keepends=True) for out, _ in said]
    return ["".join(line for line in out if line.strip(" \n0123456789")) for out in kept]


CONFIG = f"{ROOT / 'configs/robal_n.py'}:digits_lt"


def train(
    layout: Layout, workdir: pathlib.Path, steps: int, *overrides: str, config: str = CONFIG, **env: str
) -> Trained:
    """Trains for a number of steps on a layout."""
    arguments = [
        f"--config={config}",
        f"--workdir={workdir}",
        f"--config.train.max_steps={steps}",
        "--config.train.steps_per_dispatch=1",
        *(["--config.train.augmentation=crop_flip"] if config == CONFIG else []),
        *(f"--config.{override}" for override in (f"train.layout={layout.name}", *overrides)),
    ]
    finish(start(layout, arguments, **env))
    found = checkpoints.read_latest(workdir)
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    losses = np.array([json.loads(line)["loss"] for line in lines])
    tree = found.tree
    params = flatten_dict({name: tree.get(name, {}) for name in ("params", "average", "classes")}, sep="/")
    stats = flatten_dict(tree["stats"], sep="/")
    return Trained(params, stats, losses)


def largest_difference(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> float:
    """Returns the largest difference over all arrays, which must have the same names."""
    if one.keys() != other.keys():
        raise ValueError("the runs have different arrays")
    return float(np.max([np.max(np.abs(one[name] - other[name])) for name in one]))  # NaN if there is any


def differences(one: Trained, other: Trained) -> tuple[float, float, float]:
    """Returns the largest differences of parameters, statistics (both absolute) and losses (relative)."""
    losses = np.max(np.abs(one.losses - other.losses) / np.abs(one.losses))
    return (
        largest_difference(one.params, other.params),
        largest_difference(one.stats, other.stats),
        float(losses),
    )


def table(folder: pathlib.Path, steps: int, config: str = CONFIG) -> str:
    """Returns the table of all layouts in both precisions."""
    rows = {layout: f"| {layout} |" for layout in LAYOUTS}
    for precision, x64 in (("float64", "1"), ("float32", "0")):
        first: Trained | None = None
        for layout in LAYOUTS:
            workdir = folder / precision / str(layout).replace(" ", "_")
            found = train(layout, workdir, steps, config=config, JAX_ENABLE_X64=x64)
            first = first or found
            rows[layout] += "".join(f" {x:.1e} |" for x in differences(first, found))
            print(precision, layout, "done", file=sys.stderr, flush=True)
    names = [f"{p} {what}" for p in ("float64", "float32") for what in ("parameters", "statistics", "loss")]
    head = f"| layout | {' | '.join(names)} |\n|{' --- |' * (len(names) + 1)}\n"
    return head + "\n".join(rows.values()) + "\n"


def main(arguments: list[str]) -> None:
    """Prints the table and writes it to a file if one is named."""
    texts = {
        "steps": "of each run, 20 if not given",
        "config": "of the run, RoBal-N on the digits if not given; 8 devices must divide its batch",
        "out": "file that also receives the table",
    }
    values = cli.parse(arguments, texts, __doc__)
    try:
        steps = int(values["steps"] or 20)
    except ValueError as error:
        raise InputError(f"--steps is {values['steps']!r}; give a number") from error
    with tempfile.TemporaryDirectory() as folder:
        text = table(pathlib.Path(folder), steps, values["config"] or CONFIG)
    print(text, end="")
    if values["out"]:
        pathlib.Path(values["out"]).write_text(text)


if __name__ == "__main__":
    cli.run(main)
