"""The zoo: models that ship, models from a run, models as runs, and what is refused (robal_jax.zoo)."""

import dataclasses
import functools
import hashlib
import json
import pathlib
import shutil
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
import pytest
import safetensors
from conftest import ROOT
from helpers import META, fake_results, fake_summary, refused, verdict

import robal_jax
from experiments import evaluate, publish
from robal_jax import builder, cli, load_model, load_run, pytorch, training, zoo
from robal_jax.errors import InputError
from robal_jax.reporting.results import EVERYTHING, FLAGGED, PASSED, Results, read_run
from robal_jax.storage import checkpoints
from robal_jax.storage.config_file import differences, read_config
from robal_jax.storage.workdir import class_counts_in_training, imported_from, origin_of
from robal_jax.training import fine_tuned_state
from robal_jax.zoo import cards
from robal_jax.zoo.models import ENDINGS
from robal_jax.zoo.publishing import _with_more_figures

ZOO = ROOT / "experiments" / "zoo"
STORED = ROOT / "tests" / "stored_run"
DIGITS = "digits_lt/at_small_cnn"
NAMES = zoo.names()
MODELS = [
    pytest.param(name, marks=() if name.startswith("digits_lt/") else pytest.mark.slow) for name in NAMES
]
"""Those with larger networks take some seconds to compile."""


def card_of(name, ending="json"):
    return json.loads((ZOO / f"{name}.{ending}").read_text())


def texts(tree):
    """All strings in a JSON value."""
    if isinstance(tree, dict | list):
        return [text for one in (tree.values() if isinstance(tree, dict) else tree) for text in texts(one)]
    return [tree] if isinstance(tree, str) else []


def results_for(run, **changes):
    """An evaluation of a run that never took place."""
    meta = {
        **META, "imbalance": "long", "n": 200, "selection": "last", "checkpoint_sha256": run.sha256,
        "config": run.config, **changes,
    }  # fmt: skip
    return fake_results(meta=meta)


def model_images():
    return cards.check_images((8, 8, 1), 16)


def metadata_of(weights):
    with safetensors.safe_open(weights, "numpy") as file:
        return file.metadata()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A stopped run with a fake evaluation."""
    workdir = shutil.copytree(STORED, tmp_path_factory.mktemp("runs") / "run")
    loaded = load_run(workdir)
    (workdir / "evaluation" / "unfinished").rename(workdir / "unfinished")
    results_for(loaded).write(workdir / "evaluation")
    return workdir, loaded


@pytest.fixture(scope="module")
def published(run, tmp_path_factory):
    out = tmp_path_factory.mktemp("zoo") / "digits_lt" / "mine"
    zoo.publish(run[0], out)
    return out


@pytest.fixture
def files(published, tmp_path):
    """A copy that may be written to; the path of the card."""
    return shutil.copytree(published.parent, tmp_path / "digits_lt") / "mine.json"


# ---------------------------------------------------------------- the models that ship


def test_each_model_has_three_files_and_nothing_else_ships():
    assert DIGITS in NAMES
    found = sorted(str(path.relative_to(ZOO)) for path in ZOO.rglob("*") if path.is_file())
    endings = ("json", "robustbench.json", "safetensors")
    assert found == sorted(f"{name}.{ending}" for name in NAMES for ending in endings)


@pytest.mark.parametrize("name", MODELS)
def test_a_model_reproduces_its_predictions(name):
    model = load_model(name)
    stored, data = model.card["check"], model.card["data"]
    images = cards.check_images(data["images"], data["pixel_max"])
    assert checkpoints.digest({"images": images}) == stored["images_sha256"]
    logits = model.logits(images)
    assert logits.shape == (64, len(data["classes"]))
    sure = cards.sure(stored)
    assert sure.sum() >= 60  # so that the check says something
    np.testing.assert_array_equal(logits.argmax(1)[sure], np.array(stored["predictions"])[sure])
    assert len(set(stored["predictions"])) >= 3  # of noise; the logits themselves are compared below
    assert model.check() <= stored["tolerance"] < 1e-3 * np.abs(stored["logits"]).max()


@pytest.mark.parametrize("name", NAMES)
def test_the_files_of_a_model_agree(name):
    card, weights = card_of(name), ZOO / f"{name}.safetensors"
    assert card["name"] == name
    assert card["weights_sha256"] == hashlib.sha256(weights.read_bytes()).hexdigest()
    metadata = metadata_of(weights)
    assert json.loads(metadata["config"]) == card["config"]
    assert (metadata["name"], metadata["checkpoint_sha256"]) == (name, card["checkpoint"]["sha256"])
    assert metadata["method"] == card["method"] == card["config"]["method"]
    arrays = pytorch.read_weights(weights)
    assert {array.dtype.name for key, array in arrays.items() if "num_batches" not in key} == {"float32"}

    theirs = card_of(name, "robustbench.json")
    figures = {
        key: f"{100 * conditions[condition]['accuracy']['value']:.2f}"
        for evaluation in card["evaluations"].values()
        if theirs["footnote"].find(str(evaluation.get("part", f"{evaluation['n']} test images"))) >= 0
        for conditions in [evaluation["conditions"]]
        for key, condition in (("clean_acc", "clean"), ("autoattack_acc", "autoattack"))
        if condition in conditions
    }
    assert {key: theirs[key] for key in figures} == figures
    assert figures.keys() >= {"clean_acc"}
    assert theirs["dataset"] == card["data"]["name"] == name.partition("/")[0]


@pytest.mark.parametrize("name", NAMES)
def test_no_place_of_a_machine_is_published(name):
    found = texts([card_of(name), card_of(name, "robustbench.json")])
    found += texts(json.loads(metadata_of(ZOO / f"{name}.safetensors")["config"]))
    found += metadata_of(ZOO / f"{name}.safetensors").values()
    assert [text for text in found if text.startswith(("/", "~")) or "/tmp/" in text] == []


def test_figures_have_intervals_and_their_settings():
    evaluation = card_of(DIGITS)["evaluations"]["evaluation"]
    assert {"n", "norm", "epsilon", "autoattack", "commit", "date", "device"} <= evaluation.keys()
    assert {"clean", "pgd_20", "robal_aa", "autoattack", "worst"} <= evaluation["conditions"].keys()
    for figures in evaluation["conditions"].values():
        for name in ("accuracy", "head", "medium", "tail"):
            assert 0 <= figures[name]["low"] <= figures[name]["value"] <= figures[name]["high"] <= 1
        assert [len(bounds) for bounds in figures["per_class"].values()] == [10, 10, 10]


# ---------------------------------------------------------------- a model as a function


@pytest.mark.slow
def test_a_published_run_is_the_same_function(run, published):
    """With integers as with floats; its prior adjustment and scale are those of the run."""
    (_, loaded), model = run, load_model(published)
    images = loaded.test.images[::20]
    np.testing.assert_array_equal(model.logits(images), loaded.logits(images))
    floats = images / np.float32(16)
    np.testing.assert_array_equal(model.logits_fn(floats), loaded.logits_fn(floats))
    jax.tree.map(np.testing.assert_array_equal, (model.params, model.stats), (loaded.params, loaded.stats))
    assert model.config == loaded.config
    assert model.test.class_counts.tolist() == loaded.test.class_counts.tolist()
    assert model.test.class_names == loaded.test.class_names
    assert not len(model.test.images)
    with pytest.raises(ValueError, match="images"):
        model.logits(np.zeros((1, 4, 4, 1)))


@pytest.mark.slow
def test_a_model_by_each_of_its_paths(published):
    models = [load_model(f"{published}{ending}") for ending in ("", ".json", ".safetensors")]
    assert {model.sha256 for model in models} == {models[0].sha256}
    assert robal_jax.load_model is load_model


@pytest.mark.slow
def test_the_check_can_fail(published):
    model = load_model(published)
    changed = jax.tree.map(lambda array: array * np.float32(1.01), model.params)
    refused(
        "digits_lt/mine does not compute what its card says", dataclasses.replace(model, params=changed).check
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", [DIGITS, "digits_lt/robal_n_small_cnn"])
def test_rounding_stays_below_its_bound(name):
    """In float64 nothing is rounded."""
    model, images = load_model(name), cards.check_images((8, 8, 1), 16) / 16
    with jax.enable_x64(True):
        wide = jax.tree.map(np.float64, (model.params, model.stats))
        exact = np.asarray(model.predict(*wide, images))
    assert exact.dtype == np.float64
    apart = np.abs(exact - np.array(model.card["check"]["logits"])).max()
    assert 0 < apart < model.card["check"]["tolerance"] / 2


def test_config_without_paths():
    fields = {
        "data": {"path": "data/mine", "name": "x"},
        "generated": {"path": "/data/edm.npz", "share": 0.7},
        "train": {"teacher": "~/runs/at/", "start_from": "gs://bucket/runs/plain/", "select": "last"},
        "evaluation": {"audit": {"surrogate": "runs/at"}, "autoattack": "apgd_ce,mine:attack"},
    }
    assert cards.without_paths(fields) == {
        "data": {"path": "", "name": "x"},
        "generated": {"path": "edm.npz", "share": 0.7},
        "train": {"teacher": "at", "start_from": "plain", "select": "last"},
        "evaluation": {"audit": {"surrogate": ""}, "autoattack": "standard"},  # the model needs no attack
    }


def test_the_card_for_robustbench():
    results = fake_results(
        meta={**META, "imbalance": "IR 50", "n": 200, "epsilon": 8 / 255, "norm": "L-infinity"}
    )
    plain = cards.robustbench(results, "ResNet-20")
    conditions = results.conditions
    assert plain["reported"] == f"{100 * conditions['pgd_20']['accuracy']['value']:.2f}"
    assert "autoattack_acc" not in plain
    assert (plain["eps"], plain["architecture"], plain["unreliable"]) == ("8/255", "ResNet-20", False)
    assert plain["footnote"] == (
        "Trained on a long tail: IR 50; evaluated on all 200 test images; reported under PGD-20 at L∞ 8/255."
    )
    summary = fake_summary()
    summary["conditions"]["autoattack"] = summary["conditions"]["new_attack"]
    meta = {**results.meta, "part": "200 of 1000 test images", "generated": "uses generated data"}
    for outcome in (PASSED, FLAGGED):
        audit = {"examples": 9, "verdicts": [verdict("square", outcome, doubts=EVERYTHING)], "curves": {}}
        full = cards.robustbench(Results(meta, summary, audit), "ResNet-20")
        assert full["autoattack_acc"] == full["reported"]
        assert full["unreliable"] == (outcome == FLAGGED)
        assert full["footnote"].endswith(
            "200 of 1000 test images; reported under AutoAttack at L∞ 8/255; uses generated data."
        )
        assert cards.leading([results, Results(meta, summary, audit)]).summary is summary
        by_class = Results({**meta, "class_epsilon": [0.1] * 10}, summary, audit)
        assert cards.leading([by_class, results]) is results
        assert "not the standard threat model" in cards.robustbench(by_class, "ResNet-20")["footnote"]
        weaker = Results({**meta, "config": {"threat": {"epsilon": 0.1}}}, summary, audit)
        assert cards.leading([weaker, results]) is results
    assert (plain["additional_data"], full["additional_data"]) == (False, True)
    even = {**results.summary, "class_counts": [20] * len(results.summary["class_counts"])}
    balanced = cards.robustbench(dataclasses.replace(results, summary=even), "ResNet-20")
    assert balanced["footnote"].startswith("Evaluated on all 200 test images; reported")


def test_the_evaluation_that_counts_is_the_first_of_a_card():
    part = {"n": 200, "epsilon": 0.1, "conditions": {}}
    whole = {**part, "n": 1000}
    attacked = {**part, "conditions": {"autoattack": {}}}
    cases = {"part": part, "whole": whole, "attacked": attacked, "again": whole}
    assert list(cards.in_order(cases, {})) == ["attacked", "whole", "again", "part"]


# ---------------------------------------------------------------- what a load refuses


def test_unknown_names(tmp_path, monkeypatch):
    refused(f"no model 'at_small_cnn' in the zoo, .*use .*{DIGITS}", load_model, "at_small_cnn")
    refused(f"use {DIGITS}$|one of {DIGITS}", load_model, "digits_lt/at_smal_cnn")
    refused(f"use one of .*{DIGITS}", load_model, "")
    refused("no model", load_model, ZOO)
    refused("no model .*nowhere", zoo.make_run, tmp_path / "nowhere.json", tmp_path / "run")
    refused("stored_run is a run, .*robal_jax.load_run$", load_model, STORED)


def test_damaged_files(files):
    card, weights = json.loads(files.read_text()), files.with_suffix(".safetensors")
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    refused("is not what its card describes .*; restore both files", load_model, files)
    weights.write_bytes(whole[:1000])
    files.write_text(json.dumps(card | {"weights_sha256": hashlib.sha256(whole[:1000]).hexdigest()}))
    refused("cannot read .*undamaged", load_model, files)
    weights.write_bytes(whole)
    files.write_text(json.dumps(card | {"weights_sha256": "0" * 64}))
    refused("the card says 000000000000", load_model, files)
    weights.unlink()
    refused(r"cannot read .*mine\.safetensors \(No such file", load_model, files)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("{", "cannot read the card"),
        ("[]", "it has no name"),
        ({"config": {}}, r"config\.method is missing; take its value"),
        ({"config": 3}, "its entry 'config' is 3"),
        ({"config.evaluation": 3}, r"config\.evaluation\.\S+ is missing; take its value"),
        ({"data": {}}, "cannot read the card .*KeyError: 'images'"),
        ({"weights_sha256": None}, "its entry 'weights_sha256' is None"),
        ({"checkpoint": {}}, "its entry 'checkpoint' has no weights"),
        ({"check": {}}, "cannot read the card .*KeyError: 'logits'"),
        ({"check": {"logits": [["a"] * 10]}}, "cannot read the card .*could not convert string to float"),
        ({"check": {"logits": [[0.0] * 9], "tolerance": 1}}, "numbers of classes, counts and logits differ"),
        ({"name": "../../x"}, "its name is '../../x'"),
    ],
)
def test_damaged_cards(files, change, message):
    text, card = change, json.loads(files.read_text())
    if not isinstance(change, str):
        ((name, value),) = change.items()
        *sections, last = name.split(".")
        functools.reduce(dict.__getitem__, sections, card)[last] = value
        text = json.dumps(card)
    files.write_text(text)
    refused(message, load_model, files)


@pytest.mark.parametrize("field", ["model", "head", "loss", "evaluation.head"])
def test_a_card_runs_no_code(files, tmp_path, field):
    card, sections = json.loads(files.read_text()), field.split(".")
    inside = card["config"]
    for section in sections[:-1]:
        inside = inside[section]
    inside[sections[-1]] = {"name": "os:mkdir", "path": str(tmp_path / "made")}
    files.write_text(json.dumps(card))
    message = rf"names code to run: config\.{field}\.name is 'os:mkdir'; if you trust its author"
    refused(message, load_model, files)
    refused(message, zoo.make_run, files, tmp_path / "run")
    assert not (tmp_path / "made").exists() and not (tmp_path / "run").exists()


def test_code_in_a_card_runs_if_its_author_is_trusted(files):
    card = json.loads(files.read_text())
    assert card["config"]["head"]["name"] == "cosine"
    card["config"]["head"]["name"] = "robal_jax.classifiers:CosineHead"  # the same, by its full name
    files.write_text(json.dumps(card))
    refused(r"config\.head\.name is 'robal_jax\.classifiers:CosineHead'", load_model, files)
    model = load_model(files, trust_code=True)
    model.check()
    assert model.card["config"]["head"]["name"] == "robal_jax.classifiers:CosineHead"


def test_a_folder_is_no_file_to_write(run, tmp_path):
    """Nothing is written if one of the three places is taken."""
    (tmp_path / "mine.robustbench.json").mkdir()
    refused("mine.robustbench.json is a folder; choose another file", zoo.publish, run[0], tmp_path / "mine")
    assert len(list(tmp_path.iterdir())) == 1


# ---------------------------------------------------------------- a model as a run


@pytest.mark.slow
def test_a_run_of_a_model(published, run, tmp_path):
    """It is made once, found again, and another one is left alone."""
    zoo.make_run(published, tmp_path / "run")
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [
        "checkpoints", "config.json", "import.json",
    ]  # fmt: skip
    made = load_run(tmp_path / "run")
    images = run[1].test.images[:50]
    np.testing.assert_array_equal(made.logits(images), run[1].logits(images))
    assert not differences(read_config(tmp_path / "run"), read_config(run[0]))
    card = json.loads(published.with_suffix(".json").read_text())
    sha256 = card["weights_sha256"]
    assert origin_of(tmp_path / "run") == f"model digits_lt/mine of the zoo, a small_cnn, sha256 {sha256}"

    before = (tmp_path / "run" / "import.json").stat().st_mtime_ns
    zoo.make_run(published, tmp_path / "run")
    assert (tmp_path / "run" / "import.json").stat().st_mtime_ns == before
    shutil.rmtree(tmp_path / "run" / "checkpoints")  # as after a kill
    zoo.make_run(published, tmp_path / "run")
    assert checkpoints.steps(tmp_path / "run" / "checkpoints") == [0]
    refused("holds a run already; choose another workdir", zoo.make_run, DIGITS, tmp_path / "run")
    refused("holds a run already; choose another workdir", zoo.make_run, published, run[0])


@pytest.mark.slow
def test_two_jobs_may_make_the_same_run(published, tmp_path):
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda _: zoo.make_run(published, tmp_path / "run"), range(2)))
    assert checkpoints.steps(tmp_path / "run" / "checkpoints") == [0]
    assert not list((tmp_path / "run").glob(".*"))


def test_no_run_of_a_model_is_made_in_a_bucket(published, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    message = "gs://bucket/x is in a bucket; name a folder of this machine as --workdir"
    refused(message, zoo.make_run, published, pathlib.Path("gs://bucket/x"))
    assert not list(tmp_path.iterdir())


def test_a_run_of_a_model_has_the_data_of_its_training(published, tmp_path):
    zoo.make_run(published, tmp_path)
    path = tmp_path / "import.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"data_sha256": "0" * 64}))
    refused("the data differ from those of the run", load_run, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("which", ["current", "average"])
def test_a_run_can_start_from_a_model(files, tmp_path, which):
    """An average is the only weights of its checkpoint, so it cannot be taken for the current ones."""
    card = json.loads(files.read_text())
    card["checkpoint"]["weights"] = card["config"]["evaluation"]["weights"] = which
    card["config"]["average"] = {"name": "none" if which == "current" else "ema"}
    files.write_text(json.dumps(card))
    zoo.make_run(files, tmp_path / "run")
    found = checkpoints.read_latest(tmp_path / "run")
    assert bool(found.tree["average"]) == (not found.tree["params"]) == (which == "average")
    job = builder.training(read_config(tmp_path / "run"))
    state = fine_tuned_state(job, found, lambda line: None)
    model = load_model(files)
    jax.tree.map(np.testing.assert_array_equal, (state.params, state.stats), (model.params, model.stats))
    made = load_run(tmp_path / "run")
    np.testing.assert_array_equal(made.logits(model_images()), model.logits(model_images()))
    if which == "average":
        with pytest.raises(InputError, match="the checkpoint has only an average; use 'average'"):
            load_run(tmp_path / "run", weights="current")


def test_averaged_weights_of_a_run_that_trains_a_part(files, tmp_path):
    card = json.loads(files.read_text())
    card["checkpoint"]["weights"] = card["config"]["evaluation"]["weights"] = "average"
    card["config"]["average"] = {"name": "ema"}
    card["config"]["optimizer"]["trainable"] = "classifier"
    files.write_text(json.dumps(card))
    zoo.make_run(files, tmp_path / "run")
    np.testing.assert_array_equal(
        load_run(tmp_path / "run").logits(model_images()), load_model(files).logits(model_images())
    )


@pytest.mark.slow
def test_class_counts_of_a_mixture(files, tmp_path):
    """A model that was trained with generated images has their class counts for its prior."""
    shutil.copytree(ZOO / "digits_lt", files.parent, dirs_exist_ok=True)
    card = card_of("digits_lt/robal_n_small_cnn")
    tau, counts = card["config"]["evaluation"]["tau_p"], np.array(card["data"]["class_counts"])
    plain = load_model("digits_lt/robal_n_small_cnn").logits(model_images())
    card["data"]["trained_counts"] = counts[::-1].astype(float).tolist()
    path = files.with_name("robal_n_small_cnn.json")
    path.write_text(json.dumps(card))
    zoo.make_run(path, tmp_path / "run")
    assert class_counts_in_training(tmp_path / "run").tolist() == card["data"]["trained_counts"]
    for mixed in (load_model(path), load_run(tmp_path / "run")):
        assert mixed.test.class_counts.tolist() == counts.tolist()  # of the groups
        moved = mixed.logits(model_images()) - plain
        np.testing.assert_allclose(moved, np.tile(tau * np.log(counts / counts[::-1]), (64, 1)), atol=1e-5)


# ---------------------------------------------------------------- what a publication refuses


def test_what_cannot_be_published(run, tmp_path):
    workdir, loaded = run
    out = tmp_path / "digits_lt" / "mine"
    refused("no evaluation in", zoo.publish, STORED, out)
    refused("no run in", zoo.publish, tmp_path / "nothing", out)
    for name in ("mine.json", "mine.safetensors", "my mine"):
        refused("without their endings, FOLDER/NAME", zoo.publish, workdir, out.with_name(name))
    same = f"--evaluations={workdir}/evaluation,evaluation={workdir}"
    arguments = [f"--workdir={workdir}", f"--out={out}", same]
    refused("two evaluations are named 'evaluation'; name them, as in whole=", publish.main, arguments)
    for changes, message in (
        (
            {"checkpoint_sha256": "0" * 64},
            r"other is of another checkpoint \(sha256 000000000000…; the run's",
        ),
        ({"config": {"evaluation": {"tau_p": 2.0}}}, r"other changes config\.evaluation\.tau_p of the run"),
    ):
        folder = tmp_path / "other"
        folder.mkdir(exist_ok=True)
        results_for(loaded, **changes).write(folder)
        refused(message, zoo.publish, workdir, out, {"other": folder})
    assert not out.parent.exists()


def test_imported_weights_are_not_published(published, tmp_path):
    zoo.make_run(published, tmp_path / "run")
    refused(
        "were imported; publish a run that was trained here", zoo.publish, tmp_path / "run", tmp_path / "x"
    )


@pytest.mark.slow
def test_a_run_of_a_model_adds_its_evaluations_to_the_card(files, tmp_path):
    """The weights stay, and so do the figures under AutoAttack, which the second evaluation has not."""
    zoo.make_run(files, tmp_path / "run")
    loaded, before = load_run(tmp_path / "run"), json.loads(files.read_text())
    weights = files.with_suffix(".safetensors").read_bytes()
    folders = {name: tmp_path / name for name in ("more", "less")}
    for name, folder in folders.items():
        folder.mkdir()
        found = results_for(loaded, n=190)
        if name == "more":
            conditions = found.summary["conditions"]
            conditions["autoattack"] = conditions["pgd_20"]
        found.write(folder)
    out = files.with_suffix("")
    written = zoo.publish(tmp_path / "run", out, {"more": folders["more"]})
    assert written == [files, files.with_suffix(".robustbench.json")]
    assert zoo.publish(tmp_path / "run", out, {"less": folders["less"]}) == [files]
    card = json.loads(files.read_text())
    assert list(card["evaluations"]) == ["more", *before["evaluations"], "less"]  # AutoAttack first
    assert card | {"evaluations": before["evaluations"]} == before
    assert files.with_suffix(".safetensors").read_bytes() == weights
    assert "evaluated on all 190 test images" in files.with_suffix(".robustbench.json").read_text()
    load_model(files).check()


def test_the_data_of_a_run_of_a_model_are_where_its_evaluation_has_them(files, tmp_path, monkeypatch):
    """Its own config has no place of them."""
    zoo.make_run(files, tmp_path / "run")
    loaded, places = load_run(tmp_path / "run"), []
    data = {**loaded.config["data"], "path": "here.npz"}
    (tmp_path / "more").mkdir()
    results_for(loaded, config={**loaded.config, "data": data}).write(tmp_path / "more")
    monkeypatch.setattr(
        zoo.publishing, "load_run", lambda workdir, data_path: places.append(data_path) or loaded
    )
    zoo.publish(tmp_path / "run", files.with_suffix(""), {"more": tmp_path / "more"})
    assert places == ["here.npz"]


@pytest.mark.parametrize(
    ("changes", "attacks", "replaced"),
    [
        ({}, ["autoattack"], True),
        ({"n": 100}, ["autoattack"], False),
        ({"epsilon": 0.05}, ["autoattack"], False),
        ({"class_epsilon": [0.1] * 10, "n": 900}, ["autoattack"], False),
        ({"n": 900}, [], False),
        ({"n": 900}, ["autoattack"], True),
    ],
)
def test_the_card_for_robustbench_is_never_replaced_by_a_weaker_one(tmp_path, changes, attacks, replaced):
    """The model's evaluation is at its radius, with AutoAttack, of 700 images."""
    shutil.copytree(ZOO / "digits_lt", tmp_path / "digits_lt")
    files = [tmp_path / f"{DIGITS}{ending}" for ending in ENDINGS]
    meta = {**META, "imbalance": "long", "n": 700, "epsilon": 0.1, "config": card_of(DIGITS)["config"]}
    new, before = fake_results(meta=meta | changes), files[2].read_bytes()
    conditions = new.summary["conditions"]
    conditions |= dict.fromkeys(attacks, conditions["pgd_20"])
    authors = card_of(DIGITS, "robustbench.json")["authors"]
    assert (files[2] in _with_more_figures(files, {"new": new}, authors, "MIT")) == replaced
    assert (files[2].read_bytes() != before) == replaced
    card = json.loads(files[1].read_text())
    assert ("new" in card["evaluations"], card["license"]) == (True, "MIT")
    _with_more_figures(files, {"new": new}, "Others", "MIT")
    if replaced:  # what leads is replaced by a weaker one of the same name
        smaller = dataclasses.replace(new, meta=new.meta | {"n": 50})
        _with_more_figures(files, {"new": smaller}, "Others", "MIT")
        assert "evaluated on all 50 test images" in json.loads(files[2].read_text())["footnote"]
    assert json.loads(files[2].read_text())["authors"] == "Others"


def stated(out):
    """Authors and licence of a published model."""
    return tuple(
        json.loads(out.with_name(f"{out.name}{ending}").read_text())[field]
        for ending, field in ((".robustbench.json", "authors"), (".json", "license"))
    )


@pytest.mark.slow
def test_whose_a_model_is_only_its_user_can_say(run, published, tmp_path, capsys):
    assert stated(published) == ("N/A", "not stated")
    out = tmp_path / "digits_lt" / "mine"
    arguments = [f"--workdir={run[0]}", f"--out={out}"]
    publish.main([*arguments, "--authors=Ada, Bo", "--license=MIT"])
    assert stated(out) == ("Ada, Bo", "MIT")
    publish.main(arguments)  # keeps what its card says
    assert stated(out) == ("Ada, Bo", "MIT")
    publish.main([*arguments, "--license=CC0-1.0"])
    assert stated(out) == ("Ada, Bo", "CC0-1.0")
    assert {stated(ZOO / name) for name in NAMES} == {("The robal_jax authors", "Apache-2.0")}


@pytest.mark.parametrize("ending", ["safetensors", "json", "robustbench.json"])
def test_no_other_file_is_replaced(run, tmp_path, ending):
    path = tmp_path / f"mine.{ending}"
    path.write_text("precious")
    refused("is not an earlier output of this command", zoo.publish, run[0], tmp_path / "mine")
    assert path.read_text() == "precious"


def test_results_of_evaluate_model_are_refused(run, tmp_path):
    (tmp_path / "front").mkdir()
    fake_results(meta={**META, "checkpoint_sha256": run[1].sha256}).write(tmp_path / "front")
    evaluations = {"front": tmp_path / "front"}
    refused("front was made by evaluate_model", zoo.publish, run[0], tmp_path / "mine", evaluations)
    assert not list(tmp_path.glob("mine.*"))


def test_a_publication_is_replaced_by_the_same_bytes(run, files):
    before = {path.name: path.read_bytes() for path in files.parent.iterdir()}
    zoo.publish(run[0], files.with_suffix(""), {"evaluation": run[0]})
    assert {path.name: path.read_bytes() for path in files.parent.iterdir()} == before


# ---------------------------------------------------------------- the commands


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize("average", ["none", "ema"])
def test_evaluating_a_model_is_evaluating_its_run(tmp_path, monkeypatch, capsys, average):
    """With held-out images, whose share changes the class counts, and with averaged weights."""
    monkeypatch.chdir(tmp_path)
    config = cli.load_config(f"{ROOT}/configs/robal_n.py:digits_lt")
    fields = [
        "train.epochs=4", "train.held_out=0.05", "attack.steps=1", "data.test_per_class=6",
        f"average.name={average}", f"evaluation.weights={'current' if average == 'none' else 'average'}",
        "evaluation.autoattack=apgd_ce", "evaluation.audit.examples=0",
    ]  # fmt: skip
    training.train(
        cli.apply_overrides(config, [f"--config.{field}" for field in fields]), tmp_path / "trained"
    )
    part = "--examples=20"
    evaluate.main(["--workdir=trained", part])
    publish.main(
        ["--workdir=trained", "--evaluations=part=trained/evaluation-20-images", "--out=digits_lt/mine"]
    )
    evaluate.main(["--model=digits_lt/mine", part])
    made = tmp_path / "runs" / "zoo" / "digits_lt" / "mine"
    first, second = (read_run(run / "evaluation-20-images").examples for run in (tmp_path / "trained", made))
    assert first.keys() == second.keys()
    for name in first:
        np.testing.assert_array_equal(first[name], second[name])

    card = json.loads((tmp_path / "digits_lt" / "mine.json").read_text())
    trained = load_run(tmp_path / "trained")
    assert card["data"]["class_counts"] == trained.test.class_counts.tolist() != [104, 74]
    assert sum(card["data"]["class_counts"]) < 351
    assert "held_out" in card["data"]
    meta = Results.read(made / "evaluation-20-images").meta
    assert meta["origin"].startswith("model digits_lt/mine of the zoo, a small_cnn, sha256 ")
    assert meta["selection"] == "last"
    assert meta.get("weights") == (None if average == "none" else "average (ema)")
    assert "digits_lt/mine of the zoo" in (made / "evaluation-20-images" / "report.md").read_text()
    assert imported_from(made)["data_sha256"] == card["data"]["sha256"]
    if average == "ema":
        refused(
            "the checkpoint has only an average", evaluate.main, [f"--workdir={made}", "--weights=current"]
        )


def test_a_model_as_surrogate(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made = evaluate.surrogate_run(DIGITS)
    assert made == f"runs/zoo/{DIGITS}" == evaluate.surrogate_run(made)
    assert imported_from(tmp_path / made)["weights_sha256"] == card_of(DIGITS)["weights_sha256"]
    assert evaluate.surrogate_run("runs/at") == "runs/at"


def test_what_the_command_refuses(tmp_path, capsys):
    refused(
        "--model has one checkpoint",
        evaluate.main,
        [f"--model={DIGITS}", f"--checkpoint={STORED}/checkpoints/5"],
    )
    refused("no model 'x' in the zoo", evaluate.main, ["--model=x"])
    for main, arguments, message in (
        (evaluate.main, [], "--workdir is missing; usage: Evaluate"),
        (publish.main, [f"--workdir={STORED}"], "--out is missing; usage: Publish"),
    ):
        with pytest.raises(InputError, match=message):
            main(arguments)
    with pytest.raises(cli.Done):
        evaluate.main(["--help"])
    assert "--model: a model of the zoo" in capsys.readouterr().out


def test_the_config_of_a_model_is_printed_without_a_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    evaluate.main([f"--model={DIGITS}", "--print-config", "--examples=20"])
    assert json.loads(capsys.readouterr().out)["evaluation"]["examples"] == 20
    assert not list(tmp_path.iterdir())
