"""CIFAR-10-LT and CIFAR-100-LT, from a TFDS folder or an .npz file; nothing is downloaded."""

import io
import os
import pathlib
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from robal_jax.data.dataset import Dataset, check_dataset, check_labels
from robal_jax.data.long_tail import long_tailed_counts, long_tailed_indices
from robal_jax.errors import InputError, one_line, user_path

_SPLITS = ("train", "test")

_IMAGE_SHAPE = (32, 32, 3)

# Train images per class in the full set, and the class names in the order of their labels.
_CIFAR = {
    "cifar10": (5000, "airplane automobile bird cat deer dog frog horse ship truck"),
    "cifar100": (
        500,
        """apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly
        camel can castle caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile
        cup dinosaur dolphin elephant flatfish forest fox girl hamster house kangaroo keyboard lamp
        lawn_mower leopard lion lizard lobster man maple_tree motorcycle mountain mouse mushroom oak_tree
        orange orchid otter palm_tree pear pickup_truck pine_tree plain plate poppy porcupine possum
        rabbit raccoon ray road rocket rose sea seal shark shrew skunk skyscraper snail snake spider
        squirrel streetcar sunflower sweet_pepper table tank telephone television tiger tractor train
        trout tulip turtle wardrobe whale willow_tree wolf woman worm""",
    ),
}


class _Split(NamedTuple):
    """One split of the full data set, in the official order."""

    labels: np.ndarray  # integers [N]
    images: Callable[[np.ndarray], np.ndarray]  # positions [n] to uint8 [n, 32, 32, 3]


def load_cifar_lt(
    name: str,
    path: str = "",
    *,
    ratio: float = 0.02,
    profile: str = "exp",
    seed: int = 0,
    n_max: int | None = None,
) -> Dataset:
    """Reads CIFAR-10-LT or CIFAR-100-LT: the paper's long-tailed train set and the whole test set.

    TensorFlow is not needed.

    Args:
      name: 'cifar10' or 'cifar100'.
      path: a TFDS data folder, or the version folder in it that holds ``dataset_info.json``; a file
        ``FILE.npz`` with arrays ``train_images``, ``test_images`` ``[N, 32, 32, 3]`` (uint8, or floats k/255)
        and ``train_labels``, ``test_labels`` ``[N]`` in the official order; '' for TFDS's default folder.
      ratio: n_min / n_max, the inverse of IR, in (0, 1].
      profile: 'exp' or 'step', see :func:`data.long_tailed_counts`.
      seed: seed of the subset, 0 in the paper.
      n_max: train images of class 0; None for all (5000 or 500).

    Returns:
      The data set; images are 32 x 32 x 3, ``pixel_max`` is 255.

    Raises:
      InputError: the name is unknown, the data are missing or cannot be used, or see
        :func:`data.long_tailed_counts`.

    Source: RoBal, experimental settings, and the released data set class (quirks 4 and 5).
    """
    if name not in _CIFAR:
        raise InputError(f"unknown CIFAR set {name!r}; use one of {', '.join(_CIFAR)}")
    full_n_max, names = _CIFAR[name]
    class_names = tuple(names.split())
    counts = long_tailed_counts(full_n_max if n_max is None else n_max, len(class_names), ratio, profile)
    train, test = (_open_npz if path.endswith(".npz") else _open_tfds)(name, path)
    for split, labels in zip(_SPLITS, (train.labels, test.labels), strict=True):
        check_labels(labels, len(class_names), f"{path or name}: {split} set")
    kept = long_tailed_indices(train.labels, counts, seed)
    dataset = Dataset(
        train_images=train.images(kept),
        train_labels=train.labels[kept].astype(np.int32),
        test_images=test.images(np.arange(len(test.labels))),
        test_labels=test.labels.astype(np.int32),
        pixel_max=255,
        class_names=class_names,
    )
    return check_dataset(dataset)


def _how_to_get(name: str) -> str:
    return (
        f"get it with `python experiments/prepare_data.py --dataset={name} --data_dir=DIR`, or give "
        f"`--config.data.path=FILE.npz` with arrays train_images, test_images (uint8 [N, 32, 32, 3]) "
        f"and train_labels, test_labels ([N])"
    )


def _open_npz(name: str, path: str) -> list[_Split]:
    """Reads both splits of an .npz file."""
    file = user_path(path)
    if not file.is_file():
        raise InputError(f"no file {file} with {name}; {_how_to_get(name)}")
    wanted = {f"{split}_{kind}" for split in _SPLITS for kind in ("images", "labels")}
    with (
        reading_file(f"{file} as an .npz file", "write it again with np.savez"),
        file.open("rb") as stream,  # np.load leaves a damaged file that it opened itself open
        np.load(stream, allow_pickle=False) as content,
    ):
        missing = sorted(wanted - set(content.files))
        if missing:
            raise InputError(
                f"{file} lacks {', '.join(missing)}; it holds {', '.join(content.files) or 'nothing'}; "
                f"write {', '.join(sorted(wanted))}"
            )
        arrays = {key: content[key] for key in wanted}
    return [_npz_split(arrays, split, file) for split in _SPLITS]


def _npz_split(arrays: dict[str, np.ndarray], split: str, file: pathlib.Path) -> _Split:
    images, labels = arrays[f"{split}_images"], arrays[f"{split}_labels"]
    if images.ndim != 4 or images.shape[1:] != _IMAGE_SHAPE:
        raise InputError(f"{file}: {split}_images has shape {list(images.shape)}; store [N, 32, 32, 3]")
    if images.dtype != np.uint8 and images.dtype.kind != "f":
        raise InputError(f"{file}: {split}_images is {images.dtype}; store uint8, or floats in [0,1]")
    if labels.dtype.kind not in "iu" or labels.shape != images.shape[:1]:
        raise InputError(
            f"{file}: {split}_labels is {labels.dtype} {list(labels.shape)}; "
            f"store {len(images)} integers, one per image"
        )
    return _Split(labels, lambda positions: _as_uint8(images[positions], f"{file}: {split}_images"))


def _as_uint8(images: np.ndarray, what: str) -> np.ndarray:
    """Returns images of k or k/255 as k in uint8."""
    if images.dtype == np.uint8:
        return images
    low, high = images.min(), images.max()
    if not (low >= 0 and high <= 1):  # written so that NaN is caught
        raise InputError(
            f"{what}: values in [{low:g}, {high:g}], outside [0,1]; store uint8 0..255, or floats k/255"
        )
    scaled = images * np.float64(255)
    rounded = np.rint(scaled)
    # float32 stores k/255 to within 2e-5 of a grey level; a thousandth leaves room for one more rounding
    # and still catches normalised or resized images, which must not be changed silently.
    off = np.abs(scaled - rounded).max()
    if off > 1e-3:
        raise InputError(
            f"{what}: a float is {off:.3f} grey levels away from k/255 with whole k; "
            f"store the original uint8 images"
        )
    return rounded.astype(np.uint8)


def tfds_folder(path: str = "") -> pathlib.Path:
    """Returns the TFDS data folder: ``path``, or else TFDS_DATA_DIR, or else TFDS's own default."""
    # TFDS itself reads the variable only once, when it is imported.
    return user_path(path or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets")


def find_tfds(name: str, path: str = "") -> pathlib.Path | None:
    """Finds the newest version of a data set that TFDS has prepared.

    Args:
      name: 'cifar10' or 'cifar100'.
      path: a TFDS data folder, or a version folder itself; '' for the default folder.

    Returns:
      The folder that holds ``dataset_info.json``; None if there is none.
    """
    root = tfds_folder(path)
    if (root / "dataset_info.json").is_file():
        return root
    versions = {
        tuple(map(int, info.parent.name.split("."))): info.parent
        for info in root.glob(f"{name}/*/dataset_info.json")
        if re.fullmatch(r"\d+\.\d+\.\d+", info.parent.name)
    }
    return versions[max(versions)] if versions else None


def has_array_record(folder: pathlib.Path) -> bool:
    """Returns whether a version folder has files that can be read in any order and without TensorFlow."""
    return any(folder.glob("*.array_record*"))


def _open_tfds(name: str, path: str) -> list[_Split]:
    """Opens both splits of a data set that TFDS has prepared."""
    folder = find_tfds(name, path)
    if folder is None:
        raise InputError(
            f"{name} not found: no {tfds_folder(path) / name}/VERSION/dataset_info.json; {_how_to_get(name)}"
        )
    if not has_array_record(folder):
        raise InputError(
            f"{folder} has no *.array_record* file, and reading other formats needs TensorFlow; "
            f"prepare {name} as array_record in another folder: {_how_to_get(name)}"
        )
    import tensorflow_datasets as tfds  # it takes a second, and only these data need it

    reading = partial(reading_file, str(folder), f"delete it and prepare {name} again: {_how_to_get(name)}")
    with reading():
        builder = tfds.builder_from_directory(folder)
        if builder.name != name:
            raise InputError(f"{folder} holds {builder.name}, not {name}; give the folder of {name}")
        # Images stay PNG bytes: all labels and ids are needed, but only few images.
        sources = builder.as_data_source(
            list(_SPLITS), decoders={"image": tfds.decode.SkipDecoding()}, file_format="array_record"
        )
        return [_tfds_split(source, reading) for source in sources]


def _tfds_split(source: Any, reading: Callable[[], AbstractContextManager[None]]) -> _Split:
    """Restores the official order of a split from its ids (train_00042), because TFDS shuffles the images."""
    records = source.__getitems__(range(len(source)))
    official = np.array([int(record["id"].split(b"_")[1]) for record in records])
    order = np.argsort(official)
    if not np.array_equal(official[order], np.arange(len(order))):
        raise ValueError(f"ids are not 0..{len(order) - 1}, each once")

    def images(positions: np.ndarray) -> np.ndarray:
        with reading():
            return np.stack([decode_png(records[i]["image"]) for i in order[positions]])

    return _Split(np.array([record["label"] for record in records])[order], images)


def decode_png(png: bytes) -> np.ndarray:
    """Decodes one image to uint8 ``[H, W, C]``."""
    from PIL import Image

    return np.asarray(Image.open(io.BytesIO(png)))


@contextmanager
def reading_file(what: str, remedy: str) -> Iterator[None]:
    """Turns whatever a library raises for damaged files into one line for the user."""
    try:
        yield
    except (InputError, MemoryError):
        raise
    except Exception as error:  # zipfile, zlib, protobuf, Pillow, ... each raise their own
        raise InputError(f"cannot read {what} ({one_line(error)}); {remedy}") from error
