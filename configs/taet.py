"""TAET: clean images first, then adversarial training that makes the classes' losses equal.

Wang et al. (CVPR 2025). Not a row of RoBal's tables. Its figures are of images of 224 x 224 pixels and of a
long-tailed test set (IR 10, ResNet-18: 76.22 clean, 27.31 AA, means of the classes), so they are not
comparable:

    python experiments/train.py --config=configs/taet.py:cifar10_lt --workdir=runs/cifar10_lt/taet

Here images keep their size, and the test set is balanced. ``--config.attack.first_epoch=1`` attacks in the
first stage, too, as notes on the paper have it; the released code shows clean images.
"""

from configs import base


def get_config(data: str = "digits_lt") -> base.ConfigDict:
    """The released code: epochs 1 to 40 with the cross entropy, then HARL; ten steps of 0.003 at 0.031."""
    config = base.follow_up(data)
    config.method = "TAET"
    first = 25 if data == "digits_lt" else 41
    harl = {"name": "harl", "alpha": 0.1, "beta": 0.1, "gamma": 0.1}
    config.loss = base.ConfigDict({"name": "staged", "start": first})
    config.loss.first = base.ConfigDict({"name": "cross_entropy"})
    config.loss.then = base.ConfigDict(harl)
    config.attack.first_epoch = first
    config.attack.start = "gaussian"
    config.attack.batch_norm = "natural_first"
    if data in ("cifar10_lt", "cifar100_lt"):
        config.threat.epsilon = 0.031
        config.attack.step_size = 0.003 / 0.031 * config.threat.get_oneway_ref("epsilon")
    return base.longer(config, data, 100, 76, 91)
