"""Time of a training step with each ingredient: python experiments/benchmarks/ingredients.py [--batch=64].

The step of AT (five attack steps) beside the same step with one ingredient more, and with several. All run in
turn in one process; ratios are to the step without.
"""

import os
import pathlib
import sys
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

from experiments.benchmarks import measure, step
from robal_jax import cli

PLAIN = "without"
EMA = {"average": {"name": "ema"}}
RANDAUGMENT = {"train": {"augmentation": "randaugment,crop_flip"}}
AWP = {"perturbation": {"name": "awp"}}
BUDGETS = {"threat": {"budget": {"name": "by_frequency"}, "ramp": 0.8}}
INGREDIENTS: dict[str, step.Changes] = {
    PLAIN: {},
    "EMA": EMA,
    "SWA": {"average": {"name": "swa"}},
    "RandAugment": RANDAUGMENT,
    "CutMix": {"train": {"mixing": "cutmix"}},
    "budgets by class": BUDGETS,
    "budgets, CFA's": {"threat": {"budget": {"name": "cfa"}}},
    "label smoothing": {"train": {"label_smoothing": 0.1}},
    "AWP": AWP,
    "EMA, RandAugment, budgets, AWP": {**EMA, **RANDAUGMENT, **BUDGETS, **AWP},
}


def main(arguments: list[str]) -> None:
    """Times everything and prints a table."""
    texts = {
        "network": f"one of {','.join(step.NETWORKS)}; resnet20 if not given",
        "batch": "images, 64",
        "repeats": "timed calls of each, 9",
        "only": "some of the ingredients, as printed, split by ';'; all if not given",
        "cores": "of the process; all if not given",
        "json": "file for the record",
    }
    values = cli.parse(arguments, texts, __doc__)
    network = values["network"] or "resnet20"
    batch, repeats, steps = int(values["batch"] or 64), int(values["repeats"] or 9), 2
    chosen = values["only"].split(";") if values["only"] else list(INGREDIENTS)
    if values["cores"]:
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: int(values["cores"])])
    print(measure.heading())
    print(f"{values['cores'] or 'all'} cores, {network}, batch {batch}, medians of {repeats}\n")
    ways = {
        name: step.ours(network, "at", batch, steps, "default", INGREDIENTS[name])
        for name in dict.fromkeys([PLAIN, *chosen])
    }
    times = measure.interleaved(ways, repeats)
    print("| step of AT | ms (least-most) | of the step without |\n|---|---|---|")
    rows: list[dict[str, Any]] = []
    for name, seconds in times.items():
        each = seconds.per(steps)
        ratio = seconds.median / times[PLAIN].median
        print(f"| {name} | {each:.4g} | {ratio:.3f} |", flush=True)
        rows.append({"way": name, "network": network, "batch": batch, **each._asdict(), "ratio": ratio})
    measure.record(values["json"], rows)


if __name__ == "__main__":
    cli.run(main)
