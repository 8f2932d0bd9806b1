"""Compare evaluated runs: python experiments/compare.py --workdirs=runs/a,runs/b [--by_method]."""

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from absl import app, flags
from rich.console import Console

from robal_jax import reporting
from robal_jax.errors import InputError

_WORKDIRS = flags.DEFINE_list(
    "workdirs", [], "Folders of evaluated runs, separated by commas; the first is the reference."
)
_BY_METHOD = flags.DEFINE_bool("by_method", False, "Average the runs of a method over its seeds.")


def main(argv: Sequence[str]) -> int:
    """Print the comparison; return the exit status."""
    try:
        if len(argv) > 1:
            raise InputError(f"Unexpected argument '{argv[1]}'; name the runs by --workdirs=a,b.")
        runs = reporting.load_runs(_WORKDIRS.value)
        reporting.print_comparison(runs, Console(), by_method=_BY_METHOD.value)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    app.run(main)
