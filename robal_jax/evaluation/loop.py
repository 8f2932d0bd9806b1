"""Evaluation: attacks on every test image, an audit of what they found, and the run that reports and resumes.

1. The attacks of RoBal's tables in one compiled step: FGSM, PGD-20 (looked at after 5 and 10 steps as well),
   MIM-20 and CW-20, at the config's logit scale and prior adjustment.
2. An ensemble: AutoAttack, or a part of it (``autoattack.py``).
3. The audit, on a sample (``audit.py``).

An image's noise comes from its place in the test set, so batch size and number of devices change nothing. The
outcome of every image is kept, and every adversarial image of the ensemble, so any figure can be computed
again; the accuracy is, before it is reported.
"""

import datetime
import json
import pathlib
import shutil
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from robal_jax import builder
from robal_jax.attacks import autoattack
from robal_jax.devices import hosts
from robal_jax.errors import InputError
from robal_jax.evaluation.findings import pixels_of, report
from robal_jax.evaluation.measurements import plan_measurements
from robal_jax.evaluation.steps import CONDITIONS, attack_step, check, eval_step
from robal_jax.evaluation.victim import Victim
from robal_jax.reporting.names import display_name
from robal_jax.storage.config_file import read_config, to_json
from robal_jax.storage.names import EVALUATION, UNFINISHED
from robal_jax.storage.progress import Meter
from robal_jax.storage.unfinished import Unfinished
from robal_jax.storage.workdir import restore_weights, test_set_digest, versions

MAIN_ATTACK = "pgd_20"


def evaluate(
    config: ConfigDict,
    workdir: pathlib.Path,
    *,
    checkpoint: pathlib.Path | None = None,
    folder: pathlib.Path | None = None,
    command: str = "",
    say: Callable[[str], None] = print,
) -> pathlib.Path:
    """Evaluates a checkpoint on the whole test set and writes the report; resumes an interrupted evaluation.

    Args:
      config: of the run, with the evaluation's settings.
      workdir: of the run.
      checkpoint: folder of one checkpoint; the newest undamaged one if None.
      folder: receives the results; ``workdir/evaluation`` if None.
      command: the command line, for the report.
      say: receives messages for the user, line by line.

    Returns:
      The folder of the results.

    Raises:
      InputError: config, data, checkpoint or folder cannot be used.
    """
    say = hosts.speaker(say)
    with hosts.stop_signals() as stop:
        job = builder.evaluation(config)
        weights, path, sha256 = restore_weights(workdir, checkpoint, job.variables, say)
        surrogate = _surrogate(job, say)
        hosts.check_agreement("the config", to_json(config))
        about = {"checkpoint": str(path), "checkpoint_sha256": sha256}
        identity = {"config": json.loads(to_json(config)), "checkpoint_sha256": sha256}
        folder = workdir / EVALUATION if folder is None else folder
        attack_and_report(job, weights, surrogate, identity, about, folder, command, stop, say)
        return folder


def attack_and_report(
    job: builder.Evaluation,
    weights: Mapping[str, Any],
    surrogate: Victim | None,
    identity: Mapping[str, Any],
    about: Mapping[str, Any],
    folder: pathlib.Path,
    command: str,
    stop: hosts.Stop,
    say: Callable[[str], None],
) -> bool:
    """Runs all attacks and the audit on a model, and writes the report; resumes an interrupted evaluation.

    Args:
      job: what is evaluated, and how.
      weights: ``params`` and ``stats`` of the model.
      surrogate: another model, for the audit's attack by transfer.
      identity: JSON values that tell this evaluation from others, besides the test set.
      about: what the report says beside ``job.about``.
      folder: receives the results.
      command: the command line, for the report.
      stop: whether to stop at the next safe moment.
      say: receives messages for the user, line by line.

    Returns:
      Whether it came to its end; if not, it was stopped, and the same call resumes it.
    """
    victim = as_victim(job, weights)
    test_set = test_set_digest(job.test.images, job.test.labels)
    hosts.check_agreement("the test set", test_set)
    hosts.by_first(partial(_make, folder))
    unfinished = folder / UNFINISHED
    parts: list[Unfinished] = []

    def part(name: str) -> Unfinished:
        parts.append(Unfinished(unfinished / f"{name}.npz", {**identity, "test_set_sha256": test_set}))
        return parts[-1]

    outcomes = conditions(victim, job, part("conditions"), stop)
    found = None if outcomes is None else ensemble(victim, job, outcomes, part("ensemble"), stop)
    measured = None if found is None else audited(victim, job, surrogate, part("audit"), stop)
    if outcomes is None or found is None or measured is None:
        say(f"stopped; the same command resumes from {unfinished}")
        return False
    made_with = versions()
    meta = {
        **job.about,
        **about,
        "test_set_sha256": test_set,
        "n": len(victim.labels),
        "main_attack": MAIN_ATTACK,
        "device": made_with.pop("device"),
        "versions": made_with,
        "date": datetime.date.today().isoformat(),
        "seconds": sum(part.seconds for part in parts),
        "command": command,
        "stages": autoattack.robust_after(job.ensemble, found),
    }
    report(victim, job, weights, outcomes, found, measured, meta, folder, say)
    hosts.by_first(partial(shutil.rmtree, unfinished))
    return True


def _make(folder: pathlib.Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"cannot write to {folder} ({error.strerror}); choose another with --folder"
        ) from error


def as_victim(job: builder.Evaluation, weights: Mapping[str, Any]) -> Victim:
    """Puts a model and its test images on the devices."""
    return Victim(
        job.predict,
        weights["params"],
        weights["stats"],
        job.test.images,
        job.test.labels,
        pixel_max=job.test.pixel_max,
        seed=job.seed,
        batch_size=job.batch_size,
        layout=job.layout,
    )


def _surrogate(job: builder.Evaluation, say: Callable[[str], None]) -> Victim | None:
    """Restores the newest checkpoint of the run that the config names, as that run itself is evaluated."""
    if not job.surrogate:
        return None
    workdir = pathlib.Path(job.surrogate)
    other = builder.evaluation(read_config(workdir))
    if test_set_digest(*other.test[:2]) != test_set_digest(*job.test[:2]):
        raise InputError(f"the surrogate {workdir} has other test images; name a run on the same data")
    return as_victim(other, restore_weights(workdir, None, other.variables, say).tree)


def conditions(
    victim: Victim, job: builder.Evaluation, kept: Unfinished, stop: hosts.Stop
) -> dict[str, np.ndarray] | None:
    """Outcomes ``[n]`` of all test images by ``field_condition``; None if stopped before the end."""
    labels, total = victim.labels, len(victim.labels)
    step = victim.compile(partial(eval_step, threat=job.threat, step_size=job.step_size))
    outcomes = kept.arrays
    done = len(outcomes.get("pred_clean", ()))
    with hosts.only_first(lambda: Meter("evaluate", total, done)) as meter:
        while done < total and not stop:
            judged = step(np.arange(done, min(done + victim.size, total)))
            for condition in CONDITIONS:  # jit returns dictionaries in the order of their keys
                for field, values in judged[condition].items():
                    name = f"{field}_{condition}"
                    outcomes[name] = np.concatenate([outcomes.get(name, values[:0]), values])
            done = len(outcomes["pred_clean"])
            right = np.mean(outcomes[f"pred_{MAIN_ATTACK}"] == labels[:done])
            meter.update(done, f"{display_name(MAIN_ATTACK)} accuracy {right:.1%}")
            if stop or done == total or kept.due:
                kept.save(outcomes)
    if done < total:
        return None
    check(outcomes, job.threat, pixels_of(victim))
    return outcomes


def ensemble(
    victim: Victim,
    job: builder.Evaluation,
    outcomes: Mapping[str, np.ndarray],
    kept: Unfinished,
    stop: hosts.Stop,
) -> autoattack.Progress | None:
    """What the ensemble of attacks found; None if stopped before the end."""
    labels, progress = victim.labels, _read_progress(kept.arrays)
    if progress is None:
        progress = autoattack.begin(labels, outcomes["pred_clean"])
    for stage in job.ensemble:
        step = victim.compile(
            partial(attack_step, stage=stage, threat=job.threat, random=job.version == "rand")
        )

        def attack(ids: np.ndarray, number: int, step: Callable = step, name: str = stage.name) -> Any:
            found = step(ids, number=np.int32(number))
            check({f"{field}_{name}": x for field, x in found.items()}, job.threat, pixels_of(victim))
            return found["images"], found["pred"]

        total = stage.rounds * int(np.sum(~autoattack.broken_by(progress, stage.first - 1)))
        done = total - autoattack.work_left(stage, progress)
        with hosts.only_first(partial(Meter, stage.name, total, done)) as meter:
            for _ in autoattack.run(stage, attack, labels, progress, size=victim.size):
                left = autoattack.work_left(stage, progress)
                meter.update(total - left, f"robust {progress.robust / len(labels):.1%}")
                if stop or kept.due:
                    kept.save(_progress_arrays(progress))
                if stop:
                    return None
    kept.save(_progress_arrays(progress))
    return progress


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
) -> dict[str, dict[str, np.ndarray]] | None:
    """The audit's measurements on a sample, with the sample's ``ids``; None if stopped before the end."""
    measured: dict[str, dict[str, np.ndarray]] = {}
    for name, values in kept.arrays.items():
        measurement, _, field = name.partition("/")
        measured.setdefault(measurement, {})[field] = values
    if not job.audit_examples:
        return measured
    order = np.random.default_rng(job.seed).permutation(len(victim.labels))
    ids = np.sort(order[: job.audit_examples])
    plans = plan_measurements(victim, ids, threat=job.threat, step_size=job.step_size, surrogate=surrogate)
    with hosts.only_first(lambda: Meter("audit", len(plans), len(measured))) as meter:
        for name, measure in plans.items():
            if name not in measured:
                measured[name] = measure()
                meter.update(len(measured), name)
            if stop or kept.due:
                kept.save(_flat(measured))
            if stop:
                return None
    kept.save(_flat(measured))
    return {"sample": {"ids": ids}, **measured}


def _flat(measured: Mapping[str, Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    return {
        f"{name}/{field}": values for name, fields in measured.items() for field, values in fields.items()
    }
