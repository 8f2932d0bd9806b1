"""The objective of a training with all that it needs: losses, the attack, and what only a step knows."""

import functools
from collections.abc import Callable
from typing import Any

import chex
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from robal_jax import attack_modes, attacks, losses, models, objectives
from robal_jax.attacks import STARTS, FreeSteps, ThreatModel
from robal_jax.builder import contracts
from robal_jax.builder.contracts import takes, told
from robal_jax.builder.instantiate import call
from robal_jax.builder.parts import budget, class_statistics, gathered_arrays
from robal_jax.errors import InputError
from robal_jax.models.layers import BATCH_NORM_MOMENTUM

OBJECTIVES_WITH_LABELS = ("mma",)
"""Objectives that take a loss and also read labels themselves: an image cannot have two."""

TERMS_WITH_LABELS = ("beta_nat", "tail_weight")
"""Weights of the objectives' terms that read labels themselves."""

IN_STEP = ("class_statistics", "radius_factors", "teacher")
"""Arguments of objectives that only a step knows."""


def objective(
    config: ConfigDict, class_counts: np.ndarray, axis_name: str | None = None
) -> objectives.Objective:
    """Builds the function that a step minimises, with its attack and loss bound."""
    threat, settings = ThreatModel(config.threat.epsilon, config.threat.norm), config.attack
    given: dict[str, Any] = {"class_counts": class_counts, "axis_name": axis_name, "threat": threat}
    loss = call("loss", losses.LOSSES, config.loss, **given)
    smoothed = functools.partial(_smoothed, config.train.label_smoothing)
    inner_loss = call("loss", losses.LOSSES, settings.loss, **given)
    attack = functools.partial(
        attacks.pgd,
        threat=threat.scaled(settings.reach),
        steps=settings.steps,
        step_size=settings.step_size,
        start=_start(config, threat),
        loss=inner_loss,
        second=(threat, settings.step_size) if settings.second_step else None,
    )
    function = call(
        "objective",
        objectives.OBJECTIVES,
        config.objective,
        attack=attack,
        loss=smoothed(loss),
        epochs=config.train.epochs,
        **given,
    )
    _check_deferred("attack.loss", inner_loss)
    _check_parts(config, loss, function)
    statistics = class_statistics(config, class_counts)
    gathered = gathered_arrays(budget(config, class_counts), statistics)
    if statistics is not None and statistics.logged and "adv" not in config.train.logged_passes:
        raise InputError(
            "config.class_statistics sees the logged pass of adversarial images, and "
            f"config.train.logged_passes is {config.train.logged_passes!r}; add 'adv'"
        )
    _check_told(config, function, {"loss": loss, "attack.loss": inner_loss}, gathered)
    for section, made in ((config.loss, loss), (settings.loss, inner_loss)):
        contracts.check_loss(section, made, len(class_counts), gathered)
    parts = {"loss": smoothed(loss), "attack": attack}
    bound = {name: value for name, value in parts.items() if takes(function, name)}
    wrapped = _with_attack_mode(config, function, attack, threat)
    return functools.partial(
        _in_step,
        objective=wrapped,
        bound=bound,
        takes_own=tuple(name for name in IN_STEP if takes(function, name)),
        first_epoch=settings.first_epoch,
        common=config.threat.epsilon,
        within=functools.partial(_within, scaled_steps=config.threat.scaled_steps),
    )


def batch_norm_momentum(config: ConfigDict) -> float | None:
    """Returns the weight of a training pass in the running statistics; None for the usual one."""
    momentum = config.train.batch_norm_momentum
    return None if momentum == BATCH_NORM_MOMENTUM else momentum


def free_steps(config: ConfigDict) -> FreeSteps | None:
    """Builds the free steps that are the attack of a training; None for an attack in every step.

    Raises:
      InputError: something else would need a pass of its own, or the attack that is replaced.
    """
    showings = config.attack.free_steps
    if not showings:
        return None
    if config.objective.name != "pgd_at":
        raise InputError(
            f"config.attack.free_steps is {showings}, which objective {config.objective.name!r} cannot use; "
            "use objective 'pgd_at', or set it to 0"
        )
    alone = {
        "attack.batch_norm": "running",
        "attack.alignment": 0.0,
        "attack.first_epoch": 1,
        "attack.second_step": False,
        "perturbation.name": "none",
    }
    for field, neutral in alone.items():
        section, name = field.split(".")
        if config[section][name] != neutral:
            raise InputError(
                f"config.attack.free_steps is {showings}, so that a step has one backward pass, and "
                f"config.{field} {config[section][name]!r} needs more; set it to {neutral!r}"
            )
    return FreeSteps(showings, ThreatModel(config.threat.epsilon, config.threat.norm))


def _smoothed(smoothing: float, loss: functools.partial) -> functools.partial:
    """Returns a loss with label smoothing; without, the loss itself."""
    return functools.partial(losses.label_smoothed, base=loss, smoothing=smoothing) if smoothing else loss


def attacks_divergence(function: functools.partial) -> bool:
    """Returns whether an objective's attack maximises the divergence, as TRADES does, and not a loss."""
    return function.func is objectives.trades and function.keywords.get("attack_divergence", True)


def _check_deferred(section: str, loss: functools.partial) -> None:
    """Raises an ``InputError`` if a deferred loss, or one inside another loss, cannot weight its base."""
    base = loss.keywords.get("base")
    unweighted = loss.func is losses.deferred and loss.keywords.get("reweight", True)
    if unweighted and base and not takes(base, "class_weights"):
        raise InputError(
            f"config.{section}.base {base.func.__name__!r} takes no class weights; "
            f"set config.{section}.reweight=False"
        )
    for name, part in loss.keywords.items():
        if isinstance(part, functools.partial):
            _check_deferred(f"{section}.{name}", part)


def _check_parts(config: ConfigDict, loss: functools.partial, function: functools.partial) -> None:
    """Raises an ``InputError`` if the losses, the attack and the objective do not fit together."""
    if not takes(function, "loss") and config.loss.name != "cross_entropy":
        raise InputError(
            f"objective {config.objective.name!r} has a loss of its own and would ignore config.loss "
            f"{config.loss.name!r}; set config.loss to cross_entropy"
        )
    if not takes(function, "loss") and config.train.label_smoothing:
        raise InputError(
            f"objective {config.objective.name!r} has a loss of its own and would ignore "
            f"config.train.label_smoothing {config.train.label_smoothing:g}; set it to 0"
        )
    _check_deferred("loss", loss)
    moves, diverging = config.attack.batch_norm.startswith("batch_update"), attacks_divergence(function)
    if diverging and config.attack.loss.name != "cross_entropy":
        raise InputError(
            "objective 'trades' attacks the divergence and would ignore config.attack.loss "
            f"{config.attack.loss.name!r}; use 'cross_entropy', or set "
            "config.objective.attack_divergence=False"
        )
    if diverging and config.attack.start == "clean":
        raise InputError(
            "objective 'trades' attacks the divergence, whose gradient is 0 at the clean image, so that with "
            "config.attack.start 'clean' rounding chooses the first step; use 'gaussian', or set "
            "config.objective.attack_divergence=False"
        )
    if moves and diverging:
        raise InputError(
            f"config.attack.batch_norm {config.attack.batch_norm!r} needs an attack on config.attack.loss, "
            "and objective 'trades' has another; use 'batch', or set config.objective.attack_divergence=False"
        )
    if moves and config.attack.first_epoch > 1:
        raise InputError(
            f"config.attack.batch_norm {config.attack.batch_norm!r} needs an attack in every epoch, and "
            f"config.attack.first_epoch is {config.attack.first_epoch}; set it to 1, or use 'batch'"
        )
    _check_radii(config, loss, function)
    own_labels = config.objective.name in OBJECTIVES_WITH_LABELS or any(
        map(config.objective.get, TERMS_WITH_LABELS)
    )
    reads_labels = own_labels or not takes(function, "loss")
    if config.train.mixing != "none" and reads_labels:
        raise InputError(
            f"objective {config.objective.name!r} needs one label per image, and config.train.mixing "
            f"{config.train.mixing!r} gives two; set it to 'none'"
        )
    reads_start = takes(function, "attack") and not config.attack.free_steps
    if config.threat.norm == "l2" and config.attack.start == "one_sided" and reads_start:
        raise InputError(
            "config.attack.start 'one_sided' is for norm linf; for l2 use 'uniform' or 'gaussian'"
        )


def _check_radii(config: ConfigDict, loss: functools.partial, function: functools.partial) -> None:
    """Raises an ``InputError`` if radii by class or by epoch do not fit the attack, loss and objective."""
    budget, ramp = config.threat.budget.name, config.threat.ramp
    rising = f"config.threat.ramp {ramp:g} raises the radii from 0, and"
    if takes(function, "max_epsilon") and (ramp or budget != "constant"):
        field, value, neutral = ("ramp", ramp, 0) if ramp else ("budget.name", budget, "constant")
        raise InputError(
            f"objective {config.objective.name!r} has one radius for all classes and epochs, "
            f"config.objective.max_epsilon, and config.threat.{field} is {value!r}; set it to {neutral!r}"
        )
    if ramp and config.attack.second_step:
        raise InputError(
            f"{rising} config.attack.second_step makes steps of the whole radius; set one of the two to its "
            "default"
        )
    if ramp and _weighs_by_radius(loss):
        raise InputError(
            f"{rising} loss 'weighted_by_radius' makes the weights of the images rise with them; set "
            "config.threat.ramp to 0, or choose another loss"
        )
    if ramp and function.keywords.get("by_radius"):
        raise InputError(
            f"{rising} config.objective.by_radius makes the weight of the divergence rise with them; set one "
            "of the two to its default"
        )


def _weighs_by_radius(loss: functools.partial) -> bool:
    """Returns whether a loss, or one inside it, is ``losses.weighted_by_radius``."""
    parts = [part for part in loss.keywords.values() if isinstance(part, functools.partial)]
    return loss.func is losses.weighted_by_radius or any(map(_weighs_by_radius, parts))


def _check_told(
    config: ConfigDict,
    function: functools.partial,
    by_section: dict[str, functools.partial],
    gathered: dict[str, chex.Array],
) -> None:
    """Raises an ``InputError`` if a function needs something of the step that the config does not give."""
    name, teacher = config.objective.name, config.train.teacher
    if takes(function, "teacher") and not teacher:
        raise InputError(
            f"objective {name!r} needs a teacher, and config.train.teacher is empty; name the teacher's run"
        )
    if teacher and not takes(function, "teacher"):
        raise InputError(
            f"config.train.teacher is {teacher!r}, but objective {name!r} takes none; use 'distilled', or "
            "leave it empty"
        )
    if "adv" in config.train.logged_passes and not takes(function, "attack"):
        raise InputError(
            f"config.train.logged_passes is {config.train.logged_passes!r}, but objective {name!r} takes no "
            "attack; use 'nat', or leave it empty"
        )
    parts = {**by_section, "objective": function}
    for section, part in parts.items():
        if not gathered and told(part, {"class_statistics": gathered}) is not part:
            raise InputError(
                f"config.{section} reads class statistics, and config.class_statistics.name is 'none'; "
                "choose statistics, such as 'predictions' for the loss 'rebalanced'"
            )


def _start(config: ConfigDict, threat: ThreatModel) -> attacks.Start:
    """Returns the start of the training's attack, whose noise is relative to epsilon or an image's radius."""
    settings = config.attack
    start, noise = STARTS[settings.start], settings.noise
    if settings.common_noise:
        return attacks.start_within(start, noise * threat.epsilon)
    return start if noise == settings.reach else attacks.scaled_start(start, noise / settings.reach)


def _with_attack_mode(
    config: ConfigDict, function: functools.partial, attack: functools.partial, threat: ThreatModel
) -> objectives.Objective:
    """Returns an objective with batch norm's mode in the attack, and with GradAlign."""
    mode, wrapped = config.attack.batch_norm, function
    if not takes(function, "attack"):
        pass
    elif mode == "batch":
        wrapped = functools.partial(attack_modes.attacked_by_batch_statistics, objective=function)
    elif mode == "natural_first":
        momentum = batch_norm_momentum(config)
        wrapped = functools.partial(attack_modes.natural_pass_first, objective=function, momentum=momentum)
    elif mode != "running":
        wrapped = functools.partial(
            attack_modes.attack_moves_statistics,
            objective=function,
            attack=attack,
            end=mode == "batch_update_end",
        )
    if config.attack.alignment:
        wrapped = functools.partial(
            attack_modes.aligned_gradients, objective=wrapped, weight=config.attack.alignment, threat=threat
        )
    return wrapped


def _in_step(
    model: models.Model,
    params: chex.ArrayTree,
    stats: chex.ArrayTree,
    batch: objectives.Batch,
    known: objectives.Known = objectives.NOTHING_KNOWN,
    *,
    objective: Callable[..., tuple[chex.Array, objectives.Outcome]],
    bound: dict[str, functools.partial],
    takes_own: tuple[str, ...],
    first_epoch: int,
    common: float,
    within: Callable[[functools.partial, chex.Array], functools.partial],
) -> tuple[chex.Array, objectives.Outcome]:
    """Calls an objective with its loss and attack as a step knows them.

    Args:
      model: the network.
      params: of the model.
      stats: its running statistics.
      batch: of the step.
      known: what else is known of its images.
      objective: any; it has its loss and its attack already, which hold if nothing is known.
      bound: these two, as far as it takes them.
      takes_own: which of ``IN_STEP`` it takes itself.
      first_epoch: in which the attack begins, counted from 1.
      common: radius.
      within: gives an attack one radius per image as a multiple of the common one.
    """
    factors = None if known.radii is None else known.radii / common
    values = {
        "epoch": batch.epoch,
        "class_statistics": known.classes or {},
        "radius_factors": jnp.ones(len(batch.labels)) if factors is None else factors,
    }
    late: dict[str, Any] = {name: told(part, values) for name, part in bound.items()}
    late = {name: part for name, part in late.items() if part is not bound[name]}
    loss, attack = (late.get(name, bound.get(name)) for name in ("loss", "attack"))
    if attack is not None and factors is not None:
        late["attack"] = attack = within(attack, factors)
    if known.partners is not None:
        labels, share = known.partners
        shared = functools.partial(losses.shared, partners=labels, share=share)
        if attack is not None:
            inner = shared(attack.keywords["loss"])
            late["attack"] = attack = functools.partial(attack, loss=inner)
        if loss is not None:
            late["loss"] = shared(loss)
    if attack is not None and first_epoch > 1:
        begun = batch.epoch >= first_epoch
        late["attack"] = functools.partial(attack_modes.delayed, attack=attack, begun=begun)
    if attack is not None and known.adversarial is not None:
        late["attack"] = functools.partial(attack_modes.known, known.adversarial)
    if known.teacher is not None:
        values["teacher"] = functools.partial(model.predict, *(known.teacher[x] for x in ("params", "stats")))
    late |= {name: values[name] for name in takes_own}
    return objective(model, params, stats, batch, **late)


def _within(attack: functools.partial, factors: chex.Array, *, scaled_steps: bool) -> functools.partial:
    """Returns an attack with one radius per image in place of a common one.

    Args:
      attack: its threat model's radius is a multiple of the common one.
      factors: radii as multiples of the common one ``[B]``.
      scaled_steps: whether step sizes are scaled as the radii are.
    """
    step_size = attack.keywords["step_size"]
    return functools.partial(
        attack,
        threat=attack.keywords["threat"].scaled(factors),
        step_size=factors * step_size if scaled_steps else step_size,
    )
