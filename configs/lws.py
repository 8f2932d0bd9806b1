"""Learnable class scales (LWS) for the head of a trained AT.

RoBal table 1, "Learnable classifier scale" (WideResNet-34-10, last epoch):

    python experiments/train.py --config=configs/lws.py:cifar10_lt --workdir=runs/cifar10_lt/lws

    CIFAR-10-LT IR 50     clean 69.63   PGD-20 28.81   AA 27.99

It starts from the newest checkpoint of ``runs/cifar10_lt/at``; set ``--config.train.start_from`` to another.
"""

from configs import base


def get_config(data: str = "digits_lt") -> base.ConfigDict:
    """One trained scale per class; weights are not normalised and there is no bias, as released."""
    config = base.fine_tuned(data, sampler="class_aware", trainable="classifier/class_scale")
    config.method = "LWS"
    config.head = base.ConfigDict({"name": "tau_norm", "tau": 0.0, "learn_scale": True})
    return config
