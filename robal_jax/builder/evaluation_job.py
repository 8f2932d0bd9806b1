"""From a config to an :class:`Evaluation`: the model, the images, the attacks, and what the report says."""

import dataclasses
import functools
import inspect
import json
import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from robal_jax import classifiers, metrics, models
from robal_jax.attacks import NORMS, ThreatModel, autoattack, check_minimum_norm
from robal_jax.budgets import BUDGETS
from robal_jax.builder import contracts
from robal_jax.builder.instantiate import call
from robal_jax.builder.parts import dataset, generated_per_batch, hold_out, model
from robal_jax.builder.ranges import validate
from robal_jax.data import TestSet, balanced_part, corruptions, part_of
from robal_jax.data.sources import SOURCES
from robal_jax.devices.cpu import at_once
from robal_jax.errors import InputError
from robal_jax.own_functions import calling
from robal_jax.storage.config_file import ingredients, to_json
from robal_jax.storage.workdir import data_digest


def with_inference_of(config: ConfigDict, other: ConfigDict) -> ConfigDict:
    """Returns the config of a run with the inference of another: method, head, logit scale, prior adjustment.

    The protocol of the evaluation (epsilon, steps, seed) stays that of the run. The method is that of the
    other config if both train with the same objective and loss; otherwise the name says both.

    Raises:
      InputError: a field of one of the configs cannot be used, or they are for different data sets.
    """
    validate(config)
    validate(other)
    ours, theirs = config.data.name, other.data.name
    if ours != theirs and {ours, theirs} <= set(SOURCES):  # constants of a method depend on the data set
        raise InputError(
            f"the config of {other.method} is for data set {theirs!r}, and the run is for {ours!r}; "
            "name the run's data set behind the colon of --config"
        )
    combined = config.copy_and_resolve_references()
    with combined.unlocked(), combined.ignore_type():  # so that 1.0 may replace 1
        combined.method = other.method
        same = all(config[part].to_dict() == other[part].to_dict() for part in ("objective", "loss"))
        if not same and other.method != config.method:
            combined.method = f"{config.method}, with the inference of {other.method}"
        for field in ("head", "logit_scale", "tau_p"):
            combined.evaluation[field] = other.evaluation[field]
    return combined.lock()


def with_part_of(config: ConfigDict, other: ConfigDict) -> ConfigDict:
    """Returns the config of a run with the part of the test set that another config evaluates.

    A model of the zoo names no place of its data; it gets that of the other config.

    Raises:
      InputError: a field of one of the configs cannot be used.
    """
    validate(config)
    validate(other)
    combined, part = config.copy_and_resolve_references(), other.evaluation
    with combined.unlocked():
        combined.evaluation.examples = part.examples
        if part.examples:
            combined.evaluation.seed = part.seed
        if combined.data.name == other.data.name and combined.data.get("path") == "":
            combined.data.path = other.data.path
    return combined.lock()


def with_data_at(path: str | None, config: ConfigDict) -> ConfigDict:
    """Returns a config with another place of the data; the config itself if the place is None.

    Raises:
      InputError: a field of the config cannot be used.
    """
    if path is None:
        return config
    validate(config)
    moved = config.copy_and_resolve_references()
    with moved.unlocked():
        moved.data.path = path
    return moved.lock()


def without_ensemble(config: ConfigDict) -> ConfigDict:
    """Returns a config for a model that is only loaded: attacks of the user's own need not be there.

    Raises:
      InputError: a field of the config cannot be used.
    """
    validate(config)
    loaded = config.copy_and_resolve_references()
    with loaded.unlocked():
        loaded.evaluation.autoattack = "none"
    return loaded.lock()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Everything that an evaluation needs except the weights.

    Attributes:
      test: the images, and the class counts of the training set.
      ids: numbers of the images in the whole test set, ascending.
      variables: shapes of ``params`` and ``stats``, the parts of a checkpoint that the model needs.
      predict: ``(params, stats, images) -> logits``, scaled and adjusted as the config says.
      features: ``(params, stats, images) -> [B, D]``, the input of the head; None if it is not known.
      threat: what the attacks may do.
      step_size: of the iterated attacks; one per class if the radii are.
      version: of the ensemble of attacks: a key of ``autoattack.VERSIONS``, a list, or 'none'.
      ensemble: its stages; empty for 'none'.
      audit_examples: test images in the audit's sample; 0 for no audit.
      surrogate: folder of another run on the same data; '' for none.
      batch_size: images per device in each call, see :func:`at_once`.
      seed: of the attacks' starts.
      layout: how the devices are used, a key of ``parallel.LAYOUTS``.
      groups: classes by the name of their group, those of the leading protocol.
      about: method, data and attack in the words of the report. Nothing reads it back.
      data_sha256: of the training set and the test set; '' if there is no training set.
      weights: which of a checkpoint's are evaluated, one of ``averages.WEIGHTS``.
      select: which checkpoint of a run is meant if none is named: 'last', 'best' or 'best_on_test'.
      judged: the weights, the radius and the rule of radii by class, as the record of a best checkpoint has
        them, see ``storage.best.Record``.
      protocols: all protocols of class groups, see ``metrics.groups_by_protocol``.
      minimum_norm: a key of ``attacks.MINIMUM_NORM``; '' for no distances.
      corruptions: whether clean images are also corrupted and classified.
      certified: whether a lower bound of the robust accuracy is computed, too.
      optimality: whether the attacks of the ensemble are compared at several radii.
      replaced: ``predict`` with the gradient of a differentiable approximation, for the stages of the
        ensemble with BPDA; None without them.
    """

    test: TestSet
    ids: np.ndarray
    variables: dict[str, Any]
    predict: Callable[..., Any]
    features: Callable[..., Any] | None = None
    threat: ThreatModel
    step_size: float | tuple[float, ...]
    version: str
    ensemble: tuple[autoattack.Stage, ...]
    audit_examples: int
    surrogate: str = ""
    batch_size: int
    seed: int
    layout: str
    groups: dict[str, np.ndarray]
    about: dict[str, Any] = dataclasses.field(default_factory=dict)
    data_sha256: str = ""
    weights: str = "current"
    select: str = "last"
    judged: dict[str, Any] = dataclasses.field(default_factory=dict)
    protocols: dict[str, dict[str, np.ndarray]] = dataclasses.field(default_factory=dict)
    minimum_norm: str = ""
    corruptions: bool = False
    certified: bool = False
    optimality: bool = False
    replaced: Callable[..., Any] | None = None


def evaluation(
    config: ConfigDict, trained_counts: np.ndarray | None = None, platform: str | None = None
) -> Evaluation:
    """Builds everything that an evaluation needs, and checks it.

    Args:
      config: of the run, with the evaluation's settings.
      trained_counts: class counts that the model was trained with, ``[K]``, for its head and for the prior
        that is subtracted from its logits; those of the training set if None. Groups of classes are always
        those of the training set, without generated images.
      platform: of the devices, such as 'tpu'; that of JAX's default devices if None.

    Raises:
      InputError: a field of the config, or the data, cannot be used.
    """
    validate(config)
    data = dataset(config)
    trained, held = hold_out(config, data)
    test, ids, part = part_to_evaluate(config, trained.test_set)
    job = evaluation_on(config, test, ids, trained_counts, platform)
    held_out = {"held_out": held.text} if held else {}
    return dataclasses.replace(job, about=job.about | part | held_out, data_sha256=data_digest(data))


def evaluation_on(
    config: ConfigDict,
    test: TestSet,
    ids: np.ndarray,
    trained_counts: np.ndarray | None = None,
    platform: str | None = None,
) -> Evaluation:
    """Builds an evaluation on given images.

    Args:
      config: a valid one.
      test: the images, and the class counts of the training set.
      ids: numbers of the images, ascending; their noise follows from them.
      trained_counts: see :func:`evaluation`.
      platform: see :func:`evaluation`.

    Raises:
      InputError: a field of the config cannot be used.
    """
    settings, platform = config.evaluation, platform or jax.default_backend()
    _check_additions(settings, test)
    counts = test.class_counts if trained_counts is None else trained_counts
    protocols = groups_of(config, test.class_counts)
    head = settings.head if settings.head.name else config.head
    images = jax.ShapeDtypeStruct((1, 2, *test.images.shape[1:]), np.float32)
    build = functools.partial(model, config, counts, platform=platform, precision=settings.precision)
    network = build(head=head, images=images)
    variables = _variables(network, test)
    if settings.head.name:
        trained = build()
        _check_same_variables(config, head, _variables(trained, test), variables)

    def predict(params: Any, stats: Any, images: Any) -> Any:
        logits = settings.logit_scale * network.predict(params, stats, images)
        return classifiers.adjust_for_prior(logits, counts, tau=settings.tau_p) if settings.tau_p else logits

    threat, step_size, by_class = radii_of(config, test.class_counts)
    version = settings.autoattack
    check_minimum_norm(settings.minimum_norm, threat.norm)
    pixels = math.prod(test.images.shape[1:3])
    ensemble = autoattack.stages(version, len(counts), threat=threat)
    batch_size = at_once(settings.batch_size, pixels, platform)
    return Evaluation(
        test=test,
        ids=ids,
        variables=variables,
        weights=settings.weights,
        predict=predict,
        features=network.features,
        threat=threat,
        step_size=step_size,
        version=version,
        ensemble=ensemble,
        audit_examples=min(settings.audit.examples, len(test.labels)),
        surrogate=settings.audit.surrogate,
        batch_size=min(batch_size, len(test.labels)),
        seed=settings.seed,
        layout=config.train.layout,
        groups=next(iter(protocols.values())),
        protocols=protocols,
        minimum_norm=settings.minimum_norm,
        corruptions=settings.corruptions,
        certified=settings.certified,
        optimality=settings.optimality,
        about=_about(config, test, head, ensemble) | by_class,
        select=config.train.select,
        judged={
            "weights": settings.weights,
            "epsilon": settings.epsilon,
            "budget": by_class.get("budget", "constant"),
            **({"radii": by_class["class_epsilon"]} if settings.budget.name == "given" and by_class else {}),
        },
    )


def _check_additions(settings: ConfigDict, test: TestSet) -> None:
    """Refuses figures without attacks that cannot be had with these images or this precision.

    Raises:
      InputError: corruptions of such images, or bounds in less than full precision.
    """
    if settings.corruptions:
        corruptions.check_images(test.images.shape)
    if settings.certified and settings.precision != "highest":
        raise InputError(
            f"evaluation.precision is {settings.precision!r}, and certified bounds are for full precision; "
            "set evaluation.precision=highest"
        )


def groups_of(config: ConfigDict, class_counts: np.ndarray) -> dict[str, dict[str, np.ndarray]]:
    """Returns the classes by group, by protocol; the first one leads.

    Raises:
      InputError: sizes of head or tail that cannot be used.
    """
    settings = config.evaluation
    sizes = settings.head_classes, settings.tail_classes
    return metrics.groups_by_protocol(settings.groups, class_counts, *sizes)


def radii_of(
    config: ConfigDict, class_counts: np.ndarray
) -> tuple[ThreatModel, float | tuple[float, ...], dict[str, Any]]:
    """Returns the threat model, the step size, and what the report says of radii that differ by class.

    Steps are in proportion to the radius of the class. The counts are those of the training set, without
    generated images, so that models trained with other images are evaluated at the same radii.

    Raises:
      InputError: the rule is unknown, or cannot be used for these classes.
    """
    settings, section = config.evaluation, config.evaluation.budget
    given = {"class_counts": class_counts, "epsilon": settings.epsilon}
    try:
        rule = call("budget", BUDGETS, section, **given)
        with calling("budget", section.name):
            radii = rule()
            contracts.check_radii("the budget", radii, config.threat.norm, len(class_counts))
    except InputError as error:  # the training has a budget, too
        raise InputError(f"config.evaluation.budget: {error}") from error
    if (np.asarray(radii) == settings.epsilon).all():
        return ThreatModel(settings.epsilon, config.threat.norm), settings.step_size, {}
    radii = tuple(map(float, radii))
    settled = {name: option.default for name, option in inspect.signature(rule).parameters.items()}
    options = [f"{name} {value}" for name, value in settled.items() if name not in (*given, "epsilons")]
    about = {"class_epsilon": list(radii), "budget": ", ".join([section.name, *options])}
    steps = tuple(settings.step_size * radius / settings.epsilon for radius in radii)
    return ThreatModel(radii, config.threat.norm), steps, about


def part_to_evaluate(config: ConfigDict, test: TestSet) -> tuple[TestSet, np.ndarray, dict[str, str]]:
    """Returns the test images to evaluate, their numbers in the whole test set, and 'part' for the report.

    Raises:
      InputError: more images than there are, or fewer than classes.
    """
    size, everything, classes = config.evaluation.examples, len(test.labels), len(test.class_counts)
    if not size:
        return test, np.arange(everything), {}
    if not classes <= size <= everything:
        raise InputError(
            f"config.evaluation.examples is {size}; give {classes} (one image per class) to {everything} "
            "(the whole test set), or 0 for all"
        )
    ids = balanced_part(test.labels, size, config.evaluation.seed)
    part = test._replace(images=part_of(test.images, ids), labels=test.labels[ids])
    return part, ids, {"part": f"{size} of {everything} test images"}


def _about(
    config: ConfigDict, test: TestSet, head: ConfigDict, ensemble: tuple[autoattack.Stage, ...]
) -> dict[str, Any]:
    """Describes method, data and attack for the report."""
    settings, counts = config.evaluation, test.class_counts
    ratio, profile = config.data.get("ratio", 1.0), config.data.get("profile")
    options = [f"{key} {value}" for key, value in sorted(head.items()) if key != "name"]
    label, averaged = _generated(config), settings.weights == "average"
    of_mixture = " of the mixture with generated data" if label else ""
    start = "x + U(-epsilon, epsilon)" if config.threat.norm == "linf" else "uniform in the ball"
    return {
        "method": config.method,
        "seed": config.seed,
        "dataset": config.data.name,
        "imbalance": f"{profile}, ratio {ratio:g} (IR {1 / ratio:g})"
        if ratio < 1 and profile
        else f"{counts.max()} to {counts.min()} images per class",
        "class_names": list(test.class_names),
        "head": ", ".join([head.name, *options]),
        **({"ingredients": found} if (found := ingredients(config)) else {}),
        **({"weights": f"average ({config.average.name})"} if averaged else {}),
        "norm": NORMS[config.threat.norm],
        "epsilon": settings.epsilon,
        "step_size": settings.step_size,
        "start": f"{start}; FGSM: x",
        "logit_scale": settings.logit_scale,
        "prior_adjustment": f"logits - {settings.tau_p:g} log prior{of_mixture}"
        if settings.tau_p
        else "none",
        "evaluation_seed": settings.seed,
        "precision": settings.precision,
        **label,
        "autoattack": [stage.name for stage in ensemble],
        "config": json.loads(to_json(config)),
    }


def _generated(config: ConfigDict) -> dict[str, str]:
    """Returns the label 'generated' of a run that was trained with generated images; nothing for others."""
    share = generated_per_batch(config) / config.train.batch_size
    return {"generated": f"uses generated data ({100 * share:.3g} % of each batch)"} if share else {}


def _variables(network: models.Model, test: TestSet) -> dict[str, Any]:
    """Returns the shapes of a network's ``params`` and ``stats``."""
    image = jax.ShapeDtypeStruct((1, *test.images.shape[1:]), np.float32)
    params, stats = jax.eval_shape(network.init, jax.random.key(0), image)
    return {"params": params, "stats": stats}


def _check_same_variables(
    config: ConfigDict, head: ConfigDict, trained: dict[str, Any], evaluated: dict[str, Any]
) -> None:
    """Raises if the evaluation's head needs variables that the trained network lacks."""
    have, want = (
        {name: leaf.shape for name, leaf in contracts.names(variables).items()}
        for variables in (trained, evaluated)
    )
    if have != want:
        names = sorted(name for name, _ in set(have.items()) ^ set(want.items()))
        raise InputError(
            f"config.evaluation.head {head.name!r} cannot be used in place of the trained head "
            f"{config.head.name!r}: they differ in {', '.join(names)}; choose a head with the same parameters"
        )
