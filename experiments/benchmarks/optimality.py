"""The optimality of each attack of AutoAttack: python experiments/benchmarks/optimality.py [--examples=100].

The digits models of the zoo as they are, and AT behind masks that take its gradient away (``masked.py``), on
test images that are spread evenly over the test set. Prints a table in Markdown.
"""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

import numpy as np

from experiments.benchmarks import masked, measure
from robal_jax import cli, evaluate_model, load_model
from robal_jax.attacks import ThreatModel
from robal_jax.data.sources import SOURCES
from robal_jax.reporting.names import display_name

MODELS = ("digits_lt/at_small_cnn", "digits_lt/robal_n_small_cnn")
MASKS = ("logits x 100", "NaN-gradient branch", "quantised input", "rounding without gradient")


def main(arguments: list[str]) -> None:
    """Prints one row per model and mask."""
    values = cli.parse(arguments, {"examples": "test images, 100 by default"}, __doc__)
    count = int(values["examples"] or 100)
    print(measure.device())
    header = None
    for name, mask in [(name, "") for name in MODELS] + [(MODELS[0], mask) for mask in MASKS]:
        model = load_model(name)
        config = model.card["config"]
        fields = {key: value for key, value in config["data"].items() if key != "name"}
        data = SOURCES[config["data"]["name"]](**fields)
        ids = np.linspace(0, len(data.test_labels) - 1, count).round().astype(int)
        x = np.asarray(data.test_images[ids], np.float32) / np.float32(data.pixel_max)
        function = masked.MASKS[mask][0](model.logits_fn) if mask else model.logits_fn
        found = evaluate_model(
            function,
            x,
            np.asarray(data.test_labels)[ids],
            threat=ThreatModel(config["threat"]["epsilon"]),
            audit=count,
            minimum_norm="fmn",
            optimality=True,
            say=lambda _: None,
        )
        assert found is not None
        attacks = found.optimality["attacks"]
        if header is None:
            header = [display_name(each) for each in attacks]
            print(f"| model | mask | {' | '.join(header)} | left by all |")
            print(f"| --- | --- |{' ---: |' * (len(header) + 1)}")
        shown = (
            "—" if each["optimality"] is None else f"{each['optimality']:.3f}" for each in attacks.values()
        )
        left = 100 * found.optimality["best"][-1]["value"]
        print(f"| {name} | {mask or 'none'} | {' | '.join(shown)} | {left:.0f} % |", flush=True)


if __name__ == "__main__":
    cli.run(main)
