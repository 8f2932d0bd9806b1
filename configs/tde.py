"""Features without the mean direction at inference (TDE).

RoBal table 1, "Feature disentangling" (WideResNet-34-10, last epoch):

    python experiments/train.py --config=configs/tde.py:cifar10_lt --workdir=runs/cifar10_lt/tde

    CIFAR-10-LT IR 50     clean 71.16   PGD-20 32.69   AA 30.48

Trained as a cosine classifier that keeps a running mean direction, which the evaluation removes. The released
config also removes it in the training attacks, unless it is edited as its README says.
"""

from configs import base


def get_config(data: str = "digits_lt") -> base.ConfigDict:
    """Alpha is 0 in training and 0.1 in the evaluation."""
    config = base.get_config(data)
    config.method = "TDE"
    config.head = base.ConfigDict({"name": "tde", "scale": 16.0, "gamma": 1 / 32, "alpha": 0.0})
    config.evaluation.head = base.ConfigDict({**config.head, "alpha": 0.1})
    return config
