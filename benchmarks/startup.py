"""Seconds from the start of a process to its first training step, beside those of importing torch alone.

    python -m benchmarks.startup [--rounds 7] [--json FILE]

Runs in turn: `python -c "import torch"`, `python train.py` until its first step is in metrics.jsonl, and
`python train.py --help`, whose floor is an interpreter that does nothing.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.common import REPOSITORY, data_dir, write
from mnist_dist.distributed.device import processor_name


def whole(*arguments: str) -> float:
    """Seconds of a process from start to end."""
    began_s = time.perf_counter()
    subprocess.run([sys.executable, *arguments], cwd=REPOSITORY, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - began_s


def first_step() -> float:
    """Seconds until `python train.py` has recorded its first step."""
    with tempfile.TemporaryDirectory() as folder:
        metrics = Path(folder, "run/metrics.jsonl")
        command = [sys.executable, "train.py", "log_every_steps=1", f"data_dir={data_dir()}", f"run_dir={folder}/run"]
        began_s = time.perf_counter()
        with subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.DEVNULL) as process:
            while not (metrics.exists() and '"event": "step"' in metrics.read_text()):
                if process.poll() is not None:
                    raise SystemExit("train.py ended before its first step")
                time.sleep(0.005)
            seconds = time.perf_counter() - began_s
            process.kill()
        return seconds


WAYS = {
    "python -c pass": lambda: whole("-c", "pass"),
    "python train.py --help": lambda: whole("train.py", "--help"),
    "import torch": lambda: whole("-c", "import torch"),
    "python train.py, to its first step": first_step,
}


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", default="", metavar="FILE")
    options = parser.parse_args()
    for way in WAYS.values():  # once, so that all files are in the page cache
        way()
    found: dict[str, list[float]] = {name: [] for name in WAYS}
    for _ in range(options.rounds):
        for name, way in WAYS.items():
            found[name].append(way())
    medians = {name: statistics.median(seconds) for name, seconds in found.items()}
    print(processor_name())
    for name, seconds in found.items():
        print(f"{name:<36} {medians[name]:.2f} s  ({' '.join(f'{s:.2f}' for s in seconds)})")
    nothing, help_, torch, first = medians.values()
    print(f"to the first step: import torch + {first - torch:.2f} s")
    print(f"--help: an empty interpreter + {help_ - nothing:.2f} s")
    write(options.json, {"seconds": found})


if __name__ == "__main__":
    main()
