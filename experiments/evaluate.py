"""Evaluate: python experiments/evaluate.py --workdir=DIR [--config=FILE] [--config.KEY=VALUE].

--config=configs/tau_norm.py:cifar10_lt applies an inference-time method to a run that was trained without it.
"""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from robal_jax import cli
from robal_jax.errors import InputError


def main(arguments: list[str]) -> None:
    """Flags to config, workdir and checkpoint; everything else is robal_jax.evaluate.evaluate."""
    texts = {
        "workdir": "folder of the run; its config is used",
        "config": "another config, whose head, logit scale and prior adjustment at inference are used",
        "folder": "gets the results; by default WORKDIR/evaluation, with --config WORKDIR/evaluation-METHOD",
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

    from robal_jax.build import read_config, with_inference_of
    from robal_jax.evaluate import evaluate

    config = read_config(workdir)
    folder = pathlib.Path(values["folder"]) if values["folder"] else None
    if values["config"]:
        config = with_inference_of(config, cli.load_config(values["config"]))
        folder = folder or workdir / f"evaluation-{pathlib.Path(values['config'].partition(':')[0]).stem}"
    evaluate(cli.apply_overrides(config, overrides), workdir, checkpoint=checkpoint, folder=folder)


if __name__ == "__main__":
    cli.run(main)
