"""Adversarial logit pairing (ALP), and the released code's other regularisers.

Part of the released code:

    python experiments/train.py --config=configs/alp.py:cifar10_lt --workdir=runs/cifar10_lt/alp

``--config.objective.regulariser=alp_logits`` pairs logits instead of probabilities, ``norm`` keeps the
natural logits small, ``kl`` is RoBal's.
"""

from configs import base


def get_config(data: str = "digits_lt") -> base.ConfigDict:
    """Weights 1 (adversarial), 0.5 (natural) and 6 (regulariser)."""
    config = base.get_config(data)
    config.method = "ALP"
    config.objective = base.ConfigDict(
        {
            "name": "regularised",
            "regulariser": "alp",
            "beta_adv": 1.0,
            "beta_nat": 0.5,
            "beta_reg": 6.0,
            "batch_norm_order": "released",
        }
    )
    return config
