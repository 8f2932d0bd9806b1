"""The paper's tables: their data, the plan of runs, the assembled table, and experiments/reproduce.py."""

import itertools
import json
import pathlib
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT

from experiments import reproduce
from experiments.paper.catalogue import TABLES, published, rows_of
from experiments.paper.configs_readme import configs_readme
from experiments.paper.cost import passes, seconds
from experiments.paper.followups import WITHOUT_TABLE
from experiments.paper.plan import Job, Request, commands, make_plan, row_config, run_name
from experiments.paper.rows import DATA_SETS
from experiments.paper.table import assemble, markdown
from robal_jax import builder, cli
from robal_jax.devices import hosts
from robal_jax.errors import DivergedError, InputError
from robal_jax.reporting.results import Results
from robal_jax.storage.workdir import data_digest

CONFIGS = ROOT / "configs"
EVERY = [
    (name, data)
    for name, table in TABLES.items()
    for data in DATA_SETS
    if any(data in r.data for r in table.rows)
]


def request_for(table, *keys, data="digits_lt", seeds=(0, 1, 2), overrides=(), out="out"):
    rows = rows_of(table, data, keys)
    return Request(table, data, seeds, rows, overrides, pathlib.Path(out), CONFIGS)


def trainings(plan):
    return [job for job in plan.jobs if job.folder is None]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "data"), EVERY)
def test_rows(name, data):
    """Configs load, overrides apply, and figures and baselines are where they should be."""
    table, rows = TABLES[name], rows_of(name, data)
    keys = [row.key for row in rows]
    assert len(set(keys)) == len(keys)
    request = request_for(name, data=data)
    for row in rows:
        assert row.baseline in keys
        for setting in row.settings:
            row_config(row, request, setting)
        for figures in (row.cifar10, row.cifar100):
            assert len(figures) in (0, len(table.columns))
            assert all(0 <= figure <= 100 for figure in figures)


def test_number_of_rows():
    counts = {name: len(TABLES[name].rows) for name in TABLES}
    assert counts == {
        "1": 16,
        "2": 8,
        "3": 18,
        "4": 15,
        "S6": 16,
        "S7": 6,
        "followups": 25,
        "augmentation": 18,
        "small": 10,
    }


def test_tables_agree_where_they_show_the_same():
    """Table 1 and table 2 have AT and HE in common, tables 2 and 4 the AT of IR 50 but for one figure."""
    figures = {
        (name, row.key): published(TABLES[name], row, "cifar10_lt")
        for name in ("1", "2", "4")
        for row in TABLES[name].rows
    }
    for key in ("at", "he"):
        assert figures["1", key].items() <= figures["2", key].items()
    differing = figures["4", "at_50"].items() - figures["2", "at"].items()
    assert differing == {("mim_20", 29.72)}  # 30.02 in table 2


def test_the_loss_of_the_attack():
    rows = rows_of("S6", "digits_lt", ["cdt_inside", "cdt_outside", "cdt_both"])
    configs = [row_config(row, request_for("S6")) for row in rows]
    cdt, entropy = "class_temperature", "cross_entropy"
    places = [(c.attack.loss.name, c.loss.name) for c in configs]
    assert places == [(cdt, entropy), (entropy, cdt), (cdt, cdt)]


def test_the_readme_of_the_configs_is_up_to_date():
    text = (CONFIGS / "README.md").read_text()
    assert text == configs_readme(CONFIGS)
    lines = {
        path.name: next(x for x in text.splitlines() if f"`{path.name}`" in x)
        for path in CONFIGS.glob("*.py")
    }
    for name in ("1", "2"):
        for row in TABLES[name].rows:
            for data in ("cifar10_lt", "cifar100_lt"):
                figures = published(TABLES[name], row, data)
                shown = [f"{figures[c]:.2f}" for c in ("clean", "pgd_20", "robal_aa") if figures]
                assert all(f" {figure} |" in lines[f"{row.config}.py"] for figure in shown)
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
    for row in (*TABLES["followups"].rows, *TABLES["augmentation"].rows, *WITHOUT_TABLE):
        for each in row.elsewhere:
            config, figures = f"`{row.config}.py`: ", [each.network, each.pgd, each.aa]
            assert any(  # the same figures stand once, with the fuller words for their data
                line[0].startswith(config)
                and line[2].startswith(each.data)
                and [line[1], *line[-2:]] == figures
                for line in cells
                if len(line) > 4
            )


@pytest.mark.slow
def test_table_1_shares_runs():
    plan = make_plan(request_for("1"))
    assert len(trainings(plan)) == 3 * 13
    assert len(plan.jobs) == 3 * (13 + 16)
    at, lws, post = (plan.folders[key][""] for key in ("at", "lws", "la_post"))
    runs = {job.folder: job for job in plan.jobs if job.folder is not None}
    for seed in range(3):
        assert runs[post[seed]].workdir == runs[at[seed]].workdir
        tuned = next(job for job in trainings(plan) if job.workdir == runs[lws[seed]].workdir)
        assert tuned.start == runs[at[seed]].workdir
        assert tuned.config.train.start_from == str(tuned.start)
        assert tuned.config.seed == runs[post[seed]].config.seed == seed
        assert runs[post[seed]].config.evaluation.tau_p == 1.0
        assert runs[at[seed]].config.evaluation.tau_p == 0.0


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, data in EVERY if data == "digits_lt"])
def test_jobs_come_after_what_they_need(name):
    done = set()
    for job in make_plan(request_for(name, seeds=(0,))).jobs:
        if job.folder is None:
            assert job.start is None or job.start in done
            assert job.workdir not in done
            done.add(job.workdir)
        else:
            assert job.workdir in done


@pytest.mark.slow
def test_a_fine_tuning_alone_brings_the_run_it_starts_from():
    plan = make_plan(request_for("1", "lws", seeds=(0,)))
    assert [job.key for job in plan.jobs] == ["at", "lws", "lws"]
    full = make_plan(request_for("1"))
    assert {job.workdir for job in plan.jobs} <= {job.workdir for job in full.jobs}


def test_tables_share_runs():
    keys = {
        "1": ("at", "tau_norm", "ldam"),
        "2": ("at", "robal_n"),
        "3": ("tau_m_0", "margin_0.1", "margin_0.1_best"),
        "4": ("at_20", "robal_n_20"),
        "S6": ("at", "ldam_outside", "ldam_both"),
    }
    requests = [request_for(table, *keys[table]) for table in keys]
    names = {(r.table, row.key): run_name(row, r) for r in requests for row in r.rows}
    at = names["1", "at"]
    assert at == names["2", "at"] == names["1", "tau_norm"] == names["4", "at_20"] == names["S6", "at"]
    assert names["2", "robal_n"] == names["3", "tau_m_0"] == names["4", "robal_n_20"]
    assert names["1", "ldam"] == names["S6", "ldam_outside"] != names["S6", "ldam_both"]
    assert names["3", "margin_0.1"] == names["3", "margin_0.1_best"]


def test_the_grid_of_table_3_shares_evaluations():
    plan = make_plan(request_for("3", "margin_0", "margin_0_best", seeds=(0,)))
    assert len(trainings(plan)) == 1
    assert len(plan.jobs) == 1 + 5
    grid = plan.folders["margin_0_best"]
    assert list(grid) == [f"evaluation.tau_p={tau}" for tau in ("0", "0.5", "1", "1.5", "2")]
    assert plan.folders["margin_0"][""] == grid["evaluation.tau_p=0"]


def test_folders_tell_settings_apart():
    def folders(*overrides):
        jobs = make_plan(request_for("1", "at", seeds=(0,), overrides=overrides)).jobs
        return jobs[0].workdir, jobs[1].folder

    training, evaluation = folders()
    assert folders("train.epochs=2")[0] != training
    other = folders("evaluation.logit_scale=2.0")
    assert other[0] == training
    assert other[1] != evaluation


@pytest.mark.parametrize(
    ("table", "override", "message"),
    [
        ("1", "seed=3", "--seeds"),
        ("1", "train.start_from=x", "'one_epoch_rs'"),
        ("4", "data.ratio=0.1", "'at_50'"),
        ("3", "evaluation.tau_p=1", "'margin_0'"),
        ("1", "loss.margin=0.1", "row 'at' of table 1: loss 'cross_entropy' takes no 'margin'"),
        ("1", "attack.steps=0", "row 'at' of table 1: config.attack.steps is 0"),
    ],
)
def test_overrides_that_cannot_be(table, override, message):
    with pytest.raises(InputError, match=message):
        make_plan(request_for(table, overrides=(override,)))


@pytest.mark.slow
def test_further_evaluations_of_every_run():
    rows = ("at", "robal_n", "la")
    overrides = ("evaluation.examples=20",)
    plan = make_plan(request_for("small", *rows, data="cifar10_lt", seeds=(0, 1), overrides=overrides))
    ran = [(job.key, job.seed) for job in trainings(plan)]
    assert sorted(ran) == [("at", 0), ("at", 1), ("la", 0), ("robal_n", 0), ("robal_n", 1)]
    by_folder = {job.folder: (place, job) for place, job in enumerate(plan.jobs) if job.folder}
    assert len(by_folder) == 4 * len(ran)
    for (key, seed), name in itertools.product(ran, ("autoattack", "torchattacks", "best")):
        place, job = by_folder[plan.further[key][name][seed]]
        settings = job.config.evaluation
        assert settings.examples == 20  # what the user asks for counts
        assert job.config.train.select == ("best" if name == "best" else "last")
        version = {"autoattack": "standard", "best": "robal_aa"}.get(name, name)
        assert settings.autoattack == version
        needed = [job.workdir]
        if name == "autoattack":
            other = "robal_n" if key == "at" else "at"
            needed.append(next(j.workdir for j in trainings(plan) if (j.key, j.seed) == (other, seed)))
            assert settings.audit.surrogate == str(needed[1])
            assert job.surrogate == needed[1]
        assert {j.workdir for j in plan.jobs[:place] if j.folder is None} >= set(needed)


def test_commands():
    request = request_for("1", "lws", "la_post", overrides=("threat.epsilon=0.05",))
    lws, post = (commands(row, request) for row in request.rows)
    assert [line.split()[1] for line in lws] == [
        f"experiments/{x}.py" for x in ("train", "train", "evaluate")
    ]
    assert "--config=configs/at.py:digits_lt" in lws[0]
    workdir = next(word for word in lws[0].split() if word.startswith("--workdir=")).partition("=")[2]
    assert f"--config.train.start_from={workdir}" in lws[1]
    assert post[0] == lws[0]
    assert "--config=configs/la_post.py:digits_lt" in post[1]
    assert f"--workdir={workdir}" in post[1]


def test_commands_of_further_evaluations():
    request = request_for("small", "at", data="cifar10_lt", overrides=("evaluation.audit.examples=10",))
    first, *evaluations = commands(request.rows[0], request)
    assert "train.py" in first and len(evaluations) == 4
    folders = set()
    for line in evaluations:
        fields = [word.partition("=")[0] for word in line.split() if word.startswith("--config.")]
        assert len(set(fields)) == len(fields)  # the command line refuses a field with two values
        assert "--config.evaluation.audit.examples=10" in line
        folders.add(next(word for word in line.split() if word.startswith("--folder=")))
    assert len(folders) == 4
    assert [("surrogate" in line, "select=best" in line) for line in evaluations] == [
        (False, False), (True, False), (False, False), (False, True),
    ]  # fmt: skip


def result(**percent):
    """Results in which every condition has less accuracy in the tail by ten points, in the head more."""
    conditions = {
        name: {
            figure: {"value": (value + more) / 100}
            for figure, more in {"accuracy": 0, "head": 5, "medium": 0, "tail": -10}.items()
        }
        for name, value in percent.items()
    }
    meta = {
        "n": 700,
        "main_attack": "pgd_20",
        "norm": "L-infinity",
        "epsilon": 0.1,
        "step_size": 0.0125,
        "versions": {"jax": "1"},
        "device": "cpu",
        "date": "2026-01-01",
    }
    return Results(meta, {"conditions": conditions, "groups": {"head": [0], "medium": [1], "tail": [2]}})


def test_figures_over_seeds():
    request = request_for("1", "at", "ldam", "cdt_post", data="cifar10_lt")
    results = {
        "at": {
            "": {0: result(clean=80, pgd_20=50, worst=40), 1: result(clean=84, pgd_20=52, worst=42), 2: None}
        },
        "ldam": {
            "": {0: result(clean=81, pgd_20=52, worst=43), 1: result(clean=87, pgd_20=53, worst=46), 2: None}
        },
        "cdt_post": {"": dict.fromkeys(range(3))},
    }
    table = assemble(request, results)
    at, ldam, post = table["rows"]
    assert at["ours"]["clean"] == {"mean": 82.0, "std": 2.8284, "n": 2, "values": [80.0, 84.0]}
    assert at["ours_by_group"]["tail"]["pgd_20"]["values"] == [40.0, 42.0]
    assert "difference" not in at
    assert ldam["difference"]["to"] == "at"
    assert ldam["difference"]["published"] == {"clean": 0.91, "pgd_20": 0.51, "robal_aa": 0.55}
    assert ldam["difference"]["ours"]["clean"] == {"mean": 2.0, "std": 1.4142, "n": 2, "values": [1.0, 3.0]}
    assert ldam["ours_minus_published"]["clean"] == 20.76
    assert post["ours"] == post["difference"]["ours"] == {}
    assert table["published_on"] == "cifar10_lt"
    assert "date" not in json.dumps(table)

    lines = [[cell.strip() for cell in x.split("|")[1:-1]] for x in markdown(table).splitlines() if "|" in x]
    header, _, *levels = lines[:5]
    assert header[2:] == [
        "Clean paper",
        "Clean ours",
        "PGD-20 paper",
        "PGD-20 ours",
        "AA paper",
        "AA ours",
        "Worst ours",
        "PGD-20 head",
        "PGD-20 medium",
        "PGD-20 tail",
    ]
    assert levels[1][2:5] == ["63.2", "84.0 ± 4.2 (n = 2)", "29.8"]
    assert levels[0][-3:] == ["56.0 ± 1.4 (n = 2)", "51.0 ± 1.4 (n = 2)", "41.0 ± 1.4 (n = 2)"]
    assert levels[2][2:] == ["73.8", "—", "39.1 †", "—", "28.2", "—", "—", "—", "—", "—"]
    assert lines[7][2:6] == ["+0.9", "+2.0 ± 1.4 (n = 2)", "+0.5", "+1.5 ± 0.7 (n = 2)"]


def test_runs_without_a_tail_have_a_table():
    """Classes with equal numbers of training images are one group."""
    found = result(clean=80, pgd_20=50, worst=40)
    for condition in found.summary["conditions"].values():
        condition["all"] = condition.pop("tail")
    (row,) = assemble(request_for("1", "at", seeds=(0,)), {"at": {"": {0: found}}})["rows"]
    assert row["ours"]["clean"]["values"] == [80.0]
    assert row["ours_by_group"]["tail"] == {}


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, data in EVERY if data == "digits_lt"])
def test_published_figures_are_shown_beside_the_same_data_only(name):
    request = request_for(name, seeds=(0,))
    one = {0: result(clean=80, pgd_20=50, robal_aa=40, worst=40)}
    results = {row.key: dict.fromkeys(row.settings, one) for row in request.rows}
    table = assemble(request, results)
    text = markdown(table)
    assert table["published_on"] is None
    assert not any(row["published"] for row in table["rows"])
    assert " paper |" not in text
    assert "CIFAR" not in text.partition("## Notes")[0].partition("## Published")[0]
    assert "| AA head | AA medium | AA tail |" in " ".join(text.split())
    assert "AA is APGD-CE and APGD-T together" in text


@pytest.mark.parametrize(
    ("measured", "columns"),
    [
        ({"clean": 80, "pgd_20": 50, "worst": 49}, "PGD-20 head | PGD-20 medium | PGD-20 tail"),
        (
            {"clean": 80, "pgd_20": 50, "robal_aa": 48, "autoattack": 47, "worst": 47},
            "AutoAttack | Worst | AutoAttack head | AutoAttack medium | AutoAttack tail",
        ),
    ],
)
def test_groups_are_shown_under_the_strongest_attack(measured, columns):
    request = request_for("1", "at", seeds=(0,))
    text = markdown(assemble(request, {"at": {"": {0: result(**measured)}}}))
    assert f"| {columns} |" in " ".join(text.split())


def test_a_part_of_the_test_set_is_named():
    some = result(clean=80, pgd_20=50, worst=49)
    some.meta["part"] = "70 of 700 test images"
    notes = assemble(request_for("1", "at", seeds=(0,)), {"at": {"": {0: some}}})["notes"]
    assert any("Evaluation: 70 of 700 test images," in note for note in notes)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ((), "; last checkpoint; one seed."),
        (("train.select=best",), "; best checkpoint on held-out images; one seed."),
        (("evaluation.weights=average", "average.name=per_epoch"), "; last checkpoint, average weights; one"),
    ],
)
def test_the_note_says_which_weights_are_evaluated(overrides, said):
    request = request_for("1", "at", seeds=(0,), overrides=overrides)
    notes = assemble(request, {"at": {"": {0: result(clean=80, pgd_20=50, worst=49)}}})["notes"]
    assert said in notes[0]


def test_a_table_has_no_more_seeds_than_its_rows():
    values = dict.fromkeys(("data", "seeds", "splits", "rows", "out"), "") | {
        "table": "small",
        "data": "cifar10_lt",
    }
    assert reproduce.request_of(values, []).seeds == (0, 1)
    assert reproduce.request_of(values | {"rows": "la"}, []).seeds == (0,)
    with pytest.raises(
        InputError, match="rows of table small have their own number of seeds; leave --splits out"
    ):
        reproduce.request_of(values | {"splits": "2"}, [])


def test_lines_of_a_table_are_aligned():
    request = request_for("1", "at", "ldam", seeds=(0,))
    one = {"": {0: result(clean=80, pgd_20=50, worst=40)}}
    text = markdown(assemble(request, {"at": one, "ldam": one}))
    first = [line for line in text.split("##")[1].splitlines() if line.startswith("|")]
    assert len({len(line) for line in first}) == 1
    assert " ± " not in first[2]


def test_the_papers_own_data_set():
    request = request_for("2", "at", data="cifar10_lt", seeds=(0,))
    table = assemble(request, {"at": {"": {0: result(clean=62, pgd_20=30, worst=29)}}})
    assert table["rows"][0]["ours_minus_published"] == {"clean": -0.33, "pgd_20": 0.7}
    assert "## Difference to the paper" in markdown(table)


def test_the_best_setting_is_chosen_by_its_mean():
    request = request_for("3", "margin_0_best", seeds=(0, 1))
    settings = request.rows[0].settings
    pgd = [(40, 40), (44, 40), (45, 41), (41, 45), (30, 50)]  # the third and the fourth are best
    results = {
        setting: {seed: result(clean=80 + i, pgd_20=value, worst=39) for seed, value in enumerate(values)}
        for i, (setting, values) in enumerate(zip(settings, pgd, strict=True))
    }
    table = assemble(request, {"margin_0_best": results})
    assert table["rows"][0]["chosen"] == "evaluation.tau_p=1"
    assert table["rows"][0]["ours"]["clean"]["values"] == [82.0, 82.0]
    assert "best τ_p (ours: 1)" in markdown(table)
    assert any("choice on the test set" in note for note in table["notes"])


def test_a_table_without_published_figures():
    request = request_for("S7", "at", "mart", seeds=(0,))
    one = {"": {0: result(clean=80, pgd_20=50, worst=40)}}
    table = assemble(request, {"at": one, "mart": one})
    text = markdown(table)
    assert table["published_on"] is None
    assert " paper |" not in text
    assert "composition is ours" in text


# ---------------------------------------------------------------- methods after the paper


def test_a_follow_up_is_tested_against_the_row_above():
    request = request_for("followups", "at", "trades", "self_distilled")
    percents = {"at": (50, 52, 54), "trades": (51, 54, 56), "self_distilled": (51, 54, 56)}
    results = {
        key: {"": {seed: result(clean=80, pgd_20=x, worst=x) for seed, x in enumerate(values)}}
        for key, values in percents.items()
    }
    table = assemble(request, results)
    at, trades, student = table["rows"]
    assert "above" not in at
    tests = {(t["condition"], t["group"]): t for t in trades["above"]["tests"]}
    # The differences 1, 2, 2: t = (5 / 3) / (sqrt(1 / 3) / sqrt(3)) = 5 with two degrees of freedom.
    assert tests["pgd_20", "tail"] == {
        "condition": "pgd_20", "group": "tail", "difference": 1.6667, "p": 0.0377,
    }  # fmt: skip
    assert tests["clean", "all"]["p"] is None
    assert student["above"]["to"] == "trades"
    text = markdown(table)
    assert text.startswith("# Table followups on digits_lt: the methods after RoBal")
    assert "ours − paper" not in text
    lines = [
        [cell.strip() for cell in x.split("|")[1:-1]] for x in text.splitlines() if x.startswith("| TRADES ")
    ]
    assert lines[2][3:] == ["+0.0", "—", "+1.7", "0.038", "+1.7", "0.038"]
    assert "58.25" in text
    assert "second-hand" in text
    assert "no figures: its paper's tables could not be read" in text


def test_runs_of_the_same_seed_are_paired():
    """The first row lacks seed 0, and the second seed 2: only seed 1 is left, which has no spread."""
    request = request_for("followups", "at", "trades")
    results = {
        "at": {"": {0: None, 1: result(clean=50, worst=9), 2: result(clean=60, worst=9)}},
        "trades": {"": {0: result(clean=10, worst=9), 1: result(clean=53, worst=9), 2: None}},
    }
    tests = assemble(request, results)["rows"][1]["above"]["tests"]
    assert {"condition": "clean", "group": "all", "difference": 3.0, "p": None} in tests


def test_equal_differences_have_no_p():
    """80.3 - 80.2 and 50.3 - 50.2 are not the same double, but the same tenth of a point."""
    request = request_for("followups", "at", "trades", seeds=(0, 1))
    results = {
        key: {"": {seed: result(clean=x + more, worst=9) for seed, x in enumerate((80.2, 50.2))}}
        for key, more in (("at", 0.0), ("trades", 0.1))
    }
    tests = assemble(request, results)["rows"][1]["above"]["tests"]
    assert {"condition": "clean", "group": "all", "difference": 0.1, "p": None} in tests


def test_the_ratio_of_a_table_is_that_of_its_rows():
    """The balanced reference is the first row, and has another ratio than the rest."""
    one = {"": {0: result(clean=80, pgd_20=50, worst=40)}}
    request = request_for("followups", "at_balanced", "at", data="cifar10_lt", seeds=(0,))
    notes = assemble(request, dict.fromkeys(("at_balanced", "at"), one))["notes"]
    assert "CIFAR-10-LT, exp profile, IR 50;" in notes[0]


def test_a_table_of_several_splits_says_so():
    seeds = (0, (0, 1))
    request = request_for("followups", "at", data="cifar10_lt", seeds=seeds)
    found = {run: result(clean=80, pgd_20=50, worst=40) for run in seeds}
    notes = assemble(request, {"at": {"": found}})["notes"]
    assert "over 2 runs, each with its own seed and subset, differences run by run" in notes[0]
    assert any("are not independent" in note for note in notes)


@pytest.mark.parametrize("name", ["followups", "augmentation"])
def test_published_figures_have_a_protocol(name):
    """Every figure says what it was measured with; what no source gives is a dash."""
    found = [each for row in TABLES[name].rows for each in row.elsewhere]
    assert len(found) > 8
    for row in TABLES[name].rows:
        assert bool(row.elsewhere) != bool(row.unpublished), row.key
    for each in found:
        assert all(each), each
        assert each.source.startswith(("first-hand", "second-hand"))
        assert (each.aa == "—") == (each.attack == "—")
        assert any(figure != "—" for figure in (each.clean, each.pgd, each.aa))


def test_a_row_brings_its_teacher():
    plan = make_plan(request_for("followups", "self_distilled", seeds=(0, 1)))
    jobs = trainings(plan)
    assert [job.key for job in jobs] == ["balanced_teacher", "self_distilled"] * 2
    for teacher, student in zip(jobs[::2], jobs[1::2], strict=True):
        assert student.config.train.teacher == str(teacher.workdir)
        assert student.start == teacher.workdir
        assert teacher.config.train.sampler == "balanced"
        assert student.seed == teacher.seed
    lines = commands(plan_row("followups", "self_distilled"), request_for("followups", "self_distilled"))
    assert [line.split()[1] for line in lines] == [
        f"experiments/{x}.py" for x in ("train", "train", "evaluate")
    ]
    with pytest.raises(InputError, match=r"row 'self_distilled' sets config.train.teacher itself"):
        make_plan(request_for("followups", "self_distilled", overrides=("train.teacher=x",)))


def plan_row(table, key, data="digits_lt"):
    return rows_of(table, data, [key])[0]


def test_all_rows_have_one_protocol():
    request, evaluations = request_for("followups", data="cifar10_lt"), []
    for row in request.rows:
        config = row_config(row, request)
        assert config.model.name == "resnet18"
        assert (config.threat.epsilon, config.evaluation.epsilon) == (8 / 255, 8 / 255)
        assert (config.train.epochs, config.train.batch_size) == (100, 128)
        assert tuple(config.schedule.milestones) == (75, 90)
        assert row.key.endswith(("_ra", "_aua")) == (config.train.augmentation != "crop_flip")
        evaluation = config.evaluation.to_dict()
        methods_own = ("logit_scale", "tau_p", "weights")
        evaluations.append({key: x for key, x in evaluation.items() if key not in methods_own})
    assert all(each == evaluations[0] for each in evaluations)
    assert evaluations[0]["step_size"] == 2 / 255
    smaller = request_for("followups", data="cifar10_lt", overrides=("evaluation.epsilon=4/255",))
    assert row_config(smaller.rows[2], smaller).evaluation.step_size == 1 / 255
    longer = row_config(
        request.rows[0], request_for("followups", data="cifar10_lt", overrides=("train.epochs=9",))
    )
    assert longer.train.epochs == 9


def test_several_splits():
    seeds = (0, (0, 1))
    plan = make_plan(request_for("followups", "at", data="cifar10_lt", seeds=seeds))
    jobs = trainings(plan)
    assert [(job.config.seed, job.config.data.seed) for job in jobs] == [(0, 0), (0, 1)]
    assert len({job.workdir for job in jobs}) == 2
    assert {job.workdir.parent for job in jobs} == {trainings(make_plan(
        request_for("followups", "at", data="cifar10_lt")
    ))[0].workdir.parent}  # fmt: skip
    with pytest.raises(InputError, match=r"config.data.seed is set by --splits"):
        make_plan(request_for("followups", "at", data="cifar10_lt", seeds=seeds, overrides=("data.seed=1",)))


@pytest.mark.parametrize(
    ("method", "overrides", "expected"),
    [
        ("at", (), 2 * 7 + 2),
        ("plain", (), 2),
        ("trades", (), 2 * 7 + 3 + 2),
        ("trades_awp", (), 2 * 7 + 2 * 5 - 1),
        ("gradalign", (), 2 * 1 + 2 + 8),
        ("fast", (), 2 * 1 + 2),
        ("robustlt_at", (), 2 * 7 + 2 + 2),
        ("taet", ("train.epochs=60", "attack.first_epoch=31"), 2 * 7 * 0.5 + 2 + 1),
        ("self_distilled", ("objective.igdm=1.0",), 2 * 7 + 5 + 2),
        ("at", ("attack.free_steps=8",), 2),
        ("at", ("average.name=swa",), 2 * 7 + 2 + 1),
        ("trades", ("objective.attack_divergence=False",), 2 * 7 + 2 + 2),
        ("trades_awp", ("objective.attack_divergence=False",), 2 * 7 + 2 * 4),
    ],
)
def test_passes_per_image(method, overrides, expected):
    config = cli.load_config(f"{CONFIGS}/{method}.py:digits_lt")
    assert passes(cli.apply_overrides(config, [f"--config.{each}" for each in overrides])) == expected


def test_seconds_of_runs(tmp_path):
    """100 images of a batch of 20 at 50 images per second, and 60 at 20: 2 + 3 seconds."""
    rows = [{"step": 5, "images_per_second": 50.0}, {"step": 8, "images_per_second": 20.0}, {"step": 8}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "config.json").write_text(json.dumps({"train": {"batch_size": 20}}))
    assert seconds([tmp_path, tmp_path / "none"]) == pytest.approx(5.0)
    assert seconds([tmp_path / "none"]) is None


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "--table is missing; use one of 1, 2, 3, 4, S6, S7, followups, augm"),
        (["--table=5"], "unknown table '5'"),
        (["--table=2", "--rows=at,ldam"], "no row 'ldam'; use one of plain, at, trades"),
        (["--table=4", "--rows=at_100"], "on digits_lt has no row 'at_100'"),
        (["--table=1", "--seeds=0"], "--seeds is '0'"),
        (["--table=1", "--seeds=two"], "--seeds is 'two'"),
        (["--table=followups", "--splits=0"], "--splits is '0'"),
        (["--table=followups", "--splits=2"], "each seed has its own subset; leave --splits out"),
        (["--table=1", "--data=mnist"], "unknown data set 'mnist'; use one of digits_lt, cifar10_lt"),
        (["--table=1", "--config.train.epoch=1"], "use 'train.epochs'"),
    ],
)
def test_bad_input(flags, message, monkeypatch):
    monkeypatch.setattr(reproduce, "do_all", lambda *_: pytest.fail("the input was accepted"))
    with pytest.raises(InputError, match=message):
        reproduce.main(flags)


def test_two_at_once(tmp_path):
    with reproduce.alone_in(tmp_path), pytest.raises(InputError, match="is used by another process"):
        reproduce.alone_in(tmp_path).__enter__()
    with reproduce.alone_in(tmp_path):
        pass


def test_runs_of_other_data_are_not_reused(tmp_path, monkeypatch):
    """Data are read once, however many runs there are, and not at all without a finished run."""
    request, read = request_for("1", "at", "ldam", out=tmp_path, data="cifar10_lt"), []
    plan = make_plan(request)
    jobs = trainings(plan)
    monkeypatch.setattr(reproduce, "digests_of", lambda config: read.append(config) or ("a" * 64, "b" * 64))
    reproduce.check_data(jobs)
    assert not read
    versions = {"data_sha256": "a" * 64, "generated_sha256": "b" * 64}
    for job in jobs:
        (job.workdir / "checkpoints" / "9").mkdir(parents=True)
        (job.workdir / "config.json").write_text("{}")
        (job.workdir / "finished.json").write_text('{"checkpoint": "9", "sha256": ""}')
        (job.workdir / "versions.json").write_text(json.dumps(versions))
    reproduce.check_data(jobs)
    assert len(read) == 1
    for name, message in (
        ("data_sha256", "the data differ"),
        ("generated_sha256", "generated images differ"),
    ):
        (jobs[-1].workdir / "versions.json").write_text(json.dumps(versions | {name: "c" * 64}))
        with pytest.raises(InputError, match=rf"ldam seed 2: .*{message} .*, or choose another --out$"):
            reproduce.make(plan, request, tmp_path / "cifar10_lt", stop=False)
    monkeypatch.setattr(reproduce, "digests_of", lambda config: None)  # a job that needs them says more
    reproduce.check_data(jobs)


def test_the_digests_of_a_config():
    config = cli.load_config(f"{CONFIGS}/at.py:digits_lt")
    assert reproduce.digests_of(config) == (data_digest(builder.dataset(config)), "")
    missing = cli.apply_overrides(
        cli.load_config(f"{CONFIGS}/at.py:cifar10_lt"), ["--config.data.path=/nowhere"]
    )
    assert reproduce.digests_of(missing) is None


def fake_jobs(monkeypatch, do):
    """Three runs, the second started from the first, each evaluated; and what ``do`` returned on."""
    done = []

    def run(job, say):
        do(job)
        done.append((job.key, job.folder is not None))

    monkeypatch.setattr(reproduce, "is_done", lambda job: (job.key, job.folder is not None) in done)
    monkeypatch.setattr(reproduce, "do", run)
    a, b, c = map(pathlib.Path, "abc")
    jobs = [
        job
        for key, workdir, start in (("at", a, None), ("lws", b, a), ("cos", c, None))
        for job in (Job(key, 0, None, workdir, start), Job(key, 0, None, workdir, folder=workdir / "e"))
    ]
    return jobs, done


def done_all(jobs):
    with hosts.stop_signals() as stop:
        return reproduce.do_all(jobs, lambda line: None, stop)


def test_the_others_go_on_when_a_run_diverges(monkeypatch):
    def do(job):
        if job.key == "at":
            raise DivergedError("not finite")

    jobs, done = fake_jobs(monkeypatch, do)
    assert done_all(jobs) == ["at seed 0", "lws seed 0"]
    assert done == [("cos", False), ("cos", True)]


def test_an_audit_without_its_surrogate_is_left_out(monkeypatch, capsys):
    def do(job):
        if job.key == "at" and not job.folder:
            raise DivergedError("not finite")

    jobs, done = fake_jobs(monkeypatch, do)
    jobs[-1] = jobs[-1]._replace(surrogate=jobs[0].workdir)
    jobs.append(Job("la", 0, None, pathlib.Path("d")))
    assert done_all(jobs) == ["at seed 0", "lws seed 0"]
    assert done == [("cos", False), ("la", False)]
    assert "cos seed 0: evaluate: left out, because it needs images of at seed 0" in capsys.readouterr().out


def test_a_stop_is_the_end(monkeypatch):
    jobs, done = fake_jobs(monkeypatch, lambda job: None)
    monkeypatch.setattr(
        reproduce, "do", lambda job, say: None if job.folder else done.append((job.key, False))
    )
    assert done_all(jobs) is None  # the evaluation of 'at' was not finished
    assert done == [("at", False)]


def test_a_signal_between_two_jobs_is_the_end(monkeypatch):
    jobs, done = fake_jobs(monkeypatch, lambda job: signal.raise_signal(signal.SIGTERM))
    assert done_all(jobs) is None
    assert done == [("at", False)]


def start(folder):
    command = [
        *(sys.executable, str(ROOT / "experiments/reproduce.py"), "--table=1", "--rows=at,lws"),
        *("--seeds=1", "--out=out", "--config.train.epochs=2", "--config.schedule.milestones=()"),
        *("--config.train.checkpoint_epochs=1", "--config.data.test_per_class=3"),
    ]
    folder.mkdir(exist_ok=True)
    with (folder / "stdout").open("w") as file:
        return subprocess.Popen(command, cwd=folder, stdout=file, stderr=subprocess.STDOUT)


def interrupt(process, folder, seen, number):
    """Sends a signal when the script has written ``seen``; returns the exit status."""
    while process.poll() is None and seen not in (folder / "stdout").read_text():
        time.sleep(0.01)
    time.sleep(0.2)
    process.send_signal(number)
    return process.wait()


@pytest.mark.long
@pytest.mark.slow
def test_a_killed_table_ends_with_the_same_bytes(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert start(whole).wait() == 0, (whole / "stdout").read_text()
    for number in (1, 3):  # a training, and a fine-tuning
        process = start(killed)
        assert interrupt(process, killed, f"[{number}/4]", signal.SIGKILL) == -signal.SIGKILL
    process = start(killed)
    assert interrupt(process, killed, "[4/4]", signal.SIGTERM) == 0
    assert "stopped; run the same command again" in (killed / "stdout").read_text()
    for folder in (killed, whole):  # the second is complete and does nothing
        process = start(folder)
        assert process.wait() == 0, (folder / "stdout").read_text()
    assert "] " not in (whole / "stdout").read_text().partition("# RoBal")[0]
    for name in ("table1.md", "table1.json"):
        first, second = ((folder / "out/digits_lt" / name).read_bytes() for folder in (whole, killed))
        assert first == second
    rows = json.loads(second)["rows"]
    assert all(row["ours"]["worst"]["n"] == 1 for row in rows)
    # Evaluations lie where experiments/compare.py looks for them.
    evaluations = sorted((whole / "out/digits_lt/evaluations").glob("*/seed0/evaluation/examples.npz"))
    assert len(evaluations) == 2
