"""Every attack refuses what it cannot attack with one message, and takes the rest inside jit too."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import robal_jax
from robal_jax import attacks, checks, models
from robal_jax.attacks import ThreatModel

CLASSES = 4
WEIGHT = jnp.asarray(np.random.RandomState(0).randn(4, CLASSES), jnp.float32)
KEY, IMAGES = jax.random.key(0), jnp.linspace(0, 1, 12).reshape(3, 2, 2, 1)
LABELS = jnp.array([0, 3, 2])
THREAT, L2 = ThreatModel(0.1), ThreatModel(0.1, "l2")
PGD = partial(attacks.pgd, threat=THREAT, steps=2, step_size=0.05)


def logits_fn(x):
    return x.reshape(len(x), -1) @ WEIGHT


def random(model):
    return lambda x, keys: model(x)


def path(model, key, images, labels, **settings):
    settings = {"steps": (1, 2), "start": images, "step_size": 0.05} | settings
    return attacks.pgd_path(model, images=images, labels=labels, threat=THREAT, **settings)[0]


def against_random(attack):
    return lambda model, *arguments, **settings: attack(random(model), *arguments, eot=2, **settings)


def shortest(*arguments, **settings):
    settings = {"attack": PGD, "threat": THREAT, "max_epsilon": 0.2} | settings
    return attacks.shortest_adversarial(*arguments, **settings)[0]


def ensemble(*arguments, **settings):
    return robal_jax.autoattack(
        *arguments, **{"threat": THREAT, "version": "apgd_ce", "steps": 2} | settings
    )[0]


APGD = partial(attacks.apgd, threat=THREAT, steps=2)
ATTACKS = {
    "pgd": PGD,
    "cw": partial(PGD, loss=attacks.negative_margin),
    "restarts": partial(PGD, restarts=2),
    "eot": against_random(partial(PGD, restarts=2)),
    "pgd_path": path,
    "multi_targeted": partial(attacks.multi_targeted, attack=PGD),
    "shortest_adversarial": shortest,
    "apgd": APGD,
    "apgd, dlr": partial(APGD, loss=attacks.dlr),
    "apgd, eot": against_random(APGD),
    "targeted_apgd": partial(attacks.targeted_apgd, threat=THREAT, steps=2),
    "malt_apgd": partial(attacks.malt_apgd, threat=THREAT, candidates=2, steps=2),
    "pma": partial(attacks.pma, threat=THREAT, steps=2),
    "fab": partial(attacks.fab, threat=THREAT, n_iter=2),
    "fab, targeted": partial(attacks.fab, threat=THREAT, n_iter=2, rank=2),
    "square": partial(attacks.square, threat=THREAT, queries=2),
    "fmn": lambda *arguments, **settings: attacks.fmn(*arguments, **{"threat": THREAT} | settings)[0],
    "ddn": lambda *arguments, **settings: attacks.ddn(*arguments, **{"threat": L2} | settings)[0],
    "autoattack": ensemble,
    "autoattack, rand": lambda model, *rest: ensemble(random(model), *rest, version="rand"),
}
COMPILED = {name: attack for name, attack in ATTACKS.items() if not name.startswith("autoattack")}
"""Those that a program of the user can contain; the ensemble is a loop of programs."""

WITHOUT_KEYS = ("pgd_path", "fab", "fab, targeted", "fmn", "ddn")

SHAPES_AND_TYPES = {  # images, labels, message
    "labels in a column": (IMAGES, LABELS[:, None], r"labels have shape \[3, 1\], .* pass labels\[:, 0\]"),
    "one-hot labels": (IMAGES, jax.nn.one_hot(LABELS, 4, dtype=int), r"shape \[3, 4\], .* one-hot"),
    "float labels": (IMAGES, LABELS.astype(float), "labels have dtype float32; they must be integers"),
    "too few labels": (IMAGES, LABELS[:2], r"labels have shape \[2\]; they must be \[3\]"),
    "no labels": (IMAGES, LABELS[:0], r"labels have shape \[0\]; they must be \[3\]"),
    "bytes": (jnp.zeros(IMAGES.shape, jnp.uint8), LABELS, "images have dtype uint8; they must be floats"),
    "float16": (IMAGES.astype(jnp.float16), LABELS, r"dtype float16, .*; use images\.astype\('float32'\)"),
    "bfloat16": (IMAGES.astype(jnp.bfloat16), LABELS, "images have dtype bfloat16, whose rounding leaves"),
    "no images": (IMAGES[:0], LABELS[:0], "images have shape .* with B at least 1"),
    "one number per image": (IMAGES[:, 0, 0, 0], LABELS, "images have shape .*; they must be"),
}
VALUES = {
    "0..255": (
        255 * IMAGES,
        LABELS,
        r"images have pixels in \[0, 255\]; they must be finite and in \[0, 1\]",
    ),
    "-1..1": (2 * IMAGES - 1, LABELS, r"images have pixels in \[-1, 1\]"),
    "a little above": (IMAGES * (1 + 2e-7), LABELS, r"images have pixels in \[0, 1\.000000\d\]"),
    "NaN": (IMAGES.at[1, 0, 0].set(jnp.nan), LABELS, r"images have pixels in \[nan, nan\]"),
    "infinity": (IMAGES.at[1, 0, 0].set(jnp.inf), LABELS, r"images have pixels in \[0, inf\]"),
    "a class too many": (IMAGES, LABELS + 1, r"labels are in 1\.\.4; with 4 logits they must be in 0\.\.3"),
    "a negative label": (IMAGES, LABELS - 1, r"labels are in -1\.\.2"),
}
MODELS = {
    "one axis": (lambda x: logits_fn(x)[:, 0], r"logits_fn returns float32\[[23]\]"),
    "three axes": (lambda x: logits_fn(x)[None], r"logits_fn returns float32\[1, [23], 4\]"),
    "one class": (lambda x: logits_fn(x)[:, :1], r"returns float32\[[23], 1\] .* K >= 2"),
    "one logit for all": (lambda x: logits_fn(x)[:1], r"logits_fn returns float32\[1, 4\] for [23] images"),
    "integers": (lambda x: logits_fn(x).astype(int), r"logits_fn returns int32\[[23], 4\]"),
    "nothing": (lambda x: None, "logits_fn returns a NoneType; it must return one array"),
    "a list": (lambda x: [logits_fn(x)], "logits_fn returns a list; it must return one array"),
    "a tuple": (lambda x: (logits_fn(x), x), "logits_fn returns a tuple; it must return one array"),
    "a dict": (lambda x: {"logits": logits_fn(x)}, "logits_fn returns a dict; it must return one array"),
}


@pytest.mark.parametrize("trouble", SHAPES_AND_TYPES | VALUES)
@pytest.mark.parametrize("name", ATTACKS)
def test_images_and_labels_that_cannot_be_attacked(name, trouble):
    images, labels, message = (SHAPES_AND_TYPES | VALUES)[trouble]
    with pytest.raises(ValueError, match=message):
        ATTACKS[name](logits_fn, KEY, images, labels)


@pytest.mark.parametrize("trouble", SHAPES_AND_TYPES)
@pytest.mark.parametrize("name", COMPILED)
def test_shapes_and_types_are_checked_inside_jit(name, trouble):
    images, labels, message = SHAPES_AND_TYPES[trouble]
    with pytest.raises(ValueError, match=message):
        jax.jit(partial(COMPILED[name], logits_fn)).lower(KEY, images, labels)


@pytest.mark.parametrize("trouble", MODELS)
@pytest.mark.parametrize("name", ATTACKS)
def test_models_that_cannot_be_attacked(name, trouble):
    model, message = MODELS[trouble]
    with pytest.raises(ValueError, match=message):
        ATTACKS[name](model, KEY, IMAGES, LABELS)


@pytest.mark.parametrize("name", [name for name in ATTACKS if name not in WITHOUT_KEYS])
def test_keys_of_other_images(name):
    with pytest.raises(ValueError, match=r"key has shape .*; give one key, or one key per image, \[3\]"):
        ATTACKS[name](logits_fn, jax.random.split(KEY, 2), IMAGES, LABELS)


@pytest.mark.parametrize("name", [name for name in ATTACKS if name not in WITHOUT_KEYS])
@pytest.mark.parametrize("key", [0, np.float32(1), np.zeros((3, 2))])
def test_what_is_no_key(name, key):
    with pytest.raises(ValueError, match=r"key has dtype \w+; make one by jax\.random\.key\(0\)"):
        ATTACKS[name](logits_fn, key, IMAGES, LABELS)


@pytest.mark.slow
@pytest.mark.parametrize("name", ATTACKS)
def test_numpy_arrays_of_any_width_are_attacked(name):
    images, labels = np.asarray(IMAGES, np.float64), np.asarray(LABELS, np.int64)
    found = ATTACKS[name](logits_fn, KEY, images, labels)
    assert found.shape == images.shape
    assert np.isfinite(found).all()


@pytest.mark.slow
@pytest.mark.parametrize("name", COMPILED)
def test_attacks_are_traced_with_arguments_and_with_constants(name):
    attack = partial(COMPILED[name], logits_fn)
    traced = partial(jax.eval_shape, lambda images, labels: attack(KEY, images, labels))
    constants = partial(jax.eval_shape, lambda: attack(KEY, IMAGES, LABELS))
    mapped = partial(jax.eval_shape, jax.vmap(lambda images: attack(KEY, images, LABELS)))
    found = traced(IMAGES, LABELS), constants(), mapped(IMAGES[None])
    assert [array.shape for array in found] == [IMAGES.shape, IMAGES.shape, (1, *IMAGES.shape)]


def test_checks_leave_nothing_in_a_program():
    def check(images, labels, logits, steps):
        checks.images_and_labels(images, labels, 0.0, 1.0)
        checks.logits_and_labels(checks.logits_of(3, logits), labels)
        checks.same_shape(images, start=images)
        checks.at_least(1, steps=steps)
        checks.rank(steps, 4)

    assert jax.make_jaxpr(check)(IMAGES, LABELS, logits_fn(IMAGES), 0).eqns == []


def test_bounds_are_those_of_the_images_type():
    """0.6 is rounded up: such pixels lie within the bounds as the attacks clip them."""
    images = jnp.full((1, 2, 2, 1), 0.6)
    assert float(images[0, 0, 0, 0]) > 0.6
    checks.images_and_labels(images, jnp.array([0]), 0.3, 0.6)
    with pytest.raises(ValueError, match="images have pixels in"):
        checks.images_and_labels(images * 1.01, jnp.array([0]), 0.3, 0.6)


SETTINGS = [  # attack, settings, message
    ("pgd", {"steps": 0}, "steps is 0; it must be at least 1"),
    ("pgd", {"steps": jnp.int32(0)}, "steps is 0; it must be at least 1"),
    ("pgd", {"restarts": 0}, "restarts is 0; it must be at least 1"),
    ("pgd", {"step_size": 0.0}, "step_size is 0; it must be finite and > 0"),
    ("pgd", {"step_size": np.nan}, "step_size is nan; it must be finite and > 0"),
    ("pgd_path", {"step_size": -np.inf}, "step_size is -inf; it must be finite and > 0"),
    ("pgd", {"loss": lambda z, y: z.sum()}, r"loss returns float32\[\] for 3 images; .* per image, \[3\]"),
    ("apgd", {"loss": lambda z, y: z[:, :1]}, r"loss returns float32\[3, 1\] for 3 images"),
    ("apgd", {"loss": lambda z, y: y}, r"loss returns int32\[3\] for 3 images"),
    ("pgd", {"eot": -1}, "eot is -1; it must be at least 0"),
    ("pgd_path", {"steps": (0, 1)}, "steps is 0; it must be at least 1"),
    ("pgd_path", {"steps": (3, 1)}, r"steps are \[3, 1\]; give them in increasing order"),
    ("pgd_path", {"start": IMAGES[:1]}, r"start has shape \[1, 2, 2, 1\]; .* \[3, 2, 2, 1\]"),
    ("multi_targeted", {"targets": 0}, "targets is 0; it must be at least 1"),
    ("shortest_adversarial", {"search_steps": -1}, "search_steps is -1; it must be at least 0"),
    ("shortest_adversarial", {"max_epsilon": np.inf}, "max_epsilon is inf; it must be finite and > 0"),
    ("apgd", {"steps": 0}, "steps is 0; it must be at least 1"),
    ("targeted_apgd", {"rank": 1}, r"rank is 1; with 4 classes it must be in 2\.\.4"),
    ("targeted_apgd", {"rank": 5}, r"rank is 5; with 4 classes it must be in 2\.\.4"),
    ("fab", {"n_iter": 0}, "n_iter is 0; it must be at least 1"),
    ("fab", {"rank": jnp.int32(1)}, r"rank is 1; with 4 classes it must be in 2\.\.4"),
    ("fab", {"start": IMAGES[:1]}, r"start has shape \[1, 2, 2, 1\]; .* \[3, 2, 2, 1\]"),
    ("fmn", {"n_iter": 0}, "n_iter is 0; it must be at least 1"),
    ("fmn", {"gamma": 1.0}, r"gamma is 1; it must be in \[0, 1\)"),
    ("fmn", {"threat": 0.1}, "threat is a float; pass robal_jax.ThreatModel"),
    ("ddn", {"step_size": 0.0}, "step_size is 0; it must be finite and > 0"),
    ("ddn", {"init_norm": np.inf}, "init_norm is inf; it must be finite and > 0"),
    ("ddn", {"threat": THREAT}, "'ddn' is for L2, and the norm is L-infinity; use fmn"),
    ("square", {"queries": -1}, "queries is -1; it must be at least 1"),
    ("autoattack", {"steps": 0}, "steps is 0; it must be at least 1"),
    ("autoattack", {"queries": -1}, "queries is -1; it must be at least 1"),
    ("autoattack", {"batch_size": 0}, "batch_size is 0; it must be at least 1"),
    ("pgd", {"steps": 2.5}, "steps is 2.5; it must be an integer"),
    ("pgd", {"steps": "2"}, "steps is '2'; it must be an integer"),
    ("pgd", {"restarts": True}, "restarts is True; it must be an integer"),
    ("pgd", {"step_size": "0.1"}, "step_size is '0.1'; it must be a number"),
    ("pgd", {"step_size": [0.1, 0.2]}, r"step_size is \[0.1, 0.2\]; it must be a number"),
    ("pgd", {"step_size": 1e39}, "step_size is 1e[+]39; it must be in .*, the range of float32"),
    ("pgd", {"momentum": np.nan}, "momentum is nan; it must be finite and >= 0"),
    ("pgd", {"threat": 0.1}, "threat is a float; pass robal_jax.ThreatModel"),
    ("square", {"threat": "8/255"}, "threat is a str; pass robal_jax.ThreatModel"),
    ("multi_targeted", {"targets": 4}, r"targets is 4; with 4 classes it must be in 1\.\.3"),
    ("multi_targeted", {"targets": 2.5}, "targets is 2.5; it must be an integer"),
    ("apgd", {"rho": np.nan}, "rho is nan; it must be finite and >= 0"),
    ("fab", {"beta": -1.0}, "beta is -1; it must be finite and >= 0"),
    ("square", {"queries": 0}, "queries is 0; it must be at least 1"),
    ("autoattack", {"queries": 2.5}, "queries is 2.5; it must be an integer"),
    ("autoattack", {"version": None}, "unknown ensemble None; use 'none', one of"),
    ("autoattack", {"version": []}, "unknown ensemble ''"),
    ("autoattack", {"version": ["apgd_ce", "apgd_ce"]}, "unknown ensemble 'apgd_ce,apgd_ce'"),
    ("autoattack", {"version": ["apgd_ce", 1]}, r"unknown ensemble \['apgd_ce', 1\]"),
]


@pytest.mark.parametrize(("name", "settings", "message"), SETTINGS)
def test_settings_out_of_range(name, settings, message):
    with pytest.raises(ValueError, match=message):
        ATTACKS[name](logits_fn, KEY, IMAGES, LABELS, **settings)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        *[
            ((epsilon,), "epsilon is .*; it must be finite and > 0")
            for epsilon in (0.0, -0.1, np.nan, np.inf)
        ],
        ((0.1, "l0"), "unknown norm 'l0'; use one of linf, l2, l1"),
        ((0.1, "linf", 1.0, 1.0), r"the bounds are \[1.0, 1.0\]; use finite ones, lower < upper"),
        ((0.1, "linf", -np.inf), r"the bounds are \[-inf, 1.0\]"),
        ((0.1, "l2", 0.0, np.nan), r"the bounds are \[0.0, nan\]"),
        *[
            ((epsilon,), "epsilon is .*; it must be a number")
            for epsilon in ("8/255", None, True, [0.1], {}, 1j)
        ],
        ((1e-50,), "epsilon is 1e-50; it must be in .*, the range of float32"),
        ((0.1, ["linf"]), r"unknown norm \['linf'\]"),
        ((0.1, "linf", "0"), "lower is '0'; it must be a number"),
        ((0.1, "linf", 0.0, np.ones(2)), "upper is .*; it must be a number"),
    ],
)
def test_threat_models_out_of_range(arguments, message):
    with pytest.raises(ValueError, match=message):
        ThreatModel(*arguments)


@pytest.mark.parametrize("epsilon", [np.float32(0.25), np.float64(0.25), jnp.float32(0.25), np.array(0.25)])
def test_any_number_is_a_radius(epsilon):
    assert str(ThreatModel(epsilon)) == str(ThreatModel(0.25))
    assert hash(ThreatModel(epsilon)) == hash(ThreatModel(0.25))


def test_the_first_image_out_of_bounds_is_named():
    images = IMAGES.at[1, 0, 0].set(jnp.nan).at[2].set(jnp.inf)
    with pytest.raises(ValueError, match=r"\(image 1 is the first of 2 that are not\)"):
        THREAT.check(images, LABELS)


@pytest.mark.parametrize("name", ["autoattack", "square"])
@pytest.mark.parametrize("shape", [(3, 2, 2), (3, 4), (3, 2, 2, 1, 1)])
def test_images_without_channels(name, shape):
    with pytest.raises(
        ValueError, match=r"images have shape .*; they must be \[n, H, W, C\]: .*\[\.\.\., None\]"
    ):
        ATTACKS[name](logits_fn, KEY, IMAGES.reshape(shape), LABELS)


@pytest.mark.slow
@pytest.mark.parametrize("version", [["apgd_ce", "square"], ("apgd_ce", "square")])
def test_an_ensemble_is_a_list_too(version):
    given = {"threat": THREAT, "steps": 2, "queries": 2}
    found = robal_jax.autoattack(logits_fn, KEY, IMAGES, LABELS, version=version, **given)
    same = robal_jax.autoattack(logits_fn, KEY, IMAGES, LABELS, version="apgd_ce,square", **given)
    np.testing.assert_array_equal(found.images, same.images)
    assert list(found.robust) == ["clean", "apgd_ce", "square"]


NO_MODELS = {  # what is no function from images to logits, and what is said of it
    "None": (None, "logits_fn is a NoneType; pass a function of any number of images"),
    "a name": ("resnet18", "logits_fn is a str; pass a function"),
    "weights": (WEIGHT, "logits_fn is a ArrayImpl; pass a function"),
    "a flax module": (
        models.SmallCNN(),
        r"logits_fn fails for 2 images .*lambda images: model\.apply\(variables",
    ),
    "two arguments": (
        lambda x, train: logits_fn(x),
        "fails for .* missing 1 .* 'train'.*and of nothing else",
    ),
    "no argument": (lambda: 0, "fails for 2 images .*; pass a function of any number of images"),
    "a fixed batch": (
        lambda x: x.reshape(100, 4) @ WEIGHT,
        r"into shape \(100, 4\).*any number of images \[B, 2, 2",
    ),
    "another size": (lambda x: x.reshape(len(x), -1) @ WEIGHT[1:], "fails for 2 images"),
    "a bug": (lambda x: x / (1 // 0), r"fails for 2 images \(ZeroDivisionError"),
    "numpy": (np.exp, "needs the values .* jax.numpy, not numpy"),
    "a branch": (lambda x: logits_fn(x) if x.max() > 0 else 0, "needs the values .* without branches"),
    "an index": (lambda x: [1, 2][x[0, 0, 0, 0].astype(int)], "needs the values"),
}


@pytest.mark.parametrize("trouble", NO_MODELS)
def test_what_is_no_model(trouble):
    model, message = NO_MODELS[trouble]
    with pytest.raises(ValueError, match=message) as raised:
        ensemble(model, KEY, IMAGES, LABELS)
    assert len(str(raised.value).splitlines()) == 1


def test_a_random_model_takes_keys():
    with pytest.raises(
        ValueError, match=r"fails for 3 images .* and of their keys \[B\], such as lambda images, keys"
    ):
        ensemble(logits_fn, KEY, IMAGES, LABELS, version="rand")


@pytest.mark.parametrize("scale", [0.0, -1.0, np.nan, np.inf, 1e37, 1e-37])
def test_factors_of_logits_out_of_range(scale):
    with pytest.raises(ValueError, match=r"scale is .*; it must be in 1e-06\.\.1e\+06"):
        attacks.scaled(logits_fn, scale)
    assert jax.jit(lambda scale: attacks.scaled(logits_fn, scale)(IMAGES))(scale).shape == (3, 4)


LOSSES = {
    "margin": attacks.margin,
    "negative_margin": attacks.negative_margin,
    "dlr": attacks.dlr,
    "probability_margin": attacks.probability_margin,
    "targeted_margin": partial(attacks.targeted_margin, targets=LABELS),
    "targeted_dlr": partial(attacks.targeted_dlr, targets=LABELS),
}
LOGITS = jnp.eye(3, CLASSES)


@pytest.mark.parametrize(
    "trouble", ["labels in a column", "one-hot labels", "float labels", "too few labels"]
)
@pytest.mark.parametrize("name", LOSSES)
def test_labels_that_are_no_labels(name, trouble):
    _, labels, message = SHAPES_AND_TYPES[trouble]
    for loss in LOSSES[name], jax.jit(LOSSES[name]):
        with pytest.raises(ValueError, match=message):
            loss(LOGITS, labels)
    if name.startswith("targeted"):
        with pytest.raises(ValueError, match=message.replace("labels", "targets")):
            LOSSES[name](LOGITS, LABELS, targets=labels)


@pytest.mark.parametrize("name", LOSSES | COMPILED)
def test_labels_in_a_list(name):
    with pytest.raises(ValueError, match=r"labels are a list; pass jnp\.asarray\(labels\)"):
        if name in LOSSES:
            LOSSES[name](LOGITS, LABELS.tolist())
        else:
            COMPILED[name](logits_fn, KEY, IMAGES, LABELS.tolist())


@pytest.mark.parametrize("name", LOSSES)
def test_logits_that_are_no_logits(name):
    for logits, message in (
        (LOGITS[0], r"logits have shape \[4\]; they must be \[B, K\]"),
        (LOGITS[None], r"logits have shape \[1, 3, 4\]"),
        (LOGITS.astype(int), "logits have dtype int32; they must be floats"),
    ):
        with pytest.raises(ValueError, match=message):
            LOSSES[name](logits, LABELS)
    with pytest.raises(ValueError, match=r"labels are in 0\.\.4; with 4 logits they must be in 0\.\.3"):
        LOSSES[name](LOGITS, LABELS.at[1].set(4))


@pytest.mark.parametrize("rank", [0, 5])
def test_ranks_that_no_class_has(rank):
    with pytest.raises(ValueError, match=rf"rank is {rank}; with 4 classes it must be in 1\.\.4"):
        attacks.ranked_class(LOGITS, rank)


def test_unknown_precision():
    with pytest.raises(
        ValueError, match="unknown precision 'fp8'; use one of default, high, highest, bfloat16"
    ):
        models.functional(models.SmallCNN(), precision="fp8")


def test_channels_first_are_refused():
    with pytest.raises(ValueError, match=r"channels last: pass images\.transpose\(0, 2, 3, 1\)"):
        checks.channels_last(np.zeros((4, 3, 32, 32)))
    for shape in ((4, 3, 3, 1), (4, 1, 8, 1), (4, 32, 32, 3), (4, 3, 8, 3)):
        checks.channels_last(np.zeros(shape))


@pytest.mark.parametrize("dtype", [">f4", ">i4", ">f8"])
def test_the_byte_order_of_another_machine(dtype):
    if np.dtype(dtype).isnative:
        dtype = dtype.replace(">", "<")
    images, labels = np.full((2, 4, 4, 1), 0.5), np.array([0, 1])
    given = (images.astype(dtype), labels) if "f" in dtype else (images, labels.astype(dtype))
    with pytest.raises(ValueError, match="byte order"):
        ThreatModel(0.1).check(*given)
