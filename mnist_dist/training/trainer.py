"""The training loop, and nothing else. Start reading here.

    for each step:  sampler -> this rank's part of a global batch
                    train_step -> loss, gradients, sum over the ranks, update      # collective
        now and then, and where an epoch ends:
                    sync -> losses; stop? save?                                    # collective
                    evaluate                                                       rank 0
                    save                                                           # collective
                    leave, if one of the ranks was asked to stop                   # collective

What all ranks must take part in is marked `# collective` and never stands under `if is_main`.
"""

import math
from dataclasses import asdict, dataclass
from typing import Any

from mnist_dist.config.schema import Config
from mnist_dist.data.dataset import Dataset, Split
from mnist_dist.data.sampler import Batch, GlobalBatchSampler, count_steps
from mnist_dist.distributed.replicas import check_replicas
from mnist_dist.distributed.watchdog import Phase
from mnist_dist.distributed.world import World
from mnist_dist.errors import NotFiniteError, RequestError, StorageError
from mnist_dist.models import build_model
from mnist_dist.run import checkpoint
from mnist_dist.run.logger import NullLogger
from mnist_dist.run.run_dir import RunDir
from mnist_dist.training.evaluation import Evaluation, evaluate
from mnist_dist.training.schedule import learning_rate
from mnist_dist.training.sync import Sync, Window
from mnist_dist.training.train_step import TrainStep

MAX_SKIPPED_IN_A_ROW = 25  # fp16: the scaler halves its scale each time, so this many mean that it found none


@dataclass
class State:
    """Where a run stands. With the tensors' states this is all that a checkpoint needs: order, augmentation and
    learning rate follow from it."""

    step: int = 0  # global batches trained on
    skipped: int = 0  # those of them whose update the fp16 scaler skipped: the schedule does not count them
    seconds: float = 0.0  # of training: evaluation and saving are not counted
    epoch_loss: float = 0.0  # sum over the images of this epoch so far, nats
    epoch_images: int = 0


class Trainer:
    """Holds what is trained and trains it."""

    def __init__(
        self, config: Config, world: World, dataset: Dataset, run_dir: RunDir, logger: NullLogger, bits: dict[str, Any]
    ) -> None:
        """`bits` is what the bits of the weights depend on, for the checkpoints."""
        self.config, self.world, self.dataset, self.run_dir, self.logger = config, world, dataset, run_dir, logger
        self.bits = bits
        self.state = State()
        num_images, batch_size, num_shards = len(dataset.train.labels), config.batch_size, config.num_shards(world.size)
        self.total_steps = count_steps(num_images, batch_size, config.epochs, config.max_steps)
        place = {"rank": world.rank, "world_size": world.size, "num_shards": num_shards}
        self.sampler = GlobalBatchSampler(
            num_images, batch_size, self.total_steps, config.seed, **place, device=world.device
        )
        self.train_split = dataset.train.to(world.device)
        self.train_step = TrainStep(config, world, self.train_split, self.sampler, self.learning_rate, logger.info)
        self.sync = Sync(world, self.train_step.loss_sums, run_dir.stop, config.checkpoint_every_s)
        if world.is_main:  # a second network for evaluation, never wrapped and never in a lower precision
            self.bare_network = build_model(config.model, config.seed).to(world.device)
            self.eval_split = dataset.eval_split.to(world.device)
        self.skipped_in_a_row = 0
        self.last_good = "none yet"  # checkpoint
        self.evaluation: Evaluation | None = None  # the latest, on rank 0

    def train(self) -> str:
        """Train until the run is finished or asked to stop. Collective.

        Returns why it stopped, in words, or the empty string where it is finished. Raises RunError.
        """
        self.check_replicas()  # collective
        self.sync.begin_window()
        for step in range(self.state.step, self.total_steps):
            batch = self.sampler.batch(step)
            self.train_step(batch)  # collective
            self.sync.add(batch)
            self.count_step()
            if not (batch.epoch_ends or self.sync.is_due()):
                continue
            window = self.sync.run(self.state.step, self.logger.failure)  # collective
            self.log_window(batch, window)
            self.check_finite(window)
            if batch.epoch_ends:
                self.evaluate(batch.epoch)  # rank 0
            if batch.epoch_ends or window.save or window.stop:
                self.save()  # collective
            if window.stop and self.state.step < self.total_steps:
                return self.who_stopped()  # collective
            self.sync.begin_window()
        return ""

    def learning_rate(self, step: int) -> float:
        """The learning rate of a step; those that were skipped do not move the schedule."""
        config, update = self.config, step - self.state.skipped
        return learning_rate(update, self.total_steps, config.lr, config.schedule, config.warmup)

    def count_step(self) -> None:
        """Note that a step was done, or skipped."""
        self.state.step += 1
        self.state.skipped += self.train_step.was_skipped
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if self.train_step.was_skipped else 0

    def log_window(self, batch: Batch, window: Window) -> None:
        """Count what was trained since the last sync, and record the steps that `log_every_steps` asks for."""
        self.state.seconds += window.seconds
        self.state.epoch_loss += window.loss_sum
        self.state.epoch_images += window.num_images
        rate = window.num_images / max(window.seconds, 1e-9)
        for step, loss in enumerate(window.losses, window.first_step):
            if step % self.config.log_every_steps == 0 or step == self.total_steps - 1:
                lr = self.learning_rate(step)
                self.logger.log_metrics("step", step=step, epoch=batch.epoch, loss=loss, lr=lr, images_per_s=rate)
        self.logger.log_progress(f"{batch.epoch + 1}/{self.config.epochs}", self.state.step, window.losses[-1], rate)

    def check_finite(self, window: Window) -> None:
        """Stop where the loss is not a number any more. Raises NotFiniteError, on all ranks: they see the same."""
        if self.world.precision == "fp16":
            if self.skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
                raise self.not_finite(self.state.step - 1, f"fp16 overflowed in {self.skipped_in_a_row} steps in a row")
            return  # the scaler looks for a scale without overflow; a loss that is lost for good comes to the above
        for step, loss in enumerate(window.losses, window.first_step):
            if not math.isfinite(loss):
                raise self.not_finite(step, f"the loss is {loss}")

    def not_finite(self, step: int, what: str) -> NotFiniteError:
        """The error that all ranks raise, and rank 0 says."""
        return NotFiniteError(
            f"{what} at step {step} (epoch {step // self.sampler.steps_per_epoch}); the last good checkpoint is "
            f"{self.last_good}; a lower lr, or clip_grad_norm, may help",
            on_every_rank=True,
        )

    def check_replicas(self) -> None:
        """Stop where a rank holds other weights than the others, and name it. Collective. Raises ReplicaError."""
        when = f"after {self.state.step} steps; the last good checkpoint is {self.last_good}"
        check_replicas(self.world, self.train_step.network, self.train_step.optimizer, when)  # collective

    def evaluate(self, epoch: int) -> None:
        """Evaluate on the eval split and report it. On rank 0; the others wait in the next collective."""
        train_loss = self.state.epoch_loss / self.state.epoch_images
        self.state.epoch_loss, self.state.epoch_images = 0.0, 0
        if not self.world.is_main:
            return
        self.world.at(Phase.EVALUATING)
        self.evaluation = self.evaluate_on(self.eval_split)
        split, step = self.dataset.eval_name, self.state.step
        self.logger.log_metrics("eval", step=step, epoch=epoch, split=split, **self.evaluation.record())
        self.logger.log_epoch(epoch, step, train_loss, split, self.evaluation, self.state.seconds)

    def evaluate_on(self, split: Split) -> Evaluation:
        """Evaluate the bare network, in fp32. On rank 0."""
        self.bare_network.load_state_dict(self.train_step.weights())
        return evaluate(self.bare_network, split)

    def save(self) -> None:
        """Write a checkpoint, on rank 0, and hear whether that went well. Collective. Raises RunError."""
        self.world.at(Phase.SAVING if self.world.is_main else Phase.WAITING)
        self.check_replicas()  # collective
        with self.world.shared_errors():  # collective
            if self.world.is_main:
                self.write_checkpoint()
        self.sync.note_save()

    def write_checkpoint(self) -> None:
        """On rank 0. Raises NotFiniteError, StorageError."""
        if not self.train_step.is_finite():
            raise self.not_finite(self.state.step - 1, "a gradient is not finite, and a weight with it,")
        folder, step, weights = self.run_dir.checkpoints, self.state.step, self.train_step.weights()
        about = {"model": self.config.model, "dataset": self.dataset.name, "step": step}
        try:
            self.last_good = str(checkpoint.save(folder, step, weights, self.state_dict(), self.config.keep, about))
        except OSError as error:
            raise StorageError(
                f"the checkpoint of step {step} could not be written: {error.strerror or error}; the last good one is "
                f"{self.last_good}"
            ) from None

    def who_stopped(self) -> str:
        """Why the ranks were asked to stop, and which of them. Collective."""
        reasons = self.world.gather(self.sync.stop_reason)  # collective
        rank, reason = next((r, text) for r, text in enumerate(reasons) if text)
        return f"{reason} ({self.world.name(rank)})" if self.world.size > 1 else reason

    def state_dict(self) -> dict[str, Any]:
        """What training goes on with: only tensors, numbers and strings, so that it loads without running code."""
        return {
            "format": 1,
            **asdict(self.state),
            **self.train_step.state_dict(),
            "config": self.config.model_dump(mode="json"),
            "dataset": self.dataset.identity(),
            "bits_depend_on": self.bits,
        }

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Go on where `saved` stands, on every rank. Raises RequestError where it is malformed."""
        try:
            self.train_step.load_state_dict(saved)
            self.state = State(int(saved["step"]), int(saved["skipped"]), float(saved["seconds"]))
            self.state.epoch_loss = float(saved.get("epoch_loss", 0))  # the first checkpoints have not got these two
            self.state.epoch_images = int(saved.get("epoch_images", 0))
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise RequestError(f"the checkpoint does not fit this run: {str(error).splitlines()[0]}") from None
