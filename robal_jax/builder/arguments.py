"""Arguments of the functions that sections name, from the command line."""

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, get_args, get_origin

from ml_collections import ConfigDict

from robal_jax import arguments, classifiers, models, objectives, optimizers
from robal_jax.averages import AVERAGES
from robal_jax.budgets import BUDGETS, LEARNED
from robal_jax.builder import instantiate
from robal_jax.class_statistics import CLASS_STATISTICS
from robal_jax.data import sources
from robal_jax.errors import InputError
from robal_jax.losses import LOSSES
from robal_jax.perturbations import PERTURBATIONS


class Section(NamedTuple):
    """What a section of the config selects.

    Attributes:
      kind: of function.
      table: the library's functions by name.
      given: names of the values that a function receives and the config does not hold.
    """

    kind: str
    table: Mapping[str, Callable[..., Any]]
    given: tuple[str, ...] = ()


_HEAD = Section("head", classifiers.HEADS, ("num_classes", "class_counts", "axis_name"))
_LOSS = Section("loss", LOSSES, ("class_counts", "axis_name", "threat"))

SECTIONS: dict[str, Section] = {
    "data": Section("data set", sources.SOURCES),
    "model": Section("model", models.BACKBONES, ("convolution", "axis_name")),
    "head": _HEAD,
    "evaluation.head": _HEAD,
    "loss": _LOSS,
    "attack.loss": _LOSS,
    "objective": Section("objective", objectives.OBJECTIVES, (*_LOSS.given, "loss", "attack", "epochs")),
    "class_statistics": Section("class statistics", CLASS_STATISTICS, ("class_counts",)),
    "schedule": Section("schedule", optimizers.SCHEDULES),
    "optimizer": Section("optimizer", optimizers.OPTIMIZERS, ("schedule",)),
    "perturbation": Section("perturbation", PERTURBATIONS),
    "average": Section("average", AVERAGES, ("steps_per_epoch",)),
    "threat.budget": Section("budget", BUDGETS | LEARNED, ("class_counts", "epsilon")),
    "evaluation.budget": Section("budget", BUDGETS, ("class_counts", "epsilon")),
}
"""Every section with a ``name``, by its own name in the config; ``cli.NAMED`` lists them, too."""


def with_arguments(config: ConfigDict, texts: Mapping[str, str]) -> ConfigDict:
    """Sets names and arguments of functions in the sections of a config, in place, whatever their order.

    If the name of a section changes, the fields that its new function does not take are dropped. A text that
    the function does not take is refused.

    Args:
      config: the config.
      texts: values as they were typed, by the full name of their fields, each in one of ``SECTIONS``.

    Returns:
      The config.

    Raises:
      InputError: a name is unknown, or an argument is not taken or has a value of another type.
    """
    with config.unlocked(), config.ignore_type():
        for path, section in SECTIONS.items():
            inside = {
                key.removeprefix(f"{path}."): text
                for key, text in texts.items()
                if key.startswith(f"{path}.")
            }
            if inside:
                _set(functools.reduce(ConfigDict.get, path.split("."), config), path, section, inside)
    return config.lock()


def _set(fields: ConfigDict, path: str, section: Section, texts: Mapping[str, str]) -> None:
    """Sets the fields of one section from texts by their names in it, such as 'name' and 'base.name'."""
    before, fields["name"] = fields.get("name", ""), texts.get("name", fields.get("name", ""))
    name, kind = fields["name"], section.kind
    if not name and texts.keys() - {"name"}:
        raise InputError(f"config.{path}.name is empty; set it to one of {', '.join(section.table)}")
    if not name:  # such as of the evaluation's head
        for key in set(fields) - {"name"}:
            del fields[key]
        return
    taken = instantiate.arguments(*section[:2], name, section.given)
    typed = dict.fromkeys(key.partition(".")[0] for key in texts if key != "name")
    for key in typed:
        if key not in taken:
            raise instantiate.not_taken(kind, name, key, list(taken))
    if name != before:
        for key in set(fields) - {"name", *taken}:
            del fields[key]
    for key in typed:
        inside = {
            inner.removeprefix(f"{key}."): text
            for inner, text in texts.items()
            if inner.startswith(f"{key}.")
        }
        nested = instantiate.is_function(taken[key].annotation)
        if nested is (key in texts):
            must = "a section with a name" if nested else "one value"
            raise InputError(
                f"{key} of {kind} {name!r} is {must}; write --config.{path}.{key}"
                + (".name=NAME" if nested else "=VALUE")
            )
        if nested:
            fields[key] = fields.get(key, ConfigDict({"name": ""}))
            _set(fields[key], f"{path}.{key}", section, inside)
        else:
            fields[key] = arguments.value(f"--config.{path}.{key}={texts[key]}", _example(taken[key]))


EXAMPLES: dict[Any, Any] = {float: 0.0, int: 0, bool: False, str: ""}
"""A value of each type that an annotation may name; of several the first one is meant."""


def _example(parameter: inspect.Parameter) -> Any:
    """Returns a value of the type of a parameter, by its annotation or its default; None if none tells."""
    annotation, inner = parameter.annotation, get_args(parameter.annotation)
    several = get_origin(annotation) in (tuple, list, Sequence)
    found = [EXAMPLES[kind] for kind in EXAMPLES if kind is annotation or kind in inner]
    if several:
        return tuple(found[:1])
    default = None if parameter.default is inspect.Parameter.empty else parameter.default
    return found[0] if found else default
