"""RoBal-N: cosine classifier, margin-adjusted loss with uniform margin, KL regulariser, prior adjustment.

RoBal table 2 (WideResNet-34-10, last epoch; evaluated at scale 10 with tau_p = 0.1, CIFAR-100 1.5):

    python experiments/train.py --config=configs/robal_n.py:cifar10_lt --workdir=runs/cifar10_lt/robal_n

    CIFAR-10-LT IR 50     clean 75.52   PGD-20 33.50   CW-20 33.68
    CIFAR-100-LT IR 10    clean 51.63   PGD-20 19.01   CW-20 19.42

The head gives cosines (scale 1). The loss scales them by 10; the inner attack and the regulariser see them
unscaled, as in the released code.
"""

from configs import base

_LOSS = {
    "digits_lt": {"scale": 10.0, "margin": 0.1, "tau_m": 0.0, "tau_b": 1.2},
    "cifar10_lt": {"scale": 10.0, "margin": 0.1, "tau_m": 0.0, "tau_b": 1.2},
    "cifar100_lt": {"scale": 10.0, "margin": 0.2, "tau_m": 0.0, "tau_b": 0.0},
}


def get_config(data: str = "digits_lt") -> base.ConfigDict:
    """RoBal-N of the released configs; section 5.1 of the paper."""
    config = base.get_config(data)
    config.method = "RoBal-N"
    config.head = base.ConfigDict({"name": "cosine", "scale": 1.0, "gamma": 1 / 32, "eta": 1.0})
    config.loss = base.ConfigDict({"name": "robal", **_LOSS[base.constants_of(data)]})
    config.objective = base.ConfigDict(
        {
            "name": "regularised",
            "regulariser": "kl",
            "beta_adv": 1.0,
            "beta_nat": 0.0,
            "beta_reg": 6.0,
            "batch_norm_order": "released",
        }
    )
    config.evaluation.logit_scale = 10.0
    config.evaluation.tau_p = 0.1
    if base.constants_of(data) == "cifar100_lt":
        config.objective.beta_reg = 3.0
        config.evaluation.tau_p = 1.5
    return config
