"""Max-margin adversarial training (MMA).

RoBal table 2, "MMA" (WideResNet-34-10, last epoch):

    python experiments/train.py --config=configs/mma.py:cifar10_lt --workdir=runs/cifar10_lt/mma

    CIFAR-10-LT IR 50     clean 61.51   PGD-20 29.29   CW-20 29.59   AA 25.91
    CIFAR-100-LT IR 10    clean 54.98   PGD-20 13.52   CW-20 12.35   AA 14.54

RoBal does not state its settings. Here the largest margin is 1.5 epsilon, and the weight is the MMA paper's.
"""

from configs import base


def get_config(data: str = "digits_lt") -> base.ConfigDict:
    """Cross entropy at the boundary, found by ten steps on the soft logit margin (ICLR 2020)."""
    config = base.get_config(data)
    config.method = "MMA"
    config.objective = base.ConfigDict(
        {
            "name": "mma",
            "max_epsilon": 1.5 * config.threat.get_oneway_ref("epsilon"),
            "nat_weight": 1 / 3,
            "search_steps": 10,
        }
    )
    config.attack.loss = base.ConfigDict({"name": "soft_logit_margin"})
    config.attack.start = "uniform"
    if data != "digits_lt":
        config.attack.steps = 10
    return config
