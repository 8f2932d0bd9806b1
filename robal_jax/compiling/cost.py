"""Cost of a compiled program: operations, bytes, transfers between devices, and the compiler's cycles.

Everything is read from the program's text (``hlo``) and is of one device. It is an estimate, not a
measurement: transfers between devices and waits are not in the cycles.
"""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from robal_jax.compiling.hlo import Instruction, Program

COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
"""Operations that send numbers between devices."""

# They compute nothing, or what they contain is counted by itself.
_FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call",
    "after-all", "partition-id", "replica-id", "copy-done", "async-done", "async-update", "opt-barrier",
    *(f"{name}-done" for name in COLLECTIVES),
}  # fmt: skip
_PICKS = ("dynamic-slice", "gather", "slice")

KINDS = ("convolution", "transfer", "reduction", "copy", "element-wise")
"""Kinds of operations: convolutions and matrix products; between devices; sums and the like, with what is
fused to them; changes of the layout alone; the rest."""


class Operation(NamedTuple):
    """Operations of a program that are alike.

    Attributes:
      kind: one of ``KINDS``.
      name: of the JAX operation, such as 'backbone/conv1/conv_general_dilated'.
      place: line of the library, such as 'models/layers.py:40', or ''.
      shape: of the output.
      times: how often it is executed.
      cycles: of all times, the compiler's estimate; 0 if it gives none.
      flops: of all times, additions and multiplications of convolutions and matrix products.
      bytes: of all times, to and from the device's main memory, without padding.
      in_loop: whether it is in a loop whose number of steps is known, such as that of an attack.
    """

    kind: str
    name: str
    place: str
    shape: str
    times: int
    cycles: int
    flops: int
    bytes: int
    in_loop: bool


class Cost(NamedTuple):
    """The cost of a program on one device.

    Attributes:
      transfers: number and bytes of operations between devices, by their opcode.
      operations: all.
      unknown_loops: number of loops that count as one step, because the length is not known.
    """

    transfers: dict[str, tuple[int, int]]
    operations: list[Operation]
    unknown_loops: int

    def total(self, field: str, *, in_loop: bool | None = None, kind: str = "") -> int:
        """Adds up a field of the operations: of all, or of some.

        Args:
          field: 'times', 'cycles', 'flops' or 'bytes'.
          in_loop: whether those in loops are meant, or those outside; both if None.
          kind: one of ``KINDS``; all if ''.
        """
        return sum(
            getattr(each, field)
            for each in self.operations
            if in_loop in (None, each.in_loop) and kind in ("", each.kind)
        )


def cost_of(program: Program, start: str, *, loops: bool = True, folder: str = "robal_jax/") -> Cost:
    """Adds up the cost of a computation and of all that it calls.

    A loop whose number of steps is not known counts as one step.

    Args:
      program: parsed.
      start: name of the computation.
      loops: whether what is in its loops counts.
      folder: part of the paths of the code whose lines are named.
    """
    transfers: dict[str, tuple[int, int]] = {}
    alike: dict[tuple[str, str, str, str, bool], np.ndarray] = {}
    unknown = 0
    for computation, each, times in program.executed(start, loops=loops):
        unknown += each.opcode == "while" and loops and program.trips(each.name, computation) is None
        if each.opcode in _FREE:
            continue
        inside = [(computation, each), *program.fused(each)]
        kind = _kind(inside)
        if kind == "transfer":
            opcode, sent = each.opcode.removesuffix("-start"), sum(x.bytes for x in program.output_of(each))
            count, size = transfers.get(opcode, (0, 0))
            transfers[opcode] = count + times, size + times * sent
        flops = sum(_flops(program, name, part) for name, part in inside)
        once = np.array([1, each.cycles, flops, _moved(program, computation, each)])
        key = kind, _short(each.op_name) or each.opcode, program.place(each, folder), _output(each), times > 1
        alike[key] = alike.get(key, 0) + times * once
    operations = [_operation(key, sums.tolist()) for key, sums in alike.items()]
    return Cost(transfers, operations, unknown)


def _operation(key: tuple[str, str, str, str, bool], sums: list[int]) -> Operation:
    kind, name, place, shape, in_loop = key
    times, cycles, flops, moved = sums
    return Operation(kind, name, place, shape, times, cycles, flops, moved, in_loop)


def _kind(inside: list[tuple[str, Instruction]]) -> str:
    opcodes = {part.opcode for _, part in inside}
    calls = " ".join(part.rest for _, part in inside if part.opcode == "custom-call")
    if any(opcode.startswith(COLLECTIVES) for opcode in opcodes):
        return "transfer"
    if opcodes & {"convolution", "dot"} or re.search(r"__cudnn\$conv|__cublas", calls):
        return "convolution"
    if opcodes & {"reduce", "reduce-window"}:
        return "reduction"
    moves = {"copy", "copy-start", "transpose", "bitcast", "parameter", "fusion", "tuple", "reshape"}
    return "copy" if opcodes <= moves else "element-wise"


def _short(op_name: str) -> str:
    """Returns the end of an operation's path, without the names of transformations."""
    parts = [part for part in op_name.split("/") if not re.fullmatch(r"(jit|jvp|transpose|vmap)\(.*\)", part)]
    skipped = {"shard_map", "while", "body", "closed_call", "cond", "checkpoint"}
    return "/".join([part for part in parts if part not in skipped][-3:])


def _output(instruction: Instruction) -> str:
    """Returns the shape of an output without its layout; the first one of several, with their number."""
    found = re.findall(r"\w+\[[\d,]*\]", instruction.shape)
    return (found[0] if found else "") + (f" and {len(found) - 1} more" if len(found) > 1 else "")


def _flops(program: Program, computation: str, each: Instruction) -> int:
    """Returns the additions and multiplications of a convolution or a matrix product, 0 of others."""
    cudnn = re.search(r"__cudnn\$conv(\w+)", each.rest) if each.opcode == "custom-call" else None
    if each.opcode not in ("convolution", "dot") and not cudnn:
        return 0
    inputs = (program.computations[computation][name] for name in each.operands[:2])
    first, second, output = (program.output_of(x)[0].sizes for x in (*inputs, each))
    if each.opcode == "dot":
        contracted = re.findall(r"\d+", each.attribute("lhs_contracting_dims"))
        return 2 * math.prod(output) * math.prod(first[int(axis)] for axis in contracted)
    if cudnn and cudnn[1] == "BackwardInput":
        first, output = output, first
    elif cudnn and cudnn[1] == "BackwardFilter":
        second, output = output, second
    kernel = each.attribute("dim_labels").partition("_")[2].partition("-")[0]
    zeros = re.search(r"lhs_dilate=([\dx]+)", each.rest)  # rows and columns of zeros in a gradient's input
    spread = math.prod(map(int, zeros[1].split("x"))) if zeros else 1
    return 2 * math.prod(output) * math.prod(second) // max(second[kernel.index("o")], 1) // spread


def _moved(program: Program, computation: str, each: Instruction) -> int:
    """Returns the bytes that an instruction reads from and writes to the main memory."""
    instructions = program.computations[computation]
    written = sum(array.bytes for array in program.output_of(each) if not array.space)
    read = 0
    for position, name in enumerate(each.operands):
        if name in instructions:
            whole = sum(array.bytes for array in program.output_of(instructions[name]) if not array.space)
            read += min(whole, _picked(program, each, position, whole))
    return written + read


def _picked(program: Program, each: Instruction, position: int, whole: int) -> int:
    """Returns the bytes that are read of an operand: all, or what is picked out of it."""
    if each.opcode in _PICKS:
        return sum(array.bytes for array in program.output_of(each)) if not position else whole
    users = list(_users(program, each, position))
    if users and all(user.opcode in _PICKS for user in users):
        return sum(array.bytes for user in users for array in program.output_of(user))
    return whole


def _users(program: Program, each: Instruction, position: int) -> Iterator[Instruction]:
    """Yields the fused instructions that read an operand of a fusion."""
    for called in each.called if each.opcode == "fusion" else ():
        inner = program.computations.get(called, {})
        names = {part.name for part in inner.values() if part.opcode == "parameter"}
        names = {name for name in names if inner[name].operands[0] == str(position)}
        yield from (part for part in inner.values() if names & set(part.operands[:1]))
