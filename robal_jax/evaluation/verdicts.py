"""An evaluation that distrusts itself: measurements that show when a robust accuracy should not be believed.

An attack that fails proves nothing unless one knows why it failed. Gradient attacks fail where gradients
vanish, are random, or lead nowhere, and then the accuracy is that of the attack, not of the model. RoBal's
own warning (figure 2) is the plainest case: dividing the logits by a number, or normalising the classifier,
raises the accuracy under PGD and leaves the model as fragile as it was.

Measuring and judging are apart: :func:`measurements` names what is to be measured on a sample, each a call
that gives arrays, so that it can be saved and gone on with; :func:`verdicts` judges the arrays alone.

Sources: Carlini et al., "On evaluating adversarial robustness" (2019); Athalye et al., "Obfuscated gradients"
(ICML 2018); the five checks of the reference implementation of AutoAttack; RoBal (CVPR 2021), figure 2.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from robal_jax import metrics
from robal_jax.evaluation.measurements import FORWARDS, MAIN_STEPS, QUERIES, RESTARTS, SCALES, STEPS, Measured

# A gap between two attacks counts if it is larger than a point and its paired 95 % interval leaves out 0.
GAP = 0.01

ALPHA_RANDOM, ALPHA_PROBABILITY, ALPHA_SQUARE = 1e-4, 1e-5, 0.002  # as in the reference implementation

NEARLY_ZERO = 0.01  # accuracy that an attack without a bound may leave


class Verdict(NamedTuple):
    """What a check found.

    Attributes:
      name: of the check.
      title: for people.
      flagged: whether the accuracy should not be believed; None if the check could not be made.
      statement: one sentence with the figures.
      evidence: figures, ready for JSON.
    """

    name: str
    title: str
    flagged: bool | None
    statement: str
    evidence: dict[str, Any]


def give_verdicts(
    measured: Measured, labels: np.ndarray, survived: np.ndarray, by_square: np.ndarray
) -> tuple[list[Verdict], dict[str, Any]]:
    """Judges what was measured.

    Args:
      measured: arrays of :func:`measurements`, by name.
      labels: of the sample ``[n]``.
      survived: whether images are right under every white-box attack of the evaluation, bool ``[m]``.
      by_square: whether Square breaks them, bool ``[m]``.

    Returns:
      The verdicts, and the curves over the logit scale, the steps and the restarts.
    """
    right = {name: arrays["right"] for name, arrays in measured.items() if "right" in arrays}
    logits = [measured[f"forward_{number}"]["logits"] for number in range(FORWARDS)]
    # A random search may repair an image that was misclassified; that is no robustness.
    by_square_alone = right["gradient_free"] & (logits[0].argmax(-1) == labels)
    steps = {count: right["steps"][:, number] for number, count in enumerate(STEPS)}
    scales = {scale: right[f"scale_{scale:g}"][:, 0] for scale in SCALES}
    starts = np.stack([steps[MAIN_STEPS], *(right[f"restart_{r}"][:, 0] for r in range(1, RESTARTS))])
    restarts = dict(enumerate(np.logical_and.accumulate(starts), 1))
    found = [
        _logit_scale(scales),
        _more_steps(steps),
        _more_restarts(restarts),
        _zero_gradients(measured["forward_0"]["gradient"]),
        _without_bound(right["unbounded"]),
        _gradient_free(by_square_alone, steps[MAIN_STEPS]),
        _square_after_white_box(survived, by_square),
        _transfer(right.get("transfer"), steps[MAIN_STEPS]),
        _randomised(logits, labels),
        _probabilities(logits[0]),
        _inference(measured),
    ]
    curves = {
        name: {
            "x": list(curve),
            "series": {"PGD-20" if name != "steps" else "PGD": list(map(metrics.share, curve.values()))},
        }
        for name, curve in (("scale", scales), ("steps", steps), ("restarts", restarts))
    }
    return found, curves


def _percent(right: np.ndarray) -> str:
    return f"{100 * np.mean(right):.1f} %"


def _stronger(attack: np.ndarray, than: np.ndarray) -> tuple[bool, dict[str, float]]:
    """Whether an attack leaves clearly less accuracy than another one, and by how much."""
    gap = metrics.paired_difference(attack, than)
    return gap["value"] > GAP and gap["low"] > 0, gap


def _logit_scale(scales: Mapping[float, np.ndarray]) -> Verdict:
    own, best = scales[1.0], min(scales, key=lambda scale: scales[scale].mean())
    flagged, gap = _stronger(scales[best], own)
    statement = (
        f"PGD-20 leaves {_percent(own)} at the model's own logit scale and least, "
        f"{_percent(scales[best])}, at scale {best:g}: "
    )
    statement += "that much is owed to the scale alone." if flagged else "rescaling brings it nothing."
    evidence = {
        "accuracy": {f"{scale:g}": float(right.mean()) for scale, right in scales.items()},
        "gap": gap,
    }
    return Verdict("logit_scale", "Logit scale", flagged, statement, evidence)


def _more_steps(steps: Mapping[int, np.ndarray]) -> Verdict:
    last = max(steps)
    flagged, gap = _stronger(steps[last], steps[MAIN_STEPS])
    single, single_gap = _stronger(steps[1], steps[MAIN_STEPS])
    statement = (
        f"PGD leaves {_percent(steps[1])} after one step, {_percent(steps[MAIN_STEPS])} after {MAIN_STEPS}, "
        f"{_percent(steps[last])} after {last}: "
    )
    if single:
        statement += "one step does better than many, so gradients mislead."
    elif flagged:
        statement += f"{MAIN_STEPS} steps are not enough."
    else:
        statement += f"{MAIN_STEPS} steps are enough."
    evidence = {
        "accuracy": {str(count): float(right.mean()) for count, right in steps.items()},
        "gap": gap,
        "single_step_gap": single_gap,
    }
    return Verdict("steps", "More steps", flagged or single, statement, evidence)


def _more_restarts(restarts: Mapping[int, np.ndarray]) -> Verdict:
    last = max(restarts)
    flagged, gap = _stronger(restarts[last], restarts[1])
    statement = (
        f"PGD-20 leaves {_percent(restarts[1])} from one start and {_percent(restarts[last])} from the best "
        f"of {last}: " + ("one start is not enough." if flagged else "one start is enough.")
    )
    accuracy = {str(count): float(right.mean()) for count, right in restarts.items()}
    return Verdict("restarts", "More restarts", flagged, statement, {"accuracy": accuracy, "gap": gap})


def _zero_gradients(gradient: np.ndarray) -> Verdict:
    count = int(np.sum(gradient == 0))
    statement = (
        f"The gradient of the cross entropy is exactly zero for {count} of {len(gradient)} clean images."
    )
    return Verdict("zero_gradients", "Zero gradients", count > 0, statement, {"images": count})


def _without_bound(right: np.ndarray) -> Verdict:
    statement = (
        f"PGD that may show any image leaves {_percent(right)}; an attack that works leaves about 0 %."
    )
    evidence = {"accuracy": float(right.mean())}
    return Verdict("unbounded", "No bound", bool(right.mean() > NEARLY_ZERO), statement, evidence)


def _gradient_free(square_right: np.ndarray, pgd_right: np.ndarray) -> Verdict:
    flagged, gap = _stronger(square_right, pgd_right)
    statement = (
        f"Square, which sees only logits, leaves {_percent(square_right)} after {QUERIES} queries, "
        f"PGD-20 {_percent(pgd_right)}"
        + (": gradients help less than chance." if flagged else ": gradients help, as they should.")
    )
    return Verdict("gradient_free", "Gradient-free attack", flagged, statement, {"gap": gap})


def _square_after_white_box(survived: np.ndarray, by_square: np.ndarray) -> Verdict:
    broken = int(np.sum(survived & by_square))
    # One image is more than the reference's 0.2 % on a small sample, and no pattern.
    flagged = broken > max(1, ALPHA_SQUARE * len(survived))
    statement = (
        f"Square breaks {broken} of the {survived.sum()} images (of {len(survived)}) that survive every "
        "attack by gradient."
    )
    evidence = {"broken": broken, "survived": int(survived.sum()), "images": len(survived)}
    return Verdict("square", "Square after gradients", flagged, statement, evidence)


def _transfer(transfer_right: np.ndarray | None, pgd_right: np.ndarray) -> Verdict:
    if transfer_right is None:
        statement = "Not run: name another run on the same data as the surrogate with --surrogate."
        return Verdict("transfer", "Transfer from a surrogate", None, statement, {})
    flagged, gap = _stronger(transfer_right, pgd_right)
    statement = (
        f"Images made on the surrogate leave {_percent(transfer_right)}, PGD-20 on the model itself "
        f"{_percent(pgd_right)}"
        + (
            ": the model hides its own gradients."
            if flagged
            else ": white-box attacks see more, as they should."
        )
    )
    return Verdict("transfer", "Transfer from a surrogate", flagged, statement, {"gap": gap})


def _randomised(passes: list[np.ndarray], labels: np.ndarray) -> Verdict:
    unit = np.stack([z / (np.linalg.norm(z, axis=-1, keepdims=True) + 1e-10) for z in passes])
    apart = float(np.linalg.norm(unit[:, None] - unit[None], axis=-1).max())
    hits = [int(np.sum(z.argmax(-1) == labels)) for z in passes]
    flagged = apart > ALPHA_RANDOM or len(set(hits)) > 1
    statement = f"{len(passes)} passes over the same images differ by {apart:.1e} of the logits' norm" + (
        ": the model is random; attack it with the version 'rand'." if flagged else "."
    )
    return Verdict("randomised", "Random output", flagged, statement, {"difference": apart, "right": hits})


def _probabilities(logits: np.ndarray) -> Verdict:
    low, high, total = float(logits.min()), float(logits.max()), np.abs(logits.sum(-1) - 1).max()
    flagged = bool(low > -ALPHA_PROBABILITY and high < 1 + ALPHA_PROBABILITY and total < ALPHA_PROBABILITY)
    statement = f"Outputs lie in [{low:.3g}, {high:.3g}]" + (
        " and sum to 1: they are probabilities, and attacks expect logits." if flagged else ": logits."
    )
    return Verdict("probabilities", "Probabilities", flagged, statement, {"low": low, "high": high})


def _inference(measured: Measured) -> Verdict:
    alone, in_company = measured["forward_0"]["logits"], measured["backwards"]["logits"]
    calls = int(measured["inference"]["calls"][0])
    apart = float(np.abs(alone - in_company).max() / np.abs(alone).max())
    flagged = calls > 0 or apart > ALPHA_RANDOM
    statement = (
        f"The model takes {calls} derivatives to compute its logits, and in other batches they differ by "
        f"{apart:.1e}"
    ) + (
        ": it adapts at test time, which this evaluation does not follow."
        if flagged
        else ": nothing is optimised."
    )
    return Verdict(
        "inference", "Optimisation at inference", flagged, statement, {"calls": calls, "difference": apart}
    )


def stored_images(
    reported: np.ndarray, computed: np.ndarray, distance: np.ndarray, epsilon: float
) -> Verdict:
    """Compares what the ensemble reported with what its stored images do when they are read again.

    Args:
      reported: images that count as broken, bool ``[n]``.
      computed: images that are misclassified when the stored ones are shown, bool ``[n]``.
      distance: of the images shown, ``[n]``.
      epsilon: radius of the threat model.
    """
    differ = int(np.sum(reported != computed))
    statement = (
        f"The stored adversarial images, read again, leave {_percent(~computed)}; reported were "
        f"{_percent(~reported)}; {differ} images differ; the largest perturbation is {distance.max():.7f} of "
        f"{epsilon:.7f}."
    )
    evidence = {"accuracy": float(np.mean(~computed)), "differ": differ, "distance": float(distance.max())}
    return Verdict("stored_images", "Accuracy computed again", differ > 0, statement, evidence)
