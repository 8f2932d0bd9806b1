"""Augmentation of training images: pure functions of keys and images, one key per image."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp


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
        padded = jnp.pad(image, ((padding, padding), (padding, padding), (0, 0)))
        top, left = jax.random.randint(crop_key, (2,), 0, 2 * padding + 1)
        crop = jax.lax.dynamic_slice(padded, (top, left, 0), image.shape)
        return jnp.where(jax.random.bernoulli(flip_key), crop[:, ::-1], crop)

    return jax.vmap(one)(keys, images)


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
    area = jax.random.uniform(area_key, (), jnp.float32, 0.08, 1) * (shape[0] * shape[1])
    log_ratio = jax.random.uniform(ratio_key, (), jnp.float32, -math.log(4 / 3), math.log(4 / 3))
    whole = jnp.array(shape, jnp.float32)
    extent = jnp.minimum(whole, jnp.sqrt(area * jnp.exp(jnp.stack([-log_ratio, log_ratio]))))
    return jax.random.uniform(place_key, (2,), jnp.float32) * (whole - extent), extent


def _resized_part(image: jax.Array, corner: jax.Array, extent: jax.Array, size: tuple[int, int]) -> jax.Array:
    """Resizes the part of an image at ``corner`` (top, left) with ``extent`` (height, width) to ``size``."""
    scale = jnp.array(size, jnp.float32) / extent
    resized = jax.image.scale_and_translate(
        image.astype(jnp.float32), (*size, image.shape[2]), (0, 1), scale, -corner * scale, "linear"
    )
    # These are weighted means of pixels, so rounding cannot leave 0..pixel_max.
    return jnp.round(resized).astype(image.dtype)


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
}
"""``(keys [B], uint8 images [B, H, W, C], size (height, width), static) -> uint8 images [B, *size, C]``."""
