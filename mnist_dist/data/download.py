"""Brings a dataset to this machine, once, whole or not at all.

`fetch` leaves one file, `DATA_DIR/DATASET.safetensors`, from which training reads fastest. It is made from the
dataset's own archives, of which torchvision has addresses and md5 sums; those that are fetched are kept in
torchvision's layout (`DATA_DIR/MNIST/raw/`). Drawn digits are kept in the same way.

Everything happens under a lock and ends in an atomic rename: processes that fetch at once do it once, and a process
that dies leaves nothing that a later one would trust. Where nothing may be written, the archives serve as they are.
"""

import errno
import fcntl
import http.client
import os
import shutil
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from mnist_dist.config.paths import redact_address, split_credentials
from mnist_dist.data.archives import CLASSES, find_archives, list_archives, md5_of, raw_folder, read_archives
from mnist_dist.data.dataset import dataset_file, fetch_command, is_prepared, write_dataset
from mnist_dist.data.synthetic import draw_dataset
from mnist_dist.errors import DownloadError, RequestError, StorageError
from mnist_dist.files import find_obstacle, is_file, remove

Say = Callable[[str], None]

NUM_ROUNDS = 3  # how often every address is tried
STALL_S = 20.0  # seconds without a byte after which an address is given up
SAY_EVERY_S = 5.0  # what is waited for
_CHUNK_BYTES = 1 << 16
_FULL = (errno.ENOSPC, errno.EDQUOT)


def fetch(
    dataset: str,
    data_dir: Path,
    *,
    mirror: str = "",
    missing: str = "download",
    say: Say = print,
    stall_s: float = STALL_S,
) -> str:
    """Make sure that the dataset can be loaded from data_dir, and return its name.

    The name is another one ("synthetic") only where `missing` is "synthetic" and the dataset could not be fetched.
    Safe to call from several processes on one file system at once. Raises RequestError, and StorageError where the disk
    is full.
    """
    if missing == "fail":  # nothing is written
        if dataset == "synthetic" and not is_prepared(dataset, data_dir):
            say(f"drawing 70,000 digits at each start; {fetch_command(dataset, data_dir)} keeps them")
        else:
            look_up(dataset, data_dir, "missing=fail forbids the network; run {} where there is one", say)
        return dataset
    try:
        if not is_prepared(dataset, data_dir):  # first without the lock, so that a folder one may only read will do
            data_dir.mkdir(parents=True, exist_ok=True)
            with _locked(dataset, data_dir, say):
                if not is_prepared(dataset, data_dir):
                    _bring(dataset, data_dir, mirror, say, stall_s)
        return dataset
    except DownloadError as error:
        if missing != "synthetic":
            raise
        say(f"WARNING: {error}")
    except BrokenPipeError:  # `say` has lost its reader
        raise
    except OSError as error:
        if error.errno in _FULL:
            raise StorageError(f"data_dir={data_dir} has no room for {dataset}: {error.strerror}") from None
        cause = error.strerror or str(error)
        if error.filename and Path(error.filename) != data_dir:
            cause = f"{error.filename}: {cause}"
        if not (place := find_place(dataset, data_dir)):
            raise RequestError(
                f"data_dir={data_dir} cannot be written ({cause}); mend that, or give another folder"
            ) from None
        say(f"data_dir={data_dir} cannot be written ({cause}), so {dataset} is read from {place} at each start")
        return dataset
    say(f"WARNING: no {dataset} here, so this trains on DRAWN DIGITS (dataset=synthetic); its figures are theirs")
    return fetch("synthetic", data_dir, say=say)


def find_place(dataset: str, data_dir: Path) -> Path | None:
    """The dataset's one file, or else the folder of its archives, or None where it is not whole.

    Raises RequestError.
    """
    if is_prepared(dataset, data_dir):
        return dataset_file(dataset, data_dir)
    if dataset not in CLASSES:
        return None
    files, lacking = find_archives(dataset, data_dir)
    return None if lacking else next(iter(files.values())).parent


def look_up(dataset: str, data_dir: Path, reason: str, say: Say) -> None:
    """Make sure that the dataset can be loaded from data_dir as it is; nothing is written, and nobody asked.

    `reason` says in the error why it is not brought there; {} in it becomes the command that would. Raises
    DownloadError, RequestError.
    """
    if is_prepared(dataset, data_dir):
        return
    path = dataset_file(dataset, data_dir)
    problem = f"there is no {path}"
    if dataset in CLASSES:
        files, lacking = find_archives(dataset, data_dir)
        if not lacking:
            say(f"{dataset} is read from {next(iter(files.values())).parent} at each start, since there is no {path}")
            return
        problem = next(iter(lacking.values()))
    raise DownloadError(f"{problem}, and {reason.format(fetch_command(dataset, data_dir))}")


@contextmanager
def _locked(dataset: str, data_dir: Path, say: Say) -> Iterator[None]:
    """Hold the dataset's lock, which one process on any machine has at a time, and loses when it ends.

    Raises OSError where data_dir cannot be written or has no locks.
    """
    path = data_dir / f".{dataset}.lock"
    try:
        tempfile.TemporaryFile(dir=data_dir).close()  # the lock's file may be there already
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(data_dir)) from None
    try:
        lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except PermissionError:
        lock = os.open(path, os.O_RDONLY)  # another user's, which most file systems lock all the same
    try:
        began_s = time.monotonic()
        say_s = began_s + 1  # a dataset that is only unpacked is not worth a line
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                pass
            except OSError as error:
                raise OSError(error.errno, f"it has no file locks: {error.strerror}", str(data_dir)) from None
            if (now_s := time.monotonic()) >= say_s:
                say_s = now_s + SAY_EVERY_S
                say(f"waiting for another process that fetches {dataset}, since {now_s - began_s:.0f} s ({path})")
            time.sleep(0.1)
        yield
    finally:
        os.close(lock)


def _bring(dataset: str, data_dir: Path, mirror: str, say: Say, stall_s: float) -> None:
    """Put the dataset there. The caller holds its lock. Raises OSError, RequestError."""
    for stale in data_dir.glob(f".{dataset}.safetensors.*"):
        remove(stale)
    if dataset == "synthetic":
        say("drawing 70,000 digits, once")
        parts = draw_dataset()
    else:
        files = _fetch_archives(dataset, data_dir, mirror, say, stall_s)
        say(f"unpacking {dataset}, once")
        parts = read_archives(dataset, files)
    write_dataset(dataset_file(dataset, data_dir), dataset, *parts)


def _fetch_archives(dataset: str, data_dir: Path, mirror: str, say: Say, stall_s: float) -> dict[str, Path]:
    """Fetch the archives that are not there, and return where each lies. Raises OSError, RequestError."""
    files, lacking = find_archives(dataset, data_dir)
    if lacking and mirror and "://" not in mirror:
        files = find_archives(dataset, Path(mirror))[0] | files
    raw = raw_folder(dataset, data_dir)
    for archive in list_archives(dataset):
        if archive.name in files:
            continue
        path = raw / archive.name
        if obstacle := find_obstacle(path):
            raise RequestError(f"data_dir={data_dir} cannot be used ({obstacle}); mend that, or give another folder")
        raw.mkdir(parents=True, exist_ok=True)
        for stale in raw.glob(f".{archive.name}.part-*"):  # of a process that died in here
            remove(stale)
        if is_file(path):
            try:
                path.open("rb").close()
            except OSError:
                raise RequestError(f"{lacking[archive.name]}; mend that, or give another data_dir") from None
            say(f"{lacking[archive.name]}; fetching it again")
        addresses = [f"{mirror.rstrip('/')}/{archive.name}"] if mirror else archive.addresses
        _download(addresses, path, archive.md5, say, stall_s)
        files[archive.name] = path
    return files


def _download(addresses: list[str], path: Path, md5: str, say: Say, stall_s: float) -> None:
    """Try each address, several rounds; the file appears under its name only when its md5 sum is right."""
    part = path.with_name(f".{path.name}.part-{os.getpid()}")
    problem = ""
    part.touch()  # what the disk refuses is no fault of the network
    try:
        for attempt in range(NUM_ROUNDS):
            for address in addresses:
                try:
                    _copy(address, part, path.name, say, stall_s)
                    with part.open("rb") as file:
                        is_right = md5_of(file) == md5
                    if is_right:
                        part.replace(path)
                        return
                    problem = f"{redact_address(address)} gave a file whose md5 sum is not {md5}"
                except (OSError, urllib.error.URLError, http.client.HTTPException, ValueError) as error:
                    if isinstance(error, OSError) and error.errno in _FULL:
                        raise
                    problem = redact_address(f"{address} failed: {_cause(error)}{_proxy(address)}")
                say(problem)
            if attempt + 1 < NUM_ROUNDS:
                time.sleep(0.5 * 2**attempt)
    finally:
        part.unlink(missing_ok=True)
    raise DownloadError(
        f"{path.name} could not be fetched ({problem}); check the network, or give mirror=URL-or-FOLDER, or "
        "dataset=synthetic to train on drawn digits"
    )


def _copy(address: str, target: Path, name: str, say: Say, stall_s: float) -> None:
    """Write what an address gives into a file. Raises OSError, HTTPException, ValueError."""
    if "://" not in address:
        shutil.copyfile(address, target)
        return
    opener = urllib.request.build_opener()
    if address.startswith(("http://", "https://")):
        address, user, password = split_credentials(address)
        if user or password:  # sent at once, and to this server alone, whatever it redirects to
            server = "{0.scheme}://{0.netloc}/".format(urlsplit(address))
            known = urllib.request.HTTPPasswordMgrWithPriorAuth()
            known.add_password(None, server, user, password, is_authenticated=True)
            opener.add_handler(urllib.request.HTTPBasicAuthHandler(known))
    request = urllib.request.Request(address, headers={"User-Agent": "mnist-dist"})
    with opener.open(request, timeout=stall_s) as response, target.open("wb") as file, _bar() as bar:
        size = int(response.headers.get("Content-Length") or 0)
        task = bar.add_task(name, total=size or None)
        say_s = time.monotonic() + SAY_EVERY_S
        while chunk := response.read(_CHUNK_BYTES):
            file.write(chunk)
            bar.advance(task, len(chunk))
            if bar.disable and time.monotonic() >= say_s:
                say_s = time.monotonic() + SAY_EVERY_S
                say(f"fetching {name}: {file.tell():,}{f' of {size:,}' if size else ''} bytes")
        if size and file.tell() != size:
            raise OSError(f"it ended after {file.tell():,} of {size:,} bytes")


def _cause(error: Exception) -> str:
    """Why an address failed, on one line."""
    if isinstance(error, urllib.error.HTTPError):
        return " ".join(f"HTTP status {error.code} {error.reason}".split())
    reason = getattr(error, "reason", None) or error  # what a server said may have line ends
    return " ".join(str(getattr(reason, "strerror", None) or reason).split()) or type(error).__name__


def _proxy(address: str) -> str:
    """Through which proxy an address was asked, in words, or the empty string."""
    try:
        parts = urlsplit(split_credentials(address)[0])
        proxy = urllib.request.getproxies().get(parts.scheme, "")
        if not proxy or urllib.request.proxy_bypass(parts.netloc):
            return ""
    except ValueError:  # it is no address
        return ""
    return f" (through the proxy {proxy if '://' in proxy else f'http://{proxy}'})"


def _bar() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    return Progress(*columns, transient=True, disable=not (sys.stdout and sys.stdout.isatty()))
