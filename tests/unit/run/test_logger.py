"""metrics.jsonl is strict, a log file holds plain lines, a bar leaves nothing behind, and no failure ends a run."""

import contextlib
import json
import os
import pty
import re
import select
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mnist_dist.run import logger as module
from mnist_dist.run.logger import Logger, NullLogger, warn
from mnist_dist.run.run_dir import RunDir
from tests.conftest import REPOSITORY, clean_environment

# A small run, as `train` would report it.
REPORT = """
import sys, time
from pathlib import Path
from types import SimpleNamespace
from mnist_dist.run import logger as module
from mnist_dist.run.run_dir import RunDir
module.LINE_EVERY_S = 0
logger = module.Logger(RunDir(Path(sys.argv[1])))
logger.info("before the bar")
logger.start_progress(100, 0)
for step in (25, 50):
    logger.log_progress("1/2", step, 0.5, 12345.6)
    time.sleep(0.15)  # the bar is drawn ten times a second
logger.log_epoch(0, 50, 0.25, "test", SimpleNamespace(loss=0.125, accuracy=0.9876), 1.5)
logger.log_progress("2/2", 75, 0.25, 12345.6)
time.sleep(0.15)
logger.stop_progress()
logger.info("after the bar")
logger.log_metrics("done", step=75)
"""
SAID = [  # in console.log, where there is no bar
    "before the bar",
    "epoch 1/2  step 25/100  loss 0.5000  12,346 images/s",
    "epoch 1/2  step 50/100  loss 0.5000  12,346 images/s",
    "epoch     step  train loss        test loss        test accuracy        s",
    "    1       50      0.2500           0.1250              98.76 %      1.5",
    "epoch 2/2  step 75/100  loss 0.2500  12,346 images/s",
    "after the bar",
]
CONTROL = re.compile(r"[^\n\x20-\x7e\x80-\U0010ffff]")


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], Logger]]:
    """Starts a logger in tmp_path, as on no terminal; its files are closed after the test."""
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    with contextlib.ExitStack() as stack:

        def start() -> Logger:
            logger = Logger(RunDir(tmp_path))
            for lines in (logger._metrics, logger._log):
                stack.callback(lines._file.close)
            return logger

        yield start


def said(folder: Path) -> list[str]:
    """The lines of console.log without their times."""
    return [line[len("2025-01-02 03:04:05 ") :] for line in (folder / "console.log").read_text().splitlines()]


def strict_lines(path: Path) -> list[Any]:
    """The objects of a file of lines, where NaN and Infinity are no JSON."""

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is no JSON")

    text = path.read_text(encoding="utf-8")
    assert text.endswith("\n")
    return [json.loads(line, parse_constant=refuse) for line in text.removesuffix("\n").split("\n")]


def test_a_record_is_one_line_with_the_event_first_and_floats_in_full(
    start: Callable[[], Logger], tmp_path: Path
) -> None:
    logger = start()
    logger.log_metrics("step", step=0, epoch=0, loss=0.1 + 0.2, lr=1e-3)
    logger.log_metrics("start", hosts=["a", "b"], text='two\nlines "quoted" ü', nothing=None, whole=3)
    records = strict_lines(tmp_path / "metrics.jsonl")
    assert records == [
        {"event": "step", "step": 0, "epoch": 0, "loss": 0.30000000000000004, "lr": 0.001},
        {"event": "start", "hosts": ["a", "b"], "text": 'two\nlines "quoted" ü', "nothing": None, "whole": 3},
    ]
    assert [next(iter(record)) for record in records] == ["event", "event"]


@pytest.mark.parametrize("loss", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_is_null(start: Callable[[], Logger], tmp_path: Path, loss: float) -> None:
    start().log_metrics("step", step=1, loss=loss, lr=0.5)
    assert strict_lines(tmp_path / "metrics.jsonl") == [{"event": "step", "step": 1, "loss": None, "lr": 0.5}]


def test_each_record_is_in_the_file_at_once(start: Callable[[], Logger], tmp_path: Path) -> None:
    logger = start()
    for step in range(3):
        logger.log_metrics("step", step=step)
        assert len(strict_lines(tmp_path / "metrics.jsonl")) == step + 1
        logger.info(f"line {step}")
        assert len((tmp_path / "console.log").read_text().splitlines()) == step + 1


def test_a_second_start_goes_on_in_the_same_files(start: Callable[[], Logger], tmp_path: Path) -> None:
    for step in (0, 1):
        logger = start()
        logger.log_metrics("step", step=step)
        logger.info(f"start {step}")
    assert [record["step"] for record in strict_lines(tmp_path / "metrics.jsonl")] == [0, 1]
    assert said(tmp_path) == ["start 0", "start 1"]


@pytest.mark.parametrize("whole", [b"", b'{"event": "step", "step": 0}\n'])
@pytest.mark.parametrize("half", [b'{"event": "st', b"\0\0\0\0"])
def test_a_half_written_last_line_is_ended(
    start: Callable[[], Logger], tmp_path: Path, whole: bytes, half: bytes
) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(whole + half)
    start().log_metrics("step", step=1)
    assert path.read_bytes() == whole + half + b'\n{"event": "step", "step": 1}\n'


def test_a_whole_last_line_is_left_as_it_is(start: Callable[[], Logger], tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    (tmp_path / "console.log").write_text("")
    start()
    assert (tmp_path / "metrics.jsonl").read_text() == "{}\n"
    assert (tmp_path / "console.log").read_text() == ""


@pytest.mark.parametrize("full", ["metrics.jsonl", "console.log"])
def test_a_file_that_cannot_be_written_is_remembered_and_the_others_go_on(
    full: str, start: Callable[[], Logger], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / full).symlink_to("/dev/full")
    logger = start()
    assert logger.failure == ""
    for step in range(2):
        logger.log_metrics("step", step=step)
        logger.info(f"line {step}")
    assert logger.failure == f"{tmp_path / full} could not be written: No space left on device"
    assert capsys.readouterr().out == "line 0\nline 1\n"
    if full == "metrics.jsonl":
        assert said(tmp_path) == ["line 0", "line 1"]
    else:
        assert [record["step"] for record in strict_lines(tmp_path / "metrics.jsonl")] == [0, 1]


def test_the_first_of_several_failures_is_remembered(start: Callable[[], Logger], tmp_path: Path) -> None:
    for name in ("metrics.jsonl", "console.log"):
        (tmp_path / name).symlink_to("/dev/full")
    logger = start()
    logger.info("line")
    logger.log_metrics("step", step=0)
    assert logger.failure == f"{tmp_path}/console.log could not be written: No space left on device"


def test_files_that_cannot_be_opened_are_an_oserror(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(IsADirectoryError):
        Logger(RunDir(tmp_path))


def test_a_line_for_which_there_is_no_room_is_not_half_there(tmp_path: Path) -> None:
    program = """
import resource, sys
from pathlib import Path
from mnist_dist.run.logger import Logger
from mnist_dist.run.run_dir import RunDir
logger = Logger(RunDir(Path(sys.argv[1])))
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
for step in range(100):
    logger.log_metrics("step", step=step)
assert logger.failure.endswith("metrics.jsonl could not be written: File too large"), logger.failure
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
logger.log_metrics("last")
"""
    environment = clean_environment(PYTHONPATH=str(REPOSITORY))
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], env=environment, check=True)
    *steps, last = strict_lines(tmp_path / "metrics.jsonl")
    assert last == {"event": "last"}
    assert 10 < len(steps) < 100
    assert [record["step"] for record in steps] == list(range(len(steps)))


def _end_of_a_pipe_that_nobody_reads() -> int:
    reader, writer = os.pipe()
    os.close(reader)
    return writer


@pytest.mark.parametrize(
    "open_console",
    [_end_of_a_pipe_that_nobody_reads, lambda: os.open("/dev/full", os.O_WRONLY)],
    ids=["its reader is gone", "its disk is full"],
)
@pytest.mark.parametrize("buffered", ["", "1"], ids=["buffered", "unbuffered"])
def test_a_console_that_fails_is_dropped(open_console: Callable[[], int], buffered: str, tmp_path: Path) -> None:
    command = [sys.executable, "-c", REPORT, str(tmp_path)]
    environment = clean_environment(PYTHONPATH=str(REPOSITORY), PYTHONUNBUFFERED=buffered)
    console = open_console()
    result = subprocess.run(command, env=environment, stdout=console, stderr=subprocess.PIPE)
    os.close(console)
    assert (result.returncode, result.stderr) == (0, b"")  # at the interpreter's end neither
    assert said(tmp_path) == SAID
    assert strict_lines(tmp_path / "metrics.jsonl") == [{"event": "done", "step": 75}]


def test_a_console_that_was_closed_at_the_start_is_none(tmp_path: Path) -> None:
    command = ["sh", "-c", 'exec "$@" >&-', "sh", sys.executable, "-c", REPORT, str(tmp_path)]
    result = subprocess.run(command, env=clean_environment(PYTHONPATH=str(REPOSITORY)), stderr=subprocess.PIPE)
    assert (result.returncode, result.stderr) == (0, b"")
    assert said(tmp_path) == SAID


def test_trackers_get_the_floats_of_steps_and_evaluations(start: Callable[[], Logger]) -> None:
    tracked: list[tuple[dict[str, Any], int]] = []
    logger = start()
    logger.log_metrics("step", step=2, loss=1.0)  # before there is a tracker
    logger.start_tracking(lambda numbers, step: tracked.append((numbers, step)))
    logger.log_metrics("start", step=0, seconds=1.0)
    logger.log_metrics("step", step=3, epoch=1, loss=0.5, lr=0.25)
    logger.log_metrics("eval", step=4, epoch=1, split="test", loss=0.75, accuracy=0.5, count=10)
    logger.log_metrics("done", step=4, accuracy=0.5)
    assert tracked == [
        ({"train/loss": 0.5, "train/lr": 0.25}, 3),
        ({"test/loss": 0.75, "test/accuracy": 0.5}, 4),
    ]


@pytest.mark.parametrize(
    ("error", "reason"),
    [(ValueError("no network\nand a stack"), "no network"), (KeyError(), "KeyError"), (OSError(28, "full"), "full")],
)
def test_a_tracker_that_fails_is_dropped_with_a_warning(
    error: Exception, reason: str, start: Callable[[], Logger], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    steps: list[int] = []

    def track(_: dict[str, Any], step: int) -> None:
        steps.append(step)
        if step == 1:
            raise error

    logger = start()
    logger.start_tracking(track)
    for step in range(4):
        logger.log_metrics("step", step=step, loss=0.5)
    assert steps == [0, 1]
    assert [record["step"] for record in strict_lines(tmp_path / "metrics.jsonl")] == [0, 1, 2, 3]
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("WARNING: the tracker fails and is dropped; metrics.jsonl goes on: ")
    assert line.endswith(reason)
    assert said(tmp_path) == [line]
    assert logger.failure == ""


def test_a_line_for_console_log_alone_is_not_on_the_console(
    start: Callable[[], Logger], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start().log_line("[red]as it stands")
    assert capsys.readouterr().out == ""
    assert said(tmp_path) == ["[red]as it stands"]


def test_a_rank_without_a_record_says_and_writes_nothing(cwd: Path, capsys: pytest.CaptureFixture[str]) -> None:
    logger = NullLogger()
    logger.info("line")
    logger.log_line("line")
    logger.start_tracking(lambda *_: pytest.fail("it was tracked"))
    logger.log_metrics("step", step=0, loss=1.0)
    logger.start_progress(10, 0)
    logger.log_progress("1/1", 5, 0.5, 1.0)
    logger.log_epoch(0, 5, 0.5, "test", SimpleNamespace(loss=0.5, accuracy=0.5), 1.0)
    logger.stop_progress()
    assert logger.failure == ""
    assert capsys.readouterr() == ("", "")
    assert list(cwd.iterdir()) == []
    public = {name for name, value in vars(Logger).items() if callable(value) and not name.startswith("_")}
    assert public <= vars(NullLogger).keys()  # nothing can be asked of rank 0's that the others do not have


@pytest.mark.parametrize(
    "text",
    [
        "x" * 500,
        "[bold]not markup[/bold] [/] [red]",
        "in runs/a:dog:b, from 1:100:2",  # no emoji either
        "12,345 images at 0.5 'quoted' https://example.org ü",
    ],
)
def test_text_is_said_as_it_stands(
    start: Callable[[], Logger], tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    start().info(text)
    assert capsys.readouterr().out == f"{text}\n"
    stamp, line = re.fullmatch(r"(\S+ \S+) (.*)\n", (tmp_path / "console.log").read_text()).groups()  # type: ignore[union-attr]
    assert line == text
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d", stamp)


def test_progress_in_a_log_is_a_line_now_and_then(
    start: Callable[[], Logger], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now_s = 100.0
    monkeypatch.setattr(module.time, "monotonic", lambda: now_s)
    logger = start()
    logger.start_progress(1000, 0)
    for second in range(16):
        now_s = 100.0 + second
        logger.log_progress("1/3", second, 0.12345, 54321.0)
    logger.stop_progress()
    assert capsys.readouterr().out.splitlines() == [
        f"epoch 1/3  step {step}/1000  loss 0.1235  54,321 images/s" for step in (5, 10, 15)
    ]


def test_epochs_are_rows_under_one_head(start: Callable[[], Logger], capsys: pytest.CaptureFixture[str]) -> None:
    logger = start()
    for epoch in range(2):
        evaluation = SimpleNamespace(loss=0.125, accuracy=0.98765)
        logger.log_epoch(epoch, 938 * (epoch + 1), 0.25, "validation", evaluation, 12.34)
    head, *rows = capsys.readouterr().out.splitlines()
    assert head.split() == ["epoch", "step", "train", "loss", "validation", "loss", "validation", "accuracy", "s"]
    assert [row.split() for row in rows] == [
        ["1", "938", "0.2500", "0.1250", "98.77", "%", "12.3"],
        ["2", "1876", "0.2500", "0.1250", "98.77", "%", "12.3"],
    ]
    assert {len(row) for row in rows} == {len(head)}  # the columns stand under their names


def test_a_warning_goes_to_the_standard_error_stream(capsys: pytest.CaptureFixture[str]) -> None:
    warn("careful")
    assert capsys.readouterr() == ("", "careful\n")


@pytest.mark.parametrize("setting", [{}, {"TERM": "xterm-256color"}, {"FORCE_COLOR": "1"}], ids=str)
def test_there_are_no_control_characters_where_there_is_no_terminal(tmp_path: Path, setting: dict[str, str]) -> None:
    command = [sys.executable, "-c", REPORT, str(tmp_path)]
    environment = clean_environment(PYTHONPATH=str(REPOSITORY), **setting)
    result = subprocess.run(command, env=environment, capture_output=True, check=True)
    assert result.stderr == b""
    output = result.stdout.decode()
    assert CONTROL.findall(output) == []
    assert output.splitlines() == SAID
    assert CONTROL.findall((tmp_path / "console.log").read_text()) == []


def screen(output: str) -> str:
    """What a terminal that got this output shows in the end. Knows just the control characters that the bar uses."""
    rows, y, x = [""], 0, 0
    for token in re.findall(r"\x1b\[[?0-9;]*[a-zA-Z]|\r|\n|[^\x1b\r\n]+", output):
        if token == "\r":
            x = 0
        elif token == "\n":
            y += 1
            rows += [""] * (y == len(rows))
        elif not token.startswith("\x1b"):
            rows[y] = rows[y][:x].ljust(x) + token + rows[y][x + len(token) :]
            x += len(token)
        elif token.endswith("A"):
            y -= int(token[2:-1])
        elif token == "\x1b[2K":
            rows[y] = ""
        else:
            assert token[-1] in "mhl", f"a control sequence that this screen does not know: {token!r}"
    return "\n".join(row.rstrip() for row in rows).rstrip("\n")


def on_a_terminal(command: list[str], **environment: str) -> str:
    """Run a command on a terminal of its own and return what it wrote there."""
    ours, its = pty.openpty()
    try:
        process = subprocess.Popen(command, env=clean_environment(**environment), stdout=its, stderr=its)
        os.close(its)
        chunks = []
        while select.select([ours], [], [], 60)[0]:
            try:
                chunks.append(os.read(ours, 65536))
            except OSError:  # so Linux says that the other side is closed
                break
        assert process.wait(60) == 0, b"".join(chunks).decode()
    finally:
        os.close(ours)
    return b"".join(chunks).decode()


def test_a_terminal_shows_a_bar_and_keeps_none_of_it(tmp_path: Path) -> None:
    output = on_a_terminal(
        [sys.executable, "-c", REPORT, str(tmp_path)],
        PYTHONPATH=str(REPOSITORY),
        TERM="xterm-256color",
        COLUMNS="120",
    )
    plain = re.sub(r"\x1b\[[?0-9;]*[a-zA-Z]", "", output)
    for drawn in ("━", "25/100", "50/100", "75/100", "epoch 2/2  loss 0.2500  12,346 images/s"):
        assert drawn in plain
    lines = screen(output).splitlines()
    assert [line.split()[0] for line in lines] == ["before", "epoch", "1", "after"]
    assert "━" not in "".join(lines)
    assert output.rfind("\x1b[?25h") > output.rfind("\x1b[?25l")  # the cursor is visible again
    # and console.log is the same as without a terminal, but for the progress
    assert CONTROL.findall((tmp_path / "console.log").read_text()) == []
    assert said(tmp_path) == lines == [line for line in SAID if "images/s" not in line]


def test_a_narrow_terminal_shows_the_steps_and_the_bar_alone(tmp_path: Path) -> None:
    output = on_a_terminal(
        [sys.executable, "-c", REPORT, str(tmp_path)], PYTHONPATH=str(REPOSITORY), TERM="xterm-256color", COLUMNS="40"
    )
    plain = re.sub(r"\x1b\[[?0-9;]*[a-zA-Z]", "", output)
    assert "25/100" in plain
    assert "━" in plain
    assert "images/s" not in plain


def test_a_terminal_of_no_width_is_no_crash(tmp_path: Path) -> None:
    output = on_a_terminal(
        [sys.executable, "-c", REPORT, str(tmp_path)], PYTHONPATH=str(REPOSITORY), TERM="xterm-256color", COLUMNS="0"
    )
    assert "after the bar" in output


def test_a_terminal_without_cursor_movement_gets_lines_instead_of_a_bar(tmp_path: Path) -> None:
    command = [sys.executable, "-c", REPORT, str(tmp_path)]
    output = on_a_terminal(command, PYTHONPATH=str(REPOSITORY), TERM="dumb", COLUMNS="120")
    assert CONTROL.findall(output.replace("\r\n", "\n")) == []
    assert "epoch 1/2  step 25/100  loss 0.5000  12,346 images/s" in output
