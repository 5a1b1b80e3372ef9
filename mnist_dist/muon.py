"""The optimizer Muon, beside those of torch.optim."""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer


class Muon(Optimizer):
    """Muon for the weights of hidden layers and AdamW for all other parameters, at one learning rate.

    A step of Muon is the momentum, a matrix with a row an output, with its singular values brought close to one (Jordan
    et al. 2024, https://kellerjordan.github.io/posts/muon), at the size of AdamW's (Liu et al. 2025, arXiv:2502.16982).
    torch.optim.Muon does the same; it takes no convolutions, and no learning rate from a CUDA graph.
    """

    def __init__(self, network: nn.Module, *, betas: tuple[float, float], dtype: torch.dtype, **options: Any) -> None:
        """`dtype` is that of the iteration; `options` are AdamW's."""
        hidden = [p for p in network.parameters() if p.ndim > 1][1:-1]
        others = [p for p in network.parameters() if all(p is not weight for weight in hidden)]
        self.dtype, self.adamw = dtype, AdamW(others, betas=betas, **options)
        common = {"lr": options["lr"], "weight_decay": options["weight_decay"], "momentum": betas[0]}
        super().__init__([{"params": hidden}], common)
        self.param_groups += self.adamw.param_groups
        self.adamw.state = self.state

    def __setstate__(self, state: dict[str, Any]) -> None:
        """As its parent does, when a state is loaded."""
        super().__setstate__(state)
        self.adamw.state, self.adamw.param_groups = self.state, self.param_groups[1:]

    @torch.no_grad()
    def step(self, _closure: Any = None) -> None:  # type: ignore[override]
        """Move each parameter."""
        group = self.param_groups[0]
        for p in group["params"]:
            state = self.state[p]
            if not state:
                state["momentum"] = torch.zeros_like(p)
            state["momentum"].lerp_(p.grad, 1 - group["momentum"])
            direction = p.grad.lerp(state["momentum"], group["momentum"]).to(self.dtype)  # Nesterov's
            # The order of the columns does not matter: this one needs no copy where weights are channels_last.
            matrix = direction.movedim(1, -1).flatten(1)
            size = 0.2 * math.sqrt(max(matrix.shape))
            update = orthogonalize(matrix).unflatten(1, (*p.shape[2:], p.shape[1])).movedim(-1, 1)
            p.mul_(1 - group["lr"] * group["weight_decay"])
            p.sub_(update * (group["lr"] * size))
        self.adamw.step()


def orthogonalize(matrix: Tensor) -> Tensor:
    """The matrix with its singular values brought close to one, by five steps of a Newton-Schulz iteration."""
    a, b, c = 3.4445, -4.7750, 2.0315  # which make small singular values grow fast (Jordan et al. 2024)
    if is_tall := matrix.shape[0] > matrix.shape[1]:
        matrix = matrix.T
    matrix = matrix / matrix.norm().clamp(min=1e-7)
    for _ in range(5):
        gram = matrix @ matrix.T
        matrix = torch.addmm(matrix, torch.addmm(gram, gram, gram, beta=b, alpha=c), matrix, beta=a)
    return matrix.T if is_tall else matrix
