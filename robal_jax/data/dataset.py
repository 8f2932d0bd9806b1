"""Long-tailed subsets, sampling orders and augmentation: arrays in, arrays out, no files."""

from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from robal_jax.errors import InputError


class Images(Protocol):
    """Images that are read when they are asked for; an array in memory is the simplest of them.

    Symbols: N images H x W x C.
    """

    @property
    def shape(self) -> tuple[int, ...]:
        """(N, H, W, C)."""

    @property
    def dtype(self) -> np.dtype:
        """uint8."""

    def __len__(self) -> int:
        """N."""

    def __getitem__(self, ids: Any, /) -> np.ndarray:
        """Integers [...], or a slice, to uint8 [..., H, W, C]; may be called from several threads."""


class TestSet(NamedTuple):
    """The images that a model is evaluated on, and what the report must know of the training set.

    Symbols: M test images, K classes, images H x W x C.
    """

    images: Images  # uint8 [M, H, W, C], 0..pixel_max; or float32 in [0, 1]
    labels: np.ndarray  # int32 [M], 0..K-1
    pixel_max: int  # the pixel value that becomes 1; 1 for float images
    class_counts: np.ndarray  # training images of each class, int64 [K]
    class_names: tuple[str, ...]  # [K]


class Dataset(NamedTuple):
    """A long-tailed train set and a balanced test set of images in [0, 1], stored as integers.

    Symbols: N train images, M test images, K classes, images H x W x C. An image is
    uint8 / pixel_max. A subset that was cut to a long tail is in class order, class 0 (the head) first,
    as the paper's. Train images may be larger than test images: augmentation then makes them equal.
    """

    train_images: Images  # uint8 [N, H, W, C], 0..pixel_max
    train_labels: np.ndarray  # int32 [N], 0..K-1
    test_images: Images  # uint8 [M, H, W, C], 0..pixel_max
    test_labels: np.ndarray  # int32 [M], 0..K-1
    pixel_max: int
    class_names: tuple[str, ...]  # [K]

    @property
    def class_counts(self) -> np.ndarray:
        """Train images of each class, n_i: int64 [K]."""
        return np.bincount(self.train_labels, minlength=len(self.class_names)).astype(np.int64)

    @property
    def test_set(self) -> TestSet:
        """Returns the part that an evaluation needs."""
        counts, names = self.class_counts, self.class_names
        return TestSet(self.test_images, self.test_labels, self.pixel_max, counts, names)


def to_float(images: jax.Array, pixel_max: int) -> jax.Array:
    """Integer pixels as floats in [0, 1]: images / pixel_max, correctly rounded.

    Args:
        images: uint8 [...], 0..pixel_max.
        pixel_max: the value that stands for 1.

    Returns:
        float [...], float32, or float64 where JAX's x64 mode is on.
    """
    # Looked up, because XLA turns a division by a constant into a product with its rounded inverse,
    # which is one ulp off for half of the 256 values.
    return jnp.asarray(np.arange(pixel_max + 1) / pixel_max, dtype=float)[images]


def as_float(images: jax.Array | np.ndarray, pixel_max: int) -> jax.Array:
    """Images in [0, 1]: integers as :func:`to_float` gives them, floats as they are."""
    images = jnp.asarray(images)
    return images if jnp.issubdtype(images.dtype, jnp.floating) else to_float(images, pixel_max)


def check_labels(labels: np.ndarray, num_classes: int, what: str) -> None:
    """Checks that labels are in 0..num_classes-1 and that every class occurs.

    Args:
        labels: integers [N].
        num_classes: K.
        what: name of the labels in the message.

    Raises:
        InputError: a label out of range or a class without an image.
    """
    if len(labels) and not (labels.min() >= 0 and labels.max() < num_classes):
        raise InputError(
            f"{what}: labels {labels.min()}..{labels.max()} found, but {num_classes} classes need labels "
            f"0..{num_classes - 1}; check that the data match the data set's name"
        )
    counts = np.bincount(labels, minlength=num_classes)
    if 0 in counts:
        raise InputError(f"{what}: class {np.argmin(counts)} has no image; every class needs at least one")


def check_dataset(dataset: Dataset) -> Dataset:
    """Checks everything that training and evaluation take for granted about a data set.

    Returns:
        The data set itself.

    Raises:
        InputError: wrong dtype or shape, labels out of range, a class without a train or a test image, or
            pixels above pixel_max in an array; images that would have to be read are not.
    """
    for split, images, labels in (
        ("train", dataset.train_images, dataset.train_labels),
        ("test", dataset.test_images, dataset.test_labels),
    ):
        if images.dtype != np.uint8 or len(images.shape) != 4:
            raise InputError(
                f"{split} images must be uint8 [N, H, W, C]: found {images.dtype} {images.shape}"
            )
        if labels.dtype != np.int32 or labels.shape != images.shape[:1]:
            raise InputError(
                f"{split} labels must be int32 [{len(images)}], one for each image: "
                f"found {labels.dtype} {labels.shape}"
            )
        check_labels(labels, len(dataset.class_names), f"{split} set")
        if isinstance(images, np.ndarray) and images.max() > dataset.pixel_max:
            raise InputError(
                f"{split} images have pixels up to {images.max()}, above pixel_max {dataset.pixel_max}"
            )
    channels = [images.shape[3] for images in (dataset.train_images, dataset.test_images)]
    if channels[0] != channels[1]:
        raise InputError(f"train images have {channels[0]} channels and test images {channels[1]}")
    return dataset
