"""Folders and files in buckets, ``gs://BUCKET/PATH`` and ``s3://BUCKET/PATH``, and their local copies.

All other modules work in local folders. What is read from a bucket is copied to the user's cache first
(:func:`fetched`), and what is written to one is written to a copy there that ``mirror`` keeps in step::

    ~/.cache/robal_jax/buckets/
      read/s3/BUCKET/PATH/@/    what was read
      work/s3/BUCKET/PATH/@/    where a job works

A copy remembers which object each of its files is, so that no file is read again that has not changed.

This is the only module that knows fsspec. Messages never quote what a library says of an error, because it
may contain addresses with signatures.
"""

import base64
import binascii
import contextlib
import fcntl
import hashlib
import importlib
import json
import logging
import os
import pathlib
import re
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple, TypeVar

from robal_jax.devices.cpu import user_cache
from robal_jax.errors import InputError, one_line, user_path
from robal_jax.storage.files import URL, write_whole
from robal_jax.storage.names import BEST, CHECKPOINTS, DAMAGED, FILES, JOURNAL, LOCK, TENSORBOARD

T = TypeVar("T")

_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_UNUSABLE = frozenset("?#*[]\\@%")  # of fsspec, of Orbax or of our own copies

_CLASSES = {"gs": ("gcsfs.core", "GCSFileSystem"), "s3": ("s3fs", "S3FileSystem")}
"""Where fsspec's class of a scheme is; that at the top of gcsfs asks Google for the kind of each bucket."""

_ENDPOINTS = {"gs": ("STORAGE_EMULATOR_HOST",), "s3": ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")}
"""Variables of the environment with another address than that of Google or Amazon."""

AT_ONCE = 8  # transfers
SMALL = 2**23  # bytes; a smaller file is read at once, so that a line added meanwhile breaks nothing

PATIENCE = 60.0  # seconds for which a start, or an end, tries to reach a bucket

_CREDENTIALS = ("NoCredentials", "PartialCredentials", "DefaultCredentials", "RefreshError", "TokenRetrieval")


class BucketError(Exception):
    """A bucket cannot be used now; the message is a few words of our own.

    Attributes:
      lasting: whether it makes no sense to try again: no such bucket, no permission, no credentials.
    """

    def __init__(self, why: str, *, lasting: bool = False) -> None:
        super().__init__(why)
        self.lasting = lasting


class Entry(NamedTuple):
    """An object in a bucket: its size in bytes, and what changes with its content, if possible its MD5."""

    size: int
    identity: str


class Known(NamedTuple):
    """Memory that a copy has of one of its files.

    Attributes:
      identities: those that the object may have if nobody else has written it.
      size: of the file when it was equal to the object, in bytes.
      modified: time of the file's last change then, in nanoseconds.
      there: whether the object must be there; False while it is first written, or removed.
    """

    identities: tuple[str, ...]
    size: int
    modified: int
    there: bool = True


# ---------------------------------------------------------------- names


def _parts(path: str | pathlib.Path) -> tuple[str, str] | None:
    """Returns the scheme and 'BUCKET/PATH' of a URL; None for any other path."""
    text = str(path)
    found = URL.match(text)
    if not found:
        return None
    place = text[found.end() :].strip("/")
    names = place.split("/")
    if not _BUCKET.fullmatch(names[0]):
        raise InputError(
            f"a {found[1]}:// URL has more than a bucket's name before its first slash; write "
            f"{found[1]}://BUCKET/PATH, and give credentials in the environment"
        )
    if _UNUSABLE & set(place) or {"", ".", ".."} & set(names):
        raise InputError(
            f"cannot use {found[1]}://{names[0]}/…; choose a path without empty names, '..' and "
            f"{' '.join(sorted(_UNUSABLE))}"
        )
    return found[1], place


def is_url(path: str | pathlib.Path) -> bool:
    """Returns whether a path is a URL of a bucket.

    Raises:
      InputError: it is one that cannot be used.
    """
    return _parts(path) is not None


def _root() -> str:
    try:
        return os.path.realpath(user_cache(os.environ) / "buckets")
    except RuntimeError as error:
        raise InputError("no home folder for copies of a bucket; set XDG_CACHE_HOME to a folder") from error


def url_of(path: str | pathlib.Path) -> str | None:
    """Returns the URL that a path is, or whose copy it is, or is a part of; None for all other paths.

    Raises:
      InputError: a URL that cannot be used.

    Example:
      >>> print(url_of(pathlib.Path("gs://bucket/runs/x")), url_of("/runs/x"))
      gs://bucket/runs/x None
    """
    parts = _parts(path)
    if parts is None:
        text = os.path.realpath(path)
        return named(text) if text.startswith(f"{_root()}/") else None
    return "://".join(parts)


def named(text: str, kinds: str = "read|work") -> str:
    """Returns a text in which copies, of all kinds or one, have the names of what they are copies of."""
    with contextlib.suppress(InputError):
        copies = rf"{re.escape(_root())}/(?:{kinds})/(gs|s3)(?:-[0-9a-f]{{8}})?/([^\s@]*)/@(?![\w@-])"
        text = re.sub(copies, r"\1://\2", text)
    return text


def naming(say: Callable[[str], None]) -> Callable[[str], None]:
    """Returns ``say`` for lines that may have names of copies, see :func:`named`."""
    return lambda line: say(named(line))


def shown(path: str | pathlib.Path) -> str:
    """Returns a path, or the URL that it stands for, as a text for people."""
    return url_of(path) or str(path)


def place(kind: str, url: str) -> pathlib.Path:
    """Returns the folder of a copy.

    Args:
      kind: 'read' or 'work'.
      url: of the folder in a bucket.
    """
    parts = _parts(url)
    assert parts is not None
    scheme, path = parts
    endpoint = next(filter(None, map(os.environ.get, _ENDPOINTS[scheme])), "")
    tag = f"-{hashlib.sha256(endpoint.encode()).hexdigest()[:8]}" if endpoint else ""
    return pathlib.Path(_root(), kind, scheme + tag, path, "@")


# ---------------------------------------------------------------- the bucket


def _filesystem(scheme: str) -> Any:
    """Makes a connection; the packages are imported only here.

    Raises:
      InputError: they are not installed.
    """
    package, name = _CLASSES[scheme]
    try:
        module = importlib.import_module(package)
    except ImportError as error:
        raise InputError(
            f"{scheme}:// needs {package.partition('.')[0]} ({one_line(error)}); install it with "
            "pip install 'robal_jax[buckets]'"
        ) from error
    for logger in ("gcsfs", "s3fs", "asyncio"):  # what fails is said by us, in a line and without addresses
        logging.getLogger(logger).setLevel(logging.CRITICAL + 1)
    options: dict[str, Any] = {"skip_instance_cache": True, "use_listings_cache": False}
    if scheme == "s3":
        quick = {"connect_timeout": 10, "read_timeout": 60, "retries": {"max_attempts": 2}}
        options["config_kwargs"] = quick
    else:
        options["consistency"] = "md5"  # of what arrived; S3's library always sends a checksum along
        if os.environ.get("STORAGE_EMULATOR_HOST"):
            options["token"] = "anon"
    return getattr(module, name)(**options)


class Bucket:
    """The objects below a URL; every method may raise a :class:`BucketError`.

    Attributes:
      url: of the folder.
    """

    def __init__(self, url: str) -> None:
        parts = _parts(url)
        assert parts is not None
        self.url, self._place = url, parts[1]
        self._fs = _filesystem(parts[0])

    def _at(self, key: str) -> str:
        return f"{self._place}/{key}" if key else self._place

    def entries(self) -> dict[str, Entry]:
        """Lists all objects by their keys below the URL; '' for an object that the URL itself names."""
        with _errors(bucket=True):
            found = self._fs.find(self._place, detail=True)
        return {
            name.strip("/").removeprefix(self._place).lstrip("/"): _entry(info)
            for name, info in found.items()
            if info["type"] == "file" and not name.endswith("/")
        }

    def entry(self, key: str) -> Entry:
        """Describes one object."""
        with _errors():
            return _entry(self._fs.info(self._at(key)))

    def read(self, key: str) -> bytes | None:
        """Reads an object; None if there is none."""
        with _errors(), contextlib.suppress(FileNotFoundError):
            return self._fs.cat_file(self._at(key))
        return None

    def get(self, key: str, path: pathlib.Path) -> None:
        """Copies an object to a file, whole or not at all.

        Raises:
          FileNotFoundError: it is gone.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            with _errors():
                self._fs.get_file(self._at(key), str(temporary))
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)

    def write(self, key: str, content: bytes, *, new: bool = False) -> None:
        """Replaces an object whole.

        Raises:
          FileExistsError: ``new``, and there is one.
        """
        options: dict[str, Any] = {"mode": "create" if new else "overwrite"}
        if self.url.startswith("gs:") and content.endswith(b"\r"):
            # gcsfs ends a small object by a newline and a mark, and a server may take "\r\n" for the newline.
            options["chunksize"] = len(content)  # sent by itself, without a mark
        with _errors(bucket=True):
            self._fs.pipe_file(self._at(key), content, **options)

    def put(self, key: str, path: pathlib.Path) -> None:
        """Copies a large file, which nobody changes, to an object, whole or not at all."""
        with _errors(bucket=True):
            self._fs.put_file(str(path), self._at(key))

    def remove(self, key: str) -> None:
        """Removes an object, if there is one."""
        with _errors(), contextlib.suppress(FileNotFoundError):
            self._fs.rm_file(self._at(key))


def _entry(info: Mapping[str, Any]) -> Entry:
    names = ("ETag", "md5Hash", "generation", "etag")
    identity = next((str(info[name]) for name in names if info.get(name)), "").strip('"')
    if info.get("md5Hash") and "ETag" not in info:
        with contextlib.suppress(binascii.Error):
            identity = base64.b64decode(identity).hex()
    return Entry(int(info["size"]), identity)


@contextlib.contextmanager
def _errors(*, bucket: bool = False) -> Iterator[None]:
    """Turns what the libraries raise into a :class:`BucketError`.

    Args:
      bucket: whether what is not found is the bucket, as in listing and writing, and no object.
    """
    try:
        yield
    except FileExistsError:
        raise
    except FileNotFoundError as error:
        if bucket:
            raise BucketError("no such bucket", lasting=True) from error
        raise
    except Exception as error:  # botocore, aiohttp, google.auth and gcsfs each raise their own
        raise _reason(error) from error


def _reason(error: Exception) -> BucketError:
    """Says why a bucket cannot be used, in words of our own."""
    name, code = type(error).__name__, str(getattr(error, "code", ""))
    if isinstance(error, PermissionError) or code in ("401", "403"):
        return BucketError("no permission", lasting=True)
    if name.startswith(_CREDENTIALS):
        return BucketError("no credentials", lasting=True)
    return BucketError(f"{name} {code}".strip())


def why(error: Exception) -> str:
    """Says why something failed, without what a library says of a bucket."""
    return str(error) if isinstance(error, BucketError) else getattr(error, "strerror", "") or one_line(error)


def md5(content: bytes | pathlib.Path) -> str:
    """Returns the MD5 of bytes or of a file, by which the servers identify small objects."""
    if isinstance(content, bytes):
        return hashlib.md5(content, usedforsecurity=False).hexdigest()
    with content.open("rb") as file:
        return hashlib.file_digest(file, partial(hashlib.md5, usedforsecurity=False)).hexdigest()


def reached(url: str, work: Callable[[], T]) -> T:
    """Does what needs the bucket; tries again with growing pauses for ``PATIENCE`` seconds.

    Raises:
      InputError: the bucket cannot be used.
    """
    until, pause = time.monotonic() + PATIENCE, 1.0
    while True:
        try:
            return work()
        except BucketError as error:
            if error.lasting or time.monotonic() + pause > until:
                raise InputError(
                    f"cannot use {url} ({error}); check its name, the credentials in the environment and the "
                    "network, and run the same command again"
                ) from error
        time.sleep(pause)
        pause *= 2


# ---------------------------------------------------------------- copies


def of_a_checkpoint(key: str) -> str | None:
    """Returns the folder of the checkpoint that a file belongs to; None if it belongs to none.

    Example:
      >>> print(of_a_checkpoint("x/checkpoints/30/d/1"), of_a_checkpoint("best/best.json"))
      x/checkpoints/30 None
    """
    names = key.split("/")
    for i, name in enumerate(names[:-2]):
        if name in (CHECKPOINTS, BEST) and names[i + 1].isdigit():
            return "/".join(names[: i + 2])
    return None


def broken(keys: Collection[str], root: str = "") -> set[str]:
    """Returns those files that belong to a checkpoint which is not whole: it has no list of its digests.

    Args:
      keys: of all files.
      root: name of the folder whose files they are, because it may be a checkpoint itself.
    """
    inside = any(key in (FILES, "_CHECKPOINT_METADATA") or key.startswith("state/") for key in keys)
    if inside and of_a_checkpoint(f"{root}/{FILES}") == root:
        return set() if FILES in keys else set(keys)
    folders = {key: of_a_checkpoint(key) for key in keys}
    whole = {folder for key, folder in folders.items() if key == f"{folder}/{FILES}"}
    return {key for key, folder in folders.items() if folder and folder not in whole}


class Copy:
    """A copy of a folder in a bucket, with a journal of what is equal to what.

    Attributes:
      bucket: the folder in the bucket.
      folder: the copy.
      known: what the copy remembers of its files, by key.
    """

    def __init__(self, bucket: Bucket, folder: pathlib.Path) -> None:
        self.bucket, self.folder = bucket, folder
        folder.mkdir(parents=True, exist_ok=True)
        self.known = _read_journal(folder / JOURNAL)

    def note(self, key: str, known: Known | None) -> None:
        """Remembers, or forgets with None, what a file is equal to; a killed process leaves no half line."""
        if known is None:
            self.known.pop(key, None)
        else:
            self.known[key] = known
        with (self.folder / JOURNAL).open("a") as file:
            file.write(json.dumps([key, known]) + "\n")

    def equal(self, key: str, entry: Entry | None = None) -> bool:
        """Returns whether a file is as it was when it was equal to its object, or is equal to an object."""
        known = self.known.get(key)
        if known is None or (entry is not None and entry.identity not in known.identities[-1:]):
            return False
        try:
            status = (self.folder / key).stat()
        except OSError:
            return False
        return (status.st_size, status.st_mtime_ns) == (known.size, known.modified)

    def fetch(self, entries: Mapping[str, Entry]) -> None:
        """Makes files equal to objects.

        Raises:
          FileNotFoundError: an object is gone.
        """

        def one(key: str) -> Known:
            self.bucket.get(key, self.folder / key)
            status = (self.folder / key).stat()
            return Known((entries[key].identity,), status.st_size, status.st_mtime_ns)

        missing = [key for key, entry in entries.items() if not self.equal(key, entry)]
        with ThreadPoolExecutor(AT_ONCE) as pool:
            for key, known in zip(missing, pool.map(one, missing), strict=True):
                self.note(key, known)

    def forget(self, keys: Collection[str]) -> None:
        """Removes files that were equal to objects which are gone, and folders that they leave empty."""
        for key in keys:
            path = self.folder / key
            path.unlink(missing_ok=True)
            self.note(key, None)
            for parent in path.parents[: key.count("/")]:
                with contextlib.suppress(OSError):  # it has others
                    parent.rmdir()

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Keeps out other processes of this machine that read the same."""
        with (self.folder.parent / f".{self.folder.name}.lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # until the file is closed
            self.known = _read_journal(self.folder / JOURNAL)
            yield

    def compact(self) -> None:
        """Writes the journal again, without what is outdated."""
        lines = [json.dumps([key, known]) + "\n" for key, known in self.known.items()]
        write_whole(self.folder / JOURNAL, "".join(lines).encode())


def _read_journal(path: pathlib.Path) -> dict[str, Known]:
    known: dict[str, Known] = {}
    if path.exists():
        for line in path.read_text().splitlines():
            with contextlib.suppress(ValueError, TypeError):  # the last line of a killed process
                key, fields = json.loads(line)
                known.pop(key, None)
                if fields:
                    identities, *more = fields
                    known[key] = Known(tuple(identities), *more)
    return known


UNREAD = (TENSORBOARD, DAMAGED)
"""Folders of a run that are written to a bucket, and never needed from there."""


def needed(entries: Mapping[str, Entry], root: str = "", without: Collection[str] = ()) -> dict[str, Entry]:
    """Returns the objects that a reader needs: no lock, no broken checkpoint, none in folders left out.

    Args:
      entries: all objects by key.
      root: see :func:`broken`.
      without: names of folders and files that are left out.
    """
    unwanted, useless = {*UNREAD, *without}, broken(entries, root)
    return {
        key: entry
        for key, entry in entries.items()
        if key not in useless and not unwanted & set(key.split("/")) and key.rpartition("/")[2] != LOCK
    }


def fetched(path: str | pathlib.Path, without: Collection[str] = ()) -> pathlib.Path:
    """Returns a path that the user named, see ``errors.user_path``; of a URL, a fresh copy to read from.

    Args:
      path: of a file or folder, anywhere.
      without: names of folders and files that are not needed.

    Returns:
      The path of the file or folder on this machine, which may not exist.

    Raises:
      InputError: the bucket cannot be used.
    """
    parts = _parts(path)
    if parts is None:
        return user_path(path) if isinstance(path, str) else path
    url = "://".join(parts)
    return reached(url, lambda: _fetched(Bucket(url), without))


def inside(path: str | pathlib.Path, folder: str | pathlib.Path) -> pathlib.Path:
    """Returns :func:`fetched` of a path, or its place in the copy of a folder, if it lies there.

    Args:
      path: such as of a checkpoint.
      folder: such as of its run; :func:`fetched` copies it.
    """
    url, around = url_of(path), url_of(folder)
    if url and around and url.startswith(f"{around}/"):
        return place("read", around) / url.removeprefix(f"{around}/")
    return fetched(path)


def _fetched(bucket: Bucket, without: Collection[str], tries: int = 5) -> pathlib.Path:
    try:
        entries = bucket.entries()
        if "" not in entries:
            copy, name = Copy(bucket, place("read", bucket.url)), ""
            follow(copy, without, entries)
        else:  # a file
            above, _, name = bucket.url.rpartition("/")
            copy = Copy(Bucket(above), place("read", above))
            with copy.alone():
                copy.fetch({name: entries[""]})
        return copy.folder / name
    except FileNotFoundError as error:  # a job has just replaced a checkpoint
        if tries == 1:
            raise BucketError("its objects are being replaced") from error
    return _fetched(bucket, without, tries - 1)


def follow(copy: Copy, without: Collection[str] = (), entries: Mapping[str, Entry] | None = None) -> None:
    """Makes a copy that nobody works in equal to the bucket, see :func:`needed`.

    Raises:
      FileNotFoundError: an object is gone.
    """
    found = copy.bucket.entries() if entries is None else entries
    with copy.alone():
        copy.forget([key for key in copy.known if key not in found])
        copy.fetch(needed(found, copy.bucket.url.partition("://")[2], without))
