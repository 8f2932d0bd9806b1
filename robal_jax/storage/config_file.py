"""The config of a run as a file, and what makes two configs the same run.

A field that is added to ``configs/base.py`` after a release gets a line in :data:`NEUTRAL`. That line is all
that keeps older runs alive: a run that was made before the field existed resumes, is evaluated, and keeps its
name in ``experiments/reproduce.py``.
"""

import json
import pathlib
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from robal_jax.errors import InputError
from robal_jax.storage.names import CONFIG

NEUTRAL: dict[str, Any] = {}
"""Fields added after 0.1.0, by full name, with the value that means "as before the field existed"."""

NOT_TRAINED = (
    "method", "evaluation.", "data.path",
    "train.keep_checkpoints", "train.reading_threads", "train.steps_per_dispatch", "train.layout",
)  # fmt: skip
"""Beginnings of the names of fields that do not change what is trained.

They name the method, the evaluation, how devices are used and fed, and where the data lies (the data itself
is compared by its digest).
"""


def to_json(config: ConfigDict) -> str:
    """Returns the resolved config as JSON with sorted keys."""
    return json.dumps(json.loads(config.to_json()), indent=2, sort_keys=True) + "\n"


def with_neutral(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Adds the fields that an older config lacks, with their neutral values.

    A field is added where its section exists: ``attack.restarts`` to a config that has a section ``attack``.

    Args:
      fields: nested dictionaries, as JSON holds a config.

    Returns:
      New nested dictionaries.
    """
    filled = json.loads(json.dumps(fields))
    for name, value in NEUTRAL.items():
        *sections, field = name.split(".")
        section = filled
        for key in sections:
            section = section.get(key, {}) if isinstance(section, dict) else {}
        if section and isinstance(section, dict):
            section.setdefault(field, value)
    return filled


def without_neutral(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the fields by full name, without those that have their neutral value.

    Two configs that agree here are the same, whichever of them was made before a field was added.
    """
    return {
        name: value
        for name, value in flatten(fields).items()
        if name not in NEUTRAL or value != _as_json(NEUTRAL[name])
    }


def _as_json(value: Any) -> Any:
    return json.loads(json.dumps(value))


def read_config(workdir: pathlib.Path) -> ConfigDict:
    """Reads the config of a run; fields that were added since get their neutral values.

    Raises:
      InputError: the folder holds no config, or a damaged one.
    """
    path = workdir / CONFIG
    try:
        return ConfigDict(with_neutral(json.loads(path.read_text()))).lock()
    except FileNotFoundError as error:
        raise InputError(
            f"no run in {workdir}: it has no {CONFIG}; train first, or correct --workdir"
        ) from error
    except (OSError, ValueError, AttributeError) as error:
        raise InputError(
            f"{path} cannot be read ({error}); restore it from a copy, or train in a new --workdir"
        ) from error


def differences(config: ConfigDict, other: ConfigDict) -> list[str]:
    """Lists what two configs would train differently, as lines ``field: this, there``."""
    here, there = training_fields(config), training_fields(other)
    names = sorted(name for name in {*here, *there} if here.get(name) != there.get(name))
    both = ((fields.get(name, NEUTRAL.get(name)) for fields in (here, there)) for name in names)
    return [
        f"{name}: {mine!r} here, {theirs!r} there" for name, (mine, theirs) in zip(names, both, strict=True)
    ]


def training_fields(config: ConfigDict) -> dict[str, Any]:
    """Returns the fields that decide what is trained, by full name, without neutral values."""
    fields = without_neutral(json.loads(config.to_json()))
    return {key: value for key, value in fields.items() if not key.startswith(NOT_TRAINED)}


def evaluation_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the fields that decide what an evaluation of given weights finds, by full name.

    Args:
      fields: nested dictionaries, as JSON holds a config.

    Returns:
      Without neutral values, and without what the weights themselves already decide.
    """
    read = ("data.", "model.", "head.", "threat.norm", "evaluation.")
    return {
        name: value
        for name, value in without_neutral(fields).items()
        if name.startswith(read) and name != "data.path"
    }


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns the values of nested dictionaries by full name, ``section.field``."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat.update(flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value})
    return flat
