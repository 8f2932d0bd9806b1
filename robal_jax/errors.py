"""The exceptions for the user of the command line, and what the environment may do to it, in one line.

Any other exception there is a bug of the library.
"""

import errno
import os
import pathlib
import traceback
from typing import Any


def one_line(error: Exception) -> str:
    """Returns an exception as one line of at most 200 characters, to quote it in a message."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]


def shown(value: Any) -> str:
    """Returns a value as Python writes it, shortened to 80 characters, to quote it in a message."""
    try:
        text = " ".join(repr(value).split())
    except ValueError:  # Python does not print integers of thousands of digits
        return f"a {type(value).__name__} too long to print"
    return text if len(text) <= 80 else f"{text[:77]}..."


def place_in(file: str | None, error: Exception) -> str:
    """Returns the line of a user's file where an error arose, ' (my.py:12)'; '' if it arose elsewhere."""
    if file is None:
        return ""
    at = os.path.abspath(file)  # as Python has it in tracebacks
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if frame.filename in (file, at)]
    if isinstance(error, SyntaxError) and error.filename in (file, at):
        lines.append(error.lineno)
    return f" ({file}:{lines[-1]})" if lines else ""


class InputError(ValueError):
    """An input (config, data, checkpoint, folder) cannot be used.

    The message is one line: what is wrong; what to do. The command line prints it without a traceback and
    exits with status 2.
    """


class ReportError(InputError):
    """The results of an evaluation are stored, but its report could not be written."""


class DivergedError(ArithmeticError):
    """A loss or a gradient of the training is not finite.

    The message names the step and the checkpoint that was kept; the command line exits with status 3.
    """


def user_path(text: str) -> pathlib.Path:
    """Returns the path that a user named; ``~`` and ``~user`` are home folders, all else is literal.

    Raises:
      InputError: there is no such home folder.
    """
    expanded = os.path.expanduser(text)
    if text.startswith("~") and expanded == text:
        home = text.partition("/")[0]
        raise InputError(f"no home folder {home} for {text}; write the whole path, or ./{text} for that name")
    return pathlib.Path(expanded)


AGAIN = "run the same command again"
"""Advice after most errors, because every command resumes."""

_MEMORY = (
    "out of memory ({}); lower config.train.batch_size (or raise config.train.accumulation_steps), or lower "
    "config.evaluation.batch_size"
)
_PROCESSES = "the system starts no more processes or threads ({}); raise the limit (ulimit -u), and " + AGAIN
_FULL = "disk full ({}); completed files are intact: free some space and " + AGAIN
_LARGE = "a file is larger than the system allows ({}); raise the limit (ulimit -f), and " + AGAIN
_GONE = "a file or folder is gone ({}); put back what was moved or removed, and " + AGAIN
_SHARE = (
    "a drive cannot be reached ({}); completed files are intact: check the drive or network, and " + AGAIN
)
_DENIED = "no permission ({}); choose a file or folder that you may use, or change its permissions"
_OPEN = "too many open files ({}); raise the limit (ulimit -n), and " + AGAIN

_DRIVE = (errno.EIO, errno.ESTALE, errno.ENOTCONN, errno.ETIMEDOUT, errno.EHOSTDOWN, errno.EREMOTEIO)
_PERMISSION = (errno.EACCES, errno.EPERM, errno.EROFS)
_LIMIT = (errno.EMFILE, errno.ENFILE)

UNREACHABLE = frozenset((*_DRIVE, *_PERMISSION, *_LIMIT, errno.ENOMEM))
"""Numbers of an ``OSError`` that say nothing about what a file holds: it may be whole."""

_BY_NUMBER = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), _FULL),
    errno.EFBIG: _LARGE,
    errno.ENOENT: _GONE,
    **dict.fromkeys(_PERMISSION, _DENIED),
    **dict.fromkeys(_LIMIT, _OPEN),
    **dict.fromkeys(_DRIVE, _SHARE),
    errno.ENAMETOOLONG: "a name is too long ({}); choose a shorter one",
    errno.EAGAIN: _PROCESSES,
    errno.ENOMEM: _MEMORY,
}
_BY_WORDS = {
    "resource_exhausted": _MEMORY,
    "out of memory": _MEMORY,
    "out_of_memory": _MEMORY,
    "can't start new thread": _PROCESSES,
    "unable to initialize backend": "JAX cannot start ({}); set JAX_PLATFORMS=cpu, or install the plugin",
}
"""Words of a ``RuntimeError`` of JAX or Python."""


def of_environment(error: BaseException) -> str | None:
    """Returns one line about an error for which the machine is to blame; None for any other error."""
    if isinstance(error, OSError):
        where = f": {error.filename}" if error.filename else ""
        what = f"{error.strerror or one_line(error)}{where}"
        line = _BY_NUMBER.get(error.errno or 0, "{}; remove the cause, and " + AGAIN)
    elif isinstance(error, MemoryError):
        what, line = one_line(error), _MEMORY
    elif isinstance(error, RuntimeError):
        what, words = one_line(error), str(error).lower()
        line = next((line for word, line in _BY_WORDS.items() if word in words), "")
    else:
        line = what = ""
    return " ".join(line.format(what).split()) or None
