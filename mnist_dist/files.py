"""Files that are whole or not there: written beside their place, synced to the disk, and renamed into it.

And what is in the way of a file that cannot be found or written.
"""

import contextlib
import errno
import json
import os
import shutil
import stat
from pathlib import Path
from typing import Any


def write_atomically(path: Path, data: bytes) -> None:
    """Replace a file in one step. Raises OSError that names it; then the old one is still there."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write_synced(temporary, data)
        temporary.replace(path)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Replace a file by an object of JSON in one step. Raises OSError."""
    write_atomically(path, (json.dumps(content, indent=2) + "\n").encode())


def write_synced(path: Path, data: bytes) -> None:
    """Write a file, and wait until the disk has it. Raises OSError."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Wait until the disk has the names in a folder. Raises OSError."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove(path: Path) -> None:
    """Delete a folder, a file or a link; what cannot be deleted stays."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


def is_file(path: Path) -> bool:
    """Whether a file lies there, or a link to one. Raises OSError where that cannot be seen."""
    try:
        return stat.S_ISREG(path.stat().st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return False


def find_obstacle(path: Path) -> str:
    """What is in the way of a file, in words: a dead link, a file in the place of a folder, a right that lacks.

    Empty where nothing is, also where the file, or a folder on the way to it, is only not there.
    """
    path = path.absolute()
    for part in (*reversed(path.parents), path):
        try:
            is_folder = stat.S_ISDIR(part.stat().st_mode)
            if is_folder and part != path:
                os.stat(f"{part}/.")  # noqa: PTH116 (a Path loses the dot): whether it may be entered
        except FileNotFoundError:
            return f"{part} is a link to {part.readlink()}, which is not there" if part.is_symlink() else ""
        except OSError as error:
            if error.errno == errno.ELOOP:
                return f"{part} is a link that leads back to itself"
            return f"{part}: {error.strerror}"
        if is_folder != (part != path):
            return f"{part} is a folder, not a file" if is_folder else f"{part} is not a folder"
    return ""
