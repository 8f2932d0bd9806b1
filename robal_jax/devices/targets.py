"""Devices that need not be there: topologies for which JAX compiles."""

import jax
from jax.experimental import topologies

from robal_jax.devices.chips import Chip, chip_of
from robal_jax.errors import InputError, one_line


def devices_of(topology: str) -> list[jax.Device]:
    """Returns the devices of a topology; nothing can be computed on them, but programs compile for them.

    Args:
      topology: TPU and layout, such as 'v5e:4x8' or 'v5p:2x2x2'; or GPU and number in one machine, such as
        'h100' or 'h100:8'.

    Raises:
      InputError: the chip is unknown, the layout is impossible, or the compiler is not installed.
    """
    chip = chip_of(topology)
    try:
        if chip.about:
            found = _gpus(chip, topology)
        else:
            found = topologies.get_topology_desc(platform="tpu", topology_name=topology)
    except InputError:
        raise
    except Exception as error:  # plugins raise all kinds
        text, extra = one_line(error), "gpu-compile" if chip.about else "tpu-compile"
        if "not installed" in text or "not implemented" in text:
            raise InputError(
                f"the compiler for {topology} is missing; pip install 'robal_jax[{extra}]'"
            ) from error
        raise InputError(f"topology {topology!r} cannot be used ({text}); use one like v5e:2x4") from error
    return sorted(found.devices, key=lambda device: (device.process_index, device.id))


def _gpus(chip: Chip, topology: str) -> topologies.TopologyDescription:
    count = topology.partition(":")[2] or "1"
    if not count.isdecimal() or int(count) < 1:
        raise InputError(f"topology {topology!r} has no number of GPUs; write it as in h100:8")
    fields = dict(chip.about["device"])
    major = fields.pop("major")
    lines = [f"  {name}: {value}" for name, value in fields.items()]
    text = "\n".join(
        [
            "gpu_device_info {",
            *lines,
            f"  cuda_compute_capability {{ major: {major} }}",
            "}",
            'platform_name: "CUDA"',
            "dnn_version_info { major: 9 minor: 10 }",
            f'device_description_str: "{chip.about["name"]}"',
        ]
    )
    return topologies.get_topology_desc(
        topology_name="", platform="cuda", target_config=text, topology=f"1x1x{count}"
    )
