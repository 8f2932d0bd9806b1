"""Evaluation: attacks on test images, an audit of the attacks, and the report.

- ``steps``: the attacks on one batch, as pure functions
- ``victim``: the model under attack and its images, on all devices
- ``loop``: attacks, ensemble and audit in order, saved and resumed
- ``own_attacks``: what attacks of the user's own must do, checked before the first attack
- ``measurements``, ``verdicts``, ``ensemble_checks``: what the audit measures, and what it says
- ``explanations``, ``outcomes``, ``evidence``: the checks in words, their outcomes, and the tests behind them
- ``findings``: from what was found to the files of the report
- ``additions``: figures that are added to what is stored: ``corrupted``, the accuracy on corrupted images,
  ``certifying``, the certified accuracy, and ``optimality``, a comparison of the attacks
- ``any_model``, ``run``: the evaluation of any function, and a trained run as a function
"""

from robal_jax.attacks.threat import DISTANCE_TOLERANCE
from robal_jax.evaluation.any_model import evaluate_model
from robal_jax.evaluation.loop import evaluate
from robal_jax.evaluation.run import Run, load_run
from robal_jax.evaluation.steps import CONDITIONS, attack_step, check, eval_step

__all__ = [
    "CONDITIONS",
    "DISTANCE_TOLERANCE",
    "Run",
    "attack_step",
    "check",
    "eval_step",
    "evaluate",
    "evaluate_model",
    "load_run",
]
