"""Adversarial robustness under long-tailed data, in JAX.

The names below are resolved on first use, so that ``import robal_jax`` costs nothing and the command line
starts without JAX:

- :func:`evaluate_model`: attacks, AutoAttack, audit and report for any function from images to logits
- :func:`load_run`: a trained run as a function from images to logits
- :func:`load_model`: a model of the zoo as such a function, without data
- :func:`autoattack`: the ensemble alone, adversarial images and the outcome of every attack
- :func:`train`, :func:`evaluate`: what the scripts call, with a config
- the threat model, the attacks, the losses and the heads
- the rooms: ``robal_jax.attacks``, ``robal_jax.losses``, ...
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from robal_jax.attacks import ThreatModel as ThreatModel
    from robal_jax.attacks import apgd as apgd
    from robal_jax.attacks import bpda as bpda
    from robal_jax.attacks import ddn as ddn
    from robal_jax.attacks import dlr as dlr
    from robal_jax.attacks import fab as fab
    from robal_jax.attacks import fmn as fmn
    from robal_jax.attacks import multi_targeted as multi_targeted
    from robal_jax.attacks import negative_margin as negative_margin
    from robal_jax.attacks import pgd as pgd
    from robal_jax.attacks import scaled as scaled
    from robal_jax.attacks import square as square
    from robal_jax.attacks import targeted_apgd as targeted_apgd
    from robal_jax.attacks.autoattack import autoattack as autoattack
    from robal_jax.certificates import certified as certified
    from robal_jax.certificates import interval_bounds as interval_bounds
    from robal_jax.certificates import margin_bounds as margin_bounds
    from robal_jax.classifiers import CosineHead as CosineHead
    from robal_jax.classifiers import LinearHead as LinearHead
    from robal_jax.classifiers import TauNormHead as TauNormHead
    from robal_jax.classifiers import TDEHead as TDEHead
    from robal_jax.classifiers import TemperatureHead as TemperatureHead
    from robal_jax.classifiers import adjust_for_prior as adjust_for_prior
    from robal_jax.classifiers import cosine_logits as cosine_logits
    from robal_jax.classifiers import linear_logits as linear_logits
    from robal_jax.classifiers import tau_norm_logits as tau_norm_logits
    from robal_jax.classifiers import tde_logits as tde_logits
    from robal_jax.evaluation import evaluate as evaluate
    from robal_jax.evaluation import evaluate_model as evaluate_model
    from robal_jax.evaluation import load_run as load_run
    from robal_jax.losses import class_temperature as class_temperature
    from robal_jax.losses import cross_entropy as cross_entropy
    from robal_jax.losses import focal as focal
    from robal_jax.losses import ldam as ldam
    from robal_jax.losses import logit_adjustment as logit_adjustment
    from robal_jax.losses import robal as robal
    from robal_jax.losses import uniform_margin as uniform_margin
    from robal_jax.training import train as train
    from robal_jax.zoo import load_model as load_model

__version__ = "0.1.0"

_WHERE = {
    "attacks": (
        "ThreatModel", "apgd", "bpda", "ddn", "dlr", "fab", "fmn", "multi_targeted", "negative_margin",
        "pgd", "scaled", "square", "targeted_apgd",
    ),
    "attacks.autoattack": ("autoattack",),
    "certificates": ("certified", "interval_bounds", "margin_bounds"),
    "classifiers": (
        "CosineHead", "LinearHead", "TDEHead", "TauNormHead", "TemperatureHead", "adjust_for_prior",
        "cosine_logits", "linear_logits", "tau_norm_logits", "tde_logits",
    ),
    "evaluation": ("evaluate", "evaluate_model", "load_run"),
    "losses": (
        "class_temperature", "cross_entropy", "focal", "ldam", "logit_adjustment", "robal", "uniform_margin",
    ),
    "training": ("train",),
    "zoo": ("load_model",),
}  # fmt: skip
_ROOMS = (
    "attacks", "averages", "budgets", "builder", "certificates", "class_statistics", "classifiers", "cli",
    "compiling", "data", "devices", "distances", "errors", "evaluation", "exchange", "keys", "losses",
    "metrics", "models", "objectives", "optimizers", "perturbations", "pytorch", "regularisers", "reporting",
    "storage", "training", "zoo",
)  # fmt: skip
_NAMES = {name: room for room, names in _WHERE.items() for name in names}

__all__ = [*_NAMES, *_ROOMS]  # noqa: PLE0604


def __getattr__(name: str) -> Any:
    if name in _NAMES:
        return getattr(importlib.import_module(f"robal_jax.{_NAMES[name]}"), name)
    if name in _ROOMS:
        return importlib.import_module(f"robal_jax.{name}")
    raise AttributeError(f"module 'robal_jax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
