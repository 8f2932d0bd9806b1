"""AT with class-aware sampling (re-sampling).

RoBal table 1, "Re-sampling" (WideResNet-34-10, last epoch):

    python experiments/train.py --config=configs/rs.py:cifar10_lt --workdir=runs/cifar10_lt/rs

    CIFAR-10-LT IR 50     clean 58.62   PGD-20 25.06   AA 24.25

An epoch draws max_i n_i * K images, 50,000 on CIFAR-10-LT.
"""

from configs import base


def get_config(data: str = "digits_lt") -> base.ConfigDict:
    """Class-aware sampling, 25 epochs."""
    config = base.get_config(data)
    config.method = "RS"
    config.train.sampler = "class_aware"
    config.train.epochs = 25
    config.schedule.milestones = (15, 20)
    return config
