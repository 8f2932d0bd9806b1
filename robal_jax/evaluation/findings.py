"""From what the attacks found to the files of an evaluation: judged, stored, summarised, and then reported.

What is finished is written before what may fail: first the adversarial images, the outcomes and the results,
then the report, then the table on the terminal. A report is made of the stored files alone.
"""

import json
import pathlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np

from robal_jax import builder, distances, metrics
from robal_jax.attacks import LogitsFn, ThreatModel, autoattack
from robal_jax.devices import hosts
from robal_jax.errors import AGAIN, InputError, ReportError, one_line
from robal_jax.evaluation.ensemble_checks import doubt_ensemble, stored_images
from robal_jax.evaluation.evidence import LEVEL
from robal_jax.evaluation.explanations import ROUNDING
from robal_jax.evaluation.measurements import Sample, radius_unit
from robal_jax.evaluation.outcomes import Curve, Verdict, depends_on_batch, selected_on_test
from robal_jax.evaluation.steps import CONDITIONS, Judged, check, shown_step
from robal_jax.evaluation.verdicts import give_verdicts
from robal_jax.evaluation.victim import Victim
from robal_jax.reporting.budgets import at_common_radius
from robal_jax.reporting.report import remove_report, write_report
from robal_jax.reporting.results import (
    EvaluatedRun,
    Gallery,
    Outcomes,
    Results,
    read_arrays,
    read_run,
    to_arrays,
)
from robal_jax.reporting.terminal import evaluation_lines
from robal_jax.storage.files import replacing
from robal_jax.storage.names import (
    ADVERSARIAL,
    AUDIT,
    CERTIFIED,
    CORRUPTED,
    EXAMPLES,
    OPTIMALITY,
    REPORT_HTML,
    RESULTS,
)

GALLERY_IMAGES = 8

CURVE_FACTORS = (0.0, 0.25, 0.5, 1.0, 2.0, 4.0)
"""Radii of the accuracies that follow from distances, in multiples of the evaluation's largest radius."""


def store(
    victim: Victim,
    job: builder.Evaluation,
    weights: Mapping[str, Any],
    outcomes: Outcomes,
    found: autoattack.Progress,
    sample: Sample,
    meta: Mapping[str, Any],
    folder: pathlib.Path,
) -> None:
    """Judges what was found, and stores it; what an older evaluation left in the folder is removed.

    Args:
      victim: the model and the test images.
      job: what was evaluated, and how.
      weights: ``params`` and ``stats`` of the model.
      outcomes: of all test images, by condition; with a minimum-norm attack its distances under its name.
      found: what the ensemble found.
      sample: what the audit measured.
      meta: see :class:`Results`.
      folder: receives the files.
    """
    hosts.by_first(partial(_remove, folder))
    labels = victim.labels
    predictions = {condition: outcomes[condition]["pred"] for condition in CONDITIONS}
    if job.ensemble:
        predictions |= autoattack.outcomes(job.version, job.ensemble, found, labels)

    verdicts, curves = _judge(job, found, sample, predictions, labels)
    verdicts += _store(victim, job, found, folder, meta.get("precision", "highest"))
    if meta.get("depends_on_batch") and not sample.measured:  # otherwise the audit has looked
        verdicts.append(depends_on_batch(meta["depends_on_batch"]))
    if meta.get("selected_on_test"):
        verdicts.append(selected_on_test(meta["selection"]))

    results = Results(
        meta,
        summary=_summary(job, labels, predictions),
        audit=_audit(sample, verdicts, curves),
        norms=_norms(victim, job, weights["params"]),
        distances=_distances(job, labels, to_arrays(outcomes), predictions),
    )
    kept: Outcomes = {name: {"pred": values} for name, values in predictions.items()}
    for condition in CONDITIONS:
        kept[condition]["distance"] = outcomes[condition]["distance"]
    if job.minimum_norm:
        kept[job.minimum_norm] = outcomes[job.minimum_norm]
    arrays: dict[str, Any] = {"labels": labels, "ids": victim.ids, **to_arrays(kept)}

    def write() -> None:
        with replacing(folder / EXAMPLES) as file:
            np.savez(file, **arrays)
        if curves:
            with replacing(folder / AUDIT) as file:
                tables: dict[str, Any] = {name: curve.table for name, curve in curves.items()}
                np.savez(file, ids=victim.ids[sample.ids], **tables)
        results.write(folder)

    hosts.by_first(write)


def _summary(
    job: builder.Evaluation, labels: np.ndarray, predictions: Mapping[str, np.ndarray]
) -> dict[str, Any]:
    """Summarises outcomes in the groups of classes that are asked for."""
    several = {} if list(job.protocols) == ["thirds"] else job.protocols
    counts = job.test.class_counts
    return metrics.summarize(labels, predictions, counts, groups=job.groups, protocols=several)


def _distances(
    job: builder.Evaluation,
    labels: np.ndarray,
    arrays: Mapping[str, np.ndarray],
    predictions: Mapping[str, np.ndarray],
) -> dict[str, Any] | None:
    """Returns the figures of the minimum-norm attack as :class:`Results` holds them; None without one."""
    if not job.minimum_norm:
        return None
    lengths, counts = arrays[f"distance_{job.minimum_norm}"], job.test.class_counts
    medians = distances.median_distances(labels, lengths, counts, groups=job.groups)
    radii = [float(factor * np.max(job.threat.epsilon)) for factor in CURVE_FACTORS]
    right = np.logical_and.reduce([predictions[name] == labels for name in predictions])
    return {
        "attack": job.minimum_norm,
        "found": int(np.isfinite(lengths).sum()),
        "missed": int(np.sum(right & (lengths <= job.threat.of(labels).epsilon))),
        "median": json.loads(json.dumps(medians), parse_constant=lambda _: None),  # infinity
        "curve": {"x": radii, "series": {job.minimum_norm: [metrics.share(lengths > x) for x in radii]}},
    }


def regroup(
    job: builder.Evaluation,
    about: Mapping[str, Any],
    beside: Sequence[pathlib.Path],
    folder: pathlib.Path,
    say: Callable[[str], None],
) -> None:
    """Summarises stored outcomes again if other groups of classes or names are asked for; attacks nothing.

    Args:
      job: what was evaluated, and the groups.
      about: values of :class:`Results` ``.meta``, of which those are taken that no attack depends on.
      beside: folders, of which one may have the evaluation at a common radius.
      folder: of the results; its report is removed if they change.
      say: receives messages for the user, line by line.
    """
    run = read_run(folder)
    predictions = {name: found for name, found in run.predictions.items() if name != "worst"}
    summary = _summary(job, run.examples["labels"], predictions)
    regrouped = any(
        summary.get(key) != run.summary.get(key) for key in ("class_counts", "groups", "protocols")
    )
    names = {name: about[name] for name in ("method", "dataset", "class_names") if name in about}
    if not regrouped and all(run.meta.get(name) == value for name, value in names.items()):
        return
    changed = (
        "the classes are divided into other groups"
        if regrouped
        else "the model or its classes have new names"
    )
    say(f"{changed}; no attack is run again")
    meta = {name: value for name, value in run.meta.items() if name != "common_epsilon"}
    meta |= names | {name: about[name] for name in ("config", "imbalance", "command") if about.get(name)}
    meta |= at_common_radius(beside, meta)
    remove_report(folder)
    lengths = _distances(job, run.examples["labels"], run.examples, predictions)
    Results(meta, summary, run.audit, run.norms, lengths).write(folder)


def _remove(folder: pathlib.Path) -> None:
    remove_report(folder)
    for name in (RESULTS, EXAMPLES, ADVERSARIAL, AUDIT, CORRUPTED, CERTIFIED, OPTIMALITY):
        (folder / name).unlink(missing_ok=True)


def is_stored(job: builder.Evaluation, folder: pathlib.Path, say: Callable[[str], None]) -> bool:
    """Returns whether a folder has all that :func:`store` writes, undamaged, and says what is not."""
    try:
        read_run(folder)
        if job.ensemble:
            read_adversarial(folder)
    except InputError as error:
        say(f"warning: {str(error).partition(';')[0]}; evaluating again")
        return False
    return True


def read_adversarial(folder: pathlib.Path) -> dict[str, np.ndarray]:
    """Reads ``adversarial.npz``: 'ids', 'images', 'predictions' and 'epsilon', a number or one per class.

    Raises:
      InputError: the file is missing or damaged.
    """
    return read_arrays(folder / ADVERSARIAL)


def publish(victim: Victim, folder: pathlib.Path, say: Callable[[str], None]) -> None:
    """Writes the report of stored results, if it is missing, and says what the table shows.

    Args:
      victim: the model and the test images.
      folder: of the results.
      say: receives messages for the user, line by line.

    Raises:
      ReportError: the report could not be written.
    """
    run, failure = read_run(folder), None
    if not (folder / REPORT_HTML).is_file():
        try:
            write_report(folder, run, gallery=_gallery(victim, run, folder))
        except Exception as error:  # fonts, disks, names
            failure = error
    checkpoint = run.meta.get("checkpoint")
    say(run.title + (f", checkpoint {checkpoint}" if checkpoint else ""))
    for line in evaluation_lines(run):
        say(line)
    if failure:
        raise ReportError(
            f"the results in {folder} are complete, but not the report ({one_line(failure)}); remove the "
            f"cause, and {AGAIN} to write it"
        ) from failure
    say(f"report {folder / REPORT_HTML}")


def _judge(
    job: builder.Evaluation,
    found: autoattack.Progress,
    sample: Sample,
    predictions: Mapping[str, np.ndarray],
    labels: np.ndarray,
) -> tuple[list[Verdict], dict[str, Curve]]:
    """Judges the measurements of the audit; returns the verdicts and the curves."""
    if not sample.measured:
        return [], {}
    survived, by_square = _after_gradients(job, found, sample, predictions, labels)
    by_bpda = _after_own_gradient(job, found, predictions, labels) if job.replaced else None
    unit = radius_unit(job.threat)
    verdicts, curves = give_verdicts(sample.measured, labels[sample.ids], survived, by_square, unit, by_bpda)
    if job.ensemble:
        clean, left = predictions["clean"] == labels, found.broken_in == autoattack.ROBUST
        verdicts = doubt_ensemble(verdicts, sample.measured, clean[sample.ids], left[sample.ids], LEVEL)
    return verdicts, curves


def _survive_fixed_steps(predictions: Mapping[str, np.ndarray], labels: np.ndarray) -> np.ndarray:
    """Returns which images are right when clean and under every attack with fixed steps."""
    return np.logical_and.reduce([predictions[name] == labels for name in CONDITIONS])


def _after_own_gradient(
    job: builder.Evaluation,
    found: autoattack.Progress,
    predictions: Mapping[str, np.ndarray],
    labels: np.ndarray,
) -> np.ndarray:
    """Returns which images that are right when clean BPDA breaks after the model's own gradient."""
    broken = np.zeros(len(labels), bool)
    for stage in job.ensemble:
        if stage.bpda:
            broken |= autoattack.broken_in(stage, found)
    return (broken & _survive_fixed_steps(predictions, labels))[predictions["clean"] == labels]


def _after_gradients(
    job: builder.Evaluation,
    found: autoattack.Progress,
    sample: Sample,
    predictions: Mapping[str, np.ndarray],
    labels: np.ndarray,
) -> tuple[np.ndarray, np.ndarray | None]:
    """Returns which images that are right when clean survive the gradient attacks, and which Square breaks.

    Square is that of the ensemble, after the gradient attacks before it, or without one the audit's on its
    sample, after all. It is None if it does not follow strong ones: there are none, or some of AutoAttack's
    come later, and might have broken the same images. Nobody knows whether an attack of the user's own
    follows a gradient: after these it changes nothing here, and before one of them it is None.
    """
    ensemble = [stage for stage in job.ensemble if not stage.own]
    survived = _survive_fixed_steps(predictions, labels)
    by_square = np.zeros(len(labels), bool)
    names = [stage.name for stage in ensemble]
    squares = [place for place, name in enumerate(names) if name in autoattack.SQUARES]
    last = squares[-1] if squares else len(names)
    judged = ensemble[: last + 1]
    for stage in judged:
        in_stage = autoattack.broken_in(stage, found)
        survived &= ~in_stage | (stage.name in autoattack.SQUARES)
        by_square |= in_stage & (stage.name in autoattack.SQUARES)
    clean = predictions["clean"] == labels
    if not squares:
        by_square[sample.ids] = ~sample.measured["gradient_free"]["right"]
        clean &= np.isin(np.arange(len(labels)), sample.ids)
    before, later = {*names[:last]}, any(not stage.bpda for stage in ensemble[last + 1 :])
    strong = before >= {*autoattack.VERSIONS["standard"]} - {*autoattack.SQUARES} or not later
    strong &= judged == [*job.ensemble[: len(judged)]]
    return survived[clean], by_square[clean] if strong and before - {*autoattack.SQUARES} else None


def _store(
    victim: Victim, job: builder.Evaluation, found: autoattack.Progress, folder: pathlib.Path, precision: str
) -> list[Verdict]:
    """Stores the ensemble's adversarial images, reads them again and judges whether the accuracy is the same.

    Without an ensemble there is nothing to judge.
    """
    path = folder / ADVERSARIAL
    if not job.ensemble:
        return []
    ids = np.array(sorted(found.adversarial), int)
    images = np.array([found.adversarial[index] for index in ids], np.float32)
    images = images.reshape(-1, *victim.images.shape[1:])

    def write() -> None:
        with replacing(path) as file:
            kept = {"ids": victim.ids[ids], "images": images, "predictions": found.predictions[ids]}
            np.savez(file, **kept, epsilon=np.array(job.threat.epsilon))

    hosts.by_first(write)
    judged, threat = recompute(victim, path, job.threat), job.threat.of(victim.labels)
    check("stored", judged, threat, victim.pixels)
    reported, computed = found.predictions != victim.labels, judged["pred"] != victim.labels
    distance = judged["distance"]
    if isinstance(job.threat.epsilon, tuple):  # in multiples of each image's own radius
        distance = distance / np.asarray(threat.epsilon)
    ties = judged["margin"] <= ROUNDING.get(precision, ROUNDING["default"])
    return [stored_images(reported, computed, ties, distance, radius_unit(job.threat))]


def recompute(victim: Victim, path: pathlib.Path, threat: ThreatModel) -> Judged:
    """Returns how the model classifies all test images, each by its stored adversarial image if there is one.

    Args:
      victim: the model and the test images.
      path: of ``adversarial.npz``: ``ids``, some of the victim's, and ``images``.
      threat: of the evaluation.
    """

    def read() -> tuple[np.ndarray, np.ndarray]:
        with np.load(path) as file:
            return file["ids"], file["images"]

    ids, images = hosts.by_first(read)
    row = np.full(len(victim.labels), -1)
    row[np.searchsorted(victim.ids, ids)] = np.arange(len(ids))
    step, judged = victim.compile(partial(shown_step, threat=threat)), []
    for batch in np.split(np.arange(len(row)), range(victim.size, len(row), victim.size)):
        shown = victim.floats(batch)
        shown[row[batch] >= 0] = images[row[batch][row[batch] >= 0]]
        judged.append(step(batch, shown))
    return jax.tree.map(lambda *batches: np.concatenate(batches), *judged)


def _audit(sample: Sample, verdicts: list[Verdict], curves: Mapping[str, Curve]) -> dict[str, Any] | None:
    """Returns the audit as :class:`Results` holds it."""
    if not verdicts:
        return None
    return {
        "examples": len(sample.ids),
        "verdicts": [verdict._asdict() for verdict in verdicts],
        "curves": {name: curve.figures for name, curve in curves.items()},
    }


def _norms(victim: Victim, job: builder.Evaluation, params: Mapping[str, Any]) -> dict[str, Any] | None:
    """Returns the norms of the classifier's weight vectors, if it has any, and of the features, by class."""

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


def _gallery(victim: Victim, run: EvaluatedRun, folder: pathlib.Path) -> Gallery | None:
    """Returns some images that the ensemble broke: the first of each class, the rarest classes first."""
    if not (folder / ADVERSARIAL).is_file():
        return None
    stored = read_adversarial(folder)
    ids = np.flatnonzero(np.isin(run.examples["ids"], stored["ids"]))
    _, first = np.unique(victim.labels[ids], return_index=True)
    counts = np.asarray(run.summary["class_counts"])
    rarest = first[np.argsort(counts[victim.labels[ids[first]]], kind="stable")][:GALLERY_IMAGES]
    if not len(rarest):
        return None
    return Gallery(
        images=victim.floats(ids[rarest]),
        adversarial=stored["images"][rarest],
        labels=victim.labels[ids[rarest]],
        predictions=stored["predictions"][rarest],
        condition=list(run.conditions)[-2],  # the ensemble; 'worst' is last
    )
