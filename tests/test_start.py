"""What the commands show before the work: header, config, fields in --help; and trackers (--track)."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
import types

import pytest
from conftest import ROOT

from experiments import evaluate, train
from robal_jax import builder, cli, training
from robal_jax.errors import InputError
from robal_jax.storage import buckets, trackers
from robal_jax.storage.config_file import flatten, read_config, to_json
from robal_jax.storage.progress import Scalars, announced
from robal_jax.training import loop

STORED = ROOT / "tests" / "stored_run"


class CompilationError(Exception):
    """Ends a training where it would compile its step."""


@pytest.fixture
def no_compilation(monkeypatch):
    def compiled_chunk(*_):
        raise CompilationError

    monkeypatch.setattr(loop, "compiled_chunk", compiled_chunk)


# ---------------------------------------------------------------- the header of a training


def header(workdir, spec, *overrides):
    """What training says before it compiles, by the first word of the line."""
    said = []
    config = cli.apply_overrides(cli.load_config(spec), [f"--config.{override}" for override in overrides])
    with pytest.raises(CompilationError):
        training.train(config, workdir, say=said.append)
    return dict(line.split(maxsplit=1) for line in said)


def test_header(no_compilation, tmp_path):
    lines = header(tmp_path / "run", "robal_n:digits_lt", "train.epochs=2", "train.max_steps=7")
    assert list(lines)[:7] == ["device", "method", "network", "data", "attack", "length", "folder"]
    assert re.fullmatch(r"\d+ x cpu, JAX \d.*", lines["device"])
    assert lines["method"] == "RoBal-N: objective regularised, loss robal, seed 0"
    assert lines["network"] == "small_cnn, cosine head, 40,496 parameters"
    assert lines["data"] == (
        "digits_lt: 104 images of the first class to 5 of the last, 351 of all 10 (ratio 0.0481); "
        "700 test images"
    )
    assert lines["attack"] == "L-infinity, epsilon 0.1, 7 steps of 0.025, start 'uniform', loss cross_entropy"
    assert lines["length"] == "7 steps of 64 images, 5 per epoch"
    assert lines["folder"] == str(tmp_path / "run")


@pytest.mark.parametrize(("steps", "warned"), [(3, True), (5, True), (6, False)])
def test_a_few_steps_without_an_average_are_warned_of(no_compilation, tmp_path, steps, warned):
    lines = header(tmp_path / "run", "at:digits_lt", "average.name=per_epoch", f"train.max_steps={steps}")
    said = "'per_epoch' has no effect before epoch 2, but config.train.max_steps ends"
    assert (said in lines.get("warning:", "")) == warned


@pytest.mark.parametrize(
    ("overrides", "attack"),
    [
        (
            ["threat.epsilon=0.03137254901960784", "attack.step_size=0.00784313725490196"],
            "L-infinity, epsilon 8/255, 7 steps of 2/255, ",
        ),
        (["threat.epsilon=0.031", "attack.step_size=0.0078"], "L-infinity, epsilon 0.031, 7 steps of 0.0078"),
        (["threat.epsilon=1.0", "threat.norm=l2"], "L2, epsilon 1, 7 steps of"),
        (["objective.name=trades"], "L-infinity, epsilon 0.1, 7 steps of 0.025, start 'uniform', the div"),
        (["threat.epsilon=0.0001"], "L-infinity, epsilon 0.0001, "),
        (
            ["attack.steps=1", "attack.start=clean"],
            "L-infinity, epsilon 0.1, 1 step of 0.025, start 'clean'",
        ),
    ],
)
def test_attacks_in_words(overrides, attack):
    config = cli.load_config("at:digits_lt")
    about = builder.training(cli.apply_overrides(config, [f"--config.{each}" for each in overrides])).about
    assert about["attack"].startswith(attack)


def test_plain_training_has_no_attack():
    about = builder.training(cli.load_config("plain:digits_lt")).about
    assert about["attack"] == "none in training; L-infinity, epsilon 0.1 in evaluations"


def test_a_resumed_run_has_a_header(no_compilation, tmp_path):
    workdir, said = shutil.copytree(STORED, tmp_path / "run"), []
    with pytest.raises(CompilationError):
        training.train(read_config(workdir), workdir, say=said.append)
    assert said[0].startswith("resuming at step 5 of 10")
    assert [line.split()[0] for line in said[1:]] == [
        "device", "method", "network", "data", "attack", "length", "folder",
    ]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("start", [STORED, STORED / "checkpoints" / "5"])
def test_a_start_on_data_of_another_seed_is_doubted(no_compilation, tmp_path, start):
    config, said = read_config(STORED), []
    with config.unlocked():
        config.train.start_from, config.data.seed = str(start), 1
    with pytest.raises(CompilationError):
        training.train(config, tmp_path / "run", say=said.append)
    (line,) = (line for line in said if "data.seed" in line)
    begins = "warning: config.train.start_from names a run with config.data.seed 0, and this run has 1: their"
    assert line.startswith(begins)
    assert line.endswith("; give both the same")


def test_what_is_not_doubted_of_the_data_of_another_run(tmp_path):
    """The same data, other data, and a checkpoint that says nothing of its data."""
    config, other = read_config(STORED), cli.load_config("at:cifar10_lt")
    with config.unlocked(), other.unlocked():
        other.data.seed = config.seed = 1
    assert builder.doubts_of_other(config, "teacher", STORED) == []
    assert builder.doubts_of_other(other, "teacher", STORED) == []
    with config.unlocked():
        config.data.seed = 1
    assert len(builder.doubts_of_other(config, "teacher", STORED)) == 1
    (bare := tmp_path / "a" / "5").mkdir(parents=True)
    assert builder.doubts_of_other(config, "teacher", bare) == []
    for text in ("{}", "no JSON"):
        (tmp_path / "config.json").write_text(text)
        assert builder.doubts_of_other(config, "teacher", bare) == []


def test_other_weights_than_that_run_evaluates_are_doubted(tmp_path):
    config = read_config(STORED)
    workdir = shutil.copytree(STORED, tmp_path / "run")
    (workdir / "versions.json").write_text('{"total_steps": 10}')
    last = workdir / "checkpoints" / "5"
    (line,) = builder.doubts_of_other(config, "teacher", last)
    assert line == "config.train.teacher names a run that is at step 5 of 10: the training is not finished"
    theirs = read_config(STORED)
    with theirs.unlocked():
        theirs.evaluation.weights, theirs.average.name = "average", "ema"
        theirs.train.select = "best"
    (workdir / "config.json").write_text(to_json(theirs))
    average, best, _ = builder.doubts_of_other(config, "start_from", last)
    assert average.endswith("that evaluates the average of its weights; its current weights are taken")
    assert best.endswith(f"its last one is taken: to take the best, name it, {workdir}/best/STEP")
    assert len(builder.doubts_of_other(config, "start_from", workdir / "best" / "5")) == 2
    (workdir / "import.json").write_text("{}")  # one that was imported has no other weights
    assert builder.doubts_of_other(config, "start_from", last) == [_]


def test_slow_work_is_announced(capsys):
    with announced("quick work", after=60):
        pass
    with announced("slow work", after=0.01):
        time.sleep(0.1)
    assert capsys.readouterr().err == "slow work\n"


# ---------------------------------------------------------------- --print-config


def printed(capsys, main, *flags):
    main(list(flags))
    return capsys.readouterr().out


def test_the_printed_config_is_the_stored_one(no_compilation, tmp_path, capsys):
    flags = ["--config=robal_n:digits_lt", "--config.train.epochs=2", "--config.loss.margin=0.25"]
    text = printed(capsys, train.main, *flags, "--print-config")
    with pytest.raises(CompilationError):
        train.main([*flags, f"--workdir={tmp_path}"])
    assert text == (tmp_path / "config.json").read_text()
    fields = flatten(json.loads(text))
    assert (fields["train.epochs"], fields["loss.margin"]) == (2, 0.25)


def test_the_printed_config_of_an_evaluation(capsys):
    flags = [f"--workdir={STORED}", "--print-config"]
    assert printed(capsys, evaluate.main, *flags) == to_json(read_config(STORED))
    text = printed(capsys, evaluate.main, *flags, "--config=tau_norm:digits_lt", "--examples=20", "--audit=5")
    found = json.loads(text)["evaluation"]
    assert (found["head"]["name"], found["examples"], found["audit"]["examples"]) == ("tau_norm", 20, 5)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.epoch=3", "unknown config key 'train.epoch'; use 'train.epochs'"),
        ("train.epochs=0", "config.train.epochs is 0; it must be > 0"),
        ("head.name=mlp", "unknown head 'mlp'"),
        ("model.name=vit", "unknown model 'vit'"),
        ("loss.name=hinge", "unknown loss 'hinge'"),
        ("objective.name=trade", "unknown objective 'trade'"),
        ("data.name=mnist", "unknown data set 'mnist'"),
        ("schedule.name=triangle", "unknown schedule 'triangle'"),
        ("evaluation.autoattack=pgd", "'pgd'"),
        ("evaluation.examples=-3", "config.evaluation.examples is -3; it must be >= 0"),
    ],
)
def test_a_config_that_cannot_be_is_not_printed(capsys, override, message):
    with pytest.raises(InputError, match=message):
        train.main(["--config=at:digits_lt", "--print-config", f"--config.{override}"])
    assert capsys.readouterr().out == ""


@pytest.mark.slow
@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.py")), ids=lambda path: path.stem)
def test_every_config_can_be_printed_without_its_data(path):
    builder.check(cli.load_config(f"{path}:imagenet_lt"))


# ---------------------------------------------------------------- --help


def shown_help(capsys, main, *flags):
    with pytest.raises(SystemExit) as stopped:
        main(["--help", *flags])
    assert stopped.value.code == 0
    return capsys.readouterr().out


def test_help_names_every_field(capsys):
    lines = shown_help(capsys, train.main).splitlines()
    for name, value in flatten(cli.load_config("base:cifar10_lt").to_dict()).items():
        assert any(line.partition("  # ")[0] == f"  config.{name} = {value!r}" for line in lines), name
    assert "  config.data.ratio = 0.02  # n_min / n_max, in (0, 1]" in lines
    assert "  config.threat.norm = 'linf'  # or 'l2'" in lines
    assert any(
        line.startswith("  config.train.augmentation = 'crop_flip'  # 'crop_flip' (ran") for line in lines
    )
    assert any("config.evaluation.examples = 0  # Test images that are eval" in line for line in lines)
    assert "  config.seed = 0  # initial weights, example order, augmentation, attack noise" in lines
    assert "  config.attack.steps = 5" in lines  # the comment of the digits' is not about it
    assert "  --print-config: prints the config as the run would store it, and ends" in lines


def test_help_of_a_config(capsys):
    text = shown_help(capsys, train.main, "--config=robal_n:digits_lt", "--config.train.epochs=7")
    assert "fields of robal_n:digits_lt:\n" in text
    assert "\n  config.train.epochs = 7\n" in text
    assert "\n  config.loss.tau_b = " in text


def test_help_of_an_evaluation(capsys):
    lines = shown_help(capsys, evaluate.main).splitlines()
    assert "  config.evaluation.tau_p = 0.0  # tau_p * log prior is subtracted from them" in "\n".join(lines)
    assert not any(line.startswith("  config.train.") for line in lines)


def test_help_of_a_config_that_cannot_be():
    with pytest.raises(InputError, match="no config file robal_m; use robal_"):
        train.main(["--help", "--config=robal_m:digits_lt"])


# ---------------------------------------------------------------- trackers


class Package:
    """What wandb and trackio have in common."""

    def __init__(self, fails=()):
        self.calls, self.fails = [], fails

    def __getattr__(self, name):
        if name not in ("init", "log", "finish"):
            raise AttributeError(name)

        def call(*arguments, **keywords):
            self.calls.append((name, arguments, keywords))
            if name in self.fails:
                raise ConnectionError("no network\nat all")

        return call


@pytest.fixture(params=["wandb", "trackio"])
def package(request, monkeypatch):
    fake = Package()
    monkeypatch.setitem(sys.modules, request.param, fake)
    return request.param, fake


def scalars_of_two_steps(workdir, flag):
    said = []
    (workdir / "config.json").write_text('{"seed": 0}')
    with trackers.tracking(flag, workdir) as track, Scalars(workdir, 0, said.append, track) as scalars:
        for step in (5, 10):
            scalars.write(step, {"epoch": 1, "loss": 0.5 * step})
    return said


def test_a_tracker_receives_the_metrics(package, tmp_path):
    name, fake = package
    said = scalars_of_two_steps(tmp_path, f"{name}:mine")
    (_, _, init), *logged, finish = fake.calls
    assert (init["project"], init["config"], init["resume"]) == ("mine", {"seed": 0}, "allow")
    assert logged == [
        ("log", ({"epoch": 1, "loss": 2.5},), {"step": 5}),
        ("log", ({"epoch": 1, "loss": 5.0},), {"step": 10}),
    ]
    assert finish[0] == "finish"
    assert said == []
    assert ("id" in init) == (name == "wandb")


def test_a_run_in_a_bucket_has_its_name_at_the_tracker(package, tmp_path, monkeypatch):
    name, fake = package
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = buckets.place("work", "gs://bucket/runs/robal_n")
    folder.mkdir(parents=True)
    scalars_of_two_steps(folder, name)
    assert fake.calls[0][2]["name"].startswith("robal_n-")


def test_a_resumed_run_is_the_same_run_at_the_tracker(package, tmp_path):
    name, fake = package
    for folder in ("a b", "a b", "c"):
        (tmp_path / folder).mkdir(exist_ok=True)
        scalars_of_two_steps(tmp_path / folder, name)
    first, again, other = (keywords for call, _, keywords in fake.calls if call == "init")
    assert first == again
    assert first["project"] == "robal_jax"
    assert re.fullmatch(r"a-b-[0-9a-f]{8}", first["name"])
    assert other["name"] != first["name"]


@pytest.mark.parametrize("fails", ["init", "log", "finish"])
def test_a_tracker_that_fails_costs_one_warning(package, tmp_path, fails):
    name, fake = package
    fake.fails = (fails,)
    said = scalars_of_two_steps(tmp_path, name)
    if fails == "finish":
        assert said == []
    else:
        assert said == [
            "warning: the tracker failed (ConnectionError: no network at all); training continues without "
            "it, and metrics.jsonl has all metrics"
        ]
        assert [call for call, *_ in fake.calls].count(fails) == 1
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [
        5,
        10,
    ]


def test_any_function_is_a_tracker(tmp_path):
    rows = {}
    with Scalars(tmp_path, 0, print, rows.__setitem__) as scalars:
        scalars.write(3, {"loss": 1.0})
    assert rows == {3: {"loss": 1.0}}


@pytest.mark.parametrize(
    ("flag", "installed", "message"),
    [
        ("mlflow", None, "unknown tracker 'mlflow'; use --track=wandb or --track=trackio"),
        (":mine", None, "unknown tracker ''"),
        ("wandb", None, r"cannot import wandb \(.*\); install it, pip install wandb, or leave out --track"),
        ("trackio:x", types.ModuleType("trackio"), r"cannot import trackio \(no such package\); install it"),
    ],
)
def test_trackers_that_cannot_be(monkeypatch, tmp_path, flag, installed, message):
    monkeypatch.setitem(sys.modules, flag.partition(":")[0], installed)
    flags = ["--config=at:digits_lt", f"--workdir={tmp_path / 'run'}", f"--track={flag}"]
    with pytest.raises(InputError, match=message):
        train.main(flags)
    assert not (tmp_path / "run").exists()


@pytest.mark.long
@pytest.mark.slow
def test_a_training_is_tracked(tmp_path):
    """The script, with a package that writes what it is given."""
    (tmp_path / "wandb.py").write_text(
        "def init(**k): print('opened', k['project'])\n"
        "def log(values, step): print('logged', step, sorted(values)[:2])\n"
        "def finish(): print('finished')\n"
    )
    done = subprocess.run(
        [sys.executable, "experiments/train.py", "--config=at:digits_lt", f"--workdir={tmp_path / 'run'}",
         "--config.train.epochs=1", "--config.attack.steps=1", "--track=wandb"],
        cwd=ROOT, capture_output=True, text=True, check=True,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
    )  # fmt: skip
    told = [line for line in done.stdout.splitlines() if line.split()[0] in ("opened", "logged", "finished")]
    assert told[0] == "opened robal_jax"
    assert told[1].startswith("logged 5 [")
    assert told[-1] == "finished"
