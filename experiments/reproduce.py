"""Reproduce a table: python experiments/reproduce.py --table=1 [--data=digits_lt] [--config.KEY=VALUE].

Trains, fine-tunes and evaluates the rows of a table of the RoBal paper, or of the methods after it, prints
the table and writes it to OUT/DATA/table1.md and table1.json. Finished runs and evaluations are reused, also
by other tables; to resume after a stop or a crash, run the same command again. --config.KEY=VALUE applies to
all rows.
"""

import contextlib
import io
import json
import pathlib
import sys
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from robal_jax import cli
from robal_jax.errors import DivergedError, InputError, ReportError
from robal_jax.storage import buckets
from robal_jax.storage.lock import alone_in
from robal_jax.storage.names import CHECKPOINTS

if TYPE_CHECKING:  # it imports JAX
    from experiments.paper.plan import Job, Plan, Request
    from robal_jax.devices.hosts import Stop
    from robal_jax.reporting.results import Results

CONFIGS = pathlib.Path(__file__).resolve().parents[1] / "configs"
FLAGS = {
    "table": "1, 2, 3, 4, S6, S7, followups, augmentation or small",
    "data": "digits_lt (the default), cifar10_lt or cifar100_lt",
    "seeds": "number of seeds, counted from 0; 3 by default",
    "splits": "number of long-tailed subsets per seed, config.data.seed from 0; 1 by default",
    "rows": "keys of rows, separated by commas; all by default",
    "out": "folder of all runs and tables, or its URL in a bucket, gs://… or s3://…; runs/tables by default",
}


def request_of(values: dict[str, str], overrides: Sequence[str]) -> "Request":
    """Returns the flags as a :class:`Request`, checked.

    Raises:
      InputError: unknown table, data set or row, or an invalid number of seeds.
    """
    from experiments.paper.catalogue import TABLES, rows_of
    from experiments.paper.plan import Request
    from experiments.paper.rows import DATA_SETS

    data, seeds = values["data"] or "digits_lt", values["seeds"] or "3"
    if data not in DATA_SETS:
        raise InputError(f"unknown data set {data!r}; use one of {', '.join(DATA_SETS)}")
    if not seeds.isdecimal() or not int(seeds):
        raise InputError(f"--seeds is {seeds!r}; give the number of seeds, 1 or more")
    splits = values["splits"] or "1"
    if not splits.isdecimal() or not int(splits):
        raise InputError(f"--splits is {splits!r}; give the number of subsets, 1 or more")
    if int(splits) > 1 and data == "digits_lt":
        raise InputError(
            "on digits_lt each seed has its own subset; leave --splits out, and give more --seeds"
        )
    runs = [(seed, split) if split else seed for seed in range(int(seeds)) for split in range(int(splits))]
    keys = [key.strip() for key in values["rows"].split(",") if key.strip()]
    if values["rows"] and not keys:
        raise InputError(f"--rows is {values['rows']!r}; give keys of rows, or leave it out")
    if not values["table"]:
        raise InputError(f"--table is missing; use one of {', '.join(TABLES)}")
    rows = rows_of(values["table"], data, keys)
    if int(splits) > 1 and any(row.seeds for row in rows):
        raise InputError(
            f"rows of table {values['table']} have their own number of seeds; leave --splits out"
        )
    return Request(
        table=values["table"],
        data=data,
        seeds=tuple(runs[: max(row.seeds or len(runs) for row in rows)]),
        rows=rows,
        overrides=tuple(override.lstrip("-").removeprefix("config.") for override in overrides),
        out=pathlib.Path(values["out"] or "runs/tables"),
        configs=CONFIGS,
    )


def finished(workdir: pathlib.Path) -> dict[str, str] | None:
    """Returns number and sha256 of a run's last checkpoint, None if :func:`do` did not finish the run."""
    folder = buckets.fetched(workdir)
    marker = read_json(folder / "finished.json")
    return marker if marker and (folder / CHECKPOINTS / marker["checkpoint"]).is_dir() else None


def read_json(path: pathlib.Path) -> Any:
    """Returns the content of a JSON file, None if the file is missing or damaged."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def read_results(folder: pathlib.Path) -> "Results | None":
    """Returns the results of an evaluation, None if they are missing or damaged."""
    from robal_jax.reporting.results import Results

    try:
        return Results.read(buckets.fetched(folder))
    except InputError:
        return None


def evaluated_checkpoint(job: "Job", run: dict[str, str]) -> tuple[pathlib.Path, str]:
    """Returns folder and sha256 of the checkpoint that an evaluation takes: the last one, or the best.

    Raises:
      InputError: the run has no best checkpoint.
    """
    from robal_jax.storage.best import default_checkpoint, read_best

    workdir = buckets.fetched(job.workdir)
    path, best = default_checkpoint(workdir, job.config.train.select), read_best(workdir)
    if path is None or best is None:
        return workdir / CHECKPOINTS / run["checkpoint"], run["sha256"]
    return path, best.sha256


def is_done(job: "Job") -> bool:
    """Returns whether a run is finished, or whether an evaluation used the checkpoint that it is of."""
    run = finished(job.workdir)
    if job.folder is None or run is None:
        return run is not None
    results = read_results(job.folder)
    return results is not None and results.meta["checkpoint_sha256"] == evaluated_checkpoint(job, run)[1]


def set_outdated_aside(folder: pathlib.Path, sha256: str, say: Callable[[str], None]) -> None:
    """Renames the evaluation in a folder if it is of another checkpoint, such as of a run before this one."""
    from robal_jax.storage.evaluated import identity_in

    there = identity_in(buckets.fetched(folder))
    if there and there.get("checkpoint_sha256") != sha256:
        if buckets.is_url(folder):
            raise InputError(f"{buckets.shown(folder)} is of another checkpoint; move it away, or remove it")
        aside = folder.with_name(f"{folder.name}-{time.strftime('%Y%m%dT%H%M%S')}")
        folder.rename(aside)
        say(f"{folder} is of another checkpoint; moved to {aside}")


def do(job: "Job", say: Callable[[str], None]) -> None:
    """Trains or evaluates; a job that was stopped is not done.

    Raises:
      DivergedError: the training diverged.
    """
    from robal_jax import builder, evaluation, training
    from robal_jax.storage import checkpoints, mirror
    from robal_jax.storage.files import write_whole

    if job.folder is not None:
        run = finished(job.workdir)
        assert run is not None, "a run is trained before it is evaluated"
        checkpoint, sha256 = evaluated_checkpoint(job, run)
        set_outdated_aside(job.folder, sha256, say)
        with contextlib.redirect_stdout(io.StringIO()):  # its table
            try:
                evaluation.evaluate(
                    job.config,
                    job.workdir,
                    checkpoint=checkpoint,
                    folder=job.folder,
                    say=say,
                )
            except ReportError as error:  # the results are there, which the table needs
                say(str(error))
    elif training.train(job.config, job.workdir, say=say).name == str(
        builder.training(job.config).total_steps
    ):
        with mirror.kept(job.workdir, say) as (folder, _):
            _, path, sha256 = checkpoints.read_latest(folder)
            marker = {"checkpoint": path.name, "sha256": sha256}
            write_whole(folder / "finished.json", json.dumps(marker).encode())


def digests_of(config: Any) -> tuple[str, str] | None:
    """Returns the sha256 of a config's data and of its generated images, None if they cannot be read."""
    from robal_jax.builder.training_images import training_images

    try:
        images = training_images(config)
    except InputError:  # a job that needs them says what is wrong
        return None
    return images.data_sha256, images.stored.get("generated_sha256", "")


def check_data(jobs: "Sequence[Job]") -> None:
    """Checks that the finished runs were trained on these data; the names of folders do not tell.

    Raises:
      InputError: a run was trained on others.
    """
    from robal_jax.storage.workdir import check_same_data

    digests: dict[str, tuple[str, str] | None] = {}
    for job in jobs:
        if job.folder is not None or not is_done(job):
            continue
        key = f"{job.config.data} {job.config.generated}"
        if key not in digests:
            digests[key] = digests_of(job.config)
        if (here := digests[key]) is None:
            continue
        try:
            check_same_data(here[0], buckets.fetched(job.workdir), lambda line: None, generated=here[1])
        except InputError as error:
            raise InputError(f"{job.key} seed {job.seed}: {error}, or choose another --out") from error


def do_all(jobs: "Sequence[Job]", log: Callable[[str], None], stop: "Stop") -> list[str] | None:
    """Does the unfinished jobs, in order.

    Args:
      jobs: those of a :class:`Plan`.
      log: receives every message.
      stop: whether to stop after the present job.

    Returns:
      The runs that diverged, or None if the work was stopped before its end.
    """
    left = [job for job in jobs if not is_done(job)]
    print(f"{len(jobs)} trainings and evaluations, {len(jobs) - len(left)} of them done")
    diverged: dict[pathlib.Path, str] = {}
    for number, job in enumerate(jobs, 1):
        if stop:
            return None
        name = f"{job.key} seed {job.seed}"
        if job.start in diverged:
            diverged[job.workdir] = name
        if is_done(job) or job.workdir in diverged:
            continue
        title = f"[{number}/{len(jobs)}] {name}: {'evaluate' if job.folder else 'train'}"
        if job.surrogate in diverged:
            line = f"{title}: left out, because it needs images of {diverged[job.surrogate]}, which diverged"
            print(line)
            log(line)
            continue
        print(title, flush=True)
        started = time.monotonic()
        try:
            do(job, lambda line, title=title: log(f"{title}: {line}"))  # type: ignore[misc]
            ended = f"{time.monotonic() - started:.0f} s"
        except DivergedError as error:
            ended, diverged[job.workdir] = f"diverged: {error}", name
        except InputError as error:
            raise InputError(f"{name}: {error}") from error
        if job.workdir not in diverged and not is_done(job):
            return None
        print(f"{title} {ended}", flush=True)
        log(f"{title} {ended}")
    return list(diverged.values())


def _durations(plan: "Plan", path: pathlib.Path) -> str:
    """Writes the seconds that training took, by row, beside a table; returns where.

    They are not in the table, which is the same however often its making was interrupted.
    """
    from experiments.paper.cost import seconds
    from robal_jax.storage.files import write_whole

    of_row: dict[str, list[pathlib.Path]] = {}
    for job in plan.jobs:
        of_row.setdefault(job.key, []).append(buckets.fetched(job.workdir))
    found = {key: seconds(dict.fromkeys(workdirs)) for key, workdirs in of_row.items()}
    rounded = {key: round(value, 1) for key, value in found.items() if value is not None}
    write_whole(path, f"{json.dumps(rounded, indent=1)}\n".encode())
    return f"seconds of training per run, by row: {buckets.shown(path)}"


def main(arguments: list[str]) -> None:
    """Makes the table that the flags request, with ``experiments.paper``."""
    arguments, overrides = cli.split_overrides(arguments)
    request = request_of(cli.parse(arguments, FLAGS, __doc__), overrides)

    from experiments.paper.plan import make_plan
    from robal_jax.devices import hosts
    from robal_jax.storage import mirror

    hosts.start("")
    plan = make_plan(request)
    place = request.out / request.data
    if buckets.is_url(place):  # beside the runs, each of which is kept in step by itself
        place /= "tables"
    with hosts.stop_signals() as stop, mirror.kept(place, print, stop.ask) as (folder, _):
        make(plan, request, folder, stop)


def make(plan: "Plan", request: "Request", folder: pathlib.Path, stop: "Stop") -> None:
    """Does the jobs of a plan, and writes and prints its table.

    Args:
      plan: of the table.
      request: what the user asked for.
      folder: receives the table.
      stop: whether to stop after the present job.

    Raises:
      DivergedError: a run diverged; the table is there without it.
      InputError: the folder cannot be used, or a job cannot be done.
    """
    from experiments.paper.catalogue import heading
    from experiments.paper.table import assemble, markdown
    from robal_jax.storage.claims import check_place
    from robal_jax.storage.files import check_replaceable, write_whole

    path = folder / f"table{request.table}.md"
    check_place(folder)
    check_replaceable(path, f"# {heading(request.table)} ")
    check_replaceable(path.with_suffix(".json"), '"table": ')
    with alone_in(folder), (folder / "reproduce.log").open("a", buffering=1) as file:
        check_data(plan.jobs)
        diverged = do_all(plan.jobs, lambda line: print(time.strftime("%F %T"), line, file=file), stop)
        if diverged is None:
            print("stopped; run the same command again to resume")
            return
        results = {
            key: {
                setting: {seed: read_results(path) for seed, path in by_seed.items()}
                for setting, by_seed in settings.items()
            }
            for key, settings in plan.folders.items()
        }
        table = assemble(request, results)
        text = cli.as_started(markdown(table))
        write_whole(path, text.encode())
        content = cli.as_started(json.dumps(table, indent=1, ensure_ascii=False))
        write_whole(path.with_suffix(".json"), f"{content}\n".encode())
        print(
            f"\n{text.partition('## Commands')[0]}table, and the commands of its rows: {buckets.shown(path)}"
        )
        if table.get("follow_up"):
            print(_durations(plan, path.with_suffix(".seconds.json")))
    if diverged:
        raise DivergedError(
            f"no result from {', '.join(diverged)}; see {buckets.shown(folder / 'reproduce.log')}"
        )


if __name__ == "__main__":
    cli.run(main)
