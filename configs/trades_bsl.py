"""TRADES with a balanced softmax in its natural loss.

Not a row of RoBal's tables, and of no paper that is known to us: the plainest way to give TRADES a prior of
the classes:

    python experiments/train.py --config=configs/trades_bsl.py:cifar10_lt --workdir=runs/cifar10_lt/trades_bsl
"""

from configs import base


def get_config(data: str = "digits_lt") -> base.ConfigDict:
    """Beta = 6; log counts are added to the natural logits in the loss, the divergence stays as it is."""
    config = base.follow_up(data)
    config.method = "TRADES-BSL"
    config.objective = base.ConfigDict({"name": "trades", "beta": 6.0})
    config.loss = base.ConfigDict({"name": "logit_adjustment", "tau": 1.0})
    config.attack.start = "gaussian"
    return config
