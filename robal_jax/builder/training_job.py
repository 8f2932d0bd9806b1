"""From a config to plain functions and values: the only module that reads config fields.

A section with a ``name`` stands for a function of one of the library's tables (``LOSSES``, ``HEADS``, ...),
or of the user's own where the name has the form ``module:function``; the section's other keys are its
keyword arguments. Everything is checked here, before any long work starts.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import optax
from ml_collections import ConfigDict

from robal_jax import metrics, models, objectives
from robal_jax.builder.parts import augmentation, dataset, model, objective, optimizer
from robal_jax.builder.ranges import validate
from robal_jax.data import Dataset, epoch_order
from robal_jax.devices import parallel
from robal_jax.errors import InputError


class Settings(NamedTuple):
    """Fields of ``config.train`` that the training loop reads as they are; configs/base.py explains them."""

    start_from: str
    batch_size: int
    accumulation_steps: int
    reading_threads: int
    steps_per_dispatch: int
    checkpoint_epochs: int
    keep_checkpoints: int
    layout: str


@dataclasses.dataclass(frozen=True)
class Training:
    """All that the training loop needs.

    Attributes:
      data: the images.
      model: the network.
      objective: ``(model, params, stats, batch) -> (loss, Outcome)``.
      optimizer: of the parameters.
      schedule: learning rate of a step.
      seed: of everything random.
      settings: how the loop runs.
      order: epoch, counted from 0, to the numbers of the images that it shows.
      augment: ``(keys [n], images) -> images``, integers to integers.
      steps_per_epoch: the last incomplete batch is dropped.
      total_steps: of the whole run.
    """

    data: Dataset
    model: models.Model
    objective: objectives.Objective
    optimizer: optax.GradientTransformation
    schedule: optax.Schedule
    seed: int
    settings: Settings
    order: Callable[[int], np.ndarray]
    augment: Callable[..., Any]
    steps_per_epoch: int
    total_steps: int


def training(config: ConfigDict) -> Training:
    """Builds everything that a training run needs, and checks it.

    Raises:
      InputError: a field of the config, or the data, cannot be used.
    """
    validate(config)
    data, settings = dataset(config), config.train
    as_they_are = {name: settings[name] for name in Settings._fields}
    counts = data.class_counts
    # Kept, because each step asks for its epoch's.
    order = functools.lru_cache(maxsize=2)(
        functools.partial(epoch_order, settings.sampler, data.train_labels, config.seed)
    )
    steps_per_epoch = len(order(0)) // settings.batch_size
    if not steps_per_epoch:
        raise InputError(
            f"config.train.batch_size is {settings.batch_size}, but an epoch has only {len(order(0))} images"
        )
    total_steps = steps_per_epoch * settings.epochs
    # Training does not need the groups, but an evaluation that is sure to fail should fail now.
    metrics.class_groups(counts, config.evaluation.head_classes, config.evaluation.tail_classes)
    as_they_are["steps_per_dispatch"] = min(settings.steps_per_dispatch, steps_per_epoch)
    optimise, schedule = optimizer(config, steps_per_epoch)
    return Training(
        data=data,
        model=model(
            config,
            counts,
            precision=settings.precision,
            axis_name=parallel.AXIS,
            sync_batch_norm=settings.sync_batch_norm,
        ),
        objective=objective(config, counts, parallel.AXIS),
        optimizer=optimise,
        schedule=schedule,
        seed=config.seed,
        settings=Settings(**as_they_are),
        order=order,
        augment=augmentation(settings.augmentation, data),
        steps_per_epoch=steps_per_epoch,
        total_steps=min(total_steps, settings.max_steps or total_steps),
    )
