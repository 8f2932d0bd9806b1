"""Budgets by class against the released code: RobustLT's CPB and AIW, CFA's and DAFA's from class state."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from robal_jax import budgets
from robal_jax.errors import InputError

pytestmark = [pytest.mark.parity, pytest.mark.usefixtures("float64")]

FILE = "followups_f64"
EPSILON = 8 / 255
CASES = ("c10_ir50", "c10_ir50_beta1", "c10_ir100", "c100_ir10", "c100_ir10_paper", "tiny_ir10")


@pytest.mark.parametrize("case", CASES)
def test_robustlt(reference, case):
    alpha, beta, epochs = reference(FILE, f"robustlt/{case}/alpha_beta_epochs")
    counts = reference(FILE, f"robustlt/{case}/counts")
    radii = budgets.by_frequency(counts, EPSILON, alpha=alpha)
    reference.check("budgets: RobustLT", FILE, f"robustlt/{case}/class_eps", radii)
    rise = jax.vmap(lambda epoch: budgets.ramp(epoch, int(epochs), beta))(jnp.arange(1, int(epochs) + 1))
    reference.check("budgets: RobustLT", FILE, f"robustlt/{case}/intensity", rise)


def test_robustlt_on_balanced_counts(reference):
    """The released radii are 0 / 0; ours are refused."""
    released = reference(FILE, "robustlt/balanced/class_eps")
    assert np.isnan(released).all()
    with pytest.raises(InputError, match="all classes have 500 training images"):
        budgets.by_frequency(np.full(len(released), 500), EPSILON)


@pytest.mark.parametrize("case", ["released", "per_class"])
def test_cfa(reference, case):
    right, counts = (jnp.asarray(reference(FILE, f"cfa/epoch/{name}")) for name in ("right", "counts"))
    divisors = jnp.full(len(counts), counts.sum() / len(counts)) if case == "released" else counts
    accuracy = budgets.class_accuracy(right, divisors)
    found = {
        "train_robust": accuracy,
        "class_eps": budgets.cfa_epsilon(accuracy, EPSILON),
        "class_beta": budgets.cfa_weight(accuracy, 6.0),
    }
    for name, ours in found.items():
        reference.check("budgets: CFA", FILE, f"cfa/epoch/{case}/{name}", ours)


def dafa(reference, case, scale):
    labels, probabilities = (
        jnp.asarray(reference(FILE, f"dafa/{case}/{name}")) for name in ("labels", "probs")
    )
    members = jax.nn.one_hot(labels, probabilities.shape[1])
    similarity = budgets.dafa_similarity(members.T @ probabilities, members.sum(0))
    return budgets.dafa_weights(similarity, scale)


@pytest.mark.parametrize("scale", [1, 1.5])
@pytest.mark.parametrize("case", ["balanced", "long_tail"])
def test_dafa(reference, case, scale):
    weights = dafa(reference, case, scale)
    reference.check("budgets: DAFA", FILE, f"dafa/{case}/class_weights_lambda{scale:g}", weights)
    assert float(weights.sum()) == pytest.approx(len(weights), rel=1e-12)


def test_dafa_with_an_absent_class(reference):
    """The released code raises; ours leaves the absent class and the sum as they are."""
    assert "could not broadcast" in str(reference(FILE, "dafa/class3_absent/error"))
    weights = dafa(reference, "class3_absent", 1.0)
    assert weights[3] == 1
    assert float(weights.sum()) == pytest.approx(len(weights), rel=1e-12)


def test_all_arrays_are_looked_at(reference, request):
    """After the tests above, in the order of this file."""
    reference.skip_unless_all_ran(request)
    seen = reference.files[FILE]["compared"] | reference.files[FILE]["input"]
    mine = {key for key in reference.load(FILE) if key.startswith(("robustlt/", "cfa/epoch/", "dafa/"))}
    assert len(mine) > 40
    assert mine <= seen
