"""Train: python experiments/train.py --config=configs/METHOD.py:DATA --workdir=DIR [--config.KEY=VALUE]."""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from robal_jax import cli
from robal_jax.errors import InputError


def main(arguments: list[str]) -> None:
    """Passes the config and the workdir of the flags to ``robal_jax.train``."""
    texts = {
        "config": "config file and data set, configs/at.py:digits_lt or at:digits_lt",
        "workdir": "folder of the run",
    }
    arguments, overrides = cli.split_overrides(arguments)
    values = cli.parse(arguments, texts | cli.PROCESSES, __doc__)
    for name in texts:
        if not values[name]:
            raise InputError(f"--{name} is missing; usage: {__doc__}")
    config = cli.apply_overrides(cli.load_config(values["config"]), overrides)

    from robal_jax import training
    from robal_jax.devices import hosts  # after the cheap checks: it imports JAX

    hosts.start(*(values[name] for name in cli.PROCESSES))
    training.train(config, pathlib.Path(values["workdir"]))


if __name__ == "__main__":
    cli.run(main)
