"""Weights of PyTorch networks: files, the names of a state_dict, and conversion in both directions.

- ``files``: reading and writing .safetensors and .pt files
- ``foreign``: what a file is that is neither
- ``names``: our variables from a state_dict and back: names, layouts, prefixes
- ``architecture``: which network a state_dict belongs to

A file is read without executing anything in it; only reading a ``.pt`` file needs PyTorch::

    state_dict = read_weights(pathlib.Path("epoch80.pt"))
    params, stats = model.init(key, images)                    # names and shapes of the arrays
    prefixes = architecture(shapes(state_dict)).prefixes(params, stats)
    params, stats = from_state_dict(state_dict, params, stats, prefixes)
"""

from robal_jax.pytorch.architecture import (
    RESNETS,
    Architecture,
    architecture,
    check_architecture,
)
from robal_jax.pytorch.files import read_weights, write_weights
from robal_jax.pytorch.names import (
    ARRAY_NAMES,
    FROZEN,
    IGNORED,
    LAST_LAYERS,
    LAYOUTS,
    Path,
    Shapes,
    Standardisation,
    complete_state_dict,
    from_state_dict,
    ignored,
    released_prefixes,
    shapes,
    to_state_dict,
    torch_name,
    torch_shapes,
)

__all__ = [
    "ARRAY_NAMES",
    "FROZEN",
    "IGNORED",
    "LAST_LAYERS",
    "LAYOUTS",
    "RESNETS",
    "Architecture",
    "Path",
    "Shapes",
    "Standardisation",
    "architecture",
    "check_architecture",
    "complete_state_dict",
    "from_state_dict",
    "ignored",
    "read_weights",
    "released_prefixes",
    "shapes",
    "to_state_dict",
    "torch_name",
    "torch_shapes",
    "write_weights",
]
