"""CutMix: a box of each image is taken from another image of the batch.

One box and one permutation serve the whole batch. Drawing them and mixing are two functions, so that a batch
that is spread over devices, or cut into parts, mixes as one that is not.
"""

import jax
import jax.numpy as jnp

from robal_jax.data.augmentation import box_mask

MIXINGS = ("none", "cutmix")
"""Ways to make an image of two, by the names that configs use."""


def cutmix_box(share: jax.Array, centre: jax.Array, size: tuple[int, ...]) -> jax.Array:
    """Returns the box that leaves about a share of an image, clipped to the image.

    The sides are ``h = int(H sqrt(1 - share))`` and ``w = int(W sqrt(1 - share))``; the box begins ``h // 2``
    rows above the centre and ends before the row ``h // 2`` below it, and so do its columns.

    Args:
      share: float ``[]`` in [0, 1].
      centre: row and column, integers ``[2]``.
      size: ``(H, W)``.

    Returns:
      ``(top, left, height, width)``, int32 ``[4]``.

    Example:
      >>> cutmix_box(jnp.array(0.081), jnp.array([25, 2]), (32, 32)).tolist()
      [10, 0, 22, 17]
    """
    whole = jnp.array(size, jnp.int32)
    half = (whole * jnp.sqrt(1 - share)).astype(jnp.int32) // 2
    first = jnp.clip(centre - half, 0, whole)
    return jnp.concatenate([first, jnp.clip(centre + half, 0, whole) - first]).astype(jnp.int32)


def draw_cutmix(key: jax.Array, count: int, size: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    """Draws the box and the permutation of a batch: ``share ~ Beta(1, 1)``, centre uniform over the pixels.

    Args:
      key: typed PRNG key ``[]``, of the batch.
      count: images ``B`` in the whole batch.
      size: ``(H, W)``.

    Returns:
      The box, see :func:`cutmix_box`, and the number of each image's partner, int32 ``[B]``.

    Source: Yun et al. 2019, "CutMix"; Rebuffi et al. 2021, "Data Augmentation Can Improve Robustness"; Wang
    et al. 2023, "Better Diffusion Models".

    Example:
      >>> box, partners = draw_cutmix(jax.random.key(0), 4, (32, 32))
      >>> box.shape, sorted(partners.tolist())
      ((4,), [0, 1, 2, 3])
    """
    share_key, centre_key, partner_key = jax.random.split(key, 3)
    share = jax.random.uniform(share_key)  # Beta(1, 1)
    centre = jax.random.randint(centre_key, (2,), 0, jnp.array(size))
    return cutmix_box(share, centre, size), jax.random.permutation(partner_key, count).astype(jnp.int32)


def cutmix(images: jax.Array, box: jax.Array, partners: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Puts the box of each image's partner in place of its own.

    The mixed label of image i is ``share one_hot(label_i) + (1 - share) one_hot(label_partner_i)``.

    Args:
      images: any dtype ``[B, H, W, C]``.
      box: ``(top, left, height, width)``, integers ``[4]``, within the image.
      partners: integers ``[B]``, in 0..B-1.

    Returns:
      The mixed images, ``[B, H, W, C]`` in the dtype of ``images``, and the share of an image that is its
      own: ``1 - height width / (H W)``, float ``[]`` in [0, 1].

    Example:
      >>> images = jnp.array([1, 2]).reshape(2, 1, 1, 1) * jnp.ones((2, 2, 2, 1), int)
      >>> mixed, share = cutmix(images, jnp.array([0, 0, 1, 1]), jnp.array([1, 0]))
      >>> mixed[..., 0].tolist(), share.item()
      ([[[2, 1], [1, 1]], [[1, 2], [2, 2]]], 0.75)
    """
    size = images.shape[1:3]
    mask = box_mask(box, size)[None, :, :, None]
    mixed = jnp.where(mask, images[partners], images)
    return mixed, 1 - (box[2] * box[3]).astype(float) / (size[0] * size[1])
