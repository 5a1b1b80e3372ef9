"""What this process may use of the CPU, what the CPU can do, and what is set so that it does it fast."""

import contextlib
import ctypes
import os
from pathlib import Path

import torch


def usable_cores() -> tuple[int, ...]:
    """The CPU cores that this process may use, a container's quota included."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return tuple(cores[: max(1, int(quota) // int(period))])
    except (OSError, ValueError):  # no quota ("max"), or no such file
        return tuple(cores)


def cpu_has_fast_bf16(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether training is faster in bf16 than in fp32: with matrix units for it (AMX), or with AVX-512's bf16 products
    as AMD makes them. Intel's, where they stand alone, are slower than fp32's (docs/LOG.md)."""
    try:
        text = cpuinfo.read_text()
    except OSError:
        return False
    return "amx_bf16" in text or ("AuthenticAMD" in text and "avx512_bf16" in text)


def tune_cpu() -> None:
    """Set two things of this process that training on a CPU gains by (docs/LOG.md); before torch has made its threads.

    Numbers below 1.2e-38 count as zero: the moments of weights whose gradient has become zero, as a border pixel's
    has, decay into that range, where a processor is ten times slower.

    The C library keeps what is freed, up to 512 MiB, instead of giving it back to the system: activations are freed and
    allocated at each step, and each time the kernel would hand their pages out anew, zeroed. Only glibc has this.
    """
    torch.set_flush_denormal(True)
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        m_trim_threshold, m_mmap_threshold = -1, -3  # glibc's malloc.h
        mallopt(m_mmap_threshold, 256 << 20)
        mallopt(m_trim_threshold, 512 << 20)
