"""Checkpoints: written by Orbax, asynchronously, each with a digest that is verified when it is read.

Orbax writes a checkpoint under a temporary name and renames it when complete, so a killed process leaves
none half written. It does not notice a bit that changed on the disk afterwards; the sha256 over all arrays
that stands in the checkpoint's metadata does. The state is the same on every device, so what is saved are
host copies: a checkpoint can be read whatever the devices it was made on. All processes of a job save
together and read what the others read.

This is the only module that knows Orbax.
"""

import hashlib
import json
import pathlib
import shutil
import types
from collections.abc import Callable
from typing import Any, Generic, NamedTuple, TypeVar

import chex
import flax.traverse_util
import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from robal_jax.errors import InputError, one_line
from robal_jax.storage.files import write_whole
from robal_jax.storage.names import CHECKPOINTS

T = TypeVar("T")

FILES = "files.json"  # beside Orbax's own files: their digests

# Bytes that a checkpoint takes beside its arrays, and for each of them: names, types, digests. Measured:
# 33 kB for 46 arrays, 1.1 MB for 1000.
OVERHEAD, OVERHEAD_EACH = 2**16, 2**11


class Found(NamedTuple, Generic[T]):
    """A checkpoint that was read: its arrays, its folder, and the sha256 of the arrays."""

    tree: T
    path: pathlib.Path
    sha256: str


class DamagedCheckpointError(Exception):
    """A checkpoint cannot be read, or is not what was written."""


def digest(tree: chex.ArrayTree) -> str:
    """Sha256 of all arrays of a tree: names, types, shapes and bytes, in the order of the names."""
    sha = hashlib.sha256()
    for name, array in sorted(_flat(_host(tree)).items()):
        sha.update(f"{name} {array.dtype} {array.shape}\n".encode())
        sha.update(np.ascontiguousarray(array).tobytes())
    return sha.hexdigest()


def _host(tree: chex.ArrayTree) -> dict[str, Any]:
    """Nested dictionaries of NumPy arrays, whatever containers the tree is made of."""
    return jax.tree.map(np.asarray, flax.serialization.to_state_dict(jax.device_get(tree)))


def _flat(tree: dict[str, Any]) -> dict[str, Any]:
    return flax.traverse_util.flatten_dict(tree, sep="/")


def restore(path: pathlib.Path, like: T, *, partial: bool = False) -> tuple[T, str]:
    """Reads one checkpoint and verifies it.

    Args:
      path: the checkpoint's own folder.
      like: a tree of the same structure, shapes and types.
      partial: whether ``like`` is a dictionary of some of the checkpoint's parts (``params`` and ``stats``,
        say); the other parts (the optimiser's state) may then be anything, or missing.

    Returns:
      The tree (NumPy arrays in the containers of ``like``), and its sha256.

    Raises:
      DamagedCheckpointError: it cannot be read, or its digest is not the one that was written.
      InputError: it is a checkpoint of something else: a name, shape or type differs.
    """
    tree, sha256 = read(path)
    if partial:
        tree = {name: part for name, part in tree.items() if name in flax.serialization.to_state_dict(like)}
    found = _flat(tree)
    wanted = {k: v for k, v in _flat(flax.serialization.to_state_dict(like)).items() if hasattr(v, "shape")}
    for name in sorted({*wanted, *found}):
        have, want = (
            f"{tree[name].dtype}{list(tree[name].shape)}" if name in tree else "nothing"
            for tree in (found, wanted)
        )
        if have != want:
            raise InputError(
                f"checkpoint {path} is of another model: it has {have} for {name} where the config's "
                f"model has {want}; evaluate it with the config it was trained with"
            )
    return flax.serialization.from_state_dict(like, _with_empty(tree, like)), sha256


def read(path: pathlib.Path) -> tuple[dict[str, Any], str]:
    """Reads all arrays of one checkpoint, whatever it is of, and verifies them.

    Args:
      path: the checkpoint's own folder.

    Returns:
      Nested dictionaries of NumPy arrays, and their sha256.

    Raises:
      DamagedCheckpointError: it cannot be read, or its digest is not the one that was written.
    """
    path = path.absolute()
    try:
        _verify_files(path)
        written = (ocp.metadata(path).custom_metadata or {})["sha256"]
        with _alone():
            tree = ocp.load(path)
    except DamagedCheckpointError:
        raise
    except Exception as error:  # Orbax and TensorStore raise whatever their layers raise
        raise DamagedCheckpointError(one_line(error)) from error
    found = digest(tree)
    if found != written:
        raise DamagedCheckpointError(f"its sha256 is {found[:12]}…, but {written[:12]}… was written")
    return tree, found


def read_latest(folder: pathlib.Path) -> Found[dict[str, Any]]:
    """:func:`read` of a run's newest checkpoint, or of the one checkpoint that the folder is.

    Raises:
      InputError: there is no checkpoint, or it is damaged.
    """
    found = steps(folder / CHECKPOINTS)
    path = folder / CHECKPOINTS / str(found[-1]) if found else folder
    if not path.is_dir() or (not found and not path.name.isdigit()):
        raise InputError(f"no run or checkpoint {folder}; train it first, or name another")
    try:
        tree, sha256 = read(path)
        return Found(tree, path, sha256)
    except DamagedCheckpointError as error:
        raise InputError(f"checkpoint {path} is damaged ({error}); name another") from error


def _file_digests(path: pathlib.Path) -> dict[str, str]:
    files = (file for file in sorted(path.rglob("*")) if file.is_file() and file.name != FILES)
    return {str(file.relative_to(path)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def _alone() -> ocp.Context:
    """Orbax reads in this process without waiting for the job's others.

    They must all read, though, what one of them does: Orbax numbers its operations, and tells one save of all
    processes from another by that.
    """
    context = ocp.Context()
    if jax.process_count() > 1:
        context.multiprocessing.primary_host = jax.process_index()
        context.multiprocessing.active_processes = {jax.process_index()}
    return context


def _verify_files(path: pathlib.Path) -> None:
    """Compares the files with their digests, so that TensorStore never has to read a damaged one.

    A process that was killed just after a save leaves no list of them; the arrays' own digest then decides.
    """
    if (path / FILES).exists():
        written, found = json.loads((path / FILES).read_text()), _file_digests(path)
        changed = sorted(name for name in written if found.get(name) != written[name])
        if changed:
            raise DamagedCheckpointError(f"{changed[0]} is not what was written")


def _with_empty(tree: dict[str, Any], like: Any) -> dict[str, Any]:
    """Puts back the empty containers (an optimiser's parts without state) that a checkpoint leaves out."""
    keep = {"keep_empty_nodes": True}
    full = flax.traverse_util.flatten_dict(flax.serialization.to_state_dict(like), **keep)
    full.update(flax.traverse_util.flatten_dict(tree))
    return flax.traverse_util.unflatten_dict(full)


def steps(folder: pathlib.Path) -> list[int]:
    """Steps of the complete checkpoints in a folder, ascending."""
    if not folder.is_dir():
        return []
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit() and path.is_dir())


def restore_latest(
    folder: pathlib.Path,
    like: T,
    *,
    on_damage: Callable[[pathlib.Path, str], None],
    partial: bool = False,
) -> Found[T] | None:
    """Reads the newest checkpoint that is whole.

    Args:
      folder: holds one folder a step.
      like: see :func:`restore`.
      on_damage: called with each damaged checkpoint that was passed over, and the reason.
      partial: see :func:`restore`.

    Returns:
      What was found; None where there is no checkpoint at all.

    Raises:
      InputError: there are checkpoints, but all are damaged, or the newest whole one is of another model.
    """
    found = steps(folder)
    for step in reversed(found):
        path = folder / str(step)
        try:
            tree, sha256 = restore(path, like, partial=partial)
            return Found(tree, path, sha256)
        except DamagedCheckpointError as error:
            on_damage(path, str(error))
    if found:
        raise InputError(
            f"every checkpoint in {folder} is damaged; move the folder away to start from step 0"
        )
    return None


class Saver:
    """Writes checkpoints in the background, keeping the newest ones; a context manager."""

    def __init__(self, folder: pathlib.Path, keep: int) -> None:
        self._folder = folder.absolute()
        self._checkpointer = ocp.training.Checkpointer(
            self._folder,
            preservation_policy=ocp.training.preservation_policies.LatestN(keep),
            cleanup_tmp_directories=True,
        )
        self._pending: tuple[Any, pathlib.Path] | None = None

    def save(self, step: int, state: chex.ArrayTree) -> tuple[pathlib.Path, str]:
        """Starts writing ``state`` as checkpoint ``step``; returns its folder and sha256.

        Raises:
          InputError: there is no room for it, or the one before could not be written.
        """
        self.wait()
        host = _host(state)
        self._check_room([array.nbytes for array in _flat(host).values()])
        sha256 = digest(host)
        saving = self._checkpointer.save_async(step, host, force=True, custom_metadata={"sha256": sha256})
        path = self._folder / str(step)
        self._pending = saving, path
        return path, sha256

    def _check_room(self, sizes: list[int]) -> None:
        """Refuses to begin what cannot be ended: Orbax tells of a full disk in pages of tracebacks."""
        free = shutil.disk_usage(self._folder).free
        needed = sum(sizes) + OVERHEAD + OVERHEAD_EACH * len(sizes)
        if free < needed:
            raise InputError(
                f"no room for a checkpoint in {self._folder}: it takes {needed / 2**20:.1f} MiB, "
                f"{free / 2**20:.1f} MiB are free; those before it are whole, and the same command goes on "
                "from the newest once there is room"
            )

    def wait(self) -> None:
        """Waits until what was started is on the disk.

        Raises:
          InputError: it could not be written; the checkpoints before it are untouched.
        """
        try:
            if self._pending is not None:
                saving, path = self._pending
                saving.result()
                if jax.process_index() == 0:
                    write_whole(path / FILES, json.dumps(_file_digests(path)).encode())
        except Exception as error:
            raise InputError(f"could not write a checkpoint to {self._folder}: {one_line(error)}") from error
        finally:
            self._pending = None

    def __enter__(self) -> "Saver":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: types.TracebackType | None
    ) -> None:
        try:
            self.wait()
            self._checkpointer.close()
        except Exception:
            if kind is None:  # else Orbax repeats what has been said
                raise
