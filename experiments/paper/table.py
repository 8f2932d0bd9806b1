"""A table of the paper from the results of its runs, as JSON and as Markdown."""

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from decimal import ROUND_HALF_UP, Decimal
from typing import Any

import scipy.stats

from experiments.paper.catalogue import TABLES, heading, published
from experiments.paper.cost import passes
from experiments.paper.plan import Request, Run, commands, row_config
from experiments.paper.published import CHOSEN_BY, FAKE_GAINS
from experiments.paper.rows import DATA_SETS, Row
from robal_jax.reporting.comparison import printed_p
from robal_jax.reporting.names import display_name, paper_name, printed
from robal_jax.reporting.results import Results
from robal_jax.storage.config_file import to_json


def assemble(
    request: Request, results: Mapping[str, Mapping[str, Mapping[Run, Results | None]]]
) -> dict[str, Any]:
    """Returns the table as JSON, figures in percent.

    Args:
      request: the rows and seeds to show.
      results: by row key, setting and seed; None where it is missing.

    Returns:
      Title, data set, 'notes', 'attack', the condition shown by group, and 'rows'. Each row has 'ours' by
      condition ('mean', 'std', 'n' and 'values' over seeds), 'ours_by_group' the same by group of classes,
      'difference' to the baseline's row, paired by seed, and on a data set of the paper 'published' and
      'ours_minus_published'.
    """
    table = TABLES[request.table]
    known = {row.key: published(table, row, request.data) for row in table.rows}
    published_on = request.data if any(known.values()) else None
    chosen = {row.key: _best(results[row.key]) for row in request.rows}
    shown = {key: results[key][setting] for key, setting in chosen.items()}
    ours = {key: _by_seed(by_seed) for key, by_seed in shown.items()}
    found = [result for by_seed in shown.values() for result in by_seed.values() if result]
    # Classes with equal numbers of images are one group; such a row may stand among others.
    groups = max((list(result.summary["groups"]) for result in found), key=len, default=[])
    rows: list[dict[str, Any]] = []
    for row in request.rows:
        entry: dict[str, Any] = {
            "key": row.key,
            "stage": row.stage,
            "label": row.label,
            "config": f"configs/{row.config}.py:{request.data}",
            "overrides": [*row.overrides, *request.overrides],
            "commands": commands(row, request),
            "published": known[row.key],
            "published_gain_is_fake": row.key in FAKE_GAINS,
            "ours": _statistics(ours[row.key]),
            "ours_by_group": {name: _statistics(_by_seed(shown[row.key], name)) for name in groups},
        }
        if len(row.settings) > 1:
            entry |= {"chosen": chosen[row.key], "chosen_among": list(row.settings)}
        if table.follow_up:
            above = rows[-1]["key"] if rows else ""
            entry |= _of_follow_up(row, request, shown[row.key], above, shown.get(above, {}), groups)
        if row.baseline != row.key and row.baseline in ours:
            those = ours[row.baseline]
            pairs = {name: _minus(values, those.get(name, {})) for name, values in ours[row.key].items()}
            entry["difference"] = {
                "to": row.baseline,
                "published": _minus(known[row.key], known[row.baseline]),
                "ours": _statistics(pairs),
            }
        if published_on:
            means = {name: figure["mean"] for name, figure in entry["ours"].items()}
            entry["ours_minus_published"] = _minus(means, known[row.key])
        rows.append(entry)
    made_with = {json.dumps({**r.meta["versions"], "device": r.meta["device"]}) for r in found}
    more = {"follow_up": True} if table.follow_up else {}
    return {
        "table": request.table,
        "title": table.title,
        "data": request.data,
        "seeds": list(request.seeds),
        "columns": list(table.columns),
        "published_on": published_on,
        "attack": found[0].headline_attack if found else CHOSEN_BY,
        "groups": groups,
        "baseline": table.baseline,
        "made_with": [json.loads(versions) for versions in sorted(made_with)],
        "notes": _notes(request, published_on, found),
        "rows": rows,
        **more,
    }


def _of_follow_up(
    row: Row,
    request: Request,
    found: Mapping[Run, Results | None],
    key_above: str,
    above: Mapping[Run, Results | None],
    by_group: Iterable[str],
) -> dict[str, Any]:
    """Returns what a table of follow-up methods adds to a row: sizes, costs, other protocols, a test."""
    counts = [result.summary.get("class_counts") for result in found.values() if result]
    smallest = [min(each) for each in counts if each]
    entry: dict[str, Any] = {
        "smallest_class": min(smallest, default=None),
        "passes": round(passes(row_config(row, request)), 1),
        "elsewhere": [each._asdict() for each in row.elsewhere],
        "unpublished": row.unpublished,
    }
    if not key_above:
        return entry
    tests = []
    for group in ("all", *by_group):
        figure = "accuracy" if group == "all" else group
        here, there = (_by_seed(runs, figure) for runs in (found, above))
        for condition in here:
            pairs = _minus(here[condition], there.get(condition, {}))
            if pairs:
                tests.append({"condition": condition, "group": group, **_paired(list(pairs.values()))})
    entry["above"] = {"to": key_above, "tests": tests}
    return entry


def _paired(differences: Sequence[float]) -> dict[str, float | None]:
    """Returns the mean of differences of paired runs, and the p-value of a two-sided paired t-test.

    Without a spread the test says nothing: the value is None.
    """
    mean = round(statistics.fmean(differences), 4)
    if len(set(differences)) < 2:
        return {"difference": mean, "p": None}
    return {"difference": mean, "p": round(float(scipy.stats.ttest_1samp(differences, 0.0).pvalue), 4)}


def _by_seed(results: Mapping[Run, Results | None], figure: str = "accuracy") -> dict[str, dict[Run, float]]:
    """Returns a figure in percent by condition and seed, where it exists: equal classes have no tail."""
    values: dict[str, dict[Run, float]] = {}
    for seed, result in results.items():
        for name, condition in (result.conditions if result else {}).items():
            if figure in condition:
                values.setdefault(name, {})[seed] = 100 * condition[figure]["value"]
    return values


def _best(by_setting: Mapping[str, Mapping[Run, Results | None]]) -> str:
    """Returns the setting with the highest mean of ``CHOSEN_BY``; the first, if several are equal."""
    means = {
        setting: statistics.fmean(_by_seed(results).get(CHOSEN_BY, {}).values() or [-1.0])
        for setting, results in by_setting.items()
    }
    return max(means, key=means.__getitem__, default="")


def _statistics(by_seed: Mapping[str, Mapping[Run, float]]) -> dict[str, dict[str, Any]]:
    """Returns mean, sample standard deviation, number and values, by condition."""

    def figures(values: list[float]) -> dict[str, Any]:
        std = round(statistics.stdev(values), 4) if len(values) > 1 else None
        return {"mean": round(statistics.fmean(values), 4), "std": std, "n": len(values), "values": values}

    return {
        name: figures([round(v, 4) for v in values.values()]) for name, values in by_seed.items() if values
    }


def _minus(these: Mapping[Any, float], those: Mapping[Any, float]) -> dict[Any, float]:
    return {key: round(value - those[key], 4) for key, value in these.items() if key in those}


def _notes(request: Request, published_on: str | None, found: Sequence[Results]) -> list[str]:
    table = TABLES[request.table]
    usual = [row for row in request.rows if not any("data.ratio" in each for each in row.overrides)]
    fields = json.loads(to_json(row_config((usual or request.rows)[0], request)))
    data = f"{DATA_SETS[request.data]}, {fields['data']['profile']} profile"
    if len({override for row in table.rows for override in row.overrides if "data.ratio" in override}) < 2:
        data += f", IR {1 / fields['data']['ratio']:g}"
    length = f"{fields['train']['epochs']} epochs"
    if fields["train"]["max_steps"]:
        length += f", but {fields['train']['max_steps']} steps at most"
    model = ", ".join([fields["model"].pop("name"), *filter(None, [printed(fields["model"])])])
    unit = "seed" if all(isinstance(run, int) for run in request.seeds) else "seed and subset"
    over, each = ("seeds", unit) if unit == "seed" else (f"runs, each with its own {unit}", "run")
    seeds = f"mean ± standard deviation over {len(request.seeds)} {over}, differences {each} by {each}"
    chosen = {"best": "best checkpoint on held-out images", "best_on_test": "best checkpoint on test images"}
    weights = chosen.get(fields["train"]["select"], "last checkpoint")
    weights += f", {fields['evaluation']['weights']} weights" * (fields["evaluation"]["weights"] != "current")
    notes = [
        f"Ours: {data}; model {model}; {length}, unless the row's config says otherwise; {weights}; "
        f"{seeds if len(request.seeds) > 1 else 'one seed'}."
    ]
    if found:
        meta, conditions = found[0].meta, list(found[0].conditions)
        images = meta.get("part", f"{meta['n']} test images")
        notes.append(
            f"Evaluation: {images}, {meta['norm']}, ε = {meta['epsilon']:g}; PGD-20, MIM-20 and CW-20 with "
            f"step {meta['step_size']:g}. Worst: classified correctly under all of "
            f"{', '.join(map(display_name, conditions[:-1]))}. It is never above CW-20, whose steps do "
            "not depend on the scale of the logits, so a gain that Worst does not show may be fake."
        )
    if published_on is not None:
        notes.append(f"Paper (Wu et al., CVPR 2021): {DATA_SETS[published_on]}, WideResNet-34-10, ε = 0.031.")
    if "robal_aa" in {*table.columns, *(result.headline_attack for result in found)}:
        notes.append("AA is APGD-CE and APGD-T together, two of the four attacks of AutoAttack.")
    if any(row.key in FAKE_GAINS for row in request.rows):
        notes.append("†: the paper itself says that the gain under PGD-20 is fake; compare AA.")
    if table.follow_up:
        notes.append(
            f"p: two-sided paired t-test over the runs, each with the run of the same {unit} in the row "
            "above; not corrected for the number of tests. With three runs p is below 0.05 only if the mean "
            "difference is more than 2.5 times the standard deviation of the differences, and a large p does "
            "not say that two methods are equal."
            + " Runs of one seed, or of one subset, are not independent, as the test assumes."
            * (each == "run")
        )
        notes.append(
            "Passes per image: forward and backward passes of the network per image shown, each counted as "
            "one, without the training of a teacher. Smallest class: its training images. Published figures "
            "are not compared with ours, because no two protocols agree; AutoAttack with 10 iterations is "
            "an upper estimate of that with 100."
        )
    return [*notes, *filter(None, [table.note])]


def markdown(table: Mapping[str, Any]) -> str:
    """Returns the result of :func:`assemble` as Markdown."""
    seeds, rows = len(table["seeds"]), table["rows"]
    on, attack = table["published_on"], table["attack"]
    sides = [(name, side) for name in table["columns"] for side in (("paper", "ours") if on else ("ours",))]
    own = [name for name in (attack, "worst") if name not in table["columns"]]
    sides += [(name, "ours") for name in own]
    skip = 0 if any(row["stage"] for row in rows) else 1

    def block(title: str, cell: Any, chosen: Iterable[Mapping[str, Any]], sides: Sequence[Any]) -> list[str]:
        names = (f"{paper_name(name)} {side if on or side != 'ours' else ''}" for name, side in sides)
        header = ["Stage", "Row", *map(str.strip, names)]
        body = [[row["stage"], _label(row), *(cell(row, *side) for side in sides)] for row in chosen]
        return [f"## {title}", aligned(header[skip:], [line[skip:] for line in body], left=2 - skip)]

    def level(row: Mapping[str, Any], name: str, side: str) -> str:
        if side in table["groups"]:
            return _figure(row["ours_by_group"][side].get(name), seeds)
        marked = name == "pgd_20" and side == ("paper" if on else "ours")
        mark = " †" if row["published_gain_is_fake"] and marked else ""
        return _figure(row["ours" if side == "ours" else "published"].get(name), seeds) + mark

    def difference(row: Mapping[str, Any], name: str, side: str) -> str:
        figures = row["difference"]["ours" if side == "ours" else "published"]
        return _figure(figures.get(name), seeds, "+")

    def to_paper(row: Mapping[str, Any], name: str, _: str) -> str:
        return _figure(row["ours_minus_published"].get(name), seeds, "+")

    parts = [
        f"# {heading(table['table'])} on {DATA_SETS[table['data']]}: {table['title']}",
        *block("Accuracy in percent", level, rows, [*sides, *((attack, name) for name in table["groups"])]),
    ]
    if compared := [row for row in rows if "difference" in row]:
        parts += block(f"Difference to {table['baseline']} in points", difference, compared, sides)
    if table.get("follow_up"):
        parts += _follow_up_blocks(table, rows)
    if on:
        ours = [(name, "ours − paper") for name in table["columns"]]
        parts += block("Difference to the paper in points", to_paper, rows, ours)
    parts += ["## Notes", "\n".join(f"- {note}" for note in table["notes"])]
    parts += ["## Commands", f"One seed ({table['seeds'][0]}) by hand:"]
    lines = [f"# {row['key']}\n" + "\n".join(row["commands"]) for row in rows]
    return "\n\n".join([*parts, "```bash\n" + "\n".join(lines) + "\n```"]) + "\n"


def _follow_up_blocks(table: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Returns what a follow-up table shows besides: tests against the row above, costs, other protocols."""
    attack, tail = table["attack"], (table["groups"] or ["all"])[-1]
    shown = [("clean", "all"), (attack, "all"), (attack, tail)]
    names = [f"{paper_name(c)}{'' if g == 'all' else f' {g}'}" for c, g in shown]
    header = ["Row", "Smallest class", "Passes per image", *(x for name in names for x in (name, "p"))]
    body = []
    for row in rows:
        tests = {(t["condition"], t["group"]): t for t in row.get("above", {}).get("tests", ())}
        cells = []
        for key in shown:
            test = tests.get(key)
            p = "—" if test is None or test["p"] is None else printed_p(test["p"]).lstrip("p= ")
            cells += ["—" if test is None else _one_decimal(test["difference"], "+"), p]
        size = "—" if row["smallest_class"] is None else str(row["smallest_class"])
        body.append([row["label"], size, f"{row['passes']:g}", *cells])
    parts = ["## Difference to the row above, and cost", aligned(header, body, left=1)]
    figures = [(row["label"], row["elsewhere"], row["unpublished"]) for row in rows]
    return [*parts, "## Published, each with its own protocol", elsewhere_table("Row", figures)]


_ELSEWHERE = {
    "network": "Network", "data": "Data", "checkpoint": "Checkpoint", "source": "Source", "epsilon": "ε",
    "attack": "AutoAttack is", "clean": "Clean", "pgd": "PGD-20", "aa": "AutoAttack",
}  # fmt: skip


def elsewhere_table(first: str, rows: Iterable[tuple[str, Sequence[Mapping[str, str]], str]]) -> str:
    """Returns published figures with the protocol of each as a Markdown table.

    Args:
      first: heading of the first column.
      rows: its cell, the fields of each ``Elsewhere``, and why there are none ('': no line then).
    """
    body = []
    for label, figures, unpublished in rows:
        body += [[label, *(figure[field] for field in _ELSEWHERE)] for figure in figures]
        if unpublished:
            why = {"source": f"no figures: {unpublished}"}
            body.append([label, *(why.get(field, "—") for field in _ELSEWHERE)])
    return aligned([first, *_ELSEWHERE.values()], body, left=7)


def _label(row: Mapping[str, Any]) -> str:
    return row["label"] + (f" (ours: {row['chosen'].rpartition('=')[2]})" if row.get("chosen") else "")


def _figure(figure: Any, seeds: int, sign: str = "") -> str:
    """Formats a published figure, a number, or one of ours, as in '93.7 ± 0.4'."""
    if figure is None:
        return "—"
    if isinstance(figure, float):
        return _one_decimal(figure, sign)
    spread = "" if figure["std"] is None else f" ± {_one_decimal(figure['std'])}"
    fewer = f" (n = {figure['n']})" if figure["n"] < seeds else ""
    return _one_decimal(figure["mean"], sign) + spread + fewer


def _one_decimal(value: float, sign: str = "") -> str:
    """Rounds half up: 28.15 becomes 28.2."""
    return f"{Decimal(str(value)).quantize(Decimal('0.1'), ROUND_HALF_UP) + 0:{sign}}"


def aligned(header: Sequence[str], body: Sequence[Sequence[str]], left: int) -> str:
    """Returns a Markdown table that is aligned as text; the first ``left`` columns to the left."""
    widths = [max(map(len, column)) for column in zip(header, *body, strict=True)]

    def line(cells: Sequence[str]) -> str:
        padded = (
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
        )
        return "| " + " | ".join(padded) + " |"

    rule = ["-" * width if i < left else "-" * (width - 1) + ":" for i, width in enumerate(widths)]
    return "\n".join([line(header), line(rule), *map(line, body)])
