"""The 15 common corruptions of Hendrycks and Dietterich at five strengths, made from clean images.

The strengths are those of CIFAR-10-C, at every image size: lengths are in pixels, but zoom, elastic transform
and pixelate are parts of the image's side. So an image of 32 x 32 pixels is corrupted as in CIFAR-10-C, a
smaller one more, and a larger one less; ImageNet-C has other constants, and no figure here is comparable with
one on it. A blur that reaches beyond the image repeats or mirrors the border.

- 14 of the 15 equal the released code that made CIFAR-10-C, at 32 x 32 pixels in three colours: they are the
  same functions of the same random draws, up to one grey level by rounding. The draws themselves are others:
  one stream per image and corruption, the same at every strength.
- Frost differs: it is drawn, not photographed, so its figures are not comparable with CIFAR-10-C's.

Corrupted images are whole multiples of 1/255, cut down, as uint8 cuts those of CIFAR-10-C.

Symbols: N images H x W x C with C = 1 or 3, pixels x in [0, 1]; a gray image is its own gray value. Of random
numbers, z ~ N(0, 1) and u ~ U(0, 1).

Source: Hendrycks and Dietterich, "Benchmarking Neural Network Robustness to Common Corruptions and
Perturbations", ICLR 2019; constants and definitions from its released code (``make_cifar_c.py``).
"""

import io
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from scipy import ndimage

from robal_jax import checks
from robal_jax.errors import InputError, shown

Draws = Sequence[np.random.RandomState]
"""One source of random numbers per image, ``[N]``."""

SMALLEST = 4  # pixels of a side: a third of it is the arm of the triangle that moves in elastic_transform


class Corruption(NamedTuple):
    """One corruption.

    Attributes:
      apply: ``(images float64 [N, H, W, C], draws [N], *constants) -> [N, H, W, C]``, not yet clipped.
      strengths: the constants of each strength, from 1 on.
    """

    apply: Callable[..., np.ndarray]
    strengths: tuple[tuple[float, ...], ...]


def corrupt(
    images: np.ndarray, name: str, strength: int, seed: int = 0, ids: Sequence[int] | np.ndarray | None = None
) -> np.ndarray:
    """Corrupts images; the result for an image follows from it, the seed and its number alone.

    Args:
      images: floats ``[N, H, W, C]`` in [0, 1], ``C`` = 1 or 3; they are rounded to multiples of 1/255.
      name: a key of ``CORRUPTIONS``.
      strength: 1 to 5.
      seed: of the random numbers, >= 0.
      ids: numbers of the images, which tell their random numbers apart, ``[N]``, >= 0; 0..N-1 if None.

    Returns:
      float32 ``[N, H, W, C]`` in [0, 1], multiples of 1/255.

    Raises:
      ValueError: images of another shape, type or range, or not one number per image.
      InputError: no such corruption or strength, or images of other channels or of fewer than 4 x 4 pixels.

    Source: Hendrycks and Dietterich, ICLR 2019; see the module for what is equal and what differs.

    Example:
      >>> image = np.full((1, 32, 32, 3), 0.5)
      >>> [float(np.abs(corrupt(image, "gaussian_noise", s) - image).mean().round(3)) for s in (1, 3, 5)]
      [0.032, 0.064, 0.08]
      >>> pair = corrupt(np.concatenate([image, image]), "fog", 2)
      >>> bool((pair[1:] == corrupt(image, "fog", 2, ids=[1])).all())  # alone or in a batch
      True
    """
    if name not in CORRUPTIONS:
        raise InputError(f"unknown corruption {shown(name)}; use one of {', '.join(CORRUPTIONS)}")
    number, (apply, strengths) = list(CORRUPTIONS).index(name), CORRUPTIONS[name]
    if strength not in range(1, len(strengths) + 1):
        raise InputError(f"strength is {shown(strength)}; use one of 1 to {len(strengths)}")
    checks.channels_last(images)
    check_images(np.shape(images))
    checks.floats(images=images)
    checks.stored_images(np.shape(images)[1:], 255, images)
    numbers = np.arange(len(images)) if ids is None else np.asarray(ids)
    if numbers.shape != (len(images),):
        raise ValueError(f"ids have shape {list(numbers.shape)}; they must be [{len(images)}], one per image")
    # NumPy promises never to change the streams of Philox and of RandomState, unlike Generator's.
    sources = (np.random.SeedSequence([seed, number, int(i)]) for i in numbers)
    draws = [np.random.RandomState(np.random.Philox(source)) for source in sources]
    start = np.round(255 * np.asarray(images, np.float64)) / 255
    return _cut_down(apply(start, draws, *strengths[strength - 1])).astype(np.float32)


def check_images(shape: tuple[int, ...]) -> None:
    """Refuses images ``[N, H, W, C]`` of a shape that cannot be corrupted.

    Raises:
      InputError: other channels than 1 or 3, or a side of fewer than ``SMALLEST`` pixels.

    Example:
      >>> check_images((10, 8, 8, 2))
      Traceback (most recent call last):
      robal_jax.errors.InputError: images are 8 x 8 x 2; corruptions need 1 or 3 channels, and 4 x 4 pixels
    """
    if min(shape[1:3]) < SMALLEST or shape[3] not in (1, 3):
        raise InputError(
            f"images are {' x '.join(map(str, shape[1:]))}; corruptions need 1 or 3 channels, and "
            f"{SMALLEST} x {SMALLEST} pixels"
        )


def _cut_down(images: np.ndarray) -> np.ndarray:
    """Returns multiples of 1/255: clipped to [0, 1], then cut down, but not by the rounding of float64."""
    return np.floor(255 * np.clip(images, 0, 1) + 2.0**-32) / 255


def _per_image(draws: Draws, draw: Callable[[np.random.RandomState], Any]) -> np.ndarray:
    """Returns what is drawn for each image, ``[N, ...]``."""
    return np.stack([draw(source) for source in draws])


def _gaussian_noise(images: np.ndarray, draws: Draws, scale: float) -> np.ndarray:
    """Returns ``x + scale z``."""
    return images + scale * _per_image(draws, lambda d: d.normal(size=images.shape[1:]))


def _shot_noise(images: np.ndarray, draws: Draws, photons: float) -> np.ndarray:
    """Returns ``Poisson(photons x) / photons``."""
    pairs = zip(draws, images, strict=True)
    return np.stack([draw.poisson(image * photons) for draw, image in pairs]) / photons


def _impulse_noise(images: np.ndarray, draws: Draws, share: float) -> np.ndarray:
    """Sets a share of all numbers, each by itself, to 0 or to 1."""
    changed, value = np.moveaxis(_per_image(draws, lambda d: d.uniform(size=(2, *images.shape[1:]))), 1, 0)
    return np.where(changed < share, value < 0.5, images)


def _defocus_blur(images: np.ndarray, draws: Draws, radius: float, blur: float) -> np.ndarray:
    """Averages over a disk, which is itself blurred by a Gaussian of 3 x 3 pixels."""
    del draws
    reach = np.arange(-math.ceil(radius) - 1, math.ceil(radius) + 2)
    disk = (reach[:, None] ** 2 + reach**2 <= radius**2).astype(np.float64)
    side = math.exp(-1 / (2 * blur**2))
    row = np.array([side, 1, side]) / (1 + 2 * side)
    kernel = ndimage.convolve(disk / disk.sum(), row[:, None] * row, mode="constant")
    return ndimage.correlate(images, kernel[None, :, :, None], mode="mirror")


def _blurred(images: np.ndarray, sigma: float) -> np.ndarray:
    """Returns images after a Gaussian blur of four sigmas' reach, the border repeated."""
    return ndimage.gaussian_filter(images, (0, sigma, sigma, 0), mode="nearest")


def _glass_blur(images: np.ndarray, draws: Draws, sigma: float, rounds: int) -> np.ndarray:
    """Replaces each pixel by itself or by its neighbour above, left, or both, between two blurs.

    The paper speaks of exchanged pixels. The released code means to exchange them, but its second assignment
    reads what the first has written, so that pixels are copied; and that is how CIFAR-10-C was made. The
    first two rows and columns only give. The order of the copies does not matter, because none is read later.
    """
    height, width = images.shape[1:3]
    moved = _cut_down(_blurred(images, sigma))
    which = np.arange(len(images))[:, None, None]
    for _ in range(rounds):
        step = _per_image(draws, lambda d: d.randint(-1, 1, size=(2, height - 2, width - 2)))
        rows = np.arange(2, height)[:, None] + step[:, 0]
        moved[:, 2:, 2:] = moved[which, rows, np.arange(2, width) + step[:, 1]]
    return _blurred(moved, sigma)


def _streaked(images: np.ndarray, degrees: np.ndarray, radius: int, sigma: float) -> np.ndarray:
    """Blurs each image along a line that begins in the pixel: ImageMagick's MotionBlurImage.

    ``y(p) = sum_i w_i x(p + round(i (sin a, cos a)))`` for ``i = 0..2 radius``, with the angle ``a`` of the
    image, ``w_i`` in proportion to ``exp(-i^2 / 2 sigma^2)``, halves rounded down, the border repeated.

    Args:
      images: ``[N, H, W, C]``.
      degrees: ``[N]``.
      radius: in pixels.
      sigma: in pixels.
    """
    height, width = images.shape[1:3]
    steps = np.arange(2 * radius + 1)
    weights = np.exp(-(steps**2) / (2 * sigma**2))
    which, angles, result = np.arange(len(images))[:, None, None], np.radians(degrees), np.zeros_like(images)
    for step, weight in zip(steps, weights / weights.sum(), strict=True):
        down, right = (np.ceil(step * f(angles) - 0.5).astype(int)[:, None] for f in (np.sin, np.cos))
        rows = np.clip(np.arange(height) + down, 0, height - 1)
        columns = np.clip(np.arange(width) + right, 0, width - 1)
        result += weight * images[which, rows[:, :, None], columns[:, None, :]]
    return np.round(255 * result) / 255


def _motion_blur(images: np.ndarray, draws: Draws, radius: int, sigma: float) -> np.ndarray:
    """Blurs along a line of an angle from -45 to 45 degrees."""
    return _streaked(images, _per_image(draws, lambda d: d.uniform(-45, 45)), radius, sigma)


def _zoomed(images: np.ndarray, factor: float) -> np.ndarray:
    """Enlarges the middle of images to their size, bilinearly."""
    return _stretched(_stretched(images, factor, 1), factor, 2)


def _stretched(images: np.ndarray, factor: float, axis: int) -> np.ndarray:
    """Enlarges the middle of one axis to its length.

    ``ceil(side / factor)`` pixels become as many times the factor, rounded: ends fall on ends. Of these, the
    middle ones are kept.
    """
    side = images.shape[axis]
    part = math.ceil(side / factor)
    large = round(part * factor)
    kept = np.arange(side) + (large - side) // 2
    places = kept * (part - 1) / (large - 1) + (side - part) // 2
    before = np.minimum(places.astype(int), side - 2)
    weight = np.expand_dims(places - before, tuple(range(1, images.ndim - axis)))
    return (1 - weight) * images.take(before, axis) + weight * images.take(before + 1, axis)


def _zoom_blur(images: np.ndarray, draws: Draws, end: float) -> np.ndarray:
    """Averages the image and its enlargements by 1, 1.01, ... up to ``end``, which is left out."""
    del draws
    factors = np.arange(1, end, 0.01)
    return (images + sum(_zoomed(images, factor) for factor in factors)) / (len(factors) + 1)


def _gray(images: np.ndarray) -> np.ndarray:
    """Returns ``0.299 R + 0.587 G + 0.114 B``, ``[N, H, W, 1]``."""
    return images if images.shape[-1] == 1 else images @ np.array([[0.299], [0.587], [0.114]])


def _snow(
    images: np.ndarray,
    draws: Draws,
    mean: float,
    scale: float,
    zoom: float,
    least: float,
    radius: int,
    sigma: float,
    kept: float,
) -> np.ndarray:
    """Adds streaks of flakes, and the same turned by 180 degrees, to a whitened image.

    Flakes are where an enlarged ``mean + scale z`` is at least ``least``. The image becomes
    ``kept x + (1 - kept) max(x, 1.5 gray + 0.5)``.
    """
    flakes = _zoomed(mean + scale * _per_image(draws, lambda d: d.normal(size=(*images.shape[1:3], 1))), zoom)
    falling = _per_image(draws, lambda d: d.uniform(-135, -45))
    layer = _streaked(_cut_down(np.where(flakes < least, 0, flakes)), falling, radius, sigma)
    white = kept * images + (1 - kept) * np.maximum(images, 1.5 * _gray(images) + 0.5)
    return white + layer + layer[:, ::-1, ::-1]


def _frost(images: np.ndarray, draws: Draws, kept: float, share: float) -> np.ndarray:
    """Returns ``kept x + share frost``: frost is drawn here, photographed in CIFAR-10-C.

    Needles lie where smooth noise of three widths crosses 0, on a bluish haze that varies slowly.
    """
    size, frost = images.shape[1:3], np.zeros((*images.shape[:3], 1))
    for width in (0.7, 1.5, 3.0):
        noise = _per_image(draws, lambda d: d.normal(size=(*size, 1)))
        smooth = ndimage.gaussian_filter(noise, (0, width, width, 0), mode="wrap")
        smooth /= smooth.std((1, 2), keepdims=True)
        frost = np.maximum(frost, np.exp(-((2.5 * smooth) ** 2)))
    haze = 0.35 + 0.1 * np.clip(smooth, -2, 2)
    tint = np.array([0.85, 0.95, 1.0]) if images.shape[-1] == 3 else np.ones(1)
    return kept * images + share * tint * (haze + (1 - haze) * frost)


def _plasma(draws: Draws, size: int, decay: float) -> np.ndarray:
    """Draws clouds in [0, 1] by the diamond-square algorithm on a torus: ``[N, size, size, 1]``.

    From a grid of one point, each round halves the distance of the points: first the centres of the squares,
    then those of their sides become the mean of their four neighbours plus ``a U(-a, a)``. ``a`` is 100 in
    the first round, and ``decay`` times smaller in each one after it.

    Args:
      draws: ``[N]``.
      size: a power of two.
      decay: > 1; the larger, the smoother.
    """
    clouds, step, noise = np.zeros((len(draws), size, size)), size, 100.0

    def between(total: np.ndarray, noise: float) -> np.ndarray:
        shape = total.shape[1:]
        return total / 4 + noise * _per_image(draws, lambda d: d.uniform(-noise, noise, size=shape))

    while step > 1:
        half, corners = step // 2, clouds[:, ::step, ::step]
        across, down = corners + np.roll(corners, -1, 2), corners + np.roll(corners, -1, 1)
        centres = between(down + np.roll(down, -1, 2), noise)
        clouds[:, half::step, half::step] = centres
        clouds[:, ::step, half::step] = between(centres + np.roll(centres, 1, 1) + across, noise)
        clouds[:, half::step, ::step] = between(centres + np.roll(centres, 1, 2) + down, noise)
        step, noise = half, noise / decay
    clouds -= clouds.min((1, 2), keepdims=True)
    return (clouds / clouds.max((1, 2), keepdims=True))[..., None]


def _fog(images: np.ndarray, draws: Draws, share: float, decay: float) -> np.ndarray:
    """Returns ``(x + share clouds) m / (m + share)`` with the image's largest value ``m``."""
    height, width = images.shape[1:3]
    clouds = _plasma(draws, 1 << (max(height, width) - 1).bit_length(), decay)[:, :height, :width]
    largest = images.max((1, 2, 3), keepdims=True)
    return (images + share * clouds) * largest / (largest + share)


def _brightness(images: np.ndarray, draws: Draws, more: float) -> np.ndarray:
    """Adds to the value in HSV, which is the largest of the colours: hue and saturation stay."""
    del draws
    value = images.max(-1, keepdims=True)
    brighter = np.minimum(value + more, 1)
    return np.where(value > 0, images * brighter / np.where(value > 0, value, 1), brighter)


def _contrast(images: np.ndarray, draws: Draws, factor: float) -> np.ndarray:
    """Returns ``m + factor (x - m)`` with the image's mean ``m`` per channel."""
    del draws
    mean = images.mean((1, 2), keepdims=True)
    return mean + factor * (images - mean)


def _elastic_transform(
    images: np.ndarray, draws: Draws, far: float, smooth: float, corner: float
) -> np.ndarray:
    """Moves the corners of a triangle, and with them the whole image, then each pixel by a smooth field.

    Args:
      images: ``[N, H, W, C]``.
      draws: ``[N]``.
      far: factor of the field, a U(-1, 1) blurred, in shorter sides of the image.
      smooth: sigma of the blur, in the same unit.
      corner: largest shift of a corner in each direction, in the same unit.
    """
    size = images.shape[1:3]
    side, middle, arm = min(size), np.array(size) // 2, min(size) // 3
    triangle = middle + arm * np.array([[1, 1], [1, -1], [-1, -1]])
    grid = np.mgrid[: size[0], : size[1]].astype(np.float64)
    results = []
    for image, draw in zip(images, draws, strict=True):
        shift = side * corner * draw.uniform(-1, 1, size=(3, 2))
        affine = np.linalg.solve(np.column_stack([triangle + shift, np.ones(3)]), triangle)
        source = np.einsum("dc,dhw->chw", affine[:2], grid) + affine[2][:, None, None]
        field = draw.uniform(-1, 1, size=(2, *size))
        if smooth:
            field = ndimage.gaussian_filter(field, (0, side * smooth, side * smooth), truncate=3)
        moved = (_sampled(image, source, "mirror"), grid + side * far * field)
        results.append(_sampled(*moved, "reflect"))
    return np.stack(results)


def _sampled(image: np.ndarray, places: np.ndarray, border: str) -> np.ndarray:
    """Returns an image ``[H, W, C]`` at places ``[2, H, W]`` (row, column), bilinearly."""
    channels = np.moveaxis(image, -1, 0)
    return np.stack([ndimage.map_coordinates(c, places, order=1, mode=border) for c in channels], axis=-1)


def _by_pillow(images: np.ndarray, operation: Callable[[Image.Image], Image.Image]) -> np.ndarray:
    """Applies an operation of Pillow to each image."""
    gray = images.shape[-1] == 1
    stored = np.round(255 * images).astype(np.uint8)
    pictures = (Image.fromarray(image[..., 0] if gray else image) for image in stored)
    return np.stack([np.asarray(operation(picture)) for picture in pictures]).reshape(images.shape) / 255


def _pixelate(images: np.ndarray, draws: Draws, part: float) -> np.ndarray:
    """Reduces the sides to ``part`` and enlarges them again, both with Pillow's box filter."""
    del draws
    height, width = images.shape[1:3]
    small = int(width * part), int(height * part)

    def coarse(picture: Image.Image) -> Image.Image:
        return picture.resize(small, Image.Resampling.BOX).resize((width, height), Image.Resampling.BOX)

    return _by_pillow(images, coarse)


def _jpeg_compression(images: np.ndarray, draws: Draws, quality: int) -> np.ndarray:
    """Stores the image as a JPEG file of a quality and reads it again."""
    del draws

    def stored(picture: Image.Image) -> Image.Image:
        file = io.BytesIO()
        picture.save(file, "JPEG", quality=quality)
        return Image.open(file)

    return _by_pillow(images, stored)


def _of(apply: Callable[..., np.ndarray], *strengths: float | tuple[float, ...]) -> Corruption:
    """Makes a corruption from the constants of its strengths."""
    return Corruption(apply, tuple(s if isinstance(s, tuple) else (s,) for s in strengths))


CORRUPTIONS: dict[str, Corruption] = {
    "gaussian_noise": _of(_gaussian_noise, 0.04, 0.06, 0.08, 0.09, 0.10),
    "shot_noise": _of(_shot_noise, 500, 250, 100, 75, 50),
    "impulse_noise": _of(_impulse_noise, 0.01, 0.02, 0.03, 0.05, 0.07),
    "defocus_blur": _of(_defocus_blur, (0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1)),
    "glass_blur": _of(_glass_blur, (0.05, 1), (0.25, 1), (0.4, 1), (0.25, 2), (0.4, 2)),
    "motion_blur": _of(_motion_blur, (6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5)),
    "zoom_blur": _of(_zoom_blur, 1.06, 1.11, 1.16, 1.21, 1.26),
    "snow": _of(
        _snow,
        (0.1, 0.2, 1, 0.6, 8, 3, 0.95),
        (0.1, 0.2, 1, 0.5, 10, 4, 0.9),
        (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9),
        (0.25, 0.3, 2.25, 0.6, 12, 6, 0.85),
        (0.3, 0.3, 1.25, 0.65, 14, 12, 0.8),
    ),
    "frost": _of(_frost, (1, 0.2), (1, 0.3), (0.9, 0.4), (0.85, 0.4), (0.75, 0.45)),
    "fog": _of(_fog, (0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75)),
    "brightness": _of(_brightness, 0.05, 0.1, 0.15, 0.2, 0.3),
    "contrast": _of(_contrast, 0.75, 0.5, 0.4, 0.3, 0.15),
    "elastic_transform": _of(
        _elastic_transform,
        (0, 0, 0.08),
        (0.05, 0.2, 0.07),
        (0.08, 0.06, 0.06),
        (0.1, 0.04, 0.05),
        (0.1, 0.03, 0.03),
    ),
    "pixelate": _of(_pixelate, 0.95, 0.9, 0.85, 0.75, 0.65),
    "jpeg_compression": _of(_jpeg_compression, 80, 65, 58, 50, 40),
}  # fmt: skip
"""Corruptions by the names that CIFAR-10-C's files have, with the constants of strengths 1 to 5.

Random numbers follow from the place in this table: a new corruption comes last.
"""

STRENGTHS = tuple(range(1, 6))
"""Of every corruption."""
