"""AutoPGD: projected gradient ascent that chooses its own step size.

The first steps are twice as long as the radius. At certain steps the search checks each image: if the loss
rose too rarely since the last check, or if its best value did not change, the image's step size is halved
and its search returns to the best point found. The number of steps is the only setting::

    adversarial = apgd(logits_fn, key, images, labels, threat=ThreatModel(8 / 255), loss=dlr)

Every image has its own step size, so its result does not depend on the images that share its batch. In
L-infinity the iterates equal those of the reference implementation, which a test checks; in L2 the formulas
are the same. L1 has a search of its own, ``sparse_autopgd``.

Source: Croce and Hein, "Reliable evaluation of adversarial robustness with an ensemble of diverse
parameter-free attacks" (ICML 2020); constants as in its reference implementation.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from robal_jax import checks, losses
from robal_jax.attacks.attempts import record, verdicts
from robal_jax.attacks.margins import TINY, ranked_class, targeted_dlr
from robal_jax.attacks.projected_gradient import loss_gradient
from robal_jax.attacks.sparse_autopgd import SparseSearch, sparse_search, sparse_start
from robal_jax.attacks.threat import (
    NORMS,
    LogitsFn,
    RandomLogitsFn,
    ThreatModel,
    check_attack,
    like_images,
    starting_points,
)
from robal_jax.keys import fold_in, image_keys


def apgd(
    logits_fn: LogitsFn | RandomLogitsFn,
    key: chex.PRNGKey,
    images: chex.Array,
    labels: chex.Array,
    *,
    threat: ThreatModel,
    steps: int = 100,
    loss: losses.Loss = losses.cross_entropy,
    rho: float = 0.75,
    eot: int = 0,
) -> chex.Array:
    """AutoPGD from one random start.

    Args:
      logits_fn: the model; with ``eot`` it takes keys ``[B]`` as second argument.
      key: one key, or one per image ``[B]``.
      images: ``[B, H, W, C]`` within the threat model's bounds.
      labels: ``[B]``.
      threat: allowed images.
      steps: of the search, at least 1; in L1 at least 2.
      loss: per example; ascended.
      rho: see :func:`search`; not read in L1.
      eot: see :func:`search`.

    Returns:
      ``[B, H, W, C]``: the last misclassified image of each search, or the image of the highest loss if none
      was misclassified. No gradient flows back.

    Raises:
      ValueError: an argument or the model's logits have a wrong shape, type or range.

    Source: Croce and Hein (ICML 2020), algorithm 1.

    Example:
      >>> logits_fn = lambda x: jnp.outer(x.reshape(-1) - 0.5, jnp.array([-1.0, 1.0]))  # class 1 is bright
      >>> images, labels = jnp.array([0.45, 0.2]).reshape(2, 1, 1, 1), jnp.array([0, 0])
      >>> found = apgd(logits_fn, jax.random.key(0), images, labels, threat=ThreatModel(0.1), steps=10)
      >>> print(jnp.array_str(found.reshape(-1), precision=2), logits_fn(found).argmax(-1))
      [0.55 0.3 ] [1 0]
    """
    threat = check_attack(threat, images, labels, norms=tuple(NORMS))
    checks.at_least(1, steps=steps)
    keys = image_keys(key, images)
    settings: dict[str, Any] = {"threat": threat, "steps": steps, "loss": loss, "eot": eot}
    settings["keys"] = keys if eot else None
    state: Search | SparseSearch
    if threat.norm == "l1":
        start = starting_points(sparse_start, keys, images, threat)
        state, _ = sparse_search(logits_fn, start, images, labels, **settings)
    else:
        start = starting_points(boundary_start, keys, images, threat)
        state, _ = search(logits_fn, start, images, labels, rho=rho, **settings)
    return jnp.where(like_images(state.robust, images), state.best, state.adversarial)


def targeted_apgd(
    logits_fn: LogitsFn,
    key: chex.PRNGKey,
    images: chex.Array,
    labels: chex.Array,
    *,
    threat: ThreatModel,
    rank: int | chex.Array = 2,
    steps: int = 100,
    rho: float = 0.75,
) -> chex.Array:
    """AutoPGD on the targeted DLR loss, towards the class whose clean logit has a given rank.

    Args:
      logits_fn: the model.
      key: one key, or one per image ``[B]``.
      images: ``[B, H, W, C]`` within the threat model's bounds.
      labels: ``[B]``.
      threat: allowed images.
      rank: 2 for the second highest logit, up to ``K``; may be traced, so that one compilation serves all
        targets.
      steps: of the search, at least 1; in L1 at least 2.
      rho: see :func:`search`; not read in L1.

    Returns:
      See :func:`apgd`.

    Raises:
      ValueError: see :func:`apgd`; or the rank is out of range.

    Example:
      >>> logits_fn = lambda x: jnp.stack([1 - x, 0 * x, x, 0 * x - 1], -1).reshape(-1, 4)
      >>> images, labels = jnp.array([0.45, 0.2]).reshape(2, 1, 1, 1), jnp.array([0, 0])
      >>> found = targeted_apgd(logits_fn, jax.random.key(0), images, labels,
      ...                       threat=ThreatModel(0.1), rank=2, steps=10)  # towards class 2
      >>> print(jnp.array_str(found.reshape(-1), precision=2), logits_fn(found).argmax(-1))
      [0.55 0.3 ] [2 0]
    """
    threat = check_attack(threat, images, labels, norms=tuple(NORMS))
    logits = checks.logits_of(len(images), logits_fn(images))
    checks.rank(rank, logits.shape[-1], least=2)
    targets = ranked_class(logits, rank)

    def loss(logits: chex.Array, labels: chex.Array) -> chex.Array:
        return targeted_dlr(logits, labels, targets=targets)

    return apgd(logits_fn, key, images, labels, threat=threat, steps=steps, loss=loss, rho=rho)


def boundary_start(key: chex.PRNGKey, image: chex.Array, threat: ThreatModel) -> chex.Array:
    """A random point on the boundary of the ball, clipped to the bounds."""
    if threat.norm == "l2":
        noise = jax.random.normal(key, image.shape, image.dtype)
        size = jnp.linalg.norm(noise.reshape(-1))
    else:
        noise = jax.random.uniform(key, image.shape, image.dtype, -1.0, 1.0)
        size = jnp.abs(noise).max()
    return jnp.clip(image + threat.epsilon * noise / (size + TINY), threat.lower, threat.upper)


class Search(NamedTuple):
    """State of the searches for B images.

    Attributes:
      x: origin of the next step, ``[B, H, W, C]``.
      previous: origin of the last step, ``[B, H, W, C]``.
      gradient: of the loss at ``x``.
      step_size: ``[B]``.
      best: image of the highest loss, ``[B, H, W, C]``.
      best_gradient: gradient there.
      best_loss: loss there, ``[B]``.
      loss: after the last step, ``[B]``; 0 before the first step, as in the reference.
      rises: number of steps since the last check in which the loss rose, ``[B]``.
      best_at_check: highest loss at the last check, ``[B]``.
      halved_at_check: whether the step size was halved at the last check, bool ``[B]``.
      robust: whether every image so far was classified correctly, bool ``[B]``.
      adversarial: last image that was misclassified; the start if there is none.
    """

    x: chex.Array
    previous: chex.Array
    gradient: chex.Array
    step_size: chex.Array
    best: chex.Array
    best_gradient: chex.Array
    best_loss: chex.Array
    loss: chex.Array
    rises: chex.Array
    best_at_check: chex.Array
    halved_at_check: chex.Array
    robust: chex.Array
    adversarial: chex.Array


def search(
    logits_fn: LogitsFn | RandomLogitsFn,
    start: chex.Array,
    images: chex.Array,
    labels: chex.Array,
    *,
    threat: ThreatModel,
    steps: int = 100,
    loss: losses.Loss = losses.cross_entropy,
    rho: float = 0.75,
    eot: int = 0,
    keys: chex.PRNGKey | None = None,
    observe: Callable[[chex.Array, chex.Array], Any] = lambda x, logits: None,
) -> tuple[Search, Any]:
    """The whole search from given starting points; compiles once, whatever the number of steps.

    Args:
      logits_fn: the model.
      start: ``x_0 [B, H, W, C]`` within the threat model.
      images: ``x [B, H, W, C]`` within its bounds.
      labels: ``[B]``.
      threat: allowed images.
      steps: at least 1.
      loss: per example; ascended.
      rho: share of steps in which the loss must rise, or the step size is halved.
      eot: draws of a random model over which a gradient is averaged; 0 for a model that is not random.
      keys: ``[B]``, of a random model.
      observe: function of the images and logits ``[B, K]`` after each step, a hook for tests: they compare
        the search's path with the reference implementation's.

    Returns:
      The last state, and the values of ``observe``, stacked ``[steps, ...]``.

    Raises:
      ValueError: an argument or the model's logits have a wrong shape, type or range.
    """
    threat = check_attack(threat, images, labels)
    checks.same_shape(images, start=start)
    checks.at_least(1, steps=steps)
    checks.not_negative(rho=rho)
    images, start = jax.lax.stop_gradient((images, start))

    def look(x: chex.Array, number: chex.Array) -> tuple[chex.Array, chex.Array, chex.Array]:
        draw_keys = None if keys is None else fold_in(keys, number)
        return loss_gradient(logits_fn, loss, x, labels, draw_keys, eot=eot)

    def step(state: Search, at: tuple[chex.Array, chex.Array]) -> tuple[Search, Any]:
        number, window = at
        x = next_images(state, images, threat, number == 0)
        logits, value, gradient = look(x, number + 1)
        return judge(state, x, logits, value, gradient, labels, window, rho), observe(x, logits)

    state = begin(*look(start, jnp.int32(0)), start, labels, threat)
    windows = jnp.asarray(check_windows(steps))
    return jax.lax.stop_gradient(jax.lax.scan(step, state, (jnp.arange(steps), windows)))


def check_windows(steps: int) -> np.ndarray:
    """Number of steps that the check after each step covers; 0 where there is no check.

    The first window is 22 % of all steps; each window is 3 % shorter than the one before, down to 6 %.

    Args:
      steps: of the whole search, at least 1.

    Returns:
      int ``[steps]``.
    """
    window, shortest, shorter = (max(int(share * steps), 1) for share in (0.22, 0.06, 0.03))
    windows, step = np.zeros(steps, np.int32), window
    while step <= steps:
        windows[step - 1] = window
        window = max(window - shorter, shortest)
        step += window
    return windows


def begin(
    logits: chex.Array,
    loss: chex.Array,
    gradient: chex.Array,
    start: chex.Array,
    labels: chex.Array,
    threat: ThreatModel,
) -> Search:
    """State of the search before its first step.

    Args:
      logits: at the starting points, ``[B, K]``.
      loss: there, ``[B]``.
      gradient: of the loss there, ``[B, H, W, C]``.
      start: ``[B, H, W, C]`` within the threat model.
      labels: ``[B]``.
      threat: allowed images.
    """
    return Search(
        x=start,
        previous=start,
        gradient=gradient,
        step_size=jnp.full(labels.shape, 2 * threat.epsilon, start.dtype),
        best=start,
        best_gradient=gradient,
        best_loss=loss,
        loss=jnp.zeros_like(loss),
        rises=jnp.zeros(labels.shape, jnp.int32),
        best_at_check=loss,
        halved_at_check=jnp.ones(labels.shape, bool),
        robust=verdicts(logits, labels)[0],
        adversarial=start,
    )


def next_images(search: Search, images: chex.Array, threat: ThreatModel, first: chex.Array) -> chex.Array:
    """Images after one step along the gradient, averaged with the direction of the step before.

    ``z = project(x_t + eta * ascent_direction(g_t))``;
    ``x_{t+1} = project(x_t + a (z - x_t) + (1 - a) (x_t - x_{t-1}))``, ``a`` = 0.75, 1 in the first step.
    """
    a = jnp.where(first, 1.0, 0.75).astype(images.dtype)
    step = like_images(search.step_size, images) * threat.ascent_direction(search.gradient)
    stepped = threat.project(search.x + step, images)
    moved = search.x + (stepped - search.x) * a + (search.x - search.previous) * (1 - a)
    return threat.project(moved, images)


def judge(
    search: Search,
    x: chex.Array,
    logits: chex.Array,
    loss: chex.Array,
    gradient: chex.Array,
    labels: chex.Array,
    window: chex.Array,
    rho: float,
) -> Search:
    """State of the search with the results at ``x``; after a window of steps, step sizes are halved.

    An image's step size is halved, and its search returns to the best point, if the loss rose in at most
    ``rho * window`` of the steps, or if the last check did not halve it and the best loss is still the same.
    """

    def where(condition: chex.Array, yes: chex.Array, no: chex.Array) -> chex.Array:
        return jnp.where(like_images(condition, x), yes, no)

    found = record(search, x, logits, loss, gradient, labels)
    rises = search.rises + (loss > search.loss).astype(search.rises.dtype)

    check = window > 0
    stuck = ~search.halved_at_check & (search.best_at_check >= found["best_loss"])
    rarely = rises.astype(float) <= rho * window.astype(float)
    halve = check & (rarely | stuck)
    return Search(
        x=where(halve, found["best"], x),
        previous=search.x,
        gradient=where(halve, found["best_gradient"], gradient),
        step_size=jnp.where(halve, search.step_size / 2, search.step_size),
        loss=loss,
        rises=jnp.where(check, 0, rises),
        best_at_check=jnp.where(check, found["best_loss"], search.best_at_check),
        halved_at_check=jnp.where(check, halve, search.halved_at_check),
        **found,
    )
