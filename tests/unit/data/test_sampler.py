"""Each image once an epoch, at any world size and number of shards, in the order of torch's DistributedSampler."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DistributedSampler

from mnist_dist.data.sampler import Batch, GlobalBatchSampler, count_steps, steps_per_epoch

CPU = torch.device("cpu")
NO_END = 10**9  # total steps of a run that ends nowhere near


def samplers(
    num_images: int,
    batch_size: int,
    world_size: int = 1,
    num_shards: int | None = None,
    seed: int = 0,
    total_steps: int = NO_END,
) -> list[GlobalBatchSampler]:
    """One for each rank; a shard a rank unless said otherwise."""
    return [
        GlobalBatchSampler(
            num_images,
            batch_size,
            total_steps=total_steps,
            seed=seed,
            num_shards=num_shards or world_size,
            rank=rank,
            world_size=world_size,
            device=CPU,
        )
        for rank in range(world_size)
    ]


def counted(batch: Batch) -> torch.Tensor:
    """Which of a batch's images count, in its shape."""
    return torch.ones_like(batch.indices, dtype=torch.bool) if batch.mask is None else batch.mask == 1


def global_batch(batches: list[Batch]) -> list[int]:
    """The images that count in one step of all ranks, in the order of their positions; each position is there once."""
    placed: dict[int, int] = {}
    for batch in batches:
        mine = counted(batch)
        places = batch.positions[mine].tolist()
        assert not placed.keys() & set(places)
        placed |= dict(zip(places, batch.indices[mine].tolist(), strict=True))
    assert sorted(placed) == list(range(batches[0].num_images))
    return [placed[place] for place in sorted(placed)]


@st.composite
def jobs(draw: st.DrawFn) -> tuple[int, int, int, int]:
    """Images, a global batch, a number of shards that divides it, and a world size that divides these."""
    world_size, shards_of_a_rank = draw(st.integers(1, 8)), draw(st.integers(1, 4))
    num_shards = world_size * shards_of_a_rank
    shard_size = draw(st.integers(1, max(300 // num_shards, 1)))
    return draw(st.integers(1, 500)), shard_size * num_shards, num_shards, world_size


@given(job=jobs(), seed=st.integers(0, 2**31 - 1), epoch=st.integers(0, 50))
@settings(deadline=None, max_examples=150)
def test_the_order_is_that_of_torchs_distributed_sampler(job: tuple[int, int, int, int], seed: int, epoch: int) -> None:
    num_images, batch_size, num_shards, world_size = job
    ranks = samplers(num_images, batch_size, world_size, num_shards, seed)
    steps = ranks[0].steps_per_epoch
    rows = [[s.batch(step).indices for step in range(epoch * steps, (epoch + 1) * steps)] for s in ranks]
    ours = torch.cat([torch.cat(of_a_rank, dim=1) for of_a_rank in rows]).tolist()  # a row a shard
    assert len(ours) == num_shards
    for shard, mine in enumerate(ours):
        torchs = DistributedSampler(range(num_images), num_replicas=num_shards, rank=shard, seed=seed)  # type: ignore[arg-type]
        torchs.set_epoch(epoch)
        assert mine == list(torchs)


@given(job=jobs(), seed=st.integers(0, 2**31 - 1), epoch=st.integers(0, 50))
@settings(deadline=None, max_examples=150)
def test_a_step_has_the_same_global_batch_however_it_is_shared_and_each_image_is_used_once(
    job: tuple[int, int, int, int], seed: int, epoch: int
) -> None:
    num_images, batch_size, num_shards, world_size = job
    (alone,) = samplers(num_images, batch_size, seed=seed)
    ranks = samplers(num_images, batch_size, world_size, num_shards, seed)
    steps = alone.steps_per_epoch
    assert steps == steps_per_epoch(num_images, batch_size) == -(-num_images // batch_size)
    used = []
    for step in range(epoch * steps, (epoch + 1) * steps):
        whole = alone.batch(step)
        assert whole.mask is None
        assert whole.positions.tolist() == [list(range(whole.num_images))]
        expected = global_batch([whole])
        assert len(expected) == alone.count(step)
        batches = [sampler.batch(step) for sampler in ranks]
        assert global_batch(batches) == expected
        for batch in batches:
            assert (batch.step, batch.epoch, batch.step_in_epoch) == (step, epoch, step - epoch * steps)
            assert (batch.num_images, batch.epoch_ends) == (len(expected), step == (epoch + 1) * steps - 1)
        used += expected
    assert sorted(used) == list(range(num_images))


@given(job=jobs())
@settings(deadline=None, max_examples=50)
def test_all_shards_take_the_same_number_of_images_in_a_step(job: tuple[int, int, int, int]) -> None:
    num_images, batch_size, num_shards, world_size = job
    ranks = samplers(num_images, batch_size, world_size, num_shards)
    for step in range(ranks[0].steps_per_epoch):
        shapes = {tuple(sampler.batch(step).indices.shape) for sampler in ranks}
        assert len(shapes) == 1  # the exchange has no say in how many images a rank has; all must come to each step
        rows, columns = shapes.pop()
        assert rows == num_shards // world_size
        assert 0 < columns <= batch_size // num_shards


@given(job=jobs())
@settings(deadline=None, max_examples=50)
def test_a_mask_holds_one_for_what_counts_and_zero_for_repeats(job: tuple[int, int, int, int]) -> None:
    num_images, batch_size, num_shards, world_size = job
    for step in range(steps_per_epoch(num_images, batch_size)):
        batches = [sampler.batch(step) for sampler in samplers(num_images, batch_size, world_size, num_shards)]
        num_slots = sum(batch.indices.numel() for batch in batches)
        for batch in batches:
            if num_slots == batch.num_images:  # nothing is repeated
                assert batch.mask is None
                continue
            assert batch.mask is not None
            assert (batch.mask.dtype, batch.mask.shape) == (torch.float32, batch.indices.shape)
            assert batch.mask.tolist() == (batch.positions < batch.num_images).float().tolist()
        assert sum(int(counted(batch).sum()) for batch in batches) == batches[0].num_images


def test_masks_are_there_only_where_the_sampler_repeats_images() -> None:
    for world_size in (1, 2, 4):  # each divides 12: a short last batch, but nothing repeated
        for sampler in samplers(12, 8, world_size):
            assert [sampler.batch(step).mask for step in (0, 1)] == [None, None]
    last = [sampler.batch(1) for sampler in samplers(11, 8, 4)]  # 3 images for 4 ranks
    assert [batch.mask.tolist() for batch in last if batch.mask is not None] == [[[1]], [[1]], [[1]], [[0]]]
    assert [batch.num_images for batch in last] == [3] * 4
    (both,) = samplers(11, 8, 1, num_shards=4)  # the same on one rank
    mask = both.batch(1).mask
    assert mask is not None
    assert mask.tolist() == [[1], [1], [1], [0]]


@pytest.mark.parametrize(("world_size", "num_shards"), [(1, 4), (2, 4), (4, 4), (2, 8), (8, 8)])
def test_a_ranks_shards_are_neighbours(world_size: int, num_shards: int) -> None:
    ranks = samplers(40, 16, world_size, num_shards)
    every_shard = samplers(40, 16, num_shards)
    for step in range(3):
        mine = torch.cat([sampler.batch(step).indices for sampler in ranks])
        assert torch.equal(mine, torch.cat([sampler.batch(step).indices for sampler in every_shard]))


@pytest.mark.parametrize(
    ("total_steps", "last"),
    [(NO_END, [2, 5, 8]), (9, [2, 5, 8]), (8, [2, 5, 7]), (4, [2, 3]), (1, [0])],
)
def test_the_last_step_of_a_run_ends_its_epoch(total_steps: int, last: list[int]) -> None:
    (sampler,) = samplers(10, 4, total_steps=total_steps)
    assert [step for step in range(min(total_steps, 9)) if sampler.batch(step).epoch_ends] == last


def test_counts_go_on_over_the_whole_run() -> None:
    (sampler,) = samplers(10, 4)
    assert [sampler.count(step) for step in range(7)] == [4, 4, 2, 4, 4, 2, 4]
    assert [sampler.batch(step).num_images for step in range(7)] == [4, 4, 2, 4, 4, 2, 4]


@pytest.mark.parametrize(
    ("num_images", "batch_size", "epochs", "max_steps", "steps"),
    [
        (10, 4, 1, 0, 3),
        (10, 4, 3, 0, 9),
        (10, 4, 3, 7, 7),
        (10, 4, 3, 100, 9),
        (8, 4, 2, 0, 4),
        (60_000, 64, 1, 0, 938),
    ],
)
def test_the_steps_of_a_run_are_those_of_its_epochs_or_fewer(
    num_images: int, batch_size: int, epochs: int, max_steps: int, steps: int
) -> None:
    assert count_steps(num_images, batch_size, epochs, max_steps) == steps


def test_fewer_images_than_ranks_are_used_once_too() -> None:
    batches = [sampler.batch(0) for sampler in samplers(3, 8, 8)]
    assert sorted(global_batch(batches)) == [0, 1, 2]


def test_orders_differ_by_epoch_and_by_seed_and_can_be_drawn_again() -> None:
    (sampler,), (other,) = samplers(500, 50, seed=3), samplers(500, 50, seed=8)
    orders = [sampler.order(epoch) for epoch in range(3)] + [other.order(epoch) for epoch in range(3)]
    assert len({tuple(order.tolist()) for order in orders}) == 6
    assert torch.equal(sampler.order(0), orders[0])  # whatever was drawn in between


def test_steps_can_be_asked_for_in_any_order() -> None:
    (sampler,), (other,) = samplers(50, 20), samplers(50, 20)
    forwards = [sampler.batch(step).indices.tolist() for step in range(9)]
    backwards = [other.batch(step).indices.tolist() for step in reversed(range(9))]
    assert forwards == backwards[::-1]


def test_the_global_random_state_is_neither_changed_nor_read() -> None:
    (sampler,), (other,) = samplers(50, 10), samplers(50, 10)
    expected = sampler.batch(0).indices
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(12345)
        before = torch.get_rng_state()
        assert torch.equal(other.batch(0).indices, expected)
        assert torch.equal(torch.get_rng_state(), before)
