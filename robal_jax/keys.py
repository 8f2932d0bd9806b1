"""Random keys: one per image, and the streams that are folded into them.

Every random number of the library follows from a seed, a step and an image's position. A stream is a number
that is folded into a key, so that two uses of one key share no random numbers. All streams are listed here,
so that no two of them can be equal; small numbers (0, 1, ...) count steps, restarts, rounds and draws.

One exception is kept, because published numbers rest on it: ``split(key, 3)[i]`` is ``fold_in(key, i)``, so
that MIM-20 and CW-20 of an evaluation start where the first two rounds of its ensemble, and the second and
third start of the audit, do. Each attack alone is as it should be.
"""

from functools import partial

import chex
import jax
import jax.numpy as jnp

IMPLEMENTATION = "threefry2x32"
"""Of all keys: other generators, such as 'rbg', draw other numbers for an image in another batch."""

# Of a run's key, beside the numbers of its steps.
INITIAL_WEIGHTS = 2**32 - 1

# Of a run's key in a step, beside the positions of its images.
PARTNERS = 2**32 - 1

# Of an image's key in an attack, beside the numbers of its restarts.
MODEL_NOISE = 2**32 - 3
JUDGEMENT = 2**32 - 2

# Of an image's key in a training step. The attack uses the key itself and small numbers.
MIXING = 2**32 - 1
ALIGNMENT = 2**32 - 4


def key_of(seed: int) -> chex.PRNGKey:
    """Makes a run's key from its seed, whichever generator JAX uses by default."""
    return jax.random.key(seed, impl=IMPLEMENTATION)


def image_keys(key: chex.PRNGKey, images: chex.Array) -> chex.PRNGKey:
    """Returns one key per image: the keys themselves, or one key split by the images' positions.

    Keys of another generator are turned into keys of ``IMPLEMENTATION``.

    Args:
      key: one key ``[]`` or one per image ``[B]``, made by ``jax.random.key`` or ``jax.random.PRNGKey``.
      images: ``[B, ...]``.

    Returns:
      Keys ``[B]``.

    Raises:
      ValueError: this is no key, or there is neither one key nor one per image.

    Example:
      >>> images = jnp.zeros((2, 8, 8, 1))
      >>> keys = image_keys(jax.random.key(0), images)
      >>> keys.shape, bool((image_keys(keys, images) == keys).all())
      ((2,), True)
    """
    if key is None:
        raise ValueError("key is None; make one by jax.random.key(0)")
    typed = jnp.issubdtype(jnp.result_type(key), jax.dtypes.prng_key)
    words = jax.random.key_data(key) if typed else jnp.asarray(key)
    if words.dtype != jnp.uint32 or words.shape[-1:] < (2,):
        raise ValueError(f"key has dtype {words.dtype}; make one by jax.random.key(0)")
    key = jax.random.wrap_key_data(words[..., :2], impl=IMPLEMENTATION)
    if key.ndim == 0:
        # These are the keys of jax.random.split, which under another setting depend on their number.
        return numbered_keys(key, jnp.arange(len(images)))
    if key.shape != images.shape[:1]:
        raise ValueError(f"key has shape {key.shape}; give one key, or one key per image, [{len(images)}]")
    return key


def fold_in(keys: chex.PRNGKey, data: chex.Numeric) -> chex.PRNGKey:
    """Folds one number into every key: ``[B]`` to ``[B]``.

    Example:
      >>> keys = jax.random.split(jax.random.key(0), 2)
      >>> bool((fold_in(keys, 7)[1] == jax.random.fold_in(keys[1], 7)).all())
      True
    """
    return jax.vmap(lambda key: jax.random.fold_in(key, data))(keys)


def numbered_keys(key: chex.PRNGKey, numbers: chex.Array) -> chex.PRNGKey:
    """Makes one key per number from a single key: numbers ``[B]`` to keys ``[B]``.

    Example:
      >>> key = jax.random.key(0)
      >>> bool((numbered_keys(key, jnp.array([5, 7]))[1] == jax.random.fold_in(key, 7)).all())
      True
    """
    return jax.vmap(partial(jax.random.fold_in, key))(numbers)


def example_keys(key: chex.PRNGKey, step: chex.Numeric, positions: chex.Array) -> chex.PRNGKey:
    """Makes one key per image of a training step.

    The key follows from the image's position in the batch, not from its place in the data set: a sampler may
    draw an image twice into one batch, and the two copies must be augmented and attacked differently.

    Args:
      key: of the run.
      step: number of the step.
      positions: ``[B]`` in the whole batch, over all devices.

    Returns:
      Keys ``[B]``.

    Example:
      >>> key, positions = jax.random.key(0), jnp.arange(4)
      >>> keys = example_keys(key, 100, positions)
      >>> bool((keys[2:] == example_keys(key, 100, positions[2:])).all())  # on whichever device
      True
    """
    return numbered_keys(jax.random.fold_in(key, step), positions)
