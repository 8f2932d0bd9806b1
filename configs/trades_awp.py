"""TRADES-AWP: TRADES at weights that are perturbed against it.

Wu et al. (NeurIPS 2020). Not a row of RoBal's tables. Published on balanced CIFAR-10: WideResNet-34-10, 85.36
clean, 56.17 AA:

    python experiments/train.py --config=configs/trades_awp.py:cifar10_lt --workdir=runs/cifar10_lt/trades_awp
"""

from configs import base


def get_config(data: str = "digits_lt") -> base.ConfigDict:
    """Beta = 6, gamma = 0.005 from epoch 10 on, 200 epochs, the released order of the passes."""
    config = base.follow_up(data)
    config.method = "TRADES-AWP"
    config.objective = base.ConfigDict({"name": "trades", "beta": 6.0, "batch_norm_order": "adv,nat,nat"})
    config.attack.start = "gaussian"
    config.perturbation = base.ConfigDict({"name": "awp", "gamma": 0.005, "start": 10})
    if data in ("cifar10_lt", "cifar100_lt"):
        config.model = base.ConfigDict({"name": "wide_resnet", "depth": 34, "widen": 10})
    return base.longer(config, data, 200, 100, 150)
