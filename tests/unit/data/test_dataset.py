"""Each image once per epoch, at any world size; a dataset that is not what was written is refused."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from mnist_dist.data.dataset import Share, Shares, load_dataset
from mnist_dist.data.download import dataset_file, fingerprint
from mnist_dist.errors import RequestError
from tests.conftest import NUM_TEST, NUM_TRAIN

CPU = torch.device("cpu")


def shares_of(num_images: int, batch_size: int, world_size: int, seed: int = 0) -> list[Shares]:
    return [Shares(num_images, batch_size, seed, rank, world_size, CPU) for rank in range(world_size)]


def counted(share: Share) -> torch.Tensor:
    """Which of a share's rows count."""
    return torch.ones(len(share.rows), dtype=torch.bool) if share.weights is None else share.weights == 1


@st.composite
def jobs(draw: st.DrawFn) -> tuple[int, int, int]:
    """Images, a global batch and a world size that divides it."""
    world_size = draw(st.integers(1, 8))
    share_size = draw(st.integers(1, 300 // world_size))
    return draw(st.integers(1, 500)), share_size * world_size, world_size


@given(job=jobs(), seed=st.integers(0, 2**31 - 1), epoch=st.integers(0, 50))
@settings(deadline=None, max_examples=150)
def test_each_step_is_the_same_slice_of_one_order_and_each_image_is_used_once(
    job: tuple[int, int, int], seed: int, epoch: int
) -> None:
    num_images, batch_size, world_size = job
    (alone,) = shares_of(num_images, batch_size, 1, seed)
    global_order = alone.order(epoch)
    assert sorted(global_order.tolist()) == list(range(num_images))

    ranks = shares_of(num_images, batch_size, world_size, seed)
    orders = [shares.order(epoch) for shares in ranks]
    steps = alone.steps_per_epoch
    assert steps == -(-num_images // batch_size)
    num_used = 0
    for step in range(steps):
        expected = global_order[step * batch_size : (step + 1) * batch_size].tolist()
        batch: dict[int, int] = {}  # place in the global batch: image
        for shares, order in zip(ranks, orders, strict=True):
            share = shares.cut(order, step)
            assert share.num_images == shares.count(step) == len(expected)
            assert len(share.rows) == len(share.positions) <= batch_size // world_size
            mine = counted(share)
            if share.weights is not None:
                assert share.weights.dtype == torch.float32
                assert share.weights[~mine].tolist() == [0] * int((~mine).sum())  # a weight is one or zero
            places = share.positions[mine].tolist()
            assert not batch.keys() & set(places)
            batch |= dict(zip(places, share.rows[mine].tolist(), strict=True))
        assert [batch[place] for place in sorted(batch)] == expected
        assert sorted(batch) == list(range(len(expected)))
        num_used += len(batch)
    assert num_used == num_images == sum(alone.count(step) for step in range(steps))


@given(job=jobs())
@settings(deadline=None, max_examples=50)
def test_all_ranks_take_the_same_number_of_rows_in_a_step(job: tuple[int, int, int]) -> None:
    num_images, batch_size, world_size = job
    ranks = shares_of(num_images, batch_size, world_size)
    for step in range(ranks[0].steps_per_epoch):
        sizes = {len(shares.cut(shares.order(0), step).rows) for shares in ranks}
        assert len(sizes) == 1  # DDP has no say in how many images a rank has; its ranks must all come to each step
        assert sizes.pop() > 0


def test_weights_are_there_only_where_the_sampler_repeats_images() -> None:
    for world_size in (1, 2, 4):  # each divides 12: a short last batch, but nothing repeated
        for shares in shares_of(12, 8, world_size):
            assert [shares.cut(shares.order(0), step).weights for step in (0, 1)] == [None, None]
    last = [shares.cut(shares.order(0), 1) for shares in shares_of(11, 8, 4)]  # 3 images for 4 ranks
    assert [share.weights.tolist() for share in last if share.weights is not None] == [[1], [1], [1], [0]]
    assert [share.num_images for share in last] == [3] * 4


def test_counts_go_on_over_the_whole_run() -> None:
    (shares,) = shares_of(10, 4, 1)
    assert [shares.count(step) for step in range(7)] == [4, 4, 2, 4, 4, 2, 4]


def test_fewer_images_than_ranks_are_used_once_too() -> None:
    shares = [s.cut(s.order(0), 0) for s in shares_of(3, 8, 8)]
    assert sorted(torch.cat([share.rows[counted(share)] for share in shares]).tolist()) == [0, 1, 2]


def test_orders_differ_by_epoch_and_by_seed_and_can_be_drawn_again() -> None:
    (shares,), (other,) = shares_of(500, 50, 1, seed=3), shares_of(500, 50, 1, seed=8)
    orders = [shares.order(epoch) for epoch in range(3)] + [other.order(epoch) for epoch in range(3)]
    assert len({tuple(order.tolist()) for order in orders}) == 6
    assert torch.equal(shares.order(0), orders[0])  # whatever was drawn in between


def test_the_global_random_state_is_neither_changed_nor_read() -> None:
    (shares,) = shares_of(50, 10, 1)
    expected = shares.order(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(12345)
        before = torch.get_rng_state()
        assert torch.equal(shares.order(0), expected)
        assert torch.equal(torch.get_rng_state(), before)


def test_the_whole_dataset_is_read(data_dir: Path) -> None:
    dataset = load_dataset("synthetic", data_dir)
    written = load_file(dataset_file("synthetic", data_dir))
    assert (dataset.name, dataset.held_out_name) == ("synthetic", "test")
    assert dataset.fingerprint == fingerprint(written)
    assert len(dataset.train.labels) == NUM_TRAIN
    assert len(dataset.held_out.labels) == NUM_TEST
    for split, part in ((dataset.train, "train"), (dataset.held_out, "test")):
        assert torch.equal(split.images, written[f"{part}_images"])
        assert torch.equal(split.labels, written[f"{part}_labels"])
        assert (split.images.dtype, split.labels.dtype) == (torch.uint8, torch.int64)


@pytest.mark.parametrize("validation", [1, 150, NUM_TRAIN - 1])
def test_validation_holds_out_the_last_training_images(data_dir: Path, validation: int) -> None:
    whole, dataset = load_dataset("synthetic", data_dir), load_dataset("synthetic", data_dir, validation)
    assert dataset.held_out_name == "validation"
    assert len(dataset.held_out.labels) == validation
    for kept, held_out, all_of_it in zip(dataset.train, dataset.held_out, whole.train, strict=True):
        assert torch.equal(torch.cat((kept, held_out)), all_of_it)


@pytest.mark.parametrize("validation", [NUM_TRAIN, NUM_TRAIN + 1, 10**12])
def test_validation_must_leave_something_to_train_on(data_dir: Path, validation: int) -> None:
    with pytest.raises(RequestError, match=f"validation={validation} leaves nothing .* {NUM_TRAIN} training images"):
        load_dataset("synthetic", data_dir, validation)


def damage_a_pixel(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1000] ^= 1
    path.write_bytes(content)


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


def save_other_tensors(path: Path, dtype: torch.dtype) -> None:
    save_file({"weight": torch.zeros(3, dtype=dtype), "nothing": torch.zeros(0, dtype=dtype)}, path)


def swap_labels(path: Path) -> None:
    tensors = load_file(path)
    recorded = fingerprint(tensors)
    tensors["train_labels"] = tensors["train_labels"].flip(0).contiguous()
    save_file(tensors, path, metadata={"name": "synthetic", "fingerprint": recorded})


def make_a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (damage_a_pixel, "is damaged"),
        (swap_labels, "is damaged"),
        (lambda path: save_other_tensors(path, torch.float32), "is damaged"),
        (lambda path: save_other_tensors(path, torch.bfloat16), "is damaged"),  # numpy has no such numbers
        (cut_short, "cannot be read"),
        (lambda path: path.write_bytes(b""), "cannot be read"),
        (lambda path: path.write_text("<html>404</html>"), "cannot be read"),
        (lambda path: path.write_bytes(bytes(range(256)) * 10), "cannot be read"),
        (make_a_folder, "cannot be read"),
        (Path.unlink, "cannot be read"),
    ],
    ids=["pixel", "labels", "other", "other-bf16", "short", "empty", "html", "binary", "folder", "gone"],
)
def test_a_damaged_file_is_refused_in_one_sentence(data_dir: Path, tmp_path: Path, damage, sentence: str) -> None:
    path = dataset_file("synthetic", tmp_path)
    path.write_bytes(dataset_file("synthetic", data_dir).read_bytes())
    damage(path)
    with pytest.raises(RequestError) as raised:
        load_dataset("synthetic", tmp_path)
    text = str(raised.value)
    assert text.startswith(f"{path} {sentence}")
    assert text.endswith(f"; delete it and run `mnist-dist fetch dataset=synthetic data_dir={tmp_path}`")
    assert "\n" not in text
