"""Convolutions: XLA's own, one that is fast on a CPU, and one that is fast on a TPU.

All are ``(x [B, H, W, C], kernel [k, k, C, O], stride) -> [B, H', W', O]``, padded with ``k // 2`` zeros on
every side: PyTorch's padding, not that of 'SAME'. They agree up to rounding, and so do their gradients.
"""

import math
from collections.abc import Callable
from functools import partial

import chex
import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.layout import Layout, with_layout_constraint

Convolution = Callable[[chex.Array, chex.Array, int], chex.Array]
"""``(x [B, H, W, C], kernel [k, k, C, O], stride)`` to ``[B, H', W', O]``, padded by k // 2."""

Grid = list[list[chex.Array]]


def convolution(x: chex.Array, kernel: chex.Array, stride: int) -> chex.Array:
    """XLA's own convolution."""
    return _nhwc(x, kernel, [(k // 2, k // 2) for k in kernel.shape[:2]], strides=stride)


def same_padding(convolve: Convolution) -> Convolution:
    """The convolution with the padding of 'SAME', which differs for strides above 1.

    The zeros are as few as ``ceil(H / stride)`` outputs need, and the odd one comes after the image: stride 2
    pads an even side by 0 and 1, not by 1 and 1. One more row of zeros in front shifts the other padding by
    a stride, and the first output is dropped.

    Example:
      >>> row, ones = jnp.arange(1.0, 5).reshape(1, 1, 4, 1), jnp.ones((3, 3, 1, 1))
      >>> print(convolution(row, ones, 2).ravel(), same_padding(convolution)(row, ones, 2).ravel())
      [3. 9.] [6. 7.]
    """

    def convolved(x: chex.Array, kernel: chex.Array, stride: int) -> chex.Array:
        front = []
        for n, k in zip(x.shape[1:3], kernel.shape[:2], strict=True):
            zeros = max((-(-n // stride) - 1) * stride + k - n, 0)
            front.append((zeros // 2 - k // 2) % stride)
        x = jnp.pad(x, ((0, 0), *((rows, 0) for rows in front), (0, 0)))
        top, left = (min(rows, 1) for rows in front)
        return convolve(x, kernel, stride)[:, top:, left:]

    return convolved


def _nhwc(
    x: chex.Array,
    kernel: chex.Array,
    padding: list[tuple[int, int]],
    *,
    strides: int = 1,
    rhs_dilation: int = 1,
    axes: str = "HWIO",
) -> chex.Array:
    return lax.conv_general_dilated(
        x,
        kernel,
        (strides, strides),
        padding,
        rhs_dilation=(rhs_dilation, rhs_dilation),
        dimension_numbers=("NHWC", axes, "NHWC"),
    )


LANES = 128
"""Numbers that a TPU's units take side by side."""


@partial(jax.custom_jvp, nondiff_argnums=(2,))
def tpu_convolution(x: chex.Array, kernel: chex.Array, stride: int) -> chex.Array:
    """:func:`convolution` for TPUs, whose gradient by the images reads a copy of the kernel.

    That gradient exchanges the kernel's two axes of channels. XLA exchanges their names and leaves the
    numbers where they are. With many channels that do not fill the lanes of a TPU, such as 160, the gradient
    then takes up to half as many cycles again. In the copy the numbers lie as the gradient wants them. All
    results stay the same.
    """
    return convolution(x, kernel, stride)


@tpu_convolution.defjvp
def _tpu_tangent(
    stride: int, inputs: tuple[chex.Array, chex.Array], tangents: tuple[chex.Array, chex.Array]
) -> tuple[chex.Array, chex.Array]:
    (x, kernel), (dx, dkernel) = inputs, tangents
    (*_, channels, features), axes = kernel.shape, "HWIO"
    out, of_kernel = convolution(x, kernel, stride), convolution(x, dkernel, stride)
    if stride == 1 and channels == features > LANES and channels % LANES:
        # Axes from the outermost to the innermost. Without the barrier XLA uses the kernel itself again.
        rows = Layout((0, 1, 2, 3))
        kernel = lax.optimization_barrier(with_layout_constraint(kernel.swapaxes(2, 3), rows))
        axes = "HWOI"
    padding = [(k // 2, k // 2) for k in kernel.shape[:2]]
    return out, _nhwc(dx, kernel, padding, strides=stride, axes=axes) + of_kernel


def cpu_convolution(x: chex.Array, kernel: chex.Array, stride: int) -> chex.Array:
    """:func:`convolution` for the CPU, with fewer products and with gradients that stay fast in loops.

    XLA's CPU compiler does not rewrite the gradients of a convolution into its own layout if they are inside
    a while loop, where they run several times slower (jax-ml/jax#12868). Here both gradients are NHWC
    convolutions of stride 1. A 3x3 convolution of stride 1 uses :func:`winograd` where the network is wide
    enough; a convolution of 1x1, or of few inputs, is one matrix product. The precision of matrix products
    has no effect; forward-mode differentiation is not supported.
    """
    if kernel.shape[0] <= stride or kernel[..., 0].size <= PRODUCT_INPUTS:
        return _as_product(x, kernel, stride)
    return _spatial(x, kernel, stride)


# A 3x3 convolution of RGB images: it has too few channels for Eigen's vectors. Measured.
PRODUCT_INPUTS = 27


def _as_product(x: chex.Array, kernel: chex.Array, stride: int) -> chex.Array:
    """The product of ``[pixels, k * k * C]``, the inputs of each output pixel in one row, and the kernel."""
    k, _, _, features = kernel.shape
    low = k // 2
    b, h, w = len(x), *((n + 2 * low - k) // stride + 1 for n in x.shape[1:3])
    x = jnp.pad(x, ((0, 0), (low, low), (low, low), (0, 0)))
    rows, columns = (h - 1) * stride + 1, (w - 1) * stride + 1
    inputs = [x[:, i : i + rows : stride, j : j + columns : stride] for i in range(k) for j in range(k)]
    pixels = jnp.concatenate(inputs, -1).reshape(b * h * w, -1)  # XLA's products are faster if flat
    return (pixels @ kernel.reshape(-1, features)).reshape(b, h, w, features)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _spatial(x: chex.Array, kernel: chex.Array, stride: int) -> chex.Array:
    if _winograd_pays(x, kernel, stride):
        return winograd(x, kernel)
    return convolution(x, kernel, stride)


def _forward(
    x: chex.Array, kernel: chex.Array, stride: int
) -> tuple[chex.Array, tuple[chex.Array, chex.Array]]:
    return _spatial(x, kernel, stride), (x, kernel)


def _backward(
    stride: int, saved: tuple[chex.Array, chex.Array], dy: chex.Array
) -> tuple[chex.Array, chex.Array]:
    x, kernel = saved
    if _winograd_pays(x, kernel, stride):
        dx = winograd(dy, kernel, transposed=True)
    else:
        dx = _image_gradient(dy, kernel, stride, x.shape[1:3])
    padding = []
    for n, m, k in zip(x.shape[1:3], dy.shape[1:3], kernel.shape[:2], strict=True):
        low, dilated = k // 2, (m - 1) * stride + 1
        padding.append((low, k - 1 + dilated - n - low))
    # A large batch is taken in pieces whose transposed arrays fit into a cache.
    pieces = math.gcd(len(x), 64) // 16 or 1
    parts = zip(jnp.split(x, pieces), jnp.split(dy, pieces), strict=True)
    return dx, sum(_kernel_gradient(*part, padding, stride) for part in parts)


def _image_gradient(dy: chex.Array, kernel: chex.Array, stride: int, size: tuple[int, ...]) -> chex.Array:
    """One convolution of dy per phase, that is, for the pixels of every ``stride``-th row and column.

    In a single convolution of dy, dilated by the stride, most products would be with zeros.
    """
    flipped = jnp.flip(kernel, (0, 1)).swapaxes(2, 3)
    rows, columns = (
        [_taps(phase, *lengths, stride) for phase in range(stride)]
        for lengths in zip(size, dy.shape[1:3], kernel.shape[:2], strict=True)
    )
    dx = [[_nhwc(dy, flipped[i, j], [above, left]) for j, left in columns] for i, above in rows]
    phases = jnp.stack([jnp.stack(row, axis=3) for row in dx], axis=2)
    _, height, _, width, *_ = phases.shape
    return phases.reshape(len(dy), height * stride, width * stride, -1)[:, : size[0], : size[1]]


def _taps(phase: int, n: int, m: int, k: int, stride: int) -> tuple[slice, tuple[int, int]]:
    """Taps of a flipped kernel of k that reach pixels ``q * stride + phase`` of n, and m outputs' padding.

    Tap u, which is k - 1 - u of the flipped kernel, goes from output i to pixel ``i * stride + u - k // 2``.
    So the taps of a phase are ``stride`` apart, and the outputs of one pixel are neighbours.
    """
    first = (k - 1 - k // 2 - phase) % stride
    nearest = (phase + k // 2 - (k - 1 - first)) // stride  # output of pixel q, minus q, for the first tap
    farthest = nearest + (k - 1 - first) // stride
    return slice(first, None, stride), (-nearest, -(-n // stride) - m + farthest)


def _kernel_gradient(
    x: chex.Array, dy: chex.Array, padding: list[tuple[int, int]], stride: int
) -> chex.Array:
    """The convolution of the images with dy, dilated by the stride; batch and channel axes are exchanged."""
    x, dy = x.transpose(3, 1, 2, 0), dy.transpose(1, 2, 0, 3)
    return _nhwc(x, dy, padding, rhs_dilation=stride).transpose(1, 2, 0, 3)


_spatial.defvjp(_forward, _backward)

# Below these limits, transforming tiles and forty small operations cost more than they save. Measured.
WINOGRAD_CHANNELS = 32

WINOGRAD_OPERATIONS = 2e8


def _winograd_pays(x: chex.Array, kernel: chex.Array, stride: int) -> bool:
    even = x.shape[1] % 2 == 0 and x.shape[2] % 2 == 0
    operations = 2 * x[..., 0].size * kernel.size
    return (
        (kernel.shape[0], stride) == (3, 1)
        and even
        and min(kernel.shape[2:]) >= WINOGRAD_CHANNELS
        and operations >= WINOGRAD_OPERATIONS
    )


def winograd(x: chex.Array, kernel: chex.Array, *, transposed: bool = False) -> chex.Array:
    """A 3x3 convolution of stride 1 with 2.25 times fewer products: F(2x2, 3x3).

    ``Y = A^T [(G g G^T) * (B^T d B)] A`` for every tile ``d [4, 4]`` of the padded image, ``Y [2, 2]``; the
    tiles overlap by two pixels, and the product is summed over the channels, so there are 16 matrix products.

    It rounds like the direct sum, because all entries of A, B and G are 0, 1/2 or 1 in size.

    Args:
      x: ``[B, H, W, C]``, H and W even.
      kernel: ``g [3, 3, C, O]``.
      transposed: compute the transposed convolution, from ``[B, H, W, O]`` to ``[B, H, W, C]``, which is the
        gradient with respect to the image.

    Returns:
      ``[B, H, W, O]``.

    Source: Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks" (CVPR 2016), section 4.1.
    """
    weights = _on_both_axes(_of_kernel, [[kernel[i, j] for j in range(3)] for i in range(3)])
    if transposed:  # the kernel flipped in space is G with its first and last row exchanged
        order = (3, 1, 2, 0)
        weights = [[weights[i][j] for j in order] for i in order]
    channels = (3,), (1 if transposed else 0,)
    b, h, w, _ = x.shape
    x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    tiles = [[x[:, i : i + h - 1 : 2, j : j + w - 1 : 2] for j in range(4)] for i in range(4)]
    tiles = _on_both_axes(_of_tile, tiles)
    # Sixteen products, not one product of stacked tiles, because XLA is slow at stacking them.
    products = [
        [lax.dot_general(t, u, (channels, ((), ()))) for t, u in zip(*rows, strict=True)]
        for rows in zip(tiles, weights, strict=True)
    ]
    y = _on_both_axes(_of_product, products)
    return jnp.stack([jnp.stack(row, axis=3) for row in y], axis=2).reshape(b, h, w, -1)


def _on_both_axes(transform: Callable[[list[chex.Array]], list[chex.Array]], grid: Grid) -> Grid:
    """``M d M^T``, where the transform is ``M`` times a column of arrays."""
    rows = [transform(list(row)) for row in grid]
    columns = [transform(list(column)) for column in zip(*rows, strict=True)]
    return [list(row) for row in zip(*columns, strict=True)]


def _of_tile(d: list[chex.Array]) -> list[chex.Array]:
    return [d[0] - d[2], d[1] + d[2], d[2] - d[1], d[1] - d[3]]  # B^T


def _of_kernel(g: list[chex.Array]) -> list[chex.Array]:
    outer = g[0] + g[2]
    return [g[0], 0.5 * (outer + g[1]), 0.5 * (outer - g[1]), g[2]]  # G


def _of_product(m: list[chex.Array]) -> list[chex.Array]:
    return [m[0] + m[1] + m[2], m[1] - m[2] - m[3]]  # A^T


OF_PLATFORM: dict[str, Convolution] = {"cpu": cpu_convolution, "tpu": tpu_convolution}
"""The fastest convolution by platform, where it is not :func:`convolution`."""
