"""Digits, CIFAR from .npz files and CIFAR prepared by TFDS (robal_jax.sources, prepare_data.py)."""

import inspect
import io
import json
import os
import pathlib
import socket
import subprocess
import sys

import helpers
import numpy as np
import pytest
from PIL import Image

from experiments import prepare_data as script
from robal_jax.data import cifar, sources
from robal_jax.errors import InputError

REPO = pathlib.Path(__file__).resolve().parents[1]
PER_CLASS = {"train": 6, "test": 2}
LT = {"ratio": 0.5, "n_max": 6}
COUNTS = [int(6 * 0.5 ** (i / 9)) for i in range(10)]


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """Whatever a loader does, it must not open a connection."""

    def refuse(*args, **kwargs):
        raise AssertionError("a loader tried to use the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def fake_cifar():
    """A tiny CIFAR-10: the arrays of the .npz form, random pixels, labels in random order."""
    rng = np.random.default_rng(0)
    arrays = {}
    for split, per_class in PER_CLASS.items():
        arrays[f"{split}_labels"] = rng.permutation(np.repeat(np.arange(10, dtype=np.uint8), per_class))
        arrays[f"{split}_images"] = rng.integers(0, 256, (10 * per_class, 32, 32, 3), dtype=np.uint8)
    return arrays


def write_npz(folder, **changes):
    file = folder / "cifar10.npz"
    np.savez(file, **{key: value for key, value in (fake_cifar() | changes).items() if value is not None})
    return str(file)


def write_tfds(data_dir, name="cifar10", version="3.0.2", main_format="array_record", record=lambda r: r):
    """The tiny CIFAR-10 as TFDS stores it, its records shuffled; TensorFlow is not needed."""
    from array_record.python import array_record_module
    from tensorflow_datasets.proto import tf_example_pb2

    folder = data_dir / name / version
    folder.mkdir(parents=True)
    arrays = fake_cifar()
    splits = []
    for split in PER_CLASS:
        images, labels = arrays[f"{split}_images"], arrays[f"{split}_labels"]
        file = folder / f"{name}-{split}.array_record-00000-of-00001"
        writer = array_record_module.ArrayRecordWriter(str(file), "group_size:1")
        for i in np.random.default_rng(1).permutation(len(labels)):
            png = io.BytesIO()
            Image.fromarray(images[i]).save(png, "PNG")
            values = record({"id": f"{split}_{i:05d}", "image": png.getvalue(), "label": int(labels[i])})
            example = tf_example_pb2.Example()
            feature = example.features.feature
            feature["id"].bytes_list.value.append(values["id"].encode())
            feature["image"].bytes_list.value.append(values["image"])
            feature["label"].int64_list.value.append(values["label"])
            writer.write(example.SerializeToString())
        writer.close()
        splits.append(
            {
                "name": split,
                "shardLengths": [str(len(labels))],
                "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
            }
        )
    info = {"name": name, "version": version, "fileFormat": main_format, "splits": splits}
    if main_format != "array_record":
        info["alternativeFileFormats"] = ["array_record"]
    (folder / "dataset_info.json").write_text(json.dumps(info))
    module = "tensorflow_datasets.core.features."
    shape = {"dimensions": ["32", "32", "3"]}
    features = {
        "id": {"pythonClassName": module + "text_feature.Text", "text": {}},
        "image": {
            "pythonClassName": module + "image_feature.Image",
            "image": {"dtype": "uint8", "shape": shape},
        },
        "label": {
            "pythonClassName": module + "class_label_feature.ClassLabel",
            "classLabel": {"numClasses": "10"},
        },
    }
    (folder / "features.json").write_text(
        json.dumps(
            {
                "pythonClassName": module + "features_dict.FeaturesDict",
                "featuresDict": {"features": features},
            }
        )
    )
    return folder


def same(one, other):
    return all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


def refused(message, **arguments):
    """Loads CIFAR-10-LT, which must be refused."""
    text = helpers.refused(message, cifar.load_cifar_lt, "cifar10", **(LT | arguments))
    assert "InputError" not in text  # a message of ours must not be quoted in another


# ---------------------------------------------------------------- digits


def test_digits_defaults():
    dataset = sources.load_digits_lt()
    assert dataset.class_counts.tolist() == [104, 74, 53, 38, 27, 19, 14, 10, 7, 5]
    assert dataset.train_images.shape == (351, 8, 8, 1)
    assert dataset.test_images.shape == (700, 8, 8, 1)
    assert np.bincount(dataset.test_labels).tolist() == [70] * 10
    assert dataset.pixel_max == 16
    assert (dataset.train_images.max(), dataset.train_images.min()) == (16, 0)
    assert (np.diff(dataset.train_labels) >= 0).all()


def test_digits_are_those_of_scikit_learn_and_train_and_test_are_apart():
    from sklearn.datasets import load_digits

    dataset = sources.load_digits_lt(seed=3)
    digits = load_digits()
    label_of = {}
    for image, label in zip(digits.images, digits.target, strict=True):
        label_of[image.astype(np.uint8).tobytes()] = str(label)
    assert len(label_of) == len(digits.target)  # no image occurs twice: the sets can be compared
    train = [image.tobytes() for image in dataset.train_images]
    test = [image.tobytes() for image in dataset.test_images]
    assert len(set(train) | set(test)) == len(train) + len(test)
    assert [label_of[image] for image in train] == [dataset.class_names[i] for i in dataset.train_labels]
    assert [label_of[image] for image in test] == [dataset.class_names[i] for i in dataset.test_labels]


def test_digits_seed_draws_classes_and_images():
    names = {sources.load_digits_lt(seed=seed).class_names for seed in range(4)}
    assert len(names) == 4
    assert all(sorted(n) == [str(d) for d in range(10)] for n in names)
    assert same(sources.load_digits_lt(seed=1), sources.load_digits_lt(seed=1))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"head": 105}, "70 for the test set leave 104 for training, fewer than head 105"),
        ({"test_per_class": 0}, "lower head or test_per_class"),
        ({"head": 0}, "a head of 0 images"),
        ({"ratio": 0.001}, "leaves class 7 without an image .*; set it to at least 0.0096"),
        ({"profile": "flat"}, "use one of exp, step"),
    ],
)
def test_digits_refused(arguments, message):
    with pytest.raises(InputError, match=message):
        sources.load_digits_lt(**arguments)


# ---------------------------------------------------------------- CIFAR in an .npz file


def test_npz_gives_the_subset_and_the_whole_test_set(tmp_path):
    dataset = cifar.load_cifar_lt("cifar10", write_npz(tmp_path), **LT)
    arrays = fake_cifar()
    rng = np.random.RandomState(0)
    kept = []
    for label, count in enumerate(COUNTS):
        positions = np.where(arrays["train_labels"] == label)[0]
        rng.shuffle(positions)
        kept += positions[:count].tolist()
    assert np.array_equal(dataset.train_images, arrays["train_images"][kept])
    assert dataset.class_counts.tolist() == COUNTS
    assert dataset.train_labels.dtype == np.int32
    assert np.array_equal(dataset.test_images, arrays["test_images"])
    assert np.array_equal(dataset.test_labels, arrays["test_labels"])
    assert dataset.pixel_max == 255
    assert dataset.class_names[0] == "airplane"


def test_npz_seed_changes_the_subset(tmp_path):
    file = write_npz(tmp_path)
    assert not same(
        cifar.load_cifar_lt("cifar10", file, **LT), cifar.load_cifar_lt("cifar10", file, seed=1, **LT)
    )


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_npz_floats_of_k_over_255_are_the_same_images(tmp_path, dtype):
    (tmp_path / "float").mkdir()
    floats = {
        key: (value / 255).astype(dtype) for key, value in fake_cifar().items() if key.endswith("images")
    }
    assert same(
        cifar.load_cifar_lt("cifar10", write_npz(tmp_path), **LT),
        cifar.load_cifar_lt("cifar10", write_npz(tmp_path / "float", **floats), **LT),
    )


def images(split, dtype=np.float32):
    return fake_cifar()[f"{split}_images"].astype(dtype)


def labels(split, **changes):
    values = fake_cifar()[f"{split}_labels"].astype(np.int64)
    for old, new in changes.values():
        values[values == old] = new
    return values


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"test_labels": None}, "lacks test_labels; it holds train_labels.*; write test_images"),
        ({"train_images": images("train")}, r"values in \[0, 255\], outside \[0,1\]"),
        ({"test_images": images("test") / 255 - 0.5}, r"test_images: values in \[-0.5, 0.5\]"),
        ({"train_images": images("train") * np.nan}, r"values in \[nan, nan\], outside \[0,1\]"),
        ({"train_images": images("train") / 256}, "away from k/255 with whole k"),
        ({"train_images": images("train", np.float16) / 255}, "away from k/255 with whole k"),
        ({"train_images": images("train", np.int64)}, "train_images is int64; store uint8, or floats"),
        (
            {"test_images": images("test").transpose(0, 3, 1, 2)},
            r"has shape \[20, 3, 32, 32\]; store \[N, 32, 32, 3\]",
        ),
        ({"test_images": images("test").reshape(20, -1)}, r"has shape \[20, 3072\]; store \[N, 32, 32, 3\]"),
        ({"train_labels": labels("train")[:-1]}, r"train_labels is int64 \[59\]; store 60 integers"),
        ({"train_labels": labels("train")[:, None]}, r"train_labels is int64 \[60, 1\]; store 60 integers"),
        ({"test_labels": labels("test") / 2}, "test_labels is float64 .*; store 20 integers"),
        ({"train_labels": labels("train", a=(3, 10))}, r"train set: labels 0..10 found.* labels 0..9"),
        ({"train_labels": labels("train", a=(3, -1))}, r"train set: labels -1..9 found"),
        ({"train_labels": labels("train", a=(9, 8))}, "train set: class 9 has no image"),
        ({"test_labels": labels("test", a=(4, 5))}, "test set: class 4 has no image"),
        ({"train_images": np.array([None] * 60)}, "cannot read .* Object arrays cannot be loaded"),
    ],
)
def test_npz_with_wrong_arrays(tmp_path, changes, message):
    refused(message, path=write_npz(tmp_path, **changes))


def test_npz_with_too_few_images_for_the_full_counts(tmp_path):
    refused("class 0 has 6 images but .* needs 5000", path=write_npz(tmp_path), n_max=None)


def test_npz_missing_says_how_to_get_it(tmp_path):
    refused(
        r"no file .*none\.npz with cifar10; get it with `python experiments/prepare_data\.py "
        r"--dataset=cifar10 --data_dir=DIR`, or give `--config\.data\.path=FILE\.npz` with arrays train_",
        path=str(tmp_path / "none.npz"),
    )


def truncate(content):
    return content[: len(content) // 2]


def flip_pixels(content):
    middle = len(content) // 2
    return (
        content[:middle] + bytes(255 - byte for byte in content[middle : middle + 9]) + content[middle + 9 :]
    )


def bare_array(content):
    file = io.BytesIO()
    np.save(file, np.zeros(3))
    return file.getvalue()


@pytest.mark.parametrize(
    "damage", [truncate, flip_pixels, bare_array, lambda content: b"", lambda content: b"not a zip file"]
)
@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz_damaged(tmp_path, damage, save):
    file = tmp_path / "cifar10.npz"
    save(file, **fake_cifar())
    file.write_bytes(damage(file.read_bytes()))
    refused(r"cannot read .*cifar10\.npz as an \.npz file \(\w+.*\); write it again", path=str(file))


# ---------------------------------------------------------------- CIFAR prepared by TFDS


@pytest.fixture(scope="module")
def tfds_dir(tmp_path_factory):
    """A TFDS data folder with the tiny CIFAR-10."""
    folder = tmp_path_factory.mktemp("tfds")
    write_tfds(folder)
    return folder


def test_tfds_gives_the_same_data_set_as_npz(tfds_dir, tmp_path, monkeypatch):
    expected = cifar.load_cifar_lt("cifar10", write_npz(tmp_path), **LT)
    assert same(cifar.load_cifar_lt("cifar10", str(tfds_dir), **LT), expected)
    assert same(cifar.load_cifar_lt("cifar10", str(tfds_dir / "cifar10" / "3.0.2"), **LT), expected)
    monkeypatch.setenv("TFDS_DATA_DIR", str(tfds_dir))
    assert same(cifar.load_cifar_lt("cifar10", **LT), expected)


def test_tfds_decodes_only_what_is_needed(tfds_dir, monkeypatch):
    decoded = []
    decode = cifar.decode_png
    monkeypatch.setattr(cifar, "decode_png", lambda png: decoded.append(png) or decode(png))
    cifar.load_cifar_lt("cifar10", str(tfds_dir), **LT)
    assert len(decoded) == sum(COUNTS) + 20


def test_tfds_array_record_added_beside_tfrecord(tmp_path):
    folder = write_tfds(tmp_path / "both", main_format="tfrecord")
    for split in PER_CLASS:
        (folder / f"cifar10-{split}.tfrecord-00000-of-00001").write_bytes(b"")
    assert same(
        cifar.load_cifar_lt("cifar10", str(tmp_path / "both"), **LT),
        cifar.load_cifar_lt("cifar10", write_npz(tmp_path), **LT),
    )


def test_tfds_with_tfrecord_only(tmp_path):
    folder = write_tfds(tmp_path, main_format="tfrecord")
    for file in folder.glob("*.array_record*"):
        file.rename(str(file).replace("array_record", "tfrecord"))
    refused(r"has no \*\.array_record\* file.* prepare cifar10 as array_record", path=str(tmp_path))


def test_tfds_newest_version_is_found(tmp_path):
    for version in ("3.0.2", "3.0.10", "2.9.9", "3.0.11.incomplete"):
        (tmp_path / "cifar10" / version).mkdir(parents=True)
        (tmp_path / "cifar10" / version / "dataset_info.json").write_text("{}")
    assert cifar.find_tfds("cifar10", str(tmp_path)).name == "3.0.10"
    assert cifar.find_tfds("cifar100", str(tmp_path)) is None


def test_tfds_default_folder(monkeypatch):
    monkeypatch.delenv("TFDS_DATA_DIR", raising=False)
    assert cifar.tfds_folder() == pathlib.Path.home() / "tensorflow_datasets"


def test_tfds_not_found_names_the_place_and_both_ways(tmp_path):
    refused(
        rf"cifar10 not found: no {tmp_path}/cifar10/VERSION/dataset_info\.json; get it with `python "
        r"experiments/prepare_data\.py --dataset=cifar10 .*`--config\.data\.path=FILE\.npz`",
        path=str(tmp_path),
    )


def test_tfds_folder_of_another_set(tmp_path):
    folder = write_tfds(tmp_path, name="cifar100")
    refused("holds cifar100, not cifar10; give the folder of cifar10", path=str(folder))


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (lambda r: r | {"image": r["image"][:60]}, "cannot read .*; delete it and prepare cifar10 again"),
        (lambda r: r | {"id": "train_00007"}, r"ValueError: ids are not 0\.\.59, each once"),
        (lambda r: r | {"id": "seven"}, r"cannot read .*IndexError"),
    ],
)
def test_tfds_with_bad_records(tmp_path, record, message):
    write_tfds(tmp_path, record=record)
    refused(message, path=str(tmp_path))


@pytest.mark.parametrize(
    "name", ["dataset_info.json", "features.json", "cifar10-test.array_record-00000-of-00001"]
)
@pytest.mark.parametrize("content", [b"{", None])
def test_tfds_damaged(tmp_path, name, content):
    file = write_tfds(tmp_path) / name
    if content is None:
        file.unlink()
    else:
        file.write_bytes(content)
    missing_info = content is None and name == "dataset_info.json"
    refused(
        "cifar10 not found" if missing_info else "cannot read .* delete it and prepare", path=str(tmp_path)
    )


@pytest.mark.slow
def test_tfds_is_read_without_tensorflow_and_in_silence(tfds_dir):
    code = (
        "import sys\n"
        "from robal_jax.data import cifar\n"
        "assert 'tensorflow_datasets' not in sys.modules and 'sklearn' not in sys.modules\n"
        f"cifar.load_cifar_lt('cifar10', {str(tfds_dir)!r}, ratio=0.5, n_max=6)\n"
        "assert 'tensorflow_datasets' in sys.modules and 'tensorflow' not in sys.modules\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


# ---------------------------------------------------------------- the table of sources


def test_sources_take_the_common_arguments():
    for name, load in sources.SOURCES.items():
        parameters = inspect.signature(load).parameters
        assert {"ratio", "profile", "seed"} <= parameters.keys()
        assert ("path" in parameters) == (name != "digits_lt")
        assert "name" not in parameters


def test_class_names():
    hundred = cifar._CIFAR["cifar100"][1].split()
    assert len(set(hundred)) == 100
    assert hundred == sorted(hundred)
    # Labels that occur in well-known files: cattle 19, mushroom 51, willow_tree 96.
    assert (hundred[19], hundred[51], hundred[96]) == ("cattle", "mushroom", "willow_tree")


def test_unknown_cifar():
    with pytest.raises(InputError, match="unknown CIFAR set 'cifar20'; use one of cifar10, cifar100"):
        cifar.load_cifar_lt("cifar20")


# ---------------------------------------------------------------- the real data, where they are at hand


@pytest.mark.parity
@pytest.mark.parametrize("variable", ["ROBAL_CIFAR_TFDS", "ROBAL_CIFAR_NPZ"])
def test_real_cifar10_lt_is_the_released_subset(golden, variable):
    path = os.environ.get(variable)
    if not path:
        pytest.skip(f"set {variable} to real CIFAR-10 data (a TFDS data folder or an .npz file)")
    numbers = golden("longtail")
    dataset = sources.SOURCES["cifar10_lt"](path=path, ratio=0.02)
    assert dataset.class_counts.tolist() == numbers["counts/cifar10/exp/0.02"].tolist()
    train, _ = (cifar._open_npz if path.endswith(".npz") else cifar._open_tfds)("cifar10", path)
    kept = numbers["indices/real/cifar10/exp/0.02"]
    assert np.array_equal(train.labels, numbers["labels/real/cifar10"])
    assert np.array_equal(dataset.train_labels, train.labels[kept])
    some = slice(None, None, 100)
    assert np.array_equal(dataset.train_images[some], train.images(kept[some]))
    assert dataset.test_images.shape == (10000, 32, 32, 3)
    # Channel means of the test set, as published: they would tell BGR from RGB.
    means = dataset.test_images.mean(axis=(0, 1, 2)) / 255
    assert np.allclose(means, [0.4942, 0.4851, 0.4504], atol=1e-3)


# ---------------------------------------------------------------- experiments/prepare_data.py


@pytest.fixture
def direct_network(monkeypatch):
    """TensorFlow seems installed, no proxy is set, and the connections asked for are listed."""
    asked = []

    class Connection:
        def close(self):
            pass

    def connect(address, timeout):
        asked.append((address, timeout))
        return Connection()

    monkeypatch.setattr(script.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(script.urllib.request, "getproxies", dict)
    monkeypatch.setattr(script.socket, "create_connection", connect)
    return asked


def test_prepare_does_nothing_twice(tfds_dir):
    assert "already prepared in" in script.prepare("cifar10", str(tfds_dir))


def test_prepare_names_a_folder_of_other_data(tfds_dir):
    folder = next(tfds_dir.glob("cifar10/*"))
    with pytest.raises(InputError, match=r"holds cifar10, not cifar100; choose another --data_dir"):
        script.prepare("cifar100", str(folder))


def test_prepare_does_not_add_to_another_format(tmp_path):
    folder = write_tfds(tmp_path)
    for file in folder.glob("*.array_record*"):
        file.unlink()
    with pytest.raises(
        InputError, match="in a different format from array_record; choose another --data_dir"
    ):
        script.prepare("cifar10", str(tmp_path))


def test_prepare_without_tensorflow(tmp_path, monkeypatch):
    monkeypatch.setattr(script.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"needs TensorFlow.* pip install 'robal_jax\[data\]'"):
        script.prepare("cifar10", str(tmp_path))


def test_prepare_without_network_says_so_at_once(tmp_path, monkeypatch, direct_network):
    def unreachable(address, timeout):
        raise OSError("Network is unreachable")

    monkeypatch.setattr(script.socket, "create_connection", unreachable)
    with pytest.raises(InputError, match=r"cannot reach www\.cs\.toronto\.edu:443 .*; set https_proxy,"):
        script.prepare("cifar10", str(tmp_path))
    monkeypatch.setattr(script.urllib.request, "getproxies", lambda: {"https": "http://proxy:3128"})
    script.check_host()  # behind a proxy nothing is tried


def test_prepare_downloads_with_tfds(tmp_path, monkeypatch, direct_network):
    import tensorflow_datasets as tfds

    built = []

    class Builder:
        def download_and_prepare(self):
            built.append("prepared")
            if len(built) > 2:
                raise ConnectionError("reset\nby peer")

    monkeypatch.setattr(tfds, "builder", lambda *args, **kwargs: built.append((args, kwargs)) or Builder())
    told = script.prepare("cifar100", str(tmp_path))
    assert direct_network == [(("www.cs.toronto.edu", 443), 5.0)]
    assert built == [(("cifar100",), {"data_dir": tmp_path, "file_format": "array_record"}), "prepared"]
    assert f"--config.data.path={tmp_path}" in told
    with pytest.raises(InputError, match=r"could not prepare cifar100 .*ConnectionError: reset by peer"):
        script.prepare("cifar100", str(tmp_path))


@pytest.mark.slow
def test_prepare_exit_status(tmp_path):
    write_tfds(tmp_path)
    for file in tmp_path.glob("*/*/*.array_record*"):
        file.unlink()
    done = subprocess.run(
        [sys.executable, "experiments/prepare_data.py", "--dataset=cifar10", f"--data_dir={tmp_path}"],
        cwd=REPO,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
