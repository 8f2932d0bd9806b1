"""The loop of an evaluation, which saves what it has found and resumes from it.

1. The attacks of RoBal's tables with fixed steps (``steps.py``): FGSM, PGD-20 (also after 5 and 10 steps),
   MIM-20 and CW-20, at the config's logit scale and prior adjustment.
2. An ensemble: AutoAttack or a part of it (``attacks/autoattack.py``).
3. The distances of the closest adversarial images, if they are asked for (``attacks/minimum_norm.py``).
4. The audit of these attacks on a sample (``measurements.py``).
5. Verdicts and results (``findings.py``).
6. If asked for, the accuracy on corrupted images (``corrupted.py``), the certified accuracy
   (``certifying.py``) and a comparison of the attacks (``optimality.py``); then the report.

The noise of an image depends only on the seed and its number in the whole test set, so batch size, number of
devices and the choice of a part change nothing; except that in the ensemble 'fast', whether its last attack
runs depends on all images together. The outcome of every image is kept, and every adversarial image of the
ensemble; the accuracy under the ensemble is computed again from these images before it is reported.
"""

import datetime
import json
import math
import pathlib
import shutil
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from robal_jax import builder, metrics
from robal_jax.attacks import autoattack
from robal_jax.devices import hosts
from robal_jax.errors import InputError
from robal_jax.evaluation import certifying, corrupted, optimality
from robal_jax.evaluation.additions import add
from robal_jax.evaluation.findings import is_stored, publish, regroup, store
from robal_jax.evaluation.measurements import (
    Measured,
    Sample,
    outputs,
    plan_measurements,
    sample_ids,
    without_bound,
)
from robal_jax.evaluation.own_attacks import check_own_attacks
from robal_jax.evaluation.steps import CONDITIONS, attack_step, check, closest_step, eval_step
from robal_jax.evaluation.victim import Victim
from robal_jax.reporting import report
from robal_jax.reporting.budgets import at_common_radius
from robal_jax.reporting.names import display_name
from robal_jax.reporting.results import Outcomes, from_arrays, to_arrays
from robal_jax.storage import buckets, mirror
from robal_jax.storage.best import default_checkpoint, how_chosen
from robal_jax.storage.claims import check_evaluation
from robal_jax.storage.config_file import read_config, to_json
from robal_jax.storage.evaluated import belongs
from robal_jax.storage.lock import alone_in
from robal_jax.storage.names import EVALUATION, RESULTS, UNFINISHED
from robal_jax.storage.progress import Meter, judged_course, training_curve
from robal_jax.storage.unfinished import PARTS, Unfinished
from robal_jax.storage.user_code import code_of, warn_if_changed
from robal_jax.storage.workdir import (
    check_same_data,
    check_same_model,
    class_counts_in_training,
    digest_of_images,
    origin_of,
    restore_weights,
    unfinished,
    versions,
)

MAIN_ATTACK = "pgd_20"
"""The condition whose accuracy counts if no ensemble is evaluated."""

SAME_MODEL = "the surrogate is the model under attack; name another run or model as surrogate"

# Models whose logits for so many images differ by no more than this part of the largest are the same model.
SAME_IMAGES, SAME_LOGITS = 16, 1e-5


def evaluate(
    config: ConfigDict,
    workdir: str | pathlib.Path,
    *,
    checkpoint: str | pathlib.Path | None = None,
    folder: str | pathlib.Path | None = None,
    command: str = "",
    say: Callable[[str], None] = print,
) -> pathlib.Path:
    """Evaluates a checkpoint on the test set, or a part of it, and writes the report; resumes if interrupted.

    Args:
      config: of the run, with the evaluation's settings.
      workdir: of the run, or its URL, see ``storage.buckets``.
      checkpoint: folder of one checkpoint; if None, the one that the config selects: the newest undamaged one
        or the best.
      folder: receives the results, or its URL; ``workdir/evaluation`` if None.
      command: the command line, for the report.
      say: receives messages for the user, line by line.

    Returns:
      The folder of the results; with a URL the copy on this machine.

    Raises:
      InputError: config, data, checkpoint or folder cannot be used, or are not those of the run; or the
        folder has another evaluation.
      ReportError: the results are stored, but the report could not be written; the same call writes it.
    """
    say = hosts.speaker(say)
    chosen = None if checkpoint is None else buckets.inside(checkpoint, workdir)
    workdir = buckets.fetched(workdir)
    folder = workdir / EVALUATION if folder is None else folder
    with hosts.stop_signals() as stop, mirror.kept(folder, buckets.naming(say), stop.ask) as (place, speak):
        check_same_model(config, workdir)
        job = builder.evaluation(config, class_counts_in_training(workdir))
        check_same_data(job.data_sha256, workdir, say)
        code = code_of(config, "evaluation")
        changed = warn_if_changed(config, workdir, say)
        for line in job.test.notes:
            say(line)
        chosen = default_checkpoint(workdir, job.select) if chosen is None else chosen
        weights, path, sha256 = restore_weights(workdir, chosen, job.variables, say, job.weights)
        for doubt in builder.evaluation_doubts(config):
            say(f"warning: {doubt}")
        surrogate, of_surrogate, its_change = _surrogate(config, job, sha256, say)
        changed = "; ".join(filter(None, [changed, its_change]))
        hosts.check_agreement("the config", to_json(config))
        how = how_chosen(workdir, path, job.select, job.judged)
        if (left := unfinished(workdir)) and left in how.get("selection", ""):
            say(f"warning: the run is at {left}; run the command of the training again to finish it")
        curve = training_curve(workdir, last=int(path.name) if path.name.isdigit() else math.inf)
        about = {
            "checkpoint": buckets.shown(path),
            "checkpoint_sha256": sha256,
            **of_surrogate,
            **code,
            **({"code": changed} if changed else {}),
            **({"origin": origin} if (origin := origin_of(workdir)) else {}),
            **how,
            "training": curve,
            **({"judged": course} if (course := judged_course(workdir)) else {}),
        }
        identity = {
            "config": json.loads(to_json(config)),
            "checkpoint_sha256": sha256,
            **of_surrogate,
            **code,
        }
        by_class = isinstance(job.threat.epsilon, tuple)
        beside = hosts.by_first(lambda: sorted(workdir.glob(f"{EVALUATION}*"))) if by_class else ()
        subject = Subject(job, weights, surrogate, identity, about, beside)
        done = attack_and_report(subject, place, command, stop, speak)
    if not done:
        say(f"stopped; the same command resumes from {buckets.shown(place / UNFINISHED)}")
    return place


class Subject(NamedTuple):
    """A model under evaluation.

    Attributes:
      job: what is evaluated, and how.
      weights: ``params`` and ``stats`` of the model.
      surrogate: another model, for the audit's attack by transfer; None for none.
      identity: JSON values that tell this evaluation from others, beside the test set.
      about: what the report says in addition to ``job.about``.
      beside: if it has radii by class: folders, of which one may have the evaluation at a common radius.
    """

    job: builder.Evaluation
    weights: Mapping[str, Any]
    surrogate: Victim | None
    identity: Mapping[str, Any]
    about: Mapping[str, Any]
    beside: Sequence[pathlib.Path] = ()


def attack_and_report(
    subject: Subject, folder: pathlib.Path, command: str, stop: hosts.Stop, say: Callable[[str], None]
) -> bool:
    """Runs all attacks and the audit on a model, and writes the report; resumes an interrupted evaluation.

    Args:
      subject: the model, and how it is evaluated.
      folder: receives the results.
      command: the command line, for the report.
      stop: whether to stop at the next safe moment.
      say: receives messages for the user, line by line.

    Returns:
      Whether the evaluation is finished; if not, it was stopped, and the same call resumes it.

    Raises:
      InputError: another process works in the folder, or it has another evaluation or other files; or an
        attack of the user's own breaks its contract, or leaves the threat model.
      ReportError: the results are stored, but the report could not be written.
    """
    job = subject.job
    hosts.by_first(partial(check_evaluation, folder, report.FILES))
    victim = as_victim(job, subject.weights)
    certifying.check_certifiable(victim, job)
    optimality.check_comparable(job)
    check_own_attacks(job, subject.weights)
    if subject.surrogate is not None:
        _refuse_itself(victim, subject.surrogate)
    test_set = digest_of_images(job.test.images, job.test.labels)
    hosts.check_agreement("the test set", test_set)
    identity = {**subject.identity, "test_set_sha256": test_set}
    for line in metrics.absent_groups(job.protocols):
        say(line)
    about = {**job.about, **subject.about, "command": command}
    with hosts.held_by_first(partial(alone_in, folder, on_loss=partial(hosts.lost, say, stop))):
        if hosts.by_first(lambda: belongs(folder, identity) and is_stored(job, folder, say)):
            say(f"{folder} has this evaluation; remove {folder / RESULTS} to repeat it")
            hosts.by_first(partial(regroup, job, about, subject.beside, folder, say))
        elif not _attack_and_store(subject._replace(identity=identity), victim, folder, command, stop):
            return False
        for addition in (corrupted.ADDITION, certifying.ADDITION, optimality.ADDITION):
            kept = Unfinished(folder / UNFINISHED / f"{addition.name}.npz", identity)
            if not add(addition, victim, job, about, folder, kept, stop, say):
                return False
        hosts.by_first(partial(shutil.rmtree, folder / UNFINISHED, ignore_errors=True))
        hosts.by_first(partial(publish, victim, folder, say))
    return True


def _attack_and_store(
    subject: Subject, victim: Victim, folder: pathlib.Path, command: str, stop: hosts.Stop
) -> bool:
    """Runs all attacks and the audit, and stores the results; returns whether it was not stopped."""
    job = subject.job
    parts: list[Unfinished] = []

    def part(name: str) -> Unfinished:
        parts.append(Unfinished(folder / UNFINISHED / f"{name}.npz", subject.identity))
        return parts[-1]

    first, second, third, fourth, *_ = PARTS
    outcomes = conditions(victim, job, part(first), stop)
    found = None if outcomes is None else ensemble(victim, job, outcomes, part(second), stop)
    lengths = None if found is None else distances(victim, job, part(third), stop)
    sample = None if lengths is None else audited(victim, job, subject.surrogate, part(fourth), stop)
    if outcomes is None or found is None or lengths is None or sample is None:
        return False
    made_with = versions()
    meta = {
        **job.about,
        **subject.about,
        "test_set_sha256": subject.identity["test_set_sha256"],
        "n": len(victim.labels),
        "main_attack": MAIN_ATTACK,
        "commit": made_with.pop("commit", None),
        "device": made_with.pop("device"),
        "processor": made_with.pop("processor"),
        "versions": made_with,
        "date": datetime.date.today().isoformat(),
        "seconds": sum(part.seconds for part in parts),
        "command": command,
        "stages": autoattack.robust_after(job.ensemble, found),
    }
    if subject.beside:
        meta |= hosts.by_first(partial(at_common_radius, subject.beside, meta))
    if job.minimum_norm:
        outcomes[job.minimum_norm] = {"distance": lengths}
    store(victim, job, subject.weights, outcomes, found, sample, meta, folder)
    return True


def as_victim(job: builder.Evaluation, weights: Mapping[str, Any]) -> Victim:
    """Puts a model and its test images on the devices."""
    return Victim(
        job.predict,
        weights["params"],
        weights["stats"],
        job.test.images,
        job.test.labels,
        ids=job.ids,
        pixel_max=job.test.pixel_max,
        seed=job.seed,
        batch_size=job.batch_size,
        layout=job.layout,
    )


def _refuse_itself(victim: Victim, surrogate: Victim) -> None:
    """Refuses a surrogate that gives the victim's logits.

    Raises:
      InputError: it does.
    """
    ids = np.arange(min(len(victim.labels), SAME_IMAGES))
    mine, its = (model.compile(outputs)(ids)["logits"] for model in (victim, surrogate))
    if mine.shape == its.shape and np.abs(mine - its).max() <= SAME_LOGITS * np.abs(mine).max():
        raise InputError(SAME_MODEL)


def _surrogate(
    config: ConfigDict, job: builder.Evaluation, sha256: str, say: Callable[[str], None]
) -> tuple[Victim | None, dict[str, Any], str]:
    """Restores the checkpoint of the run that the config names, with that run's own config.

    Args:
      config: of the evaluation.
      job: the evaluation.
      sha256: of the weights under attack.
      say: receives messages for the user, line by line.

    Returns:
      The model; 'surrogate_sha256', of its checkpoint, and 'surrogate_code_sha256', if it has code of the
      user's own; and how that has changed. None, {} and '' without a surrogate.

    Raises:
      InputError: its test images are others, or its weights are those under attack.
    """
    if not job.surrogate:
        return None, {}, ""
    workdir = buckets.fetched(job.surrogate)
    own = builder.without_ensemble(builder.with_part_of(read_config(workdir), config))
    other = builder.evaluation(own, class_counts_in_training(workdir))
    if digest_of_images(*other.test[:2]) != digest_of_images(*job.test[:2]):
        raise InputError(f"surrogate {workdir} has different test images; name a run on the same data")
    changed, code = warn_if_changed(own, workdir, say), code_of(own, "model")
    checkpoint = default_checkpoint(workdir, other.select)
    restored = restore_weights(workdir, checkpoint, other.variables, say, other.weights)
    if restored.sha256 == sha256:
        raise InputError(SAME_MODEL)
    about = {"surrogate_sha256": restored.sha256, **{f"surrogate_{key}": code[key] for key in code}}
    return as_victim(other, restored.tree), about, changed


def conditions(
    victim: Victim, job: builder.Evaluation, kept: Unfinished, stop: hosts.Stop
) -> Outcomes | None:
    """Returns the outcomes of all images under each of ``CONDITIONS``; None if stopped before the end."""
    labels, total = victim.labels, len(victim.labels)
    step = victim.compile(partial(eval_step, threat=job.threat, step_size=job.step_size))
    outcomes = from_arrays(kept.arrays)
    done = len(outcomes["clean"]["pred"]) if outcomes else 0
    with hosts.only_first(lambda: Meter("evaluate", total, done)) as meter:
        while done < total and not stop:
            judged = step(np.arange(done, min(done + victim.size, total)))
            for condition in CONDITIONS:  # jit returns dictionaries in the order of their keys
                fields = outcomes.setdefault(condition, {})
                for field, values in judged[condition].items():
                    fields[field] = np.concatenate([fields.get(field, values[:0]), values])
            done = len(outcomes["clean"]["pred"])
            right = np.mean(outcomes[MAIN_ATTACK]["pred"] == labels[:done])
            meter.update(done, f"{display_name(MAIN_ATTACK)} accuracy {right:.1%}")
            if stop or done == total or kept.due:
                kept.save(to_arrays(outcomes))
    if done < total:
        return None
    for condition in CONDITIONS:
        check(condition, outcomes[condition], job.threat.of(labels), victim.pixels)
    return outcomes


def ensemble(
    victim: Victim,
    job: builder.Evaluation,
    outcomes: Outcomes,
    kept: Unfinished,
    stop: hosts.Stop,
) -> autoattack.Progress | None:
    """Returns what the ensemble of attacks found; None if stopped before the end."""
    labels, progress = victim.labels, _read_progress(kept.arrays)
    if progress is None:
        progress = autoattack.begin(labels, outcomes["clean"]["pred"])
    for stage in job.ensemble:
        if not autoattack.wanted(stage, progress):
            continue
        work = partial(attack_step, stage=stage, threat=job.threat, random=job.version == "rand")
        step = victim.compile(work, job.replaced if stage.bpda else None)

        def attack(ids: np.ndarray, number: int, step: Callable = step, name: str = stage.name) -> Any:
            found = step(ids, number=np.int32(number))
            check(name, found, job.threat.of(labels[ids]), victim.pixels)
            return found["images"], found["pred"]

        total = stage.rounds * int(np.sum(~autoattack.broken_by(progress, stage.first - 1)))
        done = total - autoattack.work_left(stage, progress)
        with hosts.only_first(partial(Meter, stage.name, total, done)) as meter:
            for _ in autoattack.run(stage, attack, labels, progress, size=victim.size):
                left = autoattack.work_left(stage, progress)
                meter.update(total - left, f"robust {progress.robust / len(labels):.1%}")
                if stop or kept.due:
                    kept.save(partial(_progress_arrays, progress))
                if stop:
                    return None
    kept.save(partial(_progress_arrays, progress))
    return progress


def distances(
    victim: Victim, job: builder.Evaluation, kept: Unfinished, stop: hosts.Stop
) -> np.ndarray | None:
    """Returns the distances of the closest adversarial images ``[n]``; None if stopped before the end.

    A distance is 0 where the clean image is misclassified, and infinite where no adversarial image was found.
    With BPDA it is the shorter of two, found with and without. Without a minimum-norm attack there are none.
    """
    labels, total, name = victim.labels, len(victim.labels), job.minimum_norm
    found = kept.arrays.get("distance", np.zeros(0, np.float32))
    if not name:
        return found
    work = partial(closest_step, name=name, threat=job.threat)
    forms = [None] if job.replaced is None else [None, job.replaced]
    steps = [victim.compile(work, predict) for predict in forms]
    farthest = without_bound(job.threat, victim.pixels)
    with hosts.only_first(lambda: Meter(name, total, len(found))) as meter:
        while len(found) < total and not stop:
            ids = np.arange(len(found), min(len(found) + victim.size, total))
            each = [step(ids) for step in steps]
            for judged in each:
                check(name, judged, farthest, victim.pixels)
            lengths = [np.where(judged["pred"] == labels[ids], np.inf, judged["distance"]) for judged in each]
            found = np.concatenate([found, np.min(lengths, axis=0).astype(np.float32)])
            meter.update(len(found), f"median distance {np.median(found):.3g}")
            if stop or len(found) == total or kept.due:
                kept.save({"distance": found})
    return found if len(found) == total else None


def _progress_arrays(progress: autoattack.Progress) -> dict[str, Any]:
    ids = sorted(progress.adversarial)
    return {
        "broken_in": progress.broken_in,
        "predictions": progress.predictions,
        "round": np.array(progress.round),
        "done": np.array(progress.done),
        "ids": np.array(ids, int),
        "images": np.array([progress.adversarial[image] for image in ids], np.float32),
    }


def _read_progress(arrays: Mapping[str, np.ndarray]) -> autoattack.Progress | None:
    if not arrays:
        return None
    adversarial = {int(number): image for number, image in zip(arrays["ids"], arrays["images"], strict=True)}
    counts = int(arrays["round"]), int(arrays["done"])
    return autoattack.Progress(arrays["broken_in"], arrays["predictions"], adversarial, *counts)


def audited(
    victim: Victim, job: builder.Evaluation, surrogate: Victim | None, kept: Unfinished, stop: hosts.Stop
) -> Sample | None:
    """Returns the audit's measurements on a sample; None if stopped before the end."""
    if not job.audit_examples:
        return Sample(np.arange(0), {})
    ids = sample_ids(len(victim.labels), job.audit_examples, job.seed)
    plans = plan_measurements(victim, ids, threat=job.threat, step_size=job.step_size, surrogate=surrogate)
    measured = _read_measured(kept.arrays)
    with hosts.only_first(lambda: Meter("audit", len(plans), len(measured))) as meter:
        for name, measure in plans.items():
            if name not in measured:
                measured[name] = measure()
                meter.update(len(measured), name)
            if stop or kept.due:
                kept.save(_measured_arrays(measured))
            if stop:
                return None
    kept.save(_measured_arrays(measured))
    return Sample(ids, measured)


def _measured_arrays(measured: Measured) -> dict[str, np.ndarray]:
    return {
        f"{name}/{field}": values for name, fields in measured.items() for field, values in fields.items()
    }


def _read_measured(arrays: Mapping[str, np.ndarray]) -> dict[str, dict[str, np.ndarray]]:
    measured: dict[str, dict[str, np.ndarray]] = {}
    for key, values in arrays.items():
        name, _, field = key.partition("/")
        measured.setdefault(name, {})[field] = values
    return measured
