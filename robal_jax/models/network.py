"""A network as functions of arrays."""

import contextlib
import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import lax

from robal_jax.models.layers import BatchNorm, batch_norm_factor, normalised_in_one_pass


class Network(nn.Module):
    """A backbone and a head, as ``BACKBONES`` and ``classifiers.HEADS`` describe them.

    Attributes:
      backbone: images ``[B, H, W, C]`` to features ``[B, D]``, called with ``(images, train)``.
      classifier: features to logits ``[B, K]``, called with ``(features, train)``.
    """

    backbone: nn.Module
    classifier: nn.Module

    def __call__(self, images: chex.Array, train: bool) -> chex.Array:
        """Images ``[B, H, W, C]`` to logits ``[B, K]``."""
        return self.classifier(self.backbone(images, train), train)


def _as_they_are(params: chex.ArrayTree, stats: chex.ArrayTree) -> tuple[chex.ArrayTree, chex.ArrayTree]:
    return params, stats


class Model(NamedTuple):
    """A network as functions of arrays.

    Attributes:
      init: ``(key, images) -> (params, stats)``; only the shape of the images matters.
      predict: ``(params, stats, images) -> logits``, with running statistics; it is attacked and evaluated.
      train: ``(params, stats, images) -> (logits, moments)``, with the statistics of the batch.
      features: ``(params, stats, images) -> [B, D]``, the input of the head in ``predict``.
      train_features: ``(params, stats, images) -> (logits, features, moments)``, ``train`` with the input of
        the head.
      ready: ``(params, stats) -> (params, stats)`` for many calls of ``predict``: what does not depend on the
        images is done.
      joint: whether several training passes are better made as one, by ``jax.vmap`` over the batches.
    """

    init: Callable[[chex.PRNGKey, chex.Array], tuple[chex.ArrayTree, chex.ArrayTree]]
    predict: Callable[[chex.ArrayTree, chex.ArrayTree, chex.Array], chex.Array]
    train: Callable[[chex.ArrayTree, chex.ArrayTree, chex.Array], tuple[chex.Array, chex.ArrayTree]]
    features: Callable[[chex.ArrayTree, chex.ArrayTree, chex.Array], chex.Array]
    train_features: Callable[..., tuple[chex.Array, chex.Array, chex.ArrayTree]]
    ready: Callable[[chex.ArrayTree, chex.ArrayTree], tuple[chex.ArrayTree, chex.ArrayTree]] = _as_they_are
    joint: bool = False


PRECISIONS = {
    "default": (None, None),
    "high": ("high", None),
    "highest": ("highest", None),
    "bfloat16": (None, jnp.bfloat16),
}
"""Precision of matrix products, and the type in which a network computes; None for its parameters' type."""


def functional(
    network: nn.Module,
    *,
    precision: str = "default",
    piece: int | None = None,
    accelerator: bool = False,
    cast_kernels: bool = False,
) -> Model:
    """The :class:`Model` of a linen module with call signature ``(images, train)``.

    Args:
      network: the module; for ``features`` a :class:`Network`.
      precision: a key of ``PRECISIONS``. 'default', 'high' and 'highest' are those of JAX's matrix products
        and convolutions ('default' may be TF32 on a GPU and bfloat16 on a TPU). With 'bfloat16' the images
        enter the network in that type, and the library's backbones compute in it; parameters, gradients,
        batch-norm statistics, head and logits stay float32.
      piece: number of pixels (images times height times width) that ``predict`` takes at once. A larger batch
        is split into pieces of this size, if they divide it evenly; None takes each batch at once. The logits
        are the same up to rounding; a smaller piece fits better into a processor's caches.

      accelerator: whether the forms are used that accelerators prefer: batch norm reads a training batch once
        for its statistics (``layers.normalised_in_one_pass``), ``ready`` computes its factors, and training
        passes are ``joint``.
      cast_kernels: whether ``ready`` also casts the kernels of convolutions, because all are of ``Conv``.

    Returns:
      The network's functions.

    Raises:
      ValueError: the precision is unknown. A training pass raises it for flax's own ``nn.BatchNorm``.

    Example:
      >>> from robal_jax.classifiers import LinearHead
      >>> from robal_jax.models.backbones import SmallCNN
      >>> model = functional(Network(SmallCNN(channels=(4, 4, 4), width=8), LinearHead(num_classes=10)))
      >>> images = jnp.zeros((2, 8, 8, 1))
      >>> params, stats = model.init(jax.random.key(0), images)
      >>> model.predict(params, stats, images).shape, model.features(params, stats, images).shape
      ((2, 10), (2, 8))
    """
    if precision not in PRECISIONS:
        raise ValueError(f"unknown precision {precision!r}; use one of {', '.join(PRECISIONS)}")
    products, compute = PRECISIONS[precision]

    def apply(params: chex.ArrayTree, stats: chex.ArrayTree, images: chex.Array, **options: Any) -> Any:
        images = images if compute is None else images.astype(compute)
        with jax.default_matmul_precision(products):
            return network.apply({"params": params, "batch_stats": stats}, images, **options)

    def init(key: chex.PRNGKey, images: chex.Array) -> tuple[chex.ArrayTree, chex.ArrayTree]:
        variables = network.init(key, images, train=False)
        return variables["params"], variables.get("batch_stats", {})

    def predict(params: chex.ArrayTree, stats: chex.ArrayTree, images: chex.Array) -> chex.Array:
        whole = partial(apply, params, stats, train=False)
        size = piece // math.prod(images.shape[1:3]) if piece else 0
        if not size or len(images) <= size or len(images) % size:
            return whole(images)
        logits = lax.map(whole, images.reshape(-1, size, *images.shape[1:]))
        return logits.reshape(len(images), *logits.shape[2:])

    def training_pass(
        params: chex.ArrayTree, stats: chex.ArrayTree, images: chex.Array, **options: Any
    ) -> tuple[Any, chex.ArrayTree]:
        forms = nn.intercept_methods(_in_one_pass) if accelerator else contextlib.nullcontext()
        with forms, nn.intercept_methods(_refuse_running_values):
            found, moments = apply(params, stats, images, train=True, mutable=["batch_stats"], **options)
        return found, moments.get("batch_stats", {})

    def train_features(
        params: chex.ArrayTree, stats: chex.ArrayTree, images: chex.Array
    ) -> tuple[chex.Array, chex.Array, chex.ArrayTree]:
        (logits, found), moments = training_pass(params, stats, images, method=_with_features)
        return logits, found, moments

    def features(params: chex.ArrayTree, stats: chex.ArrayTree, images: chex.Array) -> chex.Array:
        return apply(params, stats, images, train=False, method=lambda net, x, train: net.backbone(x, train))

    def ready(params: chex.ArrayTree, stats: chex.ArrayTree) -> tuple[chex.ArrayTree, chex.ArrayTree]:
        weights, values = flatten_dict(params), flatten_dict(stats)
        for *place, name in list(values):
            if name == "var" and (*place, "scale") in weights:
                factor = batch_norm_factor(values[*place, "var"], weights[*place, "scale"])
                values[*place, "factor"] = factor
        for path, leaf in weights.items():
            if cast_kernels and compute is not None and path[-1] == "kernel" and leaf.ndim == 4:
                weights[path] = leaf.astype(compute)
        return unflatten_dict(weights), unflatten_dict(values)

    found = Model(init, predict, training_pass, features, train_features)
    return found._replace(ready=ready, joint=True) if accelerator else found


def _with_features(network: Network, images: chex.Array, train: bool) -> tuple[chex.Array, chex.Array]:
    """Returns the logits of a network, and the features from which they are made."""
    features = network.backbone(images, train)
    return network.classifier(features, train), features


def _in_one_pass(call: Callable[..., Any], args: Any, options: Any, context: Any) -> Any:
    """Calls a module's method; batch norm normalises in one pass."""
    if isinstance(context.module, BatchNorm) and context.method_name == "normalised":
        x, scale, bias, near = args
        return normalised_in_one_pass(x, scale, bias, near, context.module.axis_name)
    return call(*args, **options)


def _refuse_running_values(call: Callable[..., Any], args: Any, options: Any, context: Any) -> Any:
    """Calls a module's method; raises a ``ValueError`` for flax's batch norm in a training pass."""
    module = context.module
    if isinstance(module, nn.BatchNorm) and context.method_name == "__call__":
        fixed = nn.merge_param(
            "use_running_average",
            module.use_running_average,
            args[1] if len(args) > 1 else options.get("use_running_average"),
        )
        if not fixed:
            raise ValueError(
                f"{module.name} is flax's nn.BatchNorm, which leaves running values in place of moments; "
                "use robal_jax.models.BatchNorm"
            )
    return call(*args, **options)
