"""A compiled program as XLA writes it: ``compiled.as_text()``, parsed as far as its cost can be read from it.

A program is a set of computations, lists of instructions; some instructions call others::

    %while.1 = (s32[], f32[8,16]) while(%tuple.3), condition=%cond, body=%body, metadata={op_name="..."}

How often a loop runs is not written in the text of all compilers; :meth:`Program.trips` reads it from the
condition, whose bound may come from a constant far outside of the loop.
"""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

BYTES = {"pred": 1, "token": 0, "opaque": 0}
"""Bytes per element of types whose name does not end in their bits."""

_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\](?:\{([^{}]*)\})?")
_ALIASES = {"copy", "bitcast", "reshape", "convert", "copy-start", "copy-done", "opt-barrier"}
_CALLED = re.compile(r"(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)")


class Array(NamedTuple):
    """An array in a shape: its type, sizes, and memory space (0 is the device's main memory)."""

    dtype: str
    sizes: tuple[int, ...]
    space: int

    @property
    def bytes(self) -> int:
        """Bytes without padding."""
        bits = re.search(r"\d+", self.dtype)
        each = BYTES[self.dtype] if self.dtype in BYTES else int(bits[0]) / 8 if bits else 0
        return math.ceil(math.prod(self.sizes) * each)


class Instruction(NamedTuple):
    """One line of a computation.

    Attributes:
      name: unique in the program.
      shape: its output, as text.
      opcode: such as 'fusion'.
      operands: names of its inputs; of a constant its value.
      rest: attributes, metadata and the backend's notes, as text.
      is_root: whether it is the computation's output.
    """

    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    rest: str
    is_root: bool

    def attribute(self, name: str) -> str:
        """Returns the value of an attribute such as 'direction', '' if there is none."""
        found = re.search(rf"\b{name}=(\{{[^{{}}]*\}}|%?[\w.\->]+)", self.rest)
        return found[1].lstrip("%") if found else ""

    @property
    def cycles(self) -> int:
        """The compiler's estimate, 0 if it gives none."""
        found = re.search(r'"estimated_cycles":"(\d+)"', self.rest)
        return int(found[1]) if found else 0

    @property
    def op_name(self) -> str:
        """Path of the JAX operation that it comes from, such as 'jit(f)/while/body/dot_general'."""
        found = re.search(r'op_name="([^"]*)"', self.rest)
        return found[1] if found else ""

    @property
    def called(self) -> tuple[str, ...]:
        """Names of the computations that it calls."""
        branches = re.search(r"branch_computations=\{([^}]*)\}", self.rest)
        several = re.findall(r"%?([\w.\-]+)", branches[1]) if branches else []
        return (*_CALLED.findall(self.rest), *several)


def arrays(shape: str) -> list[Array]:
    """Returns the arrays of a shape, those of a tuple in their order.

    >>> arrays("(s32[]{:T(128)}, bf16[8,16]{1,0:T(8,128)S(1)})")
    [Array(dtype='s32', sizes=(), space=0), Array(dtype='bf16', sizes=(8, 16), space=1)]
    """
    found = []
    for dtype, sizes, layout in _ARRAY.findall(re.sub(r"/\*.*?\*/", "", shape)):
        space = re.search(r"S\((\d+)\)", layout)
        numbers = tuple(int(size) for size in sizes.split(",") if size)
        found.append(Array(dtype, numbers, int(space[1]) if space else 0))
    return found


class Program:
    """A compiled program.

    Attributes:
      computations: instructions by name, by name of their computation.
      entry: name of the computation in which the program starts.
    """

    def __init__(self, text: str) -> None:
        """Parses ``compiled.as_text()``."""
        self.computations: dict[str, dict[str, Instruction]] = {}
        self.entry, current = "", None
        self._tables: dict[str, list[str]] = {}
        table = None
        for line in text.splitlines():
            if head := _HEAD.match(line):
                current, table = self.computations.setdefault(head[2], {}), None
                self.entry = head[2] if head[1] else self.entry
            elif line.startswith("}"):
                current = None
            elif current is not None and (found := _instruction(line)):
                current[found.name] = found
            elif line in ("FileNames", "FunctionNames", "FileLocations", "StackFrames"):
                table = self._tables.setdefault(line, [""])  # they count from 1
            elif table is not None and line[:1].isdigit():
                table.append(line.partition(" ")[2])
        self._callers = {
            called: (name, each.name)
            for name, instructions in self.computations.items()
            for each in instructions.values()
            for called in each.called
        }

    def output_of(self, instruction: Instruction) -> list[Array]:
        """Returns the arrays that an instruction makes."""
        return arrays(instruction.shape)

    def place(self, instruction: Instruction, folder: str) -> str:
        """Returns the innermost line of a folder's code that an instruction comes from, '' if there is none.

        Args:
          instruction: of the program.
          folder: part of a path, such as 'robal_jax/'.
        """
        found = re.search(r"stack_frame_id=(\d+)", instruction.rest)
        number = int(found[1]) if found else 0
        while number:
            frame = dict(re.findall(r"(\w+)=(\d+)", self._tables["StackFrames"][number]))
            location = self._tables["FileLocations"][int(frame["file_location_id"])]
            fields = dict(re.findall(r"(\w+)=(\d+)", location))
            path = self._tables["FileNames"][int(fields["file_name_id"])].strip('"')
            if folder in path:
                return f"{path.rpartition(folder)[2]}:{fields['line']}"
            above = int(frame.get("parent_frame_id", 0)) - 1  # 1 says that there is none
            number = above if above < number else 0
        return ""

    def executed(
        self, start: str, times: int = 1, *, loops: bool = True
    ) -> Iterator[tuple[str, Instruction, int]]:
        """Yields the instructions of a computation and of all that it calls, with how often each runs.

        A fused instruction is not one by itself. A loop whose number of steps is not known counts as one
        step, and both branches of a condition count.

        Args:
          start: name of the computation.
          times: how often it is executed.
          loops: whether the instructions in its loops are meant, too.

        Yields:
          The computation's name, the instruction, and the number of times.
        """
        for each in self.computations[start].values():
            yield start, each, times
            if each.opcode == "while" and loops:
                steps = self.trips(each.name, start) or 1
                yield from self.executed(each.attribute("body"), times * steps)
            elif each.opcode in ("call", "conditional", "async-start"):
                for called in each.called:
                    yield from self.executed(called, times, loops=loops)

    def endless(self) -> str:
        """Returns the body of the first loop whose number of steps is not known, '' for none."""
        loops = (each for each in self.computations[self.entry].values() if each.opcode == "while")
        bodies = [x.attribute("body") for x in loops if self.trips(x.name, self.entry) is None]
        return bodies[0] if bodies else ""

    def fused(self, instruction: Instruction) -> Iterator[tuple[str, Instruction]]:
        """Yields an instruction and all that it is fused from, with their computations."""
        for called in instruction.called if instruction.opcode in ("fusion", "custom-call") else ():
            for each in self.computations.get(called, {}).values():
                yield called, each
                yield from self.fused(each)

    def trips(self, loop: str, computation: str) -> int | None:
        """Returns how many steps a loop makes at most, None if the data decide it alone.

        Args:
          loop: name of the instruction 'while'.
          computation: in which it stands.
        """
        instruction = self.computations[computation][loop]
        if known := re.search(r'"known_trip_count":\{"n":"(\d+)"\}', instruction.rest):
            return int(known[1])
        condition = instruction.attribute("condition")
        compares = [each for each in self.computations[condition].values() if each.opcode == "compare"]
        bounds = [steps for each in compares if (steps := self._steps(condition, each)) is not None]
        return min(bounds, default=None)

    def _steps(self, condition: str, compare: Instruction) -> int | None:
        """Returns the steps until ``i < n`` fails, for a counter ``i`` that grows by 1."""
        if compare.attribute("direction") != "LT":
            return None
        first, bound = (self._value(condition, name) for name in compare.operands)
        return None if first is None or bound is None else bound - first

    def _value(self, computation: str, name: str) -> int | None:
        """Returns the integer that an instruction holds at the start, None if it is not known.

        What enters a loop is taken as what it holds in every step.
        """
        instructions = self.computations[computation]
        each = instructions[name]
        if each.opcode == "constant":
            return int(each.operands[0]) if re.fullmatch(r"-?\d+", each.operands[0]) else None
        if each.opcode in _ALIASES:
            return self._value(computation, each.operands[0])
        if each.opcode == "get-tuple-element" and instructions[each.operands[0]].opcode == "parameter":
            outer, caller = self._callers.get(computation, ("", ""))
            given = self.computations[outer][self.computations[outer][caller].operands[0]] if outer else None
            if given is not None and given.opcode == "tuple":
                return self._value(outer, given.operands[int(each.attribute("index"))])
        return None


def _closing(text: str, start: int) -> int:
    """Returns the position of the parenthesis that closes the one at ``start``."""
    depth = 0
    for position in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[position], 0)
        if not depth:
            return position
    return len(text)


def _instruction(line: str) -> Instruction | None:
    head = re.match(r"\s+(ROOT )?%?([\w.\-]+) = ", line)
    if not head:
        return None
    rest = line[head.end() :]
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.find(" ")
    shape, rest = rest[:end], rest[end:].lstrip()
    opening = rest.find("(")
    closing = _closing(rest, opening)
    inside = re.sub(r"/\*.*?\*/", "", rest[opening + 1 : closing])
    named = re.findall(r"%([\w.\-]+)", inside)
    operands = tuple(named) if named else (inside.strip(),)
    return Instruction(head[2], shape, rest[:opening], operands, rest[closing + 1 :], bool(head[1]))
