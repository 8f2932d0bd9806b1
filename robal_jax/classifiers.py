"""Classifier heads: pure functions of features and weights, and the modules that own the weights.

A head turns features ``f [B, D]`` into logits ``[B, K]``. The functions can be used alone::

    logits = cosine_logits(features, weight, scale=10.0, gamma=1 / 32)

A module (``LinearHead``, ``CosineHead``, ...) only adds the parameters and their initialisation. Weights are
``[K, D]``, one row per class, as in PyTorch. Heads with the same parameters are interchangeable, so that a
method for inference (tau-norm, class-dependent temperature, removal of the moving direction) is another head
for the same checkpoint. A method that changes only the logits (prior adjustment) is a function of its own.

Like a backbone, a head is called with ``train``, because two of the methods differ between training and test.

Every function and head raises ValueError for arguments of a wrong shape, and for scales and temperatures
outside of 1e-6..1e6. The examples assume
``import jax.numpy as jnp`` and ``from robal_jax.classifiers import *``.
"""

from collections.abc import Callable

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp

from robal_jax import checks, class_terms


def linear_logits(features: chex.Array, weight: chex.Array, bias: chex.Array) -> chex.Array:
    """Fully connected classifier.

    ``z_i = <f, W_i> + b_i``

    Args:
      features: ``f [B, D]``.
      weight: ``W [K, D]``.
      bias: ``b [K]``.

    Returns:
      ``z [B, K]``.

    Example:
      >>> features, weight = jnp.array([[1.0, 2.0]]), jnp.array([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
      >>> print(linear_logits(features, weight, bias=jnp.array([0.5, 0.0, 0.0])))
      [[1.5 2.  3. ]]
    """
    checks.features_and_weight(features, weight)
    checks.vector("bias", bias, len(weight))
    return features @ weight.T + bias[None, :]


def cosine_logits(
    features: chex.Array, weight: chex.Array, *, scale: float = 1.0, gamma: float = 0.0, eta: float = 1.0
) -> chex.Array:
    """Scale-invariant classifier with normalised features and weights.

    ``z_i = s * <f / ||f||^eta, W_i / (gamma + ||W_i||^eta)>``

    With ``eta = 1`` and ``gamma = 0`` this is ``s`` times the cosine. ``gamma > 0`` keeps a little of the
    weight's norm, so that a class whose weight is small also gets small logits. A feature vector of norm 0
    has no direction and gives NaN, which stops training.

    Args:
      features: ``f [B, D]``, each of norm > 0.
      weight: ``W [K, D]``.
      scale: ``s > 0``.
      gamma: at least 0; added to the weights' norms only.
      eta: exponent of both norms.

    Returns:
      ``z [B, K]``, within ``[-s, s]`` where ``eta = 1``.

    Source: RoBal (Wu et al., CVPR 2021), scale-invariant classifier; eta and gamma as released.

    Example:
      >>> features, weight = jnp.array([[3.0, 4.0]]), jnp.array([[1.0, 0.0], [0.0, 2.0]])
      >>> logits = cosine_logits(features, weight, scale=10.0)
      >>> print(jnp.array_str(logits, precision=4))  # cosines 0.6 and 0.8
      [[6. 8.]]
      >>> logits = cosine_logits(features, weight, scale=10.0, gamma=1.0)
      >>> print(jnp.array_str(logits, precision=4))  # times 1/2 and 2/3
      [[3.     5.3333]]
    """
    checks.features_and_weight(features, weight)
    checks.factor(scale=scale)
    checks.not_negative(gamma=gamma)
    return scale * (unit_features(features, eta) @ _weight_rows(weight, gamma, eta).T)


def unit_features(features: chex.Array, eta: float = 1.0) -> chex.Array:
    """Normalised features, ``f / ||f||^eta``.

    Args:
      features: ``f [B, D]``, each of norm > 0.
      eta: exponent of the norm.

    Returns:
      ``[B, D]``.

    Example:
      >>> unit = unit_features(jnp.array([[3.0, 4.0]]))
      >>> print(jnp.array_str(unit, precision=4))
      [[0.6 0.8]]
    """
    checks.features_and_weight(features)
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
    """Linear classifier with normalised weight vectors: tau-norm, and learnable weight scaling.

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

    Example:
      >>> features, weight = jnp.array([[1.0, 2.0]]), jnp.array([[3.0, 4.0], [0.0, 2.0]])
      >>> print(jnp.array_str(tau_norm_logits(features, weight), precision=4))  # 11/5, 4/2
      [[2.2 2. ]]
    """
    checks.features_and_weight(features, weight)
    checks.factor(temperature=temperature)
    if class_scale is not None:
        checks.vector("class_scale", class_scale, len(weight))
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
      direction: ``d [D]``, the moving sum of mean unit features, of norm up to 10. While it is still 0,
        there is nothing to remove (the released code gives NaN).
      scale: ``s > 0``.
      gamma: at least 0.
      alpha: how much is removed; 0 is :func:`cosine_logits`.

    Returns:
      ``z [B, K]``.

    Source: TDE (Tang et al., NeurIPS 2020), in the single-head form of RoBal's released code.

    Example:
      >>> features, weight, direction = jnp.array([[3.0, 4.0]]), jnp.eye(2), jnp.array([1.0, 0.0])
      >>> logits = tde_logits(features, weight, direction, scale=10.0, gamma=0.0, alpha=0.5)
      >>> print(jnp.array_str(logits, precision=4))  # (0.6, 0.8) - 0.5 * 0.6 * (1, 0), times 10
      [[3. 8.]]
    """
    checks.features_and_weight(features, weight)
    checks.factor(scale=scale)
    checks.not_negative(gamma=gamma)
    checks.vector("direction", direction, features.shape[-1], per="feature")
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

    Example:
      >>> logits, class_counts = jnp.zeros((1, 2)), jnp.array([3, 1])
      >>> adjusted = adjust_for_prior(logits, class_counts, tau=1.0)
      >>> print(jnp.array_str(adjusted, precision=4))  # log 4/3, log 4
      [[0.2877 1.3863]]
    """
    checks.float_logits(logits=logits)
    checks.class_counts(class_counts, logits.shape[-1])
    return logits - tau * class_terms.log_prior(class_counts).astype(logits.dtype)[None, :]


def divide_by_counts(logits: chex.Array, class_counts: chex.Array, *, tau: float) -> chex.Array:
    """Divides each logit of a trained model by a power of its class's count.

    ``z_i / n_i^tau``

    Args:
      logits: ``z [B, K]``.
      class_counts: ``n [K]``, at least 1.
      tau: strength; 0 changes nothing.

    Returns:
      ``[B, K]``, much smaller than ``z``, which weakens gradient attacks that depend on the scale.

    Source: CDT (Ye et al., 2020), applied after training as in RoBal's released code.

    Example:
      >>> logits, class_counts = jnp.array([[6.0, 6.0]]), jnp.array([9, 1])
      >>> adjusted = divide_by_counts(logits, class_counts, tau=0.5)
      >>> print(jnp.array_str(adjusted, precision=4))
      [[2. 6.]]
    """
    checks.float_logits(logits=logits)
    checks.class_counts(class_counts, logits.shape[-1])
    return logits / (jnp.asarray(class_counts, logits.dtype) ** tau)[None, :]


def _uniform_fan_in(key: chex.PRNGKey, shape: tuple[int, ...], dtype: chex.ArrayDType = float) -> chex.Array:
    """Draws U(-1/sqrt(D), 1/sqrt(D)), PyTorch's initialisation of a linear layer; ``D`` is the last axis."""
    bound = shape[-1] ** -0.5
    return jax.random.uniform(key, shape, dtype, -bound, bound)


def _uniform_bias(key: chex.PRNGKey, shape: tuple[int, int]) -> chex.Array:
    """Draws a bias ``[K]`` for a weight ``[K, D]``; like PyTorch from the weight's range, given by ``D``."""
    return _uniform_fan_in(key, shape)[:, 0]


def _log_odds(class_counts: chex.Array) -> chex.Array:
    """``-log((1 - pi_i) / pi_i)``, ``[K]``: with this bias a sigmoid gives each class its frequency."""
    log_prior = class_terms.log_prior(class_counts)
    return log_prior - jnp.log1p(-jnp.exp(log_prior))


def _weight_shape(features: chex.Array, num_classes: int) -> tuple[int, int]:
    """Returns the shape of a head's weight, ``(K, D)``, for features ``[B, D]``."""
    checks.features_and_weight(features)
    checks.at_least(2, num_classes=num_classes)
    return num_classes, features.shape[-1]


BIASES = ("trained", "prior", "frozen", "none")


class LinearHead(nn.Module):
    """:func:`linear_logits` with a trainable weight.

    Attributes:
      num_classes: ``K``.
      class_counts: ``n [K]``; needed for ``bias='prior'``.
      bias: 'trained'; 'prior': trained, with the initial value ``-log((1 - pi) / pi)``, for the sigmoid focal
        loss; 'frozen': stays at its random initial value, as in the released "FC without bias"; 'none'.

    Example:
      >>> head = LinearHead(num_classes=2)
      >>> params = {"weight": jnp.eye(2), "bias": jnp.array([0.5, 0.0])}
      >>> print(head.apply({"params": params}, jnp.array([[1.0, 2.0]]), train=False))
      [[1.5 2. ]]
    """

    num_classes: int
    class_counts: tuple[float, ...] = ()
    bias: str = "trained"

    def __post_init__(self) -> None:
        if self.bias not in BIASES:
            raise ValueError(f"unknown bias {self.bias!r}; use one of {', '.join(BIASES)}")
        super().__post_init__()

    @nn.compact
    def __call__(self, features: chex.Array, train: bool) -> chex.Array:
        """Computes logits ``[B, K]`` from features ``[B, D]``."""
        shape = _weight_shape(features, self.num_classes)
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
            checks.class_counts(self.class_counts, self.num_classes)
            bias = self.param("bias", lambda _: _log_odds(jnp.array(self.class_counts)))
        else:
            bias = self.param("bias", _uniform_bias, shape)
        return linear_logits(features, weight, bias)


class TemperatureHead(LinearHead):
    """:class:`LinearHead` with class-dependent temperatures (CDT).

    Attributes:
      tau: strength.
      posthoc: divide by ``n_i^tau`` in every pass, a method for a model that was trained without it. If
        False, divide by ``(n_max / n_i)^tau`` in training passes only.

    Example:
      >>> head = TemperatureHead(num_classes=2, class_counts=(4, 1), bias="none", tau=0.5)
      >>> variables, features = {"params": {"weight": jnp.eye(2)}}, jnp.array([[2.0, 2.0]])
      >>> print(jnp.array_str(head.apply(variables, features, train=True), precision=4))
      [[2. 1.]]
      >>> print(head.apply(variables, features, train=False))
      [[2. 2.]]
    """

    tau: float = 0.3
    posthoc: bool = False

    @nn.compact
    def __call__(self, features: chex.Array, train: bool) -> chex.Array:
        """Computes logits ``[B, K]`` from features ``[B, D]``."""
        checks.class_counts(self.class_counts, self.num_classes)
        logits = super().__call__(features, train)
        counts = jnp.array(self.class_counts)
        if self.posthoc:
            return divide_by_counts(logits, counts, tau=self.tau)
        if train:
            return logits / class_terms.temperatures(counts, tau=self.tau).astype(logits.dtype)[None, :]
        return logits


class CosineHead(nn.Module):
    """:func:`cosine_logits` with a trainable weight and no bias.

    Attributes:
      num_classes: ``K``.
      scale: of the logits.
      gamma: added to the weights' norms.
      eta: exponent of both norms.

    Example:
      >>> head = CosineHead(num_classes=2, scale=10.0)
      >>> params = {"weight": jnp.array([[1.0, 0.0], [0.0, 2.0]])}
      >>> logits = head.apply({"params": params}, jnp.array([[3.0, 4.0]]), train=False)
      >>> print(jnp.array_str(logits, precision=4))
      [[6. 8.]]
    """

    num_classes: int
    scale: float = 1.0
    gamma: float = 0.0
    eta: float = 1.0

    @nn.compact
    def __call__(self, features: chex.Array, train: bool) -> chex.Array:
        """Computes logits ``[B, K]`` from features ``[B, D]``."""
        weight = self.param("weight", _uniform_fan_in, _weight_shape(features, self.num_classes))
        return cosine_logits(features, weight, scale=self.scale, gamma=self.gamma, eta=self.eta)


class TauNormHead(nn.Module):
    """:func:`tau_norm_logits` with the parameters of a :class:`LinearHead`, whose bias it ignores by default.

    Attributes:
      num_classes: ``K``.
      tau: exponent of the weights' norms.
      temperature: divides the logits.
      use_bias: add the trained bias, also divided by the temperature.
      learn_scale: one trainable scale per class, initially 1: learnable weight scaling (LWS).
      unit_features: normalise the features as well.

    Example:
      >>> head = TauNormHead(num_classes=2)
      >>> params = {"weight": jnp.array([[3.0, 4.0], [0.0, 2.0]]), "bias": jnp.ones(2)}
      >>> logits = head.apply({"params": params}, jnp.array([[1.0, 2.0]]), train=False)
      >>> print(jnp.array_str(logits, precision=4))
      [[2.2 2. ]]
    """

    num_classes: int
    tau: float = 1.0
    temperature: float = 1.0
    use_bias: bool = False
    learn_scale: bool = False
    unit_features: bool = False

    @nn.compact
    def __call__(self, features: chex.Array, train: bool) -> chex.Array:
        """Computes logits ``[B, K]`` from features ``[B, D]``."""
        shape = _weight_shape(features, self.num_classes)
        weight, bias = self.param("weight", _uniform_fan_in, shape), self.param("bias", _uniform_bias, shape)
        scale = self.param("class_scale", nn.initializers.ones, shape[:1]) if self.learn_scale else None
        features = unit_features(features) if self.unit_features else features
        logits = tau_norm_logits(
            features, weight, tau=self.tau, temperature=self.temperature, class_scale=scale
        )
        return logits + (bias / self.temperature)[None, :] if self.use_bias else logits


class TDEHead(nn.Module):
    """:func:`tde_logits` with a trainable weight, and the moving direction among the statistics.

    A training pass returns :func:`cosine_logits` and stores the batch's mean unit feature, which
    ``models.update_statistics`` adds to the direction. Use ``alpha = 0`` for training, and 0.1 for the
    evaluation that removes the direction. The released head also moves its direction in the passes of the
    attack and of the evaluation; this one does so in training passes only.

    Attributes:
      num_classes: ``K``.
      scale: of the logits.
      gamma: added to the weights' norms.
      alpha: how much of the direction is removed outside of training passes.
      axis_name: mapped axis over which the batch is spread, if any.

    Example:
      >>> head = TDEHead(num_classes=2, scale=10.0, gamma=0.0, alpha=0.5)
      >>> stats = {"direction": jnp.array([1.0, 0.0])}
      >>> variables = {"params": {"weight": jnp.eye(2)}, "batch_stats": stats}
      >>> logits = head.apply(variables, jnp.array([[3.0, 4.0]]), train=False)
      >>> print(jnp.array_str(logits, precision=4))
      [[3. 8.]]
    """

    num_classes: int
    scale: float = 16.0
    gamma: float = 1 / 32
    alpha: float = 0.0
    axis_name: str | None = None

    @nn.compact
    def __call__(self, features: chex.Array, train: bool) -> chex.Array:
        """Computes logits ``[B, K]`` from features ``[B, D]``."""
        shape = _weight_shape(features, self.num_classes)
        weight = self.param("weight", _uniform_fan_in, shape)
        direction = self.variable("batch_stats", "direction", jnp.zeros, shape[1:])
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
"""Heads by name. The contract of a head, which is checked before training if it is your own:
``module(features [B, D], train)`` returns float logits ``[B, K]`` for the ``num_classes`` that it receives.
The rest is that of a backbone, see ``models.BACKBONES``.
"""
