"""What the ranks agree on, about twice a second: whether to stop, whether to save, and when to meet again.

One small all-reduce. Where training's device is a GPU this is the one point that waits for it.
"""

import time
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from mnist_dist.data.sampler import Batch
from mnist_dist.distributed.watchdog import Phase
from mnist_dist.distributed.world import World
from mnist_dist.run import stop

SYNC_S = 0.5  # seconds between two syncs, about: a stop is heard within it, and it costs well under 1 %
MAX_STEPS = 2000  # between two syncs


class Window(NamedTuple):
    """The steps between two syncs."""

    first_step: int
    losses: list[float]  # of each step, the mean over the global batch, nats
    loss_sum: float  # over all images, nats
    num_images: int
    seconds: float
    stop: bool
    save: bool


class Sync:
    """Collects the losses of the steps, and lets the ranks agree."""

    def __init__(self, world: World, loss_sums: Tensor, stop_file: Path, checkpoint_every_s: float) -> None:
        """`loss_sums` [steps of an epoch] is where each step leaves its sum of losses, nats. `stop_file` is looked for
        by rank 0. `checkpoint_every_s` is 0 for no checkpoint inside an epoch."""
        self.world, self.loss_sums = world, loss_sums
        self.stop_file, self.checkpoint_every_s = stop_file, checkpoint_every_s
        self.stop_reason = ""  # why this very rank wants to stop
        self.counts: list[int] = []  # images of each step since the last sync, which are all of one epoch
        self.last_row = 0  # the last step's place in its epoch
        self.steps_to_next = 1
        self.began_s = self.saved_s = time.monotonic()

    def begin_window(self) -> None:
        """Measure from now on: what was done since the last sync was not training."""
        self.began_s = time.monotonic()

    def add(self, batch: Batch) -> None:
        """Note that a batch was trained on."""
        self.counts.append(batch.num_images)
        self.last_row = batch.step_in_epoch

    def is_due(self) -> bool:
        """Whether the ranks meet after this step."""
        return len(self.counts) >= self.steps_to_next

    def run(self, next_step: int, failure: str) -> Window:
        """Meet the other ranks after the step before `next_step`; `failure` is why this one can't go on. Collective."""
        self.world.at(Phase.MEETING)
        num_steps = len(self.counts)
        rows = slice(self.last_row + 1 - num_steps, self.last_row + 1)
        sums = self.loss_sums[rows].tolist()  # on a GPU: waits for it
        now = time.monotonic()
        seconds = now - self.began_s
        is_main = self.world.is_main
        self.stop_reason = failure or stop.reason(self.stop_file if is_main else None)
        # Rank 0's clock alone decides when to save and when to meet again: the ranks' own clocks would not agree.
        is_save_due = is_main and 0 < self.checkpoint_every_s <= now - self.saved_s
        interval = min(max(int(SYNC_S * num_steps / max(seconds, 1e-9)), 1), MAX_STEPS)
        votes = torch.tensor([bool(self.stop_reason), is_save_due, interval if is_main else 0], dtype=torch.float64)
        if self.world.size > 1:
            dist.all_reduce(votes)  # collective
        stop_votes, save_votes, steps_to_next = votes.tolist()
        means = [total / count for total, count in zip(sums, self.counts, strict=True)]
        num_images, self.counts, self.steps_to_next = sum(self.counts), [], int(steps_to_next)
        first_step = next_step - num_steps
        return Window(first_step, means, sum(sums), num_images, seconds, stop=stop_votes > 0, save=save_votes > 0)

    def note_save(self) -> None:
        """A checkpoint was written just now."""
        self.saved_s = time.monotonic()
