"""The sum over shards and ranks: along one tree, so that it has the same bits at any number of ranks."""

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from mnist_dist.models import build_model
from mnist_dist.training.exchange import Exchange, add_along_tree
from tests.conftest import FORKS


def uneven(*shape: int, seed: int = 0) -> Tensor:
    """Numbers of very different size and either sign, whose sum depends on the order of adding."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator) * 10 ** torch.empty(shape).uniform_(-4, 4, generator=generator)


def tree(terms: list[Tensor]) -> Tensor:
    """The sum of both halves' sums, written down anew."""
    half = len(terms) // 2
    return terms[0] if len(terms) == 1 else tree(terms[:half]) + tree(terms[half:])


def test_four_vectors_are_added_as_two_pairs() -> None:
    vectors = uneven(4, 1000)
    a, b, c, d = vectors.clone()
    expected = (a + b) + (c + d)
    assert torch.equal(add_along_tree(vectors), expected)
    assert not torch.equal(expected, ((a + b) + c) + d)  # another order would have been noticed
    assert not torch.equal(expected, (a + c) + (b + d))


@pytest.mark.parametrize("count", [1, 2, 4, 8, 16, 64])
def test_vectors_are_added_along_a_binary_tree_into_the_first(count: int) -> None:
    vectors = uneven(count, 500)
    expected = tree(list(vectors.clone()))
    total = add_along_tree(vectors)
    assert torch.equal(total, expected)
    assert total.data_ptr() == vectors.data_ptr()


@pytest.mark.parametrize(("count", "ranks"), [(8, 2), (8, 4), (8, 8), (16, 4)])
def test_a_ranks_own_shards_are_a_whole_subtree(count: int, ranks: int) -> None:
    vectors = uneven(count, 500)
    of_ranks = torch.stack([add_along_tree(part.clone()) for part in vectors.view(ranks, count // ranks, 500)])
    assert torch.equal(add_along_tree(of_ranks), add_along_tree(vectors))


def set_gradients(parameters: list[Tensor], seed: int) -> None:
    for number, parameter in enumerate(parameters):
        gradient = torch.empty_like(parameter)  # in its strides
        parameter.grad = gradient.copy_(uneven(*parameter.shape, seed=100 * seed + number))


def gradients(parameters: list[Tensor]) -> list[Tensor]:
    return [p.grad.clone() for p in parameters if p.grad is not None]


@pytest.mark.parametrize("fixed_tree", [False, True])
def test_a_lone_shard_of_a_lone_rank_needs_no_vectors(fixed_tree: bool) -> None:
    parameters = list(build_model("cnn", seed=0).parameters())
    exchange = Exchange(parameters, num_shards=1, world_size=1, fixed_tree=fixed_tree)
    assert not exchange.is_needed
    assert not hasattr(exchange, "vectors")
    set_gradients(parameters, seed=0)
    before = [p.grad for p in parameters]
    loss = torch.tensor(1.5)
    assert exchange.put(0, loss) is loss
    exchange.sum()
    assert all(p.grad is gradient for p, gradient in zip(parameters, before, strict=True))


@pytest.mark.parametrize("name", ["mlp", "cnn"])  # the CNN's convolutions lie in memory channels last
def test_two_shards_of_one_rank_are_summed_into_views_like_the_parameters(name: str) -> None:
    parameters = list(build_model(name, seed=0).parameters())
    exchange = Exchange(parameters, num_shards=2, world_size=1, fixed_tree=True)
    expected: list[Tensor] = []
    for repetition in range(2):  # the vectors are used again
        terms = []
        for shard in range(2):
            set_gradients(parameters, seed=10 * repetition + shard)
            terms.append(gradients(parameters))
            loss = exchange.put(shard, torch.tensor(float(1 + shard)))
        exchange.sum()
        assert loss == 3
        expected = [a + b for a, b in zip(*terms, strict=True)]
        for parameter, total in zip(parameters, expected, strict=True):
            assert parameter.grad is not None
            assert torch.equal(parameter.grad, total)
            assert parameter.grad.shape == parameter.shape
            assert parameter.grad.stride() == parameter.stride()
            assert parameter.grad.untyped_storage().data_ptr() == exchange.vectors.untyped_storage().data_ptr()
    if name == "cnn":
        assert any(p.stride() != torch.empty(p.shape).stride() for p in parameters)


def test_an_optimizer_can_free_the_gradients_between_shards() -> None:
    layer = nn.Linear(3, 2)
    parameters = list(layer.parameters())
    exchange = Exchange(parameters, num_shards=2, world_size=1, fixed_tree=False)
    images = uneven(2, 3)
    for shard in range(2):
        layer.zero_grad()
        loss = layer(images[shard]).sum()
        loss.backward()
        total = exchange.put(shard, loss.detach())
    exchange.sum()
    assert layer.weight.grad is not None
    assert layer.bias.grad is not None
    torch.testing.assert_close(layer.weight.grad, images.sum(0).expand(2, 3))
    torch.testing.assert_close(layer.bias.grad, torch.full((2,), 2.0))
    torch.testing.assert_close(total, layer(images).sum().detach())


# --- several ranks ---

NUM_SHARDS = 4


def summed(
    rank: int, world_size: int, *, fixed_tree: bool, group: dist.ProcessGroup | None = None, repetitions: int = 2
) -> list[list[float]]:
    """The loss and all gradients after the exchange, for each of some repetitions."""
    parameters = [nn.Parameter(torch.zeros(shape)) for shape in ((3, 5), (7,), (2, 2, 2))]  # with padding for four
    place: Any = {"num_shards": NUM_SHARDS // world_size, "world_size": world_size, "group": group}
    exchange = Exchange(parameters, **place, fixed_tree=fixed_tree)
    results = []
    for repetition in range(repetitions):
        loss = torch.empty(0)
        for shard in range(NUM_SHARDS // world_size):
            number = 10 * repetition + rank * (NUM_SHARDS // world_size) + shard
            set_gradients(list(parameters), seed=number)
            loss = exchange.put(shard, uneven(seed=1000 + number))
        exchange.sum()
        results.append([float(loss), *torch.cat([g.flatten() for g in gradients(list(parameters))]).tolist()])
    return results


def _sum_on_a_rank(rank: int, world_size: int, only_first: int, fixed_tree: bool, folder: Path) -> None:
    """In another process: join the group, and leave the sums in a file; those of the first ranks, or of all."""
    store = dist.FileStore(str(folder / "store"), world_size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
    group, taking_part = None, world_size
    if only_first:
        group, taking_part = dist.new_group(range(only_first)), only_first
    sums = summed(rank, taking_part, fixed_tree=fixed_tree, group=group) if rank < taking_part else []
    (folder / f"rank-{rank}.json").write_text(json.dumps(sums))
    dist.barrier()  # a rank that leaves ends the connections of the others
    dist.destroy_process_group()


@functools.cache
def alone() -> list[list[float]]:
    return summed(0, 1, fixed_tree=True)


@pytest.mark.parametrize("fixed_tree", [False, True])
@pytest.mark.parametrize(("world_size", "only_first"), [(2, 0), (4, 0), (4, 2)])
def test_all_ranks_have_the_sum_of_all_shards(
    world_size: int, only_first: int, fixed_tree: bool, tmp_path: Path
) -> None:
    arguments = [(rank, world_size, only_first, fixed_tree, tmp_path) for rank in range(world_size)]
    ranks = [FORKS.Process(target=_sum_on_a_rank, args=args) for args in arguments]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(120)
        rank.kill()
    assert [rank.exitcode for rank in ranks] == [0] * world_size
    sums = [json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in range(only_first or world_size)]
    assert all(others == sums[0] for others in sums)  # the same bits on every rank
    for mine, expected in zip(sums[0], alone(), strict=True):
        if fixed_tree:
            assert mine == expected  # and at any number of ranks
        else:
            assert mine == pytest.approx(expected, rel=1e-3, abs=1e-2)
