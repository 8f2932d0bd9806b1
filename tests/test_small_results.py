"""The result on CIFAR-10-LT: outcomes are stored and read back, and the page says what they say."""

import dataclasses
import json
import re
import shutil
from functools import cache, partial
from pathlib import Path

import numpy as np
import pytest
from helpers import refused

from experiments.paper import claims, outcomes, small_page
from experiments.paper.plan import row_config
from robal_jax import metrics
from robal_jax.errors import InputError
from robal_jax.reporting.comparison import difference
from robal_jax.reporting.names import with_interval
from robal_jax.reporting.results import EvaluatedRun

CONDITIONS = ("clean", "fgsm", "pgd_20", "mim_20", "cw_20", "apgd_ce", "robal_aa")
COUNTS = [4750, 3075, 1991, 1289, 834, 540, 349, 227, 147, 95]


def evaluated(seed, n, conditions=CONDITIONS, counts=COUNTS, method="AT", **meta):
    """An evaluation in which each attack breaks a fifth of the images that are still right."""
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(10), n // 10)
    found, right = {}, np.ones(n, bool)
    for name in conditions:
        right = right & (rng.random(n) > 0.2)
        found[name] = np.where(right, labels, (labels + 1) % 10)
    examples = {"labels": labels, "ids": np.arange(n), **{f"pred_{k}": v for k, v in found.items()}}
    verdicts = [{"title": "Steps", "outcome": "passed"}]
    right = np.arange(200)[:, None] < [50, 70]
    figures = [metrics.share(column) for column in right.T]
    curves = {"scale": {"x": [1.0, 10.0], "series": {"PGD-20": figures}}}
    about = {
        "method": method, "seed": 0, "dataset": "cifar10_lt", "main_attack": "pgd_20", "date": "2026-11-29",
        "seconds": 7.0,
        "processor": "one", "checkpoint_sha256": "ab" * 32, "config": {"not": "stored"}, **meta,
    }  # fmt: skip
    return EvaluatedRun(
        about,
        metrics.summarize(labels, found, counts),
        {"examples": 200, "verdicts": verdicts, "curves": curves},
        {"features": [1.0] * 10, "weights": list(np.arange(10, 0, -1.0))},
        name="folder",
        examples=examples,
        sample={"ids": np.arange(200), "scale": right},
    )


@pytest.fixture
def stored(tmp_path):
    """Seed 0 of AT and of RoBal-N, of which only AT has every evaluation, and of the balanced row."""
    more = (*CONDITIONS, "autoattack")
    best = {"selection": "best on held-out images (epoch 12 of 40, PGD-10 20.0 % as the mean of the classes)"}
    at = {
        "whole": evaluated(0, 2000),
        "autoattack": evaluated(1, 500, more),
        "torchattacks": evaluated(2, 500, (*CONDITIONS[:5], "torchattacks")),
        "best": evaluated(3, 500, **best, checkpoint_sha256="cd" * 32),
    }
    outcomes.store(tmp_path / "at-0", at, 1234.5)
    outcomes.store(tmp_path / "robal_n-0", {"whole": evaluated(4, 2000, method="RoBal-N")}, None)
    outcomes.store(
        tmp_path / "n_fgsm_balanced-0",
        {"whole": evaluated(5, 2000, counts=[4750] * 10, method="N-FGSM")},
        60.0,
    )
    return tmp_path, at


def test_what_is_stored_is_read_back(stored):
    folder, at = stored
    runs = outcomes.read(folder)
    assert [(run.row.key, run.seed, run.seconds) for run in runs] == [
        ("at", 0, 1234), ("robal_n", 0, None), ("n_fgsm_balanced", 0, 60),
    ]  # fmt: skip
    for name, run in at.items():
        found = runs[0].evaluations[name]
        assert found.summary == run.summary
        assert (found.audit, found.norms) == (run.audit, run.norms)
        assert {key: each.tolist() for key, each in found.sample.items()} == {
            key: each.tolist() for key, each in run.sample.items()
        }
        assert "config" not in found.meta and found.meta["method"] == "AT"
    # Its classes are divided like those of the long-tailed rows.
    assert runs[2].evaluations["whole"].summary["groups"] == runs[0].evaluations["whole"].summary["groups"]


def test_the_page_has_the_figures_of_the_outcomes(stored):
    folder, at = stored
    text = small_page.page(outcomes.read(folder))
    assert "Not evaluated yet: AT, seed 1; RoBal-N, seed 1; LA; AT-BSL, RandAugment; RobustLT" in text
    assert "Not evaluated yet at the best checkpoint: RoBal-N, seed 0; N-FGSM, balanced training set." in text
    assert "Not evaluated yet on all" not in text
    tables = {part.splitlines()[0].strip(): part for part in text.split("## ")[1:]}
    lines = {
        title: {x.split("|")[1].strip(): x for x in part.splitlines() if x[:1] == "|"}
        for title, part in tables.items()
    }
    pair = at["whole"].conditions["robal_aa"]
    value, low, high = (f"{100 * pair['accuracy'][part]:.1f}" for part in ("value", "low", "high"))
    assert f" {value} [{low}, {high}] |" in lines["Accuracy on 2,000 test images"]["AT, seed 0"]
    tail = lines["Head, medium and tail, clean and under the pair"]["AT, seed 0"].split("|")[-2]
    assert tail.split()[0] == f"{100 * pair['tail']['value']:.1f}"
    errors = lines["Natural and boundary error under the pair"]["AT, seed 0"].split("|")[2:5]
    natural, boundary = (pair[f"{kind}_error"]["value"] for kind in ("natural", "boundary"))
    assert [float(x) for x in errors] == pytest.approx(
        [100 * natural, 100 * boundary, 100 * boundary / (1 - natural)], abs=0.0501
    )
    difference = lines["Difference to AT of the same seed under the pair"]
    assert "RoBal-N, seed 0" in difference and "AT, seed 0" not in difference
    assert not any("N-FGSM" in label for label in difference)  # it has no long tail
    right = [
        (run.predictions["robal_aa"] == run.examples["labels"]) for run in (at["whole"], evaluated(4, 2000))
    ]
    figure = metrics.paired_difference(*right)
    assert f"{100 * figure['value']:+.1f} [{100 * figure['low']:+.1f}" in difference["RoBal-N, seed 0"]
    strongest = at["autoattack"].conditions["autoattack"]
    second = lines["Accuracy on 500 test images"]["AT, seed 0"]
    value, low, high = (f"{100 * strongest['accuracy'][part]:.1f}" for part in ("value", "low", "high"))
    assert second.split("|")[-2].strip() == f"{value} [{low}, {high}]"
    assert "AT, seed 0" in lines["Natural and boundary error under AutoAttack"]
    assert "Difference to AT of the same seed under AutoAttack" not in lines  # no other run has it
    part = lines["AutoAttack with 10 iterations, the best checkpoint, and the audit"]
    assert (
        "| epoch 12 of 40 |" in part["AT, seed 0"] and "not flagged (1 of 1 checks run)" in part["AT, seed 0"]
    )
    assert "RoBal-N, seed 0" not in part  # it has none of these evaluations


def test_claims_are_answered(stored):
    """Every claim, with the runs that can tell; a better run is found better, and a worse one worse."""
    folder, at = stored
    found = claims.answers(outcomes.read(folder))
    assert [(each.run, each.claim.split(" with more ")[0][:40]) for each in found] == [
        ("RoBal-N, seed 0", "RoBal is more robust than AT under the p"),
        ("RoBal-N, seed 0", "RoBal is more robust than AT on the tail"),
        ("RoBal-N, seed 0", "The boundary error of RoBal is lower tha"),
        ("AT, seed 0", "PGD-20 leaves more images right when the"),
        ("AT, seed 0", "PGD-20 leaves more images right when the"),
        ("AT, seed 0", "The weight vectors of AT's classifier ar"),
    ]
    assert found[-1].figure.startswith("rank correlation +1.00") and found[-1].answer == "yes"
    assert found[-3].answer == "undecided" and found[-3].figure.startswith("+0.0 points")
    assert found[-2].answer == "yes" and found[-2].figure == "+10.0 points [+5.6, +14.2], p < 0.001"
    assert [each.paper for each in found[:3]] == [
        "+3.6 points under the pair", "—", "+9.6 points under the pair"
    ]  # fmt: skip

    labels = at["whole"].examples["labels"]
    for wrong, expected in ((labels + 1) % 10, ["no", "no", "no"]), (labels, ["yes", "yes", "yes"]):
        examples = {**at["whole"].examples, "pred_robal_aa": wrong}
        about = {**at["whole"].meta, "method": "RoBal-N"}
        other = dataclasses.replace(at["whole"], meta=about, examples=examples)
        outcomes.store(folder / "robal_n-0", {"whole": other}, None)
        found = claims.answers(outcomes.read(folder))
        assert [each.answer for each in found if each.run == "RoBal-N, seed 0"] == expected


def test_what_cannot_be_read(stored):
    folder, _ = stored

    reversed_ids = evaluated(4, 2000, method="RoBal-N")
    arrays = {name: values[::-1] for name, values in reversed_ids.examples.items()}
    other = dataclasses.replace(reversed_ids, examples=arrays)
    outcomes.store(folder / "robal_n-0", {"whole": other}, None)
    refused("'whole' of AT, seed 0 and RoBal-N, seed 0 have different images", outcomes.read, folder)
    outcomes.store(
        folder / "robal_n-0", {"whole": evaluated(4, 2000, CONDITIONS[:5], method="RoBal-N")}, None
    )
    refused("'whole' has no outcomes under robal_aa", outcomes.read, folder)
    (folder / "robal_n-0.npz").unlink()
    refused(r"robal_n-0.json or its .npz cannot be read \(FileNotFoundError", outcomes.read, folder)
    (folder / "robal_n-0.json").write_text("{")
    refused(r"robal_n-0.json or its .npz cannot be read \(JSONDecodeError", outcomes.read, folder)


def test_evaluations_are_added_to_those_that_are_stored(stored):
    folder, at = stored
    more = evaluated(9, 2000)
    outcomes.store(folder / "at-0", {"whole": more}, None)
    first = outcomes.read(folder)[0]
    assert (set(first.evaluations), first.seconds) == (set(at), 1234)
    assert first.evaluations["whole"].summary == more.summary
    assert first.evaluations["torchattacks"].summary == at["torchattacks"].summary


@pytest.mark.parametrize(
    ("name", "meta", "message"),
    [
        ("at-0", {"method": "Other"}, "'whole' is of Other, seed 0, not of AT, seed 0; store it under"),
        ("at-1", {}, "'whole' is of AT, seed 0, not of AT, seed 1; store it"),
        (
            "at-0",
            {"checkpoint_sha256": "ef" * 32},
            "different checkpoints .*whole efefefefefef.*one training",
        ),
    ],
)
def test_only_what_belongs_to_a_row_is_stored(stored, name, meta, message):
    folder, _ = stored
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(InputError, match=message):
        outcomes.store(folder / name, {"whole": evaluated(0, 2000, **meta)}, None)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_single_evaluations_are_stored_by_name(stored, monkeypatch, tmp_path):
    folder, _ = stored
    results = tmp_path / "run" / "evaluation"
    results.mkdir(parents=True)
    (results / "results.json").write_text("{}")
    config, other = (
        json.loads(row_config(row, outcomes.request_for(tmp_path)).to_json())
        for row in outcomes.TABLE.rows
        if row.key in ("la", "at_bsl_ra")
    )
    monkeypatch.setattr(
        outcomes, "read_run", lambda path: evaluated(7, 2000, method="LA", path=path, config=config)
    )
    assert outcomes.store_folders({"la-0/whole": tmp_path / "run"}, folder) == ["la-0"]
    assert [run.label for run in outcomes.read(folder)][2] == "LA"
    for place in "la-1/whole", "la-0/other", "la-0":
        with pytest.raises(InputError, match=f"there is no '{place}'; give a row, a seed and one of whole,"):
            outcomes.store_folders({place: tmp_path / "run"}, folder)
    monkeypatch.setattr(outcomes, "read_run", lambda path: evaluated(7, 2000, method="LA", config=other))
    message = r"'whole' is not of la-0 \(config\.\S+: .* here, .* there, in the row\)"
    with pytest.raises(InputError, match=message):
        outcomes.store_folders({"la-0/whole": tmp_path / "run"}, folder)


def test_a_published_model_is_not_replaced_by_another(monkeypatch, tmp_path):
    """Then nothing is published: AT, which the zoo does not have, neither."""
    plan, zoo = outcomes.make_plan(outcomes.request_for(tmp_path)), tmp_path / "zoo"
    for key in "at", "la":
        for place in plan.folders[key][""][0], plan.further[key]["autoattack"][0]:
            place.mkdir(parents=True)
            (place / "results.json").write_text("{}")
    zoo.mkdir()
    shutil.copy(small_page.ZOO / "la_resnet20.json", zoo)
    monkeypatch.setattr(outcomes.Results, "read", lambda folder: evaluated(0, 500))
    monkeypatch.setattr(outcomes.zoo, "publish", lambda *_, **__: pytest.fail("published"))
    with pytest.raises(
        InputError, match=r"la_resnet20.json is of another model \(checkpoint 991e548f341f…, not"
    ):
        outcomes.publish_models(tmp_path, zoo)


@pytest.fixture
def place(monkeypatch, tmp_path):
    """A page, its outcomes and models in a folder; the page has the names of the runs that are stored."""
    folder = tmp_path / "results"
    folder.mkdir()
    for name, path in {"PAGE": "page.md", "STORED": "page", "ZOO": "zoo"}.items():
        monkeypatch.setattr(small_page, name, folder / path)
    monkeypatch.setattr(small_page, "page", lambda runs: f"{[run.label for run in runs]}\n")
    return folder


def finish(plan, evaluations, monkeypatch):
    """Lays out finished evaluations, by row and seed and then by name; returns their folders likewise."""
    folders, runs = {}, {}
    for (key, seed), found in evaluations.items():
        named = {"whole": plan.folders[key][""], **plan.further[key]}
        folders[key, seed] = {name: named[name][seed] for name in found}
        runs |= {folders[key, seed][name]: run for name, run in found.items()}
    for folder in runs:
        folder.mkdir(parents=True)
        (folder / "results.json").write_text("{}")
    monkeypatch.setattr(outcomes, "read_run", runs.__getitem__)
    monkeypatch.setattr(outcomes.Results, "read", runs.__getitem__)
    return folders


@pytest.mark.slow
def test_finished_evaluations_are_stored_and_models_of_seed_0_published(
    stored, place, monkeypatch, capsys, tmp_path
):
    """A row whose main evaluations are finished with seed 1 only is stored, and not published."""
    _, at = stored
    card = outcomes.ROOT / "experiments/zoo/cifar10_lt/la_resnet20.json"
    (place / "zoo").mkdir()
    (place / "zoo" / card.name).write_bytes(card.read_bytes())  # of the model that LA's evaluations are of
    (place / "page.md").write_text("By hand.\n")
    # Fewer rows and a single plan: each takes a while.
    monkeypatch.setattr(outcomes, "TABLE", outcomes.TABLE._replace(rows=outcomes.TABLE.rows[:3]))
    monkeypatch.setattr(outcomes, "make_plan", cache(outcomes.make_plan))
    plan = outcomes.make_plan(outcomes.request_for(tmp_path))
    small_page.main([str(tmp_path)])
    assert capsys.readouterr().out.splitlines()[:2] == ["published: nothing", "stored: nothing"]

    def main_of(**meta):
        runs = {name: at[name] for name in ("whole", "autoattack")}
        return {name: dataclasses.replace(run, meta={**run.meta, **meta}) for name, run in runs.items()}

    sha256 = json.loads(card.read_text())["checkpoint"]["sha256"]
    evaluations = {
        ("at", 0): at,
        ("robal_n", 0): {"whole": evaluated(4, 2000, method="RoBal-N")},
        ("robal_n", 1): main_of(method="RoBal-N", seed=1),
        ("la", 0): main_of(method="LA", checkpoint_sha256=sha256),
    }
    folders = finish(plan, evaluations, monkeypatch)
    trained = {(job.key, job.seed): job.workdir for job in plan.jobs if job.folder is None}
    trained["robal_n", 1].mkdir(parents=True)
    (trained["robal_n", 1] / "config.json").write_text('{"train": {"batch_size": 64}}')
    (trained["robal_n", 1] / "metrics.jsonl").write_text('{"step": 100, "images_per_second": 32.0}\n')
    published = []
    monkeypatch.setattr(outcomes.zoo, "publish", lambda *args, **stated: published.append((args, stated)))

    small_page.main([str(tmp_path)])
    assert capsys.readouterr().out.splitlines() == [
        "published: at_resnet20, la_resnet20", "stored: at-0, robal_n-0, robal_n-1, la-0",
        str(place / "page.md"),
    ]  # fmt: skip
    found = {(run.row.key, run.seed): run for run in outcomes.read(place / "page")}
    summaries = {
        key: {name: run.summary for name, run in each.evaluations.items()} for key, each in found.items()
    }
    assert summaries == {
        key: {name: run.summary for name, run in each.items()} for key, each in evaluations.items()
    }
    assert {key: run.seconds for key, run in found.items() if run.seconds} == {("robal_n", 1): 200}
    labels = ["AT, seed 0", "RoBal-N, seed 0", "RoBal-N, seed 1", "LA"]
    assert (place / "page.md").read_text() == f"By hand.\n{small_page.MARK}\n{labels}\n"
    for key, (args, stated) in zip(("at", "la"), published, strict=True):
        main = {name: folders[key, 0][name] for name in ("whole", "autoattack")}
        assert args == (trained[key, 0], place / "zoo" / f"{key}_resnet20", main)
        assert stated == {"authors": "The robal_jax authors", "license": "Apache-2.0"}


def test_only_what_is_below_the_mark_is_written_again(stored, place, monkeypatch, capsys):
    """A page without the mark gets it, and the next time what is below it is replaced."""
    folder, _ = stored
    page = place / "page.md"
    monkeypatch.setattr(small_page, "STORED", folder)
    page.write_text("By hand.\n\n")
    for last in "N-FGSM, balanced training set", "RoBal-N, seed 0":
        small_page.main([])
        labels = [run.label for run in outcomes.read(folder)]
        assert labels[-1] == last
        assert page.read_text() == f"By hand.\n\n{small_page.MARK}\n{labels}\n"
        assert capsys.readouterr().out == f"{page}\n"
        (folder / "n_fgsm_balanced-0.json").unlink(missing_ok=True)

    asked = []
    monkeypatch.setattr(small_page, "store_folders", lambda *args: asked.append(args) or ["la-0"])
    small_page.main(["la-0/best=one", "la-0/whole=two"])
    assert asked == [({"la-0/best": Path("one"), "la-0/whole": Path("two")}, folder)]
    assert capsys.readouterr().out == f"stored: la-0\n{page}\n"


def test_a_page_of_one_row_has_no_empty_table(stored):
    folder, _ = stored
    for path in folder.glob("[!a]*"):
        path.unlink()
    text = small_page.page(outcomes.read(folder))
    assert "Difference to AT" not in text and "Accuracy on 2,000 test images" in text


def test_the_page_is_up_to_date():
    """Every figure of the page follows from the outcomes that are stored beside it."""
    _, mark, made = small_page.PAGE.read_text().partition(small_page.MARK)
    runs = outcomes.read(small_page.STORED)
    assert mark and made.strip() == small_page.page(runs).strip()


def test_no_place_of_a_machine_is_stored():
    for path in small_page.STORED.glob("*.json"):
        text = json.dumps(json.loads(path.read_text()))
        assert "/tmp" not in text and "/home" not in text and "/work" not in text, path.name


def test_readme_has_the_figures_of_the_outcomes():
    """README's first table, and the sentence below it, follow from the stored outcomes, too."""
    runs, whole, again = (
        {
            run.row.label: run.evaluations[name]
            for run in outcomes.read(small_page.STORED)
            if run.seed == seed and name in run.evaluations
        }
        for name, seed in (("autoattack", 0), ("whole", 0), ("autoattack", 1))
    )
    text = (outcomes.ROOT / "README.md").read_text()
    table = text.partition("| method | clean, all |")[2].partition("\n\n")[0].splitlines()[2:]
    rows = {
        cells[1].strip(): [cell.strip() for cell in cells[2:-1]] for cells in (x.split("|") for x in table)
    }
    assert {"AT", "RoBal-N", "LA", "AT-BSL, RandAugment", "RobustLT on AT-BSL, RandAugment"} <= set(rows)
    for label, cells in rows.items():
        conditions = runs[label].conditions
        found = [("clean", "accuracy"), *(("autoattack", x) for x in ("accuracy", *small_page.GROUPS))]
        assert cells == [with_interval(conditions[name][figure]) for name, figure in found], label

    sentence = " ".join(text.partition("Under attack RoBal-N")[2].partition("On scikit-learn")[0].split())
    said = re.findall(r"(\d+(?:\.\d)?) (?:points|%)", sentence)
    points = [
        100 * difference(runs["RoBal-N"], runs["AT"], "autoattack", group)["value"]
        for group in ("tail", "head")
    ]
    assert points[0] > 0 > points[1]
    broken = []
    for label in ("RoBal-N", "AT"):
        figures = runs[label].conditions["autoattack"]
        broken.append(100 * figures["boundary_error"]["value"] / (1 - figures["natural_error"]["value"]))
    on_all = [difference(whole["RoBal-N"], whole["AT"], "robal_aa", group) for group in ("all", "tail")]
    assert all(figure["low"] > 0 for figure in on_all)
    of_both = partial(difference, again["RoBal-N"], again["AT"], "autoattack")
    second = [of_both(group)["value"] for group in ("tail", "head")]
    assert second[0] > 0 > second[1]
    assert of_both("all")["low"] < 0 < of_both("all")["high"]
    to_la = [difference(runs["RoBal-N"], runs["LA"], "autoattack", group) for group in ("head", "tail")]
    assert to_la[0]["low"] > 0 and to_la[1]["low"] < 0 < to_la[1]["high"]
    bsl = partial(difference, runs["AT-BSL, RandAugment"], runs["RoBal-N"])
    assert all(bsl("autoattack", group)["p_value"] >= 0.05 for group in ("all", *small_page.GROUPS))
    clean = bsl("clean", "all")
    assert clean["high"] < 0
    plugged = partial(difference, runs["RobustLT on AT-BSL, RandAugment"], runs["AT-BSL, RandAugment"])
    assert all(plugged("autoattack", group)["p_value"] >= 0.05 for group in ("all", *small_page.GROUPS))
    cleaner = plugged("clean", "all")
    assert cleaner["low"] > 0
    to_at = [difference(runs["TRADES"], runs["AT"], "autoattack", group) for group in ("all", "tail")]
    assert all(figure["high"] < 0 for figure in to_at)
    more = difference(runs["RoBal-N, EMA, budgets"], runs["RoBal-N"], "autoattack", "all")
    assert more["high"] < 0
    to_n = [
        difference(runs["RoBal-R"], runs["RoBal-N"], *where)
        for where in (("clean", "all"), ("autoattack", "tail"))
    ]
    assert all(figure["high"] < 0 for figure in to_n)
    all_images = difference(runs["RoBal-N"], runs["AT"], "autoattack", "all")
    assert all_images["low"] < 0 < all_images["high"]  # not clearly better overall
    figures = (
        *points,
        *broken,
        *(100 * figure["value"] for figure in on_all),
        *(100 * value for value in second),
        100 * to_la[0]["value"],
        100 * clean["value"],
        100 * cleaner["value"],
        *(100 * figure["value"] for figure in to_at),
        100 * more["value"],
        *(100 * figure["value"] for figure in to_n),
    )
    assert len(said) == len(figures)
    for number, figure in zip(said, figures, strict=True):
        assert number == f"{abs(figure):.{len(number.partition('.')[2])}f}"
