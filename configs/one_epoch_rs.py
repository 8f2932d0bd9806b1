r"""One epoch of class-aware sampling for the head of a trained AT.

RoBal table 1, "One-epoch RS" (WideResNet-34-10, last epoch):

    python experiments/train.py --config=configs/one_epoch_rs.py:cifar10_lt \
      --workdir=runs/cifar10_lt/one_epoch_rs

    CIFAR-10-LT IR 50     clean 70.88   PGD-20 29.81   AA 28.59

It starts from the newest checkpoint of ``runs/cifar10_lt/at``; set ``--config.train.start_from`` to another.
"""

from configs import base


def get_config(data: str = "digits_lt") -> base.ConfigDict:
    """Only the head is trained; batch-norm statistics are updated, as released."""
    config = base.fine_tuned(data, sampler="class_aware", trainable="classifier")
    config.method = "One-epoch RS"
    return config
