"""Verdicts of the audit: whether a robust accuracy can be trusted.

An attack that fails proves nothing unless one knows why it failed. Gradient attacks fail where gradients
vanish, are random or mislead; the accuracy is then that of the attack, not of the model. RoBal's own warning
(figure 2) is the plainest case: dividing the logits by a number, or normalising the classifier, raises the
accuracy under PGD and leaves the model as fragile as it was.

Nothing is measured here: :func:`give_verdicts` judges the arrays of ``measurements.py``, and
``ensemble_checks.py`` what the attacks on all images found. ``explanations.py`` says when each check is
raised, with its thresholds, and ``evidence.py`` has the tests. Two kinds of findings are kept apart. A
comparison that can only go down (more steps, more starts) shows how optimistic a number is, which is noted. A
comparison that should go the other way (a weaker attack that is stronger) or a property that no plain network
has is a sign of masking, which is flagged. Only images that are right when clean count.

Source: Carlini et al., "On evaluating adversarial robustness" (2019); Athalye et al., "Obfuscated gradients"
(ICML 2018); the five checks of the reference implementation of AutoAttack; RoBal (CVPR 2021), figure 2.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from robal_jax import attacks
from robal_jax.evaluation.ensemble_checks import bpda_after_own_gradient, square_after_gradients
from robal_jax.evaluation.evidence import (
    CHECKS,
    FAMILY_LEVEL,
    gap_between,
    gap_p_value,
    mean_p_value,
    share_p_value,
    smallest_gap,
    smallest_share,
)
from robal_jax.evaluation.explanations import (
    ALPHA_RANDOM,
    FLAT,
    GAP,
    MARGIN,
    NEARLY_ZERO,
    SATURATED,
    SCALE_MARGIN,
    VANISHING,
)
from robal_jax.evaluation.measurements import (
    FORWARD_NAMES,
    MAIN_STEPS,
    QUERIES,
    RESTART_NAMES,
    SCALE_NAMES,
    STEPS,
    Measured,
)
from robal_jax.evaluation.outcomes import (
    Curve,
    Verdict,
    decide,
    evidence_of,
    floats,
    json_float,
    make_verdict,
    percent,
    points,
)
from robal_jax.models.closure import are_probabilities
from robal_jax.reporting.results import EVERYTHING, FLAGGED, NOT_RUN, NOTE, OWN_GRADIENT, PASSED


class _Lowered(NamedTuple):
    """Whether images ``[n]`` are right under an attack, and by how much it lowers the true class's margin."""

    right: np.ndarray
    lowered: np.ndarray


class _Attacked(NamedTuple):
    """Measurements by attack, of the ``n`` images that are right when clean, all bool ``[n]``."""

    steps: Mapping[int, np.ndarray]
    scales: Mapping[float, "_Lowered"]
    starts: np.ndarray  # [starts, n]
    radii: Mapping[float, np.ndarray]
    margin: "_Lowered"
    unbounded: np.ndarray
    gradient_free: np.ndarray
    transfer: np.ndarray | None

    @property
    def main(self) -> np.ndarray:
        """Under PGD-20, whose settings are in question."""
        return self.steps[MAIN_STEPS]

    @property
    def white_box(self) -> np.ndarray:
        """Under all gradient attacks of the audit within the radius together."""
        others = [at.right for at in (*self.scales.values(), self.margin)]
        return np.logical_and.reduce([*self.steps.values(), *self.starts, *others])

    @property
    def restarts(self) -> dict[int, np.ndarray]:
        """Under so many starts."""
        return dict(enumerate(np.logical_and.accumulate(self.starts), 1))


def give_verdicts(
    measured: Measured,
    labels: np.ndarray,
    survived: np.ndarray,
    by_square: np.ndarray | None,
    epsilon: float,
    by_bpda: np.ndarray | None = None,
) -> tuple[list[Verdict], dict[str, Curve]]:
    """Judges what was measured.

    Args:
      measured: arrays of :func:`measurements.plan_measurements`, by name.
      labels: of the sample ``[n]``.
      survived: of the images that are right when clean, those that survive the gradient attacks
        before Square, bool ``[m]``.
      by_square: whether Square breaks them, bool ``[m]``; None if it did not run after such attacks.
      epsilon: the threat model's own radius, as :func:`measurements.radius_unit` counts it.
      by_bpda: of the images that are right when clean, those that survive the attacks with the model's own
        gradient and not those with BPDA, bool ``[m]``; None without BPDA.

    Returns:
      The verdicts, and the curves by logit scale ('scale'), 'steps', 'restarts' and radius ('epsilon').
    """
    with np.errstate(all="ignore"):  # what is not finite is flagged, and not a warning
        return _judge(measured, labels, survived, by_square, epsilon, by_bpda)


def _judge(
    measured: Measured,
    labels: np.ndarray,
    survived: np.ndarray,
    by_square: np.ndarray | None,
    epsilon: float,
    by_bpda: np.ndarray | None,
) -> tuple[list[Verdict], dict[str, Curve]]:
    level = FAMILY_LEVEL / (CHECKS + (by_bpda is not None))
    logits = [measured[name]["logits"] for name in FORWARD_NAMES]
    clean = logits[0].argmax(-1) == labels
    attacked = _attacked(measured, clean, np.asarray(attacks.margin(logits[0], labels)), epsilon)
    gradients = {name: values[clean] for name, values in measured["both_gradients"].items()}
    found = [
        _logit_scale(attacked, logits[0], labels, level),
        _more_steps(attacked, level),
        _more_restarts(attacked, level),
        *_gradients(gradients, level, EVERYTHING if by_bpda is None else OWN_GRADIENT),
        _without_bound(attacked, level),
        _gradient_free(attacked, level),
        square_after_gradients(survived, by_square, level),
        _transfer(attacked, level),
        _randomised(logits, labels),
        _probabilities(logits[0]),
        _inference(measured, logits),
        *([] if by_bpda is None else [bpda_after_own_gradient(by_bpda, level)]),
    ]
    return found, _curves(attacked, clean)


def _attacked(measured: Measured, clean: np.ndarray, margin: np.ndarray, epsilon: float) -> _Attacked:
    def lowered(name: str) -> _Lowered:
        after, is_right = (
            measured[name][field].reshape(len(margin), -1)[:, 0] for field in ("margin", "right")
        )
        return _Lowered(is_right[clean], np.nan_to_num(margin - after)[clean])

    right = {name: arrays["right"][clean] for name, arrays in measured.items() if "right" in arrays}
    steps = {count: right["steps"][:, number] for number, count in enumerate(STEPS)}
    radii = {
        float(arrays["radius"][0]): right[name][:, 0]
        for name, arrays in measured.items()
        if "radius" in arrays
    }
    radii |= {0.0: np.ones(int(clean.sum()), bool), epsilon: steps[MAIN_STEPS]}
    return _Attacked(
        steps=steps,
        scales={scale: lowered(name) for scale, name in SCALE_NAMES.items()},
        starts=np.stack([steps[MAIN_STEPS], *(right[name][:, 0] for name in RESTART_NAMES.values())]),
        radii=dict(sorted(radii.items())),
        margin=lowered("margin"),
        unbounded=right["unbounded"],
        gradient_free=right["gradient_free"],
        transfer=right.get("transfer"),
    )


def _curves(attacked: _Attacked, clean: np.ndarray) -> dict[str, Curve]:
    """Returns the curves, of the whole sample."""

    def among_all(right: np.ndarray) -> np.ndarray:
        found = np.zeros_like(clean)
        found[clean] = right
        return found

    radii = list(attacked.radii)
    zero = next(
        (number for number, radius in enumerate(radii) if not attacked.radii[radius].any()), len(radii)
    )
    by_name: dict[str, tuple[str, Mapping[Any, np.ndarray]]] = {
        "scale": ("PGD-20", {scale: at.right for scale, at in attacked.scales.items()}),
        "steps": ("PGD", attacked.steps),
        "restarts": ("PGD-20", attacked.restarts),
        "epsilon": ("PGD-20", {radius: attacked.radii[radius] for radius in radii[: zero + 1]}),
    }
    return {
        name: Curve(attack, {x: among_all(right) for x, right in curve.items()})
        for name, (attack, curve) in by_name.items()
    }


def _logit_scale(attacked: _Attacked, logits: np.ndarray, labels: np.ndarray, level: float) -> Verdict:
    named = {f"{s:g}": at for s, at in attacked.scales.items()} | {"margin": attacked.margin}
    own, others = named["1"], {name: at for name, at in named.items() if name != "1"}
    best = max(others, key=lambda name: float(np.sum(others[name].lowered)))
    words = "with the margin as its loss" if best == "margin" else f"at {best} times that scale"
    gap, further = gap_between(others[best].right, own.right), own.lowered * (1 + SCALE_MARGIN)
    softmax, confidence, accuracy = _softmax(logits, labels)
    clear = mean_p_value(others[best].lowered - further) * len(others) < level
    red = gap.value > GAP and clear and bool(softmax)
    note = gap.value > GAP and gap_p_value(gap, 0.0) * len(others) < level
    shown = smallest_share(gap.images, level=level)
    means = {name: json_float(np.mean(at.lowered)) if gap.images else 0.0 for name, at in named.items()}
    figures = (
        f"PGD-20 lowers the margin by {means['1']:.3g} at the model's own logit scale, which leaves "
        f"an accuracy of {percent(own.right)}, and by {means[best]:.3g} {words}, which leaves "
        f"{percent(others[best].right)}; the mean confidence is {100 * confidence:.1f} %"
    )
    conclusions = {
        PASSED: "no clear difference." if gap.value > 0 else "another scale does not help the attack.",
        NOTE: f"PGD-20 is optimistic by {points(gap.value)}.",
        FLAGGED: f"the softmax is {softmax}, and {points(gap.value)} of accuracy come from that alone.",
    }
    curve = {s: np.mean(at.right) for s, at in attacked.scales.items()} if gap.images else {}
    evidence = evidence_of(gap, confidence=confidence, clean=accuracy, lowered=means, accuracy=floats(curve))
    return make_verdict(
        "logit_scale", decide(red=red, note=note, shown=shown), figures, conclusions, evidence, shown
    )


def _softmax(logits: np.ndarray, labels: np.ndarray) -> tuple[str, float, float]:
    """Returns whether the softmax is 'flat', 'saturated' or neither (''), its confidence and the accuracy."""
    odds = np.exp(logits - logits.max(-1, keepdims=True))
    confidence = json_float(np.mean(1 / odds.sum(-1)))
    hits = int(np.sum(logits.argmax(-1) == labels))
    errors = (len(labels) - hits + 1) / (len(labels) + 2)  # not 0, if all are right
    flat, saturated = confidence < FLAT * hits / len(labels), 1 - confidence < SATURATED * errors
    return "flat" * flat or "saturated" * saturated, confidence, hits / len(labels)


def _more_steps(attacked: _Attacked, level: float) -> Verdict:
    steps, last = attacked.steps, max(attacked.steps)
    more = np.logical_and.reduce([right for count, right in steps.items() if count >= MAIN_STEPS])
    single, gap = gap_between(steps[1], attacked.main), gap_between(more, attacked.main)
    red = single.value > MARGIN and gap_p_value(single, MARGIN) < level
    shown = smallest_gap(single.images, MARGIN, level=level)
    outcome = decide(red=red, note=gap.value > GAP, shown=shown)
    figures = (
        f"The accuracy under PGD is {percent(steps[1])} after one step, "
        f"{percent(attacked.main)} after {MAIN_STEPS} steps and {percent(more)} "
        f"after up to {last}"
    )
    conclusions = {
        PASSED: f"{MAIN_STEPS} steps are enough.",
        NOTE: f"PGD-{MAIN_STEPS} is optimistic by {points(gap.value)}.",
        FLAGGED: f"one step is stronger than {MAIN_STEPS}, so the gradients mislead the attack.",
    }
    accuracy = {count: right.mean() for count, right in steps.items()} if gap.images else {}
    evidence = evidence_of(gap, single_step_gap=single.value, accuracy=floats(accuracy))
    return make_verdict("steps", outcome, figures, conclusions, evidence, shown)


def _more_restarts(attacked: _Attacked, level: float) -> Verdict:
    restarts = attacked.restarts
    last = max(restarts)
    gap = gap_between(restarts[last], attacked.main)
    shown = smallest_share(gap.images, level=level)
    outcome = decide(note=gap.value > GAP, shown=shown)
    figures = (
        f"The accuracy under PGD-20 is {percent(attacked.main)} with one start and "
        f"{percent(restarts[last])} with {last} starts"
    )
    conclusions = {
        PASSED: "one start is enough.",
        NOTE: f"PGD-20 with one start is optimistic by {points(gap.value)}.",
    }
    accuracy = {count: right.mean() for count, right in restarts.items()} if gap.images else {}
    evidence = evidence_of(gap, accuracy=floats(accuracy))
    return make_verdict("restarts", outcome, figures, conclusions, evidence, shown)


def _gradients(found: Mapping[str, np.ndarray], level: float, doubts: str) -> list[Verdict]:
    """Judges the gradients of both losses; ``doubts``: what not to trust if that of the margin vanishes."""
    finite, images = found["finite"], len(found["finite"])
    count, without = (
        int(np.sum((found[f"{loss}least"] == 0) & found[f"{loss}finite"])) for loss in ("", "margin_")
    )
    shown = smallest_share(images, VANISHING, level=level)
    red, neither = (share_p_value(each, images, VANISHING) < level for each in (count, without))
    figures = (
        "At the clean image, at the start of PGD or one step later, the gradient of the cross-entropy is "
        f"exactly zero for {count} of {images} images, and that of the margin for {without}"
    )
    stays = "no attack that follows a gradient leaves its start." if neither else "PGD stays where it starts."
    conclusions = {PASSED: "PGD can leave every start.", NOTE: "PGD stays at some starts.", FLAGGED: stays}
    evidence: dict[str, Any] = {"zero": count, "zero_of_margin": without, "images": images}
    outcome = decide(red=red or neither, note=count + without > 0, shown=shown)
    doubted = doubts if neither else None
    zero = make_verdict("zero_gradients", outcome, figures, conclusions, evidence, shown, doubted)
    broken = int(np.sum(~finite))
    shown = smallest_share(images, level=level)
    outcome = decide(red=broken > 0, shown=shown)
    figures = f"The gradient of the cross-entropy has NaN or infinite entries for {broken} of {images} images"
    conclusions = {PASSED: "it is finite.", FLAGGED: "attacks that follow it show nothing."}
    evidence = {"not_finite": broken, "images": images}
    return [zero, make_verdict("nan_gradients", outcome, figures, conclusions, evidence, shown)]


def _without_bound(attacked: _Attacked, level: float) -> Verdict:
    left, images = int(attacked.unbounded.sum()), len(attacked.unbounded)
    shown = smallest_share(images, NEARLY_ZERO, level=level)
    red = share_p_value(left, images, NEARLY_ZERO) < level
    outcome = decide(red=red, note=left > NEARLY_ZERO * images, shown=shown)
    figures = f"The accuracy under PGD without a bound is {percent(attacked.unbounded)}"
    conclusions = {
        PASSED: "nearly 0 %, as it should be.",
        NOTE: "a little more than the 0 % of an attack that works.",
        FLAGGED: "an attack that works brings it to 0 %.",
    }
    accuracy = {radius: right.mean() for radius, right in attacked.radii.items()} if images else {}
    evidence = {"left": left, "images": images, "accuracy_by_radius": floats(accuracy)}
    return make_verdict("unbounded", outcome, figures, conclusions, evidence, shown)


def _weaker(
    name: str, figures: str, right: np.ndarray, attacked: _Attacked, level: float, red: str, noted: str
) -> Verdict:
    """Judges an attack that should be weaker than those with the model's own gradient."""
    gap, alone = gap_between(right, attacked.white_box), gap_between(right, attacked.main)
    shown = smallest_gap(gap.images, MARGIN, level=level)
    outcome = decide(
        red=gap.value > MARGIN and gap_p_value(gap, MARGIN) < level,
        note=alone.value > GAP and gap_p_value(alone, 0.0) < level,
        shown=shown,
    )
    figures = (
        f"The accuracy is {percent(right)} {figures}, {percent(attacked.main)} "
        f"under PGD-20 and {percent(attacked.white_box)} under all gradient attacks of the "
        "audit together"
    )
    conclusions = {
        PASSED: "no clear difference." if gap.value > 0 else "gradients help, as they should.",
        NOTE: f"PGD-20 is optimistic by {points(alone.value)}; {noted}.",
        FLAGGED: f"{red}.",
    }
    evidence = evidence_of(gap, gap_to_pgd=alone.value)
    return make_verdict(name, outcome, figures, conclusions, evidence, shown)


def _gradient_free(attacked: _Attacked, level: float) -> Verdict:
    return _weaker(
        "gradient_free",
        f"under {QUERIES} queries of Square, which sees only logits",
        attacked.gradient_free,
        attacked,
        level,
        "gradients help less than random search",
        "the gradient attacks together are not clearly weaker than Square",
    )


def _transfer(attacked: _Attacked, level: float) -> Verdict:
    if attacked.transfer is None:
        conclusion = "name another model of the same data as surrogate."
        return make_verdict("transfer", NOT_RUN, "No surrogate was given", {NOT_RUN: conclusion}, {})
    return _weaker(
        "transfer",
        "on images made on the surrogate",
        attacked.transfer,
        attacked,
        level,
        "the model hides its own gradients",
        "the gradient attacks together are not clearly weaker than the transfer",
    )


def _centred(logits: np.ndarray) -> np.ndarray:
    """Returns logits less their mean, because an offset that all have in common means nothing."""
    return logits - logits.mean(-1, keepdims=True)


def _randomised(passes: list[np.ndarray], labels: np.ndarray) -> Verdict:
    centred = [_centred(z) for z in passes]
    unit = np.stack([z / (np.linalg.norm(z, axis=-1, keepdims=True) + 1e-10) for z in centred])
    apart = json_float(np.linalg.norm(unit[:, None] - unit[None], axis=-1).max())
    hits = [int(np.sum(z.argmax(-1) == labels)) for z in passes]
    outcome = decide(red=apart > ALPHA_RANDOM or len(set(hits)) > 1)
    figures = f"The logits of {len(passes)} passes over the same images differ by {apart:.1e} of their norm"
    conclusions = {
        PASSED: "the model is not random.",
        FLAGGED: "the model is random; attack it with the ensemble 'rand'.",
    }
    return make_verdict("randomised", outcome, figures, conclusions, {"difference": apart, "right": hits})


def _probabilities(logits: np.ndarray) -> Verdict:
    low, high = float(logits.min()), float(logits.max())
    red = are_probabilities(logits)
    figures = f"The outputs are in [{low:.3g}, {high:.3g}]"
    conclusions = {
        PASSED: "they are logits.",
        FLAGGED: "they sum to 1, so they are probabilities, and the attacks expect logits.",
    }
    evidence = {"low": json_float(low), "high": json_float(high)}
    return make_verdict("probabilities", decide(red=red), figures, conclusions, evidence)


def _inference(measured: Measured, passes: list[np.ndarray]) -> Verdict:
    first = _centred(passes[0])
    largest = max(float(np.abs(first).max()), 1e-30)

    def apart(other: np.ndarray) -> float:
        return json_float(np.abs(first - _centred(other)).max() / largest)

    calls, company = int(measured["inference"]["calls"][0]), apart(measured["among_others"]["logits"])
    by_itself = max(map(apart, passes[1:]))  # of a random model, whatever the batch
    changes = company > max(ALPHA_RANDOM, 2 * by_itself)
    figures = (
        f"The model takes {calls} derivatives to compute its logits, and the logits change by "
        f"{company:.1e} of the largest one in other batches"
    )
    conclusions = {
        PASSED: "it does not adapt at test time.",
        FLAGGED: "the model adapts at test time, and this evaluation does not account for that.",
    }
    evidence = {"calls": calls, "difference": company}
    return make_verdict("inference", decide(red=calls > 0 or changes), figures, conclusions, evidence)
