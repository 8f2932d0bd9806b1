"""Which network a state_dict belongs to, from its names and shapes."""

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import chex

from robal_jax.errors import InputError
from robal_jax.pytorch.names import LAST_LAYERS, Shapes, last_layer_of, released_prefixes

# Name and config.model, by the number of blocks per stage and the shapes of ``TELLING`` arrays.
RESNETS: dict[tuple[Any, ...], tuple[str, dict[str, str | int]]] = {
    ((2, 2, 2, 2), (64, 3, 3), (), (128, 64, 1, 1), (64,), ()): ("ResNet-18", {"name": "resnet18"}),
    ((2, 2, 2, 2), (64, 3, 3), (), (128, 64, 1, 1), (), (512,)): (
        "PreActResNet-18",
        {"name": "preact_resnet18"},
    ),
    **{
        ((3, 4, 6, 3), (64, size, size), (256, 64, 1, 1), (), (64,), ()): (
            f"{kind}ResNet-50",
            {"name": "resnet50", "stem": stem},
        )
        for size, kind, stem in ((7, "", "imagenet"), (3, "small ", "small"))
    },
    **{
        ((n, n, n), (16, 3, 3), (), projection, (16,), ()): (
            f"ResNet-{6 * n + 2} with shortcut {shortcut}",
            {"name": f"resnet{6 * n + 2}", "shortcut": shortcut},
        )
        for n in (3, 5)
        for shortcut, projection in (("A", ()), ("B", (32, 16, 1, 1)))
    },
}

# The stem without the channels of an image; a third convolution, which basic blocks lack, and which is wider
# in wide and grouped bottlenecks; a projection; batch norm after the stem, and before pooling.
TELLING = ("conv1", "layer1.0.conv3", "layer2.0.shortcut.0", "bn1", "bn")


class Architecture(NamedTuple):
    """The network of a state_dict, as far as names and shapes tell.

    Attributes:
      name: 'WideResNet-34-10', 'DeepMind WideResNet-28-10', one of ``RESNETS``, or a description of a network
        that this library lacks.
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
    def blocks(name: str, first: int = 1) -> list[int]:
        """Counts the blocks per stage."""
        stages: Iterator[int] = (
            next(i for i in itertools.count() if f"{name.format(stage, i)}.weight" not in found)
            for stage in itertools.count(first)
        )
        return list(itertools.takewhile(bool, stages))

    for kind, name, pattern, first in (
        ("", "wide_resnet", "block{}.layer.{}.conv1", 1),
        ("DeepMind ", "deepmind_wide_resnet", "layer.{}.block.{}.conv_0", 0),
    ):
        if wide := blocks(pattern, first):
            width = found[f"{pattern.format(first, 0)}.weight"][0]
            if wide != [wide[0]] * 3 or width % 16:
                return f"{kind}wide ResNet with stages of {wide} blocks and width {width}", {}
            depth, widen = 6 * wide[0] + 4, width // 16
            return f"{kind}WideResNet-{depth}-{widen}", {"name": name, "depth": depth, "widen": widen}
    if plain := blocks("layer{}.{}.conv1"):
        stem, *others = (found.get(f"{name}.weight", ()) for name in TELLING)
        known = (tuple(plain), stem[:1] + stem[2:], *others)
        if known in RESNETS:
            return RESNETS[known]
        kind = "" if "bn1.weight" in found else "pre-activation "
        return f"{kind}ResNet with stages of {plain} blocks and stem {list(stem[2:])}", {}
    return "network that is neither WideResNet nor ResNet", {}
