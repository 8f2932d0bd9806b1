"""The paper's claims beside what came out on CIFAR-10-LT with a small network.

The figures of the paper are those of its table 2, with WRN-34-10.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

from experiments.paper.catalogue import published
from experiments.paper.outcomes import TABLE, WHOLE, Run
from experiments.paper.published import PAPER
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
      claim: a full sentence.
      run: the row, and the seed.
      paper: what the paper has.
      figure: what came out, with its interval or p-value.
      answer: 'yes', 'no' or 'undecided'.
    """

    claim: str
    run: str
    paper: str
    figure: str
    answer: str


def answers(runs: Sequence[Run]) -> list[Answer]:
    """Returns the answers to all claims, claim by claim, from the runs that can tell."""
    baselines = {run.seed: run for run in runs if run.row.key == TABLE.rows[0].key}
    pairs = [(run, baselines[run.seed]) for run in runs if run.row.key in ROBAL and run.seed in baselines]
    found = [*_robustness(pairs), *_boundary(pairs)]
    for run in runs:
        if run.row.key in (TABLE.rows[0].key, *ROBAL) and "autoattack" in run.evaluations:
            found += _fake_gain(run)
    for run in baselines.values():
        if "autoattack" in run.evaluations:
            found += _norms(run)
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
) -> Iterator[tuple[str, str, Run, EvaluatedRun, EvaluatedRun]]:
    """Yields condition, text, the run, and each evaluation that it and its baseline both have."""
    for name, (condition, attack) in ATTACKS.items():
        for run, baseline in pairs:
            if name in run.evaluations and name in baseline.evaluations:
                one, other = run.evaluations[name], baseline.evaluations[name]
                yield (
                    condition,
                    f"under {attack} ({len(one.examples['labels']):,} test images)",
                    run,
                    one,
                    other,
                )


def _published(run: Run, figure: Callable[[Mapping[str, float]], float]) -> str:
    """Returns by how much a figure that is made of the published accuracies differs from AT's."""
    found = {row.key: figure(published(PAPER["2"], row, "cifar10_lt")) for row in PAPER["2"].rows}
    return f"{found[run.row.key] - found[TABLE.rows[0].key]:+.1f} points under the pair"


def _robustness(pairs: Sequence[tuple[Run, Run]]) -> Iterator[Answer]:
    for group, where in ("all", ""), ("tail", " on the tail"):
        for condition, text, run, one, other in _pairs_under(pairs):
            figure = difference(one, other, condition, group)
            claim = f"RoBal is more robust than AT{where} {text}."
            paper = "—" if where else _published(run, lambda accuracies: accuracies[PAIR])
            yield Answer(claim, run.label, paper, _points(figure), _answer(figure))


def _at_boundary(run: EvaluatedRun, condition: str) -> np.ndarray:
    """Returns whether each image is right when clean and wrong under an attack."""
    labels = run.examples["labels"]
    return (run.predictions["clean"] == labels) & (run.predictions[condition] != labels)


def _boundary(pairs: Sequence[tuple[Run, Run]]) -> Iterator[Answer]:
    for condition, text, run, one, other in _pairs_under(pairs):
        figure = metrics.paired_difference(*(_at_boundary(each, condition) for each in (other, one)))
        claim = f"The boundary error of RoBal is lower than that of AT {text}."
        paper = _published(run, lambda accuracies: accuracies["clean"] - accuracies[PAIR])
        yield Answer(claim, run.label, paper, _points(figure), _answer(figure, falls=True))


def _fake_gain(run: Run) -> Iterator[Answer]:
    """Compares PGD-20 at the ends of the scale with PGD-20 at factor 1."""
    found = run.evaluations["autoattack"]
    if "scale" not in found.sample:
        return
    right = dict(zip(found.curves["scale"]["x"], found.sample["scale"].T, strict=True))
    for factor in min(right), max(right):
        figure = metrics.paired_difference(right[1.0], right[factor])
        claim = f"PGD-20 leaves more images right when the logits are multiplied by {factor:g}."
        yield Answer(claim, run.label, "yes, figure 2", _points(figure), _answer(figure))


def _norms(run: Run) -> Iterator[Answer]:
    found = run.evaluations["autoattack"]
    weights = (found.norms or {}).get("weights")
    if weights is not None:
        rho, p = stats.spearmanr(found.summary["class_counts"], weights)
        claim = "The weight vectors of AT's classifier are longer for classes with more training images."
        answer = "undecided" if p >= metrics.ALPHA else "yes" if rho > 0 else "no"
        figure = f"rank correlation {rho:+.2f}, {printed_p(p)}"
        yield Answer(claim, run.label, "yes, figure 3", figure, answer)
