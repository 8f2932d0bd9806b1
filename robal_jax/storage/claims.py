"""Folders that a job may write to: nothing of anybody else is lost there.

A job's folder is new, or it was made by such a job. In any other folder a file with the name of one that the
job writes is somebody else's, and the job is refused before it starts.
"""

import itertools
import os
import pathlib
from collections.abc import Collection

import numpy as np

from robal_jax.errors import InputError
from robal_jax.storage import checkpoints
from robal_jax.storage.files import json_object
from robal_jax.storage.names import (
    ADVERSARIAL,
    AUDIT,
    BEST,
    CERTIFIED,
    CHECKPOINTS,
    CONFIG,
    CORRUPTED,
    DAMAGED,
    EVALUATION,
    EXAMPLES,
    IMPORT,
    METRICS,
    OPTIMALITY,
    PER_CLASS,
    RESULTS,
    TENSORBOARD,
    TRACKED,
    UNFINISHED,
    VERSIONS,
)
from robal_jax.storage.unfinished import PARTS, read_identity

OF_A_RUN = (CONFIG, VERSIONS, IMPORT, METRICS, TENSORBOARD, TRACKED, CHECKPOINTS, BEST, DAMAGED)
OF_AN_EVALUATION = (RESULTS, EXAMPLES, ADVERSARIAL, AUDIT, CORRUPTED, CERTIFIED, OPTIMALITY, PER_CLASS)


def is_run(folder: pathlib.Path) -> bool:
    """Returns whether a folder is that of a run, trained or imported, or of one that has just begun."""
    return bool(
        any("robal_jax" in json_object(folder / name) for name in (VERSIONS, IMPORT))
        or (os.path.isfile(folder / CONFIG) and checkpoints.steps(folder / CHECKPOINTS))
    )


def is_evaluation(folder: pathlib.Path) -> bool:
    """Returns whether any file in a folder is that of an evaluation, finished or not."""
    return (
        {"meta", "summary"} <= json_object(folder / RESULTS).keys()
        or {"labels", "ids"} <= _names(folder / EXAMPLES)
        or {"ids", "images", "predictions"} <= _names(folder / ADVERSARIAL)
        or any(read_identity(folder / UNFINISHED / f"{part}.npz") for part in PARTS)
    )


def _names(path: pathlib.Path) -> set[str]:
    """Returns the names of the arrays in a file; none if it cannot be read."""
    try:
        with path.open("rb") as file, np.load(file) as content:
            return set(content.files)
    except Exception:  # whatever is wrong with the file
        return set()


def check_place(folder: pathlib.Path) -> None:
    """Checks that a folder is not inside of one that only another job writes to.

    Raises:
      InputError: it is a checkpoint, or inside of a folder of a run or of an unfinished evaluation, or its
        name is not UTF-8, which Orbax cannot save to.
    """
    place = pathlib.Path(os.path.realpath(folder))
    try:
        str(place).encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{os.fsencode(folder)!r} is no name in UTF-8; choose another folder") from error
    for inner, outer in itertools.pairwise((place, *place.parents)):
        of_run = inner.name in (CHECKPOINTS, BEST, DAMAGED, TENSORBOARD) and is_run(outer)
        unfinished = inner.name == UNFINISHED and is_evaluation(outer)
        if of_run or unfinished or os.path.isfile(inner / checkpoints.METADATA):
            what = "run" if of_run else "evaluation" if unfinished else "checkpoint"
            whose = inner if what == "checkpoint" else outer
            raise InputError(f"{folder} belongs to the {what} {whose}; choose another folder")


def check_run(workdir: pathlib.Path) -> None:
    """Checks that a run can be made, or resumed, in a folder.

    Raises:
      InputError: the folder belongs to something else, or has a file of a name that a run writes.
    """
    check_place(workdir)
    if not is_run(workdir):
        if is_evaluation(workdir):
            raise InputError(f"{workdir} has an evaluation; choose another folder")
        _refuse_foreign(workdir, OF_A_RUN, "a training")


def check_evaluation(folder: pathlib.Path, report: Collection[str]) -> None:
    """Checks that an evaluation can be made, or resumed, in a folder.

    Args:
      folder: of the results.
      report: names of the files of a report.

    Raises:
      InputError: the folder belongs to something else, or has a file of a name that an evaluation writes.
    """
    check_place(folder)
    if is_evaluation(folder):
        return
    if is_run(folder):
        raise InputError(f"{folder} is the folder of a run; choose another, such as {folder / EVALUATION}")
    _refuse_foreign(folder, (*OF_AN_EVALUATION, *report, UNFINISHED), "an evaluation")


def _refuse_foreign(folder: pathlib.Path, names: Collection[str], what: str) -> None:
    """Refuses a folder that is not of a job of ours, but has a file of ours by name."""
    for name in names:
        if os.path.lexists(folder / name) and not _left_empty(folder / name):
            raise InputError(
                f"{folder / name} is not of {what}, and would be lost; choose another folder, or move it away"
            )


def _left_empty(path: pathlib.Path) -> bool:
    """Returns whether a folder has nothing but what is left of a job that was killed at its first save."""
    if not path.is_dir() or path.is_symlink():
        return False
    ours = {f"{part}.npz" for part in PARTS}
    return all(name.startswith(".") or name in ours for name in os.listdir(path))
