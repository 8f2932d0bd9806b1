"""The fields that every config must have, their types, and the values that fields may have."""

import math
import numbers
import reprlib
from collections.abc import Callable, Iterable
from typing import Any

from ml_collections import ConfigDict

from robal_jax import classifiers, models, objectives
from robal_jax.attacks import NORMS, STARTS
from robal_jax.data import AUGMENTATIONS, SAMPLERS
from robal_jax.devices import parallel
from robal_jax.errors import InputError
from robal_jax.storage.config_file import flatten

Rule = tuple[str, Callable[[Any], bool]]
"""How a value must be, in words and as a function; a ``TypeError`` counts as False."""

POSITIVE: Rule = ("> 0", lambda value: value > 0)

NOT_NEGATIVE: Rule = (">= 0", lambda value: value >= 0)

SEED: Rule = ("in 0..2^32-1", lambda value: 0 <= value < 2**32)

TEXT: Rule = ("a text", lambda value: isinstance(value, str))

BOOLEAN: Rule = ("True or False", lambda value: isinstance(value, bool))

NUMBER: Rule = ("a number", lambda value: isinstance(value, numbers.Real) and not isinstance(value, bool))

LARGEST = 2**31 - 1  # of an integer that is no seed, because JAX counts in int32

INTEGER: Rule = (
    "an integer",
    lambda value: isinstance(value, numbers.Integral) and not isinstance(value, bool),
)


def _one_of(names: Iterable[str]) -> Rule:
    return f"one of {', '.join(names)}", lambda value: value in names


def _are_epochs(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(isinstance(epoch, int) for epoch in value)


_POSITIVE_FIELDS = (
    "threat.epsilon", "attack.steps", "attack.step_size", "head.scale", "loss.scale",
    "schedule.lr", "schedule.decay", "train.epochs", "train.batch_size", "train.steps_per_dispatch",
    "train.accumulation_steps", "train.reading_threads", "train.checkpoint_epochs", "train.keep_checkpoints",
    "evaluation.batch_size", "evaluation.epsilon",
    "evaluation.step_size", "evaluation.logit_scale", "objective.max_epsilon", "objective.search_steps",
)  # fmt: skip

_NOT_NEGATIVE_FIELDS = (
    "schedule.warmup", "train.max_steps", "evaluation.audit.examples",
    "optimizer.clip_norm", "optimizer.momentum", "optimizer.weight_decay",
)  # fmt: skip

RANGES: dict[str, Rule] = {
    **dict.fromkeys(("seed", "data.seed", "evaluation.seed"), SEED),
    **dict.fromkeys(_POSITIVE_FIELDS, POSITIVE),
    **dict.fromkeys(_NOT_NEGATIVE_FIELDS, NOT_NEGATIVE),
    "schedule.milestones": ("epochs", _are_epochs),
    "threat.norm": _one_of(NORMS),
    "attack.start": _one_of(STARTS),
    "head.bias": _one_of(classifiers.BIASES),
    "objective.batch_norm_order": _one_of(objectives.BATCH_NORM_ORDERS),
    "objective.regulariser": _one_of(objectives.REGULARISERS),
    "train.sampler": _one_of(SAMPLERS),
    "train.augmentation": _one_of(AUGMENTATIONS),
    "train.layout": _one_of(parallel.LAYOUTS),
    "train.precision": _one_of(models.PRECISIONS),
    "evaluation.precision": _one_of([name for name in models.PRECISIONS if name != "bfloat16"]),
}
"""Values of fields, if a config has them."""

_TEXTS = (
    "method", "data.name", "model.name", "head.name", "loss.name", "objective.name", "threat.norm",
    "attack.loss.name", "attack.start", "optimizer.name", "schedule.name", "train.sampler",
    "train.start_from", "train.augmentation", "train.layout", "train.precision", "evaluation.head.name",
    "evaluation.autoattack", "evaluation.audit.surrogate", "evaluation.precision",
)  # fmt: skip

_INTEGERS = (
    "seed", "attack.steps", "train.epochs", "train.max_steps", "train.batch_size",
    "train.accumulation_steps", "train.reading_threads", "train.steps_per_dispatch",
    "train.checkpoint_epochs", "train.keep_checkpoints", "evaluation.batch_size", "evaluation.seed",
    "evaluation.head_classes", "evaluation.tail_classes", "evaluation.audit.examples",
)  # fmt: skip

_NUMBERS = (
    "threat.epsilon", "attack.step_size", "evaluation.epsilon", "evaluation.step_size",
    "evaluation.logit_scale", "evaluation.tau_p",
)  # fmt: skip

REQUIRED: dict[str, Rule] = {
    **dict.fromkeys(_TEXTS, TEXT),
    **dict.fromkeys(_INTEGERS, INTEGER),
    **dict.fromkeys(_NUMBERS, NUMBER),
    "train.sync_batch_norm": BOOLEAN,
}
"""Types of the fields that every config has."""


def validate(config: ConfigDict) -> None:
    """Checks ``REQUIRED`` and ``RANGES``, and that every number is finite and not too large.

    Raises:
      InputError: names the field, its value and what it must be.
    """
    fields = flatten(config.to_dict())
    for field in REQUIRED:
        if field not in fields:
            raise InputError(f"config.{field} is missing; take its value from configs/base.py")
    for field, (must, holds) in [*REQUIRED.items(), *RANGES.items()]:
        if field in fields and not _holds(holds, fields[field]):
            raise InputError(f"config.{field} is {shown(fields[field])}; it must be {must}")
    for field, value in fields.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise InputError(f"config.{field} is {value!r}; it must be finite")
        if isinstance(value, int) and RANGES.get(field) is not SEED and abs(value) > LARGEST:
            raise InputError(f"config.{field} is {shown(value)}; it must be in -(2^31 - 1)..2^31 - 1")


def shown(value: Any) -> str:
    """Returns a value for a message, cut to one short line."""
    return reprlib.repr(value)


def _holds(holds: Callable[[Any], bool], value: Any) -> bool:
    try:
        return holds(value)
    except TypeError:
        return False
