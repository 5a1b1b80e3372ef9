"""Who takes which image at which step.

The global order of an epoch is what `torch.utils.data.DistributedSampler` deals out card by card: shard v of N takes
positions v, v+N, v+2N, ... So a slice of batch_size positions is one global batch, and the shards' parts of it are the
same slice of each shard's list, at any N. Where N does not divide the number of images the sampler repeats the first
ones at the end; those repeats are told by their position and have no weight.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DistributedSampler


class Batch(NamedTuple):
    """One rank's part of a global batch, a row a shard."""

    step: int  # over the whole run
    epoch: int
    step_in_epoch: int
    epoch_ends: bool  # after this step, or the run does
    num_images: int  # of the global batch, over all ranks
    indices: Tensor  # int64 [shards of this rank, images of a shard]
    positions: Tensor  # int64, the same shape: where the images stand in the global batch
    mask: Tensor | None  # float32, the same shape: 0 for what the sampler repeated; None where all count


class GlobalBatchSampler(DistributedSampler[int]):
    """Cuts each epoch into global batches, and each global batch into shards, of which a rank takes some."""

    def __init__(
        self,
        num_images: int,
        batch_size: int,
        total_steps: int,
        seed: int,
        *,
        num_shards: int,
        rank: int,
        world_size: int,
        device: torch.device,
    ) -> None:
        """`total_steps` is where the run ends, in mid-epoch perhaps."""
        super().__init__(range(num_images), num_shards, rank=0, seed=seed)  # type: ignore[arg-type]  # only its length
        self.num_images, self.batch_size, self.total_steps = num_images, batch_size, total_steps
        self.steps_per_epoch = steps_per_epoch(num_images, batch_size)
        self.device = device
        shards = num_shards // world_size
        self.mine = slice(rank * shards, (rank + 1) * shards)
        self.dealt_epoch = -1
        self.dealt = torch.empty(0)
        self.positions = self.deal(torch.arange(batch_size)).to(device)

    def order(self, epoch: int) -> Tensor:
        """The global order of an epoch, int64 [num_images, and repeats up to a multiple of the shards]."""
        generator = torch.Generator()
        generator.manual_seed(self.seed + epoch)
        order = torch.randperm(self.num_images, generator=generator)
        return order.repeat(-(-self.total_size // self.num_images))[: self.total_size]

    def deal(self, order: Tensor) -> Tensor:
        """This rank's shards of a global order [n], dealt card by card: [shards of this rank, n / shards]."""
        return order.view(-1, self.num_replicas).T[self.mine].contiguous()

    def batch(self, step: int) -> Batch:
        """This rank's part of one step of the run."""
        epoch, step_in_epoch = divmod(step, self.steps_per_epoch)
        if epoch != self.dealt_epoch:
            self.dealt, self.dealt_epoch = self.deal(self.order(epoch)).to(self.device), epoch
        size = self.batch_size // self.num_replicas
        indices = self.dealt[:, step_in_epoch * size : (step_in_epoch + 1) * size]
        num_images = self.count(step)
        positions = self.positions[:, : indices.shape[1]]
        is_padded = indices.shape[1] * self.num_replicas > num_images
        mask = (positions < num_images).float() if is_padded else None
        epoch_ends = step_in_epoch == self.steps_per_epoch - 1 or step == self.total_steps - 1
        return Batch(step, epoch, step_in_epoch, epoch_ends, num_images, indices, positions, mask)

    def count(self, step: int) -> int:
        """Images in the global batch of a step, counted from 0 over the whole run."""
        return min(self.batch_size, self.num_images - step % self.steps_per_epoch * self.batch_size)


def steps_per_epoch(num_images: int, batch_size: int) -> int:
    """Global batches of an epoch, the short last one included."""
    return -(-num_images // batch_size)


def count_steps(num_images: int, batch_size: int, epochs: int, max_steps: int) -> int:
    """Steps of a whole run; `max_steps` is 0 for no limit."""
    total = epochs * steps_per_epoch(num_images, batch_size)
    return min(total, max_steps or total)
