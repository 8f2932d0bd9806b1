"""Class-dependent re-scaling of the logits at inference (CDT-post).

RoBal table 1, "Classifier re-scaling", applied to a trained AT (WideResNet-34-10, last epoch):

    python experiments/evaluate.py --workdir=runs/cifar10_lt/at --config=configs/cdt_post.py:cifar10_lt

    CIFAR-10-LT IR 50     clean 73.84   PGD-20 39.05   AA 28.23

The published PGD figure is a fake gain: the logits are ten times smaller. Compare AA.
"""

from configs import base


def get_config(data: str = "digits_lt") -> base.ConfigDict:
    """Logits divided by n_i^0.3 in the evaluation; training is that of AT."""
    config = base.get_config(data)
    config.method = "CDT-post"
    config.evaluation.head = base.ConfigDict({"name": "class_temperature", "tau": 0.3, "posthoc": True})
    return config
