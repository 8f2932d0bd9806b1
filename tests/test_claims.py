"""A job writes only to folders and files of its own (robal_jax.storage.claims and check_replaceable)."""

import json
import pathlib
import shutil

import numpy as np
import pytest
from conftest import ROOT
from helpers import refused

from experiments import compare, export_torch, reproduce
from robal_jax import evaluate_model, training
from robal_jax.attacks import ThreatModel
from robal_jax.errors import InputError
from robal_jax.evaluation import loop
from robal_jax.reporting import report
from robal_jax.storage import claims
from robal_jax.storage.files import check_replaceable
from robal_jax.storage.unfinished import Unfinished
from robal_jax.storage.workdir import check_there, make_workdir

STORED = ROOT / "tests" / "stored_run"


@pytest.fixture
def run(tmp_path):
    return shutil.copytree(STORED, tmp_path / "run")


def content(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def check_evaluation(folder):
    claims.check_evaluation(folder, report.FILES)


# ---------------------------------------------------------------- folders of other jobs


@pytest.mark.parametrize("check", [make_workdir, check_evaluation])
@pytest.mark.parametrize(
    ("place", "owner"),
    [
        ("checkpoints", "the run .*run"),
        ("checkpoints/5", "the checkpoint .*/5"),
        ("checkpoints/5/new", "the checkpoint .*/5"),
        ("checkpoints/7/new", "the run .*run"),
        ("damaged/new", "the run .*run"),
        ("tensorboard", "the run .*run"),
        ("evaluation/unfinished", "the evaluation .*run/evaluation"),
        ("evaluation/unfinished/new", "the evaluation .*run/evaluation"),
    ],
)
def test_no_folder_inside_of_what_belongs_to_another_job(run, check, place, owner):
    before = content(run)
    refused(f"belongs to {owner}; choose another folder", check, run / place)
    (run.parent / "link").symlink_to(run)
    refused(f"belongs to {owner}; choose another folder", check, run.parent / "link" / place)
    shutil.copytree(run / "checkpoints" / "5", run.parent / "best")
    refused("belongs to the checkpoint .*best", check, run.parent / "best" / "new")
    assert content(run) == before


def test_a_run_and_an_evaluation_do_not_share_a_folder(run):
    refused(r"is the folder of a run; choose another, such as .*evaluation$", check_evaluation, run)
    refused("has an evaluation; choose another folder", make_workdir, run / "evaluation")


@pytest.mark.parametrize("place", ["", "evaluation-2", "new/evaluation", "evaluation/again", "checkpoints2"])
def test_other_folders_may_be_used(run, place):
    make_workdir(run / place) if not place else check_evaluation(run / place)
    make_workdir(run.parent / "next" / place)
    make_workdir(run.parent / "next" / place)


def test_folders_called_like_those_of_a_run_are_no_obstacle(tmp_path):
    for name in ("checkpoints", "unfinished", "damaged"):
        make_workdir(tmp_path / name / "run")
        check_evaluation(tmp_path / name / "evaluation")


# ---------------------------------------------------------------- files of a user


NAMES = {
    make_workdir: (
        "config.json", "versions.json", "import.json", "metrics.jsonl", "tensorboard", "checkpoints",
    ),
    check_evaluation: (
        "results.json", "report.html", "report.md", "per_class.csv", "examples.npz", "adversarial.npz",
        "audit.npz", "corrupted.npz", "certified.npz", "optimality.npz", "training.png", "unfinished",
    ),
}  # fmt: skip


@pytest.mark.parametrize("text", ["", "[1, 2]", "{}", '{"meta": 1}', "precious"])
@pytest.mark.parametrize(("check", "name"), [(check, name) for check in NAMES for name in NAMES[check]])
def test_a_file_of_a_user_stays(tmp_path, check, name, text):
    path = tmp_path / name
    if "." not in name:
        path.mkdir()
        path = path / "mine.txt"
    path.write_text(text)
    refused(f"{name} is not of an? .* and would be lost; choose another folder, or move", check, tmp_path)
    assert path.read_text() == text
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("name", ["results.json", "training.png"])
def test_a_link_is_a_file_too(tmp_path, name):
    (tmp_path / name).symlink_to(tmp_path / "nowhere")
    refused("would be lost", check_evaluation, tmp_path)


def test_a_file_of_a_user_stays_when_any_model_is_evaluated(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "conditions", lambda *_: pytest.fail("attacked"))
    images, labels = np.random.RandomState(0).rand(6, 3, 3, 1).astype(np.float32), np.arange(6) % 3
    model = lambda x: x.reshape(len(x), 9)[:, :3]  # noqa: E731
    (tmp_path / "report.html").write_text("precious")
    with pytest.raises(InputError, match=r"report.html is not of an evaluation"):
        evaluate_model(model, images, labels, folder=tmp_path, version="none", threat=ThreatModel(0.1))
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


@pytest.mark.parametrize("kept", ["results.json", "examples.npz", "unfinished"])
def test_an_evaluation_is_known_by_any_of_its_files(tmp_path, kept):
    folder = tmp_path / "new"
    folder.mkdir()
    (folder / "report.html").write_text("of the evaluation")
    refused("report.html is not of an evaluation", check_evaluation, folder)
    if kept == "unfinished":
        Unfinished(folder / "unfinished" / "ensemble.npz", {"seed": 0}).save({})
    elif kept == "examples.npz":
        np.savez(folder / kept, labels=np.arange(3), ids=np.arange(3))
    else:
        (folder / kept).write_text('{"meta": {}, "summary": {}}')
    check_evaluation(folder)


def test_what_a_killed_job_leaves_is_its_own(tmp_path):
    (tmp_path / "unfinished").mkdir()  # before the first save
    check_evaluation(tmp_path)
    (tmp_path / "unfinished" / ".conditions.npz.tmp").write_bytes(b"PK")
    (tmp_path / "unfinished" / "conditions.npz").write_bytes(b"PK")
    check_evaluation(tmp_path)
    (tmp_path / "unfinished" / "thesis.npz").write_bytes(b"PK")
    refused("unfinished is not of an evaluation", check_evaluation, tmp_path)
    versions = tmp_path / "run" / "versions.json"
    versions.parent.mkdir()
    versions.write_text(json.dumps({"robal_jax": "0.1.0", "data_sha256": "0"}))  # before config.json
    make_workdir(versions.parent)


# ---------------------------------------------------------------- a run that is moved


@pytest.mark.parametrize("gone", [".", "config.json", "checkpoints", "checkpoints/5"])
def test_a_run_that_is_gone_is_noticed(run, gone):
    check_there(run)
    check_there(run, run / "checkpoints" / "5")
    (run / gone).rename(run.parent / "moved")
    refused(
        r"is gone: .*run was moved or removed while it was used; move it back and run the same command again",
        check_there, run, run / "checkpoints" / "5",
    )  # fmt: skip


@pytest.mark.slow
def test_training_says_that_its_folder_is_gone(tmp_path, monkeypatch):
    """As soon as the next checkpoint is due, and without a new folder in its place."""
    from robal_jax import cli
    from robal_jax.training import loop as training_loop

    config = cli.load_config("at:digits_lt")
    overrides = ["train.epochs=1", "train.max_steps=1", "attack.steps=1", "schedule.warmup=0"]
    config = cli.apply_overrides(config, [f"--config.{override}" for override in overrides])
    monkeypatch.setattr(training_loop, "chunks", lambda *_: iter_moved(tmp_path))
    refused("run was moved or removed", training.train, config, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    assert (tmp_path / "moved" / "config.json").is_file()


def iter_moved(folder):
    """No steps; the folder of the run is moved in the meantime."""
    (folder / "run").rename(folder / "moved")
    yield from ()


# ---------------------------------------------------------------- single files


@pytest.mark.parametrize(
    ("beginning", "taken"),
    [(b"", True), (b"# Comparison of runs\n", True), (b"My thesis", False), (b"\xff\xfe\0", False)],
)
def test_only_an_earlier_output_is_replaced(tmp_path, beginning, taken):
    path = tmp_path / "x.md"
    check_replaceable(path, "# Comparison")
    path.write_bytes(beginning)
    if taken:
        check_replaceable(path, "# Comparison")
    else:
        refused(
            "x.md is not an earlier output of this command, and would be lost", check_replaceable, path, "# C"
        )
    check_replaceable(pathlib.Path("/dev/null"), "# Comparison")


def test_a_single_file_is_not_written_to_a_bucket():
    path = pathlib.Path("gs://bucket/runs/x.md")
    refused("gs://bucket/runs/x.md is in a bucket; name a file of", check_replaceable, path, "# Comparison")


@pytest.mark.parametrize(
    ("main", "arguments", "name"),
    [
        (compare.main, "a b --out={}", "results.json"),
        (compare.main, "a b --html={}", "report.html"),
        (compare.main, "a b --html=new.html --out={}", "notes.md"),
        (export_torch.main, "--workdir=run --out={}", "released.safetensors"),
        (reproduce.main, "--table=1 --rows=at --seeds=1 --out={1}", "digits_lt/table1.md"),
        (reproduce.main, "--table=1 --rows=at --seeds=1 --out={1}", "digits_lt/table1.json"),
    ],
)
def test_no_command_replaces_a_file_of_a_user(tmp_path, main, arguments, name):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text("precious")
    refused(
        "is not an earlier output of this command, and would be lost",
        main,
        arguments.format(path, tmp_path).split(),
    )
    assert path.read_text() == "precious"


@pytest.mark.parametrize("other", ["x", "./x", "y/../x"])
def test_two_outputs_are_two_files(tmp_path, monkeypatch, other):
    monkeypatch.chdir(tmp_path)
    refused(
        "--out and --html are both x; name two files", compare.main, ["a", "b", "--out=x", f"--html={other}"]
    )


def test_a_name_that_is_not_utf_8(tmp_path):
    with pytest.raises(InputError, match="is no name in UTF-8; choose another folder"):
        claims.check_run(tmp_path / "r\udcfcn")
