"""The table of an evaluation on the terminal."""

import sys
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from robal_jax.devices.output import Tolerant
from robal_jax.reporting.audit import verdict_on
from robal_jax.reporting.certified import bounds_in_words
from robal_jax.reporting.corruptions import mean_in_words
from robal_jax.reporting.headline import in_words
from robal_jax.reporting.names import display_name, group_name, percent, with_interval
from robal_jax.reporting.results import Results


def terminal() -> Console:
    """Returns where tables are printed: as wide as the terminal, 100 columns if there is none."""
    file: Any = Tolerant(sys.stdout)
    console = Console(file=file)
    return console if console.is_terminal else Console(file=file, width=100)


def evaluation_table(results: Results, console: Console) -> None:
    """Prints a row per condition, in percent, and the outcome in words; the report has all intervals."""
    groups = list(results.summary["groups"])
    shown = (*groups, "balanced_accuracy", "f_score", "natural_error", "boundary_error")
    headers = (
        *(group_name(group).capitalize() for group in groups),
        "Balanced",
        "Macro F",
        "Nat. err.",
        "Bound. err.",
    )
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), title="Percent of test images [95 % interval]")
    table.add_column("Condition", min_width=10)  # the one that breaks into lines where space is short
    for header in ("Accuracy", *headers):
        table.add_column(header, justify="right", no_wrap=True)
    for name, condition in results.conditions.items():
        cells = [percent(condition[figure]) for figure in shown]
        table.add_row(display_name(name), with_interval(condition["accuracy"]), *cells)
    console.print(table)
    console.print(in_words(results), highlight=False, markup=False)
    console.print(f"Audit: {verdict_on(results)[1]}.", highlight=False, markup=False)
    if results.certified:
        console.print(bounds_in_words(results), highlight=False, markup=False)
    if results.corruptions:
        console.print(mean_in_words(results), highlight=False, markup=False)
    if "generated" in results.meta:
        console.print(f"Training {results.meta['generated']}.", highlight=False, markup=False)


def evaluation_lines(results: Results) -> list[str]:
    """Returns what :func:`evaluation_table` prints as lines: as wide as the terminal, without colours."""
    file: Any = Tolerant(sys.stdout)  # whose encoding decides on the lines of the table
    console = Console(file=file, width=terminal().width, color_system=None, force_jupyter=False)
    with console.capture() as text:
        evaluation_table(results, console)
    return text.get().splitlines()
