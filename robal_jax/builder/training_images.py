"""The images of a training: those of the data set that are not held out, and generated ones beside them."""

import functools
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from robal_jax.builder.parts import HeldOut, copied, dataset, generated_per_batch, hold_out
from robal_jax.data import Dataset, Images, epoch_order, generated, inspection
from robal_jax.errors import InputError
from robal_jax.storage.workdir import data_digest, digest_of_images


class TrainingImages(NamedTuple):
    """The images of a training, of one source or two.

    Attributes:
      data: the data set without the images that are held out.
      held: these images; None for none.
      data_sha256: of the whole data set.
      images: that training sees; with generated ones behind those of the data set.
      labels: of these.
      order: epoch, counted from 0, to the numbers of the images that it shows.
      steps_per_epoch: without the last incomplete batch.
      class_counts: of the training images, with generated ones in the proportions of a batch, ``[K]``; as the
        sampler 'uniform' draws them, whatever the sampler.
      stored: see :class:`Training`.
      about: see :class:`Training`.
    """

    data: Dataset
    held: HeldOut | None
    data_sha256: str
    images: Images
    labels: np.ndarray
    order: Callable[[int], np.ndarray]
    steps_per_epoch: int
    class_counts: np.ndarray
    stored: dict[str, Any]
    about: dict[str, str]


def training_images(config: ConfigDict) -> TrainingImages:
    """Reads the images of a training.

    Raises:
      InputError: the config or the data cannot be used.
    """
    generated_per_batch(config)  # may refuse, and reading the data takes long
    whole, size = dataset(config), config.train.batch_size
    data, held = hold_out(config, whole)
    order = _kept(
        functools.partial(
            epoch_order,
            config.train.sampler,
            data.train_labels,
            config.seed,
            images_per_class=config.train.images_per_class,
        )
    )
    steps_per_epoch = len(order(0)) // size
    if not steps_per_epoch:
        raise InputError(
            f"config.train.batch_size is {size}, but an epoch has only {len(order(0))} images; "
            "set a smaller one"
        )
    found = TrainingImages(
        data=data,
        held=held,
        data_sha256=data_digest(whole),
        images=data.train_images,
        labels=data.train_labels,
        order=order,
        steps_per_epoch=steps_per_epoch,
        class_counts=data.class_counts,
        stored={"held_out": held.text} if held else {},
        about={"held out": held.text} if held else {},
    )
    return _with_generated(config, found) if generated_per_batch(config) else found


def _kept(order: Callable[[int], np.ndarray]) -> Callable[[int], np.ndarray]:
    """Keeps the order of the last two epochs: each step needs one, in any of the threads that read images."""
    kept, lock = functools.lru_cache(maxsize=2)(order), threading.Lock()

    def found(epoch: int) -> np.ndarray:
        with lock:  # or several threads would make the same
            return kept(epoch)

    return found


def _with_generated(config: ConfigDict, originals: TrainingImages) -> TrainingImages:
    """Adds generated images to those of the data set; class counts are as if both were drawn uniformly."""
    size, count, data = config.train.batch_size, generated_per_batch(config), originals.data
    more = generated.load_generated(copied(config.generated.path) or config.generated.path, data)
    first, number, share = len(data.train_labels), len(more.labels), count / size
    counts = generated.mixture_counts(data.class_counts, np.bincount(more.labels), share)

    def order(epoch: int) -> np.ndarray:
        return generated.mixed_order(
            originals.order(epoch), batch_size=size, generated=count, first=first, number=number,
            seed=config.seed, epoch=epoch,
        )  # fmt: skip

    sha256 = digest_of_images(more.images, more.labels)
    per_class = inspection.per_class(more.labels, data.class_names)
    drawn = "" if config.train.sampler == "uniform" else " as drawn uniformly"
    real = f"{100 - 100 * share:.3g} % originals + {100 * share:.3g} % generated"
    return originals._replace(
        images=generated.joined(data.train_images, more.images),
        labels=np.concatenate([data.train_labels, more.labels]),
        order=_kept(order),
        class_counts=counts,
        stored={**originals.stored, "generated_sha256": sha256, "class_counts": counts.tolist()},
        about={
            **originals.about,
            "mixture": f"{count} of the {size} images of each batch are generated, from "
            f"{config.generated.path}: {per_class}",
            "prior": f"class prior: of the mixture{drawn}, {real}",
        },
    )
