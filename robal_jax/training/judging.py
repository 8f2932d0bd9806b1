"""Looks at the weights during a training: accuracy on held-out images, clean and under PGD.

The attack is PGD-10 of the evaluation: the same radius, step size and random starts, with the head, the
logit scale and the prior adjustment that it uses. It draws no random numbers of the training, and a resumed
run finds the same figures again.
"""

import pathlib
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np

from robal_jax import attacks, averages, builder
from robal_jax.attacks import LogitsFn, ThreatModel, starting_points, uniform_start
from robal_jax.data import as_float
from robal_jax.devices import parallel
from robal_jax.keys import key_of, numbered_keys
from robal_jax.storage.best import Record, keep_if_best
from robal_jax.storage.progress import JUDGED
from robal_jax.training.state import TrainState

STEPS = 10
"""Of PGD."""

Judge = Callable[[chex.ArrayTree, chex.ArrayTree], dict[str, float]]
"""``(params, stats) -> accuracies by name``."""


def judge_step(
    logits_fn: LogitsFn,
    keys: chex.PRNGKey,
    images: chex.Array,
    labels: chex.Array,
    *,
    threat: ThreatModel,
    step_size: float | tuple[float, ...],
) -> dict[str, chex.Array]:
    """Returns which images of a batch are right when clean and under PGD-10, bool ``[B]`` each.

    Args:
      logits_fn: the model.
      keys: ``[B]``, one per image.
      images: ``[B, H, W, C]`` in [0, 1].
      labels: ``[B]``.
      threat: what the attack may do.
      step_size: of the attack; or one per class.
    """
    first = jax.vmap(partial(jax.random.split, num=3))(keys)[:, 0]  # the start of the evaluation's PGD
    start = starting_points(uniform_start, first, images, threat.of(labels))
    (attacked,) = attacks.pgd_path(
        logits_fn, start, images, labels, threat=threat, steps=(STEPS,), step_size=step_size
    )
    shown = {"clean": images, "pgd": attacked}
    return {name: jnp.argmax(logits_fn(x), axis=-1) == labels for name, x in shown.items()}


def accuracies(right: np.ndarray, labels: np.ndarray, groups: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Returns the share of images that are right, by the ending of its name.

    Args:
      right: bool ``[n]``.
      labels: ``[n]``, every class 0..K-1 present.
      groups: classes by the name of their group.

    Returns:
      '': of all images; '_balanced': the mean of the classes' shares; and '_head', ...: of a group's images.

    Example:
      >>> groups = {"head": np.array([0]), "tail": np.array([1])}
      >>> print(accuracies(np.array([1, 1, 1, 0], bool), np.array([0, 0, 0, 1]), groups))
      {'': 0.75, '_balanced': 0.5, '_head': 1.0, '_tail': 0.0}
    """
    shares = {
        "": np.mean(right),
        "_balanced": np.mean(np.bincount(labels, right) / np.bincount(labels)),
        **{f"_{name}": np.mean(right[np.isin(labels, classes)]) for name, classes in groups.items()},
    }
    return {name: float(value) for name, value in shares.items()}


def compiled_judge(job: builder.Evaluation, devices: list[jax.Device]) -> Judge:
    """Compiles :func:`judge_step` for all devices, once for all weights.

    Args:
      job: the images, and the evaluation's model and attack.
      devices: from ``parallel.devices_for(job.layout)``.
    """
    test, key, size = job.test, key_of(job.seed), job.batch_size * jax.device_count()

    def on_batch(parts: tuple, shared: tuple) -> dict[str, chex.Array]:
        (numbers, images, labels), (params, stats, key) = parts, shared
        logits_fn = partial(job.predict, params, stats)
        keys, images = numbered_keys(key, numbers), as_float(images, test.pixel_max)
        return judge_step(logits_fn, keys, images, labels, threat=job.threat, step_size=job.step_size)

    compiled = parallel.spread(on_batch, job.layout, devices)

    def judge(params: chex.ArrayTree, stats: chex.ArrayTree) -> dict[str, float]:
        shared = parallel.replicate((params, stats, key), devices)

        def on_devices(ids: np.ndarray) -> chex.ArrayTree:
            return compiled((job.ids[ids], test.images[ids], test.labels[ids]), shared)

        found = parallel.in_batches(on_devices, (np.arange(len(test.labels)),), size)
        return {
            f"{name}{ending}": value
            for name in ("clean", "pgd")
            for ending, value in accuracies(found[name], test.labels, job.groups).items()
        }

    return judge


def watch(
    job: builder.Training, workdir: pathlib.Path, devices: list[jax.Device], say: Callable[[str], None]
) -> Callable[[int, TrainState], dict[str, float]]:
    """Returns what looks at the weights after a dispatch, if it is time, and keeps the best checkpoint.

    Args:
      job: the training.
      workdir: folder of the run.
      devices: of the training.
      say: receives a line per look.

    Returns:
      ``(step, state) -> metrics``; without metrics if it is not time. What it finds is stored before it
      returns, so a checkpoint that is saved afterwards comes after all looks up to its step.
    """
    judged, kind, total = job.judged, job.judged_on, job.total_steps
    if judged is None:
        return lambda step, state: {}
    judge, count = compiled_judge(judged, devices), len(judged.test.labels)

    def look(step: int, state: TrainState) -> dict[str, float]:
        if step < total and step % (job.steps_per_epoch * job.settings.evaluate_epochs):
            return {}
        found = judge(*averages.chosen(vars(state), judged.weights).values())
        figures = {JUDGED[kind] + name: value for name, value in found.items()}
        epoch, epochs = (-(-steps // job.steps_per_epoch) for steps in (step, total))
        record = Record(step, epoch, epochs, kind, found["pgd_balanced"], figures, judged=judged.judged)
        best = keep_if_best(workdir, record, state)
        say(_line(f"epoch {epoch}: {count} {kind} images", found, judged.groups) + "; the best" * best)
        return figures

    return look


def _line(images: str, found: Mapping[str, float], groups: Mapping[str, Any]) -> str:
    """Says what a look found: 'epoch 4: 45 held-out images, clean 91.1 %, PGD-10 60.0 % (...)'."""
    parts = {"mean of classes": "_balanced", **{name: f"_{name}" for name in groups if name != "all"}}
    more = ", ".join(f"{name} {100 * found['pgd' + ending]:.1f}" for name, ending in parts.items())
    return f"{images}, clean {100 * found['clean']:.1f} %, PGD-{STEPS} {100 * found['pgd']:.1f} % ({more})"
