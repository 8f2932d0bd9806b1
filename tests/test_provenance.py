"""What is stored to tell later how a number was made: commit, processor, course of the training."""

import json
import pathlib
import subprocess

import pytest

from robal_jax.storage.progress import training_curve
from robal_jax.storage.workdir import git_commit, processor, versions


def git(folder, *arguments):
    identity = ("-c", "user.name=n", "-c", "user.email=e", "-c", "commit.gpgsign=false")
    command = ["git", "-C", str(folder), *identity, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


@pytest.fixture
def checkout(tmp_path):
    (tmp_path / "package").mkdir()
    (tmp_path / "file").write_text("1")
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", "file")
    git(tmp_path, "commit", "-q", "-m", "first")
    git(tmp_path, "tag", "-a", "v1", "-m", "a tag is no commit")
    return tmp_path


def test_commit_of_a_checkout(checkout):
    commit = git(checkout, "rev-parse", "HEAD")
    assert git_commit(checkout) == commit
    (checkout / "untracked").write_text("runs, for example")
    assert git_commit(checkout) == commit
    (checkout / "file").write_text("2")
    assert git_commit(checkout) == f"{commit}-dirty"


def test_no_commit_outside_of_a_checkout(checkout, monkeypatch):
    assert git_commit(checkout / "package") == ""  # an installed package in a folder of another repository
    monkeypatch.setenv("PATH", "")
    assert git_commit(checkout) == ""  # no git


def test_a_damaged_checkout_has_no_commit(checkout):
    (checkout / ".git" / "HEAD").write_text("")
    assert git_commit(checkout) == ""


def test_versions_name_the_processor():
    assert versions()["processor"] == processor() != ""
    assert "\n" not in processor()
    assert all(versions().values())


def write(workdir, rows, end=""):
    text = "".join(json.dumps(row) + "\n" for row in rows) + end
    (workdir / "metrics.jsonl").write_text(text)


ROWS = [
    {"step": 4, "epoch": 1, "loss": 3.0, "adv_accuracy": 0.1, "images_per_second": 1.0},
    {"step": 5, "epoch": 1, "loss": 8.0, "adv_accuracy": 0.6, "images_per_second": 1.0},
    {"step": 10, "epoch": 2, "loss": 1.0, "adv_accuracy": 0.9, "images_per_second": 1.0},
]


def test_course_of_the_training_is_means_over_the_steps_of_an_epoch(tmp_path):
    write(tmp_path, ROWS)
    found = training_curve(tmp_path)
    assert found == {
        "epoch": [1, 2],
        "loss": [pytest.approx(4.0), 1.0],
        "adv_accuracy": [pytest.approx(0.2), 0.9],
    }
    json.dumps(found, allow_nan=False)
    assert training_curve(tmp_path, last=5)["epoch"] == [1]
    assert training_curve(tmp_path, last=0) == {}


def test_a_run_without_metrics(tmp_path):
    assert training_curve(tmp_path) == {}
    (tmp_path / "metrics.jsonl").write_bytes(b"")
    assert training_curve(tmp_path) == {}


@pytest.mark.parametrize(
    "line", ["{", '{"step": 7}', "[]", "3", '{"step": "7", "epoch": 2}', '{"step": null, "epoch": 1}', "\x00"]
)
@pytest.mark.parametrize("place", [0, 2, 3])
def test_damaged_lines_are_left_out(tmp_path, line, place):
    lines = [json.dumps(row) for row in ROWS]
    (tmp_path / "metrics.jsonl").write_text("\n".join([*lines[:place], line, *lines[place:]]) + "\n")
    found = training_curve(tmp_path)
    assert found["loss"] == [pytest.approx(4.0), 1.0]


def test_a_file_that_is_no_text(tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes(b"\xff\xfe\n")
    assert training_curve(tmp_path) == {}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), None, "x", True])
def test_metrics_that_are_no_numbers_are_left_out(tmp_path, value):
    rows = [*ROWS[:2], {**ROWS[2], "adv_accuracy": value}]
    write(tmp_path, rows)
    assert set(training_curve(tmp_path)) == {"epoch", "loss"}


def test_rows_that_do_not_go_forward(tmp_path):
    write(tmp_path, [*ROWS, *ROWS])  # two copies of one file, one after the other
    json.dumps(training_curve(tmp_path), allow_nan=False)


def test_the_run_of_an_older_version_has_its_course():
    found = training_curve(pathlib.Path(__file__).with_name("stored_run"))
    assert found["epoch"] == [1, 2]
    assert set(found) >= {"loss", "adv_accuracy", "nat_accuracy", "learning_rate"}
