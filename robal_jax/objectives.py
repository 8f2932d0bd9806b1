"""Training objectives: the only place where training methods differ.

An objective is a function ::

    objective(model, params, stats, batch, *, ...) -> (loss, Outcome)

It makes its own adversarial images, runs its training passes, and returns the moments of these passes in the
order in which they are applied. The step in ``training`` differentiates it, updates the parameters and is the
same for all objectives. The positional arguments are also the same for all:

- ``model``, ``params``, ``stats``: a :class:`~robal_jax.models.Model`, its parameters, and its running
  statistics, which the attack uses;
- ``batch``: a :class:`Batch` ``x [B, H, W, C]``, ``y [B]``; all means are over the batch.

Keyword arguments are settings of the config, except for these names, which ``builder.minimised`` binds for
every objective that asks for them:

- ``attack``: ``(logits_fn, keys, x, y) -> x'``, the inner attack;
- ``loss``: ``l(z, y) [B]``, the loss of the config;
- ``class_counts``: training images per class ``[K]``;
- ``threat``: the :class:`~robal_jax.attacks.ThreatModel` of the config;
- ``axis_name``: mapped axis over which the batch is spread, or None;
- ``epochs``: epochs of the whole run;
- ``class_statistics``: what the training has gathered of the classes, arrays by name;
- ``radius_factors``: radius of each image's attack as a multiple of the common one, ``[B]``;
- ``teacher``: ``images -> logits [B, K]`` of the network that teaches, with its running statistics.

In the equations ``z(x)`` are the logits and ``p = softmax(z)``. The docstring of an objective lists only its
settings, and the order of the moments in its :class:`Outcome`.
"""

# ruff: noqa: D417 - the docstring above describes the arguments that all objectives share

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from robal_jax import attacks, budgets, losses, models, regularisers
from robal_jax.attacks import Attack, LogitsFn, ThreatModel
from robal_jax.keys import MIXING, fold_in


class Batch(NamedTuple):
    """One device's part of the batch of a training step.

    Attributes:
      images: ``[B, H, W, C]`` in [0, 1].
      labels: ``[B]``, integers in ``0..K-1``.
      keys: ``[B]``, one key per image.
      epoch: number of the epoch, counted from 1, for losses that change during training.
    """

    images: chex.Array
    labels: chex.Array
    keys: chex.PRNGKey
    epoch: chex.Numeric


class Partners(NamedTuple):
    """The second label of images that are mixed from two.

    Attributes:
      labels: ``[B]``.
      share: ``[B]`` in [0, 1], of the image's own label.
    """

    labels: chex.Array
    share: chex.Array


class Known(NamedTuple):
    """What a step knows besides its batch, and tells its objective, the loss and the attack.

    Attributes:
      radii: ``[B]``, of the images' attacks; None for the threat model's.
      partners: of images that are mixed from two; None for images as they are.
      adversarial: ``[B, H, W, C]``, found before by the attack; None if it is still to run.
      classes: what the training has gathered of the classes, arrays by name; None for nothing.
      teacher: ``params`` and ``stats`` of the network that teaches; None for no teacher.
    """

    radii: chex.Array | None = None
    partners: Partners | None = None
    adversarial: chex.Array | None = None
    classes: dict[str, chex.Array] | None = None
    teacher: dict[str, chex.ArrayTree] | None = None


NOTHING_KNOWN = Known()


class Attacked(NamedTuple):
    """What an objective's attack found.

    Attributes:
      images: ``[B, H, W, C]``.
      logits: ``[B, K]`` of these images in the training pass; None if there is no such pass.
    """

    images: chex.Array
    logits: chex.Array | None


class Outcome(NamedTuple):
    """Results of an objective besides its loss.

    Attributes:
      moments: of the training passes (batch norm's and the head's), in the order in which they are applied.
      metrics: named scalars, means over the batch.
      attacked: what the attack found. If it is None, perturbed weights (AWP) are attacked anew.
      attack_moments: of passes of the attack that move the running statistics, before ``moments``.
    """

    moments: tuple[chex.ArrayTree, ...]
    metrics: dict[str, chex.Array]
    attacked: Attacked | None = None
    attack_moments: tuple[chex.ArrayTree, ...] = ()


Objective = Callable[[models.Model, chex.ArrayTree, chex.ArrayTree, Batch], tuple[chex.Array, Outcome]]

BATCH_NORM_ORDERS = ("released", "each_pass_once")
"""Order of the training passes: as in the released code, or each pass once. Objectives take a list, too, of
nat and adv, such as 'adv,nat,nat': the passes that move the running statistics, one after the other."""


def in_order(
    order: str, released: tuple[str, ...], moments: dict[str, chex.ArrayTree]
) -> tuple[chex.ArrayTree, ...]:
    """Returns moments in the order of ``BATCH_NORM_ORDERS``.

    Args:
      order: one of them, or a list of passes.
      released: passes in the released order.
      moments: of each pass, in the order of 'each_pass_once'.
    """
    if order == "each_pass_once":
        return tuple(moments.values())
    return tuple(moments[name] for name in (released if order == "released" else order.split(",")))


def accuracy(logits: chex.Array, labels: chex.Array) -> chex.Array:
    """Share of the batch in which the label has the largest logit."""
    return jnp.mean(jnp.argmax(logits, axis=-1) == labels)


def passes(
    model: models.Model, params: chex.ArrayTree, stats: chex.ArrayTree, *shown: chex.Array
) -> list[tuple[chex.Array, chex.ArrayTree]]:
    """Makes a training pass of each of several batches, ``[B, H, W, C]`` each.

    An accelerator makes them as one, with the statistics of each batch: half the operations and transfers.

    Returns:
      Logits and moments of each batch.
    """
    if not model.joint:
        return [model.train(params, stats, images) for images in shown]
    found = jax.vmap(partial(model.train, params, stats))(jnp.stack(shown))
    return [jax.tree.map(lambda x, i=i: x[i], found) for i in range(len(shown))]


def as_attacked(model: models.Model, params: chex.ArrayTree, stats: chex.ArrayTree) -> LogitsFn:
    """Returns the current model with its running statistics; no gradient flows back to it."""
    # Stopped here and not only after the attack, so that the attack's loop is not differentiated at all.
    params, stats = jax.lax.stop_gradient((params, stats))
    params, stats = model.ready(params, stats)  # once, not in every step of the attack
    return lambda images: model.predict(params, stats, images)


def adversarial_images(
    attack: Attack, model: models.Model, params: chex.ArrayTree, stats: chex.ArrayTree, batch: Batch
) -> chex.Array:
    """Attacks the images of the batch with the current model."""
    return attack(as_attacked(model, params, stats), batch.keys, batch.images, batch.labels)


def plain(
    model: models.Model, params: chex.ArrayTree, stats: chex.ArrayTree, batch: Batch, *, loss: losses.Loss
) -> tuple[chex.Array, Outcome]:
    """Training without an adversary.

    ``mean l(z(x), y)``

    Returns:
      The loss, and the moments of the one pass.
    """
    logits, moments = model.train(params, stats, batch.images)
    metrics = {"nat_accuracy": accuracy(logits, batch.labels)}
    return loss(logits, batch.labels).mean(), Outcome((moments,), metrics)


def pgd_at(
    model: models.Model,
    params: chex.ArrayTree,
    stats: chex.ArrayTree,
    batch: Batch,
    *,
    attack: Attack,
    loss: losses.Loss,
    class_counts: chex.Array | None = None,
    batch_norm_order: str = "released",
    tail_weight: float = 0.0,
    tail_divergence: str = "batch",
    axis_name: str | None = None,
) -> tuple[chex.Array, Outcome]:
    """Adversarial training: any loss on the attack's images.

    ``mean l(z(x'), y) + tail_weight * TAIL(f(x'), y)``

    The attack may maximise a different loss; if it maximises the same long-tail loss, this is the released
    mode 'inner_loss'.

    Args:
      batch_norm_order: 'released': adv; or a list. 'adv,nat' adds a pass that no loss reads, as RobustLT's
        code does around a balanced softmax.
      tail_weight: of :func:`regularisers.tail_features` of the features ``f(x')``; 1 in REAT.
      tail_divergence: see there.

    Returns:
      The loss, and the moments in that order.

    Source: Madry et al. (ICLR 2018), RoBal's baseline AT; the second term: REAT (arXiv:2307.10205).
    """
    adversarial = adversarial_images(attack, model, params, stats, batch)
    if tail_weight:
        logits, features, moments = model.train_features(params, stats, adversarial)
    else:
        logits, moments = model.train(params, stats, adversarial)
    value, metrics = loss(logits, batch.labels).mean(), {"adv_accuracy": accuracy(logits, batch.labels)}
    if tail_weight:
        metrics["tail_features"] = regularisers.tail_features(
            features, batch.labels, class_counts=class_counts, divergence=tail_divergence, axis_name=axis_name
        )
        value = value + tail_weight * metrics["tail_features"]
    once = {"adv": moments}
    if "nat" in batch_norm_order.split(","):
        once["nat"] = model.train(params, stats, batch.images)[1]
    moments = in_order(batch_norm_order, ("adv",), once)
    return value, Outcome(moments, metrics, Attacked(adversarial, logits))


def distilled(
    model: models.Model,
    params: chex.ArrayTree,
    stats: chex.ArrayTree,
    batch: Batch,
    *,
    attack: Attack,
    loss: losses.Loss,
    teacher: LogitsFn,
    epochs: int,
    kd: float = 1.0,
    igdm: float = 0.0,
) -> tuple[chex.Array, Outcome]:
    """Adversarial training that also follows a teacher: its predictions, and how they change with the image.

    ``mean [l(z(x'), y) + kd * KL(p_t(x) || p(x')) + igdm * epoch / epochs * KL(q_t || q)]``,
    ``q = softmax(z(x + d) - z(x - d))``, ``d = x' - x``

    ``p_t`` and ``q_t`` are those of the teacher. It has the student's architecture, and ``x - d`` may leave
    the range of pixels.

    Args:
      kd: weight of the divergence from the teacher's predictions.
      igdm: weight of indirect gradient matching, at the end; 0 for none.

    Returns:
      The loss, and the moments of the passes adv, and x - d with gradient matching.

    Source: long-tailed self-distillation (Cho et al., ICLR 2025) names balanced softmax, distillation and
    gradient matching, according to its reviews; the paper itself could not be read. The form of gradient
    matching is that of Lee et al. (arXiv:2312.03286). The weights 1 and 0 are our choice.
    """
    adversarial = adversarial_images(attack, model, params, stats, batch)
    adv, moments = model.train(params, stats, adversarial)
    distance = losses.kl_divergence(teacher(batch.images), adv).mean()
    value, passes = loss(adv, batch.labels).mean() + kd * distance, [moments]
    metrics = {"adv_accuracy": accuracy(adv, batch.labels), "distillation": distance}
    if igdm:
        opposite = 2 * batch.images - adversarial
        logits, moments = model.train(params, stats, opposite)
        change, passes = teacher(adversarial) - teacher(opposite), [*passes, moments]
        metrics["gradient_matching"] = losses.kl_divergence(change, adv - logits).mean()
        value = value + igdm * batch.epoch / epochs * metrics["gradient_matching"]
    return value, Outcome(tuple(passes), metrics, Attacked(adversarial, adv))


def kl_regulariser(nat: chex.Array, adv: chex.Array, *, axis_name: str | None = None) -> chex.Array:
    """``mean KL(p(x) || p(x'))``, the regulariser of RoBal."""
    del axis_name
    return losses.kl_divergence(nat, adv).mean()


def alp_regulariser(nat: chex.Array, adv: chex.Array, *, axis_name: str | None = None) -> chex.Array:
    """``||p(x') - p(x)|| / B``, the norm over the whole batch: adversarial logit pairing of probabilities."""
    return _norm_over_size(jax.nn.softmax(adv) - jax.nn.softmax(nat), axis_name)


def alp_logits_regulariser(nat: chex.Array, adv: chex.Array, *, axis_name: str | None = None) -> chex.Array:
    """``||z(x') - z(x)|| / B``, the norm over the whole batch: adversarial logit pairing."""
    return _norm_over_size(adv - nat, axis_name)


def norm_regulariser(nat: chex.Array, adv: chex.Array, *, axis_name: str | None = None) -> chex.Array:
    """``||z(x)|| / B``, the norm over the whole batch: small natural logits."""
    del adv
    return _norm_over_size(nat, axis_name)


def _norm_over_size(x: chex.Array, axis_name: str | None) -> chex.Array:
    """``||x|| / B`` over all devices' parts of a batch; its gradient at 0 is 0."""
    total, size = jnp.sum(jnp.square(x)), x.shape[0]
    if axis_name is not None:
        total, size = jax.lax.psum(total, axis_name), size * jax.lax.axis_size(axis_name)
    return jnp.sqrt(jnp.maximum(total, jnp.finfo(total.dtype).tiny)) / size


# Each with the training passes that the released code runs for it, after one of x' and one of x.
REGULARISERS: dict[str, tuple[Callable[..., chex.Array], tuple[str, ...]]] = {
    "kl": (kl_regulariser, ("nat", "adv")),
    "alp": (alp_regulariser, ("nat", "adv")),
    "alp_logits": (alp_logits_regulariser, ("nat", "adv")),
    "norm": (norm_regulariser, ("nat",)),
}


def regularised(
    model: models.Model,
    params: chex.ArrayTree,
    stats: chex.ArrayTree,
    batch: Batch,
    *,
    attack: Attack,
    loss: losses.Loss,
    regulariser: str = "kl",
    beta_adv: float = 1.0,
    beta_nat: float = 0.0,
    beta_reg: float = 6.0,
    batch_norm_order: str = "released",
    axis_name: str | None = None,
) -> tuple[chex.Array, Outcome]:
    """RoBal: a long-tail loss on the attack's images and a regulariser between both predictions.

    ``mean [beta_adv * l(z(x'), y) + beta_nat * CE(z(x), y)] + beta_reg * R(z(x), z(x'))``

    The regulariser and the natural term use the model's own logits, which are unscaled cosines if the head's
    scale is 1. Gradients flow through both predictions.

    Args:
      regulariser: ``R``, a key of ``REGULARISERS``.
      beta_adv: weight of the adversarial term.
      beta_nat: weight of the natural cross entropy.
      beta_reg: weight of the regulariser.
      batch_norm_order: 'released': adv, nat, and then the regulariser's passes; 'each_pass_once': adv, nat;
        or a list. All compute two passes.

    Returns:
      The loss, and the moments in that order.

    Source: RoBal (Wu et al., CVPR 2021), and the other regularisers of its released code.
    """
    adversarial = adversarial_images(attack, model, params, stats, batch)
    (adv, moments_adv), (nat, moments_nat) = passes(model, params, stats, adversarial, batch.images)
    function, more_passes = REGULARISERS[regulariser]
    adv_loss = loss(adv, batch.labels).mean()
    nat_loss = losses.cross_entropy(nat, batch.labels).mean()
    distance = function(nat, adv, axis_name=axis_name)
    value = beta_adv * adv_loss + beta_nat * nat_loss + beta_reg * distance
    once = {"adv": moments_adv, "nat": moments_nat}
    moments = in_order(batch_norm_order, ("adv", "nat", *more_passes), once)
    metrics = {**_accuracies(nat, adv, batch), "adv_loss": adv_loss, "regulariser": distance}
    return value, Outcome(moments, metrics, Attacked(adversarial, adv))


def _accuracies(nat: chex.Array, adv: chex.Array, batch: Batch) -> dict[str, chex.Array]:
    return {"adv_accuracy": accuracy(adv, batch.labels), "nat_accuracy": accuracy(nat, batch.labels)}


def trades(
    model: models.Model,
    params: chex.ArrayTree,
    stats: chex.ArrayTree,
    batch: Batch,
    *,
    attack: Callable[..., chex.Array],
    loss: losses.Loss,
    beta: float = 6.0,
    batch_norm_order: str = "released",
    attack_divergence: bool = True,
    radius_factors: chex.Numeric = 1.0,
    by_radius: bool = False,
) -> tuple[chex.Array, Outcome]:
    """TRADES: a natural loss and the divergence between both predictions.

    ``mean [l(z(x), y) + beta * KL(p(x) || p(x'))]``;  with ``by_radius``
    ``mean [(1 - b) l(z(x), y) + b * KL(p(x) || p(x'))]``, ``b = beta r / (1 + beta r)``

    where ``r`` is the image's radius as a multiple of the common one.

    The attack must take ``loss``: it maximises the divergence in place of its own loss, so it must not start
    at ``x``. In the paper ``l`` is the cross entropy.

    Args:
      beta: weight of the divergence.
      batch_norm_order: 'released': nat, adv, nat; 'each_pass_once': nat, adv; or a list: 'adv,nat,nat' is
        that of the released TRADES-AWP.
      attack_divergence: whether the attack maximises the divergence; if not, its own loss, as the code of
        Wang et al. (ICML 2023) does for mixed images.
      by_radius: CFA's weights of both terms (CCR), if its radii are those of the budget 'cfa' with equal
        ``lambda1`` and ``lambda2``: ``r`` is then ``lambda2 + a_y``, and 1 before the first radii by class.

    Returns:
      The loss, and the moments in that order.

    Source: Zhang et al. (ICML 2019), equation 5 and algorithm 1; CFA (Wei et al., CVPR 2023).
    """
    expected = as_attacked(model, params, stats)(batch.images)
    if attack_divergence:
        attack = partial(attack, loss=lambda z, _: losses.kl_divergence(expected, z))
    adversarial = adversarial_images(attack, model, params, stats, batch)
    (nat, moments_nat), (adv, moments_adv) = passes(model, params, stats, batch.images, adversarial)
    nat_loss, divergence = loss(nat, batch.labels), losses.kl_divergence(nat, adv)
    if by_radius:
        weight = budgets.cfa_weight(radius_factors, beta, lambda2=0.0)
        value = ((1 - weight) * nat_loss + weight * divergence).mean()
    else:
        value = nat_loss.mean() + beta * divergence.mean()
    once = {"nat": moments_nat, "adv": moments_adv}
    moments = in_order(batch_norm_order, ("nat", "adv", "nat"), once)
    metrics = {**_accuracies(nat, adv, batch), "regulariser": divergence.mean()}
    return value, Outcome(moments, metrics, Attacked(adversarial, adv))


def mart(
    model: models.Model,
    params: chex.ArrayTree,
    stats: chex.ArrayTree,
    batch: Batch,
    *,
    attack: Attack,
    beta: float = 5.0,
) -> tuple[chex.Array, Outcome]:
    """MART: a margin loss on adversarial images, and the divergence where the natural image is misclassified.

    ``mean [-log p_y(x') - log(1 - max_{k != y} p_k(x')) + beta * KL(p(x) || p(x')) * (1 - p_y(x))]``

    RoBal's released code has a regulariser of this name, which cannot run; this is the loss of MART itself.

    Args:
      beta: weight of the second term, lambda in the paper.

    Returns:
      The loss, and the moments of the passes nat, adv.

    Source: Wang et al. (ICLR 2020), equations 8 to 11.
    """
    adversarial = adversarial_images(attack, model, params, stats, batch)
    (nat, moments_nat), (adv, moments_adv) = passes(model, params, stats, batch.images, adversarial)
    missed = -jnp.expm1(-losses.cross_entropy(nat, batch.labels))  # 1 - p_y
    divergence = (losses.kl_divergence(nat, adv) * missed).mean()
    value = losses.boosted_cross_entropy(adv, batch.labels).mean() + beta * divergence
    metrics = {**_accuracies(nat, adv, batch), "regulariser": divergence}
    return value, Outcome((moments_nat, moments_adv), metrics, Attacked(adversarial, adv))


def mixing_weights(keys: chex.PRNGKey, dtype: chex.ArrayDType) -> chex.Array:
    """Draws one uniform number in [0, 1) per image, ``[B]``, from another random stream than the attack's."""
    return jax.vmap(lambda key: jax.random.uniform(key, (), dtype))(fold_in(keys, MIXING))


def avmixup(
    model: models.Model,
    params: chex.ArrayTree,
    stats: chex.ArrayTree,
    batch: Batch,
    *,
    attack: Attack,
    gamma: float = 2.0,
    nat_confidence: float = 1.0,
    vertex_confidence: float = 0.1,
) -> tuple[chex.Array, Outcome]:
    """Adversarial vertex mixup: images and soft labels between the image and a point beyond the attack's.

    ``v = x + gamma * (x' - x)``;  ``x^ = clip(a * x + (1 - a) * v, 0, 1)``, ``a ~ U[0, 1)`` per image;
    ``mean CE(z(x^), smoothed(y, a * c_nat + (1 - a) * c_vertex))``

    Args:
      gamma: length of ``v - x`` as a multiple of ``x' - x``.
      nat_confidence: ``c_nat``, probability of the true class at the image.
      vertex_confidence: ``c_vertex``, at the vertex.

    Returns:
      The loss, and the moments of the one pass.

    Source: Lee et al. (CVPR 2020), as in RoBal's released code.
    """
    adversarial = adversarial_images(attack, model, params, stats, batch)
    alpha = mixing_weights(batch.keys, adversarial.dtype)
    part = alpha.reshape(-1, *(1 for _ in batch.images.shape[1:]))
    vertex = batch.images + gamma * (adversarial - batch.images)
    mixed = jnp.clip(part * batch.images + (1 - part) * vertex, 0.0, 1.0)
    confidence = alpha * nat_confidence + (1 - alpha) * vertex_confidence
    logits, moments = model.train(params, stats, mixed)
    value = losses.smoothed_cross_entropy(logits, batch.labels, confidence=confidence).mean()
    metrics = {"mixed_accuracy": accuracy(logits, batch.labels)}
    return value, Outcome((moments,), metrics, Attacked(adversarial, None))


def mma(
    model: models.Model,
    params: chex.ArrayTree,
    stats: chex.ArrayTree,
    batch: Batch,
    *,
    attack: Attack,
    threat: ThreatModel,
    loss: losses.Loss,
    max_epsilon: float,
    nat_weight: float = 1 / 3,
    search_steps: int = 10,
) -> tuple[chex.Array, Outcome]:
    """MMA: moves the decision boundary away from each image, up to the distance ``max_epsilon``.

    ``w * mean l(z(x), y) + (1 - w) * mean m_b``, where ``m_b`` is ``l(z(x), y)`` for a misclassified image;
    otherwise ``l(z(x + delta), y)`` at the shortest successful ``delta`` found, or 0 if that is longer than
    ``max_epsilon``

    The attack gives the direction in which the boundary is searched. In the paper it maximises the soft logit
    margin, and ``l`` is the cross entropy. The paper starts the search for an image from the length that it
    found an epoch before. Here every search starts from the attack's own epsilon, so that a step remains a
    function of its batch.

    Args:
      max_epsilon: ``d_max``, the margin beyond which an image does not contribute.
      nat_weight: ``w``.
      search_steps: halvings of the interval in which the boundary lies.

    Returns:
      The loss, and the moments of the passes boundary, nat.

    Source: Ding et al. (ICLR 2020), algorithms 1 and 2, equation 12.
    """
    logits_fn, (images, labels, keys, _) = as_attacked(model, params, stats), batch
    boundary, length = attacks.shortest_adversarial(
        logits_fn, keys, images, labels, attack=attack, threat=threat, max_epsilon=1.05 * max_epsilon,
        search_steps=search_steps,
    )  # fmt: skip
    right = jnp.argmax(logits_fn(images), axis=-1) == labels
    length = jnp.where(right, length, 0.0)
    shown = jnp.where(right.reshape(-1, *(1 for _ in images.shape[1:])), boundary, images)
    (near, moments_near), (nat, moments_nat) = passes(model, params, stats, shown, batch.images)
    near_loss = jnp.where(length < max_epsilon, loss(near, labels), 0.0).mean()
    value = nat_weight * loss(nat, labels).mean() + (1 - nat_weight) * near_loss
    metrics = {"nat_accuracy": accuracy(nat, labels), "margin": length.mean()}
    return value, Outcome((moments_near, moments_nat), metrics)


OBJECTIVES: dict[str, Callable[..., tuple[chex.Array, Outcome]]] = {
    "plain": plain,
    "pgd_at": pgd_at,
    "distilled": distilled,
    "regularised": regularised,
    "trades": trades,
    "mart": mart,
    "avmixup": avmixup,
    "mma": mma,
}
"""Objectives by name. The contract of an objective, which is checked before training if it is your own:

- ``(model, params, stats, batch)``, by position, to ``(loss, Outcome(moments, metrics))``.
- ``loss`` is a float scalar, a mean over the batch.
- ``moments`` is a tuple of what ``model.train`` returned as its second value, even for one pass.
- ``metrics`` is a dictionary of float scalars; the training adds loss, grad_norm, epoch, learning_rate and
  images_per_second.
"""
