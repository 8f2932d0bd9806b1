"""TODO experiments.paper.plan."""

import functools
import hashlib
import json
import pathlib
import shlex
from typing import Any, NamedTuple

from experiments.paper.published import Row
from robal_jax import builder, cli
from robal_jax.errors import InputError
from robal_jax.storage.config_file import differences, to_json, training_fields


class Request(NamedTuple):
    """What the user wants made.

    Attributes:
      table: its name.
      data: the data set.
      seeds: of the runs of every row.
      rows: as `paper.rows_of` gives them.
      overrides: of every config, ``train.epochs=4``.
      out: folder of all runs and tables.
      configs: folder of the config files.
    """

    table: str
    data: str
    seeds: tuple[int, ...]
    rows: tuple[Row, ...]
    overrides: tuple[str, ...] = ()
    out: pathlib.Path = pathlib.Path("runs/tables")
    configs: pathlib.Path = pathlib.Path("configs")


class Job(NamedTuple):
    """A training or an evaluation.

    Attributes:
      key: row that it is of; of a shared run, the first one.
      seed: of the run.
      config: resolved.
      workdir: of the run.
      start: folder of the run that is fine-tuned, if any.
      folder: of the evaluation; None for a training.
    """

    key: str
    seed: int
    config: Any
    workdir: pathlib.Path
    start: pathlib.Path | None = None
    folder: pathlib.Path | None = None


class Plan(NamedTuple):
    """All jobs, each after those it needs, and where the results will lie.

    Attributes:
      jobs: no folder twice.
      folders: of evaluations, by row key, setting and seed.
    """

    jobs: list[Job]
    folders: dict[str, dict[str, dict[int, pathlib.Path]]]


# The attacks of the paper's tables; its AA is a pair of those of AutoAttack. No audit of every run.
PROTOCOL = ("evaluation.autoattack=robal_aa", "evaluation.audit.examples=0")


def row_config(row: Row, request: Request, *more: str) -> Any:
    """The resolved config of a row; ``more`` are overrides.

    Raises:
      InputError: an override that the config does not take.
    """
    plain = cli.load_config(f"{request.configs / row.config}.py:{request.data}")
    overrides = filter(None, (*PROTOCOL, *row.overrides, *request.overrides, *more))
    try:
        config = cli.apply_overrides(plain, [f"--config.{override}" for override in overrides])
        builder.validate(config)
    except InputError as error:
        raise InputError(f"row {row.key!r} of table {request.table}: {error}") from error
    return config


PLAIN_AT = Row("at", "", "AT", "at")


@functools.cache
def run_name(row: Row, request: Request) -> str:
    """Folder of a row's runs, the same for all rows of the same training: 'ldam-0123abcd'."""
    start = f"train.start_from={run_name(PLAIN_AT, request)}" if row.start else ""
    config = row_config(row, request, start)
    name = row.config if differences(config, row_config(PLAIN_AT, request)) else PLAIN_AT.config
    return f"{name}-{_digest(json.dumps(training_fields(config), sort_keys=True))}"


def _digest(*texts: str) -> str:
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()[:8]


def _workdir(name: str, seed: int, request: Request) -> pathlib.Path:
    return request.out / request.data / "runs" / name / f"seed{seed}"


@functools.cache
def _evaluation_name(row: Row, setting: str, request: Request) -> str:
    fields = json.loads(to_json(row_config(row, request, setting)))
    return f"{row.config}-{_digest(run_name(row, request), json.dumps(fields['evaluation'], sort_keys=True))}"


def _evaluation_folder(row: Row, setting: str, seed: int, request: Request) -> pathlib.Path:
    """Named so that experiments/compare.py takes the folder above it for a run's."""
    name = _evaluation_name(row, setting, request)
    return request.out / request.data / "evaluations" / name / f"seed{seed}" / "evaluation"


def _check_overrides(request: Request) -> None:
    """Refuses overrides of what the rows themselves, or this module, set."""
    asked = {override.partition("=")[0] for override in request.overrides}
    if "seed" in asked:
        raise InputError("config.seed is set by --seeds; leave it out")
    for row in request.rows:
        own = {override.partition("=")[0] for override in (*row.overrides, *row.settings)}
        own |= {"train.start_from"} if row.start else set()
        if own & asked:
            raise InputError(f"config.{min(own & asked)} is what row {row.key!r} is about; leave it out")


def make_plan(request: Request) -> Plan:
    """What is to be trained and evaluated for the rows of a request.

    Raises:
      InputError: an override that a row sets itself, or that its config does not take.
    """
    _check_overrides(request)
    jobs: dict[pathlib.Path, Job] = {}
    folders: dict[str, dict[str, dict[int, pathlib.Path]]] = {}

    def training(row: Row, seed: int, key: str) -> tuple[pathlib.Path, tuple[str, ...]]:
        """Plans a row's run, after the one that it starts from; its folder and its own overrides."""
        workdir = _workdir(run_name(row, request), seed, request)
        start = training(PLAIN_AT, seed, PLAIN_AT.key)[0] if row.start else None
        more = (f"seed={seed}", f"train.start_from={start}" if start else "")
        if workdir not in jobs:
            jobs[workdir] = Job(key, seed, row_config(row, request, *more), workdir, start)
        return workdir, more

    for row in request.rows:
        settings = folders.setdefault(row.key, {setting: {} for setting in row.settings})
        for seed in request.seeds:
            workdir, more = training(row, seed, row.key)
            for setting, by_seed in settings.items():
                folder = by_seed[seed] = _evaluation_folder(row, setting, seed, request)
                if folder not in jobs:
                    config = row_config(row, request, *more, setting)
                    jobs[folder] = Job(row.key, seed, config, workdir, folder=folder)
    return Plan(list(jobs.values()), folders)


def commands(row: Row, request: Request) -> list[str]:
    """How to train and evaluate a row by hand, with the first seed."""
    seed, data = request.seeds[0], request.data
    name = run_name(row, request)
    workdir = _workdir(name, seed, request)
    started = commands(PLAIN_AT, request)[:1] if row.start else []
    asked = [f"seed={seed}", *row.overrides, *request.overrides]
    if row.start:
        asked += [f"train.start_from={_workdir(run_name(PLAIN_AT, request), seed, request)}"]
    train = ["train.py", f"--config=configs/{name.rpartition('-')[0]}.py:{data}", f"--workdir={workdir}"]
    lines = [[*train, *(f"--config.{override}" for override in asked)]]
    own = [each for each in (*PROTOCOL, *asked) if each.startswith("evaluation.")]
    evaluate = ["evaluate.py", f"--config=configs/{row.config}.py:{data}", f"--workdir={workdir}"]
    for setting in row.settings:
        folder = f"--folder={_evaluation_folder(row, setting, seed, request)}"
        lines.append([*evaluate, folder, *(f"--config.{each}" for each in (*own, setting) if each)])
    return started + [shlex.join(["python", f"experiments/{script}", *rest]) for script, *rest in lines]
