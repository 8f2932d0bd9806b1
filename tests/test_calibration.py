"""The benchmark of the audit (experiments/benchmarks/calibration.py), and a tenth of it."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.benchmarks import calibration, masked
from robal_jax.attacks import ThreatModel
from robal_jax.evaluation import measurements
from robal_jax.evaluation.explanations import EXPLANATIONS

THREAT = ThreatModel(0.1)
SHAPE = (8, 8, 1)
CASES = list(calibration.cases(cifar=True))


def linear(x):
    weight = jax.random.normal(jax.random.key(0), (64, 5))
    return x.reshape(len(x), 64) @ weight


def images(count=6):
    return jax.random.uniform(jax.random.key(1), (count, *SHAPE)).at[:, 0, 0].set(0.0)


def test_there_are_enough_models_of_enough_kinds():
    honest, others = ([case for case in CASES if case.honest == kind] for kind in (True, False))
    assert len({case.name for case in CASES}) == len(CASES)
    assert len(honest) >= 30
    assert len(others) >= 30
    assert len({case.kind for case in others}) >= 10
    assert {"digits", "cifar"} == {case.data for case in honest}
    assert {check for case in CASES for check in case.expected} <= set(EXPLANATIONS)


def test_a_tenth_has_every_check_that_should_see_a_mask():
    some = calibration.tenth(CASES)
    assert len(some) <= len(CASES) / 8
    first = {case.expected[0] for case in CASES if not case.honest}
    assert {case.expected[0] for case in some if not case.honest} == first
    assert sum(case.honest for case in some) == 2


@pytest.mark.slow
@pytest.mark.parametrize("name", masked.MASKS)
def test_a_mask_shows_its_sign(name):
    """What its check looks at, on a linear model."""
    mask, checks = masked.MASKS[name]
    model, x = mask(linear), images()
    keys, labels = jax.random.split(jax.random.key(2), len(x)), jnp.argmax(linear(x), -1)
    found = measurements.gradients(model, keys, x, labels, threat=THREAT, step_size=0.02)
    passes = [np.asarray(jax.jit(model)(x)) for _ in range(2)]
    signs = {
        "zero_gradients": bool((found["size"] == 0).all()),
        "nan_gradients": not found["finite"].any(),
        "randomised": bool((passes[0] != passes[1]).any()),
        "inference": measurements.gradient_calls(model, x) > 0,
    }
    assert {sign for sign, shown in signs.items() if shown} == set(checks) & set(signs)
    assert passes[0].shape == (len(x), 5)
    if name.startswith("logits x"):
        factor = float(name.split()[-1])
        np.testing.assert_allclose(passes[0], factor * linear(x), rtol=1e-5)


def test_cosines_forget_the_norms():
    weight = jax.random.normal(jax.random.key(3), (5, 64))
    features = lambda x: x.reshape(len(x), 64)  # noqa: E731
    found = masked.cosines(features, weight)(images())
    np.testing.assert_allclose(found, masked.cosines(features, 7 * weight)(3 * images()), atol=1e-6)
    assert np.abs(found).max() <= 1


def record(case, **outcomes):
    fields = {key: value for key, value in case._asdict().items() if key != "mask"}
    return {**fields, "name": case.name, "clean": 0.9, "pgd_20": 0.7, "outcomes": outcomes, "seconds": 1}


def test_the_table_counts_by_kind_and_check(tmp_path):
    honest = [case for case in CASES if case.kind == "at"][:2]
    others = [case for case in CASES if case.kind == "logits x 0.01"]
    records = [
        record(honest[0], steps="note", unbounded="passed"),
        record(honest[1], unbounded="flagged"),
        record(others[0], logit_scale="flagged", steps="flagged"),
        record(others[1], steps="flagged"),
        record(others[2], steps="note"),
    ]
    text = calibration.table(records)
    assert "- All: 1 of 2 honest models flagged; 2 of 3 masked models flagged, 1 by the check that" in text
    assert "- Seed 0: 0 of 1 honest models flagged; 1 of 1 masked models flagged, 1 by" in text
    assert "| at, digits | 2 | 90 to 90 | 70 to 70 | 1 | - | More steps 1 |" in text
    assert "| logits x 0.01, digits | 3 | 90 to 90 | 70 to 70 | 2 | 1 | More steps 2, Logit scale 1 |" in text
    assert "| More steps | 0 | 1 | 2 |" in text
    assert "\n5 of 72 models are audited here.\n" in calibration.page(records, 72)

    lines = [json.dumps(entry) for entry in records]
    path = tmp_path / "records.jsonl"
    path.write_text("\n".join([*lines[:3], lines[3][:50]]))
    assert calibration.read_records(path) == json.loads(json.dumps(records[:3]))
    assert calibration.read_records(tmp_path / "none") == []


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.usefixtures("optimised")
def test_a_tenth_is_judged_rightly(tmp_path, capsys):
    arguments = [f"--workdir={tmp_path}", "--tenth=1", "--sample=120", f"--out={tmp_path / 'table.md'}"]
    calibration.main(arguments)
    records = calibration.read_records(tmp_path / "records.jsonl", 120)
    assert [entry["name"] for entry in records] == [case.name for case in calibration.tenth(CASES)]
    for entry in records:
        flags = {name for name, outcome in entry["outcomes"].items() if outcome == "flagged"}
        assert bool(flags) != entry["honest"], entry["name"]
        assert bool(flags & set(entry["expected"])) != entry["honest"], entry["name"]
        assert entry["clean"] > 0.8
    assert "All: 0 of 2 honest models flagged; 5 of 5 masked models flagged, 5 by the check" in (
        (tmp_path / "table.md").read_text()
    )
    capsys.readouterr()
    calibration.main(arguments)  # nothing is left to do
    assert calibration.read_records(tmp_path / "records.jsonl", 120) == records
    assert calibration.read_records(tmp_path / "records.jsonl") == []
    assert "on 120 test images" in (tmp_path / "table.md").read_text()
