"""A measurement whose figures are made up."""

from types import SimpleNamespace
from typing import Any

import torch

from mnist_dist.config.schema import Config
from mnist_dist.distributed.world import Member, World
from mnist_dist.speed.measure import PARTS, Samples, Series
from mnist_dist.speed.plan import Plan, make_plan
from mnist_dist.speed.summary import summarize


def make_samples(plan: Plan, noise: float = 0.01) -> Samples:
    """A step takes 1 ms and 10 us an image of a rank's share, in bad rounds a little more; its parts a tenth more."""
    factors = [1 + noise * (number % 3) for number in range(plan.num_rounds)]
    samples = Samples()
    for case in plan.cases:
        seconds = [(1e-3 + 1e-5 * case.batch_size / case.ranks) * factor for factor in factors]
        parts = [dict.fromkeys(PARTS, 1.1 * s / len(PARTS)) for s in seconds]
        samples.steps[case] = Series(str(case), case.ranks, None, 1, seconds)
        samples.parts[case] = Series(str(case), case.ranks, None, 1, seconds, parts)
    for ranks in plan.world_sizes[1:]:
        for num_bytes in plan.exchange_bytes:
            seconds = [1e-3 * factor + num_bytes / 1e9 for factor in factors]
            samples.exchanges[ranks, num_bytes] = Series("", ranks, None, 1, seconds)
    return samples


def make_summary(world_size: int = 4, **request: Any) -> dict[str, Any]:
    """What `bench` would write about them."""
    config = Config(**request)
    plan = make_plan(config, world_size, threads=1, all_threads=world_size, on_cpu=True)
    accelerator: Any = SimpleNamespace(process_index=0, device=torch.device("cpu"))
    members = [Member("a", tuple(range(world_size)), False, "cpu", "x")] * world_size
    world = World(accelerator, members, "fp32", [], watchdog=None)
    return summarize(make_samples(plan), plan, config, world, seconds=60.0)
