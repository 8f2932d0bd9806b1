"""Import from PyTorch and export: names, layouts, files, messages, and the logits of imported networks.

The tests of ``.pt`` files and logits need PyTorch, those of ``.safetensors`` files that package; they are
skipped where it is missing. The released code's own numbers are test_parity's business.
"""

import collections
import functools
import json
import os
import pathlib
import pickle
import re
import shutil
import sys
import types

import jax
import numpy as np
import pytest
from helpers import refused, script

from robal_jax import (
    builder,
    classifiers,
    cli,
    models,
    pytorch,
)
from robal_jax.errors import InputError
from robal_jax.pytorch import files
from robal_jax.storage import checkpoints
from robal_jax.storage.config_file import differences, read_config
from robal_jax.training import initial_state

ROOT = pathlib.Path(__file__).resolve().parents[1]
ROBAL = f"{ROOT}/configs/robal_n.py:cifar10_lt"
AT = f"{ROOT}/configs/at.py:cifar10_lt"
SMALL = ("--config.model.depth=10", "--config.model.widen=1")

WRN = models.WideResNet(depth=10, widen=1)
RESNET_PREFIXES = {"backbone.": "", "classifier.": "linear."}
NETWORKS = {
    "wrn": (models.Network(WRN, classifiers.CosineHead(3)), None),
    "wrn_linear": (models.Network(WRN, classifiers.LinearHead(3)), None),
    "wrn_frozen": (models.Network(WRN, classifiers.LinearHead(3, bias="frozen")), None),
    "wrn_lws": (models.Network(WRN, classifiers.TauNormHead(3, learn_scale=True)), None),
    "wrn_tde": (models.Network(WRN, classifiers.TDEHead(3)), None),
    "wrn_fc": (models.Network(WRN, classifiers.LinearHead(3)), {"backbone.": "", "classifier.": "fc."}),
    "wrn_bare": (WRN, None),
    "resnet18": (models.Network(models.ResNet18(), classifiers.LinearHead(3)), RESNET_PREFIXES),
    "small_cnn": (models.Network(models.SmallCNN(), classifiers.CosineHead(3)), None),
    "preact": (models.Network(models.PreActResNet18(), classifiers.LinearHead(3)), RESNET_PREFIXES),
    "resnet20": (models.Network(models.ResNet20(), classifiers.LinearHead(3)), RESNET_PREFIXES),
    "resnet32_b": (models.Network(models.ResNet32(shortcut="B"), classifiers.LinearHead(3)), RESNET_PREFIXES),
    "deepmind": (
        models.Network(models.DeepMindWideResNet(10, 1), classifiers.LinearHead(3)),
        {"backbone.": "", "classifier.": "logits."},
    ),
    "deepmind_cosine": (models.Network(models.DeepMindWideResNet(16, 2), classifiers.CosineHead(3)), None),
}


def shapes(network):
    images = jax.ShapeDtypeStruct((1, 32, 32, 3), np.float32)
    return jax.eval_shape(models.functional(network).init, jax.random.key(0), images)


def random_state(network, prefixes, dtype=np.float64):
    """Like-trees and a state_dict for them with all that a released one has beside."""
    like = shapes(network)
    r = np.random.RandomState(0)
    filled = jax.tree.map(lambda s: r.standard_normal(s.shape).astype(dtype), like)
    state = pytorch.to_state_dict(*filled, prefixes)
    extra = {name.replace("running_mean", "num_batches_tracked"): np.array(1) for name in state}
    return like, filled, {**extra, **state}


# ---------------------------------------------------------------- names and layouts


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_round_trip(name):
    network, prefixes = NETWORKS[name]
    like, filled, state = random_state(network, prefixes)
    imported = pytorch.from_state_dict(state, *like, prefixes)
    assert all(leaf.dtype == np.float64 for leaf in jax.tree.leaves(imported))
    jax.tree.map(np.testing.assert_array_equal, imported, filled)


@pytest.mark.parametrize(
    ("network", "names"),
    [
        ("wrn", {"backbone.block1.layer.0.bn1.running_var": (16,), "classifier.weight": (3, 64)}),
        ("wrn_linear", {"classifier.fc.weight": (3, 64), "classifier.fc.bias": (3,)}),
        ("wrn_frozen", {"classifier.fc.weight": (3, 64), "classifier.fc.bias": (3,)}),
        (
            "wrn_lws",
            {"classifier.fc.weight": (3, 64), "classifier.fc.bias": (3,), "classifier.cla_scale": (3,)},
        ),
        ("wrn_tde", {"classifier.weight": (3, 64), "classifier.moving_ed": (1, 64)}),
        ("wrn_fc", {"conv1.weight": (16, 3, 3, 3), "fc.weight": (3, 64), "fc.bias": (3,)}),
        ("wrn_bare", {"block2.layer.0.convShortcut.weight": (32, 16, 1, 1), "conv1.weight": (16, 3, 3, 3)}),
        ("resnet18", {"layer2.0.shortcut.1.weight": (128,), "linear.weight": (3, 512)}),
        ("preact", {"layer2.0.shortcut.0.weight": (128, 64, 1, 1), "bn.running_mean": (512,)}),
        ("resnet32_b", {"layer3.4.bn2.weight": (64,), "layer2.0.shortcut.1.bias": (32,)}),
        (
            "deepmind",
            {
                "init_conv.weight": (16, 3, 3, 3),
                "layer.1.block.0.batchnorm_1.running_var": (32,),
                "layer.2.block.0.conv_0.weight": (64, 32, 3, 3),
                "layer.1.block.0.shortcut.weight": (32, 16, 1, 1),
                "batchnorm.bias": (64,),
                "logits.weight": (3, 64),
            },
        ),
        ("deepmind_cosine", {"backbone.layer.0.block.1.conv_1.weight": (32, 32, 3, 3)}),
    ],
)
def test_names_and_layouts_are_pytorchs(network, names):
    _, _, state = random_state(*NETWORKS[network])
    assert {name: state[name].shape for name in names} == names


def test_convolution_layout():
    _, filled, state = random_state(*NETWORKS["wrn_bare"])
    kernel = filled[0]["conv1"]["kernel"]
    assert state["conv1.weight"][5, 2, 1, 0] == kernel[1, 0, 2, 5]


@pytest.mark.parametrize(("network", "ours"), [("wrn", False), ("wrn_tde", True)])
def test_moving_ed_is_ignored_only_where_it_has_no_use(network, ours):
    like, _, state = random_state(*NETWORKS[network])
    state["classifier.moving_ed"] = np.ones((1, 64))
    _, stats = pytorch.from_state_dict(state, *like)
    assert ("classifier" in stats) is ours
    assert ("classifier.moving_ed" in pytorch.ignored(state, pytorch.torch_shapes(*like))) is not ours
    del state["classifier.moving_ed"]
    if ours:
        refused(r"missing: classifier\.moving_ed\)", pytorch.from_state_dict, state, *like)


@pytest.mark.parametrize(
    ("network", "name", "value"), [("wrn", "classifier.bias", 0), ("wrn_linear", "classifier.cla_scale", 1)]
)
def test_frozen_arrays_are_ignored_while_they_have_their_value(network, name, value):
    like, _, state = random_state(*NETWORKS[network])
    state[name] = np.full(3, value)
    pytorch.from_state_dict(state, *like)
    reasons = pytorch.ignored(state, pytorch.torch_shapes(*like))
    assert collections.Counter(reasons.values()) == {
        "num_batches_tracked": len(reasons) - 1,
        f"{name} (all {value})": 1,
    }
    state[name] = np.full(3, 2)
    refused(rf"unused: {name}\)", pytorch.from_state_dict, state, *like)


def test_a_stage_that_is_never_called_is_ignored():
    like, _, state = random_state(*NETWORKS["wrn_fc"])
    extra = {
        f"sub_{name}": value
        for name, value in state.items()
        if name.startswith("block1") and "num" not in name
    }
    prefixes = pytorch.architecture(pytorch.shapes(state | extra)).prefixes(*like)
    pytorch.from_state_dict(state | extra, *like, prefixes)
    reasons = pytorch.ignored(state | extra, pytorch.torch_shapes(*like, prefixes))
    assert collections.Counter(reasons.values())["sub_block1"] == len(extra)


def test_message_lists_all_that_does_not_fit():
    like, _, state = random_state(*NETWORKS["wrn"])
    del state["backbone.bn1.bias"]
    state["surplus.weight"] = np.zeros(2)
    state["backbone.conv1.weight"] = np.zeros((3, 3, 3, 16))
    message = refused("the state_dict does not fit", pytorch.from_state_dict, state, *like)
    assert "missing: backbone.bn1.bias;" in message
    assert "unused: surplus.weight;" in message
    assert "of a different shape: backbone.conv1.weight (3, 3, 3, 16) instead of (16, 3, 3, 3))" in message


def test_an_array_of_a_kind_that_pytorch_has_no_name_for():
    refused("backbone/conv/gain has no name in PyTorch", pytorch.torch_name, ("backbone", "conv", "gain"), {})


@pytest.mark.parametrize("name", ["wrn", "wrn_linear", "wrn_fc", "resnet18"])
def test_complete_state_dict_has_what_strict_loading_wants(name):
    network, prefixes = NETWORKS[name]
    _, filled, state = random_state(network, prefixes, np.float32)
    complete = pytorch.complete_state_dict(*filled, prefixes)
    added = complete.keys() - pytorch.to_state_dict(*filled, prefixes).keys()
    assert {n for n in added if n.endswith("num_batches_tracked")} == {n for n in state if "num_batches" in n}
    assert {n for n in added if "num_batches" not in n} == ({"classifier.bias"} if name == "wrn" else set())
    assert all(complete[n].dtype == (np.int64 if "num_batches" in n else np.float32) for n in complete)
    assert not any(complete[n].any() for n in added)
    assert all(array.flags.c_contiguous for array in complete.values())


# ---------------------------------------------------------------- which network it is


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("wrn", ("WideResNet-10-1", "backbone.", "classifier.")),
        ("wrn_linear", ("WideResNet-10-1", "backbone.", "classifier.fc.")),
        ("wrn_lws", ("WideResNet-10-1", "backbone.", "classifier.fc.")),
        ("wrn_fc", ("WideResNet-10-1", "", "fc.")),
        ("resnet18", ("ResNet-18", "", "linear.")),
        ("preact", ("PreActResNet-18", "", "linear.")),
        ("resnet20", ("ResNet-20 with shortcut A", "", "linear.")),
        ("resnet32_b", ("ResNet-32 with shortcut B", "", "linear.")),
        ("deepmind", ("DeepMind WideResNet-10-1", "", "logits.")),
        ("deepmind_cosine", ("DeepMind WideResNet-16-2", "backbone.", "classifier.")),
        ("small_cnn", ("network that is neither WideResNet nor ResNet", "backbone.", "classifier.")),
    ],
)
def test_architecture(name, expected):
    network, prefixes = NETWORKS[name]
    like, filled, state = random_state(network, prefixes)
    found = pytorch.architecture(pytorch.shapes(state))
    assert (found.name, found.backbone, found.last_layer, found.num_classes) == (*expected, 3)
    imported = pytorch.from_state_dict(state, *like, found.prefixes(*like))
    jax.tree.map(np.testing.assert_array_equal, imported, filled)


@pytest.mark.parametrize(("depth", "widen"), [(16, 2), (28, 10), (34, 10)])
def test_depth_and_width(depth, widen):
    network = models.Network(models.WideResNet(depth, widen), classifiers.LinearHead(100))
    found = pytorch.architecture(pytorch.torch_shapes(*shapes(network)))
    assert found.name == f"WideResNet-{depth}-{widen}"
    assert found.model == {"name": "wide_resnet", "depth": depth, "widen": widen}
    assert found.num_classes == 100


def named(model, num_classes=10):
    """What ``architecture`` finds in a network with this section config.model."""
    options = dict(model)
    network = models.Network(
        models.BACKBONES[options.pop("name")](**options), classifiers.LinearHead(num_classes)
    )
    return pytorch.architecture(pytorch.torch_shapes(*shapes(network)))


W28 = {"name": "wide_resnet", "depth": 28, "widen": 10}
R50 = {"name": "resnet50", "stem": "imagenet"}
R20 = {"name": "resnet20", "shortcut": "A"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("weights", "config", "message"),
    [
        (
            W28,
            W28 | {"depth": 34},
            r"of a WideResNet-28-10, .* says WideResNet-34-10; set config\.model\.depth=28$",
        ),
        (W28, W28 | {"depth": 10, "widen": 1}, r"set config\.model\.depth=28 and config\.model\.widen=10$"),
        (
            {"name": "resnet18"},
            W28,
            r"of a ResNet-18, .*set config\.model = ConfigDict\(\{'name': 'resnet18'\}\) in",
        ),
        (
            R50 | {"stem": "small"},
            R50,
            r"of a small ResNet-50, .* says ResNet-50; set config\.model\.stem=small$",
        ),
        (
            R20 | {"shortcut": "B"},
            R20,
            r"ResNet-20 with shortcut B, .* with shortcut A; set config\.model\.shortcut=B$",
        ),
        (R20, R20 | {"name": "resnet32"}, r"set config\.model = ConfigDict\(\{'name': 'resnet20', 'shor"),
        ({"name": "preact_resnet18"}, {"name": "resnet18"}, r"of a PreActResNet-18, .* says ResNet-18; set"),
        (W28, W28 | {"name": "deepmind_wide_resnet"}, r"of a WideResNet-28-10, .* DeepMind WideResNet-28-10"),
        (
            W28 | {"name": "deepmind_wide_resnet", "depth": 70, "widen": 16},
            W28 | {"name": "deepmind_wide_resnet"},
            r"of a DeepMind WideResNet-70-16, .*; set config\.model\.depth=70 and config\.model\.widen=16$",
        ),
        (
            {"name": "small_cnn"},
            W28,
            r"of a network that is neither WideResNet nor .*; use a config with that network",
        ),
    ],
)
def test_weights_of_another_network(weights, config, message):
    refused(message, pytorch.check_architecture, named(weights), named(config))
    pytorch.check_architecture(named(weights), named(weights))


def test_weights_for_another_number_of_classes():
    model = {"name": "resnet18"}
    message = (
        r"weights are for 100 classes, the config's data have 10; choose another data set after the colon"
    )
    refused(message, pytorch.check_architecture, named(model, 100), named(model, 10))


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        (
            {"layer1.2.conv1.weight": (64, 64, 3, 3)},
            r"ResNet with stages of [3, 2, 2, 2] blocks and stem [3, 3]",
        ),
        ({"conv1.weight": (64, 3, 7, 7)}, r"ResNet with stages of [2, 2, 2, 2] blocks and stem [7, 7]"),
        ({"bn1.weight": None}, r"pre-activation ResNet with stages of [2, 2, 2, 2] blocks and stem [3, 3]"),
    ],
)
def test_relatives_of_resnet18_are_told_apart(changes, name):
    found = pytorch.shapes(random_state(*NETWORKS["resnet18"])[2]) | changes
    found = {key: shape for key, shape in found.items() if shape is not None}
    assert pytorch.architecture(found)[:2] == (name, {})


@pytest.mark.slow
@pytest.mark.parametrize(("stem", "name"), [("imagenet", "ResNet-50"), ("small", "small ResNet-50")])
def test_resnet50_has_torchvisions_names_and_is_told_apart(stem, name):
    network = models.Network(models.ResNet50(stem=stem), classifiers.LinearHead(3))
    found = pytorch.torch_shapes(*shapes(network), {"backbone.": "", "classifier.": "fc."})
    names = {"layer1.0.downsample.1.running_mean": (256,), "layer3.5.conv2.weight": (256, 256, 3, 3)}
    assert names.items() <= found.items()
    assert pytorch.architecture(found) == (name, {"name": "resnet50", "stem": stem}, 3, "", "fc.")
    for change in (
        {"layer1.0.conv3.weight": (256, 128, 1, 1)},  # twice as wide, or grouped
        {"layer1.0.conv3.weight": ()},  # ResNet-34 has none
        {"layer3.6.conv1.weight": (256, 1024, 1, 1)},
    ):
        relative = pytorch.architecture(found | change)
        assert re.match(r"ResNet with stages of \[3, 4, [67], 3\] blocks", relative.name)
        assert not relative.model


def test_relatives_of_wide_resnet_are_told_apart():
    found = pytorch.shapes(random_state(*NETWORKS["wrn_fc"])[2])
    more = found | {"block2.layer.1.conv1.weight": (32, 32, 3, 3)}
    assert pytorch.architecture(more).name == "wide ResNet with stages of [1, 2, 1] blocks and width 16"


def test_no_last_layer():
    found = pytorch.shapes(random_state(*NETWORKS["wrn_bare"])[2])
    refused(r"has no last layer: .*; rename .* one of classifier\.fc\.,", pytorch.architecture, found)


# ---------------------------------------------------------------- files


@pytest.fixture
def safetensors():
    return pytest.importorskip("safetensors.numpy")


STATE = {"conv1.weight": np.ones((2, 3), np.float32), "bn1.bias": np.arange(2.0, dtype=np.float32)}


def pretend(monkeypatch, content):
    """Any ``.pt`` file is read as this."""
    monkeypatch.setattr(files, "read_torch", lambda path: content)


def some_file(folder, name="x.pt"):
    (folder / name).write_bytes(b"hello world, no weights")
    return folder / name


def wrapped(prefix):
    return {f"{prefix}{name}": value for name, value in STATE.items()}


@pytest.mark.parametrize(
    "content",
    [
        STATE,
        wrapped("module."),
        wrapped("model.module."),  # how RoBal's released code saves
        wrapped("_orig_mod."),  # torch.compile
        wrapped("module.module.module."),
        {"params_ema": wrapped("model._orig_mod.module.")},
        {"state_dict": STATE, "epoch": 3},
        {"net": wrapped("module."), "optimizer": {"state": {0: {"momentum_buffer": STATE["bn1.bias"]}}}},
        {"a": {"model_state_dict": collections.OrderedDict(STATE)}, "best": np.ones(())},
    ],
)
def test_nesting_and_wrappers(monkeypatch, tmp_path, content):
    pretend(monkeypatch, content)
    assert pytorch.read_weights(some_file(tmp_path)).items() == STATE.items()


@pytest.mark.parametrize(
    ("prefix", "buffers"),
    [
        ("module.", {"n_averaged": np.array(3)}),  # AveragedModel
        ("module.module.", {"n_averaged": np.array(3)}),
        ("module._orig_mod.", {"n_averaged": np.array(0), "module.num_batches_tracked": np.array(1)}),
        (
            "1.",
            {"0.mean": np.full(3, 0.5), "0.std": np.ones(3)},
        ),  # Sequential of a normalisation and a network
        ("net.", {"mean": np.zeros((1, 3, 1, 1)), "std": np.ones((1, 3, 1, 1))}),
        ("module.", {"module.mu": np.zeros((1, 3, 1, 1)), "module.sigma": np.ones((1, 3, 1, 1))}),
        ("module.net.", {"module.normalize.mean": np.zeros(3), "n_averaged": np.array(1)}),
    ],
)
@pytest.mark.parametrize("nested", [False, True])
def test_what_a_wrapper_has_beside_the_network(monkeypatch, tmp_path, prefix, buffers, nested):
    content = wrapped(prefix) | buffers
    pretend(monkeypatch, {"model_state": content, "epoch": 3} if nested else content)
    found = pytorch.read_weights(some_file(tmp_path))
    assert len(found) == len(STATE) + len(buffers)
    assert all(np.array_equal(found[name], value) for name, value in STATE.items())


def test_a_network_that_standardises_its_images():
    like, _, state = random_state(*NETWORKS["wrn"])
    buffers = {"n_averaged": np.array(5), "normalize.mean": np.zeros(3), "normalize.std": np.ones(3)}
    pytorch.from_state_dict(state | buffers, *like)
    reasons = pytorch.ignored(state | buffers, pytorch.torch_shapes(*like)).values()
    assert {"n_averaged", "normalize.mean (all 0)", "normalize.std (all 1)"} < {*reasons}
    buffers["normalize.std"] = np.full((3, 1, 1), 0.2471, np.float32)
    numbers = r"\(normalize\.std = 0\.2471, 0\.2471, 0\.2471\)"
    message = rf"images otherwise than the config {numbers}; set config\.model\.mean and config\.model\.std"
    refused(message, pytorch.from_state_dict, state | buffers, *like)
    given = {"mean": (), "std": (0.2471,) * 3}
    pytorch.from_state_dict(state | buffers, *like, standardisation=given)
    reasons = pytorch.ignored(state | buffers, pytorch.torch_shapes(*like), given).values()
    assert {"normalize.mean (all 0)", "normalize.std (as in the config)"} < {*reasons}
    for other in ((0.2471, 0.2471, 0.2472), (0.2471,), (1.0,) * 3):
        refused(
            r"\(normalize\.std = 0\.2471",
            pytorch.from_state_dict,
            state | buffers,
            *like,
            standardisation={"std": other},
        )
    renamed = state | {"mu": np.zeros((1, 3, 1, 1)), "sigma": buffers["normalize.std"]}
    pytorch.from_state_dict(renamed, *like, standardisation=given)
    refused(r"\(sigma = 0\.2471", pytorch.from_state_dict, renamed, *like)


def test_several_state_dicts(monkeypatch, tmp_path):
    other = {name: -value for name, value in STATE.items()}
    pretend(monkeypatch, {"model": STATE, "ema": {"model": other}})
    path = some_file(tmp_path)
    refused(r"several state_dicts: model, ema\.model; choose .*entry=model$", pytorch.read_weights, path)
    assert pytorch.read_weights(path, "ema.model").items() == other.items()
    refused(r"no state_dict 'x' in .*x\.pt, which holds model, ema;", pytorch.read_weights, path, "x")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            {"epoch": 3, "lr": 0.1},
            r"no state_dict \(a mapping of names to tensors\) in .*, which holds epoch, lr;",
        ),
        ([1, 2], "which holds <class 'list'>;"),
    ],
)
def test_no_state_dict(monkeypatch, tmp_path, content, message):
    pretend(monkeypatch, content)
    refused(message, pytorch.read_weights, some_file(tmp_path))


@pytest.mark.parametrize("name", ["fc.weight", "a.b.weight"])
def test_a_single_array(monkeypatch, tmp_path, name):
    pretend(monkeypatch, {name: np.ones((2, 2))})
    assert list(pytorch.read_weights(some_file(tmp_path))) == ["weight"]


def test_no_file(tmp_path):
    refused("no file .*x.pt; correct the name of the weights' file", pytorch.read_weights, tmp_path / "x.pt")


def test_without_pytorch(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "torch", None)
    refused(
        r"needs PyTorch; pip install 'robal_jax\[torch\]', or give a",
        pytorch.read_weights,
        some_file(tmp_path),
    )


def test_an_old_pytorch(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "torch", types.SimpleNamespace(__version__="2.5.1+cpu"))
    refused(r"PyTorch 2\.5\.1\+cpu does not read files safely", pytorch.read_weights, some_file(tmp_path))


def test_safetensors(safetensors, tmp_path):
    path = tmp_path / "x.safetensors"
    pytorch.write_weights(path, wrapped("module."), {"method": "AT"})
    read = pytorch.read_weights(path)
    assert read.keys() == STATE.keys()
    for name, value in STATE.items():
        np.testing.assert_array_equal(read[name], value, strict=True)
    refused("cannot write .*nowhere", pytorch.write_weights, tmp_path / "nowhere" / "x", STATE, {})
    damaged = some_file(tmp_path, "damaged.safetensors")
    refused(r"cannot read .*; give an undamaged \.safetensors file", pytorch.read_weights, damaged)


@pytest.mark.parametrize("name", ["x.pt", "x.bin", "X.SAFETENSORS", "x"])
def test_safetensors_of_any_name(safetensors, tmp_path, name):
    pytorch.write_weights(tmp_path / name, STATE, {})
    assert pytorch.read_weights(tmp_path / name).keys() == STATE.keys()


def test_bfloat16_becomes_float32(safetensors, tmp_path):
    value = jax.numpy.arange(3, dtype=jax.numpy.bfloat16) / 3
    safetensors.save_file({"a.weight": np.asarray(value), "b": np.zeros(2)}, tmp_path / "x.safetensors")
    read = pytorch.read_weights(tmp_path / "x.safetensors")
    np.testing.assert_array_equal(read["a.weight"], np.asarray(value, np.float32), strict=True)


def test_a_malicious_pickle_is_not_executed(tmp_path):
    torch = pytest.importorskip("torch")

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)

    pickle.loads(pickle.dumps(Evil()))
    assert (tmp_path / "executed").exists()
    (tmp_path / "executed").rmdir()
    tensors = {name: torch.from_numpy(value) for name, value in STATE.items()}
    torch.save({"state_dict": tensors, "args": Evil()}, tmp_path / "zip.pt")
    torch.save(Evil(), tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    for name in ("zip.pt", "old.pt"):
        message = refused("executing code", pytorch.read_weights, tmp_path / name)
        assert re.search(r"contains \w+\.mkdir, which can only be loaded", message)
    (tmp_path / "bare.pt").write_bytes(pickle.dumps(Evil()))
    refused("bare.pt", pytorch.read_weights, tmp_path / "bare.pt")
    assert not (tmp_path / "executed").exists()


def test_pt_files(tmp_path):
    torch = pytest.importorskip("torch")
    tensors = {f"module.{name}": torch.from_numpy(value) for name, value in STATE.items()}
    tensors["module.half.weight"] = torch.ones(2, dtype=torch.bfloat16)
    for name, new in (("new.pt", True), ("old.pth", False)):
        content = {"model": tensors, "epoch": 3, "scalars": [1.0, 2.0]}
        torch.save(content, tmp_path / name, _use_new_zipfile_serialization=new)
        read = pytorch.read_weights(tmp_path / name)
        assert {name: array.dtype for name, array in read.items()} == dict.fromkeys(read, np.float32)
        np.testing.assert_array_equal(read["bn1.bias"], STATE["bn1.bias"])
    torch.save(torch.nn.Linear(2, 2), tmp_path / "module.pt")
    refused(
        r"contains torch\.nn\.modules.*was not loaded: if you trust",
        pytorch.read_weights,
        tmp_path / "module.pt",
    )
    torch.save({"fc.weight": torch.eye(2).to_sparse()}, tmp_path / "sparse.pt")
    refused(r"cannot read fc\.weight in .*store dense tensors", pytorch.read_weights, tmp_path / "sparse.pt")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "new.pt").read_bytes()[:500])
    refused("is damaged, or not all of a file; copy or", pytorch.read_weights, tmp_path / "cut.pt")
    (tmp_path / "cut.pth").write_bytes((tmp_path / "old.pth").read_bytes()[:500])
    for path in (tmp_path / "cut.pth", some_file(tmp_path, "text.pt")):
        refused(r"cannot read .*; give an undamaged file that torch\.save wrote", pytorch.read_weights, path)


# ---------------------------------------------------------------- the scripts


def write_network(folder, name, num_classes=10, **changes):
    """A file with the weights of one of ``NETWORKS``, but of 10 classes; returns it and its state_dict."""
    network, prefixes = NETWORKS[name]
    network = network.clone(classifier=network.classifier.clone(num_classes=num_classes))
    state = {
        key: np.ascontiguousarray(value)
        for key, value in random_state(network, prefixes, np.float32)[2].items()
    }
    state |= changes
    pytorch.write_weights(folder / "weights.safetensors", state, {})
    return folder / "weights.safetensors", state


def import_to(workdir, weights, *arguments, config=ROBAL):
    script("import_torch")(f"--weights={weights}", f"--config={config}", f"--workdir={workdir}", *arguments)


def export_from(workdir, *arguments):
    script("export_torch")(f"--workdir={workdir}", f"--out={workdir}/out.safetensors", *arguments)
    return pytorch.read_weights(workdir / "out.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "config", "naming", "beside"),
    [
        ("wrn", ROBAL, "released", {"classifier.bias": (10,)}),
        ("wrn_linear", AT, "released", {}),
        ("wrn_tde", f"{ROOT}/configs/tde.py:cifar10_lt", "released", {"classifier.bias": (10,)}),
        ("wrn_fc", AT, "bare", {}),
    ],
)
def test_import_and_export_keep_every_bit(safetensors, tmp_path, capsys, name, config, naming, beside):
    changes = {} if name != "wrn" else {"classifier.moving_ed": np.ones((1, 64), np.float32)}
    weights, state = write_network(tmp_path, name, **changes)
    import_to(tmp_path / "run", weights, *SMALL, config=config)
    printed = capsys.readouterr().out
    assert "a WideResNet-10-1, 10 classes\nimported " in printed
    assert (
        "1 moving_ed, 7 num_batches_tracked" if changes else "ignored: 7 num_batches_tracked\n"
    ) in printed
    assert f"evaluate it: python experiments/evaluate.py --workdir={tmp_path / 'run'}\n" in printed
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [
        "checkpoints",
        "config.json",
        "import.json",
    ]
    origin = json.loads((tmp_path / "run" / "import.json").read_text())
    assert origin["network"] == "WideResNet-10-1"
    assert len(origin["weights_sha256"]) == 64

    exported = export_from(tmp_path / "run", f"--naming={naming}")
    zeros = {key for key in exported if "num_batches" in key} | set(beside)
    assert exported.keys() - zeros == {key for key in state if "num_batches" not in key} - set(changes)
    for key, value in exported.items():
        np.testing.assert_array_equal(
            value, np.zeros_like(value) if key in zeros else state[key], strict=True
        )
    with safetensors.safe_open(tmp_path / "run" / "out.safetensors", "np") as file:
        metadata = file.metadata()
    sha256 = printed.partition("sha256 ")[2].splitlines()[0]
    assert metadata["checkpoint_sha256"] == sha256
    assert metadata["method"] == read_config(tmp_path / "run").method
    assert json.loads(metadata["config"])["model"]["depth"] == 10


@pytest.mark.slow
@pytest.mark.parametrize("data", ["digits_lt", "robal_jax.data.sources:load_digits_lt"])
def test_an_imported_state_has_the_form_of_a_trained_one(safetensors, tmp_path, data):
    config = cli.apply_overrides(
        cli.load_config(f"{ROOT}/configs/at.py:digits_lt"), [f"--config.data.name={data}"]
    )
    job = builder.training(config)
    trained = jax.jit(functools.partial(initial_state, job))()
    state = pytorch.complete_state_dict(trained.params, trained.stats)
    pytorch.write_weights(tmp_path / "weights.safetensors", state, {})
    arguments = f"--config.data.name={data}"
    import_to(tmp_path, tmp_path / "weights.safetensors", arguments, config=f"{ROOT}/configs/at.py:digits_lt")
    imported, _ = checkpoints.restore(tmp_path / "checkpoints" / "0", trained)
    jax.tree.map(np.testing.assert_array_equal, imported, trained)
    assert not differences(config, read_config(tmp_path))


def test_weights_of_other_types_become_float32(safetensors, tmp_path):
    _, state = write_network(tmp_path, "wrn_fc")
    halves = {name: value.astype(np.float16) for name, value in state.items()}
    pytorch.write_weights(tmp_path / "half.safetensors", halves, {})
    import_to(tmp_path / "run", tmp_path / "half.safetensors", *SMALL, config=AT)
    exported = export_from(tmp_path / "run", "--naming=bare")
    np.testing.assert_array_equal(exported["fc.bias"], halves["fc.bias"].astype(np.float32), strict=True)


@pytest.mark.slow
def test_what_an_import_refuses(safetensors, tmp_path):
    weights, _ = write_network(tmp_path, "wrn")
    run = tmp_path / "run"
    message = r"weights are of a WideResNet-10-1, .*set config\.model\.depth=10 and config\.model\.widen=1$"
    refused(message, import_to, run, weights)
    missing = r"missing: classifier\.fc\.bias, classifier\.fc\.weight; unused: classifier\.weight\); check"
    refused(missing, import_to, run, weights, *SMALL, config=AT)
    refused("have 100", import_to, run, weights, *SMALL, config=f"{ROOT}/configs/at.py:cifar100_lt")
    refused("no file", import_to, run, tmp_path / "nothing.pt", *SMALL)
    refused("no state_dict 'ema'", import_to, run, weights, "--entry=ema", *SMALL)
    refused(r"config\.schedule\.lr is -1\.0", import_to, run, weights, "--config.schedule.lr=-1", *SMALL)
    assert not run.exists(), "something was written"
    refused("cannot write to workdir", import_to, weights / "run", weights, *SMALL)
    import_to(run, weights, *SMALL)
    refused("holds a run already; choose another workdir", import_to, run, weights, *SMALL)
    shutil.rmtree(run / "checkpoints")  # as after a kill, or on a full disk: the same command goes on
    import_to(run, weights, *SMALL)
    assert (run / "checkpoints" / "0").is_dir()
    for arguments in (
        ["--config=x", "--workdir=y"],
        ["--weights=x", "--workdir=y"],
        ["--config=x", "--weights=y"],
    ):
        with pytest.raises(InputError, match="is missing; usage: Import: python"):
            script("import_torch")(*arguments)


def test_a_bare_network_does_not_fit_a_cosine_head(safetensors, tmp_path):
    weights, _ = write_network(tmp_path, "wrn_fc")
    refused(r"\(unused: fc\.bias\)", import_to, tmp_path / "run", weights, *SMALL)


@pytest.mark.slow
def test_what_an_export_refuses(safetensors, tmp_path):
    weights, _ = write_network(tmp_path, "wrn")
    run = tmp_path / "run"
    import_to(run, weights, *SMALL)
    message = "bare is for a WideResNet, .* linear head; this run has a WideResNet-10-1 with head 'cosine'"
    refused(message, export_from, run, "--naming=bare")
    refused("unknown naming 'onnx'; use --naming=released or", export_from, run, "--naming=onnx")
    refused(r"--out is x\.pt; name a \.safetensors", script("export_torch"), f"--workdir={run}", "--out=x.pt")
    refused("no run in", export_from, tmp_path / "nothing")
    refused("no run or checkpoint", export_from, run, f"--checkpoint={tmp_path}/nothing")
    nowhere = f"--out={tmp_path}/nowhere/x.safetensors"
    refused("cannot write", script("export_torch"), f"--workdir={run}", nowhere)
    for argument in ("--workdir=x", "--out=x.safetensors"):
        with pytest.raises(InputError, match="is missing; usage: Export: python"):
            script("export_torch")(argument)


def test_export_of_a_named_checkpoint(safetensors, tmp_path):
    weights, state = write_network(tmp_path, "wrn")
    import_to(tmp_path / "run", weights, *SMALL)
    exported = export_from(tmp_path / "run", f"--checkpoint={tmp_path}/run/checkpoints/0")
    np.testing.assert_array_equal(exported["classifier.weight"], state["classifier.weight"])


# ---------------------------------------------------------------- logits

# Relative to the largest logit. Both sides round in float32 (6e-8) in up to 35 layers: each was seen to be
# 4e-7 to 1e-6 off the float64 logits, and they part by no more. A batch-norm epsilon of 2e-5 instead of 1e-5,
# the smallest mistake we could think of, shows at 1.2e-5 to 4e-5.
LOGITS = 1e-5

RESNET_CONFIG = """
from configs import at

def get_config(data):
    config = at.get_config(data)
    config.model = type(config)({"name": "resnet18"})
    return config
"""


def pytorch_network(name):
    """Network, a like one that gets what is exported, config, overrides and naming of the export."""
    nets = pytest.importorskip(
        "experiments.benchmarks.torch_networks", reason="needs PyTorch", exc_type=ImportError
    )
    if name == "resnet18":
        return nets.randomised(nets.ResNet18(10)), nets.ResNet18(10), None, (), "bare"
    if name == "wrn10_1_fc":
        return nets.randomised(nets.WideResNet(10, 1, 10)), nets.WideResNet(10, 1, 10), AT, SMALL, "bare"
    depth, widen, overrides = (34, 10, ()) if name == "wrn34_10" else (10, 1, SMALL)
    trained, plain = (
        nets.RoBal(nets.WideResNet(depth, widen), nets.CosineHead(64 * widen, 10, moving))
        for moving in (True, False)
    )
    return nets.randomised(trained), plain, ROBAL, overrides, "released"


@pytest.mark.parametrize(
    "name", ["wrn10_1", "wrn10_1_fc", "resnet18", pytest.param("wrn34_10", marks=pytest.mark.slow)]
)
def test_from_pytorch_and_back(safetensors, tmp_path, name):
    torch = pytest.importorskip("torch")
    network, target, config, overrides, naming = pytorch_network(name)
    if config is None:
        (tmp_path / "resnet.py").write_text(RESNET_CONFIG)
        config = f"{tmp_path}/resnet.py:cifar10_lt"
    torch.save(
        {"state_dict": torch.nn.DataParallel(network).state_dict(), "epoch": 80}, tmp_path / "epoch80.pt"
    )
    run = tmp_path / "run"
    import_to(run, tmp_path / "epoch80.pt", *overrides, config=config)

    images = (np.random.RandomState(1).randint(0, 256, (4, 32, 32, 3)) / 255).astype(np.float32)
    with torch.inference_mode():
        theirs = network(torch.from_numpy(np.moveaxis(images, -1, 1).copy())).numpy()
    arrays, *_ = checkpoints.read_latest(run)
    model = builder.model(read_config(run), np.ones(10, int), platform="cpu", precision="highest")
    ours = np.asarray(jax.jit(model.predict)(arrays["params"], arrays["stats"], images))
    error = np.abs(ours - theirs).max() / np.abs(theirs).max()
    print(f"{name}: largest logit {np.abs(theirs).max():.3g}, largest relative difference {error:.1e}")
    assert error <= LOGITS

    exported = export_from(run, f"--naming={naming}")
    target.load_state_dict({key: torch.from_numpy(value) for key, value in exported.items()}, strict=True)
    before = network.state_dict()
    for key, value in target.state_dict().items():
        assert torch.equal(value, before[key]), key
    with torch.inference_mode():
        again = target.eval()(torch.from_numpy(np.moveaxis(images, -1, 1).copy())).numpy()
    np.testing.assert_array_equal(again, theirs)
