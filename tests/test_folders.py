"""Images in files: reading them, folders and lists as data sets, reading ahead (robal_jax.folders)."""

import functools
import gc
import pickle
import shutil
import struct
import threading
import time
import zlib

import helpers
import numpy as np
import pytest
from PIL import Image

from robal_jax.data import (
    image_folder,
    inspection,
    long_tailed_counts,
    long_tailed_indices,
    sources,
    uniform_order,
)
from robal_jax.errors import InputError

CLASSES = {"ant": (9, 3), "bee": (7, 2), "cat": (8, 2)}  # train and test images of each


def pixels(seed, height=10, width=12, channels=(3,)):
    return np.random.default_rng(seed).integers(0, 256, (height, width, *channels), dtype=np.uint8)


def write(path, array, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, **options)


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A data set of PNG files, each of other pixels."""
    root = tmp_path_factory.mktemp("images")
    seed = 0
    for name, counts in CLASSES.items():
        for split, count in zip(("train", "val"), counts, strict=True):
            for i in range(count):
                write(root / split / name / f"{i:02d}.png", pixels(seed))
                seed += 1
    return root


@pytest.fixture
def root(original, tmp_path):
    """A copy that a test may spoil."""
    return shutil.copytree(original, tmp_path / "images")


load = functools.partial(image_folder.load_image_folder, image_size=8, resize=10)


def files(root, split, name):
    return sorted((root / split / name).iterdir())


def plain(path, size):
    """What is to be read of a file whose shorter side, 10, needs no resizing: its centre."""
    image = np.asarray(Image.open(path))
    top, left = ((side - size) // 2 for side in image.shape[:2])
    return image[top : top + size, left : left + size]


def write_list(root, name, lines):
    (root / name).write_text("\n".join(lines) + "\n")
    return name


def lines_of(root, split):
    return [
        f"{split}/{name}/{file.name} {label}"
        for label, name in enumerate(CLASSES)
        for file in files(root, split, name)
    ]


def refused(message, root, **arguments):
    helpers.refused(message, load, str(root), **arguments)


# ---------------------------------------------------------------- ImageFiles


def test_png_files_are_read_exactly(tmp_path):
    colour, grey = pixels(0, 10, 10), pixels(1, 10, 10, ())
    write(tmp_path / "colour.png", colour)
    write(tmp_path / "grey.png", grey)
    write(tmp_path / "alpha.png", np.dstack([colour, grey]))
    write(tmp_path / "colour.bmp", colour)
    write(tmp_path / "colour.webp", colour, lossless=True)
    Image.fromarray(grey, "L").convert("P").save(tmp_path / "palette.png", transparency=bytes(range(256)))
    names = ("colour.png", "grey.png", "alpha.png", "colour.bmp", "colour.webp", "palette.png")
    images = image_folder.ImageFiles(names, 10, 10, str(tmp_path))
    stacked = np.repeat(grey[..., None], 3, axis=-1)
    assert np.array_equal(images[np.arange(6)], np.stack([colour, stacked, colour, colour, colour, stacked]))


def test_ids_of_any_shape(tmp_path):
    arrays = np.stack([pixels(i, 6, 6) for i in range(4)])
    for i, array in enumerate(arrays):
        write(tmp_path / f"{i}.png", array)
    images = image_folder.ImageFiles(tuple(f"{i}.png" for i in range(4)), 6, 6, str(tmp_path))
    assert (images.shape, images.dtype, len(images)) == (arrays.shape, arrays.dtype, 4)
    for ids in (2, np.int32(3), [1, 0, 0], np.array([[3], [1]]), np.zeros((0, 2), int), slice(1, 3), -1):
        found = images[ids]
        assert found.dtype == np.uint8
        assert np.array_equal(found, arrays[ids]), ids
    assert pickle.loads(pickle.dumps(images)) == images
    assert np.array_equal(pickle.loads(pickle.dumps(images))[:], arrays)
    with pytest.raises(IndexError):
        images[4]


@pytest.mark.parametrize(("height", "width"), [(40, 30), (30, 41), (12, 20), (17, 17)])
def test_the_shorter_side_is_resized_and_the_centre_cut_out(tmp_path, height, width):
    write(tmp_path / "one.jpg", pixels(0, height, width), quality=90)
    decoded = Image.open(tmp_path / "one.jpg")
    shorter = min(height, width)
    resized = decoded.resize((width * 20 // shorter, height * 20 // shorter), Image.Resampling.BILINEAR)
    top, left = (resized.height - 15) // 2, (resized.width - 15) // 2
    expected = np.asarray(resized)[top : top + 15, left : left + 15]
    images = image_folder.ImageFiles((str(tmp_path / "one.jpg"),), resize=20, size=15)
    assert np.array_equal(images[0], expected)


def test_an_image_of_the_right_size_is_not_resized(tmp_path, monkeypatch):
    write(tmp_path / "one.png", pixels(0, 9, 7))
    monkeypatch.setattr(Image.Image, "resize", None)
    images = image_folder.ImageFiles((str(tmp_path / "one.png"),), resize=7, size=4)
    assert np.array_equal(images[0], pixels(0, 9, 7)[2:6, 1:5])


def damage(content):
    return content[: len(content) // 2]


@pytest.mark.parametrize("spoil", [damage, lambda _: b"", lambda _: b"no image", None])
@pytest.mark.parametrize("name", ["one.png", "one.jpg"])
def test_a_missing_or_damaged_file_is_named(tmp_path, spoil, name):
    write(tmp_path / "good.png", pixels(0, 64, 64))
    write(tmp_path / name, pixels(1, 64, 64))
    if spoil:
        (tmp_path / name).write_bytes(spoil((tmp_path / name).read_bytes()))
    else:
        (tmp_path / name).unlink()
    images = image_folder.ImageFiles(("good.png", name), 64, 64, str(tmp_path))
    assert images[0].shape == (64, 64, 3)
    with pytest.raises(InputError, match=rf"cannot read image .*/{name} \(\w+.*\); repair it") as caught:
        images[np.array([0, 1])]
    assert "\n" not in str(caught.value)


def test_sixteen_bits_a_channel_are_refused_in_colour_too(tmp_path):
    """A PNG of one red pixel, written by hand: Pillow cannot."""
    chunks = {
        b"IHDR": struct.pack(">IIBBBBB", 1, 1, 16, 2, 0, 0, 0),
        b"IDAT": zlib.compress(b"\0" + struct.pack(">HHH", 65535, 257, 0)),
        b"IEND": b"",
    }
    parts = [
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks.items()
    ]
    (tmp_path / "deep.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))
    with pytest.raises(InputError, match=r"deep\.png .*more than 8 bits per channel"):
        image_folder.ImageFiles((str(tmp_path / "deep.png"),), 1, 1)[0]


def test_sixteen_bits_a_channel_are_refused_rather_than_clipped(tmp_path):
    write(tmp_path / "deep.png", pixels(0, 8, 8, ()).astype(np.uint16) * 257)
    with pytest.raises(InputError, match=r"deep\.png .*more than 8 bits per channel"):
        image_folder.ImageFiles((str(tmp_path / "deep.png"),), 8, 8)[0]


@pytest.mark.parametrize("size", [0, 9])
def test_crop_that_does_not_fit(size):
    with pytest.raises(ValueError, match=r"give a value in 1\.\.resize \(8\)"):
        image_folder.ImageFiles((), 8, size)


def test_identity_stands_for_the_files_and_not_for_their_place(root, tmp_path):
    def identity(root):
        return load(str(root)).train_images.identity().tobytes()

    before = identity(root)
    moved = shutil.copytree(root, tmp_path / "elsewhere")
    assert identity(moved) == before
    images = load(str(root)).train_images
    others = [
        image_folder.ImageFiles(images.paths, 12, 10, images.root),
        image_folder.ImageFiles(images.paths, 10, 9, images.root),
    ]
    others += [
        image_folder.ImageFiles(images.paths[::-1], 10, 10, images.root),
        image_folder.ImageFiles(images.paths, 11, 10, images.root),
    ]
    assert len({before, *(other.identity().tobytes() for other in others)}) == 5
    with (root / "train" / "bee" / "03.png").open("ab") as file:
        file.write(b"\0")
    assert identity(root) != before
    (moved / "train" / "bee" / "03.png").rename(moved / "train" / "bee" / "3.png")
    assert identity(moved) != before
    (root / "train" / "bee" / "03.png").unlink()
    with pytest.raises(InputError, match=r"cannot read image .*bee/03\.png"):
        images.identity()


# ---------------------------------------------------------------- folders


def test_folders_are_the_data_set(original):
    dataset = load(str(original))
    assert dataset.class_names == ("ant", "bee", "cat")
    assert dataset.class_counts.tolist() == [9, 7, 8]
    assert dataset.train_labels.tolist() == [0] * 9 + [1] * 7 + [2] * 8
    assert np.bincount(dataset.test_labels).tolist() == [3, 2, 2]
    assert dataset.train_images.shape == (24, 10, 10, 3)
    assert dataset.test_images.shape == (7, 8, 8, 3)
    assert dataset.pixel_max == 255
    train = [plain(file, 10) for name in CLASSES for file in files(original, "train", name)]
    test = [plain(file, 8) for name in CLASSES for file in files(original, "val", name)]
    assert np.array_equal(dataset.train_images[:], np.stack(train))
    assert np.array_equal(dataset.test_images[:], np.stack(test))


def test_folders_may_have_other_names_and_folders_in_them(original, root):
    expected = load(str(original))
    (root / "val").rename(root / "held out")
    (root / "train" / "bee").rename(root / "train" / "images")
    (root / "train" / "bee").mkdir()
    (root / "train" / "images").rename(root / "train" / "bee" / "images")
    (root / "train" / "bee" / "boxes.txt").write_text("not an image")
    # What a file is, its content tells; its name, whether it is read at all.
    for file, suffix in zip(
        files(root, "train", "ant"), [".PNG", ".jpg", ".JPEG", ".bmp", ".WebP"], strict=False
    ):
        file.rename(file.with_suffix(suffix))
    found = load(str(root), test="held out")
    assert np.array_equal(found.train_images[:], expected.train_images[:])
    assert np.array_equal(found.train_labels, expected.train_labels)
    assert np.array_equal(found.test_images[:], expected.test_images[:])
    assert found.class_names == expected.class_names
    elsewhere = load(str(root / "train"), train=str(root / "train"), test=str(root / "held out"))
    assert np.array_equal(elsewhere.train_images[:], expected.train_images[:])
    assert np.array_equal(elsewhere.test_images[:], expected.test_images[:])


def test_long_tailed_subset(original):
    whole = load(str(original))
    counts = long_tailed_counts(7, 3, 0.3)
    assert counts.tolist() == [7, 3, 2]
    for seed in (0, 1):
        subset = load(str(original), ratio=0.3, seed=seed)
        kept = long_tailed_indices(whole.train_labels, counts, seed)
        assert subset.class_counts.tolist() == counts.tolist()
        assert np.array_equal(subset.train_labels, whole.train_labels[kept])
        assert np.array_equal(subset.train_images[:], whole.train_images[kept])
        assert subset.test_images == whole.test_images
    assert load(str(original), ratio=0.3, profile="step").class_counts.tolist() == [7, 2, 2]
    assert load(str(original), n_max=5).class_counts.tolist() == [5, 5, 5]


# ---------------------------------------------------------------- what is no data, and what is said of data

HIDDEN = (
    ".DS_Store", "._00.png", ".hidden.png", "Thumbs.db", "desktop.ini",
    ".ipynb_checkpoints/00-checkpoint.png",
    "@eaDir/00.png", "__MACOSX/ant/._00.png", ".git/x.png", "$RECYCLE.BIN/x.png", "sub/.cache/x.png",
)  # fmt: skip


@pytest.mark.parametrize("place", ["train/ant", "train", "val/bee", "val"])
def test_hidden_files_and_folders_are_no_data(root, place):
    expected = load(str(root))
    for name in HIDDEN:
        inside = "cat" if name.startswith("sub/") and place in ("train", "val") else ""
        file = root / place / inside / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"\0\5\26\7\0\2\0\0Mac OS X")
    found = load(str(root))
    assert found.class_names == expected.class_names
    assert found.train_images == expected.train_images
    assert found.test_images == expected.test_images


def test_an_empty_hidden_class_folder_is_no_class(root):
    for name in (".ipynb_checkpoints", "@eaDir", "__MACOSX", "lost+found"):
        (root / "train" / name).mkdir()
    assert load(str(root)).class_names == tuple(CLASSES)


def test_links_are_followed_but_not_in_circles(root, tmp_path):
    expected = load(str(root))
    images = expected.train_images[:]
    shutil.move(root / "train" / "ant", tmp_path / "elsewhere")
    (root / "train" / "ant").symlink_to(tmp_path / "elsewhere")  # a class
    (root / "train" / "bee" / "more").mkdir()
    shutil.move(root / "train" / "bee" / "06.png", tmp_path / "06.png")
    (root / "train" / "bee" / "06.png").symlink_to(tmp_path / "06.png")  # a file
    shutil.move(root / "train" / "cat", tmp_path / "cats")
    (root / "train" / "cat").mkdir()
    (root / "train" / "cat" / "deep").symlink_to(tmp_path / "cats")  # a folder of a class
    (tmp_path / "cats" / "again").symlink_to(root / "train" / "cat")  # a circle
    found = load(str(root))
    assert np.array_equal(found.train_images[:], images)
    assert np.array_equal(found.train_labels, expected.train_labels)


def test_a_link_to_nothing(root):
    (root / "train" / "ant" / "10.png").symlink_to(root / "gone.png")
    refused(r"cannot read image .*/ant/10\.png \(FileNotFoundError", root)


def jpeg(root, **options):
    write(root / "x.jpg", pixels(0, 40, 40), **options)
    return (root / "x.jpg").read_bytes()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jpg", lambda root: jpeg(root)[:-1]),
        ("a.jpg", lambda root: jpeg(root)[: len(jpeg(root)) // 2]),
        ("a.jpeg", lambda root: b"<!DOCTYPE html>"),
        ("a.PNG", lambda root: b""),
        ("a.png", lambda root: (root / "train/ant/00.png").read_bytes()[:-30]),
        ("a.webp", lambda root: b"RIFF\x10\0\0\0WEBPVP8 "),
        ("a.bmp", lambda root: b"BM" + bytes(60)),
        ("a.jpg", lambda root: b"GIF89a" + bytes(60)),
    ],
)
@pytest.mark.parametrize("split", ["train", "val"])
def test_a_file_that_is_no_whole_image_is_named_before_the_first_step(root, name, content, split):
    good = {file: file.read_bytes() for file in (root / split).rglob("*.png")}
    (root / split / "bee" / name).write_bytes(content(root))
    refused(rf"^cannot read image .*/{split}/bee/{name} \(.*\); repair it, or remove it from the data$", root)
    for file in list(good)[:3]:
        file.write_bytes(b"no image")
    refused(r"^4 of \d+ images cannot be read, the first: cannot read image .*; repair it", root)


def test_unusual_but_whole_images_are_data(root):
    grey = pixels(1, 10, 10, ())
    for i, (mode, suffix, options) in enumerate(
        [("CMYK", "jpg", {}), ("L", "jpeg", {}), ("LA", "png", {}), ("P", "png", {}), ("1", "bmp", {}),
         ("RGBA", "webp", {}), ("P", "bmp", {}), ("RGB", "jpg", {"progressive": True})]
    ):  # fmt: skip
        Image.fromarray(grey).convert(mode).save(root / "train" / "ant" / f"9{i}.{suffix}", **options)
    with (root / "train" / "ant" / "97.jpg").open("ab") as file:
        file.write(b"something after the end")
    found = load(str(root))
    assert found.class_counts.tolist() == [17, 7, 8]
    for image in found.train_images[np.arange(9, 17)][[0, 1, 2, 3, 5, 6, 7]]:
        assert np.abs(image.astype(int) - grey[..., None]).mean() < 60


def test_sixteen_bits_are_refused_before_the_first_step(root):
    write(root / "train" / "cat" / "deep.png", pixels(0, 10, 10, ()).astype(np.uint16) * 257)
    refused(r"cannot read image .*deep\.png .*more than 8 bits per channel", root)


def test_a_list_may_not_name_what_is_no_image(root):
    (root / "train" / "ant" / "._x.png").write_bytes(b"Mac OS X")
    lines = [*lines_of(root, "train"), "train/ant/._x.png 0"]
    refused(
        r"cannot read image .*\._x\.png", root, train_list=write_list(root, "train.txt", dict.fromkeys(lines))
    )


def test_images_per_class_are_said(root):
    (root / "train" / "ant" / "boxes.txt").write_text("")
    (root / "train" / "scan.tif").write_bytes(b"")
    found = load(str(root))
    assert found.notes == found.test_set.notes == (
        "train set: 24 images of 3 classes (ant: 9, bee: 7, cat: 8); 2 other files left out, such as "
        "train/scan.tif",
        "test set: 7 images of 3 classes (ant: 3, bee: 2, cat: 2)",
    )  # fmt: skip
    assert load(str(root), ratio=0.3).notes[1] == (
        "cut to ratio 0.3: 12 images of 3 classes (ant: 7, bee: 3, cat: 2)"
    )


def test_of_many_classes_the_largest_and_the_smallest_are_said():
    labels = np.repeat(np.arange(100), np.arange(100, 0, -1))
    text = inspection.per_class(labels, [f"n{i}" for i in range(100)])
    assert text.startswith("5050 images of 100 classes (n0: 100, n1: 99, ")
    assert text.endswith(", ..., n94: 6, n95: 5, n96: 4, n97: 3, n98: 2, n99: 1)")


@pytest.mark.parametrize("profile", ["exp", "step"])
def test_a_long_tailed_folder_is_not_cut_again_without_a_word(root, profile):
    for i in range(4):
        (root / "train" / "cat" / f"0{i}.png").unlink()
    message = r"long-tailed already, with 9 to 4 images per class; set config\.data\.ratio=1 .* n_max=4 in"
    refused(message, root, ratio=0.5, profile=profile)
    assert load(str(root)).class_counts.tolist() == [9, 7, 4]
    assert load(str(root), ratio=0.5, profile=profile, n_max=4).class_counts[[0, 2]].tolist() == [4, 2]
    refused("class 2 has 4 images but the long-tailed set needs 6", root, ratio=0.7, n_max=9)


def test_images_of_both_sets_are_noticed(root):
    assert inspection.notes(load(str(root))) == load(str(root)).notes
    shutil.copy(root / "train" / "cat" / "03.png", root / "val" / "bee" / "again.PNG")
    (root / "val" / "ant" / "link.png").symlink_to(root / "train" / "ant" / "00.png")
    expected = (
        "warning: 2 of 9 test images are in the training set too, such as val/ant/link.png "
        "(train/ant/00.png); what a model does with them says nothing about new images"
    )
    assert inspection.notes(load(str(root))) == (*load(str(root)).notes, expected)
    content = bytearray((root / "val" / "bee" / "again.PNG").read_bytes())
    content[len(content) // 2] ^= 1
    (root / "val" / "bee" / "again.PNG").write_bytes(content)  # another image with the same ends
    assert inspection.notes(load(str(root), test="val"))[-1].startswith("warning: 1 of 9 test images")
    assert inspection.notes(load(str(root), test="train"))[-1].startswith("warning: 24 of 24 test images")


def test_images_of_both_sets_are_noticed_in_memory():
    digits = sources.load_digits_lt()
    assert inspection.notes(digits) == ()
    test = digits.test_images.copy()
    test[[3, 5]] = digits.train_images[[8, 8]]
    (line,) = inspection.notes(digits._replace(test_images=test))
    assert line.startswith(
        "warning: 2 of 700 test images are in the training set too, such as test image 3 (training image 8);"
    )


def test_source_of_that_name():
    assert sources.SOURCES["image_folder"] is image_folder.load_image_folder


def test_no_path():
    with pytest.raises(InputError, match=r"no folder of images given; set config\.data\.path"):
        image_folder.load_image_folder("")


@pytest.mark.parametrize(
    ("spoil", "arguments", "message"),
    [
        (
            lambda root: None,
            {"train": "training"},
            "no folder .*/training, only train, val; make it, with one sub-folder",
        ),
        (lambda root: shutil.rmtree(root / "val"), {}, "no folder .*/val, only train; make it"),
        (shutil.rmtree, {}, "no folder .*/train; make it"),
        (lambda root: None, {"test": "val/ant"}, "/val/ant has no sub-folder; give it one sub-folder"),
        (
            lambda root: (root / "train" / "dog").mkdir(),
            {},
            r"no image in .*/train/dog; give at least .*\.webp",
        ),
        (
            lambda root: [file.rename(file.with_suffix(".txt")) for file in files(root, "val", "bee")],
            {},
            r"no image in .*/val/bee, only \d \.txt; give at least one per class",
        ),
        (
            lambda root: (root / "val" / "bee").rename(root / "val" / "wasp"),
            {},
            "have different classes: 2 occur in one only, such as 'bee'",
        ),
        (
            lambda root: [
                shutil.rmtree(root / split / name) for split in ("train", "val") for name in ("bee", "cat")
            ],
            {},
            r"the data set has 1 class \(ant\); give at least two",
        ),
        (
            lambda root: shutil.rmtree(root / "val" / "cat"),
            {},
            "have different classes: 1 occur in one only, such as 'cat'",
        ),
        (lambda root: None, {"image_size": 11}, r"image_size is 11; give a value in 1\.\.resize \(10\)"),
        (lambda root: None, {"image_size": 0}, r"image_size is 0; give"),
        (lambda root: None, {"ratio": 0.1}, "leaves class 2 without an image .head 7"),
        (lambda root: None, {"ratio": 2.0}, "outside"),
        (lambda root: None, {"ratio": 0.5, "profile": "flat"}, "use one of exp, step"),
    ],
)
def test_folders_that_cannot_be_used(root, spoil, arguments, message):
    spoil(root)
    refused(message, root, **arguments)


# ---------------------------------------------------------------- lists


def test_lists_give_the_same_data_set_as_the_folders(root):
    write_list(root, "train.txt", lines_of(root, "train"))
    write_list(root, "test.txt", ["", *lines_of(root, "val"), "  "])
    expected = load(str(root))
    for lists in (
        {"train_list": "train.txt", "test_list": "test.txt"},
        {"train_list": "train.txt"},
        {"test_list": str(root / "test.txt")},
    ):
        found = load(str(root), **lists)
        assert found.train_images == expected.train_images
        assert found.test_images == expected.test_images
        assert np.array_equal(found.train_labels, expected.train_labels)
        assert np.array_equal(found.test_labels, expected.test_labels)
        assert found.train_labels.dtype == found.test_labels.dtype == np.int32
        assert found.class_names == expected.class_names


def test_a_list_is_taken_in_its_order_and_may_leave_images_out(root):
    lines = lines_of(root, "train")
    chosen = [lines[i] for i in (20, 3, 10, 1)]
    found = load(str(root), train_list=write_list(root, "train.txt", chosen))
    assert found.train_labels.tolist() == [2, 0, 1, 0]
    assert np.array_equal(found.train_images[:], load(str(root)).train_images[[20, 3, 10, 1]])


def test_classes_without_folders_of_their_own_are_called_by_their_numbers(root):
    for i, split in enumerate(("train", "val")):
        for label in range(2):
            write(root / split / f"file {label}.png", pixels(10 * i + label))
        write_list(root, f"{split}.txt", [f"{split}/file {label}.png {label}" for label in range(2)])
    found = load(str(root), train_list="train.txt", test_list="val.txt")
    assert found.class_names == ("0", "1")
    assert found.train_labels.tolist() == [0, 1]
    # The training list names the classes of a test list that does not, as ImageNet-LT's.
    write_list(root, "train.txt", lines_of(root, "train"))
    write_list(root, "val.txt", [f"val/file 0.png {label}" for label in (1, 2, 0)])
    found = load(str(root), train_list="train.txt", test_list="val.txt")
    assert found.class_names == ("ant", "bee", "cat")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda lines: ["train/ant/00.png"],
            r"train\.txt, line 1 is 'train/ant/00\.png'; write one line per image",
        ),
        (lambda lines: [*lines, "", "a.png 1.5"], r"train\.txt, line 26 is 'a\.png 1\.5'; write one line"),
        (lambda lines: [*lines, "a.png -1"], r"line 25 is 'a\.png -1'"),
        (lambda lines: ["17", *lines], "line 1 is '17'"),
        (lambda lines: ["", " "], r"train\.txt names no image; write one line per image"),
        (
            lambda lines: [*lines, "train/gone.png 0", "train/too.png 1"],
            r"2 of the 26 images in .*train\.txt are missing, the first is .*/train/gone\.png; write paths",
        ),
        (lambda lines: [*lines, "train 0"], "1 of the 25 images .* are missing"),
        (lambda lines: [line for line in lines if line[-1] != "1"], "1 occur in one only, such as 'bee'"),
        (lambda lines: [line[:-1] + "210"[int(line[-1])] for line in lines], "lists number them differently"),
        (lambda lines: [lines[0][:-1] + "999999999", *lines], r"labels 0\.\.999999999 found"),
    ],
)
def test_lists_that_cannot_be_used(root, change, message):
    refused(message, root, train_list=write_list(root, "train.txt", change(lines_of(root, "train"))))


def test_list_numbers_must_have_no_gap(root):
    lines = [line[:-1] + "013"[int(line[-1])] for line in lines_of(root, "train")]
    write_list(root, "train.txt", lines)
    refused(r"labels 0\.\.3 found, but 3 classes need", root, train_list="train.txt", test_list="train.txt")


def test_list_that_is_not_a_text_file(root):
    refused(r"cannot read the list .*none\.txt \(FileNotFoundError", root, train_list="none.txt")
    refused(r"cannot read the list .*00\.png \(UnicodeDecodeError", root, test_list="train/ant/00.png")


def test_list_is_not_cut_to_a_long_tail(root):
    write_list(root, "train.txt", lines_of(root, "train"))
    refused(r"ratio is 0\.5, but train_list cannot be cut", root, train_list="train.txt", ratio=0.5)
    refused("n_max is 5, but train_list cannot be cut; leave", root, train_list="train.txt", n_max=5)


# ---------------------------------------------------------------- stream


def grain_threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("grain")]


def threads_end():
    deadline = time.monotonic() + 5
    while grain_threads() and time.monotonic() < deadline:
        time.sleep(0.01)
    return not grain_threads()


@pytest.fixture(scope="module")
def images(original):
    return load(str(original)).train_images


def ids_of_step(step):
    """Six of the 24 images in two rows, each step others."""
    return np.random.default_rng(step).permutation(24)[:6].reshape(2, 3)


@pytest.mark.parametrize(("threads", "ahead"), [(0, 2), (1, 1), (4, 0), (4, 3), (16, 40)])
def test_stream_gives_the_images_of_each_step(images, threads, ahead):
    everything = images[:]
    read = functools.partial(image_folder.stream, images, ids_of_step, threads=threads, ahead=ahead)
    whole = list(read(range(8)))
    assert len(whole) == 8
    for step, batch in enumerate(whole):
        assert batch.dtype == np.uint8
        assert np.array_equal(batch, everything[ids_of_step(step)])
    parts = [*read(range(3)), *read(range(3, 3)), *read(range(3, 4)), *read(range(4, 8))]
    assert np.array_equal(parts, whole)
    in_memory = list(image_folder.stream(everything, ids_of_step, range(8), threads=threads, ahead=ahead))
    assert np.array_equal(in_memory, whole)
    assert threads_end()


def test_a_stream_that_starts_late_asks_for_nothing_before(images):
    asked = set()
    read = image_folder.stream(
        images, lambda step: asked.add(step) or ids_of_step(step), range(100, 104), threads=2, ahead=1
    )
    assert np.array_equal(next(read), images[ids_of_step(100)])
    assert asked <= {100, 101}
    assert len(list(read)) == 3
    assert asked == {100, 101, 102, 103}


def test_stream_reads_ahead(images):
    step_reached = threading.Event()

    def ids_of(step):
        if step == 3:
            step_reached.set()
        return ids_of_step(step)

    read = image_folder.stream(images, ids_of, range(9), threads=2, ahead=3)
    next(read)
    assert step_reached.wait(5)  # while step 0 is the only one that was asked for
    read.close()


def test_shares_of_two_hosts_are_the_whole(images):
    def share(host, step):
        return uniform_order(24, seed=0, epoch=0).reshape(4, 6)[step, 3 * host : 3 * host + 3]

    hosts = [
        list(image_folder.stream(images, functools.partial(share, h), range(4), threads=2, ahead=2))
        for h in (0, 1)
    ]
    seen = [image.tobytes() for host in hosts for batch in host for image in batch]
    assert len(seen) == 24
    assert set(seen) == {image.tobytes() for image in images[:]}


@pytest.mark.parametrize("threads", [0, 3])
def test_a_damaged_file_is_reported_when_its_step_is_due(root, threads):
    images = load(str(root)).train_images
    (root / "train" / "bee" / "02.png").write_bytes(b"\x89PNG")
    damaged = images.paths.index("train/bee/02.png")
    read = image_folder.stream(images, lambda step: np.array([step]), range(24), threads=threads, ahead=4)
    for _ in range(damaged):
        next(read)
    with pytest.raises(InputError, match=r"^cannot read image .*/train/bee/02\.png \(.*repair it"):
        next(read)
    assert threads_end()


@pytest.mark.parametrize("end", ["close", "forget", "exhaust"])
def test_threads_end_with_the_stream(images, end):
    read = image_folder.stream(images, ids_of_step, range(6), threads=3, ahead=2)
    next(read)
    assert grain_threads()
    if end == "close":
        read.close()
    elif end == "exhaust":
        assert len(list(read)) == 5
    del read
    gc.collect()
    assert threads_end()
