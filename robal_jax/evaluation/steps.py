"""TODO evaluation.steps."""

from collections.abc import Mapping
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np

from robal_jax import attacks
from robal_jax.attacks import LogitsFn, ThreatModel, autoattack, starting_points, uniform_start
from robal_jax.errors import InputError
from robal_jax.keys import fold_in

CONDITIONS = ("clean", "fgsm", "pgd_5", "pgd_10", "pgd_20", "mim_20", "cw_20")

# |(x + e) - x| may exceed e by the rounding of two operations on numbers up to 2: 2 * 2^-23 each. In L2 these
# errors of the pixels add up as their squares do.
DISTANCE_TOLERANCE = 4 * 2.0**-23

Judged = dict[str, chex.Array]
"""``pred`` int32 ``[B]``; ``distance`` ``[B]``, in the threat model's norm; ``outside`` ``[B]``, how far
pixels lie outside of its bounds; ``finite`` bool ``[B]``, of the logits."""


def judge(logits_fn: LogitsFn, shown: chex.Array, images: chex.Array, threat: ThreatModel) -> Judged:
    """What the model makes of images that are shown instead of ``images``, and whether they may be."""
    logits, axes = logits_fn(shown), tuple(range(1, shown.ndim))
    return {
        "pred": jnp.argmax(logits, axis=-1).astype(jnp.int32),
        "distance": threat.distance(shown, images),
        "outside": jnp.maximum(threat.lower - shown.min(axes), shown.max(axes) - threat.upper),
        "finite": jnp.isfinite(logits).all(-1),
    }


def eval_step(
    logits_fn: LogitsFn,
    keys: chex.PRNGKey,
    images: chex.Array,
    labels: chex.Array,
    *,
    threat: ThreatModel,
    step_size: float,
) -> dict[str, Judged]:
    """All conditions of RoBal's tables for one batch.

    Args:
      logits_fn: the model as it is attacked and judged.
      keys: ``[B]``, one an image.
      images: ``[B, H, W, C]`` in [0, 1].
      labels: ``[B]``.
      threat: what the attacks may do.
      step_size: of the iterated attacks.

    Returns:
      What the model makes of the images of each of ``CONDITIONS``.

    Source: the attacks and their starts as in RoBal's released evaluation.
    """
    keys = jax.vmap(partial(jax.random.split, num=3))(keys)
    start = [starting_points(uniform_start, keys[:, i], images, threat) for i in range(3)]
    run = partial(attacks.pgd_path, logits_fn, images=images, labels=labels, threat=threat)
    fgsm = run(start=images, steps=(1,), step_size=threat.epsilon)
    pgd = run(start=start[0], steps=(5, 10, 20), step_size=step_size)
    mim = run(start=start[1], steps=(20,), step_size=step_size, momentum=1.0)
    cw = run(start=start[2], steps=(20,), step_size=step_size, loss=attacks.negative_margin)
    shown = jnp.concatenate([images[None], fgsm, pgd, mim, cw])
    judged = jax.lax.map(lambda x: judge(logits_fn, x, images, threat), shown)
    return {name: jax.tree.map(lambda x, i=i: x[i], judged) for i, name in enumerate(CONDITIONS)}


def attack_step(
    logits_fn: LogitsFn,
    keys: chex.PRNGKey,
    images: chex.Array,
    labels: chex.Array,
    *,
    number: chex.Array,
    stage: autoattack.Stage,
    threat: ThreatModel,
    random: bool = False,
) -> dict[str, chex.Array]:
    """One round of a stage of the ensemble for one batch.

    Args:
      logits_fn: the model.
      keys: ``[B]``.
      images: ``[B, H, W, C]`` in [0, 1].
      labels: ``[B]``.
      number: of the round, from 0.
      stage: of the ensemble.
      threat: what the attacks may do.
      random: whether the attack takes the model for a random one.

    Returns:
      ``images [B, H, W, C]``, and what the model makes of them.
    """
    keys = fold_in(keys, stage.first + number)
    model = (lambda x, keys: logits_fn(x)) if random else logits_fn
    shown = stage.attack(model, keys, images, labels, number)
    return {"images": shown, **judge(logits_fn, shown, images, threat)}


def shown_step(
    logits_fn: LogitsFn,
    keys: chex.PRNGKey,
    images: chex.Array,
    labels: chex.Array,
    shown: chex.Array,
    *,
    threat: ThreatModel,
) -> Judged:
    """What the model makes of given images ``[B, H, W, C]``."""
    del keys, labels
    return judge(logits_fn, shown, images, threat)


def check(outcomes: Mapping[str, np.ndarray], threat: ThreatModel, pixels: int = 1) -> None:
    """Refuses outcomes that no honest evaluation gives.

    Args:
      outcomes: arrays by ``field_condition``.
      threat: what the attacks may do.
      pixels: numbers in an image.

    Raises:
      InputError: logits that are not finite.
      RuntimeError: an image outside of the threat model.
    """
    tolerance = DISTANCE_TOLERANCE * (pixels**0.5 if threat.norm == "l2" else 1.0)
    for name, values in outcomes.items():
        field, _, condition = name.partition("_")
        if field == "finite" and not values.all():
            raise InputError(
                f"the model's logits are not finite for {np.sum(~values)} of {len(values)} images "
                f"({condition}), so no accuracy can be given; the checkpoint is not usable"
            )
        if (field == "distance" and values.max() > threat.epsilon + tolerance) or (
            field == "outside" and values.max() > 0
        ):
            raise RuntimeError(f"attack {condition} left the threat model: {field} {values.max()}")
