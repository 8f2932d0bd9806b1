"""The figures of ``experiments/results/cifar10_lt_small.md``, from the stored outcome of every image.

    python -m experiments.paper.small_page [OUT]

OUT, the folder of ``reproduce.py --table=small``, is read first: the outcomes of its evaluations are stored
beside the page, and its models are published in ``experiments/zoo``. Then the part of the page below ``MARK``
is written again, from what is stored alone.
"""

import pathlib
import sys
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from experiments.paper.claims import PAIR, answers
from experiments.paper.cost import passes
from experiments.paper.outcomes import ROOT, TABLE, WHOLE, Run, collect, publish_models, read, request_for
from experiments.paper.plan import row_config
from experiments.paper.table import aligned, elsewhere_table
from robal_jax.reporting.audit import audit_summary
from robal_jax.reporting.comparison import difference, printed_p
from robal_jax.reporting.names import paper_name
from robal_jax.storage.files import write_whole

PAGE = ROOT / "experiments" / "results" / "cifar10_lt_small.md"
STORED = PAGE.with_suffix("")
ZOO = ROOT / "experiments" / "zoo" / "cifar10_lt"
MARK = "<!-- All below is made from the stored outcomes by experiments/paper/small_page.py. -->\n"


def _percent(figure: Mapping[str, float] | None, *, interval: bool = False, sign: str = "") -> str:
    if figure is None:
        return "—"
    ends = [f"{100 * figure[end]:{sign}.1f}" for end in ("low", "high")]
    return f"{100 * figure['value']:{sign}.1f}" + (f" [{', '.join(ends)}]" if interval else "")


def _of(run: Run, evaluation: str, condition: str, figure: str = "accuracy") -> dict[str, float] | None:
    """Returns a figure of a run, None if the evaluation is not stored."""
    found = run.evaluations.get(evaluation)
    return None if found is None else found.conditions[condition][figure]


def _with(evaluation: str, runs: Sequence[Run]) -> list[Run]:
    """Returns the runs of which an evaluation is stored."""
    return [run for run in runs if evaluation in run.evaluations]


def _size(runs: Sequence[Run], evaluation: str) -> str:
    """Returns the number of test images of an evaluation, which is the same in all runs."""
    sizes = [len(run.evaluations[evaluation].examples["ids"]) for run in _with(evaluation, runs)]
    return f"{max(sizes, default=0):,}"


def _claims(runs: Sequence[Run]) -> Iterator[str]:
    yield "## What the paper says, and what came out here"
    yield (
        "'Yes' and 'no': the 95 % interval lies on one side of 0, or the test rejects at 5 %; for factors, "
        "the interval at the best factor lies above that at factor 1. Intervals are over images. The "
        "paper's networks are larger, and its runs twice as long."
    )
    body, before = [], ""
    for claim, run, figure, answer in answers(runs):
        body.append(["" if claim == before else claim, run, figure, answer])
        before = claim
    yield aligned(["Claim", "Run", "Here", "Answer"], body, left=4)


def _accuracies(runs: Sequence[Run]) -> Iterator[str]:
    yield f"## All {_size(runs, WHOLE)} test images"
    yield "Accuracy in percent. AA is the pair APGD-CE and APGD-T, as in the paper, here with 95 % intervals."
    groups = ("head", "medium", "tail")
    names = [paper_name(condition) for condition in TABLE.columns]
    header = ["Row", *names, "[95 %]", *(f"Clean {g}" for g in groups), *(f"AA {g}" for g in groups)]
    body = []
    for run in _with(WHOLE, runs):
        interval = _percent(_of(run, WHOLE, PAIR), interval=True).partition(" ")[2] or "—"
        cells = [_percent(_of(run, WHOLE, condition)) for condition in TABLE.columns]
        by_group = [_percent(_of(run, WHOLE, c, group)) for c in ("clean", PAIR) for group in groups]
        body.append([run.label, *cells, interval, *by_group])
    yield aligned(header, body, left=1)


def _differences(runs: Sequence[Run]) -> Iterator[str]:
    yield "## Difference to AT of the same seed under the pair"
    yield (
        f"Points on the same {_size(runs, WHOLE)} images, with 95 % intervals and the exact McNemar test. "
        "The intervals are over images; the spread over seeds is not in them."
    )
    partners = {run.seed: run for run in runs if run.row.key == TABLE.rows[0].key}
    header = ["Row", *(x for group in ("all", "head", "medium", "tail") for x in (group, "p"))]
    body = []
    for run in runs:
        other = partners.get(run.seed)
        if other is None or other is run or not all(WHOLE in each.evaluations for each in (run, other)):
            continue
        cells = []
        for group in ("all", "head", "medium", "tail"):
            figure = difference(run.evaluations[WHOLE], other.evaluations[WHOLE], PAIR, group)
            cells += [_percent(figure, interval=True, sign="+"), printed_p(figure["p_value"]).lstrip("p= ")]
        body.append([run.label, *cells])
    yield aligned(header, body, left=1)


def _autoattack(runs: Sequence[Run]) -> Iterator[str]:
    yield f"## AutoAttack on the same {_size(runs, 'autoattack')} test images"
    yield (
        "AutoAttack is 'standard': APGD-CE, APGD-T, FAB-T, Square. 'torchattacks' is the same as that "
        "package runs it: with 10 iterations, and with Square's schedule rescaled. It is an upper estimate. "
        "'Best' is the checkpoint that the held-out images choose; it stands under the pair beside the last."
    )
    header = [
        "Row", "Clean", "AutoAttack", "tail", "torchattacks", "Pair, last", "Pair, best", "best is", "Audit"
    ]  # fmt: skip
    body = []
    for run in runs:
        best, main = run.evaluations.get("best"), run.evaluations.get("autoattack")
        which = "—" if best is None else str(best.meta["selection"]).partition("(")[2].partition(",")[0]
        body.append(
            [
                run.label,
                _percent(_of(run, "autoattack", "clean")),
                _percent(_of(run, "autoattack", "autoattack"), interval=True),
                _percent(_of(run, "autoattack", "autoattack", "tail")),
                _percent(_of(run, "torchattacks", "torchattacks")),
                _percent(_of(run, "autoattack", PAIR)),
                _percent(_of(run, "best", PAIR)),
                which or "the last",
                "—" if main is None else audit_summary(main.audit),
            ]
        )
    yield aligned(header, body, left=1)


def _errors(runs: Sequence[Run]) -> Iterator[str]:
    yield "## Natural and boundary error under the pair"
    yield (
        f"Percent of the {_size(runs, WHOLE)} images: wrong when clean; right when clean and wrong under "
        "attack. Last, the share of those right when clean that the attack breaks."
    )
    body = []
    for run in _with(WHOLE, runs):
        pair = run.evaluations[WHOLE].conditions[PAIR]
        natural, boundary = (pair[f"{kind}_error"] for kind in ("natural", "boundary"))
        share = boundary["value"] / (1 - natural["value"])
        body.append([run.label, _percent(natural), _percent(boundary), f"{100 * share:.1f}"])
    yield aligned(["Row", "Natural error", "Boundary error", "Broken of the right"], body, left=1)


def _per_class(runs: Sequence[Run]) -> Iterator[str]:
    yield "## By class, clean and under the pair"
    yield "Accuracy in percent on the test images of each class; in brackets the images that were trained on."
    first = runs[0].evaluations[next(iter(runs[0].evaluations))]
    counts = first.summary["class_counts"]
    header = ["Row", "", *(f"{first.class_name(i)} ({count})" for i, count in enumerate(counts))]
    body = []
    for run in _with(WHOLE, runs):
        for condition in ("clean", PAIR):
            recall = run.evaluations[WHOLE].conditions[condition]["per_class"]["recall"]
            body.append([run.label, paper_name(condition), *map(_percent, recall)])
    yield aligned(header, body, left=2)


def _scales(runs: Sequence[Run]) -> Iterator[str]:
    yield "## Fake gain at small scales, and norms of the classifier"
    yield (
        "PGD-20 accuracy in percent on the images of the audit's sample when all logits are multiplied by a "
        "factor: a model whose accuracy rises at small or large factors is not more robust there. Norms: the "
        "mean norm of the weight vectors of head and tail classes (of a cosine head, before it normalises)."
    )
    audited = [(run, run.evaluations["autoattack"]) for run in _with("autoattack", runs)]
    curves = [(run, each.curves["scale"], each) for run, each in audited if "scale" in each.curves]
    if not curves:
        return
    header = ["Row", *(f"{x:g}" for x in curves[0][1]["x"]), "Norms: head", "tail"]
    body = []
    for run, curve, found in curves:
        weights = np.asarray((found.norms or {}).get("weights") or [np.nan] * 10)
        ends = [weights[found.summary["groups"][group]].mean() for group in ("head", "tail")]
        norms = ["—" if np.isnan(end) else f"{end:.2f}" for end in ends]
        body.append([run.label, *map(_percent, curve["series"]["PGD-20"]), *norms])
    yield aligned(header, body, left=1)


def _costs(runs: Sequence[Run]) -> Iterator[str]:
    yield "## Cost"
    yield "Passes: forward and backward passes per training image. Times on one core each, beside other work."
    request, body = request_for(pathlib.Path("out")), []
    for run in runs:
        found = next(iter(run.evaluations.values()))
        cost = "—" if run.seconds is None else f"{run.seconds:,}"
        evaluated = sum(each.meta["seconds"] for each in run.evaluations.values())
        facts = [found.meta["date"], found.meta["processor"], found.meta["checkpoint_sha256"][:12]]
        body.append(
            [run.label, f"{passes(row_config(run.row, request)):g}", cost, f"{evaluated:,.0f}", *facts]
        )
    header = ["Row", "Passes", "Training, s", "Evaluations, s", "Evaluated", "Processor", "Checkpoint sha256"]
    yield aligned(header, body, left=1)


def _published(runs: Sequence[Run]) -> Iterator[str]:
    rows = {run.row.label: run.row.elsewhere for run in runs if run.row.elsewhere}
    if not rows:
        return
    yield "## Published at this size, on the balanced training set"
    yield elsewhere_table(
        "Row", [(label, [each._asdict() for each in found], "") for label, found in rows.items()]
    )


def page(runs: Sequence[Run]) -> str:
    """Returns the part of the page that is made from the stored outcomes, as Markdown."""
    if not runs:
        return "No evaluation is stored yet.\n"
    missing = [row.label for row in TABLE.rows if not any(run.row == row for run in runs)]
    parts = [f"Not evaluated yet: {'; '.join(missing)}."] if missing else []
    for part in (
        _claims,
        _accuracies,
        _differences,
        _autoattack,
        _errors,
        _per_class,
        _scales,
        _published,
        _costs,
    ):
        blocks = list(part(runs))
        has_rows = bool(blocks) and len(blocks[-1].splitlines()) > 2
        parts += blocks if has_rows else []
    return "\n\n".join(parts) + "\n"


def main(arguments: Sequence[str]) -> None:
    """Stores the outcomes of a folder, if one is named, and writes the page again."""
    for out in arguments:
        print("stored:", ", ".join(collect(pathlib.Path(out), STORED)) or "nothing")
        print("published:", ", ".join(publish_models(pathlib.Path(out), ZOO)) or "nothing")
    text, mark, _ = PAGE.read_text().partition(MARK)
    write_whole(PAGE, f"{text}{mark or MARK}\n{page(read(STORED))}".encode())
    print(PAGE)


if __name__ == "__main__":
    main(sys.argv[1:])
