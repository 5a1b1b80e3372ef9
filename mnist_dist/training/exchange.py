"""The sum over the ranks: of one flat vector that holds a step's loss and all its gradients.

Two ways to sum, of the same form on gloo and NCCL. The ordinary one is an all-reduce, whose order of adding is the
library's. The other adds along one fixed binary tree over the shards, neighbours first, so that the result has the same
bits at any number of ranks: floating-point addition depends on how the terms are grouped, but not on their order in a
pair. A rank's own shards are a whole subtree. Above that the ranks halve the vector between neighbours, then between
pairs of them, and so on, each adding the half that it keeps; then they double it back. The traffic is that of a ring,
twice a vector, in 2 log2(ranks) messages; docs/LOG.md has the other ways that were measured.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor


class Exchange:
    """The flat vectors of this rank's shards, and their sum over all ranks."""

    def __init__(
        self,
        parameters: Sequence[Tensor],
        *,
        num_shards: int,
        world_size: int,
        fixed_tree: bool,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        """`num_shards` are this rank's. A lone shard of a lone rank has nothing to be summed with, and no vector.

        `group` is that of the first `world_size` ranks of the job, or None where they are all.
        """
        self.parameters, self.world_size, self.fixed_tree = list(parameters), world_size, fixed_tree
        self.group = group
        self.is_needed = num_shards * world_size > 1
        if not self.is_needed:
            return
        device = self.parameters[0].device
        used = 1 + sum(p.numel() for p in self.parameters)
        size = -(-used // world_size) * world_size  # can be halved between them
        self.vectors = torch.zeros(num_shards, size, device=device)
        self.received = torch.zeros(size // 2, device=device)
        self.losses: list[Tensor] = [vector[0] for vector in self.vectors]
        self.gradients = [self._views(vector) for vector in self.vectors]

    def put(self, shard: int, loss: Tensor) -> Tensor:
        """Take a shard's loss [] and the parameters' gradients; these are free for the next shard then.

        Returns where the loss is.
        """
        if not self.is_needed:
            return loss
        gradients: list[Tensor] = [p.grad for p in self.parameters]  # type: ignore[misc]
        torch._foreach_copy_([self.losses[shard], *self.gradients[shard]], [loss, *gradients])
        return self.losses[0]

    def sum(self) -> None:
        """Sum the vectors over all shards; the parameters' gradients are views into the sum then. Collective."""
        if not self.is_needed:
            return
        total = add_along_tree(self.vectors)
        if self.world_size > 1 and self.fixed_tree:
            add_over_ranks(total, self.received, self.group)  # collective
        elif self.world_size > 1:
            dist.all_reduce(total, group=self.group)  # collective
        for parameter, gradient in zip(self.parameters, self.gradients[0], strict=True):
            parameter.grad = gradient

    def _views(self, vector: Tensor) -> list[Tensor]:
        """The parts of a vector behind its loss, each in the shape and strides of its parameter."""
        views, start = [], 1
        for parameter in self.parameters:
            views.append(vector[start : start + parameter.numel()].as_strided(parameter.shape, parameter.stride()))
            start += parameter.numel()
        return views


def add_over_ranks(vector: Tensor, received: Tensor, group: dist.ProcessGroup | None = None) -> None:
    """Add the ranks' vectors [size] in place, along the tree: recursive halving, then doubling. Collective.

    The number of ranks is a power of two that divides size; `received` [size / 2] is overwritten. `group` is that of
    the first ranks of the job, or None for all of them.
    """
    rank, distance, part = dist.get_rank(), 1, vector
    halves = []
    while distance < dist.get_world_size(group):
        low, high = part.chunk(2)
        kept, given = (high, low) if rank & distance else (low, high)
        swap(given, received[: len(kept)], rank ^ distance, group)
        kept += received[: len(kept)]
        halves.append((kept, given, rank ^ distance))
        part, distance = kept, 2 * distance
    for kept, given, partner in reversed(halves):
        swap(kept, given, partner, group)


def swap(given: Tensor, received: Tensor, partner: int, group: dist.ProcessGroup | None) -> None:
    """Send a tensor to a rank, and receive one of the same size from it."""
    messages = [dist.P2POp(dist.isend, given, partner, group), dist.P2POp(dist.irecv, received, partner, group)]
    for work in dist.batch_isend_irecv(messages):
        work.wait()


def add_along_tree(vectors: Tensor) -> Tensor:
    """Add vectors [n, size], n a power of two, into the first and return it: neighbours first, then pairs of them."""
    distance = 1
    while distance < len(vectors):
        vectors[:: 2 * distance] += vectors[distance :: 2 * distance]
        distance *= 2
    return vectors[0]
