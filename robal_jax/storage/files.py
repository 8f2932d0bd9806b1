"""Writing a file so that it is complete, or not there at all, and so that it replaces no file of others."""

import contextlib
import errno
import json
import os
import pathlib
import re
from collections.abc import Iterator
from typing import IO, Any

from robal_jax.errors import InputError, one_line

BEGINNING = 2**16  # bytes by which a file is recognised

URL = re.compile(r"(gs|s3):/{1,2}(?=[^/])")  # of a bucket; pathlib makes one slash of two


def check_replaceable(path: pathlib.Path, mark: str) -> None:
    """Checks that a file that is to be written is new, empty, or an earlier output of the same command.

    Args:
      path: of the file.
      mark: a text that the beginning of such an output contains.

    Raises:
      InputError: it is another file, which would be lost, or a folder, or in a bucket.
    """
    if URL.match(str(path)):
        url = URL.sub(r"\1://", str(path))
        raise InputError(f"{url} is in a bucket; name a file of this machine")
    try:
        if path.is_dir():
            raise InputError(f"{path} is a folder; choose another file")
        if path.is_file():
            with path.open("rb") as file:
                beginning = file.read(BEGINNING)
            if beginning and mark.encode() not in beginning:
                raise InputError(
                    f"{path} is not an earlier output of this command, and would be lost; choose another "
                    "file, or remove it"
                )
    except OSError as error:
        raise InputError(f"cannot write {path} ({error.strerror}); choose another file") from error


@contextlib.contextmanager
def replacing(path: pathlib.Path) -> Iterator[IO[bytes]]:
    """Opens a file to write to, which replaces ``path`` when it is complete and on the disk."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            _to_disk(file)
        temporary.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def _to_disk(file: IO[bytes]) -> None:
    """Waits until a file is on the disk, so that a loss of power leaves no empty file under its name."""
    try:
        os.fsync(file.fileno())
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):  # drives that cannot do it
            raise


def broken_link(path: pathlib.Path) -> str:
    """Says which link on a path leads nowhere; '' if none does."""
    broken = (part for part in (path, *path.parents) if os.path.islink(part) and not os.path.exists(part))
    link = next(broken, None)
    return f"{link} is a link to {os.readlink(link)}, which is not there" if link else ""


def reason(error: OSError, path: pathlib.Path) -> str:
    """Says why a path cannot be used: a broken link, or what the system says."""
    return broken_link(path) or error.strerror or one_line(error)


def write_whole(path: pathlib.Path, content: bytes) -> None:
    """Writes ``content`` to ``path``, all of it or nothing."""
    with replacing(path) as file:
        file.write(content)


def json_object(path: pathlib.Path) -> dict[str, Any]:
    """Reads an object of a JSON file; empty if it is none, or cannot be read."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}
