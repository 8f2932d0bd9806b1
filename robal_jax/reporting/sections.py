"""TODO reporting.sections."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from robal_jax.reporting import figures, page
from robal_jax.reporting.names import (
    class_name,
    display_name,
    headline,
    headline_attack,
    interval,
    percent,
    printed,
    with_interval,
)

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


def summary_section(
    summary: Mapping[str, Any], meta: Mapping[str, Any], audit: Mapping[str, Any] | None
) -> list[page.Block]:
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
        (display_name(name), f"{percent(row['accuracy'])} %", interval(row["accuracy"]))
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


def audit_section(audit: Mapping[str, Any] | None, pictures: Mapping[str, page.Block]) -> list[page.Block]:
    """Returns the verdict of every check, with its evidence."""
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


def condition_section(
    summary: Mapping[str, Any], meta: Mapping[str, Any], pictures: Mapping[str, page.Block]
) -> list[page.Block]:
    """Returns the figures of all conditions, and the accuracy after each attack of the ensemble."""
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


def group_section(summary: Mapping[str, Any]) -> list[page.Block]:
    """Returns the accuracies of head, medium and tail classes."""
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


def class_section(
    summary: Mapping[str, Any], meta: Mapping[str, Any], pictures: Mapping[str, page.Block]
) -> list[page.Block]:
    """Returns the figures and the table by class."""
    conditions, shown = summary["conditions"], headline(summary, meta)
    support = conditions["clean"]["per_class"]["support"]
    rows = (
        (
            index,
            class_name(meta, index),
            count,
            support[index],
            *(percent(conditions[name]["per_class"]["recall"][index]) for name in shown),
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


def norm_section(norms: Mapping[str, Any] | None, pictures: Mapping[str, page.Block]) -> list[page.Block]:
    """Returns the norms of weights and features by class."""
    if norms is None:
        return []
    text = (
        "A linear head trained on long-tailed data tends to give frequent classes longer weight vectors, and "
        "so larger logits. Feature norms are means over the class's clean test images."
    )
    return [page.section("Norms"), page.paragraph(text), *_pictures(pictures, "norms")]


def gallery_section(
    gallery: Mapping[str, Any] | None, pictures: Mapping[str, page.Block]
) -> list[page.Block]:
    """Returns adversarial examples."""
    if gallery is None:
        return []
    text = (
        f"Under {display_name(gallery['condition'])}: the image, the adversarial image, and the difference, "
        f"magnified {figures.magnification(gallery)} times about a middle grey that means no change. Each "
        "title is the true class, then the predicted one."
    )
    return [page.section("Adversarial examples"), page.paragraph(text), *_pictures(pictures, "gallery")]


def settings_section(meta: Mapping[str, Any]) -> list[page.Block]:
    """Returns what was evaluated, and the command."""
    known = [key for key in _META_LABELS if key in meta]
    others = [key for key in meta if key not in _META_LABELS and key not in _META_ELSEWHERE]
    settings = ((_META_LABELS.get(key, key), printed(meta[key])) for key in known + others)
    blocks = [page.section("What was evaluated"), page.table(("Setting", "Value"), settings)]
    if meta.get("command"):
        blocks += [page.paragraph("The command that made this report:"), page.code(meta["command"], "bash")]
    return blocks


def reading_section(summary: Mapping[str, Any], audit: Mapping[str, Any] | None) -> list[page.Block]:
    """Returns how to read the report."""
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


def config_section(meta: Mapping[str, Any]) -> list[page.Block]:
    """Returns the whole config, folded."""
    if not meta.get("config"):
        return []
    text = json.dumps(meta["config"], indent=2)
    return [page.section("Config"), page.code(text, "json", folded="All fields of the config")]


def _pictures(pictures: Mapping[str, page.Block], *names: str) -> list[page.Block]:
    return [pictures[name] for name in names if name in pictures]


def _by_condition(columns: Mapping[str, str], conditions: Mapping[str, Any]) -> page.Block:
    """Table of figures (key: heading) with intervals, a row per condition."""
    rows = (
        (display_name(name), *(with_interval(row[key]) for key in columns))
        for name, row in conditions.items()
    )
    return page.table(("Condition", *columns.values()), rows)
