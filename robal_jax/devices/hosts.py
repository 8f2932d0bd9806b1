"""The processes of one job, on one machine or many: how they start, which one writes, how all stop together.

All processes run the same program on the same numbers; each feeds its own devices. Work that must happen once
(repairing a folder, writing a report) is done by the first process, which sends its result to all
(:func:`by_first`). Values that must be the same in all processes are compared (:func:`check_agreement`).
"""

import contextlib
import hashlib
import itertools
import os
import pickle
import signal
import sys
import tempfile
import threading
import types
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.experimental.compilation_cache import compilation_cache

from robal_jax.errors import InputError, one_line

T = TypeVar("T")

START_SECONDS = 1800  # a process waits this long for all to join: a large slice may need as long to start

END_SECONDS = 30  # a process that fails waits this long for the others, and they end with it

_polls = itertools.count()  # numbers the calls to the preemption service, one service per process


def start(coordinator: str, processes: str = "", process: str = "") -> None:
    """Joins the other processes of the job; call it before anything else that asks JAX for devices.

    Args:
      coordinator: address ``host:port`` of the first process, 'auto' if JAX can find out everything itself
        (TPU slices, Slurm, Open MPI, Kubernetes), or '' for a job of one process.
      processes: how many processes there are; '' with 'auto'.
      process: number of this process, from 0.

    Raises:
      InputError: the process numbers are invalid or inconsistent, the other processes cannot be reached, or
        JAX cannot use the devices of ``JAX_PLATFORMS``.
    """
    if coordinator:
        _join(coordinator, processes, process)
    elif processes or process:
        raise InputError(
            "--processes and --process need --coordinator; give HOST:PORT, the same to all processes"
        )
    try:
        jax.devices()
    except Exception as error:  # plugins raise all kinds
        named = os.environ.get("JAX_PLATFORMS") or "this machine"
        raise InputError(
            f"JAX cannot start on {named} ({one_line(error)}); set JAX_PLATFORMS=cpu, or install "
            "the plugin of the accelerator"
        ) from error
    check_joined()
    if jax.process_count() > 1 and jax.default_backend() != "cpu":
        _check_cache(alone=jax.default_backend() == "gpu")


def check_joined() -> None:
    """Refuses several processes that have not joined, as those of a TPU slice without ``--coordinator``.

    They compute together, but no notice of a preemption, and no news of a lost host, reaches them.

    Raises:
      InputError: they have not.
    """
    if jax.process_count() > 1 and not jax.distributed.is_initialized():
        raise InputError(
            f"this is one of {jax.process_count()} processes that have not joined; add --coordinator=auto, "
            "or call jax.distributed.initialize() before JAX is used"
        )


def _check_cache(*, alone: bool) -> None:
    """Checks that all processes see the same folder with the cache of compiled programs.

    JAX writes the cache in the first process only. On TPUs the others compile again. XLA shares the choice of
    kernels for a GPU among all processes: one that finds a program in its own cache takes no part in it, and
    all others would wait for it. So the cache is turned off there.

    Args:
      alone: whether a process must not have a cache alone.
    """
    folder = os.environ.get("JAX_COMPILATION_CACHE_DIR", "")
    if not seen_by_all(folder):
        if alone:
            jax.config.update("jax_compilation_cache_dir", None)
            compilation_cache.reset_cache()  # which has begun with the first program
        if is_first() and folder:
            kept = "are not kept" if alone else "are kept for the first one only"
            print(
                f"warning: not all processes see {folder}, so compiled programs {kept}; name a folder that "
                "all hosts share in JAX_COMPILATION_CACHE_DIR",
                file=sys.stderr,
            )


def seen_by_all(folder: str) -> bool:
    """Returns whether a folder is the same in all processes: whether all see what the first one writes there.

    Args:
      folder: in this process; '' for none. Of URLs all must have the same.
    """
    mark = by_first(lambda: folder if "://" in folder else _leave_mark(folder))
    seen = bool(mark) and (mark == folder or os.path.exists(os.path.join(folder, mark)))
    found = bool(np.all(multihost_utils.process_allgather(np.array(seen))))
    if is_first() and mark and mark != folder:
        with contextlib.suppress(OSError):
            os.remove(os.path.join(folder, mark))
    return found


def _leave_mark(folder: str) -> str:
    """Writes an empty file, and returns its name; '' if that cannot be done."""
    if not folder:
        return ""
    try:
        os.makedirs(folder, exist_ok=True)
        handle, path = tempfile.mkstemp(prefix="seen-", dir=folder)
    except OSError:
        return ""
    os.close(handle)
    return os.path.basename(path)


def _join(coordinator: str, processes: str, process: str) -> None:
    """Joins the other processes of the job, see :func:`start`."""
    given: dict[str, Any] = {}
    if coordinator != "auto":
        try:
            given = {"num_processes": int(processes), "process_id": int(process)}
        except ValueError as error:
            raise InputError(
                "--coordinator=HOST:PORT needs --processes=N and --process=I, I in 0..N-1; give both, "
                "or --coordinator=auto on a TPU slice or under Slurm"
            ) from error
        if not 0 <= given["process_id"] < given["num_processes"]:
            raise InputError(f"--process={process} is out of range; give 0..{given['num_processes'] - 1}")
        given["coordinator_address"] = coordinator
        given["cluster_detection_method"] = "deactivate"  # Slurm's would leave a process one GPU
        print(f"process {process} of {processes}: waiting for all at {coordinator}", file=sys.stderr)
    try:
        jax.distributed.initialize(
            **given, initialization_timeout=START_SECONDS, shutdown_timeout_seconds=END_SECONDS
        )
    except (RuntimeError, ValueError) as error:
        raise InputError(
            f"cannot join the other processes ({coordinator}): {error}; check --coordinator, --processes and "
            "--process, and that all processes are running"
        ) from error


def is_first() -> bool:
    """Returns whether this is the process that writes files and messages."""
    return jax.process_index() == 0


def by_first(function: Callable[[], T]) -> T:
    """Runs ``function`` in the first process and gives its result, or its error, to all processes.

    All processes must make the same calls in the same order.

    Args:
      function: takes no arguments; its result must be picklable.

    Returns:
      The result of ``function``.

    Raises:
      InputError: ``function`` raised it.
      OSError: ``function`` raised it.
      RuntimeError: ``function`` raised anything else, which the first process raises as it is.
    """
    if jax.process_count() == 1:
        return function()
    content, fault = b"", None
    if is_first():
        try:
            content = pickle.dumps(function())
        except (InputError, OSError) as error:
            content = pickle.dumps(error)
        except Exception as error:  # otherwise all others would wait in vain
            fault, content = error, pickle.dumps(RuntimeError(f"the first process failed: {one_line(error)}"))
    result = pickle.loads(_from_first(content))
    if fault is not None:
        raise fault
    if isinstance(result, InputError | OSError | RuntimeError):
        raise result
    return result


PIECE = 2**26  # bytes that are sent at once


def _from_first(content: bytes) -> bytes:
    """Sends bytes of the first process to all, in pieces of few sizes, so that few programs are compiled."""
    size_in_words = np.array(divmod(len(content), 2**32), np.uint32)
    high, low = map(int, multihost_utils.broadcast_one_to_all(size_in_words))
    size, pieces = high * 2**32 + low, []
    for start in range(0, size, PIECE):
        length = min(PIECE, size - start)
        piece = np.zeros(max(1024, 1 << (length - 1).bit_length()), np.uint8)
        if is_first():
            piece[:length] = np.frombuffer(content, np.uint8, length, start)
        pieces.append(np.asarray(multihost_utils.broadcast_one_to_all(piece))[:length].tobytes())
    return b"".join(pieces)


@contextlib.contextmanager
def held_by_first(make: Callable[[], contextlib.AbstractContextManager[Any]]) -> Iterator[None]:
    """Enters ``make()``, such as a lock, in the first process, and leaves it there while all others wait.

    See :func:`by_first` for its errors.
    """
    with contextlib.ExitStack() as stack:

        def enter() -> None:
            stack.enter_context(make())

        by_first(enter)
        yield
        by_first(stack.close)


def check_agreement(what: str, value: str) -> None:
    """Raises in every process if they do not all have the same ``value``, so that none waits in vain.

    Args:
      what: name of the value, for the message.
      value: of this process.

    Raises:
      InputError: the values differ.
    """
    if jax.process_count() == 1:
        return
    mine = np.frombuffer(hashlib.sha256(value.encode()).digest(), np.uint8)
    found = multihost_utils.process_allgather(mine)
    different = [i for i, digest in enumerate(found) if not np.array_equal(digest, found[0])]
    if different:
        more = f" (and {len(different) - 1} more)" if len(different) > 1 else ""
        raise InputError(
            f"process {different[0]}{more} of {len(found)} disagrees with process 0 on {what}; "
            "start all processes with the same command, on the same data and the same folders"
        )


class Silent:
    """Takes the place of a meter or a log in all processes but the first; does nothing."""

    def update(self, *_: object) -> None:
        """Shows nothing."""

    def write(self, *_: object) -> None:
        """Writes nothing."""

    def __enter__(self) -> "Silent":
        return self

    def __exit__(self, *_: object) -> None:
        pass


def only_first(make: Callable[[], T]) -> T | Silent:
    """Returns ``make()`` in the first process, and :class:`Silent` in all other processes."""
    return make() if is_first() else Silent()


def speaker(say: Callable[[str], None]) -> Callable[[str], None]:
    """Returns ``say`` in the first process, and a function that does nothing in all other processes.

    A message that cannot be said, such as into a closed pipe, is lost, and nothing else.

    Raises:
      ValueError: ``say`` is no function.
    """
    if not callable(say):
        raise ValueError(f"say is {say!r}; pass a function of one text, such as print")

    def speak(line: str) -> None:
        with contextlib.suppress(Exception):
            say(line)

    return speak if is_first() else lambda _: None


class Stop:
    """Whether the job was asked to stop at its next safe moment: by SIGTERM, Ctrl-C or a preemption notice.

    A single process handles these signals itself, if this is its main thread. Several processes leave SIGTERM
    to JAX's preemption service (which Orbax uses as well): a notice to any process makes ``bool(stop)`` true
    in all of them at the same call, so they must all make the same number of calls.

    Attributes:
      asked: whether the job was asked to stop.
      interrupted: whether that was by Ctrl-C.
      handlers: the handlers before this one, by signal; the ``Stop`` of an enclosing loop is called as well.
    """

    def __init__(self) -> None:
        check_joined()
        self.asked = self.interrupted = False
        self._alone = jax.process_count() == 1
        mine = self._alone and threading.current_thread() is threading.main_thread()
        self.handlers = {
            number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT) if mine
        }

    def __bool__(self) -> bool:
        if not self._alone and not self.asked:
            self.asked = bool(multihost_utils.reached_preemption_sync_point(next(_polls)))
        return self.asked

    def ask(self) -> None:
        """Asks the job to stop, from any thread of any process."""
        if self._alone:
            self.asked = True
        else:
            os.kill(os.getpid(), signal.SIGTERM)  # which the preemption service tells all processes

    def __call__(self, number: int, frame: types.FrameType | None) -> None:
        """Notes a signal; a second Ctrl-C stops at once.

        Another SIGTERM changes nothing: batch systems often send it twice, to a job and to its processes.
        """
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked, self.interrupted = True, number == signal.SIGINT
        outer = self.handlers[signal.Signals(number)]
        if isinstance(outer, Stop):
            outer(number, frame)


def lost(say: Callable[[str], None], stop: Stop, line: str) -> None:
    """Says why a job has lost its folder, and asks it to stop."""
    say(line)
    stop.ask()


@contextlib.contextmanager
def stop_signals() -> Iterator[Stop]:
    """Turns SIGTERM and the first Ctrl-C into a flag that loops read; restores the handlers afterwards."""
    stop = Stop()
    for number in stop.handlers:
        signal.signal(number, stop)
    try:
        yield stop
    finally:
        for number, handler in stop.handlers.items():
            signal.signal(number, handler)
