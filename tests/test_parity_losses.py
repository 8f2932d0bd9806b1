"""Losses against the released code, float64: see parity.py."""

import functools

import jax
import jax.numpy as jnp
import pytest

from robal_jax import losses

pytestmark = [pytest.mark.parity, pytest.mark.usefixtures("float64")]

ROBAL = {
    "MultiMargin_c10N": {"margin": 0.1, "scale": 10.0, "tau_b": 1.2, "tau_m": 0.0},
    "MultiMargin_c10R": {"margin": 0.1, "scale": 10.0, "tau_b": 1.5, "tau_m": 0.3},
    "MultiMargin_c100N": {"margin": 0.2, "scale": 10.0, "tau_b": 0.0, "tau_m": 0.0},
    "MultiMargin_c100R": {"margin": 0.3, "scale": 10.0, "tau_b": 0.0, "tau_m": 0.0},
    "MultiMargin_nomargin": {"margin": 0.0, "scale": 10.0, "tau_b": 1.0, "tau_m": 0.0},
    "MultiMargin_taum_only": {"margin": 0.0, "scale": 5.0, "tau_b": 0.0, "tau_m": 0.5},
    "LogitAdjust_t1": {"margin": 0.0, "scale": 1.0, "tau_b": 1.0, "tau_m": 0.0},
    "LogitAdjust_t05": {"margin": 0.0, "scale": 1.0, "tau_b": 0.5, "tau_m": 0.0},
    "UniMargin_m02_s10": {"margin": 0.2, "scale": 10.0, "tau_b": 0.0, "tau_m": 0.0},
}


@pytest.mark.parametrize("classes", [10, 100])
@pytest.mark.parametrize("logits", ["z", "zcos"])
def test_losses(reference, classes, logits):
    file, at = "losses_f64", f"c{classes}/{logits}"
    counts, labels = reference(file, f"c{classes}/samples_per_cls"), reference(file, f"c{classes}/labels")
    z = jnp.asarray(reference(file, f"{at}/logits"))
    cases = {name: functools.partial(losses.robal, class_counts=counts, **p) for name, p in ROBAL.items()}
    for name, loss in {"ce": losses.cross_entropy, **cases}.items():
        value, gradient = jax.value_and_grad(lambda z, loss=loss: loss(z, labels).mean())(z)
        reference.check("losses", file, f"{at}/{name}/value", value)
        reference.check("losses", file, f"{at}/{name}/grad", gradient)


@pytest.mark.parametrize("classes", [10, 100])
def test_loss_constants(reference, classes):
    file, at = "losses_f64", f"c{classes}/const"
    counts = reference(file, f"c{classes}/samples_per_cls")
    for name, p in ROBAL.items():
        if f"{at}/{name}_m" in reference.load(file):
            margins = losses.robal_margins(counts, scale=p["scale"], margin=p["margin"], tau_m=p["tau_m"])
            reference.check("losses", file, f"{at}/{name}_m", margins)
        if f"{at}/{name}_bias" in reference.load(file):
            reference.check(
                "losses", file, f"{at}/{name}_bias", losses.robal_biases(counts, tau_b=p["tau_b"])
            )
    reference.check("losses", file, f"{at}/LogitAdjust_bias_t1", losses.robal_biases(counts, tau_b=1.0))
