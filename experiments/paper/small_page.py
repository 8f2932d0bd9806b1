"""The figures of ``experiments/results/cifar10_lt_small.md``, from the stored outcome of every image.

    python -m experiments.paper.small_page [OUT]

OUT, the folder of ``reproduce.py --table=small``, is read first: the outcomes of its evaluations are stored
beside the page, and its models are published in ``experiments/zoo``. Then the part of the page below ``MARK``
is written again, from what is stored alone.
"""

import pathlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

import numpy as np

from experiments.paper.claims import ATTACKS, PAIR, answers
from experiments.paper.cost import passes
from experiments.paper.outcomes import ROOT, TABLE, Run, collect, publish_models, read, request_for
from experiments.paper.plan import row_config
from experiments.paper.table import aligned, elsewhere_table
from robal_jax.reporting.audit import audit_summary
from robal_jax.reporting.comparison import difference, printed_p
from robal_jax.reporting.names import display_name, paper_name
from robal_jax.storage.files import write_whole

PAGE = ROOT / "experiments" / "results" / "cifar10_lt_small.md"
STORED = PAGE.with_suffix("")
ZOO = ROOT / "experiments" / "zoo" / "cifar10_lt"
GROUPS = ("head", "medium", "tail")
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


def _attack(condition: str) -> str:
    return "the pair" if condition == PAIR else display_name(condition)


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


def _accuracies(runs: Sequence[Run], evaluation: str, condition: str) -> Iterator[str]:
    yield f"## Accuracy on {_size(runs, evaluation)} test images"
    yield "In percent. AA is the pair APGD-CE and APGD-T, as in the paper. The interval is the last attack's."
    attacks = list(dict.fromkeys([*TABLE.columns, condition]))
    names = [paper_name(attack) for attack in attacks]
    header = [
        "Row",
        *names,
        "95 % interval",
        *(f"{when} {g}" for when in ("Clean", names[-1]) for g in GROUPS),
    ]
    body = []
    for run in _with(evaluation, runs):
        cells = [_percent(_of(run, evaluation, attack)) for attack in attacks]
        interval = _percent(_of(run, evaluation, condition), interval=True).partition(" ")[2]
        by_group = [
            _percent(_of(run, evaluation, c, group)) for c in ("clean", condition) for group in GROUPS
        ]
        body.append([run.label, *cells, interval, *by_group])
    yield aligned(header, body, left=1)


def _differences(runs: Sequence[Run], evaluation: str, condition: str) -> Iterator[str]:
    yield f"## Difference to AT of the same seed under {_attack(condition)}"
    yield (
        f"Points on the same {_size(runs, evaluation)} images, with 95 % intervals and the exact McNemar "
        "test. The intervals are over images; the spread over seeds is not in them."
    )
    partners = {run.seed: run for run in runs if run.row.key == TABLE.rows[0].key}
    header = ["Row", *(x for group in ("all", *GROUPS) for x in (group, "p"))]
    body = []
    for run in _with(evaluation, runs):
        other = partners.get(run.seed)
        if other is None or other is run or evaluation not in other.evaluations:
            continue
        cells = []
        for group in ("all", *GROUPS):
            figure = difference(run.evaluations[evaluation], other.evaluations[evaluation], condition, group)
            cells += [_percent(figure, interval=True, sign="+"), printed_p(figure["p_value"]).lstrip("p= ")]
        body.append([run.label, *cells])
    yield aligned(header, body, left=1)


def _further(runs: Sequence[Run]) -> Iterator[str]:
    yield "## AutoAttack with 10 iterations, the best checkpoint, and the audit"
    yield (
        f"On the same {_size(runs, 'autoattack')} test images. AutoAttack is 'standard': APGD-CE, APGD-T, "
        "FAB-T, Square. 'torchattacks' is the same as that package runs it: with 10 iterations, and with "
        "Square's schedule rescaled. It is an upper estimate. 'Best' is the checkpoint that the held-out "
        "images choose; it stands under the pair beside the last."
    )
    header = ["Row", "AutoAttack", "torchattacks", "Pair, last", "Pair, best", "best is", "Audit"]
    body = []
    for run in runs:
        best, main = run.evaluations.get("best"), run.evaluations.get("autoattack")
        which = "—" if best is None else str(best.meta["selection"]).partition("(")[2].partition(",")[0]
        body.append(
            [
                run.label,
                _percent(_of(run, "autoattack", "autoattack")),
                _percent(_of(run, "torchattacks", "torchattacks")),
                _percent(_of(run, "autoattack", PAIR)),
                _percent(_of(run, "best", PAIR)),
                which or "the last",
                "—" if main is None else audit_summary(main.audit),
            ]
        )
    yield aligned(header, body, left=1)


def _errors(runs: Sequence[Run], evaluation: str, condition: str) -> Iterator[str]:
    yield f"## Natural and boundary error under {_attack(condition)}"
    yield (
        f"Percent of the {_size(runs, evaluation)} images: wrong when clean; right when clean and wrong "
        "under attack. Last, the share of those right when clean that the attack breaks."
    )
    body = []
    for run in _with(evaluation, runs):
        figures = run.evaluations[evaluation].conditions[condition]
        natural, boundary = (figures[f"{kind}_error"] for kind in ("natural", "boundary"))
        share = boundary["value"] / (1 - natural["value"])
        body.append([run.label, _percent(natural), _percent(boundary), f"{100 * share:.1f}"])
    yield aligned(["Row", "Natural error", "Boundary error", "Broken of the right"], body, left=1)


def _per_class(runs: Sequence[Run], evaluation: str, condition: str) -> Iterator[str]:
    yield f"## By class, clean and under {_attack(condition)}"
    found = _with(evaluation, runs)
    first = found[0].evaluations[evaluation]
    counts = first.summary["class_counts"]
    each = len(first.examples["ids"]) // len(counts)
    yield (
        f"Accuracy in percent on {each:,} test images of each class; in brackets the images that were "
        "trained on, where the training set is long-tailed."
    )
    header = ["Row", "", *(f"{first.class_name(i)} ({count})" for i, count in enumerate(counts))]
    body = []
    for run in found:
        for attack in ("clean", condition):
            recall = run.evaluations[evaluation].conditions[attack]["per_class"]["recall"]
            body.append([run.label, paper_name(attack), *map(_percent, recall)])
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
    by_evaluation: list[Callable[[Sequence[Run]], Iterator[str]]] = [
        partial(part, evaluation=name, condition=condition)
        for name, (condition, _) in ATTACKS.items()
        if _with(name, runs)
        for part in (_accuracies, _differences, _errors, _per_class)
    ]
    for part in (_claims, *by_evaluation, _further, _scales, _published, _costs):
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
