"""The best checkpoint of a run, beside its newest ones, and how the evaluated checkpoint was chosen.

``WORKDIR/best`` has one checkpoint, ``STEP``, and its record, ``best.json``. Nothing is lost if the process
is killed: the new checkpoint is written first, then the record that names it, and only then the old
checkpoint is removed. A resumed run makes the same records again, so it ends with the same best checkpoint.
"""

import json
import os
import pathlib
import shutil
from collections.abc import Mapping
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

import chex

from robal_jax.devices import hosts
from robal_jax.errors import InputError, one_line
from robal_jax.storage import checkpoints
from robal_jax.storage.files import write_whole
from robal_jax.storage.names import BEST, CHECKPOINTS, IMPORT, RECORD
from robal_jax.storage.workdir import check_there, imported_from, unfinished


class Record(NamedTuple):
    """How the weights of a step were judged during the training.

    Attributes:
      step: of the checkpoint.
      epoch: to which the step belongs, from 1.
      epochs: of the whole run.
      images: on which they were judged: 'held-out' or 'test'.
      score: their accuracy under PGD-10, the mean of the classes, in [0, 1].
      figures: all accuracies, by the names of the metrics.
      sha256: of the checkpoint.
      judged: what was judged: 'weights', 'epsilon', 'budget', and 'radii' of a budget that gives them one by
        one; empty in older records.
    """

    step: int
    epoch: int
    epochs: int
    images: str
    score: float
    figures: Mapping[str, float]
    sha256: str = ""
    judged: Mapping[str, Any] = MappingProxyType({})

    def text(self, evaluated: Mapping[str, Any]) -> str:
        """Says it: 'best on held-out images (epoch 40 of 60, PGD-10 51.2 % as the mean of the classes)'.

        Args:
          evaluated: as ``judged``, of the evaluation; if they differ, the text says what was judged.
        """
        text = (
            f"best on {self.images} images (epoch {self.epoch} of {self.epochs}, PGD-10 "
            f"{100 * self.score:.1f} % as the mean of the classes"
        )
        asked = {"radii": None, **evaluated}
        judged = {"radii": asked["radii"], **self.judged}  # which older records do not have
        if self.judged and judged != asked:
            text += f"; chosen by the {self.judged['weights']} weights at epsilon {self.judged['epsilon']:g}"
            if self.judged["budget"] != evaluated.get("budget", "constant"):
                text += f", budget {self.judged['budget']}"
            elif judged["radii"] != asked["radii"]:
                text += ", other radii by class"
        return f"{text})"


def is_better(new: Record, old: Record) -> bool:
    """Returns whether a record replaces another: a higher score, or the same score at an earlier step.

    Example:
      >>> def record(step, score):
      ...     return Record(step, 1, 9, "held-out", score, {})
      >>> is_better(record(20, 0.5), record(10, 0.4)), is_better(record(20, 0.5), record(10, 0.5))
      (True, False)
    """
    return new.step != old.step and (new.score, -new.step) > (old.score, -old.step)


def read_best(workdir: pathlib.Path) -> Record | None:
    """Reads the record of the best checkpoint; None if there is none, or if the checkpoint is gone.

    Raises:
      InputError: the record is damaged.
    """
    path = workdir / BEST / RECORD
    try:
        record = Record(**json.loads(path.read_text()))
        there = (path.parent / str(record.step)).is_dir()
        return record if there and record.text({}) else None
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        raise InputError(
            f"cannot read {path} ({one_line(error)}); restore it from a copy, or remove {path.parent} to "
            "choose the best checkpoint from here on"
        ) from error


def keep_if_best(workdir: pathlib.Path, record: Record, state: chex.ArrayTree) -> bool:
    """Saves a checkpoint in place of the best one so far if it is better; returns whether it is.

    All processes of a job call it together.

    Raises:
      InputError: the folder is gone, the disk is full, or the checkpoint cannot be written.
    """
    best, folder = hosts.by_first(partial(read_best, workdir)), workdir / BEST
    if best is not None and not is_better(record, best):
        return False
    hosts.by_first(partial(check_there, workdir))
    hosts.by_first(partial(_keep_only, folder, best and best.step))  # a kill may have left another
    with checkpoints.Saver(folder, keep=2) as saver:
        _, sha256 = saver.save(record.step, state)
    fields = record._replace(sha256=sha256, judged=dict(record.judged))._asdict()
    content = json.dumps(fields, indent=2) + "\n"
    hosts.by_first(partial(write_whole, folder / RECORD, content.encode()))
    hosts.by_first(partial(_keep_only, folder, record.step))
    return True


def _keep_only(folder: pathlib.Path, step: int | None) -> None:
    for other in checkpoints.steps(folder):
        if other != step:
            shutil.rmtree(folder / str(other))


def default_checkpoint(workdir: pathlib.Path, select: str) -> pathlib.Path | None:
    """Returns the checkpoint that an evaluation takes if none is named.

    Args:
      workdir: folder of the run.
      select: 'last', 'best' or 'best_on_test'.

    Returns:
      The folder of the best checkpoint; None for the newest one, which is all that an imported run has.

    Raises:
      InputError: the run has no best checkpoint, or it was chosen on other images.
    """
    if select == "last" or (workdir / IMPORT).exists():
        return None
    best, images = read_best(workdir), "test" if select == "best_on_test" else "held-out"
    if best is None:
        raise InputError(
            f"config.train.select is {select!r}, but {workdir / BEST} has no checkpoint: none was judged "
            "during the training; set config.train.select=last"
        )
    if best.images != images:
        raise InputError(
            f"config.train.select is {select!r}, but {workdir / BEST} was chosen on {best.images} images; "
            "leave the field as it was in the training, or set 'last'"
        )
    return workdir / BEST / str(best.step)


def how_chosen(
    workdir: pathlib.Path, path: pathlib.Path, select: str, evaluated: Mapping[str, Any]
) -> dict[str, Any]:
    """Says how a checkpoint was chosen, for the results of its evaluation.

    Args:
      workdir: folder of the run.
      path: folder of the checkpoint.
      select: what the config says; it counts for an imported run only, if nothing else is known of it.
      evaluated: what is evaluated, as ``Record.judged``.

    Returns:
      'selection', for people, if it is known, with :func:`unfinished`; and 'selected_on_test', True, if it
      was chosen on test images.
    """
    left = unfinished(workdir)
    folder, best = os.path.realpath(path.parent), read_best(workdir)
    if best is not None and path.name == str(best.step) and folder == os.path.realpath(workdir / BEST):
        text = best.text(evaluated) + (f"; the last is {left}" if left else "")
        return chosen(text, on_test=best.images == "test")
    imported = imported_from(workdir)
    if imported is not None:
        known: dict[str, Any] = {
            name: imported[name] for name in ("selection", "selected_on_test") if name in imported
        }
        return known or stated(select)
    newest = checkpoints.steps(workdir / CHECKPOINTS)[-1:]
    if [path.name] == [str(step) for step in newest] and folder == os.path.realpath(workdir / CHECKPOINTS):
        return chosen(", ".join(filter(None, ["last", left])))
    return chosen(f"named by hand: {path.name}")


def stated(select: str) -> dict[str, Any]:
    """Says how the checkpoint of a model was chosen whose training is not known, see :func:`how_chosen`.

    Args:
      select: 'last', which is also what is said if nothing is known, 'best' or 'best_on_test'.
    """
    if select == "last":
        return {}
    images = "test" if select == "best_on_test" else "held-out"
    return chosen(f"best on {images} images, as stated", on_test=images == "test")


def chosen(text: str, *, on_test: bool = False) -> dict[str, Any]:
    """Returns the entries of :func:`how_chosen`."""
    return {"selection": text, **({"selected_on_test": True} if on_test else {})}
