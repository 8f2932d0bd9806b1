"""TODO evaluation.findings."""

import math
import pathlib
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np

from robal_jax import builder, metrics
from robal_jax.attacks import LogitsFn, ThreatModel, autoattack
from robal_jax.devices import hosts
from robal_jax.evaluation.steps import CONDITIONS, Judged, check, shown_step
from robal_jax.evaluation.verdicts import Verdict, give_verdicts, stored_images
from robal_jax.evaluation.victim import Victim
from robal_jax.reporting.report import write_report
from robal_jax.reporting.terminal import evaluation_table, terminal
from robal_jax.storage.files import replacing
from robal_jax.storage.names import ADVERSARIAL, EXAMPLES, REPORT_HTML

GALLERY_IMAGES = 8


def pixels_of(victim: Victim) -> int:
    """Returns how many numbers an image has."""
    return math.prod(victim.images.shape[1:])


def recompute(victim: Victim, path: pathlib.Path, threat: ThreatModel) -> Judged:
    """What the model makes of the stored adversarial images, and of the clean ones where none is stored.

    Args:
      victim: the model.
      path: of ``adversarial.npz``: ``ids`` and ``images``.
      threat: of the evaluation.

    Returns:
      For all images ``[n]``.
    """

    def read() -> tuple[np.ndarray, np.ndarray]:
        with np.load(path) as file:
            return file["ids"], file["images"]

    ids, images = hosts.by_first(read)
    row = np.full(len(victim.labels), -1)
    row[ids] = np.arange(len(ids))
    step, judged = victim.compile(partial(shown_step, threat=threat)), []
    for batch in np.split(np.arange(len(row)), range(victim.size, len(row), victim.size)):
        shown = victim.floats(batch)
        shown[row[batch] >= 0] = images[row[batch][row[batch] >= 0]]
        judged.append(step(batch, shown))
    return jax.tree.map(lambda *batches: np.concatenate(batches), *judged)


def report(
    victim: Victim,
    job: builder.Evaluation,
    weights: Mapping[str, Any],
    outcomes: dict[str, np.ndarray],
    found: autoattack.Progress,
    measured: dict[str, dict[str, np.ndarray]],
    meta: dict,
    folder: pathlib.Path,
    say: Callable[[str], None],
) -> None:
    """Writes examples.npz, adversarial.npz, the summary, the tables and the figures, and prints the table."""
    labels = victim.labels
    predictions = {condition: outcomes[f"pred_{condition}"] for condition in CONDITIONS}
    if job.ensemble:
        predictions |= autoattack.outcomes(job.version, job.ensemble, found, labels)
    kept: dict[str, Any] = {k: values for k, values in outcomes.items() if k.startswith("distance_")}
    kept |= {f"pred_{name}": values for name, values in predictions.items()}
    kept |= {"labels": labels, "ids": np.arange(len(labels))}
    summary = metrics.summarize(labels, predictions, job.test.class_counts, groups=job.groups)
    parts = {
        "audit": _audit(victim, job, found, measured, predictions, folder),
        "norms": _norms(victim, job, weights["params"]),
        "gallery": _gallery(victim, job, found),
    }

    def write() -> None:
        with replacing(folder / EXAMPLES) as file:
            np.savez(file, **kept)
        write_report(folder, summary, meta, **parts)
        say(
            f"{meta['method']} on {meta['dataset']}"
            + (f", checkpoint {meta['checkpoint']}" if "checkpoint" in meta else "")
        )
        evaluation_table(summary, terminal())
        say(f"report {folder / REPORT_HTML}")

    hosts.by_first(write)


def _audit(
    victim: Victim,
    job: builder.Evaluation,
    found: autoattack.Progress,
    measured: dict[str, dict[str, np.ndarray]],
    predictions: Mapping[str, np.ndarray],
    folder: pathlib.Path,
) -> dict[str, Any] | None:
    """Stores the ensemble's images, looks at them again, and judges all that was measured."""
    found_again = _stored(victim, job, found, folder) if job.ensemble else None
    if not job.ensemble:  # what lies there is of an evaluation before this one
        hosts.by_first(partial((folder / ADVERSARIAL).unlink, missing_ok=True))
    if not measured:
        return (
            None
            if found_again is None
            else {"examples": 0, "verdicts": [found_again._asdict()], "curves": {}}
        )
    ids, labels = measured.pop("sample")["ids"], victim.labels
    survived = np.logical_and.reduce([predictions[name] == labels for name in CONDITIONS])
    by_square = np.zeros(len(labels), bool)
    for stage in job.ensemble:
        in_stage = (found.broken_in >= stage.first) & (found.broken_in <= stage.last)
        survived &= ~in_stage | (stage.name == "square")
        by_square |= in_stage & (stage.name == "square")
    if "square" not in [stage.name for stage in job.ensemble[1:]]:
        survived, by_square = survived[ids], ~measured["gradient_free"]["right"]
    verdicts, curves = give_verdicts(measured, labels[ids], survived, by_square)
    if found_again is not None:
        verdicts.append(found_again)
    return {"examples": len(ids), "verdicts": [verdict._asdict() for verdict in verdicts], "curves": curves}


def _stored(
    victim: Victim, job: builder.Evaluation, found: autoattack.Progress, folder: pathlib.Path
) -> Verdict:
    """Writes the ensemble's adversarial images, reads them, and computes the accuracy again."""
    path, ids = folder / ADVERSARIAL, np.array(sorted(found.adversarial), int)
    images = np.array([found.adversarial[number] for number in ids], np.float32).reshape(
        -1, *victim.images.shape[1:]
    )

    def write() -> None:
        with replacing(path) as file:
            kept = {"ids": ids, "images": images, "predictions": found.predictions[ids]}
            np.savez(file, **kept, epsilon=np.array(job.threat.epsilon))

    hosts.by_first(write)
    judged = recompute(victim, path, job.threat)
    check({f"{field}_stored": values for field, values in judged.items()}, job.threat, pixels_of(victim))
    return stored_images(
        found.predictions != victim.labels,
        judged["pred"] != victim.labels,
        judged["distance"],
        job.threat.epsilon,
    )


def _norms(victim: Victim, job: builder.Evaluation, params: Mapping[str, Any]) -> dict[str, Any] | None:
    """By class: norms of the classifier's weight vectors, where it has such; mean norms of the features."""

    def work(features: LogitsFn, keys: chex.PRNGKey, images: chex.Array, labels: chex.Array) -> chex.Array:
        del keys, labels
        return jnp.linalg.norm(features(images), axis=-1)

    if job.features is None:
        return None
    sizes = victim.compile(work, job.features)(np.arange(len(victim.labels)))
    weight = params.get("classifier", {}).get("weight")
    return {
        "features": [float(sizes[victim.labels == k].mean()) for k in range(len(job.test.class_counts))],
        "weights": None if weight is None else np.linalg.norm(weight, axis=-1).tolist(),
    }


def _gallery(victim: Victim, job: builder.Evaluation, found: autoattack.Progress) -> dict[str, Any] | None:
    """Some images that the ensemble broke, the first of each class, the rarest classes first."""
    ids = np.array(sorted(found.adversarial), int)
    _, first = np.unique(victim.labels[ids], return_index=True)
    rarest = np.argsort(job.test.class_counts[victim.labels[ids[first]]], kind="stable")
    ids = ids[first[rarest]][:GALLERY_IMAGES]
    if not len(ids):
        return None
    return {
        "images": victim.floats(ids),
        "adversarial": np.stack([found.adversarial[number] for number in ids]),
        "labels": victim.labels[ids],
        "predictions": found.predictions[ids],
        "condition": list(autoattack.outcomes(job.version, job.ensemble, found, victim.labels))[-1],
    }
