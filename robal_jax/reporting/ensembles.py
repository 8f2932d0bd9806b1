"""Notes on each ensemble of attacks, for the reader of a report."""

from collections.abc import Mapping
from typing import Any

from robal_jax.reporting.headline import beside_autoattack
from robal_jax.reporting.names import AUTOATTACK, BPDA, OWN, display_name
from robal_jax.reporting.results import Results

FULL_SQUARE = "square_full"

_TEXTS = {
    "robal_aa": (
        'is the pair of attacks that the RoBal paper calls "AA": two of the four attacks of AutoAttack.'
    ),
    "torchattacks": (
        "has the four attacks of AutoAttack as the package torchattacks runs them: 10 iterations in place of "
        "100, and another schedule of Square. Its accuracy is an upper estimate of AutoAttack's. Compare it "
        "with figures that were made by that package; for claims, run AutoAttack."
    ),
    "autoattack_rand": (
        "is the version of AutoAttack for models that draw random numbers: APGD-CE and APGD-DLR, with "
        "gradients averaged over several draws. On any other model the standard version is stronger."
    ),
    "fast": (
        "is an ensemble for daily work, not AutoAttack: PMA, APGD towards the nearest classes and a short "
        "Square. Its accuracy is an upper estimate, at a tenth of the passes; for claims, run AutoAttack."
    ),
    "union": (
        "is AutoAttack, and then PMA and APGD-MALT as in fast on the images that are left, so its accuracy "
        "is at most that of AutoAttack. It is no figure of AutoAttack and must not be compared with one."
    ),
    OWN: (
        "has attacks that whoever evaluated the model wrote or chose, named as module:function. It is no "
        "figure of AutoAttack and must not be compared with one."
    ),
}


def ensemble_notes(results: Results) -> list[tuple[str, str]]:
    """Returns a note on each ensemble among the conditions: its name, and a text."""
    conditions, items = results.conditions, []
    more = {"fast": _full_square, "fast" + BPDA: _full_square, "union": beside_autoattack}
    more |= dict.fromkeys((OWN, OWN + BPDA), _own_attacks)
    for name, text in _TEXTS.items():
        for found in (name, name + BPDA):
            if found in conditions:
                further = more[found](results) if found in more else ""
                items.append((display_name(found), f"{text} {further}".strip()))
    if any(name.endswith(BPDA) for name in conditions):
        text = (
            "stands for attacks on the same model with the gradient of a differentiable approximation, which "
            "whoever evaluated it has named (Athalye et al., 2018). An ensemble with BPDA has each attack "
            "that follows a gradient twice: with the model's own, and with that one."
        )
        items.append(("BPDA", text))
    if not any(name in conditions for name in AUTOATTACK):
        own = {OWN, OWN + BPDA} & {*conditions}
        tight = "perhaps less tight" if own else "less tight"  # own attacks may be stronger
        text = (
            f"was not run. The accuracies above are upper bounds of the robust accuracy, {tight} than that "
            "of AutoAttack; those of the attacks with a fixed step size are the least tight."
        )
        items.append(("AutoAttack", text))
    return items


def _own_attacks(results: Results) -> str:
    names = (name.removesuffix(BPDA) for name in results.meta.get("autoattack", ()) if ":" in name)
    listed = f"Here: {', '.join(dict.fromkeys(names))}."
    both = {OWN, "autoattack"} <= {*results.conditions}
    return f"{listed} {beside_autoattack(results)}" if both else listed


def full_square(meta: Mapping[str, Any]) -> bool | None:
    """Returns whether Square in full ran after the short one; None if the evaluation has no such attack."""
    return FULL_SQUARE in meta.get("stages", ()) if FULL_SQUARE in meta.get("autoattack", ()) else None


def _full_square(results: Results) -> str:
    ran = full_square(results.meta)
    if ran is None:
        return ""
    needed = "" if ran else "not "
    return (
        "If that Square breaks an image that the gradient attacks left, a sign that gradients mislead, "
        f"AutoAttack's own Square follows. On this model it was {needed}needed."
    )
