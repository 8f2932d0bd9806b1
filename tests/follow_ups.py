"""Follow-up methods on small images, for tests: what they learn of the classes changes within a few steps."""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from robal_jax import cli


def get_config(method="robustlt_reat"):
    """Returns the config of a method for four classes and a network that compiles fast."""
    config = cli.load_config(f"{method}:cifar10_lt")
    with config.unlocked(), config.ignore_type():
        config.data = {"name": "ingredients:tiny_images"}
        config.model = {"name": "small_cnn", "channels": (4, 4, 4), "width": 8}
        config.attack.steps = 2
        config.attack.first_epoch = min(config.attack.first_epoch, 2)
        config.schedule.lr = 0.05
        config.train.update({"epochs": 3, "batch_size": 16, "steps_per_dispatch": 2, "checkpoint_epochs": 1})
        late = {"cfa": {"start": 1}, "dafa": {"epoch": 1}}
        config.threat.budget.update(late.get(config.threat.budget.name, {}))
        if config.loss.name == "staged":
            config.loss.start = 2
        config.evaluation.update({"autoattack": "apgd_ce"})
        config.evaluation.audit.examples = 0
    return config
