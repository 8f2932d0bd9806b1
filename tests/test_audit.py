"""Each fault is flagged by its own check, and an honest model by none (robal_jax.evaluation.verdicts)."""

import json
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from robal_jax import metrics
from robal_jax.attacks import NORMS, ThreatModel
from robal_jax.evaluation import measurements, verdicts
from robal_jax.evaluation.victim import Victim
from robal_jax.reporting.curves import curves_figure
from robal_jax.reporting.results import EVERYTHING, FIXED_STEPS, Results

# ---------------------------------------------------------------- judging what was measured by hand

N, CLASSES = 600, 5
LABELS = np.arange(N) % CLASSES


def first(count):
    """The first so many images are right."""
    return np.arange(N) < count


def healthy():
    """What an honest model would give: 480 images right when clean, 300 under PGD-20."""
    rng = np.random.RandomState(0)
    logits = rng.uniform(-1, 1, (N, CLASSES)).astype(np.float32)
    called = np.where(first(480), LABELS, (LABELS + 1) % CLASSES)
    logits[np.arange(N), called] = 3
    looks = {f"forward_{number}": {"logits": logits.copy()} for number in range(measurements.FORWARDS)}
    looks["forward_0"]["gradient"] = rng.uniform(0.01, 1, N)
    left = {1: 360, 2: 340, 5: 320, 10: 303}
    main = np.stack([first(300)] * len(measurements.STEPS), 1)
    right = {
        "steps": np.stack([first(left.get(count, 300 - count // 500)) for count in measurements.STEPS], 1),
        "unbounded": first(6),  # 1 %
        # Less than clean; and a random search repairs some of what was wrong.
        "gradient_free": first(400) | ~first(590),
        "transfer": first(420),
    }
    for number, scale in enumerate(measurements.SCALES):
        right[f"scale_{scale:g}"] = main & first(295 if scale == 3 else 300 + number)[:, None]
    for number in range(1, measurements.RESTARTS):  # one image more in each of the first four
        right[f"restart_{number}"] = main & (np.arange(N) != number % 5)[:, None]
    return {
        **looks,
        "backwards": {"logits": logits.copy()},
        "inference": {"calls": np.zeros(N, int)},
        **{name: {"right": values} for name, values in right.items()},
    }


def judged(measured, survived=None, by_square=None):
    """The verdicts by name, and the curves."""
    survived = first(280) if survived is None else survived
    # Square breaks one image that no other attack breaks, and many that were broken.
    by_square = ~first(280) | first(1) if by_square is None else by_square
    found, curves = verdicts.give_verdicts(measured, LABELS, survived, by_square)
    assert json.loads(json.dumps([v._asdict() for v in found], allow_nan=False))
    assert json.loads(json.dumps(curves, allow_nan=False))
    assert all(v.flagged in (True, False, None) and v.title and v.statement.endswith(".") for v in found)
    by_name = {verdict.name: verdict for verdict in found}
    assert len(by_name) == len(found)
    return by_name, curves


def flagged(found):
    return [name for name, verdict in found.items() if verdict.flagged]


NAMES = (
    "logit_scale", "steps", "restarts", "zero_gradients", "unbounded", "gradient_free", "square", "transfer",
    "randomised", "probabilities", "inference",
)  # fmt: skip


def test_an_honest_model_is_not_flagged():
    found, _ = judged(healthy())
    assert tuple(found) == NAMES
    assert flagged(found) == []
    assert all(verdict.flagged is False for verdict in found.values())


def test_checks_that_cast_doubt_on_everything():
    found, _ = judged(healthy())
    everything = {"square", "randomised", "probabilities", "inference"}
    for name, verdict in found.items():
        assert verdict.doubts == (EVERYTHING if name in everything else FIXED_STEPS)


def replaced(name, field, change):
    """A fault: one array is another one."""

    def fault(measured):
        measured[name][field] = change(measured[name][field].copy())

    return fault


def column(number, right):
    """One column is another one."""

    def change(values):
        values[:, number] = right
        return values

    return change


def one_by_one(measured):
    """Each restart breaks two other images, which alone would not count."""
    for number in range(1, measurements.RESTARTS):
        measured[f"restart_{number}"]["right"][20 * number : 20 * number + 2] = False


def almost_level(measured):
    """Two passes differ by next to nothing, but on the other side of a tie."""
    for number in range(measurements.FORWARDS):
        logits = measured[f"forward_{number}"]["logits"]
        logits[0, 1] = logits[0, 0] + np.float32(-1e-6 if number < 4 else 1e-6)
    measured["backwards"]["logits"] = measured["forward_0"]["logits"]


def as_probabilities(measured):
    for arrays in measured.values():
        if "logits" in arrays:
            arrays["logits"] = np.asarray(jax.nn.softmax(arrays["logits"]))


def one_is_zero(gradient):
    gradient[5] = 0
    return gradient


last_step = len(measurements.STEPS) - 1
FAULTS = {
    "zero gradient of one image": ("zero_gradients", replaced("forward_0", "gradient", one_is_zero)),
    "large scale": ("logit_scale", replaced("scale_0.01", "right", lambda r: r & first(270)[:, None])),
    "small scale": ("logit_scale", replaced("scale_100", "right", lambda r: r & first(270)[:, None])),
    "more steps": ("steps", replaced("steps", "right", column(last_step, first(280)))),
    "one step": ("steps", replaced("steps", "right", column(0, first(280)))),
    "more restarts": ("restarts", one_by_one),
    "unbounded": ("unbounded", replaced("unbounded", "right", lambda _: first(7))),
    # As many are right under both, but of these Square has only repaired some.
    "square beats PGD": (
        "gradient_free",
        replaced("gradient_free", "right", lambda _: first(280) | ~first(580)),
    ),
    "transfer": ("transfer", replaced("transfer", "right", lambda _: first(280))),
    "random": ("randomised", replaced("forward_3", "logits", lambda z: z + np.float32(1e-3))),
    "random in the last place": ("randomised", almost_level),
    "probabilities": ("probabilities", as_probabilities),
    "derivatives": ("inference", replaced("inference", "calls", lambda calls: calls + 1)),
    "batch": ("inference", replaced("backwards", "logits", lambda z: z + np.float32(1e-3))),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_flagged_by_its_own_check_alone(fault):
    name, commit = FAULTS[fault]
    measured = healthy()
    commit(measured)
    found, _ = judged(measured)
    assert flagged(found) == [name]
    assert found[name].statement != judged(healthy())[0][name].statement


def test_statements_say_what_was_measured():
    found, _ = judged(healthy())
    said = {name: verdict.statement for name, verdict in found.items()}
    assert "50.0 % at the model's own logit scale and lowest, 49.2 %, at 3 times that" in said["logit_scale"]
    assert "60.0 % after one step, 50.0 % after 20 steps and 49.7 % after 1000: 20 steps are" in said["steps"]
    assert "50.0 % with one start and 49.2 % with 10 starts: one start is enough." in said["restarts"]
    assert "zero for 0 of 600" in said["zero_gradients"]
    assert "without a bound is 1.0 %" in said["unbounded"]
    assert "66.7 % under 1000 queries of Square" in said["gradient_free"]
    assert "breaks 1 of the 280 images (of 600)" in said["square"]
    assert "70.0 % on images made on the surrogate and 50.0 % under PGD-20" in said["transfer"]
    measured = healthy()
    FAULTS["one step"][1](measured)
    assert "one step is stronger than many" in judged(measured)[0]["steps"].statement
    measured = healthy()
    FAULTS["more steps"][1](measured)
    assert "20 steps are not enough" in judged(measured)[0]["steps"].statement


def test_curves_are_what_the_report_draws():
    _, curves = judged(healthy())
    assert {name: curve["x"] for name, curve in curves.items()} == {
        "scale": list(measurements.SCALES),
        "steps": list(measurements.STEPS),
        "restarts": list(range(1, measurements.RESTARTS + 1)),
    }
    counts = {
        "scale": ("PGD-20", [300] * 5 + [295] + [300] * 3),
        "steps": ("PGD", [360, 340, 320, 303, 300, 300, 300, 300, 299, 298]),
        "restarts": ("PGD-20", [300, 299, 298, 297, 296, 295, 295, 295, 295, 295]),
    }
    for name, (series, right) in counts.items():
        assert curves[name]["series"] == {series: [metrics.share(first(count)) for count in right]}
    results = Results({"method": "a method", "dataset": "a data set"}, {}, {"curves": curves})
    assert len(curves_figure(results).axes) == 3


def test_no_surrogate_is_no_verdict():
    measured = healthy()
    del measured["transfer"]
    found, _ = judged(measured)
    assert found["transfer"].flagged is None
    assert "--surrogate" in found["transfer"].statement
    assert flagged(found) == []


@pytest.mark.parametrize(
    ("images", "broken", "expected"),
    [(100, 1, False), (100, 2, True), (600, 2, True), (2000, 4, False), (2000, 5, True)],
)
def test_square_after_all_others_may_break_one_image_or_two_in_a_thousand(images, broken, expected):
    survived = np.arange(images) < images // 2
    by_square = (np.arange(images) < broken) | ~survived
    found, _ = judged(healthy(), survived, by_square)
    assert flagged(found) == ["square"] * expected
    assert found["square"].evidence == {"broken": broken, "survived": images // 2, "images": images}


@pytest.mark.parametrize(
    ("n", "lost", "gained", "expected"),
    [
        (600, 20, 0, True),
        (600, 0, 20, False),  # the other one is stronger
        (600, 7, 0, True),
        (600, 6, 0, False),  # a point
        (2000, 15, 0, False),  # beyond doubt, and less than a point
        (100, 3, 0, False),  # three points that may be chance
        (600, 40, 25, False),
        (600, 60, 25, True),
    ],
)
def test_a_small_or_doubtful_gap_does_not_count(n, lost, gained, expected):
    than = np.arange(n) >= gained
    attack = (np.arange(n) < gained) | ((np.arange(n) >= gained + lost) & than)
    stronger, gap = verdicts._stronger(attack, than)
    assert stronger is expected
    assert gap["value"] == pytest.approx((lost - gained) / n)


@pytest.mark.parametrize("differ", [0, 1])
def test_stored_images(differ):
    reported = first(300)
    computed = reported.copy()
    computed[599] ^= differ
    distance = np.linspace(0, 0.1, N)
    found = verdicts.stored_images(reported, computed, distance, 0.1)
    assert (found.name, found.flagged) == ("stored_images", bool(differ))
    accuracy = (300 - differ) / N
    assert found.evidence == {"accuracy": pytest.approx(accuracy), "differ": differ, "distance": 0.1}
    assert f"is {100 * accuracy:.1f} %; reported is 50.0 %. Images that differ: {differ}." in found.statement
    assert found.doubts == EVERYTHING
    json.dumps(found._asdict(), allow_nan=False)


# ---------------------------------------------------------------- derivatives that a model asks for


def flat(x):
    return x.reshape(len(x), -1)


def energy(x):
    return jnp.sum(jnp.sin(x))


made_before = jax.grad(energy)
compiled_before = jax.jit(jax.value_and_grad(energy))
PLAIN = {
    "linear": flat,
    "relu": lambda x: jax.nn.relu(flat(x)),
    "jit": jax.jit(flat),
    "remat": jax.checkpoint(flat),
    "loop": lambda x: jax.lax.fori_loop(0, 3, lambda _, z: jnp.sin(z), flat(x)),
}
ADAPTIVE = {
    "grad": lambda x: flat(x - jax.grad(energy)(x)),
    "grad made before": lambda x: flat(x - made_before(x)),
    "value_and_grad": lambda x: flat(x - jax.value_and_grad(energy)(x)[1]),
    "vjp": lambda x: flat(x - jax.vjp(energy, x)[1](1.0)[0]),
    "jvp": lambda x: flat(x - jax.jvp(jnp.sin, (x,), (x,))[1]),
    "jacfwd": lambda x: flat(x) + jax.jacfwd(energy)(x).sum(),
    "linearize": lambda x: flat(x - jax.linearize(jnp.sin, x)[1](x)),
    "jit": jax.jit(lambda x: flat(x - jax.grad(energy)(x))),
    "jit in jit": jax.jit(lambda x: flat(x - compiled_before(x)[1])),
    "loop": lambda x: flat(jax.lax.fori_loop(0, 3, lambda _, z: z - made_before(z), x)),
}
ONE = np.zeros((1, 2, 2, 1), np.uint8)


@pytest.mark.parametrize("name", PLAIN)
def test_a_plain_model_asks_for_no_derivative(name):
    assert measurements.gradient_calls(PLAIN[name], ONE) == 0


@pytest.mark.parametrize("name", ADAPTIVE)
def test_a_model_that_adapts_asks_for_derivatives(name):
    compiled_before(jnp.zeros(ONE.shape))
    ADAPTIVE[name](jnp.zeros(ONE.shape))
    # What has been traced before, here or by someone else, counts as well.
    assert [measurements.gradient_calls(ADAPTIVE[name], ONE) for _ in range(2)] == [1, 1]


def test_counting_leaves_the_profiler_as_it_was():
    mine = lambda *_: None  # noqa: E731
    before = sys.getprofile()
    sys.setprofile(mine)
    try:
        with pytest.raises(ZeroDivisionError):
            measurements.gradient_calls(lambda x: 1 // 0, ONE)
        kept = sys.getprofile()
    finally:
        sys.setprofile(before)
    assert kept is mine


# ---------------------------------------------------------------- from a model to the verdicts

SHAPE, KINDS = (4, 4, 1), 4
SIZE, BATCH = 110, 16
THREAT = ThreatModel(0.15)
STEP_SIZE = 0.04
SAMPLE = np.sort(np.random.RandomState(2).permutation(SIZE)[:101])  # no multiple of the batch
TRACES = []


def nearest_mean(params, stats, images):
    """``z_k = -c ||x - mu_k||^2``."""
    del stats
    TRACES.append(images.shape)
    apart = images[:, None] - params["means"][None]
    return -params["scale"] * jnp.square(apart).sum((2, 3, 4))


def data():
    """Images around four means, and the means."""
    rng = np.random.RandomState(1)
    means = rng.uniform(0.2, 0.8, (KINDS, *SHAPE)).astype(np.float32)
    labels = rng.randint(0, KINDS, SIZE)
    images = np.clip(means[labels] + 0.15 * rng.randn(SIZE, *SHAPE), 0, 1)
    return (255 * images).round().astype(np.uint8), labels, means


def victim(predict=nearest_mean, scale=5.0, shift=0.0):
    """Prototypes, or such as are a little elsewhere."""
    images, labels, means = data()
    means = means + np.float32(shift) * np.random.RandomState(3).randn(*means.shape).astype(np.float32)
    return Victim(
        predict, {"means": means, "scale": np.float32(scale)}, (), images, labels,
        pixel_max=255, seed=0, batch_size=BATCH, layout="jit",
    )  # fmt: skip


def plans(model, surrogate=None):
    return measurements.plan_measurements(
        model, SAMPLE, threat=THREAT, step_size=STEP_SIZE, surrogate=surrogate
    )


@pytest.fixture(scope="module")
def measured():
    """What is measured of an honest model and of one whose logits are 1000 times as large."""
    honest, hidden = victim(), victim(scale=5000.0)
    return {
        "honest": {name: measure() for name, measure in plans(honest, victim(shift=0.05)).items()},
        "hidden": {name: measure() for name, measure in plans(hidden, honest).items()},
    }


def judged_model(measured):
    _, labels, _ = data()
    labels = labels[SAMPLE]
    survived = measured["steps"]["right"].all(1)
    by_square = ~measured["gradient_free"]["right"]
    found, curves = verdicts.give_verdicts(measured, labels, survived, by_square)
    json.dumps([[verdict._asdict() for verdict in found], curves], allow_nan=False)
    return {verdict.name: verdict for verdict in found}


def test_nothing_is_measured_before_it_is_called_for():
    before = len(TRACES)
    some = plans(victim())
    assert len(TRACES) == before
    assert "transfer" not in some
    assert "transfer" in plans(victim(), victim())


def test_arrays_are_of_the_sample(measured):
    images, labels, means = data()
    honest = measured["honest"]
    for arrays in measured["honest"].values():
        for values in arrays.values():
            assert len(values) == len(SAMPLE)
    apart = np.float64(images[SAMPLE][:, None] / 255) - means[None]
    logits = -5 * np.square(apart).sum((2, 3, 4))
    for name in ("forward_0", "forward_4", "backwards"):
        np.testing.assert_allclose(honest[name]["logits"], logits, rtol=1e-4, atol=1e-5)
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    error = p - np.eye(KINDS)[labels[SAMPLE]]
    gradient = np.abs((error[:, :, None, None, None] * -10 * apart).sum(1)).sum((1, 2, 3))
    np.testing.assert_allclose(honest["forward_0"]["gradient"], gradient, rtol=1e-4)
    assert honest["steps"]["right"].shape == (len(SAMPLE), len(measurements.STEPS))
    main = measurements.STEPS.index(measurements.MAIN_STEPS)
    np.testing.assert_array_equal(honest["scale_1"]["right"][:, 0], honest["steps"]["right"][:, main])


def test_an_honest_model_passes_every_check(measured):
    found = judged_model(measured["honest"])
    assert flagged(found) == []
    assert all(verdict.flagged is False for verdict in found.values())
    clean = measured["honest"]["forward_0"]["logits"].argmax(1) == data()[1][SAMPLE]
    robust = measured["honest"]["scale_1"]["right"][:, 0]
    assert clean.mean() > 0.9
    assert 0.05 < robust.mean() < clean.mean() - 0.2  # so that the checks have something to compare


def test_large_logits_are_no_robustness(measured):
    found = judged_model(measured["hidden"])
    expected = {"logit_scale", "zero_gradients", "unbounded", "gradient_free", "transfer"}
    assert expected <= set(flagged(found))
    assert not {"randomised", "probabilities", "inference"} & set(flagged(found))
    own, honest = (measured[name]["scale_1"]["right"].mean() for name in ("hidden", "honest"))
    assert own > honest + 0.3
    # 1000 times a hundredth is 10 times, but for rounding.
    same = measured["hidden"]["scale_0.01"]["right"] == measured["honest"]["scale_10"]["right"]
    assert same.mean() > 0.97
    # The surrogate is the honest model, so what it is misled by misleads this one.
    same = measured["hidden"]["transfer"]["right"] == measured["honest"]["scale_1"]["right"][:, 0]
    assert same.mean() > 0.9


def looked_at(predict, measured):
    """What of a model needs no attack, and the honest model's rest."""
    some = plans(victim(predict))
    names = [name for name in some if "logits" in measured[name] or name == "inference"]
    return judged_model({**measured, **{name: some[name]() for name in names}})


def probabilities(params, stats, images):
    return jax.nn.softmax(nearest_mean(params, stats, images))


def batch_normalised(params, stats, images):
    return nearest_mean(params, stats, images - 0.1 * images.mean(0, keepdims=True))


def purified(params, stats, images):
    def confidence(x):
        return jax.nn.log_softmax(nearest_mean(params, stats, x)).max(-1).sum()

    return nearest_mean(params, stats, images + 0.01 * jax.grad(confidence)(images))


@pytest.mark.parametrize(
    ("predict", "name"),
    [(probabilities, "probabilities"), (batch_normalised, "inference"), (purified, "inference")],
)
def test_a_model_that_is_no_plain_network(measured, predict, name):
    found = looked_at(predict, measured["honest"])
    assert flagged(found) == [name]
    assert found["inference"].evidence["calls"] == (predict is purified)


# ---------------------------------------------------------------- single measurements


def linear(x):
    """Logits of two classes, by the mean of the image."""
    mean = x.mean((1, 2, 3)) - 0.5
    return jnp.stack([mean, -mean], 1)


def few(count=8):
    images = jnp.asarray(np.random.RandomState(4).uniform(0.45, 0.55, (count, *SHAPE)), jnp.float32)
    return jax.random.split(jax.random.key(5), count), images, linear(images).argmax(-1)


def test_probe_looks_after_each_number_of_steps_with_scale_and_start():
    def blind(x):
        return jax.lax.stop_gradient(linear(x))

    @partial(jax.jit, static_argnames="logits_fn")
    def probe(logits_fn, scale, restart):
        steps = np.array([1, 2, 40])
        settings = {"threat": ThreatModel(0.3), "step_size": 0.02, "steps": steps}
        return measurements.probe(logits_fn, *few(64), scale=scale, restart=restart, **settings)["right"]

    found = probe(linear, 1.0, 0)
    assert found.shape == (64, 3)
    assert found[:, 0].mean() > found[:, 1].mean() > found[:, 2].mean() == 0
    # A model without a gradient shows only where the attack starts.
    starts = [probe(blind, 1.0, restart) for restart in (0, 1, 0)]
    np.testing.assert_array_equal(starts[0], starts[2])
    assert 0.1 < (starts[0] != starts[1]).mean() < 0.9
    np.testing.assert_array_equal(starts[0], starts[0][:, :1].repeat(3, 1))
    # The attack sees the logits scaled, the judge sees them as they are.
    assert probe(linear, -1.0, 0)[:, 2].all()


@pytest.mark.parametrize("norm", NORMS)
def test_an_attack_without_a_bound_may_show_any_image(norm):
    keys, images, _ = few()
    images, labels = images.at[:4].set(1.0).at[4:].set(0.0), jnp.array([0] * 4 + [1] * 4)
    right = jax.jit(partial(measurements.unbounded, linear, norm=norm))(keys, images, labels)["right"]
    assert not right.any()


def test_square_and_shown_and_crafted():
    keys, images, labels = few()
    threat = ThreatModel(0.2)
    attack = jax.jit(partial(measurements.crafted, linear, threat=threat, step_size=0.05))
    made = attack(keys, images, labels)["images"]
    assert np.abs(made - images).max() == pytest.approx(0.2, abs=1e-6)
    assert measurements.shown(linear, keys, images, labels, images)["right"].all()
    assert not measurements.shown(linear, keys, images, labels, made)["right"].any()
    search = jax.jit(partial(measurements.gradient_free, linear), static_argnames=("threat", "queries"))
    assert not search(keys, images, labels, threat=threat, queries=50)["right"].any()
    assert search(keys, images, labels, threat=ThreatModel(1e-5), queries=5)["right"].all()
