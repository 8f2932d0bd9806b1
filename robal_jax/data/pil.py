"""Operations of Pillow on uint8 images, equal to Pillow's in every pixel, compiled and one per image.

Every operation is the same chain of three steps, of which it leaves out those that it does not need:

1. *move*: each pixel takes the value of the pixel that an affine map points to, black outside the image;
2. *curve*: each value is replaced by its entry in a table, per channel;
3. *blend*: the image is mixed with, or moved away from, a backdrop that is made from it.

So there is no branch: a batch in which every image has its own operation costs what one operation costs.

Symbols: images H x W x C with C = 1 or 3.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

CURVES = ("table", "autocontrast", "equalize")
"""What a curve can be: a table that is known beforehand, or one that depends on the image."""

BACKDROPS = ("black", "mean", "gray", "smooth")
"""What an image is blended with: black, the mean of its gray values, its gray values, its local means."""

Array = np.ndarray | jax.Array
"""Operations are made on the host and applied on the device."""


class Operation(NamedTuple):
    """One operation, or as many as the leading axes say."""

    # Source of the pixel (x, y) in 1/65536 pixel: column a x + b y + c, row d x + e y + f.
    matrix: Array  # int32 [..., 6], (a, b, c, d, e, f)
    curve: Array  # int32 [...], of CURVES
    table: Array  # uint8 [..., 256], used by the curve 'table'
    backdrop: Array  # int32 [...], of BACKDROPS
    factor: Array  # float32 [...], 0: the backdrop, 1: the image


_VALUES = np.arange(256)


def _matrix(a: float, b: float, c: float, d: float, e: float, f: float) -> dict[str, np.ndarray]:
    """Returns the map from the centre of a pixel to that of its source, in 16.16 fixed point."""
    exact = (a, b, c + a / 2 + b / 2, d, e, f + d / 2 + e / 2)
    return {"matrix": np.array([math.floor(v * 65536 + 0.5) for v in exact], np.int32)}


def _rotation(degrees: float, size: tuple[int, int]) -> dict[str, np.ndarray]:
    """Returns the map of a rotation about the centre of an image of ``(height, width)``."""
    cos, sin = (round(function(math.radians(degrees)), 15) for function in (math.cos, math.sin))
    y, x = size[0] / 2, size[1] / 2
    return _matrix(cos, -sin, x - cos * x + sin * y, sin, cos, y - sin * x - cos * y)


def _table(values: np.ndarray) -> dict[str, np.ndarray]:
    return {"table": values.astype(np.uint8)}


def _curve(name: str) -> dict[str, np.ndarray]:
    return {"curve": np.array(CURVES.index(name), np.int32)}


def _blend(backdrop: str, magnitude: float) -> dict[str, np.ndarray]:
    number = np.array(BACKDROPS.index(backdrop), np.int32)
    return {"backdrop": number, "factor": np.array(1 + magnitude, np.float32)}


OPERATIONS: dict[str, Callable[[float, tuple[int, int]], dict[str, np.ndarray]]] = {
    "Identity": lambda m, size: {},
    "ShearX": lambda m, size: _matrix(1, m, 0, 0, 1, 0),  # rows move left by m per row
    "ShearY": lambda m, size: _matrix(1, 0, 0, m, 1, 0),
    "TranslateX": lambda m, size: _matrix(1, 0, -int(m), 0, 1, 0),  # to the right, whole pixels
    "TranslateY": lambda m, size: _matrix(1, 0, 0, 0, 1, -int(m)),  # down
    "Rotate": _rotation,  # counterclockwise, in degrees
    "Brightness": lambda m, size: _blend("black", m),
    "Color": lambda m, size: _blend("gray", m),
    "Contrast": lambda m, size: _blend("mean", m),
    "Sharpness": lambda m, size: _blend("smooth", m),
    "Posterize": lambda m, size: _table(_VALUES & -(1 << (8 - int(m)))),  # keeps m bits
    "Solarize": lambda m, size: _table(np.where(255 * m > _VALUES, _VALUES, 255 - _VALUES)),
    "AutoContrast": lambda m, size: _curve("autocontrast"),
    "Equalize": lambda m, size: _curve("equalize"),
    "Invert": lambda m, size: _table(255 - _VALUES),
}
"""From a magnitude and a size (height, width) to the fields in which an operation differs from Identity."""


def operation(name: str, magnitude: float, size: tuple[int, int]) -> Operation:
    """Returns an operation of Pillow on images of one size, on the host.

    Args:
      name: a key of ``OPERATIONS``.
      magnitude: as torchvision has it: pixels per pixel of a shear, pixels of a translation, degrees of a
        rotation, change of the factor 1 of Brightness, Color, Contrast and Sharpness, bits that Posterize
        keeps, part of 255 from which Solarize inverts; others ignore it.
      size: ``(height, width)``.

    Source: torchvision v2 ``RandAugment`` and ``AutoAugment`` on PIL images, nearest pixels, black outside.

    Example:
      >>> image = np.array([[[10], [20]], [[30], [40]]], np.uint8)
      >>> apply(image, operation("Brightness", 0.5, (2, 2)))[..., 0].tolist()
      [[15, 30], [45, 60]]
      >>> apply(image, operation("TranslateX", 1.0, (2, 2)))[..., 0].tolist()
      [[0, 10], [0, 30]]
    """
    neutral = {**_matrix(1, 0, 0, 0, 1, 0), **_curve("table"), **_table(_VALUES), **_blend("black", 0)}
    return Operation(**(neutral | OPERATIONS[name](magnitude, size)))


def stack(operations: list[Operation]) -> Operation:
    """Stacks ``n`` operations to one with a leading axis ``[n]``, on the host."""
    return Operation(*map(np.stack, zip(*operations, strict=True)))


def apply(image: Array, operation: Operation) -> jax.Array:
    """Applies one operation to one image; map it over images with an operation each.

    Args:
      image: uint8 ``[H, W, C]``, C = 1 or 3; gray images are their own gray values.
      operation: without leading axes, see :func:`operation`.

    Returns:
      uint8 ``[H, W, C]``.

    Raises:
      ValueError: the image is neither gray nor in three colours.
    """
    if image.shape[2] not in (1, 3):
        raise ValueError(f"images have {image.shape[2]} channels; give images with 1 or 3")
    pixels = _look_up(_moved(jnp.asarray(image), operation.matrix), operation)
    gray, wide = luma(pixels), pixels.astype(jnp.int32)
    # The mean, rounded half up.
    mean = (2 * gray.sum() + gray.size) // (2 * gray.size)
    backdrops = (0, mean, gray, smoothed(wide))
    choice = [jnp.broadcast_to(backdrop, wide.shape) for backdrop in backdrops]
    backdrop = jnp.select([operation.backdrop == i for i in range(len(choice) - 1)], choice[:-1], choice[-1])
    return blended(backdrop, wide, operation.factor)


def _moved(image: jax.Array, matrix: Array) -> jax.Array:
    """Returns the image in which each pixel is that of its source, or black."""
    height, width, channels = image.shape
    y, x = jnp.mgrid[:height, :width]
    column, row = ((matrix[i] * x + matrix[i + 1] * y + matrix[i + 2]) >> 16 for i in (0, 3))
    inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
    place = jnp.where(inside, row * width + column, height * width).reshape(-1)
    flat = image.reshape(-1, channels)
    return jnp.take(flat, place, axis=0, mode="fill", fill_value=0).reshape(image.shape)


def _look_up(image: jax.Array, operation: Operation) -> jax.Array:
    """Returns the image after the curve of an operation."""
    flat = image.reshape(-1, image.shape[2]).T.astype(jnp.int32)
    known = jnp.broadcast_to(operation.table, (len(flat), 256))
    # Looked up in all tables at once: a selection of one of them would be computed for each pixel again.
    tables = jnp.stack([known, autocontrast_tables(flat), equalize_tables(flat)])
    return tables[operation.curve, jnp.arange(len(flat)), image]


def luma(image: jax.Array) -> jax.Array:
    """Returns gray values, int32 ``[H, W, 1]``, 0..255: ``(19595 R + 38470 G + 7471 B + 2^15) // 2^16``.

    Example:
      >>> luma(np.array([[[255, 0, 0], [0, 255, 0], [0, 0, 255]]], np.uint8)).ravel().tolist()
      [76, 150, 29]
    """
    wide = jnp.asarray(image, jnp.int32)
    if wide.shape[2] == 1:
        return wide
    red, green, blue = wide[..., 0:1], wide[..., 1:2], wide[..., 2:3]
    return (19595 * red + 38470 * green + 7471 * blue + (1 << 15)) >> 16


def smoothed(image: jax.Array) -> jax.Array:
    """Returns weighted means of 3 x 3 pixels, (5 in the middle, 1 around) / 13, rounded; the border is kept.

    Args:
      image: int32 ``[H, W, C]``, 0..255.

    Returns:
      int32 ``[H, W, C]``.
    """
    if min(image.shape[:2]) < 3:
        return image
    rows = image[:-2] + image[1:-1] + image[2:]
    total = rows[:, :-2] + rows[:, 1:-1] + rows[:, 2:] + 4 * image[1:-1, 1:-1]
    return image.at[1:-1, 1:-1].set((2 * total + 13) // 26)


def blended(backdrop: jax.Array, image: jax.Array, factor: Array) -> jax.Array:
    """Returns ``trunc(clip(backdrop + factor (image - backdrop), 0, 255))`` as float32 arithmetic has it.

    Args:
      backdrop: int32 ``[H, W, C]``, 0..255.
      image: int32 ``[H, W, C]``, 0..255.
      factor: float32 ``[]``.

    Returns:
      uint8 ``[H, W, C]``.

    Example:
      >>> blended(np.array([[[100]]]), np.array([[[110]]]), np.float32(0.76)).item()  # 107.6
      107
    """
    # Product and sum are rounded one after the other. A compiler that contracts them rounds once and is one
    # off at some values. With a factor of two parts of 12 bits both products are exact, so that their sum is
    # rounded as the product is, contracted or not.
    factor = jnp.asarray(factor, jnp.float32)
    bits = jax.lax.bitcast_convert_type(factor, jnp.int32) & ~0xFFF
    coarse = jax.lax.bitcast_convert_type(bits, jnp.float32)
    difference = (image - backdrop).astype(jnp.float32)
    product = coarse * difference + (factor - coarse) * difference
    return jnp.clip(backdrop.astype(jnp.float32) + product, 0, 255).astype(jnp.uint8)


def equalize_tables(channels: jax.Array) -> jax.Array:
    """Returns tables that spread the values of each channel evenly over 0..255.

    With the histogram h, of N pixels, and the largest value m::

        step = (N - h[m]) // 255, table[v] = min(255, (step // 2 + sum_{u < v} h[u]) // step)

    and table[v] = v if step is 0.

    Args:
      channels: int32 ``[C, N]``, 0..255.

    Returns:
      uint8 ``[C, 256]``.
    """
    count, pixels = channels.shape
    rows = jnp.arange(count)[:, None]
    histogram = jnp.zeros((count, 256), jnp.int32).at[rows, channels].add(1)
    largest = jnp.take_along_axis(histogram, channels.max(axis=1, keepdims=True), axis=1)
    step = (pixels - largest) // 255
    below = jnp.cumsum(histogram, axis=1) - histogram
    divisor = jnp.broadcast_to(jnp.maximum(step, 1), below.shape)
    table = jnp.minimum(jax.lax.div(step // 2 + below, divisor), 255)
    return jnp.where(step > 0, table, _VALUES[None]).astype(jnp.uint8)


def autocontrast_tables(channels: jax.Array) -> jax.Array:
    """Returns tables that spread the values of each channel linearly, the smallest to 0, the largest to 255.

    With the smallest value l and the largest value m, in float64 arithmetic::

        scale = 255 / (m - l), table[v] = trunc(v scale - l scale)

    and table[v] = v if all values are equal. Entries outside of l..m are not used, so any number.

    Args:
      channels: int32 ``[C, N]``, 0..255.

    Returns:
      uint8 ``[C, 256]``.
    """
    low, high = channels.min(axis=1, keepdims=True), channels.max(axis=1, keepdims=True)
    values = jnp.arange(256, dtype=jnp.int32)[None]
    span = jnp.broadcast_to(jnp.maximum(high - low, 1), (len(channels), 256))
    scaled = jnp.clip(255 * (values - low), 0, 255 * span)
    whole = jax.lax.div(scaled, span)
    exact = scaled == whole * span
    short = (jnp.asarray(_short())[low, high] >> (whole // 15).astype(jnp.uint32)) & 1
    table = whole - jnp.where(exact, short, 0).astype(jnp.int32)
    return jnp.where(high > low, table, values).astype(jnp.uint8)


@functools.cache
def _short() -> np.ndarray:
    """Returns where float64 falls short of an integer in AutoContrast: bits, uint32 ``[256, 256]``.

    If ``255 (v - l) / (m - l)`` is an integer k, float64 may give a little less, which is cut down to k - 1.
    Bit ``k // 15`` of the entry (l, m) says whether it does. That bit belongs to no other k: these integers
    are multiples of 255 / gcd(255, m - l), and where float64 falls short the divisor is at most 17.
    """
    low, short = np.arange(256)[:, None], np.zeros((256, 256), np.uint32)
    for high in range(1, 256):
        below = low[:high]
        scale = 255 / (high - below)
        whole, rest = np.divmod(255 * (_VALUES - below), high - below)
        falls = (rest == 0) & (whole > 0) & (whole <= 255) & (_VALUES * scale - below * scale < whole)
        short[:high, high] = np.bitwise_or.reduce(
            falls.astype(np.uint32) << np.clip(whole // 15, 0, 31), axis=1
        )
    return short
