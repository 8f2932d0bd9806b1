"""Cost of reading images from files: python experiments/benchmarks/reading.py [--images=400] [--batch=50].

Writes smooth random images as files of three kinds. Then times, in turn in one process, batches from
``image_folder.stream`` with 1, 4 and 16 threads and batches from an array in memory; prints medians and
ratios. The files come from the operating system's cache, so this is the cost of decoding.
"""

import pathlib
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable
from typing import NamedTuple

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

import numpy as np
import PIL
from PIL import Image

from robal_jax import cli
from robal_jax.data import image_folder

THREADS, AHEAD = (1, 4, 16), 4


class Kind(NamedTuple):
    """Image files: format, pixels per side in the file, pixels per side of the square that is used."""

    extension: str
    side: int
    used: int


KINDS = (Kind("png", 64, 64), Kind("jpg", 64, 64), Kind("jpg", 256, 224))


def write(folder: pathlib.Path, kind: Kind, count: int) -> image_folder.ImageFiles:
    """Writes files that compress about as photographs do: smooth, with a little noise."""
    rng = np.random.default_rng(0)
    paths = []
    for i in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize((kind.side, kind.side), Image.Resampling.BICUBIC))
        noisy = np.clip(smooth + rng.normal(0, 8, smooth.shape), 0, 255).astype(np.uint8)
        paths.append(str(folder / f"{kind.side}-{i}.{kind.extension}"))
        Image.fromarray(noisy).save(paths[-1], quality=90)
    return image_folder.ImageFiles(tuple(paths), kind.side, kind.used)


def rate(batches: Iterable[np.ndarray]) -> float:
    """Returns images per second."""
    started = time.perf_counter()
    count = sum(len(batch) for batch in batches)
    return count / (time.perf_counter() - started)


def row(kind: Kind, files: image_folder.ImageFiles, batch: int, repeats: int) -> str:
    """Returns one line of the table."""
    array = files[:]
    steps = range(len(files) // batch)
    order = np.random.default_rng(0).permutation(len(files))

    def ids_of_step(step: int) -> np.ndarray:
        return order[step * batch : (step + 1) * batch]

    rates: dict[int, list[float]] = {0: [], **{threads: [] for threads in THREADS}}
    for _ in range(repeats):
        rates[0].append(rate(array[ids_of_step(step)] for step in steps))
        for threads in THREADS:
            rates[threads].append(
                rate(image_folder.stream(files, ids_of_step, steps, threads=threads, ahead=AHEAD))
            )
    memory, *folder = (statistics.median(values) for values in rates.values())
    cells = [f"{value:,.0f} ({memory / value:.0f} : 1)" for value in folder]
    size = statistics.mean(pathlib.Path(path).stat().st_size for path in files.paths) / 1024
    name = f"{kind.extension.upper()}, {kind.side} px, {size:.0f} KiB, {kind.used} used"
    return f"| {' | '.join([name, f'{memory:,.0f}', *cells])} |"


def main(arguments: list[str]) -> None:
    """Times everything and prints a table."""
    texts = {
        "images": "files of each kind, 400",
        "batch": "images per step, 50",
        "repeats": "timed passes of each, 5",
    }
    values = cli.parse(arguments, texts, __doc__)
    count, batch, repeats = (
        int(values[name] or default) for name, default in (("images", 400), ("batch", 50), ("repeats", 5))
    )
    with tempfile.TemporaryDirectory() as folder:
        kinds = {kind: write(pathlib.Path(folder), kind, count) for kind in KINDS}
        first = kinds[KINDS[0]]
        rate(
            image_folder.stream(first, lambda step: np.full(batch, step), range(1), threads=1, ahead=1)
        )  # imports grain
        print(
            f"Images per second, and the ratio of memory to folder; {count} files, batch {batch}, "
            f"{AHEAD} steps ahead, Pillow {PIL.__version__}, medians of {repeats}\n"
        )
        print(f"| files | array in memory | {' | '.join(f'{n} thread(s)' for n in THREADS)} |")
        print("|---" * (2 + len(THREADS)) + "|")
        for kind, files in kinds.items():
            print(row(kind, files, batch, repeats))


if __name__ == "__main__":
    cli.run(main)
