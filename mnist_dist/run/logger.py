"""The run's record: the console, console.log, metrics.jsonl and the trackers.

Rank 0 has a Logger; the other ranks have a NullLogger and stay silent. On a terminal the console shows a live bar and a
table row per epoch; elsewhere one plain line every few seconds, without control characters. Either way metrics.jsonl
has every figure: one JSON object a line, `event` first, floats in full precision.

The record serves the run: nothing here raises. A console whose reader is gone and a tracker that fails are dropped. A
file that cannot be written is remembered in `failure`, for which the run stops at the next sync, and saves first.
"""

import contextlib
import json
import math
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO, cast

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from mnist_dist.errors import one_line
from mnist_dist.run.run_dir import RunDir

LINE_EVERY_S = 5.0  # seconds between progress lines in a log file
NARROW = 60  # columns, below which the bar leaves out what is not step or bar


class NullLogger:
    """The record of a rank that keeps none."""

    failure = ""  # why a file could not be written

    def info(self, text: str) -> None:
        """One line for a person, to the console and console.log."""

    def log_line(self, text: str) -> None:
        """One line to console.log alone."""

    def log_metrics(self, event: str, **figures: Any) -> None:
        """One object of metrics.jsonl; numbers of steps and evaluations go to the trackers too."""

    def start_tracking(self, track: Callable[[dict[str, Any], int], None]) -> None:
        """Hand numbers of steps and evaluations to `track` from now on, with their step."""

    def start_progress(self, total_steps: int, step: int) -> None:
        """Show a bar from now on, if this is a terminal."""

    def log_progress(self, epoch: str, step: int, loss: float, images_per_s: float) -> None:
        """Where training stands: moves the bar, or prints a line if the last one is some seconds old."""

    def log_epoch(self, epoch: int, step: int, loss: float, split: str, evaluation: Any, seconds: float) -> None:
        """A row of the table of epochs."""

    def stop_progress(self) -> None:
        """Take the bar down, if there is one."""


class Logger(NullLogger):
    """Writes what happened."""

    def __init__(self, run_dir: RunDir) -> None:
        """Raises OSError where the run's files cannot be opened."""
        self._track: Callable[[dict[str, Any], int], None] | None = None
        # isatty alone decides: FORCE_COLOR, which many CIs set, would make rich draw a bar into a log file.
        is_terminal = sys.stdout is not None and sys.stdout.isatty()  # None: it was closed, `>&-`
        stream = cast("TextIO", _Stream(sys.stdout)) if sys.stdout else None
        columns = os.environ.get("COLUMNS", "")
        width = 80 if columns.isdecimal() and int(columns) == 0 else None
        self.console = Console(
            file=stream,
            highlight=False,
            soft_wrap=True,
            emoji=False,
            force_terminal=is_terminal,
            force_jupyter=False,  # a notebook takes plain lines too
            width=width,
        )
        # Lines are the terminal's to wrap, so that a path can be copied; a narrow one would break words.
        self.console.soft_wrap = not (is_terminal and self.console.width < NARROW)
        self._metrics = _Lines(run_dir.metrics)
        self._log = _Lines(run_dir.console)
        self._bar: Progress | None = None
        self._task = TaskID(0)
        self._total_steps = 0
        self._line_s = time.monotonic()
        self._has_header = False

    def info(self, text: str) -> None:
        self.console.print(text, markup=False)
        self.log_line(text)

    def log_line(self, text: str) -> None:
        self._write(self._log, f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}")

    def log_metrics(self, event: str, **figures: Any) -> None:
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in figures.items()}
        self._write(self._metrics, json.dumps({"event": event, **finite}, allow_nan=False))
        if self._track and event in ("step", "eval"):
            prefix = figures.get("split", "train")
            numbers = {f"{prefix}/{k}": v for k, v in figures.items() if isinstance(v, float)}
            try:
                self._track(numbers, figures["step"])
            except Exception as error:  # whatever a tracker's library raises
                self._track = None
                self.info(f"WARNING: the tracker fails and is dropped; metrics.jsonl goes on: {one_line(error)}")

    def start_tracking(self, track: Callable[[dict[str, Any], int], None]) -> None:
        self._track = track

    def start_progress(self, total_steps: int, step: int) -> None:
        self._total_steps = total_steps
        if self.console.is_terminal and not self.console.is_dumb_terminal:
            steps, bar = MofNCompleteColumn(), BarColumn(bar_width=None)
            columns = [steps, bar]
            if self.console.width >= NARROW:
                columns = [TextColumn("{task.description}"), bar, steps, TimeRemainingColumn()]
            self._bar = Progress(*columns, console=self.console, transient=True)
            self._task = self._bar.add_task("training", total=total_steps, completed=step)
            self._bar.start()

    def log_progress(self, epoch: str, step: int, loss: float, images_per_s: float) -> None:
        figures = f"loss {loss:.4f}  {images_per_s:,.0f} images/s"
        if self._bar:
            self._bar.update(self._task, completed=step, description=f"epoch {epoch}  {figures}")
        elif time.monotonic() - self._line_s >= LINE_EVERY_S:
            self._line_s = time.monotonic()
            self.info(f"epoch {epoch}  step {step}/{self._total_steps}  {figures}")

    def log_epoch(self, epoch: int, step: int, loss: float, split: str, evaluation: Any, seconds: float) -> None:
        if not self._has_header:
            self._has_header = True
            self.info(
                f"{'epoch':>5} {'step':>8} {'train loss':>11} {split + ' loss':>16} {split + ' accuracy':>20} {'s':>8}"
            )
        accuracy = f"{100 * evaluation.accuracy:.2f} %"
        self.info(f"{epoch + 1:>5} {step:>8} {loss:>11.4f} {evaluation.loss:>16.4f} {accuracy:>20} {seconds:>8.1f}")

    def stop_progress(self) -> None:
        if self._bar:
            self._bar.stop()
            self._bar = None

    def _write(self, lines: "_Lines", line: str) -> None:
        try:
            lines.write(line)
        except OSError as error:
            self.failure = self.failure or f"{error.filename} could not be written: {error.strerror or error}"


class _Lines:
    """A file of lines to append to. There is no buffer: what the disk refuses is not written later, or half."""

    def __init__(self, path: Path) -> None:
        """A last line that a crash cut short is ended, so that the next stands alone. Raises OSError."""
        self.path = path
        self._file = path.open("ab+", buffering=0)
        if self._file.tell():
            self._file.seek(-1, os.SEEK_END)
            if self._file.read(1) != b"\n":
                self._append(b"\n")

    def write(self, line: str) -> None:
        """Append a line, whole or not at all. Raises OSError."""
        self._append(f"{line}\n".encode(errors="backslashreplace"))

    def _append(self, data: bytes) -> None:
        end = os.fstat(self._file.fileno()).st_size
        try:
            while data:
                data = data[self._file.write(data) :]
        except OSError as error:
            with contextlib.suppress(OSError):
                self._file.truncate(end)
            raise OSError(error.errno, error.strerror, str(self.path)) from None


class _Stream:
    """A stream of text that never fails: once its reader or its disk is gone, the rest goes nowhere."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write what the other end still takes."""
        try:
            return self._stream.write(text)
        except (OSError, ValueError):
            self._drop()
            return len(text)

    def flush(self) -> None:
        """Flush what the other end still takes."""
        try:
            self._stream.flush()
        except (OSError, ValueError):
            self._drop()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _drop(self) -> None:
        with contextlib.suppress(OSError, ValueError):  # what is buffered is written when the interpreter ends
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)


def warn(text: str) -> None:
    """One line on the standard error stream, for what comes before there is a run directory."""
    print(text, file=sys.stderr, flush=True)
