"""The forward pass of an exported network in PyTorch's conventions, from its names and shapes alone.

Images are ``[B, C, H, W]``, convolutions OIHW, linear layers ``[out, in]``, and ``flatten`` is PyTorch's.
What no name or shape tells (strides, activations, pooling) is that of the papers. ``Arrays`` computes in
NumPy; a test with PyTorch gives its own modules in place of it.
"""

from typing import NamedTuple

import numpy as np


class PreActivation(NamedTuple):
    """Names of a network of pre-activation blocks, and what they imply."""

    stem: str
    block: str  # of a stage and a block, 0 being the first
    first: int  # stage
    norms: tuple[str, str]
    convs: tuple[str, str]
    shortcut: str
    norm: str
    activation: str = "relu"
    same: bool = False  # TensorFlow's padding


WIDE = PreActivation(
    "conv1", "block{}.layer.{}", 1, ("bn1", "bn2"), ("conv1", "conv2"), "convShortcut", "bn1"
)
DEEPMIND = PreActivation(
    "init_conv", "layer.{}.block.{}", 0, ("batchnorm_0", "batchnorm_1"), ("conv_0", "conv_1"), "shortcut",
    "batchnorm", "silu", same=True,
)  # fmt: skip
PREACT = PreActivation("conv1", "layer{}.{}", 1, ("bn1", "bn2"), ("conv1", "conv2"), "shortcut.0", "bn")


class Arrays:
    """The layers of a state_dict in NumPy, float64."""

    def __init__(self, state):
        self.state = {name: np.asarray(value, np.float64) for name, value in state.items()}

    def standardise(self, prefix, x):
        return (x - self.state[f"{prefix}mean"]) / self.state[f"{prefix}std"]

    def conv(self, name, x, stride, same=False):
        kernel = self.state[f"{name}.weight"]
        assert f"{name}.bias" not in self.state
        pad, size = kernel.shape[2] // 2, kernel.shape[2:]
        zeros = (0, pad) if same and stride == 2 else (pad, pad)
        padded = np.pad(x, ((0, 0), (0, 0), zeros, zeros))
        windows = np.lib.stride_tricks.sliding_window_view(padded, size, (2, 3))[:, :, ::stride, ::stride]
        return np.moveaxis(np.tensordot(windows, kernel, ((1, 4, 5), (1, 2, 3))), -1, 1)

    def norm(self, name, x):
        mean, var, scale, bias = (
            self.state[f"{name}.{part}"][:, None, None]
            for part in ("running_mean", "running_var", "weight", "bias")
        )
        return (x - mean) / np.sqrt(var + 1e-5) * scale + bias

    def linear(self, name, x):
        return x @ self.state[f"{name}.weight"].T + self.state[f"{name}.bias"]

    def relu(self, x):
        return np.maximum(x, 0)

    def silu(self, x):
        return x / (1 + np.exp(-x))

    def more_channels(self, x, before, after):
        return np.pad(x, ((0, 0), (before, after), (0, 0), (0, 0)))

    def max_pool(self, x):
        padded = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)), constant_values=-np.inf)
        return np.lib.stride_tricks.sliding_window_view(padded, (3, 3), (2, 3))[:, :, ::2, ::2].max((4, 5))

    def mean(self, x):
        return x.mean((2, 3))

    def flatten(self, x):
        return x.reshape(len(x), -1)


class Backbone:
    """The layers of a backbone, without the beginning of their names."""

    def __init__(self, layers, shapes):
        self.layers, self.shapes = layers, shapes
        self.prefix = "backbone." if any(name.startswith("backbone.") for name in shapes) else ""

    def shape(self, name):
        return self.shapes.get(f"{self.prefix}{name}.weight")

    def count(self, name, first=0):
        return next(i for i in range(first, 1000) if not self.shape(name.format(i))) - first

    def conv(self, name, x, stride=1, same=False):
        return self.layers.conv(self.prefix + name, x, stride, same)

    def norm(self, name, x):
        return self.layers.norm(self.prefix + name, x)

    def small(self, x):
        relu = self.layers.relu
        for i in range(1, 1 + self.count("conv{}", 1)):
            x = relu(self.norm(f"bn{i}", self.conv(f"conv{i}", x, min(i, 2))))
        return self.layers.linear(f"{self.prefix}fc", self.layers.flatten(x))

    def preactivation(self, x, names):
        activation, x = getattr(self.layers, names.activation), self.conv(names.stem, x)
        first = names.first
        stages = self.count(f"{names.block.format('{}', 0)}.{names.convs[0]}", first)
        for stage in range(first, first + stages):
            for i in range(self.count(f"{names.block.format(stage, '{}')}.{names.convs[0]}")):
                block, stride = names.block.format(stage, i), 2 if stage > first and i == 0 else 1
                y = activation(self.norm(f"{block}.{names.norms[0]}", x))
                if self.shape(f"{block}.{names.shortcut}"):
                    x = self.conv(f"{block}.{names.shortcut}", y, stride)
                y = self.conv(f"{block}.{names.convs[0]}", y, stride, names.same)
                y = activation(self.norm(f"{block}.{names.norms[1]}", y))
                x = x + self.conv(f"{block}.{names.convs[1]}", y)
        return self.layers.mean(activation(self.norm(names.norm, x)))

    def residual(self, x):
        relu, large = self.layers.relu, self.shape("conv1")[2] == 7
        x = relu(self.norm("bn1", self.conv("conv1", x, 2 if large else 1)))
        x = self.layers.max_pool(x) if large else x
        for stage in range(1, 1 + self.count("layer{}.0.conv1", 1)):
            for i in range(self.count(f"layer{stage}.{{}}.conv1")):
                block, stride, y = f"layer{stage}.{i}", 2 if stage > 1 and i == 0 else 1, x
                depth = self.count(f"{block}.conv{{}}", 1)
                for k in range(1, depth + 1):  # the first of two has the stride, or the second of three
                    y = self.conv(f"{block}.conv{k}", y, stride if k == depth - 1 else 1)
                    y = self.norm(f"{block}.bn{k}", y)
                    y = relu(y) if k < depth else y
                for shortcut in ("shortcut", "downsample"):
                    if self.shape(f"{block}.{shortcut}.0"):
                        x = self.norm(f"{block}.{shortcut}.1", self.conv(f"{block}.{shortcut}.0", x, stride))
                if x.shape != y.shape:  # shortcut A
                    more = y.shape[1] - x.shape[1]
                    x = self.layers.more_channels(x[:, :, ::stride, ::stride], more // 2, more // 2)
                x = relu(x + y)
        return self.layers.mean(x)


def features(layers, shapes, x):
    """Images ``[B, C, H, W]`` to features ``[B, D]``; ``shapes`` by name."""
    backbone = Backbone(layers, shapes)
    if f"{backbone.prefix}mean" in shapes:
        x = layers.standardise(backbone.prefix, x)
    for names in (WIDE, DEEPMIND, PREACT):
        if backbone.shape(f"{names.block.format(names.first, 0)}.{names.convs[0]}") and backbone.shape(
            names.norm
        ):
            return backbone.preactivation(x, names)
    return backbone.residual(x) if backbone.shape("layer1.0.conv1") else backbone.small(x)


def logits(layers, shapes, x):
    """Images ``[B, C, H, W]`` to logits ``[B, K]`` of a linear last layer."""
    last = next(
        name
        for name in ("classifier.fc", "fc", "linear", "logits", "classifier")
        if f"{name}.weight" in shapes
    )
    return layers.linear(last, features(layers, shapes, x))
