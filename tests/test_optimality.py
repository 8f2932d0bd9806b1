"""The optimality of attacks in an evaluation: added, resumed, exact on a linear model, reported, refused."""

import shutil
import types

import numpy as np
import pytest
from helpers import META, interrupt
from nearest_mean import MEANS, X, Y, nearest_mean

from robal_jax import ThreatModel, evaluate_model, metrics
from robal_jax.errors import InputError
from robal_jax.evaluation import loop
from robal_jax.evaluation.optimality import FACTORS, with_optimality
from robal_jax.reporting import page
from robal_jax.reporting.optimality import optimality_section
from robal_jax.reporting.results import EvaluatedRun

IMAGES, LABELS = X[:40], Y[:40]
EPSILON, SAMPLE = 0.2, 24


def evaluate(folder, **options):
    arguments = {
        "version": "apgd_ce,apgd_t", "audit": SAMPLE, "seed": 3, "say": lambda _: None,
        "class_counts": tuple(range(20, 10, -1)), "threat": ThreatModel(EPSILON), **options,
    }  # fmt: skip
    return evaluate_model(nearest_mean, IMAGES, LABELS, folder=folder, **arguments)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """An evaluation without a comparison of the attacks. Not to be written to."""
    folder = tmp_path_factory.mktemp("evaluations") / "finished"
    evaluate(folder, minimum_norm="fmn")
    return folder


def worst_margin(images, labels, radius):
    """The smallest margin of the affine network within a radius and the bounds of the pixels, exactly."""
    x = images.reshape(len(images), 1, 64).astype(np.float64)
    slope = 2 * (MEANS[labels][:, None] - MEANS[None])  # of the margin towards each class
    offset = (MEANS**2).sum(1)[None] - (MEANS[labels] ** 2).sum(1)[:, None]
    farthest = np.clip(x - radius * np.sign(slope), 0, 1)
    margins = (slope * farthest).sum(-1) + offset
    margins[np.arange(len(labels)), labels] = np.inf
    return margins.min(-1)


@pytest.mark.long
@pytest.mark.slow
def test_a_finished_evaluation_is_given_it_resumed_and_exact(finished, tmp_path, monkeypatch):
    folder = shutil.copytree(finished, tmp_path / "evaluation")
    monkeypatch.setattr(loop, "conditions", lambda *_: pytest.fail("attacked again"))
    interrupt(monkeypatch, lambda looks: looks[-1].note == "apgd_t")
    assert evaluate(folder, minimum_norm="fmn", optimality=True) is None
    found = evaluate(folder, minimum_norm="fmn", optimality=True)
    at_once = shutil.copytree(finished, tmp_path / "at_once")
    assert evaluate(at_once, minimum_norm="fmn", optimality=True).optimality == found.optimality

    with np.load(folder / "optimality.npz") as stored:
        sample, survived = stored["sample"], stored["apgd_t"]
    assert len(np.unique(sample)) == SAMPLE == found.optimality["examples"]
    exact = [worst_margin(IMAGES[sample], LABELS[sample], EPSILON * factor) > 0 for factor in FACTORS]
    assert (survived == np.sum(exact, axis=0)).mean() >= 0.9  # an attack finds the worst, or is near it
    assert (survived >= np.sum(exact, axis=0)).all()
    attacks = found.optimality["attacks"]
    assert list(attacks) == ["apgd_ce", "apgd_t", "fmn"]
    assert max(row["optimality"] for row in attacks.values()) > 0.95
    assert all(0 <= row["optimality"] <= 1 for row in attacks.values())
    for place in range(len(FACTORS)):
        assert attacks["apgd_t"]["robust"][place] == metrics.share(survived > place)
    text = (folder / "report.md").read_text()
    (row,) = (line for line in text.splitlines() if line.startswith("| APGD-T | ") and line.count("|") == 7)
    assert f"{attacks['apgd_t']['optimality']:.3f}" in row
    last = 100 * found.optimality["best"][-1]["value"]
    (best,) = (line for line in text.splitlines() if line.startswith("| Best on each image |"))
    assert best.split("|")[-2].strip() == f"{last:.1f}"


def with_survived(**survived):
    """Results in which image 2 is misclassified when clean, and 1, 2, 3 and 4 are the sample."""
    labels = np.array([0, 1, 0, 1, 1])
    predictions = dict.fromkeys(("clean", *survived), np.array([0, 1, 1, 1, 1]))
    summary = metrics.summarize(labels, predictions, [3, 2])
    examples = {"labels": labels, **{f"pred_{name}": each for name, each in predictions.items()}}
    run = EvaluatedRun(META, summary, name="run", examples=examples)
    victim = types.SimpleNamespace(labels=labels)
    job = types.SimpleNamespace(minimum_norm="", threat=ThreatModel(EPSILON))
    return with_optimality(run, {"sample": np.array([1, 2, 3, 4]), **survived}, victim, job)


def test_every_radius_counts_the_last_one_too():
    """It is 1 for an attack that is the best on every image, and for no other."""
    found = with_survived(
        apgd_ce=np.array([3, 0, 7, 8]), apgd_t=np.array([3, 0, 8, 8]), square=np.array([8, 0, 6, 8])
    )
    shares = {name: row["optimality"] for name, row in found.optimality["attacks"].items()}
    assert shares == {"apgd_ce": 6 / 7, "apgd_t": 5 / 7, "square": 2 / 7}
    assert [figure["value"] for figure in found.optimality["best"]] == [0.75] * 3 + [0.5] * 3 + [0.25] * 2
    assert with_survived(one=np.array([7, 0, 8, 8])).optimality["attacks"]["one"]["optimality"] == 1


def test_an_attack_that_breaks_nothing_has_no_optimality():
    found = with_survived(apgd_ce=np.array([8, 0, 8, 8]))
    (row,) = found.optimality["attacks"].values()
    assert row["optimality"] is None
    assert [figure["value"] for figure in row["robust"]] == [0.75] * len(FACTORS)
    table = page.to_markdown("", optimality_section(found))
    assert "| APGD-CE | — | 75.0 | 75.0 | 75.0 | 75.0 |" in table


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"version": "none"}, "optimality compares the attacks of an ensemble; set evaluation.autoattack"),
        (
            {"audit": 0},
            "optimality is measured on the audit's sample, which is empty; set evaluation.audit.examples",
        ),
        ({"version": "rand"}, "an attack on a random model has no distance; leave optimality out"),
    ],
)
def test_what_cannot_be_compared_is_refused_at_once(options, message, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "conditions", lambda *_: pytest.fail("attacked"))
    with pytest.raises(InputError, match=message):
        evaluate(tmp_path / "run", optimality=True, **options)
