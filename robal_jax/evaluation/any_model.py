"""The whole evaluation for any function from images to logits, whoever trained it, with whatever library."""

import contextlib
import dataclasses
import math
import pathlib
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from robal_jax import builder, checks, metrics
from robal_jax.attacks import NORMS, LogitsFn, ThreatModel, autoattack, bpda, check_minimum_norm
from robal_jax.attacks.threat import Attack, check_attack
from robal_jax.data import TestSet, check_labels
from robal_jax.data.corruptions import check_images
from robal_jax.devices import hosts
from robal_jax.devices.cpu import at_once
from robal_jax.errors import InputError, ReportError, one_line, shown, user_path
from robal_jax.evaluation.loop import Subject, as_victim, attack_and_report
from robal_jax.evaluation.measurements import StepSize
from robal_jax.evaluation.steps import with_bpda
from robal_jax.models import closure
from robal_jax.reporting.results import EvaluatedRun, read_run
from robal_jax.storage import checkpoints, mirror
from robal_jax.storage.best import stated

FINGERPRINT_IMAGES, NOISE = 16, 0.1


def evaluate_model(
    logits_fn: LogitsFn,
    images: chex.Array,
    labels: chex.Array,
    *,
    threat: ThreatModel,
    version: str | Sequence[str | Attack] = "standard",
    step_size: float | None = None,
    class_counts: Sequence[int] | None = None,
    class_names: Sequence[str] | None = None,
    groups: str = "thirds",
    surrogate: LogitsFn | None = None,
    surrogate_fn: LogitsFn | None = None,
    minimum_norm: str = "",
    audit: int = 200,
    corruptions: bool = False,
    certified: bool = False,
    optimality: bool = False,
    seed: int = 0,
    batch_size: int = 500,
    name: str = "model",
    dataset: str = "images",
    select: str = "last",
    folder: str | pathlib.Path | None = None,
    say: Callable[[str], None] = print,
) -> EvaluatedRun | None:
    """Attacks any model, audits the attacks and writes the report; resumes an interrupted evaluation.

    It is what ``experiments/evaluate.py`` does for a run: FGSM, PGD, MIM and CW, then an ensemble such as
    AutoAttack, then the audit, on all devices.

    Args:
      logits_fn: images ``[B, H, W, C]`` in [0, 1] to logits ``[B, K]``, at inference, without randomness;
        a plain JAX function, or one of flax, equinox or haiku. Pass the function itself: inside of
        ``nnx.jit`` its weights become constants of every program.
      images: test images ``[n, H, W, C]``, floats in [0, 1].
      labels: their classes, integers ``[n]``; every class must occur.
      threat: what the attacks may do; with one radius, or one per class, ``ThreatModel((0.1, 0.2, ...))``.
      version: of the ensemble: 'standard' (AutoAttack), 'robal_aa', 'torchattacks', 'fast', 'union', 'plus',
        'none', or a list such as 'apgd_ce,square' or ['apgd_ce', 'square']. In a list, 'module:function' or
        the function itself is an attack of your own, see :func:`robal_jax.autoattack`.
      step_size: of PGD, MIM and CW; epsilon / 4, of each class its own, if None.
      class_counts: training images per class ``[K]`` in the order of the logits, which divide the classes
        into head, medium and tail. Without them the report has no such groups.
      class_names: of the ``K`` classes; their numbers if None.
      groups: how the counts divide the classes: a list with commas of keys of ``metrics.GROUPS``, such as
        'thirds,last_80_percent'. The first leads; the report shows all of several side by side. Other groups
        for a finished evaluation need no new attack.
      surrogate: another model of the same images, for the audit's attack by transfer. It has nothing to do
        with ``surrogate_fn``.
      surrogate_fn: the same model with each part that has no gradient, or a saturating one, replaced by a
        differentiable one, images to logits. PGD-20, on the cross-entropy and on the margin, and each attack
        of the ensemble that follows a gradient then run again, with the true model's logits and this
        gradient (BPDA, see :func:`~robal_jax.attacks.bpda`), attacks of your own and the minimum-norm attack,
        too. What they break counts, but for the minimum-norm attack, whose distances are reported beside.
        The audit says whether the model's own gradient misled. It has nothing to do with ``surrogate``,
        which is another model.
      minimum_norm: 'fmn' or 'ddn' for the distances of the closest adversarial images; '' for none.
      audit: test images in the audit's sample; 0 for no audit.
      corruptions: whether to report the accuracy on corrupted images, too: 15 corruptions at 5 strengths,
        see ``robal_jax.data.corruptions``. A finished evaluation is given it without another attack.
      certified: whether to report the certified accuracy, too, a lower bound of the robust accuracy at the
        radius and at parts of it, see ``robal_jax.certified``. For small networks and L-infinity; it takes a
        good part of a second per image. A finished evaluation is given it without another attack.
      optimality: whether to compare the attacks of the ensemble, too: the smallest radius at which each one
        alone breaks each image of the audit's sample, as in AttackBench.
        A finished evaluation receives it, too, and no attack that it has is repeated.
      seed: of the attacks' random starts, and of the corruptions.
      batch_size: images per device in each call; a CPU takes fewer.
      name: of the model, for the report.
      dataset: for the report.
      select: how the checkpoint was chosen: 'last', which also stands for not known, 'best' (on held-out
        images), or 'best_on_test', which the audit flags.
      folder: receives the report and all results; a path, or a URL, see ``storage.buckets``.
        If None, only what is returned is kept.
      say: receives messages for the user, line by line; progress is shown on stderr.

    Returns:
      The results, as ``results.json`` and ``examples.npz`` hold them: ``summary["conditions"]`` has the
      accuracies with their intervals, ``predictions`` the outcome of every image. None if the evaluation was
      stopped by SIGTERM; the same call with the same folder resumes it.

    Raises:
      ValueError: images, labels or logits have a wrong shape, type or range; or JAX traces the call.
      InputError: no such ensemble, the folder cannot be used, or it has another evaluation; the model cannot
        be certified; or an attack of your own breaks its contract, or leaves the threat model.
      KeyboardInterrupt: after Ctrl-C; what was found is saved in the folder, as after SIGTERM.
    """
    images, labels = _arrays(images, labels, threat, hosts.speaker(say))
    length, batch_size, audit, seed = _numbers(threat, step_size, batch_size, audit, seed)
    _check_choices(images, threat, select, minimum_norm, corruptions)
    version = autoattack.version_name(version)
    hosts.speaker(say)(f"compiling the model for {len(labels)} images of shape {list(images.shape[1:])}")
    model = _attackable(logits_fn, surrogate_fn, images, hosts.speaker(say))
    test = _test_set(images, labels, model.num_classes, class_counts, class_names)
    protocols = _protocols(groups, class_counts)
    job = builder.Evaluation(
        test=test,
        ids=np.arange(len(labels)),
        variables={},
        predict=model.predict,
        threat=threat,
        step_size=length,
        version=version,
        ensemble=_ensemble(version, model.num_classes, threat, length, adaptive=surrogate_fn is not None),
        audit_examples=min(audit, len(labels)),
        batch_size=min(at_once(batch_size, math.prod(images.shape[1:3]), jax.default_backend()), len(labels)),
        seed=seed,
        layout="jit",
        groups=next(iter(protocols.values()), {"all": np.arange(model.num_classes)}),
        protocols=protocols,
        minimum_norm=minimum_norm,
        corruptions=bool(corruptions),
        certified=bool(certified),
        optimality=bool(optimality),
        replaced=model.replaced,
    )
    other = None if surrogate is None else _parted(surrogate, images, "surrogate", model.num_classes)
    identity = _identity(model.identity, other, images, _settings(job, audit, select))
    about = {**_about(job, model, name, dataset, select, class_counts), "identity": identity}
    other_victim = other and as_victim(dataclasses.replace(job, predict=other[0]), other[1])
    return _attacked(Subject(job, model.weights, other_victim, identity, about), folder, say)


def _attacked(
    subject: Subject, folder: str | pathlib.Path | None, say: Callable[[str], None]
) -> EvaluatedRun | None:
    """Evaluates in a folder, or in a temporary one; None if it was stopped."""
    speak = hosts.speaker(say)
    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(hosts.stop_signals())
        named = str(folder or stack.enter_context(tempfile.TemporaryDirectory()))
        kept, speak = stack.enter_context(mirror.kept(user_path(named), speak, stop.ask))
        try:
            done = attack_and_report(subject, kept, "", stop, speak)
        except ReportError as error:  # what is returned is complete
            done = True
            speak(f"warning: {error}")
        if not done:
            speak(f"stopped; the same call resumes from {folder}" if folder else "stopped; nothing is kept")
            if stop.interrupted:
                raise KeyboardInterrupt
        elif not folder:
            speak("no folder was given: the report is not kept")
        return hosts.by_first(partial(read_run, kept)) if done else None


def _arrays(
    images: chex.Array, labels: chex.Array, threat: ThreatModel, say: Callable[[str], None]
) -> tuple[np.ndarray, np.ndarray]:
    """Checks images and labels, and copies them to the host; refuses a call that JAX traces."""
    if any(isinstance(array, jax.core.Tracer) for array in (images, labels, jnp.zeros(()))):
        raise ValueError(
            "evaluate_model is called inside of jax.jit, or of another function that JAX traces; call it "
            "outside, with arrays"
        )
    images, labels = np.asarray(images), np.asarray(labels)
    check_attack(threat, images, labels)
    checks.channels_last(images)
    if 0 < 2 * images.max() < threat.upper:
        say(
            f"note: no image has a pixel above {images.max():.3g}, and the threat model allows pixels up to "
            f"{threat.upper:g}; if the images are scaled wrongly, so is every radius"
        )
    return images, labels


def _numbers(
    threat: ThreatModel, step_size: float | None, batch_size: int, audit: int, seed: int
) -> tuple[StepSize, int, int, int]:
    """Checks the settings of an evaluation, and makes them Python's own numbers, which JSON can hold."""
    if step_size is not None:
        checks.positive(step_size=step_size)
        length: StepSize = float(step_size)
    else:
        length = threat.scaled(0.25).epsilon
    checks.at_least(1, batch_size=batch_size)
    checks.at_least(0, audit=audit, seed=seed)
    if int(seed) >= 2**32:
        raise ValueError(f"seed is {seed}; it must be in 0..2^32-1")
    return length, int(batch_size), int(audit), int(seed)


def _check_choices(
    images: np.ndarray, threat: ThreatModel, select: str, minimum_norm: str, corruptions: bool
) -> None:
    """Refuses an unknown way to choose a checkpoint, and what cannot be done with these images or norm."""
    if select not in builder.SELECTIONS:
        raise InputError(f"unknown select {select!r}; use one of {', '.join(builder.SELECTIONS)}")
    check_minimum_norm(minimum_norm, threat.norm)
    if corruptions:
        check_images(images.shape)
        if images.min() < 0 or images.max() > 1:
            raise InputError(
                f"images are in [{images.min():g}, {images.max():g}]; corruptions are of images in [0, 1]: "
                "move the scaling into logits_fn"
            )


def _parted(
    logits_fn: LogitsFn, images: np.ndarray, name: str = "logits_fn", classes: int | None = None
) -> tuple[Callable[..., Any], dict[str, Any], int]:
    """Gives a model the form of a trained one: ``(params, stats, images) -> logits``, weights, classes."""
    predict, arrays = closure.split(logits_fn, images.shape[1:], name)
    shape = jax.eval_shape(predict, arrays, jax.ShapeDtypeStruct((2, *images.shape[1:]), np.float32)).shape
    if classes not in (None, shape[-1]):
        raise InputError(f"{name} has {shape[-1]} classes; pass a model of the same {classes} classes")
    return lambda params, stats, x: predict(params, x), {"params": arrays, "stats": []}, shape[-1]


class _Attackable(NamedTuple):
    """A model in the forms of an evaluation.

    Attributes:
      predict: ``(params, stats, images) -> logits``.
      replaced: the same with the gradient of an approximation (BPDA); None without one.
      weights: ``params`` and ``stats``, which both take.
      num_classes: of the logits.
      identity: what tells the model, and the approximation, from others.
      depends: whether the logits of an image change with the images beside it.
    """

    predict: Callable[..., Any]
    replaced: Callable[..., Any] | None
    weights: dict[str, Any]
    num_classes: int
    identity: dict[str, Any]
    depends: bool


def _attackable(
    logits_fn: LogitsFn, surrogate_fn: LogitsFn | None, images: np.ndarray, say: Callable[[str], None]
) -> _Attackable:
    """Gives a model the forms of an evaluation, and checks the approximation that goes with it, if any."""
    predict, weights, num_classes = _parted(logits_fn, images)
    alike = partial(jax.jit(predict), weights["params"], weights["stats"])
    if depends := closure.depends_on_batch(alike, images[:FINGERPRINT_IMAGES]):
        say(f"warning: {closure.DEPENDS}")
    identity: dict[str, Any] = {
        "model": _fingerprint(predict, weights, images),
        "gradients": {"model": _gradient_size(predict, weights, images)},
        "near": {"model": _fingerprint(predict, weights, _near(images))},
    }
    if surrogate_fn is None:
        return _Attackable(predict, None, weights, num_classes, identity, depends)
    surrogate, its_weights, _ = _parted(surrogate_fn, images, "surrogate_fn", num_classes)
    identity["surrogate_fn"] = _gradient_fingerprint(surrogate, its_weights, images)

    def own(params: Any, stats: Any, x: chex.Array) -> chex.Array:
        return predict(params["model"], stats, x)

    def replaced(params: Any, stats: Any, x: chex.Array) -> chex.Array:
        return bpda(partial(own, params, stats), partial(surrogate, params["surrogate_fn"], stats))(x)

    both = {"model": weights["params"], "surrogate_fn": its_weights["params"]}
    return _Attackable(own, replaced, {"params": both, "stats": []}, num_classes, identity, depends)


def _ensemble(
    version: str, num_classes: int, threat: ThreatModel, step_size: StepSize, *, adaptive: bool
) -> tuple[autoattack.Stage, ...]:
    """Returns the stages of an ensemble, with those of BPDA if it is asked for."""
    stages = autoattack.stages(version, num_classes, threat=threat)
    if not adaptive:
        return stages
    return with_bpda(stages, threat=threat, step_size=step_size, random=version == "rand")


def _test_set(
    images: np.ndarray,
    labels: np.ndarray,
    num_classes: int,
    class_counts: Sequence[int] | None,
    class_names: Sequence[str] | None,
) -> TestSet:
    """Gives the images the form of a data set's.

    Raises:
      InputError: labels, counts or names that do not fit the model's classes.
    """
    check_labels(labels, num_classes, "test set")
    names = class_names if class_names is not None and len(class_names) else range(num_classes)
    if isinstance(names, str | Mapping) or len(names) != num_classes:
        raise InputError(f"class_names is {shown(class_names)}; pass a list of {num_classes} strings")
    names = tuple(map(str, names))
    if class_counts is None:
        counts = np.bincount(labels, minlength=num_classes)
    else:
        checks.class_counts(class_counts, num_classes, whole=True)
        counts = np.asarray(class_counts).astype(np.int64)
    return TestSet(images, labels.astype(np.int32), 1, counts, names)


def _protocols(groups: str, class_counts: Sequence[int] | None) -> dict[str, dict[str, np.ndarray]]:
    """Divides the classes by protocol; there are none without the counts of training images.

    Raises:
      InputError: an unknown protocol, or one that needs the counts.
    """
    if class_counts is not None:
        return metrics.groups_by_protocol(groups, class_counts)
    if groups != "thirds":
        raise InputError(
            f"groups is {groups!r}, but class_counts is None; pass the training images per class"
        )
    return {}


def _settings(job: builder.Evaluation, audit: int, select: str) -> dict[str, Any]:
    """Returns what tells evaluations of one model from each other."""
    return {
        "threat": str(job.threat),
        "step_size": job.step_size,
        "version": job.version,
        "audit": audit,
        "seed": job.seed,
        **({"minimum_norm": job.minimum_norm} if job.minimum_norm else {}),
        **({} if select == "last" else {"select": select}),
    }


def _identity(
    model: dict[str, Any],
    other: tuple[Callable[..., Any], dict[str, Any], int] | None,
    images: np.ndarray,
    settings: dict[str, Any],
) -> dict[str, Any]:
    """Adds to what tells a model from others that of the transfer attack, and the settings."""
    if other is None:
        return {**model, "surrogate": None, "settings": settings}
    gradients = {**model["gradients"], "surrogate": _gradient_size(*other[:2], images)}
    near = {**model["near"], "surrogate": _fingerprint(*other[:2], _near(images))}
    look = _fingerprint(*other[:2], images)
    return {**model, "gradients": gradients, "near": near, "surrogate": look, "settings": settings}


def _about(
    job: builder.Evaluation,
    model: _Attackable,
    name: str,
    dataset: str,
    select: str,
    class_counts: Sequence[int] | None,
) -> dict[str, Any]:
    """Describes model, data and attack for the report."""
    counts, epsilon = job.test.class_counts, job.threat.epsilon
    by_class = isinstance(epsilon, tuple)
    return {
        "method": name,
        "dataset": dataset,
        "imbalance": f"{counts.max()} to {counts.min()} training images per class"
        if class_counts is not None
        else "not given; the report counts the test images instead of the training images of a class",
        "class_names": list(job.test.class_names),
        "norm": NORMS[job.threat.norm],
        **({"class_epsilon": list(epsilon), "budget": "given"} if by_class else {"epsilon": epsilon}),
        "step_size": job.step_size,
        "start": "uniform in the ball; FGSM: x",
        "evaluation_seed": job.seed,
        "autoattack": [stage.name for stage in job.ensemble],
        **stated(select),
        **({"depends_on_batch": closure.CHANGES} if model.depends else {}),
    }


def _fingerprint(predict: Callable[..., Any], weights: dict[str, Any], images: np.ndarray) -> str:
    """Returns what tells a model from others: the sha256 of its logits for the first images."""
    logits = jax.jit(predict)(weights["params"], weights["stats"], images[:FINGERPRINT_IMAGES])
    return checkpoints.digest({"logits": np.asarray(logits)})


def _near(images: np.ndarray) -> np.ndarray:
    """Returns the first images with noise, on which a defence shows that leaves clean images alone."""
    few = images[:FINGERPRINT_IMAGES]
    return np.clip(few + np.random.RandomState(0).uniform(-NOISE, NOISE, few.shape), 0, 1).astype(np.float32)


_NO_GRADIENT = (TypeError, ValueError, NotImplementedError)  # what JAX raises without a derivative


def _with_gradient(
    predict: Callable[..., Any], weights: dict[str, Any], images: np.ndarray
) -> dict[str, chex.Array]:
    """Returns the logits of the first images, and the gradient of half their squared norm."""

    def look(params: Any, x: chex.Array) -> dict[str, chex.Array]:
        logits, pullback = jax.vjp(partial(predict, params, weights["stats"]), x)
        return {"logits": logits, "gradient": pullback(logits)[0]}

    return jax.jit(look)(weights["params"], images[:FINGERPRINT_IMAGES])


def _gradient_size(predict: Callable[..., Any], weights: dict[str, Any], images: np.ndarray) -> str:
    """Returns what tells models with equal logits apart: how large their gradients are, to two digits.

    No more digits, because the last ones change from run to run on some devices.
    """
    try:
        return f"{np.abs(_with_gradient(predict, weights, images)['gradient']).sum():.1e}"
    except _NO_GRADIENT:
        return "none"


def _gradient_fingerprint(predict: Callable[..., Any], weights: dict[str, Any], images: np.ndarray) -> str:
    """Returns what tells an approximation of a model from others: the sha256 of its logits and gradients.

    Raises:
      InputError: it has no gradient.
    """
    try:
        found = _with_gradient(predict, weights, images)
    except _NO_GRADIENT as error:
        reason = one_line(error)
    else:
        if np.any(found["gradient"]):
            return checkpoints.digest(jax.tree.map(np.asarray, found))
        reason = f"it is 0 for the first {len(images[:FINGERPRINT_IMAGES])} images"
    raise InputError(f"surrogate_fn has no gradient ({reason}); replace each part of the model that has none")
