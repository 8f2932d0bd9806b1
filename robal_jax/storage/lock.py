"""One job per folder: a lock that ends with its process, and that says who is at work.

The lock is the system's (``flock``), so that nothing is left of a process that was killed. Some network
drives do not share such locks between machines, and some have none. Therefore the file also names its holder:
one of another machine is believed, because nothing here can tell whether it is alive.
"""

import contextlib
import errno
import fcntl
import json
import os
import pathlib
import platform
import time
from collections.abc import Iterator
from typing import IO, NamedTuple

from robal_jax.errors import InputError
from robal_jax.storage.names import LOCK

BOOT = pathlib.Path("/proc/sys/kernel/random/boot_id")

_UNSUPPORTED = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL)


class Holder(NamedTuple):
    """Who is at work.

    Attributes:
      host: name of the machine or container.
      boot: identity of the machine since it was started, which its containers share; '' if not known.
      pid: number of the process.
      since: when it began to work.
    """

    host: str
    boot: str
    pid: int
    since: str

    @property
    def here(self) -> bool:
        """Whether it works, or worked, on this machine, whose locks the system knows."""
        me = myself()
        return self.host == me.host or bool(self.boot and self.boot == me.boot)


def myself() -> Holder:
    """Returns this process as the holder of a lock."""
    boot = ""
    with contextlib.suppress(OSError):
        boot = BOOT.read_text().strip()
    return Holder(platform.node(), boot, os.getpid(), time.strftime("%Y-%m-%d %H:%M:%S"))


@contextlib.contextmanager
def alone_in(folder: pathlib.Path) -> Iterator[None]:
    """Keeps other jobs out of a folder, which is made if it is missing.

    Raises:
      InputError: another process works there, or the folder cannot be written to.
    """
    path = folder / LOCK
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = _acquired(path)
    except OSError as error:
        raise InputError(f"cannot write to {folder} ({error.strerror}); choose another folder") from error
    try:
        yield
    finally:
        with file, contextlib.suppress(OSError):
            path.unlink()  # while the lock is held: whoever waits for this file looks for it again


def _acquired(path: pathlib.Path) -> IO[str]:
    """Returns the lock's file, locked, with this process as its holder.

    Raises:
      InputError: another process holds the lock.
    """
    while True:
        with contextlib.ExitStack() as stack:
            file = stack.enter_context(os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+"))
            locked, holder = _lock(file), _read(file)
            if locked is False or (holder and _at_work(holder, locked)):
                raise InputError(_refusal(path, holder))
            if not _is_at(file, path):  # its holder has just removed it
                continue
            file.seek(0)
            file.truncate()
            json.dump(myself()._asdict(), file)
            file.flush()
            stack.pop_all()
            return file


def _lock(file: IO[str]) -> bool | None:
    """Returns whether the system gives us the lock; None if the drive has no locks."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno in _UNSUPPORTED:
            return None
        raise
    return True


def _read(file: IO[str]) -> Holder | None:
    try:
        return Holder(**json.load(file))
    except (ValueError, TypeError):  # none, or one that was killed while it wrote
        return None


def _at_work(holder: Holder, locked: bool | None) -> bool:
    """Returns whether the process that a lock's file names may still be at work."""
    if not holder.here:
        return True
    if locked or holder.pid == os.getpid():
        return False
    try:
        os.kill(holder.pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _is_at(file: IO[str], path: pathlib.Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _refusal(path: pathlib.Path, holder: Holder | None) -> str:
    who = f" (process {holder.pid} on {holder.host}, since {holder.since})" if holder else ""
    what_to_do = "wait until it has ended"
    if holder and not holder.here:
        what_to_do += f", or remove {path} if it is dead"
    return f"{path.parent} is used by another process{who}; {what_to_do}, or choose another folder"
