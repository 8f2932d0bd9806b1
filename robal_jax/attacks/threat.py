"""The threat model: the images that an adversary may show, and the points where attacks start.

Everything that depends on the norm is here: the ball, the direction of steepest ascent, the distance and the
random starts. The attacks call these functions and know of no norm themselves.
"""

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np

from robal_jax import checks
from robal_jax.attacks import l1
from robal_jax.keys import image_keys

LogitsFn = Callable[[chex.Array], chex.Array]
"""Images ``[B, H, W, C]`` within the threat model's bounds to logits ``[B, K]``."""

RandomLogitsFn = Callable[[chex.Array, chex.PRNGKey], chex.Array]
"""A random model: images ``[B, H, W, C]`` and one key per image ``[B]`` to logits ``[B, K]``."""

Attack = Callable[..., chex.Array]
"""``(logits_fn, key, images [B, H, W, C], labels [B])`` to adversarial images ``[B, H, W, C]``.

``key`` is one key, or one per image ``[B]``. Attacks that ascend a loss take it by keyword, ``loss``.
"""

LARGEST = 1e37
"""Largest entry of a gradient that attacks follow; its reciprocal is no denormal number of float32."""

NORMS = {"linf": "L-infinity", "l2": "L2", "l1": "L1"}
"""Norms by their names, with the names that a reader sees."""

COMMON_NORMS = ("linf", "l2")
"""Norms that all attacks support; AutoPGD supports the others, too."""

# |(x + e) - x| may exceed e by the rounding of two operations on numbers up to 2: 2 * 2^-23 each.
DISTANCE_TOLERANCE = 4 * 2.0**-23

INSTEAD_IN_L1 = "use apgd, or autoattack with a list of apgd_ce, apgd_dlr, apgd_t such as version='robal_aa'"


@dataclasses.dataclass(frozen=True)
class ThreatModel:
    """The images that an adversary may show in place of ``x``: ``||x' - x|| <= epsilon``, within bounds.

    The radius is the same for all images, or a tuple has one per class, or an array ``[B]`` has one per image
    of a batch. Attacks look up the radii of the classes by the labels, :meth:`of`.

    Attributes:
      epsilon: radius, in units of the image: a number > 0, a tuple of ``K`` of these, or an array ``[B]`` of
        numbers >= 0; inside of a compiled function a number or an array may be traced.
      norm: a key of ``NORMS``.
      lower: smallest pixel value.
      upper: largest pixel value.

    Raises:
      ValueError: one of these is out of its range.
    """

    epsilon: Any
    norm: str = "linf"
    lower: float = 0.0
    upper: float = 1.0

    def __post_init__(self) -> None:
        if isinstance(self.epsilon, tuple):
            checks.lengths("epsilon", self.epsilon)
            object.__setattr__(self, "epsilon", tuple(map(float, self.epsilon)))
        elif self._per_image:
            checks.lengths("epsilon", self.epsilon, per="image", zero=True)
        else:
            checks.positive(epsilon=self.epsilon)
        checks.numbers(lower=self.lower, upper=self.upper)
        if not isinstance(self.norm, str) or self.norm not in NORMS:
            raise ValueError(f"unknown norm {self.norm!r}; use one of {', '.join(NORMS)}")
        if not -math.inf < self.lower < self.upper < math.inf:
            raise ValueError(f"the bounds are [{self.lower}, {self.upper}]; use finite ones, lower < upper")
        for field in ("epsilon", "lower", "upper"):
            value = getattr(self, field)
            # Python's numbers, so that equal models are equal as text.
            if not isinstance(value, jax.core.Tracer | tuple | int) and not np.ndim(value):
                object.__setattr__(self, field, float(value))

    def scaled(self, factor: chex.Numeric) -> "ThreatModel":
        """Multiplies the radius by a factor > 0, or by one factor per image ``[B]``."""
        if isinstance(self.epsilon, tuple):
            return dataclasses.replace(self, epsilon=tuple(factor * epsilon for epsilon in self.epsilon))
        return dataclasses.replace(self, epsilon=factor * self.epsilon)

    @property
    def _per_image(self) -> bool:
        """Whether the radii are those of the images of a batch."""
        return getattr(self.epsilon, "ndim", 0) > 0

    def of(self, labels: chex.Array, dtype: Any = None) -> "ThreatModel":
        """The same images, with one radius per image in place of one per class.

        Args:
          labels: integers ``[B]``.
          dtype: of the radii; None leaves them as they are.

        Returns:
          A threat model with ``epsilon [B]``; this one if all images have the same radius.

        Raises:
          ValueError: there are fewer radii than classes.

        Example:
          >>> print(ThreatModel((0.1, 0.2)).of(jnp.array([1, 0, 1])).epsilon)
          [0.2 0.1 0.2]
          >>> ThreatModel(0.1).of(jnp.array([1, 0, 1])).epsilon
          0.1
        """
        if isinstance(self.epsilon, tuple):
            radii = of_class(self.epsilon, labels, dtype)
        elif self._per_image and dtype is not None:
            radii = jnp.asarray(self.epsilon, dtype)
        else:
            return self
        return dataclasses.replace(self, epsilon=radii)

    def each(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Vectorises a function of a threat model and of one image over a batch: each image has its radius.

        Args:
          function: ``(threat, *arrays of one image)``.

        Returns:
          A function of the arrays of a batch, ``[B, ...]``.

        Example:
          >>> ball = ThreatModel(jnp.array([0.1, 0.2])).each(lambda threat, x: x + threat.epsilon)
          >>> print(ball(jnp.array([0.5, 0.5])))
          [0.6 0.7]
        """
        if not self._per_image:
            self._one_per_class_refused()
            return jax.vmap(partial(function, self))

        def with_radius(epsilon: chex.Array, *arrays: chex.Array) -> Any:
            return function(dataclasses.replace(self, epsilon=epsilon), *arrays)

        return partial(jax.vmap(with_radius), jnp.asarray(self.epsilon))

    def _one_per_class_refused(self) -> None:
        if isinstance(self.epsilon, tuple):
            raise ValueError("epsilon has one radius per class; use threat.of(labels), one per image")

    def _radius(self, images: chex.Array) -> chex.Numeric:
        """The radius, to broadcast against images: a number, or ``[B, 1, ..., 1]``."""
        self._one_per_class_refused()
        if not self._per_image:
            return self.epsilon
        return like_images(jnp.asarray(self.epsilon, images.dtype), images)

    def check(self, images: chex.Array, labels: chex.Array) -> None:
        """Refuses images and labels that cannot be attacked, and a radius in another unit than the images.

        Args:
          images: ``[B, ...]``, floats in ``[lower, upper]``.
          labels: integers ``[B]``.

        Raises:
          ValueError: a wrong shape, type or range; ranges are looked at outside of ``jax.jit`` only.
        """
        checks.images_and_labels(images, labels, self.lower, self.upper)
        if self._per_image:
            checks.vector("epsilon", self.epsilon, len(images), "image (a tuple has one per class)")
        known = not isinstance(self.epsilon, jax.core.Tracer)
        largest = float(np.max(self.epsilon)) if known else 0.0
        if self.norm == "linf" and largest > self.upper - self.lower:
            raise ValueError(
                f"epsilon is {largest:g}, and the pixels are in [{self.lower:g}, {self.upper:g}]; "
                f"use the images' unit{in_255ths(largest)}"
            )

    def project(self, candidates: chex.Array, images: chex.Array) -> chex.Array:
        """Moves candidates into the ball around ``images`` and into the bounds.

        Example:
          >>> images, candidates = jnp.array([[0.5, 0.5]]), jnp.array([[0.8, 2.0]])
          >>> print(ThreatModel(0.25).project(candidates, images))
          [[0.75 0.75]]
          >>> found = ThreatModel(0.25, "l2").project(jnp.array([[0.8, 0.9]]), images)
          >>> print(jnp.array_str(found, precision=2))
          [[0.65 0.7 ]]
        """
        radius = self._radius(images)
        if self.norm == "l2":
            delta = candidates - images
            size = _l2(delta)
            candidates = images + delta * jnp.minimum(1.0, radius / jnp.where(size > 0, size, 1.0))
        elif self.norm == "l1":
            return l1.project(candidates, images, radius, self.lower, self.upper)
        else:
            candidates = jnp.clip(candidates, images - radius, images + radius)
        # The images lie within the bounds, so clipping to the bounds brings a candidate nearer to its image.
        return jnp.clip(candidates, self.lower, self.upper)

    def ascent_direction(self, gradient: chex.Array) -> chex.Array:
        """Direction of steepest ascent, of length 1 in this norm: the sign, or the unit vector; 0 for 0.

        In L1 it is the sign of the largest entry.

        Example:
          >>> gradient = jnp.array([[3.0, -4.0]])
          >>> print(ThreatModel(0.1).ascent_direction(gradient))
          [[ 1. -1.]]
          >>> print(jnp.array_str(ThreatModel(0.1, "l2").ascent_direction(gradient), precision=2))
          [[ 0.6 -0.8]]
        """
        if self.norm == "l2":
            # Scaled first, because the squares of a saturated softmax's gradient would all be 0.
            largest = jnp.abs(gradient).max(per_image(gradient), keepdims=True)
            gradient = gradient / jnp.where(largest > 0, largest, 1.0)
            size = _l2(gradient)
            return gradient / jnp.where(size > 0, size, 1.0)
        if self.norm == "l1":
            return l1.sparse_direction(gradient, jnp.ones(len(gradient), int))
        return jnp.sign(gradient)

    def distance(self, candidates: chex.Array, images: chex.Array) -> chex.Array:
        """Distance ``||x' - x||`` of each candidate from its image, ``[B]``; NaN for a candidate with NaN.

        Example:
          >>> images, candidates = jnp.zeros((2, 2)), jnp.array([[3.0, -4.0], [0.0, 0.5]])
          >>> print(ThreatModel(0.1).distance(candidates, images))
          [4.  0.5]
          >>> print(ThreatModel(0.1, "l2").distance(candidates, images))
          [5.  0.5]
        """
        delta = candidates - images
        if self.norm == "l1":
            return jnp.abs(delta).sum(per_image(delta))
        if self.norm == "l2":
            return _l2(delta).reshape(-1)
        # XLA's maximum on a CPU may drop NaN.
        missing = jnp.isnan(delta).any(per_image(delta))
        return jnp.where(missing, jnp.nan, jnp.abs(delta).max(per_image(delta)))

    def outside(self, candidates: chex.Array) -> chex.Array:
        """How far the pixels of each candidate are outside of the bounds, ``[B]``; negative inside.

        Example:
          >>> print(ThreatModel(0.1).outside(jnp.array([[0.25, 0.5], [0.0, 1.5]])))
          [-0.25  0.5 ]
        """
        axes = per_image(candidates)
        return jnp.maximum(self.lower - candidates.min(axes), candidates.max(axes) - self.upper)


_GROWTH = {"l1": 1.0, "l2": 0.5}  # of the rounding of a distance, as a power of the number of pixels


def distance_tolerance(threat: ThreatModel, pixels: int = 1) -> float:
    """Returns by how much rounding may take an image beyond its radius.

    It grows with the bounds of the images. In L1 the errors of the pixels add up, in L2 their squares.

    Args:
      threat: its norm and its bounds.
      pixels: numbers per image.
    """
    largest = max(abs(threat.lower), abs(threat.upper), 1.0)
    return DISTANCE_TOLERANCE * largest * pixels ** _GROWTH.get(threat.norm, 0.0)


def departure(threat: ThreatModel, distance: chex.Array, outside: chex.Array, pixels: int = 1) -> str:
    """Says how far the image is that is farthest from what a threat model allows; '' if all are allowed.

    Args:
      threat: with one radius, or one per image.
      distance: of each image from its clean one, ``[B]``.
      outside: how far its pixels are outside of the bounds, ``[B]``.
      pixels: numbers per image.

    Example:
      >>> departure(ThreatModel(0.1), np.array([0.1, 0.25]), np.array([0.0, 0.0]))
      'distance 0.25'
    """
    within = np.asarray(threat.epsilon) + distance_tolerance(threat, pixels)
    for field, found, largest in ("distance", distance, within), ("outside", outside, 0):
        if not (found <= largest).all():  # NaN is not
            return f"{field} {found[np.argmax(found - largest)]}"  # NaN, if there is any
    return ""


def check_type(threat: ThreatModel) -> None:
    """Refuses what is no threat model, such as a radius."""
    if not isinstance(threat, ThreatModel):
        raise ValueError(f"threat is a {type(threat).__name__}; pass robal_jax.ThreatModel(epsilon, norm)")


def check_attack(
    threat: ThreatModel, images: chex.Array, labels: chex.Array, *, norms: tuple[str, ...] = COMMON_NORMS
) -> ThreatModel:
    """Refuses what is no threat model, a norm that the attack does not support, and what it may not attack.

    Args:
      threat: see :meth:`ThreatModel.check`.
      images: see there.
      labels: see there.
      norms: that the attack knows.

    Returns:
      The threat model with one radius per image, if its radii differ; see :meth:`ThreatModel.of`.

    Example:
      >>> print(check_attack(ThreatModel((0.1, 0.2)), jnp.zeros((2, 8, 8, 1)), jnp.array([1, 0])).epsilon)
      [0.2 0.1]
      >>> check_attack(8 / 255, jnp.zeros((1, 8, 8, 1)), jnp.array([3]))
      Traceback (most recent call last):
      ValueError: threat is a float; pass robal_jax.ThreatModel(epsilon, norm)
    """
    check_type(threat)
    if threat.norm not in norms:
        raise ValueError(f"the norm is {threat.norm}, which this attack does not support; {INSTEAD_IN_L1}")
    threat.check(images, labels)
    return threat.of(labels, jnp.result_type(images))


def of_class(values: Any, labels: chex.Array, dtype: Any = None, per: str = "radii") -> Any:
    """Looks up the value of each image's class in a tuple of ``K``; anything else belongs to all images.

    Args:
      values: a tuple, or anything else.
      labels: integers ``[B]``.
      dtype: of the values found; None leaves them as they are.
      per: what the values are, for the message.

    Raises:
      ValueError: there are fewer values than classes.

    Example:
      >>> print(of_class((0.1, 0.2), jnp.array([1, 0, 1])), of_class(0.1, jnp.array([1, 0, 1])))
      [0.2 0.1 0.2] 0.1
    """
    if not isinstance(values, tuple):
        return values
    checks.labels_in(len(values), labels, per=per)
    return jnp.asarray(values, dtype)[labels]


def in_255ths(value: float) -> str:
    """Asks whether a length above 1 was given in 255ths, for a message; '' if it cannot have been.

    Example:
      >>> in_255ths(8.0)
      ': did you mean 8/255?'
    """
    return f": did you mean {value:g}/255?" if 1 < value <= 255 else ""


def finite(gradient: chex.Array) -> chex.Array:
    """A gradient of which every entry is a direction: NaN becomes 0, infinity plus or minus ``LARGEST``.

    The gradient of a model may be NaN or infinite where its logits are finite, such as that of a logarithm
    which is masked afterwards. Such an entry must not lead an image to NaN, which would count as
    misclassified; so it does not move where it is NaN, and by its sign where it is infinite.

    Example:
      >>> print(jnp.sign(finite(jnp.array([jnp.nan, -jnp.inf, 2.0]))), finite(jnp.array([-3.0, 2.0])))
      [ 0. -1.  1.] [-3.  2.]
    """
    return jnp.clip(jnp.where(jnp.isnan(gradient), 0.0, gradient), -LARGEST, LARGEST)


def like_images(values: chex.Array, images: chex.Array) -> chex.Array:
    """Values ``[B]`` with trailing axes of size 1, to broadcast against images ``[B, H, W, C]``.

    Example:
      >>> like_images(jnp.array([1.0, 2.0]), jnp.zeros((2, 8, 8, 3))).shape
      (2, 1, 1, 1)
    """
    return values.reshape(-1, *(1 for _ in per_image(images)))


def per_image(images: chex.Array) -> tuple[int, ...]:
    """Returns the axes of an image: all but the first."""
    return tuple(range(1, images.ndim))


def _l2(images: chex.Array) -> chex.Array:
    """Euclidean norm of each image, ``[B, 1, ..., 1]``."""
    return jnp.sqrt(jnp.sum(jnp.square(images), axis=per_image(images), keepdims=True))


Start = Callable[[chex.PRNGKey, chex.Array, ThreatModel], chex.Array]
"""One key and one image ``[H, W, C]`` to the point where its attack starts.

It may lie outside the pixel bounds, as in the released code.
"""


def starting_points(start: Start, key: chex.PRNGKey, images: chex.Array, threat: ThreatModel) -> chex.Array:
    """Starts of all images ``[B, ...]``, each from its own key.

    Args:
      start: of one image.
      key: one key, or one per image ``[B]``.
      images: ``[B, ...]``.
      threat: allowed images.

    Returns:
      ``[B, ...]``.

    Example:
      >>> images, threat = jnp.full((2, 8, 8, 1), 0.5), ThreatModel(0.1)
      >>> start = starting_points(uniform_start, jax.random.key(0), images, threat)
      >>> print(jnp.array_str(threat.distance(start, images), precision=2))
      [0.1 0.1]
      >>> bool((start[0] == start[1]).any())
      False
    """
    draw = threat.each(lambda threat, key, image: start(key, image, threat))
    return draw(image_keys(key, images), images)


def clean_start(key: chex.PRNGKey, image: chex.Array, threat: ThreatModel) -> chex.Array:
    """The image itself, ``x``.

    Example:
      >>> print(clean_start(jax.random.key(0), jnp.array([0.5, 0.7]), ThreatModel(0.1)))
      [0.5 0.7]
    """
    del key, threat
    return image


def uniform_start(key: chex.PRNGKey, image: chex.Array, threat: ThreatModel) -> chex.Array:
    """Uniform in the ball, ``x + U(-epsilon, epsilon)`` in L-infinity: the start of the evaluations.

    Example:
      >>> noise = uniform_start(jax.random.key(0), jnp.zeros((100, 100)), ThreatModel(0.1))
      >>> print(f"{noise.min():.2f} to {noise.max():.2f}")
      -0.10 to 0.10
    """
    if threat.norm == "l2":
        key, radius_key = jax.random.split(key)
        noise = jax.random.normal(key, image.shape, image.dtype)
        radius = jax.random.uniform(radius_key, (), image.dtype) ** (1 / image.size)
        return image + threat.epsilon * radius * noise / jnp.linalg.norm(noise.reshape(-1))
    if threat.norm == "l1":
        key, slack_key = jax.random.split(key)
        noise = jax.random.laplace(key, image.shape, image.dtype)
        size = jnp.abs(noise).sum() + jax.random.exponential(slack_key, (), image.dtype)
        return image + threat.epsilon * noise / size
    return image + jax.random.uniform(key, image.shape, image.dtype, -threat.epsilon, threat.epsilon)


def one_sided_start(key: chex.PRNGKey, image: chex.Array, threat: ThreatModel) -> chex.Array:
    """``x + epsilon * U[0, 1)``, never below the image: the start of RoBal's released training (L-infinity).

    Example:
      >>> noise = one_sided_start(jax.random.key(0), jnp.zeros((100, 100)), ThreatModel(0.1))
      >>> print(f"{noise.min():.2f} to {noise.max():.2f}")
      0.00 to 0.10
    """
    return image + threat.epsilon * jax.random.uniform(key, image.shape, image.dtype)


def gaussian_start(key: chex.PRNGKey, image: chex.Array, threat: ThreatModel) -> chex.Array:
    """``x + 0.001 * N(0, 1)``: the start of TRADES (Zhang et al., ICML 2019).

    Example:
      >>> noise = gaussian_start(jax.random.key(0), jnp.zeros((100, 100)), ThreatModel(0.1))
      >>> print(f"{noise.std():.3f}")
      0.001
    """
    del threat
    return image + 0.001 * jax.random.normal(key, image.shape, image.dtype)


def clipped_uniform_start(key: chex.PRNGKey, image: chex.Array, threat: ThreatModel) -> chex.Array:
    """Starts as :func:`uniform_start` does, with pixels clipped to the bounds.

    Source: the released code of AWP, RobustLT and Wang et al. (ICML 2023).

    Example:
      >>> start = clipped_uniform_start(jax.random.key(0), jnp.zeros((100, 100)), ThreatModel(0.1))
      >>> print(f"{start.min():.2f} to {start.max():.2f}")
      0.00 to 0.10
    """
    return jnp.clip(uniform_start(key, image, threat), threat.lower, threat.upper)


def start_within(start: Start, radius: float) -> Start:
    """Makes a start in the ball of one radius, whatever the threat model's is.

    Example:
      >>> start = start_within(uniform_start, 0.2)
      >>> noise = start(jax.random.key(0), jnp.zeros((100, 100)), ThreatModel(0.1))
      >>> print(f"{noise.min():.2f} to {noise.max():.2f}")
      -0.20 to 0.20
    """
    return lambda key, image, threat: start(key, image, dataclasses.replace(threat, epsilon=radius))


def scaled_start(start: Start, factor: float) -> Start:
    """Makes a start in a ball that is larger or smaller than the threat model's by a factor > 0.

    Example:
      >>> start = scaled_start(uniform_start, 0.5)
      >>> noise = start(jax.random.key(0), jnp.zeros((100, 100)), ThreatModel(0.1))
      >>> print(f"{noise.min():.2f} to {noise.max():.2f}")
      -0.05 to 0.05
    """
    return lambda key, image, threat: start(key, image, threat.scaled(factor))


STARTS: dict[str, Start] = {
    "clean": clean_start,
    "uniform": uniform_start,
    "uniform_clipped": clipped_uniform_start,
    "one_sided": one_sided_start,
    "gaussian": gaussian_start,
}
"""Starts by the names that configs use."""
