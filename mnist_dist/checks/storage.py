"""The run directory's file system and the dataset: work for a guarded child, since a file server may hang."""

import fcntl
import shutil
import time
from pathlib import Path

from mnist_dist.checks.guard import Report
from mnist_dist.config.schema import Config
from mnist_dist.data.dataset import load_dataset
from mnist_dist.data.download import find_place
from mnist_dist.errors import JobError
from mnist_dist.files import write_atomically

HELD_S = 60.0  # how long a lock is held at most: the child that holds it is killed before
SEEN_S = 3.0  # how long a host may need to see another's new file


def existing_parent(folder: Path) -> Path:
    """The folder, or the nearest above it that is there."""
    folder = folder.absolute()
    return folder if folder.is_dir() else existing_parent(folder.parent)


def hold_nonce(folder: Path, nonce: str, report: Report) -> None:
    """Write a file as those of a run are written. Then hold a lock on it.

    Reports its "path", in the folder or the nearest above that is there, and "free", the bytes that are left, once the
    lock is held. Raises OSError.
    """
    path = existing_parent(folder) / f".mnist-dist-{nonce[:8]}"
    report("path", str(path))
    write_atomically(path, nonce.encode())
    with path.open("r+") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        report("free", shutil.disk_usage(path.parent).free)
        time.sleep(HELD_S)


def read_nonce(path: Path, nonce: str, report: Report) -> None:
    """Report whether what another host wrote is "seen", and whether its lock "holds" here."""
    deadline_s = time.monotonic() + SEEN_S
    seen = False
    while not seen and time.monotonic() < deadline_s:
        try:
            seen = path.read_text() == nonce
        except OSError:
            time.sleep(0.1)
    report("seen", seen)
    if not seen:
        return
    with path.open("r+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            report("holds", False)
        except OSError:
            report("holds", True)


def remove_nonce(path: Path, _report: Report) -> None:
    """Delete the file again."""
    path.unlink(missing_ok=True)


def read_data(config: Config, report: Report) -> None:
    """Report the "fingerprint" of the dataset, None where it is not there, or why it cannot be read: "unreadable"."""
    try:
        if find_place(config.dataset, config.data_dir) is None:
            report("fingerprint", None)
            return
        report("fingerprint", load_dataset(config.dataset, config.data_dir).fingerprint)
    except JobError as error:
        report("unreadable", str(error))
