"""What the launcher said is believed only where it is whole, and what we do not do is refused or said."""

from pathlib import Path

import pytest

from mnist_dist.config.schema import Config
from mnist_dist.distributed.launch_env import VARIABLES, LaunchEnv, overruled, read_launch_env
from mnist_dist.errors import RequestError

MEETING = {"MASTER_ADDR": "n1", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    ("environment", "rank", "world_size"),
    [
        ({}, 0, 1),
        ({"RANK": "", "WORLD_SIZE": ""}, 0, 1),  # some schedulers leave them empty
        ({"RANK": "", "WORLD_SIZE": "", "LOCAL_RANK": "", "MASTER_ADDR": "", "MASTER_PORT": ""}, 0, 1),
        ({"LOCAL_RANK": "0"}, 0, 1),
        ({"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}, 0, 1),
        ({"RANK": "0", "WORLD_SIZE": "8"}, 0, 8),
        ({"RANK": "7", "WORLD_SIZE": "8"}, 7, 8),
    ],
)
def test_rank_and_world_size_are_what_the_launcher_said(
    environment: dict[str, str], rank: int, world_size: int
) -> None:
    env = read_launch_env(environment)
    assert (env.rank, env.world_size) == (rank, world_size)


def test_nothing_said_is_one_rank() -> None:
    assert read_launch_env({}) == LaunchEnv()
    assert LaunchEnv().rank == LaunchEnv().local_rank == 0
    assert LaunchEnv().world_size == 1


def test_all_that_torchrun_and_our_scripts_say_is_read() -> None:
    environment = {
        "RANK": "5",
        "WORLD_SIZE": "8",
        "LOCAL_RANK": "1",
        **MEETING,
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "2",
        "ACCELERATE_USE_CPU": "true",
        "MNIST_DIST_EXIT_CODE_FILE": "/tmp/code",
    }
    env = read_launch_env(environment)
    assert env == LaunchEnv(5, 8, 1, "n1", "29500", True, "2", True, Path("/tmp/code"))
    assert env.master() == ("n1", 29500)


@pytest.mark.parametrize(
    ("environment", "sentence"),
    [
        ({"MASTER_ADDR": "localhost"}, "use NPROC=N launch/local.sh, or torchrun"),
        ({"RANK": "0"}, "WORLD_SIZE is not set in the environment"),
        ({"RANK": "0", "WORLD_SIZE": ""}, "WORLD_SIZE is not set in the environment"),
        ({"WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}, "RANK is not set in the environment"),
        ({"RANK": "-1", "WORLD_SIZE": "2"}, "RANK='-1' in the environment is not a number"),
        ({"RANK": "0", "WORLD_SIZE": "2.0"}, "WORLD_SIZE='2.0' in the environment is not a number"),
        ({"RANK": "0", "WORLD_SIZE": "²"}, "WORLD_SIZE='²' in the environment is not a number"),
        ({"LOCAL_RANK": "x"}, "LOCAL_RANK='x' in the environment is not a number"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK=2 and WORLD_SIZE=2 in the environment do not fit together"),
        ({"RANK": "0", "WORLD_SIZE": "0"}, "RANK=0 and WORLD_SIZE=0 in the environment do not fit together"),
    ],
)
def test_a_launch_that_is_half_said_is_refused(environment: dict[str, str], sentence: str) -> None:
    with pytest.raises(RequestError) as raised:
        read_launch_env(environment)
    assert sentence in str(raised.value)


@pytest.mark.parametrize(
    ("host", "port"),
    [("", ""), ("n1", ""), ("", "29500"), ("n1", "x"), ("n1", "0"), ("n1", "65536"), ("n1", "-1"), ("n1", "²")],
)
def test_a_meeting_point_that_is_none_is_refused_where_it_is_needed(host: str, port: str) -> None:
    env = read_launch_env({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": host, "MASTER_PORT": port})
    with pytest.raises(RequestError, match=f"MASTER_ADDR='{host}' and MASTER_PORT='{port}' in the environment are no "):
        env.master()


# --- other launchers than torchrun ---


@pytest.mark.parametrize("launcher", VARIABLES)
def test_what_another_launcher_calls_a_rank_is_one(launcher: str) -> None:
    environment = dict(zip(VARIABLES[launcher], ("5", "8", "1"), strict=True)) | MEETING
    env = read_launch_env(environment)
    assert (env.rank, env.world_size, env.local_rank, env.master()) == (5, 8, 1, ("n1", 29500))


@pytest.mark.parametrize("launcher", VARIABLES)
def test_another_launcher_that_started_one_process_started_one_rank(launcher: str) -> None:
    assert read_launch_env(dict(zip(VARIABLES[launcher], ("0", "1", "0"), strict=True))) == LaunchEnv()


@pytest.mark.parametrize("launcher", VARIABLES)
def test_torchruns_words_hold_below_another_launcher(launcher: str) -> None:
    environment = dict(zip(VARIABLES[launcher], ("5", "8", "1"), strict=True))
    env = read_launch_env({**environment, "RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", **MEETING})
    assert (env.rank, env.world_size) == (0, 2)
    env = read_launch_env({**environment, "RANK": "", "WORLD_SIZE": "", **MEETING})  # empty: not said
    assert (env.rank, env.world_size) == (5, 8)


@pytest.mark.parametrize("launcher", [name for name in VARIABLES if name != "srun"])
def test_another_launcher_that_does_not_say_where_the_ranks_meet_is_refused(launcher: str) -> None:
    with pytest.raises(RequestError, match=f"^{launcher} started 8 processes and does not say where they meet; "):
        read_launch_env(dict(zip(VARIABLES[launcher], ("5", "8", "1"), strict=True)))


@pytest.mark.parametrize("launcher", VARIABLES)
def test_another_launcher_that_does_not_number_the_ranks_of_a_machine_is_refused(launcher: str) -> None:
    rank, size, local_rank = VARIABLES[launcher]
    with pytest.raises(RequestError, match=f"^{launcher} started 8 processes and did not set {local_rank}; "):
        read_launch_env({rank: "5", size: "8", **MEETING})


@pytest.mark.parametrize(
    ("nodes", "host"),
    [
        ("n1", "n1"),
        ("n1,n2", "n1"),
        ("n[1-2,7]", "n1"),
        ("gpu[001-003]", "gpu001"),
        ("rack2-n[07,09]", "rack2-n07"),
        ("n[3-4]-ib,m1", "n3-ib"),
        ("login,n[1-2]", "login"),
        ("", "127.0.0.1"),
    ],
)
def test_the_ranks_of_srun_meet_on_the_steps_first_host(nodes: str, host: str) -> None:
    environment = dict(zip(VARIABLES["srun"], ("5", "8", "1"), strict=True))
    env = read_launch_env({**environment, "SLURM_STEP_NODELIST": nodes, "SLURM_JOB_ID": "123456"})
    assert env.master() == (host, 10000 + 123456 % 20000)
    assert read_launch_env({**environment, "SLURM_STEP_NODELIST": nodes, **MEETING}).master() == ("n1", 29500)


# --- exit codes ---


@pytest.mark.parametrize(
    ("rank", "code", "ends_with", "left"),
    [(0, 0, 0, "0\n"), (0, 3, 0, "3\n"), (0, 2, 0, "2\n"), (1, 3, 0, ""), (1, 2, 0, ""), (0, 1, 1, ""), (1, 1, 1, "")],
)
def test_what_is_no_failure_of_a_rank_is_left_in_a_file(
    rank: int, code: int, ends_with: int, left: str, tmp_path: Path
) -> None:
    path = tmp_path / "code"
    path.touch()
    assert LaunchEnv(rank, 2, exit_code_file=path).exit_code(code) == ends_with
    assert path.read_text() == left
    assert LaunchEnv(rank, 2).exit_code(code) == code
    assert LaunchEnv(rank, 2, exit_code_file=Path("/dev/full")).exit_code(3) == (0 if rank else 3)


# --- world sizes ---


@pytest.mark.parametrize(("batch_size", "world_size"), [(64, 1), (64, 64), (96, 3), (1, 1)])
def test_a_world_size_that_divides_the_batch_is_welcome(batch_size: int, world_size: int) -> None:
    config = Config(batch_size=batch_size)
    assert config.world_size_problem(world_size) == ""
    assert config.num_shards(world_size) == world_size


@pytest.mark.parametrize(
    ("batch_size", "world_size", "fitting"),
    [
        (64, 3, "1, 2, 4, 8, 16, 32, 64"),
        (12, 8, "1, 2, 3, 4, 6, 12"),
        (7, 2, "1, 7"),
        (1, 2, "1"),
        (3**12, 2, "1, 3, 9, 27, 81, 243, 729, 2187"),
    ],
)
def test_another_world_size_is_refused_with_those_that_divide(batch_size: int, world_size: int, fitting: str) -> None:
    assert Config(batch_size=batch_size).world_size_problem(world_size) == (
        f"batch_size={batch_size} images, the global batch, cannot be shared equally by {world_size} ranks; "
        f"use {fitting} ranks, or another batch_size"
    )


def test_shards_of_a_fixed_number_are_shared_by_the_ranks_that_divide_it() -> None:
    config = Config(batch_size=96, bit_exact=4)
    assert [n for n in range(1, 10) if not config.world_size_problem(n)] == [1, 2, 4]
    assert {config.num_shards(n) for n in (1, 2, 4)} == {4}
    assert config.world_size_problem(3) == (
        "bit_exact=4 shards cannot be shared equally by 3 ranks; use 1, 2, 4 ranks, or another bit_exact"
    )


# --- what we do not do ---


@pytest.mark.parametrize("engine", ["FSDP", "DEEPSPEED", "MEGATRON_LM", "PARALLELISM_CONFIG"])
@pytest.mark.parametrize("value", ["true", "True", "1"])
def test_other_engines_are_refused_by_name(engine: str, value: str) -> None:
    with pytest.raises(RequestError, match=f"told to use {engine}; "):
        read_launch_env({f"ACCELERATE_USE_{engine}": value})


@pytest.mark.parametrize("value", ["false", "False", "0", ""])
def test_engines_that_are_off_are_no_matter(value: str) -> None:
    assert read_launch_env({"ACCELERATE_USE_FSDP": value, "ACCELERATE_USE_DEEPSPEED": value}) == LaunchEnv()


@pytest.mark.parametrize(
    ("environment", "precision"),
    [
        ({}, "bf16"),
        ({"ACCELERATE_MIXED_PRECISION": "no"}, "bf16"),  # what a launch without a word about it sets
        ({"ACCELERATE_MIXED_PRECISION": "bf16"}, "bf16"),
        ({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "1", "ACCELERATE_DYNAMO_BACKEND": "NO"}, "fp32"),
        ({"ACCELERATE_DYNAMO_BACKEND": "no"}, "fp32"),
    ],
)
def test_nothing_is_said_where_nothing_is_overruled(environment: dict[str, str], precision: str) -> None:
    assert overruled(environment, precision) == []


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
    assert overruled(environment, "bf16") == [line]


def test_all_that_is_overruled_is_said() -> None:
    environment = {
        "ACCELERATE_MIXED_PRECISION": "fp16",
        "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "2",
        "ACCELERATE_DYNAMO_BACKEND": "INDUCTOR",
    }
    assert len(overruled(environment, "fp32")) == 3
