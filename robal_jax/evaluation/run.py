"""A trained run as a function from images to logits."""

import dataclasses
import json
import pathlib
from collections.abc import Callable
from functools import cached_property
from typing import Any

import chex
import jax
import numpy as np

from robal_jax import builder, checks
from robal_jax.data import TestSet, as_float
from robal_jax.storage import buckets
from robal_jax.storage.best import default_checkpoint
from robal_jax.storage.config_file import read_config, to_json
from robal_jax.storage.user_code import warn_if_changed
from robal_jax.storage.workdir import check_same_data, class_counts_in_training, restore_weights

IMAGES_AT_ONCE = 500


@dataclasses.dataclass(frozen=True)
class Run:
    """The weights of a run, and the model as it is evaluated: at its logit scale, with its prior adjustment.

    Attributes:
      params: trained parameters, nested dictionaries of NumPy arrays.
      stats: batch-norm statistics, nested dictionaries of NumPy arrays.
      config: the resolved config, nested dictionaries.
      checkpoint: folder of the checkpoint.
      sha256: of the checkpoint's arrays.
      test: the test set of the run, with the class counts and the class names.
      predict: ``(params, stats, images [B, H, W, C] in [0, 1]) -> logits [B, K]``, for use inside of
        ``jax.jit``.
    """

    params: dict[str, Any]
    stats: dict[str, Any]
    config: dict[str, Any]
    checkpoint: pathlib.Path
    sha256: str
    test: TestSet
    predict: Callable[[Any, Any, chex.Array], chex.Array]

    @property
    def logits_fn(self) -> Callable[[chex.Array], chex.Array]:
        """The model as an attack knows it: floats ``[B, H, W, C]`` in [0, 1] to logits ``[B, K]``."""

        def logits_fn(images: chex.Array) -> chex.Array:
            checks.floats(images=images)
            return self.predict(self.params, self.stats, images)

        return logits_fn

    @cached_property
    def _compiled(self) -> Callable[..., chex.Array]:
        return jax.jit(
            lambda params, stats, images: self.predict(params, stats, as_float(images, self.test.pixel_max))
        )

    def logits(self, images: np.ndarray) -> np.ndarray:
        """Predicts any number of images.

        Args:
          images: ``[n, H, W, C]``, floats in [0, 1] or integers in ``0..test.pixel_max``.

        Returns:
          float32 ``[n, K]``.

        Raises:
          ValueError: the images have another shape than those of the run, their pixels are out of range, or
            there are none.
        """
        checks.stored_images(self.test.images.shape[1:], self.test.pixel_max, images)
        images = np.asarray(images)
        parts = np.split(images, range(IMAGES_AT_ONCE, len(images), IMAGES_AT_ONCE))
        return np.concatenate([np.asarray(self._compiled(self.params, self.stats, part)) for part in parts])


def load_run(
    workdir: str | pathlib.Path,
    *,
    checkpoint: str | pathlib.Path | None = None,
    weights: str | None = None,
    data_path: str | None = None,
) -> Run:
    """Loads a run that was trained or imported.

    Args:
      workdir: folder of the run, or its URL, see ``storage.buckets``.
      checkpoint: folder of one checkpoint; if None, the one that the config selects: the newest undamaged one
        or the best.
      weights: 'current', those after the last step, or 'average', the average that the run kept of them; if
        None, what its config evaluates.
      data_path: ``config.data.path`` on this machine; that of the run if None.

    Returns:
      The run.

    Raises:
      InputError: there is no run or checkpoint, it is damaged, or the run's data are not there.
    """
    chosen = None if checkpoint is None else buckets.inside(checkpoint, workdir)
    workdir = buckets.fetched(workdir)
    config = builder.with_data_at(data_path, read_config(workdir))
    job = builder.evaluation(builder.without_ensemble(config), class_counts_in_training(workdir))
    check_same_data(job.data_sha256, workdir, print)
    warn_if_changed(config, workdir, print)
    chosen = default_checkpoint(workdir, job.select) if chosen is None else chosen
    which = job.weights if weights is None else weights
    tree, path, sha256 = restore_weights(workdir, chosen, job.variables, print, which)
    fields = json.loads(to_json(config))
    return Run(tree["params"], tree["stats"], fields, path, sha256, job.test, job.predict)
