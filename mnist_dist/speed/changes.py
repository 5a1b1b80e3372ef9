"""What has changed since an earlier measurement, beyond the noise of both."""

import math
from dataclasses import dataclass, field
from typing import Any

from mnist_dist.errors import RequestError
from mnist_dist.speed.figures import Spread
from mnist_dist.speed.plan import Case, describe_ranks
from mnist_dist.speed.summary import FORMAT


@dataclass
class Change:
    """A time that differs beyond the noise."""

    name: str
    before_s: float  # median
    now_s: float  # median

    def __str__(self) -> str:
        """In words."""
        kind, ratio = "faster", self.before_s / self.now_s
        if ratio < 1:
            kind, ratio = "slower", 1 / ratio
        return f"{self.name}: {1e3 * self.before_s:.3g} ms before, {1e3 * self.now_s:.3g} ms now, {ratio:.2f} x {kind}"


@dataclass
class Comparison:
    """What could be compared, and what came out."""

    changed: list[Change] = field(default_factory=list)
    unchanged: list[str] = field(default_factory=list)  # names of figures
    only_before: list[str] = field(default_factory=list)  # the same
    only_now: list[str] = field(default_factory=list)
    obstacles: list[str] = field(default_factory=list)  # where there are any, nothing was compared
    versions: list[str] = field(default_factory=list)  # what runs now, and ran before


def compare(before: dict[str, Any], now: dict[str, Any]) -> Comparison:
    """Compare the times of steps and exchanges of two measurements.

    A time has changed where the intervals between the quartiles have no point in common. Nothing is compared where the
    machine or the request differs. The parts of a step, and what is computed from the times, are not judged.
    """
    result = Comparison()
    for place in ("hardware", "request"):
        result.obstacles += list_differences(before[place], now[place], "machine" if place == "hardware" else place)
    result.versions = list_differences(before["versions"], now["versions"], "version")
    if result.obstacles:
        return result
    earlier, later = list_times(before), list_times(now)
    result.only_before = [name for name in earlier if name not in later]
    result.only_now = [name for name in later if name not in earlier]
    for name in earlier:
        if name in later and earlier[name].overlaps(later[name]):
            result.unchanged.append(name)
        elif name in later:
            result.changed.append(Change(name, earlier[name].median, later[name].median))
    return result


def list_differences(before: dict[str, Any], now: dict[str, Any], what: str) -> list[str]:
    """Keys whose values differ, in words."""
    keys = list(dict.fromkeys([*before, *now]))
    return [
        f"{what}: {key} was {before.get(key)} and is {now.get(key)}" for key in keys if before.get(key) != now.get(key)
    ]


def list_times(summary: dict[str, Any]) -> dict[str, Spread]:
    """The times of a measurement that are compared, seconds, by the name of the figure."""
    times = {}
    for row in summary["steps"]:
        case = Case(*(row[key] for key in Case._fields))
        times[f"step, {case}"] = read_spread(row["step_s"])
    threads = summary["plan"]["threads"]
    for row in summary["exchanges"]:
        name = f"exchange of {row['bytes']:,} bytes, {describe_ranks(row['ranks'], threads)}"
        times[name] = read_spread(row["exchange_s"])
    return times


def read_spread(row: dict[str, Any]) -> Spread:
    """Seconds as they were written. Raises KeyError, TypeError, ValueError where they are none."""
    median, q1, q3 = (float(row[key]) for key in ("median", "q1", "q3"))
    if not 0 < median < math.inf:
        raise ValueError(f"{median} is no time")
    return Spread(median, q1, q3, [])


def check_format(summary: Any, name: str) -> dict[str, Any]:
    """An earlier measurement, as it was read from a file of that name. Raises RequestError where it is none."""
    if not isinstance(summary, dict) or summary.get("format") != FORMAT:
        raise RequestError(f"--against {name} is not a file that this version's bench wrote with --output")
    try:
        compare(summary, summary)
    except (KeyError, TypeError, AttributeError, ValueError):
        raise RequestError(f"--against {name} lacks what bench writes, or has something else in its place") from None
    return summary
