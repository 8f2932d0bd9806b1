"""Three training steps of each follow-up method against the released code, float64: see parity.py.

The networks, images and noise are rebuilt from the seeds that the numbers' README names. Some released loops
make more passes after a step, for their logs, which move the running statistics: the test makes these too.
"""

import contextlib
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

from robal_jax import attacks, averages, builder, losses, objectives, perturbations, pytorch, training
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
EPOCH = 3  # steps
# What the released codes do in these steps and our configs do not, or the other way round.
AT = {"attack": {"start": "gaussian"}}
CLIPPED = {"attack": {"start": "uniform_clipped"}}
EVALUATED = (
    {"attack": {"batch_norm": "running"}},
    {"train": {"logged_passes": ""}},
    {"objective": {"name": "pgd_at"}},
)
COMMON = {"threat": {"budget": ConfigDict({"name": "constant"}), "ramp": 0.0}}
GIVEN_RADII = {"threat": {"budget": ConfigDict({"name": "given"})}}

# Each mode is compiled. Those with a near relative are made by `pytest -m parity`, not by a whole test run.
RELATIVES = (
    "rlt_at", "rlt_reat", "rlt_awp", "robustlt_at_ep1", "robustlt_at_ep41", "robustlt_at_ep90",
    "robustlt_atbsl_ep1", "robustlt_atbsl_ep90", "robustlt_at_evalmode_ep41", "robustlt_atbsl_evalmode_ep41",
    "at_awp", "at_awp_released", "cfa_at", "dafa_madry", "dafa_trades", "dm_trades", "self_distill_kd",
    "taet_stage1",
)  # fmt: skip


class Mode(NamedTuple):
    """A mode of the released code.

    Attributes:
      config: that is this mode.
      changes: to it, one after the other.
      epoch: that its steps see.
      generated: images of the batch that are.
      momenta: of batch norm in the three steps; None for 0.1.
      radii: by class, of the reference's arrays: a name and a factor.
    """

    config: str
    changes: tuple[dict, ...] = ()
    epoch: int = 1
    generated: int = 0
    momenta: tuple[float | None, ...] = (None,) * STEPS
    radii: tuple[str, float] = ("", 1.0)


CFA_RADII = ("cfa/state/class_eps", 1.0)
DAFA_RADII = ("dafa/long_tail/class_weights_lambda1", 0.031)
DAFA_AT = {"objective": {"name": "pgd_at"}}
GENERATED = {
    "changes": (
        {"generated": {"path": "", "share": 0.0}},  # the images are given
        {"schedule": {"name": "paper", "lr": 0.1}},
        {"train": {"epochs": 100}},
        {"average": {"warmup": 0.0}},  # the recorded steps are the first ones
    ),
    "generated": 5,
    "momenta": (1.0, 0.01, 0.01),
}
CUTMIX = (
    {"train": {"mixing": "cutmix", "label_smoothing": 0.0}},
    {
        "objective": {
            "name": "trades",
            "beta": 5.0,
            "batch_norm_order": "each_pass_once",
            "attack_divergence": False,
        }
    },
)

MODES = {
    "at_bsl": Mode("at_bsl"),
    "reat": Mode("reat"),
    "rlt_reat": Mode("robustlt_reat", (COMMON,), epoch=90),
    "taet_stage1": Mode("taet", epoch=40),
    "taet_harl": Mode("taet", epoch=41),
    "rlt_at": Mode("robustlt_at", (COMMON,), epoch=90),
    **{
        f"robustlt_{name}_ep{epoch}": Mode(config, epoch=epoch)
        for name, config in (("at", "robustlt_at"), ("atbsl", "robustlt_at_bsl"))
        for epoch in (1, 41, 90)
    },
    **{
        f"robustlt_{name}_evalmode_ep41": Mode(config, EVALUATED, 41)
        for name, config in (("at", "robustlt_at"), ("atbsl", "robustlt_at_bsl"))
    },
    "rlt_awp": Mode("robustlt_awp", (COMMON,), epoch=90),
    "at_awp": Mode("at_awp"),
    "at_awp_released": Mode(
        "at_awp", ({"attack": {"batch_norm": "batch_update_end"}, "train": {"logged_passes": "nat"}},)
    ),
    "trades_awp": Mode("trades_awp", epoch=10),
    "dm_trades": Mode("trades_generated", **GENERATED),
    "dm_cutmix": Mode("trades_generated", **GENERATED | {"changes": (*GENERATED["changes"], *CUTMIX)}),
    "cfa_at": Mode(
        "cfa",
        (GIVEN_RADII, CLIPPED, {"attack": {"batch_norm": "batch_update"}}, {"objective": {"name": "pgd_at"}}),
        radii=CFA_RADII,
    ),
    "cfa_trades": Mode("cfa", (GIVEN_RADII,), radii=CFA_RADII),
    "dafa_trades": Mode("dafa", (GIVEN_RADII,), radii=DAFA_RADII),
    "dafa_madry": Mode("dafa", (GIVEN_RADII, DAFA_AT), radii=DAFA_RADII),
    "dafa_madry_released": Mode(
        "dafa", (GIVEN_RADII, DAFA_AT, {"attack": {"second_step": True}}), radii=DAFA_RADII
    ),
    **{
        f"self_distill_kd{name}": Mode(
            "self_distilled",
            (AT, {"objective": {"name": "distilled", "kd": 1.0, "igdm": weight}}),
            epoch=100,  # of 100, where gradient matching has its whole weight
        )
        for name, weight in (("", 0.0), ("_igdm", 1.0))
    },
}


def config_of(mode):
    config = load_config(mode.config, {})
    with config.unlocked(), config.ignore_type():
        for changes in mode.changes:
            for section, fields in changes.items():
                if "name" in fields:
                    config[section] = ConfigDict(fields)
                else:
                    for key, value in fields.items():
                        config[section][key] = value
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


def with_passes(objective, recorded, model, params, stats, batch, *known):
    """An objective that adds to its metrics what its training passes see, in the order of their moments."""
    passes = []

    def train_and_tell(params, stats, images):
        logits, moments = model.train(params, stats, images)
        passes.append((moments, (images, logits)))
        return logits, moments

    def train_features_and_tell(params, stats, images):
        logits, features, moments = model.train_features(params, stats, images)
        passes.append((moments, (images, logits)))
        return logits, features, moments

    telling = model._replace(train=train_and_tell, train_features=train_features_and_tell)
    with recorded() as attack:
        value, outcome = objective(telling, params, stats, batch, *known)
    in_order = [next(told for left, told in passes if left is moments) for moments in outcome.moments]
    return value, outcome._replace(metrics={**outcome.metrics, "passes": in_order, "attack": attack or {}})


@contextlib.contextmanager
def recorded():
    """Collects path, gradients, radius and step size of the attack that is traced meanwhile."""
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

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(projected_gradient, "pgd_path", pgd_path)
        yield seen


def attack_of(objective, model, *args):
    """Path, gradients, radius and step size of the attack of an objective."""
    with recorded() as seen:
        objective(model, *args)
    return seen


COUNTS = long_tailed_counts(5000, 10, 0.02, "exp")


@functools.cache
def built(text):
    """The parts of a config, given as JSON: modes that differ in what is traced share their compilations."""
    config = ConfigDict(json.loads(text))
    model = builder.model(config, COUNTS, platform=jax.default_backend(), precision="default")
    objective = builder.objective(config, COUNTS)
    optimizer = optax.chain(KEEP_GRADIENTS, builder.optimizer(config, steps_per_epoch=1000)[0])
    average, budget = builder.average(config, steps_per_epoch=1000), builder.budget(config, COUNTS)
    extras = Extras(
        builder.perturbation(config),
        average,
        budget,
        steps_per_epoch=EPOCH,
        statistics=builder.class_statistics(config, COUNTS),
        logged_passes=tuple(filter(None, config.train.logged_passes.split(","))),
    )

    # The attack is seen in the step, but for one in a condition, and for weights that are perturbed after it.
    in_step = config.attack.first_epoch == 1 and config.perturbation.name == "none"

    @jax.jit
    def step(state, batch, partners, momentum):
        return training.train_step(
            state,
            batch,
            model=model,
            objective=functools.partial(
                with_passes, objective, recorded if in_step else contextlib.nullcontext
            ),
            optimizer=optimizer,
            extras=extras._replace(batch_norm_momentum=momentum),
            partners=partners,
        )

    gradient = jax.jit(jax.grad(lambda params, *args: objective(model, params, *args)[0]))
    attack = None if in_step else attack_alone(text)
    return config, model, optimizer, average, budget, step, attack, gradient


@functools.cache
def attack_alone(text, plain=False):
    """:func:`attack_of` of a config, compiled; with ``plain`` the attack ascends the cross entropy."""
    config = ConfigDict(json.loads(text))
    config.attack.first_epoch = 1
    if plain:
        config.attack.loss = ConfigDict({"name": "cross_entropy"})
    model = builder.model(config, COUNTS, platform=jax.default_backend(), precision="default")
    return jax.jit(functools.partial(attack_of, builder.objective(config, COUNTS), model))


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


@pytest.mark.long
@pytest.mark.parametrize("name", MODES)
@pytest.mark.usefixtures("left_out", "numbers_are_given")
def test_steps(reference, recipe, name):
    mode = MODES[name]
    config = config_of(mode)
    if mode.radii[0]:
        with config.unlocked():
            config.threat.budget.epsilons = tuple((mode.radii[1] * reference(FILE, mode.radii[0])).tolist())
    np.testing.assert_array_equal(reference(FILE, "input/steps/counts"), COUNTS)
    text = config.to_json()
    parts = built(text)
    config, model, optimizer, average, budget, step, attack, gradient = parts
    pass_of = training_pass()
    params, stats = imported(recipe, "trainnet_pgd_at", model)
    now = TrainState(jnp.int32(0), params, stats, optimizer.init(params))
    now = now.replace(average=average.init(Weights(params, stats)))
    statistics = builder.class_statistics(config, COUNTS)
    now = now.replace(
        classes=builder.gathered_arrays(budget, statistics), teacher=teacher_of(recipe, config, now)
    )
    names, bn_names = (reference(FILE, f"input/steps/{kind}_names") for kind in ("param", "bn"))
    to_state_dict = functools.partial(
        pytorch.to_state_dict, prefixes=pytorch.released_prefixes(params, stats)
    )
    check = functools.partial(reference.check, f"follow-ups, {name}", FILE)
    updates, wrong = 0, []

    def plainly(state, batch, told, adversarial):
        """How far the images are from those of an attack on the cross entropy."""
        found = attack_alone(text, plain=True)(state.params, state.stats, batch, told)
        return np.abs(found["path"][-1] - adversarial).max()

    for i in range(STEPS):
        at, before = f"{name}/step{i}", now
        batch = batch_of(reference, recipe, i, mode.epoch, mode.generated)
        batch, partners = mixed(reference, recipe, check, at, batch)
        radii = budget.radii(before.classes, batch.epoch)[batch.labels] if budget else None
        told = objectives.Known(radii, partners, None, before.classes or None, before.teacher or None)
        now, seen = step(before, batch, partners, mode.momenta[i])
        adversarial, found = batch.images, seen.get("attack")
        if f"{at}/grad_sign" in reference.load(FILE):
            found = found or attack(before.params, before.stats, batch, told)
            adversarial = check_attack(reference, recipe, check, at, found, twice=config.attack.second_step)
        missed = np.argmax(seen["passes"][0][1], axis=-1) != batch.labels
        wrong.append(np.bincount(batch.labels[missed], minlength=10))
        check(f"{at}/loss", seen["loss"] - entropy(partners, batch.labels))
        if f"{at}/loss_robust" in reference.load(FILE):
            check(f"{at}/loss_robust", seen["regulariser"])
            check(f"{at}/loss_natural", seen["loss"] - config.objective.beta * seen["regulariser"])

        passes, kinds = passes_in_order(config, pass_of, before, now, batch, adversarial, found, seen)
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
        radii = budget.radii(before.classes, batch.epoch) if budget else None
        check_method(reference, check, at, config, before, seen, told, batch, plainly)
        check_more(reference, recipe, check, at, config, before, now, batch, partners, radii, to_state_dict)
        if f"{at}/awp_names" in reference.load(FILE):
            shown = told._replace(adversarial=adversarial)
            of_batch = gradient(before.params, before.stats, batch, shown)
            check_perturbation(reference, recipe, check, at, config, before.params, of_batch, to_state_dict)
    if name == "reat":
        check("reat/counts_after_epoch", now.classes["predicted"])
        check("reat/errors_after_epoch", sum(wrong), bound=0)
        batch = batch_of(reference, recipe, 0, mode.epoch)
        told = objectives.Known(classes=now.classes)
        after, seen = step(now, batch, None, None)
        adversarial = seen["attack"]["path"][-1]
        difference = plainly(now, batch, told, adversarial)
        check("reat/step3/loss", seen["loss"])
        check("reat/step3/x_adv_checksum", recipe.checksum(nchw(adversarial)))
        check("reat/step3/x_adv_max_difference_from_plain_ce", difference, bound=0)
        check("reat/step3/param_checksum", checksums(recipe, to_state_dict(after.params, after.stats), names))
    stored = {key for key in reference.load(FILE) if key.startswith(f"{name}/")}
    stored -= {f"{name}/{what}" for what in ("info", "form", "start", "start_eps")}
    assert not stored - reference.files[FILE]["compared"] - reference.files[FILE]["input"]


def passes_in_order(config, pass_of, before, now, batch, adversarial, found, seen):
    """Images and logits of the passes of a step that move the running statistics, and what they see."""
    in_attack = []
    if config.attack.batch_norm.startswith("batch_update"):
        in_attack = list(found["path"][: 10 + config.attack.batch_norm.endswith("end")])
    first = [batch.images] if config.attack.batch_norm == "natural_first" else []
    first += [adversarial] if config.perturbation.get("counts_pass", False) else []
    passes = [(x, pass_of(before.params, before.stats, x)[0]) for x in (*in_attack, *first)]
    passes += seen["passes"]
    for what in filter(None, config.train.logged_passes.split(",")):
        images = {"adv": adversarial, "nat": batch.images}[what]
        passes.append((images, pass_of(now.params, now.stats, images)[0]))
    kinds = [2] * len(in_attack[:10])
    kinds += [pass_kind(x, batch.images, adversarial) for x, _ in passes[len(kinds) :]]
    return passes, kinds


def teacher_of(recipe, config, state):
    """The weights of the teacher, from the seed that the reference names; {} without one."""
    if not config.train.teacher:
        return {}
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (state.params, state.stats))
    shapes = {name: np.shape(value) for name, value in recipe.net_state("trainnet_pgd_at").items()}
    weights = recipe.make_state(shapes, 412, 4.0, ())
    weights = {name: np.asarray(value, float) for name, value in weights.items()}
    params, stats = pytorch.from_state_dict(weights, *like, None)
    return {"params": params, "stats": stats}


def pass_kind(images, natural, adversarial):
    """What a pass sees, as the reference numbers it: 0 natural images, 1 adversarial ones, 2 others."""
    if not (images != natural).any():
        return 0
    return 1 if np.abs(images - adversarial).max() < 1e-9 else 2


def check_method(reference, check, at, config, before, seen, told, batch, difference):
    """What only some methods have: statistics of the classes, parts of the loss, the teacher's logits."""
    arrays, (adversarial, logits) = reference.load(FILE), seen["passes"][0]
    counts, images = np.log(COUNTS)[None], batch.images
    if f"{at}/bsl" in arrays:
        check(f"{at}/bsl", losses.cross_entropy(logits + counts, batch.labels).mean())
    if f"{at}/predicted" in arrays:
        check(f"{at}/predicted", np.argmax(logits, axis=-1), bound=0)
        check(
            f"{at}/x_adv_max_difference_from_plain_ce", difference(before, batch, told, adversarial), bound=0
        )
    if f"{at}/kd" in arrays:
        predict = builder.model(config, COUNTS, platform=jax.default_backend(), precision="default").predict
        teach = functools.partial(predict, before.teacher["params"], before.teacher["stats"])
        check(f"{at}/kd", seen["distillation"])
        if config.objective.igdm:
            check(f"{at}/igdm", seen["gradient_matching"])
        shown = {"": images, "_plus": adversarial, "_minus": 2 * images - adversarial}
        for name, x in shown.items():
            check(f"{at}/teacher_logits{name}", teach(x))


def check_more(reference, recipe, check, at, config, before, now, batch, partners, radii, to_state_dict):
    """Radii by class, averages, labels and counts of predictions, if the reference has them."""
    arrays, names = reference.load(FILE), reference(FILE, "input/steps/param_names")
    if f"{at}/class_eps" in arrays:
        check(f"{at}/class_eps", radii)
    if f"{at}/ema_checksum" in arrays:
        averaged = to_state_dict(now.average["params"], now.stats)
        check(f"{at}/ema_checksum", checksums(recipe, averaged, names))
    if f"{at}/labels" in arrays:
        check(f"{at}/labels", batch.labels if partners is None else soft_labels(partners, batch.labels))
    if f"{at}/at_per_class" in arrays:
        check(f"{at}/at_per_class", now.classes["predicted"])


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


def check_attack(reference, recipe, check, at, found, twice):
    """Signs, radii and images of the attack; returns the images that are trained on."""
    signs = np.sign(nchw(found["gradients"]))
    check(f"{at}/grad_sign", np.repeat(signs, 2, axis=0) if twice else signs, bound=0)
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


@pytest.mark.long
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
