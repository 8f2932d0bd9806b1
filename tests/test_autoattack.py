"""The ensemble: stages, what each round attacks, interruptions, small real runs (attacks.autoattack)."""

import contextlib
import copy
import functools
import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import robal_jax
from robal_jax import attacks, losses
from robal_jax.attacks import ThreatModel, autoattack, autopgd, rounds
from robal_jax.errors import InputError
from robal_jax.models import closure

THREAT = ThreatModel(0.1)


def listed(version, num_classes):
    return [
        (s.name, s.rounds, s.first, s.last) for s in autoattack.stages(version, num_classes, threat=THREAT)
    ]


# ---------------------------------------------------------------- which attacks, in which order


@pytest.mark.parametrize(
    ("version", "num_classes", "expected"),
    [
        ("robal_aa", 10, [("apgd_ce", 1, 1, 1), ("apgd_t", 9, 2, 10)]),
        (
            "standard",
            100,
            [("apgd_ce", 1, 1, 1), ("apgd_t", 9, 2, 10), ("fab_t", 9, 11, 19), ("square", 1, 20, 20)],
        ),
        (
            "standard",
            5,
            [("apgd_ce", 1, 1, 1), ("apgd_t", 4, 2, 5), ("fab_t", 4, 6, 9), ("square", 1, 10, 10)],
        ),
        (
            "plus",
            10,
            [
                ("apgd_ce", 5, 1, 5),
                ("apgd_dlr", 5, 6, 10),
                ("fab", 5, 11, 15),
                ("square", 1, 16, 16),
                ("apgd_t", 9, 17, 25),
                ("fab_t", 9, 26, 34),
            ],
        ),
        ("rand", 10, [("apgd_ce", 1, 1, 1), ("apgd_dlr", 1, 2, 2)]),
        (
            "fast",
            100,
            [("pma", 2, 1, 2), ("apgd_malt", 3, 3, 5), ("square", 1, 6, 6), ("square_full", 1, 7, 7)],
        ),
        (
            "union",
            4,
            [
                ("apgd_ce", 1, 1, 1),
                ("apgd_t", 3, 2, 4),
                ("fab_t", 3, 5, 7),
                ("square", 1, 8, 8),
                ("pma", 2, 9, 10),
                ("apgd_malt", 3, 11, 13),
            ],
        ),
        ("square", 2, [("square", 1, 1, 1)]),
        ("square,fab_t", 3, [("square", 1, 1, 1), ("fab_t", 2, 2, 3)]),
        ("apgd_dlr", 3, [("apgd_dlr", 1, 1, 1)]),
    ],
)
def test_stages(version, num_classes, expected):
    assert listed(version, num_classes) == expected


@pytest.mark.parametrize(
    "version", ["apgd", "standard,square", "apgd_ce,", "", "apgd_ce, square", "pma,square,square_full"]
)
def test_unknown_ensemble(version):
    with pytest.raises(
        InputError, match=r"unknown ensemble .*; use 'none', one of robal_aa, standard.*fab_t"
    ):
        autoattack.stages(version, 10, threat=THREAT)


def test_an_attack_stands_once():
    with pytest.raises(InputError, match=r"unknown ensemble 'square,fab,square'.*no repeats"):
        autoattack.attack_names("square,fab,square")


@pytest.mark.parametrize(
    ("version", "num_classes", "needed"),
    [
        ("standard", 3, "apgd_t needs at least 4"),
        ("rand", 2, "apgd_dlr needs at least 3"),
        ("fast", 3, "apgd_malt needs at least 4"),
        ("union", 3, "apgd_t needs at least 4"),
    ],
)
def test_too_few_classes(version, num_classes, needed):
    with pytest.raises(InputError, match=needed) as error:
        autoattack.stages(version, num_classes, threat=THREAT)
    way_out = str(error.value).split()[-1]
    names = [stage.name for stage in autoattack.stages(way_out, num_classes, threat=THREAT)]
    assert names == ["apgd_ce", "fab_t", "square"]


@pytest.mark.parametrize("version", ["robal_aa", "standard", "apgd_ce,fab_t,square"])
@pytest.mark.parametrize(("num_classes", "usable"), [(2, ["apgd_ce"]), (3, ["apgd_ce", "apgd_dlr"])])
def test_too_few_classes_in_l1(version, num_classes, usable):
    threat = ThreatModel(1.0, "l1")
    with pytest.raises(InputError) as error:
        autoattack.stages(version, num_classes, threat=threat)
    way_out = str(error.value).split()[-1]
    assert [stage.name for stage in autoattack.stages(way_out, num_classes, threat=threat)] == usable


@pytest.fixture
def asked(monkeypatch):
    """Records what the stages ask of the attacks, which are replaced; they find white images."""
    calls = []

    def record(name):
        def attack(logits_fn, keys, images, labels, **settings):
            calls.append((name, settings))
            return jnp.ones_like(images)

        return attack

    monkeypatch.setattr(autopgd, "apgd", record("apgd"))
    monkeypatch.setattr(autopgd, "targeted_apgd", record("targeted_apgd"))
    for name in "fab", "pma", "malt_apgd":
        monkeypatch.setattr(rounds, name, record(name))
    monkeypatch.setattr(rounds, "square", record("square"))

    def ask(version, name, number, value=0.95, steps=7, queries=11):
        stages = autoattack.stages(version, 10, threat=THREAT, steps=steps, queries=queries)
        (stage,) = [stage for stage in stages if stage.name == name]
        images = jnp.full((2, 2, 2, 1), value)
        found = stage.attack(
            lambda x: x, jax.random.split(jax.random.key(0), 2), images, jnp.zeros(2, int), number
        )
        return *calls[-1], np.asarray(found)

    return ask


def test_stages_pass_on_their_settings(asked):
    common = {"threat": THREAT, "steps": 7}
    for version, eot in ("standard", 0), ("plus", 0), ("rand", 20):
        name, settings, _ = asked(version, "apgd_ce", 0)
        assert (name, settings) == ("apgd", {**common, "loss": losses.cross_entropy, "eot": eot})
    assert asked("rand", "apgd_dlr", 0)[1] == {**common, "loss": attacks.dlr, "eot": 20}
    for number in 0, 8:
        assert asked("standard", "apgd_t", number)[:2] == ("targeted_apgd", {**common, "rank": number + 2})
    for version in "standard", "torchattacks", "fast", "union":
        settings = {"threat": THREAT, "queries": 11, "rescaled": version in ("torchattacks", "fast")}
        assert asked(version, "square", 0)[:2] == ("square", settings)
    for number in 0, 1:
        assert asked("fast", "pma", number)[:2] == ("pma", {**common, "raised": number == 1})
    for number in 0, 2:
        expected = {**common, "rank": number + 1, "candidates": 9}
        assert asked("fast", "apgd_malt", number)[:2] == ("malt_apgd", expected)
    for version, attack in itertools.product(("fast", "union"), ("pma", "apgd_malt")):
        assert asked(version, attack, 0, steps=None)[1]["steps"] == 30
    for version, queries in ("standard", 5000), ("torchattacks", 5000), ("fast", 500), ("union", 5000):
        assert asked(version, "square", 0, queries=None)[1]["queries"] == queries
    for given, queries in (None, 5000), (11, 11):
        settings = {"threat": THREAT, "queries": queries, "rescaled": False}
        assert asked("fast", "square_full", 0, queries=given)[:2] == ("square", settings)


@pytest.mark.parametrize("num_classes", [4, 10, 100])
def test_the_full_square_of_fast_has_the_random_numbers_of_autoattack_s(num_classes):
    keys = jax.random.split(jax.random.key(0), 3)
    *_, full = autoattack.stages("fast", num_classes, threat=THREAT)
    *_, square = autoattack.stages("standard", num_classes, threat=THREAT)
    assert (full.keys(keys, 0) == square.keys(keys, 0)).all()
    for stage in autoattack.stages("union", num_classes, threat=THREAT):  # of all others, the round's number
        expected = jax.vmap(lambda key, stage=stage: jax.random.fold_in(key, stage.first + 2))(keys)
        assert (stage.keys(keys, 2) == expected).all()


@pytest.mark.parametrize(
    ("version", "steps"), [("standard", 100), ("torchattacks", 10), ("plus", 100), ("union", 100)]
)
def test_steps_of_the_versions(asked, version, steps):
    assert asked(version, "apgd_t", 0, steps=None)[1]["steps"] == steps
    assert asked(version, "fab_t", 0, steps=None)[1]["n_iter"] == steps
    assert asked(version, "apgd_t", 0)[1]["steps"] == 7


def test_fab_starts_at_the_image_and_then_at_random(asked):
    images = np.full((2, 2, 2, 1), 0.95, np.float32)
    for number in 0, 8:
        name, settings, _ = asked("standard", "fab_t", number)
        np.testing.assert_array_equal(settings.pop("start"), images)
        assert (name, settings) == ("fab", {"threat": THREAT, "rank": number + 2, "n_iter": 7})
    for number in 0, 4:
        _, settings, _ = asked("plus", "fab", number)
        moved = np.abs(settings["start"] - images).max((1, 2, 3))
        assert settings["rank"] is None
        assert (moved > 0).all() == (number > 0)
        assert (moved <= THREAT.epsilon / 2 + 1e-6).all()


def test_fab_s_images_beyond_the_radius_do_not_count(asked):
    np.testing.assert_array_equal(asked("standard", "fab_t", 0, value=0.95)[2], 1.0)
    np.testing.assert_array_equal(asked("standard", "fab_t", 0, value=0.5)[2], 0.5)


# ---------------------------------------------------------------- what is attacked, by pretence

STAGES = (
    autoattack.Stage("first", None, 2, 1),
    autoattack.Stage("second", None, 1, 3),
    autoattack.Stage("third", None, 3, 4),
)
LABELS = np.arange(13) % 4
# Rounds in which images break, among them one where none, and one where several in different batches break.
PLAN = {0: 1, 2: 1, 12: 1, 3: 2, 7: 4, 8: 4, 9: 5, 11: 6}
WRONG_WHEN_CLEAN = (1, 6)
SIZE = 4


def begun():
    clean = LABELS.copy()
    clean[list(WRONG_WHEN_CLEAN)] = 3 - LABELS[list(WRONG_WHEN_CLEAN)]
    progress = autoattack.begin(LABELS, clean)
    return progress, clean


def planned(stage, calls, plan):
    """An attack that breaks what the plan says, and writes down what it was asked for."""

    def attack(ids, number):
        calls.append((stage.name, number, ids.tolist()))
        images = np.stack([ids, np.full(len(ids), stage.first + number)], 1)
        broken = np.array([plan.get(int(i)) == stage.first + number for i in ids])
        return images, np.where(broken, (LABELS[ids] + 1) % 4, LABELS[ids])

    return attack


def run_all(progress, plan=PLAN, batches=None, stages=STAGES):
    """Every stage, or so many batches of them: the calls, and the progress after each, as if saved."""
    calls, saved = [], []
    for stage in stages:
        for state in autoattack.run(stage, planned(stage, calls, plan), LABELS, progress, size=SIZE):
            saved.append(copy.deepcopy(state))
            if len(saved) == batches:
                return calls, saved
    return calls, saved


def same(a, b):
    np.testing.assert_array_equal(a.broken_in, b.broken_in)
    np.testing.assert_array_equal(a.predictions, b.predictions)
    assert a.adversarial.keys() == b.adversarial.keys()
    for number in a.adversarial:
        np.testing.assert_array_equal(a.adversarial[number], b.adversarial[number])
    assert (a.round, a.done) == (b.round, b.done)


def test_only_what_is_still_right_is_attacked_in_full_batches():
    progress, _ = begun()
    calls, _ = run_all(progress)
    expected = []
    for stage in STAGES:
        for number in range(stage.rounds):
            todo = [
                i
                for i in range(len(LABELS))
                if i not in WRONG_WHEN_CLEAN and PLAN.get(i, 99) >= stage.first + number
            ]
            expected += [(stage.name, number, todo[at : at + SIZE]) for at in range(0, len(todo), SIZE)]
    assert calls == expected
    assert max(len(ids) for _, _, ids in calls) == SIZE


def test_what_is_found_is_kept():
    progress, clean = begun()
    before = clean.copy()
    run_all(progress)
    np.testing.assert_array_equal(clean, before, "the clean predictions were changed in place")
    for i, label in enumerate(LABELS):
        if i in WRONG_WHEN_CLEAN:
            assert (progress.broken_in[i], progress.predictions[i]) == (autoattack.CLEAN, clean[i])
        elif i in PLAN:
            assert (progress.broken_in[i], progress.predictions[i]) == (PLAN[i], (label + 1) % 4)
            np.testing.assert_array_equal(progress.adversarial[i], [i, PLAN[i]])
        else:
            assert (progress.broken_in[i], progress.predictions[i]) == (autoattack.ROBUST, label)
    assert all(image.base is None for image in progress.adversarial.values())  # none holds its batch
    assert set(progress.adversarial) == set(PLAN)
    assert progress.robust == len(LABELS) - len(PLAN) - len(WRONG_WHEN_CLEAN)
    assert (progress.round, progress.done) == (7, 0)
    again = copy.deepcopy(progress)
    assert run_all(again) == ([], []), "nothing is left to do"
    same(again, progress)


def test_an_interruption_after_any_batch_changes_nothing():
    whole, _ = begun()
    calls, saved = run_all(whole)
    assert len(saved) == len(calls) > 10
    for batches in range(1, len(calls) + 1):
        progress, _ = begun()
        first, before = run_all(progress, batches=batches)
        same(before[-1], saved[batches - 1])
        resumed = before[-1]
        rest, after = run_all(resumed)
        assert first + rest == calls
        assert len(after) == len(calls) - batches
        same(resumed, whole)


def test_interruptions_after_every_batch_change_nothing():
    whole, _ = begun()
    calls, _ = run_all(whole)
    progress, _ = begun()
    made = []
    while True:
        some, saved = run_all(progress, batches=1)
        made += some
        if not some:
            break
        progress = saved[-1]
    assert made == calls
    same(progress, whole)


CONDITIONAL = (
    STAGES[0],
    STAGES[1],
    STAGES[2]._replace(conditional=True),
    autoattack.Stage("last", None, 1, 7),
)


@pytest.mark.parametrize(("broken", "wanted"), [({}, False), ({4: 2}, False), ({5: 3}, True)])
def test_a_conditional_stage_runs_if_the_round_before_it_broke_an_image(broken, wanted):
    """Interrupted after any batch, too, and also from progress that knows nothing of this stage."""
    plan = {0: 1, 10: 7, 7: 4, **broken}
    whole, _ = begun()
    calls, _ = run_all(whole, plan, stages=CONDITIONAL)
    asked = {name for name, _, _ in calls}
    assert asked == {"first", "second", "last"} | ({"third"} if wanted else set())
    assert (whole.broken_in[7] == 4) == wanted
    assert whole.broken_in[10] == 7
    assert autoattack.wanted(CONDITIONAL[2], whole) == wanted
    assert ("third" in autoattack.robust_after(CONDITIONAL, whole)) == wanted
    for batches in range(1, len(calls)):
        progress, _ = begun()
        first, before = run_all(progress, plan, batches, CONDITIONAL)
        rest, _ = run_all(before[-1], plan, stages=CONDITIONAL)
        assert first + rest == calls
        same(before[-1], whole)
    shorter, _ = begun()
    run_all(shorter, plan, stages=CONDITIONAL[:2])
    assert (autoattack.work_left(CONDITIONAL[2], shorter) > 0) == wanted
    run_all(shorter, plan, stages=CONDITIONAL)
    same(shorter, whole)
    assert autoattack.work_left(CONDITIONAL[2], shorter) == 0


def test_nothing_to_attack():
    progress = autoattack.begin(LABELS, (LABELS + 1) % 4)
    assert run_all(progress) == ([], [])
    assert (progress.broken_in == autoattack.CLEAN).all()
    assert all(autoattack.work_left(stage, progress) == 0 for stage in STAGES)


def test_work_left_is_what_an_attack_without_success_has_to_do():
    progress, _ = begun()
    _, saved = run_all(progress)
    for state in (begun()[0], *saved, progress):
        for stage in STAGES:
            left = autoattack.work_left(stage, state)
            if state.round < stage.first:  # nothing is known yet of what comes before
                continue
            calls = []
            for _ in autoattack.run(
                stage, planned(stage, calls, {}), LABELS, copy.deepcopy(state), size=SIZE
            ):
                pass
            assert left == sum(len(ids) for _, _, ids in calls)
    assert autoattack.work_left(STAGES[0], begun()[0]) == 2 * (len(LABELS) - len(WRONG_WHEN_CLEAN))


def test_shares_after_each_stage():
    progress, _ = begun()
    run_all(progress)
    shares = autoattack.robust_after(STAGES, progress)
    assert list(shares) == ["first", "second", "third"]
    n = len(LABELS)
    assert list(shares.values()) == pytest.approx([(n - 2 - 4) / n, (n - 2 - 4) / n, (n - 2 - 8) / n])
    np.testing.assert_array_equal(np.flatnonzero(autoattack.broken_by(progress, 2)), [0, 1, 2, 3, 6, 12])
    np.testing.assert_array_equal(np.flatnonzero(autoattack.broken_by(progress, 0)), WRONG_WHEN_CLEAN)


@pytest.mark.parametrize(
    ("version", "ends"),
    [
        ("robal_aa", {"apgd_ce": 1, "robal_aa": 4}),
        ("standard", {"apgd_ce": 1, "robal_aa": 4, "autoattack": 8}),
        ("torchattacks", {"torchattacks": 8}),
        ("plus", {"autoattack_plus": 22}),
        ("rand", {"autoattack_rand": 2}),
        ("fast", {"fast": 7}),
        ("union", {"apgd_ce": 1, "robal_aa": 4, "autoattack": 8, "union": 13}),
        ("apgd_ce,apgd_t,fab_t,square,pma", {"apgd_ce": 1, "robal_aa": 4, "autoattack": 8, "custom": 10}),
        ("apgd_ce,apgd_t,fab_t,square", {"apgd_ce": 1, "robal_aa": 4, "autoattack": 8}),
        ("apgd_ce", {"apgd_ce": 1}),
        ("apgd_t", {"custom": 3}),
        ("fab_t,apgd_ce", {"custom": 4}),
        ("apgd_ce,apgd_t,square", {"apgd_ce": 1, "robal_aa": 4, "custom": 5}),
        ("apgd_t,apgd_ce", {"custom": 4}),
    ],
)
def test_outcomes_have_the_names_of_the_parts(version, ends):
    stages = autoattack.stages(version, 4, threat=THREAT)
    last = stages[-1].last
    # Image i is broken in round i; the first is wrong when clean, the one after the last round is robust.
    labels = np.arange(last + 2) % 4
    broken_in = np.append(np.arange(last + 1), autoattack.ROBUST)
    predictions = np.where(broken_in == autoattack.ROBUST, labels, (labels + 1) % 4)
    progress = autoattack.Progress(broken_in, predictions, {})
    found = autoattack.outcomes(version, stages, progress, labels)
    assert list(found) == list(ends)
    for name, end in ends.items():
        np.testing.assert_array_equal(np.flatnonzero(found[name] != labels), np.arange(end + 1), name)
        np.testing.assert_array_equal(found[name][: end + 1], predictions[: end + 1], name)


# ---------------------------------------------------------------- small real ensembles

EPSILONS = {"linf": 0.1, "l2": 0.4}
CLASSES = 4
COUNT = 19
SHORT = {"steps": 5, "queries": 30}


def problem():
    """A model, images at several distances from its boundaries, labels, one key per image.

    Of images whose first pixel is white the logits are so large that the gradient of the cross entropy
    vanishes; of those whose second is, there is no gradient at all.
    """
    rng = np.random.RandomState(0)
    weight = jnp.asarray(rng.randn(36, CLASSES) / 6, jnp.float32)

    def logits_fn(x):
        # Sums over an axis of its own: an image's logits do not depend on the batch's size.
        z = ((x.reshape(len(x), -1, 1) - 0.5) * weight[None]).sum(1)
        z = (5 * jnp.tanh(z) + z) * jnp.where(x[:, 0, 0] > 0.5, 1e4, 1.0)
        return jnp.where(x[:, 0, 1] > 0.5, jax.lax.stop_gradient(z), z)

    images = np.clip(0.5 + rng.randn(COUNT, 6, 6, 1) * rng.uniform(0.1, 1, (COUNT, 1, 1, 1)), 0, 1)
    images[:, 0, :2] = 0
    images[:6, 0, 0] = images[6:12, 0, 1] = 1
    images = images.astype(np.float32)
    labels = np.asarray(logits_fn(images)).argmax(-1)
    labels[[2, 11]] = (labels[[2, 11]] + 1) % CLASSES
    return logits_fn, images, labels, jax.random.split(jax.random.key(0), COUNT)


@functools.cache
def ensemble(norm, size, version="standard"):
    """Result of an ensemble of few steps, and how often the model was traced."""
    logits_fn, images, labels, keys = problem()
    traced = []

    def counted(x):
        traced.append(x.shape)
        return logits_fn(x)

    threat = ThreatModel(EPSILONS[norm], norm)
    found = robal_jax.autoattack(
        counted, keys, images, labels, threat=threat, version=version, batch_size=size, **SHORT
    )
    return found, len(traced)


def same_found(one, other):
    np.testing.assert_array_equal(one.images, other.images)
    np.testing.assert_array_equal(one.predictions, other.predictions)
    assert list(one.robust) == list(other.robust)
    for name in one.robust:
        np.testing.assert_array_equal(one.robust[name], other.robust[name], name)


def assert_sound(found, norm, logits_fn):
    """Allowed images, whose predictions are those of the model; each attack only adds to what is broken."""
    _, images, labels, _ = problem()
    broken = ~list(found.robust.values())[-1]
    np.testing.assert_array_equal(found.images[~broken], images[~broken])
    np.testing.assert_array_equal(found.images[~found.robust["clean"]], images[~found.robust["clean"]])
    delta = (np.float64(found.images) - images).reshape(COUNT, -1)
    distance = np.abs(delta).max(1) if norm == "linf" else np.linalg.norm(delta, axis=1)
    # Each of 36 pixels is rounded by 2^-25 at most, and the radius by as much.
    assert distance.max() <= EPSILONS[norm] + 8 * 2.0**-24
    assert found.images.min() >= 0
    assert found.images.max() <= 1
    assert found.images.dtype == np.float32
    np.testing.assert_array_equal(found.predictions != labels, broken)
    np.testing.assert_array_equal(logits_fn(found.images).argmax(-1), found.predictions)
    for before, after in itertools.pairwise(found.robust.values()):
        assert (after <= before).all()


@pytest.mark.slow
@pytest.mark.parametrize("norm", EPSILONS)
def test_an_ensemble_finds_allowed_images(norm):
    logits_fn, _, _, _ = problem()
    found, _ = ensemble(norm, 8)
    assert_sound(found, norm, logits_fn)
    assert list(found.robust) == ["clean", "apgd_ce", "apgd_t", "fab_t", "square"]
    np.testing.assert_array_equal(np.flatnonzero(~found.robust["clean"]), [2, 11])
    # By the cross entropy; by the DLR where that has no gradient; by Square where nothing has; not at all.
    left = {name: right.sum() for name, right in found.robust.items()}
    assert left["clean"] > left["apgd_ce"] > left["apgd_t"]
    assert left["fab_t"] > left["square"] > 0


@pytest.mark.slow
def test_union_continues_after_autoattack():
    """The outcomes of AutoAttack are its own; only what is left is attacked further."""
    (both, _), (alone, _) = ensemble("linf", 8, "union"), ensemble("linf", 8)
    assert list(both.robust) == [*alone.robust, "pma", "apgd_malt"]
    for name in alone.robust:
        np.testing.assert_array_equal(both.robust[name], alone.robust[name], name)
    assert_sound(both, "linf", problem()[0])


@pytest.mark.slow
def test_fast_breaks_what_the_square_of_autoattack_breaks_where_gradients_mislead():
    """Of three queries, so that the short Square leaves something."""
    logits_fn, images, labels, keys = problem()
    settings = {"threat": THREAT, "steps": 5, "queries": 3, "batch_size": 8}
    runs = {
        version: robal_jax.autoattack(
            lambda x: jax.lax.stop_gradient(logits_fn(x)), keys, images, labels, version=version, **settings
        )
        for version in ("fast", "standard")
    }
    fast, standard = runs["fast"].robust, runs["standard"].robust
    assert list(fast) == ["clean", "pma", "apgd_malt", "square", "square_full"]
    by_square = standard["fab_t"] & ~standard["square"]
    assert (by_square & fast["square"]).any(), "the short Square breaks all that this test is about"
    assert not (by_square & fast["square_full"]).any()


@pytest.mark.slow
def test_fast_needs_no_full_square_where_gradients_lead():
    """On the images whose logits have a gradient; on all of them, it is needed."""
    logits_fn, images, labels, keys = problem()
    smooth = images[:, 0, 1, 0] == 0
    found = robal_jax.autoattack(
        logits_fn, keys[smooth], images[smooth], labels[smooth], threat=THREAT, version="fast", **SHORT
    )
    assert list(found.robust) == ["clean", "pma", "apgd_malt", "square"]
    assert found.robust["square"].any(), "nothing was left for the short Square"
    everything, _ = ensemble("linf", 8, "fast")
    assert list(everything.robust) == ["clean", "pma", "apgd_malt", "square", "square_full"]
    assert_sound(everything, "linf", logits_fn)


@pytest.mark.slow
def test_the_batch_size_changes_nothing():
    """Neither what is found nor, from two batches on, how often the model is traced."""
    (eight, traced), (all_at_once, traced_once) = ensemble("linf", 8), ensemble("linf", 100)
    same_found(eight, all_at_once)
    assert traced == traced_once


@pytest.mark.slow
def test_a_round_is_as_if_run_by_hand():
    """Keys, rounds and targets are those of the stages; what comes first does not depend on what follows."""
    logits_fn, images, labels, keys = problem()
    found, _ = ensemble("linf", 8)
    (stage, *_) = autoattack.stages("standard", CLASSES, threat=ThreatModel(EPSILONS["linf"]), **SHORT)
    folded = jax.vmap(lambda key: jax.random.fold_in(key, stage.first))(keys)
    shown = jax.jit(partial(stage.attack, logits_fn))(folded, images, labels, 0)
    np.testing.assert_array_equal(
        (logits_fn(shown).argmax(-1) == labels) & found.robust["clean"], found.robust["apgd_ce"]
    )
    one, _ = ensemble("linf", 8, "apgd_ce")
    assert list(one.robust) == ["clean", "apgd_ce"]
    np.testing.assert_array_equal(one.robust["apgd_ce"], found.robust["apgd_ce"])


@pytest.mark.slow
def test_attacks_in_the_order_of_the_list():
    found, _ = ensemble("linf", 8, "square,apgd_ce")
    assert list(found.robust) == ["clean", "square", "apgd_ce"]
    assert_sound(found, "linf", problem()[0])


def test_no_attack():
    found, _ = ensemble("linf", 8, "none")
    _, images, labels, _ = problem()
    assert list(found.robust) == ["clean"]
    np.testing.assert_array_equal(found.images, images)
    np.testing.assert_array_equal(found.predictions == labels, found.robust["clean"])


@pytest.mark.parametrize(
    ("version", "message"),
    [("autoattack", "unknown ensemble 'autoattack'"), ("apgd_ce,apgd_ce", "no repeats")],
)
def test_versions_that_are_refused(version, message):
    with pytest.raises(InputError, match=message):
        ensemble("linf", 8, version)


@pytest.mark.slow
def test_one_key_is_split_by_position():
    logits_fn, images, labels, _ = problem()
    found = robal_jax.autoattack(
        logits_fn, jax.random.key(0), images, labels,
        threat=ThreatModel(EPSILONS["linf"]), version="apgd_ce", **SHORT,
    )  # fmt: skip
    same_found(found, ensemble("linf", 8, "apgd_ce")[0])  # problem() splits this key


@pytest.mark.slow
def test_a_random_model():
    """Each image's noise comes from its key; the version 'rand' averages over it."""
    logits_fn, images, labels, keys = problem()

    def random_fn(x, keys):
        noise = jax.vmap(lambda key: jax.random.normal(key, (CLASSES,)))(keys)
        return logits_fn(x) + 0.01 * noise

    attack = partial(
        robal_jax.autoattack, random_fn, keys, images, labels,
        threat=ThreatModel(EPSILONS["linf"]), version="rand", steps=3,
    )  # fmt: skip
    eight, all_at_once = attack(batch_size=8), attack(batch_size=100)
    same_found(eight, all_at_once)
    assert list(eight.robust) == ["clean", "apgd_ce", "apgd_dlr"]
    assert_sound(eight, "linf", logits_fn)
    assert eight.robust["apgd_dlr"].sum() < eight.robust["clean"].sum()


@pytest.mark.parametrize("compiled", [False, True])
def test_weights_are_arguments_of_the_programs(tmp_path, compiled):
    """Not constants, though the model closes over them and even if the user has compiled it."""
    hidden = jnp.asarray(np.random.RandomState(0).randn(36, 64), jnp.float32)
    logits_fn = lambda x: jnp.tanh((x.reshape(len(x), -1) - 0.5) @ hidden) @ hidden[:CLASSES].T  # noqa: E731
    _, images, labels, keys = problem()
    with dumped_programs(tmp_path) as longest_line:
        robal_jax.autoattack(
            jax.jit(logits_fn) if compiled else logits_fn, keys, images, labels,
            threat=ThreatModel(0.1), version="apgd_ce", steps=2,
        )  # fmt: skip
        written = 2 * 4 * hidden.size  # two digits per byte
        assert 0 < longest_line() < written / 4
        jax.jit(logits_fn)(images)
        assert longest_line() > written


@contextlib.contextmanager
def dumped_programs(folder):
    """Writes every program that is compiled; gives the length of their longest line."""
    jax.config.update("jax_dump_ir_to", str(folder))
    try:
        yield lambda: max(
            (len(line) for path in folder.glob("*.mlir") for line in path.read_text().splitlines()), default=0
        )
    finally:
        jax.config.update("jax_dump_ir_to", "")


def test_a_model_of_anybody_s_is_attacked_in_full_float32():
    """By default accelerators multiply matrices in a shorter type; no robust accuracy may rest on that."""
    weight = jnp.ones((64, 10))
    predict, arrays = closure.split(lambda x: x.reshape(len(x), -1) @ weight, (8, 8, 1))
    program = jax.jit(predict).lower(arrays, jnp.zeros((2, 8, 8, 1))).as_text()
    assert "precision = [HIGHEST, HIGHEST]" in program


def test_a_random_model_too_is_attacked_in_full_float32():
    seen = set()

    def model(x, keys):
        seen.add(jax.config.jax_default_matmul_precision)
        return x.reshape(len(x), -1)[:, :4]

    images = jnp.full((2, 2, 2, 1), 0.5)
    arguments = jax.random.key(0), images, jnp.zeros(2, int)
    robal_jax.autoattack(model, *arguments, threat=THREAT, version="rand", steps=1)
    assert seen == {"highest"}


def test_a_model_that_depends_on_its_batch_is_refused():
    def model(x):
        x = x.reshape(len(x), -1)[:, :4]
        return x - x.mean(0, keepdims=True)

    images = jax.random.uniform(jax.random.key(0), (3, 2, 2, 1))
    arguments = jax.random.key(0), images, jnp.zeros(3, int)
    with pytest.raises(InputError, match="change with the images beside it"):
        robal_jax.autoattack(model, *arguments, threat=THREAT, version="apgd_ce")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_probabilities_are_refused(dtype):
    def model(x):
        return jax.nn.softmax(x.reshape(len(x), -1)[:, :4].astype(dtype))

    images = jax.random.uniform(jax.random.key(0), (3, 2, 2, 1))
    arguments = jax.random.key(0), images, jnp.zeros(3, int)
    with pytest.raises(InputError, match=r"returns probabilities, .*; pass a model that returns logits, or"):
        robal_jax.autoattack(model, *arguments, threat=THREAT, version="apgd_ce")
    logs = lambda x: jnp.log(model(x).astype(float))  # noqa: E731
    robal_jax.autoattack(logs, *arguments, threat=THREAT, version="apgd_ce", steps=2)


def test_images_that_fill_up_a_batch_are_not_counted():
    def model(x):
        lead = x.reshape(-1) - 0.5
        return jnp.stack([-lead, jnp.where(lead < -0.2, jnp.nan, lead)], -1)

    images, labels = jnp.array([0.4, 0.4, 0.4, 0.4, 0.2]).reshape(5, 1, 1, 1), jnp.zeros(5, int)
    with pytest.raises(InputError, match=r"not finite for 1 of 1 images \(clean\)"):
        robal_jax.autoattack(
            model, jax.random.key(0), images, labels, threat=THREAT, version="apgd_ce", batch_size=4
        )
