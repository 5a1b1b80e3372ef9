"""Figures of speed as pure functions: medians and quartiles, scaling, bandwidth."""

import statistics
from collections.abc import Sequence
from typing import NamedTuple


class Spread(NamedTuple):
    """What repetitions of one measurement gave, in any unit."""

    median: float
    q1: float  # a quarter of the values lie below
    q3: float  # a quarter of the values lie above
    values: list[float]  # in the order of the rounds

    @property
    def half_width(self) -> float:
        """Half the distance of the quartiles, as a share of the median; 0 where the median is 0."""
        return (self.q3 - self.q1) / 2 / abs(self.median) if self.median else 0.0

    def overlaps(self, other: "Spread") -> bool:
        """Whether the intervals between the quartiles have a point in common."""
        return self.q1 <= other.q3 and other.q1 <= self.q3


def spread(values: Sequence[float]) -> Spread:
    """Median and quartiles of one or more values, interpolated between neighbours (numpy's default)."""
    if len(values) == 1:
        return Spread(values[0], values[0], values[0], list(values))
    q1, median, q3 = statistics.quantiles(values, n=4, method="inclusive")
    return Spread(median, q1, q3, list(values))


def strong_efficiency(one_s: float, many_s: float, ranks: int) -> float:
    """Speed-up by the number of ranks: seconds of a step on one rank and on `ranks`, for the same global batch."""
    return one_s / (ranks * many_s)


def weak_efficiency(one_s: float, many_s: float) -> float:
    """Seconds of a step on one rank by those on several, for the same batch a rank."""
    return one_s / many_s


def karp_flatt(speed_up: float, ranks: int) -> float:
    """The experimentally determined serial fraction of Karp and Flatt (1990), for two ranks or more.

    0: nothing is serial; 1: no speed-up; above 1: several ranks are slower than one. Below 0: the speed-up is more than
    the number of ranks, as where a rank's share fits into a cache.
    """
    return (1 / speed_up - 1 / ranks) / (1 - 1 / ranks)


def bus_bandwidth(num_bytes: int, seconds: float, ranks: int) -> float:
    """Bytes a second of an all-reduce as nccl-tests define it: 2(n-1)/n times the vector's bytes, by the seconds.

    So it compares with the links' bandwidth at any number of ranks. 0 for one rank, which exchanges nothing.
    """
    return 2 * (ranks - 1) / ranks * num_bytes / seconds
