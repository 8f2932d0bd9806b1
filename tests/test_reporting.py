import csv
import io
import json

import numpy as np
import pytest
from rich.console import Console

from robal_jax import metrics, reporting
from robal_jax.errors import InputError

META = {
    "method": "RoBal",
    "dataset": "digits-LT",
    "main_attack": "pgd_20",
    "norm": "Linf",
    "epsilon": 0.031,
    "seed": 0,
    "versions": {"jax": "1.2"},
    "note|odd": "a|b",
}
ATTACKS = ("fgsm", "pgd_20", "new_attack")


def fake_evaluation(num_classes=10, per_class=20, seed=0, strength=1.0):
    """Labels and predictions of a model that is better on its first classes."""
    generator = np.random.default_rng(seed)
    labels = np.tile(np.arange(num_classes), per_class)
    margin = generator.normal(1.5 - labels / num_classes, 1)
    predictions = {}
    for step, name in enumerate(("clean", *ATTACKS)):
        right = margin + generator.normal(0, 0.1, len(labels)) > 0.4 * strength * step
        predictions[name] = np.where(right, labels, (labels + 1) % num_classes)
    return labels, predictions


def fake_summary(num_classes=10):
    return metrics.summarize(*fake_evaluation(num_classes), np.arange(3 * num_classes, 2 * num_classes, -1))


def printed(function, *args, **options):
    buffer = io.StringIO()
    function(*args, Console(file=buffer, width=100), **options)
    return buffer.getvalue()


def test_display_names():
    names = [reporting.display_name(name) for name in ("clean", "pgd_20", "cw_20", "worst")]
    assert names == ["Clean", "PGD-20", "CW-20", "Worst"]


@pytest.mark.parametrize("num_classes", [2, 10])
def test_evaluation_table_has_a_row_per_condition(num_classes):
    summary = fake_summary(num_classes)
    lines = printed(reporting.evaluation_table, summary).splitlines()
    for name in ("Clean", "FGSM", "PGD-20", "NEW-ATTACK", "Worst"):
        assert sum(line.strip().startswith(name) for line in lines) == 1
    accuracy = summary["conditions"]["clean"]["accuracy"]
    cell = "{value:.1f} [{low:.1f}, {high:.1f}]".format(**{key: 100 * x for key, x in accuracy.items()})
    assert any(cell in line for line in lines)
    assert max(map(len, lines)) <= 100
    assert "…" not in "".join(lines)


@pytest.mark.parametrize("num_classes", [2, 10, 100])
def test_report_files(tmp_path, num_classes):
    summary = fake_summary(num_classes)
    meta = META | {"class_names": [f"name {k}" for k in range(num_classes)]}
    folder = tmp_path / "new" / "evaluation"
    files = reporting.write_report(folder, summary, meta)
    assert sorted(files) == sorted(folder.iterdir())  # and no partial file is left
    assert {file.name for file in files} == {
        "results.json",
        "per_class.csv",
        "report.md",
        "per_class.png",
        "attacks.png",
    }
    assert json.loads((folder / "results.json").read_text()) == {"meta": meta, "summary": summary}
    for name in ("per_class.png", "attacks.png"):
        content = (folder / name).read_bytes()
        assert content.startswith(b"\x89PNG\r\n\x1a\n")
        width, height = (int.from_bytes(content[i : i + 4], "big") for i in (16, 20))
        assert width >= 800
        assert height >= 600

    with (folder / "per_class.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == num_classes * len(summary["conditions"])
    last = rows[-1]
    worst = summary["conditions"]["worst"]["per_class"]
    assert (last["class"], last["name"]) == (str(num_classes - 1), f"name {num_classes - 1}")
    assert (last["condition"], last["support"]) == ("worst", "20")
    assert int(last["train_count"]) == summary["class_counts"][-1]
    assert float(last["recall_high"]) == worst["recall"][-1]["high"]
    assert float(last["f_score"]) == worst["f_score"][-1]

    report = (folder / "report.md").read_text()
    assert report.startswith("# RoBal on digits-LT\n")
    for text in (
        "| Threat model: radius | 0.031 |",
        "jax 1.2",
        "note\\|odd | a\\|b",
        "attacks.png",
        "per_class.png",
    ):
        assert text in report
    assert "class_names" not in report
    assert ("Ten groups" in report) == (num_classes == 100)
    for block in report.split("\n\n"):
        if block.startswith("|"):
            assert len({line.replace("\\|", "").count("|") for line in block.splitlines()}) == 1


def test_report_replaces_an_older_one(tmp_path):
    reporting.write_report(tmp_path, fake_summary(), META)
    reporting.write_report(tmp_path, fake_summary(), META | {"method": "other"})
    assert json.loads((tmp_path / "results.json").read_text())["meta"]["method"] == "other"
    assert len(list(tmp_path.iterdir())) == 5


def test_report_without_attacks(tmp_path):
    labels, predictions = fake_evaluation()
    summary = metrics.summarize(labels, {"clean": predictions["clean"]}, np.arange(20, 10, -1))
    reporting.write_report(tmp_path, summary, META | {"main_attack": "clean"})
    assert (tmp_path / "per_class.png").is_file()


def test_report_refuses_an_unknown_main_attack(tmp_path):
    with pytest.raises(InputError, match="'pgd_99' is not among"):
        reporting.write_report(tmp_path, fake_summary(), META | {"main_attack": "pgd_99"})


def test_report_refuses_a_folder_that_is_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="Cannot write the report"):
        reporting.write_report(tmp_path / "file", fake_summary(), META)


def test_per_class_figure_sorts_classes_by_count():
    labels, predictions = fake_evaluation(4)
    summary = metrics.summarize(labels, predictions, [5, 40, 10, 20])
    axes = reporting.per_class_figure(summary, META).axes[0]
    assert [text.get_text() for text in axes.get_xticklabels()] == ["1", "3", "2", "0"]
