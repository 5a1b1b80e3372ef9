"""The faults that `verify` plants in a copy of a run, on one rank at one step, to show that it would notice them."""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mnist_dist.checks.account import AccountingTrainer
from mnist_dist.models import build_model
from mnist_dist.training.exchange import add_along_tree

SLOWER = 10  # times


class Fault(NamedTuple):
    """A fault, and what it is to be found as."""

    words: str
    plant: Callable[[AccountingTrainer, int], None]  # takes the trainer of the faulty rank, and the step
    findings: tuple[str, ...]
    needs_ranks: bool  # more than one
    on_rank_0: bool = False


def take_images_of_another(trainer: AccountingTrainer, _step: int) -> None:
    """The rank takes its neighbour's shards."""
    sampler, size = trainer.sampler, trainer.sampler.mine.stop - trainer.sampler.mine.start
    start = (sampler.mine.start + size) % sampler.num_replicas
    sampler.mine, sampler.filled_epoch = slice(start, start + size), -1


def skip_exchange(trainer: AccountingTrainer, step: int) -> None:
    """The rank takes part in a sum, and goes on with its own part of it."""
    exchange = trainer.exchange.exchange

    def skip() -> None:
        kept = trainer.exchange.vectors.clone()
        exchange()  # collective
        if trainer.state.step == step:
            trainer.exchange.vectors.copy_(kept)
            add_along_tree(trainer.exchange.vectors)

    trainer.exchange.exchange = skip  # type: ignore[method-assign]


def flip_weight(trainer: AccountingTrainer, step: int) -> None:
    """A bit of a weight flips after a step."""
    count_step = trainer.count_step

    def flip() -> None:
        if trainer.state.step == step:
            flip_low_bit(next(iter(trainer.train_step.network.parameters())).detach())
        count_step()

    trainer.count_step = flip  # type: ignore[method-assign]


def flip_gradient(trainer: AccountingTrainer, step: int) -> None:
    """A bit of a gradient flips before the exchange."""
    compute = trainer.compute_gradient

    def flip(*arguments: Any) -> Tensor:
        loss = compute(*arguments)
        if trainer.state.step == step:
            gradient = list(trainer.train_step.network.parameters())[-1].grad
            assert gradient is not None
            flip_low_bit(gradient)
        return loss

    trainer.compute_gradient = flip


def forget_set_epoch(trainer: AccountingTrainer, _step: int) -> None:
    """The rank uses the first epoch's order again."""
    order = trainer.sampler.order
    trainer.sampler.order = lambda epoch: order(0 * epoch)  # type: ignore[method-assign]


def take_another_seed(trainer: AccountingTrainer, _step: int) -> None:
    """The rank begins with other weights."""
    other = build_model(trainer.config.model, trainer.config.seed + 1)
    trainer.train_step.network.load_state_dict(other.state_dict())


def garble_exchange(trainer: AccountingTrainer, step: int) -> None:
    """The rank gets a sum of which one number is another."""
    exchange = trainer.exchange.exchange

    def garble() -> None:
        exchange()  # collective
        if trainer.state.step == step:
            flip_low_bit(trainer.exchange.gradients[0][-1])

    trainer.exchange.exchange = garble  # type: ignore[method-assign]


def count_twice(trainer: AccountingTrainer, _step: int) -> None:
    """Evaluation counts an image twice."""
    split = trainer.eval_split
    trainer.eval_split = split._replace(
        images=torch.cat((split.images, split.images[:1])), labels=torch.cat((split.labels, split.labels[:1]))
    )


def be_slow(trainer: AccountingTrainer, _step: int) -> None:
    """The rank takes ten times as long for what it does alone."""
    compute = trainer.compute_gradient

    def wait(*arguments: Any) -> Tensor:
        began_s = time.perf_counter()
        loss = compute(*arguments)
        time.sleep(SLOWER * (time.perf_counter() - began_s))
        return loss

    trainer.compute_gradient = wait


def flip_low_bit(tensor: Tensor) -> None:
    """Flip the lowest bit of a tensor's first number, fp32: a change that no loss shows."""
    tensor[(0,) * tensor.dim()].view(torch.int32).bitwise_xor_(1)


FAULTS = (
    Fault("a rank trains on another's images", take_images_of_another, ("images.of_another",), needs_ranks=True),
    Fault("a rank skips an exchange", skip_exchange, ("exchange.skipped",), needs_ranks=True),
    Fault("a bit of a weight flips", flip_weight, ("weights.differ",), needs_ranks=False),
    Fault("a bit of a gradient flips", flip_gradient, ("gradient.differs",), needs_ranks=False),
    Fault("a rank does not call set_epoch", forget_set_epoch, ("order.repeats",), needs_ranks=False),
    Fault("a rank has another seed", take_another_seed, ("start.differs",), needs_ranks=False),
    Fault("an exchange gives garbage", garble_exchange, ("exchange.garbage",), needs_ranks=True),
    Fault("evaluation counts an image twice", count_twice, ("evaluation.not_once",), needs_ranks=False, on_rank_0=True),
    Fault("a rank is ten times slower", be_slow, ("rank.slow",), needs_ranks=True),
)
