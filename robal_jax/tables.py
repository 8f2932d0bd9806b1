"""The runs that a table of the paper needs, and the table that their results make.

Rows of the same training share one run, in whatever tables they stand: a run's folder is named by a digest
of `build.training_fields`, an evaluation's by that and the config's section ``evaluation``. Nothing here
trains or evaluates; experiments/reproduce.py does.
"""

import ast
import functools
import hashlib
import json
import pathlib
import shlex
import statistics
from collections.abc import Iterable, Mapping, Sequence
from decimal import ROUND_HALF_UP, Decimal
from typing import Any, NamedTuple

from robal_jax import build, cli
from robal_jax.errors import InputError
from robal_jax.paper import CHOSEN_BY, CIFAR, DATA_SETS, FAKE_GAINS, TABLES, Row, published
from robal_jax.reporting import display_name, printed

# ---------------------------------------------------------------- what is to be done


class Request(NamedTuple):
    """What the user wants made.

    Attributes:
      table: its name.
      data: the data set.
      seeds: of the runs of every row.
      rows: as `paper.rows_of` gives them.
      overrides: of every config, ``train.epochs=4``.
      out: folder of all runs and tables.
      configs: folder of the config files.
    """

    table: str
    data: str
    seeds: tuple[int, ...]
    rows: tuple[Row, ...]
    overrides: tuple[str, ...] = ()
    out: pathlib.Path = pathlib.Path("runs/tables")
    configs: pathlib.Path = pathlib.Path("configs")


class Job(NamedTuple):
    """A training or an evaluation.

    Attributes:
      key: row that it is of; of a shared run, the first one.
      seed: of the run.
      config: resolved.
      workdir: of the run.
      start: folder of the run that is fine-tuned, if any.
      folder: of the evaluation; None for a training.
    """

    key: str
    seed: int
    config: Any
    workdir: pathlib.Path
    start: pathlib.Path | None = None
    folder: pathlib.Path | None = None


class Plan(NamedTuple):
    """All jobs, each after those it needs, and where the results will lie.

    Attributes:
      jobs: no folder twice.
      folders: of evaluations, by row key, setting and seed.
    """

    jobs: list[Job]
    folders: dict[str, dict[str, dict[int, pathlib.Path]]]


# The attacks of the paper's tables; its AA is a pair of those of AutoAttack. No audit of every run.
PROTOCOL = ("evaluation.autoattack=robal_aa", "evaluation.audit.examples=0")


def row_config(row: Row, request: Request, *more: str) -> Any:
    """The resolved config of a row; ``more`` are overrides.

    Raises:
      InputError: an override that the config does not take.
    """
    plain = cli.load_config(f"{request.configs / row.config}.py:{request.data}")
    overrides = filter(None, (*PROTOCOL, *row.overrides, *request.overrides, *more))
    try:
        config = cli.apply_overrides(plain, [f"--config.{override}" for override in overrides])
        build.validate(config)
    except InputError as error:
        raise InputError(f"row {row.key!r} of table {request.table}: {error}") from error
    return config


_AT = Row("at", "", "AT", "at")


@functools.cache
def run_name(row: Row, request: Request) -> str:
    """Folder of a row's runs, the same for all rows of the same training: 'ldam-0123abcd'."""
    start = f"train.start_from={run_name(_AT, request)}" if row.start else ""
    config = row_config(row, request, start)
    name = row.config if build.differences(config, row_config(_AT, request)) else _AT.config
    return f"{name}-{_digest(json.dumps(build.training_fields(config), sort_keys=True))}"


def _digest(*texts: str) -> str:
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()[:8]


def _workdir(name: str, seed: int, request: Request) -> pathlib.Path:
    return request.out / request.data / "runs" / name / f"seed{seed}"


@functools.cache
def _evaluation_name(row: Row, setting: str, request: Request) -> str:
    fields = json.loads(build.to_json(row_config(row, request, setting)))
    return f"{row.config}-{_digest(run_name(row, request), json.dumps(fields['evaluation'], sort_keys=True))}"


def _evaluation_folder(row: Row, setting: str, seed: int, request: Request) -> pathlib.Path:
    """Named so that experiments/compare.py takes the folder above it for a run's."""
    name = _evaluation_name(row, setting, request)
    return request.out / request.data / "evaluations" / name / f"seed{seed}" / "evaluation"


def _check_overrides(request: Request) -> None:
    """Refuses overrides of what the rows themselves, or this module, set."""
    asked = {override.partition("=")[0] for override in request.overrides}
    if "seed" in asked:
        raise InputError("config.seed is set by --seeds; leave it out")
    for row in request.rows:
        own = {override.partition("=")[0] for override in (*row.overrides, *row.settings)}
        own |= {"train.start_from"} if row.start else set()
        if own & asked:
            raise InputError(f"config.{min(own & asked)} is what row {row.key!r} is about; leave it out")


def plan(request: Request) -> Plan:
    """What is to be trained and evaluated for the rows of a request.

    Raises:
      InputError: an override that a row sets itself, or that its config does not take.
    """
    _check_overrides(request)
    jobs: dict[pathlib.Path, Job] = {}
    folders: dict[str, dict[str, dict[int, pathlib.Path]]] = {}

    def training(row: Row, seed: int, key: str) -> tuple[pathlib.Path, tuple[str, ...]]:
        """Plans a row's run, after the one that it starts from; its folder and its own overrides."""
        workdir = _workdir(run_name(row, request), seed, request)
        start = training(_AT, seed, _AT.key)[0] if row.start else None
        more = (f"seed={seed}", f"train.start_from={start}" if start else "")
        if workdir not in jobs:
            jobs[workdir] = Job(key, seed, row_config(row, request, *more), workdir, start)
        return workdir, more

    for row in request.rows:
        settings = folders.setdefault(row.key, {setting: {} for setting in row.settings})
        for seed in request.seeds:
            workdir, more = training(row, seed, row.key)
            for setting, by_seed in settings.items():
                folder = by_seed[seed] = _evaluation_folder(row, setting, seed, request)
                if folder not in jobs:
                    config = row_config(row, request, *more, setting)
                    jobs[folder] = Job(row.key, seed, config, workdir, folder=folder)
    return Plan(list(jobs.values()), folders)


def commands(row: Row, request: Request) -> list[str]:
    """How to train and evaluate a row by hand, with the first seed."""
    seed, data = request.seeds[0], request.data
    name = run_name(row, request)
    workdir = _workdir(name, seed, request)
    started = commands(_AT, request)[:1] if row.start else []
    asked = [f"seed={seed}", *row.overrides, *request.overrides]
    if row.start:
        asked += [f"train.start_from={_workdir(run_name(_AT, request), seed, request)}"]
    train = ["train.py", f"--config=configs/{name.rpartition('-')[0]}.py:{data}", f"--workdir={workdir}"]
    lines = [[*train, *(f"--config.{override}" for override in asked)]]
    own = [each for each in (*PROTOCOL, *asked) if each.startswith("evaluation.")]
    evaluate = ["evaluate.py", f"--config=configs/{row.config}.py:{data}", f"--workdir={workdir}"]
    for setting in row.settings:
        folder = f"--folder={_evaluation_folder(row, setting, seed, request)}"
        lines.append([*evaluate, folder, *(f"--config.{each}" for each in (*own, setting) if each)])
    return started + [shlex.join(["python", f"experiments/{script}", *rest]) for script, *rest in lines]


# ---------------------------------------------------------------- the table


def assemble(request: Request, results: Mapping[str, Mapping[str, Mapping[int, Any]]]) -> dict[str, Any]:
    """The table as JSON, figures in percent.

    Args:
      request: what was asked for.
      results: content of results.json by row key, setting and seed; None where there is none.

    Returns:
      What the table is of, 'notes', and 'rows', each with 'published' and 'ours' by condition ('mean', 'std',
      'n' and 'values' over seeds), the same of the tail classes in 'ours_tail', 'difference' to the
      baseline's row, paired by seed, and on the paper's own data set 'ours_minus_published'.
    """
    table = TABLES[request.table]
    # A data set without figures of its own stands beside CIFAR-10-LT.
    has_own = any(published(table, row, request.data) for row in table.rows)
    source = request.data if has_own else "cifar10_lt"
    known = {row.key: published(table, row, source) for row in table.rows}
    chosen = {row.key: _best(results[row.key]) for row in request.rows}
    shown = {key: results[key][setting] for key, setting in chosen.items()}
    ours = {key: _by_seed(by_seed) for key, by_seed in shown.items()}
    rows = []
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
            "ours_tail": _statistics(_by_seed(shown[row.key], figure="tail")),
        }
        if len(row.settings) > 1:
            entry |= {"chosen": chosen[row.key], "chosen_among": list(row.settings)}
        if row.baseline != row.key and row.baseline in ours:
            those = ours[row.baseline]
            pairs = {name: _minus(values, those.get(name, {})) for name, values in ours[row.key].items()}
            entry["difference"] = {
                "to": row.baseline,
                "published": _minus(known[row.key], known[row.baseline]),
                "ours": _statistics(pairs),
            }
        if has_own:
            means = {name: figure["mean"] for name, figure in entry["ours"].items()}
            entry["ours_minus_published"] = _minus(means, known[row.key])
        rows.append(entry)
    found = [result for by_seed in shown.values() for result in by_seed.values() if result]
    made_with = {json.dumps({**r["meta"]["versions"], "device": r["meta"]["device"]}) for r in found}
    published_on = source if any(known.values()) else None
    return {
        "table": request.table,
        "title": table.title,
        "data": request.data,
        "seeds": list(request.seeds),
        "columns": list(table.columns),
        "published_on": published_on,
        "baseline": table.baseline,
        "made_with": [json.loads(versions) for versions in sorted(made_with)],
        "notes": _notes(request, published_on, found),
        "rows": rows,
    }


def _by_seed(results: Mapping[int, Any], figure: str = "accuracy") -> dict[str, dict[int, float]]:
    """A figure in percent by condition and seed."""
    values: dict[str, dict[int, float]] = {}
    for seed, result in results.items():
        for name, condition in (result["summary"]["conditions"] if result else {}).items():
            values.setdefault(name, {})[seed] = 100 * condition[figure]["value"]
    return values


def _best(by_setting: Mapping[str, Mapping[int, Any]]) -> str:
    """The setting with the highest mean of ``CHOSEN_BY``; of equal ones the first."""
    means = {
        setting: statistics.fmean(_by_seed(results).get(CHOSEN_BY, {}).values() or [-1.0])
        for setting, results in by_setting.items()
    }
    return max(means, key=means.__getitem__, default="")


def _statistics(by_seed: Mapping[str, Mapping[int, float]]) -> dict[str, dict[str, Any]]:
    """Mean, sample standard deviation, number and values, by condition."""

    def figures(values: list[float]) -> dict[str, Any]:
        std = round(statistics.stdev(values), 4) if len(values) > 1 else None
        return {"mean": round(statistics.fmean(values), 4), "std": std, "n": len(values), "values": values}

    return {
        name: figures([round(v, 4) for v in values.values()]) for name, values in by_seed.items() if values
    }


def _minus(these: Mapping[Any, float], those: Mapping[Any, float]) -> dict[Any, float]:
    return {key: round(value - those[key], 4) for key, value in these.items() if key in those}


def _notes(request: Request, published_on: str | None, found: Sequence[Any]) -> list[str]:
    table = TABLES[request.table]
    fields = json.loads(build.to_json(row_config(request.rows[0], request)))
    data = f"{DATA_SETS[request.data]}, {fields['data']['profile']} profile"
    if len({override for row in table.rows for override in row.overrides if "data.ratio" in override}) < 2:
        data += f", IR {1 / fields['data']['ratio']:g}"
    length = f"{fields['train']['epochs']} epochs"
    if fields["train"]["max_steps"]:
        length += f", but {fields['train']['max_steps']} steps at most"
    model = ", ".join([fields["model"].pop("name"), *filter(None, [printed(fields["model"])])])
    seeds = f"mean ± standard deviation over {len(request.seeds)} seeds, differences seed by seed"
    notes = [
        f"Ours: {data}; model {model}; {length}, where the row's config says nothing else; last checkpoint; "
        f"{seeds if len(request.seeds) > 1 else 'one seed'}."
    ]
    if found:
        meta, conditions = found[0]["meta"], list(found[0]["summary"]["conditions"])
        notes.append(
            f"Evaluation: {meta['n']} test images, {meta['norm']}, ε = {meta['epsilon']:g}; PGD-20, MIM-20 "
            f"and CW-20 with step {meta['step_size']:g}. Worst: right under every one of "
            f"{', '.join(map(display_name, conditions[:-1]))}. It is never above CW-20, whose steps do "
            "not depend on the scale of the logits, so a gain that is not seen there may be a fake one."
        )
    if published_on is not None:
        about = f"Paper (Wu et al., CVPR 2021): {DATA_SETS[published_on]}, WideResNet-34-10, ε = 0.031."
        if published_on != request.data:
            about += " Another problem than ours: compare the differences, not the levels."
        notes.append(about)
    if "robal_aa" in table.columns:
        notes.append("AA is APGD-CE and APGD-T together, two of the four attacks of AutoAttack.")
    if any(row.key in FAKE_GAINS for row in request.rows):
        notes.append("†: a fake gain, as the paper itself says; see its AA.")
    return [*notes, *filter(None, [table.note])]


def _heading(condition: str) -> str:
    """A condition's name in the paper's tables."""
    return "AA" if condition == "robal_aa" else display_name(condition)


def markdown(table: Mapping[str, Any]) -> str:
    """What :func:`assemble` gives, for people."""
    seeds, rows = len(table["seeds"]), table["rows"]
    on, own = table["published_on"], table["published_on"] == table["data"]
    sides = [(name, side) for name in table["columns"] for side in (("paper", "ours") if on else ("ours",))]
    sides.append(("worst", "ours"))
    skip = 0 if any(row["stage"] for row in rows) else 1

    def block(title: str, cell: Any, chosen: Iterable[Mapping[str, Any]], sides: Sequence[Any]) -> list[str]:
        header = ["Stage", "Row", *(f"{_heading(name)} {side}" for name, side in sides)]
        body = [[row["stage"], _label(row), *(cell(row, *side) for side in sides)] for row in chosen]
        return [f"## {title}", _aligned(header[skip:], [line[skip:] for line in body], left=2 - skip)]

    def level(row: Mapping[str, Any], name: str, side: str) -> str:
        if side == "ours":
            return _figure(row["ours"].get(name), seeds)
        mark = " †" if row["published_gain_is_fake"] and name == "pgd_20" else ""
        return _figure(row["published"].get(name), seeds) + mark

    def difference(row: Mapping[str, Any], name: str, side: str) -> str:
        figures = row["difference"]["ours" if side == "ours" else "published"]
        return _figure(figures.get(name), seeds, "+")

    def to_paper(row: Mapping[str, Any], name: str, _: str) -> str:
        return _figure(row["ours_minus_published"].get(name), seeds, "+")

    parts = [
        f"# RoBal table {table['table']} on {DATA_SETS[table['data']]}: {table['title']}",
        *block("Accuracy in percent", level, rows, sides),
    ]
    if compared := [row for row in rows if "difference" in row]:
        parts += block(f"Difference to {table['baseline']} in points", difference, compared, sides)
    if own:
        ours = [(name, "ours − paper") for name in table["columns"]]
        parts += block("Difference to the paper in points", to_paper, rows, ours)
    parts += ["## Notes", "\n".join(f"- {note}" for note in table["notes"])]
    parts += ["## Commands", f"By hand, with seed {table['seeds'][0]}:"]
    lines = [f"# {row['key']}\n" + "\n".join(row["commands"]) for row in rows]
    return "\n\n".join([*parts, "```bash\n" + "\n".join(lines) + "\n```"]) + "\n"


def _label(row: Mapping[str, Any]) -> str:
    return row["label"] + (f" (ours: {row['chosen'].rpartition('=')[2]})" if row.get("chosen") else "")


def _figure(figure: Any, seeds: int, sign: str = "") -> str:
    """'93.7 ± 0.4'; a published figure is a number, one of ours has more to it."""
    if figure is None:
        return "—"
    if isinstance(figure, float):
        return _one_decimal(figure, sign)
    spread = "" if figure["std"] is None else f" ± {_one_decimal(figure['std'])}"
    fewer = f" (n = {figure['n']})" if figure["n"] < seeds else ""
    return _one_decimal(figure["mean"], sign) + spread + fewer


def _one_decimal(value: float, sign: str = "") -> str:
    """28.15 is 28.2, as people round."""
    return f"{Decimal(str(value)).quantize(Decimal('0.1'), ROUND_HALF_UP) + 0:{sign}}"


def _aligned(header: Sequence[str], body: Sequence[Sequence[str]], left: int) -> str:
    """A Markdown table that is aligned as text too; the first ``left`` columns to the left."""
    widths = [max(map(len, column)) for column in zip(header, *body, strict=True)]

    def line(cells: Sequence[str]) -> str:
        padded = (
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
        )
        return "| " + " | ".join(padded) + " |"

    rule = ["-" * width if i < left else "-" * (width - 1) + ":" for i, width in enumerate(widths)]
    return "\n".join([line(header), line(rule), *map(line, body)])


# ---------------------------------------------------------------- configs/README.md


def configs_readme(folder: pathlib.Path) -> str:
    """The table of all config files, with what the paper published for them."""
    columns = ("clean", "pgd_20", "robal_aa")
    header = ["Config", "Row of the paper", *(f"{_heading(c)} {n}" for n in (10, 100) for c in columns)]
    body, others = [], []
    for path in sorted(folder.glob("*.py")):
        rows = [(n, row) for n in ("1", "2") for row in TABLES[n].rows if row.config == path.stem]
        if rows:
            labels = "; ".join(f"{n}: {row.label}" + f" ({row.stage})" * (n == "1") for n, row in rows)
            number, row = rows[-1]  # table 2 has both data sets, and agrees with table 1
            figures = [published(TABLES[number], row, data) for data in CIFAR]
            cells = [f"{of[c]:.2f}" if c in of else "—" for of in figures for c in columns]
            body.append([f"`{path.name}`", labels, *cells])
        else:
            about = ast.get_docstring(ast.parse(path.read_text())) or ""
            others.append(f"- `{path.name}`: {about.partition(chr(10))[0]}")
    tables = [_with_overrides(name) for name in ("3", "4")]
    return _README.format(
        table=_aligned(header, body, left=2), others="\n".join(others), tables="\n\n".join(tables)
    )


def _with_overrides(name: str) -> str:
    """The rows of a table whose configs stand in another one, with what they override."""
    table = TABLES[name]
    header = ["Row of the paper", "Config", *map(_heading, table.columns)]
    body = []
    for row in table.rows:
        figures = published(table, row, "cifar10_lt")
        if figures:
            settings = " or ".join(s.rpartition("=")[2] for s in row.settings if s)
            tried = [f"evaluation.tau_p={settings}"] if settings else []
            config = " ".join([f"{row.config}.py", *row.overrides, *tried])
            body.append(
                [f"{row.stage}: {row.label}", f"`{config}`", *(f"{figures[c]:.2f}" for c in table.columns)]
            )
    return f"Table {name}, {table.title} (CIFAR-10-LT):\n\n{_aligned(header, body, left=2)}"


_README = """\
# Configs

A method is a config file with the data set as argument, `configs/at.py:cifar10_lt`; its docstring has the
command. The figures are those of the RoBal paper, tables 1 and 2, in percent: WideResNet-34-10, last epoch,
CIFAR-10-LT IR 50 (10) and CIFAR-100-LT IR 10 (100); AA is APGD-CE and APGD-T together.
`experiments/reproduce.py` makes the paper's tables with these configs.

{table}

Without a row in tables 1 and 2:

{others}

{tables}

This file is made from `robal_jax/paper.py`:

    python -c "from robal_jax.tables import *; print(configs_readme(pathlib.Path('configs')), end='')"
"""
