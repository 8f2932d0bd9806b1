"""Streams for messages, whose failures end no job: a closed pipe, a full disk, a lost terminal."""

import time
from typing import Any, TextIO


class Tolerant:
    """A text stream that keeps its first failure in place of raising it.

    A character that the stream's encoding lacks is written as its code.

    Attributes:
      error: the first failure, None if there was none.
      quiet_until: time of ``time.monotonic`` before which nothing is written.
    """

    def __init__(self, stream: TextIO | None) -> None:
        self._stream = stream
        self.error: Exception | None = None
        self.quiet_until = 0.0

    def write(self, text: str) -> int:
        """Writes a text as well as it can be written."""
        try:
            self._write(text)
        except (OSError, ValueError) as error:  # ValueError: the stream is closed
            self._keep(error)
        return len(text)

    def _write(self, text: str) -> None:
        if self._stream is None or time.monotonic() < self.quiet_until:
            return
        try:
            self._stream.write(text)
        except UnicodeEncodeError as error:
            self._stream.write(text.encode(error.encoding, "backslashreplace").decode(error.encoding))

    def flush(self) -> None:
        """Passes on what is written."""
        try:
            if self._stream is not None:
                self._stream.flush()
        except (OSError, ValueError) as error:
            self._keep(error)

    def isatty(self) -> bool:
        """Returns whether the stream is a terminal."""
        try:
            return self._stream is not None and self._stream.isatty()
        except (OSError, ValueError):
            return False

    @property
    def lost(self) -> Exception | None:
        """The first failure, unless it is a closed pipe: a reader such as head may have read enough."""
        return None if isinstance(self.error, BrokenPipeError) else self.error

    def _keep(self, error: Exception) -> None:
        self.error = self.error or error

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
