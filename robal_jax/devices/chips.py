"""Facts of accelerators, and the settings with which JAX compiles for them where they are not."""

import difflib
from collections.abc import MutableMapping
from typing import Any, NamedTuple

from robal_jax.errors import InputError

SHARE_OF_A_GPU = 0.75
"""Share of a GPU's memory that JAX takes when it starts, unless ``XLA_PYTHON_CLIENT_MEM_FRACTION`` is set."""


class Chip(NamedTuple):
    """Facts of one device as JAX sees it: a whole chip; on a TPU v4 one of its two cores.

    Attributes:
      peak: additions and multiplications of bfloat16 numbers per second in matrix products.
      per_cycle: the same per cycle.
      memory: in bytes.
      bandwidth: of the memory, in bytes per second.
      about: what XLA wants to know of a GPU; empty for a TPU.
    """

    peak: float
    per_cycle: int
    memory: int
    bandwidth: float
    about: dict[str, Any]

    @property
    def clock(self) -> float:
        """Of the matrix units, in Hz."""
        return self.peak / self.per_cycle

    @property
    def available(self) -> int:
        """Memory that a program can have, in bytes: by default JAX takes only a share of a GPU's."""
        return int(SHARE_OF_A_GPU * self.memory) if self.about else self.memory


def _tpu(peak: float, units: int, side: int, memory: int, bandwidth: float) -> Chip:
    """Returns the facts of a TPU with ``units`` matrix units of ``side`` x ``side`` multipliers."""
    return Chip(peak, 2 * units * side * side, memory, bandwidth, {})


def _gpu(name: str, rate: int, memory: int, bandwidth: int, **about: Any) -> Chip:
    """Returns the facts of a GPU whose cores multiply ``rate`` pairs of bfloat16 numbers in a cycle."""
    per_cycle = 2 * rate * about["core_count"]
    peak = per_cycle * 1e9 * about.pop("matrix_clock_ghz")
    described = {**_GPU, **about, "memory_bandwidth": bandwidth, "device_memory_size": memory}
    return Chip(peak, per_cycle, memory, bandwidth, {"name": name, "device": described})


_GPU = {
    "threads_per_block_limit": 1024,
    "threads_per_warp": 32,
    "threads_per_core_limit": 2048,
    "shared_memory_per_block": 49152,
    "block_dim_limit_x": 2147483647,
    "block_dim_limit_y": 65535,
    "block_dim_limit_z": 65535,
    "registers_per_core_limit": 65536,
    "registers_per_block_limit": 65536,
}
_HOPPER = {
    "major": 9,
    "core_count": 132,
    "fpus_per_core": 128,
    "clock_rate_ghz": 1.98,
    "matrix_clock_ghz": 1.83,
    "l2_cache_size": 52428800,
    "shared_memory_per_core": 233472,
    "shared_memory_per_block_optin": 232448,
}
_AMPERE = {
    "major": 8,
    "core_count": 108,
    "fpus_per_core": 64,
    "clock_rate_ghz": 1.41,
    "matrix_clock_ghz": 1.41,
    "l2_cache_size": 41943040,
    "shared_memory_per_core": 167936,
    "shared_memory_per_block_optin": 166912,
}
_BLACKWELL = {
    **_HOPPER,
    "major": 10,
    "core_count": 148,
    "clock_rate_ghz": 1.965,
    "matrix_clock_ghz": 1.835,
    "l2_cache_size": 132644864,
}

CHIPS: dict[str, Chip] = {
    "v4": _tpu(137.5e12, 4, 128, 16 * 2**30, 614e9),
    "v5e": _tpu(197e12, 4, 128, 16 * 2**30, 819e9),
    "v5p": _tpu(459e12, 8, 128, 95 * 2**30, 2765e9),
    "v6e": _tpu(918e12, 4, 256, 32 * 2**30, 1640e9),
    "a100": _gpu("NVIDIA A100-SXM4-80GB", 1024, 85100068864, 2039040000000, **_AMPERE),
    "h100": _gpu("NVIDIA H100 80GB HBM3", 2048, 84942979072, 3352320000000, **_HOPPER),
    "h200": _gpu("NVIDIA H200 141GB HBM3e", 2048, 151397597184, 4800000000000, **_HOPPER),
    "b200": _gpu("NVIDIA B200", 4096, 191514411008, 7672320000000, **_BLACKWELL),
}
"""Chips by the name that their topologies begin with.

Source: TPUs, Google Cloud's pages of their versions: peak, matrix units, memory, bandwidth. GPUs, the device
descriptions in XLA's repository (``xla/backends/gpu/target_config/specs``).
"""

ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",  # asks no metadata server
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",  # otherwise the machine is asked; the topology decides
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # several compilations at once
    "TPU_STDERR_LOG_LEVEL": "3",
    "TPU_MIN_LOG_LEVEL": "3",
}
"""Variables with which the TPU's compiler starts on a machine without a TPU, unless they are set already."""


def prepare(topology: str, environment: MutableMapping[str, str]) -> None:
    """Sets the variables with which JAX compiles for devices that are not there; call it before JAX starts.

    Args:
      topology: see :func:`devices_of`.
      environment: ``os.environ``, or another mapping; it is changed.

    Raises:
      InputError: the chip is unknown.
    """
    environment["JAX_PLATFORMS"] = "cpu"
    if chip_of(topology).about:  # the fastest of several kernels can only be found on a device
        environment["XLA_FLAGS"] = f"{environment.get('XLA_FLAGS', '')} --xla_gpu_autotune_level=0".strip()
        environment.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")  # cuDNN is not needed to compile
    else:
        for name, value in ENVIRONMENT.items():
            environment.setdefault(name, value)


def chip_of(topology: str) -> Chip:
    """Returns the facts of the chips of a topology such as 'v5e:4x8'.

    Raises:
      InputError: the chip is unknown.

    Example:
      >>> print(f"{chip_of('h100:8').peak / 1e12:.0f} {chip_of('v5e:2x4').clock / 1e9:.1f}")
      989 1.5
    """
    name = topology.partition(":")[0]
    if name not in CHIPS:
        near = difflib.get_close_matches(name, CHIPS, 1)
        raise InputError(
            f"unknown chip {name!r} in topology {topology!r}; use {near[0] if near else ', '.join(CHIPS)}, "
            "followed by the layout of the chips, as in v5e:2x4, or by the number of GPUs, as in h100:8"
        )
    return CHIPS[name]
