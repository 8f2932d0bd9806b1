"""Checks of what users pass in: rank, type and range of arrays, each with one plain message.

Shapes and types are checked while JAX traces, so a compiled program contains nothing of them. Values are
checked where they are known: not inside ``jax.jit``.
"""

import itertools
from collections.abc import Callable, Mapping
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np

from robal_jax.errors import InputError, one_line, shown

SMALLEST, LARGEST = 1e-6, 1e6
"""Ends of the range of a factor of logits: beyond it a softmax is flat or saturated, or logits overflow."""

UNTRACEABLE = (jax.errors.JAXTypeError, jax.errors.NonConcreteBooleanIndexError)
"""Errors of a function that JAX traces, and that looks at values."""

NEEDS_VALUES = (
    "needs the values of its arguments, which JAX cannot trace; write it with jax.numpy, not numpy, also "
    "arrays that it only indexes (jnp.asarray), and without branches on values"
)


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
    if not hasattr(labels, "dtype"):
        raise ValueError(f"{name} are a {type(labels).__name__}; pass jnp.asarray({name})")
    shape, dtype = _shape_and_type(labels)
    if len(shape) == 2 and shape[0] == batch:
        what = f"one column; pass {name}[:, 0]" if shape[1] == 1 else f"one-hot; pass jnp.argmax({name}, -1)"
        raise ValueError(f"{name} have shape {list(shape)}, they seem to be {what}; {name} must be [B]")
    if shape != (batch,):
        raise ValueError(f"{name} have shape {list(shape)}; they must be [{batch}], one per image")
    if not jnp.issubdtype(dtype, jnp.integer):
        raise ValueError(f"{name} have dtype {dtype}; they must be integers, the numbers of the classes")


def labels_in(classes: int, labels: chex.Array, name: str = "labels", per: str = "logits") -> None:
    """Refuses labels outside ``0..K-1``.

    Args:
      classes: their number ``K``.
      labels: integers ``[B]``.
      name: of the argument, for the message.
      per: what there is one of per class, for the message.

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
            f"{name} are in {known[0]}..{known[1]}; with {classes} {per} they must be in 0..{classes - 1}"
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


def called(function: Any, images: chex.Array, *more: Any, name: str = "logits_fn") -> chex.Array:
    """Calls a model of the user's; any error of it becomes one line.

    Args:
      function: images ``[B, ...]`` to logits ``[B, K]``.
      images: ``[B, ...]``.
      *more: further arguments, such as keys.
      name: of the function, for the message.

    Returns:
      The logits, see :func:`logits_of`.

    Raises:
      ValueError: it is no function, it fails, or it does not return logits.

    Example:
      >>> called(lambda x: x.reshape(100, 64), jnp.zeros((2, 8, 8, 1)))
      Traceback (most recent call last):
      ValueError: logits_fn fails for 2 images (TypeError: cannot reshape array of shape (2, 8, 8, 1) (size \
128) into shape (100, 64) (size 6400)); pass a function of any number of images [B, 8, 8, 1] and of nothing \
else, such as lambda images: model.apply(variables, images)
    """
    takes = f"any number of images [B, {', '.join(map(str, images.shape[1:]))}]"
    advice = (
        f"pass a function of {takes} and of {'their keys [B]' if more else 'nothing else'}, such as "
        f"lambda images{', keys' * bool(more)}: model.apply(variables, images)"
    )
    if not callable(function):
        raise ValueError(f"{name} is a {type(function).__name__}; {advice}")
    try:
        found = function(images, *more)
    except UNTRACEABLE as error:
        raise ValueError(f"{name} {NEEDS_VALUES}") from error
    except (RuntimeError, MemoryError):  # of the machine
        raise
    except Exception as error:
        raise ValueError(f"{name} fails for {len(images)} images ({one_line(error)}); {advice}") from error
    return logits_of(len(images), found, name)


def logits_of(batch: int, found: Any, name: str = "logits_fn") -> chex.Array:
    """Refuses what a model returns, unless it is one array of float logits ``[B, K]`` of several classes.

    Losses are computed from the logits in at least float32.

    Args:
      batch: number of images ``B`` that the model was given.
      found: what it returned.
      name: of the model, for the message.

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
        raise ValueError(f"{name} returns a {kind}; it must return one array of logits [B, K]")
    shape, dtype = found.shape, found.dtype
    if len(shape) != 2 or shape[0] != batch or shape[1] < 2 or not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(
            f"{name} returns {dtype}{list(shape)} for {batch} images; "
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
      ValueError: images have pixels in [9, 9]; they must be finite and in [0, 1], the threat model's bounds \
(image 0 is the first of 1 that are not)
    """
    shape, dtype = _shape_and_type(images)
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
        pixels = np.asarray(images, dtype).reshape(shape[0], -1)
        others = np.flatnonzero(~((pixels >= ends[0]) & (pixels <= ends[-1])).all(1))
        raise ValueError(
            f"images have pixels in [{float(ends[1]):.8g}, {float(ends[2]):.8g}]; "
            f"they must be finite and in [{lower:g}, {upper:g}], the threat model's bounds "
            f"(image {others[0]} is the first of {len(others)} that are not)"
        )


def channels_last(images: chex.Array) -> None:
    """Refuses images without an axis of channels, ``[n, H, W]``, or with any other number of axes but four.

    Raises:
      ValueError: they have.

    Example:
      >>> channels_last(jnp.zeros((2, 28, 28)))
      Traceback (most recent call last):
      ValueError: images have shape [2, 28, 28]; they must be [n, H, W, C]: for one channel pass \
images[..., None]
    """
    shape = np.shape(images)
    if len(shape) != 4:
        raise ValueError(
            f"images have shape {list(shape)}; they must be [n, H, W, C]: for one channel pass "
            "images[..., None]"
        )
    if shape[1] in (1, 3) and min(shape[2:]) > 4:
        raise ValueError(
            f"images have shape {list(shape)}; they must be [n, H, W, C], channels last: pass "
            "images.transpose(0, 2, 3, 1), and a model that takes such images"
        )


def stored_images(shape: tuple[int, ...], pixel_max: int, images: Any) -> None:
    """Refuses images that are not like those of a data set: floats in [0, 1], or integers.

    Args:
      shape: of one image, ``(H, W, C)``.
      pixel_max: largest integer, which stands for 1.
      images: should be ``[n, H, W, C]``.

    Raises:
      ValueError: another shape or type, or a pixel out of range.

    Example:
      >>> stored_images((8, 8, 1), 16, np.full((2, 8, 8, 1), 255, np.uint8))
      Traceback (most recent call last):
      ValueError: images have pixels in [255, 255]; pass floats in [0, 1], or integers in 0..16
    """
    found, dtype = _shape_and_type(images)
    if found[:1] == (0,):
        raise ValueError(f"there are no images: they have shape {found}; pass at least one")
    if found[1:] != tuple(shape):
        raise ValueError(f"images have shape {found}; pass (n, {', '.join(map(str, shape))})")
    pixels = f"pass floats in [0, 1], or integers in 0..{pixel_max}"
    if not _is_real(dtype):
        raise ValueError(f"images have dtype {dtype}; {pixels}")
    known = _range(images)
    most = pixel_max if jnp.issubdtype(dtype, jnp.integer) else 1
    if known and not 0 <= known[0] <= known[1] <= most:  # NaN is not
        raise ValueError(f"images have pixels in [{known[0]:.8g}, {known[1]:.8g}]; {pixels}")


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
    """Refuses anything but integers of ``least`` or more.

    Raises:
      ValueError: names the number.

    Example:
      >>> at_least(1, steps=20, restarts=0)
      Traceback (most recent call last):
      ValueError: restarts is 0; it must be at least 1
    """
    _each(numbers, lambda number: number >= least, f"at least {least}", whole=True)


def numbers(**numbers: chex.Numeric) -> None:
    """Refuses anything but real numbers.

    Raises:
      ValueError: names the number.

    Example:
      >>> numbers(lower="0")
      Traceback (most recent call last):
      ValueError: lower is '0'; it must be a number
    """
    _each(numbers, lambda number: True, "")


def positive(**numbers: chex.Numeric) -> None:
    """Refuses anything but numbers above 0 that are finite, in float32 too.

    Raises:
      ValueError: names the number.

    Example:
      >>> positive(step_size=float("nan"))
      Traceback (most recent call last):
      ValueError: step_size is nan; it must be finite and > 0
    """
    least, most = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)
    _each(numbers, lambda number: 0 < number < np.inf, "finite and > 0")
    _each(
        numbers, lambda number: least <= number <= most, f"in {least:.2g}..{most:.2g}, the range of float32"
    )


def not_negative(**numbers: chex.Numeric) -> None:
    """Refuses anything but finite numbers of 0 or more.

    Raises:
      ValueError: names the number.

    Example:
      >>> not_negative(weight_decay=-1.0)
      Traceback (most recent call last):
      ValueError: weight_decay is -1; it must be finite and >= 0
    """
    _each(numbers, lambda number: 0 <= number < np.inf, "finite and >= 0")


def below_one(**numbers: chex.Numeric) -> None:
    """Refuses anything but numbers in ``[0, 1)``.

    Raises:
      ValueError: names the number.

    Example:
      >>> below_one(momentum=1.5)
      Traceback (most recent call last):
      ValueError: momentum is 1.5; it must be in [0, 1)
    """
    _each(numbers, lambda number: 0 <= number < 1, "in [0, 1)")


def factor(**numbers: chex.Numeric) -> None:
    """Refuses anything but numbers that logits may be multiplied with or divided by.

    Raises:
      ValueError: names the number.

    Example:
      >>> factor(scale=0.0)
      Traceback (most recent call last):
      ValueError: scale is 0; it must be in 1e-06..1e+06
    """
    _each(numbers, lambda number: SMALLEST <= number <= LARGEST, f"in {SMALLEST:g}..{LARGEST:g}")


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
      InputError: another shape, or no numbers.

    Example:
      >>> vector("margins", jnp.zeros((1, 10)), 10)
      Traceback (most recent call last):
      robal_jax.errors.InputError: the shape of margins is [1, 10]; it must be [10], one number per class
    """
    shape, dtype = _shape_and_type(values)
    must = f"it must be [{'K' if size is None else size}], one number per {per}"
    if not _is_real(dtype):
        raise InputError(f"{name} is {shown(values)}; {must}")
    if len(shape) != 1 or not shape[0] or size not in {None, shape[0]}:
        raise InputError(f"the shape of {name} is {list(shape)}; {must}")


def lengths(
    name: str, values: Any, size: int | None = None, per: str = "class", *, zero: bool = False
) -> None:
    """Refuses anything but one length per class, ``[K]``, or per something else: finite and above 0.

    Args:
      name: of the argument, for the message.
      values: should be ``[K]``; they are checked if they are known.
      size: ``K``, if it is known.
      per: thing that each length belongs to, for the message.
      zero: whether a length may be 0.

    Raises:
      InputError: another shape, no numbers, or a length out of range.

    Example:
      >>> lengths("epsilon", (0.1, -0.2))
      Traceback (most recent call last):
      robal_jax.errors.InputError: epsilon has the entry -0.2; each must be finite and > 0
    """
    vector(name, values, size, per)
    known = _range(values)
    if known and not (0 <= known[0] <= known[1] < np.inf and (zero or known[0] > 0)):  # NaN is not
        wrong = known[1] if known[0] > 0 or (zero and known[0] == 0) else known[0]
        raise InputError(
            f"{name} has the entry {wrong:g}; each must be finite and {'>= 0' if zero else '> 0'}"
        )


def class_counts(counts: Any, classes: int | None = None, *, whole: bool = False) -> None:
    """Refuses anything but the number of training images per class, ``[K]``, each at least 1.

    Args:
      counts: should be ``[K]``; the values are checked if they are known.
      classes: ``K``, if it is known.
      whole: whether they must be whole numbers; those of a mixture of two sources are not.

    Raises:
      InputError: another shape, no whole numbers if they must be, or a class without images.

    Example:
      >>> class_counts([5000, 0])
      Traceback (most recent call last):
      robal_jax.errors.InputError: class_counts have the entry 0; every class needs at least 1 training image
    """
    vector("class_counts", counts, classes)
    known = _range(counts)
    if known and not 1 <= known[0] <= known[1] < np.inf:  # NaN is not
        wrong = known[1] if known[0] >= 1 else known[0]
        raise InputError(
            f"class_counts have the entry {wrong:g}; every class needs at least 1 training image"
        )
    if whole and known and np.any(np.asarray(counts) % 1):
        raise InputError("class_counts have fractions; give whole numbers of training images")


def class_weights(weights: Any, classes: int) -> None:
    """Refuses anything but one finite weight per class, ``[K]``, each at least 0.

    Args:
      weights: should be ``[K]``; the values are checked if they are known.
      classes: ``K``.

    Raises:
      InputError: another shape, no numbers, or a weight that is negative or not finite.

    Example:
      >>> class_weights([1.0, -1.0], 2)
      Traceback (most recent call last):
      robal_jax.errors.InputError: class_weights are in -1..1; they must be finite and >= 0
    """
    vector("class_weights", weights, classes)
    known = _range(weights)
    if known and not 0 <= known[0] <= known[1] < np.inf:
        raise InputError(f"class_weights are in {known[0]:g}..{known[1]:g}; they must be finite and >= 0")


def floats(**arrays: chex.Array) -> None:
    """Refuses anything but arrays of floats.

    Raises:
      ValueError: names the array.

    Example:
      >>> floats(images=np.zeros((2, 8, 8, 1), np.uint8))
      Traceback (most recent call last):
      ValueError: images have dtype uint8; pass floats in [0, 1]
    """
    for name, array in arrays.items():
        if not jnp.issubdtype(_shape_and_type(array)[1], jnp.floating):
            raise ValueError(f"{name} have dtype {_shape_and_type(array)[1]}; pass floats in [0, 1]")


def fraction(**arrays: chex.Array) -> None:
    """Refuses anything but numbers in ``[0, 1]``, or arrays of them.

    Raises:
      ValueError: names the array.

    Example:
      >>> fraction(confidence=90)
      Traceback (most recent call last):
      ValueError: confidence is 90; it must be in [0, 1]
    """
    for name, array in arrays.items():
        known = _range(array) if _is_real(_shape_and_type(array)[1]) else (np.nan, np.nan)
        if known and not 0 <= known[0] <= known[1] <= 1:  # NaN is not
            raise ValueError(f"{name} is {shown(array)}; it must be in [0, 1]")


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


def _each(
    numbers: Mapping[str, Any], holds: Callable[[Any], bool], must: str, *, whole: bool = False
) -> None:
    """Refuses anything but one real number each, or one integer, for which a condition holds."""
    for name, number in numbers.items():
        shape, dtype = _shape_and_type(number)
        if shape or not _is_real(dtype) or (whole and not jnp.issubdtype(dtype, jnp.integer)):
            raise ValueError(f"{name} is {shown(number)}; it must be {'an integer' if whole else 'a number'}")
        known = _range(number)
        if known and not holds(known[0].item()):
            raise ValueError(f"{name} is {known[0] if whole else format(known[0], 'g')}; it must be {must}")


def _shape_and_type(values: Any) -> tuple[tuple[int, ...], np.dtype]:
    """Returns the shape and the type in which JAX holds an array; ``object`` for what is none."""
    if not isinstance(values, jax.Array):
        try:
            values = np.asarray(None if isinstance(values, Mapping) else values)
        except ValueError:  # rows of different lengths
            values = np.asarray(None)
        if not _is_real(values.dtype):
            return values.shape, values.dtype
        if not values.dtype.isnative:
            raise ValueError(
                f"an array has the byte order {values.dtype.str!r}; "
                "convert it: array.astype(array.dtype.newbyteorder('='))"
            )
    return values.shape, jnp.result_type(values)


def _is_real(dtype: np.dtype) -> bool:
    """Returns whether a type is one of integers or floats."""
    return jnp.issubdtype(dtype, jnp.integer) or jnp.issubdtype(dtype, jnp.floating)


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
