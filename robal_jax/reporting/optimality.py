"""How the attacks of an ensemble compare at radii up to the threat model's, as evidence for the audit."""

from robal_jax.reporting import page
from robal_jax.reporting.names import display_name, printed, radius, threat
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
    by_class = "class_epsilon" in results.meta
    radii = [
        f"{printed(factor)} times its own" if by_class else radius(factor * results.meta["epsilon"])
        for factor in SHOWN
    ]
    return [
        page.section("Optimality of the attacks"),
        page.paragraph(
            f"Each attack of the ensemble ran alone on the audit's {found['examples']} images, at "
            f"{len(found['factors'])} radii up to {threat(results.meta) or 'the radius'}. Its optimality "
            "compares the accuracies that it leaves at all of these radii with those of the best attack on "
            "each image (AttackBench): it is 1 for an attack that is the best on every image, and 0 for one "
            "that breaks nothing. It knows no other attacks than these. Where Square leads, which follows no "
            "gradient, the gradients of the others mislead. Accuracies are in percent."
        ),
        page.table(("Attack", "Optimality", *radii), rows),
    ]
