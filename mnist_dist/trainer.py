"""The training loop, and nothing else.

One step trains on one global batch: each rank takes its share of the images, DDP sums the gradients. Now and then,
about twice a second, the ranks meet in a pulse, a single small all-reduce that carries everything they must agree on:
the losses, whether to stop, whether to save, and when to meet again. What all ranks must take part in is marked
`# collective` and never stands under `if is_main`.
"""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from mnist_dist import checkpoint, stop
from mnist_dist.augment import Augmentation
from mnist_dist.config import Config
from mnist_dist.data import Dataset, Shares, Split
from mnist_dist.errors import RequestError, RunError
from mnist_dist.evaluate import Evaluation, evaluate
from mnist_dist.journal import Journal
from mnist_dist.models import build_model
from mnist_dist.schedule import learning_rate
from mnist_dist.watch import Phase
from mnist_dist.world import World

PULSE_S = 0.5  # seconds between two pulses, about: a stop is heard within it, and it costs well under 1 %
MAX_PULSE_STEPS = 2000
MAX_SKIPPED_IN_A_ROW = 25  # fp16: the scaler halves its scale each time, so this many mean that it found none


@dataclass
class State:
    """Where a run stands. With the tensors' states this is all that a checkpoint needs: order, augmentation and
    learning rate follow from it."""

    step: int = 0  # global batches trained on; the cursor is divmod(step, steps_per_epoch)
    skipped: int = 0  # those of them whose update the fp16 scaler skipped: the schedule does not count them
    seconds: float = 0.0  # of training: evaluation and saving are not counted


class Trainer:
    """Holds what is trained and trains it."""

    def __init__(self, config: Config, world: World, dataset: Dataset, run_dir: Path, journal: Journal | None) -> None:
        self.config, self.world, self.dataset, self.run_dir, self.journal = (
            config,
            world,
            dataset,
            run_dir,
            journal,
        )
        self.accelerator = world.accelerator
        self.state = State()
        self.shares = Shares(
            len(dataset.train.labels), config.batch_size, config.seed, world.rank, world.size, world.device
        )
        all_steps = config.epochs * self.shares.steps_per_epoch
        self.total_steps = min(all_steps, config.max_steps or all_steps)
        self.augmentation = Augmentation(config, world.device)
        self.train_split = dataset.train.to(world.device)

        self.network = build_model(config.model, config.seed).to(world.device)
        self.optimizer: Any = build_optimizer(config, self.network)
        self.ema = AveragedModel(self.network, multi_avg_fn=get_ema_multi_avg_fn(config.ema)) if config.ema else None
        if world.is_main:  # a second network for evaluation, never wrapped and never in a lower precision
            self.bare = build_model(config.model, config.seed).to(world.device)
            self.held_out = dataset.held_out.to(world.device)

        self.stop_reason = ""  # why this very rank wants to stop
        self.failure = ""  # why it can't go on: on rank 0, a record that could not be written
        self.scaler: torch.amp.GradScaler | None = None  # Accelerate's, for fp16
        self.losses: list[Tensor] = []  # this rank's part of each step's loss since the last pulse
        self.pulse_step = 1  # the step after which the ranks meet next
        self.skipped_in_a_row = 0
        self.saved_s = self.window_s = time.monotonic()
        self.last_good = "none yet"
        self.evaluation: Evaluation | None = None  # the latest, on rank 0

    def prepare(self) -> None:
        """Wrap model and optimizer, and only these, once a checkpoint's state is in them. Collective."""
        self.model, prepared = self.accelerator.prepare(self.network, self.optimizer)  # collective
        self.scaler = self.accelerator.scaler
        # The prepared optimizer is there for the scaler's sake, and looks for packages that are not installed at every
        # step: a tenth of a millisecond, which is a twentieth of the MLP's step.
        if self.scaler:
            self.optimizer = prepared

    def train(self) -> str:
        """Train until the run is finished or asked to stop. Collective.

        Returns why it stopped, in words, or the empty string where it is finished. Raises RunError.
        """
        steps_per_epoch = self.shares.steps_per_epoch
        self.window_s = time.monotonic()
        while self.state.step < self.total_steps:
            epoch, first = divmod(self.state.step, steps_per_epoch)
            order = self.shares.order(epoch)
            epoch_loss, epoch_images = 0.0, 0
            for step_in_epoch in range(first, steps_per_epoch):
                self.train_step(order, epoch, step_in_epoch)
                epoch_ends = step_in_epoch == steps_per_epoch - 1 or self.state.step == self.total_steps
                if self.state.step < self.pulse_step and not epoch_ends:
                    continue
                losses, stopping, save_due = self.pulse()  # collective
                counts = [self.shares.count(step) for step in range(self.state.step - len(losses), self.state.step)]
                epoch_loss += sum(loss * count for loss, count in zip(losses, counts, strict=True))
                epoch_images += sum(counts)
                self.log_steps(epoch, losses, sum(counts))
                self.check_finite(losses)
                if epoch_ends and self.world.is_main:
                    self.evaluate(epoch, epoch_loss / epoch_images)
                if epoch_ends or stopping or save_due:
                    self.save()  # collective
                if stopping and self.state.step < self.total_steps:
                    return self.who_stops()  # collective
                self.window_s = time.monotonic()
                if epoch_ends:
                    break
        return ""

    def train_step(self, order: Tensor, epoch: int, step_in_epoch: int) -> None:
        """One optimizer step on one global batch. Collective: DDP's all-reduce is in the last backward pass."""
        config, share = self.config, self.shares.cut(order, step_in_epoch)
        self.world.at(self.state.step, Phase.COMPUTING)
        images = self.train_split.images.index_select(0, share.rows) / 255  # a quarter of indexing's time
        labels = self.train_split.labels.index_select(0, share.rows)
        if self.augmentation.enabled:
            affine, knots = self.augmentation.draw(epoch, step_in_epoch, share.num_images)
            mine = share.positions.clamp(max=share.num_images - 1)
            images = self.augmentation.warp(images, affine[mine], knots[mine])
        lr = self.learning_rate(self.state.step)
        for group in self.optimizer.param_groups:
            group["lr"] = lr

        size = config.micro_batch or len(labels)
        step_loss = torch.zeros((), device=images.device)
        for start in range(0, len(labels), size):
            piece = slice(start, start + size)
            is_last = start + size >= len(labels)
            with nullcontext() if is_last else self.accelerator.no_sync(self.model):
                logits = self.model(images[piece])
                weights = None if share.weights is None else share.weights[piece]
                # Over the true size of the global batch, and times the world size, since DDP takes the mean of the
                # ranks' gradients: together that is the gradient of the global mean, the short last batch included.
                loss = self.sum_of_losses(logits, labels[piece], weights) * (self.world.size / share.num_images)
                if is_last:
                    self.world.at(self.state.step, Phase.EXCHANGING)
                (self.scaler.scale(loss) if self.scaler else loss).backward()  # collective, in the last piece
            step_loss += loss.detach()
        if config.clip_grad_norm:
            self.accelerator.clip_grad_norm_(self.model.parameters(), config.clip_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.world.precision == "fp16" and self.accelerator.optimizer_step_was_skipped:
            self.state.skipped += 1
            self.skipped_in_a_row += 1
        else:
            self.skipped_in_a_row = 0
            if self.ema:
                self.ema.update_parameters(self.network)
        self.losses.append(step_loss)
        self.state.step += 1

    def sum_of_losses(self, logits: Tensor, labels: Tensor, weights: Tensor | None) -> Tensor:
        """Cross-entropy, nats, summed over the images [n]; those of weight 0 are the sampler's repeats."""
        smoothing = self.config.label_smoothing
        if weights is None:
            return F.cross_entropy(logits, labels, label_smoothing=smoothing, reduction="sum")
        return (F.cross_entropy(logits, labels, label_smoothing=smoothing, reduction="none") * weights).sum()

    def learning_rate(self, step: int) -> float:
        """The learning rate of a step; those that were skipped do not move the schedule."""
        config, update = self.config, step - self.state.skipped
        return learning_rate(update, self.total_steps, config.lr, config.schedule, config.warmup)

    def pulse(self) -> tuple[list[float], bool, bool]:
        """Meet the other ranks: the global mean loss of each step since the last pulse, stop?, save? Collective."""
        self.world.at(self.state.step, Phase.MEETING)
        losses = torch.stack(self.losses).double().cpu() / self.world.size  # on a GPU: the one point that waits for it
        now = time.monotonic()
        elapsed, steps = now - self.window_s, len(self.losses)
        self.losses.clear()
        every_s = self.config.checkpoint_every_s
        is_main = self.world.is_main
        self.stop_reason = self.failure or stop.reason(self.run_dir if is_main else None)
        votes = torch.tensor(
            [
                bool(self.stop_reason),
                is_main and every_s > 0 and now - self.saved_s >= every_s,
                # Rank 0's clock alone decides when to meet again: the ranks' own clocks would not agree.
                is_main and min(max(int(PULSE_S * steps / max(elapsed, 1e-9)), 1), MAX_PULSE_STEPS),
            ],
            dtype=torch.float64,
        )
        agreed = torch.cat((votes, losses))
        if self.world.size > 1:
            dist.all_reduce(agreed)  # collective
        stop_votes, save_due, interval, *means = agreed.tolist()
        self.pulse_step = self.state.step + int(interval)
        self.state.seconds += elapsed
        return means, stop_votes > 0, save_due > 0

    def log_steps(self, epoch: int, losses: list[float], num_images: int) -> None:
        """Record the steps since the last pulse that `log_every_steps` asks for."""
        journal = self.journal
        if not journal:
            return
        first = self.state.step - len(losses)
        elapsed = max(time.monotonic() - self.window_s, 1e-9)
        rate = num_images / elapsed
        with self.keeping_record():
            for step, loss in enumerate(losses, first):
                if step % self.config.log_every_steps == 0 or step == self.total_steps - 1:
                    lr = self.learning_rate(step)
                    journal.record("step", step=step, epoch=epoch, loss=loss, lr=lr, images_per_s=rate)
            journal.progress(epoch, self.config.epochs, self.state.step, self.total_steps, losses[-1], rate)

    @contextmanager
    def keeping_record(self) -> Iterator[None]:
        """Where the record can't be written, rank 0 asks all ranks to stop at the next pulse, which saves first."""
        try:
            yield
        except OSError as error:
            self.failure = self.failure or f"{error.filename} could not be written: {error.strerror or error}"

    def check_failure(self) -> None:
        """Raises RunError on the rank that could not go on."""
        if self.failure:
            raise RunError(f"{self.failure}; the last good checkpoint is {self.last_good}")

    def check_finite(self, losses: list[float]) -> None:
        """Stop every rank where the loss is not a number any more: they all see the same losses."""
        if self.world.precision == "fp16":
            if self.skipped_in_a_row < MAX_SKIPPED_IN_A_ROW:
                return
            self.end_badly(self.state.step - 1, f"fp16 overflowed in {self.skipped_in_a_row} steps in a row")
        for step, loss in enumerate(losses, self.state.step - len(losses)):
            if not math.isfinite(loss):
                self.end_badly(step, f"the loss is {loss}")

    def end_badly(self, step: int, what: str) -> None:
        """Leave, on every rank; rank 0 says why."""
        epoch = step // self.shares.steps_per_epoch
        if not self.world.is_main:
            raise SystemExit(1)
        raise RunError(
            f"{what} at step {step} (epoch {epoch}); the last good checkpoint is {self.last_good}; "
            "a lower lr, or clip_grad_norm, may help"
        )

    def evaluate(self, epoch: int, train_loss: float) -> None:
        """Evaluate on the held-out images and report it. Rank 0 only; the others wait in the next collective."""
        self.world.at(self.state.step, Phase.EVALUATING)
        self.evaluation = self.evaluate_on(self.held_out)
        split = self.dataset.held_out_name
        if journal := self.journal:
            with self.keeping_record():
                journal.record("eval", step=self.state.step, epoch=epoch, split=split, **self.evaluation.record())
                journal.epoch(epoch, self.state.step, train_loss, split, self.evaluation, self.state.seconds)

    def evaluate_on(self, split: Split) -> Evaluation:
        """Evaluate the bare network, in fp32. Rank 0 only."""
        self.bare.load_state_dict(self.weights())
        return evaluate(self.bare, split)

    def weights(self) -> dict[str, Tensor]:
        """The weights that evaluation uses: the moving average's where there is one."""
        return (self.ema.module if self.ema else self.network).state_dict()

    def save(self) -> None:
        """Write a checkpoint, on rank 0, and hear whether that went well. Collective."""
        self.world.at(self.state.step, Phase.SAVING if self.world.is_main else Phase.WAITING)
        self.world.together(self._save if self.world.is_main else lambda: None)  # collective
        self.saved_s = time.monotonic()

    def _save(self) -> None:
        if not all(bool(t.isfinite().all()) for t in self.network.state_dict().values()):
            self.end_badly(self.state.step - 1, "a gradient is not finite, and a weight with it,")
        folder, state = self.run_dir / "checkpoints", self.state
        try:
            self.last_good = str(
                checkpoint.save(folder, state.step, self.weights(), self.state_dict(), self.config.keep)
            )
        except OSError as error:
            raise RunError(
                f"the checkpoint of step {state.step} could not be written: {error.strerror or error}; the last good "
                f"one is {self.last_good}"
            ) from None

    def who_stops(self) -> str:
        """Why the ranks were asked to stop, and which of them. Collective."""
        reasons = self.world.gather(self.stop_reason)  # collective
        rank, reason = next((r, text) for r, text in enumerate(reasons) if text)
        return f"{reason} (rank {rank} on {self.world.members[rank].host})" if self.world.size > 1 else reason

    def state_dict(self) -> dict[str, Any]:
        """What training goes on with: only tensors, numbers and strings, so that it loads without running code."""
        return {
            "format": 1,
            "step": self.state.step,
            "skipped": self.state.skipped,
            "seconds": self.state.seconds,
            "network": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "ema": self.ema.state_dict() if self.ema else None,
            "scaler": self.scaler.state_dict() if self.scaler else None,
            "config": self.config.model_dump(mode="json"),
            "dataset": {"name": self.dataset.name, "fingerprint": self.dataset.fingerprint},
        }

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Go on where `saved` stands; before `prepare`, on every rank. Raises RequestError where it is malformed."""
        try:
            self.network.load_state_dict(saved["network"])
            # The moments only: lr, betas and weight decay are the configuration's, which may have changed.
            groups = self.optimizer.state_dict()["param_groups"]
            self.optimizer.load_state_dict({"state": saved["optimizer"]["state"], "param_groups": groups})
            if self.ema and saved["ema"]:  # a run that had no average starts it at its first update
                self.ema.load_state_dict(saved["ema"])
            if self.accelerator.scaler and saved["scaler"]:
                self.accelerator.scaler.load_state_dict(saved["scaler"])
            self.state = State(int(saved["step"]), int(saved["skipped"]), float(saved["seconds"]))
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise RequestError(f"the checkpoint does not fit this run: {str(error).splitlines()[0]}") from None
        self.pulse_step = self.state.step + 1


def build_optimizer(config: Config, network: torch.nn.Module) -> Optimizer:
    """The configured optimizer, fused: one kernel for all parameters."""
    parameters, lr, decay = network.parameters(), config.lr, config.weight_decay
    if config.optimizer == "sgd":
        momentum = config.momentum
        return SGD(parameters, lr, momentum=momentum, nesterov=momentum > 0, weight_decay=decay, fused=True)
    cls = Adam if config.optimizer == "adam" else AdamW
    return cls(parameters, lr, betas=(config.momentum, config.beta2), weight_decay=decay, fused=True)
