"""The exceptions that speak to the user; everything else that is raised is a bug of ours."""


def one_line(error: Exception) -> str:
    """An exception as one line of at most 200 characters, for a message that quotes it."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]


class InputError(ValueError):
    """Something that the user gave (config, data, checkpoint, folder) cannot be used.

    The message is one line that says what was wrong and what to do about it; the command line prints
    it without a traceback and exits with status 2.
    """


class DivergedError(ArithmeticError):
    """Training reached a loss or a gradient that is not finite.

    The message names the step and the checkpoint that was kept; the command line exits with status 3.
    """
