"""Long-tailed subsets, samplers, pixels and checks of data sets (robal_jax.data)."""

import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from robal_jax.data import (
    PROFILES,
    SAMPLERS,
    Dataset,
    check_dataset,
    class_aware_order,
    epoch_order,
    long_tailed_counts,
    long_tailed_indices,
    to_float,
    uniform_order,
)
from robal_jax.errors import InputError

CASES = [
    (name, profile, ratio)
    for name in ("cifar10", "cifar100")
    for profile, ratio in (("exp", 0.1), ("exp", 0.02), ("exp", 0.01), ("step", 0.02))
]


def n_max_and_classes(name):
    return (5000, 10) if name == "cifar10" else (500, 100)


# ---------------------------------------------------------------- long-tailed counts and indices


def test_counts_of_the_main_setting():
    counts = long_tailed_counts(5000, 10, 0.02, "exp")
    assert counts.tolist() == [5000, 3237, 2096, 1357, 878, 568, 368, 238, 154, 100]
    assert counts.dtype == np.int64
    assert long_tailed_counts(500, 100, 0.1, "exp").sum() == 19573


def test_counts_of_the_step_profile():
    assert long_tailed_counts(50, 5, 0.1, "step").tolist() == [50, 50, 5, 5, 5]


def test_ratio_one_is_balanced():
    for profile in PROFILES:
        assert long_tailed_counts(7, 4, 1, profile).tolist() == [7] * 4


@pytest.mark.parametrize("ratio", [0, -0.1, 1.5, float("nan")])
def test_ratio_out_of_range(ratio):
    with pytest.raises(InputError, match=r"ratio .* is outside \(0, 1\]"):
        long_tailed_counts(100, 10, ratio)


def test_unknown_profile_lists_the_known():
    with pytest.raises(InputError, match="unknown long-tail profile 'linear'; use one of exp, step"):
        long_tailed_counts(100, 10, 0.1, "linear")


@pytest.mark.parametrize(("n_max", "num_classes"), [(0, 10), (10, 1)])
def test_too_small_a_set(n_max, num_classes):
    with pytest.raises(InputError, match="cannot be long-tailed; give 1 image and 2 classes, or more"):
        long_tailed_counts(n_max, num_classes, 0.1)


@pytest.mark.parametrize("n_max", [49, 50, 104, 5000])
@pytest.mark.parametrize("profile", list(PROFILES))
def test_empty_class_names_the_smallest_ratio_that_works(n_max, profile):
    with pytest.raises(InputError, match=r"leaves class \d without an image") as caught:
        long_tailed_counts(n_max, 10, 0.5 / n_max, profile)
    smallest = float(str(caught.value).rsplit(" ", 1)[1])
    assert long_tailed_counts(n_max, 10, smallest, profile).min() == 1
    with pytest.raises(InputError):
        long_tailed_counts(n_max, 10, smallest * (1 - 1e-9), profile)


def test_indices_have_the_counts_and_the_class_order():
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(4), 30))
    counts = np.array([30, 11, 4, 1])
    indices = long_tailed_indices(labels, counts)
    assert labels[indices].tolist() == np.repeat(np.arange(4), counts).tolist()
    assert len(set(indices.tolist())) == len(indices)
    assert np.array_equal(indices, long_tailed_indices(labels, counts, seed=0))
    assert not np.array_equal(indices, long_tailed_indices(labels, counts, seed=1))


def test_indices_of_a_class_that_is_too_small():
    with pytest.raises(InputError, match="class 1 has 2 images but the long-tailed set needs 3"):
        long_tailed_indices(np.array([0, 0, 0, 1, 1]), np.array([3, 3]))


@pytest.mark.parity
@pytest.mark.parametrize(("name", "profile", "ratio"), CASES)
def test_counts_match_the_released_code(golden, name, profile, ratio):
    counts = long_tailed_counts(*n_max_and_classes(name), ratio, profile)
    assert counts.tolist() == golden("longtail")[f"counts/{name}/{profile}/{ratio}"].tolist()


@pytest.mark.parity
@pytest.mark.parametrize("labels", ["synth", "real"])
@pytest.mark.parametrize(("name", "profile", "ratio"), CASES)
def test_indices_match_the_released_code(golden, name, profile, ratio, labels):
    numbers = golden("longtail")
    counts = long_tailed_counts(*n_max_and_classes(name), ratio, profile)
    indices = long_tailed_indices(numbers[f"labels/{labels}/{name}"], counts)
    assert np.array_equal(indices, numbers[f"indices/{labels}/{name}/{profile}/{ratio}"])


@pytest.mark.parity
@pytest.mark.parametrize("existing_ratio", [0.1, 0.5])
@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_counts_of_a_smaller_balanced_set_match_the_released_code(golden, name, existing_ratio):
    n_max, num_classes = n_max_and_classes(name)
    counts = long_tailed_counts(int(n_max * existing_ratio), num_classes, 1.0)
    assert counts.tolist() == golden("longtail")[f"counts_small/{name}/{existing_ratio}"].tolist()


# ---------------------------------------------------------------- sampling orders


@pytest.mark.parity
@pytest.mark.parametrize("labels", ["synth", "real"])
@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_class_aware_order_matches_the_released_sampler(golden, name, labels):
    numbers = golden("longtail")
    expected = numbers[f"sampler/{labels}/{name}/class_aware_first"]
    length = int(numbers[f"sampler/{labels}/{name}/class_aware_len"])
    full = numbers[f"labels/{labels}/{name}"]
    # The ratio of the recorded runs is the data set's main setting.
    ratio = 0.02 if name == "cifar10" else 0.1
    counts = long_tailed_counts(*n_max_and_classes(name), ratio, "exp")
    order = class_aware_order(full[long_tailed_indices(full, counts)], random.Random(0))
    assert len(order) == length
    assert np.array_equal(order[: len(expected)], expected)


def test_class_aware_order_visits_classes_and_images_in_rounds():
    labels = np.repeat(np.arange(3), [6, 2, 1])
    order = class_aware_order(labels, random.Random(5))
    assert order.dtype == np.int32
    assert len(order) == 6 * 3
    assert all(sorted(labels[order[i : i + 3]]) == [0, 1, 2] for i in range(0, 18, 3))
    drawn = order[labels[order] == 1].reshape(3, 2)
    assert np.array_equal(np.sort(drawn, axis=1), np.tile([6, 7], (3, 1)))
    assert sorted(order[labels[order] == 0].tolist()) == list(range(6))


def test_class_aware_order_needs_every_class():
    with pytest.raises(InputError, match="class 1 has no image"):
        class_aware_order(np.array([0, 2]), random.Random(0))


def test_uniform_order_is_a_fixed_permutation():
    order = uniform_order(8, seed=3, epoch=2)
    assert order.dtype == np.int32
    assert order.tolist() == [6, 5, 0, 7, 2, 1, 3, 4]
    assert sorted(uniform_order(1000, 0, 0).tolist()) == list(range(1000))


def test_mixed_order_draws_from_both_samplers_in_turn():
    labels = np.random.RandomState(0).permutation(np.repeat(np.arange(3), [41, 15, 4])).astype(np.int32)
    order = epoch_order("mixed", labels, 1, 2)
    assert order.dtype == np.int32
    assert len(order) == 2 * 60
    even, odd = order[::2], order[1::2]
    assert sorted(even.tolist()) == list(range(60))
    assert np.bincount(labels[odd]).tolist() == [20, 20, 20]  # 60 draws are 20 rounds of 3 classes
    assert np.array_equal(even, epoch_order("uniform", labels, 1, 2))
    assert np.array_equal(odd, epoch_order("class_aware", labels, 1, 2)[:60])


@pytest.mark.parametrize("sampler", list(SAMPLERS))
def test_epoch_order_depends_on_seed_and_epoch_only(sampler):
    labels = np.repeat(np.arange(3), [20, 10, 5]).astype(np.int32)
    order = epoch_order(sampler, labels, 1, 2)
    assert order.dtype == np.int32
    random.seed(99)
    np.random.seed(99)
    assert np.array_equal(order, epoch_order(sampler, labels, 1, 2))
    others = [epoch_order(sampler, labels, *se) for se in ((1, 3), (2, 2), (2, 1))]
    assert all(not np.array_equal(order, other) for other in others)
    one, other = epoch_order(sampler, labels, 1, 23), epoch_order(sampler, labels, 12, 3)
    assert not np.array_equal(one, other)


def test_unknown_sampler_lists_the_known():
    with pytest.raises(InputError, match="unknown sampler 'sqrt'; use one of uniform, class_aware, mixed"):
        epoch_order("sqrt", np.array([0, 1]), 0, 0)


# ---------------------------------------------------------------- pixels


@pytest.mark.parametrize("pixel_max", [16, 255])
@pytest.mark.parametrize("wrap", [lambda f: f, lambda f: jax.jit(f, static_argnums=1)])
def test_to_float_is_the_correctly_rounded_quotient(pixel_max, wrap):
    pixels = np.arange(pixel_max + 1, dtype=np.uint8)
    floats = wrap(to_float)(pixels, pixel_max)
    assert floats.dtype == jnp.float32
    assert np.array_equal(floats, pixels.astype(np.float32) / np.float32(pixel_max))


def test_to_float_in_double_precision():
    pixels = np.arange(256, dtype=np.uint8).reshape(2, 128)
    with jax.enable_x64(True):
        floats = to_float(pixels, 255)
    assert floats.dtype == jnp.float64
    assert np.array_equal(floats, pixels / 255)


# ---------------------------------------------------------------- check_dataset


def small_dataset(**changes):
    dataset = Dataset(
        train_images=np.zeros((5, 4, 4, 1), np.uint8),
        train_labels=np.array([0, 0, 0, 1, 2], np.int32),
        test_images=np.zeros((3, 4, 4, 1), np.uint8),
        test_labels=np.array([2, 1, 0], np.int32),
        pixel_max=16,
        class_names=("a", "b", "c"),
    )
    return dataset._replace(**changes)


def test_good_dataset_passes():
    dataset = small_dataset()
    assert check_dataset(dataset) is dataset
    assert dataset.class_counts.tolist() == [3, 1, 1]
    assert dataset.class_counts.dtype == np.int64


def test_dark_images_get_a_note():
    for brightest, notes in (8, 0), (7, 1):
        dataset = small_dataset(train_images=np.full((5, 4, 4, 1), brightest, np.uint8))
        found = check_dataset(dataset)
        assert len(found.notes) == notes
        assert (found is dataset) is (notes == 0)
    assert found.notes[0].startswith(
        "note: no training image has a pixel above 7, and pixel_max, which becomes 1, is 16"
    )


def test_train_images_may_be_larger_than_test_images():
    dataset = small_dataset(train_images=np.zeros((5, 6, 7, 1), np.uint8))
    assert check_dataset(dataset) is dataset


class Unread:
    """Images of which only the shape is known."""

    dtype = np.dtype(np.uint8)

    def __init__(self, *shape):
        self.shape = shape

    def __len__(self):
        return self.shape[0]

    def __getitem__(self, ids):
        raise AssertionError("an image was read")


def test_images_in_files_are_checked_without_reading_them():
    good = small_dataset(train_images=Unread(5, 4, 4, 1), test_images=Unread(3, 2, 2, 1))
    assert check_dataset(good) is good
    for shape in ((4, 4, 4, 1), (5, 4, 4, 3), (5, 4, 4)):
        with pytest.raises(InputError, match="train"):
            check_dataset(good._replace(train_images=Unread(*shape)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_images": np.zeros((5, 4, 4, 1), np.float32)}, "train images are float32.*; give uint8"),
        (
            {"test_images": np.zeros((3, 4, 4), np.uint8)},
            r"test images are uint8.*; give uint8 \[N, H, W, C\]",
        ),
        ({"train_labels": np.array([0, 0, 0, 1, 2], np.int64)}, r"train labels are int.*; give int32 \[5\]"),
        ({"train_labels": np.array([0, 0, 1, 2], np.int32)}, r"train labels are int.*; give int32 \[5\]"),
        ({"train_labels": np.array([0, 0, 3, 1, 2], np.int32)}, r"train set: labels 0..3 found"),
        ({"test_labels": np.array([-1, 0, 1], np.int32)}, r"test set: labels -1..1 found.* 0..2"),
        ({"train_labels": np.array([0, 0, 0, 1, 1], np.int32)}, "train set: class 2 has no image"),
        ({"test_labels": np.array([2, 2, 0], np.int32)}, "test set: class 1 has no image"),
        ({"class_names": ("ant",)}, r"the data set has 1 class \(ant\); give at least two"),
        ({"class_names": ()}, "the data set has 0 classes; give at least two"),
        (
            {"test_images": np.zeros((0, 4, 4, 1), np.uint8), "test_labels": np.zeros(0, np.int32)},
            "test set: class 0 has no image",
        ),
        (
            {"test_images": np.zeros((3, 4, 4, 3), np.uint8)},
            "train images have 1 channels and test images 3",
        ),
        (
            {"test_images": np.zeros((3, 6, 4, 1), np.uint8)},
            "train images are 4 x 4 and test images 6 x 4; enlarge train images, or cut test images",
        ),
        ({"train_images": np.full((5, 4, 4, 1), 17, np.uint8)}, "pixels up to 17, above pixel_max 16"),
        ({"train_labels": [0, 0, 0, 1, 2]}, "train labels are a list; give a NumPy array"),
        ({"test_images": [[0]]}, "test images are a list; give a NumPy array"),
    ],
)
def test_bad_dataset(changes, message):
    with pytest.raises(InputError, match=message) as caught:
        check_dataset(small_dataset(**changes))
    assert "\n" not in str(caught.value)
