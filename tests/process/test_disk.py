"""A disk that is full, read-only or gone ends a run with one sentence, and what was good stays good.

The disks are small file systems of their own where this process may mount them (root on a machine of its own may, in
most containers it may not); a limit on the size of a file stands in for a quota everywhere.
"""

import functools
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from safetensors.torch import load_file

from mnist_dist.run import checkpoint
from mnist_dist.run.run_dir import RunDir
from tests.conftest import (
    TRAIN,
    Result,
    become,
    clean_environment,
    has_steps,
    losses,
    metrics,
    run_ranks,
    skip,
    start_ranks,
    start_verb,
    wait_for,
    wait_ranks,
)
from tests.disks import PAGE_BYTES, can_mount, fill, read_only, resize, small_disk

# Four steps an epoch, a checkpoint after each.
RUN = ["dataset=synthetic", "precision=fp32", "threads=1", "log_every_steps=1", "batch_size=250", "timeout_s=60"]
RUN += ["optimizer=sgd", "lr=2e-3"]
FIRST, SECOND, LAST = 4, 8, 12
PLENTY = 10_000  # pages
RECORDS = 16  # pages; more than lock, configuration, versions, metrics and console take in these runs


def name(step: int) -> str:
    return f"step-{step:08d}"


@pytest.fixture(scope="module")
def straight(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undisturbed run."""
    folder = tmp_path_factory.mktemp("straight")
    result = run_ranks([*RUN, f"data_dir={data_dir}", "epochs=3", "run_dir=run"], folder)
    assert result.code == 0, result.output
    return folder / "run"


@pytest.fixture(scope="module")
def checkpoint_pages(straight: Path) -> int:
    """How much room a checkpoint takes."""
    return sum(-(-file.stat().st_size // PAGE_BYTES) for file in (straight / "checkpoints" / name(LAST)).iterdir())


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, with plenty of room at first."""
    if not can_mount():
        skip("mount", "nothing can be mounted here")
    with small_disk(tmp_path / "disk", PLENTY) as folder:
        yield folder


def sentence(result: Result) -> str:
    """The one sentence with which a run went wrong, exit code 1."""
    assert result.code == 1, result.output
    assert "Traceback" not in result.output
    assert "Exception" not in result.output
    (line,) = [line for line in result.output.splitlines() if line.startswith("mnist-dist: ")]
    return line.removeprefix("mnist-dist: ")


def check_good(run_dir: Path, *steps: int) -> None:
    """Just these checkpoints are there, whole, and nothing half-written."""
    folder = run_dir / "checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == [name(step) for step in steps]
    for step in steps:
        assert checkpoint.read(folder / name(step)).step == step


def check_end(result: Result, run_dir: Path, straight: Path, world_size: int = 1) -> None:
    """The run finished with the undisturbed run's weights."""
    assert result.code == 0, result.output
    assert RunDir(run_dir).done_step() == LAST
    one, other = (load_file(path / "checkpoints" / name(LAST) / checkpoint.MODEL) for path in (run_dir, straight))
    tolerance = 0 if world_size == 1 else 1e-5
    assert max(float((tensor - other[key]).abs().max()) for key, tensor in one.items()) <= tolerance


def lines(run_dir: Path) -> list[str]:
    """What console.log says, without times and figures of time, and without the lines that a slow run adds."""
    text = re.sub(r".* epoch \d+/.*\n", "", (run_dir / "console.log").read_text())
    return [re.sub(r"\d+\.\d s|\d+\.\d$", "", line)[20:] for line in text.splitlines()]


# --- full ---


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_disk_that_is_full_in_a_save(
    world_size: int, straight: Path, checkpoint_pages: int, disk: Path, data_dir: Path, tmp_path: Path
) -> None:
    resize(disk, checkpoint_pages * 3 // 2 + RECORDS)  # room for one checkpoint and half of the next
    arguments = [*RUN, f"data_dir={data_dir}", "epochs=3", "run_dir=disk/run"]
    result = run_ranks(arguments, tmp_path, world_size=world_size)
    reason = sentence(result)
    assert reason == (
        f"the checkpoint of step {SECOND} could not be written: No space left on device; "
        f"the last good one is disk/run/checkpoints/{name(FIRST)}"
    )
    check_good(disk / "run", FIRST)
    failed = metrics(disk / "run", "failed")[0]
    assert (failed["cause"], failed["reason"]) == ("storage", reason)
    assert RunDir(disk / "run").done_step() is None

    result = run_ranks(arguments, tmp_path, world_size=world_size)
    assert f"the checkpoint of step {SECOND} could not be written" in sentence(result)  # as long as it is full
    check_good(disk / "run", FIRST)

    resize(disk, PLENTY)
    check_end(run_ranks(arguments, tmp_path, world_size=world_size), disk / "run", straight, world_size)
    assert losses(disk / "run") == pytest.approx(losses(straight), abs=0 if world_size == 1 else 1e-5)


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize(("file", "room"), [("metrics.jsonl", 1200), ("console.log", 600)])
def test_a_disk_that_is_full_at_a_line_of_the_record(
    file: str, room: int, world_size: int, straight: Path, disk: Path, data_dir: Path, tmp_path: Path
) -> None:
    """Only the record's disk is full, so the checkpoint that is then due can still be written."""
    resize(disk, 1)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / file).symlink_to(disk / file)
    (disk / file).write_text("x" * (PAGE_BYTES - room) + "\n")  # room for the start, not for the end
    arguments = [*RUN, f"data_dir={data_dir}", "epochs=30", "run_dir=run"]
    reason = sentence(run_ranks(arguments, tmp_path, world_size=world_size))
    found = checkpoint.newest(tmp_path / "run/checkpoints", pytest.fail)
    assert found
    assert reason == (
        f"run/{file} could not be written: No space left on device; the last good checkpoint is run/checkpoints/"
        f"{found.path.name}"
    )
    assert (disk / file).read_text().endswith("\n")  # the line is there or it is not
    resize(disk, PLENTY)
    result = run_ranks([*arguments, f"max_steps={found.step + 1}"], tmp_path, world_size=world_size)
    assert result.code == 0, result.output
    assert RunDir(tmp_path / "run").done_step() == found.step + 1
    assert checkpoint.read(tmp_path / "run/checkpoints" / name(found.step + 1)).step == found.step + 1


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize(
    ("num_pages", "what"),
    [
        (0, "run_dir=disk/run cannot be written"),
        (1, "disk/run/config.yaml"),
        (2, "disk/run/versions.json"),
        (3, "disk/run/metrics.jsonl could not be written"),
        (4, "disk/run/console.log could not be written"),
        (8, f"the checkpoint of step {FIRST} could not be written"),
    ],
)
def test_a_disk_that_is_full_from_the_start(
    num_pages: int, what: str, world_size: int, straight: Path, disk: Path, data_dir: Path, tmp_path: Path
) -> None:
    """The more room there is, the further the run gets."""
    filler = fill(disk, num_free_pages=num_pages)
    arguments = [*RUN, f"data_dir={data_dir}", "epochs=3", "run_dir=disk/run"]
    reason = sentence(run_ranks(arguments, tmp_path, world_size=world_size))
    assert reason.startswith(f"{what}: No space left on device")
    assert checkpoint.newest(disk / "run/checkpoints", pytest.fail) is None
    if num_pages in (0, 8):
        filler.unlink()
        check_end(run_ranks(arguments, tmp_path, world_size=world_size), disk / "run", straight, world_size)


def _within_a_quota(num_bytes: int, *arguments: object) -> None:
    """Be a run that may not write files of more than so many bytes once it has a checkpoint."""
    save = checkpoint.save

    def limit(*values: object) -> Path:
        path = save(*values)  # type: ignore[arg-type]
        resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, num_bytes))
        return path

    checkpoint.save = limit  # type: ignore[assignment]
    become(*arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("num_bytes", [100_000, 0], ids=["no checkpoint", "nothing, the output neither"])
def test_a_quota(num_bytes: int, world_size: int, straight: Path, data_dir: Path, tmp_path: Path) -> None:
    arguments, log = [*RUN, f"data_dir={data_dir}", "epochs=3", "run_dir=run"], tmp_path / "output.txt"
    target = functools.partial(_within_a_quota, num_bytes)
    result = wait_ranks(start_ranks(arguments, log, world_size=world_size, target=target), log)
    if num_bytes:
        assert sentence(result) == (
            f"the checkpoint of step {SECOND} could not be written: File too large; the last good one is "
            f"run/checkpoints/{name(FIRST)}"
        )
    assert result.code == 1
    check_good(tmp_path / "run", FIRST)
    check_end(run_ranks(arguments, tmp_path, world_size=world_size), tmp_path / "run", straight, world_size)


def test_a_console_on_a_full_disk(straight: Path, data_dir: Path, tmp_path: Path) -> None:
    """The run goes on without it; a real start, because the end of Python matters."""
    arguments = [*RUN, f"data_dir={data_dir}", "epochs=3", "run_dir=run"]
    with Path("/dev/full").open("w") as full:
        result = subprocess.run(
            [sys.executable, TRAIN, *arguments],
            cwd=tmp_path,
            env=clean_environment(),
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
        )
    assert result.stderr == ""
    check_end(Result([result.returncode], result.stderr), tmp_path / "run", straight)
    assert losses(tmp_path / "run") == losses(straight)
    assert lines(tmp_path / "run") == lines(straight)


def test_a_reader_of_the_console_that_goes_away(straight: Path, data_dir: Path, tmp_path: Path) -> None:
    what = f"smoke dataset=synthetic epochs=2 max_steps=20 run_dir=run data_dir='{data_dir}'"
    command = f"'{sys.executable}' '{TRAIN}' {what} | head -1; exit ${{PIPESTATUS[0]}}"
    result = subprocess.run(
        ["bash", "-c", command], cwd=tmp_path, env=clean_environment(), capture_output=True, text=True
    )
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.count("\n") == 1
    assert RunDir(tmp_path / "run").done_step() == 20
    assert "test accuracy" in (tmp_path / "run/console.log").read_text()


# --- read-only ---


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_run_directory_that_is_read_only(world_size: int, disk: Path, data_dir: Path, tmp_path: Path) -> None:
    with read_only(disk):
        arguments = [*RUN, f"data_dir={data_dir}", "epochs=3", "run_dir=disk/run"]
        reason = sentence(run_ranks(arguments, tmp_path, world_size=world_size))
    assert reason == "run_dir=disk/run cannot be written: Read-only file system; choose another"
    assert not list(disk.iterdir())


def test_a_finished_run_that_is_read_only(straight: Path, disk: Path, data_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(straight, disk / "run")
    arguments = [*RUN, f"data_dir={data_dir}", "run_dir=disk/run"]
    with read_only(disk):
        reason = sentence(run_ranks([*arguments, "epochs=4"], tmp_path))
        assert reason == "run_dir=disk/run cannot be written: Read-only file system; choose another"
        log = tmp_path / "evaluation.txt"
        evaluation = wait_ranks([start_verb(["evaluate", "disk/run", f"data_dir={data_dir}"], log)], log)
        assert evaluation.code == 0, evaluation.output
    check_good(disk / "run", *(int(path.name[5:]) for path in (straight / "checkpoints").iterdir()))


def test_checkpoints_that_are_read_only(straight: Path, disk: Path, data_dir: Path, tmp_path: Path) -> None:
    """Found out before training, not at the first save."""
    shutil.copytree(straight, disk / "run", ignore=shutil.ignore_patterns("DONE"))
    with read_only(disk / "run/checkpoints"):
        reason = sentence(run_ranks([*RUN, f"data_dir={data_dir}", "epochs=4", "run_dir=disk/run"], tmp_path))
    assert reason == "disk/run/checkpoints cannot be written: Read-only file system; choose another run_dir"
    assert not metrics(disk / "run", "resume")


def test_a_working_directory_that_is_read_only(disk: Path, data_dir: Path) -> None:
    log = disk.parent / "output.txt"
    with read_only(disk):
        process = start_verb(["train", *RUN, f"data_dir={data_dir}"], log, functools.partial(_become_in, disk))
        reason = sentence(wait_ranks([process], log))
    assert reason == f"no run directory can be made in {disk}/runs: Read-only file system; give run_dir="


def _become_in(folder: Path, arguments: list[str], _: Path, log: Path, environment: dict[str, str]) -> None:
    become(arguments, folder, log, environment)


# --- gone ---


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("gone", ["run", "run/checkpoints"])
def test_a_run_directory_that_vanishes(gone: str, world_size: int, data_dir: Path, tmp_path: Path) -> None:
    log = tmp_path / "output.txt"
    arguments = [*RUN, f"data_dir={data_dir}", "epochs=100000", "run_dir=run"]
    ranks = start_ranks(arguments, log, world_size=world_size)
    wait_for(has_steps(tmp_path / "run", FIRST + 1))
    (tmp_path / gone).rename(tmp_path / "gone")
    if gone == "run":
        shutil.rmtree(tmp_path / "gone")
        reason = sentence(wait_ranks(ranks, log))
        assert "could not be written: No such file or directory" in reason
        assert not (tmp_path / "run").exists()  # nobody made a new one
    else:  # one can go on without the old ones, and nothing is lost but them
        wait_for(lambda: checkpoint.newest(tmp_path / "run/checkpoints", pytest.fail) is not None)
        (tmp_path / "run/STOP").touch()
        assert wait_ranks(ranks, log).code == 3
