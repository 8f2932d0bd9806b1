"""Figures of merit for robustness under long-tailed training, from labels and predictions alone.

Symbols: ``n`` test images, ``K`` classes. A condition is the clean images, or one attack on them.

Intervals hold 95 % and draw no random numbers. A share of test images (accuracy, the recall of a class, an
error rate) gets a Wilson interval; a mean of per-class ratios (macro precision, recall, F-score) an exact
interval at its effective sample size, :func:`macro_interval`; a difference of two models an interval for
paired shares, :func:`paired_difference`. The last two say how well they hold. A Wilson interval covers 95 %
on average over shares, and as little as 83 % where fewer than one wrong or one right image is expected (79 %
with a single test image).

Every function raises InputError for arguments of a wrong shape, type or range. The examples assume
``import numpy as np`` and ``from robal_jax.metrics import *``.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import bdtr, betaincinv

from robal_jax.errors import InputError

Z95 = NormalDist().inv_cdf(0.975)
"""Normal quantile of a two-sided 95 % interval."""

ALPHA = 0.05
"""Level of the tests; intervals hold ``1 - ALPHA``."""


def _classes(name: str, values: ArrayLike, size: int | None = None) -> np.ndarray:
    """Returns one class per image, integers ``[n]``, as an array.

    Raises:
      InputError: another shape or type.
    """
    array = np.asarray(values)
    if array.ndim != 1 or (len(array) and not np.issubdtype(array.dtype, np.integer)):
        raise InputError(
            f"{name} have shape {list(array.shape)} and dtype {array.dtype}; pass integers [n], one per image"
        )
    if size is not None and len(array) != size:
        raise InputError(f"{name} have {len(array)} entries, labels {size}; pass one per image")
    return array


def _whole(**numbers: Any) -> None:
    """Raises if a number is no integer.

    Raises:
      InputError: names it.
    """
    for name, number in numbers.items():
        if not isinstance(number, int | np.integer):
            raise InputError(f"{name} is {number!r}; pass an integer")


def _hits(name: str, values: ArrayLike, size: int | None = None) -> np.ndarray:
    """Returns one boolean per image, ``[n]``, as an array.

    Raises:
      InputError: another shape or type, or no image.
    """
    array = np.asarray(values)
    if array.ndim != 1 or array.dtype != bool or not len(array):
        raise InputError(
            f"{name} has shape {list(array.shape)} and dtype {array.dtype}; pass booleans [n], one per image"
        )
    if size is not None and len(array) != size:
        raise InputError(f"{name} has {len(array)} entries, first {size}; pass one per image")
    return array


def _square(confusion: ArrayLike) -> np.ndarray:
    """Returns confusion matrices ``[..., K, K]`` as an array.

    Raises:
      InputError: another shape.
    """
    array = np.asarray(confusion)
    if array.ndim < 2 or array.shape[-1] != array.shape[-2] or not array.shape[-1]:
        raise InputError(f"confusion has shape {list(array.shape)}; pass one row and one column per class")
    return array


def _per_class(name: str, values: ArrayLike) -> np.ndarray:
    """Returns one number per class, ``[K]``, as an array.

    Raises:
      InputError: another shape.
    """
    array = np.asarray(values)
    if array.ndim != 1 or not len(array):
        raise InputError(f"{name} has shape {list(array.shape)}; pass one number per class, [K]")
    return array


def _counts(class_counts: ArrayLike) -> np.ndarray:
    """Returns the number of training images per class, integers ``[K]``, as an array.

    Raises:
      InputError: another shape, no whole numbers, or a class without images.
    """
    from robal_jax import checks  # here, because comparisons of runs start without JAX

    checks.class_counts(class_counts, whole=True)
    return np.asarray(class_counts).astype(np.int64)


def _among(num_classes: int, name: str, classes: np.ndarray) -> None:
    """Raises if a class is not in ``0..K-1``.

    Raises:
      InputError: says which are there.
    """
    if classes.size and not 0 <= classes.min() <= classes.max() < num_classes:
        raise InputError(
            f"{name} are in {classes.min()}..{classes.max()}; pass classes in 0..{num_classes - 1}"
        )


def confusion_matrix(labels: ArrayLike, predictions: ArrayLike, num_classes: int) -> np.ndarray:
    """Counts the test images by true and predicted class.

    ``C[i, j] = #{images of class i that are predicted as j}``

    Args:
      labels: true classes, integers ``[n]`` in ``0..K-1``.
      predictions: predicted classes, integers ``[n]`` in ``0..K-1``.
      num_classes: ``K``.

    Returns:
      ``C``, int64 ``[K, K]``, true classes in rows.

    Example:
      >>> print(confusion_matrix(labels=[0, 0, 1, 1], predictions=[0, 1, 1, 1], num_classes=2))
      [[1 1]
       [0 2]]
    """
    labels = _classes("labels", labels)
    _whole(num_classes=num_classes)
    pairs = np.stack([labels, _classes("predictions", predictions, len(labels))]).astype(np.int64)
    _among(num_classes, "labels and predictions", pairs)
    cells = np.bincount(pairs[0] * num_classes + pairs[1], minlength=num_classes**2)
    return cells.reshape(num_classes, num_classes).astype(np.int64)


def precision_recall_f(confusion: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Computes precision, recall and F-score of each class.

    With ``t = C[k, k]``: ``precision = t / sum_i C[i, k]``, ``recall = t / sum_j C[k, j]`` and
    ``F = 2 t / (sum_i C[i, k] + sum_j C[k, j])``, the harmonic mean of the two. A ratio whose denominator is
    0 is 0, as in scikit-learn with ``zero_division=0``.

    Args:
      confusion: ``C [..., K, K]``, true classes in rows.

    Returns:
      Precision, recall and F-score, each float64 ``[..., K]`` in [0, 1].

    Source: RoBal's tables (``eval_metrics``), where scikit-learn computes them.

    Example:
      >>> precision, recall, f_score = precision_recall_f(np.array([[1, 1], [0, 2]]))
      >>> print(precision.round(4), recall.round(4), f_score.round(4))  # 1/1, 2/3; 1/2, 2/2; 2/3, 4/5
      [1.     0.6667] [0.5 1. ] [0.6667 0.8   ]
    """
    confusion = _square(confusion)
    hits = np.diagonal(confusion, axis1=-2, axis2=-1).astype(np.float64)
    predicted = confusion.sum(-2)
    support = confusion.sum(-1)

    def ratio(top: np.ndarray, bottom: np.ndarray) -> np.ndarray:
        return np.divide(top, bottom, out=np.zeros_like(top), where=bottom > 0)

    return ratio(hits, predicted), ratio(hits, support), ratio(2 * hits, predicted + support)


_LEVELS = {1: ("all",), 2: ("head", "tail"), 3: ("head", "medium", "tail")}
"""Names of the groups, if the classes have so many different numbers of training images."""


def class_groups(
    class_counts: Sequence[int] | np.ndarray, head_classes: int = 0, tail_classes: int = 0
) -> dict[str, np.ndarray]:
    """Divides the classes into head, medium and tail by their number of training images.

    Classes are sorted by falling count, equal counts by label; the first are the head, the last the tail. By
    default each takes ``floor(K / 3)`` classes: 3 / 4 / 3 of 10, 33 / 34 / 33 of 100. If only one, two or
    three different counts occur, these are the groups, whatever their sizes: 'all', 'head' and 'tail' (a step
    profile), or all three.

    Args:
      class_counts: training images per class, integers ``[K]``.
      head_classes: size of the head; 0 for the default.
      tail_classes: size of the tail; 0 for the default.

    Returns:
      Classes by the name of their group, integer arrays in that sorted order, without empty groups.

    Raises:
      InputError: a negative size, or more than ``K`` classes in head and tail together.

    Example:
      >>> for counts in ([5, 90, 20, 30], [9, 2, 9, 2, 2], [4, 4]):
      ...     print({name: classes.tolist() for name, classes in class_groups(counts).items()})
      {'head': [1], 'medium': [3, 2], 'tail': [0]}
      {'head': [0, 2], 'tail': [1, 3, 4]}
      {'all': [0, 1]}
    """
    counts = _counts(class_counts)
    _whole(head_classes=head_classes, tail_classes=tail_classes)
    if head_classes < 0 or tail_classes < 0:
        raise InputError(f"head_classes is {head_classes}, tail_classes {tail_classes}; use 0 or more")
    order, levels = np.argsort(-counts, kind="stable"), np.unique(counts)[::-1]
    if not head_classes and not tail_classes and len(levels) in _LEVELS:
        return {name: order[counts[order] == n] for name, n in zip(_LEVELS[len(levels)], levels, strict=True)}
    head = head_classes or len(counts) // 3
    tail = tail_classes or len(counts) // 3
    if head + tail > len(counts):
        raise InputError(
            f"head_classes {head} and tail_classes {tail} are more than the {len(counts)} classes; "
            "use smaller groups"
        )
    return _named(_LEVELS[3], order, head, len(counts) - tail)


def _named(names: Iterable[str], order: np.ndarray, *cuts: int) -> dict[str, np.ndarray]:
    """Cuts sorted classes in front of the given positions, and leaves out empty groups."""
    parts = np.split(order, cuts)
    return {name: part for name, part in zip(names, parts, strict=True) if len(part)}


def last_80_percent(class_counts: Sequence[int] | np.ndarray) -> dict[str, np.ndarray]:
    """Divides the classes into a head of ``floor(K / 5)`` and a tail of all others, the last 80 %.

    Args:
      class_counts: training images per class, integers ``[K]``.

    Returns:
      Classes by the name of their group, sorted as in :func:`class_groups`, without empty groups.

    Source: the tail of RobustLT (Zhang et al., CVPR 2026).

    Example:
      >>> groups = last_80_percent([5, 90, 20, 30, 70])
      >>> print({name: classes.tolist() for name, classes in groups.items()})
      {'head': [1], 'tail': [4, 3, 2, 0]}
    """
    counts = _counts(class_counts)
    return _named(MEANINGS["last_80_percent"], np.argsort(-counts, kind="stable"), len(counts) // 5)


def last_five(class_counts: Sequence[int] | np.ndarray) -> dict[str, np.ndarray]:
    """Divides the classes into the five with the fewest training images and the rest.

    Args:
      class_counts: training images per class, integers ``[K]``.

    Returns:
      Classes by the name of their group, sorted as in :func:`class_groups`, without empty groups.

    Example:
      >>> groups = last_five([5, 90, 20, 30, 70, 1])
      >>> print({name: classes.tolist() for name, classes in groups.items()})
      {'rest': [1], 'last_five': [4, 3, 2, 0, 5]}
    """
    counts = _counts(class_counts)
    return _named(MEANINGS["last_five"], np.argsort(-counts, kind="stable"), max(len(counts) - 5, 0))


def few(class_counts: Sequence[int] | np.ndarray) -> dict[str, np.ndarray]:
    """Divides the classes into those with fewer than ``FEW`` training images and the rest.

    Args:
      class_counts: training images per class, integers ``[K]``.

    Returns:
      Classes by the name of their group, sorted as in :func:`class_groups`, without empty groups.

    Example:
      >>> for counts in ([5, 90, 20, 300], [30, 20]):
      ...     print({name: classes.tolist() for name, classes in few(counts).items()})
      {'rest': [3, 1, 2], 'few': [0]}
      {'rest': [0, 1]}
    """
    counts = _counts(class_counts)
    return _named(MEANINGS["few"], np.argsort(-counts, kind="stable"), int(np.sum(counts >= FEW)))


def shots(class_counts: Sequence[int] | np.ndarray) -> dict[str, np.ndarray]:
    """Divides the classes into many, medium and few shot: above ``MANY`` images, the others, below ``FEW``.

    Args:
      class_counts: training images per class, integers ``[K]``.

    Returns:
      Classes by the name of their group, sorted as in :func:`class_groups`, without empty groups. 'few' is
      that of :func:`few`.

    Source: Liu et al. (CVPR 2019), Large-scale long-tailed recognition in an open world (ImageNet-LT).

    Example:
      >>> groups = shots([5, 100, 20, 300])
      >>> print({name: classes.tolist() for name, classes in groups.items()})
      {'many': [3], 'medium': [1, 2], 'few': [0]}
    """
    counts = _counts(class_counts)
    cuts = int(np.sum(counts > MANY)), int(np.sum(counts >= FEW))
    return _named(MEANINGS["shots"], np.argsort(-counts, kind="stable"), *cuts)


FEW, MANY = 20, 100
"""Few shot is fewer training images than ``FEW``, many shot more than ``MANY``."""

GROUPS: dict[str, Callable[..., dict[str, np.ndarray]]] = {
    "thirds": class_groups,
    "last_80_percent": last_80_percent,
    "few": few,
    "last_five": last_five,
    "shots": shots,
}
"""Protocols of class groups: from class counts ``[K]`` to the classes by group, from many images to few."""

MEANINGS: dict[str, dict[str, str]] = {
    "thirds": {},
    "last_80_percent": {"head": "is one of the first 20 %", "tail": "is one of the last 80 %"},
    "few": {
        "rest": f"has {FEW} training images or more",
        "few": f"has fewer than {FEW} training images",
    },
    "last_five": {"rest": "is outside of the last five", "last_five": "is one of the last five"},
    "shots": {
        "many": f"has more than {MANY} training images",
        "medium": f"has {FEW} to {MANY} training images",
        "few": f"has fewer than {FEW} training images",
    },
}
"""What a class of a group is or has, by protocol; nothing for thirds, whose groups depend on the counts."""


def are_protocols(names: Any) -> bool:
    """Returns whether a value is a list with commas and no spaces of keys of ``GROUPS``, each once.

    Example:
      >>> are_protocols("thirds,last_five"), are_protocols("thirds, few"), are_protocols("few,few")
      (True, False, False)
    """
    found = names.split(",") if isinstance(names, str) else [""]
    return set(found) <= set(GROUPS) and len(set(found)) == len(found)


def groups_by_protocol(
    names: str, class_counts: Sequence[int] | np.ndarray, head_classes: int = 0, tail_classes: int = 0
) -> dict[str, dict[str, np.ndarray]]:
    """Divides the classes by one or more protocols.

    Args:
      names: keys of ``GROUPS``, such as 'thirds,last_five'; the first one leads.
      class_counts: training images per class, integers ``[K]``.
      head_classes: for 'thirds', see :func:`class_groups`.
      tail_classes: for 'thirds', see :func:`class_groups`.

    Returns:
      The classes by group, by protocol.

    Raises:
      InputError: an unknown protocol, or the same one twice; or a size is given, but 'thirds' does not lead;
        or see :func:`class_groups`.
    """
    if not are_protocols(names):
        raise InputError(
            f"groups is {names!r}; use one of {', '.join(GROUPS)}, or several with commas and no spaces"
        )
    protocols, sizes = names.split(","), (head_classes, tail_classes)
    if any(sizes) and protocols[0] != "thirds":
        raise InputError(
            f"head_classes is {head_classes} and tail_classes {tail_classes}, but groups is {names!r}; leave "
            "both at 0, or put 'thirds' first"
        )
    return {name: GROUPS[name](class_counts, *(sizes if name == "thirds" else ())) for name in protocols}


def absent_groups(protocols: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Says which groups of protocols have no class, a line each.

    Args:
      protocols: of :func:`groups_by_protocol`.

    Example:
      >>> absent_groups(groups_by_protocol("few,last_five", [50, 40, 30, 25, 22, 20]))
      ["groups 'few': no class has fewer than 20 training images"]
    """
    return [
        f"groups {protocol!r}: no class {meaning}"
        for protocol, groups in protocols.items()
        for name, meaning in MEANINGS[protocol].items()
        if name not in groups
    ]


def groups_of_ten(values: ArrayLike) -> np.ndarray:
    """Averages per-class figures over ten groups of consecutive classes (groups of ten for ``K = 100``).

    Args:
      values: one figure per class ``[K]``, ``K >= 10``.

    Returns:
      float64 ``[10]``. RoBal's log prints the sums of the same groups: for ``K`` a
      multiple of 10, ``K / 10`` times these means.

    Example:
      >>> print(groups_of_ten(np.arange(20)).tolist())
      [0.5, 2.5, 4.5, 6.5, 8.5, 10.5, 12.5, 14.5, 16.5, 18.5]
    """
    figures = _per_class("values", values).astype(np.float64)
    if len(figures) < 10:
        raise InputError(f"values has {len(figures)} entries; pass those of 10 classes or more")
    return np.array([part.mean() for part in np.array_split(figures, 10)])


def wilson_interval(successes: ArrayLike, total: ArrayLike, z: float = Z95) -> tuple[np.ndarray, np.ndarray]:
    """Computes the Wilson score interval of a share.

    With ``p = s / n``: ``(p + z^2 / 2n -+ z sqrt(p (1 - p) / n + z^2 / 4n^2)) / (1 + z^2 / n)``.

    Args:
      successes: ``s [...]``, ``0 <= s <= n``; no shares.
      total: ``n [...]``, at least 1.
      z: normal quantile; the default gives 95 %.

    Returns:
      Lower and upper bound, float64 ``[...]`` in [0, 1].

    Source: Wilson (1927), Probable inference, the law of succession, and statistical inference.

    Example:
      >>> low, high = wilson_interval(8, 10)
      >>> print(low.round(4), high.round(4))
      0.4902 0.9433
    """
    s, n = np.asarray(successes, np.float64), np.asarray(total, np.float64)
    if not np.all((n >= 1) & (s >= 0) & (s <= n)):  # NaN is not
        raise InputError("successes are not in 0..total, or total is below 1; pass counts of the same images")
    p = s / n
    center = p + z**2 / (2 * n)
    half = z * np.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    scale = 1 + z**2 / n
    # Rounding may leave a bound slightly on the wrong side of a share of 0 or 1.
    return np.clip((center - half) / scale, 0, p), np.clip((center + half) / scale, p, 1)


def macro_interval(hits: ArrayLike, totals: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """Computes a 95 % interval of a mean of per-class ratios ``m = mean_k t_k / n_k``.

    If ``t_k ~ Binomial(n_k, p_k)`` are independent, ``Var m = sum_k p_k (1 - p_k) / n_k / K^2``. We
    take ``V``, the largest variance that any ``p`` of mean ``m`` can have. For ``m <= 1/2`` it is that of
    ``p_k = max(0, (1 - l n_k) / 2)``, with the ``l`` that gives this mean; above, that of ``1 - m``. The
    interval is the exact one of Clopper and Pearson for ``m n*`` of ``n* = m (1 - m) / V`` images. If all
    ``n_k`` are equal, ``n*`` is the number of all images.

    With the images of class ``k`` that are predicted as ``k`` for ``t_k``, ``m`` is the macro

    - recall (= balanced accuracy) if ``n_k`` is ``s_k``, the number of images of class ``k``;
    - precision if it is ``c_k``, the number of images that are predicted as ``k``, given which ``t_k`` is
      binomial. A class that is never predicted counts as one wrong image;
    - F-score if it is ``(s_k + c_k) / 2``. By the delta method each error between classes ``i`` and ``j``
      adds ``(a_i + a_j)^2 <= 2 a_i^2 + 2 a_j^2`` to the variance; with that bound it is the one above.

    At least 93 % are covered if every class has five images (F-score: simulated from ten on); 98 % if recalls
    differ much. Macro precision also needs as many images per class as there are classes, because a ratio of
    random counts is biased: 86 % are covered for 100 classes with ten images each. (Simulations in
    ``tests/test_metrics.py``.)

    Args:
      hits: ``t [..., K]``, whole numbers, ``0 <= t <= n``.
      totals: ``n [..., K]``; 0 where a class has no image.

    Returns:
      Lower and upper bound, float64 ``[...]`` in [0, 1].

    Source: Clopper and Pearson (1934), The use of confidence or fiducial limits illustrated in the case of
      the binomial; at an effective sample size as in Korn and Graubard (1998), Confidence intervals for
      proportions with small expected number of positive counts estimated from survey data.

    Example:
      >>> low, high = macro_interval([9, 10], [10, 10])  # as 19 of 20
      >>> print(low.round(4), high.round(4))
      0.7513 0.9987
    """
    t, n = np.broadcast_arrays(np.asarray(hits, np.float64), np.asarray(totals, np.float64))
    if not t.ndim or not t.shape[-1] or not np.all((t >= 0) & (t <= n) & (t == np.rint(t))):  # NaN is not
        raise InputError(
            "hits are not whole numbers in 0..totals, per class [..., K]; pass counts of the same images"
        )
    n = np.maximum(n, 1)
    mean = np.mean(t / n, axis=-1)
    size = _effective_size(mean, n)
    return _exact_low(mean, size), 1 - _exact_low(1 - mean, size)


def _exact_low(share: np.ndarray, size: np.ndarray) -> np.ndarray:
    """Returns the lower bound of Clopper and Pearson, a Beta quantile; the counts need not be integers."""
    s = share * size
    return np.where(s > 0, betaincinv(np.where(s > 0, s, 1), size - s + 1, ALPHA / 2), 0)


def _effective_size(mean: np.ndarray, totals: np.ndarray) -> np.ndarray:
    """Returns ``n*`` of :func:`macro_interval`: ``[...]`` from ``m [...]`` and ``n [..., K]``."""
    share = np.maximum(np.minimum(mean, 1 - mean), 1e-6)  # at 0 the limit
    n = np.sort(totals, axis=-1)
    count = n.shape[-1]
    # K m = sum_k max(0, (1 - l n_k) / 2), of which the first j (smallest n) are above 0: the largest root.
    active = np.arange(1, count + 1)
    multiplier = np.max((active - 2 * count * share[..., None]) / np.cumsum(n, -1), -1, keepdims=True)
    p = np.maximum(0, (1 - multiplier * n) / 2)
    return share * (1 - share) * count**2 / np.sum(p * (1 - p) / n, axis=-1)


def paired_difference(first: np.ndarray, second: np.ndarray) -> dict[str, float]:
    """Compares two models on the same images: accuracy of the second minus that of the first.

    With ``b`` images that only the second gets right and ``c`` that only the first does, the difference is
    ``(b - c) / n``. The p-value is that of the exact McNemar test: if neither model were better, each of the
    ``b + c`` images on which they differ would be gained or lost with probability 1/2, so that
    ``b ~ Binomial(b + c, 1/2)``.

    The 95 % interval adds one image to ``b`` and to ``c``: with ``p = (b + 1) / (n + 2)`` and
    ``q = (c + 1) / (n + 2)`` it is ``p - q -+ z sqrt((p + q - (p - q)^2) / (n + 2))``, extended to 0 if the
    test does not reject. If the test rejects, 0 is outside anyway; so 0 is inside if and only if
    ``p_value >= 0.05``. At least 92 % are covered from 40 images on, and at least 86 % with fewer.

    Args:
      first: whether the first model is right, booleans ``[n]``, ``n >= 1``.
      second: the same for the second model.

    Returns:
      'value', 'low' and 'high', in [-1, 1]; 'p_value', two-sided, 1 if the models never differ.

    Source: Bonett and Price (2012), Adjusted Wald confidence interval for a difference of binomial
      proportions based on paired data; McNemar (1947), Note on the sampling error of the difference between
      correlated proportions.

    Example:
      >>> first, second = np.arange(8) < 4, np.arange(8) < 6
      >>> difference = paired_difference(first, second)  # b = 2, c = 0
      >>> print({name: round(number, 4) for name, number in difference.items()})
      {'value': 0.25, 'low': -0.1719, 'high': 0.5719, 'p_value': 0.5}
    """
    first = _hits("first", first)
    second = _hits("second", second, len(first))
    n = len(first)
    gained = int(np.sum(second & ~first))
    lost = int(np.sum(first & ~second))
    p_value = min(1.0, 2 * float(bdtr(min(gained, lost), gained + lost, 0.5)))
    p, q = (gained + 1) / (n + 2), (lost + 1) / (n + 2)
    half = Z95 * np.sqrt((p + q - (p - q) ** 2) / (n + 2))
    low, high = np.clip([p - q - half, p - q + half], -1, 1)
    if p_value >= ALPHA:
        low, high = min(low, 0), max(high, 0)
    return {**_figure((gained - lost) / n, low, high), "p_value": p_value}


def worst_case(labels: np.ndarray, predictions: Mapping[str, np.ndarray]) -> np.ndarray:
    """Merges all conditions into one: an image counts as right only if it is right under every condition.

    Args:
      labels: true classes, integers ``[n]``.
      predictions: predicted classes by condition, each integers ``[n]``.

    Returns:
      Integers ``[n]``: the first wrong prediction in the order of the conditions, or the label if all are
      right.

    Example:
      >>> predictions = {"clean": np.array([0, 1, 2]), "attack": np.array([0, 2, 0])}
      >>> print(worst_case(np.array([0, 1, 1]), predictions))
      [0 2 2]
    """
    labels = _classes("labels", labels)
    if not predictions:
        raise InputError("predictions has no condition; pass at least one")
    stacked = np.stack([_classes(f"predictions of {k!r}", v, len(labels)) for k, v in predictions.items()])
    # argmax gives 0 where nothing is wrong, and the prediction there is the label.
    first_wrong = np.argmax(stacked != labels, axis=0)
    return np.take_along_axis(stacked, first_wrong[None], axis=0)[0]


def share(hits: np.ndarray) -> dict[str, float]:
    """Returns the share of true entries with its Wilson interval.

    Args:
      hits: booleans ``[n]``, ``n >= 1``.

    Returns:
      'value', 'low' and 'high', in [0, 1].

    Example:
      >>> accuracy = share(np.arange(10) < 8)
      >>> print({name: round(number, 4) for name, number in accuracy.items()})
      {'value': 0.8, 'low': 0.4902, 'high': 0.9433}
    """
    hits = _hits("hits", hits)
    return _figure(np.mean(hits), *wilson_interval(np.sum(hits), np.size(hits)))


def mean_share(shares: ArrayLike) -> dict[str, float]:
    """Returns the mean of one share per image, with an interval that is usually too wide.

    It is the Wilson interval of ``n m`` successes in ``n``. The variance of a number in [0, 1] with mean
    ``m`` is at most ``m (1 - m)``, that of a number that is 0 or 1. Its coverage is at worst about that of
    the Wilson interval for numbers that are 0 or 1.

    Args:
      shares: floats ``[n]`` in [0, 1], ``n >= 1``, such as how often each image is right.

    Returns:
      'value', 'low' and 'high', in [0, 1].

    Raises:
      InputError: another shape, or a number outside of [0, 1].

    Example:
      >>> print({name: round(number, 4) for name, number in mean_share([1.0, 0.5, 0.5, 0.0]).items()})
      {'value': 0.5, 'low': 0.15, 'high': 0.85}
    """
    shares = np.asarray(shares, np.float64)
    if shares.ndim != 1 or not len(shares) or not ((shares >= 0) & (shares <= 1)).all():
        raise InputError(f"shares have shape {list(shares.shape)}; pass numbers in [0, 1], one per image")
    return _figure(np.mean(shares), *wilson_interval(np.sum(shares), np.size(shares)))


FIGURES = (
    "accuracy", "balanced_accuracy", "recall", "precision", "f_score", "natural_error", "boundary_error",
    "robust_accuracy", "per_class", "confusion", "groups_of_ten", "strengths",
)  # fmt: skip
"""Names beside which :func:`summarize` and :func:`summarize_corruptions` put those of the groups."""


def checked(
    labels: ArrayLike, class_counts: ArrayLike, groups: Mapping[str, ArrayLike] | None
) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
    """Returns labels ``[n]``, class counts ``[K]`` and groups as arrays.

    Raises:
      InputError: another shape, type or range; or a class without a test image, or a group without a class or
        with the name of a figure.
    """
    counts, labels = _counts(class_counts), _classes("labels", labels)
    named = class_groups(counts) if groups is None else {k: np.asarray(v) for k, v in groups.items()}
    _among(len(counts), "labels", labels)
    absent = np.setdiff1d(np.arange(len(counts)), labels)
    if len(absent):
        raise InputError(
            f"the test set has no image of class {absent[0]}"
            + (f" and {len(absent) - 1} more" if len(absent) > 1 else "")
            + "; add some"
        )
    for name, classes in named.items():
        if name in FIGURES:
            raise InputError(f"group {name!r} has the name of a figure; choose another")
        if not classes.size:
            raise InputError(f"group {name!r} has no class; give it one, or leave it out")
        _among(len(counts), f"classes of group {name!r}", classes)
    return labels, counts, named


def summarize_corruptions(
    labels: np.ndarray,
    predictions: Mapping[str, np.ndarray],
    class_counts: Sequence[int] | np.ndarray,
    *,
    groups: Mapping[str, ArrayLike] | None = None,
) -> dict[str, Any]:
    """Computes the accuracies on corrupted images, ready for JSON.

    Args:
      labels: true classes, integers ``[n]`` in ``0..K-1``.
      predictions: predicted classes by corruption, integers ``[S, n]``, of strengths 1 to ``S``.
      class_counts: training images per class, integers ``[K]``.
      groups: classes by the name of their group; those of :func:`class_groups` if None.

    Returns:
      'mean', over all corruptions and strengths, and 'by_corruption', which maps each corruption to its mean
      over the strengths. A mean has FIGUREs (see :func:`summarize`) of :func:`mean_share`: 'accuracy', one
      per group over the test images of its classes, and the list 'per_class' ``[K]``. A corruption also has
      'strengths', a list of 'accuracy' and one FIGURE per group for each.

    Raises:
      InputError: labels or predictions have another shape, type or range; or a class without a test image, a
        group without a class, or no corruption.

    Source: the mean over 15 corruptions and 5 strengths of Hendrycks and Dietterich, ICLR 2019, on CIFAR.

    Example:
      >>> labels, fog = np.array([0, 0, 1]), np.array([[0, 0, 1], [0, 1, 0]])
      >>> found = summarize_corruptions(labels, {"fog": fog}, class_counts=[9, 3])
      >>> print([found["mean"][name]["value"] for name in ("accuracy", "head", "tail")])
      [0.6666666666666666, 0.75, 0.5]
    """
    labels, counts, named = checked(labels, class_counts, groups)
    members = {"accuracy": labels >= 0, **{name: np.isin(labels, part) for name, part in named.items()}}

    def by_group(shares: np.ndarray) -> dict[str, Any]:
        return {name: mean_share(shares[member]) for name, member in members.items()}

    def mean(right: np.ndarray) -> dict[str, Any]:
        shares = right.mean(0)
        return {
            **by_group(shares),
            "per_class": [mean_share(shares[labels == k]) for k in range(len(counts))],
        }

    if not predictions:
        raise InputError("predictions has no corruption; pass at least one")
    right = {}
    for name, found in predictions.items():
        if not len(found):
            raise InputError(f"predictions[{name!r}] have no strength; pass integers [S, n]")
        rows = np.stack([_classes(f"predictions[{name!r}]", row, len(labels)) for row in found])
        _among(len(counts), f"predictions[{name!r}]", rows)
        right[name] = rows == labels
    return {
        "mean": mean(np.concatenate(list(right.values()))),
        "by_corruption": {
            name: {**mean(rows), "strengths": [by_group(row) for row in rows]} for name, rows in right.items()
        },
    }


def summarize(
    labels: np.ndarray,
    predictions: Mapping[str, np.ndarray],
    class_counts: Sequence[int] | np.ndarray,
    *,
    groups: Mapping[str, ArrayLike] | None = None,
    protocols: Mapping[str, Mapping[str, np.ndarray]] | None = None,
) -> dict[str, Any]:
    """Computes every figure of an evaluation, ready for JSON.

    A FIGURE is {'value', 'low', 'high'} with a 95 % interval; all are shares in [0, 1]. Natural error is the
    share of images that are wrong when clean. Boundary error is the share of images that are right when clean
    and wrong under the attack, so that ``1 = natural_error + boundary_error + robust_accuracy``. 'accuracy'
    considers the attacked image alone, as published tables do; it may exceed robust_accuracy by the images
    that an attack happens to repair.

    Args:
      labels: true classes, integers ``[n]`` in ``0..K-1``.
      predictions: predicted classes by condition, each integers ``[n]``; the first condition must be 'clean'.
      class_counts: training images per class, integers ``[K]``.
      groups: classes by the name of their group; those of :func:`class_groups` if None.
      protocols: of :func:`groups_by_protocol`, for figures side by side; nothing if None or empty.

    Returns:
      'class_counts' ``[K]``; 'groups' {name: classes}; 'conditions', which maps each condition in order, and
      'worst' (see :func:`worst_case`) after them, to: FIGUREs 'accuracy', 'balanced_accuracy' and 'recall'
      (two names of the same number), 'precision', 'f_score' (macro means), one FIGURE per group over the test
      images of its classes, 'natural_error', 'boundary_error', 'robust_accuracy'; 'per_class' with the lists
      'precision', 'recall' (FIGUREs), 'f_score', 'support', 'natural_error', 'boundary_error'; 'confusion',
      counts ``[K, K]`` with the true classes in rows; for ``K >= 100`` 'groups_of_ten', ten means of recall.
      With ``protocols`` also 'protocols', which maps each protocol and group to its 'classes', its number of
      'training_images', and 'accuracy', a FIGURE by condition.

    Raises:
      InputError: a class without a test image, a group without a class, a class that is not in ``0..K-1``, or
        no 'clean' as the first condition.

    Source: RoBal, CVPR 2021; natural and boundary error from TRADES (Zhang et al., ICML 2019).

    Example:
      >>> labels, clean, attacked = np.array([0, 0, 1, 1]), np.array([0, 0, 1, 0]), np.array([0, 1, 1, 0])
      >>> summary = summarize(labels, {"clean": clean, "pgd": attacked}, class_counts=[9, 3])
      >>> names = ("accuracy", "natural_error", "boundary_error", "robust_accuracy")
      >>> print([summary["conditions"]["pgd"][name]["value"] for name in names])
      [0.5, 0.25, 0.25, 0.5]
    """
    if next(iter(predictions), None) != "clean" or "worst" in predictions:
        raise InputError(f"conditions are {list(predictions)}; start with 'clean' and leave out 'worst'")
    labels, counts, named = checked(labels, class_counts, groups)
    predictions = {k: _classes(f"predictions of {k!r}", v, len(labels)) for k, v in predictions.items()}
    clean_right = predictions["clean"] == labels
    everything = {**predictions, "worst": worst_case(labels, predictions)}
    summary = {
        "class_counts": counts.tolist(),
        "groups": {name: classes.tolist() for name, classes in named.items()},
        "conditions": {
            name: _condition(labels, prediction, clean_right, named, len(counts))
            for name, prediction in everything.items()
        },
    }
    if protocols:
        summary["protocols"] = {
            protocol: {name: _group(labels, everything, counts, classes) for name, classes in parts.items()}
            for protocol, parts in protocols.items()
        }
    return summary


def _group(
    labels: np.ndarray, predictions: Mapping[str, np.ndarray], counts: np.ndarray, classes: np.ndarray
) -> dict[str, Any]:
    """Computes the figures of one group of a protocol; :func:`summarize` lists them."""
    member = np.isin(labels, classes)
    return {
        "classes": classes.tolist(),
        "training_images": int(counts[classes].sum()),
        "accuracy": {name: share((found == labels)[member]) for name, found in predictions.items()},
    }


def _condition(
    labels: np.ndarray,
    prediction: np.ndarray,
    clean_right: np.ndarray,
    groups: Mapping[str, np.ndarray],
    num_classes: int,
) -> dict[str, Any]:
    """Computes all figures of one condition; :func:`summarize` lists them."""
    right = prediction == labels
    confusion = confusion_matrix(labels, prediction, num_classes)
    precision, recall, f_score = precision_recall_f(confusion)
    hits, support, predicted = np.diagonal(confusion), confusion.sum(-1), confusion.sum(-2)
    macro_precision, macro_recall, macro_f = (
        _figure(np.mean(ratios), *macro_interval(hits, totals))
        for ratios, totals in (
            (precision, predicted),
            (recall, support),
            (f_score, (support + predicted) / 2),
        )
    )
    recall_bounds = wilson_interval(hits, support)

    def class_share(hits: np.ndarray) -> list[float]:
        return (np.bincount(labels[hits], minlength=num_classes) / support).tolist()

    figures: dict[str, Any] = {
        "accuracy": share(right),
        "balanced_accuracy": macro_recall,
        "precision": macro_precision,
        "recall": macro_recall,
        "f_score": macro_f,
        **{name: share(right[np.isin(labels, classes)]) for name, classes in groups.items()},
        "natural_error": share(~clean_right),
        "boundary_error": share(clean_right & ~right),
        "robust_accuracy": share(clean_right & right),
        "per_class": {
            "precision": precision.tolist(),
            "recall": [_figure(*row) for row in zip(recall, *recall_bounds, strict=True)],
            "f_score": f_score.tolist(),
            "support": support.tolist(),
            "natural_error": class_share(~clean_right),
            "boundary_error": class_share(clean_right & ~right),
        },
        "confusion": confusion.tolist(),
    }
    if num_classes >= 100:
        figures["groups_of_ten"] = groups_of_ten(recall).tolist()
    return figures


def _figure(value: Any, low: Any, high: Any) -> dict[str, float]:
    return {"value": float(value), "low": float(low), "high": float(high)}
