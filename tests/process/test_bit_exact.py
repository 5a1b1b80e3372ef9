"""bit_exact=N: the same bits on any number of ranks that divides N, over any number of stops."""

import hashlib
from pathlib import Path

import pytest

from tests.conftest import losses, metrics, run_ranks, start_ranks, wait_for, wait_ranks
from tests.process.test_training import slow

# 16 steps an epoch, the last of 40 images; the recommended recipes' learning rates and batches.
COMMON = ["dataset=synthetic", "log_every_steps=1", "run_dir=run", "epochs=2"]
EVERYTHING = ["shift=2", "rotate=10", "scale=0.1", "elastic=0.5", "ema=0.99", "clip_grad_norm=1", "label_smoothing=0.1"]
MODELS = {"cnn": ["model=cnn"], "mlp": ["mlp", "batch_size=128", "lr=4e-3"]}


def train(folder: Path, data_dir: Path, *arguments: str, world_size: int) -> Path:
    """Run to the end in a folder of its own, and return the run directory."""
    folder.mkdir(exist_ok=True)
    result = run_ranks([*arguments, f"data_dir={data_dir}"], folder, world_size=world_size)
    assert result.code == 0, result.output
    assert "Traceback" not in result.output
    return folder / "run"


def bits(run_dir: Path) -> tuple[list[float], str]:
    """The loss of each step, and a hash of the file of the last weights."""
    newest = max((run_dir / "checkpoints").glob("step-*"))
    return losses(run_dir), hashlib.sha256((newest / "model.safetensors").read_bytes()).hexdigest()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("model", MODELS)
def test_any_number_of_ranks_has_the_same_bits(model: str, precision: str, data_dir: Path, tmp_path: Path) -> None:
    arguments = [*MODELS[model], *COMMON, *EVERYTHING, f"precision={precision}", "bit_exact=4"]
    results = [bits(train(tmp_path / str(n), data_dir, *arguments, world_size=n)) for n in (1, 2, 4)]
    assert len(results[0][0]) == 2 * {"cnn": 16, "mlp": 8}[model]
    assert results[0] == results[1] == results[2]


def test_eight_shards_have_the_same_bits(data_dir: Path, tmp_path: Path) -> None:
    arguments = [*COMMON[:-1], *EVERYTHING, "epochs=1", "precision=fp32", "bit_exact=8"]
    results = [bits(train(tmp_path / str(n), data_dir, *arguments, world_size=n)) for n in (1, 2, 4, 8)]
    assert all(result == results[0] for result in results)


def test_a_micro_batch_has_the_same_bits_too(data_dir: Path, tmp_path: Path) -> None:
    arguments = [*COMMON[:-1], *EVERYTHING, "epochs=1", "precision=fp32", "bit_exact=4", "micro_batch=6"]
    results = [bits(train(tmp_path / str(n), data_dir, *arguments, world_size=n)) for n in (1, 2, 4)]
    assert results[0] == results[1] == results[2]


def killed(folder: Path, data_dir: Path, arguments: list[str], world_size: int, first_step: int) -> None:
    """Run until there is a checkpoint early in an epoch, from a step on; kill all ranks there."""
    log, run_dir = folder / f"killed-{first_step}.txt", folder / "run"

    def is_well_on_its_way() -> bool:
        newest = max((int(path.name[5:]) for path in (run_dir / "checkpoints").glob("step-*")), default=0)
        return newest >= first_step and 2 < newest % 16 < 10

    ranks = start_ranks([*arguments, f"data_dir={data_dir}"], log, world_size=world_size, target=slow)
    wait_for(is_well_on_its_way)
    for rank in ranks:
        rank.kill()
    assert wait_ranks(ranks, log).code == -9


def test_kills_and_other_numbers_of_ranks_change_no_bit(data_dir: Path, tmp_path: Path) -> None:
    arguments = [*COMMON[:-1], *EVERYTHING, "epochs=6", "precision=fp32", "bit_exact=4", "checkpoint_every_s=0.05"]
    straight = train(tmp_path / "straight", data_dir, *arguments, world_size=1)
    killed(tmp_path, data_dir, arguments, 4, first_step=5)
    killed(tmp_path, data_dir, arguments, 1, first_step=40)
    assert bits(train(tmp_path, data_dir, *arguments, world_size=2)) == bits(straight)
    resumes = metrics(tmp_path / "run", "resume")
    assert [resume["world_size"] for resume in resumes] == [1, 2]
    assert all(resume["step"] % 16 for resume in resumes)


def test_a_run_with_it_is_another_run_than_one_without(data_dir: Path, tmp_path: Path) -> None:
    train(tmp_path, data_dir, *COMMON, "max_steps=3", "bit_exact=2", world_size=1)
    for change, now in (([], 0), (["bit_exact=4"], 4)):
        result = run_ranks([*COMMON, f"data_dir={data_dir}", *change], tmp_path)
        assert result.code == 2
        assert f"the checkpoint is of a run with bit_exact=2, not bit_exact={now}" in result.output
