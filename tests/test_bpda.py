"""BPDA: the gradient of an approximation, and evaluations in which attacks follow it, too."""

import itertools
import os
import subprocess
import sys
from functools import partial
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import with_devices
from helpers import assert_nothing_twice, interrupt, traced_work

import robal_jax
from robal_jax import ThreatModel, attacks, bpda
from robal_jax.attacks import autoattack, clean_start
from robal_jax.errors import InputError
from robal_jax.evaluation.steps import with_bpda
from robal_jax.models import closure
from robal_jax.reporting import figures
from robal_jax.reporting.names import headline_attack

CLASSES, COUNT, LEVELS = 5, 40, 4
SHAPE = (4, 4, 1)
RNG = np.random.RandomState(0)
IMAGES = RNG.uniform(size=(COUNT, *SHAPE)).astype(np.float32)
WEIGHT = jnp.asarray(RNG.randn(16, CLASSES), jnp.float32)
THREAT = ThreatModel(0.1)
attack = partial(attacks.pgd, threat=THREAT, steps=20, step_size=0.025, start=clean_start)


def network(x):
    return jnp.tanh(x - 0.5).reshape(len(x), -1) @ WEIGHT


def quantise(x):
    return jnp.round((LEVELS - 1) * x) / (LEVELS - 1)


def quantised(x):
    return network(quantise(x))


def straight(x):
    """The quantised model, quantised without effect on the gradient."""
    return network(bpda(quantise, lambda x: x)(x))


def binarised(x):
    return jnp.tanh(1e5 * (x - 0.5)).reshape(len(x), -1) @ WEIGHT


def large(x):
    return 1e4 * network(x)


LABELS = np.asarray(quantised(IMAGES)).argmax(-1)
DEFENCES = {
    "quantised": (quantised, network),
    "quantised, replaced in one part": (quantised, straight),
    "saturating": (binarised, network),
}


@pytest.mark.slow
@pytest.mark.parametrize("defence", DEFENCES)
def test_the_plain_gradient_finds_nothing_and_bpda_does(defence):
    model, surrogate_fn = DEFENCES[defence]
    labels = model(IMAGES).argmax(-1)
    np.testing.assert_array_equal(attack(model, jax.random.key(0), IMAGES, labels), IMAGES)
    found = attack(bpda(model, surrogate_fn), jax.random.key(0), IMAGES, labels)
    assert np.mean(model(found).argmax(-1) != labels) > 0.3
    assert np.abs(found - IMAGES).max() <= 0.1 + 2.0**-24


@pytest.mark.slow
def test_values_are_the_model_s_and_gradients_the_approximation_s():
    """Under the transformations of an evaluation; the weights of both are arguments of its programs."""
    rng = np.random.RandomState(1)
    theirs, ours = (jnp.asarray(rng.randn(1600, 3), jnp.float32) for _ in range(2))
    model = bpda(lambda x: (x > 0.5).reshape(len(x), -1) @ theirs, lambda x: x.reshape(len(x), -1) @ ours)
    images = jnp.asarray(rng.uniform(size=(2, 40, 40, 1)), jnp.float32)
    predict, arrays = closure.split(model, (40, 40, 1))
    assert len(arrays) == 2
    expected = jnp.broadcast_to(ours[:, 1].reshape(1, 40, 40, 1), images.shape)

    def gradient(predict, x):
        return jax.grad(lambda x: jax.jit(predict)(x)[:, 1].sum())(x)

    @jax.jit
    def work(arrays, images):
        logits_fn = partial(predict, arrays)
        in_a_loop = jax.lax.map(partial(gradient, logits_fn), images[None])
        per_image = jax.vmap(lambda x: gradient(logits_fn, x[None])[0])(images)
        return logits_fn(images), in_a_loop[0], per_image

    logits, *gradients = work(arrays, images)
    np.testing.assert_allclose(logits, (images > 0.5).reshape(2, -1) @ theirs, rtol=1e-4)
    for found in gradients:
        np.testing.assert_array_equal(found, expected)
    of_each = jax.vmap(lambda w: gradient(bpda(jnp.round, lambda x: w * x), images))(jnp.arange(2.0))
    np.testing.assert_array_equal(of_each[0], 0)
    assert (of_each[1] == 0).sum() < of_each[1].size  # weights that JAX traces are seen, too


def test_a_random_part_stays_random():
    noisy = lambda x, keys: x + jax.vmap(lambda key: jax.random.uniform(key, SHAPE))(keys)  # noqa: E731
    part = bpda(lambda x, keys: jnp.round(noisy(x, keys)), noisy)
    keys = jax.random.split(jax.random.key(0), COUNT)
    np.testing.assert_array_equal(part(IMAGES, keys), jnp.round(noisy(IMAGES, keys)))
    np.testing.assert_array_equal(jax.grad(lambda x: part(x, keys).sum())(IMAGES), 1)


@pytest.mark.parametrize(
    ("surrogate_fn", "message"),
    [
        (lambda x: network(x)[:, 1:], r"surrogate_fn returns \[40, 4\] and the function of BPDA \[40, 5\]"),
        (lambda x: network(x) > 0, r"surrogate_fn returns bool\[40,5\]; it must return one array of floats"),
        (lambda x: (x, x), "surrogate_fn returns .*; it must return one array of floats"),
    ],
)
def test_what_is_no_approximation_is_refused(surrogate_fn, message):
    with pytest.raises(ValueError, match=message):
        bpda(network, surrogate_fn)(IMAGES)


# ---------------------------------------------------------------- evaluations

SETTINGS = {"threat": THREAT, "audit": 0, "say": lambda line: None}
evaluate = partial(robal_jax.evaluate_model, quantised, IMAGES, LABELS, **SETTINGS)


@pytest.mark.parametrize(
    ("surrogate_fn", "message"),
    [
        (quantised, "surrogate_fn has no gradient .it is 0 for the first 16 images.; replace each part"),
        (
            lambda x: jax.pure_callback(np.asarray, jax.ShapeDtypeStruct((len(x), 5), x.dtype), network(x)),
            "surrogate_fn has no gradient .*Pure callbacks",
        ),
        (lambda x: network(x)[:, 1:], "surrogate_fn has 4 classes; .* same 5"),
        ("identity", "surrogate_fn is a str; pass a function"),
    ],
)
def test_no_evaluation_without_a_gradient(surrogate_fn, message):
    with pytest.raises((InputError, ValueError), match=message):
        evaluate(surrogate_fn=surrogate_fn)


@pytest.mark.parametrize(
    ("version", "named"),
    [
        ("standard", ["apgd_ce", "robal_aa", "autoattack_bpda"]),
        ("robal_aa", ["apgd_ce", "robal_aa", "robal_aa_bpda"]),
        ("plus", ["autoattack_plus_bpda"]),
        ("square,apgd_ce", ["apgd_ce", "custom_bpda"]),
        ("none", ["pgd_20_bpda"]),
    ],
)
def test_stages_and_their_names(version, named):
    plain = autoattack.stages(version, CLASSES, threat=THREAT)
    stages = with_bpda(plain, threat=THREAT, step_size=0.025)
    own = [stage.name for stage in plain if stage.name not in autoattack.SQUARES]
    again = [f"{name}_bpda" for name in ("pgd_20", *own)]
    assert [stage.name for stage in stages] == [
        *own,
        *again,
        *["square"] * ("square" in version or len(own) > 2),
    ]
    assert [stage.name for stage in stages if stage.bpda] == again
    assert stages[0].first == 1
    assert all(later.first == earlier.last + 1 for earlier, later in itertools.pairwise(stages))
    progress = autoattack.begin(LABELS, LABELS)
    assert list(autoattack.outcomes(version, stages, progress, LABELS)) == named
    assert headline_attack(named, "pgd_20") == named[-1]


@pytest.mark.parametrize("num_classes", [4, 10])
def test_the_full_square_of_fast_has_the_random_numbers_of_autoattack_s(num_classes):
    def with_both(version):
        plain = autoattack.stages(version, num_classes, threat=THREAT)
        return with_bpda(plain, threat=THREAT, step_size=0.025)

    *_, short, full = with_both("fast")
    *_, square = with_both("standard")
    keys = jax.random.split(jax.random.key(0), 3)
    assert (short.name, full.name, square.name) == ("square", "square_full", "square")
    assert (full.keys(keys, 0) == square.keys(keys, 0)).all()
    assert full.conditional
    assert full.first == short.last + 1


@pytest.mark.long
@pytest.mark.slow
def test_what_bpda_breaks_counts_and_the_audit_flags_it(tmp_path, monkeypatch):
    """Interrupted in the middle of BPDA's attacks; resumed with the same approximation only."""
    looks = interrupt(monkeypatch, lambda looks: looks[-1].title == "pgd_20_bpda")
    run = partial(evaluate, folder=tmp_path, version="apgd_ce", audit=20)
    assert run(surrogate_fn=network) is None
    for other in (straight, None):  # the same logits as the model's, and none
        with pytest.raises(InputError, match=r"unfinished .* with other settings .surrogate_fn: "):
            run(surrogate_fn=other)
    found = run(surrogate_fn=network)
    assert_nothing_twice(looks)

    right = {name: predictions == LABELS for name, predictions in found.predictions.items()}
    own = np.logical_and.reduce(
        [right[name] for name in right if not name.endswith("bpda") and name != "worst"]
    )
    np.testing.assert_array_equal(right["worst"], own & right["custom_bpda"])
    assert list(found.meta["stages"]) == ["apgd_ce", "pgd_20_bpda", "apgd_ce_bpda"]
    assert found.headline_attack == "custom_bpda"
    with np.load(tmp_path / "adversarial.npz") as stored:
        np.testing.assert_array_equal(stored["ids"], np.flatnonzero(~right["custom_bpda"]))
        assert (quantised(stored["images"]).argmax(-1) != LABELS[stored["ids"]]).all()
    verdict = {verdict["name"]: verdict for verdict in found.audit["verdicts"]}["bpda"]
    broken = np.sum(own & ~right["custom_bpda"])
    assert verdict["outcome"] == "flagged"
    assert verdict["evidence"] == {"broken": broken, "images": COUNT}
    assert "BPDA** stands for" in (tmp_path / "report.md").read_text()


# ---------------------------------------------------------------- devices

RUNS = {
    "fast": {"version": "fast", "surrogate_fn": network, "minimum_norm": "fmn"},
    "large logits": {
        "version": "none", "surrogate_fn": network, "minimum_norm": "ddn", "threat": ThreatModel(0.3, "l2"),
    },
}  # fmt: skip


def run_all():
    """Outcomes of every image by run, with the attacks that are younger than AutoAttack; draws no figure."""
    models = {"fast": (quantised, LABELS), "large logits": (large, large(IMAGES).argmax(-1))}
    with mock.patch.multiple(figures, png=lambda figure: b"png", svg=lambda figure: b"svg"):
        return {
            name: robal_jax.evaluate_model(model, IMAGES, labels, **SETTINGS | RUNS[name]).examples
            for name, (model, labels) in models.items()
        }


@pytest.mark.long
@pytest.mark.slow
def test_one_compilation_and_four_devices(tmp_path, monkeypatch):
    """Of the attacks that are younger than AutoAttack."""
    traced = traced_work(monkeypatch)
    expected = run_all()
    own = [name for name in autoattack.VERSIONS["fast"] if name not in autoattack.SQUARES]
    stages = [*own, *(name + autoattack.BPDA for name in ("pgd_20", *own)), "square"]
    runs = ["eval_step", *stages, "shown_step"], ["eval_step", "pgd_20_bpda", "shown_step"]
    assert sorted(traced) == sorted([*runs[0], *runs[1], *["closest_step"] * 4])  # with either gradient
    of_large = expected["large logits"]
    plain, replaced = (
        np.mean(of_large[f"pred_{name}"] == of_large["labels"]) for name in ("pgd_20", "pgd_20_bpda")
    )
    assert replaced < plain - 0.3

    path = tmp_path / "found.npy"
    script = f"import numpy, test_bpda; numpy.save({str(path)!r}, test_bpda.run_all())"
    environment = with_devices(4, PYTHONPATH=os.pathsep.join([os.path.dirname(__file__), *sys.path]))
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for name, examples in np.load(path, allow_pickle=True).item().items():
        assert examples.keys() == expected[name].keys()
        for key, values in examples.items():
            if key.startswith("pred_"):
                np.testing.assert_array_equal(values, expected[name][key], key)
            else:  # up to the order of XLA's sums
                np.testing.assert_allclose(values, expected[name][key], atol=1e-5)
