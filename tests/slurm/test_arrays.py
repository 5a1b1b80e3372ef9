"""Several jobs and their table: a sweep over seeds as an array, and the same job on one and two nodes."""

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY, wait_for
from tests.slurm.cluster import Cluster
from tests.slurm.conftest import Job

TINY = ("model=mlp", "dataset=synthetic", "precision=no", "threads=1", "log_every_steps=1")


def runs_of(project: Path, kind: str) -> Path:
    """The folder of the only sweep or scaling run."""
    (folder,) = (project / "runs").glob(f"{kind}-*")
    return folder


def test_four_seeds_of_which_two_fit_at_once(cluster: Cluster, project: Path) -> None:
    command = ["slurm/sweep.sh", "--cpus-per-task=3", *TINY, "epochs=5", "seed=0,1,2,3"]
    output = cluster.client(*command, cwd=project)
    array = output.split("job ")[1].split(":")[0]
    folder = runs_of(project, "sweep")
    wait_for(lambda: len(cluster.client("squeue", "-h", "-r", "-j", array, "-t", "RUNNING").splitlines()) == 2)
    assert len(cluster.client("squeue", "-h", "-r", "-j", array, "-t", "PENDING").splitlines()) == 2
    jobs = [Job(cluster, project, f"{array}_{i}", folder / f"{i}.log") for i in range(4)]
    # One of them is disturbed; the requeue must be its own and not the whole array's.
    jobs[3].run_dir = folder / "003-seed=3"
    jobs[3].wait_for_steps(count=2)
    cluster.client("scancel", "--signal=USR1", jobs[3].id)
    for job in jobs:
        job.wait_for_end("COMPLETED")
    assert [job.show("Restarts") for job in jobs] == ["0", "0", "0", "1"]
    rows = (folder / "table.txt").read_text().splitlines()
    assert rows[0].split() == ["run", "hosts", "ranks", "starts", "step", "accuracy", "seconds", "images/s", "state"]
    assert [row.split()[0] for row in rows[1:5]] == [f"00{seed}-seed={seed}" for seed in range(4)]
    assert [row.split()[3] for row in rows[1:5]] == ["1", "1", "1", "2"]
    assert all(row.split()[4] == "80" and row.endswith("done") for row in rows[1:5])
    assert rows[5].startswith("accuracy of 4 runs: mean ")


def test_the_same_job_on_one_and_two_nodes(cluster: Cluster, project: Path) -> None:
    output = cluster.client("slurm/scaling.sh", "2", *TINY, cwd=project)
    folder = runs_of(project, "scaling")
    ids = output.split("jobs ")[1].split(":")[0].split()
    jobs = [Job(cluster, project, ids[i], folder / f"nodes-00{i + 1}.log") for i in range(2)]
    for job in jobs:
        job.wait_for_end("COMPLETED")
    assert jobs[0].show("EndTime") <= jobs[1].show("StartTime")  # they share nothing
    header, *rows = (folder / "table.txt").read_text().splitlines()
    columns = ["run", "hosts", "ranks", "starts", "step", "accuracy", "seconds", "images/s", "speed-up", "per rank"]
    assert re.split("  +", header) == [*columns, "state"]
    assert [row.split()[:5] for row in rows[:2]] == [
        ["nodes-001", "1", "1", "1", "16"],
        ["nodes-002", "2", "2", "1", "16"],
    ]
    images_per_s, faster, per_rank = zip(
        *([float(word.replace(",", "")) for word in row.split()[-4:-1]] for row in rows[:2]), strict=True
    )
    assert faster == pytest.approx((1, images_per_s[1] / images_per_s[0]), abs=0.006)
    assert per_rank == pytest.approx((1, faster[1] / 2), abs=0.011)  # both are rounded
    assert all(row.endswith("done") for row in rows[:2])


def test_an_array_that_is_larger_than_its_sweep_fails(submit: Callable[..., Job], tmp_path: Path) -> None:
    (tmp_path / "list").write_text("seed=0\n")
    job = submit("--array=3", SWEEP_LIST=str(tmp_path / "list"))
    job.wait_for_end("FAILED")
    assert job.show("ExitCode") == "2:0"
    assert f"there is no line 4 in SWEEP_LIST={tmp_path / 'list'}" in job.log


def test_the_table_needs_python_alone_and_takes_a_line_that_was_cut(tmp_path: Path) -> None:
    """A crash may have cut a line of metrics.jsonl short, or a run may be writing it, or not have begun."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    (tmp_path / "a" / "metrics.jsonl").write_text(
        '{"event": "start", "step": 0, "world_size": 1, "hosts": ["n1"]}\n'
        '{"event": "step", "step": 1, "images_per_s": 7.0}\n'
        '{"event": "step", "st\n'
        '{"event": "resume", "step": 1, "world_size": 1, "hosts": ["n1"]}\n'
        '{"event": "step", "ste'
    )
    command = [sys.executable, "-I", "-S", str(REPOSITORY / "slurm" / "table.py"), str(tmp_path)]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert [row.split() for row in output.splitlines()[1:]] == [
        ["a", "1", "1", "2", "1", "-", "-", "7.0", "running"],
        ["b", "-", "-", "0", "-", "-", "-", "-", "not", "started"],
    ]
    assert (tmp_path / "table.txt").read_text() == output
