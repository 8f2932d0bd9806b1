"""A small data set, and a config in which every ingredient of training is on."""

import pathlib
import sys

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from robal_jax import cli
from robal_jax.data import Dataset

COUNTS = (40, 20, 12, 8)


def tiny_images():
    """Four classes of 16 x 16 colour images, 40 to 8 of each; the classes differ in colour."""
    rng = np.random.RandomState(0)

    def draw(counts):
        labels = np.repeat(np.arange(len(counts)), counts).astype(np.int32)
        noise = rng.randint(0, 128, (len(labels), 16, 16, 3))
        return (noise + 40 * labels[:, None, None, None] % np.array([97, 128, 71])).astype(np.uint8), labels

    train, test = draw(COUNTS), draw((8,) * len(COUNTS))
    return Dataset(*train, *test, pixel_max=255, class_names=tuple("abcd"))


def get_config(method="trades"):
    """Returns the config of a method with everything on, for a network that compiles fast."""
    config = cli.load_config(f"{method}:cifar10_lt")
    with config.unlocked(), config.ignore_type():
        config.data = {"name": "ingredients:tiny_images"}
        config.model = {"name": "small_cnn", "channels": (4, 4, 4), "width": 8}
        config.attack.update({"steps": 2, "start": "uniform_clipped", "batch_norm": "batch"})
        config.perturbation = {"name": "awp", "gamma": 0.01, "start": 2}
        config.average = {"name": "ema", "decay": 0.9, "warmup": 0.5}
        config.threat.budget = {"name": "cfa", "start": 2}
        config.threat.ramp = 0.5
        config.optimizer.update({"nesterov": True, "decayed": "weights"})
        config.schedule = {"name": "cosine", "lr": 0.05, "warmup": 1}
        config.train.update(
            {"epochs": 4, "batch_size": 16, "steps_per_dispatch": 2, "checkpoint_epochs": 1}
            | {"augmentation": "randaugment,crop_flip,cutout", "mixing": "cutmix", "label_smoothing": 0.1}
        )
        config.evaluation.update({"autoattack": "apgd_ce", "weights": "average"})
        config.evaluation.audit.examples = 0
    return config
