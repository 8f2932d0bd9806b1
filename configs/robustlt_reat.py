r"""RobustLT on REAT: larger radii for rare classes, which rise over the epochs.

Zhang et al. (CVPR 2026). Not a row of RoBal's tables. Its figures on CIFAR-10-LT could not be read:

    python experiments/train.py --config=configs/robustlt_reat.py:cifar10_lt \
        --workdir=runs/cifar10_lt/robustlt_reat

The released code trains a WideResNet-28-10 on three long-tailed subsets of its own, standardises the images
in the network, which this config does not, and evaluates with steps of 1/255.
"""

from configs import base, reat


def get_config(data: str = "digits_lt") -> base.ConfigDict:
    """The radii and their rise as published; the digits take those of CIFAR-10-LT."""
    config = reat.get_config(data)
    config.class_statistics.logged = True
    return base.robustlt(config, data, beta_tiny=0.4)
