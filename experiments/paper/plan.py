"""The runs and evaluations that a table of the paper needs.

Rows with the same training share one run, also between tables. The name of a run's folder is a digest of
``training_fields``; that of an evaluation's folder a digest of the run and of the section ``evaluation``.
Nothing here trains or evaluates; ``experiments/reproduce.py`` does.
"""

import functools
import hashlib
import json
import pathlib
import shlex
from collections.abc import Iterable
from typing import Any, NamedTuple

from flax.traverse_util import unflatten_dict

from experiments.paper.catalogue import TABLES
from experiments.paper.rows import Further, Row, Table
from robal_jax import builder, cli
from robal_jax.errors import InputError
from robal_jax.storage.buckets import shown
from robal_jax.storage.config_file import differences, to_json, training_fields, without_neutral

Run = int | tuple[int, int]
"""A seed of a training, or a pair of it and the seed of another long-tailed subset than the usual one."""


class Request(NamedTuple):
    """What the user asked for.

    Attributes:
      table: its name.
      data: the data set.
      seeds: of the runs of every row; with several splits a run is a pair (seed, split).
      rows: those of ``catalogue.rows_of``.
      overrides: of every config, such as ``train.epochs=4``.
      out: folder of all runs and tables; it may be a URL, see ``storage.buckets``.
      configs: folder of the config files.
    """

    table: str
    data: str
    seeds: tuple[Run, ...]
    rows: tuple[Row, ...]
    overrides: tuple[str, ...] = ()
    out: pathlib.Path = pathlib.Path("runs/tables")
    configs: pathlib.Path = pathlib.Path("configs")


class Job(NamedTuple):
    """A training or an evaluation.

    Attributes:
      key: its row; the first one, if several rows share the run.
      seed: of the run.
      config: resolved.
      workdir: of the run.
      start: folder of the run to fine-tune, or of the teacher, if any.
      folder: of the evaluation; None for a training.
      surrogate: folder of the run whose images attack this one in the audit, if any.
    """

    key: str
    seed: Run
    config: Any
    workdir: pathlib.Path
    start: pathlib.Path | None = None
    folder: pathlib.Path | None = None
    surrogate: pathlib.Path | None = None


class Plan(NamedTuple):
    """All jobs in order, and the folders of their results.

    Attributes:
      jobs: each after those it needs, no folder twice.
      folders: of evaluations, by row key, setting and seed.
      further: of the table's further evaluations, by row key, name and seed.
    """

    jobs: list[Job]
    folders: dict[str, dict[str, dict[Run, pathlib.Path]]]
    further: dict[str, dict[str, dict[Run, pathlib.Path]]]


# The attacks of the paper's tables, whose AA is two of the four attacks of AutoAttack; no audits.
PROTOCOL = ("evaluation.autoattack=robal_aa", "evaluation.audit.examples=0")


def _protocol(row: Row, request: Request) -> tuple[str, ...]:
    """Returns the overrides of all rows of a table, but for fields that the row or the user sets."""
    own = {override.partition("=")[0] for override in (*row.overrides, *request.overrides)}
    if own & {"threat.epsilon", "evaluation.epsilon"}:
        own.add("evaluation.step_size")  # it follows the user's radius
    protocol = TABLES[request.table].protocol.get(request.data, ())
    return tuple(override for override in protocol if override.partition("=")[0] not in own)


def row_config(row: Row, request: Request, *more: str) -> Any:
    """Returns the resolved config of a row; ``more`` are overrides.

    Raises:
      InputError: the config does not accept an override.
    """
    plain = cli.load_config(f"{request.configs / row.config}.py:{request.data}")
    overrides = filter(None, (*PROTOCOL, *_protocol(row, request), *row.overrides, *request.overrides, *more))
    try:
        config = cli.apply_overrides(plain, [f"--config.{override}" for override in overrides])
        builder.validate(config)
    except InputError as error:
        raise InputError(f"row {row.key!r} of table {request.table}: {error}") from error
    return config


PLAIN_AT = Row("at", "", "AT", "at")


def _first(row: Row) -> tuple[str, Row] | None:
    """Returns the field in which a row names another run, and the row of that run; None for none."""
    if row.start:
        return "train.start_from", PLAIN_AT
    if row.teacher:
        return "train.teacher", Row(row.teacher, "", "Teacher", row.teacher)
    return None


@functools.cache
def run_name(row: Row, request: Request) -> str:
    """Returns the name of the folder of a row's runs, such as 'ldam-0123abcd'."""
    first = _first(row)
    start = f"{first[0]}={run_name(first[1], request)}" if first else ""
    config = row_config(row, request, start)
    name = row.config if differences(config, row_config(PLAIN_AT, request)) else PLAIN_AT.config
    return f"{name}-{_digest(json.dumps(training_fields(config), sort_keys=True))}"


def _digest(*texts: str) -> str:
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()[:8]


def _folder_of(run: Run) -> str:
    return f"seed{run}" if isinstance(run, int) else f"seed{run[0]}-split{run[1]}"


def _fields_of(run: Run) -> tuple[str, ...]:
    return (f"seed={run}",) if isinstance(run, int) else (f"seed={run[0]}", f"data.seed={run[1]}")


def _workdir(name: str, seed: Run, request: Request) -> pathlib.Path:
    return request.out / request.data / "runs" / name / _folder_of(seed)


@functools.cache
def _evaluation_name(row: Row, request: Request, overrides: tuple[str, ...]) -> str:
    config = row_config(row, request, *overrides)
    section = unflatten_dict(without_neutral(json.loads(to_json(config))), sep=".")["evaluation"]
    chosen = [] if config.train.select == "last" else [config.train.select]
    return f"{row.config}-{_digest(run_name(row, request), json.dumps(section, sort_keys=True), *chosen)}"


def _evaluation_folder(row: Row, seed: Run, request: Request, *overrides: str) -> pathlib.Path:
    """Returns a folder named so that ``experiments/compare.py`` sees its parent as a run."""
    name = _evaluation_name(row, request, overrides)
    return request.out / request.data / "evaluations" / name / _folder_of(seed) / "evaluation"


def _check_overrides(request: Request) -> None:
    """Raises if an override concerns a field that a row, or this module, sets."""
    asked = {override.partition("=")[0] for override in request.overrides}
    if any(not isinstance(run, int) for run in request.seeds) and "data.seed" in asked:
        raise InputError("config.data.seed is set by --splits; remove the override")
    if "seed" in asked:
        raise InputError("config.seed is set by --seeds; remove the override")
    for row in request.rows:
        own = {override.partition("=")[0] for override in (*row.overrides, *row.settings)}
        first = _first(row)
        own |= {first[0]} if first else set()
        if own & asked:
            raise InputError(f"row {row.key!r} sets config.{min(own & asked)} itself; remove the override")


def _not_asked(overrides: Iterable[str], request: Request) -> tuple[str, ...]:
    """Returns the overrides of fields that the user does not set."""
    asked = {override.partition("=")[0] for override in request.overrides}
    return tuple(override for override in overrides if override.partition("=")[0] not in asked)


def _transfers_from(further: Further, row: Row, table: Table) -> Row | None:
    """Returns the row whose run makes the images of an audit's transfer attack on a row, if any."""
    rows = {each.key: each for each in table.rows}
    return next((rows[key] for key in further.transfer if key != row.key), None)


def make_plan(request: Request) -> Plan:
    """Returns everything to train and to evaluate for the rows of a request.

    Raises:
      InputError: a row sets an overridden field itself, or its config does not accept the override.
    """
    _check_overrides(request)
    jobs: dict[pathlib.Path, Job] = {}
    folders: dict[str, dict[str, dict[Run, pathlib.Path]]] = {}
    further: dict[str, dict[str, dict[Run, pathlib.Path]]] = {}
    table = TABLES[request.table]

    def training(row: Row, seed: Run, key: str) -> tuple[pathlib.Path, tuple[str, ...]]:
        """Plans a row's run, after the run that it starts from; returns its folder and overrides."""
        workdir = _workdir(run_name(row, request), seed, request)
        first = _first(row)
        start = training(first[1], seed, first[1].key)[0] if first else None
        more = (*_fields_of(seed), f"{first[0]}={shown(start)}" if first and start else "")
        if workdir not in jobs:
            jobs[workdir] = Job(key, seed, row_config(row, request, *more), workdir, start)
        return workdir, more

    def evaluation(
        row: Row,
        seed: Run,
        workdir: pathlib.Path,
        folder: pathlib.Path,
        *more: str,
        surrogate: pathlib.Path | None = None,
    ) -> None:
        if folder not in jobs:
            config = row_config(row, request, *more)
            jobs[folder] = Job(row.key, seed, config, workdir, folder=folder, surrogate=surrogate)

    for row in request.rows:
        settings = folders.setdefault(row.key, {setting: {} for setting in row.settings})
        for seed in request.seeds[: row.seeds or None]:
            workdir, more = training(row, seed, row.key)
            for each in table.further:
                own = _not_asked(each.overrides, request)
                folder = _evaluation_folder(row, seed, request, *own)
                further.setdefault(row.key, {}).setdefault(each.name, {})[seed] = folder
                other = _transfers_from(each, row, table)
                surrogate = training(other, seed, other.key)[0] if other else None
                own += (f"evaluation.audit.surrogate={shown(surrogate) if surrogate else ''}",)
                evaluation(row, seed, workdir, folder, *more, *own, surrogate=surrogate)
            for setting, by_seed in settings.items():
                folder = by_seed[seed] = _evaluation_folder(row, seed, request, setting)
                evaluation(row, seed, workdir, folder, *more, setting)
    return Plan(list(jobs.values()), folders, further)


def commands(row: Row, request: Request) -> list[str]:
    """Returns the commands that train and evaluate a row, with the first seed."""
    seed, data = request.seeds[0], request.data
    name = run_name(row, request)
    workdir = shown(_workdir(name, seed, request))
    first = _first(row)
    started = commands(first[1], request)[:1] if first else []
    asked = [*_fields_of(seed), *_protocol(row, request), *row.overrides, *request.overrides]
    if first:
        asked += [f"{first[0]}={shown(_workdir(run_name(first[1], request), seed, request))}"]
    train = ["train.py", f"--config=configs/{name.rpartition('-')[0]}.py:{data}", f"--workdir={workdir}"]
    lines = [[*train, *(f"--config.{each}" for each in asked)]]
    own = [each for each in (*PROTOCOL, *asked) if each.startswith("evaluation.")]
    evaluate = ["evaluate.py", f"--config=configs/{row.config}.py:{data}", f"--workdir={workdir}"]

    def evaluation(*changes: str) -> list[str]:
        folder = _evaluation_folder(row, seed, request, *changes)
        typed = {each.partition("=")[0]: each for each in (*own, *changes) if each}  # the last one counts
        return [*evaluate, f"--folder={shown(folder)}", *(f"--config.{each}" for each in typed.values())]

    lines += map(evaluation, row.settings)
    table = TABLES[request.table]
    for each in table.further:
        lines.append(evaluation(*_not_asked(each.overrides, request)))
        if other := _transfers_from(each, row, table):
            surrogate = shown(_workdir(run_name(other, request), seed, request))
            lines[-1].append(f"--config.evaluation.audit.surrogate={surrogate}")
    return started + [shlex.join(["python", f"experiments/{script}", *rest]) for script, *rest in lines]
