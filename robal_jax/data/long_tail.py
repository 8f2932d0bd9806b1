"""Long-tailed subsets: how many images each class keeps, and which ones."""

import math
from collections.abc import Callable

import numpy as np

from robal_jax.errors import InputError


def _exponential(n_max: int, num_classes: int, ratio: float) -> list[int]:
    return [int(n_max * ratio ** (i / (num_classes - 1))) for i in range(num_classes)]


def _step(n_max: int, num_classes: int, ratio: float) -> list[int]:
    head = num_classes // 2
    return [n_max] * head + [int(n_max * ratio)] * (num_classes - head)


PROFILES: dict[str, Callable[[int, int, float], list[int]]] = {"exp": _exponential, "step": _step}


def long_tailed_counts(n_max: int, num_classes: int, ratio: float, profile: str = "exp") -> np.ndarray:
    """Returns how many images each class keeps in the long-tailed train set.

    - exp: ``n_i = int(n_max * ratio^(i / (K - 1)))``, ``i = 0..K-1``
    - step: ``n_i = n_max`` for ``i < K // 2``, ``int(n_max * ratio)`` for the other classes

    Args:
      n_max: images of the head class, >= 1.
      num_classes: K >= 2.
      ratio: n_min / n_max, in (0, 1]; papers quote its inverse, the imbalance ratio IR.
      profile: 'exp' or 'step'.

    Returns:
      int64 ``[K]``.

    Raises:
      InputError: the profile is unknown, the ratio is outside (0, 1], or a class would keep no image.

    Source: RoBal, experimental settings; counts are truncated, not rounded (quirk 5).
    """
    if profile not in PROFILES:
        raise InputError(f"unknown long-tail profile {profile!r}; use one of {', '.join(PROFILES)}")
    if n_max < 1 or num_classes < 2:
        raise InputError(
            f"a head of {n_max} images and {num_classes} classes cannot be long-tailed; "
            f"give 1 image and 2 classes, or more"
        )
    if not 0 < ratio <= 1:
        raise InputError(
            f"imbalance ratio {ratio} is outside (0, 1]; give n_min / n_max, such as 0.02 for IR 50"
        )
    counts = PROFILES[profile](n_max, num_classes, ratio)
    if 0 in counts:
        # 1 / n_max may round down, and the truncation would then leave 0 images.
        smallest = 1 / n_max if int(n_max * (1 / n_max)) else math.nextafter(1 / n_max, 1)
        raise InputError(
            f"imbalance ratio {ratio} leaves class {counts.index(0)} without an image "
            f"(head {n_max}, profile {profile}); set it to at least {smallest}"
        )
    return np.array(counts, np.int64)


def long_tailed_indices(labels: np.ndarray, counts: np.ndarray, seed: int = 0) -> np.ndarray:
    """Draws the positions of the images that the long-tailed train set keeps, class 0 first.

    One legacy NumPy generator runs through the classes in order. It shuffles the positions of each class, of
    which the first n_i are kept.

    Args:
      labels: integers ``[N]``, the full train labels in the official order.
      counts: integers ``[K]``, n_i.
      seed: seed of the subset; 0 in the paper, whatever the training seed.

    Returns:
      int64 ``[sum n_i]``, positions in 0..N-1.

    Raises:
      InputError: a class has fewer than n_i images.

    Source: RoBal, experimental settings, and the released data set class (quirks 4 and 5).
    """
    rng = np.random.RandomState(seed)
    kept = []
    for label, count in enumerate(counts):
        positions = np.flatnonzero(labels == label)
        if len(positions) < count:
            raise InputError(
                f"class {label} has {len(positions)} images but the long-tailed set needs {count}; "
                f"give the full data set, or fewer images of the largest class"
            )
        rng.shuffle(positions)
        kept.append(positions[:count])
    return np.concatenate(kept)
