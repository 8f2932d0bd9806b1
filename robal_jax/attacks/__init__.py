"""TODO attacks."""

from robal_jax.attacks.autopgd import apgd, targeted_apgd
from robal_jax.attacks.combined import multi_targeted, shortest_adversarial
from robal_jax.attacks.fab_attack import fab
from robal_jax.attacks.margins import (
    dlr,
    margin,
    negative_margin,
    of_class,
    ranked_class,
    targeted_dlr,
    targeted_margin,
)
from robal_jax.attacks.projected_gradient import loss_gradient, pgd, pgd_path, scaled
from robal_jax.attacks.square_attack import square
from robal_jax.attacks.threat import (
    NORMS,
    STARTS,
    Attack,
    LogitsFn,
    RandomLogitsFn,
    Start,
    ThreatModel,
    clean_start,
    gaussian_start,
    like_images,
    one_sided_start,
    starting_points,
    uniform_start,
)

__all__ = [
    "NORMS",
    "STARTS",
    "Attack",
    "LogitsFn",
    "RandomLogitsFn",
    "Start",
    "ThreatModel",
    "apgd",
    "clean_start",
    "dlr",
    "fab",
    "gaussian_start",
    "like_images",
    "loss_gradient",
    "margin",
    "multi_targeted",
    "negative_margin",
    "of_class",
    "one_sided_start",
    "pgd",
    "pgd_path",
    "ranked_class",
    "scaled",
    "shortest_adversarial",
    "square",
    "starting_points",
    "targeted_apgd",
    "targeted_dlr",
    "targeted_margin",
    "uniform_start",
]
