"""Runs and checkpoints that were edited, copied, renamed or made by another program are read or refused."""

import copy
import functools
import json
import pathlib
import shutil

import jax
import numpy as np
import orbax.checkpoint as legacy
import pytest
from helpers import refused, script
from orbax.checkpoint import v1 as ocp

from robal_jax import builder, cli, evaluation, training
from robal_jax.averages import chosen
from robal_jax.errors import InputError
from robal_jax.storage import checkpoints, config_file
from robal_jax.storage.lock import alone_in
from robal_jax.storage.workdir import make_workdir, restore_weights
from robal_jax.training.state import initial_state

ROOT = pathlib.Path(__file__).resolve().parents[1]
STORED = pathlib.Path(__file__).with_name("stored_run")


@pytest.fixture
def stored(tmp_path):
    return shutil.copytree(STORED, tmp_path / "run")


# ---------------------------------------------------------------- parts of a run in its place


@pytest.mark.parametrize(
    "part", ["checkpoints/5", "checkpoints", "checkpoints/5/state", "evaluation", "config.json"]
)
def test_a_part_of_a_run_in_place_of_the_run(stored, part):
    (stored / "evaluation").mkdir(exist_ok=True)
    message = f"{stored / part} is no run, but a part of one; name {stored}$"
    refused(message, config_file.read_config, stored / part)


def test_a_checkpoint_in_place_of_its_run(stored):
    path = stored / "checkpoints" / "5"
    message = f"--workdir={path} is a checkpoint; write --workdir={stored} --checkpoint={path}$"
    refused(message, script("evaluate"), f"--workdir={path}")
    refused(message, script("export_torch"), f"--workdir={path}", "--out=x.safetensors")


@pytest.mark.parametrize(("here", "name"), [("", "5"), ("5", ".")])
def test_a_checkpoint_in_place_of_its_run_from_near(stored, monkeypatch, here, name):
    monkeypatch.chdir(stored / "checkpoints" / here)
    message = (
        f"--workdir={name} is a checkpoint; write --workdir={stored} --checkpoint={stored}/checkpoints/5$"
    )
    refused(message, script("evaluate"), f"--workdir={name}")
    refused(f"is no run, but a part of one; name {stored}$", config_file.read_config, pathlib.Path(name))


def test_a_folder_of_runs_in_place_of_a_run(stored):
    shutil.copytree(stored, stored.with_name("b"))
    folder = stored.parent
    message = rf"no run in {folder}: it has no config.json; name one of {folder}/b, {folder}/run$"
    refused(message, config_file.read_config, folder)


def test_a_checkpoint_by_its_number(stored, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    values = {"workdir": "run", "checkpoint": "5"}
    assert cli.run_and_checkpoint(values) == (pathlib.Path("run"), stored / "checkpoints" / "5")
    inside = values | {"checkpoint": "checkpoints/5"}
    assert cli.run_and_checkpoint(inside) == cli.run_and_checkpoint(values)
    assert cli.run_and_checkpoint(values | {"checkpoint": "6"})[1] == tmp_path / "6"
    (tmp_path / "5").mkdir()  # a folder of that name comes first
    assert cli.run_and_checkpoint(values)[1] == tmp_path / "5"


@pytest.mark.parametrize("part", ["checkpoints/5", "checkpoints/new", "checkpoints"])
def test_no_run_is_made_inside_of_checkpoints(stored, part):
    refused("belongs to the", make_workdir, stored / part)
    assert not (stored / "checkpoints" / "new").exists()


@pytest.mark.parametrize("target", ["nowhere/x", "run"])
@pytest.mark.parametrize("below", ["", "a/b"])
def test_a_link_that_leads_nowhere(tmp_path, target, below):
    (tmp_path / "run").symlink_to(target)
    message = f"{tmp_path}/run is a link to {target}, which is not there"
    refused(message, make_workdir, tmp_path / "run" / below)
    if target != "run":  # a link to itself has words of the system
        refused(message, config_file.read_config, tmp_path / "run" / below)
    with pytest.raises(InputError, match=message), alone_in(tmp_path / "run" / below):
        pass


# ---------------------------------------------------------------- config.json


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"head": {', '"head": {"name": "cosine"}, "head": {', "it has 'head' twice"),
        ('"epsilon": ', '"epsilon": 0.2, "epsilon": ', "it has 'epsilon' twice"),
        ("\n}\n", ",\n}\n", r"line \d+ column"),
        (",\n", "\n", r"line \d+ column"),
        ("{", "// mine\n{", "line 1 column 1"),
    ],
)
def test_a_config_with_a_slip(stored, old, new, message):
    path = stored / "config.json"
    text = path.read_text()
    path.write_text(text.replace(old, new, 1))
    assert path.read_text() != text
    refused(rf"cannot read .*config\.json \(.*{message}.*\); correct it", config_file.read_config, stored)


DEEP = "[" * 100_000 + "]" * 100_000


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[]",
        b"null",
        b'"at"',
        b"5",
        b'{"seed": ',
        b"\x00\xff\xfe binary",
        b"{'seed': 0}",
        DEEP.encode(),
    ],
    ids=lambda content: repr(content)[:20],
)
def test_a_config_that_holds_no_fields(stored, content):
    (stored / "config.json").write_bytes(content)
    message = r"cannot read .*config\.json \(.*\); correct it, or restore it from a copy"
    refused(message, evaluation.load_run, stored)
    refused(message, training.train, config_file.read_config(STORED), stored)
    refused(message, script("evaluate"), f"--workdir={stored}", "--autoattack=none", "--audit=0")
    refused(message, script("export_torch"), f"--workdir={stored}", f"--out={stored}/x.safetensors")


def test_an_empty_config(stored):
    (stored / "config.json").write_text("{}")
    message = "config.method is missing; take its value from configs/base.py"
    refused(message, evaluation.load_run, stored)
    refused(message, script("evaluate"), f"--workdir={stored}", "--autoattack=none", "--audit=0")
    refused(message, script("export_torch"), f"--workdir={stored}", f"--out={stored}/x.safetensors")
    refused(r"different config \(.*; and \d+ more\)", training.train, config_file.read_config(STORED), stored)


def test_a_config_with_a_byte_order_mark_and_windows_lines(stored):
    text = (stored / "config.json").read_text()
    (stored / "config.json").write_bytes(b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode())
    assert config_file.read_config(stored).to_dict() == config_file.read_config(STORED).to_dict()


def edited(fields, path, value):
    """The fields with one replaced, or removed if the value is ``...``."""
    fields = copy.deepcopy(fields)
    section = functools.reduce(dict.__getitem__, path[:-1], fields)
    if value is ...:
        del section[path[-1]]
    else:
        section[path[-1]] = value
    return fields


def paths(tree, before=()):
    """Names of all sections and fields."""
    for key, value in tree.items():
        yield (*before, key)
        if isinstance(value, dict):
            yield from paths(value, (*before, key))


def build(folder):
    """All that a training and an evaluation build before they compute."""
    for made in (
        lambda config: jax.eval_shape(functools.partial(initial_state, builder.training(config))),
        builder.evaluation,
    ):
        try:
            made(config_file.read_config(folder))
        except InputError as error:
            assert "\n" not in str(error)
            assert len(str(error)) < 400


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "value"),
    [("robal_n", ...), ("deferred", ...), ("deferred", None), ("robal_n", "x"), ("deferred", [1.5, "a"]),
     ("robal_n", {"a": {}}), ("deferred", 10**400)],
    ids=lambda value: repr(value)[:9],
)  # fmt: skip
def test_any_field_may_be_missing_or_of_a_wrong_type(tmp_path, method, value):
    """The field's default, or one line."""
    config = cli.load_config(f"{ROOT}/configs/{method}.py:digits_lt")
    fields = json.loads(config_file.to_json(config))
    for path in paths(fields):
        (tmp_path / "config.json").write_text(json.dumps(edited(fields, path, value)))
        build(tmp_path)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("schedule", "lr"), ..., r"schedule 'paper' needs 'lr'; set it in the config file"),
        (("loss", "base"), "focal", r"base of loss 'deferred' is 'focal'; it must be a section with a name"),
        (("attack", "steps"), 10**400, r"config\.attack\.steps is 1000\S+; it must be "),
        (("train", "epochs"), 2**31, r"config\.train\.epochs is 2147483648; it must be "),
        (("evaluation", "audit"), 5, r"config\.evaluation\.audit\.\w+ is missing; take its value from"),
        (("evaluation", "audit", "examples"), ..., r"audit\.examples is missing; take its value from"),
    ],
)
def test_what_the_line_says(tmp_path, path, value, message):
    config = cli.load_config(f"{ROOT}/configs/deferred.py:digits_lt")
    fields = edited(json.loads(config_file.to_json(config)), path, value)
    (tmp_path / "config.json").write_text(json.dumps(fields))
    refused(message, builder.training, config_file.read_config(tmp_path))


def test_a_workdir_with_a_quite_different_config_is_described_in_a_short_line(stored):
    other = cli.load_config(f"{ROOT}/configs/robal_r.py:cifar10_lt")
    fields = json.loads(config_file.to_json(other))
    (stored / "config.json").write_text(json.dumps(fields))
    message = r"was made with a different config \(.*; and \d+ more\); choose another workdir"
    refused(message, training.train, config_file.read_config(STORED), stored)


@pytest.mark.parametrize("content", [b"", b"[]", b"null", b"{}", b'{"data_sha', b"\xff\xfe", DEEP.encode()])
def test_versions_that_were_edited(stored, content):
    (stored / "versions.json").write_bytes(content)
    message = r"cannot read .*versions\.json \(.*\); choose another workdir"
    refused(message, training.train, config_file.read_config(stored), stored)


def test_versions_with_another_digest(stored):
    (stored / "versions.json").write_text('{"data_sha256": 12}')
    message = r"different config \(data: sha256 \w+… here, 12… there\)"
    refused(message, training.train, config_file.read_config(stored), stored)


# ---------------------------------------------------------------- checkpoints


def like_of(path):
    return {name: part for name, part in checkpoints.read(path)[0].items() if name in ("params", "stats")}


def same(found, expected):
    jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["best", "5", "model-final", "checkpoint.v2", "run [best]", "a\\b", "Größe $1 ~x"]
)
@pytest.mark.parametrize("how", [shutil.copytree, lambda source, target: target.symlink_to(source)])
def test_a_checkpoint_under_another_name(stored, tmp_path, name, how):
    original = stored / "checkpoints" / "5"
    other = tmp_path / "elsewhere" / name
    other.parent.mkdir()
    how(original, other)
    like = like_of(original)
    same(restore_weights(stored, other, like, print).tree, like)
    same(checkpoints.read_latest(other).tree["params"], like["params"])
    run = evaluation.load_run(stored, checkpoint=other)
    same(run.params, like["params"])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["run[2]", "[a-z]", "a\\b", "run*", "what?", "x[", "]["])
def test_a_run_in_a_folder_whose_name_is_a_pattern(tmp_path, name):
    other = tmp_path / "run2" / "checkpoints"  # which the pattern matches
    states = [{"w": np.full(3, i, np.float32)} for i in range(5)]
    folder = tmp_path / name / "checkpoints"
    for place in (other, folder):
        with checkpoints.Saver(place, 2) as saver:
            for step, state in enumerate(states):
                path, _ = saver.save(step, state)
        assert path == place / "4"
    assert checkpoints.steps(folder) == [3, 4]
    found = checkpoints.restore_latest(folder, states[0], on_damage=lambda path, why: pytest.fail(why))
    same(found.tree, states[4])
    assert {file.name for file in (folder / "4").iterdir()} == {file.name for file in (other / "4").iterdir()}
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["run2", name])


def test_a_run_where_a_checkpoint_is_meant(stored):
    like = like_of(stored / "checkpoints" / "5")
    for path in (stored, stored / "checkpoints"):
        message = r"run\S* is not a checkpoint but holds checkpoints; give one, such as \S+run/checkpoints/5$"
        refused(message, restore_weights, stored, path, like, print)
        refused(message, checkpoints.restore, path, like, part=functools.partial(chosen, which="current"))
    refused(message, script("evaluate"), f"--checkpoint={stored}", "--autoattack=none", "--audit=0")
    refused(r"checkpoint but holds", checkpoints.read_latest, stored / "checkpoints")


def test_a_checkpoint_outside_of_a_run_needs_the_run(stored, tmp_path):
    shutil.copytree(stored / "checkpoints" / "5", tmp_path / "best")
    for path in (tmp_path / "best", pathlib.Path("/"), tmp_path / "nothing"):
        refused(
            r"is not inside a run; name its run with --workdir",
            script("evaluate"),
            f"--checkpoint={path}",
        )


def test_what_is_no_checkpoint(stored, tmp_path):
    like = like_of(stored / "checkpoints" / "5")
    (tmp_path / "empty").mkdir()
    (tmp_path / "weights.pt").write_bytes(b"PK")
    read = functools.partial(restore_weights, stored, like=like, say=print)
    message = "empty is not a checkpoint: it has no file _CHECKPOINT_METADATA; give a folder such as"
    refused(message, read, tmp_path / "empty")
    refused(message, checkpoints.read_latest, tmp_path / "empty")
    refused("weights.pt is a file; give a checkpoint's folder, or import", read, tmp_path / "weights.pt")
    refused("no run or checkpoint .*weights.pt", checkpoints.read_latest, tmp_path / "weights.pt")
    refused("no checkpoint .*nothing; correct its name", read, tmp_path / "nothing")


def test_a_checkpoint_of_another_program(stored, tmp_path):
    weights = {"w": np.ones(3, np.float32)}
    ocp.save(tmp_path / "v1", weights)
    ocp.save(tmp_path / "noted", weights, custom_metadata={"epoch": 3})
    with legacy.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "legacy", weights)
    like = like_of(stored / "checkpoints" / "5")
    for name in ("v1", "noted", "legacy"):
        message = (
            rf"checkpoint \S+{name} is damaged \(it has no sha256: another program wrote or changed it\)"
        )
        refused(message, restore_weights, stored, tmp_path / name, like, print)
        refused(message, checkpoints.read_latest, tmp_path / name)


def test_a_checkpoint_of_another_model(stored, tmp_path):
    with checkpoints.Saver(tmp_path, 1) as saver:
        path, _ = saver.save(1, {"params": {"w": np.ones(3, np.float32)}, "stats": {}})
    refused("is of a different model: it has", evaluation.load_run, stored, checkpoint=path)


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    refused(
        r"cannot make .*file/run \(Not a directory\); choose", checkpoints.Saver, tmp_path / "file" / "run", 2
    )
