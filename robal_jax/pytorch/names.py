"""Our variables from a PyTorch state_dict and back: names and layouts.

Our module names are those of PyTorch with ``_`` in place of ``.`` and ``__`` in place of ``_``; the name and
the layout of an array follow from its own name (``ARRAY_NAMES``, ``LAYOUTS``). The exceptions are prefixes:
of a network that is not in two parts (backbone and classifier), and of a head that wraps a linear layer
``fc``; see :func:`from_state_dict`. A linear layer that reads a flattened image has its inputs in the order
(h, w, c) here, and (c, h, w) in PyTorch.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import chex
import jax
import numpy as np
from flax import traverse_util

from robal_jax.errors import InputError

ARRAY_NAMES = {
    "kernel": "weight",
    "scale": "weight",
    "weight": "weight",
    "bias": "bias",
    "mean": "running_mean",
    "var": "running_var",
    "class_scale": "cla_scale",
    "direction": "moving_ed",
}

# Arrays whose layout differs: ours to PyTorch's, and back.
LAYOUTS: dict[str, tuple[Callable[[np.ndarray], np.ndarray], Callable[[np.ndarray], np.ndarray]]] = {
    # HWIO and OIHW; of a linear layer [in, out] and [out, in].
    "kernel": (lambda x: np.moveaxis(x, (-1, -2), (0, 1)), lambda x: np.moveaxis(x, (0, 1), (-1, -2))),
    "direction": (lambda x: x[None], lambda x: x.reshape(x.shape[-1:])),  # [D] and [1, D]
}

# Arrays of a state_dict that have no effect, unless our network has an array of that name. The counters of
# batch norm (at a fixed momentum) and of averaged weights do nothing, cosine heads only write moving_ed, and
# the WideResNet of TRADES does not call sub_block1.
IGNORED = ("num_batches_tracked", "n_averaged", "moving_ed", "sub_block1")

# Arrays that the released heads freeze at this value: ignored if they have it and our network lacks them.
FROZEN = {"classifier.bias": 0.0, "classifier.cla_scale": 1.0}

# Last parts of the names of buffers that standardise images, and the settings of a backbone that they are.
STANDARDISES = {"mean": "mean", "std": "std", "mu": "mean", "sigma": "std"}

# Values of these settings that change nothing.
NEUTRAL = {"mean": 0.0, "std": 1.0}

# Prefixes of the last layer's weight: of released linear heads, other released heads, WideResNet and
# ResNet-50, other ResNets, DeepMind's WideResNet.
LAST_LAYERS = ("classifier.fc.", "classifier.", "fc.", "linear.", "logits.")

Path = tuple[str, ...]

Shapes = Mapping[str, tuple[int, ...]]

Standardisation = Mapping[str, Sequence[float]]
"""The settings ``mean`` and ``std`` of a backbone, one number per channel; none or () for neutral ones."""


def released_prefixes(params: chex.ArrayTree, stats: chex.ArrayTree) -> dict[str, str]:
    """Returns the prefixes of released networks for :func:`from_state_dict`: a head with bias wraps ``fc``.

    Its class scales are outside of ``fc``.
    """
    if not any("bias" in tree.get("classifier", {}) for tree in (params, stats)):
        return {}
    return {f"classifier.{name}": f"classifier.fc.{name}" for name in ("weight", "bias")}


def torch_name(path: Path, prefixes: Mapping[str, str]) -> str:
    """Maps a path to PyTorch's name.

    Example:
      >>> torch_name(("backbone", "block1_layer_0", "bn1", "scale"), {})
      'backbone.block1.layer.0.bn1.weight'
      >>> torch_name(("backbone", "layer_0_block_1", "conv__0", "kernel"), {"backbone.": ""})
      'layer.0.block.1.conv_0.weight'
    """
    if path[-1] not in ARRAY_NAMES:
        raise InputError(f"{'/'.join(path)} has no name in PyTorch; use one of {', '.join(ARRAY_NAMES)}")
    modules = [re.sub("__?", lambda found: "._"[len(found[0]) - 1], module) for module in path[:-1]]
    name = ".".join([*modules, ARRAY_NAMES[path[-1]]])
    for ours, theirs in prefixes.items():
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    return name


def to_state_dict(
    params: chex.ArrayTree, stats: chex.ArrayTree, prefixes: Mapping[str, str] | None = None
) -> dict[str, np.ndarray]:
    """Inverts :func:`from_state_dict`; it also names gradients and moments, which have the same shapes.

    Args:
      params: trainable parameters.
      stats: running statistics; ``{}`` for none.
      prefixes: see :func:`from_state_dict`.

    Returns:
      Arrays by PyTorch name and in PyTorch's layout, without the arrays that only PyTorch has.
    """
    prefixes = released_prefixes(params, stats) if prefixes is None else prefixes
    flat = _flat(params, stats)
    return {
        torch_name(path[1:], prefixes): _to_torch(path, np.asarray(value), _channels(path, flat))
        for path, value in flat.items()
    }


def complete_state_dict(
    params: chex.ArrayTree,
    stats: chex.ArrayTree,
    prefixes: Mapping[str, str] | None = None,
    standardisation: Standardisation = MappingProxyType({}),
) -> dict[str, np.ndarray]:
    """Returns :func:`to_state_dict` and what strict loading needs beside.

    These are counters of 0, a zero bias of the head, and the buffers ``mean`` and ``std``, float32
    ``[C, 1, 1]``, of a backbone that standardises its images.
    """
    prefixes = released_prefixes(params, stats) if prefixes is None else prefixes
    state = {k: np.ascontiguousarray(v) for k, v in to_state_dict(params, stats, prefixes).items()}
    for name in [name for name in state if name.endswith("running_mean")]:
        state[name.replace("running_mean", "num_batches_tracked")] = np.zeros((), np.int64)
    last = last_layer_of(shapes(state))
    if last is not None:
        weight = state[f"{last}weight"]
        state.setdefault(f"{last}bias", np.zeros(len(weight), weight.dtype))
    if channels := max(map(len, standardisation.values()), default=0):
        for name, neutral in NEUTRAL.items():
            numbers = np.full(channels, standardisation.get(name) or neutral, np.float32)
            state[prefixes.get("backbone.", "backbone.") + name] = numbers.reshape(channels, 1, 1)
    return state


def torch_shapes(
    params: chex.ArrayTree, stats: chex.ArrayTree, prefixes: Mapping[str, str] | None = None
) -> dict[str, tuple[int, ...]]:
    """Returns names and shapes of :func:`to_state_dict`; the trees need only have shapes."""

    def zeros(tree: chex.ArrayTree) -> chex.ArrayTree:
        return jax.tree.map(lambda like: np.broadcast_to(np.float32(0), like.shape), tree)

    return shapes(to_state_dict(zeros(params), zeros(stats), prefixes))


def from_state_dict(
    state_dict: Mapping[str, np.ndarray],
    like_params: chex.ArrayTree,
    like_stats: chex.ArrayTree,
    prefixes: Mapping[str, str] | None = None,
    standardisation: Standardisation = MappingProxyType({}),
) -> tuple[chex.ArrayTree, chex.ArrayTree]:
    """Converts a PyTorch state_dict into our variables.

    Args:
      state_dict: arrays by PyTorch name, in PyTorch's layout; float64 arrays stay float64.
      like_params: parameters of the network, or their shapes (``jax.eval_shape``).
      like_stats: running statistics of the network, or their shapes.
      prefixes: beginnings of names to replace, ``{ours: theirs}``; the first match counts. By default those
        of the released networks (:func:`released_prefixes`); for a bare ResNet-18 with its own ``linear``
        layer ``{"backbone.": "", "classifier.": "linear."}``, for torchvision's ResNet-50 the same with
        ``fc.``.
      standardisation: ``mean`` and ``std`` of the backbone, which buffers of the state_dict must have.

    Returns:
      Parameters and statistics, NumPy arrays.

    Raises:
      InputError: names are missing or unused (except :func:`ignored`), or shapes differ; the message lists
        them.
    """
    prefixes = released_prefixes(like_params, like_stats) if prefixes is None else prefixes
    wanted = torch_shapes(like_params, like_stats, prefixes)
    found = shapes(state_dict)
    unused = found.keys() - wanted.keys() - ignored(state_dict, wanted, standardisation).keys()
    standardising = sorted(name for name in unused if name.split(".")[-1] in STANDARDISES)
    if standardising:
        listed = "; ".join(
            f"{name} = {', '.join(map(str, np.ravel(state_dict[name])))}" for name in standardising
        )
        raise InputError(
            f"the network standardises its images otherwise than the config ({listed}); set "
            "config.model.mean and config.model.std in a config file of your own"
        )
    problems = {
        "missing": wanted.keys() - found.keys(),
        "unused": unused,
        "of a different shape": {
            f"{name} {found[name]} instead of {shape}"
            for name, shape in wanted.items()
            if found.get(name, shape) != shape
        },
    }
    if any(problems.values()):
        listed = "; ".join(f"{what}: {', '.join(sorted(names))}" for what, names in problems.items() if names)
        raise InputError(
            f"the state_dict does not fit this network ({listed}); check the config's model and head, "
            "and the prefixes"
        )
    variables, like = {}, _flat(like_params, like_stats)
    for path in like:
        array = np.asarray(state_dict[torch_name(path[1:], prefixes)])
        variables[path] = _from_torch(path, array, _channels(path, like))
    tree = traverse_util.unflatten_dict(variables)
    return tree.get("params", {}), tree.get("stats", {})


def ignored(
    state_dict: Mapping[str, np.ndarray],
    wanted: Shapes,
    standardisation: Standardisation = MappingProxyType({}),
) -> dict[str, str]:
    """Lists the arrays that are not wanted and have no effect, with the reason."""
    reasons = {}
    for name in state_dict.keys() - wanted.keys():
        known = [part for part in name.split(".") if part in IGNORED]
        setting = STANDARDISES.get(name.split(".")[-1], "")
        numbers = tuple(standardisation.get(setting, ()))
        neutral = FROZEN.get(name, NEUTRAL.get(setting))
        if known:
            reasons[name] = known[0]
        elif numbers and np.size(state_dict[name]) == len(numbers):
            if np.allclose(np.ravel(state_dict[name]), numbers, rtol=1e-6, atol=0):  # float32 rounds them
                reasons[name] = f"{name} (as in the config)"
        elif not numbers and neutral is not None and (state_dict[name] == neutral).all():
            reasons[name] = f"{name} (all {neutral:g})"
    return reasons


def _to_torch(path: Path, array: np.ndarray, channels: int) -> np.ndarray:
    array = LAYOUTS[path[-1]][0](array) if path[-1] in LAYOUTS else array
    return channels_first(array, channels) if channels > 1 else array


def _from_torch(path: Path, array: np.ndarray, channels: int) -> np.ndarray:
    if channels > 1:  # the same swap, of a matrix whose columns are channels x pixels
        array = channels_first(array, array.shape[1] // channels)
    return LAYOUTS[path[-1]][1](array) if path[-1] in LAYOUTS else array


def channels_first(weight: np.ndarray, channels: int) -> np.ndarray:
    """Reorders a linear layer's inputs, the numbers of a flattened image, from (h, w, c) to (c, h, w).

    Args:
      weight: ``[D, h w c]``.
      channels: ``c``.

    Returns:
      ``[D, c h w]``.

    Example:
      >>> print(channels_first(np.array([[11, 12, 21, 22, 31, 32]]), channels=2))
      [[11 21 31 12 22 32]]
    """
    return weight.reshape(len(weight), -1, channels).swapaxes(1, 2).reshape(weight.shape)


def _channels(path: Path, flat: Mapping[Path, Any]) -> int:
    """Returns the channels of the image that a linear layer reads flattened; 1 for any other array.

    The small CNN's ``fc`` reads what the last of its convolutions ``conv1``, ``conv2``, ... makes. A
    classifier reads features, which are no image.

    Raises:
      InputError: it is a linear layer of another backbone, whose order nothing tells.
    """
    if path[-1] != "kernel" or np.ndim(flat[path]) != 2 or path[1] == "classifier":
        return 1
    convolutions = {
        int(other[-2].removeprefix("conv")): value.shape[-1]
        for other, value in flat.items()
        if other[:-2] == path[:-2] and re.fullmatch(r"conv\d+", other[-2]) and np.ndim(value) == 4
    }
    if path[-2] != "fc" or not convolutions:
        raise InputError(
            f"the linear layer {'/'.join(path[1:-1])} may read a flattened image, whose order differs in "
            "PyTorch; convert this network by hand"
        )
    return convolutions[max(convolutions)]


def _flat(params: chex.ArrayTree, stats: chex.ArrayTree) -> dict[Path, Any]:
    """Returns arrays by path; the first part of a path is ``'params'`` or ``'stats'``."""
    return traverse_util.flatten_dict({"params": params, "stats": stats})


def shapes(state_dict: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Returns the shape of every array."""
    return {name: tuple(np.shape(array)) for name, array in state_dict.items()}


def last_layer_of(found: Shapes) -> str | None:
    """Returns how the names of the last layer begin: one of ``LAST_LAYERS``, or None if there is none."""
    return next((name for name in LAST_LAYERS if len(found.get(f"{name}weight", ())) == 2), None)
