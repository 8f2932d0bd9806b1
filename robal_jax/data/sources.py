"""The data sets that a config can name: scikit-learn's digits, CIFAR from TFDS or .npz, image folders."""

from collections.abc import Callable
from functools import partial

import numpy as np

from robal_jax.data import cifar, image_folder
from robal_jax.data.dataset import Dataset, check_dataset
from robal_jax.data.long_tail import long_tailed_counts
from robal_jax.errors import InputError


def load_digits_lt(
    ratio: float = 0.05, profile: str = "exp", head: int = 104, test_per_class: int = 70, seed: int = 0
) -> Dataset:
    """Makes a long-tailed set of scikit-learn's handwritten digits: 8 x 8 x 1 images of 0..16, no download.

    Args:
      ratio: n_min / n_max, the inverse of IR, in (0, 1].
      profile: 'exp' or 'step', see :func:`data.long_tailed_counts`.
      head: train images of class 0, 1..174 - test_per_class.
      test_per_class: test images per class, >= 1.
      seed: decides which digit is class 0 (the head), 1, ... and which images are used.

    Returns:
      The data set; ``class_names`` are the digits.

    Raises:
      InputError: there are not enough images, or see :func:`data.long_tailed_counts`.
    """
    from sklearn.datasets import load_digits

    digits = load_digits()
    smallest = np.bincount(digits.target).min()
    if test_per_class < 1 or test_per_class + head > smallest:
        raise InputError(
            f"the rarest digit has {smallest} images: {test_per_class} for the test set leave "
            f"{smallest - test_per_class} for training, fewer than head {head}; "
            f"lower head or test_per_class (1 or more)"
        )
    counts = long_tailed_counts(head, len(digits.target_names), ratio, profile)
    rng = np.random.RandomState(seed)
    order = rng.permutation(len(counts))
    train_ids, test_ids = [], []
    for digit, count in zip(order, counts, strict=True):
        positions = np.flatnonzero(digits.target == digit)
        rng.shuffle(positions)
        test_ids.append(positions[:test_per_class])
        train_ids.append(positions[test_per_class : test_per_class + count])
    images = digits.images.astype(np.uint8)[..., None]
    labels = np.arange(len(counts), dtype=np.int32)
    dataset = Dataset(
        train_images=images[np.concatenate(train_ids)],
        train_labels=np.repeat(labels, counts),
        test_images=images[np.concatenate(test_ids)],
        test_labels=np.repeat(labels, test_per_class),
        pixel_max=16,
        class_names=tuple(str(digit) for digit in order),
    )
    return check_dataset(dataset)


SOURCES: dict[str, Callable[..., Dataset]] = {
    "digits_lt": load_digits_lt,
    "cifar10_lt": partial(cifar.load_cifar_lt, "cifar10"),
    "cifar100_lt": partial(cifar.load_cifar_lt, "cifar100"),
    "image_folder": image_folder.load_image_folder,
}
"""Data sets by name: functions that return a :class:`Dataset`, as its docstring describes it."""

SHAPES = {
    "digits_lt": (10, (8, 8, 1)),
    "cifar10_lt": (10, (32, 32, 3)),
    "cifar100_lt": (100, (32, 32, 3)),
}
"""Number of classes and image shape of these data sets, for what needs no data; folders have their own."""
