"""Class-aware bias removed at inference (logit adjustment after training, LA-post).

RoBal table 1, "Class-aware bias", applied to a trained AT (WideResNet-34-10, last epoch):

    python experiments/evaluate.py --workdir=runs/cifar10_lt/at --config=configs/la_post.py:cifar10_lt

    CIFAR-10-LT IR 50     clean 74.25   PGD-20 31.95   AA 30.45
"""

from configs import base


def get_config(data: str = "digits_lt") -> base.ConfigDict:
    """Log prior subtracted from the logits in the evaluation; training is that of AT."""
    config = base.get_config(data)
    config.method = "LA-post"
    config.evaluation.tau_p = 1.0
    return config
