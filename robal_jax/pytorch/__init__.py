"""TODO pytorch."""

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
