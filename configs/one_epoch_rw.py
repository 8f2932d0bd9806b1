r"""One epoch of the class-balanced focal loss for a trained AT.

RoBal table 1, "One-epoch RW" (WideResNet-34-10, last epoch):

    python experiments/train.py --config=configs/one_epoch_rw.py:cifar10_lt \
      --workdir=runs/cifar10_lt/one_epoch_rw

    CIFAR-10-LT IR 50     clean 71.72   PGD-20 32.34   AA 28.25

It starts from the newest checkpoint of ``runs/cifar10_lt/at``; set ``--config.train.start_from`` to another.
The paper freezes the backbone (``--config.optimizer.trainable=classifier``); the released config does not.
"""

from configs import base, rw


def get_config(data: str = "digits_lt") -> base.ConfigDict:
    """The whole network is trained at the first rate, as released."""
    config = base.fine_tuned(data, sampler="uniform", trainable="")
    config.method = "One-epoch RW"
    config.loss = rw.get_config(data).loss
    return config
