"""The ensemble 'fast' beside AutoAttack, image by image: python experiments/benchmarks/fast.py [--seeds=3].

Both attack the digits models of the zoo on the whole test set at the radius of their cards. 'standard' runs
once, 'fast' once per seed. Passes are counted from the rounds, the images that reach each, and the cost of a
round, so they are those of the algorithm, not of a batch that was filled up. A gradient is one forward and
one backward pass. Seconds include compilation, and for 'fast' only in the first seed.
"""

import pathlib
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

import jax
import numpy as np

import robal_jax
from experiments.benchmarks import measure
from robal_jax import cli
from robal_jax.attacks import ThreatModel, autoattack
from robal_jax.data.sources import SOURCES
from robal_jax.keys import fold_in

MODELS = ("digits_lt/at_small_cnn", "digits_lt/robal_n_small_cnn")
QUERIES, TARGETS, BATCH = 5000, 9, 250


class Passes(NamedTuple):
    """Forward and backward passes through the network, of one image in one round or in a mean."""

    forward: float
    backward: float


def of_round(name: str, steps: int) -> Passes:
    """Passes of one round of an attack on one image, with the forward pass that judges its result."""
    forward, backward = {
        "apgd_ce": (steps + 1, steps + 1),
        "apgd_t": (steps + 2, steps + 1),
        "apgd_malt": (steps + 2, steps + 1 + TARGETS),
        "fab_t": (2 * steps + 1, steps),
        "pma": (steps, steps),
        "square": (QUERIES + 1, 0),
    }[name]
    return Passes(forward + 1, backward)


def total(stages: tuple[autoattack.Stage, ...], broken_in: np.ndarray, steps: int) -> Passes:
    """Mean passes per image of a whole ensemble.

    Args:
      stages: of the ensemble.
      broken_in: round in which each image was broken, as in ``autoattack.Progress``, ``[n]``.
      steps: of each run.
    """
    forward, backward = float(len(broken_in)), 0.0  # the clean images
    for stage in stages:
        cost = of_round(stage.name, steps)
        for number in range(stage.first, stage.last + 1):
            reached = int(np.sum((broken_in == autoattack.ROBUST) | (broken_in >= number)))
            forward, backward = forward + reached * cost.forward, backward + reached * cost.backward
    return Passes(forward / len(broken_in), backward / len(broken_in))


def attacks(model: Any, x: np.ndarray, y: np.ndarray, stages: tuple[autoattack.Stage, ...]) -> Callable:
    """Returns a function of a seed that runs an ensemble, with one compilation per stage."""

    @partial(jax.jit, static_argnums=0)
    def attacked(stage: autoattack.Stage, keys: Any, x: Any, y: Any, number: Any) -> Any:
        adversarial = stage.attack(model.logits_fn, fold_in(keys, stage.first + number), x, y, number)
        return adversarial, model.logits_fn(adversarial).argmax(-1)

    def ensemble(seed: int) -> np.ndarray:
        keys = jax.random.split(jax.random.key(seed), len(x))
        progress = autoattack.begin(y, np.asarray(model.logits(x)).argmax(-1))
        for stage in stages:

            def batch(
                ids: np.ndarray, number: int, stage: autoattack.Stage = stage
            ) -> tuple[np.ndarray, np.ndarray]:
                full = np.take(ids, range(BATCH), mode="clip")
                found = attacked(stage, keys[full], x[full], y[full], np.int32(number))
                images, predictions = (np.asarray(array)[: len(ids)] for array in found)
                return images, predictions

            for _ in autoattack.run(stage, batch, y, progress, size=BATCH):
                pass
        return progress.broken_in

    return ensemble


def main(arguments: list[str]) -> None:
    """Prints one line per model, ensemble and seed."""
    seeds = int(cli.parse(arguments, {"seeds": "keys of 'fast', 3"}, __doc__)["seeds"] or 3)
    print(measure.device())
    for name in MODELS:
        model = robal_jax.load_model(name)
        config = model.card["config"]
        fields = {key: value for key, value in config["data"].items() if key != "name"}
        data = SOURCES[config["data"]["name"]](**fields)
        x = np.asarray(data.test_images, np.float32) / np.float32(data.pixel_max)
        y, threat = np.asarray(data.test_labels), ThreatModel(config["threat"]["epsilon"])
        standard: tuple[np.ndarray, Passes] | None = None
        for version, keys in (("standard", range(1)), ("fast", range(seeds))):
            steps = autoattack.STEPS.get(version, 100)
            stages = autoattack.stages(version, len(model.test.class_counts), threat=threat)
            ensemble = attacks(model, x, y, stages)
            for seed in keys:
                begin = time.perf_counter()
                broken_in = ensemble(seed)
                seconds, passes = time.perf_counter() - begin, total(stages, broken_in, steps)
                standard = standard or (broken_in, passes)
                robust, theirs = broken_in == autoattack.ROBUST, standard[0] == autoattack.ROBUST
                print(
                    f"{name} {version} seed {seed}: robust {robust.sum()} of {len(y)}, "
                    f"{100 * robust.mean():.2f} %, "
                    f"broken here only {np.sum(~robust & theirs)}, "
                    f"by standard only {np.sum(robust & ~theirs)}; "
                    f"forward {passes.forward:.0f}, backward {passes.backward:.0f} per image "
                    f"({100 * sum(passes) / sum(standard[1]):.1f} % of all passes, "
                    f"{100 * passes.backward / standard[1].backward:.1f} % of gradients); {seconds:.0f} s",
                    flush=True,
                )


if __name__ == "__main__":
    cli.run(main)
