"""Memory, work and time of each program of a run, as its compiler estimates them."""

import dataclasses
import re
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
from ml_collections import ConfigDict

from robal_jax import builder, training
from robal_jax.compiling import programs
from robal_jax.compiling.cost import KINDS, Cost, Operation, cost_of
from robal_jax.compiling.hlo import Program
from robal_jax.devices.chips import Chip
from robal_jax.errors import InputError, one_line

HEAVIEST = 20
"""Operations that are named."""


class Memory(NamedTuple):
    """Memory of a program on one device, in bytes.

    Attributes:
      arguments: of the inputs.
      in_place: inputs whose memory the outputs take.
      outputs: in all.
      temporaries: of everything between.
    """

    arguments: int
    in_place: int
    outputs: int
    temporaries: int

    @property
    def total(self) -> int:
        """All that is there at once."""
        return self.arguments + self.outputs - self.in_place + self.temporaries


class Estimate(NamedTuple):
    """The compiler's account of a program.

    Attributes:
      name: 'train' for a step of the training; 'conditions', or the attack of which it is a round.
      images: per device.
      seconds: of the compilation.
      memory: None if the program does not fit.
      cost: None if the program does not fit.
      once: of what a dispatch of training steps does besides its steps; None for other programs.
      larger: a larger number of images per device, and the memory with them: twice as many, or all if the
        test set has fewer. None if it was not asked for, does not fit, or cannot be had.
      problem: why it does not fit, '' if it does.
      problem_doubled: why there is no program with twice the images, '' if there is or it was not asked for.
    """

    name: str
    images: int
    seconds: float
    memory: Memory | None
    cost: Cost | None
    once: Cost | None = None
    larger: tuple[int, Memory] | None = None
    problem: str = ""
    problem_doubled: str = ""


def estimates(
    config: ConfigDict,
    devices: Sequence[jax.Device],
    names: Sequence[str] = (),
    *,
    doubled: ConfigDict | None = None,
) -> Iterator[Estimate]:
    """Compiles the programs of a run, one after the other.

    Args:
      config: of the run.
      devices: of a target, or those present.
      names: of the programs, see :class:`Estimate`; all if there are none.
      doubled: the same with twice the images in every batch, for :func:`largest_batch`; None for none. If no
        training can be built of it, because an epoch has fewer images, the estimate says so.

    Raises:
      InputError: a field of the config cannot be used, the batch cannot be spread over the devices, or there
        is no program of a name.
    """
    job = builder.training(config, devices)
    training.check_spread(job, len(devices))
    found = _programs(job, config, devices)
    if unknown := sorted(set(names) - set(found)):
        raise InputError(f"there is no program {unknown[0]!r}; use some of {', '.join(found)}")
    twice, problem = (None, "") if doubled is None else _twice(job, doubled, devices)
    more = {} if doubled is None else _programs(twice, doubled, devices)
    for name, (images, lower) in found.items():
        if not names or name in names:
            estimate = _estimate(name, images, lower())
            if name in more and estimate.memory is not None:
                larger, lower_larger = more[name]
                memory = _estimate(name, larger, lower_larger()).memory if larger > images else None
                estimate = estimate._replace(larger=(larger, memory) if memory else None)
            yield estimate._replace(problem_doubled=problem) if name == "train" else estimate


def _twice(
    job: builder.Training, doubled: ConfigDict, devices: Sequence[jax.Device]
) -> tuple[builder.Training | None, str]:
    """Returns the training with twice the images and as many steps per dispatch; or None, and why."""
    try:
        twice = builder.training(doubled, devices)
    except InputError as error:
        return None, str(error).partition(";")[0]
    settings = twice.settings._replace(steps_per_dispatch=job.settings.steps_per_dispatch)
    return dataclasses.replace(twice, settings=settings), ""


def _programs(
    job: builder.Training | None, config: ConfigDict, devices: Sequence[jax.Device]
) -> dict[str, tuple[int, Callable[[], jax.stages.Lowered]]]:
    """Returns the programs by name, 'train' if there is a job: images per device, and what lowers it."""
    evaluation = builder.evaluation(config, platform=devices[0].platform)
    steps: dict[str, tuple[int, Callable[[], jax.stages.Lowered]]] = {
        name: (evaluation.batch_size, partial(programs.evaluation_step, evaluation, name, devices))
        for name in programs.evaluation_names(evaluation)
    }
    if job is None:
        return steps
    each = job.settings.batch_size // len(devices)
    return {"train": (each, partial(programs.training_chunk, job, devices)), **steps}


def _estimate(name: str, images: int, lowered: jax.stages.Lowered) -> Estimate:
    started = time.perf_counter()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        used = re.search(r"Used (\S+) of (\S+) hbm", str(error))
        problem = f"needs {used[1]} of {used[2]}" if used else one_line(error)
        return Estimate(name, images, time.perf_counter() - started, None, None, problem=problem)
    seconds, found, text = time.perf_counter() - started, compiled.memory_analysis(), compiled.as_text()
    assert found is not None, "the compiler does not tell the program's memory"
    assert text is not None, "the compiler does not show the program"
    memory = Memory(
        arguments=found.argument_size_in_bytes,
        in_place=found.alias_size_in_bytes,
        outputs=found.output_size_in_bytes,
        temporaries=found.temp_size_in_bytes,
    )
    program = Program(text)
    step = program.endless() if name == "train" else ""
    once = cost_of(program, program.entry, loops=False) if step else None
    return Estimate(name, images, seconds, memory, cost_of(program, step or program.entry), once)


def as_values(estimate: Estimate, chip: Chip | None) -> dict[str, Any]:
    """Returns an estimate as JSON values, with the time and the share of the peak that follow from a chip."""
    values: dict[str, Any] = {"program": estimate.name, "images_per_device": estimate.images}
    values["compile_seconds"] = round(estimate.seconds, 1)
    memory, cost = estimate.memory, estimate.cost
    if memory is None or cost is None:
        return values | {"fits": False, "problem": estimate.problem}
    values["memory_bytes"] = memory._asdict() | {"total": memory.total}
    if chip is not None:
        values["estimated_largest_images_per_device"] = largest_batch(estimate, chip)
    if estimate.problem_doubled:
        values["problem_of_twice_the_images"] = estimate.problem_doubled
    values["fits"] = None if chip is None else memory.total <= chip.available
    values |= {"flops": cost.total("flops"), "bytes_moved": cost.total("bytes")}
    values["unknown_loops"] = cost.unknown_loops
    values["transfers"] = {name: {"count": n, "bytes": size} for name, (n, size) in cost.transfers.items()}
    values["operations"] = {
        where: {
            kind: {field: cost.total(field, in_loop=in_loop, kind=kind) for field in ("times", "bytes")}
            for kind in KINDS
        }
        for where, in_loop in (("in_loops", True), ("outside", False))
    }
    if chip is None:
        return values
    if cycles := cost.total("cycles"):
        values["estimated_cycles"] = {"all": cycles, "in_loops": cost.total("cycles", in_loop=True)}
    of_each = [(seconds_of(each, chip), each) for each in cost.operations]
    seconds = sum(time for time, _ in of_each)
    if estimate.once is not None:
        values["estimated_seconds_per_dispatch"] = sum(
            seconds_of(each, chip) for each in estimate.once.operations
        )
    heaviest = sorted(of_each, key=lambda pair: -pair[0])[:HEAVIEST]
    return values | {
        "estimated_seconds": seconds,
        "estimated_images_per_second": estimate.images / seconds,
        "estimated_share_of_peak": cost.total("flops") / (seconds * chip.peak),
        "heaviest": [{"share": time / seconds, **each._asdict()} for time, each in heaviest],
    }


def largest_batch(estimate: Estimate, chip: Chip) -> int | None:
    """Returns about how many images per device would fit, if the memory grows evenly with them.

    None if the program was not compiled for two sizes of the batch, or if the larger one does not fit.
    """
    if estimate.memory is None or estimate.larger is None:
        return None
    images, memory = estimate.larger
    each = (memory.total - estimate.memory.total) / (images - estimate.images)
    left = chip.available - estimate.memory.total
    return estimate.images + int(left / each) if each > 0 else None


def seconds_of(operation: Operation, chip: Chip) -> float:
    """Returns the time of operations: the compiler's cycles; without them the roofline, a lower bound.

    ``max(flops / peak, bytes / bandwidth)``
    """
    if chip.about:
        return max(operation.flops / chip.peak, operation.bytes / chip.bandwidth)
    return operation.cycles / chip.clock
