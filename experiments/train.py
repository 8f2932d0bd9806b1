"""Train: python experiments/train.py --config=configs/METHOD.py:DATA --workdir=DIR [--config.KEY=VALUE]."""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from robal_jax import cli
from robal_jax.errors import InputError

NEEDED = {
    "config": "a method of configs/README.md, or the path of a config file, and behind a colon the data set: "
    "at:digits_lt, configs/at.py:cifar10_lt; or cifar100_lt, tiny_imagenet_lt, imagenet_lt; digits_lt if "
    "there is none",
    "workdir": "folder of the run, or its URL in a bucket, gs://… or s3://…",
}
TRACK = {"track": "wandb or trackio, which then receive the metrics too; wandb:NAME names the project"}


def main(arguments: list[str]) -> None:
    """Passes the config and the workdir of the flags to ``robal_jax.train``."""
    arguments, overrides = cli.split_overrides(arguments)

    def fields(values: dict[str, str]) -> str:
        config = cli.apply_overrides(cli.load_config(values["config"] or "base:cifar10_lt"), overrides)
        return f"fields of {values['config'] or 'configs/base.py'}:\n{cli.describe(config)}"

    values = cli.parse(
        arguments,
        NEEDED | TRACK | cli.PRINT_CONFIG | cli.PROCESSES,
        __doc__,
        switches=cli.PRINT_CONFIG,
        more=fields,
    )
    for name in NEEDED:
        if not values[name] and not (name == "workdir" and values["print-config"]):
            raise InputError(f"--{name} is missing; usage: {__doc__.splitlines()[0]}")
    config = cli.apply_overrides(cli.load_config(values["config"]), overrides)

    from robal_jax import builder, training  # after the cheap checks: they import JAX
    from robal_jax.devices import hosts
    from robal_jax.storage import mirror
    from robal_jax.storage.config_file import to_json
    from robal_jax.storage.trackers import tracking

    if values["print-config"]:
        builder.check(config)
        print(to_json(config), end="")
        cli.check_shown()
        return
    hosts.start(*(values[name] for name in cli.PROCESSES))
    with tracking(values["track"], mirror.folder_of(values["workdir"])) as track:
        training.train(
            config, values["workdir"], say=lambda line: print(cli.as_started(line), flush=True), track=track
        )


if __name__ == "__main__":
    cli.run(main)
