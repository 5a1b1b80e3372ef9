"""Replays a step on a GPU as one CUDA graph, so that the step's hundred launches cost the CPU one.

Networks of this size are bound by launches there, not by arithmetic.
"""

from collections.abc import Callable

import torch
from torch import Tensor

WARM_UP_CALLS = 3  # what is allocated or chosen in the first calls must not become part of the graph


def capture_cuda_graph(function: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
    """Record what `function` launches, without running it. Returns how to run it, and where its result will be."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(torch.cuda.current_stream()), torch.cuda.graph(graph):  # the first comes back from a failure
        result = function()
    return graph.replay, result


class Replayed:
    """Calls a function of tensors; after a few calls as it is, by replaying a graph of it.

    The graph reads its arguments from tensors of its own, into which each call copies the ones that it is given: they
    must keep their shapes. Where capturing fails, that is said, and the function is called as it is.
    """

    def __init__(
        self,
        function: Callable[..., Tensor],
        say: Callable[[str], None],
        capture: Callable[[Callable[[], Tensor]], tuple[Callable[[], None], Tensor]] = capture_cuda_graph,
    ) -> None:
        self.function, self.say, self.capture = function, say, capture
        self._failed = False
        self._calls = 0
        self._inputs: list[Tensor] = []
        self._replay: Callable[[], None] | None = None
        self._result = torch.empty(0)

    def __call__(self, *inputs: Tensor) -> Tensor:
        """The function's result, which is good until the next call: the graph will overwrite it."""
        self._calls += 1
        if self._calls <= WARM_UP_CALLS or self._failed:
            return self.function(*inputs)
        if self._replay is None:
            self._inputs = [tensor.clone() for tensor in inputs]
            try:
                self._replay, self._result = self.capture(lambda: self.function(*self._inputs))
            except RuntimeError as error:
                self._failed = True
                reason = str(error.__context__ or error).splitlines()[0]  # ending a capture raises on top of its cause
                self.say(f"note: the step could not be captured as a CUDA graph: {reason}")
        if self._replay is None:
            return self.function(*inputs)
        torch._foreach_copy_(self._inputs, list(inputs))
        self._replay()
        return self._result
