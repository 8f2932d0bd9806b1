"""Evaluation: every attack on every test image in one compiled step, and the run that reports and resumes.

The attacks of RoBal's tables: FGSM, PGD-20 (looked at after 5 and 10 steps as well), MIM-20 and CW-20, at the
config's logit scale and prior adjustment. An image's noise comes from its place in the test set, so the
batch size changes nothing. The outcome of every image is kept, so any figure can be computed again.
"""

import datetime
import json
import pathlib
import time
import zipfile
from collections.abc import Callable
from functools import partial
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from robal_jax import attacks, build, checkpoints, logs, metrics, reporting
from robal_jax.data import to_float
from robal_jax.errors import InputError
from robal_jax.state import TrainState
from robal_jax.train import initial_state, versions

CONDITIONS = ("clean", "fgsm", "pgd_5", "pgd_10", "pgd_20", "mim_20", "cw_20")
MAIN_ATTACK = "pgd_20"
SAVE_SECONDS = 30.0  # between two saves of an unfinished evaluation
# |(x + e) - x| may exceed e by the rounding of two operations on numbers up to 2: 2 * 2^-23 each. In L2 these
# errors of the pixels add up as their squares do.
DISTANCE_TOLERANCE = 4 * 2.0**-23


def eval_step(
    logits_fn: attacks.LogitsFn,
    keys: chex.PRNGKey,
    images: chex.Array,
    labels: chex.Array,
    *,
    threat: attacks.ThreatModel,
    step_size: float,
) -> dict[str, dict[str, chex.Array]]:
    """All conditions of the evaluation for one batch.

    Args:
      logits_fn: the model as it is attacked and judged.
      keys: ``[B]``, one an image.
      images: ``[B, H, W, C]`` in [0, 1].
      labels: ``[B]``.
      threat: what the attacks may do.
      step_size: of the iterated attacks.

    Returns:
      For each of ``CONDITIONS``: ``pred`` int32 ``[B]``; ``distance`` ``[B]``, in its norm;
      ``outside`` ``[B]``, how far pixels lie outside of the bounds; ``finite`` bool ``[B]``, of the logits.

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

    def judge(x: chex.Array) -> dict[str, chex.Array]:
        logits, axes = logits_fn(x), tuple(range(1, x.ndim))
        return {
            "pred": jnp.argmax(logits, axis=-1).astype(jnp.int32),
            "distance": threat.distance(x, images),
            "outside": jnp.maximum(threat.lower - x.min(axes), x.max(axes) - threat.upper),
            "finite": jnp.isfinite(logits).all(-1),
        }

    judged = jax.lax.map(judge, shown)
    return {name: jax.tree.map(lambda x, i=i: x[i], judged) for i, name in enumerate(CONDITIONS)}


def compiled_step(job: build.Evaluation) -> Callable[..., dict[str, dict[str, chex.Array]]]:
    """``(params, stats, images uint8 [N, ...], labels [N], ids [B]) -> outcomes``, compiled once."""
    key, pixel_max = jax.random.key(job.seed), job.training.data.pixel_max

    def step(
        params: chex.ArrayTree, stats: chex.ArrayTree, images: chex.Array, labels: chex.Array, ids: chex.Array
    ) -> dict[str, dict[str, chex.Array]]:
        keys = jax.vmap(partial(jax.random.fold_in, key))(ids)
        logits_fn = partial(job.predict, params, stats)
        batch = to_float(images[ids], pixel_max)
        return eval_step(logits_fn, keys, batch, labels[ids], threat=job.threat, step_size=job.step_size)

    return jax.jit(step)


def evaluate(
    config: ConfigDict,
    workdir: pathlib.Path,
    *,
    checkpoint: pathlib.Path | None = None,
    folder: pathlib.Path | None = None,
    say: Callable[[str], None] = print,
) -> pathlib.Path:
    """Evaluates a checkpoint on the whole test set and writes the report; goes on where it was interrupted.

    Args:
      config: of the run, with the evaluation's settings.
      workdir: of the run.
      checkpoint: one checkpoint's folder; the newest that is whole if None.
      folder: gets the results; ``workdir/evaluation`` if None.
      say: told, in lines, what a person should know.

    Returns:
      The folder of the results.

    Raises:
      InputError: config, data, checkpoint or folder cannot be used.
    """
    with logs.stop_signals() as stop:
        job = build.evaluation(config)
        state, path, sha256 = _restore(job, workdir, checkpoint, say)
        folder = workdir / "evaluation" if folder is None else folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"cannot write to {folder}: {error.strerror}") from error
        data = job.training.data
        about = {
            **job.about,
            "checkpoint": str(path),
            "checkpoint_sha256": sha256,
            "test_set_sha256": checkpoints.digest({"images": data.test_images, "labels": data.test_labels}),
        }
        outcomes = _outcomes(job, state, folder / "partial.npz", about, stop)
        if outcomes is None:
            say(f"stopped; the same command goes on from {folder / 'partial.npz'}")
            return folder
        _check(outcomes, job.threat, data.test_images[0].size)
        meta = {
            **about,
            "n": len(data.test_labels),
            "main_attack": MAIN_ATTACK,
            "versions": {k: v for k, v in versions().items() if k != "device"},
            "device": versions()["device"],
            "date": datetime.date.today().isoformat(),
        }
        _report(job, outcomes, meta, folder, say)
        return folder


def _restore(
    job: build.Evaluation, workdir: pathlib.Path, checkpoint: pathlib.Path | None, say: Callable[[str], None]
) -> tuple[TrainState, pathlib.Path, str]:
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
        return found
    if not checkpoint.is_dir():
        raise InputError(f"no checkpoint {checkpoint}")
    try:
        state, sha256 = checkpoints.restore(checkpoint, like)
    except checkpoints.DamagedCheckpointError as error:
        raise InputError(
            f"checkpoint {checkpoint} is damaged ({error}); name another with --checkpoint"
        ) from error
    return state, checkpoint, sha256


def _outcomes(
    job: build.Evaluation, state: TrainState, partial_file: pathlib.Path, about: dict, stop: logs.Stop
) -> dict[str, np.ndarray] | None:
    """Outcomes of all test images, ``{field_condition: [n]}``, or None if stopped before the end.

    What is done is saved to ``partial_file`` now and then, and at a stop.
    """
    data, total = job.training.data, len(job.training.data.test_labels)
    step = compiled_step(job)
    images, labels, params, stats = jax.device_put(
        (data.test_images, data.test_labels, state.params, state.stats)
    )
    settings = json.dumps({**about, "batch_size": job.batch_size}, sort_keys=True)
    done, outcomes = _read_partial(partial_file, settings)
    saved = time.monotonic()
    with logs.Meter("evaluate", total, done) as meter:
        while done < total and not stop:
            # The last batch is filled up with images that were already judged, which are then left out.
            ids = np.minimum(np.arange(done, done + job.batch_size), total - 1)
            judged = jax.device_get(step(params, stats, images, labels, ids))
            count = min(job.batch_size, total - done)
            for condition in CONDITIONS:  # jit returns dictionaries in the order of their keys
                for field, values in judged[condition].items():
                    outcomes.setdefault(f"{field}_{condition}", []).append(values[:count])
            done += count
            robust = np.concatenate(outcomes[f"pred_{MAIN_ATTACK}"]) == data.test_labels[:done]
            meter.update(done, f"{reporting.display_name(MAIN_ATTACK)} accuracy {robust.mean():.1%}")
            if done < total and (stop or time.monotonic() - saved > SAVE_SECONDS):
                saved = time.monotonic()
                arrays = {name: np.concatenate(parts) for name, parts in outcomes.items()}
                _save(partial_file, {"settings": np.array(settings), "done": np.array(done), **arrays})
    if done < total:
        return None
    return {name: np.concatenate(parts) for name, parts in outcomes.items()}


def _save(path: pathlib.Path, arrays: dict[str, Any]) -> None:
    with logs.replacing(path) as file:
        np.savez(file, **arrays)


def _read_partial(path: pathlib.Path, settings: str) -> tuple[int, dict[str, list[np.ndarray]]]:
    """What an interrupted evaluation of the same checkpoint with the same settings had done."""
    try:
        with path.open("rb") as file, np.load(file) as content:
            arrays = dict(content)
        if str(arrays.pop("settings")) != settings:
            return 0, {}
        return int(arrays.pop("done")), {name: [values] for name, values in arrays.items()}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return 0, {}


def _check(outcomes: dict[str, np.ndarray], threat: attacks.ThreatModel, pixels: int = 1) -> None:
    """Refuses outcomes that no honest evaluation gives."""
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


def _report(
    job: build.Evaluation,
    outcomes: dict[str, np.ndarray],
    meta: dict,
    folder: pathlib.Path,
    say: Callable[[str], None],
) -> None:
    """Writes examples.npz, the summary, the tables and the figures, and prints the table."""
    data = job.training.data
    predictions = {condition: outcomes[f"pred_{condition}"] for condition in CONDITIONS}
    kept = {name: values for name, values in outcomes.items() if name.startswith(("pred_", "distance_"))}
    _save(
        folder / "examples.npz", {"labels": data.test_labels, "ids": np.arange(len(data.test_labels)), **kept}
    )
    summary = metrics.summarize(data.test_labels, predictions, data.class_counts, **job.groups)
    reporting.write_report(folder, summary, meta)
    (folder / "partial.npz").unlink(missing_ok=True)
    say(f"{meta['method']} on {meta['dataset']}, checkpoint {meta['checkpoint']}")
    reporting.evaluation_table(summary, reporting.terminal())
    say(f"report {folder / 'report.md'}")
