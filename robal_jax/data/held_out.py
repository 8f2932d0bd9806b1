"""A data set without some of its training images, and these as images to evaluate on."""

import dataclasses

import numpy as np

from robal_jax.data.dataset import Dataset, Images, TestSet
from robal_jax.data.image_folder import ImageFiles


def without(data: Dataset, ids: np.ndarray) -> tuple[Dataset, TestSet]:
    """Divides the training set.

    Args:
      data: the whole data set.
      ids: positions of the training images that are held out, ascending ``[n]``, n >= 1.

    Returns:
      The data set without them, whose class counts are those of the images that are left; and the images
      held out, each cut to its centre if test images are smaller, with the same class counts.
    """
    kept = np.setdiff1d(np.arange(len(data.train_labels)), ids)
    rest = data._replace(train_images=part_of(data.train_images, kept), train_labels=data.train_labels[kept])
    images = _centre(part_of(data.train_images, ids), data.test_images.shape[1:3])
    return rest, rest.test_set._replace(images=images, labels=data.train_labels[ids])


def part_of(images: Images, ids: np.ndarray) -> Images:
    """Returns the images at ``ids``; files stay unread."""
    return images.part(ids) if isinstance(images, ImageFiles) else images[ids]


def _centre(images: Images, sides: tuple[int, ...]) -> Images:
    """Returns the centre of each image, as a test image of files is cut."""
    if isinstance(images, ImageFiles):
        return dataclasses.replace(images, size=sides[0])
    top, left = ((have - want) // 2 for have, want in zip(images.shape[1:3], sides, strict=True))
    return images[:][:, top : top + sides[0], left : left + sides[1]]
