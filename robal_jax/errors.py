"""The exceptions for the user of the command line; any other exception there is a bug of the library."""


def one_line(error: Exception) -> str:
    """Returns an exception as one line of at most 200 characters, to quote it in a message."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]


class InputError(ValueError):
    """An input (config, data, checkpoint, folder) cannot be used.

    The message is one line: what is wrong; what to do. The command line prints it without a traceback and
    exits with status 2.
    """


class DivergedError(ArithmeticError):
    """A loss or a gradient of the training is not finite.

    The message names the step and the checkpoint that was kept; the command line exits with status 3.
    """
