"""TODO models.layers."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from robal_jax.models.convolutions import Convolution, convolution

BATCH_NORM_MOMENTUM = 0.1  # weight of the new batch: PyTorch's convention and default

BATCH_NORM_EPSILON = 1e-5


class Conv(nn.Module):
    """Square convolution without bias; N(0, sqrt(2 / (k * k * out))) at initialisation, as released.

    It computes in the type of what it is given.
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

    Evaluation uses the running ``mean`` and ``var`` of the collection ``batch_stats``. Training uses the
    batch's own and *leaves them in* ``batch_stats`` (mutable): the batch's mean and its unbiased variance,
    for :func:`update_statistics`. The variance that normalises is the biased one, as in PyTorch.

    Attributes:
      axis_name: mapped axis over which the batch is spread, if any; the statistics are then the whole
        batch's, so that a run does not depend on the number of devices.
    """

    axis_name: str | None = None

    @nn.compact
    def __call__(self, x: chex.Array, train: bool) -> chex.Array:
        """``[..., C]`` to the same shape."""
        width, axes = x.shape[-1:], tuple(range(x.ndim - 1))
        given = x.dtype
        scale = self.param("scale", nn.initializers.ones, width)
        bias = self.param("bias", nn.initializers.zeros, width)
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, width)
        running_var = self.variable("batch_stats", "var", jnp.ones, width)
        x = x.astype(jnp.promote_types(given, scale.dtype))  # statistics are never bfloat16
        mean, var = running_mean.value, running_var.value
        if train and not self.is_initializing():
            mean, count = x.mean(axes), x.size // x.shape[-1]
            if self.axis_name is not None:
                mean, count = lax.pmean(mean, self.axis_name), count * lax.axis_size(self.axis_name)
            var = jnp.square(x - last_axis(mean, x)).mean(axes)
            if self.axis_name is not None:
                var = lax.pmean(var, self.axis_name)
            running_mean.value, running_var.value = mean, var * (count / (count - 1))
        factor = lax.rsqrt(var + BATCH_NORM_EPSILON) * scale
        return ((x - last_axis(mean, x)) * last_axis(factor, x) + last_axis(bias, x)).astype(given)


def last_axis(vector: chex.Array, like: chex.Array) -> chex.Array:
    """``[C]`` with leading axes of size 1, to go with ``[..., C]``."""
    return vector.reshape((1,) * (like.ndim - 1) + vector.shape)


# How a training pass's moment m changes the running value r, by the name of the array: r <- a * r + b * m.
FOLDS = {
    "mean": (1.0 - BATCH_NORM_MOMENTUM, BATCH_NORM_MOMENTUM),
    "var": (1.0 - BATCH_NORM_MOMENTUM, BATCH_NORM_MOMENTUM),
    "direction": (0.9, 1.0),  # TDE's: a sum that forgets, not a mean; released
    "bias": (1.0, 0.0),  # frozen
}


def update_statistics(stats: chex.ArrayTree, moments: tuple[chex.ArrayTree, ...]) -> chex.ArrayTree:
    """Running statistics after several training passes, in their order.

    ``r <- a * r + b * m`` for each ``m`` in ``moments``; (a, b) is (0.9, 0.1) for batch norm, see ``FOLDS``

    Args:
      stats: running means and variances ``r``, and what a head keeps there.
      moments: what each training pass left: batch means and unbiased variances. A pass may stand in it
        more than once: the released RoBal step runs four passes of which only two are distinct.

    Returns:
      The new running statistics.
    """

    def fold(path: tuple[jax.tree_util.DictKey, ...], r: chex.Array, m: chex.Array) -> chex.Array:
        keep, new = FOLDS[path[-1].key]
        return keep * r + new * m

    for moment in moments:
        stats = jax.tree_util.tree_map_with_path(fold, stats, moment)
    return stats
