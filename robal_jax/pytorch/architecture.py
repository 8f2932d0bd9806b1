"""Which network a state_dict belongs to, from its names and shapes."""

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import chex

from robal_jax.errors import InputError
from robal_jax.pytorch.names import LAST_LAYERS, Shapes, last_layer_of, released_prefixes

# Name and config.model, by the number of blocks per stage, the size of the stem and the shape of the first
# block's third convolution: basic blocks have none; in wide and grouped bottlenecks it is wider.
RESNETS: dict[tuple[Any, ...], tuple[str, dict[str, str | int]]] = {
    ((2, 2, 2, 2), (3, 3), ()): ("ResNet-18", {"name": "resnet18"}),
    ((3, 4, 6, 3), (7, 7), (256, 64, 1, 1)): ("ResNet-50", {"name": "resnet50", "stem": "imagenet"}),
    ((3, 4, 6, 3), (3, 3), (256, 64, 1, 1)): ("small ResNet-50", {"name": "resnet50", "stem": "small"}),
}


class Architecture(NamedTuple):
    """The network of a state_dict, as far as names and shapes tell.

    Attributes:
      name: 'WideResNet-34-10', one of ``RESNETS``, or a description of a network that this library lacks.
      model: the section ``config.model`` for it; empty if this library has no such network.
      num_classes: rows of the last layer.
      backbone: how the names of the backbone begin: 'backbone.' or ''.
      last_layer: how the names of the last layer begin, one of ``LAST_LAYERS``.
    """

    name: str
    model: dict[str, str | int]
    num_classes: int
    backbone: str
    last_layer: str

    def prefixes(self, params: chex.ArrayTree, stats: chex.ArrayTree) -> dict[str, str]:
        """Returns the prefixes for :func:`from_state_dict`; only the names in our trees are used."""
        if self.last_layer.startswith("classifier."):
            return {"backbone.": self.backbone, **released_prefixes(params, stats)}
        return {"backbone.": self.backbone, "classifier.": self.last_layer}


def architecture(found: Shapes) -> Architecture:
    """Finds out which network has arrays of these names and shapes.

    Raises:
      InputError: there is no last layer.
    """
    last = last_layer_of(found)
    if last is None:
        names = ", ".join(sorted(found)[:5])
        raise InputError(
            f"the state_dict has no last layer: its names begin with {names}; rename the last layer so that "
            f"one of {', '.join(LAST_LAYERS)} has a weight [K, D]"
        )
    prefix = "backbone." if any(name.startswith("backbone.") for name in found) else ""
    name, model = _backbone({k.removeprefix(prefix): v for k, v in found.items() if k.startswith(prefix)})
    return Architecture(name, model, found[f"{last}weight"][0], prefix, last)


def check_architecture(theirs: Architecture, ours: Architecture) -> None:
    """Raises if the weights and the config are of different networks, and says what to change.

    Raises:
      InputError: the backbone or the number of classes differ.
    """
    if theirs.name != ours.name:
        changed = {k: v for k, v in theirs.model.items() if ours.model.get(k) != v}
        if not theirs.model:
            remedy = "use a config with that network, if there is one"
        elif "name" in changed:
            remedy = f"set config.model = ConfigDict({theirs.model}) in a config file of your own"
        else:
            remedy = "set " + " and ".join(f"config.model.{key}={value}" for key, value in changed.items())
        raise InputError(f"the weights are of a {theirs.name}, the config says {ours.name}; {remedy}")
    if theirs.num_classes != ours.num_classes:
        raise InputError(
            f"the weights are for {theirs.num_classes} classes, the config's data have "
            f"{ours.num_classes}; choose another data set after the colon of --config"
        )


def _backbone(found: Shapes) -> tuple[str, dict[str, str | int]]:
    def blocks(name: str) -> list[int]:
        """Counts the blocks per stage."""
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
