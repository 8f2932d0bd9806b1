"""What a training step minimises: the only place where training methods differ.

An objective is a function ::

    objective(model, params, stats, images, labels, keys) -> (loss, Outcome)

of a :class:`~robal_jax.models.Model`, its parameters and running statistics, a batch in [0, 1] and one key an
image. It makes its own adversarial images, runs its training passes, and says in which order their
batch-norm moments are to be applied. Everything else it needs (attack, loss, weights) is closed over by
keyword. The step that differentiates it, updates and counts is the same for all, in ``train``.
"""

from collections.abc import Callable
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from robal_jax import losses
from robal_jax.attacks import Attack
from robal_jax.models import Model


class Outcome(NamedTuple):
    """What an objective returns beside its loss.

    Attributes:
      moments: batch-norm moments of the training passes, in the order in which they are applied.
      metrics: named scalars, means over the batch.
    """

    moments: tuple[chex.ArrayTree, ...]
    metrics: dict[str, chex.Array]


Objective = Callable[..., tuple[chex.Array, Outcome]]

BATCH_NORM_ORDERS = {"released": ("adv", "nat", "nat", "adv"), "each_pass_once": ("adv", "nat")}


def accuracy(logits: chex.Array, labels: chex.Array) -> chex.Array:
    """Share of the batch whose largest logit is the label's."""
    return jnp.mean(jnp.argmax(logits, axis=-1) == labels)


def adversarial_images(
    attack: Attack,
    model: Model,
    params: chex.ArrayTree,
    stats: chex.ArrayTree,
    images: chex.Array,
    labels: chex.Array,
    keys: chex.PRNGKey,
) -> chex.Array:
    """The attack's images against the current model with running statistics; no gradient flows through."""
    # Stopped here and not only at the attack's end: the loop inside must not be differentiated at all.
    params, stats = jax.lax.stop_gradient((params, stats))
    return attack(lambda x: model.predict(params, stats, x), keys, images, labels)


def pgd_at(
    model: Model,
    params: chex.ArrayTree,
    stats: chex.ArrayTree,
    images: chex.Array,
    labels: chex.Array,
    keys: chex.PRNGKey,
    *,
    attack: Attack,
    loss: losses.Loss,
) -> tuple[chex.Array, Outcome]:
    """Adversarial training: any loss on the attack's images.

    ``mean_b l(z(x'_b), y_b)``

    Args:
      model: the network.
      params: its parameters.
      stats: its running statistics; the attack sees these.
      images: ``x [B, H, W, C]`` in [0, 1].
      labels: ``y [B]``.
      keys: ``[B]``.
      attack: makes ``x'``.
      loss: per example.

    Returns:
      The loss, and one set of moments.

    Source: Madry et al. (ICLR 2018); RoBal's baseline AT.
    """
    adversarial = adversarial_images(attack, model, params, stats, images, labels, keys)
    logits, moments = model.train(params, stats, adversarial)
    value = loss(logits, labels).mean()
    return value, Outcome((moments,), {"adv_accuracy": accuracy(logits, labels)})


def robal(
    model: Model,
    params: chex.ArrayTree,
    stats: chex.ArrayTree,
    images: chex.Array,
    labels: chex.Array,
    keys: chex.PRNGKey,
    *,
    attack: Attack,
    loss: losses.Loss,
    beta_adv: float = 1.0,
    beta_nat: float = 0.0,
    beta_reg: float = 6.0,
    batch_norm_order: str = "released",
) -> tuple[chex.Array, Outcome]:
    """RoBal: a long-tail loss on the attack's images and a regulariser between both predictions.

    ``mean_b [beta_adv * l(z(x'), y) + beta_nat * CE(z(x), y) + beta_reg * KL(p(x) || p(x'))]``, p = softmax z

    The regulariser and the natural term see the model's own logits, the cosines unscaled where the head's
    scale is 1; gradients flow through both predictions.

    Args:
      model: the network.
      params: its parameters.
      stats: its running statistics; the attack sees these.
      images: ``x [B, H, W, C]`` in [0, 1].
      labels: ``y [B]``.
      keys: ``[B]``.
      attack: makes ``x'``.
      loss: ``l``, per example.
      beta_adv: weight of the adversarial term.
      beta_nat: weight of the natural cross entropy.
      beta_reg: weight of the regulariser.
      batch_norm_order: a key of ``BATCH_NORM_ORDERS``. 'released': the order of the four passes that the
        released code runs (adv, nat, nat, adv); 'each_pass_once': adv, nat. Both take two passes here.

    Returns:
      The loss, and the moments in that order.

    Source: RoBal (Wu et al., CVPR 2021); order of the passes: its released code.
    """
    adversarial = adversarial_images(attack, model, params, stats, images, labels, keys)
    logits_adv, moments_adv = model.train(params, stats, adversarial)
    logits_nat, moments_nat = model.train(params, stats, images)
    margin_loss = loss(logits_adv, labels).mean()
    natural_loss = losses.cross_entropy(logits_nat, labels).mean()
    regulariser = losses.kl_divergence(logits_nat, logits_adv).mean()
    value = beta_adv * margin_loss + beta_nat * natural_loss + beta_reg * regulariser
    moments = {"adv": moments_adv, "nat": moments_nat}
    metrics = {
        "adv_accuracy": accuracy(logits_adv, labels),
        "nat_accuracy": accuracy(logits_nat, labels),
        "adv_loss": margin_loss,
        "regulariser": regulariser,
    }
    return value, Outcome(tuple(moments[name] for name in BATCH_NORM_ORDERS[batch_norm_order]), metrics)


OBJECTIVES: dict[str, Objective] = {"pgd_at": pgd_at, "robal": robal}
