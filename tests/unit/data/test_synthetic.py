"""The drawn digits: a pure function of (count, seed), and images that a network can learn from."""

import pytest
import torch
from torch import Tensor

from mnist_dist.data import synthetic as digits
from mnist_dist.data.synthetic import draw_digits


@pytest.fixture(scope="module")
def drawn() -> tuple[Tensor, Tensor]:
    return draw_digits(4000, seed=0)


def test_shapes_and_dtypes(drawn: tuple[Tensor, Tensor]) -> None:
    images, labels = drawn
    assert images.shape == (4000, 28, 28)
    assert images.dtype == torch.uint8
    assert labels.shape == (4000,)
    assert labels.dtype == torch.int64


def test_one_digit_can_be_drawn() -> None:
    images, labels = draw_digits(1, seed=3)
    assert images.shape == (1, 28, 28)
    assert labels.shape == (1,)


@pytest.mark.parametrize("count", [0, -1])
def test_no_digits_are_refused(count: int) -> None:
    with pytest.raises(ValueError, match=f"count is {count};"):
        draw_digits(count, seed=0)


def test_same_seed_same_bytes(drawn: tuple[Tensor, Tensor]) -> None:
    images, labels = draw_digits(4000, seed=0)
    assert torch.equal(images, drawn[0])
    assert torch.equal(labels, drawn[1])


def test_another_seed_draws_other_digits(drawn: tuple[Tensor, Tensor]) -> None:
    images, labels = draw_digits(4000, seed=1)
    assert not torch.equal(labels, drawn[1])
    # No image of one draw is in the other: what is tested on was not trained on.
    seen = {image.numpy().tobytes() for image in drawn[0]}
    assert len(seen) == 4000
    assert not any(image.numpy().tobytes() in seen for image in images)


def test_a_shorter_draw_is_the_start_of_a_longer_one(drawn: tuple[Tensor, Tensor]) -> None:
    images, labels = draw_digits(777, seed=0)
    assert torch.equal(images, drawn[0][:777])
    assert torch.equal(labels, drawn[1][:777])


@pytest.mark.parametrize("chunk", [1, 37, 5000])
def test_chunks_leave_no_trace(drawn: tuple[Tensor, Tensor], chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digits, "_CHUNK", chunk)
    assert torch.equal(draw_digits(200, seed=0)[0], drawn[0][:200])


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_same_bytes_on_any_number_of_threads(drawn: tuple[Tensor, Tensor], threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        images, labels = draw_digits(4000, seed=0)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(images, drawn[0])
    assert torch.equal(labels, drawn[1])


def test_global_random_state_is_neither_changed_nor_read(drawn: tuple[Tensor, Tensor]) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(12345)
        before = torch.get_rng_state()
        images, _ = draw_digits(50, seed=0)
        assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(images, drawn[0][:50])


def test_every_class_is_about_equally_frequent(drawn: tuple[Tensor, Tensor]) -> None:
    counts = drawn[1].bincount(minlength=10)
    assert len(counts) == 10
    assert counts.min() > 320  # 400 expected, with a standard deviation of 19
    assert counts.max() < 480


def test_every_way_of_writing_is_drawn_under_its_own_label(monkeypatch: pytest.MonkeyPatch) -> None:
    draw, rows = digits._draw, []

    def record(glyphs: digits._Glyphs, row: Tensor, moves: Tensor, jitter: Tensor) -> Tensor:
        rows.append(row)
        return draw(glyphs, row, moves, jitter)

    monkeypatch.setattr(digits, "_draw", record)
    _, labels = draw_digits(1000, seed=0)
    owner = torch.tensor([label for label, ways in enumerate(digits._GLYPHS) for _ in ways])
    row = torch.cat(rows)
    assert torch.equal(owner[row], labels)
    assert len(row.unique()) == len(owner)


def test_no_two_ways_of_writing_are_the_same() -> None:
    glyphs = digits._glyphs()
    num = len(glyphs.control)
    still = digits._draw(glyphs, torch.arange(num), torch.zeros(num, 13), torch.zeros_like(glyphs.control))
    assert len(still.unique(dim=0)) == num


def test_images_look_like_mnist_in_coarse_figures(drawn: tuple[Tensor, Tensor]) -> None:
    # In MNIST 19 percent of the pixels hold ink and the mean is 33 of 255.
    # The bytes themselves are not pinned: another version of torch may draw other random numbers.
    images = drawn[0]
    ink = (images > 0).flatten(1).float().mean(1)
    assert ink.min() > 0.02  # no image is empty
    assert ink.max() < 0.45  # none is filled
    assert 0.13 < ink.mean() < 0.22
    assert 24 < images.float().mean() < 38
    assert bool((images.flatten(1).amax(1) > 200).all())  # even the thinnest stroke is dark somewhere
    partial = ((images > 0) & (images < 255)).sum() / (images > 0).sum()
    assert 0.2 < partial < 0.8  # edges are smooth, and strokes are not all edge


def test_digits_stand_in_the_middle_and_spread(drawn: tuple[Tensor, Tensor]) -> None:
    images = drawn[0].float()
    mass = images.sum((1, 2))
    at = torch.arange(28.0) - 13.5
    x, y = (images.sum(1) * at).sum(1) / mass, (images.sum(2) * at).sum(1) / mass
    for offset in (x, y):
        assert abs(offset.mean()) < 1
        assert 0.5 < offset.std() < 2.5
    border = images.clone()
    border[:, 2:-2, 2:-2] = 0
    assert border.sum() / images.sum() < 0.03  # hardly any digit is cut off


def test_digits_stand_upright_and_are_not_mirrored(drawn: tuple[Tensor, Tensor]) -> None:
    images, labels = drawn[0].float(), drawn[1]
    mean = torch.stack([images[labels == label].mean(0) for label in range(10)])
    top, left = mean[:, :14].sum((1, 2)), mean[:, :, :14].sum((1, 2))
    share_top, share_left = top / mean.sum((1, 2)), left / mean.sum((1, 2))
    assert share_top[7] > 0.55 > 0.45 > share_top[6]  # the bar of a 7 is above, the bowl of a 6 below
    assert share_left[6] > 0.5 > share_left[3]  # a 6 has its back at the left, a 3 at the right


def test_classes_can_be_told_apart_but_not_too_easily(drawn: tuple[Tensor, Tensor]) -> None:
    images, labels = drawn[0].flatten(1).float(), drawn[1]
    test_images, test_labels = draw_digits(2000, seed=1)
    means = torch.stack([images[labels == label].mean(0) for label in range(10)])
    nearest = torch.cdist(test_images.flatten(1).float(), means).argmin(1)
    accuracy = (nearest == test_labels).float().mean().item()
    assert 0.6 < accuracy < 0.82  # chance is 0.1; MNIST's is 0.82, and 0.85 would come from too steady a hand
    for label in range(10):  # and no class is lost among the others
        assert (nearest[test_labels == label] == label).float().mean() > 0.3
