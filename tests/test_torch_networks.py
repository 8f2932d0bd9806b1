"""Networks of follow-up work beside PyTorch modules of the same papers: sizes, logits, import and export.

Weights are made up. The tests with modules are skipped without PyTorch; ``test_torch_export`` has the same
networks in NumPy.
"""

import pathlib

import jax
import numpy as np
import pytest
from helpers import script

from robal_jax import builder, classifiers, models, pytorch
from robal_jax.errors import InputError
from robal_jax.storage import checkpoints
from robal_jax.storage.config_file import read_config

ROOT = pathlib.Path(__file__).resolve().parents[1]

# Relative to the largest logit: rounding of float64 (1e-16) and of float32 (6e-8) in up to 32 layers.
CLOSE = {np.float64: 1e-13, np.float32: 1e-5}

NETWORKS = {  # config.model, class of the PyTorch module and its arguments, parameters with ten classes
    "preact_resnet18": ({"name": "preact_resnet18"}, "PreActResNet18", {}, 11_172_170),
    "resnet20": ({"name": "resnet20"}, "CifarResNet", {"depth": 20, "shortcut": "A"}, 269_722),
    "resnet20_b": (
        {"name": "resnet20", "shortcut": "B"},
        "CifarResNet",
        {"depth": 20, "shortcut": "B"},
        272_474,
    ),
    "resnet32": ({"name": "resnet32"}, "CifarResNet", {"depth": 32, "shortcut": "A"}, 464_154),
    "resnet32_b": (
        {"name": "resnet32", "shortcut": "B"},
        "CifarResNet",
        {"depth": 32, "shortcut": "B"},
        466_906,
    ),
    **{
        f"deepmind_wrn_{depth}_{widen}": (
            {"name": "deepmind_wide_resnet", "depth": depth, "widen": widen},
            "DeepMindWideResNet",
            {"depth": depth, "widen": widen},
            size,
        )
        for depth, widen, size in ((10, 1, 77_850), (28, 10, 36_479_194), (70, 16, 266_796_506))
    },
}
SMALL = ("preact_resnet18", "resnet20", "resnet20_b", "resnet32", "resnet32_b", "deepmind_wrn_10_1")


@pytest.fixture
def twins():
    pytest.importorskip("torch")
    return pytest.importorskip("twins", reason="needs PyTorch", exc_type=ImportError)


def model_of(section):
    options = dict(section)
    backbone = models.BACKBONES[options.pop("name")](**options)
    return models.functional(models.Network(backbone, classifiers.LinearHead(10)), precision="highest")


def like_of(section):
    images = jax.ShapeDtypeStruct((1, 32, 32, 3), np.float32)
    return jax.eval_shape(model_of(section).init, jax.random.key(0), images)


def twin(twins, name, dtype=np.float32):
    nets = pytest.importorskip("experiments.benchmarks.torch_networks")
    _, made, options, _ = NETWORKS[name]
    network = nets.randomised(getattr(twins, made)(**options))
    return network.double() if dtype == np.float64 else network


def theirs_and_images(network, dtype=np.float32, pixels=32):
    torch = pytest.importorskip("torch")
    images = np.random.RandomState(1).randint(0, 256, (2, pixels, pixels, 3)) / dtype(255)
    with torch.inference_mode():
        logits = network(torch.from_numpy(np.moveaxis(images.astype(dtype), -1, 1).copy()))
    return logits.numpy(), images.astype(dtype)


def agree(found, expected, dtype):
    difference = np.abs(found - expected).max() / np.abs(expected).max()
    print(f"largest difference of logits, relative to the largest logit: {difference:.1e}")
    assert difference <= CLOSE[dtype]


# ---------------------------------------------------------------- sizes, names and shapes


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_sizes(name):
    section, _, _, size = NETWORKS[name]
    params, _ = like_of(section)
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == size


@pytest.mark.parametrize("name", NETWORKS)
def test_names_and_shapes_are_those_of_the_modules(twins, name):
    torch = pytest.importorskip("torch")
    section, made, options, size = NETWORKS[name]
    with torch.device("meta"):
        network = getattr(twins, made)(**options)
    assert sum(parameter.numel() for parameter in network.parameters()) == size
    theirs = {key: tuple(value.shape) for key, value in network.state_dict().items()}
    found, like = pytorch.architecture(theirs), like_of(section)
    assert found.model.items() >= section.items()
    expected = {k: v for k, v in theirs.items() if not k.endswith("tracked") and k not in ("mean", "std")}
    assert pytorch.torch_shapes(*like, found.prefixes(*like)) == expected
    ours = pytorch.architecture(pytorch.torch_shapes(*like))
    pytorch.check_architecture(found, ours)
    assert ours.name == found.name


def test_the_form_without_batch_norm_before_pooling(twins):
    network = twins.PreActResNet18(final=False)
    assert sum(parameter.numel() for parameter in network.parameters()) == 11_171_146
    theirs = {key: tuple(value.shape) for key, value in network.state_dict().items()}
    found = pytorch.architecture(theirs)
    assert found[:2] == ("pre-activation ResNet with stages of [2, 2, 2, 2] blocks and stem [3, 3]", {})


# ---------------------------------------------------------------- logits


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("pixels", [16, pytest.param(32, marks=pytest.mark.slow)])
def test_logits(twins, name, pixels):
    """One operation after the other; float64."""
    with jax.enable_x64(True):
        check_logits(twins, name, pixels)


def check_logits(twins, name, pixels):
    network = twin(twins, name, np.float64)
    expected, images = theirs_and_images(network, np.float64, pixels)
    state = {key: value.numpy() for key, value in network.state_dict().items()}
    # The buffers of the module are rounded to float32.
    numbers = {key: state[key].ravel().tolist() for key in ("mean", "std") if key in state}
    model = model_of(NETWORKS[name][0] | numbers)
    like = jax.eval_shape(model.init, jax.random.key(0), images)
    prefixes = pytorch.architecture(pytorch.shapes(state)).prefixes(*like)
    params, stats = pytorch.from_state_dict(state, *like, prefixes, numbers)
    with jax.disable_jit():
        agree(np.asarray(model.predict(params, stats, images)), expected, np.float64)


# ---------------------------------------------------------------- import and export


CONFIG = """
from configs import at

def get_config(data):
    config = at.get_config(data)
    config.model = type(config)({})
    return config
"""


def import_to(folder, section, content, run="run"):
    torch = pytest.importorskip("torch")
    torch.save(content, folder / "weights.pt")
    (folder / "own.py").write_text(CONFIG.format(section))
    script("import_torch")(
        f"--weights={folder}/weights.pt", f"--config={folder}/own.py:cifar10_lt", f"--workdir={folder}/{run}"
    )
    return folder / run


def wrapped(state):
    return {f"module.{key}": value for key, value in state.items()}


WRAPPERS = {
    "preact_resnet18": lambda state: {"state_dict": wrapped(state), "epoch": 200},
    "resnet20": lambda state: state,
    "resnet32_b": lambda state: {"model_state_dict": wrapped(state)},
    "deepmind_wrn_10_1": lambda state: {"model_state_dict": wrapped(state)},
}


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=pytest.mark.slow if n.startswith("preact") else ()) for n in WRAPPERS],
)
def test_import_and_export(twins, tmp_path, name):
    torch = pytest.importorskip("torch")
    safetensors = pytest.importorskip("safetensors.torch")
    section, made, options, _ = NETWORKS[name]
    network = twin(twins, name)
    expected, images = theirs_and_images(network)
    run = import_to(tmp_path, section, WRAPPERS[name](network.state_dict()))
    arrays, *_ = checkpoints.read_latest(run)
    model = builder.model(read_config(run), np.ones(10, int), platform="gpu", precision="highest")
    with jax.disable_jit():
        agree(np.asarray(model.predict(arrays["params"], arrays["stats"], images)), expected, np.float32)

    script("export_torch")(f"--workdir={run}", f"--out={run}/out.safetensors", "--naming=bare")
    target = getattr(twins, made)(**options).eval()
    target.load_state_dict(safetensors.load_file(run / "out.safetensors"), strict=True)
    again, _ = theirs_and_images(target)
    np.testing.assert_array_equal(again, expected)
    for key, value in network.state_dict().items():
        assert key.endswith("tracked") or torch.equal(value, target.state_dict()[key]), key


def test_images_are_standardised_as_buffers_of_another_name_say(twins, tmp_path):
    """RobustBench's networks that are no WideResNet of DeepMind's have ``mu`` and ``sigma``."""
    torch = pytest.importorskip("torch")
    network = twin(twins, "resnet20")
    mu, sigma = torch.tensor((0.5, 0.25, 0.75)).reshape(1, 3, 1, 1), torch.full((1, 3, 1, 1), 0.25)
    expected, images = theirs_and_images(lambda x: network((x - mu) / sigma))
    section = {"name": "resnet20", "mean": (0.5, 0.25, 0.75), "std": (0.25,) * 3}
    run = import_to(tmp_path, section, network.state_dict() | {"mu": mu, "sigma": sigma})
    arrays, *_ = checkpoints.read_latest(run)
    model = builder.model(read_config(run), np.ones(10, int), platform="gpu", precision="highest")
    with jax.disable_jit():
        agree(np.asarray(model.predict(arrays["params"], arrays["stats"], images)), expected, np.float32)


def test_deepminds_own_files_have_no_buffers(twins, tmp_path):
    network = twins.DeepMindWideResNet(10, 1, buffers=False)
    import_to(tmp_path, NETWORKS["deepmind_wrn_10_1"][0], network.state_dict())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"mean": (0.5071, 0.4865, 0.4409)},
            r"otherwise than the config \(mean = 0\.4914, 0\.4822, 0\.4465\); set config\.model\.mean",
        ),
        ({"mean": (), "std": ()}, r"otherwise .* \(mean = 0\.4914, .*; std = 0\.2471, 0\.2435, 0\.2616\);"),
        (
            {"name": "wide_resnet"},
            r"of a DeepMind WideResNet-10-1, the config says WideResNet-10-1; set config\.model = ConfigDict",
        ),
        (
            {"depth": 16},
            r"DeepMind WideResNet-10-1, .* DeepMind WideResNet-16-1; set config\.model\.depth=10",
        ),
        ({"std": (1, 0, 1)}, r"std is \(1, 0, 1\); give finite numbers > 0, one per channel"),
        ({"mean": (0.5,)}, r"mean has 1 numbers, std 3; give one per channel in each"),
        ({"mean": (0.5,), "std": ()}, r"mean or std has 1 numbers, but images have 3 channels; give one"),
        ({"activation": "gelu"}, r"unknown activation 'gelu'; use one of relu, silu"),
        ({"layout": "jax"}, r"unknown layout 'jax'; use one of released, deepmind"),
    ],
    ids=lambda value: "" if isinstance(value, str) else "-".join(value),
)
def test_what_an_import_refuses(tmp_path, changes, message):
    section = NETWORKS["deepmind_wrn_10_1"][0]
    params, stats = like_of(section)
    numbers = {"mean": models.CIFAR10_MEAN, "std": models.CIFAR10_STD}
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), (params, stats))
    state = pytorch.complete_state_dict(*zeros, {"backbone.": "", "classifier.": "logits."}, numbers)
    pytest.importorskip("safetensors")
    pytorch.write_weights(tmp_path / "weights.safetensors", state, {})
    (tmp_path / "own.py").write_text(CONFIG.format(section | changes))
    with pytest.raises(InputError, match=message) as raised:
        script("import_torch")(
            f"--weights={tmp_path}/weights.safetensors",
            f"--config={tmp_path}/own.py:cifar10_lt",
            f"--workdir={tmp_path}/run",
        )
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "run").exists()
