"""Weights, margins, biases and temperatures of the classes, from their numbers of training images.

Losses use them, and name them again. Every function raises ValueError for class counts of a wrong shape and,
outside of ``jax.jit``, below 1. Symbols are those of ``losses``; the examples assume ``import jax.numpy as
jnp`` and ``from robal_jax.class_terms import *``.
"""

import chex
import jax.numpy as jnp

from robal_jax import checks


def _counts(class_counts: chex.Array) -> chex.Array:
    """Class counts ``[K]`` as floats."""
    checks.class_counts(class_counts)
    return jnp.asarray(class_counts, dtype=float)


def log_prior(class_counts: chex.Array) -> chex.Array:
    """Logarithm of the class frequencies of the training set.

    ``log pi_i = log(n_i / sum_j n_j)``

    Args:
      class_counts: ``n [K]``, at least 1.

    Returns:
      ``log pi [K]``, at most 0.

    Example:
      >>> prior = log_prior(jnp.array([2, 1, 1]))
      >>> print(jnp.array_str(prior, precision=4))  # log 1/2, log 1/4, log 1/4
      [-0.6931 -1.3863 -1.3863]
    """
    counts = _counts(class_counts)
    return jnp.log(counts / counts.sum())


def effective_number_weights(class_counts: chex.Array, *, beta: float) -> chex.Array:
    """Class weights by the inverse of the effective number of images, normalised to mean 1.

    ``w_i = c (1 - beta) / (1 - beta^{n_i})``, ``c`` such that ``sum_i w_i = K``

    Args:
      class_counts: ``n [K]``, at least 1.
      beta: in ``[0, 1)``; 0 gives ones, and close to 1 the weights are proportional to ``1 / n_i``.

    Returns:
      ``w [K]``.

    Source: Cui et al., CVPR 2019.

    Example:
      >>> weights = effective_number_weights(jnp.array([3, 1]), beta=0.5)
      >>> print(jnp.array_str(weights, precision=4))  # 8/7 and 2, divided by their mean
      [0.7273 1.2727]
    """
    checks.below_one(beta=beta)
    counts = _counts(class_counts)
    # -expm1 is 1 - beta^n without the rounding of a beta close to 1; the factor 1 - beta cancels in c.
    weights = 1.0 / -jnp.expm1(counts * jnp.log1p(beta - 1.0))
    return weights * (counts.size / weights.sum())


def rebalanced_weights(class_counts: chex.Array, predicted: chex.Array) -> chex.Array:
    """Class weights by the inverse of an effective number of predictions, normalised to mean 1.

    ``w_i = c / (E_i + 1e-5)``,  ``E_i = (1 - beta_i^{a_i}) / (1 - beta_i)``,  ``beta_i = (n_i - 1) / n_i``,
    ``c`` such that ``sum_i w_i = K``

    A class that is never predicted has ``E_i = 0``, and so almost all of the weight.

    Args:
      class_counts: ``n [K]``, at least 1.
      predicted: ``a [K]``, how often each class was predicted, at least 0.

    Returns:
      ``w [K]``.

    Source: RBL of REAT (Li et al., arXiv:2307.10205); their code rounds ``beta`` to float32.

    Example:
      >>> weights = rebalanced_weights(jnp.array([2, 2]), jnp.array([1, 2]))
      >>> print(jnp.array_str(weights, precision=4))  # E is 1 and 3/2
      [1.2 0.8]
    """
    counts = _counts(class_counts)
    checks.vector("predicted", predicted, counts.size)
    # 1 - beta^a without the rounding of a beta close to 1; of a class of one image beta is 0, and 0^0 is 1.
    unseen = -jnp.expm1(predicted * jnp.log1p(-1.0 / jnp.where(counts > 1, counts, 2.0)))
    unseen = jnp.where(counts > 1, unseen, jnp.where(jnp.asarray(predicted) > 0, 1.0, 0.0))
    weights = 1.0 / (unseen * counts + 1e-5)
    return weights * (counts.size / weights.sum())


def temperatures(class_counts: chex.Array, *, tau: float) -> chex.Array:
    """Class-dependent temperatures: 1 for the largest class, higher for smaller ones.

    ``a_i = (n_max / n_i)^tau``

    Args:
      class_counts: ``n [K]``, at least 1.
      tau: strength; 0 gives ones.

    Returns:
      ``a [K]``, at least 1 where ``tau`` is at least 0.

    Source: Ye et al. (CDT), arXiv:2001.01385.

    Example:
      >>> print(temperatures(jnp.array([16, 4, 1]), tau=0.5).round())
      [1. 2. 4.]
    """
    counts = _counts(class_counts)
    return (counts.max() / counts) ** tau


def ldam_margins(
    class_counts: chex.Array, *, max_margin: float = 0.5, exponent: float = 0.25, inverse: bool = False
) -> chex.Array:
    """Margins of the label-distribution-aware loss: the smallest class gets the largest margin.

    ``m_i = m_max n_i^-g / max_j n_j^-g``;  inverse: ``m_i = m_max n_i^g / max_j n_j^g``

    Args:
      class_counts: ``n [K]``, at least 1.
      max_margin: ``m_max``, the largest margin of all classes.
      exponent: ``g``, at least 0.
      inverse: give the largest margin to the largest class instead.

    Returns:
      ``m [K]``, in units of the logit.

    Source: Cao et al. (LDAM), NeurIPS 2019.

    Example:
      >>> counts = jnp.array([16, 1])
      >>> print(jnp.array_str(ldam_margins(counts, max_margin=0.5), precision=4))
      [0.25 0.5 ]
      >>> print(jnp.array_str(ldam_margins(counts, max_margin=0.5, inverse=True), precision=4))
      [0.5  0.25]
    """
    counts = _counts(class_counts)
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

    Example:
      >>> margins = robal_margins(jnp.array([4, 1]), scale=10.0, margin=0.1, tau_m=0.3)
      >>> print(jnp.array_str(margins, precision=4))  # 0.03 log 4 + 0.1, 0.1
      [0.1416 0.1   ]
    """
    checks.factor(scale=scale)
    counts = _counts(class_counts)
    return (tau_m / scale) * jnp.log(counts / counts.min()) + margin


def robal_biases(class_counts: chex.Array, *, tau_b: float) -> chex.Array:
    """Class-wise biases of RoBal's loss: logit adjustment by the class prior.

    ``b_i = tau_b * log pi_i``

    Args:
      class_counts: ``n [K]``, at least 1.
      tau_b: strength; 1 is the balanced softmax, 0 gives zeros.

    Returns:
      ``b [K]``, in units of the scaled logit.

    Source: RoBal (Wu et al., CVPR 2021), equation 9.

    Example:
      >>> biases = robal_biases(jnp.array([3, 1]), tau_b=1.5)
      >>> print(jnp.array_str(biases, precision=4))  # 1.5 log 3/4, 1.5 log 1/4
      [-0.4315 -2.0794]
    """
    return tau_b * log_prior(class_counts)
