"""What is measured: networks, batch sizes, numbers of ranks. Rank 0 decides it, for all ranks."""

from dataclasses import dataclass, field
from typing import NamedTuple

from mnist_dist.config.schema import Config
from mnist_dist.models import MODELS

# Global batches, where the request names none. An image of the CNN costs a CPU 0.2 ms and more.
BATCH_SIZES = {"mlp": (64, 512, 4096), "cnn": (64, 512, 4096)}
BATCH_SIZES_CPU = {"mlp": (64, 512, 4096), "cnn": (64, 256, 1024)}
NUM_ROUNDS = 9  # repetitions of each measurement, in turn with all others
REPETITION_S = 0.1  # a repetition is as many steps as fit into this, at least one
NUM_IMAGES = 60_000  # as many as MNIST has; no global batch is larger
EXCHANGE_BYTES = (4 << 20, 16 << 20, 64 << 20)  # vectors that are exchanged beside the networks'


class Case(NamedTuple):
    """One set-up in which steps are timed."""

    model: str
    batch_size: int  # global
    ranks: int
    threads: int  # of a rank, on the CPU

    def __str__(self) -> str:
        """In words, as progress and comparisons name it."""
        return f"{self.model}, batch {self.batch_size}, {describe_ranks(self.ranks, self.threads)}"


@dataclass(frozen=True)
class Plan:
    """All that is measured."""

    world_sizes: list[int]
    threads: int  # of a rank where scaling is measured: one rank has no more of them than each of several
    batch_sizes: dict[str, list[int]]  # of each network: global for strong scaling, a rank's for weak scaling
    cases: list[Case]
    exchange_bytes: list[int]
    left_out: list[str] = field(default_factory=list)  # in words, with the reason
    num_rounds: int = NUM_ROUNDS
    repetition_s: float = REPETITION_S


def describe_ranks(ranks: int, threads: int) -> str:
    """So many ranks in words, with the threads of each."""
    return f"{ranks} rank{'s' * (ranks > 1)} x {threads} thread{'s' * (threads > 1)}"


def list_world_sizes(config: Config, most: int) -> list[int]:
    """1, 2, 4 ... and `most` ranks: those that can share this request's global batch."""
    sizes = [2**k for k in range(most.bit_length()) if 2**k < most]
    return [size for size in sizes if not config.world_size_problem(size)] + [most]


def largest_world_size(config: Config, num_devices: int) -> int:
    """The largest power of two that is no more than the devices, and can share this request's global batch."""
    sizes: list[int] = [2**k for k in range(num_devices.bit_length()) if not config.world_size_problem(2**k)]
    return max(sizes)


def choose_batch_sizes(config: Config, *, on_cpu: bool) -> dict[str, list[int]]:
    """Networks and their batch sizes: those that the request names, or else all of ours."""
    models = [config.model] if "model" in config.model_fields_set else list(MODELS)
    if "batch_size" in config.model_fields_set:
        return {model: [config.batch_size] for model in models}
    sizes = BATCH_SIZES_CPU if on_cpu else BATCH_SIZES
    return {model: list(sizes[model]) for model in models}


def make_plan(config: Config, world_size: int, threads: int, all_threads: int, *, on_cpu: bool) -> Plan:
    """What to measure on up to `world_size` ranks.

    `threads` are a rank's where all ranks share the cores, `all_threads` those of a rank that has them all, as `train`
    starts without a launcher.
    """
    world_sizes, batch_sizes = list_world_sizes(config, world_size), choose_batch_sizes(config, on_cpu=on_cpu)
    cases: dict[Case, None] = {}  # as an ordered set
    left_out = []
    for model, sizes in batch_sizes.items():
        for size in sizes:
            if all_threads != threads:
                cases[Case(model, size, 1, all_threads)] = None
            for ranks in world_sizes:
                cases |= dict.fromkeys(Case(model, batch, ranks, threads) for batch in (size, size * ranks))
    for case in list(cases):
        shared = config.model_copy(update={"batch_size": case.batch_size})
        if case.batch_size > NUM_IMAGES:
            left_out.append(f"{case}: more than the {NUM_IMAGES:,} images of MNIST")
            del cases[case]
        elif shared.world_size_problem(case.ranks):
            left_out.append(f"{case}: the batch cannot be shared equally")
            del cases[case]
    models = list(batch_sizes)
    ordered = sorted(cases, key=lambda case: (models.index(case.model), case.batch_size, case.ranks, -case.threads))
    return Plan(world_sizes, threads, batch_sizes, ordered, list(EXCHANGE_BYTES), left_out)
