"""Wrappers of the attack of an objective, and of the objective for its attack.

A wrapper has the arguments of an objective, see ``objectives``, and ``objective``, the one that it wraps.
"""

# ruff: noqa: D417 - the docstring of ``objectives`` describes the arguments that all objectives share

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import chex
import jax
import jax.numpy as jnp
import optax

from robal_jax import attacks, losses, models
from robal_jax.attacks import Attack, LogitsFn, ThreatModel
from robal_jax.keys import ALIGNMENT, fold_in
from robal_jax.objectives import Batch, Outcome

# Batch norm in the attack: running statistics; those of the attacked batch; these, and every image at which a
# gradient is taken moves the running ones; the same for the attack's result; running statistics that a
# training pass of the clean images has moved.
ATTACK_MODES = ("running", "batch", "batch_update", "batch_update_end", "natural_first")


def known(adversarial: chex.Array, *_: Any, **__: Any) -> chex.Array:
    """Returns images that an attack found before, in its place."""
    return adversarial


def delayed(
    logits_fn: LogitsFn,
    keys: chex.PRNGKey,
    images: chex.Array,
    labels: chex.Array,
    *,
    attack: Attack,
    begun: chex.Array,
    **settings: Any,
) -> chex.Array:
    """Attacks images if ``begun``; if not, returns them as they are and computes nothing."""
    return jax.lax.cond(begun, lambda: attack(logits_fn, keys, images, labels, **settings), lambda: images)


def natural_pass_first(
    model: models.Model,
    params: chex.ArrayTree,
    stats: chex.ArrayTree,
    batch: Batch,
    *,
    objective: Callable[..., tuple[chex.Array, Outcome]],
    momentum: float | None,
    **late: Any,
) -> tuple[chex.Array, Outcome]:
    """Lets a training pass of the clean images move the running statistics that an objective's attack sees.

    Args:
      objective: any.
      momentum: weight of a pass in the running statistics; None for the usual 0.1.
      **late: the objective's keyword arguments.

    Returns:
      The loss, and the objective's outcome with the moments of the pass.

    Source: the released code of TAET.
    """
    if late.get("attack") is not None and late["attack"].func is known:
        return objective(model, params, stats, batch, **late)
    moments = model.train(*jax.lax.stop_gradient((params, stats)), batch.images)[1]
    moved = models.update_statistics(stats, (moments,), momentum)
    value, outcome = objective(model, params, moved, batch, **late)
    return value, outcome._replace(attack_moments=(moments, *outcome.attack_moments))


def attacked_by_batch_statistics(
    model: models.Model,
    params: chex.ArrayTree,
    stats: chex.ArrayTree,
    batch: Batch,
    *,
    objective: Callable[..., tuple[chex.Array, Outcome]],
    **late: Any,
) -> tuple[chex.Array, Outcome]:
    """Lets an objective attack the model with the statistics of the attacked batch, which move nothing.

    The images of a batch are then coupled: what is found for one depends on the others.

    Args:
      objective: any; its attack sees training passes in place of the running statistics.
      **late: its keyword arguments.

    Source: the released code of RobustLT, and of Wang et al. (ICML 2023).
    """

    def predict(params: chex.ArrayTree, stats: chex.ArrayTree, images: chex.Array) -> chex.Array:
        return model.train(params, stats, images)[0]

    return objective(model._replace(predict=predict), params, stats, batch, **late)


def attack_moves_statistics(
    model: models.Model,
    params: chex.ArrayTree,
    stats: chex.ArrayTree,
    batch: Batch,
    *,
    objective: Callable[..., tuple[chex.Array, Outcome]],
    attack: partial,
    end: bool = False,
    **late: Any,
) -> tuple[chex.Array, Outcome]:
    """Lets an objective's attack make training passes, each of which moves the running statistics.

    Args:
      objective: one whose attack maximises the attack's own loss.
      attack: ``attacks.pgd`` with its keyword arguments bound, or :func:`known`. Every image at which it
        takes a gradient is a pass.
      end: whether the attack's result is one, too, besides the objective's own.
      **late: the objective's other keyword arguments.

    Returns:
      The loss, and the objective's outcome with the moments of the attack's passes.

    Source: the released code of AWP around adversarial training, and of CFA.
    """
    if attack.func is known:
        return objective(model, params, stats, batch, attack=attack, **late)
    fixed = jax.lax.stop_gradient((params, stats))
    path = attacks.pgd_iterates(
        lambda images: model.train(*fixed, images)[0], batch.keys, batch.images, batch.labels,
        **attack.keywords,
    )  # fmt: skip
    value, outcome = objective(model, params, stats, batch, attack=partial(known, path[-1]), **late)
    shown = path if end else path[:-1]
    stacked = jax.lax.map(lambda images: model.train(*fixed, images)[1], shown)
    passes = tuple(jax.tree.map(lambda x, i=i: x[i], stacked) for i in range(len(shown)))
    return value, outcome._replace(attack_moments=passes)


def aligned_gradients(
    model: models.Model,
    params: chex.ArrayTree,
    stats: chex.ArrayTree,
    batch: Batch,
    *,
    objective: Callable[..., tuple[chex.Array, Outcome]],
    weight: float,
    threat: ThreatModel,
    **late: Any,
) -> tuple[chex.Array, Outcome]:
    """GradAlign: adds how far the gradients at each image and at a random point of its ball are apart.

    ``weight * mean [1 - cos(grad_x CE(z(x), y), grad_x CE(z(x + u), y))]``, ``u`` uniform in the ball

    It keeps single-step adversarial training from overfitting to its own attack. The passes are training
    passes, which do not move the running statistics.

    Args:
      objective: any.
      weight: > 0; 0.2 for epsilon 8/255 on CIFAR-10 in the paper.
      threat: its epsilon holds for all images.
      **late: the objective's keyword arguments.

    Source: Andriushchenko and Flammarion (NeurIPS 2020), equation 5; gradients flow through both terms.
    """

    def total(images: chex.Array) -> chex.Array:
        return losses.cross_entropy(model.train(params, stats, images)[0], batch.labels).sum()

    unit = replace(threat, epsilon=1.0)
    origin, keys = jnp.zeros_like(batch.images), fold_in(batch.keys, ALIGNMENT)
    noise = attacks.starting_points(attacks.uniform_start, keys, origin, unit)
    here, there = (
        jax.grad(total)(x).reshape(len(noise), -1)
        for x in (batch.images, batch.images + threat.epsilon * noise)
    )
    apart = (1 - optax.losses.cosine_similarity(here, there, epsilon=1e-12)).mean()
    value, outcome = objective(model, params, stats, batch, **late)
    return value + weight * apart, outcome._replace(metrics={**outcome.metrics, "misalignment": apart})
