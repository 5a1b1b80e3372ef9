"""A dataset as tensors in memory, and which images a rank takes at which step.

`torch.utils.data.DistributedSampler` decides who takes which images. It deals a shuffled list out card by card:
rank r of W takes positions r, r+W, r+2W, ... So rank r's k-th slice of batch_size/W indices and those of the other
ranks together are exactly positions k*batch_size to (k+1)*batch_size of one global order, at any W. Where W does not
divide the number of images the sampler repeats the first ones; those repeats are told apart here by their position
and carry no weight.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.utils.data import DistributedSampler

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
    held_out: Split
    held_out_name: str  # "test" or "validation"


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
    held_out, held_out_name = Split(tensors["test_images"], tensors["test_labels"]), "test"
    if validation:
        check_validation(validation, name, len(train.labels))
        held_out, held_out_name = Split(*(t[-validation:] for t in train)), "validation"
        train = Split(*(t[:-validation] for t in train))
    return Dataset(name, recorded, train, held_out, held_out_name)


def check_validation(validation: int, name: str, num_images: int) -> None:
    """Raises RequestError where holding `validation` of so many training images out leaves none."""
    if validation >= num_images:
        raise RequestError(
            f"validation={validation} leaves nothing to train on; {name} has {num_images} training images"
        )


class Share(NamedTuple):
    """What one rank does in one step."""

    rows: Tensor  # int64 [n]: indices of its images
    weights: Tensor | None  # float32 [n], 0 for what the sampler repeated; None where all count
    positions: Tensor  # int64 [n]: where its images stand in the global batch
    num_images: int  # of the global batch, over all ranks


class Shares:
    """Cuts each epoch into global batches, and each global batch into one share a rank."""

    def __init__(
        self, num_images: int, batch_size: int, seed: int, rank: int, world_size: int, device: torch.device
    ) -> None:
        self.num_images, self.batch_size = num_images, batch_size
        self.steps_per_epoch = -(-num_images // batch_size)
        self.share_size = batch_size // world_size
        self.device = device
        self.sampler: DistributedSampler[int] = DistributedSampler(
            range(num_images),  # type: ignore[arg-type]  # only its length is asked for
            num_replicas=world_size,
            rank=rank,
            seed=seed,
        )
        self.positions = torch.arange(self.share_size, device=device) * world_size + rank

    def order(self, epoch: int) -> Tensor:
        """This rank's indices for a whole epoch, int64 [ceil(num_images / world_size)]."""
        self.sampler.set_epoch(epoch)
        return torch.tensor(list(self.sampler), device=self.device)

    def cut(self, order: Tensor, step_in_epoch: int) -> Share:
        """This rank's share of one step of the epoch that `order` belongs to."""
        start = step_in_epoch * self.share_size
        rows = order[start : start + self.share_size]
        count = self.count(step_in_epoch)
        positions = self.positions[: len(rows)]
        padded = step_in_epoch == self.steps_per_epoch - 1 and self.num_images % self.sampler.num_replicas
        return Share(rows, (positions < count).float() if padded else None, positions, count)

    def count(self, step: int) -> int:
        """Images in the global batch of a step, counted from 0 over the whole run or over one epoch."""
        return min(self.batch_size, self.num_images - step % self.steps_per_epoch * self.batch_size)
