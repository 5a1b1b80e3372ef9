"""Seconds of one exchange of a network's gradients between ranks, in each of the ways to add along the fixed tree.

    python -m benchmarks.exchange [--ranks 2 4 8] [--rounds 5] [--json FILE]

Ranks are processes on gloo with one thread each. "all_reduce" is the ordinary exchange, whose order of adding is the
library's; the others give the bits of the tree. Each round measures all ways in turn; the figures are medians.
"""

import argparse
import multiprocessing
import statistics
import time
from collections.abc import Callable
from multiprocessing.queues import SimpleQueue

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.common import write
from mnist_dist.distributed.device import processor_name
from mnist_dist.models import build_model, num_parameters
from mnist_dist.training.exchange import add_along_tree, add_over_ranks

REPEATS = 20


def all_reduce(vector: Tensor, _received: Tensor) -> None:
    """The library's own order."""
    dist.all_reduce(vector)


def all_gather(vector: Tensor, received: Tensor) -> None:
    """Every rank gets all vectors whole, and adds them."""
    all_gather_slices(received.view(-1), vector)
    vector.copy_(add_along_tree(received.view(-1, len(vector))))


def slices(vector: Tensor, received: Tensor) -> None:
    """Every rank gets its slice of all vectors, adds these, and the slices are gathered."""
    mine = received.view(-1)[: len(vector)].view(dist.get_world_size(), -1)
    dist.all_to_all_single(mine.view(-1), vector)
    all_gather_slices(vector, add_along_tree(mine))


def halving(vector: Tensor, received: Tensor) -> None:
    """Recursive halving, neighbours first, then doubling back: what the job does."""
    add_over_ranks(vector, received.view(-1)[: len(vector) // 2])


# torch 2.14 gave it another name.
all_gather_slices = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

WAYS: dict[str, Callable[[Tensor, Tensor], None]] = {f.__name__: f for f in (all_reduce, all_gather, slices, halving)}


def measure(rank: int, ranks: int, port: int, size: int, rounds: int, results: "SimpleQueue[dict[str, float]]") -> None:
    """Be one rank."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=ranks)
    size = -(-size // ranks) * ranks
    torch.manual_seed(rank)
    first, received = torch.randn(size), torch.empty(ranks * size)
    sums = {}
    seconds: dict[str, list[float]] = {name: [] for name in WAYS}
    for _ in range(rounds):
        for name, way in WAYS.items():
            vector = first.clone()
            way(vector, received)
            sums[name] = vector.clone()
            dist.barrier()
            began_s = time.perf_counter()
            for _ in range(REPEATS):
                way(vector, received)
            dist.barrier()
            seconds[name].append((time.perf_counter() - began_s) / REPEATS)
    assert torch.equal(sums["slices"], sums["all_gather"])
    assert torch.equal(sums["slices"], sums["halving"])
    if rank == 0:
        results.put({name: statistics.median(values) for name, values in seconds.items()})
    dist.destroy_process_group()


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", default="", metavar="FILE")
    options = parser.parse_args()
    print(processor_name())
    rows = []
    for model in ("mlp", "cnn"):
        size = 1 + num_parameters(build_model(model, seed=0))
        for number, ranks in enumerate(options.ranks):
            context = multiprocessing.get_context("spawn")
            results = context.SimpleQueue()
            arguments = (ranks, 23450 + number, size, options.rounds, results)
            processes = [context.Process(target=measure, args=(rank, *arguments)) for rank in range(ranks)]
            for process in processes:
                process.start()
            medians = results.get()
            for process in processes:
                process.join()
            shown = "  ".join(f"{name} {1e3 * s:.2f}" for name, s in medians.items())
            print(f"{model}, {ranks} ranks, ms: {shown}", flush=True)
            rows.append({"model": model, "ranks": ranks, "seconds": medians})
    write(options.json, {"rows": rows})


if __name__ == "__main__":
    main()
