"""Minimum-norm attacks: the smallest perturbation that changes the prediction, whatever its size.

A robust accuracy answers for one radius. The distances of the closest adversarial images answer for all radii
at once: the robust accuracy at epsilon is the share of images whose distance is larger, see
``robal_jax.distances``. :func:`fmn` minimises L-infinity or L2, :func:`ddn` L2::

    closest = fmn(logits_fn, None, images, labels, threat=ThreatModel(8 / 255))
    median = jnp.median(closest.distance)

Both raise a loss inside of a ball around the image whose radius they adapt in each step: it shrinks while the
image is misclassified, and grows while it is not. So the search oscillates about the decision boundary with
ever smaller steps. A distance is an upper bound of the smallest one, as with every attack.

Neither loss saturates: where softmax rounds to 0 and 1, the gradient of the cross entropy is 0, and an attack
that follows it stands still.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from robal_jax import checks, losses
from robal_jax.attacks.attempts import verdicts
from robal_jax.attacks.margins import margin
from robal_jax.attacks.projected_gradient import loss_gradient
from robal_jax.attacks.threat import NORMS, LogitsFn, ThreatModel, check_attack, like_images, per_image
from robal_jax.errors import InputError


class Closest(NamedTuple):
    """The closest misclassified images that a search met.

    Attributes:
      images: ``[B, H, W, C]``; where none was met, one whose logits are not finite, which count as no
        prediction, or the clean image.
      distance: from the clean image ``[B]``, in the threat model's norm: 0 where the clean image is itself
        misclassified, infinity where none was met.
      found: whether one was met, bool ``[B]``.
    """

    images: chex.Array
    distance: chex.Array
    found: chex.Array


def fmn(
    logits_fn: LogitsFn,
    key: chex.PRNGKey | None,
    images: chex.Array,
    labels: chex.Array,
    *,
    threat: ThreatModel,
    n_iter: int = 100,
    step_size: float | None = None,
    gamma: float = 0.05,
) -> Closest:
    """Fast Minimum-Norm attack: a ball whose radius follows an estimate of the distance to the boundary.

    ``x_{t+1} = project_{epsilon_t}(x_t + alpha_t g / ||g||_2)``,  ``g = -grad (z_y - max_{i != y} z_i)``

    If ``x_t`` is misclassified, ``epsilon_t = min((1 - gamma_t) epsilon_{t-1}, d)`` with the smallest
    distance ``d`` so far, otherwise ``(1 + gamma_t) epsilon_{t-1}``; while nothing is found, it is at least
    ``||x_t - x|| + |z_y - max_{i != y} z_i| / ||g||_*`` with the dual norm, where a linear model would change
    its prediction. Half a cosine takes ``alpha_t`` to a hundredth of the step size, ``gamma_t`` to 0.001.

    In the paper the radius is this estimate alone while nothing is found. Where it falls short of the
    boundary by a rounding, as it may on a linear model, the search would then stay there for good. So it
    would where two logits tie, or differ by a rounding: the estimate is then 0, or too short to move an
    image. There the radius grows by at least a thousandth of the distance to the image farthest away. It is
    never longer than this distance. Logits that are not finite count as no prediction, and shrink the radius.

    Args:
      logits_fn: the model; the logits of an image must not depend on other images, so batch norm uses its
        running statistics.
      key: not read; nothing is drawn.
      images: ``x [B, H, W, C]`` within the threat model's bounds.
      labels: ``y [B]``.
      threat: its norm is minimised within its bounds; its epsilon is not read.
      n_iter: number of steps, at least 1, of one forward and one backward pass each; 1000 in the paper.
      step_size: ``alpha_0``, L2 length of the first step, in units of the image; the range of the pixels,
        ``upper - lower``, if None.
      gamma: ``gamma_0``, relative change of the radius in the first step, in [0, 1).

    Returns:
      The closest misclassified images among those of all steps; no gradient flows back.

    Raises:
      ValueError: an argument or the model's logits have a wrong shape, type or range.

    Source: Pintor, Roli, Brendel, Biggio, "Fast Minimum-norm Adversarial Attacks through Adaptive Norm
    Constraints" (NeurIPS 2021), algorithm 1.

    Example:
      >>> logits_fn = lambda x: jnp.outer(x.reshape(-1) - 0.5, jnp.array([-1.0, 1.0]))  # class 1 is bright
      >>> images, labels = jnp.array([0.45, 0.2, 0.7]).reshape(3, 1, 1, 1), jnp.array([0, 0, 0])
      >>> closest = fmn(logits_fn, None, images, labels, threat=ThreatModel(0.1))
      >>> print(jnp.array_str(closest.distance, precision=3), closest.found)
      [0.05 0.3  0.  ] [ True  True  True]
    """
    threat = check_attack(threat, images, labels)
    first_step = _range_of(threat) if step_size is None else step_size
    checks.positive(step_size=first_step)
    checks.below_one(gamma=gamma)

    def move(at: _Place, threat: ThreatModel, images: chex.Array, progress: chex.Array) -> _Move:
        change, farthest = _annealed(gamma, LAST_GAMMA, progress), _farthest(threat, images)
        dual_norm = jnp.sum(at.gradient * threat.ascent_direction(at.gradient), per_image(images))
        to_boundary = jnp.abs(at.loss) / jnp.maximum(dual_norm, jnp.finfo(images.dtype).tiny)
        way = threat.distance(at.x, images)
        estimate = way + to_boundary
        stands = (at.loss == 0) | (estimate <= jnp.finfo(images.dtype).eps * farthest)
        estimate = jnp.where(stands, way + LEAST_GROWTH * farthest, estimate)
        estimate = jnp.where(at.best < jnp.inf, 0.0, estimate)
        outwards = jnp.maximum((1 + change) * at.radius, estimate)
        inwards = jnp.minimum((1 - change) * at.radius, at.best)
        radius = jnp.minimum(jnp.where(at.right, outwards, inwards), farthest)
        moved = at.x + _annealed(first_step, LAST_STEP * first_step, progress) * _unit(at.gradient)
        return dataclasses.replace(threat, epsilon=radius).project(moved, images), radius

    def loss(logits: chex.Array, labels: chex.Array) -> chex.Array:
        return -margin(logits, labels)

    return _search(logits_fn, images, labels, threat, n_iter, loss, 0.0, move)


def ddn(
    logits_fn: LogitsFn,
    key: chex.PRNGKey | None,
    images: chex.Array,
    labels: chex.Array,
    *,
    threat: ThreatModel,
    n_iter: int = 100,
    step_size: float | None = None,
    gamma: float = 0.05,
    init_norm: float | None = None,
) -> Closest:
    """Decoupled Direction and Norm attack, for L2: steps along a sphere whose radius shrinks after a success.

    ``x_{t+1} = clip(x + epsilon_t u / ||u||)``,  ``u = x_t + alpha_t g / ||g|| - x``

    ``epsilon_t = (1 - gamma) epsilon_{t-1}`` if ``x_t`` is misclassified, else ``(1 + gamma) epsilon_{t-1}``.
    The direction of ``g`` is that of the gradient of the cross entropy, but ``g`` is the gradient of
    ``log sum_{i != y} exp z_i - z_y``, which does not vanish where the softmax saturates. Half a cosine takes
    ``alpha_t`` to a hundredth of the step size. Pixels are not quantised. The radius is never longer than the
    distance to the image farthest away. Logits that are not finite count as no prediction, and shrink it.

    Args:
      logits_fn: the model; the logits of an image must not depend on other images, so batch norm uses its
        running statistics.
      key: not read; nothing is drawn.
      images: ``x [B, H, W, C]`` within the threat model's bounds.
      labels: ``y [B]``.
      threat: L2, which is minimised within its bounds; its epsilon is not read.
      n_iter: number of steps, at least 1, of one forward and one backward pass each.
      step_size: ``alpha_0``, length of the first step, in units of the image; the range of the pixels,
        ``upper - lower``, if None.
      gamma: relative change of the radius in each step, in [0, 1).
      init_norm: ``epsilon_0`` > 0, in units of the image; the range of the pixels if None.

    Returns:
      The closest misclassified images among those of all steps; no gradient flows back.

    Raises:
      ValueError: an argument or the model's logits have a wrong shape, type or range, or the norm is not L2.

    Source: Rony et al., "Decoupling Direction and Norm for Efficient Gradient-Based L2 Adversarial Attacks
    and Defenses" (CVPR 2019), algorithm 1.

    Example:
      >>> logits_fn = lambda x: jnp.outer(x.reshape(-1) - 0.5, jnp.array([-1.0, 1.0]))  # class 1 is bright
      >>> images, labels = jnp.array([0.45, 0.2, 0.7]).reshape(3, 1, 1, 1), jnp.array([0, 0, 0])
      >>> closest = ddn(logits_fn, None, images, labels, threat=ThreatModel(0.1, "l2"))
      >>> print(jnp.array_str(closest.distance, precision=3), closest.found)
      [0.05 0.3  0.  ] [ True  True  True]
    """
    threat = check_attack(threat, images, labels)
    check_minimum_norm("ddn", threat.norm)
    first_step, first_radius = (_range_of(threat) if a is None else a for a in (step_size, init_norm))
    checks.positive(step_size=first_step, init_norm=first_radius)
    checks.below_one(gamma=gamma)

    def move(at: _Place, threat: ThreatModel, images: chex.Array, progress: chex.Array) -> _Move:
        radius = at.radius * jnp.where(at.right, 1 + gamma, 1 - gamma).astype(images.dtype)
        radius = jnp.minimum(radius, _farthest(threat, images))
        moved = at.x + _annealed(first_step, LAST_STEP * first_step, progress) * _unit(at.gradient)
        shown = images + like_images(radius, images) * _unit(moved - images)
        return jnp.clip(shown, threat.lower, threat.upper), radius

    loss = losses.soft_logit_margin
    return _search(logits_fn, images, labels, threat, n_iter, loss, first_radius, move)


MINIMUM_NORM: dict[str, Callable[..., Closest]] = {"fmn": fmn, "ddn": ddn}
"""Minimum-norm attacks by their names in a config."""


def check_minimum_norm(name: str, norm: str) -> None:
    """Refuses a name of no minimum-norm attack, or of one for another norm; '' is allowed, for none.

    Raises:
      InputError: says which to use.

    Example:
      >>> check_minimum_norm("ddn", "linf")
      Traceback (most recent call last):
      robal_jax.errors.InputError: minimum-norm attack 'ddn' is for L2, and the norm is L-infinity; use fmn
    """
    if name not in ("", *MINIMUM_NORM):
        raise InputError(f"unknown minimum-norm attack {name!r}; use '' or one of {', '.join(MINIMUM_NORM)}")
    if name == "ddn" and norm != "l2":
        raise InputError(f"minimum-norm attack 'ddn' is for L2, and the norm is {NORMS[norm]}; use fmn")


LAST_STEP = 0.01
"""Share of the step size that is left at the end."""

LAST_GAMMA = 0.001
"""Relative change of :func:`fmn`'s radius at the end."""

LEAST_GROWTH = 0.001
"""Growth of :func:`fmn`'s radius where its estimate moves no image, as a share of the farthest distance."""


class _Place(NamedTuple):
    """State of a search before a step, per image.

    Attributes:
      x: where it is, ``[B, H, W, C]``.
      loss: there, ``[B]``.
      gradient: of the loss, ``[B, H, W, C]``.
      right: whether ``x`` is classified correctly, bool ``[B]``.
      radius: of the last step, ``[B]``.
      best: smallest distance so far, ``[B]``.
    """

    x: chex.Array
    loss: chex.Array
    gradient: chex.Array
    right: chex.Array
    radius: chex.Array
    best: chex.Array


_Move = tuple[chex.Array, chex.Array]
"""The next ``x [B, H, W, C]``, and its radius ``[B]``."""


def _search(
    logits_fn: LogitsFn,
    images: chex.Array,
    labels: chex.Array,
    threat: ThreatModel,
    n_iter: int,
    loss: losses.Loss,
    first_radius: float,
    move: Callable[[_Place, ThreatModel, chex.Array, chex.Array], _Move],
) -> Closest:
    """Moves from the clean images, and keeps the closest misclassified image of each; compiles once.

    Args:
      logits_fn: the model.
      images: ``[B, H, W, C]``.
      labels: ``[B]``.
      threat: its norm and bounds.
      n_iter: number of moves.
      loss: per example; ascended.
      first_radius: before the first move.
      move: of a place, the threat model, the images and the share of the moves that are done.
    """
    checks.at_least(1, n_iter=n_iter)
    images = jax.lax.stop_gradient(images)

    def keep(closest: Closest, x: chex.Array, right: chex.Array, wrong: chex.Array) -> Closest:
        length = threat.distance(x, images)
        closer = wrong & (length < closest.distance)
        shown = closer | ~(right | wrong | closest.found)
        return Closest(
            jnp.where(like_images(shown, x), x, closest.images),
            jnp.where(closer, length, closest.distance),
            closest.found | wrong,
        )

    def step(t: chex.Array, carry: tuple[chex.Array, chex.Array, Closest]) -> tuple:
        x, radius, closest = carry
        logits, value, gradient = loss_gradient(logits_fn, loss, x, labels)
        right, wrong = verdicts(logits, labels)
        closest = keep(closest, x, right, wrong)
        place = _Place(x, value.astype(x.dtype), gradient, right, radius, closest.distance)
        progress = (t / n_iter).astype(x.dtype)
        return *move(place, threat, images, progress), closest

    radius, nowhere = (jnp.full(labels.shape, value, images.dtype) for value in (first_radius, jnp.inf))
    start = images, radius, Closest(images, nowhere, jnp.isfinite(nowhere))
    x, _, closest = jax.lax.fori_loop(0, n_iter, step, start)
    logits = checks.logits_of(len(images), logits_fn(x))
    return jax.lax.stop_gradient(keep(closest, x, *verdicts(logits, labels)))


def _annealed(first: float, last: float, progress: chex.Array) -> chex.Array:
    """Half a cosine from one number to another; ``progress`` is in [0, 1]."""
    return last + (first - last) * (1 + jnp.cos(jnp.pi * progress)) / 2


def _unit(vectors: chex.Array) -> chex.Array:
    """Divides by the L2 norm of each image, whatever the threat model's; 0 stays 0."""
    return ThreatModel(1.0, "l2").ascent_direction(vectors)


def _range_of(threat: ThreatModel) -> float:
    return threat.upper - threat.lower


def _farthest(threat: ThreatModel, images: chex.Array) -> chex.Array:
    """Distance ``[B]`` of each image from the image farthest from it within the bounds."""
    is_bright = images > (threat.lower + threat.upper) / 2
    return threat.distance(jnp.where(is_bright, threat.lower, threat.upper), images)
