"""The run directory: every path in it, how it is made, and its lock. Rank 0 is the only one that writes there.

runs/NAME/
  config.yaml  versions.json      what ran, on what
  metrics.jsonl  console.log      every figure; what the console said
  report.html                     the run on one page, written when it has finished
  checkpoints/step-00001875/      model.safetensors  training.pt  manifest.json
  lock                            who runs here now: host and pid
  STOP                            touch it, and the run stops cleanly
  DONE                            it finished; starting it again is a no-op that says so
"""

import fcntl
import json
import os
import socket
import time
from io import FileIO
from pathlib import Path

from mnist_dist.errors import RequestError, StorageError

RUNS = Path("runs")
LATEST = RUNS / "latest"


class RunDir:
    """The paths of a run."""

    def __init__(self, path: Path) -> None:
        """runs/latest, which the next start points elsewhere, stands for the folder that it points to now."""
        self.path = path
        if path.is_symlink() and path.absolute() == LATEST.absolute():
            self.path = path.parent / path.readlink()
        self.config = self.path / "config.yaml"
        self.versions = self.path / "versions.json"
        self.metrics = self.path / "metrics.jsonl"
        self.console = self.path / "console.log"
        self.report = self.path / "report.html"
        self.checkpoints = self.path / "checkpoints"
        self.lock = self.path / "lock"
        self.stop = self.path / "STOP"
        self.done = self.path / "DONE"

    def __str__(self) -> str:
        return str(self.path)

    def done_step(self) -> int | None:
        """The step at which the run finished, or None."""
        try:
            return int(json.loads(self.done.read_text())["step"])
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def make_latest(self) -> str:
        """Let runs/latest point here, if this lies in runs/. Returns why it could not, or the empty string."""
        if self.path.absolute().parent != RUNS.absolute() or self.path.name == LATEST.name:
            return ""
        link = RUNS / f".latest-{os.getpid()}"
        try:
            link.unlink(missing_ok=True)  # a crash's; in containers process ids come again
            link.symlink_to(self.path.name)
            link.replace(LATEST)
        except OSError as error:
            link.unlink(missing_ok=True)
            return f"{LATEST} still points elsewhere, or is no link: {error.strerror}"
        return ""


def create(recipe: str) -> RunDir:
    """Make a new directory runs/RECIPE-YYYYMMDD-HHMMSS. Raises StorageError."""
    stem = f"{recipe}-{time.strftime('%Y%m%d-%H%M%S')}"
    number = 1
    try:
        RUNS.mkdir(parents=True, exist_ok=True)  # apart, so that a FileExistsError below is the run's own name
        while True:
            path = RUNS / (stem if number == 1 else f"{stem}-{number}")
            try:
                path.mkdir()
                break
            except FileExistsError:
                number += 1
    except OSError as error:
        raise StorageError(
            f"no run directory can be made in {RUNS.absolute()}: {error.strerror}; give run_dir="
        ) from None
    return RunDir(path)


class Lock:
    """One run at a time in a run directory. The lock dies with its owner, whatever kills it, and works on NFS."""

    def __init__(self, run_dir: RunDir) -> None:
        """Raises RequestError where another process runs here, StorageError where nothing can be written."""
        self._file: FileIO  # without a buffer, which a full disk would leave something in
        try:
            run_dir.path.mkdir(parents=True, exist_ok=True)
            self._file = run_dir.lock.open("ab+", buffering=0)
        except OSError as error:
            raise StorageError(f"run_dir={run_dir} cannot be written: {error.strerror}; choose another") from None
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._file.seek(0)
            owner = self._file.read(200).decode(errors="replace").strip() or "another process"
            self._file.close()
            if isinstance(error, BlockingIOError):
                raise RequestError(f"run_dir={run_dir} is in use by {owner}; stop that run or choose another") from None
            raise StorageError(f"run_dir={run_dir} cannot be locked: {error.strerror}; choose another") from None
        try:
            self._file.truncate(0)
            self._file.write(f"pid {os.getpid()} on {socket.gethostname()}\n".encode())
        except OSError as error:
            self._file.close()
            raise StorageError(f"run_dir={run_dir} cannot be written: {error.strerror}; choose another") from None

    def release(self) -> None:
        """Let the next run in."""
        self._file.close()
