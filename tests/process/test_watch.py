"""A rank that dies or hangs is named, once, and the others end with it."""

import functools
import itertools
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from torch import Tensor

from mnist_dist.data.sampler import Batch
from tests.conftest import (
    Result,
    become,
    free_port,
    has_steps,
    metrics,
    rank_environment,
    run_ranks,
    start_ranks,
    start_verb,
    wait_for,
    wait_ranks,
)

LONG = [
    "dataset=synthetic",
    "epochs=100000",
    "threads=1",
    "precision=fp32",
    "log_every_steps=1",
    "run_dir=run",
    "batch_size=60",
]


def run_and_hurt(folder: Path, data_dir: Path, world_size: int, hurt: Callable[[int], None], victim: int) -> Result:
    """Start a long run, do something to one rank's process, and see how it ends."""
    log = folder / "output.txt"
    ranks = start_ranks([*LONG, f"data_dir={data_dir}", "timeout_s=10"], log, world_size=world_size)
    wait_for(has_steps(folder / "run", 20))
    pid = ranks[victim].pid
    assert pid
    hurt(pid)
    survivors = [rank for number, rank in enumerate(ranks) if number != victim]
    result = wait_ranks(survivors, log, timeout_s=120)
    ranks[victim].kill()
    ranks[victim].join()
    return result


@pytest.mark.parametrize(("world_size", "victim"), [(2, 0), (2, 1), (3, 2)])
def test_a_killed_rank_is_named_once(data_dir: Path, tmp_path: Path, world_size: int, victim: int) -> None:
    result = run_and_hurt(tmp_path, data_dir, world_size, lambda pid: os.kill(pid, signal.SIGKILL), victim)
    assert result.code == 1
    assert result.output.count("mnist-dist:") == 1
    assert f"rank {victim} on {os.uname().nodename} does not answer" in result.output
    assert "Traceback" not in result.output
    if victim:
        failed = metrics(tmp_path / "run", "failed")[0]
        assert failed["cause"] == "rank_lost"
        assert f"rank {victim}" in failed["reason"]


@pytest.mark.parametrize("victim", [0, 1])
def test_a_frozen_rank_is_named_once(data_dir: Path, tmp_path: Path, victim: int) -> None:
    result = run_and_hurt(tmp_path, data_dir, 2, lambda pid: os.kill(pid, signal.SIGSTOP), victim)
    assert result.code == 1
    assert result.output.count("mnist-dist:") == 1
    assert f"rank {victim} on {os.uname().nodename} does not answer" in result.output


def _hang_in_step(last: int, arguments: list[str], folder: Path, log: Path, environment: dict[str, str]) -> None:
    """Be rank 1 of a run, and stop computing at a step, with the process alive."""
    from mnist_dist.training.train_step import TrainStep

    update, steps = TrainStep.update, itertools.count()

    def hang(self: TrainStep, batch: Batch, draws: list[Tensor]) -> Tensor:
        if next(steps) == last and self.world.rank == 1:
            time.sleep(1000)
        return update(self, batch, draws)

    TrainStep.update = hang  # type: ignore[method-assign]
    become(arguments, folder, log, environment)


def test_a_hanging_rank_is_named_with_what_each_did(data_dir: Path, tmp_path: Path) -> None:
    log = tmp_path / "output.txt"
    target = functools.partial(_hang_in_step, 10)
    ranks = start_ranks([*LONG, f"data_dir={data_dir}", "timeout_s=10"], log, world_size=2, target=target)
    result = wait_ranks(ranks, log)
    assert result.code == 1
    assert "rank 1 on " in result.output
    assert "hangs, and nothing has moved for timeout_s=10 s" in result.output
    assert "rank 0 was exchanging gradients, step 10" in result.output
    assert "rank 1 was computing, step 10" in result.output
    assert result.output.count("mnist-dist:") == 1
    assert metrics(tmp_path / "run", "failed")[0]["cause"] == "rank_hangs"
    assert "in hang" in (tmp_path / "run" / "stack-rank-1.txt").read_text()
    assert "exchange.py" in (tmp_path / "run" / "stack-rank-0.txt").read_text()


def _fail(arguments: list[str], folder: Path, log: Path, environment: dict[str, str]) -> None:
    """Be a rank of which one has a bug."""
    from mnist_dist.training.train_step import TrainStep

    def fail(*_: object, **__: object) -> Tensor:
        raise KeyError("no such thing")

    if environment["RANK"] == "1":
        TrainStep.update = fail  # type: ignore[method-assign]
    become(arguments, folder, log, environment)


def test_a_rank_with_a_bug_is_named_with_it(data_dir: Path, tmp_path: Path) -> None:
    log = tmp_path / "output.txt"
    result = wait_ranks(start_ranks([*LONG, f"data_dir={data_dir}"], log, world_size=2, target=_fail), log)
    assert result.code == 1
    assert f"mnist-dist: rank 1 on {os.uname().nodename} failed: KeyError: 'no such thing'" in result.output
    assert result.output.count("mnist-dist:") == 1
    assert result.output.count("Traceback") == 1
    assert metrics(tmp_path / "run", "failed")[0]["cause"] == "rank_failed"


def test_ranks_that_never_come_are_named(data_dir: Path, tmp_path: Path) -> None:
    log = tmp_path / "output.txt"
    arguments = ["train", *LONG, f"data_dir={data_dir}", "timeout_s=5"]
    alone = start_verb(arguments, log, **rank_environment(0, 3, free_port()))
    result = wait_ranks([alone], log)
    assert result.code == 1
    assert "of 3 ranks these did not come within 5 s (timeout_s): 1, 2;" in result.output


def test_a_master_that_has_no_address_is_named(data_dir: Path, tmp_path: Path) -> None:
    environment = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "no-such-host.invalid", "MASTER_PORT": "29511"}
    result = run_ranks([*LONG, f"data_dir={data_dir}"], tmp_path, **environment)
    assert result.code == 1
    assert "cannot resolve MASTER_ADDR=no-such-host.invalid" in result.output


def _die_while_joining(arguments: list[str], folder: Path, log: Path, environment: dict[str, str]) -> None:
    """Be rank 1 of a run, and be killed after the ranks have met and before they are one group."""
    if environment["RANK"] == "1":
        import mnist_dist.distributed.setup

        mnist_dist.distributed.setup.init_process_group = lambda *_: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[assignment]
    become(arguments, folder, log, environment)


def test_a_rank_that_is_killed_while_joining_is_named(data_dir: Path, tmp_path: Path) -> None:
    log = tmp_path / "output.txt"
    first, second = start_ranks([*LONG, f"data_dir={data_dir}"], log, world_size=2, target=_die_while_joining)
    result = wait_ranks([first], log)
    second.join()
    assert result.code == 1
    assert f"rank 1 on {os.uname().nodename} does not answer" in result.output
    assert result.output.count("mnist-dist: rank 1") == 1
