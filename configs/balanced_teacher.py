r"""The teacher of long-tailed self-distillation: AT on a balanced resample of the training set.

Cho, Lee, Kim (ICLR 2025); step 1 of ``self_distilled.py``. Not a row of RoBal's tables:

    python experiments/train.py --config=configs/balanced_teacher.py:cifar10_lt \
        --workdir=runs/cifar10_lt/balanced_teacher

Head classes are sub-sampled and tail classes repeated, so that each class has the mean number of images. The
paper's number is a hyper-parameter that could not be read (``--config.train.images_per_class``), and 30
epochs is a reviewer's figure. An epoch counts repeated images.
"""

from configs import base


def get_config(data: str = "digits_lt") -> base.ConfigDict:
    """AT with the cross entropy on a fixed set with the same number of images of each class."""
    config = base.follow_up(data)
    config.method = "Balanced teacher"
    config.train.sampler = "balanced"
    config.attack.start = "uniform"
    return base.longer(config, data, 30, 22, 27)
