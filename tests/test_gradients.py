"""Attacks on models whose gradients or logits are no ordinary numbers: finite images, allowed and true."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from robal_jax import attacks, autoattack, losses
from robal_jax.attacks import ThreatModel, autopgd
from robal_jax.errors import InputError

SIDE, CLASSES = 5, 4
SIZE = SIDE * SIDE
WEIGHT = jnp.asarray(np.random.RandomState(0).randn(SIZE, CLASSES), jnp.float32)
IMAGES = jnp.asarray(np.random.RandomState(1).uniform(0.2, 0.8, (3, SIDE, SIDE, 1)), jnp.float32)
LABELS = jnp.argmax(IMAGES.reshape(3, -1) @ WEIGHT, -1)
KEYS = jax.random.split(jax.random.key(0), 3)
THREATS = {"linf": ThreatModel(0.1), "l2": ThreatModel(0.5, "l2")}
PIXELS = jnp.arange(SIZE).reshape(SIDE, SIDE, 1)

SPOILT = {  # what becomes of the gradient [H, W, C] of the middle one of three images
    "as it is": lambda g: g,
    "NaN in a pixel": lambda g: jnp.where(PIXELS == 7, jnp.nan, g),
    "NaN but in a pixel": lambda g: jnp.where(PIXELS == 7, g, jnp.nan),
    "NaN": lambda g: jnp.full_like(g, jnp.nan),
    "infinite in a pixel": lambda g: jnp.where(PIXELS == 7, jnp.inf, g),
    "minus infinite in two": lambda g: jnp.where(PIXELS < 2, -jnp.inf, g),
    "NaN and both infinities": lambda g: jnp.where(PIXELS < 6, jnp.nan, jnp.inf * g),
    "1e18 times larger": lambda g: g * 1e18,
    "1e30 times larger": lambda g: g * 1e30,
    "1e36 times larger": lambda g: g * 1e36,
    "1e30 times smaller": lambda g: g * 1e-30,
    "denormal": lambda g: g * 1e-38 * 1e-3,
    "zero": lambda g: 0 * g,
}
SCALES = (1e4, -1e4, 1e38, -1e38, np.inf, -np.inf, np.nan)


@jax.custom_vjp
def spoil(x, kind):
    """The images themselves, with another gradient."""
    return x


def backward(kind, gradient):
    middle = jax.lax.switch(kind, list(SPOILT.values()), gradient[1])
    return gradient.at[1].set(middle), None


spoil.defvjp(lambda x, kind: (x, kind), backward)


def model(kind, scale, x, *keys):
    """A linear model; the gradient of the middle image is spoilt, and its logits are scaled."""
    logits = spoil(x, kind).reshape(len(x), -1) @ WEIGHT
    return logits * jnp.where(jnp.arange(len(x)) == 1, scale, 1.0)[:, None]


def pgd(*arguments, threat, **settings):
    return attacks.pgd(*arguments, threat=threat, steps=4, step_size=threat.epsilon / 2, **settings)


def towards_all(*arguments, threat):
    return attacks.multi_targeted(*arguments, attack=partial(pgd, threat=threat), targets=2)


def shortest(*arguments, threat):
    attack = partial(pgd, threat=threat)
    return attacks.shortest_adversarial(
        *arguments, attack=attack, threat=threat, max_epsilon=threat.epsilon
    )[0]  # fmt: skip


BOTH, LINF = ("linf", "l2"), ("linf",)
ROWS = {  # norms, attack
    "pgd": (BOTH, partial(pgd, start=attacks.clean_start)),
    "mim": (BOTH, partial(pgd, start=attacks.clean_start, momentum=1.0)),
    "cw": (LINF, partial(pgd, loss=attacks.negative_margin)),
    "restarts": (LINF, partial(pgd, restarts=2)),
    "eot": (LINF, partial(pgd, eot=2)),
    "apgd": (BOTH, partial(attacks.apgd, steps=6)),
    "apgd, dlr": (LINF, partial(attacks.apgd, steps=6, loss=attacks.dlr)),
    "targeted_apgd": (LINF, partial(attacks.targeted_apgd, steps=6)),
    "pma": (BOTH, partial(attacks.pma, steps=6)),
    "multi_targeted": (LINF, towards_all),
    "shortest_adversarial": (BOTH, shortest),
    "fab": (LINF, partial(attacks.fab, n_iter=4)),
    "fab, targeted": (BOTH, partial(attacks.fab, n_iter=4, rank=2)),
    "square": (BOTH, partial(attacks.square, queries=4)),
    "fmn": (BOTH, lambda *arguments, **settings: attacks.fmn(*arguments, n_iter=4, **settings).images),
    "ddn": (("l2",), lambda *arguments, **settings: attacks.ddn(*arguments, n_iter=4, **settings).images),
}
MINIMUM_NORM = ("fab", "fab, targeted", "fmn", "ddn")
ATTACKS = [(name, norm) for name, (norms, _) in ROWS.items() for norm in norms]


def compiled(name, norm, **settings):
    """``(kind of gradient, scale of logits) -> images``; one program for all kinds and scales."""
    attack = partial(ROWS[name][1], threat=THREATS[norm], **settings)
    return jax.jit(lambda kind, scale: attack(partial(model, kind, scale), KEYS, IMAGES, LABELS))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "norm"), ATTACKS)
def test_no_gradient_and_no_logit_leads_an_image_astray(name, norm):
    run, threat = compiled(name, norm), THREATS[norm]
    found = {kind: np.asarray(run(number, 1.0)) for number, kind in enumerate(SPOILT)}
    found |= {f"logits times {scale}": np.asarray(run(0, scale)) for scale in SCALES}
    plain = found["as it is"]
    assert np.abs(plain - np.asarray(IMAGES))[1].max() > 0.01, "the attack does nothing"
    for kind, shown in found.items():
        assert np.isfinite(shown).all(), kind
        assert shown.min() >= 0, kind
        assert shown.max() <= 1, kind
        if name not in MINIMUM_NORM:  # whose images may be further away
            assert threat.distance(shown, IMAGES).max() <= threat.epsilon + 1e-6, kind
        np.testing.assert_array_equal(shown[[0, 2]], plain[[0, 2]], f"{kind}: the other images")
    for kind in ("1e18 times larger", "1e30 times larger", "1e36 times larger"):
        if name not in MINIMUM_NORM:  # to which the gradient's size tells the distance
            np.testing.assert_allclose(found[kind], plain, atol=1e-5, err_msg=kind)


@pytest.mark.parametrize("name", ["pgd", "mim"])
@pytest.mark.parametrize("norm", THREATS)
def test_which_pixels_move(name, norm):
    """NaN does not move; infinity moves by its sign, in L2 it alone; other pixels move as ever."""
    clean, threat = np.asarray(IMAGES)[1].reshape(-1), THREATS[norm]
    run = compiled(name, norm, loss=lambda logits, labels: logits[:, 0])  # the same gradient everywhere
    moved = {kind: np.asarray(run(number, 1.0))[1].reshape(-1) - clean for number, kind in enumerate(SPOILT)}
    plain, pixel = moved["as it is"], np.arange(SIZE)
    assert not moved["NaN"].any()
    assert not moved["zero"].any()
    np.testing.assert_array_equal(moved["NaN in a pixel"][7], 0)
    np.testing.assert_array_equal(moved["NaN but in a pixel"][pixel != 7], 0)
    np.testing.assert_array_equal(np.sign(moved["NaN in a pixel"])[pixel != 7], np.sign(plain)[pixel != 7])
    assert np.sign(moved["NaN but in a pixel"][7]) == np.sign(plain[7])
    assert moved["infinite in a pixel"][7] > 0.09
    assert (moved["minus infinite in two"][:2] < -0.09).all()
    others = moved["infinite in a pixel"][pixel != 7]
    if norm == "linf":
        np.testing.assert_array_equal(others, plain[pixel != 7])
    else:
        np.testing.assert_allclose(others, 0, atol=1e-6)
        assert np.linalg.norm(moved["NaN in a pixel"]) == pytest.approx(threat.epsilon, rel=1e-3)


def logarithmic(x):
    """Finite logits; the gradient of a black pixel is 0 times infinity."""
    x = x.reshape(len(x), -1)
    return (x + 0.01 * jnp.where(x > 0, jnp.log(x), 0.0)) @ WEIGHT


@pytest.mark.slow
def test_the_ensemble_does_not_count_what_it_cannot_show():
    images = IMAGES.at[:, 0, 0].set(0.0)
    labels = jnp.argmax(logarithmic(images), -1)
    version = "apgd_ce,fab_t,square"
    found = autoattack(
        logarithmic, KEYS, images, labels, threat=ThreatModel(0.01), version=version, steps=3, queries=3
    )
    assert np.isfinite(found.images).all()
    np.testing.assert_array_equal(found.predictions, np.argmax(logarithmic(found.images), -1))
    assert np.abs(found.images - images).max() <= 0.01 + 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_models_of_a_low_precision(dtype, scale):
    """Losses are those of float32; what overflows on the way back in float16 is infinite there."""

    def low(x):
        return ((x.reshape(len(x), -1).astype(dtype) * dtype(scale)) @ WEIGHT.astype(dtype)) / dtype(scale)

    logits, values, gradient = attacks.loss_gradient(low, losses.cross_entropy, IMAGES, LABELS)
    assert {logits.dtype, values.dtype, gradient.dtype} == {jnp.dtype(jnp.float32)}
    np.testing.assert_array_equal(values, losses.cross_entropy(low(IMAGES).astype(jnp.float32), LABELS))
    assert np.isfinite(gradient).all()
    for norm, threat in THREATS.items():
        shown = pgd(low, KEYS, IMAGES, LABELS, threat=threat)
        assert shown.dtype == jnp.float32
        assert threat.distance(shown, IMAGES).max() <= threat.epsilon + 1e-6, norm


@pytest.mark.slow
def test_a_loss_that_is_nan_never_wins():
    """Neither among the steps of a search nor among restarts, and it moves nothing."""
    highest = losses.cross_entropy(model(0, 1.0, IMAGES), LABELS) + 0.3

    def loss(logits, labels):
        value = losses.cross_entropy(logits, labels)
        return jnp.where(value > highest, jnp.nan, value)

    fn = partial(model, 0, 1.0)
    state, _ = autopgd.search(fn, IMAGES, IMAGES, LABELS, threat=ThreatModel(0.1), steps=6, loss=loss)
    assert np.isnan(state.loss).any() or np.isinf(state.loss).any(), "the search never leaves the region"
    np.testing.assert_allclose(state.best_loss, losses.cross_entropy(fn(state.best), LABELS), rtol=1e-5)
    assert (state.best_loss <= highest).all()
    _, values, gradient = attacks.loss_gradient(fn, lambda z, y: jnp.nan * z[:, 0], IMAGES, LABELS)
    assert (values == -jnp.inf).all()
    assert not gradient.any()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_logits_that_are_not_finite_are_no_result(value):
    def broken(x):
        return (x.reshape(len(x), -1) @ WEIGHT).at[1, 2].set(value)

    with pytest.raises(InputError, match=r"logits are not finite for 1 of 3 images \(clean\)"):
        autoattack(broken, KEYS, IMAGES, LABELS, threat=THREATS["linf"], version="apgd_ce", steps=1)


# ---------------------------------------------------------------- images outside of the bounds


def only_outside(x, *keys):
    """Class 0, but class 1 of images with a pixel outside of the bounds; no gradient leads there."""
    outside = ((x < 0) | (x > 1)).any((1, 2, 3))
    return jnp.stack([jnp.full(len(x), 0.5), jnp.where(outside, 1.0, 0.0), *[jnp.zeros(len(x))] * 2], 1)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "norm"), ATTACKS)
def test_no_attack_returns_an_image_outside_of_the_bounds(name, norm):
    """Not even a start, which may lie outside where pixels are 0 or 1."""
    images, labels = jnp.round(IMAGES), jnp.zeros(3, int)
    attack = partial(ROWS[name][1], only_outside, threat=THREATS[norm])
    shown = np.asarray(jax.jit(attack)(KEYS, images, labels))
    assert shown.min() >= 0
    assert shown.max() <= 1
