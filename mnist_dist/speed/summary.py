"""What was measured as one JSON object: each figure with its median, quartiles and values."""

import time
from typing import Any

import torch

from mnist_dist.config.schema import Config
from mnist_dist.distributed.device import nccl_version, processor_name
from mnist_dist.distributed.world import World
from mnist_dist.speed.figures import bus_bandwidth, karp_flatt, spread, strong_efficiency, weak_efficiency
from mnist_dist.speed.measure import PARTS, Samples, StepTask
from mnist_dist.speed.plan import Case, Plan
from mnist_dist.versions import commit, library_versions

FORMAT = 1
# The keys of a request that change what a step does, beside the network, the batch and the threads of each case.
KEYS = [
    "micro_batch",
    "optimizer",
    "momentum",
    "weight_decay",
    "label_smoothing",
    "clip_grad_norm",
    "ema",
    "shift",
    "rotate",
    "scale",
    "elastic",
    "bit_exact",
    "graph",
]


def summarize(samples: Samples, plan: Plan, config: Config, world: World, seconds: float) -> dict[str, Any]:
    """Everything, on rank 0."""
    request = config.model_dump(mode="json")
    return {
        "format": FORMAT,
        "date": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "seconds": seconds,
        "hardware": describe_hardware(world),
        "versions": describe_versions(world),
        "request": {key: request[key] for key in KEYS} | {"precision": world.precision},
        "plan": {
            "world_sizes": plan.world_sizes,
            "threads": plan.threads,
            "batch_sizes": plan.batch_sizes,
            "rounds": plan.num_rounds,
            "repetition_s": plan.repetition_s,
            "left_out": plan.left_out,
        },
        "steps": [summarize_step(case, samples) for case in samples.steps],
        "strong": list_strong(samples, plan),
        "weak": list_weak(samples, plan),
        "exchanges": list_exchanges(samples),
        "notes": list(dict.fromkeys(samples.notes)),
    }


def describe_hardware(world: World) -> dict[str, Any]:
    """What figures of speed depend on; no names of hosts."""
    return {
        "processors": sorted({member.processor for member in world.members}),
        "processor_names": [processor_name()],  # of rank 0's host
        "cores": sorted({len(member.cores) for member in world.members}),  # that a rank may use
        "devices": sorted({member.device for member in world.members}),
        "hosts": len({member.host for member in world.members}),
    }


def describe_versions(world: World) -> dict[str, Any]:
    """What runs; on GPUs their drivers, CUDA's and NCCL's versions as well."""
    versions: dict[str, Any] = {**library_versions(), "commit": commit()}
    if world.device.type == "cuda":
        drivers = sorted({member.driver for member in world.members})
        versions |= {"drivers": drivers, "cuda": torch.version.cuda, "nccl": nccl_version()}
    return versions


def summarize_step(case: Case, samples: Samples) -> dict[str, Any]:
    """One case: seconds of a step, images a second, and the parts of a step."""
    whole, timed = samples.steps[case], samples.parts[case]
    sums = [sum(parts.values()) for parts in timed.parts]
    return {
        **case._asdict(),
        "steps_a_repetition": whole.num_repeats,
        "step_s": spread(whole.seconds)._asdict(),
        "images_per_s": spread([case.batch_size / s for s in whole.seconds])._asdict(),
        "is_cuda_graph": isinstance(whole.task, StepTask) and whole.task.is_replayed,
        "parts_s": {part: spread([parts[part] for parts in timed.parts])._asdict() for part in PARTS},
        "parts_sum_s": spread(sums)._asdict(),
        "parts_by_step": spread([s / w for s, w in zip(sums, whole.seconds, strict=True)])._asdict(),
    }


def list_strong(samples: Samples, plan: Plan) -> list[dict[str, Any]]:
    """Several ranks against one, with the same global batch, compared round by round."""
    rows = []
    for model, size, ranks in list_scaled(plan):
        pairs = pair_rounds(samples, Case(model, size, 1, plan.threads), Case(model, size, ranks, plan.threads))
        if not pairs:
            continue
        row = {
            "speed_up": [a / b for a, b in pairs],
            "efficiency": [strong_efficiency(a, b, ranks) for a, b in pairs],
            "serial_fraction": [karp_flatt(a / b, ranks) for a, b in pairs],
        }
        place = {"model": model, "batch_size": size, "ranks": ranks, "threads": plan.threads}
        rows.append(place | {name: spread(values)._asdict() for name, values in row.items()})
    return rows


def list_weak(samples: Samples, plan: Plan) -> list[dict[str, Any]]:
    """Several ranks against one, with the same batch a rank."""
    rows = []
    for model, size, ranks in list_scaled(plan):
        pairs = pair_rounds(samples, Case(model, size, 1, plan.threads), Case(model, size * ranks, ranks, plan.threads))
        if not pairs:
            continue
        values = [weak_efficiency(a, b) for a, b in pairs]
        place = {"model": model, "batch_size_a_rank": size, "ranks": ranks, "threads": plan.threads}
        rows.append(place | {"efficiency": spread(values)._asdict()})
    return rows


def list_scaled(plan: Plan) -> list[tuple[str, int, int]]:
    """Network, batch size and number of ranks of each comparison with one rank."""
    cases = [(model, size) for model, sizes in plan.batch_sizes.items() for size in sizes]
    return [(model, size, ranks) for model, size in cases for ranks in plan.world_sizes[1:]]


def pair_rounds(samples: Samples, one: Case, many: Case) -> list[tuple[float, float]]:
    """Seconds of a step of two cases, round by round; none where one of them was left out."""
    series = [samples.steps.get(case) for case in (one, many)]
    return list(zip(*(found.seconds for found in series if found), strict=True)) if all(series) else []


def list_exchanges(samples: Samples) -> list[dict[str, Any]]:
    """Each exchange by itself."""
    rows = []
    for (ranks, num_bytes), series in samples.exchanges.items():
        rates = [bus_bandwidth(num_bytes, s, ranks) for s in series.seconds]
        row = {"exchange_s": spread(series.seconds)._asdict(), "bus_bytes_per_s": spread(rates)._asdict()}
        rows.append({"ranks": ranks, "bytes": num_bytes, **row})
    return rows
