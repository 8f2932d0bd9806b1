"""The command ``robal-jax``: the scripts of ``experiments/`` from any folder, in a wheel as in a checkout."""

import difflib
import importlib
import sys
from collections.abc import Sequence

from robal_jax import __version__, cli
from robal_jax.errors import InputError

COMMANDS = {
    "train": ("train", "trains by a config"),
    "evaluate": ("evaluate", "attacks a trained run, audits the result and writes the report"),
    "compare": ("compare", "compares evaluated runs image by image"),
    "reproduce": ("reproduce", "trains and evaluates the rows of a table, such as those of the RoBal paper"),
    "import": ("import_torch", "makes a run from the weights of a PyTorch network"),
    "export": ("export_torch", "writes a checkpoint as a PyTorch state_dict"),
    "publish": ("publish", "writes the weights of an evaluated run with a card"),
    "compile": ("compile", "estimates memory and time on accelerators that need not be there"),
    "prepare": ("prepare_data", "downloads CIFAR-10 or CIFAR-100"),
}
"""Name of each command to the name of its script and its line in ``--help``."""

USAGE = "\n".join(
    [
        "usage: robal-jax COMMAND [--FLAG=VALUE ...]",
        "",
        *(f"  {name:9}  {text}" for name, (_, text) in COMMANDS.items()),
        "",
        "robal-jax COMMAND --help lists the flags of a command, robal-jax --version prints the version.",
    ]
)


def main() -> None:
    """Runs the command line of this process; see :func:`robal_jax.cli.run` for its exit status."""
    cli.run(start)


def start(arguments: Sequence[str]) -> None:
    """Runs a command like its script, ``python experiments/SCRIPT.py``.

    Args:
      arguments: the command and its flags; none, ``--help`` and ``--version`` print a text.

    Raises:
      InputError: unknown command.
    """
    name, *rest = arguments or ["--help"]
    if name in ("--help", "-h"):
        print(USAGE)
        cli.check_shown()
    elif name == "--version":
        print(__version__)
        cli.check_shown()
    elif name in COMMANDS:
        sys.argv = [f"{cli.CONSOLE} {name}", *rest]  # for cli.as_started
        cli.add_shipped()
        importlib.import_module(f"experiments.{COMMANDS[name][0]}").main(rest)
    else:
        near = difflib.get_close_matches(name, COMMANDS, 1)
        raise InputError(
            f"unknown command {name!r}; use {near[0] if near else 'one of ' + ', '.join(COMMANDS)}"
        )
