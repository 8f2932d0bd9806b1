"""What an audit ends with: the outcome of each check with its statement, and curves of the accuracy."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from robal_jax import metrics
from robal_jax.evaluation.evidence import SHOWN, Gap
from robal_jax.evaluation.explanations import EXPLANATIONS, ON_OCCASION
from robal_jax.reporting.results import FLAGGED, NOTE, PASSED, TOO_FEW

LARGEST = float(np.finfo(np.float32).max)
"""In evidence in place of what is no finite number, which JSON cannot hold."""


class Verdict(NamedTuple):
    """The outcome of a check.

    Attributes:
      name: of the check, a key of ``EXPLANATIONS`` or ``ON_OCCASION``.
      title: for people.
      doubts: what not to trust if the check is flagged: ``FIXED_STEPS``, ``EVERYTHING``, ...
      outcome: one of ``OUTCOMES``.
      statement: the figures and what follows from them.
      evidence: figures, ready for JSON.
      meaning: 'raised', 'means' and 'do': sentences on the check.
    """

    name: str
    title: str
    doubts: str
    outcome: str
    statement: str
    evidence: dict[str, Any]
    meaning: dict[str, str]


class Curve(NamedTuple):
    """Which images of a sample are right when clean and under an attack that is varied.

    Attributes:
      attack: its name.
      right: by what is varied (the logit scale, steps, restarts or the radius), each bool ``[n]``.
    """

    attack: str
    right: Mapping[Any, np.ndarray]

    @property
    def table(self) -> np.ndarray:
        """The same as one array, bool ``[n, L]``: a row per image, a column per point."""
        return np.stack([*self.right.values()], -1)

    @property
    def figures(self) -> dict[str, Any]:
        """The shares of right images, as :class:`Results` holds a curve."""
        return {"x": list(self.right), "series": {self.attack: [*map(metrics.share, self.right.values())]}}


def make_verdict(
    name: str,
    outcome: str,
    figures: str,
    conclusions: Mapping[str, str],
    evidence: dict[str, Any],
    shown: float = 0,
    doubts: str | None = None,
) -> Verdict:
    """Makes a verdict, whose statement is the figures and the conclusion of its outcome.

    Args:
      name: of the check.
      outcome: of the check.
      figures: beginning of the sentence.
      conclusions: end of the sentence, by outcome; that of too few images is the same for all checks.
      evidence: figures, ready for JSON.
      shown: the smallest gap that the sample can show.
      doubts: what not to trust if it is flagged; what the check usually says if None.
    """
    title, usual, *meaning = (EXPLANATIONS | ON_OCCASION)[name]
    few = (
        "too few images are right when clean to tell; the smallest gap they can show is "
        f"{points(shown)}, so take a larger sample for the audit."
    )
    conclusion = {TOO_FEW: few, **conclusions}[outcome]
    meanings = dict(zip(("raised", "means", "do"), meaning, strict=True))
    statement = f"{figures}: {conclusion}"
    return Verdict(name, title, doubts or usual, outcome, statement, evidence, meanings)


def decide(*, red: bool = False, note: bool = False, shown: float = 0.0) -> str:
    """Returns the outcome of a check.

    Args:
      red: whether it is flagged.
      note: whether it is noted, if it is not flagged.
      shown: the smallest gap that the sample can show.

    Example:
      >>> decide(red=True, shown=0.5), decide(note=True, shown=0.5), decide(note=True), decide()
      ('flagged', 'too few images', 'note', 'passed')
    """
    if red:
        return FLAGGED
    if shown > SHOWN:
        return TOO_FEW
    return NOTE if note else PASSED


def percent(right: np.ndarray) -> str:
    """Returns the share of images that are right, for a statement; of none it is not known."""
    return f"{100 * np.mean(right):.1f} %" if len(right) else "not known"


def points(gap: float) -> str:
    """Returns a gap for a statement."""
    return f"{100 * gap:.1f} points"


def evidence_of(gap: Gap, **more: Any) -> dict[str, Any]:
    """Returns a gap, with more figures, as evidence."""
    return {"gap": gap.value, **gap._asdict(), **more}


def floats(values: Mapping[Any, Any]) -> dict[str, float]:
    """Returns a curve as evidence."""
    return {f"{x:.4g}": float(value) for x, value in values.items()}


def json_float(value: Any) -> float:
    """Returns a number that JSON can hold."""
    return float(value) if np.isfinite(value) else LARGEST


def broken_though_certified(broken: int, images: int) -> Verdict:
    """Flags certified images that are misclassified, which cannot be.

    Args:
      broken: their number.
      images: number of test images.
    """
    conclusions = {FLAGGED: "a contradiction: the bounds or the evaluation are wrong."}
    figures = f"Of {images} images {broken} are certified and yet misclassified, clean or under an attack"
    evidence = {"broken": broken, "images": images}
    return make_verdict("certified", FLAGGED, figures, conclusions, evidence)


def depends_on_batch(remark: str) -> Verdict:
    """Flags a model whose logits depend on the other images of a batch, if there is no audit to see it.

    Args:
      remark: what was seen.
    """
    conclusions = {FLAGGED: "the accuracies are those of these batches alone."}
    return make_verdict("inference", FLAGGED, remark, conclusions, {})


def selected_on_test(selection: str) -> Verdict:
    """Flags a checkpoint that was chosen on test images.

    Args:
      selection: how it was chosen, for people.
    """
    conclusions = {FLAGGED: "the accuracies are those of the best of many looks at the test images."}
    figures = f"The checkpoint is the {selection}"
    return make_verdict("selected_on_test", FLAGGED, figures, conclusions, {})
