"""The optimizer, and the moving average of the weights."""

import warnings
from typing import Any

import torch
from torch import nn
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from mnist_dist.config.schema import Config


def build_optimizer(config: Config, network: nn.Module, *, in_graph: bool, is_scaled: bool = False) -> Optimizer:
    """The configured optimizer, fused: one kernel for all parameters. In a graph its learning rate is a tensor.

    With a gradient scaler (`is_scaled`), sgd is not fused: skipped in its first step, it would go on from momentum that
    was never written.
    """
    parameters, decay = network.parameters(), config.weight_decay
    device = next(network.parameters()).device
    lr: Any = torch.tensor(config.lr, device=device) if in_graph else config.lr
    if in_graph:  # the steps before the capture, and a last short batch, do run without
        warnings.filterwarnings("ignore", message=".*capturable=True can impair performance")
    if config.optimizer == "sgd":
        momentum = config.momentum
        return SGD(parameters, lr, momentum=momentum, nesterov=momentum > 0, weight_decay=decay, fused=not is_scaled)
    cls = Adam if config.optimizer == "adam" else AdamW
    betas = (config.momentum, config.beta2)
    return cls(parameters, lr, betas=betas, weight_decay=decay, fused=True, capturable=in_graph)


class MovingAverage(AveragedModel):
    """The exponential moving average of a network's weights."""

    def __init__(self, network: nn.Module, decay: float) -> None:
        self.multi_average = get_ema_multi_avg_fn(decay)
        super().__init__(network, multi_avg_fn=self.multi_average)

    def update_parameters(self, model: nn.Module) -> None:
        """Move the average towards the weights; at the first update it becomes them."""
        if self.n_averaged == 0:
            super().update_parameters(model)
            return
        # As the parent does it, which would also copy n_averaged to the GPU and wait for that.
        self.multi_average(list(self.module.parameters()), list(model.parameters()), self.n_averaged)
        self.n_averaged += 1
