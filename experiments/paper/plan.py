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
from typing import Any, NamedTuple

from flax.traverse_util import unflatten_dict

from experiments.paper.published import Row
from robal_jax import builder, cli
from robal_jax.errors import InputError
from robal_jax.storage.config_file import differences, to_json, training_fields, without_neutral


class Request(NamedTuple):
    """What the user asked for.

    Attributes:
      table: its name.
      data: the data set.
      seeds: of the runs of every row.
      rows: those of ``published.rows_of``.
      overrides: of every config, such as ``train.epochs=4``.
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
      key: its row; the first one, if several rows share the run.
      seed: of the run.
      config: resolved.
      workdir: of the run.
      start: folder of the run to fine-tune, if any.
      folder: of the evaluation; None for a training.
    """

    key: str
    seed: int
    config: Any
    workdir: pathlib.Path
    start: pathlib.Path | None = None
    folder: pathlib.Path | None = None


class Plan(NamedTuple):
    """All jobs in order, and the folders of their results.

    Attributes:
      jobs: each after those it needs, no folder twice.
      folders: of evaluations, by row key, setting and seed.
    """

    jobs: list[Job]
    folders: dict[str, dict[str, dict[int, pathlib.Path]]]


# The attacks of the paper's tables, whose AA is two of the four attacks of AutoAttack; no audits.
PROTOCOL = ("evaluation.autoattack=robal_aa", "evaluation.audit.examples=0")


def row_config(row: Row, request: Request, *more: str) -> Any:
    """Returns the resolved config of a row; ``more`` are overrides.

    Raises:
      InputError: the config does not accept an override.
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
    """Returns the name of the folder of a row's runs, such as 'ldam-0123abcd'."""
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
    fields = without_neutral(json.loads(to_json(row_config(row, request, setting))))
    section = unflatten_dict(fields, sep=".")["evaluation"]
    return f"{row.config}-{_digest(run_name(row, request), json.dumps(section, sort_keys=True))}"


def _evaluation_folder(row: Row, setting: str, seed: int, request: Request) -> pathlib.Path:
    """Returns a folder named so that ``experiments/compare.py`` sees its parent as a run."""
    name = _evaluation_name(row, setting, request)
    return request.out / request.data / "evaluations" / name / f"seed{seed}" / "evaluation"


def _check_overrides(request: Request) -> None:
    """Raises if an override concerns a field that a row, or this module, sets."""
    asked = {override.partition("=")[0] for override in request.overrides}
    if "seed" in asked:
        raise InputError("config.seed is set by --seeds; remove the override")
    for row in request.rows:
        own = {override.partition("=")[0] for override in (*row.overrides, *row.settings)}
        own |= {"train.start_from"} if row.start else set()
        if own & asked:
            raise InputError(f"row {row.key!r} sets config.{min(own & asked)} itself; remove the override")


def make_plan(request: Request) -> Plan:
    """Returns everything to train and to evaluate for the rows of a request.

    Raises:
      InputError: a row sets an overridden field itself, or its config does not accept the override.
    """
    _check_overrides(request)
    jobs: dict[pathlib.Path, Job] = {}
    folders: dict[str, dict[str, dict[int, pathlib.Path]]] = {}

    def training(row: Row, seed: int, key: str) -> tuple[pathlib.Path, tuple[str, ...]]:
        """Plans a row's run, after the run that it starts from; returns its folder and overrides."""
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
    """Returns the commands that train and evaluate a row, with the first seed."""
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
