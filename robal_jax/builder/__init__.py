"""From a config to plain functions and values: the only folder that reads config fields.

- ``training_job``, ``evaluation_job``: all that a training or an evaluation needs, built and checked
- ``parts``: data set, model, optimizer, average and perturbation of the weights, budget, augmentation
- ``minimised``: the objective with its attack and losses
- ``training_images``: the images of a training: without those held out, with generated ones
- ``instantiate``: the function that a section names, with its arguments bound
- ``arguments``: arguments of these functions from the command line
- ``contracts``: what a function must take and return, checked with the shapes of a training step
- ``modules``: the same for backbones and heads
- ``doubtful``: warnings of a config that is valid but was probably not meant
- ``ranges``: which fields a config must have, and which values are allowed

A section with a ``name`` selects a function: one of the library's tables (``LOSSES``, ``HEADS``, ...), or
one of the user's own if the name has the form ``module:function``. The other keys of the section are keyword
arguments of the function. If it has parameters with the following names, it also receives values that are not
in its section::

    kind        section                          names
    data set    config.data                      none
    model       config.model                     convolution, axis_name
    head        config.head, .evaluation.head    num_classes, class_counts, axis_name
    loss        config.loss, .attack.loss        class_counts, axis_name, threat, epoch, class_statistics,
                                                 radius_factors
    objective   config.objective                 class_counts, axis_name, threat, loss, attack, epochs,
                                                 class_statistics, radius_factors, teacher
    statistics  config.class_statistics          class_counts
    schedule    config.schedule                  epochs (every schedule needs it), steps_per_epoch
    optimizer   config.optimizer                 schedule
    average     config.average                   steps_per_epoch
    augment     config.train.augmentation        pixel_max
    budget      config.threat, .evaluation       class_counts, epsilon

- ``class_counts``: training images per class ``[K]``, integers; with generated images those of the mixture,
  floats with the same sum, see ``data.generated.mixture_counts``; ``num_classes``: ``K``
- ``axis_name``: the mapped axis over which a batch is spread, or None
- ``convolution``: the implementation of convolutions for the platform, see ``models.convolutions``
- ``threat``: the ``ThreatModel`` of the training attack
- ``loss``, ``attack``: the functions of ``config.loss`` and ``config.attack``, bound
- ``epoch``: the current epoch, counted from 1, an integer array
- ``class_statistics``: what the training has gathered of the classes, arrays by name, before the step
- ``radius_factors``: radius of each image's attack as a multiple of epsilon, ``[B]``
- ``teacher``: ``images -> logits``, the network of ``config.train.teacher``
- ``epochs``: epochs of the whole run; ``steps_per_epoch``: with it, a schedule returns a rate per step
- ``schedule``: ``step -> learning rate``
"""

from robal_jax.builder.arguments import SECTIONS, with_arguments
from robal_jax.builder.doubtful import doubts, doubts_of_other, evaluation_doubts
from robal_jax.builder.evaluation_job import (
    Evaluation,
    evaluation,
    evaluation_on,
    with_data_at,
    with_inference_of,
    with_part_of,
    without_ensemble,
)
from robal_jax.builder.instantiate import call
from robal_jax.builder.minimised import objective
from robal_jax.builder.parts import (
    average,
    budget,
    class_statistics,
    dataset,
    gathered_arrays,
    model,
    optimizer,
    perturbation,
    standardisation,
)
from robal_jax.builder.ranges import RANGES, SELECTIONS, validate
from robal_jax.builder.training_job import Training, check, training

__all__ = [
    "RANGES",
    "SECTIONS",
    "SELECTIONS",
    "Evaluation",
    "Training",
    "average",
    "budget",
    "call",
    "check",
    "class_statistics",
    "dataset",
    "doubts",
    "doubts_of_other",
    "evaluation",
    "evaluation_doubts",
    "evaluation_on",
    "gathered_arrays",
    "model",
    "objective",
    "optimizer",
    "perturbation",
    "standardisation",
    "training",
    "validate",
    "with_arguments",
    "with_data_at",
    "with_inference_of",
    "with_part_of",
    "without_ensemble",
]
