"""Augmentations against torchvision and Pillow, and CutMix against the released code: see parity.py.

Images are integers: every pixel must be equal.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from parity import nchw, nhwc

from robal_jax.data import cutmix, pil, policies
from robal_jax.data.augmentation import box_mask, cutout_box, padded_crop
from robal_jax.data.cutmix import cutmix_box

pytestmark = [pytest.mark.parity, pytest.mark.usefixtures("float64")]

FILE = "followups_f64"
RANDAUGMENT, AUTOAUGMENT = "augment/randaugment_m8", "augment/autoaugment_cifar10"
SIZE = (32, 32)
SIGNS = {"plus": 1, "minus": -1}
NONE = ("AutoContrast", "Equalize", "Invert", "Identity")  # without a magnitude

apply = jax.jit(jax.vmap(pil.apply, in_axes=(0, None)))


def test_tables_of_magnitudes(reference):
    for key in [key for key in reference.load(FILE) if key.startswith("augment/tables/")]:
        _, _, policy, size, name = key.split("/")
        side, bins = int(size.removeprefix("size")), {"randaugment": 31, "autoaugment": 10}[policy]
        ours = policies.magnitudes(name, bins, (side, side))
        reference.check("augmentation: magnitudes", FILE, key, ours, 0)


@pytest.mark.slow
def test_operations_of_randaugment(reference):
    names = [str(name) for name in reference(FILE, f"{RANDAUGMENT}/names")]
    assert names == list(policies.RANDAUGMENT)
    signed = [name in policies.SIGNED for name in names]
    ours = [policies.magnitudes(name, 31, SIZE)[8] for name in names]
    reference.check("augmentation: policies", FILE, f"{RANDAUGMENT}/signed", signed, 0)
    reference.check("augmentation: policies", FILE, f"{RANDAUGMENT}/magnitudes", ours, 0)
    compare(reference, RANDAUGMENT, dict(zip(names, ours, strict=True)))


def test_operations_of_autoaugment(reference):
    names, odds, numbers = (np.array(part) for part in zip(*sum(policies.CIFAR10, ()), strict=True))
    theirs = reference(FILE, f"{AUTOAUGMENT}/names")
    assert names.reshape(25, 2).tolist() == theirs.tolist()
    numbers = np.where(np.isin(names, NONE), -1, numbers)
    reference.check(
        "augmentation: policies", FILE, f"{AUTOAUGMENT}/probabilities", odds.reshape(25, 2).astype(float), 0
    )
    reference.check(
        "augmentation: policies", FILE, f"{AUTOAUGMENT}/magnitude_index", numbers.reshape(25, 2), 0
    )
    stored = [str(name) for name in reference(FILE, f"{AUTOAUGMENT}/op_names")]
    choices = {(name, number) for pair in policies.CIFAR10 for name, _, number in pair}
    assert sorted(stored) == sorted(name if name in NONE else f"{name}_{number}" for name, number in choices)
    ours = []
    for text in stored:
        name, _, number = text.partition("_")
        ours.append(policies.magnitudes(name, 10, SIZE)[int(number or 0)])
    reference.check("augmentation: policies", FILE, f"{AUTOAUGMENT}/op_magnitudes", ours, 0)
    compare(reference, AUTOAUGMENT, dict(zip(stored, ours, strict=True)))


def compare(reference, group, magnitudes):
    """Every stored result of these operations, of both images."""
    images = reference(FILE, "augment/images")
    for text, magnitude in magnitudes.items():
        for end, sign in SIGNS.items():
            key = f"{group}/{text}/{end}"
            if key in reference.load(FILE):
                operation = pil.operation(text.partition("_")[0], sign * magnitude, SIZE)
                reference.check("augmentation: operations", FILE, key, apply(images, operation), 0)
    assert_all_seen(reference, f"{group}/")


@pytest.mark.parametrize("policy", ["randaugment", "autoaugment"])
@pytest.mark.parametrize("i", range(12))
def test_whole_calls(reference, policy, i):
    """What was drawn is given: operations and signed magnitudes, '' for none."""
    key, image = f"augment/sample_{policy}/{i}", reference(FILE, "augment/images")[:1]
    drawn = zip(*(reference(FILE, f"{key}/{part}") for part in ("ops", "magnitudes")), strict=True)
    for name, magnitude in drawn:
        image = apply(image, pil.operation(str(name) or "Identity", float(magnitude), SIZE))
    reference.check("augmentation: whole calls", FILE, f"{key}/out", image[0], 0)
    assert_all_seen(reference, f"{key}/")


def test_crop_and_flip(reference):
    image = reference(FILE, "augment/images")[0]
    for i in range(4):
        corner = jnp.asarray(reference(FILE, f"augment/crop/{i}/top_left"))
        reference.check(
            "augmentation: crop, flip", FILE, f"augment/crop/{i}/out", padded_crop(image, corner), 0
        )
    reference.check("augmentation: crop, flip", FILE, "augment/flip", image[:, ::-1], 0)
    assert_all_seen(reference, "augment/crop/")


@pytest.mark.parametrize("side", [8, 16, 18])
def test_cutout(reference, recipe, side):
    centres = reference(FILE, f"cutout/length{side}/centre_y_x")
    boxes = [cutout_box(jnp.asarray(centre), side) for centre in centres]
    images = nhwc(recipe.images(8100, 8)[:4])
    masks = jnp.stack([box_mask(box, SIZE) for box in boxes])
    kept = (jnp.where(masks[..., None], 0, images) != 0).any(-1)
    reference.check("augmentation: Cutout", FILE, f"cutout/length{side}/kept_or_black", kept, 0)


@pytest.mark.parametrize("i", range(3))
def test_cutmix(reference, recipe, i):
    check = functools.partial(reference.check, "augmentation: CutMix", FILE)
    share, centre, partners = (
        jnp.asarray(reference(FILE, f"dm_cutmix/step{i}/{part}"))
        for part in ("lambda_drawn", "centre_row_col", "permutation")
    )
    box = cutmix_box(share, centre, SIZE)
    check(f"dm_cutmix/step{i}/box_top_left_height_width", box, 0)
    images = nhwc(np.concatenate([recipe.images(8100 + i, 8)[:3], recipe.images(8110 + i, 8)[:5]]))
    mixed, share = jax.jit(cutmix)(images, box, partners)
    check(f"dm_cutmix/step{i}/mixed_images_checksum", recipe.checksum(nchw(mixed)), 1e-15)
    labels = np.concatenate([reference(FILE, f"input/steps/y{i}")[:3], recipe.ints(8148 + i, 10, (5,))])
    own, partner = np.eye(10)[labels], np.eye(10)[labels[partners]]
    check(f"dm_cutmix/step{i}/mixed_labels", share * own + (1 - share) * partner, 1e-15)


def assert_all_seen(reference, prefix):
    """No array of these names is forgotten."""
    seen = reference.files[FILE]["compared"] | reference.files[FILE]["input"]
    assert not {key for key in reference.load(FILE) if key.startswith(prefix)} - seen


def test_no_group_is_forgotten(reference):
    parts = [key.split("/") for key in reference.load(FILE)]
    assert {path[1] for path in parts if path[0] == "augment"} == {
        "images", "versions", "tables", "randaugment_m8", "autoaugment_cifar10", "sample_randaugment",
        "sample_autoaugment", "crop", "flip",
    }  # fmt: skip
    assert {path[2] for path in parts if path[1].startswith("sample_")} == {str(i) for i in range(12)}
    assert {path[1] for path in parts if path[0] == "cutout"} == {"length8", "length16", "length18"}
