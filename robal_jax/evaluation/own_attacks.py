"""Attacks of the user's own in an evaluation: their contract, checked before any attack."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import numpy as np

from robal_jax import builder
from robal_jax.evaluation.optimality import attack_within
from robal_jax.evaluation.steps import attack_step


def check_own_attacks(job: builder.Evaluation, weights: Mapping[str, Any]) -> None:
    """Refuses an attack of the user's own that breaks its contract; nothing is computed.

    Args:
      job: the evaluation.
      weights: ``params`` and ``stats`` of the model.

    Raises:
      InputError: it fails on this model and its images, or does not return images, see ``rounds.own_round``.
    """
    size, shape = job.batch_size, jax.ShapeDtypeStruct
    batch = (
        jax.eval_shape(lambda: jax.random.split(jax.random.key(0), size)),
        shape((size, *job.test.images.shape[1:]), np.float32),
        shape((size,), np.int32),
    )
    for stage in job.ensemble:
        if not stage.own:
            continue
        predict = (job.replaced if stage.bpda else None) or job.predict
        model = partial(predict, weights["params"], weights["stats"])
        settings: dict[str, Any] = {"number": np.int32(0), "stage": stage, "threat": job.threat}
        jax.eval_shape(partial(attack_step, model, **settings), *batch)
        if job.optimality and not stage.bpda:  # with one radius per image
            jax.eval_shape(partial(attack_within, model, **settings), *batch, shape((size,), np.float32))
