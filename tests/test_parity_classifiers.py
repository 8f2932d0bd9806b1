"""Heads against the released code, float64: see parity.py."""

import jax
import jax.numpy as jnp
import pytest

from robal_jax import classifiers

pytestmark = [pytest.mark.parity, pytest.mark.usefixtures("float64")]

PRE, COS, FC = "bias+moving_ed+weight", "bias+weight", "fc.bias+fc.weight"  # names of the sets of weights
HEADS = {  # set of weights, parameters of the cosine head, tau of the prior adjustment
    "FC": (FC, None, 0.0),
    "PostProc_FC_tau1": (FC, None, 1.0),
    "PostProc_FC_noposthoc": (FC, None, 0.0),
    "Cos_s1": (COS, {"scale": 1.0}, 0.0),
    "Cos_s16": (COS, {"scale": 16.0}, 0.0),
    "CosPlus_g32_s1": (PRE, {"scale": 1.0, "gamma": 1 / 32}, 0.0),
    "CosPlus_g16_s1": (PRE, {"scale": 1.0, "gamma": 1 / 16}, 0.0),
    "CosPlus_eta05_s16": (PRE, {"scale": 16.0, "gamma": 1 / 32, "eta": 0.5}, 0.0),
    "CosPlus_eta2_s10": (PRE, {"scale": 10.0, "gamma": 1 / 32, "eta": 2.0}, 0.0),
    "CosPlus_noavg": (COS, {"scale": 1.0, "gamma": 1 / 32}, 0.0),
    "PostProc_Cos_t01_g32": (COS, {"scale": 10.0, "gamma": 1 / 32}, 0.1),
    "PostProc_Cos_t15_g32": (COS, {"scale": 10.0, "gamma": 1 / 32}, 1.5),
    "PostProc_Cos_t17_g16": (COS, {"scale": 10.0, "gamma": 1 / 16}, 1.7),
}


@pytest.mark.parametrize("classes", [10, 100])
@pytest.mark.parametrize("case", HEADS)
def test_classifiers(reference, recipe, classes, case):
    file, at, (names, cosine, tau) = "classifiers_f64", f"c{classes}/{case}", HEADS[case]
    weights = {name: reference(file, f"c{classes}/weights/{names}/{name}") for name in names.split("+")}
    weight, bias = (weights.get(name, weights.get(f"fc.{name}")) for name in ("weight", "bias"))
    counts = reference("losses_f64", f"c{classes}/samples_per_cls")
    features, cotangent = reference(file, "features")[0], reference(file, f"c{classes}/cotangent")

    def logits_fn(features, weight, bias):
        if cosine is None:
            z = classifiers.linear_logits(features, weight, bias)
        else:
            z = classifiers.cosine_logits(features, weight, **cosine)
        return classifiers.adjust_for_prior(z, counts, tau=tau)

    logits, pullback = jax.vjp(logits_fn, features, weight, bias)
    dx, dw, db = pullback(jnp.asarray(cotangent))
    if case.startswith("Cos"):
        logits = logits + bias[None]  # the released head adds its frozen bias, zero but in this one check
    for mode in "eval", "train":
        reference.check("classifiers", file, f"{at}/{mode}/logits", logits)
        if classes == 10:
            reference.check("classifiers", file, f"{at}/{mode}/grad_x_checksum", recipe.checksum(dx))
    if classes == 100:
        return
    reference.check("classifiers", file, f"{at}/train/grad_x_row0", dx[0])
    fc = "fc." if cosine is None else ""
    reference.check("classifiers", file, f"{at}/train/grad/{fc}weight", dw[0])
    reference.check("classifiers", file, f"{at}/train/grad_checksum/{fc}weight", recipe.checksum(dw))
    if case == "FC":  # the bias of the others is frozen there
        reference.check("classifiers", file, f"{at}/train/grad/fc.bias", db)
        reference.check("classifiers", file, f"{at}/train/grad_checksum/fc.bias", recipe.checksum(db))


@pytest.mark.parametrize("classes", [10, 100])
def test_prior_bias(reference, classes):
    counts = reference("losses_f64", f"c{classes}/samples_per_cls")
    shift = -classifiers.adjust_for_prior(jnp.zeros((1, classes)), counts, tau=1.0)[0]
    reference.check("classifiers", "classifiers_f64", f"c{classes}/const/PostProc_prior_bias_t1", shift)
