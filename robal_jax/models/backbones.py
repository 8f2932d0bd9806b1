"""Backbones: networks from images ``[B, H, W, C]`` in [0, 1] to features ``[B, D]``.

Module names follow the released PyTorch code, with ``_`` for ``.``; ``robal_jax.pytorch`` relies on them.
"""

from collections.abc import Callable
from functools import partial

import chex
import flax.linen as nn
import jax.numpy as jnp

from robal_jax.models.convolutions import Convolution, convolution
from robal_jax.models.layers import BatchNorm, Conv

Layers = tuple[tuple[int, int, int], ...]
"""Features, kernel size and stride of each convolution of a block."""


def _pooled(x: chex.Array) -> chex.Array:
    """Means of the channels ``[B, C]``, in float32 at least: bfloat16 computation ends here."""
    return x.mean((1, 2), dtype=jnp.promote_types(x.dtype, jnp.float32))


class WideBlock(nn.Module):
    """Pre-activation block of a wide ResNet: BN, ReLU, 3x3, BN, ReLU, 3x3, and the shortcut."""

    features: int
    stride: int
    activation: Callable[[chex.Array], chex.Array]
    conv: Callable[..., nn.Module]
    norm: Callable[..., nn.Module]

    @nn.compact
    def __call__(self, x: chex.Array, train: bool) -> chex.Array:
        """``[B, H, W, C]`` to ``[B, H / stride, W / stride, features]``."""
        y = self.activation(self.norm(name="bn1")(x, train))
        if x.shape[-1] != self.features:
            # The projection starts from the activated input, not from x.
            x = self.conv(self.features, 1, self.stride, name="convShortcut")(y)
        y = self.conv(self.features, 3, self.stride, name="conv1")(y)
        y = self.activation(self.norm(name="bn2")(y, train))
        return x + self.conv(self.features, 3, name="conv2")(y)


class WideResNet(nn.Module):
    """WideResNet-depth-widen; features ``[B, 64 * widen]``.

    Source: Zagoruyko and Komodakis (BMVC 2016), as in RoBal's released code.

    Attributes:
      depth: ``6 n + 4`` for ``n`` blocks per stage.
      widen: width factor of the three stages of 16, 32 and 64 channels.
      activation: inside the blocks; the activation before pooling is always ReLU.
      convolution: a function of ``convolutions``.
      axis_name: see :class:`BatchNorm`.
    """

    depth: int = 34
    widen: int = 10
    activation: Callable[[chex.Array], chex.Array] = nn.relu
    convolution: Convolution = convolution
    axis_name: str | None = None

    def __post_init__(self) -> None:
        if self.depth < 10 or (self.depth - 4) % 6:
            raise ValueError(f"depth is {self.depth}; a WideResNet's must be 6 n + 4 with n at least 1")
        super().__post_init__()

    @nn.compact
    def __call__(self, x: chex.Array, train: bool) -> chex.Array:
        """Images ``[B, H, W, C]`` to features ``[B, 64 * widen]``."""
        blocks = (self.depth - 4) // 6
        conv = partial(Conv, convolution=self.convolution)
        norm = partial(BatchNorm, axis_name=self.axis_name)
        x = conv(16, name="conv1")(x)
        for stage, width in enumerate((16, 32, 64)):
            for i in range(blocks):
                stride = 2 if stage > 0 and i == 0 else 1
                x = WideBlock(
                    width * self.widen,
                    stride,
                    self.activation,
                    conv,
                    norm,
                    name=f"block{stage + 1}_layer_{i}",
                )(x, train)
        x = nn.relu(norm(name="bn1")(x, train))
        return _pooled(x)


class ResidualBlock(nn.Module):
    """Post-activation block: convolutions, each with BN, ReLU in between, the shortcut added, ReLU.

    Attributes:
      layers: features, kernel size and stride of each convolution.
      shortcut: name of the projection, if the block needs one.
      conv: a :class:`Conv`.
      norm: a :class:`BatchNorm`.
    """

    layers: Layers
    shortcut: str
    conv: Callable[..., nn.Module]
    norm: Callable[..., nn.Module]

    @nn.compact
    def __call__(self, x: chex.Array, train: bool) -> chex.Array:
        """``[B, H, W, C]`` to ``[B, H / stride, W / stride, features]``."""
        y = x
        for i, layer in enumerate(self.layers, 1):
            y = nn.relu(y) if i > 1 else y
            y = self.norm(name=f"bn{i}")(self.conv(*layer, name=f"conv{i}")(y), train)
        if x.shape != y.shape:
            features, stride = y.shape[-1], max(stride for _, _, stride in self.layers)
            x = self.conv(features, 1, stride, name=f"{self.shortcut}_0")(x)
            x = self.norm(name=f"{self.shortcut}_1")(x, train)
        return nn.relu(x + y)


def _basic(width: int, stride: int) -> Layers:
    return (width, 3, stride), (width, 3, 1)


def _bottleneck(width: int, stride: int) -> Layers:
    # The 3x3 convolution has the stride, as in torchvision's v1.5, not the first 1x1 as in the paper.
    return (width, 1, 1), (width, 3, stride), (4 * width, 1, 1)


class ResNet(nn.Module):
    """ResNet with four stages of post-activation blocks; ``ResNet18`` and ``ResNet50`` are instances of it.

    Images in [0, 1] are not standardised, so weights that were trained on standardised images do not fit.

    Source: He et al. (CVPR 2016).

    Attributes:
      blocks: number of blocks in each stage.
      block: function from the width of a stage and the stride to the layers of a block.
      shortcut: see :class:`ResidualBlock`.
      stem: 'imagenet' (7x7 of stride 2, max pooling), or 'small' for images of 32 to 64 pixels (3x3 of
        stride 1, no pooling).
      convolution: a function of ``convolutions``.
      axis_name: see :class:`BatchNorm`.
    """

    blocks: tuple[int, int, int, int]
    block: Callable[[int, int], Layers]
    shortcut: str
    stem: str = "imagenet"
    convolution: Convolution = convolution
    axis_name: str | None = None

    def __post_init__(self) -> None:
        if self.stem not in ("imagenet", "small"):
            raise ValueError(f"unknown stem {self.stem!r}; use 'imagenet' or 'small'")
        super().__post_init__()

    @nn.compact
    def __call__(self, x: chex.Array, train: bool) -> chex.Array:
        """Images ``[B, H, W, C]`` to features ``[B, D]``."""
        conv = partial(Conv, convolution=self.convolution)
        norm = partial(BatchNorm, axis_name=self.axis_name)
        large = self.stem == "imagenet"
        x = conv(64, 7, 2, name="conv1")(x) if large else conv(64, name="conv1")(x)
        x = nn.relu(norm(name="bn1")(x, train))
        if large:
            x = nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))
        for stage, (count, width) in enumerate(zip(self.blocks, (64, 128, 256, 512), strict=True)):
            for i in range(count):
                layers = self.block(width, 2 if stage > 0 and i == 0 else 1)
                name = f"layer{stage + 1}_{i}"
                x = ResidualBlock(layers, self.shortcut, conv, norm, name=name)(x, train)
        return _pooled(x)


# A config cannot change arguments that are bound by position.
ResNet18 = partial(ResNet, (2, 2, 2, 2), _basic, "shortcut", stem="small")
"""ResNet-18 in the form for CIFAR that follow-up work on RoBal uses; features ``[B, 512]``."""

ResNet50 = partial(ResNet, (3, 4, 6, 3), _bottleneck, "downsample")
"""ResNet-50 with torchvision's names; features ``[B, 2048]``."""


class SmallCNN(nn.Module):
    """Three convolutions and a linear layer for 8x8 and 28x28 images; features ``[B, width]``.

    The features are taken *before* a ReLU. On rectified features of a small network, a cosine head collapses
    to one class, because a feature vector of zeros has no direction.

    Attributes:
      channels: of the three convolutions; the second and the third halve the image.
      width: ``D``, number of features.
      convolution: a function of ``convolutions``.
      axis_name: see :class:`BatchNorm`.
    """

    channels: tuple[int, int, int] = (16, 32, 64)
    width: int = 64
    convolution: Convolution = convolution
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x: chex.Array, train: bool) -> chex.Array:
        """Images ``[B, H, W, C]`` to features ``[B, width]``."""
        for i, channels in enumerate(self.channels):
            conv = Conv(channels, 3, min(i + 1, 2), self.convolution, name=f"conv{i + 1}")
            x = nn.relu(BatchNorm(self.axis_name, name=f"bn{i + 1}")(conv(x), train))
        return nn.Dense(self.width, param_dtype=float, name="fc")(x.reshape(x.shape[0], -1))


BACKBONES: dict[str, Callable[..., nn.Module]] = {
    "wide_resnet": WideResNet,
    "resnet18": ResNet18,
    "small_cnn": SmallCNN,
    "resnet50": ResNet50,
}
"""Backbones by name. The contract of a backbone, which is checked before training if it is your own:

- It is a ``flax.linen`` module; ``module(images [B, H, W, C], train)``, both by position, returns float
  features ``[B, D]``. A network that ends with maps ``[B, H, W, C]`` takes their mean or flattens them.
- It draws nothing at random (no ``nn.Dropout``), so that an image's outcome is a function of the image.
- Parameters are in the collection ``params``, running values in ``batch_stats``; there is no other.
- A training pass leaves the float *moments of its batch* in ``batch_stats``, as ``models.BatchNorm`` does,
  and not new running values, as flax's own ``nn.BatchNorm`` does: ``update_statistics`` folds moments of the
  names in ``FOLDS`` into the running values. A pass that leaves a running value as it is keeps it.
"""
