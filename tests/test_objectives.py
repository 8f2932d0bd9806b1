"""Objectives against a direct computation on a tiny model (robal_jax.objectives)."""

import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT, with_devices

from robal_jax import (
    attacks,
    losses,
    models,
    objectives,
)
from robal_jax.attacks import ThreatModel, gaussian_start, starting_points, uniform_start
from robal_jax.attacks.threat import COMMON_NORMS

B, SIZE, K = 8, 12, 3
MAX_EPSILON, SEARCH_STEPS = 0.1, 20


def logits_of(params, images, shift):
    return (images.reshape(len(images), -1) - shift) @ params["weight"] + params["bias"][None, :]


def tiny_model(axis_name=None, shown=None):
    """A linear model of images without their mean; what it is trained on is appended to ``shown``.

    Its features are half its logits.
    """

    def train(params, stats, images):
        del stats
        if shown is not None:
            shown.append(images)
        mean = images.mean() if axis_name is None else jax.lax.pmean(images.mean(), axis_name)
        return logits_of(params, images, mean), {"mean": mean}

    def train_features(params, stats, images):
        logits, moments = train(params, stats, images)
        return logits, logits / 2, moments

    return models.Model(
        init=None,
        predict=lambda params, stats, images: logits_of(params, images, stats["mean"]),
        train=train,
        features=None,
        train_features=train_features,
    )


MODEL = tiny_model()
RNG = np.random.RandomState(9)
PARAMS = {
    "weight": jnp.asarray(RNG.randn(SIZE, K), jnp.float32),
    "bias": jnp.asarray(RNG.randn(K), jnp.float32),
}
STATS = {"mean": jnp.float32(0.4)}
IMAGES = jnp.asarray(RNG.uniform(0.2, 0.8, (B, 2, 2, 3)), jnp.float32)
LABELS = jnp.asarray(RNG.randint(0, K, B), jnp.int32)
KEYS = jax.random.split(jax.random.key(0), B)
BATCH = objectives.Batch(IMAGES, LABELS, KEYS, jnp.int32(1))
SHIFT = jnp.asarray(0.03 + 0.1 * RNG.randn(*IMAGES.shape), jnp.float32)
TEACHER = {
    "weight": jnp.asarray(RNG.randn(SIZE, K), jnp.float32),
    "bias": jnp.asarray(RNG.randn(K), jnp.float32),
}
MARGINS = 0.1 * np.arange(K)
margin_loss = partial(losses.margin_adjusted_cross_entropy, margins=MARGINS, biases=np.zeros(K), scale=2.0)


def fixed_attack(logits_fn, keys, images, labels, loss=None):
    del logits_fn, keys, labels, loss
    return images + SHIFT


def teacher(images):
    return logits_of(TEACHER, images, 0.5)


def value(objective, params=PARAMS, batch=BATCH, model=MODEL, **keywords):
    return objective(model, params, STATS, batch, **keywords)


# ---------------------------------------------------------------- the same in NumPy, float64

X, Y = np.float64(IMAGES).reshape(B, -1), np.asarray(LABELS)
X_ADV = X + np.float64(SHIFT).reshape(B, -1)
ROWS, TRUE = np.arange(B), np.eye(K)[Y]
W_B = {name: np.float64(array) for name, array in PARAMS.items()}


def linear(params, images, shift):
    return (images - shift) @ params["weight"] + params["bias"]


def softmax(z):
    return np.exp(z) / np.exp(z).sum(1, keepdims=True)


def ce(z, targets=None):
    return -((TRUE if targets is None else targets) * np.log(softmax(z))).sum(1)


def margin_ce(z):
    return ce(2.0 * (z - MARGINS * TRUE))


def kl(z, z2):
    return (softmax(z) * np.log(softmax(z) / softmax(z2))).sum(1)


def boosted_ce(z):
    wrong = np.where(TRUE > 0, 0.0, softmax(z)).max(1)
    return ce(z) - np.log(1 - wrong)


def soft_labels(confidence):
    return np.where(TRUE > 0, confidence[:, None], (1 - confidence[:, None]) / (K - 1))


# Of avmixup: weight of the natural image, and the image.
ALPHA = np.float64(objectives.mixing_weights(KEYS, jnp.float32))
X_MIXED = np.clip(ALPHA[:, None] * X + (1 - ALPHA[:, None]) * (X + 1.5 * (X_ADV - X)), 0, 1)
X_OPPOSITE = 2 * X - X_ADV


def boundary():
    """Of mma: distance to the boundary along the shift, and the image there.

    Along ``x + eta * u`` logits are linear in ``eta``; no pixel meets a bound.
    """
    u = (X_ADV - X) / np.abs(X_ADV - X).max(1, keepdims=True)
    z, slope = linear(W_B, X, 0.4), u @ W_B["weight"]
    lead, closing = z[ROWS, Y][:, None] - z, slope - slope[ROWS, Y][:, None]
    crossed = np.where((lead > 0) & (closing > 0), lead / np.where(closing > 0, closing, 1.0), np.inf)
    right = z.argmax(1) == Y
    eta = np.where(right, np.minimum(crossed.min(1), 1.05 * MAX_EPSILON), 0.0)
    return eta, X + eta[:, None] * u


ETA, X_NEAR = boundary()


SHOWN = {"nat": X, "adv": X_ADV, "mixed": X_MIXED, "near": X_NEAR, "opposite": X_OPPOSITE}
BESIDE = {"near", "opposite"}  # passes without an accuracy
REGULARISERS = {  # and their passes, as released
    "kl": (lambda z: kl(z["nat"], z["adv"]).mean(), "adv nat nat adv"),
    "alp": (lambda z: np.linalg.norm(softmax(z["adv"]) - softmax(z["nat"])) / B, "adv nat nat adv"),
    "alp_logits": (lambda z: np.linalg.norm(z["adv"] - z["nat"]) / B, "adv nat nat adv"),
    "norm": (lambda z: np.linalg.norm(z["nat"]) / B, "adv nat nat"),
}


class Case(NamedTuple):
    """An objective; its value in NumPy, of the passes' logits; its passes; metrics besides accuracies."""

    objective: partial
    expected: Callable
    passes: str
    metrics: dict


def regularised(name, order, passes):
    return Case(
        partial(
            objectives.regularised,
            **{"attack": fixed_attack, "loss": margin_loss, "regulariser": name, "batch_norm_order": order},
            **{"beta_adv": 0.7, "beta_nat": 0.3, "beta_reg": 5.0},
        ),
        lambda z: (
            0.7 * margin_ce(z["adv"]).mean() + 0.3 * ce(z["nat"]).mean() + 5.0 * REGULARISERS[name][0](z)
        ),
        passes,
        {"regulariser": REGULARISERS[name][0], "adv_loss": lambda z: margin_ce(z["adv"]).mean()},
    )


def trades(order, passes):
    return Case(
        partial(objectives.trades, attack=fixed_attack, loss=margin_loss, beta=4.0, batch_norm_order=order),
        lambda z: margin_ce(z["nat"]).mean() + 4.0 * kl(z["nat"], z["adv"]).mean(),
        passes,
        {"regulariser": REGULARISERS["kl"][0]},
    )


def missed_kl(z):
    return (kl(z["nat"], z["adv"]) * (1 - softmax(z["nat"])[ROWS, Y])).mean()


def mma_value(z):
    near = np.where(ETA < MAX_EPSILON, margin_ce(z["near"]), 0.0)
    return 0.4 * margin_ce(z["nat"]).mean() + 0.6 * near.mean()


TEACHES = [linear({k: np.float64(a) for k, a in TEACHER.items()}, x, 0.5) for x in (X, X_ADV, X_OPPOSITE)]


def distillation(z):
    return kl(TEACHES[0], z["adv"]).mean()


def gradient_matching(z):
    return kl(TEACHES[1] - TEACHES[2], z["adv"] - z["opposite"]).mean()


# The last of four classes has no image here. Class 0 is the tail; three classes would have none.
COUNTS = np.array([2, 9, 5, 7])
RARITY = np.sqrt(COUNTS.sum() / COUNTS)[Y]
SAME = np.equal.outer(Y, Y)


def tail(z):
    """REAT's term; no gradient flows through ``p``."""
    p, log_q = softmax(linear(W_B, X_ADV, X_ADV.mean()) / 2), np.log(softmax(z["adv"] / 2))
    pairs = (p * np.log(p)).sum(1)[:, None] - p @ log_q.T
    terms = np.where(SAME, -1, 1) * np.add.outer(RARITY, RARITY) * pairs
    return terms[Y == 0].mean()


RADIUS_FACTORS = np.linspace(0.5, 2.0, B)


def trades_by_radius(z):
    weight = 4.0 * RADIUS_FACTORS / (1 + 4.0 * RADIUS_FACTORS)
    return ((1 - weight) * margin_ce(z["nat"]) + weight * kl(z["nat"], z["adv"])).mean()


CASES = {
    "plain": Case(
        partial(objectives.plain, loss=margin_loss), lambda z: margin_ce(z["nat"]).mean(), "nat", {}
    ),
    "pgd_at": Case(
        partial(objectives.pgd_at, attack=fixed_attack, loss=margin_loss),
        lambda z: margin_ce(z["adv"]).mean(),
        "adv",
        {},
    ),
    "pgd_at with a tail": Case(
        partial(
            objectives.pgd_at,
            **{"attack": fixed_attack, "loss": margin_loss, "class_counts": COUNTS},
            **{"tail_weight": 0.5, "tail_divergence": "pair"},
        ),
        lambda z: margin_ce(z["adv"]).mean() + 0.5 * tail(z),
        "adv",
        {"tail_features": tail},
    ),
    "distilled": Case(
        partial(
            objectives.distilled,
            **{"attack": fixed_attack, "loss": margin_loss, "teacher": teacher},
            **{"epochs": 4, "kd": 0.7, "igdm": 0.3},
        ),
        lambda z: margin_ce(z["adv"]).mean() + 0.7 * distillation(z) + 0.3 * 1 / 4 * gradient_matching(z),
        "adv opposite",
        {"distillation": distillation, "gradient_matching": gradient_matching},
    ),
    **{f"regularised {name}": regularised(name, "released", REGULARISERS[name][1]) for name in REGULARISERS},
    **{f"regularised {name} once": regularised(name, "each_pass_once", "adv nat") for name in REGULARISERS},
    "trades": trades("released", "nat adv nat"),
    "trades once": trades("each_pass_once", "nat adv"),
    "trades by radius": Case(
        partial(
            objectives.trades,
            **{"attack": fixed_attack, "loss": margin_loss, "beta": 4.0},
            **{"by_radius": True, "radius_factors": jnp.asarray(RADIUS_FACTORS, jnp.float32)},
        ),
        trades_by_radius,
        "nat adv nat",
        {"regulariser": REGULARISERS["kl"][0]},
    ),
    "mart": Case(
        partial(objectives.mart, attack=fixed_attack, beta=3.0),
        lambda z: boosted_ce(z["adv"]).mean() + 3.0 * missed_kl(z),
        "nat adv",
        {"regulariser": missed_kl},
    ),
    "avmixup": Case(
        partial(
            objectives.avmixup,
            **{"attack": fixed_attack, "gamma": 1.5, "nat_confidence": 0.9, "vertex_confidence": 0.2},
        ),
        lambda z: ce(z["mixed"], soft_labels(0.9 * ALPHA + 0.2 * (1 - ALPHA))).mean(),
        "mixed",
        {},
    ),
    "mma": Case(
        partial(
            objectives.mma,
            **{"attack": fixed_attack, "threat": ThreatModel(0.05), "loss": margin_loss},
            **{"max_epsilon": MAX_EPSILON, "search_steps": SEARCH_STEPS, "nat_weight": 0.4},
        ),
        mma_value,
        "near nat",
        {"margin": lambda z: ETA.mean()},
    ),
}
# The order of the moments does not change the function.
ATTACKING = [name for name in CASES if "once" not in name and name != "plain"]
each_attacking = pytest.mark.parametrize("name", ATTACKING)


def numpy_logits(params):
    return {name: linear(params, images, images.mean()) for name, images in SHOWN.items()}


def test_the_batch_tells_cases_apart():
    means = [images.mean() for images in SHOWN.values()]
    assert np.abs(np.subtract.outer(means, means) + np.eye(len(means))).min() > 1e-3
    logits = numpy_logits(W_B)
    assert (logits["nat"].argmax(1) == Y).mean() != (logits["adv"].argmax(1) == Y).mean()
    wrong, beyond = ETA == 0, ETA > MAX_EPSILON
    assert {group.any() for group in (wrong, beyond, ~wrong & ~beyond)} == {True}
    np.testing.assert_array_equal(wrong, linear(W_B, X, 0.4).argmax(1) != Y)
    for name in {*SHOWN} - {"opposite"}:
        assert SHOWN[name].min() >= 0
        assert SHOWN[name].max() <= 1
    assert (Y == 0).any()


@pytest.mark.parametrize("name", CASES)
def test_value_metrics_and_order_of_the_moments(name):
    case, logits = CASES[name], numpy_logits(W_B)
    found, outcome = value(case.objective)
    # Sums of up to 12 products of size 1 in float32; of mma, the last interval 0.1 / 2^20 besides.
    close = partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
    close(found, case.expected(logits))
    passes = case.passes.split()
    close([moments["mean"] for moments in outcome.moments], [SHOWN[name].mean() for name in passes])
    accuracies = {f"{name}_accuracy": (logits[name].argmax(1) == Y).mean() for name in {*passes} - BESIDE}
    expected = accuracies | {key: function(logits) for key, function in case.metrics.items()}
    assert set(outcome.metrics) == set(expected)
    for key, number in expected.items():
        close(outcome.metrics[key], number, err_msg=key)


@pytest.mark.parametrize("name", ["regularised kl", "trades"])
def test_order_of_the_moments_is_the_released_one_by_default(name):
    objective = CASES[name].objective
    keywords = {key: v for key, v in objective.keywords.items() if key != "batch_norm_order"}
    assert len(value(partial(objective.func, **keywords))[1].moments) == len(CASES[name].passes.split())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["plain", *ATTACKING])
def test_gradient_flows_through_every_prediction(name):
    """Against central differences of the NumPy value, in which images are constants and nothing else is."""
    case, step = CASES[name], 1e-5
    found = jax.grad(lambda params: value(case.objective, params)[0])(PARAMS)
    for key, array in W_B.items():
        expected = np.zeros_like(array)
        for index in np.ndindex(array.shape):
            ends = []
            for sign in (1, -1):
                moved = {k: a.copy() for k, a in W_B.items()}
                moved[key][index] += sign * step
                ends.append(case.expected(numpy_logits(moved)))
            expected[index] = (ends[0] - ends[1]) / (2 * step)
        assert np.abs(expected).max() > 1e-2
        # Float32 sums of terms that are larger than they; the differences' own error is 1e-10.
        np.testing.assert_allclose(found[key], expected, rtol=1e-4, atol=2e-5)


# ---------------------------------------------------------------- attacks


@each_attacking
def test_no_gradient_flows_through_the_attack(name):
    def differentiable_attack(logits_fn, keys, images, labels, loss=None):
        return images + 0.01 * logits_fn(images).sum(-1)[:, None, None, None]

    shown = differentiable_attack(partial(MODEL.predict, PARAMS, STATS), KEYS, IMAGES, LABELS)
    constant = lambda *args, loss=None: shown  # noqa: E731
    gradients = [
        jax.grad(lambda p, attack=attack: value(CASES[name].objective, p, attack=attack)[0])(PARAMS)
        for attack in (differentiable_attack, constant)
    ]
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), *gradients)


@each_attacking
def test_attack_sees_running_statistics_keys_and_labels(name):
    seen = {}

    def attack(logits_fn, keys, images, labels, loss=None):
        seen.update(logits=logits_fn(images), keys=keys, labels=labels)
        return images

    value(CASES[name].objective, attack=attack)
    np.testing.assert_array_equal(seen["logits"], MODEL.predict(PARAMS, STATS, IMAGES))
    assert (seen["keys"] == KEYS).all()
    np.testing.assert_array_equal(seen["labels"], LABELS)


PGD = partial(
    attacks.pgd,
    threat=ThreatModel(0.1),
    steps=3,
    step_size=0.05,
    start=gaussian_start,
    loss=losses.soft_logit_margin,
)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["pgd_at", "distilled", "regularised kl", "trades", "mart", "avmixup", "mma"]
)
def test_differentiable_with_a_real_attack(name):
    run = jax.jit(jax.value_and_grad(lambda p: value(CASES[name].objective, p, attack=PGD)[0]))
    loss, gradient = run(PARAMS)
    assert np.isfinite(loss)
    assert float(jnp.abs(gradient["weight"]).max()) > 1e-3


# ---------------------------------------------------------------- trades


def test_trades_attacks_the_divergence():
    seen = {}

    def attack(logits_fn, keys, images, labels, loss):
        seen.update(found=loss(logits_fn(images + SHIFT), labels))
        return PGD(logits_fn, keys, images, labels, loss=loss)

    shown = []
    value(CASES["trades"].objective, attack=attack, model=tiny_model(shown=shown))
    predicted = [linear(W_B, images, 0.4) for images in (X, X_ADV)]
    np.testing.assert_allclose(seen["found"], kl(*predicted), rtol=1e-4, atol=1e-6)  # differences of logs
    again = []
    value(CASES["trades"].objective, attack=PGD, model=tiny_model(shown=again))
    np.testing.assert_array_equal(again[1], shown[1], "the loss that the attack was built with matters")
    corner = X + 0.1 * np.sign(X_ADV - X)
    reached, by_chance = (
        kl(predicted[0], linear(W_B, np.float64(images).reshape(B, -1), 0.4)) for images in (shown[1], corner)
    )
    assert (reached > by_chance).all()


# ---------------------------------------------------------------- avmixup


@pytest.mark.slow
def test_mixing_weights_belong_to_the_key_and_not_to_the_attack():
    draws = 4000

    @jax.jit
    def drawn(keys):
        noise = [
            starting_points(uniform_start, keys, jnp.zeros((len(keys), 1)), ThreatModel(1.0, norm))[:, 0]
            for norm in COMMON_NORMS
        ]
        return objectives.mixing_weights(keys, jnp.float32), noise

    keys = jax.random.split(jax.random.key(1), draws)
    weights, noise = drawn(keys)
    assert weights.dtype == jnp.float32
    assert 0 <= weights.min() < 0.001
    assert 0.999 < weights.max() < 1
    assert abs(weights.mean() - 0.5) < 4 / np.sqrt(12 * draws)  # four standard errors
    np.testing.assert_array_equal(drawn(keys[::-1])[0][::-1], weights)
    np.testing.assert_array_equal(objectives.mixing_weights(keys[:B], jnp.float32), weights[:B])
    for norm, start in zip(COMMON_NORMS, noise, strict=True):
        for what in (start, np.abs(start)):  # in L2 the distance is a draw of its own
            assert abs(np.corrcoef(what, weights)[0, 1]) < 4 / np.sqrt(draws), norm


@pytest.mark.parametrize(
    ("alpha", "images", "targets"),
    [
        (1.0, X, TRUE),
        (0.0, np.clip(X + 2.0 * (X_ADV - X), 0, 1), np.where(TRUE > 0, 0.1, 0.45)),
    ],
)
def test_ends_of_the_mixture_by_default(monkeypatch, alpha, images, targets):
    monkeypatch.setattr(objectives, "mixing_weights", lambda keys, dtype: jnp.full(len(keys), alpha, dtype))
    found, _ = value(partial(objectives.avmixup, attack=fixed_attack))
    np.testing.assert_allclose(found, ce(linear(W_B, images, images.mean()), targets).mean(), rtol=1e-5)


def test_mixed_images_stay_in_bounds():
    shown = []
    far = lambda *args, loss=None: IMAGES + 10 * SHIFT  # noqa: E731
    value(CASES["avmixup"].objective, attack=far, model=tiny_model(shown=shown))
    assert (shown[0].min(), shown[0].max()) == (0, 1)


# ---------------------------------------------------------------- mma


def predicted(images):
    return np.asarray(MODEL.predict(PARAMS, STATS, images))


def with_labels(labels):
    return BATCH._replace(labels=jnp.asarray(labels, jnp.int32))


def mma(labels, threat=PGD.keywords["threat"], **keywords):
    """Returns the loss and metrics of mma with a real attack, and the images near the boundary."""
    shown, attack = [], partial(PGD, threat=threat, step_size=threat.epsilon / 2)
    objective = partial(CASES["mma"].objective, attack=attack, threat=threat, **keywords)
    found, outcome = value(objective, batch=with_labels(labels), model=tiny_model(shown=shown))
    return found, outcome.metrics, shown[0]


def test_defaults_of_mma():
    """1/3 of the natural loss, and ten halvings of the search."""
    labels = predicted(IMAGES).argmax(1)
    objective = partial(objectives.mma, attack=PGD, threat=PGD.keywords["threat"], loss=losses.cross_entropy)
    found, expected = (
        value(partial(objective, max_epsilon=0.5, **given), batch=with_labels(labels))[0]
        for given in ({}, {"nat_weight": 1 / 3, "search_steps": 10})
    )
    assert found == expected


def test_misclassified_images_are_trained_on_as_they_are():
    labels = predicted(IMAGES).argmin(1)
    found, metrics, shown = mma(labels)
    np.testing.assert_array_equal(shown, IMAGES)
    expected = value(CASES["plain"].objective, batch=with_labels(labels))[0]
    np.testing.assert_allclose(found, expected, rtol=1e-6)  # 0.4 + 0.6 is 1 to one rounding
    assert metrics["margin"] == 0


def test_images_far_from_the_boundary_contribute_nothing():
    labels = predicted(IMAGES).argmax(1)
    found, metrics, _ = mma(labels, max_epsilon=1e-4, threat=ThreatModel(5e-5))
    expected = 0.4 * value(CASES["plain"].objective, batch=with_labels(labels))[0]
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    np.testing.assert_allclose(metrics["margin"], 1.05e-4, rtol=1e-5)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_images_near_the_boundary_are_on_its_far_side(norm):
    labels = predicted(IMAGES).argmax(1)
    threat = ThreatModel(0.5 if norm == "l2" else 0.1, norm)
    _, _, shown = mma(labels, threat=threat, max_epsilon=10.0)
    logits = predicted(shown)
    reached = np.asarray(threat.distance(shown, IMAGES)) < threat.epsilon
    assert reached.sum() > B / 2
    lead = logits[ROWS, labels] - np.where(np.eye(K)[labels] > 0, -np.inf, logits).max(1)
    assert (lead[reached] <= 1e-6).all()  # rounding of logits of size 1 .. 10
    assert (lead[reached] > -1e-4).all()  # and no farther than the last interval, 1e-6, times the slope


# ---------------------------------------------------------------- the rest


@pytest.mark.parametrize("regulariser", ["alp", "alp_logits"])
def test_gradient_is_finite_where_both_predictions_are_equal(regulariser):
    objective = partial(
        objectives.regularised, loss=margin_loss, attack=lambda *args: IMAGES,
        regulariser=regulariser, beta_adv=0.0,
    )  # fmt: skip
    loss, gradient = jax.value_and_grad(lambda params: value(objective, params)[0])(PARAMS)
    assert abs(float(loss)) < 1e-15
    for array in gradient.values():
        np.testing.assert_array_equal(array, np.zeros_like(array))


def test_epoch_reaches_a_deferred_loss():
    counts = np.array([9, 4, 1])
    weights = losses.effective_number_weights(counts, beta=0.9999)
    before, after = (
        value(objectives.pgd_at, attack=fixed_attack, loss=partial(losses.cross_entropy, class_weights=w))[0]
        for w in (None, weights)
    )
    assert abs(before - after) > 1e-3

    @jax.jit
    def deferred(batch):
        loss = partial(
            losses.deferred, base=losses.cross_entropy, class_counts=counts, start=4, margins=False,
            epoch=batch.epoch,
        )  # fmt: skip
        return value(objectives.pgd_at, batch=batch, attack=fixed_attack, loss=loss)[0]

    found = [deferred(BATCH._replace(epoch=jnp.int32(epoch))) for epoch in (3, 4, 5)]
    np.testing.assert_allclose(found, [before, after, after], rtol=1e-6)  # compiled against not


def check_parts_against_the_whole(parts):
    """Values and gradients of a batch in parts, averaged as ``train_step`` does it, and of the whole."""
    names = [f"regularised {name}" for name in REGULARISERS]

    def values_and_gradients(images, labels, shift, axis_name=None):
        def values(params):
            batch, model = BATCH._replace(images=images, labels=labels), tiny_model(axis_name)
            more = {"attack": lambda *args: images + shift, "axis_name": axis_name}
            found = [value(partial(CASES[name].objective, **more), params, batch, model) for name in names]
            return jnp.stack([number for number, _ in found])

        found = values(PARAMS), jax.jacrev(values)(PARAMS)
        return found if axis_name is None else jax.lax.pmean(found, axis_name)

    arrays = IMAGES, LABELS, SHIFT
    split = [x.reshape(parts, B // parts, *x.shape[1:]) for x in arrays]
    found = jax.pmap(partial(values_and_gradients, axis_name="data"), axis_name="data")(*split)
    whole = jax.jit(values_and_gradients)(*arrays)
    for ours, expected in zip(jax.tree.leaves(found), jax.tree.leaves(whole), strict=True):
        for device in np.asarray(ours):  # the order of float32 sums differs
            np.testing.assert_allclose(device, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_regularisers_are_those_of_the_whole_batch_on_four_devices():
    code = "import test_objectives; test_objectives.check_parts_against_the_whole(4)"
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    env = with_devices(4, PYTHONPATH=path)
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_table_of_objectives():
    names = {"plain", "pgd_at", "distilled", "regularised", "trades", "mart", "avmixup", "mma"}
    assert {name: getattr(objectives, name) for name in names} == objectives.OBJECTIVES
    assert {case.objective.func for case in CASES.values()} == set(objectives.OBJECTIVES.values())
