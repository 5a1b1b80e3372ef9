"""What only a GPU can show, by whole runs on one, and on two where there are two.

`make gpu` runs this; with ACCELERATE_USE_CPU=true the same runs take the CPU, where a step is never replayed.
"""

import functools
import hashlib
import os
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from mnist_dist.distributed.launch_env import read_launch_env
from tests.conftest import FORKS, Result, become, has_steps, losses, metrics, start_ranks, wait_for, wait_ranks

ON_CPU = read_launch_env(os.environ).use_cpu
NUM_GPUS = 0 if ON_CPU else torch.cuda.device_count()
HARD = ["shift=1", "elastic=1", "ema=0.9", "clip_grad_norm=1", "label_smoothing=0.1"]
CAPTURE_NOTE = "could not be captured"

pytestmark = [
    pytest.mark.skipif(not (NUM_GPUS or ON_CPU), reason="there is no GPU"),
    pytest.mark.timeout(200),
]
two_gpus = pytest.mark.skipif(NUM_GPUS < 2, reason="there are no two GPUs")


def run(
    folder: Path, data_dir: Path, *arguments: object, world_size: int = 1, target: Callable[..., None] = become
) -> Result:
    """Train on the drawn digits, into the folder `run`, with each step's loss in the records."""
    folder.mkdir(exist_ok=True)
    log = folder / f"output-{len(list(folder.glob('output-*')))}.txt"
    ranks = start(data_dir, log, arguments, world_size=world_size, target=target)
    return wait_ranks(ranks, log, timeout_s=180)


def start(data_dir: Path, log: Path, arguments: Sequence[object], *, use_cpu: bool = ON_CPU, **options: Any) -> Any:
    """Start the ranks of `run`, in the folder of `log`."""
    place = ["dataset=synthetic", f"data_dir={data_dir}", "run_dir=run", "log_every_steps=1", "batch_size=128"]
    return start_ranks([*place, *arguments], log, ACCELERATE_USE_CPU="true" if use_cpu else "false", **options)


def sha256(folder: Path) -> str:
    """Of the weights in a run's last checkpoint."""
    last = max((folder / "run/checkpoints").glob("step-*"))
    return hashlib.sha256((last / "model.safetensors").read_bytes()).hexdigest()


def check_same_run(one: Path, other: Path) -> None:
    """Losses and weights are the same, bit for bit."""
    assert losses(one / "run") == losses(other / "run")
    assert sha256(one) == sha256(other)


def cannot_capture(arguments: list[str], folder: Path, log: Path, environment: dict[str, str]) -> None:
    """Be a run whose steps cannot be captured: the same kernels, launched one by one."""
    from mnist_dist.training import train_step

    def fail(_: Any) -> Any:
        raise RuntimeError("not wanted in this test")

    train_step.StepGraphs = functools.partial(train_step.StepGraphs, capture=fail)  # type: ignore[misc, assignment]
    become(arguments, folder, log, environment)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "tf32"])
@pytest.mark.parametrize("model", ["mlp", "cnn"])
def test_a_replayed_step_has_the_bits_of_its_kernels_one_by_one(
    model: str, precision: str, data_dir: Path, tmp_path: Path
) -> None:
    if ON_CPU and precision == "tf32":
        pytest.skip("tf32 is for GPUs")
    replayed, one_by_one = tmp_path / "replayed", tmp_path / "one-by-one"
    arguments = (f"model={model}", f"precision={precision}", "epochs=6", *HARD)
    result = run(replayed, data_dir, *arguments)
    assert result.code == 0, result.output
    assert CAPTURE_NOTE not in result.output
    result = run(one_by_one, data_dir, *arguments, target=cannot_capture)
    assert result.code == 0, result.output
    assert (CAPTURE_NOTE in result.output) != ON_CPU
    check_same_run(replayed, one_by_one)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("model", ["mlp", "cnn"])
def test_it_learns_as_on_the_cpu(model: str, precision: str, data_dir: Path, tmp_path: Path) -> None:
    """The first losses are the CPU's in fp32, as far as the precision goes, and all of them fall."""
    if ON_CPU and precision == "fp16":
        pytest.skip("fp16 is for GPUs")
    result = run(tmp_path / "here", data_dir, f"model={model}", f"precision={precision}", "epochs=8")
    assert result.code == 0, result.output
    log = tmp_path / "output.txt"
    ranks = start(data_dir, log, [f"model={model}", "precision=fp32", "epochs=8"], use_cpu=True)
    assert wait_ranks(ranks, log).code == 0
    here, on_cpu = losses(tmp_path / "here/run"), losses(tmp_path / "run")
    assert here[:4] == pytest.approx(on_cpu[:4], rel=1e-4 if precision == "fp32" else 0.03)
    assert here[-1] < here[0] / 2


def test_a_run_that_was_cut_goes_on_with_the_same_bits(data_dir: Path, tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert run(whole, data_dir, "model=cnn", "epochs=6", *HARD).code == 0
    cut.mkdir()
    (rank,) = start(data_dir, cut / "output-0.txt", ["model=cnn", "epochs=6", *HARD])
    wait_for(has_steps(cut / "run", 20))
    os.kill(rank.pid, signal.SIGKILL)
    rank.join()
    result = run(cut, data_dir, "model=cnn", "epochs=6", *HARD)
    assert result.code == 0, result.output
    check_same_run(whole, cut)


def test_the_weights_classify_the_same_on_the_cpu(data_dir: Path, tmp_path: Path) -> None:
    assert run(tmp_path, data_dir, "model=cnn", "precision=bf16", "epochs=6").code == 0
    evaluated = metrics(tmp_path / "run", "eval")[-1]
    from mnist_dist.api import predict  # on the CPU
    from mnist_dist.data.dataset import load_dataset

    test = load_dataset("synthetic", data_dir).eval_split
    right = (torch.as_tensor(predict(tmp_path / "run", test.images)).argmax(1) == test.labels).sum()
    assert int(right) / len(test.labels) == pytest.approx(evaluated["accuracy"], abs=1.5 / len(test.labels))


def _capture_nccl(folder: Path) -> None:
    """In another process: a captured exchange of a group of one, replayed twice; leaves what came out."""
    import torch.distributed as dist

    from mnist_dist.training.cuda_graph import capture_cuda_graph

    store = dist.FileStore(str(folder / "store"), 1)
    device = torch.device("cuda", 0)
    dist.init_process_group("nccl", store=store, rank=0, world_size=1, device_id=device)
    vector = torch.arange(4.0, device=device)

    def exchange() -> None:
        vector.mul_(2)
        dist.all_reduce(vector)

    exchange()
    torch.cuda.synchronize()
    replay = capture_cuda_graph(exchange)
    replay()
    replay()
    (folder / "sums").write_text(str(vector.tolist()))
    dist.destroy_process_group()


@pytest.mark.skipif(not NUM_GPUS, reason="NCCL needs a GPU")
def test_an_exchange_by_nccl_becomes_part_of_a_graph(tmp_path: Path) -> None:
    process = FORKS.Process(target=_capture_nccl, args=(tmp_path,))
    process.start()
    process.join(120)
    process.kill()
    assert (tmp_path / "sums").read_text() == "[0.0, 8.0, 16.0, 24.0]"  # doubled three times: the capture runs nothing


@two_gpus
@pytest.mark.parametrize("model", ["mlp", "cnn"])
def test_bit_exact_on_two_gpus_has_the_bits_of_one(model: str, data_dir: Path, tmp_path: Path) -> None:
    arguments = (f"model={model}", "bit_exact=4", "epochs=6", *HARD)
    for world_size in (1, 2):
        result = run(tmp_path / str(world_size), data_dir, *arguments, world_size=world_size)
        assert result.code == 0, result.output
        assert CAPTURE_NOTE not in result.output
    check_same_run(tmp_path / "1", tmp_path / "2")


@two_gpus
def test_a_lost_rank_is_named(data_dir: Path, tmp_path: Path) -> None:
    log = tmp_path / "output-0.txt"
    ranks = start(data_dir, log, ["model=mlp", "epochs=100000", "timeout_s=20"], world_size=2)
    try:
        wait_for(has_steps(tmp_path / "run", 200))
        os.kill(ranks[1].pid, signal.SIGKILL)
        ranks[0].join(120)
        assert ranks[0].exitcode == 1
    finally:
        for rank in ranks:
            rank.kill()
    assert "mnist-dist: rank 1 on " in log.read_text()
    assert metrics(tmp_path / "run", "failed")[0]["cause"] == "rank_lost"
