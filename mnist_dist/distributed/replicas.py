"""Whether all ranks hold the same weights, which nothing corrects once they do not."""

import hashlib

from torch import Tensor, nn
from torch.optim import Optimizer

from mnist_dist.distributed.world import World
from mnist_dist.errors import ReplicaError
from mnist_dist.tensors import tensor_bytes, to_cpu


def check_replicas(world: World, network: nn.Module, optimizer: Optimizer, when: str) -> None:
    """Name a rank that holds other weights or moments than most ranks do; `when` ends the sentence.

    Collective. Raises ReplicaError, on every rank.
    """
    if world.size == 1:
        return
    hashes = world.gather(hash_parameters(network, optimizer))  # collective
    most = max(hashes, key=hashes.count)
    for rank, other in enumerate(hashes):
        if other != most:
            first = next(name for name in most if other[name] != most[name])
            raise ReplicaError(
                f"{world.name(rank)} holds other weights than {world.name(hashes.index(most))}, first in {first}, "
                f"{when}; look at the memory, device and software of that host",
                on_every_rank=True,
            )


def hash_parameters(network: nn.Module, optimizer: Optimizer) -> dict[str, str]:
    """A hash of the bits of each parameter, and of what the optimizer keeps of it."""
    state = to_cpu({name: [p, *optimizer.state[p].values()] for name, p in network.named_parameters()})
    hashes = {}
    for name, values in state.items():
        digest = hashlib.blake2b(digest_size=8)
        for tensor in values:
            if isinstance(tensor, Tensor):
                digest.update(tensor_bytes(tensor))
        hashes[name] = digest.hexdigest()
    return hashes
