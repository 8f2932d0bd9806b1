"""TODO storage.files."""

import contextlib
import pathlib
from collections.abc import Iterator
from typing import IO


@contextlib.contextmanager
def replacing(path: pathlib.Path) -> Iterator[IO[bytes]]:
    """A file to write to, which takes the place of ``path`` when it is complete."""
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("wb") as file:
        yield file
    temporary.replace(path)


def write_whole(path: pathlib.Path, content: bytes) -> None:
    """Writes a file so that it is there whole or not at all."""
    with replacing(path) as file:
        file.write(content)
