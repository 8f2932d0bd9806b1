"""AT with one step from the image itself: FGSM (Goodfellow et al., ICLR 2015).

Not a row of RoBal's tables 1 to 4; table S8 of its supplement trains ResNet-50 on ImageNet-LT with it:

    python experiments/train.py --config=configs/fgsm.py:cifar10_lt --workdir=runs/cifar10_lt/fgsm

We do not have the published figures. The loss is that of the adversarial images alone; Goodfellow et al. add
that of the images themselves. FGSM may fail without a sign of it in its own loss (catastrophic overfitting,
Wong et al., ICLR 2020), so trust only the evaluation under PGD.
"""

from configs import base


def get_config(data: str = "digits_lt") -> base.ConfigDict:
    """One step of epsilon from the image itself; it follows ``--config.threat.epsilon``."""
    config = base.get_config(data)
    config.method = "FGSM-AT"
    config.attack.steps = 1
    config.attack.step_size = config.threat.get_oneway_ref("epsilon")
    config.attack.start = "clean"
    return config
