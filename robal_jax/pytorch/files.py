"""TODO pytorch.files."""

import pathlib
import re
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from robal_jax.errors import InputError, one_line
from robal_jax.storage.files import write_whole


def read_weights(path: pathlib.Path, entry: str = "") -> dict[str, np.ndarray]:
    """The state_dict in a file, whatever it is nested in, without the names of wrappers.

    Args:
      path: ``.safetensors``, or what ``torch.save`` wrote.
      entry: which of several state_dicts, as the message that lists them says.

    Returns:
      Arrays by name; the names begin where they begin to differ, that is, without 'module.' of DataParallel
      and 'model.module.' of the released code's files.

    Raises:
      InputError: no such file, or one that cannot be read, needs code to be executed, or holds no or
        several state_dicts.
    """
    if not path.is_file():
        raise InputError(f"no file {path}; give the weights with --weights")
    content = _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path)
    found = dict(_state_dicts(content, ""))
    if entry:
        found = {place: value for place, value in found.items() if place == entry}
    if not found:
        keys = ", ".join(map(str, list(content)[:10])) if isinstance(content, Mapping) else type(content)
        what = f"state_dict {entry!r}" if entry else "state_dict (a mapping of names to tensors)"
        raise InputError(f"no {what} in {path}; it holds: {keys}")
    if len(found) > 1:
        raise InputError(
            f"{path} holds several state_dicts: {', '.join(found)}; choose one with "
            f"--entry={next(iter(found))}"
        )
    (state_dict,) = found.values()
    return _without_wrappers({name: _array(value) for name, value in state_dict.items()})


def write_weights(path: pathlib.Path, state_dict: Mapping[str, np.ndarray], metadata: dict[str, str]) -> None:
    """Writes a ``.safetensors`` file, whole or not at all.

    Raises:
      InputError: it cannot be written, or the package safetensors is missing.
    """
    content = _safetensors().save(dict(state_dict), metadata)
    try:
        write_whole(path, content)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}") from error


def _safetensors() -> Any:
    try:
        import safetensors.numpy
    except ImportError as error:
        raise InputError(
            "a .safetensors file needs the package safetensors: pip install 'robal_jax[torch]'"
        ) from error
    return safetensors.numpy


def _read_safetensors(path: pathlib.Path) -> Any:
    library = _safetensors()
    try:
        return library.load_file(path)
    except Exception as error:  # its own SafetensorError, and OSError, TypeError, ...
        raise InputError(
            f"cannot read {path} ({one_line(error)}); it is damaged or no .safetensors file"
        ) from error


def _read_torch(path: pathlib.Path) -> Any:
    """What ``torch.save`` wrote, if it is tensors and plain values only: nothing else is unpickled."""
    try:
        import torch
    except ImportError as error:
        raise InputError(
            f"reading {path} needs PyTorch: pip install 'robal_jax[torch]'; or make it a .safetensors file"
        ) from error
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 6):
        raise InputError(  # weights_only could be got round before: CVE-2025-32434
            f"PyTorch {torch.__version__} does not read files safely; install 2.6 or newer"
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of old pickle protocols and storage types
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever pickle, zipfile and PyTorch's own reader raise
        code = re.search(r"GLOBAL ([\w.]+)", str(error))
        if code:
            raise InputError(
                f"{path} holds {code[1]} and not only tensors; to read it would execute code that the file "
                "names, so it was not read. Where you trust it, write its tensors to a new file: "
                "torch.save(model.state_dict(), FILE)"
            ) from error
        raise InputError(
            f"cannot read {path} ({one_line(error)}); it is damaged or no file of torch.save"
        ) from error


def _state_dicts(tree: Any, place: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every mapping of names of weights to tensors in a tree of mappings, by its place: 'ema.model'."""
    if not isinstance(tree, Mapping):
        return
    tensors = {key: value for key, value in tree.items() if isinstance(key, str) and hasattr(value, "dtype")}
    if any(name.endswith(".weight") for name in tensors):
        yield place, tensors
        return
    for key, value in tree.items():
        yield from _state_dicts(value, f"{place}.{key}" if place else str(key))


def _without_wrappers(state_dict: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    while len({name.partition(".")[0] for name in state_dict}) == 1 and all(
        "." in name for name in state_dict
    ):
        state_dict = {name.partition(".")[2]: value for name, value in state_dict.items()}
    return state_dict


def _array(value: Any) -> np.ndarray:
    """A NumPy array of a tensor; NumPy has no bfloat16 of its own, and all of it are float32 numbers."""
    if hasattr(value, "detach"):
        value = value.detach()
        value = (value.float() if str(value.dtype) == "torch.bfloat16" else value).numpy()
    return np.asarray(value, np.float32) if value.dtype.name == "bfloat16" else value
