"""Adversarial attacks as one loop of projected gradient ascent.

An attack knows of a model only a :data:`LogitsFn`: images to logits. Variables, batch-norm mode, logit scale
and prior adjustment are closed over, so anything that can be written as such a function can be attacked::

    threat = ThreatModel(epsilon=8 / 255)
    logits_fn = lambda images: model.predict(params, stats, images)
    adversarial = pgd(logits_fn, key, images, labels, threat=threat, steps=20, step_size=2 / 255)

FGSM is the loop with one step from the clean image, MIM the loop with momentum, CW the loop on a margin
loss, EOT the loop with several draws a gradient: settings of :func:`pgd`, not code of their own. Attacks
combine as functions do: :func:`multi_targeted` takes an attack and is one, :func:`scaled` takes a model and
is one.

Noise is drawn per image, from that image's key. Give one key an image, and a result does not depend on how
images are grouped into batches or spread over devices; one key alone is split by position.
"""

from collections.abc import Callable
from functools import partial

import chex
import jax
import jax.numpy as jnp
import optax

from robal_jax import checks, losses
from robal_jax.attacks.combined import best_found, mean_logits
from robal_jax.attacks.threat import (
    LogitsFn,
    RandomLogitsFn,
    Start,
    ThreatModel,
    per_image,
    starting_points,
    uniform_start,
)
from robal_jax.keys import JUDGEMENT, MODEL_NOISE, fold_in, image_keys


def loss_gradient(
    logits_fn: LogitsFn | RandomLogitsFn,
    loss: losses.Loss,
    x: chex.Array,
    labels: chex.Array,
    keys: chex.PRNGKey | None = None,
    *,
    eot: int = 0,
) -> tuple[chex.Array, chex.Array, chex.Array]:
    """What an attack must know of a model at ``x``: logits, loss, and its gradient by the image.

    ``g_b = mean_n grad_x l(z(x; key_bn), y)_b``,  ``key_bn = fold_in(key_b, n)``,  ``n = 0..eot - 1``

    Each draw is one forward and one backward pass; what the caller does not use is not computed.

    Args:
      logits_fn: the model; with ``eot`` a random one, ``logits_fn(x, keys)``.
      loss: ``l``, per example.
      x: ``[B, ...]``.
      labels: ``y [B]``.
      keys: of the draws: one key or one an image; not read without ``eot``.
      eot: number of draws of a random model over which the gradient is averaged (expectation over
        transformation); 0 for a model that is not random.

    Returns:
      Logits ``[B, K]`` and loss ``[B]``, both of the last draw as in the reference AutoAttack, and the
      gradient, like ``x``.

    Raises:
      ValueError: ``eot`` without keys.

    Source: Athalye et al. (ICML 2018).
    """

    def once(*keys: chex.PRNGKey) -> tuple[chex.Array, chex.Array, chex.Array]:
        def total(x: chex.Array) -> tuple[chex.Array, tuple[chex.Array, chex.Array]]:
            logits = logits_fn(x, *keys)
            values = loss(logits, labels)
            return values.sum(), (logits, values)

        (_, (logits, values)), gradient = jax.value_and_grad(total, has_aux=True)(x)
        return logits, values, gradient

    if not eot:
        return once()
    if keys is None:
        raise ValueError("eot needs keys: the model is random")
    keys = image_keys(keys, x)

    def draw(gradient: chex.Array, n: chex.Array) -> tuple[chex.Array, tuple[chex.Array, chex.Array]]:
        logits, values, more = once(fold_in(keys, n))
        return gradient + more / eot, (logits, values)

    gradient, of_draws = jax.lax.scan(draw, jnp.zeros_like(x), jnp.arange(eot))
    logits, values = jax.tree.map(lambda stacked: stacked[-1], of_draws)
    return logits, values, gradient


def scaled(logits_fn: Callable[..., chex.Array], scale: chex.Numeric) -> Callable[..., chex.Array]:
    """The model with its logits multiplied by a positive factor, which may be traced: to attack in its place.

    Its predictions are the same, but not the gradient of the cross entropy. Large logits saturate the softmax
    and the gradient is rounded to 0; small ones, such as cosines, leave it flat and the gradient a mixture of
    all classes. Either makes a model look more robust than it is.

    Source: Carlini and Wagner (S&P 2017) on defensive distillation; RoBal (CVPR 2021), figure 2.
    """
    return lambda *arguments: scale * logits_fn(*arguments)


def pgd_path(
    logits_fn: LogitsFn | RandomLogitsFn,
    start: chex.Array,
    images: chex.Array,
    labels: chex.Array,
    *,
    threat: ThreatModel,
    steps: tuple[int, ...],
    step_size: chex.Numeric | optax.Schedule,
    loss: losses.Loss = losses.cross_entropy,
    momentum: float = 0.0,
    eot: int = 0,
    keys: chex.PRNGKey | None = None,
) -> chex.Array:
    """Projected gradient ascent from given starting points, looked at after several numbers of steps.

    ``g_t = momentum * g_{t-1} + d_t``;  ``x_{t+1} = project(x_t + step_size_t * ascent_direction(g_t))``

    where ``d_t`` is the gradient of the loss, divided by its mean absolute value per image if there is
    momentum (which makes the steps' gradients comparable; without momentum only the sign counts).

    The loop compiles once whatever the number of steps, of looks and of draws.

    Args:
      logits_fn: the model; per image, that is with running batch-norm statistics.
      start: ``x_0 [B, H, W, C]``; may lie outside of the threat model, which holds from step 1 on.
      images: ``x [B, H, W, C]``, within the threat model's bounds.
      labels: ``[B]``.
      threat: what is allowed.
      steps: increasing numbers of steps, at each of which the images are returned.
      step_size: > 0, in units of the image; or a function of ``t = 0, 1, ...``, such as optax's schedules.
      loss: per example; ascended.
      momentum: 0 is PGD, 1 is MIM as published.
      eot: see :func:`loss_gradient`.
      keys: ``[B]``, of a random model's draws, which are new in every step.

    Returns:
      ``[len(steps), B, H, W, C]``; no gradient flows back.

    Source: PGD, Madry et al. (ICLR 2018); momentum, MIM of Dong et al. (CVPR 2018).
    """
    checks.images_and_labels(images, labels, threat.lower, threat.upper)
    images, start = jax.lax.stop_gradient((images, start))

    def step(t: chex.Array, carry: tuple[chex.Array, chex.Array]) -> tuple[chex.Array, chex.Array]:
        x, direction = carry
        draws = None if keys is None else fold_in(keys, t)
        _, _, gradient = loss_gradient(logits_fn, loss, x, labels, draws, eot=eot)
        if momentum:
            size = jnp.mean(jnp.abs(gradient), axis=per_image(gradient), keepdims=True)
            # An image whose gradient vanished keeps its momentum instead of turning into NaN.
            gradient = gradient / jnp.maximum(size, jnp.finfo(size.dtype).tiny)
            gradient = direction = momentum * direction + gradient
        length = jnp.asarray(step_size(t) if callable(step_size) else step_size, x.dtype)
        x = threat.project(x + length * threat.ascent_direction(gradient), images)
        return x, direction

    def until(carry: tuple[chex.Array, chex.Array], between: tuple[chex.Array, chex.Array]) -> tuple:
        carry = jax.lax.fori_loop(*between, step, carry)
        return carry, carry[0]

    direction = jnp.zeros_like(images) if momentum else jnp.zeros((), images.dtype)
    looks = jnp.array((0, *steps))
    path: chex.Array = jax.lax.scan(until, (start, direction), (looks[:-1], looks[1:]))[1]
    return jax.lax.stop_gradient(path)


def pgd(
    logits_fn: LogitsFn | RandomLogitsFn,
    key: chex.PRNGKey,
    images: chex.Array,
    labels: chex.Array,
    *,
    threat: ThreatModel,
    steps: int,
    step_size: chex.Numeric | optax.Schedule,
    loss: losses.Loss = losses.cross_entropy,
    start: Start = uniform_start,
    momentum: float = 0.0,
    restarts: int = 1,
    eot: int = 0,
) -> chex.Array:
    """PGD with a random start: the images after the last step of :func:`pgd_path`.

    With restarts, an image keeps the first result that is misclassified, otherwise the one of highest loss.

    Args:
      logits_fn: the model; with ``eot`` a random one.
      key: one key, or one an image ``[B]``.
      images: ``[B, H, W, C]`` within the threat model's bounds.
      labels: ``[B]``.
      threat: what is allowed.
      steps: number of gradient steps, at least 1.
      step_size: see :func:`pgd_path`.
      loss: per example; ascended.
      start: where to start.
      momentum: see :func:`pgd_path`.
      restarts: number of starts, at least 1; the first ones are the same whatever their number.
      eot: see :func:`loss_gradient`; restarts are compared at the mean of as many draws of the logits.

    Returns:
      Adversarial images ``[B, H, W, C]``; no gradient flows back.
    """
    checks.images_and_labels(images, labels, threat.lower, threat.upper)
    keys = image_keys(key, images)

    def run(keys: chex.PRNGKey) -> chex.Array:
        draws = fold_in(keys, MODEL_NOISE) if eot else None
        return pgd_path(
            logits_fn, starting_points(start, keys, images, threat), images, labels,
            threat=threat, steps=(steps,), step_size=step_size, loss=loss, momentum=momentum,
            eot=eot, keys=draws,
        )[0]  # fmt: skip

    if restarts == 1:
        return run(keys)
    more = jax.vmap(lambda restart: fold_in(keys, restart))(jnp.arange(1, restarts))
    judge = partial(mean_logits, logits_fn, fold_in(keys, JUDGEMENT), eot)
    return best_found(run, jnp.concatenate([keys[None], more]), judge, loss, images, labels)
