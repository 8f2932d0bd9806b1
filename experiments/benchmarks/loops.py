"""Compiled loops beside unrolled code: python experiments/benchmarks/loops.py [--network=wrn_16_2].

Five PGD steps: in a loop, unrolled, and in a loop with XLA's own gradients of convolutions, which are slow in
a loop on a CPU (jax-ml/jax#12868). Four training steps of RoBal-N: in the loop of one dispatch, and in four
dispatches of one step. All run in turn in one process; ratios are to the unrolled code.
"""

import pathlib
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

from experiments.benchmarks import measure, step
from robal_jax import cli

ATTACK_STEPS, TRAINING_STEPS = 5, 4


def attack(network: str, batch: int, unroll: bool, ours: bool = True) -> Callable[[], Any]:
    """Returns five PGD steps on a network of random weights, with our convolutions or with XLA's own."""
    import jax
    import jax.numpy as jnp

    from robal_jax import attacks, classifiers, losses, models
    from robal_jax.attacks import ThreatModel
    from robal_jax.models import convolutions

    on_cpu = ours and jax.default_backend() == "cpu"
    convolution = convolutions.cpu_convolution if on_cpu else convolutions.convolution
    options = {**step.NETWORKS[network], "convolution": convolution}
    backbone = models.BACKBONES[options.pop("name")](**options)
    model = models.functional(models.Network(backbone, classifiers.LinearHead(10)))
    pixels, channels = step.shape(network)
    images = jax.random.uniform(jax.random.key(0), (batch, pixels, pixels, channels))
    labels, threat, size = jnp.arange(batch) % 10, ThreatModel(0.031), 0.0078
    params, stats = jax.jit(model.init)(jax.random.key(0), images)

    def run(params: Any, stats: Any, x: jax.Array) -> jax.Array:
        logits_fn = partial(model.predict, params, stats)
        if not unroll:
            return attacks.pgd_path(
                logits_fn, x, images, labels, threat=threat, steps=(ATTACK_STEPS,), step_size=size
            )[0]
        for _ in range(ATTACK_STEPS):
            gradient = attacks.loss_gradient(logits_fn, losses.cross_entropy, x, labels)[2]
            x = threat.project(x + size * threat.ascent_direction(gradient), images)
        return x

    compiled = jax.jit(run)
    return lambda: jax.block_until_ready(compiled(params, stats, images))


def training(network: str, batch: int, unroll: bool) -> Callable[[], None]:
    """Returns four training steps."""
    if not unroll:
        return step.ours(network, "robal_n", batch, TRAINING_STEPS, "default")
    one = step.ours(network, "robal_n", batch, 1, "default")

    def run() -> None:
        for _ in range(TRAINING_STEPS):
            one()

    return run


def main(arguments: list[str]) -> None:
    """Times everything and prints medians and ratios."""
    texts = {
        "network": f"one of {','.join(step.NETWORKS)}, wrn_16_2 if not given",
        "batch": "images, 32",
        "repeats": "timed calls of each, 5",
        "json": "file for the record",
    }
    values = cli.parse(arguments, texts, __doc__)
    network, batch = values["network"] or "wrn_16_2", int(values["batch"] or 32)
    comparisons: dict[str, dict[str, Callable[[], Any]]] = {
        f"{ATTACK_STEPS} attack steps": {
            "unrolled": attack(network, batch, True),
            "loop": attack(network, batch, False),
            "loop, XLA's own gradients": attack(network, batch, False, ours=False),
        },
        f"{TRAINING_STEPS} training steps": {
            "unrolled": training(network, batch, True),
            "loop": training(network, batch, False),
        },
    }
    print(f"{measure.heading()}\n{network}, batch {batch}\n")
    rows = []
    for what, ways in comparisons.items():
        times = measure.interleaved(ways, int(values["repeats"] or 5))
        for name, seconds in times.items():
            ratio = seconds.median / times["unrolled"].median
            print(f"{what:18s} {name:26s} {seconds} ms   ratio {ratio:.2f}", flush=True)
            rows.append({"what": what, "way": name, **seconds._asdict(), "of_unrolled": ratio})
    measure.record(values["json"], rows)


if __name__ == "__main__":
    cli.run(main)
