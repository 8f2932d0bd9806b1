"""AT-AWP: AT at weights that are perturbed against it.

Wu et al. (NeurIPS 2020). Not a row of RoBal's tables. Published on balanced CIFAR-10: WideResNet-34-10, 53.97
AA:

    python experiments/train.py --config=configs/at_awp.py:cifar10_lt --workdir=runs/cifar10_lt/at_awp

The released code attacks in training mode and moves the running statistics in each step of the attack:
``--config.attack.batch_norm=batch_update_end --config.train.logged_passes=nat``. The running statistics are
then mostly those of half-made adversarial images, so it is not the default here. It also pads crops by
reflection and standardises the images in the network; this config does neither.
"""

from configs import base


def get_config(data: str = "digits_lt") -> base.ConfigDict:
    """Gamma = 0.01, 200 epochs; a start that is uniform and clamped."""
    config = base.follow_up(data)
    config.method = "AT-AWP"
    config.perturbation = base.ConfigDict({"name": "awp", "gamma": 0.01})
    config.attack.start = "uniform_clipped"
    if data in ("cifar10_lt", "cifar100_lt"):
        config.model = base.ConfigDict({"name": "preact_resnet18"})
    return base.longer(config, data, 200, 101, 151)
