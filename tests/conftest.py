"""What the tests share: datasets in small, and real processes started as a launcher would."""

import json
import multiprocessing
import os
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any, NoReturn

import pytest

REPOSITORY = Path(__file__).parents[1]
TRAIN = REPOSITORY / "train.py"
NUM_TRAIN, NUM_TEST = 1000, 200  # of the small dataset: 16 batches of 64, the last of 40


def skip(need: str, reason: str) -> NoReturn:
    """Skip a test for want of something, unless MNIST_DIST_TEST_REQUIRE says that it is there."""
    if need in os.environ.get("MNIST_DIST_TEST_REQUIRE", "").split():
        pytest.fail(f"this must not be skipped here: {reason}")
    pytest.skip(reason)


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small dataset of drawn digits under the name synthetic."""
    return make_data(tmp_path_factory.mktemp("data"))


def make_data(folder: Path, num_train: int = NUM_TRAIN, seed: int = 0) -> Path:
    """Fill a folder with a small dataset of drawn digits under the name synthetic, and return it."""
    from mnist_dist.data.dataset import dataset_file, write_dataset
    from mnist_dist.data.synthetic import draw_digits

    folder.mkdir(exist_ok=True)
    train, test = draw_digits(num_train, seed), draw_digits(NUM_TEST, seed + 1)
    write_dataset(dataset_file("synthetic", folder), "synthetic", train, test)
    return folder


@pytest.fixture(scope="session")
def raw_mnist() -> Path:
    """The folder of the four original MNIST archives, or a skip that says why."""
    folder = os.environ.get("MNIST_DIST_TEST_RAW", "")
    if not folder or not Path(folder).is_dir():
        skip("real_data", "MNIST_DIST_TEST_RAW names no folder with the four original MNIST files")
    return Path(folder)


@pytest.fixture(scope="session")
def mnist_dir(raw_mnist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data_dir with the real MNIST in it."""
    from mnist_dist.data.download import fetch

    folder = tmp_path_factory.mktemp("mnist")
    fetch("mnist", folder, mirror=str(raw_mnist))
    return folder


@pytest.fixture(scope="session")
def mnist_run(mnist_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder: the CNN after a third of an epoch on the real MNIST, about 99 % right."""
    return make_run(tmp_path_factory.mktemp("mnist_run"), "cnn-fast", f"data_dir={mnist_dir}")


@pytest.fixture(scope="session")
def drawn_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder: the CNN on drawn digits, about 98 % right."""
    folder = tmp_path_factory.mktemp("drawn_run")
    data_dir = make_data(folder / "data", 4000)
    return make_run(folder, "cnn", "dataset=synthetic", f"data_dir={data_dir}", "epochs=3", "shift=2")


def make_run(folder: Path, *arguments: object) -> Path:
    """Train in `folder`, and return the run's folder."""
    result = run_ranks([*arguments, "run_dir=run", "threads=1"], folder)
    assert result.code == 0, result.output
    return folder / "run"


def clean_environment(**extra: str) -> dict[str, str]:
    """This process's environment without what a launcher or a user's settings would put there."""
    prefixes = ("ACCELERATE_", "MNIST_DIST_", "SLURM_", "OMP_", "PET_")
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    kept = {k: v for k, v in os.environ.items() if not k.startswith(prefixes) and k not in names}
    on_cpu = {"ACCELERATE_USE_CPU": "true"} if Path("/dev/nvidia0").exists() else {}  # one GPU is not enough for two
    return kept | {"TORCH_CPP_LOG_LEVEL": "ERROR"} | on_cpu | extra


def user_environment(folder: Path, data_dir: Path, **extra: str) -> dict[str, str]:
    """The same for a launcher that is started as a user would, with no settings of Accelerate's at home."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return clean_environment(PATH=path, HF_HOME=str(folder), MNIST_DIST_DATA_DIR=str(data_dir), **extra)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


# Real processes, forked from a server that has imported torch already: a start takes tenths of a second, not seconds.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    ["mnist_dist.commands.train", "mnist_dist.report.page", "tests.conftest", "accelerate", "torchvision.datasets"]
)


@dataclass
class Result:
    """How a job of one or several ranks ended."""

    codes: list[int]
    output: str  # of all ranks, both streams

    @property
    def code(self) -> int:
        assert len(set(self.codes)) == 1, f"exit codes {self.codes}\n{self.output}"
        return self.codes[0]


def become(arguments: list[str], folder: Path, log: Path, environment: dict[str, str]) -> None:
    """In a forked process: be what `python train.py` would be."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests may run under nohup, which a run takes for its own
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    from mnist_dist.cli import main
    from mnist_dist.run import stop

    stop._STARTED_S = time.time()  # the module was imported long ago
    sys.exit(main(arguments))


def start_verb(
    arguments: Sequence[object], log: Path, target: Callable[..., None] = become, **environment: str
) -> ForkServerProcess:
    """Start `mnist-dist VERB ...` in the folder of `log`, all output into it."""
    process = FORKS.Process(
        target=target, args=([*map(str, arguments)], log.parent, log, clean_environment(**environment))
    )
    process.start()
    return process


def rank_environment(rank: int, world_size: int, port: int) -> dict[str, str]:
    """The variables that a launcher sets for a rank of this machine."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def start_ranks(
    arguments: Sequence[object],
    log: Path,
    *,
    world_size: int = 1,
    target: Callable[..., None] = become,
    **environment: str,
) -> list[ForkServerProcess]:
    """Start `train` once a rank, with the variables that srun's tasks set, all output into one file.

    `target` may be a function that changes something in the new process and then calls `become`.
    """
    port = free_port()
    processes = []
    for rank in range(world_size):
        ranks = rank_environment(rank, world_size, port) if world_size > 1 else {}
        processes.append(start_verb(["train", *arguments], log, target, **ranks, **environment))
    return processes


def wait_ranks(processes: Sequence[ForkServerProcess], log: Path, timeout_s: float = 240) -> Result:
    """Wait for all of them; kill them where that takes too long. A code below zero is the signal that killed."""
    deadline_s = time.monotonic() + timeout_s
    for process in processes:
        process.join(max(deadline_s - time.monotonic(), 0))
    if any(process.exitcode is None for process in processes):
        for process in processes:
            process.kill()
            process.join()
        raise AssertionError(f"did not end within {timeout_s} s:\n{log.read_text()}")
    return Result([process.exitcode or 0 for process in processes], log.read_text(errors="replace"))


def run_ranks(arguments: Sequence[object], folder: Path, *, world_size: int = 1, **environment: str) -> Result:
    """Run `train` to its end, in `folder`."""
    log = folder / f"output-{len(list(folder.glob('output-*')))}.txt"
    return wait_ranks(start_ranks(arguments, log, world_size=world_size, **environment), log)


def wait_for(condition: Callable[[], bool], timeout_s: float = 120) -> None:
    """Poll until it is true."""
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, "it never came"
        time.sleep(0.02)


def has_steps(run_dir: Path, count: int) -> Callable[[], bool]:
    """Whether a run has recorded so many steps."""
    return lambda: (run_dir / "metrics.jsonl").exists() and len(metrics(run_dir, "step")) >= count


def metrics(run_dir: Path, event: str) -> list[dict[str, Any]]:
    """The records of one kind in a run's metrics.jsonl."""
    lines = (run_dir / "metrics.jsonl").read_text().splitlines(keepends=True)
    records = [json.loads(line) for line in lines if line.endswith("\n")]  # the last may be being written
    return [r for r in records if r["event"] == event]


def losses(run_dir: Path) -> list[float]:
    """The loss of each step, in order; where a step was trained again after a resume, the later one."""
    by_step = {r["step"]: r["loss"] for r in metrics(run_dir, "step")}
    assert sorted(by_step) == list(range(len(by_step)))
    return [by_step[step] for step in range(len(by_step))]


@pytest.fixture
def one_thread() -> Iterator[None]:
    """torch on one thread: where other tests run beside, several would wait for each other at each small operation."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def cwd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty working directory."""
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    shutil.rmtree(tmp_path, ignore_errors=True)
