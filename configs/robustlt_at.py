r"""RobustLT on AT: larger radii for rare classes, which rise over the epochs.

Zhang et al. (CVPR 2026). Not a row of RoBal's tables. WideResNet-28-10, CIFAR-10-LT IR 50, clean / PGD-20,
second-hand: AT 58.25 / 27.28, with RobustLT 61.59 / 28.97:

    python experiments/train.py --config=configs/robustlt_at.py:cifar10_lt \
        --workdir=runs/cifar10_lt/robustlt_at

The released code trains a WideResNet-28-10 on three long-tailed subsets of its own, standardises the images
in the network, which this config does not, and evaluates with steps of 1/255.
"""

from configs import base


def get_config(data: str = "digits_lt") -> base.ConfigDict:
    """The radii and their rise as published; the digits take those of CIFAR-10-LT."""
    config = base.follow_up(data)
    return base.robustlt(config, data)
