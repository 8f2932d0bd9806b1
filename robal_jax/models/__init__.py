"""TODO models."""

from robal_jax.models.backbones import (
    BACKBONES,
    Layers,
    ResidualBlock,
    ResNet,
    ResNet18,
    ResNet50,
    SmallCNN,
    WideBlock,
    WideResNet,
)
from robal_jax.models.layers import (
    BATCH_NORM_EPSILON,
    BATCH_NORM_MOMENTUM,
    FOLDS,
    BatchNorm,
    Conv,
    last_axis,
    update_statistics,
)
from robal_jax.models.network import PRECISIONS, Model, Network, functional

__all__ = [
    "BACKBONES",
    "BATCH_NORM_EPSILON",
    "BATCH_NORM_MOMENTUM",
    "FOLDS",
    "PRECISIONS",
    "BatchNorm",
    "Conv",
    "Layers",
    "Model",
    "Network",
    "ResNet",
    "ResNet18",
    "ResNet50",
    "ResidualBlock",
    "SmallCNN",
    "WideBlock",
    "WideResNet",
    "functional",
    "last_axis",
    "update_statistics",
]
