"""Whole training runs: the same numbers again, after interruptions, and after damage (robal_jax.train)."""

import json
import shutil
import signal
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import empty, flip_a_bit, interrupt, lose, truncate, zero

from robal_jax import (
    attacks,
    builder,
    cli,
    losses,
    objectives,
    training,
)
from robal_jax.data import epoch_order, sources, to_float
from robal_jax.devices import parallel
from robal_jax.errors import DivergedError, InputError
from robal_jax.keys import example_keys
from robal_jax.storage import checkpoints
from robal_jax.storage.config_file import read_config, to_json
from robal_jax.training import initial_state
from robal_jax.training import step as training_step

# Five steps an epoch in chunks of two: the last chunk of an epoch is shorter.
SETTINGS = ("train.epochs=3", "train.steps_per_dispatch=2", "train.checkpoint_epochs=1", "attack.steps=1")


def tiny_config(*overrides):
    config = cli.load_config("configs/robal_n.py:digits_lt")
    with config.unlocked():
        config.model.channels, config.model.width = (4, 4, 4), 16
    return cli.apply_overrides(config, [f"--config.{override}" for override in (*SETTINGS, *overrides)])


def run(workdir, *overrides):
    """Trains; the checkpoint's folder, its sha256 and all that was said."""
    said = []
    path = training.train(tiny_config(*overrides), str(workdir), say=said.append)
    words = said[-1].split()
    assert words[:3] == ["checkpoint", str(path), "sha256"]
    return path, words[3], said


def rows(workdir):
    """Lines of metrics.jsonl without the speed, which no two runs share."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert all(line.pop("images_per_second") > 0 for line in lines)
    return lines


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run that was never interrupted, and its sha256. Not to be written to."""
    workdir = tmp_path_factory.mktemp("runs") / "finished"
    _, sha256, _ = run(workdir)
    return workdir, sha256


@pytest.fixture
def copy(finished, tmp_path):
    return shutil.copytree(finished[0], tmp_path / "copy")


def newest(workdir):
    folder = workdir / "checkpoints"
    return folder / str(checkpoints.steps(folder)[-1])


# ---------------------------------------------------------------- an undisturbed run


@pytest.mark.slow
def test_two_runs_are_the_same(finished, tmp_path):
    workdir, sha256 = finished
    _, again, _ = run(tmp_path)
    assert again == sha256
    assert rows(tmp_path) == rows(workdir)


@pytest.mark.slow
def test_what_a_run_leaves(finished):
    workdir, sha256 = finished
    assert [row["step"] for row in rows(workdir)] == [2, 4, 5, 7, 9, 10, 12, 14, 15]
    assert [row["epoch"] for row in rows(workdir)] == [1, 1, 1, 2, 2, 2, 3, 3, 3]
    assert checkpoints.steps(workdir / "checkpoints") == [5, 10, 15]
    assert list((workdir / "tensorboard").glob("events*"))
    assert (workdir / "config.json").read_text() == to_json(tiny_config())
    state, path, read = checkpoints.restore_latest(
        workdir / "checkpoints", initial_state(builder.training(tiny_config())), on_damage=pytest.fail
    )
    assert (path.name, read) == ("15", sha256)
    assert int(state.step) == 15
    # It learns: cross entropy at chance is log 10, and the loss's scale of 10 starts above that.
    assert rows(workdir)[-1]["loss"] < 0.8 * rows(workdir)[0]["loss"]


@pytest.mark.slow
def test_checkpoints_are_as_many_epochs_apart_as_told(finished, tmp_path):
    _, sha256, _ = run(tmp_path, "train.checkpoint_epochs=2")
    assert checkpoints.steps(tmp_path / "checkpoints") == [10, 15]  # and one at the end
    assert sha256 == finished[1]


@pytest.mark.slow
def test_another_seed_is_another_run(finished):
    job, other = (builder.training(tiny_config(*overrides)) for overrides in ((), ("seed=1",)))
    assert checkpoints.digest(initial_state(job)) != checkpoints.digest(initial_state(other))
    assert not np.array_equal(training.step_ids(job, 0), training.step_ids(other, 0))


@pytest.mark.slow
@pytest.mark.parametrize("layout", parallel.LAYOUTS)
def test_one_compilation_serves_the_whole_run(layout, monkeypatch, tmp_path):
    original, traces = training.train_chunk, []
    monkeypatch.setattr(training_step, "train_chunk", lambda *a, **k: traces.append(1) or original(*a, **k))
    run(tmp_path, f"train.layout={layout}")
    assert len(traces) == 1


@pytest.mark.slow
def test_steps_of_a_dispatch_change_nothing(finished, tmp_path):
    workdir, sha256 = finished
    _, again, _ = run(tmp_path, "train.steps_per_dispatch=100")  # a whole epoch, 5 steps
    assert [row["step"] for row in rows(tmp_path)] == [5, 10, 15]
    assert again == sha256
    for chunks, epoch in zip(np.reshape(rows(workdir), (3, 3)), rows(tmp_path), strict=True):
        mean = sum(row["loss"] * steps for row, steps in zip(chunks, (2, 2, 1), strict=True)) / 5
        assert epoch["loss"] == pytest.approx(mean, rel=1e-6)  # a sum of five in float32


@pytest.mark.parametrize("sampler", ["uniform", "class_aware"])
def test_chunks_cover_an_epoch_once(sampler):
    job = builder.training(tiny_config(f"train.sampler={sampler}", "train.batch_size=48"))
    assert job.steps_per_epoch % job.settings.steps_per_dispatch  # the last chunk is shorter
    for epoch in (0, 1):
        step, end, seen = epoch * job.steps_per_epoch, (epoch + 1) * job.steps_per_epoch, []
        chunks = training.chunks(job, step)
        while step < end:
            ids, count = next(chunks)
            assert ids.shape == (job.settings.steps_per_dispatch, 1, 48)
            seen.extend(ids[:count].ravel())
            step += count
        assert step == end  # no chunk reaches into the next epoch
        order = epoch_order(sampler, job.data.train_labels, job.seed, epoch)
        assert seen == order[: len(seen)].tolist()
        assert len(order) - len(seen) < 48
        if sampler == "uniform":
            assert len(set(seen)) == len(seen)


def test_chunks_do_not_depend_on_where_they_start():
    job = builder.training(tiny_config())
    rows_of = {step: next(training.chunks(job, step))[0][0].tolist() for step in range(10)}
    for step in (0, 2, 5, 7):
        assert next(training.chunks(job, step))[0][1].tolist() == rows_of[step + 1]


@pytest.mark.slow
@pytest.mark.parametrize("steps_per_epoch", [1, 4, 5])
@pytest.mark.parametrize("first", [0, 3, 4, 5, 9])
def test_epoch_that_a_step_sees(steps_per_epoch, first):
    """Counted from 1, and from the steps of the whole run: it changes with the first step of each epoch."""
    count = 7

    def see_the_epoch(state, batch):
        seen = jnp.zeros(count, int).at[state.step - first].set(batch.epoch)
        return state.replace(step=state.step + 1), {"loss": 0.0, "grad_norm": 0.0, "seen": seen}

    state, sums = training.train_chunk(
        training.TrainState(jnp.int32(first), {}, {}, ()),
        training.Examples(jnp.zeros((3, 2, 2, 1), jnp.uint8), jnp.zeros(3, int)),
        jnp.zeros((count, 1, 2), int),
        count,
        jax.random.key(0),
        jnp.arange(2)[None],
        step_fn=see_the_epoch,
        steps_per_epoch=steps_per_epoch,
        pixel_max=255,
        augment=lambda keys, images: images,
    )
    assert state.step == first + count
    expected = [number for number in range(1, 20) for _ in range(steps_per_epoch)][first : first + count]
    assert sums["seen"].tolist() == expected


@pytest.mark.slow
def test_images_and_labels_that_a_step_sees():
    """Those of the numbers in a row, from a set on the device as from the row itself."""
    images = jnp.arange(24, dtype=jnp.uint8).reshape(6, 2, 2, 1)
    whole = training.Examples(images, jnp.array([5, 3, 1, 0, 2, 4]))
    rows = jnp.array([[[4, 1]], [[0, 5]], [[3, 2]]])
    parts = jax.tree.map(lambda x: x[rows], whole)

    def see(state, batch):
        part = jnp.stack([batch.images[:, 0, 0, 0] * 255, batch.labels.astype(float)])
        seen = jnp.zeros((3, *part.shape)).at[state.step].set(part)
        return state.replace(step=state.step + 1), {"loss": 0.0, "grad_norm": 0.0, "seen": seen}

    for data, given in ((whole, rows), (None, parts)):
        _, sums = training.train_chunk(
            training.TrainState(jnp.int32(0), {}, {}, ()),
            data,
            given,
            3,
            jax.random.key(0),
            jnp.arange(2)[None],
            step_fn=see,
            steps_per_epoch=3,
            pixel_max=255,
            augment=lambda keys, images: images,
        )
        expected = np.stack([parts.images[:, 0, :, 0, 0, 0], parts.labels[:, 0]], 1)
        np.testing.assert_allclose(sums["seen"], expected, atol=1e-4)


@pytest.mark.slow
def test_a_batch_in_parts_has_the_mean_gradient():
    """Of an objective whose images do not know of each other: that of the whole batch, up to rounding."""
    weight, images = (
        jax.random.normal(jax.random.key(0), (4, 3)),
        jax.random.uniform(jax.random.key(1), (8, 4)),
    )
    batch = objectives.Batch(images, jnp.arange(8) % 3, jax.random.split(jax.random.key(2), 8), 1)
    optimizer = optax.sgd(0.1)

    def objective(model, params, stats, batch):
        return losses.cross_entropy(batch.images @ params, batch.labels).mean(), objectives.Outcome((), {})

    def step(parts):
        state = training.TrainState(jnp.int32(0), weight, {}, optimizer.init(weight))
        state, metrics = training_step.train_step(
            state, batch, model=None, objective=objective, optimizer=optimizer, axis_name=None,
            accumulation_steps=parts,
        )  # fmt: skip
        return state.params, metrics

    whole = step(1)
    for parts in (2, 4):
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5), step(parts), whole)


def test_example_keys_are_all_different():
    key, positions = jax.random.key(0), np.arange(8)
    keys = [jax.random.key_data(example_keys(key, step, positions)) for step in range(3)]
    assert len({row.tobytes() for row in np.concatenate(keys)}) == 24
    part = jax.random.key_data(example_keys(key, 1, positions[4:]))
    np.testing.assert_array_equal(part, keys[1][4:])  # whatever device they are on


# ---------------------------------------------------------------- fine-tuning


def fine_tuning_config(*overrides):
    """One epoch of class scales for a linear head."""
    config = tiny_config()
    with config.unlocked():
        config.head, config.loss = ({"name": name} for name in ("linear", "cross_entropy"))
        config.objective = {"name": "pgd_at"}
    return cli.apply_overrides(config, [f"--config.{override}" for override in overrides])


@pytest.mark.slow
def test_fine_tuning_moves_what_it_shall(tmp_path):
    said = []
    before = training.train(fine_tuning_config("train.epochs=1"), tmp_path / "at", say=said.append)
    digest = said[-1].split()[-1]
    config = fine_tuning_config("train.epochs=1", f"train.start_from={tmp_path / 'at'}")
    with config.unlocked():
        config.head = {"name": "tau_norm", "tau": 0.0, "learn_scale": True}
        config.optimizer.trainable = "classifier/class_scale"
    after = training.train(config, tmp_path / "lws", say=said.append)
    assert f"starting from {before} sha256 {digest}; new: params/classifier/class_scale" in said
    (old, _), (new, _) = checkpoints.read(before), checkpoints.read(after)
    assert np.abs(new["params"]["classifier"].pop("class_scale") - 1).max() > 0
    jax.tree.map(np.testing.assert_array_equal, new["params"], old["params"])
    moved = jax.tree.map(lambda a, b: not np.array_equal(a, b), new["stats"], old["stats"])
    assert all(jax.tree.leaves(moved))
    # It resumes by itself: the run that it started from is not read again.
    shutil.rmtree(tmp_path / "at")
    assert training.train(config, tmp_path / "lws", say=said.append) == after


@pytest.mark.slow
def test_fine_tuning_of_another_model_is_refused(finished, tmp_path):
    config = fine_tuning_config(f"train.start_from={finished[0]}", "model.width=8")
    with pytest.raises(InputError, match=r"has params/backbone/fc/bias \(16,\), which does not fit"):
        training.train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


# ---------------------------------------------------------------- interruptions


class KilledError(BaseException):
    """Stands for a process that ends at once."""


def kill():
    raise KilledError


@pytest.mark.slow
@pytest.mark.parametrize(
    ("look", "step"),
    [(1, 2), pytest.param(4, 7, marks=pytest.mark.slow), pytest.param(6, 10, marks=pytest.mark.slow)],
)
def test_terminated_and_continued(finished, monkeypatch, tmp_path, look, step):
    handler = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patched:
        interrupt(patched, lambda looks: len(looks) == look)
        path, _, said = run(tmp_path)
    assert signal.getsignal(signal.SIGTERM) is handler
    assert path.name == str(step)
    assert f"stopped at step {step} of 15" in said[-2]
    assert rows(tmp_path)[-1]["step"] == step
    _, sha256, said = run(tmp_path)
    assert said[0].startswith(f"resuming at step {step} of 15")
    assert sha256 == finished[1]
    assert rows(tmp_path) == rows(finished[0])


@pytest.mark.slow
def test_dispatches_that_delay_a_stop_are_warned_about_once(monkeypatch, tmp_path):
    monkeypatch.setattr(training.loop, "LONG_DISPATCH", 0.0)
    with monkeypatch.context() as patched:
        interrupt(patched, lambda looks: len(looks) == 1)
        _, _, said = run(tmp_path, "train.epochs=2")
    assert not [line for line in said if "a signal to stop waits" in line]  # the first one compiles
    _, _, said = run(tmp_path, "train.epochs=2")
    assert [line.partition(" take")[0] for line in said if "a signal to stop waits" in line] == ["1 steps"]


@pytest.mark.slow
def test_killed_between_checkpoints_and_continued(finished, monkeypatch, tmp_path):
    with monkeypatch.context() as patched, pytest.raises(KilledError):
        interrupt(patched, lambda looks: len(looks) == 8, kill)
        run(tmp_path)
    assert rows(tmp_path)[-1]["step"] == 14
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 15, "ep')  # a killed process may leave part of a line
    _, sha256, said = run(tmp_path)
    assert said[0].startswith("resuming at step 10 of 15")
    assert sha256 == finished[1]
    assert rows(tmp_path) == rows(finished[0])


@pytest.mark.slow
def test_finished_run_returns_at_once(finished, copy, monkeypatch):
    monkeypatch.setattr(training_step, "train_chunk", lambda *_, **__: pytest.fail("made a step"))
    before = rows(copy)
    (newest(copy) / "files.json").unlink()  # as a job leaves it that is killed before it lists the digests
    changes = ("evaluation.seed=3", "train.keep_checkpoints=5", "train.checkpoint_epochs=1")  # of no training
    path, sha256, said = run(copy, *changes)
    assert (path / "files.json").exists()
    assert path == newest(copy)
    assert sha256 == finished[1]
    assert said[0].startswith("resuming at step 15 of 15")
    assert rows(copy) == before


# ---------------------------------------------------------------- what is refused


@pytest.mark.slow
@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("seed=1", "seed: 1 here, 0 there"),
        ("data.ratio=0.1", "data.ratio: 0.1 here, 0.05 there"),
        ("train.epochs=4", "train.epochs: 4 here, 3 there"),
        ("head.gamma=0.5", "head.gamma: 0.5 here, 0.03125 there"),
    ],
)
def test_another_config_is_refused(copy, override, named):
    before = (copy / "config.json").read_text()
    with pytest.raises(InputError) as raised:
        run(copy, override)
    assert named in str(raised.value)
    assert (copy / "config.json").read_text() == before
    assert checkpoints.steps(copy / "checkpoints") == [5, 10, 15]


def test_other_data_are_refused(copy, monkeypatch):
    original = sources.SOURCES["digits_lt"]

    def one_pixel_changed(seed=0, **keywords):
        data = original(seed=seed, **keywords)
        data.train_images[0, 0, 0, 0] ^= 1
        return data

    def changed(ratio=0.05, profile="exp", head=104, test_per_class=70, seed=0):
        return one_pixel_changed(seed, ratio=ratio, profile=profile, head=head, test_per_class=test_per_class)

    monkeypatch.setitem(sources.SOURCES, "digits_lt", changed)
    with pytest.raises(InputError, match=r"data: sha256 \w+… here, \w+… there"):
        run(copy)


def test_a_folder_that_training_did_not_make_is_not_trained_on(copy):
    (copy / "versions.json").unlink()
    with pytest.raises(InputError, match=r"was not made by training; .* config.train.start_from="):
        run(copy)


@pytest.mark.parametrize(("name", "content"), [("config.json", "{"), ("versions.json", "{}")])
def test_damaged_workdir_is_refused(copy, name, content):
    (copy / name).write_text(content)
    with pytest.raises(InputError, match=f"cannot read .*{name}"):
        run(copy)


@pytest.mark.slow
def test_checkpoints_without_config_are_refused(copy):
    (copy / "config.json").unlink()
    with pytest.raises(InputError, match=r"has checkpoints but no config\.json"):
        run(copy)


# ---------------------------------------------------------------- divergence and damage


@pytest.mark.slow
def test_the_learning_rate_is_not_blamed_for_the_first_step(tmp_path):
    with pytest.raises(
        DivergedError, match=r"not finite at step 1 .*; no step was made before it: check"
    ) as error:
        run(tmp_path, "loss.tau_b=3e38")
    assert "schedule.lr" not in str(error.value)


@pytest.mark.slow
def test_divergence_names_the_step_and_keeps_the_checkpoint(tmp_path):
    # From epoch 2 on the rate is 1e30 times as large: step 6 ruins the weights, step 7 sees it.
    blows_up = ("schedule.milestones=(2,)", "schedule.decay=1e30", "optimizer.clip_norm=0.0")
    with pytest.raises(DivergedError) as raised:
        run(tmp_path, *blows_up)
    assert "not finite at step 7 (epoch 2)" in str(raised.value)
    assert f"the last good checkpoint is {tmp_path / 'checkpoints' / '5'}" in str(raised.value)
    assert checkpoints.steps(tmp_path / "checkpoints") == [5]
    assert rows(tmp_path)[-1]["step"] == 5
    state, _ = checkpoints.restore(
        tmp_path / "checkpoints" / "5", initial_state(builder.training(tiny_config(*blows_up)))
    )
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(state))


SLOW_DAMAGES = (pytest.param(damage, marks=pytest.mark.slow) for damage in (zero, lose, truncate, empty))


@pytest.mark.slow
@pytest.mark.parametrize("damage", [flip_a_bit, *SLOW_DAMAGES])
def test_damaged_checkpoint_is_passed_over(finished, copy, damage):
    damage(newest(copy))
    _, sha256, said = run(copy)
    assert f"checkpoint {copy / 'checkpoints' / '15'} is damaged" in said[0]
    assert said[1].startswith("resuming at step 10 of 15")
    assert sha256 == finished[1]
    assert rows(copy) == rows(finished[0])
    assert len(list((copy / "damaged").iterdir())) == 1  # kept for who wants to look


@pytest.mark.slow
def test_all_checkpoints_damaged(copy):
    for folder in (copy / "checkpoints").iterdir():
        empty(folder)
    with pytest.raises(InputError, match=r"every checkpoint in .* is damaged"):
        run(copy)


# ---------------------------------------------------------------- bfloat16


@pytest.mark.long
@pytest.mark.slow
def test_bfloat16_is_as_robust(tmp_path):
    """AT on the digits, trained in both; and the trained network attacked in both. Judged in float32."""
    robust, found = {}, {}
    for precision in ("default", "bfloat16"):
        override = f"--config.train.precision={precision}"
        config = cli.apply_overrides(cli.load_config("configs/at.py:digits_lt"), [override])
        training.train(config, tmp_path / precision, say=lambda line: None)
        arrays = checkpoints.read_latest(tmp_path / precision).tree
        found[precision] = arrays["params"], arrays["stats"]
    job = builder.evaluation(read_config(tmp_path / "default"))
    images, labels = to_float(jnp.asarray(job.test.images), job.test.pixel_max), jnp.asarray(job.test.labels)
    counts = job.test.class_counts
    build = partial(builder.model, config, counts, platform="cpu")
    exact, rounded = (build(precision=name) for name in ("highest", "bfloat16"))

    def attacked(model, params, stats):
        logits_fn = partial(model.predict, params, stats)
        size = config.evaluation.step_size
        pgd = partial(attacks.pgd, threat=job.threat, steps=20, step_size=size)
        shown = pgd(logits_fn, jax.random.key(0), images, labels)
        gradient = attacks.loss_gradient(logits_fn, losses.cross_entropy, images, labels)[2]
        logits = exact.predict(params, stats, shown)
        accuracy = jnp.mean(jnp.argmax(logits, -1) == labels)
        return shown, jnp.sign(gradient), 100 * accuracy, losses.cross_entropy(logits, labels).mean()

    by_exact, by_rounded = (jax.jit(partial(attacked, model)) for model in (exact, rounded))
    robust = {precision: by_exact(*variables) for precision, variables in found.items()}
    # Twice the standard deviation over seeds (experiments/results/digits_lt.md, AT under PGD-20).
    assert abs(robust["default"][2] - robust["bfloat16"][2]) < 2 * 2.6

    shown, signs, accuracy, loss = by_rounded(*found["default"])
    _, exact_signs, exact_accuracy, exact_loss = robust["default"]
    assert float(jnp.abs(shown - images).max()) <= job.threat.epsilon + 2**-23  # two roundings below 2
    assert shown.dtype == jnp.float32 and shown.min() >= 0 and shown.max() <= 1
    # As strong: a point is 7 of 700 images. Signs differ where a gradient all but vanishes.
    assert abs(accuracy - exact_accuracy) < 1 and abs(loss / exact_loss - 1) < 0.01
    assert 0.9 < jnp.mean(signs == exact_signs) < 1
