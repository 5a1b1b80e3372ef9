"""Signals and the STOP file become one flag.

`install` is called before torch is imported: imports take seconds, and an early SIGUSR1 would kill the process.
A handler only notes the signal; the loop asks `reason` at step boundaries, so nothing is ever saved or torn down
inside a handler. A second SIGINT, a second or more after the first, ends the process at once (torchrun forwards
the terminal's own Ctrl-C a second time within milliseconds, which must not count). A thread sees to that, since a
main thread that is stuck in a collective runs no handlers.

A rank whose launcher has died stops too: nobody would ever restart or collect it.
"""

import os
import signal
import threading
import time
from pathlib import Path
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)

_received: list[str] = []
_is_installed = False
_launcher: int | None = None


def install() -> None:
    """Note the stop signals from now on. Main thread only."""
    global _launcher, _is_installed
    if _is_installed:
        return  # by train.py, before the imports; the launcher may have gone since
    _is_installed = True
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)  # the interpreter writes each signal's number into it
    threading.Thread(target=_end_at_second_interrupt, args=(reader,), name="stop", daemon=True).start()
    for number in SIGNALS:
        if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
            continue  # nohup asked for exactly that; for the other signals a launcher's "ignore" only bridges the start
        signal.signal(number, _note)
    if "RANK" in os.environ or "ACCELERATE_MIXED_PRECISION" in os.environ:  # a launcher started this process
        _launcher = os.getppid()


def _note(number: int, _frame: FrameType | None) -> None:
    _received.append(signal.Signals(number).name)


def _end_at_second_interrupt(signals: int) -> None:
    first_s = 0.0
    while True:
        for number in os.read(signals, 64):
            now = time.monotonic()
            if number == signal.SIGINT and first_s and now - first_s >= 1.0:
                os._exit(128 + signal.SIGINT)
            if number == signal.SIGINT:
                first_s = first_s or now


def reason(run_dir: Path | None) -> str:
    """Why this process should stop, in words, or the empty string. `run_dir` is looked at for a STOP file."""
    if _received:
        return _received[0]
    if _launcher is not None and os.getppid() != _launcher:
        return "the launcher is gone"
    return "STOP" if run_dir and (run_dir / "STOP").exists() else ""
