"""Stopping under each launcher: all ranks at one step, one checkpoint, nobody orphaned."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY, TRAIN, has_steps, metrics, run_ranks, start_ranks, user_environment, wait_for
from tests.processes import processes_of, ranks_of

LONG = ["dataset=synthetic", "epochs=100000", "precision=fp32", "threads=1", "log_every_steps=1", "run_dir=run"]


def start(command: list[str], folder: Path, data_dir: Path, **environment: str) -> subprocess.Popen[bytes]:
    """Start a launcher as a user would, output into output.txt, and wait until it trains."""
    env = user_environment(folder, data_dir, **environment)
    with (folder / "output.txt").open("ab") as output:
        process = subprocess.Popen(command, cwd=folder, env=env, stdout=output, stderr=subprocess.STDOUT)
    wait_for(has_steps(folder / "run", 5))
    return process


def assert_stopped_cleanly(folder: Path, reason: str) -> None:
    """Nobody is left; one stop is recorded, with a checkpoint of just that step; and it can go on."""
    wait_for(lambda: not processes_of(folder))
    (stop,) = metrics(folder / "run", "stop")
    assert reason in stop["reason"]
    newest = max(path.name for path in (folder / "run" / "checkpoints").iterdir())
    assert newest == f"step-{stop['step']:08d}"
    output = (folder / "output.txt").read_text()
    assert "to go on, start it again with run_dir=run" in output
    assert not (folder / "run" / "STOP").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP])
def test_a_signal_to_one_rank_stops_all_at_one_step(number: signal.Signals, data_dir: Path, tmp_path: Path) -> None:
    log = tmp_path / "output.txt"
    ranks = start_ranks([*LONG, f"data_dir={data_dir}"], log, world_size=2)
    wait_for(has_steps(tmp_path / "run", 5))
    pid = ranks[1].pid
    assert pid
    os.kill(pid, number)
    for rank in ranks:
        rank.join()
        assert rank.exitcode == 3, log.read_text()
    assert_stopped_cleanly(tmp_path, f"{number.name} (rank 1 on ")


def test_a_stop_file_stops_and_is_gone(data_dir: Path, tmp_path: Path) -> None:
    log = tmp_path / "output.txt"
    (rank,) = start_ranks([*LONG, f"data_dir={data_dir}"], log)
    wait_for(has_steps(tmp_path / "run", 5))
    (tmp_path / "run" / "STOP").touch()
    rank.join()
    assert rank.exitcode == 3
    assert_stopped_cleanly(tmp_path, "STOP")


@pytest.mark.parametrize(
    ("command", "number", "codes"),
    [
        ([sys.executable, str(TRAIN)], signal.SIGTERM, (3,)),
        # A launcher that is told to end ends as it likes; the ranks must not stay, and the checkpoint must be there.
        (["accelerate", "launch", str(TRAIN)], signal.SIGTERM, (143, -15)),
        (["torchrun", "--standalone", "--nproc-per-node=2", str(TRAIN)], signal.SIGTERM, (1,)),
        ([str(REPOSITORY / "launch/local.sh")], signal.SIGTERM, (3,)),
        ([str(REPOSITORY / "launch/local.sh")], signal.SIGUSR1, (3,)),
    ],
    ids=["python", "accelerate", "torchrun", "local.sh TERM", "local.sh USR1"],
)
def test_a_signal_to_the_launcher_leaves_nobody(
    command: list[str], number: signal.Signals, codes: tuple[int, ...], data_dir: Path, tmp_path: Path
) -> None:
    process = start([*command, *LONG], tmp_path, data_dir, NPROC="2")
    process.send_signal(number)
    assert process.wait() in codes, (tmp_path / "output.txt").read_text()
    assert_stopped_cleanly(tmp_path, "")


def test_a_lost_rank_restarts_the_job_from_its_checkpoint(data_dir: Path, tmp_path: Path) -> None:
    command = [str(REPOSITORY / "launch/local.sh"), *LONG, "timeout_s=60"]
    process = start(command, tmp_path, data_dir, NPROC="2", MAX_RESTARTS="1")
    wait_for(has_steps(tmp_path / "run", 20))
    os.kill(ranks_of(tmp_path)[0], signal.SIGKILL)
    wait_for(lambda: bool(metrics(tmp_path / "run", "resume")))
    resumed = metrics(tmp_path / "run", "resume")[0]["step"]
    wait_for(lambda: metrics(tmp_path / "run", "step")[-1]["step"] > resumed)
    process.send_signal(signal.SIGTERM)
    assert process.wait() == 3, (tmp_path / "output.txt").read_text()
    assert_stopped_cleanly(tmp_path, "STOP")


def test_a_stop_that_came_while_the_run_was_starting_is_heard_and_one_from_before_is_not(
    data_dir: Path, tmp_path: Path
) -> None:
    stop_file = tmp_path / "run" / "STOP"
    stop_file.parent.mkdir()
    stop_file.touch()
    os.utime(stop_file, (time.time() + 1000,) * 2)
    arguments = [*LONG[:1], "epochs=2", *LONG[2:], f"data_dir={data_dir}"]
    assert run_ranks(arguments, tmp_path).code == 3
    assert not stop_file.exists()
    stop_file.touch()
    assert run_ranks(arguments, tmp_path).code == 0
    assert not stop_file.exists()
