"""What the tests of a step share."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from mnist_dist.config.schema import Config
from mnist_dist.data.dataset import Split
from mnist_dist.data.sampler import GlobalBatchSampler
from mnist_dist.distributed.launch_env import LaunchEnv
from mnist_dist.distributed.setup import init_distributed
from mnist_dist.training.cuda_graph import StepGraphs
from mnist_dist.training.optimizer import build_optimizer
from mnist_dist.training.train_step import TrainStep

NUM_IMAGES, BATCH_SIZE = 100, 16  # seven steps an epoch, the last of four images


def make_config(**settings: Any) -> Config:
    return Config(**{"model": "mlp", "batch_size": BATCH_SIZE, "precision": "fp32", "threads": 1} | settings)


def make_split() -> Split:
    """Images and labels that are noise."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (NUM_IMAGES, 28, 28), dtype=torch.uint8, generator=generator)
    return Split(images, torch.randint(0, 10, (NUM_IMAGES,), generator=generator))


def make_step(config: Config, *, replay: bool = False, build: Callable[..., TrainStep] = TrainStep) -> TrainStep:
    """A step of one rank on the CPU, at a learning rate that changes; with `replay` as it would be in a graph."""
    world = init_distributed(config, LaunchEnv(use_cpu=True))
    step = build(config, world, make_split(), make_sampler(config), lambda n: 1e-3 * (1 + n % 7), pytest.fail)
    if replay:
        step.graphs = StepGraphs(world, pytest.fail, capture=remember)
        step.optimizer = build_optimizer(config, step.network, in_graph=True, precision="fp32")
    return step


def make_sampler(config: Config) -> GlobalBatchSampler:
    """The batches of one rank."""
    place = {"rank": 0, "world_size": 1, "num_shards": config.num_shards(1)}
    return GlobalBatchSampler(
        NUM_IMAGES, config.batch_size, total_steps=10**9, seed=config.seed, **place, device=torch.device("cpu")
    )


def train(step: TrainStep, steps: range) -> list[float]:
    """Train some steps; returns the sums of the losses."""
    losses = []
    for number in steps:
        batch = step.sampler.batch(number)
        step(batch)
        losses.append(float(step.loss_sums[batch.step_in_epoch]))
    return losses


def remember(function: Callable[[], None]) -> Callable[[], None]:
    """In place of a CUDA graph: what is replayed is the function as it was at the capture, which does not run it."""
    return function


def keep_threads() -> Iterator[None]:
    """For a fixture: the number of threads is as it was after the test."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
