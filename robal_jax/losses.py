"""Losses of long-tailed recognition, one value per example.

A loss here is a function ``(logits [B, K], labels [B]) -> [B]``: it never reduces, so the caller may mask,
weigh or average as it likes. What a long-tail loss must know of the data is the number of training images
of each class, ``class_counts [K]``; close over it and the result is a plain loss again::

    loss = functools.partial(robal, class_counts=counts, scale=10.0, margin=0.1, tau_m=0.3, tau_b=1.5)
    value = loss(cosines, labels).mean()

RoBal's margin-adjusted loss is composed of two functions, the margins and the biases, so that each term of
its equation can be read, tested and replaced by itself.

Throughout: ``B`` batch, ``K`` classes, ``n_i`` training images of class ``i``, ``pi_i = n_i / sum_j n_j``.
"""

from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp
import optax

Loss = Callable[[chex.Array, chex.Array], chex.Array]


def cross_entropy(logits: chex.Array, labels: chex.Array) -> chex.Array:
    """Softmax cross entropy with integer labels.

    ``l_b = logsumexp(z_b) - z_b[y_b]``

    Args:
      logits: ``z [B, K]``, any real values.
      labels: ``y [B]``, integers in ``0..K-1``.

    Returns:
      ``l [B]``, at least 0.
    """
    return optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels)


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
    is_true = jax.nn.one_hot(labels, cosines.shape[-1], dtype=cosines.dtype)
    margins, biases = (jnp.asarray(x, cosines.dtype)[None, :] for x in (margins, biases))
    return cross_entropy(scale * (cosines - margins * is_true) + biases, labels)


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


def kl_divergence(logits: chex.Array, other_logits: chex.Array) -> chex.Array:
    """Kullback-Leibler divergence of two predictions, differentiable in both.

    ``p = softmax(z), q = softmax(z')``;  ``KL_b = sum_i p_bi * (log p_bi - log(q_bi + 1e-12))``

    The offset inside the logarithm is the released code's and keeps the value finite where ``q``
    underflows.

    Args:
      logits: ``z [B, K]``.
      other_logits: ``z' [B, K]``.

    Returns:
      ``KL [B]``, at least about -1e-12.

    Source: TRADES (Zhang et al., ICML 2019), as RoBal's released code writes it.
    """
    log_p = jax.nn.log_softmax(logits)
    return jnp.sum(jnp.exp(log_p) * (log_p - jnp.log(jax.nn.softmax(other_logits) + 1e-12)), axis=-1)


LOSSES: dict[str, Callable[..., chex.Array]] = {"cross_entropy": cross_entropy, "robal": robal}
