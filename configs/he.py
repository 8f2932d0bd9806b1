"""AT with a cosine classifier and a uniform margin (hypersphere embedding, HE).

RoBal tables 1 ("Cosine with margin") and 2 ("HE") (WideResNet-34-10, last epoch):

    python experiments/train.py --config=configs/he.py:cifar10_lt --workdir=runs/cifar10_lt/he

    CIFAR-10-LT IR 50     clean 58.47   PGD-20 31.73   CW-20 29.96   AA 28.45
    CIFAR-100-LT IR 10    clean 48.63   PGD-20 19.56   CW-20 19.20   AA 17.60

As released, attack and evaluation see the unscaled cosines, on which gradient attacks are weaker; also report
the evaluation with ``--config.evaluation.logit_scale=10``.
"""

from configs import base


def get_config(data: str = "digits_lt") -> base.ConfigDict:
    """Margin 0.2; scale 10 inside the loss only."""
    config = base.get_config(data)
    config.method = "HE"
    config.head = base.ConfigDict({"name": "cosine", "scale": 1.0, "gamma": 0.0})
    config.loss = base.ConfigDict({"name": "uniform_margin", "margin": 0.2, "scale": 10.0})
    return config
