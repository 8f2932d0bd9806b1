"""The small network that the released AutoAttack's numbers were made with (autoattack.npz, its README.md)."""

import jax
import jax.numpy as jnp
import numpy as np

from robal_jax.models import convolutions


def network(arrays):
    """Images NHWC to logits, with the weights ``net/*`` of ``arrays``; float64 where JAX computes in it."""
    weights = {
        key.removeprefix("net/"): jnp.asarray(np.asarray(arrays[key], float))
        for key in arrays
        if key.startswith("net/")
    }

    def convolution(x, name, stride):
        kernel = jnp.transpose(weights[f"{name}.weight"], (2, 3, 1, 0))
        x = convolutions.cpu_convolution(x, kernel, stride)
        return jax.nn.relu(x + weights[f"{name}.bias"][None, None, None])

    def linear(x, name):
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"][None]

    def logits_fn(images):
        x = convolution(convolution(images, "conv1", 1), "conv2", 2)
        x = jnp.moveaxis(x, -1, 1).reshape(len(x), -1)  # flattened as channels, rows, columns
        return linear(jax.nn.relu(linear(x, "fc1")), "fc2")

    return logits_fn
