"""TODO builder.instantiate."""

import functools
import importlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from ml_collections import ConfigDict

from robal_jax.errors import InputError

# What a function may ask for that is known only when a step is made.
LATE = ("epoch",)


def call(
    kind: str, table: Mapping[str, Callable[..., Any]], section: ConfigDict, **given: Any
) -> functools.partial:
    """The function that a section names, with the section's other keys and what it wants of ``given`` bound.

    Args:
      kind: what the section is, for messages.
      table: the library's functions by name.
      section: ``name`` and keyword arguments; one that is a section itself is built the same way.
      **given: values that come from elsewhere (class counts, say); only those that the function has a
        parameter for are bound.

    Returns:
      A ``functools.partial``.

    Raises:
      InputError: no such name, or keyword arguments that the function does not take.
    """
    name = section.name
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
            f"unknown {kind} {name!r}; known: {', '.join(table)}, or your own as 'module:function'"
        )
    parameters = inspect.signature(function).parameters
    unknown = sorted(set(options) - set(parameters))
    if unknown:
        takes = [
            key for key in parameters if key not in ("parent", "name")
        ]  # flax adds these to a module's own
        raise InputError(f"{kind} {name!r} takes no {unknown[0]!r}; it takes: {', '.join(takes)}")
    bound = options | {key: value for key, value in given.items() if key in parameters and key not in options}
    needed = [key for key, p in parameters.items() if p.kind is p.KEYWORD_ONLY and p.default is p.empty]
    missing = [key for key in needed if key not in bound and key not in LATE]
    if missing:
        raise InputError(f"{kind} {name!r} needs {missing[0]!r}; set it in the config file")
    return functools.partial(function, **bound)


def _import(kind: str, name: str) -> Callable[..., Any]:
    module, _, attribute = name.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise InputError(f"cannot import the {kind} {name!r}: {error}") from error


def takes(function: Callable[..., Any], name: str) -> bool:
    """Returns whether a function has a parameter of this name."""
    return name in inspect.signature(function).parameters
