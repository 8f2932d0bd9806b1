"""Heads against NumPy, their invariances and initialisation (robal_jax.classifiers)."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from robal_jax import classifiers, models

B, D, K = 4, 64, 7
RNG = np.random.RandomState(0)
FEATURES = RNG.randn(B, D).astype(np.float32)
WEIGHT = (0.1 * RNG.randn(K, D)).astype(np.float32)
BIAS = RNG.randn(K).astype(np.float32)
CLASS_SCALE = RNG.uniform(0.5, 2.0, K).astype(np.float32)
DIRECTION = RNG.randn(D).astype(np.float32)
ARRAYS = {"weight": WEIGHT, "bias": BIAS, "class_scale": CLASS_SCALE, "direction": DIRECTION}
COUNTS = (64, 32, 16, 8, 4, 2, 1)


def numpy_cosine(features, weight, scale, gamma, eta):
    logits = np.zeros((len(features), len(weight)))
    for b, f in enumerate(np.float64(features)):
        for k, w in enumerate(np.float64(weight)):
            f_norm, w_norm = np.sqrt((f * f).sum()), np.sqrt((w * w).sum())
            logits[b, k] = scale * (f / f_norm**eta) @ (w / (gamma + w_norm**eta))
    return logits


def test_linear_logits():
    expected = np.float64(FEATURES) @ np.float64(WEIGHT).T + BIAS
    np.testing.assert_allclose(
        classifiers.linear_logits(FEATURES, WEIGHT, jnp.asarray(BIAS)), expected, rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("eta", [1.0, 0.5, 2.0])
@pytest.mark.parametrize("gamma", [0.0, 1 / 32, 1.0])
@pytest.mark.parametrize("scale", [1.0, 10.0])
def test_cosine_logits(scale, gamma, eta):
    found = classifiers.cosine_logits(FEATURES, WEIGHT, scale=scale, gamma=gamma, eta=eta)
    expected = numpy_cosine(FEATURES, WEIGHT, scale, gamma, eta)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5 * scale)


def test_cosine_of_a_class_with_itself_is_the_scale():
    logits = classifiers.cosine_logits(WEIGHT, WEIGHT, scale=10.0)
    np.testing.assert_allclose(np.diag(logits), 10.0, rtol=1e-6)
    assert np.abs(logits).max() <= 10.0 * (1 + 1e-6)


def test_scale_of_features_and_weights_changes_nothing():
    before = classifiers.cosine_logits(FEATURES, WEIGHT)
    np.testing.assert_allclose(classifiers.cosine_logits(1000 * FEATURES, WEIGHT), before, atol=1e-6)
    np.testing.assert_allclose(classifiers.cosine_logits(FEATURES, 0.01 * WEIGHT), before, atol=1e-6)


def test_gamma_makes_logits_of_a_small_weight_small():
    norms = np.linalg.norm(WEIGHT, axis=-1)
    with_gamma = classifiers.cosine_logits(FEATURES, WEIGHT, gamma=0.5)
    without = classifiers.cosine_logits(FEATURES, WEIGHT)
    np.testing.assert_allclose(with_gamma, without * (norms / (0.5 + norms))[None, :], atol=1e-6)
    # Features have no gamma: their scale still changes nothing.
    np.testing.assert_allclose(
        classifiers.cosine_logits(10 * FEATURES, WEIGHT, gamma=0.5), with_gamma, atol=1e-6
    )


def test_a_feature_vector_without_direction_gives_nan():
    assert np.isnan(classifiers.cosine_logits(0 * FEATURES, WEIGHT)).all()


def numpy_heads():
    """Head, settings, expected logits of a training pass and of an evaluation (None: the same), float64."""
    f, w, b, s, d = (np.float64(x) for x in (FEATURES, WEIGHT, BIAS, CLASS_SCALE, DIRECTION))
    n = np.array(COUNTS)
    units = np.stack([row / np.sqrt((row * row).sum()) for row in f])
    norms = np.array([np.sqrt((row * row).sum()) for row in w])
    freed = np.stack([u - 0.1 * (u @ d) / np.sqrt(d @ d) * d for u in units])
    moving = {"scale": 16.0, "gamma": 1 / 32}
    cosine = numpy_cosine(f, w, 16.0, 1 / 32, 1.0)
    cdt, norm = {"class_counts": COUNTS, "tau": 0.5}, {"tau": 0.5, "temperature": 2.0}
    return [
        ("linear", {}, f @ w.T + b, None),
        ("linear", {"bias": "none"}, f @ w.T, None),
        ("linear", {"bias": "frozen"}, f @ w.T + b, None),
        ("linear", {"bias": "prior", "class_counts": COUNTS}, f @ w.T + b, None),
        ("class_temperature", cdt, (f @ w.T + b) / np.sqrt(64 / n), f @ w.T + b),
        ("class_temperature", cdt | {"bias": "none"}, f @ w.T / np.sqrt(64 / n), f @ w.T),
        ("class_temperature", cdt | {"posthoc": True}, (f @ w.T + b) / np.sqrt(n), None),
        ("cosine", {"scale": 3.0, "gamma": 0.1, "eta": 0.5}, numpy_cosine(f, w, 3.0, 0.1, 0.5), None),
        ("tau_norm", {}, f @ w.T / norms, None),
        ("tau_norm", norm, f @ w.T / np.sqrt(norms) / 2, None),
        ("tau_norm", norm | {"use_bias": True}, (f @ w.T / np.sqrt(norms) + b) / 2, None),
        ("tau_norm", norm | {"learn_scale": True}, f @ w.T / np.sqrt(norms) / 2 * s, None),
        ("tau_norm", {"tau": 0.0, "learn_scale": True, "use_bias": True}, f @ w.T * s + b, None),
        ("tau_norm", {"unit_features": True}, units @ w.T / norms, None),
        ("tde", moving, cosine, None),
        ("tde", moving | {"alpha": 0.1}, cosine, 16.0 * freed @ w.T / (1 / 32 + norms)),
    ]


def with_arrays(head, arrays):
    """The head's variables, from arrays by name."""
    like = jax.eval_shape(lambda x: head.init(jax.random.key(0), x, False), FEATURES)
    return jax.tree_util.tree_map_with_path(lambda path, _: jnp.asarray(arrays[path[-1].key]), like)


@pytest.mark.parametrize(
    ("kind", "settings", "trained", "evaluated"),
    [pytest.param(*row, id=f"{row[0]}-{'-'.join(row[1])}") for row in numpy_heads()],
)
def test_heads(kind, settings, trained, evaluated):
    head = classifiers.HEADS[kind](K, **settings)
    variables = with_arrays(head, ARRAYS)
    for train, expected in (True, trained), (False, trained if evaluated is None else evaluated):
        logits, left = head.apply(variables, jnp.asarray(FEATURES), train, mutable=["batch_stats"])
        # float32 sums of 64 products: 64 * 2^-24 = 4e-6 of the largest logit.
        np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())
        for name, value in left.get("batch_stats", {}).items():
            if (name, train) != ("direction", True):
                np.testing.assert_array_equal(value, ARRAYS[name])


MATRIX, VECTOR = {"weight": (K, D)}, {"bias": (K,)}
CONSTANTS = {"class_scale": 1.0, "direction": 0.0}
INITIAL = [
    # head, parameters, statistics
    (classifiers.LinearHead(K), MATRIX | VECTOR, {}),
    (classifiers.LinearHead(K, bias="none"), MATRIX, {}),
    (classifiers.LinearHead(K, bias="frozen"), MATRIX, VECTOR),
    (classifiers.TemperatureHead(K, COUNTS), MATRIX | VECTOR, {}),
    (classifiers.CosineHead(K), MATRIX, {}),
    (classifiers.TauNormHead(K), MATRIX | VECTOR, {}),
    (classifiers.TauNormHead(K, learn_scale=True), MATRIX | VECTOR | {"class_scale": (K,)}, {}),
    (classifiers.TDEHead(K), MATRIX, {"direction": (D,)}),
]


@pytest.mark.parametrize(("head", "params", "stats"), INITIAL)
def test_initialisation(head, params, stats):
    init = jax.jit(jax.vmap(lambda key: head.init(key, jnp.asarray(FEATURES), True)))
    variables = init(jax.random.split(jax.random.key(0), 200))
    found = {"batch_stats": {}} | variables
    shapes = {kind: {name: value.shape[1:] for name, value in found[kind].items()} for kind in found}
    assert shapes == {"params": params, "batch_stats": stats}
    bound = 1 / np.sqrt(D)
    for name, value in (found["params"] | found["batch_stats"]).items():
        if name in CONSTANTS:
            assert (value == CONSTANTS[name]).all()
            continue
        # 1,400 draws or more: U(-bound, bound)
        assert np.abs(value).max() <= bound
        assert value.max() > 0.98 * bound
        assert value.min() < -0.98 * bound
        # Standard error of the mean of 1,400 draws: bound / sqrt(3 * 1400) = 0.015 bound.
        assert abs(value.mean()) < 0.06 * bound
        assert value.std() == pytest.approx(bound / np.sqrt(3), rel=0.06)


@pytest.mark.parametrize("bias", ["trained", "frozen"])
def test_bias_is_not_a_column_of_the_weight(bias):
    variables = classifiers.LinearHead(K, bias=bias).init(jax.random.key(0), jnp.asarray(FEATURES), False)
    (drawn,) = (tree["bias"] for tree in variables.values() if "bias" in tree)
    assert not any(np.array_equal(column, drawn) for column in variables["params"]["weight"].T)


def test_prior_bias_gives_the_frequencies():
    head = classifiers.LinearHead(K, COUNTS, bias="prior")
    params = head.init(jax.random.key(0), jnp.asarray(FEATURES), False)["params"]
    np.testing.assert_allclose(jax.nn.sigmoid(params["bias"]), np.array(COUNTS) / sum(COUNTS), rtol=1e-5)


def test_frozen_bias_stays():
    model = models.functional(classifiers.LinearHead(K, bias="frozen"))
    params, stats = model.init(jax.random.key(0), jnp.asarray(FEATURES))

    def loss(params):
        logits, moments = model.train(params, stats, FEATURES)
        return (logits**2).sum(), moments

    gradients, moments = jax.grad(loss, has_aux=True)(params)
    assert list(gradients) == ["weight"]
    after = models.update_statistics(stats, (moments,) * 4)
    np.testing.assert_array_equal(after["bias"], stats["bias"])


@pytest.mark.parametrize("head", [classifiers.LinearHead, classifiers.TemperatureHead])
def test_an_unknown_bias(head):
    with pytest.raises(ValueError, match="unknown bias 'zero'; use one of trained, prior, frozen, none"):
        head(K, bias="zero")


LOGITS = np.zeros((B, K), np.float32)
TDE = partial(classifiers.tde_logits, scale=16.0, gamma=0.1, alpha=0.1)
PRIOR = partial(classifiers.adjust_for_prior, tau=1.0)
DIVIDE = partial(classifiers.divide_by_counts, tau=1.0)
WRONG = {
    # function, arguments, message
    "features [D]": (classifiers.cosine_logits, (FEATURES[0], WEIGHT), r"features have shape \[64\]"),
    "weight [D, K]": (classifiers.cosine_logits, (FEATURES, WEIGHT.T), r"it must be \[K, 64\]"),
    "weight [D]": (classifiers.linear_logits, (FEATURES, WEIGHT[0], BIAS), "one row per class"),
    "bias [1, K]": (classifiers.linear_logits, (FEATURES, WEIGHT, BIAS[None]), "shape of bias"),
    "bias [K - 1]": (classifiers.linear_logits, (FEATURES, WEIGHT, BIAS[1:]), r"it must be \[7\]"),
    "tau-norm's weight": (classifiers.tau_norm_logits, (FEATURES, WEIGHT.T), r"it must be \[K, 64\]"),
    "class_scale [K - 1]": (
        partial(classifiers.tau_norm_logits, class_scale=CLASS_SCALE[1:]), (FEATURES, WEIGHT), "class_scale",
    ),
    "direction [D - 1]": (TDE, (FEATURES, WEIGHT, DIRECTION[1:]), "one number per feature"),
    "TDE's weight": (TDE, (FEATURES, WEIGHT.T, DIRECTION), r"it must be \[K, 64\]"),
    "unit features [D]": (classifiers.unit_features, (FEATURES[0],), r"they must be \[B, D\]"),
    "prior's counts": (PRIOR, (LOGITS, COUNTS[1:]), "class_counts is"),
    "a count of 0": (PRIOR, (LOGITS, np.zeros(K)), "the entry 0"),
    "prior's logits": (PRIOR, (LOGITS[0], COUNTS), "logits have shape"),
    "divisors": (DIVIDE, (LOGITS, COUNTS[1:]), "class_counts is"),
    "integers": (DIVIDE, (LOGITS.astype(int), COUNTS), "must be floats"),
}  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_arguments_are_refused(wrong):
    function, arguments, message = WRONG[wrong]
    with pytest.raises(ValueError, match=message):
        function(*arguments)


@pytest.mark.parametrize("settings", [{}, {"bias": "none"}, {"bias": "prior", "class_counts": COUNTS}])
def test_linear_heads_refuse_features_that_were_not_averaged(settings):
    with pytest.raises(ValueError, match=r"features have shape \[4, 1, 64\]; they must be \[B, D\]"):
        classifiers.LinearHead(K, **settings).init(jax.random.key(0), FEATURES[:, None], False)


@pytest.mark.parametrize("head", ["cosine", "tau_norm", "tde"])
def test_other_heads_refuse_features_that_were_not_averaged(head):
    with pytest.raises(ValueError, match=r"features have shape \[4, 1, 64\]; they must be \[B, D\]"):
        classifiers.HEADS[head](K).init(jax.random.key(0), FEATURES[:, None], False)


@pytest.mark.parametrize("counts", [(), COUNTS[1:]])
@pytest.mark.parametrize(
    "head", [partial(classifiers.LinearHead, bias="prior"), classifiers.TemperatureHead], ids=["prior", "cdt"]
)
def test_heads_refuse_class_counts_of_the_wrong_size(head, counts):
    with pytest.raises(ValueError, match=r"the shape of class_counts is .*; it must be \[7\]"):
        head(K, class_counts=counts).init(jax.random.key(0), FEATURES, False)


def test_no_gradient_flows_through_the_norm_of_tau_norm():
    cotangent = RNG.randn(B, K)
    found = jax.grad(
        lambda w: (classifiers.tau_norm_logits(FEATURES, w, tau=0.5, temperature=2.0) * cotangent).sum()
    )(WEIGHT)
    norms = np.linalg.norm(np.float64(WEIGHT), axis=-1, keepdims=True)
    # float32 sums of B products
    np.testing.assert_allclose(found, cotangent.T @ FEATURES / np.sqrt(norms) / 2, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_tde_without_a_direction_is_the_cosine():
    def tde(features, weight):
        direction = jnp.zeros(D)
        return classifiers.tde_logits(features, weight, direction, scale=16.0, gamma=0.1, alpha=0.1)

    expected, pullback = jax.vjp(partial(classifiers.cosine_logits, scale=16.0, gamma=0.1), FEATURES, WEIGHT)
    found, pullback_2 = jax.vjp(tde, FEATURES, WEIGHT)
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)
    for gradient, expected in zip(pullback_2(found), pullback(found), strict=True):
        np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=1e-5)


def test_direction_of_tde_is_a_sum_that_forgets():
    model = models.functional(classifiers.TDEHead(K))
    params, stats = model.init(jax.random.key(0), jnp.asarray(FEATURES))
    expected = np.zeros(D)
    for features in FEATURES, 3 * FEATURES[:2] + 1:
        _, moments = model.train(params, stats, jnp.asarray(features))
        stats = models.update_statistics(stats, (moments,))
        norms = np.linalg.norm(np.float64(features), axis=-1, keepdims=True)
        expected = 0.9 * expected + np.mean(features / norms, axis=0)
    np.testing.assert_allclose(stats["direction"], expected, rtol=1e-5, atol=1e-6)


def test_heads_with_the_same_parameters_are_interchangeable():
    """Evaluates a checkpoint of the linear head with other heads, and one of the cosine head with TDE."""
    features = jnp.asarray(FEATURES)
    linear = classifiers.LinearHead(K)
    variables = linear.init(jax.random.key(1), features, False)
    trained = linear.apply(variables, features, False)
    others = [
        (classifiers.TauNormHead(K, tau=0.0, use_bias=True), trained),
        (classifiers.TauNormHead(K), classifiers.tau_norm_logits(features, variables["params"]["weight"])),
        (classifiers.TemperatureHead(K, COUNTS), trained),
        (classifiers.TemperatureHead(K, COUNTS, tau=0.5, posthoc=True), trained / np.sqrt(COUNTS)[None, :]),
    ]
    for head, expected in others:
        np.testing.assert_allclose(head.apply(variables, features, False), expected, rtol=1e-6, atol=1e-6)

    cosine = classifiers.CosineHead(K, scale=16.0, gamma=1 / 32)
    variables = cosine.init(jax.random.key(1), features, False)
    tde = classifiers.TDEHead(K, alpha=0.1)
    stats = tde.init(jax.random.key(0), features, False)["batch_stats"]
    found = tde.apply(variables | {"batch_stats": stats}, features, False)
    np.testing.assert_allclose(found, cosine.apply(variables, features, False), rtol=1e-6, atol=1e-6)


def test_adjust_for_prior():
    counts = np.array(COUNTS)
    logits = RNG.randn(B, K).astype(np.float32)
    expected = logits - 1.5 * np.log(counts / counts.sum())
    np.testing.assert_allclose(
        classifiers.adjust_for_prior(logits, counts, tau=1.5), expected, rtol=1e-5, atol=1e-5
    )
    np.testing.assert_array_equal(classifiers.adjust_for_prior(logits, counts, tau=0.0), logits)
    # A balanced set has no prior to remove: predictions stay.
    balanced = classifiers.adjust_for_prior(logits, np.full(K, 5), tau=2.0)
    np.testing.assert_array_equal(np.argmax(balanced, -1), np.argmax(logits, -1))


@pytest.mark.parametrize(
    ("head", "message"),
    [
        (classifiers.CosineHead(3, scale=0.0), "scale is 0; it must be in"),
        (classifiers.CosineHead(3, scale=-1.0), "scale is -1; it must be in"),
        (classifiers.CosineHead(3, scale=1e37), r"scale is 1e\+37; it must be in 1e-06\.\.1e\+06"),
        (classifiers.CosineHead(3, gamma=-1.0), "gamma is -1; it must be finite and >= 0"),
        (classifiers.TDEHead(3, scale=float("nan")), "scale is nan; it must be in"),
        (classifiers.TauNormHead(3, temperature=0.0), "temperature is 0; it must be in"),
        (classifiers.LinearHead(1), "num_classes is 1; it must be at least 2"),
        (classifiers.CosineHead(2.5), "num_classes is 2.5; it must be an integer"),
        (classifiers.TDEHead(None), "num_classes is None; it must be an integer"),
        (classifiers.TemperatureHead(3, class_counts={0: 3, 1: 2, 2: 1}), "class_counts is .*; it must be"),
        (classifiers.LinearHead(3, class_counts=(3, 2, 0), bias="prior"), "class_counts have the entry 0"),
    ],
)
def test_heads_out_of_range_are_refused(head, message):
    with pytest.raises(ValueError, match=message):
        head.init(jax.random.key(0), jnp.ones((2, 4)), False)
