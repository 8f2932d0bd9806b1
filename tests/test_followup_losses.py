"""Losses and terms of the follow-up methods against NumPy written from the equations."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_losses import COUNTS, B, K, numpy_cross_entropy, random_labels, random_logits, softmax

from robal_jax import budgets, losses, regularisers
from robal_jax.devices.parallel import AXIS

Z, Y = random_logits(0), random_labels(1)
FEATURES = random_logits(2, size=1.0, classes=7)


def numpy_harl(logits, labels, alpha=0.1, beta=0.1, gamma=0.1):
    of_image = numpy_cross_entropy(logits, labels)
    of_class = np.array([of_image[labels == c].mean() if np.any(labels == c) else 0.0 for c in range(K)])
    shares = of_class / of_class.sum()
    return alpha * of_class.mean() + beta * of_class.var() + gamma * np.sum(shares**2)


def numpy_rebalanced_weights(counts, predicted):
    weights = []
    for n, a in zip(counts, predicted, strict=True):
        beta = (n - 1) / n
        effective = sum(beta**k for k in range(int(a)))  # of a geometric series
        weights.append(1 / (effective + 1e-5))
    return K * np.array(weights) / sum(weights)


def numpy_tail(features, labels, counts, divergence):
    p = [softmax(row) for row in features]
    total, anchors = 0.0, [i for i in range(len(labels)) if labels[i] > 2 * (len(counts) // 3)]
    for i in anchors:
        for j in range(len(labels)):
            pairs = range(len(labels)) if divergence == "batch" else [j]
            of_pairs = [np.sum(p[i] * (np.log(p[i]) - np.log(p[m]))) for m in pairs]
            distance = np.mean(of_pairs) / (features.shape[1] if divergence == "batch" else 1)
            weight = np.sqrt(sum(counts) / counts[labels[i]]) + np.sqrt(sum(counts) / counts[labels[j]])
            total += (-1 if labels[i] == labels[j] else 1) * weight * distance / len(labels)
    return total / max(len(anchors), 1)


@pytest.mark.parametrize("labels", [Y, np.full(B, 3), np.arange(B) % K], ids=["random", "one class", "all"])
def test_harl(labels):
    found = losses.harl(Z, labels)
    np.testing.assert_allclose(found, np.full(B, numpy_harl(Z, labels)), rtol=2e-6)


@pytest.mark.slow
def test_harl_of_a_solved_batch_has_a_gradient_without_nan():
    logits = 1e4 * jax.nn.one_hot(Y, K)
    value, gradient = jax.value_and_grad(lambda z: losses.harl(z, Y).mean())(logits)
    assert value == 0
    assert np.all(np.isfinite(gradient))


@pytest.mark.parametrize("predicted", [[9, 4, 0, 3, 1], [0, 0, 0, 0, 1], [100, 40, 16, 6, 2]])
@pytest.mark.parametrize(
    "counts", [COUNTS, [5, 4, 3, 2, 1], [9.5, 4, 2.2, 1.2, 1]],
    ids=["counts", "a class of one image", "with generated images"],
)  # fmt: skip
def test_rebalanced(counts, predicted):
    counts, predicted = np.array(counts), np.array(predicted, float)
    weights = numpy_rebalanced_weights(counts, predicted)
    np.testing.assert_allclose(losses.rebalanced_weights(counts, predicted), weights, rtol=1e-5)
    statistics = {"predicted": jnp.asarray(predicted)}
    found = losses.rebalanced(Z, Y, class_counts=counts, class_statistics=statistics)
    wanted = weights[Y] * numpy_cross_entropy(Z, Y) / weights[Y].mean()
    np.testing.assert_allclose(found, wanted, rtol=2e-5)


def test_staged_and_weighted():
    both = functools.partial(losses.staged, first=losses.focal, then=losses.cross_entropy, start=5)
    np.testing.assert_allclose(both(Z, Y, epoch=4), losses.focal(Z, Y), rtol=1e-6)
    np.testing.assert_allclose(both(Z, Y, epoch=jnp.int32(5)), losses.cross_entropy(Z, Y), rtol=1e-6)
    radii = jnp.linspace(0.0, 2.0, B)
    weighted = losses.weighted_by_radius(Z, Y, base=losses.focal, radius_factors=radii)
    np.testing.assert_array_equal(weighted, radii * losses.focal(Z, Y))
    with pytest.raises(ValueError, match=r"radius_factors"):
        losses.weighted_by_radius(Z, Y, base=losses.focal, radius_factors=radii[:2])


@pytest.mark.parametrize(("epoch", "named"), [(4, "first"), (5, "then")])
def test_a_loss_whose_turn_it_is_not_gives_no_nan(epoch, named):
    def invalid(logits, labels):
        del labels
        return jnp.sqrt(-1.0 - logits[:, 0] ** 2)

    pair = {"first": invalid, "then": invalid, named: losses.cross_entropy}

    @jax.jit
    def gradient(z, epoch):
        return jax.grad(lambda z: losses.staged(z, Y, **pair, start=5, epoch=epoch).mean())(z)

    wanted = jax.grad(lambda z: losses.cross_entropy(z, Y).mean())(Z)
    np.testing.assert_allclose(gradient(Z, jnp.int32(epoch)), wanted, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("divergence", regularisers.DIVERGENCES)
@pytest.mark.parametrize(
    "labels", [np.array([4, 0, 3, 4, 1, 2]), np.array([0, 1, 2, 0, 1, 2])], ids=["tail", "none"]
)
def test_tail_features(labels, divergence):
    term = functools.partial(regularisers.tail_features, class_counts=COUNTS, divergence=divergence)
    value, gradient = jax.value_and_grad(lambda f: term(f, labels))(jnp.asarray(FEATURES))
    np.testing.assert_allclose(value, numpy_tail(FEATURES, labels, COUNTS, divergence), rtol=1e-5)
    assert np.any(gradient) == np.any(labels > 2)
    # The tail is that of the counts, whatever the numbers of the classes.
    turned = term(jnp.asarray(FEATURES), K - 1 - labels, class_counts=COUNTS[::-1])
    np.testing.assert_allclose(turned, value, rtol=1e-6)
    with pytest.raises(ValueError, match="divergence is 'all'; use one of batch, pair"):
        regularisers.tail_features(FEATURES, labels, class_counts=COUNTS, divergence="all")


def test_products_outside_of_the_network_are_not_rounded():
    """The precision of the network does not reach them, and a GPU or TPU rounds their factors by default."""
    tail = functools.partial(regularisers.tail_features, class_counts=COUNTS)
    for function, products in (
        (jax.value_and_grad(lambda z: losses.harl(z, Y).sum()), 2),
        (jax.value_and_grad(lambda f: tail(f, Y)), 2),
        (lambda z: budgets.dafa(COUNTS, 0.1).statistics.seen(Y, z), 1),
    ):
        text = jax.jit(function).lower(jnp.asarray(Z)).as_text()
        assert text.count("dot_general") == text.count("precision = [HIGHEST, HIGHEST]") == products


def test_squared_error():
    other = random_logits(5)
    wanted = [np.sum((softmax(p) - softmax(q)) ** 2) for p, q in zip(Z, other, strict=True)]
    np.testing.assert_allclose(losses.squared_error(Z, other), wanted, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["harl", "rebalanced", "tail_batch", "tail_pair"])
def test_the_whole_batch_on_two_devices(name):
    """A step takes the mean of the devices' losses and gradients; it must be that of one device."""
    labels, statistics = np.array([4, 0, 3, 4, 1, 2]), {"predicted": jnp.arange(K, dtype=float)}
    functions = {
        "harl": losses.harl,
        "rebalanced": functools.partial(losses.rebalanced, class_counts=COUNTS, class_statistics=statistics),
        **{
            f"tail_{kind}": functools.partial(
                regularisers.tail_features, class_counts=COUNTS, divergence=kind
            )
            for kind in regularisers.DIVERGENCES
        },
    }
    x, matrix = jnp.asarray(FEATURES), jnp.asarray(random_logits(3, classes=7)[:K].T)

    def loss(matrix, x, labels, axis_name=None):
        return functions[name](x @ matrix, labels, axis_name=axis_name).mean()

    one = jax.jit(jax.value_and_grad(loss))(matrix, x, labels)
    split = x.reshape(2, 3, -1), labels.reshape(2, 3)

    def of_device(x, labels):
        return jax.lax.pmean(jax.value_and_grad(loss)(matrix, x, labels, AXIS), AXIS)

    two = jax.jit(jax.vmap(of_device, axis_name=AXIS))(*split)
    for here, there in zip(one, two, strict=True):
        np.testing.assert_allclose(there, np.stack([here, here]), rtol=2e-5, atol=1e-6)
