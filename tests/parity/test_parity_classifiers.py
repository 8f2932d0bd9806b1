"""Heads against the released code, float64: see parity.py."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from robal_jax import classifiers, losses, models

pytestmark = [pytest.mark.parity, pytest.mark.usefixtures("float64")]

FILE = "classifiers_f64"
FC, SCALED = "fc.bias+fc.weight", "cla_scale+fc.bias+fc.weight"  # names of the sets of weights
COS, MOVING = "bias+weight", "bias+moving_ed+weight"
OURS = {  # their arrays and ours
    "fc.weight": "weight",
    "weight": "weight",
    "fc.bias": "bias",
    "cla_scale": "class_scale",
    "moving_ed": "direction",
    "bias": "none",  # frozen at zero: ours has no such array
}
G32 = {"gamma": 1 / 32}
HEADS = {  # set of weights, our head, its settings, tau of the prior adjustment
    "FC": (FC, "linear", {}, 0.0),
    "Dot": (FC, "linear", {"bias": "frozen"}, 0.0),
    "PostProc_FC_tau1": (FC, "linear", {"bias": "frozen"}, 1.0),
    "PostProc_FC_noposthoc": (FC, "linear", {"bias": "frozen"}, 0.0),
    "CDT_t03": (FC, "class_temperature", {"bias": "frozen", "tau": 0.3}, 0.0),
    "CDT_t03_posthoc": (FC, "class_temperature", {"bias": "frozen", "tau": 0.3, "posthoc": True}, 0.0),
    "PostNorm_tau1": (SCALED, "tau_norm", {}, 0.0),
    "PostNorm_tau05_T2_bias": (SCALED, "tau_norm", {"tau": 0.5, "temperature": 2.0, "use_bias": True}, 0.0),
    "PostNorm_lws": (SCALED, "tau_norm", {"tau": 0.0, "learn_scale": True}, 0.0),
    "PostNorm_featnorm": (SCALED, "tau_norm", {"unit_features": True}, 0.0),
    "Cos_s1": (COS, "cosine", {"scale": 1.0}, 0.0),
    "Cos_s16": (COS, "cosine", {"scale": 16.0}, 0.0),
    "CosPlus_g32_s1": (MOVING, "cosine", {"scale": 1.0} | G32, 0.0),
    "CosPlus_g16_s1": (MOVING, "cosine", {"scale": 1.0, "gamma": 1 / 16}, 0.0),
    "CosPlus_eta05_s16": (MOVING, "cosine", {"scale": 16.0, "eta": 0.5} | G32, 0.0),
    "CosPlus_eta2_s10": (MOVING, "cosine", {"scale": 10.0, "eta": 2.0} | G32, 0.0),
    "CosPlus_noavg": (COS, "cosine", {"scale": 1.0} | G32, 0.0),
    "PostProc_Cos_t01_g32": (COS, "cosine", {"scale": 10.0} | G32, 0.1),
    "PostProc_Cos_t15_g32": (COS, "cosine", {"scale": 10.0} | G32, 1.5),
    "PostProc_Cos_t17_g16": (COS, "cosine", {"scale": 10.0, "gamma": 1 / 16}, 1.7),
    "TDESim": (MOVING, "tde", {"scale": 16.0, "alpha": 0.0} | G32, 0.0),
    "TDESim_posthoc": (MOVING, "tde", {"scale": 16.0, "alpha": 0.1} | G32, 0.0),
}


def class_counts(reference, classes):
    return tuple(reference("losses_f64", f"c{classes}/samples_per_cls").tolist())


def our_head(reference, classes, case, **more):
    """The head and the shapes of its variables."""
    _, kind, settings, _ = HEADS[case]
    if kind in {"linear", "class_temperature"}:
        more["class_counts"] = class_counts(reference, classes)
    head = classifiers.HEADS[kind](classes, **settings | more)
    features = reference(FILE, "features")[0]
    return head, jax.eval_shape(lambda x: head.init(jax.random.key(0), x, False), features)


def released(reference, classes, case):
    """``(variables, features, train) -> logits`` with our head as in the released one, and its variables."""
    names, _, _, tau_p = HEADS[case]
    weights = {name: reference(FILE, f"c{classes}/weights/{names}/{name}") for name in names.split("+")}
    # Where it is frozen it is 1 there, but these weights have it at other values.
    more = {"learn_scale": True} if "cla_scale" in weights else {}
    head, like = our_head(reference, classes, case, **more)
    ours = {OURS[name]: value for name, value in weights.items()}
    variables = jax.tree_util.tree_map_with_path(
        lambda path, x: jnp.asarray(ours[path[-1].key]).reshape(x.shape), like
    )

    def apply(variables, features, train):
        logits, left = head.apply(variables, features, train, mutable=["batch_stats"])
        logits = classifiers.adjust_for_prior(logits, class_counts(reference, classes), tau=tau_p)
        if case.startswith(("Cos", "TDE")):
            logits += weights["bias"][None]  # frozen at zero but in these weights
        return logits, left.get("batch_stats")

    return apply, variables


def check_mode(reference, recipe, case, classes, mode, apply, variables):
    """Checks logits and, where it is stored, their gradient by the features, which it gives."""
    features, at = reference(FILE, "features")[0], f"c{classes}/{case}/{mode}"
    logits, pullback = jax.vjp(lambda x: apply(variables, x, mode == "train")[0], features)
    (dx,) = pullback(jnp.asarray(reference(FILE, f"c{classes}/cotangent")))
    reference.check("classifiers", FILE, f"{at}/logits", logits)
    if f"{at}/grad_x_checksum" in reference.load(FILE):
        reference.check("classifiers", FILE, f"{at}/grad_x_checksum", recipe.checksum(dx))
    return dx


@pytest.mark.slow
@pytest.mark.parametrize("classes", [10, 100])
@pytest.mark.parametrize("case", HEADS)
def test_classifiers(reference, recipe, classes, case):
    apply, variables = released(reference, classes, case)
    if case != "TDESim_posthoc":  # without a direction it cannot evaluate there
        check_mode(reference, recipe, case, classes, "eval", apply, variables)
    dx = check_mode(reference, recipe, case, classes, "train", apply, variables)
    if classes == 100:
        return
    features, at = reference(FILE, "features")[0], f"c{classes}/{case}/train"
    reference.check("classifiers", FILE, f"{at}/grad_x_row0", dx[0])

    def loss(params):
        logits, _ = apply(variables | {"params": params}, features, True)
        return (logits * reference(FILE, f"c{classes}/cotangent")).sum()

    gradients = jax.grad(loss)(variables["params"])
    for name in HEADS[case][0].split("+"):
        if f"{at}/grad/{name}" in reference.load(FILE):
            gradient = gradients[OURS[name]]
            row = gradient if gradient.ndim == 1 else gradient[0]
            reference.check("classifiers", FILE, f"{at}/grad/{name}", row)
            reference.check("classifiers", FILE, f"{at}/grad_checksum/{name}", recipe.checksum(gradient))


@pytest.mark.parametrize("case", HEADS)
def test_trainable_parameters(reference, case):
    flags = dict(entry.split("=") for entry in str(reference(FILE, f"requires_grad/{case}")).split())
    _, variables = our_head(reference, 10, case)
    ours = [OURS[name] in variables["params"] for name in flags]
    theirs = [flag == "True" for flag in flags.values()]
    reference.check("trainable or not", FILE, f"requires_grad/{case}", ours, theirs=theirs)


@pytest.mark.parametrize("case", ["CosPlus_g32_s1", "CosPlus_eta05_s16", "TDESim", "TDESim_posthoc"])
def test_moving_direction(reference, recipe, case):
    """Three training passes from zero, each with other features, then an evaluation."""
    apply, variables = released(reference, 10, case)
    features, at = reference(FILE, "features"), f"c10/{case}"

    def passed(stats, x):
        if "direction" in variables.get("batch_stats", {}):
            _, moments = apply(variables | {"batch_stats": stats}, x, True)
        else:  # CosPlus keeps a direction that it never uses, ours none: only the rule is compared
            moments = {"direction": classifiers.unit_features(x, HEADS[case][2].get("eta", 1.0)).mean(0)}
        return models.update_statistics(stats, (moments,))

    stats = {"direction": jnp.zeros(features.shape[-1])}
    for i in 1, 2, 3:
        stats = passed(stats, features[i])
        reference.check("moving direction", FILE, f"{at}/moving_ed/after{i}", stats["direction"][None])
    if case.startswith("TDE"):
        for classes in 10, 100:
            head, weights = released(reference, classes, case)
            weights["batch_stats"] = stats
            check_mode(reference, recipe, case, classes, "eval_after3", head, weights)
        _, left = apply(variables | {"batch_stats": stats}, features[0], False)
        np.testing.assert_array_equal(left["direction"], stats["direction"])
    if case == "TDESim":  # moves where it evaluates too, as if that were a training pass; ours does not
        stats = passed(stats, features[0])
    if f"{at}/moving_ed_after_eval" in reference.load(FILE):
        reference.check("moving direction", FILE, f"{at}/moving_ed_after_eval", stats["direction"][None])


def test_no_direction_yet(reference):
    """The released head divides 0 by 0; ours, on purpose, has nothing to remove."""
    key, features = "c10_TDESim_posthoc_zero_ed_allnan", reference(FILE, "features")[0]
    assert reference(FILE, key)
    logits = []
    for case in "TDESim_posthoc", "TDESim":
        apply, variables = released(reference, 10, case)
        logits.append(apply(variables, features, False)[0])
    reference.check("no direction: NaN there", FILE, key, logits[0], theirs=logits[1])


@pytest.mark.parametrize("classes", [10, 100])
def test_class_counts(reference, classes):
    counts, at = class_counts(reference, classes), f"c{classes}"
    zeros = jnp.zeros((1, classes))

    def check(key, ours):
        reference.check("class counts", FILE, f"{at}/{key}", ours)

    check("const/PostProc_prior_bias_t1", -classifiers.adjust_for_prior(zeros, counts, tau=1.0)[0])
    check("const/CDT_ac_t03", losses.temperatures(counts, tau=0.3))
    check("const/CDT_nc_t03", 1 / classifiers.divide_by_counts(zeros + 1, counts, tau=0.3)[0])

    head, features = classifiers.LinearHead(classes, counts, bias="prior"), reference(FILE, "features")[0]
    params = head.init(jax.random.key(0), features, False)["params"]
    check("FC_focal_init/bias", params["bias"])
    params["weight"] = reference(FILE, f"{at}/weights/{FC}/fc.weight")
    check("FC_focal_init/logits", head.apply({"params": params}, features, False))
