"""Classifier heads: pure functions of features and weights, and the modules that own the weights.

A head turns features ``f [B, D]`` into logits ``[B, K]``. The functions can be used alone::

    logits = cosine_logits(features, weight, scale=10.0, gamma=1 / 32)

and a module (``LinearHead``, ``CosineHead``) only adds the parameters and their initialisation. Weights are
``[K, D]``, one row a class, as in PyTorch. What is done to logits after training (prior adjustment) is a
function of its own, so that it is never mistaken for a part of the trained model.
"""

from collections.abc import Callable

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp

from robal_jax import losses


def linear_logits(features: chex.Array, weight: chex.Array, bias: chex.Array) -> chex.Array:
    """Fully connected classifier.

    ``z_i = <f, W_i> + b_i``

    Args:
      features: ``f [B, D]``.
      weight: ``W [K, D]``.
      bias: ``b [K]``.

    Returns:
      ``z [B, K]``.
    """
    return features @ weight.T + bias[None, :]


def cosine_logits(
    features: chex.Array, weight: chex.Array, *, scale: float = 1.0, gamma: float = 0.0, eta: float = 1.0
) -> chex.Array:
    """Scale-invariant classifier with normalised features and weights.

    ``z_i = s * <f / ||f||^eta, W_i / (gamma + ||W_i||^eta)>``

    With ``eta = 1`` and ``gamma = 0`` this is ``s`` times the cosine. ``gamma > 0`` keeps a little of the
    weight's norm, so that a class whose weight is small also gets small logits. A feature vector of norm 0
    has no direction and gives NaN; the training loop stops on it rather than hide it.

    Args:
      features: ``f [B, D]``, each of norm > 0.
      weight: ``W [K, D]``.
      scale: ``s > 0``.
      gamma: at least 0; added to the weights' norms only.
      eta: exponent on both norms.

    Returns:
      ``z [B, K]``, within ``[-s, s]`` where ``eta = 1``.

    Source: RoBal (Wu et al., CVPR 2021), scale-invariant classifier; eta and gamma as released.
    """
    feature_norm = jnp.linalg.norm(features, axis=-1, keepdims=True) ** eta
    weight_norm = gamma + jnp.linalg.norm(weight, axis=-1, keepdims=True) ** eta
    return scale * ((features / feature_norm) @ (weight / weight_norm).T)


def adjust_for_prior(logits: chex.Array, class_counts: chex.Array, *, tau: float) -> chex.Array:
    """Removes the training set's class prior from the logits of a trained model.

    ``z_i - tau * log pi_i``

    Args:
      logits: ``z [B, K]``.
      class_counts: ``n [K]``, at least 1.
      tau: strength; 0 changes nothing.

    Returns:
      ``[B, K]``.

    Source: logit adjustment (Menon et al., ICLR 2021); RoBal's tau_p.
    """
    return logits - tau * losses.log_prior(class_counts).astype(logits.dtype)[None, :]


def _uniform_fan_in(key: chex.PRNGKey, shape: tuple[int, ...], dtype: chex.ArrayDType = float) -> chex.Array:
    """U(-1/sqrt(D), 1/sqrt(D)), PyTorch's initialisation of a linear layer; ``D`` is the last axis."""
    bound = shape[-1] ** -0.5
    return jax.random.uniform(key, shape, dtype, -bound, bound)


class LinearHead(nn.Module):
    """:func:`linear_logits` with trainable weight and bias."""

    num_classes: int

    @nn.compact
    def __call__(self, features: chex.Array) -> chex.Array:
        """Features ``[B, D]`` to logits ``[B, K]``."""
        width = features.shape[-1]
        weight = self.param("weight", _uniform_fan_in, (self.num_classes, width))
        # PyTorch draws the bias from the same range as the weight, so its bound comes from D, not from K.
        bias = self.param("bias", lambda key: _uniform_fan_in(key, (self.num_classes, width))[:, 0])
        return linear_logits(features, weight, bias)


class CosineHead(nn.Module):
    """:func:`cosine_logits` with a trainable weight and no bias."""

    num_classes: int
    scale: float = 1.0
    gamma: float = 0.0
    eta: float = 1.0

    @nn.compact
    def __call__(self, features: chex.Array) -> chex.Array:
        """Features ``[B, D]`` to logits ``[B, K]``."""
        weight = self.param("weight", _uniform_fan_in, (self.num_classes, features.shape[-1]))
        return cosine_logits(features, weight, scale=self.scale, gamma=self.gamma, eta=self.eta)


HEADS: dict[str, Callable[..., nn.Module]] = {"linear": LinearHead, "cosine": CosineHead}
