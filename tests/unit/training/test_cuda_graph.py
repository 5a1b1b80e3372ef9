"""What a CUDA graph would do, with a capture that only remembers the function."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from mnist_dist.data.sampler import Batch
from mnist_dist.training.cuda_graph import WARM_UP_STEPS, Replay, StepGraphs
from tests.unit.training.steps import remember

STEPS_PER_EPOCH = 5
NOTE = "note: a step could not be captured as a CUDA graph{}, its kernels are launched one by one: {}"


def make_world(others: tuple[str, ...] = ()) -> Any:
    """Rank 0's world; `others` is what the other ranks' captures failed with."""
    return SimpleNamespace(
        device=torch.device("cpu"),
        size=1 + len(others),
        gather=lambda failure: [failure, *others],
        name=lambda rank: f"rank {rank} on a",
    )


def run(graphs: StepGraphs, *numbers: int) -> list[tuple[int, int]]:
    """Do some steps of epochs whose last batch is short: the rows that were seen, by a step of which batch."""
    seen = []
    nothing = torch.empty(0)
    for number in numbers:
        row = number % STEPS_PER_EPOCH
        batch = Batch(number, 0, row, False, 3 if row == STEPS_PER_EPOCH - 1 else 8, nothing, nothing, None)

        def step(row: Tensor, batch: Batch = batch) -> None:
            seen.append((int(row), batch.step))

        graphs.run(step, batch)
    return seen


def test_each_size_of_batch_has_a_graph_that_counts_its_rows() -> None:
    graphs = StepGraphs(make_world(), pytest.fail, capture=remember)
    rows, steps = zip(*run(graphs, *range(5 * STEPS_PER_EPOCH)), strict=True)
    assert list(rows) == 5 * [0, 1, 2, 3, 4]
    whole, short = 3, 19  # the steps in which a graph was captured, after three others
    assert WARM_UP_STEPS == 3
    assert list(steps) == [
        (min(n, short) if n % STEPS_PER_EPOCH == 4 else min(n, whole)) for n in range(5 * STEPS_PER_EPOCH)
    ]


def test_a_run_that_goes_on_in_mid_epoch_sets_the_row() -> None:
    graphs = StepGraphs(make_world(), pytest.fail, capture=remember)
    assert run(graphs, *range(8), 3, 4, 6) == [
        (n % STEPS_PER_EPOCH, min(n, 3) if n != 4 else 4) for n in (*range(8), 3, 4, 6)
    ]


@pytest.mark.parametrize("ends_badly", [False, True])
def test_a_capture_that_fails_is_said_once_and_does_without(ends_badly: bool) -> None:
    said: list[str] = []

    def fail(_: Any) -> Replay:
        try:
            raise RuntimeError("operation not permitted when stream is capturing\nC++ stack")
        finally:
            if ends_badly:  # as CUDAGraph.capture_end does where the capture was invalidated
                raise RuntimeError("operation failed due to a previous error during capture")

    graphs = StepGraphs(make_world(), said.append, capture=fail)
    assert run(graphs, *range(20)) == [(n % STEPS_PER_EPOCH, n) for n in range(20)]
    assert said == [NOTE.format("", "operation not permitted when stream is capturing")]


def test_where_another_rank_cannot_capture_none_replays() -> None:
    said: list[str] = []
    graphs = StepGraphs(make_world(("", "out of memory")), said.append, capture=remember)
    assert run(graphs, *range(20)) == [(n % STEPS_PER_EPOCH, n) for n in range(20)]
    assert said == [NOTE.format(" on rank 2 on a", "out of memory")]
