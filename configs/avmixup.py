"""Adversarial vertex mixup.

RoBal table 2, "AVmixup" (WideResNet-34-10, last epoch):

    python experiments/train.py --config=configs/avmixup.py:cifar10_lt --workdir=runs/cifar10_lt/avmixup

    CIFAR-10-LT IR 50     clean 66.97   PGD-20 28.40   CW-20 26.43   AA 24.39
    CIFAR-100-LT IR 10    clean 52.45   PGD-20 19.04   CW-20 14.82   AA 12.60
"""

from configs import base


def get_config(data: str = "digits_lt") -> base.ConfigDict:
    """Vertex at twice the perturbation, label smoothing 1.0 and 0.1."""
    config = base.get_config(data)
    config.method = "AVmixup"
    config.objective = base.ConfigDict(
        {"name": "avmixup", "gamma": 2.0, "nat_confidence": 1.0, "vertex_confidence": 0.1}
    )
    return config
