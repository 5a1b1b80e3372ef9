"""The learning rate as a pure function of the step, so nothing of it needs saving and every rank agrees."""

import math

WARMUP_START = 1 / 25  # where the warm-up begins, as a share of the peak (torch's OneCycleLR: div_factor=25)


def learning_rate(step: int, total_steps: int, peak: float, kind: str, warmup: float) -> float:
    """The learning rate of optimizer step `step` (from 0) of `total_steps`.

    It climbs linearly to `peak` over the first `warmup` share of the steps, then stays there ("constant"), falls
    along half a cosine ("cosine") or along a line ("one-cycle") that would reach zero one step after the last.
    Where warmup * total_steps is whole, the first two are torch's LinearLR followed by ConstantLR or
    CosineAnnealingLR. The third is always OneCycleLR(anneal_strategy="linear", final_div_factor=inf) over
    total_steps + 1 with its peak at the same place: pct_start = (warmup * total_steps + 1) / (total_steps + 1).
    """
    warmup_steps = warmup * total_steps
    if step < warmup_steps:
        return peak * (WARMUP_START + (1 - WARMUP_START) * step / warmup_steps)
    if kind == "constant":
        return peak
    progress = (step - warmup_steps) / max(total_steps - warmup_steps, 1e-12)
    return peak * (0.5 * (1 + math.cos(math.pi * progress)) if kind == "cosine" else 1 - progress)
