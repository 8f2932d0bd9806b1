"""FAB against the released AutoAttack: see parity.py.

Unlike with attacks that step along signs, float32 rounding does not grow in FAB: its steps follow from the
gradients continuously.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from autoattack_net import network
from parity import FLOAT32, nchw, nhwc

from robal_jax import attacks
from robal_jax.attacks import ThreatModel, fab_attack

pytestmark = [pytest.mark.parity, pytest.mark.usefixtures("float64")]

FILE = "autoattack_trace_f64"
NET = "autoattack"
ROUNDINGS = 10 * FLOAT32  # 100 steps, each with a rounding of 6e-8, and a few more at the end


def attacked(reference):
    """The network, the images and their labels, in the precision that JAX computes in."""
    arrays = {key: reference(NET, key) for key in reference.load(NET) if key.startswith("net/")}
    rows = reference(FILE, "idx")
    return network(arrays), nhwc(reference(NET, "x")[rows]), jnp.asarray(reference(NET, "y")[rows])


def traces(reference):
    """FAB at the second class, of two lengths and from two starts: name, images, distances, predictions."""
    logits_fn, images, labels = attacked(reference)
    threat = ThreatModel(float(reference(FILE, "eps")))
    noise = 2 * nhwc(reference(FILE, "start_u")) - 1
    noise = noise / jnp.abs(noise).max((1, 2, 3), keepdims=True)
    starts = {"": images, "_rs": jnp.clip(images + threat.epsilon / 2 * noise, 0, 1)}
    attack = jax.jit(
        functools.partial(attacks.fab, logits_fn, None, images, labels, threat=threat),
        static_argnames="n_iter",
    )
    for steps in 5, 100:
        for suffix, start in starts.items():
            found = attack(rank=2, n_iter=steps, start=start)
            yield f"fabt_{steps}{suffix}", found, threat.distance(found, images), logits_fn(found).argmax(-1)


def test_projection(reference):
    points, w, b = (reference(FILE, f"projection_linf/{key}") for key in ("points", "w", "b"))
    found = jax.jit(fab_attack.project_onto_hyperplane_linf)(points, w, b)
    reference.check("FAB", FILE, "projection_linf/d", found)


@pytest.mark.slow
def test_targeted_runs(reference):
    logits_fn, images, _ = attacked(reference)
    reference.check("FAB", FILE, "clean_logits", logits_fn(images))
    for name, found, distances, predictions in traces(reference):
        reference.check("FAB", FILE, f"{name}/adv", nchw(found))
        reference.check("FAB", FILE, f"{name}/linf", distances)
        reference.check("FAB", FILE, f"{name}/pred", predictions, 0)


@pytest.mark.slow
def test_targeted_runs_in_float32(reference):
    with jax.enable_x64(False):
        for name, found, distances, predictions in traces(reference):
            assert found.dtype == jnp.float32
            check = functools.partial(reference.check, "FAB, float32", "autoattack_trace")
            check(f"{name}/linf", distances, ROUNDINGS)
            # Of two images as far away but for a rounding either may be kept: where the released runs agree.
            single, double = (reference.load(file)[f"{name}/adv"] for file in ("autoattack_trace", FILE))
            same = np.abs(single - double).max((1, 2, 3)) < ROUNDINGS
            check(f"{name}/adv", nchw(found)[same], ROUNDINGS, theirs=single[same])
            classes = reference.load("autoattack_trace")[f"{name}/pred"]
            check(f"{name}/pred", predictions[same], 0, theirs=classes[same])
