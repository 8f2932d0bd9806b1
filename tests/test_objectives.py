"""Objectives against a direct computation on a tiny model (robal_jax.objectives)."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from robal_jax import attacks, losses, objectives
from robal_jax.models import Model

B, SIZE, K = 6, 12, 3
BETAS = {"beta_adv": 0.7, "beta_nat": 0.3, "beta_reg": 5.0}


def logits_of(params, images, shift):
    return (images.reshape(len(images), -1) - shift) @ params["weight"] + params["bias"][None, :]


def train(params, stats, images):
    del stats
    mean = images.mean()
    return logits_of(params, images, mean), {"mean": mean}


MODEL = Model(
    init=lambda key, images: (_ for _ in ()).throw(AssertionError("not needed")),
    predict=lambda params, stats, images: logits_of(params, images, stats["mean"]),
    train=train,
)
RNG = np.random.RandomState(0)
PARAMS = {
    "weight": jnp.asarray(RNG.randn(SIZE, K), jnp.float32),
    "bias": jnp.asarray(RNG.randn(K), jnp.float32),
}
STATS = {"mean": jnp.float32(0.4)}
IMAGES = jnp.asarray(RNG.rand(B, 2, 2, 3), jnp.float32)
LABELS = jnp.asarray(RNG.randint(0, K, B), jnp.int32)
KEYS = jax.random.split(jax.random.key(0), B)
SHIFT = jnp.asarray(0.1 * RNG.randn(*IMAGES.shape), jnp.float32)
margin_loss = partial(
    losses.margin_adjusted_cross_entropy, margins=0.1 * np.arange(K), biases=np.zeros(K), scale=2.0
)


def fixed_attack(logits_fn, keys, images, labels):
    del logits_fn, keys, labels
    return images + SHIFT


def value(objective, params=PARAMS, **keywords):
    keywords = {"attack": fixed_attack, "loss": margin_loss, **keywords}
    return objective(MODEL, params, STATS, IMAGES, LABELS, KEYS, **keywords)


def numpy_logits(images):
    flat = np.float64(images).reshape(B, -1)
    return (flat - flat.mean()) @ np.float64(PARAMS["weight"]) + np.float64(PARAMS["bias"])


def numpy_softmax(logits):
    shifted = np.exp(logits - logits.max(1, keepdims=True))
    return shifted / shifted.sum(1, keepdims=True)


def numpy_terms():
    """The three terms of RoBal's objective: adversarial, natural, regulariser."""
    adv, nat = numpy_logits(IMAGES + SHIFT), numpy_logits(IMAGES)
    labels = np.asarray(LABELS)
    lowered = 2.0 * (adv - 0.1 * labels[:, None] * np.eye(K)[labels])
    p, q = numpy_softmax(nat), numpy_softmax(adv)
    return (
        -np.log(numpy_softmax(lowered)[np.arange(B), labels]).mean(),
        -np.log(p[np.arange(B), labels]).mean(),
        (p * (np.log(p) - np.log(q))).sum(1).mean(),
    )


def test_pgd_at():
    found, outcome = value(objectives.pgd_at)
    np.testing.assert_allclose(found, numpy_terms()[0], rtol=1e-5)
    assert len(outcome.moments) == 1
    np.testing.assert_allclose(outcome.moments[0]["mean"], (IMAGES + SHIFT).mean(), rtol=1e-5)
    correct = numpy_logits(IMAGES + SHIFT).argmax(1) == np.asarray(LABELS)
    assert float(outcome.metrics["adv_accuracy"]) == pytest.approx(correct.mean())


def test_robal():
    found, outcome = value(objectives.robal, **BETAS)
    adv, nat, reg = numpy_terms()
    np.testing.assert_allclose(found, 0.7 * adv + 0.3 * nat + 5.0 * reg, rtol=1e-5)
    np.testing.assert_allclose(outcome.metrics["adv_loss"], adv, rtol=1e-5)
    np.testing.assert_allclose(outcome.metrics["regulariser"], reg, rtol=1e-5)
    correct = numpy_logits(IMAGES).argmax(1) == np.asarray(LABELS)
    assert float(outcome.metrics["nat_accuracy"]) == pytest.approx(correct.mean())


@pytest.mark.parametrize(
    ("order", "names"),
    [("released", ("adv", "nat", "nat", "adv")), ("each_pass_once", ("adv", "nat"))],
)
def test_order_of_the_moments(order, names):
    means = {"adv": (IMAGES + SHIFT).mean(), "nat": IMAGES.mean()}
    assert abs(means["adv"] - means["nat"]) > 1e-3
    _, outcome = value(objectives.robal, batch_norm_order=order)
    np.testing.assert_allclose(
        [moment["mean"] for moment in outcome.moments], [means[name] for name in names], rtol=1e-5
    )
    # The order changes statistics only.
    np.testing.assert_array_equal(
        value(objectives.robal)[0], value(objectives.robal, batch_norm_order=order)[0]
    )


def test_order_of_the_moments_is_the_released_one_by_default():
    assert len(value(objectives.robal)[1].moments) == 4


def test_gradient_flows_through_both_predictions():
    def direct(params, stopped=()):
        nat, adv = train(params, STATS, IMAGES)[0], train(params, STATS, IMAGES + SHIFT)[0]
        p = jax.nn.softmax(jax.lax.stop_gradient(nat) if "nat" in stopped else nat)
        q = jax.nn.softmax(jax.lax.stop_gradient(adv) if "adv" in stopped else adv)
        return (p * (jnp.log(p) - jnp.log(q))).sum(-1).mean()

    regulariser = partial(value, objectives.robal, beta_adv=0.0, beta_nat=0.0, beta_reg=1.0)
    found = jax.jit(jax.grad(lambda params: regulariser(params=params)[0]))(PARAMS)["weight"]
    np.testing.assert_allclose(found, jax.jit(jax.grad(direct))(PARAMS)["weight"], rtol=1e-4, atol=1e-6)
    for stopped in ("nat", "adv"):
        one_branch = jax.jit(jax.grad(partial(direct, stopped=(stopped,))))(PARAMS)["weight"]
        assert np.abs(found - one_branch).max() > 1e-3, f"no gradient through {stopped}"


OBJECTIVES = {
    "pgd_at": objectives.pgd_at,
    "robal": partial(objectives.robal, **BETAS),
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_no_gradient_flows_through_the_attack(name):
    def differentiable_attack(logits_fn, keys, images, labels):
        return images + 0.01 * logits_fn(images).sum(-1)[:, None, None, None]

    shown = differentiable_attack(partial(MODEL.predict, PARAMS, STATS), KEYS, IMAGES, LABELS)
    constant = lambda logits_fn, keys, images, labels: shown  # noqa: E731
    gradients = [
        jax.jit(jax.grad(lambda p, attack=attack: value(OBJECTIVES[name], p, attack=attack)[0]))(PARAMS)
        for attack in (differentiable_attack, constant)
    ]
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), *gradients)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_attack_sees_running_statistics_keys_and_labels(name):
    seen = {}

    def attack(logits_fn, keys, images, labels):
        seen.update(logits=logits_fn(images), keys=keys, labels=labels)
        return images

    value(OBJECTIVES[name], attack=attack)
    np.testing.assert_array_equal(seen["logits"], MODEL.predict(PARAMS, STATS, IMAGES))
    assert (seen["keys"] == KEYS).all()
    np.testing.assert_array_equal(seen["labels"], LABELS)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_differentiable_with_a_real_attack(name):
    attack = partial(attacks.pgd, threat=attacks.ThreatModel(0.1), steps=3, step_size=0.05)
    loss, gradient = jax.jit(jax.value_and_grad(lambda p: value(OBJECTIVES[name], p, attack=attack)[0]))(
        PARAMS
    )
    assert np.isfinite(loss)
    assert float(jnp.abs(gradient["weight"]).max()) > 1e-3


def test_table_of_objectives():
    assert {"pgd_at": objectives.pgd_at, "robal": objectives.robal} == objectives.OBJECTIVES
