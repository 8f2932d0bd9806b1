"""Networks in PyTorch, made from the papers and from the names of released state_dicts. Needs PyTorch."""

import torch
from torch import nn

from experiments.benchmarks.torch_networks import CifarResNet, conv

__all__ = ["CifarResNet", "DeepMindWideResNet", "PreActResNet18"]


class PreActBlock(nn.Module):
    """Pre-activation; a projection starts from the activated input."""

    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(inputs), conv(inputs, outputs, 3, stride)
        self.bn2, self.conv2 = nn.BatchNorm2d(outputs), conv(outputs, outputs, 3)
        if stride > 1 or inputs != outputs:
            self.shortcut = nn.Sequential(conv(inputs, outputs, 1, stride))

    def forward(self, x):
        activated = self.bn1(x).relu()
        y = self.conv2(self.bn2(self.conv1(activated)).relu())
        return y + (self.shortcut(activated) if hasattr(self, "shortcut") else x)


class PreActResNet18(nn.Module):
    """``final=False`` is the form without batch norm and ReLU before pooling."""

    def __init__(self, num_classes=10, final=True):
        super().__init__()
        self.conv1, inputs = conv(3, 64, 3), 64
        for stage, width in enumerate((64, 128, 256, 512), 1):
            blocks = PreActBlock(inputs, width, 1 if stage == 1 else 2), PreActBlock(width, width, 1)
            self.add_module(f"layer{stage}", nn.Sequential(*blocks))
            inputs = width
        self.bn = nn.BatchNorm2d(512) if final else None
        self.linear = nn.Linear(512, num_classes)

    def forward(self, x):
        x = self.layer4(self.layer3(self.layer2(self.layer1(self.conv1(x)))))
        x = self.bn(x).relu() if self.bn is not None else x
        return self.linear(x.mean((2, 3)))


class DeepMindBlock(nn.Module):
    """Pre-activation with SiLU; the strided convolution is padded on the right and below only."""

    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.batchnorm_0, self.batchnorm_1 = nn.BatchNorm2d(inputs), nn.BatchNorm2d(outputs)
        self.conv_0 = nn.Conv2d(inputs, outputs, 3, stride, bias=False)
        self.conv_1 = conv(outputs, outputs, 3)
        self.pad = nn.ZeroPad2d((0, 1, 0, 1) if stride == 2 else 1)
        if inputs != outputs:
            self.shortcut = conv(inputs, outputs, 1, stride)

    def forward(self, x):
        activated = nn.functional.silu(self.batchnorm_0(x))
        y = nn.functional.silu(self.batchnorm_1(self.conv_0(self.pad(activated))))
        return self.conv_1(y) + (self.shortcut(activated) if hasattr(self, "shortcut") else x)


class DeepMindStage(nn.Module):
    """Blocks of one width; the first has the stride."""

    def __init__(self, blocks, inputs, outputs, stride):
        super().__init__()
        self.block = nn.Sequential(
            *[DeepMindBlock(outputs if i else inputs, outputs, 1 if i else stride) for i in range(blocks)]
        )

    def forward(self, x):
        return self.block(x)


class DeepMindWideResNet(nn.Module):
    """With ``buffers``, as on RobustBench; DeepMind's own state_dicts lack ``mean`` and ``std``."""

    def __init__(self, depth, widen, num_classes=10, buffers=True):
        super().__init__()
        for name, numbers in (("mean", (0.4914, 0.4822, 0.4465)), ("std", (0.2471, 0.2435, 0.2616))):
            self.register_buffer(name, torch.tensor(numbers).reshape(3, 1, 1), persistent=buffers)
        widths = [16, 16 * widen, 32 * widen, 64 * widen]
        self.init_conv = conv(3, 16, 3)
        self.layer = nn.Sequential(
            *[DeepMindStage((depth - 4) // 6, *widths[i : i + 2], 2 if i else 1) for i in range(3)]
        )
        self.batchnorm = nn.BatchNorm2d(widths[3])
        self.logits = nn.Linear(widths[3], num_classes)

    def forward(self, x):
        x = self.batchnorm(self.layer(self.init_conv((x - self.mean) / self.std)))
        return self.logits(nn.functional.silu(x).mean((2, 3)))
