"""AT: plain adversarial training (Madry et al., ICLR 2018) of a linear head with cross entropy.

RoBal tables 1 ("Vanilla FC") and 2 ("AT"), WideResNet-34-10, last epoch:

    python experiments/train.py --config=configs/at.py:cifar10_lt --workdir=runs/cifar10_lt/at

    CIFAR-10-LT IR 50     clean 62.33   PGD-20 29.30   CW-20 30.31
    CIFAR-100-LT IR 10    clean 48.96   PGD-20 17.26   CW-20 17.65
"""

from configs import base


def get_config(data: str = "digits_lt") -> base.ConfigDict:
    """The base config, unchanged."""
    return base.get_config(data)
