"""One to 64 devices, compiled: python experiments/benchmarks/scaling.py --workdir=DIR [--chip=h100].

Compiles the training step of RoBal-N in bfloat16 for so many devices, with the batch of 64 images shared by
all and with 64 images on each, and prints how long a device works on a step by the compiler's estimate, what
is exchanged, and how long that takes by a formula. The devices need not be there, but the compiler must be
installed, see experiments/devices.md. What is compiled is kept in the folder, and not compiled again.
"""

import json
import math
import pathlib
import subprocess
import sys
from typing import Any, NamedTuple

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

from robal_jax import cli
from robal_jax.errors import InputError

SCRIPT = pathlib.Path(__file__).resolve().parents[1] / "compile.py"
NETWORKS = {"WRN-34-10": (), "ResNet-18": ("--config.model.name=resnet18",)}
BATCH = 64  # the paper's


class Links(NamedTuple):
    """Connections between devices. The rates are from data sheets; the seconds of a hop are guesses.

    Attributes:
      layouts: of the topology by number of devices.
      near: devices that the first links connect.
      rates: bytes per second of a device in one direction: to those, and beyond.
      hops: seconds of one hop: to those, and beyond.
    """

    layouts: dict[int, str]
    near: int
    rates: tuple[float, float]
    hops: tuple[float, float]

    def seconds(self, size: float, count: int, devices: int) -> float:
        """Returns the time of ``count`` reductions of ``size`` bytes together, at half of the links' rate."""
        near = min(devices, self.near)
        stages = zip((near, devices // near), (size, size / near), self.rates, self.hops, strict=True)
        return sum(
            2 * (n - 1) / n * part / (rate / 2) + count * 2 * math.log2(n) * hop
            for n, part, rate, hop in stages
        )


LINKS = {
    # NVIDIA, H100 and DGX H100: NVLink 900 GB/s both ways among 8, one 400 Gb/s InfiniBand port per GPU
    "h100": Links({n: str(n) for n in (1, 8, 16, 32, 64)}, 8, (450e9, 50e9), (3e-6, 5e-6)),
    # Google Cloud, TPU v5e: interconnect 400 GB/s both ways, 256 chips in a 2D torus
    "v5e": Links({4: "2x2", 8: "2x4", 16: "4x4", 64: "8x8"}, 256, (200e9, 200e9), (1e-6, 1e-6)),
}


def compiled(workdir: pathlib.Path, network: str, topology: str, batch: int) -> dict[str, Any]:
    """Returns the figures of a training step, compiled now or before.

    Raises:
      InputError: it cannot be compiled.
    """
    path = workdir / f"{network}-{topology.replace(':', '-')}-{batch}.json"
    if not path.exists():
        print(f"compiling {network} for {topology}, {batch} images", file=sys.stderr, flush=True)
        flags = [
            "--config=robal_n:cifar10_lt",
            f"--topology={topology}",
            "--programs=train",
            f"--json={path}",
        ]
        fields = [f"--config.train.batch_size={batch}", "--config.train.precision=bfloat16"]
        command = [sys.executable, str(SCRIPT), *flags, *fields, *NETWORKS[network]]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise InputError(f"cannot compile for {topology}: {done.stderr.strip()[-500:]}")
    (program,) = json.loads(path.read_text())["programs"]
    return program


def rows(workdir: pathlib.Path, network: str, chip: str, *, shared: bool) -> list[list[str]]:
    """Returns the rows of a network's table.

    Args:
      workdir: of the figures.
      network: a key of ``NETWORKS``.
      chip: a key of ``LINKS``.
      shared: whether all devices share 64 images, or each has as many.
    """
    links, found, alone = LINKS[chip], [], 0.0
    for devices, layout in links.layouts.items():
        program = compiled(workdir, network, f"{chip}:{layout}", BATCH if shared else BATCH * devices)
        reduced = program["transfers"].get("all-reduce", {"count": 0, "bytes": 0})
        works = program["estimated_seconds"]
        talks = links.seconds(reduced["bytes"], reduced["count"], devices)
        images = BATCH if shared else BATCH * devices
        speed = images / devices / (works + talks)  # of one device
        alone = alone or speed
        found.append(
            [
                str(devices), str(images // devices), f"{program['memory_bytes']['total'] / 1e9:.2f} GB",
                f"{reduced['count']}, {reduced['bytes'] / 1e6:.1f} MB", f"{1e3 * works:.2f}",
                f"{1e3 * talks:.2f}", f"{speed:,.0f}", f"{speed / alone:.0%}",
            ]
        )  # fmt: skip
    return found


HEADER = (
    "devices", "images per device", "memory", "all-reduces", "works, ms", "exchanges, ms",
    "images/s per device", "of the first row",
)  # fmt: skip


def main(arguments: list[str]) -> None:
    """Prints the tables."""
    texts = {"workdir": "folder of what was compiled", "chip": f"one of {', '.join(LINKS)}; h100 by default"}
    values = cli.parse(arguments, texts, __doc__)
    if not values["workdir"]:
        raise InputError(f"--workdir is missing; usage: {__doc__.splitlines()[0]}")
    chip, workdir = values["chip"] or "h100", pathlib.Path(values["workdir"])
    if chip not in LINKS:
        raise InputError(f"unknown chip {chip!r}; use {' or '.join(LINKS)}")
    workdir.mkdir(parents=True, exist_ok=True)
    for network in NETWORKS:
        for shared in (True, False):
            title = f"{BATCH} images on all devices together" if shared else f"{BATCH} images on each device"
            table = [HEADER, ["---:"] * len(HEADER), *rows(workdir, network, chip, shared=shared)]
            print(f"\n{network}, {chip}, {title}\n")
            print("\n".join(f"| {' | '.join(row)} |" for row in table), flush=True)


if __name__ == "__main__":
    cli.run(main)
