"""What the tests share: datasets in small, and real processes started as a launcher would."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).parents[1]
TRAIN = REPOSITORY / "train.py"
NUM_TRAIN, NUM_TEST = 1000, 200  # of the small dataset: 16 batches of 64, the last of 40


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small dataset of drawn digits under the name synthetic."""
    from mnist_dist.digits import draw_digits
    from mnist_dist.fetch import dataset_file, write_dataset

    folder = tmp_path_factory.mktemp("data")
    path = dataset_file("synthetic", folder)
    write_dataset(path, "synthetic", draw_digits(NUM_TRAIN, seed=0), draw_digits(NUM_TEST, seed=1))
    return folder


@pytest.fixture(scope="session")
def raw_mnist() -> Path:
    """The folder of the four original MNIST archives, or a skip that says why."""
    folder = os.environ.get("MNIST_DIST_TEST_RAW", "")
    if not folder or not Path(folder).is_dir():
        pytest.skip("MNIST_DIST_TEST_RAW names no folder with the four original MNIST files")
    return Path(folder)


@pytest.fixture(scope="session")
def mnist_dir(raw_mnist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data_dir with the real MNIST in it."""
    from mnist_dist.fetch import fetch

    folder = tmp_path_factory.mktemp("mnist")
    fetch("mnist", folder, mirror=str(raw_mnist))
    return folder


def clean_environment(**extra: str) -> dict[str, str]:
    """This process's environment without what a launcher or a user's settings would put there."""
    prefixes = ("ACCELERATE_", "MNIST_DIST_", "SLURM_", "OMP_", "PET_")
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    kept = {k: v for k, v in os.environ.items() if not k.startswith(prefixes) and k not in names}
    return kept | extra


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


@dataclass
class Result:
    """How a job of one or several ranks ended."""

    codes: list[int]
    output: str  # of all ranks, both streams

    @property
    def code(self) -> int:
        assert len(set(self.codes)) == 1, f"exit codes {self.codes}\n{self.output}"
        return self.codes[0]


def start_ranks(
    arguments: Sequence[object], log: Path, *, world_size: int = 1, **environment: str
) -> list[subprocess.Popen[bytes]]:
    """Start train.py once a rank, as srun does, all output into one file."""
    command = [sys.executable, str(TRAIN), *map(str, arguments)]
    port = free_port()
    processes = []
    with log.open("ab") as output:
        for rank in range(world_size):
            ranks = {}
            if world_size > 1:
                ranks = {
                    "RANK": str(rank),
                    "LOCAL_RANK": str(rank),
                    "WORLD_SIZE": str(world_size),
                    "LOCAL_WORLD_SIZE": str(world_size),
                    "MASTER_ADDR": "127.0.0.1",
                    "MASTER_PORT": str(port),
                }
            env = clean_environment(PYTHONWARNINGS="error::UserWarning:mnist_dist", **ranks, **environment)
            processes.append(
                subprocess.Popen(command, cwd=log.parent, env=env, stdout=output, stderr=subprocess.STDOUT)
            )
    return processes


def wait_ranks(processes: list[subprocess.Popen[bytes]], log: Path, timeout_s: float = 240) -> Result:
    """Wait for all of them; kill them where that takes too long."""
    try:
        codes = [p.wait(timeout_s) for p in processes]
    except subprocess.TimeoutExpired:
        for p in processes:
            p.send_signal(signal.SIGKILL)
            p.wait()
        raise AssertionError(f"did not end within {timeout_s} s:\n{log.read_text()}") from None
    return Result(codes, log.read_text(errors="replace"))


def run_ranks(arguments: Sequence[object], folder: Path, *, world_size: int = 1, **environment: str) -> Result:
    """Start train.py and wait for its end."""
    log = folder / f"output-{len(list(folder.glob('output-*')))}.txt"
    return wait_ranks(start_ranks(arguments, log, world_size=world_size, **environment), log)


def metrics(run_dir: Path, event: str) -> list[dict[str, Any]]:
    """The records of one kind in a run's metrics.jsonl."""
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [r for r in records if r["event"] == event]


def losses(run_dir: Path) -> list[float]:
    """The loss of each step, in order; where a step was trained again after a resume, the later one."""
    by_step = {r["step"]: r["loss"] for r in metrics(run_dir, "step")}
    assert sorted(by_step) == list(range(len(by_step)))
    return [by_step[step] for step in range(len(by_step))]


@pytest.fixture
def cwd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty working directory."""
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    shutil.rmtree(tmp_path, ignore_errors=True)
