"""AutoPGD in L1: sparse steps, whose number of entries follows the perturbation, within ever smaller balls.

A step moves two thirds as many entries as the best perturbation so far has changed. At certain steps the
search looks at each image: if the perturbation became sparser since the last check, the step is made as long
as the radius, and the search returns to the best point found; otherwise the step is made shorter. The first
30 % of the steps search in three times the radius and the next 30 % in two times the radius; each ball's
search starts at the best point of the one before. Only points in the ball of the threat model count.

:func:`robal_jax.attacks.apgd` runs it for threat models of L1. With the same starts its losses equal those of
the reference implementation, ``use_largereps``: ``experiments/results/l1.md``.

Source: Croce and Hein, "Mind the box: l1-APGD for sparse adversarial attacks on image classifiers" (ICML
2021); constants as in the reference implementation.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from robal_jax import checks, losses
from robal_jax.attacks.attempts import record, verdicts
from robal_jax.attacks.l1 import changed, sparse_direction
from robal_jax.attacks.projected_gradient import loss_gradient
from robal_jax.attacks.threat import NORMS, LogitsFn, RandomLogitsFn, ThreatModel, check_attack, like_images
from robal_jax.keys import fold_in

LARGEST = 3
"""Factor of the radius in the first ball; 2 and 1 follow."""


def sparse_start(key: chex.PRNGKey, image: chex.Array, threat: ThreatModel) -> chex.Array:
    """A random point in three times the threat model's ball, ``project(x + n)`` with ``n ~ N(0, 1)``.

    Example:
      >>> image, threat = jnp.full((8, 8, 1), 0.5), ThreatModel(1.0, "l1")
      >>> start = sparse_start(jax.random.key(0), image, threat)
      >>> print(f"{jnp.abs(start - image).sum():.2f}, {(start != image).sum()} of 64 pixels")
      3.00, 10 of 64 pixels
    """
    noise = jax.random.normal(key, image.shape, image.dtype)
    return threat.scaled(LARGEST).project((image + noise)[None], image[None])[0]


class SparseSearch(NamedTuple):
    """State of the searches for B images.

    Attributes:
      x: origin of the next step, ``[B, H, W, C]``.
      gradient: of the loss at ``x``.
      step_size: in units of the ball's radius, ``[B]``.
      changed: number of entries in which the best image differed from the image at the last check, ``[B]``.
      best: image of the highest loss in this ball, ``[B, H, W, C]``.
      best_gradient: gradient there.
      best_loss: loss there, ``[B]``.
      robust: whether every image in this ball was classified correctly, bool ``[B]``.
      adversarial: last image in this ball that was misclassified; the first one if there is none.
    """

    x: chex.Array
    gradient: chex.Array
    step_size: chex.Array
    changed: chex.Array
    best: chex.Array
    best_gradient: chex.Array
    best_loss: chex.Array
    robust: chex.Array
    adversarial: chex.Array


class Schedule(NamedTuple):
    """Actions at each look at the model, arrays ``[steps + 3]``.

    Attributes:
      factor: of the radius.
      first: whether the look is at the start of a ball's search, without a step.
      check: whether step size and number of entries are chosen after it.
    """

    factor: np.ndarray
    first: np.ndarray
    check: np.ndarray


def schedule(steps: int) -> Schedule:
    """Divides the steps among the balls of 3, 2 and 1 times the radius, with checks after 4 % of each part.

    Args:
      steps: of the whole search, at least 2.

    Example:
      >>> looks = schedule(10)
      >>> print(looks.factor[looks.first], looks.factor[~looks.first])
      [3 2 1] [3 3 3 2 2 2 1 1 1 1]
    """
    part = -(-3 * steps // 10)
    factor, first, check = [], [], []
    for times, length in ((LARGEST, part), (2, part), (1, steps - 2 * part)):
        window = max(length // 25, 1)
        factor += [times] * (length + 1)
        first += [True] + [False] * length
        check += [False] + [number % window == 0 for number in range(1, length + 1)]
    return Schedule(np.array(factor), np.array(first), np.array(check))


def sparse_search(
    logits_fn: LogitsFn | RandomLogitsFn,
    start: chex.Array,
    images: chex.Array,
    labels: chex.Array,
    *,
    threat: ThreatModel,
    steps: int = 100,
    loss: losses.Loss = losses.cross_entropy,
    eot: int = 0,
    keys: chex.PRNGKey | None = None,
    observe: Callable[[chex.Array, chex.Array], Any] = lambda x, logits: None,
) -> tuple[SparseSearch, Any]:
    """The whole search from given starting points; compiles once, whatever the number of steps.

    Args:
      logits_fn: the model.
      start: ``x_0 [B, H, W, C]``; projected into three times the ball.
      images: ``x [B, H, W, C]`` within their bounds.
      labels: ``[B]``.
      threat: allowed images, in L1.
      steps: at least 2; the model is looked at in ``steps + 3`` points.
      loss: per example; ascended.
      eot: draws of a random model over which a gradient is averaged; 0 for a model that is not random.
      keys: ``[B]``, of a random model.
      observe: function of the images and logits ``[B, K]`` at each look, a hook for tests.

    Returns:
      The last state, and the values of ``observe``, stacked ``[steps + 3, ...]``.

    Raises:
      ValueError: an argument or the model's logits have a wrong shape, type or range.
    """
    threat = check_attack(threat, images, labels, norms=tuple(NORMS))
    checks.same_shape(images, start=start)
    checks.at_least(2, steps=steps)
    images, start = jax.lax.stop_gradient((images, start))

    def step(state: SparseSearch, at: tuple[chex.Array, Schedule]) -> tuple[SparseSearch, Any]:
        number, (factor, first, check) = at
        x = next_images(state, images, threat.scaled(factor.astype(images.dtype)), first)
        draw_keys = None if keys is None else fold_in(keys, number)
        logits, value, gradient = loss_gradient(logits_fn, loss, x, labels, draw_keys, eot=eot)
        seen = logits, value.astype(x.dtype), gradient
        begun, judged = begin(x, *seen, images, labels), judge(state, x, *seen, images, labels, check)
        state = jax.tree.map(lambda new, old: jnp.where(first, new, old), begun, judged)
        return state, observe(x, seen[0])

    plan = jax.tree.map(jnp.asarray, schedule(steps))
    nothing = jnp.zeros(labels.shape, images.dtype)
    state = begin(start, jnp.zeros((len(labels), 1)), nothing, jnp.zeros_like(start), images, labels)
    looks = jnp.arange(len(plan.first))
    return jax.lax.stop_gradient(jax.lax.scan(step, state, (looks, plan)))


def next_images(search: SparseSearch, images: chex.Array, ball: ThreatModel, first: chex.Array) -> chex.Array:
    """Images after one sparse step; or the best ones so far, projected into a smaller ball."""
    entries = jnp.maximum((2 * search.changed + 2) // 3, 1)
    length = like_images(search.step_size * ball.epsilon, images)
    moved = search.x + length * sparse_direction(search.gradient, entries)
    return ball.project(jnp.where(first, search.best, moved), images)


def begin(
    x: chex.Array,
    logits: chex.Array,
    loss: chex.Array,
    gradient: chex.Array,
    images: chex.Array,
    labels: chex.Array,
) -> SparseSearch:
    """State of the search in a ball before its first step, with the results at ``x``."""
    return SparseSearch(
        x=x,
        gradient=gradient,
        step_size=jnp.ones(labels.shape, x.dtype),
        changed=changed(x, images),
        best=x,
        best_gradient=gradient,
        best_loss=loss,
        robust=verdicts(logits, labels)[0],
        adversarial=x,
    )


def judge(
    search: SparseSearch,
    x: chex.Array,
    logits: chex.Array,
    loss: chex.Array,
    gradient: chex.Array,
    images: chex.Array,
    labels: chex.Array,
    check: chex.Array,
) -> SparseSearch:
    """State of the search with the results at ``x``; at a check, steps are made longer or shorter.

    The step is as long as the radius if the best perturbation has less than 95 % of the entries that it had
    at the last check; otherwise it is divided by 1.5, down to a tenth of the radius.
    """
    found = record(search, x, logits, loss, gradient, labels)
    entries = changed(found["best"], images)
    sparser = check & (20 * entries < 19 * search.changed)
    back = like_images(sparser, x)
    shorter = jnp.where(check, jnp.maximum(search.step_size / 1.5, 0.1), search.step_size)
    return SparseSearch(
        x=jnp.where(back, found["best"], x),
        gradient=jnp.where(back, found["best_gradient"], gradient),
        step_size=jnp.where(sparser, 1.0, shorter),
        changed=jnp.where(check, entries, search.changed),
        **found,
    )
