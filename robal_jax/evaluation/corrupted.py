"""The accuracy on corrupted images, beside that under attack.

It depends on no attack, so it is added to results that are stored already: of this call, or of an evaluation
that was finished long ago. The predicted classes of all images are kept in a file of their own.
"""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import chex
import jax.numpy as jnp
import numpy as np

from robal_jax import builder, checks, metrics
from robal_jax.attacks import LogitsFn, autoattack
from robal_jax.data.corruptions import CORRUPTIONS, STRENGTHS, corrupt
from robal_jax.devices import hosts
from robal_jax.errors import InputError
from robal_jax.evaluation.victim import Victim
from robal_jax.reporting.report import remove_report
from robal_jax.reporting.results import Results, read_arrays
from robal_jax.storage.files import replacing
from robal_jax.storage.names import CORRUPTED
from robal_jax.storage.progress import Meter
from robal_jax.storage.unfinished import Unfinished

Predictions = dict[str, np.ndarray]
"""Predicted classes by corruption, int32 ``[S, n]``, the weakest strength first."""


def add_corruptions(
    victim: Victim,
    job: builder.Evaluation,
    about: Mapping[str, Any],
    folder: pathlib.Path,
    kept: Unfinished,
    stop: hosts.Stop,
    say: Callable[[str], None],
) -> bool:
    """Adds the accuracies on corrupted images to stored results, if they are asked for or were before.

    Args:
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
    found = hosts.by_first(lambda: _stored(folder, say))
    if found is None:
        if not job.corruptions:
            return True
        found = corrupted(victim, job, kept, stop)
        if found is None:
            return False
        hosts.by_first(lambda: _store(found, victim, folder))
    hosts.by_first(lambda: _summarise(found, victim, job, {**about, "seconds": kept.seconds}, folder))
    return True


def corrupted(
    victim: Victim, job: builder.Evaluation, kept: Unfinished, stop: hosts.Stop
) -> Predictions | None:
    """Returns the predicted classes of all images under all corruptions; None if stopped before the end."""
    step, total = victim.compile(predicted), len(victim.labels)
    found = {name: kept.arrays.get(name, np.empty((len(STRENGTHS), 0), np.int32)) for name in CORRUPTIONS}
    done = len(found[next(iter(found))][0])
    with hosts.only_first(lambda: Meter("corruptions", total, done)) as meter:
        while done < total and not stop:
            ids = np.arange(done, min(done + victim.size, total))
            clean = victim.floats(ids)
            for name in CORRUPTIONS:
                judged = [
                    step(ids, corrupt(clean, name, strength, job.seed, victim.ids[ids]))
                    for strength in STRENGTHS
                ]
                autoattack.require_finite(np.concatenate([one["finite"] for one in judged]), name)
                found[name] = np.concatenate([found[name], np.stack([one["pred"] for one in judged])], 1)
            done += len(ids)
            right = np.mean([rows == victim.labels[:done] for rows in found.values()])
            meter.update(done, f"mean accuracy {right:.1%}")
            if stop or done == total or kept.due:
                kept.save(found)
    return found if done == total else None


def predicted(
    logits_fn: LogitsFn, keys: chex.PRNGKey, images: chex.Array, labels: chex.Array, shown: chex.Array
) -> dict[str, chex.Array]:
    """Returns the classes of images shown in place of these, and whether their logits are finite, ``[B]``."""
    del keys, images, labels
    logits = checks.logits_of(len(shown), logits_fn(shown))
    return {"pred": jnp.argmax(logits, -1).astype(jnp.int32), "finite": jnp.isfinite(logits).all(-1)}


def _stored(folder: pathlib.Path, say: Callable[[str], None]) -> Predictions | None:
    """Reads the predicted classes that a folder has; None if there are none, or if the file is damaged."""
    if not (folder / CORRUPTED).is_file():
        return None
    try:
        arrays = read_arrays(folder / CORRUPTED)
        return {name: arrays[name] for name in arrays if name not in ("labels", "ids")}
    except InputError as error:
        say(f"warning: {str(error).partition(';')[0]}; the accuracies on corrupted images are made again")
        return None


def _store(found: Predictions, victim: Victim, folder: pathlib.Path) -> None:
    arrays: dict[str, Any] = {"labels": victim.labels, "ids": victim.ids, **found}
    with replacing(folder / CORRUPTED) as file:
        np.savez(file, **arrays)


def _summarise(
    found: Predictions,
    victim: Victim,
    job: builder.Evaluation,
    about: Mapping[str, Any],
    folder: pathlib.Path,
) -> None:
    """Adds the summary of the predicted classes to the results, unless they have it."""
    results = Results.read(folder)
    summary = metrics.summarize_corruptions(victim.labels, found, job.test.class_counts, groups=job.groups)
    if results.corruptions == summary:
        return
    remove_report(folder)
    changed = {name: about[name] for name in ("config", "command") if about.get(name)}
    seconds = results.meta.get("seconds", 0.0) + about["seconds"]
    meta = {**results.meta, **changed, "seconds": seconds}
    whole = {**results.summary, "corruptions": summary}
    dataclasses.replace(results, meta=meta, summary=whole).write(folder)
