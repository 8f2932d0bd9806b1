"""Changes of JAX and Orbax that would break the library, each with what to do then."""

import importlib.metadata
import inspect

import jax
import jax.numpy as jnp
from jax.sharding import AxisType

from robal_jax.devices import parallel


def test_pmap_is_there():
    assert hasattr(jax, "pmap"), (
        "this JAX has no pmap: remove the layout 'pmap' from devices/parallel.py and the ranges of "
        "config.train.layout, and let runs of that layout resume with 'jit'"
    )


def test_shard_map_can_leave_the_averages_to_us():
    assert "check_vma" in inspect.signature(jax.shard_map).parameters, (
        "jax.shard_map has no check_vma: the training step averages over the devices by itself, so find the "
        "new name of the flag that accepts this, and use it in devices/parallel.py"
    )


def test_arrays_carry_no_sharding_in_their_type():
    placed = parallel.replicate({"x": jnp.ones(3)}, parallel.devices_for("jit"))["x"]
    assert placed.sharding.mesh.axis_types == (AxisType.Auto,), (
        "the mesh is in explicit mode: devices/parallel.py asks for AxisType.Auto, which this JAX takes "
        "otherwise; the functions of the library and of users are written without shardings in types"
    )


def test_orbax_writes_the_format_of_stored_runs():
    major = int(importlib.metadata.version("orbax-checkpoint").partition(".")[0])
    assert major == 0, (
        "Orbax 1 is installed: run test_checkpoints.py, test_stored_run.py and test_kill.py with it; if they "
        "pass, raise the bound in setup.cfg and here, otherwise adapt storage/checkpoints.py first"
    )
