"""Long-tailed subsets, sampling orders and augmentation: arrays in, arrays out, no files."""

import math
import random
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from robal_jax.errors import InputError


class Images(Protocol):
    """Images that are read when they are asked for; an array in memory is the simplest of them.

    Symbols: N images H x W x C.
    """

    @property
    def shape(self) -> tuple[int, ...]:
        """(N, H, W, C)."""

    @property
    def dtype(self) -> np.dtype:
        """uint8."""

    def __len__(self) -> int:
        """N."""

    def __getitem__(self, ids: Any, /) -> np.ndarray:
        """Integers [...], or a slice, to uint8 [..., H, W, C]; may be called from several threads."""


class Dataset(NamedTuple):
    """A long-tailed train set and a balanced test set of images in [0, 1], stored as integers.

    Symbols: N train images, M test images, K classes, images H x W x C. An image is
    uint8 / pixel_max. A subset that was cut to a long tail is in class order, class 0 (the head) first,
    as the paper's. Train images may be larger than test images: augmentation then makes them equal.
    """

    train_images: Images  # uint8 [N, H, W, C], 0..pixel_max
    train_labels: np.ndarray  # int32 [N], 0..K-1
    test_images: Images  # uint8 [M, H, W, C], 0..pixel_max
    test_labels: np.ndarray  # int32 [M], 0..K-1
    pixel_max: int
    class_names: tuple[str, ...]  # [K]

    @property
    def class_counts(self) -> np.ndarray:
        """Train images of each class, n_i: int64 [K]."""
        return np.bincount(self.train_labels, minlength=len(self.class_names)).astype(np.int64)


def _exponential(n_max: int, num_classes: int, ratio: float) -> list[int]:
    return [int(n_max * ratio ** (i / (num_classes - 1))) for i in range(num_classes)]


def _step(n_max: int, num_classes: int, ratio: float) -> list[int]:
    head = num_classes // 2
    return [n_max] * head + [int(n_max * ratio)] * (num_classes - head)


PROFILES: dict[str, Callable[[int, int, float], list[int]]] = {"exp": _exponential, "step": _step}


def long_tailed_counts(n_max: int, num_classes: int, ratio: float, profile: str = "exp") -> np.ndarray:
    """Images that each class keeps in the long-tailed train set.

    exp:  n_i = int(n_max * ratio^(i / (K - 1))), i = 0..K-1
    step: n_i = n_max for i < K // 2, int(n_max * ratio) for the others

    Args:
        n_max: images of the head class, >= 1.
        num_classes: K >= 2.
        ratio: imbalance ratio n_min / n_max in (0, 1]; papers quote its inverse, IR.
        profile: 'exp' or 'step'.

    Returns:
        int64 [K].

    Raises:
        InputError: unknown profile, ratio outside (0, 1], or a class left without an image.

    Source: RoBal, experimental settings; counts are truncated, not rounded (quirk 5).
    """
    if profile not in PROFILES:
        raise InputError(f"unknown long-tail profile {profile!r}; choose one of {', '.join(PROFILES)}")
    if n_max < 1 or num_classes < 2:
        raise InputError(
            f"a long-tailed set needs a head of 1 image or more and 2 classes or more: "
            f"got head {n_max} and {num_classes} classes"
        )
    if not 0 < ratio <= 1:
        raise InputError(
            f"imbalance ratio {ratio} is outside (0, 1]; it is n_min / n_max, e.g. 0.02 for IR 50"
        )
    counts = PROFILES[profile](n_max, num_classes, ratio)
    if 0 in counts:
        # 1 / n_max may round down, and the truncation would then leave 0 images.
        smallest = 1 / n_max if int(n_max * (1 / n_max)) else math.nextafter(1 / n_max, 1)
        raise InputError(
            f"imbalance ratio {ratio} leaves class {counts.index(0)} without an image "
            f"(head {n_max}, profile {profile}); the smallest ratio that works is {smallest}"
        )
    return np.array(counts, np.int64)


def long_tailed_indices(labels: np.ndarray, counts: np.ndarray, seed: int = 0) -> np.ndarray:
    """Positions of the images that the long-tailed train set keeps, class 0 first.

    One legacy NumPy generator runs through the classes in order; each class's positions are
    shuffled and the first n_i are kept.

    Args:
        labels: integers [N], the full train labels in the official order.
        counts: integers [K], n_i.
        seed: seed of the subset; the paper's is 0 whatever the training seed.

    Returns:
        int64 [sum n_i], positions in 0..N-1.

    Raises:
        InputError: a class has fewer images than asked for.

    Source: RoBal, experimental settings, and the released data set class (quirks 4 and 5).
    """
    rng = np.random.RandomState(seed)
    kept = []
    for label, count in enumerate(counts):
        positions = np.flatnonzero(labels == label)
        if len(positions) < count:
            raise InputError(
                f"class {label} has {len(positions)} images but the long-tailed set asks for {count}; "
                f"give the full data set or a smaller head"
            )
        rng.shuffle(positions)
        kept.append(positions[:count])
    return np.concatenate(kept)


def uniform_order(num_examples: int, seed: int, epoch: int) -> np.ndarray:
    """A permutation of the examples that depends on (seed, epoch) only.

    Args:
        num_examples: N.
        seed: training seed, >= 0.
        epoch: epoch number, >= 0.

    Returns:
        int32 [N], each of 0..N-1 once.
    """
    # NumPy promises never to change the streams of Philox and of RandomState, unlike Generator's.
    bits = np.random.Philox(np.random.SeedSequence([seed, epoch]))
    return np.random.RandomState(bits).permutation(num_examples).astype(np.int32)


def _shuffled_rounds(items: list[int], rng: random.Random) -> Iterator[int]:
    """All items in a fresh random order, again and again."""
    while True:
        rng.shuffle(items)
        yield from items


def class_aware_order(labels: np.ndarray, rng: random.Random) -> np.ndarray:
    """Class-aware sampling: every class is drawn equally often.

    Classes come in rounds, each round a fresh shuffle; a class's images come in rounds of their own.
    An epoch is max_i(n_i) * K draws.

    Args:
        labels: integers [N], every class 0..K-1 present.
        rng: source of the shuffles; random.Random(0) gives the released sampler's first epoch.

    Returns:
        int32 [max_i(n_i) * K], positions in 0..N-1.

    Raises:
        InputError: a class has no image.

    Source: "re-sampling" baseline of RoBal; epoch length as released (quirks 4 and 9).
    """
    counts = np.bincount(labels)
    if 0 in counts:
        raise InputError(f"class-aware sampling needs every class: class {np.argmin(counts)} has no image")
    classes = _shuffled_rounds(list(range(len(counts))), rng)
    images = [_shuffled_rounds(np.flatnonzero(labels == c).tolist(), rng) for c in range(len(counts))]
    return np.array([next(images[next(classes)]) for _ in range(counts.max() * len(counts))], np.int32)


def _uniform_epoch(labels: np.ndarray, seed: int, epoch: int) -> np.ndarray:
    return uniform_order(len(labels), seed, epoch)


def _class_aware_epoch(labels: np.ndarray, seed: int, epoch: int) -> np.ndarray:
    # The released sampler runs one generator through all epochs; a seed of its own for each epoch
    # lets a resumed run continue without replaying the earlier ones.
    return class_aware_order(labels, random.Random(f"{seed}/{epoch}"))


def _mixed_epoch(labels: np.ndarray, seed: int, epoch: int) -> np.ndarray:
    uniform, class_aware = _uniform_epoch(labels, seed, epoch), _class_aware_epoch(labels, seed, epoch)
    return np.stack([uniform, class_aware[: len(uniform)]], axis=1).reshape(-1)


SAMPLERS: dict[str, Callable[[np.ndarray, int, int], np.ndarray]] = {
    "uniform": _uniform_epoch,
    "class_aware": _class_aware_epoch,
    "mixed": _mixed_epoch,
}


def epoch_order(sampler: str, labels: np.ndarray, seed: int, epoch: int) -> np.ndarray:
    """The order in which an epoch visits the train images, a function of its arguments only.

    Args:
        sampler: 'uniform' (each image once), 'class_aware' (each class equally often), or 'mixed' (draws of
            both in turn, 2 N in all, as the released sampler of that name).
        labels: int32 [N].
        seed: training seed, >= 0.
        epoch: epoch number, >= 0.

    Returns:
        int32 [draws], positions in 0..N-1.

    Raises:
        InputError: unknown sampler.
    """
    if sampler not in SAMPLERS:
        raise InputError(f"unknown sampler {sampler!r}; choose one of {', '.join(SAMPLERS)}")
    return SAMPLERS[sampler](labels, seed, epoch)


def to_float(images: jax.Array, pixel_max: int) -> jax.Array:
    """Integer pixels as floats in [0, 1]: images / pixel_max, correctly rounded.

    Args:
        images: uint8 [...], 0..pixel_max.
        pixel_max: the value that stands for 1.

    Returns:
        float [...], float32, or float64 where JAX's x64 mode is on.
    """
    # Looked up, because XLA turns a division by a constant into a product with its rounded inverse,
    # which is one ulp off for half of the 256 values.
    return jnp.asarray(np.arange(pixel_max + 1) / pixel_max, dtype=float)[images]


def random_crop_flip(keys: jax.Array, images: jax.Array, padding: int = 4) -> jax.Array:
    """Random crop from the zero-padded image, then horizontal flip with probability 1/2.

    An image's result depends on its own key only, not on the batch around it.

    Args:
        keys: typed PRNG keys [B].
        images: any dtype [B, H, W, C].
        padding: pixels added on each side; both offsets are uniform on 0..2*padding.

    Returns:
        [B, H, W, C], dtype of images.

    Source: RoBal, experimental settings (crop and flip of the CIFAR training images).
    """

    def one(key: jax.Array, image: jax.Array) -> jax.Array:
        crop_key, flip_key = jax.random.split(key)
        padded = jnp.pad(image, ((padding, padding), (padding, padding), (0, 0)))
        top, left = jax.random.randint(crop_key, (2,), 0, 2 * padding + 1)
        crop = jax.lax.dynamic_slice(padded, (top, left, 0), image.shape)
        return jnp.where(jax.random.bernoulli(flip_key), crop[:, ::-1], crop)

    return jax.vmap(one)(keys, images)


def random_resized_crop_flip(keys: jax.Array, images: jax.Array, size: tuple[int, int]) -> jax.Array:
    """Random part of the image resized to one size, then horizontal flip with probability 1/2.

    The part has area a H W and aspect ratio r (width : height), at a uniform place in the image::

        a ~ U(0.08, 1), log r ~ U(log 3/4, log 4/3)
        height = min(H, sqrt(a H W / r)), width = min(W, sqrt(a H W r))

    The usual ten draws until a part fits are one draw here, clipped to the image, so that every image costs
    the same. Bilinear, with antialiasing. An image's result depends on its own key only.

    Args:
        keys: typed PRNG keys [B].
        images: uint8 [B, H, W, C].
        size: (height, width) of the result.

    Returns:
        uint8 [B, *size, C].

    Source: Szegedy et al. 2015, "Going Deeper with Convolutions", section 6.
    """

    def one(key: jax.Array, image: jax.Array) -> jax.Array:
        box_key, flip_key = jax.random.split(key)
        crop = _resized_part(image, *_random_part(box_key, image.shape[:2]), size)
        return jnp.where(jax.random.bernoulli(flip_key), crop[:, ::-1], crop)

    return jax.vmap(one)(keys, images)


def _random_part(key: jax.Array, shape: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    """(top, left) and (height, width) of a random part, in pixels, not rounded."""
    area_key, ratio_key, place_key = jax.random.split(key, 3)
    area = jax.random.uniform(area_key, (), jnp.float32, 0.08, 1) * (shape[0] * shape[1])
    log_ratio = jax.random.uniform(ratio_key, (), jnp.float32, -math.log(4 / 3), math.log(4 / 3))
    whole = jnp.array(shape, jnp.float32)
    extent = jnp.minimum(whole, jnp.sqrt(area * jnp.exp(jnp.stack([-log_ratio, log_ratio]))))
    return jax.random.uniform(place_key, (2,), jnp.float32) * (whole - extent), extent


def _resized_part(image: jax.Array, corner: jax.Array, extent: jax.Array, size: tuple[int, int]) -> jax.Array:
    """The part of an image [H, W, C] at a corner (top, left), of an extent (height, width), as [*size, C]."""
    scale = jnp.array(size, jnp.float32) / extent
    resized = jax.image.scale_and_translate(
        image.astype(jnp.float32), (*size, image.shape[2]), (0, 1), scale, -corner * scale, "linear"
    )
    # Weighted means of pixels: rounding cannot leave 0..pixel_max.
    return jnp.round(resized).astype(image.dtype)


def _same_size(images: jax.Array, size: tuple[int, int]) -> jax.Array:
    if images.shape[1:3] != size:
        raise ValueError(f"this augmentation keeps the images' size {images.shape[1:3]}; {size} asked for")
    return images


AUGMENTATIONS: dict[str, Callable[..., jax.Array]] = {
    "none": lambda keys, images, size: _same_size(images, size),
    "crop_flip": lambda keys, images, size: random_crop_flip(keys, _same_size(images, size)),
    "resized_crop_flip": random_resized_crop_flip,
}
"""Keys [B], uint8 images [B, H, W, C] and size (height, width), which is static, to uint8 [B, *size, C]."""


def check_labels(labels: np.ndarray, num_classes: int, what: str) -> None:
    """Checks that labels are in 0..num_classes-1 and that every class occurs.

    Args:
        labels: integers [N].
        num_classes: K.
        what: name of the labels in the message.

    Raises:
        InputError: a label out of range or a class without an image.
    """
    if len(labels) and not (labels.min() >= 0 and labels.max() < num_classes):
        raise InputError(
            f"{what}: labels {labels.min()}..{labels.max()} found, but {num_classes} classes need labels "
            f"0..{num_classes - 1}; check that the data match the data set's name"
        )
    counts = np.bincount(labels, minlength=num_classes)
    if 0 in counts:
        raise InputError(f"{what}: class {np.argmin(counts)} has no image; every class needs at least one")


def check_dataset(dataset: Dataset) -> Dataset:
    """Checks everything that training and evaluation take for granted about a data set.

    Returns:
        The data set itself.

    Raises:
        InputError: wrong dtype or shape, labels out of range, a class without a train or a test image, or
            pixels above pixel_max in an array; images that would have to be read are not.
    """
    for split, images, labels in (
        ("train", dataset.train_images, dataset.train_labels),
        ("test", dataset.test_images, dataset.test_labels),
    ):
        if images.dtype != np.uint8 or len(images.shape) != 4:
            raise InputError(
                f"{split} images must be uint8 [N, H, W, C]: found {images.dtype} {images.shape}"
            )
        if labels.dtype != np.int32 or labels.shape != images.shape[:1]:
            raise InputError(
                f"{split} labels must be int32 [{len(images)}], one for each image: "
                f"found {labels.dtype} {labels.shape}"
            )
        check_labels(labels, len(dataset.class_names), f"{split} set")
        if isinstance(images, np.ndarray) and images.max() > dataset.pixel_max:
            raise InputError(
                f"{split} images have pixels up to {images.max()}, above pixel_max {dataset.pixel_max}"
            )
    channels = [images.shape[3] for images in (dataset.train_images, dataset.test_images)]
    if channels[0] != channels[1]:
        raise InputError(f"train images have {channels[0]} channels and test images {channels[1]}")
    return dataset
