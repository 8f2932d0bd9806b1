"""Invariants that every attack must hold, and closed forms on linear models (robal_jax.attacks)."""

import functools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from robal_jax import attacks, losses

EPSILON = 0.1
THREAT = attacks.ThreatModel(EPSILON)
# x + e is rounded once to float32 (half an ulp of a number below 2: 2^-24), e itself by far less.
ROUNDING = 2.0**-23
SHAPE = (4, 4, 2)
SIZE = 32

# Ten steps of a quarter of the radius cross the whole ball, from wherever the attack starts.
STEPS = {"steps": 10, "step_size": EPSILON / 4}
ATTACKS = {
    "fgsm": partial(attacks.pgd, steps=1, step_size=EPSILON, start=attacks.clean_start),
    **{f"pgd_{name}": partial(attacks.pgd, **STEPS, start=start) for name, start in attacks.STARTS.items()},
    "mim": partial(attacks.pgd, **STEPS, momentum=1.0),
    "cw": partial(attacks.pgd, **STEPS, loss=attacks.negative_margin),
}
each_attack = pytest.mark.parametrize("name", ATTACKS)


def linear_model(classes=2, seed=0):
    """Logits x . W with weights of size 0.5 to 1, so that no gradient of two classes is near 0."""
    rng = np.random.RandomState(seed)
    sign = rng.choice([-1.0, 1.0], (SIZE, 1)) * (-1.0) ** np.arange(classes)[None, :]
    weight = jnp.asarray(sign * rng.uniform(0.5, 1.0, (SIZE, classes)) / 8, jnp.float32)
    return (lambda images: images.reshape(len(images), -1) @ weight), np.asarray(weight)


def batch(count=6, seed=0):
    """Images with pixels near and at both bounds, labels and one key an image."""
    rng = np.random.RandomState(seed)
    images = np.clip(rng.uniform(-0.1, 1.1, (count, *SHAPE)), 0, 1).astype(np.float32)
    labels = rng.randint(0, 2, count).astype(np.int32)
    return jax.random.split(jax.random.key(seed), count), jnp.asarray(images), jnp.asarray(labels)


@functools.cache
def attacked(name):
    """An attack of two classes, compiled, and what it makes of the batch."""
    attack = jax.jit(partial(ATTACKS[name], linear_model()[0], threat=THREAT))
    return attack, attack(*batch())


# ---------------------------------------------------------------- what holds for all


@each_attack
def test_invariants(name):
    logits_fn, _ = linear_model()
    keys, images, labels = batch()
    attack, found = attacked(name)

    assert found.shape == images.shape
    assert found.dtype == images.dtype == jnp.float32
    distance = np.abs(np.float64(found) - np.float64(images))
    assert distance.max() <= EPSILON + ROUNDING
    assert distance.max() >= EPSILON - ROUNDING  # the ball is used to its edge
    assert found.min() >= 0
    assert found.max() <= 1
    np.testing.assert_allclose(THREAT.distance(found, images), distance.max((1, 2, 3)), atol=ROUNDING)
    before = losses.cross_entropy(logits_fn(images), labels)
    after = losses.cross_entropy(logits_fn(found), labels)
    assert (after > before).all()

    np.testing.assert_array_equal(attack(keys, images, labels), found, "not deterministic")
    eager = ATTACKS[name](logits_fn, keys, images, labels, threat=THREAT)
    np.testing.assert_array_equal(eager, found, "jit changes the result")
    halves = [attack(keys[part], images[part], labels[part]) for part in (slice(0, 3), slice(3, 6))]
    np.testing.assert_array_equal(np.concatenate(halves), found, "the batch around an image matters")
    gradient = jax.jit(jax.grad(lambda x: attack(keys, x, labels).sum()))(images)
    np.testing.assert_array_equal(gradient, jnp.zeros_like(images), "a gradient flows back")


@each_attack
def test_linear_model_is_attacked_to_the_corner(name):
    _, weight = linear_model()
    _, images, labels = batch()
    _, found = attacked(name)
    towards = weight[:, 1 - np.asarray(labels)] - weight[:, np.asarray(labels)]
    sign = np.sign(towards).T.reshape(images.shape).astype(np.float32)
    corner = np.clip(np.asarray(images) + np.float32(EPSILON) * sign, np.float32(0), np.float32(1))
    np.testing.assert_array_equal(found, corner)


@pytest.mark.parametrize("name", ["uniform", "one_sided", "gaussian"])
def test_random_starts_depend_on_the_key_alone(name):
    keys, images, _ = batch()
    start = jax.jit(partial(attacks.starting_points, attacks.STARTS[name], threat=THREAT))
    noise = np.asarray(start(keys, images) - images)
    assert len({row.tobytes() for row in noise}) == len(noise), "images share their noise"
    np.testing.assert_array_equal(start(keys[::-1], images[::-1])[::-1] - images, noise)
    assert not np.array_equal(start(keys[::-1], images) - images, noise)


def test_ranges_of_the_starts():
    keys, images = jax.random.split(jax.random.key(1), 200), jnp.full((200, *SHAPE), 0.5)
    noise = {
        name: np.asarray(jax.jit(partial(attacks.starting_points, start, threat=THREAT))(keys, images)) - 0.5
        for name, start in attacks.STARTS.items()
    }
    np.testing.assert_array_equal(noise["clean"], 0)
    # 6,400 draws; rounding of 0.5 + noise.
    assert noise["uniform"].min() == pytest.approx(-EPSILON, abs=1e-3)
    assert noise["uniform"].max() == pytest.approx(EPSILON, abs=1e-3)
    assert abs(noise["uniform"].mean()) < 5 * EPSILON / np.sqrt(3 * 6400)
    assert noise["one_sided"].min() >= 0
    assert noise["one_sided"].max() == pytest.approx(EPSILON, abs=1e-3)
    assert noise["one_sided"].mean() == pytest.approx(EPSILON / 2, rel=0.05)
    assert noise["gaussian"].std() == pytest.approx(0.001, rel=0.05)


# ---------------------------------------------------------------- against a loop in NumPy


def numpy_pgd(start, images, labels, weight, steps, step_size, momentum, bounds):
    """PGD and MIM on the cross entropy of a linear model, in float64."""
    x, direction = np.float64(start), np.zeros_like(np.float64(start))
    for _ in range(steps):
        logits = x.reshape(len(x), -1) @ np.float64(weight)
        p = np.exp(logits - logits.max(1, keepdims=True))
        p /= p.sum(1, keepdims=True)
        p[np.arange(len(p)), labels] -= 1
        gradient = (p @ np.float64(weight).T).reshape(x.shape)
        size = np.abs(gradient).mean((1, 2, 3), keepdims=True)
        direction = momentum * direction + gradient / size
        x = x + step_size * np.sign(direction if momentum else gradient)
        x = np.clip(np.clip(x, images - EPSILON, images + EPSILON), *bounds)
    return x


@pytest.mark.parametrize("momentum", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("bounds", [(0.0, 1.0), (0.2, 0.7)])
def test_against_numpy(momentum, bounds):
    # Weights of both signs in every class: the gradient changes its direction on the way.
    weight = np.random.RandomState(3).randn(SIZE, 4).astype(np.float32)
    _, images, labels = batch()
    images = jnp.clip(images, *bounds)
    start = images + 0.05 * np.sign(np.random.RandomState(4).randn(*images.shape)).astype(np.float32)
    settings = {"steps": 7, "step_size": 0.021, "momentum": momentum}
    expected = numpy_pgd(start, np.asarray(images), np.asarray(labels), weight, **settings, bounds=bounds)
    found = attacks.pgd_path(
        lambda x: x.reshape(len(x), -1) @ jnp.asarray(weight),
        start,
        images,
        labels,
        threat=attacks.ThreatModel(EPSILON, *bounds),
        **{**settings, "steps": (7,)},
    )[0]
    np.testing.assert_allclose(found, expected, atol=1e-6)  # 7 additions in float32
    assert np.abs(found - images).max() > 0.02  # and not all at the edge of the ball
    assert (np.abs(found - images) < EPSILON - 0.001).any()


@pytest.mark.parametrize("momentum", [0.0, 1.0])
def test_path_is_that_of_separate_runs(momentum):
    logits_fn, _ = linear_model(classes=5)
    keys, images, labels = batch()
    start = attacks.starting_points(attacks.uniform_start, keys, images, THREAT)
    run = partial(
        attacks.pgd_path, logits_fn, start, images, labels,
        threat=THREAT, step_size=EPSILON / 8, momentum=momentum,
    )  # fmt: skip
    path = run(steps=(1, 3, 7))
    assert path.shape == (3, *images.shape)
    for found, steps in zip(path, (1, 3, 7), strict=True):
        np.testing.assert_array_equal(found, run(steps=(steps,))[0])
    assert not np.array_equal(path[0], path[1])
    whole = attacks.pgd(
        logits_fn, keys, images, labels,
        threat=THREAT, steps=7, step_size=EPSILON / 8, momentum=momentum,
    )  # fmt: skip
    np.testing.assert_array_equal(whole, path[2])


@pytest.mark.parametrize("momentum", [0.0, 1.0])
def test_no_gradient_leaves_the_start_where_it_is(momentum):
    keys, images, labels = batch()
    start = attacks.starting_points(attacks.uniform_start, keys, images, THREAT)
    found = attacks.pgd(
        lambda x: 0.0 * x.reshape(len(x), -1)[:, :3], keys, images, labels,
        threat=THREAT, **STEPS, momentum=momentum,
    )  # fmt: skip
    np.testing.assert_array_equal(found, THREAT.project(start, images))


# ---------------------------------------------------------------- parts


@pytest.mark.parametrize("epsilon", [0.0, -0.1, float("nan")])
def test_radius_must_be_positive(epsilon):
    with pytest.raises(ValueError, match="epsilon must be > 0"):
        attacks.ThreatModel(epsilon)


def test_project():
    threat = attacks.ThreatModel(0.25, 0.0, 1.0)
    images = jnp.array([0.5, 0.5, 0.5, 0.0, 1.0, 0.125])
    candidates = jnp.array([0.5, 2.0, -2.0, -0.1, 1.1, 0.0])
    np.testing.assert_array_equal(threat.project(candidates, images), [0.5, 0.75, 0.25, 0.0, 1.0, 0.0])


@pytest.mark.parametrize("confidence", [0.0, 1.0, 50.0])
def test_negative_margin(confidence):
    rng = np.random.RandomState(0)
    logits, labels = rng.randn(20, 4).astype(np.float32), rng.randint(0, 4, 20)
    expected = [
        -max(row[y] - max(z for i, z in enumerate(row) if i != y) + confidence, 0.0)
        for row, y in zip(np.float64(logits), labels, strict=True)
    ]
    # The sum of a margin and 50 is rounded to 2^-18.
    np.testing.assert_allclose(
        attacks.negative_margin(logits, labels, confidence=confidence), expected, atol=1e-5
    )


def test_negative_margin_has_a_gradient_where_cross_entropy_has_none():
    logits, labels = jnp.array([[200.0, 0.0, -1.0]]), jnp.array([0])
    gradients = [
        jax.grad(lambda z, loss=loss: loss(z, labels).sum())(logits)
        for loss in (losses.cross_entropy, attacks.negative_margin)
    ]
    np.testing.assert_array_equal(gradients[0], [[0, 0, 0]])
    np.testing.assert_array_equal(gradients[1], [[-1, 1, 0]])
