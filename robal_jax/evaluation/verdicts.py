"""Verdicts of the audit: whether a robust accuracy can be trusted.

An attack that fails proves nothing unless one knows why it failed. Gradient attacks fail where gradients
vanish, are random or mislead; the accuracy is then that of the attack, not of the model. RoBal's own warning
(figure 2) is the plainest case: dividing the logits by a number, or normalising the classifier, raises the
accuracy under PGD and leaves the model as fragile as it was.

Nothing is measured here: :func:`give_verdicts` judges the arrays of ``measurements.py``.

Source: Carlini et al., "On evaluating adversarial robustness" (2019); Athalye et al., "Obfuscated gradients"
(ICML 2018); the five checks of the reference implementation of AutoAttack; RoBal (CVPR 2021), figure 2.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from robal_jax import metrics
from robal_jax.evaluation.measurements import (
    FORWARD_NAMES,
    MAIN_STEPS,
    QUERIES,
    RESTART_NAMES,
    SCALE_NAMES,
    STEPS,
    Measured,
)
from robal_jax.reporting.results import EVERYTHING, FIXED_STEPS

# A gap between two attacks counts if it is larger than a point and its paired 95 % interval excludes 0.
GAP = 0.01

ALPHA_RANDOM, ALPHA_PROBABILITY, ALPHA_SQUARE = 1e-4, 1e-5, 0.002  # as in the reference implementation

NEARLY_ZERO = 0.01  # highest accuracy under an attack without a bound that works


class Verdict(NamedTuple):
    """The outcome of a check.

    Attributes:
      name: of the check.
      title: for people.
      doubts: which accuracies not to trust if the check is flagged: ``FIXED_STEPS`` or ``EVERYTHING``.
      flagged: whether it is; None if the check was not run.
      statement: one sentence with the figures.
      evidence: figures, ready for JSON.
    """

    name: str
    title: str
    doubts: str
    flagged: bool | None
    statement: str
    evidence: dict[str, Any]


def give_verdicts(
    measured: Measured, labels: np.ndarray, survived: np.ndarray, by_square: np.ndarray
) -> tuple[list[Verdict], dict[str, Any]]:
    """Judges what was measured.

    Args:
      measured: arrays of :func:`measurements.plan_measurements`, by name.
      labels: of the sample ``[n]``.
      survived: whether images are classified correctly under every white-box attack of the evaluation, bool
        ``[m]``.
      by_square: whether Square breaks them, bool ``[m]``.

    Returns:
      The verdicts, and the curves of the accuracy by logit scale, steps and restarts.
    """
    right = {name: arrays["right"] for name, arrays in measured.items() if "right" in arrays}
    logits = [measured[name]["logits"] for name in FORWARD_NAMES]
    # A random search may repair an image that was misclassified; that is not robustness.
    by_square_alone = right["gradient_free"] & (logits[0].argmax(-1) == labels)
    steps = {count: right["steps"][:, number] for number, count in enumerate(STEPS)}
    scales = {scale: right[name][:, 0] for scale, name in SCALE_NAMES.items()}
    starts = np.stack([steps[MAIN_STEPS], *(right[name][:, 0] for name in RESTART_NAMES.values())])
    restarts = dict(enumerate(np.logical_and.accumulate(starts), 1))
    found = [
        _logit_scale(scales),
        _more_steps(steps),
        _more_restarts(restarts),
        _zero_gradients(measured[FORWARD_NAMES[0]]["gradient"]),
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
    """Returns whether the accuracy under an attack is clearly lower than under another, and by how much."""
    gap = metrics.paired_difference(attack, than)
    return gap["value"] > GAP and gap["low"] > 0, gap


def _logit_scale(scales: Mapping[float, np.ndarray]) -> Verdict:
    own, best = scales[1.0], min(scales, key=lambda scale: scales[scale].mean())
    flagged, gap = _stronger(scales[best], own)
    at = f"lowest, {_percent(scales[best])}, at {best:g} times that scale" if best != 1 else "lowest there"
    statement = f"The accuracy under PGD-20 is {_percent(own)} at the model's own logit scale and {at}: " + (
        "the difference comes from the logit scale alone."
        if flagged
        else "rescaling does not clearly help the attack."
    )
    evidence = {
        "accuracy": {f"{scale:g}": float(right.mean()) for scale, right in scales.items()},
        "gap": gap,
    }
    return Verdict("logit_scale", "Logit scale", FIXED_STEPS, flagged, statement, evidence)


def _more_steps(steps: Mapping[int, np.ndarray]) -> Verdict:
    last = max(steps)
    flagged, gap = _stronger(steps[last], steps[MAIN_STEPS])
    single, single_gap = _stronger(steps[1], steps[MAIN_STEPS])
    statement = (
        f"The accuracy under PGD is {_percent(steps[1])} after one step, {_percent(steps[MAIN_STEPS])} after "
        f"{MAIN_STEPS} steps and {_percent(steps[last])} after {last}: "
    )
    if single:
        statement += "one step is stronger than many, so the gradients mislead the attack."
    elif flagged:
        statement += f"{MAIN_STEPS} steps are not enough."
    else:
        statement += f"{MAIN_STEPS} steps are enough."
    evidence = {
        "accuracy": {str(count): float(right.mean()) for count, right in steps.items()},
        "gap": gap,
        "single_step_gap": single_gap,
    }
    return Verdict("steps", "More steps", FIXED_STEPS, flagged or single, statement, evidence)


def _more_restarts(restarts: Mapping[int, np.ndarray]) -> Verdict:
    last = max(restarts)
    flagged, gap = _stronger(restarts[last], restarts[1])
    statement = (
        f"The accuracy under PGD-20 is {_percent(restarts[1])} with one start and {_percent(restarts[last])} "
        f"with {last} starts: " + ("one start is not enough." if flagged else "one start is enough.")
    )
    accuracy = {str(count): float(right.mean()) for count, right in restarts.items()}
    return Verdict(
        "restarts", "More restarts", FIXED_STEPS, flagged, statement, {"accuracy": accuracy, "gap": gap}
    )


def _zero_gradients(gradient: np.ndarray) -> Verdict:
    count = int(np.sum(gradient == 0))
    statement = (
        f"The gradient of the cross-entropy is exactly zero for {count} of {len(gradient)} clean images."
    )
    return Verdict("zero_gradients", "Zero gradients", FIXED_STEPS, count > 0, statement, {"images": count})


def _without_bound(right: np.ndarray) -> Verdict:
    statement = (
        f"The accuracy under PGD without a bound is {_percent(right)}; an attack that works brings it close "
        "to 0 %."
    )
    evidence = {"accuracy": float(right.mean())}
    return Verdict(
        "unbounded", "No bound", FIXED_STEPS, bool(right.mean() > NEARLY_ZERO), statement, evidence
    )


def _gradient_free(square_right: np.ndarray, pgd_right: np.ndarray) -> Verdict:
    flagged, gap = _stronger(square_right, pgd_right)
    statement = (
        f"The accuracy is {_percent(square_right)} under {QUERIES} queries of Square, which sees only "
        f"logits, and {_percent(pgd_right)} under PGD-20: "
        + ("gradients help less than random search." if flagged else "gradients help, as they should.")
    )
    return Verdict("gradient_free", "Gradient-free attack", FIXED_STEPS, flagged, statement, {"gap": gap})


def _square_after_white_box(survived: np.ndarray, by_square: np.ndarray) -> Verdict:
    broken = int(np.sum(survived & by_square))
    # On a small sample one image is more than the reference's 0.2 %, but proves nothing.
    flagged = broken > max(1, ALPHA_SQUARE * len(survived))
    statement = (
        f"Square breaks {broken} of the {survived.sum()} images (of {len(survived)}) that survive every "
        "gradient attack."
    )
    evidence = {"broken": broken, "survived": int(survived.sum()), "images": len(survived)}
    return Verdict("square", "Square after gradients", EVERYTHING, flagged, statement, evidence)


def _transfer(transfer_right: np.ndarray | None, pgd_right: np.ndarray) -> Verdict:
    if transfer_right is None:
        statement = "No surrogate was given: name another model of the same data with --surrogate."
        return Verdict("transfer", "Transfer from a surrogate", FIXED_STEPS, None, statement, {})
    flagged, gap = _stronger(transfer_right, pgd_right)
    statement = (
        f"The accuracy is {_percent(transfer_right)} on images made on the surrogate and "
        f"{_percent(pgd_right)} under PGD-20 on the model itself: "
        + (
            "the model hides its own gradients."
            if flagged
            else "white-box attacks are stronger, as they should be."
        )
    )
    return Verdict("transfer", "Transfer from a surrogate", FIXED_STEPS, flagged, statement, {"gap": gap})


def _randomised(passes: list[np.ndarray], labels: np.ndarray) -> Verdict:
    unit = np.stack([z / (np.linalg.norm(z, axis=-1, keepdims=True) + 1e-10) for z in passes])
    apart = float(np.linalg.norm(unit[:, None] - unit[None], axis=-1).max())
    hits = [int(np.sum(z.argmax(-1) == labels)) for z in passes]
    flagged = apart > ALPHA_RANDOM or len(set(hits)) > 1
    statement = (
        f"The logits of {len(passes)} passes over the same images differ by {apart:.1e} of their norm"
        + (": the model is random; attack it with the ensemble 'rand'." if flagged else ".")
    )
    return Verdict(
        "randomised", "Random output", EVERYTHING, flagged, statement, {"difference": apart, "right": hits}
    )


def _probabilities(logits: np.ndarray) -> Verdict:
    low, high, total = float(logits.min()), float(logits.max()), np.abs(logits.sum(-1) - 1).max()
    flagged = bool(low > -ALPHA_PROBABILITY and high < 1 + ALPHA_PROBABILITY and total < ALPHA_PROBABILITY)
    statement = f"The outputs are in [{low:.3g}, {high:.3g}]" + (
        " and sum to 1: they are probabilities, and the attacks expect logits."
        if flagged
        else ": they are logits."
    )
    return Verdict(
        "probabilities", "Probabilities", EVERYTHING, flagged, statement, {"low": low, "high": high}
    )


def _inference(measured: Measured) -> Verdict:
    alone, in_company = measured[FORWARD_NAMES[0]]["logits"], measured["backwards"]["logits"]
    calls = int(measured["inference"]["calls"][0])
    apart = float(np.abs(alone - in_company).max() / np.abs(alone).max())
    flagged = calls > 0 or apart > ALPHA_RANDOM
    statement = (
        f"The model takes {calls} derivatives to compute its logits, and in other batches they change by "
        f"{apart:.1e} of the largest logit: "
    ) + (
        "the model adapts at test time, and this evaluation does not account for that."
        if flagged
        else "it does not adapt at test time."
    )
    return Verdict(
        "inference",
        "Optimisation at inference",
        EVERYTHING,
        flagged,
        statement,
        {"calls": calls, "difference": apart},
    )


def stored_images(
    reported: np.ndarray, computed: np.ndarray, distance: np.ndarray, epsilon: float
) -> Verdict:
    """Compares the ensemble's outcome with that of its stored images when they are read again.

    Args:
      reported: whether images count as broken, bool ``[n]``.
      computed: whether the model misclassifies the stored images, bool ``[n]``.
      distance: of the stored images, ``[n]``.
      epsilon: radius of the threat model.
    """
    differ = int(np.sum(reported != computed))
    statement = (
        f"With the stored adversarial images, read again, the accuracy is {_percent(~computed)}; reported is "
        f"{_percent(~reported)}. Images that differ: {differ}. Largest perturbation: {distance.max():.7f} of "
        f"{epsilon:.7f}."
    )
    evidence = {"accuracy": float(np.mean(~computed)), "differ": differ, "distance": float(distance.max())}
    return Verdict("stored_images", "Accuracy computed again", EVERYTHING, differ > 0, statement, evidence)
