"""Three training steps of each follow-up method against the released code, float64: see parity.py.

The networks, images and noise are rebuilt from the seeds that the numbers' README names. Some released loops
make more passes after a step, for their logs, which move the running statistics: the test makes these too.
"""

import functools
import itertools
import json
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict
from parity import checksums, imported, nchw, nhwc
from test_parity_training import KEEP_GRADIENTS, load_config

from robal_jax import attacks, averages, builder, models, objectives, perturbations, pytorch, training
from robal_jax.attacks import projected_gradient, threat
from robal_jax.averages import Weights
from robal_jax.data import cutmix, long_tailed_counts
from robal_jax.data.cutmix import cutmix_box
from robal_jax.keys import image_keys
from robal_jax.training import TrainState
from robal_jax.training.step import Extras

pytestmark = [pytest.mark.parity, pytest.mark.slow, pytest.mark.usefixtures("float64")]

FILE = "followups_f64"
STEPS, BATCH = 3, 8
AT = {
    "threat": {"epsilon": 8 / 255},
    "attack": {"steps": 10, "step_size": 2 / 255, "start": "gaussian"},
    "optimizer": {"weight_decay": 5e-4},
    "head": {"name": "linear", "bias": "trained"},
}
CLIPPED = {"attack": {"start": "uniform_clipped"}}
MOVING = {"attack": {"batch_norm": "batch_update"}}
BATCH_MODE = {"attack": {"start": "uniform_clipped", "batch_norm": "batch"}}
NESTEROV = {"optimizer": {"nesterov": True}}
LOGS = ("adv", "nat")
ROBUSTLT = {
    "threat": {"budget": {"name": "by_frequency", "alpha": 0.3}, "ramp": 0.8},
    "attack": {"common_noise": True},
    "train": {"epochs": 100},
}
CFA = {
    "threat": {"budget": {"name": "given"}, "scaled_steps": False},
    "attack": {"batch_norm": "batch_update"},
}
BALANCED_SOFTMAX = {"loss": {"name": "logit_adjustment", "tau": 1.0}}


# Each mode is compiled. Those with a near relative are made by `pytest -m parity`, not by a whole test run.
RELATIVES = (
    "rlt_at", "robustlt_at_ep1", "robustlt_at_ep41", "robustlt_at_ep90", "robustlt_at_evalmode_ep41",
    "robustlt_atbsl_evalmode_ep41", "at_awp",
)  # fmt: skip


class Mode(NamedTuple):
    """A mode of the released code.

    Attributes:
      config: that is this mode.
      changes: to ``AT`` in it, one after the other.
      epoch: that its steps see.
      generated: images of the batch that are.
      momenta: of batch norm in the three steps; None for 0.1.
      first: training passes before the step's own, that no loss reads; it reads no statistics either.
      unused: training passes after the step's own, at the weights of before, that no loss reads.
      logs: training passes after the step, at the new weights, that move the statistics.
    """

    config: str
    changes: tuple[dict, ...] = ()
    epoch: int = 1
    logs: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()
    first: tuple[str, ...] = ()
    generated: int = 0
    momenta: tuple[float | None, ...] = (None,) * STEPS


MODES = {
    "at_bsl": Mode("at", (BALANCED_SOFTMAX,)),
    "rlt_at": Mode("at", (BATCH_MODE, NESTEROV), epoch=90, logs=LOGS),
    **{
        f"robustlt_{name}_ep{epoch}": Mode("at", (BATCH_MODE, NESTEROV, loss, ROBUSTLT), epoch, LOGS, unused)
        for name, loss, unused in (("at", {}, ()), ("atbsl", BALANCED_SOFTMAX, ("nat",)))
        for epoch in (1, 41, 90)
    },
    **{
        f"robustlt_{name}_evalmode_ep41": Mode("at", (CLIPPED, NESTEROV, loss, ROBUSTLT), 41)
        for name, loss in (("at", {}), ("atbsl", BALANCED_SOFTMAX))
    },
    "cfa_at": Mode("at", (CFA, {"attack": {"start": "uniform_clipped"}}), logs=("nat",)),
    "rlt_awp": Mode(
        "at",
        (BATCH_MODE, NESTEROV, {"perturbation": {"name": "awp", "gamma": 0.005, "direction": "optimizer"}}),
        epoch=90,
        logs=LOGS,
        first=("adv",),
    ),
    "at_awp": Mode("at", (CLIPPED, {"perturbation": {"name": "awp", "gamma": 0.01}})),
    "at_awp_released": Mode(
        "at",
        (
            CLIPPED,
            {"attack": {"batch_norm": "batch_update_end"}},
            {"perturbation": {"name": "awp", "gamma": 0.01}},
        ),
        logs=("nat",),
    ),
    "dm_trades": Mode(
        "trades",
        (
            BATCH_MODE,
            NESTEROV,
            {"optimizer": {"decayed": "not_batch_norm"}, "train": {"label_smoothing": 0.1}},
            {"objective": {"name": "trades", "beta": 5.0, "batch_norm_order": "each_pass_once"}},
            {"average": {"name": "ema"}},
        ),
        generated=5,
        momenta=(1.0, 0.01, 0.01),
    ),
    "dm_cutmix": Mode(
        "trades",
        (
            BATCH_MODE,
            NESTEROV,
            {"optimizer": {"decayed": "not_batch_norm"}, "train": {"mixing": "cutmix"}},
            {
                "objective": {
                    "name": "trades",
                    "beta": 5.0,
                    "batch_norm_order": "each_pass_once",
                    "attack_divergence": False,
                }
            },
            {"average": {"name": "ema"}},
        ),
        generated=5,
        momenta=(1.0, 0.01, 0.01),
    ),
    "trades_awp": Mode(
        "trades",
        (
            {"objective": {"name": "trades", "beta": 6.0, "batch_norm_order": "adv,nat,nat"}},
            {"perturbation": {"name": "awp", "gamma": 0.005, "start": 10}},
        ),
        epoch=10,
    ),
}


def config_of(mode):
    config = load_config(mode.config, {})
    with config.unlocked(), config.ignore_type():
        for changes in (AT, *mode.changes):
            for section, fields in changes.items():
                if "name" in fields:
                    config[section] = ConfigDict(fields)
                else:
                    config[section].update(fields)
    return config


@pytest.fixture
def numbers_are_given(monkeypatch):
    """Where the library would draw from a key of ``batch_of`` it finds the number there."""
    uniform, normal = jax.random.uniform, jax.random.normal

    def given_uniform(key, shape=(), dtype=float, minval=0.0, maxval=1.0):
        if not isinstance(key, dict):
            return uniform(key, shape, dtype, minval, maxval)
        return minval + (maxval - minval) * key["uniform"]

    monkeypatch.setattr(jax.random, "uniform", given_uniform)
    monkeypatch.setattr(
        jax.random,
        "normal",
        lambda key, *args: key["normal"] if isinstance(key, dict) else normal(key, *args),
    )
    given = lambda key, images: key if isinstance(key, dict) else image_keys(key, images)  # noqa: E731
    for module in (projected_gradient, threat):
        monkeypatch.setattr(module, "image_keys", given)


def batch_of(reference, recipe, i, epoch, generated=0):
    shape = (BATCH, 3, 32, 32)
    images, labels = recipe.images(8100 + i, BATCH), reference(FILE, f"input/steps/y{i}")
    if generated:
        images = np.concatenate([images[:-generated], recipe.images(8110 + i, BATCH)[:generated]])
        labels = np.concatenate([labels[:-generated], recipe.ints(8148 + i, 10, (generated,))])
    noise = {"uniform": recipe.uniform(8130 + i, shape), "normal": recipe.normal(8120 + i, shape)}
    keys = {name: nhwc(array) for name, array in noise.items()}
    return objectives.Batch(nhwc(images), jnp.asarray(labels), keys, epoch)


def with_passes(objective, model, params, stats, batch, *known):
    """An objective that adds to its metrics what its training passes see, in the order of their moments."""
    passes = []

    def train_and_tell(params, stats, images):
        logits, moments = model.train(params, stats, images)
        passes.append((moments, (images, logits)))
        return logits, moments

    value, outcome = objective(model._replace(train=train_and_tell), params, stats, batch, *known)
    in_order = [next(told for left, told in passes if left is moments) for moments in outcome.moments]
    return value, outcome._replace(metrics={**outcome.metrics, "passes": in_order})


@pytest.fixture(scope="module")
def attack_of():
    """``attack_of(objective, ...)``: path, gradients, radius and step size of the attack of an objective."""
    seen, path_fn = {}, attacks.pgd_path

    def pgd_path(logits_fn, start, images, labels, *, steps, loss, threat, step_size, **settings):
        def total(x):
            return loss(logits_fn(x), labels).sum()

        every = tuple(range(1, steps[-1] + 1))
        settings |= {"threat": threat, "step_size": step_size, "loss": loss}
        path = path_fn(logits_fn, start, images, labels, steps=every, **settings)
        path = jnp.concatenate([start[None], path])
        gradients = jax.lax.map(jax.grad(total), path[:-1])
        seen.update(path=path, gradients=gradients, radius=threat.epsilon, step_size=step_size)
        return path[jnp.array(steps)]

    def of(objective, model, *args):
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(projected_gradient, "pgd_path", pgd_path)
            seen.clear()
            objective(model, *args)
            return dict(seen)

    return of


COUNTS = long_tailed_counts(5000, 10, 0.02, "exp")


@functools.cache
def built(text, attack_of):
    """The parts of a config, given as JSON: modes that differ in what is traced share their compilations."""
    config = ConfigDict(json.loads(text))
    model = builder.model(config, COUNTS, platform=jax.default_backend(), precision="default")
    objective = builder.objective(config, COUNTS)
    optimizer = optax.chain(KEEP_GRADIENTS, builder.optimizer(config, steps_per_epoch=1000)[0])
    average, budget = builder.average(config, steps_per_epoch=1000), builder.budget(config, COUNTS)
    extras = Extras(builder.perturbation(config), average, budget, steps_per_epoch=1000)

    @jax.jit
    def step(state, batch, partners, momentum):
        return training.train_step(
            state,
            batch,
            model=model,
            objective=functools.partial(with_passes, objective),
            optimizer=optimizer,
            extras=extras._replace(batch_norm_momentum=momentum),
            partners=partners,
        )

    gradient = jax.jit(jax.grad(lambda params, *args: objective(model, params, *args)[0]))
    attack = jax.jit(functools.partial(attack_of, objective, model))
    return config, model, optimizer, average, budget, step, attack, gradient


@functools.cache
def training_pass():
    """A training pass of the network that all modes have, compiled once."""
    config = config_of(MODES["at_bsl"])
    model = builder.model(config, COUNTS, platform=jax.default_backend(), precision="default")
    return jax.jit(model.train)


@pytest.fixture
def left_out(request, name):
    if name in RELATIVES and "parity" not in request.config.getoption("markexpr"):
        pytest.skip("has a near relative; pytest -m parity makes it")


@pytest.mark.parametrize("name", MODES)
@pytest.mark.usefixtures("left_out", "numbers_are_given")
def test_steps(reference, recipe, attack_of, name):
    mode = MODES[name]
    config = config_of(mode)
    if config.threat.budget.name == "given":
        with config.unlocked():
            config.threat.budget.epsilons = tuple(reference(FILE, "cfa/state/class_eps").tolist())
    np.testing.assert_array_equal(reference(FILE, "input/steps/counts"), COUNTS)
    parts = built(config.to_json(), attack_of)
    config, model, optimizer, average, budget, step, attack, gradient = parts
    pass_of = training_pass()
    params, stats = imported(recipe, "trainnet_pgd_at", model)
    now = TrainState(jnp.int32(0), params, stats, optimizer.init(params))
    now = now.replace(average=average.init(Weights(params, stats)))
    now = now.replace(classes=budget.init() if budget else {})
    names, bn_names = (reference(FILE, f"input/steps/{kind}_names") for kind in ("param", "bn"))
    to_state_dict = functools.partial(
        pytorch.to_state_dict, prefixes=pytorch.released_prefixes(params, stats)
    )
    check = functools.partial(reference.check, f"follow-ups, {name}", FILE)
    updates = 0
    for i in range(STEPS):
        at, before = f"{name}/step{i}", now
        batch = batch_of(reference, recipe, i, mode.epoch, mode.generated)
        batch, partners = mixed(reference, recipe, check, at, batch)
        radii = budget.radii(before.classes, batch.epoch)[batch.labels] if budget else None
        found = attack(before.params, before.stats, batch, objectives.Known(radii, partners))
        adversarial = check_attack(reference, recipe, check, at, found)
        passes = []
        for _ in mode.first:
            logits, moments = pass_of(before.params, before.stats, adversarial)
            before = before.replace(stats=models.update_statistics(before.stats, (moments,)))
            passes.append((adversarial, logits))

        now, seen = step(before, batch, partners, mode.momenta[i])
        check(f"{at}/loss", seen["loss"] - entropy(partners, batch.labels))
        if f"{at}/loss_robust" in reference.load(FILE):
            check(f"{at}/loss_robust", seen["regulariser"])
            check(f"{at}/loss_natural", seen["loss"] - config.objective.beta * seen["regulariser"])

        moved = {"batch_update": found["path"][:-1], "batch_update_end": found["path"]}
        in_attack = list(moved.get(config.attack.batch_norm, ()))
        passes += [(x, pass_of(before.params, before.stats, x)[0]) for x in in_attack] + seen["passes"]
        kinds = [2] * len(in_attack[:10])
        kinds += [int((x != batch.images).any()) for x, _ in passes[len(kinds) :]]
        extra = [(what, before.params) for what in mode.unused] + [(what, now.params) for what in mode.logs]
        for what, weights in extra:
            images = {"adv": adversarial, "nat": batch.images}[what]
            logits, moments = pass_of(weights, now.stats, images)
            now = now.replace(stats=models.update_statistics(now.stats, (moments,)))
            passes.append((images, logits))
            kinds.append(int((images != batch.images).any()))
        updates += len(passes)
        check(f"{at}/train_logits", np.stack([logits for _, logits in passes]))
        check(f"{at}/train_input", kinds, bound=0)
        check(f"{at}/bn_updates", updates, bound=0)

        gradients = to_state_dict(now.opt_state[0], {})
        momentum = to_state_dict(optax.tree.get(now.opt_state, "trace"), {})
        after = to_state_dict(now.params, now.stats)
        check(f"{at}/grad_checksum", checksums(recipe, gradients, names))
        check(f"{at}/momentum_checksum", checksums(recipe, momentum, names))
        check(f"{at}/param_checksum", checksums(recipe, after, names))
        check(f"{at}/bn_checksum", checksums(recipe, after, bn_names))
        for key in reference.load(FILE):
            for prefix, arrays in (("full", after), ("grad", gradients), ("momentum", momentum)):
                if key.startswith(f"{at}/{prefix}/"):
                    check(key, arrays[key.removeprefix(f"{at}/{prefix}/")])
        if f"{at}/class_eps" in reference.load(FILE):
            check(f"{at}/class_eps", budget.radii(before.classes, batch.epoch))
        if average.init(Weights({}, {})):
            averaged = to_state_dict(now.average["params"], now.stats)
            check(f"{at}/ema_checksum", checksums(recipe, averaged, names))
        if f"{at}/labels" in reference.load(FILE):
            check(f"{at}/labels", batch.labels if partners is None else soft_labels(partners, batch.labels))
        if f"{at}/awp_names" in reference.load(FILE):
            of_batch = gradient(
                before.params, before.stats, batch, objectives.Known(radii, adversarial=adversarial)
            )
            check_perturbation(reference, recipe, check, at, config, before.params, of_batch, to_state_dict)
    stored = {key for key in reference.load(FILE) if key.startswith(f"{name}/step")}
    assert not stored - reference.files[FILE]["compared"] - reference.files[FILE]["input"]


def mixed(reference, recipe, check, at, batch):
    """The images of a batch with the released box and partners; unchanged, and None, in other modes."""
    if f"{at}/permutation" not in reference.load(FILE):
        return batch, None
    box, order = (
        jnp.asarray(reference(FILE, f"{at}/{name}")) for name in ("box_top_left_height_width", "permutation")
    )
    images, share = cutmix(batch.images, box, order)
    partners = objectives.Partners(batch.labels[order], jnp.full(BATCH, share))
    check(f"{at}/mixed_images_checksum", recipe.checksum(nchw(images)))
    drawn, centre = reference(FILE, f"{at}/lambda_drawn"), reference(FILE, f"{at}/centre_row_col")
    np.testing.assert_array_equal(cutmix_box(jnp.asarray(drawn), jnp.asarray(centre), (32, 32)), box)
    check(f"{at}/mixed_labels", soft_labels(partners, batch.labels))
    return batch._replace(images=images), partners


def soft_labels(partners, labels):
    own, other = (jax.nn.one_hot(y, 10) for y in (labels, partners.labels))
    return partners.share[:, None] * own + (1 - partners.share[:, None]) * other


def entropy(partners, labels):
    """What the released divergence from soft labels lacks of their cross entropy: a constant."""
    if partners is None:
        return 0.0
    return jax.scipy.special.entr(soft_labels(partners, labels)).sum(-1).mean()


def check_attack(reference, recipe, check, at, found):
    """Signs, radii and images of the attack; returns the images that are trained on."""
    check(f"{at}/grad_sign", np.sign(nchw(found["gradients"])), bound=0)
    adversarial = found["path"][-1]
    check(f"{at}/x_adv_checksum", recipe.checksum(nchw(adversarial)))
    check(f"{at}/eps", np.broadcast_to(found["radius"], (BATCH,)))
    check(f"{at}/step_size", np.broadcast_to(found["step_size"], (BATCH,)))
    return adversarial


def check_perturbation(reference, recipe, check, at, config, params, gradients, to_state_dict):
    """The perturbation by itself: its direction of the weights' length, and the perturbed weights."""
    names, param_names = reference(FILE, f"{at}/awp_names"), reference(FILE, "input/steps/param_names")
    direction = to_state_dict(perturbations.of_its_length(params, gradients), {})
    assert {name for name, array in direction.items() if np.any(array)} == set(names)
    check(f"{at}/awp_diff_checksum", checksums(recipe, direction, names))
    for key in reference.load(FILE):
        if key.startswith(f"{at}/awp_diff/"):
            check(key, direction[key.removeprefix(f"{at}/awp_diff/")])
    if f"{at}/perturbed_checksum" in reference.load(FILE):
        perturb = perturbations.awp(config.perturbation.gamma)
        perturbed = to_state_dict(perturb.perturb(params, gradients, 1), {})
        check(f"{at}/perturbed_checksum", checksums(recipe, perturbed, param_names))


@pytest.mark.usefixtures("numbers_are_given")
def test_averages(reference, recipe):
    config, counts = config_of(MODES["at_bsl"]), long_tailed_counts(5000, 10, 0.02, "exp")
    model = builder.model(config, counts, platform=jax.default_backend(), precision="default")
    optimizer = builder.optimizer(config, steps_per_epoch=1000)[0]
    params, stats = imported(recipe, "trainnet_pgd_at", model)
    objective = builder.objective(config, counts)
    step = jax.jit(
        functools.partial(training.train_step, model=model, objective=objective, optimizer=optimizer)
    )
    states = [TrainState(jnp.int32(0), params, stats, optimizer.init(params))]
    for i in range(STEPS):
        states.append(step(states[-1], batch_of(reference, recipe, i, 1))[0])
    # Of equal weights: those of an epoch's end join in the step after it, so one more step is made.
    of_epochs = [*states, states[-1].replace(step=jnp.int32(STEPS + 1))]

    names, bn_names = (reference(FILE, f"input/steps/{kind}_names") for kind in ("param", "bn"))
    prefixes = pytorch.released_prefixes(params, stats)
    check = functools.partial(reference.check, "averages", FILE)
    after = {}
    for name, average, seen in (
        ("ema_tau0.995_warmup0_dynamic", averages.ema(1), states),
        ("ema_tau0.995_warmup2_dynamic", averages.ema(1, warmup=2), states),
        ("cfa_ema0.88", averages.per_epoch(1), states),
        ("swa", averages.swa(1), of_epochs),
    ):
        kept = average.init(Weights(params, stats))
        for i, (old, new) in enumerate(itertools.pairwise(seen)):
            before, now = (Weights(state.params, state.stats) for state in (old, new))
            kept = average.update(kept, new.step, before, now)
            after[name, i - (name == "swa")] = pytorch.to_state_dict(
                kept["params"], kept.get("stats", stats), prefixes=prefixes
            )
    for decay in (0.995, 0.9):
        moved = params
        for i, state in enumerate(states[1:]):
            moved = averages.moved(moved, state.params, 1 - decay)
            name = f"ema_tau{decay:g}_constant"
            after[name, i] = pytorch.to_state_dict(moved, stats, prefixes=prefixes)
    for key in reference.load(FILE):
        _, name, *rest = key.split("/") if key.startswith("average/") else ("", "")
        if name == "decay_at_global_step":
            warmup = int(rest[0].removeprefix("warmup"))
            t = np.arange(2000)
            check(key, averages.ema_decay(t, decay=0.995, warmup=warmup), 1e-12)
        elif rest == ["fc_weight"]:
            check(key, after[name, STEPS - 1]["classifier.fc.weight"])
        elif rest:
            wanted = bn_names if rest[1] == "bn_checksum" else names
            check(key, checksums(recipe, after[name, int(rest[0].removeprefix("step"))], wanted))
    stored = {key for key in reference.load(FILE) if key.startswith("average/")}
    assert not stored - reference.files[FILE]["compared"]


def test_perturbation_of_single_tensors(reference):
    """The released proxy makes a step; its length does not matter. Tensors of one axis are left out there."""
    for name in reference(FILE, "awp/names"):
        old, proxy = (jnp.asarray(reference(FILE, f"awp/{name}/{what}")) for what in ("old", "proxy"))
        for factor in (1.0, 7.0):
            found = perturbations.of_its_length({"w": old}, {"w": factor * (proxy - old)})["w"]
            reference.check("AWP, single tensors", FILE, f"awp/{name}/diff", found)
    stored = {key for key in reference.load(FILE) if key.startswith("awp/")}
    assert not stored - reference.files[FILE]["compared"] - reference.files[FILE]["input"]
