"""Accuracies in the class groups of several protocols, side by side."""

from collections.abc import Sequence

from robal_jax import metrics
from robal_jax.reporting import page
from robal_jax.reporting.names import PROTOCOLS, display_name, folded, group_name, with_interval
from robal_jax.reporting.results import Results

LONGEST_LIST = 24  # characters of a list of classes


def protocol_section(results: Results) -> list[page.Block]:
    """Returns a table with a row per group of each protocol; nothing if only one protocol was asked for."""
    groups = [
        (PROTOCOLS.get(protocol, protocol), group_name(name), group)
        for protocol, parts in results.protocols.items()
        for name, group in parts.items()
    ]
    if not groups:
        return []
    columns = folded(
        (display_name(name), [with_interval(group["accuracy"][name]) for _, _, group in groups])
        for name in dict.fromkeys(("clean", results.headline_attack, "worst"))
    )
    rows = [
        (protocol, name, members(group["classes"]), group["training_images"], *accuracies)
        for (protocol, name, group), *accuracies in zip(
            groups, *(figures for _, figures in columns), strict=True
        )
    ]
    text = "Accuracy in percent over the test images of the classes of each group, with 95 % intervals."
    absent = [f"{line[0].upper()}{line[1:]}." for line in metrics.absent_groups(results.protocols)]
    return [
        page.section("Class groups by protocol"),
        page.paragraph(" ".join([text, *absent])),
        page.table(("Protocol", "Group", "Classes", "Training images", *(name for name, _ in columns)), rows),
    ]


def members(classes: Sequence[int]) -> str:
    """Returns the number of classes, and which they are if that is short.

    Example:
      >>> members([2, 0, 1, 5]), members(list(range(0, 100, 2)))
      ('4 (0 to 2, 5)', '50')
    """
    lows = sorted(k for k in classes if k - 1 not in classes)
    highs = sorted(k for k in classes if k + 1 not in classes)
    spans = (f"{low} to {high}" if low < high else f"{low}" for low, high in zip(lows, highs, strict=True))
    text = ", ".join(spans)
    return f"{len(classes)} ({text})" if len(text) <= LONGEST_LIST else f"{len(classes)}"
