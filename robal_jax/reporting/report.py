"""The report of an evaluation, as Markdown and as one page of HTML, beside the files of its results."""

import pathlib

from robal_jax.errors import InputError
from robal_jax.reporting import audit, figures, page, sections
from robal_jax.reporting.results import Gallery, Results
from robal_jax.storage.files import write_whole
from robal_jax.storage.names import REPORT_HTML, REPORT_MARKDOWN

_CAPTIONS = {
    "curves": "Accuracy by logit scale, by steps and by restarts",
    "attacks": "Robust accuracy by attack",
    "per_class": "Accuracy and number of training images by class",
    "errors": "Natural error, boundary error and robust accuracy by class",
    "confusion": "Classes that the attack confuses, in percent of the true class",
    "norms": "Training images, weight norms and feature norms by class",
    "gallery": "Images, adversarial images and the difference between them",
}


def write_report(
    folder: pathlib.Path, results: Results, *, gallery: Gallery | None = None
) -> list[pathlib.Path]:
    """Writes the results, report.md with its figures, and report.html, one file that loads nothing.

    Each file is written under another name and then renamed, so that no file is ever half written.

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
    drawn = _draw(results, gallery)
    pictures = {
        name: page.figure(f"{name}.png", _CAPTIONS[name], figures.svg(figure))
        for name, figure in drawn.items()
    }
    blocks = [
        *sections.summary_section(results),
        *audit.audit_section(results, pictures),
        *sections.condition_section(results, pictures),
        *sections.group_section(results),
        *sections.class_section(results, pictures),
        *sections.norm_section(results, pictures),
        *sections.gallery_section(gallery, pictures),
        *sections.settings_section(results),
        *sections.reading_section(results),
        *audit.meaning_section(results),
        *sections.config_section(results),
    ]
    files = {
        REPORT_MARKDOWN: page.to_markdown(results.title, blocks).encode(),
        REPORT_HTML: page.to_html(results.title, blocks).encode(),
        **{f"{name}.png": figures.png(figure) for name, figure in drawn.items()},
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        written = results.write(folder)
        for name, content in files.items():
            write_whole(folder / name, content)
    except OSError as error:
        raise InputError(
            f"cannot write the report to {folder} ({error.strerror}); use another folder"
        ) from error
    return [*written, *(folder / name for name in files)]


def _draw(results: Results, gallery: Gallery | None) -> dict[str, figures.Figure]:
    """Returns all figures that the results allow, by name."""
    drawn = {
        "attacks": figures.attacks_figure(results),
        "per_class": figures.per_class_figure(results),
        "errors": figures.errors_figure(results),
        "confusion": figures.confusion_figure(results),
    }
    if results.curves:
        drawn["curves"] = figures.curves_figure(results)
    if results.norms:
        drawn["norms"] = figures.norms_figure(results)
    if gallery:
        drawn["gallery"] = figures.gallery_figure(gallery, results)
    return drawn
