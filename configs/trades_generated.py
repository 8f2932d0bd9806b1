r"""TRADES with generated images, label smoothing and averaged weights (Wang et al., ICML 2023).

Not a row of RoBal's tables, and of balanced data only: on CIFAR-10 with 1 M images or more, WideResNet-28-10,
92.44 clean, 67.31 AA. Name the generated images:

    python experiments/train.py --config=configs/trades_generated.py:cifar10_lt \
        --workdir=runs/cifar10_lt/trades_generated \
        --config.generated.path=generated.npz --config.generated.share=0.7

Without them only the method's other parts are trained. The generated images are balanced, and the class
counts of losses are those of the mixture. In the first step of the released code batch norm takes the batch's
statistics whole (momentum 1), and it holds out 1,024 training images, on which it chooses the checkpoint by
PGD-40 on the margin; this config does neither. ``--config.train.held_out`` and ``--config.train.select=best``
choose one by PGD-10.
"""

from configs import base


def get_config(data: str = "digits_lt") -> base.ConfigDict:
    """Beta = 5, smoothing 0.1, EMA 0.995, Nesterov, one cycle, no decay of batch norm.

    The rate grows, and the average is a copy, for 2.5 % of the epochs. One cycle is for the CIFARs; the other
    data sets keep their own schedule.
    """
    config = base.follow_up(data)
    config.method = "TRADES with generated images"
    config.objective = base.ConfigDict({"name": "trades", "beta": 5.0, "batch_norm_order": "each_pass_once"})
    config.train.label_smoothing = 0.1
    config.attack.start = "uniform_clipped"
    config.attack.batch_norm = "batch"
    config.optimizer.nesterov = True
    config.optimizer.decayed = "not_batch_norm"
    config.average = base.ConfigDict({"name": "ema", "decay": 0.995})
    config.average.warmup = 0.025 * config.train.get_oneway_ref("epochs").to_float()
    config.evaluation.weights = "average"
    if data in ("cifar10_lt", "cifar100_lt"):
        config.model = base.ConfigDict({"name": "deepmind_wide_resnet", "depth": 28, "widen": 10})
        config.schedule = base.ConfigDict({"name": "one_cycle", "lr": 0.2, "pct_start": 0.025, "by": "epoch"})
        config.train.batch_norm_momentum = 0.01
        config.train.batch_size = 512
        config.train.epochs = 400
    if data == "cifar100_lt":  # as released; the network's own are CIFAR-10's
        config.model.mean, config.model.std = (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)
    return config
