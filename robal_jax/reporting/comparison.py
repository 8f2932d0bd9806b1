"""Comparison of evaluated runs, image by image."""

import dataclasses
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import rich.table
from rich import box
from rich.console import Console
from rich.markup import escape

from robal_jax import metrics
from robal_jax.errors import InputError
from robal_jax.reporting import page
from robal_jax.reporting.audit import audit_summary
from robal_jax.reporting.corruptions import CORRUPTED
from robal_jax.reporting.names import (
    BY_CLASS,
    display_name,
    folded,
    group_name,
    printed,
    threat,
    with_interval,
)
from robal_jax.reporting.results import EvaluatedRun
from robal_jax.storage.config_file import NOT_TRAINED, SAVED, without_neutral

TITLE = "Comparison of runs"

# Runs can be averaged only if these are equal.
_PROTOCOL = (
    "dataset", "part", "norm", "epsilon", "class_epsilon", "step_size", "start", "evaluation_seed",
)  # fmt: skip

# Runs can be paired only if this is equal, too. On the digits each seed has test images of its own.
_TEST_SET = "test_set_sha256"


# An ensemble that somebody listed has one of these names, whatever its attacks are.
_LISTED = {"custom", "custom_bpda", "custom_own", "custom_own_bpda"}

# What an evaluation says of the model itself.
_JUDGED = ("evaluation.weights", "evaluation.logit_scale", "evaluation.tau_p", "evaluation.head.")

# Fields in which the runs of one method may differ: what changes with the seed, and the places of other runs.
_BY_SEED = ("seed", "data.seed", "train.start_from", "train.teacher")


class Table(NamedTuple):
    """Text in rows, ready to print."""

    title: str
    header: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]


class Paired(NamedTuple):
    """A run minus the reference run of the same seed, on the same images.

    Attributes:
      condition: the attack.
      row: the method, or the folder of the run.
      seed: of the training; None if it names no run.
      figures: what :func:`difference` returns, by group: 'all', and the groups of classes.
    """

    condition: str
    row: str
    seed: Any
    figures: dict[str, dict[str, float]]

    @property
    def label(self) -> str:
        """The method and the seed, if it has one."""
        return self.row if self.seed is None else f"{self.row}, seed {self.seed}"


def share_right(run: EvaluatedRun, condition: str, group: str) -> dict[str, float]:
    """Returns the accuracy of a run under a condition on 'all' test images or those of a group, a FIGURE."""
    return metrics.share(_right(run, condition, group))


def share_of_corrupted(run: EvaluatedRun, group: str) -> dict[str, float]:
    """Returns the mean accuracy of a run on corrupted images, of 'all' classes or of a group, a FIGURE."""
    return run.corruptions["mean"]["accuracy" if group == "all" else group]


def _right(run: EvaluatedRun, condition: str, group: str) -> np.ndarray:
    labels = run.examples["labels"]
    member = slice(None) if group == "all" else np.isin(labels, run.summary["groups"][group])
    return (run.predictions[condition] == labels)[member]


def difference(run: EvaluatedRun, reference: EvaluatedRun, condition: str, group: str) -> dict[str, float]:
    """Returns the accuracy of a run minus that of another on the same test images.

    The runs are paired image by image, so the interval is narrower than two separate ones suggest.

    Args:
      run: the run.
      reference: the run that it is compared with.
      condition: a condition of both.
      group: 'all', or a group of classes.

    Returns:
      A FIGURE in [-1, 1] with 'p_value', see :func:`metrics.paired_difference`.

    Raises:
      InputError: the runs differ in test images, class groups, conditions or threat model.
    """
    _check_comparable(reference, run, (*_PROTOCOL, _TEST_SET))
    return metrics.paired_difference(_right(reference, condition, group), _right(run, condition, group))


def _check_comparable(reference: EvaluatedRun, run: EvaluatedRun, equal: Collection[str]) -> None:
    """Raises if two runs differ in groups, conditions, ensembles or one of the entries ``equal`` of meta."""
    names = f"{run.name} and {reference.name}"
    if reference.summary["groups"] != run.summary["groups"]:
        raise InputError(
            f"{names} divide the classes into different groups; evaluate both in the same groups"
        )
    if set(reference.conditions) != set(run.conditions):
        raise InputError(
            f"{names} were evaluated under different conditions; evaluate both with the same attacks"
        )
    if _LISTED & set(run.conditions) and _ensemble(run) != _ensemble(reference):
        raise InputError(
            f"{names} have different ensembles: {_ensemble(run)} and {_ensemble(reference)}; evaluate both "
            "with the same attacks"
        )
    for key in equal:
        if reference.meta.get(key) != run.meta.get(key):
            both = (run.meta, reference.meta)
            values = " and ".join(
                threat(meta) if key == "class_epsilon" else printed(meta.get(key)) for meta in both
            )
            raise InputError(f"{names} differ in {key}: {values}; evaluate both in the same way")


def _ensemble(run: EvaluatedRun) -> str:
    """Returns the attacks of a run's ensemble in their order, the user's own with digests of their code."""
    code = run.meta.get("code_sha256", {})
    modules = {name: code.get(name.partition(":")[0]) for name in run.meta.get("autoattack", ())}
    return ", ".join(f"{name} ({sha256[:12]}…)" if sha256 else name for name, sha256 in modules.items())


def shared_conditions(runs: Sequence[EvaluatedRun]) -> list[EvaluatedRun]:
    """Returns runs with only the conditions that all of them have, in the order of the first run.

    'worst' is then the worst of the shared conditions. Ensembles that are lists of attacks are shared if the
    lists are equal.

    Raises:
      InputError: the runs differ in class groups or threat model.
    """
    shared = set.intersection(*(set(run.conditions) for run in runs))
    if len(set(map(_ensemble, runs))) > 1:
        shared -= _LISTED
    names = [name for name in runs[0].conditions if name in shared]

    def restricted(run: EvaluatedRun) -> EvaluatedRun:
        conditions = {name: run.conditions[name] for name in names}
        return dataclasses.replace(run, summary={**run.summary, "conditions": conditions})

    first, *others = map(restricted, runs)
    for run in others:
        _check_comparable(first, run, _PROTOCOL)
    return [first, *others]


def paired(runs: Sequence[EvaluatedRun]) -> list[Paired]:
    """Returns the differences of runs to the first method's run of the same seed.

    If each method has one run, it is compared with the first whatever the seeds are.

    Args:
      runs: at least one.

    Returns:
      Those of each condition of the headline that all runs have; nothing if no run has a partner.

    Raises:
      InputError: the runs cannot be compared.
    """
    restricted = shared_conditions(runs)
    rows = by_method(restricted)
    (_, first), *others = rows.items()
    by_seed = any(len(members) > 1 for members in rows.values())
    groups = ("all", *restricted[0].groups)

    def differences(run: EvaluatedRun, seed: Any, condition: str) -> dict[str, dict[str, float]]:
        partner = first[seed] if by_seed else next(iter(first.values()))
        return {group: difference(run, partner, condition, group) for group in groups}

    return [
        Paired(condition, row, seed if by_seed else None, differences(run, seed, condition))
        for condition in restricted[0].headline
        for row, members in others
        for seed, run in members.items()
        if seed in first or not by_seed
    ]


def _notes(runs: Sequence[EvaluatedRun], shared: Collection[str], tests: int) -> list[tuple[str]]:
    """Returns notes for the reader of the tables, in sentences: on tests, seeds, configs and conditions."""
    rows, found = by_method(runs), []
    if tests:
        found.append(
            f"Intervals and p-values are over test images, not over training seeds, and not corrected for "
            f"the number of differences, {tests}."
        )
    if len({run.meta.get(_TEST_SET) for run in runs}) > 1:
        found.append("Test images differ between seeds, so the spread over seeds includes theirs.")
    for method, fields in _mixed(runs).items():
        found.append(f"The runs of {method} differ in {', '.join(fields)}: they are not averaged.")
    (reference, first), *others = rows.items()
    by_seed = any(len(members) > 1 for members in rows.values())
    for row, members in others:
        missing = [seed for seed in members if seed not in first]
        if by_seed:
            found += [
                f"{row}, seed {each}, has no difference: {reference} has no such run." for each in missing
            ]
            if set(members) != set(first):
                found.append(
                    f"The means of {row} and {reference} are over different seeds: compare their differences."
                )
        elif missing:
            seeds = f"seed {missing[0]} and {reference} seed {next(iter(first))}"
            found.append(f"{row} has {seeds}: their difference includes that of the seeds.")
    if "worst" in shared and any(len(run.conditions) > len(shared) for run in runs):
        found.append(
            "Worst is that of the conditions that all runs have; the report of a run may show a lower one."
        )
    return [(sentence,) for sentence in found]


def compare(runs: Sequence[EvaluatedRun]) -> list[Table]:
    """Compares runs in those conditions of the headline that all of them have.

    Runs of one method with different seeds share a row with their mean and standard deviation; each is paired
    with the first method's run of the same seed.

    Args:
      runs: at least one.

    Returns:
      Tables of the runs with their audits, of accuracies, also on corrupted images if all runs have it, and,
      if there are any, of differences and of notes. A row of fewer runs than others says their number, n.

    Raises:
      InputError: the runs cannot be compared.
    """
    restricted = shared_conditions(runs)
    first = restricted[0]
    conditions, groups = first.headline, ["all", *first.groups]
    rows = by_method(restricted)
    by_seed = any(len(members) > 1 for members in rows.values())

    def label(row: str, seed: Any) -> str:
        return f"{row}, seed {seed}" if by_seed else row

    def by_group(share: Callable[..., Mapping[str, float]], row: str) -> tuple[str, ...]:
        members = rows[row].values()
        fewer = f"\n(n = {len(members)})" * (len(members) < most)
        return tuple(
            _mean_and_spread([share(run, group=group) for run in members]) + fewer for group in groups
        )

    most = max(map(len, rows.values()))
    pairs = paired(runs)
    shares = {name: partial(share_right, condition=name) for name in conditions}
    accuracies = _folded({name: [(row, *by_group(shares[name], row)) for row in rows] for name in shares})
    if all(run.corruptions for run in runs):
        accuracies += [(CORRUPTED, row, *by_group(share_of_corrupted, row)) for row in rows]
    differences = _folded(
        {
            name: [
                (pair.label, *map(_difference, pair.figures.values()))
                for pair in pairs
                if pair.condition == name
            ]
            for name in conditions
        }
    )
    audits = [
        (
            _with_label(label(row, seed), run),
            audit_summary(run.audit),
            _left_out(run, conditions=first.conditions),
        )
        for row, members in by_method(runs).items()
        for seed, run in members.items()
    ]
    header = ("Condition", "Run", *(group_name(group).capitalize() for group in groups))
    parts = "".join(sorted({f" ({run.meta['part']})" for run in runs if "part" in run.meta}))
    parts += f" ({BY_CLASS})" * ("class_epsilon" in first.meta)
    spread = " (mean ± standard deviation over seeds)" if by_seed else ""
    tables = [
        Table("Runs", ("Run", "Audit", "Conditions left out"), audits),
        Table(f"Accuracy in percent{parts}{spread}", header, accuracies),
        Table(
            f"Difference to {next(iter(rows))} in points, paired [95 % interval], exact McNemar p",
            header,
            differences,
        ),
        Table("Notes", ("Notes",), _notes(runs, first.conditions, len(differences) * len(groups))),
    ]
    return [table for table in tables if table.rows]


def print_comparison(tables: Sequence[Table], console: Console) -> None:
    """Prints the tables of :func:`compare`, with a section per condition."""
    for title, header, rows in tables:
        shown = rich.table.Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), title=escape(title))
        for index, name in enumerate(header):
            figures = index > 1 and header[0] == "Condition"
            shown.add_column(name, justify="right" if figures else "left", no_wrap=figures)
        for row, following in zip(rows, [*rows[1:], None], strict=True):
            last = following is not None and header[0] == "Condition" and following[0] != row[0]
            shown.add_row(*map(escape, row), end_section=last)
        console.print(shown)


def comparison_markdown(tables: Sequence[Table]) -> str:
    """Returns the tables of :func:`compare` as a document in Markdown."""
    blocks = [
        block for title, header, rows in tables for block in (page.section(title), page.table(header, rows))
    ]
    return page.to_markdown(TITLE, blocks)


def _folded(rows: Mapping[str, list[tuple[str, ...]]]) -> list[tuple[str, ...]]:
    """Returns rows with their condition in front; conditions with equal rows share them."""
    named = folded((display_name(condition), shown) for condition, shown in rows.items())
    return [(name, *row) for name, shown in named for row in shown]


def by_method(runs: Sequence[EvaluatedRun]) -> dict[str, dict[Any, EvaluatedRun]]:
    """Returns the runs by method and seed.

    If those are not unique, or runs of one method were trained in different ways, each run has a row, named
    by its folder.
    """
    keys = [(str(run.meta["method"]), run.meta.get("seed")) for run in runs]
    if len(set(keys)) < len(keys) or _mixed(runs):
        return {run.name: {None: run} for run in runs}
    rows: dict[str, dict[Any, EvaluatedRun]] = {}
    for (method, seed), run in zip(keys, runs, strict=True):
        rows.setdefault(method, {})[seed] = run
    return rows


def _mixed(runs: Sequence[EvaluatedRun]) -> dict[str, list[str]]:
    """Returns in what runs of one method differ, seeds apart, by method: fields, and which checkpoint."""
    configs: dict[str, list[dict[str, Any]]] = {}
    for run in runs:
        fields = without_neutral(run.meta.get("config", {}))
        made = {
            f"config.{name}": value
            for name, value in fields.items()
            if name not in (*_BY_SEED, SAVED)
            and (name.startswith(_JUDGED) or not name.startswith(NOT_TRAINED))
        }
        # 'named by hand: 20' -> 'named by hand'
        made["the choice of the checkpoint"] = re.split("[(:]", run.meta.get("selection", ""))[0].strip()
        configs.setdefault(str(run.meta["method"]), []).append(made)
    found = {
        method: sorted(
            name
            for name in set().union(*members)
            if any(one.get(name) != members[0].get(name) for one in members)
        )
        for method, members in configs.items()
    }
    return {method: names for method, names in found.items() if names}


def _mean_and_spread(figures: Sequence[Mapping[str, float]]) -> str:
    values = [100 * figure["value"] for figure in figures]
    mean = f"{np.mean(values):.1f}"
    return f"{mean} ± {np.std(values, ddof=1):.1f}" if len(values) > 1 else mean


def _difference(pair: Mapping[str, float]) -> str:
    """Returns a difference on three lines, so that the table fits into 100 columns."""
    return with_interval(pair, "+", "\n") + "\n" + printed_p(pair["p_value"])


def printed_p(p_value: float) -> str:
    """Returns a p-value: 'p = 0.490'."""
    return "p < 0.001" if p_value < 0.001 else f"p = {p_value:.3f}"


def _with_label(name: str, run: EvaluatedRun) -> str:
    """Returns the name of a run, and that it was trained with generated images if it was."""
    return ", ".join(filter(None, (name, run.meta.get("generated"))))


def _left_out(run: EvaluatedRun, *, conditions: Collection[str]) -> str:
    names = [display_name(name) for name in run.conditions if name not in conditions]
    return ", ".join(names) or "none"
