"""Figures on which no outcome under attack depends, added to results that are stored already.

The results may come from this call or from an earlier one. What was found for each image is kept in a file of
its own, so that other groups of classes need no new computation.
"""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from robal_jax import builder
from robal_jax.devices import hosts
from robal_jax.errors import InputError
from robal_jax.evaluation.victim import Victim
from robal_jax.reporting.report import remove_report
from robal_jax.reporting.results import EvaluatedRun, read_arrays, read_run
from robal_jax.storage.files import replacing
from robal_jax.storage.unfinished import Unfinished

Arrays = dict[str, np.ndarray]


class Addition(NamedTuple):
    """Figures that are added to stored results.

    Attributes:
      name: of the part of an evaluation, one of ``storage.unfinished.PARTS``, and of the field of
        :class:`builder.Evaluation` that asks for it.
      file: holds what was found for every image.
      what: the figures, for people.
      make: ``(victim, job, kept, stop)`` to what was found for every image; None if stopped before the end.
      summarise: ``(run, found, victim, job)`` to the results with the figures.
    """

    name: str
    file: str
    what: str
    make: Callable[[Victim, builder.Evaluation, Unfinished, hosts.Stop], Arrays | None]
    summarise: Callable[[EvaluatedRun, Arrays, Victim, builder.Evaluation], EvaluatedRun]


def add(
    addition: Addition,
    victim: Victim,
    job: builder.Evaluation,
    about: Mapping[str, Any],
    folder: pathlib.Path,
    kept: Unfinished,
    stop: hosts.Stop,
    say: Callable[[str], None],
) -> bool:
    """Adds figures to stored results, if they are asked for or were before.

    Args:
      addition: the figures.
      victim: the model and the test images.
      job: what is evaluated, and how.
      about: values of :class:`Results` ``.meta``, of which the config and the command are taken.
      folder: of the results; their report is removed if they change.
      kept: the state of an interrupted call.
      stop: whether to stop at the next safe moment.
      say: receives messages for the user, line by line.

    Returns:
      Whether it is done; if not, it was stopped.
    """
    asked = bool(getattr(job, addition.name))
    found = hosts.by_first(lambda: _stored(addition, asked, folder, say))
    if found is None:
        if not asked:
            return True
        found = addition.make(victim, job, kept, stop)
        if found is None:
            return False
        hosts.by_first(lambda: _store(found, victim, folder / addition.file))
    hosts.by_first(
        lambda: _summarise(addition, found, victim, job, {**about, "seconds": kept.seconds}, folder)
    )
    return True


def _stored(
    addition: Addition, asked: bool, folder: pathlib.Path, say: Callable[[str], None]
) -> Arrays | None:
    """Reads what a folder has; None if there is nothing, or if the file is damaged."""
    path = folder / addition.file
    if not path.is_file():
        return None
    try:
        arrays = read_arrays(path)
        return {name: arrays[name] for name in arrays if name not in ("labels", "ids")}
    except InputError as error:
        then = "are made again" if asked else "are missing after a change until you ask for them again"
        say(f"warning: {str(error).partition(';')[0]}; {addition.what} {then}")
        return None


def _store(found: Arrays, victim: Victim, path: pathlib.Path) -> None:
    arrays: dict[str, Any] = {"labels": victim.labels, "ids": victim.ids, **found}
    with replacing(path) as file:
        np.savez(file, **arrays)


def _summarise(
    addition: Addition,
    found: Arrays,
    victim: Victim,
    job: builder.Evaluation,
    about: Mapping[str, Any],
    folder: pathlib.Path,
) -> None:
    """Adds the summary to the results, unless they have it."""
    run = read_run(folder)
    whole = addition.summarise(run, found, victim, job)
    if (whole.summary, whole.audit) == (run.summary, run.audit):
        return
    remove_report(folder)
    changed = {name: about[name] for name in ("config", "command") if about.get(name)}
    seconds = run.meta.get("seconds", 0.0) + about["seconds"]
    dataclasses.replace(whole, meta={**run.meta, **changed, "seconds": seconds}).write(folder)
