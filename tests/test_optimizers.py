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


def test_per_step():
    schedule = optimizers.per_step(np.array([0.5, 0.25, 0.125]), steps_per_epoch=2)
    expected = [0.5, 0.5, 0.25, 0.25, 0.125, 0.125, 0.125, 0.125]  # the last one stays
    assert [float(schedule(step)) for step in range(8)] == expected
    assert [float(jax.jit(schedule)(jnp.int32(step))) for step in range(8)] == expected


def numpy_sgd(params, gradients, rates, momentum, weight_decay, clip_norm):
    """torch.nn.utils.clip_grad_norm_, then torch.optim.SGD (dampening 0), in float64."""
    params = {name: np.float64(p) for name, p in params.items()}
    velocity = {name: np.zeros_like(p) for name, p in params.items()}
    for gradient, lr in zip(gradients, rates, strict=True):
        norm = np.sqrt(sum((np.float64(g) ** 2).sum() for g in gradient.values()))
        shrink = clip_norm / norm if clip_norm and norm > clip_norm else 1.0
        for name, p in params.items():
            g = shrink * np.float64(gradient[name]) + weight_decay * p
            velocity[name] = momentum * velocity[name] + g
            params[name] = p - lr * velocity[name]
    return params


@pytest.mark.parametrize("clip_norm", [0.0, 1.0, 100.0])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_sgd_is_pytorch_s(momentum, weight_decay, clip_norm):
    rng = np.random.RandomState(0)

    def draw():
        return {"weight": rng.randn(3, 4).astype(np.float32), "bias": rng.randn(4).astype(np.float32)}

    start, gradients, rates = draw(), [draw() for _ in range(5)], np.array([0.1, 0.1, 0.01, 0.01, 0.001])
    optimizer = optimizers.sgd(
        optimizers.per_step(rates, 1), momentum=momentum, weight_decay=weight_decay, clip_norm=clip_norm
    )
    params = jax.tree.map(jnp.asarray, start)
    opt_state = optimizer.init(params)
    for gradient in gradients:
        updates, opt_state = optimizer.update(gradient, opt_state, params)
        params = optax.apply_updates(params, updates)
    expected = numpy_sgd(start, gradients, rates, momentum, weight_decay, clip_norm)
    for name, value in params.items():  # 5 updates of numbers near 1 in float32
        np.testing.assert_allclose(value, expected[name], rtol=1e-5, atol=1e-6)


def test_weight_decay_reaches_biases():
    params = {"bias": jnp.ones(3)}
    optimizer = optimizers.sgd(optax.constant_schedule(0.5), weight_decay=0.1)
    updates, _ = optimizer.update({"bias": jnp.zeros(3)}, optimizer.init(params), params)
    np.testing.assert_allclose(updates["bias"], -0.05, rtol=1e-6)


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
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        optimizers.sgd(lambda step: 0.1, **settings)
