"""Data sets of image files, in folders or lists, and reading the files before a step needs them."""

import dataclasses
import functools
import itertools
import os
import pathlib
import re
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from robal_jax.data import inspection
from robal_jax.data.dataset import Dataset, Images, check_dataset, check_labels
from robal_jax.data.long_tail import long_tailed_counts, long_tailed_indices
from robal_jax.errors import InputError, one_line, user_path

_EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".webp")

# Folders of operating systems and tools, beside those whose name begins with a dot.
_NO_DATA = frozenset(("@eadir", "__macosx", "$recycle.bin", "system volume information", "lost+found"))

# The formats are named so that the threads do not all search (and load) every format of Pillow at once.
_FORMATS = ("JPEG", "PNG", "BMP", "WEBP")


@dataclasses.dataclass(frozen=True)
class ImageFiles:
    """Image files as :class:`data.Images`: read, resized and cropped on demand.

    The shorter side is resized to ``resize`` (bilinear with antialiasing, the aspect ratio kept) unless it
    already has that length. Then the centre ``size x size`` is cut out. Grey images become RGB too,
    transparency is dropped, and a rotation noted in the file is not applied.

    Attributes:
      paths: ``[N]``, relative to ``root``.
      resize: new length of the shorter side, in pixels.
      size: side of the centre crop, 1..resize.
      root: folder of the paths.
    """

    paths: tuple[str, ...] = dataclasses.field(repr=False)
    resize: int
    size: int
    root: str = ""

    def __post_init__(self) -> None:
        if not 1 <= self.size <= self.resize:
            raise ValueError(f"size is {self.size}; give a value in 1..resize ({self.resize})")

    @property
    def shape(self) -> tuple[int, ...]:
        """``(N, size, size, 3)``."""
        return (len(self), self.size, self.size, 3)

    @property
    def dtype(self) -> np.dtype:
        """uint8."""
        return np.dtype(np.uint8)

    def __len__(self) -> int:
        """N."""
        return len(self.paths)

    @property
    def places(self) -> list[str]:
        """The paths with the root, ``[N]``."""
        return [os.path.join(self.root, path) for path in self.paths]

    @functools.cached_property
    def outlines(self) -> list[inspection.Outline | None]:
        """Sizes and both ends of the files, ``[N]``, see :func:`inspection.outline`."""
        return inspection.in_threads(inspection.outline, self.places)

    def check(self) -> None:
        """Decodes the files that do not look whole, so that a damaged one does not stop a training later.

        Raises:
          InputError: files are missing, are no images, or have more than 8 bits per channel.
        """
        suspects = [
            place
            for place, found in zip(self.places, self.outlines, strict=True)
            if found is None or not found.looks_whole
        ]
        errors = inspection.in_threads(lambda path: _error_of(path, self.resize, self.size), suspects)
        found = [error for error in errors if error]
        if len(found) > 1:
            raise InputError(f"{len(found)} of {len(self)} images cannot be read, the first: {found[0]}")
        if found:
            raise found[0]

    def __getitem__(self, ids: Any, /) -> np.ndarray:
        """Reads the images at ``ids``, integers ``[...]`` or a slice, as uint8 ``[..., size, size, 3]``.

        Raises:
          InputError: a file is missing or damaged, or has more than 8 bits per channel.
        """
        ids = np.asarray(range(len(self))[ids] if isinstance(ids, slice) else ids)
        images = np.empty((ids.size, *self.shape[1:]), np.uint8)
        for image, i in zip(images, ids.flat, strict=True):
            image[:] = _read(os.path.join(self.root, self.paths[i]), self.resize, self.size)
        return images.reshape(*ids.shape, *self.shape[1:])

    def part(self, ids: np.ndarray) -> "ImageFiles":
        """Returns the images at ``ids``, integers ``[n]``, without reading them."""
        return dataclasses.replace(self, paths=tuple(self.paths[i] for i in ids))

    def identity(self) -> np.ndarray:
        """Returns bytes that identify the images without reading them: paths, file sizes, resize and crop.

        Returns:
          uint8 ``[bytes]``. They do not depend on ``root``, so the files may be moved.

        Raises:
          InputError: a file is missing.
        """
        lines = [f"resize {self.resize} crop {self.size}"]
        for path in self.paths:
            try:
                lines.append(f"{path} {os.path.getsize(os.path.join(self.root, path))}")
            except OSError as error:
                raise _unreadable(os.path.join(self.root, path), error) from error
        return np.frombuffer(os.fsencode("\n".join(lines)), np.uint8)


def _unreadable(path: str, error: Exception) -> InputError:
    return InputError(f"cannot read image {path} ({one_line(error)}); repair it, or remove it from the data")


def _error_of(path: str, resize: int, size: int) -> InputError | None:
    """Decodes one file; returns the error, if there is one."""
    try:
        _read(path, resize, size)
    except InputError as error:
        return error
    return None


def _read(path: str, resize: int, size: int) -> np.ndarray:
    """Reads one file as uint8 ``[size, size, 3]``, see :class:`ImageFiles`."""
    try:
        with Image.open(path, formats=_FORMATS) as file:
            if file.mode[0] in "IF" or any(str(tile[3]).endswith(";16B") for tile in file.tile):
                raise ValueError("more than 8 bits per channel")  # Pillow would clip them to 8, not scale
            # A palette with transparency has no direct way to RGB.
            image = (file.convert("RGBA") if file.mode == "P" else file).convert("RGB")
    except Exception as error:  # damaged files raise OSError, SyntaxError, struct.error, ...
        raise _unreadable(path, error) from error
    shorter = min(image.size)
    if shorter != resize:
        width, height = (side * resize // shorter for side in image.size)
        image = image.resize((width, height), Image.Resampling.BILINEAR)
    left, top = ((side - size) // 2 for side in image.size)
    return np.asarray(image.crop((left, top, left + size, top + size)))


class Split(NamedTuple):
    """Files of one split, and the names of the classes if the folders name them."""

    paths: list[str]  # [N], relative to the root
    labels: np.ndarray  # integers [N]
    names: list[str]  # [K], or empty
    left_out: tuple[str, ...] = ()  # files that are no images, without hidden ones


def load_image_folder(
    path: str = "",
    *,
    train: str = "train",
    test: str = "val",
    train_list: str = "",
    test_list: str = "",
    ratio: float = 1.0,
    profile: str = "exp",
    seed: int = 0,
    n_max: int | None = None,
    image_size: int = 64,
    resize: int = 64,
) -> Dataset:
    """Finds a data set of image files, which are read when a step needs them.

    A split is a folder with one sub-folder per class (in the order of their names; images at any depth in
    it), or a list file with lines ``relative/path.JPEG 17``, as ImageNet-LT's. Hidden files and folders are
    left out: those whose name begins with a dot, and those of systems and tools such as ``__MACOSX``.

    Args:
      path: folder that all other paths are relative to.
      train: folder of the train split, if there is no list.
      test: folder of the test split, if there is no list.
      train_list: list file of the train split; '' for none.
      test_list: list file of the test split; '' for none.
      ratio: n_min / n_max, the inverse of IR, in (0, 1], of the subset of the train folder that is used; 1
        for all images, up to ``n_max``. With a list it must be 1.
      profile: 'exp' or 'step', see :func:`data.long_tailed_counts`.
      seed: seed of the subset.
      n_max: train images of class 0 in the subset; None for the size of the smallest class. A folder that is
        long-tailed already is cut only if it is given. With a list it must be None.
      image_size: side of the test images, 1..resize: the centre of the resized images.
      resize: length to which the shorter side is resized, and side of the train images.

    Returns:
      The data set, RGB, ``pixel_max`` 255. If no folder names the classes, their numbers are their names. Its
      notes say how many images each class has.

    Raises:
      InputError: a folder or file is missing or no image, a class has no image, the splits have different
        classes, a list cannot be used, the folder to be cut has twice as many images of one class as of
        another, or see :func:`data.long_tailed_counts`.

    Source: Liu et al. 2019, "Large-Scale Long-Tailed Recognition in an Open World" (ImageNet-LT's lists).
    """
    if not path:
        raise InputError("no folder of images given; set config.data.path")
    root = str(user_path(path))
    if not 1 <= image_size <= resize:
        raise InputError(f"image_size is {image_size}; give a value in 1..resize ({resize})")
    if train_list and ratio != 1:
        raise InputError(
            f"ratio is {ratio}, but train_list cannot be cut to a ratio; set config.data.ratio=1"
        )
    if train_list and n_max is not None:
        raise InputError(f"n_max is {n_max}, but train_list cannot be cut; leave config.data.n_max out")
    splits = {
        "train": _listed(root, train_list) if train_list else foldered(root, train),
        "test": _listed(root, test_list) if test_list else foldered(root, test),
    }
    names = _class_names(splits)
    for split, found in splits.items():
        check_labels(found.labels, len(names), f"{root}: {split} set")
    notes = [_note(split, splits[split], names) for split in splits]
    paths, labels = splits["train"].paths, splits["train"].labels
    if ratio != 1 or n_max is not None:
        kept = _cut(labels, len(names), ratio, profile, seed, n_max)
        paths, labels = [paths[i] for i in kept], labels[kept]
        notes.insert(1, f"cut to ratio {ratio:g}: {inspection.per_class(labels, names)}")
    train_images = ImageFiles(tuple(paths), resize, resize, root)
    test_images = ImageFiles(tuple(splits["test"].paths), resize, image_size, root)
    dataset = Dataset(
        train_images=train_images,
        train_labels=labels.astype(np.int32),
        test_images=test_images,
        test_labels=splits["test"].labels.astype(np.int32),
        pixel_max=255,
        class_names=tuple(names),
        notes=tuple(notes),
    )
    train_images.check()
    test_images.check()
    return check_dataset(dataset)


def _note(name: str, split: Split, names: list[str]) -> str:
    """Says how many images each class of a split has, and which files are left out."""
    out = (
        f"; {len(split.left_out)} other files left out, such as {split.left_out[0]}" if split.left_out else ""
    )
    return f"{name} set: {inspection.per_class(split.labels, names)}{out}"


def _cut(
    labels: np.ndarray, num_classes: int, ratio: float, profile: str, seed: int, n_max: int | None
) -> np.ndarray:
    """Returns the positions of the images that a long-tailed subset of a balanced folder keeps."""
    counts = np.bincount(labels)
    smallest, largest = int(counts.min()), int(counts.max())
    if n_max is None and largest >= 2 * smallest:
        raise InputError(
            f"the train folder is long-tailed already, with {largest} to {smallest} images per class; set "
            f"config.data.ratio=1 to use all its images, or n_max={smallest} in config.data to cut it to "
            f"ratio {ratio:g} again"
        )
    wanted = long_tailed_counts(smallest if n_max is None else n_max, num_classes, ratio, profile)
    return long_tailed_indices(labels, wanted, seed)


def foldered(root: str, split: str) -> Split:
    """Finds the split of a folder with one sub-folder per class."""
    folder = os.path.join(root, split)
    if not os.path.isdir(folder):
        beside = [entry.name for entry in os.scandir(root) if entry.is_dir()] if os.path.isdir(root) else []
        others = f", only {', '.join(sorted(beside)[: inspection.LISTED])}" if beside else ""
        raise InputError(
            f"no folder {folder}{others}; make it, with one sub-folder of images per class, or set "
            "config.data.train and config.data.test"
        )
    entries = sorted(
        (entry.name, entry.is_dir()) for entry in os.scandir(folder) if not _is_hidden(entry.name)
    )
    names = [name for name, is_folder in entries if is_folder]
    if not names:
        raise InputError(f"{folder} has no sub-folder; give it one sub-folder of images per class")
    paths: list[str] = []
    left_out = [os.path.join(split, name) for name, is_folder in entries if not is_folder]
    counts = []
    for name in names:
        files = sorted(path.removeprefix(root + os.sep) for path in _files(os.path.join(folder, name)))
        found = [path for path in files if path.lower().endswith(_EXTENSIONS)]
        if not found:
            raise InputError(
                f"no image in {os.path.join(folder, name)}{_endings(files)}; give at least one per class "
                f"({', '.join(_EXTENSIONS)})"
            )
        paths += found
        left_out += sorted({*files} - {*found})
        counts.append(len(found))
    return Split(paths, np.repeat(np.arange(len(names)), counts), names, tuple(left_out))


def _endings(paths: list[str]) -> str:
    """Says which other files there are: ', only 12 .gif and 1 .txt'."""
    counts = Counter(os.path.splitext(path)[1].lower() or "without ending" for path in paths)
    return ", only " + " and ".join(f"{n} {ending}" for ending, n in counts.most_common(3)) if counts else ""


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name.lower() in _NO_DATA


def _files(folder: str) -> Iterator[str]:
    """Yields the files at any depth of a folder, through links, without hidden ones."""
    seen = set()
    for place, folders, files in os.walk(folder, followlinks=True, onerror=_no_folder):
        real = os.path.realpath(place)
        folders[:] = [name for name in folders if not _is_hidden(name)] if real not in seen else []
        if real not in seen:
            yield from (os.path.join(place, name) for name in files if not _is_hidden(name))
        seen.add(real)


def _no_folder(error: OSError) -> None:
    raise InputError(
        f"cannot read folder {error.filename} ({error.strerror}); change its permissions"
    ) from error


def _listed(root: str, list_file: str) -> Split:
    """Reads the split of a list file."""
    file = pathlib.Path(root, list_file)
    expected = "write one line per image with its path and class number, such as `relative/path.JPEG 17`"
    try:
        lines = file.read_text(encoding="utf-8").split("\n")
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read the list {file} ({one_line(error)}); {expected}") from error
    entries = []
    for number, line in enumerate(lines, 1):
        match = re.fullmatch(r"\s*(\S.*?)\s+(\d{1,9})\s*", line)
        if match:
            entries.append((match[1], int(match[2])))
        elif line.strip():
            raise InputError(f"{file}, line {number} is {line.strip()[:100]!r}; {expected}")
    if not entries:
        raise InputError(f"{file} names no image; {expected}")
    missing = [path for path, _ in entries if not os.path.isfile(os.path.join(root, path))]
    if missing:
        raise InputError(
            f"{len(missing)} of the {len(entries)} images in {file} are missing, the first is "
            f"{os.path.join(root, missing[0])}; write paths relative to {root}"
        )
    # If each class has a folder of its own, the folder names it.
    folders = sorted({(label, os.path.basename(os.path.dirname(path))) for path, label in entries})
    names = [name for _, name in folders]
    named = len(set(names)) == len(folders) == len({label for label, _ in folders}) and "" not in names
    return Split([path for path, _ in entries], np.array([label for _, label in entries]), names * named)


def _class_names(splits: dict[str, Split]) -> list[str]:
    """Returns the names of the classes, the same in both splits; their numbers if they have no names."""
    train, test = (split.names for split in splits.values())
    if train and test and train != test:
        only = [*({*train} - {*test}), *({*test} - {*train})]
        raise InputError(
            "train and test set have different classes: "
            + (
                f"{len(only)} occur in one only, such as {min(only)!r}"
                if only
                else "the lists number them differently"
            )
            + "; give both the same"
        )
    return train or test or [str(i) for i in range(len(np.unique(splits["train"].labels)))]


def stream(
    images: Images, ids_of_step: Callable[[int], np.ndarray], steps: range, *, threads: int, ahead: int
) -> Iterator[np.ndarray]:
    """Yields the images of each step in turn, read ahead by threads that all work on the next step.

    Any step can be the first, and nothing before it is read. The threads end when the iterator is closed or
    garbage-collected.

    Args:
      images: N images H x W x C.
      ids_of_step: a step to the positions of its images, integers ``[...]``; called from the threads.
      steps: the steps to read.
      threads: number of threads; with 0 the caller reads.
      ahead: of how many steps the images are read, and held in memory, while one is used; with 0 the caller
        reads.

    Yields:
      ``images[ids_of_step(step)]``, uint8 ``[..., H, W, C]``.

    Raises:
      InputError: a file cannot be read; raised when its step is due.
    """
    import grain  # it takes seconds, and only images that are not in memory need it

    # Each thread reads a share of a step. Single images would occupy all threads as well, but the work of
    # grain per element grows with the number of elements that are ready.
    shares = max(threads, 1)
    ids_of = functools.lru_cache(maxsize=ahead + 2)(ids_of_step)  # the steps that the threads may be reading

    def read(position: int) -> np.ndarray:
        step, share = divmod(position, shares)
        return images[np.array_split(np.ravel(ids_of(steps[step])), shares)[share]]

    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=ahead * shares)
    parts = iter(grain.MapDataset.range(len(steps) * shares).map(read).to_iter_dataset(options))
    try:
        for step in steps:
            together = np.concatenate(list(itertools.islice(parts, shares)))
            yield together.reshape(*np.shape(ids_of(step)), *images.shape[1:])
    finally:
        parts.close()
