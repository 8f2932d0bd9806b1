"""A small smooth network and images for it, on which attacks are tried."""

import functools

import jax.numpy as jnp
import numpy as np

SHAPE, SIZE, CLASSES = (4, 4, 2), 32, 4


def logits_fn(images):
    """A network of two layers, smooth enough for a boundary that bends."""
    rng = np.random.RandomState(1)
    first, second = rng.randn(SIZE, 16) / 2, rng.randn(16, CLASSES)
    hidden = jnp.tanh((images.reshape(len(images), -1) - 0.5) @ jnp.asarray(first, images.dtype))
    return hidden @ jnp.asarray(second, images.dtype)


@functools.cache
def batch():
    """Images with pixels near and at both bounds, and labels: all right but the last two."""
    rng = np.random.RandomState(0)
    images = jnp.asarray(np.clip(rng.uniform(-0.1, 1.1, (12, *SHAPE)), 0, 1), jnp.float32)
    labels = logits_fn(images).argmax(-1)
    return images, labels.at[-2:].set((labels[-2:] + 1) % CLASSES)
