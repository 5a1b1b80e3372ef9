"""What the tests on the SLURM cluster share: the cluster, a project folder on it, and jobs."""

import shlex
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import REPOSITORY, metrics, run_ranks, wait_for
from tests.slurm.cluster import NODES, Cluster

# About 0.01 s a step with two ranks here, so there is time to disturb it.
TRAINING = ("model=mlp", "dataset=synthetic", "epochs=30", "precision=no", "threads=1", "log_every_steps=1")
ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED"}


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    with Cluster() as cluster:
        yield cluster


@pytest.fixture(scope="session")
def project(cluster: Cluster, data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project's folder as on a login node, with a slurm/site.sh of this site, and runs/ of the tests."""
    return make_project(tmp_path_factory.mktemp("project"), data_dir)


def make_project(folder: Path, data_dir: Path) -> Path:
    """Fill a folder with links to what the jobs need, and a slurm/site.sh."""
    folder.mkdir(exist_ok=True)
    for name in ("train.py", "launch", "configs"):
        (folder / name).symlink_to(REPOSITORY / name)
    (folder / "slurm").mkdir()
    for path in (REPOSITORY / "slurm").iterdir():
        if path.name != "site.sh":
            (folder / "slurm" / path.name).symlink_to(path)
    (folder / "slurm" / "site.sh").write_text(
        f"export PYTHON=${{PYTHON:-{shlex.quote(sys.executable)}}} MNIST_DIST_DATA_DIR={shlex.quote(str(data_dir))}\n"
        "false; : ${UNSET_IN_A_MODULE}\n"  # as modules do, which are not written for set -eu
    )
    return folder


class Job:
    """A job that was submitted with sbatch."""

    def __init__(self, cluster: Cluster, project: Path, job_id: str, log: Path | None = None) -> None:
        self.cluster, self.project, self.id = cluster, project, job_id
        self.log_path = log or project / f"{job_id}.log"
        self.run_dir = project / "runs" / f"mnist-dist-{job_id}"

    @property
    def log(self) -> str:
        return self.log_path.read_text() if self.log_path.exists() else ""

    def show(self, field: str) -> str:
        """A field of `scontrol show job`."""
        words = self.cluster.client("scontrol", "--oneliner", "show", "job", self.id).split()
        return next(word.partition("=")[2] for word in words if word.startswith(f"{field}="))

    def wait_for_steps(self, starts: int = 1, count: int = 20) -> None:
        """Wait until this start of the job has trained so many steps."""

        def trained() -> bool:
            self.assert_not_ended()
            if not (self.run_dir / "metrics.jsonl").exists():
                return False
            begun = [*metrics(self.run_dir, "start"), *metrics(self.run_dir, "resume")]
            return (
                len(begun) == starts
                and metrics(self.run_dir, "step")[-1:] != []
                and (metrics(self.run_dir, "step")[-1]["step"] >= begun[-1]["step"] + count)
            )

        wait_for(trained)

    def assert_not_ended(self) -> None:
        assert self.show("JobState") not in ENDED, self.log

    def wait_for_end(self, state: str) -> None:
        """Wait until it has ended for good, and check how, and that nothing of it is left on a node."""
        wait_for(lambda: self.show("JobState") in ENDED, timeout_s=240)
        assert self.show("JobState") == state, self.log
        wait_for(lambda: not any(self.processes(node) for node in NODES))

    def processes(self, node: str) -> dict[int, list[str]]:
        """Pid and command of each process of this job on a node."""
        return {
            pid: command for pid, command in self.cluster.processes(node).items() if _belongs_to(pid, command, self.id)
        }

    def ranks(self) -> dict[int, int]:
        """The pid of each rank's Python process."""
        return {
            int(environment["RANK"]): pid
            for node in NODES
            for pid, command in self.processes(node).items()
            if "train.py" in " ".join(command[1:3]) and "RANK" in (environment := _environment(pid))
        }


def _environment(pid: int) -> dict[str, str]:
    try:
        pairs = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace").split("\0")
    except OSError:  # it has just ended
        return {}
    return dict(pair.split("=", 1) for pair in pairs if "=" in pair)


def _belongs_to(pid: int, command: list[str], job_id: str) -> bool:
    return command[0].startswith(f"slurmstepd: [{job_id}.") or _environment(pid).get("SLURM_JOB_ID") == job_id


@pytest.fixture(scope="session")
def submit(cluster: Cluster, project: Path) -> Callable[..., Job]:
    """Call it with the arguments of `sbatch slurm/train.sh`; those that start with - are sbatch's own."""

    def submit(*arguments: str, **environment: str) -> Job:
        options = [argument for argument in arguments if argument.startswith("-")]
        own = [argument for argument in arguments if not argument.startswith("-")]
        command = ["sbatch", "--parsable", "--output=%j.log", *options, "slurm/train.sh", *own]
        return Job(cluster, project, cluster.client(*command, cwd=project, **environment).strip())

    return submit


Weights = dict[str, torch.Tensor]


def weights(run_dir: Path) -> Weights:
    """The last weights of a run."""
    return load_file(max((run_dir / "checkpoints").iterdir()) / "model.safetensors")


@pytest.fixture(scope="session")
def undisturbed(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Weights]:
    """The weights of TRAINING with so many ranks and nothing that disturbs it."""
    found: dict[int, Weights] = {}

    def train(world_size: int) -> Weights:
        if world_size not in found:
            folder = tmp_path_factory.mktemp("undisturbed")
            arguments = [*TRAINING, f"data_dir={data_dir}", "run_dir=run"]
            result = run_ranks(arguments, folder, world_size=world_size)
            assert result.code == 0, result.output
            found[world_size] = weights(folder / "run")
        return found[world_size]

    return train


def assert_identical(found: Weights, expected: Weights) -> None:
    """Going on from a checkpoint is exact, so the weights are the same to the last bit."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def assert_tells(log: str, *phrases: str) -> None:
    """The log has these, in this order."""
    position = 0
    for phrase in phrases:
        assert phrase in log[position:], f"{phrase!r} is not in, or not in this order:\n{log}"
        position = log.index(phrase, position) + len(phrase)
