"""The learning rate is torch's own, step by step, without torch's state."""

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import (
    ConstantLR,
    CosineAnnealingLR,
    LinearLR,
    LRScheduler,
    OneCycleLR,
    SequentialLR,
)

from mnist_dist.training.schedule import WARMUP_START, learning_rate

PEAK = 0.125
KINDS = ["constant", "cosine", "one-cycle"]
# total steps and warm-up, whose product is a whole number of steps
WHOLE = [(1, 0.0), (1, 1.0), (2, 0.5), (10, 0.2), (10, 0.3), (10, 1.0), (16, 0.25), (100, 0.0), (100, 0.29), (938, 0.5)]
# and where it is not
BROKEN = [(7, 0.2), (10, 0.25), (16, 0.2), (100, 0.123), (938, 0.2), (1, 0.5)]


def ours(total: int, kind: str, warmup: float) -> list[float]:
    return [learning_rate(step, total, PEAK, kind, warmup) for step in range(total)]


def torchs(total: int, scheduler: Callable[[Optimizer], LRScheduler]) -> list[float]:
    """What torch's scheduler gives for each step of a loop that calls optimizer.step and scheduler.step."""
    optimizer = SGD([torch.nn.Parameter(torch.zeros(1))], lr=PEAK)
    chosen, rates = scheduler(optimizer), []
    for _ in range(total):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        chosen.step()
    return rates


@pytest.mark.filterwarnings("ignore:The epoch parameter:UserWarning")  # SequentialLR's own
@pytest.mark.parametrize(("total", "warmup"), WHOLE)
@pytest.mark.parametrize("kind", ["constant", "cosine"])
def test_constant_and_cosine_are_torchs_after_linear_warmup(total: int, warmup: float, kind: str) -> None:
    warmup_steps = round(warmup * total)
    assert warmup_steps == pytest.approx(warmup * total)

    def scheduler(optimizer: Optimizer) -> LRScheduler:
        after: LRScheduler = ConstantLR(optimizer, factor=1.0)
        if kind == "cosine":
            after = CosineAnnealingLR(optimizer, T_max=max(total - warmup_steps, 1))
        if not warmup_steps:
            return after
        climb = LinearLR(optimizer, start_factor=1 / 25, total_iters=warmup_steps)
        return SequentialLR(optimizer, [climb, after], [warmup_steps])

    assert ours(total, kind, warmup) == pytest.approx(torchs(total, scheduler), abs=1e-14)


@pytest.mark.parametrize(("total", "warmup"), [case for case in WHOLE + BROKEN if case[1]])
def test_one_cycle_is_torchs(total: int, warmup: float) -> None:
    # Torch puts the peak at pct_start * total_steps - 1, so this is the pct_start that puts it at warmup * total.
    def scheduler(optimizer: Optimizer) -> LRScheduler:
        return OneCycleLR(
            optimizer,
            max_lr=PEAK,
            total_steps=total + 1,
            pct_start=(warmup * total + 1) / (total + 1),
            anneal_strategy="linear",
            cycle_momentum=False,
            three_phase=False,
            div_factor=25,
            final_div_factor=math.inf,
        )

    assert ours(total, "one-cycle", warmup) == pytest.approx(torchs(total, scheduler), abs=1e-14)


def test_one_cycle_without_warmup_is_a_line_to_zero() -> None:  # torch's own divides by zero there
    assert ours(10, "one-cycle", 0.0) == pytest.approx([PEAK * (1 - step / 10) for step in range(10)])


@pytest.mark.parametrize(("total", "warmup"), WHOLE + BROKEN)
@pytest.mark.parametrize("kind", KINDS)
def test_it_climbs_to_the_peak_in_a_line_and_does_not_rise_again(total: int, warmup: float, kind: str) -> None:
    rates = ours(total, kind, warmup)
    climb = [rate for step, rate in enumerate(rates) if step < warmup * total]
    assert rates[0] == pytest.approx(PEAK * WARMUP_START if warmup else PEAK)
    per_step = (1 - WARMUP_START) * PEAK / (warmup * total) if warmup else 0
    assert climb == pytest.approx([PEAK * WARMUP_START + step * per_step for step in range(len(climb))])
    fall = rates[len(climb) :]
    assert fall == sorted(fall, reverse=True)


@pytest.mark.parametrize(("total", "warmup"), [(10, 0.2), (10, 0.0), (938, 0.2), (1, 0.0)])
def test_it_would_reach_zero_one_step_after_the_last(total: int, warmup: float) -> None:
    for kind in ("cosine", "one-cycle"):
        assert learning_rate(total, total, PEAK, kind, warmup) == pytest.approx(0, abs=1e-15)
        assert learning_rate(total - 1, total, PEAK, kind, warmup) > 0
    assert learning_rate(total - 1, total, PEAK, "constant", warmup) == PEAK


@given(
    total=st.integers(1, 10**7),
    share=st.floats(0, 1, exclude_max=True),
    kind=st.sampled_from(KINDS),
    warmup=st.floats(0, 1),
    peak=st.floats(1e-300, 1e6),
)
@settings(max_examples=500, deadline=None)
def test_it_is_never_negative_and_never_above_the_peak(
    total: int, share: float, kind: str, warmup: float, peak: float
) -> None:
    for step in (0, min(int(share * total), total - 1), total - 1):
        assert 0 <= learning_rate(step, total, peak, kind, warmup) <= peak
