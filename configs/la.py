"""AT with a class-aware bias in the loss (logit adjustment, balanced softmax).

RoBal table 1, "Class-aware bias" (WideResNet-34-10, last epoch):

    python experiments/train.py --config=configs/la.py:cifar10_lt --workdir=runs/cifar10_lt/la

    CIFAR-10-LT IR 50     clean 74.46   PGD-20 32.45   AA 30.55

The head's own bias keeps its random initial value, as released; the paper describes a classifier without
bias: ``--config.head.bias=none``.
"""

from configs import base


def get_config(data: str = "digits_lt") -> base.ConfigDict:
    """Log prior added to the logits in the loss only."""
    config = base.get_config(data)
    config.method = "LA"
    config.head = base.ConfigDict({"name": "linear", "bias": "frozen"})
    config.loss = base.ConfigDict({"name": "logit_adjustment", "tau": 1.0})
    return config
