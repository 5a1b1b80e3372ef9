"""Reading metrics.jsonl back: what a run consists of, whatever a crash left of its record."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from mnist_dist.run.logger import Logger
from mnist_dist.run.metrics import Eval, Record, Step, read_record
from mnist_dist.run.run_dir import RunDir


def written(folder: Path, *lines: tuple[str, dict[str, Any]]) -> Record:
    """What is read back of lines that the logger writes."""
    logger = Logger(RunDir(folder))
    for event, figures in lines:
        logger.log_metrics(event, **figures)
    for file in (logger._metrics, logger._log):
        file._file.close()
    return read_record(folder / "metrics.jsonl")


def start(step: int, world_size: int = 1) -> tuple[str, dict[str, Any]]:
    return "resume" if step else "start", {"step": step, "world_size": world_size, "torch": "2.11"}


def steps(first: int, last: int, loss: float) -> list[tuple[str, dict[str, Any]]]:
    figures = {"epoch": 0, "loss": loss, "lr": 0.1, "images_per_s": 1000.0}
    return [("step", {"step": step, **figures}) for step in range(first, last)]


def evaluation(step: int, accuracy: float) -> tuple[str, dict[str, Any]]:
    return "eval", {"step": step, "epoch": 0, "split": "test", "loss": 0.5, "accuracy": accuracy, "count": 200}


def test_what_a_run_writes_is_read_back(tmp_path: Path) -> None:
    done = ("done", {"step": 2, "seconds": 1.5, "accuracy": 0.75})
    record = written(tmp_path, start(0, world_size=4), *steps(0, 2, 2.5), evaluation(2, 0.75), done)
    assert record.steps == [Step(0, 0, 2.5, 0.1, 1000.0), Step(1, 0, 2.5, 0.1, 1000.0)]
    assert record.evals == [Eval(2, 0, "test", 0.5, 0.75, 200)]
    (begun,) = record.starts
    assert (begun.event, begun.step, begun.world_size, begun.facts["torch"]) == ("start", 0, 4, "2.11")
    assert record.end
    assert (record.end.event, record.end.step, record.end.seconds, record.end.reason) == ("done", 2, 1.5, "")
    assert record.num_unreadable == 0


def test_steps_that_were_trained_again_are_there_once(tmp_path: Path) -> None:
    """The second start goes on before where the first one had come to, and is itself killed earlier."""
    before = [start(0, 2), *steps(0, 10, 1.0), evaluation(5, 0.5), evaluation(10, 0.9)]
    record = written(tmp_path, *before, start(5), *steps(5, 7, 2.0))
    assert [(step.step, step.loss) for step in record.steps] == [(n, 1.0) for n in range(5)] + [(5, 2.0), (6, 2.0)]
    assert [each.step for each in record.evals] == [5]  # it is of the weights that were gone on from
    assert [(begun.step, begun.world_size) for begun in record.starts] == [(0, 2), (5, 1)]
    assert record.end is None


@pytest.mark.parametrize("event", ["stop", "failed"])
def test_how_a_run_ended(event: str, tmp_path: Path) -> None:
    record = written(tmp_path, start(0), (event, {"step": 7, "reason": "SIGTERM"}))
    assert record.end
    assert (record.end.event, record.end.step, record.end.reason) == (event, 7, "SIGTERM")
    assert written(tmp_path, start(7)).end is None  # it runs again


def test_a_figure_that_is_not_finite_is_nan(tmp_path: Path) -> None:
    (step,) = written(tmp_path, *steps(0, 1, math.inf)).steps
    assert math.isnan(step.loss)
    assert step.lr == 0.1


def test_a_last_line_that_is_cut_is_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    written(tmp_path, start(0), *steps(0, 3, 1.0))
    whole = path.read_bytes()
    last = whole.rindex(b"{")
    for end in range(last + 1, len(whole) - 1):
        path.write_bytes(whole[:end])
        record = read_record(path)
        assert (len(record.steps), record.num_unreadable) == (2, 1), whole[last:end]
    path.write_bytes(whole[:-1])
    assert len(read_record(path).steps) == 3  # only the end of the line is missing
    path.write_bytes(whole[: last + 20])
    record = written(tmp_path, *steps(3, 4, 1.0))  # after a crash the next start goes on in a new line
    assert ([step.step for step in record.steps], record.num_unreadable) == ([0, 1, 3], 1)


@pytest.mark.parametrize(
    "line",
    [
        "",
        "\x00\x00",
        "[1]",
        "7",
        '"event"',
        "{}",
        '{"event": "step"}',
        '{"event": "step", "step": "7", "epoch": 0, "loss": 1, "lr": 1, "images_per_s": 1}',
        '{"event": "step", "step": true, "epoch": 0, "loss": 1, "lr": 1, "images_per_s": 1}',
        '{"event": "step", "step": -1, "epoch": 0, "loss": 1, "lr": 1, "images_per_s": 1}',
        '{"event": "step", "step": 1, "epoch": 0, "loss": "low", "lr": 1, "images_per_s": 1}',
        '{"event": "step", "step": 1, "epoch": 0, "loss": ' + "9" * 400 + ', "lr": 1, "images_per_s": 1}',
        '{"event": "step", "step": 1, "epoch": 0, "loss": ' + "9" * 5000 + ', "lr": 1, "images_per_s": 1}',
        '{"event": "start", "step": 0}',
        '{"event": "eval", "step": 1, "epoch": 0, "split": "test", "loss": 1, "accuracy": 1.5, "count": 200}',
        '{"event": "eval", "step": 1, "epoch": 0, "split": "test", "loss": 1, "accuracy": NaN, "count": 200}',
        '{"event": "eval", "step": 1, "epoch": 0, "split": "test", "loss": 1, "accuracy": 0.5, "count": 0}',
        "[" * 100_000,
    ],
    ids=lambda line: line[:60],
)
def test_a_line_that_does_not_hold_what_it_should_is_counted(line: str, tmp_path: Path) -> None:
    good = json.dumps({"event": "step", "step": 0, "epoch": 0, "loss": 1, "lr": 1, "images_per_s": 1})
    (tmp_path / "metrics.jsonl").write_text(f"{good}\n{line}\n{good}\n")
    record = read_record(tmp_path / "metrics.jsonl")
    assert (len(record.steps), record.num_unreadable) == (2, 1)
    assert (record.history, record.evals) == ([], [])


def test_an_event_of_a_later_version_is_passed_over(tmp_path: Path) -> None:
    record = written(tmp_path, start(0), ("weather", {"rain": True}), *steps(0, 1, 1.0))
    assert (len(record.steps), record.num_unreadable) == (1, 0)
