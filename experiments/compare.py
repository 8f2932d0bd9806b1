"""Compare evaluated runs: python experiments/compare.py RUN [RUN ...] [--out=FILE.md] [--html=FILE.html].

A RUN is the folder of a run or of results, or its URL in a bucket; the others are compared with the first.
"""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from robal_jax import cli
from robal_jax.errors import InputError
from robal_jax.reporting import comparison
from robal_jax.reporting.results import read_runs
from robal_jax.reporting.terminal import terminal
from robal_jax.storage.files import check_replaceable

FLAGS = {
    "out": "Markdown file that also receives the tables",
    "html": "HTML file that receives the tables and a figure of the differences; it loads nothing",
}


def main(arguments: list[str]) -> None:
    """Compares the folders of the arguments with ``robal_jax.reporting.comparison``."""
    folders = [argument for argument in arguments if not argument.startswith("-")]
    flags = [argument for argument in arguments if argument.startswith("-")]
    values = cli.parse(flags, FLAGS, __doc__)
    _check_files(values)
    runs = read_runs(folders)
    tables = comparison.compare(runs)
    comparison.print_comparison(tables, terminal())
    if values["out"]:
        _write(values["out"], comparison.comparison_markdown(tables), "--out")
    if values["html"]:
        from robal_jax.reporting.comparison_page import comparison_html  # needs matplotlib

        _write(values["html"], comparison_html(runs), "--html")
    cli.check_shown()


def _check_files(values: dict[str, str]) -> None:
    """Checks that the files of the flags replace nothing but an older comparison, and not one another."""
    files = [pathlib.Path(values[flag]) for flag in FLAGS if values[flag]]
    if len(files) > len({file.resolve() for file in files}):
        raise InputError(f"--out and --html are both {files[0]}; name two files")
    for file in files:
        check_replaceable(file, comparison.TITLE)


def _write(path: str, text: str, flag: str) -> None:
    try:
        pathlib.Path(path).write_text(text, "utf-8", "backslashreplace")
    except OSError as error:
        raise InputError(f"cannot write {path} ({error.strerror}); choose another {flag}") from error


if __name__ == "__main__":
    cli.run(main)
