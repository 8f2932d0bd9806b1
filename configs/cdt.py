"""AT with class-dependent temperatures in the loss (CDT).

RoBal table 1, "Class-aware temperature" (WideResNet-34-10, last epoch):

    python experiments/train.py --config=configs/cdt.py:cifar10_lt --workdir=runs/cifar10_lt/cdt

    CIFAR-10-LT IR 50     clean 73.11   PGD-20 30.12   AA 28.62
"""

from configs import base


def get_config(data: str = "digits_lt") -> base.ConfigDict:
    """Temperatures (n_max / n_i)^0.3, in the loss only."""
    config = base.get_config(data)
    config.method = "CDT"
    config.loss = base.ConfigDict({"name": "class_temperature", "tau": 0.3})
    return config
