"""The three calls for models of anybody's: evaluate_model, load_run and autoattack; and the public names."""

import ast
import functools
import json
import pathlib
import signal
import subprocess
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import ROOT
from flax import nnx
from helpers import assert_nothing_twice, interrupt

import robal_jax
from robal_jax import ThreatModel, autoattack, cli, evaluate, evaluate_model, load_run
from robal_jax.errors import InputError
from robal_jax.storage.config_file import read_config

STORED = pathlib.Path(__file__).with_name("stored_run")
THREAT = ThreatModel(0.1)
SHORT = {"threat": THREAT, "version": "apgd_ce", "audit": 0, "say": lambda line: None}


@pytest.fixture(scope="module")
def run():
    return load_run(STORED)


@pytest.fixture(scope="module")
def digits(run):
    """Four images per class, as floats and integers in [0, 1]."""
    chosen = np.concatenate([np.flatnonzero(run.test.labels == k)[:4] for k in range(10)])
    return run.test.images[chosen] / np.float32(16), run.test.labels[chosen]


def fitted(apply, params, images, labels):
    """A few steps of plain training, so that most images are classified correctly."""
    update = optax.adam(0.02)

    def loss(params):
        return optax.softmax_cross_entropy_with_integer_labels(apply(params, images), labels).mean()

    @jax.jit
    def fit(params):
        def step(carry, _):
            params, state = carry
            updates, state = update.update(jax.grad(loss)(params), state)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, update.init(params)), length=100)[0][0]

    return fit(params)


def plain(images, labels):
    """A linear model of nothing but JAX."""
    apply = lambda weight, x: x.reshape(len(x), -1) @ weight  # noqa: E731
    weight = fitted(apply, jnp.zeros((64, 10)), images, labels)
    return lambda x: apply(weight, x)


def linen(images, labels):
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(10)(nn.relu(nn.Dense(32)(x.reshape(len(x), -1))))

    net = Net()
    params = fitted(net.apply, net.init(jax.random.key(0), images), images, labels)
    return lambda x: net.apply(params, x)


def nnx_model(images, labels):
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.conv = nnx.Conv(1, 8, (3, 3), strides=2, rngs=rngs)
            self.linear = nnx.Linear(128, 10, rngs=rngs)

        def __call__(self, x):
            return self.linear(nnx.relu(self.conv(x)).reshape(len(x), -1))

    graph, params = nnx.split(Net(nnx.Rngs(0)))
    return nnx.merge(graph, fitted(lambda p, x: nnx.merge(graph, p)(x), params, images, labels))


MODELS = {"plain": plain, "linen": linen, "nnx": nnx_model, "jitted": lambda *data: jax.jit(plain(*data))}


@pytest.mark.slow
@pytest.mark.parametrize("kind", MODELS)
def test_any_model_is_evaluated(kind, digits, tmp_path, capsys):
    images, labels = digits
    model = MODELS[kind](images, labels)
    said = []
    found = evaluate_model(model, images, labels, folder=tmp_path, name=kind, **{**SHORT, "say": said.append})
    assert "Percent of test images" in "".join(said)
    assert not capsys.readouterr().out
    clean = np.argmax(model(images), -1)
    assert np.mean(clean == labels) > 0.9
    np.testing.assert_array_equal(found.predictions["clean"], clean)
    assert list(found.summary["groups"]) == ["all"]  # the training counts are not known
    right = {name: pred == labels for name, pred in found.predictions.items()}
    assert right["apgd_ce"].sum() < right["clean"].sum()
    with np.load(tmp_path / "adversarial.npz") as stored:
        ids, shown = stored["ids"], stored["images"]
    assert np.abs(shown - images[ids]).max() <= 0.1 + 1e-6
    assert (np.argmax(model(shown), -1) != labels[ids]).all()
    assert {"report.html", "report.md", "results.json", "examples.npz"} <= {
        f.name for f in tmp_path.iterdir()
    }
    assert f"# {kind} on images" in (tmp_path / "report.md").read_text()


@pytest.mark.long
@pytest.mark.slow
def test_it_finds_what_the_evaluation_of_the_run_finds(run, tmp_path):
    """Image for image, by AutoAttack and with the audit, on the function of a run of ours."""
    config = cli.apply_overrides(
        read_config(STORED),
        ["--config.evaluation.autoattack=apgd_ce,square", "--config.evaluation.audit.examples=0"],
    )
    folder = evaluate(config, STORED, folder=tmp_path / "ours", say=lambda line: None)
    images = run.test.images / np.float32(run.test.pixel_max)
    options = {**SHORT, "version": "apgd_ce,square", "class_counts": run.test.class_counts}
    found = evaluate_model(
        run.logits_fn, images, run.test.labels, step_size=0.0125, folder=tmp_path / "theirs", **options
    )
    with np.load(folder / "examples.npz") as ours:
        names = [name for name in ours if name.startswith("pred_")]
        assert set(names) == {name for name in found.examples if name.startswith("pred_")}
        for name in names:
            np.testing.assert_array_equal(found.examples[name], ours[name])
    assert list(found.summary["groups"]) == ["head", "medium", "tail"]


@pytest.mark.slow
def test_the_audit_with_a_surrogate(digits):
    images, labels = digits
    model, other = plain(images, labels), linen(images, labels)
    options = {**SHORT, "version": "apgd_ce", "audit": 10}
    found = evaluate_model(model, images, labels, surrogate=other, **options)
    verdicts = {verdict["name"]: verdict for verdict in found.audit["verdicts"]}
    assert verdicts["transfer"]["outcome"] != "not run"
    assert found.audit["examples"] == 10


@pytest.mark.slow
def test_distances_of_any_model(digits, tmp_path):
    images, labels = digits
    model, counts = plain(images, labels), np.arange(40, 20, -2)
    options = {**SHORT, "version": "none", "folder": tmp_path, "minimum_norm": "fmn", "class_counts": counts}
    found = evaluate_model(model, images, labels, **options)
    closest = jax.jit(lambda *batch: robal_jax.fmn(model, None, *batch, threat=THREAT))(images, labels)
    lengths = found.examples["distance_fmn"]
    # In another batch a rounding may decide whether an image on the boundary counts: by one step of gamma.
    np.testing.assert_allclose(lengths, closest.distance, rtol=0.05)
    assert found.distances["found"] == np.isfinite(lengths).sum()
    assert found.distances["median"]["all"]["value"] == np.median(lengths)
    missed = (found.predictions["worst"] == labels) & (lengths <= THREAT.epsilon)
    assert found.distances["missed"] == missed.sum()
    assert list(found.distances["median"]["groups"]) == ["head", "medium", "tail"]
    curve = found.distances["curve"]
    shares = [figure["value"] for figure in curve["series"]["fmn"]]
    assert shares == [np.mean(lengths > x) for x in curve["x"]]
    assert shares[curve["x"].index(0)] == found.conditions["clean"]["accuracy"]["value"]
    assert THREAT.epsilon in curve["x"]
    assert "FMN looks for the closest adversarial image" in (tmp_path / "report.md").read_text()
    again = evaluate_model(model, images, labels, groups="last_five", **options)
    assert list(again.distances["median"]["groups"]) == ["rest", "last_five"]


@pytest.mark.slow
def test_groups_of_any_model(digits, tmp_path):
    """No class is rare: the report says so; other groups, and the counts themselves, need no new attack."""
    images, labels = digits
    model, counts, said = plain(images, labels), np.arange(60, 10, -5), []
    options = {**SHORT, "folder": tmp_path, "say": said.append}
    found = evaluate_model(model, images, labels, class_counts=counts + 20, groups="few", **options)
    line = "groups 'few': no class has fewer than 20 training images"
    assert said.count(line) == 1
    assert line[1:] in (tmp_path / "report.md").read_text()
    assert not found.groups
    again = evaluate_model(model, images, labels, class_counts=counts, groups="few,last_five", **options)
    assert said.count(line) == 1
    assert list(again.groups) == ["rest", "few"]
    assert again.meta["imbalance"] == "60 to 15 training images per class"
    assert any("no attack is run again" in message for message in said)
    for name, predictions in found.predictions.items():
        np.testing.assert_array_equal(again.predictions[name], predictions)
    letters = list("abcdefghij")
    named = evaluate_model(
        model, images, labels, class_counts=counts, groups="few,last_five", name="Mine", class_names=letters,
        **options,
    )  # fmt: skip
    assert (named.meta["method"], named.meta["class_names"]) == ("Mine", letters)
    assert said.count("the model or its classes have new names; no attack is run again") == 1


def test_groups_of_a_model_need_the_counts(digits):
    images, labels = digits
    with pytest.raises(
        InputError, match="groups is 'few', but class_counts is None; pass the training images"
    ):
        evaluate_model(plain(images, labels), images, labels, groups="few", **SHORT)


def test_a_surrogate_that_is_the_model_is_refused(digits, tmp_path):
    """Under another name too, and before any attack."""
    images, labels = digits
    model = plain(images, labels)
    for surrogate in (model, lambda x: model(x) + 0.0, jax.jit(model)):
        with pytest.raises(InputError, match="the surrogate is the model under attack; name another"):
            evaluate_model(model, images, labels, surrogate=surrogate, folder=tmp_path, **SHORT)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_stopped_and_resumed(digits, tmp_path, monkeypatch):
    images, labels = digits
    model = plain(images, labels)
    whole = evaluate_model(model, images, labels, folder=tmp_path / "whole", **SHORT)
    looks = interrupt(monkeypatch, lambda looks: len(looks) == 2)  # in the ensemble
    assert evaluate_model(model, images, labels, folder=tmp_path / "run", **SHORT) is None
    found = evaluate_model(model, images, labels, folder=tmp_path / "run", **SHORT)
    assert_nothing_twice(looks)
    for name, values in whole.examples.items():
        np.testing.assert_array_equal(found.examples[name], values)


@pytest.mark.slow
def test_a_model_with_another_gradient_is_another_one(digits, tmp_path):
    """Its logits are the same; a folder of an older version, which did not look, is taken as it is."""
    images, labels = digits
    model = plain(images, labels)
    rounded = lambda x: model(jnp.round(16 * x) / 16)  # noqa: E731
    straight = lambda x: model(robal_jax.bpda(lambda x: jnp.round(16 * x) / 16, lambda x: x)(x))  # noqa: E731
    evaluate_model(rounded, images, labels, folder=tmp_path, **SHORT)
    with pytest.raises(InputError, match=r"other settings \(gradients.model: '.*' here, '0.0e\+00' there\)"):
        evaluate_model(straight, images, labels, folder=tmp_path, **SHORT)
    results = tmp_path / "results.json"
    stored = json.loads(results.read_text())
    del stored["meta"]["identity"]["gradients"]
    results.write_text(json.dumps(stored))
    assert evaluate_model(straight, images, labels, folder=tmp_path, **SHORT) is not None


def test_images_that_are_far_too_dark_are_noted(digits):
    images, labels = digits
    said = []
    fast = {**SHORT, "version": "none", "audit": 0, "say": said.append}
    found = evaluate_model(plain(images, labels), images / 16, labels, **fast)
    assert said[0].startswith(
        "note: no image has a pixel above 0.0625, and the threat model allows pixels up"
    )
    assert repr(found).startswith("<model on images: clean ")
    assert repr(found).endswith("; flagged: nothing>")


def test_a_model_that_depends_on_its_batch_is_warned_of(digits):
    images, labels = digits
    model, said = plain(images, labels), []
    fast = {**SHORT, "version": "none", "audit": 0, "say": said.append}
    evaluate_model(model, images, labels, **fast)
    assert not [line for line in said if line.startswith("warning")]
    found = evaluate_model(lambda x: model(x) - model(x).mean(0, keepdims=True), images, labels, **fast)
    assert "warning: the logits of an image change with the images beside it" in "\n".join(said)
    assert found.flagged == ["Optimisation at inference"]
    *_, line = (line for line in said if line.startswith("Audit: "))
    assert line.startswith("Audit: 1 of 1 checks is flagged: do not trust any robust accuracy")


def test_ctrl_c_is_raised_after_what_was_found_is_saved(digits, tmp_path, monkeypatch):
    images, labels = digits
    interrupt(monkeypatch, len, how=lambda: signal.raise_signal(signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        evaluate_model(plain(images, labels), images, labels, folder=tmp_path, **SHORT)
    assert (tmp_path / "unfinished" / "conditions.npz").is_file()


def test_a_model_that_differs_only_off_the_clean_images_is_another_one(digits, tmp_path):
    """It answers otherwise where a pixel is no sixteenth, as under an attack."""
    images, labels = digits
    model = plain(images, labels)

    def guarded(x):
        whole = jnp.all(16 * x == jnp.round(16 * x), axis=(1, 2, 3))
        return jnp.where(whole[:, None], model(x), 0.0)

    fast = {**SHORT, "version": "none", "audit": 0}
    evaluate_model(model, images, labels, folder=tmp_path, **fast)
    with pytest.raises(InputError, match=r"other settings \(near.model: "):
        evaluate_model(guarded, images, labels, folder=tmp_path, **fast)


@pytest.mark.slow
def test_a_compiled_model_is_attacked_with_all_its_wrappers(digits):
    """Only jax.jit is taken off, so that weights are found; jax.vmap and a gradient of its own are kept."""
    images, labels = digits
    model, threat = plain(images, labels), ThreatModel(0.1)

    def standardised(function):
        return functools.wraps(function)(lambda x: function(4 * x - 1))

    shifted = standardised(model)
    blind = jax.custom_vjp(model)
    blind.defvjp(lambda x: (model(x), x), lambda x, _: (jnp.zeros_like(x),))
    one_by_one = jax.vmap(lambda x: model(x[None])[0])
    for function in (shifted, blind, one_by_one):
        right = np.argmax(function(images), -1)
        run = functools.partial(autoattack, threat=threat, version="apgd_ce", steps=5)
        alone, compiled = (run(f, jax.random.key(0), images, right) for f in (function, jax.jit(function)))
        assert compiled.robust["clean"].all()
        np.testing.assert_array_equal(alone.robust["apgd_ce"], compiled.robust["apgd_ce"])


@pytest.mark.slow
def test_another_model_does_not_resume_it(digits, tmp_path, monkeypatch):
    images, labels = digits
    model = plain(images, labels)
    interrupt(monkeypatch, lambda looks: len(looks) == 2)
    assert evaluate_model(model, images, labels, folder=tmp_path, **SHORT) is None
    with pytest.raises(InputError, match=r"an unfinished evaluation with other settings \(model: .* there\)"):
        evaluate_model(lambda x: -model(x), images, labels, folder=tmp_path, **SHORT)
    other = evaluate_model(lambda x: -model(x), images, labels, folder=tmp_path / "other", **SHORT)
    np.testing.assert_array_equal(other.predictions["clean"], np.argmax(-model(images), -1))


@pytest.mark.slow
def test_outcomes_of_the_ensemble_alone(digits):
    images, labels = digits
    model = plain(images, labels)
    found = autoattack(model, jax.random.key(0), images, labels, threat=THREAT, steps=10, queries=20)
    assert list(found.robust) == ["clean", "apgd_ce", "apgd_t", "fab_t", "square"]
    np.testing.assert_array_equal(found.robust["square"], np.argmax(model(found.images), -1) == labels)
    assert found.robust["square"].sum() < found.robust["clean"].sum()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"labels": np.zeros((40, 1), int)}, ValueError, r"labels have shape \[40, 1\]"),
        ({"labels": np.full(40, 0.5)}, ValueError, "labels have dtype float.*; they must be integers"),
        ({"labels": np.arange(40)}, InputError, r"labels 0\.\.39 found, but 10 classes need labels 0\.\.9"),
        ({"labels": np.zeros(40, int)}, InputError, "class 1 has no image"),
        ({"images": np.zeros((40, 8, 8, 1), np.uint8)}, ValueError, "images have dtype uint8"),
        ({"images": np.full((40, 8, 8, 1), 2.0)}, ValueError, r"images have pixels in \[2, 2\]"),
        ({"images": np.full((40, 8, 8, 1), np.nan)}, ValueError, r"images have pixels in \[nan, nan\]"),
        ({"class_counts": [1, 2]}, InputError, r"class_counts is \[2\]; it must be \[10\]"),
        ({"class_names": ["a"]}, InputError, r"class_names is \[\'a\'\]; pass a list of 10 strings"),
        ({"version": "autoatack"}, InputError, "autoatack"),
        ({"minimum_norm": "cw"}, InputError, "unknown minimum-norm attack 'cw'; use '' or one of fmn, ddn"),
        ({"minimum_norm": "ddn"}, InputError, "'ddn' is for L2, and the norm is L-infinity; use fmn"),
        ({"logits_fn": lambda x: (x, x)}, ValueError, "logits_fn returns a tuple"),
        ({"logits_fn": lambda x: x.sum((1, 2, 3))}, ValueError, r"returns float32\[2\] for 2 images"),
        ({"logits_fn": lambda x: np.asarray(x).reshape(-1, 64)}, ValueError, "write it with jax.numpy"),
        ({"logits_fn": lambda x: x if x.sum() > 0 else -x}, ValueError, "without branches on values"),
        ({"threat": 0.1}, ValueError, "threat is a float; pass robal_jax.ThreatModel"),
        ({"step_size": 0.0}, ValueError, "step_size is 0; it must be finite and > 0"),
        ({"batch_size": 0}, ValueError, "batch_size is 0; it must be at least 1"),
        ({"audit": -1}, ValueError, "audit is -1; it must be at least 0"),
        ({"audit": "all"}, ValueError, "audit is 'all'; it must be an integer"),
        ({"seed": 1.5}, ValueError, "seed is 1.5; it must be an integer"),
        ({"seed": -1}, ValueError, "seed is -1; it must be at least 0"),
        ({"seed": 2**32}, ValueError, r"seed is 4294967296; it must be in 0\.\.2\^32-1"),
        ({"batch_size": None}, ValueError, "batch_size is None; it must be an integer"),
        (
            {"images": np.zeros((40, 8, 8))},
            ValueError,
            r"images have shape \[40, 8, 8\]; they must be \[n, H, W, C\]",
        ),
        ({"images": None}, ValueError, r"images have shape \[\]"),
        ({"labels": None}, ValueError, r"labels have shape \[\]"),
        ({"class_counts": {0: 1}}, InputError, r"class_counts is \{0: 1\}; it must be \[10\]"),
        ({"class_counts": [*range(9), -5]}, InputError, "class_counts have the entry -5"),
        ({"class_counts": [1.5] * 10}, InputError, "class_counts have fractions"),
        ({"class_names": "0123456789"}, InputError, "class_names is '0123456789'; pass a list of 10 strings"),
        ({"version": 3}, InputError, "unknown ensemble 3"),
        ({"logits_fn": None}, ValueError, "logits_fn is a NoneType; pass a function"),
        (
            {"logits_fn": lambda x: x.reshape(100, 64)},
            ValueError,
            "logits_fn fails for 2 images .* any number",
        ),
        (
            {"surrogate": lambda x: x.reshape(-1, 64)[:, :9]},
            InputError,
            "surrogate has 9 classes; .* same 10",
        ),
        ({"surrogate": lambda x: x.reshape(100, 64)}, ValueError, "surrogate fails for 2 images"),
        ({"surrogate": "runs/at"}, ValueError, "surrogate is a str; pass a function"),
    ],
)
def test_what_cannot_be_evaluated_is_refused(digits, change, error, message):
    given = {"logits_fn": lambda x: x.reshape(-1, 64)[:, :10], "images": digits[0], "labels": digits[1]}
    given = {**given, **SHORT, **change}
    with pytest.raises(error, match=message):
        evaluate_model(given.pop("logits_fn"), given.pop("images"), given.pop("labels"), **given)


@pytest.mark.slow
def test_numbers_of_numpy_are_numbers(digits, tmp_path):
    model, given = plain(*digits), SHORT | {"folder": tmp_path, "version": "none", "audit": 0}
    numpy = {"threat": ThreatModel(np.float32(0.125)), "seed": np.int64(3), "step_size": np.float32(0.03125)}
    found = evaluate_model(model, *digits, **{**given, **numpy, "batch_size": np.int32(40)})
    python = {"threat": ThreatModel(0.125), "seed": 3, "step_size": 0.03125}
    same = evaluate_model(model, *digits, **{**given, **python})  # is done already
    assert found.summary == same.summary


@pytest.mark.slow
def test_a_run_predicts_integers_and_floats(run):
    images = run.test.images[:7]
    logits = run.logits(images)
    np.testing.assert_array_equal(run.logits(images / np.float32(16)), logits)
    np.testing.assert_allclose(run.logits_fn(images / np.float32(16)), logits, atol=1e-5)
    with pytest.raises(ValueError, match="images have dtype uint8; pass floats in"):
        run.logits_fn(images)
    assert isinstance(logits, np.ndarray)
    assert logits.shape == (7, 10)
    for wrong in (images[:, :-1], images[0], None, images.repeat(3, -1)):
        with pytest.raises(ValueError, match=r"images have shape .*; pass \(n, 8, 8, 1\)"):
            run.logits(wrong)
    with pytest.raises(
        ValueError, match=r"there are no images: they have shape \(0, 8, 8, 1\); pass at least"
    ):
        run.logits(images[:0])
    for wrong in (images * 1.0, images + 100, images.astype(int) - 17, images * np.nan, images / 16 - 0.01):
        with pytest.raises(
            ValueError, match=r"have pixels in .*; pass floats in \[0, 1\], or integers in 0\.\.16"
        ):
            run.logits(wrong)
    for wrong in (images > 8, images.astype(str), images * 1j):
        with pytest.raises(ValueError, match=r"images have dtype .*; pass floats in"):
            run.logits(wrong)
    assert run.config["method"] == "RoBal-N"
    assert run.params["classifier"]["weight"].shape == (10, 8)


# ---------------------------------------------------------------- names


def test_every_public_name_is_there():
    for name in robal_jax.__all__:
        assert getattr(robal_jax, name) is not None
        assert name in dir(robal_jax)
    with pytest.raises(AttributeError, match="has no attribute 'no_such_name'"):
        _ = robal_jax.no_such_name


def test_type_checkers_see_the_same_names():
    tree = ast.parse(pathlib.Path(robal_jax.__file__).read_text())
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    seen = {alias.name: node.module.removeprefix("robal_jax.") for node in block.body for alias in node.names}
    assert seen == robal_jax._NAMES


@pytest.mark.slow
def test_rooms_are_found_without_importing_them():
    code = (
        "import sys, robal_jax\n"
        "assert 'jax' not in sys.modules\n"
        "robal_jax.attacks.pgd, robal_jax.losses.robal, robal_jax.ThreatModel\n"
        "assert 'matplotlib' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


TRACERS = {
    "jit": jax.jit,
    "grad": jax.grad,
    "vmap": lambda function: lambda weight: jax.vmap(function)(weight[None]),
}


@pytest.mark.parametrize("tracer", TRACERS)
@pytest.mark.parametrize("what", ["images", "weights"])
def test_a_call_inside_of_jax_is_one_error(tracer, what):
    images, labels = np.random.RandomState(0).rand(6, 2, 2, 1).astype(np.float32), np.arange(6) % 2

    def traced(weight):
        shown = images * weight[0, 0] if what == "images" else images
        model = lambda x: x.reshape(-1, 4) @ weight  # noqa: E731
        evaluate_model(model, shown, labels, threat=ThreatModel(0.1), version="none", audit=0)
        return weight.sum()

    with pytest.raises(ValueError, match=r"(is called inside of|call this outside of) jax\.jit"):
        TRACERS[tracer](traced)(jnp.ones((4, 2)))
