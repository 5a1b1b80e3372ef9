"""What the launcher said, read from the environment variables that every launcher sets; and what we refuse of it.

This imports no torch, so that a wrong launch is refused at once.
"""

from collections.abc import Mapping
from pathlib import Path

from mnist_dist.errors import RequestError

_OTHER_ENGINES = ("FSDP", "DEEPSPEED", "MEGATRON_LM", "PARALLELISM_CONFIG")


def launched_world_size(environment: Mapping[str, str]) -> int:
    """How many ranks the launcher started. Raises RequestError where it left that half said."""
    given = {name: environment.get(name, "") for name in ("RANK", "WORLD_SIZE")}
    if not (environment.get("LOCAL_RANK") or "0").isdecimal():
        raise RequestError(f"LOCAL_RANK={environment['LOCAL_RANK']!r} in the environment is not a number")
    if not any(given.values()):
        if "MASTER_ADDR" in environment:
            raise RequestError(
                "MASTER_ADDR is set but RANK and WORLD_SIZE are not: `accelerate launch` was asked for several CPU "
                "processes and started one; use NPROC=N launch/local.sh, or torchrun"
            )
        return 1
    for name, value in given.items():
        if not value.isdecimal():
            raise RequestError(f"{name}={value!r} in the environment is not a number, so the launch is incomplete")
    rank, world_size = int(given["RANK"]), int(given["WORLD_SIZE"])
    if not rank < world_size:
        raise RequestError(f"RANK={rank} and WORLD_SIZE={world_size} in the environment do not fit together")
    return world_size


def answer(environment: Mapping[str, str], code: int) -> int:
    """The exit code with which this rank ends.

    A launcher takes every code but 0 for a failure: it prints a traceback, starts the ranks again, and ends with 1. So
    the scripts name a file, into which rank 0 writes what is no failure of a rank: finished, refused, stopped.
    """
    path = environment.get("MNIST_DIST_EXIT_CODE_FILE")
    if not path or code not in (0, 2, 3):
        return code
    if environment.get("RANK", "0") == "0":
        try:
            Path(path).write_text(f"{code}\n")
        except OSError:  # a full disk
            return code
    return 0


def check_batch(batch_size: int, world_size: int) -> None:
    """Refuse a world size that does not divide the global batch, with those that do. Raises RequestError."""
    if batch_size % world_size:
        fitting = [str(n) for n in range(1, min(batch_size, 4096) + 1) if batch_size % n == 0]
        raise RequestError(
            f"batch_size={batch_size} is the global batch and {world_size} ranks cannot share it equally; "
            f"use {', '.join(fitting)} ranks, or another batch_size"
        )


def check_launcher(environment: Mapping[str, str]) -> None:
    """Refuse ways of training that this job does not know. Raises RequestError."""
    for engine in _OTHER_ENGINES:
        if environment.get(f"ACCELERATE_USE_{engine}", "false").lower() in ("1", "true"):
            raise RequestError(
                f"the launcher was told to use {engine}; this job trains data-parallel with DDP alone, so launch it "
                "without that, or delete the launcher's default configuration"
            )


def overridden(environment: Mapping[str, str], precision: str) -> list[str]:
    """A line for each launcher setting that the configuration overrules."""
    lines = []
    asked = environment.get("ACCELERATE_MIXED_PRECISION", "no")
    if asked not in ("no", precision):
        lines.append(f"the launcher asked for mixed precision {asked}; precision={precision} holds")
    if environment.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1") != "1":
        lines.append("the launcher asked for gradient accumulation; micro_batch decides that")
    if environment.get("ACCELERATE_DYNAMO_BACKEND", "NO").upper() != "NO":
        lines.append("the launcher asked for torch.compile; this job runs without it")
    return lines
