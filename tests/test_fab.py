"""FAB: projections against general solvers, closed forms on linear models, invariants (fab_attack)."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
from small_network import CLASSES, SHAPE, SIZE, batch, logits_fn

from robal_jax import attacks
from robal_jax.attacks import ThreatModel, clean_start, fab_attack, starting_points
from robal_jax.attacks.threat import COMMON_NORMS

PROJECTIONS = {norm: jax.jit(project) for norm, project in fab_attack.PROJECTIONS.items()}
THREATS = {norm: ThreatModel(0.1, norm) for norm in COMMON_NORMS}
each_norm = pytest.mark.parametrize("norm", THREATS)
each_rank = pytest.mark.parametrize("rank", [2, None])
ROUNDING = 2.0**-23  # of a pixel in float32; an entry of a displacement takes a few of them


# ---------------------------------------------------------------- projections


def planes(size, count, seed=0):
    """Points, normals, offsets, and whether the plane can be reached, with every special case there is."""
    rng = np.random.RandomState(seed)
    points = rng.uniform(0, 1, (count, size))
    w = rng.randn(count, size)
    share = rng.uniform(-0.9, 0.9, count)  # of the way to the last point of the box
    points[0] = rng.randint(0, 2, size)  # a corner: half of the entries cannot move
    points[1] = points[2] = 0.25  # entries meet their bounds at once
    w[2] = -1.0
    w[3, 2:] = 0.0
    w[4] = 0.0
    share[4:9] = 0.0, 0.0, 1.7, -1.7, 0.99
    w[9, ::2] *= 1e-5
    highest, lowest = (np.sum(w * np.where(s * w > 0, 1.0, 0.0), axis=1) for s in (1, -1))
    there = np.sum(w * points, axis=1)
    b = there + np.where(share > 0, share * (highest - there), share * (there - lowest))
    return points, w, b, np.abs(share) < 1


def smallest(norm, x, w, b):
    """The norm of the smallest displacement onto a plane within [0, 1]: what a general solver finds."""
    size = len(x)
    if norm == "linf":  # minimise t subject to -t <= d <= t
        entries, column = np.eye(size), np.ones((size, 1))
        found = scipy.optimize.linprog(
            np.append(np.zeros(size), 1.0),
            A_ub=np.block([[entries, -column], [-entries, -column]]), b_ub=np.zeros(2 * size),
            A_eq=np.append(w, 0.0)[None], b_eq=[b - w @ x],
            bounds=[*zip(-x, 1 - x, strict=True), (0, None)],
        )  # fmt: skip
        assert found.success
        return found.fun
    found = scipy.optimize.minimize(
        lambda d: d @ d / 2, np.zeros(size), jac=lambda d: d, method="SLSQP", options={"ftol": 1e-15},
        bounds=np.stack([-x, 1 - x], axis=1),
        constraints={"type": "eq", "fun": lambda d: w @ (x + d) - b, "jac": lambda _: w},
    )  # fmt: skip
    assert found.success
    return np.linalg.norm(found.x)


def length(norm, d):
    return np.abs(d).max(-1) if norm == "linf" else np.linalg.norm(d, axis=-1)


@each_norm
def test_projection_is_the_smallest_displacement(norm):
    points, w, b, reachable = planes(size=7, count=24)
    with jax.enable_x64(True):
        d = np.asarray(PROJECTIONS[norm](points, w, b))
    assert d.dtype == np.float64
    assert (points + d).min() >= -1e-15
    assert (points + d).max() <= 1 + 1e-15
    np.testing.assert_array_equal(d[w == 0], 0)
    np.testing.assert_allclose(np.sum(w * (points + d), axis=1)[reachable], b[reachable], atol=1e-13)
    assert reachable.sum() == 22
    solved = np.flatnonzero(reachable & w.any(1))
    expected = [smallest(norm, points[row], w[row], b[row]) for row in solved]
    # SLSQP stops when its objective, a square, changes by less than 1e-15.
    np.testing.assert_allclose(length(norm, d)[solved], expected, atol=1e-12 if norm == "linf" else 1e-7)
    for row in np.flatnonzero(~reachable):  # the corner of the box
        sign = np.sign(b[row] - w[row] @ points[row])
        np.testing.assert_allclose((points + d)[row], sign * w[row] > 0, atol=1e-15)
    np.testing.assert_allclose(d[5], 0, atol=1e-15)  # on the plane
    assert (length(norm, d) > 0.01).sum() > 15


@each_norm
def test_projection_of_large_images_in_float32(norm):
    points, w, b, reachable = planes(size=3072, count=16)
    points, w, b = (np.float32(a) for a in (points, w, b))
    d = np.float64(PROJECTIONS[norm](points, w, b))
    with jax.enable_x64(True):
        exact = np.asarray(PROJECTIONS[norm](*(np.float64(a) for a in (points, w, b))))
    assert (np.float32(points + d) >= 0).all()
    assert (np.float32(points + d) <= 1).all()
    # The distance to the plane is a sum of 3,072 products: their roundings are shared by as many entries.
    np.testing.assert_allclose(d[reachable], exact[reachable], atol=1e-5)
    assert np.abs(exact).max() > 0.1


@each_norm
def test_projection_within_other_bounds(norm):
    points, w, b, _ = planes(size=7, count=24)
    with jax.enable_x64(True):
        d = np.asarray(PROJECTIONS[norm](points, w, b))
        moved = PROJECTIONS[norm](2 * points - 1, w, 2 * b - w.sum(1), lower=-1.0, upper=1.0)
    np.testing.assert_allclose(moved, 2 * d, atol=1e-13)


def test_weights_too_small_for_a_square_do_not_matter():
    points, w, b = np.full((2, 3), 0.5), np.array([[1.0, 1e-9, 0.0], [1e-30, -1e-20, 0.0]]), np.zeros(2)
    for dtype in (np.float32, np.float64):
        with jax.enable_x64(dtype == np.float64):
            d = PROJECTIONS["l2"](*(dtype(a) for a in (points, w, b)))
        np.testing.assert_allclose(d, [[-0.5, 0, 0], [0, 0, 0]], atol=1e-8)


def test_every_common_norm_has_a_projection():
    assert fab_attack.PROJECTIONS.keys() == set(COMMON_NORMS)


# ---------------------------------------------------------------- linear models


def linear_model():
    """Logits of four classes, whose gradients are not of one size, and grey images of the class 0."""
    rng = np.random.RandomState(0)
    w = rng.randn(CLASSES, SIZE) * np.array([[0.1], [0.2], [1.0], [1.0]])
    bias = np.array([0.6, 0.3, 0.0, -0.3])
    images = rng.uniform(0.47, 0.53, (8, *SHAPE))
    logits_fn = lambda x: (x.reshape(len(x), -1) - 0.5) @ w.T.astype(x.dtype) + bias.astype(x.dtype)[None]  # noqa: E731
    assert (np.asarray(logits_fn(images)).argmax(1) == 0).all()
    return logits_fn, w, images


@pytest.mark.slow
@each_norm
def test_linear_model_is_left_by_the_shortest_way(norm):
    logits_fn, w, images = linear_model()
    threat, labels = THREATS[norm], np.zeros(len(images), int)
    logits, normals = logits_fn(images), w[1:] - w[0]
    dual = np.abs(normals).sum(1) if norm == "linf" else np.linalg.norm(normals, axis=1)
    distances = (logits[:, :1] - logits[:, 1:]) / dual[None]  # to each class; no bound is met on the way
    shortest = distances.min(1)
    assert shortest.max() < 0.4
    with jax.enable_x64(True):
        attack = jax.jit(functools.partial(attacks.fab, logits_fn, None, images, labels, threat=threat))
        found = {rank: np.asarray(threat.distance(attack(rank=rank), images)) for rank in (2, 3, 4)}
        nearest = np.asarray(threat.distance(attack(), images))
    # A step of 1.05 displacements from 0.9 of the distance ends about 0.5 % behind the boundary.
    assert (nearest >= shortest).all()
    np.testing.assert_allclose(nearest, shortest, rtol=0.01)
    order = np.argsort(-logits[:, 1:], axis=1)
    for rank, lengths in found.items():
        aimed = distances[np.arange(len(images)), order[:, rank - 2]]
        assert (lengths >= shortest).all()
        assert (lengths <= 1.01 * aimed).all()
    # The second class is not the nearest: the two kinds of runs differ.
    assert (order[:, 0] == 0).all()
    assert (nearest < 0.9 * found[2]).any()


# ---------------------------------------------------------------- a network


@functools.cache
def attack(norm, targeted):
    """FAB on the network, compiled once for all tests: images, labels, start, rank, steps to images."""

    @jax.jit
    def run(images, labels, start, rank, n_iter):
        rank = rank if targeted else None
        return attacks.fab(
            logits_fn, None, images, labels, threat=THREATS[norm], rank=rank, n_iter=n_iter, start=start
        )

    return run


def closest(norm, rank, images=None, labels=None, start=None, n_iter=100):
    images, labels = (batch()[0] if images is None else images), (batch()[1] if labels is None else labels)
    start = images if start is None else start
    return np.asarray(attack(norm, rank is not None)(images, labels, start, rank or 2, n_iter))


def distances(norm, found, images=None):
    images = batch()[0] if images is None else images
    return length(norm, (np.float64(found) - np.float64(images)).reshape(len(found), -1))


@pytest.mark.slow
@each_rank
@each_norm
def test_invariants(norm, rank):
    images, labels = batch()
    found = closest(norm, rank)
    assert found.shape == images.shape
    assert found.dtype == images.dtype == jnp.float32
    assert found.min() >= 0
    assert found.max() <= 1
    fooled = np.asarray(logits_fn(found).argmax(-1) != labels)
    assert fooled.all(), "nothing found"
    np.testing.assert_array_equal(found[-2:], images[-2:], "a misclassified clean image was changed")
    assert (distances(norm, found)[:-2] > 0.001).all()

    np.testing.assert_array_equal(closest(norm, rank), found, "not deterministic")


@each_rank
@each_norm
def test_an_image_does_not_depend_on_the_others(norm, rank):
    images, labels = batch()
    found = closest(norm, rank)
    others = jnp.flip(images, axis=(1, 2)).at[::2].set(images[::2])
    mixed = closest(norm, rank, others, labels.at[1::2].set(0))
    np.testing.assert_array_equal(mixed[::2], found[::2])
    assert (np.abs(mixed - found).max((1, 2, 3))[1::2] > 0.001).all()


def test_bounds_of_the_threat_model():
    images, labels = batch()
    wide = attacks.fab(
        lambda x: logits_fn((x + 1) / 2), None, 2 * images - 1, labels,
        threat=ThreatModel(0.2, "linf", -1.0, 1.0), n_iter=5,
    )  # fmt: skip
    np.testing.assert_allclose(wide, 2 * closest("linf", None, n_iter=5) - 1, atol=1e-5)
    assert wide.min() == -1


def test_no_gradient_flows_back():
    images, labels = batch()
    gradient = jax.grad(
        lambda x: attacks.fab(logits_fn, None, x, labels, threat=THREATS["l2"], n_iter=2).sum()
    )
    np.testing.assert_array_equal(gradient(images), jnp.zeros_like(images))


@pytest.mark.slow
@each_norm
def test_closer_than_pgd(norm):
    """Even than the boundary on the way to where PGD ends."""
    images, labels = (a[:-2] for a in batch())
    threat = ThreatModel({"linf": 0.5, "l2": 2.0}[norm], norm)
    pgd = functools.partial(
        attacks.pgd, threat=threat, steps=20, step_size=threat.epsilon / 8, start=clean_start
    )
    found, shortest = attacks.shortest_adversarial(
        logits_fn, jax.random.key(0), images, labels, attack=pgd, threat=threat, max_epsilon=threat.epsilon
    )
    assert (logits_fn(found).argmax(-1) != labels).all()
    ours = distances(norm, closest(norm, None))[:-2]
    assert (ours < 0.95 * shortest).all()


@each_norm
def test_more_steps_are_never_worse(norm):
    lengths = [distances(norm, closest(norm, 2, n_iter=n_iter))[:-2] for n_iter in (5, 20, 100)]
    for fewer, more in itertools.pairwise(lengths):
        assert (more <= fewer).all()
    assert (lengths[-1] < lengths[0]).any()


@each_norm
def test_nearest_class_against_all_ranks(norm):
    best = np.min([distances(norm, closest(norm, rank)) for rank in (2, 3, 4)], axis=0)[:-2]
    nearest = distances(norm, closest(norm, None))[:-2]
    np.testing.assert_allclose(nearest.mean(), best.mean(), rtol=0.05)
    assert nearest.mean() < 0.98 * distances(norm, closest(norm, 2))[:-2].mean()


@each_norm
def test_one_compilation_for_all_ranks(norm):
    for rank in (2, 3, 4):
        closest(norm, rank)
    assert attack(norm, True)._cache_size() == 1


# ---------------------------------------------------------------- starts and edges


@each_norm
def test_random_start(norm):
    images, labels = batch()
    threat = ThreatModel(0.2, norm)
    keys = jax.random.split(jax.random.key(0), len(images))
    random_start = jax.jit(functools.partial(starting_points, fab_attack.fab_start, threat=threat))
    start = random_start(keys, images)
    assert start.min() >= 0
    assert start.max() <= 1
    assert (distances(norm, start) <= 0.1 + ROUNDING).all()
    grey = jnp.full_like(images, 0.5)  # meets no bound
    noise = random_start(keys, grey)
    np.testing.assert_allclose(distances(norm, noise, grey), 0.1, atol=4 * ROUNDING)
    assert len({row.tobytes() for row in np.asarray(noise)}) == len(images), "images share their noise"
    assert np.sign(noise - 0.5).mean() == pytest.approx(0, abs=4 / np.sqrt(noise.size))

    found = closest(norm, 2, start=start)
    assert (logits_fn(found).argmax(-1) != labels).all()
    np.testing.assert_array_equal(found[-2:], images[-2:])
    assert (found[:-2] != closest(norm, 2)[:-2]).any((1, 2, 3)).all()
    np.testing.assert_allclose(distances(norm, found), distances(norm, closest(norm, 2)), rtol=0.2)


@pytest.mark.parametrize(("norm", "rank"), [("linf", 2), ("l2", None)])
def test_a_constant_model_leaves_the_images_as_they_are(norm, rank):
    images, _ = batch()
    constant = lambda x: 0.0 * x.reshape(len(x), -1)[:, :CLASSES] + jnp.arange(4.0)[None]  # noqa: E731
    labels, threat = jnp.full(len(images), 3), THREATS[norm]
    found = attacks.fab(constant, None, images, labels, threat=threat, rank=rank, n_iter=3)
    np.testing.assert_array_equal(found, images)


@pytest.mark.parametrize("rank", [1, CLASSES + 1])
def test_rank_out_of_range_is_refused(rank):
    images, labels = batch()
    with pytest.raises(ValueError, match=rf"rank is {rank}; with 4 classes it must be in 2\.\.4"):
        attacks.fab(logits_fn, None, images, labels, threat=THREATS["linf"], rank=rank)
