"""A rank that dies or hangs is named, once, and the others end with it."""

import functools
import importlib
import itertools
import json
import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from torch import Tensor

from mnist_dist.data.sampler import Batch
from mnist_dist.run.run_dir import Lock, RunDir
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


def _die(where: str, arguments: list[str], folder: Path, log: Path, environment: dict[str, str]) -> None:
    """Be a rank of a run of which rank 1 is killed when it comes to a function, MODULE:NAME."""
    if environment["RANK"] == "1":
        module, _, name = where.partition(":")
        setattr(importlib.import_module(module), name, lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL))
    become(arguments, folder, log, environment)


@pytest.mark.parametrize(
    "where",
    [
        "mnist_dist.distributed.rendezvous:try_peers",
        "mnist_dist.distributed.rendezvous:Watchdog",
        "mnist_dist.distributed.setup:init_process_group",
        "mnist_dist.commands.train:load_same_dataset",
        "mnist_dist.commands.train:bits_depend_on",
        "mnist_dist.commands.train:run_loop",
    ],
)
def test_a_rank_that_is_killed_while_starting_is_named_and_recorded(where: str, data_dir: Path, tmp_path: Path) -> None:
    log, run_dir = tmp_path / "output.txt", tmp_path / "run"
    run_dir.mkdir()  # as slurm/train.sh does
    arguments, target = [*LONG, f"data_dir={data_dir}", "timeout_s=5"], functools.partial(_die, where)
    first, second = start_ranks(arguments, log, world_size=2, target=target)
    result = wait_ranks([first], log)
    second.join()
    assert result.code == 1
    assert result.output.count("mnist-dist: ") == 1 + result.output.count("mnist-dist: waiting for rank 1")
    (failed,) = metrics(run_dir, "failed")
    assert failed["cause"] == "rank_lost"
    assert failed["reason"] in result.output
    assert re.search(r"rank 1 on |ranks were lost .*: 1;", failed["reason"])
    assert (run_dir / "metrics.jsonl").read_text().splitlines()[-1] == json.dumps(failed)


def test_ranks_that_are_lost_while_starting_leave_another_run_s_record_alone(data_dir: Path, tmp_path: Path) -> None:
    log, run_dir = tmp_path / "output.txt", RunDir(tmp_path / "run")
    lock = Lock(run_dir)
    target = functools.partial(_die, "mnist_dist.distributed.setup:init_process_group")
    first, second = start_ranks([*LONG, f"data_dir={data_dir}", "timeout_s=5"], log, world_size=2, target=target)
    assert wait_ranks([first], log).code == 1
    second.join()
    lock.release()
    assert not run_dir.metrics.exists()


def test_ranks_that_are_lost_while_starting_make_no_run_directory(data_dir: Path, tmp_path: Path) -> None:
    log = tmp_path / "output.txt"
    target = functools.partial(_die, "mnist_dist.distributed.setup:init_process_group")
    first, second = start_ranks([*LONG, f"data_dir={data_dir}", "timeout_s=5"], log, world_size=2, target=target)
    result = wait_ranks([first], log)
    second.join()
    assert result.code == 1
    assert f"rank 1 on {os.uname().nodename} does not answer" in result.output
    assert not (tmp_path / "run").exists()
