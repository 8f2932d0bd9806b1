"""An exported network computes the same in PyTorch: a forward pass from the file's names and shapes alone.

It is made twice: in NumPy (``nchw``), and of PyTorch's own modules where PyTorch is installed.
"""

import json
import pathlib

import flax.linen as nn
import jax
import nchw
import numpy as np
import pytest
from helpers import script

from robal_jax import builder, classifiers, cli, models, pytorch
from robal_jax.errors import InputError
from robal_jax.storage import checkpoints, config_file
from robal_jax.storage.names import CHECKPOINTS, CONFIG
from robal_jax.training import TrainState

ROOT = pathlib.Path(__file__).resolve().parents[1]

# Relative to the largest number; float32 rounds in up to 50 layers.
CLOSE = 1e-5

NETWORKS = {
    "small_cnn": (models.SmallCNN(), (8, 8, 1)),
    "small_cnn_wide": (models.SmallCNN((4, 12, 20), 24), (12, 20, 3)),
    "small_cnn_deep": (models.SmallCNN((4, 8, 6, 10), 16), (28, 28, 1)),
    "wrn10_1": (models.WideResNet(10, 1), (8, 8, 3)),
    "wrn16_2": (models.WideResNet(16, 2), (8, 12, 3)),
    "resnet18": (models.ResNet18(), (8, 8, 3)),
    "resnet50_small": (models.ResNet50(stem="small"), (8, 8, 3)),
    "resnet50": (models.ResNet50(), (32, 32, 3)),
    "preact_resnet18": (models.PreActResNet18(), (8, 8, 3)),
    "resnet20": (models.ResNet20(), (8, 8, 3)),
    "resnet20_b": (models.ResNet20(shortcut="B", mean=(0.5,), std=(0.25,)), (8, 6, 1)),
    "resnet32": (models.ResNet32(), (8, 8, 3)),
    "deepmind_wrn10_1": (models.DeepMindWideResNet(10, 1), (8, 12, 3)),
}
SLOW = ("resnet18", "resnet50")  # in NumPy


def filled(like, seed=0):
    """Weights of the size that training gives them, so that no layer's output vanishes or explodes."""
    r = np.random.default_rng(seed)

    def draw(path, leaf):
        name, shape = path[-1].key, leaf.shape
        if name in ("var", "scale"):
            return r.uniform(0.5, 1.5, shape).astype(np.float32)
        fan_in = np.prod(shape[:-1]) if name == "kernel" else shape[-1]
        return (r.standard_normal(shape) / np.sqrt(fan_in)).astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, like)


def network_of(name):
    """Functions of a network with a linear head, its weights, and three images of its size."""
    backbone, size = NETWORKS[name]
    model = models.functional(models.Network(backbone, classifiers.LinearHead(5)), precision="highest")
    images = np.random.default_rng(1).random((3, *size), np.float32)
    params, stats = filled(jax.eval_shape(model.init, jax.random.key(0), images))
    return model, params, stats, images


def predictions(model, *arguments):
    """One operation after the other: a deep network takes long to compile, its few kinds of layers do not."""
    with jax.disable_jit():
        return np.asarray(model.predict(*arguments))


def prefixes_of(name, naming):
    if naming == "released":
        return None
    last = {"wrn": "fc.", "resnet50": "fc.", "deepmind": "logits."}
    return {"backbone.": "", "classifier.": last.get(name.partition("_")[0].rstrip("0126"), "linear.")}


def exported_state(name, params, stats, naming="released"):
    backbone, _ = NETWORKS[name]
    numbers = {"mean": backbone.mean, "std": backbone.std}
    return pytorch.complete_state_dict(params, stats, prefixes_of(name, naming), numbers)


def agree(found, expected):
    assert np.abs(found - expected).max() <= CLOSE * np.abs(expected).max()


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.slow if name.startswith(SLOW) else ()) for name in NETWORKS],
)
def test_numpy_computes_the_same_from_names_and_shapes(name):
    model, params, stats, images = network_of(name)
    expected = predictions(model, params, stats, images)
    for naming in ("released", *(["bare"] if not name.startswith("small") else [])):
        state = exported_state(name, params, stats, naming)
        found = nchw.logits(nchw.Arrays(state), pytorch.shapes(state), np.moveaxis(images, -1, 1))
        agree(found, expected)


@pytest.mark.slow
def test_the_comparison_can_fail():
    """The order (h, w, c) of our own weights is not PyTorch's."""
    model, params, stats, images = network_of("small_cnn")
    state = pytorch.complete_state_dict(params, stats)
    ours = state | {"backbone.fc.weight": params["backbone"]["fc"]["kernel"].T}
    expected = predictions(model, params, stats, images)
    found = nchw.logits(nchw.Arrays(ours), pytorch.shapes(ours), np.moveaxis(images, -1, 1))
    assert np.abs(found - expected).max() > 0.1 * np.abs(expected).max()


class Modules:
    """PyTorch's own modules by name, made from names and shapes; as strict as ``load_state_dict`` is."""

    def __init__(self, torch, shapes):
        self.torch, self.root = torch, torch.nn.Module()
        buffers = [name for name in shapes if name.endswith(("mean", "std")) and "running" not in name]
        for name in sorted({name.rpartition(".")[0] for name in shapes if name not in buffers}):
            shape = shapes[f"{name}.weight"]
            if f"{name}.running_mean" in shapes:
                made = torch.nn.BatchNorm2d(*shape)
            elif len(shape) == 4:
                outputs, inputs, size, _ = shape
                bias = f"{name}.bias" in shapes
                made = torch.nn.Conv2d(inputs, outputs, size, padding=size // 2, bias=bias)
            else:
                made = torch.nn.Linear(*reversed(shape), bias=f"{name}.bias" in shapes)
            parent = self.root
            *parts, last = name.split(".")
            for part in parts:
                if part not in dict(parent.named_children()):
                    parent.add_module(part, torch.nn.Module())
                parent = parent.get_submodule(part)
            parent.add_module(last, made)
        for name in buffers:
            prefix, _, last = name.rpartition(".")
            self.root.get_submodule(prefix).register_buffer(last, torch.empty(shapes[name]))

    def load(self, state):
        tensors = {name: self.torch.from_numpy(array) for name, array in state.items()}
        self.root.load_state_dict(tensors, strict=True)
        self.root.eval()
        return self

    def standardise(self, prefix, x):
        network = self.root.get_submodule(prefix.rstrip("."))
        return (x - network.mean) / network.std

    def conv(self, name, x, stride, same=False):
        module = self.root.get_submodule(name)
        module.stride = (stride, stride)
        if same and stride == 2:
            module.padding = (0, 0)
            x = self.torch.nn.functional.pad(x, (0, 1, 0, 1))
        return module(x)

    def norm(self, name, x):
        return self.root.get_submodule(name)(x)

    linear = norm

    def relu(self, x):
        return self.torch.nn.ReLU()(x)

    def silu(self, x):
        return self.torch.nn.SiLU()(x)

    def more_channels(self, x, before, after):
        return self.torch.nn.functional.pad(x, (0, 0, 0, 0, before, after))

    def max_pool(self, x):
        return self.torch.nn.MaxPool2d(3, 2, 1)(x)

    def mean(self, x):
        return self.torch.nn.Flatten()(self.torch.nn.AdaptiveAvgPool2d(1)(x))

    def flatten(self, x):
        return self.torch.nn.Flatten()(x)


@pytest.mark.parametrize("name", NETWORKS)
def test_pytorchs_modules_compute_the_same(name):
    torch = pytest.importorskip("torch")
    model, params, stats, images = network_of(name)
    state = exported_state(name, params, stats)
    modules = Modules(torch, pytorch.shapes(state)).load(state)
    with torch.inference_mode():
        x = torch.from_numpy(np.moveaxis(images, -1, 1).copy())
        found = nchw.logits(modules, pytorch.shapes(state), x).numpy()
    agree(found, predictions(model, params, stats, images))


# ---------------------------------------------------------------- the script's files


@pytest.fixture
def safetensors():
    return pytest.importorskip("safetensors.numpy")


def small_run(folder, method):
    """A run of the digits with drawn weights."""
    config = cli.load_config(f"{ROOT}/configs/{method}.py:digits_lt")
    model = builder.model(config, np.arange(10, 0, -1), platform="cpu", precision="highest")
    images = np.random.default_rng(1).random((6, 8, 8, 1), np.float32)
    params, stats = filled(jax.eval_shape(model.init, jax.random.key(0), images))
    folder.mkdir()
    (folder / CONFIG).write_text(config_file.to_json(config))
    with checkpoints.Saver(folder / CHECKPOINTS, 1) as saver:
        saver.save(1, TrainState(np.int32(1), params, stats, ()))
    return model, params, stats, images


def exported(run):
    script("export_torch")(f"--workdir={run}", f"--out={run}/out.safetensors")
    return run / "out.safetensors"


@pytest.mark.slow
@pytest.mark.parametrize("method", ["at", "robal_n", "tde"])
def test_the_exported_file_of_a_digits_run(safetensors, tmp_path, method):
    model, params, stats, images = small_run(tmp_path / "run", method)
    state = safetensors.load_file(exported(tmp_path / "run"))
    x, shapes = np.moveaxis(images, -1, 1), pytorch.shapes(state)
    agree(
        nchw.features(nchw.Arrays(state), shapes, x),
        np.asarray(jax.jit(model.features)(params, stats, images)),
    )
    if method == "at":
        agree(nchw.logits(nchw.Arrays(state), shapes, x), np.asarray(model.predict(params, stats, images)))


def reread(run, file, workdir):
    """Imports a file; returns the weights of the new run."""
    method = json.loads((run / CONFIG).read_text())["method"]
    config = {"AT": "at", "RoBal-N": "robal_n"}[method]
    script("import_torch")(
        f"--weights={file}", f"--config={ROOT}/configs/{config}.py:digits_lt", f"--workdir={workdir}"
    )
    tree = checkpoints.read_latest(workdir).tree
    return tree["params"], tree["stats"]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["at", "robal_n"])
def test_old_and_new_exports_are_imported_alike(safetensors, tmp_path, method):
    """Version 0.1.0 wrote the inputs of ``fc`` as (h, w, c), and no mark of the order."""
    _, params, stats, _ = small_run(tmp_path / "run", method)
    file = exported(tmp_path / "run")
    with safetensors.safe_open(file, "numpy") as content:
        metadata = content.metadata()
    old = safetensors.load_file(file)
    old["backbone.fc.weight"] = np.ascontiguousarray(params["backbone"]["fc"]["kernel"].T)
    safetensors.save_file(
        old, tmp_path / "old.safetensors", {k: v for k, v in metadata.items() if k != "flattened"}
    )
    for name, path in (("new", file), ("old", tmp_path / "old.safetensors")):
        found = reread(tmp_path / "run", path, tmp_path / name)
        for expected, array in zip(jax.tree.leaves((params, stats)), jax.tree.leaves(found), strict=True):
            np.testing.assert_array_equal(array, expected)


def test_a_wide_resnets_last_layer_of_an_old_export_is_left_alone(safetensors, tmp_path):
    state = {"conv1.weight": np.ones((2, 3, 3, 3)), "fc.weight": np.arange(24.0).reshape(3, 8)}
    safetensors.save_file(state, tmp_path / "x.safetensors", {"checkpoint_sha256": "0"})
    np.testing.assert_array_equal(
        pytorch.read_weights(tmp_path / "x.safetensors")["fc.weight"], state["fc.weight"]
    )


@pytest.mark.parametrize("size", [(8, 8, 1), (28, 28, 1), (12, 20, 3)])
def test_reordering_is_its_own_way_back(size):
    model = models.functional(models.Network(models.SmallCNN((3, 5, 7), 11), classifiers.CosineHead(4)))
    like = jax.eval_shape(model.init, jax.random.key(0), np.zeros((1, *size), np.float32))
    params, stats = filled(like)
    found = pytorch.from_state_dict(pytorch.to_state_dict(params, stats), *like)
    jax.tree.map(np.testing.assert_array_equal, found, (params, stats))


class Perceptron(nn.Module):
    """A backbone whose first layer reads a flattened image."""

    @nn.compact
    def __call__(self, x, train):
        return nn.Dense(4, param_dtype=float)(x.reshape(len(x), -1))


def test_a_linear_layer_of_unknown_order_is_refused():
    model = models.functional(models.Network(Perceptron(), classifiers.LinearHead(3)))
    params, stats = jax.eval_shape(model.init, jax.random.key(0), np.zeros((1, 2, 2, 3), np.float32))
    with pytest.raises(
        InputError, match=r"layer backbone/Dense_0 may read a flattened image.*; convert this"
    ):
        pytorch.torch_shapes(params, stats)
