"""An evaluation at radii by class: the builder, the attacks, the audit, and what every output says of it."""

import csv
import dataclasses
import io
import json
import pathlib
import shutil
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT
from helpers import META, curve, fake_results

import robal_jax
from robal_jax import ThreatModel, builder, cli, evaluation
from robal_jax.errors import InputError
from robal_jax.evaluation import loop, measurements, steps
from robal_jax.reporting.budgets import at_common_radius
from robal_jax.reporting.comparison import compare
from robal_jax.reporting.headline import in_words
from robal_jax.reporting.names import BY_CLASS
from robal_jax.reporting.report import write_report
from robal_jax.reporting.results import EvaluatedRun, read_run
from robal_jax.storage.config_file import read_config

DIGITS = f"{ROOT}/configs/at.py:digits_lt"
CLASSES = 10


def digits(**budget):
    config = cli.load_config(DIGITS)
    with config.unlocked():
        config.evaluation.budget = budget
    return config


# ---------------------------------------------------------------- the builder


def test_the_neutral_budget_is_one_number():
    job = builder.evaluation(cli.load_config(DIGITS))
    assert job.threat == ThreatModel(0.1)
    assert job.step_size == 0.0125
    assert not {"class_epsilon", "budget"} & job.about.keys()


def test_radii_by_frequency():
    job = builder.evaluation(digits(name="by_frequency"))
    radii = np.asarray(job.threat.epsilon)
    counts = job.test.class_counts
    assert radii.shape == (CLASSES,)
    assert np.sum(counts * radii) / np.sum(counts) == pytest.approx(0.1)
    assert radii[counts.argmax()] == pytest.approx(0.07)
    np.testing.assert_allclose(np.asarray(job.step_size) / radii, 0.125)
    assert job.about["epsilon"] == 0.1
    assert job.about["class_epsilon"] == list(radii)
    assert job.about["budget"] == "by_frequency, alpha 0.3"
    assert builder.evaluation(digits(name="by_frequency", alpha=0.5)).threat.epsilon != job.threat.epsilon


def test_equal_radii_are_the_standard():
    job = builder.evaluation(digits(name="given", epsilons=(0.1,) * CLASSES))
    assert job.threat == ThreatModel(0.1)
    assert "class_epsilon" not in job.about


WRONG = [
    ({"name": "given", "epsilons": (0.1, 0.2)}, r"the shape of epsilons is \[2\]; it must be \[10\]"),
    (
        {"name": "given", "epsilons": (0.1,) * 9 + (0.0,)},
        "epsilons has the entry 0; each must be finite and > 0",
    ),
    (
        {"name": "given", "epsilons": (0.1,) * 9 + (8.0,)},
        "gives class 9 the radius 8; in L-infinity it must be at most 1",
    ),
    ({"name": "given"}, "budget 'given' needs 'epsilons'"),
    (
        {"name": "by_frequency", "alpha": 1.0},
        r"config.evaluation.budget.alpha is 1.0; it must be in \[0, 1\)",
    ),
    ({"name": "constant", "alpha": 0.3}, "budget 'constant' takes no 'alpha'"),
    ({"name": "cfa"}, "unknown budget 'cfa'; use one of constant, by_frequency, given"),
    ({"name": "math:isqrt"}, "budget 'math:isqrt' needs 'n'"),
    (
        {"name": "robal_jax.errors:shown", "value": 1},
        "config.evaluation.budget: radii of the budget is '1'; it must be",
    ),
]


@pytest.mark.parametrize(("budget", "message"), WRONG)
def test_budgets_that_cannot_be_used(budget, message):
    with pytest.raises(InputError, match=message):
        builder.evaluation(digits(**budget))


def test_balanced_counts_have_no_radii_by_frequency():
    config = digits(name="by_frequency")
    with config.unlocked():
        config.data.ratio = 1.0
    with pytest.raises(InputError, match=r"all classes have 104 training images.*use the budget 'constant'"):
        builder.evaluation(config)


# ---------------------------------------------------------------- attacks and audit

RADII = (0.05, 0.1, 0.2)


def model(images):
    weight = jnp.asarray(np.random.RandomState(1).randn(72, 3), jnp.float32)
    return jnp.tanh((images.reshape(len(images), -1) - 0.5) @ weight) * 3


def batch(count=12):
    images = jnp.asarray(np.random.RandomState(0).uniform(0.3, 0.7, (count, 6, 6, 2)), jnp.float32)
    return jax.random.split(jax.random.key(0), count), images, jnp.arange(count) % 3


@pytest.mark.slow
@pytest.mark.parametrize("norm", ["linf", pytest.param("l2", marks=pytest.mark.slow)])
def test_each_image_is_evaluated_at_its_own_radius(norm):
    keys, images, labels = batch()
    run = jax.jit(
        lambda radii, sizes: steps.eval_step(
            model, keys, images, labels, threat=ThreatModel(radii, norm), step_size=sizes
        )
    )
    radii = jnp.asarray(RADII)[labels]
    found = run(radii, radii / 8)
    for k, radius in enumerate(RADII):
        alone = run(jnp.full_like(radii, radius), jnp.full_like(radii, radius) / 8)
        members = np.asarray(labels) == k
        for name in steps.CONDITIONS:
            np.testing.assert_array_equal(found[name]["distance"][members], alone[name]["distance"][members])
    by_class = jax.jit(
        partial(
            steps.eval_step, model, threat=ThreatModel(RADII, norm), step_size=tuple(r / 8 for r in RADII)
        )
    )(keys, images, labels)
    threat = ThreatModel(RADII, norm).of(labels)
    for name, judged in by_class.items():
        np.testing.assert_array_equal(judged["pred"], found[name]["pred"])
        steps.check(name, jax.tree.map(np.asarray, judged), threat, 72)
    np.testing.assert_allclose(by_class["fgsm"]["distance"], radii, rtol=1e-5)


def test_distances_are_checked_against_each_image_s_own_radius():
    threat = ThreatModel(RADII).of(jnp.array([0, 1, 2]))
    judged = {"finite": np.ones(3, bool), "distance": np.float32(RADII), "outside": np.zeros(3)}
    steps.check("fgsm", judged, threat)
    with pytest.raises(RuntimeError, match="fgsm left the threat model: distance"):
        steps.check("fgsm", {**judged, "distance": np.float32([0.06, 0.1, 0.1])}, threat)


def test_radii_of_the_audit_are_multiples_of_each_image_s_own():
    keys, images, labels = batch()
    threat, size = ThreatModel(RADII), tuple(radius / 8 for radius in RADII)
    probe = partial(measurements.probe, scale=1.0, steps=(20,), restart=0, threat=threat, step_size=size)
    wide = jax.jit(partial(probe, model))(keys, images, labels, factor=jnp.float32(2.0))
    double = ThreatModel(tuple(2 * radius for radius in RADII))
    same = jax.jit(partial(probe, model, threat=double, step_size=tuple(2 * s for s in size)))(
        keys, images, labels, factor=jnp.float32(1.0)
    )
    np.testing.assert_allclose(wide["margin"], same["margin"], atol=1e-5)
    assert measurements.radius_unit(threat) == 1
    assert measurements.radius_factors(threat, 72)[-1] == pytest.approx(1 / 0.05)  # all images have no bound


# ---------------------------------------------------------------- what is said of it

OWN = [0.07 + 0.01 * k for k in range(CLASSES)]
BUDGET = META | {"epsilon": 0.1, "class_epsilon": OWN, "budget": "by_frequency, alpha 0.3"}


def common(results, folder="run/evaluation"):
    return {
        "folder": folder,
        **{
            group: {name: row[group] for name, row in results.conditions.items()}
            for group in ("accuracy", "tail")
        },
    }


@pytest.mark.slow
def test_every_output_says_so(tmp_path):
    audit = {
        "examples": 5,
        "verdicts": [],
        "curves": {"epsilon": curve([0, 0.5, 1, 2], PGD=[0.9, 0.7, 0.5, 0.1])},
    }
    meta = BUDGET | {"common_epsilon": common(fake_results())}
    results = fake_results(meta=meta, audit=audit)
    write_report(tmp_path, results)
    assert in_words(results).endswith("Budgets by class: not the standard threat model.")
    assert "at Linf 0.07 to 0.16 by class" in in_words(results)
    for name in ("report.md", "report.html"):
        text = (tmp_path / name).read_text()
        assert BY_CLASS.capitalize() in text
        assert "in multiples of each image" in text
        assert "The same weights at the common radius, from run/evaluation" in text
    text = (tmp_path / "report.md").read_text()
    assert text.startswith("# RoBal on digits-LT (budgets by class)")
    assert "by_frequency, alpha 0.3; the common radius is 0.1" in text
    stored = json.loads((tmp_path / "results.json").read_text())["meta"]
    assert (stored["epsilon"], stored["class_epsilon"]) == (0.1, OWN)
    rows = list(csv.DictReader(io.StringIO((tmp_path / "per_class.csv").read_text())))
    assert {(row["class"], float(row["epsilon"])) for row in rows} == {
        (str(k), OWN[k]) for k in range(CLASSES)
    }


def test_one_radius_is_reported_as_ever(tmp_path):
    write_report(tmp_path, fake_results())
    assert "Budgets by class" not in (tmp_path / "report.md").read_text()
    assert "epsilon" not in (tmp_path / "per_class.csv").read_text().splitlines()[0]


def evaluated(meta, name):
    results = fake_results(meta=meta)
    labels = np.tile(np.arange(CLASSES), 20)
    arrays = {"labels": labels, "ids": np.arange(len(labels))}
    arrays |= {f"pred_{name}": labels for name in results.conditions if name != "worst"}
    parts = {field.name: getattr(results, field.name) for field in dataclasses.fields(results)}
    return EvaluatedRun(**parts, name=name, examples=arrays)


def test_runs_at_other_radii_are_not_compared():
    one, other = evaluated(BUDGET, "a"), evaluated(BUDGET | {"method": "AT"}, "b")
    assert any(BY_CLASS in table.title for table in compare([one, other]))
    for meta in (
        BUDGET | {"class_epsilon": OWN[::-1], "method": "AT"},
        META | {"epsilon": 0.1, "method": "AT"},
    ):
        with pytest.raises(
            InputError, match=r"b and a differ in class_epsilon: Linf 0.*evaluate both in the same"
        ):
            compare([one, evaluated(meta, "b")])


FIELDS = {"evaluation": {"epsilon": 0.1, "budget": {"name": "constant"}, "autoattack": "standard"}}
KNOWN = {"checkpoint_sha256": "1", "test_set_sha256": "2", "epsilon": 0.1}
CHANGES = {
    "same": ({}, FIELDS, True),
    "other weights": ({"checkpoint_sha256": "9"}, FIELDS, False),
    "other images": ({"test_set_sha256": "9"}, FIELDS, False),
    "other steps": ({}, {"evaluation": FIELDS["evaluation"] | {"step_size": 0.5}}, False),
    "without autoattack": ({}, {"evaluation": FIELDS["evaluation"] | {"autoattack": "none"}}, True),
    "by class too": ({"class_epsilon": OWN}, FIELDS, False),
}


@pytest.mark.parametrize(("meta", "fields", "found"), CHANGES.values(), ids=CHANGES)
def test_the_accuracy_at_the_common_radius_is_that_of_the_same_weights(tmp_path, meta, fields, found):
    """It is looked for in all folders; the first, of another part of the test set, does not fit."""
    own = {"evaluation": FIELDS["evaluation"] | {"budget": {"name": "by_frequency", "alpha": 0.3}}}
    folders = [tmp_path / name for name in ("missing", "part", "whole")]
    assert at_common_radius(folders, KNOWN | {"config": own}) == {}
    part = FIELDS["evaluation"] | {"examples": 20}
    for folder in folders[1:]:
        folder.mkdir()
    fake_results(meta=META | KNOWN | {"config": {"evaluation": part}}).write(folders[1])
    results = fake_results(meta=META | KNOWN | meta | {"config": fields})
    results.write(folders[2])
    beside = at_common_radius(folders, KNOWN | {"config": own})
    assert beside == ({"common_epsilon": common(results, str(folders[2]))} if found else {})


# ---------------------------------------------------------------- whole evaluations


@pytest.mark.long
@pytest.mark.slow
def test_any_model_at_radii_by_class(tmp_path):
    _, images, _ = batch(60)
    labels = np.asarray(model(images).argmax(-1))
    evaluate = partial(
        robal_jax.evaluate_model, model, images, labels, version="apgd_ce,fab_t", say=lambda line: None
    )
    one = evaluate(threat=ThreatModel(0.02), audit=0)
    same = evaluate(threat=ThreatModel((0.02,) * 3), audit=0)
    for name, predictions in one.predictions.items():
        np.testing.assert_array_equal(same.predictions[name], predictions, err_msg=name)
    radii = (0.01, 0.02, 0.03)
    own = evaluate(threat=ThreatModel(radii), audit=20, folder=tmp_path)
    assert own.meta["class_epsilon"] == list(radii)
    assert "epsilon" not in own.meta
    assert own.curves["epsilon"]["x"][:4] == [0, 0.25, 0.5, 1]
    allowed = np.asarray(radii)[labels] + evaluation.DISTANCE_TOLERANCE
    assert (own.examples["distance_pgd_20"] <= allowed).all()
    np.testing.assert_allclose(np.load(tmp_path / "adversarial.npz")["epsilon"], radii)
    assert {verdict["name"]: verdict["outcome"] for verdict in own.audit["verdicts"]}[
        "stored_images"
    ] == "passed"
    assert evaluate(threat=ThreatModel(radii), audit=20, folder=tmp_path).meta == own.meta  # it resumes


@pytest.mark.parametrize(
    ("threat", "message"),
    [
        (ThreatModel((0.1, 0.1)), r"with 2 radii they must be in 0..1"),
        (ThreatModel((0.1,) * 4), r"the shape of epsilon is \[4\]; it must be \[3\], one number per class"),
        (ThreatModel(np.full(12, 0.1)), "an ensemble takes one radius, or one per class; pass a tuple of 3"),
        (ThreatModel((0.1, 0.1, 8.0)), "epsilon is 8, and the pixels are in"),
    ],
    ids=["few", "many", "per image", "255ths"],
)
def test_radii_that_no_model_is_evaluated_at(threat, message):
    _, images, labels = batch()
    with pytest.raises(ValueError, match=message):
        robal_jax.evaluate_model(model, images, labels, threat=threat, audit=0)


@pytest.mark.long
@pytest.mark.slow
def test_a_run_at_radii_by_class_beside_the_common_radius(tmp_path):
    """The report of the second evaluation shows the first; a third of another checkpoint would not."""
    stored = pathlib.Path(__file__).with_name("stored_run")
    run = shutil.copytree(stored, tmp_path / "run", ignore=shutil.ignore_patterns("evaluation"))
    settings = ["autoattack=none", "audit.examples=0", "examples=20"]
    config, by_class = (
        cli.apply_overrides(read_config(run), [f"--config.evaluation.{text}" for text in (*settings, *more)])
        for more in ([], ["budget.name=by_frequency"])
    )
    one, own = (
        read_run(loop.evaluate(each, run, folder=run / name, say=lambda line: None))
        for each, name in ((config, "evaluation-20-images"), (by_class, "own"))
    )
    beside = own.meta["common_epsilon"]
    assert beside["accuracy"]["pgd_20"] == one.conditions["pgd_20"]["accuracy"]
    assert own.conditions["clean"] == one.conditions["clean"]
    assert own.meta["class_epsilon"] != [own.meta["epsilon"]] * CLASSES
    with pytest.raises(InputError, match=r"with other settings .*evaluation.budget.name: 'constant' here"):
        loop.evaluate(config, run, folder=run / "own", say=lambda line: None)
