"""An evaluation takes the model and the data of its run, and only fields of the evaluation."""

import inspect
import json
import shutil

import numpy as np
import pytest
from test_cli import npz, saved_run

from robal_jax import builder, cli, evaluation, training
from robal_jax.attacks import ThreatModel
from robal_jax.data import sources
from robal_jax.errors import InputError
from robal_jax.evaluation import loop
from robal_jax.storage import checkpoints
from robal_jax.storage.config_file import read_config


class AcceptedError(Exception):
    """The attacks would have started."""


@pytest.fixture(autouse=True)
def no_attacks(monkeypatch):
    def accept(*_):
        raise AcceptedError

    monkeypatch.setattr(loop, "conditions", accept)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "run"
    saved_run(workdir)
    return workdir


@pytest.fixture
def run(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "run")


def evaluate(workdir, *overrides):
    said = []
    config = cli.apply_overrides(read_config(workdir), [f"--config.{override}" for override in overrides])
    try:
        evaluation.evaluate(config, workdir, folder=workdir / "results", say=said.append)
    except AcceptedError:
        return said
    return pytest.fail("not attacked")


@pytest.mark.parametrize(
    ("override", "there"),
    [
        ("data.ratio=0.1", "0.05"),
        ("data.seed=1", "0"),
        ("data.profile=step", "'exp'"),
        ("data.test_per_class=60", "70"),
        ("data.name=cifar10_lt", "'digits_lt'"),
        ("seed=1", "0"),
        ("threat.norm=l2", "'linf'"),
        ("threat.epsilon=0.2", "0.1"),
        ("head.scale=2.0", "1.0"),
        ("model.name=resnet18", "'small_cnn'"),
        ("attack.steps=3", "7"),
        ("loss.margin=0.2", "0.1"),
        ("train.batch_size=32", "64"),
        ("train.epochs=3", "60"),
        ("train.precision=bfloat16", "'default'"),
        ("train.reading_threads=2", "16"),
        ("schedule.lr=0.1", "0.05"),
        ("optimizer.clip_norm=0.0", "1.0"),
    ],
)
def test_a_field_of_the_run_is_refused(saved, override, there):
    field = override.partition("=")[0]
    message = (
        # Another name also drops fields that only the old function has, which are named, too.
        rf"an evaluation cannot change the run .*\((.*; )?config\.{field} is .* here, {there} in the run"
        r"(; .*)?\); set only fields of config\.evaluation"
    )
    with pytest.raises(InputError, match=message) as raised:
        evaluate(saved, override)
    assert len(str(raised.value).splitlines()) == 1


def test_all_fields_of_the_run_are_named(saved):
    with pytest.raises(
        InputError, match=r"config\.data\.ratio .*; config\.data\.seed is 3 here, 0 in the run\)"
    ):
        evaluate(saved, "data.ratio=0.1", "data.seed=3", "evaluation.epsilon=0.05")


@pytest.mark.parametrize(
    "override",
    [
        "evaluation.epsilon=0.05",
        "evaluation.step_size=2/255",
        "evaluation.seed=3",
        "evaluation.logit_scale=2.0",
        "evaluation.autoattack=none",
        "evaluation.audit.examples=0",
        "evaluation.batch_size=50",
        "evaluation.head_classes=2",
        "evaluation.groups=last_five,thirds",
        "evaluation.precision=default",
        "train.layout=pmap",
    ],
)
def test_a_field_of_the_evaluation_is_taken(run, override):
    assert evaluate(run, override) == []


def test_sizes_of_other_groups_than_thirds_are_refused_before_the_attacks(run):
    with pytest.raises(InputError, match=r"head_classes is 2 .* groups is 'few,thirds'; leave both at 0, or"):
        evaluate(run, "evaluation.groups=few,thirds", "evaluation.head_classes=2")


@pytest.mark.parametrize(("fewest", "lines"), [(19, 0), (20, 1)])
def test_groups_without_a_class_are_said_before_the_attacks(fewest, lines):
    images, said = np.random.default_rng(0).random((6, 4, 4, 1), np.float32), []
    with pytest.raises(AcceptedError):
        evaluation.evaluate_model(
            lambda x: x.reshape(len(x), -1)[:, :3],
            images,
            np.arange(6) % 3,
            threat=ThreatModel(0.1),
            version="none",
            class_counts=[90, 50, fewest],
            groups="thirds,few",
            say=said.append,
        )
    assert said.count("groups 'few': no class has fewer than 20 training images") == lines


def test_doubts_are_said(run):
    (line,) = evaluate(run, "evaluation.step_size=0.001")
    assert line.startswith("warning: 20 times config.evaluation.step_size 0.001 is less than")


def test_inference_of_another_method_is_taken(run):
    other = builder.with_inference_of(read_config(run), cli.load_config("configs/robal_r.py:digits_lt"))
    with pytest.raises(AcceptedError):
        evaluation.evaluate(other, run, folder=run / "results", say=print)


def test_a_run_is_not_named_after_a_training_that_it_did_not_have(run):
    """A method of inference names it; another training does not."""
    run = read_config(run)
    for method in ("la_post", "tau_norm"):
        other = cli.load_config(f"configs/{method}.py:digits_lt")
        at = cli.load_config("configs/at.py:digits_lt")
        assert builder.with_inference_of(at, other).method == other.method
    for name in ("trades", "robal_r"):
        other = cli.load_config(f"configs/{name}.py:digits_lt")
        found = builder.with_inference_of(run, other).method
        assert found == f"{run.method}, with the inference of {other.method}"
    assert builder.with_inference_of(run, run).method == run.method


def test_inference_for_another_data_set_is_refused(run):
    other = cli.load_config("configs/la_post.py:cifar10_lt")
    message = (
        "config of .* is for data set 'cifar10_lt', and the run is for 'digits_lt'; name .* behind the colon"
    )
    with pytest.raises(InputError, match=message):
        builder.with_inference_of(read_config(run), other)
    own = read_config(run)
    with own.unlocked():
        own.data.name = "mine:digits"  # for which there are no constants
    assert builder.with_inference_of(own, other).evaluation.tau_p == other.evaluation.tau_p


def shifted(monkeypatch, change):
    """Other digits under the same config, as if the data had been made again."""

    def load(**options):
        data = original(**options)
        return data._replace(**change(data))

    original = sources.SOURCES["digits_lt"]
    load.__signature__ = inspect.signature(original)
    monkeypatch.setitem(sources.SOURCES, "digits_lt", load)


CHANGES = {
    "test pixels": lambda data: {"test_images": np.maximum(data.test_images, np.uint8(1))},
    "test images": lambda data: {
        "test_images": data.test_images[::-1],
        "test_labels": data.test_labels[::-1],
    },
    "order of training images": lambda data: {"train_images": data.train_images[::-1]},
    "number of training images": lambda data: {
        "train_images": data.train_images[1:],
        "train_labels": data.train_labels[1:],
    },
}
"""Fields in which other data differ."""


@pytest.mark.parametrize("change", CHANGES)
def test_other_data_are_refused(run, monkeypatch, change):
    shifted(monkeypatch, CHANGES[change])
    with pytest.raises(
        InputError, match=r"the data differ from those of the run .*sha256 .*… here, .*… there"
    ):
        evaluate(run)
    with pytest.raises(InputError, match="the data differ from those of the run"):
        evaluation.load_run(run)


@pytest.mark.slow
def test_data_of_another_place_are_taken_and_other_data_there_are_not(tmp_path):
    labels = np.repeat(np.arange(10), 2)
    images = np.random.default_rng(0).integers(0, 256, (20, 32, 32, 3), np.uint8)
    for name, pixels in {"one": images, "copy": images, "other": images[::-1]}.items():
        npz(tmp_path / f"{name}.npz", pixels, labels)
    config = cli.load_config("configs/at.py:cifar10_lt")
    with config.unlocked():
        config.data.n_max, config.data.ratio, config.data.path = 2, 1.0, str(tmp_path / "one.npz")
        config.model = {"name": "small_cnn", "channels": (2, 2, 2), "width": 4}
        config.train.max_steps, config.train.batch_size, config.attack.steps = 1, 20, 1
    said = []
    workdir = training.train(config, tmp_path / "run", say=said.append).parents[1]
    assert any(line.startswith("warning: 1 times config.attack.step_size 0.0078 is less") for line in said)
    (note,) = evaluate(workdir, f"data.path={tmp_path / 'copy.npz'}")
    assert note.startswith("warning: 20 of 20 test images are in the training set too")
    with pytest.raises(InputError, match="the data differ from those of the run"):
        evaluate(workdir, f"data.path={tmp_path / 'other.npz'}")


@pytest.mark.slow
@pytest.mark.parametrize("content", [None, "", "{}", "[]", "3", '{"jax": "0.4"}'])
def test_a_run_that_does_not_say_its_data_is_evaluated_with_a_warning(run, content):
    (run / "versions.json").unlink()
    if content is not None:
        (run / "versions.json").write_text(content)
    (line,) = evaluate(run)
    assert "versions.json does not say which data the run was trained on" in line
    (run / "import.json").write_text("{}")
    assert evaluate(run) == []


def test_a_training_that_is_not_finished_is_evaluated_with_a_warning(run):
    path = run / "versions.json"
    stored, (step,) = json.loads(path.read_text()), checkpoints.steps(run / "checkpoints")
    path.write_text(json.dumps(stored | {"total_steps": step}))
    assert evaluate(run) == []
    path.write_text(json.dumps(stored | {"total_steps": step + 9}))
    (line,) = evaluate(run)
    said = f"step {step} of {step + 9}: the training is not finished; run the command of the training again"
    assert line.startswith(f"warning: the run is at {said}")


def test_a_digest_of_another_type_is_another_digest(run):
    (run / "versions.json").write_text(json.dumps({"data_sha256": 3}))
    with pytest.raises(InputError, match="3… there"):
        evaluate(run)
