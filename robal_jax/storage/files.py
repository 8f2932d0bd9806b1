"""Writing a file so that it is complete, or not there at all."""

import contextlib
import pathlib
from collections.abc import Iterator
from typing import IO


@contextlib.contextmanager
def replacing(path: pathlib.Path) -> Iterator[IO[bytes]]:
    """Opens a file to write to, which replaces ``path`` when it is complete."""
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("wb") as file:
        yield file
    temporary.replace(path)


def write_whole(path: pathlib.Path, content: bytes) -> None:
    """Writes ``content`` to ``path``, all of it or nothing."""
    with replacing(path) as file:
        file.write(content)
