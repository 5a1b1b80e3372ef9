"""Replays the steps of an epoch on a GPU from a CUDA graph, so that a step's hundred launches cost the CPU one.

Networks of this size are bound by launches there, not by arithmetic.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from mnist_dist.data.sampler import Batch
from mnist_dist.distributed.world import World

WARM_UP_STEPS = 3  # what is allocated, chosen or connected in the first steps must not become part of the graph

Replay = Callable[[], None]


def capture_cuda_graph(function: Callable[[], None]) -> Replay:
    """Record what `function` launches, without running it. Returns how to run it. Raises RuntimeError."""
    graph = torch.cuda.CUDAGraph()
    # The first context comes back from a failure. Other threads, as NCCL's watchdog is one, may go on asking the GPU.
    with (
        torch.cuda.stream(torch.cuda.current_stream()),
        torch.cuda.graph(graph, capture_error_mode="thread_local"),
    ):
        function()
    return graph.replay


class StepGraphs:
    """A graph for each size of batch, whole and short: captured after a few steps as they are, then replayed.

    A graph finds what differs from step to step in tables, in the row that the tensor `row` names, and moves on to the
    next one. Where a rank cannot capture, rank 0 says so, and all ranks go on with steps as they are.
    """

    def __init__(
        self,
        world: World,
        info: Callable[[str], None],
        capture: Callable[[Callable[[], None]], Replay] = capture_cuda_graph,
    ) -> None:
        self.world, self.info, self.capture = world, info, capture
        self.row = torch.zeros(1, dtype=torch.int64, device=world.device)
        self.next_row = 0  # what `row` holds
        self.num_steps: dict[int, int] = {}  # by the batch's size
        self.replays: dict[int, Replay] = {}
        self.is_possible = True

    def run(self, step: Callable[[Tensor], None], batch: Batch) -> None:
        """Do a step on `batch`, which calls the same function of a row for each size of batch. Collective."""
        if batch.step_in_epoch != self.next_row:
            self.row.fill_(batch.step_in_epoch)
        self.next_row = batch.step_in_epoch + 1
        size = batch.num_images
        self.num_steps[size] = self.num_steps.get(size, 0) + 1
        if self.is_possible and self.num_steps[size] == WARM_UP_STEPS + 1:
            self.try_capture(lambda: self.step_and_count(step), size)  # collective
        if size in self.replays:
            self.replays[size]()  # collective
        else:
            self.step_and_count(step)  # collective

    def step_and_count(self, step: Callable[[Tensor], None]) -> None:
        """A step, and on to the next row. Collective."""
        step(self.row)  # collective
        self.row += 1

    def try_capture(self, function: Callable[[], None], size: int) -> None:
        """Capture a graph, unless a rank cannot. Collective."""
        failure = ""
        try:
            self.replays[size] = self.capture(function)
        except RuntimeError as error:
            failure = str(error.__context__ or error).splitlines()[0]  # ending a capture raises on top of its cause
        failures = self.world.gather(failure)  # collective
        if not any(failures):
            return
        self.is_possible = False
        self.replays.clear()
        rank, reason = next((rank, text) for rank, text in enumerate(failures) if text)
        where = f" on {self.world.name(rank)}" if self.world.size > 1 else ""
        self.info(
            f"note: a step could not be captured as a CUDA graph{where}, its kernels are launched one by one: {reason}"
        )
