"""Backbones: networks from images ``[B, H, W, C]`` in [0, 1] to features ``[B, D]``.

Module names follow the released PyTorch code, with ``_`` for ``.``; ``robal_jax.pytorch`` relies on them.
"""

from collections.abc import Callable
from functools import partial

import chex
import flax.linen as nn
import jax.numpy as jnp

from robal_jax.models.convolutions import Convolution, convolution
from robal_jax.models.layers import BatchNorm, Conv, check_standardisation, pooled, standardised
from robal_jax.models.preactivation import DeepMindWideResNet, PreActResNet18, WideResNet

Layers = tuple[tuple[int, int, int], ...]
"""Features, kernel size and stride of each convolution of a block."""


class ResidualBlock(nn.Module):
    """Post-activation block: convolutions, each with BN, ReLU in between, the shortcut added, ReLU.

    Attributes:
      layers: features, kernel size and stride of each convolution.
      projection: name of the projection, if the block needs one.
      conv: a :class:`Conv`.
      norm: a :class:`BatchNorm`.
      shortcut: of a block that changes the shape: 'B', a 1x1 convolution and BN; 'A', every ``stride``-th
        pixel, with channels of zeros before and after.
    """

    layers: Layers
    projection: str
    conv: Callable[..., nn.Module]
    norm: Callable[..., nn.Module]
    shortcut: str = "B"

    @nn.compact
    def __call__(self, x: chex.Array, train: bool) -> chex.Array:
        """``[B, H, W, C]`` to ``[B, H / stride, W / stride, features]``."""
        y = x
        for i, layer in enumerate(self.layers, 1):
            y = nn.relu(y) if i > 1 else y
            y = self.norm(name=f"bn{i}")(self.conv(*layer, name=f"conv{i}")(y), train)
        if x.shape != y.shape:
            features, stride = y.shape[-1], max(stride for _, _, stride in self.layers)
            if self.shortcut == "A":
                x = _identity(x, features, stride)
            else:
                x = self.conv(features, 1, stride, name=f"{self.projection}_0")(x)
                x = self.norm(name=f"{self.projection}_1")(x, train)
        return nn.relu(x + y)


def _identity(x: chex.Array, features: int, stride: int) -> chex.Array:
    """Every ``stride``-th pixel; the new channels are zeros, half of them before the old ones."""
    more = features - x.shape[-1]
    return jnp.pad(x[:, ::stride, ::stride], ((0, 0), (0, 0), (0, 0), (more // 2, more - more // 2)))


def _basic(width: int, stride: int) -> Layers:
    return (width, 3, stride), (width, 3, 1)


def _bottleneck(width: int, stride: int) -> Layers:
    # The 3x3 convolution has the stride, as in torchvision's v1.5, not the first 1x1 as in the paper.
    return (width, 1, 1), (width, 3, stride), (4 * width, 1, 1)


class ResNet(nn.Module):
    """ResNet of stages of post-activation blocks; ``ResNet18``, ``ResNet20`` and others are instances of it.

    Source: He et al. (CVPR 2016).

    Attributes:
      blocks: number of blocks in each stage.
      block: function from the width of a stage and the stride to the layers of a block.
      projection: see :class:`ResidualBlock`.
      shortcut: 'A' or 'B', see :class:`ResidualBlock`.
      stem: 'imagenet' (7x7 of stride 2, max pooling), or 'small' for images of 32 to 64 pixels (3x3 of
        stride 1, no pooling).
      width: channels of the stem and of the first stage; each stage has twice those of the one before.
      convolution: a function of ``convolutions``.
      axis_name: see :class:`BatchNorm`.
      mean: of each channel, and
      std: of each channel: the network standardises its images, see :func:`standardised`; (): it does not,
        so weights that were trained on standardised images do not fit.
    """

    blocks: tuple[int, ...]
    block: Callable[[int, int], Layers]
    projection: str
    shortcut: str = "B"
    stem: str = "imagenet"
    width: int = 64
    convolution: Convolution = convolution
    axis_name: str | None = None
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if self.stem not in ("imagenet", "small"):
            raise ValueError(f"unknown stem {self.stem!r}; use 'imagenet' or 'small'")
        if self.shortcut not in ("A", "B"):
            raise ValueError(f"unknown shortcut {self.shortcut!r}; use 'A' or 'B'")
        check_standardisation(self.mean, self.std)
        super().__post_init__()

    @nn.compact
    def __call__(self, x: chex.Array, train: bool) -> chex.Array:
        """Images ``[B, H, W, C]`` to features ``[B, D]``."""
        conv = partial(Conv, convolution=self.convolution)
        norm = partial(BatchNorm, axis_name=self.axis_name)
        large = self.stem == "imagenet"
        x = standardised(x, self.mean, self.std)
        x = conv(self.width, 7, 2, name="conv1")(x) if large else conv(self.width, name="conv1")(x)
        x = nn.relu(norm(name="bn1")(x, train))
        if large:
            x = nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))
        for stage, count in enumerate(self.blocks):
            for i in range(count):
                layers = self.block(self.width * 2**stage, 2 if stage > 0 and i == 0 else 1)
                name = f"layer{stage + 1}_{i}"
                x = ResidualBlock(layers, self.projection, conv, norm, self.shortcut, name=name)(x, train)
        return pooled(x)


# A config cannot change arguments that are bound by position.
ResNet18 = partial(ResNet, (2, 2, 2, 2), _basic, "shortcut", stem="small")
"""ResNet-18 in the form for CIFAR that follow-up work on RoBal uses; features ``[B, 512]``."""

ResNet50 = partial(ResNet, (3, 4, 6, 3), _bottleneck, "downsample")
"""ResNet-50 with torchvision's names; features ``[B, 2048]``."""

ResNet20 = partial(ResNet, (3, 3, 3), _basic, "shortcut", shortcut="A", stem="small", width=16)
"""ResNet-20 of He et al. for CIFAR, section 4.2: 16, 32, 64 channels, no projection; features ``[B, 64]``."""

ResNet32 = partial(ResNet, (5, 5, 5), _basic, "shortcut", shortcut="A", stem="small", width=16)
"""ResNet-32, as :data:`ResNet20`."""


class SmallCNN(nn.Module):
    """Three convolutions and a linear layer for 8x8 and 28x28 images; features ``[B, width]``.

    The features are taken *before* a ReLU. On rectified features of a small network, a cosine head collapses
    to one class, because a feature vector of zeros has no direction.

    Attributes:
      channels: of the three convolutions; the second and the third halve the image.
      width: ``D``, number of features.
      convolution: a function of ``convolutions``.
      axis_name: see :class:`BatchNorm`.
      mean: of each channel, and
      std: of each channel: the network standardises its images, see :func:`standardised`; (): it does not.
    """

    channels: tuple[int, int, int] = (16, 32, 64)
    width: int = 64
    convolution: Convolution = convolution
    axis_name: str | None = None
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        check_standardisation(self.mean, self.std)
        super().__post_init__()

    @nn.compact
    def __call__(self, x: chex.Array, train: bool) -> chex.Array:
        """Images ``[B, H, W, C]`` to features ``[B, width]``."""
        x = standardised(x, self.mean, self.std)
        for i, channels in enumerate(self.channels):
            conv = Conv(channels, 3, min(i + 1, 2), self.convolution, name=f"conv{i + 1}")
            x = nn.relu(BatchNorm(self.axis_name, name=f"bn{i + 1}")(conv(x), train))
        return nn.Dense(self.width, param_dtype=float, name="fc")(x.reshape(x.shape[0], -1))


BACKBONES: dict[str, Callable[..., nn.Module]] = {
    "wide_resnet": WideResNet,
    "resnet18": ResNet18,
    "small_cnn": SmallCNN,
    "resnet50": ResNet50,
    "deepmind_wide_resnet": DeepMindWideResNet,
    "preact_resnet18": PreActResNet18,
    "resnet20": ResNet20,
    "resnet32": ResNet32,
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
