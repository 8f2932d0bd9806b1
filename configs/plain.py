"""Training without an adversary.

RoBal table 2, "Plain" (WideResNet-34-10, last epoch):

    python experiments/train.py --config=configs/plain.py:cifar10_lt --workdir=runs/cifar10_lt/plain

    CIFAR-10-LT IR 50     clean 77.16   PGD-20 0.00   CW-20 0.00
    CIFAR-100-LT IR 10    clean 62.29   PGD-20 0.00   CW-20 0.00
"""

from configs import base


def get_config(data: str = "digits_lt") -> base.ConfigDict:
    """Cross entropy on the images themselves."""
    config = base.get_config(data)
    config.method = "Plain"
    config.objective = base.ConfigDict({"name": "plain"})
    return config
