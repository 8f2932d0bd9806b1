"""Classifier heads: pure functions of features and weights, and the modules that own the weights.

A head turns features ``f [B, D]`` into logits ``[B, K]``. The functions can be used alone::

    logits = cosine_logits(features, weight, scale=10.0, gamma=1 / 32)

and a module (``LinearHead``, ``CosineHead``, ...) only adds the parameters and their initialisation. Weights
are ``[K, D]``, one row a class, as in PyTorch. Heads with the same parameters can stand in for each other, so
an inference-time method (tau-norm, class-dependent temperature, removal of the moving direction) is another
head over the same checkpoint. What is done to logits alone (prior adjustment) is a function of its own.

A head is called with ``train`` as a backbone is: two of the methods differ between training and test.
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
    return scale * (unit_features(features, eta) @ _weight_rows(weight, gamma, eta).T)


def unit_features(features: chex.Array, eta: float = 1.0) -> chex.Array:
    """``f / ||f||^eta``: features ``[B, D]`` to ``[B, D]``."""
    return features / jnp.linalg.norm(features, axis=-1, keepdims=True) ** eta


def _weight_rows(weight: chex.Array, gamma: float, eta: float = 1.0) -> chex.Array:
    return weight / (gamma + jnp.linalg.norm(weight, axis=-1, keepdims=True) ** eta)


def tau_norm_logits(
    features: chex.Array,
    weight: chex.Array,
    *,
    tau: float = 1.0,
    temperature: float = 1.0,
    class_scale: chex.Array | None = None,
) -> chex.Array:
    """Linear classifier whose weight vectors are normalised: tau-norm, and learnable weight scaling.

    ``z_i = s_i * <f, W_i / ||W_i||^tau> / T``

    No gradient flows through the norm, as released.

    Args:
      features: ``f [B, D]``.
      weight: ``W [K, D]``.
      tau: 0 leaves the weights as they are, 1 makes them unit vectors.
      temperature: ``T > 0``.
      class_scale: ``s [K]``; ones if None.

    Returns:
      ``z [B, K]``.

    Source: Kang et al. (ICLR 2020): tau-normalised classifier, and LWS with a trained ``s``.
    """
    norm = jax.lax.stop_gradient(jnp.linalg.norm(weight, axis=-1, keepdims=True))
    logits = (features @ (weight / norm**tau).T) / temperature
    return logits if class_scale is None else logits * class_scale[None, :]


def tde_logits(
    features: chex.Array,
    weight: chex.Array,
    direction: chex.Array,
    *,
    scale: float,
    gamma: float,
    alpha: float,
) -> chex.Array:
    """Scale-invariant classifier without the part of the features along the data's mean direction.

    ``z_i = s * <f / ||f|| - alpha * cos(f, d) * d, W_i / (gamma + ||W_i||)>``

    Args:
      features: ``f [B, D]``, each of norm > 0.
      weight: ``W [K, D]``.
      direction: ``d [D]``, the moving sum of mean unit features, of norm up to 10; where it is still 0
        there is nothing to remove (the released code gives NaN).
      scale: ``s > 0``.
      gamma: at least 0.
      alpha: how much is removed; 0 is :func:`cosine_logits`.

    Returns:
      ``z [B, K]``.

    Source: TDE (Tang et al., NeurIPS 2020), in the form without heads of RoBal's released code.
    """
    unit, size = unit_features(features), jnp.linalg.norm(direction)
    cosine = unit @ direction / jnp.where(size > 0, size, 1.0)
    return scale * ((unit - alpha * cosine[:, None] * direction[None, :]) @ _weight_rows(weight, gamma).T)


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


def divide_by_counts(logits: chex.Array, class_counts: chex.Array, *, tau: float) -> chex.Array:
    """Re-scales the logits of a trained model by class: larger classes get smaller ones.

    ``z_i / n_i^tau``

    Args:
      logits: ``z [B, K]``.
      class_counts: ``n [K]``, at least 1.
      tau: strength; 0 changes nothing.

    Returns:
      ``[B, K]``, much smaller than ``z``: gradient attacks that depend on the scale get weaker by it.

    Source: CDT (Ye et al., 2020), applied after training as in RoBal's released code.
    """
    return logits / (jnp.asarray(class_counts, logits.dtype) ** tau)[None, :]


def _uniform_fan_in(key: chex.PRNGKey, shape: tuple[int, ...], dtype: chex.ArrayDType = float) -> chex.Array:
    """U(-1/sqrt(D), 1/sqrt(D)), PyTorch's initialisation of a linear layer; ``D`` is the last axis."""
    bound = shape[-1] ** -0.5
    return jax.random.uniform(key, shape, dtype, -bound, bound)


def _uniform_bias(key: chex.PRNGKey, shape: tuple[int, int]) -> chex.Array:
    """``[K]`` for a weight ``[K, D]``: PyTorch draws the bias from the weight's range, D's."""
    return _uniform_fan_in(key, shape)[:, 0]


def _log_odds(class_counts: chex.Array) -> chex.Array:
    """``-log((1 - pi_i) / pi_i)``, ``[K]``: at this bias a sigmoid gives each class its frequency."""
    log_prior = losses.log_prior(class_counts)
    return log_prior - jnp.log1p(-jnp.exp(log_prior))


BIASES = ("trained", "prior", "frozen", "none")


class LinearHead(nn.Module):
    """:func:`linear_logits` with a trainable weight.

    Attributes:
      num_classes: K.
      class_counts: ``n [K]``; needed for ``bias='prior'``.
      bias: 'trained'; 'prior': trained, from ``-log((1 - pi) / pi)`` on, for the sigmoid focal loss;
        'frozen': stays at its random initial value, what the released "FC without bias" does; 'none'.
    """

    num_classes: int
    class_counts: tuple[int, ...] = ()
    bias: str = "trained"

    def __post_init__(self) -> None:
        if self.bias not in BIASES:
            raise ValueError(f"bias is {self.bias!r}; it must be one of {', '.join(BIASES)}")
        super().__post_init__()

    @nn.compact
    def __call__(self, features: chex.Array, train: bool) -> chex.Array:
        """Features ``[B, D]`` to logits ``[B, K]``."""
        shape = (self.num_classes, features.shape[-1])
        weight = self.param("weight", _uniform_fan_in, shape)
        if self.bias == "none":
            return features @ weight.T
        if self.bias == "frozen":
            # Among the statistics, because neither gradient nor weight decay may touch it.
            frozen = self.variable(
                "batch_stats", "bias", lambda: _uniform_bias(self.make_rng("params"), shape)
            )
            return linear_logits(features, weight, frozen.value)
        if self.bias == "prior":
            bias = self.param("bias", lambda _: _log_odds(jnp.array(self.class_counts)))
        else:
            bias = self.param("bias", _uniform_bias, shape)
        return linear_logits(features, weight, bias)


class TemperatureHead(LinearHead):
    """:class:`LinearHead` divided class by class: class-dependent temperatures (CDT).

    Attributes:
      tau: strength.
      posthoc: divide by ``n_i^tau`` always, a method for a model that was trained plainly. Otherwise divide
        by ``(n_max / n_i)^tau`` in training passes only.
    """

    tau: float = 0.3
    posthoc: bool = False

    @nn.compact
    def __call__(self, features: chex.Array, train: bool) -> chex.Array:
        """Features ``[B, D]`` to logits ``[B, K]``."""
        logits = super().__call__(features, train)
        counts = jnp.array(self.class_counts)
        if self.posthoc:
            return divide_by_counts(logits, counts, tau=self.tau)
        if train:
            return logits / losses.temperatures(counts, tau=self.tau).astype(logits.dtype)[None, :]
        return logits


class CosineHead(nn.Module):
    """:func:`cosine_logits` with a trainable weight and no bias."""

    num_classes: int
    scale: float = 1.0
    gamma: float = 0.0
    eta: float = 1.0

    @nn.compact
    def __call__(self, features: chex.Array, train: bool) -> chex.Array:
        """Features ``[B, D]`` to logits ``[B, K]``."""
        weight = self.param("weight", _uniform_fan_in, (self.num_classes, features.shape[-1]))
        return cosine_logits(features, weight, scale=self.scale, gamma=self.gamma, eta=self.eta)


class TauNormHead(nn.Module):
    """:func:`tau_norm_logits` over the parameters of a :class:`LinearHead`, whose bias it leaves out.

    Attributes:
      num_classes: K.
      tau: exponent of the weights' norms.
      temperature: divides the logits.
      use_bias: add the trained bias (divided by the temperature too) after all.
      learn_scale: one trainable scale a class, from 1 on: learnable weight scaling (LWS).
      unit_features: normalise the features as well.
    """

    num_classes: int
    tau: float = 1.0
    temperature: float = 1.0
    use_bias: bool = False
    learn_scale: bool = False
    unit_features: bool = False

    @nn.compact
    def __call__(self, features: chex.Array, train: bool) -> chex.Array:
        """Features ``[B, D]`` to logits ``[B, K]``."""
        shape = (self.num_classes, features.shape[-1])
        weight, bias = self.param("weight", _uniform_fan_in, shape), self.param("bias", _uniform_bias, shape)
        scale = self.param("class_scale", nn.initializers.ones, shape[:1]) if self.learn_scale else None
        features = unit_features(features) if self.unit_features else features
        logits = tau_norm_logits(
            features, weight, tau=self.tau, temperature=self.temperature, class_scale=scale
        )
        return logits + (bias / self.temperature)[None, :] if self.use_bias else logits


class TDEHead(nn.Module):
    """:func:`tde_logits` with a trainable weight, and the moving direction among the statistics.

    A training pass gives :func:`cosine_logits` and leaves the batch's mean unit feature, which
    ``models.update_statistics`` adds to the direction. Training wants ``alpha = 0``, the evaluation that
    removes the direction 0.1. The released head moves its direction in the attack's passes too (and where it
    evaluates); ours in training passes only.

    Attributes:
      num_classes: K.
      scale: of the logits.
      gamma: added to the weights' norms.
      alpha: how much of the direction is removed outside of training passes.
      axis_name: mapped axis over which the batch is spread, if any.
    """

    num_classes: int
    scale: float = 16.0
    gamma: float = 1 / 32
    alpha: float = 0.0
    axis_name: str | None = None

    @nn.compact
    def __call__(self, features: chex.Array, train: bool) -> chex.Array:
        """Features ``[B, D]`` to logits ``[B, K]``."""
        width = features.shape[-1]
        weight = self.param("weight", _uniform_fan_in, (self.num_classes, width))
        direction = self.variable("batch_stats", "direction", jnp.zeros, (width,))
        alpha = 0.0 if train else self.alpha
        logits = tde_logits(
            features, weight, direction.value, scale=self.scale, gamma=self.gamma, alpha=alpha
        )
        if train and not self.is_initializing():
            mean = unit_features(features).mean(0)
            direction.value = mean if self.axis_name is None else jax.lax.pmean(mean, self.axis_name)
        return logits


HEADS: dict[str, Callable[..., nn.Module]] = {
    "linear": LinearHead,
    "cosine": CosineHead,
    "class_temperature": TemperatureHead,
    "tau_norm": TauNormHead,
    "tde": TDEHead,
}
