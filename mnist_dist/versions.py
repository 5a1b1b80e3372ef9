"""What runs: the versions of Python and the libraries, the commit, and a hash of this package's own code."""

import hashlib
import importlib.metadata
import platform
import subprocess
from pathlib import Path

VERSION = "0.1.0"  # pyproject.toml takes it from here: a checkout runs without being installed
PACKAGES = ("torch", "torchvision", "accelerate", "numpy", "pydantic", "safetensors")
SOURCE = Path(__file__).parent


def library_versions() -> dict[str, str]:
    """Python's version, the job's own, and those of the libraries that are installed."""
    versions = {"python": platform.python_version(), "mnist-dist": VERSION}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def commit() -> str | None:
    """The commit of this code, where it runs from a checkout of its own; an installed copy may lie below another's."""
    git = ["git", "-C", str(SOURCE)]
    try:
        top = subprocess.run(
            [*git, "rev-parse", "--show-toplevel"], capture_output=True, text=True, timeout=10, check=True
        )
        if Path(top.stdout.strip()).resolve() != SOURCE.parent.resolve():
            return None
        describe = [*git, "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
        return subprocess.run(describe, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def code_hash() -> str:
    """The first twelve hexadecimal digits of a sha256 of this package's Python files, names included."""
    digest = hashlib.sha256()
    for path in sorted(SOURCE.rglob("*.py")):
        digest.update(f"{path.relative_to(SOURCE)}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]
