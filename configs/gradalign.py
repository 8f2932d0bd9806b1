"""GradAlign: FGSM that keeps the gradients within an image's ball aligned.

Andriushchenko and Flammarion (NeurIPS 2020). Not a row of RoBal's tables, and of balanced data only:

    python experiments/train.py --config=configs/gradalign.py:cifar10_lt --workdir=runs/cifar10_lt/gradalign

This is the paper's equation, whose gradients flow through both terms, with the start of Fast-AT. The released
code lets none flow through the gradient at the clean image, which saves a good part of the time, and its
GradAlign runs start at the clean image, from where a step of 1.25 epsilon is one of epsilon. Its attack is a
training pass. Of these differences the last two can be set: ``--config.attack.start=clean
--config.attack.batch_norm=batch_update``.
"""

from configs import base


def get_config(data: str = "digits_lt") -> base.ConfigDict:
    """One step of 1.25 epsilon from a uniform start; weight 0.2, the paper's for 8/255 on CIFAR-10."""
    config = base.follow_up(data)
    config.method = "GradAlign"
    config.attack.steps = 1
    config.attack.step_size = 1.25 * config.threat.get_oneway_ref("epsilon")
    config.attack.start = "uniform"
    config.attack.alignment = 0.2
    return config
