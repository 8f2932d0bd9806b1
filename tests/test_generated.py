"""A second source of generated images: batches, class prior, resuming, devices, labels (data.generated)."""

import functools
import json
import re
import shutil
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import META, fake_results
from PIL import Image
from test_comparison import save_run

from robal_jax import builder, cli, evaluation, losses, objectives, training
from robal_jax.data import epoch_order, generated, image_folder
from robal_jax.errors import InputError
from robal_jax.evaluation import loop
from robal_jax.reporting import comparison, report
from robal_jax.reporting.results import read_runs
from robal_jax.storage.config_file import read_config
from robal_jax.storage.progress import Meter

SHARE, BATCH, MORE = 0.7, 20, 60  # 14 of 20 images are generated


def digits(*overrides, path="", share=SHARE):
    """RoBal-N on the digits with a tiny network, some epochs, and generated images if a file is named."""
    config = cli.load_config("configs/robal_n.py:digits_lt")
    with config.unlocked():
        config.model.channels, config.model.width = (4, 4, 4), 16
        config.generated.path, config.generated.share = str(path), share if path else 0.0
    settings = (
        "train.epochs=3", "train.steps_per_dispatch=4", "train.checkpoint_epochs=1", "attack.steps=1",
        f"train.batch_size={BATCH}", *overrides,
    )  # fmt: skip
    return cli.apply_overrides(config, [f"--config.{setting}" for setting in settings])


def images_and_labels(seed=0, count=MORE):
    """Of ten classes, not equally often."""
    rng = np.random.RandomState(seed)
    images = rng.randint(0, 17, (count, 8, 8, 1)).astype(np.uint8)
    return images, np.concatenate([np.arange(10), rng.randint(0, 10, count - 10) // 2])


def write(path, images, labels, names=("images", "labels")):
    np.savez(path, **dict(zip(names, (images, labels), strict=True)))
    return path


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    images, labels = images_and_labels()
    return write(tmp_path_factory.mktemp("generated") / "more.npz", images, labels)


@pytest.fixture(scope="module")
def job(file):
    return builder.training(digits(path=file))


# ---------------------------------------------------------------- which images a batch has


@pytest.mark.parametrize("share", [0.1, 0.5, 0.7, 0.29, 0.999])
@pytest.mark.parametrize("size", [8, 64, 100, 512])
def test_generated_images_are_spread_evenly_over_a_batch(share, size):
    count = generated.per_batch(share, size)
    assert count <= share * size + 1e-6 < count + 1 + 2e-6
    made = generated.places(count, size)
    assert made.sum() == count
    for parts in (1, 2, 4, 8):
        of_each = made[: size // parts * parts].reshape(parts, -1).sum(1)
        assert of_each.max() - of_each.min() <= 1


def test_an_order_shows_the_next_originals_and_draws_generated_images_with_replacement():
    originals = np.random.RandomState(1).permutation(103)
    order = functools.partial(
        generated.mixed_order, originals, batch_size=10, generated=4, first=103, number=7, seed=3
    )
    found = order(epoch=0)
    assert found.dtype == np.int32
    batches = found.reshape(10, 10)  # 103 // 10, whose last 3 originals an epoch would drop anyway
    assert ((batches >= 103).sum(1) == 4).all()
    np.testing.assert_array_equal(found[found < 103], originals[:60])
    drawn = found[found >= 103]
    assert set(drawn) == set(range(103, 110))  # all of 7 are drawn in 40 draws, and some often
    np.testing.assert_array_equal(found, order(epoch=0))
    others = [order(epoch=1), order(epoch=0, seed=4)]
    assert not any(np.array_equal(found[found >= 103], other[other >= 103]) for other in others)


def test_draws_are_uniform():
    found = generated.mixed_order(
        np.zeros(80_000, int), batch_size=8, generated=4, first=0, number=10, seed=0, epoch=0
    ).reshape(-1, 8)[:, generated.places(4, 8)]
    counts = np.bincount(found.ravel(), minlength=10)  # 40,000 draws: 4000 +- 60
    assert np.abs(counts - 4000).max() < 300


def test_batches_of_a_training(job, file):
    data, (images, labels) = job.data, images_and_labels()
    n = len(data.train_labels)
    assert job.steps_per_epoch == n // BATCH  # as without generated images
    for step in (0, 1, job.steps_per_epoch, 2 * job.steps_per_epoch + 3):
        ids = training.step_ids(job, step).ravel()
        assert (ids >= n).sum() == 14
        mine = ids[ids >= n] - n
        np.testing.assert_array_equal(np.asarray(job.images)[ids[ids >= n]], images[mine])
        np.testing.assert_array_equal(job.labels[ids[ids >= n]], labels[mine])
        np.testing.assert_array_equal(job.images[ids[ids < n]], data.train_images[ids[ids < n]])
    first = np.concatenate([training.step_ids(job, step).ravel() for step in range(job.steps_per_epoch)])
    own = epoch_order("uniform", data.train_labels, job.seed, 0)
    np.testing.assert_array_equal(first[first < n], own[: 6 * job.steps_per_epoch])
    assert len(set(first[first < n])) == 6 * job.steps_per_epoch  # each at most once


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("processes", [1, 2])
def test_processes_share_the_batches(monkeypatch, file, processes, accumulation):
    job = builder.training(digits(f"train.accumulation_steps={accumulation}", path=file))
    whole = [training.step_ids(job, step) for step in range(4)]
    monkeypatch.setattr(jax, "process_count", lambda: processes)
    shares = []
    for process in range(processes):
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        shares.append(next(training.chunks(job, 0))[0])
    np.testing.assert_array_equal(np.concatenate(shares, axis=-1), whole)
    for part in (*shares, *np.swapaxes(whole, 0, 1)):  # each with its share of both sources
        of_each = (np.asarray(part) >= len(job.data.train_labels)).mean(-1)
        assert np.abs(of_each - SHARE).max() <= 1 / np.shape(part)[-1]


def test_without_a_share_all_is_as_before():
    job = builder.training(digits())
    assert job.images is job.data.train_images
    assert job.labels is job.data.train_labels
    assert job.stored == {}
    assert not {"mixture", "prior"} & set(job.about)
    np.testing.assert_array_equal(job.order(1), epoch_order("uniform", job.data.train_labels, job.seed, 1))


# ---------------------------------------------------------------- the class prior


def test_the_prior_is_that_of_the_batches():
    """Of Wang et al.'s share and a balanced generator: 0.3 pi + 0.7 / K."""
    counts = np.array([5000, 1000, 100])
    mixture = generated.mixture_counts(counts, np.full(3, 1000), 0.7)
    assert mixture.sum() == pytest.approx(counts.sum())
    np.testing.assert_allclose(mixture / mixture.sum(), 0.3 * counts / 6100 + 0.7 / 3, rtol=1e-12)
    np.testing.assert_array_equal(generated.mixture_counts(counts, np.array([9, 1, 1]), 0.0), counts)


def test_a_class_that_would_vanish_is_refused():
    with pytest.raises(InputError, match=r"class 1 has 0.31 of 101 images in the mixture .*; generate more"):
        generated.mixture_counts(np.array([100, 1]), np.array([10**6, 1]), 0.69)


@pytest.mark.slow
def test_a_training_knows_the_prior_of_its_batches(file, monkeypatch):
    """Its loss and its head; the groups of an evaluation stay those of the originals."""
    seen = {}

    def objective(model, params, stats, batch, *, loss, class_counts):
        seen["loss"], seen["counts"] = loss, class_counts

    monkeypatch.setitem(objectives.OBJECTIVES, "seeing", objective)
    config = digits(path=file)
    config.objective, config.loss = {"name": "seeing"}, {"name": "logit_adjustment", "tau": 1.0}
    config.head = {"name": "linear", "bias": "prior"}
    job = builder.training(config)
    job.objective(None, None, None, objectives.Batch(None, jnp.arange(1), None, 1))
    n, g = job.data.class_counts, np.bincount(images_and_labels()[1])
    prior = 0.3 * n / n.sum() + 0.7 * g / g.sum()
    np.testing.assert_allclose(seen["counts"] / seen["counts"].sum(), prior, rtol=1e-12)
    logits, labels = jnp.asarray(np.random.RandomState(0).randn(10, 10)), jnp.arange(10)
    expected = losses.cross_entropy(logits + jnp.log(prior)[None, :], labels)
    np.testing.assert_allclose(seen["loss"](logits, labels), expected, rtol=1e-5)
    params, _ = job.model.init(jax.random.key(0), jnp.zeros((1, 8, 8, 1)))
    np.testing.assert_allclose(params["classifier"]["bias"], np.log(prior / (1 - prior)), rtol=1e-4)
    # The batches have it: a long run of them.
    shown = np.concatenate([job.labels[job.order(epoch)] for epoch in range(150)])
    np.testing.assert_allclose(np.bincount(shown) / len(shown), prior, atol=0.006)


def test_what_a_training_says(job, file):
    assert job.about["prior"] == "class prior: of the mixture, 30 % originals + 70 % generated"
    balanced = builder.training(digits("train.sampler=class_aware", path=file)).about["prior"]
    assert balanced == "class prior: of the mixture as drawn uniformly, 30 % originals + 70 % generated"
    assert job.about["mixture"].startswith(f"14 of the 20 images of each batch are generated, from {file}: ")
    assert "60 images of 10 classes" in job.about["mixture"]
    assert job.about["data"] == builder.training(digits()).about["data"]  # of the originals


# ---------------------------------------------------------------- files and folders


@pytest.mark.parametrize("names", [("images", "labels"), ("image", "label")])
@pytest.mark.parametrize("dtype", [np.int64, np.uint8])
def test_names_of_arrays(tmp_path, job, names, dtype):
    images, labels = images_and_labels()
    found = generated.load_generated(
        str(write(tmp_path / "more.npz", images, labels.astype(dtype), names)), job.data
    )
    np.testing.assert_array_equal(found.images, images)
    np.testing.assert_array_equal(found.labels, labels)
    assert found.labels.dtype == np.int32


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A data set of image files, and folders of generated images named after its classes or their numbers."""
    root, rng = tmp_path_factory.mktemp("images"), np.random.RandomState(0)
    for split, names, count, size in (
        ("train", ("ant", "bee"), 12, 8),
        ("val", ("ant", "bee"), 2, 8),
        ("named", ("bee", "ant"), 3, 8),
        ("numbered", ("0", "1"), 3, 20),
        ("others", ("ant", "cat"), 3, 8),
    ):
        for name in names:
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = rng.randint(0, 256, (size, size, 3)).astype(np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{i}.png")
    return root


def of_files(root, in_memory=False):
    data = image_folder.load_image_folder(str(root), image_size=8, resize=8)
    return data._replace(train_images=data.train_images[:]) if in_memory else data


@pytest.mark.parametrize("in_memory", [True, False])
@pytest.mark.parametrize("name", ["named", "numbered"])
def test_a_folder_of_generated_images(folders, name, in_memory):
    data = of_files(folders, in_memory)
    found = generated.load_generated(str(folders / name), data)
    np.testing.assert_array_equal(found.labels, [0, 0, 0, 1, 1, 1])
    images = generated.joined(data.train_images, found.images)
    assert (images.shape, images.dtype, len(images)) == ((30, 8, 8, 3), np.uint8, 30)
    both = np.concatenate([data.train_images[:], found.images[:]])
    for ids in (np.arange(30), np.array([[29, 0], [5, 24]]), np.array([25]), np.array([3]), 27):
        np.testing.assert_array_equal(images[ids], both[ids])
    np.testing.assert_array_equal(images[20:28:2], both[20:28:2])


def no_npz(path):
    path.write_bytes(b"no zip")


def damaged(path):
    write(path, *images_and_labels(count=2000))
    path.write_bytes(path.read_bytes()[:-400])


def other_arrays(path):
    np.savez(path, x=np.zeros(3))


def pickled(path):
    np.savez(path, images=np.array([{}], object), labels=np.zeros(1, int))


def changed(images=lambda x: x, labels=lambda y: y):
    def make(path):
        of_images, of_labels = images_and_labels()
        write(path, images(of_images), labels(of_labels))

    return make


BROKEN = {
    "no_file": (lambda path: None, r"no file or folder .*; correct config.generated.path"),
    "no_npz": (no_npz, r"cannot read .* as an .npz file of generated images \(.*\); write it again"),
    "damaged": (damaged, r"cannot read .* as an .npz file of generated images"),
    "pickled": (pickled, r"cannot read .* as an .npz file of generated images"),
    "other_arrays": (other_arrays, r"holds x; store the arrays images and labels"),
    "floats": (changed(lambda x: x / 16), r"images are float64 \[60, 8, 8, 1\]; store uint8 \[M, H, W, C\]"),
    "flat": (changed(lambda x: x[..., 0]), r"images are uint8 \[60, 8, 8\]; store uint8"),
    "larger": (
        changed(lambda x: x.repeat(2, 1)),
        r"generated images are \[16, 8, 1\] and training images \[8, 8, 1\]; give both the same size",
    ),
    "coloured": (changed(lambda x: x.repeat(3, 3)), r"are \[8, 8, 3\] and training images \[8, 8, 1\]"),
    "brighter": (changed(lambda x: 2 * x), r"have pixels up to 32, training images up to 16; give both the"),
    "float_labels": (changed(labels=lambda y: y / 1), r"labels are float64 \[60\]; store 60 integers"),
    "few_labels": (changed(labels=lambda y: y[1:]), r"labels are int64 \[59\]; store 60 integers, one per"),
    "eleven": (changed(labels=lambda y: y + 1), r"generated images: labels 1..10 found, but 10 classes need"),
    "negative": (changed(labels=lambda y: y - 1), r"generated images: labels -1..8 found"),
    "five": (changed(labels=lambda y: y % 5), r"generated images: class 5 has no image; give at least one"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_file_that_cannot_be_used_gives_one_line(tmp_path, name):
    make, message = BROKEN[name]
    make(tmp_path / "more.npz")
    with pytest.raises(InputError, match=message) as raised:
        builder.training(digits(path=tmp_path / "more.npz"))
    assert len(str(raised.value).splitlines()) == 1
    assert "more.npz" in str(raised.value)


def test_folders_that_cannot_be_used(folders, job):
    data = of_files(folders)
    with pytest.raises(
        InputError, match="others has a sub-folder 'cat', which is no class of the data set; "
    ):
        generated.load_generated(str(folders / "others"), data)
    with pytest.raises(InputError, match=r"class \d has no image"):  # of the digits 0 and 1 only
        generated.load_generated(str(folders / "numbered"), job.data)
    ten = data._replace(class_names=("ant", "bee", "cat"))
    with pytest.raises(InputError, match="named: generated images: class 2 has no image"):
        generated.load_generated(str(folders / "named"), ten)


@pytest.mark.parametrize(
    ("path", "share", "message"),
    [
        ("x.npz", 1.0, r"config.generated.share is 1.0; it must be in \[0, 1\)"),
        ("x.npz", -0.1, r"config.generated.share is -0.1; it must be in"),
        ("x.npz", float("nan"), r"config.generated.share is nan; it must be in"),
        ("x.npz", 0.0, "config.generated.path is 'x.npz', but config.generated.share is 0; set a share in"),
        ("", 0.7, "config.generated.share is 0.7, but config.generated.path is empty; name an .npz file"),
        ("x.npz", 0.04, "config.generated.share 0.04 of config.train.batch_size 20 is 0 images; set a share"),
        ("x.npz", 1 - 1e-12, "config.train.batch_size 20 is 20 images; set a share that leaves at least one"),
    ],
)
@pytest.mark.parametrize("use", [builder.training, builder.check])
def test_settings_that_cannot_be_used(use, path, share, message):
    config = digits()
    config.generated.path, config.generated.share = path, share
    with pytest.raises(InputError, match=message) as raised:
        use(config)
    assert len(str(raised.value).splitlines()) == 1


# ---------------------------------------------------------------- runs


def train(config, workdir):
    lines = []
    path = training.train(config, workdir, say=lines.append)
    return path, lines[-1].split()[-1], lines


@pytest.fixture(scope="module")
def finished(tmp_path_factory, file):
    workdir = tmp_path_factory.mktemp("runs") / "finished"
    _, sha256, lines = train(digits(path=file), workdir)
    return workdir, sha256, lines


@pytest.mark.long
@pytest.mark.slow
def test_a_stopped_run_resumes_with_the_same_bits(finished, file, tmp_path, monkeypatch):
    looks = []

    def stop(self, done, note=""):
        looks.append(done)
        if len(looks) == 7:  # in the second epoch
            signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patched:
        patched.setattr(Meter, "update", stop)
        path, _, _ = train(digits(path=file), tmp_path)
    steps = builder.training(digits()).steps_per_epoch
    assert steps < int(path.name) < 2 * steps
    _, sha256, lines = train(digits(path=file), tmp_path)
    assert any(line.startswith("resuming at step") for line in lines)
    assert sha256 == finished[1]


@pytest.mark.slow
def test_generated_images_change_the_run(finished, tmp_path):
    workdir, sha256, lines = finished
    assert any(re.match("prior +class prior: of the mixture, 30 % originals", line) for line in lines)
    assert train(digits(), tmp_path)[1] != sha256
    stored = json.loads((workdir / "versions.json").read_text())
    plain = json.loads((tmp_path / "versions.json").read_text())
    assert stored["data_sha256"] == plain["data_sha256"]
    assert set(stored) - set(plain) == {"generated_sha256", "class_counts"}


@pytest.mark.slow
def test_other_generated_images_are_refused(finished, tmp_path, file):
    workdir = shutil.copytree(finished[0], tmp_path / "run")
    images, labels = images_and_labels()
    moved = write(tmp_path / "moved.npz", images, labels)
    assert train(digits(path=moved), workdir)[1] == finished[1]  # the same images at another place
    other = write(tmp_path / "other.npz", images[::-1], labels)
    with pytest.raises(InputError, match=r"different config \(generated data: sha256 .*… here, .*… there\)"):
        train(digits(path=other), workdir)
    with pytest.raises(InputError, match=r"generated.share: 0.5 here, 0.7 there"):
        train(digits(path=file, share=0.5), workdir)


@pytest.mark.parametrize("in_memory", [True, False])
def test_images_in_files_are_streamed(folders, tmp_path, in_memory):
    """A run on files of both sources, and on arrays of both: the same weights."""
    data = of_files(folders)
    found = generated.load_generated(str(folders / "named"), data)
    images = generated.joined(data.train_images, found.images)
    assert not isinstance(images, np.ndarray)
    order = generated.mixed_order(
        np.arange(24), batch_size=8, generated=4, first=24, number=6, seed=0, epoch=0
    ).reshape(3, 8)
    read = image_folder.stream(images, lambda step: order[step], range(3), threads=2 * in_memory, ahead=1)
    whole = np.concatenate([data.train_images[:], found.images[:]])
    for step, shown in enumerate(read):
        np.testing.assert_array_equal(shown, whole[order[step]])


# ---------------------------------------------------------------- evaluations


@pytest.mark.slow
def test_an_evaluation_needs_no_generated_images_and_says_that_there_were_some(
    finished, tmp_path, monkeypatch
):
    workdir = shutil.copytree(finished[0], tmp_path / "run")
    config = read_config(workdir)
    config.generated.path = "/nowhere.npz"
    (workdir / "config.json").write_text(config.to_json_best_effort())
    config = read_config(workdir)
    monkeypatch.setattr(loop, "attack_and_report", lambda subject, *_: jobs.append(subject.job) or True)
    jobs = []
    evaluation.evaluate(config, workdir, say=lambda line: None)
    (job,) = jobs
    assert job.about["generated"] == "uses generated data (70 % of each batch)"
    original = builder.evaluation(digits())
    assert "generated" not in original.about
    assert {name: list(group) for name, group in job.groups.items()} == {
        name: list(group) for name, group in original.groups.items()
    }
    np.testing.assert_array_equal(job.test.class_counts, original.test.class_counts)
    run = evaluation.load_run(workdir)
    assert run.logits(run.test.images[:2]).shape == (2, 10)


@pytest.mark.slow
def test_an_evaluation_removes_the_prior_of_the_mixture(finished):
    """With tau_p: what the balanced softmax would have added in training."""
    configs = [
        cli.apply_overrides(read_config(finished[0]), [f"--config.evaluation.tau_p={tau}"])
        for tau in (0.0, 1.0)
    ]
    stored = json.loads((finished[0] / "versions.json").read_text())["class_counts"]
    plain, job = (builder.evaluation(config, np.array(stored)) for config in configs)
    assert job.about["prior_adjustment"] == "logits - 1 log prior of the mixture with generated data"
    params, stats = (jax.tree.map(lambda x: jnp.ones(x.shape), job.variables[k]) for k in ("params", "stats"))
    images = jnp.zeros((2, 8, 8, 1))
    n, g = job.test.class_counts, np.bincount(images_and_labels()[1])
    prior = 0.3 * n / n.sum() + 0.7 * g / g.sum()
    found = plain.predict(params, stats, images) - job.predict(params, stats, images)
    np.testing.assert_allclose(found, np.tile(np.log(prior), (2, 1)), rtol=1e-4)


@pytest.mark.slow
def test_results_carry_the_label(tmp_path):
    label = "uses generated data (70 % of each batch)"
    report.write_report(tmp_path / "report", fake_results(meta={**META, "generated": label}))
    for name in ("report.md", "report.html", "results.json"):
        assert label in (tmp_path / "report" / name).read_text()
    runs = [save_run(tmp_path / "with", generated=label), save_run(tmp_path / "without", method="AT")]
    table = comparison.compare(read_runs(runs))[0]
    assert [label in row[0] for row in table.rows] == [True, False]
