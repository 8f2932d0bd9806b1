"""DAFA: TRADES with radii and weights that hard classes take from the easy classes that resemble them.

Lee et al. (ICLR 2024). Not a row of RoBal's tables, and of balanced data only; its figures could not be read:

    python experiments/train.py --config=configs/dafa.py:cifar10_lt --workdir=runs/cifar10_lt/dafa

On long-tailed data the weights also measure the sizes of the classes. For AT:
``--config.objective.name=pgd_at --config.objective.batch_norm_order=released``; the released AT makes a
second step in each iteration, within the common radius, so that no class gets a larger ball:
``--config.attack.second_step=True``.
"""

from configs import base


def get_config(data: str = "digits_lt") -> base.ConfigDict:
    """Measured once, in epoch 70 of 110; beta = 6, and only the cross entropy is weighted."""
    config = base.follow_up(data)
    config.method = "DAFA"
    config.objective = base.ConfigDict({"name": "trades", "beta": 6.0, "batch_norm_order": "adv,nat"})
    config.loss = base.ConfigDict({"name": "weighted_by_radius"})
    config.loss.base = base.ConfigDict({"name": "cross_entropy"})
    scale = 1.5 if base.constants_of(data) == "cifar100_lt" else 1.0
    config.threat.budget = base.ConfigDict({"name": "dafa", "scale": scale, "epoch": 70})
    config.attack.start = "gaussian"
    config.optimizer.nesterov = True
    if data in ("cifar10_lt", "cifar100_lt"):
        config.model = base.ConfigDict({"name": "wide_resnet", "depth": 28, "widen": 10})
        config.threat.epsilon = 0.031
        config.attack.step_size = 0.007 / 0.031 * config.threat.get_oneway_ref("epsilon")
    if data == "digits_lt":
        config.threat.budget.epoch = 38
    if data == "imagenet_lt":
        config.threat.budget.epoch = 57
    return base.longer(config, data, 110, 100, 105)
