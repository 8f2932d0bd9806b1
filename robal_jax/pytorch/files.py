"""Files of weights: reading .safetensors and .pt without executing anything in them, writing .safetensors."""

import json
import pathlib
import re
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import safetensors.numpy

from robal_jax.errors import InputError, one_line
from robal_jax.pytorch.foreign import foreign
from robal_jax.pytorch.names import IGNORED, STANDARDISES, channels_first
from robal_jax.storage.files import write_whole

FLATTENED = "flattened"  # key of a file's metadata: the order in which linear layers read an image
EXPORTED = "checkpoint_sha256"  # key of the metadata of every export


def read_weights(path: pathlib.Path, entry: str = "") -> dict[str, np.ndarray]:
    """Reads the state_dict of a file, at any depth, without the names of wrappers.

    Args:
      path: a ``.safetensors`` file, or one that ``torch.save`` wrote.
      entry: which of several state_dicts, by the name in the message that lists them.

    Returns:
      Arrays by name. Beginnings that all names share are removed: 'module.' of DataParallel,
      'model.module.' in the files of the released code. Files that robal_jax 0.1.0 exported come in the order
      of PyTorch, which they lacked.

    Raises:
      InputError: there is no such file, it cannot be read without executing code, or it holds no or several
        state_dicts.
    """
    if path.is_dir():
        raise InputError(f"{path} is a folder; name the file of weights in it")
    if not path.is_file():
        if ":/" in str(path):
            raise InputError(f"{path} is an address; download the file, and name that")
        raise InputError(f"no file {path}; correct the name of the weights' file")
    if not _has_header(path) and (kind := foreign(path)):
        raise InputError(f"{path} is {kind}")
    content, metadata = _read_safetensors(path) if _is_safetensors(path) else (read_torch(path), {})
    found = dict(_state_dicts(content, ""))
    if entry:
        found = {place: value for place, value in found.items() if place == entry}
    if not found:
        keys = ", ".join(map(str, list(content)[:10])) if isinstance(content, Mapping) else type(content)
        what = f"state_dict {entry!r}" if entry else "state_dict (a mapping of names to tensors)"
        raise InputError(f"no {what} in {path}, which holds {keys}; name another file or entry")
    if len(found) > 1:
        raise InputError(
            f"{path} holds several state_dicts: {', '.join(found)}; choose one, such as "
            f"entry={next(iter(found))}"
        )
    (state_dict,) = found.values()
    arrays = _without_wrappers({name: _array(path, name, value) for name, value in state_dict.items()})
    return _in_pytorch_order(arrays) if EXPORTED in metadata and FLATTENED not in metadata else arrays


def write_weights(path: pathlib.Path, state_dict: Mapping[str, np.ndarray], metadata: dict[str, str]) -> None:
    """Writes a ``.safetensors`` file, whole or not at all.

    Raises:
      InputError: the file cannot be written.
    """
    content = _in_order(safetensors.numpy.save(dict(state_dict), metadata | {FLATTENED: "c, h, w"}))
    try:
        write_whole(path, content)
    except OSError as error:
        raise InputError(f"cannot write {path} ({error.strerror}); choose another file") from error


def _in_order(content: bytes) -> bytes:
    """Sorts the metadata of a ``.safetensors`` file, whose order is random, for equal bytes each time."""
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the arrays begin at a multiple of 8
    return len(text).to_bytes(8, "little") + text + content[start:]


def _has_header(path: pathlib.Path) -> bool:
    """Returns whether a file begins like a ``.safetensors`` file: a header's length, then its JSON."""
    with path.open("rb") as file:
        start = file.read(9)
    return start[8:] == b"{" and int.from_bytes(start[:8], "little") < 2**40  # eight letters are more


def _is_safetensors(path: pathlib.Path) -> bool:
    """Returns whether the content is that of a ``.safetensors`` file, or else the name."""
    with path.open("rb") as file:
        of_torch = file.read(2) in (b"PK", b"\x80\x02")  # a zip archive or a pickle
    return _has_header(path) or (path.suffix.lower() == ".safetensors" and not of_torch)


def _read_safetensors(path: pathlib.Path) -> tuple[Any, dict[str, str]]:
    """Reads the arrays and the metadata of a ``.safetensors`` file."""
    try:
        with safetensors.safe_open(path, "numpy") as file:
            metadata = file.metadata() or {}
        return safetensors.numpy.load_file(path), metadata
    except Exception as error:  # its own SafetensorError, and OSError, TypeError, ...
        raise InputError(
            f"cannot read {path} ({one_line(error)}); give an undamaged .safetensors file"
        ) from error


def read_torch(path: pathlib.Path) -> Any:
    """Reads tensors and plain values that ``torch.save`` wrote; nothing else is unpickled."""
    try:
        import torch
    except ImportError as error:
        raise InputError(
            f"reading {path} needs PyTorch; pip install 'robal_jax[torch]', or give a .safetensors file"
        ) from error
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 6):
        raise InputError(  # older versions execute code despite weights_only: CVE-2025-32434
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
                f"{path} contains {code[1]}, which can only be loaded by executing code; it was not loaded: "
                "if you trust the file, write its tensors to a new one with "
                "torch.save(model.state_dict(), FILE)"
            ) from error
        why = one_line(error).split(". ")[0]  # what follows is advice that is not ours
        raise InputError(
            f"cannot read {path} ({why}); give an undamaged file that torch.save wrote"
        ) from error


def _state_dicts(tree: Any, place: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields every mapping of names to tensors in a tree of mappings, by its place, such as 'ema.model'."""
    if not isinstance(tree, Mapping):
        return
    tensors = {key: value for key, value in tree.items() if isinstance(key, str) and hasattr(value, "dtype")}
    if any(name.endswith(".weight") for name in tensors):
        yield place, tensors
        return
    for key, value in tree.items():
        yield from _state_dicts(value, f"{place}.{key}" if place else str(key))


def _without_wrappers(state_dict: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Removes the beginnings that all names share, except those of buffers that only a wrapper has."""
    buffers = (*IGNORED, *STANDARDISES)
    while True:
        inner = [name for name in state_dict if name.split(".")[-1] not in buffers]
        first = {name.partition(".")[0] for name in inner}
        if len(first) != 1 or not all("." in name for name in inner):
            return state_dict
        state_dict = {name.removeprefix(f"{min(first)}."): value for name, value in state_dict.items()}


def _in_pytorch_order(state_dict: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Corrects a file that robal_jax 0.1.0 exported: the small CNN's ``fc`` read images as (h, w, c)."""
    convolutions = [name for name in state_dict if re.fullmatch(r"backbone\.conv\d+\.weight", name)]
    name = "backbone.fc.weight"
    if name not in state_dict or not convolutions:
        return state_dict
    last = max(convolutions, key=lambda convolution: int(re.sub(r"\D", "", convolution)))
    return state_dict | {name: channels_first(state_dict[name], len(state_dict[last]))}


def _array(path: pathlib.Path, name: str, value: Any) -> np.ndarray:
    """Returns a tensor as a NumPy array; bfloat16, which NumPy lacks, becomes float32 without loss."""
    try:
        if hasattr(value, "detach"):
            value = value.detach()
            value = (value.float() if str(value.dtype) == "torch.bfloat16" else value).numpy()
    except (TypeError, RuntimeError, NotImplementedError) as error:  # sparse, quantised, without values
        raise InputError(
            f"cannot read {name} in {path} ({one_line(error)}); store dense tensors of float32"
        ) from error
    return np.asarray(value, np.float32) if value.dtype.name == "bfloat16" else value
