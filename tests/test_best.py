"""The best checkpoint of a run (robal_jax.storage.best): which one, after kills too, and whose folder."""

import json
import os
import random
import re
import shutil
import signal
import time

import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT

from experiments.benchmarks.layouts import Layout, start
from robal_jax import cli
from robal_jax.errors import InputError
from robal_jax.storage import checkpoints, claims
from robal_jax.storage.best import Record, default_checkpoint, how_chosen, is_better, keep_if_best, read_best
from robal_jax.storage.config_file import read_config
from robal_jax.storage.workdir import make_workdir, prepare_workdir

STORED = ROOT / "tests" / "stored_run"


@pytest.fixture
def run(tmp_path):
    return shutil.copytree(STORED, tmp_path / "run")


JUDGED = {"weights": "current", "epsilon": 0.1, "budget": "constant"}


def record(step, score, images="held-out", judged=JUDGED):
    return Record(step, step // 5, 9, images, score, {"held_out_pgd_balanced": score}, judged=judged)


def state(value):
    return {"params": {"w": jnp.full((3,), float(value))}, "step": jnp.int32(value)}


def offer(run, *offers, images="held-out"):
    """Offers checkpoints of (step, score) in turn; the step that is kept, after a look at the folder."""
    for step, score in offers:
        keep_if_best(run, record(step, score, images), state(step))
    found = read_best(run)
    assert checkpoints.steps(run / "best") == [found.step]
    tree, sha256 = checkpoints.read(run / "best" / str(found.step))
    assert sha256 == found.sha256
    np.testing.assert_array_equal(tree["params"]["w"], np.full(3, float(found.step)))
    return found.step


@pytest.mark.parametrize(
    ("new", "old", "better"),
    [((9, 0.6), (5, 0.5), True), ((9, 0.4), (5, 0.5), False), ((9, 0.5), (5, 0.5), False),
     ((5, 0.5), (9, 0.5), True), ((5, 0.5), (5, 0.5), False), ((5, 0.6), (5, 0.5), False)],
)  # fmt: skip
def test_which_is_better(new, old, better):
    assert is_better(record(*new), record(*old)) == better


def test_the_highest_is_kept_and_of_equals_the_first(run):
    assert read_best(run) is None
    assert offer(run, (5, 0.3), (10, 0.5), (15, 0.5), (20, 0.4)) == 10
    assert offer(run, (25, 0.6)) == 25


def test_a_resumed_run_keeps_what_it_makes_again(run):
    """From step 10 on, after a kill past step 20; on other devices an earlier one may be better now."""
    offer(run, (5, 0.3), (10, 0.2), (15, 0.4), (20, 0.5))
    assert offer(run, (15, 0.4), (20, 0.5), (25, 0.45)) == 20
    assert offer(run, (15, 0.55)) == 15


def test_a_kill_before_the_record_is_written(run):
    """The new checkpoint is there and the record names the old one."""
    offer(run, (5, 0.3))
    shutil.copytree(run / "best" / "5", run / "best" / "10")
    assert read_best(run).step == 5
    assert offer(run, (10, 0.5)) == 10


def test_a_kill_before_the_old_one_is_removed(run):
    offer(run, (5, 0.3))
    old = shutil.copytree(run / "best" / "5", run.parent / "5")
    offer(run, (10, 0.5))
    shutil.copytree(old, run / "best" / "5")
    assert read_best(run).step == 10
    assert offer(run, (15, 0.6)) == 15


def test_a_folder_without_its_record_counts_for_nothing(run):
    offer(run, (5, 0.9))
    (run / "best" / "best.json").unlink()
    assert read_best(run) is None
    assert offer(run, (10, 0.1)) == 10


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[1]",
        '{"step": 5}',
        '{"step": 5, "epoch": 1, "more": 2}',
        json.dumps({**record(5, 0.5)._asdict(), "judged": {"weights": "current"}}),
        json.dumps({**record(5, 0.5)._asdict(), "judged": [1]}),
    ],
)
def test_a_damaged_record(run, content):
    offer(run, (5, 0.9))
    (run / "best" / "best.json").write_text(content)
    with pytest.raises(
        InputError, match=r"cannot read .*best\.json .*restore it from a copy, or remove"
    ) as raised:
        read_best(run)
    assert len(str(raised.value).splitlines()) == 1


def test_a_run_that_was_moved(run):
    run.rename(run.parent / "moved")
    with pytest.raises(InputError, match="was moved or removed"):
        keep_if_best(run, record(5, 0.5), state(5))
    assert not run.exists()


# ---------------------------------------------------------------- which checkpoint is evaluated


def test_what_is_evaluated(run):
    assert default_checkpoint(run, "last") is None
    with pytest.raises(InputError, match=r"select is 'best', but .*best has no checkpoint.*select=last"):
        default_checkpoint(run, "best")
    offer(run, (5, 0.3))
    assert default_checkpoint(run, "best") == run / "best" / "5"
    assert default_checkpoint(run, "last") is None
    with pytest.raises(InputError, match=r"select is 'best_on_test', but .* was chosen on held-out images"):
        default_checkpoint(run, "best_on_test")
    (run / "versions.json").rename(run / "import.json")
    assert default_checkpoint(run, "best") is None


def test_how_it_was_chosen(run):
    newest, best = run / "checkpoints" / "5", run / "best" / "5"
    assert how_chosen(run, newest, "last", JUDGED) == {"selection": "last"}
    offer(run, (5, 0.512))
    text = "best on held-out images (epoch 1 of 9, PGD-10 51.2 % as the mean of the classes)"
    assert how_chosen(run, best, "last", JUDGED) == {"selection": text}
    assert how_chosen(run, newest, "best", JUDGED) == {
        "selection": "last"
    }  # not the best one, whatever is said
    assert how_chosen(run, run / "checkpoints" / "3", "last", JUDGED) == {"selection": "named by hand: 3"}
    link = run.parent / "link"
    link.symlink_to(run)
    assert how_chosen(link, link / "best" / "5", "best", JUDGED) == {"selection": text}


@pytest.mark.parametrize(("total", "said"), [(5, ""), (300, "step 5 of 300: the training is not finished")])
def test_a_training_that_is_not_finished_says_so(run, tmp_path, total, said):
    """Not of a checkpoint named by hand; older runs do not know their number of steps."""
    config, digest = read_config(run), json.loads((run / "versions.json").read_text())["data_sha256"]
    new = tmp_path / "new"
    prepare_workdir(config, digest, new, total_steps=total)
    shutil.copytree(run / "checkpoints", new / "checkpoints")
    offer(new, (4, 0.512))
    last, best, hand = (
        how_chosen(new, new / path, "last", JUDGED)["selection"] for path in ("checkpoints/5", "best/4", "3")
    )
    assert last == ("last, " + said if said else "last")
    assert best.endswith(f"of the classes); the last is {said}" if said else "of the classes)")
    assert hand == "named by hand: 3"


@pytest.mark.parametrize(
    ("evaluated", "more"),
    [
        ({}, ""),
        ({"weights": "average"}, "; chosen by the current weights at epsilon 0.1"),
        ({"epsilon": 0.05}, "; chosen by the current weights at epsilon 0.1"),
        ({"budget": "given"}, "; chosen by the current weights at epsilon 0.1, budget constant"),
        (
            {"budget": "given", "radii": [1.0]},
            "; chosen by the current weights at epsilon 0.1, budget constant",
        ),
    ],
)
def test_what_was_judged_is_said_if_another_thing_is_evaluated(run, evaluated, more):
    offer(run, (5, 0.512))
    found = how_chosen(run, run / "best" / "5", "best", JUDGED | evaluated)
    assert found["selection"].endswith(f"PGD-10 51.2 % as the mean of the classes{more})")


@pytest.mark.parametrize(
    ("known", "more"),
    [
        ({"radii": [0.1, 0.3]}, "; chosen by the current weights at epsilon 0.1, other radii by class)"),
        ({"radii": [0.1, 0.2]}, "as the mean of the classes)"),
        ({}, "as the mean of the classes)"),  # an older record
    ],
)
def test_radii_that_were_given_are_compared(run, known, more):
    offer(run, (5, 0.512))
    path, given = run / "best" / "best.json", JUDGED | {"budget": "given"}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"judged": given | known}))
    found = how_chosen(run, run / "best" / "5", "best", given | {"radii": [0.1, 0.2]})
    assert found["selection"].endswith(more)


def test_an_older_record_does_not_say_what_was_judged(run):
    offer(run, (5, 0.512))
    path = run / "best" / "best.json"
    fields = json.loads(path.read_text())
    assert fields.pop("judged") == JUDGED
    path.write_text(json.dumps(fields))
    found = how_chosen(run, run / "best" / "5", "best", JUDGED | {"epsilon": 0.05})
    assert found["selection"].endswith("as the mean of the classes)")


def test_how_it_was_chosen_on_test_images(run):
    offer(run, (5, 0.5), images="test")
    assert default_checkpoint(run, "best_on_test") == run / "best" / "5"
    found = how_chosen(run, run / "best" / "5", "last", JUDGED)  # a fact, whatever is said
    assert found["selected_on_test"] is True
    assert found["selection"].startswith("best on test images (epoch 1 of 9")
    assert how_chosen(run, run / "checkpoints" / "5", "last", JUDGED) == {"selection": "last"}


def test_an_imported_run_is_believed(run):
    (run / "versions.json").rename(run / "import.json")
    path = run / "checkpoints" / "5"
    assert how_chosen(run, path, "last", JUDGED) == {}
    assert how_chosen(run, path, "best", JUDGED) == {"selection": "best on held-out images, as stated"}
    stated = {"selection": "best on test images, as stated", "selected_on_test": True}
    assert how_chosen(run, path, "best_on_test", JUDGED) == stated


# ---------------------------------------------------------------- the config of the run

LOOKS = ("train.held_out=0.2", "train.evaluate_epochs=1", "train.select=best")


def with_config(workdir, *overrides):
    """Makes or resumes a run on the digits, as far as its folder is concerned."""
    config = cli.apply_overrides(
        cli.load_config(f"{ROOT}/configs/at.py:digits_lt"), [f"--config.{field}" for field in overrides]
    )
    prepare_workdir(config, "0" * 64, workdir)
    return json.loads((workdir / "config.json").read_text())["evaluation"]


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("evaluation.epsilon=0.005", "evaluation.epsilon: 0.005 here, 0.1 there"),
        ("evaluation.weights=average", "evaluation.weights: 'average' here, 'current' there"),
        ("evaluation.budget.name=by_frequency", "budget.name: 'by_frequency' here, 'constant' there"),
        ("evaluation.head.name=tau_norm", "evaluation.head.name: 'tau_norm' here, '' there"),
        ("evaluation.tail_classes=2", "evaluation.tail_classes: 2 here, 0 there"),
        ("evaluation.seed=1", "evaluation.seed: 1 here, 0 there"),
    ],
)  # fmt: skip
def test_what_chooses_the_best_is_not_changed_on_the_way(tmp_path, override, line):
    with_config(tmp_path, *LOOKS)
    with pytest.raises(InputError, match=rf"made with a different config \(.*{re.escape(line)}"):
        with_config(tmp_path, *LOOKS, override)
    changed = with_config(tmp_path, *LOOKS, "evaluation.autoattack=none", "evaluation.audit.examples=0")
    assert changed["autoattack"] == "none"  # no look depends on it


def test_without_looks_the_evaluation_may_change(tmp_path):
    with_config(tmp_path)
    assert with_config(tmp_path, "evaluation.epsilon=0.005")["epsilon"] == 0.005


def test_a_finished_run_keeps_its_evaluation(run):
    """It has made 5 steps."""
    other = cli.apply_overrides(
        read_config(run),
        ["--config.evaluation.epsilon=0.005", "--config.method=B", "--config.train.keep_checkpoints=7"],
    )
    digest, before = json.loads((run / "versions.json").read_text())["data_sha256"], read_config(run)
    line = prepare_workdir(other, digest, run, total_steps=5)
    assert line.startswith(f"the run is finished, so {run / 'config.json'} keeps its evaluation (")
    assert "evaluation.epsilon: 0.1, not 0.005" in line
    assert line.endswith("give --config.evaluation.* to python experiments/evaluate.py instead")
    after = read_config(run)
    assert (after.evaluation, after.method) == (before.evaluation, before.method)
    assert after.train.keep_checkpoints == 7  # as of any run
    assert not prepare_workdir(after, digest, run, total_steps=5)
    assert not prepare_workdir(other, digest, run, total_steps=10)  # one that is not finished
    assert read_config(run).evaluation.epsilon == 0.005


# ---------------------------------------------------------------- the folder


@pytest.mark.parametrize("place", ["best", "best/5", "best/new"])
def test_the_folder_belongs_to_the_run(run, place):
    offer(run, (5, 0.5))
    with pytest.raises(InputError, match=r"belongs to the (run|checkpoint) .*; choose another folder"):
        claims.check_evaluation(run / place, ())
    with pytest.raises(InputError, match=r"belongs to the (run|checkpoint) .*; choose another folder"):
        make_workdir(run / place)


def test_a_foreign_folder_of_this_name_is_no_place_for_a_run(tmp_path):
    (tmp_path / "best").mkdir()
    (tmp_path / "best" / "mine.txt").write_text("mine")
    with pytest.raises(InputError, match="best is not of a training, and would be lost"):
        make_workdir(tmp_path)


def test_the_command_line_knows_it(run):
    offer(run, (5, 0.5))
    best = run / "best" / "5"
    for values in (("", str(best)), (str(run), "best/5"), (str(run), str(best))):
        found = cli.run_and_checkpoint(dict(zip(("workdir", "checkpoint"), values, strict=True)))
        assert found == (run, best)
    with pytest.raises(InputError, match=r"is a checkpoint; write --workdir=.*run --checkpoint=.*best/5$"):
        cli.run_and_checkpoint({"workdir": str(best), "checkpoint": ""})


# ---------------------------------------------------------------- kills

KILLS = int(os.environ.get("ROBAL_KILLS", "2"))
EPOCHS = 8


def trained(workdir, env, kill=None):
    """Trains, up to a kill as soon as ``kill(workdir)`` holds; the process."""
    fields = (
        f"train.epochs={EPOCHS}", "schedule.milestones=(5,)", "schedule.warmup=0", "attack.steps=2",
        "train.checkpoint_epochs=3", "train.held_out=0.25", "train.evaluate_epochs=1", "train.select=best",
    )  # fmt: skip
    config = [f"--config={ROOT}/configs/at.py:digits_lt", *(f"--config.{field}" for field in fields)]
    (process,) = start(Layout("jit", 1), [*config, f"--workdir={workdir}"], **env)
    while kill is not None and process.poll() is None and not kill(workdir):
        time.sleep(0.001)
    if kill is not None:
        process.send_signal(signal.SIGKILL)
    _, errors = process.communicate()
    assert kill or process.returncode == 0, errors
    return process


def ending(workdir):
    """What must not depend on kills: the last state, the record, its checkpoint, and all that was found."""
    found = json.loads((workdir / "best" / "best.json").read_text())
    (best,) = checkpoints.steps(workdir / "best")
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    looks = [(row["step"], row["held_out_pgd"], row["held_out_pgd_balanced"]) for row in rows]
    return (
        checkpoints.read_latest(workdir).sha256,
        found,
        checkpoints.read(workdir / "best" / str(best))[1],
        looks,
    )


def at_epoch(count):
    def reached(workdir):
        path = workdir / "metrics.jsonl"
        return path.exists() and path.read_text().count("\n") >= count

    return reached


def replacing(workdir):
    """Whether a best checkpoint is being written, or the old one is not removed yet."""
    return len([path for path in workdir.glob("best/*") if path.is_dir()]) > 1


@pytest.mark.long
@pytest.mark.slow
def test_killed_runs_choose_the_same_checkpoint(tmp_path, capsys):
    env = {}  # all runs share the compilations of the tests
    trained(tmp_path / "whole", env)
    expected, generator, hits, during = ending(tmp_path / "whole"), random.Random(0), 0, 0
    assert expected[1]["sha256"] == expected[2]
    for i in range(KILLS):
        workdir = tmp_path / str(i)
        kill = replacing if i % 2 else at_epoch(generator.randrange(1, EPOCHS))
        hits += trained(workdir, env, kill).returncode == -signal.SIGKILL
        during += replacing(workdir)
        trained(workdir, env)
        assert ending(workdir) == expected
        shutil.rmtree(workdir)
    with capsys.disabled():
        print(f"\n{KILLS} kills, {hits} before the end, {during} during a change of the best: all equal")
    assert hits
