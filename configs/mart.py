"""MART, as its own paper defines it.

Not a row of RoBal's tables, because the regulariser of this name in the released code cannot run:

    python experiments/train.py --config=configs/mart.py:cifar10_lt --workdir=runs/cifar10_lt/mart
"""

from configs import base


def get_config(data: str = "digits_lt") -> base.ConfigDict:
    """Lambda = 5, ten steps from 0.001 N(0, 1) (Wang et al., ICLR 2020)."""
    config = base.get_config(data)
    config.method = "MART"
    config.objective = base.ConfigDict({"name": "mart", "beta": 5.0})
    config.attack.start = "gaussian"
    if data != "digits_lt":
        config.attack.steps = 10
    return config
