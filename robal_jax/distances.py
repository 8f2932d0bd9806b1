"""Figures of merit from distances: how far the closest adversarial image of each test image is.

Symbols: ``n`` test images, ``K`` classes; ``d`` is the distance of an image, as
:func:`robal_jax.attacks.fmn` finds it: 0 where the clean image is misclassified, infinity where no
adversarial image was found. An image is robust at a radius epsilon if ``d > epsilon``, so one attack without
a radius answers for all of them. What an attack finds is an upper bound of the smallest distance, and so of
the robust accuracy.

Every function raises InputError for distances of a wrong shape, type or range. The examples assume
``import numpy as np`` and ``from robal_jax.distances import *``.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import bdtr

from robal_jax import checks, metrics
from robal_jax.errors import InputError


def _distances(name: str, values: ArrayLike, size: int | None = None) -> np.ndarray:
    """Returns one distance per image, float64 ``[n]``.

    Raises:
      InputError: another shape, no numbers, or a distance that is negative or NaN.
    """
    checks.vector(name, values, size, per="image")
    array = np.asarray(values, np.float64)
    wrong = array[~(array >= 0)]  # or NaN
    if len(wrong):
        raise InputError(f"{name} have the entry {wrong[0]:g}; each must be >= 0, or inf if none was found")
    return array


def robust_accuracy_curve(distances: ArrayLike, epsilons: ArrayLike) -> np.ndarray:
    """Computes the robust accuracy at several radii.

    ``rho(epsilon) = #{i: d_i > epsilon} / n``

    Args:
      distances: ``d [n]``.
      epsilons: radii ``[m]``, finite and at least 0, in any order; at 0 the curve is the clean accuracy.

    Returns:
      ``rho [m]``, float64 in [0, 1].

    Example:
      >>> print(robust_accuracy_curve([0.0, 0.1, 0.3, np.inf], epsilons=[0.0, 0.1, 0.2, 1.0]))
      [0.75 0.5  0.5  0.25]
    """
    checks.lengths("epsilons", epsilons, per="radius", zero=True)
    beyond = np.sort(_distances("distances", distances))
    reached = np.searchsorted(beyond, np.asarray(epsilons, np.float64), side="right")
    return 1 - reached / len(beyond)


def median_distances(
    labels: ArrayLike,
    distances: ArrayLike,
    class_counts: Sequence[int] | np.ndarray,
    *,
    groups: Mapping[str, ArrayLike] | None = None,
) -> dict[str, Any]:
    """Computes the median distance of all images, of each class, and of head, medium and tail.

    A FIGURE is {'value', 'low', 'high'}: the median, and an interval between two order statistics that holds
    at least 95 %, whatever the distribution: ``[d_(j), d_(n + 1 - j)]`` with the largest ``j`` such that
    ``P(Binomial(n, 1/2) < j) <= 0.025``. Fewer than six images give no ``j``, and [0, infinity].

    Args:
      labels: true classes, integers ``[n]`` in ``0..K-1``.
      distances: ``d [n]``.
      class_counts: training images per class, integers ``[K]``.
      groups: classes by the name of their group; those of :func:`robal_jax.metrics.class_groups` if None.

    Returns:
      'all', a FIGURE; 'per_class', a FIGURE per class ``[K]``; 'groups', a FIGURE by name. A median is
      infinite if nothing was found for half of the images.

    Raises:
      InputError: a class without a test image; or an argument has a wrong shape, type or range.

    Source: of the interval, Thompson, "On Confidence Ranges for the Median and Other Expectation
    Distributions ..." (Annals of Mathematical Statistics, 1936).

    Example:
      >>> found = median_distances([0, 0, 0, 1, 1], [0.2, 0.4, 0.3, 0.0, np.inf], class_counts=[9, 3])
      >>> print([figure["value"] for figure in found["per_class"]], found["groups"]["tail"]["value"])
      [0.3, inf] inf
    """
    values = _distances("distances", distances)
    checks.labels_of(len(values), np.asarray(labels))
    labels, counts, named = metrics.checked(labels, class_counts, groups)
    return {
        "all": _median(values),
        "per_class": [_median(values[labels == number]) for number in range(len(counts))],
        "groups": {name: _median(values[np.isin(labels, members)]) for name, members in named.items()},
    }


def _median(values: np.ndarray) -> dict[str, float]:
    """Returns the median and its interval; :func:`median_distances` says which."""
    size, ordered = len(values), np.sort(values)
    j = int(np.sum(bdtr(np.arange(size), size, 0.5) <= metrics.ALPHA / 2))
    low, high = (ordered[j - 1], ordered[size - j]) if j else (0.0, np.inf)
    return {"value": float(np.median(values)), "low": float(low), "high": float(high)}


def attack_optimality(distances: Mapping[str, ArrayLike]) -> dict[str, float]:
    """Compares attacks on one model by the areas that their curves leave below the clean accuracy.

    ``xi_a = (rho(0) e - int_0^e rho_a) / (rho(0) e - int_0^e rho_*)``

    Here ``rho_a`` is the robust accuracy under attack ``a``, ``rho_*`` that under the best of all attacks on
    each image, ``d_* = min_a d_a``, and ``e`` the smallest radius at which ``rho_*`` is 0. The curves are
    steps, so ``int_0^e rho_a = mean_i min(d_ai, e)`` exactly; AttackBench's code joins their corners by
    straight lines, which gives slightly other areas. Images for which no attack finds anything keep ``rho_*``
    above 0: ``e`` is then the largest distance of the others.

    Args:
      distances: ``d_a [n]`` by attack, of the same images.

    Returns:
      ``xi_a`` by attack, in [0, 1]: 1 for an attack that is the best on every image, 0 for one that finds
      nothing within ``e``. It compares with the given attacks only: a sole attack has 1.

    Raises:
      InputError: the attacks disagree which clean images are misclassified, or the best curve falls to 0 in
        one step, so that there is no area; or distances have a wrong shape, type or range.

    Source: Cinà et al., "AttackBench: Evaluating Gradient-based Attacks for Adversarial Examples" (AAAI
    2025), local optimality; their code, ``eval_optimality`` of ``analysis/utils.py``.

    Example:
      >>> print(attack_optimality({"weak": [0.0, 0.2, 0.4], "strong": [0.0, 0.1, 0.3]}))
      {'weak': 0.5, 'strong': 1.0}
    """
    if not distances:
        raise InputError("distances has no attack; pass at least one")
    size = np.size(next(iter(distances.values())))
    found = {name: _distances(f"distances of {name!r}", values, size) for name, values in distances.items()}
    stacked = np.stack(list(found.values()))
    if ((stacked == 0).any(0) != (stacked == 0).all(0)).any():
        raise InputError("the attacks disagree which clean images are misclassified; pass the same images")
    best = stacked.min(axis=0)
    last = np.max(best, where=np.isfinite(best), initial=0.0)
    gained = {name: np.sum(np.where(best > 0, last - np.minimum(d, last), 0.0)) for name, d in found.items()}
    most = np.sum(np.where(best > 0, last - np.minimum(best, last), 0.0))
    if not most:
        raise InputError("the best attack has fewer than two different distances above 0; pass more images")
    return {name: float(area / most) for name, area in gained.items()}
