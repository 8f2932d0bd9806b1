"""AT with the focal loss (hard-example mining).

RoBal table 1, "Hard-example mining" (WideResNet-34-10, last epoch):

    python experiments/train.py --config=configs/focal.py:cifar10_lt --workdir=runs/cifar10_lt/focal

    CIFAR-10-LT IR 50     clean 62.07   PGD-20 30.73   AA 28.12

Sigmoid form, with the bias that this form needs. The released warm-up compounds, so the rate ends at 0.0192
and stays there until the first milestone; ``--config.schedule.name=paper`` reaches 0.1.
"""

from configs import base


def get_config(data: str = "digits_lt") -> base.ConfigDict:
    """Gamma = 2; five epochs of warm-up."""
    config = base.get_config(data)
    config.method = "Focal"
    config.head = base.ConfigDict({"name": "linear", "bias": "prior"})
    config.loss = base.ConfigDict({"name": "focal", "gamma": 2.0})
    if data != "digits_lt":
        config.schedule.warmup = 5
    return config
