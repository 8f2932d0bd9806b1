"""A model of the zoo in PyTorch under torchattacks' attacks with AutoAttack's settings, beside our outcomes.

    python experiments/benchmarks/zoo_torch.py --model=cifar10_lt/at_resnet20 --evaluation=FOLDER \
      --images=200 --data=cifar10.npz

The weights are the exported file, read by PyTorch; FOLDER is an evaluation of this model by AutoAttack, of
whose images some, drawn at random, are attacked again. Prints, per attack, how many images survive it and all
attacks before it on either side, and how many outcomes differ. Needs the data set (--data=FILE.npz), PyTorch
and torchattacks (pip install --no-deps torchattacks).
"""

import pathlib
import sys
import time
from collections import OrderedDict

import numpy as np
import safetensors.torch
import torch

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

from experiments.benchmarks import torch_networks as nets
from experiments.benchmarks.evaluation import torch_ensemble
from robal_jax import cli, zoo
from robal_jax.errors import InputError
from robal_jax.reporting.results import read_run
from robal_jax.zoo.models import FOLDER


class Scaled(torch.nn.Module):
    """The network as it is evaluated: ``scale * logits - tau * log prior``."""

    def __init__(self, network: torch.nn.Module, scale: float, bias: torch.Tensor) -> None:
        super().__init__()
        self.network, self.scale, self.bias = network, scale, bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Images ``[B, 3, H, W]`` to logits."""
        return self.scale * self.network(x) - self.bias


def in_torch(name: str) -> torch.nn.Module:
    """Returns a model of the zoo in PyTorch, in evaluation mode."""
    card = zoo.read_card(name)
    settings, data = card["config"]["evaluation"], card["data"]
    kind = card["config"]["model"]["name"]
    backbone, width = nets.BACKBONES["digits_cnn" if kind == "small_cnn" else kind]()
    classes = len(data["classes"])
    head = card["config"]["head"]
    classifier = (
        nets.CosineHead(width, classes, moving=False, scale=head["scale"], gamma=head["gamma"])
        if head["name"] == "cosine"
        else torch.nn.Sequential(OrderedDict(fc=torch.nn.Linear(width, classes)))
    )
    network = nets.RoBal(backbone, classifier)
    network.load_state_dict(safetensors.torch.load_file(FOLDER / f"{name}.safetensors"))
    counts = torch.tensor(data.get("trained_counts", data["class_counts"]), dtype=torch.float32)
    bias = settings["tau_p"] * (counts / counts.sum()).log()
    return Scaled(network, settings["logit_scale"], bias).eval()


def main(arguments: list[str]) -> None:
    """Attacks the model of the flags in PyTorch."""
    texts = {
        "model": "name in the zoo",
        "evaluation": "folder of its evaluation by AutoAttack",
        "images": "number of images, 200 by default",
        "data": "an .npz file with test_images",
    }
    values = cli.parse(arguments, texts, __doc__)
    for name in ("model", "evaluation", "data"):
        if not values[name]:
            raise InputError(f"--{name} is missing; give --model, --evaluation and --data")
    run, model = read_run(pathlib.Path(values["evaluation"])), in_torch(values["model"])
    chosen = np.sort(
        np.random.default_rng(0).permutation(len(run.examples["ids"]))[: int(values["images"] or 200)]
    )
    with np.load(values["data"]) as data:
        images = data["test_images"][run.examples["ids"][chosen]]
    largest = zoo.read_card(values["model"])["data"]["pixel_max"]
    x = torch.tensor(np.moveaxis(images, -1, 1).astype(np.float32) / largest).contiguous()
    y = torch.tensor(run.examples["labels"][chosen]).long()
    eps = run.meta["epsilon"]
    attacks = torch_ensemble(model, eps, steps=100, queries=5000)
    outcomes = {"apgd_ce": "apgd_ce", "apgd_t": "robal_aa", "fab_t": "", "square": "autoattack"}

    @torch.no_grad()
    def right(shown: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return model(shown).argmax(1) == labels

    def ours(condition: str) -> np.ndarray:
        found = run.predictions[condition] == run.examples["labels"]
        return (found & (run.predictions["clean"] == run.examples["labels"]))[chosen]

    robust = right(x, y)
    print(f"{values['model']}, {len(y)} images: clean {int(robust.sum())}, ours {int(ours('clean').sum())}")
    for name, outcome in outcomes.items():
        started, before = time.monotonic(), robust.clone()
        if before.any():
            found = attacks[name]()(x[before], y[before])
            far = (found - x[before]).abs().flatten(1).amax(1) > eps * (1 + 1e-5)  # FAB's may leave the ball
            robust[before] = right(found, y[before]) | far
        line = f"after {name}: {int(robust.sum())} in PyTorch"
        if outcome:
            same = ours(outcome)
            line += f", ours {int(same.sum())}, {int((robust.numpy() != same).sum())} outcomes differ"
        print(f"{line}; {time.monotonic() - started:.0f} s", flush=True)


if __name__ == "__main__":
    cli.run(main)
