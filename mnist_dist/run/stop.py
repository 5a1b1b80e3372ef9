"""Signals and the STOP file become one flag.

`install` is called before torch is imported: imports take seconds, and an early SIGUSR1 would kill the process.
A handler only notes the signal; the loop asks `reason` at step boundaries, so nothing is ever saved or torn down
inside a handler. Before training has begun there is nothing to save: inside `interruptible` a signal is heard at once.
A second SIGINT, a second or more after the first, ends the process at once (torchrun forwards the terminal's own Ctrl-C
a second time within milliseconds, which must not count). A thread sees to that, since a main thread that is stuck in a
collective runs no handlers.

A rank whose launcher has died stops too: nobody would ever restart or collect it.
"""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from mnist_dist.errors import StoppedEarlyError

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)
# The programs and modules that start ranks. A parent may also be a shell, which may leave what it started.
LAUNCHERS = {"torchrun", "torch.distributed.run", "torch.distributed.launch", "accelerate", "accelerate-launch"}
LAUNCHERS |= {"accelerate.commands.launch", "slurmstepd", "mpirun", "mpiexec", "mpiexec.hydra", "orted", "prted"}

_STARTED_S = time.time()  # this module is the first that a run imports

_received: list[str] = []
_previous: dict[signal.Signals, Any] = {}  # the handlers that were there before
_previous_fd = -1  # the same for the file descriptor that the interpreter writes signals into
_is_interruptible = False
_launcher: int | None = None


def install() -> bool:
    """Note the stop signals from now on. In a thread, which gets no signals, this does nothing.

    Returns whether they were noted by nobody before.
    """
    global _launcher, _previous_fd
    if _previous or threading.current_thread() is not threading.main_thread():
        return False  # installed by the entry, before the imports; the launcher may have gone since
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    _previous_fd = signal.set_wakeup_fd(
        writer, warn_on_full_buffer=False
    )  # the interpreter writes each signal's number into it
    threading.Thread(target=_end_at_second_interrupt, args=(reader,), name="stop", daemon=True).start()
    for number in SIGNALS:
        if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
            continue  # nohup asked for exactly that; for the other signals a launcher's "ignore" only bridges the start
        _previous[number] = signal.signal(number, _note)
    if _is_launcher(os.getppid()):
        _launcher = os.getppid()
    return True


def uninstall() -> None:
    """Give the signals back, for a process that goes on after a run, as a notebook's does."""
    if threading.current_thread() is threading.main_thread():
        for number, handler in _previous.items():
            signal.signal(number, handler)
        if _previous:
            os.close(signal.set_wakeup_fd(_previous_fd))  # which ends the thread
        _previous.clear()
        _received.clear()


@contextmanager
def interruptible(what: str) -> Iterator[None]:
    """Inside, a stop signal raises StoppedEarlyError at once; `what` says in its sentence what was going on."""
    global _is_interruptible
    try:
        _is_interruptible = True
        if _received:
            raise StoppedEarlyError(_received[0])
        yield
    except Exception:  # a library that calls Python code may have made an error of its own of it
        if not _received:
            raise
        raise StoppedEarlyError(f"stopped by {_received[0]} while {what}; nothing is lost, start it again") from None
    finally:
        _is_interruptible = False


def reason(stop_file: Path | None) -> str:
    """Why this process should stop, in words, or the empty string."""
    if _received:
        return _received[0]
    if _launcher is not None and os.getppid() != _launcher:
        return "the launcher is gone"
    return "STOP" if stop_file and stop_file.exists() else ""


def remove_stale(stop_file: Path) -> None:
    """Delete a STOP file that is older than this process: it was meant for an earlier start. Raises OSError."""
    with contextlib.suppress(FileNotFoundError):
        if stop_file.stat().st_mtime < _STARTED_S:
            stop_file.unlink()


def _note(number: int, _frame: FrameType | None) -> None:
    _received.append(signal.Signals(number).name)
    if _is_interruptible:
        raise StoppedEarlyError(_received[0])


def _is_launcher(pid: int) -> bool:
    """Whether a process is one that starts ranks."""
    try:
        command = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
    except OSError:  # no such file system
        return "TORCHELASTIC_RUN_ID" in os.environ
    words = command.split("\0")[:4]  # python -u -m accelerate.commands.launch; slurmstepd: [12.0]
    return any(word.split(":")[0].rsplit("/", 1)[-1] in LAUNCHERS for word in words)


def _end_at_second_interrupt(signals: int) -> None:
    first_s = 0.0
    while numbers := os.read(signals, 64):
        for number in numbers:
            now = time.monotonic()
            if number == signal.SIGINT and first_s and now - first_s >= 1.0:
                os._exit(128 + signal.SIGINT)
            if number == signal.SIGINT:
                first_s = first_s or now
    os.close(signals)
