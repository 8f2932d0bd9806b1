"""Warnings of a config that is valid but was probably not meant, which a job prints before it begins."""

import contextlib
import inspect
import pathlib
from typing import Any

from ml_collections import ConfigDict

from robal_jax import losses
from robal_jax.averages import AVERAGES
from robal_jax.budgets import BUDGETS, LEARNED
from robal_jax.builder.contracts import told
from robal_jax.builder.instantiate import call
from robal_jax.builder.training_job import objective_alone, takes_attack
from robal_jax.errors import InputError
from robal_jax.perturbations import PERTURBATIONS
from robal_jax.storage.config_file import flatten, read_config, run_around
from robal_jax.storage.names import BEST, IMPORT
from robal_jax.storage.workdir import unfinished

EVALUATION_STEPS = 20
"""Steps of PGD-20, MIM-20 and CW-20 in every evaluation."""

STARTS_LATE = {
    ("perturbation", "awp"): ("start", 0),
    ("average", "swa"): ("start", 2),  # the end of an epoch joins in the next one
    ("average", "per_epoch"): ("", 2),  # the first epoch's end is a copy
    ("threat.budget", "cfa"): ("start", 1),
    ("threat.budget", "dafa"): ("epoch", 1),
    ("attack", ""): ("first_epoch", 0),
    ("average", "ema"): ("warmup", 1),
    ("loss", "deferred"): ("start", 0),
    ("loss", "staged"): ("start", 0),
}
"""Arguments that name an epoch, and how many epochs more a run needs for them to have an effect."""


OF_PRIOR = ("logit_adjustment", "robal")
"""Losses that correct for the shares of the classes in the training."""


def doubts(config: ConfigDict, begun: int | None = None) -> list[str]:
    """Says what in a training's config was probably not meant, and what has no effect, line by line.

    Args:
      config: a valid one.
      begun: epochs that the run begins, fewer than its epochs if ``max_steps`` ends it early; None for all.
    """
    return _values(config) + _late(config, begun) + _idle(config)


def evaluation_doubts(config: ConfigDict) -> list[str]:
    """Says what in the section ``evaluation`` of a valid config was probably not meant, line by line."""
    settings = config.evaluation
    return _short_of(
        "evaluation.epsilon", settings.epsilon, "evaluation", EVALUATION_STEPS, settings.step_size
    )


def _short_of(field: str, epsilon: float, section: str, steps: int, step_size: float) -> list[str]:
    """Warns if an attack's steps together are shorter than the radius, up to rounding."""
    if steps * step_size >= epsilon * (1 - 1e-6):
        return []
    return [
        f"{steps} times config.{section}.step_size {step_size:g} is less than config.{field} "
        f"{epsilon:g}: the attack cannot reach the edge of the ball; set a larger step size"
    ]


def _values(config: ConfigDict) -> list[str]:
    """Says which values hardly fit each other."""
    attack, schedule, epochs, found = config.attack, config.schedule, config.train.epochs, []
    if config.objective.name != "plain" and not attack.free_steps:  # neither takes these steps
        found += _short_of("threat.epsilon", config.threat.epsilon, "attack", attack.steps, attack.step_size)
    if attack.free_steps > epochs:
        found.append(
            f"config.attack.free_steps is {attack.free_steps}, but the run has {epochs} epochs, so that not "
            "all images are shown; set more epochs"
        )
    milestones = list(schedule.get("milestones", ()))
    if milestones != sorted({max(milestone, 1) for milestone in milestones}):
        found.append(f"config.schedule.milestones are {milestones}; give epochs from 1 in rising order")
    if config.train.held_out:
        found += [
            f"config.train.{field} names a run that may have been trained on the held-out images: give it "
            "the same config.train.held_out and config.data.seed"
            for field in ("start_from", "teacher")
            if config.train[field]
        ]
    if config.threat.ramp and epochs == 1:
        found.append(
            f"config.threat.ramp {config.threat.ramp:g} raises the radii from 0 in the first epoch, and the "
            "run has no other, so that nothing is attacked; set more epochs, or a ramp of 0"
        )
    if schedule.get("warmup", 0) > epochs:
        found.append(
            f"config.schedule.warmup is {schedule.warmup} epochs, but the run has {epochs}; "
            "set a shorter warm-up or more epochs"
        )
    return found


def _late(config: ConfigDict, begun: int | None) -> list[str]:
    """Says what begins after the end of the run."""
    found, epochs = [], config.train.epochs if begun is None else begun
    length, more_of = f"the run has {epochs} epochs", "epochs"
    if epochs < config.train.epochs:
        length, more_of = f"config.train.max_steps ends the run in epoch {epochs}", "steps"
    tables: dict[str, Any] = {
        "perturbation": (config.perturbation, PERTURBATIONS),
        "average": (config.average, AVERAGES),
        "threat.budget": (config.threat.budget, {**BUDGETS, **LEARNED}),
        "attack": (config.attack, {}),
        "loss": (config.loss, losses.LOSSES),
    }
    for (section, name), (argument, later) in STARTS_LATE.items():
        part, functions = tables[section]
        if part.get("name", "") != name:
            continue
        first = part.get(argument) if argument else 0
        if first is None:
            first = inspect.signature(functions[name]).parameters[argument].default
        first = int(first) + later  # a warm-up may end within an epoch
        lower = f"a lower config.{section}.{argument} or " * bool(argument)
        if first > epochs:
            found.append(
                f"config.{section}{f' {name!r}' * bool(name)} has no effect before epoch {first}, "
                f"but {length}; set {lower}more {more_of}"
            )
    return found


def _idle(config: ConfigDict) -> list[str]:
    """Says what has no effect beside the rest of the config."""
    found = []
    by_class = config.threat.budget.name != "constant" or config.threat.ramp
    attack = config.attack
    of_one_label = [f"config.threat.budget {config.threat.budget.name!r}"] * (
        config.threat.budget.name in LEARNED
    ) + ["config.attack.alignment"] * bool(attack.alignment)
    if config.train.mixing != "none":
        found += [
            f"{field} takes the first label of each image, and config.train.mixing {config.train.mixing!r} "
            "gives two"
            for field in of_one_label
        ]
    if attack.start in ("gaussian", "clean") and (attack.noise != 1 or attack.common_noise):
        found.append(
            f"config.attack.start {attack.start!r} has no radius, so that config.attack.noise and "
            "config.attack.common_noise have no effect; use 'uniform'"
        )
    changed = attack.batch_norm != "running" or attack.first_epoch > 1 or attack.second_step
    if (by_class or changed) and not takes_attack(config):
        found.append(
            f"objective {config.objective.name!r} takes no attack, so that config.threat.budget, "
            "config.threat.ramp and config.attack have no effect; choose another, or leave them out"
        )
    if config.train.sampler != "uniform" and config.loss.name in OF_PRIOR:
        found.append(
            f"config.loss {config.loss.name!r} corrects for the class counts of the data set, and "
            f"config.train.sampler {config.train.sampler!r} shows the classes in other shares; use "
            "'uniform', or a loss without class counts"
        )
    if config.loss.name == "robal" and config.head.name == "linear":
        found.append(
            "config.loss 'robal' multiplies cosines by its scale, and config.head 'linear' gives logits of "
            "any size; use the head 'cosine'"
        )
    if config.class_statistics.name != "none" and not _reads_statistics(config):
        found.append(
            f"config.class_statistics {config.class_statistics.name!r} is read by no loss or objective, so "
            "that it has no effect; leave it out, or choose a loss such as 'rebalanced'"
        )
    return found


def _reads_statistics(config: ConfigDict) -> bool:
    """Returns whether a loss or the objective reads what is gathered of the classes."""
    given = dict.fromkeys(("class_counts", "axis_name", "threat"))
    of_sections = (config.loss, config.attack.loss)
    parts = [call("loss", losses.LOSSES, section, **given) for section in of_sections]
    return any(told(part, {"class_statistics": {}}) is not part for part in (*parts, objective_alone(config)))


def doubts_of_other(config: ConfigDict, field: str, checkpoint: pathlib.Path) -> list[str]:
    """Says what is odd about a run whose weights another one takes.

    Args:
      config: of the run that takes them.
      field: of ``config.train``, which names the checkpoint or its run: 'start_from' or 'teacher'.
      checkpoint: its folder. Outside of a run, or of one without a config, nothing is said.
    """
    run, theirs = run_around(checkpoint.absolute()), dict[str, Any]()
    with contextlib.suppress(InputError):  # a checkpoint needs no config
        theirs = flatten(read_config(run or checkpoint).to_dict())
    found, named = [], f"config.train.{field} names a run"
    seed, other = config.data.get("seed"), theirs.get("data.seed")
    if theirs.get("data.name") == config.data.name and None not in (seed, other) and seed != other:
        found.append(
            f"{named} with config.data.seed {other}, and this run has {seed}: their images differ, and on "
            "the digits that run has seen test images of this one, in another order of the classes; give "
            "both the same"
        )
    trained = run is None or not (run / IMPORT).exists()  # what is imported has no other weights
    if trained and theirs.get("evaluation.weights") == "average":
        found.append(f"{named} that evaluates the average of its weights; its current weights are taken")
    if trained and theirs.get("train.select", "last") != "last" and checkpoint.parent.name != BEST:
        found.append(
            f"{named} that evaluates its best checkpoint; its last one is taken: to take the best, name it, "
            f"{run}/{BEST}/STEP"
        )
    if run and (left := unfinished(run)):
        found.append(f"{named} that is at {left}")
    return found
