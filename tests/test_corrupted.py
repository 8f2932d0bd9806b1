"""The accuracy on corrupted images: added to an evaluation, resumed, regrouped, and reported."""

import functools
import shutil

import numpy as np
import pytest
from helpers import assert_nothing_twice, fake_results, interrupt
from nearest_mean import X, Y, nearest_mean

from robal_jax import ThreatModel, evaluate_model, metrics
from robal_jax.data.corruptions import CORRUPTIONS, STRENGTHS, corrupt
from robal_jax.errors import InputError
from robal_jax.evaluation import loop
from robal_jax.reporting import page
from robal_jax.reporting.corruptions import corruption_section, mean_in_words
from robal_jax.reporting.names import with_interval
from robal_jax.reporting.results import Results

IMAGES, LABELS = X[:20], Y[:20]


def evaluate(folder, **options):
    said = []
    arguments = {"version": "none", "audit": 0, "batch_size": 10, "seed": 3, "say": said.append, **options}
    return evaluate_model(
        nearest_mean, IMAGES, LABELS, threat=ThreatModel(0.1), folder=folder, **arguments
    ), said


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """An evaluation without corruptions. Not to be written to."""
    folder = tmp_path_factory.mktemp("evaluations") / "finished"
    evaluate(folder, class_counts=range(20, 10, -1))
    return folder


@pytest.fixture
def folder(finished, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "conditions", lambda *_: pytest.fail("attacked again"))
    return shutil.copytree(finished, tmp_path / "evaluation")


@functools.cache
def expected():
    """Predicted classes by corruption, made here image by image: ``[S, n]``."""

    def classes(name, strength):
        shown = [corrupt(X[i : i + 1], name, strength, seed=3, ids=[i]) for i in range(len(IMAGES))]
        return np.argmax(nearest_mean(np.concatenate(shown)), -1)

    return {name: np.stack([classes(name, strength) for strength in STRENGTHS]) for name in CORRUPTIONS}


@pytest.mark.slow
def test_distances_stay_beside_them(tmp_path):
    counts = range(20, 10, -1)
    run, _ = evaluate(tmp_path / "both", class_counts=counts, minimum_norm="fmn", corruptions=True)
    assert run.corruptions
    assert run.distances["attack"] == "fmn"
    report = (tmp_path / "both" / "report.md").read_text()
    assert "Common corruptions" in report
    assert "Distance to the closest adversarial image" in report


@pytest.mark.slow
def test_a_finished_evaluation_is_given_them_without_an_attack(folder):
    counts, attacked = range(20, 10, -1), (folder / "examples.npz").read_bytes()
    before, _ = evaluate(folder, class_counts=counts)
    assert not before.corruptions
    assert "Common corruptions" not in (folder / "report.md").read_text()
    after, _ = evaluate(folder, class_counts=counts, corruptions=True)
    wanted = metrics.summarize_corruptions(LABELS, expected(), counts)
    assert after.corruptions == wanted
    assert after.summary == {**before.summary, "corruptions": wanted}
    assert (folder / "examples.npz").read_bytes() == attacked
    assert after.meta["seconds"] > before.meta["seconds"]
    right = np.stack(list(expected().values())) == LABELS
    assert after.corruptions["mean"]["accuracy"]["value"] == pytest.approx(right.mean())
    tail = after.corruptions["by_corruption"]["fog"]["strengths"][4]["tail"]
    assert tail == metrics.share((expected()["fog"][4] == LABELS)[LABELS >= 7])
    with np.load(folder / "corrupted.npz") as stored:
        np.testing.assert_array_equal(stored["snow"], expected()["snow"])

    regrouped, _ = evaluate(folder, class_counts=counts, groups="last_five")  # and they stay
    mean = regrouped.corruptions["mean"]
    assert mean["last_five"]["value"] == pytest.approx(right[..., LABELS >= 5].mean())
    assert regrouped.meta["seconds"] == after.meta["seconds"]
    assert "Common corruptions" in (folder / "report.md").read_text()


@pytest.mark.slow
def test_they_are_resumed_and_made_again_if_damaged(folder, monkeypatch):
    looks = interrupt(monkeypatch, len)
    counts = range(20, 10, -1)
    assert evaluate(folder, class_counts=counts, corruptions=True)[0] is None
    whole, _ = evaluate(folder, class_counts=counts, corruptions=True)
    assert_nothing_twice(looks)
    assert len(looks) > 1
    assert whole.corruptions == metrics.summarize_corruptions(LABELS, expected(), counts)
    assert not (folder / "unfinished").exists()

    path = folder / "corrupted.npz"
    content = path.read_bytes()
    path.write_bytes(content[:100])
    again, said = evaluate(folder, class_counts=counts, corruptions=True)
    assert any(line.startswith(f"warning: {path} is damaged") for line in said)
    assert path.read_bytes() == content
    assert again.corruptions == whole.corruptions

    path.write_bytes(content[:100])  # and nobody asks for them
    without, said = evaluate(folder, class_counts=counts)
    assert any(line.endswith("are missing after a change until you ask for them again") for line in said)
    assert without.corruptions == whole.corruptions


def test_pixels_outside_of_0_to_1_are_refused_at_once():
    with pytest.raises(InputError, match=r"images are in \[-1, 1\]; corruptions are of images in \[0, 1\]"):
        evaluate_model(
            nearest_mean, 2 * IMAGES - 1, LABELS, threat=ThreatModel(0.1, lower=-1, upper=1), corruptions=True
        )


@pytest.mark.parametrize(
    ("labels", "found", "message"),
    [
        ([0, 1, 0], {}, "no corruption"),
        ([0, 1, 7], {"fog": np.zeros((2, 3), int)}, r"labels are in 0\.\.7; pass classes in 0\.\.1"),
        ([0, 0, 0], {"fog": np.zeros((2, 3), int)}, "no image of class 1"),
        ([0, 1, 0], {"fog": np.full((2, 3), 7)}, r"predictions\['fog'\] are in 7\.\.7; pass"),
        ([0, 1, 0], {"fog": np.zeros((3, 1), int)}, r"predictions\['fog'\] have 1 entries, labels 3"),
        ([0, 1, 0], {"fog": np.zeros(3, int)}, r"predictions\['fog'\] have shape \[\]"),
        ([0, 1, 0], {"fog": np.zeros((0, 3), int)}, r"predictions\['fog'\] have no strength; pass"),
        ([0, 1, 0], {"fog": np.zeros((2, 3))}, "dtype float64; pass integers"),
    ],
)
def test_wrong_predictions_give_no_accuracy(labels, found, message):
    with pytest.raises(InputError, match=message):
        metrics.summarize_corruptions(labels, found, [9, 3])


@pytest.mark.parametrize("shares", [[1.2, 0.5], [-0.5, 1.0], [np.nan], [], [[0.5]]])
def test_what_is_no_share_has_no_mean(shares):
    with pytest.raises(InputError, match=r"pass numbers in \[0, 1\], one per image"):
        metrics.mean_share(shares)


def test_images_that_cannot_be_corrupted_are_refused_at_once(tmp_path):
    with pytest.raises(InputError, match=r"images are 8 x 8 x 2; corruptions need 1 or 3 channels"):
        evaluate_model(
            lambda x: x[..., 0].reshape(len(x), 64)[:, :10],
            np.tile(IMAGES, 2),
            LABELS,
            threat=ThreatModel(0.1),
            folder=tmp_path,
            corruptions=True,
        )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("num_classes", [10, 30])
def test_the_section_has_all_corruptions_and_folds_many_classes(num_classes):
    results = fake_results(num_classes)
    counts = results.summary["class_counts"]
    labels = np.repeat(np.arange(num_classes), 5)
    found = {
        name: np.stack([(labels + (labels % (s + 1) == 0)) % num_classes for s in STRENGTHS])
        for name in CORRUPTIONS
    }
    summary = metrics.summarize_corruptions(labels, found, counts)
    results = Results(results.meta, {**results.summary, "corruptions": summary})
    blocks = corruption_section(results)
    text = page.to_markdown("Title", blocks)
    assert text.count("\n| JPEG compression |") == 1
    assert (
        len([line for line in text.splitlines() if line.startswith("|")]) == 2 + 3 + 2 + 15 + 2 + num_classes
    )
    assert ("<details>" in page.to_html("Title", blocks)) == (num_classes > 20)
    assert "Frost is drawn, not photographed" in text
    share = with_interval(summary["mean"]["accuracy"], space=" % ")
    assert mean_in_words(results).startswith(
        f"Of corrupted images {share} are classified correctly (mean of 15"
    )
    assert corruption_section(fake_results()) == []


def test_the_interval_of_a_mean_share_is_wilsons_for_hits_and_covers():
    hits = np.arange(40) < 30
    assert metrics.mean_share(hits) == metrics.share(hits)
    generator, covered = np.random.default_rng(0), []
    for _ in range(400):
        shares = generator.binomial(75, generator.beta(2, 1, size=60)) / 75
        found = metrics.mean_share(shares)
        covered.append(found["low"] <= 2 / 3 <= found["high"])
    assert np.mean(covered) > 0.95
