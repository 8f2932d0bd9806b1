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

import dataclasses
from collections.abc import Callable
from functools import partial

import chex
import jax
import jax.numpy as jnp
import optax

from robal_jax import losses

LogitsFn = Callable[[chex.Array], chex.Array]
"""Images ``[B, H, W, C]`` in [0, 1] to logits ``[B, K]``."""

RandomLogitsFn = Callable[[chex.Array, chex.PRNGKey], chex.Array]
"""The same of a random model, with one key an image ``[B]``."""

Attack = Callable[..., chex.Array]
"""``(logits_fn, key, images [B, H, W, C], labels [B])`` to adversarial images ``[B, H, W, C]``.

``key`` is one key or one an image ``[B]``. Attacks that ascend a loss take it by keyword, ``loss``.
"""


@dataclasses.dataclass(frozen=True)
class ThreatModel:
    """The images that an adversary may show instead of ``x``: ``||x' - x|| <= epsilon``, in bounds.

    Attributes:
      epsilon: radius, > 0, in units of the image.
      norm: a key of ``NORMS``.
      lower: smallest pixel value.
      upper: largest pixel value.
    """

    epsilon: float
    norm: str = "linf"
    lower: float = 0.0
    upper: float = 1.0

    def __post_init__(self) -> None:
        if not self.epsilon > 0:
            raise ValueError(f"epsilon must be > 0, not {self.epsilon}")
        if self.norm not in NORMS:
            raise ValueError(f"norm must be one of {', '.join(NORMS)}, not {self.norm!r}")

    def project(self, candidates: chex.Array, images: chex.Array) -> chex.Array:
        """Allowed images near the candidates: in the ball around ``images`` and in the bounds."""
        if self.norm == "l2":
            delta = candidates - images
            size = _l2(delta)
            candidates = images + delta * jnp.minimum(1.0, self.epsilon / jnp.where(size > 0, size, 1.0))
        else:
            candidates = jnp.clip(candidates, images - self.epsilon, images + self.epsilon)
        # The images lie within the bounds, so what is clipped to them comes nearer and stays in the ball.
        return jnp.clip(candidates, self.lower, self.upper)

    def ascent_direction(self, gradient: chex.Array) -> chex.Array:
        """Direction of steepest ascent in this norm, of length 1: the sign, or the unit vector; 0 for 0."""
        if self.norm == "l2":
            # Scaled first: the squares of a saturated softmax's gradient would all be 0.
            largest = jnp.abs(gradient).max(_per_image(gradient), keepdims=True)
            gradient = gradient / jnp.where(largest > 0, largest, 1.0)
            size = _l2(gradient)
            return gradient / jnp.where(size > 0, size, 1.0)
        return jnp.sign(gradient)

    def distance(self, candidates: chex.Array, images: chex.Array) -> chex.Array:
        """``||x' - x||`` of each image, ``[B]``."""
        delta = candidates - images
        return _l2(delta).reshape(-1) if self.norm == "l2" else jnp.abs(delta).max(_per_image(delta))


NORMS = {"linf": "L-infinity", "l2": "L2"}


def like_images(values: chex.Array, images: chex.Array) -> chex.Array:
    """``[B]`` with axes of size 1 behind, to go with ``[B, H, W, C]``."""
    return values.reshape(-1, *(1 for _ in _per_image(images)))


def _per_image(images: chex.Array) -> tuple[int, ...]:
    return tuple(range(1, images.ndim))


def _l2(images: chex.Array) -> chex.Array:
    """Euclidean norm of each image, ``[B, 1, ..., 1]``."""
    return jnp.sqrt(jnp.sum(jnp.square(images), axis=_per_image(images), keepdims=True))


def margin(logits: chex.Array, labels: chex.Array) -> chex.Array:
    """``z_y - max_{i != y} z_i``: logits ``[B, K]`` and labels ``[B]`` to ``[B]``, below 0 if wrong."""
    return of_class(logits, labels) - jnp.max(_of_wrong_classes(logits, labels), axis=-1)


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
    is_class = jax.nn.one_hot(classes, logits.shape[-1], dtype=bool)
    return jnp.max(jnp.where(is_class, logits, -jnp.inf), axis=-1)


def _of_wrong_classes(logits: chex.Array, labels: chex.Array) -> chex.Array:
    """``z [B, K]`` with minus infinity at the true class."""
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


def image_keys(key: chex.PRNGKey, images: chex.Array) -> chex.PRNGKey:
    """One key an image ``[B]``: the keys given, or one key split by the images' positions.

    Args:
      key: one key ``[]`` or one an image ``[B]``, as ``jax.random.key`` or ``jax.random.PRNGKey`` makes them.
      images: ``[B, ...]``.

    Raises:
      ValueError: there is neither one key nor one an image.
    """
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        key = jax.random.wrap_key_data(key)
    if key.ndim == 0:
        return jax.random.split(key, len(images))
    if key.shape != images.shape[:1]:
        raise ValueError(f"key must be one key or {len(images)}, one an image, not of shape {key.shape}")
    return key


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
        logits, values, more = once(_fold_in(keys, n))
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


def _fold_in(keys: chex.PRNGKey, data: chex.Numeric) -> chex.PRNGKey:
    """Another key of every image: ``keys [B]`` to ``[B]``."""
    return jax.vmap(lambda key: jax.random.fold_in(key, data))(keys)


Start = Callable[[chex.PRNGKey, chex.Array, ThreatModel], chex.Array]
"""One key and one image ``[H, W, C]`` to where its attack starts; not clamped, as in the released code."""


def clean_start(key: chex.PRNGKey, image: chex.Array, threat: ThreatModel) -> chex.Array:
    """``x``: the image itself."""
    del key, threat
    return image


def uniform_start(key: chex.PRNGKey, image: chex.Array, threat: ThreatModel) -> chex.Array:
    """Uniform in the ball, ``x + U(-epsilon, epsilon)`` in L-infinity: what evaluation uses."""
    if threat.norm == "l2":
        key, radius_key = jax.random.split(key)
        noise = jax.random.normal(key, image.shape, image.dtype)
        radius = jax.random.uniform(radius_key, (), image.dtype) ** (1 / image.size)
        return image + threat.epsilon * radius * noise / jnp.linalg.norm(noise.reshape(-1))
    return image + jax.random.uniform(key, image.shape, image.dtype, -threat.epsilon, threat.epsilon)


def one_sided_start(key: chex.PRNGKey, image: chex.Array, threat: ThreatModel) -> chex.Array:
    """``x + epsilon * U[0, 1)``: never below the image; what RoBal's released training does (L-infinity)."""
    return image + threat.epsilon * jax.random.uniform(key, image.shape, image.dtype)


def gaussian_start(key: chex.PRNGKey, image: chex.Array, threat: ThreatModel) -> chex.Array:
    """``x + 0.001 * N(0, 1)``: the start of TRADES (Zhang et al., ICML 2019)."""
    del threat
    return image + 0.001 * jax.random.normal(key, image.shape, image.dtype)


STARTS: dict[str, Start] = {
    "clean": clean_start,
    "uniform": uniform_start,
    "one_sided": one_sided_start,
    "gaussian": gaussian_start,
}


def starting_points(start: Start, key: chex.PRNGKey, images: chex.Array, threat: ThreatModel) -> chex.Array:
    """The start of every image ``[B, ...]``, from its own key; ``key`` is one or ``[B]``."""
    return jax.vmap(lambda key, image: start(key, image, threat))(image_keys(key, images), images)


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
    images, start = jax.lax.stop_gradient((images, start))

    def step(t: chex.Array, carry: tuple[chex.Array, chex.Array]) -> tuple[chex.Array, chex.Array]:
        x, direction = carry
        draws = None if keys is None else _fold_in(keys, t)
        _, _, gradient = loss_gradient(logits_fn, loss, x, labels, draws, eot=eot)
        if momentum:
            size = jnp.mean(jnp.abs(gradient), axis=_per_image(gradient), keepdims=True)
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
    keys = image_keys(key, images)

    def run(keys: chex.PRNGKey) -> chex.Array:
        draws = _fold_in(keys, _MODEL_NOISE) if eot else None
        return pgd_path(
            logits_fn, starting_points(start, keys, images, threat), images, labels,
            threat=threat, steps=(steps,), step_size=step_size, loss=loss, momentum=momentum,
            eot=eot, keys=draws,
        )[0]  # fmt: skip

    if restarts == 1:
        return run(keys)
    more = jax.vmap(lambda restart: _fold_in(keys, restart))(jnp.arange(1, restarts))
    judge = partial(_mean_logits, logits_fn, _fold_in(keys, _JUDGEMENT), eot)
    return _best_found(run, jnp.concatenate([keys[None], more]), judge, loss, images, labels)


# Streams of an image's key beside those of its restarts.
_MODEL_NOISE, _JUDGEMENT = 2**32 - 1, 2**32 - 2


def _mean_logits(
    logits_fn: Callable[..., chex.Array], keys: chex.PRNGKey, eot: int, x: chex.Array
) -> chex.Array:
    """Logits ``[B, K]``: those of a model that is not random, or the mean of ``eot`` draws."""
    if not eot:
        return logits_fn(x)
    return jax.lax.map(lambda draw: logits_fn(x, _fold_in(keys, draw)), jnp.arange(eot)).mean(0)


def _best_found(
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
    judge = partial(_mean_logits, logits_fn, _fold_in(keys, _JUDGEMENT), eot)
    wrong = _of_wrong_classes(judge(images), labels)

    def run(rank: chex.Array) -> chex.Array:
        towards = partial(loss, targets=ranked_class(wrong, rank))
        return attack(logits_fn, _fold_in(keys, rank), images, labels, loss=towards)

    ranks = jnp.arange(1, min(targets, wrong.shape[-1] - 1) + 1)
    return _best_found(run, ranks, judge, partial(negative_margin, confidence=0.0), images, labels)


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
