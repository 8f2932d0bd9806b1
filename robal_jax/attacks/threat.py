"""TODO attacks.threat."""

import dataclasses
from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp

from robal_jax.keys import image_keys

LogitsFn = Callable[[chex.Array], chex.Array]
"""Images ``[B, H, W, C]`` in [0, 1] to logits ``[B, K]``."""

RandomLogitsFn = Callable[[chex.Array, chex.PRNGKey], chex.Array]
"""The same of a random model, with one key an image ``[B]``."""

Attack = Callable[..., chex.Array]
"""``(logits_fn, key, images [B, H, W, C], labels [B])`` to adversarial images ``[B, H, W, C]``.

``key`` is one key or one an image ``[B]``. Attacks that ascend a loss take it by keyword, ``loss``.
"""


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
            delta = candidates - images
            size = _l2(delta)
            candidates = images + delta * jnp.minimum(1.0, self.epsilon / jnp.where(size > 0, size, 1.0))
        else:
            candidates = jnp.clip(candidates, images - self.epsilon, images + self.epsilon)
        # The images lie within the bounds, so what is clipped to them comes nearer and stays in the ball.
        return jnp.clip(candidates, self.lower, self.upper)

    def ascent_direction(self, gradient: chex.Array) -> chex.Array:
        """Direction of steepest ascent in this norm, of length 1: the sign, or the unit vector; 0 for 0."""
        if self.norm == "l2":
            # Scaled first: the squares of a saturated softmax's gradient would all be 0.
            largest = jnp.abs(gradient).max(per_image(gradient), keepdims=True)
            gradient = gradient / jnp.where(largest > 0, largest, 1.0)
            size = _l2(gradient)
            return gradient / jnp.where(size > 0, size, 1.0)
        return jnp.sign(gradient)

    def distance(self, candidates: chex.Array, images: chex.Array) -> chex.Array:
        """``||x' - x||`` of each image, ``[B]``."""
        delta = candidates - images
        return _l2(delta).reshape(-1) if self.norm == "l2" else jnp.abs(delta).max(per_image(delta))


NORMS = {"linf": "L-infinity", "l2": "L2"}


def like_images(values: chex.Array, images: chex.Array) -> chex.Array:
    """``[B]`` with axes of size 1 behind, to go with ``[B, H, W, C]``."""
    return values.reshape(-1, *(1 for _ in per_image(images)))


def per_image(images: chex.Array) -> tuple[int, ...]:
    """Returns the axes of an image: all but the first."""
    return tuple(range(1, images.ndim))


def _l2(images: chex.Array) -> chex.Array:
    """Euclidean norm of each image, ``[B, 1, ..., 1]``."""
    return jnp.sqrt(jnp.sum(jnp.square(images), axis=per_image(images), keepdims=True))


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


def starting_points(start: Start, key: chex.PRNGKey, images: chex.Array, threat: ThreatModel) -> chex.Array:
    """The start of every image ``[B, ...]``, from its own key; ``key`` is one or ``[B]``."""
    return jax.vmap(lambda key, image: start(key, image, threat))(image_keys(key, images), images)
