"""Measurements of the audit on a sample of images: attacks with other settings, and properties of the model.

Nothing is judged here: :func:`plan_measurements` names all measurements, each a call that returns arrays, so
that they can be saved one by one; ``verdicts.py`` judges the arrays.
"""

import inspect
import sys
import types
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from robal_jax import attacks, losses
from robal_jax.attacks import LogitsFn, ThreatModel, starting_points, uniform_start
from robal_jax.evaluation.victim import Victim
from robal_jax.keys import fold_in

SCALES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)

STEPS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)

MAIN_STEPS = 20  # of the attack whose settings are in question: PGD-20

RESTARTS = 10

QUERIES = 1000  # of Square

UNBOUNDED_STEPS = 100

FORWARDS = 5  # passes that must agree

# Names of the measurements that are made several times.
FORWARD_NAMES = tuple(f"forward_{number}" for number in range(FORWARDS))
SCALE_NAMES = {scale: f"scale_{scale:g}" for scale in SCALES}
RESTART_NAMES = {restart: f"restart_{restart}" for restart in range(1, RESTARTS)}  # 0 is in "steps"

_DERIVATIVES = ("vjp", "_vjp", "_jvp", "linearize")  # in JAX's file of jax.grad; all others call one of these

Measured = Mapping[str, Mapping[str, np.ndarray]]
"""Name of a measurement to its arrays by field, each of all images of the sample."""


class Sample(NamedTuple):
    """Part of the test set, and what was measured on it.

    Attributes:
      ids: indices of the images ``[n]``, sorted; empty without an audit.
      measured: the measurements.
    """

    ids: np.ndarray
    measured: Measured


def outputs(
    logits_fn: LogitsFn, keys: chex.PRNGKey, images: chex.Array, labels: chex.Array
) -> dict[str, chex.Array]:
    """Returns logits ``[B, K]`` and the sum of the absolute gradient of the cross-entropy ``[B]``."""
    del keys
    logits, _, gradient = attacks.loss_gradient(logits_fn, losses.cross_entropy, images, labels)
    return {"logits": logits, "gradient": jnp.abs(gradient).sum(range(1, gradient.ndim))}


def probe(
    logits_fn: LogitsFn,
    keys: chex.PRNGKey,
    images: chex.Array,
    labels: chex.Array,
    *,
    scale: chex.Array,
    steps: chex.Array,
    restart: chex.Array,
    threat: ThreatModel,
    step_size: float,
) -> dict[str, chex.Array]:
    """Returns whether images are still classified correctly after several numbers of steps of PGD.

    Args:
      logits_fn: the model.
      keys: ``[B]``.
      images: ``[B, H, W, C]``.
      labels: ``[B]``.
      scale: factor on the logits.
      steps: ``[L]``, not decreasing.
      restart: number of the random start.
      threat: what the attack may do.
      step_size: of PGD.

    Returns:
      ``right`` bool ``[B, L]``.
    """
    keys = fold_in(keys, restart)
    start = starting_points(uniform_start, keys, images, threat)
    path = attacks.pgd_path(
        attacks.scaled(logits_fn, scale),
        start,
        images,
        labels,
        threat=threat,
        steps=steps,
        step_size=step_size,
    )
    right = jax.lax.map(lambda x: jnp.argmax(logits_fn(x), -1) == labels, path)
    return {"right": right.T}


def unbounded(
    logits_fn: LogitsFn,
    keys: chex.PRNGKey,
    images: chex.Array,
    labels: chex.Array,
    *,
    norm: str,
) -> dict[str, chex.Array]:
    """Returns whether images are still classified correctly under PGD without a bound, bool ``[B]``."""
    radius = 1.0 if norm == "linf" else float(np.sqrt(images[0].size))
    shown = attacks.pgd(
        logits_fn,
        keys,
        images,
        labels,
        threat=ThreatModel(radius, norm),
        steps=UNBOUNDED_STEPS,
        step_size=2.5 * radius / UNBOUNDED_STEPS,
    )
    return {"right": jnp.argmax(logits_fn(shown), -1) == labels}


def gradient_free(
    logits_fn: LogitsFn,
    keys: chex.PRNGKey,
    images: chex.Array,
    labels: chex.Array,
    *,
    threat: ThreatModel,
    queries: int = QUERIES,
) -> dict[str, chex.Array]:
    """Returns whether images are still classified correctly under Square, bool ``[B]``."""
    shown = attacks.square(logits_fn, keys, images, labels, threat=threat, queries=queries)
    return {"right": jnp.argmax(logits_fn(shown), -1) == labels}


def crafted(
    logits_fn: LogitsFn,
    keys: chex.PRNGKey,
    images: chex.Array,
    labels: chex.Array,
    *,
    threat: ThreatModel,
    step_size: float,
) -> dict[str, chex.Array]:
    """Returns images of PGD on the margin, ``[B, H, W, C]``: made on a surrogate, shown to the victim."""
    attack = partial(attacks.pgd, threat=threat, steps=MAIN_STEPS, step_size=step_size)
    return {"images": attack(logits_fn, keys, images, labels, loss=attacks.negative_margin)}


def shown(
    logits_fn: LogitsFn,
    keys: chex.PRNGKey,
    images: chex.Array,
    labels: chex.Array,
    instead: chex.Array,
) -> dict[str, chex.Array]:
    """Returns whether images shown in place of these are classified correctly, bool ``[B]``."""
    del keys, images
    return {"right": jnp.argmax(logits_fn(instead), -1) == labels}


def gradient_calls(predict: LogitsFn, images: chex.Array) -> int:
    """Returns how many derivatives a model takes while it computes its logits: 0 for a plain network."""
    asked, source = 0, inspect.unwrap(jax.grad).__code__.co_filename

    def profile(frame: types.FrameType, event: str, _: Any) -> None:
        nonlocal asked
        code = frame.f_code
        asked += event == "call" and code.co_name in _DERIVATIVES and code.co_filename == source

    before = sys.getprofile()
    sys.setprofile(profile)
    try:
        # An axis that no trace has seen before: what JAX has cached would not run, and not be counted.
        fresh = jax.vmap(predict, axis_name=object())
        jax.eval_shape(fresh, jax.ShapeDtypeStruct((1, *images.shape), np.float32))
    finally:
        sys.setprofile(before)
    return asked


def plan_measurements(
    victim: Victim,
    ids: np.ndarray,
    *,
    threat: ThreatModel,
    step_size: float,
    surrogate: Victim | None = None,
) -> dict[str, Callable[[], dict[str, np.ndarray]]]:
    """Returns all measurements on a sample, in order; each is computed when it is called.

    Args:
      victim: the model under attack.
      ids: indices of the sample's images ``[n]``.
      threat: of the evaluation.
      step_size: of the evaluation's attacks.
      surrogate: another model of the same images, for the attack by transfer.

    Returns:
      Name of each measurement to a function that returns arrays ``[n, ...]``.
    """
    look = victim.compile(outputs)
    pgd = victim.compile(partial(probe, threat=threat, step_size=step_size))
    plans: dict[str, Callable[[], dict[str, np.ndarray]]] = {
        name: partial(look, ids) for name in FORWARD_NAMES
    }
    # The same images in different batches: backwards, and every batch filled up by another image.
    plans["backwards"] = lambda: {name: x[::-1] for name, x in look(ids[::-1]).items()}
    plans["inference"] = lambda: {
        "calls": np.full(len(ids), gradient_calls(victim.predict, victim.images[:1]))
    }
    short = np.full(len(STEPS), MAIN_STEPS)
    plans["steps"] = lambda: pgd(ids, scale=np.float32(1), steps=np.array(STEPS), restart=np.int32(0))
    for scale, name in SCALE_NAMES.items():
        plans[name] = partial(pgd, ids, scale=np.float32(scale), steps=short, restart=np.int32(0))
    for restart, name in RESTART_NAMES.items():
        plans[name] = partial(pgd, ids, scale=np.float32(1), steps=short, restart=np.int32(restart))
    plans["unbounded"] = partial(victim.compile(partial(unbounded, norm=threat.norm)), ids)
    plans["gradient_free"] = partial(victim.compile(partial(gradient_free, threat=threat)), ids)
    if surrogate is not None:
        craft = surrogate.compile(partial(crafted, threat=threat, step_size=step_size))
        plans["transfer"] = lambda: victim.compile(shown)(ids, craft(ids)["images"])
    return plans
