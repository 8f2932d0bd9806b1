"""Ways to make a model look more robust than it is, for ``calibration.py``; each takes and is a model.

None of them makes a network robust. Most are published defences that adaptive attacks have broken (Athalye et
al., 2018; Tramer et al., 2020); the scales are those of figure 2 of RoBal.
"""

from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp
import numpy as np

from robal_jax.attacks import LogitsFn

_NUMBERS = np.random.default_rng(0)  # drawn while a model runs, so that no two passes are equal


def scaled_by(factor: float) -> Callable[[LogitsFn], LogitsFn]:
    """Multiplies the logits."""
    return lambda model: lambda x: factor * model(x)


def quantised(model: LogitsFn, levels: int = 8) -> LogitsFn:
    """Rounds the pixels to so many steps, which has no gradient."""
    return lambda x: model(jnp.round(x * levels) / levels)


def rounded(model: LogitsFn) -> LogitsFn:
    """Rounds the logits to hundredths, which has no gradient."""
    return lambda x: jnp.round(100 * model(x)) / 100


def thermometer(model: LogitsFn, levels: int = 16) -> LogitsFn:
    """Writes a pixel as a row of ones and zeros, whose weights in the first layer are equal."""
    steps = (jnp.arange(levels) + 0.5) / levels
    return lambda x: model(jax.vmap(lambda step: x > step)(steps).mean(0, dtype=x.dtype))


def noisy(model: LogitsFn, size: float = 0.1) -> LogitsFn:
    """Adds noise to the image, new in every pass."""
    return lambda x: model(jnp.clip(x + size * _drawn(x, x.shape), 0, 1))


def resized(model: LogitsFn) -> LogitsFn:
    """Shrinks or enlarges the image by up to a fifth and shifts it, new in every pass."""

    def moved(x: chex.Array) -> chex.Array:
        draws = jnp.clip(_drawn(x, (len(x), 3)), -2, 2)
        return model(_moved(x, 1 + 0.1 * draws[:, :1], draws[:, 1:] / 2))

    return moved


def cropped(model: LogitsFn, crops: int = 8) -> LogitsFn:
    """Averages the logits of many random crops, new in every pass."""

    def mean(x: chex.Array) -> chex.Array:
        draws = jnp.clip(_drawn(x, (crops, len(x), 2)), -1, 1)
        return jax.lax.map(lambda shift: model(_moved(x, jnp.ones((len(x), 1)), shift)), draws).mean(0)

    return mean


def without_number(model: LogitsFn) -> LogitsFn:
    """Squares the root of a pixel, except where that is 0: there the gradient is 0 times infinity."""
    return lambda x: model(jnp.where(x > 0, jnp.sqrt(x) ** 2, 0.0))


def purified(model: LogitsFn, steps: int = 3, size: float = 0.02) -> LogitsFn:
    """Makes the model more certain by gradient steps on the image, before it looks."""

    def confidence(x: chex.Array) -> chex.Array:
        return jax.nn.log_softmax(model(x)).max(-1).sum()

    def step(_: int, x: chex.Array) -> chex.Array:
        return jnp.clip(x + size * jnp.sign(jax.grad(confidence)(x)), 0, 1)

    return lambda x: model(jax.lax.fori_loop(0, steps, step, x))


def cosines(features: LogitsFn, weight: chex.Array) -> LogitsFn:
    """Divides features and weights by their norms, without a scale: RoBal's fake gain of a classifier."""

    def unit(vectors: chex.Array) -> chex.Array:
        return vectors / jnp.linalg.norm(vectors, axis=-1, keepdims=True)

    return lambda x: unit(features(x)) @ unit(jnp.asarray(weight)).T


def _drawn(x: chex.Array, shape: tuple[int, ...]) -> chex.Array:
    """Returns normal numbers from the host, new in every call."""

    def draw(_: np.ndarray) -> np.ndarray:
        return _NUMBERS.standard_normal(shape).astype(np.float32)

    like = jax.ShapeDtypeStruct(shape, np.float32)
    seen = jax.lax.stop_gradient(x.ravel()[:1])  # so that no two calls are taken for the same
    return jax.lax.stop_gradient(jax.pure_callback(draw, like, seen, vmap_method="sequential"))


def _moved(x: chex.Array, scale: chex.Array, shift: chex.Array) -> chex.Array:
    """Resizes images ``[B, H, W, C]`` by ``[B, 1]`` about their middle and shifts them by ``[B, 2]``."""

    def move(image: chex.Array, scale: chex.Array, shift: chex.Array) -> chex.Array:
        middle = jnp.array(image.shape[:2]) / 2
        scales = jnp.broadcast_to(scale, (2,))
        return jax.image.scale_and_translate(
            image, image.shape, (0, 1), scales, shift + middle * (1 - scales), "linear", antialias=False
        )

    return jax.vmap(move)(x, scale, shift)


MASKS: dict[str, tuple[Callable[[LogitsFn], LogitsFn], tuple[str, ...]]] = {
    "logits x 0.01": (scaled_by(0.01), ("logit_scale",)),
    "logits x 100": (scaled_by(100.0), ("logit_scale", "zero_gradients")),
    "quantised input": (quantised, ("zero_gradients",)),
    "rounding without gradient": (rounded, ("zero_gradients",)),
    "thermometer input": (thermometer, ("zero_gradients",)),
    "random noise at inference": (noisy, ("randomised",)),
    "random resizing": (resized, ("randomised",)),
    "average of random crops": (cropped, ("randomised",)),
    "NaN-gradient branch": (without_number, ("nan_gradients",)),
    "test-time optimisation": (purified, ("inference",)),
}
"""Masks by name, each with the checks of which at least one must flag it."""
