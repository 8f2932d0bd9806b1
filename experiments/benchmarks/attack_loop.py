"""What the compiled PGD loop costs: python experiments/benchmarks/attack_loop.py [--batch=32] [--repeats=5].

Three ways to make five PGD steps on WideResNet-16-2, timed in turn in one process, as ratios to the first:

    unrolled            five steps written out, XLA's own convolution gradients
    loop                the library's fori_loop with models.loop_convolution (what training uses on a CPU)
    loop, XLA's own     the same loop with XLA's own convolution gradients (jax-ml/jax#12868 on a CPU)
"""

import pathlib
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

import jax
import jax.numpy as jnp

from robal_jax import cli
from robal_jax.attacks import ThreatModel, pgd_path
from robal_jax.classifiers import LinearHead
from robal_jax.models import Convolution, Network, WideResNet, convolution, functional, loop_convolution

STEPS, THREAT, STEP_SIZE = 5, ThreatModel(0.031), 0.0078


def main(arguments: list[str]) -> None:
    """Times the three, prints medians and ratios."""
    texts = {"batch": "images, 32", "repeats": "timed calls of each, 5"}
    values = cli.parse(arguments, texts, __doc__)
    batch, repeats = int(values["batch"] or 32), int(values["repeats"] or 5)
    images = jax.random.uniform(jax.random.key(0), (batch, 32, 32, 3))
    labels = jnp.zeros(batch, jnp.int32)

    def attack(convolve: Convolution, unroll: bool) -> Callable[[], jax.Array]:
        model = functional(Network(WideResNet(16, 2, convolution=convolve), LinearHead(10)))
        params, stats = jax.jit(model.init)(jax.random.key(0), images)
        step = partial(pgd_path, threat=THREAT, step_size=STEP_SIZE)

        def run(params: Any, stats: Any, x: jax.Array) -> jax.Array:
            logits_fn = partial(model.predict, params, stats)
            if not unroll:
                return step(logits_fn, x, images, labels, steps=(STEPS,))[0]
            gradient = jax.grad(lambda x: -jax.nn.log_softmax(logits_fn(x))[:, 0].sum())
            for _ in range(STEPS):
                x = THREAT.project(x + STEP_SIZE * THREAT.ascent_direction(gradient(x)), images)
            return x

        return partial(jax.jit(run), params, stats, images)

    ways = {
        "unrolled": attack(convolution, True),
        "loop": attack(loop_convolution, False),
        "loop, XLA's own": attack(convolution, False),
    }
    results = {name: jax.block_until_ready(way()) for name, way in ways.items()}
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, way in ways.items():
            started = time.perf_counter()
            jax.block_until_ready(way())
            times[name].append(time.perf_counter() - started)
    base = statistics.median(times["unrolled"])
    print(
        f"{jax.devices()[0].device_kind}, jax {jax.__version__}, batch {batch}, {STEPS} PGD steps, WRN-16-2"
    )
    for name, seconds in times.items():
        median = statistics.median(seconds)
        same = jnp.mean(jnp.abs(results[name] - results["unrolled"]) < 1e-6)
        print(f"{name:16s} {1e3 * median:8.0f} ms   ratio {median / base:5.2f}   equal pixels {same:.2%}")


if __name__ == "__main__":
    cli.run(main)
