"""Every method's config: built on every data set, trained at toy size on one, on the ImageNets compared."""

import functools
import json
import os
import pathlib
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT
from ml_collections import ConfigDict

from robal_jax import builder, cli, models, training
from robal_jax.builder import call, parts
from robal_jax.data import Dataset, sources
from robal_jax.devices import parallel
from robal_jax.storage import config_file
from robal_jax.storage.config_file import differences, to_json
from robal_jax.training import initial_state

METHODS = sorted(
    path.stem for path in (ROOT / "configs").glob("*.py") if path.stem not in ("base", "__init__")
)
# They have one protocol of their own on CIFAR, which the digits and ImageNet-LT do not take.
FOLLOW_UPS = {
    path.stem
    for path in (ROOT / "configs").glob("*.py")
    if path.stem != "base" and re.search(r"base\.(follow_up|robustlt)\(", path.read_text())
}
IMAGENETS = ("tiny_imagenet_lt", "imagenet_lt")
DATA = {"digits_lt": 10, "cifar10_lt": 10, "cifar100_lt": 100, **dict.fromkeys(IMAGENETS, 20)}


def slow_but_for_digits(data):
    """Data sets as parameters of a test of every method; daily work tries the digits."""
    return [pytest.param(name, marks=[pytest.mark.slow] * (name != "digits_lt")) for name in data]


def toy_data(num_classes, seed):
    """As many images as classes want, of 8 x 8 pixels; the seed is that of the real data set."""
    del seed
    labels = np.repeat(np.arange(num_classes), np.linspace(6, 1, num_classes).astype(int)).astype(np.int32)
    rng = np.random.RandomState(0)
    draw = lambda n: rng.randint(0, 256, (n, 8, 8, 3)).astype(np.uint8)  # noqa: E731
    test_labels = np.arange(num_classes, dtype=np.int32)
    names = tuple(map(str, range(num_classes)))
    return Dataset(draw(len(labels)), labels, draw(num_classes), test_labels, 255, names)


class ToyBackbone(nn.Module):
    """A linear layer and batch norm: compiles in no time."""

    axis_name: str | None = None

    @nn.compact
    def __call__(self, x, train):
        return models.BatchNorm(self.axis_name)(nn.Dense(8)(x.reshape(len(x), -1)), train)


def toy_config(method, data):
    """The method's config with toy data and a toy network; nothing else is changed but sizes."""
    config = cli.load_config(f"configs/{method}.py:{data}")
    with config.unlocked():
        toy = {"name": "test_configs:toy_data", "num_classes": DATA[data], "seed": config.data.seed}
        config.data = ConfigDict(toy)
        config.model = ConfigDict({"name": "test_configs:ToyBackbone"})
        config.train.batch_size, config.train.steps_per_dispatch = 8, 2
        config.attack.steps = 2
    return config


def test_only_a_tpu_reads_copies_of_kernels():
    """Of WRN-10-10 the kernels of 160 and 320 channels; those of 640 fill the lanes, those of 16 are few."""
    config = cli.apply_overrides(cli.load_config("configs/at.py:cifar10_lt"), ["--config.model.depth=10"])
    images = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)
    copies = []
    for platform in ("cpu", "gpu", "tpu"):
        model = builder.model(config, np.arange(10, 0, -1), platform=platform, precision="bfloat16")
        variables = jax.eval_shape(model.init, jax.random.key(0), images)
        gradient = jax.grad(lambda *inputs: model.predict(*inputs).sum(), 2)  # noqa: B023
        copies.append(str(jax.make_jaxpr(gradient)(*variables, images)).count("layout_constraint"))
    assert copies == [0, 0, 2]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("data", slow_but_for_digits(data for data in DATA if data not in IMAGENETS))
def test_builds(method, data):
    config = toy_config(method, data)
    assert config.is_locked
    again = ConfigDict(json.loads(to_json(config)))
    assert to_json(again) == to_json(config)
    assert not differences(again, config)
    builder.evaluation(again)  # with the training


# Each is a compilation: without ROBAL_EVERY_CONFIG a method trains on one data set, the next on the next one.
def left_out(method, data):
    return list(DATA)[METHODS.index(method) % len(DATA)] != data and "ROBAL_EVERY_CONFIG" not in os.environ


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "data"), [(method, data) for data in DATA for method in METHODS if not left_out(method, data)]
)
def test_trains_two_steps(method, data):
    job = builder.training(toy_config(method, data))
    state = jax.jit(lambda: initial_state(job))()
    before = jax.device_get(state.params)
    images = training.Examples(job.data.train_images, job.data.train_labels)
    ids, _ = next(training.chunks(job, 0))
    devices = jax.devices()
    state, images, key = parallel.replicate((state, images, jax.random.key(0)), devices)
    chunk = training.compiled_chunk(job, devices)
    state, sums = chunk(state, images, ids, 2, key, training.positions(job))
    assert int(state.step) == 2
    assert np.isfinite(float(sums["loss"]))
    moved = [
        not np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (before, state.params)), strict=True)
    ]
    assert any(moved)


@pytest.mark.parametrize("method", METHODS)
def test_its_docstring_is_its_lab_note(method):
    text = (ROOT / "configs" / f"{method}.py").read_text()
    note = text.split('"""')[1]
    assert re.search(r"python experiments/(train|evaluate)\.py", note)
    assert f"--config=configs/{method}.py:cifar10_lt" in note
    assert re.search(r"RoBal tables? \d|[Pp]art of the released code|Not a row of RoBal", note)


def test_differences_of_paper_and_released_code_are_one_override_away():
    """Each field that a method's facts name, its default (what made the published figures) and the other."""
    for spec, override, default in [
        ("at.py:cifar10_lt", "schedule.name=paper", "released"),
        ("at.py:cifar10_lt", "attack.start=uniform", "one_sided"),
        ("robal_n.py:cifar10_lt", "objective.batch_norm_order=each_pass_once", "released"),
        ("tau_norm.py:cifar10_lt", "evaluation.head.tau=2.0", 1.0),
        ("la.py:cifar10_lt", "head.bias=none", "frozen"),
        ("one_epoch_rw.py:cifar10_lt", "optimizer.trainable=classifier", ""),
        ("robal_r.py:cifar10_lt", "evaluation.logit_scale=10.0", 1.0),
        ("robal_r.py:cifar100_lt", "objective.beta_reg=3.0", 6.0),
    ]:
        config = cli.load_config(f"configs/{spec}")
        field, _, value = override.partition("=")
        *sections, key = field.split(".")
        read = lambda c: [c := c[name] for name in sections][-1][key]  # noqa: E731, B023
        assert read(config) == default, spec
        changed = cli.apply_overrides(config, [f"--config.{override}"])
        assert str(read(changed)) == value


@pytest.mark.parametrize(
    ("method", "milestones"),
    [
        ("trades_awp", (100, 150)),
        ("at_awp", (101, 151)),
        ("robustlt_at", (75, 90)),
        ("robustlt_at_bsl", (75, 90)),
        ("robustlt_awp", (100, 150)),
        ("robustlt_reat", (60, 75)),
        ("robustlt_robal", (60, 75)),
        ("robustlt_taet", (75, 90)),
        ("at_bsl", (75, 90, 100)),
    ],
)
def test_milestones_count_epochs_as_the_released_code_does(method, milestones):
    config, digits = (cli.load_config(f"{method}:{data}") for data in ("cifar10_lt", "digits_lt"))
    assert (config.schedule.name, config.schedule.milestones) == ("paper", milestones)
    assert digits.schedule.milestones == (45, 55)
    assert config.attack.first_epoch == config.loss.get("start", 1) == (40 if "taet" in method else 1)


def test_start_from_names_the_run_that_the_notes_make():
    for method in ("one_epoch_rs", "one_epoch_rw", "lws"):
        config = cli.load_config(f"configs/{method}.py:cifar10_lt")
        note = pathlib.Path(ROOT / "configs" / "at.py").read_text()
        assert f"--workdir={config.train.start_from}" in note


def test_a_section_that_is_added_later(monkeypatch):
    monkeypatch.setitem(config_file.NEUTRAL, "distillation", {"weight": 0.0})
    old = json.loads(to_json(cli.load_config("configs/at.py:digits_lt")))
    filled = config_file.with_neutral(old)
    assert filled == {**old, "distillation": {"weight": 0.0}}
    assert config_file.without_neutral(filled) == config_file.without_neutral(old)
    assert differences(ConfigDict(filled), ConfigDict(old)) == []
    filled["distillation"]["weight"] = 0.5
    assert differences(ConfigDict(filled), ConfigDict(old)) == ["distillation.weight: 0.5 here, 0.0 there"]


def test_a_user_s_own_function_gets_no_fields_of_the_library_s():
    old = json.loads(to_json(cli.load_config("configs/at.py:digits_lt")))
    old["optimizer"] = {"name": "my:adam", "b1": 0.9}
    assert config_file.with_neutral(old)["optimizer"] == old["optimizer"]
    old["optimizer"] = {"name": "sgd"}
    assert config_file.with_neutral(old)["optimizer"]["nesterov"] is False


@functools.cache
def fields(method, data):
    """All fields of a config by their full names."""

    def flatten(tree, prefix):
        for key, value in tree.items():
            yield from (
                flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else [(prefix + key, value)]
            )

    return dict(flatten(json.loads(to_json(cli.load_config(f"configs/{method}.py:{data}"))), ""))


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("data", IMAGENETS)
def test_on_the_imagenets_a_method_changes_what_it_changes_on_cifar100(method, data):
    config = cli.load_config(f"configs/{method}.py:{data}")
    assert config.is_locked
    again = ConfigDict(json.loads(to_json(config)))
    assert to_json(again) == to_json(config)
    assert not differences(again, config)
    builder.validate(config)

    if method in FOLLOW_UPS:
        own = ("objective.", "loss.", "attack.loss.", "class_statistics.", "average.", "generated.")
        of_method = [
            {key: value for key, value in fields(method, name).items() if key.startswith(own)}
            for name in ("cifar100_lt", data)
        ]
        for found in of_method:
            found.pop("loss.start", None)  # an epoch
            found.pop("average.warmup", None)  # epochs
        assert of_method[0] == of_method[1]
        return
    there, at_there, found, at = (
        fields(*key) for key in ((method, "cifar100_lt"), ("at", "cifar100_lt"), (method, data), ("at", data))
    )
    changed = {key: value for key, value in there.items() if at_there.get(key, ...) != value}
    assert changed or method == "at"
    for key in changed.keys() & {"attack.step_size", "objective.max_epsilon"}:  # these follow epsilon
        assert found[key] / at["threat.epsilon"] == pytest.approx(changed[key] / at_there["threat.epsilon"])
        changed[key] = found[key]
    if "train.start_from" in changed:
        changed["train.start_from"] = f"runs/{data}/at"
    kept = {key: value for key, value in at.items() if key in there or key not in at_there}
    assert found == kept | changed


@pytest.mark.parametrize(
    ("data", "pixels", "training", "expected"),
    [
        (
            "tiny_imagenet_lt",
            (64, 64),
            "crop_flip",
            {"data.ratio": 0.1, "data.train_list": "", "model.stem": "small", "threat.epsilon": 8 / 255},
        ),
        (
            "imagenet_lt",
            (224, 256),
            "resized_crop_flip",
            {
                "data.ratio": 1.0,
                "data.train_list": "ImageNet_LT_train.txt",
                "data.test_list": "ImageNet_LT_test.txt",
                "model.stem": "imagenet",
                "threat.epsilon": 4 / 255,
                "schedule.lr": 0.1,
                "schedule.milestones": [30, 60, 80],
                "optimizer.weight_decay": 1e-4,
                "train.batch_size": 256,
                "train.epochs": 90,
            },
        ),
    ],
)
def test_the_imagenets(data, pixels, training, expected):
    config, found = cli.load_config(f"configs/at.py:{data}"), fields("at", data)
    assert expected.items() <= found.items()
    assert (config.data.image_size, config.data.resize) == pixels
    assert config.train.augmentation == training
    assert config.schedule.name == "paper"
    assert config.attack.step_size == config.evaluation.step_size == config.threat.epsilon / 4
    assert config.evaluation.epsilon == config.threat.epsilon
    assert "path" in call("data set", sources.SOURCES, config.data).keywords  # which takes all others too
    assert call("model", models.BACKBONES, config.model)().blocks == (3, 4, 6, 3)
    smaller = cli.apply_overrides(config, ["--config.model.name=resnet18"]).model
    backbone = call("model", models.BACKBONES, smaller)()
    assert (backbone.blocks, backbone.stem) == ((2, 2, 2, 2), expected["model.stem"])


@pytest.mark.parametrize("data", DATA)
def test_generated_warm_up_is_a_fortieth_of_the_epochs(data):
    config = cli.load_config(f"configs/trades_generated.py:{data}")
    assert config.average.warmup == config.train.epochs / 40
    if data.startswith("cifar"):
        _, schedule = builder.optimizer(config, steps_per_epoch=3)
        rates = jax.vmap(schedule)(jnp.arange(3 * 400)).reshape(400, 3)
        assert np.all(rates == rates[:, :1])
        assert (rates[:, 0].argmax(), rates.max()) == (9, jnp.float32(0.2))
    changed = cli.apply_overrides(config, ["--config.train.epochs=20"])
    assert changed.average.warmup == 0.5
    assert cli.apply_overrides(config, ["--config.average.warmup=1.5"]).average.warmup == 1.5


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("data", slow_but_for_digits([*DATA, *IMAGENETS]))
def test_step_sizes_follow_epsilon(method, data):
    config = cli.load_config(f"configs/{method}.py:{data}")
    sizes = [config[section].step_size for section in ("attack", "evaluation")]
    cli.apply_overrides(config, [f"--config.threat.epsilon={config.threat.epsilon / 2}"])
    halved = [config[section].step_size for section in ("attack", "evaluation")]
    assert halved == pytest.approx([size / 2 for size in sizes])


@pytest.mark.parametrize("data", ["cifar10_lt", "cifar100_lt"])
def test_generated_images_are_standardised_as_released(data):
    """By the mean and deviation of their own data set, from the released code."""
    released = {
        "cifar10_lt": {"mean": (0.4914, 0.4822, 0.4465), "std": (0.2471, 0.2435, 0.2616)},
        "cifar100_lt": {"mean": (0.5071, 0.4865, 0.4409), "std": (0.2673, 0.2564, 0.2762)},
    }
    assert parts.standardisation(cli.load_config(f"configs/trades_generated.py:{data}")) == released[data]


@pytest.mark.parametrize(("method", "start", "factor"), [("fgsm", "clean", 1.0), ("fast", "uniform", 1.25)])
@pytest.mark.parametrize("data", [*DATA, *IMAGENETS])
def test_one_step_follows_epsilon(method, start, factor, data):
    config = cli.load_config(f"configs/{method}.py:{data}")
    assert (config.attack.steps, config.attack.start) == (1, start)
    assert config.attack.step_size == pytest.approx(factor * config.threat.epsilon)
    changed = cli.apply_overrides(config, ["--config.threat.epsilon=0.05"])
    assert changed.attack.step_size == pytest.approx(factor * 0.05)
    assert changed.evaluation.epsilon == 0.05
