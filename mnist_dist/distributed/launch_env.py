"""What the launcher said, read once from the environment; and what is refused of it.

This imports no torch, so that a wrong launch is refused at once.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from mnist_dist.errors import FINISHED, STOPPED, RequestError

# What launchers other than torchrun call a rank, the world's size, and a rank's place on its machine.
VARIABLES = {
    "srun": ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"),
    "mpirun": ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
    "mpirun of MVAPICH": ("MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_LOCAL_RANK"),
    "PALS": ("PALS_RANKID", "PALS_SIZE", "PALS_LOCAL_RANKID"),
    "jsrun": ("JSM_NAMESPACE_RANK", "JSM_NAMESPACE_SIZE", "JSM_NAMESPACE_LOCAL_RANK"),
    "flux": ("FLUX_TASK_RANK", "FLUX_JOB_SIZE", "FLUX_TASK_LOCAL_ID"),
    "PMI": ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"),
}
OTHER_ENGINES = ("FSDP", "DEEPSPEED", "MEGATRON_LM", "PARALLELISM_CONFIG")


@dataclass(frozen=True)
class LaunchEnv:
    """One rank's place in the job, and where the ranks meet."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0  # among the ranks of this machine
    master_addr: str = ""
    master_port: str = ""
    launcher_hosts_store: bool = False  # torchrun's agent does; else rank 0
    restart_count: str = "0"  # of torchrun: each restart has keys of its own in the store
    use_cpu: bool = False  # asked for, whatever devices there are
    exit_code_file: Path | None = None  # where rank 0 leaves what is no failure of a rank

    def master(self) -> tuple[str, int]:
        """Host and port where the ranks meet. Raises RequestError."""
        if not self.master_addr or not _is_number(self.master_port) or not 0 < int(self.master_port) < 65536:
            raise RequestError(
                f"MASTER_ADDR={self.master_addr!r} and MASTER_PORT={self.master_port!r} in the environment are no host "
                "and port where the ranks could meet"
            )
        return self.master_addr, int(self.master_port)

    def exit_code(self, code: int, *, has_verdict: bool = False) -> int:
        """The exit code with which this rank's process ends; with a verdict, 1 is no failure of a rank either.

        A launcher takes every code but 0 for a failure: it prints a traceback, starts the ranks again, and ends with 1.
        So the scripts name a file, into which rank 0 writes what is no failure of a rank: finished, refused, stopped.
        """
        ordinary = (FINISHED, RequestError.exit_code, STOPPED, *([1] if has_verdict else []))
        if self.exit_code_file is None or code not in ordinary:
            return code
        if self.rank == 0:
            try:
                self.exit_code_file.write_text(f"{code}\n")
            except OSError:  # a full disk
                return code
        return 0


def read_launch_env(environment: Mapping[str, str]) -> LaunchEnv:
    """Read what torchrun, Accelerate and our own scripts set; an empty variable counts as none.

    Raises RequestError where a launcher said half of it, or asks for what this job does not do.
    """
    given = {name: value for name, value in environment.items() if value}
    if "RANK" not in given and "WORLD_SIZE" not in given:
        given |= _translate(given)
    for engine in OTHER_ENGINES:
        if _is_true(given.get(f"ACCELERATE_USE_{engine}", "")):
            raise RequestError(
                f"the launcher was told to use {engine}; this job trains data-parallel alone, so launch it without "
                "that, or delete the launcher's default configuration"
            )
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        if name in given and not _is_number(given[name]):
            raise RequestError(
                f"{name}={given[name]!r} in the environment is not a number, so the launch is incomplete"
            )
    if ("RANK" in given) != ("WORLD_SIZE" in given):
        missing = "WORLD_SIZE" if "RANK" in given else "RANK"
        raise RequestError(f"{missing} is not set in the environment, so the launch is incomplete")
    if "RANK" not in given and "MASTER_ADDR" in given:
        raise RequestError(
            "MASTER_ADDR is set but RANK and WORLD_SIZE are not: `accelerate launch` was asked for several CPU "
            "processes and started one; use NPROC=N launch/local.sh, or torchrun"
        )
    rank, world_size = int(given.get("RANK", 0)), int(given.get("WORLD_SIZE", 1))
    if not rank < world_size:
        raise RequestError(f"RANK={rank} and WORLD_SIZE={world_size} in the environment do not fit together")
    path = given.get("MNIST_DIST_EXIT_CODE_FILE")
    return LaunchEnv(
        rank=rank,
        world_size=world_size,
        local_rank=int(given.get("LOCAL_RANK", 0)),
        master_addr=given.get("MASTER_ADDR", ""),
        master_port=given.get("MASTER_PORT", ""),
        launcher_hosts_store=given.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
        restart_count=given.get("TORCHELASTIC_RESTART_COUNT", "0"),
        use_cpu=_is_true(given.get("ACCELERATE_USE_CPU", "")),
        exit_code_file=Path(path) if path else None,
    )


def _translate(given: Mapping[str, str]) -> dict[str, str]:
    """What another launcher said, in torchrun's words; nothing where there is none, or it started one process.

    Raises RequestError where it does not say where the ranks meet.
    """
    for launcher, (rank, size, local_rank) in VARIABLES.items():
        if rank not in given or not _is_number(given.get(size, "")) or int(given[size]) == 1:
            continue
        if local_rank not in given:
            raise RequestError(f"{launcher} started {given[size]} processes and did not set {local_rank}; use torchrun")
        words = {"RANK": given[rank], "WORLD_SIZE": given[size], "LOCAL_RANK": given[local_rank]}
        if launcher == "srun":
            words |= {"MASTER_ADDR": _first_host(given.get("SLURM_STEP_NODELIST", ""))}
            words |= {"MASTER_PORT": str(10000 + int(given.get("SLURM_JOB_ID", "0")) % 20000)}
        words |= {name: given[name] for name in ("MASTER_ADDR", "MASTER_PORT") if name in given}
        if not {"MASTER_ADDR", "MASTER_PORT"} <= words.keys():
            raise RequestError(
                f"{launcher} started {given[size]} processes and does not say where they meet; set MASTER_ADDR to the "
                "first one's host and MASTER_PORT to a free port there, on all of them"
            )
        return words
    return {}


def _first_host(nodes: str) -> str:
    """The first name of SLURM's list, as n1 of n[1-2,7]."""
    match = re.match(r"([^,\[]+)(?:\[(\w+)[^\]]*\]([^,]*))?", nodes)
    return "".join(part or "" for part in match.groups()) if match else "127.0.0.1"


def overruled(environment: Mapping[str, str], precision: str) -> list[str]:
    """A line for each launcher setting that the configuration overrules."""
    lines = []
    asked = environment.get("ACCELERATE_MIXED_PRECISION") or "no"
    if asked not in ("no", precision):
        lines.append(f"the launcher asked for mixed precision {asked}; precision={precision} holds")
    if (environment.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS") or "1") != "1":
        lines.append("the launcher asked for gradient accumulation; micro_batch decides that")
    if (environment.get("ACCELERATE_DYNAMO_BACKEND") or "NO").upper() != "NO":
        lines.append("the launcher asked for torch.compile; this job runs without it")
    return lines


def _is_true(text: str) -> bool:
    return text.lower() in ("1", "true")


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdecimal()
