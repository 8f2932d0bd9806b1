"""Free steps: one backward pass moves the weights and the perturbation of the images, batch after batch."""

import shutil
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_parallel import BOUND, said

from robal_jax import attacks, builder, cli, losses, models, training
from robal_jax.attacks import free
from robal_jax.attacks.threat import COMMON_NORMS
from robal_jax.data import epoch_order, to_float
from robal_jax.devices import parallel
from robal_jax.errors import InputError
from robal_jax.storage import checkpoints
from robal_jax.training import step as training_step

SMALL = ("train.batch_size=64", "train.steps_per_dispatch=3", "schedule.warmup=0", "schedule.milestones=()")


def free_config(*changes):
    """Returns a config of the digits, five steps per epoch, with free steps."""
    config = cli.load_config("configs/at.py:digits_lt")
    with config.unlocked():
        config.model.channels, config.model.width = (4, 4, 4), 8
    changes = ("attack.free_steps=3", *SMALL, *changes)
    return cli.apply_overrides(config, [f"--config.{change}" for change in changes])


def steps_of(job, dispatches, count=1):
    """Makes some dispatches; the state after each, and the sums."""
    devices = jax.devices()[:count]
    data = training.Examples(job.images, job.labels)
    initial = jax.jit(lambda: training.initial_state(job))()
    state, data, key = parallel.replicate((initial, data, jax.random.key(job.seed)), devices)
    chunk, chunks, made = training.compiled_chunk(job, devices), training.chunks(job, 0), []
    for rows, size in [next(chunks) for _ in range(dispatches)]:
        state, sums = jax.device_get(chunk(state, data, rows, size, key, training.positions(job)))
        made.append((state, sums))
    return made


# ---------------------------------------------------------------- against a plain loop


def in_l2(delta, gradient, radius):
    flat = gradient.reshape(len(gradient), -1)
    unit = flat / np.maximum(np.linalg.norm(flat, axis=1, keepdims=True), 1e-30)
    moved = delta.reshape(len(delta), -1) + radius * unit
    length = np.linalg.norm(moved, axis=1, keepdims=True)
    return (moved * np.minimum(1, radius / np.maximum(length, 1e-30))).reshape(delta.shape)


def in_linf(delta, gradient, radius):
    return np.clip(delta + radius * np.sign(gradient), -radius, radius)


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize(
    ("showings", "norm", "smoothing"), [(1, "linf", 0), (3, "linf", 0.1), (8, "linf", 0), (3, "l2", 0)]
)
def test_a_run_is_the_loop_of_the_paper(showings, norm, smoothing):
    """Eight steps, across the end of an epoch, with the images, weights and perturbations of the loop."""
    settings = (f"attack.free_steps={showings}", f"threat.norm={norm}")
    sgd = (
        "optimizer.momentum=0.0",
        "optimizer.weight_decay=0.0",
        "optimizer.clip_norm=0.0",
        "schedule.lr=0.1",
    )
    config = free_config(*settings, *sgd, f"train.label_smoothing={smoothing}")
    job = builder.training(config)
    alone = builder.model(config, job.data.class_counts, platform="cpu", precision="default")
    state, _ = steps_of(job, 3)[-1]
    assert int(state.step) == 8

    initial = training.initial_state(job)
    params, stats, delta, radius = initial.params, initial.stats, np.zeros((64, 8, 8, 1), np.float32), 0.1
    move = in_l2 if norm == "l2" else in_linf

    smoothed = partial(losses.label_smoothed, base=losses.cross_entropy, smoothing=smoothing)

    def loss_of(params, x, y, stats):
        logits, moments = alone.train(params, stats, x)
        return smoothed(logits, y).mean(), moments

    gradient_of = jax.jit(jax.value_and_grad(loss_of, (0, 1), has_aux=True))
    orders = [epoch_order("uniform", job.labels, 0, epoch) for epoch in range(2)]
    for step in range(8):
        epoch, offset = divmod(step // showings, job.steps_per_epoch)
        ids = orders[epoch][64 * offset : 64 * offset + 64]
        images, labels = np.asarray(to_float(job.images[ids], job.data.pixel_max)), job.labels[ids]
        shown = np.clip(images + delta, 0, 1)
        (_, moments), (of_params, of_images) = gradient_of(params, shown, labels, stats)
        inside = (images + delta >= 0) & (images + delta <= 1)
        delta = move(delta, np.where(inside, of_images, 0), radius)
        params = jax.tree.map(lambda w, g: w - 0.1 * g, params, of_params)
        stats = models.update_statistics(stats, (moments,))
        if step == 0:
            assert np.abs(delta).max() > 0.02
    # Float32, and the sign of a gradient that is 0 but for its rounding may differ: of a few of 4096 pixels.
    assert np.mean(np.abs(state.delta - delta) > 1e-6) < 1e-3
    for found, expected in ((state.params, params), (state.stats, stats)):
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(a, b, atol=2e-5)


@pytest.mark.slow
def test_showings_share_their_images():
    """Augmented and mixed with the numbers of the first showing, whatever the dispatch."""
    shown, weights = [], jnp.zeros(())

    def augment(keys, images):
        brighter = jax.vmap(lambda key: jax.random.randint(key, (1, 1, 1), 0, 9))(keys)
        return images + brighter.astype(images.dtype)

    def step_fn(state, batch, partners, positions):
        assert positions.shape == (16,)
        metrics = {"loss": weights, "grad_norm": weights, "shown": batch.images, "share": partners.share}
        return state.replace(step=state.step + 1), metrics

    images = jax.random.randint(jax.random.key(0), (16, 6, 6, 1), 0, 255).astype(jnp.uint8)
    data = training.Examples(images, jnp.arange(16) % 3)
    for step in range(7):
        state = training.TrainState(jnp.int32(step), {}, {}, ())
        _, sums = training.train_chunk(
            state, data, jnp.arange(16)[None, None], 1, jax.random.key(1), jnp.arange(16)[None],
            step_fn=step_fn, steps_per_epoch=2, pixel_max=255, augment=augment, mixing="cutmix", showings=3,
        )  # fmt: skip
        shown.append(jax.device_get(sums))
    for step in range(7):
        same = [np.array_equal(shown[step]["shown"], other["shown"]) for other in shown]
        assert same == [other // 3 == step // 3 for other in range(7)]


def test_which_images_a_step_sees():
    job = builder.training(free_config())
    assert job.steps_per_epoch == 5
    assert job.total_steps == 5 * 60  # as without: showings are steps
    numbers = [training.step_ids(job, step).ravel().tolist() for step in range(18)]
    for step in range(18):
        assert numbers[step] == numbers[step - step % 3]
    distinct = numbers[::3]
    assert sorted(np.ravel(distinct[:5])) == sorted(job.order(0)[:320].tolist())
    assert distinct[5] == job.order(1)[:64].tolist()


# ---------------------------------------------------------------- the step


def test_a_smaller_radius_holds_at_once():
    """The perturbation comes from an image of a class with a larger radius."""
    threat = attacks.ThreatModel(jnp.array([0.05, 0.0, 0.2]))
    images, delta = jnp.full((3, 2, 2, 1), 0.5), jnp.full((3, 2, 2, 1), 0.1)
    change = free.perturbed(images, delta, threat) - images
    np.testing.assert_allclose(jnp.abs(change).max((1, 2, 3)), [0.05, 0.0, 0.1], atol=1e-6)
    moved = free.ascended(delta, jnp.ones_like(images), images, threat)
    np.testing.assert_allclose(moved[:, 0, 0, 0], [0.05, 0.0, 0.2], atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("norm", COMMON_NORMS)
def test_a_perturbation_stays_in_its_ball(norm):
    """Also where pixels are at the edge of their range, which does not bound it."""
    threat = attacks.ThreatModel(0.3, norm)
    images = jax.random.bernoulli(jax.random.key(0), 0.5, (4, 5, 5, 3)).astype(float)
    delta = jnp.zeros_like(images)
    for i in range(9):
        gradient = jax.random.normal(jax.random.key(i), images.shape)
        delta = free.ascended(delta, gradient, images, threat)
        assert (threat.distance(delta, jnp.zeros_like(delta)) <= 0.3 + 1e-6).all()
        shown = free.perturbed(images, delta, threat)
        assert ((shown >= 0) & (shown <= 1)).all()
    assert ((delta < 0) & (images == 0)).any()


@pytest.mark.long
@pytest.mark.slow
def test_radii_by_class_with_a_ramp_and_cfa():
    """The ramp's radius is 0 in the first epoch; CFA learns from the images that are shown."""
    changes = ("threat.budget.name=cfa", "threat.ramp=0.5", "train.epochs=4", "train.accumulation_steps=2")
    mixed = ("train.mixing=cutmix", "average.name=swa", "train.augmentation=crop_flip")
    (first, _), *_, (last, sums) = steps_of(builder.training(free_config(*changes, *mixed)), 3)
    assert not first.delta.any()
    assert np.abs(last.delta).max() == pytest.approx(0.05)
    assert last.classes["shown"].sum() == 3 * 64
    assert np.isfinite(sums["loss"])


@pytest.mark.slow
def test_a_state_without_free_steps_has_no_perturbations():
    job = builder.training(free_config("attack.free_steps=0"))
    assert training.initial_state(job).delta == {}


# ---------------------------------------------------------------- a run


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run with a checkpoint after every epoch of five steps, and its last digest; it compiles once."""
    workdir, original, traces = tmp_path_factory.mktemp("free") / "run", training.train_chunk, []
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(training_step, "train_chunk", lambda *a, **k: traces.append(1) or original(*a, **k))
        made = trained(workdir)
    assert len(traces) == 1
    return workdir, made


def trained(workdir):
    lines = []
    changes = ("train.epochs=3", "train.checkpoint_epochs=1", "average.name=ema")
    path = training.train(free_config(*changes), workdir, say=lines.append)
    return path, lines[-1].split()[-1], lines


@pytest.mark.slow
def test_a_run_resumes_between_two_showings(finished, tmp_path):
    workdir, (path, sha256, lines) = finished
    assert any("free steps, each batch is shown 3 times in a row" in line for line in lines)
    copy = shutil.copytree(workdir, tmp_path / "copy")
    for step in (10, 15):
        shutil.rmtree(copy / "checkpoints" / str(step))
    found = checkpoints.read_latest(copy)
    assert found.path.name == "5"  # the second showing of the second batch is next
    assert np.abs(found.tree["delta"]).max() > 0.01
    again, digest, lines = trained(copy)
    assert any("resuming at step 5 of 15" in line for line in lines)
    assert again.name == path.name
    assert digest == sha256


LAYOUTS = """
import dataclasses, json, sys
sys.path.insert(0, f"{sys.argv[1]}/tests")
import jax, numpy as np
import test_free_steps as free
from robal_jax import builder
from robal_jax.devices import parallel

changes = ("threat.budget.name=cfa", "threat.ramp=0.4", "train.epochs=4", "train.accumulation_steps=2")
mixed = ("train.mixing=cutmix", "average.name=ema", "train.augmentation=crop_flip", "attack.free_steps=3")
job = builder.training(free.free_config(*changes, *mixed))

def twelve_steps(layout, count):
    own = dataclasses.replace(job, settings=job.settings._replace(layout=layout))
    made = free.steps_of(own, 5, count)
    assert np.abs(made[-1][0].delta).max() > 0.01
    return {**vars(made[-1][0]), "opt_state": (), "losses": [sums["loss"] for _, sums in made]}

def gap(one, other):
    differences = jax.tree.map(lambda a, b: float(np.max(np.abs(a - b))), one, other)
    return float(np.max(jax.tree.leaves(differences)))  # NaN if there is any

one = twelve_steps("jit", 1)
print(json.dumps({layout: gap(one, twelve_steps(layout, 4)) for layout in parallel.LAYOUTS}))
"""


@pytest.mark.long
@pytest.mark.slow
def test_any_devices_make_the_same_free_steps():
    (gaps,) = said(LAYOUTS)
    for layout, gap in gaps.items():
        assert gap < BOUND, layout


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("attack.free_steps=-1", "config.attack.free_steps is -1; it must be >= 0"),
        ("attack.free_steps=1.5", "config.attack.free_steps.*1.5"),
        (
            "objective.name=plain",
            "free_steps is 3, which objective 'plain' cannot use; use objective 'pgd_at'",
        ),
        (
            "objective.name=trades",
            "which objective 'trades' cannot use; use objective 'pgd_at', or set it to 0",
        ),
        (
            "perturbation.name=awp",
            "one backward pass, and config.perturbation.name 'awp' needs more; set it to",
        ),
        ("attack.alignment=0.2", r"config.attack.alignment 0.2 needs more; set it to 0.0"),
        ("attack.batch_norm=batch", "config.attack.batch_norm 'batch' needs more; set it to 'running'"),
    ],
)
def test_what_cannot_be_used(change, message):
    with pytest.raises(InputError, match=message):
        builder.training(free_config(change))


def test_doubts_do_not_speak_of_steps_that_are_not_made():
    short = ("attack.step_size=0.001",)
    assert not builder.doubts(free_config(*short))
    assert builder.doubts(free_config(*short, "attack.free_steps=0"))


def test_a_run_that_does_not_see_all_images():
    (doubt,) = builder.doubts(free_config("train.epochs=2"))
    assert "the run has 2 epochs, so that not all images are shown; set more epochs" in doubt
