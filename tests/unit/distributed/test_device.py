"""What a rank computes on: its GPU or its cores, and what they can do."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mnist_dist.distributed import device as module
from mnist_dist.distributed.device import (
    choose_device,
    cpu_has_fast_bf16,
    device_name,
    driver_version,
    has_fast_bf16,
    processor,
    promised_gpu,
    usable_cores,
)
from mnist_dist.distributed.launch_env import LaunchEnv
from mnist_dist.errors import RequestError


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


@pytest.mark.parametrize(
    ("cpuinfo", "words"),
    [
        (
            "processor\t: 0\nvendor_id\t: AuthenticAMD\ncpu family\t: 25\nmodel\t\t: 17\n",
            "AuthenticAMD family 25 model 17",
        ),
        ("processor\t: 0\nvendor_id\t: X\nmodel\t\t: 1\n\nprocessor\t: 1\nvendor_id\t: Y\n", "X model 1"),
    ],
)
def test_a_processor_is_its_maker_model_and_vector_instructions(cpuinfo: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "cpuinfo").write_text(cpuinfo)
    assert processor(tmp_path / "cpuinfo") == f"{words} {torch.backends.cpu.get_cpu_capability()}"
    assert processor(tmp_path / "no such file") == f"{os.uname().machine} {torch.backends.cpu.get_cpu_capability()}"


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


# --- GPUs, pretended ---


@pytest.fixture
def without_promises(monkeypatch: pytest.MonkeyPatch) -> None:
    """No GPU is there or promised."""
    for name in ("SLURM_GPUS_ON_NODE", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    monkeypatch.setattr(module, "promised_gpu", lambda: promised_gpu(Path("/nowhere")))


def test_a_rank_computes_on_the_cpu_where_there_is_no_gpu(without_promises: None) -> None:
    assert choose_device(LaunchEnv()) == torch.device("cpu")
    assert device_name(torch.device("cpu")) == "cpu"
    assert has_fast_bf16(torch.device("cpu")) is cpu_has_fast_bf16()


def test_a_gpu_that_is_promised_and_not_seen_is_refused(
    without_promises: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "4")
    with pytest.raises(RequestError, match=r"^SLURM_GPUS_ON_NODE=4 promises a GPU, but torch sees no GPU \(torch "):
        choose_device(LaunchEnv())
    assert choose_device(LaunchEnv(use_cpu=True)) == torch.device("cpu")


@pytest.mark.parametrize(
    ("environment", "promise"),
    [
        ({}, ""),
        ({"SLURM_GPUS_ON_NODE": "2"}, "SLURM_GPUS_ON_NODE=2 promises a GPU"),
        ({"CUDA_VISIBLE_DEVICES": "0,1"}, "CUDA_VISIBLE_DEVICES=0,1 promises a GPU"),
        ({"CUDA_VISIBLE_DEVICES": "0"}, "CUDA_VISIBLE_DEVICES=0 promises a GPU"),
        ({"SLURM_GPUS_ON_NODE": "0"}, ""),
        ({"SLURM_GPUS_ON_NODE": "", "CUDA_VISIBLE_DEVICES": ""}, ""),
        ({"CUDA_VISIBLE_DEVICES": "-1"}, ""),
        ({"CUDA_VISIBLE_DEVICES": "NoDevFiles"}, ""),
    ],
)
def test_what_promises_a_gpu(
    environment: dict[str, str], promise: str, without_promises: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert promised_gpu(Path("/nowhere")) == promise


def test_a_device_file_promises_a_gpu(without_promises: None, tmp_path: Path) -> None:
    (tmp_path / "nvidia0").touch()
    assert promised_gpu(tmp_path) == f"there is {tmp_path}/nvidia0"


def test_the_driver_is_named_in_its_own_words(tmp_path: Path) -> None:
    (tmp_path / "version").write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  570.1\nGCC version: 12\n")
    assert driver_version(tmp_path / "version") == "NVIDIA UNIX x86_64 Kernel Module  570.1"
    (tmp_path / "empty").touch()
    assert driver_version(tmp_path / "empty") == driver_version(tmp_path / "gone") == "none"


def test_each_rank_of_a_machine_has_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[int] = []
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "set_device_index", chosen.append)
    assert [choose_device(LaunchEnv(4 + local, 8, local)) for local in (0, 1)] == [
        torch.device("cuda", 0),
        torch.device("cuda", 1),
    ]
    assert chosen == [0, 1]
    assert choose_device(LaunchEnv(4, 8, 0, use_cpu=True)) == torch.device("cpu")
    with pytest.raises(RequestError, match=r"^rank 2 of this machine needs a GPU of its own but the process sees 2; "):
        choose_device(LaunchEnv(6, 8, 2))
    assert chosen == [0, 1]
