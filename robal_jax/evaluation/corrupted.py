"""The accuracy on corrupted images, beside that under attack."""

import dataclasses

import chex
import jax.numpy as jnp
import numpy as np

from robal_jax import builder, checks, metrics
from robal_jax.attacks import LogitsFn, autoattack
from robal_jax.data.corruptions import CORRUPTIONS, STRENGTHS, corrupt
from robal_jax.devices import hosts
from robal_jax.evaluation.additions import Addition
from robal_jax.evaluation.victim import Victim
from robal_jax.reporting.results import EvaluatedRun
from robal_jax.storage.names import CORRUPTED
from robal_jax.storage.progress import Meter
from robal_jax.storage.unfinished import Unfinished

Predictions = dict[str, np.ndarray]
"""Predicted classes by corruption, int32 ``[S, n]``, the weakest strength first."""


def corrupted(
    victim: Victim, job: builder.Evaluation, kept: Unfinished, stop: hosts.Stop
) -> Predictions | None:
    """Returns the predicted classes of all images under all corruptions; None if stopped before the end."""
    step, total = victim.compile(predicted, given=True), len(victim.labels)
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
    logits_fn: LogitsFn, keys: chex.PRNGKey, images: chex.Array, labels: chex.Array
) -> dict[str, chex.Array]:
    """Returns the predicted classes, and whether the logits are finite, both ``[B]``."""
    del keys, labels
    logits = checks.logits_of(len(images), logits_fn(images))
    return {"pred": jnp.argmax(logits, -1).astype(jnp.int32), "finite": jnp.isfinite(logits).all(-1)}


def with_corruptions(
    run: EvaluatedRun, found: Predictions, victim: Victim, job: builder.Evaluation
) -> EvaluatedRun:
    """Returns results with the summary of the predicted classes."""
    summary = metrics.summarize_corruptions(victim.labels, found, job.test.class_counts, groups=job.groups)
    return dataclasses.replace(run, summary={**run.summary, "corruptions": summary})


ADDITION = Addition(
    "corruptions", CORRUPTED, "the accuracies on corrupted images", corrupted, with_corruptions
)
