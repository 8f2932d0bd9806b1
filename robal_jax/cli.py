"""The command line of the experiment scripts: a config with overrides, a few flags, clear errors.

ml_collections does the parsing of ``--config.field=value``; this module loads the config file, names the
nearest key where one is unknown, and turns errors into one line.
"""

import difflib
import errno
import importlib.util
import os
import pathlib
import sys
from collections.abc import Callable, Sequence

from absl import flags, logging
from ml_collections import ConfigDict, config_flags

from robal_jax.devices.cpu import prepare_jax
from robal_jax.errors import DivergedError, InputError

PROCESSES = {
    "coordinator": "of several processes: HOST:PORT of the first one; auto on a TPU slice or under Slurm",
    "processes": "how many there are, with HOST:PORT",
    "process": "number of this one, from 0, with HOST:PORT",
}
"""Flags of scripts that can run in several processes, for ``hosts.start``."""


def run(main: Callable[[list[str]], None]) -> None:
    """Runs a script's ``main(arguments)`` and exits: 0, or with one line on stderr and a status.

    JAX is set up before (:func:`prepare_jax`), as far as the script has not imported it yet.

    2: something given cannot be used (:class:`InputError`), or the disk is full; 3: training diverged
    (:class:`DivergedError`).
    """
    prepare_jax(os.environ)
    logging.set_verbosity(logging.FATAL)  # Orbax and TFDS tell of their inner life through absl
    try:
        main(sys.argv[1:])
    except InputError as error:
        status, message = 2, str(error)
    except DivergedError as error:
        status, message = 3, str(error)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        where = f": {error.filename}" if error.filename else ""
        status = 2
        message = (
            f"no room on the disk ({error.strerror}{where}); what was complete before is untouched, and the "
            "same command goes on from there once there is room"
        )
    else:
        return
    print("error: " + " ".join(message.split()), file=sys.stderr)
    sys.exit(status)


def split_overrides(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Parts the overrides ``--config.field=value`` from the other arguments; returns others, overrides."""
    overrides = [argument for argument in arguments if argument.lstrip("-").startswith("config.")]
    return [argument for argument in arguments if argument not in overrides], overrides


def parse(arguments: Sequence[str], texts: dict[str, str], usage: str) -> dict[str, str]:
    """A script's own flags.

    Args:
      arguments: without the program's name and without overrides.
      texts: name of each flag to what ``--help`` says of it; all are strings.
      usage: first lines of ``--help``.

    Returns:
      The flags' values, '' where not given.

    Raises:
      InputError: an unknown flag, or an argument that is no flag.
    """
    values = flags.FlagValues()
    for name, text in texts.items():
        flags.DEFINE_string(name, "", text, flag_values=values)
    flags.DEFINE_bool("help", False, "this text", flag_values=values)
    try:
        rest = values(["", *arguments])[1:]
    except flags.Error as error:
        raise InputError(str(error)) from error
    if values["help"].value:
        print(usage)
        for name, text in texts.items():
            print(f"  --{name}: {text}")
        sys.exit(0)
    if rest:
        raise InputError(f"unexpected argument {rest[0]!r}; arguments have the form --name=value")
    return {name: str(values[name].value) for name in texts}


def load_config(spec: str) -> ConfigDict:
    """The config of a file, ``path.py`` or ``path.py:argument``.

    Raises:
      InputError: no such file, or its ``get_config`` refuses the argument.
    """
    name, _, argument = spec.partition(":")
    path = pathlib.Path(name)
    if not path.is_file():
        known = sorted(p.name for p in path.parent.glob("*.py")) if path.parent.is_dir() else []
        near = difflib.get_close_matches(path.name, known, 1)
        there = (
            f"; nearest there: {near[0]}" if near else f"; in {path.parent}: {', '.join(known) or 'nothing'}"
        )
        raise InputError(f"no config file {name}{there}")
    module_spec = importlib.util.spec_from_file_location(path.stem, path)
    if module_spec is None or module_spec.loader is None:
        raise InputError(f"config file {name} is not Python")
    module = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(module)
    try:
        config = module.get_config(*([argument] if argument else []))
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise InputError(f"{spec}: {error}") from error
    return config.lock()


def apply_overrides(config: ConfigDict, overrides: Sequence[str]) -> ConfigDict:
    """Sets fields of a config from ``--config.field=value``.

    Raises:
      InputError: an unknown field (the nearest known one is named), or a value of the wrong type.
    """
    known = _fields(config)
    for override in overrides:
        key = override.lstrip("-").partition("=")[0].removeprefix("config.")
        if key not in known:
            near = difflib.get_close_matches(key, known, 1, cutoff=0.0)
            raise InputError(f"unknown config key {key!r}; nearest: {near[0]!r}")
    values = flags.FlagValues()
    try:
        config_flags.DEFINE_config_dict(
            "config", config, lock_config=True, flag_values=values, sys_argv=["", *overrides]
        )
        rest = values(["", *overrides])[1:]
    except (flags.Error, TypeError, ValueError, SyntaxError) as error:
        raise InputError(str(error)) from error
    if rest:
        raise InputError(f"unexpected argument {rest[0]!r}; arguments have the form --name=value")
    return values["config"].value


def _fields(config: ConfigDict, prefix: str = "") -> list[str]:
    names: list[str] = []
    for key, value in config.items():
        names += _fields(value, f"{prefix}{key}.") if isinstance(value, ConfigDict) else [prefix + key]
    return names
