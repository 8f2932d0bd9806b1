"""Checks of arrays where users pass them in: rank, type and range, each with one plain message.

Shapes and types are checked while JAX traces, so nothing is left of them in a compiled program. Values are
checked only where they are known: not inside of ``jax.jit``.
"""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np


def _range(array: chex.Array) -> tuple[Any, Any] | None:
    """Returns the smallest and the largest entry; None if they are not known while JAX traces."""
    if isinstance(array, jax.core.Tracer) or not np.size(array):
        return None
    with jax.ensure_compile_time_eval():
        return jnp.min(array).item(), jnp.max(array).item()


def labels_of(batch: int, labels: chex.Array) -> None:
    """Refuses labels that are not one integer per image.

    Args:
      batch: number of images ``B``.
      labels: should be integers ``[B]``.

    Raises:
      ValueError: they are not.
    """
    shape, dtype = np.shape(labels), jnp.result_type(labels)
    if len(shape) == 2 and shape[0] == batch:
        what = "one column; pass labels[:, 0]" if shape[1] == 1 else "one-hot; pass jnp.argmax(labels, -1)"
        raise ValueError(f"labels have shape {list(shape)}, they seem to be {what}; labels must be [B]")
    if shape != (batch,):
        raise ValueError(f"labels have shape {list(shape)}; they must be [{batch}], one per image")
    if not jnp.issubdtype(dtype, jnp.integer):
        raise ValueError(f"labels have dtype {dtype}; they must be integers, the numbers of the classes")


def logits_and_labels(logits: chex.Array, labels: chex.Array) -> None:
    """Refuses anything but logits ``[B, K]`` with labels ``[B]`` in ``0..K-1``.

    Raises:
      ValueError: a wrong shape, type or label.
    """
    if np.ndim(logits) != 2:
        raise ValueError(f"logits have shape {list(np.shape(logits))}; they must be [B, K]")
    if not jnp.issubdtype(jnp.result_type(logits), jnp.floating):
        raise ValueError(f"logits have dtype {jnp.result_type(logits)}; they must be floats")
    batch, classes = np.shape(logits)
    labels_of(batch, labels)
    known = _range(labels)
    if known and not 0 <= known[0] <= known[1] < classes:
        raise ValueError(
            f"labels are in {known[0]}..{known[1]}; with {classes} logits they must be in 0..{classes - 1}"
        )


def images_and_labels(images: chex.Array, labels: chex.Array, lower: float = 0.0, upper: float = 1.0) -> None:
    """Refuses anything but float images ``[B, ...]`` within bounds, with integer labels ``[B]``.

    Args:
      images: to be attacked.
      labels: their classes.
      lower: smallest allowed pixel value.
      upper: largest allowed pixel value.

    Raises:
      ValueError: a wrong shape, type, pixel or number of images.
    """
    shape, dtype = np.shape(images), jnp.result_type(images)
    if len(shape) < 2 or not shape[0]:
        raise ValueError(f"images have shape {list(shape)}; they must be [B, H, W, C] with B at least 1")
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(
            f"images have dtype {dtype}; they must be floats in [{lower:g}, {upper:g}]: divide bytes by 255"
        )
    labels_of(shape[0], labels)
    known = _range(images)
    if known and not lower <= known[0] <= known[1] <= upper:  # NaN is not
        raise ValueError(
            f"images have pixels in [{known[0]:g}, {known[1]:g}]; they must be finite and in "
            f"[{lower:g}, {upper:g}], the bounds of the threat model"
        )
