"""How the attacks of an ensemble compare at radii up to the threat model's, as evidence for the audit."""

from robal_jax.reporting import page
from robal_jax.reporting.names import display_name, part_of_radius, threat
from robal_jax.reporting.results import Results

SHOWN = (0.25, 0.5, 0.75, 1.0)
"""Parts of the radius in the table."""


def optimality_section(results: Results) -> list[page.Block]:
    """Returns the optimality of each attack, and what it leaves at some radii; or nothing."""
    found = results.optimality
    if not found:
        return []
    places = [found["factors"].index(factor) for factor in SHOWN]
    attacks = {display_name(name): row for name, row in found["attacks"].items()}
    attacks["Best on each image"] = {"optimality": None, "robust": found["best"]}
    rows = [
        (
            name,
            "—" if row["optimality"] is None else f"{row['optimality']:.3f}",
            *(f"{100 * row['robust'][place]['value']:.1f}" for place in places),
        )
        for name, row in attacks.items()
    ]
    radii = [part_of_radius(factor, results.meta) for factor in SHOWN]
    once = "A minimum-norm attack ran once, and its distances are rounded up to these radii. "
    return [
        page.section("Optimality of the attacks"),
        page.paragraph(
            f"Each attack ran alone on the audit's {found['examples']} images, at {len(found['factors'])} "
            f"radii up to {threat(results.meta) or 'the radius'}. {once if results.distances else ''}Attacks "
            "with BPDA, and those that only some models need, are left out. Optimality compares the "
            "accuracies that an attack leaves at all radii with those of the best attack on each image "
            "(AttackBench): it is 1 for an attack that is the best on every image, and 0 for one that breaks "
            "nothing. A better attack would lower it. If Square, which follows no gradient, is ahead, the "
            "gradients of the others probably mislead. Accuracies are in percent."
        ),
        page.table(("Attack", "Optimality", *radii), rows),
    ]
