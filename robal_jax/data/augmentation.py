"""Augmentation of training images: pure functions of keys and images, one key per image."""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from robal_jax.data import policies


def random_crop_flip(keys: jax.Array, images: jax.Array, padding: int = 4) -> jax.Array:
    """Crops at random from the zero-padded image, then flips horizontally with probability 1/2.

    The result for an image depends on its own key only, not on the batch around it.

    Args:
      keys: typed PRNG keys ``[B]``.
      images: any dtype ``[B, H, W, C]``.
      padding: pixels added on each side; both offsets are uniform on ``0..2*padding``.

    Returns:
      ``[B, H, W, C]``, in the dtype of ``images``.

    Source: RoBal, experimental settings (crop and flip of the CIFAR training images).
    """

    def one(key: jax.Array, image: jax.Array) -> jax.Array:
        crop_key, flip_key = jax.random.split(key)
        crop = padded_crop(image, jax.random.randint(crop_key, (2,), 0, 2 * padding + 1), padding)
        return jnp.where(jax.random.bernoulli(flip_key), crop[:, ::-1], crop)

    return jax.vmap(one)(keys, images)


def padded_crop(image: jax.Array, corner: jax.Array, padding: int = 4) -> jax.Array:
    """Returns the part of the zero-padded image that has the size of the image.

    Args:
      image: any dtype ``[H, W, C]``.
      corner: top and left of the part in the padded image, int32 ``[2]``, each in 0..2*padding.
      padding: pixels added on each side.

    Returns:
      ``[H, W, C]``.

    Example:
      >>> padded_crop(jnp.array([[[1], [2]], [[3], [4]]]), jnp.array([0, 1]), 1)[..., 0].tolist()
      [[0, 0], [1, 2]]
    """
    padded = jnp.pad(image, ((padding, padding), (padding, padding), (0, 0)))
    top, left = corner
    return jax.lax.dynamic_slice(padded, (top, left, 0), image.shape)


def random_resized_crop_flip(keys: jax.Array, images: jax.Array, size: tuple[int, int]) -> jax.Array:
    """Resizes a random part of the image to one size, then flips horizontally with probability 1/2.

    The part has area ``a H W`` and aspect ratio ``r`` (width : height), and a uniform place in the image::

        a ~ U(0.08, 1), log r ~ U(log 3/4, log 4/3)
        height = min(H, sqrt(a H W / r)), width = min(W, sqrt(a H W r))

    Other implementations draw up to ten times until a part fits. Here one draw is clipped to the image, so
    that every image costs the same. Resizing is bilinear, with antialiasing. The result for an image depends
    on its own key only.

    Args:
      keys: typed PRNG keys ``[B]``.
      images: uint8 ``[B, H, W, C]``.
      size: ``(height, width)`` of the result.

    Returns:
      uint8 ``[B, *size, C]``.

    Source: Szegedy et al. 2015, "Going Deeper with Convolutions", section 6.
    """

    def one(key: jax.Array, image: jax.Array) -> jax.Array:
        box_key, flip_key = jax.random.split(key)
        crop = _resized_part(image, *_random_part(box_key, image.shape[:2]), size)
        return jnp.where(jax.random.bernoulli(flip_key), crop[:, ::-1], crop)

    return jax.vmap(one)(keys, images)


def _random_part(key: jax.Array, shape: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    """Draws (top, left) and (height, width) of a random part, in pixels, not rounded."""
    area_key, ratio_key, place_key = jax.random.split(key, 3)
    extent = _random_extent(area_key, ratio_key, shape, (0.08, 1), (-math.log(4 / 3), math.log(4 / 3)))
    room = jnp.array(shape, jnp.float32) - extent
    return jax.random.uniform(place_key, (2,), jnp.float32) * room, extent


def _random_extent(
    area_key: jax.Array,
    ratio_key: jax.Array,
    shape: tuple[int, ...],
    areas: tuple[float, float],
    log_ratios: tuple[float, float],
) -> jax.Array:
    """Draws (height, width) of a part, clipped to the image, not rounded.

    Areas are parts of the image's, and ratios are width : height; both bounds are those of a uniform draw.
    """
    area = jax.random.uniform(area_key, (), jnp.float32, *areas) * (shape[0] * shape[1])
    log_ratio = jax.random.uniform(ratio_key, (), jnp.float32, *log_ratios)
    whole = jnp.array(shape, jnp.float32)
    return jnp.minimum(whole, jnp.sqrt(area * jnp.exp(jnp.stack([-log_ratio, log_ratio]))))


def _resized_part(image: jax.Array, corner: jax.Array, extent: jax.Array, size: tuple[int, int]) -> jax.Array:
    """Resizes the part of an image at ``corner`` (top, left) with ``extent`` (height, width) to ``size``."""
    scale = jnp.array(size, jnp.float32) / extent
    resized = jax.image.scale_and_translate(
        image.astype(jnp.float32), (*size, image.shape[2]), (0, 1), scale, -corner * scale, "linear"
    )
    # These are weighted means of pixels, so rounding cannot leave 0..pixel_max.
    return jnp.round(resized).astype(image.dtype)


def box_mask(box: jax.Array, size: tuple[int, ...]) -> jax.Array:
    """Returns which pixels lie in a box: bool ``[H, W]``.

    Args:
      box: ``(top, left, height, width)`` in pixels, integers ``[4]``; it may reach beyond the image.
      size: ``(H, W)``.

    Example:
      >>> box_mask(jnp.array([0, 1, 1, 5]), (2, 3)).tolist()
      [[False, True, True], [False, False, False]]
    """
    top, left, height, width = box
    row, column = jnp.arange(size[0]), jnp.arange(size[1])
    rows = (row >= top) & (row < top + height)
    columns = (column >= left) & (column < left + width)
    return rows[:, None] & columns[None, :]


def _erased(images: jax.Array, boxes: jax.Array) -> jax.Array:
    """Sets the pixels of one box per image, ``[B, 4]``, to 0."""
    masks = jax.vmap(functools.partial(box_mask, size=images.shape[1:3]))(boxes)
    return jnp.where(masks[..., None], jnp.zeros((), images.dtype), images)


def cutout_box(centre: jax.Array, side: int) -> jax.Array:
    """Returns the box of Cutout about a pixel: ``side // 2`` pixels before it, and as many from it on.

    Args:
      centre: row and column, integers ``[2]``.
      side: length of the square; an odd one loses a pixel.

    Returns:
      ``(top, left, height, width)``, ``[4]``, not clipped to the image.

    Example:
      >>> cutout_box(jnp.array([3, 15]), 8).tolist()
      [-1, 11, 8, 8]
    """
    half = side // 2
    return jnp.concatenate([centre - half, jnp.full(2, 2 * half, centre.dtype)])


def cutout(keys: jax.Array, images: jax.Array, side: int | None = None) -> jax.Array:
    """Sets a square to 0 whose centre is any pixel of the image; beyond the edge it is cut off.

    The result for an image depends on its own key only.

    Args:
      keys: typed PRNG keys ``[B]``.
      images: any dtype ``[B, H, W, C]``.
      side: of the square, in pixels; None: 9/16 of the image's shorter side, 18 pixels of 32.

    Returns:
      ``[B, H, W, C]``, in the dtype of ``images``.

    Source: DeVries and Taylor 2017, "Cutout"; the side of Wang et al. 2023, "Better Diffusion Models".
    """
    size = images.shape[1:3]
    length = min(size) * 9 // 16 if side is None else side

    def box(key: jax.Array) -> jax.Array:
        return cutout_box(jax.random.randint(key, (2,), 0, jnp.array(size)), length)

    return _erased(images, jax.vmap(box)(keys))


def random_erasing(keys: jax.Array, images: jax.Array, probability: float = 0.5) -> jax.Array:
    """Sets, with a probability, a random box to 0, of any place within the image.

    The box has area ``a H W`` and aspect ratio ``r`` (height : width), its sides are rounded::

        a ~ U(0.02, 0.33), log r ~ U(log 0.3, log 3.3)
        height = min(H, sqrt(a H W r)), width = min(W, sqrt(a H W / r))

    Other implementations draw up to ten times until a box fits. Here one draw is clipped to the image, so
    that every image costs the same. The result for an image depends on its own key only.

    Args:
      keys: typed PRNG keys ``[B]``.
      images: any dtype ``[B, H, W, C]``.
      probability: that there is a box.

    Returns:
      ``[B, H, W, C]``, in the dtype of ``images``.

    Source: Zhong et al. 2020, "Random Erasing Data Augmentation"; numbers and value of torchvision.
    """
    size = images.shape[1:3]

    def box(key: jax.Array) -> jax.Array:
        area_key, ratio_key, place_key, erased_key = jax.random.split(key, 4)
        extent = _random_extent(area_key, ratio_key, size, (0.02, 0.33), (-math.log(3.3), -math.log(0.3)))
        extent = jnp.round(extent).astype(jnp.int32)
        corner = jax.random.randint(place_key, (2,), 0, jnp.array(size) - extent + 1)
        erased = jax.random.bernoulli(erased_key, probability)
        return jnp.concatenate([corner, jnp.where(erased, extent, 0)])

    return _erased(images, jax.vmap(box)(keys))


def _same_size(images: jax.Array, size: tuple[int, int]) -> jax.Array:
    if images.shape[1:3] != size:
        raise ValueError(
            f"this augmentation cannot resize {images.shape[1:3]} to {size}; use 'resized_crop_flip'"
        )
    return images


AUGMENTATIONS: dict[str, Callable[..., jax.Array]] = {
    "none": lambda keys, images, size: _same_size(images, size),
    "crop_flip": lambda keys, images, size: random_crop_flip(keys, _same_size(images, size)),
    "resized_crop_flip": random_resized_crop_flip,
    "randaugment": lambda keys, images, size, pixel_max=255: policies.randaugment(
        keys, _same_size(images, size), pixel_max=pixel_max
    ),
    "autoaugment": lambda keys, images, size, pixel_max=255: policies.autoaugment(
        keys, _same_size(images, size), pixel_max=pixel_max
    ),
    "cutout": lambda keys, images, size: cutout(keys, _same_size(images, size)),
    "random_erasing": lambda keys, images, size: random_erasing(keys, _same_size(images, size)),
}
"""``(keys [B], uint8 images [B, H, W, C], size (height, width), static) -> uint8 images [B, *size, C]``.

A function that has a parameter ``pixel_max`` also receives the largest possible value, static.
"""

RESIZING = ("resized_crop_flip",)
"""Those whose result may have another size than the images."""
