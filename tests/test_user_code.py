"""The user's own modules: a run stores their digests, and what uses the run says if one has changed."""

import hashlib
import json
import shutil
import sys
import types

import pytest

from configs import at, base
from robal_jax import cli, evaluation, training
from robal_jax.errors import InputError
from robal_jax.storage.config_file import read_config
from robal_jax.storage.user_code import changed_code, code_of
from robal_jax.training import loop

NETWORK = """
import flax.linen as nn

class Net(nn.Module):
    @nn.compact
    def __call__(self, images, train):
        return nn.relu(nn.Dense(4)(images.reshape(len(images), -1)))
"""
LOSS = "from robal_jax.losses import cross_entropy as mine\n"


class CompilationError(Exception):
    """Ends a training where it would compile its step."""


def own_config():
    config = at.get_config("digits_lt")
    config.model = base.ConfigDict({"name": "own_network:Net"})
    config.loss = base.ConfigDict({"name": "own_loss:mine"})
    config.objective = base.ConfigDict({"name": "plain"})
    overrides = (
        "data.test_per_class=2", "train.epochs=2", "train.max_steps=6", "train.checkpoint_epochs=1",
        "attack.steps=1", "evaluation.autoattack=none", "evaluation.audit.examples=0",
    )  # fmt: skip
    return cli.apply_overrides(config, [f"--config.{override}" for override in overrides])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder on the path with the user's modules."""
    folder = tmp_path_factory.mktemp("own")
    with pytest.MonkeyPatch.context() as patched:
        patched.syspath_prepend(str(folder))
        yield folder
    for name in ("own_network", "own_loss"):
        sys.modules.pop(name, None)


@pytest.fixture
def modules(folder):
    """The modules as a run was made with them; a test may change their files."""
    for name, text in {"own_network": NETWORK, "own_loss": LOSS}.items():
        (folder / f"{name}.py").write_text(text)
    return folder


@pytest.fixture(scope="module")
def trained(folder, tmp_path_factory):
    """A finished run and its evaluation. Not to be written to."""
    for name, text in {"own_network": NETWORK, "own_loss": LOSS}.items():
        (folder / f"{name}.py").write_text(text)
    workdir = tmp_path_factory.mktemp("runs") / "run"
    said = []
    training.train(own_config(), workdir, say=said.append)
    evaluation.evaluate(read_config(workdir), workdir, say=said.append)
    assert warnings(said) == []
    return workdir


@pytest.fixture
def run(trained, modules, tmp_path):
    return shutil.copytree(trained, tmp_path / "run")


def change(folder, module):
    """Changes the file of a module; returns the digests after and before, as messages have them."""
    file = folder / f"{module}.py"
    before = file.read_bytes()
    file.write_bytes(before + b"# mended\n")
    return tuple(hashlib.sha256(text).hexdigest()[:12] for text in (file.read_bytes(), before))


def warnings(said):
    return [line for line in said if line.startswith("warning: ") and "the code of" in line]


def resumed(workdir, monkeypatch):
    """What a training says of changed code before it compiles."""

    def compiled_chunk(*_):
        raise CompilationError

    said = []
    with monkeypatch.context() as patched, pytest.raises(CompilationError):
        patched.setattr(loop, "compiled_chunk", compiled_chunk)
        training.train(own_config(), workdir, say=said.append)
    return warnings(said)


def evaluated(workdir, *overrides, folder=None):
    """What an evaluation says of changed code, and its folder."""
    said = []
    config = cli.apply_overrides(read_config(workdir), [f"--config.{override}" for override in overrides])
    place = evaluation.evaluate(config, workdir, folder=folder, say=said.append)
    return warnings(said), place


def forget(workdir):
    """Makes a run and its evaluation as they were before code was recorded."""
    for path in (workdir / "versions.json", workdir / "evaluation" / "results.json"):
        content = json.loads(path.read_text())
        del content.get("meta", content)["code_sha256"]
        path.write_text(json.dumps(content))


def test_a_run_records_the_modules_that_its_config_names(run, modules):
    digests = {
        name: hashlib.sha256((modules / f"{name}.py").read_bytes()).hexdigest()
        for name in ("own_loss", "own_network")
    }
    assert json.loads((run / "versions.json").read_text())["code_sha256"] == digests
    meta = json.loads((run / "evaluation" / "results.json").read_text())["meta"]
    assert meta["code_sha256"] == {"own_network": digests["own_network"]}
    assert "code" not in meta
    report = (run / "evaluation" / "report.md").read_text()
    assert f"own_network {digests['own_network']}" in report


@pytest.mark.slow
def test_a_resume_warns_of_changed_code(run, modules, monkeypatch):
    assert resumed(run, monkeypatch) == []
    here, there = change(modules, "own_loss")
    assert resumed(run, monkeypatch) == []  # because the run is finished
    shutil.rmtree(run / "checkpoints" / "6")
    loss = f"own_loss (sha256 {here}… here, {there}… there)"
    end = f"has changed since the run {run} was started; what follows uses the new code"
    assert resumed(run, monkeypatch) == [f"warning: the code of {loss} {end}"]
    here, there = change(modules, "own_network")
    network = f"own_network (sha256 {here}… here, {there}… there)"
    assert resumed(run, monkeypatch) == [f"warning: the code of {loss}, {network} {end}"]


@pytest.mark.slow
def test_after_a_resume_the_model_is_that_of_the_last_steps(run, modules, monkeypatch, capsys):
    shutil.rmtree(run / "checkpoints" / "6")  # so that the run is not finished
    here, there = change(modules, "own_network")
    for _ in range(2):
        (warning,) = resumed(run, monkeypatch)
        assert f"(sha256 {here}… here, {there}… there) has changed since the run {run} was sta" in warning
    evaluation.load_run(run)
    assert capsys.readouterr().out == ""
    (modules / "own_network.py").write_text(NETWORK)
    evaluation.load_run(run)
    assert f"(sha256 {there}… here, {here}… there) has changed" in capsys.readouterr().out
    assert resumed(run, monkeypatch) == []
    evaluation.load_run(run)
    assert capsys.readouterr().out == ""


@pytest.mark.slow
def test_a_run_without_a_checkpoint_starts_again_with_the_code_of_today(run, modules, monkeypatch):
    shutil.rmtree(run / "checkpoints")
    change(modules, "own_loss")
    assert resumed(run, monkeypatch) == []
    assert (
        json.loads((run / "versions.json").read_text())["code_sha256"]
        == code_of(own_config(), "training")["code_sha256"]
    )


@pytest.mark.slow
def test_an_evaluation_warns_of_a_changed_network_and_says_so(run, modules):
    here, there = change(modules, "own_network")
    (warning,), place = evaluated(run, folder=run / "other")
    network = f"own_network (sha256 {here}… here, {there}… there)"
    changed = f"the code of {network} has changed since the run {run} was trained"
    end = "so the model may be another one than was trained; restore that code, or train again"
    assert warning == f"warning: {changed}, {end}"
    assert json.loads((place / "results.json").read_text())["meta"]["code"] == changed
    assert changed in (place / "report.md").read_text()


@pytest.mark.parametrize("overrides", [(), ("evaluation.corruptions=true",)])
def test_a_finished_evaluation_is_not_completed_with_another_network(run, modules, overrides):
    here, there = change(modules, "own_network")
    before = (run / "evaluation" / "results.json").read_bytes()
    with pytest.raises(InputError, match="has an evaluation with other settings") as raised:
        evaluated(run, *overrides)
    assert f"code_sha256.own_network: {here}… here, {there}… there" in str(raised.value)
    assert (run / "evaluation" / "results.json").read_bytes() == before


@pytest.mark.slow
def test_no_evaluation_depends_on_the_loss(run, modules, capsys):
    change(modules, "own_loss")
    assert evaluated(run)[0] == []
    evaluation.load_run(run)
    assert capsys.readouterr().out == ""


@pytest.mark.slow
def test_changed_code_of_a_surrogate_is_told(run, modules, tmp_path):
    """Its images may then be others, too."""
    other = tmp_path / "other"
    training.train(
        cli.apply_overrides(own_config(), ["--config.seed=1", "--config.data.seed=0"]),
        other,
        say=lambda line: None,
    )
    here, _ = change(modules, "own_network")
    overrides = "evaluation.audit.examples=10", f"evaluation.audit.surrogate={other}"
    said, place = evaluated(run, *overrides, folder=tmp_path / "results")
    assert all(f"the run {each} was trained" in line for each, line in zip((run, other), said, strict=True))
    meta = json.loads((place / "results.json").read_text())["meta"]
    assert meta["surrogate_code_sha256"]["own_network"].startswith(here)
    assert str(run) in meta["code"] and str(other) in meta["code"]
    (modules / "own_network.py").write_text(NETWORK)
    with pytest.raises(InputError, match=r"surrogate_code_sha256\.own_network"):
        evaluated(run, *overrides, folder=tmp_path / "results")


def test_load_run_warns_of_a_changed_network(run, modules, capsys):
    evaluation.load_run(run)
    assert capsys.readouterr().out == ""
    change(modules, "own_network")
    evaluation.load_run(run)
    assert capsys.readouterr().out.startswith("warning: the code of own_network (sha256 ")


@pytest.mark.slow
def test_a_run_that_does_not_tell_its_code_is_used_as_before(run, modules, monkeypatch, capsys):
    forget(run)
    change(modules, "own_network")
    assert resumed(run, monkeypatch) == []
    assert evaluated(run)[0] == []
    evaluation.load_run(run)
    assert capsys.readouterr().out == ""


def test_the_code_of_a_config(modules, monkeypatch):
    """Wherever it is named: in lists and in sections of sections; not the library's, nor what has no file."""
    (modules / "own_folder").mkdir()
    monkeypatch.setitem(sys.modules, "own_notebook", types.ModuleType("own_notebook"))
    names = {
        "loss": {"name": "deferred", "base": {"name": "own_loss:mine"}},
        "evaluation": {"head": {"name": "own_network:Net"}, "autoattack": "apgd_ce,test_user_code:attack"},
        "train": {"augmentation": "randaugment,test_user_code:crop", "start_from": "gs://bucket/run"},
        "method": "mine:second try",
        "model": {"name": "robal_jax.models:small_cnn"},
        "data": {"name": "own_notebook:load"},
        "optimizer": {"name": "builtins:sum"},
        "average": {"name": "own_folder:ema"},
        "schedule": {"name": "not_there:rate"},
    }
    config = base.ConfigDict(names)
    assert list(code_of(config, "training")["code_sha256"]) == ["own_loss", "own_network", "test_user_code"]
    assert list(code_of(config, "evaluation")["code_sha256"]) == ["own_network", "test_user_code"]
    assert list(code_of(config, "model")["code_sha256"]) == ["own_network"]  # the head of its evaluation
    assert code_of(at.get_config("digits_lt"), "evaluation") == {}


@pytest.mark.parametrize("content", ["", "{}", '{"code_sha256": 3}', '{"code_sha256": {"b": "0"}}'])
def test_a_damaged_record_tells_nothing(tmp_path, content):
    (tmp_path / "versions.json").write_text(content)
    assert changed_code({"code_sha256": {"a": "1" * 64}}, tmp_path) == ""
