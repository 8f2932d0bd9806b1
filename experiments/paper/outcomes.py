"""The outcomes of a table's evaluations: the class of every image, stored in the repository and read back.

Of the audit, whether each image of its sample is right at each point of its curves.
"""

import json
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from experiments.paper.cost import seconds
from experiments.paper.plan import Request, make_plan, row_config
from experiments.paper.rows import Row
from experiments.paper.small import SMALL
from robal_jax import metrics, zoo
from robal_jax.errors import InputError, one_line
from robal_jax.reporting.results import EvaluatedRun, Results, read_run, results_folder
from robal_jax.storage.config_file import differences
from robal_jax.storage.files import replacing, write_whole
from robal_jax.storage.names import RESULTS
from robal_jax.zoo.cards import SETTINGS
from robal_jax.zoo.models import read_card

ROOT = pathlib.Path(__file__).resolve().parents[2]

TABLE = SMALL["small"]

STATED = {"authors": "The robal_jax authors", "license": "Apache-2.0"}  # of the models that ship

ROWS = {f"{row.key}-{seed}": (row, seed) for row in TABLE.rows for seed in range(row.seeds)}
"""Rows and seeds by the names under which their outcomes are stored."""

WHOLE = "whole"  # the evaluation that the table itself shows: the whole test set

AUDIT = "audit"  # among the arrays of an evaluation: those of the audit's sample

_FACTS = (
    "method", "seed", "dataset", "imbalance", "class_names", "weights", "main_attack", "selection",
    "held_out", "checkpoint_sha256", "ingredients", *SETTINGS,
)  # fmt: skip
"""Entries of an evaluation's ``meta`` that are stored."""


class Run(NamedTuple):
    """A row's run of one seed.

    Attributes:
      row: of the table.
      seed: of the training.
      evaluations: by name, with figures made from the stored outcomes.
      seconds: that the steps of its training took, see ``cost.seconds``; None if it is not known.
    """

    row: Row
    seed: int
    evaluations: Mapping[str, EvaluatedRun]
    seconds: float | None

    @property
    def label(self) -> str:
        """The row, and the seed if the row has several."""
        return f"{self.row.label}, seed {self.seed}" if self.row.seeds > 1 else self.row.label

    @property
    def balanced(self) -> bool:
        """Whether the training set has as many images of each class."""
        return any(len(set(each.summary["class_counts"])) == 1 for each in self.evaluations.values())


def request_for(out: pathlib.Path) -> Request:
    """Returns the request of the whole table, with all seeds."""
    rows = TABLE.rows
    most = max(row.seeds for row in rows)
    return Request("small", "cifar10_lt", tuple(range(most)), rows, out=out, configs=ROOT / "configs")


def collect(out: pathlib.Path, stored: pathlib.Path) -> list[str]:
    """Stores the outcomes of all finished evaluations; returns the names of the runs that have some."""
    plan, found = make_plan(request_for(out)), []
    trained = {(job.key, job.seed): job.workdir for job in plan.jobs if job.folder is None}
    for row in TABLE.rows:
        for seed in range(row.seeds):
            folders = {WHOLE: plan.folders[row.key][""], **plan.further[row.key]}
            runs = {
                name: read_run(by_seed[seed])
                for name, by_seed in folders.items()
                if (by_seed[seed] / RESULTS).is_file()
            }
            if runs:
                name = f"{row.key}-{seed}"
                store(stored / name, runs, seconds([trained[row.key, seed]]))
                found.append(name)
    return found


def publish_models(out: pathlib.Path, zoo_folder: pathlib.Path) -> list[str]:
    """Publishes the runs of seed 0 whose main evaluations are finished; returns their names in the zoo.

    Raises:
      InputError: the zoo has another model of one of these names; then none is published.
    """
    plan, found = make_plan(request_for(out)), {}
    trained = {job.key: job.workdir for job in plan.jobs if job.folder is None and job.seed == 0}
    for row in TABLE.rows:
        name = f"{row.key}_resnet20"
        folders = {WHOLE: plan.folders[row.key][""][0], "autoattack": plan.further[row.key]["autoattack"][0]}
        if all((folder / RESULTS).is_file() for folder in folders.values()):
            _check_same_model(zoo_folder / f"{name}.json", Results.read(folders[WHOLE]))
            found[name] = trained[row.key], folders
    for name, (workdir, folders) in found.items():
        zoo.publish(workdir, zoo_folder / name, folders, **STATED)
    return list(found)


def _check_same_model(card_file: pathlib.Path, results: Results) -> None:
    """Raises if a card is of another model than an evaluation: what was published is not replaced."""
    if card_file.exists():
        theirs, ours = read_card(card_file)["checkpoint"]["sha256"], results.meta["checkpoint_sha256"]
        if theirs != ours:
            raise InputError(
                f"{card_file} is of another model (checkpoint {theirs[:12]}…, not {ours[:12]}…); to replace "
                "it, remove the three files of its name"
            )


def store_folders(folders: Mapping[str, pathlib.Path], stored: pathlib.Path) -> list[str]:
    """Stores single evaluations of runs; returns the names of the runs.

    Args:
      folders: of results, each in its run's folder, by ``ROW-SEED/EVALUATION``, such as 'la-0/autoattack'.
      stored: where to.
    """
    runs: dict[str, dict[str, pathlib.Path]] = {}
    for place, folder in folders.items():
        name, _, evaluation = place.partition("/")
        if name not in ROWS or evaluation not in NEEDED:
            raise InputError(
                f"there is no {place!r}; give a row, a seed and one of {', '.join(NEEDED)}, as in at-0/best"
            )
        runs.setdefault(name, {})[evaluation] = results_folder(folder)
    for name, found in runs.items():
        trained = seconds([folder.parent for folder in found.values()])
        evaluations = {each: read_run(folder) for each, folder in found.items()}
        _check_trained_as(name, evaluations)
        store(stored / name, evaluations, trained)
    return list(runs)


def _check_trained_as(name: str, evaluations: Mapping[str, EvaluatedRun]) -> None:
    """Raises if evaluations are of models that were trained otherwise than the row of a name says."""
    row, seed = ROWS[name]
    config = row_config(row, request_for(pathlib.Path("out")), f"seed={seed}")
    for each, run in evaluations.items():
        differing = differences(ConfigDict(run.meta["config"]), config)
        if differing := [line for line in differing if not line.startswith("train.select")]:
            raise InputError(
                f"the evaluation {each!r} is not of {name} (config.{differing[0]}, in the row); store it "
                "under the name of its row"
            )


def store(path: pathlib.Path, runs: Mapping[str, EvaluatedRun], training: float | None) -> None:
    """Adds to ``PATH.npz`` the outcomes of every image by evaluation, and to ``PATH.json`` the rest.

    Evaluations that are stored under other names stay, and so do the seconds, if ``training`` is None.
    """
    arrays: dict[str, Any] = {}
    facts: dict[str, Any] = {}
    if path.with_suffix(".json").is_file():
        content, arrays = _stored(path)
        training = training or content["seconds_of_training"]
        facts = content["evaluations"]
        arrays = {key: each for key, each in arrays.items() if key.partition("/")[0] not in runs}
    for name, run in runs.items():
        arrays[f"{name}/ids"] = run.examples["ids"].astype(np.uint16)
        arrays[f"{name}/labels"] = run.examples["labels"].astype(np.uint8)
        for condition, predictions in run.predictions.items():
            if condition != "worst":
                arrays[f"{name}/pred_{condition}"] = predictions.astype(np.uint8)
        for key, values in run.sample.items():
            arrays[f"{name}/{AUDIT}/{key}"] = values if values.dtype == bool else values.astype(np.uint16)
        facts[name] = {
            "meta": {key: run.meta[key] for key in _FACTS if key in run.meta},
            "class_counts": run.summary["class_counts"],
            "audit": run.audit,
            "norms": run.norms,
        }
    _check_is_of(path, {name: each["meta"] for name, each in facts.items()})
    path.parent.mkdir(exist_ok=True)
    with replacing(path.with_suffix(".npz")) as file:
        np.savez_compressed(file, **arrays)
    content = {"seconds_of_training": training and round(training), "evaluations": facts}
    write_whole(path.with_suffix(".json"), f"{json.dumps(content, ensure_ascii=False)}\n".encode())


NEEDED = {
    WHOLE: TABLE.columns,
    "autoattack": ("clean", "robal_aa", "autoattack"),
    "torchattacks": ("torchattacks",),
    "best": ("robal_aa",),
}
"""Conditions that each evaluation has."""


def read(stored: pathlib.Path) -> list[Run]:
    """Returns the stored runs in the order of the table; all figures are computed from the outcomes.

    Raises:
      InputError: a stored file is missing or damaged, or an evaluation is another than that of the table.
    """
    runs = []
    for row in TABLE.rows:
        for seed in range(row.seeds):
            path = stored / f"{row.key}-{seed}.json"
            if not path.is_file():
                continue
            content, arrays = _stored(path)
            evaluations = {
                name: _evaluated(f"{path.stem}/{name}", facts, arrays)
                for name, facts in content["evaluations"].items()
            }
            runs.append(Run(row, seed, evaluations, content["seconds_of_training"]))
            _check_evaluations(path, evaluations)
    _check_images(runs)
    return [run for run in runs if run.evaluations]


def _stored(path: pathlib.Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Reads what :func:`store` wrote."""
    path = path.with_suffix(".json")
    try:
        content = dict(json.loads(path.read_text()))
        with np.load(path.with_suffix(".npz")) as arrays:
            found = dict(arrays)
        content["seconds_of_training"]
        for name, facts in content["evaluations"].items():
            facts["meta"], facts["class_counts"], facts["audit"], facts["norms"], found[f"{name}/labels"]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise InputError(f"{path} or its .npz cannot be read ({one_line(error)}); restore both") from error
    return content, found


def _check_is_of(path: pathlib.Path, metas: Mapping[str, Mapping[str, Any]]) -> None:
    """Raises if evaluations are not of the row and the seed of their file, and of one checkpoint.

    Only 'best' is of another one.
    """
    row, seed = ROWS[path.stem]
    method = row_config(row, request_for(pathlib.Path("out"))).method
    for name, meta in metas.items():
        is_of = f"{meta['method']}, seed {meta['seed']}"
        if is_of != (wanted := f"{method}, seed {seed}"):
            raise InputError(
                f"{path}: the evaluation {name!r} is of {is_of}, not of {wanted}; store it under the name of "
                "its row"
            )
    checkpoints = {name: meta["checkpoint_sha256"][:12] for name, meta in metas.items() if name != "best"}
    if len(set(checkpoints.values())) > 1:
        each = ", ".join(f"{name} {sha256}" for name, sha256 in checkpoints.items())
        raise InputError(
            f"{path}: the evaluations are of different checkpoints ({each}); store those of one training"
        )


def _check_evaluations(path: pathlib.Path, evaluations: Mapping[str, EvaluatedRun]) -> None:
    """Raises if an evaluation is not one of the table."""
    _check_is_of(path, {name: found.meta for name, found in evaluations.items()})
    for name, found in evaluations.items():
        lacking = [each for each in NEEDED.get(name, [name]) if each not in found.conditions]
        if lacking:
            raise InputError(
                f"{path}: the evaluation {name!r} has no outcomes under {lacking[0]}; store one that "
                "reproduce.py made without other overrides than the place of the data"
            )


def _check_images(runs: list[Run]) -> None:
    """Raises if two runs were not evaluated on the same images, in the same order."""
    first: dict[str, tuple[str, np.ndarray]] = {}
    for run in runs:
        for name, found in run.evaluations.items():
            other, ids = first.setdefault(name, (run.label, found.examples["ids"]))
            if not np.array_equal(ids, found.examples["ids"]):
                raise InputError(
                    f"the evaluations {name!r} of {other} and {run.label} have different images; make both "
                    "with the same settings"
                )


def _evaluated(place: str, facts: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> EvaluatedRun:
    """Returns an evaluation; its classes are divided by the long-tailed counts, also if its own are equal."""
    name = place.partition("/")[2]
    own = {key.removeprefix(f"{name}/"): each for key, each in arrays.items() if key.startswith(f"{name}/")}
    examples = {key: np.asarray(each, np.int64) for key, each in own.items() if "/" not in key}
    sample = {key.removeprefix(f"{AUDIT}/"): each for key, each in own.items() if "/" in key}
    predictions = {key.removeprefix("pred_"): each for key, each in examples.items() if key[:5] == "pred_"}
    counts = np.asarray(facts["class_counts"])
    groups = metrics.class_groups(np.arange(len(counts), 0, -1) if len(set(counts)) == 1 else counts)
    summary = metrics.summarize(examples["labels"], predictions, counts, groups=groups)
    return EvaluatedRun(
        facts["meta"], summary, facts["audit"], facts["norms"], name=place, examples=examples, sample=sample
    )
