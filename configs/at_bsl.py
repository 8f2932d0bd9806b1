"""AT-BSL: AT with a balanced softmax (Yue et al., CVPR 2024), without its augmentation.

Not a row of RoBal's tables. An independent rerun of the released code (ResNet-18, best epoch by PGD-20 on the
test set, AutoAttack with 10 iterations), clean / PGD-20 / AA on CIFAR-10-LT IR 50: 68.17 / 36.93 / 33.04,
with RandAugment 69.76 / 38.09 / 33.76:

    python experiments/train.py --config=configs/at_bsl.py:cifar10_lt --workdir=runs/cifar10_lt/at_bsl

``--config.train.augmentation=randaugment,crop_flip`` adds RandAugment, ``autoaugment,crop_flip`` AutoAugment,
which the released script for CIFAR takes by default.
"""

from configs import base


def get_config(data: str = "digits_lt") -> base.ConfigDict:
    """Log counts are added to the logits in the loss; the attack starts at 0.001 N(0, 1)."""
    config = base.follow_up(data)
    config.method = "AT-BSL"
    config.loss = base.ConfigDict({"name": "logit_adjustment", "tau": 1.0})
    config.attack.start = "gaussian"
    return base.longer(config, data, 100, 75, 90, 100)
