r"""RobustLT on TAET: larger radii for rare classes, which rise over the epochs.

Zhang et al. (CVPR 2026). Not a row of RoBal's tables. Its figures on CIFAR-10-LT could not be read:

    python experiments/train.py --config=configs/robustlt_taet.py:cifar10_lt \
        --workdir=runs/cifar10_lt/robustlt_taet

The released code trains a WideResNet-28-10 on three long-tailed subsets of its own, standardises the images
in the network, which this config does not, and evaluates with steps of 1/255.
"""

from configs import base, taet


def get_config(data: str = "digits_lt") -> base.ConfigDict:
    """The radii and their rise as published; the digits take those of CIFAR-10-LT."""
    config = taet.get_config(data)
    return base.robustlt(config, data, beta=1.0, beta_tiny=0.8)
