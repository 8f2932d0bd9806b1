"""The forward pass of an exported network in PyTorch's conventions, from its names and shapes alone.

Images are ``[B, C, H, W]``, convolutions OIHW, linear layers ``[out, in]``, and ``flatten`` is PyTorch's.
What no name or shape tells (strides, activations, pooling) is that of the papers. ``Arrays`` computes in
NumPy; a test with PyTorch gives its own modules in place of it.
"""

import numpy as np


class Arrays:
    """The layers of a state_dict in NumPy, float64."""

    def __init__(self, state):
        self.state = {name: np.asarray(value, np.float64) for name, value in state.items()}

    def conv(self, name, x, stride):
        kernel = self.state[f"{name}.weight"]
        assert f"{name}.bias" not in self.state
        pad, size = kernel.shape[2] // 2, kernel.shape[2:]
        padded = np.pad(x, ((0, 0), (0, 0), (pad, pad), (pad, pad)))
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
        self.prefix = "backbone." if "backbone.conv1.weight" in shapes else ""

    def shape(self, name):
        return self.shapes.get(f"{self.prefix}{name}.weight")

    def count(self, name, first=0):
        return next(i for i in range(first, 1000) if not self.shape(name.format(i))) - first

    def conv(self, name, x, stride=1):
        return self.layers.conv(self.prefix + name, x, stride)

    def norm(self, name, x):
        return self.layers.norm(self.prefix + name, x)

    def small(self, x):
        relu = self.layers.relu
        for i in range(1, 1 + self.count("conv{}", 1)):
            x = relu(self.norm(f"bn{i}", self.conv(f"conv{i}", x, min(i, 2))))
        return self.layers.linear(f"{self.prefix}fc", self.layers.flatten(x))

    def wide(self, x):
        relu, x = self.layers.relu, self.conv("conv1", x)
        for stage in (1, 2, 3):
            for i in range(self.count(f"block{stage}.layer.{{}}.conv1")):
                block, stride = f"block{stage}.layer.{i}", 2 if stage > 1 and i == 0 else 1
                y = relu(self.norm(f"{block}.bn1", x))
                if self.shape(f"{block}.convShortcut"):
                    x = self.conv(f"{block}.convShortcut", y, stride)
                y = relu(self.norm(f"{block}.bn2", self.conv(f"{block}.conv1", y, stride)))
                x = x + self.conv(f"{block}.conv2", y)
        return self.layers.mean(relu(self.norm("bn1", x)))

    def residual(self, x):
        relu, large = self.layers.relu, self.shape("conv1")[2] == 7
        x = relu(self.norm("bn1", self.conv("conv1", x, 2 if large else 1)))
        x = self.layers.max_pool(x) if large else x
        for stage in (1, 2, 3, 4):
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
                x = relu(x + y)
        return self.layers.mean(x)


def features(layers, shapes, x):
    """Images ``[B, C, H, W]`` to features ``[B, D]``; ``shapes`` by name."""
    backbone = Backbone(layers, shapes)
    if backbone.shape("block1.layer.0.conv1"):
        return backbone.wide(x)
    return backbone.residual(x) if backbone.shape("layer1.0.conv1") else backbone.small(x)


def logits(layers, shapes, x):
    """Images ``[B, C, H, W]`` to logits ``[B, K]`` of a linear last layer."""
    last = next(
        name for name in ("classifier.fc", "fc", "linear", "classifier") if f"{name}.weight" in shapes
    )
    return layers.linear(last, features(layers, shapes, x))
