"""The training step beside PyTorch's: python experiments/benchmarks/step.py [--networks=NAME] [--batch=64].

The steps of RoBal-N and of plain adversarial training, as in ``experiments/train.py`` (a chunk of steps in
one dispatch, with augmentation), beside the released algorithm in PyTorch (float32, four outer passes) and
beside the same mathematics as fast as PyTorch computes it (two passes; channels_last, torch.compile, and on a
GPU bfloat16). All run in turn, each in its own process; PyTorch gets ready tensors and does not augment.
Needs PyTorch.
"""

import pathlib
import sys
from collections.abc import Callable, Mapping
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

from experiments.benchmarks import measure
from robal_jax import cli

NETWORKS: dict[str, dict[str, Any]] = {
    "digits_cnn": {"name": "small_cnn"},
    "wrn_16_2": {"name": "wide_resnet", "depth": 16, "widen": 2},
    "resnet20": {"name": "resnet20"},
    "resnet18": {"name": "resnet18"},
    "wrn_34_10": {"name": "wide_resnet", "depth": 34, "widen": 10},
}
METHODS = ("robal_n", "at")
Changes = Mapping[str, Mapping[str, Any]]
NO_CHANGES: Changes = {}


def shape(network: str) -> tuple[int, int]:
    """Returns the pixels per side and the channels of a network's images."""
    return (8, 1) if network == "digits_cnn" else (32, 3)


def job_of(
    network: str,
    method: str,
    batch: int,
    steps: int,
    precision: str = "default",
    changes: Changes = NO_CHANGES,
) -> Any:
    """Builds training from the method's config on CIFAR-10-LT, with noise for images.

    Args:
      network: a key of ``NETWORKS``.
      method: name of a config.
      batch: images per step.
      steps: of a dispatch.
      precision: ``config.train.precision``.
      changes: fields of sections of the config; a section with a name is replaced.
    """
    import importlib

    from ml_collections import ConfigDict

    from robal_jax import builder

    pixels, channels = shape(network)
    config = (
        importlib.import_module(f"configs.{method}").get_config("cifar10_lt").copy_and_resolve_references()
    )
    with config.unlocked():
        config.data = ConfigDict(
            {
                "name": "experiments.benchmarks.measure:random_images",
                "pixels": pixels, "channels": channels, "images": max(512, steps * batch),
            }
        )  # fmt: skip
        config.model = ConfigDict(NETWORKS[network])
        config.train.batch_size, config.train.steps_per_dispatch = batch, steps
        config.train.precision = precision
        for section, fields in changes.items():
            if "name" in fields:
                config[section] = ConfigDict(fields)
            else:
                config[section].update(fields)
    return builder.training(config)


def ours(
    network: str, method: str, batch: int, steps: int, precision: str, changes: Changes = NO_CHANGES
) -> Callable[[], None]:
    """Returns a chunk of steps as in training."""
    import jax

    from robal_jax import training
    from robal_jax.devices import parallel
    from robal_jax.training import initial_state

    job = job_of(network, method, batch, steps, precision, changes)
    devices = parallel.devices_for(job.settings.layout)
    chunk, where = training.compiled_chunk(job, devices), training.positions(job)
    data = training.Examples(job.images, job.labels)
    state = jax.jit(lambda: initial_state(job))()
    state, data, key = parallel.replicate((state, data, jax.random.key(0)), devices)
    rows, count = next(training.chunks(job, 0))
    box = [state]

    def run() -> None:
        box[0], sums = chunk(box[0], data, rows, count, key, where)
        jax.device_get(sums)

    return run


def theirs(network: str, method: str, batch: int, steps: int, variant: Any) -> Callable[[], None]:
    """Returns the same number of steps in PyTorch."""
    import torch

    from experiments.benchmarks import torch_networks as nets
    from experiments.benchmarks import torch_step

    backbone, width = nets.BACKBONES[network]()
    head = nets.CosineHead(width, 10) if method == "robal_n" else torch.nn.Linear(width, 10)
    model = nets.randomised(nets.RoBal(backbone, head))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    step = torch_step.stepper(model, variant, robal=method == "robal_n", device=device)
    pixels, channels = shape(network)
    x = torch.rand(batch, channels, pixels, pixels, device=device)
    y = torch.arange(batch, device=device) % 10

    def run() -> None:
        for _ in range(steps):
            loss = step(x, y)
        loss.item()

    return run


def main(arguments: list[str]) -> None:
    """Times everything and prints a table."""
    texts = {
        "networks": f"some of {','.join(NETWORKS)}; digits_cnn,wrn_16_2,resnet18 if not given",
        "methods": "robal_n,at",
        "batch": "sizes, 16,64",
        "steps": "of a timed call, in one dispatch, 4; a training run makes 20",
        "repeats": "timed calls of each, 5",
        "precision": "ours, one or more of config.train.precision; default",
        "variants": "of PyTorch beside the released one: names as printed, split by ';'; all if not given",
        "json": "file for the record",
    }
    values = cli.parse(arguments, texts, __doc__)
    import torch

    from experiments.benchmarks import torch_step

    networks = (values["networks"] or "digits_cnn,wrn_16_2,resnet18").split(",")
    methods = (values["methods"] or ",".join(METHODS)).split(",")
    sizes = [int(size) for size in (values["batch"] or "16,64").split(",")]
    steps, repeats = int(values["steps"] or 4), int(values["repeats"] or 5)
    precisions = (values["precision"] or "default").split(",")
    variants = torch_step.GPU_VARIANTS if torch.cuda.is_available() else torch_step.CPU_VARIANTS
    chosen = values["variants"].split(";") if values["variants"] else [v.name for v in variants]
    rows: list[dict[str, Any]] = []
    print(measure.heading())
    print(f"Milliseconds per step, medians of {repeats} (least-most) of {steps} steps each, in turn\n")
    for network in networks:
        for method in methods:
            for batch in sizes:
                given = (network, method, batch, steps)
                ways = {f"ours {p}": measure.in_own_process(ours, *given, p) for p in precisions}
                for variant in (torch_step.RELEASED, *(v for v in variants if v.name in chosen)):
                    ways[variant.name] = measure.in_own_process(theirs, *given, variant)
                times = measure.interleaved(ways, repeats)
                rows += report(network, method, batch, steps, times)
                measure.record(values["json"], rows)


def report(
    network: str, method: str, batch: int, steps: int, times: dict[str, measure.Times]
) -> list[dict[str, Any]]:
    """Prints and returns the rows of one configuration."""
    peers = {name: t for name, t in times.items() if not name.startswith("ours") and name != "released"}
    best = min(peers.values()) if peers else None
    rows = []
    for name, seconds in times.items():
        each = seconds.per(steps)
        row: dict[str, Any] = {
            "network": network,
            "method": method,
            "batch": batch,
            "way": name,
            **each._asdict(),
        }
        text = f"{network:10s} {method:8s} {batch:4d}  {name:32s} {each:.4g} ms"
        if name.startswith("ours"):
            row["of_released"] = seconds.median / times["released"].median
            text += f"  {row['of_released']:.2f} of released"
            if best:
                row["of_best_tuned"] = seconds.median / best.median
                text += f", {row['of_best_tuned']:.2f} of best tuned"
        print(text, flush=True)
        rows.append(row)
    return rows


if __name__ == "__main__":
    cli.run(main)
