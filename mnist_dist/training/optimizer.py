"""The optimizer, and the moving average of the weights."""

import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from mnist_dist.config.schema import Config
from mnist_dist.muon import Muon


def build_optimizer(config: Config, network: nn.Module, *, in_graph: bool, precision: str) -> Optimizer:
    """The configured optimizer, fused: one kernel for all parameters. In a graph its learning rate is a tensor.

    In fp16, with a gradient scaler, sgd is not fused: skipped in its first step, it would go on from momentum that was
    never written.
    """
    parameters, momentum = network.parameters(), config.momentum
    common: dict[str, Any] = {"lr": config.lr, "weight_decay": config.weight_decay}
    optimizer: Optimizer
    if config.optimizer == "sgd":
        optimizer = SGD(parameters, momentum=momentum, nesterov=momentum > 0, fused=precision != "fp16", **common)
    else:
        common |= {"betas": (momentum, config.beta2), "fused": True, "capturable": in_graph}
        if config.optimizer == "muon":
            optimizer = Muon(network, dtype=torch.bfloat16 if precision == "bf16" else torch.float32, **common)
        else:
            optimizer = (Adam if config.optimizer == "adam" else AdamW)(parameters, **common)
    if in_graph:
        device = next(network.parameters()).device
        for group in optimizer.param_groups:  # not through the constructor, which would wait to read it
            group["lr"] = torch.tensor(config.lr, device=device)
        # The steps before the capture do run without.
        warnings.filterwarnings("ignore", message=".*capturable=True can impair performance")
    return optimizer


class MovingAverage(AveragedModel):
    """The exponential moving average of a network's weights. Its update waits for no GPU, as its parent's does."""

    def __init__(self, network: nn.Module, decay: float) -> None:
        super().__init__(network, device=next(network.parameters()).device)
        self.multi_average = get_ema_multi_avg_fn(decay)
        self.is_empty = True

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        """Move the average towards the weights; at the first update it becomes them."""
        average: list[Tensor] = list(self.module.parameters())
        weights: list[Tensor] = list(model.parameters())
        if self.is_empty:
            torch._foreach_copy_(average, weights)
        else:
            self.multi_average(average, weights, self.n_averaged)
        self.n_averaged += 1
        self.is_empty = False

    def load_state_dict(self, *arguments: Any, **options: Any) -> Any:
        """As its parent does."""
        result = super().load_state_dict(*arguments, **options)
        self.is_empty = not self.n_averaged
        return result
