"""The folder of an evaluation: which evaluations may use it."""

import json
import pathlib
from collections.abc import Mapping
from typing import Any

from robal_jax.errors import InputError
from robal_jax.storage.config_file import NEUTRAL, flatten
from robal_jax.storage.names import RESULTS, UNFINISHED
from robal_jax.storage.unfinished import LATER, compared, read_identity

LISTED = 8  # differences that a message lists


def identity_in(folder: pathlib.Path) -> dict[str, Any] | None:
    """Returns what tells the evaluation in a folder from others, finished or not.

    None if there is none, or if its results are damaged.

    Raises:
      InputError: a file with the name of the results is somebody else's.
    """
    try:
        content = json.loads((folder / RESULTS).read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        parts = sorted((folder / UNFINISHED).glob("*.npz"))
        return next(filter(None, map(read_identity, parts)), None)
    except (ValueError, RecursionError):
        return None
    meta = content.get("meta") if isinstance(content, dict) else None
    if not isinstance(meta, dict):
        raise InputError(
            f"{folder / RESULTS} is not of an evaluation; name another folder, or move that file"
        )
    known = ("config", "checkpoint_sha256", "test_set_sha256", *LATER)
    return {**meta.get("identity", {}), **{name: meta[name] for name in known if name in meta}}


def belongs(folder: pathlib.Path, identity: Mapping[str, Any]) -> bool:
    """Returns whether a folder has the results of this evaluation, or results so damaged that nothing tells.

    Args:
      folder: of the evaluation.
      identity: JSON values on which the results depend.

    Returns:
      False if it is empty, or if the evaluation was interrupted and can be resumed.

    Raises:
      InputError: it has another evaluation, or somebody else's file, which would be lost.
    """
    there = identity_in(folder)
    changed = [] if there is None else _differences(identity, there)
    if changed:
        more = f"; and {len(changed) - LISTED} more" if len(changed) > LISTED else ""
        finished = (folder / RESULTS).exists()
        dropped = folder if finished else folder / UNFINISHED
        raise InputError(
            f"{folder} has {'an' if finished else 'an unfinished'} evaluation with other settings "
            f"({'; '.join(changed[:LISTED])}{more}); name another folder, or remove {dropped} to lose it"
        )
    return (folder / RESULTS).exists()


def _differences(identity: Mapping[str, Any], there: Mapping[str, Any]) -> list[str]:
    """Lists the values that differ, as lines ``field: this, there``."""
    fields = [flatten(compared(json.loads(json.dumps(one)), identity)) for one in (identity, there)]
    names = sorted({name for each in fields for name in each})
    filled = [flatten({"config": flatten(NEUTRAL)}) | each for each in fields]
    pairs = {name.removeprefix("config."): [each.get(name) for each in filled] for name in names}
    return [
        f"{name}: {_short(here)} here, {_short(other)} there"
        for name, (here, other) in pairs.items()
        if here != other
    ]


def _short(value: Any) -> str:
    """Returns a value for a message, a digest by its beginning."""
    return f"{value[:12]}…" if isinstance(value, str) and len(value) == 64 else repr(value)
