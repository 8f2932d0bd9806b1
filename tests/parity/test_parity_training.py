"""Training steps and learning rates against the released code, float64: see parity.py.

The steps are those of the configs: only the network is smaller, and the random numbers are handed in.
"""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import ROOT
from ml_collections import ConfigDict
from parity import BACKBONE, EPSILON, FLOAT32, STEP, checksums, imported, nchw, nhwc

from robal_jax import (
    attacks,
    builder,
    classifiers,
    cli,
    models,
    objectives,
    optimizers,
    pytorch,
    training,
)
from robal_jax.attacks import projected_gradient, threat
from robal_jax.data import long_tailed_counts
from robal_jax.keys import image_keys
from robal_jax.training import TrainState

pytestmark = [pytest.mark.parity, pytest.mark.slow, pytest.mark.usefixtures("float64")]

FILE = "train_step_f64"
STEPS, BATCH = 3, 8
MODES = {  # the config that is this mode, and what to change in it
    "plain": ("plain", {}),
    "pgd_at": ("at", {}),
    "pgd_at_gauss": ("at", {"attack": {"start": "gaussian"}}),
    "pgd_at_drw_dm": ("deferred", {}),
    "pgd_at_CB": ("rw", {}),
    "pgd_at_LDAM": ("ldam", {}),
    "pgd_at_cos_HE": ("he", {}),
    "pgd_at_LA_dot": ("la", {}),
    "pgd_at_TDESim": ("tde", {}),
    "pgd_at_lws": ("lws", {}),
    "robal_N": ("robal_n", {}),
    "robal_R": ("robal_r", {}),
    "reg_ALP": ("alp", {}),
    "reg_ALP_2": ("alp", {"objective": {"regulariser": "alp_logits"}}),
    "reg_norm": ("alp", {"objective": {"regulariser": "norm"}}),
    "trades_b6": ("trades", {"attack": {"steps": 5}}),
    "AVmix": ("avmixup", {}),
    "inner_loss": ("ldam", {"attack": {"loss": {"name": "logit_adjustment", "tau": 1.0}}}),
}
EPOCHS = {"pgd_at_drw_dm": 40}  # what is deferred starts there; all others do not depend on the epoch


def load_config(name, changes):
    config = cli.load_config(f"{ROOT}/configs/{name}.py:cifar10_lt")
    with config.unlocked():
        config.model = ConfigDict({"name": "wide_resnet", "depth": 10, "widen": 1})
        config.update(changes)
    return config


def class_counts(config):
    return long_tailed_counts(5000, 10, config.data.ratio, config.data.profile)


def batch_of(reference, recipe, mode, i):
    """The batch of step ``i``; in the place of keys the numbers that are drawn from them."""
    drawn = str(reference("train_step", "input/noise_and_alpha_recipe"))
    seeds = {what: int(seed) + i for what, seed in re.findall(r"(\w+) = recipe\.\w+\((\d+)\+i", drawn)}
    x = nhwc(reference("train_step", f"input/x{i}"))
    shape = (BATCH, 3, 32, 32)
    noise = {"uniform": recipe.uniform(seeds["rand"], shape), "normal": recipe.normal(seeds["randn"], shape)}
    keys = {name: nhwc(array) for name, array in noise.items()}
    keys["alpha"] = jnp.asarray(recipe.uniform(seeds["alpha"], (BATCH, 1, 1, 1)).reshape(-1), float)
    return objectives.Batch(x, jnp.asarray(reference(FILE, f"input/y{i}")), keys, EPOCHS.get(mode, 1))


@pytest.fixture
def numbers_are_given(monkeypatch):
    """Where the library would draw from a key of ``batch_of`` it finds the number there."""

    def give(name):
        draw = getattr(jax.random, name)
        return lambda key, *args: key[name] if isinstance(key, dict) else draw(key, *args)

    for name in "uniform", "normal":
        monkeypatch.setattr(jax.random, name, give(name))
    monkeypatch.setattr(objectives, "mixing_weights", lambda keys, _: keys["alpha"])
    given = lambda key, images: key if isinstance(key, dict) else image_keys(key, images)  # noqa: E731
    for module in (projected_gradient, threat):
        monkeypatch.setattr(module, "image_keys", given)


@pytest.fixture
def watched(monkeypatch):
    """``watched(objective)``: an objective that adds to its metrics what its attack and its passes see."""
    seen, path_fn = {}, attacks.pgd_path

    def pgd_path(logits_fn, start, images, labels, *, steps, loss, **settings):
        def batch_loss(x):
            logits = logits_fn(x)
            return loss(logits, labels).sum(), logits

        every = tuple(range(1, steps[-1] + 1))
        path = path_fn(logits_fn, start, images, labels, steps=every, loss=loss, **settings)
        path = jnp.concatenate([start[None], path])
        gradients, logits = jax.lax.map(jax.grad(batch_loss, has_aux=True), path[:-1])
        seen.update(path=path, gradients=gradients, logits=logits, natural_logits=logits_fn(images))
        return path[-1:]

    monkeypatch.setattr(projected_gradient, "pgd_path", pgd_path)

    def watching(objective, model, params, stats, batch):
        passes = []

        def train_and_tell(params, stats, images):
            logits, moments = model.train(params, stats, images)
            passes.append((moments, {"images": images, "logits": logits}))
            return logits, moments

        value, outcome = objective(model._replace(train=train_and_tell), params, stats, batch)
        in_order = [next(told for left, told in passes if left is moments) for moments in outcome.moments]
        return value, outcome._replace(metrics={**outcome.metrics, **seen, "passes": in_order})

    return lambda objective: functools.partial(watching, objective)


# Stands before an optimiser and keeps the loss's gradients as its state.
KEEP_GRADIENTS = optax.GradientTransformation(
    lambda params: jax.tree.map(jnp.zeros_like, params), lambda gradients, *_: (gradients, gradients)
)


def merged(tree, other):
    """``tree``, and ``other`` where an optimiser has nothing because it does not train the parameter."""

    def is_missing(x):
        return isinstance(x, optax.MaskedNode)

    return jax.tree.map(lambda x, y: y if is_missing(x) else x, tree, other, is_leaf=is_missing)


@jax.jit
def released_direction(params, stats, direction, evaluated, passes):
    """The moving direction of the released heads, after evaluations of images and then training passes.

    Theirs moves in the attack too (TDESim), or is never used (CosPlus), so ours is another or none. No logits
    depend on it here. It is made of our features by our rule.
    """
    bare = models.functional(models.Network(BACKBONE, lambda features, train: features))
    features = [bare.predict(params, stats, x) for x in evaluated]
    features += [bare.train(params, stats, x)[0] for x in passes]
    moments = tuple({"direction": classifiers.unit_features(f).mean(0)} for f in features)
    return models.update_statistics({"direction": direction}, moments)["direction"]


def check_attack(reference, recipe, check, at, batch, seen):
    """What the attack sees on its way, and the images that are trained on."""
    path, x, signs = nchw(seen["path"]), nchw(batch.images), reference(FILE, f"{at}/grad_sign")
    rebuilt = recipe.replay_signs(path[0], x, signs, STEP, EPSILON, dtype=np.float64)
    assert np.abs(path[1:] - np.stack(rebuilt)).max() < 1e-12
    check(f"{at}/grad_sign", np.sign(nchw(seen["gradients"])), bound=0)
    logits = np.asarray(seen["logits"])
    if at.startswith("trades"):  # evaluates the natural images, too, before every step
        natural = np.broadcast_to(seen["natural_logits"], logits.shape)
        logits = np.stack([logits, natural], axis=1).reshape(-1, *logits.shape[1:])
    check(f"{at}/attack_logits", logits)
    stored = reference.load("train_step").get(f"{at}/x_adv")
    if stored is not None:
        trained_on = next(p["images"] for p in seen["passes"] if (p["images"] != batch.images).any())
        same = reference.same_steps("train_step", f"{at}/grad_sign", len(signs))
        ours, theirs = nchw(trained_on)[same], stored[same]
        reference.check("training, float32 images", "train_step", f"{at}/x_adv", ours, FLOAT32, theirs=theirs)


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.usefixtures("numbers_are_given")
def test_training_steps(reference, recipe, watched, mode):
    config = load_config(*MODES[mode])
    counts = class_counts(config)
    model = builder.model(config, counts, platform=jax.default_backend(), precision="default")
    objective = watched(builder.objective(config, counts))
    optimizer = optax.chain(KEEP_GRADIENTS, builder.optimizer(config, steps_per_epoch=1000)[0])
    params, stats = imported(recipe, f"trainnet_{mode}", model)
    now = TrainState(jnp.int32(0), params, stats, optimizer.init(params))
    step = jax.jit(
        functools.partial(training.train_step, model=model, objective=objective, optimizer=optimizer)
    )

    # The released optimiser moves the momentum of parameters of rate 0, too, which has no effect. Ours has
    # none: theirs is then held against that of an optimiser that trains all, at the same gradients.
    with config.unlocked():
        config.optimizer.trainable = ""
    trains_all, _ = builder.optimizer(config, steps_per_epoch=1000)
    of_all = trains_all.init(params)

    names, bn_names = (reference(FILE, f"{mode}/{kind}_names") for kind in ("param", "bn"))
    prefixes = pytorch.released_prefixes(params, stats)
    to_state_dict = functools.partial(pytorch.to_state_dict, prefixes=prefixes)
    check = functools.partial(reference.check, f"training, {mode}", FILE)
    direction, updates = jnp.zeros(64), 0
    for i in range(STEPS):
        at, before, batch = f"{mode}/step{i}", now, batch_of(reference, recipe, mode, i)
        now, seen = step(before, batch)
        check(f"{at}/loss", seen["loss"])
        if mode != "plain":
            check_attack(reference, recipe, check, at, batch, seen)

        # The training passes, in the order in which their moments are applied.
        images = [p["images"] for p in seen["passes"]]
        updates += len(images)
        check(f"{at}/train_logits", np.stack([p["logits"] for p in seen["passes"]]))
        is_natural = [(x == batch.images).all() for x in images]
        check(f"{at}/train_forward_is_natural", np.stack(is_natural), bound=0)
        check(f"{at}/bn_updates", updates, bound=0)

        # What is frozen there has no gradient: ours is 0, or there is no such parameter.
        _, of_all = trains_all.update(now.opt_state[0], of_all, before.params)
        momentum = merged(optax.tree.get(now.opt_state, "trace"), optax.tree.get(of_all, "trace"))
        gradients, momentum = to_state_dict(now.opt_state[0], {}), to_state_dict(momentum, {})
        assert set(gradients) <= set(names)
        for what, arrays in (("grad", gradients), ("momentum", momentum)):
            frozen = np.isnan(reference(FILE, f"{at}/{what}_checksum")).any(axis=1)
            assert not any(np.any(gradients.get(name, 0)) for name in names[frozen])
            check(f"{at}/{what}_checksum", checksums(recipe, arrays, names[~frozen]), rows=~frozen)

        after = to_state_dict(now.params, now.stats)
        if "classifier.moving_ed" in names:
            evaluated = list(seen["path"][:-1]) if mode == "pgd_at_TDESim" else []
            direction = released_direction(before.params, before.stats, direction, evaluated, images)
            after["classifier.moving_ed"] = np.asarray(direction)[None]
        after.setdefault("classifier.bias", np.zeros(10))  # of cosine heads, frozen
        check(f"{at}/param_checksum", checksums(recipe, after, names))
        check(f"{at}/bn_checksum", checksums(recipe, after, bn_names))
        for key in reference.load(FILE):
            for prefix, arrays in (f"{at}/full/", after), (f"{at}/grad/", gradients):
                if key.startswith(prefix):
                    check(key, arrays[key.removeprefix(prefix)])
    reference.assert_all_seen("train_step", f"{mode}/")


@pytest.mark.usefixtures("numbers_are_given")
def test_mart(reference, recipe):
    """The released regulariser of this name cannot run: nothing to compare but that ours can."""
    assert "RuntimeError" in str(reference(FILE, "reg_mart/error"))
    config = load_config("mart", {})
    counts = class_counts(config)
    model = builder.model(config, counts, platform=jax.default_backend(), precision="default")
    objective = builder.objective(config, counts)
    params, stats = imported(recipe, "trainnet_reg_mart", model)
    names, bn_names = (reference(FILE, f"reg_mart/{kind}_names") for kind in ("param", "bn"))
    assert {*names, *bn_names} == set(pytorch.to_state_dict(params, stats))
    loss, _ = jax.jit(functools.partial(objective, model))(params, stats, batch_of(reference, recipe, "", 0))
    assert jnp.isfinite(loss)
    # Together with the modes above nothing is left out.
    there = {key.partition("/")[0] for key in reference.load(FILE)}
    assert there == {*MODES, "reg_mart", "input"}


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("decline60_75_epochs80", {"milestones": (60, 75), "epochs": 80}),
        ("decline60_75_epochs80_warmup5", {"milestones": (60, 75), "epochs": 80, "warmup": 5}),
        ("decline15_20_epochs25", {"milestones": (15, 20), "epochs": 25}),
        ("decline83_86_resume80_epochs90", {"milestones": (83, 86), "epochs": 10, "first_epoch": 81}),
        ("default60_75_90_epochs100", {"milestones": (60, 75, 90), "epochs": 100}),
    ],
)
def test_schedule(reference, name, settings):
    rates = optimizers.learning_rates(0.1, compounding=True, **settings)
    theirs = reference.load("schedule")[f"{name}/lr"]
    np.testing.assert_allclose(rates, theirs, rtol=1e-12)  # each rate by itself: they end at 1e-79
    reference.check("schedule", "schedule", f"{name}/lr", rates, 1e-12)
