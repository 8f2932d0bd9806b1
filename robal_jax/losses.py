"""Losses of long-tailed recognition, one value per example.

A loss here is a function ``(logits [B, K], labels [B]) -> [B]``: it never reduces, so the caller may mask,
weigh or average as it likes. What a long-tail loss must know of the data is the number of training images
of each class, ``class_counts [K]``; close over it and the result is a plain loss again::

    loss = functools.partial(robal, class_counts=counts, scale=10.0, margin=0.1, tau_m=0.3, tau_b=1.5)
    value = loss(cosines, labels).mean()

First come losses that know nothing of the data, then what follows from the class counts (weights, margins,
biases, temperatures), then the losses composed of both.

``class_weights [K]`` are what they are in RoBal's released code: in a softmax loss they weigh an example by
its label, in a mean over the batch that is divided by their sum; in a loss of ``K`` binary problems they
weigh the problems.

Throughout: ``B`` batch, ``K`` classes, ``n_i`` training images of class ``i``, ``pi_i = n_i / sum_j n_j``,
``p = softmax(z)``, ``[i = y]`` 1 for the true class and 0 for the others.
"""

from collections.abc import Callable
from typing import TypeAlias

import chex
import jax
import jax.numpy as jnp
import optax

from robal_jax import checks

Loss = Callable[[chex.Array, chex.Array], chex.Array]

Weights: TypeAlias = chex.Array | None


def _is_true(logits: chex.Array, labels: chex.Array) -> chex.Array:
    """``[i = y_b]`` as booleans ``[B, K]``."""
    checks.logits_and_labels(logits, labels)
    return jax.nn.one_hot(labels, logits.shape[-1], dtype=bool)


def _row(per_class: chex.Array, like: chex.Array) -> chex.Array:
    """One value per class ``[K]`` as ``[1, K]``, in the number format of ``like``."""
    return jnp.asarray(per_class, like.dtype)[None, :]


def _by_label(per_class: chex.Array, labels: chex.Array, like: chex.Array) -> chex.Array:
    """The labels' values ``[B]`` of one per class ``[K]``, in the number format of ``like``."""
    return jnp.asarray(per_class, like.dtype)[labels]


def _weigh_columns(terms: chex.Array, class_weights: Weights) -> chex.Array:
    """``w_i t_bi`` of terms ``[B, K]``."""
    return terms if class_weights is None else terms * _row(class_weights, terms)


def _binary_terms(logits: chex.Array, labels: chex.Array, gamma: float = 0.0) -> chex.Array:
    """``-(1 - q_bi)^gamma log q_bi [B, K]`` of :func:`focal`, finite for any ``z``; BCE for ``gamma = 0``."""
    signed = jnp.where(_is_true(logits, labels), logits, -logits)
    return -jnp.exp(gamma * jax.nn.log_sigmoid(-signed)) * jax.nn.log_sigmoid(signed)


def _logsumexp_without(logits: chex.Array, left_out: chex.Array) -> chex.Array:
    """``log sum_i exp(z_bi) [B]`` over the classes that ``left_out [B, K]`` does not mark."""
    return jax.nn.logsumexp(jnp.where(left_out, -jnp.inf, logits), axis=-1)


def _log_complement(logits: chex.Array) -> chex.Array:
    """``log(1 - p_bi) [B, K]``, exact where ``p`` is close to 1: that can only be the largest one."""
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
      class_weights: ``w [K]``, positive; None for the plain ``CE_b``.
      axis_name: mapped axis over which the batch is spread, if any; the mean is then the whole batch's.

    Returns:
      ``l [B]``, at least 0; its mean over the batch is ``sum_b w_{y_b} CE_b / sum_b w_{y_b}``.
    """
    checks.logits_and_labels(logits, labels)
    values = optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels)
    if class_weights is None:
        return values
    weights = _by_label(class_weights, labels, values)
    mean = weights.mean()
    if axis_name is not None:
        mean = jax.lax.pmean(mean, axis_name)
    return values * weights / mean


def smoothed_cross_entropy(logits: chex.Array, labels: chex.Array, *, confidence: chex.Numeric) -> chex.Array:
    """Cross entropy to a label that leaves some probability to the wrong classes.

    ``t_bi = c_b [i = y_b] + (1 - c_b) / (K - 1) [i != y_b]``;  ``l_b = -sum_i t_bi log p_bi``

    A mixture of two such labels of one class is the label with the mixture of their confidences.

    Args:
      logits: ``z [B, K]``.
      labels: ``y [B]``, integers in ``0..K-1``.
      confidence: ``c``, in ``[0, 1]``: one number, or one per example ``[B]``.

    Returns:
      ``l [B]``, at least 0.

    Source: Szegedy et al., CVPR 2016; the mixed labels of Lee et al. (AVmixup), CVPR 2020.
    """
    sure = jnp.broadcast_to(jnp.asarray(confidence, logits.dtype), labels.shape)[:, None]
    unsure = (1.0 - sure) / (logits.shape[-1] - 1)
    return optax.losses.softmax_cross_entropy(logits, jnp.where(_is_true(logits, labels), sure, unsure))


def binary_cross_entropy(
    logits: chex.Array, labels: chex.Array, *, temperature: float = 1.0, class_weights: Weights = None
) -> chex.Array:
    """One binary problem per class: is the image of this class or not.

    ``l_b = (T / K) sum_i w_i BCE(z_bi / T, [i = y_b])``;  ``BCE(z, 1) = -log sigmoid(z) = BCE(-z, 0)``

    Args:
      logits: ``z [B, K]``.
      labels: ``y [B]``, integers in ``0..K-1``.
      temperature: ``T > 0``.
      class_weights: ``w [K]`` of the columns; None for ones.

    Returns:
      ``l [B]``, at least 0.
    """
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
      gamma: at least 0; 0 is the sum of the binary cross entropies.
      class_weights: ``w [K]`` of the columns; None for ones.

    Returns:
      ``l [B]``, at least 0.

    Source: Lin et al., ICCV 2017.
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
      class_weights: ``w [K]``; None for ones. Not divided by their mean.

    Returns:
      ``l [B]``, at least 0.

    Source: Lin et al., ICCV 2017.
    """
    values = cross_entropy(logits, labels)
    if class_weights is not None:
        values = values * _by_label(class_weights, labels, values)
    return 0.5 * (-jnp.expm1(-values)) ** gamma * values


def soft_logit_margin(logits: chex.Array, labels: chex.Array) -> chex.Array:
    """How far the wrong logits together exceed the true one; a smooth bound of the largest one's excess.

    ``l_b = log sum_{i != y_b} exp(z_bi) - z_b[y_b]``

    Args:
      logits: ``z [B, K]``.
      labels: ``y [B]``, integers in ``0..K-1``.

    Returns:
      ``l [B]``, of any sign; ``CE_b = log(1 + exp(l_b))``.

    Source: Ding et al. (MMA training), ICLR 2020.
    """
    is_true = _is_true(logits, labels)
    return _logsumexp_without(logits, is_true) - jnp.sum(jnp.where(is_true, logits, 0.0), axis=-1)


def boosted_cross_entropy(logits: chex.Array, labels: chex.Array) -> chex.Array:
    """Cross entropy with a second term that pushes down the likeliest wrong class.

    ``l_b = -log p_b[y_b] - log(1 - max_{i != y_b} p_bi)``

    Args:
      logits: ``z [B, K]``, any real values.
      labels: ``y [B]``, integers in ``0..K-1``.

    Returns:
      ``l [B]``, at least 0.

    Source: MART (Wang et al., ICLR 2020).
    """
    log_complement = jnp.where(_is_true(logits, labels), jnp.inf, _log_complement(logits))
    return cross_entropy(logits, labels) - log_complement.min(axis=-1)


def kl_divergence(logits: chex.Array, other_logits: chex.Array) -> chex.Array:
    """Kullback-Leibler divergence of two predictions, differentiable in both.

    ``p = softmax(z), q = softmax(z')``;  ``KL_b = sum_i p_bi * (log p_bi - log q_bi)``

    From the logits, so that it is finite where ``q`` underflows. (RoBal's released code adds 1e-12 to ``q``
    instead, which the cosines of a head of scale 1 do not feel.)

    Args:
      logits: ``z [B, K]``.
      other_logits: ``z' [B, K]``.

    Returns:
      ``KL [B]``, at least 0.

    Source: TRADES (Zhang et al., ICML 2019).
    """
    log_p, log_q = jax.nn.log_softmax(logits), jax.nn.log_softmax(other_logits)
    return jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)


def log_prior(class_counts: chex.Array) -> chex.Array:
    """Logarithm of the class frequencies of the training set.

    ``log pi_i = log(n_i / sum_j n_j)``

    Args:
      class_counts: ``n [K]``, at least 1.

    Returns:
      ``log pi [K]``, at most 0.
    """
    counts = jnp.asarray(class_counts, dtype=float)
    return jnp.log(counts / counts.sum())


def effective_number_weights(class_counts: chex.Array, *, beta: float) -> chex.Array:
    """Class weights by the inverse of the effective number of images, normalised to mean 1.

    ``w_i = c (1 - beta) / (1 - beta^{n_i})``, ``c`` such that ``sum_i w_i = K``

    Args:
      class_counts: ``n [K]``, at least 1.
      beta: in ``[0, 1)``; 0 gives ones, towards 1 the weights become proportional to ``1 / n_i``.

    Returns:
      ``w [K]``.

    Source: Cui et al., CVPR 2019.
    """
    counts = jnp.asarray(class_counts, dtype=float)
    # -expm1 is 1 - beta^n without the rounding of a beta close to 1; the factor 1 - beta cancels in c.
    weights = 1.0 / -jnp.expm1(counts * jnp.log1p(beta - 1.0))
    return weights * (counts.size / weights.sum())


def temperatures(class_counts: chex.Array, *, tau: float) -> chex.Array:
    """Class-dependent temperatures: 1 for the largest class, more for smaller ones.

    ``a_i = (n_max / n_i)^tau``

    Args:
      class_counts: ``n [K]``, at least 1.
      tau: strength; 0 gives ones.

    Returns:
      ``a [K]``, at least 1 where ``tau`` is at least 0.

    Source: Ye et al. (CDT), arXiv:2001.01385.
    """
    counts = jnp.asarray(class_counts, dtype=float)
    return (counts.max() / counts) ** tau


def ldam_margins(
    class_counts: chex.Array, *, max_margin: float = 0.5, exponent: float = 0.25, inverse: bool = False
) -> chex.Array:
    """Margins of the label-distribution-aware loss: the rarest class gets the largest.

    ``m_i = m_max n_i^-g / max_j n_j^-g``;  inverse: ``m_i = m_max n_i^g / max_j n_j^g``

    Args:
      class_counts: ``n [K]``, at least 1.
      max_margin: ``m_max``, the largest margin of all classes.
      exponent: ``g``, at least 0.
      inverse: give the largest margin to the largest class instead.

    Returns:
      ``m [K]``, in units of the logit.

    Source: Cao et al. (LDAM), NeurIPS 2019.
    """
    counts = jnp.asarray(class_counts, dtype=float)
    margins = counts ** (exponent if inverse else -exponent)
    return max_margin * margins / margins.max()


def robal_margins(class_counts: chex.Array, *, scale: float, margin: float, tau_m: float) -> chex.Array:
    """Class-wise margins of RoBal's loss: larger for head classes where ``tau_m > 0``.

    ``m_i = (tau_m / s) * log(n_i / n_min) + m_0``

    Args:
      class_counts: ``n [K]``, at least 1.
      scale: ``s > 0``, the loss's own scale of the cosines.
      margin: ``m_0``, the margin that every class gets.
      tau_m: strength of the class-wise part.

    Returns:
      ``m [K]``, in units of the cosine.

    Source: RoBal (Wu et al., CVPR 2021), equation 9.
    """
    counts = jnp.asarray(class_counts, dtype=float)
    return (tau_m / scale) * jnp.log(counts / counts.min()) + margin


def robal_biases(class_counts: chex.Array, *, tau_b: float) -> chex.Array:
    """Class-wise biases of RoBal's loss: logit adjustment by the class prior.

    ``b_i = tau_b * log pi_i``

    Args:
      class_counts: ``n [K]``, at least 1.
      tau_b: strength; 1 is the balanced softmax, 0 is none.

    Returns:
      ``b [K]``, in units of the scaled logit.

    Source: RoBal (Wu et al., CVPR 2021), equation 9.
    """
    return tau_b * log_prior(class_counts)


def subtract_margins(logits: chex.Array, labels: chex.Array, margins: chex.Array) -> chex.Array:
    """Logits with the true class made harder by its margin.

    ``z'_bi = z_bi - m_i [i = y_b]``

    Args:
      logits: ``z [B, K]``.
      labels: ``y [B]``, integers in ``0..K-1``.
      margins: ``m [K]``.

    Returns:
      ``z' [B, K]``.
    """
    return jnp.where(_is_true(logits, labels), logits - _row(margins, logits), logits)


def _balanced(values: chex.Array, labels: chex.Array, class_counts: chex.Array, beta: float) -> chex.Array:
    """``v_{y_b} l_b [B]`` of values ``l [B]``, ``v`` the :func:`effective_number_weights`."""
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
    """:func:`focal`, weighed by the label's :func:`effective_number_weights`.

    ``l_b = alpha v_{y_b} focal_b``

    Args:
      logits: ``z [B, K]``.
      labels: ``y [B]``, integers in ``0..K-1``.
      class_counts: ``n [K]``, at least 1.
      beta: of the weights ``v``.
      gamma: of the focal loss.
      alpha: factor of the whole.
      class_weights: ``w [K]`` of the columns, besides ``v``; None for ones.

    Returns:
      ``l [B]``, at least 0.

    Source: Cui et al., CVPR 2019.
    """
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
    """:func:`binary_cross_entropy`, weighed by the label's :func:`effective_number_weights`.

    ``l_b = alpha v_{y_b} BCE_b``

    Args:
      logits: ``z [B, K]``.
      labels: ``y [B]``, integers in ``0..K-1``.
      class_counts: ``n [K]``, at least 1.
      beta: of the weights ``v``.
      alpha: factor of the whole.
      class_weights: ``w [K]`` of the columns, besides ``v``; None for ones.

    Returns:
      ``l [B]``, at least 0.

    Source: Cui et al., CVPR 2019.
    """
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
    """Binary cross entropies of the softmax probabilities, weighed by the effective number of the label.

    ``l_b = -(alpha v_{y_b} / K) sum_i w_i log(p_bi if i = y_b else 1 - p_bi)``, no logarithm below -100

    Args:
      logits: ``z [B, K]``.
      labels: ``y [B]``, integers in ``0..K-1``.
      class_counts: ``n [K]``, at least 1.
      beta: of the weights ``v``, :func:`effective_number_weights`.
      alpha: factor of the whole.
      class_weights: ``w [K]`` of the columns, besides ``v``; None for ones.

    Returns:
      ``l [B]``, at least 0.

    Source: Cui et al., CVPR 2019; the bound is PyTorch's.
    """
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
    """
    return cross_entropy(logits / _row(temperatures(class_counts, tau=tau), logits), labels)


def logit_adjustment(
    logits: chex.Array, labels: chex.Array, *, class_counts: chex.Array, tau: float = 1.0
) -> chex.Array:
    """Cross entropy of logits that the class prior is added to; for ``tau = 1`` the balanced softmax.

    ``l_b = CE(z_bi + tau log pi_i, y_b)``

    Args:
      logits: ``z [B, K]``.
      labels: ``y [B]``, integers in ``0..K-1``.
      class_counts: ``n [K]``, at least 1.
      tau: strength.

    Returns:
      ``l [B]``, at least 0.

    Source: Menon et al., ICLR 2021; Ren et al. (balanced softmax), NeurIPS 2020.
    """
    return cross_entropy(logits + _row(robal_biases(class_counts, tau_b=tau), logits), labels)


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
    """
    return cross_entropy(scale * subtract_margins(cosines, labels, margins) + _row(biases, cosines), labels)


def uniform_margin(
    cosines: chex.Array,
    labels: chex.Array,
    *,
    margin: float,
    scale: float,
    class_weights: Weights = None,
    axis_name: str | None = None,
) -> chex.Array:
    """Scaled cosines with the same margin for every class.

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
    """
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

    RoBal's released code adds inverse margins ``m_y`` to all wrong logits instead: the same to a softmax.

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
    """
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
    """
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
    """A loss that meets class weights, margins or both from an epoch on, and neither before.

    ``l_b = base(z_bi - m_i [i = y_b], y_b; w)``; from ``start`` on ``w`` are
    :func:`effective_number_weights` and ``m`` :func:`ldam_margins`, before it ones and zeros

    Args:
      logits: ``z [B, K]``.
      labels: ``y [B]``, integers in ``0..K-1``.
      base: a loss; with ``reweight`` it must take ``class_weights``.
      class_counts: ``n [K]``, at least 1.
      epoch: the current epoch, counted from 1; may be traced.
      start: first epoch with weights and margins.
      beta: of the weights.
      max_margin: of the margins.
      reweight: defer weights (DRW); without it ``base`` is called without ``class_weights``.
      margins: defer margins (DM).

    Returns:
      What ``base`` returns, ``l [B]``.

    Source: Cao et al. (LDAM-DRW), NeurIPS 2019.
    """
    started = jnp.asarray(epoch) >= start
    if margins:
        deferred_margins = jnp.where(started, ldam_margins(class_counts, max_margin=max_margin), 0.0)
        logits = subtract_margins(logits, labels, deferred_margins)
    if not reweight:
        return base(logits, labels)
    weights = effective_number_weights(class_counts, beta=beta)
    return base(logits, labels, class_weights=jnp.where(started, weights, 1.0))


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
}
