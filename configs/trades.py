"""TRADES.

RoBal table 2, "TRADES" (WideResNet-34-10, last epoch):

    python experiments/train.py --config=configs/trades.py:cifar10_lt --workdir=runs/cifar10_lt/trades

    CIFAR-10-LT IR 50     clean 54.29   PGD-20 30.20   CW-20 29.58   AA 28.94
    CIFAR-100-LT IR 10    clean 43.71   PGD-20 21.13   CW-20 19.49   AA 18.68

For L2, set ``--config.threat.norm=l2``, and epsilon and step sizes to match.
"""

from configs import base


def get_config(data: str = "digits_lt") -> base.ConfigDict:
    """Beta = 6, ten steps on the divergence from 0.001 N(0, 1)."""
    config = base.get_config(data)
    config.method = "TRADES"
    config.objective = base.ConfigDict({"name": "trades", "beta": 6.0, "batch_norm_order": "released"})
    config.attack.start = "gaussian"
    if data != "digits_lt":
        config.attack.steps = 10
    return config
