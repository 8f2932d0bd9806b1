"""Attacks made of other attacks: towards several targets, and onto the decision boundary."""

from collections.abc import Callable
from functools import partial

import chex
import jax
import jax.numpy as jnp

from robal_jax import checks
from robal_jax.attacks.attempts import best_found, mean_logits, verdicts
from robal_jax.attacks.margins import negative_margin, of_wrong_classes, ranked_class, targeted_margin
from robal_jax.attacks.threat import (
    Attack,
    LogitsFn,
    RandomLogitsFn,
    ThreatModel,
    check_attack,
    like_images,
)
from robal_jax.keys import JUDGEMENT, fold_in, image_keys


def multi_targeted(
    logits_fn: LogitsFn | RandomLogitsFn,
    key: chex.PRNGKey,
    images: chex.Array,
    labels: chex.Array,
    *,
    attack: Attack,
    targets: int | None = None,
    loss: Callable[..., chex.Array] = targeted_margin,
    eot: int = 0,
) -> chex.Array:
    """An attack towards each of several wrong classes: those with the highest logits of the clean image.

    An image keeps the first result that is misclassified, as whatever class, otherwise the result in which a
    wrong class comes nearest to the true one. An untargeted attack follows the class that leads on its way,
    which may be another class than the one that it can reach.

    Args:
      logits_fn: the model; with ``eot`` a random one.
      key: one key, or one per image ``[B]``.
      images: ``[B, H, W, C]`` within the threat model's bounds.
      labels: ``[B]``.
      attack: run once per target, in a loop that compiles once; takes ``loss``.
      targets: number of targets, in ``1..K-1``; ``min(9, K - 1)`` if None, as in AutoAttack.
      loss: ascended by the attack; takes ``targets [B]``.
      eot: of the attack; targets and results are chosen by the mean logits of this many draws.

    Returns:
      Adversarial images ``[B, H, W, C]``; no gradient flows back.

    Raises:
      ValueError: an argument or the model's logits have a wrong shape, type or range.

    Source: Gowal et al., "An Alternative Surrogate Loss for PGD-based Adversarial Testing" (2019).

    Example:
      >>> from robal_jax.attacks import pgd
      >>> logits_fn = lambda x: jnp.outer(x.reshape(-1) - 0.5, jnp.array([-1.0, 0.0, 1.0]))
      >>> images, labels = jnp.array([0.45, 0.2]).reshape(2, 1, 1, 1), jnp.array([0, 0])
      >>> attack = partial(pgd, threat=ThreatModel(epsilon=0.1), steps=10, step_size=0.025)
      >>> found = multi_targeted(logits_fn, jax.random.key(0), images, labels, attack=attack, targets=2)
      >>> print(jnp.array_str(found.reshape(-1), precision=2), logits_fn(found).argmax(-1))
      [0.55 0.3 ] [2 0]
    """
    checks.images_and_labels(images, labels)  # the attack checks the pixels
    if targets is not None:
        checks.at_least(1, targets=targets)
    keys = image_keys(key, images)
    judge = partial(mean_logits, logits_fn, fold_in(keys, JUDGEMENT), eot)
    wrong = of_wrong_classes(judge(images), labels)
    most = wrong.shape[-1] - 1
    targets = min(9, most) if targets is None else targets
    if targets > most:
        raise ValueError(f"targets is {targets}; with {most + 1} classes it must be in 1..{most}")

    def run(rank: chex.Array) -> chex.Array:
        towards = partial(loss, targets=ranked_class(wrong, rank))
        return attack(logits_fn, fold_in(keys, rank), images, labels, loss=towards)

    ranks = jnp.arange(1, targets + 1)
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
    """Adversarial images on the decision boundary: the direction of an attack, and bisection along it.

    With ``delta = attack(x) - x`` and ``u = delta / ||delta||``, it looks for the smallest ``eta`` at which
    ``x + eta * u`` is misclassified: in ``[0, ||delta||]`` where the attack succeeded, otherwise in
    ``[||delta||, max_epsilon]``. An attack that goes further than ``max_epsilon`` only gives the direction.

    Args:
      logits_fn: the model.
      key: one key, or one per image ``[B]``.
      images: ``x [B, H, W, C]`` within the threat model's bounds.
      labels: ``[B]``.
      attack: gives the direction.
      threat: its norm and bounds; its epsilon is not read here.
      max_epsilon: largest length of the search.
      search_steps: number of halvings.

    Returns:
      The images ``[B, H, W, C]`` and their lengths ``eta [B]``, ``max_epsilon`` where none was found.

    Raises:
      ValueError: an argument or the model's logits have a wrong shape, type or range.

    Source: AN-PGD of MMA training (Ding et al., ICLR 2020, algorithm 2).

    Example:
      >>> from robal_jax.attacks import pgd
      >>> logits_fn = lambda x: jnp.outer(x.reshape(-1) - 0.5, jnp.array([-1.0, 1.0]))
      >>> images, labels, threat = jnp.array([[0.45], [0.2]]), jnp.array([0, 0]), ThreatModel(epsilon=0.1)
      >>> found, lengths = shortest_adversarial(
      ...     logits_fn, jax.random.key(0), images, labels, threat=threat, max_epsilon=0.2,
      ...     attack=partial(pgd, threat=threat, steps=10, step_size=0.025))
      >>> print(jnp.array_str(lengths, precision=3))
      [0.05 0.2 ]
    """
    threat = check_attack(threat, images, labels)
    checks.at_least(0, search_steps=search_steps)
    checks.positive(max_epsilon=max_epsilon)
    delta = attack(logits_fn, key, images, labels) - images
    length = threat.distance(images + delta, images)
    unit = delta / like_images(jnp.where(length > 0, length, 1.0), images)

    def at(eta: chex.Array) -> chex.Array:
        return jnp.clip(images + like_images(eta, images) * unit, threat.lower, threat.upper)

    def fooled(eta: chex.Array) -> chex.Array:
        return verdicts(checks.logits_of(len(images), logits_fn(at(eta))), labels)[1]

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
