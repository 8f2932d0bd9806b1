"""Standardisation, convolution, activations, batch normalisation, pooling, and how running values change.

Layers and heads keep running values in the collection ``batch_stats``. A training pass does not update them:
it leaves its moments in their place, and :func:`update_statistics` folds the moments into the running values,
by the name of the variable. Names with their own rule are in ``FOLDS``. A variable of any other name takes
the newest value, so a head of your own with a state needs no entry: in a training pass it reads the running
value, computes the next one and stores it. If a step makes several training passes, the last one counts.
The training step averages moments over devices and over the parts of a batch, so they must be floats.
"""

import math
from collections.abc import Callable, Sequence

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from robal_jax.errors import InputError, shown
from robal_jax.models.convolutions import Convolution, convolution

BATCH_NORM_MOMENTUM = 0.1  # weight of the new batch: PyTorch's convention and default

BATCH_NORM_EPSILON = 1e-5

Activation = Callable[[chex.Array], chex.Array]

ACTIVATIONS: dict[str, Activation] = {"relu": nn.relu, "silu": nn.silu}
"""Activations by name; 'silu' is ``x sigmoid(x)``, which DeepMind's code calls swish."""


def activation_of(kind: str | Activation) -> Activation:
    """Returns the function of an activation's name; a function is returned as it is.

    Raises:
      ValueError: the name is unknown.

    Example:
      >>> print(activation_of("silu")(jnp.array([-1.0, 0.0, 1.0])).round(4))
      [-0.2689  0.      0.7311]
    """
    if callable(kind):
        return kind
    if not isinstance(kind, str) or kind not in ACTIVATIONS:
        raise ValueError(f"unknown activation {kind!r}; use one of {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[kind]


def check_standardisation(mean: Sequence[float], std: Sequence[float]) -> None:
    """Raises a ``ValueError`` if they are not finite numbers, std > 0, of the same channels."""
    for name, numbers in (("mean", mean), ("std", std)):
        if not isinstance(numbers, Sequence) or not all(
            isinstance(x, int | float) and math.isfinite(x) and (name == "mean" or x > 0) for x in numbers
        ):
            wanted = "finite numbers" if name == "mean" else "finite numbers > 0"
            raise ValueError(f"{name} is {shown(numbers)}; give {wanted}, one per channel, or () for none")
    if mean and std and len(mean) != len(std):
        raise ValueError(f"mean has {len(mean)} numbers, std {len(std)}; give one per channel in each")


def standardised(images: chex.Array, mean: Sequence[float], std: Sequence[float]) -> chex.Array:
    """``(images - mean) / std`` per channel, inside the network: attacks still see images in [0, 1].

    It computes in float32 at least, and returns the type of the images.

    Args:
      images: ``[B, H, W, C]`` in [0, 1].
      mean: ``[C]``, or () for zeros.
      std: ``[C]``, or () for ones. If both are (), the images are returned as they are.

    Raises:
      InputError: the images have another number of channels.

    Example:
      >>> print(standardised(jnp.full((1, 1, 1, 2), 0.75), mean=(0.5, 0.25), std=(0.25, 0.125)))
      [[[[1. 4.]]]]
    """
    if not mean and not std:
        return images
    x = images.astype(jnp.promote_types(images.dtype, jnp.float32))
    for numbers in (mean, std):
        if numbers and len(numbers) != x.shape[-1]:
            raise InputError(
                f"the model's mean or std has {len(numbers)} numbers, but images have {x.shape[-1]} "
                "channels; give one number per channel"
            )
    x = x - last_axis(jnp.asarray(mean, x.dtype), x) if mean else x
    x = x / last_axis(jnp.asarray(std, x.dtype), x) if std else x
    return x.astype(images.dtype)


def pooled(x: chex.Array) -> chex.Array:
    """Means of the channels ``[B, C]``, in float32 at least: bfloat16 computation ends here."""
    return x.mean((1, 2), dtype=jnp.promote_types(x.dtype, jnp.float32))


class Conv(nn.Module):
    """Square convolution without bias, initialised as released with N(0, sqrt(2 / (k * k * out))).

    It computes in the type of its input.
    """

    features: int
    size: int = 3
    stride: int = 1
    convolution: Convolution = convolution

    @nn.compact
    def __call__(self, x: chex.Array) -> chex.Array:
        """``[B, H, W, C]`` to ``[B, H', W', features]``."""
        init = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
        kernel = self.param("kernel", init, (self.size, self.size, x.shape[-1], self.features))
        return self.convolution(x, kernel.astype(x.dtype), self.stride)


class BatchNorm(nn.Module):
    """Batch normalisation over all but the last axis, with PyTorch's statistics.

    ``y = (x - mean) / sqrt(var + 1e-5) * scale + bias``

    Evaluation uses the running ``mean`` and ``var`` of the collection ``batch_stats``. Training uses the mean
    and variance of the batch and *leaves them in* ``batch_stats`` (mutable) for :func:`update_statistics`:
    the mean and the unbiased variance. The batch is normalised with the biased variance, as in PyTorch.

    Attributes:
      axis_name: mapped axis over which the batch is spread, if any; the statistics are then those of the
        whole batch, so that a run does not depend on the number of devices.

    Raises:
      ValueError: a training batch has only one value per channel.
    """

    axis_name: str | None = None

    @nn.compact
    def __call__(self, x: chex.Array, train: bool) -> chex.Array:
        """``[..., C]`` to the same shape."""
        width, given = x.shape[-1:], x.dtype
        scale = self.param("scale", nn.initializers.ones, width)
        bias = self.param("bias", nn.initializers.zeros, width)
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, width)
        running_var = self.variable("batch_stats", "var", jnp.ones, width)
        x = x.astype(jnp.promote_types(given, scale.dtype))  # statistics are never bfloat16
        if train and not self.is_initializing():
            count = x.size // x.shape[-1]
            if self.axis_name is not None:
                count *= lax.axis_size(self.axis_name)
            if count < 2:
                raise ValueError("batch norm needs more than one value per channel; use a larger batch")
            y, mean, var = self.normalised(x, scale, bias, running_mean.value)
            running_mean.value, running_var.value = mean, var * (count / (count - 1))
            return y.astype(given)
        mean, factor = running_mean.value, batch_norm_factor(running_var.value, scale)
        if self.has_variable("batch_stats", "factor"):  # from Model.ready
            factor = self.get_variable("batch_stats", "factor")
        return ((x - last_axis(mean, x)) * last_axis(factor, x) + last_axis(bias, x)).astype(given)

    def normalised(
        self, x: chex.Array, scale: chex.Array, bias: chex.Array, near: chex.Array
    ) -> tuple[chex.Array, chex.Array, chex.Array]:
        """Returns a training batch normalised, its mean and its biased variance, in two passes over it."""
        del near
        axes = tuple(range(x.ndim - 1))
        mean = _over_devices(x.mean(axes), self.axis_name)
        var = _over_devices(jnp.square(x - last_axis(mean, x)).mean(axes), self.axis_name)
        factor = batch_norm_factor(var, scale)
        return (x - last_axis(mean, x)) * last_axis(factor, x) + last_axis(bias, x), mean, var


def batch_norm_factor(var: chex.Array, scale: chex.Array) -> chex.Array:
    """``scale / sqrt(var + 1e-5)``, ``[C]``, by which batch norm multiplies."""
    return lax.rsqrt(var + BATCH_NORM_EPSILON) * scale


def normalised_in_one_pass(
    x: chex.Array, scale: chex.Array, bias: chex.Array, near: chex.Array, axis_name: str | None = None
) -> tuple[chex.Array, chex.Array, chex.Array]:
    """Normalises a training batch with one pass over it for the statistics, and one transfer between devices.

    ``d = x - near``; ``mean = near + E[d]``; ``var = max(E[d^2] - E[d]^2, 0)``;
    ``y = d * factor + (bias - E[d] * factor)``, ``factor = scale / sqrt(var + 1e-5)``

    Its gradient needs one pass and one transfer, too: the sums of ``dy`` and of ``d dy``. This suits an
    accelerator, which waits for its memory. The rounding error of the variance grows with the squared
    distance of ``near`` from the mean, in units of the standard deviation; running means are near enough.

    Args:
      x: ``[..., C]``.
      scale: ``[C]``.
      bias: ``[C]``.
      near: ``[C]``, a guess of the mean, such as the running one; no gradient flows into it.
      axis_name: mapped axis over which the batch is spread, if any.

    Returns:
      ``y [..., C]``, the mean and the biased variance, ``[C]`` each; no gradient flows through the mean.

    Example:
      >>> x, one, zero = jnp.array([[1.0], [2.0], [6.0]]), jnp.ones(1), jnp.zeros(1)
      >>> y, mean, var = normalised_in_one_pass(x, one, zero, near=jnp.array([2.5]))
      >>> print(jnp.array_str(y.ravel(), precision=3), mean, jnp.array_str(var, precision=3))
      [-0.926 -0.463  1.389] [3.] [4.667]
    """
    near = lax.stop_gradient(near)
    apart, axes = x - last_axis(near, x), tuple(range(x.ndim - 1))
    both = jnp.stack([apart.mean(axes), jnp.square(apart).mean(axes)])
    first, second = _over_devices(both, axis_name)
    var = jnp.maximum(second - jnp.square(first), 0.0)
    factor = batch_norm_factor(var, scale)
    offset = _with_own_gradient(bias - first * factor)
    return apart * last_axis(factor, x) + last_axis(offset, x), _moved(near, lax.stop_gradient(first)), var


def _with_own_gradient(offset: chex.Array) -> chex.Array:
    """Returns the offset; for an NVIDIA GPU its gradient is computed before that of the bias.

    The bias's gradient adds those of the batches of a joint pass. Without the barrier XLA makes one sum of
    both, and so adds up ``dy`` twice.
    """
    return lax.platform_dependent(offset, cuda=lax.optimization_barrier, default=lambda x: x)


@jax.custom_batching.custom_vmap
def _moved(near: chex.Array, by: chex.Array) -> chex.Array:
    """Returns ``near + by``."""
    return near + by


@_moved.def_vmap
def _moved_apart(size: int, batched: list[bool], near: chex.Array, by: chex.Array) -> tuple[chex.Array, bool]:
    """Adds a vector to each row by itself: then XLA needs no copy of a running mean to update it in place."""
    rows = (x if is_batched else [x] * size for x, is_batched in zip((near, by), batched, strict=True))
    return jnp.stack([start + step for start, step in zip(*rows, strict=True)]), True


def _over_devices(mean: chex.Array, axis_name: str | None) -> chex.Array:
    return mean if axis_name is None else lax.pmean(mean, axis_name)


def last_axis(vector: chex.Array, like: chex.Array) -> chex.Array:
    """Vector ``[C]`` with leading axes of size 1, to broadcast against ``[..., C]``."""
    return vector.reshape((1,) * (like.ndim - 1) + vector.shape)


FOLDS = {
    "mean": (1.0 - BATCH_NORM_MOMENTUM, BATCH_NORM_MOMENTUM),
    "var": (1.0 - BATCH_NORM_MOMENTUM, BATCH_NORM_MOMENTUM),
    "direction": (0.9, 1.0),  # of the TDE head: a sum that forgets, not a mean; as released
    "bias": (1.0, 0.0),  # of the linear head: frozen, and unchanged by the rounding of an average
}
"""Factors ``(a, b)`` of a moment's update of a running value, ``r <- a r + b m``, by variable name."""


def update_statistics(
    stats: chex.ArrayTree, moments: tuple[chex.ArrayTree, ...], momentum: chex.Numeric | None = None
) -> chex.ArrayTree:
    """Running statistics after several training passes, in their order.

    ``r <- a r + b m`` for each ``m`` in ``moments``; ``(a, b)`` is (0.9, 0.1) for batch norm, see ``FOLDS``;
    ``r <- m`` for a variable that is not in ``FOLDS``

    Args:
      stats: running values ``r``: means, variances and the state of a head.
      moments: values ``m`` that each training pass left: batch means, unbiased variances and the state of a
        head. The same pass may occur more than once: the released RoBal step runs four passes, of which only
        two are distinct.
      momentum: weight of each moment of batch norm in place of 0.1, in [0, 1]; may be traced.

    Returns:
      The new running statistics.

    Raises:
      ValueError: ``moments`` is no tuple.

    Example:
      >>> stats = {"bn1": {"mean": jnp.array([1.0])}, "classifier": {"count": jnp.array(7.0)}}
      >>> moments = {"bn1": {"mean": jnp.array([2.0])}, "classifier": {"count": jnp.array(8.0)}}
      >>> new = update_statistics(stats, (moments,))
      >>> print(jnp.array_str(new["bn1"]["mean"], precision=2), new["classifier"]["count"])
      [1.1] 8.0
    """

    def fold(path: tuple[jax.tree_util.DictKey, ...], r: chex.Array, m: chex.Array) -> chex.Array:
        if path[-1].key not in FOLDS:
            return m
        if momentum is not None and path[-1].key in ("mean", "var"):
            return r + momentum * (m - r)
        keep, new = FOLDS[path[-1].key]
        return keep * r + new * m

    if not isinstance(moments, tuple | list):
        kind = type(moments).__name__
        raise ValueError(f"moments are a {kind}; pass a tuple with those of each training pass, (moments,)")
    for moment in moments:
        stats = jax.tree_util.tree_map_with_path(fold, stats, moment)
    return stats
