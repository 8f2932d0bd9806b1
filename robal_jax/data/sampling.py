"""The order of the train images in an epoch, and parts of a data set: functions of their arguments only."""

import random
from collections.abc import Callable, Iterator

import numpy as np

from robal_jax.errors import InputError


def uniform_order(num_examples: int, seed: int, epoch: int) -> np.ndarray:
    """Draws a permutation of the examples that depends on (seed, epoch) only.

    Args:
      num_examples: N.
      seed: training seed, >= 0.
      epoch: epoch number, >= 0.

    Returns:
      int32 ``[N]``, each of 0..N-1 once.
    """
    # NumPy promises never to change the streams of Philox and of RandomState, unlike Generator's.
    bits = np.random.Philox(np.random.SeedSequence([seed, epoch]))
    return np.random.RandomState(bits).permutation(num_examples).astype(np.int32)


def balanced_part(labels: np.ndarray, size: int, seed: int) -> np.ndarray:
    """Draws images, of every class the same number or one more, as far as the classes have them.

    A smaller part is a subset of a larger one with the same seed.

    Args:
      labels: integers ``[N]``.
      size: number of images, at most N.
      seed: of the draw, >= 0.

    Returns:
      int64 ``[size]``, positions in 0..N-1, ascending.

    >>> labels = np.array([0, 0, 0, 0, 1, 1, 1, 2])
    >>> np.bincount(labels[balanced_part(labels, 6, seed=0)])
    array([3, 2, 1])
    """
    draw = np.random.RandomState(np.random.Philox(seed))
    order, classes = draw.permutation(len(labels)), draw.permutation(labels.max() + 1)
    round_of = np.empty(len(labels), int)  # in round r every class gives its image number r of ``order``
    for k in classes:
        members = order[labels[order] == k]
        round_of[members] = np.arange(len(members))
    return np.sort(np.lexsort((np.argsort(classes)[labels], round_of))[:size])


def held_out_part(labels: np.ndarray, share: float, seed: int) -> np.ndarray:
    """Draws the training images that are held out: of class c, ``max(1, round(share n_c))``.

    With the same seed, a larger share holds the images of a smaller one.

    Args:
      labels: integers ``[N]``, every class 0..K-1 present.
      share: of every class, in [0, 1); 0 holds out nothing.
      seed: of the draw, >= 0.

    Returns:
      int64 ``[n]``, positions in 0..N-1, ascending.

    Raises:
      InputError: no image of a class is left to train on.

    >>> labels = np.repeat([0, 1, 2], [50, 12, 2])
    >>> np.bincount(labels[held_out_part(labels, 0.1, seed=0)])
    array([5, 1, 1])
    """
    if not share:
        return np.arange(0)
    order = np.random.RandomState(np.random.Philox(seed)).permutation(len(labels))
    parts = []
    for k, count in enumerate(np.bincount(labels).tolist()):
        size = max(1, round(share * count))
        if size >= count:
            raise InputError(
                f"config.train.held_out is {share:g}, but class {k} has {count} training "
                f"image{'s' * (count != 1)}, of which none is left to train on; set a smaller share, or 0"
            )
        parts.append(order[labels[order] == k][:size])
    return np.sort(np.concatenate(parts))


def _shuffled_rounds(items: list[int], rng: random.Random) -> Iterator[int]:
    """Yields all items in a fresh random order, again and again."""
    while True:
        rng.shuffle(items)
        yield from items


def class_aware_order(labels: np.ndarray, rng: random.Random) -> np.ndarray:
    """Draws every class equally often.

    Classes come in rounds, each round a fresh shuffle; the images of each class come in rounds of their own.
    An epoch is ``max_i(n_i) * K`` draws.

    Args:
      labels: integers ``[N]``, every class 0..K-1 present.
      rng: source of the shuffles; random.Random(0) gives the released sampler's first epoch.

    Returns:
      int32 ``[max_i(n_i) * K]``, positions in 0..N-1.

    Raises:
      InputError: a class has no image.

    Source: "re-sampling" baseline of RoBal; epoch length as released (quirks 4 and 9).
    """
    counts = np.bincount(labels)
    if 0 in counts:
        raise InputError(
            f"class {np.argmin(counts)} has no image; class-aware sampling needs one or more per class"
        )
    classes = _shuffled_rounds(list(range(len(counts))), rng)
    images = [_shuffled_rounds(np.flatnonzero(labels == c).tolist(), rng) for c in range(len(counts))]
    return np.array([next(images[next(classes)]) for _ in range(counts.max() * len(counts))], np.int32)


def balanced_set(labels: np.ndarray, per_class: int, seed: int) -> np.ndarray:
    """Draws the same number of images of each class, of a small class each image several times.

    Args:
      labels: integers ``[N]``, every class 0..K-1 present.
      per_class: images of each class; 0 for the mean, ``N // K``.
      seed: of the draw, >= 0.

    Returns:
      int64 ``[per_class * K]``, positions in 0..N-1; the images of a class are drawn equally often, or once
      more.

    Source: the balanced data set of the teacher in long-tailed self-distillation (Cho et al., ICLR 2025).

    >>> labels = np.array([0, 0, 0, 0, 1, 1, 1, 2])
    >>> chosen = balanced_set(labels, 3, seed=0)
    >>> np.bincount(labels[chosen]), len(set(chosen.tolist()))
    (array([3, 3, 3]), 7)
    """
    order = np.random.RandomState(np.random.Philox(seed)).permutation(len(labels))
    size = per_class or len(labels) // (labels.max() + 1)
    return np.concatenate([np.resize(order[labels[order] == k], size) for k in range(labels.max() + 1)])


def _balanced_epoch(labels: np.ndarray, seed: int, epoch: int, per_class: int = 0) -> np.ndarray:
    chosen = balanced_set(labels, per_class, seed)
    return chosen[uniform_order(len(chosen), seed, epoch)].astype(np.int32)


def _uniform_epoch(labels: np.ndarray, seed: int, epoch: int) -> np.ndarray:
    return uniform_order(len(labels), seed, epoch)


def _class_aware_epoch(labels: np.ndarray, seed: int, epoch: int) -> np.ndarray:
    # The released sampler runs one generator through all epochs. With one seed per epoch, a resumed run need
    # not replay the earlier epochs.
    return class_aware_order(labels, random.Random(f"{seed}/{epoch}"))


def _mixed_epoch(labels: np.ndarray, seed: int, epoch: int) -> np.ndarray:
    uniform, class_aware = _uniform_epoch(labels, seed, epoch), _class_aware_epoch(labels, seed, epoch)
    return np.stack([uniform, class_aware[: len(uniform)]], axis=1).reshape(-1)


SAMPLERS: dict[str, Callable[..., np.ndarray]] = {
    "uniform": _uniform_epoch,
    "class_aware": _class_aware_epoch,
    "mixed": _mixed_epoch,
    "balanced": _balanced_epoch,
}


def epoch_order(
    sampler: str, labels: np.ndarray, seed: int, epoch: int, images_per_class: int = 0
) -> np.ndarray:
    """Returns the order in which an epoch visits the train images, a function of the arguments only.

    Args:
      sampler: 'uniform' (each image once), 'class_aware' (each class equally often), or 'mixed' (draws from
        both in turn, 2 N in all, as the released sampler of that name), or 'balanced' (each of the images of
        :func:`balanced_set` once).
      labels: int32 ``[N]``.
      seed: training seed, >= 0.
      epoch: epoch number, >= 0.
      images_per_class: of 'balanced', see there; 0 for all other samplers.

    Returns:
      int32 ``[draws]``, positions in 0..N-1.

    Raises:
      InputError: the sampler is unknown, or has no use for a number of images per class.
    """
    if sampler not in SAMPLERS:
        raise InputError(f"unknown sampler {sampler!r}; use one of {', '.join(SAMPLERS)}")
    if not images_per_class:
        return SAMPLERS[sampler](labels, seed, epoch)
    if sampler != "balanced":
        raise InputError(
            f"config.train.images_per_class is {images_per_class}, which sampler {sampler!r} does not use; "
            "set it to 0, or use 'balanced'"
        )
    return _balanced_epoch(labels, seed, epoch, images_per_class)
