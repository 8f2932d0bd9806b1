"""Estimates in words."""

from collections.abc import Mapping
from typing import Any

from robal_jax.devices.chips import SHARE_OF_A_GPU, Chip

UNITS = {"train": "a step"}
"""Unit that is counted, by the name of the program; a batch for the others."""

FAR = 64
"""So many times the images are too far from what was compiled for a number to mean something."""


def described(values: Mapping[str, Any], chip: Chip | None) -> str:
    """Returns the lines of a program.

    Args:
      values: of ``estimates.as_values``.
      chip: each device; None if it is not known.
    """
    unit = UNITS.get(values["program"], "a batch")
    head = f"{values['program']}: {values['images_per_device']} images per device"
    head += f", compiled in {values['compile_seconds']:.0f} s"
    if values["fits"] is False:
        return f"{head}\n  does not fit: {values.get('problem') or _memory(values['memory_bytes'], chip)}"
    lines = [f"memory      {_memory(values['memory_bytes'], chip)}"]
    if largest := values.get("estimated_largest_images_per_device"):
        known = largest < FAR * values["images_per_device"]
        lines[0] += f"; {f'about {largest:,}' if known else 'far more'} images per device would fit"
    if problem := values.get("problem_of_twice_the_images"):
        lines.append(f"largest     not known: with twice the images, {problem}")
    lines.append(
        f"work        {_si(values['flops'])}FLOP and {_si(values['bytes_moved'])}B to and from memory, {unit}"
    )
    sent = [f"{x['count']} {name}, {_si(x['bytes'])}B" for name, x in values["transfers"].items()]
    lines.append(f"transfers   {'; '.join(sent) or 'none'}")
    for where, counts in values["operations"].items():
        found = ", ".join(
            f"{x['times']} {kind} ({_si(x['bytes'])}B)" for kind, x in counts.items() if x["times"]
        )
        lines.append(f"operations  {where.replace('_', ' ')}: {found or 'none'}")
    if count := values["unknown_loops"]:
        lines.append(f"loops       {count} of unknown length; only one step of each counts")
    lines += _time(values, unit)
    return "\n  ".join([head, *lines])


def _memory(memory: Mapping[str, int], chip: Chip | None) -> str:
    parts = f"{_si(memory['arguments'])}B arguments ({_si(memory['in_place'])}B of them in place), "
    parts += f"{_si(memory['temporaries'])}B temporaries, {_si(memory['total'])}B in all"
    if chip is None:
        return parts
    parts += f", {memory['total'] / chip.available:.0%} of {_si(chip.available)}B"
    if chip.available == chip.memory:
        return parts
    share = f"JAX's default share, {SHARE_OF_A_GPU:.0%} of {_si(chip.memory)}B"
    return f"{parts} ({share}; XLA_PYTHON_CLIENT_MEM_FRACTION changes it)"


def _time(values: Mapping[str, Any], unit: str) -> list[str]:
    if "estimated_seconds" not in values:
        return []
    cycles, at_least, at_most = values.get("estimated_cycles"), "at least ", "at most "
    lines = []
    if cycles:
        share, at_least, at_most = cycles["in_loops"] / cycles["all"], "", ""
        lines.append(f"estimate    {_si(cycles['all'])}cycles {unit}, {share:.0%} of them in loops")
    lines.append(
        f"estimate    {at_least}{1e3 * values['estimated_seconds']:.3g} ms {unit}, "
        f"{at_most}{values['estimated_images_per_second']:.3g} images per second and device, "
        f"{values['estimated_share_of_peak']:.0%} of the peak in bfloat16"
    )
    if "estimated_seconds_per_dispatch" in values:
        lines.append(f"dispatch    {1e3 * values['estimated_seconds_per_dispatch']:.3g} ms besides its steps")
    lines.append("heaviest    share, times, kind, output, operation, place")
    for each in values["heaviest"]:
        what = f"{each['kind']:12} {each['shape']:28} {each['name']}  {each['place']}"
        lines.append(f"  {each['share']:6.1%} {each['times']:5} {what}".rstrip())
    return lines


def _si(value: float) -> str:
    """Returns a number with three digits and the letter of its size: '1.23 G'."""
    for letter, size in ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3):
        if value >= size:
            return f"{value / size:.3g} {letter}"
    return f"{value:.3g} "
