"""AT with the class-balanced focal loss (re-weighting).

RoBal table 1, "Re-weighting" (WideResNet-34-10, last epoch):

    python experiments/train.py --config=configs/rw.py:cifar10_lt --workdir=runs/cifar10_lt/rw

    CIFAR-10-LT IR 50     clean 64.33   PGD-20 34.53   AA 29.01
"""

from configs import base


def get_config(data: str = "digits_lt") -> base.ConfigDict:
    """Class weights by the effective number of images, beta = 0.9999."""
    config = base.get_config(data)
    config.method = "RW"
    config.loss = base.ConfigDict({"name": "class_balanced_focal", "beta": 0.9999, "gamma": 2.0})
    return config
