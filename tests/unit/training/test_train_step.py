"""A step, and its replay: what a CUDA graph would do, with a capture that only remembers the function."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from mnist_dist.config.schema import Config
from mnist_dist.data.dataset import Shares, Split
from mnist_dist.distributed.world import join
from mnist_dist.training.cuda_graph import WARM_UP_CALLS, Replayed
from mnist_dist.training.train_step import Learner, build_optimizer

NUM_IMAGES, BATCH_SIZE = 100, 16  # seven steps an epoch, the last of four images


def remember(function: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
    """In place of a CUDA graph: runs the function again, on the same inputs, into the same result."""
    result = torch.full((), float("nan"))
    return lambda: result.copy_(function()) and None, result


@pytest.fixture(autouse=True)
def _threads() -> object:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def train(config: Config, *, replay: bool) -> tuple[list[float], dict[str, Tensor]]:
    """Two epochs; returns the losses and the weights."""
    world = join(config)
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (NUM_IMAGES, 28, 28), dtype=torch.uint8, generator=generator)
    labels = torch.randint(0, 10, (NUM_IMAGES,), generator=generator)
    learner = Learner(config, world, Split(images, labels).to(world.device), pytest.fail)
    if replay:
        learner.replayed = Replayed(learner.update, pytest.fail, capture=remember)
        learner.optimizer = build_optimizer(config, learner.network, graph=True)
    learner.prepare()
    shares = Shares(NUM_IMAGES, BATCH_SIZE, config.seed, 0, 1, world.device)
    losses = []
    for epoch in range(2):
        order = shares.order(epoch)
        for step in range(shares.steps_per_epoch):
            losses.append(float(learner.learn(shares.cut(order, step), epoch, step, lr=1e-3 * (1 + step))))
    return losses, learner.network.state_dict()


@pytest.mark.parametrize(
    "settings",
    [
        {"optimizer": "adam"},
        {"optimizer": "adamw", "micro_batch": 5, "clip_grad_norm": 1.0},
        {"optimizer": "sgd", "ema": 0.9},
        {"shift": 2.0, "rotate": 10.0, "elastic": 1.0},
    ],
)
def test_replayed_steps_are_the_steps(settings: dict[str, object]) -> None:
    config = Config(model="mlp", batch_size=BATCH_SIZE, precision="no", threads=1, graph="off", **settings)  # type: ignore[arg-type]
    losses, weights = train(config, replay=False)
    replayed_losses, replayed_weights = train(config, replay=True)
    assert replayed_losses == pytest.approx(losses, rel=1e-6)  # the learning rate is a tensor there, in fp32
    for name, weight in weights.items():
        torch.testing.assert_close(replayed_weights[name], weight, rtol=0, atol=1e-4)


def test_the_average_is_torchs_own() -> None:
    config = Config(model="mlp", precision="no", threads=1, graph="off", ema=0.9)
    world = join(config)
    empty = Split(torch.zeros(0, 28, 28), torch.zeros(0, dtype=torch.int64)).to(world.device)
    learner = Learner(config, world, empty, pytest.fail)
    reference = AveragedModel(learner.network, multi_avg_fn=get_ema_multi_avg_fn(config.ema))
    assert learner.ema
    for _ in range(3):
        with torch.no_grad():
            for parameter in learner.network.parameters():
                parameter += 1
        learner.update_average(learner.ema)
        reference.update_parameters(learner.network)
    for name, value in reference.state_dict().items():
        assert torch.equal(learner.ema.state_dict()[name], value), name


def test_a_replay_reads_what_it_is_given() -> None:
    calls = []

    def function(x: Tensor, y: Tensor) -> Tensor:
        calls.append((x, y))
        return (x * y).sum()

    replayed = Replayed(function, pytest.fail, capture=remember)
    results = [float(replayed(torch.tensor([float(i)]), torch.tensor([2.0]))) for i in range(WARM_UP_CALLS + 3)]
    assert results == [2.0 * i for i in range(WARM_UP_CALLS + 3)]
    assert calls[-1][0] is calls[-2][0]  # a tensor of its own, the same at each replay


@pytest.mark.parametrize("ends_badly", [False, True])
def test_a_capture_that_fails_is_said_once_and_does_without(ends_badly: bool) -> None:
    said: list[str] = []

    def fail(_: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        try:
            raise RuntimeError("operation not permitted when stream is capturing\nC++ stack")
        finally:
            if ends_badly:  # as CUDAGraph.capture_end does where the capture was invalidated
                raise RuntimeError("operation failed due to a previous error during capture")

    replayed = Replayed(lambda x: x + 1, said.append, capture=fail)
    assert [int(replayed(torch.tensor(i))) for i in range(8)] == list(range(1, 9))
    assert said == [
        "note: the step could not be captured as a CUDA graph: operation not permitted when stream is capturing"
    ]
