"""Disks that are small, full or read-only: real file systems where this may mount them, else what comes nearest."""

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

PAGE_BYTES = 4096  # what a tmpfs gives out at a time


def _mount(*arguments: object) -> None:
    subprocess.run(["mount", *map(str, arguments)], check=True, capture_output=True)


def _unmount(folder: Path) -> None:
    subprocess.run(["umount", "--lazy", str(folder)], check=True, capture_output=True)


@cache
def can_mount() -> bool:
    """Whether this process may mount file systems: root in a real machine may, in most containers it may not."""
    with TemporaryDirectory() as folder:
        try:
            with small_disk(Path(folder), 1):
                return True
        except (OSError, subprocess.CalledProcessError):
            return False


@contextmanager
def small_disk(folder: Path, num_pages: int) -> Iterator[Path]:
    """A file system of that many pages for the content of files; folders and empty files take none."""
    folder.mkdir(exist_ok=True)
    _mount("-t", "tmpfs", "-o", f"size={num_pages * PAGE_BYTES},huge=never", "tmpfs", folder)
    try:
        yield folder
    finally:
        _unmount(folder)


@contextmanager
def read_only(folder: Path) -> Iterator[Path]:
    """Nothing can be written in the folder for a while, by root neither where mounting is possible."""
    if not can_mount():
        mode = folder.stat().st_mode
        folder.chmod(0o555)
        try:
            yield folder
        finally:
            folder.chmod(mode)
        return
    _mount("--bind", folder, folder)
    try:
        _mount("-o", "remount,bind,ro", folder)
        yield folder
    finally:
        _unmount(folder)


def fill(folder: Path, num_free_pages: int = 0) -> Path:
    """Fill a file system but for some pages. Returns the file that takes the room; without it there is room again."""
    filler = folder / "filler"
    free = os.statvfs(folder)
    with filler.open("wb", buffering=0) as file:
        file.write(b"\0" * max(free.f_bavail * free.f_frsize - num_free_pages * PAGE_BYTES, 0))
    return filler


def resize(folder: Path, num_pages: int) -> None:
    """Give a small disk another size."""
    _mount("-o", f"remount,size={num_pages * PAGE_BYTES}", folder)
