"""The run directory's record: the console, console.log, metrics.jsonl and the trackers.

Rank 0 has a Journal; the other ranks have none and stay silent. On a terminal the console shows a live bar and a
table row per epoch; elsewhere one plain line every few seconds, without control characters. Either way metrics.jsonl
has every figure: one JSON object a line, `event` first, floats in full precision.
"""

import contextlib
import json
import math
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

LINE_EVERY_S = 5.0  # seconds between progress lines in a log file


class Journal:
    """Writes what happened. Raises OSError, which names the file or the console, when it can't take it."""

    def __init__(self, run_dir: Path, track: Callable[[dict[str, Any], int], None] | None = None) -> None:
        self.run_dir = run_dir
        self.track = track
        # isatty alone decides: FORCE_COLOR, which many CIs set, would make rich draw a bar into a log file.
        is_terminal = sys.stdout is not None and sys.stdout.isatty()  # None: it was closed, `>&-`
        self.console = Console(highlight=False, soft_wrap=True, emoji=False, force_terminal=is_terminal)
        self._metrics = _Lines(run_dir / "metrics.jsonl")
        self._log = _Lines(run_dir / "console.log")
        self._bar: Progress | None = None
        self._task = TaskID(0)
        self._line_s = time.monotonic()
        self._has_header = False

    def say(self, text: str) -> None:
        """One line for a person, to the console and console.log."""
        try:
            self.console.print(text, markup=False)
        except OSError as error:
            raise OSError(error.errno, error.strerror, "the console") from None
        finally:  # the one may be on a full disk and the other not
            self._log.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}")

    def record(self, event: str, **figures: Any) -> None:
        """One object of metrics.jsonl; numbers of steps and evaluations go to the trackers too."""
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in figures.items()}
        self._metrics.write(json.dumps({"event": event, **finite}, allow_nan=False))
        if self.track and event in ("step", "eval"):
            prefix = figures.get("split", "train")
            numbers = {f"{prefix}/{k}": v for k, v in figures.items() if isinstance(v, float)}
            self.track(numbers, figures["step"])

    def start_progress(self, total_steps: int, step: int) -> None:
        """Show a bar from now on, if this is a terminal."""
        if self.console.is_terminal and not self.console.is_dumb_terminal:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
            )
            self._bar = Progress(*columns, console=self.console, transient=True)
            self._task = self._bar.add_task("training", total=total_steps, completed=step)
            self._bar.start()

    def progress(
        self, epoch: int, num_epochs: int, step: int, total_steps: int, loss: float, images_per_s: float
    ) -> None:
        """Where training stands: moves the bar, or prints a line if the last one is some seconds old."""
        figures = f"loss {loss:.4f}  {images_per_s:,.0f} images/s"
        if self._bar:
            text = f"epoch {epoch + 1}/{num_epochs}  {figures}"
            self._bar.update(self._task, completed=step, description=text)
        elif time.monotonic() - self._line_s >= LINE_EVERY_S:
            self._line_s = time.monotonic()
            self.say(f"epoch {epoch + 1}/{num_epochs}  step {step}/{total_steps}  {figures}")

    def epoch(self, epoch: int, step: int, loss: float, split: str, evaluation: Any, seconds: float) -> None:
        """A row of the table of epochs."""
        if not self._has_header:
            self._has_header = True
            self.say(
                f"{'epoch':>5} {'step':>8} {'train loss':>11} {split + ' loss':>16} {split + ' accuracy':>20} {'s':>8}"
            )
        accuracy = f"{100 * evaluation.accuracy:.2f} %"
        self.say(f"{epoch + 1:>5} {step:>8} {loss:>11.4f} {evaluation.loss:>16.4f} {accuracy:>20} {seconds:>8.1f}")

    def stop_progress(self) -> None:
        """Take the bar down, if there is one."""
        if self._bar:
            self._bar.stop()
            self._bar = None


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

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _append(self, data: bytes) -> None:
        end = os.fstat(self._file.fileno()).st_size
        try:
            while data:
                data = data[self._file.write(data) :]
        except OSError as error:
            with contextlib.suppress(OSError):
                self._file.truncate(end)
            raise OSError(error.errno, error.strerror, str(self.path)) from None


def warn(text: str) -> None:
    """One line on the standard error stream, for what comes before there is a run directory."""
    print(text, file=sys.stderr, flush=True)
