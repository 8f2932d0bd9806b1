"""The paper's tables as data, the runs that a table needs, and the table that their results make.

A row is a config and what it changes there. Rows of the same training share one run, in whatever tables they
stand: a run's folder is named by a digest of what `build.differences` compares, an evaluation's by that and
the config's section ``evaluation``. Nothing here trains or evaluates; experiments/reproduce.py does.
"""

import ast
import functools
import hashlib
import json
import pathlib
import shlex
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from decimal import ROUND_HALF_UP, Decimal
from typing import Any, NamedTuple

from robal_jax import build, cli
from robal_jax.errors import InputError
from robal_jax.reporting import display_name, printed

DATA_SETS = {"digits_lt": "digits_lt", "cifar10_lt": "CIFAR-10-LT", "cifar100_lt": "CIFAR-100-LT"}
_CIFAR = ("cifar10_lt", "cifar100_lt")
CHOSEN_BY = "pgd_20"  # the condition that decides between the settings of a row
FAKE_GAINS = ("cdt_post", "tau_norm")  # rows whose gain under PGD the paper itself calls fake


class Row(NamedTuple):
    """A row of a table.

    Attributes:
      key: its name on the command line.
      stage: heading of the rows that belong together.
      label: what the paper calls it.
      config: name of the config file.
      cifar10: published figures on CIFAR-10-LT, in the order of the table's columns.
      cifar100: the same on CIFAR-100-LT.
      overrides: what it changes in the config, ``loss.margin=0.2``.
      settings: overrides that are tried in the evaluation; the best by ``CHOSEN_BY`` is shown. '' is none.
      attack_loss: a config whose loss the attack inside of training maximises; '' for the config's own.
      start: a config whose run, of the same seed, is fine-tuned; '' for none.
      baseline: key of the row that it is compared with.
      data: data sets that have this row.
    """

    key: str
    stage: str
    label: str
    config: str
    cifar10: tuple[float, ...] = ()
    cifar100: tuple[float, ...] = ()
    overrides: tuple[str, ...] = ()
    settings: tuple[str, ...] = ("",)
    attack_loss: str = ""
    start: str = ""
    baseline: str = "at"
    data: tuple[str, ...] = tuple(DATA_SETS)


class Table(NamedTuple):
    """A table of the paper.

    Attributes:
      title: what it shows.
      columns: conditions, as published; 'worst' of ours is added to them.
      baseline: what rows are compared with, in words.
      rows: all of them.
      note: what a reader must know.
    """

    title: str
    columns: tuple[str, ...]
    baseline: str
    rows: tuple[Row, ...]
    note: str = ""


# ---------------------------------------------------------------- the tables

_TABLE_1 = (
    Row("at", "train", "Vanilla FC", "at", (62.33, 29.30, 28.15)),
    Row("cos", "train", "Vanilla Cos", "cos", (56.59, 29.38, 27.23)),
    Row("ldam", "train", "Class-aware margin (LDAM)", "ldam", (63.24, 29.81, 28.70)),
    Row("he", "train", "Cosine with margin (HE)", "he", (58.47, 31.73, 28.45)),
    Row("cdt", "train", "Class-aware temperature (CDT)", "cdt", (73.11, 30.12, 28.62)),
    Row("la", "train", "Class-aware bias (logit adjustment)", "la", (74.46, 32.45, 30.55)),
    Row("focal", "train", "Hard-example mining (focal)", "focal", (62.07, 30.73, 28.12)),
    Row("rs", "train", "Re-sampling", "rs", (58.62, 25.06, 24.25)),
    Row("rw", "train", "Re-weighting (CB-focal)", "rw", (64.33, 34.53, 29.01)),
    Row("one_epoch_rs", "fine-tune", "One-epoch RS", "one_epoch_rs", (70.88, 29.81, 28.59), start="at"),
    Row("one_epoch_rw", "fine-tune", "One-epoch RW", "one_epoch_rw", (71.72, 32.34, 28.25), start="at"),
    Row("lws", "fine-tune", "Learnable classifier scale (LWS)", "lws", (69.63, 28.81, 27.99), start="at"),
    Row("cdt_post", "inference", "Classifier re-scaling (CDT-post)", "cdt_post", (73.84, 39.05, 28.23)),
    Row("tau_norm", "inference", "Classifier normalisation (τ-norm)", "tau_norm", (72.70, 36.57, 29.77)),
    Row("la_post", "inference", "Class-aware bias (LA-post)", "la_post", (74.25, 31.95, 30.45)),
    Row("tde", "inference", "Feature disentangling (TDE)", "tde", (71.16, 32.69, 30.48)),
)

_FIGURES_2 = {
    "plain": ((77.16, 7.01, 0.00, 0.00, 0.00, 0.00), (62.29, 3.94, 0.00, 0.00, 0.00, 0.00)),
    "at": ((62.33, 33.57, 29.30, 30.02, 30.31, 28.15), (48.96, 21.06, 17.26, 17.80, 17.65, 16.26)),
    "trades": ((54.29, 32.80, 30.20, 30.53, 29.58, 28.94), (43.71, 23.06, 21.13, 21.42, 19.49, 18.68)),
    "he": ((58.47, 35.17, 31.73, 32.26, 29.96, 28.45), (48.63, 23.06, 19.56, 20.28, 19.20, 17.60)),
    "mma": ((61.51, 36.40, 29.29, 30.38, 29.59, 25.91), (54.98, 19.65, 13.52, 13.98, 12.35, 14.54)),
    "avmixup": ((66.97, 33.90, 28.40, 29.67, 26.43, 24.39), (52.45, 23.28, 19.04, 20.78, 14.82, 12.60)),
    "robal_n": ((75.52, 40.04, 33.50, 34.57, 33.68, 31.72), (51.63, 22.81, 19.01, 19.50, 19.42, 18.16)),
    "robal_r": ((74.51, 40.55, 33.87, 34.92, 34.12, 32.04), (50.38, 23.59, 19.48, 20.13, 20.16, 18.69)),
}
_LABELS_2 = ("Plain", "AT", "TRADES", "HE", "MMA", "AVmixup", "RoBal-N", "RoBal-R")
_TABLE_2 = tuple(
    Row(key, "", label, key, *figures)
    for (key, figures), label in zip(_FIGURES_2.items(), _LABELS_2, strict=True)
)

_TAU_P = tuple(f"evaluation.tau_p={tau}" for tau in ("0", "0.5", "1", "1.5", "2"))


def _ablation(
    key: str, stage: str, label: str, m: float, tau_m: float, tau_b: float, *cifar10: tuple[float, float]
) -> Iterator[Row]:
    """A training of table 3 as it ends and, with two pairs of figures, with the best prior adjustment too."""
    loss = (f"loss.margin={m}", f"loss.tau_m={tau_m}", f"loss.tau_b={tau_b}")
    yield Row(key, stage, label, "robal_n", cifar10[0], (), (*loss, _TAU_P[0]), baseline="margin_0")
    if cifar10[1:]:
        best = f"{label}, best τ_p"
        yield Row(f"{key}_best", stage, best, "robal_n", cifar10[1], (), loss, _TAU_P, baseline="margin_0")


_TABLE_3 = (
    *_ablation("margin_0", "τ_b = τ_m = 0", "m₀ = 0", 0.0, 0.0, 0.0, (63.51, 28.47), (75.98, 30.46)),
    *_ablation("margin_0.1", "τ_b = τ_m = 0", "m₀ = 0.1", 0.1, 0.0, 0.0, (63.17, 29.13), (75.51, 31.24)),
    *_ablation("margin_0.2", "τ_b = τ_m = 0", "m₀ = 0.2", 0.2, 0.0, 0.0, (60.60, 29.04), (74.83, 32.04)),
    *_ablation("margin_0.3", "τ_b = τ_m = 0", "m₀ = 0.3", 0.3, 0.0, 0.0, (56.59, 28.63), (71.31, 31.28)),
    *_ablation("bias_0.5", "m₀ = 0.1, τ_m = 0", "τ_b = 0.5", 0.1, 0.0, 0.5, (68.58, 30.55), (75.77, 30.94)),
    *_ablation("bias_1", "m₀ = 0.1, τ_m = 0", "τ_b = 1", 0.1, 0.0, 1.0, (73.93, 31.52), (75.42, 31.61)),
    *_ablation("bias_1.5", "m₀ = 0.1, τ_m = 0", "τ_b = 1.5", 0.1, 0.0, 1.5, (74.67, 30.95), (74.67, 30.95)),
    *_ablation("tau_m_-0.3", "m₀ = 0.1, τ_b − τ_m = 1.2", "τ_m = −0.3", 0.1, -0.3, 0.9, (74.88, 30.66)),
    *_ablation("tau_m_0", "m₀ = 0.1, τ_b − τ_m = 1.2", "τ_m = 0", 0.1, 0.0, 1.2, (75.08, 31.79)),
    *_ablation("tau_m_0.3", "m₀ = 0.1, τ_b − τ_m = 1.2", "τ_m = 0.3", 0.1, 0.3, 1.5, (74.51, 32.04)),
    *_ablation("tau_m_0.6", "m₀ = 0.1, τ_b − τ_m = 1.2", "τ_m = 0.6", 0.1, 0.6, 1.8, (71.84, 31.41)),
)


def _at_ratio(ir: int, label: str, config: str, *cifar10: float) -> Row:
    # Of the 104 digits of the head class IR 100 would leave one image to two classes; IR 5 replaces it.
    data: tuple[str, ...] = {100: _CIFAR, 5: ("digits_lt",)}.get(ir, tuple(DATA_SETS))
    ratio = (f"data.ratio={1 / ir:g}",)
    row = Row(f"{config}_{ir}", f"IR {ir}", label, config, cifar10, overrides=ratio, data=data)
    return row._replace(baseline=f"at_{ir}")


_TABLE_4 = (
    _at_ratio(100, "AT", "at", 56.72, 27.27, 27.87, 27.80, 25.97),
    _at_ratio(100, "TRADES", "trades", 45.67, 26.97, 27.29, 26.53, 25.93),
    _at_ratio(100, "RoBal", "robal_n", 68.07, 30.35, 31.25, 30.55, 28.97),
    _at_ratio(50, "AT", "at", 62.33, 29.30, 29.72, 30.31, 28.15),
    _at_ratio(50, "TRADES", "trades", 54.29, 30.20, 30.53, 29.58, 28.94),
    _at_ratio(50, "RoBal", "robal_n", 73.93, 34.24, 35.37, 34.58, 32.70),
    _at_ratio(20, "AT", "at", 74.09, 33.59, 34.65, 34.27, 32.02),
    _at_ratio(20, "TRADES", "trades", 65.17, 34.65, 35.29, 34.07, 33.06),
    _at_ratio(20, "RoBal", "robal_n", 78.49, 39.17, 40.44, 39.38, 37.58),
    _at_ratio(10, "AT", "at", 79.45, 37.11, 37.93, 38.31, 35.51),
    _at_ratio(10, "TRADES", "trades", 72.92, 39.15, 39.95, 38.41, 37.33),
    _at_ratio(10, "RoBal", "robal_n", 81.20, 40.22, 41.75, 40.91, 38.90),
    _at_ratio(5, "AT", "at"),
    _at_ratio(5, "TRADES", "trades"),
    _at_ratio(5, "RoBal", "robal_n"),
)

_TABLE_S6 = (
    Row("at", "", "Cross entropy (AT)", "at"),
    *(
        Row(f"{config}_{place}", label, place, file, attack_loss=inside)
        for label, config in (
            ("Class-aware margin (LDAM)", "ldam"),
            ("Class-aware temperature (CDT)", "cdt"),
            ("Class-aware bias (logit adjustment)", "la"),
            ("Hard-example mining (focal)", "focal"),
            ("Re-weighting (CB-focal)", "rw"),
        )
        for place, file, inside in (
            ("inside", "at", config),
            ("outside", config, ""),
            ("both", config, config),
        )
    ),
)

_TABLE_S7 = (
    Row("at", "", "None (AT)", "at"),
    Row("kl", "", "Divergence of predictions (KL)", "alp", overrides=("objective.regulariser=kl",)),
    Row("alp", "", "Distance of probabilities (ALP)", "alp"),
    Row("alp_logits", "", "Distance of logits", "alp", overrides=("objective.regulariser=alp_logits",)),
    Row("norm", "", "Norm of natural logits", "alp", overrides=("objective.regulariser=norm",)),
    Row("mart", "", "MART", "mart"),
)

TABLES = {
    "1": Table("long-tail methods with AT", ("clean", "pgd_20", "aa"), "Vanilla FC", _TABLE_1),
    "2": Table(
        "methods of adversarial training",
        ("clean", "fgsm", "pgd_20", "mim_20", "cw_20", "aa"),
        "AT",
        _TABLE_2,
        "HE and, on CIFAR-10-LT, RoBal-R are attacked on unscaled cosines, as released, where gradient "
        "attacks are weaker: look at `--config.evaluation.logit_scale=10` too. The paper does not state the "
        "settings of MMA.",
    ),
    "3": Table(
        "ablation of RoBal",
        ("clean", "aa"),
        "m₀ = 0, τ_p = 0",
        _TABLE_3,
        "Where the row does not say 'best', τ_p is 0. Best τ_p: of 0, 0.5, 1, 1.5 and 2 the one with the "
        "highest mean PGD-20 accuracy on the test set. That is a choice on the test set, as in the paper, so "
        "its gain is an optimistic one.",
    ),
    "4": Table(
        "imbalance ratios",
        ("clean", "pgd_20", "mim_20", "cw_20", "aa"),
        "AT at the same IR",
        _TABLE_4,
        "The paper's row is called RoBal, its exact setting is not stated; here it is RoBal-N.",
    ),
    "S6": Table(
        "a long-tail loss inside of the attack, outside of it, or both",
        ("clean", "pgd_20"),
        "cross entropy at both places",
        _TABLE_S6,
        "The paper's figures of this table were not at hand.",
    ),
    "S7": Table(
        "regularisers",
        ("clean", "pgd_20"),
        "AT",
        _TABLE_S7,
        "Neither rows nor figures of the paper's table were at hand. The composition is ours: the "
        "regularisers of the released code, on a linear head with the weights of `configs/alp.py`, and MART.",
    ),
}


def rows_of(name: str, data: str, keys: Sequence[str] = ()) -> tuple[Row, ...]:
    """The rows of a table that a data set has, or those of them that are named.

    Raises:
      InputError: no such table or row.
    """
    if name not in TABLES:
        raise InputError(f"unknown table {name!r}; known: {', '.join(TABLES)}")
    rows = {row.key: row for row in TABLES[name].rows if data in row.data}
    unknown = [key for key in keys if key not in rows]
    if unknown:
        raise InputError(f"table {name} on {data} has no row {unknown[0]!r}; its rows: {', '.join(rows)}")
    return tuple(row for row in rows.values() if not keys or row.key in keys)


def published(table: Table, row: Row, data: str) -> dict[str, float]:
    """A row's published figures on a data set by condition, in percent."""
    figures = {"cifar10_lt": row.cifar10, "cifar100_lt": row.cifar100}.get(data)
    return dict(zip(table.columns, figures, strict=True)) if figures else {}


# ---------------------------------------------------------------- what is to be done


class Request(NamedTuple):
    """What the user wants made.

    Attributes:
      table: its name.
      data: the data set.
      seeds: of the runs of every row.
      rows: as :func:`rows_of` gives them.
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


def row_config(row: Row, request: Request, *more: str) -> Any:
    """The resolved config of a row; ``more`` are overrides.

    Raises:
      InputError: an override that the config does not take.
    """
    plain = cli.load_config(f"{request.configs / row.config}.py:{request.data}")
    if row.attack_loss:
        other = cli.load_config(f"{request.configs / row.attack_loss}.py:{request.data}")
        with plain.unlocked():
            plain.update({"attack": {"loss": json.loads(build.to_json(other))["loss"]}})
    overrides = filter(None, (*row.overrides, *request.overrides, *more))
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
    return f"{name}-{_digest(*build.differences(config, type(config)()))}"


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
    if row.attack_loss:  # a whole section cannot be replaced on the command line
        flags = [f"--table={request.table}", f"--data={data}", "--seeds=1", f"--out={request.out}"]
        flags += [f"--rows={row.key}"] + [f"--config.{override}" for override in request.overrides]
        return [shlex.join(["python", "experiments/reproduce.py", *flags])]
    name = run_name(row, request)
    workdir = _workdir(name, seed, request)
    started = commands(_AT, request)[:1] if row.start else []
    asked = [f"seed={seed}", *row.overrides, *request.overrides]
    if row.start:
        asked += [f"train.start_from={_workdir(run_name(_AT, request), seed, request)}"]
    train = ["train.py", f"--config=configs/{name.rpartition('-')[0]}.py:{data}", f"--workdir={workdir}"]
    lines = [[*train, *(f"--config.{override}" for override in asked)]]
    # In a config evaluation.epsilon follows threat.epsilon; here it must be said.
    own = [each.replace("threat", "evaluation") for each in asked if each.startswith("threat.epsilon=")]
    own += [each for each in asked if each.startswith("evaluation.")]
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
        if row.attack_loss:
            entry["attack_loss_of"] = f"configs/{row.attack_loss}.py:{request.data}"
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
    if "aa" in table.columns:
        notes.append("AA is APGD-CE and APGD-T together; not implemented here yet, so ours is —.")
    if any(row.key in FAKE_GAINS for row in request.rows):
        notes.append("†: a fake gain, as the paper itself says; see its AA.")
    return [*notes, *filter(None, [table.note])]


def markdown(table: Mapping[str, Any]) -> str:
    """What :func:`assemble` gives, for people."""
    seeds, rows = len(table["seeds"]), table["rows"]
    on, own = table["published_on"], table["published_on"] == table["data"]
    sides = [(name, side) for name in table["columns"] for side in (("paper", "ours") if on else ("ours",))]
    sides.append(("worst", "ours"))
    skip = 0 if any(row["stage"] for row in rows) else 1

    def block(title: str, cell: Any, chosen: Iterable[Mapping[str, Any]], sides: Sequence[Any]) -> list[str]:
        header = ["Stage", "Row", *(f"{display_name(name)} {side}" for name, side in sides)]
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
    columns = ("clean", "pgd_20", "aa")
    header = ["Config", "Row of the paper", *(f"{display_name(c)} {n}" for n in (10, 100) for c in columns)]
    body, others = [], []
    for path in sorted(folder.glob("*.py")):
        rows = [(n, row) for n in ("1", "2") for row in TABLES[n].rows if row.config == path.stem]
        if rows:
            labels = "; ".join(f"{n}: {row.label}" + f" ({row.stage})" * (n == "1") for n, row in rows)
            number, row = rows[-1]  # table 2 has both data sets, and agrees with table 1
            figures = [published(TABLES[number], row, data) for data in _CIFAR]
            cells = [f"{of[c]:.2f}" if c in of else "—" for of in figures for c in columns]
            body.append([f"`{path.name}`", labels, *cells])
        else:
            about = ast.get_docstring(ast.parse(path.read_text())) or ""
            others.append(f"- `{path.name}`: {about.partition(chr(10))[0]}")
    return _README.format(table=_aligned(header, body, left=2), others="\n".join(others))


_README = """\
# Configs

A method is a config file with the data set as argument, `configs/at.py:cifar10_lt`; its docstring has the
command. The figures are those of the RoBal paper, tables 1 and 2, in percent: WideResNet-34-10, last epoch,
CIFAR-10-LT IR 50 (10) and CIFAR-100-LT IR 10 (100); AA is APGD-CE and APGD-T together.
`experiments/reproduce.py` makes the paper's tables with these configs.

{table}

Without a row in tables 1 and 2:

{others}

This file is made from `robal_jax/tables.py`:

    python -c "from robal_jax.tables import *; print(configs_readme(pathlib.Path('configs')), end='')"
"""
