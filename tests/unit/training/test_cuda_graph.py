"""What a CUDA graph would do, with a capture that only remembers the function."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from mnist_dist.training.cuda_graph import WARM_UP_CALLS, Replayed
from tests.unit.training.steps import remember


def test_a_replay_reads_what_it_is_given() -> None:
    calls = []

    def function(x: Tensor, y: Tensor) -> Tensor:
        calls.append((x, y))
        return (x * y).sum()

    replayed = Replayed(function, pytest.fail, capture=remember)
    results = [float(replayed(torch.tensor([float(i)]), torch.tensor([2.0]))) for i in range(WARM_UP_CALLS + 3)]
    assert results == [2.0 * i for i in range(WARM_UP_CALLS + 3)]
    assert calls[-1][0] is calls[-2][0]  # a tensor of its own, the same at each replay


@pytest.mark.parametrize("ends_badly", [False, True])
def test_a_capture_that_fails_is_said_once_and_does_without(ends_badly: bool) -> None:
    said: list[str] = []

    def fail(_: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        try:
            raise RuntimeError("operation not permitted when stream is capturing\nC++ stack")
        finally:
            if ends_badly:  # as CUDAGraph.capture_end does where the capture was invalidated
                raise RuntimeError("operation failed due to a previous error during capture")

    replayed = Replayed(lambda x: x + 1, said.append, capture=fail)
    assert [int(replayed(torch.tensor(i))) for i in range(8)] == list(range(1, 9))
    assert said == [
        "note: the step could not be captured as a CUDA graph: operation not permitted when stream is capturing"
    ]
