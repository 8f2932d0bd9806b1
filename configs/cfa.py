"""CFA: radii and weights of TRADES' terms by the robust accuracy of each class, and averaged weights.

Wei et al. (CVPR 2023). Not a row of RoBal's tables, and of balanced data only; its figures could not be read:

    python experiments/train.py --config=configs/cfa.py:cifar10_lt --workdir=runs/cifar10_lt/cfa

The released code measures a class's robust accuracy as K right / N, which on long-tailed data is the size of
the class; here it is right / n. Its average leaves out epochs of low accuracy of the worst class on held-out
images (FAWA); this one leaves out none. It pads crops by reflection and standardises the images in the
network; this config does neither. For AT: ``--config.objective.name=pgd_at
--config.attack.batch_norm=batch_update --config.attack.start=uniform_clipped``.
"""

from configs import base


def get_config(data: str = "digits_lt") -> base.ConfigDict:
    """The released TRADES: radii by class from epoch 11 on, steps of the common size, decay 0.88."""
    config = base.follow_up(data)
    config.method = "CFA"
    config.objective = base.ConfigDict({"name": "trades", "beta": 6.0, "by_radius": True})
    config.threat.budget = base.ConfigDict({"name": "cfa", "lambda1": 0.5, "start": 10})
    config.threat.scaled_steps = False
    config.attack.start = "gaussian"
    config.average = base.ConfigDict({"name": "per_epoch", "decay": 0.88})
    config.evaluation.weights = "average"
    config.train.logged_passes = "nat"
    if data in ("cifar10_lt", "cifar100_lt"):
        config.model = base.ConfigDict({"name": "preact_resnet18"})
    return base.longer(config, data, 200, 101, 151)
