"""Invariants that every attack must hold, and closed forms on linear models (robal_jax.attacks)."""

import functools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from robal_jax import attacks, losses
from robal_jax.attacks import (
    STARTS,
    ThreatModel,
    clean_start,
    gaussian_start,
    one_sided_start,
    starting_points,
    uniform_start,
)
from robal_jax.keys import image_keys

EPSILON = 0.1
SHAPE = (4, 4, 2)
SIZE = 32
THREATS = {"linf": ThreatModel(EPSILON), "l2": ThreatModel(EPSILON, "l2")}
THREAT = THREATS["linf"]
each_norm = pytest.mark.parametrize("norm", THREATS)
# x + e is rounded once to float32 (half an ulp of a number below 2: 2^-24), e itself by far less. A vector of
# 32 such roundings is at most sqrt(32), 6, times as long.
ROUNDING = 2.0**-23
ROUNDINGS = {"linf": ROUNDING, "l2": 6 * ROUNDING}

# Ten steps of a quarter of the radius cross the whole ball, from wherever the attack starts.
STEPS = {"steps": 10, "step_size": EPSILON / 4}


def against_noise(logits_fn, *arguments, **settings):
    """Attacks a model that answers anything between its logits and twice these, at random."""

    def random_fn(x, keys):
        size = jax.vmap(lambda key: jax.random.uniform(key, (), minval=1, maxval=2))(keys)
        return size[:, None] * logits_fn(x)

    return attacks.pgd(random_fn, *arguments, **settings)


def against_scaled(logits_fn, *arguments, **settings):
    return attacks.pgd(attacks.scaled(logits_fn, 10.0), *arguments, **settings)


def to_all_targets(*arguments, threat, **settings):
    attack = partial(attacks.pgd, threat=threat, **STEPS)
    return attacks.multi_targeted(*arguments, attack=attack, **settings)


BOTH, LINF = ("linf", "l2"), ("linf",)
ROWS = {  # norms, attack
    "fgsm": (LINF, partial(attacks.pgd, steps=1, step_size=EPSILON, start=clean_start)),
    "pgd clean": (BOTH, partial(attacks.pgd, **STEPS, start=clean_start)),
    "pgd uniform": (BOTH, partial(attacks.pgd, **STEPS)),
    "pgd one_sided": (LINF, partial(attacks.pgd, **STEPS, start=one_sided_start)),
    "pgd gaussian": (LINF, partial(attacks.pgd, **STEPS, start=gaussian_start)),
    "mim": (BOTH, partial(attacks.pgd, **STEPS, momentum=1.0)),
    "cw": (LINF, partial(attacks.pgd, **STEPS, loss=attacks.negative_margin)),
    "restarts": (BOTH, partial(attacks.pgd, **STEPS, restarts=3)),
    # 5.5 steps of half the radius in sum.
    "decay": (LINF, partial(attacks.pgd, steps=10, step_size=optax.cosine_decay_schedule(EPSILON / 2, 10))),
    "eot": (BOTH, partial(against_noise, **STEPS, eot=2)),
    "eot restarts": (LINF, partial(against_noise, **STEPS, eot=2, restarts=2)),
    "scaled": (LINF, partial(against_scaled, **STEPS)),
    "multi-targeted": (BOTH, to_all_targets),  # the one wrong class that there is, not nine
}
ATTACKS = {f"{norm} {name}": attack for name, (norms, attack) in ROWS.items() for norm in norms}
each_attack = pytest.mark.parametrize("name", ATTACKS)


def linear_model(classes=2, seed=0):
    """Logits x . W with weights of size 0.5 to 1, so that no gradient of two classes is near 0."""
    rng = np.random.RandomState(seed)
    sign = rng.choice([-1.0, 1.0], (SIZE, 1)) * (-1.0) ** np.arange(classes)[None, :]
    weight = jnp.asarray(sign * rng.uniform(0.5, 1.0, (SIZE, classes)) / 8, jnp.float32)
    return (lambda images: images.reshape(len(images), -1) @ weight), np.asarray(weight)


def batch(count=6, seed=0):
    """Images with pixels near and at both bounds, labels and one key per image."""
    rng = np.random.RandomState(seed)
    images = np.clip(rng.uniform(-0.1, 1.1, (count, *SHAPE)), 0, 1).astype(np.float32)
    labels = rng.randint(0, 2, count).astype(np.int32)
    return jax.random.split(jax.random.key(seed), count), jnp.asarray(images), jnp.asarray(labels)


@functools.cache
def attacked(name):
    """An attack of two classes, compiled, and what it makes of the batch."""
    attack = jax.jit(partial(ATTACKS[name], linear_model()[0], threat=THREATS[name.split()[0]]))
    return attack, attack(*batch())


def gradient_of_linear_model(labels):
    """Of the lead of the wrong one of two classes."""
    _, weight = linear_model()
    towards = weight[:, 1 - np.asarray(labels)] - weight[:, np.asarray(labels)]
    return jnp.asarray(towards.T.reshape(-1, *SHAPE))


def distances(norm, found, images):
    delta = (np.float64(found) - np.float64(images)).reshape(len(images), -1)
    return np.abs(delta).max(1) if norm == "linf" else np.linalg.norm(delta, axis=1)


# ---------------------------------------------------------------- what holds for all


@pytest.mark.slow
@each_attack
def test_invariants(name):
    logits_fn, _ = linear_model()
    keys, images, labels = batch()
    attack, found = attacked(name)
    norm = name.split()[0]
    threat, rounding = THREATS[norm], ROUNDINGS[norm]

    assert found.shape == images.shape
    assert found.dtype == images.dtype == jnp.float32
    distance = distances(norm, found, images)
    assert distance.max() <= EPSILON + rounding
    # The ball is used to its edge; in L2 what is clipped to the bounds afterwards falls a little short of it.
    assert distance.max() >= (EPSILON - rounding if norm == "linf" else 0.99 * EPSILON)
    assert found.min() >= 0
    assert found.max() <= 1
    np.testing.assert_allclose(threat.distance(found, images), distance, atol=rounding)
    step = threat.project(
        images + EPSILON * threat.ascent_direction(gradient_of_linear_model(labels)), images
    )
    clean, simple, strong = (losses.cross_entropy(logits_fn(x), labels) for x in (images, step, found))
    # In L2 a random start is not wholly forgotten in ten steps.
    assert (strong - clean > {"linf": 1.0, "l2": 0.95}[norm] * (simple - clean) - 1e-6).all()
    assert (strong > clean).all()

    np.testing.assert_array_equal(attack(keys, images, labels), found, "not deterministic")
    turned = attack(keys[::-1], images[::-1], labels[::-1])[::-1]
    np.testing.assert_array_equal(turned, found, "an image's place matters")
    others = [
        jnp.concatenate([x[:3], y[3:]]) for x, y in zip((keys, images, labels), batch(seed=1), strict=True)
    ]
    np.testing.assert_array_equal(attack(*others)[:3], found[:3], "the batch around an image matters")
    assert attack._cache_size() == 1


@pytest.mark.parametrize(
    "name", ["linf pgd uniform", "l2 restarts", "linf eot restarts", "linf multi-targeted"]
)
def test_no_gradient_flows_back(name):
    keys, images, labels = batch()
    attack, _ = attacked(name)
    gradient = jax.jit(jax.grad(lambda x: attack(keys, x, labels).sum()))(images)
    np.testing.assert_array_equal(gradient, jnp.zeros_like(images))


@pytest.mark.parametrize("name", [name for name in ATTACKS if name.startswith("linf")])
def test_linear_model_is_attacked_to_the_corner(name):
    _, weight = linear_model()
    _, images, labels = batch()
    _, found = attacked(name)
    towards = weight[:, 1 - np.asarray(labels)] - weight[:, np.asarray(labels)]
    sign = np.sign(towards).T.reshape(images.shape).astype(np.float32)
    corner = np.clip(np.asarray(images) + np.float32(EPSILON) * sign, np.float32(0), np.float32(1))
    np.testing.assert_array_equal(found, corner)


@pytest.mark.parametrize("steps", [1, 3])
def test_linear_model_is_attacked_along_its_weights_in_l2(steps):
    logits_fn, weight = linear_model()
    keys, images, labels = batch()
    images = 0.25 + 0.5 * images  # no pixel meets a bound
    found = attacks.pgd(
        logits_fn, keys, images, labels,
        threat=THREATS["l2"], steps=steps, step_size=EPSILON, start=clean_start,
    )  # fmt: skip
    towards = weight[:, 1 - np.asarray(labels)] - weight[:, np.asarray(labels)]
    unit = (towards / np.linalg.norm(towards, axis=0)).T.reshape(images.shape)
    np.testing.assert_allclose(found, images + EPSILON * unit, atol=4 * ROUNDING)  # of each step


@pytest.mark.parametrize(
    ("name", "norm"), [("uniform", "linf"), ("uniform", "l2"), ("one_sided", "linf"), ("gaussian", "linf")]
)
def test_random_starts_depend_on_the_key_alone(name, norm):
    keys, images, _ = batch()
    start = jax.jit(partial(starting_points, STARTS[name], threat=THREATS[norm]))
    noise = np.asarray(start(keys, images) - images)
    assert len({row.tobytes() for row in noise}) == len(noise), "images share their noise"
    np.testing.assert_array_equal(start(keys[::-1], images[::-1])[::-1] - images, noise)
    assert not np.array_equal(start(keys[::-1], images) - images, noise)


def test_ranges_of_the_starts():
    keys, images = jax.random.split(jax.random.key(1), 200), jnp.full((200, *SHAPE), 0.5)
    noise = {
        name: np.asarray(jax.jit(partial(starting_points, start, threat=THREAT))(keys, images)) - 0.5
        for name, start in STARTS.items()
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


def test_uniform_start_fills_the_l2_ball():
    keys, images = jax.random.split(jax.random.key(1), 400), jnp.zeros((400, *SHAPE))
    start = jax.jit(partial(starting_points, uniform_start, threat=THREATS["l2"]))
    noise = np.float64(start(keys, images)).reshape(400, SIZE)
    volume = (np.linalg.norm(noise, axis=1) / EPSILON) ** SIZE  # of the ball inside of the point
    assert volume.max() <= 1 + SIZE * ROUNDINGS["l2"] / EPSILON
    deviation = 4 / np.sqrt(400)  # four standard errors of the mean, per standard deviation of one draw
    assert abs(volume.mean() - 1 / 2) < deviation / np.sqrt(12)
    assert abs((volume**2).mean() - 1 / 3) < deviation * np.sqrt(4 / 45)
    assert np.abs(noise.mean(0)).max() < deviation * EPSILON / np.sqrt(SIZE)


# ---------------------------------------------------------------- against a loop in NumPy


def numpy_pgd(start, images, labels, weight, steps, step_size, momentum, norm, bounds):
    """PGD and MIM on the cross entropy of a linear model, in float64."""
    images = np.float64(images)
    x, direction = np.float64(start), np.zeros_like(np.float64(start))
    for _ in range(steps):
        logits = x.reshape(len(x), -1) @ np.float64(weight)
        p = np.exp(logits - logits.max(1, keepdims=True))
        p /= p.sum(1, keepdims=True)
        p[np.arange(len(p)), labels] -= 1
        gradient = (p @ np.float64(weight).T).reshape(x.shape)
        size = np.abs(gradient).mean((1, 2, 3), keepdims=True)
        direction = momentum * direction + gradient / size
        ascent = direction if momentum else gradient
        if norm == "linf":
            x = np.clip(x + step_size * np.sign(ascent), images - EPSILON, images + EPSILON)
        else:
            length = np.linalg.norm(ascent.reshape(len(x), -1), axis=1).reshape(-1, 1, 1, 1)
            delta = x + step_size * ascent / length - images
            length = np.linalg.norm(delta.reshape(len(x), -1), axis=1).reshape(-1, 1, 1, 1)
            x = images + delta * np.minimum(1, EPSILON / length)
        x = np.clip(x, *bounds)
    return x


@pytest.mark.parametrize("bounds", [(0.0, 1.0), (0.2, 0.7)])
@pytest.mark.parametrize(
    ("norm", "momentum"), [("linf", 0.0), ("linf", 0.5), ("linf", 1.0), ("l2", 0.0), ("l2", 1.0)]
)
def test_against_numpy(norm, momentum, bounds):
    # Weights of both signs in every class: the gradient changes its direction on the way.
    weight = np.random.RandomState(3).randn(SIZE, 4).astype(np.float32)
    _, images, labels = batch()
    images = jnp.clip(images, *bounds)
    start = images + 0.05 * np.sign(np.random.RandomState(4).randn(*images.shape)).astype(np.float32)
    settings = {"steps": 7, "step_size": 0.021, "momentum": momentum}
    limits = {"norm": norm, "bounds": bounds}
    expected = numpy_pgd(start, np.asarray(images), np.asarray(labels), weight, **settings, **limits)
    found = attacks.pgd_path(
        lambda x: x.reshape(len(x), -1) @ jnp.asarray(weight),
        start,
        images,
        labels,
        threat=ThreatModel(EPSILON, norm, *bounds),
        **{**settings, "steps": (7,)},
    )[0]
    np.testing.assert_allclose(found, expected, atol=1e-6)  # 7 additions in float32
    assert np.abs(found - images).max() > 0.02  # and not all at the edge of the ball
    assert norm == "l2" or (np.abs(found - images) < EPSILON - 0.001).any()


@pytest.mark.slow
@pytest.mark.parametrize("momentum", [0.0, 1.0])
def test_path_is_that_of_separate_runs(momentum):
    logits_fn, _ = linear_model(classes=5)
    keys, images, labels = batch()
    start = starting_points(uniform_start, keys, images, THREAT)
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
    start = starting_points(uniform_start, keys, images, THREAT)
    found = attacks.pgd(
        lambda x: 0.0 * x.reshape(len(x), -1)[:, :3], keys, images, labels,
        threat=THREAT, **STEPS, momentum=momentum,
    )  # fmt: skip
    np.testing.assert_array_equal(found, THREAT.project(start, images))


# ---------------------------------------------------------------- parts


def test_project():
    threat = ThreatModel(0.25)
    images = jnp.array([0.5, 0.5, 0.5, 0.0, 1.0, 0.125])
    candidates = jnp.array([0.5, 2.0, -2.0, -0.1, 1.1, 0.0])
    np.testing.assert_array_equal(threat.project(candidates, images), [0.5, 0.75, 0.25, 0.0, 1.0, 0.0])


L2_PROJECTIONS = [  # image, candidate, projection into the ball of radius 1/4
    ([0.5, 0.5], [0.8, 0.9], [0.65, 0.7]),
    ([0.5, 0.5], [0.35, 0.3], [0.35, 0.3]),  # on the sphere
    ([0.5, 0.5], [0.5, 0.5], [0.5, 0.5]),
    # Into the ball first and then into the bounds, as in the reference implementation of AutoAttack.
    ([1.0, 0.5], [9.0, 0.5], [1.0, 0.5]),
    ([1.0, 0.5], [1.8, 1.1], [1.0, 0.65]),
]


@pytest.mark.parametrize(("image", "candidate", "expected"), L2_PROJECTIONS)
def test_project_in_l2(image, candidate, expected):
    image, candidate = (jnp.array(x).reshape(1, 2, 1, 1) for x in (image, candidate))
    found = ThreatModel(0.25, "l2").project(candidate, image)
    np.testing.assert_allclose(found.reshape(-1), expected, atol=ROUNDING)


@each_norm
def test_projections_are_allowed_and_allowed_images_stay(norm):
    rng, threat = np.random.RandomState(0), THREATS[norm]
    _, images, _ = batch(60)
    size = 10.0 ** rng.uniform(-4, 1, (60, 1, 1, 1))  # from far inside to far outside
    candidates = jnp.asarray(images + size * rng.randn(*images.shape), jnp.float32)
    found = threat.project(candidates, images)
    rounding = ROUNDINGS[norm]
    distance = distances(norm, found, images)
    assert distance.max() <= EPSILON + rounding
    assert (distance < EPSILON / 2).any()
    assert found.min() >= 0
    assert found.max() <= 1
    np.testing.assert_allclose(threat.project(found, images), found, atol=rounding)


@pytest.mark.parametrize("scale", [1.0, 1e-4, 1e-21, 1e-30, 1e25])
@each_norm
def test_ascent_direction_has_length_1_whatever_the_gradient_s(norm, scale):
    gradient = np.random.RandomState(0).randn(3, *SHAPE).astype(np.float32) * np.float32(scale)
    gradient[1] = 0.0
    found = THREATS[norm].ascent_direction(jnp.asarray(gradient))
    np.testing.assert_allclose(distances(norm, found, np.zeros_like(found)), [1, 0, 1], atol=ROUNDINGS[norm])
    flat = np.float64(gradient).reshape(3, -1) / scale
    dual = np.abs(flat).sum(1) if norm == "linf" else np.linalg.norm(flat, axis=1)
    ascent = (np.float64(found).reshape(3, -1) * flat).sum(1)  # the most that a step of length 1 can gain
    np.testing.assert_allclose(ascent, dual, rtol=1e-5)


def test_distance():
    images = np.zeros((2, 2, 1, 1), np.float32)
    candidates = np.array([[3.0, -4.0], [0.0, 0.5]], np.float32).reshape(images.shape)
    for norm, expected in (("linf", [4.0, 0.5]), ("l2", [5.0, 0.5])):
        np.testing.assert_array_equal(THREATS[norm].distance(candidates, images), expected)


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


@pytest.mark.slow
def test_negative_margin_has_a_gradient_where_cross_entropy_has_none():
    logits, labels = jnp.array([[200.0, 0.0, -1.0]]), jnp.array([0])
    gradients = [
        jax.grad(lambda z, loss=loss: loss(z, labels).sum())(logits)
        for loss in (losses.cross_entropy, attacks.negative_margin)
    ]
    np.testing.assert_array_equal(gradients[0], [[0, 0, 0]])
    np.testing.assert_array_equal(gradients[1], [[-1, 1, 0]])


# ---------------------------------------------------------------- what it costs

PASSES = {  # forward and backward passes that are written out, whatever the numbers
    "pgd": (attacks.pgd, {"steps": 9}, 2),
    "restarts": (attacks.pgd, {"steps": 9, "restarts": 7}, 3),  # and judged
    "eot": (against_noise, {"steps": 9, "eot": 7}, 2),
    "eot restarts": (against_noise, {"steps": 9, "eot": 7, "restarts": 7}, 3),
    "multi-targeted": (to_all_targets, {"targets": 7}, 4),  # and targets chosen
}


@pytest.mark.parametrize("name", PASSES)
def test_passes_are_written_once(name):
    attack, settings, passes = PASSES[name]
    if "steps" in settings:
        settings = settings | {"step_size": 0.01}
    logits_fn, _ = linear_model(classes=10)
    traced = jax.make_jaxpr(partial(attack, logits_fn, threat=THREAT, **settings))(*batch())
    assert str(traced).count("dot_general[") == passes


@pytest.mark.parametrize(("targets", "runs"), [(7, 7), (9, 9), (None, 9)])
def test_as_many_runs_as_there_are_wrong_classes(targets, runs):
    logits_fn, _ = linear_model(classes=10)
    way = partial(attacks.multi_targeted, logits_fn, attack=lambda f, key, x, y, loss: x, targets=targets)
    assert f" length={runs}\n" in str(jax.make_jaxpr(way)(*batch()))


def test_traced_numbers_share_a_compilation():
    logits_fn, _ = linear_model(classes=5)

    @jax.jit
    def attack(scale, steps, step_size):
        return attacks.pgd(
            attacks.scaled(logits_fn, scale), *batch(), threat=THREAT, steps=steps, step_size=step_size
        )

    found = [
        attack(*numbers) for numbers in ((1.0, 2, 0.01), (10.0, 2, 0.01), (1.0, 3, 0.01), (1.0, 2, 0.02))
    ]
    assert attack._cache_size() == 1
    assert len({np.asarray(images).tobytes() for images in found}) == 4


# ---------------------------------------------------------------- keys


@pytest.mark.parametrize("name", ["linf pgd uniform", "linf multi-targeted"])
def test_one_key_is_split_by_position(name):
    _, images, labels = batch()
    found = ATTACKS[name](linear_model()[0], jax.random.key(0), images, labels, threat=THREAT)
    np.testing.assert_array_equal(found, attacked(name)[1])  # batch() splits this key


def test_image_keys():
    _, images, _ = batch()
    keys = image_keys(jax.random.key(3), images)
    assert keys.shape == (6,)
    assert len(np.unique(jax.random.key_data(keys), axis=0)) == 6
    for same in keys, jax.random.PRNGKey(3), jax.random.key_data(keys):
        assert (image_keys(same, images) == keys).all()
    for wrong in keys[:5], keys[:, None], jax.random.split(jax.random.PRNGKey(3), 7):
        with pytest.raises(ValueError, match=r"give one key, or one key per image, \[6\]"):
            image_keys(wrong, images)


# ---------------------------------------------------------------- expectation over transformation


def noisy_linear_model(weight, noise):
    """``z = x . W + noise * (x . v(key)) [0, 1]``, v normal: the expected gradient is that of ``x . W``."""

    def logits_fn(images, keys):
        flat = images.reshape(len(images), -1)
        random = jax.vmap(lambda key: jax.random.normal(key, (SIZE,), images.dtype))(keys)
        return flat @ weight + noise * jnp.sum(flat * random, -1, keepdims=True) * jnp.array([[0.0, 1.0]])

    return logits_fn


@pytest.mark.slow
@pytest.mark.parametrize("draws", [2, 4000])
def test_loss_gradient_averages_over_draws(draws):
    _, images, labels = batch()
    _, weight = linear_model()
    labels, targets = jnp.zeros_like(labels), jnp.ones_like(labels)
    logits_fn, loss = noisy_linear_model(weight, 1.0), partial(attacks.targeted_margin, targets=targets)
    keys = image_keys(jax.random.key(7), images)
    look = jax.jit(partial(attacks.loss_gradient, logits_fn, loss, eot=draws))
    logits, values, gradient = look(images, labels, keys)

    expected = (weight[:, 1] - weight[:, 0]).reshape(1, *SHAPE)
    error = np.abs(gradient - expected)
    assert error.max() < 5 / np.sqrt(draws)  # of 192 normal numbers
    assert error.max() > 1 / np.sqrt(draws)
    draw = jax.vmap(jax.vmap(jax.random.fold_in, (0, None)), (None, 0))(keys, jnp.arange(draws))
    noise = jax.vmap(jax.vmap(lambda key: jax.random.normal(key, SHAPE)))(draw)
    np.testing.assert_allclose(gradient, expected + noise.mean(0), atol=1e-4 if draws > 2 else 1e-6)
    np.testing.assert_allclose(logits, logits_fn(images, draw[-1]), atol=1e-5)
    np.testing.assert_allclose(values, logits[:, 1] - logits[:, 0], atol=1e-6)


@pytest.mark.slow
def test_loss_gradient_of_a_model_that_is_not_random():
    logits_fn, weight = linear_model(classes=5)
    _, images, labels = batch()
    logits, values, gradient = attacks.loss_gradient(logits_fn, losses.cross_entropy, images, labels)
    np.testing.assert_array_equal(logits, logits_fn(images))
    np.testing.assert_allclose(values, losses.cross_entropy(logits, labels), atol=1e-6)
    expected = (jax.nn.softmax(logits) - np.eye(5)[labels]) @ weight.T
    np.testing.assert_allclose(gradient, expected.reshape(images.shape), atol=1e-6)
    with pytest.raises(ValueError, match="eot needs keys"):
        attacks.loss_gradient(logits_fn, losses.cross_entropy, images, labels, eot=1)


def test_averaged_gradients_find_what_single_draws_miss():
    keys, images, labels = batch()
    logits_fn = noisy_linear_model(linear_model()[1], 1.0)
    right = np.asarray(jnp.sign(gradient_of_linear_model(labels)))
    agreement = []
    for draws in 1, 100:
        found = attacks.pgd(
            logits_fn, keys, 0.5 + 0 * images, labels,
            threat=THREAT, steps=1, step_size=EPSILON, start=clean_start, eot=draws,
            loss=partial(attacks.targeted_margin, targets=1 - labels),
        )  # fmt: skip
        agreement.append((np.sign(found - 0.5) == right).mean())
    # A weight of 1/8 to 1/4 against a standard deviation of 1, or of 1/10.
    assert agreement[0] < 0.7
    assert agreement[1] > 0.9


def test_noise_is_new_in_every_step():
    keys, images, labels = batch()
    logits_fn = noisy_linear_model(jnp.zeros((SIZE, 2)), 1.0)
    path = attacks.pgd_path(
        logits_fn, images, images, labels,
        threat=ThreatModel(10.0, lower=-99.0, upper=99.0), steps=(1, 2, 3), step_size=0.1,
        loss=partial(attacks.targeted_margin, targets=1 - labels), eot=1, keys=keys,
    )  # fmt: skip
    signs = np.sign(np.diff(np.concatenate([images[None], path]), axis=0)).reshape(3, -1)
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert abs((signs[one] * signs[other]).mean()) < 4 / np.sqrt(6 * SIZE)


# ---------------------------------------------------------------- restarts and targets


def wavy_model():
    """Two classes and several crests of the wrong one within the ball: the start decides on which it ends."""
    _, weight = linear_model()
    direction = jnp.asarray(weight[:, 0] / np.abs(weight[:, 0]).sum())

    def logits_fn(images):
        # Between -1 and 1 over the ball; random starts lie within 0.1 or so of 0. Above the trough at 0.1 the
        # next crest is high enough, below it is not.
        at = ((images - 0.5).reshape(len(images), -1) @ direction) / EPSILON
        return jnp.stack([0.0 * at, at - jnp.cos(24 * (at - 0.1)) - 1.1], axis=-1)

    return logits_fn


def folded(keys, numbers):
    return [jax.vmap(lambda key, n=n: jax.random.fold_in(key, n))(keys) for n in numbers]


def choose(results, success, score):
    """Of stacked results ``[N, B, ...]`` each image's first success, otherwise the first of highest score."""
    best = np.where(success.any(0), success.argmax(0), score.argmax(0))
    return np.stack([results[n, image] for image, n in enumerate(best)]), best


@pytest.mark.slow
def test_restarts_keep_the_best_of_their_runs():
    count = 40
    keys = image_keys(jax.random.key(2), jnp.zeros(count))
    images, labels, logits_fn = jnp.full((count, *SHAPE), 0.5), jnp.zeros(count, jnp.int32), wavy_model()
    run = partial(attacks.pgd, logits_fn, threat=THREAT, steps=5, step_size=0.003)
    one = jax.jit(run)
    results = np.stack(
        [one(keys_of_run, images, labels) for keys_of_run in (keys, *folded(keys, range(1, 6)))]
    )
    logits = np.stack([logits_fn(found) for found in results])
    success, score = logits.argmax(-1) != 0, np.stack([losses.cross_entropy(z, labels) for z in logits])
    expected, best = choose(results, success, score)
    np.testing.assert_allclose(run(keys, images, labels, restarts=6), expected, atol=ROUNDING)
    assert 0 < success[0].mean() < success[best, np.arange(count)].mean() < 1
    assert success.sum(0).max() > 1  # so that the first one counts
    assert len(set(best[~success.any(0)])) > 1  # and the highest loss


def masked_model(images):
    """The runner-up, class 1, pulls harder than class 2 but stays below class 0, whatever the image.

    With ``s`` the mean of ``x - 1/2``, between -EPSILON and EPSILON: ``z = 10, 9 + 5 s, 2 - 100 s, -5``.
    """
    s = (images - 0.5).mean((1, 2, 3))
    return jnp.stack([10 + 0 * s, 9 + 5 * s, 2 - 100 * s, -5 + 0 * s], axis=-1)


@pytest.mark.slow
def test_multi_targeted_breaks_what_hides_behind_the_runner_up():
    images, labels = jnp.full((6, *SHAPE), 0.5), jnp.zeros(6, jnp.int32)
    attack = partial(attacks.pgd, threat=THREAT, **STEPS)
    ways = {
        "cross entropy": partial(attack, restarts=5),
        "margin": partial(attack, loss=attacks.negative_margin),
        "one target": partial(attacks.multi_targeted, attack=attack, targets=1),
        "all targets": partial(attacks.multi_targeted, attack=attack),
    }
    for name, way in ways.items():
        found = jax.jit(partial(way, masked_model))(jax.random.key(0), images, labels)
        logits = np.asarray(masked_model(found))
        np.testing.assert_array_equal(logits.argmax(-1), 2 if name == "all targets" else 0, name)
        if name != "all targets":
            np.testing.assert_allclose(logits[:, 1], 9.5, atol=1e-5)


@pytest.mark.slow
def test_multi_targeted_keeps_the_best_of_its_runs():
    weight = jnp.asarray(np.random.RandomState(6).randn(SIZE, 5) / 8, jnp.float32)
    logits_fn = lambda x: (x.reshape(len(x), -1) - 0.5) @ weight  # noqa: E731
    rows, (keys, images, _) = np.arange(40), batch(40)
    clean = logits_fn(images)
    labels = clean.argmax(-1)
    attack = partial(attacks.pgd, threat=ThreatModel(0.05), steps=3, step_size=0.03)
    results = []
    for rank, keys_of_run in zip((1, 2, 3), folded(keys, (1, 2, 3)), strict=True):
        target = np.argsort(-clean, axis=1)[:, rank]  # the label leads
        loss = lambda z, y, t=target: z[rows, t] - z[rows, y]  # noqa: E731
        results.append(attack(logits_fn, keys_of_run, images, labels, loss=loss))
    logits = np.stack([logits_fn(found) for found in results])
    lead = np.max(logits - 99 * np.eye(5)[labels], -1) - logits[:, rows, labels]
    expected, best = choose(np.stack(results), lead > 0, lead)
    assert set(best) >= {0, 1}
    assert 0.1 < (lead > 0).any(0).mean() < 0.9
    found = attacks.multi_targeted(logits_fn, keys, images, labels, attack=attack, targets=3)
    np.testing.assert_allclose(found, expected, atol=ROUNDING)


@pytest.mark.parametrize("scale", [0.1, 1.0, 1000.0])
def test_scaled_logits_change_what_cross_entropy_sees(scale):
    images, labels = jnp.full((6, *SHAPE), 0.5), jnp.zeros(6, jnp.int32)
    found = attacks.pgd(
        attacks.scaled(masked_model, scale), jax.random.key(0), images, labels,
        threat=THREAT, **STEPS, start=clean_start,
    )  # fmt: skip
    # Flat: the class that rises fastest. As it is: the runner-up. Saturated: nothing.
    mean = {0.1: -EPSILON, 1.0: EPSILON, 1000.0: 0.0}[scale]
    np.testing.assert_allclose(found, images + mean, atol=1e-6)


def test_targeted_margin_and_ranked_class():
    rng = np.random.RandomState(0)
    logits, labels, targets = (
        rng.randn(20, 4).astype(np.float32),
        rng.randint(0, 4, 20),
        rng.randint(0, 4, 20),
    )
    rows = np.arange(20)
    found = attacks.targeted_margin(logits, labels, targets=targets)
    np.testing.assert_array_equal(found, logits[rows, targets] - logits[rows, labels])
    ranked = jax.jit(attacks.ranked_class)
    for rank in (1, 2, 4):
        expected = np.argsort(-logits, axis=1)[:, rank - 1]
        np.testing.assert_array_equal(attacks.ranked_class(logits, rank), expected)
        np.testing.assert_array_equal(ranked(logits, jnp.int32(rank)), expected)
    assert ranked._cache_size() == 1
    tied = jnp.array([[1.0, 2.0, 2.0, 1.0]])
    assert [int(attacks.ranked_class(tied, rank)[0]) for rank in (1, 2, 3, 4)] == [1, 2, 0, 3]


@pytest.mark.parametrize("size", [lambda t: 0.01 / (1 + t), optax.cosine_decay_schedule(0.01, 3)])
def test_step_size_may_be_a_schedule(size):
    logits_fn, _ = linear_model()
    _, images, labels = batch()
    images = 0.25 + 0.5 * images
    path = attacks.pgd_path(logits_fn, images, images, labels, threat=THREAT, steps=(1, 3, 4), step_size=size)
    way = np.cumsum([float(size(t)) for t in range(4)])[[0, 2, 3]]
    np.testing.assert_allclose(np.abs(path - images[None]).max((2, 3, 4)), np.stack([way] * 6, 1), atol=1e-6)


# ---------------------------------------------------------------- shortest_adversarial


LENGTH, MAX_LENGTH = 0.1, 0.3  # of the attack, and of the search
# Distances to the boundary: misclassified; within the attack's length; beyond it; beyond the search.
TRUE_LENGTHS = np.array([-0.05, 0.003, 0.07, 0.11, 0.297, 0.31, 0.45])


def at_known_distances(norm):
    """A linear model, and images whose steepest way to its boundary meets no bound of the pixels."""
    _, weight = linear_model()
    labels = np.arange(len(TRUE_LENGTHS)) % 2
    towards = (weight[:, 1 - labels] - weight[:, labels]).T
    # The best step of length 1 is the sign or the unit vector.
    step = np.sign(towards) if norm == "linf" else towards / np.linalg.norm(towards, axis=1, keepdims=True)
    images = (0.5 - TRUE_LENGTHS[:, None] * step).reshape(-1, *SHAPE)
    assert 0.01 < images.min() < images.max() < 0.99
    logits_fn = lambda x: (x.reshape(len(x), -1) - 0.5) @ weight  # noqa: E731
    return logits_fn, jnp.asarray(images, jnp.float32), jnp.asarray(labels), step.reshape(images.shape)


@pytest.mark.slow
@each_norm
def test_shortest_adversarial_finds_the_boundary(norm):
    logits_fn, images, labels, step = at_known_distances(norm)
    threat, traces = ThreatModel(LENGTH, norm), []

    @partial(jax.jit, static_argnames="search_steps")
    def search(keys, images, labels, search_steps):
        def counted(x):
            traces.append(x)
            return logits_fn(x)

        attack = partial(attacks.pgd, threat=threat, steps=1, step_size=LENGTH, start=clean_start)
        return attacks.shortest_adversarial(
            counted, keys, images, labels,
            attack=attack, threat=threat, max_epsilon=MAX_LENGTH, search_steps=search_steps,
        )  # fmt: skip

    keys = jax.random.split(jax.random.key(0), len(images))
    made = []
    for search_steps in (4, 14):
        found, lengths = map(np.asarray, search(keys, images, labels, search_steps=search_steps))
        rounding = 10 * ROUNDING  # of the image, of the attack's length, and of 32 products in a logit
        first = np.where(TRUE_LENGTHS < LENGTH, 0.0, LENGTH)  # from where it is halved
        interval = np.where(TRUE_LENGTHS < LENGTH, LENGTH, MAX_LENGTH - LENGTH) / 2**search_steps
        expected = np.clip(TRUE_LENGTHS, 0, MAX_LENGTH)
        assert (lengths >= expected - rounding).all()
        assert (lengths <= expected + interval + rounding).all()
        halved = np.round((lengths - first) / interval)
        np.testing.assert_allclose(lengths, first + halved * interval, atol=rounding)
        np.testing.assert_allclose(lengths[TRUE_LENGTHS > MAX_LENGTH], MAX_LENGTH, rtol=1e-6)
        np.testing.assert_allclose(found, images + lengths.reshape(-1, 1, 1, 1) * step, atol=rounding)
        fooled = np.asarray(logits_fn(found)).argmax(1) != labels
        np.testing.assert_array_equal(fooled, TRUE_LENGTHS < MAX_LENGTH)
        made.append(len(traces))
    assert made[1] == 2 * made[0], "the search is unrolled"
    search(keys, images[::-1], labels[::-1], search_steps=14)
    assert search._cache_size() == 2
    gradient = jax.grad(lambda x: sum(y.sum() for y in search(keys, x, labels, search_steps=14)))(images)
    np.testing.assert_array_equal(gradient, jnp.zeros_like(images), "a gradient flows back")


@pytest.mark.slow
def test_shortest_adversarial_stays_in_bounds_and_finds_nothing_without_a_gradient():
    keys, images, labels = batch()
    constant = lambda x: jnp.eye(2)[labels]  # noqa: E731
    search = partial(attacks.shortest_adversarial, threat=THREAT, max_epsilon=2.0)
    for name in ("linf pgd clean", "linf pgd uniform"):
        attack = partial(ATTACKS[name], threat=THREAT)
        found, lengths = search(constant, keys, images, labels, attack=attack)
        np.testing.assert_array_equal(lengths, 2.0)
        assert found.min() >= 0
        assert found.max() <= 1


@pytest.mark.slow
@each_norm
def test_shortest_adversarial_takes_only_the_direction_of_an_attack_that_goes_too_far(norm):
    logits_fn, images, labels, _ = at_known_distances(norm)
    threat = ThreatModel(2 * MAX_LENGTH, norm)
    attack = partial(attacks.pgd, threat=threat, steps=1, step_size=2 * MAX_LENGTH, start=clean_start)
    keys = jax.random.split(jax.random.key(0), len(images))
    _, lengths = attacks.shortest_adversarial(
        logits_fn, keys, images, labels,
        attack=attack, threat=threat, max_epsilon=MAX_LENGTH, search_steps=14,
    )  # fmt: skip
    within = TRUE_LENGTHS < MAX_LENGTH
    assert (lengths <= MAX_LENGTH).all()
    np.testing.assert_array_equal(lengths[~within], np.float32(MAX_LENGTH))
    if norm == "l2":  # in L-infinity this attack meets the bounds of the pixels and turns
        expected = np.maximum(TRUE_LENGTHS[within], 0)
        np.testing.assert_allclose(lengths[within], expected, atol=MAX_LENGTH / 2**14 + 10 * ROUNDING)


def test_too_few_step_sizes_are_refused():
    keys, images, labels = batch()
    attack = partial(attacks.pgd, threat=THREAT, steps=1, step_size=(0.01,))
    with pytest.raises(ValueError, match=r"labels are in .*; with 1 step sizes they must be in 0\.\.0"):
        attack(lambda x: x.reshape(len(x), -1), keys, images, labels)
