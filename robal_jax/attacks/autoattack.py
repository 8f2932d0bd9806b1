"""AutoAttack: an ensemble of four attacks without settings to tune; an image counts as its worst case.

:func:`autoattack` runs the whole ensemble on any model. Underneath, an ensemble is a tuple of *stages*, which
run one after the other on the images that are still classified correctly. A stage is one attack in several
*rounds*, for its targets or restarts. An image that a round breaks is left out of all later rounds, and all
rounds of a stage call one compiled function with full batches::

    progress = begin(labels, clean_predictions)
    for stage in stages("standard", num_classes=10, threat=threat):
        for progress in run(stage, attack, labels, progress, size=500):
            ...  # after every batch: save the progress, show it, or stop

Only the callback ``attack`` knows the model, the images and the devices. Progress consists of arrays and
counts; from saved progress, the ensemble continues as if it had not been interrupted. A stage that only some
models need does nothing on the others (:func:`wanted`), which also follows from the progress alone.

Only the whole standard ensemble is called AutoAttack. RoBal's tables call the first two of its four attacks
"AA"; here that pair is ``robal_aa``.

Source: Croce and Hein (ICML 2020); attacks, order and constants of the versions as in the reference
implementation.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple, cast

import chex
import jax
import jax.numpy as jnp
import numpy as np

from robal_jax import checks
from robal_jax.attacks.rounds import ATTACKS, Settings, is_own, own_round, require_allowed, run_round
from robal_jax.attacks.threat import (
    INSTEAD_IN_L1,
    NORMS,
    Attack,
    LogitsFn,
    RandomLogitsFn,
    ThreatModel,
    check_attack,
    departure,
)
from robal_jax.errors import InputError
from robal_jax.keys import JUDGEMENT, fold_in, image_keys
from robal_jax.models import closure
from robal_jax.own_functions import name_of

_STANDARD, _NEWER = ("apgd_ce", "apgd_t", "fab_t", "square"), ("pma", "apgd_malt")

SQUARES = ("square", "square_full")
"""Attacks that follow no gradient. The second is AutoAttack's own Square after the short one of 'fast'."""

VERSIONS: dict[str, tuple[str, ...]] = {
    "robal_aa": _STANDARD[:2],
    "standard": _STANDARD,
    "torchattacks": _STANDARD,
    "plus": ("apgd_ce", "apgd_dlr", "fab", "square", "apgd_t", "fab_t"),
    "rand": ("apgd_ce", "apgd_dlr"),
    "fast": (*_NEWER, *SQUARES),
    "union": _STANDARD + _NEWER,
}
"""Attacks of each version of the ensemble, in their order.

'torchattacks' is AutoAttack as the package of that name runs it since its version 3.4.0: with 10 iterations
instead of 100, and with Square's schedule rescaled. Its robust accuracy is an upper estimate of AutoAttack's.

'fast' is no AutoAttack: two runs of PMA and APGD towards the three nearest classes by MALT, 30 steps each,
and 500 queries of Square with its schedule rescaled, together about a tenth of AutoAttack's passes. An image
that this random search breaks after the gradient attacks is a sign that gradients mislead on this model. If
there is one, AutoAttack's own Square follows on all images that are left, with the random numbers that it has
in 'standard': whatever it breaks there is then broken here. Whether it runs depends on all images together.
'fast' is for daily work; its robust accuracy is an upper estimate, too.

'union' is AutoAttack, and then PMA and APGD-MALT as in 'fast' on what is left. Its robust accuracy is at most
AutoAttack's, so do not compare it with published ones; AutoAttack's own is the one after Square.
"""

STEPS = {"torchattacks": 10, "fast": 30}
"""Steps of each run of APGD, FAB and PMA, for versions that do not make AutoAttack's 100."""

QUERIES = {"fast": 500}
"""Queries of 'square', for versions that do not make AutoAttack's 5000."""

_RESCALED = ("torchattacks", "fast")  # versions whose 'square' makes its whole schedule in its few queries

IN_L1 = ("apgd_ce", "apgd_dlr", "apgd_t")
"""Attacks that know L1. As in AutoAttack, untargeted ones have 5 starts there, targeted ones 5 targets."""

NEEDED = {"apgd_dlr": 3, "apgd_t": 4, "apgd_malt": 4}
"""Number of classes that the losses of some attacks need."""

CONDITIONS = {
    "standard": "autoattack",
    "torchattacks": "torchattacks",
    "plus": "autoattack_plus",
    "rand": "autoattack_rand",
    "fast": "fast",
    "union": "union",
}
"""Names of the outcomes of whole versions; the outcome of any other list is called ``custom``."""

CUSTOM_OWN = "custom_own"
"""Name of the outcome of a list with attacks of the user's own."""

BPDA = "_bpda"
"""End of the names of attacks that follow the gradient of an approximation, and of ensembles with them."""


class Found(NamedTuple):
    """The result of :func:`autoattack`.

    Attributes:
      images: ``[n, H, W, C]``: an adversarial image where one was found, the image itself elsewhere.
      predictions: class of each of these images, int ``[n]``.
      robust: name of an attack to whether each image is still classified correctly after it and all attacks
        before it, bool ``[n]``; the first is 'clean', before any attack. An attack that was not needed (see
        'fast' in ``VERSIONS``) is left out.
    """

    images: np.ndarray
    predictions: np.ndarray
    robust: dict[str, np.ndarray]


def autoattack(
    logits_fn: LogitsFn | RandomLogitsFn,
    key: chex.PRNGKey,
    images: chex.Array,
    labels: chex.Array,
    *,
    threat: ThreatModel,
    version: str | Sequence[str | Attack] = "standard",
    batch_size: int = 500,
    steps: int | None = None,
    queries: int | None = None,
) -> Found:
    """Runs AutoAttack, or a part of it, on any model.

    Each attack sees only the images that are still classified correctly. An image's noise comes from its own
    key, so the batch size changes nothing but speed and memory.

    Args:
      logits_fn: images ``[B, H, W, C]`` to logits ``[B, K]``; for the version 'rand' a random model,
        ``logits_fn(images, keys [B])``.
      key: one key, or one per image ``[n]``.
      images: ``[n, H, W, C]``, floats within the bounds of the threat model.
      labels: integers ``[n]`` in ``0..K-1``.
      threat: allowed images; one radius, or one per class.
      version: 'standard', 'torchattacks', 'plus', 'rand', 'fast', 'union', 'robal_aa' (APGD-CE and APGD-T),
        'none', or a list such as 'apgd_ce,square' or ['apgd_ce', 'square']. In a list, 'module:function' or
        the function itself is an attack of your own, see ``rounds.own_round``.
      batch_size: number of images in each call.
      steps: of each run of APGD, FAB and PMA; those of the version if None: 100, for 'torchattacks' 10, for
        'fast', and in the attacks that 'union' adds, 30.
      queries: of each run of Square; those of the version if None: 5000, for 'fast' 500 and, if these break
        an image, 5000 more.

    Returns:
      The adversarial images and the outcome of each attack.

    Raises:
      InputError: the version is unknown, the model has too few classes for it, or its outputs are not finite,
        are probabilities, or depend on the other images of a batch; or an attack of your own breaks its
        contract, or leaves the threat model.
      ValueError: an argument or the model's logits have a wrong shape, type or range.

    Source: Croce and Hein (ICML 2020).

    Example:
      >>> logits_fn = lambda x: jnp.outer(x.reshape(-1) - 0.5, jnp.array([-1.0, 1.0]))  # class 1 is bright
      >>> images, labels = jnp.array([0.6, 0.45, 0.2]).reshape(3, 1, 1, 1), jnp.array([0, 0, 0])
      >>> found = autoattack(logits_fn, jax.random.key(0), images, labels,
      ...                    threat=ThreatModel(0.1), version="apgd_ce,square", steps=5, queries=10)
      >>> {name: right.tolist() for name, right in found.robust.items()}
      {'clean': [False, True, True], 'apgd_ce': [False, False, True], 'square': [False, False, True]}
      >>> print(found.predictions, np.array_str(found.images.reshape(-1), precision=2))
      [1 1 0] [0.6  0.55 0.2 ]
    """
    images, labels = jnp.asarray(images), jnp.asarray(labels)
    check_attack(threat, images, labels, norms=tuple(NORMS))
    checks.channels_last(images)
    checks.at_least(1, batch_size=batch_size)
    version = version_name(version)
    keys, random, size = image_keys(key, images), version == "rand", min(batch_size, len(images))
    predict: Callable[..., chex.Array]
    arrays: list[chex.Array]
    if random:
        predict, arrays = jax.default_matmul_precision("highest")(_without_arrays(logits_fn)), []
    else:
        predict, arrays = closure.split(cast(LogitsFn, logits_fn), images.shape[1:])

    @partial(jax.jit, static_argnums=0)
    def attacked(
        stage: Stage | None, arrays: Any, keys: Any, x: Any, y: Any, number: Any
    ) -> tuple[chex.Array, chex.Array]:
        """Images and logits after a round of a stage on one batch, or those of the clean images."""
        model = partial(predict, arrays)
        if stage is not None:
            keys = stage.keys(keys, number)
            x = stage.attack(model, keys, x, y, number)
        return x, checks.logits_of(len(x), model(x, fold_in(keys, JUDGEMENT)) if random else model(x))

    def in_batches(stage: Stage | None, ids: np.ndarray, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Images after a round, and their predictions; the last batch is filled up with its last image."""
        shown, predictions = [], []
        for start in range(0, len(ids), size):
            batch = np.take(ids, range(start, start + size), mode="clip")
            x, logits = attacked(stage, arrays, keys[batch], images[batch], labels[batch], np.int32(number))
            _refuse_departure(stage, x, images[batch], threat.of(labels[batch]))
            finite = np.isfinite(logits).all(-1)[: len(ids) - start]
            require_finite(finite, "clean" if stage is None else stage.name)
            shown.append(np.asarray(x))
            predictions.append(np.asarray(logits).argmax(-1))
        return np.concatenate(shown)[: len(ids)], np.concatenate(predictions)[: len(ids)]

    first_batch = (arrays, keys[:size], images[:size], labels[:size], np.int32(0))
    num_classes = jax.eval_shape(partial(attacked, None), *first_batch)[1].shape[-1]
    checks.labels_in(num_classes, labels)
    ensemble = stages(version, num_classes, threat=threat, steps=steps, queries=queries)
    for stage in filter(lambda stage: stage.own, ensemble):  # their contracts, before the first attack
        jax.eval_shape(partial(attacked, stage), *first_batch)

    clean = partial(attacked, None, arrays, keys[:size], y=labels[:size], number=np.int32(0))
    _check_outputs(lambda x: clean(x=x)[1], images[:size])

    true = np.asarray(labels)
    progress = begin(true, in_batches(None, np.arange(len(images)), 0)[1])
    for stage in ensemble:
        for _ in run(stage, partial(in_batches, stage), true, progress, size=size):
            pass
    return _found(images, ensemble, progress)


def _check_outputs(model: LogitsFn, images: chex.Array) -> None:
    """Refuses a model that returns probabilities, or whose logits of an image depend on the batch."""
    if closure.are_probabilities(np.asarray(model(images))):
        raise InputError(
            "the model returns probabilities, which hide its gradients; pass a model that returns logits, or "
            "the logarithms of the probabilities"
        )
    if closure.depends_on_batch(model, images):
        raise InputError(closure.DEPENDS)


def _without_arrays(logits_fn: Callable[..., chex.Array]) -> Callable[..., chex.Array]:
    """Gives a random model the form of one whose arrays are arguments."""
    return lambda _, *given: checks.called(logits_fn, *given)


def require_finite(finite: np.ndarray, condition: str) -> None:
    """Refuses a model whose logits are not finite: no class is the largest of them.

    Args:
      finite: whether the logits of each image are finite, bool ``[n]``.
      condition: name of the attack, for the message.

    Raises:
      InputError: they are not, for some image.

    Example:
      >>> require_finite(np.array([True, False]), "cw")
      Traceback (most recent call last):
      robal_jax.errors.InputError: the model's logits are not finite for 1 of 2 images (cw); correct the model
    """
    if not finite.all():
        raise InputError(
            f"the model's logits are not finite for {np.sum(~finite)} of {len(finite)} images ({condition}); "
            "correct the model"
        )


Round = Callable[[LogitsFn | RandomLogitsFn, chex.PRNGKey, chex.Array, chex.Array, chex.Array], chex.Array]
"""``(logits_fn, keys [B], images, labels, number) -> images``, all allowed by the threat model."""


class Stage(NamedTuple):
    """One attack of an ensemble.

    Attributes:
      name: of the attack.
      attack: runs one round.
      rounds: their number, each with a different target or start.
      first: number of the first round, counted over the whole ensemble from 1.
      bpda: whether it attacks the model with the gradient of a differentiable approximation.
      conditional: whether it runs only if the round before it broke an image, see :func:`wanted`.
      stream: number that is folded into the images' keys in its first round; 0 for that round's own.
    """

    name: str
    attack: Round
    rounds: int
    first: int
    bpda: bool = False
    conditional: bool = False
    stream: int = 0

    @property
    def own(self) -> bool:
        """Whether the attack is the user's own."""
        return is_own(self.name)

    @property
    def last(self) -> int:
        """Number of the last round."""
        return self.first + self.rounds - 1

    def keys(self, keys: chex.PRNGKey, number: chex.Numeric) -> chex.PRNGKey:
        """Keys ``[B]`` of a round, counted in the stage from 0, from those of the images ``[B]``."""
        return fold_in(keys, (self.stream or self.first) + number)


def _refuse_departure(
    stage: Stage | None, found: chex.Array, images: chex.Array, threat: ThreatModel
) -> None:
    """Refuses images of an attack of the user's own that the threat model does not allow."""
    if stage is not None and stage.own:
        far = departure(threat, threat.distance(found, images), threat.outside(found), images[0].size)
        require_allowed(stage.name, far)


def version_name(version: str | Sequence[str | Attack]) -> str:
    """Name of a version, or a list of attacks as one text, separated by commas; functions by their names.

    Args:
      version: see :func:`autoattack`.

    Raises:
      InputError: this is neither a text nor a list of texts and functions, a function has no name by which it
        can be imported, or see :func:`attack_names`.

    Example:
      >>> version_name(["apgd_ce", "square"])
      'apgd_ce,square'
    """
    listed = [version] if isinstance(version, str) else version
    if not isinstance(listed, list | tuple):
        raise _unknown(version)
    names = [name_of("attack", each) if callable(each) else each for each in listed]
    if not all(isinstance(name, str) for name in names):
        raise _unknown(version)
    joined = ",".join(names)
    attack_names(joined)
    return joined


def attack_names(version: str) -> tuple[str, ...]:
    """Names of the attacks of a version, or of a list separated by commas.

    Args:
      version: see :func:`autoattack`.

    Raises:
      InputError: a name is unknown, or occurs twice; that of a function in different modules, too.

    Example:
      >>> attack_names("standard")
      ('apgd_ce', 'apgd_t', 'fab_t', 'square')
    """
    if version == "none":
        return ()
    if version in VERSIONS:
        return VERSIONS[version]
    names = tuple(version.split(","))
    unknown = [name for name in names if name not in ATTACKS and not is_own(name)]
    if unknown or len(set(names)) < len(names):
        raise _unknown(version)
    own = [name.partition(":")[2] for name in names if is_own(name)]
    if len(set(own)) < len(own) or any(name.endswith(BPDA) for name in own):
        raise InputError(
            f"two attacks in {version!r} have the same name, or one ends in {BPDA!r}; rename the function"
        )
    return names


def _unknown(version: Any) -> InputError:
    return InputError(
        f"unknown ensemble {version!r}; use 'none', one of {', '.join(VERSIONS)}, "
        f"or a comma-separated list (no repeats) of {', '.join(ATTACKS)}, or your own as 'module:function'"
    )


def stages(
    version: str,
    num_classes: int,
    *,
    threat: ThreatModel,
    steps: int | None = None,
    queries: int | None = None,
) -> tuple[Stage, ...]:
    """Stages of a version or of a list of attacks.

    Args:
      version: see :func:`autoattack`.
      num_classes: K; a targeted attack aims at the ``min(9, K - 1)`` most likely wrong classes, in L1 at 5,
        or at the nearest 3 of them.
      threat: allowed images; one radius, or one per class.
      steps: see :func:`autoattack`.
      queries: see :func:`autoattack`.

    Raises:
      InputError: the version is unknown, there are too few classes for the losses of its attacks, or not one
        radius per class; or an attack of the user's own cannot be imported or called.

    Example:
      >>> [(stage.name, stage.rounds) for stage in stages("standard", 10, threat=ThreatModel(8 / 255))]
      [('apgd_ce', 1), ('apgd_t', 9), ('fab_t', 9), ('square', 1)]
    """
    names = attack_names(version)
    if isinstance(threat.epsilon, tuple):
        checks.vector("epsilon", threat.epsilon, num_classes)
    elif jnp.ndim(threat.epsilon):
        raise InputError(
            f"an ensemble takes one radius, or one per class; pass a tuple of {num_classes} radii as epsilon"
        )
    in_l1 = threat.norm == "l1"
    few = ",".join(IN_L1[: num_classes - 1]) if in_l1 else "apgd_ce,fab_t,square"
    for name, needed in NEEDED.items():
        if name in names and num_classes < needed:
            raise InputError(
                f"{name} needs at least {needed} classes, and the model has {num_classes}; use attacks that "
                f"need fewer, such as {few}"
            )
    if in_l1 and (others := [name for name in names if name not in IN_L1 and not is_own(name)]):
        instead = INSTEAD_IN_L1 if num_classes > len(IN_L1) else f"use {few}"
        raise InputError(f"the norm is l1, which is not supported by {', '.join(others)}; {instead}")
    restarts = 5 if version == "plus" or (in_l1 and version != "rand") else 1
    targets = min(5 if in_l1 else 9, num_classes - 1)
    eot, full = 20 if version == "rand" else 0, SQUARES[1]

    def attack(name: str) -> Round:
        part = "fast" if version == "union" and name in _NEWER else "standard" if name == full else version
        length = STEPS.get(part, 100) if steps is None else steps
        asked = QUERIES.get(part, 5000) if queries is None else queries
        checks.at_least(1, steps=length, queries=asked)
        settings = Settings(threat, length, asked, eot, part in _RESCALED, targets)
        of_round = own_round(name) if is_own(name) else ATTACKS["square" if name == full else name]
        return partial(run_round, of_round, settings=settings)

    def stage(name: str, count: int, first: int) -> Stage:
        if name != full:
            return Stage(name, attack(name), count, first)
        of_standard = 1 + 2 * targets + 1  # after one round of APGD-CE, and those of APGD-T and FAB-T
        return Stage(name, attack(name), count, first, conditional=True, stream=of_standard)

    own = dict.fromkeys((*SQUARES, *filter(is_own, names)), 1) | {"pma": 2, "apgd_malt": min(3, targets)}
    rounds = [{"apgd_t": targets, "fab_t": targets, **own}.get(name, restarts) for name in names]
    return tuple(
        stage(name, count, 1 + sum(rounds[:place]))
        for place, (name, count) in enumerate(zip(names, rounds, strict=True))
    )


def with_threat(stage: Stage, threat: ThreatModel) -> Stage:
    """Returns a stage of :func:`stages` with another threat model, such as one radius per image."""
    assert isinstance(stage.attack, partial)
    settings = dataclasses.replace(stage.attack.keywords["settings"], threat=threat)
    return stage._replace(attack=partial(stage.attack, settings=settings))


CLEAN, ROBUST = 0, -1


@dataclasses.dataclass
class Progress:
    """Progress of an ensemble, and its results so far.

    Attributes:
      broken_in: number of the round, counted over all stages from 1, in which an image was first
        misclassified; ``CLEAN`` if it is misclassified without an attack, ``ROBUST`` if it never is. ``[n]``.
      predictions: class predicted there; the label if the image never was misclassified. ``[n]``.
      adversarial: misclassified images by their numbers.
      round: number of the present round, from 1.
      done: number of images that this round has attacked.
    """

    broken_in: np.ndarray
    predictions: np.ndarray
    adversarial: dict[int, np.ndarray]
    round: int = 1
    done: int = 0

    def todo(self) -> np.ndarray:
        """Numbers of the images that the present round attacks."""
        return np.flatnonzero((self.broken_in == ROBUST) | (self.broken_in == self.round))

    @property
    def robust(self) -> int:
        """Number of images that are still classified correctly."""
        return int(np.sum(self.broken_in == ROBUST))


def begin(labels: np.ndarray, clean_predictions: np.ndarray) -> Progress:
    """Progress before the first attack; images that are misclassified without one count as broken."""
    right = clean_predictions == labels
    return Progress(np.where(right, ROBUST, CLEAN), clean_predictions.copy(), {})


Batch = Callable[[np.ndarray, int], tuple[np.ndarray, np.ndarray]]
"""``(numbers of images, round of the stage from 0) -> (adversarial images, predictions)``."""


def run(
    stage: Stage, attack: Batch, labels: np.ndarray, progress: Progress, *, size: int
) -> Iterator[Progress]:
    """Runs one stage of the ensemble on the images that are still robust, or resumes an interrupted stage.

    A stage that is not wanted does nothing.

    Args:
      stage: the stage.
      attack: runs one round of the stage on a batch.
      labels: ``[n]``.
      progress: from :func:`begin` and the earlier stages; changed in place.
      size: largest number of images in a batch.

    Yields:
      The progress after each batch.
    """
    progress.round = max(progress.round, stage.first)  # stages that were not wanted are passed over
    while wanted(stage, progress) and progress.round <= stage.last:
        todo = progress.todo()
        while progress.done < len(todo):
            ids = todo[progress.done : progress.done + size]
            images, predictions = attack(ids, progress.round - stage.first)
            for place in np.flatnonzero(predictions != labels[ids]):
                progress.broken_in[ids[place]] = progress.round
                progress.predictions[ids[place]] = predictions[place]
                progress.adversarial[int(ids[place])] = images[place].copy()  # a view would keep the batch
            progress.done += len(ids)
            yield progress
        progress.round, progress.done = progress.round + 1, 0


def wanted(stage: Stage, progress: Progress) -> bool:
    """Whether a stage is to run, or has run: a conditional one only if the round before it broke an image.

    It follows from what the earlier stages found, once they are done; an interruption does not change it.
    """
    return not stage.conditional or bool((progress.broken_in == stage.first - 1).any())


def _found(images: chex.Array, ensemble: Sequence[Stage], progress: Progress) -> Found:
    """The images, predictions and outcomes of an ensemble that is done."""
    shown = np.array(images)
    for number, image in progress.adversarial.items():
        shown[number] = image
    robust = {"clean": ~broken_by(progress, CLEAN)}
    robust |= {stage.name: ~broken_by(progress, stage.last) for stage in ensemble if wanted(stage, progress)}
    return Found(shown, progress.predictions, robust)


def work_left(stage: Stage, progress: Progress) -> int:
    """Number of images that the rounds of a stage have yet to attack, if no further image breaks."""
    if progress.round > stage.last or not wanted(stage, progress):
        return 0
    rounds_after = stage.last - max(progress.round, stage.first)
    return len(progress.todo()) - progress.done + rounds_after * progress.robust


def outcomes(
    version: str, stages: Sequence[Stage], progress: Progress, labels: np.ndarray
) -> dict[str, np.ndarray]:
    """Predictions ``[n]`` under each part of the ensemble that has its own name.

    These are ``apgd_ce`` after that attack, ``robal_aa`` after RoBal's pair and ``autoattack`` after all,
    if the ensemble begins with them in their standard form, and the whole version by its name in
    ``CONDITIONS``, with ``BPDA`` at the end if it has such stages. Only the whole has the outcomes of attacks
    of the user's own; it is ``CUSTOM_OWN``. AutoAttack with BPDA before them has its own name, too.
    """
    names = tuple(stage.name for stage in stages)
    after = {}
    if version not in ("torchattacks", "plus", "rand"):
        parts = {"apgd_ce": 1, "robal_aa": 2, CONDITIONS["standard"]: len(_STANDARD)}
        after = {
            name: stages[count - 1].last
            for name, count in parts.items()
            if names[:count] == _STANDARD[:count]
        }
    before_own = list(itertools.takewhile(lambda stage: not stage.own, stages))
    own_gradient = tuple(stage.name for stage in before_own if not stage.bpda)
    if len(own_gradient) < len(before_own) < len(stages) and own_gradient == _STANDARD:
        after[CONDITIONS["standard"] + BPDA] = before_own[-1].last
    if stages[-1].last not in after.values():
        custom = CUSTOM_OWN if any(stage.own for stage in stages) else "custom"
        whole = (CONDITIONS | {"robal_aa": "robal_aa", "none": "pgd_20"}).get(version, custom)
        after[whole + BPDA * any(stage.bpda for stage in stages)] = stages[-1].last
    return {
        name: np.where(broken_by(progress, last), progress.predictions, labels)
        for name, last in after.items()
    }


def broken_by(progress: Progress, last: int) -> np.ndarray:
    """Whether images are misclassified without an attack or in a round up to ``last``, bool ``[n]``."""
    return (progress.broken_in >= CLEAN) & (progress.broken_in <= last)


def broken_in(stage: Stage, progress: Progress) -> np.ndarray:
    """Whether images are broken in a round of a stage, bool ``[n]``."""
    return (progress.broken_in >= stage.first) & (progress.broken_in <= stage.last)


def robust_after(stages: Sequence[Stage], progress: Progress) -> dict[str, float]:
    """Share of images that are still classified correctly after each stage that was wanted."""
    return {
        stage.name: float(np.mean(~broken_by(progress, stage.last)))
        for stage in stages
        if wanted(stage, progress)
    }
