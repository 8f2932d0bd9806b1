r"""RobustLT on RoBal-N: larger radii for rare classes, which rise over the epochs.

Zhang et al. (CVPR 2026). Not a row of RoBal's tables. WideResNet-28-10, CIFAR-10-LT IR 50, clean / PGD-20 /
AA with 10 iterations, second-hand: RoBal 72.73 / 32.29 / 28.92, with RobustLT 74.63 / 36.08 / 31.03:

    python experiments/train.py --config=configs/robustlt_robal.py:cifar10_lt \
        --workdir=runs/cifar10_lt/robustlt_robal

The released code trains a WideResNet-28-10 on three long-tailed subsets of its own, standardises the images
in the network, which this config does not, and evaluates with steps of 1/255.
"""

from configs import base, robal_n


def get_config(data: str = "digits_lt") -> base.ConfigDict:
    """The radii and their rise as published; the digits take those of CIFAR-10-LT."""
    config = robal_n.get_config(data)
    return base.robustlt(config, data, beta_tiny=0.4)
