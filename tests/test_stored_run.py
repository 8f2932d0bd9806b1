"""A run that robal_jax 0.1.0 made before the package had folders lives on: it resumes and is evaluated.

``stored_run/`` holds what that version left: a run that was stopped after epoch 1 of 2, an evaluation that
was stopped in its ensemble, and in ``final.npz`` the weights at the end of the uninterrupted run.
"""

import json
import pathlib
import shutil

import numpy as np
import pytest
from conftest import ROOT
from flax.traverse_util import flatten_dict

from experiments.paper.catalogue import rows_of
from experiments.paper.plan import Request, make_plan, run_name
from robal_jax import builder, cli, evaluation, training
from robal_jax.errors import InputError
from robal_jax.evaluation import loop
from robal_jax.storage import checkpoints, config_file

STORED = pathlib.Path(__file__).with_name("stored_run")


@pytest.fixture
def stored(tmp_path):
    return shutil.copytree(STORED, tmp_path / "run")


@pytest.fixture
def added(monkeypatch):
    """A field that a later version adds, with its neutral value."""
    monkeypatch.setitem(config_file.NEUTRAL, "train.average_decay", 0.0)


def with_field(config, value):
    with config.unlocked():
        config.train.average_decay = value
    return config


def weights_of(workdir):
    tree = checkpoints.read_latest(workdir).tree
    return flatten_dict({"params": tree["params"], "stats": tree["stats"]}, sep="/")


@pytest.mark.slow
def test_it_resumes_to_the_same_weights(stored):
    start, said = weights_of(stored), []
    training.train(config_file.read_config(stored), stored, say=said.append)
    assert said[0].startswith("resuming at step 5 of 10")
    found = weights_of(stored)
    with np.load(STORED / "final.npz") as final:
        assert found.keys() == set(final)
        moved = max(np.abs(start[name] - final[name]).max() for name in final)
        apart = max(np.abs(found[name] - final[name]).max() for name in final)
    # On the processor that made them they are equal. On another one a sum in another order may flip the sign
    # of a gradient that is 0 but for its rounding; that is far less than what five steps do.
    assert apart < moved / 10


@pytest.mark.slow
def test_its_interrupted_evaluation_resumes(stored, monkeypatch):
    """What the old version had found is not computed again, though it was stored under other words."""
    monkeypatch.setattr(loop, "eval_step", lambda *_, **__: pytest.fail("made the first attacks again"))
    config = cli.apply_overrides(
        config_file.read_config(stored),
        ["--config.evaluation.autoattack=apgd_ce,square", "--config.evaluation.audit.examples=0"],
    )
    with np.load(STORED / "evaluation" / "unfinished" / "conditions.npz") as before:
        clean = before["pred_clean"]
    folder = evaluation.evaluate(config, stored, say=lambda line: None)
    with np.load(folder / "examples.npz") as examples:
        np.testing.assert_array_equal(examples["pred_clean"], clean)


@pytest.mark.slow
def test_it_can_be_loaded(stored):
    run = evaluation.load_run(stored)
    assert run.checkpoint == stored / "checkpoints" / "5"
    assert run.logits(run.test.images[:3]).shape == (3, 10)


@pytest.mark.slow
def test_a_field_added_later_changes_nothing_while_it_is_neutral(stored, added):
    old, new = config_file.read_config(stored), with_field(config_file.read_config(STORED), 0.0)
    assert old.train.average_decay == 0.0  # filled in
    assert config_file.differences(new, old) == []
    assert config_file.training_fields(new) == config_file.training_fields(old)
    said = []
    training.train(new, stored, say=said.append)
    assert said[0].startswith("resuming at step 5 of 10")


def test_a_field_added_later_is_a_different_run_with_another_value(stored, added):
    message = "train.average_decay: 0.5 here, 0.0 there"
    with pytest.raises(InputError, match=message):
        training.train(with_field(config_file.read_config(stored), 0.5), stored)


def test_a_field_of_a_section_that_a_run_lacks_is_left_out(stored, monkeypatch):
    monkeypatch.setitem(config_file.NEUTRAL, "distillation.weight", 0.0)
    assert "distillation" not in config_file.read_config(stored)


def test_an_interrupted_evaluation_survives_a_field_added_later(stored, monkeypatch):
    monkeypatch.setitem(config_file.NEUTRAL, "evaluation.views", 1)
    new = config_file.read_config(stored)
    assert new.evaluation.views == 1
    fields = json.loads((stored / "config.json").read_text())
    assert config_file.evaluation_fields(new.to_dict()) == config_file.evaluation_fields(fields)


@pytest.mark.parametrize(("key", "name"), [("at", "at-fa83c6fe"), ("cos", "cos-ae4b4a6a")])
@pytest.mark.parametrize("added_fields", [{}, {"train.average_decay": 0.0}])
def test_runs_keep_their_names_in_tables(monkeypatch, key, name, added_fields):
    """The names are those that version 0.1.0 gave to the rows of table 1."""
    for field, value in added_fields.items():
        monkeypatch.setitem(config_file.NEUTRAL, field, value)
    (row,) = rows_of("1", "digits_lt", [key])
    request = Request("1", "digits_lt", (0,), (row,), ("train.epochs=4",), configs=ROOT / "configs")
    assert run_name(row, request) == name


@pytest.mark.parametrize("field", ["evaluation.tau_p", "train.precision", "optimizer.name", "loss.name"])
def test_a_config_without_a_field_that_was_always_there_is_refused(stored, field):
    fields = json.loads((stored / "config.json").read_text())
    *sections, last = field.split(".")
    section = fields
    for name in sections:
        section = section[name]
    del section[last]
    (stored / "config.json").write_text(json.dumps(fields))
    with pytest.raises(InputError, match=f"config.{field} is missing"):
        builder.evaluation(config_file.read_config(stored))


@pytest.mark.parametrize(("key", "name"), [("at", "at-d7cbec29"), ("la_post", "la_post-119ea309")])
def test_evaluations_keep_their_names_in_tables(key, name):
    """The names are those that version 0.1.0 gave to the rows of table 1."""
    request = Request(
        "1",
        "digits_lt",
        (0,),
        rows_of("1", "digits_lt", [key]),
        ("train.epochs=4",),
        configs=ROOT / "configs",
    )
    (folder,) = (path for path in make_plan(request).folders[key][""].values())
    assert folder.parts[-3:] == (name, "seed0", "evaluation")
