"""Images per second of each augmentation: python experiments/benchmarks/augmentation.py [--batch=128].

Every augmentation is compiled alone and applied to batches of noise, beside a random crop and flip. With
--network=NAME the training step of AT is timed too, with each of the lists that methods use. All run in turn
in one process; ratios are to the crop and flip. --cores=1 keeps the process on one core.
"""

import os
import pathlib
import sys
from collections.abc import Callable
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

from experiments.benchmarks import measure, step
from robal_jax import cli

BASE = "crop_flip"
LISTS = (BASE, f"randaugment,{BASE}", f"autoaugment,{BASE}", f"randaugment,{BASE},cutout")
"""Lists that methods use."""
ALONE = ("resized_crop_flip", "randaugment", "autoaugment", "cutout", "random_erasing")


def augmented(names: str, batch: int, pixels: int) -> Callable[[], Any]:
    """Returns the augmentation of one batch by a list of names, or by CutMix."""
    import jax

    from robal_jax import data
    from robal_jax.builder.parts import augmentation

    noise = measure.random_images(pixels=pixels, images=batch)
    images, key = jax.device_put(noise.train_images), jax.random.key(0)
    if names == "cutmix":

        def mix(key: jax.Array, images: jax.Array) -> jax.Array:
            return data.cutmix(images, *data.draw_cutmix(key, batch, images.shape[1:3]))[0]

        compiled, keys = jax.jit(mix), key
    else:
        compiled, keys = jax.jit(augmentation(names, noise)), jax.random.split(key, batch)
    return lambda: jax.block_until_ready(compiled(keys, images))


def table(what: str, times: dict[str, measure.Times], images: int) -> list[dict[str, Any]]:
    """Prints a table and returns its rows; ``images`` is their number in one timed call."""
    print(
        f"\n| {what} | images per second | time per image in us (least-most) | of {BASE} |\n|---|---|---|---|"
    )
    rows = []
    for name, seconds in times.items():
        each = seconds.per(images / 1e3)
        ratio = seconds.median / times[BASE].median
        print(f"| {name} | {images / seconds.median:,.0f} | {each:.3g} | {ratio:.2f} |", flush=True)
        rows.append({"what": what, "way": name, "images": images, **seconds._asdict(), "of_base": ratio})
    return rows


def main(arguments: list[str]) -> None:
    """Times everything and prints tables."""
    texts = {
        "batch": "images, 128",
        "pixels": "per side, 32",
        "repeats": "timed calls of each, 15",
        "cores": "of the process; all if not given",
        "network": f"of the training step, one of {','.join(step.NETWORKS)}; no step if not given",
        "json": "file for the record",
    }
    values = cli.parse(arguments, texts, __doc__)
    batch, pixels, repeats = (
        int(values[name] or default) for name, default in (("batch", 128), ("pixels", 32), ("repeats", 15))
    )
    if values["cores"]:
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: int(values["cores"])])
    print(f"{measure.heading()}\n{values['cores'] or 'all'} cores, batch {batch}, medians of {repeats}")
    ways = {name: augmented(name, batch, pixels) for name in (*LISTS, *ALONE, "cutmix")}
    rows = table("augmentation", measure.interleaved(ways, repeats), batch)
    if values["network"]:
        steps = 2
        ways = {
            name: step.ours(
                values["network"], "at", batch, steps, "default", {"train": {"augmentation": name}}
            )
            for name in LISTS
        }
        times = measure.interleaved(ways, repeats)
        rows += table(f"step of AT, {values['network']}", times, steps * batch)
    measure.record(values["json"], rows)


if __name__ == "__main__":
    cli.run(main)
