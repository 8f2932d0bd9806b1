"""AT with a cosine classifier.

RoBal table 1, "Vanilla Cos" (WideResNet-34-10, last epoch):

    python experiments/train.py --config=configs/cos.py:cifar10_lt --workdir=runs/cifar10_lt/cos

    CIFAR-10-LT IR 50     clean 56.59   PGD-20 29.38   AA 27.23
"""

from configs import base


def get_config(data: str = "digits_lt") -> base.ConfigDict:
    """Scale 16 in training, attack and evaluation, as released."""
    config = base.get_config(data)
    config.method = "Cos"
    config.head = base.ConfigDict({"name": "cosine", "scale": 16.0, "gamma": 0.0})
    return config
