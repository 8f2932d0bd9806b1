"""Schedules worked by hand, and SGD against PyTorch's rule in NumPy (robal_jax.optimizers)."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from robal_jax import optimizers
from robal_jax.errors import InputError

RATES = [
    # name, keywords, rates of the epochs 1, 2, ...
    ("paper", {}, [0.1, 0.1, 0.1]),
    ("paper", {"milestones": (3, 5)}, [0.1, 0.1, 0.01, 0.01, 0.001]),
    ("paper", {"milestones": (2,), "decay": 0.5}, [0.1, 0.05, 0.05]),
    ("paper", {"warmup": 4}, [0.05, 0.075, 0.1, 0.1]),  # (e + 1) / 4
    ("paper", {"warmup": 4, "milestones": (2,)}, [0.05, 0.0075, 0.01, 0.01]),
    ("paper", {"milestones": (3,), "first_epoch": 3}, [0.01, 0.01]),
    ("released", {"milestones": (3,)}, [0.1, 0.1, 0.01, 0.001, 0.0001]),  # decays again in every epoch
    ("released", {"milestones": (2, 3)}, [0.1, 0.01, 0.0001, 0.000001]),
    ("released", {"warmup": 4}, [0.05, 0.0375, 0.0375, 0.0375]),  # never reaches lr
    ("released", {"milestones": (3,), "first_epoch": 3}, [0.01, 0.001]),
]


@pytest.mark.parametrize(("name", "keywords", "expected"), RATES)
def test_learning_rates(name, keywords, expected):
    rates = optimizers.SCHEDULES[name](lr=0.1, epochs=len(expected), **keywords)
    assert rates.dtype == np.float64
    np.testing.assert_allclose(rates, expected, rtol=1e-12)


def test_the_rates_of_at_bsl_are_absolute():
    rates = optimizers.SCHEDULES["paper"](lr=0.1, epochs=100, milestones=(75, 90, 100))
    np.testing.assert_allclose(rates, [0.1] * 74 + [0.01] * 15 + [0.001] * 10 + [0.0001], rtol=1e-12)


@pytest.mark.parametrize("steps", [1, 3, 97])
def test_the_rates_of_awp_follow_the_fraction_of_an_epoch(steps):
    """The released loop asks for the rate at (epoch from 0) + (step from 0, + 1) / steps."""
    expected = [
        0.1 if at < 100 else 0.01 if at < 150 else 0.001
        for at in (epoch + (step + 1) / steps for epoch in range(200) for step in range(steps))
    ]
    rates = optimizers.piecewise(lr=0.1, epochs=200, steps_per_epoch=steps, milestones=(100, 150))
    np.testing.assert_allclose(rates, expected, rtol=1e-12)


def test_a_piecewise_rate_grows_by_step():
    rates = optimizers.piecewise(lr=1.0, epochs=3, steps_per_epoch=2, milestones=(2,), warmup=2)
    np.testing.assert_allclose(rates, [0.25, 0.5, 0.75, 0.1, 0.1, 0.1], rtol=1e-12)


def numpy_cosine(total, ramp, start, final):
    rates = []
    for t in range(total):
        if t < ramp:
            rates.append(start + (1 - start) * t / ramp)
        else:
            angle = np.pi * (t - ramp) / (total - ramp)
            rates.append(final + (1 - final) * (1 + np.cos(angle)) / 2)
    return np.array(rates)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("by", optimizers.BY)
@pytest.mark.parametrize(("warmup", "start", "final"), [(0, 0.0, 0.0), (2, 0.0, 0.0), (5, 0.2, 0.01)])
def test_cosine(by, warmup, start, final):
    epochs, steps = 20, 3
    rates = optimizers.cosine(
        lr=0.4, epochs=epochs, steps_per_epoch=steps, warmup=warmup, start=start, final=final, by=by
    )
    each = 1 if by == "epoch" else steps
    expected = 0.4 * numpy_cosine(epochs * each, warmup * each, start, final)
    np.testing.assert_allclose(rates, np.repeat(expected, steps // each), rtol=1e-12, atol=1e-15)


def torch_one_cycle(total, lr, pct_start, div_factor, final_div_factor):
    """torch.optim.lr_scheduler.OneCycleLR, two phases, anneal_strategy 'cos': the rates of all steps."""
    first, last = lr / div_factor, lr / div_factor / final_div_factor
    phases = [(pct_start * total - 1, first, lr), (total - 1, lr, last)]
    rates = []
    for step in range(total):
        begin = 0.0
        for end, low, high in phases:
            if step <= end:
                part = (step - begin) / (end - begin)
                rates.append(high + (low - high) / 2.0 * (np.cos(np.pi * part) + 1))
                break
            begin = end
    return np.array(rates)


CYCLES = [(400, 0.025), (100, 0.3), (10, 0.25), (7, 0.5), (1000, 0.0015)]


@pytest.mark.parametrize(("total", "pct_start"), CYCLES)
@pytest.mark.parametrize(("div", "final"), [(25.0, 1e4), (10.0, 100.0)])
def test_one_cycle_is_pytorch_s(total, pct_start, div, final):
    keywords = {"pct_start": pct_start, "div_factor": div, "final_div_factor": final}
    expected = torch_one_cycle(total, 0.2, *keywords.values())
    for epochs, steps, by in ((1, total, "step"), (total, 1, "step"), (total, 1, "epoch")):
        rates = optimizers.one_cycle(lr=0.2, epochs=epochs, steps_per_epoch=steps, by=by, **keywords)
        np.testing.assert_allclose(rates, expected, rtol=1e-9)
    repeated = optimizers.one_cycle(lr=0.2, epochs=total, steps_per_epoch=2, by="epoch", **keywords)
    np.testing.assert_allclose(repeated, np.repeat(expected, 2), rtol=1e-9)


@pytest.mark.slow
@pytest.mark.usefixtures("float64")
def test_optax_s_one_cycle_is_pytorch_s_if_the_peak_is_at_a_step():
    for total, pct_start, same in ((400, 0.025, True), (10, 0.25, False)):
        rates = optimizers.one_cycle(lr=0.2, epochs=total, steps_per_epoch=1, pct_start=pct_start)
        optax_s = jax.vmap(optax.cosine_onecycle_schedule(total - 1, 0.2, pct_start))(np.arange(total))
        assert np.allclose(rates, optax_s, rtol=1e-9) == same


def test_a_run_of_one_step():
    for schedule in (optimizers.cosine, optimizers.piecewise):
        np.testing.assert_allclose(schedule(lr=0.2, epochs=1, steps_per_epoch=1), [0.2], rtol=1e-6)
    assert np.isfinite(optimizers.one_cycle(lr=0.2, epochs=1, steps_per_epoch=1)).all()


@pytest.mark.parametrize(
    ("name", "keywords", "message"),
    [
        ("cosine", {"by": "steps"}, "by is 'steps'; use one of step, epoch"),
        ("cosine", {"warmup": 4}, "warmup is 4 epochs of 4; give fewer"),
        ("cosine", {"warmup": -1}, "warmup is -1 epochs"),
        ("one_cycle", {"by": ""}, "by is ''; use one of"),
        ("one_cycle", {"pct_start": 1.0}, r"pct_start is 1; it must be in \(0, 1\)"),
        ("one_cycle", {"div_factor": 0.0}, "div_factor is 0; it must be > 0"),
        ("one_cycle", {"final_div_factor": -2.0}, "final_div_factor is -2"),
    ],
)
def test_keywords_of_schedules_that_are_refused(name, keywords, message):
    with pytest.raises(InputError, match=message):
        optimizers.SCHEDULES[name](lr=0.1, epochs=4, steps_per_epoch=2, **keywords)


def test_per_step():
    schedule = optimizers.per_step(np.array([0.5, 0.25, 0.125]), steps_per_epoch=2)
    expected = [0.5, 0.5, 0.25, 0.25, 0.125, 0.125, 0.125, 0.125]  # the last one stays
    assert [float(schedule(step)) for step in range(8)] == expected
    assert [float(jax.jit(schedule)(jnp.int32(step))) for step in range(8)] == expected


def numpy_sgd(params, gradients, rates, momentum, weight_decay, clip_norm, nesterov=False, decayed="all"):
    """torch.nn.utils.clip_grad_norm_, then torch.optim.SGD (dampening 0), in float64."""
    params = {name: np.float64(p) for name, p in params.items()}
    velocity = {name: np.zeros_like(p) for name, p in params.items()}
    for gradient, lr in zip(gradients, rates, strict=True):
        norm = np.sqrt(sum((np.float64(g) ** 2).sum() for g in gradient.values()))
        shrink = clip_norm / norm if clip_norm and norm > clip_norm else 1.0
        for name, p in params.items():
            decay = weight_decay if decayed != "weights" or p.ndim > 1 else 0.0
            g = shrink * np.float64(gradient[name]) + decay * p
            velocity[name] = momentum * velocity[name] + g
            params[name] = p - lr * (g + momentum * velocity[name] if nesterov else velocity[name])
    return params


@pytest.mark.parametrize("clip_norm", [0.0, 1.0, 100.0])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_sgd_is_pytorch_s(momentum, weight_decay, clip_norm):
    assert_pytorch_s(momentum=momentum, weight_decay=weight_decay, clip_norm=clip_norm)


@pytest.mark.parametrize("decayed", optimizers.DECAYED)
@pytest.mark.parametrize("nesterov", [False, True])
def test_nesterov_and_the_choice_of_what_decays_are_pytorch_s(nesterov, decayed):
    assert_pytorch_s(momentum=0.9, weight_decay=0.1, clip_norm=0.0, nesterov=nesterov, decayed=decayed)


def assert_pytorch_s(**settings):
    rng = np.random.RandomState(0)

    def draw():
        return {"weight": rng.randn(3, 4).astype(np.float32), "bias": rng.randn(4).astype(np.float32)}

    start, gradients, rates = draw(), [draw() for _ in range(5)], np.array([0.1, 0.1, 0.01, 0.01, 0.001])
    optimizer = optimizers.sgd(optimizers.per_step(rates, 1), **settings)
    params = jax.tree.map(jnp.asarray, start)
    opt_state = optimizer.init(params)
    for gradient in gradients:
        updates, opt_state = optimizer.update(gradient, opt_state, params)
        params = optax.apply_updates(params, updates)
    expected = numpy_sgd(start, gradients, rates, **settings)
    for name, value in params.items():  # 5 updates of numbers near 1 in float32
        np.testing.assert_allclose(value, expected[name], rtol=1e-5, atol=1e-6)


def test_weight_decay_that_spares_batch_norm_only():
    params = {"bn": {"scale": jnp.ones(2), "bias": jnp.ones(2)}, "fc": {"kernel": jnp.ones((2, 2))}}
    params["fc"]["bias"] = jnp.ones(2)
    optimizer = optimizers.sgd(lambda step: 1.0, weight_decay=0.1, decayed="not_batch_norm")
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = optimizer.update(zeros, optimizer.init(params), params)
    moved = {name: bool(np.any(x)) for name, x in jax.tree_util.tree_leaves_with_path(updates)}
    assert [moved[path] for path, _ in jax.tree_util.tree_leaves_with_path(params)] == [0, 0, 1, 1]


def test_weight_decay_reaches_biases():
    params = {"bias": jnp.ones(3)}
    optimizer = optimizers.sgd(optax.constant_schedule(0.5), weight_decay=0.1)
    updates, _ = optimizer.update({"bias": jnp.zeros(3)}, optimizer.init(params), params)
    np.testing.assert_allclose(updates["bias"], -0.05, rtol=1e-6)


def test_the_neutral_settings_have_the_state_that_they_had():
    params = {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(3)}
    state = optimizers.sgd(optax.constant_schedule(0.1), nesterov=False, decayed="all").init(params)
    before = optax.chain(
        optax.add_decayed_weights(2e-4), optax.trace(0.9), optax.scale_by_learning_rate(lambda step: 0.1)
    ).init(params)
    assert jax.tree.structure(state) == jax.tree.structure(before)
    others = optimizers.sgd(optax.constant_schedule(0.1), nesterov=True, decayed="weights").init(params)
    assert [x.shape for x in jax.tree.leaves(others)] == [x.shape for x in jax.tree.leaves(state)]


def test_only_the_weight_decay_sees_the_parameters():
    """What an update at perturbed weights needs: gradient and momentum do not look at them."""
    params = {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(3)}
    gradient = jax.tree.map(lambda x: 0.5 * x, params)
    for settings in (
        {"momentum": 0.0},
        {"nesterov": True, "decayed": "weights"},
        {"momentum": 0.0, "clip_norm": 0.1, "trainable": "kernel"},
    ):
        optimizer = optimizers.sgd(optax.constant_schedule(1.0), weight_decay=0.1, **settings)
        factor = 1.9 if "nesterov" in settings else 1.0  # g + 0.9 v, and v = g at first
        state = optimizer.init(params)
        here, _ = optimizer.update(gradient, state, params)
        there, _ = optimizer.update(gradient, state, jax.tree.map(lambda x: x + 2.0, params))
        moved = jax.tree.map(lambda a, b: b - a, here, there)
        np.testing.assert_allclose(moved["kernel"], -0.2 * factor, rtol=1e-5)
        np.testing.assert_allclose(moved["bias"], -0.2 if len(settings) == 1 else 0.0, rtol=1e-5, atol=1e-7)


SHAPES = {"backbone/conv/kernel": (3, 4), "classifier/weight": (4, 2), "classifier/bias": (2,)}
TRAINABLE = [
    ("classifier", ["classifier/weight", "classifier/bias"]),
    ("classifier/bias", ["classifier/bias"]),
    (".*(kernel|bias)$", ["backbone/conv/kernel", "classifier/bias"]),
    ("", list(SHAPES)),
]


@pytest.mark.parametrize("clip_norm", [0.0, 1.0])
@pytest.mark.parametrize(("pattern", "trained"), TRAINABLE)
def test_trainable_freezes_the_other_parameters(pattern, trained, clip_norm):
    rng = np.random.RandomState(0)

    def draw():
        return {name: rng.randn(*shape).astype(np.float32) for name, shape in SHAPES.items()}

    start, gradients = draw(), [draw() for _ in range(4)]
    settings = {"weight_decay": 0.1, "clip_norm": clip_norm}

    def run(names, trainable):
        """The parameters after all updates of these alone."""
        optimizer = optimizers.sgd(
            optimizers.per_step(np.array([0.1, 0.01]), 2), trainable=trainable, **settings
        )
        tree = lambda flat: unflatten_dict({name: flat[name] for name in names}, sep="/")  # noqa: E731
        params = jax.tree.map(jnp.asarray, tree(start))
        opt_state = optimizer.init(params)
        for gradient in gradients:
            updates, opt_state = optimizer.update(tree(gradient), opt_state, params)
            params = optax.apply_updates(params, updates)
        return flatten_dict(params, sep="/")

    found, alone = run(SHAPES, pattern), run(trained, "")
    for name, value in found.items():
        np.testing.assert_array_equal(value, alone[name] if name in trained else start[name], name)
    assert all(np.abs(found[name] - start[name]).max() > 1e-3 for name in trained)
    # Clipping sees the trained gradient only, and here it is at work.
    assert not clip_norm or np.sqrt(sum((gradients[0][name] ** 2).sum() for name in trained)) > clip_norm


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("weight", "'weight' matches no parameter; use the beginning of one of backbone/conv/kernel, class"),
        ("classifier(", r"'classifier\(' is not a regular expression \(missing \), unterminated subpattern"),
    ],
)
def test_trainable_that_cannot_be_used(pattern, message):
    params = unflatten_dict({name: jnp.zeros(shape) for name, shape in SHAPES.items()}, sep="/")
    with pytest.raises(InputError, match=f"config.optimizer.trainable {message}"):
        optimizers.sgd(optax.constant_schedule(0.1), trainable=pattern).init(params)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"momentum": 1.0}, r"momentum is 1; it must be in \[0, 1\)"),
        ({"momentum": -0.5}, "momentum is -0.5"),
        ({"momentum": float("nan")}, "momentum is nan"),
        ({"weight_decay": -1.0}, "weight_decay is -1; it must be finite and >= 0"),
        ({"clip_norm": float("inf")}, "clip_norm is inf"),
        ({"nesterov": True, "momentum": 0.0}, "nesterov needs a momentum; set momentum above 0"),
        ({"decayed": "kernels"}, "decayed is 'kernels'; use one of all, weights"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        optimizers.sgd(lambda step: 0.1, **settings)
