"""Checks of what users pass in: rank, type and range of arrays, each with one plain message.

Shapes and types are checked while JAX traces, so a compiled program contains nothing of them. Values are
checked where they are known: not inside ``jax.jit``.
"""

import itertools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np


def labels_of(batch: int, labels: chex.Array, name: str = "labels") -> None:
    """Refuses labels that are not one integer per image.

    Args:
      batch: number of images ``B``.
      labels: should be integers ``[B]``.
      name: of the argument, for the message.

    Raises:
      ValueError: they are not.

    Example:
      >>> labels_of(2, jnp.array([[3], [1]]))
      Traceback (most recent call last):
      ValueError: labels have shape [2, 1], they seem to be one column; pass labels[:, 0]; labels must be [B]
    """
    shape, dtype = np.shape(labels), jnp.result_type(labels)
    if len(shape) == 2 and shape[0] == batch:
        what = f"one column; pass {name}[:, 0]" if shape[1] == 1 else f"one-hot; pass jnp.argmax({name}, -1)"
        raise ValueError(f"{name} have shape {list(shape)}, they seem to be {what}; {name} must be [B]")
    if shape != (batch,):
        raise ValueError(f"{name} have shape {list(shape)}; they must be [{batch}], one per image")
    if not jnp.issubdtype(dtype, jnp.integer):
        raise ValueError(f"{name} have dtype {dtype}; they must be integers, the numbers of the classes")


def labels_in(classes: int, labels: chex.Array, name: str = "labels") -> None:
    """Refuses labels outside ``0..K-1``.

    Args:
      classes: their number ``K``.
      labels: integers ``[B]``.
      name: of the argument, for the message.

    Raises:
      ValueError: there is one.

    Example:
      >>> labels_in(10, jnp.array([3, 10]))
      Traceback (most recent call last):
      ValueError: labels are in 3..10; with 10 logits they must be in 0..9
    """
    known = _range(labels)
    if known and not 0 <= known[0] <= known[1] < classes:
        raise ValueError(
            f"{name} are in {known[0]}..{known[1]}; with {classes} logits they must be in 0..{classes - 1}"
        )


def logits_and_labels(logits: chex.Array, labels: chex.Array, name: str = "labels") -> None:
    """Refuses anything but logits ``[B, K]`` with labels ``[B]`` in ``0..K-1``.

    Args:
      logits: should be floats ``[B, K]``.
      labels: should be integers ``[B]``.
      name: of the second argument, for the message.

    Raises:
      ValueError: a wrong shape, type or label.

    Example:
      >>> logits_and_labels(jnp.zeros(10), jnp.array([3]))
      Traceback (most recent call last):
      ValueError: logits have shape [10]; they must be [B, K]
    """
    float_logits(logits=logits)
    batch, classes = np.shape(logits)
    labels_of(batch, labels, name)
    labels_in(classes, labels, name)


def logits_of(batch: int, found: Any) -> chex.Array:
    """Refuses what a model returns, unless it is one array of float logits ``[B, K]`` of several classes.

    Losses are computed from the logits in at least float32.

    Args:
      batch: number of images ``B`` that the model was given.
      found: what it returned.

    Returns:
      The logits; in float32 if they have less precision, otherwise as they are.

    Raises:
      ValueError: another kind, shape or type.

    Example:
      >>> logits_of(2, jnp.zeros((2, 1)))
      Traceback (most recent call last):
      ValueError: logits_fn returns float32[2, 1] for 2 images; it must return float logits [2, K], K >= 2
    """
    if not isinstance(found, jax.Array | np.ndarray):
        kind = type(found).__name__
        raise ValueError(f"logits_fn returns a {kind}; it must return one array of logits [B, K]")
    shape, dtype = found.shape, found.dtype
    if len(shape) != 2 or shape[0] != batch or shape[1] < 2 or not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(
            f"logits_fn returns {dtype}{list(shape)} for {batch} images; "
            f"it must return float logits [{batch}, K], K >= 2"
        )
    return found.astype(jnp.promote_types(dtype, jnp.float32))


def losses_of(batch: int, found: Any) -> chex.Array:
    """Refuses what a loss returns, unless it is one float per image.

    Args:
      batch: number of images ``B`` that the loss was given.
      found: what it returned.

    Returns:
      ``[B]``, as it is.

    Raises:
      ValueError: another shape or type.

    Example:
      >>> losses_of(2, jnp.zeros(()))
      Traceback (most recent call last):
      ValueError: loss returns float32[] for 2 images; it must return one float per image, [2]
    """
    shape, dtype = np.shape(found), jnp.result_type(found)
    if shape != (batch,) or not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(
            f"loss returns {dtype}{list(shape)} for {batch} images; "
            f"it must return one float per image, [{batch}]"
        )
    return found


def images_and_labels(
    images: chex.Array, labels: chex.Array, lower: float | None = None, upper: float | None = None
) -> None:
    """Refuses anything but float images ``[B, ...]`` within bounds, with integer labels ``[B]``.

    Args:
      images: to be attacked.
      labels: their classes.
      lower: smallest allowed pixel value; None if the pixels are checked elsewhere.
      upper: largest allowed pixel value.

    Raises:
      ValueError: a wrong shape, type, pixel or number of images.

    Example:
      >>> images_and_labels(jnp.full((1, 8, 8, 1), 9.0), jnp.array([3]), 0.0, 1.0)
      Traceback (most recent call last):
      ValueError: images have pixels in [9, 9]; they must be finite and in [0, 1], the threat model's bounds
    """
    shape, dtype = np.shape(images), jnp.result_type(images)
    if len(shape) < 2 or not shape[0]:
        raise ValueError(f"images have shape {list(shape)}; they must be [B, H, W, C] with B at least 1")
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"images have dtype {dtype}; they must be floats: divide bytes by 255")
    if jnp.finfo(dtype).bits < 32:
        raise ValueError(
            f"images have dtype {dtype}, whose rounding leaves the ball; use images.astype('float32')"
        )
    labels_of(shape[0], labels)
    if lower is None or upper is None:
        return
    known = _range(images)
    # All are rounded to the images' type, in which attacks clip. NaN is within no bounds.
    ends = [np.asarray(end).astype(dtype) for end in (lower, *(known or ()), upper)]
    if not all(low <= high for low, high in itertools.pairwise(ends)):
        raise ValueError(
            f"images have pixels in [{float(ends[1]):.8g}, {float(ends[2]):.8g}]; "
            f"they must be finite and in [{lower:g}, {upper:g}], the threat model's bounds"
        )


def same_shape(images: chex.Array, **others: chex.Array) -> None:
    """Refuses arrays that do not have the images' shape.

    Raises:
      ValueError: names the array.

    Example:
      >>> same_shape(jnp.zeros((2, 8, 8, 1)), start=jnp.zeros((1, 8, 8, 1)))
      Traceback (most recent call last):
      ValueError: start has shape [1, 8, 8, 1]; it must have the images' shape [2, 8, 8, 1]
    """
    for name, other in others.items():
        if np.shape(other) != np.shape(images):
            shape, wanted = list(np.shape(other)), list(np.shape(images))
            raise ValueError(f"{name} has shape {shape}; it must have the images' shape {wanted}")


def at_least(least: int, **numbers: chex.Numeric) -> None:
    """Refuses numbers below ``least``.

    Raises:
      ValueError: names the number.

    Example:
      >>> at_least(1, steps=20, restarts=0)
      Traceback (most recent call last):
      ValueError: restarts is 0; it must be at least 1
    """
    for name, number in numbers.items():
        known = _range(number)
        if known and not known[0] >= least:
            raise ValueError(f"{name} is {known[0]}; it must be at least {least}")


def positive(**numbers: chex.Numeric) -> None:
    """Refuses numbers that are not finite and above 0.

    Raises:
      ValueError: names the number.

    Example:
      >>> positive(step_size=float("nan"))
      Traceback (most recent call last):
      ValueError: step_size is nan; it must be finite and > 0
    """
    for name, number in numbers.items():
        known = _range(number)
        if known and not 0 < known[0] <= known[1] < np.inf:
            raise ValueError(f"{name} is {known[0]:g}; it must be finite and > 0")


def rank(number: chex.Numeric, classes: int, least: int = 1) -> None:
    """Refuses a rank of a class, by its logit, outside ``least..K``.

    Args:
      number: the rank.
      classes: their number ``K``.
      least: 1 if the class with the highest logit is allowed, otherwise 2.

    Raises:
      ValueError: the rank is known, and out of range.

    Example:
      >>> rank(1, 10, least=2)
      Traceback (most recent call last):
      ValueError: rank is 1; with 10 classes it must be in 2..10
    """
    known = _range(number)
    if known and not least <= known[0] <= known[1] <= classes:
        raise ValueError(f"rank is {number}; with {classes} classes it must be in {least}..{classes}")


def vector(name: str, values: Any, size: int | None = None, per: str = "class") -> None:
    """Refuses anything but one number per class, ``[K]``, or per something else.

    Args:
      name: of the argument, for the message.
      values: should be ``[K]``.
      size: ``K``, if it is known.
      per: thing that each number belongs to, for the message.

    Raises:
      ValueError: another shape.

    Example:
      >>> vector("margins", jnp.zeros((1, 10)), 10)
      Traceback (most recent call last):
      ValueError: the shape of margins is [1, 10]; it must be [10], one number per class
    """
    shape = np.shape(values)
    if len(shape) != 1 or not shape[0] or size not in {None, shape[0]}:
        wanted = "K" if size is None else size
        raise ValueError(f"the shape of {name} is {list(shape)}; it must be [{wanted}], one number per {per}")


def class_counts(counts: Any, classes: int | None = None) -> None:
    """Refuses anything but the number of training images per class, ``[K]``, each at least 1.

    Args:
      counts: should be ``[K]``; the values are checked if they are known.
      classes: ``K``, if it is known.

    Raises:
      ValueError: another shape, or a class without images.

    Example:
      >>> class_counts([5000, 0])
      Traceback (most recent call last):
      ValueError: class_counts have the entry 0; every class needs at least 1 training image
    """
    vector("class_counts", counts, classes)
    known = _range(counts)
    if known and not known[0] >= 1:  # NaN is not
        raise ValueError(
            f"class_counts have the entry {known[0]:g}; every class needs at least 1 training image"
        )


def float_logits(**arrays: chex.Array) -> None:
    """Refuses anything but float logits ``[B, K]``, all of one shape.

    Raises:
      ValueError: names the array.

    Example:
      >>> float_logits(logits=jnp.zeros((2, 10)), other_logits=jnp.zeros((1, 10)))
      Traceback (most recent call last):
      ValueError: other_logits have shape [1, 10]; they must be [2, 10], like logits
    """
    first, *_ = arrays
    shape = np.shape(arrays[first])
    if len(shape) != 2:
        raise ValueError(f"{first} have shape {list(shape)}; they must be [B, K]")
    for name, array in arrays.items():
        if np.shape(array) != shape:
            raise ValueError(
                f"{name} have shape {list(np.shape(array))}; they must be {list(shape)}, like {first}"
            )
        if not jnp.issubdtype(jnp.result_type(array), jnp.floating):
            raise ValueError(f"{name} have dtype {jnp.result_type(array)}; they must be floats")


def features_and_weight(features: chex.Array, weight: chex.Array | None = None) -> None:
    """Refuses anything but features ``[B, D]`` and, if given, a weight ``[K, D]``.

    Raises:
      ValueError: a wrong shape.

    Example:
      >>> features_and_weight(jnp.zeros((2, 64)), jnp.zeros((64, 10)))
      Traceback (most recent call last):
      ValueError: weight has shape [64, 10]; it must be [K, 64], one row per class
    """
    shape = np.shape(features)
    if len(shape) != 2:
        raise ValueError(f"features have shape {list(shape)}; they must be [B, D]")
    if weight is not None and (np.ndim(weight) != 2 or np.shape(weight)[1] != shape[1]):
        raise ValueError(
            f"weight has shape {list(np.shape(weight))}; it must be [K, {shape[1]}], one row per class"
        )


def _range(array: Any) -> tuple[Any, Any] | None:
    """Returns the smallest and the largest entry; None where they are not known.

    They are known neither while JAX traces nor of an array that is spread over several processes.
    """
    if isinstance(array, jax.core.Tracer) or not np.size(array):
        return None
    if not isinstance(array, jax.Array):
        return np.min(array), np.max(array)
    if not array.is_fully_addressable:
        return None
    with jax.ensure_compile_time_eval():
        return np.asarray(jnp.min(array))[()], np.asarray(jnp.max(array))[()]
