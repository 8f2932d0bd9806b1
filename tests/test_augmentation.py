"""Augmentation on the device (robal_jax.data): crops, Pillow's operations, policies, erased boxes, lists."""

import collections
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT
from PIL import Image, ImageEnhance, ImageOps

from robal_jax import builder, cli
from robal_jax.builder.parts import augmentation
from robal_jax.data import (
    AUGMENTATIONS,
    Dataset,
    autoaugment,
    cutmix,
    cutout,
    draw_cutmix,
    pil,
    policies,
    randaugment,
    random_crop_flip,
    random_erasing,
    random_resized_crop_flip,
)
from robal_jax.data.augmentation import _resized_part
from robal_jax.errors import InputError

crop_flip = jax.jit(random_crop_flip, static_argnums=2)


# ---------------------------------------------------------------- random crops and flips


def all_crops(image, padding):
    """Every possible result of the augmentation, by plain slicing."""
    height, width, _ = image.shape
    padded = np.pad(image, ((padding, padding), (padding, padding), (0, 0)))
    for top in range(2 * padding + 1):
        for left in range(2 * padding + 1):
            crop = padded[top : top + height, left : left + width]
            yield (top, left, False), crop
            yield (top, left, True), crop[:, ::-1]


def test_crop_and_flip_draws_every_case_evenly():
    image = np.random.default_rng(0).integers(1, 256, (6, 5, 2), dtype=np.uint8)
    draws = 1800
    keys = jax.random.split(jax.random.key(0), draws)
    out = np.asarray(crop_flip(keys, np.tile(image, (draws, 1, 1, 1)), 1))
    assert out.dtype == np.uint8
    assert out.shape == (draws, 6, 5, 2)
    cases = {crop.tobytes(): case for case, crop in all_crops(image, 1)}
    assert len(cases) == 18
    found = [cases[one.tobytes()] for one in out]  # KeyError: not a crop of the padded image
    times = [found.count(case) for case in cases.values()]
    assert min(times) > 65  # 100 expected, standard deviation 9.7
    assert max(times) < 135


def test_default_padding_is_four():
    images = np.full((400, 8, 8, 1), 9, np.uint8)
    out = np.asarray(crop_flip(jax.random.split(jax.random.key(1), 400), images))
    empty_rows = (out == 0).all(axis=(2, 3)).sum(axis=1)
    assert set(empty_rows.tolist()) == {0, 1, 2, 3, 4}


def test_crop_and_flip_depends_on_the_own_key_only():
    images = np.random.default_rng(0).random((6, 8, 8, 3), np.float32)
    keys = jax.random.split(jax.random.key(7), 6)
    whole = crop_flip(keys, images)
    assert whole.dtype == jnp.float32
    assert np.array_equal(whole[4:], crop_flip(keys[4:], images[4:]))
    assert np.array_equal(whole[::-1], crop_flip(keys[::-1], images[::-1]))


def test_without_padding_only_flips_are_left():
    images = np.random.default_rng(0).integers(0, 256, (40, 4, 4, 1), dtype=np.uint8)
    out = np.asarray(crop_flip(jax.random.split(jax.random.key(0), 40), images, 0))
    kept = (out == images).all(axis=(1, 2, 3))
    assert np.array_equal(out[~kept], images[~kept][:, :, ::-1])
    assert 0 < kept.sum() < 40


# ---------------------------------------------------------------- the table of augmentations

SIDE, OUT = 240, 16


@pytest.fixture(scope="module")
def parts():
    """What 1500 resized crops of one image show of their boxes, from pixels that tell their own position."""
    rows, columns = np.mgrid[:SIDE, :SIDE].astype(np.uint8)
    image = np.stack([rows, columns], axis=-1)
    augment = jax.jit(AUGMENTATIONS["resized_crop_flip"], static_argnums=2)
    keys = jax.random.split(jax.random.key(5), 1500).reshape(15, 100)
    images = np.tile(image, (100, 1, 1, 1))
    out = np.concatenate([augment(some, images, (OUT, OUT)) for some in keys])
    assert out.dtype == np.uint8
    assert out.shape == (1500, OUT, OUT, 2)
    # Away from the image's edge the antialiasing filter gives a pixel's centre exactly, before rounding.
    first, last = 2, OUT - 3
    down = out[:, :, OUT // 2, 0].astype(float)
    across = out[:, OUT // 2, :, 1].astype(float)
    height = (down[:, last] - down[:, first]) * OUT / (last - first)
    width = (across[:, last] - across[:, first]) * OUT / (last - first)
    top = down[:, first] + 0.5 - (first + 0.5) * height / OUT
    left = np.minimum(across[:, first], across[:, last]) + 0.5 - (first + 0.5) * abs(width) / OUT
    return {"top": top, "left": left, "height": height, "width": abs(width), "flipped": width < 0}


@pytest.mark.slow
def test_resized_crops_have_the_area_and_the_ratio_of_the_definition(parts):
    area = parts["height"] * parts["width"] / SIDE**2
    assert 0.06 < area.min() < 0.11
    assert area.max() > 0.97
    # Up to 3/4 nothing is clipped, so areas are uniform: three standard deviations are 0.04.
    for bound in (0.2, 0.4, 0.6, 0.75):
        assert abs((area < bound).mean() - (bound - 0.08) / 0.92) < 0.04, bound
    ratio = np.log(parts["width"] / parts["height"])[(area > 0.3) & (area < 0.75)] / np.log(4 / 3)
    assert abs(ratio).max() < 1.06
    for bound in (-0.5, 0, 0.5):
        assert abs((ratio < bound).mean() - (bound + 1) / 2) < 0.07, bound


@pytest.mark.slow
def test_resized_crops_lie_anywhere_in_the_image_and_half_are_flipped(parts):
    assert 0.44 < parts["flipped"].mean() < 0.56
    room = SIDE - np.stack([parts["height"], parts["width"]])
    corner = np.stack([parts["top"], parts["left"]])
    assert corner.min() > -2
    assert (corner - room).max() < 2
    wide = (room > 60).all(axis=0)  # elsewhere the rounding to grey levels hides the place
    place = corner[:, wide] / room[:, wide]
    for bound in (0.25, 0.5, 0.75):
        assert (abs((place < bound).mean(axis=1) - bound) < 0.06).all(), bound
    assert abs(np.corrcoef(place)[0, 1]) < 0.1


def test_resized_crop_depends_on_the_own_key_only():
    augment = jax.jit(AUGMENTATIONS["resized_crop_flip"], static_argnums=2)
    images = np.random.default_rng(0).integers(0, 256, (6, 9, 8, 3), dtype=np.uint8)
    keys = jax.random.split(jax.random.key(7), 6)
    whole = augment(keys, images, (5, 7))
    assert whole.shape == (6, 5, 7, 3)
    assert np.array_equal(whole[::-1], augment(keys[::-1], images[::-1], (5, 7)))
    twins = augment(keys, np.tile(images[:1], (6, 1, 1, 1)), (5, 7))
    assert len({one.tobytes() for one in np.asarray(twins)}) == 6


@pytest.mark.slow
def test_the_whole_image_as_part_is_the_image_itself():
    resized_part = jax.jit(_resized_part, static_argnums=3)
    image = np.random.default_rng(0).integers(0, 256, (7, 12, 3), dtype=np.uint8)
    same = resized_part(image, jnp.zeros(2), jnp.array([7.0, 12.0]), (7, 12))
    assert same.dtype == np.uint8
    assert np.array_equal(same, image)
    corner = resized_part(image, jnp.array([2.0, 5.0]), jnp.array([4.0, 6.0]), (4, 6))
    assert np.array_equal(corner, image[2:6, 5:11])


@pytest.mark.parametrize("value", [0, 16, 255])
def test_resizing_keeps_a_flat_image_flat(value):
    image = np.full((9, 9, 1), value, np.uint8)
    for corner, extent in (((0, 0), (9, 9)), ((0.3, 2.9), (8.7, 3.1)), ((6.5, 0), (2.5, 9))):
        out = _resized_part(image, jnp.array(corner, float), jnp.array(extent, float), (4, 13))
        assert np.array_equal(out, np.full((4, 13, 1), value, np.uint8))


@pytest.mark.slow
def test_augmentations_that_keep_the_size():
    images = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3), dtype=np.uint8)
    keys = jax.random.split(jax.random.key(7), 6)
    assert np.array_equal(AUGMENTATIONS["none"](keys, images, (8, 8)), images)
    cropped = AUGMENTATIONS["crop_flip"](keys, images, (8, 8))
    assert np.array_equal(cropped, crop_flip(keys, images))
    for name in ("none", "crop_flip"):
        with pytest.raises(ValueError, match=r"cannot resize \(8, 8\) to \(8, 4\); use"):
            AUGMENTATIONS[name](keys, images, (8, 4))


# ---------------------------------------------------------------- Pillow's operations

HEIGHT, WIDTH = 20, 28
MAGNITUDES = {
    **dict.fromkeys(("ShearX", "ShearY"), (-0.3, -0.08, 0.0, 0.1, 0.26666668)),
    **dict.fromkeys(("TranslateX", "TranslateY"), (-14.5, -3.9, 0.0, 1.6, 7.7)),
    "Rotate": (-30.0, -8.0, 3.33, 45.0, 180.0),
    **dict.fromkeys(("Brightness", "Color", "Contrast", "Sharpness"), (-0.9, -0.4, -0.24, 0.0, 0.6, 0.7)),
    "Posterize": (4.0, 7.0, 8.0),
    "Solarize": (0.0, 0.44444445, 0.73333335, 1.0),
    **dict.fromkeys(("Identity", "AutoContrast", "Equalize", "Invert"), (0.0,)),
}


def by_pillow(name, magnitude, image):
    """The operation as Pillow has it."""
    picture = Image.fromarray(image[..., 0] if image.shape[2] == 1 else image)
    shift = -int(magnitude)
    affine = {
        "ShearX": (1, magnitude, 0, 0, 1, 0),
        "ShearY": (1, 0, 0, magnitude, 1, 0),
        "TranslateX": (1, 0, shift, 0, 1, 0),
        "TranslateY": (1, 0, 0, 0, 1, shift),
    }
    if name in affine:
        result = picture.transform(picture.size, Image.Transform.AFFINE, affine[name])
    elif name in ("Brightness", "Color", "Contrast", "Sharpness"):
        result = getattr(ImageEnhance, name)(picture).enhance(1 + magnitude)
    else:
        result = {
            "Identity": lambda: picture,
            "Rotate": lambda: picture.rotate(magnitude),
            "Posterize": lambda: ImageOps.posterize(picture, int(magnitude)),
            "Solarize": lambda: ImageOps.solarize(picture, 255 * magnitude),
            "AutoContrast": lambda: ImageOps.autocontrast(picture),
            "Equalize": lambda: ImageOps.equalize(picture),
            "Invert": lambda: ImageOps.invert(picture),
        }[name]()
    return np.asarray(result).reshape(image.shape)


def pictures(channels):
    """Noise, noise of few and of neighbouring values, a ramp, and images of one and of two values."""
    rng, shape = np.random.default_rng(0), (HEIGHT, WIDTH, channels)
    ramp = np.arange(HEIGHT * WIDTH * channels).reshape(shape) % 251
    two = np.where(rng.random(shape) < 0.002, 201, 90)
    found = [rng.integers(low, high, shape) for low, high in ((0, 256), (30, 190), (250, 256), (26, 34))]
    return np.stack([*found, ramp, two, np.full(shape, 77)]).astype(np.uint8)


@pytest.fixture(scope="module")
def applied():
    """Every operation on all pictures, colour and gray, compiled once for each."""
    cases = [(name, m) for name, magnitudes in MAGNITUDES.items() for m in magnitudes]
    stacked = pil.stack([pil.operation(name, m, (HEIGHT, WIDTH)) for name, m in cases])
    apply = jax.jit(jax.vmap(jax.vmap(pil.apply, (0, None)), (None, 0)))
    found = {channels: np.asarray(apply(pictures(channels), stacked)) for channels in (1, 3)}
    return {(case, channels): found[channels][i] for i, case in enumerate(cases) for channels in found}


def test_all_operations_are_known_here():
    assert set(MAGNITUDES) == set(pil.OPERATIONS)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", MAGNITUDES)
def test_an_operation_is_pillows_in_every_pixel(applied, name, channels):
    for magnitude in MAGNITUDES[name]:
        expected = [by_pillow(name, magnitude, image) for image in pictures(channels)]
        found = applied[(name, magnitude), channels]
        assert found.dtype == np.uint8
        assert (found != np.stack(expected)).sum() == 0, magnitude


def test_blending_rounds_twice():
    """Of all pairs of values, with every factor of the policies; one rounding fails at some of them."""
    backdrop, image = (values.reshape(256, 256, 1) for values in np.mgrid[:256, :256])
    changes = {policies.magnitudes("Color", 31, (32, 32))[8], *policies.magnitudes("Color", 10, (32, 32))}
    blend = jax.jit(pil.blended)
    for factor in np.float32([1 + sign * change for change in changes for sign in (1, -1)]):
        exact = backdrop.astype(np.float32) + factor * (image - backdrop).astype(np.float32)
        expected = np.clip(exact, 0, 255).astype(np.uint8)
        assert (blend(backdrop, image, factor) != expected).sum() == 0, factor


@pytest.mark.slow
def test_autocontrast_of_every_range():
    """Pillow's float64 arithmetic falls short of an integer in 5958 of the 32640 ranges."""
    low, high = np.triu_indices(256)
    tables = jax.jit(jax.vmap(pil.autocontrast_tables))(np.stack([low, high], 1)[:, None].astype(np.int32))
    values = np.arange(256)
    scale = 255 / np.maximum(high - low, 1)[:, None]
    expected = np.trunc(values * scale + -low[:, None] * scale)
    expected = np.where((high > low)[:, None], expected, values)
    used = (values >= low[:, None]) & (values <= high[:, None])
    assert np.array_equal(tables[:, 0][used], expected[used])


def test_operations_need_one_or_three_channels():
    with pytest.raises(ValueError, match="images have 2 channels; give images with 1 or 3"):
        pil.apply(np.zeros((4, 4, 2), np.uint8), pil.operation("Identity", 0, (4, 4)))


# ---------------------------------------------------------------- RandAugment and AutoAugment

IMAGE = np.random.default_rng(1).integers(30, 220, (12, 14, 3), dtype=np.uint8)
apply = jax.jit(jax.vmap(pil.apply))


def distribution(pairs):
    """What becomes of ``IMAGE``, and how often, from the probabilities of pairs ((name, magnitude), ...)."""
    single = sorted({each for pair in pairs for each in pair})
    made = [pil.operation(*each, IMAGE.shape[:2]) for each in single]
    after = apply(np.tile(IMAGE, (len(made), 1, 1, 1)), pil.stack(made))
    number = {each: i for i, each in enumerate(single)}
    second = pil.stack([made[number[pair[1]]] for pair in pairs])
    results = np.asarray(apply(after[np.array([number[pair[0]] for pair in pairs])], second))
    found = collections.Counter()
    for result, probability in zip(results, pairs.values(), strict=True):
        found[result.tobytes()] += probability
    return found


def compare_draws(function, expected, draws=6000):
    """The results are those of the distribution, each as often as it should be."""
    images = np.tile(IMAGE, (draws, 1, 1, 1))
    out = np.asarray(jax.jit(function)(jax.random.split(jax.random.key(3), draws), images))
    found = collections.Counter(one.tobytes() for one in out)
    assert sum(expected.values()) == pytest.approx(1)
    assert set(found) <= set(expected)
    for result, probability in expected.items():
        deviation = np.sqrt(draws * probability * (1 - probability))
        assert abs(found[result] - draws * probability) < 5 * deviation + 2


def signed(name, bins, number):
    magnitude = float(policies.magnitudes(name, bins, IMAGE.shape[:2])[number])
    return [(name, magnitude), (name, -magnitude if name in policies.SIGNED else magnitude)]


@pytest.mark.slow
def test_randaugment_draws_two_of_fourteen_operations_and_their_signs():
    entries = [each for name in policies.RANDAUGMENT for each in signed(name, 31, 8)]
    assert len(entries) == 28
    pairs = collections.Counter(itertools.product(entries, entries))
    compare_draws(randaugment, distribution({pair: times / 784 for pair, times in pairs.items()}))


@pytest.mark.slow
def test_autoaugment_draws_a_pair_and_whether_each_half_is_applied():
    pairs = collections.Counter()
    for choices in policies.CIFAR10:
        halves = []
        for name, probability, number in choices:
            applied = [(each, probability / 2) for each in signed(name, 10, number)]
            halves.append([*applied, (("Identity", 0.0), 1 - probability)])
        for (one, p), (other, q) in itertools.product(*halves):
            pairs[one, other] += p * q / len(policies.CIFAR10)
    compare_draws(autoaugment, distribution(pairs))


POLICIES = {"randaugment": randaugment, "autoaugment": autoaugment}
ERASING = {"cutout": cutout, "random_erasing": random_erasing}


@pytest.mark.slow
@pytest.mark.parametrize("name", [*POLICIES, *ERASING])
def test_an_image_depends_on_its_own_key_only(name):
    function = jax.jit((POLICIES | ERASING)[name])
    images = np.random.default_rng(0).integers(1, 256, (12, 10, 8, 3), dtype=np.uint8)
    keys = jax.random.split(jax.random.key(7), 12)
    whole = function(keys, images)
    assert whole.shape == images.shape
    assert whole.dtype == np.uint8
    assert np.array_equal(whole[::-1], function(keys[::-1], images[::-1]))
    twins = np.asarray(function(keys, np.tile(images[:1], (12, 1, 1, 1))))
    assert len({one.tobytes() for one in twins}) > 5


@pytest.mark.slow
@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("pixel_max", [1, 16])
def test_other_ranges_of_pixels_are_brought_to_bytes_and_back(name, pixel_max):
    images = np.random.default_rng(0).integers(0, pixel_max + 1, (60, 8, 8, 1), dtype=np.uint8)
    keys = jax.random.split(jax.random.key(7), 60)
    function = jax.jit(POLICIES[name], static_argnames="pixel_max")
    found = np.asarray(function(keys, images, pixel_max=pixel_max))
    expected = np.asarray(function(keys, np.round(images * (255 / pixel_max)).astype(np.uint8)))
    assert found.dtype == np.uint8
    assert np.array_equal(found, np.round(expected * (pixel_max / 255)))
    assert (found == images).all((1, 2, 3)).any()  # an operation that changes nothing leaves no trace


# ---------------------------------------------------------------- erased boxes


def test_cutout_erases_each_square_equally_often():
    draws, size, side = 3000, (6, 5), 4
    images = np.full((draws, *size, 2), 9, np.uint8)
    out = np.asarray(
        jax.jit(cutout, static_argnums=2)(jax.random.split(jax.random.key(0), draws), images, side)
    )
    found = collections.Counter(one.tobytes() for one in out)
    expected = collections.Counter()
    for y, x in itertools.product(range(size[0]), range(size[1])):
        image = images[0].copy()
        image[max(y - 2, 0) : y + 2, max(x - 2, 0) : x + 2] = 0
        expected[image.tobytes()] += 1
    assert set(found) == set(expected)
    assert all(abs(found[key] / 100 - times) < 0.6 for key, times in expected.items())


@pytest.mark.parametrize(("pixels", "side"), [(32, 18), (64, 36), (8, 4)])
def test_the_default_square_follows_the_size_of_the_image(pixels, side):
    out = np.asarray(
        cutout(jax.random.split(jax.random.key(0), 60), np.ones((60, pixels, pixels, 1), np.uint8))
    )
    assert (out == 0).sum((1, 2, 3)).max() == side**2


@pytest.fixture(scope="module")
def erased():
    """Boxes of 3000 draws on images of 60 x 90 pixels; height and width 0 where nothing was erased."""
    images = np.full((500, 60, 90, 1), 7, np.uint8)
    keys = jax.random.split(jax.random.key(2), 3000).reshape(6, 500)
    function = jax.jit(random_erasing)
    holes = np.concatenate([np.asarray(function(some, images))[..., 0] == 0 for some in keys])
    rows, columns = holes.any(2), holes.any(1)
    height, width = rows.sum(1), columns.sum(1)
    assert np.array_equal(holes.sum((1, 2)), height * width)  # one box
    return {"top": rows.argmax(1), "left": columns.argmax(1), "height": height, "width": width}


def test_random_erasing_erases_half_of_the_images(erased):
    assert 0.46 < (erased["height"] > 0).mean() < 0.54


def test_erased_boxes_have_the_area_and_the_ratio_of_the_definition(erased):
    height, width = (erased[side][erased["height"] > 0] for side in ("height", "width"))
    area, ratio = height * width / (60 * 90), np.log(height / width)
    assert 0.015 < area.min() < 0.025
    assert 0.3 < area.max() < 0.34
    for part in (0.25, 0.5, 0.75):  # up to 0.2 hardly any box is clipped
        assert abs((area < 0.02 + part * 0.18).mean() - part * 0.18 / 0.31) < 0.05
        inside = ratio[area < 0.2]
        low, high = np.log(0.3), np.log(3.3)
        assert abs((inside < low + part * (high - low)).mean() - part) < 0.06


def test_erased_boxes_lie_anywhere_in_the_image(erased):
    shown = erased["height"] > 0
    for corner, side, pixels in (("top", "height", 60), ("left", "width", 90)):
        room = (pixels - erased[side])[shown]
        assert (erased[corner][shown] <= room).all()
        place = (erased[corner][shown] + 0.5) / (room + 1)
        for bound in (0.25, 0.5, 0.75):
            assert abs((place < bound).mean() - bound) < 0.05


# ---------------------------------------------------------------- CutMix


def test_cutmix_takes_a_box_of_each_partner():
    images = np.random.default_rng(0).integers(0, 256, (4, 6, 7, 3), dtype=np.uint8)
    partners = np.array([2, 1, 0, 0])
    mixed, share = jax.jit(cutmix)(images, np.array([1, 2, 3, 4]), partners)
    expected = images.copy()
    expected[:, 1:4, 2:6] = images[partners][:, 1:4, 2:6]
    assert mixed.dtype == np.uint8
    assert np.array_equal(mixed, expected)
    assert share == pytest.approx(1 - 12 / 42)
    for box, left in (((0, 0, 6, 7), 0), ((3, 3, 0, 0), 1)):
        whole, share = cutmix(images, np.array(box), partners)
        assert np.array_equal(whole, images if left else images[partners])
        assert share == left


def test_cutmix_draws_a_uniform_share_a_uniform_centre_and_a_permutation():
    keys = jax.random.split(jax.random.key(0), 2000)
    boxes, partners = jax.jit(jax.vmap(lambda key: draw_cutmix(key, 5, (40, 80))))(keys)
    top, left, height, width = np.asarray(boxes).T
    assert min(top.min(), left.min()) == 0
    assert ((top + height).max(), (left + width).max()) == (40, 80)
    whole = (top > 0) & (left > 0) & (top + height < 40) & (left + width < 80)
    assert (height[whole] % 2 == 0).all()
    assert abs(width[whole] - 2 * height[whole]).max() <= 3  # the shape of the image
    # The same draws by NumPy: share and centre are uniform.
    rng = np.random.default_rng(0)
    half = (40 * np.sqrt(1 - rng.random(20000))).astype(int) // 2
    centre = rng.integers(0, 40, 20000)
    expected = np.clip(centre + half, 0, 40) - np.clip(centre - half, 0, 40)
    for bound in (10, 20, 30):
        assert abs((height <= bound).mean() - (expected <= bound).mean()) < 0.045
    assert np.array_equal(np.sort(partners, 1), np.tile(np.arange(5), (2000, 1)))
    times = np.stack([np.bincount(column, minlength=5) for column in np.asarray(partners).T])
    assert abs(times / 400 - 1).max() < 0.25


# ---------------------------------------------------------------- lists of names


def data(size=(8, 8), stored=None, pixel_max=16, channels=1):
    """A data set of noise whose train images may be larger than its test images."""
    rng, labels = np.random.default_rng(0), np.array([0, 1], np.int32)
    shapes = ((2, *(stored or size), channels), (2, *size, channels))
    train, test = (rng.integers(0, pixel_max + 1, shape, dtype=np.uint8) for shape in shapes)
    return Dataset(train, labels, test, labels, pixel_max, ("a", "b"))


KEYS = jax.random.split(jax.random.key(4), 10)


def some(dataset):
    return np.tile(dataset.train_images[:1], (len(KEYS), 1, 1, 1))


def flipped(keys, images, size):
    return images[:, :, ::-1]


def halved(keys, images, size):
    return images[:, ::2, ::2]


def as_floats(keys, images, size):
    return images / 255


def brightest(keys, images, size, pixel_max):
    return jnp.full_like(images, pixel_max)


def fails(keys, images, size):
    raise KeyError("no such thing")


@pytest.mark.slow
@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_one_name_alone_gets_the_keys_themselves(name):
    dataset = data(pixel_max=255)
    found = jax.jit(augmentation(name, dataset))(KEYS, some(dataset))
    direct = jax.jit(AUGMENTATIONS[name], static_argnums=2)(KEYS, some(dataset), (8, 8))
    assert np.array_equal(found, direct)


@pytest.mark.slow
def test_a_list_is_applied_in_its_order_with_a_stream_of_the_key_for_each():
    dataset = data((8, 6))
    found = jax.jit(augmentation("randaugment,crop_flip,crop_flip,cutout", dataset))(KEYS, some(dataset))
    streams = [jax.vmap(jax.random.fold_in, (0, None))(KEYS, i) for i in range(4)]
    images = jax.jit(functools.partial(randaugment, pixel_max=16))(streams[0], some(dataset))
    images = random_crop_flip(streams[2], random_crop_flip(streams[1], images))
    assert np.array_equal(found, cutout(streams[3], images))


@pytest.mark.slow
def test_what_follows_the_resizing_sees_images_of_the_new_size():
    dataset = data((8, 8), stored=(12, 10))
    found = jax.jit(augmentation("crop_flip,resized_crop_flip,cutout", dataset))(KEYS, some(dataset))
    streams = [jax.vmap(jax.random.fold_in, (0, None))(KEYS, i) for i in range(3)]
    images = random_resized_crop_flip(streams[1], random_crop_flip(streams[0], some(dataset)), (8, 8))
    assert np.array_equal(found, cutout(streams[2], images))


@pytest.mark.slow
def test_a_function_of_the_users_own():
    dataset = data()
    mirror = augmentation("test_augmentation:flipped", dataset)
    assert np.array_equal(mirror(KEYS, some(dataset)), some(dataset)[:, :, ::-1])
    bright = augmentation("crop_flip,test_augmentation:brightest", dataset)
    assert (bright(KEYS, some(dataset)) == 16).all()
    larger = data((8, 8), stored=(16, 16))
    half = augmentation("crop_flip,test_augmentation:halved,cutout", larger)
    assert half(KEYS, some(larger)).shape == (10, 8, 8, 1)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (
            "test_augmentation:halved",
            r"returns uint8\[9, 4, 4, 1\] for images \[9, 8, 8, 1\] and size \(8, 8\)",
        ),
        (
            "crop_flip,test_augmentation:as_floats",
            r"'test_augmentation:as_floats' returns float32\[9, 8, 8, 1\]",
        ),
        (
            "test_augmentation:fails",
            r"fails with KeyError: 'no such thing' .*test_augmentation.py:\d+.*must take",
        ),
        ("test_augmentation:missing", "cannot import the augmentation 'test_augmentation:missing'"),
        ("crop_flip,flop", "unknown augmentation 'flop'; use one of none, crop_flip, "),
    ],
)
def test_functions_that_cannot_be_used(names, message):
    with pytest.raises(InputError, match=message) as caught:
        augmentation(names, data())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("names", ["none", "crop_flip", "randaugment,crop_flip,cutout"])
def test_images_that_nothing_resizes(names):
    message = rf"config.train.augmentation '{names}' leaves the training images at \(12, 12\), but the test"
    with pytest.raises(InputError, match=message):
        augmentation(names, data((8, 8), stored=(12, 12)))


def test_pillows_operations_refuse_two_channels():
    with pytest.raises(InputError, match="'autoaugment' cannot be used here: images have 2 channels; give"):
        augmentation("crop_flip,autoaugment", data(channels=2))


@pytest.mark.parametrize(
    "value", ["", "flop", "crop_flip,", "crop_flip, cutout", "none,crop_flip", "crop_flip;cutout"]
)
def test_values_of_the_field_that_are_refused(value):
    config = cli.load_config(f"{ROOT}/configs/at.py:digits_lt")
    config.train.augmentation = value
    message = (
        f"config.train.augmentation is '{value}'; it must be 'none', or a list with commas and no spaces"
    )
    with pytest.raises(InputError, match=message):
        builder.validate(config)


def test_the_check_without_data_imports_the_users_function():
    config = cli.load_config(f"{ROOT}/configs/at.py:digits_lt")
    config.train.augmentation = "autoaugment,crop_flip,test_augmentation:flipped"
    builder.check(config)
    config.train.augmentation = "test_augmentation:missing"
    with pytest.raises(InputError, match="cannot import the augmentation"):
        builder.check(config)
