"""The ranks of a job, joined: what they are, and how they tell each other something."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, Self

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from mnist_dist.distributed.watchdog import Phase, Watchdog
from mnist_dist.errors import JobError, StorageError


@dataclass(frozen=True)
class Member:
    """One rank as the others see it."""

    host: str
    cores: tuple[int, ...]  # the CPU cores that it may use
    has_fast_bf16: bool  # trains faster in bf16 than in fp32
    device: str
    processor: str
    driver: str = ""  # of its GPU


@dataclass(frozen=True)
class World:
    """The ranks of this job, joined. As a context manager it leaves in order, or names what went wrong."""

    accelerator: Accelerator
    members: list[Member]
    precision: str  # resolved: fp32, tf32, bf16 or fp16
    notes: list[str]  # what differs from what was asked for, to be said on the console
    watchdog: Watchdog | None  # over the other ranks, if there are any
    group: dist.ProcessGroup | None = None  # of their collectives; None: all ranks of the job

    @property
    def rank(self) -> int:
        """This process's place among all of them."""
        return self.accelerator.process_index  # type: ignore[no-any-return]

    @property
    def size(self) -> int:
        """How many ranks there are."""
        return len(self.members)

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, the one that writes and speaks."""
        return self.rank == 0

    @property
    def device(self) -> torch.device:
        """Where this rank computes."""
        return self.accelerator.device  # type: ignore[no-any-return]

    def name(self, rank: int) -> str:
        """A rank in words, with its host."""
        return f"rank {rank} on {self.members[rank].host}"

    def at(self, phase: Phase, step: int | None = None) -> None:
        """Note what this rank does now, so that it can be said where it hangs."""
        if self.watchdog:
            self.watchdog.at(phase, step)

    def broadcast(self, value: Any) -> Any:
        """Rank 0's value, on every rank. Collective."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, device=torch.device("cpu"), group=self.group)
        return box[0]

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, on every rank, in the order of ranks. Collective."""
        return gather(value, self.size, self.group)

    def first(self, size: int, group: dist.ProcessGroup | None) -> "World":
        """The world of the first `size` ranks, whose collectives `group` carries; for these ranks alone."""
        return replace(self, members=self.members[:size], group=group)

    @contextmanager
    def shared_errors(self) -> Iterator[None]:
        """Around work that may fail on some ranks: where it does, all ranks leave, and rank 0 says which and why.

        Collective, at the end. Raises the first rank's JobError on every rank; an OSError counts as StorageError.
        """
        mine: JobError | None = None
        try:
            yield
        except JobError as error:
            mine = error
        except OSError as error:
            mine = StorageError(f"{error.filename or 'the run directory'}: {error.strerror or error}")
        for rank, theirs in enumerate(self.gather(mine)):  # collective
            if theirs is not None:
                where = f"{self.name(rank)}: " if rank and not theirs.on_every_rank else ""
                raise type(theirs)(f"{where}{theirs}", on_every_rank=True) from None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leave the group: in order where all ranks leave together, else with the watchdog's word on who failed."""
        # Accelerate's state belongs to the process: the next run in it, as in a notebook, may ask for another.
        AcceleratorState._reset_state(reset_partial_state=True)
        if not self.watchdog:
            return
        if isinstance(error, Exception) and not isinstance(error, JobError):
            self.watchdog.fail(error)  # a bug, or a collective that broke because another rank is gone
        self.watchdog.leave()
        dist.destroy_process_group()


def gather(value: Any, world_size: int, group: dist.ProcessGroup | None = None) -> list[Any]:
    """Every rank's value, on every rank, in the order of ranks. Collective."""
    if world_size == 1:
        return [value]
    values: list[Any] = [None] * world_size
    dist.all_gather_object(values, value, group=group)
    return values
