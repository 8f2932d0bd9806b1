"""The certified accuracy in an evaluation: added, resumed, reported, refused, and contradicted."""

import dataclasses
import shutil
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import interrupt
from nearest_mean import X, Y, nearest_mean

from robal_jax import ThreatModel, certified, evaluate_model, metrics
from robal_jax.errors import InputError
from robal_jax.evaluation import certifying, loop
from robal_jax.evaluation.certifying import FACTORS
from robal_jax.reporting.results import read_run

IMAGES, LABELS = X[:40], Y[:40]
THREAT, COUNTS = ThreatModel(0.2), tuple(range(20, 10, -1))


def evaluate(folder, **options):
    said = []
    arguments = {
        "version": "none", "audit": 0, "seed": 3, "say": said.append, "class_counts": COUNTS, **options
    }  # fmt: skip
    return evaluate_model(nearest_mean, IMAGES, LABELS, threat=THREAT, folder=folder, **arguments), said


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """An evaluation without certified accuracies. Not to be written to."""
    folder = tmp_path_factory.mktemp("evaluations") / "finished"
    evaluate(folder)
    return folder


@pytest.fixture
def folder(finished, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "conditions", lambda *_: pytest.fail("attacked again"))
    return shutil.copytree(finished, tmp_path / "evaluation")


@pytest.mark.slow
def test_a_finished_evaluation_is_given_them_resumed_and_contradicted(folder, monkeypatch):
    interrupt(monkeypatch, len)
    assert evaluate(folder, certified=True)[0] is None
    with np.load(folder / "unfinished" / "certified.npz") as kept:
        assert (kept["low"] < kept["high"]).any()
    found, _ = evaluate(folder, certified=True)

    bound = jax.jit(lambda radius: certified(nearest_mean, IMAGES, LABELS, threat=ThreatModel(radius)))
    for factor, row in zip(FACTORS, found.certified["by_factor"], strict=True):
        wanted = np.asarray(bound(np.full(40, 0.2 * factor, np.float32)))
        assert row["accuracy"] == metrics.share(wanted)
        assert row["tail"] == metrics.share(wanted[LABELS >= 7])
    shares = [row["accuracy"]["value"] for row in found.certified["by_factor"]]
    assert shares[0] > shares[2] > shares[3] > 0
    worst = found.conditions["worst"]
    assert shares[3] <= worst["accuracy"]["value"]
    assert found.certified["broken"] == 0
    assert found.audit is None
    text = (folder / "report.md").read_text()
    assert "No certified image is broken by an attack." in text
    gap = 100 * (worst["tail"]["value"] - found.certified["by_factor"][3]["tail"]["value"])
    (row,) = (line for line in text.splitlines() if line.startswith("| Gap |"))
    assert row.split("|")[-2].strip() == f"{gap:.1f}"

    path = folder / "certified.npz"
    with np.load(path) as stored:
        arrays = dict(stored)
    np.savez(path, **{**arrays, "radii": np.zeros_like(arrays["radii"])})
    evaluate(folder, certified=True)
    text = (folder / "report.md").read_text()
    assert "No image is certified within L∞ 0.2." in text and "No certified image" not in text
    wrong = found.predictions["worst"] != LABELS
    arrays["radii"] = np.where(wrong & (np.cumsum(wrong) <= 2), len(FACTORS), arrays["radii"])
    np.savez(path, **arrays)  # two images that an attack has broken
    refuted, _ = evaluate(folder, certified=True)
    assert refuted.certified["broken"] == 2
    (verdict,) = refuted.audit["verdicts"]
    assert (verdict["name"], verdict["outcome"]) == ("certified", "flagged")
    text = (folder / "report.md").read_text()
    assert "do not trust any robust accuracy in this report" in text
    assert "Contradiction: 2 certified images are misclassified" in text


@pytest.mark.parametrize(("length", "broken"), [(0.04, 1), (0.06, 0)])
def test_an_adversarial_image_within_a_certified_radius_refutes_it(finished, length, broken):
    run = read_run(finished)
    image = np.flatnonzero(run.predictions["worst"] == LABELS)[0]
    levels, lengths = np.zeros(len(LABELS), int), np.full(len(LABELS), np.inf)
    levels[image], lengths[image] = 2, length  # certified within a quarter of the radius
    run = dataclasses.replace(run, examples={**run.examples, "distance_fmn": lengths})
    job = types.SimpleNamespace(minimum_norm="fmn", threat=THREAT, groups={})
    victim = types.SimpleNamespace(labels=LABELS)
    found = certifying.with_certified(run, {"radii": levels}, victim, job)
    assert found.certified["broken"] == broken


@pytest.mark.slow
def test_the_bounds_are_those_of_the_threat_model(finished, tmp_path):
    """The same images and model with pixels in [-1, 1]."""
    folder = shutil.copytree(finished, tmp_path / "unit")
    unit, _ = evaluate(folder, certified=True)
    threat = ThreatModel(0.4, lower=-1, upper=1)
    moved = evaluate_model(
        lambda x: nearest_mean((x + 1) / 2), 2 * IMAGES - 1, LABELS, threat=threat,
        version="none", audit=0, class_counts=COUNTS, certified=True, say=lambda _: None,
    )  # fmt: skip
    assert moved.certified == unit.certified
    assert unit.certified["by_factor"][-1]["accuracy"]["value"] > 0


REFUSED = {
    "certified accuracies are for L-infinity, and the norm is L2": {"threat": ThreatModel(0.5, "l2")},
    "a random model cannot be certified": {"version": "rand"},
    "there is no bound for the operation sin": {"logits_fn": lambda x: jnp.sin(nearest_mean(x))},
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_cannot_be_certified_is_refused_before_any_attack(message, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "conditions", lambda *_: pytest.fail("attacked"))
    arguments = {"logits_fn": nearest_mean, "threat": THREAT, "version": "none", **REFUSED[message]}
    with pytest.raises(InputError, match=message):
        evaluate_model(images=IMAGES, labels=LABELS, certified=True, folder=tmp_path, **arguments)
