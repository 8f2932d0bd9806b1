"""Compile: python experiments/compile.py --config=METHOD:DATA --topology=v5e:2x4 [--config.KEY=VALUE].

Compiles the programs of a run (the training step, the evaluation's conditions, each attack) for devices that
need not be there, and prints memory, work and the compiler's estimate of the time. Nothing is run. CIFAR's
images are not needed: only their sizes count.
"""

import json
import os
import pathlib
import sys
import tempfile
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from ml_collections import ConfigDict

from robal_jax import cli
from robal_jax.devices import chips
from robal_jax.errors import InputError

TEXTS = {
    "config": "config file and data set, as for train.py",
    "topology": "v5e:4x8, v5p:2x2x2, v6e:4x4, h100:8 or the like; the devices present if not given",
    "programs": "some of train, conditions and the ensemble's attacks, with commas between; all by default",
    "json": "file for the figures",
    "largest": "compiles for twice the images as well, and estimates how many would fit",
}

CIFAR = {"cifar10_lt": 10, "cifar100_lt": 100}
"""Classes of the data sets whose images are replaced by black ones."""


def black_images(name: str, folder: pathlib.Path) -> pathlib.Path:
    """Writes a file with images of CIFAR's number and size, for ``config.data.path``; returns where."""
    import numpy as np

    path, arrays = folder / "black.npz", dict[str, Any]()
    for split, count in ("train", 50000), ("test", 10000):
        arrays[f"{split}_images"] = np.zeros((count, 32, 32, 3), np.uint8)
        arrays[f"{split}_labels"] = np.arange(count) % CIFAR[name]
    np.savez(path, **arrays)
    return path


def doubled(config: ConfigDict) -> ConfigDict:
    """Returns a config with twice the images in every batch."""
    other = config.copy_and_resolve_references()
    with other.unlocked():
        other.train.batch_size *= 2
        other.evaluation.batch_size *= 2
    return other


def main(arguments: list[str]) -> None:
    """Prints the estimates of the programs of ``robal_jax.compiling``."""
    arguments, overrides = cli.split_overrides(arguments)
    values = cli.parse(arguments, TEXTS, __doc__, switches=("largest",))
    if not values["config"]:
        raise InputError(f"--config is missing; usage: {__doc__.splitlines()[0]}")
    config = cli.apply_overrides(cli.load_config(values["config"]), overrides)

    topology = values["topology"].lower()
    chip = chips.chip_of(topology) if topology else None
    if topology:
        chips.prepare(topology, os.environ)

    import jax  # after its settings

    from robal_jax.compiling import estimates
    from robal_jax.compiling.text import described
    from robal_jax.devices import targets
    from robal_jax.storage.files import check_replaceable, write_whole

    if values["json"]:
        check_replaceable(pathlib.Path(values["json"]), '"topology"')
        pathlib.Path(values["json"]).parent.mkdir(parents=True, exist_ok=True)
    devices = targets.devices_of(topology) if topology else jax.devices()
    count, kind = len(devices), devices[0].device_kind
    print(f"{count} x {kind}; estimates of the compiler, nothing is measured", flush=True)
    found = []
    with tempfile.TemporaryDirectory() as folder:
        if config.data.name in CIFAR:
            with config.unlocked():
                config.data.path = str(black_images(config.data.name, pathlib.Path(folder)))
        names = [name.strip() for name in values["programs"].split(",") if name.strip()]
        larger = doubled(config) if values["largest"] else None
        for each in estimates.estimates(config, devices, names, doubled=larger):
            found.append(estimates.as_values(each, chip))
            print(f"\n{described(found[-1], chip)}", flush=True)
    if values["json"]:
        about = {"topology": topology or kind, "devices": count, "jax": jax.__version__, "programs": found}
        write_whole(pathlib.Path(values["json"]), f"{json.dumps(about, indent=1)}\n".encode())


if __name__ == "__main__":
    cli.run(main)
