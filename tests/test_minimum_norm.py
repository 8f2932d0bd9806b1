"""FMN and DDN: linear models, saturated logits, loops in NumPy, invariants on a network (minimum_norm)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_network import CLASSES, SHAPE, SIZE, batch, logits_fn

from robal_jax import attacks, distances, losses
from robal_jax.attacks import ThreatModel

STEPS = 100
SEARCHES = {
    "fmn, linf": (attacks.fmn, ThreatModel(0.1)),
    "fmn, l2": (attacks.fmn, ThreatModel(0.1, "l2")),
    "ddn": (attacks.ddn, ThreatModel(0.1, "l2")),
}
each_search = pytest.mark.parametrize("name", SEARCHES)
ROUNDING = 2.0**-23  # of a pixel in float32
# FMN's radius crosses a boundary outwards at least once in the last five steps, and is then at most so much
# too long: gamma_t for the default gamma.
LAST_GROWTH = 0.001 + 0.049 * (1 + np.cos(np.pi * (STEPS - 5) / STEPS)) / 2


def run(name, model, images, labels, **settings):
    search, threat = SEARCHES[name]
    settings = {"threat": threat, "n_iter": STEPS} | settings
    return jax.jit(functools.partial(search, model, None, **settings))(images, labels)


# ---------------------------------------------------------------- linear models


def linear_model(scale=1.0):
    """Logits of two classes, grey images of class 0, their margins, and the normal of the boundary."""
    rng = np.random.RandomState(0)
    w = rng.choice([-1.0, 1.0], SIZE) * rng.uniform(0.5, 1.5, SIZE)
    images = rng.uniform(0.45, 0.55, (8, *SHAPE))

    def logits_fn(x):
        lead = (x.reshape(len(x), -1) - 0.5) @ jnp.asarray(w, x.dtype) - 1
        return scale * jnp.stack([jnp.zeros_like(lead), lead], -1)

    return logits_fn, images, 1 - (images.reshape(8, -1) - 0.5) @ w, w


@each_search
def test_linear_model_is_left_by_the_shortest_way(name):
    logits_fn, images, margins, w = linear_model()
    exact = margins / (np.abs(w).sum() if name == "fmn, linf" else np.linalg.norm(w))
    with jax.enable_x64(True):
        closest = jax.tree.map(np.asarray, run(name, logits_fn, images, np.zeros(8, int)))
    assert closest.found.all()
    assert closest.distance.dtype == np.float64
    assert (closest.distance >= exact * (1 - 1e-12)).all()
    # DDN's radii around the boundary fall by 1 - gamma^2 per two steps, until one lies within.
    longest = 1 / (1 - 0.05**2) if name == "ddn" else 1 + LAST_GROWTH
    assert (closest.distance <= exact * longest).all()


@pytest.mark.slow
@each_search
def test_saturated_logits_do_not_hold_a_search_up(name):
    (plain, images, *_), (steep, *_) = linear_model(), linear_model(2.0**14)
    images, labels = jnp.asarray(images, jnp.float32), jnp.zeros(8, int)
    gradient = jax.grad(lambda x: losses.cross_entropy(steep(x), labels).sum())(images)
    assert not gradient.any(), "the softmax is not saturated"
    found, expected = (run(name, model, images, labels) for model in (steep, plain))
    assert expected.found.all()
    np.testing.assert_array_equal(found.distance, expected.distance)


def two_classes(x):
    lead = x.reshape(-1) - 0.5
    return jnp.stack([-lead, lead], -1)


TIED = {
    "tied": two_classes,
    "tied but for a rounding": lambda x: 1e3 * two_classes(x) + jnp.array([[1e-6, 0]]),
    "rounded": lambda x: (two_classes(x) + 3).astype(jnp.bfloat16),
}


@pytest.mark.slow
@pytest.mark.parametrize("tie", TIED)
@each_search
def test_tied_logits_do_not_hold_a_search_up(name, tie):
    """The linear model has the image on the boundary already, and would not move it."""
    images = jnp.full((1, 1, 1, 1), 0.5)
    assert TIED[tie](images).argmax(-1) == 0
    closest = run(name, TIED[tie], images, jnp.array([0]))
    assert closest.found.all()
    assert 0 < closest.distance[0] < 0.012  # bfloat16 has steps of 1/64 here


@each_search
def test_logits_that_are_not_finite_are_no_success(name):
    """They are shown where nothing else is met, so that whoever looks at the logits sees them."""

    def model(x):
        return jnp.where(x.reshape(len(x), -1) > 0.3, jnp.nan, -two_classes(x))

    images = jnp.array([0.2, 0.7]).reshape(2, 1, 1, 1)
    closest = run(name, model, images, jnp.array([1, 0]))
    assert not closest.found.any()
    assert (closest.distance == jnp.inf).all()
    assert jnp.isnan(model(closest.images)).all()


# ---------------------------------------------------------------- against loops in NumPy


FEW = 7  # steps
SETTINGS = {
    "fmn, linf": {"step_size": 0.12, "gamma": 0.3},
    "fmn, l2": {"step_size": 0.1, "gamma": 0.3},
    "ddn": {"step_size": 0.3, "gamma": 0.5, "init_norm": 3.0},
}
# In each step the network and its gradient are sums of at most 32 terms, each rounded by 2^-53 of numbers
# about 1. If a start moves, the end moves at most 20 times as far: measured with random moves of 1e-9.
ROUNDING_64 = 20 * FEW * 2 * SIZE * 2.0**-53  # 1e-12


def length(norm, delta):
    return np.abs(delta).max(-1) if norm == "linf" else np.linalg.norm(delta, axis=-1)


@functools.cache
def linearised():
    """A function from one image, flat, to its logits and their Jacobian."""

    def of_one(x):
        return logits_fn(x.reshape(1, *SHAPE))[0]

    return jax.jit(lambda x: (of_one(x), jax.jacrev(of_one)(x)))


def half_cosine(first, last, t):
    return last + (first - last) * (1 + np.cos(np.pi * t / FEW)) / 2


def numpy_fmn(norm, image, label, x, logits, jacobian, radius, best, t, *, step_size=1.0, gamma=0.05):
    """One step: the equations of ``attacks.fmn``."""
    rival = max(set(range(CLASSES)) - {label}, key=lambda i: logits[i])
    lead, gradient = logits[label] - logits[rival], jacobian[rival] - jacobian[label]
    change = half_cosine(gamma, 0.001, t)
    if lead < 0:
        radius = min((1 - change) * radius, best)
    else:
        radius = (1 + change) * radius
        if best == np.inf:
            dual_norm = np.linalg.norm(gradient, ord=1 if norm == "linf" else 2)
            radius = max(radius, length(norm, x - image) + abs(lead) / dual_norm)
    alpha = half_cosine(step_size, step_size / 100, t)
    delta = x + alpha * gradient / np.linalg.norm(gradient) - image
    if norm == "linf":
        delta = np.clip(delta, -radius, radius)
    else:
        delta *= min(1, radius / np.linalg.norm(delta))
    return np.clip(image + delta, 0, 1), radius


def numpy_ddn(norm, image, label, x, logits, jacobian, radius, best, t, *, step_size=1.0, gamma=0.05):
    """One step: the equations of ``attacks.ddn``; no radius is longer than the way to the farthest image."""
    softmax = np.exp(logits) / np.exp(logits).sum()
    gradient = (softmax - np.eye(CLASSES)[label]) @ jacobian  # of the cross entropy
    radius *= 1 - gamma if logits.argmax() != label else 1 + gamma
    radius = min(radius, length(norm, np.maximum(image, 1 - image)))
    u = x + half_cosine(step_size, step_size / 100, t) * gradient / np.linalg.norm(gradient) - image
    return np.clip(image + radius * u / np.linalg.norm(u), 0, 1), radius


def numpy_search(name, image, label, init_norm=1.0, **settings):
    """The closest misclassified image of one image, its distance, and how close the closest decision was.

    Decisions: which class leads, which of the others does, and which of two misclassified images is closer.
    """
    norm = SEARCHES[name][1].norm
    move, radius = (numpy_ddn, init_norm) if name == "ddn" else (numpy_fmn, 0.0)
    x, closest, best, calls = image, image, np.inf, []
    for t in range(FEW + 1):
        logits, jacobian = map(np.asarray, linearised()(x))
        *_, second, first = np.sort(np.delete(logits, label))
        calls += [abs(logits[label] - first), first - second]
        if logits[label] < first:
            way = length(norm, x - image)
            calls += [abs(way - best)] if best > 0 else []
            closest, best = (x, way) if way < best else (closest, best)
        if t < FEW:
            x, radius = move(norm, image, label, x, logits, jacobian, radius, best, t, **settings)
    return closest, best, min(calls)


@pytest.mark.slow
@pytest.mark.parametrize("settings", ["defaults", "others"])
@each_search
def test_search_is_the_published_one(name, settings):
    chosen = SETTINGS[name] if settings == "others" else {}
    images, labels = (np.asarray(values) for values in batch())
    images = np.float64(images)
    with jax.enable_x64(True):
        found = jax.tree.map(np.asarray, run(name, logits_fn, images, labels, n_iter=FEW, **chosen))
        flat = images.reshape(len(images), -1)
        loops = [numpy_search(name, *pair, **chosen) for pair in zip(flat, labels.tolist(), strict=True)]
    closest, distance, calls = (np.stack(values) for values in zip(*loops, strict=True))
    assert calls.min() > 1e4 * ROUNDING_64, "rounding decides"
    assert found.images.dtype == found.distance.dtype == np.float64
    np.testing.assert_array_equal(found.found, distance < np.inf)
    np.testing.assert_allclose(found.distance, distance, rtol=0, atol=ROUNDING_64)
    np.testing.assert_allclose(found.images, closest.reshape(images.shape), rtol=0, atol=ROUNDING_64)


@each_search
def test_no_radius_is_longer_than_the_way_to_the_farthest_image(name):
    """By the gradient at the image the boundary is outside of the bounds; a bend brings it inside."""

    def bent(x):
        x = x.reshape(-1)
        lead = 1e-3 * (x - 0.5) - 6e-4 + jnp.maximum(x - 0.8, 0)
        return jnp.stack([-lead, lead], -1)

    image, settings = jnp.full((1, 1, 1, 1), 0.5), {"init_norm": 10.0} if name == "ddn" else {}
    closest = run(name, bent, image, jnp.array([0]), n_iter=2, gamma=0.2, **settings)
    # The first step ends at the bound, 0.5 away; the second shortens the way by gamma_1.
    gamma = 0.2 if name == "ddn" else (0.2 + 0.001) / 2
    np.testing.assert_allclose(closest.distance, 0.5 * (1 - gamma), rtol=0, atol=ROUNDING)


# ---------------------------------------------------------------- a network


@functools.cache
def compiled(name):
    search, threat = SEARCHES[name]
    return jax.jit(functools.partial(search, logits_fn, None, threat=threat, n_iter=STEPS))


@each_search
def test_invariants(name):
    images, labels = batch()
    closest, threat = compiled(name)(images, labels), SEARCHES[name][1]
    assert closest.images.shape == images.shape
    assert closest.images.dtype == closest.distance.dtype == jnp.float32
    assert closest.images.min() >= 0
    assert closest.images.max() <= 1
    assert closest.found.all()
    assert (logits_fn(closest.images).argmax(-1) != labels).all()
    delta = (np.float64(closest.images) - np.float64(images)).reshape(len(images), -1)
    # The squares of the pixels' roundings add up.
    np.testing.assert_allclose(closest.distance, length(threat.norm, delta), atol=ROUNDING * SIZE**0.5)
    np.testing.assert_array_equal(closest.distance == 0, np.arange(12) >= 10)
    np.testing.assert_array_equal(closest.images[-2:], images[-2:])


@each_search
def test_an_image_does_not_depend_on_the_others(name):
    images, labels = batch()
    closest = compiled(name)(images, labels)
    others = jnp.flip(images, axis=(1, 2)).at[::2].set(images[::2])
    mixed = compiled(name)(others, labels.at[1::2].set(0))
    for one, other in zip(closest, mixed, strict=True):
        np.testing.assert_array_equal(other[::2], one[::2])
    assert (mixed.distance != closest.distance)[1::2].any()
    assert compiled(name)._cache_size() == 1


@pytest.mark.slow
@each_search
def test_closer_than_the_boundary_on_the_way_of_pgd(name):
    images, labels = (values[:-2] for values in batch())
    norm = SEARCHES[name][1].norm
    threat = ThreatModel({"linf": 0.5, "l2": 2.0}[norm], norm)
    pgd = functools.partial(
        attacks.pgd, threat=threat, steps=20, step_size=threat.epsilon / 8, start=attacks.clean_start
    )
    shortest = attacks.shortest_adversarial(
        logits_fn, jax.random.key(0), images, labels, attack=pgd, threat=threat, max_epsilon=threat.epsilon
    )[1]
    ours = compiled(name)(*batch()).distance[:-2]
    assert (ours < shortest).all()
    # FAB minimises the same distance. Its images are misclassified, so none lies before the boundary that it
    # found. Ours lie behind it by one growth of the radius at most: the radius before did not cross it.
    fab = threat.distance(attacks.fab(logits_fn, None, images, labels, threat=threat), images)
    assert (ours <= fab * (1 + (0.05 if name == "ddn" else LAST_GROWTH))).all()


@each_search
def test_distances_make_a_curve(name):
    images, labels = batch()
    found = compiled(name)(images, labels).distance
    epsilons = np.linspace(0, 2, 50)
    curve = distances.robust_accuracy_curve(found, epsilons)
    assert curve[0] == 10 / 12  # the clean accuracy
    assert (np.diff(curve) <= 0).all()
    assert curve[-1] == 0


@each_search
def test_bounds_of_the_threat_model(name):
    images, labels = batch()
    norm = SEARCHES[name][1].norm
    wide = ThreatModel(0.2, norm, -1.0, 1.0)
    # Twice the lengths, by default those of the steps and DDN's first radius, too.
    found = run(name, lambda x: logits_fn((x + 1) / 2), 2 * images - 1, labels, threat=wide, n_iter=5)
    expected = run(name, logits_fn, images, labels, n_iter=5)
    assert found.images.min() == -1
    np.testing.assert_array_equal(found.found, expected.found)
    np.testing.assert_allclose(found.distance, 2 * expected.distance, rtol=1e-4)


@each_search
def test_nothing_found_is_infinitely_far(name):
    images, _ = batch()
    constant = lambda x: 0.0 * x.reshape(len(x), -1)[:, :CLASSES] + jnp.arange(4.0)[None]  # noqa: E731
    labels = jnp.full(len(images), 3).at[0].set(2)
    closest = run(name, constant, images, labels, n_iter=3)
    np.testing.assert_array_equal(closest.images, images)
    np.testing.assert_array_equal(closest.distance, np.where(np.arange(12) == 0, 0, np.inf))
    np.testing.assert_array_equal(closest.found, np.arange(12) == 0)


@pytest.mark.slow
@each_search
def test_no_gradient_flows_back(name):
    images, labels = batch()
    search, threat = SEARCHES[name]

    def total(x):
        closest = search(logits_fn, None, x, labels, threat=threat, n_iter=2)
        return closest.images.sum() + jnp.where(closest.found, closest.distance, 0).sum()

    np.testing.assert_array_equal(jax.grad(total)(images), jnp.zeros_like(images))
