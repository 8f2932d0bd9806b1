"""The config of a run as a file, and what makes two configs the same run.

A field that is added to ``configs/base.py`` after a release gets a line in :data:`NEUTRAL`. With that line a
run that was made before the field existed resumes, is evaluated, and keeps its name in
``experiments/reproduce.py``.
"""

import copy
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from robal_jax.errors import InputError, one_line
from robal_jax.storage.files import broken_link
from robal_jax.storage.names import CONFIG

NEUTRAL: dict[str, Any] = {
    "evaluation.examples": 0,
    "evaluation.budget": {"name": "constant"},
    "evaluation.weights": "current",
    "evaluation.groups": "thirds",
    "evaluation.minimum_norm": "",
    "evaluation.corruptions": False,
    "evaluation.certified": False,
    "evaluation.optimality": False,
    "threat.budget": {"name": "constant"},
    "threat.ramp": 0.0,
    "threat.scaled_steps": True,
    "attack.noise": 1.0,
    "attack.common_noise": False,
    "attack.reach": 1.0,
    "attack.batch_norm": "running",
    "attack.alignment": 0.0,
    "attack.free_steps": 0,
    "attack.first_epoch": 1,
    "attack.second_step": False,
    "perturbation": {"name": "none"},
    "average": {"name": "none"},
    "class_statistics": {"name": "none"},
    "train.mixing": "none",
    "train.batch_norm_momentum": 0.1,
    "optimizer.nesterov": False,
    "optimizer.decayed": "all",
    "train.label_smoothing": 0.0,
    "generated": {"path": "", "share": 0.0},
    "train.held_out": 0.0,
    "train.evaluate_epochs": 0,
    "train.select": "last",
    "train.teacher": "",
    "train.images_per_class": 0,
    "train.logged_passes": "",
}
"""Fields that older configs lack, by full name, with the JSON value that means "as before the field existed".

The value of a new section is the dictionary of its fields.
"""

LISTED = 8  # runs that a message lists

NOT_TRAINED = (
    "method", "evaluation.", "data.path", "generated.path",
    "train.keep_checkpoints", "train.reading_threads", "train.steps_per_dispatch", "train.layout",
)  # fmt: skip
"""Beginnings of the names of the fields that do not change what is trained.

They are the name of the method, the evaluation, how devices are used and fed, and the places of the data. The
data themselves are compared by their digest.
"""

SAVED = "train.checkpoint_epochs"
"""A field that changes nothing that is trained either, but it is in the names that tables give to runs."""

NOT_JUDGED = (
    "method", "evaluation.batch_size", "evaluation.examples", "evaluation.autoattack", "evaluation.audit.",
    "evaluation.minimum_norm", "evaluation.corruptions", "evaluation.certified", "evaluation.optimality",
)  # fmt: skip
"""Beginnings of the names of the fields of an evaluation on which no look during the training depends."""

WITHOUT_ATTACKS = (
    "evaluation.groups", "evaluation.head_classes", "evaluation.tail_classes", "evaluation.corruptions",
    "evaluation.certified", "evaluation.optimality",
)  # fmt: skip
"""Names of the fields of an evaluation on which no attack depends.

A finished evaluation is given what they ask for.
"""

EVALUATED = ("method", "evaluation.", "data.path", "generated.path", "train.layout", "train.select")
"""Beginnings of the names of the fields that an evaluation may set for a trained run."""


def to_json(config: ConfigDict) -> str:
    """Returns the resolved config as JSON with sorted keys."""
    return json.dumps(json.loads(config.to_json()), indent=2, sort_keys=True) + "\n"


def with_neutral(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Adds the fields that an older config lacks, with their neutral values.

    A field is added if its section exists: ``attack.restarts`` to a config that has a section ``attack``. A
    section that names a function of the user's own gets none, because it would not take them.

    Args:
      fields: nested dictionaries, as JSON holds a config.

    Returns:
      New nested dictionaries.
    """
    filled = copy.deepcopy(dict(fields))
    for name, value in NEUTRAL.items():
        *sections, field = name.split(".")
        section: Any = filled
        for key in sections:
            section = section.get(key) if isinstance(section, dict) else None
        if isinstance(section, dict) and ":" not in str(section.get("name", "")):
            section.setdefault(field, copy.deepcopy(value))
    return filled


def without_neutral(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the fields by full name, without those that have their neutral value.

    If two configs agree in these fields, they are the same, even if a field was added between them.
    """
    neutral = flatten(NEUTRAL)
    return {
        name: value
        for name, value in flatten(fields).items()
        if name not in neutral or value != neutral[name]
    }


def read_config(workdir: pathlib.Path) -> ConfigDict:
    """Reads the config of a run; fields that were added since get their neutral values.

    Raises:
      InputError: the folder holds no config, or the config cannot be read.
    """
    path = workdir / CONFIG
    try:
        text = path.read_text("utf-8-sig")  # editors may put a mark before the text
        fields = json.loads(text, object_pairs_hook=_unique)
        if not isinstance(fields, dict):
            raise TypeError("it holds no sections")
        return ConfigDict(with_neutral(fields)).lock()
    except (FileNotFoundError, NotADirectoryError) as error:
        run = run_around(workdir) or run_around(workdir.absolute())
        if run is not None:
            raise InputError(f"{workdir} is no run, but a part of one; name {run}") from error
        why = broken_link(workdir) or f"it has no {CONFIG}"
        inside = sorted(str(file.parent) for file in workdir.glob(f"*/{CONFIG}"))
        what = (
            f"name one of {', '.join(inside[:LISTED])}"
            if inside
            else "train first, or name another folder; models of the zoo are for load_model and --model"
        )
        raise InputError(f"no run in {workdir}: {why}; {what}") from error
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise InputError(
            f"cannot read {path} ({one_line(error)}); correct it, or restore it from a copy"
        ) from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Makes a dictionary of a JSON object whose keys differ."""
    fields = dict(pairs)
    if len(fields) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"it has {next(name for name in names if names.count(name) > 1)!r} twice")
    return fields


def run_around(path: pathlib.Path) -> pathlib.Path | None:
    """Returns the folder of the run that a path is, or is a part of; None if there is none."""
    return next((folder for folder in (path, *path.parents[:3]) if os.path.isfile(folder / CONFIG)), None)


def differences(config: ConfigDict, other: ConfigDict) -> list[str]:
    """Lists what two configs would train differently, as lines ``field: this, there``."""
    changed = _changed(training_fields(config), training_fields(other))
    return [f"{name}: {here!r} here, {there!r} there" for name, here, there in changed if name != SAVED]


def judged_differently(config: ConfigDict, other: ConfigDict) -> list[str]:
    """Lists the changed fields that decide which checkpoint is the best; none if there are no looks."""
    if "train.evaluate_epochs" not in training_fields(config):
        return []
    return [
        f"{name}: {here!r} here, {there!r} there"
        for name, here, there in evaluated_differently(config, other)
        if not name.startswith(NOT_JUDGED)
    ]


def evaluated_differently(config: ConfigDict, other: ConfigDict) -> list[tuple[str, Any, Any]]:
    """Returns the changed fields of the method's name and its evaluation, with the values of both configs."""
    here, there = (without_neutral(json.loads(c.to_json())) for c in (config, other))
    return [found for found in _changed(here, there) if found[0].startswith(("method", "evaluation."))]


def with_evaluation_of(config: ConfigDict, other: ConfigDict) -> ConfigDict:
    """Returns a config with the method's name and the evaluation of another one."""
    fields, others = (json.loads(c.to_json()) for c in (config, other))
    return ConfigDict(fields | {name: others[name] for name in ("method", "evaluation")}).lock()


def evaluates_another_run(config: ConfigDict, trained: ConfigDict) -> list[str]:
    """Lists the fields that the config of an evaluation may not change, as lines ``field: this, there``."""
    here, there = (without_neutral(json.loads(c.to_json())) for c in (config, trained))
    return [
        f"config.{name} is {this!r} here, {that!r} in the run"
        for name, this, that in _changed(here, there)
        if not name.startswith(EVALUATED)
    ]


def _changed(here: Mapping[str, Any], there: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """Returns the fields that differ, with both values; the arguments are without neutral values."""
    names = sorted(name for name in {*here, *there} if here.get(name) != there.get(name))
    neutral = flatten(NEUTRAL)
    return [(name, *(f.get(name, neutral.get(name)) for f in (here, there))) for name in names]


def training_fields(config: ConfigDict) -> dict[str, Any]:
    """Returns the fields that decide what is trained, by full name, without neutral values."""
    fields = without_neutral(json.loads(config.to_json()))
    return {key: value for key, value in fields.items() if not key.startswith(NOT_TRAINED)}


def ingredients(config: ConfigDict) -> str:
    """Returns the training's fields of ``NEUTRAL`` that do not have their neutral values, in words."""
    fields, found = training_fields(config), []
    for name, neutral in NEUTRAL.items():
        if name.startswith(NOT_TRAINED):
            continue
        if not isinstance(neutral, dict):
            found += [f"{name} {fields[name]}"] if name in fields else []
        elif f"{name}.name" in fields:
            inside = {key: value for key, value in fields.items() if key.startswith(f"{name}.")}
            chosen = inside.pop(f"{name}.name")
            settings = ", ".join(f"{key.removeprefix(f'{name}.')} {value}" for key, value in inside.items())
            found.append(f"{name} {chosen}" + (f" ({settings})" if settings else ""))
        else:
            inside = {key: value for key, value in fields.items() if key.startswith(f"{name}.")}
            found += [f"{key} {value}" for key, value in inside.items()]
    return ", ".join(found)


def evaluation_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the fields that decide the results of an evaluation, if the weights are given, by full name.

    Args:
      fields: nested dictionaries, as JSON holds a config.

    Returns:
      The fields, without neutral values.
    """
    read = ("data.", "model.", "head.", "threat.norm", "train.held_out", "train.select", "evaluation.")
    return {
        name: value
        for name, value in without_neutral(fields).items()
        if name.startswith(read) and name not in ("data.path", "evaluation.batch_size")
    }


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns the values of nested dictionaries by full name, ``section.field``."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat.update(flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value})
    return flat
