"""The ways to start the job: each trains alike, hands on the exit code, and answers a wrong request in one sentence."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mnist_dist.cli import RANKED, VERBS
from tests.conftest import REPOSITORY, TRAIN, free_port, has_steps, losses, user_environment, wait_for
from tests.processes import processes_of, ranks_of

LOCAL, NODE = str(REPOSITORY / "launch/local.sh"), str(REPOSITORY / "launch/node.sh")
COMMON = ["dataset=synthetic", "model=mlp", "threads=1", "log_every_steps=1"]


def start(command: list[str], folder: Path, data_dir: Path, **environment: str) -> "subprocess.Popen[str]":
    """Start a launcher as a user would, both streams in one."""
    env = user_environment(folder, data_dir, **environment)
    return subprocess.Popen(command, cwd=folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def launch(command: list[str], folder: Path, data_dir: Path, **environment: str) -> tuple[int, str]:
    """Run a launcher to its end: its exit code, and what it printed."""
    process = start([*command, *COMMON], folder, data_dir, **environment)
    output, _ = process.communicate(timeout=240)
    return process.returncode, output


@pytest.mark.parametrize(
    ("command", "num_ranks", "environment"),
    [
        ([sys.executable, str(TRAIN)], 1, {}),
        (["accelerate", "launch", str(TRAIN)], 1, {}),
        (["torchrun", "--standalone", "--nproc-per-node=2", str(TRAIN)], 2, {}),
        ([LOCAL], 2, {"NPROC": "2"}),
        ([LOCAL], 1, {"MAX_RESTARTS": "1"}),
        ([NODE], 1, {"NNODES": "1", "NODE_RANK": "0", "MASTER_ADDR": "127.0.0.1"}),
    ],
    ids=["python", "accelerate", "torchrun", "local.sh", "local.sh, one rank that may restart", "node.sh"],
)
def test_every_launcher_ends_alike(
    command: list[str], num_ranks: int, environment: dict[str, str], data_dir: Path, tmp_path: Path
) -> None:
    if command == [NODE]:
        environment["MASTER_PORT"] = str(free_port())
    assert launch([sys.executable, str(TRAIN), "run_dir=straight", "precision=fp32"], tmp_path, data_dir)[0] == 0
    code, output = launch([*command, "run_dir=run", "precision=fp32"], tmp_path, data_dir, **environment)
    assert code == 0, output
    assert "Traceback" not in output
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "straight"), abs=1e-5 if num_ranks > 1 else 0)
    assert f"{num_ranks} rank" in output
    assert len(re.findall("test accuracy [0-9.]+ %", output)) == 1


@pytest.mark.parametrize("script", ["launch/local.sh", "launch/node.sh", "slurm/train.sh"])
def test_a_verb_that_needs_no_ranks_is_answered_as_it_is(script: str, data_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "run/checkpoints").mkdir(parents=True)  # as much of a run as a report needs
    process = start(["bash", str(REPOSITORY / script), "report", "run"], tmp_path, data_dir, DRY_RUN="1")
    output, _ = process.communicate(timeout=120)
    assert (process.returncode, output) == (0, "run/report.html\n")


def test_two_unconnected_processes_are_refused(data_dir: Path, tmp_path: Path) -> None:
    command = ["accelerate", "launch", "--cpu", "--num_processes", "4", str(TRAIN), "run_dir=run"]
    code, output = launch(command, tmp_path, data_dir)
    assert code != 0
    assert "`accelerate launch` was asked for several CPU processes and started one" in output
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("request_", "sentence"),
    [
        ("precision=fp16", "precision=fp16 needs a GPU (there is no gradient scaler on a CPU); use bf16, fp32 or auto"),
        ("resume=typo", "there is no whole checkpoint in typo; give a run's folder or one checkpoint's"),
    ],
)
def test_what_the_ranks_refuse_is_one_sentence(request_: str, sentence: str, data_dir: Path, tmp_path: Path) -> None:
    code, output = launch([LOCAL, request_], tmp_path, data_dir, NPROC="2", MAX_RESTARTS="1")
    assert output == f"mnist-dist: {sentence}\n"
    assert code == 2
    assert not list(tmp_path.glob("runs/*"))


def test_a_wrong_environment_is_one_sentence(data_dir: Path, tmp_path: Path) -> None:
    sentences = {
        ("NPROC", "two"): "local.sh: NPROC=two is not a number of ranks\n",
        ("MAX_RESTARTS", "often"): "local.sh: MAX_RESTARTS=often is not a number of restarts\n",
        ("MASTER_PORT", "99999"): "local.sh: MASTER_PORT=99999 is not a port, 1 to 65535\n",
        (
            "LOCAL_RANK",
            "x",
        ): "mnist-dist: LOCAL_RANK='x' in the environment is not a number, so the launch is incomplete\n",
    }
    for (name, value), sentence in sentences.items():
        assert launch([LOCAL], tmp_path, data_dir, **{name: value}) == (2, sentence)


def test_what_asks_for_no_training_is_answered_once(data_dir: Path, tmp_path: Path) -> None:
    code, output = launch([LOCAL, "--dry-run"], tmp_path, data_dir, NPROC="2")
    assert code == 0
    assert output.count("# world size: 2\n") == output.count("# world size") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_verb_without_ranks_is_answered_by_the_scripts(tmp_path: Path) -> None:
    for verb in VERBS.keys() - set(RANKED):
        for script in (LOCAL, NODE):  # the second would ask for NNODES
            process = start([script, verb, "--help"], tmp_path, tmp_path, NPROC="2")
            output, _ = process.communicate(timeout=60)
            assert (process.returncode, output[: len(verb) + 18]) == (0, f"usage: mnist-dist {verb}")


def test_the_run_directory_of_a_file_holds_and_latest_is_the_latest(data_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("max_steps: 2\nrun_dir: runs/of the file\n")
    assert launch([LOCAL, "recipe.yaml"], tmp_path, data_dir, NPROC="2")[0] == 0
    assert (tmp_path / "runs" / "latest").readlink().name == "of the file"
    assert launch([LOCAL, "max_steps=2"], tmp_path, data_dir, NPROC="2")[0] == 0
    assert re.fullmatch(r"mlp-\d{8}-\d{6}-\d+", (tmp_path / "runs" / "latest").readlink().name)


@pytest.mark.parametrize("is_stopped", [False, True], ids=["it is waited for", "a signal comes"])
def test_a_machine_that_never_comes_is_said(is_stopped: bool, data_dir: Path, tmp_path: Path) -> None:
    environment = {"NNODES": "2", "NODE_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    timeout_s = 300 if is_stopped else 8
    process = start([NODE, "run_dir=run", f"timeout_s={timeout_s}"], tmp_path, data_dir, **environment)
    assert process.stdout
    place = f"127.0.0.1:{environment['MASTER_PORT']}"
    first = process.stdout.readline()
    assert re.match(rf"node.sh: waiting for the launchers of all 2 machines to meet at {place}, since \d+ s of", first)
    if is_stopped:
        process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == (3 if is_stopped else 1)
    if is_stopped:
        sentence = "stopped before its ranks had started; nothing is lost, start it again"
    else:
        sentence = f"a machine did not come to {place} within 8 s (timeout_s); start this on each of the 2 machines"
    assert f"node.sh: {sentence}" in output
    assert "Traceback" not in output
    assert not processes_of(tmp_path)


def test_a_second_signal_ends_ranks_that_hang(data_dir: Path, tmp_path: Path) -> None:
    process = start([LOCAL, "run_dir=run", "epochs=100000", *COMMON], tmp_path, data_dir, NPROC="2")
    wait_for(has_steps(tmp_path / "run", 5))
    ranks = ranks_of(tmp_path)
    assert len(ranks) == 2
    os.kill(ranks[1], signal.SIGSTOP)
    process.send_signal(signal.SIGTERM)
    wait_for((tmp_path / "run" / "STOP").exists)
    process.send_signal(signal.SIGHUP)  # at once: it is the same wish
    time.sleep(1.5)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 137
    assert output.count("local.sh: asked the ranks to stop; once more ends them at once\n") == 1
    assert "Traceback" not in output
    wait_for(lambda: not processes_of(tmp_path))
