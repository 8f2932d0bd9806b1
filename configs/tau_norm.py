"""Weight vectors normalised at inference (tau-norm).

RoBal table 1, "Classifier normalisation", applied to a trained AT (WideResNet-34-10, last epoch):

    python experiments/evaluate.py --workdir=runs/cifar10_lt/at --config=configs/tau_norm.py:cifar10_lt

    CIFAR-10-LT IR 50     clean 72.70   PGD-20 36.57   AA 29.77

The published PGD figure is a fake gain; compare AA. tau is 1 in the released config and 2 in the paper's
table S5.
"""

from configs import base


def get_config(data: str = "digits_lt") -> base.ConfigDict:
    """Unit weight vectors and no bias in the evaluation; training is that of AT."""
    config = base.get_config(data)
    config.method = "tau-norm"
    config.evaluation.head = base.ConfigDict({"name": "tau_norm", "tau": 1.0})
    config.evaluation.head.unit_features = (
        False  # True: also normalise the features, an option of the released code
    )
    return config
