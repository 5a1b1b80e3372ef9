"""What this process computes on: a GPU or CPU cores, what they can do, and what is set so that they do it right."""

import contextlib
import ctypes
import os
import platform
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch

from mnist_dist.distributed.launch_env import LaunchEnv
from mnist_dist.errors import RequestError


def choose_device(env: LaunchEnv) -> torch.device:
    """The GPU of this rank, or the CPU where there is none or none is wanted. Raises RequestError."""
    if env.use_cpu:
        return torch.device("cpu")
    if not torch.accelerator.is_available():
        if problem := why_no_gpu():
            raise RequestError(problem)
        return torch.device("cpu")
    visible = torch.accelerator.device_count()
    if env.local_rank >= visible:
        raise RequestError(
            f"rank {env.local_rank} of this machine needs a GPU of its own but the process sees {visible}; start no "
            "more ranks than GPUs, and let each rank see all of them (under SLURM --gpus-per-node)"
        )
    accelerator = torch.accelerator.current_accelerator()
    torch.accelerator.set_device_index(env.local_rank)
    return torch.device(accelerator.type if accelerator else "cuda", env.local_rank)


def why_no_gpu() -> str:
    """Where torch sees no GPU: what promised one, and what may be wrong; or the empty string."""
    if not (promise := promised_gpu()):
        return ""
    return (
        f"{promise}, but torch sees no GPU (torch {torch.__version__}, built for CUDA {torch.version.cuda}; "
        f"driver: {driver_version()}); mend that, or set ACCELERATE_USE_CPU=true to train on the CPU"
    )


def promised_gpu(devices: Path = Path("/dev")) -> str:
    """What says that there is a GPU for this process, in words, or the empty string."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:  # and where it names none, they are hidden on purpose
        hidden = visible in ("", "-1", "NoDevFiles")
        return "" if hidden else f"CUDA_VISIBLE_DEVICES={visible} promises a GPU"
    if os.environ.get("SLURM_GPUS_ON_NODE", "0") not in ("", "0"):
        return f"SLURM_GPUS_ON_NODE={os.environ['SLURM_GPUS_ON_NODE']} promises a GPU"
    return f"there is {devices / 'nvidia0'}" if (devices / "nvidia0").exists() else ""


def driver_version(version: Path = Path("/proc/driver/nvidia/version")) -> str:
    """NVIDIA's driver, in its own words, or "none"."""
    try:
        return version.read_text().splitlines()[0].removeprefix("NVRM version: ")
    except (OSError, IndexError):
        return "none"


def nccl_version() -> str:
    """NCCL's version as torch was built with it, or "none"."""
    return ".".join(map(str, torch.cuda.nccl.version())) if torch.distributed.is_nccl_available() else "none"


def device_name(device: torch.device) -> str:
    """Its kind, and a GPU's model."""
    return f"cuda: {torch.cuda.get_device_name(device)}" if device.type == "cuda" else device.type


def has_fast_bf16(device: torch.device) -> bool:
    """Whether training is faster in bf16 than in fp32 there."""
    if device.type == "cuda":
        with torch.cuda.device(device):
            return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return cpu_has_fast_bf16()


def set_arithmetic(precision: str, *, bit_exact: bool) -> None:
    """Let fp32 mean fp32 on a GPU, where cuDNN would round to TF32; and choose kernels that give the same bits."""
    tf32 = precision == "tf32"
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*TF32.*")  # torch's word on a newer way to say it
        torch.set_float32_matmul_precision("high" if tf32 else "highest")
        torch.backends.cudnn.allow_tf32 = tf32
    if bit_exact and torch.cuda.is_available():
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS starts
        torch.backends.cudnn.benchmark = False
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
        torch.use_deterministic_algorithms(True)


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


def processor(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """The kind of this machine's processor, as far as results depend on it: maker, model, and the vector instructions
    that torch uses."""
    fields = {}
    with contextlib.suppress(OSError):
        for line in cpuinfo.read_text().split("\n\n")[0].splitlines():
            name, _, value = line.partition(":")
            fields[name.strip()] = value.strip()
    words = [fields.get("vendor_id", platform.machine())]
    words += [f"{name} {fields[key]}" for name, key in (("family", "cpu family"), ("model", "model")) if key in fields]
    return " ".join([*words, torch.backends.cpu.get_cpu_capability()])


def processor_name(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """The processor as its maker calls it, and how many cores the machine has."""
    try:
        lines = cpuinfo.read_text().splitlines()
    except OSError:
        lines = []
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return f"{name or platform.machine()}, {os.cpu_count()} cores"


def tune_cpu() -> None:
    """Set two things of this process that training on a CPU gains by (docs/LOG.md); before torch has made its threads.

    Numbers below 1.2e-38 count as zero: the moments of weights whose gradient has become zero, as a border pixel's
    has, decay into that range, where a processor is ten times slower.

    The C library keeps what is freed, up to 512 MiB, instead of giving it back to the system: activations are freed and
    allocated at each step, and each time the kernel would hand their pages out anew, zeroed. Only glibc has this.
    """
    torch.set_flush_denormal(True)
    warnings.filterwarnings("ignore", message=".*smallest subnormal")  # numpy 1 says so, when matplotlib asks it
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        m_trim_threshold, m_mmap_threshold = -1, -3  # glibc's malloc.h
        mallopt(m_mmap_threshold, 256 << 20)
        mallopt(m_trim_threshold, 512 << 20)


@contextlib.contextmanager
def restored_settings() -> Iterator[None]:
    """Context in which torch's settings of this process may change: a notebook, which goes on, has its own back then.

    Those that `tune_cpu`, `set_arithmetic` and the choice of threads change, as far as they can be changed back.
    """
    threads, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
    flushes_denormal = not torch.tensor(1e-40).mul(1)
    is_deterministic = torch.are_deterministic_algorithms_enabled()
    cudnn, fills = torch.backends.cudnn, torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    try:
        with cudnn.flags(enabled=cudnn.enabled, benchmark=cudnn.benchmark, deterministic=cudnn.deterministic):
            yield
    finally:
        torch.set_num_threads(threads)
        torch.set_float32_matmul_precision(precision)
        torch.set_flush_denormal(flushes_denormal)
        torch.use_deterministic_algorithms(is_deterministic)
        torch.utils.deterministic.fill_uninitialized_memory = fills  # type: ignore[attr-defined]
