"""Import: python experiments/import_torch.py --weights=FILE.pt --config=configs/METHOD.py:DATA --workdir=DIR.

Makes a run's folder of the weights of a PyTorch network (RoBal's or AT-BSL's released files, or any
state_dict of a WideResNet or a CIFAR ResNet-18), which experiments/evaluate.py then evaluates. Nothing in the
file is executed, and the data set is not needed. --config.KEY=VALUE as in training.
"""

import collections
import hashlib
import json
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from ml_collections import ConfigDict

from robal_jax import cli
from robal_jax.errors import InputError

# Classes and image shape of the library's data sets, so that the data need not be at hand.
DATA_SHAPES = {
    "digits_lt": (10, (8, 8, 1)),
    "cifar10_lt": (10, (32, 32, 3)),
    "cifar100_lt": (100, (32, 32, 3)),
}


def data_shape(config: ConfigDict) -> tuple[int, tuple[int, ...]]:
    """Number of classes and shape of an image; data of the user's own are read."""
    from robal_jax import builder

    if config.data.name in DATA_SHAPES:
        return DATA_SHAPES[config.data.name]
    data = builder.dataset(config)
    return len(data.class_counts), data.test_images.shape[1:]


def import_weights(config: ConfigDict, weights: pathlib.Path, workdir: pathlib.Path, entry: str = "") -> None:
    """Writes the config, ``import.json`` (what was imported) and one checkpoint, of step 0.

    Args:
      config: its model and head must be those of the weights.
      weights: file of a state_dict.
      workdir: folder of a new run.
      entry: see torch_import.read_weights.

    Raises:
      InputError: the file, the config or the folder cannot be used.
    """
    import jax
    import jax.numpy as jnp
    import numpy as np

    from robal_jax import builder, pytorch
    from robal_jax.storage import checkpoints
    from robal_jax.storage.config_file import to_json
    from robal_jax.storage.files import write_whole
    from robal_jax.storage.workdir import versions
    from robal_jax.training import TrainState

    if (workdir / "config.json").exists() or (workdir / "checkpoints").exists():
        raise InputError(f"workdir {workdir} holds a run already; choose another with --workdir")
    builder.validate(config)
    num_classes, image_shape = data_shape(config)
    # Of the class counts only their number matters here, and of an epoch's length nothing.
    model = builder.model(config, np.ones(num_classes, int), precision="highest")
    optimizer, _ = builder.optimizer(config, 1)
    images = jax.ShapeDtypeStruct((1, *image_shape), np.float32)
    like_params, like_stats = like = jax.eval_shape(model.init, jax.random.key(0), images)

    state_dict = pytorch.read_weights(weights, entry)
    network = pytorch.architecture(pytorch.shapes(state_dict))
    pytorch.check_architecture(network, pytorch.architecture(pytorch.torch_shapes(like_params, like_stats)))
    prefixes = network.prefixes(like_params, like_stats)
    found = pytorch.from_state_dict(state_dict, like_params, like_stats, prefixes)
    params, stats = jax.tree.map(lambda array, to: np.asarray(array, to.dtype, order="C"), found, like)
    wanted = pytorch.torch_shapes(like_params, like_stats, prefixes)
    ignored = pytorch.ignored(state_dict, wanted)
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
        write_whole(workdir / "import.json", (json.dumps(origin, indent=2) + "\n").encode())
        write_whole(workdir / "config.json", to_json(config).encode())
    except OSError as error:
        raise InputError(f"cannot write to workdir {workdir}: {error.strerror}") from error
    with checkpoints.Saver(workdir / "checkpoints", 1) as saver:
        path, sha256 = saver.save(0, TrainState(jnp.int32(0), params, stats, optimizer.init(params)))
    left_out = ", ".join(f"{count} {reason}" for reason, count in reasons.items()) or "nothing"
    print(f"{weights}: a {network.name}, {network.num_classes} classes")
    print(f"imported {len(jax.tree.leaves((params, stats)))} arrays; ignored: {left_out}")
    print(f"checkpoint {path} sha256 {sha256}")
    print(f"evaluate it: python experiments/evaluate.py --workdir={workdir}")


def main(arguments: list[str]) -> None:
    """Flags to import_weights()."""
    texts = {
        "weights": "a .safetensors file, or one that torch.save wrote",
        "config": "config file and data set, configs/robal_n.py:cifar10_lt",
        "workdir": "folder of the run, a new one",
        "entry": "which state_dict, if the file holds several",
    }
    arguments, overrides = cli.split_overrides(arguments)
    values = cli.parse(arguments, texts, __doc__)
    for name in ("weights", "config", "workdir"):
        if not values[name]:
            raise InputError(f"--{name} is missing; usage: {__doc__}")
    config = cli.apply_overrides(cli.load_config(values["config"]), overrides)
    import_weights(config, pathlib.Path(values["weights"]), pathlib.Path(values["workdir"]), values["entry"])


if __name__ == "__main__":
    cli.run(main)
