r"""RobustLT on AT-AWP: larger radii for rare classes, which rise over the epochs.

Zhang et al. (CVPR 2026). Not a row of RoBal's tables. WideResNet-28-10, CIFAR-10-LT IR 50, clean / PGD-20,
second-hand: AWP 59.66 / 28.50, with RobustLT 65.22 / 29.11:

    python experiments/train.py --config=configs/robustlt_awp.py:cifar10_lt \
        --workdir=runs/cifar10_lt/robustlt_awp

The released code trains a WideResNet-28-10 on three long-tailed subsets of its own, standardises the images
in the network, which this config does not, and evaluates with steps of 1/255.
"""

from configs import at_awp, base


def get_config(data: str = "digits_lt") -> base.ConfigDict:
    """The radii and their rise as published; the digits take those of CIFAR-10-LT."""
    config = at_awp.get_config(data)
    config.perturbation = base.ConfigDict(
        {"name": "awp", "gamma": 0.005, "direction": "optimizer", "counts_pass": True}
    )
    return base.robustlt(config, data)
