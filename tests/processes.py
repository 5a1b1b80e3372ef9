"""Which processes are there."""

from pathlib import Path


def is_alive(pid: int) -> bool:
    """Whether a process runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def ranks_of(folder: Path) -> list[int]:
    """Those of them that are ranks, not their launcher."""
    commands = {pid: Path(f"/proc/{pid}/cmdline").read_bytes() for pid in processes_of(folder)}
    return [pid for pid, line in commands.items() if b"/train.py\0" in line and b"accelerate" not in line]


def processes_of(folder: Path) -> list[int]:
    """Those that work in a folder."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if (entry / "cwd").readlink() == folder and is_alive(int(entry.name)):
                found.append(int(entry.name))
        except OSError:
            continue
    return found
