"""One job per folder: a lock that ends with its process, and that says who is at work.

The lock is the system's (``flock``), so that nothing is left of a process that was killed. Some network
drives do not share such locks between machines, and some have none. Therefore the file also names its holder,
which touches it every ``BEAT`` seconds. A holder on another machine that does not for ``SILENCE`` seconds is
dead: a preempted job may start again on any machine.
"""

import contextlib
import errno
import fcntl
import json
import os
import pathlib
import platform
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import IO, NamedTuple

from robal_jax.devices.output import Tolerant
from robal_jax.errors import InputError
from robal_jax.storage.files import reason
from robal_jax.storage.names import LOCK

BEAT, SILENCE, SETTLED = 20.0, 120.0, 1.0  # seconds

BOOT = pathlib.Path("/proc/sys/kernel/random/boot_id")
SPACE = pathlib.Path("/proc/self/ns/pid")

_UNSUPPORTED = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL)


class Holder(NamedTuple):
    """Who is at work.

    Attributes:
      host: name of the machine or container.
      boot: identity of the machine since it was started, which its containers share; '' if not known.
      pid: number of the process.
      since: when it began to work.
      space: identity of the container's numbers of processes, in which ``pid`` counts; '' if not known.
    """

    host: str
    boot: str
    pid: int
    since: str
    space: str = ""

    @property
    def here(self) -> bool:
        """Whether it works, or worked, on this machine, whose locks the system knows."""
        me = myself()
        return self.host == me.host or bool(self.boot and self.boot == me.boot)

    @property
    def near(self) -> bool:
        """Whether its number tells this process whether it still works: not so between two containers."""
        me = myself()
        return (self.host, self.boot, self.space) == (me.host, me.boot, me.space)


def myself() -> Holder:
    """Returns this process as the holder of a lock."""
    boot = space = ""
    with contextlib.suppress(OSError):
        boot = BOOT.read_text().strip()
        space = os.readlink(SPACE)
    return Holder(platform.node(), boot, os.getpid(), time.strftime("%Y-%m-%d %H:%M:%S"), space)


@contextlib.contextmanager
def alone_in(
    folder: pathlib.Path, patience: float = 0.0, on_loss: Callable[[str], None] = lambda line: None
) -> Iterator[None]:
    """Keeps other jobs out of a folder, which is made if it is missing.

    If the last job there was on another machine and left its lock, waits for a sign of life of that job.

    Args:
      folder: the folder.
      patience: seconds to wait for another job to end.
      on_loss: is called by a thread, with a line for people, when a job on another machine has taken the
        folder over, because it saw no sign of life of this one.

    Raises:
      InputError: another process works there, or the folder cannot be written to.
    """
    path, until = folder / LOCK, time.monotonic() + patience
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file, mine = _acquired(path, until)
    except OSError as error:
        raise InputError(
            f"cannot write to {folder} ({reason(error, folder)}); choose another folder"
        ) from error
    ended = threading.Event()
    beats = threading.Thread(target=_beat, args=(path, mine, ended, on_loss), daemon=True)
    beats.start()
    try:
        yield
    finally:
        ended.set()
        beats.join()
        with file, contextlib.suppress(OSError):
            if path.read_bytes() == mine:  # a job on another machine may have taken it over
                path.unlink()  # while the lock is held: whoever waits for this file looks for it again


def _beat(path: pathlib.Path, mine: bytes, ended: threading.Event, on_loss: Callable[[str], None]) -> None:
    """Touches a file until the job has ended, or another one has taken it over."""
    while not ended.wait(BEAT):
        with contextlib.suppress(OSError):
            if path.read_bytes() != mine:
                on_loss(f"warning: another job took {path.parent} over; this one stops")
                return
            os.utime(path)


def _acquired(path: pathlib.Path, until: float) -> tuple[IO[str], bytes]:
    """Returns the lock's file, locked, and what it says of its holder, this process; waits until a time.

    Raises:
      InputError: another process holds the lock, or the file is of another program.
    """
    while True:
        with contextlib.ExitStack() as stack:
            file = stack.enter_context(os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+"))
            locked, holder = _lock(file), _read(file)
            if locked is False or (
                holder and at_work(holder, str(path.parent), lambda: path.stat().st_mtime_ns, locked)
            ):
                if time.monotonic() < until:
                    time.sleep(0.2)
                    continue
                raise InputError(refusal(str(path.parent), holder))
            if not _is_at(file, path):  # its holder has just removed it
                continue
            _check_replaceable(file, path)
            mine = json.dumps(myself()._asdict())
            file.seek(0)
            file.truncate()
            file.write(mine)
            file.flush()
            if locked is None:  # two jobs that begin together may both come here
                time.sleep(SETTLED)
                if path.read_bytes() != mine.encode():
                    continue
            stack.pop_all()
            return file, mine.encode()


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


def _check_replaceable(file: IO[str], path: pathlib.Path) -> None:
    """Raises if a file is not a lock, whole or broken: it is a user's own."""
    file.seek(0)
    try:
        beginning = file.read().lstrip("\0")[:1]
    except UnicodeDecodeError:
        beginning = "?"
    if beginning not in ("", "{", "["):
        raise InputError(f"{path} is not of a job, and would be lost; choose another folder, or move it away")


def at_work(holder: Holder, place: str, sign: Callable[[], object], locked: bool | None = None) -> bool:
    """Returns whether the process that a lock names is still at work.

    Args:
      holder: whom the lock names.
      place: what is locked, for a message.
      sign: returns what a living holder changes from time to time; raises FileNotFoundError without a lock.
      locked: whether the system gave us the lock; None if it has none.
    """
    if locked and holder.here:
        return False
    if not holder.near:
        return _shows_life(holder, place, sign)
    if holder.pid == os.getpid():
        return False
    try:
        os.kill(holder.pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _shows_life(holder: Holder, place: str, sign: Callable[[], object]) -> bool:
    """Waits until the holder on another machine gives a sign, which may take ``SILENCE`` seconds."""
    text = (
        f"{place} was used by process {holder.pid} on {holder.host}; waiting up to {SILENCE:g} s for a "
        "sign of life"
    )
    print(text, file=Tolerant(sys.stderr), flush=True)
    with contextlib.suppress(FileNotFoundError):  # it has just ended
        last, until = sign(), time.monotonic() + SILENCE
        while time.monotonic() < until:
            time.sleep(min(1.0, SILENCE / 10))
            if sign() != last:
                return True
    return False


def _is_at(file: IO[str], path: pathlib.Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def refusal(place: str, holder: Holder | None) -> str:
    """Says that a place is used by another process."""
    who = f" (process {holder.pid} on {holder.host}, since {holder.since})" if holder else ""
    return f"{place} is used by another process{who}; wait until it has ended, or choose another folder"
