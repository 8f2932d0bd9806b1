"""Where a device's time goes: python experiments/benchmarks/kernels.py [--networks=resnet18] [--batch=64].

The ten kernels that take most of RoBal-N's training step, from a profile of a second chunk of steps. XLA
numbers its fusions (loop_add_fusion_12); those of one kind count as one. A CPU has no rows of its own in a
profile: there the threads of XLA's client are counted, and the time of a loop includes its body.
"""

import collections
import gzip
import json
import pathlib
import re
import sys
import tempfile
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

from experiments.benchmarks import measure, step
from robal_jax import cli


class Kernel(NamedTuple):
    """The time of all calls of a kernel."""

    name: str
    milliseconds: float
    calls: int


def kernels(trace: Mapping[str, Any]) -> list[Kernel]:
    """Returns the kernels of a profile, the longest first.

    Args:
      trace: as jax.profiler writes it (``*.trace.json.gz``): events 'X' with ``pid``, ``tid``, ``name`` and
        ``dur`` in microseconds; events 'M' name the rows. Of a GPU's rows only the streams are counted: the
        others (XLA Ops, XLA Modules) repeat them.
    """
    events = trace["traceEvents"]
    names = {
        (event["name"], event["pid"], event.get("tid")): event["args"].get("name", "")
        for event in events
        if event.get("ph") == "M"
    }
    threads = {(pid, tid): name for (kind, pid, tid), name in names.items() if kind == "thread_name"}
    devices = {
        pid
        for (kind, pid, _), name in names.items()
        if kind == "process_name" and name.startswith("/device:")
    }
    rows = {row for row, name in threads.items() if row[0] in devices and name.startswith("Stream")}
    rows = rows or {row for row, name in threads.items() if name.startswith("tf_XLA")}
    spent: dict[str, float] = collections.defaultdict(float)
    calls: collections.Counter[str] = collections.Counter()
    for event in events:
        if event.get("ph") != "X" or (event["pid"], event["tid"]) not in rows:
            continue
        if not re.match(r"end: |Threadpool|Thunk", event["name"]):  # the CPU client's own work
            name = re.sub(r"[._]\d+$", "", event["name"])
            spent[name] += event["dur"] / 1e3
            calls[name] += 1
    return [Kernel(name, spent[name], calls[name]) for name in sorted(spent, key=lambda name: -spent[name])]


def profiled(network: str, batch: int, steps: int, precision: str) -> tuple[float, list[Kernel]]:
    """Returns the seconds of one chunk of steps, and its kernels."""
    import jax

    chunk = step.ours(network, "robal_n", batch, steps, precision)
    chunk()
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            started = time.perf_counter()
            chunk()
            seconds = time.perf_counter() - started
        (file,) = pathlib.Path(folder).rglob("*.trace.json.gz")
        with gzip.open(file) as stream:
            return seconds, kernels(json.load(stream))


def main(arguments: list[str]) -> None:
    """Profiles each network and prints a table."""
    texts = {
        "networks": f"some of {','.join(step.NETWORKS)}; digits_cnn if not given",
        "batch": "size, 64",
        "steps": "of the chunk, 2",
        "precision": "config.train.precision",
        "json": "file for the record",
    }
    values = cli.parse(arguments, texts, __doc__)
    batch, steps = int(values["batch"] or 64), int(values["steps"] or 2)
    precision, rows = values["precision"] or "default", []
    print(measure.heading())
    for network in (values["networks"] or "digits_cnn").split(","):
        seconds, found = profiled(network, batch, steps, precision)
        total = sum(kernel.milliseconds for kernel in found)
        print(f"\n{network}, batch {batch}, {precision}, per step {1e3 * seconds / steps:.2f} ms", end=", ")
        print(f"{total / steps:.2f} ms of them in {len(found)} kernels")
        for kernel in found[:10]:
            ms, share, calls = kernel.milliseconds / steps, kernel.milliseconds / total, kernel.calls / steps
            print(f"{ms:9.3f} ms {share:6.1%} {calls:8.1f} calls  {kernel.name[:100]}", flush=True)
            about = {"network": network, "batch": batch, "precision": precision, "seconds": seconds / steps}
            rows.append({**about, "kernel": kernel.name, "milliseconds": ms, "share": share, "calls": calls})
    measure.record(values["json"], rows)


if __name__ == "__main__":
    cli.run(main)
