"""Training and evaluation on images that stay in files (robal_jax.folders, as train and evaluate use it)."""

import inspect
import json
import shutil

import jax
import numpy as np
import pytest
from PIL import Image

from experiments.benchmarks.layouts import Layout, finish, start
from robal_jax import (
    builder,
    cli,
    evaluation,
    training,
)
from robal_jax.data import image_folder
from robal_jax.devices import hosts
from robal_jax.errors import InputError
from robal_jax.storage import checkpoints

CLASSES, COUNTS, SIZE, STORED = 4, (24, 12, 6, 3), 8, 10


CONFIG = """
from configs import base, fast

def get_config():
    config = fast.get_config("imagenet_lt")
    config.model = base.ConfigDict({"name": "small_cnn", "channels": (4, 4, 4), "width": 16})
    return config
"""


def in_memory(**options):
    """What the folder holds, as arrays."""
    files = image_folder.load_image_folder(**options)
    return files._replace(train_images=files.train_images[:], test_images=files.test_images[:])


in_memory.__signature__ = inspect.signature(image_folder.load_image_folder)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A long-tailed set of generated images: a folder with one sub-folder a class, and lists of the same."""
    root, rng = tmp_path_factory.mktemp("images"), np.random.RandomState(0)
    for split, counts in (("train", COUNTS), ("val", (5,) * CLASSES)):
        lines = []
        for label, count in enumerate(counts):
            folder = root / split / f"n{label:04d}"
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = rng.randint(0, 60, (STORED + 2, STORED, 3))
                pixels[:, :, label % 3] += 40 + 50 * (label // 3)
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i:02d}.png")
                lines.append(f"{split}/n{label:04d}/{i:02d}.png {label}")
        (root / f"{split}.txt").write_text("\n".join(lines) + "\n")
    (root / "config.py").write_text(CONFIG)
    return root


def settings(root):
    """Of all runs here."""
    fields = (
        f"data.path={root}", "data.train_list=train.txt", "data.test_list=val.txt",
        f"data.image_size={SIZE}", f"data.resize={STORED}",
        "train.batch_size=8", "train.epochs=3", "train.steps_per_dispatch=2", "train.checkpoint_epochs=1",
        "evaluation.batch_size=10", "evaluation.autoattack=apgd_ce", "evaluation.audit.examples=0",
    )  # fmt: skip
    return [f"--config.{field}" for field in fields]


def config(root, *overrides, source="image_folder"):
    made = cli.load_config(str(root / "config.py"))
    made.data.name = source
    return cli.apply_overrides(made, [*settings(root), *(f"--config.{field}" for field in overrides)])


def run(workdir, *arguments, **keywords):
    """Trains; the sha256 of the last checkpoint."""
    said = []
    training.train(config(*arguments, **keywords), workdir, say=said.append)
    return said[-1].split("sha256 ")[1]


@pytest.fixture(scope="module")
def streamed(root, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("streamed") / "run"
    return workdir, run(workdir, root)


@pytest.mark.slow
def test_files_train_as_arrays_do(root, streamed, tmp_path):
    assert run(tmp_path, root, source="test_streaming:in_memory") == streamed[1]
    losses = [json.loads(line)["loss"] for line in (streamed[0] / "metrics.jsonl").read_text().splitlines()]
    assert len(losses) == 3 * 3  # five steps an epoch, in chunks of two


@pytest.mark.slow
def test_training_says_how_many_images_each_class_has(root, streamed):
    said = []
    training.train(config(root), streamed[0], say=said.append)
    assert said[0].startswith("resuming at step 15 of 15")
    counts = builder.dataset(config(root)).class_counts
    assert said[1].startswith(f"train set: {counts.sum()} images of {CLASSES} classes (n0000: {counts[0]}, ")
    assert said[2].startswith(f"test set: {5 * CLASSES} images of {CLASSES} classes (n0000: 5, ")


@pytest.mark.slow
def test_a_folder_trains_as_its_list_does(root, streamed, tmp_path):
    lists = ("data.train_list=", "data.test_list=")
    assert run(tmp_path, root, *lists) == streamed[1]


def run_until(stop_at, workdir, root, monkeypatch):
    """Trains and is stopped when it has looked so often whether it shall; the step of its checkpoint."""
    calls = []

    class Stop(hosts.Stop):
        def __bool__(self):
            calls.append(1)
            return len(calls) > stop_at

    with monkeypatch.context() as patched:
        patched.setattr(hosts, "Stop", Stop)
        run(workdir, root)
    return checkpoints.steps(workdir / "checkpoints")[-1]


@pytest.mark.long
@pytest.mark.slow
def test_two_processes_go_on_and_read_their_own_images(root, streamed, tmp_path, monkeypatch):
    assert run_until(1, tmp_path / "run", root, monkeypatch) == 2
    arguments = [f"--config={root / 'config.py'}", f"--workdir={tmp_path / 'run'}", *settings(root)]
    first, second = finish(start(Layout("pmap", 2, 2), [*arguments, "--config.train.layout=pmap"]))
    assert first.startswith("resuming at step 2 of 15 ")
    assert second == ""  # only the first one speaks
    one, two = (checkpoints.read_latest(workdir).tree for workdir in (streamed[0], tmp_path / "run"))
    gaps = jax.tree.map(lambda a, b: np.max(np.abs(a - b)), one["params"], two["params"])
    # As for every layout: float32 sums in another order, 2^-24 an addition, over 15 steps.
    assert np.max(jax.tree.leaves(gaps)) < 1e-4


@pytest.mark.slow
def test_number_of_threads_changes_nothing(root, streamed, tmp_path):
    assert run(tmp_path, root, "train.reading_threads=1") == streamed[1]


@pytest.mark.slow
@pytest.mark.parametrize("stop_at", [1, 3, 5])
def test_stopped_in_mid_epoch_and_continued(root, streamed, tmp_path, monkeypatch, stop_at):
    step = run_until(stop_at, tmp_path, root, monkeypatch)
    assert step == {1: 2, 3: 5, 5: 9}[stop_at]
    read, seen = image_folder.ImageFiles.__getitem__, []
    monkeypatch.setattr(
        image_folder.ImageFiles, "__getitem__", lambda self, ids: seen.append(np.size(ids)) or read(self, ids)
    )
    assert run(tmp_path, root) == streamed[1]
    assert sum(seen) == 8 * (15 - step)  # what came before is not read again


@pytest.mark.slow
def test_other_files_are_noticed_at_a_resume(root, streamed, tmp_path):
    lists = (root / "train.txt").read_text().splitlines()
    (root / "other.txt").write_text("\n".join([*lists[1:], lists[1]]) + "\n")
    with pytest.raises(InputError, match=r"data: sha256|train_list"):
        run(streamed[0], root, "data.train_list=other.txt")


@pytest.mark.slow
def test_evaluation_reads_files_as_arrays(root, streamed, tmp_path):
    outcomes, said = [], []
    weights = tmp_path / "weights"  # without the run's config, which has the files as its data
    shutil.copytree(streamed[0] / "checkpoints", weights / "checkpoints")
    for source in ("image_folder", "test_streaming:in_memory"):
        folder = tmp_path / source.partition(":")[0]
        evaluation.evaluate(config(root, source=source), weights, folder=folder, say=said.append)
        with np.load(folder / "examples.npz") as file:
            outcomes.append(dict(file))
    assert any(line.startswith("test set: ") for line in said)
    assert len(outcomes[0]["labels"]) == 5 * CLASSES
    for name in outcomes[0]:
        np.testing.assert_array_equal(outcomes[0][name], outcomes[1][name], err_msg=name)


def test_a_damaged_file_is_named(root, tmp_path):
    (root / "damaged.png").write_bytes((root / "train/n0000/00.png").read_bytes()[:50])
    (root / "damaged.txt").write_text((root / "train.txt").read_text() + "damaged.png 0\n" * 8)
    with pytest.raises(InputError, match=r"damaged\.png"):
        run(tmp_path, root, "data.train_list=damaged.txt")
