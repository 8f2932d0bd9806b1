"""Networks of pre-activation blocks: WideResNet, as released and in DeepMind's form, and PreActResNet-18."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import chex
import flax.linen as nn

from robal_jax.models.convolutions import Convolution, convolution, same_padding
from robal_jax.models.layers import (
    Activation,
    BatchNorm,
    Conv,
    activation_of,
    check_standardisation,
    pooled,
    standardised,
)


class Names(NamedTuple):
    """Names of the modules of a network, with ``_`` for ``.``, and ``__`` for ``_``.

    Attributes:
      stem: first convolution.
      block: with places for the number of the stage, from ``first``, and of the block, from 0.
      first: number of the first stage.
      norms: the two batch norms of a block.
      convolutions: the two convolutions of a block.
      shortcut: projection of a block.
      norm: batch norm before pooling.
    """

    stem: str = "conv1"
    block: str = "block{}_layer_{}"
    first: int = 1
    norms: tuple[str, str] = ("bn1", "bn2")
    convolutions: tuple[str, str] = ("conv1", "conv2")
    shortcut: str = "convShortcut"
    norm: str = "bn1"


LAYOUTS = {
    "released": Names(),
    "deepmind": Names(
        stem="init__conv",
        block="layer_{}_block_{}",
        first=0,
        norms=("batchnorm__0", "batchnorm__1"),
        convolutions=("conv__0", "conv__1"),
        shortcut="shortcut",
        norm="batchnorm",
    ),
}
"""Names of a WideResNet's modules: in RoBal's code and most others, and in DeepMind's and RobustBench's."""

PREACT = Names(block="layer{}_{}", shortcut="shortcut_0", norm="bn")


class WideBlock(nn.Module):
    """Pre-activation block: BN, activation, 3x3, BN, activation, 3x3, and the shortcut."""

    features: int
    stride: int
    activation: Callable[[chex.Array], chex.Array]
    conv: Callable[..., nn.Module]
    norm: Callable[..., nn.Module]
    names: Names = LAYOUTS["released"]

    @nn.compact
    def __call__(self, x: chex.Array, train: bool) -> chex.Array:
        """``[B, H, W, C]`` to ``[B, H / stride, W / stride, features]``."""
        norms, convolutions = self.names.norms, self.names.convolutions
        y = self.activation(self.norm(name=norms[0])(x, train))
        if x.shape[-1] != self.features:
            # The projection starts from the activated input, not from x.
            x = self.conv(self.features, 1, self.stride, name=self.names.shortcut)(y)
        y = self.conv(self.features, 3, self.stride, name=convolutions[0])(y)
        y = self.activation(self.norm(name=norms[1])(y, train))
        return x + self.conv(self.features, 3, name=convolutions[1])(y)


def _features(
    x: chex.Array,
    train: bool,
    widths: tuple[int, ...],
    blocks: int,
    names: Names,
    activations: tuple[str | Activation, str | Activation],
    conv: Callable[..., nn.Module],
    norm: Callable[..., nn.Module],
) -> chex.Array:
    """Stem of the first width, stages of blocks of the others, batch norm, activation, means of channels."""
    inside, last = map(activation_of, activations)
    stem, *stages = widths
    x = conv(stem, name=names.stem)(x)
    for stage, width in enumerate(stages):
        for i in range(blocks):
            stride = 2 if stage > 0 and i == 0 else 1
            name = names.block.format(names.first + stage, i)
            x = WideBlock(width, stride, inside, conv, norm, names, name=name)(x, train)
    return pooled(last(norm(name=names.norm)(x, train)))


class WideResNet(nn.Module):
    """WideResNet-depth-widen; features ``[B, 64 * widen]``.

    Source: Zagoruyko and Komodakis (BMVC 2016), as in RoBal's released code; Gowal et al. (2020,
    arXiv:2010.03593) for DeepMind's form.

    Attributes:
      depth: ``6 n + 4`` for ``n`` blocks per stage.
      widen: width factor of the three stages of 16, 32 and 64 channels.
      activation: inside the blocks, a key of ``ACTIVATIONS`` or a function.
      convolution: a function of ``convolutions``.
      axis_name: see :class:`BatchNorm`.
      final_activation: before pooling. The released code has ReLU there, whatever ``activation`` is;
        DeepMind's code has the same twice.
      layout: 'released', or 'deepmind': the modules' names, and with 'deepmind' also the padding of a 3x3
        convolution of stride 2, which is that of 'SAME': an even side gets no zeros before, one after.
      mean: of each channel, and
      std: of each channel: the network standardises its images, see :func:`standardised`; (): it does not.
    """

    depth: int = 34
    widen: int = 10
    activation: str | Activation = "relu"
    convolution: Convolution = convolution
    axis_name: str | None = None
    final_activation: str | Activation = "relu"
    layout: str = "released"
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if self.depth < 10 or (self.depth - 4) % 6:
            raise ValueError(f"depth is {self.depth}; a WideResNet's must be 6 n + 4 with n at least 1")
        if self.layout not in LAYOUTS:
            raise ValueError(f"unknown layout {self.layout!r}; use one of {', '.join(LAYOUTS)}")
        activation_of(self.activation)
        activation_of(self.final_activation)
        check_standardisation(self.mean, self.std)
        super().__post_init__()

    @nn.compact
    def __call__(self, x: chex.Array, train: bool) -> chex.Array:
        """Images ``[B, H, W, C]`` to features ``[B, 64 * widen]``."""
        convolve = same_padding(self.convolution) if self.layout == "deepmind" else self.convolution
        return _features(
            standardised(x, self.mean, self.std),
            train,
            (16, 16 * self.widen, 32 * self.widen, 64 * self.widen),
            (self.depth - 4) // 6,
            LAYOUTS[self.layout],
            (self.activation, self.final_activation),
            partial(Conv, convolution=convolve),
            partial(BatchNorm, axis_name=self.axis_name),
        )


CIFAR10_MEAN, CIFAR10_STD = (0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616)

DeepMindWideResNet = partial(
    WideResNet,
    layout="deepmind",
    activation="silu",
    final_activation="silu",
    mean=CIFAR10_MEAN,
    std=CIFAR10_STD,
)
"""WideResNet as DeepMind and RobustBench train it on CIFAR-10: SiLU, 'SAME' padding, standardised images.

For another data set set ``mean`` and ``std``.
"""


class PreActResNet18(nn.Module):
    """PreActResNet-18 for images of 32 to 64 pixels; features ``[B, 512]``.

    The stem is a 3x3 convolution of stride 1 without batch norm, the four stages have two blocks each, and a
    projection (1x1, no batch norm) starts from the activated input. With the batch norm and the activation
    before pooling it is the form that AWP, CFA and Rice et al. use. The original PyTorch form for CIFAR lacks
    these two; another starts its projections from the block's input. Their weights do not fit.

    Source: He et al., "Identity mappings in deep residual networks" (ECCV 2016); Rice et al. (ICML 2020).

    Attributes:
      activation: a key of ``ACTIVATIONS`` or a function.
      convolution: a function of ``convolutions``.
      axis_name: see :class:`BatchNorm`.
      mean: of each channel, and
      std: of each channel: the network standardises its images, see :func:`standardised`; (): it does not.
    """

    activation: str | Activation = "relu"
    convolution: Convolution = convolution
    axis_name: str | None = None
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        activation_of(self.activation)
        check_standardisation(self.mean, self.std)
        super().__post_init__()

    @nn.compact
    def __call__(self, x: chex.Array, train: bool) -> chex.Array:
        """Images ``[B, H, W, C]`` to features ``[B, 512]``."""
        return _features(
            standardised(x, self.mean, self.std),
            train,
            (64, 64, 128, 256, 512),
            2,
            PREACT,
            (self.activation, self.activation),
            partial(Conv, convolution=self.convolution),
            partial(BatchNorm, axis_name=self.axis_name),
        )
