"""Compiles work for all devices of a job: chunks of training steps, attacks, batches to evaluate.

The training step is written once, for one device, which averages gradients, metrics and moments over a named
axis (``AXIS``). Here it is compiled

- by ``jit``: over a mesh of the devices of all processes, each with its part of the batch (the default);
- by ``pmap``: the same, with the older interface of JAX.

Both run the same program on every device and give the numbers of one device up to the order of summation:
batch statistics are those of the whole batch (unless the model is built without synchronisation), and noise
depends on the position of an image in the batch. Attacks and evaluation treat every image separately and need
no communication (:func:`spread`, :func:`attack`).

With several processes, each passes its own share of a batch to a compiled chunk (:func:`share`).
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

AXIS = "data"

Chunk = Callable[..., tuple[chex.ArrayTree, dict[str, chex.Array]]]
"""``(state, data, rows [T, A, b], count, key, positions [A, b]) -> (state, sums)``"""


def devices_for(layout: str) -> list[jax.Device]:
    """Returns the devices that a process names: its own for ``pmap``, those of all processes for ``jit``."""
    if layout == "pmap":
        return jax.local_devices()
    return sorted(jax.devices(), key=lambda device: (device.process_index, device.id))


def share(size: int) -> slice:
    """Returns the part of an axis that belongs to this process, if all devices of the job share the axis."""
    part = size // jax.process_count()
    return slice(part * jax.process_index(), part * (jax.process_index() + 1))


def _mesh(devices: Sequence[jax.Device]) -> Mesh:
    # Arrays have no sharding in their type here: not JAX's explicit mode, whatever its default becomes.
    return Mesh(np.array(devices), (AXIS,), axis_types=(AxisType.Auto,))


def replicate(tree: chex.ArrayTree, devices: list[jax.Device]) -> chex.ArrayTree:
    """Copies a tree to every device, placed as a compiled chunk returns it (so that it is not retraced).

    Args:
      tree: the same in all processes, which is not compared: nothing is sent between them.
      devices: from :func:`devices_for`.
    """
    return _global(_mesh(devices), PartitionSpec(), tree)


def jit(chunk: Chunk, devices: list[jax.Device]) -> Chunk:
    """Compiles a chunk for a batch that is split over ``devices``; the chunk's input state is donated.

    Args:
      chunk: for one device, with the mapped axis ``AXIS``.
      devices: of all processes; each part of a batch must have a multiple of their number of images.

    Returns:
      A chunk that takes this process's share of ``rows`` and ``positions``.
    """
    mesh = _mesh(devices)
    compiled = _chunk_over(mesh, chunk)
    by_row, by_position = _CHUNK_SPECS[2], _CHUNK_SPECS[5]

    def run(
        state: chex.ArrayTree, data: Any, rows: Any, count: int, key: chex.PRNGKey, positions: np.ndarray
    ) -> tuple[chex.ArrayTree, dict[str, chex.Array]]:
        spread_over = partial(_global, mesh)
        rows, positions = spread_over(by_row, rows), spread_over(by_position, positions)
        return compiled(state, data, rows, np.int32(count), key, positions)

    return run


_CHUNK_SPECS = (
    PartitionSpec(),  # state
    PartitionSpec(),  # data
    PartitionSpec(None, None, AXIS),  # rows
    PartitionSpec(),  # count
    PartitionSpec(),  # key
    PartitionSpec(None, AXIS),  # positions
)
"""How the arguments of a chunk are spread over the devices."""


def _chunk_over(mesh: Mesh, chunk: Chunk) -> jax.stages.Wrapped:
    mapped = jax.shard_map(
        chunk,
        mesh=mesh,
        in_specs=_CHUNK_SPECS,
        out_specs=PartitionSpec(),
        check_vma=False,  # the chunk itself averages over the devices
    )
    return jax.jit(mapped, donate_argnums=0)


def lower_chunk(chunk: Chunk, layout: str, devices: Sequence[jax.Device], *shapes: Any) -> jax.stages.Lowered:
    """Lowers a chunk for devices that need not be there.

    Args:
      chunk: for one device, with the mapped axis ``AXIS``.
      layout: a key of ``LAYOUTS``.
      devices: of a target, see ``devices.targets``.
      *shapes: of the six arguments of a chunk, over all devices, trees of ``jax.ShapeDtypeStruct``.
    """
    if layout == "pmap":
        state, data, rows, count, key, positions = shapes
        rows, positions = _split(rows, len(devices), 2), _split(positions, len(devices), 1)
        return _pmapped(chunk, devices).lower(state, data, rows, count, key, positions)
    mesh = _mesh(devices)
    return _chunk_over(mesh, chunk).lower(*map(partial(_placed, mesh), _CHUNK_SPECS, shapes))


def _split(shapes: chex.ArrayTree, parts: int, axis: int) -> chex.ArrayTree:
    """Returns the shapes of arrays of which an axis is split, with the parts in front."""

    def of_parts(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        size = (*x.shape[:axis], x.shape[axis] // parts, *x.shape[axis + 1 :])
        return x.update(shape=(parts, *size))

    return jax.tree.map(of_parts, shapes)


def _placed(mesh: Mesh, spec: PartitionSpec, shapes: chex.ArrayTree) -> chex.ArrayTree:
    where = NamedSharding(mesh, spec)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), shapes)


def _global(mesh: Mesh, spec: PartitionSpec, tree: chex.ArrayTree) -> chex.ArrayTree:
    """Makes arrays over all processes from what each process has: its share, or the whole if none is split.

    It goes leaf by leaf through the host, because JAX copies no array to the devices of other processes.
    """
    put = partial(jax.make_array_from_process_local_data, NamedSharding(mesh, spec))

    def place(x: Any) -> jax.Array:
        if isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            words = put(np.asarray(jax.random.key_data(x)))
            return jax.random.wrap_key_data(words, impl=jax.random.key_impl(x))
        return put(np.asarray(x))

    return jax.tree.map(place, tree)


def pmap(chunk: Chunk, devices: list[jax.Device]) -> Chunk:
    """Compiles a chunk by ``pmap``: each device gets its part of the batch and a copy of the state.

    Args:
      chunk: for one device, with the mapped axis ``AXIS``.
      devices: of this process; the axis spans those of all processes.

    Returns:
      A chunk that takes this process's share of ``rows`` and ``positions``.
    """
    mapped = _pmapped(chunk, devices if jax.process_count() == 1 else None)

    def split(x: Any, axis: int) -> np.ndarray:
        return np.stack(np.split(np.asarray(x), len(devices), axis=axis))

    def run(
        state: chex.ArrayTree, data: Any, rows: Any, count: int, key: chex.PRNGKey, positions: np.ndarray
    ) -> tuple[chex.ArrayTree, dict[str, chex.Array]]:
        rows = jax.tree.map(lambda x: split(x, 2), rows)
        return mapped(state, data, rows, count, key, split(positions, 1))

    return run


def _pmapped(chunk: Chunk, devices: Sequence[jax.Device] | None) -> Any:
    # Without donation: with several processes JAX refuses it for a state that is not mapped.
    return jax.pmap(chunk, AXIS, in_axes=(None, None, 0, None, None, 0), out_axes=None, devices=devices)


LAYOUTS: dict[str, Callable[[Chunk, list[jax.Device]], Chunk]] = {"jit": jit, "pmap": pmap}

Spread = Callable[[chex.ArrayTree, chex.ArrayTree], chex.ArrayTree]
"""``(parts [n, ...], shared) -> outputs [n, ...]``."""


def spread(function: Spread, layout: str, devices: list[jax.Device]) -> Spread:
    """Compiles work on images that do not depend on each other; each device works on its part of them.

    Every device runs the same program on a batch of the same size, so the output for an image does not depend
    on the number of devices.

    Args:
      function: for one device.
      layout: a key of ``LAYOUTS``: ``jit`` splits the parts by ``shard_map``, ``pmap`` maps over them.
      devices: from :func:`devices_for`.

    Returns:
      ``function`` on all devices; the number of parts must be a multiple of their number. With several
      processes, each passes its own share of the parts, and all get all outputs.
    """
    alone = jax.process_count() == 1
    if layout == "pmap":
        mapped = jax.pmap(function, in_axes=(0, None), devices=devices)

        def split(x: Any) -> Any:
            return x.reshape(len(devices), -1, *x.shape[1:])

        def run(parts: chex.ArrayTree, shared: chex.ArrayTree) -> chex.ArrayTree:
            outputs = jax.device_get(mapped(jax.tree.map(split, parts), shared))
            outputs = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), outputs)
            return outputs if alone else jax.tree.map(_from_all, outputs)

        return run
    mesh = _mesh(devices)
    compiled = _spread_over(mesh, function)
    if alone:
        return compiled

    def gathered(parts: chex.ArrayTree, shared: chex.ArrayTree) -> chex.ArrayTree:
        return jax.tree.map(lambda x: _from_all(_own(x)), compiled(_global(mesh, _PARTS, parts), shared))

    return gathered


GATHERED = 2**28  # bytes that are gathered on a device at once


def _own(x: jax.Array) -> np.ndarray:
    """Returns the rows of an array over all processes that are on the devices of this one, in order."""
    shards = sorted(x.addressable_shards, key=lambda shard: shard.index[0].start or 0)
    return np.concatenate([np.asarray(shard.data) for shard in shards])


def _from_all(own: np.ndarray) -> np.ndarray:
    """Gathers the rows of all processes, ``[b, ...]`` of each, in pieces that fit a device."""
    processes = jax.process_count()
    rows = max(1, GATHERED // max(1, processes * own[:1].nbytes))
    parts = [
        multihost_utils.process_allgather(own[start : start + rows]) for start in range(0, len(own), rows)
    ]
    return np.concatenate(parts, axis=1).reshape(processes * len(own), *own.shape[1:])


_PARTS, _SHARED = PartitionSpec(AXIS), PartitionSpec()


def _spread_over(mesh: Mesh, function: Spread) -> jax.stages.Wrapped:
    mapped = jax.shard_map(function, mesh=mesh, in_specs=(_PARTS, _SHARED), out_specs=_PARTS, check_vma=False)
    return jax.jit(mapped)


def lower_spread(
    function: Spread,
    layout: str,
    devices: Sequence[jax.Device],
    parts: chex.ArrayTree,
    shared: chex.ArrayTree,
) -> jax.stages.Lowered:
    """Lowers work on images for devices that need not be there.

    Args:
      function: for one device, as in :func:`spread`.
      layout: a key of ``LAYOUTS``.
      devices: of a target, see ``devices.targets``.
      parts: shapes of all images and what belongs to them, ``[n, ...]``.
      shared: shapes of the rest.
    """
    if layout == "pmap":
        mapped = jax.pmap(function, in_axes=(0, None), devices=devices)
        return mapped.lower(_split(parts, len(devices), 0), shared)
    mesh = _mesh(devices)
    return _spread_over(mesh, function).lower(_placed(mesh, _PARTS, parts), _placed(mesh, _SHARED, shared))


def in_batches(
    compiled: Callable[..., chex.ArrayTree], parts: Sequence[np.ndarray], size: int
) -> chex.ArrayTree:
    """Calls compiled work with one batch after another.

    Args:
      compiled: takes this process's share of ``size`` entries of each part, and returns ``size`` outputs.
      parts: arrays ``[m, ...]``, any m > 0.
      size: entries in each call, on all devices together. The last batch is filled up with its last entry.

    Returns:
      The outputs ``[m, ...]`` in order, NumPy arrays.
    """
    outputs = []
    for start in range(0, len(parts[0]), size):
        batch = [np.asarray(part[start : start + size]) for part in parts]
        count = len(batch[0])
        full = (np.take(part, range(size), 0, mode="clip") for part in batch)
        judged = jax.device_get(compiled(*(part[share(size)] for part in full)))
        outputs.append(jax.tree.map(lambda x, count=count: x[:count], judged))
    return jax.tree.map(lambda *batches: np.concatenate(batches), *outputs)


def attack(
    predict: Callable[[chex.ArrayTree, chex.Array], chex.Array],
    inner_loop: Callable[..., chex.Array],
    *,
    layout: str = "jit",
    devices: list[jax.Device] | None = None,
) -> Callable[[chex.ArrayTree, chex.PRNGKey, chex.Array, chex.Array], chex.Array]:
    """Compiles an attack, such as PGD, for all devices by ``jit`` or by ``pmap``.

    ::

        pgd = partial(attacks.pgd, threat=ThreatModel(0.031), steps=20, step_size=0.0078)
        attack = parallel.attack(lambda variables, x: model.predict(*variables, x), pgd, layout="pmap")
        adversarial = attack((params, stats), keys, images, labels)

    Args:
      predict: ``(variables, images [B, H, W, C]) -> logits [B, K]``.
      inner_loop: ``(logits_fn, keys [B], images, labels [B]) -> images``.
      layout: a key of ``LAYOUTS``.
      devices: to work on; all if None.

    Returns:
      ``(variables, keys [B], images [B, H, W, C], labels [B]) -> images``, for any ``B`` that is a multiple
      of the number of devices; compiled once per ``B``. With several processes, all pass the same arguments.
      Raises a ValueError for any other ``B``.
    """

    def on_device(parts: tuple, variables: chex.ArrayTree) -> chex.Array:
        return inner_loop(partial(predict, variables), *parts)

    devices = devices or devices_for(layout)
    everywhere = spread(on_device, layout, devices)
    count = len(devices) * (jax.process_count() if layout == "pmap" else 1)

    def run(variables: Any, keys: chex.PRNGKey, images: chex.Array, labels: chex.Array) -> chex.Array:
        if len(images) % count:
            raise ValueError(f"{len(images)} images for {count} devices; pass a multiple of their number")
        mine = share(len(images))
        return everywhere((keys[mine], images[mine], labels[mine]), variables)

    return run
