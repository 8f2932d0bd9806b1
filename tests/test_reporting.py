import csv
import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from robal_jax import metrics, reporting
from robal_jax.errors import InputError

ROOT = Path(__file__).resolve().parents[1]
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


def save_run(workdir, *, seed=0, strength=1.0, labels=None, conditions=None, **meta):
    truth, predictions = fake_evaluation(seed=seed, strength=strength)
    truth = truth if labels is None else labels
    predictions = {name: predictions[name] for name in conditions or predictions}
    summary = metrics.summarize(truth, predictions, np.arange(20, 10, -1))
    results = {"meta": {**META, "seed": seed, **meta}, "summary": summary}
    (workdir / "evaluation").mkdir(parents=True)
    (workdir / "evaluation" / "results.json").write_text(json.dumps(results))
    arrays = {f"pred_{name}": prediction for name, prediction in predictions.items()}
    np.savez(workdir / "evaluation" / "examples.npz", labels=truth, ids=np.arange(len(truth)), **arrays)
    return str(workdir)


def printed(function, *args, **options):
    buffer = io.StringIO()
    function(*args, Console(file=buffer, width=100), **options)
    return buffer.getvalue()


def compare(*arguments):
    command = [sys.executable, str(ROOT / "experiments" / "compare.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


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


def test_comparison_is_paired(tmp_path):
    runs = reporting.load_runs([save_run(tmp_path / "a"), save_run(tmp_path / "b", strength=0.5, method="B")])
    assert list(runs) == ["RoBal", "B"]
    results = reporting.comparison(runs, ["clean", "pgd_20", "worst"])
    assert list(results["B"]["worst"]) == ["all", "head", "medium", "tail"]
    assert "difference" not in results["RoBal"]["clean"]["all"]
    for condition, groups in results["B"].items():
        summary = runs["B"].summary["conditions"][condition]
        for group, entry in groups.items():
            assert entry["value"] == summary["accuracy" if group == "all" else group]["value"]
            base = results["RoBal"][condition][group]["value"]
            assert entry["difference"]["value"] == pytest.approx(entry["value"] - base)
    # The runs share most of their noise, so pairing must beat the sum of the two intervals.
    difference = results["B"]["pgd_20"]["all"]["difference"]
    assert difference["high"] - difference["low"] < 0.8 * (
        results["B"]["pgd_20"]["all"]["high"] - results["B"]["pgd_20"]["all"]["low"]
    )


def test_comparison_by_method_averages_and_pairs_seeds(tmp_path):
    workdirs = [
        save_run(tmp_path / f"{method}{seed}", seed=seed, strength=strength, method=method)
        for method, strength, seeds in (("A", 1.0, (0, 1)), ("B", 0.5, (1, 2)))
        for seed in seeds
    ]
    runs = reporting.load_runs(workdirs)
    assert list(runs) == ["A, seed 0", "A, seed 1", "B, seed 1", "B, seed 2"]
    text = printed(reporting.print_comparison, runs, by_method=True)
    accuracies = [
        100 * runs[name].summary["conditions"]["clean"]["accuracy"]["value"] for name in list(runs)[:2]
    ]
    assert f"{np.mean(accuracies):.1f} ± {np.std(accuracies, ddof=1):.1f}" in text
    differences = text[text.index("Difference to A") :]
    assert max(map(len, text.splitlines())) <= 100
    assert "…" not in text
    # Only seed 1 has a partner in A.
    assert differences.count("seed 1") == 3
    assert "seed 2" not in differences


def test_comparison_of_one_run_has_no_differences(tmp_path):
    runs = reporting.load_runs([save_run(tmp_path / "a", method="RoBal [ours]")])
    text = printed(reporting.print_comparison, runs)
    assert "RoBal [ours]" in text  # brackets are no markup
    assert "Accuracy in percent" in text
    assert "Difference" not in text


def test_runs_with_equal_methods_and_seeds_are_named_by_folder(tmp_path):
    workdirs = [save_run(tmp_path / name) for name in "ab"]
    runs = reporting.load_runs(workdirs)
    assert list(runs) == workdirs
    with pytest.raises(InputError, match="method RoBal and seed 0"):
        printed(reporting.print_comparison, runs, by_method=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": np.repeat(np.arange(10), 20)}, "different test images"),
        ({"conditions": ["clean", "pgd_20"]}, "different conditions"),
        ({"epsilon": 0.1}, "differ in epsilon: 0.1 and 0.031"),
    ],
)
def test_comparison_refuses_runs_that_do_not_match(tmp_path, change, message):
    runs = reporting.load_runs([save_run(tmp_path / "a"), save_run(tmp_path / "b", method="B", **change)])
    with pytest.raises(InputError, match=message):
        reporting.comparison(runs, ["clean"])


def test_comparison_refuses_other_groups_and_unknown_conditions(tmp_path):
    run = reporting.load_run(Path(save_run(tmp_path / "a")))
    moved = reporting.Run(run.meta, {**run.summary, "groups": {"head": [0]}}, run.examples)
    with pytest.raises(InputError, match="different groups"):
        reporting.comparison({"a": run, "b": moved}, ["clean"])
    with pytest.raises(InputError, match="'square' was not evaluated"):
        reporting.comparison({"a": run}, ["square"])


def test_load_runs_refuses_what_it_cannot_read(tmp_path):
    workdir = save_run(tmp_path / "a")
    for names in ([], [workdir, workdir]):
        with pytest.raises(InputError, match="at least one workdir"):
            reporting.load_runs(names)
    with pytest.raises(InputError, match="has not been evaluated"):
        reporting.load_runs([str(tmp_path / "none")])
    folder = Path(workdir) / "evaluation"
    for name, content in (
        ("examples.npz", "junk"),
        ("examples.npz", ""),
        ("results.json", "[]"),
        ("results.json", "{"),
    ):
        (folder / name).write_text(content)
        with pytest.raises(InputError, match="is damaged"):
            reporting.load_runs([workdir])


def test_compare_script(tmp_path):
    first, second = save_run(tmp_path / "a"), save_run(tmp_path / "b", strength=0.5, method="B")
    done = compare(f"--workdirs={first},{second}")
    assert done.returncode == 0, done.stderr
    assert "Difference to RoBal in points" in done.stdout
    for arguments in ((), ("--workdirs=" + str(tmp_path / "none"),), (f"--workdirs={first}", "extra")):
        done = compare(*arguments)
        assert done.returncode == 2
        assert done.stderr.startswith("error: ")
        assert done.stderr.count("\n") == 1
