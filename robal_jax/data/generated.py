"""Images that a generator made, drawn beside the training set at a fixed share of each batch.

Images of both sources have one range of numbers: ``0..N-1`` are the training set's, ``N..N+M-1`` the
generated ones. An epoch's order names both, so that all that reads an order need not know of the second
source.
"""

import dataclasses
import pathlib
from typing import Any, NamedTuple

import numpy as np

from robal_jax.data.cifar import reading_file
from robal_jax.data.dataset import Dataset, Images, check_labels
from robal_jax.data.image_folder import ImageFiles, foldered
from robal_jax.errors import InputError, user_path

NAMES = ({"images", "labels"}, {"image", "label"})
"""Names of the arrays in an .npz file: ours, and those of Wang et al. (ICML 2023)."""


class Generated(NamedTuple):
    """Generated images and their labels: M images, as large as stored training images."""

    images: Images  # uint8 [M, H, W, C], 0..pixel_max
    labels: np.ndarray  # int32 [M], 0..K-1


def load_generated(path: str, data: Dataset) -> Generated:
    """Reads generated images for a data set.

    Args:
      path: a file ``FILE.npz`` with arrays ``images`` (uint8 ``[M, H, W, C]``) and ``labels`` (integers
        ``[M]``), or ``image`` and ``label``; or a folder with one sub-folder per class, whose name is that of
        the class or its number. Files are resized to the size of the training images, and read on demand.
      data: the data set; images and labels must be like those of its training set.

    Returns:
      The images and their labels.

    Raises:
      InputError: the file or folder is missing or damaged, or has images of another shape, type or range, or
        has labels that are no classes of the data set, or lacks a class.
    """
    place = user_path(path)
    if not place.exists():
        raise InputError(f"no file or folder {place} of generated images; correct config.generated.path")
    found = _of_folder(place, data) if place.is_dir() else _of_npz(place)
    check_labels(found.labels, len(data.class_names), f"{place}: generated images")
    shape = data.train_images.shape[1:]
    if found.images.shape[1:] != shape:
        raise InputError(
            f"{place}: generated images are {list(found.images.shape[1:])} and training images "
            f"{list(shape)}; give both the same size and channels"
        )
    if isinstance(found.images, ImageFiles):
        found.images.check()
    largest = int(found.images.max()) if isinstance(found.images, np.ndarray) else 255
    if largest > data.pixel_max:
        raise InputError(
            f"{place}: generated images have pixels up to {largest}, training images up to {data.pixel_max}; "
            "give both the same range"
        )
    return found._replace(labels=found.labels.astype(np.int32))


def _of_npz(file: pathlib.Path) -> Generated:
    """Reads an .npz file."""
    with (
        reading_file(f"{file} as an .npz file of generated images", "write it again with np.savez"),
        file.open("rb") as stream,  # np.load leaves a damaged file that it opened itself open
        np.load(stream, allow_pickle=False) as content,
    ):
        held = set(content.files)
        names = next((names for names in NAMES if names <= held), None)
        if names is None:
            raise InputError(
                f"{file} holds {', '.join(content.files) or 'nothing'}; store the arrays images and labels"
            )
        images, labels = (content[name] for name in sorted(names))
    if images.dtype != np.uint8 or images.ndim != 4:
        raise InputError(f"{file}: images are {images.dtype} {list(images.shape)}; store uint8 [M, H, W, C]")
    if labels.dtype.kind not in "iu" or labels.shape != images.shape[:1]:
        raise InputError(
            f"{file}: labels are {labels.dtype} {list(labels.shape)}; store {len(images)} integers, one per "
            "image"
        )
    return Generated(images, labels)


def _of_folder(folder: pathlib.Path, data: Dataset) -> Generated:
    """Finds the images of a folder with one sub-folder per class."""
    split, known = foldered(str(folder), ""), data.class_names
    numbers = tuple(map(str, range(len(known))))
    names = numbers if set(split.names) <= set(numbers) - set(known) else known
    others = sorted(set(split.names) - set(names))
    if others:
        raise InputError(
            f"{folder} has a sub-folder {others[0]!r}, which is no class of the data set; name sub-folders "
            f"after its classes, such as {known[0]!r}"
        )
    number = {name: names.index(name) for name in split.names}
    height, width = data.train_images.shape[1:3]
    if height != width:
        raise InputError(f"training images are {height} x {width}; give generated images as an .npz file")
    images = ImageFiles(tuple(split.paths), height, height, str(folder))
    return Generated(images, np.array([number[split.names[label]] for label in split.labels]))


def per_batch(share: float, batch_size: int) -> int:
    """Returns how many images of a batch are generated: ``share * batch_size``, rounded down.

    Args:
      share: in [0, 1).
      batch_size: images per batch.

    Returns:
      The number. A product that is a whole number but for its rounding is that number.

    Example:
      >>> per_batch(0.7, 512), per_batch(0.29, 100)
      (358, 29)
    """
    return int(share * batch_size + 1e-9)


def mixture_counts(counts: np.ndarray, generated: np.ndarray, share: float) -> np.ndarray:
    """Returns class counts in the proportions of a batch's images from both sources.

    ``N ((1 - s) n_i / N + s g_i / M)``, with ``N = sum_i n_i`` and ``M = sum_i g_i``: divided by their sum
    they are the class prior of a batch

    Args:
      counts: training images per class, ``n [K]``.
      generated: generated images per class, ``g [K]``.
      share: of generated images in a batch, ``s`` in [0, 1).

    Returns:
      float64 ``[K]`` with the sum ``N``.

    Raises:
      InputError: a class would have less than one image.

    Source: what follows from the batches of Wang et al. (ICML 2023); the label prior of the balanced softmax
    (Ren et al., NeurIPS 2020) is that of the batches.

    Example:
      >>> mixture_counts(np.array([90, 10]), np.array([500, 500]), 0.5)
      array([70., 30.])
    """
    counts, generated = np.asarray(counts, float), np.asarray(generated, float)
    mixture = (1 - share) * counts + share * counts.sum() * generated / generated.sum()
    if mixture.min() < 1:
        raise InputError(
            f"class {mixture.argmin()} has {mixture.min():.2g} of {counts.sum():g} images in the mixture "
            "with generated images; generate more images of it, or lower config.generated.share"
        )
    return mixture


def places(generated: int, batch_size: int) -> np.ndarray:
    """Returns which places of a batch have generated images, spread evenly.

    Any part of consecutive places, such as that of a device, has the share of the whole, to within one image.

    Example:
      >>> places(3, 8).astype(int)
      array([0, 0, 1, 0, 0, 1, 0, 1])
    """
    return np.diff(np.arange(batch_size + 1) * generated // batch_size) > 0


def mixed_order(
    originals: np.ndarray, *, batch_size: int, generated: int, first: int, number: int, seed: int, epoch: int
) -> np.ndarray:
    """Returns the order in which an epoch visits images of both sources, a function of the arguments only.

    An epoch has as many batches as one of the training set alone, ``len(originals) // batch_size``. Each has
    ``batch_size - generated`` training images, the next ones in their own order, so that an epoch shows the
    part ``1 - generated / batch_size`` of them, another part in each epoch. The generated images of a batch
    are drawn uniformly with replacement.

    Args:
      originals: the epoch's order of the training images, integers ``[draws]``.
      batch_size: images per batch, ``B``.
      generated: generated images per batch, 1..B-1.
      first: number of the first generated image.
      number: of generated images.
      seed: training seed, >= 0.
      epoch: epoch number, >= 0.

    Returns:
      int32 ``[(draws // B) * B]``, batch after batch, see :func:`places`.

    Source: Wang et al. (ICML 2023), their sampler; the last, incomplete batch is dropped here.

    Example:
      >>> mixed_order(np.arange(8), batch_size=4, generated=2, first=8, number=100, seed=0, epoch=0)
      array([ 0, 97,  1, 60,  2, 93,  3, 26], dtype=int32)
    """
    steps = len(originals) // batch_size
    # The streams of Philox and of RandomState never change; the 1 tells this one from that of the originals.
    draw = np.random.RandomState(np.random.Philox(np.random.SeedSequence([seed, epoch, 1])))
    order, made = np.empty((steps, batch_size), np.int32), places(generated, batch_size)
    order[:, made] = first + draw.randint(0, number, (steps, generated), dtype=np.int64)
    order[:, ~made] = originals[: steps * (batch_size - generated)].reshape(steps, -1)
    return order.reshape(-1)


@dataclasses.dataclass(frozen=True)
class Joined:
    """Images of two sources under one range of numbers, as :class:`data.Images`.

    Attributes:
      first: ``[N, H, W, C]``, the numbers ``0..N-1``.
      second: ``[M, H, W, C]``, the numbers ``N..N+M-1``.
    """

    first: Images
    second: Images

    @property
    def shape(self) -> tuple[int, ...]:
        """``(N + M, H, W, C)``."""
        return (len(self), *self.first.shape[1:])

    @property
    def dtype(self) -> np.dtype:
        """uint8."""
        return self.first.dtype

    def __len__(self) -> int:
        """N + M."""
        return len(self.first) + len(self.second)

    def __getitem__(self, ids: Any, /) -> np.ndarray:
        """Returns the images at ``ids``, integers ``[...]`` or a slice: uint8 ``[..., H, W, C]``."""
        ids = np.asarray(range(len(self))[ids] if isinstance(ids, slice) else ids)
        images, later = np.empty((*ids.shape, *self.shape[1:]), self.dtype), ids >= len(self.first)
        images[~later] = self.first[ids[~later]]
        images[later] = self.second[ids[later] - len(self.first)]
        return images


def joined(first: Images, second: Images) -> Images:
    """Returns images of two sources under one range of numbers; one array if both are arrays."""
    if isinstance(first, np.ndarray) and isinstance(second, np.ndarray):
        return np.concatenate([first, second])
    return Joined(first, second)
