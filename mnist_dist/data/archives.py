"""The files of which a dataset is made: what torchvision knows of them, where they lie, what is in them.

They are taken as people have them: packed or unpacked, under MNIST's own names or Kaggle's, in torchvision's layout or
one level off. What counts is the md5 sum of their content, so that no file is taken for another dataset's of its name.
"""

import gzip
import hashlib
import io
import struct
import zipfile
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mnist_dist.files import find_obstacle, is_file

# The datasets that are made of files which torchvision knows, and its class of each.
CLASSES = {
    "mnist": "MNIST",
    "fashion-mnist": "FashionMNIST",
    "kmnist": "KMNIST",
    "qmnist": "QMNIST",
    "emnist-digits": "EMNIST",
}
# Of the unpacked files, which torchvision has no sums of.
UNPACKED_MD5 = {
    "mnist": {
        "train-images-idx3-ubyte.gz": "6bbc9ace898e44ae57da46a324031adb",
        "train-labels-idx1-ubyte.gz": "a25bea736e30d166cdddb491f175f624",
        "t10k-images-idx3-ubyte.gz": "2646ac647ad5339dbf082846283269ea",
        "t10k-labels-idx1-ubyte.gz": "27ae3e4e09519cfbb04c329615203637",
    }
}
_MAX_UNPACKED_BYTES = 64 << 20  # MNIST's largest file has 47 million
_GZIP = b"\x1f\x8b"  # what a packed file begins with

Part = tuple[Tensor, Tensor]  # images uint8 [n, 28, 28], labels int64 [n]


class Archive(NamedTuple):
    """One of the files of a dataset."""

    name: str
    md5: str
    unpacked_md5: str  # empty where it is not known
    addresses: list[str]  # to try in turn


def torchvision_class(dataset: str) -> Any:
    """The class of torchvision that knows the dataset's files."""
    from torchvision import datasets  # late: it takes a second, and a prepared dataset does without

    return getattr(datasets, CLASSES[dataset])


def list_archives(dataset: str) -> list[Archive]:
    """What torchvision knows of the dataset's files."""
    cls = torchvision_class(dataset)
    if dataset == "emnist-digits":
        return [Archive("gzip.zip", cls.md5, "", [cls.url])]
    if dataset == "qmnist":
        files = cls.resources["train"] + cls.resources["test"]
        return [Archive(url.rsplit("/", 1)[1], md5, "", [url]) for url, md5 in files]
    unpacked = UNPACKED_MD5.get(dataset, {})
    return [
        Archive(name, md5, unpacked.get(name, ""), [base + name for base in cls.mirrors]) for name, md5 in cls.resources
    ]


def raw_folder(dataset: str, data_dir: Path) -> Path:
    """Where torchvision keeps the dataset's files, and `fetch` puts them."""
    return data_dir / str(torchvision_class(dataset).__name__) / "raw"


def find_archives(dataset: str, folder: Path) -> tuple[dict[str, Path], dict[str, str]]:
    """Where each of the dataset's files lies in a folder, and what is wrong with each of the others, in words.

    Both by the archive's name. `folder` may be a data_dir, as well as its MNIST or raw.
    """
    raw = raw_folder(dataset, folder)
    places = (raw, raw.parent, folder / dataset / "raw", folder / dataset, folder / "raw", folder)
    files: dict[str, Path] = {}
    lacking: dict[str, str] = {}
    for archive in list_archives(dataset):
        unpacked = archive.name.removesuffix(".gz")
        names = dict.fromkeys(
            name for packed in (archive.name, unpacked) for name in (packed, packed.replace("-idx", ".idx"))
        )
        problem = ""
        for path in (place / name for place in places for name in names):
            try:
                if not is_file(path):
                    continue
                if _is_archive(path, archive):
                    files[archive.name] = path
                    break
                whose = "is damaged" if path == raw / archive.name else f"is damaged, or not {dataset}'s"
                problem = problem or f"{path} {whose} (its md5 sum is not {archive.md5})"
            except OSError as error:
                problem = problem or find_obstacle(path) or f"{path} cannot be read ({error.strerror or error})"
        else:
            home = raw / archive.name
            lacking[archive.name] = problem or find_obstacle(home) or f"there is no {home}"
    return files, lacking


def read_archives(dataset: str, files: dict[str, Path]) -> tuple[Part, Part]:
    """Both parts, for training and for testing, from verified files. Raises OSError."""
    if dataset == "emnist-digits":
        with zipfile.ZipFile(files["gzip.zip"]) as archive:
            names = [name for name in archive.namelist() if name.startswith("gzip/emnist-digits-")]
            contents = {name: archive.read(name) for name in names}
    else:
        contents = {name: path.read_bytes() for name, path in files.items()}
    tensors = {}
    for name, data in contents.items():
        part, kind = "train" if "train" in name else "test", "images" if "images" in name else "labels"
        tensors[f"{part}_{kind}"] = _parse_idx(gzip.decompress(data) if data.startswith(_GZIP) else data)

    def part_of(name: str) -> Part:
        images, labels = tensors[f"{name}_images"], tensors[f"{name}_labels"]
        if dataset == "qmnist":
            labels = labels[:, 0]  # the digit; the other columns tell who wrote it
        if dataset == "emnist-digits":
            images = images.transpose(1, 2)  # stored on its side, unlike the rest of the family
        return images.contiguous(), labels.long().contiguous()

    return part_of("train"), part_of("test")


def md5_of(file: io.BufferedReader | io.BytesIO) -> str:
    """md5 of the rest of a file, in hexadecimal."""
    return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def _is_archive(path: Path, archive: Archive) -> bool:
    """Whether a file holds what the archive holds: as it is, unpacked, or packed by somebody else. Raises OSError."""
    with path.open("rb") as file:
        if md5_of(file) in (archive.md5, archive.unpacked_md5):
            return True
        file.seek(0)
        if not archive.unpacked_md5 or file.read(2) != _GZIP:
            return False
        file.seek(0)
        try:
            with gzip.GzipFile(fileobj=file) as packed:
                return md5_of(io.BytesIO(packed.read(_MAX_UNPACKED_BYTES))) == archive.unpacked_md5
        except (gzip.BadGzipFile, EOFError, zlib.error):
            return False


def _parse_idx(data: bytes) -> Tensor:
    """The tensor in a file of MNIST's own format: uint8, or big-endian int32."""
    kind, num_dimensions = data[2], data[3]
    head = 4 + 4 * num_dimensions
    values = torch.frombuffer(bytearray(data), dtype=torch.uint8, offset=head)
    if kind == 12:
        values = values.view(-1, 4).flip(1).view(torch.int32)
    return values.view(struct.unpack(f">{num_dimensions}I", data[4:head]))
