"""metrics.jsonl is strict, a log file holds plain lines, and a terminal's bar leaves nothing behind."""

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
from mnist_dist.run.logger import Journal, warn
from tests.conftest import REPOSITORY, clean_environment

# A small run, as `train` would report it.
REPORT = """
import sys, time
from pathlib import Path
from types import SimpleNamespace
from mnist_dist.run import logger as journal
journal.LINE_EVERY_S = 0
j = journal.Journal(Path(sys.argv[1]))
j.say("before the bar")
j.start_progress(100, 0)
for step in (25, 50):
    j.progress(0, 2, step, 100, 0.5, 12345.6)
    time.sleep(0.15)  # the bar is drawn ten times a second
j.epoch(0, 50, 0.25, "test", SimpleNamespace(loss=0.125, accuracy=0.9876), 1.5)
j.progress(1, 2, 75, 100, 0.25, 12345.6)
time.sleep(0.15)
j.stop_progress()
j.say("after the bar")
"""
CONTROL = re.compile(r"[^\n\x20-\x7e\x80-\U0010ffff]")


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Journal]]:
    """Starts a journal in tmp_path, as on no terminal; its files are closed after the test."""
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    with contextlib.ExitStack() as stack:

        def start(**options: Any) -> Journal:
            journal = Journal(tmp_path, **options)
            for file in (journal._metrics, journal._log):
                stack.callback(file.close)
            return journal

        yield start


def strict_lines(path: Path) -> list[Any]:
    """The objects of a file of lines, where NaN and Infinity are no JSON."""

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is no JSON")

    text = path.read_text(encoding="utf-8")
    assert text.endswith("\n")
    return [json.loads(line, parse_constant=refuse) for line in text.removesuffix("\n").split("\n")]


def test_a_record_is_one_line_with_the_event_first_and_floats_in_full(
    start: Callable[..., Journal], tmp_path: Path
) -> None:
    journal = start()
    journal.record("step", step=0, epoch=0, loss=0.1 + 0.2, lr=1e-3)
    journal.record("start", hosts=["a", "b"], text='two\nlines "quoted" ü', nothing=None, whole=3)
    records = strict_lines(tmp_path / "metrics.jsonl")
    assert records == [
        {"event": "step", "step": 0, "epoch": 0, "loss": 0.30000000000000004, "lr": 0.001},
        {"event": "start", "hosts": ["a", "b"], "text": 'two\nlines "quoted" ü', "nothing": None, "whole": 3},
    ]
    assert [next(iter(record)) for record in records] == ["event", "event"]


@pytest.mark.parametrize("loss", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_is_null(start: Callable[..., Journal], tmp_path: Path, loss: float) -> None:
    start().record("step", step=1, loss=loss, lr=0.5)
    assert strict_lines(tmp_path / "metrics.jsonl") == [{"event": "step", "step": 1, "loss": None, "lr": 0.5}]


def test_each_record_is_in_the_file_at_once(start: Callable[..., Journal], tmp_path: Path) -> None:
    journal = start()
    for step in range(3):
        journal.record("step", step=step)
        assert len(strict_lines(tmp_path / "metrics.jsonl")) == step + 1
        journal.say(f"line {step}")
        assert len((tmp_path / "console.log").read_text().splitlines()) == step + 1


def test_a_second_start_goes_on_in_the_same_files(start: Callable[..., Journal], tmp_path: Path) -> None:
    for step in (0, 1):
        journal = start()
        journal.record("step", step=step)
        journal.say(f"start {step}")
    assert [record["step"] for record in strict_lines(tmp_path / "metrics.jsonl")] == [0, 1]
    log = (tmp_path / "console.log").read_text().splitlines()
    assert [line[len("2025-01-02 03:04:05 ") :] for line in log] == ["start 0", "start 1"]


@pytest.mark.parametrize("whole", [b"", b'{"event": "step", "step": 0}\n'])
@pytest.mark.parametrize("half", [b'{"event": "st', b"\0\0\0\0"])
def test_a_half_written_last_line_is_ended(
    start: Callable[..., Journal], tmp_path: Path, whole: bytes, half: bytes
) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(whole + half)
    start().record("step", step=1)
    assert path.read_bytes() == whole + half + b'\n{"event": "step", "step": 1}\n'


def test_a_whole_last_line_is_left_as_it_is(start: Callable[..., Journal], tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    (tmp_path / "console.log").write_text("")
    start()
    assert (tmp_path / "metrics.jsonl").read_text() == "{}\n"
    assert (tmp_path / "console.log").read_text() == ""


def test_a_full_disk_is_an_oserror_that_names_the_file(start: Callable[..., Journal], tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left") as raised:
        start().record("step", step=0)
    assert raised.value.filename == str(tmp_path / "metrics.jsonl")


def test_trackers_get_the_floats_of_steps_and_evaluations(start: Callable[..., Journal]) -> None:
    tracked: list[tuple[dict[str, float], int]] = []
    journal = start(track=lambda numbers, step: tracked.append((numbers, step)))
    journal.record("start", step=0, seconds=1.0)
    journal.record("step", step=3, epoch=1, loss=0.5, lr=0.25)
    journal.record("eval", step=4, epoch=1, split="test", loss=0.75, accuracy=0.5, count=10)
    journal.record("done", step=4, accuracy=0.5)
    assert tracked == [
        ({"train/loss": 0.5, "train/lr": 0.25}, 3),
        ({"test/loss": 0.75, "test/accuracy": 0.5}, 4),
    ]


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
    start: Callable[..., Journal], tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    start().say(text)
    assert capsys.readouterr().out == f"{text}\n"
    stamp, line = re.fullmatch(r"(\S+ \S+) (.*)\n", (tmp_path / "console.log").read_text()).groups()  # type: ignore[union-attr]
    assert line == text
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d", stamp)


def test_progress_in_a_log_is_a_line_now_and_then(
    start: Callable[..., Journal], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now_s = 100.0
    monkeypatch.setattr(module.time, "monotonic", lambda: now_s)
    journal = start()
    journal.start_progress(1000, 0)
    for second in range(16):
        now_s = 100.0 + second
        journal.progress(0, 3, second, 1000, 0.12345, 54321.0)
    journal.stop_progress()
    assert capsys.readouterr().out.splitlines() == [
        f"epoch 1/3  step {step}/1000  loss 0.1235  54,321 images/s" for step in (5, 10, 15)
    ]


def test_epochs_are_rows_under_one_head(start: Callable[..., Journal], capsys: pytest.CaptureFixture[str]) -> None:
    journal = start()
    for epoch in range(2):
        journal.epoch(
            epoch, 938 * (epoch + 1), 0.25, "validation", SimpleNamespace(loss=0.125, accuracy=0.98765), 12.34
        )
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
    lines = output.splitlines()
    assert lines[0] == "before the bar"
    assert "epoch 1/2  step 25/100  loss 0.5000  12,346 images/s" in lines
    assert lines[-1] == "after the bar"
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
    log = (tmp_path / "console.log").read_text()
    assert CONTROL.findall(log) == []
    assert [line[len("2025-01-02 03:04:05 ") :] for line in log.splitlines()] == lines


def test_a_terminal_without_cursor_movement_gets_lines_instead_of_a_bar(tmp_path: Path) -> None:
    command = [sys.executable, "-c", REPORT, str(tmp_path)]
    output = on_a_terminal(command, PYTHONPATH=str(REPOSITORY), TERM="dumb", COLUMNS="120")
    assert CONTROL.findall(output.replace("\r\n", "\n")) == []
    assert "epoch 1/2  step 25/100  loss 0.5000  12,346 images/s" in output
