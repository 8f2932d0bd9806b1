"""Remarks on a data set before it is used, without decoding its images.

:func:`notes` says how many images each class has, and which test images the training set has too.
"""

import hashlib
import os
import stat
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np

from robal_jax.data.dataset import Dataset

THREADS = 16  # that wait for the disk

LISTED = 12  # classes that a line lists

EDGE = 64  # bytes at each end of a file

PNG_START, PNG_END = b"\x89PNG\r\n\x1a\n", b"IEND\xaeB`\x82"


class Outline(NamedTuple):
    """The length of a file, its first and its last ``EDGE`` bytes."""

    size: int
    start: bytes
    end: bytes

    @property
    def looks_whole(self) -> bool:
        """Whether it begins and ends like an image of 8 bits per channel; a damage in between is not seen."""
        start, end = self.start, self.end
        if start.startswith(PNG_START):
            return end.endswith(PNG_END) and start[24:25] != b"\x10"  # bits per channel
        if start.startswith(b"RIFF") and start[8:12] == b"WEBP":
            return int.from_bytes(start[4:8], "little") + 8 == self.size
        if start.startswith(b"BM"):
            return int.from_bytes(start[2:6], "little") == self.size
        return start.startswith(b"\xff\xd8\xff") and end.endswith(b"\xff\xd9")


def in_threads(function: Callable[[str], Any], paths: Sequence[str]) -> list[Any]:
    """Calls a function that waits for the disk with every path; returns its results in order."""
    shares = [paths[start :: THREADS * 4] for start in range(THREADS * 4)]
    with ThreadPoolExecutor(THREADS) as pool:
        found = list(pool.map(lambda share: [function(path) for path in share], shares))
    return [found[i % len(found)][i // len(found)] for i in range(len(paths))]


def outline(path: str) -> Outline | None:
    """Reads the two ends of a file; None if it is not there, cannot be read or is no regular file."""
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:  # a pipe must not block
            about = os.fstat(file.fileno())
            if not stat.S_ISREG(about.st_mode):
                return None
            start = file.read(EDGE)
            file.seek(max(about.st_size - EDGE, 0))
            return Outline(about.st_size, start, file.read(EDGE))
    except OSError:
        return None


def per_class(labels: np.ndarray, names: Sequence[str]) -> str:
    """Says how many images each class has; of many classes, those with the most and the fewest.

    Args:
      labels: integers ``[N]``.
      names: of the classes, ``[K]``.

    Example:
      >>> per_class(np.array([0, 1, 1, 2]), ["ant", "bee", "cat"])
      '4 images of 3 classes (ant: 1, bee: 2, cat: 1)'
    """
    counts = np.bincount(labels, minlength=len(names))
    each = [f"{name}: {count}" for name, count in zip(names, counts, strict=True)]
    if len(each) > LISTED:
        order = np.argsort(-counts, kind="stable")
        most, fewest = order[: LISTED // 2], order[-(LISTED // 2) :]
        each = [*(each[i] for i in most), "...", *(each[i] for i in fewest)]
    return f"{len(labels)} images of {len(names)} classes ({', '.join(each)})"


def notes(data: Dataset) -> tuple[str, ...]:
    """Returns the notes of a data set, and one more if test images occur in the training set.

    Files count as the same image if they have the same bytes.
    """
    train: Any = data.train_images
    test: Any = data.test_images
    if hasattr(train, "outlines") and hasattr(test, "outlines"):
        pairs = _same_files(train, test)
        names = [f"{test.paths[j]} ({train.paths[i]})" for i, j in pairs[:1]]
    elif isinstance(train, np.ndarray) and isinstance(test, np.ndarray):
        pairs = _same((image.tobytes() for image in images) for images in (train, test))
        names = [f"test image {j} (training image {i})" for i, j in pairs[:1]]
    else:
        return data.notes
    if not pairs:
        return data.notes
    return (
        *data.notes,
        f"warning: {len(pairs)} of {len(test)} test images are in the training set too, such as {names[0]}; "
        "what a model does with them says nothing about new images",
    )


def _same(splits: Iterable[Iterable[Any]]) -> list[tuple[int, int]]:
    """Returns the positions of equal values, (in the first, in the second), one per value of the second."""
    first, second = splits
    place = {value: i for i, value in reversed(list(enumerate(first)))}
    return [(place[value], j) for j, value in enumerate(second) if value in place]


def _same_files(train: Any, test: Any) -> list[tuple[int, int]]:
    """Returns the positions of files with the same bytes; only those with the same ends are read."""
    alike: dict[Any, list[int]] = defaultdict(list)
    for i, found in enumerate(train.outlines):
        alike[found].append(i)
    candidates = [j for j, found in enumerate(test.outlines) if found in alike]
    if not candidates:
        return []
    chosen = sorted({i for j in candidates for i in alike[test.outlines[j]]})
    splits = ((train.places, chosen), (test.places, candidates))
    equal = _same(in_threads(_digest, [places[i] for i in ids]) for places, ids in splits)
    return [(chosen[i], candidates[j]) for i, j in equal]


def _digest(path: str) -> bytes:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").digest()
