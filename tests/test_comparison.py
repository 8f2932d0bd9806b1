import dataclasses
import io
import json
import re
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT
from helpers import AUDIT, META, Text, fake_evaluation, verdict
from rich.console import Console

from robal_jax import metrics
from robal_jax.errors import InputError
from robal_jax.reporting import comparison
from robal_jax.reporting.comparison_page import comparison_html
from robal_jax.reporting.results import NOT_RUN, PASSED, read_runs


def save_run(workdir, *, seed=0, strength=1.0, labels=None, conditions=None, audit=None, **meta):
    truth, predictions = fake_evaluation(seed=seed, strength=strength)
    truth = truth if labels is None else labels
    predictions["custom"] = predictions["custom_own"] = predictions["new_attack"]
    predictions = {name: predictions[name] for name in conditions or [*predictions][:-2]}
    summary = metrics.summarize(truth, predictions, np.arange(20, 10, -1))
    results = {"meta": {**META, "seed": seed, **meta}, "summary": summary, "audit": audit}  # no norms: older
    (workdir / "evaluation").mkdir(parents=True)
    (workdir / "evaluation" / "results.json").write_text(json.dumps(results))
    arrays = {f"pred_{name}": prediction for name, prediction in predictions.items()}
    np.savez(workdir / "evaluation" / "examples.npz", labels=truth, ids=np.arange(len(truth)), **arrays)
    return str(workdir)


def printed(runs):
    buffer = io.StringIO()
    comparison.print_comparison(comparison.compare(runs), Console(file=buffer, width=100))
    return buffer.getvalue()


def compare(*arguments):
    command = [sys.executable, str(ROOT / "experiments" / "compare.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_corrupted_images_have_rows_if_all_runs_have_them(tmp_path):
    plain, *others = read_runs([save_run(tmp_path / str(seed), seed=seed) for seed in range(3)])
    runs, right = [], []
    for shift, run in enumerate(others):
        labels = run.examples["labels"]
        found = {"fog": np.stack([np.where(np.arange(len(labels)) % 4 == shift, labels, 9 - labels)] * 5)}
        summary = metrics.summarize_corruptions(labels, found, np.arange(20, 10, -1))
        runs.append(dataclasses.replace(run, summary={**run.summary, "corruptions": summary}))
        right.append(found["fog"][0] == labels)
    tail = np.isin(labels, run.summary["groups"]["tail"])
    (rows,) = (table.rows for table in comparison.compare(runs) if table.title.startswith("Accuracy"))
    (row,) = (row for row in rows if row[0] == "Corrupted, mean")
    for cell, member in ((row[2], labels >= 0), (row[-1], tail)):
        shares = [100 * each[member].mean() for each in right]
        assert cell == f"{np.mean(shares):.1f} ± {np.std(shares, ddof=1):.1f}"
    assert "Corrupted" in printed(runs)
    assert "Corrupted" not in printed([plain, *runs])


def test_difference_is_paired(tmp_path):
    first, second = read_runs([save_run(tmp_path / "a"), save_run(tmp_path / "b", strength=0.5, method="B")])
    for condition in ("clean", "pgd_20", "worst"):
        for group in ("all", "head", "medium", "tail"):
            shares = [comparison.share_right(run, condition, group)["value"] for run in (first, second)]
            summary = second.summary["conditions"][condition]
            assert shares[1] == summary["accuracy" if group == "all" else group]["value"]
            found = comparison.difference(second, first, condition, group)
            assert found["value"] == pytest.approx(shares[1] - shares[0])
            assert 0 <= found["p_value"] <= 1
    # The runs share most of their noise, so pairing must beat the sum of the two intervals.
    found = comparison.difference(second, first, "pgd_20", "all")
    alone = comparison.share_right(second, "pgd_20", "all")
    assert found["high"] - found["low"] < 0.8 * (alone["high"] - alone["low"])


def test_runs_of_a_method_are_averaged_and_paired_by_seed(tmp_path):
    runs = read_runs(
        [
            save_run(tmp_path / f"{method}{seed}", seed=seed, strength=strength, method=method)
            for method, strength, seeds in (("A", 1.0, (0, 1)), ("B", 0.5, (1, 2)))
            for seed in seeds
        ]
    )
    text = printed(runs)
    accuracies = [100 * run.summary["conditions"]["clean"]["accuracy"]["value"] for run in runs[:2]]
    assert f"{np.mean(accuracies):.1f} ± {np.std(accuracies, ddof=1):.1f}" in text
    differences = text[text.index("Difference to A") :]
    assert max(map(len, text.splitlines())) <= 100
    assert "…" not in text
    differences, _, notes = differences.partition("Notes")
    # Only seed 1 has a partner in A.
    assert differences.count("seed 1") == 3
    assert "seed 2" not in differences
    assert "B, seed 2, has no difference: A has no such run." in notes


def test_each_seed_may_have_test_images_of_its_own(tmp_path):
    """As on the digits, whose seed draws the images, too; within a seed they must be equal."""
    folders = [
        save_run(tmp_path / f"{method}{seed}", seed=seed, method=method, test_set_sha256=str(seed))
        for method, seeds in (("A", (0, 1, 2)), ("B", (0, 1)))
        for seed in seeds
    ]
    _, accuracies, differences, notes = comparison.compare(read_runs(folders))
    assert [row[1] for row in differences.rows[:2]] == ["B, seed 0", "B, seed 1"]
    assert all(("(n = 2)" in cell) == (row[1] == "B") for row in accuracies.rows for cell in row[2:])
    number = len(differences.rows) * len(differences.header[2:])
    assert [note for (note,) in notes.rows] == [
        "Intervals and p-values are over test images, not over training seeds, and not corrected for the "
        f"number of differences, {number}.",
        "Test images differ between seeds, so the spread over seeds includes theirs.",
        "The means of B and A are over different seeds: compare their differences.",
    ]
    other = save_run(tmp_path / "B2", seed=2, method="B", test_set_sha256="0")
    with pytest.raises(InputError, match="differ in test_set_sha256: 0 and 2"):
        comparison.compare(read_runs([*folders, other]))


def test_one_run_of_each_method_is_compared_whatever_the_seed(tmp_path):
    """A note names the seeds if they differ."""
    runs = [save_run(tmp_path / method, seed=seed, method=method) for seed, method in enumerate("AB")]
    text = printed(read_runs(runs))
    assert "Difference to A in points" in text
    assert "B has seed 1 and A seed 0: their difference includes that of the seeds." in text


def test_runs_that_were_trained_in_different_ways_are_not_averaged(tmp_path):
    fields = {"evaluation": {"examples": 5}, "data": {"path": "x", "seed": 0}, "train": {"epochs": 2}}
    same = {
        "evaluation": {"examples": 9},
        "data": {"path": "y", "seed": 1},
        "train": {"epochs": 2, "mixing": "none", "checkpoint_epochs": 5},
    }
    other = {**same, "train": {"epochs": 3}}
    runs = [save_run(tmp_path / "0", config=fields), save_run(tmp_path / "1", config=same, seed=1)]
    text = printed(read_runs(runs))
    assert " ± " in text
    assert "Notes" not in text
    text = printed(read_runs([*runs, save_run(tmp_path / "2", config=other, seed=2)]))
    assert " ± " not in text
    assert "The runs of RoBal differ in config.train.epochs: they are not averaged." in text


def test_other_weights_and_choices_of_a_checkpoint_are_not_averaged(tmp_path):
    runs = [
        save_run(tmp_path / "0", config={"evaluation": {"weights": "current"}}, selection="last"),
        save_run(
            tmp_path / "1", seed=1, config={"evaluation": {"weights": "average"}}, selection="best (1 of 2)"
        ),
    ]
    text = " ".join(printed(read_runs(runs)).split())
    assert " ± " not in text
    assert "differ in config.evaluation.weights, the choice of the checkpoint: they are not averaged." in text
    both = [
        save_run(tmp_path / f"best{seed}", seed=seed, selection=f"best on held-out images ({seed} of 2)")
        for seed in (1, 2)
    ]
    assert " ± " in printed(read_runs(both))


@pytest.mark.parametrize(
    ("listed", "shown"), [("custom", "Listed attacks"), ("custom_own", "Ensemble with own attacks")]
)
def test_ensembles_of_other_attacks_are_not_compared(tmp_path, listed, shown):
    def runs(name, *ensembles):
        folders = [tmp_path / name / str(number) for number in range(len(ensembles))]
        return read_runs(
            [
                save_run(folder, method=folder.name, conditions=["clean", listed], autoattack=attacks)
                for folder, attacks in zip(folders, ensembles, strict=True)
            ]
        )

    pair, square = ["apgd_ce", "apgd_dlr"], ["square", "apgd_ce"]
    assert shown in printed(runs("same", pair, pair)).partition("Accuracy")[2]
    first, second = runs("other", pair, square)
    assert shown not in printed([first, second]).partition("Accuracy")[2]
    with pytest.raises(InputError, match="have different ensembles: square, apgd_ce and apgd_ce, apgd_dlr;"):
        comparison.difference(second, first, listed, "all")


def test_own_attacks_of_other_code_are_not_compared(tmp_path):
    """They have the same name."""
    first, second = read_runs(
        [
            save_run(
                tmp_path / digest, method=digest, conditions=["clean", "custom_own"],
                autoattack=["apgd_ce", "mine:attack"], code_sha256={"mine": digest * 64},
            )
            for digest in "ab"
        ]
    )  # fmt: skip
    assert "Ensemble with own attacks" not in printed([first, second]).partition("Accuracy")[2]
    message = r"ensembles: apgd_ce, mine:attack \(bbbbbbbbbbbb…\) and apgd_ce, mine:attack \(aaaaaaaaaaaa…\)"
    with pytest.raises(InputError, match=message):
        comparison.difference(second, first, "custom_own", "all")


def test_comparison_of_one_run_has_no_differences(tmp_path):
    text = printed(read_runs([save_run(tmp_path / "a", method="RoBal [ours]")]))
    assert "RoBal [ours]" in text  # brackets are no markup
    assert "Accuracy in percent" in text
    assert "Difference" not in text


def test_runs_with_equal_methods_and_seeds_are_named_by_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("first", "second"):
        save_run(tmp_path / name)
    text = printed(read_runs(["first", "second"]))
    assert "Difference to first" in text
    assert "second" in text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"test_set_sha256": "1"}, "differ in test_set_sha256"),
        ({"conditions": ["clean", "pgd_20"]}, "different conditions"),
        ({"epsilon": 0.1}, "differ in epsilon: 0.1 and 0.031"),
    ],
)
def test_difference_refuses_runs_that_do_not_match(tmp_path, change, message):
    first, second = read_runs([save_run(tmp_path / "a"), save_run(tmp_path / "b", method="B", **change)])
    with pytest.raises(InputError, match=message):
        comparison.difference(second, first, "clean", "all")


@pytest.mark.parametrize("other", ["A", "B"])
def test_runs_without_a_partner_must_match_too(tmp_path, other):
    pair = [save_run(tmp_path / "a"), save_run(tmp_path / "b", seed=1, method=other, epsilon=0.1)]
    with pytest.raises(InputError, match=r"differ in epsilon: 0\.1 and 0\.031; evaluate both"):
        comparison.compare(read_runs(pair))


def test_difference_refuses_other_groups(tmp_path):
    run = read_runs([save_run(tmp_path / "a")])[0]
    moved = dataclasses.replace(run, name="moved", summary={**run.summary, "groups": {"head": [0]}})
    with pytest.raises(InputError, match="different groups"):
        comparison.difference(moved, run, "clean", "all")


def test_runs_of_classes_with_equal_counts_have_one_group(tmp_path):
    run = read_runs([save_run(tmp_path / "a")])[0]
    equal = dataclasses.replace(run, summary={**run.summary, "groups": {"all": list(range(10))}})
    (header,) = [line for line in printed([equal]).splitlines() if "Condition " in line]
    assert header.split() == ["Condition", "Run", "All"]


def test_runs_with_other_conditions_are_compared_in_those_they_share(tmp_path):
    runs = read_runs(
        [save_run(tmp_path / "a"), save_run(tmp_path / "b", method="B", conditions=["clean", "pgd_20"])]
    )
    shared = comparison.shared_conditions(runs)
    assert [list(run.summary["conditions"]) for run in shared] == [["clean", "pgd_20", "worst"]] * 2
    # Worst is that of the shared conditions, not the stricter one of the first run alone.
    found = [comparison.share_right(run, "worst", "all")["value"] for run in (runs[0], *shared)]
    assert found[0] < found[1] == found[2]
    overview, accuracies, differences, notes = comparison.compare(runs)
    assert [row[2] for row in overview.rows] == ["FGSM, NEW-ATTACK", "none"]
    assert notes.rows[-1][0].startswith("Worst is that of the conditions that all runs have")
    assert [row[0] for row in accuracies.rows] == ["Clean"] * 2 + ["PGD-20 = Worst"] * 2
    assert accuracies.rows[2][2] == accuracies.rows[3][2]  # one model under one set of attacks
    assert all(cell.endswith("p = 1.000") for row in differences.rows for cell in row[2:])
    with pytest.raises(InputError, match="different conditions"):
        comparison.difference(runs[1], runs[0], "worst", "all")


def test_main_attack_that_only_one_run_has(tmp_path):
    runs = read_runs(
        [save_run(tmp_path / "a"), save_run(tmp_path / "b", method="B", conditions=["clean", "fgsm"])]
    )
    assert [row[0] for row in comparison.compare(runs)[1].rows] == ["Clean", "Clean", "Worst", "Worst"]


def test_audits_of_runs(tmp_path):
    older = [verdict("Scale", PASSED), verdict("Steps", NOT_RUN)]
    for entry, before in zip(older, (False, None), strict=True):
        del entry["doubts"], entry["outcome"]
        entry["flagged"] = before
    audits = {"A": AUDIT, "B": {"verdicts": older}, "C": None}
    runs = [save_run(tmp_path / name, method=name, audit=audit) for name, audit in audits.items()]
    overview = comparison.compare(read_runs(runs))[0]
    assert [row[:2] for row in overview.rows] == [
        ("A", "flagged: logit_scale"),
        ("B", "not flagged (1 of 2 checks run)"),
        ("C", "no audit"),
    ]


def test_differences_come_with_their_p_value(tmp_path):
    runs = read_runs([save_run(tmp_path / "a"), save_run(tmp_path / "b", strength=0.2, method="B")])
    tables = comparison.compare(runs)
    found = comparison.difference(runs[1], runs[0], "pgd_20", "all")
    assert found["p_value"] < 0.001
    row = next(row for row in tables[2].rows if row[0] == "PGD-20")
    assert row[2].splitlines() == [
        f"{100 * found['value']:+.1f}",
        f"[{100 * found['low']:+.1f}, {100 * found['high']:+.1f}]",
        "p < 0.001",
    ]
    markdown = comparison.comparison_markdown(tables)
    assert "| PGD-20 | B | " + " ".join(row[2].split()).replace("<", "&lt;") in markdown
    assert printed(runs).count("p < 0.001") == markdown.count("p &lt; 0.001")


def test_load_runs_refuses_what_it_cannot_read(tmp_path):
    workdir = save_run(tmp_path / "a")
    for names, message in (
        ([], "no run is named; give"),
        ([workdir, workdir], "a run is named twice; name each"),
    ):
        with pytest.raises(InputError, match=message):
            read_runs(names)
    with pytest.raises(InputError, match=r"no evaluation in .*; evaluate the run first"):
        read_runs([str(tmp_path / "none")])
    folder = tmp_path / "a" / "evaluation"
    for name, content in (
        ("examples.npz", "junk"),
        ("examples.npz", ""),
        ("results.json", "[]"),
        ("results.json", "{"),
        ("results.json", '{"meta": [], "summary": {}}'),
        ("results.json", "[" * 100_000),
    ):
        whole = (folder / name).read_bytes()
        (folder / name).write_text(content)
        with pytest.raises(InputError, match=re.escape(f"{folder / name} is damaged (")):
            read_runs([workdir])
        (folder / name).write_bytes(whole)
    arrays = dict(np.load(folder / "examples.npz"))
    np.savez(folder / "examples.npz", **arrays | {"labels": arrays["labels"][:3]})
    with pytest.raises(InputError, match=r"examples\.npz is damaged"):
        read_runs([workdir])


def test_a_file_names_its_folder(tmp_path):
    folders = [tmp_path / name / "evaluation" for name in "ab"]
    for folder in folders:
        save_run(folder.parent)
    runs = read_runs([str(folders[0] / "results.json"), str(folders[1] / "examples.npz")])
    assert [run.name for run in runs] == [str(folder) for folder in folders]
    for twice in (folders[0] / "results.json", folders[0], f"{folders[0].parent}/."):
        with pytest.raises(InputError, match="a run is named twice"):
            read_runs([str(folders[0].parent), str(twice)])
    (tmp_path / "notes.txt").touch()
    with pytest.raises(InputError, match=r"notes\.txt is not a file of an evaluation; name the folder"):
        read_runs([str(tmp_path / "notes.txt")])


def test_a_run_whose_evaluation_has_another_name(tmp_path):
    save_run(tmp_path / "a")
    (tmp_path / "a" / "evaluation").rename(tmp_path / "a" / "evaluation-50-images")
    with pytest.raises(InputError, match=r"no evaluation in .*; name one of .*/a/evaluation-50-images$"):
        read_runs([str(tmp_path / "a")])
    with pytest.raises(InputError, match=r"no evaluation in .*; name one of .*/a/evaluation-50-images$"):
        read_runs([str(tmp_path)])


def seeds_of_two_methods(folder):
    return read_runs(
        [
            save_run(folder / f"{method}{seed}", seed=seed, strength=strength, method=method)
            for method, strength in (("A", 1.0), ("B", 0.5))
            for seed in (0, 1, 2)
        ]
    )


def test_page_has_all_that_the_tables_have(tmp_path):
    runs = read_runs([save_run(tmp_path / "a"), save_run(tmp_path / "b", strength=0.5, method="<b>B</b>")])
    html = comparison_html(runs)
    text = Text(html)
    assert [tag for tag, _ in text.tags].count("img") == 1
    assert not {"script", "link", "b>"} & {tag for tag, _ in text.tags}
    assert "<b>B</b>" in text.text
    for table in comparison.compare(runs):
        assert table.title in text.text
        for cell in (cell for row in table.rows for cell in row):
            assert cell in text.text
    found = comparison.difference(runs[1], runs[0], "pgd_20", "all")
    sentence = (
        f"{100 * found['value']:+.1f} points [{100 * found['low']:+.1f}, {100 * found['high']:+.1f}] (p"
    )
    assert sentence in text.text
    assert "Compared with RoBal under PGD-20, image by image" in text.text


def test_page_of_several_seeds_gives_means(tmp_path):
    runs = seeds_of_two_methods(tmp_path)
    values = [
        100 * comparison.difference(runs[3 + seed], runs[seed], "pgd_20", "all")["value"] for seed in range(3)
    ]
    text = Text(comparison_html(runs)).text
    assert (
        f"{np.mean(values):+.1f} points (mean of 3 seeds, {min(values):+.1f} to {max(values):+.1f})" in text
    )


def test_page_of_runs_without_a_partner(tmp_path):
    assert "Differences" not in Text(comparison_html(read_runs([save_run(tmp_path / "a")]))).text
    of_a = [save_run(tmp_path / f"a{seed}", seed=seed) for seed in (0, 1)]
    text = Text(comparison_html(read_runs([*of_a, save_run(tmp_path / "b", seed=2, method="B")]))).text
    assert "Accuracy in percent" in text and "Differences" not in text


def test_conditions_with_equal_rows_share_them(tmp_path):
    runs = [save_run(tmp_path / name, method=name, conditions=["clean"]) for name in ("A", "B")]
    accuracies = comparison.compare(read_runs(runs))[1]
    assert [row[:2] for row in accuracies.rows] == [("Clean = Worst", "A"), ("Clean = Worst", "B")]


@pytest.mark.long
@pytest.mark.slow
def test_compare_script(tmp_path):
    first, second = save_run(tmp_path / "a"), save_run(tmp_path / "b", strength=0.5, method="B")
    out, html = tmp_path / "tables.md", tmp_path / "page.html"
    done = compare(first, second, f"--out={out}", f"--html={html}")
    assert done.returncode == 0, done.stderr
    assert html.read_text().startswith("<!doctype html>")
    assert "Difference to RoBal in points" in done.stdout
    assert "| Clean | RoBal |" in out.read_text()
    nowhere = tmp_path / "none"
    bad = (
        (),
        (str(nowhere),),
        (first, "--outt=x"),
        (first, f"--out={tmp_path}"),
        (first, f"--html={nowhere / 'x'}"),
        (first, first),
    )
    for arguments in bad:
        done = compare(*arguments)
        assert done.returncode == 2
        assert done.stderr.startswith("error: ")
        assert done.stderr.count("\n") == 1
