"""Models from elsewhere as runs: what :func:`import_weights` writes is evaluated like a run trained here."""

import collections
import hashlib
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from robal_jax import builder, cli, pytorch
from robal_jax.errors import InputError
from robal_jax.storage import checkpoints
from robal_jax.storage.claims import check_run
from robal_jax.storage.config_file import to_json
from robal_jax.storage.files import reason, write_whole
from robal_jax.storage.names import CHECKPOINTS, CONFIG, IMPORT
from robal_jax.storage.workdir import versions
from robal_jax.training import TrainState

DATA_SHAPES = {
    "digits_lt": (10, (8, 8, 1)),
    "cifar10_lt": (10, (32, 32, 3)),
    "cifar100_lt": (100, (32, 32, 3)),
}
"""Number of classes and image shape of the library's data sets, so that an import needs no data."""


def data_shape(config: ConfigDict) -> tuple[int, tuple[int, ...]]:
    """Returns the number of classes and the shape of an image; reads data that is not in ``DATA_SHAPES``."""
    if config.data.name in DATA_SHAPES:
        return DATA_SHAPES[config.data.name]
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
    if (workdir / CONFIG).exists() or (workdir / CHECKPOINTS).exists():
        raise InputError(f"workdir {workdir} holds a run already; choose another workdir")
    check_run(workdir)
    builder.validate(config)
    num_classes, image_shape = data_shape(config)
    # The values of the class counts and the length of an epoch change neither model nor optimizer state.
    model = builder.model(
        config, np.ones(num_classes, int), platform=jax.default_backend(), precision="highest"
    )
    optimizer, _ = builder.optimizer(config, 1)
    images = jax.ShapeDtypeStruct((1, *image_shape), np.float32)
    like_params, like_stats = like = jax.eval_shape(model.init, jax.random.key(0), images)

    state_dict = pytorch.read_weights(weights, entry)
    network = pytorch.architecture(pytorch.shapes(state_dict))
    pytorch.check_architecture(network, pytorch.architecture(pytorch.torch_shapes(like_params, like_stats)))
    prefixes = network.prefixes(like_params, like_stats)
    standardisation = builder.standardisation(config)
    found = pytorch.from_state_dict(state_dict, like_params, like_stats, prefixes, standardisation)
    params, stats = jax.tree.map(lambda array, to: np.asarray(array, to.dtype, order="C"), found, like)
    wanted = pytorch.torch_shapes(like_params, like_stats, prefixes)
    ignored = pytorch.ignored(state_dict, wanted, standardisation)
    reasons = dict(sorted(collections.Counter(ignored.values()).items()))
    origin = {
        "weights": str(weights.absolute()),
        "weights_sha256": hashlib.sha256(weights.read_bytes()).hexdigest(),
        "network": network.name,
        "ignored": reasons,
        **versions(),
    }
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        write_whole(workdir / IMPORT, (json.dumps(origin, indent=2) + "\n").encode())
        write_whole(workdir / CONFIG, to_json(config).encode())
    except OSError as error:
        raise InputError(
            f"cannot write to workdir {workdir} ({reason(error, workdir)}); choose another workdir"
        ) from error
    with checkpoints.Saver(workdir / CHECKPOINTS, 1) as saver:
        path, sha256 = saver.save(0, TrainState(jnp.int32(0), params, stats, optimizer.init(params)))
    left_out = ", ".join(f"{count} {reason}" for reason, count in reasons.items()) or "nothing"
    print(f"{weights}: a {network.name}, {network.num_classes} classes")
    print(f"imported {len(jax.tree.leaves((params, stats)))} arrays; ignored: {left_out}")
    print(f"checkpoint {path} sha256 {sha256}")
    print(cli.as_started(f"evaluate it: python experiments/evaluate.py --workdir={workdir}"))
