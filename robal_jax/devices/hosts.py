"""The processes of one job, on one machine or many: how they start, who writes, and how all stop together.

Every process runs the same program on the same numbers; only the devices differ that it feeds. So what must
happen once (mending a folder, writing a report) the first process does, and the others are told what came of
it (:func:`by_first`); and what must be the same for all is compared (:func:`check_agreement`).
"""

import contextlib
import hashlib
import itertools
import pickle
import signal
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from robal_jax.errors import InputError

T = TypeVar("T")

START_SECONDS = 1800  # that a process waits for the others: a large slice may take so long to come up

_polls = itertools.count()  # of the preemption service, of which there is one a process


def start(coordinator: str, processes: str = "", process: str = "") -> None:
    """Joins the other processes of the job; to be called before anything else that asks JAX for devices.

    Args:
      coordinator: address ``host:port`` of the first process, 'auto' where JAX finds out all by itself (TPU
        slices, Slurm, Open MPI, Kubernetes), or '' for a job of one process.
      processes: how many there are; '' with 'auto'.
      process: number of this one, from 0.

    Raises:
      InputError: the numbers are no numbers or do not fit, or the others cannot be reached.
    """
    if not coordinator:
        if processes or process:
            raise InputError("--processes and --process need --coordinator=HOST:PORT, the same for all")
        return
    given: dict[str, Any] = {}
    if coordinator != "auto":
        try:
            given = {"num_processes": int(processes), "process_id": int(process)}
        except ValueError as error:
            raise InputError(
                "--coordinator=HOST:PORT needs --processes=N and --process=I, I in 0..N-1; "
                "or give --coordinator=auto on a TPU slice or under Slurm"
            ) from error
        if not 0 <= given["process_id"] < given["num_processes"]:
            raise InputError(f"--process={process} is not in 0..{given['num_processes'] - 1}")
        given["coordinator_address"] = coordinator
        print(f"process {process} of {processes}: waiting for all at {coordinator}", file=sys.stderr)
    try:
        jax.distributed.initialize(**given, initialization_timeout=START_SECONDS)
    except (RuntimeError, ValueError) as error:
        raise InputError(f"cannot join the other processes ({coordinator}): {error}") from error


def is_first() -> bool:
    """Whether this is the process that writes and speaks."""
    return jax.process_index() == 0


def by_first(function: Callable[[], T]) -> T:
    """What ``function`` returns, or the ``InputError`` that it raises, in the first process, for all of them.

    It runs there only. All processes must make the same calls in the same order.

    Args:
      function: of no arguments; what it returns can be pickled.

    Returns:
      What it returned.

    Raises:
      InputError: it did.
    """
    if jax.process_count() == 1:
        return function()
    result: Any = None
    if is_first():
        try:
            result = function()
        except InputError as error:
            result = error
    content = np.frombuffer(pickle.dumps(result), np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.array(len(content))))
    mine = content if is_first() else np.zeros(size, np.uint8)
    result = pickle.loads(np.asarray(multihost_utils.broadcast_one_to_all(mine)).tobytes())
    if isinstance(result, InputError):
        raise result
    return result


def check_agreement(what: str, value: str) -> None:
    """Refuses processes that do not have the same ``value``: in all of them, lest some wait for the others.

    Raises:
      InputError: they differ.
    """
    if jax.process_count() == 1:
        return
    mine = np.frombuffer(hashlib.sha256(value.encode()).digest(), np.uint8)
    found = multihost_utils.process_allgather(mine)
    others = [i for i, digest in enumerate(found) if not np.array_equal(digest, found[0])]
    if others:
        raise InputError(
            f"{what} of process {others[0]} ({len(others)} of {len(found)} processes) is not that of process "
            "0; all must be started with the same command, on the same data and the same folders"
        )


class Silent:
    """Stands in for a meter or a log where only the first process has one; does nothing."""

    def update(self, *_: object) -> None:
        """Shows nothing."""

    def write(self, *_: object) -> None:
        """Writes nothing."""

    def __enter__(self) -> "Silent":
        return self

    def __exit__(self, *_: object) -> None:
        pass


def only_first(make: Callable[[], T]) -> T | Silent:
    """What ``make`` gives in the first process, and :class:`Silent` in the others."""
    return make() if is_first() else Silent()


def speaker(say: Callable[[str], None]) -> Callable[[str], None]:
    """``say`` in the first process; the others keep quiet."""
    return say if is_first() else lambda _: None


class Stop:
    """Whether someone asked the job to stop at its next safe moment: SIGTERM, Ctrl-C, a preemption notice.

    Alone, a process handles these signals itself. One of several leaves SIGTERM to JAX's preemption service
    (which Orbax asks as well): a notice to any process makes ``bool(stop)`` true in all of them at the same
    call, so they must all make the same number of calls.

    Attributes:
      asked: whether.
      handlers: of signals that stood before this one; the ``Stop`` of an enclosing loop is told as well.
    """

    def __init__(self) -> None:
        self.asked = False
        self._alone = jax.process_count() == 1
        self.handlers = (
            {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
            if self._alone
            else {}
        )

    def __bool__(self) -> bool:
        if not self._alone and not self.asked:
            self.asked = bool(multihost_utils.reached_preemption_sync_point(next(_polls)))
        return self.asked

    def __call__(self, number: int, frame: types.FrameType | None) -> None:
        """A signal came; a second Ctrl-C stops at once."""
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked = True
        outer = self.handlers[signal.Signals(number)]
        if isinstance(outer, Stop):
            outer(number, frame)


@contextlib.contextmanager
def stop_signals() -> Iterator[Stop]:
    """Turns SIGTERM and the first Ctrl-C into a flag that loops look at; the handlers before come back."""
    stop = Stop()
    for number in stop.handlers:
        signal.signal(number, stop)
    try:
        yield stop
    finally:
        for number, handler in stop.handlers.items():
            signal.signal(number, handler)
