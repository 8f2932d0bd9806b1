"""Attacks against the released code, float64: see parity.py."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from parity import BACKBONE, EPSILON, FLOAT32, STEP, THREAT, imported, nchw, nhwc

from robal_jax import attacks, classifiers, losses, models

pytestmark = [pytest.mark.parity, pytest.mark.slow, pytest.mark.usefixtures("float64")]

FILE = "attacks_f64"
ATTACKS = {  # size and array of the start noise, settings of the path, which replay
    "FGSM": (0.0, "eval", {"steps": 1, "step_size": EPSILON}, "replay_signs_eval"),
    "PGD20": (1.0, "eval", {"steps": 20}, "replay_signs_eval"),
    "MIM20": (1.0, "eval", {"steps": 20, "momentum": 1.0}, "replay_signs_eval"),
    "CW20": (1.0, "eval", {"steps": 20, "loss": attacks.negative_margin}, "replay_signs_eval"),
    "TRADES10": (0.001, "gauss", {"steps": 10, "loss": "divergence"}, "replay_signs"),
    "TRAINPGD5": (EPSILON, "uniform01", {"steps": 5}, "replay_signs"),
    "TRAINPGD5_gauss": (0.001, "gauss", {"steps": 5}, "replay_signs"),
}


@pytest.fixture(scope="module")
def attacked(reference, recipe):
    """The attacked model, its images and labels."""
    model = models.functional(models.Network(BACKBONE, classifiers.LinearHead(10)))
    params, stats = imported(recipe, "attacknet", model)
    assert tuple(reference(FILE, "eps_step")) == (EPSILON, STEP)
    logits_fn = jax.jit(lambda x: model.predict(params, stats, x))
    return logits_fn, nhwc(reference(FILE, "x")), jnp.asarray(reference(FILE, "y"))


def attack_path(attacked, start, *, steps, step_size=STEP, **settings):
    """The start and the images after every step, ``[steps + 1, B, H, W, C]``."""
    logits_fn, x, y = attacked
    settings = {"threat": THREAT, "steps": tuple(range(1, steps + 1)), "step_size": step_size, **settings}
    path = jax.jit(lambda start: attacks.pgd_path(logits_fn, start, x, y, **settings))(start)
    return jnp.concatenate([start[None], path])


@pytest.mark.slow
@pytest.mark.parametrize("name", ATTACKS)
def test_attacks(reference, recipe, attacked, name):
    size, noise, settings, replay = ATTACKS[name]
    check = functools.partial(reference.check, "attacks", FILE)
    logits_fn, x, y = attacked
    loss, reduce = settings.get("loss", losses.cross_entropy), jnp.mean
    if loss == "divergence":  # from the natural prediction, as in objectives.trades; its loss is a sum there
        expected = logits_fn(x)
        loss, reduce = (lambda z, _: losses.kl_divergence(expected, z)), jnp.sum
        settings = settings | {"loss": loss}
    start = x + size * nhwc(reference("attacks", f"noise/{noise}"))
    path = attack_path(attacked, start, **settings)

    # Every step's images: the released ones follow from the stored signs.
    signs = reference(FILE, f"{name}/grad_sign")
    step_size = settings.get("step_size", STEP)
    rebuilt = getattr(recipe, replay)(nchw(start), nchw(x), signs, step_size, EPSILON, dtype=np.float64)
    assert np.abs(nchw(path[1:]) - np.stack(rebuilt)).max() < 1e-12
    check(f"{name}/x_end", nchw(path[-1]))
    if f"{name}/x_step1" in reference.load(FILE):
        check(f"{name}/x_step1", nchw(path[1]))
    for step in 0, 2, 3:
        key = f"{name}/x_step{step}"
        if key in reference.load("attacks"):
            same = reference.same_steps("attacks", f"{name}/grad_sign", step)
            ours, theirs = (a[same] for a in (nchw(path[step]), reference.load("attacks")[key]))
            reference.check("attacks, float32", "attacks", key, ours, FLOAT32, theirs=theirs)

    logits = jax.lax.map(logits_fn, path)
    check(f"{name}/logits", logits)
    check(f"{name}/pred", logits.argmax(-1), 0)
    if f"{name}/err" in reference.load(FILE):
        errors = [(logits_fn(images).argmax(-1) != y).sum() for images in (x, path[-1])]
        check(f"{name}/err", np.stack(errors), 0)

    # What is stepped along, at the images before each step.
    batch_loss = jax.value_and_grad(lambda x: reduce(loss(logits_fn(x), y)))
    values, gradients = jax.lax.map(batch_loss, path[:-1])
    check(f"{name}/loss", values)
    if "momentum" in settings:
        gradients = (gradients / jnp.abs(gradients).mean((2, 3, 4), keepdims=True)).cumsum(0)
    check(f"{name}/grad_sign", np.sign(nchw(gradients)), 0)
    means = jnp.abs(gradients).mean((2, 3, 4))
    check(f"{name}/grad_absmean", means)
    tiny = jnp.abs(gradients) < 1e-5 * means[:, :, None, None, None]
    check(f"{name}/grad_tiny", tiny.sum((1, 2, 3, 4)), 0)
    reference.assert_all_seen("attacks", f"{name}/")


@pytest.mark.slow
def test_basic_evaluation(reference, attacked):
    logits_fn, x, y = attacked
    check = functools.partial(reference.check, "attacks", FILE)
    start = x + nhwc(reference("attacks", "noise/eval"))
    path = attack_path(attacked, start, steps=20)
    for steps in 5, 10, 20:
        check(f"basic/PGD-{steps}", logits_fn(path[steps]))
    check("basic/FGSM", logits_fn(attack_path(attacked, x, steps=1, step_size=EPSILON)[1]))
    gradients = jax.grad(lambda x: losses.cross_entropy(logits_fn(x), y).mean())(x)
    check("basic/zero_grad", 100 * (gradients == 0).mean(), 0)
    check("basic/CLEAN", logits_fn(x))
    check("clean_logits", logits_fn(x))
    reference.assert_all_seen("attacks", "basic/")
    read = {key.partition("/")[0] for key in reference.stored(FILE)} - {*ATTACKS, "basic"}
    assert read == {"x", "y", "eps_step", "clean_logits"}  # together with the above: nothing is left out
