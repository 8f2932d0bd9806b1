"""REAT: a balanced softmax, an attack that is balanced by what it has found, and a term of tail features.

Li, Xu, Zhang (arXiv:2307.10205). Not a row of RoBal's tables. The paper's figures could not be read; TAET's
table gives, for IR 10 and a long-tailed test set, 74.56 clean and 22.69 AA:

    python experiments/train.py --config=configs/reat.py:cifar10_lt --workdir=runs/cifar10_lt/reat

The attack's class weights follow how often each class was predicted in the last epoch. With running
statistics in the attack they change no adversarial image, because they only scale an image's own gradient;
they act with ``--config.attack.batch_norm=batch``, as in RobustLT's code. In the released code the divergence
between two features is a mean over the whole batch; ``--config.objective.tail_divergence=pair`` takes that of
each pair, which is most likely what is meant. It also trains on the last, smaller batch of an epoch, which is
left out here, and keeps the checkpoint that is best on the test set.
"""

from configs import base


def get_config(data: str = "digits_lt") -> base.ConfigDict:
    """The released code: 80 epochs, a start that is uniform in the ball."""
    config = base.follow_up(data)
    config.method = "REAT"
    config.loss = base.ConfigDict({"name": "logit_adjustment", "tau": 1.0})
    config.attack.loss = base.ConfigDict({"name": "rebalanced"})
    config.attack.start = "uniform"
    config.class_statistics.name = "predictions"
    config.objective = base.ConfigDict({"name": "pgd_at", "tail_weight": 1.0, "tail_divergence": "batch"})
    return base.longer(config, data, 80, 61, 76)
