"""The networks in PyTorch, written from the facts about the released code: what imported weights must match.

Names are those of the released state_dicts. Only tests use this file, those that need PyTorch.
"""

import torch
from torch import nn
from torch.nn import functional


def conv(inputs, outputs, size, stride=1):
    return nn.Conv2d(inputs, outputs, size, stride, padding=size // 2, bias=False)


class WideBlock(nn.Module):
    """Pre-activation; where the width changes, the shortcut starts from relu(bn1(x))."""

    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(inputs), conv(inputs, outputs, 3, stride)
        self.bn2, self.conv2 = nn.BatchNorm2d(outputs), conv(outputs, outputs, 3)
        if inputs != outputs:
            self.convShortcut = conv(inputs, outputs, 1, stride)

    def forward(self, x):
        activated = self.bn1(x).relu()
        shortcut = self.convShortcut(activated) if hasattr(self, "convShortcut") else x
        return shortcut + self.conv2(self.bn2(self.conv1(activated)).relu())


class Stage(nn.Module):
    def __init__(self, blocks, inputs, outputs, stride):
        super().__init__()
        self.layer = nn.Sequential(
            *[WideBlock(outputs if i else inputs, outputs, 1 if i else stride) for i in range(blocks)]
        )

    def forward(self, x):
        return self.layer(x)


class WideResNet(nn.Module):
    """WideResNet-depth-widen; features if num_classes is None, else logits of ``fc``."""

    def __init__(self, depth, widen, num_classes=None):
        super().__init__()
        blocks, widths = (depth - 4) // 6, [16, 16 * widen, 32 * widen, 64 * widen]
        self.conv1 = conv(3, 16, 3)
        self.block1, self.block2, self.block3 = (
            Stage(blocks, widths[i], widths[i + 1], 2 if i else 1) for i in range(3)
        )
        self.bn1 = nn.BatchNorm2d(widths[3])
        self.fc = nn.Identity() if num_classes is None else nn.Linear(widths[3], num_classes)

    def forward(self, x):
        x = self.bn1(self.block3(self.block2(self.block1(self.conv1(x))))).relu()
        return self.fc(x.mean((2, 3)))


class BasicBlock(nn.Module):
    """Post-activation."""

    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.conv1, self.bn1 = conv(inputs, outputs, 3, stride), nn.BatchNorm2d(outputs)
        self.conv2, self.bn2 = conv(outputs, outputs, 3), nn.BatchNorm2d(outputs)
        projected = stride > 1 or inputs != outputs
        parts = [conv(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs)] if projected else []
        self.shortcut = nn.Sequential(*parts)

    def forward(self, x):
        y = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
        return (y + self.shortcut(x)).relu()


class ResNet18(nn.Module):
    """CIFAR stem: 3x3, stride 1, no pooling."""

    def __init__(self, num_classes):
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
        self.linear = nn.Linear(512, num_classes)

    def forward(self, x):
        x = self.bn1(self.conv1(x)).relu()
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.linear(x.mean((2, 3)))


class Bottleneck(nn.Module):
    """Post-activation; the stride stands at the 3x3 convolution."""

    def __init__(self, inputs, width, stride):
        super().__init__()
        self.conv1, self.bn1 = conv(inputs, width, 1), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = conv(width, width, 3, stride), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = conv(width, 4 * width, 1), nn.BatchNorm2d(4 * width)
        if stride > 1 or inputs != 4 * width:
            self.downsample = nn.Sequential(conv(inputs, 4 * width, 1, stride), nn.BatchNorm2d(4 * width))

    def forward(self, x):
        y = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu())).relu()
        shortcut = self.downsample(x) if hasattr(self, "downsample") else x
        return (self.bn3(self.conv3(y)) + shortcut).relu()


class ResNet50(nn.Module):
    """The names are torchvision's; with the small stem (3x3, stride 1) there is no pooling."""

    def __init__(self, num_classes, stem="imagenet"):
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

    def forward(self, x):
        x = self.pool(self.bn1(self.conv1(x)).relu())
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(x.mean((2, 3)))


class CosineHead(nn.Module):
    """RoBal's scale-invariant classifier: a frozen bias and, where it is trained, an unused ``moving_ed``."""

    def __init__(self, width, num_classes, moving=True, scale=1.0, gamma=1 / 32):
        super().__init__()
        self.scale, self.gamma = scale, gamma
        self.weight = nn.Parameter(torch.empty(num_classes, width))
        self.bias = nn.Parameter(torch.zeros(num_classes), requires_grad=False)
        if moving:
            self.moving_ed = nn.Parameter(torch.ones(1, width), requires_grad=False)

    def forward(self, features):
        unit = features / features.norm(dim=1, keepdim=True)
        rows = self.weight / (self.weight.norm(dim=1, keepdim=True) + self.gamma)
        return self.scale * functional.linear(unit, rows) + self.bias


class RoBal(nn.Module):
    """Backbone and classifier, as the released state_dicts name them."""

    def __init__(self, backbone, classifier):
        super().__init__()
        self.backbone, self.classifier = backbone, classifier

    def forward(self, x):
        return self.classifier(self.backbone(x))


def randomised(network, seed=0):
    """The network with random weights and batch-norm statistics that are not trivial, in evaluation mode."""
    generator = torch.Generator().manual_seed(seed)

    def draw(like):
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
