"""A dataset as tensors in memory."""

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mnist_dist.data.download import dataset_file, fingerprint
from mnist_dist.errors import RequestError


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


def load_dataset(name: str, data_dir: Path, validation: int = 0) -> Dataset:
    """Read a fetched dataset and check it against its fingerprint; the last `validation` training images are held out.

    Raises RequestError where the file is damaged or has too few images.
    """
    path = dataset_file(name, data_dir)
    again = f"`mnist-dist fetch dataset={name} data_dir={data_dir}`"
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no mapping)
            recorded = (file.metadata() or {}).get("fingerprint", "")
    except (OSError, SafetensorError) as error:
        raise RequestError(f"{path} cannot be read ({error}); delete it and run {again}") from None
    if fingerprint(tensors) != recorded:
        raise RequestError(f"{path} is damaged (it does not match its fingerprint); delete it and run {again}")
    train = Split(tensors["train_images"], tensors["train_labels"])
    eval_split, eval_name = Split(tensors["test_images"], tensors["test_labels"]), "test"
    if validation:
        check_validation(validation, name, len(train.labels))
        eval_split, eval_name = Split(*(t[-validation:] for t in train)), "validation"
        train = Split(*(t[:-validation] for t in train))
    return Dataset(name, recorded, train, eval_split, eval_name)


def check_validation(validation: int, name: str, num_images: int) -> None:
    """Raises RequestError where holding `validation` of so many training images out leaves none."""
    if validation >= num_images:
        raise RequestError(
            f"validation={validation} leaves nothing to train on; {name} has {num_images} training images"
        )
