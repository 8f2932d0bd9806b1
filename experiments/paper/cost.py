"""The cost of a training: passes per image from its config, and seconds from its records."""

import json
import pathlib
from collections.abc import Iterable
from typing import Any

from robal_jax.storage.names import CONFIG, METRICS

# Forward and backward passes of the training step besides the attack, by objective.
_STEP = {
    "plain": (1, 1), "pgd_at": (1, 1), "avmixup": (1, 1), "regularised": (2, 2), "mart": (2, 2),
    "trades": (3, 2), "mma": (3, 2), "distilled": (2, 1),
}  # fmt: skip


def passes(config: Any) -> float:
    """Returns the forward and backward passes of the network that a training makes per image shown.

    Each step of the attack is one of both, and so is each training pass; a pass for a log or for statistics
    is one forward. TRADES also looks at the clean image first, and MMA's search counts its halvings.

    Args:
      config: of the run.
    """
    attack, objective, train = config.attack, config.objective, config.train
    forward, backward = _STEP[objective.name]
    steps = 0 if objective.name == "plain" else attack.steps
    attacked = 1 - (min(attack.first_epoch - 1, train.epochs) / train.epochs)
    if objective.name == "mma":
        forward += objective.get("search_steps", 10)
    if objective.name == "distilled" and objective.get("igdm", 0):
        forward, backward = forward + 3, backward + 1
    order = objective.get("batch_norm_order", "released")
    forward += objective.name == "pgd_at" and "nat" in order.split(",")
    forward += config.average.name == "swa"  # a pass for the statistics of the average
    first_look = objective.name == "trades" and objective.get("attack_divergence", True)
    forward -= objective.name == "trades" and not first_look
    if config.perturbation.name == "awp":
        # At the perturbed weights the images are known, so that TRADES' first look is left out.
        forward, backward = 2 * forward - first_look, 2 * backward
    forward += attack.batch_norm == "natural_first"
    forward += len(list(filter(None, train.logged_passes.split(","))))
    if attack.batch_norm.startswith("batch_update"):
        forward += steps + attack.batch_norm.endswith("end")
    if attack.alignment:
        # Two gradients with respect to images, and the gradient of both: as much again, twice.
        forward, backward = forward + 2, backward + 6
    if attack.free_steps:
        return 2.0
    return 2 * steps * attacked + forward + backward


def seconds(workdirs: Iterable[pathlib.Path]) -> float | None:
    """Returns the mean duration of the steps of runs by their own records; None if there is none.

    Compiling is included; evaluations on held-out images and the saving of checkpoints are not.
    """
    durations = []
    for workdir in workdirs:
        try:
            lines = (workdir / METRICS).read_text().splitlines()
            batch = json.loads((workdir / CONFIG).read_text())["train"]["batch_size"]
            rows = [row for row in map(json.loads, lines) if "images_per_second" in row]
        except (OSError, ValueError, KeyError):
            continue
        shown, total = 0, 0.0
        for row in rows:
            total += (row["step"] - shown) * batch / row["images_per_second"]
            shown = row["step"]
        durations.append(total)
    return sum(durations) / len(durations) if durations else None
