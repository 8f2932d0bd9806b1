"""The sections of a report, each a list of blocks (``page``), empty if there is nothing to show."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from robal_jax.reporting import page
from robal_jax.reporting.audit import verdict_on
from robal_jax.reporting.ensembles import FULL_SQUARE, ensemble_notes, full_square
from robal_jax.reporting.headline import in_words, tail_notes
from robal_jax.reporting.names import (
    BY_CLASS,
    display_name,
    folded,
    group_columns,
    group_name,
    interval,
    percent,
    printed,
    radius,
    threat,
    training_name,
    with_interval,
)
from robal_jax.reporting.results import MANY_CLASSES, Gallery, Results

# Order and names of the known keys of meta in the report.
_META_LABELS = {
    "method": "Method",
    "dataset": "Data set",
    "imbalance": "Imbalance",
    "generated": "Training",
    "ingredients": "Trained with",
    "weights": "Weights",
    "n": "Test images",
    "part": "Part of the test set",
    "norm": "Threat model: norm",
    "epsilon": "Threat model: radius",
    "budget": f"Radii by class ({BY_CLASS})",
    "step_size": "Attack step size",
    "start": "Attack start",
    "head": "Head under attack",
    "logit_scale": "Logit scale under attack",
    "prior_adjustment": "Prior adjustment at test time",
    "main_attack": "Main attack",
    "autoattack": "Attacks of the ensemble",
    "origin": "Weights imported from",
    "checkpoint": "Checkpoint",
    "selection": "Checkpoint chosen",
    "checkpoint_sha256": "Checkpoint SHA-256",
    "code_sha256": "SHA-256 of your own modules",
    "surrogate_code_sha256": "SHA-256 of the surrogate's modules of your own",
    "code": "Your own modules",
    "held_out": "Held out",
    "seed": "Seed",
    "evaluation_seed": "Seed of the attacks",
    "precision": "Precision of matrix products",
    "test_set_sha256": "Test set SHA-256",
    "commit": "Git commit",
    "versions": "Versions",
    "device": "Device",
    "processor": "Processor",
    "date": "Date",
    "seconds": "Duration of the evaluation in seconds",
}

END_CLASSES = 5  # shown of the head and of the tail if there are many classes

_META_ELSEWHERE = (
    "class_names", "command", "config", "identity", "stages", "training", "judged",
    "selected_on_test", "class_epsilon", "common_epsilon", "surrogate_sha256",
)  # fmt: skip
_FACTS = {
    "imbalance": "imbalance",
    "generated": "training",
    "weights": "weights",
    "n": "test images",
    "selection": "checkpoint",
    "date": "date",
}  # in the header
_META_OF_ATTACKS = ("main_attack", "autoattack")  # whose values are names of attacks


def summary_section(results: Results, pictures: Mapping[str, page.Block]) -> list[page.Block]:
    """Returns the page's header, then the headline with its intervals."""
    meta, conditions = results.meta, {name: results.conditions[name] for name in results.headline}
    shown = {**group_columns(results.groups), "balanced_accuracy": "Balanced accuracy"}
    facts = [
        *(f"{words} {printed(meta[key])}" for key, words in _FACTS.items() if key in meta),
        *([f"threat model {threat(meta)}"] if threat(meta) else []),
    ]
    values = folded(
        (
            display_name(name),
            (f"{percent(row['accuracy'])} %", interval(row["accuracy"]), *tail_notes(results, name)),
        )
        for name, row in conditions.items()
    )
    blocks = [
        page.lead(in_words(results)),
        *([page.paragraph(" · ".join(facts))] if facts else []),
        page.banner(*verdict_on(results)),
        page.cards((name, *texts) for name, texts in values),
        page.section("Summary"),
        page.paragraph("Accuracy in percent of test images, with 95 % intervals."),
        _by_condition(shown, conditions),
    ]
    if "epsilon" in pictures:
        text = (
            "The larger the radius, the more the attack may change the images of the audit's sample; at 0 "
            "they are clean. The accuracy falls to 0 as the radius grows, if the attack works."
        )
        if "class_epsilon" in meta:
            text += " The radius is given in multiples of each image's own."
        blocks += [page.paragraph(text), pictures["epsilon"]]
    return blocks


def condition_section(results: Results, pictures: Mapping[str, page.Block]) -> list[page.Block]:
    """Returns the figures of all conditions, and the accuracy after each attack of the ensemble."""
    meta, conditions = results.meta, results.conditions
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
        page.paragraph(
            "Natural error (wrong when clean) + boundary error (right when clean, wrong under the attack) + "
            "right on both = 100 %."
        ),
        _by_condition(errors, attacked),
    ]
    if meta.get("stages"):
        rows = ((display_name(name), f"{100 * value:.1f}") for name, value in meta["stages"].items())
        blocks += [
            page.paragraph("Robust accuracy after each attack of the ensemble, in percent:"),
            page.table(("After", "Accuracy"), rows),
        ]
    return [*blocks, pictures["attacks"]]


def group_section(results: Results) -> list[page.Block]:
    """Returns the accuracies of head, medium and tail classes."""
    conditions, groups = results.conditions, results.groups
    counts = results.summary["class_counts"]

    def count_range(classes: Sequence[int]) -> str:
        return f"{min(counts[k] for k in classes)} to {max(counts[k] for k in classes)}"

    blocks = []
    if groups:
        *others, last = map(group_name, groups)
        blocks = [
            page.section(f"{', '.join(others)} and {last} classes".capitalize()),
            page.table(
                ("Group", "Classes", "Training images per class"),
                [(group_name(name), len(classes), count_range(classes)) for name, classes in groups.items()],
            ),
            page.paragraph("Accuracy in percent over the test images of the group, with 95 % intervals."),
            _by_condition({name: group_name(name).capitalize() for name in groups}, conditions),
        ]
    if "groups_of_ten" in conditions["clean"]:
        rows = folded(
            (display_name(name), [f"{100 * mean:.1f}" for mean in condition["groups_of_ten"]])
            for name, condition in conditions.items()
        )
        blocks += [
            page.section("Ten groups of consecutive classes"),
            page.paragraph(
                "Mean recall in percent of the classes in each tenth of the class indices, from the first to "
                "the last."
            ),
            page.table(("Condition", *range(1, 11)), ((name, *cells) for name, cells in rows)),
        ]
    return blocks


def class_section(results: Results, pictures: Mapping[str, page.Block]) -> list[page.Block]:
    """Returns the figures and the table by class; of many classes it shows the ends and folds the rest."""
    conditions, counts = results.conditions, results.summary["class_counts"]
    recalls = folded(
        (display_name(name), [percent(recall) for recall in conditions[name]["per_class"]["recall"]])
        for name in results.headline
    )
    header = ("Class", "Name", "Training images", "Test images", *(name for name, _ in recalls))
    names = [results.class_name(index) for index in range(len(counts))]
    support = conditions["clean"]["per_class"]["support"]
    columns = (range(len(counts)), names, counts, support, *(cells for _, cells in recalls))
    rows = list(zip(*columns, strict=True))
    blocks = [
        page.section("Classes"),
        *_pictures(pictures, "per_class", "errors", "confusion"),
        page.paragraph(
            f"Errors and confusion are those under {display_name(results.headline_attack)}. The table gives "
            "accuracies in percent. All conditions, with intervals, precision and F-score, are in "
            "per_class.csv; all confusion matrices are in results.json."
        ),
    ]
    if len(rows) <= MANY_CLASSES:
        return [*blocks, page.table(header, rows)]
    order = sorted(range(len(rows)), key=lambda index: -counts[index])
    ends = [rows[index] for index in (*order[:END_CLASSES], *order[-END_CLASSES:])]
    return [
        *blocks,
        page.paragraph(
            f"The {END_CLASSES} classes with the most training images and the {END_CLASSES} with the fewest:"
        ),
        page.table(header, ends),
        page.folded(f"All {len(rows)} classes", page.table(header, rows)),
    ]


def norm_section(results: Results, pictures: Mapping[str, page.Block]) -> list[page.Block]:
    """Returns the norms of weights and features by class."""
    if results.norms is None:
        return []
    text = (
        "A linear head trained on long-tailed data tends to give frequent classes longer weight vectors, and "
        "so larger logits. Feature norms are means over the class's clean test images."
    )
    return [page.section("Norms"), page.paragraph(text), *_pictures(pictures, "norms")]


def gallery_section(gallery: Gallery | None, pictures: Mapping[str, page.Block]) -> list[page.Block]:
    """Returns adversarial examples."""
    if gallery is None:
        return []
    text = (
        f"Under {display_name(gallery.condition)}: the image, the adversarial image and their difference, "
        f"magnified {gallery.magnification} times; middle grey means no change. Each title gives the true "
        "class and then the predicted class."
    )
    return [page.section("Adversarial examples"), page.paragraph(text), *_pictures(pictures, "gallery")]


def training_section(results: Results, pictures: Mapping[str, page.Block]) -> list[page.Block]:
    """Returns the course of the training."""
    blocks = []
    for name, text in (("training", _trained), ("judged", _judged)):
        if name in pictures:
            blocks += [page.paragraph(text(results)), pictures[name]]
    return [page.section("Training"), *blocks] if blocks else []


def _trained(results: Results) -> str:
    """Describes the curves of the training."""
    curve = results.training
    accuracies = [name for name in curve if name.endswith("accuracy")]
    last = ", ".join(f"{training_name(name)} {100 * curve[name][-1]:.1f} %" for name in accuracies)
    attacked = any(name.startswith(("adv_", "mixed_")) for name in accuracies)
    return (
        f"The {len(curve['epoch'])} epochs up to the checkpoint: means over the steps of each epoch, on "
        f"augmented training images{', under the attack of the training' * attacked}."
        + (f" Last epoch: {last}." if last else "")
    )


def _judged(results: Results) -> str:
    """Says when the robust accuracy was highest during the training, and what was lost afterwards."""
    course = results.judged
    images, epochs, scores = course["images"], course["epoch"], course["pgd_balanced"]
    best = scores.index(max(scores))  # the first of equal ones
    highest, last = (round(100 * scores[index], 1) for index in (best, -1))
    held_out = f" Held out: {results.meta['held_out']}." if "held_out" in results.meta else ""
    place = f"Robust accuracy on {images} images (PGD-10, the mean of the classes) was highest in epoch"
    if best == len(scores) - 1:
        return f"{place} {epochs[best]}, the last ({highest:.1f} %).{held_out}"
    if highest == last:
        equal = f"and as high in epoch {epochs[-1]}, the last"
        return f"{place} {epochs[best]} ({highest:.1f} %), {equal}.{held_out}"
    return (
        f"{place} {epochs[best]} ({highest:.1f} %), and {last:.1f} % in epoch {epochs[-1]}, the last: "
        f"{highest - last:.1f} points lost to robust overfitting, or to chance if there are few images."
        f"{held_out}"
    )


def settings_section(results: Results) -> list[page.Block]:
    """Returns the settings of the evaluation, and the command."""
    meta = results.meta
    known = [key for key in _META_LABELS if key in meta]
    others = [key for key in meta if key not in _META_LABELS and key not in _META_ELSEWHERE]
    if full_square(meta) is False:
        meta = {**meta, "autoattack": [name for name in meta["autoattack"] if name != FULL_SQUARE]}
    settings = ((_META_LABELS.get(key, key), _setting(key, meta[key])) for key in known + others)
    blocks = [page.section("What was evaluated"), page.table(("Setting", "Value"), settings)]
    if meta.get("command"):
        blocks += [page.paragraph("The command that made this report:"), page.code(meta["command"], "bash")]
    return blocks


def _setting(key: str, value: Any) -> str:
    """Returns a value of meta on one line; attacks by their names for people."""
    if key in _META_OF_ATTACKS:
        return ", ".join(map(display_name, [value] if isinstance(value, str) else value)) or "none"
    exact = printed(value)
    return f"{radius(value)} = {exact}" if key == "epsilon" and radius(value) != exact else exact


def reading_section(results: Results) -> list[page.Block]:
    """Returns how to read the report."""
    items = [
        (
            "Intervals.",
            "Every share of test images has a 95 % Wilson interval; every macro mean has a 95 % exact "
            "interval at its effective number of images. They draw no random numbers, and cover the choice "
            "of test images only, not the spread over training seeds. The interval of macro precision is "
            "too narrow where classes have fewer test images than there are classes.",
        ),
        (
            "Accuracy",
            "looks at the attacked image alone. Natural error (wrong when clean) plus boundary error (right "
            "when clean, wrong under the attack) is the robust error, which counts an image that is wrong "
            "when clean as broken.",
        ),
        ("Worst", "counts an image as right only if it is right under every condition of the table."),
        (
            "Logit scale.",
            "Attacks that follow the gradient of the cross-entropy (FGSM, PGD, MIM) depend on the scale of "
            "the logits: a large scale saturates the softmax, a small one flattens it, and both can raise "
            "the accuracy without making the model more robust. Compare models at several scales, or by an "
            "attack that does not depend on the scale.",
        ),
    ]
    if results.audit:
        text = (
            "A flagged check is a sign that an attack fails for a reason other than robustness, or that "
            "figures cannot be trusted for another reason, which the check names. A note says by how much "
            "an attack can be made stronger by simple means. Passing every check is no proof of robustness."
        )
        items.append(("Audit.", text))
    return [page.section("How to read this"), page.points([*items, *ensemble_notes(results)])]


def config_section(results: Results) -> list[page.Block]:
    """Returns the whole config, folded."""
    if not results.meta.get("config"):
        return []
    text = json.dumps(results.meta["config"], indent=2)
    return [page.section("Config"), page.folded("All fields of the config", page.code(text, "json"))]


def _pictures(pictures: Mapping[str, page.Block], *names: str) -> list[page.Block]:
    return [pictures[name] for name in names if name in pictures]


def _by_condition(columns: Mapping[str, str], conditions: Mapping[str, Any]) -> page.Block:
    """Returns a table of FIGUREs (key: heading) with intervals, a row per condition."""
    rows = folded(
        (display_name(name), [with_interval(row[key]) for key in columns]) for name, row in conditions.items()
    )
    return page.table(("Condition", *columns.values()), ((name, *cells) for name, cells in rows))
