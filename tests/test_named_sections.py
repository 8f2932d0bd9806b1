"""Arguments of the functions that sections name, from the command line."""

import json
import subprocess
import sys
from collections.abc import Callable

import pytest
from conftest import ROOT

from experiments import evaluate, train
from robal_jax import builder, cli, losses
from robal_jax.builder.instantiate import call
from robal_jax.errors import InputError
from robal_jax.storage.config_file import flatten, read_config, to_json


def changed(*overrides, spec="at:cifar10_lt"):
    return cli.apply_overrides(cli.load_config(spec), [f"--config.{override}" for override in overrides])


def own(gain, twice=1, many=(1, 2)):
    """A function of a user, without annotations."""


def in_words(logits, labels, *, inner: "losses.Loss", weight: "float" = 1.0):
    """A loss whose annotations are strings, as ``from __future__ import annotations`` makes them."""


def unknown_words(logits: "1 / 0", labels, *, inner: "Callable", more: "Unknown" = None):  # noqa: F821
    """A loss with annotations that cannot be evaluated, and one that can."""


def of_any_function(logits, labels, *, inner: Callable):
    """A loss of another one, of which it says no types."""


@pytest.mark.parametrize("name", ["in_words", "unknown_words", "of_any_function"])
def test_functions_among_the_arguments_whatever_the_form_of_the_annotation(name):
    found = changed(f"loss.name=test_named_sections:{name}", "loss.inner.name=focal").loss
    assert found.inner.name == "focal"
    if name == "of_any_function":
        message = "inner of loss .* is a section with a name; write --config.loss.inner.name=NAME"
        with pytest.raises(InputError, match=message):
            changed(f"loss.name=test_named_sections:{name}", "loss.inner=3")


def section(config, path):
    for key in path.split("."):
        config = config[key]
    return config


RADII = ",".join(["8/255"] * 10)
SET = [
    ("average", "name=ema decay=0.99", {"decay": 0.99}),
    ("average", "name=ema count_from=3 warmup=1", {"count_from": 3, "warmup": 1.0}),
    ("perturbation", "name=awp gamma=1/100", {"gamma": 0.01}),
    ("threat.budget", "name=by_frequency alpha=0.4", {"alpha": 0.4}),
    ("threat.budget", f"name=given epsilons={RADII}", {"epsilons": [8 / 255] * 10}),
    ("evaluation.budget", f"name=given epsilons=({RADII})", {"epsilons": [8 / 255] * 10}),
    ("evaluation.head", "name=tau_norm tau=2 use_bias=yes", {"tau": 2.0, "use_bias": True}),
    ("schedule", "name=cosine", {"lr": 0.1, "warmup": 0}),
    ("schedule", "name=cosine warmup=2.5 by=epoch", {"lr": 0.1, "warmup": 2.5, "by": "epoch"}),
    ("schedule", "name=piecewise milestones=[1,2]",
     {"lr": 0.1, "milestones": [1, 2], "decay": 0.1, "warmup": 0}),
    ("model", "name=resnet18", {}),
    ("model", "name=resnet18 width=8 mean=(0.5,.5,1/2)", {"width": 8, "mean": [0.5] * 3}),
    ("model", "name=wide_resnet activation=silu", {"activation": "silu", "depth": 34, "widen": 10}),
    ("head", "name=cosine scale=16", {"scale": 16.0}),
    ("loss", "name=focal gamma=1e0", {"gamma": 1.0}),
    ("loss", "name=deferred base.name=ldam base.scale=2", {"base": {"name": "ldam", "scale": 2.0}}),
    ("attack.loss", "name=focal gamma=3", {"gamma": 3.0}),
    ("objective", "name=trades beta=5", {"beta": 5.0}),
    ("optimizer", "name=test_named_sections:own gain=1/4 many=3,4 twice=2",
     {"gain": 0.25, "many": [3, 4], "twice": 2}),
    ("optimizer", "name=test_named_sections:own gain=sum", {"gain": "sum"}),
    ("data", "name=cifar10_lt n_max=100",
     {"n_max": 100, "ratio": 0.02, "profile": "exp", "seed": 0, "path": ""}),
]  # fmt: skip


@pytest.mark.parametrize(("path", "settings", "expected"), SET, ids=lambda value: str(value)[:40])
def test_arguments_are_set_in_any_order(path, settings, expected):
    """The section has what was typed and what its old and new functions share; nothing else changes."""
    overrides = [f"{path}.{setting}" for setting in settings.split()]
    config = changed(*overrides)
    found = json.loads(section(config, path).to_json())
    assert found == {"name": settings.split()[0].removeprefix("name=")} | expected
    assert to_json(changed(*overrides[::-1])) == to_json(config)
    kind, table, given = builder.SECTIONS[path]
    call(kind, table, section(config, path), **dict.fromkeys(given))
    before, after = (flatten(each.to_dict()) for each in (changed(), config))
    for name in before.keys() | after.keys():
        assert name.startswith(path) or before[name] == after[name]


REFUSED = [
    ("average.name=ema average.dekay=1",
     "average 'ema' takes no 'dekay'; use one of decay, warmup, count_from: did you mean 'decay'?"),
    ("average.decay=1", "average 'none' takes no 'decay'; leave it out"),
    ("perturbation.name=awp perturbation.rate=1",
     "perturbation 'awp' takes no 'rate'; use one of gamma, start"),
    ("threat.budget.alpha=0.4", "budget 'constant' takes no 'alpha'; leave it out"),
    ("evaluation.budget.name=cfa evaluation.budget.start=2",
     "unknown budget 'cfa'; use one of constant, by_frequency, given, or your own as 'module:function'"),
    ("schedule.name=cosine schedule.decay=0.5",
     "schedule 'cosine' takes no 'decay'; use one of lr, warmup, start, final, by"),
    ("schedule.epochs=5", "schedule 'released' takes no 'epochs'; use one of lr, milestones, decay, warmup, "
     "compounding, first_epoch"),
    ("model.name=resnet18 model.depth=10",
     "model 'resnet18' takes no 'depth'; use one of shortcut, stem, width, mean, std"),
    ("model.name=vit", "unknown model 'vit'; use one of "),
    ("model.axis_name=x", "model 'wide_resnet' takes no 'axis_name'; use one of "),
    ("head.num_classes=5", "head 'linear' takes no 'num_classes'; use bias"),
    ("head.parent=x", "head 'linear' takes no 'parent'; use bias"),
    ("loss.logits=1", "loss 'cross_entropy' takes no 'logits'; use class_weights"),
    ("loss.name=deferred loss.base=ldam",
     "base of loss 'deferred' is a section with a name; write --config.loss.base.name=NAME"),
    ("loss.name=deferred loss.base.scale=2", "config.loss.base.name is empty; set it to one of "),
    ("loss.name=focal loss.gamma.x=1", "gamma of loss 'focal' is one value; write --config.loss.gamma=VALUE"),
    ("evaluation.head.tau=2", "config.evaluation.head.name is empty; set it to one of linear, "),
    ("objective.name=trades objective.attack=x", "objective 'trades' takes no 'attack'; use one of "),
    ("optimizer.dampening=0", "optimizer 'sgd' takes no 'dampening'; use one of momentum, "),
    ("average.name=ema average.decay=high", "--config.average.decay=high is no number; write 0.031 or 8/255"),
    ("average.name=swa average.start=2.5",
     "--config.average.start=2.5 is no whole number; write one such as 100"),
    ("threat.budget.name=given threat.budget.epsilons=x",
     "--config.threat.budget.epsilons=x is no number; write "),
    ("data.n_maxx=3", "data set 'cifar10_lt' takes no 'n_maxx'; use one of "),
    ("generated.pathh=x", "unknown config key 'generated.pathh'; use 'generated.path'"),
    ("attack.lossy=x", "unknown config key 'attack.lossy'; use 'attack."),
    ("head=cosine", "config.head is a section; set one of its fields, such as --config.head.name"),
    ("evaluation.head_classs=3",
     "unknown config key 'evaluation.head_classs'; use 'evaluation.head_classes'"),
]  # fmt: skip


@pytest.mark.parametrize(("overrides", "message"), REFUSED, ids=[overrides for overrides, _ in REFUSED])
def test_what_a_function_does_not_take_is_refused(overrides, message):
    for order in (overrides.split(), overrides.split()[::-1]):
        with pytest.raises(InputError) as raised:
            changed(*order)
        assert str(raised.value).startswith(message)
        assert len(str(raised.value).splitlines()) == 1


def test_the_fields_that_both_functions_take_stay_and_follow():
    """The seed of the data follows that of the training, whatever the data set."""
    config = changed("data.name=cifar10_lt", "data.path=x", "seed=3", spec="at:digits_lt")
    assert section(config, "data").to_dict() == {
        "name": "cifar10_lt", "ratio": 0.05, "profile": "exp", "seed": 3, "path": "x",
    }  # fmt: skip
    assert changed("schedule.name=cosine", "schedule.lr=0.3").schedule.lr == 0.3


def test_a_section_inside_of_a_section():
    spec = "deferred:cifar10_lt"

    def base(*overrides):
        before = changed("loss.base.name=ldam", "loss.base.scale=2", spec=spec)
        return cli.apply_overrides(before, [f"--config.loss.base.{each}" for each in overrides]).loss.base

    assert base("name=focal").to_dict() == {"name": "focal"}
    assert base("exponent=1/2").to_dict() == {"name": "ldam", "scale": 2.0, "exponent": 0.5}
    assert changed("loss.name=cross_entropy", spec=spec).loss.to_dict() == {"name": "cross_entropy"}
    with pytest.raises(InputError, match="loss 'cross_entropy' takes no 'base'"):
        changed("loss.name=cross_entropy", "loss.base.name=ldam", spec=spec)


def test_without_a_name_the_head_of_the_evaluation_is_the_trained_one():
    head = changed("evaluation.head.name=", spec="tau_norm:cifar10_lt").evaluation.head
    assert head.to_dict() == {"name": ""}


@pytest.mark.parametrize("overrides", [(), ("schedule.name=paper",), ("schedule.warmup=3",), ("seed=1",)])
def test_a_config_file_with_a_field_too_many_is_refused(overrides):
    config = cli.load_config("at:digits_lt")  # its schedule is 'paper'
    with config.unlocked():
        config.schedule.pct_start = 0.3
    config = cli.apply_overrides(config, [f"--config.{override}" for override in overrides])
    with pytest.raises(InputError, match="schedule 'paper' takes no 'pct_start'; use one of"):
        builder.check(config)


def test_the_command_line_knows_every_named_section():
    config = cli.load_config("base:cifar10_lt")
    named = {name.removesuffix(".name") for name in flatten(config.to_dict()) if name.endswith(".name")}
    assert named == set(cli.NAMED) == set(builder.SECTIONS)


@pytest.mark.parametrize("path", builder.SECTIONS)
def test_the_command_line_refuses_as_a_config_file_is_refused(path):
    """So that ``SECTIONS`` gives each function what the parts of a training give it."""
    name = next(iter(builder.SECTIONS[path].table))
    config = changed(f"{path}.name={name}", spec="at:digits_lt")
    with config.unlocked():
        section(config, path)["nonsense"] = 1
    with pytest.raises(InputError, match="takes no 'nonsense'") as of_file:
        builder.check(config)
        builder.evaluation(config)
    with pytest.raises(InputError) as typed:
        changed(f"{path}.name={name}", f"{path}.nonsense=1", spec="at:digits_lt")
    assert str(typed.value) == str(of_file.value)


FLAGS = ("--config.average.name=ema", "--config.average.decay=0.9", "--config.schedule.name=cosine")


def test_the_printed_config_has_no_field_too_many(capsys):
    train.main(["--config=at:digits_lt", "--print-config", *FLAGS])
    printed = json.loads(capsys.readouterr().out)
    assert printed["average"] == {"name": "ema", "decay": 0.9}
    assert printed["schedule"] == {"name": "cosine", "lr": 0.05, "warmup": 3}


def test_a_run_is_read_and_its_evaluation_has_arguments(tmp_path, capsys):
    config = cli.apply_overrides(cli.load_config("at:digits_lt"), FLAGS)
    (tmp_path / "config.json").write_text(to_json(config))
    assert to_json(cli.apply_overrides(read_config(tmp_path), FLAGS)) == to_json(config)
    flags = ["--budget=by_frequency", "--config.evaluation.budget.alpha=0.4", "--print-config"]
    evaluate.main([f"--workdir={tmp_path}", *flags])
    printed = json.loads(capsys.readouterr().out)
    assert printed["evaluation"].pop("budget") == {"name": "by_frequency", "alpha": 0.4}
    assert printed["average"] == config.average.to_dict()


@pytest.mark.slow
def test_only_arguments_of_functions_need_jax():
    code = (
        "import sys; from robal_jax import cli; load = lambda *o: cli.apply_overrides("
        "cli.load_config('at:digits_lt'), [f'--config.{each}' for each in o]); "
        "load('average.name=ema', 'schedule.lr=0.3', 'train.epochs=2'); first = 'jax' in sys.modules; "
        "load('average.name=ema', 'average.decay=0.9'); print(first, 'jax' in sys.modules)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert result.stdout.split() == ["False", "True"]
