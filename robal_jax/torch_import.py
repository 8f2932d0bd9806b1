"""Weights of PyTorch networks: files, the names of a state_dict, and our variables from them and back.

A file is read without executing anything in it; only reading a ``.pt`` needs PyTorch::

    state_dict = read_weights(pathlib.Path("epoch80.pt"))
    params, stats = model.init(key, images)                    # says which arrays there must be
    prefixes = architecture(shapes(state_dict)).prefixes(params, stats)
    params, stats = from_state_dict(state_dict, params, stats, prefixes)

The rule of names: our module names are theirs with ``_`` for ``.``; an array's name and layout follow from
what it is (``ARRAY_NAMES``, ``LAYOUTS``). The exceptions are prefixes: a network that is not in two parts
(backbone and classifier), and a head that wraps a linear layer ``fc``; see :func:`from_state_dict`.
"""

import itertools
import pathlib
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import chex
import jax
import numpy as np
from flax import traverse_util

from robal_jax import logs
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

# Arrays whose layout differs: ours to theirs, and back. All others are the same.
LAYOUTS: dict[str, tuple[Callable[[np.ndarray], np.ndarray], Callable[[np.ndarray], np.ndarray]]] = {
    # HWIO and OIHW; of a linear layer [in, out] and [out, in].
    "kernel": (lambda x: np.moveaxis(x, (-1, -2), (0, 1)), lambda x: np.moveaxis(x, (0, 1), (-1, -2))),
    "direction": (lambda x: x[None], lambda x: x.reshape(x.shape[-1:])),  # [D] and [1, D]
}

# What a state_dict has and no pass reads, where we have nothing of that name. The counter does nothing at a
# fixed batch-norm momentum, cosine heads write moving_ed only, and TRADES' WideResNet never calls sub_block1.
IGNORED = ("num_batches_tracked", "moving_ed", "sub_block1")

# Arrays that the released heads freeze at a value: ignored while they have it and ours has none.
FROZEN = {"classifier.bias": 0.0, "classifier.cla_scale": 1.0}

# Names that the last layer's weight has: of released linear heads, other heads, WideResNet and ResNet-50,
# ResNet-18.
LAST_LAYERS = ("classifier.fc.", "classifier.", "fc.", "linear.")

# Name and config.model, by blocks of each stage, size of the stem and shape of the first block's third
# convolution: basic blocks have none, wide and grouped bottlenecks a wider one.
RESNETS: dict[tuple[Any, ...], tuple[str, dict[str, str | int]]] = {
    ((2, 2, 2, 2), (3, 3), ()): ("ResNet-18", {"name": "resnet18"}),
    ((3, 4, 6, 3), (7, 7), (256, 64, 1, 1)): ("ResNet-50", {"name": "resnet50", "stem": "imagenet"}),
    ((3, 4, 6, 3), (3, 3), (256, 64, 1, 1)): ("small ResNet-50", {"name": "resnet50", "stem": "small"}),
}

Path = tuple[str, ...]
Shapes = Mapping[str, tuple[int, ...]]


# ---------------------------------------------------------------- names and layouts


def released_prefixes(params: chex.ArrayTree, stats: chex.ArrayTree) -> dict[str, str]:
    """Our prefixes and the released networks' for :func:`from_state_dict`: a head with bias wraps ``fc``.

    Not so its class scales.
    """
    if not any("bias" in tree.get("classifier", {}) for tree in (params, stats)):
        return {}
    return {f"classifier.{name}": f"classifier.fc.{name}" for name in ("weight", "bias")}


def torch_name(path: Path, prefixes: Mapping[str, str]) -> str:
    """``('backbone', 'block1_layer_0', 'bn1', 'scale')`` to ``'backbone.block1.layer.0.bn1.weight'``."""
    if path[-1] not in ARRAY_NAMES:
        raise InputError(f"{'/'.join(path)} has no name in PyTorch; known are {', '.join(ARRAY_NAMES)}")
    name = ".".join([*(module.replace("_", ".") for module in path[:-1]), ARRAY_NAMES[path[-1]]])
    for ours, theirs in prefixes.items():
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    return name


def to_state_dict(
    params: chex.ArrayTree, stats: chex.ArrayTree, prefixes: Mapping[str, str] | None = None
) -> dict[str, np.ndarray]:
    """The inverse of :func:`from_state_dict`; also names gradients and moments, which have the same shapes.

    Args:
      params: trainable parameters.
      stats: running statistics; ``{}`` if none are wanted.
      prefixes: see :func:`from_state_dict`.

    Returns:
      Arrays by PyTorch name and in PyTorch's layout, without what PyTorch has and we do not.
    """
    prefixes = released_prefixes(params, stats) if prefixes is None else prefixes
    return {
        torch_name(path[1:], prefixes): _to_torch(path, np.asarray(value))
        for path, value in _flat(params, stats).items()
    }


def complete_state_dict(
    params: chex.ArrayTree, stats: chex.ArrayTree, prefixes: Mapping[str, str] | None = None
) -> dict[str, np.ndarray]:
    """:func:`to_state_dict` and what strict loading wants beside: counters of 0, a zero bias of the head."""
    state = {k: np.ascontiguousarray(v) for k, v in to_state_dict(params, stats, prefixes).items()}
    for name in [name for name in state if name.endswith("running_mean")]:
        state[name.replace("running_mean", "num_batches_tracked")] = np.zeros((), np.int64)
    last = _last_layer(shapes(state))
    if last is not None:
        weight = state[f"{last}weight"]
        state.setdefault(f"{last}bias", np.zeros(len(weight), weight.dtype))
    return state


def torch_shapes(
    params: chex.ArrayTree, stats: chex.ArrayTree, prefixes: Mapping[str, str] | None = None
) -> dict[str, tuple[int, ...]]:
    """Names and shapes that :func:`to_state_dict` gives; of the trees only the shapes are needed."""

    def zeros(tree: chex.ArrayTree) -> chex.ArrayTree:
        return jax.tree.map(lambda like: np.broadcast_to(np.float32(0), like.shape), tree)

    return shapes(to_state_dict(zeros(params), zeros(stats), prefixes))


def from_state_dict(
    state_dict: Mapping[str, np.ndarray],
    like_params: chex.ArrayTree,
    like_stats: chex.ArrayTree,
    prefixes: Mapping[str, str] | None = None,
) -> tuple[chex.ArrayTree, chex.ArrayTree]:
    """Our variables from a PyTorch state_dict.

    Args:
      state_dict: arrays by PyTorch name, in PyTorch's layout; a float64 array stays one.
      like_params: parameters, or their shapes (``jax.eval_shape``), of the network that is to get them.
      like_stats: likewise its running statistics.
      prefixes: how PyTorch names begin where the rule gives others: ``{ours: theirs}``, the first match
        counts. By default the released networks' (:func:`released_prefixes`); for a bare ResNet-18 with
        its own ``linear`` layer ``{"backbone.": "", "classifier.": "linear."}``, for torchvision's
        ResNet-50 with ``fc.`` there.

    Returns:
      Parameters and statistics, NumPy arrays.

    Raises:
      InputError: names are missing, left over (except :func:`ignored`) or of another shape; the message
        lists them.
    """
    prefixes = released_prefixes(like_params, like_stats) if prefixes is None else prefixes
    wanted = torch_shapes(like_params, like_stats, prefixes)
    found = shapes(state_dict)
    problems = {
        "missing": wanted.keys() - found.keys(),
        "unused": found.keys() - wanted.keys() - ignored(state_dict, wanted).keys(),
        "of another shape": {
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
    variables = {}
    for path in _flat(like_params, like_stats):
        array = np.asarray(state_dict[torch_name(path[1:], prefixes)])
        variables[path] = LAYOUTS[path[-1]][1](array) if path[-1] in LAYOUTS else array
    tree = traverse_util.unflatten_dict(variables)
    return tree.get("params", {}), tree.get("stats", {})


def ignored(state_dict: Mapping[str, np.ndarray], wanted: Shapes) -> dict[str, str]:
    """Arrays that are not wanted and have no effect, with the reason (``IGNORED``, ``FROZEN``)."""
    reasons = {}
    for name in state_dict.keys() - wanted.keys():
        known = [part for part in name.split(".") if part in IGNORED]
        if known:
            reasons[name] = known[0]
        elif name in FROZEN and (state_dict[name] == FROZEN[name]).all():
            reasons[name] = f"{name} (all {FROZEN[name]:g})"
    return reasons


def _to_torch(path: Path, array: np.ndarray) -> np.ndarray:
    return LAYOUTS[path[-1]][0](array) if path[-1] in LAYOUTS else array


def _flat(params: chex.ArrayTree, stats: chex.ArrayTree) -> dict[Path, Any]:
    """Arrays by path; the first part of a path is ``'params'`` or ``'stats'``."""
    return traverse_util.flatten_dict({"params": params, "stats": stats})


def shapes(state_dict: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Shape of every array."""
    return {name: tuple(np.shape(array)) for name, array in state_dict.items()}


# ---------------------------------------------------------------- which network it is


class Architecture(NamedTuple):
    """What the names and shapes of a state_dict tell.

    Attributes:
      name: 'WideResNet-34-10', one of ``RESNETS``, or that of a network that this library does not have.
      model: the section ``config.model`` for it; empty where the library has no such network.
      num_classes: rows of the last layer.
      backbone: how the backbone's names begin: 'backbone.' or ''.
      last_layer: how the last layer's names begin, one of ``LAST_LAYERS``.
    """

    name: str
    model: dict[str, str | int]
    num_classes: int
    backbone: str
    last_layer: str

    def prefixes(self, params: chex.ArrayTree, stats: chex.ArrayTree) -> dict[str, str]:
        """For :func:`from_state_dict`; of our network's trees only the names are needed."""
        if self.last_layer.startswith("classifier."):
            return {"backbone.": self.backbone, **released_prefixes(params, stats)}
        return {"backbone.": self.backbone, "classifier.": self.last_layer}


def architecture(found: Shapes) -> Architecture:
    """Which network has arrays of these names and shapes.

    Raises:
      InputError: there is no last layer.
    """
    last = _last_layer(found)
    if last is None:
        names = ", ".join(sorted(found)[:5])
        raise InputError(
            f"the state_dict has no last layer: none of {', '.join(LAST_LAYERS)} with a weight [K, D]; "
            f"its names begin with {names}"
        )
    prefix = "backbone." if any(name.startswith("backbone.") for name in found) else ""
    name, model = _backbone({k.removeprefix(prefix): v for k, v in found.items() if k.startswith(prefix)})
    return Architecture(name, model, found[f"{last}weight"][0], prefix, last)


def check_architecture(theirs: Architecture, ours: Architecture) -> None:
    """Refuses weights of another network than the config's, with what to write instead.

    Raises:
      InputError: backbone or number of classes differ.
    """
    if theirs.name != ours.name:
        changed = {k: v for k, v in theirs.model.items() if ours.model.get(k) != v}
        if not theirs.model:
            remedy = "give a config with that network, if there is one"
        elif "name" in changed:
            remedy = f"in a config file of your own set config.model = ConfigDict({theirs.model})"
        else:
            remedy = "give " + " ".join(f"--config.model.{key}={value}" for key, value in changed.items())
        raise InputError(f"the weights are of a {theirs.name}, the config says {ours.name}; {remedy}")
    if theirs.num_classes != ours.num_classes:
        raise InputError(
            f"the weights are for {theirs.num_classes} classes, the config's data have "
            f"{ours.num_classes}; choose another data set behind the colon of --config"
        )


def _last_layer(found: Shapes) -> str | None:
    return next((name for name in LAST_LAYERS if len(found.get(f"{name}weight", ())) == 2), None)


def _backbone(found: Shapes) -> tuple[str, dict[str, str | int]]:
    def blocks(name: str) -> list[int]:
        """Blocks of each stage."""
        stages: Iterator[int] = (
            next(i for i in itertools.count() if f"{name.format(stage, i)}.conv1.weight" not in found)
            for stage in itertools.count(1)
        )
        return list(itertools.takewhile(bool, stages))

    wide, plain = blocks("block{}.layer.{}"), blocks("layer{}.{}")
    if wide:
        width = found["block1.layer.0.conv1.weight"][0]
        if wide != [wide[0]] * 3 or width % 16:
            return f"wide ResNet with stages of {wide} blocks and width {width}", {}
        depth, widen = 6 * wide[0] + 4, width // 16
        return f"WideResNet-{depth}-{widen}", {"name": "wide_resnet", "depth": depth, "widen": widen}
    if plain:
        stem = found.get("conv1.weight", ())[2:]
        kind = "" if "bn1.weight" in found else "pre-activation "
        known = (tuple(plain), stem, found.get("layer1.0.conv3.weight", ()))
        if not kind and known in RESNETS:
            return RESNETS[known]
        return f"{kind}ResNet with stages of {plain} blocks and stem {list(stem)}", {}
    return "network that is neither WideResNet nor ResNet", {}


# ---------------------------------------------------------------- files


def read_weights(path: pathlib.Path, entry: str = "") -> dict[str, np.ndarray]:
    """The state_dict in a file, whatever it is nested in, without the names of wrappers.

    Args:
      path: ``.safetensors``, or what ``torch.save`` wrote.
      entry: which of several state_dicts, as the message that lists them says.

    Returns:
      Arrays by name; the names begin where they begin to differ, that is, without 'module.' of DataParallel
      and 'model.module.' of the released code's files.

    Raises:
      InputError: no such file, or one that cannot be read, needs code to be executed, or holds no or
        several state_dicts.
    """
    if not path.is_file():
        raise InputError(f"no file {path}; give the weights with --weights")
    content = _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path)
    found = dict(_state_dicts(content, ""))
    if entry:
        found = {place: value for place, value in found.items() if place == entry}
    if not found:
        keys = ", ".join(map(str, list(content)[:10])) if isinstance(content, Mapping) else type(content)
        what = f"state_dict {entry!r}" if entry else "state_dict (a mapping of names to tensors)"
        raise InputError(f"no {what} in {path}; it holds: {keys}")
    if len(found) > 1:
        raise InputError(
            f"{path} holds several state_dicts: {', '.join(found)}; choose one with "
            f"--entry={next(iter(found))}"
        )
    (state_dict,) = found.values()
    return _without_wrappers({name: _array(value) for name, value in state_dict.items()})


def write_weights(path: pathlib.Path, state_dict: Mapping[str, np.ndarray], metadata: dict[str, str]) -> None:
    """Writes a ``.safetensors`` file, whole or not at all.

    Raises:
      InputError: it cannot be written, or the package safetensors is missing.
    """
    content = _safetensors().save(dict(state_dict), metadata)
    try:
        logs.replace(path, content)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}") from error


def _safetensors() -> Any:
    try:
        import safetensors.numpy
    except ImportError as error:
        raise InputError(
            "a .safetensors file needs the package safetensors: pip install 'robal_jax[torch]'"
        ) from error
    return safetensors.numpy


def _read_safetensors(path: pathlib.Path) -> Any:
    library = _safetensors()
    try:
        return library.load_file(path)
    except Exception as error:  # its own SafetensorError, and OSError, TypeError, ...
        raise InputError(
            f"cannot read {path} ({_one_line(error)}); it is damaged or no .safetensors file"
        ) from error


def _read_torch(path: pathlib.Path) -> Any:
    """What ``torch.save`` wrote, if it is tensors and plain values only: nothing else is unpickled."""
    try:
        import torch
    except ImportError as error:
        raise InputError(
            f"reading {path} needs PyTorch: pip install 'robal_jax[torch]'; or make it a .safetensors file"
        ) from error
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 6):
        raise InputError(  # weights_only could be got round before: CVE-2025-32434
            f"PyTorch {torch.__version__} does not read files safely; install 2.6 or newer"
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of old pickle protocols and storage types
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever pickle, zipfile and PyTorch's own reader raise
        code = re.search(r"GLOBAL ([\w.]+)", str(error))
        if code:
            raise InputError(
                f"{path} holds {code[1]} and not only tensors; to read it would execute code that the file "
                "names, so it was not read. Where you trust it, write its tensors to a new file: "
                "torch.save(model.state_dict(), FILE)"
            ) from error
        raise InputError(
            f"cannot read {path} ({_one_line(error)}); it is damaged or no file of torch.save"
        ) from error


def _state_dicts(tree: Any, place: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every mapping of names of weights to tensors in a tree of mappings, by its place: 'ema.model'."""
    if not isinstance(tree, Mapping):
        return
    tensors = {key: value for key, value in tree.items() if isinstance(key, str) and hasattr(value, "dtype")}
    if any(name.endswith(".weight") for name in tensors):
        yield place, tensors
        return
    for key, value in tree.items():
        yield from _state_dicts(value, f"{place}.{key}" if place else str(key))


def _without_wrappers(state_dict: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    while len({name.partition(".")[0] for name in state_dict}) == 1 and all(
        "." in name for name in state_dict
    ):
        state_dict = {name.partition(".")[2]: value for name, value in state_dict.items()}
    return state_dict


def _array(value: Any) -> np.ndarray:
    """A NumPy array of a tensor; NumPy has no bfloat16 of its own, and all of it are float32 numbers."""
    if hasattr(value, "detach"):
        value = value.detach()
        value = (value.float() if str(value.dtype) == "torch.bfloat16" else value).numpy()
    return np.asarray(value, np.float32) if value.dtype.name == "bfloat16" else value


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]
