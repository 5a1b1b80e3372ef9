"""The job as real processes: the same curve at any world size, each image once, exact resuming, one writer."""

import functools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, load_file

from mnist_dist.run import checkpoint
from tests.conftest import (
    NUM_TEST,
    NUM_TRAIN,
    TRAIN,
    become,
    clean_environment,
    free_port,
    has_steps,
    losses,
    make_data,
    metrics,
    rank_environment,
    run_ranks,
    start_ranks,
    start_verb,
    wait_for,
    wait_ranks,
)

# 16 steps an epoch, the last of 40 images; seven epochs are 112 steps.
COMMON = ["dataset=synthetic", "precision=fp32", "threads=1", "log_every_steps=1", "run_dir=run"]
# Slow training for the CNN: each ReLU or pooling window that float rounding tips over is a small jump, fast training
# makes it grow, and after a hundred steps of any faster recipe two orders of summation are 1e-4 to 1e-3 apart. A wrong
# weight on a single batch would still show as 1e-4 and more.
RECIPES = {
    "cnn": ["model=cnn", "optimizer=sgd", "lr=2e-3"],
    "mlp": ["model=mlp", "optimizer=adam", "lr=1e-3", "ema=0.99", "clip_grad_norm=1", "shift=2"],
}


def train(folder: Path, data_dir: Path, *arguments: str, world_size: int = 1, epochs: int = 7) -> Path:
    """Run to the end in a folder of its own, and return the run directory."""
    folder.mkdir(exist_ok=True)
    arguments = (*COMMON, f"data_dir={data_dir}", f"epochs={epochs}", *arguments)
    result = run_ranks(arguments, folder, world_size=world_size)
    assert result.code == 0, result.output
    assert "Traceback" not in result.output
    assert "Warning" not in result.output
    return folder / "run"


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    """Those of the newest checkpoint."""
    return load_file(sorted((run_dir / "checkpoints").glob("step-*"))[-1] / "model.safetensors")


def table(run_dir: Path) -> list[list[str]]:
    """The rows of epochs on the console, without the seconds."""
    rows = [line.split()[2:] for line in (run_dir / "console.log").read_text().splitlines()]
    return [row[:-1] for row in rows if len(row) == 7 and row[0].isdecimal()]


def assert_close(one: Path, other: Path, tolerance: float) -> None:
    """Two runs have the same curve, and where the tolerance is zero the same weights to the last bit."""
    first, second = losses(one), losses(other)
    assert len(first) == len(second)
    assert max(abs(a - b) for a, b in zip(first, second, strict=True)) <= tolerance
    if not tolerance:
        assert all(torch.equal(tensor, weights(other)[name]) for name, tensor in weights(one).items())


@pytest.fixture(scope="module", params=RECIPES)
def straight(request: pytest.FixtureRequest, data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The undisturbed run of one rank."""
    return train(tmp_path_factory.mktemp(request.param), data_dir, *RECIPES[request.param])


@pytest.fixture
def recipe(straight: Path) -> list[str]:
    return RECIPES["cnn" if "conv1.weight" in weights(straight) else "mlp"]


@pytest.mark.parametrize("world_size", [2, 4])
def test_the_curve_is_the_same_at_any_world_size(
    straight: Path, recipe: list[str], world_size: int, data_dir: Path, tmp_path: Path
) -> None:
    assert len(losses(straight)) == 7 * 16 > 100
    assert_close(straight, train(tmp_path, data_dir, *recipe, world_size=world_size), 1e-5)


def test_a_micro_batch_changes_nothing(straight: Path, recipe: list[str], data_dir: Path, tmp_path: Path) -> None:
    assert_close(straight, train(tmp_path, data_dir, *recipe, "micro_batch=24"), 1e-5)


def _replay(arguments: list[str], folder: Path, log: Path, environment: dict[str, str]) -> None:
    """Be a rank whose steps are replayed as from a CUDA graph: what differs from step to step comes from the tables."""
    from mnist_dist.training.cuda_graph import StepGraphs
    from mnist_dist.training.train_step import TrainStep
    from tests.unit.training.steps import remember

    def choose_graphs(self: TrainStep, info: Callable[[str], None]) -> StepGraphs:
        return StepGraphs(self.world, info, capture=remember)

    TrainStep.choose_graphs = choose_graphs  # type: ignore[method-assign, assignment]
    become(arguments, folder, log, environment)


def test_replayed_steps_of_two_ranks_have_the_same_curve(
    straight: Path, recipe: list[str], data_dir: Path, tmp_path: Path
) -> None:
    log = tmp_path / "output.txt"
    arguments = [*COMMON, f"data_dir={data_dir}", "epochs=7", *recipe]
    result = wait_ranks(start_ranks(arguments, log, world_size=2, target=_replay), log)
    assert result.code == 0, result.output
    assert_close(straight, tmp_path / "run", 1e-5)


def _count(arguments: list[str], folder: Path, log: Path, environment: dict[str, str]) -> None:
    """Be a rank that writes down which images it gave weight to."""
    from mnist_dist.data.sampler import Batch, GlobalBatchSampler

    cut = GlobalBatchSampler.batch

    def counted(self: GlobalBatchSampler, step: int) -> Batch:
        batch = cut(self, step)
        kept = batch.indices.flatten() if batch.mask is None else batch.indices[batch.mask > 0]
        with (folder / f"rows-{environment.get('RANK', 0)}").open("a") as file:
            file.writelines(f"{row}\n" for row in kept.tolist())
        return batch

    GlobalBatchSampler.batch = counted  # type: ignore[method-assign]
    become(arguments, folder, log, environment)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_each_training_image_is_used_once_an_epoch(world_size: int, data_dir: Path, tmp_path: Path) -> None:
    log = tmp_path / "output.txt"
    arguments = [*COMMON, f"data_dir={data_dir}", "epochs=2", "batch_size=60", "model=mlp"]  # 3 does not divide 1000
    assert wait_ranks(start_ranks(arguments, log, world_size=world_size, target=_count), log).code == 0
    rows = [int(line) for path in tmp_path.glob("rows-*") for line in path.read_text().split()]
    assert sorted(rows) == sorted([*range(NUM_TRAIN), *range(NUM_TRAIN)])
    evaluations = metrics(tmp_path / "run", "eval")
    assert [(e["split"], e["count"]) for e in evaluations] == [("test", NUM_TEST)] * 2


@pytest.mark.parametrize("world_size", [3])
def test_a_world_size_that_does_not_divide_the_images_has_the_same_curve(
    world_size: int, data_dir: Path, tmp_path: Path
) -> None:
    arguments = [*RECIPES["cnn"], "batch_size=60"]
    one = train(tmp_path / "one", data_dir, *arguments)
    assert_close(one, train(tmp_path / "many", data_dir, *arguments, world_size=world_size), 1e-5)


def interrupt(folder: Path, data_dir: Path, recipe: list[str], world_size: int, num_steps: int) -> None:
    """Start a run and stop it with SIGTERM, to one rank only, after about so many steps."""
    log = folder / "interrupted.txt"
    arguments = [*COMMON, f"data_dir={data_dir}", "epochs=7", *recipe]
    ranks = start_ranks(arguments, log, world_size=world_size, target=slow)
    wait_for(has_steps(folder / "run", num_steps))
    pid = ranks[-1].pid
    assert pid
    os.kill(pid, signal.SIGTERM)
    result = wait_ranks(ranks, log)
    assert result.code == 3, result.output
    stop = metrics(folder / "run", "stop")[-1]
    assert num_steps <= stop["step"] < 7 * 16
    assert "SIGTERM" in stop["reason"]
    assert "start it again with run_dir=run" in result.output


def slow(arguments: list[str], folder: Path, log: Path, environment: dict[str, str]) -> None:
    """Be a rank that meets the others after every step, so that a signal is heard at once."""
    import mnist_dist.training.sync

    mnist_dist.training.sync.MAX_STEPS = 1
    become(arguments, folder, log, environment)


@pytest.mark.parametrize("num_steps", [5, 40])
def test_resuming_is_exact_to_the_last_bit(
    straight: Path, recipe: list[str], num_steps: int, data_dir: Path, tmp_path: Path
) -> None:
    interrupt(tmp_path, data_dir, recipe, 1, num_steps)
    assert_close(straight, train(tmp_path, data_dir, *recipe), 0)
    assert table(tmp_path / "run") == table(straight)
    assert len(table(straight)) == 7


def test_resuming_is_exact_in_bf16_too(data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    in_bf16 = ["precision=bf16" if argument == "precision=fp32" else argument for argument in COMMON]
    monkeypatch.setattr("tests.process.test_training.COMMON", in_bf16)
    undisturbed = train(tmp_path / "undisturbed", data_dir, *RECIPES["cnn"])
    assert "precision bf16" in (undisturbed / "console.log").read_text()
    interrupt(tmp_path, data_dir, RECIPES["cnn"], 1, 20)
    assert_close(undisturbed, train(tmp_path, data_dir, *RECIPES["cnn"]), 0)


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1), (2, 4), (4, 2)])
def test_resuming_at_another_world_size_goes_on_with_the_curve(
    straight: Path, recipe: list[str], before: int, after: int, data_dir: Path, tmp_path: Path
) -> None:
    interrupt(tmp_path, data_dir, recipe, before, 20)
    assert_close(straight, train(tmp_path, data_dir, *recipe, world_size=after), 1e-5)


def test_a_finished_run_has_nothing_to_do(straight: Path, recipe: list[str], data_dir: Path) -> None:
    files = [path for path in straight.rglob("*") if path.is_file() and path.name not in ("console.log", "lock")]
    before = {path: path.stat().st_mtime_ns for path in files}
    result = run_ranks([*COMMON, f"data_dir={data_dir}", "epochs=7", *recipe], straight.parent, world_size=2)
    assert result.code == 0
    assert "run is finished (step 112); nothing to do" in result.output
    assert before == {path: path.stat().st_mtime_ns for path in before}


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ("seed=1", "the checkpoint is of a run with seed=0, not seed=1"),
        ("batch_size=32", "the checkpoint is of a run with batch_size=64, not batch_size=32"),
        ("model=mlp", "the checkpoint is of a run with model=cnn, not model=mlp"),
        ("optimizer=sgd", "the checkpoint is of a run with optimizer=adamw, not optimizer=sgd"),
        ("validation=100", "the checkpoint is of a run with validation=0, not validation=100"),
        ("resume=never", "resume=never, but run_dir=run has checkpoints"),
    ],
)
def test_another_runs_checkpoint_is_refused(change: str, sentence: str, data_dir: Path, tmp_path: Path) -> None:
    train(tmp_path, data_dir, epochs=1)
    result = run_ranks([*COMMON, f"data_dir={data_dir}", change], tmp_path)
    assert result.code == 2
    assert sentence in result.output
    assert result.output.count("\n") <= 2


def test_a_run_without_its_done_goes_on_from_what_it_has(data_dir: Path, tmp_path: Path) -> None:
    """As after a kill between the last checkpoint and DONE, with an average asked for that it did not have."""
    train(tmp_path, data_dir, epochs=2)
    (tmp_path / "run" / "DONE").unlink()
    (tmp_path / "run" / "STOP").touch()
    arguments = [*COMMON, f"data_dir={data_dir}", "epochs=2", "ema=0.9", "resume=run"]
    result = run_ranks(arguments, tmp_path)
    assert result.code == 0
    assert "note: resume=run is not used, since run_dir=run has checkpoints of its own" in result.output
    assert result.output.endswith(
        "weights in run/checkpoints/step-00000032/model.safetensors\nreport in run/report.html\n"
    )
    first, again = metrics(tmp_path / "run", "done")
    assert again["accuracy"] == first["accuracy"]
    assert not (tmp_path / "run" / "STOP").exists()


def test_a_run_outlives_the_one_that_it_was_started_from(data_dir: Path, tmp_path: Path) -> None:
    train(tmp_path, data_dir, epochs=1)
    (tmp_path / "run").rename(tmp_path / "first")
    train(tmp_path, data_dir, "resume=first", "max_steps=20", epochs=2)
    shutil.rmtree(tmp_path / "first")
    train(tmp_path, data_dir, "resume=first", epochs=2)
    assert [done["step"] for done in metrics(tmp_path / "run", "done")] == [20, 32]


def test_a_checkpoint_without_an_epochs_sums_is_welcome(data_dir: Path, tmp_path: Path) -> None:
    folder = train(tmp_path, data_dir, epochs=1) / "checkpoints"
    found = checkpoint.find(folder.parent, print)
    training = checkpoint.parse_training(found.training, found.path)
    del training["epoch_loss"], training["epoch_images"]
    shutil.rmtree(found.path)
    checkpoint.save(folder, found.step, load(found.model), training, keep=2)
    assert len(losses(train(tmp_path, data_dir, epochs=2))) == 32


def test_a_run_that_goes_on_names_the_checkpoint_that_it_has(data_dir: Path, tmp_path: Path) -> None:
    train(tmp_path, data_dir, epochs=1)
    log = tmp_path / "output.txt"
    arguments = [*COMMON, f"data_dir={data_dir}", "epochs=2"]
    result = wait_ranks(start_ranks(arguments, log, target=functools.partial(_poison, 20)), log)
    assert result.code == 1
    assert "the last good checkpoint is run/checkpoints/step-00000016;" in result.output


def test_a_longer_run_says_how_its_learning_rate_jumps(data_dir: Path, tmp_path: Path) -> None:
    train(tmp_path, data_dir, "schedule=one-cycle", epochs=1)
    result = run_ranks([*COMMON, f"data_dir={data_dir}", "schedule=one-cycle", "epochs=2"], tmp_path)
    assert result.code == 0, result.output
    assert re.search(r"note: the learning rate at step 16 was to be 0 and is now 0\.00\d+\n", result.output)
    again = run_ranks([*COMMON, f"data_dir={data_dir}", "schedule=one-cycle", "epochs=2"], tmp_path)
    assert "learning rate" not in again.output


def test_other_images_under_the_same_name_are_refused(data_dir: Path, tmp_path: Path) -> None:
    train(tmp_path, data_dir, epochs=1)
    make_data(tmp_path, seed=7)
    result = run_ranks([*COMMON, f"data_dir={tmp_path}"], tmp_path)
    assert result.code == 2
    assert "trained on other images that are called synthetic too" in result.output


def test_ranks_with_different_images_are_refused(data_dir: Path, tmp_path: Path) -> None:
    make_data(tmp_path, seed=7)
    log, port = tmp_path / "output.txt", free_port()
    ranks = []
    for rank, folder in enumerate([data_dir, tmp_path]):
        environment = rank_environment(rank, 2, port)
        ranks.append(start_verb(["train", *COMMON, f"data_dir={folder}"], log, become, **environment))
    result = wait_ranks(ranks, log)
    assert result.code == 2
    assert "rank 1 on " in result.output
    assert "has synthetic" in result.output


def test_only_rank_0_writes(data_dir: Path, tmp_path: Path) -> None:
    port = free_port()
    ranks, logs = [], []
    for rank in range(2):
        (tmp_path / str(rank)).mkdir()
        logs.append(tmp_path / str(rank) / "output.txt")
        environment = rank_environment(rank, 2, port)
        arguments = ["train", *COMMON, f"data_dir={data_dir}", "epochs=1", "evaluate_train=true"]
        ranks.append(start_verb(arguments, logs[-1], become, **environment))
    assert wait_ranks(ranks, logs[0]).code == 0
    assert [p.name for p in (tmp_path / "1").iterdir()] == ["output.txt"]
    assert logs[1].read_text() == ""
    assert "train accuracy" in logs[0].read_text()


def test_the_run_directory_holds_what_it_promises(straight: Path) -> None:
    names = {p.name for p in straight.iterdir()}
    files = {"config.yaml", "versions.json", "metrics.jsonl", "console.log", "report.html", "lock", "DONE"}
    assert names == files | {"checkpoints"}
    checkpoints = sorted((straight / "checkpoints").iterdir())
    assert [p.name for p in checkpoints] == ["step-00000096", "step-00000112"]
    assert {p.name for p in checkpoints[0].iterdir()} == {"model.safetensors", "training.pt", "manifest.json"}
    start, done = metrics(straight, "start")[0], metrics(straight, "done")[0]
    assert (start["step"], done["step"], done["accuracy"]) == (0, 112, metrics(straight, "eval")[-1]["accuracy"])
    steps = metrics(straight, "step")
    assert list(steps[0]) == ["event", "step", "epoch", "loss", "lr", "images_per_s"]
    assert "\x1b" not in (straight / "console.log").read_text()
    secrets = json.dumps(json.loads((straight / "versions.json").read_text()))
    assert os.environ["PATH"] not in secrets


def _poison(step: int, arguments: list[str], folder: Path, log: Path, environment: dict[str, str]) -> None:
    """Be a rank whose weights are not finite from a step on, on the last rank or where it is alone."""

    def poison(network: torch.nn.Module) -> None:
        next(network.parameters()).fill_(float("nan"))

    if int(environment.get("RANK", 0)) == int(environment.get("WORLD_SIZE", 1)) - 1:
        change_weights(step, poison)
    become(arguments, folder, log, environment)


def change_weights(step: int, change: Callable[[torch.nn.Module], None]) -> None:
    """In this process: do something to the network just before a step."""
    from mnist_dist.data.sampler import Batch
    from mnist_dist.training.train_step import TrainStep

    train_step = TrainStep.__call__

    def changed(self: TrainStep, batch: Batch) -> None:
        if batch.step == step:
            with torch.no_grad():
                change(self.network)
        train_step(self, batch)

    TrainStep.__call__ = changed  # type: ignore[method-assign]


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_loss_that_is_not_finite_stops_all_ranks(world_size: int, data_dir: Path, tmp_path: Path) -> None:
    log = tmp_path / "output.txt"
    arguments = [*COMMON, f"data_dir={data_dir}", "epochs=2"]
    result = wait_ranks(start_ranks(arguments, log, world_size=world_size, target=functools.partial(_poison, 20)), log)
    assert result.code == 1
    assert "the loss is nan at step 20 (epoch 1); the last good checkpoint is run/checkpoints/step-00000016;" in (
        result.output
    )
    assert result.output.count("mnist-dist:") == 1
    failed = metrics(tmp_path / "run", "failed")[0]
    assert failed["cause"] == "not_finite"
    assert "step 20" in failed["reason"]


def _flip(rank: int, arguments: list[str], folder: Path, log: Path, environment: dict[str, str]) -> None:
    """Be a rank of which one, before step 20, finds one bit of one weight another."""

    def flip(network: torch.nn.Module) -> None:
        network.get_parameter("conv2.weight").view(torch.int32)[0, 7, 0, 0] ^= 1 << 12

    if environment["RANK"] == str(rank):
        change_weights(20, flip)
    become(arguments, folder, log, environment)


@pytest.mark.parametrize(("world_size", "rank", "batch_size"), [(2, 1, 64), (3, 1, 60), (3, 0, 60)])
def test_a_rank_with_other_weights_is_named(
    world_size: int, rank: int, batch_size: int, data_dir: Path, tmp_path: Path
) -> None:
    log = tmp_path / "output.txt"
    arguments = [*COMMON, f"data_dir={data_dir}", "epochs=2", f"batch_size={batch_size}"]
    target = functools.partial(_flip, rank)
    result = wait_ranks(start_ranks(arguments, log, world_size=world_size, target=target), log)
    assert result.code == 1
    (line,) = [line for line in result.output.splitlines() if line.startswith("mnist-dist:")]
    host = os.uname().nodename
    other = 0 if rank else 1
    assert f"rank {rank} on {host} holds other weights than rank {other} on {host}, first in conv2.weight," in line
    first_epoch = -(-NUM_TRAIN // batch_size)
    assert f"the last good checkpoint is run/checkpoints/step-{first_epoch:08d};" in line
    failed = metrics(tmp_path / "run", "failed")[0]
    assert (failed["cause"], line) == ("replicas_differ", f"mnist-dist: {failed['reason']}")
    assert "Traceback" not in result.output


@pytest.mark.parametrize("change", ["lr=1e-3", "seed=1"])
def test_ranks_with_different_requests_are_refused(change: str, data_dir: Path, tmp_path: Path) -> None:
    log, port = tmp_path / "output.txt", free_port()
    ranks = []
    for rank in range(2):
        arguments = ["train", *COMMON, f"data_dir={data_dir}", *([change] if rank else [])]
        ranks.append(start_verb(arguments, log, become, **rank_environment(rank, 2, port)))
    result = wait_ranks(ranks, log)
    assert result.code == 2
    host = os.uname().nodename
    key, value = change.split("=")
    first = {"lr": "0.005", "seed": "0"}[key]
    assert result.output == (
        f"mnist-dist: rank 1 on {host} has {key}={float(value):g} and rank 0 on {host} has {key}={first}; start all "
        "ranks with the same request and the same code\n"
    )
    assert not (tmp_path / "run").exists()


def test_what_may_differ_between_ranks(data_dir: Path, tmp_path: Path) -> None:
    """Where things lie on a rank's machine, and its threads."""
    log, port = tmp_path / "output.txt", free_port()
    (tmp_path / "elsewhere").symlink_to(data_dir)
    ranks = []
    for rank, mine in enumerate(
        ([f"data_dir={data_dir}"], ["data_dir=elsewhere", "missing=fail", "mirror=nowhere", "threads=2", "run_dir=x"])
    ):
        arguments = ["train", *COMMON[:2], "log_every_steps=1", "threads=1", "run_dir=run", "max_steps=3"]
        arguments = [a for a in arguments if a.split("=")[0] not in {m.split("=")[0] for m in mine}]
        ranks.append(start_verb([*arguments, *mine], log, become, **rank_environment(rank, 2, port)))
    result = wait_ranks(ranks, log)
    assert result.code == 0, result.output
    assert len(losses(tmp_path / "run")) == 3
    assert not (tmp_path / "x").exists()


def test_a_tracker_gets_every_recorded_step(data_dir: Path, tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    result = run_ranks([*COMMON, f"data_dir={data_dir}", "epochs=2", "log_with=tensorboard"], tmp_path, world_size=2)
    assert result.code == 0, result.output
    events = accumulator.EventAccumulator(str(tmp_path / "run" / "tracking"))
    events.Reload()
    assert [e.value for e in events.Scalars("train/loss")] == pytest.approx(losses(tmp_path / "run"))
    assert [e.step for e in events.Scalars("test/accuracy")] == [16, 32]


FAKE_WANDB = """
import json, os, pathlib
def init(**settings):
    if os.environ["FAKE_WANDB"] == "no login":
        raise RuntimeError("api_key not configured (no-tty)\\nrun `wandb login`")
    with open(os.environ["FAKE_WANDB"], "a") as file:
        file.write(json.dumps(settings) + "\\n")
    return Run()
class Config(dict):
    def update(self, values, **options):
        pass
class Run:
    config = Config()
    def log(self, values, step=None, **options):
        if step and step >= 5:
            raise ConnectionError("the server is gone")
    def finish(self):
        raise ConnectionError("the server is gone")
config = Config()
"""


@pytest.fixture
def fake_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tracker of that name whose server goes away at step 5; the file into which it writes how it was started."""
    site = tmp_path / "site"
    (site / "wandb-1.0.dist-info").mkdir(parents=True)
    (site / "wandb-1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: wandb\nVersion: 1.0\n")
    (site / "wandb.py").write_text(FAKE_WANDB)
    monkeypatch.setenv("PYTHONPATH", f"{site}:{os.environ.get('PYTHONPATH', '')}")
    return tmp_path / "wandb.json"


def test_a_tracker_that_does_not_start_is_one_sentence(fake_wandb: Path, data_dir: Path, tmp_path: Path) -> None:
    command = [sys.executable, str(TRAIN), *COMMON, f"data_dir={data_dir}", "log_with=wandb"]
    environment = clean_environment(FAKE_WANDB="no login")
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.returncode == 1
    assert result.stderr == "mnist-dist: log_with=wandb does not start: api_key not configured (no-tty)\n"


def test_a_tracker_that_fails_is_dropped_and_goes_on_in_the_same_run(
    fake_wandb: Path, data_dir: Path, tmp_path: Path
) -> None:
    command = [sys.executable, str(TRAIN), *COMMON, f"data_dir={data_dir}", "log_with=wandb"]
    environment = clean_environment(FAKE_WANDB=str(fake_wandb))
    for max_steps in (10, 14):
        command = [*[word for word in command if "max_steps" not in word], f"max_steps={max_steps}"]
        result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        assert "Traceback" not in result.stderr
    first, second = (json.loads(line) for line in fake_wandb.read_text().splitlines())
    assert first == second  # the same id, so that the second start goes on there
    assert first["project"] == "mnist-dist"
    assert first["name"] == "run"
    assert first["id"].startswith("run-")
    assert first["dir"] == str(tmp_path / "run")
    assert len(losses(tmp_path / "run")) == 14


def test_ranks_of_which_none_is_the_first_of_its_host_train(data_dir: Path, tmp_path: Path) -> None:
    log, port = tmp_path / "output.txt", free_port()
    arguments = ["train", *COMMON, f"data_dir={data_dir}", "max_steps=3"]
    places = [rank_environment(rank, 2, port) | {"LOCAL_RANK": str(rank + 1)} for rank in range(2)]
    result = wait_ranks([start_verb(arguments, log, become, **place) for place in places], log)
    assert result.code == 0, result.output


def test_a_batch_of_more_than_all_images_is_refused(data_dir: Path, tmp_path: Path) -> None:
    result = run_ranks([*COMMON, f"data_dir={data_dir}", "batch_size=1002"], tmp_path)
    assert result.code == 2
    assert "batch_size=1002 is more than the 1,000 training images of synthetic" in result.output
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("smoothing", ["0.1", "0"])
def test_the_label_smoothing_in_the_train_loss_is_said(smoothing: str, data_dir: Path, tmp_path: Path) -> None:
    arguments = [*COMMON, f"data_dir={data_dir}", "max_steps=3", f"label_smoothing={smoothing}"]
    result = run_ranks(arguments, tmp_path, world_size=2)
    assert result.code == 0, result.output
    note = "note: the train loss is with label_smoothing=0.1, the test loss without, so that the two do not compare\n"
    assert result.output.count(note) == (smoothing == "0.1")
    assert (tmp_path / "run/console.log").read_text().count(note) == (smoothing == "0.1")
    assert metrics(tmp_path / "run", "start")[0]["label_smoothing"] == float(smoothing)


def test_a_password_in_an_address_is_stored_nowhere(data_dir: Path, tmp_path: Path) -> None:
    arguments = [*COMMON, f"data_dir={data_dir}", "mirror=https://me:s3cret@host/a", "max_steps=3"]
    first = run_ranks([*arguments, "log_with=tensorboard"], tmp_path, world_size=2)
    again = run_ranks([*arguments[:-1], "max_steps=4"], tmp_path)
    plan = run_ranks([*arguments, "--dry-run"], tmp_path)
    assert first.code == again.code == plan.code == 0, first.output + again.output + plan.output
    assert "mirror: https://***@host/a\n" in plan.output
    assert "mirror: https://***@host/a\n" in (tmp_path / "run/config.yaml").read_text()
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert any(path.name.startswith("events.out") for path in files)
    assert [path for path in files if b"s3cret" in path.read_bytes()] == []
