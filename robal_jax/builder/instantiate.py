"""From a section of a config to the function that it names, with its arguments bound."""

import functools
import importlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any, get_origin

from ml_collections import ConfigDict

from robal_jax.builder.ranges import BOOLEAN, INTEGER, NUMBER, TEXT, Rule, shown
from robal_jax.errors import InputError, one_line

# Parameters that receive their values when the function is called.
LATE = ("epoch", "epochs")

# Kinds of functions that are called with arguments by position.
POSITIONAL = ("loss", "objective")

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
    options = {
        key: call(kind, table, value, **given) if isinstance(value, ConfigDict) else value
        for key, value in section.items()
        if key != "name"
    }
    if ":" in name:
        function = _import(kind, name)
    elif name in table:
        function = table[name]
    else:
        raise InputError(
            f"unknown {kind} {name!r}; use one of {', '.join(table)}, or your own as 'module:function'"
        )
    parameters = inspect.signature(function).parameters
    unknown = sorted(set(options) - set(parameters))
    if unknown:
        known = [key for key in parameters if key not in ("parent", "name")]  # which flax adds to a module's
        raise InputError(f"{kind} {name!r} takes no {unknown[0]!r}; use one of {', '.join(known)}")
    for key, value in options.items():
        annotation = parameters[key].annotation
        must, holds = FUNCTION if get_origin(annotation) is Callable else OF_TYPE.get(annotation, ANYTHING)
        if not holds(value):
            raise InputError(f"{key} of {kind} {name!r} is {shown(value)}; it must be {must}")
    bound = options | {key: value for key, value in given.items() if key in parameters and key not in options}
    needed = [
        key
        for key, p in parameters.items()
        if p.default is p.empty
        and (p.kind is p.KEYWORD_ONLY or (p.kind is p.POSITIONAL_OR_KEYWORD and kind not in POSITIONAL))
    ]
    missing = [key for key in needed if key not in bound and key not in LATE]
    if missing:
        raise InputError(f"{kind} {name!r} needs {missing[0]!r}; set it in the config file")
    return functools.partial(function, **bound)


def _import(kind: str, name: str) -> Callable[..., Any]:
    module, _, attribute = name.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise InputError(
            f"cannot import the {kind} {name!r} ({one_line(error)}); correct the name, or add its folder to "
            "PYTHONPATH"
        ) from error


def takes(function: Callable[..., Any], name: str) -> bool:
    """Returns whether a function has a parameter of this name."""
    return name in inspect.signature(function).parameters
