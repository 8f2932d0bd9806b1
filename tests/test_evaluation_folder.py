"""An evaluation never replaces another, and what is finished is not lost (robal_jax.storage.evaluated)."""

import json
import shutil
from functools import partial

import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT
from sklearn import datasets

from experiments import reproduce
from robal_jax import cli, evaluate_model, evaluation
from robal_jax.attacks import ThreatModel
from robal_jax.errors import InputError, ReportError
from robal_jax.evaluation import loop
from robal_jax.reporting import figures
from robal_jax.storage import evaluated as folders
from robal_jax.storage.config_file import read_config
from robal_jax.storage.lock import alone_in
from robal_jax.storage.unfinished import Unfinished

STORED = ROOT / "tests" / "stored_run"
NO_ATTACKS = ("evaluation.autoattack=none", "evaluation.audit.examples=0")


def evaluate(workdir, *overrides, said=None, **keywords):
    """Evaluates with the first attacks only; the folder and all that was said."""
    said = [] if said is None else said
    config = cli.apply_overrides(read_config(workdir), [f"--config.{o}" for o in (*NO_ATTACKS, *overrides)])
    return evaluation.evaluate(config, workdir, say=said.append, **keywords), said


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    """A run and its evaluation. Not to be written to."""
    workdir = tmp_path_factory.mktemp("runs") / "run"
    shutil.copytree(STORED, workdir, ignore=shutil.ignore_patterns("evaluation"))
    evaluate(workdir)
    return workdir


@pytest.fixture
def copy(evaluated, tmp_path):
    return shutil.copytree(evaluated, tmp_path / "run")


@pytest.fixture
def no_attack(monkeypatch):
    monkeypatch.setattr(loop, "conditions", lambda *_: pytest.fail("attacked again"))


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


# ---------------------------------------------------------------- the same settings


@pytest.mark.slow
def test_the_same_settings_are_done(copy, no_attack):
    before = content(copy / "evaluation")
    folder, said = evaluate(copy)
    assert said[0] == f"{folder} has this evaluation; remove {folder / 'results.json'} to repeat it"
    assert any("PGD-20" in line for line in said)
    assert said[-1] == f"report {folder / 'report.html'}"
    assert content(folder) == before


@pytest.mark.slow
def test_a_damaged_audit_file_costs_nothing(copy, no_attack):
    """No other figure depends on it."""
    (copy / "evaluation" / "audit.npz").write_bytes(b"PK")
    before = content(copy / "evaluation")
    folder, _ = evaluate(copy)
    assert content(folder) == before


@pytest.mark.slow
@pytest.mark.parametrize("name", ["results.json", "examples.npz"])
@pytest.mark.parametrize("keep", [0, 20, 200])
def test_a_damaged_file_is_named_before_all_is_evaluated_again(copy, monkeypatch, name, keep):
    said = []

    def attack(*_):
        said.append("attacks")

    monkeypatch.setattr(loop, "conditions", attack)  # None: as after a signal
    path = copy / "evaluation" / name
    path.write_bytes(path.read_bytes()[:keep])
    config = cli.apply_overrides(read_config(copy), [f"--config.{override}" for override in NO_ATTACKS])
    evaluation.evaluate(config, copy, say=said.append)
    (warning,) = (line for line in said if line.startswith(f"warning: {path} is damaged ("))
    assert said.index(warning) < said.index("attacks")


@pytest.mark.slow
@pytest.mark.parametrize("content", ["[1, 2]", "{}", '{"meta": 3}', '"mine"'])
def test_results_of_somebody_else_are_kept(copy, no_attack, content):
    (copy / "mine").mkdir()
    (copy / "mine" / "results.json").write_text(content)
    with pytest.raises(InputError, match=r"mine/results\.json is not of an evaluation"):
        evaluate(copy, folder=copy / "mine")
    assert (copy / "mine" / "results.json").read_text() == content


def test_the_batch_size_is_no_other_evaluation(copy, no_attack):
    assert "has this evaluation" in evaluate(copy, "evaluation.batch_size=7")[1][0]


@pytest.mark.slow
def test_a_report_that_is_missing_is_written_of_what_is_stored(copy, no_attack):
    folder = copy / "evaluation"
    before = content(folder)
    for name in ("report.html", "attacks.png"):
        (folder / name).unlink()
    evaluate(copy)
    assert content(folder).keys() == before.keys()
    for name in ("report.html", "report.md", "results.json", "per_class.csv", "examples.npz"):
        assert (folder / name).read_bytes() == before[name]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["results.json", "examples.npz"])
@pytest.mark.parametrize("damage", ["removed", "damaged"])
def test_results_that_are_incomplete_are_made_again(copy, name, damage):
    folder, path = copy / "evaluation", copy / "evaluation" / name
    (folder / "adversarial.npz").write_bytes(b"of an ensemble that is gone")
    (folder / "gallery.png").write_bytes(b"of an older report")
    (folder / "mine.txt").write_text("the user's own")
    before = json.loads((folder / "results.json").read_text())["summary"]
    path.unlink()
    if damage == "damaged":
        path.write_bytes(b"{")
    evaluate(copy)
    assert json.loads((folder / "results.json").read_text())["summary"] == before
    assert not {"adversarial.npz", "gallery.png"} & set(content(folder))
    assert (folder / "mine.txt").read_text() == "the user's own"


# ---------------------------------------------------------------- other settings


@pytest.mark.parametrize(
    ("override", "difference"),
    [
        ("evaluation.epsilon=0.2", "evaluation.epsilon: 0.2 here, 0.1 there"),
        ("evaluation.autoattack=apgd_ce", "evaluation.autoattack: 'apgd_ce' here, 'none' there"),
        ("evaluation.audit.examples=3", "evaluation.audit.examples: 3 here, 0 there"),
        ("evaluation.seed=3", "evaluation.seed: 3 here, 0 there"),
        ("evaluation.tau_p=0.7", "evaluation.tau_p: 0.7 here, 0.1 there"),
    ],
)
def test_other_settings_replace_nothing(copy, no_attack, override, difference):
    before = content(copy / "evaluation")
    with pytest.raises(InputError) as raised:
        evaluate(copy, override)
    message = str(raised.value)
    assert len(message.splitlines()) == 1
    assert message.startswith(f"{copy / 'evaluation'} has an evaluation with other settings (")
    assert difference in message
    assert "name another folder" in message
    assert content(copy / "evaluation") == before


SEVERAL = "evaluation.groups=last_80_percent,few,thirds"


@pytest.mark.slow
@pytest.mark.parametrize("overrides", [(SEVERAL,), ("evaluation.head_classes=2",)])
def test_other_groups_need_no_attack(copy, no_attack, overrides):
    folder, before = copy / "evaluation", json.loads((copy / "evaluation" / "results.json").read_text())
    evaluated_before = (folder / "examples.npz").read_bytes()
    _, said = evaluate(copy, *overrides, command="again")
    assert "the classes are divided into other groups; no attack is run again" in said
    after = json.loads((folder / "results.json").read_text())
    assert after["summary"]["groups"] != before["summary"]["groups"]
    assert after["meta"] == before["meta"] | {"config": after["meta"]["config"], "command": "again"}
    assert after["meta"]["config"] != before["meta"]["config"]
    assert (folder / "examples.npz").read_bytes() == evaluated_before
    for name, row in before["summary"]["conditions"].items():  # all that is not by group
        found = after["summary"]["conditions"][name]
        assert {key: found.get(key) for key in row.keys() - before["summary"]["groups"]} == {
            key: row[key] for key in row.keys() - before["summary"]["groups"]
        }
    assert not [line for line in evaluate(copy, *overrides)[1] if "other groups" in line]
    evaluate(copy)
    assert json.loads((folder / "results.json").read_text())["summary"] == before["summary"]


def test_an_unfinished_evaluation_goes_on_in_other_groups(tmp_path):
    """No attack depends on them, so that what was found is not lost."""
    path, changed = tmp_path / "unfinished" / "conditions.npz", {"groups": "last_five", "tail_classes": 2}
    identity = {"config": {"evaluation": {"epsilon": 0.1, "tail_classes": 0}}}
    Unfinished(path, identity).save({"pred": np.arange(3)})
    other = {"config": {"evaluation": {"epsilon": 0.1, **changed}}}
    assert folders.belongs(tmp_path, other) is False
    np.testing.assert_array_equal(Unfinished(path, other).arrays["pred"], np.arange(3))


def test_several_protocols_are_side_by_side(copy, no_attack):
    folder, _ = evaluate(copy, SEVERAL)
    summary = json.loads((folder / "results.json").read_text())["summary"]
    assert list(summary["protocols"]) == ["last_80_percent", "few", "thirds"]
    assert list(summary["groups"]) == ["head", "tail"]
    assert len(summary["groups"]["tail"]) == 8
    tail = summary["protocols"]["last_80_percent"]["tail"]
    assert tail["accuracy"]["pgd_20"] == summary["conditions"]["pgd_20"]["tail"]
    report = (folder / "report.md").read_text()
    section = report.partition("## Class groups by protocol")[2].partition("## ")[0]
    rows = [line.split("|")[1:3] for line in section.splitlines() if line.startswith("|")]
    assert len(rows) == 2 + 2 + len(summary["protocols"]["few"]) + 3
    assert rows[2][0].strip() == "Last 80 %"


@pytest.mark.slow
def test_another_folder_is_the_way_out(copy):
    before = content(copy / "evaluation")
    folder, _ = evaluate(copy, "evaluation.seed=3", folder=copy / "other")
    assert (folder / "report.html").is_file()
    assert content(copy / "evaluation") == before


def with_meta(folder, **changes):
    results = json.loads((folder / "results.json").read_text())
    results["meta"] = {k: v for k, v in (results["meta"] | changes).items() if v is not None}
    (folder / "results.json").write_text(json.dumps(results))


@pytest.mark.parametrize(
    ("changes", "difference"),
    [
        ({"checkpoint_sha256": "0" * 64}, "here, 000000000000… there"),
        ({"test_set_sha256": "1" * 64}, "here, 111111111111… there"),
        ({"config": None}, "data.name: 'digits_lt' here, None there"),
    ],
)
def test_another_checkpoint_other_data_or_an_older_file_replace_nothing(copy, no_attack, changes, difference):
    with_meta(copy / "evaluation", **changes)
    with pytest.raises(InputError, match="has an evaluation with other settings") as raised:
        evaluate(copy)
    assert difference in str(raised.value)


def test_an_unfinished_evaluation_is_not_replaced_either(tmp_path):
    identity = {"config": {"evaluation": {"epsilon": 0.1, "batch_size": 5}}, "checkpoint_sha256": "a" * 64}
    Unfinished(tmp_path / "unfinished" / "conditions.npz", identity).save({"pred": np.arange(3)})
    other = {**identity, "config": {"evaluation": {"epsilon": 0.2, "batch_size": 5}}}
    with pytest.raises(
        InputError, match=r"an unfinished evaluation with other .*epsilon: 0.2 here, 0.1 there"
    ):
        folders.belongs(tmp_path, other)
    same = {**identity, "config": {"evaluation": {"epsilon": 0.1, "batch_size": 9}}}
    assert folders.belongs(tmp_path, same) is False
    assert folders.belongs(tmp_path / "nowhere", same) is False


def test_an_unfinished_evaluation_goes_on_with_the_surrogate_it_began_with(tmp_path):
    """Older ones do not name it, and go on."""
    identity = {"checkpoint_sha256": "a" * 64}
    path, arrays = tmp_path / "unfinished" / "conditions.npz", {"pred": np.arange(3)}
    first, retrained = ({**identity, "surrogate_sha256": letter * 64} for letter in "bc")
    for written in (identity, first):
        Unfinished(path, written).save(arrays)
        assert folders.belongs(tmp_path, first) is False
        assert list(Unfinished(path, first).arrays) == ["pred"]
    with pytest.raises(
        InputError, match=r"other settings .surrogate_sha256: cccccccccccc… here, bbbbbbbbbbbb… th"
    ):
        folders.belongs(tmp_path, retrained)
    assert not Unfinished(path, retrained).arrays


def test_a_long_list_of_differences_is_cut(tmp_path):
    identity = {"settings": {str(k): k for k in range(20)}}
    Unfinished(tmp_path / "unfinished" / "conditions.npz", identity).save({})
    with pytest.raises(InputError, match="; and 12 more"):
        folders.belongs(tmp_path, {"settings": {str(k): -1 for k in range(20)}})


def test_one_evaluation_per_folder(copy, no_attack):
    with (
        alone_in(copy / "evaluation"),
        pytest.raises(InputError, match=r"evaluation is used by another process"),
    ):
        evaluate(copy)


def test_a_table_sets_an_outdated_evaluation_aside(copy):
    said, sha256 = [], folders.identity_in(copy / "evaluation")["checkpoint_sha256"]
    reproduce.set_outdated_aside(copy / "evaluation", sha256, said.append)
    assert (copy / "evaluation").is_dir()
    assert not said
    reproduce.set_outdated_aside(copy / "evaluation", "0" * 64, said.append)
    (aside,) = copy.glob("evaluation-*")
    assert (aside / "results.json").is_file()
    assert said == [f"{copy / 'evaluation'} is of another checkpoint; moved to {aside}"]


# ---------------------------------------------------------------- what may fail comes last


def broken(*_, **__):
    raise RuntimeError("no font")


@pytest.mark.slow
def test_a_figure_that_cannot_be_drawn_costs_no_result(copy, monkeypatch):
    folder, said = copy / "evaluation", []
    before = content(folder)
    (folder / "results.json").unlink()
    with monkeypatch.context() as patched:
        patched.setattr(figures, "per_class_figure", broken)
        with pytest.raises(
            ReportError, match=r"complete, but not the report \(RuntimeError: no font\); remove"
        ):
            evaluate(copy, said=said)
    assert {"results.json", "examples.npz", "per_class.csv"} == set(content(folder))
    assert not (folder / "unfinished").exists()
    assert any("PGD-20" in line for line in said)
    monkeypatch.setattr(loop, "conditions", lambda *_: pytest.fail("attacked again"))
    evaluate(copy)
    assert content(folder).keys() == before.keys()


@pytest.fixture
def model():
    digits = datasets.load_digits()
    images, labels = np.float32(digits.images[:60, ..., None] / 16), digits.target[:60]
    weight = jnp.asarray(np.linalg.lstsq(images.reshape(60, 64), np.eye(10)[labels], rcond=None)[0])
    logits_fn = lambda x: x.reshape(-1, 64) @ weight  # noqa: E731
    return partial(evaluate_model, logits_fn, images, labels, threat=ThreatModel(0.05), audit=0)


@pytest.mark.slow
def test_any_model(model, tmp_path, monkeypatch):
    """The front door: the same rules, and a report that fails is a warning."""
    said = []
    with monkeypatch.context() as patched:
        patched.setattr(figures, "per_class_figure", broken)
        first = model(version="apgd_ce", folder=tmp_path, say=said.append)
    assert first.predictions["apgd_ce"].shape == (60,)
    assert said[-1].startswith("warning: the results in ")
    assert not (tmp_path / "report.html").exists()
    with monkeypatch.context() as patched:
        patched.setattr(loop, "conditions", lambda *_: pytest.fail("attacked again"))
        second = model(version="apgd_ce", folder=tmp_path, say=said.append)
        assert (tmp_path / "report.html").is_file()
        assert (tmp_path / "gallery.png").is_file()
        with pytest.raises(InputError, match=r"settings.version: 'none' here, 'apgd_ce' there"):
            model(version="none", folder=tmp_path)
        with pytest.raises(InputError, match=r"settings.seed: 1 here, 0 there"):
            model(version="apgd_ce", folder=tmp_path, seed=1)
    assert second.summary == first.summary
    (tmp_path / "adversarial.npz").write_bytes(b"PK")  # damaged: made again
    third = model(version="apgd_ce", folder=tmp_path, say=said.append)
    assert third.summary == first.summary
    assert np.load(tmp_path / "adversarial.npz")["images"].shape[1:] == (8, 8, 1)
