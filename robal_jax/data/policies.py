"""RandAugment and AutoAugment's CIFAR-10 policy: which of Pillow's operations each image gets.

Both draw from the image's own key, and apply two operations, one after the other.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from robal_jax.data import pil

SIGNED = (
    "ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate", "Brightness", "Color", "Contrast", "Sharpness",
)  # fmt: skip
"""Operations whose magnitude is negated with probability 1/2."""

RANDAUGMENT = ("Identity", *SIGNED, "Posterize", "Solarize", "AutoContrast", "Equalize")
"""Operations of RandAugment, all equally likely."""

Choice = tuple[str, float, int]
"""An operation, the probability that it is applied, and the number of its magnitude (0 if it has none)."""

CIFAR10: tuple[tuple[Choice, Choice], ...] = (
    (("Invert", 0.1, 0), ("Contrast", 0.2, 6)),
    (("Rotate", 0.7, 2), ("TranslateX", 0.3, 9)),
    (("Sharpness", 0.8, 1), ("Sharpness", 0.9, 3)),
    (("ShearY", 0.5, 8), ("TranslateY", 0.7, 9)),
    (("AutoContrast", 0.5, 0), ("Equalize", 0.9, 0)),
    (("ShearY", 0.2, 7), ("Posterize", 0.3, 7)),
    (("Color", 0.4, 3), ("Brightness", 0.6, 7)),
    (("Sharpness", 0.3, 9), ("Brightness", 0.7, 9)),
    (("Equalize", 0.6, 0), ("Equalize", 0.5, 0)),
    (("Contrast", 0.6, 7), ("Sharpness", 0.6, 5)),
    (("Color", 0.7, 7), ("TranslateX", 0.5, 8)),
    (("Equalize", 0.3, 0), ("AutoContrast", 0.4, 0)),
    (("TranslateY", 0.4, 3), ("Sharpness", 0.2, 6)),
    (("Brightness", 0.9, 6), ("Color", 0.2, 8)),
    (("Solarize", 0.5, 2), ("Invert", 0.0, 0)),
    (("Equalize", 0.2, 0), ("AutoContrast", 0.6, 0)),
    (("Equalize", 0.2, 0), ("Equalize", 0.6, 0)),
    (("Color", 0.9, 9), ("Equalize", 0.6, 0)),
    (("AutoContrast", 0.8, 0), ("Solarize", 0.2, 8)),
    (("Brightness", 0.1, 3), ("Color", 0.7, 0)),
    (("Solarize", 0.4, 5), ("AutoContrast", 0.9, 0)),
    (("TranslateY", 0.9, 9), ("TranslateY", 0.7, 9)),
    (("AutoContrast", 0.9, 0), ("Solarize", 0.8, 3)),
    (("Equalize", 0.8, 0), ("Invert", 0.1, 0)),
    (("TranslateY", 0.7, 9), ("AutoContrast", 0.9, 0)),
)
"""The 25 pairs of AutoAugment's policy for CIFAR-10, all equally likely."""


def magnitudes(name: str, bins: int, size: tuple[int, int]) -> np.ndarray:
    """Returns the magnitudes of an operation, from the weakest to the strongest.

    Args:
      name: a key of ``pil.OPERATIONS``.
      bins: their number: 31 for RandAugment, 10 for AutoAugment.
      size: ``(height, width)`` of the images.

    Returns:
      ``[bins]``, in the units of :func:`pil.operation`: float32 numbers, of which the next digits matter. 0
      for an operation without one.

    Source: torchvision v2, which makes them with ``torch.linspace``.

    Example:
      >>> magnitudes("Solarize", 4, (32, 32)).tolist()
      [1.0, 0.6666667, 0.3333333, 0.0]
    """
    if name == "Posterize":  # bits
        return 8 - np.round(np.arange(bins) / ((bins - 1) / 4))
    first, last = {
        **dict.fromkeys(("ShearX", "ShearY"), (0, 0.3)),
        "TranslateX": (0, 150 / 331 * size[1]),
        "TranslateY": (0, 150 / 331 * size[0]),
        "Rotate": (0, 30),
        **dict.fromkeys(("Brightness", "Color", "Contrast", "Sharpness"), (0, 0.9)),
        "Solarize": (1, 0),
    }.get(name, (0, 0))
    # From both ends to the middle, each number rounded once, as PyTorch makes them.
    low, high = float(np.float32(first)), float(np.float32(last))
    step, numbers = float(np.float32((high - low) / (bins - 1))), np.arange(bins)
    exact = np.where(numbers < bins // 2, low + step * numbers, high - step * numbers[::-1])
    return exact.astype(np.float32).astype(float)


def _both_signs(name: str, magnitude: float, size: tuple[int, int]) -> list[pil.Operation]:
    """Returns an operation with its magnitude and with the negated one; twice the same if it has no sign."""
    negated = -magnitude if name in SIGNED else magnitude
    return [pil.operation(name, value, size) for value in (magnitude, negated)]


@functools.cache
def _of_randaugment(magnitude: int, size: tuple[int, int]) -> pil.Operation:
    """Returns the 28 equally likely operations with signs of RandAugment."""
    operations = []
    for name in RANDAUGMENT:
        operations += _both_signs(name, magnitudes(name, 31, size)[magnitude], size)
    return pil.stack(operations)


@functools.cache
def _of_autoaugment(size: tuple[int, int]) -> tuple[np.ndarray, pil.Operation]:
    """Returns the probabilities ``[25, 2]`` of the policy and its operations ``[101]``.

    The operation at ``4 pair + 2 place + sign`` is that of the policy; the last one is the identity.
    """
    choices = [choice for pair in CIFAR10 for choice in pair]
    operations = []
    for name, _, number in choices:
        operations += _both_signs(name, magnitudes(name, 10, size)[number], size)
    probabilities = np.array([probability for _, probability, _ in choices], np.float32)
    return probabilities.reshape(-1, 2), pil.stack([*operations, pil.operation("Identity", 0, size)])


def _apply_drawn(
    keys: jax.Array,
    images: jax.Array,
    operations: pil.Operation,
    draw: Callable[[jax.Array], jax.Array],
    pixel_max: int,
) -> jax.Array:
    """Applies to each image, one after the other, those operations whose numbers are drawn from its key."""

    def one(key: jax.Array, image: jax.Array) -> jax.Array:
        drawn = jax.tree.map(lambda field: jnp.asarray(field)[draw(key)], operations)
        return jax.lax.scan(lambda image, each: (pil.apply(image, each), None), image, drawn)[0]

    if pixel_max == 255:
        return jax.vmap(one)(keys, images)
    forth = np.round(np.arange(pixel_max + 1) * (255 / pixel_max)).astype(np.uint8)
    back = np.round(np.arange(256) * (pixel_max / 255)).astype(np.uint8)
    return jnp.asarray(back)[jax.vmap(one)(keys, jnp.asarray(forth)[images])]


def randaugment(
    keys: jax.Array, images: jax.Array, *, count: int = 2, magnitude: int = 8, pixel_max: int = 255
) -> jax.Array:
    """Applies operations of ``RANDAUGMENT`` that are drawn uniformly, with replacement, and with their sign.

    The result for an image depends on its own key only, not on the batch around it.

    Args:
      keys: typed PRNG keys ``[B]``.
      images: uint8 ``[B, H, W, C]``, C = 1 or 3.
      count: operations per image.
      magnitude: number of their magnitude, 0..30.
      pixel_max: the largest possible value. If it is not 255, pixels are brought to 0..255 for the
        operations and back, rounded.

    Returns:
      uint8 ``[B, H, W, C]``.

    Source: Cubuk et al. 2020, "RandAugment"; torchvision's, which AT-BSL uses with (2, 8).

    Example:
      >>> images = np.full((3, 8, 8, 1), 100, np.uint8)
      >>> randaugment(jax.random.split(jax.random.key(0), 3), images).max((1, 2, 3)).tolist()
      [76, 100, 100]
    """
    operations = _of_randaugment(magnitude, images.shape[1:3])
    number = len(operations.factor)
    return _apply_drawn(
        keys, images, operations, lambda key: jax.random.randint(key, (count,), 0, number), pixel_max
    )


def autoaugment(keys: jax.Array, images: jax.Array, *, pixel_max: int = 255) -> jax.Array:
    """Applies the operations of a pair of ``CIFAR10``, each with its probability and a sign.

    The result for an image depends on its own key only, not on the batch around it.

    Args:
      keys: typed PRNG keys ``[B]``.
      images: uint8 ``[B, H, W, C]``, C = 1 or 3.
      pixel_max: the largest possible value. If it is not 255, pixels are brought to 0..255 for the
        operations and back, rounded.

    Returns:
      uint8 ``[B, H, W, C]``.

    Source: Cubuk et al. 2019, "AutoAugment", table 7; torchvision's.
    """
    probabilities, operations = _of_autoaugment(images.shape[1:3])

    def draw(key: jax.Array) -> jax.Array:
        pair_key, apply_key, sign_key = jax.random.split(key, 3)
        pair = jax.random.randint(pair_key, (), 0, len(CIFAR10))
        applied = jax.random.bernoulli(apply_key, jnp.asarray(probabilities)[pair])
        sign = jax.random.bernoulli(sign_key, shape=(2,)).astype(jnp.int32)
        return jnp.where(applied, 4 * pair + 2 * jnp.arange(2) + sign, 4 * len(CIFAR10))

    return _apply_drawn(keys, images, operations, draw, pixel_max)
