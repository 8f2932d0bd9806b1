"""Layers against NumPy, ResNet-50 against PyTorch, sizes, running statistics (robal_jax.models)."""

import math
import re
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from robal_jax import classifiers, models, objectives, pytorch
from robal_jax.models import convolutions, layers


def arrays_like(tree, seed):
    """Random arrays of the shapes of a tree, all positive, so that they can be variances too."""
    leaves, structure = jax.tree.flatten(tree)
    rng = np.random.RandomState(seed)
    return structure.unflatten([jnp.asarray(rng.uniform(0.5, 1.5, x.shape), jnp.float32) for x in leaves])


def centred_like(tree, seed):
    """Random arrays of the size that training gives them, so that no layer's output vanishes or explodes."""
    rng = np.random.RandomState(seed)

    def draw(path, leaf):
        if path[-1].key in ("var", "scale"):
            return jnp.asarray(rng.uniform(0.5, 1.5, leaf.shape), leaf.dtype)
        return jnp.asarray(rng.randn(*leaf.shape) / np.sqrt(np.prod(leaf.shape[:-1])), leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, tree)


# ---------------------------------------------------------------- batch norm


def test_batch_norm():
    x = (3 * np.random.RandomState(0).randn(8, 3, 5, 4) + 1).astype(np.float32)
    layer = models.BatchNorm()
    fresh = layer.init(jax.random.key(0), x, False)
    np.testing.assert_array_equal(fresh["batch_stats"]["mean"], np.zeros(4))
    np.testing.assert_array_equal(fresh["batch_stats"]["var"], np.ones(4))
    variables = arrays_like(fresh, 0)
    scale, bias = variables["params"]["scale"], variables["params"]["bias"]

    def normalised(mean, var):
        mean, var = np.float64(mean), np.float64(var)
        return (np.float64(x) - mean) / np.sqrt(var + 1e-5) * np.float64(scale) + np.float64(bias)

    rows = np.float64(x).reshape(-1, 4)
    running = variables["batch_stats"]
    predicted = layer.apply(variables, x, False)
    np.testing.assert_allclose(predicted, normalised(running["mean"], running["var"]), atol=1e-5)

    trained, left = layer.apply(variables, x, True, mutable=["batch_stats"])
    np.testing.assert_allclose(trained, normalised(rows.mean(0), rows.var(0)), atol=1e-5)
    np.testing.assert_allclose(left["batch_stats"]["mean"], rows.mean(0), rtol=1e-5)
    np.testing.assert_allclose(left["batch_stats"]["var"], rows.var(0, ddof=1), rtol=1e-5)  # unbiased


def test_update_statistics():
    r, a, n = (arrays_like({"bn": {"mean": jnp.zeros(5), "var": jnp.zeros(5)}}, seed) for seed in range(3))
    found = models.update_statistics(r, (a, n, n, a))
    for part in ("mean", "var"):
        r_, a_, n_ = (np.float64(tree["bn"][part]) for tree in (r, a, n))
        expected = 0.9**4 * r_ + 0.1 * (0.9**3 * a_ + 0.9**2 * n_ + 0.9 * n_ + a_)
        np.testing.assert_allclose(found["bn"][part], expected, rtol=1e-6)
    np.testing.assert_array_equal(models.update_statistics(r, ())["bn"]["mean"], r["bn"]["mean"])


def test_update_statistics_of_a_head():
    r, a, n = (arrays_like({"direction": jnp.zeros(5), "bias": jnp.zeros(5)}, seed) for seed in range(3))
    found = models.update_statistics(r, (a, n))
    expected = 0.81 * np.float64(r["direction"]) + 0.9 * np.float64(a["direction"]) + n["direction"]
    np.testing.assert_allclose(found["direction"], expected, rtol=1e-6)
    np.testing.assert_array_equal(found["bias"], r["bias"])


def test_a_state_of_another_name_takes_the_newest_value():
    """So a user's head keeps a state without an entry in the library."""

    class CountingHead(nn.Module):
        @nn.compact
        def __call__(self, features, train):
            seen = self.variable("batch_stats", "seen", jnp.zeros, ())
            if train and not self.is_initializing():
                seen.value += len(features)
            return features

    model = models.functional(models.Network(models.SmallCNN((4, 4, 4), 8), CountingHead()))
    images = jnp.asarray(np.random.RandomState(0).rand(6, 8, 8, 1), jnp.float32)
    params, stats = jax.jit(model.init)(jax.random.key(0), images)
    for step in 1, 2:
        passes = [jax.jit(model.train)(params, stats, images[:size])[1] for size in (6, 4)]
        stats = models.update_statistics(stats, tuple(passes))
        assert stats["classifier"]["seen"] == 4 * step
    assert (
        0
        < np.abs(stats["backbone"]["bn1"]["mean"]).max()
        < np.abs(passes[1]["backbone"]["bn1"]["mean"]).max()
    )


@pytest.mark.parametrize("moments", [{"bn": {"mean": jnp.ones(2)}}, None, jnp.ones(2), "bn"])
def test_moments_of_one_pass_are_a_tuple_too(moments):
    with pytest.raises(ValueError, match=r"moments are a .*; pass a tuple with those of each training pass"):
        models.update_statistics({"bn": {"mean": jnp.zeros(2)}}, moments)


def test_one_value_per_channel_has_no_variance():
    layer, x = models.BatchNorm(), jnp.ones((1, 1, 1, 4))
    variables = layer.init(jax.random.key(0), x, True)
    assert layer.apply(variables, x, False).shape == x.shape
    with pytest.raises(ValueError, match="more than one value per channel; use a larger batch"):
        layer.apply(variables, x, True, mutable=["batch_stats"])


@pytest.mark.slow
def test_statistics_of_a_batch_that_is_spread():
    """Two halves under an axis name give what the whole batch gives."""
    images = jnp.asarray(np.random.RandomState(0).rand(8, 8, 8, 1), jnp.float32)
    whole = models.functional(models.Network(models.SmallCNN((4, 4, 4), 8), classifiers.LinearHead(3)))
    spread = models.functional(
        models.Network(models.SmallCNN((4, 4, 4), 8, axis_name="devices"), classifiers.LinearHead(3))
    )
    params, stats = jax.jit(whole.init)(jax.random.key(0), images)
    logits, moments = jax.jit(whole.train)(params, stats, images)
    mapped = jax.vmap(partial(spread.train, params, stats), axis_name="devices")
    logits_2, moments_2 = jax.jit(mapped)(images.reshape(2, 4, 8, 8, 1))
    # A mean of two means against one mean: float32 rounding through three layers.
    np.testing.assert_allclose(logits_2.reshape(8, 3), logits, atol=1e-5)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x[0], y, rtol=1e-5, atol=1e-6), moments_2, moments)
    jax.tree.map(lambda x: np.testing.assert_array_equal(x[0], x[1]), moments_2)
    alone = jax.jit(whole.train)(params, stats, images[:4])[0]
    assert np.abs(alone - logits[:4]).max() > 1e-3  # the axis name matters


@pytest.mark.slow
def test_statistics_in_one_pass_are_those_of_two():
    """Logits, moments and gradients, of a whole batch and of halves on two devices, in float64."""

    def train(one_pass, axis_name, params, stats, images):
        network = models.Network(
            models.SmallCNN((4, 4, 4), 8, axis_name=axis_name), classifiers.LinearHead(3)
        )
        model = models.functional(network, accelerator=one_pass)

        def loss(params, images):
            logits, moments = model.train(params, stats, images)
            return jnp.sin(logits).sum(), (logits, moments)

        gradients, found = jax.grad(loss, (0, 1), has_aux=True)(params, images)
        if axis_name is not None:
            gradients = jax.lax.psum(gradients[0], axis_name), gradients[1]
        return gradients, found

    with jax.enable_x64(True):
        images = jnp.asarray(np.random.RandomState(0).rand(8, 8, 8, 1))
        model = models.functional(models.Network(models.SmallCNN((4, 4, 4), 8), classifiers.LinearHead(3)))
        drawn = jax.jit(model.init)(jax.random.key(0), images)
        params, stats = (jax.tree.map(lambda x: x.astype(float), tree) for tree in drawn)
        stats = arrays_like(stats, 1)
        wanted = jax.jit(partial(train, False, None))(params, stats, images)
        found = jax.jit(partial(train, True, None))(params, stats, images)
        spread = jax.vmap(partial(train, True, "devices", params, stats), axis_name="devices")
        (of_params, of_images), (logits, moments) = jax.jit(spread)(images.reshape(2, 4, 8, 8, 1))
        first = jax.tree.map(lambda x: x[0], (of_params, moments))
        whole = of_images.reshape(images.shape), logits.reshape(8, 3)
        found_2 = (first[0], whole[0]), (whole[1], first[1])
    # Rounding of 2^-53, times sums of up to 512 terms, times variances of 0.1 and more below them.
    bound = 1e-10
    for each in found, found_2:
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=bound, atol=bound), each, wanted)


@pytest.mark.slow
def test_passes_made_as_one_keep_their_own_statistics():
    network = models.Network(models.SmallCNN((4, 4, 4), 8), classifiers.LinearHead(3))
    with jax.enable_x64(True):
        nat = jnp.asarray(np.random.RandomState(0).rand(6, 8, 8, 1))
        adv = 0.5 * nat
        model = models.functional(network)
        params, stats = jax.tree.map(lambda x: x.astype(float), jax.jit(model.init)(jax.random.key(0), nat))
        found = []
        for accelerator in False, True:
            model = models.functional(network, accelerator=accelerator)
            found.append(jax.jit(partial(objectives.passes, model))(params, stats, nat, adv))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-10, atol=1e-10), *found)
    means = (moments["backbone"]["bn1"]["mean"] for _, moments in found[1])
    assert np.abs(np.subtract(*means)).max() > 0.01


@pytest.mark.slow
def test_weights_made_ready_predict_the_same():
    """To the bit: only the place of the computation changes."""
    network = models.Network(models.WideResNet(10, 1), classifiers.LinearHead(3))
    model = models.functional(network, precision="bfloat16", accelerator=True, cast_kernels=True)
    images = jnp.asarray(np.random.RandomState(0).rand(2, 8, 8, 3), jnp.float32)
    params, stats = jax.jit(model.init)(jax.random.key(0), images)
    stats = arrays_like(stats, 1)
    ready = model.ready(params, stats)
    kernels = [x for x in jax.tree.leaves(ready[0]["backbone"]) if x.ndim == 4]
    assert kernels
    assert {x.dtype for x in kernels} == {jnp.dtype(jnp.bfloat16)}
    with jax.disable_jit():
        np.testing.assert_array_equal(model.predict(*ready, images), model.predict(params, stats, images))


@pytest.mark.parametrize(("near", "by"), [(None, None), (None, 0), (0, None), (0, 0)])
def test_means_in_one_pass_of_several_batches(near, by):
    vectors = [jnp.arange(6.0).reshape((2, 3)) if axis == 0 else jnp.ones(3) for axis in (near, by)]
    moved = models.layers._moved
    found = moved(*vectors) if (near, by) == (None, None) else jax.vmap(moved, (near, by))(*vectors)
    np.testing.assert_array_equal(found, np.add(*map(np.asarray, vectors)))


def test_only_for_an_nvidia_gpu_the_gradient_of_an_offset_is_kept_apart():
    def total(x, one):
        return models.layers.normalised_in_one_pass(x, one, one, one)[0].sum()

    traced = jax.jit(jax.grad(total)).trace(jnp.ones((2, 3)), jnp.ones(3))
    kept = [
        "optimization_barrier" in traced.lower(lowering_platforms=(platform,)).as_text()
        for platform in ("cpu", "cuda", "tpu")
    ]
    assert kept == [False, True, False]


def test_variance_in_one_pass_is_not_negative():
    one, zero = jnp.ones(1), jnp.zeros(1)
    _, _, var = models.layers.normalised_in_one_pass(jnp.full((7, 1), 100.1), one, zero, zero)
    assert var >= 0


# ---------------------------------------------------------------- convolutions


def numpy_convolution(x, kernel, stride):
    k = kernel.shape[0]
    x = np.pad(np.float64(x), ((0, 0), (k // 2, k // 2), (k // 2, k // 2), (0, 0)))
    rows = [
        [
            np.einsum("bhwc,hwco->bo", x[:, top : top + k, left : left + k], np.float64(kernel))
            for left in range(0, x.shape[2] - k + 1, stride)
        ]
        for top in range(0, x.shape[1] - k + 1, stride)
    ]
    return np.array(rows).transpose(2, 0, 1, 3)


SIZES = [
    # height, width, kernel, stride
    (8, 8, 1, 1), (8, 8, 3, 1), (8, 8, 3, 2), (7, 7, 3, 2), (8, 8, 1, 2),
    (7, 7, 1, 2), (5, 9, 3, 1), (9, 6, 3, 2), (9, 9, 5, 3), (8, 10, 5, 3), (8, 9, 7, 2),
]  # fmt: skip


# Of 3 channels and 3x3 it is one matrix product.
@pytest.mark.slow
@pytest.mark.parametrize("channels", [3, pytest.param(5, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("height", "width", "size", "stride"), SIZES)
def test_convolutions(height, width, size, stride, channels):
    rng = np.random.RandomState(0)
    x = jnp.asarray(rng.randn(2, height, width, channels), jnp.float32)
    kernel = jnp.asarray(rng.randn(size, size, channels, 4), jnp.float32)
    out, pullback = jax.vjp(lambda x, kernel: convolutions.convolution(x, kernel, stride), x, kernel)
    np.testing.assert_allclose(out, numpy_convolution(x, kernel, stride), atol=1e-4)
    found, pullback_2 = jax.vjp(lambda x, kernel: convolutions.cpu_convolution(x, kernel, stride), x, kernel)
    # Sums of up to 7 * 7 * 5 products near 1, in another order: 245 * 2^-24.
    np.testing.assert_allclose(found, out, rtol=2e-5, atol=2e-5)
    dy = jnp.asarray(rng.randn(*out.shape), jnp.float32)
    for expected, gradient in zip(pullback(dy), pullback_2(dy), strict=True):
        # Sums of up to 2 * 10 * 10 products near 1, in another order: 200 * 2^-24 at worst.
        np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-4)


def with_gradients(function, x, kernel):
    """Compiled ``dy -> (out, dx, dkernel)``."""

    def run(dy):
        out, pullback = jax.vjp(function, x, kernel)
        return out, *pullback(dy)

    return jax.jit(run)


@pytest.mark.parametrize(("batch", "side", "channels", "features"), [(3, 6, 5, 7), (2, 8, 4, 4)])
def test_winograd(batch, side, channels, features):
    """It is XLA's convolution, transposed it is the gradient by the images, and the products are fewer."""
    rng = np.random.RandomState(0)
    x = jnp.asarray(rng.randn(batch, side, side, channels), jnp.float32)
    kernel = jnp.asarray(rng.randn(3, 3, channels, features), jnp.float32)
    dy = jnp.asarray(rng.randn(batch, side, side, features), jnp.float32)
    out, dx, _ = with_gradients(lambda x, kernel: convolutions.convolution(x, kernel, 1), x, kernel)(dy)
    winograd = jax.jit(convolutions.winograd, static_argnames="transposed")
    # Sums of at most 9 * 7 products near 1 in another order, of numbers that are at most four times as large.
    np.testing.assert_allclose(winograd(x, kernel), out, atol=63 * 4 * 2**-24 * np.abs(out).max())
    found = winograd(dy, kernel, transposed=True)
    np.testing.assert_allclose(found, dx, atol=63 * 4 * 2**-24 * np.abs(dx).max())

    products = [
        equation for equation in equations(jax.make_jaxpr(convolutions.winograd)(x, kernel).jaxpr)
        if equation.primitive.name == "dot_general"
    ]  # fmt: skip
    of_images = [equation.invars[0].aval.shape for equation in products]
    assert of_images == [(batch, side // 2, side // 2, channels)] * 16  # 16 for 4 pixels, instead of 36


@pytest.mark.parametrize("size", [3, 5])
def test_strided_gradient_multiplies_no_zeros(size):
    """Over its phases a convolution's gradient by the images uses each tap of the kernel once."""
    x, kernel = jnp.zeros((2, 8, 8, 5)), jnp.zeros((size, size, 5, 4))
    out, pullback = jax.vjp(lambda x: convolutions.cpu_convolution(x, kernel, 2), x)
    convolved = [
        equation for equation in equations(jax.make_jaxpr(pullback)(out).jaxpr)
        if equation.primitive.name == "conv_general_dilated"
    ]  # fmt: skip
    gradient = [equation for equation in convolved if equation.params["rhs_dilation"] == (1, 1)]
    assert all(equation.params["lhs_dilation"] == (1, 1) for equation in gradient)
    assert sum(math.prod(equation.invars[1].aval.shape[:2]) for equation in gradient) == size**2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("channels", "features", "stride", "copied"),
    [(129, 129, 1, True), (129, 130, 1, False), (129, 129, 2, False), (6, 6, 1, False), (256, 256, 1, False)],
)
def test_tpu_convolution_reads_a_copy_of_the_kernel(channels, features, stride, copied):
    """The gradients, also second ones, those of a batch of batches and forward ones, are XLA's."""
    rng = np.random.RandomState(0)
    x = jnp.asarray(rng.randn(2, 3, 4, 4, channels), jnp.float32)
    kernel = jnp.asarray(rng.randn(3, 3, channels, features), jnp.float32) / 9

    def numbers(convolve):
        def loss(x, kernel):
            return (jax.vmap(lambda x: convolve(x, kernel, stride))(x) ** 3).sum()

        def second(x, kernel):
            return sum((each**2).sum() for each in jax.grad(loss, (0, 1))(x, kernel))

        of_a_batch = jax.vmap(jax.grad(lambda x, kernel: loss(x[None], kernel), (0, 1)), (0, None))
        forward = jax.jvp(lambda x, kernel: convolve(x, kernel, stride), (x[0], kernel), (x[1], 2 * kernel))
        return (
            of_a_batch(x, kernel),
            forward,
            jax.grad(second, (0, 1))(x, kernel),
            jax.grad(loss, (0, 1))(x, kernel),
        )

    ours = jax.make_jaxpr(jax.grad(lambda x: convolutions.tpu_convolution(x, kernel, stride).sum()))(x[0])
    assert ("layout_constraint" in str(ours)) == copied
    plain, found = numbers(convolutions.convolution), numbers(convolutions.tpu_convolution)
    # The same products; sums of at most 9 * 256 of them, if a compiler adds them in another order.
    bound = 9 * 256 * 2**-24
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=bound * np.abs(y).max()), found, plain)


@pytest.mark.slow
@pytest.mark.parametrize(("batch", "side", "channels"), [(96, 8, 64), (32, 7, 4), (64, 4, 3)])
def test_cpu_convolution_of_large_batches(batch, side, channels):
    """Its ways for large and wide ones, Winograd's and gradients in pieces of the batch, agree with XLA."""
    rng = np.random.RandomState(0)
    x = jnp.asarray(rng.randn(batch, side, side, channels), jnp.float32)
    kernel = jnp.asarray(rng.randn(3, 3, channels, channels), jnp.float32)
    assert convolutions._winograd_pays(x, kernel, 1) == (channels == 64)
    for expected, found in zip(
        *(
            with_gradients(lambda x, kernel: convolve(x, kernel, 1), x, kernel)(x)  # noqa: B023
            for convolve in (convolutions.convolution, convolutions.cpu_convolution)
        ),
        strict=True,
    ):
        # A sum of n products near 1 is about sqrt(n), the largest of many four times that; its n roundings,
        # of partial sums, add up to about n / 2 * 2^-24: sqrt(n) / 8 * 2^-24 of the largest. Ten times that,
        # at n = 96 * 8 * 8.
        np.testing.assert_allclose(found, expected, atol=10 * 10 * 2**-24 * np.abs(expected).max())


@pytest.mark.parametrize(("height", "width", "size", "stride"), [*SIZES, (10, 11, 3, 3), (8, 11, 5, 2)])
def test_same_padding(height, width, size, stride):
    rng = np.random.RandomState(0)
    x = jnp.asarray(rng.randn(2, height, width, 3), jnp.float32)
    kernel = jnp.asarray(rng.randn(size, size, 3, 4), jnp.float32)
    expected = jax.lax.conv_general_dilated(
        x, kernel, (stride, stride), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    found = convolutions.same_padding(convolutions.convolution)(x, kernel, stride)
    # The same sums of up to 7 * 7 * 3 products near 1, perhaps in another order: 147 * 2^-24.
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------- images


def test_standardised_images():
    images = np.random.RandomState(0).rand(2, 4, 4, 3).astype(np.float32)
    mean, std = np.array([0.5, 0.25, 0.75]), np.array([0.5, 0.25, 2.0])
    expected = (np.float64(images) - mean) / std
    found = layers.standardised(jnp.asarray(images), mean.tolist(), std.tolist())
    np.testing.assert_allclose(found, expected, atol=1e-6)
    np.testing.assert_allclose(
        layers.standardised(jnp.asarray(images), mean.tolist(), ()), images - mean, atol=1e-6
    )
    assert layers.standardised(images, (), ()) is images
    half = layers.standardised(jnp.asarray(images, jnp.bfloat16), mean.tolist(), std.tolist())
    assert half.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.float32(half), expected, atol=0.02)  # 2^-8 of numbers up to 3


# ---------------------------------------------------------------- networks


def wide_resnet_size(depth, widen):
    """Parameters counted from the architecture: convolutions without bias, two per channel of batch norm."""
    total, before = 3 * 16 * 9, 16
    for width in (16 * widen, 32 * widen, 64 * widen):
        for block in range((depth - 4) // 6):
            inputs = before if block == 0 else width
            total += 2 * inputs + 9 * inputs * width + 2 * width + 9 * width * width
            total += inputs * width if inputs != width else 0
        before = width
    return total + 2 * before


def resnet18_size():
    total, before = 3 * 64 * 9 + 2 * 64, 64
    for width in (64, 128, 256, 512):
        for inputs in (before, width):
            total += 9 * inputs * width + 9 * width * width + 4 * width
            total += inputs * width + 2 * width if inputs != width else 0
        before = width
    return total


def resnet50_size(stem):
    total, before = 3 * 64 * stem**2 + 2 * 64, 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            inputs, outputs = 4 * width if block else before, 4 * width
            total += inputs * width + 9 * width * width + width * outputs + 4 * width + 2 * outputs
            total += 0 if block else inputs * outputs + 2 * outputs
        before = outputs
    return total


def preact_resnet18_size():
    total, before = 3 * 64 * 9, 64
    for width in (64, 128, 256, 512):
        for inputs in (before, width):
            total += 2 * inputs + 9 * inputs * width + 2 * width + 9 * width * width
            total += inputs * width if inputs != width else 0
        before = width
    return total + 2 * before


def cifar_resnet_size(n, shortcut):
    total, before = 3 * 16 * 9 + 2 * 16, 16
    for width in (16, 32, 64):
        for inputs in (before, *[width] * (n - 1)):
            total += 9 * inputs * width + 9 * width * width + 4 * width
            total += inputs * width + 2 * width if inputs != width and shortcut == "B" else 0
        before = width
    return total


def cnn_size(pixels_left):
    convolutions = 9 * (1 * 16 + 16 * 32 + 32 * 64) + 2 * (16 + 32 + 64)
    return convolutions + 64 * pixels_left * 64 + 64


NETWORKS = [
    # backbone, image shape, features, parameters without the head
    (models.WideResNet(34, 10), (32, 32, 3), 640, wide_resnet_size(34, 10)),
    (models.WideResNet(10, 2), (32, 32, 3), 128, wide_resnet_size(10, 2)),
    (models.WideResNet(10, 1), (32, 32, 3), 64, wide_resnet_size(10, 1)),
    (models.ResNet18(), (32, 32, 3), 512, resnet18_size()),
    (models.PreActResNet18(), (32, 32, 3), 512, preact_resnet18_size()),
    (models.PreActResNet18(), (64, 64, 3), 512, preact_resnet18_size()),
    (models.ResNet20(), (32, 32, 3), 64, cifar_resnet_size(3, "A")),
    (models.ResNet32(), (32, 32, 3), 64, cifar_resnet_size(5, "A")),
    (models.ResNet32(shortcut="B"), (32, 32, 3), 64, cifar_resnet_size(5, "B")),
    (models.DeepMindWideResNet(28, 10), (32, 32, 3), 640, wide_resnet_size(28, 10)),
    (models.ResNet50(), (224, 224, 3), 2048, resnet50_size(7)),
    (models.ResNet50(stem="small"), (64, 64, 3), 2048, resnet50_size(3)),
    (models.SmallCNN(), (8, 8, 1), 64, cnn_size(2 * 2)),
    (models.SmallCNN(), (28, 28, 1), 64, cnn_size(7 * 7)),
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("backbone", "shape", "width", "size"),
    NETWORKS,
    ids=[f"{type(n[0]).__name__}-{n[1][0]}-{n[3]}" for n in NETWORKS],
)
def test_networks(backbone, shape, width, size):
    """Shapes and sizes only, without computing anything."""
    model = models.functional(models.Network(backbone, classifiers.LinearHead(10)))
    images = jax.ShapeDtypeStruct((2, *shape), jnp.float32)
    params, stats = jax.eval_shape(model.init, jax.random.key(0), images)
    assert sum(x.size for x in jax.tree.leaves(params["backbone"])) == size
    assert params["classifier"]["weight"].shape == (10, width)
    assert jax.eval_shape(model.predict, params, stats, images).shape == (2, 10)
    logits, moments = jax.eval_shape(model.train, params, stats, images)
    assert logits.shape == (2, 10)
    assert jax.tree.map(jnp.shape, moments) == jax.tree.map(jnp.shape, stats)


def test_sizes_that_are_known():
    """With the 10-class linear layer, as counted in the released code."""
    assert wide_resnet_size(34, 10) + 640 * 10 + 10 == 46_160_474
    assert resnet18_size() + 512 * 10 + 10 == 11_173_962
    assert resnet50_size(7) + 2048 * 1000 + 1000 == 25_557_032  # torchvision's
    # Without the batch norm before pooling, the original form for CIFAR; the form of AWP has 1024 more.
    assert preact_resnet18_size() - 2 * 512 + 512 * 10 + 10 == 11_171_146
    # 0.27 M and 0.46 M in He et al.
    assert [cifar_resnet_size(n, "A") + 64 * 10 + 10 for n in (3, 5)] == [269_722, 464_154]
    assert wide_resnet_size(28, 10) + 640 * 10 + 10 == 36_479_194
    assert wide_resnet_size(70, 16) + 1024 * 10 + 10 == 266_796_506


@pytest.mark.slow
@pytest.mark.parametrize(
    ("backbone", "pixels", "sides"),
    [
        # image; convolution of the stem, first block, last block, convolutions 1 and 2 of a strided block
        (models.ResNet50(), 224, (112, 56, 7, 56, 28)),
        (models.ResNet50(stem="small"), 64, (64, 64, 8, 64, 32)),
        (models.ResNet18(), 32, (32, 32, 4, 16, 16)),
        (models.ResNet18(stem="imagenet"), 224, (112, 56, 7, 28, 28)),
        (models.ResNet20(), 32, (32, 32, 8, 16, 16)),
    ],
)
def test_strides_of_a_resnet(backbone, pixels, sides):
    """Above all: a bottleneck's stride is that of its second convolution."""

    def intermediates(images):
        _, state = backbone.init_with_output(jax.random.key(0), images, False, capture_intermediates=True)
        return state["intermediates"]

    found = jax.eval_shape(intermediates, jax.ShapeDtypeStruct((1, pixels, pixels, 3), jnp.float32))
    last = f"layer{len(backbone.blocks)}_{backbone.blocks[-1] - 1}"
    outputs = found["conv1"], found["layer1_0"], found[last], *map(found["layer2_0"].get, ("conv1", "conv2"))
    assert tuple(output["__call__"][0].shape[1] for output in outputs) == sides


@pytest.mark.parametrize(
    ("make", "setting", "value", "message"),
    [
        (models.ResNet50, "stem", "cifar", r"unknown stem 'cifar'; use 'imagenet' or 'small'"),
        (models.ResNet20, "shortcut", "C", r"unknown shortcut 'C'; use 'A' or 'B'"),
        (models.WideResNet, "activation", "gelu", r"unknown activation 'gelu'; use one of relu, silu"),
        (models.WideResNet, "final_activation", 3, r"unknown activation 3; use one of relu, silu"),
        (models.WideResNet, "layout", "jax", r"unknown layout 'jax'; use one of released, deepmind"),
        (models.PreActResNet18, "activation", "", r"unknown activation ''; use one of relu, silu"),
        (models.SmallCNN, "mean", "0.5", r"mean is '0\.5'; give finite numbers, one per channel, or \(\)"),
        (models.ResNet18, "std", (0.5, 0), r"std is \(0\.5, 0\); give finite numbers > 0, one per channel"),
        (models.ResNet18, "mean", (math.nan,), r"mean is \(nan,\); give finite numbers, one per channel"),
    ],
)
def test_settings_that_are_refused(make, setting, value, message):
    with pytest.raises(ValueError, match=message):
        make(**{setting: value})


NEW = {
    "preact": models.PreActResNet18,
    "resnet20": models.ResNet20,
    "resnet20_b": partial(models.ResNet20, shortcut="B"),
    "deepmind": partial(models.DeepMindWideResNet, 10, 1),
}


SMALL = {"wide": partial(models.WideResNet, 10, 1), "small_cnn": models.SmallCNN, **NEW}


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
def test_every_backbone_standardises_before_its_first_convolution(name):
    """With kernels of ones the first convolution's output tells what it received."""
    numbers = {"mean": (0.5, 0.25, 0.75), "std": (0.5, 0.25, 2.0)}
    images = jnp.asarray(np.random.RandomState(0).rand(1, 8, 8, 3), jnp.float32)

    def stem(module, images):
        variables = jax.eval_shape(lambda: module.init(jax.random.key(0), images, False))
        ones = jax.tree.map(lambda leaf: jnp.ones(leaf.shape), variables)
        with jax.disable_jit():
            _, state = module.apply(ones, images, False, capture_intermediates=True, mutable="intermediates")
        found = state["intermediates"]
        return found["init__conv" if "init__conv" in found else "conv1"]["__call__"][0]

    plain, standard = SMALL[name](mean=(), std=()), SMALL[name](**numbers)
    expected = stem(plain, layers.standardised(images, **numbers))
    np.testing.assert_allclose(stem(standard, images), expected, rtol=1e-5, atol=1e-5)


LONG = ("deepmind", "preact", "resnet20", "resnet20_b")


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.long) if name in LONG else name for name in NEW],
)
def test_other_convolution_and_spread_batch(name):
    """On a CPU, and with a batch on two devices, it is the same network; one operation after the other."""
    with jax.enable_x64(True):
        check_other_convolution_and_spread_batch(name)


def check_other_convolution_and_spread_batch(name):
    images = jnp.asarray(np.random.RandomState(0).rand(4, 8, 8, 3))

    def model(**options):
        return models.functional(models.Network(NEW[name](**options), classifiers.LinearHead(3)))

    whole, cpu, spread = model(), model(convolution=convolutions.cpu_convolution), model(axis_name="devices")
    params, stats = (arrays_like(tree, 0) for tree in jax.eval_shape(whole.init, jax.random.key(0), images))
    with jax.disable_jit():
        logits, moments = whole.train(params, stats, images)
        others = cpu.train(params, stats, images)
        halves = jax.vmap(partial(spread.train, params, stats), axis_name="devices")(
            images.reshape(2, 2, 8, 8, 3)
        )
        predicted = whole.predict(params, stats, images), cpu.predict(params, stats, images)
    assert np.abs(logits).max() > 1e-3
    together = halves[0].reshape(4, 3), jax.tree.map(lambda x: x[0], halves[1])
    for found in (others, together):
        jax.tree.map(
            lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-9, atol=1e-9 * np.abs(y).max()),
            found,
            (logits, moments),
        )
    np.testing.assert_allclose(*predicted, rtol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize(("inside", "last"), [("silu", "relu"), ("relu", "silu")])
def test_activations_of_a_wide_resnet(inside, last):
    """The one before pooling is a setting of its own: the released form has ReLU there."""
    functions = {"relu": lambda x: np.maximum(x, 0), "silu": lambda x: x / (1 + np.exp(-x))}
    images = jnp.asarray(np.random.RandomState(0).rand(2, 8, 8, 3), jnp.float32)
    backbone = models.WideResNet(10, 1, inside, final_activation=last)
    like = jax.eval_shape(partial(backbone.init, train=False), jax.random.key(0), images)
    with jax.disable_jit():
        features, state = backbone.apply(
            centred_like(like, 0), images, False, capture_intermediates=True, mutable="intermediates"
        )
    before = np.float64(state["intermediates"]["bn1"]["__call__"][0])
    np.testing.assert_allclose(features, functions[last](before).mean((1, 2)), rtol=1e-5, atol=1e-6)
    assert (before < -0.1).any()  # where the two differ


@pytest.mark.parametrize("depth", [4, 9, 33, -2])
def test_depth_of_a_wide_resnet(depth):
    with pytest.raises(ValueError, match=rf"depth is {depth}; .* 6 n \+ 4 with n at least 1"):
        models.WideResNet(depth, 1)


@pytest.mark.parametrize("stem", ["imagenet", "small"])
def test_resnet50_from_pytorch_and_back(stem):
    torch = pytest.importorskip("torch")
    nets = pytest.importorskip(
        "experiments.benchmarks.torch_networks", reason="needs PyTorch", exc_type=ImportError
    )
    network = nets.randomised(nets.ResNet50(10, stem))
    state = {name: tensor.numpy() for name, tensor in network.state_dict().items()}
    found = pytorch.architecture(pytorch.shapes(state))
    options = dict(found.model)
    backbone = models.BACKBONES[options.pop("name")](**options)
    model = models.functional(models.Network(backbone, classifiers.LinearHead(10)), precision="highest")

    pixels = 64 if stem == "imagenet" else 16
    images = (np.random.RandomState(1).randint(0, 256, (4, pixels, pixels, 3)) / 255).astype(np.float32)
    like = jax.eval_shape(model.init, jax.random.key(0), images)
    prefixes = found.prefixes(*like)
    params, stats = pytorch.from_state_dict(state, *like, prefixes)
    with torch.inference_mode():
        theirs = network(torch.from_numpy(np.moveaxis(images, -1, 1).copy())).numpy()
    error = np.abs(jax.jit(model.predict)(params, stats, images) - theirs).max() / np.abs(theirs).max()
    print(f"ResNet-50, stem {stem}: largest relative difference {error:.1e}")
    assert error <= 1e-5  # float32 rounding in 53 layers: 1e-6 to 2e-6 was seen

    exported = pytorch.complete_state_dict(params, stats, prefixes)
    target = nets.ResNet50(10, stem)
    target.load_state_dict({key: torch.from_numpy(value) for key, value in exported.items()}, strict=True)
    for key, value in target.state_dict().items():
        assert torch.equal(value, network.state_dict()[key]), key


@pytest.mark.slow
def test_training_and_prediction():
    """A training pass leaves moments and changes nothing; cpu_convolution is the same network."""
    images = jnp.asarray(np.random.RandomState(0).rand(4, 8, 8, 1), jnp.float32)
    plain, loop = (
        models.functional(
            models.Network(models.SmallCNN((4, 4, 4), 8, convolution=c), classifiers.CosineHead(3))
        )
        for c in (convolutions.convolution, convolutions.cpu_convolution)
    )
    init, predict = jax.jit(plain.init), jax.jit(plain.predict)
    params, stats = init(jax.random.key(0), images)
    again, _ = init(jax.random.key(0), jnp.ones_like(images))
    jax.tree.map(np.testing.assert_array_equal, params, again)  # of the images only the shape matters

    logits, moments = jax.jit(plain.train)(params, stats, images)
    assert np.abs(logits - predict(params, stats, images)).max() > 1e-3
    np.testing.assert_allclose(jax.jit(loop.train)(params, stats, images)[0], logits, atol=1e-6)
    # With this batch's own moments as running statistics, only unbiased against biased variance differs.
    np.testing.assert_allclose(predict(params, moments, images), logits, atol=0.05)
    # One image is predicted alike alone and in a batch.
    np.testing.assert_allclose(
        predict(params, stats, images[:1]), predict(params, stats, images)[:1], atol=1e-6
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("batch", "piece", "pieces"),
    [(12, 4 * 64, 3), (12, 5 * 64, 0), (4, 4 * 64, 0), (12, 63, 0), (12, None, 0)],
)
def test_prediction_in_pieces(batch, piece, pieces):
    """Whole pieces one after the other, else the batch at once: the same logits and gradients."""
    network = models.Network(models.SmallCNN((4, 4, 4), 8), classifiers.CosineHead(3))
    whole, model = models.functional(network), models.functional(network, piece=piece)
    images = jnp.asarray(np.random.RandomState(0).rand(batch, 8, 8, 1), jnp.float32)
    params, stats = jax.jit(whole.init)(jax.random.key(0), images)

    def largest(model, images):
        logits = model.predict(params, stats, images)
        return logits.max(1).sum(), logits

    loops = [
        e
        for e in equations(jax.make_jaxpr(partial(largest, model))(images).jaxpr)
        if "scan" in str(e.primitive)
    ]
    assert [loop.params["length"] for loop in loops] == [pieces] * (pieces > 0)
    found, expected = (jax.jit(jax.grad(partial(largest, m), has_aux=True))(images) for m in (model, whole))
    # Logits are cosines, at most 1, and both ways of the same sums: some roundings of float32, 6e-8 each.
    for name, x, y in zip(("gradient", "logits"), found, expected, strict=True):
        np.testing.assert_allclose(x, y, atol=1e-5 * np.abs(y).max(), err_msg=name)


def test_initial_convolution_is_he_normal_by_outputs():
    params = models.Conv(64, 3).init(jax.random.key(0), jnp.zeros((1, 8, 8, 32)))["params"]
    # 18,432 draws: standard error of the deviation is 0.5 %.
    assert float(params["kernel"].std()) == pytest.approx(np.sqrt(2 / (3 * 3 * 64)), rel=0.03)


@pytest.mark.slow
def test_precision_reaches_every_product_and_its_gradients():
    network = models.Network(models.WideResNet(10, 1), classifiers.CosineHead(10))
    model = models.functional(network, precision="highest")
    images = jnp.ones((2, 32, 32, 3))
    params, stats = jax.jit(model.init)(jax.random.key(0), images)
    program = str(jax.make_jaxpr(jax.grad(lambda x: model.predict(params, stats, x).sum()))(images))
    products = program.count("conv_general_dilated[") + program.count("dot_general[")
    assert products == 2 * (9 + 1)  # nine convolutions, one matrix product, and the gradient of each
    assert len(re.findall(r"precision=\(?Precision.HIGHEST", program)) == products


@pytest.mark.slow
@pytest.mark.parametrize(
    "backbone",
    [make() for make in SMALL.values()],
    ids=SMALL,
)
def test_bfloat16_stays_between_the_images_and_the_head(backbone):
    """Every convolution and its gradients compute in it; what a step keeps or compares does not."""
    network = models.Network(backbone, classifiers.CosineHead(10))
    model = models.functional(network, precision="bfloat16")
    images = jax.ShapeDtypeStruct((4, 8, 8, 3), jnp.float32)
    params, stats = jax.eval_shape(model.init, jax.random.key(0), images)

    def loss(params, images, stats):
        logits, moments = model.train(params, stats, images)
        return jnp.sum(logits**2), (logits, moments)

    gradients = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
    program, found = jax.make_jaxpr(gradients, return_shape=True)(params, images, stats)
    convolved = [
        variable.aval.dtype
        for equation in equations(program.jaxpr)
        if equation.primitive.name == "conv_general_dilated"
        for variable in equation.outvars
    ]
    assert set(convolved) == {jnp.dtype(jnp.bfloat16)}
    assert len(convolved) == 3 * sum(leaf.ndim == 4 for leaf in jax.tree.leaves(params))
    kept = jax.tree.leaves((params, stats, found))
    assert {leaf.dtype for leaf in kept} == {jnp.dtype(jnp.float32)}


def equations(program):
    """Of a program and of those within it."""
    for equation in program.eqns:
        yield equation
        for value in equation.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from equations(inner)
