"""Contracts of the functions that a config names, checked before any long work starts.

``own_functions.CONTRACTS`` has the words of the messages. In full, the contract of a kind is written above
its table: ``models.BACKBONES``, ``classifiers.HEADS``, ``losses.LOSSES``, ``objectives.OBJECTIVES``,
``optimizers.SCHEDULES`` and ``OPTIMIZERS``, ``data.sources.SOURCES``, ``data.AUGMENTATIONS``.

Functions are traced for shapes as they will be called, with one part of a batch on each device; nothing is
computed. :func:`own_functions.calling` turns any error of a user's own function into one line.
"""

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.interpreters import partial_eval
from ml_collections import ConfigDict

from robal_jax import checks, models, objectives
from robal_jax.averages import Average, Weights
from robal_jax.class_statistics import ClassStatistics
from robal_jax.data import Dataset
from robal_jax.devices.parallel import AXIS
from robal_jax.errors import InputError
from robal_jax.own_functions import broken, calling, described
from robal_jax.perturbations import Perturbation

DIFFERENTIABLE = "make it differentiable: no argmax, rounding, comparison or stop_gradient on the way"

RESERVED = ("loss", "grad_norm", "epoch", "learning_rate", "images_per_second")
"""Names in ``metrics.jsonl`` that the training itself uses."""


def takes(function: Callable[..., Any], name: str) -> bool:
    """Returns whether a function has a parameter of this name."""
    return name in inspect.signature(function).parameters


def told(function: functools.partial, values: Mapping[str, Any]) -> functools.partial:
    """Binds values to a function that takes them, and to the functions among its arguments.

    Returns:
      The function itself if nobody takes any.
    """
    late = {name: value for name, value in values.items() if takes(function, name)}
    for name, part in function.keywords.items():
        if isinstance(part, functools.partial):
            inner = told(part, values)
            late |= {} if inner is part else {name: inner}
    return functools.partial(function, **late) if late else function


def is_float(found: Any, shape: tuple[int | None, ...]) -> bool:
    """Returns whether something is one array of floats of this shape; None stands for any length."""
    return (
        hasattr(found, "dtype")
        and jnp.issubdtype(found.dtype, jnp.floating)
        and len(found.shape) == len(shape)
        and all(want in (None, have) for have, want in zip(found.shape, shape, strict=True))
    )


def _struct(shape: tuple[int, ...], dtype: Any = float) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.result_type(dtype))


def traced(kind: str, name: str, function: Callable[..., Any], axes: Any, *args: Any) -> tuple[Any, Any]:
    """Traces a function over the devices; the program, and the shapes that one device finds."""
    with calling(kind, name):
        program, found = jax.make_jaxpr(jax.vmap(function, in_axes=axes, axis_name=AXIS), return_shape=True)(
            *args
        )
    return program, jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), found)


def names(tree: Any) -> dict[str, Any]:
    """Returns the arrays of a tree by their names, 'bn1/mean'."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def unlike(moments: Any, stats: Any) -> str:
    """Says how moments differ from running values, which they must be like, or are no floats; '' if not."""
    have, want = names(moments), names(stats)
    for name in sorted(have.keys() ^ want.keys()):
        return f"{'no ' if name in want else ''}{name!r}"
    for name, moment in have.items():
        if not is_float(moment, want[name].shape):
            return f"{name!r} as {described(moment)}, not floats {list(want[name].shape)}"
    return ""


def check_dataset(name: str, found: Any) -> None:
    """Refuses anything but a ``Dataset``."""
    if not isinstance(found, Dataset):
        raise broken("data set", name, f"returns {described(found)}")


def check_loss(section: ConfigDict, loss: Any, classes: int, gathered: Mapping[str, Any]) -> None:
    """Refuses a loss, or a loss that it wraps, that does not give one float per example.

    Args:
      section: of the config, with the name.
      loss: bound, a ``functools.partial``.
      classes: their number ``K``.
      gathered: what the training gathers of the classes, arrays by name, as before its first step.
    """
    for key, inner in loss.keywords.items():
        if isinstance(section.get(key), ConfigDict):
            check_loss(section[key], inner, classes, gathered)
    batch = classes + 1  # so that [K] is not taken for [B]
    args = (_struct((1, batch, classes)), _struct((1, batch), jnp.int32), _struct((), jnp.int32))

    def at_epoch(logits: Any, labels: Any, epoch: Any) -> Any:
        values = {"epoch": epoch, "class_statistics": gathered, "radius_factors": jnp.ones(batch)}
        return told(loss, values)(logits, labels)

    _, found = traced("loss", section.name, at_epoch, (0, 0, None), *args)
    if not is_float(found, (batch,)):
        what = f"returns {described(found)} for logits [{batch}, {classes}] and labels [{batch}]"
        raise broken("loss", section.name, what)
    if ":" in section.name and not _has_slope(section.name, at_epoch, batch, classes):
        raise InputError(
            f"loss {section.name!r} has a gradient of 0 or NaN whatever the logits are; {DIFFERENTIABLE}"
        )


def _has_slope(name: str, loss: Callable[..., Any], batch: int, classes: int) -> bool:
    """Returns whether a loss has a gradient for some logits: cosines, probabilities or larger ones."""
    logits = np.random.default_rng(0).uniform(-1, 1, (6, 1, batch, classes))
    logits = np.stack([*logits[:2], *np.abs(logits[2:4]), *10 * logits[4:]]).astype(np.float32)
    labels = np.arange(batch, dtype=np.int32)[None] % classes

    def total(logits: Any, epoch: Any) -> Any:
        return jax.vmap(loss, (0, 0, None), axis_name=AXIS)(logits, labels, epoch).sum()

    gradient = jax.jit(jax.vmap(jax.vmap(jax.grad(total), (None, 0)), (0, None)))
    with calling("loss", name), jax.debug_nans(False):
        found = np.asarray(gradient(logits, np.array([1, 1000], np.int32)))
    return bool(np.any(np.isfinite(found) & (found != 0)))


def has_gradient(kind: str, name: str, function: Callable[..., Any], axes: Any, *args: Any) -> bool:
    """Returns whether a function has a gradient with respect to its first argument.

    Of the gradient only the program is looked at: one that is 0 for some arguments is one.

    Args:
      kind: of the user's part, for the message of an error.
      name: of that part.
      function: of ``args``, on each device; the sum of what it returns is differentiated.
      axes: of the arguments over the devices.
      *args: shapes; the first is a tree of floats.
    """

    def gradient(first: Any, *others: Any) -> Any:
        return jax.grad(lambda x: function(x, *others).sum())(first)

    program, _ = traced(kind, name, gradient, axes, *args)
    constant, used = partial_eval.dce_jaxpr(program.jaxpr, [True] * len(program.jaxpr.outvars))
    return any(used) or any(np.any(x) for x in jax.core.eval_jaxpr(constant, program.consts))


def _batch_of(images: Any) -> tuple[objectives.Batch, Any]:
    """Returns the shapes of a batch on the devices, and the axes over which it and the weights are mapped."""
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), images.shape[:2]))
    batch = objectives.Batch(images, _struct(images.shape[:2], jnp.int32), keys, _struct((), jnp.int32))
    return batch, (None, None, objectives.Batch(0, 0, 0, None))


def _program_of(
    name: str, objective: Any, model: models.Model, variables: Any, images: Any, known: objectives.Known
) -> Any:
    """Returns the shapes of what an objective returns on one device."""
    batch, axes = _batch_of(images)
    of_model = functools.partial(objective, model)
    return traced("objective", name, of_model, (*axes, None), *variables, batch, known)[1]


def check_objective(
    name: str,
    objective: Any,
    model: models.Model,
    variables: Any,
    images: Any,
    known: objectives.Known = objectives.NOTHING_KNOWN,
) -> None:
    """Refuses an objective that does not return ``(loss, Outcome)`` as a training step needs it.

    Args:
      name: in the config.
      objective: bound.
      model: the network.
      variables: shapes of ``params`` and ``stats``.
      images: shape of the images of a training step, ``[devices, B, H, W, C]``.
      known: shapes of what a step tells it that is the same for all images.
    """
    batch, axes = _batch_of(images)
    found = _program_of(name, objective, model, variables, images, known)
    if not (isinstance(found, tuple) and len(found) == 2 and isinstance(found[1], objectives.Outcome)):
        raise broken("objective", name, f"returns {described(found)}")
    loss, (moments, metrics, *_) = found
    if not is_float(loss, ()):
        raise broken("objective", name, f"returns the loss as {described(loss)}, not as a float scalar")
    arguments = (*variables, batch, known)
    if not has_gradient(
        "objective", name, lambda *args: objective(model, *args)[0], (*axes, None), *arguments
    ):
        raise InputError(
            f"objective {name!r} has a gradient of 0 with respect to the parameters; {DIFFERENTIABLE}"
        )
    if not isinstance(moments, tuple | list):
        raise broken(
            "objective", name, f"returns moments that are {described(moments)}, not a tuple of trees"
        )
    for moment in moments:
        problem = unlike(moment, variables[1])
        if problem:
            raise broken("objective", name, f"returns moments with {problem}, unlike the running statistics")
    if not isinstance(metrics, dict) or not all(is_float(value, ()) for value in metrics.values()):
        shown = (
            {key: described(value) for key, value in metrics.items()}
            if isinstance(metrics, dict)
            else metrics
        )
        raise broken("objective", name, f"returns metrics {shown}, not a dictionary of float scalars")
    taken = sorted(set(metrics) & set(RESERVED))
    if taken:
        raise InputError(
            f"objective {name!r} returns a metric {taken[0]!r}, which the training adds; rename it"
        )


def check_augmentation(
    name: str, function: Callable[..., Any], images: jax.ShapeDtypeStruct, size: tuple[int, ...]
) -> jax.ShapeDtypeStruct:
    """Refuses an augmentation that does not return uint8 images of a size; returns their shape.

    Args:
      name: in the config.
      function: ``(keys, images, size) -> images``.
      images: shape of what it receives, ``[B, H, W, C]``.
      size: ``(height, width)`` of what it must return.
    """
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), len(images)))
    with calling("augmentation", name):
        found = jax.eval_shape(lambda keys, images: function(keys, images, size), keys, images)
    wanted = images.update(shape=(len(images), *size, images.shape[3]))
    if not (hasattr(found, "dtype") and (found.shape, found.dtype) == (wanted.shape, wanted.dtype)):
        what = f"returns {described(found)} for images {list(images.shape)} and size {size}"
        raise broken("augmentation", name, what)
    return wanted


def check_attacks_shown(
    name: str,
    objective: Any,
    model: models.Model,
    variables: Any,
    images: Any,
    known: objectives.Known,
    *,
    learners: Sequence[str],
    logged: bool,
) -> None:
    """Refuses an objective that reports no adversarial images to those who need them.

    Args:
      name: of the objective, in the config.
      objective: bound.
      model: the network.
      variables: shapes of ``params`` and ``stats``.
      images: shape of the images of a training step, ``[devices, B, H, W, C]``.
      known: shapes of what a step tells it that is the same for all images.
      learners: kinds and names of those that learn from the images' logits.
      logged: whether a logged pass shows the images.
    """
    attacked = _program_of(name, objective, model, variables, images, known)[1].attacked
    if logged and attacked is None:
        raise InputError(
            f"config.train.logged_passes shows adversarial images, and objective {name!r} reports none; use "
            "'nat', or leave it empty"
        )
    if learners and (attacked is None or attacked.logits is None):
        raise InputError(
            f"{learners[0]} learns from the logits of adversarial images, and objective {name!r} reports "
            "none; choose another of the two"
        )


def check_perturbation(name: str, perturbation: Any, params: Any) -> None:
    """Refuses anything but a perturbation that returns params."""
    if not isinstance(perturbation, Perturbation):
        raise broken("perturbation", name, f"returns {described(perturbation)}")
    with calling("perturbation", name):
        found = jax.eval_shape(perturbation.perturb, params, params, _struct((), jnp.int32))
    problem = unlike(found, params)
    if problem:
        raise broken("perturbation", name, f"gives params with {problem}")


def check_radii(name: str, radii: Any, norm: str, classes: int) -> None:
    """Refuses anything but one radius per class, ``[K]``, that leaves pixels within their range."""
    checks.lengths(f"radii of {name}", radii, classes)
    if norm == "linf" and np.max(radii) > 1:
        raise InputError(
            f"{name} gives class {int(np.argmax(radii))} the radius {np.max(radii):g}; in L-infinity it must "
            "be at most 1, the range of a pixel: lower epsilon, or correct the budget"
        )


def check_budget(name: str, budget: Any, classes: int) -> None:
    """Refuses a budget that learns, but does not give one radius per class or does not keep its arrays."""
    statistics = budget.statistics
    if statistics is not None:
        check_class_statistics(name, statistics, classes, kind="budget")
    with calling("budget", name):
        arrays = statistics.init() if statistics is not None else {}
        radii = jax.eval_shape(budget.radii, arrays, _struct((), jnp.int32))
    if not is_float(radii, (classes,)):
        raise broken("budget", name, f"returns radii as {described(radii)}")


def check_class_statistics(name: str, statistics: Any, classes: int, kind: str = "class statistics") -> None:
    """Refuses anything but class statistics that keep their arrays; ``kind`` says whose they are."""
    if not isinstance(statistics, ClassStatistics):
        raise broken(kind, name, f"returns {described(statistics)}")

    def used(epoch: Any, ends: Any, labels: Any, logits: Any) -> Any:
        arrays = statistics.init()
        return arrays, statistics.update(arrays, statistics.seen(labels, logits), epoch, ends)

    with calling(kind, name):
        epoch, ends = _struct((), jnp.int32), _struct((), bool)
        shapes = _struct((classes + 1,), jnp.int32), _struct((classes + 1, classes))
        before, after = jax.eval_shape(used, epoch, ends, *shapes)
    if not isinstance(before, dict):
        raise broken(kind, name, f"begins as {described(before)}, not as a dictionary of arrays")
    problem = unlike(before, before)
    if problem:
        raise broken(kind, name, f"begins with {problem}, which a step cannot keep")
    problem = unlike(after, before)
    if problem:
        raise broken(kind, name, f"returns its arrays with {problem}")


def check_average(name: str, average: Any, params: Any, stats: Any) -> None:
    """Refuses an average that is not like the weights, or that a step does not keep as it is."""
    if not isinstance(average, Average):
        raise broken("average", name, f"returns {described(average)}")
    weights = Weights(params, stats)

    def moved(step: Any, weights: Weights) -> Any:
        kept = average.init(weights)
        return kept, average.update(kept, step, weights, weights)

    with calling("average", name):
        kept, after = jax.eval_shape(moved, _struct((), jnp.int32), weights)
    if not isinstance(kept, dict) or (kept and "params" not in kept):
        raise broken("average", name, f"begins as {described(kept)} without params")
    if more := set(kept) - {"params", "stats"}:
        raise broken("average", name, f"keeps {', '.join(sorted(map(str, more)))} besides params and stats")
    if average.estimates and "stats" not in kept:
        raise broken("average", name, "estimates stats that it does not keep")
    problem = unlike(after, kept) or unlike(kept, {part: getattr(weights, part) for part in kept})
    if problem:
        raise broken("average", name, f"keeps {problem}")


def check_schedule(name: str, rates: Any, count: int, unit: str) -> np.ndarray:
    """Refuses anything but ``count`` finite learning rates, one per ``unit``; returns them as an array."""
    with calling("schedule", name):
        array = np.asarray(rates, float)
    if array.shape != (count,) or not np.all(np.isfinite(array) & (array >= 0)):
        what = (
            f"rates of shape {list(array.shape)}"
            if array.shape != (count,)
            else f"{array.min()}..{array.max()}"
        )
        raise broken("schedule", name, f"returns {what} for {count} {unit}s")
    return array


def check_optimizer(name: str, optimizer: Any, params: Any) -> None:
    """Refuses anything but an Optax transformation whose updates are like the parameters."""
    if not isinstance(optimizer, optax.GradientTransformation):
        raise broken("optimizer", name, f"returns {described(optimizer)}")
    with calling("optimizer", name):
        state = jax.eval_shape(optimizer.init, params)
        updates, _ = jax.eval_shape(optimizer.update, params, state, params)
    problem = unlike(updates, params)
    if problem:
        raise broken("optimizer", name, f"returns updates with {problem}")
