"""`verify`: real ranks compare bits, and name the fault that is planted in one of them."""

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from tests.conftest import become, free_port, rank_environment, start_verb, wait_ranks


def become_short(arguments: list[str], folder: Path, log: Path, environment: dict[str, str]) -> None:
    """Be a rank whose runs have 10 steps an epoch."""
    from mnist_dist.commands import verify

    verify.NUM_TRAIN, verify.NUM_TEST, verify.STOP_AFTER = 600, 100, 7
    become(arguments, folder, log, environment)


def verify(
    folder: Path, world_size: int, *arguments: str, target: Callable[..., None] = become_short
) -> tuple[int, dict[str, Any]]:
    """Run `verify --json` on some ranks: the exit code, and what it says."""
    log, port = folder / "output.txt", free_port()
    ranks = [
        start_verb(
            ["verify", "--json", *arguments],
            log,
            target,
            **(rank_environment(rank, world_size, port) if world_size > 1 else {}),
        )
        for rank in range(world_size)
    ]
    result = wait_ranks(ranks, log)
    lines = [line for line in result.output.splitlines() if line.startswith("{")]
    assert len(lines) == 1, result.output
    return result.code, json.loads(lines[0])


@pytest.mark.parametrize(("world_size", "precision"), [(1, "fp32"), (2, "bf16")])
def test_ranks_that_train_right_pass_and_planted_faults_are_noticed(
    world_size: int, precision: str, tmp_path: Path
) -> None:
    code, said = verify(tmp_path, world_size, f"precision={precision}")
    assert [f for f in said["findings"] if f["status"] == "FAIL"] == []
    assert code == 0
    assert said["verdict"] == "PASS"
    assert {check for check, status in said["checks"].items() if status == "SKIP"} == set()
    assert len(said["noticed"]) == (9 if world_size > 1 else 5)
    assert len(said["not_here"]) == (0 if world_size > 1 else 4)
    assert said["steps"] == {"mlp": 20, "cnn": 20}


def test_each_fault_is_noticed_on_any_rank_at_any_step(tmp_path: Path) -> None:
    code, said = verify(tmp_path, 4, "--plant", "seed=3")
    assert said["findings"] == []
    assert code == 0
    assert len(said["noticed"]) == 9
    assert said["checks"]["together"] == "SKIP"


def test_where_bits_may_differ_losses_are_compared(tmp_path: Path) -> None:
    code, said = verify(tmp_path, 3, "batch_size=60", "precision=fp32")
    assert code == 0, said["findings"]
    assert {check for check, status in said["checks"].items() if status == "PASS"} >= {"together", "images"}
    assert said["checks"]["alone"] == said["checks"]["planted"] == "SKIP"


def _break(fault: str, arguments: list[str], folder: Path, log: Path, environment: dict[str, str]) -> None:
    """Be a rank of which the second is broken in the job's own code, not in a copy of a run."""
    from mnist_dist.data.sampler import GlobalBatchSampler
    from mnist_dist.training import exchange

    if fault == "order":
        order = GlobalBatchSampler.order
        GlobalBatchSampler.order = lambda self, epoch: order(self, 0 * epoch)  # type: ignore[method-assign]
    elif environment["RANK"] != "1":
        pass
    elif fault == "exchange":
        add = exchange.add_over_ranks

        def add_wrongly(vector: Tensor, received: Tensor, group: Any) -> None:
            add(vector, received, group)
            vector[1] += 1

        exchange.add_over_ranks = add_wrongly
    become_short(arguments, folder, log, environment)


@pytest.mark.parametrize(
    ("fault", "name", "words"),
    [
        ("exchange", "exchange.garbage", ["rank 1 on ", "at step 0 of mlp"]),
        ("order", "order.repeats", ["every rank repeats the order"]),
    ],
)
def test_a_fault_of_the_job_itself_is_named(fault: str, name: str, words: list[str], tmp_path: Path) -> None:
    code, said = verify(tmp_path, 2, "precision=fp32", target=functools.partial(_break, fault))
    texts = [f["text"] for f in said["findings"] if f["name"] == name]
    assert texts, said["findings"]
    assert all(word in texts[0] for word in words), texts
    assert code == 1
