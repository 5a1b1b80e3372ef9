"""Brings a dataset to this machine, once, whole or not at all.

`fetch` leaves one file, `DATA_DIR/DATASET.safetensors`, which is all that training reads. It is made from the
dataset's own archives, which torchvision names (addresses, md5 sums) and unpacks; the archives stay in torchvision's
layout (`DATA_DIR/MNIST/raw/`), so a folder that torchvision filled serves as it is. Drawn digits are kept in the
same way.

Everything happens under a file lock and ends in an atomic rename: processes that fetch at once do it once, and a
process that dies leaves nothing that a later one would trust.
"""

import errno
import hashlib
import http.client
import os
import shutil
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn
from torch import Tensor

from mnist_dist.data.synthetic import draw_digits
from mnist_dist.errors import DownloadError, RequestError, StorageError
from mnist_dist.files import write_atomically

Say = Callable[[str], None]
Archive = tuple[str, str, list[str]]  # file name, md5, addresses to try in turn

NUM_ROUNDS = 3  # how often every address is tried
STALL_S = 20.0  # seconds without a byte after which an address is given up
_CHUNK_BYTES = 1 << 16
_FULL = (errno.ENOSPC, errno.EDQUOT)


def dataset_file(dataset: str, data_dir: Path) -> Path:
    """Where the dataset lies once it is fetched."""
    return data_dir / f"{dataset}.safetensors"


def fetch(
    dataset: str,
    data_dir: Path,
    *,
    mirror: str = "",
    missing: str = "download",
    say: Say = print,
    stall_s: float = STALL_S,
) -> str:
    """Make sure that the dataset lies in data_dir, and return its name.

    The name is another one ("synthetic") only where `missing` is "synthetic" and the dataset could not be fetched.
    Safe to call from several processes on one file system at once. Raises RequestError, and StorageError where the disk
    is full.
    """
    path = dataset_file(dataset, data_dir)
    try:
        if not path.exists():  # first without the lock, so that a folder one may only read will do
            data_dir.mkdir(parents=True, exist_ok=True)
            with FileLock(data_dir / f".{dataset}.lock"):
                if not path.exists():
                    _bring(dataset, data_dir, mirror, missing, say, stall_s)
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
        raise RequestError(
            f"data_dir={data_dir} cannot be written ({cause}); choose a folder of your own, and "
            f"mirror={data_dir}/MNIST/raw, say, if the dataset's archives lie there"
        ) from None
    say(f"WARNING: no {dataset} here, so this trains on DRAWN DIGITS (dataset=synthetic); its figures are theirs")
    return fetch("synthetic", data_dir, say=say)


def write_dataset(path: Path, name: str, train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor]) -> None:
    """Write images (uint8 [n, 28, 28]) and labels (int64 [n]) of both parts as one file, atomically.

    The file's metadata hold the dataset's name and a sha256 of what it holds, its fingerprint. Raises OSError.
    """
    from safetensors.torch import save  # not save_file, whose errors are no OSErrors

    tensors = dict(zip(("train_images", "train_labels", "test_images", "test_labels"), (*train, *test), strict=True))
    data = save(tensors, metadata={"name": name, "fingerprint": fingerprint(tensors)})
    write_atomically(path, data)


def fingerprint(tensors: dict[str, Tensor]) -> str:
    """sha256, in hexadecimal, of the four tensors of a dataset."""
    digest = hashlib.sha256()
    for key in sorted(tensors):
        digest.update(f"{key} {tensors[key].dtype} {tuple(tensors[key].shape)}".encode())
        digest.update(tensors[key].contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _bring(dataset: str, data_dir: Path, mirror: str, missing: str, say: Say, stall_s: float) -> None:
    """Put the dataset there. The caller holds its lock."""
    for stale in data_dir.glob(f".{dataset}.safetensors.*"):
        stale.unlink()
    for stale in data_dir.glob(f".{dataset}-*"):
        shutil.rmtree(stale, ignore_errors=True)
    if dataset == "synthetic":
        say("drawing 70,000 digits, once")
        (train, test) = draw_digits(60_000, seed=0), draw_digits(10_000, seed=1)
        write_dataset(dataset_file(dataset, data_dir), dataset, train, test)
        return
    _fetch_archives(dataset, data_dir, mirror, missing, say, stall_s)
    _unpack(dataset, data_dir, say)


def _torchvision_class(dataset: str) -> tuple[Any, dict[str, str]]:
    from torchvision import datasets  # late: it takes a second, and only fetching needs it

    classes = {
        "mnist": (datasets.MNIST, {}),
        "fashion-mnist": (datasets.FashionMNIST, {}),
        "kmnist": (datasets.KMNIST, {}),
        "qmnist": (datasets.QMNIST, {}),
        "emnist-digits": (datasets.EMNIST, {"split": "digits"}),
    }
    return classes[dataset]


def _archives(dataset: str) -> list[Archive]:
    """What torchvision knows of the dataset's files."""
    cls, _ = _torchvision_class(dataset)
    if dataset == "emnist-digits":
        return [("gzip.zip", cls.md5, [cls.url])]
    if dataset == "qmnist":
        files = cls.resources["train"] + cls.resources["test"]
        return [(url.rsplit("/", 1)[1], md5, [url]) for url, md5 in files]
    return [(name, md5, [base + name for base in cls.mirrors]) for name, md5 in cls.resources]


def _raw_folder(dataset: str, root: Path) -> Path:
    return root / str(_torchvision_class(dataset)[0].__name__) / "raw"


def _fetch_archives(dataset: str, data_dir: Path, mirror: str, missing: str, say: Say, stall_s: float) -> None:
    raw = _raw_folder(dataset, data_dir)
    raw.mkdir(parents=True, exist_ok=True)
    for stale in raw.glob(".*.part-*"):  # of a process that died in here
        stale.unlink()
    for name, md5, addresses in _archives(dataset):
        path = raw / name
        damaged = path.exists() and _md5(path) != md5
        if path.exists() and not damaged:
            continue
        if missing == "fail":
            problem = f"{path} is damaged (its md5 sum is not {md5})" if damaged else f"there is no {path}"
            raise DownloadError(
                f"{problem}, and missing=fail forbids the network; run "
                f"`mnist-dist fetch dataset={dataset} data_dir={data_dir}` where there is one"
            )
        if damaged:
            say(f"{path} is damaged (its md5 sum is not {md5}); fetching it again")
        if mirror:
            addresses = [f"{mirror.rstrip('/')}/{name}"]
        _download(addresses, path, md5, say, stall_s)


def _download(addresses: list[str], path: Path, md5: str, say: Say, stall_s: float) -> None:
    """Try each address, several rounds; the file appears under its name only when its md5 sum is right."""
    part = path.with_name(f".{path.name}.part-{os.getpid()}")
    problem = ""
    try:
        for attempt in range(NUM_ROUNDS):
            for address in addresses:
                try:
                    _copy(address, part, stall_s)
                    if _md5(part) == md5:
                        part.replace(path)
                        return
                    problem = f"{address} gave a file whose md5 sum is not {md5}"
                except (OSError, urllib.error.URLError, http.client.HTTPException, ValueError) as error:
                    if isinstance(error, OSError) and error.errno in _FULL:
                        raise
                    cause = str(getattr(error, "reason", None) or error) or type(error).__name__
                    problem = f"{address} failed: {' '.join(cause.split())}"  # what a server said may have line ends
                say(problem)
            if attempt + 1 < NUM_ROUNDS:
                time.sleep(0.5 * 2**attempt)
    finally:
        part.unlink(missing_ok=True)
    raise DownloadError(
        f"{path.name} could not be fetched ({problem}); check the network, or give mirror=URL-or-FOLDER, or "
        "dataset=synthetic to train on drawn digits"
    )


def _copy(address: str, target: Path, stall_s: float) -> None:
    if "://" not in address:
        shutil.copyfile(address, target)
        return
    request = urllib.request.Request(address, headers={"User-Agent": "mnist-dist"})
    with (
        urllib.request.urlopen(request, timeout=stall_s) as response,
        target.open("wb") as file,
        _bar() as bar,
    ):
        size = int(response.headers.get("Content-Length") or 0)
        task = bar.add_task(target.name.strip(".").rsplit(".part-", 1)[0], total=size or None)
        while chunk := response.read(_CHUNK_BYTES):
            file.write(chunk)
            bar.advance(task, len(chunk))
        if size and file.tell() != size:
            raise OSError(f"it ended after {file.tell():,} of {size:,} bytes")


def _bar() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    return Progress(*columns, transient=True, disable=not (sys.stdout and sys.stdout.isatty()))


def _md5(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "md5").hexdigest()


def _unpack(dataset: str, data_dir: Path, say: Say) -> None:
    """Have torchvision unpack and parse the verified archives in a temporary folder; keep the result as one file."""
    cls, options = _torchvision_class(dataset)
    say(f"unpacking {dataset}, once")
    with tempfile.TemporaryDirectory(prefix=f".{dataset}-", dir=data_dir) as temporary:
        raw = _raw_folder(dataset, Path(temporary))
        raw.mkdir(parents=True)
        for name, _, _ in _archives(dataset):
            (raw / name).symlink_to((_raw_folder(dataset, data_dir) / name).resolve())
        # download=True only unpacks here: torchvision finds the archives, their md5 sums are right.
        parts = [_tensors(dataset, cls(temporary, train=train, download=True, **options)) for train in (True, False)]
    write_dataset(dataset_file(dataset, data_dir), dataset, parts[0], parts[1])


def _tensors(dataset: str, part: Any) -> tuple[Tensor, Tensor]:
    images, labels = part.data, part.targets
    if dataset == "qmnist":
        labels = labels[:, 0]  # the digit; the other columns tell who wrote it
    if dataset == "emnist-digits":
        images = images.transpose(1, 2)  # stored on its side, unlike the rest of the family
    return images.contiguous(), labels.to(torch.int64).contiguous()
