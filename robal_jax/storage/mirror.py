"""A folder in a bucket as the folder of a job: a copy to work in, which is kept in step with the bucket.

The job works in the copy as in any folder; a thread writes what it finds there to the bucket. An object is
replaced whole, and the order of :func:`rank` does the rest: what is in the bucket after a kill is what an
interrupted job may leave on a disk. Of a checkpoint all files are written before the list of their digests,
without which a reader ignores it.

One job at a time writes to a folder of a bucket: an object ``.lock`` names it, and its heartbeats show that
it is alive. Of several processes the first one writes; each other one begins with a copy of its own.
"""

import contextlib
import json
import os
import pathlib
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from robal_jax.devices import hosts
from robal_jax.errors import DivergedError, InputError
from robal_jax.storage import buckets
from robal_jax.storage.buckets import Bucket, BucketError, Copy, Entry, Known
from robal_jax.storage.lock import BEAT, SILENCE, Holder, at_work, myself, refusal
from robal_jax.storage.names import (
    BEST,
    CHECKPOINTS,
    EVALUATION,
    FILES,
    IMPORT,
    LOCK,
    RECORD,
    RESULTS,
    VERSIONS,
)

Say = Callable[[str], None]

PERIOD = 5.0  # seconds between two looks at the copy
LAST_TRY = 20.0  # seconds for which a job that failed tries to write what it has


def rank(key: str) -> int:
    """Returns the place of a file in the order of writing; files of one place are written in any order.

    1. What tells whose folder it is.
    2. All that is not named below, such as the metrics, which reach at least as far as each checkpoint.
    3. The results of an evaluation, which say that all its other files are there.
    4. The best checkpoint, the list of its digests, and its record: a training that resumes from a checkpoint
       does not look again at weights before it.
    5. Checkpoints, and the lists of their digests.

    Example:
      >>> [rank(f"checkpoints/9/{name}") for name in ("state/d/0", "files.json")], rank("metrics.jsonl")
      ([6, 7], 1)
    """
    folder, (*_, name) = buckets.of_a_checkpoint(key), key.split("/")
    if folder:
        best = f"/{folder}".endswith(f"/{BEST}/{folder.rpartition('/')[2]}")
        return (3 if best else 6) + (key == f"{folder}/{FILES}")
    if name == RECORD and key.endswith(f"{BEST}/{RECORD}"):
        return 5
    return 0 if name in (VERSIONS, IMPORT) else 2 if name == RESULTS else 1


def files_in(folder: pathlib.Path) -> tuple[dict[str, os.stat_result], bool]:
    """Lists the finished files of a copy.

    Returns:
      By key what the system says of each file, without temporary files and unfinished checkpoints; and
      whether a checkpoint is about to be finished.
    """
    found: dict[str, os.stat_result] = {}
    unfinished = False
    for place, folders, names in os.walk(folder):
        here = pathlib.Path(place)
        if here.name in (CHECKPOINTS, BEST):
            steps = [name for name in folders if name.isdigit()]
            folders[:] = [name for name in steps if (here / name / FILES).exists()]
            unfinished |= len(folders) < len(steps)
        for name in names:
            if not name.startswith("."):
                with contextlib.suppress(FileNotFoundError):  # replaced meanwhile
                    found[str((here / name).relative_to(folder))] = (here / name).stat()
    return found, unfinished


class ChangedError(Exception):
    """A file is no longer as it was listed, so that what follows in the order has to wait."""


class Writer:
    """Writes what changes in a copy to the bucket.

    Attributes:
      copy: the folder on this machine, and the one in the bucket.
    """

    def __init__(self, copy: Copy) -> None:
        self.copy = copy
        self._seen = set(copy.known)

    def write(self) -> None:
        """Makes the bucket equal to the copy.

        Raises:
          BucketError: the bucket cannot be used now.
          ChangedError: the copy changed too much meanwhile.
        """
        files, unfinished = files_in(self.copy.folder)
        self._seen |= files.keys()
        changed = sorted((key for key in files if not self.copy.equal(key)), key=rank)
        with ThreadPoolExecutor(buckets.AT_ONCE) as pool:
            for place in sorted({rank(key) for key in changed}):
                keys = [key for key in changed if rank(key) == place]
                list(pool.map(lambda key: self._put(key, files[key]), keys))
        gone = [key for key in self._seen - files.keys() if not (unfinished and rank(key) > 2)]
        for key in sorted(gone, key=rank, reverse=True):  # a list of digests before the files in it
            self._remove(key)

    def _put(self, key: str, status: os.stat_result) -> None:
        """Writes a file. What may be found after a kill is remembered before."""
        copy, path, size = self.copy, self.copy.folder / key, status.st_size
        before = copy.known.get(key)
        try:
            content = path.read_bytes() if size <= buckets.SMALL else None
            identity = buckets.md5(path if content is None else content)
        except FileNotFoundError as error:
            raise ChangedError from error
        if rank(key) > 1 and path.stat().st_mtime_ns != status.st_mtime_ns:
            raise ChangedError
        old = before or Known((), -1, 0, there=False)
        # Of earlier tries without an answer any may have been the last to arrive.
        copy.note(key, old._replace(identities=tuple(dict.fromkeys((identity, *old.identities)))))
        if content is None:
            copy.bucket.put(key, path)
        else:
            copy.bucket.write(key, content)
        entry = copy.bucket.entry(key)
        copy.note(key, Known((entry.identity,), size, status.st_mtime_ns))

    def _remove(self, key: str) -> None:
        if known := self.copy.known.get(key):
            self.copy.note(key, known._replace(there=False))
            self.copy.bucket.remove(key)
        self.copy.note(key, None)
        self._seen.discard(key)


# ---------------------------------------------------------------- at the start


def open_copy(copy: Copy, say: Say) -> None:
    """Makes a copy and its bucket equal before a job begins.

    If the bucket is as this copy left it, what had not been written yet is written now. Otherwise the copy
    is made equal to the bucket, and what it alone had is moved aside.

    Raises:
      BucketError: the bucket cannot be used now.
    """
    entries = {key: entry for key, entry in copy.bucket.entries().items() if not _of_an_evaluation(key)}
    broken, left = buckets.broken(entries), as_left(copy, entries)
    if not left:
        _set_aside(copy, say)
    for key in broken:  # of a job that was killed
        copy.bucket.remove(key)
        copy.note(key, None)
    wanted = buckets.needed(entries)
    if left:
        wanted = {key: entry for key, entry in wanted.items() if not (copy.folder / key).exists()}
    else:
        copy.forget([key for key in copy.known if key not in entries])
    copy.fetch(wanted)
    copy.compact()
    Writer(copy).write()


def _of_an_evaluation(key: str) -> bool:
    """Returns whether a file belongs to an evaluation in a run's folder, a job with a copy of its own."""
    folder, inside, _ = key.partition("/")
    return bool(inside) and (folder == EVALUATION or folder.startswith(f"{EVALUATION}-"))


def as_left(copy: Copy, entries: dict[str, Entry]) -> bool:
    """Returns whether a bucket has what this copy wrote there, and nothing else that matters to it."""
    theirs = [
        key
        for key, entry in buckets.needed(entries).items()
        if key not in copy.known or entry.identity not in copy.known[key].identities
    ]
    there = [key for key, known in copy.known.items() if known.there]
    gone = set(there) - entries.keys() - buckets.broken(there)
    return not theirs and not gone


def _set_aside(copy: Copy, say: Say) -> None:
    """Moves away what was not written to the bucket before somebody else changed it."""
    aside = copy.folder.with_name(f"{copy.folder.name}{time.strftime('-%Y%m%dT%H%M%S')}")
    unsaved = [key for key in files_in(copy.folder)[0] if not copy.equal(key)]
    for key in unsaved:
        (aside / key).parent.mkdir(parents=True, exist_ok=True)
        (copy.folder / key).rename(aside / key)
    for path in sorted(copy.folder.rglob("*"), reverse=True):  # an empty one is no checkpoint
        with contextlib.suppress(OSError):  # not empty, or a file
            path.rmdir()
    if unsaved:
        say(
            f"{copy.bucket.url} was changed from elsewhere; what only this machine had is in {aside} "
            f"({len(unsaved)} files)"
        )


# ---------------------------------------------------------------- one job


class Lock:
    """The object that names the job which writes to a folder of a bucket."""

    def __init__(self, bucket: Bucket) -> None:
        self._bucket, self._token, self._count = bucket, secrets.token_hex(8), 0
        self._seen = _now()
        self.lost = False

    def acquire(self) -> None:
        """Takes the lock.

        Raises:
          InputError: another process is at work.
          BucketError: the bucket cannot be used now.
        """
        while True:
            found = self._bucket.read(LOCK)
            holder = _holder(found)
            if holder and at_work(holder, self._bucket.url, self._sign):
                raise InputError(refusal(self._bucket.url, holder))
            if found is not None:
                if self._bucket.read(LOCK) != found:  # another job was faster
                    continue
                self._bucket.remove(LOCK)
            with contextlib.suppress(FileExistsError):
                self._seen = _now()
                self._bucket.write(LOCK, self._content(), new=True)
                if self._mine():
                    return

    def _sign(self) -> bytes:
        """Returns the lock, which a living holder changes from time to time."""
        found = self._bucket.read(LOCK)
        if found is None:
            raise FileNotFoundError(LOCK)
        return found

    def _content(self) -> bytes:
        return json.dumps({**myself()._asdict(), "token": self._token, "beat": self._count}).encode()

    def _mine(self) -> bool:
        return self._token.encode() in (self._bucket.read(LOCK) or b"")

    def beat(self) -> None:
        """Shows life, and looks whether the lock is still ours; takes it again if somebody has removed it.

        It is lost if it is missing after a silence in which another job may have taken it, and ended.

        Raises:
          BucketError: the bucket cannot be used now.
        """
        now = _now()
        if not self.lost and now - self._seen < SILENCE and self._bucket.read(LOCK) is None:
            with contextlib.suppress(FileExistsError):
                self._bucket.write(LOCK, self._content(), new=True)
        self.lost = self.lost or not self._mine()
        if not self.lost:
            self._count += 1
            self._bucket.write(LOCK, self._content())
            self._seen = now

    def check(self) -> None:
        """Looks whether the lock is still ours if nobody may have seen a sign of life for long."""
        if _now() - self._seen > SILENCE / 2:
            self.beat()

    def release(self) -> None:
        """Removes the lock."""
        with contextlib.suppress(BucketError):
            if self._mine():
                self._bucket.remove(LOCK)


def _now() -> float:
    """Seconds, also those in which the machine was suspended."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


def _holder(content: bytes | None) -> Holder | None:
    try:
        found = json.loads(content or b"")
        return Holder(**{name: found[name] for name in Holder._fields if name in found})
    except (ValueError, TypeError, LookupError):
        return None


class Keeper:
    """The thread that writes, from time to time and until all is written."""

    def __init__(self, copy: Copy, say: Say, on_loss: Callable[[], None]) -> None:
        self._url, self._copy, self._say, self._on_loss = copy.bucket.url, copy, say, on_loss
        self._lock, self._writer = Lock(copy.bucket), Writer(copy)
        self._ended, self._failed, self._why = threading.Event(), False, ""
        self._threads = [threading.Thread(target=work, daemon=True) for work in (self._beats, self._works)]

    def __enter__(self) -> "Keeper":
        buckets.reached(self._url, self._lock.acquire)
        try:
            buckets.reached(self._url, partial(open_copy, self._copy, self._say))
        except BaseException:
            self._lock.release()
            raise
        self._writer = Writer(self._copy)
        for thread in self._threads:
            thread.start()
        return self

    def _beats(self) -> None:
        while not self._ended.wait(BEAT):
            with contextlib.suppress(BucketError):
                self._lock.beat()
            if self._lock.lost:
                self._say(f"warning: another job took {self._url} over; this one stops")
                self._on_loss()
                return

    def _works(self) -> None:
        pause = PERIOD
        while not self._ended.wait(pause):
            self._try()
            pause = min(2 * pause, 60.0) if self._failed else PERIOD

    def _try(self) -> bool:
        """Writes what is new; returns whether all that was there is in the bucket."""
        try:
            self._lock.check()
            if not self._lock.lost:
                self._writer.write()
        except ChangedError:
            self._why = "files change meanwhile"
            return False
        except (BucketError, OSError) as error:
            self._why = buckets.why(error)
            if not self._failed:
                self._say(
                    f"warning: cannot write to {self._url} ({self._why}); the work goes on, and "
                    f"what is saved is in {self._copy.folder}"
                )
            self._failed = True
            return False
        if self._failed and not self._lock.lost:
            self._say(f"{self._url} can be written to again, and has everything")
        self._failed = False
        return True

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._ended.set()
        for thread in self._threads:
            thread.join()
        try:
            if kind is None or issubclass(kind, Exception):
                self._finish(LAST_TRY if kind else buckets.PATIENCE, quiet=kind is not None)
        finally:
            self._lock.release()

    def _finish(self, seconds: float, *, quiet: bool) -> None:
        """Writes the rest; raises an ``InputError`` if that cannot be done, unless ``quiet``."""
        until, pause = time.monotonic() + seconds, 1.0
        while not (done := self._try()) and time.monotonic() + pause < until:
            time.sleep(pause)
            pause *= 2
        if self._lock.lost and not quiet:
            raise InputError(
                f"another job took {self._url} over, because it saw no sign of life of this one; what only "
                f"this one has is in {self._copy.folder}: choose another folder, or wait until that job has "
                "ended"
            )
        if not done and not quiet:
            raise InputError(
                f"cannot write to {self._url} ({self._why}); everything is in "
                f"{self._copy.folder}, and the same command writes it to the bucket"
            )


def folder_of(path: str | pathlib.Path) -> pathlib.Path:
    """Returns the folder on this machine in which a job works, see :func:`kept`."""
    url = buckets.url_of(path)
    return pathlib.Path(path) if url is None else buckets.place("work", url)


@contextlib.contextmanager
def kept(
    path: str | pathlib.Path, say: Say, on_loss: Callable[[], None] = lambda: None
) -> Iterator[tuple[pathlib.Path, Say]]:
    """Yields the folder for a job to work in: the path itself, or of a URL a copy that is kept in step.

    All processes of a job call it together. What the first one writes to its folder reaches the bucket; the
    others read what was there at the start.

    Args:
      path: of a folder, or its URL, or of a copy to read from.
      say: receives messages for the user.
      on_loss: is called, by a thread of the first process, when another job has taken the folder over.

    Yields:
      The folder on this machine, and ``say`` for messages that may name it.

    Raises:
      InputError: the bucket cannot be used, or another job works there; or, in the end, not everything could
        be written to it.
    """
    url = buckets.url_of(path)
    if url is None:
        yield pathlib.Path(path), say
        return
    with hosts.held_by_first(lambda: Keeper(Copy(Bucket(url), folder_of(path)), say, on_loss)):
        folder = folder_of(path) if hosts.is_first() else buckets.fetched(url)  # as the first one left it
        try:
            yield folder, buckets.naming(say)
        except (InputError, DivergedError) as error:
            raise type(error)(buckets.named(str(error))) from error
