"""A dataset as tensors in memory, and as the one file in which `fetch` keeps it."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mnist_dist.data.archives import Part, find_archives, read_archives
from mnist_dist.data.synthetic import draw_dataset
from mnist_dist.errors import RequestError
from mnist_dist.files import find_obstacle, is_file, write_atomically
from mnist_dist.tensors import tensor_bytes


class Split(NamedTuple):
    """Images uint8 [n, 28, 28] and labels int64 [n], in memory, on one device."""

    images: Tensor
    labels: Tensor

    def to(self, device: torch.device) -> "Split":
        """The same on another device."""
        return Split(self.images.to(device), self.labels.to(device))


@dataclass(frozen=True)
class Dataset:
    """What a run trains and is evaluated on."""

    name: str  # as fetched: "synthetic" also where it stands in for another
    fingerprint: str  # sha256 of all of it
    train: Split
    eval_split: Split
    eval_name: str  # "test" or "validation"

    def identity(self) -> dict[str, str]:
        """What tells these images from others, for the checkpoints."""
        return {"name": self.name, "fingerprint": self.fingerprint}


def dataset_file(dataset: str, data_dir: Path) -> Path:
    """Where the dataset lies once it is prepared."""
    return data_dir / f"{dataset}.safetensors"


def is_prepared(dataset: str, data_dir: Path) -> bool:
    """Whether the dataset's one file is there. Raises RequestError where something else is in its place."""
    path = dataset_file(dataset, data_dir)
    if obstacle := find_obstacle(path):
        raise RequestError(f"data_dir={data_dir} cannot be used ({obstacle}); mend that, or give another folder")
    return is_file(path)


def fingerprint(tensors: dict[str, Tensor]) -> str:
    """sha256, in hexadecimal, of the four tensors of a dataset."""
    digest = hashlib.sha256()
    for key in sorted(tensors):
        digest.update(f"{key} {tensors[key].dtype} {tuple(tensors[key].shape)}".encode())
        digest.update(tensor_bytes(tensors[key]))
    return digest.hexdigest()


def write_dataset(path: Path, name: str, train: Part, test: Part) -> None:
    """Write images (uint8 [n, 28, 28]) and labels (int64 [n]) of both parts as one file, atomically.

    The file's metadata hold the dataset's name and a sha256 of what it holds, its fingerprint. Raises OSError.
    """
    from safetensors.torch import save  # not save_file, whose errors are no OSErrors

    tensors = _name_tensors(train, test)
    data = save(tensors, metadata={"name": name, "fingerprint": fingerprint(tensors)})
    write_atomically(path, data)


def load_dataset(name: str, data_dir: Path, validation: int = 0) -> Dataset:
    """Read a dataset, from its one file or else from its archives; the last `validation` training images are held out.

    Nothing is written: without a file, synthetic is drawn anew. Raises RequestError where what lies there is damaged or
    has too few images.
    """
    if is_prepared(name, data_dir):
        tensors, identity = _read_prepared(name, data_dir)
    else:
        tensors = _name_tensors(*(draw_dataset() if name == "synthetic" else _read_raw(name, data_dir)))
        identity = fingerprint(tensors)
    train = Split(tensors["train_images"], tensors["train_labels"])
    eval_split, eval_name = Split(tensors["test_images"], tensors["test_labels"]), "test"
    if validation:
        check_validation(validation, name, len(train.labels))
        eval_split, eval_name = Split(*(t[-validation:] for t in train)), "validation"
        train = Split(*(t[:-validation] for t in train))
    return Dataset(name, identity, train, eval_split, eval_name)


def check_validation(validation: int, name: str, num_images: int) -> None:
    """Raises RequestError where holding `validation` of so many training images out leaves none."""
    if validation >= num_images:
        raise RequestError(
            f"validation={validation} leaves nothing to train on; {name} has {num_images} training images"
        )


def fetch_command(name: str, data_dir: Path) -> str:
    """What to run so that a dataset is there."""
    return f"`mnist-dist fetch dataset={name} data_dir={data_dir}`"


def _read_prepared(name: str, data_dir: Path) -> tuple[dict[str, Tensor], str]:
    """The tensors in a dataset's one file, and their fingerprint. Raises RequestError."""
    path = dataset_file(name, data_dir)
    try:
        path.open("rb").close()  # safetensors would say of any file that cannot be opened that it is not there
    except OSError as error:
        raise RequestError(f"{path} cannot be read ({error.strerror}); mend that, or give another data_dir") from None
    again = f"delete it and run {fetch_command(name, data_dir)}"
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no mapping)
            recorded = (file.metadata() or {}).get("fingerprint", "")
    except (OSError, SafetensorError) as error:
        raise RequestError(f"{path} cannot be read ({error}); {again}") from None
    if fingerprint(tensors) != recorded:
        raise RequestError(f"{path} is damaged (it does not match its fingerprint); {again}")
    return tensors, recorded


def _read_raw(name: str, data_dir: Path) -> tuple[Part, Part]:
    """Both parts of a dataset, from its archives. Raises RequestError."""
    files, lacking = find_archives(name, data_dir)
    if lacking:
        raise RequestError(f"{next(iter(lacking.values()))}; run {fetch_command(name, data_dir)}")
    try:
        return read_archives(name, files)
    except OSError as error:
        raise RequestError(f"{error.filename or data_dir} cannot be read ({error.strerror or error})") from None


def _name_tensors(train: Part, test: Part) -> dict[str, Tensor]:
    """What a dataset's one file holds."""
    return {"train_images": train[0], "train_labels": train[1], "test_images": test[0], "test_labels": test[1]}
