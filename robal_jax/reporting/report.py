"""What becomes of an evaluation: a table on the terminal, and the report as files.

A *summary* is what `metrics.summarize` returns. *meta* says what was evaluated; `write_report` lists its
keys. Conditions ('clean', 'fgsm', ...) are taken from the summary, never assumed, but for the first, 'clean',
and the last, 'worst'.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from robal_jax.errors import InputError
from robal_jax.reporting import figures, page
from robal_jax.reporting.names import report_title
from robal_jax.reporting.results import per_class_csv, to_json_text
from robal_jax.reporting.sections import (
    audit_section,
    class_section,
    condition_section,
    config_section,
    gallery_section,
    group_section,
    norm_section,
    reading_section,
    settings_section,
    summary_section,
)
from robal_jax.storage.files import write_whole
from robal_jax.storage.names import PER_CLASS, REPORT_HTML, REPORT_MARKDOWN, RESULTS

_CAPTIONS = {
    "curves": "Accuracy over the scale of the logits, over steps and over restarts",
    "attacks": "Robust accuracy by attack",
    "per_class": "Accuracy by class over the training images",
    "errors": "Natural error, boundary error and robust accuracy by class",
    "confusion": "Classes that the attack confuses, in percent of the true class",
    "norms": "Training images, weight norms and feature norms by class",
    "gallery": "Images, adversarial images and the difference between them",
}


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
    title = report_title(meta)
    blocks = [
        *summary_section(summary, meta, audit),
        *audit_section(audit, pictures),
        *condition_section(summary, meta, pictures),
        *group_section(summary),
        *class_section(summary, meta, pictures),
        *norm_section(norms, pictures),
        *gallery_section(gallery, pictures),
        *settings_section(meta),
        *reading_section(summary, audit),
        *config_section(meta),
    ]
    contents = {
        RESULTS: to_json_text({"meta": meta, "summary": summary, "audit": audit, "norms": norms}),
        PER_CLASS: per_class_csv(summary, meta),
        REPORT_MARKDOWN: page.to_markdown(title, blocks),
        REPORT_HTML: page.to_html(title, blocks),
    }
    files = {name: text.encode() for name, text in contents.items()}
    files |= {f"{name}.png": figures.png(figure) for name, figure in drawn.items()}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            write_whole(folder / name, content)
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
