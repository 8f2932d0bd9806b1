"""Evaluate: python experiments/evaluate.py --workdir=DIR [--checkpoint=DIR] [--config.KEY=VALUE]."""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from robal_jax import cli
from robal_jax.errors import InputError


def main(arguments: list[str]) -> None:
    """Flags to config, workdir and checkpoint; everything else is robal_jax.evaluate.evaluate."""
    texts = {
        "workdir": "folder of the run; its config is used",
        "checkpoint": "one checkpoint's folder, runs/x/checkpoints/300; the newest if not given",
    }
    arguments, overrides = cli.split_overrides(arguments)
    values = cli.parse(arguments, texts, __doc__)
    checkpoint = pathlib.Path(values["checkpoint"]).absolute() if values["checkpoint"] else None
    if values["workdir"]:
        workdir = pathlib.Path(values["workdir"])
    elif checkpoint is not None:
        workdir = checkpoint.parents[1]  # workdir/checkpoints/STEP
    else:
        raise InputError(f"--workdir is missing; usage: {__doc__}")

    from robal_jax.build import read_config
    from robal_jax.evaluate import evaluate

    evaluate(cli.apply_overrides(read_config(workdir), overrides), workdir, checkpoint=checkpoint)


if __name__ == "__main__":
    cli.run(main)
