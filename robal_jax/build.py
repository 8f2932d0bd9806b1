"""From a config to plain functions and values: the only module that reads config fields.

A section with a ``name`` stands for a function of one of the library's tables (``LOSSES``, ``HEADS``, ...),
or of the user's own where the name has the form ``module:function``; the section's other keys are its
keyword arguments. Everything is checked here, before any long work starts.
"""

import dataclasses
import functools
import importlib
import inspect
import json
import math
import pathlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import numpy as np
import optax
from ml_collections import ConfigDict

from robal_jax import (
    attacks,
    autoattack,
    classifiers,
    convolutions,
    losses,
    metrics,
    models,
    objectives,
    parallel,
    sources,
    state,
)
from robal_jax.data import AUGMENTATIONS, SAMPLERS, Dataset, epoch_order
from robal_jax.errors import InputError
from robal_jax.models import Model

# What a function may ask for that is known only when a step is made.
LATE = ("epoch",)

LEVEL_2_CACHE = pathlib.Path("/sys/devices/system/cpu/cpu0/cache/index2/size")


def cpu_piece() -> int:
    """Pixels that a CPU predicts at once, so that its caches hold what a network makes of them.

    A pixel for 32 bytes of a core's level-2 cache: 16 images of CIFAR's size for 512 KiB, 32 for 1 MiB, each
    measured on a processor with that (experiments/benchmarks/NOTES.md); 512 KiB where it is not known.
    """
    try:
        kib = int(LEVEL_2_CACHE.read_text().strip().removesuffix("K"))  # Linux writes 1024K
    except (OSError, ValueError):
        kib = 0
    return max(kib, 512) * 1024 // 32


def at_once(batch_size: int, pixels: int) -> int:
    """Images that a device evaluates in one call: ``batch_size``, on a CPU at most :func:`cpu_piece` pixels.

    There more at once is no faster, and the fewer survivors an attack leaves, the more of a batch that is
    filled up is computed for nothing.

    Args:
      batch_size: of the config.
      pixels: of an image; where one alone has more than a piece, the batch stays as it is.
    """
    if jax.default_backend() != "cpu":
        return batch_size
    return min(batch_size, cpu_piece() // pixels or batch_size)


def call(
    kind: str, table: Mapping[str, Callable[..., Any]], section: ConfigDict, **given: Any
) -> functools.partial:
    """The function that a section names, with the section's other keys and what it wants of ``given`` bound.

    Args:
      kind: what the section is, for messages.
      table: the library's functions by name.
      section: ``name`` and keyword arguments; one that is a section itself is built the same way.
      **given: values that come from elsewhere (class counts, say); only those that the function has a
        parameter for are bound.

    Returns:
      A ``functools.partial``.

    Raises:
      InputError: no such name, or keyword arguments that the function does not take.
    """
    name = section.name
    options = {
        key: call(kind, table, value, **given) if isinstance(value, ConfigDict) else value
        for key, value in section.items()
        if key != "name"
    }
    if ":" in name:
        function = _import(kind, name)
    elif name in table:
        function = table[name]
    else:
        raise InputError(
            f"unknown {kind} {name!r}; known: {', '.join(table)}, or your own as 'module:function'"
        )
    parameters = inspect.signature(function).parameters
    unknown = sorted(set(options) - set(parameters))
    if unknown:
        takes = [
            key for key in parameters if key not in ("parent", "name")
        ]  # flax adds these to a module's own
        raise InputError(f"{kind} {name!r} takes no {unknown[0]!r}; it takes: {', '.join(takes)}")
    bound = options | {key: value for key, value in given.items() if key in parameters and key not in options}
    needed = [key for key, p in parameters.items() if p.kind is p.KEYWORD_ONLY and p.default is p.empty]
    missing = [key for key in needed if key not in bound and key not in LATE]
    if missing:
        raise InputError(f"{kind} {name!r} needs {missing[0]!r}; set it in the config file")
    return functools.partial(function, **bound)


def _import(kind: str, name: str) -> Callable[..., Any]:
    module, _, attribute = name.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise InputError(f"cannot import the {kind} {name!r}: {error}") from error


POSITIVE = "> 0", lambda value: value > 0
NOT_NEGATIVE = ">= 0", lambda value: value >= 0
SEED = "in 0..2^32-1", lambda value: 0 <= value < 2**32


def _one_of(names: Iterable[str]) -> tuple[str, Callable[[Any], bool]]:
    return f"one of {', '.join(names)}", lambda value: value in names


_POSITIVE_FIELDS = (
    "threat.epsilon", "attack.steps", "attack.step_size", "head.scale", "loss.scale",
    "schedule.lr", "schedule.decay", "train.epochs", "train.batch_size", "train.steps_per_dispatch",
    "train.accumulation_steps", "train.reading_threads", "train.checkpoint_epochs", "train.keep_checkpoints",
    "evaluation.batch_size", "evaluation.epsilon",
    "evaluation.step_size", "evaluation.logit_scale", "objective.max_epsilon", "objective.search_steps",
)  # fmt: skip
_NOT_NEGATIVE_FIELDS = (
    "schedule.warmup", "train.max_steps", "evaluation.audit.examples",
    "optimizer.clip_norm", "optimizer.momentum", "optimizer.weight_decay",
)  # fmt: skip

RANGES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    **dict.fromkeys(("seed", "data.seed", "evaluation.seed"), SEED),
    **dict.fromkeys(_POSITIVE_FIELDS, POSITIVE),
    **dict.fromkeys(_NOT_NEGATIVE_FIELDS, NOT_NEGATIVE),
    "schedule.milestones": ("epochs", lambda value: all(isinstance(epoch, int) for epoch in value)),
    "threat.norm": _one_of(attacks.NORMS),
    "attack.start": _one_of(attacks.STARTS),
    "head.bias": _one_of(classifiers.BIASES),
    "objective.batch_norm_order": _one_of(objectives.BATCH_NORM_ORDERS),
    "objective.regulariser": _one_of(objectives.REGULARISERS),
    "train.sampler": _one_of(SAMPLERS),
    "train.augmentation": _one_of(AUGMENTATIONS),
    "train.layout": _one_of(parallel.LAYOUTS),
    "train.precision": _one_of(models.PRECISIONS),
    "evaluation.precision": _one_of([name for name in models.PRECISIONS if name != "bfloat16"]),
}
"""What fields must be, where a config has them."""


def validate(config: ConfigDict) -> None:
    """Checks ``RANGES``, and that every number is finite.

    Raises:
      InputError: names the field, its value and what it must be.
    """
    fields = _flatten(config.to_dict())
    for field, (must, holds) in RANGES.items():
        if field in fields and not holds(fields[field]):
            raise InputError(f"config.{field} is {fields[field]!r}; it must be {must}")
    for field, value in fields.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise InputError(f"config.{field} is {value!r}; it must be finite")


def to_json(config: ConfigDict) -> str:
    """The resolved config as JSON, keys sorted."""
    return json.dumps(json.loads(config.to_json()), indent=2, sort_keys=True) + "\n"


def read_config(workdir: pathlib.Path) -> ConfigDict:
    """The config of a run.

    Raises:
      InputError: the folder holds none, or it is damaged.
    """
    path = workdir / "config.json"
    try:
        return ConfigDict(json.loads(path.read_text())).lock()
    except FileNotFoundError as error:
        raise InputError(
            f"no run in {workdir}: it has no config.json; train first, or correct --workdir"
        ) from error
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read: {error}") from error


def with_inference_of(config: ConfigDict, other: ConfigDict) -> ConfigDict:
    """A run's config with another's method at inference: its name, head, logit scale and prior adjustment.

    The protocol of the evaluation (epsilon, steps, seed) stays the run's.
    """
    combined = config.copy_and_resolve_references()
    with combined.unlocked():
        combined.method = other.method
        for field in ("head", "logit_scale", "tau_p"):
            combined.evaluation[field] = other.evaluation[field]
    return combined.lock()


def differences(config: ConfigDict, other: ConfigDict) -> list[str]:
    """What a second run on one workdir would do differently, as lines ``field: this, there``.

    The method's name and the section ``evaluation`` do not change what is trained, and neither does how the
    devices are used and fed, or where the data lies: the data itself is compared by its digest.
    """
    here, there = training_fields(config), training_fields(other)
    return [
        f"{key}: {here.get(key)!r} here, {there.get(key)!r} there"
        for key in sorted({*here, *there})
        if here.get(key) != there.get(key)
    ]


def training_fields(config: ConfigDict) -> dict[str, Any]:
    """The fields that decide what is trained, by their full names: see :func:`differences`."""
    fields = _flatten(json.loads(config.to_json()))
    ignored = (
        "method", "evaluation.", "data.path",
        "train.keep_checkpoints", "train.reading_threads", "train.steps_per_dispatch", "train.layout",
    )  # fmt: skip
    return {key: value for key, value in fields.items() if not key.startswith(ignored)}


def _flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat.update(_flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value})
    return flat


def dataset(config: ConfigDict) -> Dataset:
    """The long-tailed training set and the balanced test set, on the host."""
    return call("data set", sources.SOURCES, config.data)()


def model(
    config: ConfigDict,
    class_counts: np.ndarray,
    *,
    head: ConfigDict | None = None,
    precision: str,
    axis_name: str | None = None,
    sync_batch_norm: bool = True,
) -> Model:
    """The network of ``config.model`` with ``head``, by default ``config.head``, as functions.

    ``axis_name`` is a mapped axis over which batches are spread; batch norm may keep to each device's part.
    """
    on_cpu = jax.default_backend() == "cpu"
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
    try:
        network = models.Network(backbone(), classifier())
    except ValueError as error:
        raise InputError(f"config.model or its head: {error}") from error
    return models.functional(network, precision=precision, piece=cpu_piece() if on_cpu else None)


def objective(
    config: ConfigDict, class_counts: np.ndarray, axis_name: str | None = None
) -> objectives.Objective:
    """What a step minimises, with its attack and loss bound."""
    threat = attacks.ThreatModel(config.threat.epsilon, config.threat.norm)
    given: dict[str, Any] = {"class_counts": class_counts, "axis_name": axis_name, "threat": threat}
    loss = call("loss", losses.LOSSES, config.loss, **given)
    inner_loss = call("loss", losses.LOSSES, config.attack.loss, **given)
    attack = functools.partial(
        attacks.pgd,
        threat=threat,
        steps=config.attack.steps,
        step_size=config.attack.step_size,
        start=attacks.STARTS[config.attack.start],
        loss=inner_loss,
    )
    function = call("objective", objectives.OBJECTIVES, config.objective, attack=attack, loss=loss, **given)
    _check_parts(config, loss, inner_loss, function)
    if not _takes(loss, "epoch"):
        return function
    return lambda model, params, stats, batch: function(
        model, params, stats, batch, loss=functools.partial(loss, epoch=batch.epoch)
    )


def _takes(function: Callable[..., Any], name: str) -> bool:
    return name in inspect.signature(function).parameters


def _check_parts(
    config: ConfigDict, loss: functools.partial, inner_loss: functools.partial, function: functools.partial
) -> None:
    """Refuses losses, attack and objective that do not go together.

    Raises:
      InputError: says which.
    """
    if not _takes(function, "loss") and config.loss.name != "cross_entropy":
        raise InputError(
            f"objective {config.objective.name!r} has a loss of its own and would ignore config.loss "
            f"{config.loss.name!r}; set config.loss to cross_entropy"
        )
    base = loss.keywords.get("base")  # of a deferred loss
    if base and loss.keywords.get("reweight", True) and not _takes(base, "class_weights"):
        raise InputError(
            f"config.loss.base {config.loss.base.name!r} takes no class weights; "
            "set config.loss.reweight=False"
        )
    if _takes(inner_loss, "epoch"):
        raise InputError("config.attack.loss cannot depend on the epoch; the loss outside of the attack can")
    if config.threat.norm == "l2" and config.attack.start == "one_sided":
        raise InputError(
            "config.attack.start 'one_sided' is for norm linf; in l2 take 'uniform' or 'gaussian'"
        )


def optimizer(
    config: ConfigDict, steps_per_epoch: int
) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """The optimiser of ``config.optimizer``, and the learning rate of each step by ``config.schedule``."""
    rates = call("schedule", state.SCHEDULES, config.schedule)(epochs=config.train.epochs)
    schedule = state.per_step(rates, steps_per_epoch)
    return call("optimizer", state.OPTIMIZERS, config.optimizer, schedule=schedule)(), schedule


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
      start_from: a run's folder, or a checkpoint's, whose weights are fine-tuned; '' for random ones.
      order: epoch, counted from 0, to the numbers of the images that it shows.
      augment: ``(keys [n], images) -> images``, integers to integers.
      reading_threads: that read images which are not in memory.
      batch_size: images a step, on all devices.
      accumulation_steps: parts of a batch that are taken one after the other.
      steps_per_epoch: the last incomplete batch is dropped.
      total_steps: of the whole run.
      layout: a name of ``parallel.LAYOUTS``.
      steps_per_dispatch: largest number of steps that one call of the compiled function makes.
      checkpoint_epochs: epochs between checkpoints.
      keep_checkpoints: how many of the newest stay.
    """

    data: Dataset
    model: Model
    objective: objectives.Objective
    optimizer: optax.GradientTransformation
    schedule: optax.Schedule
    seed: int
    start_from: str
    order: Callable[[int], np.ndarray]
    augment: Callable[..., Any]
    reading_threads: int
    batch_size: int
    accumulation_steps: int
    steps_per_epoch: int
    total_steps: int
    layout: str
    steps_per_dispatch: int
    checkpoint_epochs: int
    keep_checkpoints: int


def training(config: ConfigDict) -> Training:
    """Builds everything that a training run needs, and checks it.

    Raises:
      InputError: a field of the config, or the data, cannot be used.
    """
    validate(config)
    data, settings = dataset(config), config.train
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
        start_from=settings.start_from,
        order=order,
        augment=_augmentation(settings.augmentation, data),
        reading_threads=settings.reading_threads,
        batch_size=settings.batch_size,
        accumulation_steps=settings.accumulation_steps,
        steps_per_epoch=steps_per_epoch,
        total_steps=min(total_steps, settings.max_steps or total_steps),
        layout=settings.layout,
        steps_per_dispatch=min(settings.steps_per_dispatch, steps_per_epoch),
        checkpoint_epochs=settings.checkpoint_epochs,
        keep_checkpoints=settings.keep_checkpoints,
    )


def _augmentation(name: str, data: Dataset) -> Callable[..., Any]:
    """One of ``AUGMENTATIONS``, from the size of the stored training images to that of the test images."""
    stored, (_, height, width, _) = data.train_images.shape[1:3], data.test_images.shape
    if stored != (height, width) and name != "resized_crop_flip":
        raise InputError(
            f"config.train.augmentation {name!r} leaves the training images at {stored}, but the test images "
            f"are {(height, width)}; take 'resized_crop_flip', or set config.data.resize to "
            "config.data.image_size"
        )
    augmentation = AUGMENTATIONS[name]
    return lambda keys, images: augmentation(keys, images, (height, width))


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """All that the evaluation loop needs.

    Attributes:
      training: what made the checkpoint; gives the data and the structure of the state.
      predict: ``(params, stats, images) -> logits``, scaled and adjusted as the config says.
      features: ``(params, stats, images) -> [B, D]``, what the head sees.
      threat: what the attacks may do.
      step_size: of the iterated attacks.
      version: of the ensemble of attacks, a key of ``autoattack.VERSIONS`` or a list.
      ensemble: its stages; none for the version 'none'.
      audit_examples: test images that the audit looks at; 0 for no audit.
      surrogate: folder of another run on the same data, '' for none.
      batch_size: images a device and call: see :func:`at_once`.
      seed: of the attacks' starts.
      groups: ``head_classes`` and ``tail_classes``, 0 for a third.
      about: what reports say of method, data and attack.
    """

    training: Training
    predict: Callable[..., Any]
    features: Callable[..., Any]
    threat: attacks.ThreatModel
    step_size: float
    version: str
    ensemble: tuple[autoattack.Stage, ...]
    audit_examples: int
    surrogate: str
    batch_size: int
    seed: int
    groups: dict[str, int]
    about: dict[str, Any]


def evaluation(config: ConfigDict) -> Evaluation:
    """Builds everything that an evaluation needs, and checks it.

    Raises:
      InputError: a field of the config, or the data, cannot be used.
    """
    parts, settings, linf = training(config), config.evaluation, config.threat.norm == "linf"
    data, counts = parts.data, parts.data.class_counts
    head = settings.head if settings.head.name else config.head
    network = model(config, counts, head=head, precision=settings.precision)
    if settings.head.name:
        _check_same_variables(config, head, parts.model, network, data.test_images[:1])

    def predict(params: Any, stats: Any, images: Any) -> Any:
        logits = settings.logit_scale * network.predict(params, stats, images)
        return classifiers.adjust_for_prior(logits, counts, tau=settings.tau_p) if settings.tau_p else logits

    threat, version = attacks.ThreatModel(settings.epsilon, config.threat.norm), settings.autoattack
    pixels = math.prod(data.test_images.shape[1:3])
    ensemble = () if version == "none" else autoattack.stages(version, len(counts), threat=threat)
    return Evaluation(
        training=parts,
        predict=predict,
        features=network.features,
        threat=threat,
        step_size=settings.step_size,
        version=version,
        ensemble=ensemble,
        audit_examples=min(settings.audit.examples, len(data.test_labels)),
        surrogate=settings.audit.surrogate,
        batch_size=min(at_once(settings.batch_size, pixels), len(data.test_labels)),
        seed=settings.seed,
        groups={"head_classes": settings.head_classes, "tail_classes": settings.tail_classes},
        about={
            "method": config.method,
            "seed": config.seed,
            "dataset": config.data.name,
            "imbalance": f"{config.data.profile}, ratio {config.data.ratio:g} (IR {1 / config.data.ratio:g})"
            if config.data.ratio < 1
            else f"{counts.max()} to {counts.min()} images a class",
            "class_names": list(data.class_names),
            "head": ", ".join(
                [head.name, *(f"{key} {value}" for key, value in sorted(head.items()) if key != "name")]
            ),
            "norm": attacks.NORMS[config.threat.norm],
            "epsilon": settings.epsilon,
            "step_size": settings.step_size,
            "start": ("x + U(-epsilon, epsilon)" if linf else "uniform in the ball") + "; FGSM: x",
            "logit_scale": settings.logit_scale,
            "prior_adjustment": f"logits - {settings.tau_p:g} log prior" if settings.tau_p else "none",
            "evaluation_seed": settings.seed,
            "precision": settings.precision,
            "autoattack": [stage.name for stage in ensemble],
            "config": json.loads(to_json(config)),
        },
    )


def _check_same_variables(
    config: ConfigDict, head: ConfigDict, trained: Model, evaluated: Model, images: np.ndarray
) -> None:
    """Refuses a head for the evaluation that the trained network has not the variables for."""
    have, want = (
        {
            jax.tree_util.keystr(path, simple=True, separator="/"): leaf.shape
            for path, leaf in jax.tree_util.tree_leaves_with_path(
                jax.eval_shape(model.init, jax.random.key(0), jax.ShapeDtypeStruct(images.shape, np.float32))
            )
        }
        for model in (trained, evaluated)
    )
    if have != want:
        names = sorted(name for name, _ in set(have.items()) ^ set(want.items()))
        raise InputError(
            f"config.evaluation.head {head.name!r} cannot stand in for the trained head "
            f"{config.head.name!r}: they differ in {', '.join(names)}"
        )
