"""Geometry of L1 within the pixel bounds: the nearest allowed image, and the direction of a sparse step.

Source: Croce and Hein, "Mind the box: l1-APGD for sparse adversarial attacks on image classifiers" (ICML
2021).
"""

import chex
import jax
import jax.numpy as jnp


def project(
    candidates: chex.Array, images: chex.Array, radius: chex.Numeric, lower: chex.Numeric, upper: chex.Numeric
) -> chex.Array:
    """The nearest images, in L2, in the intersection of the L1 ball around ``images`` and the bounds.

    ``x + sign(y) min(max(|y| - l, 0), r)``,  ``y = x' - x``

    where ``r`` is the distance of a pixel to the bound that ``y`` points to, and ``l >= 0`` is the smallest
    number with which the result lies in the ball. Bisection finds ``l``, up to ``max |y|`` times the relative
    rounding error of the type, from above. A pixel that does not move stays exactly the image's.

    Clipping to the ball and to the bounds one after the other is not this projection: it ends inside of the
    ball, the more so the smaller the radius.

    Args:
      candidates: ``x' [B, ...]``.
      images: ``x [B, ...]`` within the bounds.
      radius: a number, or ``[B, 1, ..., 1]``.
      lower: smallest pixel value.
      upper: largest pixel value.

    Returns:
      ``[B, ...]``; up to rounding, of an operation per pixel, in the ball and within the bounds.

    Source: Croce and Hein (ICML 2021), proposition 2.1.

    Example:
      >>> images, candidates = jnp.array([[0.5, 0.5, 0.9]]), jnp.array([[0.8, 0.5, 1.9]])
      >>> print(jnp.array_str(project(candidates, images, 0.3, 0.0, 1.0), precision=3))
      [[0.7 0.5 1. ]]
    """
    delta, axes = candidates - images, tuple(range(1, images.ndim))
    size, room = jnp.abs(delta), jnp.where(delta > 0, upper - images, images - lower)

    def shrunk(by: chex.Numeric) -> chex.Array:
        return jnp.clip(size - by, 0, room)

    def fits(by: chex.Numeric) -> chex.Array:
        return jnp.sum(shrunk(by), axes, keepdims=True) <= radius

    def halve(_: chex.Array, between: tuple[chex.Array, chex.Array]) -> tuple[chex.Array, chex.Array]:
        low, high = between
        middle = (low + high) / 2
        enough = fits(middle)
        return jnp.where(enough, low, middle), jnp.where(enough, middle, high)

    most = size.max(axes, keepdims=True)
    halvings = jnp.finfo(size.dtype).nmant + 1
    _, high = jax.lax.fori_loop(0, halvings, halve, (jnp.zeros_like(most), most))
    moved = jnp.sign(delta) * shrunk(jnp.where(fits(0.0), 0.0, high))
    return jnp.clip(images + moved, lower, upper)


def sparse_direction(gradient: chex.Array, entries: chex.Array) -> chex.Array:
    """Signs of the largest entries of each gradient, of length 1 in L1; with one entry it is the steepest.

    Args:
      gradient: ``[B, ...]``.
      entries: how many to take, integers ``[B]`` in ``1..size of an image``; of equal ones all are taken.

    Returns:
      ``[B, ...]``; 0 for a gradient of 0.

    Source: Croce and Hein (ICML 2021), section 3.1.

    Example:
      >>> print(sparse_direction(jnp.array([[3.0, -4.0, 1.0]]), jnp.array([2])))
      [[ 0.5 -0.5  0. ]]
    """
    size = jnp.abs(gradient).reshape(len(gradient), -1)
    place = (size.shape[1] - entries)[:, None]
    least = jnp.take_along_axis(jnp.sort(size, axis=-1), place, axis=-1)
    signs = jnp.where(size >= least, jnp.sign(gradient).reshape(size.shape), 0)
    # The small number is the reference implementation's.
    return (signs / (jnp.abs(signs).sum(-1, keepdims=True) + 1e-10)).reshape(gradient.shape)


def changed(candidates: chex.Array, images: chex.Array) -> chex.Array:
    """Number of entries ``[B]`` in which candidates differ from their images: the L0 distance.

    Example:
      >>> print(changed(jnp.array([[0.5, 0.5, 1.0]]), jnp.array([[0.5, 0.4, 0.9]])))
      [2]
    """
    return (candidates != images).sum(tuple(range(1, images.ndim)), dtype=jnp.int32)
