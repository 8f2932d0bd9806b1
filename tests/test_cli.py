"""What a user may get wrong gives one line that says what to do (robal_jax.cli and experiments)."""

import importlib.metadata
import importlib.util
import json
import pathlib
import re
import subprocess
import sys

import jax
import numpy as np
import pytest
from helpers import refused
from ml_collections import ConfigDict

from experiments import evaluate as evaluate_script
from robal_jax import (
    builder,
    cli,
    evaluation,
    training,
)
from robal_jax.devices.cpu import prepare_jax
from robal_jax.errors import DivergedError, InputError
from robal_jax.evaluation import loop as evaluation_loop
from robal_jax.storage import checkpoints
from robal_jax.storage.config_file import flatten, read_config, to_json
from robal_jax.storage.workdir import data_digest, prepare_workdir
from robal_jax.training import initial_state
from robal_jax.training import loop as training_loop

ROOT = pathlib.Path(__file__).resolve().parents[1]
DIGITS, CIFAR = "configs/robal_n.py:digits_lt", "configs/robal_n.py:cifar10_lt"


@pytest.fixture(autouse=True)
def no_training(monkeypatch):
    """What is not refused would train for minutes."""
    monkeypatch.setattr(training_loop, "compiled_chunk", lambda *_: pytest.fail("the input was accepted"))
    monkeypatch.setattr(evaluation_loop, "conditions", lambda *_: pytest.fail("the input was accepted"))


def start(workdir, *overrides, spec=DIGITS, change=None):
    """What experiments/train.py does; ``change`` edits a config as a user's own file would."""
    config = cli.load_config(spec)
    if change is not None:
        with config.unlocked():
            change(config)
    training.train(cli.apply_overrides(config, [f"--config.{override}" for override in overrides]), workdir)


# ---------------------------------------------------------------- flags and config files


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["junk"], "unexpected argument 'junk'; write arguments as --name=value"),
        (["--workdir=a", "seed=3"], "unexpected argument 'seed=3'"),
        (["--wordkir=a"], "unknown flag --wordkir; use --workdir$"),
        (["--seed=3"], "unknown flag --seed; use --workdir$"),
        (["--workdir"], "Missing value for flag --workdir; write arguments as --name=value$"),
        (["--workdir="], "--workdir is empty; give it a value, or leave it out"),
        (["--workdir", ""], "--workdir is empty"),
        (["--workdir=a", "--workdir=b"], "--workdir is given as 'a' and as 'b'; give it once"),
        (["--workdir=a", "-workdir", "b"], "--workdir is given as 'a' and as 'b'; give it once"),
        (["--workdir=a", "--workdir="], "--workdir is given as 'a' and as ''; give it once"),
    ],
)
def test_flags(arguments, message):
    refused(message, cli.parse, arguments, {"workdir": "a folder"}, "usage")


@pytest.mark.parametrize(
    ("flag", "fields"),
    [
        ("seed", "one of --config.data.seed=VALUE, --config.evaluation.seed=VALUE, --config.seed=VALUE"),
        ("epochs", "--config.train.epochs=VALUE"),
        ("lr", "--config.schedule.lr=VALUE"),
        ("batch-size", "one of --config.evaluation.batch_size=VALUE, --config.train.batch_size=VALUE"),
        ("train.epochs", "--config.train.epochs=VALUE"),
        ("workdri", "--workdir"),
        ("xyz", "one of --workdir, --track"),
    ],
)
def test_a_field_in_place_of_a_flag(flag, fields):
    texts = {"workdir": "a folder", "track": "a tracker"}
    usage = "Train: [--config.KEY=VALUE]"
    refused(rf"unknown flag --{flag}; use {fields}$", cli.parse, [f"--{flag}=3"], texts, usage)


def test_a_value_may_be_repeated():
    assert cli.parse(["--workdir=a", "--workdir=a"], {"workdir": ""}, "") == {"workdir": "a"}
    assert cli.split_overrides(["--config.seed=1", "x", "-config.seed=1"]) == (["x"], ["--config.seed=1"])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["seed=1", "threat.epsilon=2", "seed=2"], "config.seed is given as '1' and as '2'; give it once"),
        (["loss.name=a", "loss.name="], "config.loss.name is given as 'a' and as ''; give it once"),
    ],
)
def test_a_field_has_one_value(overrides, message):
    refused(message, cli.split_overrides, [f"--config.{override}" for override in overrides])


def test_a_short_flag_and_its_field_have_one_value(tmp_path):
    flags = [f"--workdir={tmp_path}", "--audit=3", "--config.evaluation.audit.examples=4"]
    message = "config.evaluation.audit.examples is given as '4' and as '3'; give it once"
    refused(message, evaluate_script.main, flags)


def test_flags_and_overrides_are_told_apart():
    rest, overrides = cli.split_overrides(["--workdir=a=b", "--config.seed=3", "--config=x.py:y"])
    values = cli.parse(rest, {"workdir": "", "config": ""}, "usage")
    assert values == {"workdir": "a=b", "config": "x.py:y"}
    assert overrides == ["--config.seed=3"]
    assert cli.apply_overrides(cli.load_config(DIGITS), overrides).seed == 3


def test_help(capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.parse(["--help"], {"workdir": "a folder"}, "how to use it")
    assert stopped.value.code == 0
    assert capsys.readouterr().out == "how to use it\n  --workdir: a folder\n"


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("configs/robal_m.py:digits_lt", "no config file configs/robal_m.py; use configs/robal_"),
        ("configs/xyz:digits_lt", "no config file configs/xyz; use one of configs/alp.py, configs/at.py, "),
        ("nowhere/at.py", "no config file nowhere/at.py; use at$"),
        ("robal_m:digits_lt", "no config file robal_m; use robal_"),
        ("xyz:digits_lt", "no config file xyz; use one of alp, at, "),
        ("configs/at.py:imagenet", "unknown data set 'imagenet'; use one of digits_lt, cifar10_lt"),
        ("configs/robal_n.py:imagenet", "unknown data set 'imagenet'; use one of digits_lt"),
        ("README.md", "README.md"),
    ],
)
def test_config_files(spec, message):
    refused(message, cli.load_config, spec)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def get_config(:", r"fails with SyntaxError.* \(.*mine.py:1\)"),
        ("\nimport nothing_here", r"fails with ModuleNotFoundError: No module .* \(.*mine.py:2\)"),
        ("def get_config():\n    return 1 / 0", r"fails with ZeroDivisionError.* \(.*mine.py:2\)"),
        (
            "def get_config():\n    pass",
            "get_config of .* returns a NoneType; return an ml_collections.Config",
        ),
        ("def get_config():\n    return {}", "returns a dict"),
        ("\0", "fails with"),
    ],
)
def test_a_config_file_that_cannot_be_used(tmp_path, text, message):
    (tmp_path / "mine.py").write_text(text)
    refused(message, cli.load_config, str(tmp_path / "mine.py"))


@pytest.mark.parametrize(
    ("field", "near"),
    [
        ("train.label_smothing", "train.label_smoothing"),
        ("attack.step", "attack.steps"),
        ("evaluation.tau", "evaluation.tau_p"),
        ("schedul", "schedule.lr"),
    ],
)
def test_a_field_of_a_config_file_that_no_config_has(tmp_path, field, near):
    text = f"from configs import at\ndef get_config(data):\n    c = at.get_config(data)\n    c.{field} = 3\n"
    (tmp_path / "mine.py").write_text(f"{text}    return c\n")
    message = f"mine.py:digits_lt: unknown config key '{field}'; use '{near}'$"
    refused(message, cli.load_config, f"{tmp_path / 'mine.py'}:digits_lt")


def test_a_section_that_no_config_has(tmp_path):
    (tmp_path / "mine.py").write_text(
        "from configs import at\nfrom ml_collections import ConfigDict\n"
        "def get_config(data):\n    c = at.get_config(data)\n    c.mine = ConfigDict({'a': 1})\n"
        "    return c\n"
    )
    message = "unknown config key 'mine.a'; --help lists all; arguments of a function go into its own section"
    refused(message, cli.load_config, f"{tmp_path / 'mine.py'}:digits_lt")


@pytest.mark.parametrize("relative", [False, True])
def test_an_error_of_a_config_file_names_its_line(tmp_path, monkeypatch, relative):
    (tmp_path / "mine.py").write_text("from configs import at\n\ndef get_config():\n    return at.nothing\n")
    monkeypatch.chdir(tmp_path)
    path = "mine.py" if relative else str(tmp_path / "mine.py")
    refused(r"fails with AttributeError: .*\(.*mine.py:4\); correct it$", cli.load_config, path)
    refused(
        r"fails with TypeError: .*; correct it, or give an argument that its get_config takes$",
        cli.load_config, f"{path}:digits_lt",
    )  # fmt: skip


def test_config_file_without_get_config(tmp_path):
    (tmp_path / "mine.py").write_text("config = {}\n")
    refused("has no attribute 'get_config'", cli.load_config, str(tmp_path / "mine.py"))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("--config.sed=3", "unknown config key 'sed'; use 'seed'"),
        ("--config.train.epoch=3", r"unknown config key 'train.epoch'; use 'train\.epochs'"),
        ("--config.schedule.lrr=3", r"schedule 'paper' takes no 'lrr'; use .*: did you mean 'lr'\?$"),
        (
            "--config.head=3",
            "config.head is a section; set one of its fields, such as --config.head.name=VALUE",
        ),
        ("--config.train.epochs=many", "train.epochs"),
        ("--config.train.batch_size=1.5", "train.batch_size"),
        ("--config.train.sync_batch_norm=maybe", "train.sync_batch_norm"),
        ("--config.schedule.lr=fast", "schedule.lr"),
    ],
)
def test_overrides(override, message):
    refused(message, cli.apply_overrides, cli.load_config(DIGITS), [override])


FOLLOWERS = {
    "seed": {"data.seed"},
    "threat.epsilon": {"evaluation.epsilon", "attack.step_size", "evaluation.step_size"},
    "evaluation.epsilon": {"evaluation.step_size"},
}


@pytest.mark.parametrize("key", ["seed", "data.seed", "threat.epsilon", "evaluation.epsilon", "attack.steps"])
def test_an_override_changes_its_own_field(key):
    """And those that are documented to follow it, but not those it follows."""
    before = flatten(cli.load_config(DIGITS).to_dict())
    after = flatten(cli.apply_overrides(cli.load_config(DIGITS), [f"--config.{key}=9"]).to_dict())
    changed = {name for name, value in after.items() if value != before[name]}
    assert changed == {key} | FOLLOWERS.get(key, set())


# ---------------------------------------------------------------- values that cannot be used


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed=-1", "seed"),
        ("seed=99999999999", "seed"),
        ("schedule.lr=nan", r"config\.schedule\.lr is nan; it must be > 0"),
        ("schedule.milestones=x", r"config\.schedule\.milestones is \('x',\); it must be whole numbers"),
        ("schedule.lr=-0.1", r"config\.schedule\.lr is -0\.1"),
        ("optimizer.momentum=nan", r"momentum"),
        ("objective.beta_reg=nan", r"beta_reg"),
        ("threat.epsilon=0", r"config\.threat\.epsilon is 0\.0; it must be > 0"),
        ("threat.epsilon=-0.1", r"config\.threat\.epsilon is -0\.1"),
        ("evaluation.epsilon=nan", r"epsilon is nan; it must be > 0"),
        ("evaluation.tau_p=nan", r"tau_p"),
        ("evaluation.head_classes=20", r"head_classes"),
        (
            "evaluation.groups=halves",
            r"groups is 'halves'; it must be a list with commas .* of thirds, last_80",
        ),
        ("evaluation.groups=few,few", r"groups is 'few,few'; it must be a list .*, each once"),
        ("attack.steps=0", r"config\.attack\.steps is 0; it must be > 0"),
        ("train.epochs=0", r"config\.train\.epochs is 0; it must be > 0"),
        ("train.batch_size=0", r"config\.train\.batch_size is 0; it must be > 0"),
        ("train.batch_size=352", r"batch_size is 352, but an epoch has only 351 images"),
        ("train.sampler=all", "'all'; it must be one of uniform, class_aware"),
        ("train.precision=half", "'half'; it must be one of default, high, highest, bfloat16"),
        ("attack.start=zero", "'zero'; it must be one of clean, uniform"),
        ("data.ratio=0", r"imbalance ratio 0\.0 is outside \(0, 1\]"),
        ("data.ratio=1.5", r"imbalance ratio 1\.5 is outside \(0, 1\]"),
        ("data.ratio=0.001", r"leaves class \d without an image .*; set it to at least"),
        ("data.profile=linear", "unknown long-tail profile 'linear'"),
        ("data.head=105", "lower head or test_per_class"),
        ("data.name=mnist", "unknown data set 'mnist'; use one of digits_lt, cifar10_lt, cifar100_lt"),
        ("model.name=vit", "unknown model 'vit'; use one of wide_resnet, resnet18, small_cnn"),
        ("head.name=mlp", "unknown head 'mlp'; use one of linear, cosine, class_temperature, tau_norm, tde"),
        ("loss.name=hinge", "unknown loss 'hinge'; use one of cross_entropy, "),
        (
            "objective.name=trade",
            "unknown objective 'trade'; use one of plain, pgd_at, distilled, regularised, trades",
        ),
        ("schedule.name=triangle", "unknown schedule 'triangle'; use one of paper, released"),
        ("loss.name=nowhere:f", "cannot import the loss 'nowhere:f'"),
        ("loss.name=robal_jax.losses:hinge", "cannot import the loss 'robal_jax.losses:hinge'"),
        ("objective.batch_norm_order=both", "batch_norm_order"),
        ("objective.regulariser=l1", "'l1'; it must be one of kl, alp, alp_logits, norm"),
        ("threat.norm=l1", "'l1'; it must be one of linf, l2"),
        ("attack.loss.name=soft_logit_margins", "unknown loss 'soft_logit_margins'"),
        ("train.start_from=nowhere", "no run or checkpoint nowhere; train it first"),
        (
            "optimizer.trainable=head",
            "'head' matches no parameter; use the beginning of one of .*classifier/",
        ),
    ],
)
def test_values(tmp_path, override, message):
    refused(message, start, tmp_path / "run", override)
    assert not (tmp_path / "run").exists(), "something was written"


WEIGHTED = {"name": "weighted_by_radius", "base": {"name": "cross_entropy"}}


def keyword(section, name, value):
    return lambda config: config[section].update({name: value})


@pytest.mark.parametrize(
    ("section", "name", "value", "message"),
    [
        ("head", "temperature", 1.0, "head 'cosine' takes no 'temperature'; use one of scale, gamma, eta"),
        ("loss", "alpha", 1.0, "loss 'robal' takes no 'alpha'; use one of scale, margin, tau_m, tau_b"),
        ("objective", "beta", 1.0, "objective 'regularised' takes no 'beta'; use one of "),
        ("model", "depth", 34, "model 'small_cnn' takes no 'depth'; use one of channels, width, mean, std$"),
        ("data", "path", "x", "data set 'digits_lt' takes no 'path'"),
        ("schedule", "gamma", 1.0, "schedule 'paper' takes no 'gamma'"),
        ("optimizer", "dampening", 0.1, "dampening"),
    ],
)
def test_keywords_that_a_function_does_not_take(tmp_path, section, name, value, message):
    refused(message, start, tmp_path, change=keyword(section, name, value))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"loss": {"base": {"name": "robal"}}}, "loss 'robal' needs 'scale'"),
        ({"loss": {"base": {"name": "logit_adjustment"}}}, "'logit_adjustment' takes no class weights"),
        ({"attack": {"loss": {"name": "deferred"}}}, "needs 'base'"),
        (
            {"attack": {"loss": {"name": "deferred", "base": {"name": "soft_logit_margin"}}}},
            "config.attack.loss.base 'soft_logit_margin' takes no class weights; set config.attack.loss.rew",
        ),
        (
            {"objective": {"name": "trades"}, "attack": {"loss": {"name": "focal_softmax"}}},
            "attacks the divergence and would ignore config.attack.loss 'focal_softmax'; use 'cross_entropy'",
        ),
        (
            {"objective": {"name": "trades"}, "attack": {"start": "clean"}},
            "attacks the divergence, whose gradient is 0 at the clean image, .*; use 'gaussian', or set",
        ),
        (
            {"threat": {"ramp": 0.5}, "attack": {"second_step": True}},
            "config.threat.ramp 0.5 raises the radii from 0, and config.attack.second_step makes steps of",
        ),
        (
            {"threat": {"ramp": 0.5}, "loss": {"reweight": False, "base": WEIGHTED}},
            "config.threat.ramp 0.5 raises .*, and loss 'weighted_by_radius' makes the weights .*; set",
        ),
        (
            {"threat": {"ramp": 0.5}, "objective": {"name": "trades", "by_radius": True}},
            "config.threat.ramp 0.5 raises .*, and config.objective.by_radius makes the weight of the diver",
        ),
        (
            {"threat": {"ramp": 0.5}, "objective": {"name": "mma", "max_epsilon": 0.1}},
            "'mma' has one radius .*, config.objective.max_epsilon, and config.threat.ramp is 0.5; set",
        ),
        (
            {"threat": {"budget": {"name": "cfa"}}, "objective": {"name": "mma", "max_epsilon": 0.1}},
            "config.objective.max_epsilon, and config.threat.budget.name is 'cfa'; set it to 'constant'",
        ),
        (
            {"perturbation": {"name": "awp"}, "optimizer": {"trainable": "classifier"}},
            "'awp' perturbs all weights, and config.optimizer.trainable 'classifier' leaves some untrained",
        ),
        ({"objective": {"name": "avmixup"}}, "'avmixup' has a loss of its own and would ignore config.loss"),
        ({"threat": {"norm": "l2"}, "attack": {"start": "one_sided"}}, "'one_sided' is for norm linf"),
    ],
)
def test_parts_that_do_not_go_together(tmp_path, change, message):
    refused(message, start, tmp_path, change=lambda c: c.update(change), spec="configs/deferred.py:digits_lt")


@pytest.mark.parametrize(("method", "override"), [("plain", "seed=0"), ("at", "attack.free_steps=2")])
def test_a_start_that_no_attack_reads_is_not_asked_for(method, override):
    overrides = ["--config.threat.norm=l2", f"--config.{override}"]
    builder.check(cli.apply_overrides(cli.load_config(f"{method}:cifar10_lt"), overrides))


def test_keywords_that_a_function_needs(tmp_path):
    refused("scale", start, tmp_path, "loss.name=robal", spec="configs/at.py:digits_lt")


def test_depth_of_a_wide_resnet(tmp_path):
    def change(config):
        config.model = {"name": "wide_resnet", "depth": 35, "widen": 1}

    refused("depth", start, tmp_path, change=change)


# ---------------------------------------------------------------- data and folders


def npz(path, images=None, labels=None, **changes):
    """A CIFAR file of two images a class; ``None`` leaves an array out."""
    labels = np.repeat(np.arange(10), 2) if labels is None else labels
    images = np.zeros((len(labels), 32, 32, 3), np.uint8) if images is None else images
    arrays = {"train_images": images, "train_labels": labels, "test_images": images, "test_labels": labels}
    np.savez(path, **{key: value for key, value in {**arrays, **changes}.items() if value is not None})


BLACK = np.zeros((20, 32, 32, 3), np.float32)
DATA = [
    ({"images": BLACK + 2}, r"train_images: values in \[2, 2\], outside \[0,1\]"),
    ({"images": BLACK - 1}, r"train_images: values in \[-1, -1\], outside \[0,1\]"),
    ({"images": BLACK * np.nan}, r"values in \[nan, nan\], outside \[0,1\]"),
    ({"images": BLACK[:, :28]}, r"train_images has shape \[20, 28, 32, 3\]; store \[N, 32, 32, 3\]"),
    ({"labels": np.repeat(np.arange(1, 11), 2)}, r"labels 1\.\.10 found, but 10 classes need labels 0\.\.9"),
    ({"labels": np.repeat(np.arange(-1, 9), 2)}, r"labels -1\.\.8 found"),
    (
        {"labels": np.minimum(np.arange(20) // 2, 8)},
        "class 9 has no image; give at least one image per class",
    ),
    ({"labels": np.arange(20) / 2}, "train_labels is float64 .*; store 20 integers"),
    ({"test_labels": None}, "lacks test_labels; it holds"),
    ({}, "class 0 has 2 images but the long-tailed set needs 5"),  # n_max
]


@pytest.mark.parametrize(("content", "message"), DATA)
def test_data(tmp_path, content, message):
    npz(tmp_path / "cifar.npz", **content)
    n_max = 2 if content else 5

    def change(config):
        config.data.n_max = n_max

    path = f"data.path={tmp_path / 'cifar.npz'}"
    refused(message, start, tmp_path / "run", path, "data.ratio=1", spec=CIFAR, change=change)


@pytest.mark.parametrize("damage", ["missing", "truncated", "empty"])
def test_damaged_data(tmp_path, damage):
    path = tmp_path / "cifar.npz"
    npz(path)
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[: 1000 if damage == "truncated" else 0])
    message = f"no file {path}" if damage == "missing" else f"cannot read {path}"
    refused(message, start, tmp_path / "run", f"data.path={path}", spec=CIFAR)


def test_no_data(tmp_path):
    message = refused("cifar10 not found", start, tmp_path, f"data.path={tmp_path}", spec=CIFAR)
    assert "experiments/prepare_data.py --dataset=cifar10" in message


def test_workdir_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    refused(r"cannot make workdir .* \(Not a directory\)", start, tmp_path / "file" / "run")
    refused(r"cannot make workdir .* \(File exists\)", start, tmp_path / "file")


# ---------------------------------------------------------------- evaluation


def saved_run(workdir, spec=DIGITS):
    """A workdir as training leaves it, with a checkpoint of zeros; the checkpoint's folder."""
    config = cli.load_config(spec)
    job = builder.training(config)
    prepare_workdir(config, data_digest(job.data), workdir)
    shapes = jax.eval_shape(lambda: initial_state(job))
    with checkpoints.Saver(workdir / "checkpoints", 3) as saver:
        return saver.save(5, jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes))[0]


def evaluate_run(workdir, **keywords):
    evaluation.evaluate(read_config(workdir), workdir, **keywords)


def test_no_run_to_evaluate(tmp_path):
    refused(r"no run in .*: it has no config\.json; train first", evaluate_run, tmp_path)


def test_no_checkpoint_to_evaluate(tmp_path):
    config = cli.load_config(DIGITS)
    refused("no checkpoint in .*; train first", evaluation.evaluate, config, tmp_path)
    missing = tmp_path / "checkpoints" / "7"
    refused(f"no checkpoint {missing}", evaluation.evaluate, config, tmp_path, checkpoint=missing)


@pytest.mark.slow
def test_checkpoint_of_another_model(tmp_path):
    path = saved_run(tmp_path / "robal")
    saved_run(tmp_path / "at", "configs/at.py:digits_lt")
    message = "is of a different model: it has nothing for .*bias"
    refused(message, evaluate_run, tmp_path / "at", checkpoint=path)


def test_damaged_checkpoint(tmp_path):
    path = saved_run(tmp_path)
    (path / "_CHECKPOINT_METADATA").unlink()
    refused("checkpoint .* is damaged .*; name another checkpoint", evaluate_run, tmp_path, checkpoint=path)
    refused("every checkpoint in .* is damaged", evaluate_run, tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda config: [], r"cannot read .*config\.json .*it holds no sections"),
        (lambda config: 3, r"cannot read .*config\.json .*it holds no sections"),
        (lambda config: {}, "config.method is missing; take its value from"),
        (lambda config: config | {"data": 3}, "config.data.name is missing"),
        (lambda config: config | {"evaluation": 3}, "config.evaluation.head.name is missing"),
        (lambda config: config | {"attack.steps": 3}, r"cannot read .*config\.json .*dots in field names"),
        (lambda config: config | {"seed": 2.5}, "config.seed is 2.5; it must be an integer"),
        (lambda config: config | {"head": {"name": 3}}, "config.head.name is 3; it must be a string"),
        (
            lambda config: config | {"head": {"name": "cosine", "scale": "x"}},
            "scale is 'x'; it must be in 1e-06",
        ),
        (lambda config: config | {"loss": {"name": "deferred", "base": {}}}, "unknown loss ''; use one of"),
        (lambda config: config | {"data": {"name": "digits_lt", "ratio": "x"}}, "ratio of data set .* 'x'"),
    ],
)
def test_a_config_that_was_edited_or_comes_from_elsewhere(tmp_path, change, message):
    fields = json.loads(to_json(cli.load_config(DIGITS)))
    (tmp_path / "config.json").write_text(json.dumps(change(fields)))

    def use():
        config = read_config(tmp_path)
        builder.evaluation(config)
        builder.training(config)

    refused(message, use)


@pytest.mark.parametrize("other", [{}, {"evaluation": 3}])
def test_inference_of_a_config_from_elsewhere(other):
    config = cli.load_config(DIGITS)
    refused("config.method is missing", builder.with_inference_of, config, ConfigDict(other))
    refused("config.method is missing", builder.with_inference_of, ConfigDict(other), config)


@pytest.mark.parametrize(
    "override", ["evaluation.epsilon=0", "evaluation.epsilon=-1", "evaluation.batch_size=0"]
)
def test_evaluation_settings(tmp_path, override):
    saved_run(tmp_path)
    config = cli.apply_overrides(read_config(tmp_path), [f"--config.{override}"])
    refused(f"config.{override.split('=')[0]} is", evaluation.evaluate, config, tmp_path)


# ---------------------------------------------------------------- whole processes


@pytest.mark.parametrize(
    ("error", "status"), [(InputError("two\nlines"), 2), (DivergedError("two\n  lines"), 3)]
)
def test_errors_become_one_line_and_a_status(capsys, error, status):
    def main(arguments):
        raise error

    with pytest.raises(SystemExit) as stopped:
        cli.run(main)
    assert stopped.value.code == status
    assert capsys.readouterr().err == "error: two lines\n"


def script(name, *arguments):
    return subprocess.run(
        [sys.executable, f"experiments/{name}.py", *arguments],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("train", (), "--config is missing; usage: Train"),
        ("train", ("--config=configs/at.py", "--workdir=x", "--config.sed=1"), "use 'seed'"),
        ("train", ("--config=configs/at.py", "--workdir=setup.cfg/run"), "cannot make workdir setup.cfg/run"),
        ("evaluate", (), "--workdir is missing; usage: Evaluate"),
        ("evaluate", ("--workdir=nowhere",), "no run in nowhere"),
    ],
)
def test_scripts_print_one_line(name, arguments, message):
    result = script(name, *arguments)
    assert result.returncode == 2
    assert result.stdout == ""
    lines = result.stderr.removeprefix("reading the data\n").splitlines()  # shown on a slow machine
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    assert message in lines[0]


@pytest.mark.slow
def test_script_says_one_line_of_a_damaged_checkpoint(tmp_path):
    path = saved_run(tmp_path)
    for file in (path / "state" / "d").iterdir():
        file.write_bytes(file.read_bytes()[:10])
    result = script("evaluate", f"--checkpoint={path}")
    assert result.returncode == 2
    assert "Traceback" not in result.stderr
    assert result.stderr.splitlines()[-1].startswith("error: checkpoint ")
    assert len(result.stderr.splitlines()) == 1, result.stderr


# ---------------------------------------------------------------- before JAX starts


@pytest.fixture
def only_a_cpu(monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.10.2")
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: [])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)


def test_what_is_set_before_jax_starts(only_a_cpu):
    found = {"XDG_CACHE_HOME": "/cache", "XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    prepare_jax(found)
    assert re.fullmatch(r"/cache/robal_jax/[0-9a-f]{8}", found["JAX_COMPILATION_CACHE_DIR"])
    count, flag = found["XLA_FLAGS"].split()
    assert count == "--xla_force_host_platform_device_count=4"
    assert flag == "--xla_cpu_experimental_ynn_fusion_type=-individual_convolution,-individual_dot"

    given = {
        "JAX_COMPILATION_CACHE_DIR": "",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "3",
        "XLA_FLAGS": "--xla_cpu_experimental_ynn_fusion_type=",
    }
    mine = dict(given)
    assert prepare_jax(mine) == []
    assert mine == given  # a user's own settings win


@pytest.mark.parametrize("case", ["an unknown version", "an accelerator"])
def test_no_flag_where_it_may_be_unknown(monkeypatch, only_a_cpu, case):
    if case == "an unknown version":
        monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.99.0")
    else:
        monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: [group])
    found = {}
    prepare_jax(found)
    assert "XLA_FLAGS" not in found and "JAX_COMPILATION_CACHE_DIR" in found
