r"""Long-tailed self-distillation: AT-BSL that also follows a teacher trained on balanced images.

Cho, Lee, Kim (ICLR 2025). Not a row of RoBal's tables; the paper's tables could not be read, and its abstract
claims 20.3 points more under PGD on the tail of CIFAR-10-LT. Train ``balanced_teacher.py`` first:

    python experiments/train.py --config=configs/self_distilled.py:cifar10_lt \
        --workdir=runs/cifar10_lt/self_distilled

Assumptions: the paper's equations could not be read. Its reviews name a balanced softmax, distillation and
  indirect gradient matching. The weight of distillation is 1 and that of gradient matching 0, our choice;
  ``--config.objective.igdm=1`` adds it.
"""

from configs import base


def get_config(data: str = "digits_lt") -> base.ConfigDict:
    """A balanced softmax, and the divergence from the teacher's clean predictions."""
    config = base.follow_up(data)
    config.method = "Self-distillation"
    config.loss = base.ConfigDict({"name": "logit_adjustment", "tau": 1.0})
    config.objective = base.ConfigDict({"name": "distilled", "kd": 1.0, "igdm": 0.0})
    config.attack.start = "uniform"
    config.train.teacher = f"runs/{data}/balanced_teacher"
    return config
