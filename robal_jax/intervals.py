"""Rules of interval arithmetic: ends of an operation's output from those of its inputs, rounding included.

``certificates`` follows a box of images through a network with them, and says what the rounding is based on.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp

from robal_jax.errors import InputError

ELEMENTARY_TERMS = 16
"""Terms of a sum whose rounding is that of an elementary function."""


@dataclasses.dataclass(eq=False)
class Interval:
    """All values that one array of the network may have; the graph of what made it.

    Attributes:
      low, high: ends; tighter ones may replace them.
      equation: of the program, which made it; None for the images.
      inputs: of the equation, intervals and arrays.
      terms: rounding errors of the equation are those of a sum of so many terms.
      affine: whether the equation is affine in its intervals.
      size: the largest sums of the absolute terms of an affine equation.
      depth: of the graph behind it.
      tight: whether its ends are as tight as they will be.
    """

    low: chex.Array
    high: chex.Array
    equation: Any = None
    inputs: Sequence[Any] = ()
    terms: int = 0
    affine: bool = False
    size: chex.Array | None = None
    depth: int = 0
    tight: bool = False

    @property
    def name(self) -> str:
        """Name of the operation that made it; '' for the images."""
        return self.equation.primitive.name if self.equation else ""

    @property
    def largest(self) -> chex.Array:
        """Largest absolute values."""
        return jnp.maximum(jnp.abs(self.low), jnp.abs(self.high))


def made_by(equation: Any, inputs: Sequence[Any]) -> Interval:
    """Returns the interval of an equation's output.

    Raises:
      InputError: the operation has no rule.
    """
    name = equation.primitive.name
    known = [x.low.dtype for x in inputs if unknown(x)]
    numbers = all(jnp.issubdtype(dtype, jnp.floating) for dtype in known)
    if name not in RULES or not (numbers or name in ("select_n", "convert_element_type")):
        raise no_bound(name)
    low, high, terms, affine = RULES[name](equation, *inputs)
    depth = 1 + max(x.depth for x in inputs if unknown(x))
    made = Interval(low, high, equation, inputs, terms, affine, depth=depth)
    if affine:
        around_0 = [Interval(-x.largest, x.largest) if unknown(x) else x for x in inputs]
        made.size = Interval(*RULES[name](equation, *around_0)[:2]).largest
    return made


def evaluate(equation: Any, *arrays: Any) -> Any:
    """Evaluates an equation on arrays, in full precision."""
    params = equation.params
    if "precision" in params:
        params = params | {"precision": (jax.lax.Precision.HIGHEST,) * 2}
    return equation.primitive.bind(*arrays, **params)


_Found = tuple[chex.Array, chex.Array, int, bool]
"""Ends of an output, the terms of its rounding, and whether the equation is affine in its intervals."""

_Rule = Callable[..., _Found]
"""From an equation and its inputs, intervals and arrays."""


def unknown(value: Any) -> bool:
    """Says whether a value depends on the images: whether it is an interval."""
    return isinstance(value, Interval)


def no_bound(operation: str) -> InputError:
    """Returns the error for an operation without a rule."""
    return InputError(
        f"there is no bound for the operation {operation} that depends on the images; "
        "use a network of affine operations and monotone activations"
    )


def _low(value: Any) -> Any:
    return value.low if unknown(value) else value


def _high(value: Any) -> Any:
    return value.high if unknown(value) else value


def centre_and_radius(value: Interval) -> tuple[chex.Array, chex.Array]:
    """Returns the middles of intervals, and half of their lengths."""
    return value.low / 2 + value.high / 2, value.high / 2 - value.low / 2


def rounding(terms: int, dtype: Any) -> float:
    """Rounding of a sum relative to the sum of the absolute terms: the network's and that of the bound."""
    product = (terms + 8) * float(jnp.finfo(dtype).eps) / 2
    return 2 * product / (1 - product) if product < 1 / 3 else math.inf


def _widened(
    low: chex.Array, high: chex.Array, terms: int, below: Any = None, above: Any = None
) -> tuple[chex.Array, chex.Array]:
    """Moves the ends outward by the rounding of sums with these absolute terms; None: those of the ends.

    Terms are least at their lower ends with rounding too, because ``v - s |v|`` increases for ``s < 1``.
    """
    share, least = rounding(terms, low.dtype), (terms + 8) * float(jnp.finfo(low.dtype).tiny)
    below, above = jnp.abs(low) if below is None else below, jnp.abs(high) if above is None else above
    return low - share * below - least, high + share * above + least


def _increasing(terms: int = 0, *, affine: bool = False, domain: float = -math.inf) -> _Rule:
    """The rule of functions that increase in all inputs; without a bound for inputs below ``domain``."""

    def rule(equation: Any, *inputs: Any) -> _Found:
        low, high = _at_ends(equation, inputs, domain)
        low, high = _widened(low, high, terms) if terms else (low, high)
        return (*_within(domain, inputs[0], low, high), terms, affine)

    return rule


def _within(domain: float, x: Any, low: chex.Array, high: chex.Array) -> tuple[chex.Array, chex.Array]:
    """Returns no bound where ``x`` may be below ``domain``, by more than the rounding of a sum of zeros."""
    if domain == -math.inf:
        return low, high
    outside = x.low < domain - 2.0**20 * float(jnp.finfo(x.low.dtype).tiny)
    return jnp.where(outside, -jnp.inf, low), jnp.where(outside, jnp.inf, high)


def _at_ends(equation: Any, inputs: Sequence[Any], domain: float = -math.inf) -> tuple[Any, Any]:
    """Evaluates an equation at the lower ends of all intervals, and at the upper ends."""
    least = [jnp.maximum(x.low, domain) if unknown(x) and domain > -math.inf else _low(x) for x in inputs]
    return evaluate(equation, *least), evaluate(equation, *map(_high, inputs))


def _reciprocal_root(equation: Any, x: Interval) -> _Found:
    high, low = _at_ends(equation, [x], 0.0)
    return *_within(0.0, x, *_widened(low, high, ELEMENTARY_TERMS)), ELEMENTARY_TERMS, False


def _conversion(equation: Any, x: Interval) -> _Found:
    """Rounding to a shorter type is part of the network, and not affine. As a bool, only 0 is False."""
    old, new = x.low.dtype, equation.params["new_dtype"]
    if new == jnp.bool_ and old != jnp.bool_:
        return (x.low > 0) | (x.high < 0), (x.low != 0) | (x.high != 0), 0, False
    return *_at_ends(equation, [x]), 0, jnp.promote_types(old, new) == new and old != jnp.bool_


def _sum(equation: Any, *inputs: Any) -> _Found:
    params, shape = equation.params, jnp.shape(_low(inputs[0]))
    axes = params.get("axes", [params["axis"]] if "axis" in params else [])
    lengths = params.get("window_dimensions", [shape[axis] for axis in axes])
    terms = math.prod(lengths) if lengths else len(inputs)
    sizes = [evaluate(equation, *[jnp.abs(end(x)) for x in inputs]) for end in (_low, _high)]
    return *_widened(*_at_ends(equation, inputs), terms, *sizes), terms, True


def _difference(equation: Any, x: Any, y: Any) -> _Found:
    low, high = _low(x) - _high(y), _high(x) - _low(y)
    sizes = jnp.abs(_low(x)) + jnp.abs(_high(y)), jnp.abs(_high(x)) + jnp.abs(_low(y))
    return *_widened(low, high, 2, *sizes), 2, True


def _negative(equation: Any, x: Interval) -> _Found:
    return -x.high, -x.low, 0, True


def _product(equation: Any, x: Any, y: Any) -> _Found:
    if x is y:
        return _power(equation, x)
    corners = jnp.stack([a * b for a in (_low(x), _high(x)) for b in (_low(y), _high(y))])
    return *_widened(corners.min(0), corners.max(0), 1), 1, not (unknown(x) and unknown(y))


def _quotient(equation: Any, x: Any, y: Any) -> _Found:
    corners = jnp.stack([a / b for a in (_low(x), _high(x)) for b in (_low(y), _high(y))])
    low, high = _widened(corners.min(0), corners.max(0), 1)
    across = (_low(y) <= 0) & (_high(y) >= 0)
    return jnp.where(across, -jnp.inf, low), jnp.where(across, jnp.inf, high), 1, not unknown(y)


def _power(equation: Any, x: Interval) -> _Found:
    """``x^y`` for an integer ``y``, and ``|x|``: least at 0 if even, without bound there if negative."""
    exponent = equation.params.get("y", 2)
    ends = jnp.stack([evaluate(equation, *[end] * len(equation.invars)) for end in (x.low, x.high)])
    low, high = _widened(ends.min(0), ends.max(0), abs(exponent))
    across = (x.low <= 0) & (x.high >= 0)
    if exponent < 0:
        low, high = jnp.where(across, -jnp.inf, low), jnp.where(across, jnp.inf, high)
    elif exponent % 2 == 0:
        low = jnp.where(across, 0, low)
    return low, high, abs(exponent), False


def _real_power(equation: Any, x: Any, exponent: Any) -> _Found:
    """``x^y`` of a number that is not negative, for a constant ``y``."""
    if unknown(exponent):
        raise no_bound("pow with an exponent")
    ends = jnp.stack(_at_ends(equation, [x, exponent], 0.0))
    low, high = _widened(ends.min(0), ends.max(0), ELEMENTARY_TERMS)
    negative = x.low < 0
    low, high = jnp.where(negative, -jnp.inf, low), jnp.where(negative, jnp.inf, high)
    return low, high, ELEMENTARY_TERMS, False


def _contraction(equation: Any, x: Any, y: Any) -> _Found:
    """Products with a constant matrix or kernel."""
    name = equation.primitive.name
    if unknown(x) and unknown(y):
        raise no_bound(f"{name} of two arrays")
    numbers = equation.params["dimension_numbers"]
    if name == "dot_general":
        terms = math.prod(jnp.shape(_low(x))[axis] for axis in numbers[0][0])
    else:
        kernel = jnp.shape(_low(y))
        terms = math.prod(kernel) // kernel[numbers.rhs_spec[0]]
    middle, radius = centre_and_radius(x if unknown(x) else y)
    # The same product bounds both what the images change and the rounding.
    wide = radius + rounding(terms, radius.dtype) * (jnp.abs(middle) + radius)
    centre = evaluate(equation, *[middle if unknown(v) else v for v in (x, y)])
    reach = evaluate(equation, *[wide if unknown(v) else jnp.abs(v) for v in (x, y)])
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
    if not unknown(which):
        ends = (evaluate(equation, which, *map(end, cases)) for end in (_low, _high))
        return *ends, 0, True
    if len(cases) > 2:
        raise no_bound("select_n with an index")
    other, case = cases
    low = jnp.where(which.low, _low(case), jnp.minimum(_low(other), _low(case)))
    high = jnp.where(which.low, _high(case), jnp.maximum(_high(other), _high(case)))
    return jnp.where(which.high, low, _low(other)), jnp.where(which.high, high, _high(other)), 0, False


RULES: dict[str, _Rule] = {
    **dict.fromkeys(
        ("broadcast_in_dim", "concatenate", "copy", "dynamic_slice", "expand_dims", "gather", "pad",
         "reshape", "rev", "slice", "squeeze", "stack", "transpose"),
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
        _increasing(ELEMENTARY_TERMS),
    ),
    **dict.fromkeys(("log", "sqrt"), _increasing(ELEMENTARY_TERMS, domain=0.0)),
    "log1p": _increasing(ELEMENTARY_TERMS, domain=-1.0),
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
