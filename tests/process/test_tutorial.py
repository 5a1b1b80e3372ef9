"""The tutorial's stages: each is a short change to the one before, runs, shows the fault that the next one ends."""

import contextlib
import difflib
import functools
import gzip
import itertools
import os
import re
import resource
import runpy
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DistributedSampler

from tests.conftest import (
    FORKS,
    REPOSITORY,
    Result,
    clean_environment,
    free_port,
    rank_environment,
    wait_for,
    wait_ranks,
)

PAGE = REPOSITORY / "docs" / "TUTORIAL.md"
TUTORIAL = REPOSITORY / "docs" / "tutorial"
STAGES = sorted(TUTORIAL.glob("[0-9]*.py"))
FAULTS = sorted((TUTORIAL / "faults").glob("*.diff"))
NUM_TRAIN, NUM_TEST = 1001, 500  # 16 steps an epoch, the last of 41 images; 8 test batches, the last of 52
EPOCH = re.compile(
    r"epoch (\d+): (\d+) steps, ([\d,]+) images in .* s, loss ([\d.]+); test: ([\d,]+) of ([\d,]+) right"
)


def changed_lines(old: str, new: str) -> int:
    """How many lines a unified diff of two texts takes out and puts in."""
    lines = difflib.unified_diff(old.splitlines(), new.splitlines(), n=0)
    return sum(line[0] in "+-" and not line.startswith(("+++", "---")) for line in lines)


def test_each_stage_is_a_short_change_to_the_one_before() -> None:
    assert [int(path.name[:2]) for path in STAGES] == list(range(10))
    texts = [path.read_text() for path in STAGES]
    counts = [changed_lines(old, new) for old, new in itertools.pairwise(texts)]
    assert max(counts) < 30, counts
    assert len((TUTORIAL / "10_slurm.sh").read_text().splitlines()) < 30
    assert max(len(text.splitlines()) for text in texts) <= 120


def test_the_page_has_the_changes_and_names_files_that_are_there() -> None:
    page = PAGE.read_text()
    for path in FAULTS:
        assert f"```diff\n{path.read_text()}```\n" in page, path
        assert f"git apply docs/tutorial/faults/{path.name}" in page
    for old, new in itertools.pairwise(STAGES):
        count = changed_lines(old.read_text(), new.read_text())
        assert f"`{new.name}` ({count} changed lines)" in page
    for name in re.findall(r"(?<![\w/.])(?:docs|mnist_dist|slurm|launch|configs)/[\w./]+\w", page):
        assert (REPOSITORY / name).exists(), name


def test_the_page_has_the_numbers_that_follow_from_mnist_alone() -> None:
    """The order of the 60,000 images on two ranks, and how many are trained on and tested."""
    page = PAGE.read_text()
    for epoch in (0, 1):
        sampler = DistributedSampler(range(60_000), 2, 0)
        sampler.set_epoch(epoch)
        assert f"epoch {epoch}: the first images are {list(sampler)[:5]}" in page
    padded_steps = -(-10_000 // 64)
    assert f"of {(padded_steps + padded_steps % 2) * 64:,} right" in page
    double = -(-30_000 // 64)
    assert f"{(double + double % 2) * 64:,} images" in page


@pytest.fixture(scope="module")
def images_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with drawn digits in torchvision's layout: the archives, and what they hold."""
    from mnist_dist.data.synthetic import draw_digits

    folder = tmp_path_factory.mktemp("images")
    raw = folder / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for part, count, seed in (("train", NUM_TRAIN, 0), ("t10k", NUM_TEST, 1)):
        images, labels = draw_digits(count, seed)
        head = b"".join(number.to_bytes(4, "big") for number in (0x803, count, 28, 28))
        files = {f"{part}-images-idx3-ubyte": head + images.numpy().tobytes()}
        head = b"".join(number.to_bytes(4, "big") for number in (0x801, count))
        files[f"{part}-labels-idx1-ubyte"] = head + labels.to(torch.uint8).numpy().tobytes()
        for name, data in files.items():
            (raw / name).write_bytes(data)
            (raw / f"{name}.gz").write_bytes(gzip.compress(data))
    return folder


def copy_archive(source: Path, url: str, download_root: str, filename: str, md5: str) -> None:
    """In the place of torchvision's: a download that lasts long enough for another rank to begin its own."""
    print(f"rank {os.environ['RANK']} downloads {filename}")
    time.sleep(1 if filename.startswith("train-images") else 0)
    name = filename.removesuffix(".gz")
    (Path(download_root) / name).write_bytes((source / "MNIST" / "raw" / name).read_bytes())


def become_stage(script: Path, log: Path, environment: dict[str, str], event: dict[str, Any]) -> None:
    """In a forked process: be what `python SCRIPT` would be, where one thing happens to it."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.environ.clear()
    os.environ.update(environment)
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    torch.set_num_threads(1)
    from accelerate import Accelerator
    from torchvision import datasets

    backward, replace, steps, saves = Accelerator.backward, Path.replace, [0], [0]

    def counted_backward(self: Accelerator, *arguments: Any) -> None:
        backward(self, *arguments)
        steps[0] += 1
        if steps[0] == event.get("signal_at_step"):
            os.kill(os.getpid(), signal.SIGTERM)

    def counted_replace(self: Path, target: Path) -> Path:
        saves[0] += 1
        if saves[0] == event.get("kill_at_save"):
            os.kill(os.getpid(), signal.SIGKILL)
        return replace(self, target)

    Accelerator.backward, Path.replace = counted_backward, counted_replace  # type: ignore[method-assign, assignment]
    if "archives" in event:
        datasets.mnist.download_and_extract_archive = functools.partial(copy_archive, event["archives"])
    if "file_bytes" in event:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (event["file_bytes"], event["file_bytes"]))
    runpy.run_path(str(script), run_name="__main__")


def start(script: Path, folder: Path, environment: dict[str, str], event: dict[str, Any]) -> Any:
    process = FORKS.Process(target=become_stage, args=(script, folder / "output.txt", environment, event))
    process.start()
    return process


def run(
    stage: str | Path,
    images: Path,
    folder: Path,
    world_size: int = 1,
    events: Sequence[dict[str, Any]] = ({}, {}),
    **environment: str,
) -> Result:
    """Run a stage on one rank or several, to its end; an event may happen to each rank."""
    script = next(TUTORIAL.glob(f"{stage}_*.py")) if isinstance(stage, str) else stage
    common = {"DATA": str(images), "EPOCHS": "2", "CHECKPOINT": str(folder / "checkpoint.pt"), **environment}
    log, port = folder / "output.txt", free_port()
    log.unlink(missing_ok=True)
    processes = []
    for rank in range(world_size):
        ranks = rank_environment(rank, world_size, port) if world_size > 1 else {}
        processes.append(start(script, folder, clean_environment(**ranks, **common), events[rank]))
    return wait_ranks(processes, log, timeout_s=60)


def run_well(*arguments: Any, **keywords: Any) -> str:
    """Run a stage, and return what it printed."""
    result = run(*arguments, **keywords)
    assert result.code == 0, result.output
    return result.output


def planted(name: str, folder: Path) -> Path:
    """A copy of a stage with one of the page's faults in it."""
    diff = (TUTORIAL / "faults" / f"{name}.diff").read_text()
    path = Path(re.findall(r"^\+\+\+ b/(.*)$", diff, re.MULTILINE)[0])
    (folder / path).parent.mkdir(parents=True)
    (folder / path).write_text((REPOSITORY / path).read_text())
    environment = os.environ | {"GIT_CEILING_DIRECTORIES": str(folder.parent)}
    subprocess.run(["git", "apply", "-"], cwd=folder, env=environment, input=diff, text=True, check=True)
    return folder / path


def figures(output: str) -> list[tuple[int, int, float, int, int]]:
    """Of each epoch's line: steps, images, loss, test images that are right, test images."""
    rows = [[field.replace(",", "") for field in found] for found in EPOCH.findall(output)]
    assert rows, output
    return [(int(steps), int(n), float(loss), int(right), int(of)) for _, steps, n, loss, right, of in rows]


def weights(output: str) -> list[str]:
    """The hash of the weights at the end of each epoch."""
    return re.findall(r"weights (\w+) have", output)


def first_images(output: str) -> list[str]:
    return re.findall(r"the first images are (.*)", output)


def test_images_in_memory_are_trained_alike(images_dir: Path, tmp_path: Path) -> None:
    outputs = [run_well(stage, images_dir, tmp_path, LIMIT=str(NUM_TRAIN)) for stage in ("00", "01")]
    for output in outputs:
        assert [row[:2] + row[4:] for row in figures(output)] == [(16, NUM_TRAIN, NUM_TEST)] * 2
    losses = [[row[2] for row in figures(output)] for output in outputs]
    assert losses[0] == pytest.approx(losses[1], rel=0.15)  # their orders differ


def test_without_accelerate_each_rank_trains_alone(images_dir: Path, tmp_path: Path) -> None:
    assert [row[1] for row in figures(run_well("01", images_dir, tmp_path, 2))] == [NUM_TRAIN] * 4


def test_a_batch_size_for_each_rank_halves_the_steps(images_dir: Path, tmp_path: Path) -> None:
    before, after = (figures(run_well(stage, images_dir, tmp_path, 2)) for stage in ("02", "03"))
    assert [row[0] for row in before] == [8, 8]
    assert [row[0] for row in after] == [16, 16]
    assert before[1][2] > 1.2 * after[1][2]


def test_a_prepared_loader_with_a_sampler_shards_twice(images_dir: Path, tmp_path: Path) -> None:
    rows = figures(run_well(planted("double_sharding", tmp_path), images_dir, tmp_path, 2))
    assert [row[1] for row in rows] == [512, 512]  # 501 of a rank, shared by two: four whole batches each


def test_a_learning_rate_that_grows_with_the_ranks_is_another_run(images_dir: Path, tmp_path: Path) -> None:
    right = figures(run_well("03", images_dir, tmp_path, 2))
    wrong = figures(run_well(planted("learning_rate", tmp_path), images_dir, tmp_path, 2))
    assert abs(wrong[0][2] - right[0][2]) > 0.05


def test_set_epoch_gives_each_epoch_its_order(images_dir: Path, tmp_path: Path) -> None:
    before, after = (first_images(run_well(stage, images_dir, tmp_path, 2)) for stage in ("03", "04"))
    assert before[0] == before[1] == after[0] != after[1]


def test_the_last_batch_has_its_true_size(images_dir: Path, tmp_path: Path) -> None:
    one, two = ([figures(run_well(stage, images_dir, tmp_path, n)) for n in (1, 2)] for stage in ("04", "05"))
    assert [row[1] for row in one[1]] == [NUM_TRAIN + 1] * 2  # an image is used twice
    assert [row[1] for row in two[1]] == [NUM_TRAIN] * 2
    assert abs(one[0][0][2] - one[1][0][2]) > 3e-4
    for rows in two:  # as on one rank with the mean over the batch, whatever its size
        assert [row[2] for row in rows] == pytest.approx([row[2] for row in one[0]], abs=1.1e-4)


def test_rank_0_counts_each_test_image_once(images_dir: Path, tmp_path: Path) -> None:
    before = figures(run_well("05", images_dir, tmp_path, 2))
    assert [row[4] for row in before] == [512, 512]
    outputs = [run_well("06", images_dir, tmp_path, n) for n in (1, 2)]
    one, two = (figures(output) for output in outputs)
    assert [row[4] for row in one + two] == [NUM_TEST] * 4
    test_losses = [[float(loss) for loss in re.findall(r"test loss ([\d.]+)", output)] for output in outputs]
    assert test_losses[0] == pytest.approx(test_losses[1], abs=1e-4)


def test_precision_is_what_was_asked_for(images_dir: Path, tmp_path: Path) -> None:
    before = {
        name: run_well("06", images_dir, tmp_path, 2, ACCELERATE_MIXED_PRECISION=name)
        for name in ("no", "fp16", "bf16")
    }
    assert weights(before["fp16"]) == weights(before["no"])  # in silence
    after = run("07", images_dir, tmp_path, 2, PRECISION="fp16")
    assert after.codes == [1, 1]
    assert "PRECISION=fp16 needs a GPU" in after.output
    bf16 = run_well("07", images_dir, tmp_path, 2, PRECISION="bf16")
    assert weights(bf16) == weights(before["bf16"]) != weights(before["no"])
    assert re.findall("test loss .*", bf16) != re.findall("test loss .*", before["bf16"])


@pytest.fixture(scope="module")
def straight(images_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The weights of two ranks that were never stopped."""
    return weights(run_well("07", images_dir, tmp_path_factory.mktemp("straight"), 2))


def test_a_killed_run_goes_on_exactly(images_dir: Path, straight: list[str], tmp_path: Path) -> None:
    run_well("08", images_dir, tmp_path, 2, EPOCHS="1")
    killed = run("08", images_dir, tmp_path, 2, ({"kill_at_save": 1}, {}))  # all is written, but not in its place
    assert killed.codes[0] == -signal.SIGKILL
    assert (tmp_path / "checkpoint.tmp").exists()
    resumed = run_well("08", images_dir, tmp_path, 2)
    assert "going on at epoch 1, step 0\n" in resumed
    assert weights(resumed) == straight[1:]


def test_without_the_optimizers_moments_it_is_another_run(
    images_dir: Path, straight: list[str], tmp_path: Path
) -> None:
    script = planted("lost_moments", tmp_path)
    run_well(script, images_dir, tmp_path, 2, EPOCHS="1")
    assert weights(run_well(script, images_dir, tmp_path, 2)) != straight[1:]


@pytest.mark.parametrize("fault", ["", "not_atomic"])
def test_a_full_disk_takes_no_checkpoint_that_was_good(
    fault: str, images_dir: Path, straight: list[str], tmp_path: Path
) -> None:
    script = planted(fault, tmp_path) if fault else next(TUTORIAL.glob("08_*.py"))
    run_well(script, images_dir, tmp_path, 2, EPOCHS="1")
    full = run(script, images_dir, tmp_path, 2, ({"file_bytes": 4_096_000}, {}))
    assert full.codes[0] == 1
    after = run(script, images_dir, tmp_path, 2)
    if fault:
        assert after.codes[0] == 1
        assert "failed finding central directory" in after.output
    else:
        assert after.code == 0
        assert weights(after.output) == straight[1:]


def test_a_signal_to_one_rank_stops_both_with_a_checkpoint(
    images_dir: Path, straight: list[str], tmp_path: Path
) -> None:
    stopped = run("09", images_dir, tmp_path, 2, ({}, {"signal_at_step": 20}))
    assert stopped.code == 3, stopped.output
    assert "stopped after step 9 of epoch 1; start again to go on\n" in stopped.output
    resumed = run_well("09", images_dir, tmp_path, 2)
    assert "going on at epoch 1, step 10\n" in resumed
    assert weights(resumed) == straight[1:]


def test_a_rank_that_stops_alone_takes_the_other_down(images_dir: Path, tmp_path: Path) -> None:
    stopped = run(planted("each_alone", tmp_path), images_dir, tmp_path, 2, ({}, {"signal_at_step": 9}))
    assert stopped.codes == [1, 3]
    assert not (tmp_path / "checkpoint.pt").exists()


@pytest.mark.parametrize(("stage", "num_ranks"), [("01", 2), ("02", 1)])
def test_only_one_rank_downloads(stage: str, num_ranks: int, images_dir: Path, tmp_path: Path) -> None:
    """Where the one before lets both, at once."""
    event = {"archives": images_dir}
    output = run_well(stage, tmp_path / "empty", tmp_path, 2, (event, event), EPOCHS="1")
    assert output.count("downloads train-images-idx3-ubyte.gz\n") == num_ranks


def test_the_mirror_counts_the_downloads_of_ranks_that_torchrun_starts(images_dir: Path, tmp_path: Path) -> None:
    command = [sys.executable, str(TUTORIAL / "race.py"), str(next(TUTORIAL.glob("02_*.py")))]
    environment = clean_environment(DATA=str(images_dir))
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, cwd=tmp_path)
    assert ended.stdout == "try 0: training images downloaded 1 times, exit code 0\n"


@pytest.fixture
def slurm(tmp_path: Path) -> dict[str, str]:
    """An environment in which short scripts stand for SLURM's commands: two tasks on one node."""
    srun = """
        export SLURM_NTASKS=2 SLURM_NTASKS_PER_NODE=2
        for task in 0 1; do SLURM_PROCID=$task SLURM_LOCALID=$task "$@" & tasks[task]=$!; done
        code=0
        for task in 0 1; do wait "${tasks[task]}" || code=$?; done
        exit $code
    """
    scontrol = '[ "$1" = requeue ] && echo "requeued $2" || echo 127.0.0.1'
    for name, text in (("srun", srun), ("scontrol", scontrol)):
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!/usr/bin/env bash\n{text}\n")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
    paths = f"{tmp_path / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    return clean_environment(PATH=paths, SLURM_JOB_ID=str(free_port()), SLURM_JOB_NODELIST="n1")


def test_the_batch_script_makes_one_job_of_its_tasks_and_requeues_it(
    slurm: dict[str, str], images_dir: Path, tmp_path: Path
) -> None:
    environment = slurm | {"DATA": str(images_dir), "CHECKPOINT": str(tmp_path / "checkpoint.pt"), "EPOCHS": "9999"}
    log = tmp_path / "slurm.txt"
    with log.open("w") as file:
        command = [str(TUTORIAL / "10_slurm.sh")]
        job = subprocess.Popen(command, cwd=REPOSITORY, env=environment, stdout=file, start_new_session=True)
    try:
        wait_for(lambda: "epoch 1: the first images" in log.read_text())
        rank_1 = re.findall(r"rank 1 of 2 is process (\d+)", log.read_text())
        assert len(rank_1) == 1, log.read_text()
        os.kill(int(rank_1[0]), signal.SIGTERM)
        job.wait(60)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(job.pid, signal.SIGKILL)
        job.wait()
    assert job.returncode == 3
    assert sorted(re.findall(r"rank (\d) of (\d)", log.read_text())) == [("0", "2"), ("1", "2")]
    assert log.read_text().endswith(f"requeued {slurm['SLURM_JOB_ID']}\n")


def test_tasks_without_the_variables_are_two_jobs(images_dir: Path, tmp_path: Path) -> None:
    output = run_well("09", images_dir, tmp_path, 1, EPOCHS="1", SLURM_PROCID="1", SLURM_NTASKS="2")
    assert "rank 0 of 1 is process" in output
