"""The run directory: chosen, locked and described by rank 0, the only one that writes there.

runs/NAME/
  config.yaml  versions.json      what ran, on what
  metrics.jsonl  console.log      every figure; what the console said
  checkpoints/step-00001875/      model.safetensors  training.pt  manifest.json
  lock                            who runs here now: host and pid
  STOP                            touch it, and the run stops cleanly
  DONE                            it finished; starting it again is a no-op that says so
"""

import fcntl
import importlib.metadata
import json
import os
import platform
import socket
import subprocess
import time
from io import FileIO
from pathlib import Path
from typing import Any

from mnist_dist.errors import RequestError, RunError

RUNS = Path("runs")


def create(recipe: str) -> Path:
    """A new directory runs/RECIPE-YYYYMMDD-HHMMSS. Raises RunError."""
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
        raise RunError(f"no run directory can be made in {RUNS.absolute()}: {error.strerror}; give run_dir=") from None
    return path


def point_latest(run_dir: Path) -> None:
    """Let runs/latest point to a run directory, if that lies in runs/. Raises OSError."""
    if run_dir.absolute().parent != RUNS.absolute():
        return
    link = RUNS / f".latest-{os.getpid()}"
    link.unlink(missing_ok=True)  # a crash's; in containers process ids come again
    link.symlink_to(run_dir.name)
    try:
        link.replace(RUNS / "latest")
    except OSError as error:
        link.unlink()
        raise OSError(error.errno, error.strerror, str(RUNS / "latest")) from None


class Lock:
    """One run at a time in a run directory. The lock dies with its owner, whatever kills it, and works on NFS."""

    def __init__(self, run_dir: Path) -> None:
        """Raises RequestError where another process runs here, RunError where nothing can be written."""
        self._file: FileIO  # without a buffer, which a full disk would leave something in
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
            self._file = (run_dir / "lock").open("ab+", buffering=0)
        except OSError as error:
            raise RunError(f"run_dir={run_dir} cannot be written: {error.strerror}; choose another") from None
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._file.seek(0)
            owner = self._file.read(200).decode(errors="replace").strip() or "another process"
            self._file.close()
            if isinstance(error, BlockingIOError):
                raise RequestError(f"run_dir={run_dir} is in use by {owner}; stop that run or choose another") from None
            raise RunError(f"run_dir={run_dir} cannot be locked: {error.strerror}; choose another") from None
        try:
            self._file.truncate(0)
            self._file.write(f"pid {os.getpid()} on {socket.gethostname()}\n".encode())
        except OSError as error:
            self._file.close()
            raise RunError(f"run_dir={run_dir} cannot be written: {error.strerror}; choose another") from None

    def release(self) -> None:
        """Let the next run in."""
        self._file.close()


def done_step(run_dir: Path) -> int | None:
    """The step at which the run finished, or None."""
    try:
        return int(json.loads((run_dir / "DONE").read_text())["step"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def write_atomically(path: Path, text: str) -> None:
    """Replace a small file in one step, synced to the disk. Raises OSError."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """The same for an object of JSON. Raises OSError."""
    write_atomically(path, json.dumps(content, indent=2) + "\n")


def versions() -> dict[str, Any]:
    """What runs: Python, the libraries, the commit. Never the environment."""
    found: dict[str, Any] = {"python": platform.python_version()}
    for package in ("mnist-dist", "torch", "torchvision", "accelerate", "numpy", "pydantic", "safetensors"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    source = Path(__file__).parent
    try:
        git = ["git", "-C", str(source), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
        found["commit"] = subprocess.run(git, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        found["commit"] = None
    return found
