"""Training on two nodes: the same curve as one process, under both launchers, and what stops a job before it starts."""

import hashlib
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import losses, run_ranks
from tests.slurm.cluster import Cluster
from tests.slurm.conftest import Job, assert_tells, weights

SHORT = ("model=mlp", "dataset=synthetic", "epochs=2", "optimizer=sgd", "lr=0.02", "precision=no", "threads=1")
Submit = Callable[..., Job]


@pytest.mark.parametrize("launcher", ["srun", "accelerate"])
def test_two_nodes_of_two_ranks_train_as_one_process(
    launcher: str, submit: Submit, data_dir: Path, tmp_path: Path
) -> None:
    arguments = [*SHORT, "log_every_steps=1"]
    job = submit("--nodes=2", "--ntasks-per-node=2", *arguments, LAUNCHER=launcher)
    alone = run_ranks([*arguments, f"data_dir={data_dir}", "run_dir=run"], tmp_path)
    assert alone.code == 0, alone.output
    job.wait_for_end("COMPLETED")
    assert_tells(job.log, "restart 0, on n[1-2]; ranks: 4, 2 on each node", "4 ranks on cpu", "finished")
    assert "\x1b" not in job.log
    assert losses(job.run_dir) == pytest.approx(losses(tmp_path / "run"), abs=1e-5)
    for name, value in weights(tmp_path / "run").items():
        assert (weights(job.run_dir)[name] - value).abs().max() < 1e-5


def test_two_nodes_of_two_ranks_have_the_bits_of_one_process(submit: Submit, data_dir: Path, tmp_path: Path) -> None:
    """At the default recipe's learning rate, where the ordinary sum over ranks is 1e-3 apart."""
    arguments = ["cnn", "dataset=synthetic", "epochs=2", "bit_exact=4", "shift=2", "ema=0.99", "clip_grad_norm=1"]
    job = submit("--nodes=2", "--ntasks-per-node=2", *arguments)
    alone = run_ranks([*arguments, f"data_dir={data_dir}", "run_dir=run"], tmp_path)
    assert alone.code == 0, alone.output
    job.wait_for_end("COMPLETED")
    assert sha256_of_weights(job.run_dir) == sha256_of_weights(tmp_path / "run")


def sha256_of_weights(run_dir: Path) -> str:
    """Of the newest model.safetensors."""
    return hashlib.sha256((max((run_dir / "checkpoints").iterdir()) / "model.safetensors").read_bytes()).hexdigest()


def test_srun_alone_starts_one_world(cluster: Cluster, project: Path) -> None:
    """Without our scripts, SLURM's own variables say which rank a task is."""
    command = [sys.executable, "train.py", *SHORT, "max_steps=5", "run_dir=runs/srun"]
    wrapped = f"source slurm/site.sh; srun --nodes=2 {shlex.join(command)}"
    options = ["--parsable", "--output=%j.log", "--nodes=2", "--ntasks=2", "--wrap", wrapped]
    job = Job(cluster, project, cluster.client("sbatch", *options, cwd=project).strip())
    job.wait_for_end("COMPLETED")
    assert job.log.count("2 ranks on cpu") == 1, job.log


def test_a_verb_that_needs_no_ranks_runs_once(submit: Submit, project: Path) -> None:
    job = submit("--nodes=2", *SHORT, "max_steps=5", "run_dir=runs/to-evaluate")
    job.wait_for_end("COMPLETED")
    evaluation = submit("evaluate", "runs/to-evaluate")
    evaluation.wait_for_end("COMPLETED")
    assert evaluation.log.count("mlp on synthetic, test") == 1


def test_a_verdict_is_that_of_all_ranks(submit: Submit) -> None:
    job = submit("--nodes=2", "doctor", "dataset=synthetic")
    job.wait_for_end("COMPLETED")
    assert job.log.count("doctor: 2 ranks on 2 hosts") == 1, job.log
    assert job.log.count("verdict: PASS") == 1


def test_a_bad_configuration_fails_once(submit: Submit) -> None:
    job = submit("--nodes=2", "epochz=3")
    job.wait_for_end("FAILED")
    assert job.show("ExitCode") == "2:0"
    assert job.show("Restarts") == "0"
    assert job.log.count("there is no key epochz; did you mean epochs?") == 1
    assert not job.run_dir.exists()


def test_a_loss_that_is_not_finite_fails_once(submit: Submit) -> None:
    job = submit("--nodes=2", "model=mlp", "dataset=synthetic", "precision=no", "threads=1", "lr=1e30")
    job.wait_for_end("FAILED")
    assert job.show("ExitCode") == "1:0"
    assert job.show("Restarts") == "0"
    assert job.log.count("the loss is nan at step 1") == 1
    assert_tells(job.log, "the loss is nan at step 1", "failed by itself with exit code 1, so it is not requeued")


@pytest.mark.parametrize("options", [[], ["--nodes=2", "--ntasks-per-node=2"]], ids=["one rank", "four ranks"])
def test_nodes_without_data_say_once_how_to_fetch_it(options: list[str], submit: Submit, tmp_path: Path) -> None:
    job = submit(*options, f"data_dir={tmp_path}")
    job.wait_for_end("FAILED")
    assert job.show("Restarts") == "0"
    advice = (
        f"missing=fail forbids the network; run `mnist-dist fetch dataset=mnist data_dir={tmp_path}` where there is"
    )
    assert job.log.count(advice) == 1


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--nodes=2", "--ntasks=3", "--ntasks-per-node=2"], "the nodes differ in tasks (3 on 2 nodes)"),
        (["--nodes=2", "--gpus=3", "--cpus-per-gpu=1"], "the nodes differ in GPUs (n"),
        (["--gpus-per-node=2"], "a node's CPUs for this job (1) are fewer than its ranks (2); ask for --cpus-per-gpu"),
    ],
)
def test_what_slurm_gave_is_refused_where_it_cannot_work(options: list[str], sentence: str, submit: Submit) -> None:
    job = submit(*options)
    job.wait_for_end("FAILED")
    assert job.show("ExitCode") == "2:0"
    assert job.log.count(sentence) == 1


@pytest.mark.parametrize(
    ("hosts", "sentence"),
    [
        ("10.0.0.12 n2", "slurm: n2: the name of the job's first node, n1, cannot be resolved here"),
        ("127.0.0.1 n1\n10.0.0.12 n2", "slurm: n2: the name of the job's first node, n1, leads to 127.0.0.1 here"),
        ("10.0.0.11 n1\n127.0.1.1 n2", "slurm: n2: its own name, n2, leads to 127.0.1.1, where no other node"),
    ],
)
def test_names_that_would_end_in_a_hang_are_refused(
    hosts: str, sentence: str, cluster: Cluster, submit: Submit, tmp_path: Path
) -> None:
    (tmp_path / "hosts").write_text(f"{hosts}\n")
    with cluster.hosts.replaced("n2", "/etc/hosts", tmp_path / "hosts"):
        job = submit("--nodes=2", *SHORT)
        job.wait_for_end("FAILED")
    assert job.log.count(sentence) == 1
    assert "a node is not fit for this job, see above; nothing was started" in job.log
