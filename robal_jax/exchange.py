"""Weights of files as runs, and weights of runs as files.

What :func:`import_weights` and :func:`write_run` write is evaluated like a run trained here;
:func:`export_weights` writes what PyTorch loads.
"""

import collections
import hashlib
import json
import pathlib
from collections.abc import Mapping
from functools import partial
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from robal_jax import builder, cli, pytorch
from robal_jax.averages import Weights
from robal_jax.data.sources import SHAPES
from robal_jax.devices import hosts
from robal_jax.errors import InputError
from robal_jax.storage import buckets, checkpoints
from robal_jax.storage.claims import check_run
from robal_jax.storage.config_file import to_json
from robal_jax.storage.files import reason, write_whole
from robal_jax.storage.names import CHECKPOINTS, CONFIG, IMPORT
from robal_jax.storage.user_code import code_of
from robal_jax.storage.workdir import imported_from, versions
from robal_jax.training import TrainState


def data_shape(config: ConfigDict) -> tuple[int, tuple[int, ...]]:
    """Returns the number of classes and the shape of an image; reads data that is not in ``SHAPES``."""
    if config.data.name in SHAPES:
        return SHAPES[config.data.name]
    data = builder.dataset(config)
    return len(data.class_counts), data.test_images.shape[1:]


def import_weights(config: ConfigDict, weights: pathlib.Path, workdir: pathlib.Path, entry: str = "") -> None:
    """Writes a run: its config, ``import.json`` (what was imported) and one checkpoint, that of step 0.

    Args:
      config: its model and head must be those of the weights.
      weights: file of a state_dict.
      workdir: folder of a new run.
      entry: which state_dict of the file, see :func:`robal_jax.pytorch.read_weights`.

    Raises:
      InputError: the file, the config or the folder cannot be used.
    """
    sha256 = hashlib.sha256(weights.read_bytes()).hexdigest() if weights.is_file() else ""
    if is_there(workdir, sha256):
        raise InputError(f"workdir {workdir} holds a run already; choose another workdir")
    builder.validate(config)
    num_classes, image_shape = data_shape(config)
    # The values of the class counts change neither model nor optimizer state.
    model = builder.model(
        config, np.ones(num_classes, int), platform=jax.default_backend(), precision="highest"
    )
    images = jax.ShapeDtypeStruct((1, *image_shape), np.float32)
    like = Weights(*jax.eval_shape(model.init, jax.random.key(0), images))
    state_dict = pytorch.read_weights(weights, entry)
    found, network, reasons = converted(config, state_dict, like)
    origin = {
        "weights": str(weights.absolute()),
        "weights_sha256": sha256,
        "network": network.name,
        "ignored": reasons,
    }
    path, digest = write_run(config, found, workdir, origin)
    left_out = ", ".join(f"{count} {reason}" for reason, count in reasons.items()) or "nothing"
    print(f"{weights}: a {network.name}, {network.num_classes} classes")
    print(f"imported {len(jax.tree.leaves(found))} arrays; ignored: {left_out}")
    print(f"checkpoint {path} sha256 {digest}")
    print(cli.as_started(f"evaluate it: python experiments/evaluate.py --workdir={workdir}"))


def converted(
    config: ConfigDict, state_dict: Mapping[str, np.ndarray], like: Weights
) -> tuple[Weights, pytorch.Architecture, dict[str, int]]:
    """Converts a PyTorch state_dict into the weights of a config's network.

    Args:
      config: a valid one.
      state_dict: arrays by PyTorch name.
      like: the weights, or their shapes and types.

    Returns:
      The weights, NumPy arrays of the types of ``like``; the network as the names tell it; and how many
      arrays were ignored, by reason.

    Raises:
      InputError: the state_dict is of another network.
    """
    network = pytorch.architecture(pytorch.shapes(state_dict))
    pytorch.check_architecture(network, pytorch.architecture(pytorch.torch_shapes(*like)))
    prefixes = network.prefixes(*like)
    standardisation = builder.standardisation(config)
    found = Weights(*pytorch.from_state_dict(state_dict, *like, prefixes, standardisation))
    weights = jax.tree.map(lambda array, to: np.asarray(array, to.dtype, order="C"), found, like)
    wanted = pytorch.torch_shapes(*like, prefixes)
    ignored = pytorch.ignored(state_dict, wanted, standardisation)
    return weights, network, dict(sorted(collections.Counter(ignored.values()).items()))


def check_new(workdir: pathlib.Path) -> None:
    """Checks that a folder can become that of a run with imported weights.

    Raises:
      InputError: it holds a run already, or something that would be lost, or it is in a bucket.
    """
    if url := buckets.url_of(workdir):
        raise InputError(
            f"{url} is in a bucket; name a folder of this machine as --workdir (an evaluation may have its "
            "--folder in a bucket)"
        )
    if (workdir / CONFIG).exists() or (workdir / CHECKPOINTS).exists():
        raise InputError(f"workdir {workdir} holds a run already; choose another workdir")
    check_run(workdir)


def is_there(workdir: pathlib.Path, weights_sha256: str) -> bool:
    """Returns whether a folder is the whole run of these weights, and not what a killed job left of it.

    Raises:
      InputError: it is something else, see :func:`check_new`.
    """
    ours = (imported_from(workdir) or {}).get("weights_sha256") == weights_sha256
    if not ours:
        check_new(workdir)
    return ours and (workdir / CONFIG).exists() and bool(checkpoints.steps(workdir / CHECKPOINTS))


def write_run(
    config: ConfigDict,
    weights: Weights,
    workdir: pathlib.Path,
    origin: Mapping[str, Any],
    *,
    averaged: bool = False,
) -> tuple[pathlib.Path, str]:
    """Makes a run of weights and a config: a checkpoint of step 0. All processes of a job call it together.

    Args:
      config: a valid one.
      weights: of its network.
      workdir: folder of the run, see :func:`check_new`.
      origin: where the weights are from, JSON values, for ``import.json``.
      averaged: whether the weights are an average; then they are the checkpoint's average, and it has no
        others.

    Returns:
      The folder of the checkpoint, and its sha256.

    Raises:
      InputError: the folder cannot be written to.
    """
    optimizer, _ = builder.optimizer(config, 1)  # the length of an epoch does not change its state
    about = {**origin, **versions(), **code_of(config, "training")}
    hosts.by_first(partial(_write_files, config, workdir, about))
    current = Weights({}, {}) if averaged else weights
    average = weights._asdict() if averaged else {}
    opt_state = optimizer.init(current.params) if current.params else {}  # of weights that train on
    state = TrainState(jnp.int32(0), *current, opt_state, average=average)
    with checkpoints.Saver(workdir / CHECKPOINTS, 1) as saver:
        return saver.save(0, state)


def _write_files(config: ConfigDict, workdir: pathlib.Path, origin: Mapping[str, Any]) -> None:
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        write_whole(workdir / IMPORT, (json.dumps(origin, indent=2) + "\n").encode())
        write_whole(workdir / CONFIG, to_json(config).encode())
    except OSError as error:
        raise InputError(
            f"cannot write to workdir {workdir} ({reason(error, workdir)}); choose another workdir"
        ) from error


def export_weights(
    out: pathlib.Path,
    config: ConfigDict,
    params: chex.ArrayTree,
    stats: chex.ArrayTree,
    origin: Mapping[str, str],
    prefixes: Mapping[str, str] | None = None,
) -> dict[str, np.ndarray]:
    """Writes weights as a PyTorch state_dict, whole or not at all, with the config in the metadata.

    Args:
      out: a ``.safetensors`` file.
      config: of the run.
      params: trainable parameters.
      stats: running statistics.
      origin: 'checkpoint_sha256' and more, for the metadata.
      prefixes: beginnings of names, see :func:`robal_jax.pytorch.from_state_dict`; those of the released
        networks if None.

    Returns:
      The state_dict.

    Raises:
      InputError: the file cannot be written.
    """
    state_dict = pytorch.complete_state_dict(params, stats, prefixes, builder.standardisation(config))
    resolved = to_json(config)
    metadata = {
        "format": "pt",
        "method": config.method,
        "config": resolved,
        "config_sha256": hashlib.sha256(resolved.encode()).hexdigest(),
        **origin,
    }
    pytorch.write_weights(out, state_dict, metadata)
    return state_dict
