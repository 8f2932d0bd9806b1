"""L1: the projection by its optimality, sparse steps, AutoPGD against a loop in NumPy, what else refuses."""

import functools
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_autopgd import CLASSES, COUNT, SIZE, batch, logits_fn, numpy_model

import robal_jax
from robal_jax import attacks, losses
from robal_jax.attacks import ThreatModel, autoattack, starting_points, uniform_start
from robal_jax.attacks.l1 import changed, project, sparse_direction
from robal_jax.attacks.sparse_autopgd import schedule, sparse_search, sparse_start
from robal_jax.attacks.threat import departure
from robal_jax.errors import InputError

RADIUS, STEPS = 0.4, 60
THREAT = ThreatModel(RADIUS, "l1")
# x + d is rounded once to float32, by 2^-25 for what is below 1, and the sum that the search measures at each
# of its terms.
ROUNDING = SIZE * (2.0**-25 + RADIUS * 2.0**-24)
LOSSES = {"ce": losses.cross_entropy, "dlr": attacks.dlr}


# ---------------------------------------------------------------- projection


def problems(count=60, size=40):
    """Candidates far and near, images with pixels at the bounds, and radii; the first need no projection."""
    rng = np.random.RandomState(0)
    images = np.clip(rng.uniform(-0.3, 1.3, (count, size)), 0, 1)
    candidates = images + rng.standard_cauchy((count, size)) * rng.choice([0.01, 0.1, 1], (count, 1))
    candidates[:, :5] = images[:, :5]
    radii = np.where(np.arange(count) < 5, size, rng.uniform(0.01, 3, count))
    return candidates, images, radii


def farthest_along(direction, image, radius):
    """``max <direction, q - image>`` over the images ``q`` of the ball and the bounds.

    The ball is filled in the order of the entries' sizes, each up to its bound.
    """
    gain, room = np.abs(direction), np.where(direction > 0, 1 - image, image)
    order = np.argsort(-gain)
    before = np.concatenate([[0], np.cumsum(room[order])[:-1]])
    return np.sum(gain[order] * np.clip(radius - before, 0, room[order]))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_projection_is_the_nearest_point(dtype):
    """``p`` of a convex set is the one nearest to ``z`` if and only if ``<z - p, q - p> <= 0`` for all q."""
    candidates, images, radii = (values.astype(dtype) for values in problems())
    with jax.enable_x64(dtype == np.float64):
        found = project(*map(jnp.asarray, (candidates, images, radii[:, None])), 0.0, 1.0)
        assert found.dtype == dtype
    points, size, unit = np.float64(found), images.shape[1], np.finfo(dtype).eps
    assert points.min() >= 0
    assert points.max() <= 1
    np.testing.assert_array_equal(found[:, :5], images[:, :5])
    inside = 0
    for z, x, p, radius in zip(np.float64(candidates), np.float64(images), points, radii, strict=True):
        length, farthest = np.abs(p - x).sum(), np.abs(z - x).max()
        assert length <= radius + size * (1 + radius) * unit
        inside += length < 0.9 * radius
        # The multiplier is at most farthest * unit / 2 too large, and never above farthest. The rest is
        # rounding: of each entry, of its product with z - p, and of the length by up to size * radius * unit.
        gap = farthest_along(z - p, x, radius) - (z - p) @ (p - x)
        assert gap <= size * farthest * (farthest / 2 + 2 + radius) * unit
    assert 5 <= inside < len(points) / 2, "too few need a projection, or too many"


def test_clipping_twice_is_no_projection():
    candidates, images = np.array([[0.8, 0.5, 1.9]]), np.array([[0.5, 0.5, 0.9]])
    nearest = ThreatModel(0.3, "l1").project(jnp.asarray(candidates), jnp.asarray(images))
    np.testing.assert_allclose(nearest, [[0.7, 0.5, 1.0]], rtol=1e-6)
    in_ball = numpy_project(candidates, images, 0.3, lower=-9.0, upper=9.0)
    assert np.abs(np.clip(in_ball, 0, 1) - images).sum() < 0.2


@pytest.mark.slow
def test_one_radius_per_image_and_distances():
    candidates, images, _ = map(jnp.asarray, problems(4))
    radii = jnp.array([0.5, 1.0, 1.5, 2.0])
    threat = ThreatModel((0.5, 1.0, 1.5, 2.0), "l1").of(jnp.arange(4))
    found = threat.project(candidates, images)
    alone = jax.jit(project)
    for i in range(4):
        own = alone(candidates[i : i + 1], images[i : i + 1], radii[i], 0.0, 1.0)
        np.testing.assert_allclose(found[i], own[0], atol=1e-6)
    np.testing.assert_allclose(threat.distance(found, images)[1:], radii[1:], rtol=1e-5)


def test_projected_images_are_allowed():
    """The rounding of all pixels adds up: these are of CIFAR's size."""
    images = jax.random.uniform(jax.random.key(0), (8, 32, 32, 3))
    candidates = images + 0.05 * jnp.sign(jax.random.normal(jax.random.key(1), images.shape))
    for epsilon in (1.0, 12.0):
        threat = ThreatModel(epsilon, "l1")
        found = threat.project(candidates, images)
        reach = threat.distance(found, images), threat.outside(found), images[0].size
        assert departure(threat, *reach) == ""
        assert departure(ThreatModel(0.998 * epsilon, "l1"), *reach)


def test_what_left_the_threat_model_is_named():
    """Not an image that is farther, and allowed to be."""
    reach = np.array([0.3, 0.45]), np.zeros(2)
    assert departure(ThreatModel(np.array([0.1, 0.5])), *reach) == "distance 0.3"
    assert departure(ThreatModel(0.1), np.array([0.3, np.nan]), np.zeros(2)) == "distance nan"


def test_images_in_float32_and_logits_in_float64():
    with jax.enable_x64(True):
        weights = jnp.asarray(np.eye(4) - 0.5)
        images, labels = jnp.full((3, 2, 2, 1), 0.5, jnp.float32), jnp.array([0, 1, 2])
        found = attacks.apgd(
            lambda x: x.reshape(len(x), 4) @ weights,
            jax.random.key(0),
            images,
            labels,
            threat=ThreatModel(1.0, "l1"),
            steps=4,
        )
        assert found.dtype == images.dtype


# ---------------------------------------------------------------- steps and starts


@pytest.mark.slow
def test_sparse_steps_take_the_largest_entries():
    gradient = np.random.RandomState(1).randn(5, 2, 3, 4).astype(np.float32)
    entries = np.array([1, 2, 7, 23, 24])
    steps = np.asarray(sparse_direction(jnp.asarray(gradient), jnp.asarray(entries)))
    for g, step, count in zip(gradient.reshape(5, -1), steps.reshape(5, -1), entries, strict=True):
        largest = np.argsort(-np.abs(g))[:count]
        assert set(np.flatnonzero(step)) == set(largest)
        np.testing.assert_allclose(step[largest], np.sign(g[largest]) / count, rtol=1e-6)
    np.testing.assert_array_equal(sparse_direction(jnp.zeros((1, 3)), jnp.array([2])), 0)
    np.testing.assert_array_equal(THREAT.ascent_direction(jnp.asarray(gradient))[0], steps[0])


@pytest.mark.slow
def test_uniform_start_fills_the_ball():
    """Of a point uniform in a ball of n dimensions, its length to the power of n is uniform in [0, 1]."""
    images = jnp.full((2000, 1, 1, 3), 0.5)
    start = starting_points(uniform_start, jax.random.key(0), images, THREAT)
    volume = (np.abs(np.float64(start) - 0.5).sum((1, 2, 3)) / RADIUS) ** 3
    assert volume.max() <= 1 + 1e-5
    five_errors = 5 * np.sqrt(1 / 12 / len(volume))
    assert abs(volume.mean() - 0.5) < five_errors
    assert abs((start > 0.5).mean() - 0.5) < 5 * np.sqrt(1 / 4 / start.size)


@pytest.mark.parametrize("steps", [2, 5, 10, 33, 100, 1000])
def test_schedule_is_the_released_one(steps):
    lengths = [math.ceil(0.3 * steps), math.ceil(0.3 * steps)]
    lengths.append(steps - sum(lengths))
    looks = schedule(steps)
    np.testing.assert_array_equal(np.bincount(looks.factor, minlength=4)[:0:-1], np.array(lengths) + 1)
    starts = np.flatnonzero(looks.first)
    np.testing.assert_array_equal(starts, np.cumsum([0, *np.array(lengths[:2]) + 1]))
    for start, length in zip(starts, lengths, strict=True):
        every = max(int(0.04 * length), 1)
        checks = np.flatnonzero(looks.check[start : start + length + 1])
        np.testing.assert_array_equal(checks, np.arange(every, length + 1, every))


# ---------------------------------------------------------------- the search, against a loop in NumPy


def numpy_project(candidate, image, radius, lower=0.0, upper=1.0):
    """The multiplier is interpolated between those of its kinks that it lies between."""
    delta = candidate - image
    size, room = np.abs(delta), np.where(delta > 0, upper - image, image - lower)
    kinks = np.unique(np.maximum([*size.ravel(), *(size - room).ravel(), 0], 0))
    length = np.array([np.clip(size - kink, 0, room).sum() for kink in kinks])
    by = np.interp(-radius, -length, kinks) if length[0] > radius else 0.0
    return image + np.sign(delta) * np.clip(size - by, 0, room)


def numpy_sparse_apgd(start, image, label, name):
    """L1-APGD with three radii on one image, with the constants of the reference implementation."""
    best, lengths = (None, start), (math.ceil(0.3 * STEPS), math.ceil(0.3 * STEPS))
    path, sizes = [], set()
    for factor, length in zip((3, 2, 1), (*lengths, STEPS - sum(lengths)), strict=True):
        radius = factor * RADIUS
        x = numpy_project(best[1], image, radius)
        z, loss, gradient = numpy_model(x, label, name)
        path.append(x)
        best, last = (loss, x, gradient), x if z.argmax() != label else None
        before, size, window = np.sum(x != image), radius, max(int(0.04 * length), 1)
        for number in range(1, length + 1):
            entries = max(math.ceil(round(before / 1.5, 6)), 1)
            largest = np.argsort(-np.abs(gradient), axis=None)[:entries]
            step = np.zeros(SIZE)
            step[largest] = np.sign(gradient.ravel()[largest]) / entries
            x = numpy_project(x + size * step.reshape(x.shape), image, radius)
            z, loss, gradient = numpy_model(x, label, name)
            path.append(x)
            last = last if z.argmax() == label else x
            best = (loss, x, gradient) if loss > best[0] else best
            if number % window == 0:
                now = np.sum(best[1] != image)
                if now / before < 0.95:
                    size, (_, x, gradient) = radius, best
                else:
                    size = max(size / 1.5, radius / 10)
                sizes.add(size / radius)
                before = now
    return np.stack(path), best, last, sizes


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ce", pytest.param("dlr", marks=pytest.mark.slow)])
def test_search_is_the_published_one(name):
    keys, images, labels = batch()
    start = np.float64(starting_points(sparse_start, keys, images, THREAT))
    with jax.enable_x64(True):
        inputs = jnp.asarray(start), jnp.asarray(np.float64(images)), jnp.asarray(labels)
        search = partial(sparse_search, logits_fn, threat=THREAT, steps=STEPS, loss=LOSSES[name])
        state, path = jax.jit(partial(search, observe=lambda x, _: x))(*inputs)
    assert path.dtype == np.float64
    sizes, fooled = set(), []
    for i in range(COUNT):
        expected, best, last, seen = numpy_sparse_apgd(start[i], np.float64(images[i]), int(labels[i]), name)
        np.testing.assert_allclose(path[:, i], expected, atol=1e-9)
        np.testing.assert_allclose(state.best[i], best[1], atol=1e-9)
        assert state.best_loss[i] == pytest.approx(best[0])
        fooled.append(last is not None)
        assert bool(state.robust[i]) != fooled[-1]
        if last is not None:
            np.testing.assert_allclose(state.adversarial[i], last, atol=1e-9)
        sizes |= seen
    assert len(sizes) > 3, "all steps are of the same length"
    assert 0 < sum(fooled) < COUNT


# ---------------------------------------------------------------- the attack


@functools.cache
def attack():
    return jax.jit(partial(attacks.apgd, logits_fn, threat=THREAT, steps=STEPS))


@pytest.mark.slow
def test_apgd_stays_in_the_ball_and_an_image_s_result_is_its_own():
    keys, images, labels = batch()
    found = attack()(keys, images, labels)
    assert np.abs(np.float64(found) - np.float64(images)).sum((1, 2, 3)).max() <= RADIUS + ROUNDING
    assert found.min() >= 0
    assert found.max() <= 1
    assert changed(found, images).max() < SIZE
    wrong = logits_fn(found).argmax(-1) != labels
    assert (logits_fn(images).argmax(-1) != labels).sum() < wrong.sum() < COUNT
    turned = attack()(keys[::-1], images[::-1], labels[::-1])[::-1]
    np.testing.assert_array_equal(turned, found)
    assert not np.array_equal(attack()(keys[::-1], images, labels), found), "the keys are not read"


@pytest.mark.slow
def test_autoattack_in_l1():
    keys, images, labels = batch()
    run = partial(robal_jax.autoattack, logits_fn, keys, images, labels, threat=THREAT, steps=10)
    found = run(version="robal_aa")
    assert list(found.robust) == ["clean", "apgd_ce", "apgd_t"]
    assert found.robust["apgd_t"].sum() < found.robust["clean"].sum()
    distance = np.abs(np.float64(found.images) - np.float64(images)).sum((1, 2, 3))
    assert distance.max() <= RADIUS + ROUNDING
    rounds = [(stage.name, stage.rounds) for stage in autoattack.stages("robal_aa", 10, threat=THREAT)]
    assert rounds == [("apgd_ce", 5), ("apgd_t", 5)]
    with pytest.raises(
        InputError, match="the norm is l1, which is not supported by fab_t, square; use apgd, or"
    ):
        run(version="standard")
    with pytest.raises(ValueError, match="steps is 1; it must be at least 2"):
        run(version="apgd_ce", steps=1)


OTHERS = {
    "pgd": partial(attacks.pgd, steps=2, step_size=0.1),
    "fab": attacks.fab,
    "square": attacks.square,
    "pma": attacks.pma,
    "malt_apgd": attacks.malt_apgd,
    "fmn": attacks.fmn,
    "shortest_adversarial": partial(attacks.shortest_adversarial, attack=attacks.pgd, max_epsilon=1.0),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_attacks_refuse_l1(name):
    keys, images, labels = batch()
    with pytest.raises(ValueError, match="the norm is l1, which this attack does not support; use apgd, or"):
        OTHERS[name](logits_fn, keys, images, labels, threat=THREAT)


def test_the_evaluation_refuses_l1():
    _, images, labels = batch()
    with pytest.raises(ValueError, match="the norm is l1, which this attack does not support; use apgd, or"):
        robal_jax.evaluate_model(logits_fn, images, labels, threat=THREAT)
    assert labels.max() < CLASSES
