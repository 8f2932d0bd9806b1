"""A part of the test set: its images, whose outcomes are those of the whole, and where it is named."""

import itertools
import json
import pathlib
import re
import shutil

import numpy as np
import pytest

from experiments import evaluate as script
from robal_jax import builder, cli, evaluation
from robal_jax.data import balanced_part, image_folder
from robal_jax.errors import InputError
from robal_jax.reporting.comparison import compare
from robal_jax.reporting.results import read_run
from robal_jax.storage.config_file import read_config

STORED = pathlib.Path(__file__).with_name("stored_run")
DIGITS = "configs/at.py:digits_lt"


@pytest.mark.parametrize("size", [10, 11, 99, 100, 250, 699, 700])
@pytest.mark.parametrize("seed", [0, 7])
def test_it_is_balanced(size, seed):
    labels = np.random.default_rng(1).permutation(np.repeat(np.arange(10), 70))
    ids = balanced_part(labels, size, seed)
    assert len(np.unique(ids)) == size
    assert (np.diff(ids) > 0).all()
    counts = np.bincount(labels[ids], minlength=10)
    assert counts.max() - counts.min() == (1 if size % 10 else 0)
    np.testing.assert_array_equal(balanced_part(labels, size, seed), ids)


def test_larger_parts_hold_the_smaller_ones():
    labels = np.repeat(np.arange(7), [30, 1, 30, 5, 30, 30, 12])
    parts = [set(balanced_part(labels, size, 3)) for size in range(7, len(labels) + 1)]
    assert all(small < large for small, large in itertools.pairwise(parts))
    assert parts[-1] == set(range(len(labels)))
    counts = np.bincount(labels[sorted(parts[-1 - len(labels) + 28])])
    assert counts[1] == 1  # and the other classes give what it lacks
    assert sorted(np.delete(counts, 1)) == [4, 4, 4, 5, 5, 5]


def test_another_seed_takes_other_images():
    labels = np.repeat(np.arange(10), 70)
    first, second = (balanced_part(labels, 100, seed) for seed in (0, 1))
    assert len(np.intersect1d(first, second)) < 50


def test_files_stay_unread():
    files = image_folder.ImageFiles(tuple(f"{i}.png" for i in range(9)), resize=4, size=4, root="nowhere")
    part = files.part(np.array([2, 5]))
    assert part.paths == ("2.png", "5.png")
    assert (part.root, part.shape) == ("nowhere", (2, 4, 4, 3))


def digits(*overrides):
    return cli.apply_overrides(cli.load_config(DIGITS), [f"--config.{override}" for override in overrides])


@pytest.mark.parametrize("size", [1, 9, 701, 10000])
def test_sizes_that_cannot_be(size):
    message = rf"config.evaluation.examples is {size}; give 10 \(one image per class\) to 700 \(the whole"
    with pytest.raises(InputError, match=message):
        builder.evaluation(digits(f"evaluation.examples={size}"))


def test_a_negative_size():
    with pytest.raises(InputError, match=r"config\.evaluation\.examples is -1; it must be >= 0"):
        builder.evaluation(digits("evaluation.examples=-1"))


def test_what_is_built():
    whole, part = builder.evaluation(digits()), builder.evaluation(digits("evaluation.examples=20"))
    np.testing.assert_array_equal(whole.ids, np.arange(700))
    np.testing.assert_array_equal(part.test.images, whole.test.images[part.ids])
    np.testing.assert_array_equal(part.test.labels, whole.test.labels[part.ids])
    np.testing.assert_array_equal(part.test.class_counts, whole.test.class_counts)
    assert part.about["part"] == "20 of 700 test images"
    assert "part" not in whole.about


def attacked(workdir, folder, *overrides):
    """Evaluates with an ensemble of one attack; the folder and what was said."""
    said, fields = [], ("evaluation.autoattack=apgd_ce", "evaluation.audit.examples=0", *overrides)
    config = cli.apply_overrides(read_config(workdir), [f"--config.{field}" for field in fields])
    return evaluation.evaluate(config, workdir, folder=folder, say=said.append), said


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """The evaluations of all test images and of some of them, of a run older than this part."""
    folder = tmp_path_factory.mktemp("part")
    workdir = shutil.copytree(STORED, folder / "run", ignore=shutil.ignore_patterns("evaluation"))
    some = attacked(workdir, folder / "some", "evaluation.examples=13")
    return attacked(workdir, folder / "all")[0], *some


@pytest.mark.long
@pytest.mark.slow
def test_outcomes_are_those_of_the_whole(both):
    """The draws of an image do not depend on the part in which it is."""
    whole, part = (dict(np.load(folder / "examples.npz")) for folder in both[:2])
    assert whole.keys() == part.keys()
    assert len(part["ids"]) == 13 < len(whole["ids"])
    for name, values in part.items():
        if not name.startswith("distance"):  # rounded differently in a batch of another size
            np.testing.assert_array_equal(values, whole[name][part["ids"]], err_msg=name)
    broken, among = (set(np.load(folder / "adversarial.npz")["ids"].tolist()) for folder in both[:2])
    assert among == broken & set(part["ids"].tolist())


@pytest.mark.slow
def test_the_part_is_named(both):
    whole, part, said = both
    meta = json.loads((part / "results.json").read_text())["meta"]
    total = len(np.load(whole / "examples.npz")["ids"])
    assert (meta["n"], meta["part"]) == (13, f"13 of {total} test images")
    assert meta["config"]["evaluation"]["examples"] == 13
    assert any(f"({meta['part']})" in line for line in said)
    for name in ("report.md", "report.html"):
        title = (part / name).read_text().replace("&#40;", "(")
        assert f" ({meta['part']})" in title.split("Summary")[0]
        assert "of 10 test images" not in (whole / name).read_text()
    settings = (part / "report.md").read_text().split("## What was evaluated")[1].split("\n## ")[0]
    names = re.findall(r"^\| (?!---)(.*?) \|", settings, re.MULTILINE)
    assert "Part of the test set" in names
    assert not [name for name in names if name.islower()], "settings without a name for people"
    assert f"({meta['part']})" in compare([read_run(part)])[1].title
    assert "test images" not in compare([read_run(whole)])[1].title


@pytest.mark.slow
def test_parts_are_not_compared_with_the_whole(both):
    runs = [read_run(folder) for folder in both[:2]]
    runs[1].meta["method"] = "another"
    with pytest.raises(InputError, match=r"differ in part: 13 of \d+ test images and none; evaluate both"):
        compare(runs)


@pytest.mark.slow
def test_a_surrogate_attacks_the_same_part(tmp_path):
    workdir = shutil.copytree(STORED, tmp_path / "run", ignore=shutil.ignore_patterns("evaluation"))
    asked = digits("evaluation.examples=20", "evaluation.seed=4")
    found = builder.evaluation(builder.with_part_of(digits(), asked))
    np.testing.assert_array_equal(found.ids, builder.evaluation(asked).ids)
    back = builder.with_part_of(asked, read_config(workdir))
    assert (back.evaluation.examples, back.evaluation.seed) == (0, 4)


@pytest.mark.parametrize(
    ("own", "asked", "place"),
    [("", "a.npz", "a.npz"), ("b.npz", "a.npz", "b.npz"), ("", "", "")],
)
def test_a_surrogate_without_a_place_of_its_data_reads_those_of_the_evaluation(own, asked, place):
    configs = [
        cli.apply_overrides(cli.load_config("at:cifar10_lt"), [f"--config.data.path={each}"])
        for each in (own, asked)
    ]
    assert builder.with_part_of(*configs).data.path == place
    assert "path" not in builder.with_part_of(digits(), configs[1]).data


@pytest.mark.parametrize(
    ("flags", "name"),
    [
        ([], "evaluation"),
        (["--examples=20"], "evaluation-20-images"),
        (["--config.evaluation.examples=30"], "evaluation-30-images"),
        (["--examples=0"], "evaluation"),
        (["--examples=20", "--config=tau_norm:digits_lt"], "evaluation-tau_norm-20-images"),
        (["--examples=20", "--folder=mine"], "mine"),
        (["--budget=by_frequency"], "evaluation-by_frequency"),
        (["--config.evaluation.budget.name=constant"], "evaluation"),
        (["--budget=by_frequency", "--examples=20"], "evaluation-by_frequency-20-images"),
        (["--budget=by_frequency", "--folder=mine"], "mine"),
    ],
)
def test_the_folder_names_it(monkeypatch, flags, name):
    seen = []
    monkeypatch.setattr(
        evaluation, "evaluate", lambda config, workdir, **keywords: seen.append(keywords["folder"])
    )
    script.main([f"--workdir={STORED}", *flags])
    assert seen == [pathlib.Path("mine") if name == "mine" else STORED / name]
