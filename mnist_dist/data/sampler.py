"""Who takes which image at which step.

`torch.utils.data.DistributedSampler` interleaves the global order of an epoch over its replicas: shard v of N takes
positions v, v+N, v+2N, ... So a slice of batch_size positions is one global batch, and the shards' parts of it are the
same slice of each shard's list, at any N. Where N does not divide the number of images the sampler repeats the first
ones at the end; those repeats are told by their position and have no weight.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
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
        shards, size = num_shards // world_size, batch_size // num_shards
        self.mine = slice(rank * shards, (rank + 1) * shards)
        self.positions = self.take_shards(torch.arange(batch_size)).to(device)
        # This rank's images of an epoch, a row a step. It keeps its place: a CUDA graph reads it.
        self.epoch_indices = torch.zeros(self.steps_per_epoch, shards, size, dtype=torch.int64, device=device)
        self.filled_epoch = -1
        num_last = self.count(self.steps_per_epoch - 1)
        self.batch_sizes = {batch_size, num_last}
        is_padded = num_last % num_shards > 0  # so that the shards of the last batch are of one size
        self.last_mask = (self.positions < num_last).float() if is_padded else None

    def order(self, epoch: int) -> Tensor:
        """The global order of an epoch, int64 [num_images, and repeats up to a multiple of the shards]."""
        generator = torch.Generator()
        generator.manual_seed(self.seed + epoch)
        order = torch.randperm(self.num_images, generator=generator)
        return order.repeat(-(-self.total_size // self.num_images))[: self.total_size]

    def take_shards(self, order: Tensor) -> Tensor:
        """This rank's shards of a global order [n], which are interleaved in it: [shards of this rank, n / shards]."""
        return order.view(-1, self.num_replicas).T[self.mine].contiguous()

    def fill_epoch(self, epoch: int) -> None:
        """Fill `epoch_indices` with an epoch's images."""
        steps, shards, size = self.epoch_indices.shape
        images = self.take_shards(self.order(epoch))
        images = F.pad(images, (0, steps * size - images.shape[1]))  # behind the short last batch
        self.epoch_indices.copy_(images.view(shards, steps, size).transpose(0, 1))
        self.filled_epoch = epoch

    def batch(self, step: int) -> Batch:
        """This rank's part of one step of the run."""
        epoch, step_in_epoch = divmod(step, self.steps_per_epoch)
        if epoch != self.filled_epoch:
            self.fill_epoch(epoch)
        num_images = self.count(step)
        size = -(-num_images // self.num_replicas)
        indices, positions = self.epoch_indices[step_in_epoch, :, :size], self.positions[:, :size]
        mask = self.last_mask[:, :size] if self.last_mask is not None and num_images < self.batch_size else None
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
