"""Settings of JAX before it starts, and how many pixels a CPU should compute at once."""

import hashlib
import importlib.metadata
import importlib.util
import os
import pathlib
import platform
from collections.abc import Mapping, MutableMapping

# Uses Eigen's convolutions and matrix products instead of YNNPACK's, which are slower on two cores
# (experiments/benchmarks/NOTES.md).
CPU_FLAG = "xla_cpu_experimental_ynn_fusion_type", "-individual_convolution,-individual_dot"

# Versions of jaxlib that know the flag; another version might abort.
KNOWN_IN = "0.10.2", "0.11.2", "0.12.0.1"


FALSE, TRUE = ("", "0", "false", "f", "no", "n", "off"), ("1", "true", "t", "yes", "y", "on")

OWNED: dict[str, tuple[str, ...]] = {
    # other numbers, or other types of numbers
    "JAX_NUMPY_DTYPE_PROMOTION": ("standard",),
    "JAX_NUMPY_RANK_PROMOTION": ("allow",),
    "JAX_DEFAULT_PRNG_IMPL": ("threefry2x32",),
    "JAX_ENABLE_CUSTOM_PRNG": FALSE,
    "JAX_LEGACY_PRNG_KEY": ("allow",),
    "JAX_RANDOM_SEED_OFFSET": ("0",),
    "JAX_THREEFRY_PARTITIONABLE": TRUE,
    "JAX_HIGH_DYNAMIC_RANGE_GUMBEL": FALSE,
    "JAX_SOFTMAX_CUSTOM_JVP": FALSE,
    "JAX_ALLOW_F16_REDUCTIONS": TRUE,
    "JAX_DISABLE_JIT": FALSE,
    "JAX_DISABLE_MOST_OPTIMIZATIONS": FALSE,
    "JAX_NO_EXECUTION": FALSE,
    "JAX_NO_TRACING": FALSE,
    # checks that end programs which are right
    "JAX_DEBUG_NANS": FALSE,
    "JAX_DEBUG_INFS": FALSE,
    "JAX_DEBUG_KEY_REUSE": FALSE,
    "JAX_CHECK_TRACER_LEAKS": FALSE,
    "JAX_ENABLE_CHECKS": FALSE,
    "JAX_CHECK_STATIC_INDICES": FALSE,
    "JAX_ERROR_CHECKING_BEHAVIOR_DIVIDE": ("ignore",),
    "JAX_ERROR_CHECKING_BEHAVIOR_NAN": ("ignore",),
    "JAX_ERROR_CHECKING_BEHAVIOR_OOB": ("ignore",),
    "JAX_TRANSFER_GUARD": ("allow",),
    "JAX_TRANSFER_GUARD_HOST_TO_DEVICE": ("allow",),
    "JAX_TRANSFER_GUARD_DEVICE_TO_HOST": ("allow",),
    "JAX_TRANSFER_GUARD_DEVICE_TO_DEVICE": ("allow",),
}
"""Variables of JAX whose settings the results rely on, with the values that mean JAX's default."""

KEPT = {
    "JAX_ENABLE_X64": "numbers have 64 bits, and differ from those of 32 bits",
    "JAX_DEFAULT_MATMUL_PRECISION": "it does not concern the network; config.train.precision and "
    "config.evaluation.precision do",
}
"""Variables that may be meant, and what to know of each; the versions of a result name their settings."""


def own_settings(environment: MutableMapping[str, str]) -> list[str]:
    """Removes the variables that would change what the command line computes, the ``OWNED``; warns of others.

    Args:
      environment: ``os.environ``, or another mapping; it is changed.

    Returns:
      Warnings.
    """
    given = {name: environment.pop(name) for name in OWNED if name in environment}
    changed = [f"{name}={text}" for name, text in given.items() if text.strip().lower() not in OWNED[name]]
    warnings = []
    if changed:
        verb = "is" if len(changed) == 1 else "are"
        warnings.append(f"{', '.join(changed)} {verb} ignored: results rely on JAX's defaults")
    for name, text in KEPT.items():
        if environment.get(name, "").strip().lower() not in FALSE:
            warnings.append(f"{name}={environment[name]}: {text}")
    return warnings


def user_cache(environment: Mapping[str, str]) -> pathlib.Path:
    """Returns the folder of the user's for what can be made again.

    Args:
      environment: ``os.environ``, or another mapping.

    Raises:
      RuntimeError: the user has no home folder, and the environment names no other.
    """
    home = pathlib.Path(environment.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache")
    return home / "robal_jax"


def prepare_jax(environment: MutableMapping[str, str]) -> list[str]:
    """Sets the variables that JAX reads when it is imported and when it starts, unless they are set already.

    The ``OWNED`` ones are removed.

    - ``JAX_COMPILATION_CACHE_DIR``: a folder of the user's for compiled programs, one per kind of processor,
      because compiled code may use all instructions of the processor it was compiled on. Set it to '' to turn
      the cache off, which it is for a user without a home folder.
    - ``XLA_FLAGS``: ``CPU_FLAG``, if no accelerator's plugin is installed.

    Args:
      environment: ``os.environ``, or another mapping; it is changed.

    Returns:
      Warnings for the user.
    """
    warnings = own_settings(environment)
    try:
        environment.setdefault("JAX_COMPILATION_CACHE_DIR", str(user_cache(environment) / _processor()))
    except RuntimeError:  # a user of a container may have no home
        environment.setdefault("JAX_COMPILATION_CACHE_DIR", "")
    environment.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    plugins = importlib.metadata.entry_points(group="jax_plugins")
    if plugins or importlib.util.find_spec("libtpu"):
        return warnings
    given, (name, value) = environment.get("XLA_FLAGS", ""), CPU_FLAG
    if name not in given and importlib.metadata.version("jaxlib") in KNOWN_IN:
        environment["XLA_FLAGS"] = f"{given} --{name}={value}".strip()
    return warnings


def drop_unusable_cache(environment: MutableMapping[str, str]) -> str:
    """Turns the cache of compiled programs off if its folder cannot be written to.

    JAX itself warns of it again for every program.

    Args:
      environment: ``os.environ``, or another mapping, after :func:`prepare_jax`; it is changed.

    Returns:
      A warning; '' if the folder can be used.
    """
    folder = environment["JAX_COMPILATION_CACHE_DIR"]
    if not folder or "://" in folder:  # of a cloud
        return ""
    try:
        os.makedirs(folder, exist_ok=True)
        why = "" if os.access(folder, os.W_OK | os.X_OK) else "no permission"
    except OSError as error:
        why = str(error.strerror)
    if why:
        environment["JAX_COMPILATION_CACHE_DIR"] = ""
        return (
            f"cannot write to {folder} ({why}): compiled programs are not kept; set JAX_COMPILATION_CACHE_DIR"
        )
    return ""


def _processor() -> str:
    """Returns a short digest of the instructions that the processor knows."""
    path = pathlib.Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    known = [line for line in lines if line.startswith(("flags", "Features"))][:1]
    return hashlib.sha256("".join([platform.machine(), *known]).encode()).hexdigest()[:8]


LEVEL_2_CACHE = pathlib.Path("/sys/devices/system/cpu/cpu0/cache/index2/size")


def cpu_piece() -> int:
    """Returns how many pixels a CPU should predict at once, so that the activations fit its caches.

    One pixel per 32 bytes of a core's level-2 cache: 16 images of CIFAR's size for 512 KiB, 32 for 1 MiB,
    each measured on a processor with such a cache (experiments/benchmarks/NOTES.md). If the size of the cache
    is not known, 512 KiB are assumed.
    """
    try:
        kib = int(LEVEL_2_CACHE.read_text().strip().removesuffix("K"))  # Linux writes 1024K
    except (OSError, ValueError):
        kib = 0
    return max(kib, 512) * 1024 // 32


def at_once(batch_size: int, pixels: int, platform: str) -> int:
    """Returns the images per device in each call of an evaluation; a CPU gets fewer.

    On a CPU they have at most :func:`cpu_piece` pixels. A larger batch is no faster there, and it wastes more
    work when few images survive an attack, because the last batch is filled up.

    Args:
      batch_size: of the config.
      pixels: per image; if one image has more than :func:`cpu_piece`, ``batch_size`` is returned.
      platform: of the devices: 'cpu', 'gpu' or 'tpu'.
    """
    if platform != "cpu":
        return batch_size
    return min(batch_size, cpu_piece() // pixels or batch_size)
