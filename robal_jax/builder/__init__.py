"""TODO builder."""

from robal_jax.builder.evaluation_job import Evaluation, evaluation, with_inference_of
from robal_jax.builder.instantiate import call
from robal_jax.builder.parts import dataset, model, objective, optimizer
from robal_jax.builder.ranges import RANGES, validate
from robal_jax.builder.training_job import Training, training

__all__ = [
    "RANGES",
    "Evaluation",
    "Training",
    "call",
    "dataset",
    "evaluation",
    "model",
    "objective",
    "optimizer",
    "training",
    "validate",
    "with_inference_of",
]
