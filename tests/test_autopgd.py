"""AutoPGD: a loop in NumPy, what must hold of any search, and its losses (autopgd)."""

import functools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from robal_jax import attacks, losses
from robal_jax.attacks import ThreatModel, autopgd, starting_points
from robal_jax.keys import image_keys

SHAPE, SIZE, CLASSES, COUNT, STEPS = (4, 4, 2), 32, 5, 9, 25
EPSILONS = {"linf": 0.05, "l2": 0.2}
THREATS = {norm: ThreatModel(epsilon, norm) for norm, epsilon in EPSILONS.items()}
LOSSES = {"ce": losses.cross_entropy, "dlr": attacks.dlr}
# x + d is rounded once to float32, by 2^-25 for what is below 1; in L2 each of 32 entries is, and the length.
ROUNDINGS = {"linf": 2.0**-24, "l2": np.sqrt(SIZE) * 2.0**-25 + 4 * 2.0**-24}
each_norm = pytest.mark.parametrize("norm", THREATS)
each_search = pytest.mark.parametrize(("norm", "name"), [("linf", "ce"), ("linf", "dlr"), ("l2", "ce")])

RNG = np.random.RandomState(0)
INNER, OUTER = RNG.randn(SIZE, 6) / 2, RNG.randn(6, CLASSES)


def logits_fn(x):
    """Two layers; the sums are over axes of their own, so that the batch's size does not change them."""
    inner, outer = (jnp.asarray(weight, x.dtype)[None] for weight in (INNER, OUTER))
    hidden = jnp.sin(((x.reshape(len(x), -1, 1) - 0.5) * inner).sum(1))
    return 3 * (hidden[:, :, None] * outer).sum(1)


def batch(count=COUNT, seed=1):
    """Images with pixels at the bounds, labels that are mostly the model's, one key per image."""
    rng = np.random.RandomState(seed)
    images = np.clip(rng.uniform(-0.2, 1.2, (count, *SHAPE)), 0, 1).astype(np.float32)
    labels = np.asarray(logits_fn(jnp.asarray(images))).argmax(-1)
    labels[0] = (labels[0] + 1) % CLASSES
    return jax.random.split(jax.random.key(seed), count), jnp.asarray(images), jnp.asarray(labels)


def start_of(norm):
    keys, images, _ = batch()
    return starting_points(autopgd.boundary_start, keys, images, THREATS[norm])


@functools.cache
def searched(norm, name):
    """The last state of a search, and all images and logits on its way with the start before them."""
    _, images, labels = batch()
    start = start_of(norm)
    search = partial(autopgd.search, logits_fn, threat=THREATS[norm], steps=STEPS, loss=LOSSES[name])
    state, (x, logits) = jax.jit(partial(search, observe=lambda *seen: seen))(start, images, labels)
    return state, jnp.concatenate([start[None], x]), jnp.concatenate([logits_fn(start)[None], logits])


@functools.cache
def states(norm, name):
    """The states of the same search, one after the other."""
    _, images, labels = batch()
    look = partial(attacks.loss_gradient, logits_fn, LOSSES[name])

    @jax.jit
    def step(state, number, window):
        x = autopgd.next_images(state, images, THREATS[norm], number == 0)
        return autopgd.judge(state, x, *look(x, labels), labels, window, 0.75)

    start = start_of(norm)
    way = [autopgd.begin(*look(start, labels), start, labels, THREATS[norm])]
    for number, window in enumerate(autopgd.check_windows(STEPS)):
        way.append(step(way[-1], number, window))
    return way


# ---------------------------------------------------------------- against a loop in NumPy


def numpy_model(x, label, name):
    """Logits, loss and gradient of one image, in float64."""
    inner = (x.reshape(-1) - 0.5) @ INNER
    z = 3 * np.sin(inner) @ OUTER
    if name == "ce":
        p = np.exp(z - z.max())
        p /= p.sum()
        loss, by_logit = -np.log(p[label]), p - np.eye(CLASSES)[label]
    else:
        order = np.argsort(-z)
        other = order[1] if order[0] == label else order[0]
        lead, spread = z[label] - z[other], z[order[0]] - z[order[2]] + 1e-12
        loss, eye = -lead / spread, np.eye(CLASSES)
        by_logit = -(eye[label] - eye[other]) / spread + lead * (eye[order[0]] - eye[order[2]]) / spread**2
    return z, loss, ((3 * OUTER @ by_logit * np.cos(inner)) @ INNER.T).reshape(x.shape)


def numpy_project(candidate, image, norm):
    if norm == "linf":
        near = np.clip(candidate, image - EPSILONS[norm], image + EPSILONS[norm])
        return np.clip(near, 0, 1)
    delta = candidate - image
    return np.clip(image + delta * min(1, EPSILONS[norm] / np.linalg.norm(delta)), 0, 1)


def numpy_apgd(start, image, label, norm, name):
    """Algorithm 1 of Croce and Hein on one image, with the constants of the reference implementation.

    It also returns whether rounding decided something: whether it compared the losses of two different
    images that are equal up to 1e-12.
    """
    ascent = np.sign if norm == "linf" else lambda g: g / np.linalg.norm(g)
    project = partial(numpy_project, image=image, norm=norm)
    x = previous = start
    z, loss, gradient = numpy_model(x, label, name)
    size, best = 2 * EPSILONS[norm], (loss, x, gradient)
    window, since, trail = max(int(0.22 * STEPS), 1), 0, [0.0]
    at_check, halved, path, fooled = loss, True, [x], None if z.argmax() == label else x
    by_rounding = False
    for number in range(STEPS):
        stepped = project(x + size * ascent(gradient))
        share = 1.0 if number == 0 else 0.75
        moved = project(x + share * (stepped - x) + (1 - share) * (x - previous))
        x, previous = moved, x
        z, loss, gradient = numpy_model(x, label, name)
        path.append(x)
        fooled = fooled if z.argmax() == label else x
        trail.append(loss)
        others = [(best[0], best[1]), (trail[-2], previous)]
        by_rounding |= any(abs(loss - a) < 1e-12 and not np.array_equal(x, at) for a, at in others)
        best = (loss, x, gradient) if loss > best[0] else best
        since += 1
        if since == window:
            rises = sum(b > a for a, b in zip(trail[-window - 1 : -1], trail[-window:], strict=True))
            halved = rises <= 0.75 * window or (not halved and at_check >= best[0])
            at_check = best[0]
            if halved:
                size, (_, x, gradient) = size / 2, best
            since, window = 0, max(window - max(int(0.03 * STEPS), 1), int(0.06 * STEPS), 1)
    return np.stack(path), size, best, fooled, by_rounding


@pytest.mark.slow
@each_search
def test_search_is_the_published_one(norm, name):
    _, images, labels = batch()
    start = np.float64(start_of(norm))
    with jax.enable_x64(True):
        inputs = jnp.asarray(start), jnp.asarray(np.float64(images)), jnp.asarray(labels)
        search = partial(autopgd.search, logits_fn, threat=THREATS[norm], steps=STEPS, loss=LOSSES[name])
        state, path = jax.jit(partial(search, observe=lambda x, _: x))(*inputs)
    assert path.dtype == np.float64
    sizes, skipped = set(), 0
    for i in range(COUNT):
        expected, size, best, fooled, by_rounding = numpy_apgd(
            start[i], np.float64(images[i]), int(labels[i]), norm, name
        )
        if by_rounding:
            skipped += 1
            continue
        np.testing.assert_allclose(path[:, i], expected[1:], atol=1e-9)
        assert state.step_size[i] == pytest.approx(size)
        assert state.best_loss[i] == pytest.approx(best[0])
        np.testing.assert_allclose(state.best[i], best[1], atol=1e-9)
        np.testing.assert_allclose(state.best_gradient[i], best[2], atol=1e-9)
        assert bool(state.robust[i]) == (fooled is None)
        np.testing.assert_allclose(state.adversarial[i], start[i] if fooled is None else fooled, atol=1e-9)
        sizes.add(size)
    assert len(sizes) > 1, "all images go the same way"
    assert skipped <= COUNT // 2, "rounding decides too often"


@pytest.mark.slow
def test_when_a_step_size_is_halved():
    threat, labels, x = THREATS["linf"], jnp.zeros(4, int), jnp.zeros((4, *SHAPE))
    start = autopgd.begin(jnp.zeros((4, CLASSES)), jnp.full(4, 5.0), x, x, labels, threat)
    np.testing.assert_array_equal(start.halved_at_check, True)
    np.testing.assert_array_equal(start.loss, 0)
    # Of four steps: three rose; all rose, to a new best; all rose, below the best, the size not just
    # halved; the same, but it was.
    state = start._replace(
        rises=jnp.array([2, 3, 3, 3]), halved_at_check=jnp.array([False, False, False, True])
    )
    loss = jnp.array([6.0, 6.0, 1.0, 1.0])
    take_in = partial(autopgd.judge, state, x, jnp.zeros((4, CLASSES)), loss, x, labels, rho=0.75)
    checked, later = take_in(jnp.int32(4)), take_in(jnp.int32(0))
    halved = np.array([True, False, True, False])
    np.testing.assert_array_equal(checked.step_size / state.step_size, np.where(halved, 0.5, 1))
    np.testing.assert_array_equal(checked.halved_at_check, halved)
    np.testing.assert_array_equal(checked.rises, 0)
    np.testing.assert_array_equal(checked.best_at_check, [6, 6, 5, 5])
    np.testing.assert_array_equal(later.step_size, state.step_size)
    np.testing.assert_array_equal(later.halved_at_check, state.halved_at_check)
    np.testing.assert_array_equal(later.rises, [3, 4, 4, 4])
    np.testing.assert_array_equal(later.best_at_check, 5)


def numpy_windows(steps):
    """Counted off step by step, as the reference does."""
    window, windows, since = max(int(0.22 * steps), 1), [], 0
    for _ in range(steps):
        since += 1
        windows.append(window if since == window else 0)
        if since == window:
            since, window = 0, max(window - max(int(0.03 * steps), 1), int(0.06 * steps), 1)
    return windows


@pytest.mark.parametrize("steps", [1, 2, 5, 10, 33, 100, 1000])
def test_checks_look_back_to_the_check_before(steps):
    windows = autopgd.check_windows(steps)
    assert windows.tolist() == numpy_windows(steps)
    last = np.flatnonzero(windows)[-1] + 1
    assert windows.sum() == last <= steps


# ---------------------------------------------------------------- what holds of any search


def distances(norm, found, images):
    delta = (np.float64(found) - np.float64(images)).reshape(len(images), -1)
    return np.abs(delta).max(1) if norm == "linf" else np.linalg.norm(delta, axis=1)


@pytest.mark.slow
@each_search
def test_every_image_on_the_way_is_allowed(norm, name):
    _, path, _ = searched(norm, name)
    for x in path:
        assert distances(norm, x, batch()[1]).max() <= EPSILONS[norm] + ROUNDINGS[norm]
        assert x.min() >= 0
        assert x.max() <= 1


@pytest.mark.slow
@each_search
def test_the_best_is_the_highest_loss_on_the_way(norm, name):
    state, path, logits = searched(norm, name)
    _, _, labels = batch()
    values = np.stack([LOSSES[name](z, labels) for z in logits])
    np.testing.assert_allclose(state.best_loss, values.max(0), rtol=1e-5)
    np.testing.assert_array_equal(state.best, path[values.argmax(0), np.arange(COUNT)])
    assert (values.argmax(0) > 0).any()
    wrong = logits.argmax(-1) != labels[None]
    np.testing.assert_array_equal(state.robust, ~wrong.any(0))
    last = np.where(wrong.any(0), STEPS - wrong[::-1].argmax(0), 0)  # misclassified, else the start
    np.testing.assert_array_equal(state.adversarial, path[last, np.arange(COUNT)])
    assert 0 < np.sum(state.robust) < COUNT


@pytest.mark.slow
@each_search
def test_step_sizes_are_halved_at_checks_and_the_best_only_gets_better(norm, name):
    way, windows = states(norm, name), autopgd.check_windows(STEPS)
    np.testing.assert_array_equal(way[0].step_size, np.float32(2 * EPSILONS[norm]))
    halvings = 0
    for before, after, window in zip(way, way[1:], windows, strict=False):
        halved = np.asarray(after.step_size < before.step_size)
        np.testing.assert_array_equal(after.step_size, np.where(halved, 0.5, 1) * before.step_size)
        assert window > 0 or not halved.any()
        np.testing.assert_array_equal(after.x[halved], after.best[halved], "not back at the best")
        assert (after.best_loss >= before.best_loss).all()
        assert (after.robust <= before.robust).all()
        halvings += halved.sum()
    assert halvings > COUNT
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4), way[-1], searched(norm, name)[0])


@functools.cache
def attack(norm, steps=STEPS):
    return jax.jit(partial(attacks.apgd, logits_fn, threat=THREATS[norm], steps=steps))


@each_norm
def test_apgd_gives_misclassified_images_or_the_best(norm):
    keys, images, labels = batch()
    state, _, _ = searched(norm, "ce")
    found = attack(norm)(keys, images, labels)
    wrong = np.asarray(logits_fn(found)).argmax(-1) != labels
    np.testing.assert_array_equal(wrong, ~state.robust)
    expected = np.where(wrong[:, None, None, None], state.adversarial, state.best)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert attack(norm)._cache_size() == 1


@each_norm
def test_an_image_s_result_is_its_own(norm):
    keys, images, labels = batch()
    found = attack(norm)(keys, images, labels)
    turned = attack(norm)(keys[::-1], images[::-1], labels[::-1])[::-1]
    np.testing.assert_array_equal(turned, found)
    others = [jnp.concatenate([a[:3], b[3:]]) for a, b in zip(batch(), batch(seed=2), strict=True)]
    mixed = attack(norm)(*others)
    np.testing.assert_array_equal(mixed[:3], found[:3])
    assert not np.array_equal(mixed[3:], found[3:])
    assert not np.array_equal(attack(norm)(keys[::-1], images, labels), found), "the keys are not read"


@pytest.mark.slow
def test_one_key_for_all_and_one_step():
    _, images, labels = batch()
    found = jax.jit(partial(attacks.apgd, logits_fn, threat=THREATS["linf"], steps=1))
    one = found(jax.random.key(3), images, labels)
    np.testing.assert_array_equal(one, found(image_keys(jax.random.key(3), images), images, labels))
    assert distances("linf", one, images).max() <= EPSILONS["linf"] + ROUNDINGS["linf"]


def test_no_gradient_flows_back():
    keys, images, labels = batch()
    run = partial(attacks.apgd, logits_fn, threat=THREATS["linf"], steps=1)
    gradient = jax.jit(jax.grad(lambda x: run(keys, x, labels).sum()))(images)
    np.testing.assert_array_equal(gradient, jnp.zeros_like(images))


@pytest.mark.slow
def test_apgd_is_at_least_as_strong_as_pgd_20():
    keys, images, labels = batch(60)
    threat = ThreatModel(0.05)
    settings = {"threat": threat, "steps": 20}
    ours = jax.jit(partial(attacks.apgd, logits_fn, **settings))(keys, images, labels)
    theirs = jax.jit(partial(attacks.pgd, logits_fn, **settings, step_size=0.05 / 4))(keys, images, labels)
    logits = [logits_fn(x) for x in (images, theirs, ours)]
    loss = [float(losses.cross_entropy(z, labels).mean()) for z in logits]
    right = [float((z.argmax(-1) == labels).mean()) for z in logits]
    assert 0.1 < right[1] < 0.9
    assert loss[2] > loss[1] > loss[0]
    assert right[2] <= right[1] < right[0]


# ---------------------------------------------------------------- random models


def random_fn(x, keys):
    """Logits with noise that pulls the image to and fro."""
    noise = jax.vmap(lambda key: jax.random.normal(key, SHAPE))(keys)
    return logits_fn(x + 0.1 * noise)


@pytest.mark.slow
def test_a_random_model_is_attacked_with_the_keys():
    keys, images, labels = batch()
    settings = {"threat": THREATS["linf"], "steps": 4, "eot": 2}
    start = start_of("linf")
    search = partial(autopgd.search, **settings, observe=lambda x, logits: logits)

    @jax.jit
    def run(keys):
        return search(random_fn, start, images, labels, keys=keys)

    state, logits = run(keys)
    jax.tree.map(np.testing.assert_array_equal, run(keys), (state, logits))
    other, _ = run(keys[::-1])
    assert not np.array_equal(other.x, state.x)
    plain, _ = jax.jit(partial(autopgd.search, logits_fn, threat=THREATS["linf"], steps=4))(
        start, images, labels
    )
    ignored = lambda x, keys: logits_fn(x)  # noqa: E731
    calm, _ = jax.jit(lambda keys: search(ignored, start, images, labels, keys=keys))(keys)
    jax.tree.map(partial(np.testing.assert_allclose, atol=1e-5), calm, plain)


@pytest.mark.slow
def test_noise_is_new_in_every_step():
    keys, images, labels = batch()

    def only_noise(x, keys):
        noise = jax.vmap(lambda key: jax.random.normal(key, (CLASSES,)))(keys)
        return noise + 0 * logits_fn(x)

    search = partial(autopgd.search, only_noise, threat=THREATS["linf"], steps=4, eot=1)
    state, logits = jax.jit(partial(search, observe=lambda x, logits: logits))(
        images, images, labels, keys=keys
    )
    assert len(np.unique(logits)) == logits.size
    seen = jax.vmap(losses.cross_entropy, (0, None))(logits, labels)  # at the points of all steps
    assert (state.best_loss >= seen.max(0) - 1e-5).all()  # of float32
    first = attacks.loss_gradient(only_noise, losses.cross_entropy, images, labels, keys, eot=1)[0]
    assert not np.intersect1d(first, logits).size


@pytest.mark.slow
def test_apgd_hands_its_keys_to_a_random_model():
    keys, images, labels = batch()
    settings, start = {"threat": THREATS["linf"], "steps": 3, "eot": 2}, start_of("linf")

    @jax.jit
    def runs(keys):
        state, _ = autopgd.search(random_fn, start, images, labels, keys=keys, **settings)
        return attacks.apgd(random_fn, keys, images, labels, **settings), state

    found, state = runs(keys)
    expected = jnp.where(state.robust[:, None, None, None], state.best, state.adversarial)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    with pytest.raises(ValueError, match="eot needs keys"):
        autopgd.search(random_fn, images, images, labels, **settings)


# ---------------------------------------------------------------- where it starts


@each_norm
def test_boundary_start_lies_on_the_boundary(norm):
    keys, images, _ = batch()
    free = ThreatModel(EPSILONS[norm], norm, lower=-9.0, upper=9.0)
    start = starting_points(autopgd.boundary_start, keys, images, free)
    np.testing.assert_allclose(distances(norm, start, images), EPSILONS[norm], rtol=1e-5)
    noise = np.asarray(start - images)
    assert len({row.tobytes() for row in noise}) == COUNT
    assert 0.3 < (noise > 0).mean() < 0.7
    assert start.max() > 1
    within = starting_points(autopgd.boundary_start, keys, images, THREATS[norm])
    np.testing.assert_array_equal(within, jnp.clip(start, 0, 1))


# ---------------------------------------------------------------- losses and targets


def numpy_dlr(z, label, target=None):
    ordered = np.sort(z)[::-1]
    if target is None:
        return -(z[label] - np.delete(z, label).max()) / (ordered[0] - ordered[2])
    return -(z[label] - z[target]) / (ordered[0] - (ordered[2] + ordered[3]) / 2)


def test_difference_of_logits_ratios():
    rng = np.random.RandomState(5)
    logits = rng.randn(60, CLASSES).astype(np.float32)
    labels, targets = rng.randint(0, CLASSES, (2, 60))
    kinds = {
        "dlr": (attacks.dlr, [numpy_dlr(*row) for row in zip(np.float64(logits), labels, strict=True)]),
        "targeted": (
            partial(attacks.targeted_dlr, targets=jnp.asarray(targets)),
            [numpy_dlr(*row) for row in zip(np.float64(logits), labels, targets, strict=True)],
        ),
    }
    for name, (loss, expected) in kinds.items():
        found = loss(logits, labels)
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5, err_msg=name)
        np.testing.assert_allclose(loss(50 * logits + 3, labels), expected, rtol=1e-3, atol=1e-4)
    right = logits.argmax(-1) == labels
    np.testing.assert_array_equal(attacks.dlr(logits, labels) > 0, ~right)
    assert 0 < right.sum() < 60
    ahead = logits[np.arange(60), targets] > logits[np.arange(60), labels]
    np.testing.assert_array_equal(kinds["targeted"][0](logits, labels) > 0, ahead)


@pytest.mark.slow
def test_level_logits_give_finite_losses():
    level = jnp.zeros((2, CLASSES))
    labels, targets = jnp.array([0, 1]), jnp.array([1, 0])
    for loss in (attacks.dlr, partial(attacks.targeted_dlr, targets=targets)):
        np.testing.assert_array_equal(loss(level, labels), 0)
        assert jnp.isfinite(jax.grad(lambda z, loss=loss: loss(z, labels).sum())(level)).all()


def test_too_few_classes():
    logits, labels = jnp.zeros((2, 3)), jnp.zeros(2, int)
    assert attacks.dlr(logits, labels).shape == (2,)
    with pytest.raises(ValueError, match=r"DLR needs 3 classes, and the model has 2; use negative_margin"):
        attacks.dlr(logits[:, :2], labels)
    with pytest.raises(ValueError, match=r"targeted DLR needs 4 classes, and the model has 3; use"):
        attacks.targeted_dlr(logits, labels, targets=labels)


def prototypes(x):
    """``-||x - mu_k||^2`` with random means."""
    means = jnp.asarray(np.random.RandomState(7).uniform(0.3, 0.7, (CLASSES, SIZE)), x.dtype)
    return -20 * jnp.square(x.reshape(len(x), 1, -1) - means[None]).sum(-1)


@pytest.mark.slow
def test_targets_are_the_classes_of_a_rank_and_share_one_compilation():
    keys, images, _ = batch(6)
    images = 0.3 + 0.4 * images
    clean = prototypes(images)
    labels, traces = clean.argmax(-1), []

    @jax.jit
    def run(rank):
        traces.append(rank)
        return attacks.targeted_apgd(
            prototypes, keys, images, labels, threat=THREATS["linf"], rank=rank, steps=20
        )

    ranks = range(2, CLASSES + 1)
    logits = [prototypes(run(jnp.int32(rank))) for rank in ranks]
    assert len(traces) == 1
    targets = jnp.asarray(np.argsort(-np.asarray(clean), 1)[:, 1:])

    def reached(z):
        return [float(attacks.targeted_dlr(z, labels, targets=target).mean()) for target in targets.T]

    # Of all runs, the one towards a class comes nearest to it.
    np.testing.assert_array_equal(np.argmax([reached(z) for z in logits], 0), np.arange(CLASSES - 1))
    assert reached(logits[0])[0] > 0
    settings = {"threat": THREATS["linf"], "steps": 20}
    second = jax.jit(partial(attacks.targeted_apgd, prototypes, **settings))(keys, images, labels)
    np.testing.assert_allclose(reached(prototypes(second)), reached(logits[0]), atol=0.02)
