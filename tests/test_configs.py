"""Every method's config, on every data set, at toy size."""

import json
import pathlib
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT
from ml_collections import ConfigDict

from robal_jax import build, cli, models, parallel, train
from robal_jax.data import Dataset

METHODS = sorted(
    path.stem for path in (ROOT / "configs").glob("*.py") if path.stem not in ("base", "__init__")
)
DATA = {"digits_lt": 10, "cifar10_lt": 10, "cifar100_lt": 100}


def toy_data(num_classes, ratio, profile, seed, path="", head=0, test_per_class=0):
    """As many images as classes want, of 8 x 8 pixels; takes the keywords of the real data sets."""
    del ratio, profile, seed, path, head, test_per_class
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
        config.data.name, config.data.num_classes = "test_configs:toy_data", DATA[data]
        config.model = ConfigDict({"name": "test_configs:ToyBackbone"})
        config.train.batch_size, config.train.steps_per_dispatch = 8, 2
        config.attack.steps = 2
    return config


def quickly_compiled(function, *arguments):
    """The value of a jitted function that XLA does not optimise: these tests wait for compilations only."""
    options = {"xla_backend_optimization_level": 0}
    return function.lower(*arguments).compile(compiler_options=options)(*arguments)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("data", DATA)
def test_builds_and_trains_two_steps(method, data):
    config = toy_config(method, data)
    assert config.is_locked
    again = ConfigDict(json.loads(build.to_json(config)))
    assert build.to_json(again) == build.to_json(config)
    assert not build.differences(again, config)

    build.evaluation(config)
    job = build.training(again)
    state = quickly_compiled(jax.jit(lambda: train.initial_state(job)))
    before = jax.device_get(state.params)
    images = train.DeviceData(job.data.train_images, job.data.train_labels)
    (ids, _), key = train.chunk_ids(job, 0), jax.random.key(0)
    state, images, key = parallel.replicate((state, images, key), jax.local_devices())
    positions = jnp.arange(job.batch_size)
    state, sums = quickly_compiled(train.compiled_chunk(job), state, images, ids, 2, key, positions)
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


def test_start_from_names_the_run_that_the_notes_make():
    for method in ("one_epoch_rs", "one_epoch_rw", "lws"):
        config = cli.load_config(f"configs/{method}.py:cifar10_lt")
        note = pathlib.Path(ROOT / "configs" / "at.py").read_text()
        assert f"--workdir={config.train.start_from}" in note
