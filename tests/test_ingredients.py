"""What makes robust training strong, by itself and all at once: averages, AWP, budgets, mixing, modes."""

import json
import os
import subprocess
import sys
from functools import partial

import ingredients
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import ROOT

from robal_jax import (
    attack_modes,
    attacks,
    averages,
    budgets,
    builder,
    cli,
    load_run,
    losses,
    models,
    objectives,
    perturbations,
    training,
)
from robal_jax.averages import Weights
from robal_jax.data import draw_cutmix
from robal_jax.devices.parallel import AXIS
from robal_jax.errors import InputError
from robal_jax.keys import ALIGNMENT, fold_in
from robal_jax.storage import checkpoints
from robal_jax.storage.config_file import ingredients as ingredients_of
from robal_jax.training import TrainState
from robal_jax.training import step as training_step
from robal_jax.training.step import Extras

THREAT = attacks.ThreatModel(0.1)
IMAGES, LABELS = jax.random.uniform(jax.random.key(1), (8, 4)), jnp.arange(8) % 3
KEYS = jax.random.split(jax.random.key(2), 8)


def linear_model():
    """A linear model whose training pass leaves the mean of its images."""

    def train(params, stats, images):
        return images @ params["kernel"], {"mean": images.mean(0)}

    return models.Model(None, lambda params, stats, x: x @ params["kernel"], train, None, None)


NO_AVERAGE = averages.none(1)


def state_of(optimizer, average=NO_AVERAGE, classes=None):
    params = {"kernel": jax.random.normal(jax.random.key(0), (4, 3))}
    stats = {"mean": jnp.zeros(4)}
    return TrainState(
        jnp.int32(0),
        params,
        stats,
        optimizer.init(params),
        average.init(Weights(params, stats)),
        classes or {},
    )


def pgd_at(model, params, stats, batch, known=objectives.NOTHING_KNOWN, *, attacked=None):
    """Adversarial training with an attack that notes the weights that it attacks."""

    def attack(logits_fn, keys, images, labels):
        if attacked is not None:
            attacked.append(logits_fn)
        return images + 0.01 * jnp.sign(logits_fn(jnp.eye(4)).sum(-1))[None]

    if known.adversarial is not None:
        attack = partial(attack_modes.known, known.adversarial)
    return objectives.pgd_at(model, params, stats, batch, attack=attack, loss=losses.cross_entropy)


def one_step(state, optimizer, extras, epoch=1, parts=1, objective=pgd_at):
    batch = objectives.Batch(IMAGES, LABELS, KEYS, epoch)
    return training_step.train_step(
        state, batch, model=linear_model(), objective=objective, optimizer=optimizer, extras=extras,
        accumulation_steps=parts,
    )  # fmt: skip


# ---------------------------------------------------------------- all at once


@pytest.fixture(scope="module")
def everything(tmp_path_factory):
    """The folder of a run with everything on, and its last state; it compiles once."""
    folder, original, traces = tmp_path_factory.mktemp("runs") / "everything", training.train_chunk, []
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(training_step, "train_chunk", lambda *a, **k: traces.append(1) or original(*a, **k))
        path = training.train(ingredients.get_config(), folder, say=lambda line: None)
    assert len(traces) == 1
    found = checkpoints.read_latest(folder)
    assert found.path == path
    return folder, found.tree


@pytest.mark.long
@pytest.mark.slow
def test_a_run_with_everything_on(everything):
    _, state = everything
    current, average = (averages.chosen(state, which) for which in averages.WEIGHTS)
    gaps = jax.tree.map(lambda a, b: np.max(np.abs(a - b)), current["params"], average["params"])
    assert max(jax.tree.leaves(gaps)) > 1e-4
    radii = state["classes"]["radii"]
    assert len(set(radii.tolist())) > 1  # they follow the classes
    assert (radii >= 0.5 * 0.031 - 1e-7).all()


# ---------------------------------------------------------------- averages


def test_an_average_that_warms_up_is_a_copy():
    average = averages.ema(10, decay=0.9, warmup=0.5)
    kept = {"params": jnp.zeros(3)}
    for step in range(1, 9):
        new = Weights(jnp.full(3, float(step)) / 3, {})
        kept = average.update(kept, step, None, new)
        assert (kept["params"] == new.params).all() == (step < 5)


def test_weights_are_copied_until_the_first_end_that_counts():
    average = averages.swa(2, start=2)
    weights = [Weights(jnp.array([float(i)]), {}) for i in range(9)]
    kept, found = {"params": weights[0].params, "stats": {}}, []
    for step in range(1, 9):
        kept = average.update(kept, jnp.int32(step), weights[step - 1], weights[step])
        found.append(float(kept["params"][0]))
    assert found == [1, 2, 3, 4, 5, 6, 6, 6]


def test_decay_rises_to_its_limit():
    decays = averages.ema_decay(jnp.arange(1, 3000), decay=0.995)
    assert (jnp.diff(decays) >= 0).all()
    np.testing.assert_allclose(decays[:2], [2 / 11, 3 / 12], rtol=1e-6)
    assert decays[1788] < 0.995 == pytest.approx(float(decays[1790]))
    np.testing.assert_allclose(averages.ema_decay(1, decay=0.995, count_from=0), 0.1, rtol=1e-6)


@pytest.mark.parametrize("name", ["per_epoch", "swa"])
def test_averages_over_epochs_move_at_their_ends(name):
    average = averages.AVERAGES[name](steps_per_epoch=2)
    weights = [Weights(jnp.array([float(i)]), {"mean": jnp.array([float(-i)])}) for i in range(9)]
    kept, moved = average.init(weights[0]), []
    for step in range(1, 9):
        before, kept = kept, average.update(kept, jnp.int32(step), weights[step - 1], weights[step])
        assert step > 2 or kept["params"] == weights[step].params
        if before["params"] != kept["params"]:
            moved.append(step)
    # Copies in the first epoch. Then per_epoch: with the last step of one; swa: with the first of the next.
    assert moved == ([1, 2, 4, 6, 8] if name == "per_epoch" else [1, 2, 5, 7])
    if name == "swa":
        np.testing.assert_allclose(kept["params"], (2 + 4 + 6) / 3, rtol=1e-6)
    else:
        expected = 2.0
        for later in (4, 6, 8):
            expected = 0.88 * expected + 0.12 * later
        np.testing.assert_allclose(kept["params"], expected, rtol=1e-6)
        np.testing.assert_allclose(kept["stats"]["mean"], -expected, rtol=1e-6)


@pytest.mark.slow
def test_an_average_of_equal_weights_has_their_statistics_estimated_anew():
    """SWA's statistics are the mean over the epoch of the averaged network's own moments."""
    optimizer, average = optax.sgd(0.1), averages.swa(3)
    state = state_of(optimizer, average)
    for _ in range(5):
        state, _ = one_step(state, optimizer, Extras(average=average, steps_per_epoch=3))
    # Of this network a pass has the mean of its images, which are those of the attack on current weights.
    assert np.abs(state.average["stats"]["mean"] - IMAGES.mean(0)).max() < 0.011
    assert not np.array_equal(state.average["stats"]["mean"], state.stats["mean"])


@pytest.mark.slow
def test_runs_show_the_weights_that_are_asked_for(everything):
    folder, state = everything
    for weights, part in ((None, state["average"]), ("average", state["average"]), ("current", state)):
        run = load_run(folder, weights=weights)
        for a, b in zip(jax.tree.leaves(run.params), jax.tree.leaves(part["params"]), strict=True):
            np.testing.assert_array_equal(a, b)
    with pytest.raises(InputError, match="weights is 'best'; use current or average"):
        load_run(folder, weights="best")


@pytest.mark.slow
def test_an_evaluation_of_the_weights_that_are_asked_for(everything):
    folder, state = everything
    for weights, name, part in (
        ("average", "evaluation", state["average"]),
        ("current", "evaluation-current", state),
    ):
        flags = f"--workdir={folder}", f"--weights={weights}", "--autoattack=none"
        done = subprocess.run(
            [sys.executable, "experiments/evaluate.py", *flags],
            cwd=ROOT, env={**os.environ, "PYTHONPATH": "tests"}, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        norms = np.linalg.norm(part["params"]["classifier"]["weight"], axis=-1)
        found = json.loads((folder / name / "results.json").read_text())["norms"]["weights"]
        np.testing.assert_allclose(found, norms, rtol=1e-6)  # of float32; the two weights differ by more


def test_a_checkpoint_without_an_average_says_so():
    with pytest.raises(InputError, match="'average', but the checkpoint has none; use 'current', or train"):
        averages.chosen({"params": {}, "stats": {}}, "average")


# ---------------------------------------------------------------- AWP


def awp_step(epoch, parts=1, start=2):
    optimizer = optax.chain(optax.add_decayed_weights(0.1), optax.sgd(0.1, momentum=0.9))
    extras = Extras(perturbations.awp(0.05, start))
    return one_step(state_of(optimizer), optimizer, extras, epoch, parts)


def perturbed_step(state, direction_of):
    """Perturbed weights of a state, and the gradient there, from the direction that a gradient gives."""
    kernel, batch = state.params["kernel"], objectives.Batch(IMAGES, LABELS, KEYS, 2)
    _, outcome = pgd_at(linear_model(), state.params, state.stats, batch)
    known = objectives.Known(adversarial=outcome.attacked.images)

    def gradient(kernel):
        return jax.grad(lambda k: pgd_at(linear_model(), {"kernel": k}, state.stats, batch, known)[0])(kernel)

    direction = direction_of(gradient(kernel))
    perturbed = kernel + 0.05 * jnp.linalg.norm(kernel) * direction / jnp.linalg.norm(direction)
    return perturbed, gradient(perturbed)


@pytest.mark.slow
def test_awp_is_the_step_at_perturbed_weights():
    state = state_of(optax.sgd(0.1))
    perturbed, gradient = perturbed_step(state, lambda gradient: gradient)
    expected = state.params["kernel"] - 0.1 * (gradient + 0.1 * perturbed)
    np.testing.assert_allclose(awp_step(2)[0].params["kernel"], expected, rtol=2e-6, atol=1e-7)


@pytest.mark.slow
def test_awp_along_a_step_of_the_optimiser_up_the_loss():
    optimizer = optax.chain(optax.add_decayed_weights(0.1), optax.sgd(0.1, momentum=0.9))
    state, _ = one_step(state_of(optimizer), optimizer, training_step.NO_EXTRAS)
    kernel, momentum = state.params["kernel"], optax.tree.get(state.opt_state, "trace")["kernel"]
    extras = Extras(perturbations.awp(0.05, direction="optimizer"))
    found, _ = one_step(state, optimizer, extras, 2)
    perturbed, gradient = perturbed_step(state, lambda up: up - 0.1 * kernel - 0.9 * momentum)
    expected = kernel - 0.1 * (0.9 * momentum + gradient + 0.1 * perturbed)
    np.testing.assert_allclose(found.params["kernel"], expected, rtol=2e-6, atol=1e-7)


@pytest.mark.slow
def test_awp_attacks_once():
    attacked, optimizer = [], optax.sgd(0.1)
    objective = partial(pgd_at, attacked=attacked)
    one_step(state_of(optimizer), optimizer, Extras(perturbations.awp()), objective=objective)
    assert len(attacked) == 1


@pytest.mark.slow
@pytest.mark.parametrize("parts", [2, 4])
def test_awp_in_parts_is_that_of_the_batch(parts):
    whole, cut = awp_step(2), awp_step(2, parts)
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(cut), strict=True):
        np.testing.assert_allclose(b, a, rtol=2e-5, atol=1e-6)


@pytest.mark.slow
def test_awp_starts_in_its_epoch():
    plain = [awp_step(epoch, start=100)[0].params["kernel"] for epoch in (1, 2)]
    found = [awp_step(epoch)[0].params["kernel"] for epoch in (1, 2, 3)]
    np.testing.assert_array_equal(found[0], plain[0])
    assert np.abs(found[1] - plain[1]).max() > 1e-4
    np.testing.assert_array_equal(found[2], found[1])


def test_a_perturbation_spares_vectors():
    params = {"scale": jnp.ones(3), "kernel": jnp.ones((3, 3))}
    found = perturbations.awp(0.1).perturb(params, params, 1)
    np.testing.assert_array_equal(found["scale"], params["scale"])
    np.testing.assert_allclose(found["kernel"], 1.1)


# ---------------------------------------------------------------- budgets


def radii_in(epochs, budget, steps_per_epoch=2):
    """Radii of the images that the steps of some epochs see, through a chunk of steps."""
    count = epochs * steps_per_epoch

    def objective(model, params, stats, batch, known):
        value = jnp.mean((batch.images @ params["kernel"]) ** 2)
        seen = (
            jnp.zeros((count, 8)).at[(batch.epoch - 1) * steps_per_epoch].add(known.radii / steps_per_epoch)
        )
        return value, objectives.Outcome(({"mean": batch.images.mean(0)},), {"seen": seen})

    optimizer = optax.sgd(0.0)
    step = partial(
        training_step.train_step, model=linear_model(), objective=objective, optimizer=optimizer,
        extras=Extras(budget=budget, steps_per_epoch=steps_per_epoch),
    )  # fmt: skip
    _, sums = training.train_chunk(
        state_of(optimizer),
        training.Examples(jnp.zeros((8, 4), jnp.uint8), LABELS),
        jnp.arange(8).reshape(1, 1, 8).repeat(count, 0),
        count,
        jax.random.key(0),
        jnp.arange(8)[None],
        step_fn=step,
        steps_per_epoch=steps_per_epoch,
        pixel_max=255,
        augment=lambda keys, images: images,
    )
    return sums["seen"][::steps_per_epoch]


def test_which_radius_a_step_sees():
    """The ramp counts epochs from 1: 0 in all steps of the first, everything from 1 + beta T on."""
    of_class = np.array([0.1, 0.2, 0.4])
    seen = radii_in(5, budgets.ramped(budgets.fixed(of_class), epochs=5, beta=0.6))
    factors = np.array([0, 1 / 3, 2 / 3, 1, 1])
    np.testing.assert_allclose(seen, factors[:, None] * of_class[np.array(LABELS)], rtol=1e-6)


def test_mixed_images_have_a_radius_between():
    of_class, share = jnp.array([0.1, 0.2, 0.4]), jnp.full(8, 0.25)
    batch = objectives.Batch(IMAGES, LABELS, KEYS, 1)
    partners = objectives.Partners(jnp.full(8, 2), share)
    found = training_step._radii(of_class, batch, partners)
    np.testing.assert_allclose(found, 0.25 * of_class[LABELS] + 0.75 * 0.4, rtol=1e-6)


def logits_for(predictions):
    return 10.0 * jax.nn.one_hot(jnp.array(predictions), 3)


@pytest.mark.parametrize(("given", "lambda1"), [({}, 0.5), ({"lambda1": 0.3}, 0.3)])
def test_cfa_follows_the_last_epoch_from_its_start(given, lambda1):
    budget = budgets.cfa(np.array([4, 4, 4]), 0.1, start=2, **given)
    classes, labels = budget.statistics.init(), jnp.array([0, 0, 1, 1])
    for epoch, predictions in ((1, [0, 0, 1, 0]), (2, [0, 1, 1, 1]), (3, [1, 1, 0, 0])):
        for ends in (False, True):  # two steps per epoch with the same outcome
            seen = budget.statistics.seen(labels, logits_for(predictions))
            classes = budget.statistics.update(classes, seen, epoch, jnp.bool_(ends))
            if not ends:
                np.testing.assert_array_equal(classes["shown"], [2, 2, 0])
        accuracies = {1: None, 2: np.array([0.5, 1.0, 0.0]), 3: np.zeros(3)}[epoch]
        expected = np.full(3, 0.1) if accuracies is None else 0.1 * (lambda1 + accuracies)
        np.testing.assert_allclose(budget.radii(classes, epoch + 1), expected, rtol=1e-6)
        assert not classes["shown"].any()


@pytest.mark.slow
@pytest.mark.parametrize(("given", "scale"), [({}, 1.0), ({"scale": 1.5}, 1.5)])
def test_dafa_measures_one_epoch(given, scale):
    budget = budgets.dafa(np.array([4, 4, 4]), 0.1, epoch=2, **given)
    classes, labels = budget.statistics.init(), jnp.array([0, 0, 1, 1])
    kept = []
    for epoch, predictions in ((1, [1, 1, 0, 0]), (2, [0, 1, 1, 1]), (3, [2, 2, 2, 2])):
        seen = budget.statistics.seen(labels, logits_for(predictions))
        classes = budget.statistics.update(classes, seen, epoch, jnp.bool_(True))
        kept.append(np.asarray(budget.radii(classes, epoch + 1)))
    np.testing.assert_allclose(kept[0], 0.1, rtol=1e-6)
    probabilities = jax.nn.softmax(logits_for([0, 1, 1, 1]))
    sums = jnp.zeros((3, 3)).at[labels].add(probabilities)
    weights = budgets.dafa_weights(budgets.dafa_similarity(sums, jnp.array([2, 2, 0])))
    assert ((weights > 0.4) & (weights < 1.6)).all()  # so that none is 0 for either scale
    np.testing.assert_allclose(kept[1], 0.1 * (1 + scale * (weights - 1)), rtol=1e-6)
    assert kept[1][0] > 0.1 > kept[1][1]
    np.testing.assert_array_equal(kept[2], kept[1])


# ---------------------------------------------------------------- mixing


def mixed_on(devices):
    """Images and partners of a step of 8 images, spread over devices in order."""
    images = jnp.arange(8, dtype=jnp.uint8)[:, None, None, None] * jnp.ones((8, 6, 6, 1), jnp.uint8)
    split = [x.reshape(devices, -1, *x.shape[1:]) for x in (images, LABELS, jnp.arange(8))]
    mixed = partial(training_step._mixed, jax.random.key(5), axis_name=AXIS)
    found = jax.jit(jax.vmap(mixed, axis_name=AXIS))(*split)
    return jax.tree.map(lambda x: np.asarray(x.reshape(8, *x.shape[2:])), found)


@pytest.mark.slow
def test_partners_may_be_on_any_device():
    images, partners = mixed_on(1)
    for devices in (2, 4):
        for a, b in zip(jax.tree.leaves((images, partners)), jax.tree.leaves(mixed_on(devices)), strict=True):
            np.testing.assert_array_equal(a, b)
    box, order = draw_cutmix(jax.random.key(5), 8, (6, 6))
    area = int(box[2] * box[3])
    assert 0 < area < 36
    np.testing.assert_allclose(partners.share, 1 - area / 36, rtol=1e-6)
    np.testing.assert_array_equal(partners.labels, LABELS[order])
    for i in range(8):
        values, counts = np.unique(images[i], return_counts=True)
        expected = {i: 36} if order[i] == i else {i: 36 - area, int(order[i]): area}
        assert dict(zip(values.tolist(), counts.tolist(), strict=True)) == expected


def test_a_loss_of_two_labels_is_the_cross_entropy_to_the_soft_label():
    logits, partners = jax.random.normal(jax.random.key(0), (8, 3)), (LABELS + 1) % 3
    share = jnp.linspace(0, 1, 8)
    both = losses.shared(losses.cross_entropy, partners=partners, share=share)
    soft = share[:, None] * jax.nn.one_hot(LABELS, 3) + (1 - share[:, None]) * jax.nn.one_hot(partners, 3)
    expected = optax.losses.softmax_cross_entropy(logits, soft)
    np.testing.assert_allclose(both(logits, LABELS), expected, rtol=1e-5)


# ---------------------------------------------------------------- the attack of a training


def test_a_second_step_of_each_step_has_its_own_threat_model():
    """Logits of a linear model: images of class 1 become brighter, those of class 0 darker."""
    images, labels = jnp.full((2, 1, 1, 1), 0.5), jnp.array([0, 1])
    path = attacks.pgd_path(
        lambda x: jnp.outer(x.reshape(-1) - 0.5, jnp.array([1.0, -1.0])), images, images, labels,
        threat=THREAT, steps=(1, 2, 3), step_size=0.04,
        second=(attacks.ThreatModel(jnp.array([0.105, 0.2])), 0.01),
    )  # fmt: skip
    # The third step is cut at 0.1, and the one after it ends at 0.105 for the first image.
    expected = 0.5 + np.array([[-0.05, 0.05], [-0.1, 0.1], [-0.105, 0.11]])
    np.testing.assert_allclose(path.reshape(3, 2), expected, rtol=1e-6)


@pytest.mark.parametrize(("momentum", "share"), [(None, 0.1), (0.25, 0.25)])
def test_an_attack_after_a_natural_pass_sees_moved_statistics(momentum, share):
    centred = linear_model()._replace(predict=lambda p, s, x: (x - s["mean"][None]) @ p["kernel"])
    params, stats = {"kernel": jax.random.normal(jax.random.key(0), (4, 3))}, {"mean": jnp.full(4, 3.0)}
    batch, attacked = objectives.Batch(IMAGES, LABELS, KEYS, 1), []
    first = partial(attack_modes.natural_pass_first, centred, params, stats, batch, momentum=momentum)
    _, outcome = first(objective=partial(pgd_at, attacked=attacked))
    moved = (1 - share) * 3.0 + share * np.float64(IMAGES).mean(0)
    expected = (np.float64(IMAGES) - moved) @ np.float64(params["kernel"])
    np.testing.assert_allclose(attacked[0](IMAGES), expected, rtol=1e-5, atol=1e-5)  # of terms up to 5
    (moments,) = outcome.attack_moments
    np.testing.assert_array_equal(moments["mean"], IMAGES.mean(0))
    # Weights are perturbed for images that an attack found before: there is no second natural pass.
    found = partial(attack_modes.known, outcome.attacked.images)
    again = partial(objectives.pgd_at, loss=losses.cross_entropy)
    assert first(objective=again, attack=found)[1].attack_moments == ()


def small(*changes):
    config = cli.load_config("configs/at.py:digits_lt")
    with config.unlocked():
        config.model.channels, config.model.width = (4, 4, 4), 8
    return cli.apply_overrides(config, [f"--config.{change}" for change in changes])


@pytest.fixture(scope="module")
def digits():
    """A network for digits, its weights, and a batch."""
    model = builder.model(small(), np.arange(20, 0, -2), platform="cpu", precision="default")
    images = jax.random.uniform(jax.random.key(3), (6, 8, 8, 1))
    params, stats = model.init(jax.random.key(4), images)
    batch = objectives.Batch(images, jnp.arange(6), jax.random.split(jax.random.key(5), 6), 1)
    return model, params, stats, batch


def outcome_of(digits, *changes, known=objectives.NOTHING_KNOWN):
    model, params, stats, batch = digits
    objective = builder.objective(small("attack.steps=2", *changes), np.arange(20, 0, -2))
    return jax.jit(partial(objective, model))(params, stats, batch, known)


@pytest.mark.slow
def test_n_fgsm_leaves_the_ball(digits):
    """Its noise is twice as wide, and nothing is projected but to the pixels' range."""
    n_fgsm = ("attack.steps=1", "attack.noise=2", "attack.reach=3", "attack.step_size=0.1")
    _, outcome = outcome_of(digits, *n_fgsm)
    delta = jnp.abs(outcome.attacked.images - digits[3].images)
    assert 0.25 < delta.max() < 0.3 + 1e-6
    assert jnp.abs(outcome_of(digits)[1].attacked.images - digits[3].images).max() < 0.1 + 1e-6


@pytest.mark.slow
def test_radii_of_a_batch_bound_its_attack(digits):
    radii = jnp.array([0.0, 0.01, 0.05, 0.1, 0.2, 0.3])
    for more in ((), ("attack.common_noise=True",), ("threat.scaled_steps=False",)):
        _, outcome = outcome_of(digits, *more, known=objectives.Known(radii=radii))
        distance = THREAT.distance(outcome.attacked.images, digits[3].images)
        assert (distance <= radii + 1e-6).all()
        assert distance[0] == 0
        assert (distance[1:4] > 0.4 * radii[1:4]).all()


@pytest.mark.slow
def test_batch_statistics_in_the_attack(digits):
    """They couple the images: what is found for one depends on the others."""
    model, params, stats, batch = digits
    other = batch._replace(images=batch.images.at[1:].set(0.3))
    for mode, coupled in (("running", False), ("batch", True), ("batch_update", True)):
        first, second = (
            outcome_of((model, params, stats, b), f"attack.batch_norm={mode}")[1].attacked.images[0]
            for b in (batch, other)
        )
        assert bool((first != second).any()) == coupled


@pytest.mark.slow
@pytest.mark.parametrize(("mode", "passes"), [("running", 0), ("batch_update", 2), ("batch_update_end", 3)])
def test_passes_of_the_attack_that_move_statistics(digits, mode, passes):
    model, params, stats, _ = digits
    _, outcome = outcome_of(digits, f"attack.batch_norm={mode}")
    assert len(outcome.attack_moments) == passes
    assert len(outcome.moments) == 1
    if mode == "batch_update_end":
        last = model.train(params, stats, outcome.attacked.images)[1]
        for a, b in zip(jax.tree.leaves(outcome.attack_moments[-1]), jax.tree.leaves(last), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def no_loss(model, params, stats, batch):
    return jnp.float32(0), objectives.Outcome((), {})


def bent(params, stats, images):
    """A training pass whose logits are not linear in the images."""
    return jnp.sin(40 * images)[:, :3], {}


def points_of_the_ball():
    draw = partial(jax.random.uniform, shape=IMAGES.shape[1:], minval=-1.0, maxval=1.0)
    return IMAGES + 0.1 * jax.vmap(draw)(fold_in(KEYS, ALIGNMENT))


@pytest.mark.slow
def test_gradients_of_a_linear_model_are_aligned():
    batch = objectives.Batch(IMAGES, LABELS, KEYS, 1)
    linear = linear_model()._replace(
        train=lambda p, s, x: (jnp.stack([x.sum(-1), -x.sum(-1), 0 * x[:, 0]], -1), {})
    )

    def misalignment(model):
        value, outcome = attack_modes.aligned_gradients(
            model, {}, {}, batch, objective=no_loss, weight=0.5, threat=THREAT
        )
        np.testing.assert_allclose(value, 0.5 * outcome.metrics["misalignment"], rtol=1e-6)
        return outcome.metrics["misalignment"]

    assert misalignment(linear) < 1e-6
    assert misalignment(linear._replace(train=bent)) > 0.1


@pytest.mark.slow
def test_misalignment_is_the_mean_of_one_minus_the_cosine():
    def gradient(images):
        """Of the cross entropy of ``bent``; the last number of an image has none."""
        x = np.float64(images)[:, :3]
        p = np.exp(np.sin(40 * x)) / np.exp(np.sin(40 * x)).sum(1, keepdims=True)
        return (p - np.eye(3)[np.array(LABELS)]) * 40 * np.cos(40 * x)

    here, there = gradient(IMAGES), gradient(points_of_the_ball())
    cosines = (here * there).sum(1) / (np.linalg.norm(here, axis=1) * np.linalg.norm(there, axis=1))
    batch = objectives.Batch(IMAGES, LABELS, KEYS, 1)
    value, outcome = attack_modes.aligned_gradients(
        linear_model()._replace(train=bent), {}, {}, batch, objective=no_loss, weight=0.5, threat=THREAT
    )
    # Rounding of images in float32 moves the sine's argument by 1e-6.
    np.testing.assert_allclose(outcome.metrics["misalignment"], np.mean(1 - cosines), rtol=1e-5)
    np.testing.assert_allclose(value, 0.5 * np.mean(1 - cosines), rtol=1e-5)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_alignment_looks_at_points_of_the_ball(norm):
    seen, threat = [], attacks.ThreatModel(0.1, norm)

    def train(params, stats, images):
        jax.debug.callback(lambda x: seen.append(np.asarray(x)), images)
        return images[:, :3], {}

    model, batch = linear_model()._replace(train=train), objectives.Batch(IMAGES, LABELS, KEYS, 1)
    attack_modes.aligned_gradients(model, {}, {}, batch, objective=no_loss, weight=0.5, threat=threat)
    jax.effects_barrier()
    (there,) = (images for images in seen if (images != IMAGES).any())
    assert 0.05 < threat.distance(there, IMAGES).max() < 0.1 + 1e-6
    if norm == "linf":
        np.testing.assert_array_equal(there, points_of_the_ball())


@pytest.mark.slow
def test_alignment_is_an_addition(digits):
    plain, _ = outcome_of(digits)
    value, outcome = outcome_of(digits, "attack.alignment=0.2")
    np.testing.assert_allclose(value, plain + 0.2 * outcome.metrics["misalignment"], rtol=1e-5)


# ---------------------------------------------------------------- bad input

GIVEN = {"threat": {"budget": {"name": "given", "epsilons": (0.1, 0.2)}}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"threat": {"budget": {"name": "by_size"}}},
            "unknown budget 'by_size'; use one of constant, by_freq",
        ),
        (GIVEN, r"shape of epsilons is \[2\]; it must be \[10\], one number per class"),
        ({"threat": {"ramp": 1.5}}, r"config.threat.ramp is 1.5; it must be in \[0, 1\]"),
        ({"average": {"name": "ema", "decay": 1.0}}, r"config.average.decay is 1.0; it must be in \[0, 1\)"),
        ({"average": {"name": "mean"}}, "unknown average 'mean'; use one of none, ema, per_epoch, swa"),
        ({"perturbation": {"name": "awp", "gamma": 0.0}}, "config.perturbation.gamma is 0.0; it must be > 0"),
        ({"perturbation": {"name": "awp", "start": 0}}, "perturbation 'awp' cannot be used here: start is 0"),
        ({"train": {"mixing": "mixup"}}, "config.train.mixing is 'mixup'; it must be one of none, cutmix"),
        ({"attack": {"batch_norm": "train"}}, "'train'; it must be one of running, batch, batch_update"),
        ({"evaluation": {"weights": "average"}}, "'average', but config.average.name is 'none'; choose"),
        (
            {"train": {"mixing": "cutmix"}, "objective": {"name": "mart", "beta": 5.0}},
            "objective 'mart' needs one label per image, and config.train.mixing 'cutmix' gives two; set",
        ),
        (
            {"threat": {"budget": {"name": "cfa"}}, "objective": {"name": "plain"}},
            "budget 'cfa' learns from the logits of adversarial images, and objective 'plain' reports none",
        ),
        (
            {"attack": {"batch_norm": "batch_update"}, "objective": {"name": "trades"}},
            "config.attack.batch_norm 'batch_update' .* objective 'trades' .* use 'batch'",
        ),
    ],
)
def test_what_cannot_be_used(change, message):
    config = small()
    with config.unlocked(), config.ignore_type():
        for section, fields in change.items():
            if "name" in fields:
                config[section] = fields
            else:
                config[section].update(fields)
    with pytest.raises(InputError, match=message):
        builder.training(config)


def own_average(steps_per_epoch):
    return {"params": steps_per_epoch}


def own_perturbation():
    return perturbations.Perturbation(lambda params, direction, epoch: direction["backbone"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("section", "message"),
    [
        ("average", "average 'test_ingredients:own_average' returns a dict; it must return a robal_jax.aver"),
        ("perturbation", "perturbation 'test_ingredients:own_perturbation' gives params with "),
    ],
)
def test_functions_of_the_user_s_own(section, message):
    config = small()
    with config.unlocked():
        config[section].name = f"test_ingredients:own_{section}"
    with pytest.raises(InputError, match=message):
        builder.training(config)


def own_two_radii(class_counts, epsilon):
    return [0.1, 0.1]


def own_negative(class_counts, epsilon):
    return -0.1 * np.ones(10)


def own_one_number(class_counts, epsilon):
    return 0.1


def own_no_number(class_counts, epsilon):
    return np.full(10, np.nan)


def own_too_wide(class_counts, epsilon):
    return np.full(10, 8.0)


def own_learned(class_counts, epsilon):
    return budgets.fixed(np.ones(3))


def own_other_names(steps_per_epoch):
    return averages.Average(lambda weights: {"w": weights.params}, lambda kept, step, old, new: kept)


def own_no_stats(steps_per_epoch):
    init = lambda weights: {"params": weights.params}  # noqa: E731
    return averages.Average(init, lambda kept, step, old, new: kept, estimates=True)


def own_two_arguments(steps_per_epoch):
    return averages.Average(lambda weights: {"params": weights.params}, lambda kept, step: kept)


@pytest.mark.parametrize(
    ("section", "name", "message"),
    [
        ("budget", "two_radii", r"radii of config.threat.budget .* is \[2\]; it must be \[10\]"),
        ("budget", "negative", "has the entry -0.1; each must be finite and > 0"),
        ("budget", "one_number", r"must be \[10\], one number per class"),
        ("budget", "no_number", "has the entry nan; each must be finite"),
        ("budget", "too_wide", "gives class 0 the radius 8; in L-infinity it must be at most 1"),
        ("budget", "learned", r"returns radii as float32\[3\]; it must return one radius per class"),
        ("average", "other_names", "begins as a dict without params; it must return a robal_jax.averages.Av"),
        ("average", "no_stats", "estimates stats that it does not keep"),
        ("average", "two_arguments", "fails with TypeError"),
    ],
)
def test_budgets_and_averages_of_the_user_s_own(section, name, message):
    config = small()
    with config.unlocked():
        part = config.threat.budget if section == "budget" else config.average
        part.name = f"test_ingredients:own_{name}"
    with pytest.raises(InputError, match=message):
        builder.training(config)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (["threat.budget.name=dafa"], "'dafa' has no effect before epoch 71, but the run has 60 epochs"),
        (["threat.budget.name=cfa", "train.epochs=10"], "'cfa' has no effect before epoch 11"),
        (["perturbation.name=awp", "perturbation.start=61"], "'awp' has no effect before epoch 61"),
        (["average.name=swa", "average.start=59"], "'swa' has no effect before epoch 61"),
        (["average.name=ema", "average.warmup=100"], "'ema' has no effect before epoch 101"),
        (["loss.name=deferred", "loss.base.name=focal_softmax", "loss.start=61"], "'deferred' has no effect"),
        (
            ["attack.start=gaussian", "attack.noise=2"],
            "'gaussian' has no radius, so that config.attack",
        ),
        (["train.mixing=cutmix", "threat.budget.name=cfa"], "'cfa' takes the first label of each image, and"),
        (["train.mixing=cutmix", "attack.alignment=0.2"], "alignment takes the first label of each image"),
        (
            ["objective.name=plain", "attack.first_epoch=2"],
            "objective 'plain' takes no attack, so that config.th",
        ),
        (["objective.name=plain", "threat.ramp=0.5"], "objective 'plain' takes no attack, so that config.th"),
        (["class_statistics.name=predictions"], "'predictions' is read by no loss or objective"),
        (
            ["loss.name=robal", "loss.scale=10.0", "loss.margin=0.1"],
            "'robal' multiplies cosines by its scale, and config.head 'linear'",
        ),
        (
            ["train.sampler=balanced", "loss.name=logit_adjustment"],
            "'logit_adjustment' corrects for the class counts",
        ),
    ],
)
def test_what_has_no_effect_is_said(changes, said):
    assert any(said in line for line in builder.doubts(small(*changes)))
    fine = ["perturbation.name=awp", "perturbation.start=60", "average.name=swa", "average.start=58"]
    assert builder.doubts(small(*fine)) == []
    read = ["class_statistics.name=predictions", "attack.loss.name=rebalanced", "train.sampler=balanced"]
    assert builder.doubts(small(*read)) == []


def test_what_begins_after_the_last_of_the_steps_is_said():
    config = small("perturbation.name=awp", "perturbation.start=3", "average.name=per_epoch")
    assert builder.doubts(config, 3) == builder.doubts(config) == []
    ends = "but config.train.max_steps ends the run in epoch 1; set"
    assert builder.doubts(config, 1) == [
        f"config.perturbation 'awp' has no effect before epoch 3, {ends} a lower config.perturbation.start "
        "or more steps",
        f"config.average 'per_epoch' has no effect before epoch 2, {ends} more steps",
    ]
    ends_within_the_first = small("average.name=ema", "average.warmup=0.025", "train.epochs=3")
    assert builder.doubts(ends_within_the_first, 1) == []


def test_balanced_classes_have_no_radii_by_frequency():
    config = small("data.ratio=1.0", "threat.budget.name=by_frequency")
    with pytest.raises(
        InputError, match=r"all classes have .* so that their radii by frequency are 0 / 0; use"
    ):
        builder.training(config)


def test_a_run_says_what_it_is_trained_with():
    assert ingredients_of(cli.load_config("configs/robal_n.py:digits_lt")) == ""
    found = ingredients_of(ingredients.get_config())
    assert found.startswith("threat.budget cfa (start 2), threat.ramp 0.5, attack.batch_norm batch, ")
    assert "average ema (decay 0.9, warmup 0.5)" in found
