"""Linear bounds: least values of linear functions of an array of a network, followed back to the images.

A lower bound of ``<c, z>`` over a box of images is looked for from the output backwards (CROWN). An affine
operation hands ``c`` on to its inputs, as a gradient does. An activation is held between two lines, of which
the sign of ``c`` chooses one::

  <c, W x + b> = <W^T c, x> + <c, b>,        s x + t <= f(x) <= S x + T  for  low <= x <= high

The intervals in which the lines hold are found in the same way, from the first activation to the last. An
operation without lines ends the way: its interval is used.

Rounding: ``c`` is what was computed, whatever was meant. Each step holds for the exact values of the network
and for those that it computes, if the rounding of the step is taken off. With ``n`` numbers in ``z``, ``k``
terms in each of them and the sums ``|W| |x| + |b|`` of their absolute terms, that is ``rounding(k + 2 n)``
of ``<|c|, |W| |x| + |b|>``, for the step of the network, for ``W^T c`` and for ``<c, b>`` together.

Source: Zhang et al., "Efficient Neural Network Robustness Certification with General Activation Functions"
(NeurIPS 2018), sections 3.2 and 3.3; Xu et al., "Automatic Perturbation Analysis for Scalable Certified
Robustness and Beyond" (NeurIPS 2020), section 3.1 (graphs); Singh et al., "Fast and Effective Robustness
Certification" (NeurIPS 2018), theorem 3.2 (lines of equal slope).
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp

from robal_jax.intervals import ELEMENTARY_TERMS, Interval, evaluate, rounding, unknown

ROWS = 256
"""Linear functions of an image's array that are followed at once; more need more memory."""


class Lines(NamedTuple):
    """``low_slope x + low_shift <= f(x) <= high_slope x + high_shift``, each of the shape of ``x``.

    The function is the computed one, too, and the lines are those of these very numbers.
    """

    low_slope: chex.Array
    low_shift: chex.Array
    high_slope: chex.Array
    high_shift: chex.Array


def tighten(node: Interval) -> None:
    """Moves the ends of an affine node inward to its linear bounds."""
    if node.tight or not node.affine:
        return
    count, dtype = node.low.size, node.low.dtype

    def least_of(row: chex.Array) -> chex.Array:
        unit = jnp.zeros(count, dtype).at[row % count].set(jnp.where(row < count, 1, -1).astype(dtype))
        return least(node, unit.reshape(node.low.shape), lines=True)

    found = jax.lax.map(least_of, jnp.arange(2 * count), batch_size=min(ROWS, 2 * count))
    low, negative_high = found.reshape(2, *node.low.shape)
    node.low, node.high = jnp.maximum(node.low, low), jnp.minimum(node.high, -negative_high)
    node.tight = True


def least(node: Interval, weights: chex.Array, *, lines: bool) -> chex.Array:
    """Bounds a linear function of a node from below, ``<c, node>``.

    Args:
      node: the image's array ``[...]``.
      weights: ``c [...]``.
      lines: whether activations are held between lines; if not, the way ends at their intervals.

    Returns:
      A number; minus infinity where there is no bound.
    """
    values, errors, pending = [], [], {node: [weights]}
    while pending:
        node = max(pending, key=lambda made: made.depth)  # all that depends on it is done
        parts = pending.pop(node)
        weights = sum(parts[1:], parts[0])
        if len(parts) > 1:
            shares = rounding(len(parts), weights.dtype) * sum(map(jnp.abs, parts))
            errors.append(_inner(shares, node.largest))
        step = _before(node, weights, lines)
        values.append(step.value)
        errors.append(step.error)
        for value, handed in step.handed:
            underflow = weights.size * float(jnp.finfo(handed.dtype).tiny)
            errors.append(underflow * jnp.sum(value.largest))
            pending.setdefault(value, []).append(handed)
    numbers, error = jnp.stack(values), sum(errors)
    error += rounding(2 * len(errors), numbers.dtype) * jnp.sum(jnp.abs(numbers))
    return _or_none(jnp.sum(numbers) - error)


class _Step(NamedTuple):
    """A number with its error, and the weights of nodes: their sum is least for what they replace."""

    value: chex.Array
    error: chex.Array
    handed: Sequence[tuple[Interval, chex.Array]] = ()


def _before(node: Interval, weights: chex.Array, lines: bool) -> _Step:
    """Replaces a node by its inputs, or by a number where the way ends."""
    inputs = [value for value in node.inputs if unknown(value)]
    if node.affine:

        def replay(*values: chex.Array) -> Any:
            left = iter(values)
            return evaluate(node.equation, *[next(left) if unknown(x) else x for x in node.inputs])

        constant, pull = jax.vjp(replay, *[jnp.zeros_like(value.low) for value in inputs])
        share = rounding(node.terms + 2 * weights.size, weights.dtype)
        error = share * _inner(jnp.abs(weights), node.size)
        return _Step(_inner(weights, constant), error, list(zip(inputs, pull(weights), strict=True)))
    if lines and node.name in LINES and len(set(inputs)) == 1:
        value = inputs[0]
        line = LINES[node.name](node, value)
        slopes = weights * jnp.where(weights > 0, line.low_slope, line.high_slope)
        shift, error = _sum_of(weights, jnp.where(weights > 0, line.low_shift, line.high_shift))
        error += rounding(1, slopes.dtype) * _inner(jnp.abs(slopes), value.largest)
        return _Step(shift, error, [(value, slopes)])
    end = _least_by_interval(node, weights)
    return _Step(jnp.maximum(end, _least_by_factor(node, weights, lines)), jnp.zeros_like(end))


def _sum_of(weights: chex.Array, values: chex.Array) -> tuple[chex.Array, chex.Array]:
    """Returns an inner product and its error."""
    size, kind = _inner(jnp.abs(weights), jnp.abs(values)), jnp.finfo(weights.dtype)
    return _inner(weights, values), rounding(values.size, kind.dtype) * size + values.size * float(kind.tiny)


def _least_by_interval(base: Interval, weights: chex.Array) -> chex.Array:
    value, error = _sum_of(weights, jnp.where(weights > 0, base.low, base.high))
    return _or_none(value - error)


def _least_by_factor(base: Interval, weights: chex.Array, lines: bool) -> chex.Array | float:
    """Bounds a linear function of a product or quotient whose second factor is one positive number."""
    if base.name not in ("mul", "div") or not all(map(unknown, base.inputs)):
        return -jnp.inf
    value, factor = base.inputs
    if base.name == "mul" and _common(factor) is None:
        value, factor = factor, value
    number = _common(factor)
    if number is None:
        return -jnp.inf
    bound, low, high = least(value, weights, lines=lines), number.low.reshape(()), number.high.reshape(())
    ends = (bound / low, bound / high) if base.name == "div" else (bound * low, bound * high)
    scaled = jnp.minimum(*ends)
    size = jnp.abs(scaled) + _inner(jnp.abs(weights), base.largest)  # each product is rounded, too
    scaled -= rounding(2 + weights.size, scaled.dtype) * size
    return jnp.where(low > 0, _or_none(scaled), -jnp.inf)


def _common(node: Interval) -> Interval | None:
    """Returns the single number that an array repeats; None if there are several."""
    while node.low.size > 1 and node.name == "broadcast_in_dim":
        node = node.inputs[0]
    return node if node.low.size == 1 else None


def _inner(weights: chex.Array, values: chex.Array) -> chex.Array:
    return jnp.sum(weights * values)


def _or_none(bound: chex.Array) -> chex.Array:
    """NaN comes of infinity and of no logarithm or root: there is no bound."""
    return jnp.where(jnp.isnan(bound), -jnp.inf, bound)


# ---------------------------------------------------------------- lines


def _corner(low: chex.Array, high: chex.Array, constant: Any) -> Lines:
    """``max(x, c)``: below it one of the two, above it the chord."""
    steep = (high - constant) / (high - low)
    steep = jnp.where(low >= constant, 1.0, jnp.where(high <= constant, 0.0, steep))
    ends = [jnp.maximum(end, constant) - steep * end for end in (low, high)]
    sizes = jnp.maximum(jnp.abs(low), jnp.abs(high)) + jnp.abs(constant)
    shift = jnp.maximum(*ends) + rounding(2, low.dtype) * sizes
    is_x = high - constant > constant - low
    return Lines(jnp.where(is_x, 1.0, 0.0), jnp.where(is_x, 0.0, constant), steep, shift)


def _maximum(node: Interval, x: Interval) -> Lines:
    """``max(x, c)``."""
    return _corner(x.low, x.high, _constant(node))


def _minimum(node: Interval, x: Interval) -> Lines:
    """``min(x, c) = -max(-x, -c)``."""
    line = _corner(-x.high, -x.low, -_constant(node))
    return Lines(line.high_slope, -line.high_shift, line.low_slope, -line.low_shift)


def _constant(node: Interval) -> Any:
    return next(value for value in node.inputs if not unknown(value))


def _square(node: Interval, x: Interval) -> Lines:
    """``x^2``: below it the tangent in the middle, above it the chord."""
    middle, steep = x.low / 2 + x.high / 2, x.low + x.high
    above = jnp.maximum(x.low * (x.low - steep), x.high * (x.high - steep))
    error = rounding(4, steep.dtype) * 4 * x.largest**2 + float(jnp.finfo(steep.dtype).tiny)
    return Lines(2 * middle, -(middle**2) - error, steep, above + error)


def _increasing(node: Interval, x: Interval) -> Lines:
    """Functions whose derivative is positive, and least at one of the ends: parallel lines through both."""
    slopes = [
        jax.jvp(lambda end: evaluate(node.equation, end), (end,), (jnp.ones_like(end),))[1]
        for end in (x.low, x.high)
    ]
    share, slope = rounding(4 * ELEMENTARY_TERMS, node.low.dtype), jnp.minimum(*slopes)
    slope = jnp.where(jnp.isfinite(slope), jnp.maximum(slope - share * (1 + slope), 0.0), 0.0)
    error = share * (node.largest + slope * x.largest)
    return Lines(slope, node.low - slope * x.low - error, slope, node.high - slope * x.high + error)


LINES: dict[str, Callable[[Interval, Interval], Lines]] = {
    "max": _maximum,
    "min": _minimum,
    **dict.fromkeys(("mul", "square"), _square),
    **dict.fromkeys(
        ("asinh", "atan", "cbrt", "erf", "exp", "exp2", "expm1", "log", "log1p", "logistic", "sqrt", "tanh"),
        _increasing,
    ),
}
"""Lines of a node that is made of one unknown array, by the name of its operation."""
