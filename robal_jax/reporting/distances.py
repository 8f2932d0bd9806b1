"""Distances of the closest adversarial images: their medians, and the accuracy that follows from them."""

from collections.abc import Mapping

from robal_jax.reporting import page
from robal_jax.reporting.names import display_name, group_name, radius, threat, with_interval
from robal_jax.reporting.results import MANY_CLASSES, Results


def distance_section(results: Results) -> list[page.Block]:
    """Returns medians by group and class, and the accuracy by radius; nothing if there are no distances."""
    if results.distances is None:
        return []
    found, counts = results.distances, results.summary["class_counts"]
    median, curve, attack = found["median"], found["curve"], display_name(found["attack"])
    norm = threat({"norm": results.meta.get("norm", "")})
    groups = {"all": median["all"], **{group_name(name): row for name, row in median["groups"].items()}}
    classes = [
        (results.class_name(index), counts[index], with_bounds(row))
        for index, row in enumerate(median["per_class"])
    ]
    by_class = page.table(("Class", "Training images", "Median distance"), classes)
    missed = found.get("missed", 0)  # which older results lack
    remark = f" {_missed(missed)}" if missed else ""
    rows = zip(map(radius, curve["x"]), map(with_interval, curve["series"][found["attack"]]), strict=True)
    return [
        page.section("Distance to the closest adversarial image"),
        page.paragraph(
            f"{attack} looks for the closest adversarial image, without a radius; it found one for "
            f"{found['found']} of {results.meta['n']} images. Median distances are in {norm}, with intervals "
            "that hold at least 95 %; the distance of an image that is wrong when clean is 0. Like every "
            "attack, this one finds upper bounds."
        ),
        page.table(
            ("Classes", "Median distance"),
            [(name.capitalize(), with_bounds(row)) for name, row in groups.items()],
        ),
        by_class if len(classes) <= MANY_CLASSES else page.folded(f"All {len(classes)} classes", by_class),
        page.paragraph(
            f"Robust accuracy under {attack} in percent: the share of images whose closest "
            f"adversarial image is farther than the radius. An ensemble of attacks may leave fewer.{remark}"
        ),
        page.table(("Radius", f"Robust accuracy under {attack}"), rows),
    ]


def _missed(count: int) -> str:
    """Says how many images only this attack breaks within the threat model's own radius."""
    images = "1 image that is" if count == 1 else f"{count} images that are"
    return (
        f"It breaks {images} right under all other attacks within the threat model's own radius; 'worst' and "
        "the ensemble do not count this."
    )


def with_bounds(figure: Mapping[str, float | None]) -> str:
    """Returns a FIGURE of distances with its interval; None is infinity.

    Example:
      >>> with_bounds({"value": 0.1512, "low": 0.1401, "high": None})
      '0.1512 [0.1401, ∞]'
    """
    numbers = (figure[key] for key in ("value", "low", "high"))
    value, low, high = ("∞" if number is None else f"{number:.4g}" for number in numbers)
    return f"{value} [{low}, {high}]"
