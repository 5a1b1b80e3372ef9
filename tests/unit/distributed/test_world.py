"""What the ranks tell each other: a world of one, in which every collective is the identity, and one of several."""

import functools
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from mnist_dist.distributed.watchdog import Phase
from mnist_dist.distributed.world import Member, World
from mnist_dist.errors import (
    DownloadError,
    JobError,
    NotFiniteError,
    ReplicaError,
    RequestError,
    RunError,
    StoppedEarlyError,
    StorageError,
)
from tests.conftest import FORKS

HOSTS = ["a", "b", "c"]


def world_of(rank: int, size: int) -> World:
    """A world without an Accelerator."""
    accelerator = SimpleNamespace(process_index=rank, num_processes=size, device=torch.device("cpu"))
    members = [Member(host, (0, 1), False, "cpu", "x") for host in HOSTS[:size]]
    return World(accelerator, members, "fp32", [], watchdog=None)  # type: ignore[arg-type]


@pytest.fixture
def alone() -> World:
    return world_of(0, 1)


def test_one_rank_is_the_main_one(alone: World) -> None:
    assert (alone.rank, alone.size, alone.is_main, alone.device.type) == (0, 1, True, "cpu")
    assert alone.name(0) == "rank 0 on a"


def test_one_rank_hears_itself(alone: World) -> None:
    value = {"a": [1, 2]}
    assert alone.broadcast(value) is value
    assert alone.gather(value) == [value]
    assert alone.gather(None) == [None]
    with alone.shared_errors():
        pass


def test_one_rank_needs_no_watchdog(alone: World) -> None:
    with alone as world:
        assert world is alone
        world.at(Phase.COMPUTING, 3)
    with pytest.raises(ZeroDivisionError), alone:
        _ = 1 // 0


@pytest.mark.parametrize(
    ("problem", "expected", "sentence"),
    [
        (RequestError("lr is wrong"), RequestError, "lr is wrong"),
        (RunError("it cannot go on"), RunError, "it cannot go on"),
        (NotFiniteError("the loss is nan"), NotFiniteError, "the loss is nan"),
        (OSError(28, "No space left on device", "runs/x/DONE"), StorageError, "runs/x/DONE: No space left on device"),
        (OSError(5, "Input/output error"), StorageError, "the run directory: Input/output error"),
        (OSError("odd"), StorageError, "the run directory: odd"),
    ],
)
def test_what_fails_is_one_sentence(alone: World, problem: Exception, expected: type[Exception], sentence: str) -> None:
    with pytest.raises(JobError) as raised, alone.shared_errors():
        raise problem
    assert type(raised.value) is expected
    assert str(raised.value) == sentence
    assert raised.value.on_every_rank


def test_a_bug_keeps_its_traceback(alone: World) -> None:
    with pytest.raises(ZeroDivisionError), alone.shared_errors():
        _ = 1 // 0


@pytest.mark.parametrize(
    ("error", "exit_code", "cause"),
    [
        (JobError, 1, "error"),
        (StoppedEarlyError, 3, "error"),
        (RequestError, 2, "request"),
        (DownloadError, 2, "request"),
        (RunError, 1, "error"),
        (StorageError, 1, "storage"),
        (NotFiniteError, 1, "not_finite"),
        (ReplicaError, 1, "replicas_differ"),
    ],
)
def test_each_error_knows_its_exit_code_and_cause(error: type[JobError], exit_code: int, cause: str) -> None:
    raised = error("a sentence")
    assert (str(raised), raised.exit_code, raised.cause) == ("a sentence", exit_code, cause)
    assert not raised.on_every_rank


# --- several ranks ---


def fail(*, of: dict[int, Exception], rank: int) -> None:
    """Raise what is meant for this rank."""
    if rank in of:
        raise of[rank]


FULL = OSError(28, "No space left on device", "runs/x/DONE")
# What is raised on which ranks; and what all of them raise then: its type and sentence.
SHARED: dict[str, tuple[dict[int, Exception], list[object] | None]] = {
    "nothing": ({}, None),
    "rank 0": ({0: RunError("the first")}, ["RunError", "the first"]),
    "rank 1": ({1: RequestError("lr is wrong")}, ["RequestError", "rank 1 on b: lr is wrong"]),
    "two of them": ({2: RunError("third"), 1: RequestError("second")}, ["RequestError", "rank 1 on b: second"]),
    "a file": ({2: FULL}, ["StorageError", "rank 2 on c: runs/x/DONE: No space left on device"]),
    "said by all": (
        {rank: NotFiniteError("the loss is nan", on_every_rank=True) for rank in range(3)},
        ["NotFiniteError", "the loss is nan"],
    ),
    "known to all": ({1: RequestError("so it is", on_every_rank=True)}, ["RequestError", "so it is"]),
    "nothing again": ({}, None),
}


def _be_a_rank(work: Callable[[World], object], rank: int, size: int, folder: Path) -> None:
    """In another process: join the group, and leave what `work` returns in a file."""
    dist.init_process_group("gloo", store=dist.FileStore(str(folder / "store"), size), rank=rank, world_size=size)
    (folder / f"rank-{rank}.json").write_text(json.dumps(work(world_of(rank, size))))
    dist.destroy_process_group()


def on_all_ranks(work: Callable[[World], object], size: int, folder: Path) -> list[object]:
    """Run `work`, a function of a module, on ranks in processes of their own; returns what it returned on each."""
    ranks = [FORKS.Process(target=_be_a_rank, args=(work, rank, size, folder)) for rank in range(size)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(120)
        rank.kill()
    assert [rank.exitcode for rank in ranks] == [0] * size
    return [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(size)]


def _share_errors(world: World) -> object:
    outcomes: dict[str, object] = {}
    for name, (errors, _) in SHARED.items():
        outcomes[name] = None
        try:
            with world.shared_errors():
                fail(of=errors, rank=world.rank)
        except JobError as error:
            outcomes[name] = [type(error).__name__, str(error), error.on_every_rank]
    return outcomes


def test_the_first_ranks_error_is_raised_on_every_rank(tmp_path: Path) -> None:
    expected = {name: outcome and [*outcome, True] for name, (_, outcome) in SHARED.items()}
    assert on_all_ranks(_share_errors, 3, tmp_path) == [expected] * 3


def _tell(text: str, world: World) -> object:
    told = world.broadcast(f"{text} of rank {world.rank}")
    return [told, world.gather([world.rank, text]), world.is_main]


def test_ranks_hear_each_other(tmp_path: Path) -> None:
    told = on_all_ranks(functools.partial(_tell, "word"), 2, tmp_path)
    heard = [[0, "word"], [1, "word"]]
    assert told == [["word of rank 0", heard, True], ["word of rank 0", heard, False]]


def test_the_first_ranks_are_a_world_of_their_own() -> None:
    world = world_of(1, 3)
    first = world.first(2, None)
    assert (first.rank, first.size, first.name(1)) == (1, 2, "rank 1 on b")
    assert world.size == 3
