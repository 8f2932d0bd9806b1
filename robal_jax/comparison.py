"""Comparison of evaluated runs, image by image."""

import dataclasses
import json
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from robal_jax import metrics
from robal_jax.errors import InputError
from robal_jax.reporting import display_name, headline, printed, with_interval

# Runs may be compared only if these agree.
_PROTOCOL = ("dataset", "test_set_sha256", "norm", "epsilon", "step_size", "start", "evaluation_seed")


@dataclasses.dataclass(frozen=True)
class Run:
    """An evaluated model: what `reporting.write_report` and the evaluation left in its folder.

    Attributes:
        name: its folder.
        meta: see `reporting.write_report`.
        summary: see `metrics.summarize`.
        examples: 'labels' [n], 'ids' [n] of the test images, 'pred_<condition>' [n] and more, by name.
    """

    name: str
    meta: Mapping[str, Any]
    summary: Mapping[str, Any]
    examples: Mapping[str, np.ndarray]

    @property
    def predictions(self) -> dict[str, np.ndarray]:
        """Predicted classes [n] by condition, 'worst' last."""
        attacks = {
            name: self.examples[f"pred_{name}"] for name in self.summary["conditions"] if name != "worst"
        }
        return {**attacks, "worst": metrics.worst_case(self.examples["labels"], attacks)}


def load_run(workdir: Path) -> Run:
    """Read evaluation/results.json and evaluation/examples.npz of a run.

    Args:
        workdir: folder of the run, or one of results in it.

    Returns:
        The run.

    Raises:
        InputError: a file is missing or unreadable.
    """
    folder = workdir if (workdir / "results.json").exists() else workdir / "evaluation"
    try:
        results = json.loads((folder / "results.json").read_text())
        with np.load(folder / "examples.npz") as file:
            examples = dict(file)
        run = Run(str(workdir), results["meta"], results["summary"], examples)
        examples["ids"], run.predictions  # missing arrays fail here, where the folder is known
    except FileNotFoundError as error:
        raise InputError(f"{workdir} has not been evaluated: {error.filename} is missing.") from error
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise InputError(f"The evaluation in {folder} is damaged; evaluate the run again.") from error
    return run


def load_runs(workdirs: Sequence[str]) -> list[Run]:
    """Read several runs.

    Args:
        workdirs: folders of the runs.

    Returns:
        The runs in that order.

    Raises:
        InputError: no run, the same folder twice, or a run that cannot be read.
    """
    if len(set(workdirs)) < max(1, len(workdirs)):
        raise InputError("Name at least one workdir, and none twice.")
    return [load_run(Path(workdir)) for workdir in workdirs]


def share_right(run: Run, condition: str, group: str) -> dict[str, float]:
    """Accuracy of a run under one condition, over 'all' test images or those of a group, as a FIGURE."""
    return metrics.share(_right(run, condition, group))


def _right(run: Run, condition: str, group: str) -> np.ndarray:
    labels = run.examples["labels"]
    member = slice(None) if group == "all" else np.isin(labels, run.summary["groups"][group])
    return (run.predictions[condition] == labels)[member]


def difference(run: Run, reference: Run, condition: str, group: str) -> dict[str, float]:
    """How much more a run gets right than another on the same test images.

    Paired, image by image (see `metrics.paired_difference`): narrower than two separate intervals suggest.

    Args:
        run: what is compared.
        reference: with what.
        condition: a condition of both.
        group: 'all', or a group of classes.

    Returns:
        A FIGURE in [-1, 1], see `metrics.summarize`.

    Raises:
        InputError: the runs differ in test images, class groups, conditions or threat model.
    """
    _check_comparable(reference, run)
    return metrics.paired_difference(_right(reference, condition, group), _right(run, condition, group))


def _check_comparable(reference: Run, run: Run) -> None:
    names = f"{run.name} and {reference.name}"
    if reference.summary["groups"] != run.summary["groups"]:
        raise InputError(f"{names} divide the classes into different groups.")
    if set(reference.summary["conditions"]) != set(run.summary["conditions"]):
        raise InputError(f"{names} were evaluated under different conditions.")
    for key in _PROTOCOL:
        if reference.meta.get(key) != run.meta.get(key):
            values = f"{printed(run.meta.get(key))} and {printed(reference.meta.get(key))}"
            raise InputError(f"{names} differ in {key}: {values}.")


def print_comparison(runs: Sequence[Run], console: Console) -> None:
    """Print clean, main-attack and worst-case accuracy of runs, and their differences to the first method's.

    Runs of one method with different seeds make one row, their mean and standard deviation; each is paired
    with the first method's run of the same seed.

    Args:
        runs: at least one.
        console: where to print.

    Raises:
        InputError: runs that cannot be compared.
    """
    conditions, groups = headline(runs[0].meta), ["all", *runs[0].summary["groups"]]
    rows = _rows(runs)
    (reference, partners), *others = rows.items()
    by_seed = any(len(members) > 1 for members in rows.values())
    spread = " (mean ± standard deviation over seeds)" if by_seed else ""
    accuracy = _table(f"Accuracy in percent{spread}", groups)
    differences = _table(f"Difference to {escape(reference)} in points, paired [95 % interval]", groups)
    for condition in conditions:
        title = display_name(condition)
        for row, members in rows.items():
            shares = ([share_right(run, condition, group) for run in members.values()] for group in groups)
            accuracy.add_row(title, escape(row), *map(_mean_and_spread, shares))
        for row, members in others:
            for seed in [seed for seed in members if seed in partners]:
                label = f"{row}, seed {seed}" if by_seed else row
                pairs = (difference(members[seed], partners[seed], condition, group) for group in groups)
                # On two lines, so that the table fits into 100 columns.
                differences.add_row(title, escape(label), *(with_interval(pair, "+", "\n") for pair in pairs))
        for table in (accuracy, differences):
            table.add_section()
    console.print(accuracy)
    if differences.row_count:
        console.print(differences)


def _rows(runs: Sequence[Run]) -> dict[str, dict[Any, Run]]:
    """Runs by method and seed; where those are not unique, a row for each run, named by its folder."""
    keys = [(str(run.meta["method"]), run.meta.get("seed")) for run in runs]
    if len(set(keys)) < len(keys):
        return {run.name: {None: run} for run in runs}
    rows: dict[str, dict[Any, Run]] = {}
    for (method, seed), run in zip(keys, runs, strict=True):
        rows.setdefault(method, {})[seed] = run
    return rows


def _table(title: str, groups: Sequence[str]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), title=title)
    table.add_column("Condition", no_wrap=True)
    table.add_column("Run")
    for group in groups:
        table.add_column(group.capitalize(), justify="right", no_wrap=True)
    return table


def _mean_and_spread(figures: Sequence[Mapping[str, float]]) -> str:
    values = [100 * figure["value"] for figure in figures]
    mean = f"{np.mean(values):.1f}"
    return f"{mean} ± {np.std(values, ddof=1):.1f}" if len(values) > 1 else mean
