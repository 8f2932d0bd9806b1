"""Our variables from a PyTorch state_dict and back: names and layouts.

Our module names are those of PyTorch with ``_`` in place of ``.``; the name and the layout of an array follow
from its own name (``ARRAY_NAMES``, ``LAYOUTS``). The exceptions are prefixes: of a network that is not in two
parts (backbone and classifier), and of a head that wraps a linear layer ``fc``; see :func:`from_state_dict`.
"""

from collections.abc import Callable, Mapping
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

# Arrays of a state_dict that have no effect, unless our network has an array of that name. The counter does
# nothing at a fixed batch-norm momentum, cosine heads only write moving_ed, and the WideResNet of TRADES does
# not call sub_block1.
IGNORED = ("num_batches_tracked", "moving_ed", "sub_block1")

# Arrays that the released heads freeze at this value: ignored if they have it and our network lacks them.
FROZEN = {"classifier.bias": 0.0, "classifier.cla_scale": 1.0}

# Prefixes of the last layer's weight: of released linear heads, other released heads, WideResNet and
# ResNet-50, ResNet-18.
LAST_LAYERS = ("classifier.fc.", "classifier.", "fc.", "linear.")

Path = tuple[str, ...]

Shapes = Mapping[str, tuple[int, ...]]


def released_prefixes(params: chex.ArrayTree, stats: chex.ArrayTree) -> dict[str, str]:
    """Returns the prefixes of released networks for :func:`from_state_dict`: a head with bias wraps ``fc``.

    Its class scales are outside of ``fc``.
    """
    if not any("bias" in tree.get("classifier", {}) for tree in (params, stats)):
        return {}
    return {f"classifier.{name}": f"classifier.fc.{name}" for name in ("weight", "bias")}


def torch_name(path: Path, prefixes: Mapping[str, str]) -> str:
    """Maps ``('backbone', 'block1_layer_0', 'bn1', 'scale')`` to ``backbone.block1.layer.0.bn1.weight``."""
    if path[-1] not in ARRAY_NAMES:
        raise InputError(f"{'/'.join(path)} has no name in PyTorch; use one of {', '.join(ARRAY_NAMES)}")
    name = ".".join([*(module.replace("_", ".") for module in path[:-1]), ARRAY_NAMES[path[-1]]])
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
    return {
        torch_name(path[1:], prefixes): _to_torch(path, np.asarray(value))
        for path, value in _flat(params, stats).items()
    }


def complete_state_dict(
    params: chex.ArrayTree, stats: chex.ArrayTree, prefixes: Mapping[str, str] | None = None
) -> dict[str, np.ndarray]:
    """Returns :func:`to_state_dict` and what strict loading needs: counters of 0, a zero bias of the head."""
    state = {k: np.ascontiguousarray(v) for k, v in to_state_dict(params, stats, prefixes).items()}
    for name in [name for name in state if name.endswith("running_mean")]:
        state[name.replace("running_mean", "num_batches_tracked")] = np.zeros((), np.int64)
    last = last_layer_of(shapes(state))
    if last is not None:
        weight = state[f"{last}weight"]
        state.setdefault(f"{last}bias", np.zeros(len(weight), weight.dtype))
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

    Returns:
      Parameters and statistics, NumPy arrays.

    Raises:
      InputError: names are missing or unused (except :func:`ignored`), or shapes differ; the message lists
        them.
    """
    prefixes = released_prefixes(like_params, like_stats) if prefixes is None else prefixes
    wanted = torch_shapes(like_params, like_stats, prefixes)
    found = shapes(state_dict)
    problems = {
        "missing": wanted.keys() - found.keys(),
        "unused": found.keys() - wanted.keys() - ignored(state_dict, wanted).keys(),
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
    variables = {}
    for path in _flat(like_params, like_stats):
        array = np.asarray(state_dict[torch_name(path[1:], prefixes)])
        variables[path] = LAYOUTS[path[-1]][1](array) if path[-1] in LAYOUTS else array
    tree = traverse_util.unflatten_dict(variables)
    return tree.get("params", {}), tree.get("stats", {})


def ignored(state_dict: Mapping[str, np.ndarray], wanted: Shapes) -> dict[str, str]:
    """Lists the arrays that are not wanted and have no effect, with the reason (``IGNORED``, ``FROZEN``)."""
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
    """Returns arrays by path; the first part of a path is ``'params'`` or ``'stats'``."""
    return traverse_util.flatten_dict({"params": params, "stats": stats})


def shapes(state_dict: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Returns the shape of every array."""
    return {name: tuple(np.shape(array)) for name, array in state_dict.items()}


def last_layer_of(found: Shapes) -> str | None:
    """Returns how the names of the last layer begin: one of ``LAST_LAYERS``, or None if there is none."""
    return next((name for name in LAST_LAYERS if len(found.get(f"{name}weight", ())) == 2), None)
