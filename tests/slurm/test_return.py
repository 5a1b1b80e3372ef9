"""Coming back: whatever disturbs a job, it ends DONE by itself, with the weights of a run that nothing disturbed."""

import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.conftest import metrics, wait_for
from tests.slurm.cluster import Cluster
from tests.slurm.conftest import TRAINING, Job, Weights, assert_identical, assert_tells, weights

Submit = Callable[..., Job]
Undisturbed = Callable[[int], Weights]


def assert_done(job: Job, expected: Weights, restarts: int | None) -> None:
    job.wait_for_end("COMPLETED")
    assert restarts is None or job.show("Restarts") == str(restarts), job.log
    assert len(metrics(job.run_dir, "done")) == 1
    assert not (job.run_dir / "STOP").exists()
    assert_identical(weights(job.run_dir), expected)


@pytest.fixture(scope="module", autouse=True)
def too_short(submit: Submit) -> Iterator[tuple[Future[Job], Future[Job]]]:
    """Two jobs whose time limit ends them before they are done: one twice, with the signal that comes before the end,
    and one without. They take minutes, mostly of waiting, so all the tests of this file run meanwhile; the last ones
    look at them."""
    with ThreadPoolExecutor() as pool:
        in_time = submit("--partition=steady", "--nodelist=n1", "--time=1", *TRAINING)
        too_late = submit("--partition=steady", "--nodelist=n2", "--time=1", "--signal=B:CONT@1", *TRAINING)
        yield pool.submit(_run_out_of_time, in_time, 2), pool.submit(_run_out_of_time, too_late, 1)


def _run_out_of_time(job: Job, times: int) -> Job:
    """A slow machine: each start gets nowhere in its time. (The early signal may come before the first step.)"""
    for start in range(1, times + 1):

        def has(*events: str, start: int = start) -> bool:
            job.assert_not_ended()
            there = (job.run_dir / "metrics.jsonl").exists()
            return there and sum(len(metrics(job.run_dir, event)) for event in events) >= start

        wait_for(lambda: has("start", "resume"))
        for rank in job.ranks().values():
            os.kill(rank, signal.SIGSTOP)
        wait_for(lambda: (job.run_dir / "STOP").exists() or has("stop"))
        for rank in job.ranks().values():
            os.kill(rank, signal.SIGCONT)
        wait_for(lambda: has("stop"))
    return job


def test_a_signal_to_the_ranks(cluster: Cluster, submit: Submit, undisturbed: Undisturbed) -> None:
    job = submit("--nodes=2", *TRAINING)
    job.wait_for_steps()
    cluster.client("scancel", "--signal=USR1", job.id)
    assert_done(job, undisturbed(2), restarts=1)
    assert_tells(
        job.log,
        f"job {job.id}, restart 0, on n[1-2]; ranks: 2",
        "stopped at step",
        "by SIGUSR1",
        "not finished, since it was asked to stop; back into the queue, requeue 1 of at most 20",
        f"job {job.id}, restart 1, on n[1-2]; ranks: 2",
        "going on at step",
        "slurm:",
        "finished",
    )


def test_a_requeue(cluster: Cluster, submit: Submit, undisturbed: Undisturbed) -> None:
    job = submit("--nodes=2", *TRAINING, "run_dir=runs/größer & besser")
    job.run_dir = job.project / "runs" / "größer & besser"
    job.wait_for_steps()
    cluster.client("scontrol", "requeue", job.id)
    assert_done(job, undisturbed(2), restarts=1)
    assert_tells(job.log, "restart 0", "stopped at step", "restart 1", "going on at step", "finished")


def test_a_preemption(cluster: Cluster, submit: Submit, undisturbed: Undisturbed) -> None:
    job = submit("--nodes=2", "--cpus-per-task=3", *TRAINING)
    job.wait_for_steps()
    cluster.client(
        "sbatch", "--partition=urgent", "--nodes=2", "--cpus-per-task=2", "--output=/dev/null", "--wrap=true"
    )
    assert_done(job, undisturbed(2), restarts=1)
    assert_tells(
        job.log,
        "SIGUSR1: asking the ranks to save and stop",
        "by STOP",
        "not finished, since it was asked to stop; back into the queue",
        "restart 1",
        "finished",
    )


@pytest.mark.parametrize(("rank", "launcher"), [(0, "srun"), (1, "srun"), (0, "accelerate")])
def test_a_killed_rank(rank: int, launcher: str, submit: Submit, undisturbed: Undisturbed) -> None:
    job = submit("--nodes=2", *TRAINING, LAUNCHER=launcher)
    job.wait_for_steps()
    os.kill(job.ranks()[rank], signal.SIGKILL)
    assert_done(job, undisturbed(2), restarts=1)
    cause = "a rank was lost" if rank else "a rank was killed"  # rank 0 writes the run's record
    # A launcher ends its own ranks, so nobody is left to say that rank 0 is gone.
    name = "failed (exitcode: -9)" if (launcher, rank) == ("accelerate", 0) else f"rank {rank} on n{rank + 1} does not"
    assert_tells(job.log, name, f"since {cause}; back into the queue", "finished")


def test_a_signal_before_the_ranks_are_started(cluster: Cluster, submit: Submit, tmp_path: Path) -> None:
    slow = tmp_path / "python"
    slow.write_text(
        f"#!/bin/bash\ncd {tmp_path}; touch checking; while [ ! -e signalled ]; do sleep 0.1; done\n"
        f'cd "$OLDPWD"; exec {sys.executable} "$@"\n'
    )
    slow.chmod(0o755)
    job = submit(*TRAINING, "max_steps=5", PYTHON=str(slow))
    wait_for((tmp_path / "checking").exists)
    cluster.client("scancel", "--batch", "--signal=USR1", job.id)
    (tmp_path / "signalled").touch()
    job.wait_for_end("COMPLETED")
    assert job.show("Restarts") == "0"
    assert_tells(job.log, "SIGUSR1 came before the ranks were started; going on", "finished")


def test_the_number_of_requeues_is_bounded(cluster: Cluster, submit: Submit) -> None:
    job = submit(*TRAINING, MAX_REQUEUES="1")
    for start in (1, 2):
        job.wait_for_steps(start)
        cluster.client("scancel", "--batch", "--signal=USR1", job.id)
        wait_for(lambda start=start: job.log.count("SIGUSR1: asking") == start)
    job.wait_for_end("FAILED")
    assert job.show("ExitCode") == "3:0"
    assert job.show("Restarts") == "1"
    assert_tells(
        job.log, "requeue 1 of at most 1", "restart 1", "MAX_REQUEUES=1 is used up, so submit it again with run_dir="
    )


def test_without_scontrol_it_says_so_and_can_be_submitted_again(
    cluster: Cluster, submit: Submit, undisturbed: Undisturbed
) -> None:
    scontrol = shutil.which("scontrol")
    assert scontrol
    with (
        cluster.hosts.replaced("n1", scontrol, Path("/dev/null")),
        cluster.hosts.replaced("n2", scontrol, Path("/dev/null")),
    ):
        job = submit(*TRAINING)
        job.wait_for_steps()
        cluster.client("scancel", "--batch", "--signal=USR1", job.id)
        job.wait_for_end("FAILED")
    assert job.show("ExitCode") == "3:0"
    assert_tells(
        job.log, "stopped at step", "scontrol does not answer on n", f"run_dir=runs/mnist-dist-{job.id} to go on"
    )
    again = submit(*TRAINING, f"run_dir={job.run_dir}")
    again.wait_for_end("COMPLETED")
    assert_identical(weights(job.run_dir), undisturbed(1))


def test_a_cancelled_job_saves_and_stays_cancelled(cluster: Cluster, submit: Submit) -> None:
    job = submit(*TRAINING)
    job.wait_for_steps()
    cluster.client("scancel", job.id)
    job.wait_for_end("CANCELLED")
    assert job.show("Restarts") == "0"
    assert_tells(job.log, "stopped at step", "SLURM itself ends this job, and brings it back unless it was cancelled")
    assert list((job.run_dir / "checkpoints").iterdir())


def test_a_time_limit_that_is_too_short(too_short: tuple[Future[Job], Future[Job]], undisturbed: Undisturbed) -> None:
    job = too_short[0].result()
    assert_done(job, undisturbed(1), restarts=None)
    assert int(job.show("Restarts")) >= 2  # a slow machine has more
    round_trip = (": asking the ranks to save and stop", "stopped at step", "back into the queue, requeue")
    assert_tells(job.log, "restart 0", *round_trip, "restart 1", *round_trip, "restart 2", "finished")


def test_a_time_limit_without_a_warning(too_short: tuple[Future[Job], Future[Job]], undisturbed: Undisturbed) -> None:
    job = too_short[1].result()
    assert_done(job, undisturbed(1), restarts=1)
    assert_tells(job.log, "DUE TO TIME LIMIT", "back into the queue, requeue 1 of at most 20", "restart 1", "finished")


def test_a_lost_node_whose_ranks_train_on(cluster: Cluster, submit: Submit, undisturbed: Undisturbed) -> None:
    """The rank of the lost node writes while the job starts again on the other: the lock and the STOP file hold."""
    job = submit(*TRAINING)
    job.wait_for_steps()
    (orphan,) = job.ranks().values()
    os.kill(orphan, signal.SIGSTOP)  # so that it is not done before SLURM has noticed
    with cluster.without_slurmd(job.show("BatchHost")):
        wait_for(lambda: "of an earlier start, still trains here: asking it to stop" in job.log)
        os.kill(orphan, signal.SIGCONT)
        assert_done(job, undisturbed(1), restarts=1)
    assert [stop["reason"] for stop in metrics(job.run_dir, "stop")] == ["STOP"]
    assert_tells(
        job.log,
        "SLURM itself ends this job",
        "restart 1",
        "still trains here: asking it to stop",
        "going on at step",
        "finished",
    )


def test_a_lost_node_of_two(cluster: Cluster, submit: Submit, undisturbed: Undisturbed) -> None:
    job = submit("--nodes=2", *TRAINING)
    job.wait_for_steps()
    for rank in job.ranks().values():
        os.kill(
            rank, signal.SIGSTOP
        )  # so that the run is not done before SLURM has noticed; it wakes those it can reach
    with cluster.without_slurmd("n2"):
        wait_for(lambda: job.show("Restarts") == "1")
    # SLURM may take a node that is back so soon for lost once more.
    assert_done(job, undisturbed(2), restarts=None)
    assert_tells(job.log, "DUE TO NODE FAILURE", "restart 1", "going on at step", "finished")
