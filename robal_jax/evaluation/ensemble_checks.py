"""Checks of the audit on what the attacks on all images found; ``verdicts.py`` has those on its sample."""

from collections.abc import Sequence

import numpy as np

from robal_jax.evaluation.evidence import share_p_value, smallest_share
from robal_jax.evaluation.explanations import ALPHA_SQUARE, GAP, MARGIN
from robal_jax.evaluation.measurements import SCALE_NAMES, Measured
from robal_jax.evaluation.outcomes import Verdict, decide, make_verdict, percent
from robal_jax.reporting.results import EVERYTHING, FLAGGED, NOT_RUN, NOTE, PASSED

# Measurements of the attacks that a check compares, all within the radius.
_COMPARED = {
    "logit_scale": (*SCALE_NAMES.values(), "margin"),
    "steps": ("steps",),
    "gradient_free": ("gradient_free",),
    "transfer": ("transfer",),
}


def doubt_ensemble(
    verdicts: Sequence[Verdict], measured: Measured, clean: np.ndarray, left: np.ndarray, level: float
) -> list[Verdict]:
    """Lets a flagged check doubt everything if its attacks clearly break what the ensemble left.

    Without this a check that casts doubt on the fixed steps would send its reader to the ensemble, although
    the same images show that the ensemble fails, too.

    Args:
      verdicts: of the audit.
      measured: arrays of :func:`measurements.plan_measurements`, by name.
      clean: whether the images of the sample are right when clean, bool ``[n]``.
      left: whether they are right after the ensemble, bool ``[n]``.
      level: of the test that more than ``MARGIN`` of the images that are right when clean are broken.
    """

    def doubted(verdict: Verdict) -> Verdict:
        if verdict.outcome != FLAGGED or verdict.name not in _COMPARED:
            return verdict
        right = [measured[name]["right"] for name in _COMPARED[verdict.name]]
        all_right = np.logical_and.reduce([each.reshape(len(clean), -1).all(1) for each in right])
        broken = int(np.sum(clean & left & ~all_right))
        if share_p_value(broken, int(clean.sum()), MARGIN) >= level:
            return verdict
        more = f" These attacks break {broken} images of the sample that the ensemble left."
        return verdict._replace(doubts=EVERYTHING, statement=verdict.statement + more)

    return [*map(doubted, verdicts)]


def square_after_gradients(survived: np.ndarray, by_square: np.ndarray | None, level: float) -> Verdict:
    """Judges what Square breaks after the attacks that follow a gradient.

    Args:
      survived: of the images that are right when clean, those that survive these attacks, bool ``[m]``.
      by_square: whether Square breaks them, bool ``[m]``; None if it did not run after such attacks.
      level: of the test.
    """
    if by_square is None:
        figures = "Square did not run after strong gradient attacks of the library alone"
        advice = "evaluate with AutoAttack, and list attacks of your own last."
        return make_verdict("square", NOT_RUN, figures, {NOT_RUN: advice}, {})
    broken, images = int(np.sum(survived & by_square)), len(survived)
    shown = smallest_share(images, ALPHA_SQUARE, level=level)
    outcome = decide(red=share_p_value(broken, images, ALPHA_SQUARE) < level, shown=shown)
    figures = (
        f"Square breaks {broken} of the {survived.sum()} images (of {images} that are right when clean) that "
        "survive the gradient attacks before it"
    )
    conclusions = {
        PASSED: "no more than chance allows." if broken else "gradient attacks left it nothing.",
        FLAGGED: "the gradient attacks miss something.",
    }
    evidence = {"broken": broken, "survived": int(survived.sum()), "images": images}
    return make_verdict("square", outcome, figures, conclusions, evidence, shown)


def bpda_after_own_gradient(by_bpda: np.ndarray, level: float) -> Verdict:
    """Judges what BPDA breaks after the attacks with the model's own gradient.

    Args:
      by_bpda: whether it breaks an image that is right when clean and survives these attacks, bool ``[m]``.
      level: of the test.
    """
    broken, images = int(np.sum(by_bpda)), len(by_bpda)
    shown = smallest_share(images, MARGIN, level=level)
    red = share_p_value(broken, images, MARGIN) < level
    outcome = decide(red=red, note=broken > GAP * images, shown=shown)
    figures = (
        f"Of {images} images that are right when clean, BPDA breaks {broken} that survive every attack with "
        "the model's own gradient"
    )
    conclusions = {
        PASSED: "no more than another start may break.",
        NOTE: "attacks with the model's own gradient are optimistic.",
        FLAGGED: "the model's own gradient misleads attacks.",
    }
    return make_verdict("bpda", outcome, figures, conclusions, {"broken": broken, "images": images}, shown)


def stored_images(
    reported: np.ndarray, computed: np.ndarray, ties: np.ndarray, distance: np.ndarray, epsilon: float
) -> Verdict:
    """Compares the ensemble's outcome with that of its stored images when they are read again.

    Args:
      reported: whether images count as broken, bool ``[n]``.
      computed: whether the model misclassifies the stored images, bool ``[n]``.
      ties: whether two logits are so close that rounding decides, bool ``[n]``. Another program of the same
        network, as compilers make it for a GPU, may round otherwise.
      distance: of the stored images, ``[n]``.
      epsilon: the threat model's own radius, in the unit of the distances.
    """
    differ, by_rounding = (int(np.sum((reported != computed) & part)) for part in (~ties, ties))
    figures = (
        "With the stored adversarial images, read again, the accuracy is "
        f"{percent(~computed)}; reported is {percent(~reported)}. Largest "
        f"perturbation: {distance.max():.7f} of {epsilon:.7f}. Images that differ"
    )
    more = f", and {by_rounding} whose two largest logits are equal up to rounding." if by_rounding else "."
    conclusions = dict.fromkeys((PASSED, NOTE, FLAGGED), f"{differ}{more}")
    evidence = {
        "accuracy": float(np.mean(~computed)),
        "differ": differ,
        "by_rounding": by_rounding,
        "distance": float(distance.max()),
    }
    outcome = decide(red=differ > 0, note=by_rounding > 0)
    return make_verdict("stored_images", outcome, figures, conclusions, evidence)
