"""The model under attack and the images that it is attacked on, on all devices of the job.

Evaluation code is written for one batch, ``(logits_fn, keys, images, labels)``; :meth:`Victim.compile` turns
it into a function of image indices that handles batching and devices.
"""

import math
from collections.abc import Callable
from functools import partial

import chex
import jax
import numpy as np

from robal_jax.data import Images, as_float
from robal_jax.devices import parallel
from robal_jax.keys import key_of, numbered_keys

Work = Callable[..., chex.ArrayTree]
"""``(logits_fn, keys [b], images [b, H, W, C], labels [b], *parts [b, ...], **shared) -> [b, ...]``."""


def on_batch(work: Work, predict: Callable[..., chex.Array], pixel_max: int) -> parallel.Spread:
    """Returns work as one device does it on its part of the images.

    Args:
      work: on a model and floats in [0, 1].
      predict: ``(params, stats, images) -> logits``.
      pixel_max: the pixel value that becomes 1.

    Returns:
      ``((numbers [b], images [b, H, W, C], labels [b], *parts), ((params, stats, key), shared)) -> outputs``.
    """

    def on_device(parts: tuple, shared: tuple) -> chex.ArrayTree:
        (numbers, images, labels, *more), ((params, stats, key), extra) = parts, shared
        keys = numbered_keys(key, numbers)
        logits_fn = partial(predict, params, stats)
        return work(logits_fn, keys, as_float(images, pixel_max), labels, *more, **extra)

    return on_device


class Victim:
    """A model and the images that it is attacked on.

    Attributes:
      predict: images to logits, outside of compiled functions.
      images: uint8 ``[n, H, W, C]``, in memory or read when they are needed; or float32 in [0, 1].
      labels: ``[n]``.
      pixel_max: the pixel value that becomes 1.
      ids: numbers of the images in the whole test set, ascending ``[n]``.
      size: images in each call of a compiled function, on all devices together.
    """

    def __init__(
        self,
        predict: Callable[[chex.ArrayTree, chex.ArrayTree, chex.Array], chex.Array],
        params: chex.ArrayTree,
        stats: chex.ArrayTree,
        images: Images,
        labels: np.ndarray,
        *,
        ids: np.ndarray | None = None,
        pixel_max: int,
        seed: int,
        batch_size: int,
        layout: str,
    ) -> None:
        """Puts the model on all devices; the images follow batch by batch.

        Args:
          predict: ``(params, stats, images) -> logits``.
          params: of the model.
          stats: its batch-norm statistics.
          images: uint8 or float32 ``[n, H, W, C]``.
          labels: ``[n]``.
          ids: numbers of the images in the whole test set, ascending ``[n]``; 0..n-1 if None.
          pixel_max: the pixel value that becomes 1.
          seed: the random numbers of an image follow from it and from the image's number in ``ids``.
          batch_size: images per device in each call.
          layout: a key of ``parallel.LAYOUTS``.
        """
        self._predict, self._layout, self._devices = predict, layout, parallel.devices_for(layout)
        self._shared = parallel.replicate((params, stats, key_of(seed)), self._devices)
        self.predict = partial(predict, params, stats)
        self.images, self.labels, self.pixel_max = images, labels, pixel_max
        self.ids = np.arange(len(labels)) if ids is None else ids
        self.size = batch_size * jax.device_count()

    def size_for(self, count: int) -> int:
        """Images in each call, on all devices together, if there are only ``count``.

        A device never computes more than ``count``. How many it does compute is the same for any number of
        devices, so that results do not depend on that number.
        """
        devices = jax.device_count()
        return min(self.size // devices, count) * devices

    @property
    def pixels(self) -> int:
        """Numbers per image."""
        return math.prod(self.images.shape[1:])

    def floats(self, ids: np.ndarray) -> np.ndarray:
        """Returns images by index as the model sees them: float32 ``[m, H, W, C]`` in [0, 1]."""
        return np.array(as_float(self.images[ids], self.pixel_max), np.float32)

    def compile(
        self, work: Work, predict: Callable | None = None, size: int | None = None, *, given: bool = False
    ) -> Callable[..., chex.ArrayTree]:
        """Turns work on one batch into a function of image indices, compiled once for any number of images.

        Args:
          work: is called with the model, one key per image, images in [0, 1], labels, and the caller's extra
            arguments.
          predict: a function in place of the model, with the same arguments.
          size: images in each call, on all devices together; ``self.size`` if None.
          given: whether the images are the first of the parts, in place of those of the test set, which are
            then not read.

        Returns:
          ``(ids [m], *parts [m, ...], **shared) -> outputs [m, ...]``, NumPy arrays, any m > 0. The last
          batch is filled up with its last image.
        """
        predict = self._predict if predict is None else predict

        compiled = parallel.spread(on_batch(work, predict, self.pixel_max), self._layout, self._devices)

        def run(ids: np.ndarray, *parts: np.ndarray, **shared: np.ndarray) -> chex.ArrayTree:
            def on_devices(mine: np.ndarray, *more: np.ndarray) -> chex.ArrayTree:
                images, *others = more if given else (self.images[mine], *more)
                examples = (self.ids[mine], images, self.labels[mine], *others)
                return compiled(examples, (self._shared, shared))

            return parallel.in_batches(on_devices, (ids, *parts), size or self.size)

        return run
