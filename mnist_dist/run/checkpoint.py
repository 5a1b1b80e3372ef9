"""Checkpoints that are whole or not there.

A checkpoint is a folder `step-00001875` with `model.safetensors` (the weights that evaluation uses), `training.pt`
(what training goes on with) and `manifest.json` (size and sha256 of both). It is written into a temporary folder,
synced to the disk and renamed into place in one step, so a crash at any moment leaves either the whole of it or
nothing that `newest` would take. A damaged one is renamed aside, never deleted, and the one before it is used.

Only rank 0 comes here. Nothing from a file is ever run: safetensors, and torch.load with weights_only=True.
"""

import contextlib
import hashlib
import io
import json
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as save_safetensors
from torch import Tensor

from mnist_dist.errors import RequestError, StorageError, one_line
from mnist_dist.files import remove, sync_folder, write_synced
from mnist_dist.tensors import to_cpu

MODEL, TRAINING, MANIFEST = "model.safetensors", "training.pt", "manifest.json"
ABOUT = "about"  # the key of its metadata
_PREFIX, _TEMPORARY = "step-", ".tmp-"
# Far more than is ever written, so that a wrong file is never read into memory, let alone parsed.
_MAX_BYTES = {MODEL: 1 << 30, TRAINING: 1 << 30, MANIFEST: 1 << 16}

Say = Callable[[str], None]


class DamagedError(Exception):
    """The folder is not a whole checkpoint; the message says what is wrong with it."""


@dataclass(frozen=True)
class Checkpoint:
    """The verified content of a checkpoint."""

    path: Path
    step: int
    model: bytes
    training: bytes


def parse_training(data: bytes, origin: Path = Path(TRAINING)) -> dict[str, Any]:
    """What `save` was given as `training`. Raises RequestError, and runs no code from the file."""
    try:
        with warnings.catch_warnings(action="ignore"):  # what torch says of an odd file is said by the refusal
            state = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # a forged pickle makes torch's safe unpickler raise almost anything
        raise RequestError(f"{origin} is refused: {one_line(error)}") from None
    if not isinstance(state, dict):
        raise RequestError(f"{origin} is refused: it holds no training state")
    return state


def save(
    folder: Path,
    step: int,
    weights: dict[str, Tensor],
    training: dict[str, Any],
    keep: int,
    about: dict[str, Any] | None = None,
) -> Path:
    """Write the checkpoint of `step`, then prune down to the `keep` newest. Raises OSError; then nothing is lost.

    `about` goes into the metadata of model.safetensors. Returns the checkpoint's folder. Where that step already has a
    whole checkpoint it stays as it is.
    """
    path = folder / f"{_PREFIX}{step:08d}"
    folder.mkdir(exist_ok=True)  # not its parents: a run directory that vanished must be noticed, not made again
    if os.path.lexists(path):
        try:
            read(path)
            return path
        except DamagedError:
            _set_aside(path)
    weights, training = to_cpu((weights, training))
    buffer = io.BytesIO()
    torch.save(training, buffer)
    contents = {
        MODEL: save_safetensors(
            {k: v.detach().contiguous() for k, v in weights.items()},
            {
                ABOUT: json.dumps(about or {})
            },  # one key: several would come in a random order, and the same weights not be the same file
        ),
        TRAINING: buffer.getvalue(),
    }
    files = {name: {"bytes": len(data), "sha256": _sha256(data)} for name, data in contents.items()}
    contents[MANIFEST] = (json.dumps({"format": 1, "step": step, "files": files}, indent=2) + "\n").encode()

    sweep(folder)
    temporary = folder / f"{_TEMPORARY}{path.name}"
    temporary.mkdir()
    try:
        for name, data in contents.items():
            write_synced(temporary / name, data)
        sync_folder(temporary)
        temporary.rename(path)
    except OSError:
        remove(temporary)
        raise
    sync_folder(folder)
    with contextlib.suppress(OSError):  # the new one is safe; what is not pruned now is pruned after the next
        for old in _steps(folder)[keep:]:
            # Under a temporary name first: a crash inside rmtree must not leave half a checkpoint under a good name.
            doomed = folder / f"{_TEMPORARY}{old.name}"
            old.rename(doomed)
            remove(doomed)
    return path


def newest(folder: Path, say: Say) -> Checkpoint | None:
    """The newest whole checkpoint of a run; damaged ones are named, renamed aside and passed over."""
    for path in _steps(folder):
        try:
            return read(path)
        except DamagedError as error:
            aside = _set_aside(path)
            say(f"WARNING: checkpoint {path.name} is damaged ({error}); it was set aside as {aside.name}")
    return None


def find(path: Path, say: Say) -> Checkpoint:
    """The checkpoint that a user names: its folder, whatever it is called now, or a run's, whose newest is taken.

    Nothing is changed. Raises RequestError.
    """
    try:
        is_checkpoint = (path / MANIFEST).exists()
        candidates = [path] if is_checkpoint else _steps(path / "checkpoints") or _steps(path)
    except OSError as error:  # a name that is too long, say
        raise RequestError(f"{path} cannot be read: {error.strerror}") from None
    for candidate in candidates:
        try:
            return read(candidate, any_name=is_checkpoint)
        except DamagedError as error:
            say(f"WARNING: checkpoint {candidate} is damaged ({error}); it is passed over")
    raise RequestError(f"there is no whole checkpoint in {path}; give a run's folder or one checkpoint's")


def read(path: Path, *, any_name: bool = False) -> Checkpoint:
    """Read and verify one checkpoint; a run's own is called by its step. Raises DamagedError."""
    try:
        manifest = json.loads(_read_regular(path / MANIFEST))
        step, files = manifest["step"], manifest["files"]
        recorded = {name: (files[name]["bytes"], files[name]["sha256"]) for name in (MODEL, TRAINING)}
    except (ValueError, TypeError, KeyError, RecursionError):
        raise DamagedError(f"{MANIFEST} is not what was written") from None
    if type(step) is not int or (path.name != f"{_PREFIX}{step:08d}" and not any_name):  # True is an int too
        raise DamagedError(f"{MANIFEST} is of another step")
    data = {}
    for name, (num_bytes, sha256) in recorded.items():
        data[name] = _read_regular(path / name)
        if len(data[name]) != num_bytes or _sha256(data[name]) != sha256:
            raise DamagedError(f"{name} is not what was written")
    return Checkpoint(path, step, data[MODEL], data[TRAINING])


def newest_step(folder: Path) -> int:
    """The step of the newest checkpoint, whole or not; 0 where there is none."""
    return next((int(path.name.removeprefix(_PREFIX)) for path in _steps(folder)), 0)


def check_writable(folder: Path) -> None:
    """Find out before training, not at the first save, that nothing can be written here. Raises StorageError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f"{_TEMPORARY}probe"
        probe.mkdir(exist_ok=True)
        probe.rmdir()
    except OSError as error:
        raise StorageError(f"{folder} cannot be written: {error.strerror}; choose another run_dir") from None


def sweep(folder: Path) -> None:
    """Delete what a crash left half-written."""
    for stale in folder.glob(f"{_TEMPORARY}*"):
        remove(stale)


def _steps(folder: Path) -> list[Path]:
    """The checkpoints' folders, newest first."""
    found = [p for p in folder.glob(f"{_PREFIX}*") if p.name.removeprefix(_PREFIX).isdecimal()]
    return sorted(found, key=lambda p: int(p.name.removeprefix(_PREFIX)), reverse=True)


def _set_aside(path: Path) -> Path:
    number = 0
    while os.path.lexists(aside := path.with_name(f"damaged-{path.name}" + (f"-{number}" if number else ""))):
        number += 1
    path.rename(aside)
    return aside


def _read_regular(path: Path) -> bytes:
    try:
        if not path.is_file() or path.is_symlink():
            raise DamagedError(f"{path.name} is missing" if not path.exists() else f"{path.name} is no plain file")
        if path.stat().st_size > _MAX_BYTES[path.name]:
            raise DamagedError(f"{path.name} is far too large")
        return path.read_bytes()
    except OSError as error:
        raise DamagedError(f"{path.name} cannot be read: {error.strerror}") from None


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
