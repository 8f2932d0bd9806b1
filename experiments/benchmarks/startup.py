"""From nothing to the first step: python experiments/benchmarks/startup.py [--networks=digits_cnn].

Start-up: every line is a fresh process, 'cold' with an empty compilation cache and 'warm' with the cache of
the cold one; beside PyTorch's eager step (two passes) and, with --compiled, torch.compile's.

    import     from the start of the process until JAX and robal_jax.training, or PyTorch, are imported
    build      data, network, optimiser and the initial state, whose program is compiled here
    trace      tracing and lowering of a chunk of one step
    compile    compilation of the chunk by XLA, or reading it from the cache
    first      the step; PyTorch compiles here

A run: experiments/train.py on the digits from start to last checkpoint. Needs PyTorch.
"""

import itertools
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

from robal_jax import cli

ROOT = pathlib.Path(__file__).resolve().parents[2]
PHASES = ("import", "build", "trace", "compile", "first")
CACHES = ("JAX_COMPILATION_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR")
CALL = """import json, sys
sys.path.insert(0, sys.argv[1])
from experiments.benchmarks import {module}
print(json.dumps({module}.{function}(*json.loads(sys.argv[2]))))"""


def in_fresh_process(module: str, function: str, *arguments: Any, **env: str) -> Any:
    """Calls a function of a benchmark in a fresh process; ``env`` is added to the environment."""
    code = CALL.format(module=module, function=function)
    command = [sys.executable, "-c", code, str(ROOT), json.dumps(arguments)]
    done = subprocess.run(command, env={**os.environ, **env}, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def counted_compilations() -> dict[str, int]:
    """Counts, from now on, requested compilations and those that the cache served."""
    from jax import monitoring

    counts = {"asked": 0, "from_cache": 0}

    def on_duration(event: str, duration_secs: float, **_: Any) -> None:
        counts["asked"] += event == "/jax/core/compile/backend_compile_duration"  # also if cached

    def on_event(event: str, **_: Any) -> None:
        counts["from_cache"] += event == "/jax/compilation_cache/cache_hits"

    monitoring.register_event_duration_secs_listener(on_duration)
    monitoring.register_event_listener(on_event)
    return counts


def whole_chunk(job: Any) -> Any:
    """Returns the job's first chunk of steps, ``(state, data, key) -> (state, sums)``, not yet compiled."""
    import jax

    from robal_jax import training
    from robal_jax.devices import parallel

    chunk = training.compiled_chunk(job, parallel.devices_for(job.settings.layout))
    where = training.positions(job)
    rows, count = next(training.chunks(job, 0))
    return jax.jit(lambda state, data, key: chunk(state, data, rows, count, key, where), donate_argnums=0)


def inputs(job: Any) -> tuple[Any, Any, Any]:
    """Returns the arguments of :func:`whole_chunk`, on the devices."""
    import jax

    from robal_jax import training
    from robal_jax.devices import parallel
    from robal_jax.training import initial_state

    data = training.Examples(job.data.train_images, job.data.train_labels)
    state = jax.jit(lambda: initial_state(job))()
    return parallel.replicate((state, data, jax.random.key(0)), parallel.devices_for(job.settings.layout))


def ours(started: float, network: str, method: str, batch: int) -> dict[str, float]:
    """Returns the seconds of each phase since the process was started, and the compilations."""
    import jax

    from experiments.benchmarks import step

    marks = [started, time.time()]
    counts = counted_compilations()
    job = step.job_of(network, method, batch, 1)
    given = jax.block_until_ready(inputs(job))
    marks.append(time.time())
    chunk = whole_chunk(job).lower(*given)
    marks.append(time.time())
    chunk = chunk.compile()
    marks.append(time.time())
    jax.device_get(chunk(*given)[1])
    seconds = [end - start for start, end in itertools.pairwise([*marks, time.time()])]
    return {**dict(zip(PHASES, seconds, strict=True)), **counts}


def theirs(started: float, network: str, method: str, batch: int, mode: str) -> dict[str, float]:
    """Returns the same for PyTorch, compiled by torch.compile if a mode is given."""
    import torch  # noqa: F401

    from experiments.benchmarks import torch_networks, torch_step  # noqa: F401

    imported = time.time() - started
    from experiments.benchmarks import step  # imports JAX, which PyTorch does not need

    begun = time.time()
    run = step.theirs(network, method, batch, 1, torch_step.Variant("two passes", compiled=mode))
    built = time.time()
    run()
    return {"import": imported, "build": built - begun, "first": time.time() - built}


def short_run(started: float, steps: int) -> dict[str, float]:
    """Returns the seconds of a whole run of experiments/train.py, and its compilations."""
    from experiments import train

    counts = counted_compilations()
    with tempfile.TemporaryDirectory() as workdir:
        config = f"--config={ROOT / 'configs/robal_n.py'}:digits_lt"
        train.main([config, f"--workdir={workdir}", f"--config.train.max_steps={steps}"])
    return {"first": time.time() - started, **counts}


def in_turn(workers: Mapping[str, tuple[Any, ...]], repeats: int) -> dict[str, list[dict[str, float]]]:
    """Runs the workers in turn, ``repeats`` times; each turn starts with empty caches that they share."""
    found: dict[str, list[dict[str, float]]] = {name: [] for name in workers}
    for _ in range(repeats):
        with tempfile.TemporaryDirectory() as folder:
            caches = {name: os.path.join(folder, name) for name in CACHES}
            for name, (function, *rest) in workers.items():
                all_ = in_fresh_process("startup", function, time.time(), *rest, **caches)
                found[name].append({**all_, "total": sum(all_.get(phase, 0.0) for phase in PHASES)})
    return found


def report(what: str, found: dict[str, list[dict[str, float]]], base: str) -> list[dict[str, Any]]:
    """Prints and returns the medians, and the spread of the total and its ratio to ``base``."""
    rows: list[dict[str, Any]] = []
    for name, all_ in found.items():
        row = {key: statistics.median(of[key] for of in all_) for key in all_[0]}
        low, high = (choose(of["total"] for of in all_) for choose in (min, max))
        ratio = row["total"] / statistics.median(of["total"] for of in found[base])
        cells = "".join(f"{row[phase]:8.2f}" if phase in row else f"{'-':>8s}" for phase in PHASES)
        spread = f"{row['total']:8.2f} ({low:.2f}-{high:.2f})"
        text = f"{what:12s} {name:14s} {cells} {spread}  {ratio:.2f} of {base}"
        if "asked" in row:
            text += "; {asked:.0f} programs, {from_cache:.0f} of them from the cache".format(**row)
        print(text, flush=True)
        rows.append({"what": what, "way": name, **row, "low": low, "high": high, f"of_{base}": ratio})
    return rows


def main(arguments: list[str]) -> None:
    """Times everything and prints a table."""
    texts = {
        "networks": "of step.NETWORKS; digits_cnn,wrn_16_2,resnet18",
        "method": "robal_n or at; robal_n",
        "batch": "images, 64",
        "run_steps": "of the whole run, 50; 0 for none",
        "compiled": "includes torch.compile",
        "repeats": "processes of each, 3",
        "json": "file for the record",
    }
    values = cli.parse(arguments, texts, __doc__, switches=("compiled",))
    from experiments.benchmarks import measure

    networks = (values["networks"] or "digits_cnn,wrn_16_2,resnet18").split(",")
    method, batch = values["method"] or "robal_n", int(values["batch"] or 64)
    run_steps, repeats, rows = int(values["run_steps"] or 50), int(values["repeats"] or 3), []
    # In its own process, because a process that has looked for its devices keeps their memory.
    print(in_fresh_process("measure", "heading"))
    print(f"Seconds, medians of {repeats} processes; {method}, batch {batch}\n")
    print(f"{'':28s}{''.join(f'{phase:>8s}' for phase in PHASES)}  total (least-most)")
    for network in networks:
        given = (network, method, batch)
        workers = {"cold": ("ours", *given), "warm": ("ours", *given), "PyTorch": ("theirs", *given, "")}
        if values["compiled"]:
            workers |= {f"compiled, {cache}": ("theirs", *given, "default") for cache in ("cold", "warm")}
        rows += report(network, in_turn(workers, repeats), "PyTorch")
    if run_steps:
        found = in_turn(dict.fromkeys(("cold", "warm"), ("short_run", run_steps)), repeats)
        rows += report(f"{run_steps} steps", found, "cold")
    measure.record(values["json"], rows)


if __name__ == "__main__":
    cli.run(main)
