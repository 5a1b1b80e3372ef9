"""Signals and the STOP file become one flag.

`install` is called before torch is imported: imports take seconds, and an early SIGUSR1 would kill the process.
A handler only notes the signal; the loop asks `reason` at step boundaries, so nothing is ever saved or torn down
inside a handler. A second SIGINT, a second or more after the first, ends the process at once (torchrun forwards
the terminal's own Ctrl-C a second time within milliseconds, which must not count).

A rank whose launcher has died stops too: nobody would ever restart or collect it.
"""

import os
import signal
import time
from pathlib import Path
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)

_received: list[str] = []
_first_interrupt_s = 0.0
_launcher: int | None = None


def install() -> None:
    """Note the stop signals from now on. Main thread only."""
    global _launcher
    for number in SIGNALS:
        if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
            continue  # nohup asked for exactly that; for the other signals a launcher's "ignore" only bridges the start
        signal.signal(number, _note)
    if "RANK" in os.environ or "ACCELERATE_MIXED_PRECISION" in os.environ:  # a launcher started this process
        _launcher = os.getppid()


def _note(number: int, _frame: FrameType | None) -> None:
    global _first_interrupt_s
    if number == signal.SIGINT:
        now = time.monotonic()
        if _first_interrupt_s and now - _first_interrupt_s >= 1.0:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGINT)
        _first_interrupt_s = _first_interrupt_s or now
    _received.append(signal.Signals(number).name)


def reason(run_dir: Path | None) -> str:
    """Why this process should stop, in words, or the empty string. `run_dir` is looked at for a STOP file."""
    if _received:
        return _received[0]
    if _launcher is not None and os.getppid() != _launcher:
        return "the launcher is gone"
    return "STOP" if run_dir and (run_dir / "STOP").exists() else ""
