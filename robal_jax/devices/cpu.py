"""TODO devices.cpu."""

import hashlib
import importlib.metadata
import importlib.util
import pathlib
import platform
from collections.abc import MutableMapping

# Eigen's convolutions and matrix products instead of YNNPACK's, which are slower on two cores
# (experiments/benchmarks/NOTES.md).
CPU_FLAG = "xla_cpu_experimental_ynn_fusion_type", "-individual_convolution,-individual_dot"

# Versions of jaxlib that know it; another one might abort.
KNOWN_IN = "0.10.2", "0.11.2", "0.12.0.1"


def prepare_jax(environment: MutableMapping[str, str]) -> None:
    """Sets what JAX reads when it is imported and when it starts; what is set already stays as it is.

    - ``JAX_COMPILATION_CACHE_DIR``: a folder of the user's for what was compiled, one for each kind of
      processor, because compiled code may use all instructions of the one it was compiled on. Set to '' it
      is not kept.
    - ``XLA_FLAGS``: ``CPU_FLAG``, where no accelerator's plugin is installed.

    Args:
      environment: changed; that of the process is ``os.environ``.
    """
    home = pathlib.Path(environment.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache")
    environment.setdefault("JAX_COMPILATION_CACHE_DIR", str(home / "robal_jax" / _processor()))
    environment.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    plugins = importlib.metadata.entry_points(group="jax_plugins")
    if plugins or importlib.util.find_spec("libtpu"):
        return
    given, (name, value) = environment.get("XLA_FLAGS", ""), CPU_FLAG
    if name not in given and importlib.metadata.version("jaxlib") in KNOWN_IN:
        environment["XLA_FLAGS"] = f"{given} --{name}={value}".strip()


def _processor() -> str:
    """Stands for the instructions that the processor knows."""
    path = pathlib.Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    known = [line for line in lines if line.startswith(("flags", "Features"))][:1]
    return hashlib.sha256("".join([platform.machine(), *known]).encode()).hexdigest()[:8]


LEVEL_2_CACHE = pathlib.Path("/sys/devices/system/cpu/cpu0/cache/index2/size")


def cpu_piece() -> int:
    """Pixels that a CPU predicts at once, so that its caches hold what a network makes of them.

    A pixel for 32 bytes of a core's level-2 cache: 16 images of CIFAR's size for 512 KiB, 32 for 1 MiB, each
    measured on a processor with that (experiments/benchmarks/NOTES.md); 512 KiB where it is not known.
    """
    try:
        kib = int(LEVEL_2_CACHE.read_text().strip().removesuffix("K"))  # Linux writes 1024K
    except (OSError, ValueError):
        kib = 0
    return max(kib, 512) * 1024 // 32


def at_once(batch_size: int, pixels: int, platform: str) -> int:
    """Images that a device evaluates in one call: ``batch_size``, on a CPU at most :func:`cpu_piece` pixels.

    There more at once is no faster, and the fewer survivors an attack leaves, the more of a batch that is
    filled up is computed for nothing.

    Args:
      batch_size: of the config.
      pixels: of an image; where one alone has more than a piece, the batch stays as it is.
      platform: of the devices: 'cpu', 'gpu' or 'tpu'.
    """
    if platform != "cpu":
        return batch_size
    return min(batch_size, cpu_piece() // pixels or batch_size)
