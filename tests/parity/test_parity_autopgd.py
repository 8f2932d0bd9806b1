"""AutoPGD against the reference implementation of AutoAttack, float64: see parity.py."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from autoattack_net import network
from parity import nchw, nhwc

from robal_jax import attacks, losses
from robal_jax.attacks import ThreatModel, autopgd, margins

pytestmark = [pytest.mark.parity, pytest.mark.usefixtures("float64")]

FILE = "autoattack_trace_f64"


@pytest.fixture(scope="module")
def attacked(reference):
    """The model, its images and labels, the starting points, the threat model and the targets."""
    load = functools.partial(reference, "autoattack")
    rows = reference(FILE, "idx")
    reference(FILE, "eps")
    threat = ThreatModel(float(load("eps")))
    images, labels = nhwc(load("x")[rows]), jnp.asarray(load("y")[rows])
    logits_fn = jax.jit(network(reference.load("autoattack")))
    reference.check("autopgd", FILE, "clean_logits", logits_fn(images))
    draws = 2 * nhwc(reference(FILE, "start_u")) - 1
    start = images + threat.epsilon * draws / (jnp.abs(draws).max((1, 2, 3), keepdims=True) + margins.TINY)
    targets = attacks.ranked_class(logits_fn(images), 2)
    reference.check("autopgd", FILE, "apgd_target", targets, 0)
    return logits_fn, images, labels, jnp.clip(start, 0, 1), threat, targets


@pytest.mark.slow
@pytest.mark.parametrize("steps", [10, 100])
@pytest.mark.parametrize("name", ["ce", "dlr", "dlr-targeted"])
def test_every_step(reference, attacked, name, steps):
    logits_fn, images, labels, start, threat, targets = attacked
    loss = {
        "ce": losses.cross_entropy,
        "dlr": attacks.dlr,
        "dlr-targeted": functools.partial(attacks.targeted_dlr, targets=targets),
    }[name]

    @jax.jit
    def search(start):
        return autopgd.search(
            logits_fn,
            start,
            images,
            labels,
            threat=threat,
            steps=steps,
            loss=loss,
            observe=lambda x, logits: (x, logits),
        )

    state, (x, logits) = search(start)
    x, logits = jnp.concatenate([start[None], x]), jnp.concatenate([logits_fn(start)[None], logits])
    check = functools.partial(reference.check, "autopgd", FILE)
    prefix = f"apgd_{name}_{steps}"
    check(f"{prefix}/iter_logits", logits)
    for key in sorted(reference.stored(FILE)):
        if key.startswith(f"{prefix}/x_iter"):
            check(key, nchw(x[int(key.removeprefix(f"{prefix}/x_iter"))]))
    check(f"{prefix}/x_best", nchw(state.best))
    check(f"{prefix}/loss_best", state.best_loss)
    check(f"{prefix}/acc", state.robust, 0)
    check(f"{prefix}/x_best_adv", nchw(state.adversarial))
    reference.assert_all_seen("autoattack_trace", f"{prefix}/")


def test_checks_are_made_when_the_reference_makes_them():
    windows = autopgd.check_windows(100)
    assert list(np.flatnonzero(windows) + 1) == [22, 41, 57, 70, 80, 87, 93, 99]
    assert list(windows[windows > 0]) == [22, 19, 16, 13, 10, 7, 6, 6]
