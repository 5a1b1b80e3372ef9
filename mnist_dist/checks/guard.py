"""Work that may hang, in a child process with a deadline.

What hangs in a driver or a file server cannot be interrupted, so the rank itself never touches one: it forks a child,
which reports over a pipe, and is killed when its time is over. The rank stays able to answer and to judge.
"""

import contextlib
import ctypes
import multiprocessing
import os
import signal
import time
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any, Self

from mnist_dist.errors import JobError, one_line

Report = Callable[[str, Any], None]  # takes the name of a result, and the result
FAILED = "failed"  # the name of what the child raised, in a sentence
DONE = "done"
_PR_SET_PDEATHSIG = 1


class Guarded:
    """A child at work; as a context manager it is killed at the end."""

    def __init__(self, work: Callable[[Report], None]) -> None:
        """Start it."""
        self.receiver, sender = multiprocessing.Pipe(duplex=False)
        self.reports: dict[str, Any] = {}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=DeprecationWarning)  # of threads, none of which the child needs
            self.child = os.fork()
        if self.child == 0:
            self.receiver.close()
            _be_child(work, sender)
        sender.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.child, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(self.child, os.WNOHANG)  # one that is stuck in the kernel never ends
        self.receiver.close()

    def collect(self, deadline_s: float, until: str = DONE) -> dict[str, Any]:
        """What it has reported until it reported `until`, was done, failed, or so many seconds were over."""
        end_s = time.monotonic() + deadline_s
        try:
            while not {until, DONE, FAILED} & self.reports.keys():
                if not self.receiver.poll(max(end_s - time.monotonic(), 0)):
                    break
                name, value = self.receiver.recv()
                self.reports[name] = value
        except EOFError:
            self.reports[FAILED] = "its process was killed"
        return self.reports


def run_guarded(work: Callable[[Report], None], deadline_s: float) -> dict[str, Any]:
    """Let a child do work that may hang; returns what it reported, "done" among it where it came to its end."""
    with Guarded(work) as child:
        return child.collect(deadline_s)


def _be_child(work: Callable[[Report], None], sender: Connection) -> None:
    """Do the work and end, without whatever the parent has registered for its own end."""
    try:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        work(lambda name, value: sender.send((name, value)))
        sender.send((DONE, True))
    except Exception as error:  # whatever a driver raises is a result
        is_plain = isinstance(error, OSError | JobError)
        words = getattr(error, "strerror", None) or one_line(error)
        with contextlib.suppress(OSError):
            sender.send((FAILED, words if is_plain else f"{type(error).__name__}: {words}"))
    finally:
        os._exit(0)
