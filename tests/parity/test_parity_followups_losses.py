"""Label smoothing and the divergence of the follow-up methods against their code, float64: see parity.py."""

import functools

import jax
import pytest

from robal_jax import losses

pytestmark = [pytest.mark.parity, pytest.mark.usefixtures("float64")]

FILE = "followups_f64"
SETS = ("c10", "c100", "tiny")


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


def test_no_array_of_these_groups_is_forgotten(reference):
    seen = reference.files[FILE]["compared"] | reference.files[FILE]["input"]
    assert {key for key in reference.load(FILE) if key.startswith(("label_smoothing/", "kl/"))} <= seen
