"""The optimality of each attack of AutoAttack: python experiments/benchmarks/optimality.py [--examples=100].

The digits models of the zoo as they are, and AT behind masks that take its gradient away (``masked.py``), on
test images that are spread evenly over the test set. Prints a table in Markdown.
"""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

from experiments.benchmarks import masked, measure
from robal_jax import cli, evaluate_model, load_model
from robal_jax.attacks import ThreatModel
from robal_jax.reporting.names import display_name

MASKS = ("logits x 100", "NaN-gradient branch", "quantised input", "rounding without gradient")


def main(arguments: list[str]) -> None:
    """Prints one row per model and mask."""
    values = cli.parse(arguments, {"examples": "test images, 100 by default"}, __doc__)
    count = int(values["examples"] or 100)
    print(measure.device())
    header, models = None, measure.DIGITS_MODELS
    for name, mask in [(name, "") for name in models] + [(models[0], mask) for mask in MASKS]:
        model = load_model(name)
        x, y = measure.digits_of(model, count)
        function = masked.MASKS[mask][0](model.logits_fn) if mask else model.logits_fn
        found = evaluate_model(
            function,
            x,
            y,
            threat=ThreatModel(model.card["config"]["threat"]["epsilon"]),
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
