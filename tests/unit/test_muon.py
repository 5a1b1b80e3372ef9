"""Muon: the same steps as torch's own, for the parameters that both take."""

from typing import Any

import pytest
import torch
from torch.optim import AdamW

from mnist_dist.models import build_model
from mnist_dist.muon import Muon, orthogonalize


def test_it_is_torch_s_muon_for_the_hidden_layers_and_adamw_for_the_rest() -> None:
    mine, plain = build_model("mlp", 0), build_model("mlp", 0)
    options: dict[str, Any] = {"lr": 0.01, "weight_decay": 0.1}
    muon = Muon(mine, betas=(0.8, 0.9), dtype=torch.bfloat16, **options)
    first, hidden, last = (p for p in plain.parameters() if p.ndim > 1)
    others = [first, last, *(p for p in plain.parameters() if p.ndim == 1)]
    theirs = [
        torch.optim.Muon([hidden], momentum=0.8, adjust_lr_fn="match_rms_adamw", **options),
        AdamW(others, betas=(0.8, 0.9), **options),
    ]
    generator = torch.Generator().manual_seed(0)
    for step in range(4):
        for p, q in zip(mine.parameters(), plain.parameters(), strict=True):
            p.grad = torch.randn(p.shape, generator=generator)
            q.grad = p.grad.clone()
        for optimizer in (muon, *theirs):
            optimizer.step()
        if step == 1:  # goes on from what a checkpoint holds
            state = muon.state_dict()
            muon = Muon(mine, betas=(0.8, 0.9), dtype=torch.bfloat16, **options)
            muon.load_state_dict(state)
    for p, q in zip(mine.parameters(), plain.parameters(), strict=True):
        atol = 2e-4 if q is hidden else 0  # bf16: a step is 2e-3
        torch.testing.assert_close(p, q, rtol=0, atol=atol)


@pytest.mark.parametrize("shape", [(64, 288), (512, 256)])
def test_singular_values_are_brought_close_to_one(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonalize(matrix))
    assert values.min() > 0.6
    assert values.max() < 1.3
