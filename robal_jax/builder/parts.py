"""The parts of a training or an evaluation, each from its section of the config."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from ml_collections import ConfigDict

from robal_jax import attacks, classifiers, losses, models, objectives, optimizers
from robal_jax.attacks import STARTS, ThreatModel
from robal_jax.builder import contracts
from robal_jax.builder.contracts import calling, takes
from robal_jax.builder.instantiate import call
from robal_jax.data import (
    AUGMENTATIONS,
    Dataset,
    TestSet,
    check_dataset,
    held_out_part,
    inspection,
    sources,
    without,
)
from robal_jax.devices.cpu import cpu_piece
from robal_jax.errors import InputError
from robal_jax.models import convolutions


def dataset(config: ConfigDict) -> Dataset:
    """Loads the long-tailed training set and the balanced test set, on the host."""
    load = call("data set", sources.SOURCES, config.data)
    with calling("data set", config.data.name):
        found = load()
    contracts.check_dataset(config.data.name, found)
    found = check_dataset(found)
    return found._replace(notes=inspection.notes(found))


class HeldOut(NamedTuple):
    """Training images that are held out."""

    test: TestSet  # the images, and the class counts of those that are trained on
    ids: np.ndarray  # their positions in the training set, ascending [n]
    text: str  # how many, in words


def hold_out(config: ConfigDict, data: Dataset) -> tuple[Dataset, HeldOut | None]:
    """Holds out the share ``config.train.held_out`` of the training set.

    Returns:
      The data set without these images, and these images; the data set as it is and None for a share of 0.

    Raises:
      InputError: the share leaves no image of a class.
    """
    ids = held_out_part(data.train_labels, config.train.held_out, config.data.get("seed", 0))
    if not len(ids):
        return data, None
    trained, test = without(data, ids)
    text = f"{len(ids):,} of {len(data.train_labels):,} training images, at least one per class"
    return trained, HeldOut(test, ids, text)


def model(
    config: ConfigDict,
    class_counts: np.ndarray,
    *,
    platform: str,
    precision: str,
    head: ConfigDict | None = None,
    axis_name: str | None = None,
    sync_batch_norm: bool = True,
    images: jax.ShapeDtypeStruct | None = None,
) -> models.Model:
    """Builds the network of ``config.model`` and a head as functions.

    Args:
      config: the whole config.
      class_counts: training images per class, integers ``[K]``.
      platform: of the devices: 'cpu', 'gpu' or 'tpu'; decides how convolutions are computed.
      precision: a key of ``models.PRECISIONS``.
      head: section of the head; ``config.head`` if None.
      axis_name: mapped axis over which batches are spread; None if the network is not trained.
      sync_batch_norm: whether batch norm takes its statistics over ``axis_name``, or from each device's part.
      images: shape of the images of a step, ``[devices, B, H, W, C]``, with which modules of the user's own
        are checked, training passes included if there is an axis; None for no check.

    Raises:
      InputError: a section cannot be used, or a module is not what its contract wants.
    """
    on_cpu = platform == "cpu"
    backbone = call(
        "model",
        models.BACKBONES,
        config.model,
        convolution=convolutions.cpu_convolution if on_cpu else convolutions.convolution,
        axis_name=axis_name if sync_batch_norm else None,
    )
    classifier = call(
        "head",
        classifiers.HEADS,
        config.head if head is None else head,
        num_classes=len(class_counts),
        class_counts=tuple(int(count) for count in class_counts),
        axis_name=axis_name,
    )
    names = {"model": config.model.name, "head": (config.head if head is None else head).name}
    with calling("model", names["model"]):
        backbone = backbone()
    with calling("head", names["head"]):
        classifier = classifier()
    # Of the library's own modules only batch norm's wish for more than one value is still open.
    if images is not None and (images.shape[1] == 1 or any(":" in name for name in names.values())):
        check = functools.partial(contracts.check_module, trained=axis_name is not None)
        features = check("model", names["model"], backbone, images)
        check("head", names["head"], classifier, features, len(class_counts))
    network = models.Network(backbone, classifier)
    return models.functional(network, precision=precision, piece=cpu_piece() if on_cpu else None)


def objective(
    config: ConfigDict, class_counts: np.ndarray, axis_name: str | None = None
) -> objectives.Objective:
    """Builds the function that a step minimises, with its attack and loss bound."""
    threat = ThreatModel(config.threat.epsilon, config.threat.norm)
    given: dict[str, Any] = {"class_counts": class_counts, "axis_name": axis_name, "threat": threat}
    loss = call("loss", losses.LOSSES, config.loss, **given)
    inner_loss = call("loss", losses.LOSSES, config.attack.loss, **given)
    attack = functools.partial(
        attacks.pgd,
        threat=threat,
        steps=config.attack.steps,
        step_size=config.attack.step_size,
        start=STARTS[config.attack.start],
        loss=inner_loss,
    )
    function = call("objective", objectives.OBJECTIVES, config.objective, attack=attack, loss=loss, **given)
    _check_parts(config, loss, inner_loss, function)
    for section, bound in ((config.loss, loss), (config.attack.loss, inner_loss)):
        contracts.check_loss(section, bound, len(class_counts))
    if not takes(loss, "epoch"):
        return function
    return lambda model, params, stats, batch: function(
        model, params, stats, batch, loss=functools.partial(loss, epoch=batch.epoch)
    )


def _check_parts(
    config: ConfigDict, loss: functools.partial, inner_loss: functools.partial, function: functools.partial
) -> None:
    """Raises an ``InputError`` if the losses, the attack and the objective do not fit together."""
    if not takes(function, "loss") and config.loss.name != "cross_entropy":
        raise InputError(
            f"objective {config.objective.name!r} has a loss of its own and would ignore config.loss "
            f"{config.loss.name!r}; set config.loss to cross_entropy"
        )
    base = loss.keywords.get("base")  # of a deferred loss
    if base and loss.keywords.get("reweight", True) and not takes(base, "class_weights"):
        raise InputError(
            f"config.loss.base {config.loss.base.name!r} takes no class weights; "
            "set config.loss.reweight=False"
        )
    if takes(inner_loss, "epoch"):
        raise InputError("config.attack.loss depends on the epoch; use such a loss as config.loss only")
    if config.threat.norm == "l2" and config.attack.start == "one_sided":
        raise InputError(
            "config.attack.start 'one_sided' is for norm linf; for l2 use 'uniform' or 'gaussian'"
        )


def optimizer(
    config: ConfigDict, steps_per_epoch: int
) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """Builds the optimiser, and its schedule: from a step to a learning rate."""
    rates_of, epochs = call("schedule", optimizers.SCHEDULES, config.schedule), config.train.epochs
    with calling("schedule", config.schedule.name):
        rates = rates_of(epochs=epochs)
    rates = contracts.check_schedule(config.schedule.name, rates, epochs)
    schedule = optimizers.per_step(rates, steps_per_epoch)
    make = call("optimizer", optimizers.OPTIMIZERS, config.optimizer, schedule=schedule)
    with calling("optimizer", config.optimizer.name):
        return make(), schedule


def augmentation(name: str, data: Dataset) -> Callable[..., Any]:
    """Returns one of ``AUGMENTATIONS``, from the size of stored training images to that of test images."""
    stored, (_, height, width, _) = data.train_images.shape[1:3], data.test_images.shape
    if stored != (height, width) and name != "resized_crop_flip":
        raise InputError(
            f"config.train.augmentation {name!r} leaves the training images at {stored}, but the test images "
            f"are {(height, width)}; use 'resized_crop_flip', or set config.data.resize to "
            "config.data.image_size"
        )
    augmentation = AUGMENTATIONS[name]
    return lambda keys, images: augmentation(keys, images, (height, width))
