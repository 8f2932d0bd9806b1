"""From a section of a config to the function that it names, with its arguments bound."""

import difflib
import functools
import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, get_origin

import numpy as np
from ml_collections import ConfigDict

from robal_jax.builder.ranges import BOOLEAN, INTEGER, NUMBER, TEXT, Rule
from robal_jax.errors import InputError, shown
from robal_jax.own_functions import broken, imported, signature_of

POSITIONAL = {
    "loss": ("logits", "labels"),
    "objective": ("model", "params", "stats", "batch"),
    "augmentation": ("keys", "images", "size"),
}
"""Arguments that a function of a kind receives by position when it is called; those of other kinds: none."""

LATE = {
    "loss": ("epoch", "class_statistics", "radius_factors"),
    "objective": ("class_statistics", "radius_factors", "teacher"),
    "schedule": ("epochs", "steps_per_epoch"),
}
"""Parameters that receive their values by name when the function is called."""

VARIABLE = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)

ANYTHING: Rule = ("anything", lambda value: True)

FUNCTION: Rule = ("a section with a name", callable)

OF_TYPE: dict[Any, Rule] = {str: TEXT, bool: BOOLEAN, int: INTEGER, float: NUMBER}
"""Values of a parameter, by its annotation."""


def call(
    kind: str, table: Mapping[str, Callable[..., Any]], section: ConfigDict, **given: Any
) -> functools.partial:
    """Binds the arguments of the function that a section names.

    Args:
      kind: of function, for messages.
      table: the library's functions by name.
      section: ``name`` and keyword arguments; an argument that is a section itself is built the same way.
      **given: values that the config does not hold, such as class counts; each is bound if the function has a
        parameter of that name.

    Returns:
      A ``functools.partial``.

    Raises:
      InputError: the name is unknown, a keyword is unknown or missing, or its value has the wrong type.
    """
    name = str(section.get("name", ""))
    options = {key: value for key, value in section.items() if key != "name"}
    function = named(kind, table, name)
    parameters = _parameters(kind, name, function)
    known = _by_name(kind, parameters)
    late = LATE.get(kind, ())
    unknown = sorted(set(options) - (set(known) - set(late)))
    if unknown:
        raise not_taken(kind, name, unknown[0], _settable(kind, known, given))
    for key, option in options.items():
        annotation, value = parameters[key].annotation, option
        if isinstance(option, ConfigDict) and annotation not in OF_TYPE:
            options[key] = value = call(kind, table, option, **given)
        must, holds = FUNCTION if is_function(annotation) else OF_TYPE.get(annotation, ANYTHING)
        if not holds(value):
            raise InputError(f"{key} of {kind} {name!r} is {shown(value)}; it must be {must}")
    bound = {key: _read_only(value) for key, value in given.items() if key in known} | options
    needed = [key for key in known if parameters[key].default is inspect.Parameter.empty]
    missing = [
        key for key in needed if parameters[key].kind not in VARIABLE and key not in bound and key not in late
    ]
    if missing:
        what, passed = f"needs {missing[0]!r}; set it in the config file", ", ".join([*given, *late])
        if ":" not in name:
            raise InputError(f"{kind} {name!r} {what}")
        raise broken(kind, name, f"{what}, or use what is passed ({passed})" if passed else what)
    return functools.partial(function, **bound)


def is_function(annotation: Any) -> bool:
    """Returns whether a parameter with this annotation takes a function: ``Callable``, or of some types."""
    return Callable in (annotation, get_origin(annotation))


def _read_only(value: Any) -> Any:
    """Returns a view of an array that a user's function cannot change for others; all else as it is."""
    if isinstance(value, np.ndarray):
        value = value.view()
        value.flags.writeable = False
    return value


def named(kind: str, table: Mapping[str, Callable[..., Any]], name: str) -> Callable[..., Any]:
    """Returns the function of a name: one of a table, or the user's own, which is imported.

    Raises:
      InputError: the name is unknown, or the user's own function cannot be imported.
    """
    if ":" in name:
        return imported(kind, name)
    if name not in table:
        raise InputError(
            f"unknown {kind} {name!r}; use one of {', '.join(table)}, or your own as 'module:function'"
        )
    return table[name]


def arguments(
    kind: str, table: Mapping[str, Callable[..., Any]], name: str, given: Collection[str]
) -> dict[str, inspect.Parameter]:
    """Returns the parameters of a function that its section can set, by name.

    Args:
      kind: of function.
      table: the library's functions by name.
      name: of the function.
      given: names of the values that the config does not hold.

    Raises:
      InputError: see :func:`named`; or the function cannot be called as its kind is.
    """
    parameters = _parameters(kind, name, named(kind, table, name))
    return {key: parameters[key] for key in _settable(kind, _by_name(kind, parameters), given)}


def not_taken(kind: str, name: str, key: str, fields: Sequence[str]) -> InputError:
    """Returns the error of a key that a function does not take; ``fields`` are those that it takes."""
    near = difflib.get_close_matches(key, fields, 1, cutoff=0.65)
    hint = f": did you mean {near[0]!r}?" if near and len(fields) > 1 else ""
    use = f"use {'one of ' * (len(fields) > 1)}{', '.join(fields)}{hint}" if fields else "leave it out"
    return InputError(f"{kind} {name!r} takes no {key!r}; {use}")


def _by_name(kind: str, parameters: Mapping[str, inspect.Parameter]) -> list[str]:
    """Returns the parameters that are not given by position."""
    positional = [p for p in parameters.values() if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    by_position = [p.name for p in positional][: len(POSITIONAL.get(kind, ()))]
    return [key for key in parameters if key not in (*by_position, "parent")]  # which flax adds


def _settable(kind: str, known: Sequence[str], given: Collection[str]) -> list[str]:
    """Returns the parameters that a section sets; flax adds a name, too."""
    return [key for key in known if key not in ("name", *given, *LATE.get(kind, ()))]


def _parameters(kind: str, name: str, function: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    """Returns a function's parameters; they must have room for the arguments given by position."""
    signature = signature_of(kind, name, function)
    by_position = POSITIONAL.get(kind, ())
    try:
        signature.bind_partial(*by_position)
    except TypeError as error:
        raise broken(kind, name, f"is a function of {signature}") from error
    return signature.parameters
