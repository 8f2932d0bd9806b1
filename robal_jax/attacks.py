"""Adversarial attacks as one loop of projected gradient ascent.

An attack knows of a model only a :data:`LogitsFn`: images to logits. Variables, batch-norm mode, logit scale
and prior adjustment are closed over, so anything that can be written as such a function can be attacked::

    threat = ThreatModel(epsilon=8 / 255)
    logits_fn = lambda images: model.predict(params, stats, images)
    keys = jax.random.split(key, len(images))                    # one key an image
    adversarial = pgd(logits_fn, keys, images, labels, threat=threat, steps=20, step_size=2 / 255)

FGSM is the loop with one step from the clean image, MIM the loop with momentum, CW the loop on a margin
loss: settings of :func:`pgd`, not code of their own. Noise is drawn per image, from that image's key, so a
result does not depend on how images are grouped into batches or spread over devices.
"""

import dataclasses
from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp

from robal_jax import losses

LogitsFn = Callable[[chex.Array], chex.Array]
"""Images ``[B, H, W, C]`` in [0, 1] to logits ``[B, K]``."""

Attack = Callable[[LogitsFn, chex.PRNGKey, chex.Array, chex.Array], chex.Array]
"""``(logits_fn, keys [B], images [B, H, W, C], labels [B])`` to adversarial images ``[B, H, W, C]``."""


@dataclasses.dataclass(frozen=True)
class ThreatModel:
    """The images that an adversary may show instead of ``x``: ``||x' - x|| <= epsilon``, in bounds.

    Attributes:
      epsilon: radius, > 0, in units of the image.
      norm: a key of ``NORMS``.
      lower: smallest pixel value.
      upper: largest pixel value.
    """

    epsilon: float
    norm: str = "linf"
    lower: float = 0.0
    upper: float = 1.0

    def __post_init__(self) -> None:
        if not self.epsilon > 0:
            raise ValueError(f"epsilon must be > 0, not {self.epsilon}")
        if self.norm not in NORMS:
            raise ValueError(f"norm must be one of {', '.join(NORMS)}, not {self.norm!r}")

    def project(self, candidates: chex.Array, images: chex.Array) -> chex.Array:
        """Allowed images near the candidates: in the ball around ``images`` and in the bounds."""
        if self.norm == "l2":
            # Into the bounds first: what is then shortened stays within them, as they are convex.
            delta = jnp.clip(candidates, self.lower, self.upper) - images
            size = _l2(delta)
            candidates = images + delta * jnp.minimum(1.0, self.epsilon / jnp.where(size > 0, size, 1.0))
        else:
            candidates = jnp.clip(candidates, images - self.epsilon, images + self.epsilon)
        return jnp.clip(candidates, self.lower, self.upper)

    def ascent_direction(self, gradient: chex.Array) -> chex.Array:
        """Direction of steepest ascent in this norm, of length 1: the sign, or the unit vector; 0 for 0."""
        if self.norm == "l2":
            # Scaled first: the squares of a saturated softmax's gradient would all be 0.
            largest = jnp.abs(gradient).max(_per_image(gradient), keepdims=True)
            gradient = gradient / jnp.where(largest > 0, largest, 1.0)
            size = _l2(gradient)
            return gradient / jnp.where(size > 0, size, 1.0)
        return jnp.sign(gradient)

    def distance(self, candidates: chex.Array, images: chex.Array) -> chex.Array:
        """``||x' - x||`` of each image, ``[B]``."""
        delta = candidates - images
        return _l2(delta).reshape(-1) if self.norm == "l2" else jnp.abs(delta).max(_per_image(delta))


NORMS = {"linf": "L-infinity", "l2": "L2"}


def _per_image(images: chex.Array) -> tuple[int, ...]:
    return tuple(range(1, images.ndim))


def _l2(images: chex.Array) -> chex.Array:
    """Euclidean norm of each image, ``[B, 1, ..., 1]``."""
    return jnp.sqrt(jnp.sum(jnp.square(images), axis=_per_image(images), keepdims=True))


def negative_margin(logits: chex.Array, labels: chex.Array, *, confidence: float = 50.0) -> chex.Array:
    """The Carlini-Wagner objective: how little the true class leads the best other one.

    ``-max(z_y - max_{i != y} z_i + c, 0)``

    Unlike cross entropy its gradient does not vanish where the softmax saturates.

    Args:
      logits: ``z [B, K]``.
      labels: ``y [B]``.
      confidence: ``c``, the lead of a wrong class beyond which there is nothing more to gain.

    Returns:
      ``[B]``, at most 0, larger for a stronger attack.

    Source: Carlini and Wagner (S&P 2017), in the sign-step form of RoBal's released code (c = 50).
    """
    is_true = jax.nn.one_hot(labels, logits.shape[-1], dtype=bool)
    true = jnp.max(jnp.where(is_true, logits, -jnp.inf), axis=-1)
    best_other = jnp.max(jnp.where(is_true, -jnp.inf, logits), axis=-1)
    return -jnp.maximum(true - best_other + confidence, 0.0)


Start = Callable[[chex.PRNGKey, chex.Array, ThreatModel], chex.Array]
"""One key and one image ``[H, W, C]`` to where its attack starts; not clamped, as in the released code."""


def clean_start(key: chex.PRNGKey, image: chex.Array, threat: ThreatModel) -> chex.Array:
    """``x``: the image itself."""
    del key, threat
    return image


def uniform_start(key: chex.PRNGKey, image: chex.Array, threat: ThreatModel) -> chex.Array:
    """Uniform in the ball, ``x + U(-epsilon, epsilon)`` in L-infinity: what evaluation uses."""
    if threat.norm == "l2":
        key, radius_key = jax.random.split(key)
        noise = jax.random.normal(key, image.shape, image.dtype)
        radius = jax.random.uniform(radius_key, (), image.dtype) ** (1 / image.size)
        return image + threat.epsilon * radius * noise / jnp.linalg.norm(noise.reshape(-1))
    return image + jax.random.uniform(key, image.shape, image.dtype, -threat.epsilon, threat.epsilon)


def one_sided_start(key: chex.PRNGKey, image: chex.Array, threat: ThreatModel) -> chex.Array:
    """``x + epsilon * U[0, 1)``: never below the image; what RoBal's released training does (L-infinity)."""
    return image + threat.epsilon * jax.random.uniform(key, image.shape, image.dtype)


def gaussian_start(key: chex.PRNGKey, image: chex.Array, threat: ThreatModel) -> chex.Array:
    """``x + 0.001 * N(0, 1)``: the start of TRADES (Zhang et al., ICML 2019)."""
    del threat
    return image + 0.001 * jax.random.normal(key, image.shape, image.dtype)


STARTS: dict[str, Start] = {
    "clean": clean_start,
    "uniform": uniform_start,
    "one_sided": one_sided_start,
    "gaussian": gaussian_start,
}


def pgd_path(
    logits_fn: LogitsFn,
    start: chex.Array,
    images: chex.Array,
    labels: chex.Array,
    *,
    threat: ThreatModel,
    steps: tuple[int, ...],
    step_size: float,
    loss: losses.Loss = losses.cross_entropy,
    momentum: float = 0.0,
) -> chex.Array:
    """Projected gradient ascent from given starting points, looked at after several numbers of steps.

    ``g_t = momentum * g_{t-1} + d_t``;  ``x_{t+1} = project(x_t + step_size * ascent_direction(g_t))``

    where ``d_t`` is the gradient of the loss, divided by its mean absolute value per image if there is
    momentum (which makes the steps' gradients comparable; without momentum only the sign counts).

    The loop compiles once whatever the number of steps and of looks.

    Args:
      logits_fn: the model; per image, that is with running batch-norm statistics.
      start: ``x_0 [B, H, W, C]``; may lie outside of the threat model, which holds from step 1 on.
      images: ``x [B, H, W, C]``, within the threat model's bounds.
      labels: ``[B]``.
      threat: what is allowed.
      steps: increasing numbers of steps, at each of which the images are returned.
      step_size: > 0, in units of the image.
      loss: per example; ascended.
      momentum: 0 is PGD, 1 is MIM as published.

    Returns:
      ``[len(steps), B, H, W, C]``; no gradient flows back.

    Source: PGD, Madry et al. (ICLR 2018); momentum, MIM of Dong et al. (CVPR 2018).
    """
    images, start = jax.lax.stop_gradient((images, start))
    gradient_fn = jax.grad(lambda x: loss(logits_fn(x), labels).sum())

    def step(_: chex.Array, carry: tuple[chex.Array, chex.Array]) -> tuple[chex.Array, chex.Array]:
        x, direction = carry
        gradient = gradient_fn(x)
        if momentum:
            size = jnp.mean(jnp.abs(gradient), axis=_per_image(gradient), keepdims=True)
            # An image whose gradient vanished keeps its momentum instead of turning into NaN.
            gradient = gradient / jnp.maximum(size, jnp.finfo(size.dtype).tiny)
            gradient = direction = momentum * direction + gradient
        x = threat.project(x + step_size * threat.ascent_direction(gradient), images)
        return x, direction

    def until(
        carry: tuple[chex.Array, chex.Array], more: chex.Array
    ) -> tuple[tuple[chex.Array, chex.Array], chex.Array]:
        carry = jax.lax.fori_loop(0, more, step, carry)
        return carry, carry[0]

    direction = jnp.zeros_like(images) if momentum else jnp.zeros((), images.dtype)
    _, path = jax.lax.scan(until, (start, direction), jnp.diff(jnp.array(steps), prepend=0))
    return jax.lax.stop_gradient(path)


def starting_points(start: Start, keys: chex.PRNGKey, images: chex.Array, threat: ThreatModel) -> chex.Array:
    """The start of every image, from its own key: ``keys [B]``, ``images [B, ...]`` to ``[B, ...]``."""
    return jax.vmap(lambda key, image: start(key, image, threat))(keys, images)


def pgd(
    logits_fn: LogitsFn,
    keys: chex.PRNGKey,
    images: chex.Array,
    labels: chex.Array,
    *,
    threat: ThreatModel,
    steps: int,
    step_size: float,
    loss: losses.Loss = losses.cross_entropy,
    start: Start = uniform_start,
    momentum: float = 0.0,
) -> chex.Array:
    """PGD with a random start: the images after the last step of :func:`pgd_path`.

    Args:
      logits_fn: the model.
      keys: ``[B]``, one key an image.
      images: ``[B, H, W, C]`` within the threat model's bounds.
      labels: ``[B]``.
      threat: what is allowed.
      steps: number of gradient steps, at least 1.
      step_size: > 0, in units of the image.
      loss: per example; ascended.
      start: where to start.
      momentum: see :func:`pgd_path`.

    Returns:
      Adversarial images ``[B, H, W, C]``; no gradient flows back.
    """
    x0 = starting_points(start, keys, images, threat)
    return pgd_path(
        logits_fn,
        x0,
        images,
        labels,
        threat=threat,
        steps=(steps,),
        step_size=step_size,
        loss=loss,
        momentum=momentum,
    )[0]


def shortest_adversarial(
    logits_fn: LogitsFn,
    keys: chex.PRNGKey,
    images: chex.Array,
    labels: chex.Array,
    *,
    attack: Attack,
    threat: ThreatModel,
    max_epsilon: float,
    search_steps: int = 10,
) -> tuple[chex.Array, chex.Array]:
    """Adversarial images on the decision boundary: a fixed attack's direction, and bisection along it.

    With ``delta = attack(x) - x`` and ``u = delta / ||delta||`` it looks for the smallest ``eta`` at which
    ``x + eta * u`` is misclassified: in ``[0, ||delta||]`` where the attack succeeded, otherwise in
    ``[||delta||, max_epsilon]``; an attack that goes further than ``max_epsilon`` only gives the direction.

    Args:
      logits_fn: the model.
      keys: ``[B]``, one key an image.
      images: ``x [B, H, W, C]`` within the threat model's bounds.
      labels: ``[B]``.
      attack: gives the direction.
      threat: its norm and bounds; its epsilon is the attack's.
      max_epsilon: where the search ends.
      search_steps: number of halvings.

    Returns:
      The images ``[B, H, W, C]`` and their lengths ``eta [B]``, ``max_epsilon`` where none was found.

    Source: AN-PGD of MMA training (Ding et al., ICLR 2020, algorithm 2).
    """
    delta = attack(logits_fn, keys, images, labels) - images
    length = threat.distance(images + delta, images)
    unit = delta / _like_images(jnp.where(length > 0, length, 1.0), images)

    def at(eta: chex.Array) -> chex.Array:
        return jnp.clip(images + _like_images(eta, images) * unit, threat.lower, threat.upper)

    def fooled(eta: chex.Array) -> chex.Array:
        return jnp.argmax(logits_fn(at(eta)), axis=-1) != labels

    def halve(_: chex.Array, bracket: tuple[chex.Array, chex.Array]) -> tuple[chex.Array, chex.Array]:
        low, high = bracket
        middle = (low + high) / 2
        success = fooled(middle)
        return jnp.where(success, low, middle), jnp.where(success, middle, high)

    reach = jnp.minimum(length, max_epsilon)
    success = fooled(reach)
    bracket = jnp.where(success, 0.0, reach), jnp.where(success, reach, max_epsilon)
    _, eta = jax.lax.fori_loop(0, search_steps, halve, bracket)
    return jax.lax.stop_gradient((at(eta), eta))


def _like_images(values: chex.Array, images: chex.Array) -> chex.Array:
    """``[B]`` with axes of size 1 behind, to go with ``[B, H, W, C]``."""
    return values.reshape(-1, *(1 for _ in _per_image(images)))
