"""What a training gathers of the classes: REAT's, the user's own, its place in the state, and teachers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from follow_ups import get_config
from ingredients import COUNTS

from robal_jax import attack_modes, builder, class_statistics, cli, objectives, training
from robal_jax.class_statistics import ClassStatistics
from robal_jax.data.sampling import balanced_set, epoch_order
from robal_jax.errors import InputError
from robal_jax.storage import checkpoints
from robal_jax.training import loop


def errors(class_counts):
    """The user's own: misclassified adversarial images of each class in the last epoch, and in this one."""
    none = jnp.zeros(len(class_counts))

    def seen(labels, logits):
        wrong = jnp.argmax(logits, axis=-1) != labels
        return {"now": jnp.sum(jax.nn.one_hot(labels, len(class_counts)) * wrong[:, None], axis=0)}

    def update(arrays, sums, epoch, ends):
        now = arrays["now"] + sums["now"]
        return {"last": jnp.where(ends, now, arrays["last"]), "now": jnp.where(ends, 0.0, now)}

    return ClassStatistics(lambda: {"last": none, "now": none}, seen, update)


def by_errors(model, params, stats, batch, *, attack, class_statistics, class_counts):
    """The user's own objective: adversarial training with weights by these errors."""
    weights = 1 + class_statistics["last"] / jnp.asarray(class_counts)

    def loss(logits, labels):
        return weights[labels] * jax.nn.logsumexp(
            logits - logits[jnp.arange(len(labels)), labels][:, None], 1
        )

    return objectives.pgd_at(model, params, stats, batch, attack=attack, loss=loss)


def own_config(**changes):
    config = get_config("at")
    with config.unlocked(), config.ignore_type():
        config.class_statistics = {"name": "test_class_statistics:errors"}
        config.objective = {"name": "test_class_statistics:by_errors"}
        for name, value in changes.items():
            config[name] = value
    return config


@pytest.mark.long
@pytest.mark.slow
def test_a_user_s_own_objective_with_statistics_resumes_in_mid_epoch(tmp_path, monkeypatch):
    """Stopped after three of five steps of the second epoch: the same bits as a run without a stop."""
    monkeypatch.syspath_prepend(str(tmp_path))
    config, said = own_config(), []
    whole = training.train(config, tmp_path / "whole", say=said.append)
    stopped = []

    def stop_at(step):
        def stops(job, start):
            for rows in chunks(job, start):
                if start < step <= start + rows[1]:
                    raise KeyboardInterrupt
                yield rows
                start += rows[1]

        return stops

    chunks = loop.chunks
    with monkeypatch.context() as patched:
        patched.setattr(training.loop, "chunks", stop_at(9))
        with pytest.raises(KeyboardInterrupt):
            training.train(config, tmp_path / "killed", say=stopped.append)
    assert checkpoints.steps(tmp_path / "killed/checkpoints")  # of the end of the first epoch
    again = training.train(config, tmp_path / "killed", say=stopped.append)
    assert said[-1].rpartition(" ")[2] == stopped[-1].rpartition(" ")[2]
    first, second = (checkpoints.read_latest(path.parents[1]).tree["classes"] for path in (whole, again))
    for name in ("last", "now"):
        np.testing.assert_array_equal(first[name], second[name])
    assert np.sum(first["last"]) > 0
    assert np.sum(first["now"]) == 0  # the run ends with an epoch


def test_predictions_of_an_epoch():
    statistics = class_statistics.predictions(np.array([3, 2]))
    arrays, logits = statistics.init(), jnp.array([[1.0, 0.0], [0.0, 1.0], [0.0, 2.0]])
    for ends in (False, False, True, False):
        sums = statistics.seen(jnp.array([0, 0, 1]), logits)
        arrays = statistics.update(arrays, sums, 1, jnp.bool_(ends))
    np.testing.assert_array_equal(arrays["predicted"], [3, 6])
    np.testing.assert_array_equal(arrays["predicting"], [1, 2])


def ten_numbers(class_counts):
    return jnp.zeros(10)


def growing(class_counts):
    return ClassStatistics(
        lambda: {"a": jnp.zeros(2)},
        lambda labels, logits: {},
        lambda arrays, sums, epoch, ends: {"a": jnp.zeros(3)},
    )


def of_integers(class_counts):
    return ClassStatistics(
        lambda: {"a": jnp.zeros(2, int)},
        lambda labels, logits: {"a": jnp.ones(2)},
        lambda arrays, sums, epoch, ends: {"a": arrays["a"] + sums["a"]},
    )


def taking_radii(class_counts):
    return ClassStatistics(
        lambda: {"radii": jnp.zeros(2)}, lambda labels, logits: {}, lambda arrays, sums, epoch, ends: arrays
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            ("class_statistics.name=errors",),
            "unknown class statistics 'errors'; use one of none, predictions",
        ),
        (("class_statistics.name=test_class_statistics:ten_numbers",), "must return robal_jax.class_stat"),
        (("class_statistics.name=test_class_statistics:growing",), "returns its arrays with 'a'"),
        (
            ("class_statistics.name=test_class_statistics:of_integers",),
            r"begins with 'a' as int32\[2\], not floats \[2\], which a step cannot keep",
        ),
        (("train.images_per_class=100001",), r"images_per_class is 100001; it must be in 0..10\^5"),
        (
            ("class_statistics.name=test_class_statistics:taking_radii", "threat.budget.name=cfa"),
            "both keep an array 'radii'; rename that of your own",
        ),
        (
            ("loss.name=rebalanced",),
            "config.loss reads class statistics, and config.class_statistics.name is",
        ),
        (("attack.loss.name=rebalanced",), "config.attack.loss reads class statistics"),
        (("objective.name=distilled",), "needs a teacher, and config.train.teacher is empty"),
        (("train.teacher=x",), "but objective 'pgd_at' takes none; use 'distilled', or leave it empty"),
        (
            ("train.logged_passes=adv", "objective.name=plain"),
            "takes no attack; use 'nat', or leave it empty",
        ),
        (
            ("train.logged_passes=both",),
            "config.train.logged_passes is 'both'; it must be '', or a list of nat",
        ),
        (
            ("class_statistics.name=predictions", "class_statistics.logged=True"),
            "config.train.logged_passes is ''; add 'adv'",
        ),
        (
            ("loss.name=rebalanced", "threat.budget.name=cfa"),
            "class_statistics have no 'predicted'; gather the statistics 'predictions'",
        ),
        (("objective.name=trades", "objective.beta=-6"), r"config.objective.beta is -6\.0; it must be >= 0"),
        (
            ("objective.name=avmixup", "objective.nat_confidence=10"),
            r"config.objective.nat_confidence is 10.*; it must be in \[0, 1\]",
        ),
        (("attack.first_epoch=0",), "config.attack.first_epoch is 0; it must be > 0"),
        (("attack.first_epoch=3", "attack.batch_norm=batch_update"), "needs an attack in every epoch"),
        (("objective.tail_divergence=all", "objective.tail_weight=1"), "it must be one of batch, pair"),
    ],
)
def test_what_does_not_fit_is_refused(changes, message):
    config = cli.load_config("configs/at.py:digits_lt")
    with pytest.raises(InputError, match=message):
        config = cli.apply_overrides(config, [f"--config.{change}" for change in changes])
        builder.check(config)


def test_statistics_need_an_objective_that_shows_attacks():
    config = cli.load_config("configs/at.py:digits_lt")
    changes = ("class_statistics.name=predictions", "objective.name=plain")
    config = cli.apply_overrides(config, [f"--config.{change}" for change in changes])
    with pytest.raises(
        InputError, match="class statistics 'predictions' learns from the logits of adversarial images"
    ):
        builder.training(config)


def test_a_logged_pass_needs_an_objective_that_reports_its_images():
    config = cli.load_config("configs/mma.py:digits_lt")
    config = cli.apply_overrides(config, ["--config.train.logged_passes=adv"])
    with pytest.raises(InputError, match="objective 'mma' reports none; use 'nat', or leave it empty"):
        builder.training(config)


# ---------------------------------------------------------------- epochs without an attack


@pytest.mark.parametrize("begun", [False, True])
def test_an_attack_that_begins_later(begun):
    images = jnp.full((2, 1, 1, 1), 0.5)
    attack = functools.partial(
        attack_modes.delayed, attack=lambda fn, keys, images, labels: images + 0.1, begun=jnp.bool_(begun)
    )
    found = jax.jit(lambda x: attack(None, None, x, None))(images)
    np.testing.assert_allclose(found, images + 0.1 * begun)


# ---------------------------------------------------------------- teachers


def test_a_balanced_set():
    labels = np.repeat(np.arange(4), COUNTS)
    chosen = balanced_set(labels, 0, seed=1)
    np.testing.assert_array_equal(np.bincount(labels[chosen]), [20] * 4)
    of_tail = np.bincount(chosen)[labels == 3]
    assert set(of_tail[of_tail > 0]) <= {2, 3}  # 20 draws of 8 images
    assert len(of_tail) == 8
    assert len(set(chosen[:20].tolist())) == 20  # of 40
    np.testing.assert_array_equal(chosen, balanced_set(labels, 0, seed=1))
    first, second = (epoch_order("balanced", labels, 1, epoch, 5) for epoch in (0, 1))
    assert sorted(first) == sorted(second)
    assert first.tolist() != second.tolist()
    with pytest.raises(InputError, match=r"images_per_class is 5, which sampler 'uniform' does not use"):
        epoch_order("uniform", labels, 1, 0, 5)


@pytest.mark.long
@pytest.mark.slow
def test_a_teacher_that_fits_and_one_that_does_not(tmp_path):
    said = []
    teacher, student = get_config("balanced_teacher"), get_config("self_distilled")
    with teacher.unlocked(), student.unlocked():
        teacher.train.epochs = 1
        student.objective.igdm = 1.0
        student.train.update({"epochs": 1, "teacher": str(tmp_path / "teacher")})
    with pytest.raises(InputError, match=r"^no run or checkpoint \S+/teacher; train it first"):
        training.train(student, tmp_path / "early", say=said.append)
    training.train(teacher, tmp_path / "teacher", say=said.append)
    path = training.train(student, tmp_path / "student", say=said.append)
    assert any(line.startswith("taught by") and said[-1] != line for line in said)
    of_teacher, found = (checkpoints.read_latest(tmp_path / name).tree for name in ("teacher", "student"))
    for here, there in zip(
        *map(jax.tree.leaves, (found["teacher"]["params"], of_teacher["params"])), strict=True
    ):
        np.testing.assert_array_equal(here, there)
    trained = zip(*(jax.tree.leaves(tree["params"]) for tree in (found, of_teacher)), strict=True)
    assert not all(np.array_equal(here, there) for here, there in trained)
    assert path.is_dir()
    with student.unlocked():
        student.model.width = 9
    with pytest.raises(InputError, match=r"config.train.teacher: checkpoint .* does not fit the model"):
        training.train(student, tmp_path / "other", say=said.append)
