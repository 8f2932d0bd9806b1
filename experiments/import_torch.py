"""Import: python experiments/import_torch.py --weights=FILE.pt --config=configs/METHOD.py:DATA --workdir=DIR.

Makes a run's folder from the weights of a PyTorch network (the released files of RoBal or AT-BSL, or any
state_dict of a WideResNet, also in DeepMind's form, as RobustBench has them, or of a ResNet-18, 20 or 32,
PreActResNet-18 or ResNet-50), which python experiments/evaluate.py then evaluates. Nothing in the file is
executed, and the data set is not needed. --config.KEY=VALUE sets a field as in training.
"""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from robal_jax import cli
from robal_jax.errors import InputError


def main(arguments: list[str]) -> None:
    """Passes the flags to ``robal_jax.exchange.import_weights``."""
    texts = {
        "weights": "a .safetensors file, or one that torch.save wrote",
        "config": "config file and data set, configs/robal_n.py:cifar10_lt or robal_n:cifar10_lt",
        "workdir": "folder of the run, a new one",
        "entry": "which state_dict, if the file holds several",
    }
    arguments, overrides = cli.split_overrides(arguments)
    values = cli.parse(arguments, texts, __doc__)
    for name in ("weights", "config", "workdir"):
        if not values[name]:
            raise InputError(f"--{name} is missing; usage: {__doc__.splitlines()[0]}")
    config = cli.apply_overrides(cli.load_config(values["config"]), overrides)

    from robal_jax import exchange  # after the cheap checks: it imports JAX

    weights, workdir = pathlib.Path(values["weights"]), pathlib.Path(values["workdir"])
    exchange.import_weights(config, weights, workdir, values["entry"])


if __name__ == "__main__":
    cli.run(main)
