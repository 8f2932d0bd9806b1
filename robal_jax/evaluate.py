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
import math
import pathlib
import shutil
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from robal_jax import attacks, audit, autoattack, build, checkpoints, hosts, logs, metrics, reporting
from robal_jax.errors import InputError
from robal_jax.state import TrainState
from robal_jax.train import fingerprint, initial_state, versions
from robal_jax.unfinished import Unfinished
from robal_jax.victim import Victim

CONDITIONS = ("clean", "fgsm", "pgd_5", "pgd_10", "pgd_20", "mim_20", "cw_20")
MAIN_ATTACK = "pgd_20"
GALLERY_IMAGES = 8
# |(x + e) - x| may exceed e by the rounding of two operations on numbers up to 2: 2 * 2^-23 each. In L2 these
# errors of the pixels add up as their squares do.
DISTANCE_TOLERANCE = 4 * 2.0**-23

Judged = dict[str, chex.Array]
"""``pred`` int32 ``[B]``; ``distance`` ``[B]``, in the threat model's norm; ``outside`` ``[B]``, how far
pixels lie outside of its bounds; ``finite`` bool ``[B]``, of the logits."""


def judge(
    logits_fn: attacks.LogitsFn, shown: chex.Array, images: chex.Array, threat: attacks.ThreatModel
) -> Judged:
    """What the model makes of images that are shown instead of ``images``, and whether they may be."""
    logits, axes = logits_fn(shown), tuple(range(1, shown.ndim))
    return {
        "pred": jnp.argmax(logits, axis=-1).astype(jnp.int32),
        "distance": threat.distance(shown, images),
        "outside": jnp.maximum(threat.lower - shown.min(axes), shown.max(axes) - threat.upper),
        "finite": jnp.isfinite(logits).all(-1),
    }


def eval_step(
    logits_fn: attacks.LogitsFn,
    keys: chex.PRNGKey,
    images: chex.Array,
    labels: chex.Array,
    *,
    threat: attacks.ThreatModel,
    step_size: float,
) -> dict[str, Judged]:
    """All conditions of RoBal's tables for one batch.

    Args:
      logits_fn: the model as it is attacked and judged.
      keys: ``[B]``, one an image.
      images: ``[B, H, W, C]`` in [0, 1].
      labels: ``[B]``.
      threat: what the attacks may do.
      step_size: of the iterated attacks.

    Returns:
      What the model makes of the images of each of ``CONDITIONS``.

    Source: the attacks and their starts as in RoBal's released evaluation.
    """
    keys = jax.vmap(partial(jax.random.split, num=3))(keys)
    start = [attacks.starting_points(attacks.uniform_start, keys[:, i], images, threat) for i in range(3)]
    run = partial(attacks.pgd_path, logits_fn, images=images, labels=labels, threat=threat)
    fgsm = run(start=images, steps=(1,), step_size=threat.epsilon)
    pgd = run(start=start[0], steps=(5, 10, 20), step_size=step_size)
    mim = run(start=start[1], steps=(20,), step_size=step_size, momentum=1.0)
    cw = run(start=start[2], steps=(20,), step_size=step_size, loss=attacks.negative_margin)
    shown = jnp.concatenate([images[None], fgsm, pgd, mim, cw])
    judged = jax.lax.map(lambda x: judge(logits_fn, x, images, threat), shown)
    return {name: jax.tree.map(lambda x, i=i: x[i], judged) for i, name in enumerate(CONDITIONS)}


def attack_step(
    logits_fn: attacks.LogitsFn,
    keys: chex.PRNGKey,
    images: chex.Array,
    labels: chex.Array,
    *,
    number: chex.Array,
    stage: autoattack.Stage,
    threat: attacks.ThreatModel,
    random: bool = False,
) -> dict[str, chex.Array]:
    """One round of a stage of the ensemble for one batch.

    Args:
      logits_fn: the model.
      keys: ``[B]``.
      images: ``[B, H, W, C]`` in [0, 1].
      labels: ``[B]``.
      number: of the round, from 0.
      stage: of the ensemble.
      threat: what the attacks may do.
      random: whether the attack takes the model for a random one.

    Returns:
      ``images [B, H, W, C]``, and what the model makes of them.
    """
    keys = jax.vmap(lambda key: jax.random.fold_in(key, stage.first + number))(keys)
    model = (lambda x, keys: logits_fn(x)) if random else logits_fn
    shown = stage.attack(model, keys, images, labels, number)
    return {"images": shown, **judge(logits_fn, shown, images, threat)}


def shown_step(
    logits_fn: attacks.LogitsFn,
    keys: chex.PRNGKey,
    images: chex.Array,
    labels: chex.Array,
    shown: chex.Array,
    *,
    threat: attacks.ThreatModel,
) -> Judged:
    """What the model makes of given images ``[B, H, W, C]``."""
    del keys, labels
    return judge(logits_fn, shown, images, threat)


def evaluate(
    config: ConfigDict,
    workdir: pathlib.Path,
    *,
    checkpoint: pathlib.Path | None = None,
    folder: pathlib.Path | None = None,
    command: str = "",
    say: Callable[[str], None] = print,
) -> pathlib.Path:
    """Evaluates a checkpoint on the whole test set and writes the report; goes on where it was interrupted.

    Args:
      config: of the run, with the evaluation's settings.
      workdir: of the run.
      checkpoint: one checkpoint's folder; the newest that is whole if None.
      folder: gets the results; ``workdir/evaluation`` if None.
      command: by which it was called, for the report.
      say: told, in lines, what a person should know.

    Returns:
      The folder of the results.

    Raises:
      InputError: config, data, checkpoint or folder cannot be used.
    """
    say = hosts.speaker(say)
    with hosts.stop_signals() as stop:
        job = build.evaluation(config)
        state, path, sha256 = _restore(job, workdir, checkpoint, say)
        victim, surrogate = _victim(job, state), _surrogate(job, say)
        folder = workdir / "evaluation" if folder is None else folder
        hosts.check_agreement("the config", build.to_json(config))
        test_set = _digest(job)
        hosts.check_agreement("the test set", test_set)
        hosts.by_first(partial(_make, folder))
        about = {
            **job.about,
            "checkpoint": str(path),
            "checkpoint_sha256": sha256,
            "test_set_sha256": test_set,
            "n": len(victim.labels),
        }
        unfinished = folder / "unfinished"
        parts: list[Unfinished] = []

        def part(name: str) -> Unfinished:
            parts.append(Unfinished(unfinished / f"{name}.npz", about))
            return parts[-1]

        outcomes = conditions(victim, job, part("conditions"), stop)
        found = None if outcomes is None else ensemble(victim, job, outcomes, part("ensemble"), stop)
        measured = None if found is None else audited(victim, job, surrogate, part("audit"), stop)
        if outcomes is None or found is None or measured is None:
            say(f"stopped; the same command goes on from {unfinished}")
            return folder
        meta = {
            **about,
            "main_attack": MAIN_ATTACK,
            "versions": {k: v for k, v in versions().items() if k != "device"},
            "device": versions()["device"],
            "date": datetime.date.today().isoformat(),
            "seconds": sum(part.seconds for part in parts),
            "command": command,
            "stages": autoattack.robust_after(job.ensemble, found),
        }
        _report(victim, job, state, outcomes, found, measured, meta, folder, say)
        hosts.by_first(partial(shutil.rmtree, unfinished))
        return folder


def _make(folder: pathlib.Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot write to {folder}: {error.strerror}") from error


def _victim(job: build.Evaluation, state: TrainState) -> Victim:
    data = job.training.data
    return Victim(
        job.predict,
        state.params,
        state.stats,
        data.test_images,
        data.test_labels,
        pixel_max=data.pixel_max,
        seed=job.seed,
        batch_size=job.batch_size,
        layout=job.training.layout,
    )


def _digest(job: build.Evaluation) -> str:
    data = job.training.data
    return checkpoints.digest({"images": fingerprint(data.test_images), "labels": data.test_labels})


def _surrogate(job: build.Evaluation, say: Callable[[str], None]) -> Victim | None:
    """The newest checkpoint of the run that the config names, as that run itself is evaluated."""
    if not job.surrogate:
        return None
    workdir = pathlib.Path(job.surrogate)
    other = build.evaluation(build.read_config(workdir))
    if _digest(other) != _digest(job):
        raise InputError(f"the surrogate {workdir} has other test images; name a run on the same data")
    return _victim(other, _restore(other, workdir, None, say)[0])


def _restore(
    job: build.Evaluation, workdir: pathlib.Path, checkpoint: pathlib.Path | None, say: Callable[[str], None]
) -> checkpoints.Found[TrainState]:
    like = jax.eval_shape(partial(initial_state, job.training))
    if checkpoint is None:
        found = checkpoints.restore_latest(
            workdir / "checkpoints",
            like,
            on_damage=lambda path, why: say(f"checkpoint {path} is damaged ({why})"),
        )
        if found is None:
            raise InputError(
                f"no checkpoint in {workdir / 'checkpoints'}; train first, or name one with --checkpoint"
            )
    elif not checkpoint.is_dir():
        raise InputError(f"no checkpoint {checkpoint}")
    else:
        try:
            state, sha256 = checkpoints.restore(checkpoint, like)
        except checkpoints.DamagedCheckpointError as error:
            raise InputError(
                f"checkpoint {checkpoint} is damaged ({error}); name another with --checkpoint"
            ) from error
        found = checkpoints.Found(state, checkpoint, sha256)
    hosts.check_agreement(f"checkpoint {found.path}", found.sha256)
    return found


def conditions(
    victim: Victim, job: build.Evaluation, kept: Unfinished, stop: hosts.Stop
) -> dict[str, np.ndarray] | None:
    """Outcomes ``[n]`` of all test images by ``field_condition``; None if stopped before the end."""
    labels, total = victim.labels, len(victim.labels)
    step = victim.compile(partial(eval_step, threat=job.threat, step_size=job.step_size))
    outcomes = kept.arrays
    done = len(outcomes.get("pred_clean", ()))
    with hosts.only_first(lambda: logs.Meter("evaluate", total, done)) as meter:
        while done < total and not stop:
            judged = step(np.arange(done, min(done + victim.size, total)))
            for condition in CONDITIONS:  # jit returns dictionaries in the order of their keys
                for field, values in judged[condition].items():
                    name = f"{field}_{condition}"
                    outcomes[name] = np.concatenate([outcomes.get(name, values[:0]), values])
            done = len(outcomes["pred_clean"])
            right = np.mean(outcomes[f"pred_{MAIN_ATTACK}"] == labels[:done])
            meter.update(done, f"{reporting.display_name(MAIN_ATTACK)} accuracy {right:.1%}")
            if stop or done == total or kept.due:
                kept.save(outcomes)
    if done < total:
        return None
    check(outcomes, job.threat, _pixels(victim))
    return outcomes


def ensemble(
    victim: Victim,
    job: build.Evaluation,
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
            check({f"{field}_{name}": x for field, x in found.items()}, job.threat, _pixels(victim))
            return found["images"], found["pred"]

        total = stage.rounds * int(np.sum(~autoattack.broken_by(progress, stage.first - 1)))
        done = total - autoattack.work_left(stage, progress)
        with hosts.only_first(partial(logs.Meter, stage.name, total, done)) as meter:
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
    victim: Victim, job: build.Evaluation, surrogate: Victim | None, kept: Unfinished, stop: hosts.Stop
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
    plans = audit.measurements(victim, ids, threat=job.threat, step_size=job.step_size, surrogate=surrogate)
    with hosts.only_first(lambda: logs.Meter("audit", len(plans), len(measured))) as meter:
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


def _pixels(victim: Victim) -> int:
    return math.prod(victim.images.shape[1:])


def check(outcomes: Mapping[str, np.ndarray], threat: attacks.ThreatModel, pixels: int = 1) -> None:
    """Refuses outcomes that no honest evaluation gives.

    Args:
      outcomes: arrays by ``field_condition``.
      threat: what the attacks may do.
      pixels: numbers in an image.

    Raises:
      InputError: logits that are not finite.
      RuntimeError: an image outside of the threat model.
    """
    tolerance = DISTANCE_TOLERANCE * (pixels**0.5 if threat.norm == "l2" else 1.0)
    for name, values in outcomes.items():
        field, _, condition = name.partition("_")
        if field == "finite" and not values.all():
            raise InputError(
                f"the model's logits are not finite for {np.sum(~values)} of {len(values)} images "
                f"({condition}), so no accuracy can be given; the checkpoint is not usable"
            )
        if (field == "distance" and values.max() > threat.epsilon + tolerance) or (
            field == "outside" and values.max() > 0
        ):
            raise RuntimeError(f"attack {condition} left the threat model: {field} {values.max()}")


def recompute(victim: Victim, path: pathlib.Path, threat: attacks.ThreatModel) -> Judged:
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
        shown = np.asarray(victim.images[batch] / victim.pixel_max, np.float32)
        shown[row[batch] >= 0] = images[row[batch][row[batch] >= 0]]
        judged.append(step(batch, shown))
    return jax.tree.map(lambda *batches: np.concatenate(batches), *judged)


def _report(
    victim: Victim,
    job: build.Evaluation,
    state: TrainState,
    outcomes: dict[str, np.ndarray],
    found: autoattack.Progress,
    measured: dict[str, dict[str, np.ndarray]],
    meta: dict,
    folder: pathlib.Path,
    say: Callable[[str], None],
) -> None:
    """Writes examples.npz, adversarial.npz, the summary, the tables and the figures, and prints the table."""
    data, labels = job.training.data, victim.labels
    predictions = {condition: outcomes[f"pred_{condition}"] for condition in CONDITIONS}
    if job.ensemble:
        predictions |= autoattack.outcomes(job.version, job.ensemble, found, labels)
    kept: dict[str, Any] = {k: values for k, values in outcomes.items() if k.startswith("distance_")}
    kept |= {f"pred_{name}": values for name, values in predictions.items()}
    kept |= {"labels": labels, "ids": np.arange(len(labels))}
    summary = metrics.summarize(labels, predictions, data.class_counts, **job.groups)
    parts = {
        "audit": _audit(victim, job, found, measured, predictions, folder),
        "norms": _norms(victim, job, state),
        "gallery": _gallery(victim, job, found),
    }

    def write() -> None:
        with logs.replacing(folder / "examples.npz") as file:
            np.savez(file, **kept)
        reporting.write_report(folder, summary, meta, **parts)
        say(f"{meta['method']} on {meta['dataset']}, checkpoint {meta['checkpoint']}")
        reporting.evaluation_table(summary, reporting.terminal())
        say(f"report {folder / 'report.html'}")

    hosts.by_first(write)


def _audit(
    victim: Victim,
    job: build.Evaluation,
    found: autoattack.Progress,
    measured: dict[str, dict[str, np.ndarray]],
    predictions: Mapping[str, np.ndarray],
    folder: pathlib.Path,
) -> dict[str, Any] | None:
    """Stores the ensemble's images, looks at them again, and judges all that was measured."""
    found_again = _stored(victim, job, found, folder) if job.ensemble else None
    if not job.ensemble:  # what lies there is of an evaluation before this one
        hosts.by_first(partial((folder / "adversarial.npz").unlink, missing_ok=True))
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
    if "square" not in job.about["autoattack"][1:]:
        survived, by_square = survived[ids], ~measured["gradient_free"]["right"]
    verdicts, curves = audit.verdicts(measured, labels[ids], survived, by_square)
    if found_again is not None:
        verdicts.append(found_again)
    return {"examples": len(ids), "verdicts": [verdict._asdict() for verdict in verdicts], "curves": curves}


def _stored(
    victim: Victim, job: build.Evaluation, found: autoattack.Progress, folder: pathlib.Path
) -> audit.Verdict:
    """Writes the ensemble's adversarial images, reads them, and computes the accuracy again."""
    path, ids = folder / "adversarial.npz", np.array(sorted(found.adversarial), int)
    images = np.array([found.adversarial[number] for number in ids], np.float32).reshape(
        -1, *victim.images.shape[1:]
    )

    def write() -> None:
        with logs.replacing(path) as file:
            kept = {"ids": ids, "images": images, "predictions": found.predictions[ids]}
            np.savez(file, **kept, epsilon=np.array(job.threat.epsilon))

    hosts.by_first(write)
    judged = recompute(victim, path, job.threat)
    check({f"{field}_stored": values for field, values in judged.items()}, job.threat, _pixels(victim))
    return audit.stored_images(
        found.predictions != victim.labels,
        judged["pred"] != victim.labels,
        judged["distance"],
        job.threat.epsilon,
    )


def _norms(victim: Victim, job: build.Evaluation, state: TrainState) -> dict[str, Any]:
    """By class: norms of the classifier's weight vectors, where it has such; mean norms of the features."""

    def work(
        features: attacks.LogitsFn, keys: chex.PRNGKey, images: chex.Array, labels: chex.Array
    ) -> chex.Array:
        del keys, labels
        return jnp.linalg.norm(features(images), axis=-1)

    sizes = victim.compile(work, job.features)(np.arange(len(victim.labels)))
    weight = state.params.get("classifier", {}).get("weight")
    return {
        "features": [
            float(sizes[victim.labels == k].mean()) for k in range(len(job.training.data.class_counts))
        ],
        "weights": None if weight is None else np.linalg.norm(weight, axis=-1).tolist(),
    }


def _gallery(victim: Victim, job: build.Evaluation, found: autoattack.Progress) -> dict[str, Any] | None:
    """Some images that the ensemble broke, the first of each class, the rarest classes first."""
    ids = np.array(sorted(found.adversarial), int)
    _, first = np.unique(victim.labels[ids], return_index=True)
    rarest = np.argsort(job.training.data.class_counts[victim.labels[ids[first]]], kind="stable")
    ids = ids[first[rarest]][:GALLERY_IMAGES]
    if not len(ids):
        return None
    return {
        "images": victim.images[ids] / victim.pixel_max,
        "adversarial": np.stack([found.adversarial[number] for number in ids]),
        "labels": victim.labels[ids],
        "predictions": found.predictions[ids],
        "condition": list(autoattack.outcomes(job.version, job.ensemble, found, victim.labels))[-1],
    }
