"""The Square Attack: what must hold of any search, and a loop in NumPy (square_attack)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from robal_jax import attacks
from robal_jax.attacks import ThreatModel, square_attack

SHAPE = (8, 8, 2)
SIZE = 128
QUERIES = 400
EPSILONS = {"linf": 0.1, "l2": 0.5}
THREATS = {norm: ThreatModel(epsilon, norm) for norm, epsilon in EPSILONS.items()}
# x + d is rounded once to float32, by 2^-25 for what is below 1. In L2 so is each of 128 entries, and a
# length of 1/2 is itself known to a few roundings of 2^-24 only.
ROUNDINGS = {"linf": 2.0**-24, "l2": np.sqrt(SIZE) * 2.0**-25 + 4 * 2.0**-24}
each_norm = pytest.mark.parametrize("norm", THREATS)


def model():
    """Logits of two classes, +-(x - 1/2) . w / 2 with patches of weights: squares can find their signs."""
    patches = np.random.RandomState(0).choice([-1.0, 1.0], (2, 2, 2)) * [0.5, 1.0]
    weight = np.kron(patches, np.ones((4, 4, 1))).astype(np.float32)

    def logits_fn(images):
        score = ((images - 0.5) * weight[None]).sum((1, 2, 3))
        return jnp.stack([-score, score], axis=-1) / 2

    return logits_fn, weight


def batch(norm, shares, seed=0):
    """Images that a part of the budget fools, if it is spent best; keys, images and labels."""
    rng, (_, weight) = np.random.RandomState(seed), model()
    shares = np.asarray(shares)
    most = EPSILONS[norm] * (np.abs(weight).sum() if norm == "linf" else np.linalg.norm(weight))
    images = rng.uniform(-0.2, 0.2, (len(shares), *SHAPE))
    labels = rng.randint(0, 2, len(shares))
    score = np.where(labels, 1, -1) * shares * most
    # Moved along the weights until the score is as wanted.
    missing = score - (images * weight).sum((1, 2, 3))
    images += missing[:, None, None, None] * weight / np.square(weight).sum()
    keys = jax.random.split(jax.random.key(seed), len(shares))
    return keys, jnp.asarray(images + 0.5, jnp.float32), jnp.asarray(labels, jnp.int32)


def saturated(seed=1):
    """Images with many pixels at the bounds, labels as the model has them."""
    rng, (logits_fn, _) = np.random.RandomState(seed), model()
    images = jnp.asarray(np.clip(rng.uniform(-0.5, 1.5, (6, *SHAPE)), 0, 1), jnp.float32)
    return jax.random.split(jax.random.key(seed), 6), images, logits_fn(images).argmax(-1)


SHARES = {
    "linf": (0.02, 0.1, 0.3, 0.6, 0.9, 2.0),
    "l2": (0.02, 0.1, 0.2, 0.35, 0.45, 2.0),
}  # 2: no attack can


@functools.cache
def searcher(norm):
    """The search, compiled, with the number of queries as an argument; and how often it was traced."""
    traced = []
    logits_fn, _ = model()

    def counted(images):
        traced.append(images.shape)
        return logits_fn(images)

    search = functools.partial(square_attack.square_search, counted, threat=THREATS[norm])
    return jax.jit(lambda keys, x, y, queries=QUERIES: search(keys, x, y, queries=queries)), traced


def distances(norm, found, images):
    delta = (np.float64(found) - np.float64(images)).reshape(len(images), -1)
    return np.abs(delta).max(1) if norm == "linf" else np.linalg.norm(delta, axis=1)


# ---------------------------------------------------------------- what holds for both norms


def test_a_tie_that_goes_to_the_true_class_ends_no_search():
    """Logits in coarse steps, of which the first of two equal ones is the prediction."""
    logits_fn, _ = model()
    coarse = lambda images: jnp.round(logits_fn(images))  # noqa: E731
    keys, images, _ = batch("linf", np.linspace(0.3, 1.3, 40))
    labels = coarse(images).argmax(-1)
    found = square_attack.square_search(coarse, keys, images, labels, threat=THREATS["linf"], queries=200)
    wrong = coarse(found.best).argmax(-1) != labels
    np.testing.assert_array_equal(found.wrong, wrong)
    tie = (found.margin == 0) & ~wrong
    assert tie.any(), "no tie"
    assert (found.queries_used[tie] == 201).all()
    assert (found.queries_used[wrong] < 201).any()


@pytest.mark.slow
@each_norm
def test_invariants(norm):
    logits_fn, _ = model()
    search, traced = searcher(norm)
    for arguments in batch(norm, SHARES[norm]), saturated():
        _, images, labels = arguments
        found = search(*arguments)
        distance = distances(norm, found.best, images)
        assert distance.max() <= EPSILONS[norm] + ROUNDINGS[norm]
        assert distance.max() >= 0.99 * EPSILONS[norm]  # the budget is spent, but for what the bounds cut off
        assert found.best.min() >= 0
        assert found.best.max() <= 1
        assert found.best.dtype == images.dtype == jnp.float32
        logits = logits_fn(found.best)
        np.testing.assert_allclose(found.margin, attacks.margin(logits, labels), atol=1e-5)

        again = search(*arguments)
        np.testing.assert_array_equal(again.best, found.best, "not deterministic")
        halves = [search(*(jnp.roll(a, -3 * half, axis=0) for a in arguments)).best[:3] for half in range(2)]
        np.testing.assert_array_equal(np.concatenate(halves), found.best, "the place in the batch matters")
        others = jnp.array([0, 0, 0, 3, 3, 3])
        alone = search(*(a[others] for a in arguments))
        np.testing.assert_array_equal(alone.best[::3], found.best[::3], "the other images matter")
    assert len(traced) == 1, "traced again"


@pytest.mark.slow
@each_norm
def test_margins_fall_and_fooled_images_are_left_alone(norm):
    search, _ = searcher(norm)
    arguments = batch(norm, SHARES[norm])
    counts = (0, 1, 2, 5, 20, 60, 150, QUERIES)
    path = [search(*arguments, queries) for queries in counts]
    for before, after, queries in zip(path, path[1:], counts, strict=False):
        assert (after.margin <= before.margin).all()
        done = before.margin <= 0
        for field in ("best", "margin", "queries_used"):
            np.testing.assert_array_equal(getattr(after, field)[done], getattr(before, field)[done])
        assert (before.queries_used[~done] == queries + 1).all()
        assert (before.queries_used[done] <= queries + 1).all()
        assert before.number == queries + 1
    fooled = np.array([state.margin <= 0 for state in path])
    assert 0 < fooled[0].sum() < fooled[4].sum() < fooled[-1].sum() < len(SHARES[norm])

    # The model was asked about an image until a query fooled it, not after that.
    for i in np.flatnonzero(fooled[-1]):
        needed = int(path[-1].queries_used[i]) - 1
        assert search(*arguments, needed).margin[i] <= 0
        assert needed == 0 or search(*arguments, needed - 1).margin[i] > 0


@each_norm
def test_ends_when_all_are_fooled(norm):
    search, _ = searcher(norm)
    found = search(*batch(norm, [0.02, 0.05, 0.1, 0.1, 0.15, 0.2]), 5000)
    assert (found.margin <= 0).all()
    assert 1 < found.number == found.queries_used.max() < 200


@pytest.mark.slow
@each_norm
def test_finds_what_random_noise_does_not(norm):
    logits_fn, _ = model()
    shares = {"linf": (0.45, 0.75), "l2": (0.35, 0.5)}[norm]
    keys, images, labels = batch(norm, np.linspace(*shares, 30))
    search, _ = searcher(norm)
    found = search(keys, images, labels)

    rng, threat, fooled = np.random.RandomState(0), THREATS[norm], np.zeros(30, bool)
    for _ in range(QUERIES + 1):
        noise = rng.randn(*images.shape).astype(np.float32)
        size = threat.epsilon * threat.ascent_direction(noise)  # signs, or a direction
        fooled |= np.asarray(attacks.margin(logits_fn(threat.project(images + size, images)), labels) <= 0)
    assert fooled.mean() == 0
    assert (found.margin <= 0).mean() >= 0.8


@pytest.mark.slow
@each_norm
def test_square_is_the_best_image_of_its_search(norm):
    logits_fn, _ = model()
    keys, images, labels = batch(norm, SHARES[norm])
    attack = functools.partial(attacks.square, logits_fn, threat=THREATS[norm], queries=QUERIES)
    found = jax.jit(attack)(keys, images, labels)
    np.testing.assert_array_equal(found, searcher(norm)[0](keys, images, labels).best)
    gradient = jax.grad(lambda x: attack(keys, x, labels, queries=2).sum())(images)
    np.testing.assert_array_equal(gradient, jnp.zeros_like(images), "a gradient flows back")


@each_norm
def test_other_bounds(norm):
    logits_fn, _ = model()
    threat = ThreatModel(EPSILONS[norm], norm, 0.3, 0.6)
    keys, images, labels = saturated()
    images = 0.3 + 0.3 * images
    found = attacks.square(logits_fn, keys, images, labels, threat=threat, queries=20)
    assert found.min() == np.float32(0.3)
    assert found.max() == np.float32(0.6)


def test_draws_are_of_the_key_and_the_number_alone():
    keys = jax.random.split(jax.random.key(0), 500)
    first, second = (np.asarray(square_attack.uniform_draw(keys, number, 4)) for number in (0, 1))
    assert first.min() >= 0
    assert first.max() < 1
    assert len(np.unique(np.concatenate([first, second]))) > 3950  # 4000 of 2^23 numbers: about one repeats
    np.testing.assert_array_equal(square_attack.uniform_draw(keys[::-1], jnp.array(1), 4)[::-1], second)


def test_margin():
    logits = jnp.array([[3.0, 1.0, 2.5], [3.0, 1.0, 2.5], [2.0, 2.0, -1.0], [-4.0, -1.0, -2.0]])
    np.testing.assert_array_equal(attacks.margin(logits, jnp.array([0, 2, 1, 1])), [0.5, -0.5, 0.0, 1.0])


@pytest.mark.parametrize("p_init", [0.0, -1.0, 1.1, float("nan")])
def test_shares_that_no_square_has_are_refused(p_init):
    with pytest.raises(ValueError, match=r"p_init is .*; it must be in \(0, 1\]"):
        attacks.square(model()[0], *batch("linf", SHARES["linf"]), threat=THREATS["linf"], p_init=p_init)


# ---------------------------------------------------------------- sizes


@pytest.mark.slow
def test_smallest_images():
    with pytest.raises(ValueError, match=r"images have 8 x 4 pixels; .* needs 5 x 5; leave it out"):
        square_attack.l2_moves(THREATS["l2"], (8, 4, 3), 0.8)
    rng = np.random.RandomState(0)
    for norm, shape in ("l2", (5, 5, 1)), ("l2", (5, 9, 1)), ("linf", (1, 2, 1)):
        moves = square_attack.MOVES[norm](THREATS[norm], shape, 1.0)
        propose = jax.jit(moves.propose)
        image = jnp.full(shape, 0.5)
        start = jax.jit(moves.start)(rng.rand(moves.start_draws), image)
        found = propose(rng.rand(moves.draws), 0, start, image)
        for candidate in start, found:
            distance = distances(norm, candidate[None], image[None])
            np.testing.assert_allclose(distance, EPSILONS[norm], atol=ROUNDINGS[norm])
        assert np.isfinite(propose(rng.rand(moves.draws), 9, found, image)).all()


# Squares of the shares 0.8, 0.4, .. of 32 x 32 pixels, and how many queries go before those of the next size.
SIDES = (29, 20, 14, 10, 7, 5, 4, 3, 2, 1)
ODD_SIDES = (29, 21, 15, 11, 7, 5, 5, 3, 3, 3)
HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)


@pytest.mark.slow
@pytest.mark.parametrize(("queries", "rescaled"), [(2010, False), (300, True)])
def test_sides_of_the_queries(queries, rescaled):
    """Every query's square, as the model sees it, where none is ever kept."""
    image, changed = jnp.full((1, 32, 32, 1), 0.5), []

    def logits_fn(images):
        jax.debug.callback(lambda x: changed.append(int((x > 0.5).sum())), images, ordered=True)
        return jnp.array([[1.0, 0.0]])

    def draw(keys, number, count):
        """All of the start is -, all squares are +."""
        return jnp.where(number == 0, 0.0, 0.9) * jnp.ones((1, count))

    square_attack.square_search(
        logits_fn, jax.random.key(0), image, jnp.array([0]),
        threat=THREATS["linf"], queries=queries, rescaled=rescaled, draw=draw,
    )  # fmt: skip
    jax.effects_barrier()
    numbers = [earlier * 10_000 // queries if rescaled else earlier for earlier in range(queries)]
    expected = [SIDES[sum(number > h for h in HALVINGS)] ** 2 for number in numbers]
    np.testing.assert_array_equal(changed, [0, *expected])
    assert square_attack.HALVINGS == HALVINGS


def test_sides_of_l2_squares_are_odd():
    shape = (32, 32, 1)
    moves = square_attack.l2_moves(THREATS["l2"], shape, 0.8)
    propose = jax.jit(moves.propose)
    image = jnp.full(shape, 0.5)
    for halvings, side in enumerate(ODD_SIDES):
        found = propose(jnp.full(moves.draws, 0.9), halvings, image, image)
        changed = np.argwhere(np.asarray(found) != 0.5)[:, :2]
        np.testing.assert_array_equal(changed.min(0), int((32 - side) * 0.9))
        np.testing.assert_array_equal(changed.max(0), int((32 - side) * 0.9) + side - 1)


# ---------------------------------------------------------------- L2 against a loop in NumPy


def numpy_rings(height, width):
    """Rectangles on each other, each a pixel larger all around and worth less."""
    rings = np.zeros((height, width))
    for k in range(max(height, width) // 2 + 1):
        rows, columns = (slice(max(size // 2 - k, 0), size // 2 + k + 1) for size in (height, width))
        rings[rows, columns] += 1 / (k + 1) ** 2
    return rings / np.linalg.norm(rings)


def numpy_eta(side, transposed):
    if side == 1:
        return -np.ones((1, 1))
    pattern = np.concatenate([numpy_rings(side // 2, side), -numpy_rings(side - side // 2, side)])
    pattern = pattern / np.sqrt(2)
    return pattern.T if transposed else pattern


def numpy_start(uniforms, shape, epsilon):
    """Rows of tiles from the top left; what stands out is cut off."""
    side = min(shape[:2]) // 5
    first = (min(shape[:2]) - 5 * side) // 2
    columns = shape[1] // side
    delta = np.zeros((shape[0] + side + first, shape[1] + side + first, shape[2]))
    for tile, u in enumerate(uniforms.reshape(-1, 1 + shape[2])):
        i, j = first + tile // columns * side, first + tile % columns * side
        delta[i : i + side, j : j + side] = numpy_eta(side, u[0] > 0.5)[..., None] * np.sign(2 * u[1:] - 1)
    delta = delta[: shape[0], : shape[1]]
    return epsilon * delta / np.linalg.norm(delta)


def numpy_step(uniforms, side, delta, epsilon):
    height, width, channels = delta.shape
    corners = [(int((height - side) * u), int((width - side) * v)) for u, v in uniforms[:4].reshape(2, 2)]
    window, emptied = ((slice(i, i + side), slice(j, j + side)) for i, j in corners)
    covered = np.zeros((height, width), bool)
    covered[window] = covered[emptied] = True
    budget = max(epsilon**2 - np.square(delta).sum(), 0) / channels + np.square(delta[covered]).sum()
    new = numpy_eta(side, uniforms[4] > 0.5)[..., None] * np.sign(2 * uniforms[5:] - 1)
    new = new + delta[window] / (np.sqrt(np.square(delta[window]).sum((0, 1))) + 1e-12)
    new = new / np.sqrt(np.square(new).sum((0, 1))) * np.sqrt(budget)
    delta = delta.copy()
    delta[emptied] = 0
    delta[window] = new
    return epsilon * delta / np.linalg.norm(delta)


def test_l2_against_numpy():
    shape, count, queries, epsilon = (12, 11, 3), 4, 80, 0.7
    rng = np.random.RandomState(0)
    images = rng.uniform(0, 1, (count, *shape)).round(1)  # many pixels are at a bound
    hidden, out = rng.randn(np.prod(shape), 16) / 20, rng.randn(16, 5)
    # Six rows of five tiles, 2 pixels per side; the last column of pixels has none.
    starts, steps = rng.rand(count, 6 * 5 * 4), rng.rand(queries, count, 8)
    sides = np.repeat([11, 7, 5], [11, 40, 29])  # of 10.3, 7.3 and 5.1, rounded, then to odd numbers

    def logits_of(x, tanh, xp):
        return tanh((x.reshape(len(x), -1) - 0.5) @ xp.asarray(hidden)) @ xp.asarray(out)

    labels = logits_of(images, np.tanh, np).argmax(1)
    best, margins, used = [], [], []
    for image, label, start, own in zip(images, labels, starts, steps.swapaxes(0, 1), strict=True):
        lead, x, asked = np.inf, None, 0
        for number in range(queries + 1):
            if number == 0:
                delta = numpy_start(start, shape, epsilon)
            else:
                delta = numpy_step(own[number - 1], sides[number - 1], x - image, epsilon)
            candidate = np.clip(image + delta, 0, 1)
            logits = logits_of(candidate[None], np.tanh, np)[0]
            found = logits[label] - np.delete(logits, label).max()
            asked += 1
            if found < lead:
                lead, x = found, candidate
            if lead <= 0:
                break
        best.append(x), margins.append(lead), used.append(asked)

    def draw(keys, number, size):
        if size == starts.shape[1]:
            return jnp.asarray(starts)
        return jnp.asarray(steps)[number - 1, :, :size]

    with jax.enable_x64(True):
        found = square_attack.square_search(
            lambda x: logits_of(x, jnp.tanh, jnp), jax.random.split(jax.random.key(0), count),
            jnp.asarray(images), jnp.asarray(labels),
            threat=ThreatModel(epsilon, "l2"), queries=queries, draw=draw,
        )  # fmt: skip
        np.testing.assert_array_equal(found.queries_used, used)
        np.testing.assert_allclose(found.margin, margins, atol=1e-12)
        np.testing.assert_allclose(found.best, np.stack(best), atol=1e-12)
    assert min(used) < queries < max(used)
