"""What the launcher said is believed only where it is whole, and what we do not do is refused or said."""

from pathlib import Path

import pytest

from mnist_dist.distributed.launch_env import answer, check_batch, check_launcher, launched_world_size, overridden
from mnist_dist.errors import RequestError


@pytest.mark.parametrize(
    ("environment", "world_size"),
    [
        ({}, 1),
        ({"RANK": "", "WORLD_SIZE": ""}, 1),
        ({"LOCAL_RANK": "0"}, 1),
        ({"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}, 1),
        ({"RANK": "0", "WORLD_SIZE": "8"}, 8),
        ({"RANK": "7", "WORLD_SIZE": "8"}, 8),
    ],
)
def test_world_size_is_what_the_launcher_said(environment: dict[str, str], world_size: int) -> None:
    assert launched_world_size(environment) == world_size


@pytest.mark.parametrize(
    ("environment", "sentence"),
    [
        ({"MASTER_ADDR": "localhost"}, "use NPROC=N launch/local.sh, or torchrun"),
        ({"RANK": "0"}, "WORLD_SIZE='' in the environment is not a number"),
        ({"WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}, "RANK='' in the environment is not a number"),
        ({"RANK": "-1", "WORLD_SIZE": "2"}, "RANK='-1' in the environment is not a number"),
        ({"RANK": "0", "WORLD_SIZE": "2.0"}, "WORLD_SIZE='2.0' in the environment is not a number"),
        ({"RANK": "0", "WORLD_SIZE": "²"}, "WORLD_SIZE='²' in the environment is not a number"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK=2 and WORLD_SIZE=2 in the environment do not fit together"),
        ({"RANK": "0", "WORLD_SIZE": "0"}, "RANK=0 and WORLD_SIZE=0 in the environment do not fit together"),
    ],
)
def test_a_launch_that_is_half_said_is_refused(environment: dict[str, str], sentence: str) -> None:
    with pytest.raises(RequestError) as raised:
        launched_world_size(environment)
    assert sentence in str(raised.value)


@pytest.mark.parametrize(
    ("rank", "code", "ends_with", "left"),
    [("0", 0, 0, "0\n"), ("0", 3, 0, "3\n"), ("1", 3, 0, ""), ("1", 2, 0, ""), ("0", 1, 1, ""), ("1", 1, 1, "")],
)
def test_what_is_no_failure_of_a_rank_is_left_in_a_file(
    rank: str, code: int, ends_with: int, left: str, tmp_path: Path
) -> None:
    path = tmp_path / "code"
    path.touch()
    assert answer({"RANK": rank, "MNIST_DIST_EXIT_CODE_FILE": str(path)}, code) == ends_with
    assert path.read_text() == left
    assert answer({"RANK": rank}, code) == code
    assert answer({"RANK": rank, "MNIST_DIST_EXIT_CODE_FILE": "/dev/full"}, 3) == (3 if rank == "0" else 0)


@pytest.mark.parametrize(("batch_size", "world_size"), [(64, 1), (64, 64), (96, 3), (1, 1)])
def test_a_world_size_that_divides_the_batch_is_welcome(batch_size: int, world_size: int) -> None:
    check_batch(batch_size, world_size)


@pytest.mark.parametrize(
    ("batch_size", "world_size", "fitting"),
    [(64, 3, "1, 2, 4, 8, 16, 32, 64"), (12, 8, "1, 2, 3, 4, 6, 12"), (7, 2, "1, 7"), (1, 2, "1")],
)
def test_another_world_size_is_refused_with_those_that_divide(batch_size: int, world_size: int, fitting: str) -> None:
    with pytest.raises(RequestError) as raised:
        check_batch(batch_size, world_size)
    assert str(raised.value) == (
        f"batch_size={batch_size} is the global batch and {world_size} ranks cannot share it equally; "
        f"use {fitting} ranks, or another batch_size"
    )


def test_a_huge_batch_has_its_refusal_at_once() -> None:
    with pytest.raises(RequestError, match="use 1, 3, 9, 27, 81, 243, 729, 2187 ranks"):
        check_batch(3**40, 2)


@pytest.mark.parametrize("engine", ["FSDP", "DEEPSPEED", "MEGATRON_LM", "PARALLELISM_CONFIG"])
@pytest.mark.parametrize("value", ["true", "True", "1"])
def test_other_engines_are_refused_by_name(engine: str, value: str) -> None:
    with pytest.raises(RequestError, match=f"told to use {engine}; "):
        check_launcher({f"ACCELERATE_USE_{engine}": value})


@pytest.mark.parametrize("value", ["false", "False", "0", ""])
def test_engines_that_are_off_are_no_matter(value: str) -> None:
    check_launcher({"ACCELERATE_USE_FSDP": value, "ACCELERATE_USE_DEEPSPEED": value})


@pytest.mark.parametrize(
    ("environment", "precision"),
    [
        ({}, "bf16"),
        ({"ACCELERATE_MIXED_PRECISION": "no"}, "bf16"),  # what a launch without a word about it sets
        ({"ACCELERATE_MIXED_PRECISION": "bf16"}, "bf16"),
        ({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "1", "ACCELERATE_DYNAMO_BACKEND": "NO"}, "no"),
        ({"ACCELERATE_DYNAMO_BACKEND": "no"}, "no"),
    ],
)
def test_nothing_is_said_where_nothing_is_overruled(environment: dict[str, str], precision: str) -> None:
    assert overridden(environment, precision) == []


@pytest.mark.parametrize(
    ("environment", "line"),
    [
        (
            {"ACCELERATE_MIXED_PRECISION": "fp16"},
            "the launcher asked for mixed precision fp16; precision=bf16 holds",
        ),
        (
            {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"},
            "the launcher asked for gradient accumulation; micro_batch decides that",
        ),
        (
            {"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"},
            "the launcher asked for torch.compile; this job runs without it",
        ),
    ],
)
def test_each_setting_that_is_overruled_has_its_line(environment: dict[str, str], line: str) -> None:
    assert overridden(environment, "bf16") == [line]


def test_all_that_is_overruled_is_said() -> None:
    environment = {
        "ACCELERATE_MIXED_PRECISION": "fp16",
        "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "2",
        "ACCELERATE_DYNAMO_BACKEND": "INDUCTOR",
    }
    assert len(overridden(environment, "no")) == 3
