"""Certified images by radius and method: python experiments/benchmarks/certified.py [--examples=300].

The digits models of the zoo, on test images that are spread evenly over the test set. The attack is PGD with
40 steps on the margin. Seconds are those of the CPU, without compilation.
"""

import pathlib
import sys
import time
from collections.abc import Sequence
from functools import partial

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

import jax
import numpy as np

import robal_jax
from experiments.benchmarks import measure
from robal_jax import attacks, certificates, cli
from robal_jax.attacks import LogitsFn, ThreatModel

RADII = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05)


def certified_levels(
    logits_fn: LogitsFn, x: np.ndarray, y: np.ndarray, radii: Sequence[float], method: str
) -> tuple[float, np.ndarray]:
    """Returns the CPU seconds per image of a call, and how many of the radii each is certified for."""
    traced = jax.jit(
        lambda radius: robal_jax.certified(logits_fn, x, y, threat=ThreatModel(radius), method=method)
    )
    bound = traced.lower(np.full(len(x), 0.1, np.float32)).compile()
    low, high, calls, begin = np.zeros(len(x), int), np.full(len(x), len(radii)), 0, time.process_time()

    def certifies(ids: np.ndarray, numbers: np.ndarray) -> np.ndarray:
        full = np.zeros(len(x), np.float32)
        full[ids] = np.take(radii, numbers)
        return np.asarray(bound(full))[ids]

    for _ in certificates.bisect(low, high, certifies, size=len(x)):
        calls += 1
    return (time.process_time() - begin) / calls / len(x), low


def main(arguments: list[str]) -> None:
    """Prints the seconds of each method, and one line per model and radius."""
    examples = int(cli.parse(arguments, {"examples": "test images, 300"}, __doc__)["examples"] or 300)
    print(measure.device())
    for name in measure.DIGITS_MODELS:
        model = robal_jax.load_model(name)
        x, y = measure.digits_of(model, examples)
        radii = (*RADII, model.card["config"]["threat"]["epsilon"])

        attack = partial(
            attacks.pgd, model.logits_fn, jax.random.key(0), x, y, loss=attacks.negative_margin, steps=40
        )
        reached, line = {}, f"{name}: CPU seconds per image"
        for method in certificates.METHODS:
            seconds, reached[method] = certified_levels(model.logits_fn, x, y, radii, method)
            line += f" {method} {seconds:.4f}"
        print(line, flush=True)
        for number, radius in enumerate(radii):
            adversarial = jax.jit(attack, static_argnames=("threat", "step_size"))(
                threat=ThreatModel(radius), step_size=radius / 4
            )
            robust = model.logits(np.asarray(adversarial)).argmax(-1) == y
            line = f"{name} radius {radius:g}:"
            for method, levels in reached.items():
                found = levels > number
                line += f" {method} {100 * found.mean():.1f} %, of them broken {np.sum(found & ~robust)};"
            print(f"{line} right under PGD {100 * robust.mean():.1f} %", flush=True)


if __name__ == "__main__":
    cli.run(main)
