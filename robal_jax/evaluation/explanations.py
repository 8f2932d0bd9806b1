"""Explanations of the checks of the audit: when each is raised, what that means, and what to do.

The report prints these sentences, from ``results.json``; the thresholds in them are those of the code.
"""

from typing import NamedTuple

from robal_jax.evaluation.evidence import FAMILY_LEVEL
from robal_jax.reporting.results import CHOICE, EVERYTHING, FIXED_STEPS, OWN_GRADIENT

ROUNDING = {"highest": 1e-4, "default": 1e-2}
"""Margin below which rounding decides between two logits, as a part of the largest, by precision.

In float32 the layers of a network add up to some 10^-4, see :func:`robal_jax.zoo.cards.tolerance`; bfloat16,
as below full precision on a TPU, keeps two to three digits.
"""

GAP = 0.01
"""A fixed-step number that is optimistic by more than this is noted."""

MARGIN = 0.01
"""How much stronger an attack that should be weaker may be, in truth, without being a sign of masking."""

SCALE_MARGIN = 0.05
"""Part by which another logit scale may let PGD lower the margin further, in truth, without a red mark."""

FLAT, SATURATED = 1 / 3, 1 / 10
"""A softmax is flat if its mean confidence is below this part of the accuracy, and saturated if its mean
doubt (1 - confidence) is below this part of the error. Trained models are far from both."""

NEARLY_ZERO = 0.01
"""Highest accuracy under an attack without a bound that works."""

VANISHING = 0.01
"""Share of images whose gradient may be exactly zero, as it is where an honest model is very sure."""

ALPHA_RANDOM, ALPHA_SQUARE = 1e-4, 0.002
"""Relative difference of logits, and share of images that only Square may break.

As in the reference implementation of AutoAttack."""


class Explanation(NamedTuple):
    """A check, in words.

    Attributes:
      title: for people.
      doubts: what not to trust if it is flagged: ``FIXED_STEPS``, ``EVERYTHING``, ...
      raised: when it is flagged, or noted.
      means: what that means.
      do: what to do.
    """

    title: str
    doubts: str
    raised: str
    means: str
    do: str


def _points(share: float) -> str:
    return f"{100 * share:g} point" + ("" if share == 0.01 else "s")


_CLEARLY = f"clearly (one-sided test at {100 * FAMILY_LEVEL:g} % over all checks)"
_ENSEMBLE = "Report the accuracy under AutoAttack, not that under attacks with fixed steps."

EXPLANATIONS = {
    "logit_scale": Explanation(
        "Logit scale",
        FIXED_STEPS,
        f"Flagged if PGD-20 on rescaled logits, or with the margin as its loss, {_CLEARLY} "
        f"lowers the margin of the true class by {100 * SCALE_MARGIN:g} % more than at the model's "
        f"own scale and breaks more than {_points(GAP)} of the images in addition, and if the softmax is "
        f"flat (mean confidence below {100 * FLAT:.0f} % of the accuracy) or saturated (1 - mean confidence "
        f"below {100 * SATURATED:.0f} % of the error). Noted if only the accuracy is clearly lower.",
        "The gradient of the cross-entropy is weak because of the size of the logits, not because the model "
        "is robust: large logits saturate the softmax, small ones mix all classes into the gradient.",
        _ENSEMBLE + " Or attack at the scale at which the curve is lowest (config.evaluation.logit_scale).",
    ),
    "steps": Explanation(
        "More steps",
        FIXED_STEPS,
        f"Flagged if a single step is {_CLEARLY} more than {_points(MARGIN)} stronger than 20 "
        f"steps. Noted if up to 1000 steps that keep what was found break more than {_points(GAP)} of the "
        "images in addition.",
        "Flagged: the gradients lead away from adversarial images. Noted: 20 steps were too few; "
        "more steps can only break more images, so this alone is no sign of masking.",
        _ENSEMBLE,
    ),
    "restarts": Explanation(
        "More restarts",
        FIXED_STEPS,
        f"Noted if ten starts of PGD-20 break more than {_points(GAP)} of the images in addition to "
        "those that one start breaks. Never flagged.",
        "One start was too few. More starts can only break more images, so this is no sign of masking.",
        _ENSEMBLE,
    ),
    "zero_gradients": Explanation(
        "Zero gradients",
        FIXED_STEPS,
        "Flagged if the gradient of the cross-entropy, or that of the margin, is exactly zero for "
        f"{_CLEARLY} more than {100 * VANISHING:g} % of the images, at the clean image, where PGD starts or "
        "one step later. Noted if it is zero for any.",
        "PGD stays where it starts. Rounding, quantisation and thermometer codes have no gradient; very "
        "large logits round that of the cross-entropy to zero. If the margin has none, either, no attack "
        "that follows a gradient works; of AutoAttack only Square is left, which needs margins that move.",
        "If the logits are large, use AutoAttack, whose margins do not saturate. If a step of the "
        "model has no gradient, replace it in the backward pass by a smooth one: surrogate_fn of "
        "evaluate_model (BPDA).",
    ),
    "nan_gradients": Explanation(
        "Gradients that are not finite",
        EVERYTHING,
        "Flagged if any gradient of the cross-entropy has a NaN or infinite entry, at a clean image, "
        "where PGD starts, or one step later.",
        "Attacks that follow gradients count such entries as zero or stop there, so that they show nothing.",
        "Find the operation (jax_debug_nans; often a logarithm, root or quotient behind jnp.where), "
        "give it safe arguments in both branches, and evaluate again.",
    ),
    "unbounded": Explanation(
        "No bound",
        FIXED_STEPS,
        f"Flagged if {_CLEARLY} more than {100 * NEARLY_ZERO:g} % of the images that are right when clean "
        f"are right under 100 steps of PGD without a bound. Noted if more than {100 * NEARLY_ZERO:g} % of "
        "those in the sample are.",
        "Without a bound every image can become one of another class, so an attack that works leaves none.",
        _ENSEMBLE + " Look at the curve by radius: it should fall to zero.",
    ),
    "gradient_free": Explanation(
        "Gradient-free attack",
        FIXED_STEPS,
        f"Flagged if Square, which sees logits only, is {_CLEARLY} more than {_points(MARGIN)} "
        "stronger than all gradient attacks of the audit together. Noted if it is clearly stronger "
        "than PGD-20 alone.",
        "An attack that uses the gradient is not weaker than one without, unless the gradient is masked.",
        _ENSEMBLE + " If it is flagged, adapt the attack to the model as well (BPDA: surrogate_fn; EOT).",
    ),
    "square": Explanation(
        "Square after gradients",
        EVERYTHING,
        f"Flagged if Square {_CLEARLY} breaks more than {100 * ALPHA_SQUARE:g} % of the images after the "
        "gradient attacks, those of the ensemble before it included.",
        "All gradient attacks miss something in the same way, so that the ensemble is weaker than it seems.",
        "Adapt the attack to the model, or run Square with more queries.",
    ),
    "transfer": Explanation(
        "Transfer from a surrogate",
        FIXED_STEPS,
        f"Flagged if images made on another model are {_CLEARLY} more than {_points(MARGIN)} stronger "
        "than all gradient attacks of the audit together. Noted if they are clearly stronger than "
        "PGD-20 alone.",
        "The gradients of another model are better than the model's own, which are therefore masked.",
        _ENSEMBLE + " If it is flagged, adapt the attack to the model as well.",
    ),
    "randomised": Explanation(
        "Random output",
        EVERYTHING,
        f"Flagged if logits of the same images differ by more than {ALPHA_RANDOM:g} of their norm, or "
        "if the number of right images changes.",
        "Every attack counts a lucky draw as robustness, or as a success.",
        "Evaluate the mean over draws, with the ensemble 'rand', whose gradients are means too.",
    ),
    "probabilities": Explanation(
        "Probabilities",
        EVERYTHING,
        "Flagged if the outputs are in [0, 1] and sum to 1.",
        "The attacks expect logits; a softmax of a softmax has next to no gradient.",
        "Give the logits, without the softmax, and evaluate again.",
    ),
    "inference": Explanation(
        "Optimisation at inference",
        EVERYTHING,
        "Flagged if the model takes derivatives to compute its logits, or if the logits of an image "
        f"change with its batch by more than {ALPHA_RANDOM:g} of the largest, and by more than "
        "twice as much as between two passes over the same batch.",
        "The model adapts to its input, and attacks on it need another kind of gradient.",
        "Attack the whole procedure, unrolled, and the model without it (Croce et al., 2022).",
    ),
    "stored_images": Explanation(
        "Accuracy computed again",
        EVERYTHING,
        "Flagged if one stored adversarial image is classified otherwise when it is read again. Noted if "
        "that happens only to images whose two largest logits differ by less than rounding may change: "
        f"{ROUNDING['highest']:g} of the largest, or {ROUNDING['default']:g} below full precision.",
        "The reported accuracy does not follow from the stored images.",
        "Do not use the number; report the fault with the folder of the evaluation.",
    ),
}
"""All checks of an audit by name, in the order of the report."""

ON_OCCASION = {
    "bpda": Explanation(
        "BPDA after the model's own gradient",
        OWN_GRADIENT,
        f"Flagged if attacks with the gradient of surrogate_fn {_CLEARLY} break more than "
        f"{100 * MARGIN:g} % of the images after the same attacks with the model's own gradient. Noted if "
        f"they break more than {100 * GAP:g} % of those in the test set. Without a surrogate_fn the check is "
        "not listed.",
        "The model's own gradient misleads attacks. What BPDA breaks counts in the accuracy under the "
        "ensemble with BPDA, and in the worst case.",
        "Report the accuracy under the ensemble with BPDA. It is only as low as the approximation is good: "
        "if Square breaks more after it, try another.",
    ),
    "certified": Explanation(
        "Certified and broken",
        EVERYTHING,
        "Flagged if a single image is certified within a radius and yet misclassified within it, clean or "
        "under an attack of this evaluation. Without such an image the check is not listed.",
        "Both cannot be true. Either the network was computed with less precision than the bounds assume "
        "(TF32, convolutions by FFT or Winograd), or the bounds or the stored outcomes are wrong.",
        "Do not use the numbers; evaluate again in float64 or on a CPU, and report the fault with the folder "
        "of the evaluation if it stays.",
    ),
    "selected_on_test": Explanation(
        "Selected on test images",
        CHOICE,
        "Flagged if the checkpoint was chosen by its accuracy on the test images, or on some of them "
        "(config.train.select=best_on_test). Without such a choice the check is not listed.",
        "The highest of many accuracies on the same images is higher than the accuracy of that checkpoint on "
        "new images, clean and under attack, and most of all in small classes. The attacks are not in doubt.",
        "Compare such numbers only with numbers that were chosen in the same way. Otherwise evaluate the "
        "last checkpoint (config.train.select=last), or choose on held-out training images "
        "(config.train.held_out and config.train.select=best).",
    ),
}
"""Checks that not every evaluation has."""
