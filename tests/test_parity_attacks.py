"""Attacks against the released code, float64: see parity.py."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from parity import BACKBONE, EPSILON, STEP, THREAT, imported, nchw, nhwc

from robal_jax import attacks, classifiers, losses, models

pytestmark = [pytest.mark.parity, pytest.mark.usefixtures("float64")]

ATTACKS = {  # size and array of the start noise, settings of the path, which replay
    "FGSM": (0.0, "eval", {"steps": 1, "step_size": EPSILON}, "replay_signs_eval"),
    "PGD20": (1.0, "eval", {"steps": 20}, "replay_signs_eval"),
    "MIM20": (1.0, "eval", {"steps": 20, "momentum": 1.0}, "replay_signs_eval"),
    "CW20": (1.0, "eval", {"steps": 20, "loss": attacks.negative_margin}, "replay_signs_eval"),
    "TRAINPGD5": (EPSILON, "uniform01", {"steps": 5}, "replay_signs"),
    "TRAINPGD5_gauss": (0.001, "gauss", {"steps": 5}, "replay_signs"),
}


@pytest.fixture(scope="module")
def attacked(reference, recipe):
    """The attacked model, its images and labels."""
    model = models.functional(models.Network(BACKBONE, classifiers.LinearHead(10)))
    params, stats = imported(recipe, "attacknet", model)
    file = "attacks_f64"
    assert tuple(reference(file, "eps_step")) == (EPSILON, STEP)
    logits_fn = jax.jit(lambda x: model.predict(params, stats, x))
    return logits_fn, nhwc(reference(file, "x")), jnp.asarray(reference(file, "y"))


def attack_path(attacked, start, *, steps, step_size=STEP, **settings):
    """The start and the images after every step, ``[steps + 1, B, H, W, C]``."""
    logits_fn, x, y = attacked
    settings = {"threat": THREAT, "steps": tuple(range(1, steps + 1)), "step_size": step_size, **settings}
    path = jax.jit(lambda start: attacks.pgd_path(logits_fn, start, x, y, **settings))(start)
    return jnp.concatenate([start[None], path])


@pytest.mark.parametrize("name", ATTACKS)
def test_attacks(reference, recipe, attacked, name):
    file, (size, noise, settings, replay) = "attacks_f64", ATTACKS[name]
    check = functools.partial(reference.check, "attacks", file)
    logits_fn, x, y = attacked
    start = x + size * nhwc(reference("attacks", f"noise/{noise}"))
    path = attack_path(attacked, start, **settings)

    # Every step's images: the released ones follow from the stored signs.
    signs = reference(file, f"{name}/grad_sign")
    step_size = settings.get("step_size", STEP)
    rebuilt = getattr(recipe, replay)(nchw(start), nchw(x), signs, step_size, EPSILON, dtype=np.float64)
    assert np.abs(nchw(path[1:]) - np.stack(rebuilt)).max() < 1e-12
    check(f"{name}/x_end", nchw(path[-1]))
    if f"{name}/x_step1" in reference.load(file):
        check(f"{name}/x_step1", nchw(path[1]))

    logits = jax.lax.map(logits_fn, path)
    check(f"{name}/logits", logits)
    check(f"{name}/pred", logits.argmax(-1), 0)
    if f"{name}/err" in reference.load(file):
        errors = [(logits_fn(images).argmax(-1) != y).sum() for images in (x, path[-1])]
        check(f"{name}/err", np.stack(errors), 0)

    # What is stepped along, at the images before each step.
    loss = settings.get("loss", losses.cross_entropy)
    batch_loss = jax.value_and_grad(lambda x: loss(logits_fn(x), y).mean())
    values, gradients = jax.lax.map(batch_loss, path[:-1])
    check(f"{name}/loss", values)
    if "momentum" in settings:
        gradients = (gradients / jnp.abs(gradients).mean((2, 3, 4), keepdims=True)).cumsum(0)
    check(f"{name}/grad_sign", np.sign(nchw(gradients)), 0)
    means = jnp.abs(gradients).mean((2, 3, 4))
    check(f"{name}/grad_absmean", means)
    tiny = jnp.abs(gradients) < 1e-5 * means[:, :, None, None, None]
    check(f"{name}/grad_tiny", tiny.sum((1, 2, 3, 4)), 0)


def test_basic_evaluation(reference, attacked):
    file, (logits_fn, x, _) = "attacks_f64", attacked
    check = functools.partial(reference.check, "attacks", file)
    start = x + nhwc(reference("attacks", "noise/eval"))
    path = attack_path(attacked, start, steps=20)
    for steps in 5, 10, 20:
        check(f"basic/PGD-{steps}", logits_fn(path[steps]))
    check("basic/FGSM", logits_fn(attack_path(attacked, x, steps=1, step_size=EPSILON)[1]))
    check("basic/CLEAN", logits_fn(x))
    check("clean_logits", logits_fn(x))
