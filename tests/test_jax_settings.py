"""Neither the outcome of an image nor what a command computes depends on JAX's settings."""

import subprocess
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from robal_jax import attacks, autoattack
from robal_jax.attacks import ThreatModel
from robal_jax.devices.cpu import OWNED, own_settings
from robal_jax.keys import image_keys, key_of, numbered_keys
from robal_jax.storage.workdir import versions

SETTINGS = {
    "64 bits": {"jax_enable_x64": True},
    "rbg": {"jax_default_prng_impl": "rbg"},
    "unsafe_rbg": {"jax_default_prng_impl": "unsafe_rbg"},
    "keys split by their number": {"jax_threefry_partitionable": False},
    "ranks": {"jax_numpy_rank_promotion": "raise"},
    "types": {"jax_numpy_dtype_promotion": "strict"},
    "NaN": {"jax_debug_nans": True},
    "bfloat16": {"jax_default_matmul_precision": "bfloat16"},
}
COUNT, SIZE, CLASSES = 6, 25, 4
WEIGHT = np.random.RandomState(0).randn(SIZE, CLASSES).astype(np.float32)
IMAGES = np.random.RandomState(1).rand(COUNT, 5, 5, 1).astype(np.float32)
LABELS = np.argmax(IMAGES.reshape(COUNT, -1) @ WEIGHT, -1).astype(np.int32)
THREAT = ThreatModel(0.02)


def logits_fn(x):
    return x.reshape(len(x), SIZE) @ WEIGHT


PGD = partial(attacks.pgd, threat=THREAT, steps=2, step_size=0.01)
ATTACKS = {
    "mim": partial(PGD, momentum=1.0, restarts=2),
    "cw, l2": partial(PGD, threat=ThreatModel(0.1, "l2"), loss=attacks.negative_margin),
    "apgd": partial(attacks.apgd, threat=THREAT, steps=3, loss=attacks.dlr),
    "fab": partial(attacks.fab, threat=THREAT, n_iter=2, rank=2),
    "square": partial(attacks.square, threat=THREAT, queries=3),
    "fmn": lambda *arguments: attacks.fmn(*arguments, threat=THREAT, n_iter=3).images,
}


@pytest.fixture(params=SETTINGS)
def setting(request):
    before = {name: getattr(jax.config, name) for name in SETTINGS[request.param]}
    for name, value in SETTINGS[request.param].items():
        jax.config.update(name, value)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.mark.slow
@pytest.mark.usefixtures("setting")
def test_images_in_other_batches():
    run = jax.jit(lambda *rest: {name: attack(logits_fn, *rest) for name, attack in ATTACKS.items()})
    keys = jax.random.split(jax.random.key(0), COUNT)
    found = run(keys, IMAGES, LABELS)
    turned = run(keys[::-1], IMAGES[::-1], LABELS[::-1])
    some = run(keys[2:5], IMAGES[2:5], LABELS[2:5])
    for name, shown in found.items():
        assert shown.dtype == jnp.float32, name
        assert np.isfinite(shown).all(), name
        np.testing.assert_array_equal(turned[name][::-1], shown, name)
        np.testing.assert_array_equal(some[name], shown[2:5], name)


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.usefixtures("setting")
def test_the_ensemble_in_other_batches():
    attack = partial(autoattack, logits_fn, threat=THREAT, version="apgd_ce,square", steps=2, queries=2)
    one, other = (attack(jax.random.key(0), IMAGES, LABELS, batch_size=size) for size in (4, 6))
    np.testing.assert_array_equal(one.images, other.images)
    np.testing.assert_array_equal(one.predictions, other.predictions)


@pytest.mark.slow
@pytest.mark.usefixtures("setting")
def test_keys():
    """One key gives each image the same key in every batch, by every generator; a run's key is fixed."""
    for key in jax.random.key(1), jax.random.PRNGKey(1):
        few, many = (jax.random.key_data(image_keys(key, IMAGES[:size])) for size in (3, 6))
        np.testing.assert_array_equal(many[:3], few)
        assert len(np.unique(many, axis=0)) == 6
    assert jax.random.key_data(key_of(7)).tolist() == [0, 7]
    noise = jax.vmap(lambda key: jax.random.uniform(key, (3,)))
    keys = numbered_keys(key_of(0), np.arange(4))
    np.testing.assert_array_equal(noise(keys)[1:3], noise(keys[1:3]))
    split = jax.random.split(jax.random.key(1), 4)  # of whatever generator
    np.testing.assert_array_equal(
        noise(image_keys(split, IMAGES[:4]))[1:3], noise(image_keys(split[1:3], IMAGES[1:3]))
    )


def test_keys_of_images_are_those_of_split():
    found = image_keys(jax.random.key(3), IMAGES)
    assert (found == jax.random.split(jax.random.key(3), COUNT)).all()


# ---------------------------------------------------------------- the command line


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("JAX_THREEFRY_PARTITIONABLE", "0"),
        ("JAX_THREEFRY_PARTITIONABLE", "False"),
        ("JAX_RANDOM_SEED_OFFSET", "1"),
        ("JAX_DEFAULT_PRNG_IMPL", "rbg"),
        ("JAX_NUMPY_DTYPE_PROMOTION", "strict"),
        ("JAX_DEBUG_NANS", "yes"),
        ("JAX_DISABLE_JIT", "on"),
    ],
)
def test_a_setting_that_changes_numbers_is_ignored_with_a_word(name, value):
    environment = {name: value, "JAX_PLATFORMS": "cpu", "JAX_LOG_COMPILES": "1"}
    assert own_settings(environment) == [f"{name}={value} is ignored: results rely on JAX's defaults"]
    assert environment == {"JAX_PLATFORMS": "cpu", "JAX_LOG_COMPILES": "1"}


def test_settings_are_ignored_in_one_line_and_defaults_without_a_word():
    (warning,) = own_settings({"JAX_DEBUG_INFS": "1", "JAX_RANDOM_SEED_OFFSET": "7", "JAX_DEBUG_NANS": "0"})
    assert warning.startswith("JAX_RANDOM_SEED_OFFSET=7, JAX_DEBUG_INFS=1 are ignored: ")
    assert own_settings({name: values[0].upper() for name, values in OWNED.items()}) == []


@pytest.mark.slow
def test_the_values_without_a_word_are_the_defaults_of_jax():
    names = [name.lower() for name in OWNED]
    code = f"import jax; print(*[jax.config.values[name] for name in {names}])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env={})
    for (name, known), value in zip(OWNED.items(), found.stdout.split(), strict=True):
        assert value.lower() in (*known, "none"), name  # None: a guard that is not set


@pytest.mark.parametrize(
    ("name", "value", "words", "stored"),
    [
        ("JAX_DEFAULT_MATMUL_PRECISION", "highest", "does not concern the network; config.train.", "highest"),
        ("JAX_ENABLE_X64", "1", "numbers have 64 bits, and differ from those of 32 bits", "on"),
    ],
)
def test_a_setting_that_may_be_meant_is_said_and_stored(name, value, words, stored):
    environment = {name: value}
    (warning,) = own_settings(environment)
    assert warning.startswith(f"{name}={value}: ")
    assert words in warning
    assert environment == {name: value}
    key = {"JAX_ENABLE_X64": "x64", "JAX_DEFAULT_MATMUL_PRECISION": "matmul_precision"}[name]
    assert key not in versions()
    before = getattr(jax.config, name.lower())
    jax.config.update(name.lower(), {"1": True}.get(value, value))
    try:
        assert versions()[key] == stored
    finally:
        jax.config.update(name.lower(), before)
    assert own_settings({"JAX_ENABLE_X64": "0"}) == []
