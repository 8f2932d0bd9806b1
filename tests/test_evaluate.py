"""Whole evaluations: files, figures that can be computed again, interruption (robal_jax.evaluate)."""

import json
import os
import shutil
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from robal_jax import attacks, build, checkpoints, cli, evaluate, logs, train
from robal_jax.errors import InputError

pytestmark = pytest.mark.usefixtures("compilations_are_kept")

FILES = {"results.json", "examples.npz", "report.md", "per_class.csv", "per_class.png", "attacks.png"}
EPSILON, TEST_IMAGES = 0.1, 700
# As in training tests, so that both share one compilation.
SETTINGS = ("train.epochs=3", "train.steps_per_dispatch=2", "train.checkpoint_epochs=1", "attack.steps=1")


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory, compilations_are_kept):
    """A short run and its evaluation. Not to be written to."""
    config = cli.load_config("configs/robal_n.py:digits_lt")
    with config.unlocked():
        config.model.channels, config.model.width = (4, 4, 4), 16
    config = cli.apply_overrides(config, [f"--config.{override}" for override in SETTINGS])
    workdir = tmp_path_factory.mktemp("runs") / "evaluated"
    train.train(config, workdir)
    assert run(workdir)[0] == workdir / "evaluation"
    return workdir


@pytest.fixture
def copy(evaluated, tmp_path):
    """The run without its evaluation."""
    return shutil.copytree(evaluated, tmp_path / "copy", ignore=shutil.ignore_patterns("evaluation"))


def run(workdir, *overrides, **keywords):
    """Evaluates; the folder and all that was said."""
    said = []
    config = cli.apply_overrides(build.read_config(workdir), [f"--config.{o}" for o in overrides])
    return evaluate.evaluate(config, workdir, say=said.append, **keywords), said


def examples(folder):
    with np.load(folder / "examples.npz") as file:
        return dict(file)


def state_of(workdir):
    job = build.evaluation(build.read_config(workdir))
    like = jax.eval_shape(lambda: train.initial_state(job.training))
    return job, checkpoints.restore_latest(workdir / "checkpoints", like, on_damage=pytest.fail)


# ---------------------------------------------------------------- what an evaluation leaves


def test_files(evaluated):
    assert {path.name for path in (evaluated / "evaluation").iterdir()} == FILES
    saved = examples(evaluated / "evaluation")
    for condition in evaluate.CONDITIONS:
        assert saved[f"pred_{condition}"].shape == (TEST_IMAGES,)
        assert saved[f"distance_{condition}"].shape == (TEST_IMAGES,)
    np.testing.assert_array_equal(saved["labels"], np.repeat(np.arange(10), 70))
    np.testing.assert_array_equal(saved["ids"], np.arange(TEST_IMAGES))


def test_accuracies_can_be_computed_again(evaluated):
    saved = examples(evaluated / "evaluation")
    results = json.loads((evaluated / "evaluation" / "results.json").read_text())["summary"]
    labels, worst = saved["labels"], np.ones(TEST_IMAGES, bool)
    for condition in evaluate.CONDITIONS:
        hits = saved[f"pred_{condition}"] == labels
        found = results["conditions"][condition]
        assert found["accuracy"]["value"] == pytest.approx(hits.mean(), abs=1e-12)
        recalls = [hits[labels == k].mean() for k in range(10)]
        np.testing.assert_allclose([figure["value"] for figure in found["per_class"]["recall"]], recalls)
        worst &= hits
    assert results["conditions"]["worst"]["accuracy"]["value"] == pytest.approx(worst.mean(), abs=1e-12)


def test_results_say_what_was_evaluated(evaluated):
    meta = json.loads((evaluated / "evaluation" / "results.json").read_text())["meta"]
    _, (_, path, sha256) = state_of(evaluated)
    assert meta["checkpoint_sha256"] == sha256
    assert meta["checkpoint"] == str(path)
    assert (meta["n"], meta["epsilon"], meta["logit_scale"], meta["seed"]) == (TEST_IMAGES, EPSILON, 10.0, 0)


def test_predictions_are_those_of_the_model(evaluated):
    """Clean predictions and FGSM by a direct computation."""
    job, (state, _, _) = state_of(evaluated)
    data = job.training.data
    images = jnp.asarray(np.float32(data.test_images) / np.float32(16))
    predict = jax.jit(lambda x: job.predict(state.params, state.stats, x))
    cosines = np.float64(jax.jit(job.training.model.predict)(state.params, state.stats, images))
    prior = np.log(data.class_counts / data.class_counts.sum())
    np.testing.assert_allclose(predict(images), 10.0 * cosines - 0.1 * prior, atol=1e-4)
    saved = examples(evaluated / "evaluation")
    agree = np.argmax(10.0 * cosines - 0.1 * prior, -1) == saved["pred_clean"]
    assert agree.mean() > 0.997  # two of 700 may be ties up to rounding
    keys = jax.random.split(jax.random.key(0), TEST_IMAGES)
    shown = attacks.pgd(
        predict, keys, images, jnp.asarray(data.test_labels),
        threat=job.threat, steps=1, step_size=EPSILON, start=attacks.clean_start,
    )  # fmt: skip
    agree = np.argmax(predict(shown), -1) == saved["pred_fgsm"]
    assert agree.mean() > 0.99  # a gradient near 0 may change its sign with the order of a sum


def test_distances(evaluated):
    saved = examples(evaluated / "evaluation")
    np.testing.assert_array_equal(saved["distance_clean"], 0)
    for condition in evaluate.CONDITIONS[1:]:
        distance = saved[f"distance_{condition}"]
        assert distance.max() <= EPSILON + evaluate.DISTANCE_TOLERANCE
        assert distance.min() > 0.9 * EPSILON  # some pixel of every image is moved to the edge


def test_more_steps_are_a_stronger_attack(evaluated):
    saved = examples(evaluated / "evaluation")
    accuracy = {c: (saved[f"pred_{c}"] == saved["labels"]).mean() for c in evaluate.CONDITIONS}
    assert accuracy["clean"] > accuracy["fgsm"] > accuracy["pgd_20"]
    assert accuracy["pgd_5"] >= accuracy["pgd_10"] >= accuracy["pgd_20"]
    assert abs(accuracy["mim_20"] - accuracy["pgd_20"]) < 0.05
    assert abs(accuracy["cw_20"] - accuracy["pgd_20"]) < 0.05


def test_another_head_stands_in_for_the_trained_one(copy):
    """The inference of another config, over this run's checkpoint, into a folder of its own."""
    other = build.with_inference_of(build.read_config(copy), cli.load_config("configs/robal_r.py:digits_lt"))
    assert (other.evaluation.tau_p, build.read_config(copy).evaluation.tau_p) == (0.0, 0.1)
    with other.unlocked():
        other.evaluation.head = {"name": "cosine", "scale": 3.0, "gamma": 0.0}
    said = []
    folder = evaluate.evaluate(other, copy, folder=copy / "other", say=said.append)
    assert folder == copy / "other"
    meta = json.loads((folder / "results.json").read_text())["meta"]
    assert (meta["method"], meta["head"]) == ("RoBal-R", "cosine, gamma 0.0, scale 3.0")
    job, (state, _, _) = build.evaluation(other), state_of(copy)[1]
    images = jnp.asarray(np.float32(job.training.data.test_images[:20]) / np.float32(16))
    logits = job.predict(state.params, state.stats, images) / other.evaluation.logit_scale
    assert 1.0 < np.abs(logits).max() <= 3.0 * (1 + 1e-5)  # cosines up to rounding


def test_a_head_without_its_variables_is_refused(copy):
    config = build.read_config(copy)
    with config.unlocked():
        config.evaluation.head = {"name": "tau_norm"}
    message = "'tau_norm' cannot stand in for the trained head 'cosine': they differ in .*classifier/bias"
    with pytest.raises(InputError, match=message):
        evaluate.evaluate(config, copy)


# ---------------------------------------------------------------- batches and interruptions


def test_batch_size_changes_nothing(evaluated, copy, monkeypatch):
    original, kept = evaluate.compiled_step, []
    monkeypatch.setattr(evaluate, "compiled_step", lambda job: kept.append(original(job)) or kept[-1])
    folder, _ = run(copy, "evaluation.batch_size=300")  # 300, 300, 100
    assert [step._cache_size() for step in kept] == [1], "the last batch was compiled by itself"
    found, expected = examples(folder), examples(evaluated / "evaluation")
    assert found.keys() == expected.keys()
    for name in ("labels", "ids", "distance_clean"):
        np.testing.assert_array_equal(found[name], expected[name])
    for condition in evaluate.CONDITIONS:
        # XLA's convolutions may sum in another order for another batch; the sign of a gradient near 0, and
        # with it an image on the decision border, may then change. A wrong key or image changes far more.
        changed = (found[f"pred_{condition}"] != expected[f"pred_{condition}"]).sum()
        assert changed <= (0 if condition == "clean" else 7), condition


def test_terminated_and_continued(evaluated, copy, monkeypatch):
    original, done = logs.Meter.update, []

    def update(self, count, note=""):
        done.append(count)
        original(self, count, note)
        if len(done) == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(logs.Meter, "update", update)
    folder, said = run(copy)
    assert said[-1].startswith("stopped; the same command goes on")
    assert {path.name for path in folder.iterdir()} == {"partial.npz"}
    folder, _ = run(copy)
    assert done == [350, 700]  # nothing was done twice
    assert {path.name for path in folder.iterdir()} == FILES
    found, expected = examples(folder), examples(evaluated / "evaluation")
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_array_equal(found[name], values)


@pytest.mark.parametrize("content", [b"", b"PK not a zip file"])
def test_partial_results_that_cannot_be_read_are_not_used(tmp_path, content):
    (tmp_path / "partial.npz").write_bytes(content)
    assert evaluate._read_partial(tmp_path / "partial.npz", "{}") == (0, {})


def test_partial_results_of_other_settings_are_not_used(tmp_path):
    path = tmp_path / "partial.npz"
    np.savez(path, settings=np.array("a"), done=np.array(2), pred_clean=np.arange(2))
    assert evaluate._read_partial(path, "b") == (0, {})
    done, outcomes = evaluate._read_partial(path, "a")
    assert done == 2
    np.testing.assert_array_equal(outcomes["pred_clean"][0], [0, 1])


# ---------------------------------------------------------------- what is refused


def test_checkpoint_that_is_not_finite(copy):
    _, (state, _, _) = state_of(copy)
    broken = state.replace(params=jax.tree.map(lambda x: np.full_like(x, np.nan), state.params))
    with checkpoints.Saver(copy / "checkpoints", 10) as saver:
        path, _ = saver.save(99, broken)
    with pytest.raises(InputError, match=r"logits are not finite for 700 of 700 images \(clean\)"):
        run(copy, checkpoint=path)
    assert not (copy / "evaluation" / "results.json").exists()


@pytest.mark.parametrize(
    ("outcomes", "error", "message"),
    [
        ({"finite_cw_20": np.array([True, False])}, InputError, r"1 of 2 images \(cw_20\)"),
        ({"distance_pgd_20": np.array([0.1, 0.11])}, RuntimeError, "pgd_20 left the threat model: distance"),
        ({"outside_fgsm": np.array([0.0, 1e-6])}, RuntimeError, "fgsm left the threat model: outside"),
        ({"distance_mim_20": np.array([0.1 + 1e-8])}, None, None),
        ({"outside_fgsm": np.array([0.0, -0.5])}, None, None),
    ],
)
def test_outcomes_that_no_honest_evaluation_gives(outcomes, error, message):
    threat = attacks.ThreatModel(0.1)
    if error is None:
        evaluate._check(outcomes, threat)
    else:
        with pytest.raises(error, match=message):
            evaluate._check(outcomes, threat)
