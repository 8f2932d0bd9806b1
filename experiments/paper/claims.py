"""The paper's claims beside what came out on CIFAR-10-LT with a small network."""

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

from experiments.paper.outcomes import TABLE, WHOLE, Run
from robal_jax import metrics
from robal_jax.reporting.comparison import difference, printed_p
from robal_jax.reporting.results import EvaluatedRun

PAIR = "robal_aa"
ROBAL = ("robal_n", "robal_r")

ATTACKS = {WHOLE: (PAIR, "the paper's pair of attacks"), "autoattack": ("autoattack", "AutoAttack")}
"""Evaluations that the claims are about, each with its strongest condition: its name, and in words."""


class Answer(NamedTuple):
    """The answer of one run to one claim.

    Attributes:
      claim: of the paper, a full sentence.
      run: the row, and the seed.
      figure: what came out, with its interval or p-value.
      answer: 'yes', 'no' or 'undecided'.
    """

    claim: str
    run: str
    figure: str
    answer: str


def answers(runs: Sequence[Run]) -> list[Answer]:
    """Returns the answers to all claims, claim by claim, from the runs that can tell."""
    baselines = {run.seed: run for run in runs if run.row.key == TABLE.rows[0].key}
    pairs = [(run, baselines[run.seed]) for run in runs if run.row.key in ROBAL and run.seed in baselines]
    found = [*_robustness(pairs), *_boundary(pairs)]
    for run in baselines.values():
        if "autoattack" in run.evaluations:
            found += [*_fake_gain(run), *_norms(run)]
    order = list(dict.fromkeys(each.claim for each in found))
    return sorted(found, key=lambda each: order.index(each.claim))


def _answer(figure: Mapping[str, float], *, falls: bool = False) -> str:
    """Returns 'yes' if the whole interval is above 0 (below it, if the claim is a fall)."""
    low, high = (-figure["high"], -figure["low"]) if falls else (figure["low"], figure["high"])
    return "yes" if low > 0 else "no" if high < 0 else "undecided"


def _points(figure: Mapping[str, float]) -> str:
    value, low, high = (100 * figure[part] for part in ("value", "low", "high"))
    return f"{value:+.1f} points [{low:+.1f}, {high:+.1f}], {printed_p(figure['p_value'])}"


def _pairs_under(
    pairs: Sequence[tuple[Run, Run]],
) -> Iterator[tuple[str, str, str, EvaluatedRun, EvaluatedRun]]:
    """Yields condition, text, the run's label, and each evaluation that a run and its baseline both have."""
    for name, (condition, attack) in ATTACKS.items():
        for run, baseline in pairs:
            if name in run.evaluations and name in baseline.evaluations:
                one, other = run.evaluations[name], baseline.evaluations[name]
                text = f"under {attack} ({len(one.examples['labels']):,} test images)"
                yield condition, text, run.label, one, other


def _robustness(pairs: Sequence[tuple[Run, Run]]) -> Iterator[Answer]:
    for group, where in ("all", ""), ("tail", " on the tail"):
        for condition, text, label, one, other in _pairs_under(pairs):
            figure = difference(one, other, condition, group)
            yield Answer(
                f"RoBal is more robust than AT{where} {text}.", label, _points(figure), _answer(figure)
            )


def _at_boundary(run: EvaluatedRun, condition: str) -> np.ndarray:
    """Returns whether each image is right when clean and wrong under an attack."""
    labels = run.examples["labels"]
    return (run.predictions["clean"] == labels) & (run.predictions[condition] != labels)


def _boundary(pairs: Sequence[tuple[Run, Run]]) -> Iterator[Answer]:
    for condition, text, label, one, other in _pairs_under(pairs):
        figure = metrics.paired_difference(*(_at_boundary(each, condition) for each in (other, one)))
        claim = f"The boundary error of RoBal is lower than that of AT {text}."
        yield Answer(claim, label, _points(figure), _answer(figure, falls=True))


def _fake_gain(run: Run) -> Iterator[Answer]:
    """Compares PGD-20 at the factor where it finds least with PGD-20 at factor 1."""
    curve = run.evaluations["autoattack"].curves["scale"]
    figures = dict(zip(curve["x"], curve["series"]["PGD-20"], strict=True))
    best = max(figures, key=lambda factor: figures[factor]["value"])
    gain = 100 * (figures[best]["value"] - figures[1.0]["value"])
    seen = figures[best]["low"] > figures[1.0]["high"]  # both are uncertain, and the best is chosen
    ends = ", ".join(f"{100 * figures[best][end]:.1f}" for end in ("low", "high"))
    figure = f"factor {best:g}: {100 * figures[best]['value']:.1f} % [{ends}], {gain:+.1f} points"
    claim = (
        "PGD-20 finds less when the logits are multiplied by a factor, so the model only seems more robust."
    )
    yield Answer(claim, run.label, figure, "yes" if seen else "undecided")


def _norms(run: Run) -> Iterator[Answer]:
    found = run.evaluations["autoattack"]
    weights = (found.norms or {}).get("weights")
    if weights is not None:
        rho, p = stats.spearmanr(found.summary["class_counts"], weights)
        claim = "The weight vectors of AT's classifier are longer for classes with more training images."
        answer = "undecided" if p >= metrics.ALPHA else "yes" if rho > 0 else "no"
        yield Answer(claim, run.label, f"rank correlation {rho:+.2f}, {printed_p(p)}", answer)
