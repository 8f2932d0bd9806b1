"""From a config to a :class:`Training`: everything is built and checked here, before any long work starts."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from ml_collections import ConfigDict

from robal_jax import models, objectives
from robal_jax.attacks import NORMS, FreeSteps, ThreatModel, autoattack
from robal_jax.averages import Average
from robal_jax.budgets import BUDGETS, Budget
from robal_jax.builder import contracts
from robal_jax.builder.evaluation_job import Evaluation, evaluation_on, groups_of, part_to_evaluate, radii_of
from robal_jax.builder.instantiate import call
from robal_jax.builder.minimised import attacks_divergence, batch_norm_momentum, free_steps, objective
from robal_jax.builder.parts import (
    augmentation,
    augmentations,
    average,
    budget,
    class_statistics,
    gathered_arrays,
    generated_per_batch,
    model,
    optimizer,
    perturbation,
)
from robal_jax.builder.ranges import check_selection, validate
from robal_jax.builder.training_images import TrainingImages, training_images
from robal_jax.class_statistics import ClassStatistics
from robal_jax.data import Dataset, Images, sources
from robal_jax.devices import parallel
from robal_jax.errors import InputError
from robal_jax.perturbations import Perturbation
from robal_jax.storage.config_file import ingredients


class Settings(NamedTuple):
    """Fields of ``config.train`` for the training loop; configs/base.py explains them."""

    start_from: str
    teacher: str
    batch_size: int
    accumulation_steps: int
    reading_threads: int
    steps_per_dispatch: int
    checkpoint_epochs: int
    keep_checkpoints: int
    layout: str
    batch_norm_momentum: float | None  # None for the usual 0.1
    mixing: str
    evaluate_epochs: int
    logged_passes: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Training:
    """Everything that the training loop needs.

    Attributes:
      data: the data set, without the images that are held out.
      images: what ``order`` numbers: the training set's images, then the generated ones.
      labels: of these images, int32 ``[N]``.
      stored: what the run's folder says of the data beside their digest: 'held_out', how many images are,
        in words; 'generated_sha256' of generated images, and the 'class_counts' of the mixture with them.
      model: the network.
      objective: ``(model, params, stats, batch) -> (loss, Outcome)``.
      optimizer: of the parameters.
      perturbation: of the weights at which the gradient is taken; None for none.
      average: of the weights.
      budget: radii by class; None for one radius.
      class_statistics: what is gathered of the classes; None for nothing.
      free_steps: the attack, if each batch is shown several times; None for the objective's own attack.
      schedule: ``step -> learning rate``.
      seed: of everything random.
      settings: how the loop runs.
      order: epoch, counted from 0, to the numbers of the images that it shows.
      augment: ``(keys [n], images) -> images``, integers to integers.
      steps_per_epoch: without the last incomplete batch.
      total_steps: of the whole run.
      about: method, network, data, attack and length in words, by the first word of their line.
      data_sha256: of the whole training set and the test set.
      judged: the images on which the weights are judged during the training, and how; None for none.
      judged_on: which images these are: 'held-out' or 'test'.
    """

    data: Dataset
    images: Images
    labels: np.ndarray
    stored: dict[str, Any]
    model: models.Model
    objective: objectives.Objective
    optimizer: optax.GradientTransformation
    perturbation: Perturbation | None
    average: Average
    budget: Budget | None
    class_statistics: ClassStatistics | None
    free_steps: FreeSteps | None
    schedule: optax.Schedule
    seed: int
    settings: Settings
    order: Callable[[int], np.ndarray]
    augment: Callable[..., Any]
    steps_per_epoch: int
    total_steps: int
    about: dict[str, str]
    data_sha256: str
    judged: Evaluation | None
    judged_on: str


def training(config: ConfigDict, devices: Sequence[jax.Device] | None = None) -> Training:
    """Builds everything that a training run needs, and checks it.

    Args:
      config: of the run.
      devices: all that the run will have, those of a target too (``devices.targets``); those present if None.

    Raises:
      InputError: a field of the config, or the data, cannot be used.
    """
    validate(config)
    check_selection(config)
    source, train = training_images(config), config.train
    data, steps_per_epoch = source.data, source.steps_per_epoch
    total_steps = steps_per_epoch * train.epochs
    if total_steps >= 2**31:
        raise InputError(
            f"config.train.epochs makes {total_steps} steps; set fewer, so that they are below 2^31"
        )
    # Training does not need them, but an evaluation that is sure to fail should fail now.
    groups_of(config, data.class_counts)
    radii_of(config, data.class_counts)
    part_to_evaluate(config, data.test_set)
    optimise, schedule = optimizer(config, steps_per_epoch)
    devices = jax.devices() if devices is None else devices
    images = _images_of_a_step(config, data, len(devices))
    network = model(
        config,
        source.class_counts,
        platform=devices[0].platform,
        precision=train.precision,
        axis_name=parallel.AXIS,
        sync_batch_norm=train.sync_batch_norm,
        images=images,
    )
    total_steps = min(total_steps, train.max_steps or total_steps)
    job = Training(
        data=data,
        images=source.images,
        labels=source.labels,
        stored=source.stored,
        model=network,
        objective=objective(config, source.class_counts, parallel.AXIS),
        optimizer=optimise,
        average=average(config, steps_per_epoch),
        perturbation=perturbation(config),
        budget=budget(config, source.class_counts),
        class_statistics=class_statistics(config, source.class_counts),
        free_steps=free_steps(config),
        schedule=schedule,
        seed=config.seed,
        settings=_settings(config, steps_per_epoch),
        order=source.order,
        augment=augmentation(train.augmentation, data),
        steps_per_epoch=steps_per_epoch,
        total_steps=total_steps,
        about=_about(config, data, steps_per_epoch, total_steps) | source.about,
        data_sha256=source.data_sha256,
        judged=_judged(config, source) if train.evaluate_epochs else None,
        judged_on="test" if train.select == "best_on_test" else "held-out",
    )
    _check_own(config, job, images)
    return job


def _judged(config: ConfigDict, source: TrainingImages) -> Evaluation:
    """Builds the evaluation of the images on which weights are judged during the training."""
    data, held = source.data, source.held
    if config.train.select == "best_on_test" or held is None:
        return evaluation_on(config, data.test_set, np.arange(len(data.test_labels)), source.class_counts)
    return evaluation_on(config, held.test, held.ids, source.class_counts)


def _check_own(config: ConfigDict, job: Training, images: jax.ShapeDtypeStruct) -> None:
    """Checks parts together: those of the user's own, and what learns from the attack of an objective."""
    names = config.objective.name, config.optimizer.name, config.model.name, config.head.name
    own = any(":" in name for name in (*names, config.perturbation.name, config.average.name))
    learning = {"budget": job.budget and job.budget.statistics, "class statistics": job.class_statistics}
    learning = {kind: each for kind, each in learning.items() if each is not None}
    logged = "adv" in config.train.logged_passes
    if not (own or learning or logged):
        return
    variables = jax.eval_shape(job.model.init, jax.random.key(0), images.update(shape=images.shape[1:]))
    known = _known(config, variables, gathered_arrays(job.budget, job.class_statistics))
    if own:
        _check_functions(config, job, names, images, variables, known)
    if job.perturbation is not None:
        contracts.check_perturbation(config.perturbation.name, job.perturbation, variables[0])
    if own:
        contracts.check_average(config.average.name, job.average, *variables)
    if learning or logged:
        used = {"budget": config.threat.budget.name, "class statistics": config.class_statistics.name}
        learners = [f"{kind} {used[kind]!r}" for kind in learning]
        contracts.check_attacks_shown(
            names[0], job.objective, job.model, variables, images, known, learners=learners, logged=logged
        )


def _known(config: ConfigDict, variables: Any, gathered: dict[str, Any]) -> objectives.Known:
    """Returns the shapes of what a step tells its objective that is the same for all images."""
    teacher = dict(zip(("params", "stats"), variables, strict=True)) if config.train.teacher else None
    return objectives.Known(classes=jax.eval_shape(lambda: gathered) or None, teacher=teacher)


def _check_functions(
    config: ConfigDict,
    job: Training,
    names: tuple[str, ...],
    images: jax.ShapeDtypeStruct,
    variables: Any,
    known: objectives.Known,
) -> None:
    """Checks functions of the user's own together: the network under attack, the objective, the optimizer."""

    def logits(images: Any, params: Any, stats: Any) -> Any:
        return job.model.predict(params, stats, images)

    if takes_attack(config) and not contracts.has_gradient(
        "model", names[2], logits, (0, None, None), images, *variables
    ):
        raise InputError(
            f"model {names[2]!r} with head {names[3]!r} has a gradient of 0 with respect to the images, so "
            f"that no attack of the training moves them; {contracts.DIFFERENTIABLE}"
        )
    contracts.check_objective(names[0], job.objective, job.model, variables, images, known)
    contracts.check_optimizer(names[1], job.optimizer, variables[0])


def _images_of_a_step(config: ConfigDict, data: Dataset, devices: int) -> jax.ShapeDtypeStruct:
    """Returns the shape of the images that the devices see at once, ``[devices, B, H, W, C]``."""
    each = max(config.train.batch_size // (devices * config.train.accumulation_steps), 1)
    shape = (devices, each, *data.test_images.shape[1:])
    return jax.ShapeDtypeStruct(shape, jax.numpy.result_type(float))


def check(config: ConfigDict) -> None:
    """Checks a config as far as that needs no data: values, names of functions, and their arguments.

    Raises:
      InputError: a field of the config cannot be used.
    """
    validate(config)
    generated_per_batch(config)
    call("data set", sources.SOURCES, config.data)
    counts = _counts_without_data(config)
    for head in (config.head, config.evaluation.head):
        if head.name:
            model(config, counts, platform="cpu", precision=config.train.precision, head=head)
    objective(config, counts)
    free_steps(config)
    optimizer(config, 1)
    perturbation(config)
    average(config, 1)
    budget(config, counts)
    class_statistics(config, counts)
    augmentations(config.train.augmentation, pixel_max=255)
    given = {"class_counts": counts, "epsilon": config.evaluation.epsilon}
    call("budget", BUDGETS, config.evaluation.budget, **given)
    autoattack.stages(config.evaluation.autoattack, len(counts), threat=ThreatModel(config.threat.epsilon))


def _counts_without_data(config: ConfigDict) -> np.ndarray:
    """Returns class counts that will do: of as many classes as the data set has, or as the radii given."""
    given = [section.get("epsilons") for section in (config.threat.budget, config.evaluation.budget)]
    numbers = [len(radii) for radii in given if isinstance(radii, list | tuple) and radii]
    number = sources.SHAPES[config.data.name][0] if config.data.name in sources.SHAPES else 0
    return np.arange(number or next(iter(numbers), 10), 0, -1)


def takes_attack(config: ConfigDict) -> bool:
    """Returns whether the objective takes an attack."""
    return "attack" in objective_alone(config).keywords


def objective_alone(config: ConfigDict) -> functools.partial:
    """Returns the objective with its arguments in the config, without its parts."""
    given = dict.fromkeys(("attack", "loss", "class_counts", "threat", "axis_name", "epochs"))
    return call("objective", objectives.OBJECTIVES, config.objective, **given)


def _about(config: ConfigDict, data: Dataset, steps_per_epoch: int, total_steps: int) -> dict[str, str]:
    """Describes a training, one line per subject."""
    counts, attack, norm = data.class_counts, config.attack, config.threat.norm
    size = functools.partial(_size, in_255ths=norm == "linf")
    threat = f"{NORMS[norm]}, epsilon {size(config.threat.epsilon)}"
    steps = f"{attack.steps} step{'s' * (attack.steps > 1)} of {size(attack.step_size)}"
    function = objective_alone(config)
    raised = "the divergence" if attacks_divergence(function) else f"loss {attack.loss.name}"
    of_training = f"{threat}, {steps}, start {attack.start!r}, {raised}"
    if attack.free_steps:
        of_training = f"{threat}, free steps, each batch is shown {attack.free_steps} times in a row"
    elif not takes_attack(config):
        of_training = f"none in training; {threat} in evaluations"
    return {
        "method": f"{config.method}: objective {config.objective.name}, loss {config.loss.name}, "
        f"seed {config.seed}",
        "network": f"{config.model.name}, {config.head.name} head",
        "data": f"{config.data.name}: {counts[0]} images of the first class to {counts[-1]} of the last, "
        f"{counts.sum()} of all {len(counts)} (ratio {counts.min() / counts.max():.3g}); "
        f"{len(data.test_labels)} test images",
        "attack": of_training,
        **({"with": found} if (found := ingredients(config)) else {}),
        "length": f"{total_steps} steps of {config.train.batch_size} images, {steps_per_epoch} per epoch",
    }


def _size(value: float, *, in_255ths: bool) -> str:
    """Returns a size in the unit of an image, as a fraction of 255 if it is one: '8/255' or '0.031'."""
    count = round(255 * value)
    return f"{count}/255" if in_255ths and count and abs(255 * value - count) < 1e-4 else f"{value:g}"


def _settings(config: ConfigDict, steps_per_epoch: int) -> Settings:
    """Copies the fields of ``Settings`` from ``config.train``; a dispatch is at most an epoch."""
    train = config.train
    settings = Settings(**{name: train[name] for name in Settings._fields})
    return settings._replace(
        steps_per_dispatch=min(settings.steps_per_dispatch, steps_per_epoch),
        batch_norm_momentum=batch_norm_momentum(config),
        logged_passes=tuple(filter(None, train.logged_passes.split(","))),
    )
