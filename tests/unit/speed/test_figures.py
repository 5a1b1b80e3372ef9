"""Figures of speed, against values that are known."""

import pytest

from mnist_dist.speed.figures import Spread, bus_bandwidth, karp_flatt, spread, strong_efficiency, weak_efficiency


def test_quartiles_are_interpolated_between_neighbours() -> None:
    assert spread([5.0, 1.0, 2.0, 4.0, 3.0]) == Spread(3.0, 2.0, 4.0, [5.0, 1.0, 2.0, 4.0, 3.0])
    assert spread([1.0, 2.0]) == Spread(1.5, 1.25, 1.75, [1.0, 2.0])
    assert spread([7.0]) == Spread(7.0, 7.0, 7.0, [7.0])
    assert spread([1.0, 2.0, 3.0, 4.0, 5.0]).half_width == pytest.approx(1 / 3)


def test_intervals_that_touch_overlap() -> None:
    one = Spread(2.0, 1.0, 3.0, [])
    assert one.overlaps(Spread(4.0, 3.0, 5.0, []))
    assert Spread(4.0, 3.0, 5.0, []).overlaps(one)
    assert one.overlaps(Spread(2.0, 1.9, 2.1, []))
    assert not one.overlaps(Spread(4.0, 3.1, 5.0, []))
    assert not Spread(4.0, 3.1, 5.0, []).overlaps(one)


def test_efficiency_is_one_where_nothing_is_lost() -> None:
    assert strong_efficiency(8.0, 2.0, ranks=4) == 1
    assert strong_efficiency(8.0, 4.0, ranks=4) == 0.5
    assert weak_efficiency(8.0, 8.0) == 1
    assert weak_efficiency(8.0, 10.0) == 0.8


@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("ranks", [2, 8, 1024])
def test_karp_flatt_gives_the_serial_fraction_of_amdahls_law_back(fraction: float, ranks: int) -> None:
    speed_up = 1 / (fraction + (1 - fraction) / ranks)
    assert karp_flatt(speed_up, ranks) == pytest.approx(fraction)


def test_karp_flatt_of_a_slowdown_and_of_more_than_the_ranks() -> None:
    assert karp_flatt(0.5, 2) == 3
    assert karp_flatt(2.5, 2) == pytest.approx(-0.2)


def test_bus_bandwidth_is_that_of_nccl_tests() -> None:
    """Their factor of an all-reduce is 2(n-1)/n: 1 for two ranks, 1.75 for eight."""
    assert bus_bandwidth(1_000_000, 1e-3, ranks=2) == pytest.approx(1e9)
    assert bus_bandwidth(1_000_000, 1e-3, ranks=8) == pytest.approx(1.75e9)
    assert bus_bandwidth(1_000_000, 1e-3, ranks=1) == 0
