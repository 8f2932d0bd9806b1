"""The code of the user's own functions, which a config names as ``module:function``."""

import hashlib
import importlib.util
import json
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

from ml_collections import ConfigDict

from robal_jax.storage.config_file import evaluation_fields, flatten
from robal_jax.storage.files import json_object, write_whole
from robal_jax.storage.names import IMPORT, VERSIONS

CODE = "code_sha256"

RESUMED = "resumed_code_sha256"  # of the last resume with changed code


_MODEL = ("data.", "model.", "head.", "evaluation.head.")

PARTS: dict[str, Callable[[str], bool]] = {
    "training": lambda field: not field.startswith("evaluation.") or field.startswith(_MODEL),
    "model": lambda field: field.startswith(_MODEL),
    "evaluation": lambda field: True,
}
"""Fields that matter to a training, to what its model computes, and to an evaluation of given weights."""


def code_of(config: ConfigDict, part: str) -> dict[str, dict[str, str]]:
    """Returns the sha256 of the source of each module of the user's own that a config names.

    What these modules import in turn is not looked at. A module without a source, such as a notebook, is left
    out.

    Args:
      config: a valid one.
      part: a key of ``PARTS``.

    Returns:
      ``{CODE: {module: sha256}}``; {} if there are none, so that what is stored is as without user code.
    """
    fields = json.loads(config.to_json())
    flat = evaluation_fields(fields) if part == "evaluation" else flatten(fields)
    ends = (".name", ".augmentation", ".autoattack")
    named = [value for field, value in flat.items() if field.endswith(ends) and PARTS[part](field)]
    functions = [name for value in named for name in str(value).split(",") if ":" in name]
    modules = sorted({name.partition(":")[0] for name in functions})
    own = {module: _sha256(module) for module in modules if module.partition(".")[0] != "robal_jax"}
    found = {module: sha256 for module, sha256 in own.items() if sha256}
    return {CODE: found} if found else {}


def _sha256(module: str) -> str:
    """Returns the sha256 of a module's source; '' if it has none that can be read."""
    try:
        spec: Any = importlib.util.find_spec(module)
        own = hasattr(spec.loader, "get_source")  # as all of Python's loaders, also that of a zip file
        source = spec.loader.get_source(module) if own else pathlib.Path(spec.origin).read_text()
        return hashlib.sha256(source.encode()).hexdigest()
    except Exception:  # none, compiled only, or a package that cannot be imported any more
        return ""


def changed_code(code: Mapping[str, Mapping[str, str]], workdir: pathlib.Path, since: str = "trained") -> str:
    """Says which modules have changed since a run was trained; '' if none has, or if nothing tells.

    Args:
      code: what :func:`code_of` returns today.
      workdir: folder of the run.
      since: 'trained' compares with the code of its last steps, 'started' with that of its first.
    """
    stored = json_object(workdir / VERSIONS) or json_object(workdir / IMPORT)
    there: dict[str, str] = {}
    for key in (CODE, RESUMED) if since == "trained" else (CODE,):
        there |= stored[key] if isinstance(stored.get(key), dict) else {}
    changed = [
        f"{module} (sha256 {here[:12]}… here, {str(there[module])[:12]}… there)"
        for module, here in code.get(CODE, {}).items()
        if there.get(module, here) != here
    ]
    return f"the code of {', '.join(changed)} has changed since the run {workdir} was {since}" * bool(changed)


def record_resume(code: Mapping[str, Mapping[str, str]], workdir: pathlib.Path) -> None:
    """Stores the code with which a training goes on, if that is not the code of its last steps."""
    if changed_code(code, workdir):
        content = json_object(workdir / VERSIONS) | {RESUMED: code[CODE]}
        write_whole(workdir / VERSIONS, (json.dumps(content, indent=2) + "\n").encode())


def warn_if_changed(config: ConfigDict, workdir: pathlib.Path, say: Callable[[str], None]) -> str:
    """Warns if the code of a run's model has changed since it was trained; returns :func:`changed_code`."""
    if changed := changed_code(code_of(config, "model"), workdir):
        say(
            f"warning: {changed}, so the model may be another one than was trained; restore that code, or "
            "train again"
        )
    return changed
