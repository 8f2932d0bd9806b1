"""Share of single mutations that the fast tests see: python experiments/benchmarks/mutations.py [--count=60].

Draws mutations of the library's source by a seed, in nine parts in turn: another sign,
another comparison, another constant, an index off by one, `and` for `or`, a dropped `not`, `min` for `max`.
Makes each of them alone in a copy of the repository and runs the fast tests that should see it. Every outcome
is appended to a file, and the same command resumes there; a higher count keeps the mutations of a lower one.
"""

import ast
import collections
import fnmatch
import functools
import itertools
import json
import os
import pathlib
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

from robal_jax import cli
from robal_jax.errors import InputError

ROOT = pathlib.Path(__file__).resolve().parents[2]
PARTS = {  # files of the library: the test files that should see a mutation; the first pattern holds
    "losses": {"losses.py": "losses"},
    "heads": {"classifiers.py": "classifiers"},
    "attacks": {
        "attacks/square_attack.py": "square",
        "attacks/fab_attack.py": "fab",
        "attacks/minimum_norm.py": "minimum_norm",
        "attacks/autopgd.py": "autopgd",
        "attacks/autoattack.py": "autoattack",
        "attacks/margins.py": "attacks square",
        "attacks/l1.py": "l1",
        "attacks/sparse_autopgd.py": "l1",
        "attacks/bpda_gradient.py": "bpda",
        "attacks/free.py": "free_steps",
        "attacks/malt.py": "fast",
        "attacks/pma_attack.py": "fast",
        "attacks/*.py": "attacks",
    },
    "bounds": {
        "certificates.py": "certificates",
        "intervals.py": "certificates",
        "linear_bounds.py": "certificates",
    },
    "metrics": {"metrics.py": "metrics", "distances.py": "distances"},
    "objectives": {"objectives.py": "objectives"},
    "training": {"training/*.py": "train streaming"},
    "evaluation": {
        "evaluation/verdicts.py": "audit",
        "evaluation/measurements.py": "audit",
        "evaluation/findings.py": "audit",
        "evaluation/evidence.py": "audit",
        "evaluation/additions.py": "corrupted certifying",
        "evaluation/certifying.py": "certifying",
        "evaluation/corrupted.py": "corrupted",
        "evaluation/optimality.py": "optimality",
        "evaluation/own_attacks.py": "own_attacks",
        "evaluation/*.py": "evaluate victim unfinished front_door",
    },
    "checkpoints": {"storage/checkpoints.py": "checkpoints train"},
}
OPERATORS: dict[type[ast.AST], tuple[str, str]] = {
    ast.Add: ("+", "-"),
    ast.Sub: ("-", "+"),
    ast.Mult: ("*", "/"),
    ast.Div: ("/", "*"),
    ast.BitAnd: ("&", "|"),
    ast.BitOr: ("|", "&"),
    ast.And: ("and", "or"),
    ast.Or: ("or", "and"),
    ast.Lt: ("<", "<="),
    ast.LtE: ("<=", "<"),
    ast.Gt: (">", ">="),
    ast.GtE: (">=", ">"),
    ast.Eq: ("==", "!="),
    ast.NotEq: ("!=", "=="),
    ast.Is: ("is", "is not"),
    ast.In: ("in", "not in"),
}
SWAPPED = {"min": "max", "minimum": "maximum", "argmin": "argmax", "floor": "ceil", "any": "all"}
SWAPPED |= {there: here for here, there in SWAPPED.items()}
PYTEST = ("-m", "pytest", "-m", "not slow", "-x", "-q", "-p", "no:cacheprovider", "--tb=line")
KILLED, SURVIVED, TIMEOUT = "killed", "survived", "timeout"


class Mutation(NamedTuple):
    """Text in the place of other text, and where that begins: ``line`` from 1, ``column`` in bytes from 0."""

    file: str
    line: int
    column: int
    before: str
    after: str

    def apply(self, source: bytes) -> bytes:
        """Returns the mutated source."""
        start = _offset(source, self.line, self.column)
        before = self.before.encode()
        assert source.startswith(before, start)
        return source[:start] + self.after.encode() + source[start + len(before) :]


def _offset(source: bytes, line: int, column: int) -> int:
    return _line_starts(source)[line - 1] + column


@functools.lru_cache
def _line_starts(source: bytes) -> list[int]:
    sizes = (len(line) + 1 for line in source.split(b"\n"))
    return list(itertools.accumulate(sizes, initial=0))


def mutations(file: str, source: bytes) -> list[Mutation]:
    """Lists the mutations of a source in the order of its text; types and strings are left alone."""
    found = []
    for node in _code(ast.parse(source)):
        for start, end, after in _edits(node, source):
            line = source.count(b"\n", 0, start) + 1
            column = start - _offset(source, line, 0)
            found.append(Mutation(file, line, column, source[start:end].decode(), after))
    return sorted(set(found))


def _code(node: ast.AST) -> Iterator[ast.AST]:
    """Yields a node and all nodes below it but annotations and what stands in f-strings."""
    if isinstance(node, ast.JoinedStr):
        return
    yield node
    for name, value in ast.iter_fields(node):
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST) and name not in ("annotation", "returns"):
                yield from _code(child)


def _span(node: Any, source: bytes) -> tuple[int, int]:
    """Returns the offsets of the first byte of a node and of the byte after its last one."""
    start = _offset(source, node.lineno, node.col_offset)
    return start, _offset(source, node.end_lineno, node.end_col_offset)


def _edits(node: ast.AST, source: bytes) -> Iterator[tuple[int, int, str]]:
    """Yields the first byte, the byte after the last one, and the text to put there."""
    match node:
        case ast.BinOp(left, operator, right):
            yield from _other_operator(left, operator, right, source)
        case ast.BoolOp(operator, [left, right, *_]):
            yield from _other_operator(left, operator, right, source)
        case ast.Compare(left, [operator, *_], [right, *_]):
            yield from _other_operator(left, operator, right, source)
        case ast.UnaryOp(ast.USub(), ast.Constant(int())):
            return  # mostly an axis: -1 becomes -2, and 1 would be the same axis of a matrix
        case ast.UnaryOp(ast.USub() | ast.Not() as operator):
            start = _span(node, source)[0]
            yield start, start + (1 if isinstance(operator, ast.USub) else 3), ""
        case ast.Constant(bool() | int() | float() as value):
            yield *_span(node, source), _other_constant(value)
        case ast.Name(name) | ast.Attribute(_, name) if name in SWAPPED:
            end = _span(node, source)[1]
            yield end - len(name), end, SWAPPED[name]
        case ast.Subscript(_, index) | ast.Slice(index) if isinstance(index, ast.Name | ast.BinOp):
            end = _span(index, source)[1]
            yield end, end, " + 1"
    if isinstance(node, ast.Slice) and isinstance(node.upper, ast.Name | ast.BinOp):
        end = _span(node.upper, source)[1]
        yield end, end, " + 1"


def _other_operator(
    left: ast.AST, operator: ast.AST, right: ast.AST, source: bytes
) -> Iterator[tuple[int, int, str]]:
    if type(operator) in OPERATORS:
        here, there = OPERATORS[type(operator)]
        start, end = _span(left, source)[1], _span(right, source)[0]
        gap = re.sub(rb"#.*", lambda comment: b" " * len(comment[0]), source[start:end])
        place = start + gap.index(here.encode())
        yield place, place + len(here), there


def _other_constant(value: float) -> str:
    if isinstance(value, bool):
        return str(not value)
    return str(value + 1) if isinstance(value, int) else repr(2 * value or 1.0)


def draw(seed: int, count: int, root: pathlib.Path = ROOT) -> list[tuple[str, Mutation]]:
    """Draws mutations from the parts in turn; those of a lower count are the first ones."""
    shuffled = {}
    for part, patterns in PARTS.items():
        files = sorted({path for pattern in patterns for path in (root / "robal_jax").glob(pattern)})
        every = [m for path in files for m in mutations(path.relative_to(root).as_posix(), path.read_bytes())]
        random.Random(f"{seed} {part}").shuffle(every)
        shuffled[part] = iter(every)
    parts = [list(PARTS)[number % len(PARTS)] for number in range(count)]
    return [(part, mutation) for part in parts if (mutation := next(shuffled[part], None))]


def copy_repository(folder: pathlib.Path) -> None:
    """Copies all files that git knows or would add."""
    command = ("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard")
    listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)


def tests_of(file: str, root: pathlib.Path = ROOT) -> list[str]:
    """Returns a file of the library, for its doctests, and the files of its tests."""
    tests = (
        tests
        for patterns in PARTS.values()
        for pattern, tests in patterns.items()
        if fnmatch.fnmatch(file, f"robal_jax/{pattern}")
    )
    found = [f"tests/test_{name}.py" for name in next(tests).split()]
    missing = [name for name in found if not (root / name).is_file()]
    if missing:
        raise InputError(f"{file}: there is no {missing[0]}; name its test files in PARTS")
    return [file, *found]


def run_tests(files: Sequence[str], folder: pathlib.Path, timeout: float | None) -> dict[str, Any]:
    """Runs tests up to the first failure; returns the outcome, the seconds and what failed."""
    # Without compiled modules: a mutated file may have the size and the second of the one before.
    settings = {**os.environ, "PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
    started = time.monotonic()
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(
            (sys.executable, *PYTEST, *files),
            cwd=folder,
            env=settings,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            status = process.wait(timeout)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            if process.poll() is None:  # with the processes that tests started
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        output.seek(0)
        lines = output.read().splitlines()
    outcome = {None: TIMEOUT, 0: SURVIVED}.get(status, KILLED)
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR", "E  "))][:1]
    return {"outcome": outcome, "seconds": round(time.monotonic() - started, 1), "by": failed or lines[-1:]}


def run(drawn: Sequence[tuple[str, Mutation]], out: pathlib.Path, say: Callable[[str], None]) -> None:
    """Tests what the file does not have yet, and appends a line per mutation."""
    done = {mutation for _, mutation, _ in read(out)}
    left = [(part, mutation) for part, mutation in drawn if mutation not in done]
    allowed: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        copy_repository(folder)
        for number, (part, mutation) in enumerate(left, 1):
            files = tests_of(mutation.file, folder)
            tests = " ".join(files[1:])
            if tests not in allowed:  # the first time they also fill the cache of compiled programs
                whole = run_tests(files, folder, None)
                if whole["outcome"] != SURVIVED:
                    raise InputError(f"{tests}: fails without a mutation: {whole['by']}; mend it first")
                allowed[tests] = 60 + 3 * whole["seconds"]
            target = folder / mutation.file
            source = target.read_bytes()
            target.write_bytes(mutation.apply(source))
            result = run_tests(files, folder, allowed[tests])
            target.write_bytes(source)
            with out.open("a") as lines:
                lines.write("\n" + json.dumps({"part": part, **mutation._asdict(), **result}))
            say(f"{number} of {len(left)}: {shown(mutation)}: {result['outcome']}, {result['seconds']} s")


def read(out: pathlib.Path) -> list[tuple[str, Mutation, str]]:
    """Reads part, mutation and outcome of each line; a line that was cut off is passed over."""
    found = []
    for line in out.read_text().splitlines() if out.is_file() else []:
        if line.endswith("}"):
            row = json.loads(line)
            found.append((row["part"], Mutation(*(row[key] for key in Mutation._fields)), row["outcome"]))
    return found


def shown(mutation: Mutation) -> str:
    """Returns a mutation on one line."""
    return f"{mutation.file}:{mutation.line}:{mutation.column} `{mutation.before}` -> `{mutation.after}`"


def table(rows: Sequence[tuple[str, Mutation, str]]) -> str:
    """Returns the numbers by part in Markdown, and the survivors below it."""
    counts = collections.Counter((part, outcome) for part, _, outcome in rows)
    lines = ["| part | mutations | killed | timeout | survived |", "| --- | ---: | ---: | ---: | ---: |"]
    for part in [*PARTS, "all"]:
        of_part = [
            sum(n for (p, o), n in counts.items() if part in (p, "all") and o == outcome)
            for outcome in (KILLED, TIMEOUT, SURVIVED)
        ]
        lines.append(f"| {' | '.join([part, *map(str, (sum(of_part), *of_part))])} |")
    survivors = [f"- {shown(mutation)}" for _, mutation, outcome in rows if outcome == SURVIVED]
    return "\n".join([*lines, "", "Survivors:", *(survivors or ["none"])])


def main(arguments: list[str]) -> None:
    """Draws, tests and prints a table."""
    texts = {"count": "mutations, 60", "seed": "of the draw, 0", "out": "file of outcomes, mutations.jsonl"}
    values = cli.parse(arguments, texts, __doc__)
    stopped = "stopped; the same command resumes"  # and ends the tests that are running
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(stopped))
    out = pathlib.Path(values["out"] or "mutations.jsonl")
    drawn = draw(int(values["seed"] or 0), int(values["count"] or 60))
    run(drawn, out, lambda text: print(text, flush=True))
    chosen = {mutation for _, mutation in drawn}
    print(table([row for row in read(out) if row[1] in chosen]))


if __name__ == "__main__":
    cli.run(main)
