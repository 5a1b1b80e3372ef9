"""What each rank knows of its own host, read without rights and without touching a device."""

import os
import re
import resource
import shutil
import socket
import subprocess
from pathlib import Path
from typing import Any

import psutil
import torch

from mnist_dist.checks.guard import run_guarded
from mnist_dist.config.schema import Config
from mnist_dist.distributed.device import driver_version, nccl_version, processor, usable_cores, why_no_gpu
from mnist_dist.distributed.launch_env import LaunchEnv
from mnist_dist.distributed.preflight import group_address, interfaces, time_lookup
from mnist_dist.distributed.rendezvous import describe_request
from mnist_dist.errors import RequestError

SETTINGS = ("NCCL_", "GLOO_", "UCX_", "FI_")  # the environment variables that all hosts should have alike
PER_HOST = ("NCCL_DEBUG_FILE", "NCCL_HOSTID")  # those that may differ
SHM = Path("/dev/shm")
INFINIBAND = Path("/sys/class/infiniband")
CGROUP = Path("/sys/fs/cgroup")
NVIDIA_SMI_S = DEVICES_S = 10.0
GPU_FIELDS = (
    "index",
    "name",
    "clocks_event_reasons.active",
    "ecc.errors.uncorrected.volatile.total",
    "pcie.link.width.current",
    "pcie.link.width.max",
    "memory.total",
)
KERNEL_ERRORS = re.compile(
    r"NVRM: Xid|nvlink.*(fatal|error)|\[Hardware Error\]|mce: .*error|EDAC.*UE|ECC.*uncorrect", re.I
)


def describe_place(env: LaunchEnv) -> dict[str, Any]:
    """Where this rank is and is reached: little enough for one network packet."""
    refusal, address = "", ""
    try:
        address = group_address()
    except RequestError as error:
        refusal = str(error)
    at = [(name, mtu) for name, other, mtu in interfaces() if other == address]
    name, mtu = at[0] if at else ("", 0)
    place = {"rank": env.rank, "host": socket.gethostname(), "address": address, "interface": name, "mtu": mtu}
    return place | {"refusal": refusal}


def gather_facts(config: Config, env: LaunchEnv) -> dict[str, Any]:
    """What else this rank knows, as JSON holds it."""
    num_devices = 0 if env.use_cpu else count_devices()
    gpus, gpu_problem = read_gpus() if num_devices else ([], "")
    free_shm = shutil.disk_usage(SHM).free if SHM.is_dir() else None
    return {
        "local_rank": env.local_rank,
        "device_refusal": "" if env.use_cpu or num_devices else why_no_gpu(),
        "request": describe_request(config),
        "same": {
            "kernel": os.uname().release,
            "driver": driver_version(),
            "NCCL": nccl_version(),
            "processor": processor(),
            "cores of the host": psutil.cpu_count(),
            "memory": f"{round(psutil.virtual_memory().total / 2**30)} GiB",
            "GPUs": ", ".join(gpu["name"] for gpu in gpus) or "none",
        },
        "settings": {k: v for k, v in os.environ.items() if k.startswith(SETTINGS) and k not in PER_HOST},
        "interfaces": [list(interface) for interface in interfaces()],
        "resolves": resolves(socket.gethostname()),
        "master": env.master_addr or socket.gethostname(),
        "lookup_s": time_lookup(env.master_addr or socket.gethostname()),
        "cores": usable_cores(),
        "all_cores": psutil.cpu_count(),
        "throttled": read_throttled(),
        "stolen_percent": read_stolen(),
        "shm_free": free_shm,
        "open_files": resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        "locked_kib": resource.getrlimit(resource.RLIMIT_MEMLOCK)[0] // 1024,
        "infiniband": has_infiniband(),
        "gpus": gpus,
        "gpu_problem": gpu_problem,
        "kernel_errors": read_kernel_log(),
    }


def count_devices() -> int:
    """GPUs that torch sees. In a child: a process that has started CUDA cannot fork one that uses it."""
    reports = run_guarded(lambda report: report("count", torch.accelerator.device_count()), DEVICES_S)
    return int(reports.get("count", 0))


def resolves(name: str) -> bool:
    """Whether a name leads anywhere."""
    try:
        return bool(socket.getaddrinfo(name, 0))
    except OSError:
        return False


def read_throttled(folder: Path = CGROUP) -> float:
    """Percent of the periods in which this container was held back by its limit of processor time."""
    try:
        words = dict(line.split() for line in (folder / "cpu.stat").read_text().splitlines())
        return 100 * int(words["nr_throttled"]) / max(int(words["nr_periods"]), 1)
    except (OSError, KeyError, ValueError):  # no cgroup of version 2, or no limit
        return 0.0


def read_stolen() -> float:
    """Percent of the processor time since the start that the hypervisor gave to others."""
    times = psutil.cpu_times()
    return float(100 * getattr(times, "steal", 0.0) / max(sum(times), 1.0))


def has_infiniband(folder: Path = INFINIBAND) -> bool:
    """Whether a port of an InfiniBand card is active."""
    return any("ACTIVE" in state.read_text() for state in folder.glob("*/ports/*/state"))


def read_kernel_log() -> list[str] | None:
    """The kernel's lines about faulty hardware, or None where this user may not read them."""
    try:
        result = subprocess.run(["dmesg"], capture_output=True, text=True, timeout=5, errors="replace")
    except (OSError, subprocess.TimeoutExpired):
        return None
    if result.returncode:
        return None
    return [line for line in result.stdout.splitlines() if KERNEL_ERRORS.search(line)]


def read_gpus() -> tuple[list[dict[str, str]], str]:
    """What nvidia-smi says of each GPU; and why not, where it does not."""
    command = ["nvidia-smi", f"--query-gpu={','.join(GPU_FIELDS)}", "--format=csv,noheader,nounits"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=NVIDIA_SMI_S)
    except FileNotFoundError:
        return [], "there is no nvidia-smi"
    except (OSError, subprocess.TimeoutExpired) as error:
        return [], f"nvidia-smi: {error}"
    if result.returncode:
        return [], f"nvidia-smi: {(result.stdout + result.stderr).strip().splitlines()[0]}"
    return parse_gpus(result.stdout), ""


def parse_gpus(text: str) -> list[dict[str, str]]:
    """The rows of nvidia-smi's table, by field."""
    rows = [[cell.strip() for cell in line.split(",")] for line in text.splitlines() if line.strip()]
    return [dict(zip(GPU_FIELDS, row, strict=True)) for row in rows]
