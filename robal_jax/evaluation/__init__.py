"""TODO evaluation."""

from robal_jax.evaluation.any_model import evaluate_model
from robal_jax.evaluation.findings import GALLERY_IMAGES, pixels_of, recompute, report
from robal_jax.evaluation.loop import MAIN_ATTACK, audited, conditions, ensemble, evaluate
from robal_jax.evaluation.run import Run, load_run
from robal_jax.evaluation.steps import (
    CONDITIONS,
    DISTANCE_TOLERANCE,
    Judged,
    attack_step,
    check,
    eval_step,
    judge,
    shown_step,
)

__all__ = [
    "CONDITIONS",
    "DISTANCE_TOLERANCE",
    "GALLERY_IMAGES",
    "MAIN_ATTACK",
    "Judged",
    "Run",
    "attack_step",
    "audited",
    "check",
    "conditions",
    "ensemble",
    "eval_step",
    "evaluate",
    "evaluate_model",
    "judge",
    "load_run",
    "pixels_of",
    "recompute",
    "report",
    "shown_step",
]
