"""Lays compiled work over the devices of this process: chunks of training steps, and batches to evaluate.

The training step is written once, for one device. Here it is compiled

- by ``jit``: the batch is split over all devices, XLA adds the communication (the default);
- by ``pmap``: each device runs the step on its part of the batch, which averages gradients, metrics and
  batch-norm moments over the named axis itself.

Both give the numbers of one device up to the order of summation, because batch statistics are those of the
whole batch and noise belongs to an image's position in it. Attacks and evaluation treat each image by itself
and need no communication at all (:func:`spread`).
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


def spread(
    function: Callable[[chex.ArrayTree, chex.ArrayTree], chex.ArrayTree],
    layout: str,
    devices: list[jax.Device],
) -> Callable[[chex.ArrayTree, chex.ArrayTree], chex.ArrayTree]:
    """Work on images that do not depend on each other, each device with its part of them; compiled once.

    Every device runs the same program on a batch of the same size, so what comes out for an image does not
    depend on how many devices there are.

    Args:
      function: ``(parts, shared) -> outputs``; arrays of parts and outputs are ``[b, ...]``.
      layout: a key of ``LAYOUTS``: ``jit`` cuts the parts by ``shard_map``, ``pmap`` maps over them.
      devices: to work on.

    Returns:
      The same for parts and outputs ``[b * len(devices), ...]``.
    """
    if layout == "pmap":
        mapped = jax.pmap(function, in_axes=(0, None), devices=devices)

        def run(parts: chex.ArrayTree, shared: chex.ArrayTree) -> chex.ArrayTree:
            split = jax.tree.map(lambda x: np.reshape(x, (len(devices), -1, *np.shape(x)[1:])), parts)
            outputs = jax.device_get(mapped(split, shared))
            return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), outputs)

        return run
    mesh, part, whole = Mesh(np.array(devices), (AXIS,)), PartitionSpec(AXIS), PartitionSpec()
    return jax.jit(
        jax.shard_map(function, mesh=mesh, in_specs=(part, whole), out_specs=part, check_vma=False)
    )
