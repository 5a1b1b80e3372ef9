"""Joins the ranks of a job into one world, and refuses to go on where they are not one.

What launchers get wrong without a word is caught here: several processes that each believe to be alone, one process
where several were asked for, ranks with different requests or code, ranks without a GPU of their own, thread counts of
one. Before the group of collectives is made, the ranks meet in a store and compare what they were asked for.
"""

import datetime
import itertools
import os
import socket
import warnings

import torch
import torch.distributed as dist
from accelerate import Accelerator, DistributedType
from accelerate.state import AcceleratorState
from accelerate.utils import DynamoBackend, GradientAccumulationPlugin, TorchDynamoPlugin

from mnist_dist.config.schema import Config
from mnist_dist.distributed.device import (
    choose_device,
    device_name,
    driver_version,
    has_fast_bf16,
    processor,
    set_arithmetic,
    usable_cores,
)
from mnist_dist.distributed.launch_env import VARIABLES, LaunchEnv, overruled
from mnist_dist.distributed.rendezvous import Meeting
from mnist_dist.distributed.world import Member, World, gather
from mnist_dist.errors import RequestError, RunError

SUPPORTED = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU, DistributedType.MULTI_XPU)
# The watchdog judges who is late. A collective's own time-out would only end a job that was suspended for a while.
COLLECTIVE_TIMEOUT = datetime.timedelta(days=30)


def init_distributed(config: Config, env: LaunchEnv, meeting: Meeting | None = None) -> World:
    """Join the ranks that have met into one world. Collective. Raises RequestError, RunError."""
    device = choose_device(env)
    driver = driver_version() if device.type == "cuda" else ""
    me = Member(socket.gethostname(), usable_cores(), has_fast_bf16(device), device_name(device), processor(), driver)
    members = [me]
    if meeting:
        try:
            init_process_group(device, env, meeting.store)  # collective
            members = gather(me, env.world_size)  # collective
        except RuntimeError as error:  # another rank is gone
            meeting.watchdog.fail(error)
    if len({m.device.split(":")[0] for m in members}) > 1:
        names = ", ".join(m.device for m in members)
        raise RequestError(f"some ranks have a GPU and others none: {names}", on_every_rank=True)
    if threads := config.threads or choose_threads(members, env.rank, device, bit_exact=bool(config.bit_exact)):
        torch.set_num_threads(threads)
    precision = choose_precision(config, members, device)
    notes = overruled(os.environ, precision)
    if precision == "bf16" and not me.has_fast_bf16:
        notes.append("precision=bf16 is slower than precision=fp32 on this hardware")
    if config.bit_exact and len({m.processor for m in members}) > 1:
        kinds = ", ".join(sorted({m.processor for m in members}))
        notes.append(f"the ranks have different processors ({kinds}), so bit_exact cannot promise the same bits")
    set_arithmetic(precision, bit_exact=bool(config.bit_exact))
    accelerator = make_accelerator(env, device, precision)
    return World(accelerator, members, precision, notes, meeting.watchdog if meeting else None)


def choose_threads(members: list[Member], rank: int, device: torch.device, *, bit_exact: bool) -> int:
    """CPU threads of a rank: its cores divided by the ranks of its host that may use any of them too.

    One with bit_exact, since the bits depend on it. 0 leaves torch's own choice, on a GPU. Whatever a launcher set
    does not count: `accelerate launch` gives OMP_NUM_THREADS=1, one core of many.
    """
    if bit_exact:
        return 1
    if device.type != "cpu":
        return 0
    me = members[rank]
    sharing = sum(m.host == me.host and not set(m.cores).isdisjoint(me.cores) for m in members)
    return max(1, len(me.cores) // sharing)


def choose_precision(config: Config, members: list[Member], device: torch.device) -> str:
    """fp32, tf32, bf16 or fp16. Raises RequestError where the device has none of it."""
    if config.precision == "auto":
        return "bf16" if all(m.has_fast_bf16 for m in members) else "fp32"
    if config.precision in ("fp16", "tf32") and device.type == "cpu":
        why = "there is no gradient scaler on a CPU" if config.precision == "fp16" else "a CPU has no such arithmetic"
        raise RequestError(
            f"precision={config.precision} needs a GPU ({why}); use bf16, fp32 or auto", on_every_rank=True
        )
    return config.precision


def make_accelerator(env: LaunchEnv, device: torch.device, precision: str) -> Accelerator:
    """Accelerate's view of the same ranks. Raises RequestError, RunError."""
    # Stale launcher settings must not reach Accelerate; what they asked for was refused or noted.
    for name in [n for n in os.environ if n.startswith("ACCELERATE_DYNAMO_")]:
        del os.environ[name]
    # Accelerate reads where this rank stands, from several launchers' variables: here they say the same, or nothing.
    # One rank needs no group, whichever launcher started it.
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", *itertools.chain(*VARIABLES.values())):
        os.environ.pop(name, None)
    if env.world_size > 1:
        words = {"RANK": env.rank, "WORLD_SIZE": env.world_size, "LOCAL_RANK": env.local_rank}
        os.environ |= {name: str(number) for name, number in words.items()}
        host, port = env.master()
        os.environ |= {"MASTER_ADDR": host, "MASTER_PORT": str(port)}
    if not os.environ.get("OMP_NUM_THREADS", "1").isdecimal():  # "2,1", for nested regions, which Accelerate can't read
        del os.environ["OMP_NUM_THREADS"]
    AcceleratorState._reset_state(reset_partial_state=True)  # an earlier run's in this process, as in a notebook
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*OMP_NUM_THREADS/MKL_NUM_THREADS unset.*")
        threads = torch.get_num_threads()
        accelerator = Accelerator(
            cpu=device.type == "cpu",
            mixed_precision=precision if precision in ("bf16", "fp16") else "no",
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
            dynamo_plugin=TorchDynamoPlugin(backend=DynamoBackend.NO),
        )
        torch.set_num_threads(threads)  # Accelerate sets it to one where the launcher left it open
    if accelerator.num_processes != env.world_size:
        raise RunError(
            f"the launcher started {env.world_size} processes but Accelerate sees {accelerator.num_processes}; "
            "they would train as separate runs"
        )
    if accelerator.distributed_type not in SUPPORTED:
        raise RequestError(
            f"this job does not run on {accelerator.distributed_type}; it knows CPUs and GPUs", on_every_rank=True
        )
    return accelerator


def init_process_group(
    device: torch.device, env: LaunchEnv, store: dist.Store, timeout: datetime.timedelta = COLLECTIVE_TIMEOUT
) -> None:
    """Form the group of collectives. Collective."""
    # Ours, not Accelerate's: its CPU ranks may look for MPI.
    # gloo beside NCCL carries what is not on the GPU (stop flags, names), without a device sync.
    backend = {"cpu": "gloo", "cuda": "cpu:gloo,cuda:nccl"}.get(device.type)
    dist.init_process_group(
        backend,
        store=dist.PrefixStore("group", store),
        rank=env.rank,
        world_size=env.world_size,
        timeout=timeout,
    )
