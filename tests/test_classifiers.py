"""Heads against NumPy, their invariances and initialisation (robal_jax.classifiers)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from robal_jax import classifiers

B, D, K = 4, 64, 7
RNG = np.random.RandomState(0)
FEATURES = RNG.randn(B, D).astype(np.float32)
WEIGHT = (0.1 * RNG.randn(K, D)).astype(np.float32)
BIAS = RNG.randn(K).astype(np.float32)


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


def test_a_feature_vector_without_direction_is_not_hidden():
    assert np.isnan(classifiers.cosine_logits(0 * FEATURES, WEIGHT)).all()


@pytest.mark.parametrize(
    ("head", "shapes"),
    [
        (classifiers.LinearHead(K), {"weight": (K, D), "bias": (K,)}),
        (classifiers.CosineHead(K), {"weight": (K, D)}),
    ],
    ids=["linear", "cosine"],
)
def test_initialisation(head, shapes):
    init = jax.jit(jax.vmap(lambda key: head.init(key, jnp.asarray(FEATURES))))
    params = init(jax.random.split(jax.random.key(0), 200))["params"]
    assert {name: value.shape[1:] for name, value in params.items()} == shapes
    bound = 1 / np.sqrt(D)
    for value in params.values():  # 1,400 draws or more: U(-bound, bound)
        assert np.abs(value).max() <= bound
        assert value.max() > 0.98 * bound
        assert value.min() < -0.98 * bound
        # Standard error of the mean of 1,400 draws: bound / sqrt(3 * 1400) = 0.015 bound.
        assert abs(value.mean()) < 0.06 * bound
        assert value.std() == pytest.approx(bound / np.sqrt(3), rel=0.06)


def test_bias_is_not_a_column_of_the_weight():
    params = classifiers.LinearHead(K).init(jax.random.key(0), jnp.asarray(FEATURES))["params"]
    assert not any(np.array_equal(column, params["bias"]) for column in params["weight"].T)


def test_heads_apply_the_functions():
    key, features = jax.random.key(1), jnp.asarray(FEATURES)
    linear = classifiers.HEADS["linear"](K)
    params = linear.init(key, features)
    np.testing.assert_array_equal(
        linear.apply(params, features), classifiers.linear_logits(features, **params["params"])
    )
    cosine = classifiers.HEADS["cosine"](K, scale=3.0, gamma=0.1, eta=0.5)
    params = cosine.init(key, features)
    np.testing.assert_array_equal(
        cosine.apply(params, features),
        classifiers.cosine_logits(features, params["params"]["weight"], scale=3.0, gamma=0.1, eta=0.5),
    )


def test_adjust_for_prior():
    counts = np.array([64, 32, 16, 8, 4, 2, 1])
    logits = RNG.randn(B, K).astype(np.float32)
    expected = logits - 1.5 * np.log(counts / counts.sum())
    np.testing.assert_allclose(
        classifiers.adjust_for_prior(logits, counts, tau=1.5), expected, rtol=1e-5, atol=1e-5
    )
    np.testing.assert_array_equal(classifiers.adjust_for_prior(logits, counts, tau=0.0), logits)
    # A balanced set has no prior to remove: predictions stay.
    balanced = classifiers.adjust_for_prior(logits, np.full(K, 5), tau=2.0)
    np.testing.assert_array_equal(np.argmax(balanced, -1), np.argmax(logits, -1))
