"""AutoAttack: an ensemble of four attacks without settings to tune, image by image the worst case.

An ensemble is a tuple of *stages*, run one after the other on the images that are still classified right. A
stage is one attack in several *rounds* (targets, restarts). What a round has broken costs nothing in the
next one, and all rounds of a stage are calls of one compiled function with full batches::

    progress = begin(labels, clean_predictions)
    for stage in stages("standard", num_classes=10, threat=threat):
        for progress in run(stage, attack, labels, progress, size=500):
            ...  # after every batch: save it, show it, stop

``attack`` is the edge of the world: it knows the model, the images and the devices. Progress is arrays and
counts; from a saved one the ensemble goes on as if it had not been interrupted.

Only the whole standard ensemble is called AutoAttack. RoBal's tables call the first two of its four attacks
"AA"; here that pair is ``robal_aa``.

Source: Croce and Hein (ICML 2020); attacks, order and constants of the versions as in the reference
implementation.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from robal_jax import checks, losses
from robal_jax.attacks import autopgd
from robal_jax.attacks.fab_attack import fab, fab_start
from robal_jax.attacks.margins import dlr
from robal_jax.attacks.square_attack import square
from robal_jax.attacks.threat import LogitsFn, RandomLogitsFn, ThreatModel, like_images, starting_points
from robal_jax.errors import InputError
from robal_jax.keys import fold_in, image_keys
from robal_jax.models import closure

VERSIONS: dict[str, tuple[str, ...]] = {
    "robal_aa": ("apgd_ce", "apgd_t"),
    "standard": ("apgd_ce", "apgd_t", "fab_t", "square"),
    "plus": ("apgd_ce", "apgd_dlr", "fab", "square", "apgd_t", "fab_t"),
    "rand": ("apgd_ce", "apgd_dlr"),
}

CONDITIONS = {"standard": "autoattack", "plus": "autoattack_plus", "rand": "autoattack_rand"}
"""What the outcome of a whole version is called; of a list of one's own: ``custom``."""

Round = Callable[[LogitsFn | RandomLogitsFn, chex.PRNGKey, chex.Array, chex.Array, chex.Array], chex.Array]
"""``(logits_fn, keys [B], images, labels, number) -> images``, all of them allowed by the threat model."""


class Stage(NamedTuple):
    """One attack of an ensemble.

    Attributes:
      name: of the attack.
      attack: one round.
      rounds: how often it is run, with another target or start each time.
      first: number of its first round, counted over the whole ensemble from 1.
    """

    name: str
    attack: Round
    rounds: int
    first: int

    @property
    def last(self) -> int:
        """Number of its last round."""
        return self.first + self.rounds - 1


def attack_names(version: str) -> tuple[str, ...]:
    """The attacks of a version, or of a list of one's own separated by commas.

    Raises:
      InputError: an unknown name, or one that comes twice.
    """
    names = VERSIONS.get(version) or tuple(version.split(","))
    unknown = [name for name in names if name not in _ATTACKS]
    if unknown or len(set(names)) < len(names):
        raise InputError(
            f"{version!r} is no ensemble of attacks; it must be none, {', '.join(VERSIONS)}, or a list, "
            f"separated by commas and each once, of {', '.join(_ATTACKS)}"
        )
    return names


def stages(
    version: str,
    num_classes: int,
    *,
    threat: ThreatModel,
    steps: int = 100,
    queries: int = 5000,
) -> tuple[Stage, ...]:
    """The stages of a version or of a list of attacks.

    Args:
      version: a key of ``VERSIONS``, or names of attacks separated by commas.
      num_classes: K; a targeted attack takes the ``min(9, K - 1)`` most likely wrong classes.
      threat: what is allowed.
      steps: of each run of APGD and FAB; AutoAttack's is 100.
      queries: of Square; AutoAttack's is 5000.

    Raises:
      InputError: no such ensemble, or too few classes for the losses of its attacks.
    """
    names = attack_names(version)
    for name, needed in (("apgd_dlr", 3), ("apgd_t", 4)):
        if name in names and num_classes < needed:
            raise InputError(
                f"{name} needs at least {needed} classes and the model has {num_classes}; name attacks that "
                "do not, for example apgd_ce,fab_t,square"
            )
    restarts = 5 if version == "plus" else 1
    settings = _Settings(threat, steps, queries, eot=20 if version == "rand" else 0)
    targets = min(9, num_classes - 1)
    rounds = [{"apgd_t": targets, "fab_t": targets, "square": 1}.get(name, restarts) for name in names]
    return tuple(
        Stage(name, partial(_ATTACKS[name], settings=settings), count, 1 + sum(rounds[:place]))
        for place, (name, count) in enumerate(zip(names, rounds, strict=True))
    )


@dataclasses.dataclass(frozen=True)
class _Settings:
    threat: ThreatModel
    steps: int
    queries: int
    eot: int


def _apgd(
    logits_fn: LogitsFn | RandomLogitsFn,
    keys: chex.PRNGKey,
    images: chex.Array,
    labels: chex.Array,
    number: chex.Array,
    *,
    settings: _Settings,
    loss: losses.Loss,
) -> chex.Array:
    del number  # a restart differs by its keys
    threat, steps, eot = settings.threat, settings.steps, settings.eot
    return autopgd.apgd(logits_fn, keys, images, labels, threat=threat, steps=steps, loss=loss, eot=eot)


def _apgd_t(
    logits_fn: LogitsFn,
    keys: chex.PRNGKey,
    images: chex.Array,
    labels: chex.Array,
    number: chex.Array,
    *,
    settings: _Settings,
) -> chex.Array:
    threat, steps = settings.threat, settings.steps
    return autopgd.targeted_apgd(logits_fn, keys, images, labels, threat=threat, rank=number + 2, steps=steps)


def _fab(
    logits_fn: LogitsFn,
    keys: chex.PRNGKey,
    images: chex.Array,
    labels: chex.Array,
    number: chex.Array,
    *,
    settings: _Settings,
    targeted: bool,
) -> chex.Array:
    threat, rank, start = settings.threat, None, images
    if targeted:
        rank = number + 2
    else:  # the first run starts at the image, each restart at a random one
        start = jnp.where(number > 0, starting_points(fab_start, keys, images, threat), images)
    found = fab(logits_fn, keys, images, labels, threat=threat, rank=rank, n_iter=settings.steps, start=start)
    # FAB looks for the nearest misclassified image, wherever it is.
    near = threat.distance(found, images) <= threat.epsilon
    return jnp.where(like_images(near, images), found, images)


def _square(
    logits_fn: LogitsFn,
    keys: chex.PRNGKey,
    images: chex.Array,
    labels: chex.Array,
    number: chex.Array,
    *,
    settings: _Settings,
) -> chex.Array:
    del number
    return square(logits_fn, keys, images, labels, threat=settings.threat, queries=settings.queries)


_ATTACKS: dict[str, Callable[..., chex.Array]] = {
    "apgd_ce": partial(_apgd, loss=losses.cross_entropy),
    "apgd_dlr": partial(_apgd, loss=dlr),
    "apgd_t": _apgd_t,
    "fab": partial(_fab, targeted=False),
    "fab_t": partial(_fab, targeted=True),
    "square": _square,
}

CLEAN, ROBUST = 0, -1


@dataclasses.dataclass
class Progress:
    """How far an ensemble is, and what it found.

    Attributes:
      broken_in: the round, counted over all stages from 1, in which an image was first misclassified;
        ``CLEAN`` if it is misclassified as it is, ``ROBUST`` if it never was. ``[n]``.
      predictions: what the image is called there; the label if it never was misclassified. ``[n]``.
      adversarial: the misclassified images by number.
      round: that is run, from 1.
      done: images of this round that were attacked.
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
        """How many images are still classified right."""
        return int(np.sum(self.broken_in == ROBUST))


def begin(labels: np.ndarray, clean_predictions: np.ndarray) -> Progress:
    """Nothing is attacked yet; images that are misclassified as they are count as broken."""
    right = clean_predictions == labels
    return Progress(np.where(right, ROBUST, CLEAN), clean_predictions.copy(), {})


Batch = Callable[[np.ndarray, int], tuple[np.ndarray, np.ndarray]]
"""``(numbers of images, round of the stage from 0) -> (images, predictions)``."""


def run(
    stage: Stage, attack: Batch, labels: np.ndarray, progress: Progress, *, size: int
) -> Iterator[Progress]:
    """One stage of the ensemble on what is still robust, or what an interrupted run of it has left to do.

    Args:
      stage: whose turn it is.
      attack: makes one round of it on a batch.
      labels: ``[n]``.
      progress: from :func:`begin` and the stages before; changed in place.
      size: largest batch.

    Yields:
      The progress after each batch.
    """
    while progress.round <= stage.last:
        todo = progress.todo()
        while progress.done < len(todo):
            ids = todo[progress.done : progress.done + size]
            images, predictions = attack(ids, progress.round - stage.first)
            for place in np.flatnonzero(predictions != labels[ids]):
                progress.broken_in[ids[place]] = progress.round
                progress.predictions[ids[place]] = predictions[place]
                progress.adversarial[int(ids[place])] = images[place]
            progress.done += len(ids)
            yield progress
        progress.round, progress.done = progress.round + 1, 0


def work_left(stage: Stage, progress: Progress) -> int:
    """How many images the rounds of a stage have still to attack, if no more of them breaks."""
    if progress.round > stage.last:
        return 0
    rounds_after = stage.last - max(progress.round, stage.first)
    return len(progress.todo()) - progress.done + rounds_after * progress.robust


def outcomes(
    version: str, stages: Sequence[Stage], progress: Progress, labels: np.ndarray
) -> dict[str, np.ndarray]:
    """Predictions ``[n]`` under each part of the ensemble that has a name of its own.

    ``apgd_ce`` after that attack and ``robal_aa`` after RoBal's pair, where the ensemble begins with them in
    their standard form, and the name of the whole version: see ``CONDITIONS``.
    """
    names = tuple(stage.name for stage in stages)
    if names == VERSIONS["standard"]:
        version = "standard"  # spelled out
    after = {}
    if version not in ("plus", "rand"):
        if names[0] == "apgd_ce":
            after["apgd_ce"] = stages[0].last
        if names[:2] == VERSIONS["robal_aa"]:
            after["robal_aa"] = stages[1].last
    if stages[-1].last not in after.values():
        after[CONDITIONS.get(version, "custom")] = stages[-1].last
    return {
        name: np.where(broken_by(progress, last), progress.predictions, labels)
        for name, last in after.items()
    }


def broken_by(progress: Progress, last: int) -> np.ndarray:
    """Whether images are misclassified as they are or in a round up to ``last``, bool ``[n]``."""
    return (progress.broken_in >= CLEAN) & (progress.broken_in <= last)


def robust_after(stages: Sequence[Stage], progress: Progress) -> dict[str, float]:
    """Share of images that are still classified right after each stage."""
    return {stage.name: float(np.mean(~broken_by(progress, stage.last))) for stage in stages}


class Found(NamedTuple):
    """The result of :func:`autoattack`.

    Attributes:
      images: ``[n, H, W, C]`` float32: an adversarial image where one was found, the image itself elsewhere.
      predictions: class of each of these images, int ``[n]``.
      robust: name of an attack to whether each image is still classified correctly after it and all attacks
        before it, bool ``[n]``; first 'clean', before any attack.
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
    version: str = "standard",
    batch_size: int = 500,
    steps: int = 100,
    queries: int = 5000,
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
      threat: what the attacks may do.
      version: 'standard', 'plus', 'rand', 'robal_aa' (APGD-CE and APGD-T), or a list such as
        'apgd_ce,square'.
      batch_size: images that are attacked at once.
      steps: of each run of APGD and FAB; AutoAttack's is 100.
      queries: of Square; AutoAttack's is 5000.

    Returns:
      The adversarial images and the outcome of each attack.

    Raises:
      InputError: no such version, or too few classes for it.
      ValueError: images, labels or logits have a wrong shape, type or range.

    Source: Croce and Hein (ICML 2020).

    Example:
      >>> import jax
      >>> model = lambda images: images.reshape(-1, 4) @ jnp.array([[1.0, -1.0]] * 4)
      >>> images = jnp.ones((2, 2, 2, 1)) * jnp.array([0.3, 0.9])[:, None, None, None]
      >>> found = autoattack(lambda x: model(x - 0.5), jax.random.key(0), images, jnp.zeros(2, int),
      ...                    threat=ThreatModel(0.1), version="apgd_ce,fab_t", steps=5)
      >>> {name: right.tolist() for name, right in found.robust.items()}
      {'clean': [False, True], 'apgd_ce': [False, True], 'fab_t': [False, True]}
    """
    images, labels = jnp.asarray(images), jnp.asarray(labels)
    checks.images_and_labels(images, labels, threat.lower, threat.upper)
    keys, random, size = image_keys(key, images), version == "rand", min(batch_size, len(images))
    given: Any = logits_fn
    predict, arrays = (None, []) if random else closure.split(given, images.shape[1:])

    def judged(arrays: Any, keys: chex.PRNGKey, shown: chex.Array) -> tuple[chex.Array, chex.Array]:
        return shown, predict(arrays, shown) if predict else given(shown, keys)

    def one_round(stage: Stage, arrays: Any, keys: Any, x: Any, y: Any, number: Any) -> tuple[Any, Any]:
        keys = fold_in(keys, stage.first + number)
        model = partial(predict, arrays) if predict else given
        return judged(arrays, keys, stage.attack(model, keys, x, y, number))

    def in_batches(work: Callable[..., Any], ids: np.ndarray, *more: Any) -> tuple[np.ndarray, np.ndarray]:
        """Images, and the classes that they are given; a last batch that is not full is filled up."""
        shown, predictions = [], []
        for start in range(0, len(ids), size):
            batch = np.take(ids, range(start, start + size), mode="clip")
            x, logits = work(arrays, keys[batch], images[batch], labels[batch], *more)
            shown.append(np.asarray(x)[: len(ids) - start])
            predictions.append(np.argmax(np.asarray(logits), -1)[: len(ids) - start])
        return np.concatenate(shown), np.concatenate(predictions)

    clean = jax.jit(lambda arrays, keys, x, y: judged(arrays, keys, x))
    num_classes = jax.eval_shape(clean, arrays, keys[:size], images[:size], labels[:size])[1].shape[-1]
    true = np.asarray(labels)
    if true.max() >= num_classes:
        raise ValueError(
            f"labels go up to {true.max()}; the {num_classes} classes need labels in 0..{num_classes - 1}"
        )
    ensemble = stages(version, num_classes, threat=threat, steps=steps, queries=queries)
    clean_predictions = in_batches(clean, np.arange(len(images)))[1]
    progress = begin(true, clean_predictions)
    for stage in ensemble:
        work = jax.jit(partial(one_round, stage))
        attack: Batch = lambda ids, number, work=work: in_batches(work, ids, np.int32(number))  # type: ignore[misc]  # noqa: E731
        for _ in run(stage, attack, true, progress, size=size):
            pass
    shown = np.array(images, np.float32)
    for number, image in progress.adversarial.items():
        shown[number] = image
    robust = {stage.name: ~broken_by(progress, stage.last) for stage in ensemble}
    return Found(shown, progress.predictions, {"clean": clean_predictions == true, **robust})
