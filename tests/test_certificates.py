"""Certified bounds: exhaustive search, exact cases, rounding, each rule, and attacks (certificates)."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn import datasets

import robal_jax
from robal_jax import ThreatModel, attacks, certified, classifiers, interval_bounds, margin_bounds
from robal_jax.certificates import METHODS
from robal_jax.errors import InputError
from robal_jax.intervals import Interval, made_by
from robal_jax.linear_bounds import LINES

EPSILON = 2.0**-52  # of float64


@pytest.fixture
def float64():
    with jax.enable_x64(True):
        yield


def normal(*shape, seed=0):
    return np.random.RandomState(seed).randn(*shape)


def box(images, radius):
    return np.clip(images - radius, 0, 1), np.clip(images + radius, 0, 1)


def margins(logits, labels):
    """Margins of logits ``[..., B, K]``."""
    of_label = np.take_along_axis(logits, np.broadcast_to(labels[:, None], (*logits.shape[:-1], 1)), -1)[
        ..., 0
    ]
    others = np.where(np.arange(logits.shape[-1]) == labels[:, None], -np.inf, logits)
    return of_label - others.max(-1)


def points(lower, upper, steps):
    """A grid in each box, ``[steps^2, B, 2]``, with its corners."""
    shares = np.array(list(itertools.product(np.linspace(0, 1, steps), repeat=2)))
    return lower + shares[:, None] * (upper - lower)


# ---------------------------------------------------------------- margins


@pytest.mark.slow
def test_certified_boxes_have_no_misclassified_point(float64):
    first, second = normal(2, 16), normal(16, 3, seed=1)

    def logits_fn(x):
        return jax.nn.relu(x @ first - 0.3) @ second

    images = np.random.RandomState(2).uniform(size=(60, 2))
    labels = np.asarray(logits_fn(images)).argmax(-1)
    bounds = {
        method: jax.jit(functools.partial(margin_bounds, logits_fn, method=method)) for method in METHODS
    }
    shares = {name: [] for name in (*METHODS, "exhaustive")}
    for radius in (0.005, 0.02, 0.05, 0.1):
        lower, upper = box(images, radius)
        on_grid = margins(np.asarray(logits_fn(points(lower, upper, 41))), labels).min(0)
        shares["exhaustive"].append(np.mean(on_grid > 0))
        for method, bounded in bounds.items():
            bound = np.asarray(bounded(lower, upper, labels))
            assert (bound <= on_grid).all()
            shares[method].append(np.mean(bound > 0))
    for found in shares.values():  # neither all nor none, so the tests above say something
        assert found[0] > found[2] > found[3] > 0
    truth, crown, intervals = (np.array(shares[name])[1:] for name in ("exhaustive", *METHODS))
    assert (truth - crown < (truth - intervals) / 2).all()
    for method in METHODS:
        attested = functools.partial(certified, logits_fn, threat=ThreatModel(0.1), method=method)
        found = jax.jit(attested)(images, labels)
        assert np.mean(np.asarray(found)) == shares[method][-1]


def made(function, low, high):
    """The interval of a function of one operation, and that of its argument."""
    program, x = jax.make_jaxpr(function)(low), Interval(low, high)
    (equation,) = program.eqns
    inputs = [x if value in program.jaxpr.invars else low.dtype.type(value.val) for value in equation.invars]
    return made_by(equation, inputs), x


def lines_of(function, low, high):
    """Lines of a function of one operation."""
    node, x = made(function, low, high)
    return LINES[node.name](node, x), node


def test_a_sum_of_two_rounds_as_a_sum_of_two_terms():
    low = np.zeros((2, 3), np.float32)
    assert made(lambda x: x + x, low, low)[0].terms == 2
    assert made(lambda x: x.sum(), low, low)[0].terms == 6


OPERATIONS = {
    "max": lambda x: jax.lax.max(x, x.dtype.type(0.25)),
    "min": lambda x: jax.lax.min(x, x.dtype.type(-0.25)),
    "tanh": jax.lax.tanh,
    "logistic": jax.lax.logistic,
    "erf": jax.lax.erf,
    "exp": jax.lax.exp,
    "log": jax.lax.log,
    "sqrt": jax.lax.sqrt,
    "square": jax.lax.square,
    "product with itself": lambda x: jax.lax.mul(x, x),
}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", OPERATIONS)
def test_operations_are_between_their_lines(name, dtype, float64):
    """On a grid of each interval, which covers less area than the interval does."""
    random = np.random.RandomState(0)
    ends = random.uniform(0 if name in ("log", "sqrt") else -3, 3, size=(2, 500)).astype(dtype)
    low, high = np.sort(ends, axis=0)
    high[:50] = low[:50]  # and of points
    line, node = lines_of(OPERATIONS[name], jnp.asarray(low), jnp.asarray(high))
    shares = np.linspace(0, 1, 101, dtype=dtype)[:, None]
    x = np.clip(low + shares * (high - low), low, high)
    low_slope, low_shift, high_slope, high_shift = (np.asarray(part, np.float64) for part in line)
    below, above = low_slope * x + low_shift, high_slope * x + high_shift
    for values in (OPERATIONS[name](jnp.asarray(x)), OPERATIONS[name](jnp.asarray(x, np.float64))):
        assert (below <= np.asarray(values)).all()
        assert (np.asarray(values) <= above).all()
    assert np.mean(above - below) < 0.95 * np.mean(node.high - node.low)


@pytest.mark.long
@pytest.mark.slow
def test_linear_bounds_hold_and_are_no_worse_than_intervals(float64):
    """Two layers of several activations and a residual connection, on a grid of each box."""
    layers = [normal(2, 10), normal(10, 10, seed=1) / 2, normal(10, 3, seed=2)]

    def activation(x):
        parts = jax.nn.relu(x), jax.nn.relu6(4 * x), jnp.minimum(x, 0.1), jnp.tanh(x), x**2 / 4
        return x / 2 + jnp.concatenate([part[:, 2 * i : 2 * i + 2] for i, part in enumerate(parts)], 1)

    def logits_fn(x):
        for layer in layers[:-1]:
            x = activation(x @ layer - 0.1)
        return x @ layers[-1]

    lower, upper = box(np.random.RandomState(2).uniform(size=(24, 2)), 0.1)
    labels = np.arange(24) % 3
    values = np.asarray(logits_fn(points(lower, upper, 41).reshape(-1, 2))).reshape(-1, 24, 3)
    on_grid = margins(values, labels).min(0)
    crown, intervals = (
        np.asarray(margin_bounds(logits_fn, lower, upper, labels, method=method)) for method in METHODS
    )
    assert (crown <= on_grid).all()
    assert (crown >= intervals - 1000 * EPSILON * (1 + np.abs(intervals))).all()
    assert np.mean(on_grid - crown) < np.mean(on_grid - intervals) / 2


def exact_margins(weight, bias, images, labels, radius):
    """The least margin of ``x @ weight + bias`` on each box: at the corner that each difference prefers."""
    lower, upper = box(images, radius)
    each = (weight.T[labels][:, None] - weight.T, bias[labels][:, None] - bias)
    least = np.where(each[0] > 0, lower[:, None], upper[:, None])
    others = (each[0] * least).sum(-1) + each[1]
    return np.where(np.arange(len(bias)) == labels[:, None], np.inf, others).min(-1)


LAYERS = (normal(5, 7), normal(7, 6), normal(6, 4)), (normal(7), normal(6), normal(4))
AFFINE = {
    "layers": lambda logits: logits,
    "log-softmax, whose normaliser cancels": jax.nn.log_softmax,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", AFFINE)
def test_affine_networks_have_their_exact_margin(name, float64):
    images, labels = np.random.RandomState(0).uniform(size=(8, 5)), np.arange(8) % 4

    def logits_fn(x):
        for weight, bias in zip(*LAYERS, strict=True):
            x = x @ weight + bias[None]
        return AFFINE[name](x)

    weight, bias = np.eye(5), np.zeros(5)
    for factor, shift in zip(*LAYERS, strict=True):
        weight, bias = weight @ factor, bias @ factor + shift
    exact = exact_margins(weight, bias, images, labels, 0.1)
    found = np.asarray(margin_bounds(logits_fn, *box(images, 0.1), labels))
    # Each margin is a sum of fewer than 1000 products, which are below 10^4 in size.
    assert (found <= exact).all()
    np.testing.assert_allclose(found, exact, rtol=0, atol=1e4 * 1000 * EPSILON)


@pytest.mark.slow
def test_cosine_head_is_certified_where_its_features_are(float64):
    """The norm is common to all classes: the sign of the margin is that of unit weights without it."""
    weight = np.abs(normal(5, 6)), normal(4, 6, seed=1)
    rows = (weight[1] / np.linalg.norm(weight[1], axis=1, keepdims=True)).T
    images = np.random.RandomState(2).uniform(0.2, 1, size=(200, 5))

    def logits_fn(x):
        return classifiers.cosine_logits(x @ weight[0], jnp.asarray(weight[1]), scale=10.0)

    labels = np.asarray(logits_fn(images)).argmax(-1)
    exact = exact_margins(weight[0] @ rows, np.zeros(4), images, labels, 0.2)
    found = certified(logits_fn, images, labels, threat=ThreatModel(0.2))
    np.testing.assert_array_equal(found, exact > 0)
    assert 0 < np.mean(found) < 1


@pytest.mark.slow
def test_a_norm_that_may_be_zero_certifies_nothing():
    logits_fn = functools.partial(classifiers.cosine_logits, weight=jnp.eye(2), scale=10.0)
    images = jnp.array([[0.5, 0.1], [0.05, 0.01]])
    found = certified(logits_fn, images, jnp.array([0, 0]), threat=ThreatModel(0.1))
    assert found.tolist() == [True, False]


# ---------------------------------------------------------------- rounding


@pytest.mark.slow
def test_bounds_in_float32_hold_exact_and_computed_logits():
    """Boxes of radius 0: what is left is the rounding."""
    sizes = (64, 128, 64, 8)
    layers = [normal(a, b, seed=a).astype(np.float32) for a, b in itertools.pairwise(sizes)]
    images = np.random.RandomState(0).uniform(size=(32, 64)).astype(np.float32)

    def logits_fn(x):
        for layer in layers[:-1]:
            x = jnp.maximum(x @ layer.astype(x.dtype), 0)
        return x @ layers[-1].astype(x.dtype)

    bounds = jax.jit(functools.partial(interval_bounds, logits_fn))
    low, high = map(np.asarray, bounds(images, images))
    computed = np.asarray(jax.jit(logits_fn)(images))
    with jax.enable_x64(True):
        exact = np.asarray(logits_fn(images.astype(np.float64)))
    assert computed.dtype == np.float32
    for logits in (computed, exact):
        assert ((low <= logits) & (logits <= high)).all()
    labels = np.arange(32) % 8
    for method in METHODS:
        bounded = jax.jit(functools.partial(margin_bounds, logits_fn, method=method))
        bound = np.asarray(bounded(images, images, labels))
        assert (bound <= margins(exact, labels)).all()
        # Sums of 128 terms, in three layers: their errors are far below the logits.
        assert (bound >= margins(exact, labels) - 0.01 * np.abs(exact).max()).all()


def test_bounds_in_float32_hold_where_weights_cancel():
    """Behind a matrix and its inverse, what is left of the weights is mostly rounding."""
    left, _, right = np.linalg.svd(normal(24, 24))
    matrix = left * np.logspace(0, -5, 24) @ right
    layers = [layer.astype(np.float32) for layer in (matrix, np.linalg.inv(matrix), normal(24, 4, seed=1))]
    images = np.random.RandomState(0).uniform(size=(64, 24)).astype(np.float32)
    labels = np.arange(64) % 4

    def logits_fn(x):
        for layer in layers:
            x = x @ layer.astype(x.dtype)
        return x

    with jax.enable_x64(True):
        exact = margins(np.asarray(logits_fn(images.astype(np.float64))), labels)
    bound = np.asarray(margin_bounds(logits_fn, images, images, labels))
    assert bound.dtype == np.float32
    assert (bound <= exact).all()
    assert (bound <= margins(np.asarray(logits_fn(images)), labels)).all()
    assert np.isfinite(bound).all()


# ---------------------------------------------------------------- rules

# Functions of arrays [B, 4] to [B, 4] with entries in [-1, 3], or in [0.1, 3] for those of POSITIVE.
TIGHT = {
    "elementary": lambda x: jnp.tanh(x) + jax.nn.sigmoid(x) + jnp.exp(x) + jnp.expm1(x),
    "relu, sums": lambda x: jax.nn.relu(x) + jnp.sum(x, 1, keepdims=True),
    "clip": lambda x: jnp.clip(x, 0, 1),
    "negative": lambda x: 1 - x,
    "product": lambda x: x * jnp.array([[1.0, -2.0, 0.0, 3.0]]) / -2,
    "shapes": lambda x: jnp.concatenate([x.reshape(-1, 2, 2).transpose(0, 2, 1)[:, ::-1]], 1).reshape(-1, 4),
    "stack": lambda x: jnp.stack([x, -x])[1],
    "gather": lambda x: x[:, jnp.array([3, 0, 0, 1])],
    "maximum": lambda x: jnp.maximum(x, x[:, ::-1]),
    "largest": lambda x: jnp.max(x, 1, keepdims=True) + jnp.zeros((1, 4)),
    "power": lambda x: x**3,
    "square": lambda x: x**2,
    "absolute": jnp.abs,
    "recomputed": jax.checkpoint(jax.nn.relu),
}
POSITIVE = {
    "roots": jnp.sqrt,
    "reciprocal root": jax.lax.rsqrt,
    "logarithm": jnp.log,
    "quotient": lambda x: 2 / x,
    "real power": lambda x: x ** jnp.float32(1.5),
    "negative power": lambda x: x**-2,
}
LOOSE = {
    "leaky relu": jax.nn.leaky_relu,
    "elu": jax.nn.elu,
    "choice": lambda x: jnp.where(x > 1, 2.0, -x),
    "softmax": jax.nn.softmax,
    "products": lambda x: x * x[:, ::-1],
    "differences": lambda x: x - x.mean(1, keepdims=True),
    "convolution": lambda x: jax.lax.conv_general_dilated(
        x.reshape(-1, 2, 2, 1), jnp.asarray(normal(2, 2, 1, 1), x.dtype), (1, 1), "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC")).reshape(-1, 4),
    "pooling": lambda x: jax.lax.reduce_window(x, 0.0, jax.lax.add, (1, 2), (1, 1), "SAME")
    + jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 2), (1, 1), "SAME"),
}  # fmt: skip
ALL = TIGHT | POSITIVE | LOOSE


@pytest.mark.slow
@pytest.mark.parametrize("name", ALL)
def test_bounds_hold_what_an_operation_gives(name, float64):
    """Corners and the inside of 16 boxes; elementwise functions reach both ends of their bounds."""
    random = np.random.RandomState(0)
    ends = np.sort(random.uniform(0.1 if name in POSITIVE else -1, 3, size=(2, 16, 4)), axis=0)
    shares = np.concatenate(
        [np.array(list(itertools.product((0, 1), repeat=4))), random.uniform(size=(300, 4))]
    )
    inside = ends[0] + shares[:, None] * (ends[1] - ends[0])
    inside = np.concatenate([inside, np.clip(0, *ends)[None]])  # where squares are least
    values = np.asarray(jax.jit(jax.vmap(ALL[name]))(inside))
    low, high = map(np.asarray, jax.jit(functools.partial(interval_bounds, ALL[name]))(*ends))
    assert ((low <= values) & (values <= high)).all()
    if name not in LOOSE:
        rounding = 1000 * EPSILON * (1 + np.abs(values).max(0))
        assert (values.min(0) - low <= rounding).all()
        assert (high - values.max(0) <= rounding).all()


# Logits [B, 4] with a factor in common, a stopped gradient, or two paths.
SHARED = {
    "norm": lambda x: x / jnp.linalg.norm(x, axis=1, keepdims=True) + jnp.array([[0.0, 0.1, 0.2, 0.3]]),
    "reciprocal norm": lambda x: jax.lax.rsqrt(jnp.sum(x * x, 1, keepdims=True)) * x,
    "factor of either sign": lambda x: x * jnp.sum(x, 1, keepdims=True),
    "stopped gradient": lambda x: 2 * jax.lax.stop_gradient(x) - x,
    "residual": lambda x: x + jax.nn.relu(x @ normal(4, 4)),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SHARED)
def test_margins_hold_what_shared_factors_give(name, float64):
    random = np.random.RandomState(0)
    lower = random.uniform(-1, 1, size=(64, 4))
    upper = lower + random.uniform(0, 1, size=(64, 4))
    labels = np.arange(64) % 4
    shares = np.concatenate(
        [np.array(list(itertools.product((0, 1), repeat=4))), random.uniform(size=(300, 4))]
    )
    inside = lower + shares[:, None] * (upper - lower)
    on_points = margins(np.asarray(jax.vmap(SHARED[name])(inside)), labels).min(0)
    for method in METHODS:
        bounded = jax.jit(functools.partial(margin_bounds, SHARED[name], method=method))
        bound = np.asarray(bounded(lower, upper, labels))
        assert (bound <= on_points).all()
        assert np.isfinite(bound).any()
        if name == "stopped gradient":
            np.testing.assert_allclose(bound, on_points, rtol=0, atol=1000 * EPSILON)


OUTSIDE = {
    "root": lambda x: jnp.sqrt(x - 0.5),
    "reciprocal root": lambda x: jax.lax.rsqrt(x - 0.5),
    "logarithm": lambda x: jnp.log(x - 0.5),
    "logarithm from 1": lambda x: jnp.log1p(x - 1.5),
    "real power": lambda x: (x - 0.5) ** jnp.float32(0.5),
}


@pytest.mark.parametrize("name", OUTSIDE)
def test_there_is_no_bound_where_a_function_has_no_value(name):
    """NaN is no prediction, so an image near which it occurs must not be certified."""

    def logits_fn(x):
        return jnp.stack([OUTSIDE[name](x[:, 0]) + 9, x[:, 0]], -1)

    image, label = jnp.array([[0.55]]), jnp.array([0])
    for method in METHODS:
        assert not certified(logits_fn, image, label, threat=ThreatModel(0.1), method=method)[0]
        assert certified(logits_fn, image, label, threat=ThreatModel(0.02), method=method)[0]


def test_only_zero_is_false():
    low, high = interval_bounds(
        lambda x: jnp.where(x.astype(bool), 1.0, -1.0),
        jnp.array([[-0.5, 0.0, 0.1]]),
        jnp.array([[0.5, 0.0, 0.2]]),
    )
    assert (low.tolist(), high.tolist()) == ([[-1, -1, 1]], [[1, -1, 1]])


REFUSED = {
    "sin": jnp.sin,
    "dot_general of two arrays": lambda x: (x[:, :, None] @ x[:, None])[:, 0],
    "argmax": lambda x: x * jnp.argmax(x, 1)[:, None],
}


@pytest.mark.parametrize("name", REFUSED)
def test_other_operations_are_named(name):
    with pytest.raises(
        InputError, match=f"no bound for the operation {name} that depends on the images; use"
    ):
        interval_bounds(REFUSED[name], jnp.zeros((2, 3)), jnp.ones((2, 3)))


def test_other_norms_are_refused():
    with pytest.raises(InputError, match="for the norm linf, not l2; use"):
        certified(lambda x: x, jnp.zeros((2, 3)), jnp.array([0, 1]), threat=ThreatModel(0.1, "l2"))


def test_other_methods_are_refused():
    with pytest.raises(InputError, match="unknown method 'ibp'; use one of crown, intervals"):
        margin_bounds(lambda x: x, jnp.zeros((2, 3)), jnp.ones((2, 3)), jnp.array([0, 1]), method="ibp")


# ---------------------------------------------------------------- trained networks


@pytest.fixture(scope="module")
def digits():
    found = datasets.load_digits()
    return (found.images[::9, ..., None] / 16).astype(np.float32), found.target[::9]


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.usefixtures("optimised")
@pytest.mark.parametrize(
    ("network", "method", "radii", "images"),
    [("at", "intervals", (0.0005, 0.001, 0.1), 200), ("robal_n", "crown", (0.02, 0.05, 0.1), 10)],
)
def test_attacks_break_no_certified_image(network, method, radii, images, digits):
    model = robal_jax.load_model(f"digits_lt/{network}_small_cnn")
    images, digit = (array[:images] for array in digits)
    labels = np.argsort(np.array(model.test.class_names, int))[digit]
    pgd = functools.partial(attacks.pgd, model.logits_fn, jax.random.key(0), images, labels, steps=20)

    @jax.jit
    def bound(radii):
        return certified(model.logits_fn, images, labels, threat=ThreatModel(radii), method=method)

    @jax.jit
    def attack(radii):
        return model.logits_fn(pgd(threat=ThreatModel(radii), step_size=radii / 4))

    clean = model.logits(images).argmax(-1) == labels
    shares = []
    for radius in radii:
        same = np.full(len(images), radius, np.float32)
        certain, robust = np.asarray(bound(same)), np.asarray(attack(same).argmax(-1) == labels)
        assert not (certain & ~robust).any()
        assert not (certain & ~clean).any()
        shares.append(certain.mean())
    assert shares[0] > shares[1] > 0 == shares[2]
    if method == "crown":
        return
    with jax.enable_x64(True):
        wide = images.astype(np.float64)
        margin = margin_bounds(model.logits_fn, wide, wide, labels, method="intervals")
    np.testing.assert_array_equal(np.asarray(margin) > 0, clean)


@pytest.mark.slow
def test_compiled_and_by_itself(float64):
    """An image has the same bound in any batch, but for rounding."""
    weight = normal(5, 4)
    lower, upper = box(np.random.RandomState(0).uniform(size=(3, 5)), 0.1)
    labels = np.array([0, 1, 2])
    found = functools.partial(margin_bounds, lambda x: jax.nn.relu(x @ weight))
    together = jax.jit(found)(lower, upper, labels)
    for i in range(3):
        alone = found(lower[i : i + 1], upper[i : i + 1], labels[i : i + 1])[0]
        assert abs(alone - together[i]) <= 1000 * EPSILON
