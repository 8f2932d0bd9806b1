"""Work on numbered images, whatever batches and devices make of them (robal_jax.evaluation.victim)."""

import subprocess
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT, with_devices

from robal_jax.devices import parallel
from robal_jax.evaluation.victim import Victim

COUNT, SHAPE, CLASSES, PIXEL_MAX = 23, (3, 2, 1), 3, 16
RNG = np.random.RandomState(0)
IMAGES = RNG.randint(0, PIXEL_MAX + 1, (COUNT, *SHAPE)).astype(np.uint8)
LABELS = np.arange(COUNT) % CLASSES
WEIGHT, SHIFT = RNG.randint(-4, 5, (6, CLASSES)).astype(np.float32), np.float32([1, 2, 3])
# Sums of sixteenths are exact in float32.
LOGITS = (IMAGES.reshape(COUNT, -1) / PIXEL_MAX) @ WEIGHT + SHIFT


def predict(params, stats, images):
    return images.reshape(len(images), -1) @ params["weight"] + stats[None]


def look(logits_fn, keys, images, labels, *parts, **shared):
    """All that work can see; parts are the numbers times ten, shared is ``factor``."""
    scale = shared.get("factor", 1)
    return {
        "logits": scale * logits_fn(images),
        "images": images,
        "labels": labels,
        "noise": jax.vmap(lambda key: jax.random.uniform(key, (2,)))(keys),
        "parts": parts,
        # The company of an image, as far as it is on the same device.
        "batch": jnp.broadcast_to(labels[None], (len(labels), len(labels))),
    }


def victim(batch_size=4, layout="jit", seed=0):
    return Victim(
        predict, {"weight": WEIGHT}, SHIFT, IMAGES, LABELS,
        pixel_max=PIXEL_MAX, seed=seed, batch_size=batch_size, layout=layout,
    )  # fmt: skip


each_layout = pytest.mark.parametrize("layout", parallel.LAYOUTS)
SOME = {
    "one": [7],
    "part of a batch": [3, 1, 3],
    "one batch": [22, 0, 21, 1],
    "all, backwards": list(range(COUNT))[::-1],
}


@pytest.fixture(scope="module")
def looks():
    """Work compiled in each layout, and how often it was traced."""
    traces = {layout: [] for layout in parallel.LAYOUTS}

    def counted(layout, *arguments, **shared):
        traces[layout].append(1)
        return look(*arguments, **shared)

    return {layout: victim(layout=layout).compile(partial(counted, layout)) for layout in traces}, traces


@each_layout
def test_outputs_are_those_of_the_numbers_in_their_order(looks, layout):
    compiled, traces = looks
    for ids in map(np.array, SOME.values()):
        found = compiled[layout](ids, ids * 10, factor=np.float32(2))
        np.testing.assert_array_equal(found["logits"], 2 * LOGITS[ids])
        np.testing.assert_array_equal(found["images"], IMAGES[ids] / np.float32(PIXEL_MAX))
        np.testing.assert_array_equal(found["labels"], LABELS[ids])
        np.testing.assert_array_equal(found["parts"][0], ids * 10)
        assert all(isinstance(x, np.ndarray) for x in jax.tree.leaves(found))
    assert len(traces[layout]) == 1, "other counts are traced anew"
    found = compiled[layout](np.array([5]), np.array([50]), factor=np.float32(-3))
    np.testing.assert_array_equal(found["logits"], -3 * LOGITS[[5]])
    assert len(traces[layout]) == 1, "another factor is traced anew"


def test_layouts_agree(looks):
    compiled, _ = looks
    ids = np.array(SOME["all, backwards"])
    one, other = (compiled[layout](ids, ids, factor=np.float32(1)) for layout in ("jit", "pmap"))
    jax.tree.map(np.testing.assert_array_equal, one, other)


@each_layout
def test_a_batch_is_filled_up_with_its_last_image(looks, layout):
    ids = np.array([0, 1, 2, 0, 1, 2])
    batch = looks[0][layout](ids, ids, factor=np.float32(1))["batch"]
    np.testing.assert_array_equal(batch, [[0, 1, 2, 0]] * 4 + [[1, 2, 2, 2]] * 2)


def test_random_numbers_are_those_of_the_image(looks):
    compiled, _ = looks
    ids = np.arange(COUNT)
    noise = compiled["jit"](ids, ids, factor=np.float32(1))["noise"]
    assert len(np.unique(noise)) == noise.size
    some = np.array([20, 3, 3, 11, 0])
    found = compiled["jit"](some, some, factor=np.float32(1))["noise"]
    np.testing.assert_array_equal(found, noise[some])
    other_batches = victim(batch_size=7).compile(look)(ids[::-1])["noise"][::-1]
    np.testing.assert_array_equal(other_batches, noise)
    other_seed = victim(seed=1).compile(look)(ids)["noise"]
    assert not np.intersect1d(other_seed, noise).size


def test_another_model_in_the_place_of_the_victim_s():
    def features(params, stats, images):
        sums = images.sum((1, 2, 3))[:, None] + stats[None]
        return jnp.concatenate([sums, jnp.broadcast_to(params["weight"][:1], sums.shape)], 1)

    found = victim().compile(look, features)(np.arange(COUNT))["logits"]
    sums = IMAGES.sum((1, 2, 3), dtype=float)[:, None] / PIXEL_MAX
    np.testing.assert_array_equal(found[:, :CLASSES], sums + SHIFT)
    np.testing.assert_array_equal(found[:, CLASSES:], np.tile(WEIGHT[:1], (COUNT, 1)))


def test_images_that_are_given_are_not_read():
    one = victim()
    one.images = None
    ids, given = np.arange(5), np.float32(RNG.uniform(size=(5, *SHAPE)))
    found = one.compile(look, given=True)(ids, given, 10 * ids)
    np.testing.assert_array_equal(found["images"], given)
    np.testing.assert_array_equal(found["parts"][0], 10 * ids)


def test_what_a_victim_shows_of_itself():
    shown = victim(batch_size=5)
    assert shown.size == 5 * len(jax.local_devices())
    np.testing.assert_array_equal(shown.images, IMAGES)
    np.testing.assert_array_equal(shown.labels, LABELS)
    assert shown.pixel_max == PIXEL_MAX
    np.testing.assert_array_equal(shown.predict(IMAGES / np.float32(PIXEL_MAX)), LOGITS)


SCRIPT = """
import sys
sys.path[:0] = sys.argv[1:]
import jax, numpy as np
import test_victim
from functools import partial
from robal_jax import attacks
from robal_jax.devices import parallel

def work(logits_fn, keys, images, labels, parts, *, factor):
    threat = attacks.ThreatModel(0.1)
    shown = attacks.pgd(logits_fn, keys, images, labels, threat=threat, steps=3, step_size=0.04)
    return shown, test_victim.look(logits_fn, keys, shown, labels, parts, factor=factor)

def found(layout, devices):
    parallel.devices_for, jax.device_count = lambda layout: devices, lambda: len(devices)
    victim = test_victim.victim(batch_size=2, layout=layout)
    assert victim.size == 2 * len(devices)
    ids = np.array([22, *range(17), 3])
    shown, seen = victim.compile(work)(ids, ids * 10, factor=np.float32(2))
    del seen["batch"]  # of other images on other devices
    return shown, seen

devices = jax.devices()
one = found("jit", devices[:1])
for layout in parallel.LAYOUTS:
    jax.tree.map(np.testing.assert_array_equal, one, found(layout, devices))
    print(layout, len(devices), len(jax.tree.leaves(one)), len(one[0]))
"""


@pytest.mark.slow
def test_four_devices_give_exactly_the_outputs_of_one():
    command = [sys.executable, "-W", "error", "-c", SCRIPT, str(ROOT), str(ROOT / "tests")]
    done = subprocess.run(command, env=with_devices(4), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[:-1] == ["jit 4 6 19", "pmap 4 6 19"]
