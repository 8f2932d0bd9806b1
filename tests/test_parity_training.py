"""Training steps and learning rates against the released code, float64: see parity.py.

The steps are those of the configs: only the network is smaller, and the random numbers are handed in.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import ROOT
from ml_collections import ConfigDict
from parity import EPSILON, FLOAT32, SINGLE, STEP, TRAINED, checksums, imported, nchw, nhwc

from robal_jax import attacks, build, classifiers, cli, data, models, objectives, state, torch_import, train

pytestmark = [pytest.mark.parity, pytest.mark.usefixtures("float64")]

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
    return data.long_tailed_counts(5000, 10, config.data.ratio, config.data.profile)


def batch_of(reference, recipe, mode, i):
    """The batch of step ``i``; in the place of keys the numbers that are drawn from them."""
    x = nhwc(reference("train_step", f"input/x{i}"))
    shape = (BATCH, 3, 32, 32)
    noise = {"uniform": recipe.uniform(710 + i, shape), "normal": recipe.normal(720 + i, shape)}
    keys = {name: nhwc(array) for name, array in noise.items()}
    keys["alpha"] = jnp.asarray(recipe.uniform(730 + i, (BATCH, 1, 1, 1)).reshape(-1), float)
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

    monkeypatch.setattr(attacks, "pgd_path", pgd_path)

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


KEEP_GRADIENTS = optax.GradientTransformation(
    lambda params: jax.tree.map(jnp.zeros_like, params), lambda gradients, *_: (gradients, gradients)
)


def released_direction(params, stats, direction, points, passes):
    """The released head's moving direction after evaluations at ``points`` and then training passes."""
    bare = models.functional(models.Network(backbone(), lambda features, train: features))

    def mean(features):
        return {"direction": classifiers.unit_features(features).mean(0)}

    moments = [mean(bare.predict(params, stats, x)) for x in points]
    moments += [mean(bare.train(params, stats, x)[0]) for x in passes]
    return models.update_statistics({"direction": direction}, moments)["direction"]


def backbone():
    return models.WideResNet(10, 1, convolution=models.loop_convolution)


def check_attack(reference, recipe, check, at, batch, seen):
    """The images at which the attack arrives, and what it sees on its way."""
    signs, x = reference(FILE, f"{at}/grad_sign"), nchw(batch.images)
    path = nchw(seen["path"])
    rebuilt = recipe.replay_signs(path[0], x, signs, STEP, EPSILON, dtype=np.float64)
    assert np.abs(path[1:] - np.stack(rebuilt)).max() < 1e-12
    check(f"{at}/grad_sign", np.sign(nchw(seen["gradients"])), bound=0)
    logits = np.asarray(seen["logits"])
    if at.startswith("trades"):  # evaluates the images before every step too
        natural = np.broadcast_to(seen["natural_logits"], logits.shape)
        logits = np.stack([logits, natural], axis=1).reshape(-1, *logits.shape[1:])
    check(f"{at}/attack_logits", logits)
    if f"{at}/x_adv" in reference.load("train_step"):  # what is trained on
        adversarial = next(p["images"] for p in seen["passes"] if (p["images"] != batch.images).any())
        same = reference.same_steps("train_step", f"{at}/grad_sign", len(signs))
        assert same.all() or at.startswith("trades") and same.mean() > 0.95, same.mean()
        ours, theirs = (a[same] for a in (nchw(adversarial), reference.load("train_step")[f"{at}/x_adv"]))
        reference.check("training, float32 images", "train_step", f"{at}/x_adv", ours, FLOAT32, theirs=theirs)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.usefixtures("numbers_are_given")
def test_training_steps(reference, recipe, watched, mode):
    config = load_config(*MODES[mode])
    model = build.model(config, class_counts(config), precision="default")
    objective = watched(build.objective(config, class_counts(config)))
    optimizer, _ = build.optimizer(config, steps_per_epoch=1000)
    optimizer = optax.chain(KEEP_GRADIENTS, optimizer)
    params, stats = imported(recipe, f"trainnet_{mode}", model)
    now = train.TrainState(jnp.int32(0), params, stats, optimizer.init(params))
    step = jax.jit(functools.partial(train.train_step, model=model, objective=objective, optimizer=optimizer))

    # The released optimiser also moves momentum that its rate of 0 does not let have an effect.
    with config.unlocked():
        config.optimizer.trainable = ""
    of_all, _ = build.optimizer(config, steps_per_epoch=1000)
    of_all_state = of_all.init(params)

    names, bn_names = (list(reference(FILE, f"{mode}/{kind}_names")) for kind in ("param", "bn"))
    direction, updates = jnp.zeros(64), 0
    for i in range(STEPS):
        bound = SINGLE if i == 0 else TRAINED
        check = functools.partial(reference.check, f"training, {mode}", FILE, bound=bound)
        at, before, batch = f"{mode}/step{i}", now, batch_of(reference, recipe, mode, i)
        now, seen = step(before, batch)
        check(f"{at}/loss", seen["loss"])
        if mode != "plain":
            check_attack(reference, recipe, check, at, batch, seen)

        # The training passes, in the order in which their moments are applied.
        passes, updates = seen["passes"], updates + len(seen["passes"])
        check(f"{at}/train_logits", np.stack([p["logits"] for p in passes]))
        is_natural = [bool((p["images"] == batch.images).all()) for p in passes]
        check(f"{at}/train_forward_is_natural", is_natural, bound=0)
        check(f"{at}/bn_updates", updates, bound=0)

        # Gradients and momentum; rows without any are of what is frozen there.
        gradients = torch_import.to_state_dict(now.opt_state[0], {})
        ours = jax.tree.leaves(optax.tree.get(now.opt_state, "trace"))
        _, of_all_state = of_all.update(now.opt_state[0], of_all_state, before.params)
        momentum = optax.tree.get(of_all_state, "trace")
        momentum = torch_import.to_state_dict(momentum, {})
        for what, arrays in (("grad", gradients), ("momentum", momentum)):
            theirs = reference(FILE, f"{at}/{what}_checksum")
            rows = [row for row in range(len(names)) if not np.isnan(theirs[row]).any()]
            check(f"{at}/{what}_checksum", checksums(recipe, arrays, [names[r] for r in rows]), rows=rows)

        after = torch_import.to_state_dict(now.params, now.stats)
        if "classifier.moving_ed" in names:
            points = seen["path"][:-1] if mode == "pgd_at_TDESim" else []
            images = [p["images"] for p in passes]
            direction = released_direction(before.params, before.stats, direction, points, images)
            after["classifier.moving_ed"] = np.asarray(direction)[None]
        after.setdefault("classifier.bias", np.zeros(10))
        check(f"{at}/param_checksum", checksums(recipe, after, names))
        check(f"{at}/bn_checksum", checksums(recipe, after, bn_names))
        for key in reference.load(FILE):
            for prefix, arrays in (f"{at}/full/", after), (f"{at}/grad/", gradients):
                if key.startswith(prefix):
                    check(key, arrays[key.removeprefix(prefix)])
    reference.assert_all_seen("train_step", f"{mode}/")


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
    rates = state.learning_rates(0.1, compounding=True, **settings)
    theirs = reference.load("schedule")[f"{name}/lr"]
    np.testing.assert_allclose(rates, theirs, rtol=1e-12)  # each rate by itself: they end at 1e-79
    reference.check("schedule", "schedule", f"{name}/lr", rates, 1e-12)
