"""The fields that every config must have, their types, and the values that fields may have.

A value that cannot be used is refused by :func:`validate`. One that can, but hardly says what was meant, is a
line of ``doubtful.py``.
"""

import itertools
import numbers
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from robal_jax import (
    attack_modes,
    averages,
    checks,
    classifiers,
    metrics,
    models,
    objectives,
    optimizers,
    regularisers,
)
from robal_jax.attacks import MINIMUM_NORM, STARTS
from robal_jax.attacks.threat import COMMON_NORMS, in_255ths
from robal_jax.data import AUGMENTATIONS, MIXINGS, SAMPLERS
from robal_jax.devices import parallel
from robal_jax.errors import InputError, shown
from robal_jax.storage.config_file import flatten

Rule = tuple[str, Callable[[Any], bool]]
"""How a value must be, in words and as a function; a ``TypeError`` counts as False."""

POSITIVE: Rule = ("> 0", lambda value: value > 0)

NOT_NEGATIVE: Rule = (">= 0", lambda value: value >= 0)

BELOW_ONE: Rule = ("in [0, 1)", lambda value: 0 <= value < 1)

SHARE: Rule = ("in [0, 1]", lambda value: 0 <= value <= 1)

FACTOR: Rule = (
    f"in {checks.SMALLEST:g}..{checks.LARGEST:g}",
    lambda value: checks.SMALLEST <= value <= checks.LARGEST,
)
"""Of logits."""

SEED: Rule = ("in 0..2^32-1", lambda value: 0 <= value < 2**32)

TEXT: Rule = ("a string", lambda value: isinstance(value, str))

BOOLEAN: Rule = ("True or False", lambda value: isinstance(value, bool))

FEW: Rule = ("> 0 and at most 10^6", lambda value: 0 < value <= 10**6)

NUMBER: Rule = ("a number", lambda value: isinstance(value, numbers.Real) and not isinstance(value, bool))

INTEGER: Rule = (
    "an integer",
    lambda value: isinstance(value, numbers.Integral) and not isinstance(value, bool),
)

IN_32_BITS: Rule = ("an integer below 2^31", lambda value: INTEGER[1](value) and abs(value) < 2**31)
"""Because JAX counts in int32."""

FINITE: Rule = ("finite in float32", lambda value: abs(value) <= float(np.finfo(np.float32).max))


def _are_augmentations(value: Any) -> bool:
    names = value.split(",") if isinstance(value, str) else [""]
    known = all(name in AUGMENTATIONS or ":" in name for name in names)
    return known and ("none" not in names or len(names) == 1)


AUGMENTATION: Rule = (
    f"'none', or a list with commas and no spaces of {', '.join(list(AUGMENTATIONS)[1:])}, or your own "
    "'module:function'",
    _are_augmentations,
)


def _one_of(names: Iterable[str]) -> Rule:
    return f"one of {', '.join(names)}", lambda value: value in names


def _are_epochs(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(isinstance(epoch, int) for epoch in value)


def _are_passes(value: Any) -> bool:
    return set(value.split(",")) <= {"nat", "adv"}


SELECTIONS = ("last", "best", "best_on_test")
"""Which checkpoint an evaluation takes: the newest, the best on held-out images, the best on the test set."""

_POSITIVE_FIELDS = (
    "threat.epsilon", "attack.steps", "attack.step_size",
    "schedule.lr", "schedule.decay", "train.batch_size", "train.steps_per_dispatch",
    "train.accumulation_steps", "train.checkpoint_epochs", "train.keep_checkpoints",
    "evaluation.batch_size", "evaluation.epsilon",
    "evaluation.step_size", "objective.max_epsilon", "objective.search_steps",
    "attack.noise", "attack.reach", "attack.first_epoch", "perturbation.gamma",
)  # fmt: skip

_FACTOR_FIELDS = (
    "head.scale", "loss.scale", "head.temperature", "loss.temperature", "evaluation.head.scale",
    "evaluation.head.temperature", "evaluation.logit_scale",
)  # fmt: skip

_NOT_NEGATIVE_FIELDS = (
    "attack.alignment", "attack.free_steps", "schedule.warmup", "train.max_steps", "train.evaluate_epochs",
    "evaluation.audit.examples", "evaluation.examples", "optimizer.clip_norm", "optimizer.weight_decay",
    "objective.beta", "objective.beta_adv", "objective.beta_nat", "objective.beta_reg",
    "objective.tail_weight", "objective.kd", "objective.igdm",
)  # fmt: skip

_BELOW_ONE_FIELDS = (
    "optimizer.momentum", "train.label_smoothing", "train.held_out", "generated.share", "average.decay",
    "threat.budget.alpha", "evaluation.budget.alpha",
)  # fmt: skip

RANGES: dict[str, Rule] = {
    **dict.fromkeys(("seed", "data.seed", "evaluation.seed"), SEED),
    **dict.fromkeys(_POSITIVE_FIELDS, POSITIVE),
    **dict.fromkeys(_NOT_NEGATIVE_FIELDS, NOT_NEGATIVE),
    **dict.fromkeys(_FACTOR_FIELDS, FACTOR),
    "threat.ramp": SHARE,
    "train.batch_norm_momentum": SHARE,
    "train.mixing": _one_of(MIXINGS),
    "attack.batch_norm": _one_of(attack_modes.ATTACK_MODES),
    "evaluation.weights": _one_of(averages.WEIGHTS),
    "evaluation.groups": (
        f"a list with commas and no spaces of {', '.join(metrics.GROUPS)}, each once",
        metrics.are_protocols,
    ),
    "evaluation.minimum_norm": (
        f"'' or one of {', '.join(MINIMUM_NORM)}",
        lambda value: not value or value in MINIMUM_NORM,
    ),
    "optimizer.decayed": _one_of(optimizers.DECAYED),
    "schedule.by": _one_of(optimizers.BY),
    **dict.fromkeys(_BELOW_ONE_FIELDS, BELOW_ONE),
    **dict.fromkeys(("train.epochs", "train.reading_threads"), FEW),
    "schedule.milestones": ("whole numbers of epochs, with commas, such as 60,75", _are_epochs),
    "threat.norm": _one_of(COMMON_NORMS),
    "attack.start": _one_of(STARTS),
    "head.bias": _one_of(classifiers.BIASES),
    "objective.batch_norm_order": (
        f"one of {', '.join(objectives.BATCH_NORM_ORDERS)}, or a list of nat and adv",
        lambda value: value in objectives.BATCH_NORM_ORDERS or _are_passes(value),
    ),
    "train.images_per_class": ("in 0..10^5", lambda value: 0 <= value <= 10**5),
    "objective.tail_divergence": _one_of(regularisers.DIVERGENCES),
    **dict.fromkeys(
        ("objective.nat_confidence", "objective.vertex_confidence", "objective.nat_weight"), SHARE
    ),
    "train.logged_passes": ("'', or a list of nat and adv", lambda value: not value or _are_passes(value)),
    "objective.regulariser": _one_of(objectives.REGULARISERS),
    "train.sampler": _one_of(SAMPLERS),
    "train.augmentation": AUGMENTATION,
    "train.select": _one_of(SELECTIONS),
    "train.layout": _one_of(parallel.LAYOUTS),
    "train.precision": _one_of(models.PRECISIONS),
    "evaluation.precision": _one_of([name for name in models.PRECISIONS if name != "bfloat16"]),
}
"""Values of fields, if a config has them."""

_TEXTS = (
    "method", "data.name", "model.name", "head.name", "loss.name", "objective.name", "threat.norm",
    "attack.loss.name", "attack.start", "optimizer.name", "schedule.name", "train.sampler",
    "threat.budget.name", "attack.batch_norm", "perturbation.name", "average.name", "train.mixing",
    "generated.path", "class_statistics.name", "train.teacher", "train.logged_passes",
    "train.start_from", "train.select", "train.augmentation", "train.layout",
    "train.precision",
    "evaluation.head.name", "evaluation.autoattack", "evaluation.audit.surrogate", "evaluation.precision",
    "evaluation.weights", "evaluation.budget.name", "evaluation.groups", "evaluation.minimum_norm",
)  # fmt: skip

_INTEGERS = (
    "attack.steps", "attack.free_steps", "attack.first_epoch", "train.images_per_class",
    "train.epochs", "train.max_steps", "train.batch_size",
    "train.accumulation_steps", "train.reading_threads", "train.steps_per_dispatch",
    "train.checkpoint_epochs", "train.keep_checkpoints", "train.evaluate_epochs", "evaluation.batch_size",
    "evaluation.head_classes", "evaluation.tail_classes", "evaluation.audit.examples",
    "evaluation.examples",
)  # fmt: skip

_NUMBERS = (
    "threat.epsilon", "attack.step_size", "evaluation.epsilon", "evaluation.step_size",
    "evaluation.logit_scale", "evaluation.tau_p", "threat.ramp", "attack.noise", "attack.reach",
    "attack.alignment", "train.batch_norm_momentum", "train.label_smoothing", "train.held_out",
    "generated.share",
)  # fmt: skip

_BOOLEANS = (
    "train.sync_batch_norm", "attack.common_noise", "attack.second_step", "threat.scaled_steps",
    "evaluation.corruptions", "evaluation.certified", "evaluation.optimality",
)  # fmt: skip

REQUIRED: dict[str, Rule] = {
    **dict.fromkeys(_TEXTS, TEXT),
    **dict.fromkeys(("seed", "evaluation.seed"), INTEGER),
    **dict.fromkeys(_INTEGERS, IN_32_BITS),
    **dict.fromkeys(_NUMBERS, NUMBER),
    **dict.fromkeys(_BOOLEANS, BOOLEAN),
}
"""Types of the fields that every config has."""


_LENGTHS = (
    "threat.epsilon", "attack.step_size", "evaluation.epsilon", "evaluation.step_size",
    "objective.max_epsilon",
)  # fmt: skip
"""Lengths in the images' unit; in L-infinity 1 is the whole range of a pixel."""


def validate(config: ConfigDict) -> None:
    """Checks ``REQUIRED`` and ``RANGES``, that every number is finite, and that no length leaves the images.

    Raises:
      InputError: names the field, its value and what it must be.
    """
    fields = flatten(config.to_dict())
    for field in REQUIRED:
        if field not in fields:
            raise InputError(f"config.{field} is missing; take its value from configs/base.py")
    paths = [name.split(".")[:-1] for name in fields]
    sections = {section for path in paths for section in itertools.accumulate(path, "{}.{}".format)}
    for field, (must, holds) in [*REQUIRED.items(), *RANGES.items()]:
        if field in sections:
            raise InputError(f"config.{field} is a section; it must be {must}")
        if field in fields and not _holds(holds, fields[field]):
            raise InputError(f"config.{field} is {shown(fields[field])}; it must be {must}")
    lengths = [name for name in _LENGTHS if name in fields]  # in front, because others follow threat.epsilon
    for field in dict.fromkeys([*lengths, *fields]):
        value = fields[field]
        entries = value if isinstance(value, list | tuple) else [value]
        if not all(_holds(FINITE[1], entry) for entry in entries if isinstance(entry, numbers.Number)):
            raise InputError(f"config.{field} is {shown(value)}; it must be {FINITE[0]}")
        if INTEGER[1](value) and RANGES.get(field) is not SEED and not IN_32_BITS[1](value):
            raise InputError(f"config.{field} is {shown(value)}; it must be {IN_32_BITS[0]}")
    for field in _LENGTHS:
        if fields["threat.norm"] == "linf" and fields.get(field, 0) > 1:
            raise InputError(
                f"config.{field} is {fields[field]:g}; in L-infinity it must be at most 1, the range of a "
                "pixel" + in_255ths(fields[field])
            )


def _holds(holds: Callable[[Any], bool], value: Any) -> bool:
    try:
        return holds(value)
    except (TypeError, OverflowError):
        return False


def check_selection(config: ConfigDict) -> None:
    """Checks that a training can choose the checkpoint that its config asks for.

    Raises:
      InputError: nothing would be judged during the training, or there are no images to judge.
    """
    train = config.train
    if train.select != "last" and not train.evaluate_epochs:
        raise InputError(
            f"config.train.select is {train.select!r}, but config.train.evaluate_epochs is 0, so that no "
            "checkpoint is judged; set a number of epochs, such as 1"
        )
    if train.evaluate_epochs and train.select != "best_on_test" and not train.held_out:
        raise InputError(
            f"config.train.evaluate_epochs is {train.evaluate_epochs}, but no images are held out; set "
            "config.train.held_out to a share of the training set, such as 0.02"
        )
