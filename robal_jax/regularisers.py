"""Terms that are added to a loss; each is one number for the whole batch."""

import chex
import jax
import jax.numpy as jnp

from robal_jax import checks

DIVERGENCES = ("batch", "pair")
"""Divergence of features from those of a tail image: its mean over the batch, or that of each pair."""


def tail_features(
    features: chex.Array,
    labels: chex.Array,
    *,
    class_counts: chex.Array,
    divergence: str = "batch",
    axis_name: str | None = None,
) -> chex.Array:
    """Compares the features of the tail's images with those of the whole batch: REAT's TAIL.

    ``1 / |A| sum_{i in A} mean_j s_ij (h_i + h_j) K_ij``,  ``K_ij = KL(p_i || p_j)``,  ``p_i = softmax(f_i)``

    ``A`` are the batch's images of the tail, the classes above ``2 floor(K / 3)`` in the order of falling
    count, and ``j`` runs over all images. As released, ``s_ij`` is -1 for two images of one class and 1
    otherwise. ``h_i = sqrt(sum_k n_k / n_{y_i})``. No gradient flows into ``p_i``. The term is 0 if ``A``
    is empty.

    Args:
      features: ``f [B, D]``, any real values.
      labels: ``y [B]``, integers in ``0..K-1``.
      class_counts: ``n [K]``, at least 1.
      divergence: one of ``DIVERGENCES``. 'batch' is the released code: ``K_ij`` is the mean over all images
        ``j`` and all ``D`` entries of the divergence's summands, one number per ``i``.
      axis_name: mapped axis over which the batch is spread, if any; the term is that of the whole batch.

    Returns:
      A number, of any sign.

    Raises:
      ValueError: the divergence is unknown, or an argument has a wrong shape.

    Source: TAIL of REAT (Li et al., arXiv:2307.10205) and its code.

    Example:
      >>> features, labels = jnp.log(jnp.array([[3.0, 1.0], [1.0, 1.0]])), jnp.array([0, 2])
      >>> value = tail_features(features, labels, class_counts=jnp.array([2, 1, 1]), divergence="pair")
      >>> print(f"{value:.4f}")  # no class is above 2
      0.0000
      >>> value = tail_features(features, labels + 1, class_counts=jnp.array([4, 2, 2, 1]), divergence="pair")
      >>> print(f"{value:.4f}")  # (3 + sqrt(9/2)) / 2 times log 2 / sqrt 3
      0.3683
    """
    if divergence not in DIVERGENCES:
        raise ValueError(f"divergence is {divergence!r}; use one of {', '.join(DIVERGENCES)}")
    checks.class_counts(class_counts)
    if axis_name is not None:
        features, labels = jax.lax.all_gather((features, labels), axis_name, tiled=True)
    counts = jnp.asarray(class_counts, features.dtype)
    log_p = jax.nn.log_softmax(features)
    fixed = jax.lax.stop_gradient(log_p)
    target = jnp.exp(fixed)
    products = jnp.matmul(target, log_p.T, precision=jax.lax.Precision.HIGHEST)
    pairs = jnp.sum(target * fixed, axis=-1, keepdims=True) - products
    if divergence == "batch":
        pairs = pairs.mean(axis=1, keepdims=True) / features.shape[-1]
    rarity = jnp.sqrt(counts.sum() / counts)[labels]
    signs = jnp.where(labels[:, None] == labels[None, :], -1.0, 1.0).astype(features.dtype)
    terms = jnp.mean(signs * (rarity[:, None] + rarity[None, :]) * pairs, axis=1)
    rank = jnp.argsort(jnp.argsort(-counts, stable=True))  # of a class, the most frequent one first
    anchors = rank[labels] > 2 * (len(counts) // 3)
    return jnp.sum(jnp.where(anchors, terms, 0.0)) / jnp.maximum(anchors.sum(), 1)
