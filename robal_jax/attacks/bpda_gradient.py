"""BPDA: a function's own values, and in the backward pass the gradient of a differentiable approximation.

Rounding, quantisation and thermometer codes have no gradient, and a saturated activation has next to none,
so attacks that follow the gradient find nothing, although the model may be fragile. :func:`bpda` replaces the
gradient and nothing else::

    quantise = lambda images: jnp.round(images * 15) / 15
    logits_fn = lambda images: network(quantise(images))
    replaced = lambda images: network(bpda(quantise, lambda images: images)(images))
    adversarial = pgd(replaced, key, images, labels, threat=threat, steps=20, step_size=2 / 255)

Source: Athalye, Carlini and Wagner, "Obfuscated Gradients Give a False Sense of Security: Circumventing
Defenses to Adversarial Examples" (ICML 2018), section 4.1.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import chex
import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr, jaxpr_as_fun


def bpda(
    function: Callable[..., chex.Array], surrogate_fn: Callable[..., chex.Array]
) -> Callable[..., chex.Array]:
    """The function with the gradient of a differentiable approximation: BPDA.

    ``f(x)`` forward,  ``v -> v^T dg/dx`` backward

    Both are whole models, or one part of a model. A part is the more precise: the layers behind it are then
    differentiated where the true model evaluates them. The values are the true ones, so that a loss that
    saturates in very large logits, such as the cross entropy, still does; attack these with
    :func:`~robal_jax.attacks.negative_margin`.

    Args:
      function: ``f``, ``[B, ...]`` to floats of any shape; arguments after the first, such as keys, are given
        to both. It need not have a derivative: it may round, compare, or call the host.
      surrogate_fn: ``g``, a differentiable approximation of ``f`` with the same arguments and the same shape
        of result. For a part that changes its input little, such as a quantisation, the identity will do.

    Returns:
      A function with the arguments of both, to be differentiated in reverse and by its first argument.

    Raises:
      ValueError: when it is called and one of the two does not return one array of floats, or their shapes
        differ.

    Source: Athalye et al. (ICML 2018), section 4.1.

    Example:
      >>> rounded, x = lambda x: jnp.round(4 * x) / 4, jnp.array([0.3, 0.6])
      >>> for function in (rounded, bpda(rounded, lambda x: x)):
      ...     print(function(x), jax.grad(lambda x: function(x).sum())(x))
      [0.25 0.5 ] [0. 0.]
      [0.25 0.5 ] [1. 1.]
    """

    def replaced(x: chex.Array, *more: Any) -> chex.Array:
        programs = [jax.make_jaxpr(each)(x, *more) for each in (function, surrogate_fn)]
        results = [_result(program, name) for program, name in zip(programs, _NAMES, strict=True)]
        if results[0].shape != results[1].shape:
            shapes = [list(result.shape) for result in results]
            raise ValueError(
                f"{_NAMES[1]} returns {shapes[1]} and {_NAMES[0]} {shapes[0]} for x {list(jnp.shape(x))}; "
                "pass an approximation whose result has the same shape"
            )
        model, surrogate = programs
        # What the functions close over, traced or not, is an argument: a closure would hide it from JAX.
        return _straight_through(model.jaxpr, surrogate.jaxpr, model.consts, surrogate.consts, more, x)

    return replaced


_NAMES = "the function of BPDA", "surrogate_fn"


def _result(program: ClosedJaxpr, name: str) -> Any:
    """Returns shape and type of the one array of floats that a program returns; refuses all else."""
    results = program.out_avals
    if len(results) != 1 or not jnp.issubdtype(results[0].dtype, jnp.floating):
        found = ", ".join(map(str, results)) or "nothing"
        raise ValueError(f"{name} returns {found}; it must return one array of floats")
    return results[0]


def _run(program: Jaxpr, constants: list[Any], more: tuple[Any, ...], x: chex.Array) -> chex.Array:
    return jaxpr_as_fun(ClosedJaxpr(program, constants))(x, *jax.tree.leaves(more))[0]


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _straight_through(
    model: Jaxpr,
    surrogate: Jaxpr,
    of_model: list[Any],
    of_surrogate: list[Any],
    more: tuple[Any, ...],
    x: chex.Array,
) -> chex.Array:
    del surrogate, of_surrogate
    return _run(model, of_model, more, x)


def _forward(
    model: Jaxpr,
    surrogate: Jaxpr,
    of_model: list[Any],
    of_surrogate: list[Any],
    more: tuple[Any, ...],
    x: chex.Array,
) -> tuple[chex.Array, Callable[[chex.Array], tuple[chex.Array]]]:
    found = _run(model, of_model, more, x)
    _, pullback = jax.vjp(lambda x: _run(surrogate, of_surrogate, more, x).astype(found.dtype), x)
    return found, pullback


def _backward(
    model: Jaxpr, surrogate: Jaxpr, pullback: Callable[[chex.Array], tuple[chex.Array]], cotangent: chex.Array
) -> tuple[Any, ...]:
    del model, surrogate
    return None, None, None, *pullback(cotangent)


_straight_through.defvjp(_forward, _backward)
