"""The steps of an evaluation on one batch, as pure functions: they attack images and judge the result.

:func:`eval_step` makes the conditions of RoBal's tables, :func:`attack_step` one round of an ensemble,
:func:`closest_step` the closest adversarial images, and :func:`shown_step` judges images made elsewhere.
:func:`check` looks at the outcomes on the host.
"""

import itertools
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np

from robal_jax import attacks, checks, losses
from robal_jax.attacks import (
    LogitsFn,
    RandomLogitsFn,
    ThreatModel,
    autoattack,
    rounds,
    starting_points,
    uniform_start,
)
from robal_jax.attacks.threat import departure

CONDITIONS = ("clean", "fgsm", "pgd_5", "pgd_10", "pgd_20", "mim_20", "cw_20")
"""The clean images and the attacks with fixed steps, with their numbers of steps."""

Judged = dict[str, chex.Array]
"""``pred`` int32 ``[B]``; ``distance`` ``[B]``, in the threat model's norm; ``outside`` ``[B]``, how far
pixels are outside of its bounds; ``finite`` bool ``[B]``, whether the logits are."""


def judge(logits_fn: LogitsFn, shown: chex.Array, images: chex.Array, threat: ThreatModel) -> Judged:
    """Returns how the model classifies ``shown``, and how far it is from ``images`` and the bounds."""
    logits = checks.logits_of(len(shown), logits_fn(shown))
    return {
        "pred": jnp.argmax(logits, axis=-1).astype(jnp.int32),
        "distance": threat.distance(shown, images),
        "outside": threat.outside(shown),
        "finite": jnp.isfinite(logits).all(-1),
    }


def eval_step(
    logits_fn: LogitsFn,
    keys: chex.PRNGKey,
    images: chex.Array,
    labels: chex.Array,
    *,
    threat: ThreatModel,
    step_size: float | tuple[float, ...],
) -> dict[str, Judged]:
    """Makes all conditions of RoBal's tables for one batch.

    Args:
      logits_fn: the model that is attacked and judged.
      keys: ``[B]``, one per image.
      images: ``[B, H, W, C]`` in [0, 1].
      labels: ``[B]``.
      threat: what the attacks may do.
      step_size: of the iterated attacks; or one per class.

    Returns:
      How the model classifies the images of each of ``CONDITIONS``.

    Source: the attacks and their starts as in RoBal's released evaluation.
    """
    threat = threat.of(labels)
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
    """Runs one round of a stage of the ensemble on one batch.

    Args:
      logits_fn: the model.
      keys: ``[B]``.
      images: ``[B, H, W, C]`` in [0, 1].
      labels: ``[B]``.
      number: of the round, from 0.
      stage: of the ensemble.
      threat: what the attacks may do.
      random: whether the attack treats the model as random.

    Returns:
      ``images [B, H, W, C]``, and how the model classifies them.
    """
    keys = stage.keys(keys, number)
    model = (lambda x, keys: logits_fn(x)) if random else logits_fn
    shown = stage.attack(model, keys, images, labels, number)
    return {"images": shown, **judge(logits_fn, shown, images, threat)}


def with_bpda(
    ensemble: Sequence[autoattack.Stage],
    *,
    threat: ThreatModel,
    step_size: float | tuple[float, ...],
    random: bool = False,
) -> tuple[autoattack.Stage, ...]:
    """Returns the stages of an ensemble in which every attack that follows a gradient also runs with BPDA.

    First come the attacks with the model's own gradient, then PGD-20 and the same attacks with BPDA, and last
    Square, which follows no gradient. What BPDA breaks has therefore survived the model's own gradient.
    Attacks of the user's own are taken for ones that follow a gradient; those listed after Square stay there.
    PGD-20 has two rounds, on the cross-entropy and on the margin, which does not saturate in large logits.

    Args:
      ensemble: stages without BPDA.
      threat: what PGD-20 may do.
      step_size: of PGD-20; or one per class.
      random: whether the attacks treat the model as random.

    Example:
      >>> threat = ThreatModel(8 / 255)
      >>> stages = with_bpda(autoattack.stages("standard", 10, threat=threat), threat=threat, step_size=0.01)
      >>> print(*(stage.name for stage in stages))
      apgd_ce apgd_t fab_t pgd_20_bpda apgd_ce_bpda apgd_t_bpda fab_t_bpda square
    """

    def pgd(model: LogitsFn | RandomLogitsFn, keys: Any, x: Any, labels: Any, number: Any) -> chex.Array:
        def loss(logits: chex.Array, labels: chex.Array) -> chex.Array:
            either = losses.cross_entropy(logits, labels), attacks.negative_margin(logits, labels)
            return jnp.where(number == 0, *either)

        settings: dict[str, Any] = {"steps": 20, "step_size": step_size, "eot": int(random)}
        return attacks.pgd(model, keys, x, labels, threat=threat, loss=loss, **settings)

    def again(stages: Sequence[autoattack.Stage]) -> list[autoattack.Stage]:
        return [stage._replace(name=stage.name + autoattack.BPDA, bpda=True) for stage in stages]

    squares = [place for place, stage in enumerate(ensemble) if stage.name in autoattack.SQUARES]
    last = squares[-1] if squares else len(ensemble)
    late = [stage for stage in ensemble[last + 1 :] if stage.own]
    early = [
        stage
        for place, stage in enumerate(ensemble)
        if place not in squares and (place < last or not stage.own)
    ]
    ordered = [
        *early,
        *again([autoattack.Stage("pgd_20", pgd, 2, 1), *early]),
        # The rounds before the Square of 'standard' also run twice here, and PGD-20 has two.
        *(
            stage._replace(stream=2 * stage.stream + 1) if stage.stream else stage
            for stage in ensemble
            if stage.name in autoattack.SQUARES
        ),
        *late,
        *again(late),
    ]
    firsts = itertools.accumulate((stage.rounds for stage in ordered), initial=1)
    return tuple(stage._replace(first=first) for stage, first in zip(ordered, firsts, strict=False))


def closest_step(
    logits_fn: LogitsFn,
    keys: chex.PRNGKey,
    images: chex.Array,
    labels: chex.Array,
    *,
    name: str,
    threat: ThreatModel,
) -> Judged:
    """Returns how the model classifies the closest adversarial images of a minimum-norm attack.

    Args:
      logits_fn: the model.
      keys: ``[B]``.
      images: ``[B, H, W, C]`` in [0, 1].
      labels: ``[B]``.
      name: of the attack, a key of ``attacks.MINIMUM_NORM``.
      threat: its norm and bounds.
    """
    closest = attacks.MINIMUM_NORM[name](logits_fn, keys, images, labels, threat=threat)
    return judge(logits_fn, closest.images, images, threat)


def shown_step(
    logits_fn: LogitsFn,
    keys: chex.PRNGKey,
    images: chex.Array,
    labels: chex.Array,
    shown: chex.Array,
    *,
    threat: ThreatModel,
) -> Judged:
    """Returns how the model classifies given images ``[B, H, W, C]``, and by which margin.

    'margin' is the largest logit minus the second, as a part of the largest distance from the logits' mean,
    and of a hundredth of the largest logit, whose own rounding counts where all have an offset in common.
    """
    del keys, labels
    logits = logits_fn(shown)
    first, second = jax.lax.top_k(logits, 2)[0].T
    spread = jnp.abs(logits - logits.mean(-1, keepdims=True)).max(-1) + jnp.abs(logits).max(-1) / 100
    margin = (first - second) / jnp.maximum(spread, jnp.finfo(logits.dtype).tiny)
    return {**judge(lambda _: logits, shown, images, threat), "margin": margin}


def check(condition: str, judged: Mapping[str, np.ndarray], threat: ThreatModel, pixels: int = 1) -> None:
    """Refuses outcomes that no correct evaluation gives.

    Args:
      condition: name of the condition or of the attack.
      judged: its outcomes, see ``Judged``.
      threat: what the attacks may do; with one radius, or one per image.
      pixels: numbers per image.

    Raises:
      InputError: logits that are not finite, or an attack of the user's own left the threat model.
      RuntimeError: an image outside of the threat model.
    """
    far = departure(threat, judged["distance"], judged["outside"], pixels)
    rounds.require_allowed(condition, far)
    autoattack.require_finite(judged["finite"], condition)
    if far:
        raise RuntimeError(f"attack {condition} left the threat model: {far}")
