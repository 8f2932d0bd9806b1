"""AT with deferred re-weighting (DRW) and deferred margins (DM).

Part of the released code without a row in the paper's tables:

    python experiments/train.py --config=configs/deferred.py:cifar10_lt --workdir=runs/cifar10_lt/deferred

``--config.loss.margins=False`` leaves DRW, ``--config.loss.reweight=False`` DM.
"""

from configs import base


def get_config(data: str = "digits_lt") -> base.ConfigDict:
    """Cross entropy; from epoch 40 on class weights and LDAM margins."""
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
