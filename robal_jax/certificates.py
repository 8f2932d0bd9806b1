"""Certified lower bounds: what no adversary within the threat model can do to a small network.

Attacks leave an upper estimate of the robust accuracy; the bounds here leave a lower one, and the truth lies
between the two. A box of images is followed through the operations of ``logits_fn``, as JAX traces them, by
one of two methods:

- ``intervals``, interval bound propagation (IBP): each value becomes an interval; an affine operation acts on
  centre and radius, a monotone one on both ends::

    [c - r, c + r]  ->  W c + b -/+ |W| r,        [l, h]  ->  [f(l), f(h)]

- ``crown``, linear bounds (CROWN): the interval of each activation's input, and the margin ``z_y - z_i``, are
  followed back to the images through lines below and above the activations, see ``linear_bounds``. Never
  worse than intervals but for rounding, and much tighter; it takes two backward passes per unit, so
  that it is for small networks.

With both, the affine operations at the end are merged with the margin, so that what the logits have in common
cancels. A factor that an image's features share, such as ``1 / ||f||`` of a cosine head, is taken out of the
margin. Where an operation has no lines (max pooling, leaky ReLU, ELU, products), ``crown`` uses its interval.

Rounding: every bound holds for the exact network and for the computed one, whatever the order of its sums.
Ends are moved outward by ``2 k u / (1 - k u)`` of the sum of the absolute terms, with ``k = n + 8`` for ``n``
terms and the unit roundoff ``u`` of the type; on the way back the same is done at each step. Two things are
assumed: elementary functions (exp, tanh, ...) and their derivatives are exact to 24 units of ``2 u``, and
products run in the full precision of their type. TF32 and convolutions by FFT or Winograd do not; evaluate
such a network in float64 to rely on a bound.

Bounds are looser for networks that were not trained for them and grow looser with depth and radius: an image
that is not certified is not thereby broken. The rule of each operation is in ``intervals``.

Source: Gowal et al., "On the Effectiveness of Interval Bound Propagation for Training Verifiably Robust
Models" (2018), sections 3 and 3.2 (merging); Mirman et al., "Differentiable Abstract Interpretation for
Provably Robust Neural Networks" (ICML 2018); Zhang et al., "Efficient Neural Network Robustness Certification
with General Activation Functions" (NeurIPS 2018). Of the rounding: Higham, "Accuracy and Stability of
Numerical Algorithms" (2002), section 3.1.

The examples assume ``import numpy as np``, ``import jax.numpy as jnp``,
``from robal_jax.attacks import ThreatModel`` and ``from robal_jax.certificates import *``.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Literal

from robal_jax import checks
from robal_jax.attacks.threat import LogitsFn, ThreatModel, check_type, like_images
from robal_jax.errors import InputError
from robal_jax.intervals import Interval, evaluate, made_by, unknown
from robal_jax.linear_bounds import least, tighten

METHODS = ("crown", "intervals")
"""How bounds are found: tight, for small networks, or fast."""


def interval_bounds(
    logits_fn: LogitsFn, lower: chex.Array, upper: chex.Array
) -> tuple[chex.Array, chex.Array]:
    """Bounds the logits of all images of a box, one box per image.

    ``low_k <= z_k(x) <= high_k`` for all ``lower <= x <= upper``

    Args:
      logits_fn: images ``[B, ...]`` to logits ``[B, K]``, of each image by itself.
      lower: ``[B, ...]``, smallest values of the pixels.
      upper: ``[B, ...]``, largest ones, at least ``lower``.

    Returns:
      ``low [B, K]`` and ``high [B, K]``; infinite where there is no bound.

    Raises:
      InputError: ``logits_fn`` has an operation without a rule; the message names it.
      ValueError: a wrong shape or type.

    Source: Gowal et al. (2018), section 3.

    Example:
      >>> weight = jnp.array([[1.0, -1.0], [0.0, 2.0]])
      >>> lower, upper = jnp.array([[0.25, 0.0]]), jnp.array([[0.75, 1.0]])
      >>> low, high = interval_bounds(lambda x: jnp.maximum(x @ weight, 0), lower, upper)
      >>> print(jnp.array_str(low, precision=3), jnp.array_str(high, precision=3))
      [[0.25 0.  ]] [[0.75 1.75]]
    """
    _boxes(lower, upper)

    def one(low: chex.Array, high: chex.Array) -> tuple[chex.Array, chex.Array]:
        logits = _propagate(logits_fn, low, high)
        return _or_infinite(logits.low[0], -jnp.inf), _or_infinite(logits.high[0], jnp.inf)

    return jax.vmap(one)(jnp.asarray(lower), jnp.asarray(upper))


def margin_bounds(
    logits_fn: LogitsFn, lower: chex.Array, upper: chex.Array, labels: chex.Array, *, method: str = "crown"
) -> chex.Array:
    """Bounds the margin of all images of a box from below, one box per image.

    ``m <= min_x min_{i != y} z_y(x) - z_i(x)`` over all ``lower <= x <= upper``

    The bound is exact, but for rounding, where the network is affine on the box.

    Args:
      logits_fn: images ``[B, ...]`` to logits ``[B, K]``, of each image by itself.
      lower: ``[B, ...]``, smallest values of the pixels.
      upper: ``[B, ...]``, largest ones, at least ``lower``.
      labels: ``y [B]``, integers in ``0..K-1``.
      method: one of ``METHODS``; 'crown' takes one image at a time.

    Returns:
      ``m [B]``; minus infinity where there is no bound.

    Raises:
      InputError: ``logits_fn`` has an operation without a rule; the message names it. Or an unknown method.
      ValueError: a wrong shape, type or label.

    Source: Gowal et al. (2018), section 3.2; Zhang et al. (2018), section 3.2.

    Example:
      >>> weight = jnp.array([[1.0, -1.0], [0.0, 2.0]])
      >>> lower, upper = jnp.array([[0.25, 0.0]]), jnp.array([[0.75, 0.125]])
      >>> print(jnp.array_str(margin_bounds(lambda x: x @ weight, lower, upper, jnp.array([0])), precision=3))
      [0.25]
    """
    _boxes(lower, upper)
    checks.labels_of(len(lower), labels)
    if method not in METHODS:
        raise InputError(f"unknown method {method!r}; use one of {', '.join(METHODS)}")
    lines = method == "crown"

    def one(low: chex.Array, high: chex.Array, label: chex.Array) -> chex.Array:
        logits = _propagate(logits_fn, low, high, lines)
        unit = jnp.eye(logits.low.shape[1], dtype=logits.low.dtype)
        differences = (unit[label][None] - unit)[:, None]
        margins = jax.vmap(partial(least, logits, lines=False))(differences)
        if lines:
            margins = jnp.maximum(margins, jax.vmap(partial(least, logits, lines=True))(differences))
        return jnp.min(jnp.where(jnp.arange(len(unit)) == label, jnp.inf, margins))

    classes = jax.eval_shape(partial(checks.called, logits_fn), jnp.asarray(lower)).shape[-1]
    checks.labels_in(classes, labels)
    arrays = tuple(map(jnp.asarray, (lower, upper, labels)))
    return jax.lax.map(lambda of_image: one(*of_image), arrays) if lines else jax.vmap(one)(*arrays)


def certified(
    logits_fn: LogitsFn, images: chex.Array, labels: chex.Array, *, threat: ThreatModel, method: str = "crown"
) -> chex.Array:
    """Says which images no adversary can break: their margin is positive on all images of the threat model.

    Its mean is a lower bound of the robust accuracy, as one under attack is an upper one. It can be compiled,
    and batches of any size give the same result.

    Args:
      logits_fn: images ``[B, ...]`` to logits ``[B, K]``, of each image by itself.
      images: ``x [B, ...]``, within the bounds of the threat model.
      labels: ``y [B]``, integers in ``0..K-1``.
      threat: L-infinity; a radius for all images, or one per class or image.
      method: 'crown', for small networks, or 'intervals', which is fast and loose.

    Returns:
      bool ``[B]``. False means: not shown, by these bounds.

    Raises:
      InputError: ``logits_fn`` has an operation without a rule, the norm is another, or an unknown method.
      ValueError: a wrong shape, type or range.

    Source: Gowal et al. (2018), section 3; Zhang et al. (2018), section 3.2.

    Example:
      >>> logits_fn = lambda x: x @ jnp.array([[1.0, -1.0], [0.0, 2.0]])
      >>> images = jnp.array([[0.5, 0.25], [0.5, 0.25]])
      >>> labels, threat = jnp.array([0, 0]), ThreatModel(jnp.array([0.1, 0.2]))
      >>> print(certified(logits_fn, images, labels, threat=threat))
      [ True False]
    """
    check_type(threat)
    threat.check(images, labels)
    if threat.norm != "linf":
        raise InputError(f"bounds are for the norm linf, not {threat.norm}; use ThreatModel(epsilon)")
    images = jnp.asarray(images)
    radius = jnp.asarray(threat.of(labels, images.dtype).epsilon, images.dtype)
    radius = like_images(radius, images) if radius.ndim else radius
    lower = jnp.maximum(images - radius, threat.lower)
    upper = jnp.minimum(images + radius, threat.upper)
    return margin_bounds(logits_fn, lower, upper, labels, method=method) > 0


def bisect(
    low: np.ndarray,
    high: np.ndarray,
    certifies: Callable[[np.ndarray, np.ndarray], np.ndarray],
    *,
    size: int,
) -> Iterator[None]:
    """Counts the radii of an ascending list within which each image is certified, by bisection.

    An image that is certified within a radius is so within all smaller ones. After each call the state is in
    ``low`` and ``high``, which are changed in place, so that the search can be resumed.

    Args:
      low: number of radii within which an image is certified, integers ``[n]``; 0 at the beginning.
      high: number of radii at most, integers ``[n]``; that of all radii at the beginning.
      certifies: ``(ids [m], numbers [m]) -> bool [m]``, whether each of these images is certified within the
        radius with its number, from 0.
      size: images per call, at most.

    Yields:
      None after each call; at the end ``low`` is ``high``.

    Example:
      >>> largest, radii = np.array([0.3, 0.05, 9.0]), np.array([0.1, 0.2, 0.4])
      >>> low, high = np.zeros(3, int), np.full(3, 3)
      >>> for _ in bisect(low, high, lambda ids, numbers: radii[numbers] <= largest[ids], size=2):
      ...     pass
      >>> print(low)
      [2 0 3]
    """
    while len(ids := np.flatnonzero(low < high)[:size]):
        numbers = (low[ids] + high[ids]) // 2
        found = certifies(ids, numbers)
        low[ids], high[ids] = np.where(found, numbers + 1, low[ids]), np.where(found, high[ids], numbers)
        yield


def _boxes(lower: chex.Array, upper: chex.Array) -> None:
    checks.floats(lower=lower, upper=upper)
    checks.same_shape(lower, upper=upper)


def _or_infinite(bound: chex.Array, infinite: float) -> chex.Array:
    """NaN comes of infinity and of no logarithm or root: there is no bound."""
    return jnp.where(jnp.isnan(bound), infinite, bound)


# ---------------------------------------------------------------- programs

_CALLS = {
    "jit", "pjit", "closed_call", "core_call", "custom_jvp_call", "custom_vjp_call", "checkpoint", "remat2",
}  # fmt: skip


def _propagate(logits_fn: LogitsFn, low: chex.Array, high: chex.Array, lines: bool = False) -> Interval:
    """Returns the logits ``[1, K]`` of the box of one image."""
    program = jax.make_jaxpr(partial(checks.called, logits_fn))(low[None])
    (logits,) = _run(program.jaxpr, program.consts, [Interval(low[None], high[None])], lines)
    if unknown(logits):
        return logits
    return Interval(logits, logits)  # no image changes them


def _run(program: Any, constants: Sequence[Any], inputs: Sequence[Any], lines: bool) -> list[Any]:
    """Runs a program on intervals and arrays."""
    values = dict(zip([*program.constvars, *program.invars], [*constants, *inputs], strict=True))

    def read(variable: Any) -> Any:
        if isinstance(variable, Literal):
            aval: Any = variable.aval
            return jnp.asarray(variable.val, aval.dtype)
        return values[variable]

    for equation in program.eqns:
        arguments = [read(variable) for variable in equation.invars]
        if equation.primitive.name in _CALLS:
            inner = equation.params.get("jaxpr", equation.params.get("call_jaxpr"))
            outputs = _run(getattr(inner, "jaxpr", inner), getattr(inner, "consts", ()), arguments, lines)
        elif equation.primitive.name == "stop_gradient":
            outputs = arguments  # it would hide the slopes from the margin
        elif any(unknown(argument) for argument in arguments):
            outputs = [_made_by(equation, arguments, lines)]
        else:
            found = evaluate(equation, *arguments)
            outputs = found if equation.primitive.multiple_results else [found]
        values.update(zip(equation.outvars, outputs, strict=True))
    return [read(variable) for variable in program.outvars]


def _made_by(equation: Any, inputs: Sequence[Any], lines: bool) -> Interval:
    """Returns the interval of an equation's output; with lines, inputs of an activation are tightened."""
    made = made_by(equation, inputs)
    if made.affine or not lines:
        return made
    for value in filter(unknown, inputs):
        tighten(value)
    return made_by(equation, inputs)
