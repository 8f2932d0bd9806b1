"""Separates a function from images to logits into a function and the arrays that it closes over.

A model that was trained elsewhere comes as a function that closes over its weights. If it is compiled as it
is, the weights become constants of every program: each program copies them, the compiler folds them for
minutes, and the logits are rounded differently. :func:`split` takes the weights out, so that a program
receives them as arguments. It also lets the model multiply matrices in full float32, whatever the device's
default is: a robust accuracy must not rest on shorter numbers.
"""

import inspect
from collections.abc import Callable
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, jaxpr_as_fun

from robal_jax import checks

SMALL = 1024  # largest number of elements of an array that stays a constant of the program

BATCH_TOLERANCE = 0.01  # of the largest logit; the rounding of one image may depend on its place in a batch

PROBABILITY = 0.01  # the sum of probabilities in bfloat16 may be so far from 1

CHANGES = "The logits of an image change with the images beside it"
DEPENDS = (
    f"{CHANGES.lower()}, so no accuracy means much; put batch norm into inference mode, or apply the model "
    "to each image by itself"
)


def split(
    logits_fn: Callable[[chex.Array], chex.Array], image_shape: tuple[int, ...], name: str = "logits_fn"
) -> tuple[Callable[[list[chex.Array], chex.Array], chex.Array], list[chex.Array]]:
    """Separates a model into a function of arrays and images, and the arrays.

    ``logits_fn(images) = predict(arrays, images)``

    Args:
      logits_fn: images ``[B, H, W, C]`` in [0, 1] to logits ``[B, K]``, for any ``B``; traceable by JAX.
        Arrays inside a function that another library compiled (``nnx.jit``) are not found.
      image_shape: ``(H, W, C)``.
      name: of the model, for messages.

    Returns:
      ``predict``, whose logits are at least float32, and the arrays that ``logits_fn`` closes over.

    Raises:
      ValueError: ``logits_fn`` is no function, fails, does not return logits ``[B, K]``, or JAX cannot trace
        it.

    Example:
      >>> weight = jnp.ones((64, 32))
      >>> predict, arrays = split(lambda images: images.reshape(-1, 64) @ weight, (8, 8, 1))
      >>> [array.shape for array in arrays], predict(arrays, jnp.ones((2, 8, 8, 1))).shape
      ([(64, 32)], (2, 32))
    """
    # A compiled function hides its arrays. Other wrappers, such as jax.vmap, are part of the model.
    logits_fn = inspect.unwrap(logits_fn, stop=lambda function: not isinstance(function, type(jax.jit(abs))))

    def traced(images: chex.Array | jax.ShapeDtypeStruct) -> ClosedJaxpr:
        with jax.default_matmul_precision("highest"):
            return jax.make_jaxpr(partial(checks.called, logits_fn, name=name))(images)

    image = jax.ShapeDtypeStruct((2, *image_shape), jnp.float32)
    constants = traced(image).consts
    if any(isinstance(array, jax.core.Tracer) for array in constants):
        raise ValueError("logits_fn has arrays that JAX traces; call this outside of jax.jit, grad and vmap")
    arrays = [array for array in constants if np.size(array) > SMALL]
    place = {id(array): number for number, array in enumerate(arrays)}

    def predict(arrays: list[chex.Array], images: chex.Array) -> chex.Array:
        program = traced(images)
        constants = [arrays[place[id(x)]] if id(x) in place else x for x in program.consts]
        return jaxpr_as_fun(ClosedJaxpr(program.jaxpr, constants))(images)[0]

    return predict, arrays


def depends_on_batch(model: Callable[[chex.Array], chex.Array], images: chex.Array) -> bool:
    """Returns whether the logits of the first image change with the images beside it.

    Args:
      model: images ``[B, H, W, C]`` to logits ``[B, K]``.
      images: ``[B, H, W, C]``; a single one shows nothing.

    Example:
      >>> images = jnp.arange(3.0).reshape(3, 1, 1, 1)
      >>> model = lambda x: jnp.outer(x.reshape(-1), jnp.array([1.0, 2.0])) + 1
      >>> depends_on_batch(model, images), depends_on_batch(lambda x: model(x - x.mean()), images)
      (False, True)
    """
    batches = images, images, jnp.repeat(images[:1], len(images), 0)
    among, again, alone = (np.asarray(model(x))[0] for x in batches)
    if not np.array_equal(among, again):  # random, or not finite: other faults
        return False
    return not np.abs(among - alone).max() <= BATCH_TOLERANCE * np.abs(among).max()


def are_probabilities(outputs: np.ndarray) -> bool:
    """Returns whether outputs ``[B, K]`` are in [0, 1] and sum to 1, up to the rounding of bfloat16.

    Example:
      >>> are_probabilities(np.array([[0.25, 0.75]])), are_probabilities(np.array([[0.5, 0.75]]))
      (True, False)
    """
    within = outputs.min() > -PROBABILITY and outputs.max() < 1 + PROBABILITY
    return bool(within and np.abs(outputs.sum(-1) - 1).max() < PROBABILITY)
