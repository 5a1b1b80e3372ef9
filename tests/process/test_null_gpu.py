"""The CUDA path, with torch's own code, on a GPU that computes nothing (tests/null_gpu): what it launches.

No value and no time means anything there; docs/RESULTS.md says what a GPU has shown.
"""

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import (
    REPOSITORY,
    clean_environment,
    free_port,
    has_steps,
    metrics,
    rank_environment,
    skip,
    wait_for,
)

SOURCES = REPOSITORY / "tests/null_gpu"
# What CUDA's headers include of each other and torch's packages lack: tests/null_gpu/compat.h serves for all of it.
MISSING_HEADERS = ("cuda_fp16.h", "cuda_bf16.h", "cuda_fp8.h", "cuda_runtime.h", "crt/host_defines.h")
STEPS_PER_EPOCH, EPOCHS = 8, 6  # 1000 images: seven batches of 128, and one of 104
REPLAY = {"replay": 1}


@pytest.fixture(scope="module")
def null_gpu(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library, built with torch's own CUDA headers."""
    spec = importlib.util.find_spec("nvidia")
    packages = Path((spec.submodule_search_locations or [""])[0]) if spec else Path()
    includes = [packages / "cu13/include", packages / "nccl/include"]
    if not shutil.which("g++") or not all(path.is_dir() for path in includes):
        skip("null_gpu", "g++, or the CUDA 13 headers that torch's packages bring, are not there")
    if Path("/dev/nvidia0").exists():
        skip("null_gpu", "there is a GPU")
    folder = tmp_path_factory.mktemp("null-gpu")
    for name in MISSING_HEADERS:
        path = folder / "include" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text('#include "compat.h"\n')
    library = folder / "libcuda.so.1"
    command = ["g++", "-std=c++17", "-O1", "-shared", "-fPIC", f"-Wl,-soname,{library.name}", "-o", str(library)]
    command += [f"-I{path}" for path in (folder / "include", SOURCES, *includes)]
    subprocess.run([*command, str(SOURCES / "null_gpu.cpp"), "-ldl"], check=True)
    return library


def start(
    null_gpu: Path,
    folder: Path,
    data_dir: Path,
    *arguments: object,
    world_size: int,
    epochs: int = EPOCHS,
    **environment: str,
) -> list[subprocess.Popen[str]]:
    """Start `train` once a rank, with a null GPU each; what they print goes into files."""
    port, ranks = free_port(), []
    for rank in range(world_size):
        place = rank_environment(rank, world_size, port) if world_size > 1 else {}
        place |= {"PYTHONPATH": str(REPOSITORY), "LD_PRELOAD": str(null_gpu), "NULL_GPU_DEVICES": str(world_size)}
        command = [sys.executable, "-m", "tests.null_gpu.job", "train", "dataset=synthetic", f"data_dir={data_dir}"]
        command += ["batch_size=128", f"epochs={epochs}", "run_dir=run", "log_every_steps=1", *map(str, arguments)]
        with (folder / f"output-{rank}.txt").open("w") as output:
            ranks.append(
                subprocess.Popen(
                    command,
                    cwd=folder,
                    env=clean_environment(**place | environment),
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    text=True,
                )
            )
    return ranks


def run(
    null_gpu: Path, folder: Path, data_dir: Path, *arguments: object, world_size: int = 1, **environment: str
) -> tuple[str, list[dict[str, Any]]]:
    """Train to the end: what rank 0 says, and each rank's account of what it launched."""
    ranks = start(null_gpu, folder, data_dir, *arguments, world_size=world_size, **environment)
    codes = [rank.wait(timeout=240) for rank in ranks]
    outputs = [(folder / f"output-{rank}.txt").read_text() for rank in range(world_size)]
    assert codes == [0] * world_size, "".join(outputs)
    return outputs[0], [json.loads(output.splitlines()[-1]) for output in outputs]


def check_account(account: dict[str, Any], *, num_nccl: int, is_main: bool = True) -> None:
    """Each step is one replay, once the two sizes of batch have been captured; a sync and a save wait once."""
    steps = account["step"]
    assert len(steps) == STEPS_PER_EPOCH * EPOCHS
    captures = [number for number, step in enumerate(steps) if "capture" in step]
    assert captures == [3, 4 * STEPS_PER_EPOCH - 1]
    for number in captures:
        assert steps[number]["replay"] == 1
        assert steps[number].get("nccl node", 0) == num_nccl
    for number, step in enumerate(steps):
        starts_epoch, is_short = number % STEPS_PER_EPOCH == 0, number % STEPS_PER_EPOCH == STEPS_PER_EPOCH - 1
        if number <= 3 or (is_short and number <= captures[1]):
            continue
        rest = {
            kind: n for kind, n in step.items() if not (starts_epoch and kind in ("copy", "copy to device", "wait"))
        }
        if starts_epoch:
            assert rest.pop("kernel") < 20  # the row, and random warps where there are any
        assert rest == REPLAY, f"step {number}: {step}"
    assert {sync["wait"] for sync in account["sync"]} == {1}
    assert [work["wait"] for work in account["evaluate"]] == [1] * (EPOCHS if is_main else 0)
    assert len(account["save"]) == EPOCHS


@pytest.mark.parametrize(
    "settings",
    [
        ["model=mlp", "precision=fp32"],
        ["best-mlp", "precision=bf16", "clip_grad_norm=1", "optimizer=sgd"],
        ["best-cnn", "micro_batch=50"],
    ],
    ids=lambda settings: settings[0],
)
def test_a_step_is_one_replay(null_gpu: Path, tmp_path: Path, data_dir: Path, settings: list[str]) -> None:
    output, (account,) = run(null_gpu, tmp_path, data_dir, *settings)
    assert "1 rank on cuda: Null GPU" in output
    assert "CUDA graph" not in output
    check_account(account, num_nccl=0)
    assert all(work["wait"] == 1 for work in account["save"])


# With bit_exact, each of log2 ranks halvings and as many doublings sends and receives.
@pytest.mark.parametrize(("world_size", "bit_exact", "num_nccl"), [(2, 0, 1), (2, 4, 4), (4, 0, 1)])
def test_a_step_of_several_ranks_is_one_replay_with_its_exchange(
    null_gpu: Path, tmp_path: Path, data_dir: Path, world_size: int, bit_exact: int, num_nccl: int
) -> None:
    settings = ["model=cnn", f"bit_exact={bit_exact}", "threads=1"]
    output, accounts = run(null_gpu, tmp_path, data_dir, *settings, world_size=world_size)
    assert f"{world_size} ranks on cuda: Null GPU" in output
    for rank, account in enumerate(accounts):
        check_account(account, num_nccl=num_nccl, is_main=rank == 0)


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("item", "operation not permitted when stream is capturing"),
        ("copy", "Cannot copy between CPU and CUDA tensors during CUDA graph capture"),
    ],
)
def test_a_step_that_cannot_be_captured_on_one_rank_is_replayed_on_none(
    null_gpu: Path, tmp_path: Path, data_dir: Path, fault: str, reason: str
) -> None:
    faults = {"NULL_GPU_FAULT": fault, "NULL_GPU_RANK": "1"}
    output, accounts = run(null_gpu, tmp_path, data_dir, "model=mlp", world_size=2, **faults)
    note = f"note: a step could not be captured as a CUDA graph on rank 1 on {os.uname().nodename}, its kernels are"
    assert output.count(note) == 1
    assert reason in output
    for account in accounts:
        assert not any("replay" in step for step in account["step"])


@pytest.mark.parametrize(("settings", "is_said"), [(["precision=fp16"], True), (["graph=off"], False)])
def test_a_step_that_is_not_to_be_captured(
    null_gpu: Path, tmp_path: Path, data_dir: Path, settings: list[str], is_said: bool
) -> None:
    output, (account,) = run(null_gpu, tmp_path, data_dir, "model=mlp", *settings)
    assert ("graph=auto launches the kernels of a step one by one: fp16" in output) == is_said
    assert not any("capture" in step for step in account["step"])


def test_bench_times_replayed_steps(null_gpu: Path, tmp_path: Path) -> None:
    devices = {"PYTHONPATH": str(REPOSITORY), "LD_PRELOAD": str(null_gpu), "NULL_GPU_DEVICES": "2"}
    command = [sys.executable, "-m", "mnist_dist", "bench", "model=mlp", "batch_size=64", "--json"]
    ended = subprocess.run(
        command, cwd=tmp_path, env=clean_environment(**devices), capture_output=True, text=True, timeout=240
    )
    assert ended.returncode == 0, ended.stderr
    steps = json.loads(ended.stdout.splitlines()[-1])["steps"]
    assert {step["ranks"] for step in steps} == {1, 2}
    assert all(step["is_cuda_graph"] for step in steps)


def test_a_lost_rank_is_named_where_nccl_fails_too(null_gpu: Path, tmp_path: Path, data_dir: Path) -> None:
    error = tmp_path / "nccl-error"
    ranks = start(
        *(null_gpu, tmp_path, data_dir, "model=mlp", "timeout_s=20"),
        world_size=2,
        epochs=100_000,
        NULL_GPU_NCCL_ERROR=str(error),
    )
    try:
        wait_for(has_steps(tmp_path / "run", 100))
        ranks[1].send_signal(signal.SIGKILL)
        error.touch()
        assert ranks[0].wait(timeout=120) == 1  # and not 134, of an abort
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    assert f"mnist-dist: rank 1 on {os.uname().nodename} does not answer" in (tmp_path / "output-0.txt").read_text()
    assert metrics(tmp_path / "run", "failed")[0]["cause"] == "rank_lost"
