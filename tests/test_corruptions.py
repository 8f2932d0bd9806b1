"""The 15 common corruptions: what each does, at every strength, to one image and to many."""

import colorsys
import io

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage
from sklearn import datasets

from robal_jax.data.corruptions import CORRUPTIONS, STRENGTHS, corrupt

# By their published constants: glass_blur has a second round from strength 4 on, motion_blur one sigma at 3
# and 4, frost keeps less of the image, and elastic_transform moves pixels less far, but each by itself.
NOT_STEADY = ("glass_blur", "motion_blur", "frost", "elastic_transform")
NOT_RANDOM = ("defocus_blur", "zoom_blur", "brightness", "contrast", "pixelate", "jpeg_compression")
GRAY = datasets.load_digits().images[:6, ..., None] / 16
SMOOTH = ndimage.gaussian_filter(np.random.RandomState(0).uniform(size=(6, 32, 32, 3)), (0, 2, 2, 0))
COLOUR = np.round(255 * (SMOOTH - SMOOTH.min()) / np.ptp(SMOOTH)) / 255


def pixels(images):
    return np.round(255 * images).astype(int)


@pytest.mark.parametrize("images", [GRAY, COLOUR[:, :20]], ids=["8x8x1", "20x32x3"])
@pytest.mark.parametrize("name", CORRUPTIONS)
def test_an_image_alone_is_corrupted_as_in_a_batch(name, images):
    found = corrupt(images, name, 5, seed=3)
    assert found.shape == images.shape
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, (pixels(found) / 255).astype(np.float32))
    assert 0 <= found.min() < found.max() <= 1
    np.testing.assert_array_equal(corrupt(images[4:], name, 5, seed=3, ids=[4, 5]), found[4:])
    if name not in NOT_RANDOM:
        assert (corrupt(images[:1], name, 5, seed=4) != found[:1]).any()
        assert (corrupt(images[:1], name, 5, seed=3, ids=[9]) != found[:1]).any()


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_change_grows_with_the_strength(name):
    change = [np.abs(corrupt(COLOUR, name, strength) - COLOUR).mean() for strength in STRENGTHS]
    assert change[0] > 0
    if name not in NOT_STEADY:
        assert (np.diff(change) > 0).all()
    elif name != "elastic_transform":
        assert change[4] > change[0]


@pytest.mark.parametrize(
    "name",
    ["defocus_blur", "glass_blur", "motion_blur", "zoom_blur", "contrast", "elastic_transform", "pixelate"],
)
def test_what_has_no_detail_stays(name):
    plain = np.full((2, 8, 8, 3), 100 / 255)
    assert set(np.unique(pixels(corrupt(plain, name, 5)))) <= {99, 100}  # rounding may cut down


def test_noise_has_its_scale():
    """Five standard errors of the estimates from n numbers."""
    gray = np.full((4, 32, 32, 3), 0.5)
    n = gray.size
    noise = corrupt(gray, "gaussian_noise", 5) - gray
    assert abs(noise.std() - 0.10) < 5 * 0.10 / np.sqrt(2 * n) + 1 / 255
    shot = corrupt(gray, "shot_noise", 5) - gray
    assert abs(shot.std() - np.sqrt(0.5 / 50)) < 5 * 0.1 / np.sqrt(2 * n) + 1 / 255
    impulses = corrupt(gray, "impulse_noise", 5)
    for value in (0, 1):
        assert abs(np.mean(impulses == value) - 0.035) < 5 * np.sqrt(0.035 / n)


def test_brightness_is_that_of_hsv():
    found = pixels(corrupt(COLOUR[:1], "brightness", 4))
    for pixel, brighter in zip(COLOUR[0].reshape(-1, 3)[:50], found.reshape(-1, 3), strict=False):
        hue, saturation, value = colorsys.rgb_to_hsv(*pixel)
        wanted = 255 * np.array(colorsys.hsv_to_rgb(hue, saturation, min(value + 0.2, 1)))
        assert np.abs(np.floor(wanted) - brighter).max() <= 1  # of whole numbers either may be cut down
    black = corrupt(np.zeros((1, 4, 4, 3)), "brightness", 1)
    assert np.unique(pixels(black)).tolist() == [12]  # 0.05 of 255


def test_motion_blur_draws_a_line_from_each_point():
    """A point becomes a line to the left, of falling weights, up to 45 degrees, and no light is lost."""
    point = np.zeros((8, 33, 33, 1))
    point[:, 16, 16] = 1
    found = pixels(corrupt(point, "motion_blur", 3))[..., 0]
    weights = np.exp(-(np.arange(13) ** 2) / 8)
    np.testing.assert_array_equal(found[:, 16, 16], round(255 * weights[0] / weights.sum()))
    np.testing.assert_allclose(found.sum((1, 2)), 255, atol=13 / 2)  # each weight is rounded
    assert not found[:, :, 17:].any()
    _, rows, columns = np.nonzero(found)
    assert (abs(rows - 16) <= 16 - columns + 1).all()
    assert len(np.unique(rows)) > 5


def test_zoom_is_scipys():
    wanted = COLOUR.copy()
    for factor in np.arange(1, 1.26, 0.01):
        part = int(np.ceil(32 / factor))
        top = (32 - part) // 2
        middle = COLOUR[:, top : top + part, top : top + part]
        large = np.stack([ndimage.zoom(image, (factor, factor, 1), order=1) for image in middle])
        first = (large.shape[1] - 32) // 2
        wanted += large[:, first : first + 32, first : first + 32]
    found = corrupt(COLOUR, "zoom_blur", 5)
    assert np.abs(found - wanted / 27).max() <= 1 / 255 + 2**-23


def test_glass_blur_moves_pixels_by_one():
    """Without a blur, at strength 1, each pixel is one of its four neighbours above and left, or itself."""
    found, image = pixels(corrupt(COLOUR[:1], "glass_blur", 1))[0], pixels(COLOUR[0])
    sources = [image[2 - i : 32 - i, 2 - j : 32 - j] for i in (0, 1) for j in (0, 1)]
    same = np.stack([(found[2:, 2:] == source).all(-1) for source in sources])
    assert same.any(0).all()
    assert (same.mean((1, 2)) > 0.2).all()  # each about a quarter
    np.testing.assert_array_equal(found[:2], image[:2])
    np.testing.assert_array_equal(found[:, :2], image[:, :2])


def test_fog_is_the_diamond_square_algorithm():
    """On a black image with one white pixel fog is ``share clouds / (1 + share)``."""
    draw = np.random.RandomState(
        np.random.Philox(np.random.SeedSequence([0, list(CORRUPTIONS).index("fog"), 7]))
    )
    clouds, step, noise = {(0, 0): 0.0}, 8, 100.0
    while step > 1:
        half = step // 2
        for rows, columns, diagonal in ((half, half, True), (0, half, False), (half, 0, False)):
            more = noise * draw.uniform(-noise, noise, size=(8 // step, 8 // step))
            ways = [(1, 1), (1, -1), (-1, 1), (-1, -1)] if diagonal else [(1, 0), (-1, 0), (0, 1), (0, -1)]
            for i, row in enumerate(range(rows, 8, step)):
                for j, column in enumerate(range(columns, 8, step)):
                    around = [clouds[(row + half * a) % 8, (column + half * b) % 8] for a, b in ways]
                    clouds[row, column] = np.mean(around) + more[i, j]
        step, noise = half, noise / 1.75
    wanted = np.array([[clouds[row, column] for column in range(8)] for row in range(8)])
    wanted = (wanted - wanted.min()) / np.ptp(wanted) * 1.5 / 2.5
    black = np.zeros((1, 8, 8, 1))
    black[0, 0, 0] = 1
    found = corrupt(black, "fog", 5, ids=[7])[0, ..., 0]
    assert np.abs(found - wanted)[1:].max() <= 1 / 255 + 2**-23


@pytest.mark.parametrize("images", [GRAY, COLOUR[:, :20]], ids=["8x8x1", "20x32x3"])
def test_pixelate_and_jpeg_are_pillows(images):
    height, width = images.shape[1:3]
    picture = Image.fromarray(pixels(images[0]).astype(np.uint8).squeeze())
    for strength, part, quality in ((1, 0.95, 80), (5, 0.65, 40)):
        file = io.BytesIO()
        picture.save(file, "JPEG", quality=quality)
        small = picture.resize((int(part * width), int(part * height)), Image.Resampling.BOX)
        wanted = {
            "jpeg_compression": Image.open(file),
            "pixelate": small.resize(picture.size, Image.Resampling.BOX),
        }
        for name, other in wanted.items():
            found = pixels(corrupt(images[:1], name, strength))[0]
            np.testing.assert_array_equal(found, np.asarray(other).reshape(found.shape))


def test_snow_falls_on_black_as_it_does_turned_around():
    """``(1 - kept) / 2`` where no flake is; the flakes lie as those of the image turned by 180 degrees."""
    snow = pixels(corrupt(np.zeros((4, 32, 32, 3)), "snow", 3))
    np.testing.assert_array_equal(snow, snow[:, ::-1, ::-1])
    np.testing.assert_array_equal(snow[..., 0], snow[..., 2])
    assert snow.min() == 12  # 0.1 / 2 of 255
    assert 0.1 < np.mean(snow > 25) < 0.9


def test_frost_is_bluish_and_keeps_the_image():
    """``kept x + share frost`` with frost in [0.15, 1], whose needles reach 1."""
    black, gray = np.zeros((4, 32, 32, 3)), np.full((4, 32, 32, 3), 51 / 255)
    frost, over = (pixels(corrupt(images, "frost", 5)) for images in (black, gray))
    assert np.abs(over - frost - 0.75 * 51).max() <= 1
    assert 0.15 * 0.45 * 255 - 1 <= frost[..., 2].min() < frost[..., 2].max() <= 0.45 * 255
    assert frost[..., 2].max() > 0.9 * 0.45 * 255
    assert np.abs(frost[..., 0] - 0.85 * frost[..., 2]).max() <= 1


def test_elastic_transform_is_affine_at_strength_1_and_not_at_5():
    """A ramp stays one, in the part whose sources all lie in the image; shifts are 0.08 of a side at most."""
    ramp = np.broadcast_to((np.arange(64) / 64)[:, None, None], (6, 64, 64, 1))
    rows, columns = np.mgrid[24:40, 24:40].reshape(2, -1)
    planes = np.stack([rows, columns, np.ones(256)], axis=1)
    bent = []
    for strength in (1, 5):
        part = corrupt(ramp, "elastic_transform", strength)[:, 24:40, 24:40].reshape(6, -1).T
        slopes, residuals = np.linalg.lstsq(planes, part)[:2]
        bent.append(np.sqrt(residuals / 256))
        assert np.abs(64 * slopes[0] - 1).max() > 0.01
    assert (bent[0] < 1 / 255).all()
    assert (bent[1] > 1 / 255).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((COLOUR, "rain", 1), "unknown corruption 'rain'; use one of gaussian_noise, .*"),
        ((COLOUR, "fog", 6), "strength is 6; use one of 1 to 5"),
        ((COLOUR[..., :2], "fog", 1), "images are 32 x 32 x 2; corruptions need 1 or 3 channels"),
        ((COLOUR[:, :3], "fog", 1), "images are 3 x 32 x 3; .* and 4 x 4 pixels"),
        ((2 * COLOUR, "fog", 1), r"images have pixels in \[0, 2\]; pass floats in \[0, 1\]"),
        ((COLOUR, "fog", 1, 0, [1]), r"ids have shape \[1\]; they must be \[6\], one per image"),
    ],
)
def test_what_cannot_be_corrupted(arguments, message):
    with pytest.raises(ValueError, match=message):
        corrupt(*arguments)
