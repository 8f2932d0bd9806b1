"""Figures of merit for robustness under long-tailed training, from labels and predictions alone.

Symbols: n test images, K classes, A conditions (the clean images and each attack on them).

A figure that is a share of test images (accuracy, a class's recall, an error rate) gets a Wilson
interval; a mean of per-class ratios (macro precision, recall, F-score) gets a stratified bootstrap
interval. Two kinds, because a share of 0 or 1 never varies under resampling, so that its bootstrap
interval would claim certainty, while a mean of ratios is no share and has no Wilson interval.
"""

from collections.abc import Mapping, Sequence
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from robal_jax.errors import InputError

Z95 = NormalDist().inv_cdf(0.975)
"""Normal quantile of a two-sided 95 % interval."""

_CHUNK_CELLS = 2_000_000  # confusion cells that the bootstrap holds at a time


def confusion_matrix(labels: ArrayLike, predictions: ArrayLike, num_classes: int) -> np.ndarray:
    """Count the test images by true and predicted class.

    C[i, j] = #{images of class i that are called j}.

    Args:
        labels: true classes, int [n] in [0, K).
        predictions: predicted classes, int [n] in [0, K).
        num_classes: K.

    Returns:
        C, int64 [K, K], true classes in rows.

    Raises:
        InputError: a class outside [0, K).
    """
    pairs = np.stack([np.asarray(labels), np.asarray(predictions)]).astype(np.int64)
    if pairs.size and (pairs.min() < 0 or pairs.max() >= num_classes):
        raise InputError(
            f"Labels and predictions must lie in [0, {num_classes}); found {pairs.min()} to {pairs.max()}."
        )
    cells = np.bincount(pairs[0] * num_classes + pairs[1], minlength=num_classes**2)
    return cells.reshape(num_classes, num_classes).astype(np.int64)


def precision_recall_f(confusion: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Compute precision, recall and F-score of each class.

    With t = C[k, k]: precision = t / sum_i C[i, k], recall = t / sum_j C[k, j] and
    F = 2 t / (sum_i C[i, k] + sum_j C[k, j]), the harmonic mean of the two. A ratio whose
    denominator is 0 is 0, as in scikit-learn with ``zero_division=0``.

    Args:
        confusion: C, [..., K, K], true classes in rows.

    Returns:
        Precision, recall and F-score, each float64 [..., K] in [0, 1].

    Source:
        RoBal's tables (`eval_metrics`), there by scikit-learn.
    """
    hits = np.diagonal(confusion, axis1=-2, axis2=-1).astype(np.float64)
    predicted = confusion.sum(-2)
    support = confusion.sum(-1)

    def ratio(top: np.ndarray, bottom: np.ndarray) -> np.ndarray:
        return np.divide(top, bottom, out=np.zeros_like(top), where=bottom > 0)

    return ratio(hits, predicted), ratio(hits, support), ratio(2 * hits, predicted + support)


def class_groups(
    class_counts: Sequence[int] | np.ndarray, head_classes: int = 0, tail_classes: int = 0
) -> dict[str, np.ndarray]:
    """Divide the classes into head, medium and tail by their number of training images.

    Classes are sorted by falling count, equal counts by label; the first are the head, the last the
    tail. By default each takes floor(K / 3) classes: 3 / 4 / 3 of 10, 33 / 34 / 33 of 100.

    Args:
        class_counts: training images per class, int [K].
        head_classes: size of the head; 0 for a third.
        tail_classes: size of the tail; 0 for a third.

    Returns:
        Classes of 'head', 'medium' and 'tail', int arrays in that sorted order; empty groups are left out.

    Raises:
        InputError: a negative size, or head and tail larger than K together.
    """
    counts = np.asarray(class_counts)
    if head_classes < 0 or tail_classes < 0:
        raise InputError(
            f"head_classes and tail_classes must not be negative, got {head_classes} and {tail_classes}."
        )
    head = head_classes or len(counts) // 3
    tail = tail_classes or len(counts) // 3
    if head + tail > len(counts):
        raise InputError(
            f"head_classes {head} and tail_classes {tail} do not fit into {len(counts)} classes."
        )
    order = np.argsort(-counts, kind="stable")
    parts = np.split(order, [head, len(counts) - tail])
    return {name: part for name, part in zip(("head", "medium", "tail"), parts, strict=True) if len(part)}


def groups_of_ten(values: ArrayLike) -> np.ndarray:
    """Average per-class figures over ten groups of consecutive classes (groups of ten for K = 100).

    Args:
        values: one figure per class, [K], K >= 10.

    Returns:
        float64 [10]. RoBal's log prints the sums of the same groups, i.e. K / 10 times these means.
    """
    return np.array([part.mean() for part in np.array_split(np.asarray(values, np.float64), 10)])


def wilson_interval(successes: ArrayLike, total: ArrayLike, z: float = Z95) -> tuple[np.ndarray, np.ndarray]:
    """Compute the Wilson score interval of a proportion.

    With p = s / n:  (p + z^2 / 2n -+ z sqrt(p (1 - p) / n + z^2 / 4n^2)) / (1 + z^2 / n).

    Args:
        successes: s, [...], 0 <= s <= n.
        total: n, [...], n >= 1.
        z: normal quantile; the default gives 95 %.

    Returns:
        Lower and upper bound, float64 [...] in [0, 1].

    Source:
        Wilson (1927), Probable inference, the law of succession, and statistical inference.
    """
    n = np.asarray(total, np.float64)
    p = np.asarray(successes, np.float64) / n
    center = p + z**2 / (2 * n)
    half = z * np.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    scale = 1 + z**2 / n
    # Rounding may leave a bound a hair on the wrong side of a share of 0 or 1.
    return np.clip((center - half) / scale, 0, p), np.clip((center + half) / scale, p, 1)


def bootstrap_interval(confusion: np.ndarray, *, resamples: int = 1000, seed: int = 0) -> np.ndarray:
    """Compute 95 % percentile intervals of macro precision, recall and F-score.

    Each resample draws, for every true class, as many images as the class has, with replacement: row k
    of the confusion matrix is multinomial with its own shares. The class sizes of a test set are
    its design, so they stay fixed.

    Args:
        confusion: C, int [K, K], every row sum >= 1.
        resamples: number of resamples.
        seed: seed of the draws; equal seeds give equal intervals.

    Returns:
        float64 [3, 2]: (low, high) of macro precision, macro recall (= balanced accuracy), macro F-score.

    Source:
        Efron and Tibshirani (1993), An Introduction to the Bootstrap, chapter 13.
    """
    generator = np.random.default_rng(seed)
    support = confusion.sum(-1)
    shares = confusion / support[:, None]
    chunk = max(1, _CHUNK_CELLS // confusion.size)
    macros = []
    for start in range(0, resamples, chunk):
        size = (min(chunk, resamples - start), len(confusion))
        macros.append(_macro(generator.multinomial(support, shares, size=size)))
    return np.quantile(np.concatenate(macros, -1), (0.025, 0.975), axis=-1).T


def paired_difference(first: np.ndarray, second: np.ndarray) -> dict[str, float]:
    """Compare two models on the same images: accuracy of the second minus that of the first.

    With b images that only the second gets right and c that only the first does, d = (b - c) / n. The 95 %
    interval is the normal approximation for paired proportions after adding 1/2 to each of the four
    cells (b' = b + 1/2, c' = c + 1/2, n' = n + 2), which keeps its coverage where b and c are small:
    (b' - c') / n' -+ z sqrt(b' + c' - (b' - c')^2 / n') / n'.

    The p-value is that of the exact McNemar test: if neither model were better, each of the b + c images on
    which they differ would be gained or lost with probability 1/2, so that b ~ Binomial(b + c, 1/2).

    Args:
        first: right or not, bool [n], n >= 1.
        second: the same for the second model.

    Returns:
        'value', 'low' and 'high', in [-1, 1]; 'p_value', two-sided, 1 if the models never differ.

    Source:
        Agresti and Min (2005), Simple improved confidence intervals for comparing matched proportions;
        McNemar (1947), Note on the sampling error of the difference between correlated proportions.
    """
    from scipy.stats import binomtest  # here, since it takes a second that only comparisons need

    n = len(first)
    gained = int(np.sum(second & ~first))
    lost = int(np.sum(first & ~second))
    center = (gained - lost) / (n + 2)
    half = Z95 * np.sqrt(gained + lost + 1 - (gained - lost) ** 2 / (n + 2)) / (n + 2)
    bounds = np.clip([center - half, center + half], -1, 1)
    p_value = float(binomtest(gained, gained + lost).pvalue) if gained + lost else 1.0
    return {**_figure((gained - lost) / n, *bounds), "p_value": p_value}


def worst_case(labels: np.ndarray, predictions: Mapping[str, np.ndarray]) -> np.ndarray:
    """Merge all conditions into one: an image counts as right only if it is right under every one.

    Args:
        labels: true classes, int [n].
        predictions: predicted classes by condition, each int [n].

    Returns:
        int [n]: the first wrong prediction in the order of the conditions, or the label if there is none.
    """
    stacked = np.stack([np.asarray(prediction) for prediction in predictions.values()])
    # argmax gives 0 where nothing is wrong; the prediction there is the label.
    first_wrong = np.argmax(stacked != labels, axis=0)
    return np.take_along_axis(stacked, first_wrong[None], axis=0)[0]


def share(hits: np.ndarray) -> dict[str, float]:
    """Give the share of true entries with its Wilson interval.

    Args:
        hits: bool [n], n >= 1.

    Returns:
        'value', 'low' and 'high', in [0, 1].
    """
    return _figure(np.mean(hits), *wilson_interval(np.sum(hits), np.size(hits)))


def summarize(
    labels: np.ndarray,
    predictions: Mapping[str, np.ndarray],
    class_counts: Sequence[int] | np.ndarray,
    *,
    groups: Mapping[str, ArrayLike] | None = None,
) -> dict[str, Any]:
    """Compute every figure of an evaluation, ready for JSON.

    A FIGURE is {'value', 'low', 'high'} with a 95 % interval; all are shares in [0, 1]. Natural error is the
    share of images that are wrong when clean, boundary error the share that is right when clean and wrong
    under the attack, and 1 = natural_error + boundary_error + robust_accuracy. 'accuracy' looks at the
    attacked image alone, as published tables do, so it may exceed robust_accuracy by the images that
    an attack happens to repair.

    Args:
        labels: true classes, int [n] in [0, K).
        predictions: predicted classes by condition, each int [n]; the first condition must be 'clean'.
        class_counts: training images per class, int [K].
        groups: classes by the name of their group; those of `class_groups` if None.

    Returns:
        'class_counts' [K]; 'groups' {name: classes}; 'conditions', which maps each
        condition in order, and 'worst' (see `worst_case`) after them, to: FIGUREs 'accuracy',
        'balanced_accuracy' and 'recall' (the same number under both of its names), 'precision',
        'f_score' (macro means), one per group over the test images of its classes, 'natural_error',
        'boundary_error', 'robust_accuracy'; 'per_class' with the lists 'precision', 'recall' (FIGUREs),
        'f_score', 'support', 'natural_error', 'boundary_error'; 'confusion', counts [K, K] with the true
        classes in rows; for K >= 100 'groups_of_ten', ten means of recall.

    Raises:
        InputError: a class without a test image, or a class outside [0, K).
        ValueError: the first condition is not 'clean', or one is called 'worst'.

    Source:
        RoBal, CVPR 2021; natural and boundary error from TRADES (Zhang et al., ICML 2019).
    """
    if next(iter(predictions), None) != "clean" or "worst" in predictions:
        raise ValueError(f"conditions must start with 'clean' and leave out 'worst': {list(predictions)}")
    counts = np.asarray(class_counts)
    labels = np.asarray(labels)
    named = class_groups(counts) if groups is None else {k: np.asarray(v) for k, v in groups.items()}
    absent = np.setdiff1d(np.arange(len(counts)), labels)
    if len(absent):
        raise InputError(f"The test set has no image of class {absent[0]} ({len(absent)} such classes).")

    predictions = {name: np.asarray(prediction) for name, prediction in predictions.items()}
    clean_right = predictions["clean"] == labels
    everything = {**predictions, "worst": worst_case(labels, predictions)}
    return {
        "class_counts": counts.tolist(),
        "groups": {name: classes.tolist() for name, classes in named.items()},
        "conditions": {
            name: _condition(labels, prediction, clean_right, named, len(counts))
            for name, prediction in everything.items()
        },
    }


def _condition(
    labels: np.ndarray,
    prediction: np.ndarray,
    clean_right: np.ndarray,
    groups: Mapping[str, np.ndarray],
    num_classes: int,
) -> dict[str, Any]:
    """All figures of one condition; `summarize` lists them."""
    right = prediction == labels
    confusion = confusion_matrix(labels, prediction, num_classes)
    precision, recall, f_score = precision_recall_f(confusion)
    macro_precision, macro_recall, macro_f = (
        _figure(value, *bounds)
        for value, bounds in zip(_macro(confusion), bootstrap_interval(confusion), strict=True)
    )
    support = confusion.sum(-1)
    recall_bounds = wilson_interval(np.diagonal(confusion), support)

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


def _macro(confusion: np.ndarray) -> np.ndarray:
    """Unweighted class means of precision, recall and F-score: [..., K, K] -> [3, ...]."""
    return np.stack(precision_recall_f(confusion)).mean(-1)


def _figure(value: Any, low: Any, high: Any) -> dict[str, float]:
    return {"value": float(value), "low": float(low), "high": float(high)}
