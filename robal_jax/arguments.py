"""Arguments of the command line as people type or paste them: dashes, quotation marks, forms of numbers."""

import ast
import contextlib
import re
from collections.abc import Sequence
from typing import Any

from robal_jax.errors import InputError

DASHES = "\u2010\u2011\u2012\u2013\u2014\u2015\u2212\ufe58\ufe63\uff0d"
"""Characters that look like a hyphen; text processors and chats put them in its place."""

QUOTES = "\u00ab\u00bb\u2018\u2019\u201a\u201b\u201c\u201d\u201e\u201f\u2039\u203a"
"""Quotation marks that a shell does not know."""

INVISIBLE = "\u00a0\u2007\u200b\u202f\u2060\ufeff"
"""Characters that look like a space or like nothing, but do not end an argument."""

TRUTH = {"true": True, "t": True, "yes": True, "y": True, "on": True, "1": True} | {
    "false": False, "f": False, "no": False, "n": False, "off": False, "0": False
}  # fmt: skip
"""Words for booleans, in lower case."""


def typed(argument: str) -> str:
    """Returns an argument as it is typed on a keyboard: hyphens for dashes, no marks around it or its value.

    Example:
      >>> typed("–config=“at”"), typed("--workdir=ein–zwei")
      ('--config=at', '--workdir=ein–zwei')
    """
    spaced = re.sub(f"^[{INVISIBLE}]+|[{INVISIBLE}]+(?=-|$)", " ", argument).strip(" ")
    found = spaced if spaced != argument.strip(" ") else argument
    quoted = found[:1] in {*QUOTES}
    name, equals, value = (found.strip(QUOTES) if quoted else found).partition("=")
    if re.match(f"[-{DASHES}]", name):
        hyphens = re.sub(f"[{DASHES}]", "-", name)
        name = name if name == hyphens else "--" + hyphens.lstrip("-")
    return name + equals + (value.strip(QUOTES) if value[:1] in {*QUOTES} else value)


def check_typed(arguments: Sequence[str]) -> list[str]:
    """Returns the arguments if a keyboard can have typed them.

    Raises:
      InputError: an argument has dashes, quotation marks or spaces of a text processor.
    """
    for argument in arguments:
        if typed(argument) != argument:
            raise InputError(
                f"{argument} has a dash, a quotation mark or a space that a text processor put in; "
                f"write {typed(argument)}"
            )
    return list(arguments)


def plain(argument: str, before: Any) -> str:
    """Returns an argument ``--name=value`` with a value that Python reads as the type of the present one.

    A real number may be a fraction, ``8/255``, a whole number ``1e3`` or ``60.0``, a boolean ``yes``, ``no``,
    ``on`` or ``off``.

    Args:
      argument: what was typed.
      before: the present value of the field.

    Raises:
      InputError: the value is none of these.

    Example:
      >>> plain("--epochs=1e3", 60), plain("--epsilon=1/8", 0.1), plain("--sync=off", True)
      ('--epochs=1000', '--epsilon=0.125', '--sync=false')
    """
    name, equals, text = argument.partition("=")
    if not equals:
        return argument
    if isinstance(before, bool):
        if text.strip().lower() not in TRUTH:
            raise InputError(f"{argument} is neither true nor false; write {name}=true or {name}=false")
        return f"{name}={str(TRUTH[text.strip().lower()]).lower()}"
    if isinstance(before, int):
        return f"{name}={_whole(argument, text)}"
    if isinstance(before, float):
        return f"{name}={_real(argument, text)!r}"
    return argument


def value(argument: str, example: Any) -> Any:
    """Returns the value of an argument ``--name=value`` as the type of an example.

    Args:
      argument: what was typed.
      example: a number, a boolean, a text, or a list or tuple of such; None for any literal of Python, or
        else a text.

    Raises:
      InputError: the value is none of this type.

    Example:
      >>> value("--alpha=1/8", 0.0), value("--epsilons=(1/8, 0.25)", (0.0,)), value("--x=abc", None)
      (0.125, (0.125, 0.25), 'abc')
    """
    name, _, text = argument.partition("=")
    if isinstance(example, list | tuple):
        entries = [entry.strip() for entry in text.strip().strip("()[]").split(",")]
        return tuple(value(f"{name}={entry}", example[0] if example else None) for entry in entries if entry)
    if isinstance(example, bool):
        return plain(argument, example).endswith("=true")
    if isinstance(example, int | float):
        return type(example)(plain(argument, example).partition("=")[2])
    return text if isinstance(example, str) else _literal(argument, text)


def _literal(argument: str, text: str) -> Any:
    with contextlib.suppress(ValueError, SyntaxError):
        return ast.literal_eval(text)
    with contextlib.suppress(InputError):
        return _real(argument, text)
    return text


def _whole(argument: str, text: str) -> int:
    grouped = re.fullmatch(r"\d{1,3}([,.' ]\d{3})+", text)  # 1.000 may mean 1 or 1000
    if not grouped:
        with contextlib.suppress(ValueError):
            return int(text)
        with contextlib.suppress(ValueError, OverflowError):
            if int(float(text)) == float(text):
                return int(float(text))
    meant = re.sub(r"\D", "", text) if grouped else "one such as 100"
    raise InputError(f"{argument} is no whole number; write {meant}")


def _real(argument: str, text: str) -> float:
    top, slash, bottom = text.partition("/")
    try:
        return float(top) / float(bottom) if slash else float(text)
    except (ValueError, ZeroDivisionError) as error:
        percent = re.fullmatch(r"([\d.]+) ?%", text)
        comma = re.fullmatch(r"(\d*),(\d+)", text)
        meant = (
            f"{float(percent[1]) / 100:g}"
            if percent and percent[1].count(".") < 2
            else f"{comma[1]}.{comma[2]}"
            if comma
            else "0.031 or 8/255"
        )
        raise InputError(f"{argument} is no number; write {meant}") from error
