"""What becomes of an evaluation: a table on the terminal, and the report as files.

A *summary* is what `metrics.summarize` returns. *meta* says what was evaluated; `write_report` lists its
keys. Conditions ('clean', 'fgsm', ...) are taken from the summary, never assumed, but for the first, 'clean',
and the last, 'worst'.
"""

import csv
import io
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from robal_jax import figures, page
from robal_jax.errors import InputError
from robal_jax.figures import class_name, display_name, headline, headline_attack
from robal_jax.page import Block

# Order and names of the known keys of meta in the report.
_META_LABELS = {
    "method": "Method",
    "dataset": "Data set",
    "imbalance": "Imbalance",
    "n": "Test images",
    "norm": "Threat model: norm",
    "epsilon": "Threat model: radius",
    "steps": "Attack steps",
    "step_size": "Attack step size",
    "start": "Attack start",
    "head": "Head under attack",
    "logit_scale": "Logit scale under attack",
    "prior_adjustment": "Prior adjustment at test time",
    "main_attack": "Main attack",
    "autoattack": "Attacks of the ensemble",
    "checkpoint": "Checkpoint",
    "checkpoint_sha256": "Checkpoint SHA-256",
    "seed": "Seed",
    "evaluation_seed": "Seed of the attacks",
    "precision": "Precision of products",
    "test_set_sha256": "Test set SHA-256",
    "versions": "Versions",
    "device": "Device",
    "date": "Date",
    "seconds": "Seconds that the evaluation took",
}
_META_ELSEWHERE = ("class_names", "command", "config", "stages")

_CAPTIONS = {
    "curves": "Accuracy over the scale of the logits, over steps and over restarts",
    "attacks": "Robust accuracy by attack",
    "per_class": "Accuracy by class over the training images",
    "errors": "Natural error, boundary error and robust accuracy by class",
    "confusion": "Classes that the attack confuses, in percent of the true class",
    "norms": "Training images, weight norms and feature norms by class",
    "gallery": "Images, adversarial images and the difference between them",
}


def terminal() -> Console:
    """Where tables go: as wide as the terminal is, 100 columns where there is none."""
    console = Console()
    return console if console.is_terminal else Console(width=100)


def evaluation_table(summary: Mapping[str, Any], console: Console) -> None:
    """Print one row per condition, in percent; `write_report` has the intervals of all columns.

    Args:
        summary: see `metrics.summarize`.
        console: where to print.
    """
    groups = list(summary["groups"])
    shown = (*groups, "balanced_accuracy", "f_score", "natural_error", "boundary_error")
    headers = (*map(str.capitalize, groups), "Balanced", "Macro F", "Nat. err.", "Bound. err.")
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), title="Percent of test images [95 % interval]")
    table.add_column("Condition", min_width=10)  # the one that breaks into lines where space is short
    for header in ("Accuracy", *headers):
        table.add_column(header, justify="right", no_wrap=True)
    for name, condition in summary["conditions"].items():
        cells = [_percent(condition[figure]) for figure in shown]
        table.add_row(display_name(name), with_interval(condition["accuracy"]), *cells)
    console.print(table)


def write_report(
    folder: Path,
    summary: Mapping[str, Any],
    meta: Mapping[str, Any],
    *,
    audit: Mapping[str, Any] | None = None,
    norms: Mapping[str, Any] | None = None,
    gallery: Mapping[str, Any] | None = None,
) -> list[Path]:
    """Write report.html (one file that loads nothing), report.md with its figures, results.json and a CSV.

    Each file is written under another name and then renamed, so that it is never found half written.

    Args:
        folder: where to write; made if it is missing.
        summary: see `metrics.summarize`.
        meta: JSON values. Needed: 'method', 'dataset' and 'main_attack' (the condition that stands for
            robustness where no ensemble was evaluated). Known: 'imbalance', 'n', 'norm', 'epsilon', 'steps',
            'step_size', 'start', 'logit_scale', 'prior_adjustment', 'checkpoint', 'checkpoint_sha256',
            'seed', 'versions' ({package: version}), 'device', 'date', 'seconds', 'command', 'config' (a
            nested dict), 'class_names' (list of K), 'autoattack' (names of an ensemble's attacks), 'stages'
            ({attack: accuracy left after it and all before it}). The report prints any other key as it is.
        audit: whether the attacks can be believed, JSON values. 'examples', the number of images;
            'verdicts', a list of {'name', 'title', 'flagged' (None: not run), 'statement', 'evidence' (a
            dict)}; 'curves', any of 'scale', 'steps' and 'restarts', each {'x' [m], 'series' {name: m
            FIGUREs}}.
        norms: 'weights', the norm of each class's weight vector, [K], or None where there is none;
            'features', the mean norm of each class's features, [K].
        gallery: 'images' and 'adversarial', [m, H, W, 1 or 3] in [0, 1], m >= 1; 'labels' and 'predictions',
            [m]; 'condition', the attack.

    Returns:
        The files written.

    Raises:
        InputError: the main attack was not evaluated, or the folder cannot be written.
    """
    if meta["main_attack"] not in summary["conditions"]:
        raise InputError(
            f"The main attack '{meta['main_attack']}' is not among the evaluated conditions: "
            f"{', '.join(summary['conditions'])}."
        )
    drawn = _draw(summary, meta, audit, norms, gallery)
    pictures = {
        name: page.figure(f"{name}.png", _CAPTIONS[name], figures.svg(figure))
        for name, figure in drawn.items()
    }
    title = figures.title(meta)
    blocks = [
        *_summary_section(summary, meta, audit),
        *_audit_section(audit, pictures),
        *_condition_section(summary, meta, pictures),
        *_group_section(summary),
        *_class_section(summary, meta, pictures),
        *_norm_section(norms, pictures),
        *_gallery_section(gallery, pictures),
        *_settings_section(meta),
        *_reading_section(summary, audit),
        *_config_section(meta),
    ]
    contents = {
        "results.json": _json({"meta": meta, "summary": summary, "audit": audit, "norms": norms}),
        "per_class.csv": _per_class_csv(summary, meta),
        "report.md": page.to_markdown(title, blocks),
        "report.html": page.to_html(title, blocks),
    }
    files = {name: text.encode() for name, text in contents.items()}
    files |= {f"{name}.png": figures.png(figure) for name, figure in drawn.items()}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            partial = folder / f".{name}.partial"
            partial.write_bytes(content)
            partial.replace(folder / name)
    except OSError as error:
        raise InputError(f"Cannot write the report to {folder}: {error.strerror}.") from error
    return [folder / name for name in files]


def _draw(
    summary: Mapping[str, Any],
    meta: Mapping[str, Any],
    audit: Mapping[str, Any] | None,
    norms: Mapping[str, Any] | None,
    gallery: Mapping[str, Any] | None,
) -> dict[str, figures.Figure]:
    """All figures that the inputs allow, by name."""
    drawn = {
        "attacks": figures.attacks_figure(summary, meta),
        "per_class": figures.per_class_figure(summary, meta),
        "errors": figures.errors_figure(summary, meta),
        "confusion": figures.confusion_figure(summary, meta),
    }
    if audit and audit.get("curves"):
        drawn["curves"] = figures.curves_figure(audit["curves"], meta)
    if norms:
        drawn["norms"] = figures.norms_figure(norms, summary, meta)
    if gallery:
        drawn["gallery"] = figures.gallery_figure(gallery, meta)
    return drawn


# Checks that doubt gradient attacks of fixed steps alone, of which an ensemble does not consist.
_OF_FIXED_STEPS = {
    "logit_scale",
    "steps",
    "restarts",
    "zero_gradients",
    "unbounded",
    "gradient_free",
    "transfer",
}


def audit_verdict(audit: Mapping[str, Any] | None) -> tuple[bool | None, str]:
    """The verdict on all checks together.

    Args:
        audit: see `write_report`.

    Returns:
        True if any check is flagged, False if none of those that were run is, None if none was run; and a
        sentence for people.
    """
    if audit is None:
        return None, "No audit was made: nothing here tells whether the attacks were as strong as they can be"
    outcomes = [verdict["flagged"] for verdict in audit["verdicts"]]
    names = {verdict["name"] for verdict in audit["verdicts"] if verdict["flagged"]}
    flagged, run = outcomes.count(True), len(outcomes) - outcomes.count(None)
    if not run:
        return None, f"No check was run (0 of {len(outcomes)})"
    if not flagged:
        return False, f"No check was flagged ({run} of {len(outcomes)} run)"
    left_out = "" if run == len(outcomes) else f" ({len(outcomes) - run} not run)"
    return True, (
        f"{flagged} of {len(outcomes)} checks {'is' if flagged == 1 else 'are'} flagged{left_out}: "
        + (
            "the attacks with fixed steps (FGSM, PGD, MIM) must not be believed; look at the ensemble"
            if names <= _OF_FIXED_STEPS
            else "no robust accuracy of this report must be believed"
        )
    )


def _summary_section(
    summary: Mapping[str, Any], meta: Mapping[str, Any], audit: Mapping[str, Any] | None
) -> list[Block]:
    """The page's header, then the headline with its intervals."""
    conditions = {name: summary["conditions"][name] for name in headline(summary, meta)}
    shown = {
        "accuracy": "All classes",
        **{name: name.capitalize() for name in summary["groups"]},
        "balanced_accuracy": "Balanced accuracy",
    }
    facts = [
        f"{words} {printed(meta[key])}"
        for key, words in (
            ("imbalance", "imbalance"),
            ("n", "test images"),
            ("norm", "norm"),
            ("epsilon", "radius"),
            ("date", "date"),
        )
        if key in meta
    ]
    values = (
        (display_name(name), f"{_percent(row['accuracy'])} %", _interval(row["accuracy"]))
        for name, row in conditions.items()
    )
    return [
        *([page.paragraph(" · ".join(facts))] if facts else []),
        page.banner(*audit_verdict(audit)),
        page.cards(values),
        page.section("Summary"),
        page.paragraph("Accuracy in percent of test images, with 95 % intervals."),
        _by_condition(shown, conditions),
    ]


def _audit_section(audit: Mapping[str, Any] | None, pictures: Mapping[str, Block]) -> list[Block]:
    if audit is None:
        return []
    items = (
        (
            verdict["flagged"],
            verdict["title"],
            verdict["statement"],
            _evidence(verdict["evidence"]),
        )
        for verdict in audit["verdicts"]
    )
    count = audit["examples"]
    sample = f"Checks that attack anew do so on a sample of {count} test images." if count else ""
    return [
        page.section("Audit"),
        page.paragraph(
            "Each check looks for a sign that an attack is weaker than it seems, so that the accuracy under "
            f"it is too high. What an attack leaves is the share of images that are still right. {sample}"
        ),
        page.checks(items),
        *_pictures(pictures, "curves"),
    ]


def _evidence(evidence: Mapping[str, Any]) -> str:
    """Evidence on one line: 'accuracy (1 = 0.48, 30 = 0.61), images = 500'."""

    def entry(key: str, value: Any) -> str:
        if isinstance(value, Mapping):
            return f"{key} ({_evidence(value)})"
        return f"{key} = {value:.4g}" if isinstance(value, float) else f"{key} = {printed(value)}"

    return ", ".join(entry(key, value) for key, value in evidence.items())


def _condition_section(
    summary: Mapping[str, Any], meta: Mapping[str, Any], pictures: Mapping[str, Block]
) -> list[Block]:
    conditions = summary["conditions"]
    accuracies = {
        "accuracy": "Accuracy",
        "balanced_accuracy": "Balanced accuracy",
        "precision": "Macro precision",
        "f_score": "Macro F-score",
    }
    errors = {
        "natural_error": "Natural error",
        "boundary_error": "Boundary error",
        "robust_accuracy": "Right on both",
    }
    attacked = {name: row for name, row in conditions.items() if name != "clean"}
    blocks = [
        page.section("All conditions"),
        page.paragraph("Percent, with 95 % intervals. Macro recall is the balanced accuracy."),
        _by_condition(accuracies, conditions),
        page.paragraph("Natural error + boundary error + right on both = 100 %."),
        _by_condition(errors, attacked),
    ]
    if meta.get("stages"):
        rows = ((display_name(name), f"{100 * value:.1f}") for name, value in meta["stages"].items())
        blocks += [
            page.paragraph("Robust accuracy after each attack of the ensemble, in percent:"),
            page.table(("After", "Accuracy"), rows),
        ]
    return [*blocks, pictures["attacks"]]


def _group_section(summary: Mapping[str, Any]) -> list[Block]:
    conditions, groups, counts = summary["conditions"], summary["groups"], summary["class_counts"]

    def count_range(classes: Sequence[int]) -> str:
        return f"{min(counts[k] for k in classes)} to {max(counts[k] for k in classes)}"

    blocks = [
        page.section("Head, medium and tail classes"),
        page.table(
            ("Group", "Classes", "Training images per class"),
            [(name, len(classes), count_range(classes)) for name, classes in groups.items()],
        ),
        page.paragraph("Accuracy in percent over the test images of the group, with 95 % intervals."),
        _by_condition({name: name.capitalize() for name in groups}, conditions),
    ]
    if "groups_of_ten" in conditions["clean"]:
        rows = (
            (display_name(name), *(f"{100 * mean:.1f}" for mean in condition["groups_of_ten"]))
            for name, condition in conditions.items()
        )
        blocks += [
            page.section("Ten groups of consecutive classes"),
            page.paragraph(
                "Mean recall of the classes in percent, from the first tenth of the class indices to the "
                "last."
            ),
            page.table(("Condition", *range(1, 11)), rows),
        ]
    return blocks


def _class_section(
    summary: Mapping[str, Any], meta: Mapping[str, Any], pictures: Mapping[str, Block]
) -> list[Block]:
    conditions, shown = summary["conditions"], headline(summary, meta)
    support = conditions["clean"]["per_class"]["support"]
    rows = (
        (
            index,
            class_name(meta, index),
            count,
            support[index],
            *(_percent(conditions[name]["per_class"]["recall"][index]) for name in shown),
        )
        for index, count in enumerate(summary["class_counts"])
    )
    return [
        page.section("Classes"),
        *_pictures(pictures, "per_class", "errors", "confusion"),
        page.paragraph(
            f"Errors and confusion are those under {display_name(headline_attack(summary, meta))}. The table "
            "gives accuracies in percent; per_class.csv has all conditions, with intervals, precision and "
            "F-score, and results.json all confusion matrices."
        ),
        page.table(("Class", "Name", "Training images", "Test images", *map(display_name, shown)), rows),
    ]


def _norm_section(norms: Mapping[str, Any] | None, pictures: Mapping[str, Block]) -> list[Block]:
    if norms is None:
        return []
    text = (
        "A linear head trained on long-tailed data tends to give frequent classes longer weight vectors, and "
        "so larger logits. Feature norms are means over the class's clean test images."
    )
    return [page.section("Norms"), page.paragraph(text), *_pictures(pictures, "norms")]


def _gallery_section(gallery: Mapping[str, Any] | None, pictures: Mapping[str, Block]) -> list[Block]:
    if gallery is None:
        return []
    text = (
        f"Under {display_name(gallery['condition'])}: the image, the adversarial image, and the difference, "
        f"magnified {figures.magnification(gallery)} times about a middle grey that means no change. Each "
        "title is the true class, then the predicted one."
    )
    return [page.section("Adversarial examples"), page.paragraph(text), *_pictures(pictures, "gallery")]


def _settings_section(meta: Mapping[str, Any]) -> list[Block]:
    known = [key for key in _META_LABELS if key in meta]
    others = [key for key in meta if key not in _META_LABELS and key not in _META_ELSEWHERE]
    settings = ((_META_LABELS.get(key, key), printed(meta[key])) for key in known + others)
    blocks = [page.section("What was evaluated"), page.table(("Setting", "Value"), settings)]
    if meta.get("command"):
        blocks += [page.paragraph("The command that made this report:"), page.code(meta["command"], "bash")]
    return blocks


def _reading_section(summary: Mapping[str, Any], audit: Mapping[str, Any] | None) -> list[Block]:
    conditions = summary["conditions"]
    items = [
        (
            "Intervals.",
            "Every share of test images has a 95 % Wilson interval; macro means have a 95 % percentile "
            "interval of a bootstrap within classes. Both cover the choice of test images only, not the "
            "spread over training seeds.",
        ),
        (
            "Accuracy",
            "looks at the attacked image alone. Natural error (wrong when clean) plus boundary error (right "
            "when clean, wrong under the attack) is the robust error; an image that is wrong when clean "
            "counts as broken.",
        ),
        ("Worst", "counts an image as right only if it is right under every condition of the table."),
        (
            "Scale of the logits.",
            "Attacks that follow the gradient of the cross-entropy (FGSM, PGD, MIM) depend on it: a large "
            "scale saturates the softmax, a small one flattens it, and either can raise the accuracy without "
            "making the model more robust. Compare models at several scales, or by an attack that does not "
            "depend on the scale.",
        ),
    ]
    if audit:
        items.append(
            (
                "Audit.",
                "A flagged check means that an attack can be made stronger by simple means, or that it "
                "fails for a reason other than robustness. Checks that pass are no proof of robustness.",
            )
        )
    if "robal_aa" in conditions:
        text = "is the pair of attacks that the paper reports on: two of the four attacks of AutoAttack."
        items.append((display_name("robal_aa"), text))
    if not any(name.startswith("autoattack") for name in conditions):
        text = (
            "was not run. The attacks above bound robust accuracy from above, less tightly than the standard "
            "ensemble does; those with a fixed step size least tightly."
        )
        items.append(("AutoAttack", text))
    return [page.section("How to read this"), page.points(items)]


def _config_section(meta: Mapping[str, Any]) -> list[Block]:
    if not meta.get("config"):
        return []
    text = json.dumps(meta["config"], indent=2)
    return [page.section("Config"), page.code(text, "json", folded="All fields of the config")]


def _pictures(pictures: Mapping[str, Block], *names: str) -> list[Block]:
    return [pictures[name] for name in names if name in pictures]


def _by_condition(columns: Mapping[str, str], conditions: Mapping[str, Any]) -> Block:
    """Table of figures (key: heading) with intervals, a row per condition."""
    rows = (
        (display_name(name), *(with_interval(row[key]) for key in columns))
        for name, row in conditions.items()
    )
    return page.table(("Condition", *columns.values()), rows)


def _json(results: Mapping[str, Any]) -> str:
    """JSON for people too: lists of numbers, such as rows of a confusion matrix, stand on one line."""
    text = json.dumps(results, indent=1, allow_nan=False)
    # Only the layout is touched: inside a string JSON writes a line break as \n.
    return re.sub(r'\[\n[^\[\]{}"]*\]', lambda match: f"[{' '.join(match[0][1:-1].split())}]", text)


def _per_class_csv(summary: Mapping[str, Any], meta: Mapping[str, Any]) -> str:
    rows = [
        {
            "class": index,
            "name": class_name(meta, index),
            "train_count": count,
            "support": row["support"][index],
            "condition": name,
            "recall": row["recall"][index]["value"],
            "recall_low": row["recall"][index]["low"],
            "recall_high": row["recall"][index]["high"],
            "precision": row["precision"][index],
            "f_score": row["f_score"][index],
            "natural_error": row["natural_error"][index],
            "boundary_error": row["boundary_error"][index],
        }
        for index, count in enumerate(summary["class_counts"])
        for name, row in ((name, entry["per_class"]) for name, entry in summary["conditions"].items())
    ]
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue()


def printed(value: Any) -> str:
    """Print a value of meta on one line."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {printed(entry)}" for key, entry in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(printed, value))
    if isinstance(value, float):
        return f"{value:.6g}"
    return "none" if value is None else str(value)


def _percent(figure: Mapping[str, float]) -> str:
    return f"{100 * figure['value']:.1f}"


def _interval(figure: Mapping[str, float], sign: str = "") -> str:
    low, high = (format(100 * figure[key], f"{sign}.1f") for key in ("low", "high"))
    return f"[{low}, {high}]"


def with_interval(figure: Mapping[str, float], sign: str = "", space: str = " ") -> str:
    """A figure with its interval, in percent: '70.1 [66.7, 73.4]'."""
    return f"{100 * figure['value']:{sign}.1f}{space}{_interval(figure, sign)}"
