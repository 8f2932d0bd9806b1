"""The report of an evaluation, as Markdown and as one page of HTML, beside the files of its results."""

import contextlib
import pathlib
from collections.abc import Iterator

from robal_jax.errors import InputError
from robal_jax.reporting import (
    audit,
    budgets,
    certified,
    corruptions,
    curves,
    distances,
    figures,
    groups,
    optimality,
    page,
    sections,
)
from robal_jax.reporting.results import Gallery, Results
from robal_jax.storage.files import write_whole
from robal_jax.storage.names import REPORT_HTML, REPORT_MARKDOWN

_CAPTIONS = {
    "epsilon": "Accuracy by radius of the attack",
    "curves": "Accuracy by logit scale, by steps and by restarts",
    "attacks": "Robust accuracy by attack",
    "per_class": "Accuracy and number of training images by class",
    "errors": "Natural error, boundary error and robust accuracy by class",
    "confusion": "Classes that the attack confuses, in percent of the true class",
    "norms": "Training images, weight norms and feature norms by class",
    "training": "Loss, accuracy and learning rate by epoch of the training",
    "judged": "Clean and robust accuracy on images that are not trained on, by epoch of the training",
    "gallery": "Images, adversarial images and the difference between them",
}

FILES = (REPORT_HTML, REPORT_MARKDOWN, *(f"{figure}.png" for figure in _CAPTIONS))
"""Names of all files of a report."""


def write_report(
    folder: pathlib.Path, results: Results, *, gallery: Gallery | None = None
) -> list[pathlib.Path]:
    """Writes the results, then report.md with its figures, and report.html, one file that loads nothing.

    Each file is written under another name and then renamed, so that no file is ever half written. The last
    one is report.html: where it is, all are.

    Args:
      folder: where to write; made if it is missing.
      results: all numbers.
      gallery: adversarial examples to show.

    Returns:
      The files written.

    Raises:
      InputError: the main attack was not evaluated, or the folder cannot be written to.
    """
    main_attack = results.meta["main_attack"]
    if main_attack not in results.conditions:
        raise InputError(
            f"main attack {main_attack!r} was not evaluated; use one of {', '.join(results.conditions)}"
        )
    with _writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        written = results.write(folder)
    drawn = _draw(results, gallery)
    pictures = {name: figures.block(figure, f"{name}.png", _CAPTIONS[name]) for name, figure in drawn.items()}
    blocks = [
        *sections.summary_section(results, pictures),
        *budgets.budget_section(results),
        *audit.audit_section(results, pictures),
        *optimality.optimality_section(results),
        *sections.condition_section(results, pictures),
        *sections.group_section(results),
        *groups.protocol_section(results),
        *certified.certified_section(results),
        *distances.distance_section(results),
        *corruptions.corruption_section(results),
        *sections.class_section(results, pictures),
        *sections.norm_section(results, pictures),
        *sections.gallery_section(gallery, pictures),
        *sections.training_section(results, pictures),
        *sections.settings_section(results),
        *sections.reading_section(results),
        *audit.meaning_section(results),
        *sections.config_section(results),
    ]
    files = {
        **{f"{name}.png": figures.png(figure) for name, figure in drawn.items()},
        REPORT_MARKDOWN: _encoded(page.to_markdown(results.title, blocks)),
        REPORT_HTML: _encoded(page.to_html(results.title, blocks)),
    }
    with _writing(folder):
        for name, content in files.items():
            write_whole(folder / name, content)
    return [*written, *(folder / name for name in files)]


def remove_report(folder: pathlib.Path) -> None:
    """Removes the files of a report, but not the results."""
    for name in FILES:
        (folder / name).unlink(missing_ok=True)


def _encoded(text: str) -> bytes:
    """Returns a text as UTF-8; a name of a file may have characters that UTF-8 lacks."""
    return text.encode(errors="backslashreplace")


@contextlib.contextmanager
def _writing(folder: pathlib.Path) -> Iterator[None]:
    """Turns an error of the disk into one line."""
    try:
        yield
    except OSError as error:
        raise InputError(
            f"cannot write the report to {folder} ({error.strerror}); use another folder"
        ) from error


def _draw(results: Results, gallery: Gallery | None) -> dict[str, figures.Figure]:
    """Returns all figures that the results allow, by name."""
    drawn = {
        "attacks": figures.attacks_figure(results),
        "per_class": figures.per_class_figure(results),
        "errors": figures.errors_figure(results),
        "confusion": figures.confusion_figure(results),
    }
    if "epsilon" in results.curves:
        drawn["epsilon"] = curves.radius_figure(results)
    if results.curves.keys() & curves.PANELS.keys():
        drawn["curves"] = curves.curves_figure(results)
    if results.norms:
        drawn["norms"] = figures.norms_figure(results)
    if curves.training_panels(results.training):
        drawn["training"] = curves.training_figure(results)
    if results.judged:
        drawn["judged"] = curves.judged_figure(results)
    if gallery:
        drawn["gallery"] = figures.gallery_figure(gallery, results)
    return drawn
