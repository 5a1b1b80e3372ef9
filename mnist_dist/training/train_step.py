"""One rank's replica of what is trained, and one optimizer step of it.

A step is one flat sequence, the same on a CPU, on one GPU and on many:

    loss and gradient of each of this rank's shards
    one flat vector: the loss and all gradients
    sum over the ranks                                  # collective
    clip, optimizer, moving average                     the same on every rank
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mnist_dist.config.schema import Config
from mnist_dist.data.augment import Augmentation
from mnist_dist.data.dataset import Split
from mnist_dist.data.sampler import Batch, GlobalBatchSampler
from mnist_dist.distributed.watchdog import Phase
from mnist_dist.distributed.world import World
from mnist_dist.models import build_model
from mnist_dist.training.cuda_graph import StepGraphs
from mnist_dist.training.exchange import Exchange
from mnist_dist.training.optimizer import MovingAverage, build_optimizer


class TrainStep:
    """Network, optimizer, moving average and gradient scaler; called with a batch, it trains them one step.

    Whatever differs from step to step is a row of a table that is filled when an epoch begins: images, random warps,
    learning rate, and where the loss goes. So an epoch's steps are replays of one CUDA graph, which counts its rows.
    """

    def __init__(
        self,
        config: Config,
        world: World,
        train_split: Split,
        sampler: GlobalBatchSampler,
        learning_rate: Callable[[int], float],
        info: Callable[[str], None],
    ) -> None:
        """`train_split` lies on this rank's device; `learning_rate` is that of a step of the run; `info` takes what is
        to be said on the console."""
        self.config, self.world, self.train_split, self.sampler = config, world, train_split, sampler
        self.learning_rate = learning_rate
        self.augmentation = Augmentation(config, world.device)
        self.num_shards = config.num_shards(world.size) // world.size
        self.network = build_model(config.model, config.seed).to(world.device)
        self.graphs = self.choose_graphs(info)
        self.optimizer: Any = build_optimizer(
            config, self.network, in_graph=self.graphs is not None, precision=world.precision
        )
        self.average = MovingAverage(self.network, config.ema) if config.ema else None
        self.exchange = Exchange(
            list(self.network.parameters()),
            num_shards=self.num_shards,
            world_size=world.size,
            fixed_tree=bool(config.bit_exact),
            group=world.group,
        )
        # Accelerate adds autocast, and no DDP, which `evaluation_mode` leaves out: the exchange is ours. It keeps the
        # optimizer for the scaler's sake; its wrapper costs a tenth of a millisecond a step (docs/LOG.md).
        self.model: nn.Module = world.accelerator.prepare_model(self.network, evaluation_mode=True)
        world.accelerator.prepare_optimizer(self.optimizer)
        self.scaler: torch.amp.GradScaler | None = world.accelerator.scaler  # for fp16
        self.was_skipped = False  # the last step, since the scaler found a gradient that is not finite
        # What makes the gradient of a sum of losses that of their mean over the whole global batch, by its size.
        self.scales = {n: torch.full((), 1 / n, device=world.device) for n in sampler.batch_sizes}
        # The tables, a row a step of the epoch.
        self.epoch = -1
        self.loss_sums = torch.zeros(sampler.steps_per_epoch, device=world.device)  # over the global batch, nats
        self.rates = torch.zeros(sampler.steps_per_epoch, device=world.device)
        self.draws: list[Tensor] = []  # [steps, batch_size, ...], where images are warped at random

    def choose_graphs(self, info: Callable[[str], None]) -> StepGraphs | None:
        """The CUDA graphs that steps are replayed from, where there are any."""
        if self.world.device.type != "cuda" or self.config.graph == "off":
            return None
        if self.world.precision == "fp16":
            self.world.notes.append(
                "graph=auto launches the kernels of a step one by one: fp16 decides in it what to skip"
            )
            return None
        return StepGraphs(self.world, info)

    def __call__(self, batch: Batch) -> None:
        """One optimizer step, whose loss goes to `loss_sums`. Collective."""
        self.world.at(Phase.COMPUTING, batch.step)
        if batch.epoch != self.epoch:
            self.begin_epoch(batch.epoch)
        if self.graphs:
            self.graphs.run(lambda row: self.train_row(batch, row), batch)  # collective
        else:
            self.train_row(batch, batch.step_in_epoch)  # collective

    def begin_epoch(self, epoch: int) -> None:
        """Fill the tables of an epoch, in place where a graph reads them."""
        self.epoch, num_rows, batch_size = epoch, self.sampler.steps_per_epoch, self.config.batch_size
        if self.augmentation.enabled:
            drawn = self.augmentation.draw(epoch, num_rows * batch_size)
            tables = [values.unflatten(0, (num_rows, batch_size)) for values in drawn]
            if self.graphs and self.draws:
                torch._foreach_copy_(self.draws, tables)
            else:
                self.draws = tables
        if self.graphs:
            steps = range(epoch * num_rows, (epoch + 1) * num_rows)
            self.rates.copy_(torch.tensor([self.learning_rate(step) for step in steps]))

    def train_row(self, batch: Batch, row: int | Tensor) -> None:
        """One step on a row of the tables, which a graph has as a tensor [1]. Collective.

        Nothing here depends on a tensor's value, unless there is a scaler.
        """
        for group in self.optimizer.param_groups:
            if self.graphs:
                group["lr"].copy_(pick(self.rates, row))
            else:
                group["lr"] = self.learning_rate(batch.step)
        if isinstance(row, Tensor):
            batch = batch._replace(indices=pick(self.sampler.epoch_indices, row)[:, : batch.indices.shape[1]])
        loss = self.update(batch, [pick(table, row) for table in self.draws])  # collective
        if self.average and not self.was_skipped:
            self.average.update_parameters(self.network)
        if isinstance(row, Tensor):
            self.loss_sums.index_copy_(0, row, loss.view(1))
        else:
            self.loss_sums[row] = loss

    def update(self, batch: Batch, draws: list[Tensor]) -> Tensor:
        """Train the network on a batch, with the random draws of its images, whole: [batch_size, ...]. Collective.

        Returns the sum of the global batch's losses, nats, float32 [].
        """
        scale = self.scales[batch.num_images]
        for shard in range(self.num_shards):
            warps = [values.index_select(0, batch.positions[shard]) for values in draws]
            mask = None if batch.mask is None else batch.mask[shard]
            loss = self.compute_gradient(scale, batch.indices[shard], warps, mask)
            loss = self.exchange.put(shard, loss)
        self.world.at(Phase.EXCHANGING)
        self.exchange.sum()  # collective
        self.world.at(Phase.UPDATING)
        if self.config.clip_grad_norm:
            self.world.accelerator.clip_grad_norm_(self.network.parameters(), self.config.clip_grad_norm)
        if self.scaler:
            self.scaled_step(self.scaler)
        else:
            self.optimizer.step()
        return loss

    def compute_gradient(self, scale: Tensor, indices: Tensor, warps: list[Tensor], mask: Tensor | None) -> Tensor:
        """Set the parameters' gradients to those of one shard [n]; returns the sum of its losses, nats, float32 []."""
        self.optimizer.zero_grad()
        images = self.train_split.images.index_select(0, indices) / 255  # four times as fast as [indices]
        labels = self.train_split.labels.index_select(0, indices)
        if warps:
            images = self.augmentation.warp(images, *warps)
        size = self.config.micro_batch or len(indices)
        losses = []
        for start in range(0, len(indices), size):
            piece = slice(start, start + size)
            logits = self.model(images[piece])
            loss = self.sum_losses(logits, labels[piece], None if mask is None else mask[piece])
            (self.scaler.scale(loss) if self.scaler else loss).backward(scale)
            losses.append(loss.detach())
        return losses[0] if len(losses) == 1 else torch.stack(losses).sum()

    def sum_losses(self, logits: Tensor, labels: Tensor, mask: Tensor | None) -> Tensor:
        """Cross-entropy, nats, summed over the images [n] that the mask, 1 or 0, lets count."""
        smoothing = self.config.label_smoothing
        if mask is None:
            return F.cross_entropy(logits, labels, label_smoothing=smoothing, reduction="sum")
        return (F.cross_entropy(logits, labels, label_smoothing=smoothing, reduction="none") * mask).sum()

    def scaled_step(self, scaler: torch.amp.GradScaler) -> None:
        """The optimizer's step in fp16, which the scaler skips where a gradient is not finite.

        A fused optimizer is called all the same, and skips by itself: that the scale has fallen is the only sign.
        """
        before = scaler.get_scale()
        scaler.step(self.optimizer)
        scaler.update()
        self.was_skipped = scaler.get_scale() < before

    def weights(self) -> dict[str, Tensor]:
        """The weights that evaluation uses: the moving average's where there is one."""
        return (self.average.module if self.average else self.network).state_dict()

    def is_finite(self) -> bool:
        """Whether all weights are numbers."""
        return bool(torch.stack([tensor.isfinite().all() for tensor in self.network.state_dict().values()]).all())

    def state_dict(self) -> dict[str, Any]:
        """What training goes on with: only tensors, numbers and strings, so that it loads without running code."""
        return {
            "network": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "ema": self.average.state_dict() if self.average else None,
            "scaler": self.scaler.state_dict() if self.scaler else None,
        }

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Go on with `saved`. Raises KeyError, TypeError, ValueError or RuntimeError if malformed."""
        self.network.load_state_dict(saved["network"])
        # The moments only: lr, betas and weight decay are the configuration's, which may have changed.
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": saved["optimizer"]["state"], "param_groups": groups})
        if self.average and saved["ema"]:
            self.average.load_state_dict(saved["ema"])
        elif self.average:  # the run had no average: it starts at the next update, and until then it is the weights
            self.average.module.load_state_dict(saved["network"])
        if self.scaler and saved["scaler"]:
            self.scaler.load_state_dict(saved["scaler"])


def pick(table: Tensor, row: int | Tensor) -> Tensor:
    """A row of a table; `row` is a number, or a tensor int64 [1]."""
    return table.index_select(0, row)[0] if isinstance(row, Tensor) else table[row]
