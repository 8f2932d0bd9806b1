"""The Fast Adaptive Boundary attack: the misclassified image closest to the clean one.

FAB minimises the distance; it does not raise a loss within a radius. Its result does not depend on epsilon
(unless the start does) and may lie beyond epsilon, so the caller must check the distance. Each step replaces
the decision boundary by a hyperplane, from the gradients of the logits, and moves to it within the bounds of
the image::

    closest = fab(logits_fn, key, images, labels, threat=threat, rank=2)
    fooled = logits_fn(closest).argmax(-1) != labels
    broken = fooled & (threat.distance(closest, images) <= threat.epsilon)
"""

from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp

from robal_jax import checks
from robal_jax.attacks.attempts import verdicts
from robal_jax.attacks.margins import ranked_class
from robal_jax.attacks.threat import LogitsFn, ThreatModel, check_attack, finite


def fab(
    logits_fn: LogitsFn,
    key: chex.PRNGKey | None,
    images: chex.Array,
    labels: chex.Array,
    *,
    threat: ThreatModel,
    rank: int | chex.Array | None = None,
    n_iter: int = 100,
    alpha_max: float = 0.1,
    eta: float = 1.05,
    beta: float = 0.9,
    start: chex.Array | None = None,
) -> chex.Array:
    """Fast Adaptive Boundary attack: steps to the linearised decision boundary, drawn to the clean image.

    ``x_{t+1} = clip((1 - alpha) (x_t + eta d(x_t)) + alpha (x + eta d(x)))``;
    ``alpha = min(||d(x_t)|| / (||d(x_t)|| + ||d(x)||), alpha_max)``

    Here ``d(v)`` is the displacement of ``v`` onto the hyperplane where, linearised at ``x_t``, another class
    has the same logit as the true one. A misclassified ``x_{t+1}`` is kept if it is the closest so far, and
    the search continues from ``x + beta (x_{t+1} - x)``. The other class has a fixed rank, or in each step it
    is the class whose hyperplane is nearest.

    Args:
      logits_fn: the model; the logits of an image must not depend on other images, so batch norm uses its
        running statistics.
      key: not read; nothing is drawn.
      images: ``x [B, H, W, C]`` within the threat model's bounds.
      labels: ``y [B]``.
      threat: its norm is minimised within its bounds; its epsilon is not read.
      rank: of the other class by the clean logits, from 2 for the second highest to ``K``; may be traced, so
        that all ranks share one compilation. None for the nearest class in each step, which costs one
        backward pass per class (one after the other, so it needs no more memory than a fixed rank).
      n_iter: number of steps, at least 1.
      alpha_max: largest weight of the clean image.
      eta: factor of the displacement by which a step goes beyond the hyperplane.
      beta: share of the distance that is left after a success.
      start: ``x_0 [B, H, W, C]`` within the bounds, for example from :func:`fab_start`; None for the clean
        images.

    Returns:
      The closest misclassified image that the search met, at whatever distance. The clean image if it met
      none, or if the clean image is itself misclassified. ``[B, H, W, C]``; no gradient flows back.

    Raises:
      ValueError: an argument or the model's logits have a wrong shape, type or range.

    Source: Croce and Hein, "Minimally distorted adversarial examples ..." (ICML 2020), as in AutoAttack.

    Example:
      >>> logits_fn = lambda x: jnp.outer(x.reshape(-1) - 0.5, jnp.array([-1.0, 1.0]))  # class 1 is bright
      >>> images, labels = jnp.array([0.45, 0.2]).reshape(2, 1, 1, 1), jnp.array([0, 0])
      >>> found = fab(logits_fn, None, images, labels, threat=ThreatModel(0.1), rank=2)
      >>> print(jnp.array_str(found.reshape(-1), precision=2), logits_fn(found).argmax(-1))
      [0.5 0.5] [1 1]
    """
    del key
    start = images if start is None else start
    threat = check_attack(threat, images, labels)
    checks.same_shape(images, start=start)
    checks.at_least(1, n_iter=n_iter)
    checks.not_negative(alpha_max=alpha_max, eta=eta, beta=beta)
    clean, x = (jax.lax.stop_gradient(a.reshape(len(images), -1)) for a in (images, start))

    def flat_logits_fn(x: chex.Array) -> chex.Array:
        return checks.logits_of(len(images), logits_fn(x.reshape(images.shape)))

    clean_logits = flat_logits_fn(clean)
    checks.logits_and_labels(clean_logits, labels)
    boundary = _boundary(clean_logits, labels, rank, threat)

    def step(
        _: chex.Array, carry: tuple[chex.Array, chex.Array, chex.Array]
    ) -> tuple[chex.Array, chex.Array, chex.Array]:
        x, closest, distance = carry
        w, b = boundary(x, *jax.vjp(flat_logits_fn, x))
        x = _approach(x, clean, w, b, threat=threat, alpha_max=alpha_max, eta=eta)
        right, wrong = verdicts(flat_logits_fn(x), labels)
        length = threat.distance(x, clean)
        closer = wrong & (length < distance)
        # Logits that are not finite are shown while there is nothing else.
        shown = closer | (~(right | wrong) & (distance == jnp.inf))
        closest = jnp.where(shown[:, None], x, closest)
        x = jnp.where(right[:, None], x, clean + beta * (x - clean))
        return x, closest, jnp.where(closer, length, distance)

    # Nothing is closer than 0: an image that is misclassified already stays as it is.
    wrong = verdicts(clean_logits, labels)[1]
    distance = jnp.where(wrong, 0.0, jnp.inf).astype(clean.dtype)
    _, closest, _ = jax.lax.fori_loop(0, n_iter, step, (x, clean, distance))
    return jax.lax.stop_gradient(closest.reshape(images.shape))


def fab_start(key: chex.PRNGKey, image: chex.Array, threat: ThreatModel) -> chex.Array:
    """Start of a repeated run of FAB: half the radius away in a random direction, clipped to the bounds.

    ``clip(x + epsilon / 2 * u / ||u||)`` with ``u`` uniform in [-1, 1] (L-infinity) or normal (L2)
    """
    if threat.norm == "l2":
        noise = jax.random.normal(key, image.shape, image.dtype)
    else:
        noise = jax.random.uniform(key, image.shape, image.dtype, -1.0, 1.0)
    size = threat.distance(noise[None], jnp.zeros_like(noise)[None])[0]
    return jnp.clip(image + threat.epsilon * noise / size * 0.5, threat.lower, threat.upper)


LARGE = 1e15  # largest entry of a hyperplane's normal

Hyperplane = tuple[chex.Array, chex.Array]
"""Where two classes have equal logits in a linear model of them: normals ``w [B, D]``, offsets ``b [B]``."""


def _boundary(
    clean_logits: chex.Array,
    labels: chex.Array,
    rank: int | chex.Array | None,
    threat: ThreatModel,
) -> Callable[[chex.Array, chex.Array, Callable], Hyperplane]:
    """Returns a function of images ``[B, D]``, their logits and their vector-Jacobian product."""
    classes, target = clean_logits.shape[-1], None
    if rank is not None:
        checks.rank(rank, classes, least=2)
        target = ranked_class(clean_logits, rank)

    def nearest(logits: chex.Array, vjp: Callable) -> chex.Array:
        def distance(other: chex.Array) -> chex.Array:
            return distance_to(jnp.full_like(labels, other), labels, logits, vjp, threat)

        # One class at a time, because the gradients of all classes may not fit in memory.
        return jnp.argmin(jax.lax.map(distance, jnp.arange(classes)), axis=0)

    def boundary(x: chex.Array, logits: chex.Array, vjp: Callable) -> Hyperplane:
        lead, w = _lead_of(nearest(logits, vjp) if target is None else target, labels, logits, vjp)
        return w, jnp.sum(w * x, axis=-1) - lead

    return boundary


def distance_to(
    other: chex.Array, labels: chex.Array, logits: chex.Array, vjp: Callable, threat: ThreatModel
) -> chex.Array:
    """Distance of images to the boundary with another class, if the model were linear.

    ``|z_y - z_k| / ||grad(z_y - z_k)||``, in the norm that is dual to the threat model's: L1 for L-infinity

    Args:
      other: ``k [B]``.
      labels: ``y [B]``.
      logits: ``z [B, K]``.
      vjp: of the logits, from cotangents ``[B, K]`` to a tuple with the gradient ``[B, D]``.
      threat: its norm is read.

    Returns:
      ``[B]``; infinite where ``k`` is ``y``.
    """
    lead, w = _lead_of(other, labels, logits, vjp)
    dual_norm = jnp.linalg.norm(w, ord=2 if threat.norm == "l2" else 1, axis=-1)
    return jnp.where(labels == other, jnp.inf, jnp.abs(lead) / (1e-12 + dual_norm))


def _lead_of(
    other: chex.Array, labels: chex.Array, logits: chex.Array, vjp: Callable
) -> tuple[chex.Array, chex.Array]:
    """``z_k - z_y [B]``, with one class ``k`` per image, and its gradient ``[B, D]``."""
    other, true = (jax.nn.one_hot(k, logits.shape[-1], dtype=logits.dtype) for k in (other, labels))
    w = finite(vjp(other - true)[0])
    lead = finite(jnp.sum((other - true) * logits, axis=-1).astype(w.dtype))
    # A hyperplane is the same whatever its scale; the squares of its normal must not overflow.
    excess = jnp.maximum(jnp.abs(w).max(-1) / LARGE, 1.0)
    return lead / excess, w / excess[:, None]


def _approach(
    x: chex.Array,
    clean: chex.Array,
    w: chex.Array,
    b: chex.Array,
    *,
    threat: ThreatModel,
    alpha_max: float,
    eta: float,
) -> chex.Array:
    """Images after the step of :func:`fab` towards a hyperplane; all ``[B, D]``, except ``b [B]``."""
    project = PROJECTIONS[threat.norm]
    moves = [project(v, w, b, lower=threat.lower, upper=threat.upper) for v in (x, clean)]
    # The lengths are both 0 where x and the clean image lie on the hyperplane, or can come no nearer to it.
    way, clean_way = (jnp.maximum(threat.distance(d, jnp.zeros_like(d)), 1e-8)[:, None] for d in moves)
    alpha = jnp.minimum(way / (way + clean_way), alpha_max)
    mixed = (1 - alpha) * (x + eta * moves[0]) + alpha * (clean + eta * moves[1])
    return jnp.clip(mixed, threat.lower, threat.upper)


def project_onto_hyperplane_linf(
    points: chex.Array, w: chex.Array, b: chex.Array, *, lower: float = 0.0, upper: float = 1.0
) -> chex.Array:
    """Displacement with the smallest L-infinity norm that brings points onto a hyperplane, within the bounds.

    ``min ||d||_inf  such that  <w, x + d> = b,  lower <= x + d <= upper``

    Every entry whose weight is not 0 moves equally far, until it meets its bound; all other entries stay.

    Args:
      points: ``x [B, D]``, within the bounds.
      w: ``[B, D]``, normals.
      b: ``[B]``, offsets.
      lower: smallest allowed entry.
      upper: largest allowed entry.

    Returns:
      ``d [B, D]``; if the hyperplane is out of reach within the bounds, the points come as near as possible.

    Source: Croce and Hein (ICML 2020), section 2.2.
    """
    return _displacement(points, w, b, (w != 0).astype(w.dtype), lower, upper)


def project_onto_hyperplane_l2(
    points: chex.Array, w: chex.Array, b: chex.Array, *, lower: float = 0.0, upper: float = 1.0
) -> chex.Array:
    """Displacement with the smallest L2 norm that brings points onto a hyperplane, within the bounds.

    ``min ||d||_2  such that  <w, x + d> = b,  lower <= x + d <= upper``

    Every entry moves in proportion to its weight, until it meets its bound. Weights up to 1e-8 count as 0,
    as in the released code, so that nothing overflows.

    Args:
      points: ``x [B, D]``, within the bounds.
      w: ``[B, D]``, normals.
      b: ``[B]``, offsets.
      lower: smallest allowed entry.
      upper: largest allowed entry.

    Returns:
      ``d [B, D]``; if the hyperplane is out of reach within the bounds, the points come as near as possible.

    Source: Croce and Hein (ICML 2020), section 2.2.
    """
    size = jnp.abs(w)
    return _displacement(points, w, b, jnp.where(size > 1e-8, size, 0.0), lower, upper)


def _displacement(
    points: chex.Array, w: chex.Array, b: chex.Array, speed: chex.Array, lower: float, upper: float
) -> chex.Array:
    """Moves entry ``i`` by ``min(t * speed_i, room_i)``, where ``t`` is the time at which the points arrive.

    The distance covered by then, ``sum_i |w_i| min(t * speed_i, room_i)``, is concave and piecewise linear in
    ``t``. So Newton's method from ``t = 0`` never goes too far: an entry that it finds at its bound stays
    there, and once it finds no further such entry, ``t`` is exact. This takes a few rounds of two sums each,
    and no sorting.
    """
    gap = jnp.sum(w * points, axis=-1, keepdims=True) - b[:, None]
    direction = -jnp.sign(w) * jnp.where(gap >= 0, 1.0, -1.0).astype(w.dtype)
    gap = jnp.abs(gap)
    room = jnp.where(direction < 0, points - lower, upper - points)
    stops = jnp.where(speed > 0, room / jnp.where(speed > 0, speed, 1.0), 0.0)
    rate = jnp.abs(w) * speed

    def meeting(stopped: chex.Array) -> chex.Array:
        made = jnp.sum(jnp.where(stopped, rate * stops, 0.0), axis=1, keepdims=True)
        rest = jnp.sum(jnp.where(stopped, 0.0, rate), axis=1, keepdims=True)
        # If the hyperplane is out of reach, or all weights are 0, every entry goes as far as it can.
        return jnp.where(rest > 0, jnp.minimum((gap - made) / jnp.where(rest > 0, rest, 1.0), most), most)

    def refine(state: tuple[chex.Array, chex.Array, chex.Array]) -> tuple[chex.Array, chex.Array, chex.Array]:
        stopped, time, _ = state
        more = stopped | (stops < time)
        return more, meeting(more), jnp.any(more != stopped)

    nothing, most = jnp.zeros(w.shape, bool), jnp.finfo(w.dtype).max
    state = nothing, meeting(nothing), jnp.array(True)
    _, time, _ = jax.lax.while_loop(lambda state: state[2], refine, state)
    return direction * jnp.clip(time * speed, 0.0, room)


PROJECTIONS = {"linf": project_onto_hyperplane_linf, "l2": project_onto_hyperplane_l2}
