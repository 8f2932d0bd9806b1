"""PMA: projected gradient ascent on the margin between probabilities, in two phases.

The first half of the steps ascends one term of the margin, the second half both. In each half the step size
falls from twice the radius to zero along a cosine, so the second half also begins with long steps, away from
where the first half ended::

    adversarial = pma(logits_fn, key, images, labels, threat=ThreatModel(8 / 255), steps=100)

Source: Xie et al., "Towards Million-Scale Adversarial Robustness Evaluation With Stronger Individual Attacks"
(2024); its phases are those of MD, Ma et al., "Imbalanced Gradients" (2020).
"""

import chex
import jax
import jax.numpy as jnp

from robal_jax import checks
from robal_jax.attacks.attempts import verdicts
from robal_jax.attacks.margins import probabilities
from robal_jax.attacks.projected_gradient import loss_gradient
from robal_jax.attacks.threat import (
    LogitsFn,
    ThreatModel,
    check_attack,
    like_images,
    starting_points,
    uniform_start,
)


def pma(
    logits_fn: LogitsFn,
    key: chex.PRNGKey,
    images: chex.Array,
    labels: chex.Array,
    *,
    threat: ThreatModel,
    steps: int = 100,
    raised: bool | chex.Array = False,
) -> chex.Array:
    """Ascends the probability margin in two phases, from one random start.

    ``x_{t+1} = project(x_t + eta_t * ascent_direction(grad l_t(x_t)))``

    The loss ``l_t`` is ``-p_y``, or ``max_{i != y} p_i`` if ``raised``, in the first ``h = ceil(steps / 2)``
    steps, and the :func:`~robal_jax.attacks.probability_margin` after them. The step size is
    ``eta_t = epsilon * (1 + cos(pi * (t mod h) / h))``.

    Args:
      logits_fn: the model.
      key: one key, or one per image ``[B]``.
      images: ``[B, H, W, C]`` within the threat model's bounds.
      labels: ``y [B]``.
      threat: allowed images.
      steps: number of gradient steps, at least 1.
      raised: whether the first phase raises the best wrong class, in place of lowering the true one; may be
        traced.

    Returns:
      ``[B, H, W, C]``: the last misclassified image of each search, or its last image if none was
      misclassified. No gradient flows back.

    Raises:
      ValueError: an argument or the model's logits have a wrong shape, type or range.

    Source: Xie et al. (2024), and its released code, which divides no logits, and whose first step
    lowers the loss.

    Example:
      >>> logits_fn = lambda x: jnp.outer(x.reshape(-1) - 0.5, jnp.array([-1.0, 1.0]))  # class 1 is bright
      >>> images, labels = jnp.array([0.45, 0.2]).reshape(2, 1, 1, 1), jnp.array([0, 0])
      >>> found = pma(logits_fn, jax.random.key(0), images, labels, threat=ThreatModel(0.1), steps=10)
      >>> print(jnp.array_str(found.reshape(-1), precision=2), logits_fn(found).argmax(-1))
      [0.55 0.3 ] [1 0]
    """
    threat = check_attack(threat, images, labels)
    checks.at_least(1, steps=steps)
    images = jax.lax.stop_gradient(images)
    half = (steps + 1) // 2

    def step(t: chex.Array, state: tuple[chex.Array, ...]) -> tuple[chex.Array, ...]:
        x, found, robust = state

        def loss(logits: chex.Array, labels: chex.Array) -> chex.Array:
            true, other = probabilities(logits, labels)
            both, up = t >= half, jnp.asarray(raised)
            return jnp.where(both | up, other, 0.0) - jnp.where(both | ~up, true, 0.0)

        logits, _, gradient = loss_gradient(logits_fn, loss, x, labels)
        right, wrong = verdicts(logits, labels)
        # The first of these points, the start, may lie outside of the bounds of the images.
        right = right | (t == 0)
        found = jnp.where(like_images(right | ~(wrong | robust), x), found, x)
        size = threat.epsilon * (1 + jnp.cos(jnp.pi * (t % half) / half))
        length = jnp.broadcast_to(jnp.asarray(size, x.dtype), labels.shape)
        x = threat.project(x + like_images(length, x) * threat.ascent_direction(gradient), images)
        return x, found, robust & right

    start = starting_points(uniform_start, key, images, threat)
    x, found, robust = jax.lax.fori_loop(0, steps, step, (start, start, jnp.ones(labels.shape, bool)))
    return jax.lax.stop_gradient(jnp.where(like_images(robust, x), x, found))
