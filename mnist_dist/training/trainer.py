"""The training loop, and nothing else.

One step trains on one global batch: each rank takes its share of the images, DDP sums the gradients. Now and then,
about twice a second, the ranks meet in a pulse, a single small all-reduce that carries everything they must agree on:
the losses, whether to stop, whether to save, and when to meet again. What all ranks must take part in is marked
`# collective` and never stands under `if is_main`.
"""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mnist_dist.config.schema import Config
from mnist_dist.data.dataset import Dataset, Shares, Split
from mnist_dist.distributed.watchdog import Phase
from mnist_dist.distributed.world import World
from mnist_dist.errors import RequestError, RunError
from mnist_dist.models import build_model
from mnist_dist.run import checkpoint, stop
from mnist_dist.run.logger import Journal
from mnist_dist.training.evaluation import Evaluation, evaluate
from mnist_dist.training.schedule import learning_rate
from mnist_dist.training.train_step import Learner

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
    epoch_loss: float = 0.0  # sum over the images of this epoch so far, nats
    epoch_images: int = 0


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
        self.state = State()
        self.shares = Shares(
            len(dataset.train.labels), config.batch_size, config.seed, world.rank, world.size, world.device
        )
        all_steps = config.epochs * self.shares.steps_per_epoch
        self.total_steps = min(all_steps, config.max_steps or all_steps)
        self.train_split = dataset.train.to(world.device)
        self.learner = Learner(config, world, self.train_split, journal.say if journal else lambda _: None)
        if world.is_main:  # a second network for evaluation, never wrapped and never in a lower precision
            self.bare = build_model(config.model, config.seed).to(world.device)
            self.held_out = dataset.held_out.to(world.device)

        self.stop_reason = ""  # why this very rank wants to stop
        self.failure = ""  # why it can't go on: on rank 0, a record that could not be written
        # Sums over this rank's images, of each step since the last pulse. Not a list of tensors: small ones that live
        # on between large ones that come and go would tear the heap apart.
        self.losses = torch.zeros(MAX_PULSE_STEPS, device=world.device)
        self.num_losses = 0
        self.pulse_step = 1  # the step after which the ranks meet next
        self.skipped_in_a_row = 0
        self.saved_s = self.window_s = time.monotonic()
        self.last_good = "none yet"
        self.evaluation: Evaluation | None = None  # the latest, on rank 0

    def train(self) -> str:
        """Train until the run is finished or asked to stop. Collective.

        Returns why it stopped, in words, or the empty string where it is finished. Raises RunError.
        """
        steps_per_epoch = self.shares.steps_per_epoch
        self.window_s = time.monotonic()
        while self.state.step < self.total_steps:
            epoch, first = divmod(self.state.step, steps_per_epoch)
            order = self.shares.order(epoch)
            for step_in_epoch in range(first, steps_per_epoch):
                self.train_step(order, epoch, step_in_epoch)
                epoch_ends = step_in_epoch == steps_per_epoch - 1 or self.state.step == self.total_steps
                if self.state.step < self.pulse_step and not epoch_ends:
                    continue
                losses, stopping, save_due = self.pulse()  # collective
                counts = [self.shares.count(step) for step in range(self.state.step - len(losses), self.state.step)]
                self.state.epoch_loss += sum(loss * count for loss, count in zip(losses, counts, strict=True))
                self.state.epoch_images += sum(counts)
                self.log_steps(epoch, losses, sum(counts))
                self.check_finite(losses)
                if epoch_ends:
                    train_loss = self.state.epoch_loss / self.state.epoch_images
                    self.state.epoch_loss, self.state.epoch_images = 0.0, 0
                    if self.world.is_main:
                        self.evaluate(epoch, train_loss)
                if epoch_ends or stopping or save_due:
                    self.save()  # collective
                if stopping and self.state.step < self.total_steps:
                    return self.who_stops()  # collective
                self.window_s = time.monotonic()
                if epoch_ends:
                    break
        return ""

    def train_step(self, order: Tensor, epoch: int, step_in_epoch: int) -> None:
        """One optimizer step on one global batch. Collective."""
        self.world.at(Phase.COMPUTING, self.state.step)
        share = self.shares.cut(order, step_in_epoch)
        lr = self.learning_rate(self.state.step)
        self.losses[self.num_losses] = self.learner.learn(share, epoch, step_in_epoch, lr)
        self.num_losses += 1
        if self.learner.was_skipped():
            self.state.skipped += 1
            self.skipped_in_a_row += 1
        else:
            self.skipped_in_a_row = 0
        self.state.step += 1

    def learning_rate(self, step: int) -> float:
        """The learning rate of a step; those that were skipped do not move the schedule."""
        config, update = self.config, step - self.state.skipped
        return learning_rate(update, self.total_steps, config.lr, config.schedule, config.warmup)

    def pulse(self) -> tuple[list[float], bool, bool]:
        """Meet the other ranks: the global mean loss of each step since the last pulse, stop?, save? Collective."""
        self.world.at(Phase.MEETING, self.state.step)
        steps, self.num_losses = self.num_losses, 0
        losses = self.losses[:steps].double().cpu()  # on a GPU: the one point that waits for it
        now = time.monotonic()
        elapsed = now - self.window_s
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
        stop_votes, save_due, interval, *sums = agreed.tolist()
        first = self.state.step - steps
        means = [total / self.shares.count(step) for step, total in enumerate(sums, first)]
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
        self.world.at(Phase.EVALUATING)
        self.evaluation = self.evaluate_on(self.held_out)
        split = self.dataset.held_out_name
        if journal := self.journal:
            with self.keeping_record():
                journal.record("eval", step=self.state.step, epoch=epoch, split=split, **self.evaluation.record())
                journal.epoch(epoch, self.state.step, train_loss, split, self.evaluation, self.state.seconds)

    def evaluate_on(self, split: Split) -> Evaluation:
        """Evaluate the bare network, in fp32. Rank 0 only."""
        self.bare.load_state_dict(self.learner.weights())
        return evaluate(self.bare, split)

    def save(self) -> None:
        """Write a checkpoint, on rank 0, and hear whether that went well. Collective."""
        self.world.at(Phase.SAVING if self.world.is_main else Phase.WAITING)
        self.world.together(self._save if self.world.is_main else lambda: None)  # collective
        self.saved_s = time.monotonic()

    def _save(self) -> None:
        if not self.learner.is_finite():
            self.end_badly(self.state.step - 1, "a gradient is not finite, and a weight with it,")
        folder, state = self.run_dir / "checkpoints", self.state
        try:
            self.last_good = str(
                checkpoint.save(folder, state.step, self.learner.weights(), self.state_dict(), self.config.keep)
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
            **asdict(self.state),
            **self.learner.state_dict(),
            "config": self.config.model_dump(mode="json"),
            "dataset": {"name": self.dataset.name, "fingerprint": self.dataset.fingerprint},
        }

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Go on where `saved` stands; before `prepare`, on every rank. Raises RequestError where it is malformed."""
        try:
            self.learner.load_state_dict(saved)
            self.state = State(
                int(saved["step"]),
                int(saved["skipped"]),
                float(saved["seconds"]),
                float(saved.get("epoch_loss", 0)),  # the first checkpoints of this format have not got these two
                int(saved.get("epoch_images", 0)),
            )
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise RequestError(f"the checkpoint does not fit this run: {str(error).splitlines()[0]}") from None
        self.pulse_step = self.state.step + 1
