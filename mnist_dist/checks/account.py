"""A run that keeps an account of itself: hashes of what went into each step and came out of it, on each rank.

It is the real training loop on drawn digits, with the bits of N ranks on any number of them, so that each number can
be compared: a rank's with the other ranks', the ranks' together with one rank's alone.
"""

import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from mnist_dist.config.schema import Config
from mnist_dist.data.dataset import Dataset, Split
from mnist_dist.data.synthetic import draw_digits
from mnist_dist.distributed.world import World
from mnist_dist.run.logger import NullLogger
from mnist_dist.run.run_dir import RunDir
from mnist_dist.tensors import tensor_bytes
from mnist_dist.training.exchange import Exchange, add_along_tree
from mnist_dist.training.trainer import Trainer

Hashes = dict[str, str]  # of each parameter, or of its gradient
LOSS = "the loss"  # the first number of a flat vector


@dataclass
class Step:
    """One step on one rank."""

    images: list[list[int]] = field(default_factory=list)  # of each of its shards, in order; repeats left out
    gradients: list[Hashes] = field(default_factory=list)  # of each of its shards, before the exchange
    partial: Hashes = field(default_factory=dict)  # the sum of its own shards
    total: Hashes = field(default_factory=dict)  # the sum over all ranks
    weights: Hashes = field(default_factory=dict)  # after the step
    loss: float = 0.0  # nats
    compute_s: float = 0.0  # forward and backward


@dataclass
class Account:
    """A run on one rank."""

    first_weights: Hashes = field(default_factory=dict)
    steps: list[Step] = field(default_factory=list)
    counts: list[list[int]] = field(default_factory=list)  # images of each true class that each evaluation counted
    error: str = ""  # with which the run ended


class AloneWorld(World):
    """One rank of several that trains for itself."""

    @property
    def rank(self) -> int:
        """It is the main one."""
        return 0

    @property
    def size(self) -> int:
        """It is alone."""
        return 1


def alone(world: World) -> AloneWorld:
    """The world of this rank without the others."""
    return AloneWorld(world.accelerator, [world.members[world.rank]], world.precision, [], None)


def draw_small_dataset(num_train: int, num_test: int) -> Dataset:
    """Drawn digits, the same on every host."""
    train, test = Split(*draw_digits(num_train, seed=0)), Split(*draw_digits(num_test, seed=1))
    return Dataset("synthetic", f"{num_train} and {num_test} drawn digits", train, test, "test")


class AccountingExchange(Exchange):
    """The exchange, with hashes of what goes in and comes out."""

    def __init__(self, names: list[str], *arguments: Any, **options: Any) -> None:
        """`names` are the parameters'; the rest is Exchange's."""
        super().__init__(*arguments, **options)
        self.names = names
        self.step = Step()

    def put(self, shard: int, loss: Tensor) -> Tensor:
        """As Exchange does."""
        result = super().put(shard, loss)
        if self.is_needed:
            self.step.gradients.append(self.hash_vector(shard))
        return result

    def sum(self) -> None:
        """As Exchange does. Collective."""
        if not self.is_needed:
            return
        kept = self.vectors.clone()
        add_along_tree(self.vectors)
        self.step.partial = self.hash_vector(0)
        self.vectors.copy_(kept)
        self.exchange()  # collective
        self.step.total = self.hash_vector(0)

    def exchange(self) -> None:
        """The exchange itself. Collective."""
        super().sum()

    def hash_vector(self, shard: int) -> Hashes:
        """Hashes of a flat vector's parts."""
        parts = [self.losses[shard], *self.gradients[shard]]
        return {name: hash_bits(part) for name, part in zip([LOSS, *self.names], parts, strict=True)}


class AccountingTrainer(Trainer):
    """The trainer, with an account; it can be asked to stop after some steps."""

    def __init__(
        self, config: Config, world: World, dataset: Dataset, folder: Path, *, stop_after: int | None = None
    ) -> None:
        """`folder` is for checkpoints; only rank 0's is used."""
        super().__init__(config, world, dataset, RunDir(folder), NullLogger(), {})
        self.account, self.stop_after = Account(), stop_after
        network = self.train_step.network
        names = [name for name, _ in network.named_parameters()]
        self.exchange = AccountingExchange(
            names,
            list(network.parameters()),
            num_shards=self.train_step.num_shards,
            world_size=world.size,
            fixed_tree=bool(config.bit_exact),
        )
        self.train_step.exchange = self.exchange
        self.compute_gradient: Callable[..., Tensor] = self.train_step.compute_gradient
        self.train_step.compute_gradient = self.time_gradient  # type: ignore[method-assign, assignment]

    def train(self) -> str:
        """As Trainer does. Collective."""
        self.account.first_weights = self.hash_weights()
        return super().train()  # collective

    def time_gradient(self, *arguments: Any) -> Tensor:
        """Time what a rank does by itself."""
        began_s = time.perf_counter()
        loss = self.compute_gradient(*arguments)
        self.exchange.step.compute_s += time.perf_counter() - began_s
        return loss

    def count_step(self) -> None:
        """Close the account of a step."""
        batch = self.sampler.batch(self.state.step)
        super().count_step()
        step = self.exchange.step
        step.weights = self.hash_weights()
        step.loss = float(self.train_step.loss_sums[batch.step_in_epoch]) / batch.num_images
        is_real = batch.positions < batch.num_images
        rows = zip(batch.indices.cpu(), is_real.cpu(), strict=True)
        step.images = [row[real].tolist() for row, real in rows]
        self.account.steps.append(step)
        self.exchange.step = Step()
        if self.state.step == self.stop_after and self.world.is_main:
            self.run_dir.stop.touch()
        self.sync.steps_to_next = 1  # so that a stop is heard at once

    def evaluate(self, epoch: int) -> None:
        """As Trainer does, and note what was counted. On rank 0."""
        super().evaluate(epoch)
        if self.evaluation:
            self.account.counts.append(self.evaluation.confusion.sum(1).tolist())

    def hash_weights(self) -> Hashes:
        """Hashes of all parameters."""
        return {name: hash_bits(weight) for name, weight in self.train_step.network.named_parameters()}


def hash_bits(tensor: Tensor) -> str:
    """A hash of a tensor's bits."""
    return hashlib.blake2b(tensor_bytes(tensor), digest_size=6).hexdigest()
