"""Data sets as arrays or as files that are read on demand, their checks, and pixels as floats."""

from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from robal_jax.errors import InputError


class Images(Protocol):
    """Images that are read on demand, from memory or from files; a NumPy array is one.

    Symbols: N images H x W x C.
    """

    @property
    def shape(self) -> tuple[int, ...]:
        """``(N, H, W, C)``."""

    @property
    def dtype(self) -> np.dtype:
        """uint8."""

    def __len__(self) -> int:
        """N."""

    def __getitem__(self, ids: Any, /) -> np.ndarray:
        """Returns the images at integers ``[...]`` or a slice: uint8 ``[..., H, W, C]``; thread-safe."""


class TestSet(NamedTuple):
    """The images that a model is evaluated on, and the class counts and names of the training set.

    Symbols: M test images, K classes, images H x W x C.
    """

    images: Images  # uint8 [M, H, W, C], 0..pixel_max; or float32 in [0, 1]
    labels: np.ndarray  # int32 [M], 0..K-1
    pixel_max: int  # the pixel value that becomes 1; 1 for float images
    class_counts: np.ndarray  # training images per class, int64 [K]
    class_names: tuple[str, ...]  # [K]
    notes: tuple[str, ...] = ()  # what a person should know of the data, line by line


class Dataset(NamedTuple):
    """A long-tailed train set and a balanced test set of images in [0, 1], stored as integers.

    Symbols: N train images, M test images, K classes, images H x W x C. The model sees uint8 / pixel_max. A
    subset that was cut to a long tail is in class order, class 0 (the head) first, as in the paper. Train
    images may be larger than test images; augmentation then makes them equal.
    """

    train_images: Images  # uint8 [N, H, W, C], 0..pixel_max
    train_labels: np.ndarray  # int32 [N], 0..K-1
    test_images: Images  # uint8 [M, H, W, C], 0..pixel_max
    test_labels: np.ndarray  # int32 [M], 0..K-1
    pixel_max: int
    class_names: tuple[str, ...]  # [K]
    notes: tuple[str, ...] = ()  # what a person should know of the data, line by line

    @property
    def class_counts(self) -> np.ndarray:
        """Train images per class, n_i: int64 ``[K]``."""
        return np.bincount(self.train_labels, minlength=len(self.class_names)).astype(np.int64)

    @property
    def test_set(self) -> TestSet:
        """Returns the part that an evaluation needs."""
        counts, names = self.class_counts, self.class_names
        return TestSet(self.test_images, self.test_labels, self.pixel_max, counts, names, self.notes)


def to_float(images: jax.Array, pixel_max: int) -> jax.Array:
    """Returns integer pixels as floats in [0, 1]: images / pixel_max, correctly rounded.

    Args:
      images: uint8 ``[...]``, 0..pixel_max.
      pixel_max: the value that becomes 1.

    Returns:
      ``[...]``, float32, or float64 if JAX's x64 mode is on.
    """
    # A table, because XLA turns a division by a constant into a product with its rounded inverse, which is
    # one ulp off for half of the 256 values.
    return jnp.asarray(np.arange(pixel_max + 1) / pixel_max, dtype=float)[images]


def as_float(images: jax.Array | np.ndarray, pixel_max: int) -> jax.Array:
    """Returns images in [0, 1]: integers converted by :func:`to_float`, floats unchanged."""
    images = jnp.asarray(images)
    return images if jnp.issubdtype(images.dtype, jnp.floating) else to_float(images, pixel_max)


def check_labels(labels: np.ndarray, num_classes: int, what: str) -> None:
    """Checks that labels are in 0..num_classes-1 and that every class occurs.

    Args:
      labels: integers ``[N]``.
      num_classes: K.
      what: name of the labels in the message.

    Raises:
      InputError: a label is out of range, or a class has no image.
    """
    if len(labels) and not (labels.min() >= 0 and labels.max() < num_classes):
        raise InputError(
            f"{what}: labels {labels.min()}..{labels.max()} found, but {num_classes} classes need labels "
            f"0..{num_classes - 1}; number the classes from 0, or check that this is the right data set"
        )
    counts = np.bincount(labels, minlength=num_classes)
    if 0 in counts:
        raise InputError(f"{what}: class {np.argmin(counts)} has no image; give at least one image per class")


def check_dataset(dataset: Dataset) -> Dataset:
    """Checks what training and evaluation assume about a data set.

    Returns:
      The data set itself; with a note if its training images are so dark that ``pixel_max`` may be wrong.

    Raises:
      InputError: there are fewer than two classes, a dtype or shape is wrong, a label is out of range, a
        class has no train or no test image, a pixel of an array is above ``pixel_max``, or train images are
        smaller than test images. Images in files are not read for this.
    """
    if len(dataset.class_names) < 2:
        named = f" ({dataset.class_names[0]})" if dataset.class_names else ""
        raise InputError(
            f"the data set has {len(dataset.class_names)} class{'es' * (not named)}{named}; give at least two"
        )
    for split, images, labels in (
        ("train", dataset.train_images, dataset.train_labels),
        ("test", dataset.test_images, dataset.test_labels),
    ):
        for what, found in (("images", images), ("labels", labels)):
            if not (hasattr(found, "dtype") and hasattr(found, "shape")):
                raise InputError(f"{split} {what} are a {type(found).__name__}; give a NumPy array")
        if images.dtype != np.uint8 or len(images.shape) != 4:
            raise InputError(f"{split} images are {images.dtype} {images.shape}; give uint8 [N, H, W, C]")
        if labels.dtype != np.int32 or labels.shape != images.shape[:1]:
            raise InputError(
                f"{split} labels are {labels.dtype} {labels.shape}; give int32 [{len(images)}], one per image"
            )
        check_labels(labels, len(dataset.class_names), f"{split} set")
        if isinstance(images, np.ndarray) and images.max() > dataset.pixel_max:
            raise InputError(
                f"{split} images have pixels up to {images.max()}, above pixel_max {dataset.pixel_max}; "
                "correct pixel_max"
            )
    channels = [images.shape[3] for images in (dataset.train_images, dataset.test_images)]
    if channels[0] != channels[1]:
        raise InputError(
            f"train images have {channels[0]} channels and test images {channels[1]}; give both the same"
        )
    trained, tested = (images.shape[1:3] for images in (dataset.train_images, dataset.test_images))
    if min(np.subtract(trained, tested)) < 0:
        raise InputError(
            f"train images are {trained[0]} x {trained[1]} and test images {tested[0]} x {tested[1]}; "
            "enlarge train images, or cut test images"
        )
    images = dataset.train_images
    brightest = int(images.max()) if isinstance(images, np.ndarray) else 0
    if 0 < 2 * brightest < dataset.pixel_max:
        note = (
            f"note: no training image has a pixel above {brightest}, and pixel_max, which becomes 1, is "
            f"{dataset.pixel_max}; if it is wrong, so is every radius"
        )
        return dataset._replace(notes=tuple(dict.fromkeys([*dataset.notes, note])))  # once, if checked twice
    return dataset
