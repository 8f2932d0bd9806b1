"""Each fault is flagged by its own check, and an honest model by none (robal_jax.evaluation.verdicts)."""

import json
import re
import sys
import types
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import multinomial

from robal_jax import attacks, losses, metrics
from robal_jax.attacks import ThreatModel, autoattack
from robal_jax.attacks.threat import COMMON_NORMS
from robal_jax.evaluation import ensemble_checks, evidence, findings, loop, measurements, verdicts
from robal_jax.evaluation.explanations import ALPHA_SQUARE, EXPLANATIONS, ON_OCCASION
from robal_jax.evaluation.steps import CONDITIONS
from robal_jax.evaluation.victim import Victim
from robal_jax.reporting.curves import curves_figure
from robal_jax.reporting.results import (
    EVERYTHING,
    FIXED_STEPS,
    FLAGGED,
    NOT_RUN,
    NOTE,
    OUTCOMES,
    OWN_GRADIENT,
    PASSED,
    TOO_FEW,
    Results,
)

# ---------------------------------------------------------------- judging what was measured by hand

N, CLASSES, EPSILON = 600, 5, 0.1
LABELS = np.arange(N) % CLASSES


def first(count):
    """The first so many images are right."""
    return np.arange(N) < count


def right_logits():
    """Logits ``[N, CLASSES]`` of a model that is right on 480 images."""
    logits = np.random.RandomState(0).uniform(-1, 1, (N, CLASSES)).astype(np.float32)
    called = np.where(first(480), LABELS, (LABELS + 1) % CLASSES)
    logits[np.arange(N), called] = 3
    return logits


def attacked(right, part=1.0):
    """Which images are right under PGD, and their margins, lowered by this part of about one."""
    rng = np.random.RandomState(1)
    before = np.asarray(attacks.margin(right_logits(), LABELS))
    return {"right": right[:, None], "margin": (before - part * rng.uniform(0.8, 1.2, N))[:, None]}


def healthy():
    """What an honest model would give: 480 images right when clean, 300 under PGD-20."""
    rng = np.random.RandomState(0)
    looks = {f"forward_{number}": {"logits": right_logits()} for number in range(measurements.FORWARDS)}
    left = {1: 360, 2: 340, 5: 320, 10: 303}
    right = {
        "steps": np.stack([first(left.get(count, 300 - count // 500)) for count in measurements.STEPS], 1),
        "unbounded": first(4),
        # Less than clean; and a random search repairs some of what was wrong.
        "gradient_free": first(400) | ~first(590),
        "transfer": first(420),
    }
    for number in range(1, measurements.RESTARTS):  # one image more in the first three, and in one later
        right[f"restart_{number}"] = (first(300) & (np.arange(N) != number % 4))[:, None]
    scales = {
        f"rescaled_{scale:g}": attacked(
            first({1: 300, 3: 297}.get(scale, 300 + number)), 1.0 if scale == 1 else 0.9
        )
        for number, scale in enumerate(measurements.SCALES)
    }
    radii = {0.25: 400, 0.5: 350, 2.0: 100, 4.0: 0, 8.0: 0}
    return {
        **looks,
        **scales,
        "both_gradients": {
            f"{loss}{name}": values
            for loss in ("", "margin_")
            for name, values in (("least", rng.uniform(0.01, 1, N)), ("finite", np.ones(N, bool)))
        },
        "margin": {name: values[:, 0] for name, values in attacked(first(301)).items()},
        "among_others": {"logits": right_logits()},
        "inference": {"calls": np.zeros(N, int)},
        **{name: {"right": values} for name, values in right.items()},
        **{
            f"radius_{factor:g}": {"right": first(count)[:, None], "radius": np.full(N, factor * EPSILON)}
            for factor, count in radii.items()
        },
    }


def drawn(curves):
    return {name: curve.figures for name, curve in curves.items()}


def judged(measured, survived=None, by_square=None, by_bpda=None):
    """The verdicts by name, and the curves."""
    # Of 480 images: Square breaks one that no other attack breaks, and many that were broken.
    survived = first(280)[:480] if survived is None else survived
    by_square = (~first(280) | first(1))[:480] if by_square is None else by_square
    found, curves = verdicts.give_verdicts(measured, LABELS, survived, by_square, EPSILON, by_bpda)
    curves = drawn(curves)
    assert json.loads(json.dumps([v._asdict() for v in found], allow_nan=False))
    assert json.loads(json.dumps(curves, allow_nan=False))
    assert all(v.outcome in OUTCOMES and v.title and v.statement.endswith(".") for v in found)
    by_name = {verdict.name: verdict for verdict in found}
    assert tuple(by_name) == NAMES + ("bpda",) * (by_bpda is not None)
    return by_name, curves


def having(found, outcome):
    return [name for name, verdict in found.items() if verdict.outcome == outcome]


def flagged(found):
    return having(found, FLAGGED)


NAMES = (
    "logit_scale", "steps", "restarts", "zero_gradients", "nan_gradients", "unbounded", "gradient_free",
    "square", "transfer", "randomised", "probabilities", "inference",
)  # fmt: skip


def test_an_honest_model_passes_every_check():
    found, _ = judged(healthy())
    assert having(found, PASSED) == list(NAMES)


def test_every_check_is_explained_and_counted():
    assert tuple(EXPLANATIONS) == (*NAMES, "stored_images")
    assert len(EXPLANATIONS) == evidence.CHECKS
    assert pytest.approx(evidence.FAMILY_LEVEL) == evidence.LEVEL * evidence.CHECKS
    for name, verdict in judged(healthy())[0].items():
        title, doubts, *meaning = EXPLANATIONS[name]
        assert (verdict.title, verdict.doubts, list(verdict.meaning.values())) == (title, doubts, meaning)
        assert all(sentence.endswith(".") or sentence.endswith(").") for sentence in meaning)


def test_checks_that_cast_doubt_on_everything():
    found, _ = judged(healthy())
    everything = {"nan_gradients", "square", "randomised", "probabilities", "inference"}
    for name, verdict in found.items():
        assert verdict.doubts == (EVERYTHING if name in everything else FIXED_STEPS)


@pytest.mark.parametrize(("broken", "outcome"), [(4, PASSED), (5, NOTE), (12, NOTE), (13, FLAGGED)])
def test_what_bpda_breaks_after_the_model_s_own_gradient(broken, outcome):
    """Of 480 images; 4.8 are 1 %."""
    found, _ = judged(healthy(), by_bpda=first(broken)[:480])
    assert found["bpda"].outcome == outcome
    assert (found["bpda"].title, found["bpda"].doubts) == (ON_OCCASION["bpda"].title, OWN_GRADIENT)
    assert f"Of 480 images that are right when clean, BPDA breaks {broken} that" in found["bpda"].statement
    assert [found[name] for name in NAMES] == list(judged(healthy())[0].values())


def test_with_a_further_check_each_is_at_a_lower_level():
    """Square breaks so many of so many images that the p-value is between the two levels."""
    low, high = evidence.FAMILY_LEVEL / (evidence.CHECKS + 1), evidence.LEVEL
    images = next(n for n in range(100, 10_000) if low < evidence.share_p_value(4, n, ALPHA_SQUARE) < high)
    everything, four = np.ones(images, bool), np.arange(images) < 4
    found, _ = judged(healthy(), everything, four)
    assert found["square"].outcome == FLAGGED
    found, _ = judged(healthy(), everything, four, by_bpda=~everything)
    assert found["square"].outcome == PASSED


def replaced(name, field, change):
    """A fault: one array is another one."""

    def fault(measured):
        measured[name][field] = change(measured[name][field].copy())

    return fault


def column(number, right):
    """One column is another one."""

    def change(values):
        values[:, number] = right
        return values

    return change


def at_scale(scale, part, count, own=1.0):
    """At another scale PGD lowers the margin by this part, and leaves so many images.

    All logits are multiplied by ``own``.
    """

    def fault(measured):
        measured[f"rescaled_{scale:g}"] = attacked(first(count), part)
        for arrays in measured.values():
            arrays |= {
                name: np.float32(own) * arrays[name] for name in ("logits", "margin") if name in arrays
            }

    return fault


def one_by_one(measured):
    """Each restart breaks two other images."""
    for number in range(1, measurements.RESTARTS):
        measured[f"restart_{number}"]["right"][20 * number : 20 * number + 2] = False


def almost_level(measured):
    """Two passes differ by next to nothing, but on the other side of a tie."""
    for number in range(measurements.FORWARDS):
        logits = measured[f"forward_{number}"]["logits"]
        logits[0, 1] = logits[0, 0] + np.float32(-1e-6 if number < 4 else 1e-6)
    measured["among_others"]["logits"] = measured["forward_0"]["logits"]


def as_probabilities(measured, dtype=jnp.float32):
    for arrays in measured.values():
        if "logits" in arrays:
            shares = jax.nn.softmax(jnp.asarray(arrays["logits"], dtype))
            arrays["logits"] = np.asarray(shares, np.float32)


def of_one_class(logits):
    """Logits of which that of the first class is larger by a little."""
    return logits + np.float32(1e-3) * (np.arange(logits.shape[-1]) == 0)


def zeros(count):
    return lambda gradient: np.where(first(count), 0, gradient)


last_step = len(measurements.STEPS) - 1
FAULTS = {
    "zero gradients": (FLAGGED, "zero_gradients", replaced("both_gradients", "least", zeros(20))),
    "zero gradient of one image": (NOTE, "zero_gradients", replaced("both_gradients", "least", zeros(1))),
    "no gradient of the margin": (
        FLAGGED,
        "zero_gradients",
        replaced("both_gradients", "margin_least", zeros(20)),
    ),
    "NaN in one gradient": (
        FLAGGED,
        "nan_gradients",
        replaced("both_gradients", "finite", lambda _: ~first(1)),
    ),
    "large scale": (FLAGGED, "logit_scale", at_scale(0.01, 1.1, 290, own=100)),
    "small scale": (FLAGGED, "logit_scale", at_scale(100, 1.3, 290, own=0.01)),
    "effect of the scale on a model as sure as it is right": (NOTE, "logit_scale", at_scale(100, 1.3, 280)),
    "small effect of the scale": (NOTE, "logit_scale", at_scale(10, 1.03, 280)),
    "more steps": (NOTE, "steps", replaced("steps", "right", column(last_step, first(280)))),
    "one step": (FLAGGED, "steps", replaced("steps", "right", column(0, first(270)))),
    "more restarts": (NOTE, "restarts", one_by_one),
    "unbounded": (FLAGGED, "unbounded", replaced("unbounded", "right", lambda _: first(15))),
    "a little unbounded": (NOTE, "unbounded", replaced("unbounded", "right", lambda _: first(6))),
    # As many are right under both, but of these Square has only repaired some.
    "square beats PGD": (
        FLAGGED,
        "gradient_free",
        replaced("gradient_free", "right", lambda _: first(260) | ~first(560)),
    ),
    "transfer": (FLAGGED, "transfer", replaced("transfer", "right", lambda _: first(260))),
    "random": (FLAGGED, "randomised", replaced("forward_3", "logits", of_one_class)),
    "random in the last place": (FLAGGED, "randomised", almost_level),
    "probabilities": (FLAGGED, "probabilities", as_probabilities),
    "probabilities in bfloat16": (FLAGGED, "probabilities", partial(as_probabilities, dtype=jnp.bfloat16)),
    "derivatives": (FLAGGED, "inference", replaced("inference", "calls", lambda calls: calls + 1)),
    "batch": (FLAGGED, "inference", replaced("among_others", "logits", of_one_class)),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_seen_by_its_own_check_alone(fault):
    outcome, name, commit = FAULTS[fault]
    measured = healthy()
    commit(measured)
    if name == "probabilities":  # of which the margins are others
        for entry in measured:
            if "margin" in measured[entry]:
                measured[entry]["margin"] = measured[entry]["margin"] * 0
    found, _ = judged(measured)
    assert {key: found[key].outcome for key in NAMES if found[key].outcome != PASSED} == {name: outcome}
    assert found[name].statement != judged(healthy())[0][name].statement


@pytest.mark.parametrize(("fault", "softmax"), [("large scale", "saturated"), ("small scale", "flat")])
def test_a_scale_that_misleads_is_named(fault, softmax):
    measured = healthy()
    FAULTS[fault][2](measured)
    assert f"the softmax is {softmax}, and" in judged(measured)[0]["logit_scale"].statement


@pytest.mark.parametrize("fault", ["random", "batch"])
def test_an_offset_of_all_logits_hides_nothing(fault):
    """And means nothing by itself."""
    outcome, name, commit = FAULTS[fault]
    for broken in (False, True):
        measured = healthy()
        if broken:
            commit(measured)
        for arrays in measured.values():
            if "logits" in arrays:
                arrays["logits"] = arrays["logits"].astype(np.float64) + 1e5
        assert judged(measured)[0][name].outcome == (outcome if broken else PASSED)
    measured = healthy()
    replaced("forward_3" if fault == "random" else "among_others", "logits", lambda z: z + 1)(measured)
    assert judged(measured)[0][name].outcome == PASSED


@pytest.mark.parametrize(
    ("field", "by_bpda", "doubts"),
    [
        ("least", None, FIXED_STEPS),
        ("margin_least", None, EVERYTHING),
        ("margin_least", first(0)[:480], OWN_GRADIENT),
    ],
)
def test_without_a_gradient_of_the_margin_no_attack_that_follows_it_counts(field, by_bpda, doubts):
    measured = healthy()
    replaced("both_gradients", field, zeros(100))(measured)
    found = judged(measured, by_bpda=by_bpda)[0]["zero_gradients"]
    assert (found.outcome, found.doubts) == (FLAGGED, doubts)
    assert ("no attack that follows a gradient leaves its start." in found.statement) == (
        doubts != FIXED_STEPS
    )


def test_statements_say_what_was_measured():
    found, _ = judged(healthy())
    said = {name: verdict.statement for name, verdict in found.items()}
    assert (
        "leaves an accuracy of 62.5 %, and by 1 with the margin as its loss, which leaves 62.7 %"
        in said["logit_scale"]
    )
    assert (
        "75.0 % after one step, 62.5 % after 20 steps and 62.1 % after up to 1000: 20 steps are enough"
        in (said["steps"])
    )
    assert "62.5 % with one start and 61.7 % with 10 starts: one start is enough." in said["restarts"]
    assert "zero for 0 of 480" in said["zero_gradients"]
    assert "without a bound is 0.8 %" in said["unbounded"]
    assert "83.3 % under 1000 queries of Square" in said["gradient_free"]
    assert "breaks 1 of the 280 images (of 480 that are right when clean)" in said["square"]
    assert (
        "87.5 % on images made on the surrogate, 62.5 % under PGD-20 and 61.0 % under all" in said["transfer"]
    )
    measured = healthy()
    FAULTS["one step"][2](measured)
    assert "one step is stronger than 20" in judged(measured)[0]["steps"].statement
    measured = healthy()
    FAULTS["more steps"][2](measured)
    assert "PGD-20 is optimistic by 4.2 points" in judged(measured)[0]["steps"].statement


def test_images_that_are_wrong_when_clean_do_not_count():
    """Whatever the attacks make of them."""
    measured, other = healthy(), healthy()
    rng = np.random.RandomState(3)
    for name, arrays in other.items():
        for field, values in arrays.items():
            if field in ("right", "margin", "least", "margin_least", "finite", "margin_finite"):
                values[480:] = rng.uniform(0, 1, values[480:].shape) > 0.5 if values.dtype == bool else 0
        assert name
    assert judged(measured) == judged(other)


@pytest.mark.parametrize("right", [0, 1, 12, 15])
def test_too_few_images_prove_nothing(right):
    measured = healthy()
    wrong = right_logits()
    wrong[right:480] = np.roll(wrong[right:480], 1, -1)
    for arrays in measured.values():
        if "logits" in arrays:
            arrays["logits"] = wrong
    measured["unbounded"]["right"] = first(0)
    found, _ = judged(measured, np.ones(right, bool), np.zeros(right, bool))
    outcomes = {name: verdict.outcome for name, verdict in found.items()}
    of_outputs = {"randomised": PASSED, "probabilities": PASSED, "inference": PASSED}
    assert outcomes == dict.fromkeys(NAMES, TOO_FEW) | of_outputs
    assert "too few images are right when clean to tell; the smallest gap" in found["unbounded"].statement
    if not right:
        assert "100.0 points" in found["transfer"].statement


def random_arrays(seed):
    """Measurements of any kind: shares from none to all, margins up and down, some of it not finite.

    In every second one, only a fifth of the arrays are not those of a healthy model.
    """
    rng, measured = np.random.RandomState(seed), healthy()
    images = rng.choice([1, 3, 20, 90, 600])
    others = 1.0 if seed % 2 else 0.2

    def drawn(field, like):
        if like.dtype == bool:
            return rng.uniform(0, 1, like.shape) < rng.choice([0, 0.01, 0.5, 0.52, 0.99, 1])
        if field == "margin":
            return rng.normal(rng.choice([-1, 0, 1]), rng.choice([0, 0.1, 1]), like.shape)
        if field in ("least", "margin_least"):
            return np.where(rng.uniform(0, 1, like.shape) < rng.choice([0, 0, 0.005, 0.5]), 0.0, like)
        if field == "logits":
            logits = rng.normal(0, rng.choice([0, 1e-3, 1, 100]), like.shape).astype(np.float32)
            damaged = rng.uniform(0, 1, like.shape) < rng.choice([0, 0, 0.01])
            return np.where(damaged, np.float32(rng.choice([np.nan, np.inf])), logits)
        return like

    for name, arrays in measured.items():
        for field, values in arrays.items():
            like = values[:images]
            arrays[field] = drawn(field, like) if rng.uniform() < others else like
        if rng.uniform() < 0.5 and name.startswith("forward"):
            measured[name] = measured["forward_0"]
    return measured, LABELS[:images]


SENTENCES = {
    "is optimistic by": NOTE, "help less than": FLAGGED, "hides its own": FLAGGED, "are enough": PASSED,
    "is enough": PASSED, "as they should": PASSED, "come from that alone": FLAGGED,
    "does not help": PASSED, "stronger than 20": FLAGGED, "stays at some": NOTE, "stays where": FLAGGED,
    "leaves its start": FLAGGED, "can leave every": PASSED,
    "too few images": TOO_FEW, "miss something": FLAGGED, "no clear difference": PASSED,
}  # fmt: skip


def random_verdicts(seed):
    """Verdicts and curves of :func:`random_arrays`."""
    measured, labels = random_arrays(seed)
    clean = measured["forward_0"]["logits"].argmax(-1) == labels
    survived, by_square = (np.random.RandomState(seed).uniform(0, 1, (2, clean.sum())) < 0.5)[:2]
    return verdicts.give_verdicts(measured, labels, survived, by_square, EPSILON)


def test_every_sentence_occurs():
    """So that what is said of them below is said of something."""
    found = [verdict for seed in range(60) for verdict in random_verdicts(seed)[0]]
    for _, _, commit in FAULTS.values():
        measured = healthy()
        commit(measured)
        found += judged(measured)[0].values()
    said = {words: {v.outcome for v in found if words in v.statement} for words in SENTENCES}
    assert said == {words: {outcome} for words, outcome in SENTENCES.items()}


@pytest.mark.parametrize("seed", range(60))
def test_a_sentence_never_contradicts_the_figures(seed):
    found, curves = random_verdicts(seed)
    json.dumps([[verdict._asdict() for verdict in found], drawn(curves)], allow_nan=False)
    for verdict in found:
        for words, outcome in SENTENCES.items():
            if words in verdict.statement:
                assert verdict.outcome == outcome, verdict.statement
        gap = verdict.evidence.get("gap")
        if gap is None:
            continue
        if verdict.name in ("gradient_free", "transfer"):
            under, main, together = map(float, re.findall(r"([\d.]+) %", verdict.statement)[:3] or (0, 0, 0))
            assert together <= main
            assert abs(100 * gap - (together - under)) < 0.11
            assert verdict.outcome != FLAGGED or under < together
            assert verdict.outcome != NOTE or under < main
            assert "as they should" not in verdict.statement or under >= together
        if verdict.outcome in (NOTE, FLAGGED) and "points" in verdict.statement:
            said = float(re.search(r"(-?[\d.]+) points", verdict.statement)[1])
            of = verdict.evidence["gap_to_pgd"] if verdict.name in ("gradient_free", "transfer") else gap
            assert said == pytest.approx(100 * of, abs=0.051)
            assert said > 0


def test_curves_are_what_the_report_draws():
    _, curves = judged(healthy())
    assert {name: curve["x"] for name, curve in curves.items()} == {
        "scale": list(measurements.SCALES),
        "steps": list(measurements.STEPS),
        "restarts": list(range(1, measurements.RESTARTS + 1)),
        "epsilon": [0.0, 0.025, 0.05, 0.1, 0.2, 0.4],  # until none is left
    }
    counts = {
        "scale": ("PGD-20", [300, 301, 302, 303, 300, 297, 306, 307, 308]),
        "steps": ("PGD", [360, 340, 320, 303, 300, 300, 300, 300, 299, 298]),
        "restarts": ("PGD-20", [300, 299, 298, 297, 296, 296, 296, 296, 296, 296]),
        "epsilon": ("PGD-20", [480, 400, 350, 300, 100, 0]),
    }
    for name, (series, right) in counts.items():
        assert curves[name]["series"] == {series: [metrics.share(first(count)) for count in right]}
    results = Results({"method": "a method", "dataset": "a data set"}, {}, {"curves": curves})
    assert len(curves_figure(results).axes) == 3


def test_the_curve_by_radius_ends_without_a_bound_if_an_image_is_always_right():
    measured = healthy()
    for factor in (4, 8):
        measured[f"radius_{factor}"]["right"][:1] = True
    assert judged(measured)[1]["epsilon"]["x"] == [0.0, 0.025, 0.05, 0.1, 0.2, 0.4, 0.8]


def test_no_surrogate_is_no_verdict():
    measured = healthy()
    del measured["transfer"]
    found, _ = judged(measured)
    assert found["transfer"].outcome == NOT_RUN
    assert "as surrogate" in found["transfer"].statement
    assert flagged(found) == []


@pytest.mark.parametrize(
    ("images", "broken", "expected"),
    [(100, 2, False), (100, 3, True), (600, 5, False), (600, 6, True), (2000, 10, False), (2000, 11, True)],
)
def test_square_after_all_others_may_break_two_in_a_thousand_and_what_chance_adds(images, broken, expected):
    survived = np.arange(images) < images // 2
    by_square = (np.arange(images) < broken) | ~survived
    found, _ = judged(healthy(), survived, by_square)
    assert flagged(found) == ["square"] * expected
    assert found["square"].evidence == {"broken": broken, "survived": images // 2, "images": images}


def test_what_the_full_square_of_fast_breaks_counts_for_square():
    """Images: wrong when clean, broken by PMA, by each Square, and not at all."""
    stages = autoattack.stages("fast", 10, threat=ThreatModel(0.1))
    broken_in = np.array([0, 1, 6, 7, autoattack.ROBUST])
    job, progress = types.SimpleNamespace(ensemble=stages), autoattack.Progress(broken_in, broken_in, {})
    labels = np.zeros(5, int)
    predictions = {name: labels + (broken_in == 0) for name in CONDITIONS}
    nothing = measurements.Sample(np.arange(0), {})
    survived, by_square = findings._after_gradients(job, progress, nothing, predictions, labels)
    np.testing.assert_array_equal(survived, [False, True, True, True])
    np.testing.assert_array_equal(by_square, [False, True, True, False])


@pytest.mark.parametrize(
    ("version", "judged"),
    [("plus", False), ("square,apgd_ce", False), ("apgd_ce,square,pma", False), ("apgd_ce,square", True)],
)
def test_square_is_judged_after_the_strong_gradient_attacks_only(version, judged):
    """Otherwise a later one might have broken the same images."""
    stages = autoattack.stages(version, 10, threat=ThreatModel(0.1))
    broken_in = np.array([next(stage.first for stage in stages if stage.name == "square"), autoattack.ROBUST])
    job, progress = types.SimpleNamespace(ensemble=stages), autoattack.Progress(broken_in, broken_in, {})
    predictions = dict.fromkeys(CONDITIONS, np.zeros(2, int))
    nothing = measurements.Sample(np.arange(0), {})
    survived, by_square = findings._after_gradients(job, progress, nothing, predictions, np.zeros(2, int))
    assert survived.all()
    assert (by_square is not None) == judged


def test_square_in_union_is_judged_as_in_standard():
    """Images: broken by Square, by PMA after it, and not at all."""
    stages = autoattack.stages("union", 10, threat=ThreatModel(0.1))
    first = {stage.name: stage.first for stage in stages}
    broken_in = np.array([first["square"], first["pma"], autoattack.ROBUST])
    job, progress = types.SimpleNamespace(ensemble=stages), autoattack.Progress(broken_in, broken_in, {})
    predictions = dict.fromkeys(CONDITIONS, np.zeros(3, int))
    nothing = measurements.Sample(np.arange(0), {})
    survived, by_square = findings._after_gradients(job, progress, nothing, predictions, np.zeros(3, int))
    assert survived.all()
    np.testing.assert_array_equal(by_square, [True, False, False])


def test_square_alone_is_not_run_after_gradients():
    found, _ = verdicts.give_verdicts(healthy(), LABELS, first(480)[:480], None, EPSILON)
    assert next(verdict for verdict in found if verdict.name == "square").outcome == NOT_RUN


@pytest.mark.parametrize(("left", "doubts"), [(300, EVERYTHING), (12, EVERYTHING), (11, FIXED_STEPS)])
def test_a_flagged_transfer_that_breaks_what_the_ensemble_left_doubts_everything(left, doubts):
    """Of 480 images; 4.8 are 1 %."""
    measured = healthy()
    measured["transfer"]["right"] = ~first(480)
    found, _ = verdicts.give_verdicts(measured, LABELS, first(280)[:480], None, EPSILON)
    clean = right_logits().argmax(-1) == LABELS
    doubted = ensemble_checks.doubt_ensemble(found, measured, clean, first(left), evidence.LEVEL)
    changed = [after for before, after in zip(found, doubted, strict=True) if before != after]
    assert [(verdict.name, verdict.outcome) for verdict in changed] == [("transfer", FLAGGED)] * (left > 11)
    transfer = next(verdict for verdict in doubted if verdict.name == "transfer")
    assert transfer.doubts == doubts
    assert (f"break {left} images of the sample that the ensemble left." in transfer.statement) == (left > 11)


# ---------------------------------------------------------------- the tests behind the verdicts


@pytest.mark.parametrize(("margin", "matched"), [(0.0, 0.05), (0.01, 0.0), (0.01, 0.02), (0.02, 0.1)])
def test_a_gap_within_the_margin_is_rarely_called_one(margin, matched):
    """The level holds, whatever the share of images that either attack alone breaks."""
    shares, images, draws = (matched + margin, matched, 1 - 2 * matched - margin), 300, 20000
    cells = np.random.default_rng(0).multinomial(images, shares, size=draws)
    pairs, counts = np.unique(cells[:, :2], axis=0, return_counts=True)
    called = [evidence.gap_p_value(evidence.Gap(*pair, images), margin) < evidence.LEVEL for pair in pairs]
    assert counts[called].sum() / draws < 1.2 * evidence.LEVEL


@pytest.mark.parametrize(("lost", "gained"), [(8, 2), (20, 9), (3, 30), (1, 1)])
@pytest.mark.parametrize("margin", [0.01, 0.05])
def test_the_p_value_is_that_at_the_likeliest_shares(lost, gained, margin):
    """The likeliest ones found by a search in place of a formula."""
    images = 200
    q = np.linspace(1e-9, (1 - margin) / 2 - 1e-9, 200_001)
    rest = images - lost - gained
    best = q[np.argmax(lost * np.log(q + margin) + gained * np.log(q) + rest * np.log(1 - margin - 2 * q))]
    b, c = np.meshgrid(np.arange(images + 1), np.arange(images + 1))
    b, c = (x[(b - c >= lost - gained) & (b + c <= images)] for x in (b, c))
    shares = (best + margin, best, 1 - margin - 2 * best)
    expected = multinomial.pmf(np.stack([b, c, images - b - c], -1), images, shares).sum()
    found = evidence.gap_p_value(evidence.Gap(lost, gained, images), margin)
    assert found == pytest.approx(expected, rel=2e-4)


def test_a_gap_beyond_the_margin_is_called_one():
    cells = np.random.default_rng(0).multinomial(300, (0.08, 0.01, 0.91), size=500)
    called = [evidence.gap_p_value(evidence.Gap(*cell[:2], 300), 0.01) < evidence.LEVEL for cell in cells]
    assert np.mean(called) > 0.8


@pytest.mark.parametrize("margin", [0.0, 0.01])
def test_the_smallest_gap_is_the_smallest(margin):
    for images in (40, 150):
        lost = round(evidence.smallest_gap(images, margin, evidence.LEVEL) * images)
        at, below = (evidence.gap_p_value(evidence.Gap(k, 0, images), margin) for k in (lost, lost - 1))
        assert at < evidence.LEVEL <= below
    share = evidence.smallest_share(150, margin or 0.002, level=evidence.LEVEL)
    count = round(share * 150)
    at, below = (evidence.share_p_value(k, 150, margin or 0.002) for k in (count, count - 1))
    assert at < evidence.LEVEL <= below


@pytest.mark.slow
@pytest.mark.parametrize("images", [5, 30, 300])
def test_a_mean_of_zero_is_rarely_called_more(images):
    values = np.random.default_rng(0).normal(size=(5000, images))
    assert np.mean([evidence.mean_p_value(row) < 0.05 for row in values]) == pytest.approx(0.05, abs=0.01)
    assert evidence.mean_p_value(np.ones(9)) == 2**-9
    assert evidence.mean_p_value(np.zeros(9)) == evidence.mean_p_value(np.ones(1)) == 1


@pytest.mark.parametrize(
    ("differ", "tie", "outcome", "end"),
    [
        (0, False, PASSED, "Images that differ: 0."),
        (0, True, PASSED, "Images that differ: 0."),
        (1, False, FLAGGED, "Images that differ: 1."),
        (1, True, NOTE, "Images that differ: 0, and 1 whose two largest logits are equal up to rounding."),
    ],
)
def test_stored_images(differ, tie, outcome, end):
    reported = first(300)
    computed, ties = reported.copy(), np.zeros(N, bool)
    computed[599] ^= differ
    ties[599] = tie
    distance = np.linspace(0, 0.1, N)
    found = ensemble_checks.stored_images(reported, computed, ties, distance, 0.1)
    assert (found.name, found.outcome) == ("stored_images", outcome)
    accuracy = (300 - differ) / N
    assert found.evidence == {
        "accuracy": pytest.approx(accuracy), "differ": differ * (not tie), "by_rounding": differ * tie,
        "distance": 0.1,
    }  # fmt: skip
    assert f"is {100 * accuracy:.1f} %; reported is 50.0 %." in found.statement
    assert found.statement.endswith(end)
    assert found.doubts == EVERYTHING
    json.dumps(found._asdict(), allow_nan=False)


# ---------------------------------------------------------------- derivatives that a model asks for


def flat(x):
    return x.reshape(len(x), -1)


def energy(x):
    return jnp.sum(jnp.sin(x))


made_before = jax.grad(energy)
compiled_before = jax.jit(jax.value_and_grad(energy))
PLAIN = {
    "linear": flat,
    "relu": lambda x: jax.nn.relu(flat(x)),
    "jit": jax.jit(flat),
    "remat": jax.checkpoint(flat),
    "loop": lambda x: jax.lax.fori_loop(0, 3, lambda _, z: jnp.sin(z), flat(x)),
}
ADAPTIVE = {
    "grad": lambda x: flat(x - jax.grad(energy)(x)),
    "grad made before": lambda x: flat(x - made_before(x)),
    "value_and_grad": lambda x: flat(x - jax.value_and_grad(energy)(x)[1]),
    "vjp": lambda x: flat(x - jax.vjp(energy, x)[1](1.0)[0]),
    "jvp": lambda x: flat(x - jax.jvp(jnp.sin, (x,), (x,))[1]),
    "jacfwd": lambda x: flat(x) + jax.jacfwd(energy)(x).sum(),
    "linearize": lambda x: flat(x - jax.linearize(jnp.sin, x)[1](x)),
    "jit": jax.jit(lambda x: flat(x - jax.grad(energy)(x))),
    "jit in jit": jax.jit(lambda x: flat(x - compiled_before(x)[1])),
    "loop": lambda x: flat(jax.lax.fori_loop(0, 3, lambda _, z: z - made_before(z), x)),
}
ONE = np.zeros((1, 2, 2, 1), np.uint8)


@pytest.mark.parametrize("name", PLAIN)
def test_a_plain_model_asks_for_no_derivative(name):
    assert measurements.gradient_calls(PLAIN[name], ONE) == 0


@pytest.mark.slow
@pytest.mark.parametrize("name", ADAPTIVE)
def test_a_model_that_adapts_asks_for_derivatives(name):
    compiled_before(jnp.zeros(ONE.shape))
    ADAPTIVE[name](jnp.zeros(ONE.shape))
    # What has been traced before, here or by someone else, counts as well.
    assert [measurements.gradient_calls(ADAPTIVE[name], ONE) for _ in range(2)] == [1, 1]


def test_counting_leaves_the_profiler_as_it_was():
    mine = lambda *_: None  # noqa: E731
    before = sys.getprofile()
    sys.setprofile(mine)
    try:
        with pytest.raises(ZeroDivisionError):
            measurements.gradient_calls(lambda x: 1 // 0, ONE)
        kept = sys.getprofile()
    finally:
        sys.setprofile(before)
    assert kept is mine


# ---------------------------------------------------------------- from a model to the verdicts

SHAPE, KINDS = (4, 4, 1), 4
SIZE, BATCH = 110, 16
THREAT = ThreatModel(0.15)
STEP_SIZE = 0.04
SAMPLE = np.sort(np.random.RandomState(2).permutation(SIZE)[:101])  # no multiple of the batch
TRACES = []


def nearest_mean(params, stats, images):
    """``z_k = -c ||x - mu_k||^2``."""
    del stats
    TRACES.append(images.shape)
    apart = images[:, None] - params["means"][None]
    return -params["scale"] * jnp.square(apart).sum((2, 3, 4))


def data():
    """Images around four means, and the means."""
    rng = np.random.RandomState(1)
    means = rng.uniform(0.2, 0.8, (KINDS, *SHAPE)).astype(np.float32)
    labels = rng.randint(0, KINDS, SIZE)
    images = np.clip(means[labels] + 0.15 * rng.randn(SIZE, *SHAPE), 0, 1)
    return (255 * images).round().astype(np.uint8), labels, means


def victim(predict=nearest_mean, scale=5.0, shift=0.0):
    """Prototypes, or such as are a little elsewhere."""
    images, labels, means = data()
    means = means + np.float32(shift) * np.random.RandomState(3).randn(*means.shape).astype(np.float32)
    return Victim(
        predict, {"means": means, "scale": np.float32(scale)}, (), images, labels,
        pixel_max=255, seed=0, batch_size=BATCH, layout="jit",
    )  # fmt: skip


def plans(model, surrogate=None, sample=SAMPLE):
    return measurements.plan_measurements(
        model, sample, threat=THREAT, step_size=STEP_SIZE, surrogate=surrogate
    )


@pytest.fixture(scope="module")
def measured():
    """What is measured of an honest model and of one whose logits are 1000 times as large."""
    honest, hidden = victim(), victim(scale=5000.0)
    return {
        "honest": {name: measure() for name, measure in plans(honest, victim(shift=0.05)).items()},
        "hidden": {name: measure() for name, measure in plans(hidden, honest).items()},
    }


def judged_model(measured):
    _, labels, _ = data()
    labels = labels[SAMPLE]
    survived = measured["steps"]["right"].all(1)
    by_square = ~measured["gradient_free"]["right"]
    found, curves = verdicts.give_verdicts(measured, labels, survived, by_square, THREAT.epsilon)
    json.dumps([[verdict._asdict() for verdict in found], drawn(curves)], allow_nan=False)
    return {verdict.name: verdict for verdict in found}


def test_nothing_is_measured_before_it_is_called_for():
    before = len(TRACES)
    some = plans(victim())
    assert len(TRACES) == before
    assert "transfer" not in some
    assert "transfer" in plans(victim(), victim())


@pytest.mark.long
@pytest.mark.slow
def test_arrays_are_of_the_sample(measured):
    images, labels, means = data()
    honest = measured["honest"]
    for arrays in measured["honest"].values():
        for values in arrays.values():
            assert len(values) == len(SAMPLE)
    apart = np.float64(images[SAMPLE][:, None] / 255) - means[None]
    logits = -5 * np.square(apart).sum((2, 3, 4))
    for name in ("forward_0", "forward_4", "among_others"):
        np.testing.assert_allclose(honest[name]["logits"], logits, rtol=1e-4, atol=1e-5)
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    error = p - np.eye(KINDS)[labels[SAMPLE]]
    gradient = np.abs((error[:, :, None, None, None] * -10 * apart).sum(1)).sum((1, 2, 3))
    np.testing.assert_allclose(honest["both_gradients"]["size"], gradient, rtol=1e-4)
    assert honest["steps"]["right"].shape == (len(SAMPLE), len(measurements.STEPS))
    main = measurements.STEPS.index(measurements.MAIN_STEPS)
    np.testing.assert_array_equal(honest["rescaled_1"]["right"][:, 0], honest["steps"]["right"][:, main])


@pytest.mark.parametrize("size", [BATCH, 25, 50, len(SAMPLE), 2 * len(SAMPLE)])
def test_images_that_depend_on_their_batch_are_seen(size):
    """As of batch norm in training mode, even if batches divide the sample, or one holds all of it."""
    images, labels, means = data()

    def normalised(params, stats, images):
        return nearest_mean(params, stats, images - images.mean(0, keepdims=True) + 0.5)

    model = Victim(
        normalised, {"means": means, "scale": np.float32(5)}, (), images, labels,
        pixel_max=255, seed=0, batch_size=size, layout="jit",
    )  # fmt: skip
    found = plans(model, sample=SAMPLE[:100] if len(SAMPLE) % size else SAMPLE)
    gap = found["among_others"]()["logits"] - found["forward_0"]()["logits"]
    assert np.abs(gap).max() > 0.01


@pytest.mark.slow
def test_an_honest_model_is_not_flagged(measured):
    found = judged_model(measured["honest"])
    assert flagged(found) == []
    assert set(having(found, PASSED)) >= set(NAMES) - {"restarts"}
    clean = measured["honest"]["forward_0"]["logits"].argmax(1) == data()[1][SAMPLE]
    robust = measured["honest"]["rescaled_1"]["right"][:, 0]
    assert clean.mean() > 0.9
    assert 0.05 < robust.mean() < clean.mean() - 0.2  # so that the checks have something to compare


@pytest.mark.slow
def test_large_logits_are_no_robustness(measured):
    found = judged_model(measured["hidden"])
    assert set(flagged(found)) == {"logit_scale", "zero_gradients", "unbounded", "square"}
    assert {"gradient_free", "transfer"} <= set(having(found, NOTE))  # another scale explains what they found
    # The gradient of the margin is there, so attacks that follow it can be trusted.
    assert found["zero_gradients"].evidence["zero_of_margin"] == 0
    assert found["zero_gradients"].doubts == FIXED_STEPS
    own, honest = (measured[name]["rescaled_1"]["right"].mean() for name in ("hidden", "honest"))
    assert own > honest + 0.3
    # 1000 times a hundredth is 10 times, but for rounding.
    same = measured["hidden"]["rescaled_0.01"]["right"] == measured["honest"]["rescaled_10"]["right"]
    assert same.mean() > 0.97
    # The surrogate is the honest model, so what it is misled by misleads this one.
    same = measured["hidden"]["transfer"]["right"] == measured["honest"]["rescaled_1"]["right"][:, 0]
    assert same.mean() > 0.9


def looked_at(predict, measured):
    """What of a model needs no attack, and the honest model's rest."""
    some = plans(victim(predict))
    names = [name for name in some if "logits" in measured[name] or name == "inference"]
    return judged_model({**measured, **{name: some[name]() for name in names}})


def probabilities(params, stats, images):
    return jax.nn.softmax(nearest_mean(params, stats, images))


def batch_normalised(params, stats, images):
    return nearest_mean(params, stats, images - 0.1 * images.mean(0, keepdims=True))


def purified(params, stats, images):
    def confidence(x):
        # Not log_softmax(z).max(-1): where XLA computes it twice, no value need equal the maximum.
        logits = nearest_mean(params, stats, x)
        return (logits.max(-1) - jax.nn.logsumexp(logits, -1)).sum()

    return nearest_mean(params, stats, images + 0.01 * jax.grad(confidence)(images))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("predict", "name"),
    [(probabilities, "probabilities"), (batch_normalised, "inference"), (purified, "inference")],
)
def test_a_model_that_is_no_plain_network(measured, predict, name):
    found = looked_at(predict, measured["honest"])
    assert flagged(found) == [name]
    assert found["inference"].evidence["calls"] == (predict is purified)


# ---------------------------------------------------------------- single measurements


def linear(x):
    """Logits of two classes, by the mean of the image."""
    mean = x.mean((1, 2, 3)) - 0.5
    return jnp.stack([mean, -mean], 1)


def few(count=8):
    images = jnp.asarray(np.random.RandomState(4).uniform(0.45, 0.55, (count, *SHAPE)), jnp.float32)
    return jax.random.split(jax.random.key(5), count), images, linear(images).argmax(-1)


@pytest.mark.slow
def test_probe_looks_after_each_number_of_steps_with_scale_and_start():
    def blind(x):
        return jax.lax.stop_gradient(linear(x))

    @partial(jax.jit, static_argnames="logits_fn")
    def probe(logits_fn, scale, restart, factor=1.0):
        steps = np.array([1, 2, 40])
        settings = {"threat": ThreatModel(0.3), "step_size": 0.02, "steps": steps}
        shared = {"scale": scale, "restart": restart, "factor": factor}
        return measurements.probe(logits_fn, *few(64), **shared, **settings)["right"]

    found = probe(linear, 1.0, 0)
    assert found.shape == (64, 3)
    assert found[:, 0].mean() > found[:, 1].mean() > found[:, 2].mean() == 0
    # A model without a gradient shows only where the attack starts.
    starts = [probe(blind, 1.0, restart) for restart in (0, 1, 0)]
    np.testing.assert_array_equal(starts[0], starts[2])
    assert 0.1 < (starts[0] != starts[1]).mean() < 0.9
    np.testing.assert_array_equal(starts[0], starts[0][:, :1].repeat(3, 1))
    assert probe(linear, 1.0, 0, 1e-3).mean() > 0.95  # in next to no radius
    # The attack sees the logits scaled, the judge sees them as they are.
    assert probe(linear, -1.0, 0)[:, 2].all()


@pytest.mark.parametrize("norm", COMMON_NORMS)
def test_an_attack_without_a_bound_may_show_any_image(norm):
    keys, images, _ = few()
    images, labels = images.at[:4].set(1.0).at[4:].set(0.0), jnp.array([0] * 4 + [1] * 4)
    search = partial(jax.jit(measurements.unbounded, static_argnames=("logits_fn", "threat")), linear)
    assert not search(keys, images, labels, threat=ThreatModel(0.1, norm))["right"].any()
    wide = ThreatModel(0.1, norm, -1.0, 2.0)
    assert not search(keys, 3 * images - 1, labels, threat=wide)["right"].any()


@pytest.mark.slow
def test_square_and_shown_and_crafted():
    keys, images, labels = few()
    threat = ThreatModel(0.2)
    attack = jax.jit(partial(measurements.crafted, linear, threat=threat, step_size=0.05))
    made = attack(keys, images, labels)["images"]
    assert np.abs(made - images).max() == pytest.approx(0.2, abs=1e-6)
    assert measurements.shown(linear, keys, images, labels, images)["right"].all()
    assert not measurements.shown(linear, keys, images, labels, made)["right"].any()
    search = jax.jit(partial(measurements.gradient_free, linear), static_argnames=("threat", "queries"))
    assert not search(keys, images, labels, threat=threat, queries=50)["right"].any()
    assert search(keys, images, labels, threat=ThreatModel(1e-5), queries=5)["right"].all()


@pytest.mark.slow
def test_gradients_are_looked_at_where_an_attack_meets_them():
    """At the clean images, where PGD starts, and one step later."""
    keys, _, labels = few(6)
    images = jnp.full((6, *SHAPE), 0.5).at[0, 0, 0].set(0.0)
    threat = ThreatModel(0.1)

    def look(model):
        found = measurements.gradients(model, keys, images, labels, threat=threat, step_size=0.05)
        return np.asarray(found["size"]), np.asarray(found["finite"])

    size, finite = look(linear)
    assert (size > 0).all() and finite.all()
    size, finite = look(lambda x: linear(jnp.round(x)))
    assert (size == 0).all() and finite.all()
    root = lambda x: linear(jnp.where(x > 0, jnp.sqrt(x) ** 2, 0.0))  # noqa: E731
    size, finite = look(root)
    assert finite.tolist() == [False] + [True] * 5
    masked = lambda x: linear(jnp.where((x * 64) % 1 == 0, x, jax.lax.stop_gradient(x)))  # noqa: E731
    found = measurements.gradients(
        masked,
        keys,
        jnp.round(images * 64) / 64,
        labels,
        threat=threat,
        step_size=0.05,
    )
    assert (np.asarray(found["size"]) > 0).all() and not np.asarray(found["least"]).any()
    assert (size > 0).all()  # by the other pixels

    grey = jnp.full_like(images, 0.5)
    ascent = jnp.sign(jax.grad(lambda x: losses.cross_entropy(linear(x), labels).sum())(grey))

    def blind_after_a_step(x):
        """Blind to pixels at the edge of the ball, on the side to which the first step goes."""
        return linear(jnp.where((x - grey) * ascent >= 0.0999, jax.lax.stop_gradient(x), x))

    found = measurements.gradients(blind_after_a_step, keys, grey, labels, threat=threat, step_size=0.25)
    assert (np.asarray(found["size"]) > 0).all() and not np.asarray(found["least"]).any()
    nowhere_clean = lambda x: linear(jnp.where(x == 0.5, x, jnp.sqrt(x - 0.5)))  # noqa: E731
    assert not look(nowhere_clean)[1].any()


@pytest.mark.parametrize(
    ("threat", "expected"),
    [
        (ThreatModel(0.1), (0.25, 0.5, 2.0, 4.0, 8.0, 10.0)),
        (ThreatModel(1e-4), (0.25, 0.5, *(2.0**power for power in range(1, 11)), 1e4)),
        (ThreatModel(1.0), (0.25, 0.5)),
        (ThreatModel(1.0, "l2"), (0.25, 0.5, 2.0, 4.0)),  # sixteen pixels
    ],
)
def test_radii_go_up_to_where_there_is_no_bound(threat, expected):
    assert measurements.radius_factors(threat, 16) == pytest.approx(expected)


def test_an_audit_that_an_older_version_began_is_completed(monkeypatch):
    """What it measured under the same name is kept, what it did not measure is measured."""
    older = {"forward_0/logits": 1, "forward_0/gradient": 2, "steps/right": 3, "scale_1/right": 4}
    names, asked = ("forward_0", "gradients", "steps", "rescaled_1", "radius_2"), []

    def plans(*_, **__):
        return {name: lambda name=name: asked.append(name) or {"right": 5} for name in names}

    saved = []
    kept = types.SimpleNamespace(arrays=older, due=False, save=saved.append)
    job = types.SimpleNamespace(audit_examples=7, seed=0, threat=THREAT, step_size=STEP_SIZE)
    monkeypatch.setattr(loop, "plan_measurements", plans)
    sample = loop.audited(victim(), job, None, kept, False)
    assert asked == ["gradients", "rescaled_1", "radius_2"]
    assert set(names) <= set(sample.measured)
    assert sample.measured["steps"] == {"right": 3}
    assert saved[-1]["gradients/right"] == 5
