"""Whole evaluations: files, figures that can be computed again, interruption (robal_jax.evaluation)."""

import itertools
import json
import shutil
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import drawing, with_devices
from helpers import assert_nothing_twice, interrupt, traced_work

from robal_jax import (
    attacks,
    builder,
    cli,
    evaluation,
    training,
)
from robal_jax.attacks import ThreatModel, autoattack, clean_start
from robal_jax.devices import cpu
from robal_jax.errors import InputError
from robal_jax.evaluation import loop
from robal_jax.storage import checkpoints
from robal_jax.storage.config_file import read_config
from robal_jax.storage.progress import training_curve
from robal_jax.storage.unfinished import Unfinished
from robal_jax.storage.workdir import processor, restore_weights

FIGURES = {f"{name}.png" for name in ("per_class", "attacks", "errors", "confusion", "norms", "training")}
TEXTS = {"results.json", "examples.npz", "report.md", "report.html", "per_class.csv"}
FILES = FIGURES | TEXTS | {"adversarial.npz", "audit.npz", "gallery.png", "curves.png", "epsilon.png"}
EPSILON, TEST_IMAGES = 0.04, 60
# The training as in the tests of it, so that both share one compilation.
SETTINGS = (
    "train.epochs=3", "train.steps_per_dispatch=2", "train.checkpoint_epochs=1", "attack.steps=1",
    "data.test_per_class=6", "evaluation.epsilon=0.04", "evaluation.step_size=0.005",
    "evaluation.batch_size=25", "evaluation.audit.examples=30",
)  # fmt: skip
SHORT = ("evaluation.autoattack=none", "evaluation.audit.examples=0")


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    """A short run and its evaluation, with drawn figures. Not to be written to."""
    config = cli.load_config("configs/robal_n.py:digits_lt")
    assert config.evaluation.autoattack == "standard"
    with config.unlocked():
        config.model.channels, config.model.width = (4, 4, 4), 16
    config = cli.apply_overrides(config, [f"--config.{override}" for override in SETTINGS])
    workdir = tmp_path_factory.mktemp("runs") / "evaluated"
    training.train(config, workdir)
    with drawing():
        assert run(workdir)[0] == workdir / "evaluation"
    return workdir


@pytest.fixture
def copy(evaluated, tmp_path):
    """The run without its evaluation."""
    return shutil.copytree(evaluated, tmp_path / "copy", ignore=shutil.ignore_patterns("evaluation"))


def run(workdir, *overrides, **keywords):
    """Evaluates; the folder and all that was said."""
    said = []
    config = cli.apply_overrides(read_config(workdir), [f"--config.{o}" for o in overrides])
    return evaluation.evaluate(config, workdir, say=said.append, **keywords), said


def examples(folder):
    with np.load(folder / "examples.npz") as file:
        return dict(file)


def state_of(workdir):
    job = builder.evaluation(read_config(workdir))
    return job, restore_weights(workdir, None, job.variables, pytest.fail)


# ---------------------------------------------------------------- what an evaluation leaves


@pytest.mark.slow
def test_files(evaluated):
    assert {path.name for path in (evaluated / "evaluation").iterdir()} == FILES
    for picture in (evaluated / "evaluation").glob("*.png"):
        assert picture.read_bytes().startswith(b"\x89PNG")
    saved = examples(evaluated / "evaluation")
    for condition in evaluation.CONDITIONS:
        assert saved[f"pred_{condition}"].shape == (TEST_IMAGES,)
        assert saved[f"distance_{condition}"].shape == (TEST_IMAGES,)
    np.testing.assert_array_equal(saved["labels"], np.repeat(np.arange(10), 6))
    np.testing.assert_array_equal(saved["ids"], np.arange(TEST_IMAGES))


@pytest.mark.slow
def test_accuracies_can_be_computed_again(evaluated):
    saved = examples(evaluated / "evaluation")
    results = json.loads((evaluated / "evaluation" / "results.json").read_text())["summary"]
    labels, worst = saved["labels"], np.ones(TEST_IMAGES, bool)
    for condition in (*evaluation.CONDITIONS, "apgd_ce", "robal_aa", "autoattack"):
        hits = saved[f"pred_{condition}"] == labels
        found = results["conditions"][condition]
        assert found["accuracy"]["value"] == pytest.approx(hits.mean(), abs=1e-12)
        recalls = [hits[labels == k].mean() for k in range(10)]
        np.testing.assert_allclose([figure["value"] for figure in found["per_class"]["recall"]], recalls)
        worst &= hits
    assert results["conditions"]["worst"]["accuracy"]["value"] == pytest.approx(worst.mean(), abs=1e-12)


@pytest.mark.slow
def test_results_say_what_was_evaluated(evaluated):
    meta = json.loads((evaluated / "evaluation" / "results.json").read_text())["meta"]
    _, (_, path, sha256) = state_of(evaluated)
    assert meta["checkpoint_sha256"] == sha256
    assert meta["checkpoint"] == str(path)
    assert (meta["n"], meta["epsilon"], meta["logit_scale"], meta["seed"]) == (TEST_IMAGES, EPSILON, 10.0, 0)
    assert meta["processor"] == processor()
    assert meta["training"] == training_curve(evaluated)
    assert meta["training"]["epoch"] == list(range(1, len(meta["training"]["loss"]) + 1))


@pytest.mark.slow
def test_predictions_are_those_of_the_model(evaluated):
    """Clean predictions and FGSM by a direct computation."""
    job, (weights, _, _) = state_of(evaluated)
    images = jnp.asarray(np.float32(job.test.images) / np.float32(16))
    predict = jax.jit(lambda x: job.predict(weights["params"], weights["stats"], x))
    model = builder.training(read_config(evaluated)).model
    cosines = np.float64(jax.jit(model.predict)(weights["params"], weights["stats"], images))
    prior = np.log(job.test.class_counts / job.test.class_counts.sum())
    np.testing.assert_allclose(predict(images), 10.0 * cosines - 0.1 * prior, atol=1e-4)
    saved = examples(evaluated / "evaluation")
    agree = np.argmax(10.0 * cosines - 0.1 * prior, -1) == saved["pred_clean"]
    assert agree.mean() > 0.98  # one may be a tie up to rounding
    keys = jax.random.split(jax.random.key(0), TEST_IMAGES)
    shown = attacks.pgd(
        predict, keys, images, jnp.asarray(job.test.labels),
        threat=job.threat, steps=1, step_size=EPSILON, start=clean_start,
    )  # fmt: skip
    agree = np.argmax(predict(shown), -1) == saved["pred_fgsm"]
    assert agree.mean() > 0.98  # a gradient near 0 may change its sign with the order of a sum


@pytest.mark.slow
def test_distances(evaluated):
    saved = examples(evaluated / "evaluation")
    np.testing.assert_array_equal(saved["distance_clean"], 0)
    for condition in evaluation.CONDITIONS[1:]:
        distance = saved[f"distance_{condition}"]
        assert distance.max() <= EPSILON + evaluation.DISTANCE_TOLERANCE
        assert distance.min() > 0.9 * EPSILON  # some pixel of every image is moved to the edge


@pytest.mark.slow
def test_more_steps_are_a_stronger_attack(evaluated):
    saved = examples(evaluated / "evaluation")
    accuracy = {c: (saved[f"pred_{c}"] == saved["labels"]).mean() for c in evaluation.CONDITIONS}
    assert accuracy["clean"] > accuracy["fgsm"] > accuracy["pgd_20"]
    assert accuracy["pgd_5"] >= accuracy["pgd_10"] >= accuracy["pgd_20"]
    assert abs(accuracy["mim_20"] - accuracy["pgd_20"]) < 0.05
    assert abs(accuracy["cw_20"] - accuracy["pgd_20"]) < 0.05


@pytest.mark.slow
def test_another_head_stands_in_for_the_trained_one(copy):
    """The inference of another config, over this run's checkpoint, into a folder of its own."""
    other = builder.with_inference_of(read_config(copy), cli.load_config("configs/robal_r.py:digits_lt"))
    assert (other.evaluation.tau_p, read_config(copy).evaluation.tau_p) == (0.0, 0.1)
    with other.unlocked():
        other.evaluation.head = {"name": "cosine", "scale": 3.0, "gamma": 0.0}
        other.evaluation.autoattack, other.evaluation.audit.examples = "none", 0
    said = []
    folder = evaluation.evaluate(other, str(copy), folder=str(copy / "other"), say=said.append)
    assert folder == copy / "other"
    meta = json.loads((folder / "results.json").read_text())["meta"]
    assert (meta["method"], meta["head"]) == (
        "RoBal-N, with the inference of RoBal-R",
        "cosine, gamma 0.0, scale 3.0",
    )
    job, (weights, _, _) = builder.evaluation(other), state_of(copy)[1]
    images = jnp.asarray(np.float32(job.test.images[:20]) / np.float32(16))
    logits = job.predict(weights["params"], weights["stats"], images) / other.evaluation.logit_scale
    assert 1.0 < np.abs(logits).max() <= 3.0 * (1 + 1e-5)  # cosines up to rounding


@pytest.mark.slow
def test_a_head_without_its_variables_is_refused(copy):
    config = read_config(copy)
    with config.unlocked():
        config.evaluation.head = {"name": "tau_norm"}
    message = (
        "'tau_norm' cannot be used in place of the trained head 'cosine': they differ in .*classifier/bias"
    )
    with pytest.raises(InputError, match=message):
        evaluation.evaluate(config, copy)


# ---------------------------------------------------------------- batches and interruptions


@pytest.mark.slow
def test_batch_size_changes_nothing(evaluated, copy):
    folder, _ = run(copy, *SHORT, "evaluation.batch_size=45")  # 45, 15
    found, expected = examples(folder), examples(evaluated / "evaluation")
    for name in ("labels", "ids", "distance_clean"):
        np.testing.assert_array_equal(found[name], expected[name])
    for condition in evaluation.CONDITIONS:
        # XLA's convolutions may sum in another order for another batch; the sign of a gradient near 0, and
        # with it an image on the decision border, may then change. A wrong key or image changes far more.
        changed = (found[f"pred_{condition}"] != expected[f"pred_{condition}"]).sum()
        assert changed <= (0 if condition == "clean" else 1), condition


@pytest.mark.parametrize(
    ("device", "batch_size", "pixels", "expected"),
    [
        ("cpu", 500, 32 * 32, 16),
        ("cpu", 10, 32 * 32, 10),
        ("cpu", 120, 8 * 8, 120),
        ("cpu", 100, 224 * 224, 100),
        ("gpu", 500, 32 * 32, 500),
    ],
)
def test_images_at_once(monkeypatch, device, batch_size, pixels, expected):
    monkeypatch.setattr(cpu, "cpu_piece", lambda: 16 * 32 * 32)
    assert cpu.at_once(batch_size, pixels, device) == expected


@pytest.mark.parametrize(
    ("size", "images"), [("512K\n", 16), ("1024K\n", 32), ("256K\n", 16), ("0\n", 16), ("?", 16), (None, 16)]
)
def test_a_cpu_s_piece_goes_with_its_cache(monkeypatch, tmp_path, size, images):
    path = tmp_path / "size"
    if size is not None:
        path.write_text(size)
    monkeypatch.setattr(cpu, "LEVEL_2_CACHE", path)
    assert cpu.cpu_piece() == images * 32 * 32


@pytest.mark.long
@pytest.mark.slow
def test_one_compilation_for_every_attack(copy, monkeypatch):
    """Partial batches, rounds and restarts included: each piece of work is traced once."""
    traced = traced_work(monkeypatch)
    run(copy)
    audited = ["outputs", "gradients", "probe", "margin", "unbounded", "gradient_free"]
    assert sorted(traced) == sorted(
        ["eval_step", *autoattack.VERSIONS["standard"], *audited, "shown_step", "work"]
    )


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize("after", [2, 4, 40])
def test_terminated_and_continued(evaluated, copy, monkeypatch, after):
    """In the conditions, in the ensemble and in the audit."""
    looks = interrupt(monkeypatch, lambda looks: len(looks) == after)
    folder, said = run(copy)
    assert said[-1].startswith("stopped; the same command resumes")
    assert {path.name for path in folder.iterdir()} == {"unfinished"}
    folder, _ = run(copy)
    assert_nothing_twice(looks)
    assert_same(folder, evaluated / "evaluation")


@pytest.mark.slow
def test_distances_are_found_in_parts(copy, tmp_path):
    settings = ["evaluation.minimum_norm=fmn", *SHORT]
    config = cli.apply_overrides(read_config(copy), [f"--config.{o}" for o in settings])
    job, (weights, *_) = builder.evaluation(config), state_of(copy)[1]
    victim = loop.as_victim(job, weights)

    def part(stop):
        return loop.distances(victim, job, Unfinished(tmp_path / "unfinished" / "distances.npz", {}), stop)

    class AfterOne(list):
        def __bool__(self):  # is asked twice per batch: before it, and after it
            self.append(0)
            return len(self) > 1

    whole = loop.distances(victim, job, Unfinished(tmp_path / "whole" / "distances.npz", {}), [])
    assert whole.shape == (TEST_IMAGES,)
    assert part(AfterOne()) is None
    saved = Unfinished(tmp_path / "unfinished" / "distances.npz", {}).arrays["distance"]
    assert 0 < len(saved) < TEST_IMAGES
    np.testing.assert_array_equal(saved, whole[: len(saved)])
    np.testing.assert_array_equal(part([]), whole)


@pytest.mark.slow
def test_a_minimum_norm_attack_of_another_norm(copy):
    with pytest.raises(InputError, match="minimum-norm attack 'ddn' is for L2, and the norm is L-infinity"):
        run(copy, "evaluation.minimum_norm=ddn")


def assert_same(folder, expected_folder):
    """The same outcome of every image, the same adversarial images and verdicts."""
    assert {path.name for path in folder.iterdir()} == FILES
    assert_same_arrays(folder, expected_folder, "examples.npz", "adversarial.npz", "audit.npz")
    found, expected = (json.loads((f / "results.json").read_text()) for f in (folder, expected_folder))
    assert found["summary"] == expected["summary"]
    assert found["audit"] == expected["audit"]


def assert_same_arrays(folder, expected_folder, *names):
    for name in names:
        with np.load(folder / name) as found, np.load(expected_folder / name) as expected:
            assert set(found) == set(expected)
            for key in expected:
                np.testing.assert_array_equal(found[key], expected[key])


def subprocess_command(script, *arguments):
    return [sys.executable, "-c", script, *map(str, arguments)]


EVALUATED = """
import pathlib, sys
from robal_jax import cli, evaluation
from robal_jax.storage import unfinished
from robal_jax.storage.config_file import read_config
unfinished.SAVE_SECONDS = 0.0
workdir, *overrides = sys.argv[1:]
config = cli.apply_overrides(read_config(pathlib.Path(workdir)), overrides)
evaluation.evaluate(config, pathlib.Path(workdir))
"""


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize(("layout", "ensemble"), [("jit", "standard"), ("pmap", "apgd_ce")])
def test_four_devices_give_the_outcomes_of_one(evaluated, copy, layout, ensemble):
    fields = "evaluation.audit.examples=0", f"train.layout={layout}", f"evaluation.autoattack={ensemble}"
    overrides = [f"--config.{field}" for field in fields]
    command = subprocess_command(EVALUATED, copy, *overrides)
    done = subprocess.run(command, env=with_devices(4), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found, expected = examples(copy / "evaluation"), examples(evaluated / "evaluation")
    assert "pred_apgd_ce" in found
    assert ensemble != "standard" or found.keys() == expected.keys()
    for name in found:  # the pixels agree up to the order of XLA's sums, the outcomes exactly
        if name.startswith("pred_"):
            np.testing.assert_array_equal(found[name], expected[name])
        else:
            np.testing.assert_allclose(found[name], expected[name], atol=1e-5)
    last = "pred_autoattack" if ensemble == "standard" else "pred_apgd_ce"
    broken = np.flatnonzero((found["pred_clean"] == found["labels"]) & (found[last] != found["labels"]))
    np.testing.assert_array_equal(np.load(copy / "evaluation" / "adversarial.npz")["ids"], broken)


@pytest.mark.long
@pytest.mark.slow
def test_killed_twice(evaluated, copy):
    command = subprocess_command(EVALUATED, copy, "--config.evaluation.audit.examples=0")
    kept = copy / "evaluation" / "unfinished" / "ensemble.npz"
    for kill in range(2):
        before = kept.stat().st_mtime_ns if kept.exists() else 0
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        saves = 0  # dies after three more saves of the ensemble
        while process.poll() is None and saves < 3:
            now = kept.stat().st_mtime_ns if kept.exists() else 0
            saves, before = saves + (now != before), now
            time.sleep(0.002)
        assert process.poll() is None, f"it ended before kill {kill + 1}"
        process.kill()
        process.wait()
    subprocess.run(command, check=True, capture_output=True)
    assert_same_arrays(copy / "evaluation", evaluated / "evaluation", "examples.npz", "adversarial.npz")


# ---------------------------------------------------------------- the ensemble and the audit


@pytest.mark.slow
def test_the_ensemble_is_the_worst_case_and_its_images_are_kept(evaluated):
    """Everything said of the ensemble follows from the stored images."""
    folder, (job, (weights, _, _)) = evaluated / "evaluation", state_of(evaluated)
    saved, results = examples(folder), json.loads((folder / "results.json").read_text())
    right = {c: saved[f"pred_{c}"] == saved["labels"] for c in ("clean", "apgd_ce", "robal_aa", "autoattack")}
    for weaker, stronger in itertools.pairwise(right.values()):
        assert (stronger <= weaker).all()
    assert 0 < right["autoattack"].mean() < right["clean"].mean()
    stages = results["meta"]["stages"]
    assert list(stages) == list(autoattack.VERSIONS["standard"])
    assert stages["apgd_t"] == pytest.approx(right["robal_aa"].mean())
    assert stages["square"] == pytest.approx(right["autoattack"].mean())

    with np.load(folder / "adversarial.npz") as file:
        ids, images = file["ids"], file["images"]
    np.testing.assert_array_equal(ids, np.flatnonzero(right["clean"] & ~right["autoattack"]))
    clean = np.float32(job.test.images) / np.float32(16)
    assert np.abs(np.float64(images) - clean[ids]).max() <= EPSILON + evaluation.DISTANCE_TOLERANCE
    assert images.min() >= 0
    assert images.max() <= 1
    shown = clean.copy()
    shown[ids] = images
    called = np.argmax(job.predict(weights["params"], weights["stats"], jnp.asarray(shown)), -1)
    # Another batch and another compilation: an image on the border may fall to the other side.
    assert np.sum(called != saved["pred_autoattack"]) <= 1
    stored = {verdict["name"]: verdict for verdict in results["audit"]["verdicts"]}["stored_images"]
    assert stored["evidence"]["accuracy"] == pytest.approx(right["autoattack"].mean())
    assert stored["outcome"] == "passed"

    with np.load(folder / "audit.npz") as file:
        sample = dict(file)
    ids, curves = sample.pop("ids"), results["audit"]["curves"]
    assert len(ids) == results["audit"]["examples"]
    assert set(sample) == set(curves)
    for name, curve in curves.items():
        (figures,) = curve["series"].values()
        np.testing.assert_allclose(sample[name].mean(0), [figure["value"] for figure in figures])
    assert (sample["epsilon"][:, 0] == right["clean"][ids]).all()  # at radius 0


@pytest.mark.long
@pytest.mark.slow
def test_a_model_that_saturates_is_flagged_and_its_autoattack_is_the_same(evaluated, copy):
    folder, _ = run(copy, "evaluation.logit_scale=10000.0", "evaluation.autoattack=robal_aa")
    honest, faked = (json.loads((f / "results.json").read_text()) for f in (evaluated / "evaluation", folder))
    accuracy = [
        {name: figures["accuracy"]["value"] for name, figures in results["summary"]["conditions"].items()}
        for results in (honest, faked)
    ]
    assert accuracy[1]["pgd_20"] > accuracy[0]["pgd_20"] + 0.1
    assert accuracy[1]["robal_aa"] == pytest.approx(accuracy[0]["robal_aa"], abs=0.02)
    flagged = {v["name"] for v in faked["audit"]["verdicts"] if v["outcome"] == "flagged"}
    assert {"zero_gradients", "unbounded"} <= flagged  # for the others the sample is too small
    flagged = {v["name"] for v in honest["audit"]["verdicts"] if v["outcome"] == "flagged"}
    assert not flagged & {"zero_gradients", "unbounded", "gradient_free", "square", "stored_images"}


@pytest.mark.long
@pytest.mark.slow
def test_a_surrogate(copy):
    other = shutil.copytree(copy, copy / "other", ignore=shutil.ignore_patterns("other"))
    _, (weights, _, _) = state_of(other)
    moved = {**weights, "params": jax.tree.map(lambda x: 0.9 * x, weights["params"])}
    with checkpoints.Saver(other / "checkpoints", 10) as saver:
        saver.save(99, moved)
    config = json.loads((other / "config.json").read_text())
    config["evaluation"]["autoattack"] = "apgd_ce,module_that_is_not_here:attack"  # its logits do not need it
    (other / "config.json").write_text(json.dumps(config))
    folder, _ = run(copy, SHORT[0], "evaluation.audit.examples=20", f"evaluation.audit.surrogate={other}")
    verdicts = json.loads((folder / "results.json").read_text())["audit"]["verdicts"]
    transfer = {verdict["name"]: verdict for verdict in verdicts}["transfer"]
    assert transfer["outcome"] == "too few images"


@pytest.mark.slow
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_a_surrogate_with_the_same_weights_is_refused(copy, scale):
    other = shutil.copytree(copy, copy / "other", ignore=shutil.ignore_patterns("other"))
    with pytest.raises(InputError, match="the surrogate is the model under attack; name another run"):
        run(copy, f"evaluation.audit.surrogate={other}", f"evaluation.logit_scale={scale}")


@pytest.mark.slow
def test_a_surrogate_of_other_data(copy):
    other = shutil.copytree(copy, copy / "other", ignore=shutil.ignore_patterns("other"))
    config = json.loads((other / "config.json").read_text())
    config["data"]["test_per_class"] = 7
    (other / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"surrogate .* has different test images"):
        run(copy, f"evaluation.audit.surrogate={other}")


@pytest.mark.slow
def test_without_ensemble_and_audit(copy):
    folder, _ = run(copy, *SHORT)
    assert {path.name for path in folder.iterdir()} == FIGURES | TEXTS
    assert json.loads((folder / "results.json").read_text())["audit"] is None


@pytest.mark.slow
def test_an_unknown_ensemble(copy):
    with pytest.raises(InputError, match="unknown ensemble 'autoattack'"):
        run(copy, "evaluation.autoattack=autoattack")


# ---------------------------------------------------------------- what is refused


@pytest.mark.slow
def test_checkpoint_that_is_not_finite(copy):
    _, (weights, _, _) = state_of(copy)
    broken = {**weights, "params": jax.tree.map(lambda x: np.full_like(x, np.nan), weights["params"])}
    with checkpoints.Saver(copy / "checkpoints", 10) as saver:
        path, _ = saver.save(99, broken)
    with pytest.raises(InputError, match=r"logits are not finite for 60 of 60 images \(clean\)"):
        run(copy, checkpoint=path)
    assert not (copy / "evaluation" / "results.json").exists()


@pytest.mark.parametrize(
    ("field", "values", "error", "message"),
    [
        ("finite", [True, False], InputError, r"not finite for 1 of 2 images \(cw_20\)"),
        ("distance", [0.1, 0.11], RuntimeError, "cw_20 left the threat model: distance"),
        ("outside", [0.0, 1e-6], RuntimeError, "cw_20 left the threat model: outside"),
        ("distance", [0.0, 0.1 + 1e-8], None, None),
        ("outside", [0.0, -0.5], None, None),
    ],
)
def test_outcomes_that_no_correct_evaluation_gives(field, values, error, message):
    judged = {"finite": np.ones(2, bool), "distance": np.zeros(2), "outside": np.zeros(2)}
    judged[field] = np.array(values)
    if error is None:
        evaluation.check("cw_20", judged, ThreatModel(0.1))
    else:
        with pytest.raises(error, match=message):
            evaluation.check("cw_20", judged, ThreatModel(0.1))
