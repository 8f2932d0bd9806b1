"""The time that the device waits for the host: python experiments/benchmarks/overhead.py [--steps=400].

T(k) is the time of a step if one dispatch makes k steps, in the loop of ``training.train``: choosing images
while the device works, dispatch, waiting, writing scalars. T is the same if one dispatch makes all steps, so
that the host has almost nothing to do. The device then waits for the share 1 - T / T(k) of the time. The
default is the smallest network, whose steps are the shortest. On a CPU the device's own cores do the work of
the host.
"""

import contextlib
import dataclasses
import pathlib
import sys
import tempfile
from collections.abc import Callable
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

import jax
import numpy as np

from experiments.benchmarks import measure, startup, step
from robal_jax import cli, training
from robal_jax.devices import parallel
from robal_jax.storage.progress import Meter, Scalars

DISPATCHES = (1, 5, 20, 100)


def waiting_share(a_step: float, a_step_of_one_dispatch: float) -> float:
    """Returns the share of a step's time in which the device waits; below 0 only by noise."""
    return 1 - a_step_of_one_dispatch / a_step


def loop(job: Any, given: tuple[Any, Any, Any], scalars: Any) -> Callable[[], None]:
    """Returns the job's steps as in ``training.train``, from the inputs of a chunk."""
    devices = parallel.devices_for(job.settings.layout)
    chunk, where = training.compiled_chunk(job, devices), training.positions(job)
    first, data, key = given
    meter = Meter("train", job.total_steps + 1, every=float("inf"))  # silent if stdout is not a terminal

    def run() -> None:
        state, step = parallel.replicate(first, devices), 0
        with contextlib.closing(training.chunks(job, 0)) as upcoming:
            rows = next(upcoming, None)
            while rows is not None:
                count = rows[1]
                state, sums = chunk(state, data, rows[0], count, key, where)
                rows = next(upcoming, None)
                made, sums = jax.device_get((state.step, sums))
                means = {name: float(value) / (int(made) - step) for name, value in sums.items()}
                step += count
                if int(made) != step or not np.isfinite(means["loss"]):
                    raise RuntimeError(f"step {step} is not finite: the chunks ended early")
                scalars.write(step, {"epoch": 1, **means, "learning_rate": float(job.schedule(step))})
                meter.update(step, f"epoch 1  loss {means['loss']:.3f}")

    return run


def overhead(network: str, method: str, batch: int, steps: int, repeats: int) -> list[dict[str, Any]]:
    """Prints and returns the share of waiting by steps per dispatch."""
    job = dataclasses.replace(step.job_of(network, method, batch, steps), total_steps=steps)
    state, data, key = startup.inputs(job)
    given = jax.device_get(state), data, key  # each call copies it anew, because a chunk gives its state up
    with tempfile.TemporaryDirectory() as folder, Scalars(pathlib.Path(folder), 0) as scalars:
        ways = {
            str(k): loop(
                dataclasses.replace(job, settings=job.settings._replace(steps_per_dispatch=k)), given, scalars
            )
            for k in (*(k for k in DISPATCHES if k < steps), steps)
        }
        times = measure.interleaved(ways, repeats)
    rows = []
    for name, seconds in times.items():
        each = seconds.per(steps)
        share = waiting_share(seconds.median, times[str(steps)].median)
        print(
            f"{network} batch {batch:3d}  {name:>4s} steps per dispatch  {each:.3g} ms per step  {share:6.1%}"
        )
        rows.append(
            {"network": network, "batch": batch, "dispatch": int(name), **each._asdict(), "waiting": share}
        )
    return rows


def main(arguments: list[str]) -> None:
    """Times everything and prints a table."""
    texts = {
        "network": "one of step.NETWORKS, digits_cnn",
        "method": "robal_n or at; robal_n",
        "batch": "sizes, 8,64",
        "steps": "of a timed call, 400",
        "repeats": "timed calls of each, 5",
        "json": "file for the record",
    }
    values = cli.parse(arguments, texts, __doc__)
    network, method = values["network"] or "digits_cnn", values["method"] or "robal_n"
    sizes = [int(size) for size in (values["batch"] or "8,64").split(",")]
    steps, repeats = int(values["steps"] or 400), int(values["repeats"] or 5)
    print(measure.heading())
    print(f"{network}, {method}: medians of {repeats} (least-most) of {steps} steps, in turn\n")
    rows = []
    for batch in sizes:
        rows += overhead(network, method, batch, steps, repeats)
    measure.record(values["json"], rows)


if __name__ == "__main__":
    cli.run(main)
