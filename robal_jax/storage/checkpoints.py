"""Checkpoints: written by Orbax, asynchronously, each with a digest that is verified when it is read.

Orbax writes a checkpoint under a temporary name and renames it when it is complete, so a killed process
leaves no half-written checkpoint. Orbax does not notice a bit that changes on the disk afterwards, but the
sha256 of all arrays, kept in the checkpoint's metadata, does. The state is the same on every device, so host
copies are saved, and a checkpoint can be read on any number of devices. Of several processes the first one
writes, and each reads by itself.

This is the only module that knows Orbax.
"""

import contextlib
import hashlib
import json
import pathlib
import shutil
import tempfile
import types
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any, Generic, NamedTuple, TypeVar

import chex
import flax.traverse_util
import jax
import numpy as np
from orbax import checkpoint as orbax
from orbax.checkpoint import v1 as ocp

from robal_jax.devices import hosts
from robal_jax.errors import UNREACHABLE, InputError, one_line
from robal_jax.storage.files import write_whole
from robal_jax.storage.names import CHECKPOINTS, FILES

T = TypeVar("T")

Part = Callable[[dict[str, Any]], dict[str, Any]]
"""From the arrays of a checkpoint, nested dictionaries, to some of them."""

OnDamage = Callable[[pathlib.Path, str], None]
"""Receives the folder of a damaged checkpoint, and what is wrong with it."""

TEMPORARY = ".orbax-checkpoint-tmp"  # in names of folders that are not finished, or half removed

METADATA = "_CHECKPOINT_METADATA"  # a file of every checkpoint

# Orbax searches for files with patterns that begin with the folder, and TensorStore takes a backslash for a
# slash.
MISREAD = frozenset("[]*?\\")

# Bytes of a checkpoint besides its arrays (names, types, digests): per checkpoint and per array. Measured:
# 33 kB for 46 arrays, 1.1 MB for 1000.
OVERHEAD, OVERHEAD_EACH = 2**16, 2**11


class Found(NamedTuple, Generic[T]):
    """The arrays of a checkpoint, its folder, and the sha256 of the arrays."""

    tree: T
    path: pathlib.Path
    sha256: str


class DamagedCheckpointError(Exception):
    """A checkpoint cannot be read, or differs from what was written."""


def digest(tree: chex.ArrayTree) -> str:
    """Returns the sha256 of the arrays of a tree (names, types, shapes, bytes), in the order of the names."""
    sha = hashlib.sha256()
    for name, array in sorted(_flat(_host(tree)).items()):
        sha.update(f"{name} {array.dtype} {array.shape}\n".encode())
        sha.update(np.ascontiguousarray(array).tobytes())
    return sha.hexdigest()


def _host(tree: chex.ArrayTree) -> dict[str, Any]:
    """Returns a tree of any containers as nested dictionaries of NumPy arrays."""
    return jax.tree.map(np.asarray, flax.serialization.to_state_dict(jax.device_get(tree)))


def _flat(tree: dict[str, Any]) -> dict[str, Any]:
    return flax.traverse_util.flatten_dict(tree, sep="/")


def restore(path: pathlib.Path, like: T, *, part: Part | None = None) -> tuple[T, str]:
    """Reads one checkpoint and verifies it.

    Args:
      path: folder of the checkpoint.
      like: a tree of the same structure, shapes and types.
      part: from all arrays to those that ``like`` has, such as the parameters and statistics; None for all.
        All arrays are still read, because the digest covers all of them; those of other parts (the
        optimiser's state) are not compared with anything.

    Returns:
      The tree (NumPy arrays in the containers of ``like``), and the sha256 of the checkpoint.

    Raises:
      DamagedCheckpointError: it cannot be read, or its digest is not the one that was written.
      InputError: the folder is not that of a checkpoint; or it is a checkpoint of a different model: a name,
        shape or type differs.
    """
    tree, sha256 = read(path)
    tree = tree if part is None else part(tree)
    found = _flat(tree)
    wanted = {k: v for k, v in _flat(flax.serialization.to_state_dict(like)).items() if hasattr(v, "shape")}
    for name in sorted({*wanted, *found}):
        have, want = (
            f"{tree[name].dtype}{list(tree[name].shape)}" if name in tree else "nothing"
            for tree in (found, wanted)
        )
        if have != want:
            raise InputError(
                f"checkpoint {path} is of a different model: it has {have} for {name} where the config's "
                f"model has {want}; use the config it was trained with"
            )
    return flax.serialization.from_state_dict(like, _with_empty(tree, like)), sha256


def read(path: pathlib.Path) -> tuple[dict[str, Any], str]:
    """Reads all arrays of one checkpoint of any model, and verifies them.

    Args:
      path: folder of the checkpoint.

    Returns:
      Nested dictionaries of NumPy arrays, and their sha256.

    Raises:
      DamagedCheckpointError: it cannot be read, or its digest is not the one that was written.
      InputError: the folder is not that of a checkpoint.
      OSError: the drive cannot be read now; the checkpoint may be whole.
    """
    path = path.absolute()
    _check_is_checkpoint(path)
    try:
        _verify_files(path)
        with _plain(path) as plain:
            written = _written_digest(plain)
            with _alone():
                tree = ocp.load(plain)
    except (DamagedCheckpointError, InputError):
        raise
    except Exception as error:  # Orbax and TensorStore raise all kinds of errors
        if isinstance(error, OSError) and error.errno in UNREACHABLE:
            raise
        raise DamagedCheckpointError(one_line(error)) from error
    found = digest(tree)
    if found != written:
        raise DamagedCheckpointError(f"its sha256 is {found[:12]}…, but {written[:12]}… was written")
    return tree, found


def read_latest(folder: pathlib.Path, *, on_damage: OnDamage | None = None) -> Found[dict[str, Any]]:
    """:func:`read` of a run's newest checkpoint, or of the one checkpoint that the folder is, by any name.

    Args:
      folder: of a run or of a checkpoint.
      on_damage: if given, damaged checkpoints of a run are skipped, see :func:`restore_latest`.

    Raises:
      InputError: there is no checkpoint, or it is damaged; with ``on_damage``: all are.
    """
    run = steps(folder / CHECKPOINTS)
    if on_damage and (found := _newest_whole(folder / CHECKPOINTS, read, on_damage)):
        return found
    path = folder / CHECKPOINTS / str(run[-1]) if run else folder
    if not path.is_dir():
        raise InputError(f"no run or checkpoint {folder}; train it first, or name another")
    try:
        tree, sha256 = read(path)
        return Found(tree, path, sha256)
    except DamagedCheckpointError as error:
        raise InputError(f"checkpoint {path} is damaged ({error}); name another") from error


def previous_instead(say: Callable[[str], None]) -> OnDamage:
    """Returns what says to the user which damaged checkpoint is skipped, and why."""
    return lambda path, why: say(f"checkpoint {path} is damaged ({why}); passing it over")


def _check_is_checkpoint(path: pathlib.Path) -> None:
    """Raises if a folder is a run or has several checkpoints, or if nothing in it is of a checkpoint."""
    for folder in (path, path / CHECKPOINTS):
        if found := steps(folder):
            raise InputError(
                f"{path} is not a checkpoint but holds checkpoints; give one, such as "
                f"{folder / str(found[-1])}"
            )
    if not (path / METADATA).is_file() and not path.name.isdigit():
        raise InputError(
            f"{path} is not a checkpoint: it has no file {METADATA}; give a folder such as "
            "RUN/checkpoints/300"
        )


def _written_digest(path: pathlib.Path) -> str:
    """Returns the sha256 in the metadata of a checkpoint."""
    metadata = ocp.metadata(path).custom_metadata
    if not isinstance(metadata, dict) or "sha256" not in metadata:
        raise DamagedCheckpointError("it has no sha256: another program wrote or changed it")
    return str(metadata["sha256"])


@contextlib.contextmanager
def _plain(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """Gives a folder another name, a link, while its own has characters that are ``MISREAD``."""
    if not MISREAD & set(str(path)):
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="robal_jax-") as folder:
        if MISREAD & set(folder):
            raise InputError(
                f"neither {path} nor {folder} can be used; set TMPDIR to a folder without []*?\\"
            )
        link = pathlib.Path(folder, "link")
        link.symlink_to(path, target_is_directory=True)
        yield link


def _file_digests(path: pathlib.Path) -> dict[str, str]:
    files = (file for file in sorted(path.rglob("*")) if file.is_file() and file.name != FILES)
    return {str(file.relative_to(path)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def _alone() -> ocp.Context:
    """Lets Orbax read in this process without waiting for the other processes of the job."""
    context = ocp.Context()
    if jax.process_count() > 1:
        context.multiprocessing.primary_host = jax.process_index()
        context.multiprocessing.active_processes = {jax.process_index()}
    return context


def _verify_files(path: pathlib.Path) -> None:
    """Compares the files with their digests, so that TensorStore never has to read a damaged file.

    A process that was killed just after a save leaves no list of digests; then the digest of the arrays
    decides.
    """
    if (path / FILES).exists():
        written, found = json.loads((path / FILES).read_text()), _file_digests(path)
        changed = sorted(name for name in written if found.get(name) != written[name])
        if changed:
            raise DamagedCheckpointError(f"{changed[0]} is not what was written")


def _with_empty(tree: dict[str, Any], like: Any) -> dict[str, Any]:
    """Puts back the empty containers (parts of an optimiser without state) that a checkpoint leaves out."""
    keep = {"keep_empty_nodes": True}
    full = flax.traverse_util.flatten_dict(flax.serialization.to_state_dict(like), **keep)
    full.update(flax.traverse_util.flatten_dict(tree))
    return flax.traverse_util.unflatten_dict(full)


def steps(folder: pathlib.Path) -> list[int]:
    """Lists the steps of the complete checkpoints in a folder, ascending."""
    if not folder.is_dir():
        return []
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit() and path.is_dir())


def restore_latest(
    folder: pathlib.Path,
    like: T,
    *,
    on_damage: OnDamage,
    part: Part | None = None,
) -> Found[T] | None:
    """Reads the newest undamaged checkpoint.

    Args:
      folder: holds one folder per step.
      like: see :func:`restore`.
      on_damage: called with the path of each damaged checkpoint that was skipped, and the reason.
      part: see :func:`restore`.

    Returns:
      The checkpoint; None if there is none at all.

    Raises:
      InputError: all checkpoints are damaged, or the newest undamaged one is of a different model.
    """
    return _newest_whole(folder, partial(restore, like=like, part=part), on_damage)


def _newest_whole(
    folder: pathlib.Path, read_one: Callable[[pathlib.Path], tuple[T, str]], on_damage: OnDamage
) -> Found[T] | None:
    """Reads the newest undamaged checkpoint of a folder; None if there is none at all."""
    found = steps(folder)
    for step in reversed(found):
        path = folder / str(step)
        try:
            tree, sha256 = read_one(path)
            return Found(tree, path, sha256)
        except DamagedCheckpointError as error:
            on_damage(path, str(error))
    if found:
        raise InputError(f"every checkpoint in {folder} is damaged; move the folder away and train again")
    return None


def list_digests(path: pathlib.Path) -> None:
    """Lists the digests of a whole checkpoint's files, unless that is done."""
    if not (path / FILES).exists():
        write_whole(path / FILES, json.dumps(_file_digests(path)).encode())


def _checkpointer() -> orbax.AsyncCheckpointer:
    """Returns what writes in this process alone, which Orbax's newer interface, used for reading, cannot."""
    me = jax.process_index()
    alone = orbax.options.MultiprocessingOptions(
        primary_host=me, active_processes={me}, barrier_sync_key_prefix="robal_jax"
    )
    handler = orbax.CompositeCheckpointHandler(
        composite_options=orbax.CompositeOptions(multiprocessing_options=alone),
        state=orbax.PyTreeCheckpointHandler(multiprocessing_options=alone),
    )
    return orbax.AsyncCheckpointer(handler, multiprocessing_options=alone)


class Saver:
    """Writes checkpoints in the background, keeping the newest ones; a context manager.

    All processes of a job make the same calls together. The first one writes, and its errors reach all.
    """

    def __init__(self, folder: pathlib.Path, keep: int) -> None:
        """Opens a folder, which is made if there is none.

        Args:
          folder: of the checkpoints.
          keep: number of newest checkpoints kept.

        Raises:
          InputError: the folder cannot be made, or its name cannot be used.
        """
        self._folder = folder.absolute()
        self._opened = contextlib.ExitStack()
        self._pending: Future[None] | None = None
        hosts.by_first(partial(self._open, keep))

    def _open(self, keep: int) -> None:
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(
                f"cannot make {self._folder} ({error.strerror}); choose another folder"
            ) from error
        for path in self._folder.iterdir():
            if TEMPORARY in path.name:  # of a job that was killed
                shutil.rmtree(path)
        self._keep, self._plain = keep, self._opened.enter_context(_plain(self._folder))
        self._checkpointer = self._opened.enter_context(_checkpointer())
        self._background = self._opened.enter_context(ThreadPoolExecutor(1))

    def save(self, step: int, state: chex.ArrayTree) -> tuple[pathlib.Path, str]:
        """Starts writing ``state`` as checkpoint ``step``; returns its folder and sha256.

        Raises:
          InputError: the disk is too full for it, or the previous checkpoint could not be written.
        """
        self.wait()
        host = _host(state)
        sha256 = digest(host)
        hosts.by_first(partial(self._start, step, host, sha256))
        return self._folder / str(step), sha256

    def _start(self, step: int, host: dict[str, Any], sha256: str) -> None:
        self._check_room([array.nbytes for array in _flat(host).values()])
        self._checkpointer.save(
            self._plain / str(step),
            args=orbax.args.Composite(state=orbax.args.PyTreeSave(host)),
            force=True,
            custom_metadata={"sha256": sha256},
        )
        self._pending = self._background.submit(self._finish, self._folder / str(step))

    def _finish(self, path: pathlib.Path) -> None:
        """Waits until a checkpoint has its name, lists its files' digests, and removes the oldest ones."""
        self._checkpointer.wait_until_finished()
        list_digests(path)
        for step in steps(self._folder)[: -self._keep]:
            old = self._folder / str(step)
            shutil.rmtree(old.rename(self._folder / f"{step}{TEMPORARY}"))

    def _check_room(self, sizes: list[int]) -> None:
        """Raises before a save that would fill the disk, which Orbax reports with pages of tracebacks."""
        free = shutil.disk_usage(self._folder).free
        needed = sum(sizes) + OVERHEAD + OVERHEAD_EACH * len(sizes)
        if free < needed:
            raise InputError(
                f"disk full: a checkpoint in {self._folder} takes {needed / 2**20:.1f} MiB, but "
                f"{free / 2**20:.1f} MiB are free; earlier checkpoints are intact: free some space and run "
                "the same command again"
            )

    def wait(self) -> None:
        """Waits until the checkpoint that was started is on the disk.

        Raises:
          InputError: it could not be written; earlier checkpoints are intact.
        """
        hosts.by_first(self._wait)

    def _wait(self) -> None:
        pending, self._pending = self._pending, None
        try:
            if pending is not None:
                pending.result()
        except Exception as error:
            raise InputError(
                f"could not write a checkpoint to {self._folder} ({one_line(error)}); earlier checkpoints "
                "are intact: remove the cause and run the same command again"
            ) from error

    def __enter__(self) -> "Saver":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: types.TracebackType | None
    ) -> None:
        try:
            with self._opened:
                (self.wait if kind is None else self._wait)()  # after an error the others may not be here
        except Exception:
            if kind is None:  # otherwise Orbax repeats an error that was already raised
                raise
