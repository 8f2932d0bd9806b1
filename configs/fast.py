"""AT with one large step from a random start: FAST (Wong et al., ICLR 2020).

Not a row of RoBal's tables 1 to 4; table S8 of its supplement trains ResNet-50 on ImageNet-LT with it:

    python experiments/train.py --config=configs/fast.py:cifar10_lt --workdir=runs/cifar10_lt/fast

We do not have the published figures. Only the attack is that of FAST: the schedule is that of all methods
here, not FAST's short cyclic one, and the start is not clamped to [0, 1] before the gradient is taken.
"""

from configs import base


def get_config(data: str = "digits_lt") -> base.ConfigDict:
    """One step of 1.25 epsilon from a uniform start; it follows ``--config.threat.epsilon``."""
    config = base.get_config(data)
    config.method = "FAST"
    config.attack.steps = 1
    config.attack.step_size = 1.25 * config.threat.get_oneway_ref("epsilon")
    config.attack.start = "uniform"
    return config
