"""Several attempts at each image, by restarts, targets or steps, and the choice among their results."""

from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp

from robal_jax import checks, losses
from robal_jax.attacks.threat import LogitsFn, like_images
from robal_jax.keys import fold_in


def verdicts(logits: chex.Array, labels: chex.Array) -> tuple[chex.Array, chex.Array]:
    """Whether images are classified correctly, and whether they are misclassified, both bool ``[B]``.

    Logits that are not all finite are no prediction: neither holds. An attack prefers a misclassified image;
    it returns one of these only where it met no other, so that whoever looks at the logits sees them.

    Args:
      logits: ``[B, K]``.
      labels: ``[B]``.

    Example:
      >>> logits = jnp.array([[1.0, 0.0], [0.0, 1.0], [0.0, jnp.inf]])
      >>> print(*verdicts(logits, jnp.array([0, 0, 0])))
      [ True False False] [False  True False]
    """
    agrees, finite = jnp.argmax(logits, axis=-1) == labels, jnp.isfinite(logits).all(-1)
    return agrees & finite, ~agrees & finite


def best_found(
    attempt: Callable[..., chex.Array],
    settings: chex.ArrayTree,
    judge: LogitsFn,
    loss: losses.Loss,
    images: chex.Array,
    labels: chex.Array,
) -> chex.Array:
    """The first attempt at each image that is misclassified, otherwise the one of the highest loss.

    Logits that are not finite come between the two, see :func:`verdicts`. The loop compiles once, whatever
    the number of attempts.

    Args:
      attempt: makes candidates ``[B, H, W, C]`` from one of the settings.
      settings: one per attempt, stacked along the first axis.
      judge: gives the candidates' logits ``[B, K]``.
      loss: compares attempts without success, ``[B]``.
      images: ``[B, H, W, C]``.
      labels: ``[B]``.

    Returns:
      ``[B, H, W, C]``; no gradient flows back.
    """
    dtype = jnp.result_type(images)

    def step(best: tuple[chex.Array, chex.Array], setting: chex.ArrayTree) -> tuple:
        candidates = attempt(setting)
        logits = judge(candidates)
        right, wrong = verdicts(logits, labels)
        unseen = jnp.where(right, loss(logits, labels), jnp.finfo(dtype).max)
        score = jnp.where(wrong, jnp.inf, unseen).astype(dtype)
        better = score > best[1]
        found = jnp.where(like_images(better, images), candidates, best[0])
        return (found, jnp.where(better, score, best[1])), None

    nothing = images, jnp.full(labels.shape, -jnp.inf, dtype)
    return jax.lax.stop_gradient(jax.lax.scan(step, nothing, settings)[0][0])


def mean_logits(
    logits_fn: Callable[..., chex.Array], keys: chex.PRNGKey, eot: int, x: chex.Array
) -> chex.Array:
    """Logits ``[B, K]`` by which attempts are judged.

    Args:
      logits_fn: the model; with ``eot`` a random one.
      keys: ``[B]``, of a random model's draws.
      eot: number of draws whose logits are averaged; 0 for a model that is not random.
      x: ``[B, H, W, C]``.
    """
    if not eot:
        return checks.logits_of(len(x), logits_fn(x))

    def draw(number: chex.Array) -> chex.Array:
        return checks.logits_of(len(x), logits_fn(x, fold_in(keys, number)))

    return jax.lax.map(draw, jnp.arange(eot)).mean(0)


def record(
    search: Any,
    x: chex.Array,
    logits: chex.Array,
    loss: chex.Array,
    gradient: chex.Array,
    labels: chex.Array,
) -> dict[str, chex.Array]:
    """Fields of a search's state after a look at ``x``: the highest loss, the last misclassified image.

    Until there is a misclassified one, the first image whose logits are not finite takes its place, see
    :func:`verdicts`.

    Args:
      search: the state before, with these fields.
      x: ``[B, H, W, C]``.
      logits: there, ``[B, K]``.
      loss: there, ``[B]``.
      gradient: of the loss there, ``[B, H, W, C]``.
      labels: ``[B]``.

    Returns:
      ``best``, ``best_gradient``, ``best_loss``, ``robust`` and ``adversarial``.
    """
    (right, wrong), better = verdicts(logits, labels), loss > search.best_loss
    kept = right | ~(wrong | search.robust)
    rises = like_images(better, x)
    return {
        "best": jnp.where(rises, x, search.best),
        "best_gradient": jnp.where(rises, gradient, search.best_gradient),
        "best_loss": jnp.where(better, loss, search.best_loss),
        "robust": search.robust & right,
        "adversarial": jnp.where(like_images(kept, x), search.adversarial, x),
    }
