"""Losses and terms of the follow-up methods against their code, float64: see parity.py."""

import functools

import jax
import numpy as np
import pytest

from robal_jax import losses, regularisers

pytestmark = [pytest.mark.parity, pytest.mark.usefixtures("float64")]

FILE = "followups_f64"
SETS = ("c10", "c100", "tiny")
# A beta of float32, 1 - 1/n with n = 5000, is off by up to 3e-8: 1 - beta by up to 1.5e-4 of itself, and so
# is the weight of that class. No weight is above the largest, by which errors are divided.
ROUNDED = 1.5e-4


def as_any_loss(logits, labels):
    """The cross entropy, without being known as it."""
    return losses.cross_entropy(logits, labels)


@pytest.mark.parametrize("base", [losses.cross_entropy, as_any_loss])
@pytest.mark.parametrize("smoothing", [0.1, 0.2])
@pytest.mark.parametrize("name", SETS)
def test_label_smoothing(reference, name, smoothing, base):
    logits, labels = (reference(FILE, f"input/{name}/{what}") for what in ("logits", "labels"))
    smoothed = functools.partial(losses.label_smoothed, base=base, smoothing=smoothing)
    value, gradient = jax.value_and_grad(lambda z: smoothed(z, labels).mean())(logits)
    for what, ours in (("value", value), ("grad", gradient)):
        reference.check("label smoothing", FILE, f"label_smoothing/{name}/s{smoothing:g}/{what}", ours)


@pytest.mark.parametrize("name", SETS)
def test_divergence(reference, name):
    logits, other = reference(FILE, f"input/{name}/logits"), reference(FILE, f"kl/{name}/other_logits")
    divergences = {
        "wrt_adv": lambda z: losses.kl_divergence(other, z).mean(),
        "wrt_natural": lambda z: losses.kl_divergence(z, other).mean(),
    }
    for variable, divergence in divergences.items():
        for what, ours in zip(("value", "grad"), jax.value_and_grad(divergence)(logits), strict=True):
            reference.check("divergence", FILE, f"kl/{name}/{variable}/{what}", ours)


@pytest.mark.parametrize("name", SETS)
def test_balanced_softmax(reference, name):
    logits, labels, counts = (
        reference(FILE, f"input/{name}/{what}") for what in ("logits", "labels", "counts")
    )
    loss = functools.partial(losses.logit_adjustment, class_counts=counts, tau=1.0)
    value, gradient = jax.value_and_grad(lambda z: loss(z, labels).mean())(logits)
    # Its log of a probability of the prior, in place of the log of the count, changes no probability.
    for what, ours in (("value", value), ("grad", gradient), ("per_example", loss(logits, labels))):
        reference.check("balanced softmax", FILE, f"bsl/{name}/{what}", ours)


CASES = (
    "epoch0", "half", "skewed", "one_class_never_predicted", "three_classes_never_predicted",
    "after_the_golden_steps", "c100_half",
)  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_rebalanced(reference, case):
    """The released weights are rounded: beta to float32, so that 1 - beta loses up to 1e-4 of a weight."""
    at, name = f"reat_rbl/{case}", "c100" if case.startswith("c100") else "c10"
    counts, seen = reference(FILE, f"input/{name}/counts"), reference(FILE, f"{at}/at_per_class")
    check = functools.partial(reference.check, "REAT, weights and RBL", FILE)
    released = functools.partial(reference.check, "REAT, rounded as released", FILE, bound=ROUNDED)
    weights = losses.rebalanced_weights(counts, seen)
    check(f"{at}/weights", weights)
    released(f"{at}/weights_released_float32", weights)
    inverse = weights / weights.sum()  # of E + 1e-5, up to a factor that the smallest effective number fixes
    numbers = reference(FILE, f"{at}/effective_number")
    smallest = np.argmax(inverse)
    ours = inverse[smallest] * (numbers[smallest] + 1e-5) / inverse - 1e-5
    check(f"{at}/effective_number", ours)
    if name == "c100":
        return
    logits, labels = (reference(FILE, f"input/{name}/{what}") for what in ("logits", "labels"))
    loss = functools.partial(losses.rebalanced, class_counts=counts, class_statistics={"predicted": seen})
    found = jax.value_and_grad(lambda z: loss(z, labels).mean())(logits)
    for what, ours in zip(("value", "grad"), found, strict=True):
        check(f"{at}/exact/{what}", ours)
        released(f"{at}/released/{what}", ours)


@pytest.mark.parametrize(("name", "divergence"), [("released", "batch"), ("per_pair", "pair")])
def test_tail_features(reference, name, divergence):
    counts = reference(FILE, "input/c10/counts")
    features, labels = reference(FILE, "input/features"), reference(FILE, "input/features_labels")
    check = functools.partial(reference.check, "REAT, TAIL", FILE)
    term = functools.partial(regularisers.tail_features, class_counts=counts, divergence=divergence)
    found = jax.jit(jax.value_and_grad(term))(features, labels)
    for what, ours in zip(("value", "grad"), found, strict=True):
        check(f"reat_tail/{name}/{what}", ours)
    check("reat_tail/class_factor", np.sqrt(counts.sum() / counts))
    check("reat_tail/no_tail_class_in_batch", term(features, labels % 7), bound=0)
    for classes in (10, 100, 200):  # one image of a class and one of the first: only the tail gives a term
        pair = np.log(np.array([[3.0, 1.0], [1.0, 1.0]]))
        falling = np.arange(classes, 0, -1)
        found = [
            k
            for k in range(1, classes)
            if regularisers.tail_features(pair, np.array([0, k]), class_counts=falling, divergence=divergence)
        ]
        check(f"reat_tail/tail_classes/C{classes}", found, bound=0)


@pytest.mark.parametrize("case", ["random", "all_present", "one_class", "c100"])
def test_harl(reference, case):
    at, name = f"taet_harl_loss/{case}", "c100" if case == "c100" else "c10"
    logits = reference(FILE, f"input/{name}/logits")
    labels = reference(FILE, f"input/{name}/labels" if case == "c100" else f"{at}/labels")
    check = functools.partial(reference.check, "TAET, HARL", FILE)
    found = jax.value_and_grad(lambda z: losses.harl(z, labels).mean())(logits)
    for what, ours in zip(("value", "grad"), found, strict=True):
        check(f"{at}/{what}", ours)
    if case != "c100":
        parts = [losses.harl(logits, labels, **one)[0] for one in (
            {"beta": 0.0, "gamma": 0.0}, {"alpha": 0.0, "gamma": 0.0}, {"alpha": 0.0, "beta": 0.0},
        )]  # fmt: skip
        check(f"{at}/parts", parts)
        own = jax.nn.one_hot(labels, 10)
        sums = losses.cross_entropy(logits, labels) @ own
        check(f"{at}/class_losses", sums / np.maximum(own.sum(0), 1))


def test_gradient_matching_and_squared_error(reference):
    logits = reference(FILE, "input/c10/logits")
    minus, plus, opposite = (
        reference(FILE, f"igdm/{name}") for name in ("student_minus", "teacher_plus", "teacher_minus")
    )
    other = reference(FILE, "igdm/student_plus_other")
    terms = {
        "igdm/wrt_student_plus": lambda z: losses.kl_divergence(plus - opposite, z - minus).mean(),
        "lse/trades_score_wrt_adv": lambda z: losses.squared_error(z, other).mean(),
    }
    for name, term in terms.items():
        for what, ours in zip(("value", "grad"), jax.value_and_grad(term)(logits), strict=True):
            reference.check("IGDM and SCORE", FILE, f"{name}/{what}", ours)


GROUPS = ("label_smoothing", "kl", "bsl", "reat_rbl", "reat_tail", "taet_harl_loss", "igdm", "lse")


def test_no_array_of_these_groups_is_forgotten(reference, request):
    reference.skip_unless_all_ran(request)
    seen = reference.files[FILE]["compared"] | reference.files[FILE]["input"]
    assert {key for key in reference.load(FILE) if key.partition("/")[0] in GROUPS} <= seen
