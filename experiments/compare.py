"""Compare evaluated runs: python experiments/compare.py RUN [RUN ...] [--out=FILE.md].

A RUN is the folder of a run or of results; every other RUN is compared with the first.
"""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from robal_jax import cli
from robal_jax.errors import InputError, user_path
from robal_jax.reporting import comparison
from robal_jax.reporting.results import read_runs
from robal_jax.reporting.terminal import terminal


def main(arguments: list[str]) -> None:
    """Compares the folders of the arguments with ``robal_jax.reporting.comparison``."""
    folders = [argument for argument in arguments if not argument.startswith("-")]
    flags = [argument for argument in arguments if argument.startswith("-")]
    out = cli.parse(flags, {"out": "Markdown file that also receives the tables"}, __doc__)["out"]
    tables = comparison.compare(read_runs([str(user_path(folder)) for folder in folders]))
    comparison.print_comparison(tables, terminal())
    if out:
        try:
            pathlib.Path(out).write_text(comparison.comparison_markdown(tables), "utf-8", "backslashreplace")
        except OSError as error:
            raise InputError(f"cannot write {out} ({error.strerror}); choose another --out") from error


if __name__ == "__main__":
    cli.run(main)
