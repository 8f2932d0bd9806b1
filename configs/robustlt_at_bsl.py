r"""RobustLT on AT-BSL: larger radii for rare classes, which rise over the epochs.

Zhang et al. (CVPR 2026). Not a row of RoBal's tables. WideResNet-28-10, CIFAR-10-LT IR 50, clean / PGD-20 /
AA with 10 iterations, second-hand: AT-BSL 77.09 / 37.98 / 34.57, with RobustLT 77.61 / 42.11 / 37.49, both
with AutoAugment:

    python experiments/train.py --config=configs/robustlt_at_bsl.py:cifar10_lt \
        --workdir=runs/cifar10_lt/robustlt_at_bsl

The released code trains a WideResNet-28-10 on three long-tailed subsets of its own, standardises the images
in the network, which this config does not, and evaluates with steps of 1/255.
"""

from configs import at_bsl, base


def get_config(data: str = "digits_lt") -> base.ConfigDict:
    """The radii and their rise as published; the digits take those of CIFAR-10-LT."""
    config = at_bsl.get_config(data)
    config.objective.batch_norm_order = "adv,nat"  # as released: no loss reads nat, which moves statistics
    if data != "digits_lt":
        config.train.augmentation = f"autoaugment,{config.train.augmentation}"
    return base.robustlt(config, data, beta_tiny=0.6)
