"""Certified lower bounds: what no adversary within the threat model can do to a small network.

Attacks leave an upper estimate of the robust accuracy; the bounds here leave a lower one, and the truth lies
between the two. Interval bound propagation (IBP) follows a box of images through the operations of
``logits_fn``, as JAX traces them. Each value becomes an interval; an affine operation acts on centre and
radius, a monotone one on both ends::

  [c - r, c + r]  ->  W c + b -/+ |W| r,        [l, h]  ->  [f(l), f(h)]

The affine operations at the end are merged with the margin, ``z_y - z_i``, so that what the logits have in
common cancels. A factor that an image's features share, such as ``1 / ||f||`` of a cosine head, is taken out
of the margin.

Rounding: every interval is widened such that it holds the exact value and the one that the network computes,
whatever the order of its sums: by ``2 k u / (1 - k u)`` of the sum of the absolute terms, with
``k = n + 8`` for ``n`` terms and the unit roundoff ``u`` of the type. Two things are assumed: elementary
functions (exp, tanh, ...) are exact to 24 units of ``2 u``, and products run in the full precision of their
type. TF32 and convolutions by FFT or Winograd do not; evaluate such a network in float64 to rely on a bound.

Bounds are loose for networks that were not trained for them and grow looser with depth: an image that is not
certified is not thereby broken.

Source: Gowal et al., "On the Effectiveness of Interval Bound Propagation for Training Verifiably Robust
Models" (2018), sections 3 and 3.2 (merging); Mirman et al., "Differentiable Abstract Interpretation for
Provably Robust Neural Networks" (ICML 2018). Of the rounding: Higham, "Accuracy and Stability of Numerical
Algorithms" (2002), section 3.1.

The examples assume ``import jax.numpy as jnp``, ``from robal_jax.attacks import ThreatModel`` and
``from robal_jax.certificates import *``.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import chex
import jax
import jax.numpy as jnp
from jax.extend.core import Literal

from robal_jax import checks
from robal_jax.attacks.threat import LogitsFn, ThreatModel, like_images
from robal_jax.errors import InputError

_ELEMENTARY_TERMS = 16
"""Terms of a sum whose rounding is that of an elementary function."""


@dataclasses.dataclass(frozen=True, eq=False)
class _Interval:
    """All values that one array of the network may have; the graph of what made it.

    Attributes:
      low, high: ends.
      equation: of the program, which made it; None for the images.
      inputs: of the equation, intervals and arrays.
      terms: rounding errors of the equation are those of a sum of so many terms.
      affine: whether the equation is affine in its intervals.
    """

    low: chex.Array
    high: chex.Array
    equation: Any = None
    inputs: Sequence[Any] = ()
    terms: int = 0
    affine: bool = False

    @property
    def largest(self) -> chex.Array:
        """Largest absolute values."""
        return jnp.maximum(jnp.abs(self.low), jnp.abs(self.high))


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
    logits_fn: LogitsFn, lower: chex.Array, upper: chex.Array, labels: chex.Array
) -> chex.Array:
    """Bounds the margin of all images of a box from below, one box per image.

    ``m <= min_x min_{i != y} z_y(x) - z_i(x)`` over all ``lower <= x <= upper``

    The bound is exact, but for rounding, where the network is affine on the box.

    Args:
      logits_fn: images ``[B, ...]`` to logits ``[B, K]``, of each image by itself.
      lower: ``[B, ...]``, smallest values of the pixels.
      upper: ``[B, ...]``, largest ones, at least ``lower``.
      labels: ``y [B]``, integers in ``0..K-1``.

    Returns:
      ``m [B]``; minus infinity where there is no bound.

    Raises:
      InputError: ``logits_fn`` has an operation without a rule; the message names it.
      ValueError: a wrong shape, type or label.

    Source: Gowal et al. (2018), section 3.2.

    Example:
      >>> weight = jnp.array([[1.0, -1.0], [0.0, 2.0]])
      >>> lower, upper = jnp.array([[0.25, 0.0]]), jnp.array([[0.75, 0.125]])
      >>> print(jnp.array_str(margin_bounds(lambda x: x @ weight, lower, upper, jnp.array([0])), precision=3))
      [0.25]
    """
    _boxes(lower, upper)
    checks.labels_of(len(lower), labels)

    def one(low: chex.Array, high: chex.Array, label: chex.Array) -> chex.Array:
        logits = _propagate(logits_fn, low, high)
        unit = jnp.eye(logits.low.shape[1], dtype=logits.low.dtype)
        margins = _least(logits, (unit[label][None] - unit)[:, None])
        return jnp.min(jnp.where(jnp.arange(len(unit)) == label, jnp.inf, margins))

    classes = jax.eval_shape(partial(checks.called, logits_fn), jnp.asarray(lower)).shape[-1]
    checks.labels_in(classes, labels)
    return jax.vmap(one)(jnp.asarray(lower), jnp.asarray(upper), jnp.asarray(labels))


def certified(
    logits_fn: LogitsFn, images: chex.Array, labels: chex.Array, *, threat: ThreatModel
) -> chex.Array:
    """Says which images no adversary can break: their margin is positive on all images of the threat model.

    Its mean is a lower bound of the robust accuracy, as one under attack is an upper one. It can be compiled,
    and batches of any size give the same result.

    Args:
      logits_fn: images ``[B, ...]`` to logits ``[B, K]``, of each image by itself.
      images: ``x [B, ...]``, within the bounds of the threat model.
      labels: ``y [B]``, integers in ``0..K-1``.
      threat: L-infinity; a radius for all images, or one per class or image.

    Returns:
      bool ``[B]``. False means: not shown, by these bounds.

    Raises:
      InputError: ``logits_fn`` has an operation without a rule, or the norm is another.
      ValueError: a wrong shape, type or range.

    Source: Gowal et al. (2018), section 3.

    Example:
      >>> logits_fn = lambda x: x @ jnp.array([[1.0, -1.0], [0.0, 2.0]])
      >>> images = jnp.array([[0.5, 0.25], [0.5, 0.25]])
      >>> labels, threat = jnp.array([0, 0]), ThreatModel(jnp.array([0.1, 0.2]))
      >>> print(certified(logits_fn, images, labels, threat=threat))
      [ True False]
    """
    threat.check(images, labels)
    if threat.norm != "linf":
        raise InputError(f"bounds are for the norm linf, not {threat.norm}; use ThreatModel(epsilon)")
    images = jnp.asarray(images)
    radius = jnp.asarray(threat.of(labels, images.dtype).epsilon, images.dtype)
    radius = like_images(radius, images) if radius.ndim else radius
    lower = jnp.maximum(images - radius, threat.lower)
    upper = jnp.minimum(images + radius, threat.upper)
    return margin_bounds(logits_fn, lower, upper, labels) > 0


def _boxes(lower: chex.Array, upper: chex.Array) -> None:
    checks.floats(lower=lower, upper=upper)
    checks.same_shape(lower, upper=upper)


def _or_infinite(bound: chex.Array, infinite: float) -> chex.Array:
    """NaN comes of infinity and of no logarithm or root: there is no bound."""
    return jnp.where(jnp.isnan(bound), infinite, bound)


# ---------------------------------------------------------------- programs

_CALLS = {"jit", "pjit", "closed_call", "core_call", "custom_jvp_call", "custom_vjp_call", "checkpoint"}


def _propagate(logits_fn: LogitsFn, low: chex.Array, high: chex.Array) -> _Interval:
    """Returns the logits ``[1, K]`` of the box of one image."""
    program = jax.make_jaxpr(partial(checks.called, logits_fn))(low[None])
    (logits,) = _run(program.jaxpr, program.consts, [_Interval(low[None], high[None])])
    if _unknown(logits):
        return logits
    return _Interval(logits, logits)  # no image changes them


def _run(program: Any, constants: Sequence[Any], inputs: Sequence[Any]) -> list[Any]:
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
            outputs = _run(getattr(inner, "jaxpr", inner), getattr(inner, "consts", ()), arguments)
        elif equation.primitive.name == "stop_gradient":
            outputs = arguments  # it would hide the slopes from the margin
        elif any(_unknown(argument) for argument in arguments):
            outputs = [_made_by(equation, arguments)]
        else:
            found = _apply(equation, *arguments)
            outputs = found if equation.primitive.multiple_results else [found]
        values.update(zip(equation.outvars, outputs, strict=True))
    return [read(variable) for variable in program.outvars]


def _apply(equation: Any, *arrays: Any) -> Any:
    """Evaluates an equation on arrays, in full precision."""
    params = equation.params
    if "precision" in params:
        params = params | {"precision": (jax.lax.Precision.HIGHEST,) * 2}
    return equation.primitive.bind(*arrays, **params)


def _made_by(equation: Any, inputs: Sequence[Any]) -> _Interval:
    """Returns the interval of an equation's output."""
    name = equation.primitive.name
    known = [x.low.dtype for x in inputs if _unknown(x)]
    numbers = all(jnp.issubdtype(dtype, jnp.floating) for dtype in known)
    if name not in _RULES or not (numbers or name in ("select_n", "convert_element_type")):
        raise _no_bound(name)
    low, high, terms, affine = _RULES[name](equation, *inputs)
    return _Interval(low, high, equation, inputs, terms, affine)


# ---------------------------------------------------------------- margins


def _least(node: _Interval, weights: chex.Array) -> chex.Array:
    """Bounds linear functions of a node from below, ``<A_i, node>``, through the affine operations before it.

    Args:
      node: the image's array ``[...]``.
      weights: ``A [m, ...]``.

    Returns:
      ``[m]``.
    """
    between, bases = _affine_part(node)

    def replay(*values: chex.Array) -> chex.Array:
        found = dict(zip(bases, values, strict=True))
        for made in between:
            found[made] = _apply(made.equation, *[found[x] if _unknown(x) else x for x in made.inputs])
        return found[node]

    constant, pull = jax.vjp(replay, *[jnp.zeros_like(base.low) for base in bases])
    pulled = jax.vmap(pull)(weights)
    total = _inner(weights, constant)
    for base, coefficients in zip(bases, pulled, strict=True):
        total += _least_of_base(base, coefficients)
    terms = sum(made.terms for made in between) + sum(x.low.size for x in (node, *bases))
    size = _inner(jnp.abs(weights), _largest_terms(node, between, bases))
    return _or_infinite(total - 2 * _share(terms, size.dtype) * size, -jnp.inf)


def _affine_part(node: _Interval) -> tuple[list[_Interval], list[_Interval]]:
    """Returns the affine nodes that lead to a node, in their order, and the nodes that they start from."""
    between: dict[_Interval, None] = {}
    bases: dict[_Interval, None] = {}

    def visit(found: _Interval) -> None:
        if found in between or found in bases:
            return
        if not found.affine:
            bases[found] = None
            return
        for value in filter(_unknown, found.inputs):
            visit(value)
        between[found] = None

    visit(node)
    return list(between), list(bases)


def _largest_terms(node: _Interval, between: Sequence[_Interval], bases: Sequence[_Interval]) -> chex.Array:
    """Returns the sums of the absolute terms of a node, as if nothing cancelled."""
    largest = {base: base.largest for base in bases}
    for made in between:
        inputs = [_Interval(-largest[x], largest[x]) if _unknown(x) else x for x in made.inputs]
        low, high, *_ = _RULES[made.equation.primitive.name](made.equation, *inputs)
        largest[made] = jnp.maximum(jnp.abs(low), jnp.abs(high))
    return largest[node]


def _least_of_base(base: _Interval, weights: chex.Array) -> chex.Array:
    """Bounds linear functions of a node, ``[m]``, by its interval or by what a common factor multiplies."""
    centre, radius = _centre_and_radius(base)
    plain = _or_infinite(_inner(weights, centre) - _inner(jnp.abs(weights), radius), -jnp.inf)
    name = _name(base)
    if name not in ("mul", "div") or not all(map(_unknown, base.inputs)):
        return plain
    value, factor = base.inputs
    if name == "mul" and _common(factor) is None:
        value, factor = factor, value
    number = _common(factor)
    if number is None:
        return plain
    least, low, high = _least(value, weights), number.low.reshape(()), number.high.reshape(())
    scaled = jnp.minimum(*((least / low, least / high) if name == "div" else (least * low, least * high)))
    scaled -= _share(2, scaled.dtype) * jnp.abs(scaled)
    return jnp.maximum(plain, jnp.where(low > 0, _or_infinite(scaled, -jnp.inf), -jnp.inf))


def _name(node: _Interval) -> str:
    return node.equation.primitive.name if node.equation else ""


def _common(node: _Interval) -> _Interval | None:
    """Returns the single number that an array repeats; None if there are several."""
    while node.low.size > 1 and _name(node) == "broadcast_in_dim":
        node = node.inputs[0]
    return node if node.low.size == 1 else None


def _inner(weights: chex.Array, values: chex.Array) -> chex.Array:
    """Inner products of ``[m, ...]`` and ``[...]``."""
    return jnp.sum((weights * values[None]).reshape(len(weights), -1), axis=1)


# ---------------------------------------------------------------- rules

_Found = tuple[chex.Array, chex.Array, int, bool]
"""Ends of an output, the terms of its rounding, and whether the equation is affine in its intervals."""

_Rule = Callable[..., _Found]
"""From an equation and its inputs, intervals and arrays."""


def _unknown(value: Any) -> bool:
    return isinstance(value, _Interval)


def _no_bound(operation: str) -> InputError:
    return InputError(
        f"there is no bound for the operation {operation} that depends on the images; "
        "use a network of affine operations and monotone activations"
    )


def _low(value: Any) -> Any:
    return value.low if _unknown(value) else value


def _high(value: Any) -> Any:
    return value.high if _unknown(value) else value


def _centre_and_radius(value: _Interval) -> tuple[chex.Array, chex.Array]:
    return value.low / 2 + value.high / 2, value.high / 2 - value.low / 2


def _share(terms: int, dtype: Any) -> float:
    """Rounding of a sum relative to the sum of the absolute terms: the network's and that of the bound."""
    product = (terms + 8) * float(jnp.finfo(dtype).eps) / 2
    return 2 * product / (1 - product) if product < 1 / 3 else math.inf


def _widened(
    low: chex.Array, high: chex.Array, terms: int, below: Any = None, above: Any = None
) -> tuple[chex.Array, chex.Array]:
    """Moves the ends outward by the rounding of sums with these absolute terms; None: those of the ends.

    Terms are least at their lower ends with rounding too, because ``v - s |v|`` increases for ``s < 1``.
    """
    share, least = _share(terms, low.dtype), (terms + 8) * float(jnp.finfo(low.dtype).tiny)
    below, above = jnp.abs(low) if below is None else below, jnp.abs(high) if above is None else above
    return low - share * below - least, high + share * above + least


def _increasing(terms: int = 0, *, affine: bool = False, domain: float = -math.inf) -> _Rule:
    """The rule of functions that increase in all inputs, from the least input ``domain`` on."""

    def rule(equation: Any, *inputs: Any) -> _Found:
        low, high = _at_ends(equation, inputs, domain)
        return (*(_widened(low, high, terms) if terms else (low, high)), terms, affine)

    return rule


def _at_ends(equation: Any, inputs: Sequence[Any], domain: float = -math.inf) -> tuple[Any, Any]:
    """Evaluates an equation at the lower ends of all intervals, and at the upper ends."""
    least = [jnp.maximum(x.low, domain) if _unknown(x) and domain > -math.inf else _low(x) for x in inputs]
    return _apply(equation, *least), _apply(equation, *map(_high, inputs))


def _reciprocal_root(equation: Any, x: _Interval) -> _Found:
    high, low = _at_ends(equation, [x], 0.0)
    return *_widened(low, high, _ELEMENTARY_TERMS), _ELEMENTARY_TERMS, False


def _conversion(equation: Any, x: _Interval) -> _Found:
    """Rounding to a shorter type is part of the network, and not affine."""
    old, new = x.low.dtype, equation.params["new_dtype"]
    return *_at_ends(equation, [x]), 0, jnp.promote_types(old, new) == new and old != jnp.bool_


def _sum(equation: Any, *inputs: Any) -> _Found:
    params, shape = equation.params, jnp.shape(_low(inputs[0]))
    lengths = [shape[axis] for axis in params.get("axes", [params["axis"]] if "axis" in params else [])]
    terms = math.prod(params.get("window_dimensions", lengths)) or len(inputs)
    sizes = [_apply(equation, *[jnp.abs(end(x)) for x in inputs]) for end in (_low, _high)]
    return *_widened(*_at_ends(equation, inputs), terms, *sizes), terms, True


def _difference(equation: Any, x: Any, y: Any) -> _Found:
    low, high = _low(x) - _high(y), _high(x) - _low(y)
    sizes = jnp.abs(_low(x)) + jnp.abs(_high(y)), jnp.abs(_high(x)) + jnp.abs(_low(y))
    return *_widened(low, high, 2, *sizes), 2, True


def _negative(equation: Any, x: _Interval) -> _Found:
    return -x.high, -x.low, 0, True


def _product(equation: Any, x: Any, y: Any) -> _Found:
    if x is y:
        return _power(equation, x)
    corners = jnp.stack([a * b for a in (_low(x), _high(x)) for b in (_low(y), _high(y))])
    return *_widened(corners.min(0), corners.max(0), 1), 1, not (_unknown(x) and _unknown(y))


def _quotient(equation: Any, x: Any, y: Any) -> _Found:
    corners = jnp.stack([a / b for a in (_low(x), _high(x)) for b in (_low(y), _high(y))])
    low, high = _widened(corners.min(0), corners.max(0), 1)
    across = (_low(y) <= 0) & (_high(y) >= 0)
    return jnp.where(across, -jnp.inf, low), jnp.where(across, jnp.inf, high), 1, not _unknown(y)


def _power(equation: Any, x: _Interval) -> _Found:
    """``x^y`` for an integer ``y``, and ``|x|``: least at 0 if even, without bound there if negative."""
    exponent = equation.params.get("y", 2)
    ends = jnp.stack([_apply(equation, *[end] * len(equation.invars)) for end in (x.low, x.high)])
    low, high = _widened(ends.min(0), ends.max(0), abs(exponent))
    across = (x.low <= 0) & (x.high >= 0)
    if exponent < 0:
        low, high = jnp.where(across, -jnp.inf, low), jnp.where(across, jnp.inf, high)
    elif exponent % 2 == 0:
        low = jnp.where(across, 0, low)
    return low, high, abs(exponent), False


def _real_power(equation: Any, x: Any, exponent: Any) -> _Found:
    """``x^y`` of a number that is not negative, for a constant ``y``."""
    if _unknown(exponent):
        raise _no_bound("pow with an exponent")
    ends = jnp.stack(_at_ends(equation, [x, exponent], 0.0))
    low, high = _widened(ends.min(0), ends.max(0), _ELEMENTARY_TERMS)
    negative = x.low < 0
    low, high = jnp.where(negative, -jnp.inf, low), jnp.where(negative, jnp.inf, high)
    return low, high, _ELEMENTARY_TERMS, False


def _contraction(equation: Any, x: Any, y: Any) -> _Found:
    """Products with a constant matrix or kernel."""
    name = equation.primitive.name
    if _unknown(x) and _unknown(y):
        raise _no_bound(f"{name} of two arrays")
    numbers = equation.params["dimension_numbers"]
    if name == "dot_general":
        terms = math.prod(jnp.shape(_low(x))[axis] for axis in numbers[0][0])
    else:
        kernel = jnp.shape(_low(y))
        terms = math.prod(kernel) // kernel[numbers.rhs_spec[0]]
    middle, radius = _centre_and_radius(x if _unknown(x) else y)
    # The same product bounds both what the images change and the rounding.
    wide = radius + _share(terms, radius.dtype) * (jnp.abs(middle) + radius)
    centre = _apply(equation, *[middle if _unknown(v) else v for v in (x, y)])
    reach = _apply(equation, *[wide if _unknown(v) else jnp.abs(v) for v in (x, y)])
    reach += terms * jnp.finfo(reach.dtype).tiny
    return *_widened(centre - reach, centre + reach, 1), terms, True


def _comparison(equation: Any, x: Any, y: Any) -> _Found:
    """``low``: certainly true, ``high``: possibly true."""
    if equation.primitive.name in ("lt", "le"):
        x, y = y, x
    if equation.primitive.name in ("gt", "lt"):
        return _low(x) > _high(y), ~(_high(x) <= _low(y)), 0, False
    return _low(x) >= _high(y), ~(_high(x) < _low(y)), 0, False


def _choice(equation: Any, which: Any, *cases: Any) -> _Found:
    """One of several cases; either of two, where a comparison is open."""
    if not _unknown(which):
        ends = (_apply(equation, which, *map(end, cases)) for end in (_low, _high))
        return *ends, 0, True
    if len(cases) > 2:
        raise _no_bound("select_n with an index")
    other, case = cases
    low = jnp.where(which.low, _low(case), jnp.minimum(_low(other), _low(case)))
    high = jnp.where(which.low, _high(case), jnp.maximum(_high(other), _high(case)))
    return jnp.where(which.high, low, _low(other)), jnp.where(which.high, high, _high(other)), 0, False


_RULES: dict[str, _Rule] = {
    **dict.fromkeys(
        ("broadcast_in_dim", "concatenate", "copy", "dynamic_slice", "expand_dims", "gather", "pad",
         "reshape", "rev", "slice", "squeeze", "transpose"),
        _increasing(affine=True),
    ),
    **dict.fromkeys(
        ("ceil", "clamp", "floor", "max", "min", "reduce_max", "reduce_min", "reduce_window_max", "round",
         "sign"),
        _increasing(),
    ),
    **dict.fromkeys(("add", "add_any", "cumsum", "reduce_sum", "reduce_window_sum"), _sum),
    **dict.fromkeys(
        ("asinh", "atan", "cbrt", "erf", "exp", "exp2", "expm1", "logistic", "sinh", "tanh"),
        _increasing(_ELEMENTARY_TERMS),
    ),
    **dict.fromkeys(("log", "sqrt"), _increasing(_ELEMENTARY_TERMS, domain=0.0)),
    "log1p": _increasing(_ELEMENTARY_TERMS, domain=-1.0),
    "rsqrt": _reciprocal_root,
    **dict.fromkeys(("abs", "integer_pow", "square"), _power),
    "pow": _real_power,
    "sub": _difference,
    "neg": _negative,
    "mul": _product,
    "div": _quotient,
    **dict.fromkeys(("conv_general_dilated", "dot_general"), _contraction),
    **dict.fromkeys(("ge", "gt", "le", "lt"), _comparison),
    "select_n": _choice,
    "convert_element_type": _conversion,
}  # fmt: skip
