"""One radius per image: the threat model, and every attack, where the radii of a batch differ."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import robal_jax
from robal_jax import attacks
from robal_jax.attacks import STARTS, ThreatModel, autoattack, pgd, starting_points

NORMS = ("linf", "l2")
each_norm = pytest.mark.parametrize("norm", NORMS)
SHAPE = (6, 6, 2)
RADII = (0.05, 0.1, 0.2)
# x + e is rounded once to float32; in L2 a vector of 72 such roundings.
ROUNDING = {"linf": 2.0**-23, "l2": 2.0**-20}


def linear_model(classes=3):
    weight = jnp.asarray(np.random.RandomState(0).randn(int(np.prod(SHAPE)), classes) / 8, jnp.float32)
    return lambda images: images.reshape(len(images), -1) @ weight


def batch(count=9, seed=0):
    """Images far from the bounds with labels of three classes, and one key per image."""
    rng = np.random.RandomState(seed)
    images = jnp.asarray(rng.uniform(0.3, 0.7, (count, *SHAPE)), jnp.float32)
    return jax.random.split(jax.random.key(seed), count), images, jnp.arange(count) % 3


def lengths(norm, found, images):
    return np.asarray(ThreatModel(1.0, norm).distance(found, images))


@pytest.mark.slow
@each_norm
def test_projection_of_each_image_is_that_with_its_own_radius(norm):
    _, images, labels = batch()
    candidates = images + jax.random.normal(jax.random.key(1), images.shape)
    found = ThreatModel(RADII, norm).of(labels).project(candidates, images)
    for k, radius in enumerate(RADII):
        alone = ThreatModel(radius, norm).project(candidates, images)
        np.testing.assert_array_equal(found[k::3], alone[k::3])


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", STARTS)
def test_start_of_each_image_is_that_with_its_own_radius(name, norm):
    keys, images, labels = batch()
    found = starting_points(STARTS[name], keys, images, ThreatModel(RADII, norm).of(labels))
    for k, radius in enumerate(RADII):
        alone = starting_points(STARTS[name], keys, images, ThreatModel(radius, norm))
        np.testing.assert_allclose(found[k::3], alone[k::3], atol=1e-7)


@each_norm
def test_radius_0_leaves_the_image_and_gives_no_nan(norm):
    keys, images, labels = batch()
    radii = jnp.asarray([0.0, 0.1, 0.2])[labels]
    attack = partial(pgd, linear_model(), keys, images, labels, steps=3)
    found = attack(threat=ThreatModel(radii, norm), step_size=radii / 4)
    np.testing.assert_array_equal(found[::3], images[::3])
    assert (lengths(norm, found, images)[1::3] > 0.05).all()


@each_norm
def test_steps_and_radii_of_a_batch_are_traced_and_each_image_s_own(norm):
    keys, images, labels = batch()
    traces = []

    @jax.jit
    def attacked(radii, steps):
        traces.append(1)
        return pgd(
            linear_model(), keys, images, labels, threat=ThreatModel(radii, norm), steps=4, step_size=steps
        )

    radii = jnp.asarray(RADII)[labels]
    found = attacked(radii, radii / 3)
    for k, radius in enumerate(RADII):
        alone = attacked(jnp.full_like(radii, radius), jnp.full_like(radii, radius) / 3)
        np.testing.assert_array_equal(found[k::3], alone[k::3])
        number = pgd(
            linear_model(), keys, images, labels,
            threat=ThreatModel(radius, norm), steps=4, step_size=radius / 3,
        )  # fmt: skip
        np.testing.assert_allclose(found[k::3], number[k::3], atol=1e-6)
    assert len(traces) == 1


WRONG = [  # radii, message
    ((0.1, 0.0), r"epsilon has the entry 0; each must be finite and > 0"),
    ((0.1, float("nan")), r"epsilon has the entry nan; each must be finite and > 0"),
    ((), r"the shape of epsilon is \[0\]; it must be \[K\], one number per class"),
    ((0.1, "0.2"), r"epsilon is .*; it must be \[K\], one number per class"),
    (np.array([0.1, -0.1]), r"epsilon has the entry -0.1; each must be finite and >= 0"),
    (np.ones((2, 2)), r"the shape of epsilon is \[2, 2\]; it must be \[K\], one number per image"),
]


@pytest.mark.parametrize(("epsilon", "message"), WRONG)
def test_wrong_radii(epsilon, message):
    with pytest.raises(ValueError, match=message):
        ThreatModel(epsilon)


WRONG_FOR_A_BATCH = [
    ((0.1, 0.2), r"labels are in 0..2; with 2 radii they must be in 0..1"),
    (np.array([0.1, 0.2, 0.3]), r"the shape of epsilon is \[3\]; it must be \[9\], one number per image"),
    (
        (0.1, 0.2, 8.0),
        r"epsilon is 8, and the pixels are in \[0, 1\]; use the images' unit: did you mean 8/255",
    ),
]


@pytest.mark.parametrize(("epsilon", "message"), WRONG_FOR_A_BATCH)
def test_radii_that_do_not_fit_the_batch(epsilon, message):
    with pytest.raises(ValueError, match=message):
        pgd(linear_model(), *batch(), threat=ThreatModel(epsilon), steps=1, step_size=0.1)


def test_radii_of_classes_are_not_those_of_images():
    _, images, _ = batch()
    with pytest.raises(ValueError, match=r"one radius per class; use threat.of\(labels\)"):
        ThreatModel(RADII).project(images, images)


# ---------------------------------------------------------------- every attack


def curved_model(images):
    """Four classes whose logits are no linear function, so that searches take several steps."""
    weight = jnp.asarray(np.random.RandomState(3).randn(int(np.prod(SHAPE)), 4), jnp.float32)
    score = (images.reshape(len(images), -1) - 0.5) @ weight
    return jnp.tanh(score) + 0.1 * score


ATTACKS = {
    "apgd": partial(attacks.apgd, steps=6),
    "apgd, dlr": partial(attacks.apgd, steps=6, loss=attacks.dlr),
    "apgd, targeted": partial(attacks.targeted_apgd, steps=6),
    "square": partial(attacks.square, queries=40),
}
RADIUS = {"linf": 0.01, "l2": 0.08}
FACTORS = np.array([0.5, 1.0, 1.5, 2.0])
NAMES = ["apgd_ce", "fab", "apgd_t", "square"]


@pytest.mark.slow
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", ATTACKS)
def test_attacks_take_each_image_s_own_radius(name, norm):
    """Equal radii are one radius; an image's result does not depend on the radii of others."""
    keys, images, _ = batch(12)
    labels = curved_model(images).argmax(-1)
    attack = partial(ATTACKS[name], curved_model, keys, images, labels)
    attacked = jax.jit(lambda radii: attack(threat=ThreatModel(radii, norm)))
    radii = jnp.asarray(RADIUS[norm] * FACTORS, jnp.float32)[labels]
    own = attacked(radii)
    assert (lengths(norm, own, images) <= radii + ROUNDING[norm]).all()
    assert (lengths(norm, own, images) > radii / 2).any()
    for factor in FACTORS:
        members = np.isclose(radii, RADIUS[norm] * factor)
        alone = attacked(jnp.full_like(radii, RADIUS[norm] * factor))
        np.testing.assert_array_equal(own[members], alone[members])
    number = jax.jit(partial(attack, threat=ThreatModel(RADIUS[norm], norm)))()
    same = attacked(jnp.full_like(radii, RADIUS[norm]))
    np.testing.assert_array_equal(*(curved_model(x).argmax(-1) for x in (number, same)))


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize("norm", NORMS)
def test_autoattack_with_equal_radii_is_autoattack_with_one(norm):
    keys, images, _ = batch(24)
    labels = curved_model(images).argmax(-1)
    run = partial(robal_jax.autoattack, curved_model, keys, images, labels, batch_size=9, steps=5, queries=30)
    one = run(threat=ThreatModel(RADIUS[norm], norm), version=NAMES)
    same = run(threat=ThreatModel((RADIUS[norm],) * 4, norm), version=NAMES)
    own = run(threat=ThreatModel(tuple(RADIUS[norm] * FACTORS), norm), version=NAMES)
    assert list(one.robust) == list(same.robust) == ["clean", *NAMES]
    for name, right in one.robust.items():
        np.testing.assert_array_equal(same.robust[name], right, err_msg=name)
    np.testing.assert_array_equal(same.predictions, one.predictions)
    assert 0 < one.robust["square"].mean() < 1
    assert (own.robust["square"] != one.robust["square"]).any()
    allowed = RADIUS[norm] * FACTORS[labels] + ROUNDING[norm]
    assert (lengths(norm, own.images, images) <= allowed).all()


@pytest.mark.slow
def test_fab_counts_within_the_image_s_own_radius():
    """FAB finds the nearest misclassified image of all; the ensemble takes those within each radius."""
    keys, images, labels = batch()
    logits_fn = linear_model()
    labels = logits_fn(images).argmax(-1)
    found = attacks.fab(logits_fn, None, images, labels, threat=ThreatModel(0.1), rank=2, n_iter=5)
    nearest = lengths("linf", found, images)
    broken = logits_fn(found).argmax(-1) != labels
    radii = np.array([np.median(nearest[np.asarray(labels) == k]) if k in labels else 0.1 for k in range(3)])
    (stage,) = autoattack.stages("fab_t", 3, threat=ThreatModel(tuple(radii.tolist())), steps=5)
    kept = stage.attack(logits_fn, keys, images, labels, jnp.int32(0))
    moved = lengths("linf", kept, images) > 0
    np.testing.assert_array_equal(moved, broken & (nearest <= np.float32(radii)[labels]))
    assert 0 < moved.mean() < 1


def test_ensembles_refuse_radii_that_do_not_fit():
    keys, images, labels = batch()
    run = partial(robal_jax.autoattack, linear_model(), keys, images, labels, version="apgd_ce", steps=2)
    with pytest.raises(
        ValueError, match=r"the shape of epsilon is \[4\]; it must be \[3\], one number per class"
    ):
        run(threat=ThreatModel((0.1, 0.1, 0.1, 0.1)))
    with pytest.raises(ValueError, match="one radius, or one per class; pass a tuple of 3 radii as epsilon"):
        run(threat=ThreatModel(np.full(9, 0.1)))
