"""Weights of the released PyTorch code: a state_dict of NumPy arrays to our variables, and back.

PyTorch itself is not needed here; where it is at hand, ``{k: v.numpy() for k, v in state_dict.items()}`` is
what goes in::

    params, stats = model.init(key, images)                    # says which arrays there must be
    params, stats = from_state_dict(state_dict, params, stats)

The rule: our module names are theirs with ``_`` for ``.``; an array's name and layout follow from what it is
(``ARRAY_NAMES``; a convolution is HWIO here and OIHW there). The one exception is a head, whose modules have
other names there; see :func:`from_state_dict` for ``prefixes``.
"""

from collections.abc import Mapping

import chex
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
}

# What a released state_dict has and we do not need. The counter does nothing at a fixed batch-norm momentum;
# moving_ed is written by RoBal's head in training and never read.
IGNORED = ("num_batches_tracked", "moving_ed")

# A head without bias there still has one, frozen at zero: ignored while it is zero and ours has none.
FROZEN_BIAS = "classifier.bias"

Path = tuple[str, ...]


def released_prefixes(params: chex.ArrayTree) -> dict[str, str]:
    """Our prefixes and the released networks' for :func:`from_state_dict`: a linear head wraps ``fc``."""
    return {"classifier.": "classifier.fc."} if "bias" in params.get("classifier", {}) else {}


def torch_name(path: Path, prefixes: Mapping[str, str]) -> str:
    """``('backbone', 'block1_layer_0', 'bn1', 'scale')`` to ``'backbone.block1.layer.0.bn1.weight'``."""
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
      stats: running batch-norm statistics; ``{}`` if none are wanted.
      prefixes: see :func:`from_state_dict`.

    Returns:
      Arrays by PyTorch name and in PyTorch's layout, without what PyTorch has and we do not.
    """
    prefixes = released_prefixes(params) if prefixes is None else prefixes
    result = {}
    for path, value in _flat(params, stats).items():
        array = np.asarray(value)
        result[torch_name(path[1:], prefixes)] = (
            np.moveaxis(array, (-1, -2), (0, 1)) if path[-1] == "kernel" else array
        )
    return result


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
      like_stats: likewise its running batch-norm statistics.
      prefixes: how PyTorch names begin where the rule gives others: ``{ours: theirs}``, the first match
        counts. By default the released networks' (:func:`released_prefixes`); for a bare ResNet-18 with
        its own ``linear`` layer ``{"backbone.": "", "classifier.": "linear."}``.

    Returns:
      Parameters and statistics, NumPy arrays.

    Raises:
      InputError: names are missing, left over (except ``IGNORED`` and a zero ``FROZEN_BIAS``) or of another
        shape; the message lists them.
    """
    prefixes = released_prefixes(like_params) if prefixes is None else prefixes
    names = {path: torch_name(path[1:], prefixes) for path in _flat(like_params, like_stats)}
    variables, missing, misshaped = {}, [], []
    for path, like in _flat(like_params, like_stats).items():
        name, is_kernel = names[path], path[-1] == "kernel"
        shape = tuple(like.shape)
        expected = (shape[-1], shape[-2], *shape[:-2]) if is_kernel else shape
        if name not in state_dict:
            missing.append(name)
        elif np.shape(state_dict[name]) != expected:
            misshaped.append(f"{name} {np.shape(state_dict[name])} instead of {expected}")
        else:
            array = np.asarray(state_dict[name])
            variables[path] = np.moveaxis(array, (0, 1), (-1, -2)) if is_kernel else array
    unused = [
        name
        for name in state_dict.keys() - set(names.values())
        if name.rpartition(".")[2] not in IGNORED and not (name == FROZEN_BIAS and not state_dict[name].any())
    ]
    problems = {"missing": missing, "unused": unused, "of another shape": misshaped}
    if any(problems.values()):
        found = "; ".join(f"{what}: {', '.join(sorted(list_))}" for what, list_ in problems.items() if list_)
        raise InputError(f"the state_dict does not fit this network ({found}); check the config and prefixes")
    tree = traverse_util.unflatten_dict(variables)
    return tree.get("params", {}), tree.get("stats", {})


def _flat(params: chex.ArrayTree, stats: chex.ArrayTree) -> dict[Path, chex.Array]:
    """Arrays by path; the first part of a path is ``'params'`` or ``'stats'``."""
    return traverse_util.flatten_dict({"params": params, "stats": stats})
