"""Losses for attacks: margins between logits, one value per image, larger for a stronger attack.

Every loss is a function ``(logits [B, K], labels [B]) -> [B]``; so is the cross entropy of
``robal_jax.losses``, which the attacks ascend if no other loss is given. Targeted losses take the classes to
aim at by keyword, so that ``functools.partial(targeted_margin, targets=targets)`` is a loss again::

    adversarial = pgd(logits_fn, key, images, labels, threat=threat, steps=20, step_size=0.01, loss=dlr)

The functions raise ValueError for arguments of a wrong shape or type and, outside of ``jax.jit``, for labels
outside of ``0..K-1``.
"""

import chex
import jax
import jax.numpy as jnp

from robal_jax import checks

TINY = 1e-12  # added to the losses' denominators, as in the reference implementation


def margin(logits: chex.Array, labels: chex.Array) -> chex.Array:
    """Lead of the true class over the best other one, ``z_y - max_{i != y} z_i``.

    Args:
      logits: ``z [B, K]``.
      labels: ``y [B]``.

    Returns:
      ``[B]``, below 0 where the image is misclassified.

    Example:
      >>> logits = jnp.array([[3.0, 1.0, 2.5], [3.0, 1.0, 2.5]])
      >>> print(margin(logits, jnp.array([0, 2])))
      [ 0.5 -0.5]
    """
    checks.logits_and_labels(logits, labels)
    return _of_class(logits, labels) - jnp.max(of_wrong_classes(logits, labels), axis=-1)


def negative_margin(logits: chex.Array, labels: chex.Array, *, confidence: float = 50.0) -> chex.Array:
    """The Carlini-Wagner objective: the negative lead of the true class, up to a confidence.

    ``-max(z_y - max_{i != y} z_i + c, 0)``

    Unlike the gradient of the cross entropy, its gradient does not vanish where the softmax saturates.

    Args:
      logits: ``z [B, K]``.
      labels: ``y [B]``.
      confidence: ``c``, the lead of a wrong class beyond which the attack gains nothing more.

    Returns:
      ``[B]``, at most 0.

    Source: Carlini and Wagner (S&P 2017), in the sign-step form of RoBal's released code (c = 50).

    Example:
      >>> logits = jnp.array([[3.0, 1.0, 2.5], [3.0, 1.0, 2.5]])
      >>> print(negative_margin(logits, jnp.array([0, 2]), confidence=0.0))
      [-0.5 -0. ]
    """
    return -jnp.maximum(margin(logits, labels) + confidence, 0.0)


def targeted_margin(logits: chex.Array, labels: chex.Array, *, targets: chex.Array) -> chex.Array:
    """Lead of a given class over the true one, ``z_t - z_y``.

    Args:
      logits: ``z [B, K]``.
      labels: ``y [B]``.
      targets: ``t [B]``.

    Returns:
      ``[B]``, above 0 where the target leads, so that the image is misclassified.

    Source: Gowal et al. (2019), the losses of MultiTargeted.

    Example:
      >>> logits, labels = jnp.array([[3.0, 1.0, 2.5], [3.0, 1.0, 2.5]]), jnp.array([0, 2])
      >>> print(targeted_margin(logits, labels, targets=jnp.array([1, 0])))
      [-2.   0.5]
    """
    checks.logits_and_labels(logits, labels)
    checks.logits_and_labels(logits, targets, "targets")
    return _of_class(logits, targets) - _of_class(logits, labels)


def dlr(logits: chex.Array, labels: chex.Array) -> chex.Array:
    """Difference of logits ratio: a margin that neither shift nor scale of the logits changes.

    ``-(z_y - max_{i != y} z_i) / (z_(1) - z_(3))``, with ``z_(k)`` the k-th largest logit.

    Args:
      logits: ``z [B, K]``, K at least 3.
      labels: ``y [B]``.

    Returns:
      ``[B]``, positive where the image is misclassified.

    Raises:
      ValueError: there are fewer than three classes.

    Source: Croce and Hein (ICML 2020), equation 6.

    Example:
      >>> logits, labels = jnp.array([[3.0, 1.0, 2.5], [3.0, 1.0, 2.5]]), jnp.array([0, 2])
      >>> print(dlr(logits, labels), dlr(100 * logits, labels))
      [-0.25  0.25] [-0.25  0.25]
    """
    checks.logits_and_labels(logits, labels)
    first, second, third = _largest(logits, 3, "DLR")
    true = _of_class(logits, labels)
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
      ValueError: there are fewer than four classes.

    Source: Croce and Hein (ICML 2020), equation 7.

    Example:
      >>> logits, labels = jnp.array([[3.0, 1.0, 2.0, 1.0]]), jnp.array([0])
      >>> print(targeted_dlr(logits, labels, targets=jnp.array([2])))
      [-0.5]
    """
    checks.logits_and_labels(logits, labels)
    checks.logits_and_labels(logits, targets, "targets")
    first, _, third, fourth = _largest(logits, 4, "targeted DLR")
    lead = _of_class(logits, labels) - _of_class(logits, targets)
    return -lead / (first - 0.5 * (third + fourth) + TINY)


def probability_margin(logits: chex.Array, labels: chex.Array) -> chex.Array:
    """Lead of the best wrong class in probability, at logits that are divided by their spread.

    ``max_{i != y} p_i - p_y``,  ``p = softmax(z / s)``,  ``s`` the standard deviation of an image's logits

    Unlike a margin of logits, it weighs a class by how probable it is. Published, it has ``s = 1``: large
    logits then saturate the softmax, and its gradient vanishes, as that of the cross entropy does. Here
    neither shift nor scale of the logits changes it, while ``s`` is in 1e-10..1e19: below that the constant
    in the divisor counts, above it the squares of float32 overflow. No gradient flows through ``s``.

    Args:
      logits: ``z [B, K]``.
      labels: ``y [B]``.

    Returns:
      ``[B]`` in -1..1, positive where the image is misclassified.

    Source: Xie et al., "Towards Million-Scale Adversarial Robustness Evaluation With Stronger Individual
    Attacks" (2024), the loss of PMA.

    Example:
      >>> logits, labels = jnp.array([[3.0, 1.0, 2.5], [3.0, 1.0, 2.5]]), jnp.array([0, 2])
      >>> for scale in (1, 100):
      ...     print(jnp.array_str(probability_margin(scale * logits, labels), precision=3))
      [-0.27  0.27]
      [-0.27  0.27]
    """
    true, other = probabilities(logits, labels)
    return other - true


def probabilities(logits: chex.Array, labels: chex.Array) -> tuple[chex.Array, chex.Array]:
    """The two terms of :func:`probability_margin`: ``p_y`` and ``max_{i != y} p_i``, both ``[B]``."""
    checks.logits_and_labels(logits, labels)
    spread = jax.lax.stop_gradient(jnp.std(logits, axis=-1, keepdims=True))
    scores = jax.nn.softmax(logits / (spread + TINY), axis=-1)
    return _of_class(scores, labels), jnp.max(of_wrong_classes(scores, labels), axis=-1)


def _of_class(logits: chex.Array, classes: chex.Array) -> chex.Array:
    is_class = jax.nn.one_hot(classes, logits.shape[-1], dtype=bool)
    return jnp.max(jnp.where(is_class, logits, -jnp.inf), axis=-1)


def of_wrong_classes(logits: chex.Array, labels: chex.Array) -> chex.Array:
    """Logits ``[B, K]`` with minus infinity at the true class."""
    checks.logits_and_labels(logits, labels)
    checks.at_least(2, num_classes=logits.shape[-1])
    return jnp.where(jax.nn.one_hot(labels, logits.shape[-1], dtype=bool), -jnp.inf, logits)


def ranked_class(logits: chex.Array, rank: chex.Numeric) -> chex.Array:
    """The class with the ``rank``-th highest logit of each image; of equal logits, the first class leads.

    Args:
      logits: ``z [B, K]``.
      rank: 1 for the prediction, 2 for the runner-up, up to ``K``; may be traced.

    Returns:
      ``[B]``, integers in ``0..K-1``.

    Raises:
      ValueError: the rank is known and not in ``1..K``.

    Example:
      >>> logits = jnp.array([[3.0, 1.0, 2.5], [3.0, 4.0, 2.5]])
      >>> print(ranked_class(logits, 1), ranked_class(logits, 2))
      [0 1] [2 0]
    """
    checks.float_logits(logits=logits)
    checks.rank(rank, logits.shape[-1])
    return jnp.argsort(logits, axis=-1, descending=True)[:, rank - 1]


def _largest(logits: chex.Array, count: int, name: str) -> tuple[chex.Array, ...]:
    if logits.shape[-1] < count:
        raise ValueError(
            f"{name} needs {count} classes, and the model has {logits.shape[-1]}; use negative_margin"
        )
    return tuple(jnp.moveaxis(jax.lax.top_k(logits, count)[0], -1, 0))
