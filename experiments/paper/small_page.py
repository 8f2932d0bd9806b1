"""The figures of ``experiments/results/cifar10_lt_small.md``, from the stored outcome of every image.

    python -m experiments.paper.small_page [OUT] [ROW-SEED/EVALUATION=FOLDER ...]

OUT, the folder of ``reproduce.py --table=small``, is read first: the outcomes of its evaluations are stored
beside the page, and its models are published in ``experiments/zoo``. Single evaluations, such as
``la-0/autoattack=runs/zoo/cifar10_lt/la_resnet20/evaluation``, are only stored. Then the part of the page
below ``MARK`` is written again, from what is stored alone.
"""

import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

import numpy as np

from experiments.paper.claims import ATTACKS, PAIR, answers
from experiments.paper.cost import passes
from experiments.paper.outcomes import (
    ROOT,
    ROWS,
    TABLE,
    WHOLE,
    Run,
    collect,
    publish_models,
    read,
    request_for,
    store_folders,
)
from experiments.paper.plan import row_config
from experiments.paper.small import COMPARED
from experiments.paper.table import aligned, elsewhere_table
from robal_jax import cli
from robal_jax.reporting.audit import audit_summary
from robal_jax.reporting.comparison import difference, printed_p
from robal_jax.reporting.names import display_name, with_interval
from robal_jax.storage.files import write_whole

PAGE = ROOT / "experiments" / "results" / "cifar10_lt_small.md"
STORED = PAGE.with_suffix("")
ZOO = ROOT / "experiments" / "zoo" / "cifar10_lt"
EVALUATIONS = {
    WHOLE: "on all test images",
    "autoattack": "under AutoAttack",
    "torchattacks": "as torchattacks runs it",
    "best": "at the best checkpoint",
}
"""Evaluations of every run, in words."""

GROUPS = ("head", "medium", "tail")
MARK = "<!-- All below is made from the stored outcomes by experiments/paper/small_page.py. -->\n"


def _percent(figure: Mapping[str, float] | None, *, interval: bool = False, sign: str = "") -> str:
    if figure is None:
        return "—"
    text = with_interval(figure, sign)
    return text if interval else text.partition(" ")[0]


def _of(run: Run, evaluation: str, condition: str, figure: str = "accuracy") -> dict[str, float] | None:
    """Returns a figure of a run, None if the evaluation is not stored."""
    found = run.evaluations.get(evaluation)
    return None if found is None else found.conditions[condition][figure]


def _attack(condition: str) -> str:
    """Returns the name of a condition within a sentence."""
    return "the pair" if condition == PAIR else display_name(condition)


def _name(condition: str) -> str:
    """Returns the name of a condition as a heading."""
    return "Pair" if condition == PAIR else display_name(condition)


def _with(evaluation: str, runs: Sequence[Run]) -> list[Run]:
    """Returns the runs of which an evaluation is stored."""
    return [run for run in runs if evaluation in run.evaluations]


def _size(runs: Sequence[Run], evaluation: str) -> str:
    """Returns the number of test images of an evaluation, which is the same in all runs."""
    sizes = [len(run.evaluations[evaluation].examples["ids"]) for run in _with(evaluation, runs)]
    return f"{max(sizes, default=0):,}"


def _claims(runs: Sequence[Run]) -> Iterator[str]:
    yield "## The paper's claims, and what came out here"
    body, before = [], ""
    for claim, run, paper, figure, answer in answers(runs):
        body.append(["" if claim == before else claim, run, paper, figure, answer])
        before = claim
    yield (
        "The paper's figures are those of its table 2, for WRN-34-10 and twice as many epochs. 'Yes' and "
        "'no': the 95 % interval is on one side of 0, or the test rejects at 5 %. Nothing is corrected for "
        f"the {len(body)} answers, no claim was named as the main one before the runs, and intervals and "
        "tests are over images, not over trainings: read the answers as exploratory."
    )
    yield (
        "Accuracies and errors: RoBal less AT on the same images, exact McNemar test; a boundary error with "
        "a plus speaks against the claim. Factors: the same test, "
        "on the images of the audit. Norms: rank test over the ten classes. 'Undecided' does not mean that "
        "there is no difference."
    )
    yield aligned(["Claim", "Run", "Paper", "Here", "Answer"], body, left=5)


def _accuracies(runs: Sequence[Run], evaluation: str, condition: str) -> Iterator[str]:
    yield f"## Accuracy on {_size(runs, evaluation)} test images"
    yield (
        "In percent, with a 95 % interval for the last attack. The pair is APGD-CE and APGD-T, which the "
        "paper calls AA."
    )
    attacks = list(dict.fromkeys([*TABLE.columns, condition]))
    header = ["Row", *map(_name, attacks[:-1]), f"{_name(condition)} [95 %]"]
    body = []
    for run in _with(evaluation, runs):
        cells = [_percent(_of(run, evaluation, attack)) for attack in attacks[:-1]]
        body.append([run.label, *cells, _percent(_of(run, evaluation, condition), interval=True)])
    yield aligned(header, body, left=1)


def _groups(runs: Sequence[Run], evaluation: str, condition: str) -> Iterator[str]:
    yield f"## Head, medium and tail, clean and under {_attack(condition)}"
    yield f"Accuracy in percent on the {_size(runs, evaluation)} test images, with 95 % intervals."
    columns = [(each, group) for each in ("clean", condition) for group in GROUPS]
    header = ["Row", *(f"{_name(each)}, {group}" for each, group in columns)]
    body = [
        [run.label, *(_percent(_of(run, evaluation, *column), interval=True) for column in columns)]
        for run in _with(evaluation, runs)
    ]
    yield aligned(header, body, left=1)


def _differences(runs: Sequence[Run], evaluation: str, condition: str) -> Iterator[str]:
    yield f"## Difference to AT of the same seed under {_attack(condition)}"
    yield (
        f"Points on the same {_size(runs, evaluation)} images, with 95 % intervals and the exact McNemar "
        "test, not corrected for their number. The intervals are over images; the spread over seeds is not "
        "in them."
    )
    at = {run.seed: run for run in _with(evaluation, runs) if run.row.key == TABLE.rows[0].key}
    header = ["Row", *(x for group in ("all", *GROUPS) for x in (group, "p"))]
    body = [
        [run.label, *_paired(run, at[run.seed], evaluation, condition, ("all", *GROUPS))]
        for run in _with(evaluation, runs)
        if run.seed in at and run != at[run.seed] and not run.balanced
    ]
    yield aligned(header, body, left=1)


def _paired(run: Run, other: Run, evaluation: str, condition: str, groups: Sequence[str]) -> Iterator[str]:
    """Returns for each group of classes the difference of two runs with its interval, and its p-value."""
    for group in groups:
        figure = difference(run.evaluations[evaluation], other.evaluations[evaluation], condition, group)
        yield _percent(figure, interval=True, sign="+")
        yield printed_p(figure["p_value"]).lstrip("p= ")


def _other_differences(runs: Sequence[Run], evaluation: str, condition: str) -> Iterator[str]:
    yield f"## Differences between other rows, clean and under {_attack(condition)}"
    yield (
        "The same for pairs of rows that were chosen after the first figures were seen: the first row less "
        "the second, both with seed 0. Clean is of all images; the other columns are under attack."
    )
    by_key = {run.row.key: run for run in _with(evaluation, runs) if run.seed == 0}
    header = ["Row", "less", "clean", "p", *(x for group in ("all", *GROUPS) for x in (group, "p"))]
    body = [
        [
            by_key[one].label,
            by_key[other].label,
            *_paired(by_key[one], by_key[other], evaluation, "clean", ("all",)),
            *_paired(by_key[one], by_key[other], evaluation, condition, ("all", *GROUPS)),
        ]
        for one, other in COMPARED
        if {one, other} <= set(by_key)
    ]
    yield aligned(header, body, left=2)


def _further(runs: Sequence[Run]) -> Iterator[str]:
    runs = [run for run in runs if set(run.evaluations) & {"autoattack", "torchattacks", "best"}]
    yield "## AutoAttack with 10 iterations, the best checkpoint, and the audit"
    yield (
        f"On the same {_size(runs, 'autoattack')} test images. AutoAttack is 'standard': APGD-CE, APGD-T, "
        "FAB-T, Square. 'torchattacks' is the same as that package runs it: with 10 iterations, and with "
        "Square's schedule rescaled. It is an upper estimate. 'Best' is the checkpoint that the held-out "
        "images choose; it stands under the pair beside the last. 'Not flagged': the audit saw no sign of "
        "masked gradients. 'Too few images for 3': in three of its checks too few images are right when "
        "clean for a gap to show."
    )
    header = ["Row", "AutoAttack", "torchattacks", "Pair, last", "Pair, best", "best is", "Audit"]
    body = []
    for run in runs:
        best, main = run.evaluations.get("best"), run.evaluations.get("autoattack")
        which = (
            "—" if best is None else str(best.meta.get("selection", "")).partition("(")[2].partition(",")[0]
        )
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
        "under attack. Last, the share of the images right when clean that the attack breaks."
    )
    body = []
    for run in _with(evaluation, runs):
        figures = run.evaluations[evaluation].conditions[condition]
        natural, boundary = (figures[f"{kind}_error"] for kind in ("natural", "boundary"))
        share = boundary["value"] / (1 - natural["value"])
        body.append([run.label, _percent(natural), _percent(boundary), f"{100 * share:.1f}"])
    yield aligned(["Row", "Natural error", "Boundary error", "Right ones broken"], body, left=1)


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
            body.append([run.label, _name(attack), *map(_percent, recall)])
    yield aligned(header, body, left=2)


def _scales(runs: Sequence[Run]) -> Iterator[str]:
    audited = [(run, run.evaluations["autoattack"]) for run in _with("autoattack", runs)]
    curves = [(run, each.curves["scale"], each) for run, each in audited if "scale" in each.curves]
    if not curves:
        return
    yield "## PGD-20 by logit scale, and norms of the classifier"
    sample = (curves[0][2].audit or {})["examples"]
    yield (
        f"PGD-20 accuracy in percent on {sample} test images, drawn at random, when all logits "
        "of the evaluated model are multiplied by a factor; at 1 they are those of the row, for RoBal at "
        "scale 10. A model whose accuracy rises at small or large factors is not more robust there. Norms: "
        "the mean norm of the weight vectors of head and tail classes (of a cosine head, before it "
        "normalises)."
    )
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
    yield (
        "Passes: forward and backward passes per training image. Steps: without the looks at held-out "
        "images and the saving of checkpoints. Times are on one core or two, beside other "
        "work, so they compare nothing; —: not measured."
    )
    request, body = request_for(pathlib.Path("out")), []
    for run in runs:
        metas = {name: each.meta for name, each in run.evaluations.items()}
        last = [meta["checkpoint_sha256"][:12] for name, meta in metas.items() if name != "best"]
        dates = sorted({meta["date"] for meta in metas.values()})
        cost = "—" if run.seconds is None else f"{run.seconds:,}"
        evaluated = sum(meta["seconds"] for meta in metas.values())
        processors = ", ".join(sorted({meta["processor"] for meta in metas.values()}))
        facts = [" to ".join(dict.fromkeys((dates[0], dates[-1]))), processors, *(last or ["—"])[:1]]
        body.append(
            [run.label, f"{passes(row_config(run.row, request)):g}", cost, f"{evaluated:,.0f}", *facts]
        )
    header = ["Row", "Passes", "Steps, s", "Evaluations, s", "Evaluated", "Processor", "Checkpoint sha256"]
    yield aligned(header, body, left=1)


def _published(runs: Sequence[Run]) -> Iterator[str]:
    rows = {run.row.label: run.row.elsewhere for run in runs if run.row.elsewhere}
    if not rows:
        return
    yield "## Published at this size, on the balanced training set"
    yield elsewhere_table(
        "Row", [(label, [each._asdict() for each in found], "") for label, found in rows.items()]
    )


def _missing(runs: Sequence[Run]) -> Iterator[str]:
    """Yields what the protocol asks for and is not stored: runs, then evaluations of the other runs."""
    stored = {(run.row.key, run.seed) for run in runs}
    wanted = [Run(row, seed, {}, None) for row, seed in ROWS.values()]
    absent = [run.label for run in wanted if (run.row.key, run.seed) not in stored]
    if absent:
        yield f"Not evaluated yet: {'; '.join(absent)}."
    for name, text in EVALUATIONS.items():
        lacking = [run.label for run in runs if name not in run.evaluations]
        if lacking:
            yield f"Not evaluated yet {text}: {'; '.join(lacking)}."


def page(runs: Sequence[Run]) -> str:
    """Returns the part of the page that is made from the stored outcomes, as Markdown."""
    if not runs:
        return "No evaluation is stored yet.\n"
    parts = list(_missing(runs))
    by_evaluation: list[Callable[[Sequence[Run]], Iterator[str]]] = [
        partial(part, evaluation=name, condition=ATTACKS[name][0])
        for name in sorted(ATTACKS, key=lambda name: -len(_with(name, runs)))  # that of most runs first
        for part in (_accuracies, _groups, _differences, _other_differences, _errors, _per_class)
    ]
    for part in (_claims, *by_evaluation, _further, _scales, _published, _costs):
        blocks = list(part(runs))
        has_rows = bool(blocks) and len(blocks[-1].splitlines()) > 2
        parts += blocks if has_rows else []
    return "\n\n".join(parts) + "\n"


def main(arguments: Sequence[str]) -> None:
    """Stores the outcomes of a folder, if one is named, and writes the page again."""
    single = {
        place: pathlib.Path(folder) for place, _, folder in (x.partition("=") for x in arguments) if folder
    }
    for out in (pathlib.Path(argument) for argument in arguments if "=" not in argument):
        print("published:", ", ".join(publish_models(out, ZOO)) or "nothing")
        print("stored:", ", ".join(collect(out, STORED)) or "nothing")
    if single:
        print("stored:", ", ".join(store_folders(single, STORED)))
    text = PAGE.read_text().partition(MARK)[0]
    write_whole(PAGE, f"{text}{MARK}\n{page(read(STORED))}".encode())
    print(PAGE)


if __name__ == "__main__":
    cli.run(main)
