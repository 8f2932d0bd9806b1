"""AT with deferred re-weighting (DRW) and deferred margins (DM).

Part of the released code; the paper's tables have no such row:

    python experiments/train.py --config=configs/deferred.py:cifar10_lt --workdir=runs/cifar10_lt/deferred

``--config.loss.margins=False`` gives DRW alone, ``--config.loss.reweight=False`` DM alone.
"""

from configs import base


def get_config(data: str = "digits_lt") -> base.ConfigDict:
    """Cross entropy; class weights and LDAM margins from epoch 40 on."""
    config = base.get_config(data)
    config.method = "DRW + DM"
    config.loss = base.ConfigDict(
        {
            "name": "deferred",
            "base": {"name": "cross_entropy"},
            "start": 40,  # epoch, counted from 1
            "beta": 0.9999,
            "max_margin": 0.5,
            "reweight": True,
            "margins": True,
        }
    )
    return config
