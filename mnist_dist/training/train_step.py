"""What is trained, and one step of training it: network, optimizer, moving average, gradient scaler."""

import warnings
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from mnist_dist.config.schema import Config
from mnist_dist.data.augment import Augmentation
from mnist_dist.data.dataset import Share, Split
from mnist_dist.distributed.watchdog import Phase
from mnist_dist.distributed.world import World
from mnist_dist.models import build_model
from mnist_dist.training.cuda_graph import Replayed


class Learner:
    """One rank's replica of what is trained."""

    def __init__(self, config: Config, world: World, images: Split, say: Callable[[str], None]) -> None:
        """`say` takes what is to be said on the console."""
        self.config, self.world, self.images = config, world, images
        self.accelerator = world.accelerator
        self.augmentation = Augmentation(config, world.device)
        self.replayed: Replayed | None = None
        if world.device.type == "cuda" and config.graph == "auto":
            if world.size > 1 or world.precision == "fp16":
                why = "several ranks exchange gradients in it" if world.size > 1 else "fp16 decides in it what to skip"
                world.notes.append(f"graph=auto launches the kernels of a step one by one: {why}")
            else:
                self.replayed = Replayed(self.update, say)
        self.network = build_model(config.model, config.seed).to(world.device)
        self.optimizer: Any = build_optimizer(config, self.network, graph=self.replayed is not None)
        self.average = get_ema_multi_avg_fn(config.ema)
        self.ema = AveragedModel(self.network, multi_avg_fn=self.average) if config.ema else None
        self.scaler: torch.amp.GradScaler | None = None  # Accelerate's, for fp16

    def prepare(self) -> None:
        """Wrap model and optimizer, and only these, once a checkpoint's state is in them. Collective."""
        self.model, prepared = self.accelerator.prepare(self.network, self.optimizer)  # collective
        self.scaler = self.accelerator.scaler
        # The prepared optimizer is there for the scaler's sake, and looks for packages that are not installed at every
        # step: a tenth of a millisecond, which is a twentieth of the MLP's step.
        if self.scaler:
            self.optimizer = prepared

    def learn(self, share: Share, epoch: int, step_in_epoch: int, lr: float) -> Tensor:
        """One optimizer step on one global batch: returns the sum of the losses of this rank's share, nats, float32 [].

        Collective: DDP's all-reduce is in the last backward pass.
        """
        for group in self.optimizer.param_groups:
            if self.replayed:
                group["lr"].fill_(lr)
            else:
                group["lr"] = lr
        draws: list[Tensor] = []
        if self.augmentation.enabled:
            mine = share.positions.clamp(max=share.num_images - 1)
            draws = [drawn[mine] for drawn in self.augmentation.draw(epoch, step_in_epoch, share.num_images)]
        # DDP takes the mean of the ranks' gradients; times this, that of the sums is the gradient of the global mean
        # over the true size of the batch, the short last one included.
        scale = torch.full((), self.world.size / share.num_images, device=share.rows.device)
        is_whole = share.num_images == self.config.batch_size
        if self.replayed and is_whole and share.weights is None:
            loss = self.replayed(scale, share.rows, *draws)
        else:
            loss = self.update(scale, share.rows, *draws, weights=share.weights)
        if self.ema and not self.was_skipped():
            self.update_average(self.ema)
        return loss

    def update(self, scale: Tensor, rows: Tensor, *draws: Tensor, weights: Tensor | None = None) -> Tensor:
        """The part of a step that a CUDA graph may hold: nothing here depends on a tensor's value."""
        self.optimizer.zero_grad()  # first, so that a capture that failed half-way leaves nothing to the next call
        images = self.images.images.index_select(0, rows) / 255  # a quarter of indexing's time
        labels = self.images.labels.index_select(0, rows)
        if draws:
            images = self.augmentation.warp(images, *draws)
        size = self.config.micro_batch or len(rows)
        losses = []
        for start in range(0, len(rows), size):
            piece = slice(start, start + size)
            is_last = start + size >= len(rows)
            with nullcontext() if is_last else self.accelerator.no_sync(self.model):
                logits = self.model(images[piece])
                loss = self.sum_of_losses(logits, labels[piece], None if weights is None else weights[piece])
                if is_last:
                    self.world.at(Phase.EXCHANGING)
                (self.scaler.scale(loss) if self.scaler else loss).backward(scale)  # collective, in the last piece
            losses.append(loss.detach())
        if self.config.clip_grad_norm:
            self.accelerator.clip_grad_norm_(self.model.parameters(), self.config.clip_grad_norm)
        self.optimizer.step()
        return losses[0] if len(losses) == 1 else torch.stack(losses).sum()

    def update_average(self, ema: AveragedModel) -> None:
        """Move the average towards the weights; at the first update it becomes them."""
        if ema.n_averaged == 0:
            ema.update_parameters(self.network)
        else:  # as update_parameters does it, which would also copy n_averaged to the GPU and wait for that
            self.average(list(ema.module.parameters()), list(self.network.parameters()), ema.n_averaged)
            ema.n_averaged += 1

    def was_skipped(self) -> bool:
        """Whether the fp16 scaler found the last step's gradient not finite, so that nothing was updated."""
        return self.scaler is not None and self.accelerator.optimizer_step_was_skipped

    def sum_of_losses(self, logits: Tensor, labels: Tensor, weights: Tensor | None) -> Tensor:
        """Cross-entropy, nats, summed over the images [n]; those of weight 0 are the sampler's repeats."""
        smoothing = self.config.label_smoothing
        if weights is None:
            return F.cross_entropy(logits, labels, label_smoothing=smoothing, reduction="sum")
        return (F.cross_entropy(logits, labels, label_smoothing=smoothing, reduction="none") * weights).sum()

    def weights(self) -> dict[str, Tensor]:
        """The weights that evaluation uses: the moving average's where there is one."""
        return (self.ema.module if self.ema else self.network).state_dict()

    def is_finite(self) -> bool:
        """Whether all weights are numbers."""
        return all(bool(tensor.isfinite().all()) for tensor in self.network.state_dict().values())

    def state_dict(self) -> dict[str, Any]:
        """What training goes on with: only tensors, numbers and strings, so that it loads without running code."""
        return {
            "network": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "ema": self.ema.state_dict() if self.ema else None,
            "scaler": self.scaler.state_dict() if self.scaler else None,
        }

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Go on with `saved`; before `prepare`. Raises KeyError, TypeError, ValueError or RuntimeError if malformed."""
        self.network.load_state_dict(saved["network"])
        # The moments only: lr, betas and weight decay are the configuration's, which may have changed.
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": saved["optimizer"]["state"], "param_groups": groups})
        if self.ema and saved["ema"]:
            self.ema.load_state_dict(saved["ema"])
        elif self.ema:  # the run had no average: it starts at the next update, and until then it is the weights
            self.ema.module.load_state_dict(saved["network"])
        if self.accelerator.scaler and saved["scaler"]:
            self.accelerator.scaler.load_state_dict(saved["scaler"])


def build_optimizer(config: Config, network: torch.nn.Module, *, graph: bool) -> Optimizer:
    """The configured optimizer, fused: one kernel for all parameters. In a graph its learning rate is a tensor."""
    parameters, decay = network.parameters(), config.weight_decay
    device = next(network.parameters()).device
    lr: Any = torch.tensor(config.lr, device=device) if graph else config.lr
    if graph:  # the steps before the capture, and a last short batch, do run without
        warnings.filterwarnings("ignore", message=".*capturable=True can impair performance")
    if config.optimizer == "sgd":
        momentum = config.momentum
        return SGD(parameters, lr, momentum=momentum, nesterov=momentum > 0, weight_decay=decay, fused=True)
    cls = Adam if config.optimizer == "adam" else AdamW
    betas = (config.momentum, config.beta2)
    return cls(parameters, lr, betas=betas, weight_decay=decay, fused=True, capturable=graph)
