"""Threads from cores, and a world of one rank, in which every collective is the identity."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from mnist_dist.cli import main
from mnist_dist.distributed import device as module
from mnist_dist.distributed.device import cpu_has_fast_bf16, usable_cores
from mnist_dist.distributed.world import Member, World, choose_threads
from mnist_dist.errors import RequestError, RunError


def member(cores: range | tuple[int, ...], host: str = "a") -> Member:
    return Member(host, tuple(cores), False, "cpu")


@pytest.mark.parametrize(
    ("members", "threads"),
    [
        ([member(range(8))], [8]),
        ([member(range(8))] * 2, [4, 4]),  # one machine, shared
        ([member(range(8))] * 3, [2, 2, 2]),
        ([member(range(2))] * 4, [1, 1, 1, 1]),  # more ranks than cores
        ([member(range(8)), member(range(8), "b")], [8, 8]),  # the same numbers on another machine are other cores
        ([member(range(4)), member(range(4, 8))], [4, 4]),  # srun gave each rank its own
        ([member(range(4)), member(range(8))], [2, 4]),  # partly shared
        ([member(range(8)), member(range(4)), member(range(4, 8))], [2, 2, 2]),
    ],
)
def test_threads_are_the_cores_divided_by_the_ranks_that_share_them(members: list[Member], threads: list[int]) -> None:
    assert [choose_threads(members, rank) for rank in range(len(members))] == threads


@pytest.mark.parametrize(
    ("vendor", "flags", "fast"),
    [
        ("GenuineIntel", "avx512f avx512_bf16 amx_bf16 amx_tile", True),
        ("GenuineIntel", "avx512f avx512_bf16", False),
        ("AuthenticAMD", "avx512f avx512_bf16", True),
        ("AuthenticAMD", "avx2", False),
    ],
)
def test_bf16_is_chosen_for_processors_that_are_faster_with_it(
    tmp_path: Path, vendor: str, flags: str, fast: bool
) -> None:
    (tmp_path / "cpuinfo").write_text(f"processor\t: 0\nvendor_id\t: {vendor}\nflags\t\t: fpu {flags}\n")
    assert cpu_has_fast_bf16(tmp_path / "cpuinfo") is fast
    assert cpu_has_fast_bf16(tmp_path / "no such file") is False


@pytest.mark.parametrize(
    ("quota", "cores"),
    [
        ("max 100000\n", (1, 3, 5, 7)),
        ("200000 100000\n", (1, 3)),
        ("250000 100000\n", (1, 3)),
        ("50000 100000\n", (1,)),  # half a core is still one thread
        ("6400000 100000\n", (1, 3, 5, 7)),  # more than there are
        ("", (1, 3, 5, 7)),
        ("nonsense\n", (1, 3, 5, 7)),
        (None, (1, 3, 5, 7)),  # no such file
    ],
)
def test_usable_cores_are_the_affinity_within_the_containers_quota(
    quota: str | None, cores: tuple[int, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cpu_max = tmp_path / "cpu.max"
    if quota is not None:
        cpu_max.write_text(quota)
    monkeypatch.setattr(module, "Path", lambda path: cpu_max if path == "/sys/fs/cgroup/cpu.max" else Path(path))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {7, 5, 3, 1}, raising=False)
    assert usable_cores() == cores


def test_usable_cores_are_all_where_the_system_has_no_affinity(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "Path", lambda _: tmp_path / "missing")
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 3)
    assert usable_cores() == (0, 1, 2)


def test_this_process_may_use_some_core() -> None:
    assert set(usable_cores()) <= os.sched_getaffinity(0)
    assert usable_cores()


@pytest.fixture
def alone() -> World:
    """A world of one rank, without an Accelerator."""
    accelerator = SimpleNamespace(process_index=0, num_processes=1, device=torch.device("cpu"))
    return World(accelerator, [member(range(2))], "no", [], watch=None)  # type: ignore[arg-type]


def test_one_rank_is_the_main_one(alone: World) -> None:
    assert (alone.rank, alone.size, alone.is_main, alone.device.type) == (0, 1, True, "cpu")


def test_one_rank_hears_itself(alone: World) -> None:
    value = {"a": [1, 2]}
    assert alone.broadcast(value) is value
    assert alone.gather(value) == [value]
    assert alone.gather(None) == [None]
    assert alone.together(lambda: value) is value
    assert alone.together(lambda: None) is None


@pytest.mark.parametrize(
    ("problem", "expected", "sentence"),
    [
        (RequestError("lr is wrong"), RequestError, "lr is wrong"),
        (RunError("the disk is full"), RunError, "the disk is full"),
        (OSError(28, "No space left on device", "runs/x/DONE"), RunError, "runs/x/DONE: No space left on device"),
        (OSError(5, "Input/output error"), RunError, "the run directory: Input/output error"),
        (OSError("odd"), RunError, "the run directory: odd"),
    ],
)
def test_what_fails_together_is_one_sentence(
    alone: World, problem: Exception, expected: type[Exception], sentence: str
) -> None:
    def work() -> None:
        raise problem

    with pytest.raises(expected) as raised:
        alone.together(work)
    assert str(raised.value) == sentence


def test_a_bug_keeps_its_traceback(alone: World) -> None:
    with pytest.raises(ZeroDivisionError):
        alone.together(lambda: 1 // 0)


def test_all_threads_take_denormal_numbers_for_zero() -> None:
    program = """
import torch
from mnist_dist.distributed.device import tune_cpu
tune_cpu()
torch.set_num_threads(2)
products = torch.full((4_000_000,), 1e-30) * 1e-10
print(products.count_nonzero().item())
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.stdout == "0\n", result.stderr


def test_a_rank_that_is_refused_alone_has_failed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("mnist_dist.commands.train.fetch", lambda *_, **__: "synthetic")
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 1)
    for name, value in {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    assert main(["train"]) == 1  # not 2, which a launcher is not told of
    assert "rank 1 of this machine needs a GPU of its own but the process sees 1" in capsys.readouterr().err
