"""Values of config fields: fractions, units, step sizes that follow epsilon, and what is warned about."""

import json
import math
import re

import jax
import numpy as np
import pytest
from conftest import ROOT
from test_configs import DATA, METHODS, slow_but_for_digits

from robal_jax import (
    attacks,
    averages,
    budgets,
    builder,
    class_statistics,
    classifiers,
    cli,
    data,
    losses,
    models,
    objectives,
    optimizers,
    perturbations,
)  # fmt: skip
from robal_jax.attacks import ThreatModel, autoattack
from robal_jax.errors import InputError
from robal_jax.storage.config_file import flatten, read_config, to_json

DIGITS = f"{ROOT}/configs/at.py:digits_lt"


def changed(*overrides, spec=DIGITS):
    return cli.apply_overrides(cli.load_config(spec), [f"--config.{override}" for override in overrides])


def warnings(*overrides, spec=DIGITS):
    config = changed(*overrides, spec=spec)
    builder.validate(config)
    return builder.doubts(config), builder.evaluation_doubts(config)


# ---------------------------------------------------------------- fractions


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("threat.epsilon=8/255", 8 / 255),
        ("attack.step_size=2/255", 2 / 255),
        ("evaluation.step_size=0.5/255", 0.5 / 255),
        ("data.ratio=1/50", 0.02),
        ("schedule.lr=1e-1/2", 0.05),
        ("threat.epsilon= 8 / 255 ", 8 / 255),
    ],
)
def test_fractions(override, value):
    config = changed(override)
    for key in override.partition("=")[0].split("."):
        config = config[key]
    assert config == value


@pytest.mark.parametrize("text", ["8/0", "8/", "/255", "8/255/2", "eight/255", "0/0"])
def test_what_is_no_fraction(text):
    with pytest.raises(
        InputError, match=f"--config.threat.epsilon={text} is no number; write 0.031 or 8/255"
    ):
        changed(f"threat.epsilon={text}")


@pytest.mark.parametrize("text", ["inf", "nan"])
def test_the_field_that_others_follow_is_named(text):
    with pytest.raises(InputError, match=r"config\.threat\.epsilon is "):
        builder.validate(changed(f"threat.epsilon={text}"))


def test_only_real_numbers_may_be_fractions():
    assert changed("train.start_from=runs/at", "evaluation.audit.surrogate=a/b").train.start_from == "runs/at"
    with pytest.raises(InputError, match=r"attack\.steps"):
        changed("attack.steps=14/2")


# ---------------------------------------------------------------- units and step sizes


@pytest.mark.parametrize("field", ["threat.epsilon", "evaluation.epsilon", "attack.step_size"])
@pytest.mark.parametrize(
    ("value", "hint"), [("8", ": did you mean 8/255?"), ("1.5", "mean 1.5/255?"), ("300", "a pixel$")]
)
def test_a_length_in_255ths_is_refused(field, value, hint):
    message = rf"config.{field} is {value}; in L-infinity it must be at most 1, .*{hint}".replace("?", r"\?")
    with pytest.raises(InputError, match=message):
        builder.validate(changed(f"{field}={value}"))


def test_a_radius_of_the_whole_range_and_an_l2_radius_are_not_refused():
    builder.validate(changed("threat.epsilon=1"))
    builder.validate(changed("threat.epsilon=2", "threat.norm=l2"))


def test_a_threat_model_in_255ths_is_refused():
    """By every attack, which knows the images."""
    images, labels = np.full((3, 2, 2, 1), 0.5, np.float32), np.arange(3)
    with pytest.raises(ValueError, match="use the images' unit: did you mean 8/255"):
        ThreatModel(8).check(images, labels)
    with pytest.raises(ValueError, match="did you mean 8/255"):
        attacks.square(lambda x: x.reshape(3, 4), jax.random.key(0), images, labels, threat=ThreatModel(8))
    for threat in (ThreatModel(8.0, upper=255.0), ThreatModel(8.0, "l2"), ThreatModel(1.0)):
        threat.check(images, labels)


@pytest.mark.parametrize("data", DATA)
def test_step_sizes_follow_epsilon(data):
    before = changed(spec=f"{ROOT}/configs/at.py:{data}")
    after = changed("threat.epsilon=0.5", spec=f"{ROOT}/configs/at.py:{data}")
    for section in ("attack", "evaluation"):
        part = before[section].step_size / before.threat.epsilon
        assert after[section].step_size == pytest.approx(0.5 * part)
    alone = changed("evaluation.epsilon=0.5", spec=f"{ROOT}/configs/at.py:{data}")
    assert alone.attack.step_size == before.attack.step_size
    assert alone.evaluation.step_size == after.evaluation.step_size
    own = changed("threat.epsilon=0.5", "attack.step_size=0.01", spec=f"{ROOT}/configs/at.py:{data}")
    assert own.attack.step_size == 0.01


def test_step_sizes_of_the_released_code():
    config = changed(spec=f"{ROOT}/configs/at.py:cifar10_lt")
    assert config.attack.step_size == config.evaluation.step_size == 0.0078


# ---------------------------------------------------------------- help

CHOICES = {
    "loss.name": losses.LOSSES,
    "head.name": classifiers.HEADS,
    "objective.name": objectives.OBJECTIVES,
    "model.name": models.BACKBONES,
    "optimizer.decayed": optimizers.DECAYED,
    "schedule.name": optimizers.SCHEDULES,
    "average.name": averages.AVERAGES,
    "perturbation.name": perturbations.PERTURBATIONS,
    "class_statistics.name": class_statistics.CLASS_STATISTICS,
    "threat.budget.name": budgets.BUDGETS | budgets.LEARNED,
    "attack.start": attacks.STARTS,
    "train.augmentation": data.AUGMENTATIONS,
    "train.mixing": data.MIXINGS,
    "train.sampler": data.SAMPLERS,
    "evaluation.autoattack": autoattack.VERSIONS,
    "evaluation.minimum_norm": attacks.MINIMUM_NORM,
}


@pytest.mark.parametrize("field", CHOICES)
def test_help_names_every_choice(field):
    lines = cli.describe(cli.load_config("at:digits_lt"), field).splitlines()
    line = next(line for line in lines if line.startswith(f"  config.{field} = "))
    assert [name for name in CHOICES[field] if repr(name) not in line] == []


# ---------------------------------------------------------------- warnings


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("data", slow_but_for_digits(DATA))
def test_no_shipped_config_is_doubted(method, data):
    found = warnings(spec=f"{ROOT}/configs/{method}.py:{data}")
    if method == "taet" and data.startswith("cifar"):  # as released: ten steps of 0.003 from 0.001 N(0, 1)
        assert [len(lines) for lines in found] == [1, 0]
        assert (
            "10 times config.attack.step_size 0.003 is less than config.threat.epsilon 0.031" in found[0][0]
        )
    else:
        assert found == ([], [])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["attack.steps=3"],
            "3 times config.attack.step_size 0.025 is less than config.threat.epsilon",
        ),
        (["attack.step_size=1/255"], "7 times config.attack.step_size 0.0039"),
        (["schedule.milestones=55,45"], r"milestones are \[55, 45\]; give epochs from 1 in rising order"),
        (["schedule.milestones=45,45"], r"milestones are \[45, 45\]; "),
        (["schedule.milestones=0,45"], r"milestones are \[0, 45\]; "),
        (
            ["schedule.warmup=61"],
            "warmup is 61 epochs, but the run has 60; set a shorter warm-up or more epochs",
        ),
        (["train.epochs=2"], "warmup is 3 epochs, but the run has 2"),
        (
            ["threat.ramp=0.8", "train.epochs=1", "schedule.warmup=0"],
            "threat.ramp 0.8 raises the radii from 0 in the first epoch, and the run has no other",
        ),
    ],
)
def test_doubts_about_the_training(overrides, message):
    (line,), evaluated = warnings(*overrides)
    assert re.search(message, line)
    assert len(line.splitlines()) == 1
    assert evaluated == []


@pytest.mark.parametrize(
    "overrides",
    [
        ["attack.steps=4"],  # of epsilon / 4
        ["attack.steps=10", "attack.step_size=0.01"],  # whose sum rounds to less than epsilon
        ["schedule.milestones=()"],
        ["schedule.warmup=60"],
        ["attack.steps=1", "objective.name=plain"],
        ["evaluation.epsilon=0.2"],  # whose step size follows
    ],
)
def test_what_is_not_doubted(overrides):
    assert warnings(*overrides) == ([], [])


def test_doubts_about_the_evaluation():
    trained, (line,) = warnings("evaluation.step_size=0.001")
    assert trained == []
    assert "20 times config.evaluation.step_size 0.001 is less than config.evaluation.epsilon 0.1" in line


# ---------------------------------------------------------------- without the data


@pytest.mark.parametrize(("data", "count"), [("cifar100_lt", 100), ("tiny_imagenet_lt", 20)])
def test_radii_of_as_many_classes_as_the_data_has(data, count):
    override = f"epsilons=({'0.03,' * count})"
    for section in ("threat", "evaluation"):
        given = [f"{section}.budget.name=given", f"{section}.budget.{override}"]
        builder.check(changed(*given, spec=f"{ROOT}/configs/at.py:{data}"))
    given = ["threat.budget.name=given", "threat.budget.epsilons=(0.1,0.2)"]
    with pytest.raises(InputError, match=r"epsilons is \[2\]; it must be \[10\]"):
        builder.check(changed(*given))


# ---------------------------------------------------------------- values from a file


def edited(tmp_path, path, value):
    """The config of a run whose ``config.json`` has a value in place of its own; None leaves it out."""
    fields = json.loads(to_json(cli.load_config(DIGITS)))
    *sections, field = path.split(".")
    section = fields
    for key in sections:
        section = section[key]
    if value is None:
        del section[field]
    else:
        section[field] = value
    (tmp_path / "config.json").write_text(json.dumps(fields))
    return read_config(tmp_path)


NO_NUMBERS = (10**400, -(10**400), 10**4000, math.nan, math.inf, "0.1", [0.1], {"x": 1})


@pytest.mark.parametrize("value", NO_NUMBERS)
@pytest.mark.parametrize(
    "path",
    [
        "seed", "threat.epsilon", "attack.steps", "attack.step_size", "schedule.lr", "schedule.decay",
        "train.epochs", "train.batch_size", "train.max_steps", "optimizer.momentum", "evaluation.epsilon",
        "evaluation.audit.examples", "evaluation.tau_p", "evaluation.head_classes", "data.ratio", "data.seed",
    ],
)  # fmt: skip
def test_a_value_that_is_no_number_gives_one_line(tmp_path, path, value):
    with pytest.raises(InputError) as raised:
        builder.training(edited(tmp_path, path, value))
    assert len(str(raised.value).splitlines()) == 1
    assert len(str(raised.value)) < 250
    assert path.rpartition(".")[2] in str(raised.value)


@pytest.mark.parametrize(
    "path",
    [
        "schedule.lr",
        "schedule",
        "optimizer",
        "threat.epsilon",
        "attack.loss.name",
        "model",
        "data.name",
        "evaluation.audit",
    ],
)
def test_a_missing_field_gives_one_line(tmp_path, path):
    with pytest.raises(InputError, match=r"is missing|needs") as raised:
        builder.training(edited(tmp_path, path, None))
    assert path.rpartition(".")[2] in str(raised.value)


@pytest.mark.long
@pytest.mark.slow
def test_no_field_of_any_value_gives_more_than_one_line(tmp_path):
    """Each section and field left out, or of a value that no field has: right, or an ``InputError``."""
    names = list(flatten(cli.load_config(DIGITS).to_dict()))
    sections = {name.rpartition(".")[0] for name in names} - {""}
    refused = 0
    for path in [*names, *sections]:
        for value in (None, 10**400, math.nan, {"x": [1]}):
            try:
                builder.training(edited(tmp_path, path, value))
            except InputError as error:
                refused += 1
                assert len(str(error).splitlines()) == 1, (path, value)
    assert refused > 3 * len(names)
