"""Losses of long-tailed recognition, one value per example.

A loss is a function ``(logits [B, K], labels [B]) -> [B]``. It never reduces, so that the caller can mask,
weight or average the values. A long-tail loss also takes the number of training images per class,
``class_counts [K]``; once that is bound, it is a plain loss again::

    loss = functools.partial(robal, class_counts=counts, scale=10.0, margin=0.1, tau_m=0.3, tau_b=1.5)
    value = loss(cosines, labels).mean()

The file has three parts: losses that need no statistics of the data; losses that use what follows from the
  class counts, see ``class_terms``; and what turns a loss into another one.

``class_weights [K]`` act as in RoBal's released code. A softmax loss weights each example by its label and,
but for ``focal_softmax``, divides by the mean weight of the batch; a loss of ``K`` binary problems weights
the problems.

Every function raises ValueError for arguments of a wrong shape or type and, outside of ``jax.jit``, for
labels that are not in ``0..K-1``, class counts below 1, and scales and temperatures outside of 1e-6..1e6. The
examples assume ``import jax.numpy as jnp`` and ``from robal_jax.losses import *``.

Throughout: ``B`` batch, ``K`` classes, ``n_i`` training images of class ``i``, ``pi_i = n_i / sum_j n_j``,
``p = softmax(z)``, ``[i = y]`` 1 for the true class and 0 for all other classes.
"""

from collections.abc import Callable
from typing import TypeAlias

import chex
import jax
import jax.numpy as jnp
import optax

from robal_jax import checks
from robal_jax.class_terms import (
    effective_number_weights,
    ldam_margins,
    rebalanced_weights,
    robal_biases,
    robal_margins,
    temperatures,
)

Loss = Callable[[chex.Array, chex.Array], chex.Array]

Weights: TypeAlias = chex.Array | None


def _is_true(logits: chex.Array, labels: chex.Array) -> chex.Array:
    """``[i = y_b]`` as booleans ``[B, K]``."""
    checks.logits_and_labels(logits, labels)
    return jax.nn.one_hot(labels, logits.shape[-1], dtype=bool)


def _row(per_class: chex.Array, like: chex.Array) -> chex.Array:
    """One value per class ``[K]`` as ``[1, K]``, in the dtype of ``like``."""
    return jnp.asarray(per_class, like.dtype)[None, :]


def _by_label(per_class: chex.Array, labels: chex.Array, like: chex.Array) -> chex.Array:
    """The value of each label ``[B]``, from one value per class ``[K]``, in the dtype of ``like``."""
    return jnp.asarray(per_class, like.dtype)[labels]


def _weigh_columns(terms: chex.Array, class_weights: Weights) -> chex.Array:
    """``w_i t_bi`` of terms ``[B, K]``."""
    if class_weights is None:
        return terms
    checks.class_weights(class_weights, terms.shape[-1])
    return terms * _row(class_weights, terms)


def _check(logits: chex.Array, labels: chex.Array, class_counts: chex.Array) -> None:
    """Refuses anything but logits ``[B, K]``, labels ``[B]`` and class counts ``[K]``."""
    checks.logits_and_labels(logits, labels)
    checks.class_counts(class_counts, logits.shape[-1])


def _binary_terms(logits: chex.Array, labels: chex.Array, gamma: float = 0.0) -> chex.Array:
    """``-(1 - q_bi)^gamma log q_bi [B, K]`` of :func:`focal`, finite for any ``z``; BCE for ``gamma = 0``."""
    checks.not_negative(gamma=gamma)
    signed = jnp.where(_is_true(logits, labels), logits, -logits)
    return -jnp.exp(gamma * jax.nn.log_sigmoid(-signed)) * jax.nn.log_sigmoid(signed)


def _logsumexp_without(logits: chex.Array, left_out: chex.Array) -> chex.Array:
    """``log sum_i exp(z_bi) [B]`` over the classes that ``left_out [B, K]`` does not mark."""
    checks.at_least(2, num_classes=logits.shape[-1])
    return jax.nn.logsumexp(jnp.where(left_out, -jnp.inf, logits), axis=-1)


def _log_complement(logits: chex.Array) -> chex.Array:
    """``log(1 - p_bi) [B, K]``, exact where ``p`` is close to 1, which can only be the largest one."""
    is_top = _is_true(logits, jnp.argmax(logits, axis=-1))
    log_rest = _logsumexp_without(logits, is_top) - jax.nn.logsumexp(logits, axis=-1)
    others = jnp.where(is_top, 0.0, jax.nn.softmax(logits))
    return jnp.where(is_top, log_rest[:, None], jnp.log1p(-others))


def cross_entropy(
    logits: chex.Array, labels: chex.Array, *, class_weights: Weights = None, axis_name: str | None = None
) -> chex.Array:
    """Softmax cross entropy with integer labels.

    ``CE_b = logsumexp(z_b) - z_b[y_b]``;  ``l_b = w_{y_b} CE_b / mean_b'(w_{y_b'})``

    Args:
      logits: ``z [B, K]``, any real values.
      labels: ``y [B]``, integers in ``0..K-1``.
      class_weights: ``w [K]``, at least 0; None for the plain ``CE_b``.
      axis_name: mapped axis over which the batch is spread, if any; the mean is then over the whole batch.

    Returns:
      ``l [B]``, at least 0; its mean over the batch is ``sum_b w_{y_b} CE_b / sum_b w_{y_b}``, and 0 if all
      these weights are.

    Example:
      >>> logits, labels = jnp.log(jnp.array([[3.0, 1.0], [1.0, 1.0]])), jnp.array([0, 1])
      >>> loss = cross_entropy(logits, labels)
      >>> print(jnp.array_str(loss, precision=4))  # log 4/3, log 2
      [0.2877 0.6931]
      >>> loss = cross_entropy(logits, labels, class_weights=jnp.array([1.0, 3.0]))
      >>> print(jnp.array_str(loss, precision=4))  # times 1/2, 3/2
      [0.1438 1.0397]
    """
    checks.logits_and_labels(logits, labels)
    values = optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels)
    if class_weights is None:
        return values
    checks.class_weights(class_weights, logits.shape[-1])
    weights = _by_label(class_weights, labels, values)
    mean = weights.mean()
    if axis_name is not None:
        mean = jax.lax.pmean(mean, axis_name)
    return values * weights / jnp.where(mean > 0, mean, 1.0)


def smoothed_cross_entropy(logits: chex.Array, labels: chex.Array, *, confidence: chex.Numeric) -> chex.Array:
    """Cross entropy to a label that leaves some probability to the wrong classes.

    ``t_bi = c_b [i = y_b] + (1 - c_b) / (K - 1) [i != y_b]``;  ``l_b = -sum_i t_bi log p_bi``

    Mixing two such labels of one class gives the label whose confidence is mixed in the same way.

    Args:
      logits: ``z [B, K]``.
      labels: ``y [B]``, integers in ``0..K-1``.
      confidence: ``c``, in ``[0, 1]``: one number, or one number per example ``[B]``.

    Returns:
      ``l [B]``, at least 0.

    Source: Szegedy et al., CVPR 2016; the mixed labels of Lee et al. (AVmixup), CVPR 2020.

    Example:
      >>> logits, labels = jnp.log(jnp.array([[3.0, 1.0], [1.0, 1.0]])), jnp.array([0, 1])
      >>> loss = smoothed_cross_entropy(logits, labels, confidence=0.5)
      >>> print(jnp.array_str(loss, precision=4))  # (log 4/3 + log 4) / 2, log 2
      [0.837  0.6931]
    """
    checks.logits_and_labels(logits, labels)
    checks.at_least(2, num_classes=logits.shape[-1])
    checks.fraction(confidence=confidence)
    sure = jnp.broadcast_to(jnp.asarray(confidence, logits.dtype), labels.shape)[:, None]
    unsure = (1.0 - sure) / (logits.shape[-1] - 1)
    return optax.losses.softmax_cross_entropy(logits, jnp.where(_is_true(logits, labels), sure, unsure))


def binary_cross_entropy(
    logits: chex.Array, labels: chex.Array, *, temperature: float = 1.0, class_weights: Weights = None
) -> chex.Array:
    """Binary cross entropy of one problem per class: is the image of this class or not.

    ``l_b = (T / K) sum_i w_i BCE(z_bi / T, [i = y_b])``;  ``BCE(z, 1) = -log sigmoid(z) = BCE(-z, 0)``

    Args:
      logits: ``z [B, K]``.
      labels: ``y [B]``, integers in ``0..K-1``.
      temperature: ``T > 0``.
      class_weights: ``w [K]`` of the binary problems; None for ones.

    Returns:
      ``l [B]``, at least 0.

    Example:
      >>> logits, labels = jnp.zeros((2, 2)), jnp.array([0, 1])
      >>> loss = binary_cross_entropy(logits, labels)
      >>> print(jnp.array_str(loss, precision=4))  # log 2
      [0.6931 0.6931]
      >>> loss = binary_cross_entropy(logits, labels, class_weights=jnp.array([1.0, 2.0]))
      >>> print(jnp.array_str(loss, precision=4))
      [1.0397 1.0397]
    """
    checks.logits_and_labels(logits, labels)
    checks.factor(temperature=temperature)
    terms = _binary_terms(logits / temperature, labels)
    return temperature * _weigh_columns(terms, class_weights).mean(axis=-1)


def focal(
    logits: chex.Array, labels: chex.Array, *, gamma: float = 2.0, class_weights: Weights = None
) -> chex.Array:
    """Focal loss of ``K`` binary problems: those already solved count less.

    ``l_b = -sum_i w_i (1 - q_bi)^gamma log q_bi``;  ``q_bi = sigmoid(z_bi)`` if ``i = y_b``,
    ``sigmoid(-z_bi)`` if not

    Args:
      logits: ``z [B, K]``, any real values.
      labels: ``y [B]``, integers in ``0..K-1``.
      gamma: at least 0; 0 gives the sum of the binary cross entropies.
      class_weights: ``w [K]`` of the binary problems; None for ones.

    Returns:
      ``l [B]``, at least 0.

    Source: Lin et al., ICCV 2017.

    Example:
      >>> logits, labels = jnp.zeros((2, 2)), jnp.array([0, 1])
      >>> loss = focal(logits, labels, gamma=2.0)
      >>> print(jnp.array_str(loss, precision=4))  # 2 * 1/4 * log 2
      [0.3466 0.3466]
    """
    return _weigh_columns(_binary_terms(logits, labels, gamma), class_weights).sum(axis=-1)


def focal_softmax(
    logits: chex.Array, labels: chex.Array, *, gamma: float = 2.0, class_weights: Weights = None
) -> chex.Array:
    """Focal loss of the softmax, as RoBal's released code writes it.

    ``CE'_b = w_{y_b} CE_b``;  ``l_b = 1/2 (1 - exp(-CE'_b))^gamma CE'_b``

    Args:
      logits: ``z [B, K]``.
      labels: ``y [B]``, integers in ``0..K-1``.
      gamma: 0, or at least 1.
      class_weights: ``w [K]``; None for ones. They are not divided by their mean.

    Returns:
      ``l [B]``, at least 0.

    Raises:
      ValueError: gamma is in another range.

    Source: Lin et al., ICCV 2017.

    Example:
      >>> logits, labels = jnp.log(jnp.array([[3.0, 1.0], [1.0, 1.0]])), jnp.array([0, 1])
      >>> loss = focal_softmax(logits, labels)
      >>> print(jnp.array_str(loss, precision=4))  # 1/2 * (1/4)^2 * log 4/3, 1/2 * (1/2)^2 * log 2
      [0.009  0.0866]
    """
    checks.not_negative(gamma=gamma)
    if not isinstance(gamma, jax.core.Tracer) and 0 < gamma < 1:  # its gradient is infinite at a loss of 0
        raise ValueError(f"gamma is {gamma:g}; it must be 0, or at least 1")
    values = cross_entropy(logits, labels)
    if class_weights is not None:
        checks.class_weights(class_weights, logits.shape[-1])
        values = values * _by_label(class_weights, labels, values)
    return 0.5 * (-jnp.expm1(-values)) ** gamma * values


def soft_logit_margin(logits: chex.Array, labels: chex.Array) -> chex.Array:
    """Log-sum-exp of the wrong logits minus the true one, a smooth bound of their largest lead.

    ``l_b = log sum_{i != y_b} exp(z_bi) - z_b[y_b]``

    Args:
      logits: ``z [B, K]``.
      labels: ``y [B]``, integers in ``0..K-1``.

    Returns:
      ``l [B]``, of any sign; ``CE_b = log(1 + exp(l_b))``.

    Source: Ding et al. (MMA training), ICLR 2020.

    Example:
      >>> logits, labels = jnp.log(jnp.array([[4.0, 1.0, 1.0], [4.0, 1.0, 1.0]])), jnp.array([0, 1])
      >>> loss = soft_logit_margin(logits, labels)
      >>> print(jnp.array_str(loss, precision=4))  # log 2/4, log 5/1
      [-0.6931  1.6094]
    """
    is_true = _is_true(logits, labels)
    return _logsumexp_without(logits, is_true) - jnp.sum(jnp.where(is_true, logits, 0.0), axis=-1)


def boosted_cross_entropy(logits: chex.Array, labels: chex.Array) -> chex.Array:
    """Cross entropy with a second term that pushes down the most likely wrong class.

    ``l_b = -log p_b[y_b] - log(1 - max_{i != y_b} p_bi)``

    Args:
      logits: ``z [B, K]``, any real values.
      labels: ``y [B]``, integers in ``0..K-1``.

    Returns:
      ``l [B]``, at least 0.

    Source: MART (Wang et al., ICLR 2020).

    Example:
      >>> logits, labels = jnp.log(jnp.array([[2.0, 1.0, 1.0], [2.0, 1.0, 1.0]])), jnp.array([0, 1])
      >>> loss = boosted_cross_entropy(logits, labels)
      >>> print(jnp.array_str(loss, precision=4))  # log 2 + log 4/3, log 4 + log 2
      [0.9808 2.0794]
    """
    log_complement = jnp.where(_is_true(logits, labels), jnp.inf, _log_complement(logits))
    return cross_entropy(logits, labels) - log_complement.min(axis=-1)


def kl_divergence(logits: chex.Array, other_logits: chex.Array) -> chex.Array:
    """Kullback-Leibler divergence of two predictions, differentiable in both.

    ``p = softmax(z), q = softmax(z')``;  ``KL_b = sum_i p_bi * (log p_bi - log q_bi)``

    It is computed from the logits, so that it is finite where ``q`` underflows. (RoBal's released code adds
    1e-12 to ``q`` instead, which makes no difference to the cosines of a head of scale 1.)

    Args:
      logits: ``z [B, K]``.
      other_logits: ``z' [B, K]``.

    Returns:
      ``KL [B]``, at least 0.

    Source: TRADES (Zhang et al., ICML 2019).

    Example:
      >>> logits, other_logits = jnp.log(jnp.array([[3.0, 1.0]])), jnp.zeros((1, 2))
      >>> divergence = kl_divergence(logits, other_logits)
      >>> print(jnp.array_str(divergence, precision=4))  # 3/4 log 3/2 + 1/4 log 1/2
      [0.1308]
    """
    checks.float_logits(logits=logits, other_logits=other_logits)
    log_p, log_q = jax.nn.log_softmax(logits), jax.nn.log_softmax(other_logits)
    return jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)


def squared_error(logits: chex.Array, other_logits: chex.Array) -> chex.Array:
    """Squared Euclidean distance of two predictions, differentiable in both.

    ``l_b = sum_i (p_bi - q_bi)^2``;  ``p = softmax(z), q = softmax(z')``

    Args:
      logits: ``z [B, K]``.
      other_logits: ``z' [B, K]``.

    Returns:
      ``l [B]``, in [0, 2].

    Source: SCORE (Pang et al., ICML 2022), which takes it in place of TRADES' divergence.

    Example:
      >>> print(squared_error(jnp.log(jnp.array([[3.0, 1.0]])), jnp.zeros((1, 2))))  # 1/16 + 1/16
      [0.125]
    """
    checks.float_logits(logits=logits, other_logits=other_logits)
    return jnp.sum((jax.nn.softmax(logits) - jax.nn.softmax(other_logits)) ** 2, axis=-1)


HARL_TINY = 1e-10
"""Is added to the divisors of :func:`harl`, as in the released code."""


def harl(
    logits: chex.Array,
    labels: chex.Array,
    *,
    alpha: float = 0.1,
    beta: float = 0.1,
    gamma: float = 0.1,
    axis_name: str | None = None,
) -> chex.Array:
    """Mean, variance and shares of the classes' losses: it makes the losses of all classes small and equal.

    ``L = alpha mean_c l_c + beta mean_c (l_c - mean_k l_k)^2 + gamma sum_c (l_c / sum_k l_k)^2``

    where ``l_c`` is the mean cross entropy of the batch's images of class ``c``, and 0 if there is none. As
    released, 1e-10 is added to divisors.

    Args:
      logits: ``z [B, K]``.
      labels: ``y [B]``, integers in ``0..K-1``.
      alpha: weight of the mean.
      beta: weight of the variance.
      gamma: weight of the shares.
      axis_name: mapped axis over which the batch is spread, if any; the class means are those of the whole
        batch.

    Returns:
      ``L`` for each example, ``[B]``: it is one number for the whole batch.

    Source: hierarchical adversarially robust learning (HARL) of TAET (Wang et al., CVPR 2025) and its code.

    Example:
      >>> logits, labels = jnp.log(jnp.array([[3.0, 1.0], [1.0, 1.0]])), jnp.array([0, 1])
      >>> loss = harl(logits, labels, alpha=1.0, beta=0.0, gamma=0.0)
      >>> print(jnp.array_str(loss, precision=4))  # (log 4/3 + log 2) / 2
      [0.4904 0.4904]
    """
    own = _is_true(logits, labels).astype(logits.dtype)
    values = cross_entropy(logits, labels)
    sums, counts = jnp.matmul(values, own, precision=jax.lax.Precision.HIGHEST), own.sum(0)
    if axis_name is not None:
        sums, counts = jax.lax.psum((sums, counts), axis_name)
    of_class = sums / (counts + HARL_TINY)
    mean, shares = of_class.mean(), of_class / (of_class.sum() + HARL_TINY)
    value = alpha * mean + beta * jnp.mean((of_class - mean) ** 2) + gamma * jnp.sum(shares**2)
    return jnp.full_like(values, value)


def subtract_margins(logits: chex.Array, labels: chex.Array, margins: chex.Array) -> chex.Array:
    """Logits whose true class is made harder by its margin.

    ``z'_bi = z_bi - m_i [i = y_b]``

    Args:
      logits: ``z [B, K]``.
      labels: ``y [B]``, integers in ``0..K-1``.
      margins: ``m [K]``.

    Returns:
      ``z' [B, K]``.

    Example:
      >>> logits, labels = jnp.array([[1.0, 2.0], [1.0, 2.0]]), jnp.array([0, 1])
      >>> print(subtract_margins(logits, labels, jnp.array([0.5, 0.25])))
      [[0.5  2.  ]
       [1.   1.75]]
    """
    is_true = _is_true(logits, labels)
    checks.vector("margins", margins, logits.shape[-1])
    return jnp.where(is_true, logits - _row(margins, logits), logits)


def _balanced(values: chex.Array, labels: chex.Array, class_counts: chex.Array, beta: float) -> chex.Array:
    """``v_{y_b} l_b [B]`` of values ``l [B]``, where ``v`` are the :func:`effective_number_weights`."""
    return _by_label(effective_number_weights(class_counts, beta=beta), labels, values) * values


def class_balanced_focal(
    logits: chex.Array,
    labels: chex.Array,
    *,
    class_counts: chex.Array,
    beta: float = 0.9999,
    gamma: float = 2.0,
    alpha: float = 1.0,
    class_weights: Weights = None,
) -> chex.Array:
    """:func:`focal` times the :func:`effective_number_weights` of the label.

    ``l_b = alpha v_{y_b} focal_b``

    Args:
      logits: ``z [B, K]``.
      labels: ``y [B]``, integers in ``0..K-1``.
      class_counts: ``n [K]``, at least 1.
      beta: of the weights ``v``.
      gamma: of the focal loss.
      alpha: factor of the loss.
      class_weights: ``w [K]`` of the binary problems, besides ``v``; None for ones.

    Returns:
      ``l [B]``, at least 0.

    Source: Cui et al., CVPR 2019.

    Example:
      >>> logits, labels = jnp.zeros((2, 2)), jnp.array([0, 1])
      >>> loss = class_balanced_focal(logits, labels, class_counts=jnp.array([3, 1]), beta=0.5)
      >>> print(jnp.array_str(loss, precision=4))  # log(2) / 2 times v
      [0.2521 0.4411]
    """
    _check(logits, labels, class_counts)
    values = focal(logits, labels, gamma=gamma, class_weights=class_weights)
    return alpha * _balanced(values, labels, class_counts, beta)


def class_balanced_sigmoid(
    logits: chex.Array,
    labels: chex.Array,
    *,
    class_counts: chex.Array,
    beta: float = 0.9999,
    alpha: float = 1.0,
    class_weights: Weights = None,
) -> chex.Array:
    """:func:`binary_cross_entropy` times the :func:`effective_number_weights` of the label.

    ``l_b = alpha v_{y_b} BCE_b``

    Args:
      logits: ``z [B, K]``.
      labels: ``y [B]``, integers in ``0..K-1``.
      class_counts: ``n [K]``, at least 1.
      beta: of the weights ``v``.
      alpha: factor of the loss.
      class_weights: ``w [K]`` of the binary problems, besides ``v``; None for ones.

    Returns:
      ``l [B]``, at least 0.

    Source: Cui et al., CVPR 2019.

    Example:
      >>> logits, labels = jnp.zeros((2, 2)), jnp.array([0, 1])
      >>> loss = class_balanced_sigmoid(logits, labels, class_counts=jnp.array([3, 1]), beta=0.5)
      >>> print(jnp.array_str(loss, precision=4))  # log(2) times v
      [0.5041 0.8822]
    """
    _check(logits, labels, class_counts)
    values = binary_cross_entropy(logits, labels, class_weights=class_weights)
    return alpha * _balanced(values, labels, class_counts, beta)


def class_balanced_softmax(
    logits: chex.Array,
    labels: chex.Array,
    *,
    class_counts: chex.Array,
    beta: float = 0.9999,
    alpha: float = 1.0,
    class_weights: Weights = None,
) -> chex.Array:
    """Binary cross entropies of the softmax probabilities times :func:`effective_number_weights`.

    ``l_b = -(alpha v_{y_b} / K) sum_i w_i log(p_bi if i = y_b else 1 - p_bi)``; no logarithm is below -100

    Args:
      logits: ``z [B, K]``.
      labels: ``y [B]``, integers in ``0..K-1``.
      class_counts: ``n [K]``, at least 1.
      beta: of the weights ``v``.
      alpha: factor of the loss.
      class_weights: ``w [K]`` of the binary problems, besides ``v``; None for ones.

    Returns:
      ``l [B]``, at least 0.

    Source: Cui et al., CVPR 2019; the bound is PyTorch's.

    Example:
      >>> logits, labels = jnp.log(jnp.array([[3.0, 1.0], [1.0, 1.0]])), jnp.array([0, 1])
      >>> loss = class_balanced_softmax(logits, labels, class_counts=jnp.array([3, 1]), beta=0.5)
      >>> print(jnp.array_str(loss, precision=4))  # CE times v
      [0.2092 0.8822]
    """
    _check(logits, labels, class_counts)
    log_q = jnp.where(_is_true(logits, labels), jax.nn.log_softmax(logits), _log_complement(logits))
    values = _weigh_columns(-jnp.maximum(log_q, -100.0), class_weights).mean(axis=-1)
    return alpha * _balanced(values, labels, class_counts, beta)


def class_temperature(
    logits: chex.Array, labels: chex.Array, *, class_counts: chex.Array, tau: float = 0.3
) -> chex.Array:
    """Cross entropy of logits divided by class-dependent :func:`temperatures`.

    ``l_b = CE(z_bi / a_i, y_b)``

    Args:
      logits: ``z [B, K]``.
      labels: ``y [B]``, integers in ``0..K-1``.
      class_counts: ``n [K]``, at least 1.
      tau: strength of the temperatures ``a``.

    Returns:
      ``l [B]``, at least 0.

    Source: Ye et al. (CDT), arXiv:2001.01385.

    Example:
      >>> logits, labels = jnp.log(jnp.array([[3.0, 4.0], [3.0, 4.0]])), jnp.array([0, 1])
      >>> loss = class_temperature(logits, labels, class_counts=jnp.array([4, 1]), tau=0.5)
      >>> print(jnp.array_str(loss, precision=4))  # a = 1, 2: log 5/3, log 5/2
      [0.5108 0.9163]
    """
    _check(logits, labels, class_counts)
    return cross_entropy(logits / _row(temperatures(class_counts, tau=tau), logits), labels)


def logit_adjustment(
    logits: chex.Array, labels: chex.Array, *, class_counts: chex.Array, tau: float = 1.0
) -> chex.Array:
    """Cross entropy after the class prior is added to the logits; for ``tau = 1`` the balanced softmax.

    ``l_b = CE(z_bi + tau log pi_i, y_b)``

    Args:
      logits: ``z [B, K]``.
      labels: ``y [B]``, integers in ``0..K-1``.
      class_counts: ``n [K]``, at least 1.
      tau: strength.

    Returns:
      ``l [B]``, at least 0.

    Source: Menon et al., ICLR 2021; Ren et al. (balanced softmax), NeurIPS 2020.

    Example:
      >>> logits, labels = jnp.zeros((2, 2)), jnp.array([0, 1])
      >>> loss = logit_adjustment(logits, labels, class_counts=jnp.array([3, 1]))
      >>> print(jnp.array_str(loss, precision=4))  # log 4/3, log 4
      [0.2877 1.3863]
    """
    _check(logits, labels, class_counts)
    return cross_entropy(logits + _row(robal_biases(class_counts, tau_b=tau), logits), labels)


def rebalanced(
    logits: chex.Array,
    labels: chex.Array,
    *,
    class_counts: chex.Array,
    class_statistics: dict[str, chex.Array],
    axis_name: str | None = None,
) -> chex.Array:
    """Cross entropy with weights by how often each class was predicted for adversarial images.

    ``l_b = w_{y_b} CE_b / mean_b'(w_{y_b'})``, ``w`` the :func:`rebalanced_weights`

    It is made for the attack. If the model's logits of an image depend on this image alone, as with running
    statistics, weights do not change the direction of its gradient, and so no adversarial image.

    Args:
      logits: ``z [B, K]``.
      labels: ``y [B]``, integers in ``0..K-1``.
      class_counts: ``n [K]``, at least 1.
      class_statistics: with ``predicted [K]``, see ``class_statistics.predictions``.
      axis_name: see :func:`cross_entropy`.

    Returns:
      ``l [B]``, at least 0.

    Source: RBL of REAT (Li et al., arXiv:2307.10205).

    Example:
      >>> counts, seen = jnp.array([2, 2]), {"predicted": jnp.array([1, 2])}
      >>> loss = rebalanced(jnp.zeros((2, 2)), jnp.array([0, 1]), class_counts=counts, class_statistics=seen)
      >>> print(jnp.array_str(loss, precision=4))  # log 2 times 6/5, 4/5
      [0.8318 0.5545]
    """
    _check(logits, labels, class_counts)
    if "predicted" not in class_statistics:
        raise ValueError("class_statistics have no 'predicted'; gather the statistics 'predictions'")
    weights = rebalanced_weights(class_counts, class_statistics["predicted"])
    return cross_entropy(logits, labels, class_weights=weights, axis_name=axis_name)


def margin_adjusted_cross_entropy(
    cosines: chex.Array, labels: chex.Array, *, margins: chex.Array, biases: chex.Array, scale: float
) -> chex.Array:
    """Cross entropy after a margin on the true class and a bias on every class.

    ``l_b = CE(s * (cos_bi - m_y * [i = y_b]) + b_i, y_b)``

    Args:
      cosines: ``[B, K]``, unscaled logits of a cosine classifier, usually in ``[-1, 1]``.
      labels: ``y [B]``, integers in ``0..K-1``.
      margins: ``m [K]``.
      biases: ``b [K]``; not scaled by ``s``.
      scale: ``s > 0``.

    Returns:
      ``l [B]``.

    Source: RoBal (Wu et al., CVPR 2021), equation 8.

    Example:
      >>> cosines, labels = jnp.array([[0.5, 0.0], [0.25, 0.0]]), jnp.array([0, 1])
      >>> margins, biases = jnp.array([0.5, 0.25]), jnp.zeros(2)
      >>> loss = margin_adjusted_cross_entropy(cosines, labels, margins=margins, biases=biases, scale=2.0)
      >>> print(jnp.array_str(loss, precision=4))  # log 2, log(1 + e)
      [0.6931 1.3133]
    """
    checks.factor(scale=scale)
    adjusted = scale * subtract_margins(cosines, labels, margins)
    checks.vector("biases", biases, cosines.shape[-1])
    return cross_entropy(adjusted + _row(biases, cosines), labels)


def uniform_margin(
    cosines: chex.Array,
    labels: chex.Array,
    *,
    margin: float,
    scale: float,
    class_weights: Weights = None,
    axis_name: str | None = None,
) -> chex.Array:
    """Cross entropy of scaled cosines with the same margin for every class.

    ``l_b = CE(s * (cos_bi - m * [i = y_b]), y_b)``

    Args:
      cosines: ``[B, K]``, unscaled logits of a cosine classifier.
      labels: ``y [B]``, integers in ``0..K-1``.
      margin: ``m``.
      scale: ``s > 0``.
      class_weights: see :func:`cross_entropy`.
      axis_name: see :func:`cross_entropy`.

    Returns:
      ``l [B]``, at least 0.

    Source: Wang et al. (CosFace), CVPR 2018; in adversarial training Pang et al. (HE), NeurIPS 2020.

    Example:
      >>> cosines, labels = jnp.array([[0.5, 0.0], [0.25, 0.0]]), jnp.array([0, 1])
      >>> loss = uniform_margin(cosines, labels, margin=0.25, scale=4.0)
      >>> print(jnp.array_str(loss, precision=4))  # log(1 + 1/e), log(1 + e^2)
      [0.3133 2.1269]
    """
    checks.factor(scale=scale)
    adjusted = subtract_margins(cosines, labels, jnp.full(cosines.shape[-1], margin))
    return cross_entropy(scale * adjusted, labels, class_weights=class_weights, axis_name=axis_name)


def ldam(
    logits: chex.Array,
    labels: chex.Array,
    *,
    class_counts: chex.Array,
    scale: float = 1.0,
    max_margin: float = 0.5,
    exponent: float = 0.25,
    inverse: bool = False,
    class_weights: Weights = None,
    axis_name: str | None = None,
) -> chex.Array:
    """Label-distribution-aware margin loss: :func:`ldam_margins` on the true class.

    ``l_b = CE(s * (z_bi - m_y * [i = y_b]), y_b)``

    RoBal's released code adds inverse margins ``m_y`` to all wrong logits instead; the softmax is the same.

    Args:
      logits: ``z [B, K]``.
      labels: ``y [B]``, integers in ``0..K-1``.
      class_counts: ``n [K]``, at least 1.
      scale: ``s > 0``.
      max_margin: of the margins ``m``.
      exponent: of the margins.
      inverse: give the largest margin to the largest class instead of the smallest.
      class_weights: see :func:`cross_entropy`.
      axis_name: see :func:`cross_entropy`.

    Returns:
      ``l [B]``, at least 0.

    Source: Cao et al. (LDAM), NeurIPS 2019.

    Example:
      >>> logits, labels = jnp.array([[0.5, 0.0], [0.25, 0.0]]), jnp.array([0, 1])
      >>> loss = ldam(logits, labels, class_counts=jnp.array([16, 1]))
      >>> print(jnp.array_str(loss, precision=4))  # m = 1/4, 1/2
      [0.5759 1.1369]
    """
    _check(logits, labels, class_counts)
    checks.factor(scale=scale)
    margins = ldam_margins(class_counts, max_margin=max_margin, exponent=exponent, inverse=inverse)
    adjusted = subtract_margins(logits, labels, margins)
    return cross_entropy(scale * adjusted, labels, class_weights=class_weights, axis_name=axis_name)


def robal(
    cosines: chex.Array,
    labels: chex.Array,
    *,
    class_counts: chex.Array,
    scale: float,
    margin: float,
    tau_m: float,
    tau_b: float,
) -> chex.Array:
    """RoBal's margin-adjusted loss: :func:`robal_margins` and :func:`robal_biases` together.

    Args:
      cosines: ``[B, K]``, unscaled logits of a cosine classifier.
      labels: ``y [B]``, integers in ``0..K-1``.
      class_counts: ``n [K]``, at least 1.
      scale: ``s > 0``.
      margin: ``m_0``, the margin that every class gets.
      tau_m: strength of the class-wise margins.
      tau_b: strength of the class-wise biases.

    Returns:
      ``l [B]``.

    Source: RoBal (Wu et al., CVPR 2021), equations 8 and 9.

    Example:
      >>> cosines, labels = jnp.array([[0.2, 0.1], [0.1, 0.1]]), jnp.array([0, 1])
      >>> settings = {"scale": 10.0, "margin": 0.1, "tau_m": 0.3, "tau_b": 1.5}
      >>> loss = robal(cosines, labels, class_counts=jnp.array([4, 1]), **settings)
      >>> print(jnp.array_str(loss, precision=4))
      [0.1735 3.1244]
    """
    _check(cosines, labels, class_counts)
    return margin_adjusted_cross_entropy(
        cosines,
        labels,
        margins=robal_margins(class_counts, scale=scale, margin=margin, tau_m=tau_m),
        biases=robal_biases(class_counts, tau_b=tau_b),
        scale=scale,
    )


def deferred(
    logits: chex.Array,
    labels: chex.Array,
    *,
    base: Callable[..., chex.Array],
    class_counts: chex.Array,
    epoch: chex.Numeric,
    start: int = 40,
    beta: float = 0.9999,
    max_margin: float = 0.5,
    reweight: bool = True,
    margins: bool = True,
) -> chex.Array:
    """Applies class weights, margins or both from a given epoch on.

    ``l_b = base(z_bi - m_i [i = y_b], y_b; w)``; from epoch ``start`` on, ``w`` are
    :func:`effective_number_weights` and ``m`` :func:`ldam_margins`; before, they are ones and zeros

    Args:
      logits: ``z [B, K]``.
      labels: ``y [B]``, integers in ``0..K-1``.
      base: a loss; with ``reweight`` it must take ``class_weights``.
      class_counts: ``n [K]``, at least 1.
      epoch: the current epoch, counted from 1; may be traced.
      start: first epoch with weights and margins.
      beta: of the weights.
      max_margin: of the margins.
      reweight: defer weights (DRW); if False, ``base`` is called without ``class_weights``.
      margins: defer margins (DM).

    Returns:
      ``l [B]`` of ``base``.

    Source: Cao et al. (LDAM-DRW), NeurIPS 2019.

    Example:
      >>> logits, labels = jnp.zeros((2, 2)), jnp.array([0, 1])
      >>> loss = deferred(logits, labels, base=cross_entropy, class_counts=jnp.array([16, 1]), epoch=39)
      >>> print(jnp.array_str(loss, precision=4))
      [0.6931 0.6931]
      >>> loss = deferred(logits, labels, base=cross_entropy, class_counts=jnp.array([16, 1]), epoch=40)
      >>> print(jnp.array_str(loss, precision=4))
      [0.0972 1.8335]
    """
    _check(logits, labels, class_counts)
    started = jnp.asarray(epoch) >= start
    if margins:
        deferred_margins = jnp.where(started, ldam_margins(class_counts, max_margin=max_margin), 0.0)
        logits = subtract_margins(logits, labels, deferred_margins)
    if not reweight:
        return base(logits, labels)
    weights = effective_number_weights(class_counts, beta=beta)
    return base(logits, labels, class_weights=jnp.where(started, weights, 1.0))


def staged(
    logits: chex.Array,
    labels: chex.Array,
    *,
    first: Callable[..., chex.Array],
    then: Callable[..., chex.Array],
    start: int,
    epoch: chex.Numeric,
) -> chex.Array:
    """One loss before an epoch, and another one from it on.

    Args:
      logits: ``z [B, K]``.
      labels: ``y [B]``, integers in ``0..K-1``.
      first: a loss.
      then: a loss.
      start: first epoch of ``then``, counted from 1.
      epoch: the current one; may be traced.

    Returns:
      ``l [B]``.

    Source: the two stages of TAET (Wang et al., CVPR 2025).

    Example:
      >>> logits, labels = jnp.log(jnp.array([[3.0, 1.0]])), jnp.array([0])
      >>> for epoch in (40, 41):
      ...     loss = staged(
      ...         logits, labels, first=cross_entropy, then=soft_logit_margin, start=41, epoch=epoch
      ...     )
      ...     print(jnp.array_str(loss, precision=4))  # log 4/3, then log 1/3
      [0.2877]
      [-1.0986]
    """
    return jax.lax.cond(
        jnp.asarray(epoch) < start, lambda: first(logits, labels), lambda: then(logits, labels)
    )


def weighted_by_radius(
    logits: chex.Array,
    labels: chex.Array,
    *,
    base: Callable[..., chex.Array],
    radius_factors: chex.Array,
) -> chex.Array:
    """A loss, weighted by the radius of the image's attack.

    ``l_b = r_b base(z_b, y_b)``

    Args:
      logits: ``z [B, K]``.
      labels: ``y [B]``, integers in ``0..K-1``.
      base: a loss.
      radius_factors: ``r [B]``, radii as multiples of the common one, at least 0.

    Returns:
      ``l [B]``.

    Source: DAFA (Lee et al., ICLR 2024), whose class weights multiply the radius and the cross entropy.

    Example:
      >>> loss = weighted_by_radius(jnp.zeros((2, 2)), jnp.array([0, 1]), base=cross_entropy,
      ...                           radius_factors=jnp.array([0.5, 2.0]))
      >>> print(jnp.array_str(loss, precision=4))  # log 2 times 1/2, 2
      [0.3466 1.3863]
    """
    checks.vector("radius_factors", radius_factors, len(labels), "example")
    return radius_factors.astype(logits.dtype) * base(logits, labels)


def shared(loss: Loss, *, partners: chex.Array, share: chex.Array) -> Loss:
    """Turns a loss of one label into one of two labels per image, each with its share.

    ``share_b l(z_b, y_b) + (1 - share_b) l(z_b, partner_b)``; for the cross entropy this is the cross entropy
    to the soft label, and its gradient that of the divergence from the soft label.

    Args:
      loss: ``l``, any of one label.
      partners: the second labels ``[B]``.
      share: of the first ``[B]``, in [0, 1].

    Returns:
      A loss ``(logits [B, K], labels [B]) -> [B]``.

    Source: Yun et al., CutMix (ICCV 2019); Zhang et al., mixup (ICLR 2018).

    Example:
      >>> logits = jnp.log(jnp.array([[0.5, 0.25, 0.25]]))
      >>> both = shared(cross_entropy, partners=jnp.array([1]), share=jnp.array([0.75]))
      >>> print(jnp.array_str(both(logits, jnp.array([0])) / jnp.log(2.0), precision=3))
      [1.25]
    """
    return lambda logits, labels: share * loss(logits, labels) + (1 - share) * loss(logits, partners)


def label_smoothed(logits: chex.Array, labels: chex.Array, *, base: Loss, smoothing: float) -> chex.Array:
    """Any loss, mixed with its mean over all classes as labels: label smoothing.

    ``l_b = (1 - s) base(z_b, y_b) + (s / K) sum_i base(z_b, i)``

    The mean has the true class too (PyTorch's convention), so that a cross entropy keeps the target
    ``1 - s + s / K`` for it. Weights that ``base`` divides by their mean over the batch do not act in the
    sum, where all images have the same label.

    Classes are taken one after the other, so that time is that of ``K + 1`` losses (with a gradient, of about
    twice as many), and memory that of two. The plain cross entropy is :func:`smoothed_cross_entropy`, which
    takes the time of one.

    Args:
      logits: ``z [B, K]``.
      labels: ``y [B]``, integers in ``0..K-1``.
      base: a loss, ``(logits [B, K], labels [B]) -> [B]``.
      smoothing: ``s``, in ``[0, 1)``; 0 gives ``base``.

    Returns:
      ``l [B]``.

    Source: Szegedy et al., CVPR 2016; in adversarial training Wang et al., ICML 2023, with 0.1.

    Example:
      >>> logits, labels = jnp.log(jnp.array([[3.0, 1.0], [1.0, 1.0]])), jnp.array([0, 1])
      >>> loss = label_smoothed(logits, labels, base=cross_entropy, smoothing=0.5)
      >>> print(jnp.array_str(loss, precision=4))  # 3/4 log 4/3 + 1/4 log 4, log 2
      [0.5623 0.6931]
    """
    checks.logits_and_labels(logits, labels)
    checks.below_one(smoothing=smoothing)
    batch, classes = logits.shape
    if _is_plain_cross_entropy(base):
        return smoothed_cross_entropy(logits, labels, confidence=1 - smoothing + smoothing / classes)

    own = base(logits, labels)

    def add(total: chex.Array, label: chex.Array) -> tuple[chex.Array, None]:
        return total + base(logits, jnp.full(batch, label)), None

    # Checkpointed, so that the gradient does not keep what each of the K losses computes.
    total, _ = jax.lax.scan(jax.checkpoint(add), jnp.zeros_like(own), jnp.arange(classes))
    return (1 - smoothing) * own + smoothing / classes * total


def _is_plain_cross_entropy(loss: Callable[..., chex.Array]) -> bool:
    """Whether a loss is :func:`cross_entropy`, bound or not, without class weights."""
    function, given = getattr(loss, "func", loss), getattr(loss, "keywords", {})
    return function is cross_entropy and given.get("class_weights") is None


LOSSES: dict[str, Callable[..., chex.Array]] = {
    "cross_entropy": cross_entropy,
    "smoothed_cross_entropy": smoothed_cross_entropy,
    "binary_cross_entropy": binary_cross_entropy,
    "focal": focal,
    "focal_softmax": focal_softmax,
    "soft_logit_margin": soft_logit_margin,
    "boosted_cross_entropy": boosted_cross_entropy,
    "class_balanced_focal": class_balanced_focal,
    "class_balanced_sigmoid": class_balanced_sigmoid,
    "class_balanced_softmax": class_balanced_softmax,
    "class_temperature": class_temperature,
    "logit_adjustment": logit_adjustment,
    "uniform_margin": uniform_margin,
    "ldam": ldam,
    "robal": robal,
    "deferred": deferred,
    "harl": harl,
    "rebalanced": rebalanced,
    "staged": staged,
    "weighted_by_radius": weighted_by_radius,
}
"""Losses by name. The contract of a loss, which is checked before training: it takes ``(logits [B, K], labels
[B])`` by position, and returns one float per example, ``[B]``, neither averaged nor summed over the batch."""
