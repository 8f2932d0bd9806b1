"""Losses against the released code, float64: see parity.py."""

import functools

import jax
import jax.numpy as jnp
import pytest

from robal_jax import losses

pytestmark = [pytest.mark.parity, pytest.mark.usefixtures("float64")]

FILE = "losses_f64"
GROUPS = {"const": "losses: constants", "DRW": "losses: deferred", "DM": "losses: deferred"}
EPOCHS = (0, 39, 40, 79)  # weights and margins start at 40
ROBAL = {
    "MultiMargin_c10N": {"margin": 0.1, "scale": 10.0, "tau_b": 1.2, "tau_m": 0.0},
    "MultiMargin_c10R": {"margin": 0.1, "scale": 10.0, "tau_b": 1.5, "tau_m": 0.3},
    "MultiMargin_c100N": {"margin": 0.2, "scale": 10.0, "tau_b": 0.0, "tau_m": 0.0},
    "MultiMargin_c100R": {"margin": 0.3, "scale": 10.0, "tau_b": 0.0, "tau_m": 0.0},
    "MultiMargin_nomargin": {"margin": 0.0, "scale": 10.0, "tau_b": 1.0, "tau_m": 0.0},
    "MultiMargin_taum_only": {"margin": 0.0, "scale": 5.0, "tau_b": 0.0, "tau_m": 0.5},
}
PLAIN = {
    "ce": losses.cross_entropy,
    "focal_sigmoid_g2": functools.partial(losses.focal, gamma=2.0),
    "focal_sigmoid_g1": functools.partial(losses.focal, gamma=1.0),
    "focal_softmax_g2": functools.partial(losses.focal_softmax, gamma=2.0),
    "BCE": losses.binary_cross_entropy,
    "BCE_T2": functools.partial(losses.binary_cross_entropy, temperature=2.0),
    "UniMargin_m02_s10": functools.partial(losses.uniform_margin, margin=0.2, scale=10.0),
    "soft_l09": functools.partial(losses.smoothed_cross_entropy, confidence=0.9),
}
OF_COUNTS = {
    "CB_focal": (losses.class_balanced_focal, {"beta": 0.9999, "gamma": 2.0}),
    "CB_focal_b999_a05": (losses.class_balanced_focal, {"beta": 0.999, "gamma": 1.0, "alpha": 0.5}),
    "CB_sigmoid": (losses.class_balanced_sigmoid, {"beta": 0.9999}),
    "CB_softmax": (losses.class_balanced_softmax, {"beta": 0.9999}),
    "LDAM_s1": (losses.ldam, {"scale": 1.0}),
    "LDAM_s10": (losses.ldam, {"scale": 10.0}),
    "LDAM_inv_s10": (losses.ldam, {"scale": 10.0, "inverse": True}),
    "LDAM_g05_s10": (losses.ldam, {"scale": 10.0, "exponent": 0.5}),
    "CDT_t03": (losses.class_temperature, {"tau": 0.3}),
    "CDT_t1": (losses.class_temperature, {"tau": 1.0}),
    "LogitAdjust_t1": (losses.logit_adjustment, {"tau": 1.0}),
    "LogitAdjust_t05": (losses.logit_adjustment, {"tau": 0.5}),
    **{name: (losses.robal, settings) for name, settings in ROBAL.items()},
}
# Losses that were run with deferred weights too. The released code gives the weights to all of them, but
# two ignore them; ours do not take weights.
WEIGHTED = (
    "focal_sigmoid_g2",
    "focal_softmax_g2",
    "BCE",
    "CB_focal",
    "CB_sigmoid",
    "LDAM_s1",
    "UniMargin_m02_s10",
)
UNWEIGHTED = ("LogitAdjust_t1", "MultiMargin_c10R")


def constants(counts):
    """Arrays by name, of the class counts alone."""
    balanced = functools.partial(losses.effective_number_weights, counts)
    robal = {
        f"const/{name}_{part}": array
        for name, p in ROBAL.items()
        for part, array in {
            "m": losses.robal_margins(counts, scale=p["scale"], margin=p["margin"], tau_m=p["tau_m"]),
            "bias": losses.robal_biases(counts, tau_b=p["tau_b"]),
        }.items()
    }
    stored = ("c10N_m", "c10N_bias", "c10R_m", "c10R_bias", "c100N_m", "c100R_m")
    return {name: array for name, array in robal.items() if name.endswith(stored)} | {
        "const/CB_weights_b0.9999": balanced(beta=0.9999)[None, :],
        "const/CB_weights_b0.999": balanced(beta=0.999)[None, :],
        "const/LDAM_m": losses.ldam_margins(counts),
        "const/LDAM_m_inv": losses.ldam_margins(counts, inverse=True),
        "const/CDT_ac_t03": losses.temperatures(counts, tau=0.3),
        "const/LogitAdjust_bias_t1": losses.robal_biases(counts, tau_b=1.0),
        **{f"DRW/ep{epoch}/weights": deferred_weights(counts, epoch) for epoch in EPOCHS},
    }


def deferred_weights(counts, epoch):
    """What the base of a deferred loss is given."""
    none = jnp.zeros((1, len(counts))), jnp.zeros(1, int)
    return losses.deferred(
        *none, base=lambda *_, class_weights: class_weights, class_counts=counts, epoch=epoch
    )


def of_logits(counts, labels, z):
    """Arrays by name, of logits: values, gradients and adjusted logits."""
    deferred = functools.partial(losses.deferred, class_counts=counts)
    cases = PLAIN | {
        name: functools.partial(f, class_counts=counts, **p) for name, (f, p) in OF_COUNTS.items()
    }
    for name in WEIGHTED:
        cases[f"DRW/ep40/{name}"] = functools.partial(deferred, base=cases[name], epoch=40, margins=False)
    for name in UNWEIGHTED:
        cases[f"DRW/ep40/{name}"] = functools.partial(
            deferred, base=cases[name], epoch=40, margins=False, reweight=False
        )
    for epoch in EPOCHS:
        now = functools.partial(deferred, base=losses.cross_entropy, epoch=epoch)
        cases |= {f"DRW/ep{epoch}/ce": functools.partial(now, margins=False), f"DRW+DM/ep{epoch}/ce": now}
    arrays = {}
    for name, loss in cases.items():
        value, gradient = jax.value_and_grad(lambda z, loss=loss: loss(z, labels).mean())(z)
        arrays |= {f"{name}/value": value, f"{name}/grad": gradient}

    def bias(tau):
        return losses.robal_biases(counts, tau_b=tau)[None, :]

    # What the released code leaves in place of the logits; ours keep them, and this is what they compute.
    arrays |= {
        f"CDT_{t}/logits_after": z / losses.temperatures(counts, tau=tau)[None, :]
        for t, tau in (("t03", 0.3), ("t1", 1.0))
    }
    arrays |= {f"LogitAdjust_{t}/logits_after": z + bias(tau) for t, tau in (("t05", 0.5), ("t1", 1.0))}
    arrays["MultiMargin_nomargin/logits_after"] = 10.0 * z + bias(1.0)
    # With a base that returns its logits, a deferred loss returns them less the margins of this epoch.
    for epoch in EPOCHS:
        arrays[f"DM/ep{epoch}/logits"] = deferred(
            z, labels, base=lambda logits, _: logits, epoch=epoch, reweight=False
        )
    return arrays


@pytest.mark.slow
@pytest.mark.parametrize("classes", [10, 100])
def test_every_stored_array(reference, classes):
    counts, labels = reference(FILE, f"c{classes}/samples_per_cls"), reference(FILE, f"c{classes}/labels")
    arrays = constants(counts)
    compute = jax.jit(functools.partial(of_logits, counts, labels))
    for name in ("z", "zcos"):
        computed = compute(reference(FILE, f"c{classes}/{name}/logits"))
        arrays |= {f"{name}/{key}": array for key, array in computed.items()}

    inputs = {"samples_per_cls", "labels", "z/logits", "zcos/logits"}
    names = [key.partition("/") for key in reference.load(FILE)]
    assert {key for head, _, key in names if head == f"c{classes}"} - inputs == set(arrays)
    # All else is of the other number of classes, but for the text of an exception: the released code cannot
    # compose the class-balanced loss with the softmax form of focal, and ours has no such loss.
    assert {key for head, _, key in names if head not in ("c10", "c100")} == {"CB_focal_use_sigmoid_False"}
    assert "RuntimeError" in str(reference(FILE, "error/CB_focal_use_sigmoid_False"))

    for key, array in arrays.items():
        group = next((GROUPS[part] for part in key.replace("+", "/").split("/") if part in GROUPS), "losses")
        reference.check(group, FILE, f"c{classes}/{key}", array)
