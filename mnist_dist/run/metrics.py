"""The record of a run, read back from metrics.jsonl: whatever a crash left of it.

A line that was cut short, and one that does not hold what it should, is counted and passed over; an event that this
version does not know is passed over.
"""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_MAX_COUNT = 2**53  # what a count is at most, so that it is exact as a float


@dataclass(frozen=True)
class Start:
    """A `start` or `resume` line: ranks began to train."""

    event: str
    step: int
    world_size: int
    facts: dict[str, Any]  # the whole line: versions, commit, device, precision


@dataclass(frozen=True)
class End:
    """A `done`, `stop` or `failed` line: the last one of a start that could still write it."""

    event: str
    step: int
    reason: str  # empty for `done`
    seconds: float | None  # of training, for `done`


@dataclass(frozen=True)
class Step:
    """A `step` line. Figures that were not finite are NaN."""

    step: int
    epoch: int
    loss: float  # mean over the global batch, nats
    lr: float
    images_per_s: float


@dataclass(frozen=True)
class Eval:
    """An `eval` line."""

    step: int  # how many were trained
    epoch: int
    split: str
    loss: float  # nats
    accuracy: float  # between 0 and 1
    count: int


@dataclass
class Record:
    """What a run consists of: the steps that a resume did again are there once, as they were the last time."""

    history: list[Start | End] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    evals: list[Eval] = field(default_factory=list)
    num_unreadable: int = 0  # lines

    @property
    def starts(self) -> list[Start]:
        """The starts, in their order."""
        return [event for event in self.history if isinstance(event, Start)]

    @property
    def end(self) -> End | None:
        """How the last start ended, or None where it was killed or still runs."""
        last = self.history[-1] if self.history else None
        return last if isinstance(last, End) else None


def read_record(path: Path) -> Record:
    """Read a metrics.jsonl. Raises OSError."""
    record = Record()
    with path.open("rb") as file:
        for line in file:
            try:
                _add(record, json.loads(line))
            except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
                record.num_unreadable += 1
    return record


def _add(record: Record, line: dict[str, Any]) -> None:
    match line["event"]:
        case "start" | "resume" as event:
            start = Start(event, _count(line, "step"), _count(line, "world_size"), line)
            record.history.append(start)
            record.steps = [step for step in record.steps if step.step < start.step]
            record.evals = [each for each in record.evals if each.step <= start.step]
        case "step":
            figures = (_number(line, key) for key in ("loss", "lr", "images_per_s"))
            record.steps.append(Step(_count(line, "step"), _count(line, "epoch"), *figures))
        case "eval":
            accuracy, count = _number(line, "accuracy"), _count(line, "count")
            if not (0 <= accuracy <= 1 and count):
                raise ValueError(accuracy, count)
            where = (_count(line, "step"), _count(line, "epoch"), str(line["split"]))
            record.evals.append(Eval(*where, _number(line, "loss"), accuracy, count))
        case "done" | "stop" | "failed" as event:
            seconds = _number(line, "seconds") if event == "done" else None
            record.history.append(End(event, _count(line, "step"), str(line.get("reason", "")), seconds))


def _count(line: dict[str, Any], key: str) -> int:
    value = line[key]
    if type(value) is not int or not 0 <= value < _MAX_COUNT:
        raise ValueError(key, value)
    return value


def _number(line: dict[str, Any], key: str) -> float:
    value = line[key]
    if value is None:  # it was not finite, which JSON cannot say
        return math.nan
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(key, value)
    return float(value) if math.isfinite(value) else math.nan
