"""Our numbers against those that the released PyTorch code made, in float64.

The folder of the released code's numbers says what each array is (README.md); a table of what was compared
and how well it agrees is printed at the end (``pytest -m parity``). The error of an array is
``max |ours - theirs| / max |theirs|``; of an array of checksums, one row per tensor, the worst row's.

What is not compared, and why: losses, heads, modes and attacks that this library does not have (focal, CB,
BCE, LDAM, CDT, DRW and DM, TDESim, PostNorm, heads with a frozen bias that is not zero; TRADES, AVmix,
inner_loss, the other regularisers); what the released code leaves behind besides its results (logits changed
in place, moving_ed, counters of batches); the float32 files.
"""

import collections
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from robal_jax import attacks, classifiers, losses, models, objectives, state, torch_import, train

pytestmark = pytest.mark.parity

# One function, or one pass through a network and its gradient: float64 rounding (1e-16) grows by the number
# of summands and layers to 1e-15 .. 1e-12. A wrong constant (an epsilon, a biased variance) shows at 1e-5.
SINGLE = 1e-9
# Three training steps: a step multiplies the rounding by lr * curvature, about 10 to 100 times.
TRAINED = 1e-6


@pytest.fixture(scope="module", autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


class Reference:
    """The files of the released code's numbers, and the tally of what was compared with them."""

    def __init__(self, load):
        self.load = functools.cache(lambda name: dict(load(name)))
        self.files = collections.defaultdict(lambda: {"compared": set(), "input": set()})
        self.groups = collections.defaultdict(dict)

    def __call__(self, file, key):
        """An array that we read."""
        self.files[file]["input"].add(key)
        return self.load(file)[key]

    def check(self, group, file, key, ours, bound=SINGLE, rows=..., theirs=None):
        """Compares an array that we make; ``theirs`` if it is not the stored one but follows from it."""
        theirs = self.load(file)[key][rows] if theirs is None else theirs
        theirs, ours = np.asarray(theirs, float), np.asarray(ours, float)
        assert ours.shape == theirs.shape, key
        per_row = "checksum" in key and theirs.ndim == 2
        size = np.abs(theirs).max(axis=1, keepdims=True) if per_row else np.abs(theirs).max()
        error = np.max(np.abs(ours - theirs) / np.where(size > 0, size, 1.0))
        self.files[file]["compared"].add(key)
        self.groups[group][f"{file}:{key}"] = error
        assert error <= bound, f"{file}:{key}: {error:.1e} > {bound:.0e}"

    def pytest_terminal_summary(self, terminalreporter):
        """The table; pytest calls this at the end (in one process: workers of pytest-xdist print nothing)."""
        say = terminalreporter.write_line
        terminalreporter.section("parity with the released code, float64")
        say(f"{'group':<32}{'arrays':>8}{'largest relative error':>24}")
        for group, errors in self.groups.items():
            worst = max(errors, key=errors.get)
            say(f"{group:<32}{len(errors):>8}{errors[worst]:>24.1e}  {worst}")
        for file, seen in self.files.items():
            total, compared = len(self.load(file)), len(seen["compared"])
            inputs = len(seen["input"] - seen["compared"])
            untouched = total - compared - inputs
            say(f"{file}: {total} arrays, {compared} compared, {inputs} only read, {untouched} not touched")


@pytest.fixture(scope="session")
def reference(golden, request):
    reference = Reference(golden)
    request.config.pluginmanager.register(reference)
    return reference


def nhwc(x):
    return jnp.asarray(np.moveaxis(np.asarray(x, float), -3, -1))


def nchw(x):
    return np.moveaxis(np.asarray(x), -1, -3)


# ---------------------------------------------------------------------------------------------- losses

ROBAL = {
    "MultiMargin_c10N": {"margin": 0.1, "scale": 10.0, "tau_b": 1.2, "tau_m": 0.0},
    "MultiMargin_c10R": {"margin": 0.1, "scale": 10.0, "tau_b": 1.5, "tau_m": 0.3},
    "MultiMargin_c100N": {"margin": 0.2, "scale": 10.0, "tau_b": 0.0, "tau_m": 0.0},
    "MultiMargin_c100R": {"margin": 0.3, "scale": 10.0, "tau_b": 0.0, "tau_m": 0.0},
    "MultiMargin_nomargin": {"margin": 0.0, "scale": 10.0, "tau_b": 1.0, "tau_m": 0.0},
    "MultiMargin_taum_only": {"margin": 0.0, "scale": 5.0, "tau_b": 0.0, "tau_m": 0.5},
    "LogitAdjust_t1": {"margin": 0.0, "scale": 1.0, "tau_b": 1.0, "tau_m": 0.0},
    "LogitAdjust_t05": {"margin": 0.0, "scale": 1.0, "tau_b": 0.5, "tau_m": 0.0},
    "UniMargin_m02_s10": {"margin": 0.2, "scale": 10.0, "tau_b": 0.0, "tau_m": 0.0},
}


@pytest.mark.parametrize("classes", [10, 100])
@pytest.mark.parametrize("logits", ["z", "zcos"])
def test_losses(reference, classes, logits):
    file, at = "losses_f64", f"c{classes}/{logits}"
    counts, labels = reference(file, f"c{classes}/samples_per_cls"), reference(file, f"c{classes}/labels")
    z = jnp.asarray(reference(file, f"{at}/logits"))
    cases = {name: functools.partial(losses.robal, class_counts=counts, **p) for name, p in ROBAL.items()}
    for name, loss in {"ce": losses.cross_entropy, **cases}.items():
        value, gradient = jax.value_and_grad(lambda z, loss=loss: loss(z, labels).mean())(z)
        reference.check("losses", file, f"{at}/{name}/value", value)
        reference.check("losses", file, f"{at}/{name}/grad", gradient)


@pytest.mark.parametrize("classes", [10, 100])
def test_loss_constants(reference, classes):
    file, at = "losses_f64", f"c{classes}/const"
    counts = reference(file, f"c{classes}/samples_per_cls")
    for name, p in ROBAL.items():
        if f"{at}/{name}_m" in reference.load(file):
            margins = losses.robal_margins(counts, scale=p["scale"], margin=p["margin"], tau_m=p["tau_m"])
            reference.check("losses", file, f"{at}/{name}_m", margins)
        if f"{at}/{name}_bias" in reference.load(file):
            reference.check(
                "losses", file, f"{at}/{name}_bias", losses.robal_biases(counts, tau_b=p["tau_b"])
            )
    reference.check("losses", file, f"{at}/LogitAdjust_bias_t1", losses.robal_biases(counts, tau_b=1.0))


# ----------------------------------------------------------------------------------------- classifiers

PRE, COS, FC = "bias+moving_ed+weight", "bias+weight", "fc.bias+fc.weight"  # names of the sets of weights
HEADS = {  # set of weights, parameters of the cosine head, tau of the prior adjustment
    "FC": (FC, None, 0.0),
    "PostProc_FC_tau1": (FC, None, 1.0),
    "PostProc_FC_noposthoc": (FC, None, 0.0),
    "Cos_s1": (COS, {"scale": 1.0}, 0.0),
    "Cos_s16": (COS, {"scale": 16.0}, 0.0),
    "CosPlus_g32_s1": (PRE, {"scale": 1.0, "gamma": 1 / 32}, 0.0),
    "CosPlus_g16_s1": (PRE, {"scale": 1.0, "gamma": 1 / 16}, 0.0),
    "CosPlus_eta05_s16": (PRE, {"scale": 16.0, "gamma": 1 / 32, "eta": 0.5}, 0.0),
    "CosPlus_eta2_s10": (PRE, {"scale": 10.0, "gamma": 1 / 32, "eta": 2.0}, 0.0),
    "CosPlus_noavg": (COS, {"scale": 1.0, "gamma": 1 / 32}, 0.0),
    "PostProc_Cos_t01_g32": (COS, {"scale": 10.0, "gamma": 1 / 32}, 0.1),
    "PostProc_Cos_t15_g32": (COS, {"scale": 10.0, "gamma": 1 / 32}, 1.5),
    "PostProc_Cos_t17_g16": (COS, {"scale": 10.0, "gamma": 1 / 16}, 1.7),
}


@pytest.mark.parametrize("classes", [10, 100])
@pytest.mark.parametrize("case", HEADS)
def test_classifiers(reference, recipe, classes, case):
    file, at, (names, cosine, tau) = "classifiers_f64", f"c{classes}/{case}", HEADS[case]
    weights = {name: reference(file, f"c{classes}/weights/{names}/{name}") for name in names.split("+")}
    weight, bias = (weights.get(name, weights.get(f"fc.{name}")) for name in ("weight", "bias"))
    counts = reference("losses_f64", f"c{classes}/samples_per_cls")
    features, cotangent = reference(file, "features")[0], reference(file, f"c{classes}/cotangent")

    def logits_fn(features, weight, bias):
        if cosine is None:
            z = classifiers.linear_logits(features, weight, bias)
        else:
            z = classifiers.cosine_logits(features, weight, **cosine)
        return classifiers.adjust_for_prior(z, counts, tau=tau)

    logits, pullback = jax.vjp(logits_fn, features, weight, bias)
    dx, dw, db = pullback(jnp.asarray(cotangent))
    if case.startswith("Cos"):
        logits = logits + bias[None]  # the released head adds its frozen bias, zero but in this one check
    for mode in "eval", "train":
        reference.check("classifiers", file, f"{at}/{mode}/logits", logits)
        if classes == 10:
            reference.check("classifiers", file, f"{at}/{mode}/grad_x_checksum", recipe.checksum(dx))
    if classes == 100:
        return
    reference.check("classifiers", file, f"{at}/train/grad_x_row0", dx[0])
    fc = "fc." if cosine is None else ""
    reference.check("classifiers", file, f"{at}/train/grad/{fc}weight", dw[0])
    reference.check("classifiers", file, f"{at}/train/grad_checksum/{fc}weight", recipe.checksum(dw))
    if case == "FC":  # the bias of the others is frozen there
        reference.check("classifiers", file, f"{at}/train/grad/fc.bias", db)
        reference.check("classifiers", file, f"{at}/train/grad_checksum/fc.bias", recipe.checksum(db))


@pytest.mark.parametrize("classes", [10, 100])
def test_prior_bias(reference, classes):
    counts = reference("losses_f64", f"c{classes}/samples_per_cls")
    shift = -classifiers.adjust_for_prior(jnp.zeros((1, classes)), counts, tau=1.0)[0]
    reference.check("classifiers", "classifiers_f64", f"c{classes}/const/PostProc_prior_bias_t1", shift)


# -------------------------------------------------------------------------------------------- networks

BARE = {"backbone.": ""}
NETS = {  # network, prefixes of its names, seed of the second batch, batch
    "wrn10_2": (functools.partial(models.WideResNet, 10, 2), None, 551, 8),
    "wrn16_1": (functools.partial(models.WideResNet, 16, 1), None, 552, 8),
    "wrn10_1_fc": (functools.partial(models.WideResNet, 10, 1), BARE | {"classifier.": "fc."}, 553, 8),
    "wrn10_1_silu": (functools.partial(models.WideResNet, 10, 1, nn.silu), None, 554, 8),
    "wrn34_10": (functools.partial(models.WideResNet, 34, 10), None, 555, 2),
    "resnet18": (models.ResNet18, BARE | {"classifier.": "linear."}, 556, 4),
}


def imported(recipe, name, model, prefixes=None):
    """Parameters and statistics of one of the released code's networks, float64."""
    like = jax.eval_shape(model.init, jax.random.key(0), jax.ShapeDtypeStruct((1, 32, 32, 3), float))
    weights = {key: np.asarray(value, float) for key, value in recipe.net_state(name).items()}
    return torch_import.from_state_dict(weights, *like, prefixes)


def checksums(recipe, arrays, names):
    return np.stack([recipe.checksum(arrays[name]) for name in names])


def check_network(reference, recipe, group, file, name, convolution):
    backbone, prefixes, seed, batch = NETS[name]
    network = backbone(convolution=convolution)
    if prefixes is not None:
        network = models.Network(network, classifiers.LinearHead(10))
    model = models.functional(network)
    params, stats = imported(recipe, name, model, prefixes)
    to_state_dict = functools.partial(torch_import.to_state_dict, prefixes=prefixes)
    check = functools.partial(reference.check, group, file)

    x, cotangent = nhwc(reference(file, f"{name}/x")), reference(file, f"{name}/cotangent")
    names = sorted(recipe.net_state(name))
    ours = [i for i, key in enumerate(names) if not key.endswith("num_batches_tracked")]
    rows = checksums(recipe, to_state_dict(params, stats), [names[i] for i in ours])
    check(f"{name}/param_checksum", rows, rows=ours)

    @jax.jit
    def evaluate(stats, x):
        out, pullback = jax.vjp(lambda x: model.predict(params, stats, x), x)
        return out, pullback(cotangent)[0]

    @jax.jit
    def step(params, stats, x):
        out, pullback, moments = jax.vjp(lambda p, x: model.train(p, stats, x), params, x, has_aux=True)
        return out, pullback(cotangent), models.update_statistics(stats, (moments,))

    out, dx = evaluate(stats, x)
    check(f"{name}/eval/out", out)
    check(f"{name}/eval/grad_x", nchw(dx)[0])
    check(f"{name}/eval/grad_x_checksum", recipe.checksum(nchw(dx)))

    out, (gradients, dx), stats = step(params, stats, x)
    check(f"{name}/train/out", out)
    check(f"{name}/train/grad_x", nchw(dx)[0])
    check(f"{name}/train/grad_x_checksum", recipe.checksum(nchw(dx)))
    gradients = to_state_dict(gradients, {})
    param_names = list(reference(file, f"{name}/param_names"))
    assert set(param_names) == set(gradients)
    check(f"{name}/train/grad_checksum", checksums(recipe, gradients, param_names))
    for key in gradients:
        if f"{name}/train/grad/{key}" in reference.load(file):
            check(f"{name}/train/grad/{key}", gradients[key])

    bn_names = reference(file, f"{name}/bn_names")
    ours = [i for i, key in enumerate(bn_names) if not key.endswith("num_batches_tracked")]
    for passes in 1, 2:
        if passes == 2:
            _, _, stats = step(params, stats, nhwc(recipe.images(seed, batch)))
        buffers = to_state_dict({}, stats)
        rows = checksums(recipe, buffers, bn_names[ours])
        check(f"{name}/train/bn_checksum_after{passes}", rows, rows=ours)
        for key in buffers:
            if f"{name}/train/bn_after{passes}/{key}" in reference.load(file):
                check(f"{name}/train/bn_after{passes}/{key}", buffers[key])
    check(f"{name}/eval_after/out", evaluate(stats, x)[0])


@pytest.mark.parametrize("name", ["wrn10_2", "wrn16_1", "wrn10_1_fc", "wrn10_1_silu"])
def test_small_networks(reference, recipe, name):
    check_network(reference, recipe, "small networks", "network_small_f64", name, models.convolution)


def test_loop_convolution(reference, recipe):
    group = "small network, loop_convolution"
    check_network(reference, recipe, group, "network_small_f64", "wrn16_1", models.loop_convolution)


# float32 runs part by 1e-2 in the training gradients of these (ReLU kinks); float64 ones do not meet a kink.
@pytest.mark.slow
@pytest.mark.parametrize("name", ["wrn34_10", "resnet18"])
def test_big_networks(reference, recipe, name):
    check_network(reference, recipe, "big networks", "network_big_f64", name, models.convolution)


# --------------------------------------------------------------------------------------------- attacks

BACKBONE = models.WideResNet(10, 1, convolution=models.loop_convolution)
EPSILON, STEP = 0.031, 0.0078
THREAT = attacks.ThreatModel(EPSILON)
ATTACKS = {  # size and array of the start noise, settings of the path, which replay
    "FGSM": (0.0, "eval", {"steps": 1, "step_size": EPSILON}, "replay_signs_eval"),
    "PGD20": (1.0, "eval", {"steps": 20}, "replay_signs_eval"),
    "MIM20": (1.0, "eval", {"steps": 20, "momentum": 1.0}, "replay_signs_eval"),
    "CW20": (1.0, "eval", {"steps": 20, "loss": attacks.negative_margin}, "replay_signs_eval"),
    "TRAINPGD5": (EPSILON, "uniform01", {"steps": 5}, "replay_signs"),
    "TRAINPGD5_gauss": (0.001, "gauss", {"steps": 5}, "replay_signs"),
}


@pytest.fixture(scope="module")
def attacked(reference, recipe):
    """The attacked model, its images and labels."""
    model = models.functional(models.Network(BACKBONE, classifiers.LinearHead(10)))
    params, stats = imported(recipe, "attacknet", model)
    file = "attacks_f64"
    assert tuple(reference(file, "eps_step")) == (EPSILON, STEP)
    logits_fn = jax.jit(lambda x: model.predict(params, stats, x))
    return logits_fn, nhwc(reference(file, "x")), jnp.asarray(reference(file, "y"))


def attack_path(attacked, start, *, steps, step_size=STEP, **settings):
    """The start and the images after every step, ``[steps + 1, B, H, W, C]``."""
    logits_fn, x, y = attacked
    settings = {"threat": THREAT, "steps": tuple(range(1, steps + 1)), "step_size": step_size, **settings}
    path = jax.jit(lambda start: attacks.pgd_path(logits_fn, start, x, y, **settings))(start)
    return jnp.concatenate([start[None], path])


@pytest.mark.parametrize("name", ATTACKS)
def test_attacks(reference, recipe, attacked, name):
    file, (size, noise, settings, replay) = "attacks_f64", ATTACKS[name]
    check = functools.partial(reference.check, "attacks", file)
    logits_fn, x, y = attacked
    start = x + size * nhwc(reference("attacks", f"noise/{noise}"))
    path = attack_path(attacked, start, **settings)

    # Every step's images: the released ones follow from the stored signs.
    signs = reference(file, f"{name}/grad_sign")
    step_size = settings.get("step_size", STEP)
    rebuilt = getattr(recipe, replay)(nchw(start), nchw(x), signs, step_size, EPSILON, dtype=np.float64)
    assert np.abs(nchw(path[1:]) - np.stack(rebuilt)).max() < 1e-12
    check(f"{name}/x_end", nchw(path[-1]))
    if f"{name}/x_step1" in reference.load(file):
        check(f"{name}/x_step1", nchw(path[1]))

    logits = jax.lax.map(logits_fn, path)
    check(f"{name}/logits", logits)
    check(f"{name}/pred", logits.argmax(-1), 0)
    if f"{name}/err" in reference.load(file):
        errors = [(logits_fn(images).argmax(-1) != y).sum() for images in (x, path[-1])]
        check(f"{name}/err", np.stack(errors), 0)

    # What is stepped along, at the images before each step.
    loss = settings.get("loss", losses.cross_entropy)
    batch_loss = jax.value_and_grad(lambda x: loss(logits_fn(x), y).mean())
    values, gradients = jax.lax.map(batch_loss, path[:-1])
    check(f"{name}/loss", values)
    if "momentum" in settings:
        gradients = (gradients / jnp.abs(gradients).mean((2, 3, 4), keepdims=True)).cumsum(0)
    check(f"{name}/grad_sign", np.sign(nchw(gradients)), 0)
    means = jnp.abs(gradients).mean((2, 3, 4))
    check(f"{name}/grad_absmean", means)
    tiny = jnp.abs(gradients) < 1e-5 * means[:, :, None, None, None]
    check(f"{name}/grad_tiny", tiny.sum((1, 2, 3, 4)), 0)


def test_basic_evaluation(reference, attacked):
    file, (logits_fn, x, _) = "attacks_f64", attacked
    check = functools.partial(reference.check, "attacks", file)
    start = x + nhwc(reference("attacks", "noise/eval"))
    path = attack_path(attacked, start, steps=20)
    for steps in 5, 10, 20:
        check(f"basic/PGD-{steps}", logits_fn(path[steps]))
    check("basic/FGSM", logits_fn(attack_path(attacked, x, steps=1, step_size=EPSILON)[1]))
    check("basic/CLEAN", logits_fn(x))
    check("clean_logits", logits_fn(x))


# -------------------------------------------------------------------------------------------- training

ROBAL_HEAD = classifiers.CosineHead(10, gamma=1 / 32)
MODES = {  # head, loss, objective, its settings
    "pgd_at": (classifiers.LinearHead(10), None, objectives.pgd_at, {}),
    "pgd_at_gauss": (classifiers.LinearHead(10), None, objectives.pgd_at, {}),
    "pgd_at_cos_HE": (classifiers.CosineHead(10), "UniMargin_m02_s10", objectives.pgd_at, {}),
    "robal_N": (ROBAL_HEAD, "MultiMargin_c10N", objectives.robal, {"beta_reg": 6.0}),
    "robal_R": (ROBAL_HEAD, "MultiMargin_c10R", objectives.robal, {"beta_reg": 6.0}),
}
RATE, MOMENTUM, DECAY = 0.1, 0.9, 2e-4


@pytest.mark.parametrize("mode", MODES)
def test_training_steps(reference, recipe, mode):
    file, (head, loss, objective, settings) = "train_step_f64", MODES[mode]
    model = models.functional(models.Network(BACKBONE, head))
    loss_fn = losses.cross_entropy
    if loss is not None:
        counts = reference("losses_f64", "c10/samples_per_cls")
        loss_fn = functools.partial(losses.robal, class_counts=counts, **ROBAL[loss])
    size = 0.001 if mode == "pgd_at_gauss" else EPSILON
    path_fn = functools.partial(attacks.pgd_path, threat=THREAT, steps=(1, 2, 3, 4, 5), step_size=STEP)

    def attack(logits_fn, noise, images, labels):  # the released noise stands where the keys go
        return path_fn(logits_fn, images + size * noise, images, labels)[-1]

    moments_made = []

    def objective_fn(*args):
        value, outcome = objective(*args, attack=attack, loss=loss_fn, **settings)
        moments_made.append(len(outcome.moments))
        return value, outcome

    optimizer = state.sgd(lambda _: RATE, momentum=MOMENTUM, weight_decay=DECAY)

    @jax.jit
    def step(before, images, labels, noise):
        predict = functools.partial(model.predict, before.params, before.stats)
        start = images + size * noise
        path = jnp.concatenate([start[None], path_fn(predict, start, images, labels)])
        passes = [model.train(before.params, before.stats, x)[0] for x in (path[-1], images)]
        after = train.train_step(
            before, images, labels, noise, model=model, objective=objective_fn, optimizer=optimizer
        )
        return *after, path, jax.lax.map(predict, path[:-1]), passes

    params, stats = imported(recipe, f"trainnet_{mode}", model)
    now = state.TrainState(jnp.int32(0), params, stats, optimizer.init(params))
    names = list(reference(file, f"{mode}/param_names"))
    ours = [i for i, name in enumerate(names) if name in torch_import.to_state_dict(params, {})]
    frozen = {name for i, name in enumerate(names) if i not in ours}
    assert frozen <= {"classifier.bias", "classifier.moving_ed"}
    for i in range(3):
        bound = SINGLE if i == 0 else TRAINED
        check = functools.partial(reference.check, f"training, {mode}", file, bound=bound)
        at = f"{mode}/step{i}"
        x, y = recipe.images(700 + i, 8), reference(file, f"input/y{i}")
        noise = (recipe.normal if mode == "pgd_at_gauss" else recipe.uniform)(
            (720 if mode == "pgd_at_gauss" else 710) + i, x.shape
        )
        before = now
        now, metrics, path, attack_logits, (adv, nat) = step(before, nhwc(x), jnp.asarray(y), nhwc(noise))
        check(f"{at}/loss", metrics["loss"])

        signs = reference(file, f"{at}/grad_sign")
        rebuilt = recipe.replay_signs(nchw(path[0]), x, signs, STEP, EPSILON, dtype=np.float64)
        check(f"{at}/grad_sign", nchw(path[1:]), theirs=np.stack(rebuilt))
        check(f"{at}/attack_logits", attack_logits)
        natural = reference(file, f"{at}/train_forward_is_natural")
        check(f"{at}/train_logits", np.stack([nat if is_natural else adv for is_natural in natural]))
        check(f"{at}/bn_updates", (i + 1) * moments_made[0], bound=0)

        trace, trace_before = (s.opt_state[1].trace for s in (now, before))
        gradients = jax.tree.map(
            lambda v, u, p: v - MOMENTUM * u - DECAY * p, trace, trace_before, before.params
        )
        for what, tree in (("grad", gradients), ("param", now.params), ("momentum", trace)):
            arrays = torch_import.to_state_dict(tree, {})
            rows = checksums(recipe, arrays, [names[j] for j in ours])
            check(f"{at}/{what}_checksum", rows, rows=ours)
            for name in arrays:
                key = {"grad": f"{at}/grad/{name}", "param": f"{at}/full/{name}"}.get(what)
                if key in reference.load(file):
                    check(key, arrays[name])
        buffers = torch_import.to_state_dict({}, now.stats)
        check(f"{at}/bn_checksum", checksums(recipe, buffers, reference(file, f"{mode}/bn_names")))
        for name in buffers:
            if f"{at}/full/{name}" in reference.load(file):
                check(f"{at}/full/{name}", buffers[name])


# -------------------------------------------------------------------------------------------- schedule


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
