"""Projected gradient ascent: one loop for PGD, FGSM, MIM, CW and EOT.

These are settings of :func:`pgd`: FGSM is one step of size epsilon from the clean image, MIM has momentum, CW
ascends a margin loss, EOT averages each gradient over several draws of a random model. :func:`pgd_path` is
the loop itself, from given starting points and with looks in between; :func:`loss_gradient` is the gradient
in each of its steps, which AutoPGD takes too.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import chex
import jax
import jax.numpy as jnp
import optax

from robal_jax import checks, losses
from robal_jax.attacks.attempts import best_found, mean_logits
from robal_jax.attacks.threat import (
    LARGEST,
    LogitsFn,
    RandomLogitsFn,
    Start,
    ThreatModel,
    check_attack,
    finite,
    like_images,
    of_class,
    per_image,
    starting_points,
    uniform_start,
)
from robal_jax.keys import JUDGEMENT, MODEL_NOISE, fold_in, image_keys


def pgd(
    logits_fn: LogitsFn | RandomLogitsFn,
    key: chex.PRNGKey,
    images: chex.Array,
    labels: chex.Array,
    *,
    threat: ThreatModel,
    steps: int,
    step_size: chex.Numeric | tuple[float, ...] | optax.Schedule,
    loss: losses.Loss = losses.cross_entropy,
    start: Start = uniform_start,
    momentum: float = 0.0,
    second: tuple[ThreatModel, float] | None = None,
    restarts: int = 1,
    eot: int = 0,
) -> chex.Array:
    """PGD with a random start: the images after the last step of :func:`pgd_path`.

    With restarts, an image keeps the first result that is misclassified, otherwise the one of highest loss.

    Args:
      logits_fn: the model; with ``eot`` a random one.
      key: one key, or one per image ``[B]``.
      images: ``[B, H, W, C]`` within the threat model's bounds.
      labels: ``[B]``.
      threat: allowed images.
      steps: number of gradient steps, at least 1.
      step_size: see :func:`pgd_path`.
      loss: per example; ascended.
      start: draws the starting points.
      momentum: see :func:`pgd_path`.
      second: see :func:`pgd_path`.
      restarts: number of starts, at least 1; the first starts are the same whatever their number.
      eot: see :func:`loss_gradient`; restarts are compared by the mean logits of this many draws.

    Returns:
      Adversarial images ``[B, H, W, C]``; no gradient flows back.

    Raises:
      ValueError: an argument or the model's logits have a wrong shape, type or range.

    Source: Madry et al. (ICLR 2018).

    Example:
      >>> logits_fn = lambda x: jnp.outer(x.reshape(-1) - 0.5, jnp.array([-1.0, 1.0]))  # class 1 is bright
      >>> images, labels = jnp.array([0.45, 0.2]).reshape(2, 1, 1, 1), jnp.array([0, 0])
      >>> attack = partial(pgd, threat=ThreatModel(epsilon=0.1), steps=10, step_size=0.025)
      >>> found = attack(logits_fn, jax.random.key(0), images, labels)
      >>> print(jnp.array_str(found.reshape(-1), precision=2), logits_fn(found).argmax(-1))
      [0.55 0.3 ] [1 0]
    """
    threat = check_attack(threat, images, labels)
    checks.at_least(1, steps=steps, restarts=restarts)
    keys = image_keys(key, images)

    def run(keys: chex.PRNGKey) -> chex.Array:
        draws = fold_in(keys, MODEL_NOISE) if eot else None
        return pgd_path(
            logits_fn, starting_points(start, keys, images, threat), images, labels,
            threat=threat, steps=(steps,), step_size=step_size, loss=loss, momentum=momentum,
            second=second, eot=eot, keys=draws,
        )[0]  # fmt: skip

    if restarts == 1:
        return run(keys)
    more = jax.vmap(lambda restart: fold_in(keys, restart))(jnp.arange(1, restarts))
    judge = partial(mean_logits, logits_fn, fold_in(keys, JUDGEMENT), eot)
    return best_found(run, jnp.concatenate([keys[None], more]), judge, loss, images, labels)


def pgd_iterates(
    logits_fn: LogitsFn,
    key: chex.PRNGKey,
    images: chex.Array,
    labels: chex.Array,
    *,
    threat: ThreatModel,
    steps: int,
    start: Start = uniform_start,
    **settings: Any,
) -> chex.Array:
    """All points of :func:`pgd` with one start: where it starts, and where it is after each step.

    Args:
      logits_fn: the model.
      key: one key, or one per image ``[B]``.
      images: ``[B, H, W, C]`` within the threat model's bounds.
      labels: ``[B]``.
      threat: allowed images.
      steps: number of gradient steps, at least 1.
      start: draws the starting points.
      **settings: ``step_size``, ``loss``, ``momentum`` and ``second``, see :func:`pgd_path`.

    Returns:
      ``[steps + 1, B, H, W, C]``; the gradients are taken at all but the last.

    Example:
      >>> logits_fn = lambda x: jnp.outer(x.reshape(-1) - 0.5, jnp.array([-1.0, 1.0]))
      >>> images, labels = jnp.array([0.45, 0.2]).reshape(2, 1, 1, 1), jnp.array([0, 0])
      >>> points = pgd_iterates(logits_fn, jax.random.key(0), images, labels, threat=ThreatModel(0.1),
      ...                       steps=2, step_size=0.05, start=lambda key, image, threat: image)
      >>> print(jnp.array_str(points.reshape(3, 2), precision=3))
      [[0.45 0.2 ]
       [0.5  0.25]
       [0.55 0.3 ]]
    """
    threat = check_attack(threat, images, labels)
    checks.at_least(1, steps=steps)
    first = starting_points(start, key, images, threat)
    path = pgd_path(
        logits_fn, first, images, labels, threat=threat, steps=tuple(range(1, steps + 1)), **settings
    )
    return jnp.concatenate([first[None], path])


def pgd_path(
    logits_fn: LogitsFn | RandomLogitsFn,
    start: chex.Array,
    images: chex.Array,
    labels: chex.Array,
    *,
    threat: ThreatModel,
    steps: tuple[int, ...],
    step_size: chex.Numeric | tuple[float, ...] | optax.Schedule,
    loss: losses.Loss = losses.cross_entropy,
    momentum: float = 0.0,
    second: tuple[ThreatModel, float] | None = None,
    eot: int = 0,
    keys: chex.PRNGKey | None = None,
) -> chex.Array:
    """Projected gradient ascent from given starting points, with the images after several numbers of steps.

    ``g_t = momentum * g_{t-1} + d_t``;  ``x_{t+1} = project(x_t + step_size_t * ascent_direction(g_t))``

    where ``d_t`` is the gradient of the loss. With momentum it is divided by its mean absolute value per
    image, so that the gradients of all steps are comparable; without momentum only its direction counts.

    The loop compiles once, whatever the number of steps, of looks and of draws.

    Args:
      logits_fn: the model; the logits of an image must not depend on other images, so batch norm uses its
        running statistics.
      start: ``x_0 [B, H, W, C]``; may lie outside the threat model, which holds from step 1 on.
      images: ``x [B, H, W, C]``, within the threat model's bounds.
      labels: ``[B]``.
      threat: allowed images.
      steps: numbers of steps, at least 1 and in increasing order, after which the images are returned.
      step_size: > 0, in units of the image; or a tuple with one per class, or an array ``[B]`` with one per
        image, >= 0; or a function of ``t = 0, 1, ...``, such as optax's schedules.
      loss: per example; ascended.
      momentum: 0 is PGD, 1 is MIM as published.
      second: threat model and size of another step in the same direction after each step, as the released
        code of DAFA makes it; None for none.
      eot: see :func:`loss_gradient`.
      keys: ``[B]``, of a random model's draws, which are new in every step.

    Returns:
      ``[len(steps), B, H, W, C]``; no gradient flows back.

    Raises:
      ValueError: an argument or the model's logits have a wrong shape, type or range.

    Source: PGD, Madry et al. (ICLR 2018); momentum, MIM of Dong et al. (CVPR 2018).

    Example:
      >>> logits_fn = lambda x: jnp.outer(x.reshape(-1) - 0.5, jnp.array([-1.0, 1.0]))
      >>> images, labels = jnp.array([0.45, 0.2]).reshape(2, 1, 1, 1), jnp.array([0, 0])
      >>> path = pgd_path(logits_fn, images, images, labels,
      ...                 threat=ThreatModel(epsilon=0.1), steps=(1, 2, 10), step_size=0.025)
      >>> print(jnp.array_str(path.reshape(3, 2), precision=3))
      [[0.475 0.225]
       [0.5   0.25 ]
       [0.55  0.3  ]]
    """
    threat = check_attack(threat, images, labels)
    checks.same_shape(images, start=start)
    step_size = of_class(step_size, labels, per="step sizes")
    if getattr(step_size, "ndim", 0):
        checks.lengths("step_size", step_size, len(images), "image", zero=True)
    elif not callable(step_size):
        checks.positive(step_size=step_size)
    checks.not_negative(momentum=momentum)
    looks = (0, *steps)
    for number in looks[1:]:
        checks.at_least(1, steps=number)
    known = [number for number in looks if isinstance(number, int)]
    if known != sorted(known):
        raise ValueError(f"steps are {known[1:]}; give them in increasing order")
    images, start = jax.lax.stop_gradient((images, start))

    def step(t: chex.Array, carry: tuple[chex.Array, chex.Array]) -> tuple[chex.Array, chex.Array]:
        x, direction = carry
        draws = None if keys is None else fold_in(keys, t)
        _, _, gradient = loss_gradient(logits_fn, loss, x, labels, draws, eot=eot)
        if momentum:
            size = jnp.mean(jnp.abs(gradient), axis=per_image(gradient), keepdims=True)
            # An image whose gradient vanishes or overflows keeps its momentum and does not turn into NaN.
            gradient = gradient / jnp.clip(size, jnp.finfo(size.dtype).tiny, LARGEST)
            gradient = direction = momentum * direction + gradient
        length = jnp.asarray(step_size(t) if callable(step_size) else step_size, x.dtype)
        length = like_images(length, x) if length.ndim else length
        towards = threat.ascent_direction(gradient)
        x = threat.project(x + length * towards, images)
        if second is not None:
            x = second[0].project(x + second[1] * towards, images)
        return x, direction

    def until(carry: tuple[chex.Array, chex.Array], between: tuple[chex.Array, chex.Array]) -> tuple:
        carry = jax.lax.fori_loop(*between, step, carry)
        return carry, carry[0]

    direction = jnp.zeros_like(images) if momentum else jnp.zeros((), images.dtype)
    if len(steps) == 1:  # so that a compiler knows the length of the loop
        return jax.lax.stop_gradient(until((start, direction), (0, steps[0]))[1][None])
    numbers = jnp.array(looks)
    path: chex.Array = jax.lax.scan(until, (start, direction), (numbers[:-1], numbers[1:]))[1]
    return jax.lax.stop_gradient(path)


def loss_gradient(
    logits_fn: LogitsFn | RandomLogitsFn,
    loss: losses.Loss,
    x: chex.Array,
    labels: chex.Array,
    keys: chex.PRNGKey | None = None,
    *,
    eot: int = 0,
) -> tuple[chex.Array, chex.Array, chex.Array]:
    """Logits, loss, and the gradient of the loss with respect to the image, at ``x``.

    ``g_b = mean_n grad_x l(z(x; key_bn), y)_b``,  ``key_bn = fold_in(key_b, n)``,  ``n = 0..eot - 1``

    Each draw is one forward and one backward pass; unused results are compiled away.

    Args:
      logits_fn: the model; with ``eot`` a random one, ``logits_fn(x, keys)``.
      loss: ``l``, per example.
      x: ``[B, ...]``.
      labels: ``y [B]``.
      keys: of the draws: one key, or one per image ``[B]``; not read without ``eot``.
      eot: number of draws of a random model over which the gradient is averaged (expectation over
        transformation); 0 for a model that is not random.

    Returns:
      Logits ``[B, K]`` and loss ``[B]``, both of the last draw as in the reference AutoAttack, and the
      gradient, like ``x``. A loss that is NaN is minus infinity, so that no attack prefers it; entries of the
      gradient that are not finite are made so by :func:`~robal_jax.attacks.threat.finite`.

    Raises:
      ValueError: there is ``eot`` without keys, or the logits have a wrong shape or type.

    Source: Athalye et al. (ICML 2018).

    Example:
      >>> logits_fn = lambda x: jnp.outer(x.reshape(-1) - 0.5, jnp.array([-1.0, 1.0]))
      >>> x, labels = jnp.array([0.5, 0.5]).reshape(2, 1, 1, 1), jnp.array([0, 1])
      >>> logits, values, gradient = loss_gradient(logits_fn, losses.cross_entropy, x, labels)
      >>> print(jnp.array_str(values, precision=3), gradient.reshape(-1))
      [0.693 0.693] [ 1. -1.]
    """
    checks.at_least(0, eot=eot)

    def once(*keys: chex.PRNGKey) -> tuple[chex.Array, chex.Array, chex.Array]:
        def total(x: chex.Array) -> tuple[chex.Array, tuple[chex.Array, chex.Array]]:
            logits = checks.logits_of(len(x), logits_fn(x, *keys))
            values = checks.losses_of(len(x), loss(logits, labels))
            return values.sum(), (logits, values)

        (_, (logits, values)), gradient = jax.value_and_grad(total, has_aux=True)(x)
        return logits, jnp.where(jnp.isnan(values), -jnp.inf, values), finite(gradient)

    if not eot:
        return once()
    if keys is None:
        raise ValueError("eot needs keys, because the model is random; give one key, or one per image")
    keys = image_keys(keys, x)

    def draw(gradient: chex.Array, n: chex.Array) -> tuple[chex.Array, tuple[chex.Array, chex.Array]]:
        logits, values, more = once(fold_in(keys, n))
        return finite(gradient + more / eot), (logits, values)

    gradient, of_draws = jax.lax.scan(draw, jnp.zeros_like(x), jnp.arange(eot))
    logits, values = jax.tree.map(lambda stacked: stacked[-1], of_draws)
    return logits, values, gradient


def scaled(logits_fn: Callable[..., chex.Array], scale: chex.Numeric) -> Callable[..., chex.Array]:
    """The model with its logits multiplied by a positive factor, to be attacked in place of the model.

    The predictions are the same, but the gradient of the cross entropy is not. Large logits saturate the
    softmax, so that the gradient is rounded to 0; small ones, such as cosines, leave the softmax flat, so
    that the gradient mixes all classes. Either makes a model look more robust than it is.

    Args:
      logits_fn: the model; a random one stays random.
      scale: the factor, in 1e-6..1e6; may be traced.

    Returns:
      A function with the arguments of ``logits_fn``.

    Raises:
      ValueError: the scale is out of its range.

    Source: Carlini and Wagner (S&P 2017) on defensive distillation; RoBal (CVPR 2021), figure 2.

    Example:
      >>> logits_fn = lambda x: jnp.outer(x.reshape(-1) - 0.5, jnp.array([-1.0, 1.0]))
      >>> print(scaled(logits_fn, 10.0)(jnp.full((1, 1, 1, 1), 0.75)))
      [[-2.5  2.5]]
    """
    checks.factor(scale=scale)
    return lambda *arguments: scale * logits_fn(*arguments)
