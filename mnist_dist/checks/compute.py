"""Whether a device computes right and fast, and whether a sum over the ranks is one: work for a guarded child."""

import hashlib
import os
import re
import tempfile
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mnist_dist.checks.guard import Report
from mnist_dist.distributed.device import choose_device, device_name, set_arithmetic
from mnist_dist.distributed.launch_env import LaunchEnv
from mnist_dist.distributed.rendezvous import connect_store
from mnist_dist.distributed.setup import init_process_group
from mnist_dist.tensors import tensor_bytes

# Integer matrices: each partial sum stays below 2^24, where fp32 is exact, so the product is exact in any order.
ROWS, INNER, COLUMNS, LARGEST = 256, 512, 256, 8
NUM_TIMED = 20
TIMED_SIZE = 512  # of the square matrices whose product is timed; on a GPU eight times that
PATTERN = 251  # distinct values in the exchanged vector
EXCHANGE_SIZE = 1 << 16
GROUP_TIMEOUT = timedelta(seconds=20)

multiply = torch.matmul
all_reduce = dist.all_reduce


def check_device(env: LaunchEnv, report: Report) -> None:
    """Report "device", "wrong" (the first wrong element, or None), "seconds" and "cpu_seconds" of one timed product."""
    torch.set_num_threads(1)  # as many as each rank has for sure
    device = choose_device(env)
    report("device", device_name(device))
    set_arithmetic("fp32", bit_exact=False)
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    report("wrong", find_wrong_product(device))
    seconds, cpu_seconds = time_products(device)
    report("seconds", seconds)
    if device.type == "cpu":
        report("cpu_seconds", cpu_seconds)
    if device.type == "cuda":
        report("peers", check_peers(device.index))


def find_wrong_product(device: torch.device) -> dict[str, Any] | None:
    """The first element of a product of integer matrices that is not exact, in fp32 and bf16; None where all are."""
    generator = torch.Generator().manual_seed(0)
    a = torch.randint(-LARGEST, LARGEST + 1, (ROWS, INNER), generator=generator)
    b = torch.randint(-LARGEST, LARGEST + 1, (INNER, COLUMNS), generator=generator)
    exact = a @ b  # in int64
    for dtype, name in ((torch.float32, "fp32"), (torch.bfloat16, "bf16")):
        product = multiply(a.to(device, dtype), b.to(device, dtype)).cpu()
        expected = exact.to(torch.float32).to(dtype)
        if not torch.equal(product, expected):
            row, column = (product != expected).nonzero()[0].tolist()
            values = float(product[row, column]), float(expected[row, column])
            return {"precision": name, "row": row, "column": column, "value": values[0], "expected": values[1]}
    return None


def time_products(device: torch.device) -> tuple[float, float]:
    """Seconds, and seconds of processor time, of one product of square matrices: the lower quartile of 20.

    No other rank takes part in it. Beside other processes the first grows, the second does not.
    """
    size = TIMED_SIZE * (8 if device.type == "cuda" else 1)
    a = torch.ones(size, size, device=device)
    times, cpu_times = [], []
    for _ in range(NUM_TIMED + 3):
        synchronize(device)
        began_s, cpu_began_s = time.perf_counter(), time.thread_time()
        torch.matmul(a, a)
        synchronize(device)
        times.append(time.perf_counter() - began_s)
        cpu_times.append(time.thread_time() - cpu_began_s)
    return sorted(times[3:])[NUM_TIMED // 4], sorted(cpu_times[3:])[NUM_TIMED // 4]


def synchronize(device: torch.device) -> None:
    """Wait until the device has done its work."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def check_peers(index: int) -> list[dict[str, Any]]:
    """Copy integers from this rank's GPU to each other of the machine and back; returns the ones that came changed."""
    wrong = []
    sent = torch.arange(1 << 20, device=f"cuda:{index}")
    for peer in range(torch.cuda.device_count()):
        if peer != index and not torch.equal(sent.to(f"cuda:{peer}").to(f"cuda:{index}"), sent):
            wrong.append({"peer": peer})
    return wrong


def check_exchange(env: LaunchEnv, report: Report) -> None:
    """Form a group and sum over it; report "content" and "slots", see below, and "hash" of what this rank got."""
    device = choose_device(env)
    if device.type == "cuda":
        log = tempfile.NamedTemporaryFile(prefix="nccl-", delete=False)  # noqa: SIM115 (NCCL writes it to the end)
        os.environ |= {"NCCL_DEBUG": "INFO", "NCCL_DEBUG_SUBSYS": "INIT,NET", "NCCL_DEBUG_FILE": log.name}
    store = connect_store(env, GROUP_TIMEOUT.total_seconds(), hosting=False)  # the parent's connection is its own
    init_process_group(device, env, dist.PrefixStore("doctor", store), GROUP_TIMEOUT)  # collective
    content, slots = exchange(env.rank, env.world_size, device)  # collective
    if device.type == "cuda":
        report("transport", read_transport(Path(log.name).read_text(errors="replace")))
        Path(log.name).unlink()
    report("content", find_wrong_sum(content, env.world_size))
    report("slots", slots.tolist())
    digest = hashlib.blake2b(tensor_bytes(torch.cat((content, slots))), digest_size=8)
    report("hash", digest.hexdigest())


def read_transport(log: str) -> str:
    """Which network NCCL says that it uses, as "Socket" or "IB"; "" where it does not say."""
    names = re.findall(r"NCCL INFO .*Using network (\w+)|NET/(\w+) : Using", log)
    return "".join(names[-1]) if names else ""


def exchange(rank: int, world_size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Two sums over the ranks, on the CPU: of vectors that are multiples of a pattern, and of one slot a rank.

    Collective. Rank r gives (r+1)(1 + i mod 251) as element i, exact in fp32 for up to 360 ranks; and r+1 in slot r.
    """
    content = (rank + 1) * (1 + torch.arange(EXCHANGE_SIZE) % PATTERN).float().to(device)
    slots = torch.zeros(world_size, device=device)
    slots[rank] = rank + 1
    all_reduce(content)  # collective
    all_reduce(slots)  # collective
    return content.cpu(), slots.cpu()


def find_wrong_sum(content: Tensor, world_size: int) -> int | None:
    """The first element of the first sum that is not exact, or None."""
    total = world_size * (world_size + 1) // 2
    if total * PATTERN >= 1 << 24:
        return None  # fp32 does not hold it
    expected = (1 + torch.arange(EXCHANGE_SIZE) % PATTERN) * total
    different = (content != expected.float()).nonzero()
    return int(different[0]) if len(different) else None
