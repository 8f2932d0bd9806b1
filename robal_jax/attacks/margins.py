"""TODO attacks.margins."""

import chex
import jax
import jax.numpy as jnp

from robal_jax import checks


def margin(logits: chex.Array, labels: chex.Array) -> chex.Array:
    """``z_y - max_{i != y} z_i``: logits ``[B, K]`` and labels ``[B]`` to ``[B]``, below 0 if wrong."""
    return of_class(logits, labels) - jnp.max(of_wrong_classes(logits, labels), axis=-1)


def negative_margin(logits: chex.Array, labels: chex.Array, *, confidence: float = 50.0) -> chex.Array:
    """The Carlini-Wagner objective: how little the true class leads the best other one.

    ``-max(z_y - max_{i != y} z_i + c, 0)``

    Unlike cross entropy its gradient does not vanish where the softmax saturates.

    Args:
      logits: ``z [B, K]``.
      labels: ``y [B]``.
      confidence: ``c``, the lead of a wrong class beyond which there is nothing more to gain.

    Returns:
      ``[B]``, at most 0, larger for a stronger attack.

    Source: Carlini and Wagner (S&P 2017), in the sign-step form of RoBal's released code (c = 50).
    """
    return -jnp.maximum(margin(logits, labels) + confidence, 0.0)


def targeted_margin(logits: chex.Array, labels: chex.Array, *, targets: chex.Array) -> chex.Array:
    """How far a given class leads the true one, ``z_t - z_y``.

    ``functools.partial(targeted_margin, targets=targets)`` is a loss for any attack.

    Args:
      logits: ``z [B, K]``.
      labels: ``y [B]``.
      targets: ``t [B]``.

    Returns:
      ``[B]``, above 0 where the image is misclassified.

    Source: Gowal et al. (2019), the losses of MultiTargeted.
    """
    return of_class(logits, targets) - of_class(logits, labels)


def of_class(logits: chex.Array, classes: chex.Array) -> chex.Array:
    """``z_bc`` of one class an image: ``[B, K]``, ``[B]`` to ``[B]``."""
    checks.logits_and_labels(logits, classes)
    is_class = jax.nn.one_hot(classes, logits.shape[-1], dtype=bool)
    return jnp.max(jnp.where(is_class, logits, -jnp.inf), axis=-1)


def of_wrong_classes(logits: chex.Array, labels: chex.Array) -> chex.Array:
    """``z [B, K]`` with minus infinity at the true class."""
    checks.logits_and_labels(logits, labels)
    return jnp.where(jax.nn.one_hot(labels, logits.shape[-1], dtype=bool), -jnp.inf, logits)


def ranked_class(logits: chex.Array, rank: chex.Numeric) -> chex.Array:
    """The class with the ``rank``-th highest logit of each image; of equal logits, the first class leads.

    Args:
      logits: ``z [B, K]``.
      rank: 1 for the prediction, 2 for the runner-up, up to ``K``; may be traced.

    Returns:
      ``[B]``, integers in ``0..K-1``.
    """
    return jnp.argsort(logits, axis=-1, descending=True)[:, rank - 1]


TINY = 1e-12  # added to the losses' denominators, as in the reference


def dlr(logits: chex.Array, labels: chex.Array) -> chex.Array:
    """Difference of logits ratio: a margin that neither shift nor scale of the logits changes.

    ``-(z_y - max_{i != y} z_i) / (z_(1) - z_(3))``, with ``z_(k)`` the k-th largest logit.

    Args:
      logits: ``z [B, K]``, K at least 3.
      labels: ``y [B]``.

    Returns:
      ``[B]``, positive where the image is misclassified.

    Raises:
      ValueError: fewer than three classes.

    Source: Croce and Hein (ICML 2020), equation 6.
    """
    first, second, third = _largest(logits, 3, "DLR")
    true = of_class(logits, labels)
    other = jnp.where(jnp.argmax(logits, -1) == labels, second, first)
    return -(true - other) / (first - third + TINY)


def targeted_dlr(logits: chex.Array, labels: chex.Array, *, targets: chex.Array) -> chex.Array:
    """Difference of logits ratio towards a given class.

    ``-(z_y - z_t) / (z_(1) - (z_(3) + z_(4)) / 2)``

    Args:
      logits: ``z [B, K]``, K at least 4.
      labels: ``y [B]``.
      targets: ``t [B]``.

    Returns:
      ``[B]``, positive where the target leads the true class.

    Raises:
      ValueError: fewer than four classes.

    Source: Croce and Hein (ICML 2020), equation 7.
    """
    first, _, third, fourth = _largest(logits, 4, "targeted DLR")
    lead = of_class(logits, labels) - of_class(logits, targets)
    return -lead / (first - 0.5 * (third + fourth) + TINY)


def _largest(logits: chex.Array, count: int, name: str) -> tuple[chex.Array, ...]:
    if logits.shape[-1] < count:
        raise ValueError(f"{name} needs at least {count} classes; the model has {logits.shape[-1]}")
    return tuple(jnp.moveaxis(jax.lax.top_k(logits, count)[0], -1, 0))
