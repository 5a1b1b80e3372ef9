"""Joins the ranks of a job into one world, and refuses to go on where they are not one.

What launchers get wrong without a word is caught here: several processes that each believe to be alone, one process
where several were asked for, ranks without a GPU of their own, thread counts of one. `join` returns the Accelerator;
precision comes from the configuration alone.
"""

import datetime
import os
import socket
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from accelerate import Accelerator, DistributedType
from accelerate.utils import (
    DistributedDataParallelKwargs,
    DynamoBackend,
    GradientAccumulationPlugin,
    TorchDynamoPlugin,
)

from mnist_dist.config.schema import Config
from mnist_dist.distributed.device import cpu_has_fast_bf16, usable_cores
from mnist_dist.distributed.launch_env import launched_world_size, overridden
from mnist_dist.distributed.watchdog import Phase, Watch
from mnist_dist.errors import RequestError, RunError

T = TypeVar("T")


@dataclass(frozen=True)
class Member:
    """One rank as the others see it."""

    host: str
    cores: tuple[int, ...]  # the CPU cores that it may use
    fast_bf16: bool  # trains faster in bf16 than in fp32
    device: str


def _fast_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return cpu_has_fast_bf16()


def choose_threads(members: list[Member], rank: int) -> int:
    """CPU threads of a rank: its cores divided by the ranks of its host that may use any of them too."""
    me = members[rank]
    sharing = sum(m.host == me.host and not set(m.cores).isdisjoint(me.cores) for m in members)
    return max(1, len(me.cores) // sharing)


@dataclass(frozen=True)
class World:
    """The ranks of this job, joined."""

    accelerator: Accelerator
    members: list[Member]
    precision: str  # resolved: no, bf16 or fp16
    notes: list[str]  # what differs from what was asked for, to be said on the console
    watch: Watch | None  # over the other ranks, if there are any

    @property
    def rank(self) -> int:
        """This process's place among all of them."""
        return self.accelerator.process_index  # type: ignore[no-any-return]

    @property
    def size(self) -> int:
        """How many ranks there are."""
        return self.accelerator.num_processes  # type: ignore[no-any-return]

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, the one that writes and speaks."""
        return self.rank == 0

    @property
    def device(self) -> torch.device:
        """Where this rank computes."""
        return self.accelerator.device  # type: ignore[no-any-return]

    def at(self, phase: Phase, step: int | None = None) -> None:
        """Note what this rank does now, so that it can be said where it hangs."""
        if self.watch:
            self.watch.at(phase, step)

    def leave(self) -> None:
        """Leave the group of ranks in order, if there is one."""
        if self.watch:
            self.watch.leave()
            dist.destroy_process_group()

    def broadcast(self, value: Any) -> Any:
        """Rank 0's value, on every rank. Collective."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
        return box[0]

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, on every rank, in the order of ranks. Collective."""
        return _gather(value, self.size)

    def together(self, work: Callable[[], T]) -> T:
        """Do work that may fail on some of the ranks; where it does, all leave and rank 0 says which and why.

        Collective. Raises RequestError or RunError on rank 0, SystemExit with the same exit code on the others.
        """
        result: T | None = None
        error: Exception | None = None
        try:
            result = work()
        except (RequestError, RunError) as problem:
            error = problem
        except OSError as problem:
            error = RunError(f"{problem.filename or 'the run directory'}: {problem.strerror or problem}")
        for rank, found in enumerate(self.gather(error)):  # collective
            if found is not None:
                if not self.is_main:
                    raise SystemExit(2 if isinstance(found, RequestError) else 1)
                where = f"rank {rank} on {self.members[rank].host}: " if rank else ""
                raise type(found)(f"{where}{found}")
        return cast(T, result)


def _gather(value: Any, size: int) -> list[Any]:
    if size == 1:
        return [value]
    values: list[Any] = [None] * size
    dist.all_gather_object(values, value)
    return values


def _refusal(rank: int, sentence: str) -> RequestError | SystemExit:
    """What to raise where every rank finds the same: rank 0 says it."""
    return SystemExit(2) if rank else RequestError(sentence)


def join(config: Config) -> World:
    """Join the other ranks. Collective. Raises RequestError, RunError."""
    world_size = launched_world_size(os.environ)
    local_rank = int(os.environ.get("LOCAL_RANK") or 0)
    if world_size == 1:  # one rank needs no group: no DDP, no port, whichever launcher started it
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
            os.environ.pop(name, None)
    use_cpu = not torch.accelerator.is_available() or os.environ.get("ACCELERATE_USE_CPU", "").lower() in (
        "1",
        "true",
    )
    device = torch.device("cpu")
    if not use_cpu:
        visible = torch.accelerator.device_count()
        if local_rank >= visible:
            raise RequestError(
                f"rank {local_rank} of this machine needs a GPU of its own but the process sees {visible}; start no "
                "more ranks than GPUs, and let each rank see all of them (under SLURM --gpus-per-node)"
            )
        accelerator_type = torch.accelerator.current_accelerator()
        device = torch.device(accelerator_type.type if accelerator_type else "cuda", local_rank)
        torch.accelerator.set_device_index(local_rank)
    if world_size > 1:
        _init_process_group(device, config.timeout_s)

    me = Member(socket.gethostname(), usable_cores(), _fast_bf16(device), _device_name(device))
    members = _gather(me, world_size)
    rank = dist.get_rank() if world_size > 1 else 0
    if len({m.device.split(":")[0] for m in members}) > 1:
        raise _refusal(rank, f"some ranks have a GPU and others none: {', '.join(m.device for m in members)}")
    if use_cpu:
        # Whatever the launcher set: `accelerate launch` gives OMP_NUM_THREADS=1, one core of many.
        torch.set_num_threads(config.threads or choose_threads(members, rank))
    elif config.threads:
        torch.set_num_threads(config.threads)

    precision = config.precision
    if precision == "auto":
        precision = "bf16" if all(m.fast_bf16 for m in members) else "no"
    if precision == "fp16" and use_cpu:
        raise _refusal(rank, "precision=fp16 needs a GPU (there is no gradient scaler on a CPU); use bf16, no or auto")
    notes = overridden(os.environ, precision)
    if precision == "bf16" and not me.fast_bf16:
        notes.append("precision=bf16 is slower than precision=no on this hardware")

    # Stale launcher settings must not reach Accelerate; what they asked for was refused or noted above.
    for name in [n for n in os.environ if n.startswith("ACCELERATE_DYNAMO_")]:
        del os.environ[name]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*OMP_NUM_THREADS/MKL_NUM_THREADS unset.*")
        threads = torch.get_num_threads()
        accelerator = Accelerator(
            cpu=use_cpu,
            mixed_precision=precision,
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
            dynamo_plugin=TorchDynamoPlugin(backend=DynamoBackend.NO),
            kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True)],
        )
        torch.set_num_threads(threads)  # Accelerate sets it to one where the launcher left it open
    if accelerator.num_processes != world_size:
        raise RunError(
            f"the launcher started {world_size} processes but Accelerate sees {accelerator.num_processes}; "
            "they would train as separate runs"
        )
    if accelerator.distributed_type not in (
        DistributedType.NO,
        DistributedType.MULTI_CPU,
        DistributedType.MULTI_GPU,
        DistributedType.MULTI_XPU,
    ):
        raise _refusal(
            rank, f"this job does not run on {accelerator.distributed_type}; it knows CPUs and GPUs with DDP"
        )
    watch = None
    if world_size > 1:
        store = _connect(config.timeout_s, hosting=False)
        hosts = [member.host for member in members]
        watch = Watch(store, rank, hosts, config.timeout_s, hosted_by_rank_0=not _launcher_hosts())
        _gather(None, world_size)  # every rank has said its first beat
        watch.start()
    return World(accelerator, members, precision, notes, watch)


def _connect(timeout_s: float, *, hosting: bool) -> dist.Store:
    """A new connection to the job's store, which rank 0 hosts unless the launcher does. Raises RunError."""
    host, port, rank = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", ""), os.environ["RANK"]
    me = f"rank {rank} on {socket.gethostname()}"
    if not host or not port.isdecimal() or int(port) > 65535:
        raise RequestError(f"MASTER_ADDR={host!r} and MASTER_PORT={port!r} in the environment are no host and port")
    try:
        socket.getaddrinfo(host, int(port))  # the store would try for minutes
        patience = datetime.timedelta(seconds=timeout_s)
        store = dist.TCPStore(host, int(port), is_master=hosting, timeout=patience, wait_for_workers=False)
    except socket.gaierror as error:
        raise RunError(f"{me} cannot resolve MASTER_ADDR={host}: {error.strerror}") from None
    except (RuntimeError, ValueError) as error:  # DistNetworkError and DistStoreError among them
        what = f"cannot listen on port {port}" if hosting else f"could not reach rank 0 at {host}:{port}"
        raise RunError(f"{me} {what} within {timeout_s:g} s (timeout_s): {str(error).splitlines()[0]}") from None
    return dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)


def _init_process_group(device: torch.device, timeout_s: float) -> None:
    """Meet the other ranks, all of them, and form the group of collectives. Collective."""
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store = _connect(timeout_s, hosting=rank == 0 and not _launcher_hosts())
    store.set(f"here/{rank}", "1")
    everybody = [f"here/{r}" for r in range(world_size)]
    try:
        store.wait(everybody, datetime.timedelta(seconds=timeout_s))
    except RuntimeError:
        if rank:
            raise SystemExit(1) from None  # rank 0 says it
        missing = [str(r) for r, key in enumerate(everybody) if not store.check([key])]
        raise RunError(
            f"of {world_size} ranks these did not come within {timeout_s:g} s (timeout_s): {', '.join(missing[:64])}; "
            "look at their logs, and whether their machines reach this one"
        ) from None
    # Ours, not Accelerate's: it drops a time-out that equals its default, and its CPU ranks may look for MPI.
    # gloo beside NCCL carries what is not on the GPU (stop flags, names), without a device sync.
    backend = {"cpu": "gloo", "cuda": "cpu:gloo,cuda:nccl"}.get(device.type)
    # Twice the time, so that the watch, which can name who hangs, is sooner.
    patience = datetime.timedelta(seconds=2 * timeout_s)
    dist.init_process_group(
        backend, store=dist.PrefixStore("group", store), rank=rank, world_size=world_size, timeout=patience
    )


def _launcher_hosts() -> bool:
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return f"cuda: {torch.cuda.get_device_name(device)}"
    return device.type
