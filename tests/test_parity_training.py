"""Training steps and learning rates against the released code, float64: see parity.py."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from parity import BACKBONE, EPSILON, SINGLE, STEP, THREAT, TRAINED, checksums, imported, nchw, nhwc

from robal_jax import attacks, classifiers, losses, models, objectives, state, torch_import, train

pytestmark = [pytest.mark.parity, pytest.mark.usefixtures("float64")]

ROBAL = {
    "MultiMargin_c10N": {"margin": 0.1, "scale": 10.0, "tau_b": 1.2, "tau_m": 0.0},
    "MultiMargin_c10R": {"margin": 0.1, "scale": 10.0, "tau_b": 1.5, "tau_m": 0.3},
    "UniMargin_m02_s10": {"margin": 0.2, "scale": 10.0, "tau_b": 0.0, "tau_m": 0.0},
}
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
