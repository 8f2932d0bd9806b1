"""One radius per image: the threat model, and every attack, where the radii of a batch differ."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from robal_jax.attacks import STARTS, ThreatModel, pgd, starting_points

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
