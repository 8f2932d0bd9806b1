"""The networks in PyTorch, from the facts about the released code: peers, and references for imports.

Names are those of the released state_dicts; the small CNN, which was not released, has ours. Needs PyTorch.
"""

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional


def conv(inputs: int, outputs: int, size: int, stride: int = 1) -> nn.Conv2d:
    """Returns a convolution without bias, padded to keep the size of the image if the stride is 1."""
    return nn.Conv2d(inputs, outputs, size, stride, padding=size // 2, bias=False)


class WideBlock(nn.Module):
    """Pre-activation; if the width changes, the shortcut starts from relu(bn1(x))."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(inputs), conv(inputs, outputs, 3, stride)
        self.bn2, self.conv2 = nn.BatchNorm2d(outputs), conv(outputs, outputs, 3)
        if inputs != outputs:
            self.convShortcut = conv(inputs, outputs, 1, stride)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[B, C, H, W]`` to the same of the next width."""
        activated = self.bn1(x).relu()
        shortcut = self.convShortcut(activated) if hasattr(self, "convShortcut") else x
        return shortcut + self.conv2(self.bn2(self.conv1(activated)).relu())


class Stage(nn.Module):
    """Blocks of one width; the first has the stride."""

    def __init__(self, blocks: int, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.layer = nn.Sequential(
            *[WideBlock(outputs if i else inputs, outputs, 1 if i else stride) for i in range(blocks)]
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[B, C, H, W]`` to the same of the next width."""
        return self.layer(x)


class WideResNet(nn.Module):
    """WideResNet-depth-widen; features if num_classes is None, else logits of ``fc``."""

    def __init__(self, depth: int, widen: int, num_classes: int | None = None) -> None:
        super().__init__()
        blocks, widths = (depth - 4) // 6, [16, 16 * widen, 32 * widen, 64 * widen]
        self.conv1 = conv(3, 16, 3)
        self.block1, self.block2, self.block3 = (
            Stage(blocks, widths[i], widths[i + 1], 2 if i else 1) for i in range(3)
        )
        self.bn1 = nn.BatchNorm2d(widths[3])
        self.fc = nn.Identity() if num_classes is None else nn.Linear(widths[3], num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Images ``[B, 3, H, W]`` to features or logits."""
        x = self.bn1(self.block3(self.block2(self.block1(self.conv1(x))))).relu()
        return self.fc(x.mean((2, 3)))


class BasicBlock(nn.Module):
    """Post-activation."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv(inputs, outputs, 3, stride), nn.BatchNorm2d(outputs)
        self.conv2, self.bn2 = conv(outputs, outputs, 3), nn.BatchNorm2d(outputs)
        projected = stride > 1 or inputs != outputs
        parts = [conv(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs)] if projected else []
        self.shortcut = nn.Sequential(*parts)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[B, C, H, W]`` to the same of the next width."""
        y = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
        return (y + self.shortcut(x)).relu()


class ResNet18(nn.Module):
    """CIFAR stem: 3x3, stride 1, no pooling."""

    def __init__(self, num_classes: int | None = None) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv(3, 64, 3), nn.BatchNorm2d(64)
        widths = [64, 64, 128, 256, 512]
        self.layer1, self.layer2, self.layer3, self.layer4 = (
            nn.Sequential(
                BasicBlock(widths[i], widths[i + 1], 2 if i else 1),
                BasicBlock(widths[i + 1], widths[i + 1], 1),
            )
            for i in range(4)
        )
        self.linear = nn.Identity() if num_classes is None else nn.Linear(512, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Images ``[B, 3, H, W]`` to features or logits."""
        x = self.bn1(self.conv1(x)).relu()
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.linear(x.mean((2, 3)))


class WithZeros(nn.Module):
    """Shortcut A: every other pixel, a half of the new channels before the old ones, the other half after."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[B, C, H, W]`` to ``[B, 2 C, H / 2, W / 2]``."""
        x = x[:, :, ::2, ::2]
        half = torch.zeros_like(x[:, : x.shape[1] // 2])
        return torch.cat((half, x, half), 1)


class CifarBlock(BasicBlock):
    """A block of the ResNets for CIFAR, with shortcut A or B."""

    def __init__(self, inputs: int, outputs: int, shortcut: str) -> None:
        super().__init__(inputs, outputs, 1 if inputs == outputs else 2)
        if shortcut == "A" and inputs != outputs:
            self.shortcut = WithZeros()


class CifarResNet(nn.Module):
    """ResNet of depth ``6 n + 2``: three stages of ``n`` blocks."""

    def __init__(self, depth: int, shortcut: str, num_classes: int | None = 10) -> None:
        super().__init__()
        self.conv1, self.bn1, inputs = conv(3, 16, 3), nn.BatchNorm2d(16), 16
        for stage, width in enumerate((16, 32, 64), 1):
            blocks = [CifarBlock(inputs if i == 0 else width, width, shortcut) for i in range(depth // 6)]
            self.add_module(f"layer{stage}", nn.Sequential(*blocks))
            inputs = width
        self.linear = nn.Identity() if num_classes is None else nn.Linear(64, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Images ``[B, 3, H, W]`` to features or logits."""
        x = self.layer3(self.layer2(self.layer1(self.bn1(self.conv1(x)).relu())))
        return self.linear(x.mean((2, 3)))


class Bottleneck(nn.Module):
    """Post-activation; the 3x3 convolution has the stride."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv(inputs, width, 1), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = conv(width, width, 3, stride), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = conv(width, 4 * width, 1), nn.BatchNorm2d(4 * width)
        if stride > 1 or inputs != 4 * width:
            self.downsample = nn.Sequential(conv(inputs, 4 * width, 1, stride), nn.BatchNorm2d(4 * width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[B, C, H, W]`` to the same of the next width."""
        y = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu())).relu()
        shortcut = self.downsample(x) if hasattr(self, "downsample") else x
        return (self.bn3(self.conv3(y)) + shortcut).relu()


class ResNet50(nn.Module):
    """Names as in torchvision; with the small stem (3x3, stride 1) there is no pooling."""

    def __init__(self, num_classes: int, stem: str = "imagenet") -> None:
        super().__init__()
        large = stem == "imagenet"
        self.conv1, self.bn1 = conv(3, 64, 7, 2) if large else conv(3, 64, 3), nn.BatchNorm2d(64)
        self.pool = nn.MaxPool2d(3, 2, padding=1) if large else nn.Identity()
        outputs = [64, 256, 512, 1024, 2048]
        self.layer1, self.layer2, self.layer3, self.layer4 = (
            nn.Sequential(
                *[
                    Bottleneck(outputs[i + (j > 0)], 64 * 2**i, 2 if i and not j else 1)
                    for j in range((3, 4, 6, 3)[i])
                ]
            )
            for i in range(4)
        )
        self.fc = nn.Linear(2048, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Images ``[B, 3, H, W]`` to logits."""
        x = self.pool(self.bn1(self.conv1(x)).relu())
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(x.mean((2, 3)))


class SmallCNN(nn.Module):
    """``models.SmallCNN``: three convolutions and a linear layer; features ``[B, width]``."""

    def __init__(self, inputs: int = 1, pixels: int = 8, width: int = 64) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv(inputs, 16, 3), nn.BatchNorm2d(16)
        self.conv2, self.bn2 = conv(16, 32, 3, 2), nn.BatchNorm2d(32)
        self.conv3, self.bn3 = conv(32, 64, 3, 2), nn.BatchNorm2d(64)
        self.fc = nn.Linear(64 * (pixels // 4) ** 2, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Images ``[B, C, H, W]`` to features."""
        x = self.bn1(self.conv1(x)).relu()
        x = self.bn2(self.conv2(x)).relu()
        x = self.bn3(self.conv3(x)).relu()
        return self.fc(x.flatten(1))


class CosineHead(nn.Module):
    """RoBal's scale-invariant classifier: a frozen bias and, if ``moving``, an unused ``moving_ed``."""

    def __init__(
        self, width: int, num_classes: int, moving: bool = True, scale: float = 1.0, gamma: float = 1 / 32
    ) -> None:
        super().__init__()
        self.scale, self.gamma = scale, gamma
        self.weight = nn.Parameter(torch.empty(num_classes, width))
        self.bias = nn.Parameter(torch.zeros(num_classes), requires_grad=False)
        if moving:
            self.moving_ed = nn.Parameter(torch.ones(1, width), requires_grad=False)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """``[B, D]`` to logits."""
        unit = features / features.norm(dim=1, keepdim=True)
        rows = self.weight / (self.weight.norm(dim=1, keepdim=True) + self.gamma)
        return self.scale * functional.linear(unit, rows) + self.bias


# The networks of the benchmarks, each with its number of features.
BACKBONES: dict[str, Callable[[], tuple[nn.Module, int]]] = {
    "digits_cnn": lambda: (SmallCNN(), 64),
    "wrn_16_2": lambda: (WideResNet(16, 2), 128),
    "resnet18": lambda: (ResNet18(), 512),
    "resnet20": lambda: (CifarResNet(20, "A", None), 64),
    "wrn_34_10": lambda: (WideResNet(34, 10), 640),
}


class RoBal(nn.Module):
    """Backbone and classifier, named as in the released state_dicts."""

    def __init__(self, backbone: nn.Module, classifier: nn.Module) -> None:
        super().__init__()
        self.backbone, self.classifier = backbone, classifier

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Images ``[B, 3, H, W]`` to logits."""
        return self.classifier(self.backbone(x))


def randomised(network: nn.Module, seed: int = 0) -> nn.Module:
    """Returns the network with random weights and batch-norm statistics, in evaluation mode."""
    generator = torch.Generator().manual_seed(seed)

    def draw(like: torch.Tensor) -> torch.Tensor:
        return torch.randn(like.shape, generator=generator)

    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, nn.Conv2d):
                fan_in = module.weight[0].numel()
                module.weight.copy_(draw(module.weight) * (2 / fan_in) ** 0.5)
            elif isinstance(module, nn.BatchNorm2d):
                module.weight.copy_(1 + 0.1 * draw(module.weight))
                module.bias.copy_(0.1 * draw(module.bias))
                module.running_mean.copy_(0.1 * draw(module.running_mean))
                module.running_var.copy_(1 + 0.25 * draw(module.running_var).abs())
            elif isinstance(module, CosineHead):
                module.weight.copy_(draw(module.weight) * module.weight.shape[1] ** -0.5)
            elif isinstance(module, nn.Linear):
                module.weight.copy_(draw(module.weight) * module.in_features**-0.5)
                module.bias.copy_(0.1 * draw(module.bias))
    return network.eval()
