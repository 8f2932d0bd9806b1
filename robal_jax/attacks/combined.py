"""TODO attacks.combined."""

from collections.abc import Callable
from functools import partial

import chex
import jax
import jax.numpy as jnp

from robal_jax import losses
from robal_jax.attacks.margins import negative_margin, of_wrong_classes, ranked_class, targeted_margin
from robal_jax.attacks.threat import Attack, LogitsFn, RandomLogitsFn, ThreatModel, like_images
from robal_jax.keys import JUDGEMENT, fold_in, image_keys


def mean_logits(
    logits_fn: Callable[..., chex.Array], keys: chex.PRNGKey, eot: int, x: chex.Array
) -> chex.Array:
    """Logits ``[B, K]``: those of a model that is not random, or the mean of ``eot`` draws."""
    if not eot:
        return logits_fn(x)
    return jax.lax.map(lambda draw: logits_fn(x, fold_in(keys, draw)), jnp.arange(eot)).mean(0)


def best_found(
    attempt: Callable[..., chex.Array],
    settings: chex.ArrayTree,
    judge: LogitsFn,
    loss: losses.Loss,
    images: chex.Array,
    labels: chex.Array,
) -> chex.Array:
    """Of several attempts at an image the first that is misclassified, otherwise that of highest loss.

    ``attempt`` makes candidates ``[B, H, W, C]`` of one of the ``settings``, which are stacked along their
    first axis; ``judge`` gives the candidates' logits. The loop compiles once.
    """

    def step(best: tuple[chex.Array, chex.Array], setting: chex.ArrayTree) -> tuple:
        candidates = attempt(setting)
        logits = judge(candidates)
        success = jnp.argmax(logits, axis=-1) != labels
        score = jnp.where(success, jnp.inf, loss(logits, labels)).astype(images.dtype)
        better = score > best[1]
        found = jnp.where(like_images(better, images), candidates, best[0])
        return (found, jnp.where(better, score, best[1])), None

    nothing = images, jnp.full(labels.shape, -jnp.inf, images.dtype)
    return jax.lax.stop_gradient(jax.lax.scan(step, nothing, settings)[0][0])


def multi_targeted(
    logits_fn: LogitsFn | RandomLogitsFn,
    key: chex.PRNGKey,
    images: chex.Array,
    labels: chex.Array,
    *,
    attack: Attack,
    targets: int = 9,
    loss: Callable[..., chex.Array] = targeted_margin,
    eot: int = 0,
) -> chex.Array:
    """An attack run towards each of several wrong classes, those with the highest logits of the clean image.

    An image keeps the first result that is misclassified, as whatever class, otherwise the one in which a
    wrong class comes nearest to the true one. An untargeted attack follows the class that is ahead on its
    way, which need not be the one that can be reached.

    Args:
      logits_fn: the model; with ``eot`` a random one.
      key: one key, or one an image ``[B]``.
      images: ``[B, H, W, C]`` within the threat model's bounds.
      labels: ``[B]``.
      attack: run once a target, in a loop that compiles once; takes ``loss``.
      targets: number of targets; all wrong classes if there are fewer.
      loss: what the attack ascends; takes ``targets [B]``.
      eot: of the attack; the logits by which targets and results are chosen are the mean of as many draws.

    Returns:
      Adversarial images ``[B, H, W, C]``; no gradient flows back.

    Source: Gowal et al., "An Alternative Surrogate Loss for PGD-based Adversarial Testing" (2019).
    """
    keys = image_keys(key, images)
    judge = partial(mean_logits, logits_fn, fold_in(keys, JUDGEMENT), eot)
    wrong = of_wrong_classes(judge(images), labels)

    def run(rank: chex.Array) -> chex.Array:
        towards = partial(loss, targets=ranked_class(wrong, rank))
        return attack(logits_fn, fold_in(keys, rank), images, labels, loss=towards)

    ranks = jnp.arange(1, min(targets, wrong.shape[-1] - 1) + 1)
    return best_found(run, ranks, judge, partial(negative_margin, confidence=0.0), images, labels)


def shortest_adversarial(
    logits_fn: LogitsFn,
    key: chex.PRNGKey,
    images: chex.Array,
    labels: chex.Array,
    *,
    attack: Attack,
    threat: ThreatModel,
    max_epsilon: float,
    search_steps: int = 10,
) -> tuple[chex.Array, chex.Array]:
    """Adversarial images on the decision boundary: a fixed attack's direction, and bisection along it.

    With ``delta = attack(x) - x`` and ``u = delta / ||delta||`` it looks for the smallest ``eta`` at which
    ``x + eta * u`` is misclassified: in ``[0, ||delta||]`` where the attack succeeded, otherwise in
    ``[||delta||, max_epsilon]``; an attack that goes further than ``max_epsilon`` only gives the direction.

    Args:
      logits_fn: the model.
      key: one key, or one an image ``[B]``.
      images: ``x [B, H, W, C]`` within the threat model's bounds.
      labels: ``[B]``.
      attack: gives the direction.
      threat: its norm and bounds; its epsilon is the attack's.
      max_epsilon: where the search ends.
      search_steps: number of halvings.

    Returns:
      The images ``[B, H, W, C]`` and their lengths ``eta [B]``, ``max_epsilon`` where none was found.

    Source: AN-PGD of MMA training (Ding et al., ICLR 2020, algorithm 2).
    """
    delta = attack(logits_fn, key, images, labels) - images
    length = threat.distance(images + delta, images)
    unit = delta / like_images(jnp.where(length > 0, length, 1.0), images)

    def at(eta: chex.Array) -> chex.Array:
        return jnp.clip(images + like_images(eta, images) * unit, threat.lower, threat.upper)

    def fooled(eta: chex.Array) -> chex.Array:
        return jnp.argmax(logits_fn(at(eta)), axis=-1) != labels

    def halve(_: chex.Array, bracket: tuple[chex.Array, chex.Array]) -> tuple[chex.Array, chex.Array]:
        low, high = bracket
        middle = (low + high) / 2
        success = fooled(middle)
        return jnp.where(success, low, middle), jnp.where(success, middle, high)

    reach = jnp.minimum(length, max_epsilon)
    success = fooled(reach)
    bracket = jnp.where(success, 0.0, reach), jnp.where(success, reach, max_epsilon)
    _, eta = jax.lax.fori_loop(0, search_steps, halve, bracket)
    return jax.lax.stop_gradient((at(eta), eta))
