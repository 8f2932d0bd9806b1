"""Networks in flax.linen, and the functions through which the rest of the library uses them.

Images are ``[B, H, W, C]`` in [0, 1]; a backbone gives features ``[B, D]``, and a head of
``robal_jax.classifiers`` makes logits of them. :func:`functional` turns a network into a :class:`Model`, a
tuple of plain functions of arrays::

    model = functional(Network(WideResNet(depth=34, widen=10), CosineHead(num_classes=10)))
    params, stats = model.init(key, images)
    logits = model.predict(params, stats, images)         # running batch-norm statistics
    logits, moments = model.train(params, stats, images)  # this batch's statistics
    stats = update_statistics(stats, (moments,))

A training pass does not change the running statistics: it returns the batch's moments, and
:func:`update_statistics` applies them. So an objective can follow the update order of the released code
(adversarial, natural, natural, adversarial) with two passes in place of four.

- ``layers``: standardisation, convolution, batch norm, and the rules by which running values change
- ``preactivation``: WideResNet and PreActResNet-18
- ``backbones``: ResNets, a small CNN, and the table of all
- ``network``: networks as functions
- ``convolutions``: XLA's convolution, and a faster one for CPUs
- ``closure``: separates a function from images to logits into a function and its arrays
"""

from robal_jax.models.backbones import (
    BACKBONES,
    Layers,
    ResidualBlock,
    ResNet,
    ResNet18,
    ResNet20,
    ResNet32,
    ResNet50,
    SmallCNN,
)
from robal_jax.models.layers import (
    ACTIVATIONS,
    BATCH_NORM_EPSILON,
    BATCH_NORM_MOMENTUM,
    FOLDS,
    BatchNorm,
    Conv,
    last_axis,
    update_statistics,
)
from robal_jax.models.network import PRECISIONS, Model, Network, functional
from robal_jax.models.preactivation import (
    CIFAR10_MEAN,
    CIFAR10_STD,
    DeepMindWideResNet,
    PreActResNet18,
    WideBlock,
    WideResNet,
)

__all__ = [
    "ACTIVATIONS",
    "BACKBONES",
    "BATCH_NORM_EPSILON",
    "BATCH_NORM_MOMENTUM",
    "CIFAR10_MEAN",
    "CIFAR10_STD",
    "FOLDS",
    "PRECISIONS",
    "BatchNorm",
    "Conv",
    "DeepMindWideResNet",
    "Layers",
    "Model",
    "Network",
    "PreActResNet18",
    "ResNet",
    "ResNet18",
    "ResNet20",
    "ResNet32",
    "ResNet50",
    "ResidualBlock",
    "SmallCNN",
    "WideBlock",
    "WideResNet",
    "functional",
    "last_axis",
    "update_statistics",
]
