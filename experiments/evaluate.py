"""Evaluate: python experiments/evaluate.py --workdir=DIR [--config=FILE] [--config.evaluation.KEY=VALUE].

--config=configs/tau_norm.py:cifar10_lt applies an inference-time method to a run trained without it.
--model=cifar10_lt/at_resnet20 evaluates a model of the zoo, whose run it makes.
"""

import pathlib
import shlex
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from ml_collections import ConfigDict

from robal_jax import cli
from robal_jax.errors import InputError
from robal_jax.storage.names import CONFIG

SHORT = {
    "examples": "examples",
    "autoattack": "autoattack",
    "audit": "audit.examples",
    "corruptions": "corruptions",
    "budget": "budget.name",
    "weights": "weights",
    "surrogate": "audit.surrogate",
}

MODELS = "runs/zoo"
"""Folder of the runs that models of the zoo are made to."""


def run_of(model: str, workdir: pathlib.Path | None) -> tuple[pathlib.Path, ConfigDict]:
    """Returns the folder and the config of the run to evaluate, which for a model is not made yet.

    Args:
      model: of the zoo; '' for a run.
      workdir: of the run; None for the usual place of a model.

    Raises:
      InputError: there is no such run or model, or its config cannot be used.
    """
    from robal_jax import builder
    from robal_jax.devices import hosts
    from robal_jax.storage.config_file import read_config

    if model:
        from robal_jax import zoo

        card = zoo.read_card(model)
        return workdir or pathlib.Path(MODELS, card["name"]), zoo.config_of(card)
    assert workdir is not None
    hosts.check_agreement(f"what is in {workdir}", str((workdir / CONFIG).is_file()))
    config = read_config(workdir)
    builder.validate(config)
    return workdir, config


def surrogate_run(surrogate: str) -> str:
    """Returns the folder of a surrogate; if it is a model of the zoo, its run is made."""
    from robal_jax import zoo

    if pathlib.Path(surrogate, CONFIG).is_file() or surrogate not in zoo.names():
        return surrogate
    workdir = pathlib.Path(MODELS, surrogate)
    zoo.make_run(surrogate, workdir)
    return str(workdir)


def main(arguments: list[str]) -> None:
    """Passes the config, the workdir and the checkpoint of the flags to ``robal_jax.evaluate``."""
    texts = {
        "workdir": "folder of the run; its config is used; with --model runs/zoo/MODEL by default",
        "model": "a model of the zoo, or the path of its card, in place of a run",
        "config": "another config; its head, logit scale and prior adjustment at inference are used",
        "folder": "folder of the results; by default WORKDIR/evaluation, followed by -METHOD with --config, "
        "-WEIGHTS with --weights, -best with config.train.select=best, -BUDGET with --budget and -N-images "
        "with --examples",
        "checkpoint": "folder of one checkpoint, runs/x/checkpoints/300; by default the newest one, or with "
        "config.train.select=best the best one",
        "examples": "number of test images, as many per class, 0 for all: config.evaluation.examples",
        "autoattack": "robal_aa, standard, torchattacks, fast, union, plus, rand, none or a list, "
        "also of your own attacks as module:function: "
        "config.evaluation.autoattack",
        "audit": "number of test images in the audit, 0 for no audit: config.evaluation.audit.examples",
        "corruptions": "true for the accuracy on corrupted images, too: config.evaluation.corruptions",
        "budget": "radii by class: constant (the standard) or by_frequency: config.evaluation.budget.name",
        "weights": "current or average, the run's config.average: config.evaluation.weights",
        "surrogate": "another run on the same data, or a model of the zoo, for the audit: "
        "config.evaluation.audit.surrogate",
    }
    flags, overrides = cli.split_overrides(arguments)

    def fields(values: dict[str, str]) -> str:
        return "fields of configs/base.py:\n" + cli.describe(
            cli.load_config("base:cifar10_lt"), "evaluation."
        )

    values = cli.parse(
        flags,
        texts | cli.PRINT_CONFIG | cli.PROCESSES,
        __doc__,
        switches=cli.PRINT_CONFIG,
        more=fields,
    )
    for flag, field in SHORT.items():
        if values[flag]:
            overrides = cli.once([*overrides, f"--config.evaluation.{field}={values[flag]}"])
    workdir, checkpoint = cli.run_and_checkpoint(values)
    if values["model"] and checkpoint:
        raise InputError("--model has one checkpoint; leave out --checkpoint")
    if workdir is None and not values["model"]:
        raise InputError(f"--workdir is missing; usage: {__doc__.splitlines()[0]}")

    from robal_jax import builder, evaluation
    from robal_jax.devices import hosts
    from robal_jax.storage.config_file import to_json
    from robal_jax.storage.names import EVALUATION

    hosts.start(*(values[name] for name in cli.PROCESSES))
    workdir, config = run_of(values["model"], workdir)
    name = EVALUATION
    if values["config"]:
        config = builder.with_inference_of(config, cli.load_config(values["config"]))
        name += f"-{pathlib.Path(values['config'].partition(':')[0]).stem}"
    chosen = {"weights": config.evaluation.weights, "select": config.train.select}
    config = cli.apply_overrides(config, overrides)
    if values["print-config"]:
        builder.check(config)
        print(to_json(config), end="")
        cli.check_shown()
        return
    for field, value in {"weights": config.evaluation.weights, "select": config.train.select}.items():
        name += f"-{value}" if value != chosen[field] else ""  # so that both can be evaluated
    if config.evaluation.budget.name != "constant":
        name += f"-{config.evaluation.budget.name.rpartition(':')[2]}"
    if config.evaluation.examples:
        name += f"-{config.evaluation.examples}-images"
    folder = pathlib.Path(values["folder"]) if values["folder"] else workdir / name
    command = f"{cli.as_started('python experiments/evaluate.py')} {shlex.join(arguments)}"
    if values["model"]:
        from robal_jax import zoo

        zoo.make_run(values["model"], workdir)
    if config.evaluation.audit.surrogate:
        config.evaluation.audit.surrogate = surrogate_run(config.evaluation.audit.surrogate)
    evaluation.evaluate(config, workdir, checkpoint=checkpoint, folder=folder, command=command)


if __name__ == "__main__":
    cli.run(main)
