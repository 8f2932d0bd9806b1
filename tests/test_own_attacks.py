"""Attacks of the user's own in an ensemble: what counts, what is refused, names, the audit's judgement."""

import os
import pathlib
import shutil
import subprocess
import sys
import types
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT, with_devices
from helpers import assert_nothing_twice, interrupt, refused

import robal_jax
from robal_jax import ThreatModel, builder, cli
from robal_jax.attacks import autoattack
from robal_jax.evaluation import findings, loop, measurements
from robal_jax.evaluation.own_attacks import check_own_attacks
from robal_jax.evaluation.steps import CONDITIONS, with_bpda
from robal_jax.zoo.models import config_of

CLASSES, COUNT = 4, 24
RNG = np.random.RandomState(0)
IMAGES = RNG.uniform(size=(COUNT, 4, 4, 1)).astype(np.float32)
WEIGHT = jnp.asarray(RNG.randn(16, CLASSES), jnp.float32)
THREAT = ThreatModel(0.1)
STANDARD = "apgd_ce,apgd_t,fab_t,square"


def smooth(x):
    return (x - 0.5).reshape(len(x), -1) @ WEIGHT


def masked(x):
    """A model without a gradient, which tells nothing to those who follow one."""
    return jax.lax.stop_gradient(smooth(x))


LABELS = np.asarray(smooth(IMAGES)).argmax(-1)


# ---------------------------------------------------------------- attacks


def informed(logits_fn, keys, images, labels, *, threat, far=2.0):
    """Knows the weights behind the mask, and goes as far as it may towards the second class."""
    second = jnp.argmax(jnp.where(jax.nn.one_hot(labels, CLASSES) > 0, -jnp.inf, logits_fn(images)), -1)
    direction = jnp.sign(WEIGHT.T[second] - WEIGHT.T[labels]).reshape(images.shape)
    return threat.project(images + far * direction, images)


def drawn(logits_fn, keys, images, labels, *, threat):
    """Random corners of the ball."""
    sign = jax.vmap(lambda key: jax.random.rademacher(key, images.shape[1:], images.dtype))
    return threat.project(images + 2.0 * sign(keys), images)


def far_off(logits_fn, keys, images, labels, *, threat):
    return jnp.clip(images + 2 * threat.epsilon, threat.lower, threat.upper)


def too_bright(logits_fn, keys, images, labels, *, threat):
    return images + jnp.where(images > 1 - threat.epsilon, threat.epsilon, 0.0)


def not_a_number(logits_fn, keys, images, labels, *, threat):
    return images * jnp.nan


def without_threat(logits_fn, keys, images, labels):
    return images


def with_a_setting(logits_fn, keys, images, labels, *, threat, steps):
    return images


def one_image(logits_fn, keys, images, labels, *, threat):
    return images[0]


def half(logits_fn, keys, images, labels, *, threat):
    return images.astype(jnp.float16)


def pair(logits_fn, keys, images, labels, *, threat):
    return images, labels


def with_numpy(logits_fn, keys, images, labels, *, threat):
    return images + np.asarray(images)


def for_one_radius(logits_fn, keys, images, labels, *, threat):
    return images + threat.epsilon * jnp.ones((3, 1, 1, 1))


def informed_bpda(logits_fn, keys, images, labels, *, threat):
    return images


number, settled = 3, partial(informed, far=1.0)


def attacked(model, version, **settings):
    settings = {"threat": THREAT, "steps": 3, "queries": 10} | settings
    return robal_jax.autoattack(model, jax.random.key(0), IMAGES, LABELS, version=version, **settings)


def evaluate(model=masked, **settings):
    settings = {"threat": THREAT, "version": ["apgd_ce", informed], "audit": 0, "batch_size": 8} | settings
    return robal_jax.evaluate_model(model, IMAGES, LABELS, say=lambda line: None, **settings)


# ---------------------------------------------------------------- what counts


@pytest.mark.slow
def test_an_own_attack_breaks_what_the_others_leave():
    found = attacked(masked, ["apgd_ce", informed], batch_size=7)
    name = "test_own_attacks:informed"
    assert list(found.robust) == ["clean", "apgd_ce", name]
    assert found.robust[name].sum() < found.robust["apgd_ce"].sum()
    np.testing.assert_array_equal(masked(found.images).argmax(-1) == LABELS, found.robust[name])
    assert np.abs(found.images - IMAGES).max() <= 0.1 + 1e-6
    settled = attacked(masked, "apgd_ce,test_own_attacks:settled")
    assert list(settled.robust)[-1] == "test_own_attacks:settled"


@pytest.mark.slow
@pytest.mark.parametrize("norm", ["l2", "l1"])
def test_in_other_norms(norm):
    found = attacked(smooth, "apgd_ce,test_own_attacks:informed", threat=ThreatModel(0.5, norm))
    assert list(found.robust) == ["clean", "apgd_ce", "test_own_attacks:informed"]


@pytest.mark.slow
def test_it_is_in_all_results_and_resumed(tmp_path, monkeypatch):
    whole = evaluate(folder=tmp_path / "whole")
    name = "test_own_attacks:informed"
    looks = interrupt(monkeypatch, lambda looks: looks[-1].title == name)
    assert evaluate(folder=tmp_path / "run") is None
    found = evaluate(folder=tmp_path / "run")
    assert_nothing_twice(looks)
    assert [look.title for look in looks].count(name) > 1
    assert found.examples.keys() == whole.examples.keys()
    for key, values in whole.examples.items():
        np.testing.assert_array_equal(found.examples[key], values)

    right = {condition: classes == LABELS for condition, classes in found.predictions.items()}
    assert right["custom_own"].sum() < right["apgd_ce"].sum()
    assert (right["worst"] <= right["custom_own"]).all()
    assert found.meta["stages"] == {"apgd_ce": right["apgd_ce"].mean(), name: right["custom_own"].mean()}
    assert found.headline_attack == "custom_own"
    with np.load(tmp_path / "run" / "adversarial.npz") as stored:
        np.testing.assert_array_equal(stored["ids"], np.flatnonzero(~right["custom_own"]))
        assert (masked(stored["images"]).argmax(-1) != LABELS[stored["ids"]]).all()
    report = (tmp_path / "run" / "report.md").read_text()
    assert "classified correctly under Ensemble with own attacks" in report
    assert "| informed (own) |" in report
    assert "**AutoAttack** was not run" in report
    assert "Here: test_own_attacks:informed." in report


@pytest.mark.slow
def test_with_bpda_radii_by_class_and_optimality():
    settings = {"surrogate_fn": smooth, "optimality": True, "audit": 8, "threat": ThreatModel((0.1, 0.2) * 2)}
    found = evaluate(version=[drawn], **settings)
    name = "test_own_attacks:drawn"
    assert list(found.meta["stages"]) == [name, "pgd_20_bpda", f"{name}_bpda"]
    assert "custom_own_bpda" in found.conditions
    assert list(found.optimality["attacks"]) == [name]


STORED = pathlib.Path(__file__).with_name("stored_run")
SCRIPT = """
import pathlib, sys
from robal_jax import cli, evaluation
from robal_jax.storage.config_file import read_config
workdir = pathlib.Path(sys.argv[1])
config = cli.apply_overrides(read_config(workdir), sys.argv[2:])
evaluation.evaluate(config, workdir)
"""


@pytest.mark.long
@pytest.mark.slow
def test_two_devices_of_a_config_find_the_same(tmp_path):
    outcomes, path = {}, os.pathsep.join([os.path.dirname(__file__), *sys.path])
    for devices in (1, 2):
        workdir = tmp_path / str(devices)
        shutil.copytree(STORED, workdir, ignore=shutil.ignore_patterns("evaluation"))
        overrides = (
            "--config.evaluation.autoattack=test_own_attacks:drawn",
            "--config.evaluation.audit.examples=0",
        )
        command = [sys.executable, "-c", SCRIPT, str(workdir), *overrides]
        environment = with_devices(devices, PYTHONPATH=path)
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        with np.load(workdir / "evaluation" / "examples.npz") as content:
            outcomes[devices] = content["pred_custom_own"]
            assert (content["pred_custom_own"] != content["pred_clean"]).any()
    np.testing.assert_array_equal(outcomes[1], outcomes[2])


# ---------------------------------------------------------------- what is refused

WRONG_NAMES = {
    "no_such_module:attack": r"cannot import the attack 'no_such_module:attack' \(ModuleNotFoundError",
    "test_own_attacks:missing": r"cannot import the attack 'test_own_attacks:missing' \(AttributeError",
    "test_own_attacks:number": "attack 'test_own_attacks:number' is a int, not a function; it must take",
    "test_own_attacks:without_threat": r"without_threat' cannot be called \(got an unexpected .*'threat'",
    "test_own_attacks:with_a_setting": r"with_a_setting' cannot be called \(missing a required .*'steps'\)",
    "test_own_attacks:informed,other:informed": "two attacks in .* have the same name, or one ends in",
    "test_own_attacks:informed_bpda": "two attacks in .* have the same name, or one ends in '_bpda'; rename",
    "apgd_ce,test_own_attacks:drawn,test_own_attacks:drawn": "unknown ensemble .*no repeats",
}


@pytest.mark.parametrize("version", WRONG_NAMES)
def test_names_and_signatures(version):
    refused(WRONG_NAMES[version], attacked, smooth, version)


def test_a_config_is_refused_before_its_training():
    config = cli.load_config(f"{ROOT}/configs/at.py:digits_lt")
    config.evaluation.autoattack = "apgd_ce,test_own_attacks:with_a_setting"
    refused("cannot be called", builder.check, config)


def test_a_card_with_an_own_attack_names_code_to_run():
    card = {"name": "mine", "config": {"evaluation": {"autoattack": "apgd_ce,their_attacks:attack"}}}
    refused("names code to run: config.evaluation.autoattack is 'apgd_ce,their", config_of, card)


@pytest.mark.parametrize("function", [lambda *_, threat: _[2], partial(informed, far=1.0)])
def test_functions_that_have_no_name(function):
    refused("attack .* cannot be imported by its name; define it at the top", attacked, smooth, [function])


WRONG = {
    one_image: r"'test_own_attacks:one_image' returns float32\[4, 4, 1\] for images float32\[.*4, 4, 1\]; it",
    half: r"returns float16\[.*\] for images float32",
    pair: r"returns a tuple \(float32",
    with_numpy: r"needs the values of its arguments, .* \(.*test_own_attacks.py:\d+\)",
    for_one_radius: r"fails with TypeError: .* \(.*test_own_attacks.py:\d+\)",
}


@pytest.mark.parametrize("attack", WRONG, ids=lambda attack: attack.__name__)
def test_contracts_are_checked_before_the_first_attack(attack, monkeypatch, tmp_path):
    monkeypatch.setattr(autoattack, "run", lambda *_, **__: pytest.fail("attacked"))
    monkeypatch.setattr(loop, "conditions", lambda *_: pytest.fail("attacked"))
    refused(WRONG[attack], attacked, smooth, ["apgd_ce", attack])
    refused(WRONG[attack], evaluate, version=["apgd_ce", attack], folder=tmp_path)
    assert not list(tmp_path.iterdir())


OUTSIDE = {far_off: "distance 0.2", too_bright: "outside 0.0", not_a_number: "distance nan"}


@pytest.mark.parametrize("attack", OUTSIDE, ids=lambda attack: attack.__name__)
def test_images_outside_of_the_threat_model(attack):
    message = rf"attack 'test_own_attacks:{attack.__name__}' left the threat model \({OUTSIDE[attack]}"
    refused(message, attacked, smooth, [attack])


def nan_in_a_pixel(logits_fn, keys, images, labels, *, threat):
    return images.at[:, 2, 3].set(jnp.nan)


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
@pytest.mark.parametrize("count", [24, 88, 100, 256])
def test_a_missing_pixel_counts_as_left_the_threat_model(norm, count):
    """Also for a model that maps it to a number, and whatever vector instructions take the maximum."""
    images = np.resize(IMAGES, (count, *IMAGES.shape[1:]))
    settings = {"threat": ThreatModel(0.1, norm), "version": [nan_in_a_pixel], "steps": 3, "queries": 10}

    def binary(x):
        return (x > 0.5).astype(float).reshape(len(x), -1) @ WEIGHT

    labels = np.asarray(binary(images)).argmax(-1)
    message = r"nan_in_a_pixel' left the threat model \(distance nan"
    refused(message, robal_jax.autoattack, binary, jax.random.key(0), images, labels, **settings)


@pytest.mark.slow
def test_nothing_outside_of_the_threat_model_is_counted(tmp_path):
    message = r"attack 'test_own_attacks:far_off' left the threat model \(distance 0.2"
    refused(message, evaluate, version=[far_off], folder=tmp_path)
    assert not (tmp_path / "results.json").exists()
    assert not (tmp_path / "unfinished" / "ensemble.npz").exists()


def test_the_contract_is_checked_at_one_radius_per_image_too():
    """The comparison of the attacks calls it so, after long work."""
    job = types.SimpleNamespace(
        ensemble=autoattack.stages("test_own_attacks:far_off", CLASSES, threat=THREAT),
        batch_size=3,
        test=types.SimpleNamespace(images=IMAGES),
        predict=lambda params, stats, x: smooth(x),
        replaced=None,
        optimality=False,
        threat=THREAT,
    )
    weights = {"params": {}, "stats": {}}
    check_own_attacks(job, weights)
    job.optimality = True
    refused("far_off' fails with", check_own_attacks, job, weights)


# ---------------------------------------------------------------- names, BPDA, the audit


@pytest.mark.parametrize(
    ("version", "named"),
    [
        ("{}", ["custom_own"]),
        ("apgd_ce,{}", ["apgd_ce", "custom_own"]),
        ("{},apgd_ce", ["custom_own"]),
        (STANDARD + ",{}", ["apgd_ce", "robal_aa", "autoattack", "custom_own"]),
        ("apgd_ce,apgd_t,{},fab_t,square", ["apgd_ce", "robal_aa", "custom_own"]),
    ],
)
def test_it_never_counts_as_autoattack(version, named):
    version = version.format("test_own_attacks:informed")
    stages = autoattack.stages(version, CLASSES, threat=THREAT)
    assert [stage.rounds for stage in stages if stage.own] == [1]
    progress = autoattack.begin(LABELS, LABELS)
    assert list(autoattack.outcomes(version, stages, progress, LABELS)) == named
    replaced = with_bpda(stages, threat=THREAT, step_size=0.025)
    names = [stage.name for stage in replaced if stage.own]
    assert names == ["test_own_attacks:informed", "test_own_attacks:informed_bpda"]
    with_surrogate = list(autoattack.outcomes(version, replaced, progress, LABELS))
    assert with_surrogate[-1] == "custom_own_bpda"
    assert ("autoattack_bpda" in with_surrogate) is ("autoattack" in named)
    order = [stage.name for stage in replaced if stage.name == "square" or stage.own]
    last = version.endswith("informed") and "square" in version
    assert order == (["square", *names] if last else [*names, *(["square"] if "square" in version else [])])


@pytest.mark.parametrize(
    ("version", "judged"),
    [
        (STANDARD + ",{}", True),
        ("apgd_ce,square,{}", True),
        ("apgd_ce,{}", True),
        ("{}," + STANDARD, False),
        ("apgd_ce,apgd_t,fab_t,{},square", False),
        ("{},square", False),
        ("apgd_ce,{},apgd_t", False),
        ("{}", False),
    ],
)
def test_square_is_judged_as_without_it_or_not_at_all(version, judged):
    """Images: broken by each round, and not at all; the sample of the audit has the last two."""

    def judgement(version):
        stages = autoattack.stages(version, CLASSES, threat=THREAT)
        broken_in = np.append(first, autoattack.ROBUST)
        labels = np.zeros(len(broken_in), int)
        predictions = dict.fromkeys(CONDITIONS, labels)
        sample = measurements.Sample(
            np.arange(len(labels))[-2:], {"gradient_free": {"right": np.array([True, False])}}
        )
        job, progress = types.SimpleNamespace(ensemble=stages), autoattack.Progress(broken_in, labels, {})
        return findings._after_gradients(job, progress, sample, predictions, labels)

    with_own = autoattack.stages(version.format("test_own_attacks:informed"), CLASSES, threat=THREAT)
    first = np.array([stage.first for stage in with_own])
    survived, by_square = judgement(version.format("test_own_attacks:informed"))
    assert (by_square is not None) == judged
    if judged:
        plain, square = judgement(version.removesuffix(",{}"))
        np.testing.assert_array_equal(survived, plain)
        np.testing.assert_array_equal(by_square, square)
