"""Budgets: how large a change of an image the adversary is allowed, by class.

A rule of ``BUDGETS`` gives each class its radius once, from the class counts, on the host. Some methods
measure the classes during training and choose the radii anew from what they found: their arithmetic is
:func:`cfa_epsilon` and :func:`dafa_weights`, and a :class:`Budget` drives it in a training step.

A robust accuracy at radii by class is not comparable with one at a common radius, which is the standard.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from robal_jax import checks
from robal_jax.class_statistics import ClassStatistics
from robal_jax.errors import InputError


class Budget(NamedTuple):
    """Radii by class in training, and what is learned of the classes to choose them.

    Attributes:
      radii: ``(arrays, epoch) -> [K]``, radius of each class in an epoch, counted from 1; the arrays are
        those of the statistics, {} without any.
      statistics: what is learned; None for nothing.
    """

    radii: Callable[[dict[str, chex.Array], chex.Numeric], chex.Array]
    statistics: ClassStatistics | None = None


def fixed(of_class: np.ndarray) -> Budget:
    """Turns radii ``[K]`` into a budget that learns nothing."""
    return Budget(lambda arrays, epoch: jnp.asarray(of_class, float))


def ramped(budget: Budget, *, epochs: int, beta: float) -> Budget:
    """Multiplies the radii of a budget by :func:`ramp`."""
    return budget._replace(
        radii=lambda arrays, epoch: budget.radii(arrays, epoch) * ramp(epoch, epochs, beta)
    )


def ramp(epoch: chex.Numeric, epochs: int, beta: float) -> chex.Array:
    """Rises from 0 in the first epoch to 1: ``min((epoch - 1) / (beta epochs), 1)``.

    Args:
      epoch: counted from 1; may be traced.
      epochs: of the whole run.
      beta: part of them over which it rises, in (0, 1].

    Source: the warm-up AIW of RobustLT (Zhang et al., CVPR 2026).

    Example:
      >>> print([float(ramp(epoch, epochs=100, beta=0.8)) for epoch in (1, 41, 81, 100)])
      [0.0, 0.5, 1.0, 1.0]
    """
    return jnp.minimum((epoch - 1) / (beta * epochs), 1.0)


def constant(class_counts: np.ndarray, epsilon: float) -> np.ndarray:
    """Gives every class the common radius.

    Args:
      class_counts: training images per class, integers ``[K]``.
      epsilon: the common radius.

    Returns:
      Radii ``[K]``.

    Example:
      >>> print(constant(np.array([50, 5]), 0.1))
      [0.1 0.1]
    """
    checks.class_counts(class_counts)
    return np.full(len(class_counts), epsilon)


def by_frequency(class_counts: np.ndarray, epsilon: float, alpha: float = 0.3) -> np.ndarray:
    """Gives rare classes the larger radii; the mean over the training images is the common radius.

    ``eps_c = (1 - alpha) eps + alpha eps r_c / sum_k pi_k r_k``,  ``r_c = sqrt(log(n_max / n_c))``

    where ``pi_k = n_k / sum_j n_j``. The largest class has ``(1 - alpha) eps``.

    Args:
      class_counts: training images per class, integers ``[K]``, not all equal.
      epsilon: the common radius ``eps``.
      alpha: how far radii are drawn apart, in [0, 1); 0.3 is published for CIFAR-10-LT.

    Returns:
      Radii ``[K]``.

    Raises:
      InputError: all classes have the same number of images, so that all ``r_c`` are 0.
      ValueError: the counts or alpha are out of range.

    Source: class-wise perturbation budgets (CPB) of RobustLT (Zhang et al., CVPR 2026).

    Example:
      >>> print(by_frequency(np.array([90, 9, 1]), 0.1).round(3))
      [0.07  0.359 0.473]
    """
    checks.class_counts(class_counts)
    checks.below_one(alpha=alpha)
    counts = np.asarray(class_counts, float)
    rarity = np.sqrt(np.log(counts.max() / counts))
    mean = np.sum(counts * rarity) / np.sum(counts)
    if not mean:
        raise InputError(
            f"all classes have {counts[0]:.0f} training images, so that their radii by frequency are 0 / 0; "
            "use the budget 'constant'"
        )
    return (1 - alpha) * epsilon + alpha * epsilon * rarity / mean


def given(class_counts: np.ndarray, epsilon: float, epsilons: Sequence[float]) -> np.ndarray:
    """Gives each class a radius of a list; the common one is not read.

    Args:
      class_counts: training images per class ``[K]``.
      epsilon: not read.
      epsilons: radii, ``K`` numbers > 0.

    Returns:
      Radii ``[K]``.

    Raises:
      InputError: another number of radii, or one that is not > 0.

    Example:
      >>> print(given(np.array([50, 5]), 0.1, epsilons=(0.08, 0.12)))
      [0.08 0.12]
      >>> given(np.array([50, 5]), 0.1, epsilons=(0.08, 0.12, 0.1))
      Traceback (most recent call last):
      robal_jax.errors.InputError: the shape of epsilons is [3]; it must be [2], one number per class
    """
    del epsilon
    checks.lengths("epsilons", epsilons, len(class_counts))
    return np.asarray(epsilons, float)


BUDGETS: dict[str, Callable[..., np.ndarray]] = {
    "constant": constant,
    "by_frequency": by_frequency,
    "given": given,
}
"""Budgets that class counts and settings decide, by name: ``(class_counts, epsilon) -> radii [K]``."""


def class_accuracy(right: chex.Array, counts: chex.Array) -> chex.Array:
    """Accuracy of each class, ``a_c = right_c / n_c``; 0 for a class of which no image was seen.

    The released code of CFA divides by the mean ``N / K`` of all classes in place of ``n_c``. On long-tailed
    data that measures a class's size, and exceeds 1.

    Args:
      right: images that are classified correctly, per class ``[K]``.
      counts: images seen, per class ``[K]``.

    Returns:
      ``[K]`` in [0, 1].

    Example:
      >>> print(class_accuracy(jnp.array([30, 1, 0]), jnp.array([40, 4, 0])))
      [0.75 0.25 0.  ]
    """
    return right / jnp.maximum(counts, 1)


def cfa_epsilon(
    robust_accuracy: chex.Array, epsilon: chex.Numeric, lambda1: chex.Numeric = 0.5
) -> chex.Array:
    """Radii by robust accuracy: a class that is robust already is attacked harder.

    ``eps_c = (lambda_1 + a_c) eps``

    Args:
      robust_accuracy: ``a_c``, under the training attack in the last epoch, ``[K]``; see
        :func:`class_accuracy`.
      epsilon: the common radius ``eps``.
      lambda1: share of it that a class without any robustness keeps.

    Returns:
      Radii ``[K]``.

    Source: customised class-wise margins (CCM) of CFA (Wei et al., CVPR 2023).

    Example:
      >>> print(cfa_epsilon(jnp.array([0.75, 0.25]), 0.1))
      [0.125 0.075]
    """
    return (lambda1 + robust_accuracy) * epsilon


def cfa_weight(robust_accuracy: chex.Array, beta: chex.Numeric, lambda2: chex.Numeric = 0.5) -> chex.Array:
    """Weights of TRADES' two terms by robust accuracy: ``b_c`` of the KL term, ``1 - b_c`` of the other.

    ``b_c = beta_c / (1 + beta_c)``,  ``beta_c = (lambda_2 + a_c) beta``

    Args:
      robust_accuracy: ``a_c [K]``, see :func:`cfa_epsilon`.
      beta: common ratio of the terms.
      lambda2: share of it that a class without any robustness keeps.

    Returns:
      ``[K]`` in (0, 1).

    Source: customised class-wise regularisation (CCR) of CFA (Wei et al., CVPR 2023).

    Example:
      >>> print(cfa_weight(jnp.array([0.75, 0.25]), 6.0).round(3))
      [0.882 0.818]
    """
    ratio = (lambda2 + robust_accuracy) * beta
    return ratio / (1 + ratio)


def dafa_similarity(sums: chex.Array, counts: chex.Array) -> chex.Array:
    """Mean probabilities by true class: ``S_ij`` is that of class ``j`` on the images of class ``i``.

    Args:
      sums: probabilities on adversarial images, summed over the images of each class, ``[K, K]``.
      counts: their numbers ``[K]``.

    Returns:
      ``S [K, K]``; a row of 0 for a class of which no image was seen.

    Example:
      >>> print(dafa_similarity(jnp.array([[3.0, 1.0], [0.0, 0.0]]), jnp.array([4, 0])))
      [[0.75 0.25]
       [0.   0.  ]]
    """
    return sums / jnp.maximum(counts, 1)[:, None]


def dafa_weights(similarity: chex.Array, scale: chex.Numeric = 1.0) -> chex.Array:
    """Weights that take from easy classes what they give to the hard classes that resemble them.

    ``w_i = 1 + scale sum_{j != i} ([S_ii < S_jj] S_ij S_jj - [S_ii >= S_jj] S_ji S_ii)``

    They multiply radius, step size and cross entropy. Between two classes one gives what the other takes, so
    their sum is ``K``; an exact tie of ``S_ii > 0`` is the exception, in which both give. Then a weight below
    0, that of a class which most images of many others are taken for, is set to 0, and the sum is larger: the
    class is not attacked, and its cross entropy does not count. A class of which no image was seen has the
    weight 1; the released code fails there.

    Args:
      similarity: ``S [K, K]``, see :func:`dafa_similarity`.
      scale: 1 on CIFAR-10, 1.5 on CIFAR-100, as published.

    Returns:
      ``w [K]``, >= 0.

    Source: DAFA (Lee et al., ICLR 2024).

    Example:
      >>> print(dafa_weights(jnp.array([[0.8, 0.2], [0.3, 0.7]])).round(2))
      [0.76 1.24]
    """
    own = jnp.diagonal(similarity)
    harder = own[:, None] < own[None, :]
    taken = jnp.where(harder, similarity * own[None, :], -similarity.T * own[:, None])
    taken = taken - jnp.diag(jnp.diagonal(taken))
    return jnp.maximum(1 + scale * taken.sum(1), 0.0)


def cfa(class_counts: np.ndarray, epsilon: float, lambda1: float = 0.5, start: int = 10) -> Budget:
    """Radii that follow the robust accuracy of each class in the last epoch: ``(lambda1 + a_c) epsilon``.

    Args:
      class_counts: training images per class ``[K]``; only ``K`` is used.
      epsilon: the common radius, until the end of epoch ``start``.
      lambda1: at least 0.
      start: first epoch, counted from 1, whose accuracies count; the radii of the next one follow them.

    Returns:
      A budget that keeps ``radii [K]``, and ``right`` and ``shown [K]``, the adversarial images of the epoch
      so far that were classified correctly, and all of them.

    Source: Wei et al. (CVPR 2023), with accuracies per class. The released code divides by N / K in place of
    the class's images.
    """
    checks.not_negative(lambda1=lambda1)
    checks.at_least(1, start=start)
    zeros = jnp.zeros(len(class_counts))

    def seen(labels: chex.Array, logits: chex.Array) -> dict[str, chex.Array]:
        own = jax.nn.one_hot(labels, len(class_counts))
        right = jnp.argmax(logits, axis=-1) == labels
        return {"right": own.T @ right.astype(own.dtype), "shown": own.sum(0)}

    def update(
        classes: dict[str, chex.Array], sums: dict[str, chex.Array], epoch: chex.Numeric, ends: chex.Array
    ) -> dict[str, chex.Array]:
        right, shown = (classes[name] + sums[name] for name in ("right", "shown"))
        radii = cfa_epsilon(class_accuracy(right, shown), epsilon, lambda1)
        radii = jnp.where(ends & (epoch >= start), radii, classes["radii"])
        return {"right": jnp.where(ends, 0, right), "shown": jnp.where(ends, 0, shown), "radii": radii}

    first = {"radii": jnp.full_like(zeros, epsilon), "right": zeros, "shown": zeros}
    return Budget(lambda arrays, epoch: arrays["radii"], ClassStatistics(lambda: first, seen, update))


def dafa(class_counts: np.ndarray, epsilon: float, scale: float = 1.0, epoch: int = 70) -> Budget:
    """Radii from the classes that adversarial images of each class are taken for, measured in one epoch.

    See :func:`dafa_weights`. After the epoch the radii are ``w_c epsilon``.

    Args:
      class_counts: training images per class ``[K]``; only ``K`` is used.
      epsilon: the common radius, until the end of the epoch.
      scale: ``lambda``, at least 0; 1 on CIFAR-10 and 1.5 on CIFAR-100 in the paper.
      epoch: in which the probabilities are averaged, counted from 1.

    Returns:
      A budget that keeps ``radii [K]``, and ``probabilities [K, K]`` and ``shown [K]``, sums over the images
      of each class.

    Source: Lee et al. (ICLR 2024) and their code.
    """
    checks.not_negative(scale=scale)
    checks.at_least(1, epoch=epoch)
    size = len(class_counts)

    def seen(labels: chex.Array, logits: chex.Array) -> dict[str, chex.Array]:
        own = jax.nn.one_hot(labels, size)
        sums = jnp.matmul(own.T, jax.nn.softmax(logits), precision=jax.lax.Precision.HIGHEST)
        return {"probabilities": sums, "shown": own.sum(0)}

    def update(
        classes: dict[str, chex.Array], sums: dict[str, chex.Array], now: chex.Numeric, ends: chex.Array
    ) -> dict[str, chex.Array]:
        counts = now == epoch
        found = {name: classes[name] + jnp.where(counts, sums[name], 0) for name in sums}
        radii = epsilon * dafa_weights(dafa_similarity(found["probabilities"], found["shown"]), scale)
        return {**found, "radii": jnp.where(ends & counts, radii, classes["radii"])}

    zeros = jnp.zeros(size)
    first = {"radii": jnp.full_like(zeros, epsilon), "probabilities": jnp.zeros((size, size)), "shown": zeros}
    return Budget(lambda arrays, now: arrays["radii"], ClassStatistics(lambda: first, seen, update))


LEARNED: dict[str, Callable[..., Budget]] = {"cfa": cfa, "dafa": dafa}
"""Budgets that learn from the training, by name."""
