"""Names, layouts and messages of the import from PyTorch; the numbers are test_parity's business."""

import jax
import numpy as np
import pytest

from robal_jax import models, torch_import
from robal_jax.classifiers import CosineHead, LinearHead
from robal_jax.errors import InputError

WRN = models.WideResNet(depth=10, widen=1)
RESNET_PREFIXES = {"backbone.": "", "classifier.": "linear."}
NETWORKS = {
    "wrn": (models.Network(WRN, CosineHead(3)), None),
    "wrn_linear": (models.Network(WRN, LinearHead(3)), None),
    "wrn_bare": (WRN, None),
    "resnet18": (models.Network(models.ResNet18(), LinearHead(3)), RESNET_PREFIXES),
}


def shapes(network):
    images = jax.ShapeDtypeStruct((1, 32, 32, 3), np.float32)
    return jax.eval_shape(models.functional(network).init, jax.random.key(0), images)


def random_state(network, prefixes):
    """Like-trees and a float64 state_dict for them with all that a released one has beside."""
    like = shapes(network)
    r = np.random.RandomState(0)
    filled = jax.tree.map(lambda s: r.standard_normal(s.shape), like)
    state = torch_import.to_state_dict(*filled, prefixes)
    extra = {name.replace("running_mean", "num_batches_tracked"): np.array(1) for name in state}
    return like, filled, {**extra, **state}


@pytest.mark.parametrize("name", NETWORKS)
def test_round_trip(name):
    network, prefixes = NETWORKS[name]
    like, filled, state = random_state(network, prefixes)
    imported = torch_import.from_state_dict(state, *like, prefixes)
    assert all(leaf.dtype == np.float64 for leaf in jax.tree.leaves(imported))
    jax.tree.map(np.testing.assert_array_equal, imported, filled)


@pytest.mark.parametrize(
    ("network", "names"),
    [
        ("wrn", {"backbone.block1.layer.0.bn1.running_var": (16,), "classifier.weight": (3, 64)}),
        ("wrn_linear", {"classifier.fc.weight": (3, 64), "classifier.fc.bias": (3,)}),
        ("wrn_bare", {"block2.layer.0.convShortcut.weight": (32, 16, 1, 1), "conv1.weight": (16, 3, 3, 3)}),
        ("resnet18", {"layer2.0.shortcut.1.weight": (128,), "linear.weight": (3, 512)}),
    ],
)
def test_names_and_layouts_are_pytorchs(network, names):
    _, _, state = random_state(*NETWORKS[network])
    assert {name: state[name].shape for name in names} == names


def test_convolution_layout():
    _, filled, state = random_state(*NETWORKS["wrn_bare"])
    kernel = filled[0]["conv1"]["kernel"]
    assert state["conv1.weight"][5, 2, 1, 0] == kernel[1, 0, 2, 5]


def test_what_a_cosine_head_has_beside_is_ignored():
    like, _, state = random_state(*NETWORKS["wrn"])
    state |= {"classifier.bias": np.zeros(3), "classifier.moving_ed": np.ones((1, 64))}
    torch_import.from_state_dict(state, *like)
    with pytest.raises(InputError, match=r"unused: classifier\.bias"):
        torch_import.from_state_dict(state | {"classifier.bias": np.ones(3)}, *like)


def test_a_prefix_of_a_wrapper():
    like, filled, state = random_state(*NETWORKS["wrn"])
    wrapped = {f"module.{name}": value for name, value in state.items()}
    imported = torch_import.from_state_dict(wrapped, *like, {"": "module."})
    jax.tree.map(np.testing.assert_array_equal, imported, filled)


def test_message_lists_all_that_does_not_fit():
    like, _, state = random_state(*NETWORKS["wrn"])
    del state["backbone.bn1.bias"]
    state["surplus.weight"] = np.zeros(2)
    state["backbone.conv1.weight"] = np.zeros((3, 3, 3, 16))
    with pytest.raises(InputError) as error:
        torch_import.from_state_dict(state, *like)
    message = str(error.value)
    assert "missing: backbone.bn1.bias;" in message
    assert "unused: surplus.weight;" in message
    assert "of another shape: backbone.conv1.weight (3, 3, 3, 16) instead of (16, 3, 3, 3))" in message
    assert "\n" not in message
