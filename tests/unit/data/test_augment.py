"""The warps: a pure function of (seed, epoch), drawn for an epoch's global order, and doing what their names say."""

import math

import pytest
import torch
from torch import Tensor

from mnist_dist.config.schema import Config
from mnist_dist.data.augment import SIDE, WARP_SIDE, Augmentation
from mnist_dist.data.sampler import GlobalBatchSampler

CPU = torch.device("cpu")
ALL = {"shift": 3, "rotate": 20, "scale": 0.2, "elastic": 1.5}
NOTHING = {"affine": torch.zeros(1, 4), "knots": torch.zeros(1, 2, WARP_SIDE, WARP_SIDE)}
ROTATE, SCALE, SHIFT_X, SHIFT_Y = range(4)  # the columns of `affine`


def augmentation(**amounts: float) -> Augmentation:
    return Augmentation(Config(seed=amounts.pop("seed", 0), **amounts), CPU)


def affine(**columns: float) -> Tensor:
    row = torch.zeros(1, 4)
    for name, value in columns.items():
        row[0, {"rotate": ROTATE, "scale": SCALE, "x": SHIFT_X, "y": SHIFT_Y}[name]] = value
    return row


def warp(images: Tensor, augmentation: Augmentation, row: Tensor, knots: Tensor | None = None) -> Tensor:
    """Warp all the images in the same way."""
    knots = NOTHING["knots"] if knots is None else knots
    return augmentation.warp(images, row.expand(len(images), 4), knots.expand(len(images), -1, -1, -1))


def shifted(images: Tensor, down: int, right: int) -> Tensor:
    """torch.roll, but what comes in from outside is zero."""
    rolled = images.roll((down, right), (1, 2))
    rolled[:, : max(down, 0)] = 0
    rolled[:, SIDE + min(down, 0) :] = 0
    rolled[:, :, : max(right, 0)] = 0
    rolled[:, :, SIDE + min(right, 0) :] = 0
    return rolled


@pytest.fixture
def images() -> Tensor:
    return torch.rand(10, SIDE, SIDE, generator=torch.Generator().manual_seed(0))


def test_draws_have_the_promised_shapes_and_distributions() -> None:
    drawn, knots = augmentation(**ALL).draw(0, 2000)
    assert (drawn.shape, knots.shape) == ((2000, 4), (2000, 2, WARP_SIDE, WARP_SIDE))
    assert drawn.dtype == knots.dtype == torch.float32
    assert drawn.min() >= -1
    assert drawn.max() < 1
    assert drawn.mean(0).tolist() == pytest.approx([0] * 4, abs=0.07)  # the standard deviation is 0.013
    assert drawn.std(0).tolist() == pytest.approx([1 / math.sqrt(3)] * 4, abs=0.05)
    assert knots.mean() == pytest.approx(0, abs=0.02)
    assert knots.std() == pytest.approx(1, abs=0.02)


def test_draws_are_a_pure_function_of_seed_and_epoch() -> None:
    first, second = augmentation(**ALL), augmentation(**ALL)
    expected = first.draw(3, 16)
    first.draw(0, 100)  # what was drawn before does not matter, nor the global random state
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(12345)
        before = torch.get_rng_state()
        again = [first.draw(3, 16), second.draw(3, 16)]
        assert torch.equal(torch.get_rng_state(), before)
    for drawn in again:
        assert torch.equal(drawn[0], expected[0])
        assert torch.equal(drawn[1], expected[1])


def test_draws_differ_wherever_seed_epoch_or_place_do() -> None:
    # 1/11 and 11/1 among them: the two must not run into one another
    drawn = [
        tuple(row)
        for seed in (0, 1, 11)
        for epoch in (0, 1, 11)
        for row in augmentation(seed=seed, **ALL).draw(epoch, 2)[0].tolist()
    ]
    assert len(set(drawn)) == 18


def test_it_is_enabled_where_anything_is_asked_for() -> None:
    assert not augmentation().enabled
    assert all(augmentation(**{name: amount}).enabled for name, amount in ALL.items())


def test_it_is_the_identity_where_all_amounts_are_zero(images: Tensor) -> None:
    still = augmentation()
    drawn, knots = still.draw(0, len(images))
    assert drawn.abs().max() > 0.5
    torch.testing.assert_close(still.warp(images, drawn, knots), images, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("down", "right"), [(0, 0), (0, 3), (2, 0), (-1, 4), (-4, -3), (4, 4)])
def test_a_shift_by_whole_pixels_is_a_roll_that_zeros_follow(images: Tensor, down: int, right: int) -> None:
    # Each pixel of the result is fetched from where the shift points to, so the image moves the other way.
    moved = warp(images, augmentation(shift=4), affine(x=-right / 4, y=-down / 4))
    torch.testing.assert_close(moved, shifted(images, down, right), rtol=0, atol=1e-5)


@pytest.mark.parametrize("sign", [1, -1])
def test_a_rotation_by_a_right_angle_is_rot90(images: Tensor, sign: int) -> None:
    turned = warp(images, augmentation(rotate=90), affine(rotate=sign))
    torch.testing.assert_close(turned, images.rot90(sign, (1, 2)), rtol=0, atol=1e-4)


def test_a_rotation_by_45_degrees_twice_is_one_by_90(images: Tensor) -> None:
    blurred = torch.nn.functional.avg_pool2d(images, 7, 1, 3)  # smooth, so that interpolation loses little
    half = augmentation(rotate=45)
    twice = warp(warp(blurred, half, affine(rotate=1)), half, affine(rotate=1))
    centre = (slice(None), slice(8, 20), slice(8, 20))
    torch.testing.assert_close(twice[centre], blurred.rot90(1, (1, 2))[centre], rtol=0, atol=0.03)


@pytest.mark.parametrize(("drawn", "side"), [(1, 12), (-1, 4), (0, 8)])
def test_scaling_changes_the_size_about_the_centre(drawn: float, side: int) -> None:
    square = torch.zeros(1, SIDE, SIDE)
    square[:, 10:18, 10:18] = 1
    expected = torch.zeros(1, SIDE, SIDE)
    expected[:, 14 - side // 2 : 14 + side // 2, 14 - side // 2 : 14 + side // 2] = 1
    scaled = warp(square, augmentation(scale=0.5), affine(scale=drawn))
    assert torch.equal(scaled.round(), expected)


def test_an_elastic_warp_with_equal_knots_is_a_shift(images: Tensor) -> None:
    knots = torch.zeros(1, 2, WARP_SIDE, WARP_SIDE)
    knots[:, 0], knots[:, 1] = 1.0, -0.5  # in units of the typical displacement, x and y
    moved = warp(images, augmentation(elastic=4), affine(), knots)
    torch.testing.assert_close(moved, shifted(images, 2, -4), rtol=0, atol=1e-4)


def test_an_elastic_warp_moves_pixels_by_about_its_amount(images: Tensor) -> None:
    # The image of x tells where each pixel came from.
    ramp = (torch.arange(SIDE) / SIDE).expand(200, SIDE, SIDE)
    elastic = augmentation(elastic=1)
    drawn, knots = elastic.draw(0, 200)
    displacement = (elastic.warp(ramp, drawn * 0, knots) - ramp)[:, 8:-8, 8:-8] * SIDE
    assert 0.6 < displacement.std() < 1.1
    steps = displacement.diff(dim=1)
    assert steps.std() < 0.4  # neighbours move together


@pytest.mark.parametrize("seed", range(3))
def test_values_stay_between_those_of_the_image_and_zero(images: Tensor, seed: int) -> None:
    everything = augmentation(seed=seed, shift=14, rotate=180, scale=0.9, elastic=5)
    warped = everything.warp(images, *everything.draw(0, len(images)))
    assert warped.shape == images.shape
    assert warped.dtype == images.dtype
    assert warped.isfinite().all()
    assert warped.min() >= -1e-6
    assert warped.max() <= images.max() + 1e-6
    assert not torch.allclose(warped, images)


@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
@pytest.mark.parametrize("num_shards", [8, None])  # None: one a rank
@pytest.mark.parametrize("num_images", [16, 21])  # full batches, and a last one of 5 images that 8 shards fill up
def test_each_image_meets_the_same_warp_at_any_world_size(
    world_size: int, num_shards: int | None, num_images: int
) -> None:
    images = torch.rand(num_images, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    everything, epoch = augmentation(**ALL), 1
    num_draws = 24

    def sampler(rank: int, world_size: int, num_shards: int) -> GlobalBatchSampler:
        place = {"rank": rank, "world_size": world_size, "num_shards": num_shards}
        return GlobalBatchSampler(num_images, 8, total_steps=100, seed=0, **place, device=CPU)

    alone = sampler(0, 1, 1)
    for step in range(epoch * alone.steps_per_epoch, (epoch + 1) * alone.steps_per_epoch):
        whole = alone.batch(step)
        assert whole.epoch == epoch
        drawn, knots = (values[8 * whole.step_in_epoch :][:8] for values in everything.draw(epoch, num_draws))
        expected = everything.warp(images[whole.indices[0]], drawn[: whole.num_images], knots[: whole.num_images])
        seen = torch.zeros(whole.num_images, dtype=torch.bool)
        for rank in range(world_size):
            batch = sampler(rank, world_size, num_shards or world_size).batch(step)
            mine = batch.positions < batch.num_images
            places = batch.positions[mine]
            warped = everything.warp(images[batch.indices[mine]], drawn[places], knots[places])
            torch.testing.assert_close(warped, expected[places], rtol=0, atol=1e-5)
            seen[places] = True
        assert seen.all()
