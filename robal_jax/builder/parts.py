"""The parts of a training or an evaluation, each from its section of the config."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np
import optax
from ml_collections import ConfigDict

from robal_jax import budgets, classifiers, models, optimizers
from robal_jax.averages import AVERAGES, Average
from robal_jax.budgets import BUDGETS, LEARNED, Budget
from robal_jax.builder import contracts, modules
from robal_jax.builder.contracts import takes
from robal_jax.builder.instantiate import call
from robal_jax.class_statistics import CLASS_STATISTICS, ClassStatistics
from robal_jax.data import (
    AUGMENTATIONS,
    RESIZING,
    Dataset,
    TestSet,
    check_dataset,
    generated,
    held_out_part,
    inspection,
    sources,
    without,
)
from robal_jax.devices.cpu import cpu_piece
from robal_jax.errors import InputError
from robal_jax.keys import fold_in
from robal_jax.models import convolutions
from robal_jax.own_functions import calling
from robal_jax.perturbations import PERTURBATIONS, Perturbation
from robal_jax.storage import buckets


def copied(path: Any) -> str:
    """Returns the place of a copy of what a URL names, see ``storage.buckets``; '' for any other value."""
    return str(buckets.fetched(path)) if isinstance(path, str) and buckets.is_url(path) else ""


def dataset(config: ConfigDict) -> Dataset:
    """Loads the long-tailed training set and the balanced test set, on the host."""
    load = call("data set", sources.SOURCES, config.data)
    if path := copied(load.keywords.get("path")):
        load = functools.partial(load, path=path)
    with calling("data set", config.data.name):
        found = load()
    contracts.check_dataset(config.data.name, found)
    found = check_dataset(found)
    return found._replace(notes=inspection.notes(found))


def generated_per_batch(config: ConfigDict) -> int:
    """Returns how many images of each batch are generated; 0 if all are of the training set.

    Raises:
      InputError: ``config.generated`` has only one of its fields, or leaves no image of one source.
    """
    (path, share), size = (config.generated[name] for name in ("path", "share")), config.train.batch_size
    if not path and not share:
        return 0
    if not path:
        raise InputError(
            f"config.generated.share is {share:g}, but config.generated.path is empty; name an .npz file or "
            "a folder of generated images, or set the share to 0"
        )
    if not share:
        raise InputError(
            f"config.generated.path is {path!r}, but config.generated.share is 0; set a share in (0, 1), "
            "such as 0.7, or leave the path empty"
        )
    count = generated.per_batch(share, size)
    if not 0 < count < size:
        raise InputError(
            f"config.generated.share {share:g} of config.train.batch_size {size} is {count} images; set a "
            "share that leaves at least one image of each source in a batch"
        )
    return count


def _backbone(config: ConfigDict, **given: Any) -> nn.Module:
    """Builds the module of ``config.model``."""
    function = call("model", models.BACKBONES, config.model, **given)
    with calling("model", config.model.name):
        return function()


def standardisation(config: ConfigDict) -> dict[str, tuple[float, ...]]:
    """Returns ``mean`` and ``std`` with which the network standardises its images; () for none."""
    backbone = _backbone(config, convolution=convolutions.convolution, axis_name=None)
    found = {name: getattr(backbone, name, ()) for name in ("mean", "std")}
    return {name: tuple(numbers) for name, numbers in found.items() if isinstance(numbers, tuple | list)}


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
      class_counts: training images per class ``[K]``.
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
    backbone = _backbone(
        config,
        convolution=convolutions.OF_PLATFORM.get(platform, convolutions.convolution),
        axis_name=axis_name if sync_batch_norm else None,
    )
    classifier = call(
        "head",
        classifiers.HEADS,
        config.head if head is None else head,
        num_classes=len(class_counts),
        class_counts=tuple(class_counts.tolist()),
        axis_name=axis_name,
    )
    names = {"model": config.model.name, "head": (config.head if head is None else head).name}
    with calling("head", names["head"]):
        classifier = classifier()
    # Of the library's own modules only batch norm's wish for more than one value is still open.
    if images is not None and (images.shape[1] == 1 or any(":" in name for name in names.values())):
        check = functools.partial(modules.check_module, trained=axis_name is not None)
        features = check("model", names["model"], backbone, images)
        check("head", names["head"], classifier, features, len(class_counts))
    network = models.Network(backbone, classifier)
    piece = cpu_piece() if on_cpu else None
    return models.functional(
        network,
        precision=precision,
        piece=piece,
        accelerator=not on_cpu,
        cast_kernels=":" not in names["model"],
    )


def optimizer(
    config: ConfigDict, steps_per_epoch: int
) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """Builds the optimiser, and its schedule: from a step to a learning rate."""
    rates_of, epochs = call("schedule", optimizers.SCHEDULES, config.schedule), config.train.epochs
    by_step = takes(rates_of, "steps_per_epoch")
    with calling("schedule", config.schedule.name):
        rates = rates_of(epochs=epochs, **({"steps_per_epoch": steps_per_epoch} if by_step else {}))
    count, unit = (epochs * steps_per_epoch, "step") if by_step else (epochs, "epoch")
    rates = contracts.check_schedule(config.schedule.name, rates, count, unit)
    schedule = optimizers.per_step(rates, 1 if by_step else steps_per_epoch)
    make = call("optimizer", optimizers.OPTIMIZERS, config.optimizer, schedule=schedule)
    with calling("optimizer", config.optimizer.name):
        return make(), schedule


def perturbation(config: ConfigDict) -> Perturbation | None:
    """Builds the perturbation of the weights; None for none.

    Raises:
      InputError: it would also perturb weights that are not trained.
    """
    trained = config.optimizer.get("trainable")
    if config.perturbation.name == "awp" and trained:
        raise InputError(
            f"config.perturbation 'awp' perturbs all weights, and config.optimizer.trainable {trained!r} "
            "leaves some untrained; set config.perturbation.name to 'none', or leave trainable empty"
        )
    make = call("perturbation", PERTURBATIONS, config.perturbation)
    with calling("perturbation", config.perturbation.name):
        return make()


def average(config: ConfigDict, steps_per_epoch: int) -> Average:
    """Builds the average of the weights.

    Raises:
      InputError: an evaluation asks for an average, and there is none.
    """
    if config.evaluation.weights == "average" and config.average.name == "none":
        raise InputError(
            "config.evaluation.weights is 'average', but config.average.name is 'none'; choose an average"
        )
    make = call("average", AVERAGES, config.average, steps_per_epoch=steps_per_epoch)
    with calling("average", config.average.name):
        return make()


def budget(config: ConfigDict, class_counts: np.ndarray) -> Budget | None:
    """Builds the radii by class of a training; None if all classes have epsilon from the first epoch on."""
    section, ramp, epsilon = config.threat.budget, config.threat.ramp, config.threat.epsilon
    given = {"class_counts": class_counts, "epsilon": epsilon}
    make = call("budget", BUDGETS | LEARNED, section, **given)
    if section.name == "constant" and not ramp:
        return None
    with calling("budget", section.name):
        made = make()
        if isinstance(made, Budget):
            contracts.check_budget(section.name, made, len(class_counts))
            found = made
        else:
            contracts.check_radii(
                f"config.threat.budget {section.name!r}", made, config.threat.norm, len(class_counts)
            )
            found = budgets.fixed(np.asarray(made))
    return budgets.ramped(found, epochs=config.train.epochs, beta=ramp) if ramp else found


def class_statistics(config: ConfigDict, class_counts: np.ndarray) -> ClassStatistics | None:
    """Builds what a training gathers of the classes; None for nothing."""
    name = config.class_statistics.name
    make = call("class statistics", CLASS_STATISTICS, config.class_statistics, class_counts=class_counts)
    with calling("class statistics", name):
        made = make()
    if made is not None:
        contracts.check_class_statistics(name, made, len(class_counts))
    return made


def gathered_arrays(budget: Budget | None, statistics: ClassStatistics | None) -> dict[str, jax.Array]:
    """Returns what a training keeps of the classes before its first step, arrays by name.

    Raises:
      InputError: both keep an array of the same name.
    """
    kept: dict[str, jax.Array] = {}
    for each in (budget and budget.statistics, statistics):
        arrays = {} if each is None else each.init()
        for name in kept.keys() & arrays.keys():
            raise InputError(
                f"config.threat.budget and config.class_statistics both keep an array {name!r}; rename "
                "that of your own"
            )
        kept |= arrays
    return kept


def augmentations(names: str, pixel_max: int) -> list[tuple[str, functools.partial]]:
    """Returns the augmentations of a list, names and functions ``(keys, images, size) -> images``."""
    sections = [ConfigDict({"name": name}) for name in names.split(",")]
    return [(each.name, call("augmentation", AUGMENTATIONS, each, pixel_max=pixel_max)) for each in sections]


def augmentation(names: str, data: Dataset) -> Callable[..., Any]:
    """Builds a list of augmentations as one, from the size of stored training images to that of test images.

    They are applied in their order. The first of ``RESIZING`` resizes, or else the first function of the
    user's own. One augmentation alone gets the images' keys, several get a stream of them each.

    Raises:
      InputError: a name is unknown, none resizes where that is needed, or a function of the user's own does
        not return what its contract wants.
    """
    stored, size = data.train_images.shape[1:3], data.test_images.shape[1:3]
    functions = augmentations(names, data.pixel_max)
    able = [i for i, (name, _) in enumerate(functions) if name in RESIZING]
    able += [i for i, (name, _) in enumerate(functions) if ":" in name]
    if stored != size and not able:
        raise InputError(
            f"config.train.augmentation {names!r} leaves the training images at {stored}, but the test "
            f"images are {size}; use 'resized_crop_flip', or set config.data.resize to config.data.image_size"
        )
    sizes = [stored if able and i < able[0] else size for i in range(len(functions))]
    images = jax.ShapeDtypeStruct((1 + max(stored + size), *data.train_images.shape[1:]), np.uint8)
    for (name, function), each in zip(functions, sizes, strict=True):
        images = contracts.check_augmentation(name, function, images, each)

    def augment(keys: jax.Array, images: jax.Array) -> jax.Array:
        for i, ((_, function), each) in enumerate(zip(functions, sizes, strict=True)):
            images = function(keys if len(functions) == 1 else fold_in(keys, i), images, each)
        return images

    return augment
