"""MALT: targets are the classes that are nearest if the model were linear, not those of the largest logits.

The class with the highest wrong logit need not be the one that a small change reaches: a class further
behind is nearer if its logit changes faster. MALT divides the lead of the true class by how fast it changes,
which is the step that FAB would make, and attacks the nearest few classes::

    order = nearest_classes(logits_fn, images, labels, threat=threat, candidates=9)
    adversarial = malt_apgd(logits_fn, key, images, labels, threat=threat, rank=1)

Source: Melamed, Yehudai and Shamir, "MALT Powers Up Adversarial Attacks" (NeurIPS 2024).
"""

from functools import partial

import chex
import jax
import jax.numpy as jnp

from robal_jax import checks
from robal_jax.attacks.autopgd import apgd
from robal_jax.attacks.fab_attack import distance_to
from robal_jax.attacks.margins import of_wrong_classes, ranked_class, targeted_dlr
from robal_jax.attacks.threat import LogitsFn, ThreatModel, check_attack


def nearest_classes(
    logits_fn: LogitsFn,
    images: chex.Array,
    labels: chex.Array,
    *,
    threat: ThreatModel,
    candidates: int = 9,
) -> chex.Array:
    """The wrong classes of the highest logits, in the order of their distance in a linear model.

    ``distance(i) = |z_y - z_i| / ||grad(z_y - z_i)||``, in the norm that is dual to the threat model's.

    One forward pass, and one backward pass per candidate.

    Args:
      logits_fn: the model.
      images: ``[B, H, W, C]`` within the threat model's bounds.
      labels: ``y [B]``.
      threat: its norm is read.
      candidates: number ``C >= 1`` of wrong classes to rank; at most all ``K - 1``.

    Returns:
      Classes ``[B, C]``, the nearest first; of equal ones that of the higher logit.

    Raises:
      ValueError: an argument or the model's logits have a wrong shape, type or range.

    Source: Melamed et al. (NeurIPS 2024), and their released code.

    Example:
      >>> weight = jnp.array([0.0, 1.0, 10.0])  # class 2 is further behind, but rises faster
      >>> logits_fn = lambda x: jnp.outer(x.reshape(-1), weight) + jnp.array([[2.0, 1.0, 0.0]])
      >>> images, labels = jnp.zeros((1, 1, 1, 1)), jnp.array([0])
      >>> print(nearest_classes(logits_fn, images, labels, threat=ThreatModel(0.5), candidates=2))
      [[2 1]]
    """
    check_attack(threat, images, labels)
    checks.at_least(1, candidates=candidates)
    flat = jax.lax.stop_gradient(images.reshape(len(images), -1))
    logits, vjp = jax.vjp(lambda x: checks.logits_of(len(x), logits_fn(x.reshape(images.shape))), flat)
    wrong = of_wrong_classes(logits, labels)
    candidates = min(candidates, wrong.shape[-1] - 1)
    # One class at a time, because the gradients of all classes may not fit in memory.
    classes = [ranked_class(wrong, rank) for rank in range(1, candidates + 1)]
    distances = jax.lax.map(lambda k: distance_to(k, labels, logits, vjp, threat), jnp.stack(classes))
    order = jnp.argsort(distances, axis=0)
    return jax.lax.stop_gradient(jnp.take_along_axis(jnp.stack(classes), order, axis=0).T)


def malt_apgd(
    logits_fn: LogitsFn,
    key: chex.PRNGKey,
    images: chex.Array,
    labels: chex.Array,
    *,
    threat: ThreatModel,
    rank: int | chex.Array = 1,
    candidates: int = 9,
    steps: int = 100,
) -> chex.Array:
    """AutoPGD on the targeted DLR loss, towards the class of a given rank among the nearest.

    Args:
      logits_fn: the model.
      key: one key, or one per image ``[B]``.
      images: ``[B, H, W, C]`` within the threat model's bounds.
      labels: ``[B]``.
      threat: allowed images.
      rank: 1 for the nearest class, up to the number of candidates; may be traced, so that one compilation
        serves all targets.
      candidates: see :func:`nearest_classes`.
      steps: of the search, at least 1.

    Returns:
      See :func:`~robal_jax.attacks.apgd`.

    Raises:
      ValueError: see :func:`nearest_classes`; or the rank is out of range.

    Source: Melamed et al. (NeurIPS 2024).

    Example:
      >>> logits_fn = lambda x: jnp.stack([1 - x, 0 * x, x, 0 * x - 1], -1).reshape(-1, 4)
      >>> images, labels = jnp.array([0.45, 0.2]).reshape(2, 1, 1, 1), jnp.array([0, 0])
      >>> found = malt_apgd(logits_fn, jax.random.key(0), images, labels,
      ...                   threat=ThreatModel(0.1), candidates=3, steps=10)  # towards class 2
      >>> print(jnp.array_str(found.reshape(-1), precision=2), logits_fn(found).argmax(-1))
      [0.55 0.3 ] [2 0]
    """
    order = nearest_classes(logits_fn, images, labels, threat=threat, candidates=candidates)
    checks.rank(rank, order.shape[1])
    loss = partial(targeted_dlr, targets=order[:, rank - 1])
    return apgd(logits_fn, key, images, labels, threat=threat, steps=steps, loss=loss)
