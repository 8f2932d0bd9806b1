"""Lays the compiled chunk of training steps over the devices of this process.

The step is written once, for one device. Here it is compiled

- by ``jit``: the batch is split over all devices, XLA adds the communication (the default);
- by ``pmap``: each device runs the step on its part of the batch, which averages gradients, metrics and
  batch-norm moments over the named axis itself.

Both give the numbers of one device up to the order of summation, because batch statistics are those of the
whole batch and noise belongs to an image's position in it.
"""

from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from robal_jax.state import TrainState

AXIS = "data"

Chunk = Callable[..., tuple[TrainState, dict[str, chex.Array]]]
"""``(state, data, ids [T, B], count, key, positions [B]) -> (state, sums)``."""


def _sharding(devices: list[jax.Device], *spec: str | None) -> NamedSharding:
    return NamedSharding(Mesh(np.array(devices), (AXIS,)), PartitionSpec(*spec))


def replicate(tree: chex.ArrayTree, devices: list[jax.Device]) -> chex.ArrayTree:
    """The tree with a copy on every device, placed as a compiled chunk returns it (so it is not retraced)."""
    return jax.device_put(tree, _sharding(devices))


def jit(chunk: Chunk, devices: list[jax.Device]) -> Chunk:
    """The chunk compiled for a batch split over ``devices``; the state that goes in is given up.

    Args:
      chunk: for one device, without a mapped axis.
      devices: the batch size is a multiple of their number.

    Returns:
      A chunk that takes whole batches.
    """
    everywhere, by_column, by_row = (_sharding(devices, *spec) for spec in ((), (None, AXIS), (AXIS,)))
    inputs = (everywhere, everywhere, by_column, everywhere, everywhere, by_row)
    return jax.jit(chunk, donate_argnums=0, in_shardings=inputs, out_shardings=everywhere)


def pmap(chunk: Chunk, devices: list[jax.Device]) -> Chunk:
    """The chunk compiled by ``pmap``, each device with its part of the batch and a copy of the state.

    Args:
      chunk: for one device, with the mapped axis ``AXIS``.
      devices: the batch size is a multiple of their number.

    Returns:
      A chunk that takes whole batches.
    """
    mapped = jax.pmap(chunk, AXIS, in_axes=(None, None, 0, None, None, 0), out_axes=None, devices=devices)

    def run(
        state: TrainState, data: Any, ids: chex.Array, count: int, key: chex.PRNGKey, positions: chex.Array
    ) -> tuple[TrainState, dict[str, chex.Array]]:
        split = np.stack(np.split(np.asarray(ids), len(devices), axis=1))
        return mapped(state, data, split, count, key, jnp.stack(jnp.split(positions, len(devices))))

    return run


LAYOUTS: dict[str, Callable[[Chunk, list[jax.Device]], Chunk]] = {"jit": jit, "pmap": pmap}
