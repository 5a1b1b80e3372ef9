"""The changes of docs/OWN_JOB.md: each is short, applies to the code as it is, and trains."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from tests.conftest import REPOSITORY, Result, become, losses, metrics, run_ranks, start_ranks, start_verb, wait_ranks

PAGE = REPOSITORY / "docs" / "OWN_JOB.md"
DIFFS = sorted((REPOSITORY / "docs" / "own_job").glob("*.diff"))
NUM_TRAIN, NUM_TEST = 1000, 500
COMMON = ["precision=fp32", "threads=1", "log_every_steps=1", "run_dir=run"]


@pytest.mark.parametrize("path", DIFFS, ids=lambda path: path.stem)
def test_a_change_is_short_and_stands_in_the_page(path: Path) -> None:
    lines = path.read_text().splitlines()
    assert len([line for line in lines if line[0] in "+-" and not line.startswith(("+++", "---"))]) < 30
    assert f"```diff\n{path.read_text()}```\n" in PAGE.read_text()


def changed_copy(folder: Path, name: str, change: Callable[[str], str] = str) -> Path:
    """A copy of the program with one of the diffs applied, in `folder`."""
    for part in ("mnist_dist", "configs"):
        shutil.copytree(REPOSITORY / part, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
    diff = change((REPOSITORY / "docs" / "own_job" / f"{name}.diff").read_text())
    environment = os.environ | {"GIT_CEILING_DIRECTORIES": str(folder.parent)}
    subprocess.run(["git", "apply", "-"], cwd=folder, env=environment, input=diff, text=True, check=True)
    return folder


def become_copy(arguments: list[str], folder: Path, log: Path, environment: dict[str, str]) -> None:
    """In a forked process: be what `python train.py` would be in the folder of the copy."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "mnist_dist"]:
        del sys.modules[name]
    sys.path.insert(0, str(folder))
    become(arguments, folder, log, environment)


def run_copy(folder: Path, arguments: Sequence[object], world_size: int = 1) -> str:
    """Run `train` in the folder of a copy, to its end; returns its output."""
    log = folder / f"output-{len(list(folder.glob('output-*')))}.txt"
    result = wait_ranks(start_ranks(arguments, log, world_size=world_size, target=become_copy), log)
    assert result.code == 0, result.output
    return result.output


def run_verb(folder: Path, arguments: Sequence[object], target: Callable[..., None] = become_copy) -> Result:
    """Run another verb there."""
    log = folder / f"{arguments[0]}.txt"
    return wait_ranks([start_verb(arguments, log, target)], log)


def test_another_model(data_dir: Path, tmp_path: Path) -> None:
    folder = changed_copy(tmp_path, "model")
    arguments = [*COMMON, "model=resnet", "dataset=synthetic", f"data_dir={data_dir}", "epochs=2", "shift=2"]
    assert "resnet (37,642 parameters)" in run_copy(folder, arguments, world_size=2)
    curve = losses(folder / "run")
    assert len(curve) == 32
    assert sum(curve[-5:]) < sum(curve[:5])
    result = run_verb(folder, ["evaluate", "run"])
    assert result.code == 0, result.output
    assert "resnet on synthetic, test" in result.output


def test_another_optimizer(data_dir: Path, tmp_path: Path) -> None:
    """Its state is in the checkpoints: a run that goes on has the losses of one that never stopped."""
    folder = changed_copy(tmp_path, "optimizer")
    arguments = [*COMMON, "model=mlp", "dataset=synthetic", f"data_dir={data_dir}", "optimizer=lion", "lr=3e-4"]
    arguments += ["schedule=constant", "warmup=0", "beta2=0.99"]
    for last_step in (9, 16):
        run_copy(folder, [*arguments, f"max_steps={last_step}"])
    resumed = losses(folder / "run")
    assert resumed[-1] < resumed[0] - 0.1
    shutil.rmtree(folder / "run")
    run_copy(folder, [*arguments, "max_steps=16"])
    assert losses(folder / "run") == resumed


def fetch_noise(arguments: list[str], folder: Path, log: Path, environment: dict[str, str]) -> None:
    """Be `mnist-dist fetch` in the folder of the copy, where torchvision has noise in the place of CIFAR."""
    from torchvision import datasets

    num_classes = int((folder / "num_classes").read_text())

    class Noise:
        def __init__(self, _root: str, train: bool, download: bool) -> None:
            if not download:
                raise RuntimeError("Dataset not found or corrupted.")
            generator = torch.Generator().manual_seed(int(train))
            count = NUM_TRAIN if train else NUM_TEST
            self.targets = (torch.arange(count) % num_classes).tolist()
            noise = torch.randint(0, 100, (count, 32, 32, 3), generator=generator)
            noise[:, 1, 2, 0] = 255  # tells channels, rows and columns apart
            noise[:, 4:28, 4:28] += torch.tensor(self.targets).view(-1, 1, 1, 1)
            self.data = noise.to(torch.uint8).numpy()

    datasets.CIFAR100 = Noise
    become_copy(arguments, folder, log, environment)


@pytest.mark.parametrize("num_classes", [10, 100])
def test_another_dataset(num_classes: int, tmp_path: Path) -> None:
    folder = changed_copy(tmp_path, "dataset", lambda diff: diff.replace("CLASSES = 100", f"CLASSES = {num_classes}"))
    (folder / "num_classes").write_text(str(num_classes))
    if num_classes == 100:
        refused = run_verb(folder, ["train", "dataset=cifar100", "missing=fail"], fetch_noise)
        assert refused.code == 2
        assert refused.output == (
            "mnist-dist: there is no data/cifar100.safetensors, and missing=fail forbids the network; run "
            "`mnist-dist fetch dataset=cifar100 data_dir=data` where there is one\n"
        )
    fetched = run_verb(folder, ["fetch", "cifar100"], fetch_noise)
    assert fetched.code == 0, fetched.output
    from safetensors.torch import load_file

    images = load_file(folder / "data" / "cifar100.safetensors")["train_images"]
    assert images.shape == (NUM_TRAIN, 3, 32, 32)
    assert bool((images[:, 0, 1, 2] == 255).all())
    model = "cnn" if num_classes == 100 else "mlp"
    arguments = [*COMMON, "dataset=cifar100", f"model={model}", "batch_size=60", "shift=2", "elastic=1"]
    run_copy(folder, arguments, world_size=2)
    assert len(losses(folder / "run")) == 17
    assert metrics(folder / "run", "eval")[-1]["count"] == NUM_TEST
    result = run_verb(folder, ["evaluate", "run", "--json"])
    assert result.code == 0, result.output
    assert f'"model": "{model}"' in result.output


def test_ddp_has_the_same_losses_as_the_flat_exchange(data_dir: Path, tmp_path: Path) -> None:
    """Where each rank has its own share of a short last batch, and in pieces."""
    straight = tmp_path / "straight"
    straight.mkdir()
    arguments = [*COMMON, "model=mlp", "optimizer=sgd", "lr=2e-3", "micro_batch=20", "validation=1"]
    arguments += ["dataset=synthetic", f"data_dir={data_dir}"]
    assert run_ranks(arguments, straight).code == 0
    (tmp_path / "copy").mkdir()
    folder = changed_copy(tmp_path / "copy", "ddp")
    run_copy(folder, arguments, world_size=2)
    assert losses(folder / "run") == pytest.approx(losses(straight / "run"), abs=1e-5)
    log = folder / "refused.txt"
    refused = wait_ranks(start_ranks([*arguments, "bit_exact=2"], log, world_size=2, target=become_copy), log)
    assert refused.code in (1, 2)
    assert "bit_exact needs the flat exchange" in refused.output
