import csv
import io
import json
import re

import numpy as np
import pytest
from helpers import AUDIT, META, Text, curve, fake_evaluation, fake_results, gallery, norms, verdict
from rich.console import Console

from robal_jax import metrics
from robal_jax.errors import InputError
from robal_jax.reporting.audit import audit_summary, audit_verdict
from robal_jax.reporting.headline import in_words
from robal_jax.reporting.names import display_name
from robal_jax.reporting.report import write_report
from robal_jax.reporting.results import (
    EVERYTHING,
    FIXED_STEPS,
    FLAGGED,
    NOT_RUN,
    NOTE,
    OWN_GRADIENT,
    PASSED,
    TOO_FEW,
    Results,
    outcome_of,
)
from robal_jax.reporting.terminal import evaluation_table


def printed(function, *args, **options):
    buffer = io.StringIO()
    function(*args, Console(file=buffer, width=100), **options)
    return buffer.getvalue()


@pytest.mark.parametrize("num_classes", [2, 10])
def test_evaluation_table_has_a_row_per_condition(num_classes):
    results = fake_results(num_classes)
    lines = printed(evaluation_table, results).splitlines()
    for name in ("Clean", "FGSM", "PGD-20", "NEW-ATTACK", "Worst"):
        assert sum(line.strip().startswith(name) for line in lines) == 1
    accuracy = results.conditions["clean"]["accuracy"]
    cell = "{value:.1f} [{low:.1f}, {high:.1f}]".format(**{key: 100 * x for key, x in accuracy.items()})
    assert any(cell in line for line in lines)
    assert max(map(len, lines)) <= 100
    assert "…" not in "".join(lines)


FIGURES = {"per_class.png", "attacks.png", "errors.png", "confusion.png"}
FILES = {"results.json", "per_class.csv", "report.md", "report.html"} | FIGURES


@pytest.mark.slow
@pytest.mark.parametrize("num_classes", [2, 10, pytest.param(100, marks=pytest.mark.slow)])
def test_report_files(tmp_path, drawn, num_classes):
    meta = META | {"class_names": [f"name {k}" for k in range(num_classes)]}
    results = fake_results(num_classes, meta)
    summary = results.summary
    folder = tmp_path / "new" / "evaluation"
    files = write_report(folder, results)
    assert sorted(files) == sorted(folder.iterdir())  # and no partial file is left
    assert {file.name for file in files} == FILES
    text = (folder / "results.json").read_text()
    assert json.loads(text) == {"meta": meta, "summary": summary, "audit": None, "norms": None}
    assert Results.read(folder) == results
    assert str(summary["conditions"]["worst"]["confusion"][0]) in text
    assert not re.search(r"^\s*[\d.]+,?$", text, re.MULTILINE)  # lists of numbers stand on one line
    for name in FIGURES:
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
    assert float(last["boundary_error"]) == worst["boundary_error"][-1]

    report = (folder / "report.md").read_text()
    assert report.startswith("# RoBal on digits-LT\n")
    for text in ("| Threat model: radius | 0.031 |", "jax 1.2", "note\\|odd | a\\|b", *FIGURES):
        assert text in report
    assert "class_names" not in report
    assert ("Ten groups" in report) == (num_classes == 100)
    for block in report.split("\n\n"):
        if block.startswith("|"):
            assert len({line.replace("\\|", "").count("|") for line in block.splitlines()}) == 1


def full_report(folder, num_classes=10, **changes):
    """A report with every input; the page and the Markdown."""
    meta = META | {
        "class_names": [f"<b>{k}</b>" for k in range(num_classes)],
        "command": "python experiments/evaluate.py --workdir='a & b'",
        "seconds": 12.5,
        "config": {"data": {"name": "digits"}, "seed": 7},
        "autoattack": ["apgd_ce", "square"],
        "stages": {"apgd_ce": 0.4321, "square": 0.4},
    }
    parts = {"audit": AUDIT, "norms": norms(num_classes), **changes}
    write_report(folder, fake_results(num_classes, meta, **parts), gallery=gallery())
    return (folder / "report.html").read_text(), (folder / "report.md").read_text()


def test_full_report_says_the_same_in_both_forms(tmp_path):
    html, markdown = full_report(tmp_path)
    page = Text(html)
    sections = re.findall(r"^## (.*)", markdown, re.MULTILINE)
    assert sections == [
        "Summary",
        "Audit",
        "All conditions",
        "Head, medium and tail classes",
        "Classes",
        "Norms",
        "Adversarial examples",
        "What was evaluated",
        "How to read this",
        "Config",
    ]
    assert re.findall("<h2[^>]*>(.*)</h2>", html) == sections
    pictures = re.findall(r"^!\[(.*)\]\((.*)\)$", markdown, re.MULTILINE)
    shown = [attributes for tag, attributes in page.tags if tag == "img"]
    assert [caption for caption, _ in pictures] == [attributes["alt"] for attributes in shown]
    assert [name for _, name in pictures] == [
        f"{name}.png"
        for name in ("curves", "attacks", "per_class", "errors", "confusion", "norms", "gallery")
    ]
    assert all((tmp_path / name).is_file() for _, name in pictures)
    cells = [
        cell for line in markdown.splitlines() if re.match(r"\| (?!-)", line) for cell in line.split(" | ")
    ]
    for text in (
        "1 of 3 checks is flagged (1 not run): do not trust the fixed-step attacks on the "
        "cross-entropy (FGSM, PGD, MIM); evaluate with AutoAttack",
        "There was no second model.",
        "magnified 5 times",
        "--workdir='a & b'",
        '"name": "digits"',
        "Robust accuracy after each attack of the ensemble",
    ):
        assert text in markdown
        assert text in page.text
    assert "| Square | 40.0 |" in markdown
    assert "accuracy (1 = 0.4, 3 = 0.2), images = 50" in markdown
    assert "accuracy130.40.2" in "".join(page.text.split())
    assert page.text.index("do not trust") < page.text.index("Summary")
    assert len(cells) > 200
    for cell in cells:
        assert cell.strip("| ").replace("&lt;", "<").replace("\\|", "|") in page.text
    assert [tag for tag, _ in page.tags].count("details") == 1
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["audit"] == AUDIT
    assert results["norms"] == norms(10)


@pytest.mark.slow
def test_page_loads_nothing_and_takes_no_name_for_markup(tmp_path, drawn):
    html, markdown = full_report(tmp_path, num_classes=30)
    page = Text(html)
    links = [
        value
        for _, attributes in page.tags
        for key, value in attributes.items()
        if key in ("src", "href", "srcset", "action", "data")
    ]
    assert len(links) > 10
    assert all(link.startswith(("#", "data:")) for link in links)
    assert "url(" not in html
    assert "@import" not in html
    tags = {tag for tag, _ in page.tags}
    assert not tags & {"script", "link", "iframe", "object", "form", "base"}
    assert "&lt;b&gt;3&lt;/b&gt;" in html
    assert "<b>3</b>" not in html
    assert "<b>3</b>" not in markdown
    assert "<b>3</b>" in page.text


@pytest.mark.parametrize("given", ["audit", "norms", "gallery"])
def test_every_input_may_be_missing(tmp_path, given):
    parts = {"audit": AUDIT, "norms": norms(10)}
    shown = {given: parts[given]} if given in parts else {}
    write_report(tmp_path, fake_results(**shown), gallery=None if shown else gallery())
    picture = {"audit": "curves", "norms": "norms", "gallery": "gallery"}[given]
    assert {file.name for file in tmp_path.iterdir()} == FILES | {f"{picture}.png"}
    markdown = (tmp_path / "report.md").read_text()
    assert ("No audit was made" in markdown) == (given != "audit")
    for absent in ("Config", "command that made"):
        assert absent not in markdown


def test_audit_without_curves_and_norms_without_weights(tmp_path):
    _, markdown = full_report(
        tmp_path, audit={**AUDIT, "curves": {}}, norms={"weights": None, "features": [1.0] * 10}
    )
    assert "curves.png" not in markdown
    assert "norms.png" in markdown


@pytest.mark.parametrize(
    ("outcomes", "overall", "words"),
    [
        ([PASSED] * 11 + [NOT_RUN], PASSED, "No check was flagged (11 of 12 run)"),
        ([FLAGGED] * 3 + [NOTE] * 9, FLAGGED, "3 of 12 checks are flagged: do not trust any robust"),
        ([FLAGGED] + [NOT_RUN] * 2, FLAGGED, "1 of 3 checks is flagged (2 not run): do not trust any robust"),
        ([NOT_RUN] * 2, NOT_RUN, "No check was run (0 of 2)"),
        (
            [PASSED, NOTE],
            NOTE,
            "No check was flagged (2 of 2 run). Rounding decides for some adversarial images (a)",
        ),
        ([TOO_FEW, PASSED], PASSED, "No check was flagged (2 of 2 run, 1 with too few images to tell)"),
        ([TOO_FEW] * 2, TOO_FEW, "No check was flagged (2 of 2 run, 2 with too few images to tell)"),
    ],
)
def test_verdict_of_the_audit(outcomes, overall, words):
    found = audit_verdict({"verdicts": [verdict("a", outcome) for outcome in outcomes]})
    assert found[0] == overall
    assert found[1].startswith(words)


@pytest.mark.slow
@pytest.mark.parametrize(("before", "now"), [(True, FLAGGED), (False, PASSED), (None, NOT_RUN)])
def test_results_of_older_versions_are_read(before, now, tmp_path):
    old = verdict("a", now)
    del old["outcome"]
    old["flagged"] = before
    assert outcome_of(old) == now
    assert audit_verdict({"verdicts": [old]})[0] == now
    _, markdown = full_report(tmp_path, audit={**AUDIT, "verdicts": [old]})
    assert f"{now.upper()}: a." in markdown
    assert "What the checks mean" not in markdown


@pytest.mark.slow
def test_the_report_says_what_the_checks_mean(tmp_path):
    meaning = {"raised": "Flagged if it is so.", "means": "It is bad.", "do": "Mend it."}
    audit = {**AUDIT, "verdicts": [{**verdict("Scale", NOTE), "meaning": meaning}]}
    html, markdown = full_report(tmp_path, audit=audit)
    assert "- **Scale.** Flagged if it is so. It is bad. Mend it." in markdown
    assert "What the checks mean" in html
    assert "NOTE: Scale." in markdown


@pytest.mark.parametrize(
    ("doubts", "sentence"),
    [
        ((FIXED_STEPS, FIXED_STEPS), "2 of 2 checks are flagged: do not trust the fixed-step attacks"),
        ((FIXED_STEPS, EVERYTHING), "2 of 2 checks are flagged: do not trust any robust accuracy"),
        ((FIXED_STEPS, OWN_GRADIENT), "2 of 2 checks are flagged: do not trust attacks with the model's own"),
        ((OWN_GRADIENT, EVERYTHING), "2 of 2 checks are flagged: do not trust any robust accuracy"),
        (
            (FIXED_STEPS, None),
            "2 of 2 checks are flagged: do not trust any robust accuracy",
        ),  # of older results
    ],
)
def test_what_is_not_to_be_trusted(doubts, sentence):
    verdicts = [verdict("a", FLAGGED, doubts=each) for each in doubts]
    if doubts[1] is None:
        del verdicts[1]["doubts"]
    found = audit_verdict({"verdicts": verdicts})
    assert found[0] == FLAGGED
    assert found[1].startswith(sentence)
    assert audit_verdict({"verdicts": [*verdicts, verdict("b", PASSED, doubts=EVERYTHING)]})[0] == FLAGGED


def test_without_an_ensemble_the_verdict_asks_for_one():
    audit = {"verdicts": [verdict("a", FLAGGED, doubts=FIXED_STEPS)]}
    assert audit_verdict(audit)[1].endswith("use the ensemble's accuracy")
    assert audit_verdict(audit, ensemble=False)[1].endswith("evaluate with AutoAttack")


def test_report_without_an_audit_says_so():
    assert audit_verdict(None)[0] == NOT_RUN
    assert "No audit" in audit_verdict(None)[1]


def test_images_that_were_read_again_are_no_audit():
    audit = {"examples": 0, "verdicts": [verdict("Accuracy computed again", PASSED)]}
    assert audit_verdict(audit)[0] == NOT_RUN
    assert audit_verdict(audit)[1].startswith("No audit was made. The stored adversarial images")
    assert audit_summary(audit) == "no audit"
    audit["verdicts"].append(verdict("Selected on test images", FLAGGED))
    assert audit_verdict(audit)[0] == FLAGGED
    assert audit_summary(audit) == "flagged: Selected on test images"


def test_a_note_on_stored_images_is_on_the_ensemble():
    note = verdict("Accuracy computed again", NOTE, doubts=EVERYTHING)
    banner = audit_verdict({"verdicts": [note]})[1]
    assert banner.endswith("(Accuracy computed again), and the ensemble's accuracy is uncertain by these")
    assert "optimistic" not in banner
    alone = audit_verdict({"examples": 0, "verdicts": [note]})[1]
    assert "read again, and rounding decides for some of them" in alone
    assert "same accuracy" not in alone


def test_a_note_on_the_models_own_gradient_is_not_on_fixed_steps():
    notes = [verdict("Steps", NOTE, doubts=FIXED_STEPS), verdict("BPDA", NOTE, doubts=OWN_GRADIENT)]
    both, own = (audit_verdict({"verdicts": some})[1] for some in (notes, notes[1:]))
    assert (
        "fixed-step attacks are optimistic (Steps): the ensemble's accuracy is the one to use. Attacks"
        in both
    )
    assert both.endswith("own gradient are optimistic (BPDA): use the accuracy with BPDA")
    assert "fixed-step" not in own


@pytest.mark.parametrize(("planned", "ran"), [(False, False), (True, False), (True, True)])
def test_the_report_says_whether_the_full_square_of_fast_ran(tmp_path, planned, ran):
    labels, predictions = fake_evaluation()
    predictions["fast"] = predictions["new_attack"]
    names = ["pma", "square", *["square_full"] * planned]
    stages = {"pma": 0.5, "square": 0.4, **({"square_full": 0.3} if ran else {})}
    meta = {**META, "autoattack": names, "stages": stages}
    write_report(tmp_path, Results(meta, metrics.summarize(labels, predictions, np.arange(20, 10, -1))))
    markdown = (tmp_path / "report.md").read_text()
    assert ("On this model it was needed." in markdown) == ran
    assert ("On this model it was not needed." in markdown) == (planned and not ran)
    assert ("| Square in full | 30.0 |" in markdown) == ran


@pytest.mark.parametrize(
    ("ensembles", "shown"),
    [
        ((), ()),
        (("robal_aa",), ("robal_aa",)),
        (("robal_aa", "autoattack"), ("autoattack",)),
        (("autoattack", "union"), ("autoattack", "union")),
        (("union_bpda",), ("union_bpda",)),
        (("autoattack_rand",), ("autoattack_rand",)),
        (("torchattacks",), ("torchattacks",)),
        (("fast_bpda",), ("fast_bpda",)),
        (("autoattack", "custom_own"), ("autoattack", "custom_own")),
        (("custom_own_bpda",), ("custom_own_bpda",)),
    ],
)
def test_ensembles(tmp_path, ensembles, shown):
    labels, predictions = fake_evaluation()
    predictions |= dict.fromkeys(ensembles, predictions["new_attack"])
    results = Results(META, metrics.summarize(labels, predictions, np.arange(20, 10, -1)))
    write_report(tmp_path, results)
    markdown = (tmp_path / "report.md").read_text()
    run = {"autoattack", "union_bpda"} & {*ensembles}
    assert ("**AutoAttack** was not run" in markdown) == (not run)
    for name in {*shown} - {"autoattack"}:
        assert f"**{display_name(name)}** " in markdown.partition("## How to read this")[2]
    assert ("two of the four attacks of AutoAttack" in markdown) == ("robal_aa" in ensembles)
    assert ("must not be compared with one. AutoAttack alone leaves" in markdown) == ("union" in ensembles)
    header = markdown[: markdown.index("## Summary")]
    names = [display_name(name) for name in ("clean", "pgd_20")]
    last = " = ".join(display_name(name) for name in (*shown, "worst"))
    assert re.findall(r"^- (.*): \*\*", header, re.MULTILINE) == [*names, last]
    lines = printed(evaluation_table, results).splitlines()
    assert max(map(len, lines)) <= 100
    assert "…" not in "".join(lines)


def results_of(conditions, groups=None, counts=(9, 8, 7, 6), **meta):
    """Results in which a condition's first images of each of four classes are right: ``{name: shares}``."""
    labels = np.repeat(np.arange(4), 50)
    predictions = {
        name: np.where(np.tile(np.arange(50), 4) < 50 * np.repeat(shares, 50), labels, (labels + 1) % 4)
        for name, shares in conditions.items()
    }
    meta = {"method": "A", "dataset": "b", "main_attack": "pgd_20", **meta}
    return Results(meta, metrics.summarize(labels, predictions, counts, groups=groups))


CLEAN = {"clean": [1, 1, 0.9, 0.9]}
LINF = {"norm": "L-infinity", "epsilon": 8 / 255}
SIXTY = "Of 200 test images 60.0 % [53.1, 66.5] are still classified correctly under"


@pytest.mark.parametrize(
    ("attacks", "groups", "meta", "words"),
    [
        (
            {"pgd_20": [0.8, 0.7, 0.6, 0.5], "autoattack": [0.8, 0.6, 0.6, 0.4]},
            None,
            LINF,
            f"{SIXTY} AutoAttack at L∞ 8/255; "
            "in the tail classes 40.0 % [27.6, 53.8], 40.0 points less than in the head classes.",
        ),
        (
            {"pgd_20": [0.8] * 4, "autoattack": [0.6, 0.6, 0.6, 0.62], "union": [0.6] * 4},
            None,
            LINF,
            f"{SIXTY} union (AutoAttack + PMA + APGD-MALT) at L∞ 8/255; in the tail classes 60.0 % [46.2, "
            "72.4], as in the head classes. AutoAttack alone leaves 60.5 % [53.6, 67.0]; PMA and APGD-MALT "
            "lower it by 0.5 points. Compare only AutoAttack's with published figures.",
        ),
        (
            {"pgd_20": [0.8] * 4, "autoattack": [0.6, 0.6, 0.6, 0.62], "custom_own": [0.6] * 4},
            {"all": range(4)},
            LINF,
            f"{SIXTY} Ensemble with own attacks at L∞ 8/255. AutoAttack alone leaves 60.5 % [53.6, 67.0]; "
            "the attacks after it lower it by 0.5 points. Compare only AutoAttack's with published figures.",
        ),
        (
            {"pgd_20": [0.8] * 4, "union_bpda": [0.6] * 4},
            None,
            {},
            f"{SIXTY} union (AutoAttack + PMA + APGD-MALT) + BPDA; in the tail classes 60.0 % [46.2, 72.4], "
            "as in the head classes. This is no figure of AutoAttack; do not compare it with one.",
        ),
        (
            {"pgd_20": [0.8] * 4, "autoattack_rand": [0.6] * 4},
            None,
            {},
            f"{SIXTY} AutoAttack rand; in the tail classes 60.0 % [46.2, 72.4], as in the head classes. "
            "AutoAttack's standard version was not run; it may find a lower number.",
        ),
        (
            {"pgd_20": [0.4, 0.6, 0.6, 0.8]},
            {"head": [0, 1], "tail": [2, 3]},
            {"norm": "L2", "epsilon": 0.5},
            f"{SIXTY} PGD-20 at L2 0.5; in the "
            "tail classes 70.0 % [60.4, 78.1], 20.0 points more than in the head classes. AutoAttack was not "
            "run; it may find a lower number.",
        ),
        (
            {"pgd_20": [0.6] * 4, "robal_aa": [0.6] * 4},
            None,
            {},
            f"{SIXTY} APGD-CE + APGD-T; in the "
            "tail classes 60.0 % [46.2, 72.4], as in the head classes. AutoAttack was not run; it may find a "
            "lower number.",
        ),
        (
            {"pgd_20": [0.6] * 4, "autoattack": [0.6] * 4},
            {"all": range(4)},
            LINF,
            f"{SIXTY} AutoAttack at L∞ 8/255.",
        ),
        (
            {},
            {"medium": range(4)},
            LINF | {"main_attack": "clean"},
            "Of 200 test images 95.0 % [91.0, 97.3] are classified correctly. No attack was run.",
        ),
        (
            {"pgd_20": [0.6] * 4},
            {"medium": [0], "tail": [1, 2, 3]},
            LINF | {"main_attack": "worst"},
            f"{SIXTY} the worst of all "
            "conditions at L∞ 8/255; in the tail classes 60.0 % [52.0, 67.5]. AutoAttack was not run; it may "
            "find a lower number.",
        ),
    ],
)
def test_first_line_in_words(tmp_path, attacks, groups, meta, words):
    results = results_of(CLEAN | attacks, groups, **meta)
    assert in_words(results) == words
    write_report(tmp_path, results)
    assert (tmp_path / "report.md").read_text().split("\n\n")[1] == words
    html = Text((tmp_path / "report.html").read_text()).text
    assert html.index(words) < html.index("No audit")
    assert words in " ".join(printed(evaluation_table, results).split())


def test_tail_is_on_the_cards(tmp_path):
    write_report(tmp_path, results_of(CLEAN | {"pgd_20": [0.8, 0.7, 0.6, 0.5]}, **LINF))
    header = (tmp_path / "report.md").read_text().partition("## Summary")[0]
    assert "- PGD-20 = Worst: **65.0 %** [58.2, 71.3]; tail 50.0 %" in header
    write_report(tmp_path, results_of(CLEAN | {"pgd_20": [0.5] * 4}, {"all": range(4)}, **LINF))
    header, _, rest = (tmp_path / "report.md").read_text().partition("## Summary")
    assert "- PGD-20 = Worst: **50.0 %** [43.1, 56.9]\n" in header.replace(" \n", "\n")
    assert "tail" not in header + rest.partition("## How to read")[0].lower()
    assert "## All classes" not in rest


def test_equal_rows_are_one_row(tmp_path):
    shares = [0.8, 0.7, 0.6, 0.5]
    attacks = {"fgsm": [0.9] * 4, "pgd_20": shares, "mim_20": shares, "autoattack": shares}
    write_report(tmp_path, results_of(CLEAN | attacks, **LINF))
    markdown = (tmp_path / "report.md").read_text()
    rows = re.findall(r"^\| (\S.*?) \|", markdown.partition("## Classes")[0], re.MULTILINE)
    assert rows.count("PGD-20 = AutoAttack = Worst") == 1  # in the summary, which has no MIM
    assert rows.count("PGD-20 = MIM-20 = AutoAttack = Worst") == 3
    assert rows.count("FGSM") == 3
    assert (
        "| Class | Name | Training images | Test images | Clean | PGD-20 = AutoAttack = Worst |" in markdown
    )


@pytest.mark.slow
@pytest.mark.parametrize(("num_classes", "tables"), [(20, 1), (21, 2), (100, 2)])
def test_many_classes_are_folded(tmp_path, num_classes, tables):
    write_report(
        tmp_path, fake_results(num_classes, META | {"class_names": [f"n{k}" for k in range(num_classes)]})
    )
    html = (tmp_path / "report.html").read_text()
    classes = html[html.index('<h2 id="classes">') : html.index('<h2 id="what-was-evaluated">')]
    assert classes.count("<table>") == tables
    folded = classes.partition("<details>")[2]
    assert folded.count("<tr>") == (num_classes + 1 if tables == 2 else 0)
    if tables == 2:
        shown = classes.partition("<details>")[0]
        found = re.findall(r">n(\d+)<", shown)
        assert [int(k) for k in found] == [*range(5), *range(num_classes - 5, num_classes)]
        assert f"<summary>All {num_classes} classes</summary>" in folded


def test_training_commit_and_processor(tmp_path):
    training = {"epoch": [1, 2], "loss": [2.0, 1.0], "adv_accuracy": [0.1, 0.256], "grad_norm": [1.0, 1.0]}
    meta = META | {"training": training, "commit": "0123abc-dirty", "processor": "Z80 & co"}
    write_report(tmp_path, fake_results(meta=meta))
    markdown, html = ((tmp_path / f"report.{kind}").read_text() for kind in ("md", "html"))
    assert "| Git commit | 0123abc-dirty |" in markdown
    assert "Z80 & co" in Text(html).text
    assert "The 2 epochs up to the checkpoint" in markdown
    assert "Last epoch: accuracy under attack 25.6 %." in markdown
    assert "training.png" in markdown
    assert "grad_norm" not in markdown  # not as a setting
    assert json.loads((tmp_path / "results.json").read_text())["meta"]["training"] == training


@pytest.mark.slow
def test_accuracy_by_radius(tmp_path):
    audit = {"examples": 50, "verdicts": [], "curves": {"epsilon": curve([0, 0.1], PGD=[0.9, 0.5])}}
    write_report(tmp_path, fake_results(audit=audit))
    assert {file.name for file in tmp_path.iterdir()} == FILES | {"epsilon.png"}
    markdown = (tmp_path / "report.md").read_text()
    assert markdown.index("(epsilon.png)") < markdown.index("## Audit")


def test_distances(tmp_path):
    figure, unknown = {"value": 0.15, "low": 0.1, "high": 0.2}, {"value": None, "low": 0.3, "high": None}
    median = {
        "all": figure,
        "per_class": [figure] * 9 + [unknown],
        "groups": {"head": figure, "tail": unknown},
    }
    found = {"attack": "fmn", "found": 150, "median": median, "curve": curve([0, 8 / 255], fmn=[0.9, 0.5])}
    write_report(tmp_path, fake_results(meta=META | {"n": 200}, distances=found))
    markdown = (tmp_path / "report.md").read_text()
    assert "it found one for 150 of 200 images" in markdown
    assert "| Head | 0.15 [0.1, 0.2] |" in markdown
    assert "| Radius | Robust accuracy under FMN |" in markdown
    assert "| Tail | ∞ [0.3, ∞] |" in markdown
    assert "| 8/255 | 50.0 [45.0, 55.0] |" in markdown
    assert Results.read(tmp_path).distances == found
    assert "right under all other attacks" not in markdown
    write_report(tmp_path, fake_results(meta=META | {"n": 200}, distances=found | {"missed": 2}))
    assert "It breaks 2 images that are right under all other attacks" in (tmp_path / "report.md").read_text()
    one_group = found | {"median": median | {"groups": {"all": figure}}}
    write_report(tmp_path, fake_results(meta=META | {"n": 200}, distances=one_group))
    assert (tmp_path / "report.md").read_text().count("| All | 0.15 [0.1, 0.2] |") == 1
    write_report(tmp_path, fake_results())
    assert "distances" not in json.loads((tmp_path / "results.json").read_text())
    assert "Distance to" not in (tmp_path / "report.md").read_text()


def test_numbers_in_strings_keep_their_spaces(tmp_path):
    meta = META | {"remark": "[1,  2]", "list": [1, [2, 3]], "empty": []}
    write_report(tmp_path, fake_results(meta=meta))
    assert json.loads((tmp_path / "results.json").read_text())["meta"] == meta


def test_report_replaces_an_older_one(tmp_path):
    write_report(tmp_path, fake_results())
    write_report(tmp_path, fake_results(meta=META | {"method": "other"}))
    assert json.loads((tmp_path / "results.json").read_text())["meta"]["method"] == "other"
    assert {file.name for file in tmp_path.iterdir()} == FILES


@pytest.mark.slow
def test_report_without_attacks(tmp_path, drawn):
    labels, predictions = fake_evaluation()
    summary = metrics.summarize(labels, {"clean": predictions["clean"]}, np.arange(20, 10, -1))
    write_report(tmp_path, Results(META | {"main_attack": "clean"}, summary))
    assert (tmp_path / "per_class.png").is_file()


def test_report_refuses_an_unknown_main_attack(tmp_path):
    with pytest.raises(InputError, match="main attack 'pgd_99' was not evaluated"):
        write_report(tmp_path, fake_results(meta=META | {"main_attack": "pgd_99"}))


def test_report_refuses_a_folder_that_is_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write the report"):
        write_report(tmp_path / "file", fake_results())
