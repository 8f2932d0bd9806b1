"""Measurements of the audit on a sample of images: attacks with other settings, and properties of the model.

Nothing is judged here: :func:`plan_measurements` names all measurements, each a call that returns arrays, so
that they can be saved one by one; ``verdicts.py`` judges the arrays.
"""

import dataclasses
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
from robal_jax.attacks.threat import finite, like_images, of_class
from robal_jax.evaluation.victim import Victim
from robal_jax.keys import fold_in

SCALES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)

STEPS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)

MAIN_STEPS = 20  # of the attack whose settings are in question: PGD-20

RESTARTS = 10

QUERIES = 1000  # of Square

UNBOUNDED_STEPS = 100

FORWARDS = 5  # passes that must agree

LARGEST_FACTOR = 1024  # of the radii, each twice as large as the one before

# Names of the measurements that are made several times.
FORWARD_NAMES = tuple(f"forward_{number}" for number in range(FORWARDS))
SCALE_NAMES = {scale: f"rescaled_{scale:g}" for scale in SCALES}
RESTART_NAMES = {restart: f"restart_{restart}" for restart in range(1, RESTARTS)}  # 0 is in "steps"
RADIUS_NAME = "radius_{:g}"  # by factor of the threat model's radius; 0 is clean, and 1 is in "steps"

_DERIVATIVES = ("vjp", "_vjp", "_jvp", "linearize")  # in JAX's file of jax.grad; all others call one of these

StepSize = float | tuple[float, ...]
"""Of PGD; or one per class."""

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


def sample_ids(images: int, examples: int, seed: int) -> np.ndarray:
    """Returns the numbers of the images in the audit's sample, sorted; a larger one has the smaller one."""
    return np.sort(np.random.default_rng(seed).permutation(images)[:examples])


def outputs(
    logits_fn: LogitsFn, keys: chex.PRNGKey, images: chex.Array, labels: chex.Array
) -> dict[str, chex.Array]:
    """Returns logits ``[B, K]``."""
    del keys, labels
    return {"logits": logits_fn(images)}


def gradients(
    logits_fn: LogitsFn,
    keys: chex.PRNGKey,
    images: chex.Array,
    labels: chex.Array,
    *,
    threat: ThreatModel,
    step_size: StepSize,
) -> dict[str, chex.Array]:
    """Looks at gradients where an attack meets them: at the clean images, where PGD starts, one step later.

    Returns:
      ``size`` ``[B]``, the sum of the absolute gradient of the cross-entropy at the clean images, without
      what is not finite; ``least`` ``[B]``, the least of these sums in all three places; ``finite`` bool
      ``[B]``, whether the gradient is finite in all three; and ``margin_size``, ``margin_least`` and
      ``margin_finite``, the same of the margin.
    """
    threat, length = threat.of(labels), of_class(step_size, labels, per="step sizes")
    length = like_images(length, images) if jnp.ndim(length) else length
    start = threat.project(starting_points(uniform_start, keys, images, threat), images)

    def of(loss: Callable[[chex.Array, chex.Array], chex.Array]) -> dict[str, chex.Array]:
        def gradient(x: chex.Array) -> chex.Array:
            return jax.grad(lambda x: loss(logits_fn(x), labels).sum())(x)

        first = threat.project(start + length * threat.ascent_direction(finite(gradient(start))), images)
        found = jax.lax.map(gradient, jnp.stack([images, start, first]))
        is_finite, pixels = jnp.isfinite(found), tuple(range(2, found.ndim))
        sizes = jnp.abs(jnp.where(is_finite, found, 0.0)).sum(pixels)
        return {"size": sizes[0], "least": sizes.min(0), "finite": is_finite.all((0, *pixels))}

    of_margin = of(lambda logits, labels: -attacks.margin(logits, labels))
    return of(losses.cross_entropy) | {f"margin_{name}": values for name, values in of_margin.items()}


def probe(
    logits_fn: LogitsFn,
    keys: chex.PRNGKey,
    images: chex.Array,
    labels: chex.Array,
    *,
    scale: chex.Array,
    steps: chex.Array,
    restart: chex.Array,
    factor: chex.Array,
    threat: ThreatModel,
    step_size: StepSize,
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
      factor: of radius and step size.
      threat: what the attack may do.
      step_size: of PGD.

    Returns:
      ``right`` bool ``[B, L]``; ``margin`` ``[B, L]``, by how much the true class's logit exceeds all others.
    """
    keys = fold_in(keys, restart)
    threat = threat.of(labels).scaled(factor)
    start = starting_points(uniform_start, keys, images, threat)
    path = attacks.pgd_path(
        attacks.scaled(logits_fn, scale),
        start,
        images,
        labels,
        threat=threat,
        steps=steps,
        step_size=of_class(step_size, labels, per="step sizes") * factor,
    )
    seen = jax.lax.map(logits_fn, path)
    margins = jax.vmap(lambda logits: attacks.margin(logits, labels))(seen)
    return {"right": (jnp.argmax(seen, -1) == labels[None]).T, "margin": margins.T}


def unbounded(
    logits_fn: LogitsFn,
    keys: chex.PRNGKey,
    images: chex.Array,
    labels: chex.Array,
    *,
    threat: ThreatModel,
) -> dict[str, chex.Array]:
    """Returns whether images are still classified correctly under PGD without a bound, bool ``[B]``."""
    free = without_bound(threat, images[0].size)
    shown = attacks.pgd(
        logits_fn,
        keys,
        images,
        labels,
        threat=free,
        steps=UNBOUNDED_STEPS,
        step_size=2.5 * free.epsilon / UNBOUNDED_STEPS,
    )
    return {"right": jnp.argmax(logits_fn(shown), -1) == labels}


def without_bound(threat: ThreatModel, pixels: int) -> ThreatModel:
    """Returns a threat model with the radius within which every image lies, whatever the image.

    Example:
      >>> without_bound(ThreatModel(0.1), 64).epsilon, without_bound(ThreatModel(0.1, "l2"), 64).epsilon
      (1.0, 8.0)
    """
    side = threat.upper - threat.lower
    radius = side if threat.norm == "linf" else side * float(np.sqrt(pixels))
    return dataclasses.replace(threat, epsilon=radius)


def radius_unit(threat: ThreatModel) -> float:
    """Returns the threat model's own radius in the curve of the accuracy.

    It is 1 if classes have their own radii: the curve then counts in multiples of each image's own.

    Example:
      >>> radius_unit(ThreatModel(0.1)), radius_unit(ThreatModel((0.1, 0.2)))
      (0.1, 1.0)
    """
    return 1.0 if isinstance(threat.epsilon, tuple) else float(threat.epsilon)


def radius_factors(threat: ThreatModel, pixels: int) -> tuple[float, ...]:
    """Returns the factors of the radius in the curve of the accuracy, without 0 and 1; the last has no bound.

    Example:
      >>> radius_factors(ThreatModel(0.1), 64)
      (0.25, 0.5, 2.0, 4.0, 8.0, 10.0)
    """
    last = without_bound(threat, pixels).epsilon / float(np.min(threat.epsilon))
    doubled = (float(2**power) for power in (-2, -1, *range(1, LARGEST_FACTOR.bit_length())))
    return (*(factor for factor in doubled if factor < last), *([last] if last > 1 else []))


def margin(
    logits_fn: LogitsFn,
    keys: chex.PRNGKey,
    images: chex.Array,
    labels: chex.Array,
    *,
    threat: ThreatModel,
    step_size: StepSize,
) -> dict[str, chex.Array]:
    """Returns ``right`` and ``margin`` as :func:`probe` does, both ``[B]``, under PGD-20 on the margin.

    Its steps do not depend on the logits' scale.
    """
    made = crafted(logits_fn, keys, images, labels, threat=threat, step_size=step_size)["images"]
    logits = logits_fn(made)
    return {"right": jnp.argmax(logits, -1) == labels, "margin": attacks.margin(logits, labels)}


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
    step_size: StepSize,
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
    step_size: StepSize,
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
    settings: dict[str, Any] = {"threat": threat, "step_size": step_size}
    compiled = partial(victim.compile, size=victim.size_for(len(ids)))
    look, pgd = compiled(outputs), compiled(partial(probe, **settings))
    plans: dict[str, Callable[[], dict[str, np.ndarray]]] = {
        name: partial(look, ids) for name in FORWARD_NAMES
    }

    def among_others() -> dict[str, np.ndarray]:
        """The same images in another order, drawn once and for all, and each half by itself."""
        order = np.random.default_rng(0).permutation(len(ids))
        halves = [look(ids[half]) for half in np.array_split(order, 2) if len(half)]
        return {
            name: np.concatenate([half[name] for half in halves])[np.argsort(order)] for name in halves[0]
        }

    plans["among_others"] = among_others
    plans["inference"] = lambda: {
        "calls": np.full(len(ids), gradient_calls(victim.predict, victim.images[:1]))
    }
    plans["both_gradients"] = partial(compiled(partial(gradients, **settings)), ids)
    plans["margin"] = partial(compiled(partial(margin, **settings)), ids)
    short = np.full(len(STEPS), MAIN_STEPS)

    def attack(steps: np.ndarray = short, scale: float = 1, restart: int = 0, factor: float = 1) -> Any:
        shared = {"scale": np.float32(scale), "restart": np.int32(restart), "factor": np.float32(factor)}
        return pgd(ids, steps=steps, **shared)

    def within(factor: float) -> dict[str, np.ndarray]:
        return {**attack(factor=factor), "radius": np.full(len(ids), factor * radius_unit(threat))}

    plans["steps"] = partial(attack, np.array(STEPS))
    for scale, name in SCALE_NAMES.items():
        plans[name] = partial(attack, scale=scale)
    for restart, name in RESTART_NAMES.items():
        plans[name] = partial(attack, restart=restart)
    for factor in radius_factors(threat, victim.pixels):
        plans[RADIUS_NAME.format(factor)] = partial(within, factor)
    plans["unbounded"] = partial(compiled(partial(unbounded, threat=threat)), ids)
    plans["gradient_free"] = partial(compiled(partial(gradient_free, threat=threat)), ids)
    if surrogate is not None:
        craft = surrogate.compile(partial(crafted, **settings), size=surrogate.size_for(len(ids)))
        plans["transfer"] = lambda: compiled(shown)(ids, craft(ids)["images"])
    return plans
