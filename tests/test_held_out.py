"""Held-out training images: which ones, what is built from them, and what is judged during the training."""

import itertools
import json
import shutil

import jax
import numpy as np
import pytest
from conftest import ROOT
from helpers import META, fake_results, verdict
from ml_collections import ConfigDict

from experiments.benchmarks.layouts import Layout, finish, start
from robal_jax import ThreatModel, builder, cli, evaluate_model, evaluation, load_run, training
from robal_jax.data import Dataset, held_out_part, image_folder, sources, without
from robal_jax.devices import parallel
from robal_jax.errors import InputError
from robal_jax.evaluation.outcomes import selected_on_test
from robal_jax.reporting import curves, page, sections
from robal_jax.reporting.audit import audit_verdict
from robal_jax.reporting.results import CHOICE, EVERYTHING, FIXED_STEPS, FLAGGED
from robal_jax.storage.config_file import evaluates_another_run, read_config
from robal_jax.storage.progress import judged_course, training_curve
from robal_jax.storage.workdir import data_digest
from robal_jax.training.judging import accuracies, compiled_judge

DIGITS = f"{ROOT}/configs/at.py:digits_lt"
STORED = ROOT / "tests" / "stored_run"
GROUPS = {"head": np.array([0, 1]), "tail": np.array([2])}


def digits(*overrides):
    return cli.apply_overrides(cli.load_config(DIGITS), [f"--config.{override}" for override in overrides])


# ---------------------------------------------------------------- which images


@pytest.mark.parametrize("share", [0.01, 0.1, 0.3, 0.5, 0.74])
@pytest.mark.parametrize("seed", [0, 5])
def test_the_share_of_every_class(share, seed):
    labels = np.random.default_rng(2).permutation(np.repeat(np.arange(4), [100, 31, 7, 3]))
    ids = held_out_part(labels, share, seed)
    assert (np.diff(ids) > 0).all()
    assert np.bincount(labels[ids]).tolist() == [max(1, round(share * n)) for n in (100, 31, 7, 3)]
    np.testing.assert_array_equal(held_out_part(labels, share, seed), ids)


def test_larger_shares_hold_the_smaller_and_seeds_differ():
    labels = np.repeat(np.arange(3), [80, 40, 20])
    parts = [set(held_out_part(labels, share, 1)) for share in (0.05, 0.1, 0.4, 0.8)]
    assert all(small < large for small, large in itertools.pairwise(parts))
    assert parts[1] != set(held_out_part(labels, 0.1, 2))
    assert not len(held_out_part(labels, 0.0, 1))


@pytest.mark.parametrize(("counts", "share", "empty"), [((9, 1), 0.1, 1), ((2, 9), 0.8, 0), ((9, 4), 0.9, 1)])
def test_a_share_that_empties_a_class(counts, share, empty):
    labels = np.repeat([0, 1], counts)
    message = rf"held_out is {share:g}, but class {empty} has {counts[empty]} training images?, of which none"
    with pytest.raises(InputError, match=message):
        held_out_part(labels, share, 0)


def test_what_is_left_and_what_is_held_out():
    data = sources.load_digits_lt()
    ids = held_out_part(data.train_labels, 0.2, 0)
    rest, held = without(data, ids)
    assert len(rest.train_labels) + len(held.labels) == len(data.train_labels)
    np.testing.assert_array_equal(held.images, data.train_images[ids])
    everything = np.concatenate([rest.train_images, held.images])
    assert sorted(x.tobytes() for x in everything) == sorted(x.tobytes() for x in data.train_images)
    np.testing.assert_array_equal(rest.class_counts + np.bincount(held.labels), data.class_counts)
    np.testing.assert_array_equal(held.class_counts, rest.class_counts)
    np.testing.assert_array_equal(rest.test_images, data.test_images)


def test_larger_training_images_are_cut_like_test_images():
    images = np.arange(4 * 6 * 8, dtype=np.uint8).reshape(4, 6, 8, 1)
    labels = np.array([0, 0, 1, 1], np.int32)
    data = Dataset(images, labels, images[:2, :3, :4], labels[1:3], 255, ("a", "b"))
    rest, held = without(data, np.array([1, 3]))
    np.testing.assert_array_equal(held.images, images[[1, 3], 1:4, 2:6])
    assert rest.train_images.shape == (2, 6, 8, 1)
    files = image_folder.ImageFiles(tuple(f"{i}.png" for i in range(4)), resize=6, size=6, root="nowhere")
    test = image_folder.ImageFiles(("t.png",), resize=6, size=4)
    rest, held = without(data._replace(train_images=files, test_images=test), np.array([1, 3]))
    assert (held.images.paths, held.images.shape, held.images.root) == (
        ("1.png", "3.png"), (2, 4, 4, 3), "nowhere",
    )  # fmt: skip
    assert (rest.train_images.paths, rest.train_images.shape) == (("0.png", "2.png"), (2, 6, 6, 3))


# ---------------------------------------------------------------- what is built


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.held_out=1"], r"config\.train\.held_out is 1\.0; it must be in \[0, 1\)"),
        (["train.held_out=-0.1"], r"config\.train\.held_out is -0\.1; it must be in \[0, 1\)"),
        (
            ["train.held_out=0.95"],
            r"held_out is 0\.95, but class 7 has 10 training images, of which none is left",
        ),
        (["train.evaluate_epochs=-1"], r"config\.train\.evaluate_epochs is -1; it must be >= 0"),
        (["train.evaluate_epochs=3"], r"evaluate_epochs is 3, but no images are held out; set"),
        (["train.select=best"], r"select is 'best', but config\.train\.evaluate_epochs is 0"),
        (["train.select=best_on_test"], r"select is 'best_on_test', but config\.train\.evaluate_epochs is 0"),
        (["train.select=first"], r"select is 'first'; it must be one of last, best, best_on_test"),
        (["train.select=best", "train.evaluate_epochs=1"], "evaluate_epochs is 1, but no images are held"),
    ],
)
def test_what_cannot_be(overrides, message):
    with pytest.raises(InputError, match=message) as raised:
        builder.training(digits(*overrides))
    assert len(str(raised.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("evaluated", "message"),
    [
        ({"budget": {"name": "cfa"}}, "config.evaluation.budget: unknown budget 'cfa'"),
        (
            {"budget": {"name": "given", "epsilons": [0.1, 0.2]}},
            "evaluation.budget: the shape of epsilons is",
        ),
        ({"budget": {"name": "given", "epsilons": [0.1] * 9 + [1.5]}}, "gives class 9 the radius 1.5"),
        ({"examples": 9999}, "config.evaluation.examples is 9999; give 10"),
    ],
)
@pytest.mark.parametrize("looks", [(), ("train.held_out=0.2", "train.evaluate_epochs=1")])
def test_an_evaluation_that_is_sure_to_fail_stops_the_training(evaluated, message, looks):
    config = digits(*looks)
    with config.unlocked():
        for field, value in evaluated.items():
            config.evaluation[field] = ConfigDict(value) if isinstance(value, dict) else value
    with pytest.raises(InputError, match=message) as raised:
        builder.training(config)
    assert len(str(raised.value).splitlines()) == 1


def test_training_and_evaluation_agree():
    config = digits("train.held_out=0.2", "train.evaluate_epochs=1")
    job, attacked, whole = builder.training(config), builder.evaluation(config), builder.training(digits())
    assert job.data_sha256 == attacked.data_sha256 == whole.data_sha256 == data_digest(whole.data)
    np.testing.assert_array_equal(attacked.test.class_counts, job.data.class_counts)
    assert (job.data.class_counts < whole.data.class_counts).all()
    assert job.about["held out"] == "71 of 351 training images, at least one per class"
    assert attacked.about["held_out"] == job.about["held out"]
    assert (job.judged_on, len(job.judged.test.labels), len(job.judged.ids)) == ("held-out", 71, 71)
    np.testing.assert_array_equal(whole.data.train_images[job.judged.ids], job.judged.test.images)
    assert job.judged.judged == {"weights": "current", "epsilon": 0.1, "budget": "constant"}
    assert whole.judged is None
    assert "held out" not in whole.about


def test_an_evaluation_that_holds_out_other_images_names_both_shares():
    run, none = digits("train.held_out=0.25"), digits("train.held_out=0")
    assert evaluates_another_run(none, run) == ["config.train.held_out is 0.0 here, 0.25 in the run"]
    assert evaluates_another_run(run, none) == ["config.train.held_out is 0.25 here, 0.0 in the run"]


def test_on_test_images():
    job = builder.training(digits("train.evaluate_epochs=4", "train.select=best_on_test"))
    assert (job.judged_on, len(job.judged.test.labels)) == ("test", 700)
    np.testing.assert_array_equal(job.judged.ids, np.arange(700))


@pytest.mark.parametrize("field", ["start_from", "teacher"])
def test_a_run_that_may_have_seen_them_is_doubted(field):
    config = digits("train.held_out=0.1", f"train.{field}=runs/x")
    assert any(
        f"{field} names a run that may have been trained on the held-out images" in line
        for line in builder.doubts(config)
    )
    assert builder.doubts(digits("train.start_from=runs/x")) == []


# ---------------------------------------------------------------- the figures


def test_accuracies_of_uneven_classes():
    labels = np.array([0, 0, 0, 0, 1, 1, 2])
    right = np.array([1, 1, 1, 0, 1, 0, 1], bool)
    found = accuracies(right, labels, GROUPS)
    assert found == pytest.approx(
        {"": 5 / 7, "_balanced": (0.75 + 0.5 + 1) / 3, "_head": 4 / 6, "_tail": 1.0}, abs=1e-15
    )


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["jit", "pmap"])
def test_the_judge_finds_what_the_evaluation_finds(layout):
    """Of all test images, in batches that do not divide their number, with one compilation."""
    fields = (
        "train.evaluate_epochs=1", "train.select=best_on_test", f"train.layout={layout}",
        "evaluation.batch_size=90", "evaluation.autoattack=none", "evaluation.audit.examples=0",
    )  # fmt: skip
    config = cli.apply_overrides(read_config(STORED), [f"--config.{field}" for field in fields])
    run = load_run(STORED)
    job = builder.training(config).judged
    judge = compiled_judge(job, parallel.devices_for(layout))
    found = judge(run.params, run.stats)
    victim = evaluation.loop.as_victim(job, {"params": run.params, "stats": run.stats})
    step = victim.compile(
        lambda *parts: evaluation.steps.eval_step(*parts, threat=job.threat, step_size=job.step_size)
    )
    judged = step(np.arange(len(victim.labels)))
    for name, condition in (("clean", "clean"), ("pgd", "pgd_10")):
        right = judged[condition]["pred"] == victim.labels
        for ending, value in accuracies(right, victim.labels, job.groups).items():
            assert found[name + ending] == value


def test_the_course_is_read_from_the_metrics(tmp_path):
    rows = [
        {"step": 4, "epoch": 1, "loss": 2.0, "held_out_clean": 0.5, "held_out_pgd_balanced": 0.25},
        {"step": 8, "epoch": 2, "loss": 1.0, "held_out_clean": 0.75, "held_out_pgd_balanced": 0.5},
    ]
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 12, "ep')
    expected = {"images": "held-out", "epoch": [1, 2], "clean": [0.5, 0.75], "pgd_balanced": [0.25, 0.5]}
    assert judged_course(tmp_path) == expected
    assert training_curve(tmp_path) == {"epoch": [1, 2], "loss": [2.0, 1.0]}
    assert judged_course(STORED) == judged_course(tmp_path / "none") == {}


# ---------------------------------------------------------------- the report


def course(*scores, images="held-out"):
    names = ("clean", "clean_tail", "pgd", "pgd_balanced", "pgd_tail")
    values = {name: list(scores) for name in names}
    return {"images": images, "epoch": [5 * (i + 1) for i in range(len(scores))], **values}


def training_text(**about):
    """The section on the training, with empty pictures."""
    pictures = {"training": page.paragraph("trained"), "judged": page.paragraph("curves")}
    blocks = sections.training_section(fake_results(meta=META | about), pictures)
    return "\n".join(block.markdown for block in blocks)


TRAINING = {"epoch": [1, 2], "loss": [2.0, 1.0]}


@pytest.mark.parametrize(
    ("scores", "text"),
    [
        (
            (0.3, 0.432, 0.398),
            "was highest in epoch 10 (43.2 %), and 39.8 % in epoch 15, the last: 3.4 points lost to robust",
        ),
        ((0.3, 0.4), "was highest in epoch 10, the last (40.0 %). Held out: 7 of 99 images."),
        ((0.4, 0.4), "was highest in epoch 5 (40.0 %), and as high in epoch 10, the last."),
    ],
)
def test_robust_overfitting_in_words(scores, text):
    found = training_text(judged=course(*scores), held_out="7 of 99 images", training=TRAINING)
    assert text in found
    assert "Robust accuracy on held-out images (PGD-10" in found
    assert found.endswith("curves")


def test_on_test_images_the_report_says_so():
    found = training_text(judged=course(0.2, images="test"), training=TRAINING)
    assert "Robust accuracy on test images (PGD-10" in found
    assert "held-out" not in found.lower()


def test_the_figure_and_the_settings():
    about = {"judged": course(0.3, 0.5, 0.4), "held_out": "7 of 99", "selection": "last"}
    results = fake_results(meta=META | about | {"selected_on_test": True})
    (axes,) = curves.judged_figure(results).axes
    assert axes.get_ylabel() == "Accuracy (% of held-out images)"
    labels = [line.get_label() for line in axes.get_lines()]
    assert labels[-1] == "Highest mean of the classes (epoch 10)"
    assert labels[:5] == [
        "Clean, all images", "Clean, tail classes", "PGD-10, all images", "PGD-10, mean of the classes",
        "PGD-10, tail classes",
    ]  # fmt: skip
    assert len(labels) == 6
    settings = "\n".join(block.markdown for block in sections.settings_section(results))
    assert "| Checkpoint chosen | last |" in settings
    assert "| Held out | 7 of 99 |" in settings
    assert "judged" not in settings
    assert "selected" not in settings


def test_an_older_report_is_as_before():
    assert fake_results().judged == {}
    assert sections.training_section(fake_results(), {}) == []


# ---------------------------------------------------------------- the audit


def test_a_choice_on_test_images_is_flagged():
    found = selected_on_test("best on test images (epoch 3 of 9)")
    assert (found.outcome, found.doubts) == (FLAGGED, CHOICE)
    assert found.statement.startswith("The checkpoint is the best on test images (epoch 3 of 9): ")
    outcome, text = audit_verdict({"verdicts": [found._asdict(), verdict("Steps", "passed")]})
    assert outcome == FLAGGED
    assert text == (
        "1 of 2 checks is flagged: the checkpoint was selected on test images, so that every accuracy is "
        "optimistic"
    )


@pytest.mark.parametrize(
    ("doubts", "first"),
    [(FIXED_STEPS, "do not trust the fixed-step attacks"), (EVERYTHING, "do not trust any robust accuracy")],
)
def test_other_flags_are_said_first(doubts, first):
    flags = [verdict("x", FLAGGED, doubts=doubts), selected_on_test("best")._asdict()]
    text = audit_verdict({"verdicts": flags})[1]
    assert 0 < text.index(first) < text.index("selected on test images")


def linear(x):
    return x.reshape(len(x), 64) @ jax.random.normal(jax.random.key(0), (64, 2))


@pytest.mark.slow
def test_a_model_of_anybodys():
    images = jax.random.uniform(jax.random.key(1), (8, 8, 8, 1))
    labels = np.arange(8) % 2
    short = {"threat": ThreatModel(0.1), "version": "none", "audit": 0, "say": lambda line: None}
    plain, best, on_test = (
        evaluate_model(linear, images, labels, select=select, **short)
        for select in ("last", "best", "best_on_test")
    )
    assert plain.audit is None
    assert "selection" not in plain.meta
    assert best.meta["selection"] == "best on held-out images, as stated"
    assert best.audit is None
    assert [found["name"] for found in on_test.audit["verdicts"]] == ["selected_on_test"]
    assert on_test.meta["selected_on_test"] is True
    with pytest.raises(InputError, match="unknown select 'first'; use one of last, best, best_on_test"):
        evaluate_model(linear, images, labels, select="first", **short)


@pytest.mark.slow
def test_an_imported_run_may_state_it(tmp_path):
    workdir = shutil.copytree(STORED, tmp_path / "run", ignore=shutil.ignore_patterns("evaluation"))
    (workdir / "versions.json").rename(workdir / "import.json")
    overrides = ("train.select=best_on_test", "evaluation.autoattack=none", "evaluation.audit.examples=0")
    config = cli.apply_overrides(read_config(workdir), [f"--config.{field}" for field in overrides])
    folder = evaluation.evaluate(config, workdir, say=lambda line: None)
    results = json.loads((folder / "results.json").read_text())
    assert results["meta"]["selection"] == "best on test images, as stated"
    assert [found["name"] for found in results["audit"]["verdicts"]] == ["selected_on_test"]
    assert "1 of 1 checks is flagged" in (folder / "report.md").read_text()


# ---------------------------------------------------------------- whole runs

SHORT = ("train.epochs=5", "schedule.milestones=(3,)", "schedule.warmup=0", "attack.steps=2")
LOOKS = ("train.held_out=0.2", "train.evaluate_epochs=2")


def trained(workdir, *overrides):
    said = []
    path = training.train(digits(*SHORT, *overrides), workdir, say=said.append)
    return path, said


@pytest.fixture(scope="module")
def looked(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("looked") / "run"
    return workdir, *trained(workdir, *LOOKS, "train.select=best")


@pytest.mark.slow
def test_looks_change_nothing(looked, tmp_path):
    _, blind = trained(tmp_path / "run", "train.held_out=0.2")
    assert blind[-1].split()[-1] == looked[2][-1].split()[-1]
    assert not (tmp_path / "run" / "best").exists()
    said = json.loads((looked[0] / "versions.json").read_text())
    assert said["held_out"] == "71 of 351 training images, at least one per class"
    assert "held out 71 of 351 training images, at least one per class" in blind


@pytest.mark.slow
def test_looks_are_logged_and_said(looked):
    workdir, _, said = looked
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows if "held_out_pgd_balanced" in row] == [2, 4, 5]
    lines = [line for line in said if "held-out images, clean" in line]
    assert [line.split(":")[0] for line in lines] == ["epoch 2", "epoch 4", "epoch 5"]
    found = judged_course(workdir)
    assert {"clean", "clean_tail", "pgd", "pgd_head", "pgd_medium", "pgd_tail"} < found.keys()
    record = json.loads((workdir / "best" / "best.json").read_text())
    assert record["score"] == max(found["pgd_balanced"])
    assert record["epoch"] == found["epoch"][int(np.argmax(found["pgd_balanced"]))]


@pytest.mark.long
@pytest.mark.slow
def test_the_best_checkpoint_is_evaluated(looked):
    workdir = looked[0]
    record = json.loads((workdir / "best" / "best.json").read_text())
    run = load_run(workdir)
    assert (run.checkpoint, run.sha256) == (workdir / "best" / str(record["step"]), record["sha256"])
    fields = ["evaluation.autoattack=none", "evaluation.audit.examples=0"]
    config = cli.apply_overrides(read_config(workdir), [f"--config.{field}" for field in fields])
    folder = evaluation.evaluate(config, workdir, say=lambda line: None)
    meta = json.loads((folder / "results.json").read_text())["meta"]
    assert meta["checkpoint_sha256"] == record["sha256"]
    assert meta["selection"].startswith(f"best on held-out images (epoch {record['epoch']} of 5, PGD-10 ")
    assert meta["held_out"].startswith("71 of 351")
    assert "selected_on_test" not in meta
    with pytest.raises(InputError, match="was chosen on held-out images; leave the field as it was"):
        wrong = cli.apply_overrides(config, ["--config.train.select=best_on_test"])
        evaluation.evaluate(wrong, workdir, folder=workdir.parent / "other")
    last = cli.apply_overrides(config, ["--config.train.select=last"])
    folder = evaluation.evaluate(last, workdir, folder=workdir.parent / "last", say=lambda line: None)
    meta = json.loads((folder / "results.json").read_text())["meta"]
    assert (meta["selection"], meta["checkpoint"]) == ("last", str(looked[1]))


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.usefixtures("optimised")
def test_two_processes_choose_the_same_checkpoint(tmp_path):
    found = []
    for place in (Layout("jit", 1), Layout("jit", 1, 2)):
        workdir = tmp_path / str(len(found))
        flags = [f"--config.{field}" for field in (*SHORT, *LOOKS)]
        finish(start(place, [f"--config={DIGITS}", f"--workdir={workdir}", *flags], JAX_ENABLE_X64="1"))
        found.append(json.loads((workdir / "best" / "best.json").read_text()))
    one, two = found
    assert one["step"] == two["step"]
    assert one["figures"] == two["figures"]  # shares of the same images
