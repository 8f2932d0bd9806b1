"""AT with class-aware margins (LDAM).

RoBal table 1, "Class-aware margin" (WideResNet-34-10, last epoch):

    python experiments/train.py --config=configs/ldam.py:cifar10_lt --workdir=runs/cifar10_lt/ldam

    CIFAR-10-LT IR 50     clean 63.24   PGD-20 29.81   AA 28.70
"""

from configs import base


def get_config(data: str = "digits_lt") -> base.ConfigDict:
    """Margins up to 0.5 and no scaling, as released; the LDAM paper scales by 30."""
    config = base.get_config(data)
    config.method = "LDAM"
    config.loss = base.ConfigDict({"name": "ldam", "max_margin": 0.5, "scale": 1.0})
    return config
