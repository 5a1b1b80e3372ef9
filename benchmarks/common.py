"""What the comparisons share: running the job as a user would, and saying on what it ran."""

import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from mnist_dist.rundir import versions

REPOSITORY = Path(__file__).parents[1]


def data_dir() -> str:
    """The folder with MNIST in it: MNIST_DIST_DATA_DIR, or data."""
    return str(Path(os.environ.get("MNIST_DIST_DATA_DIR") or "data").absolute())


def processor() -> str:
    """Its name and how many cores there are."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    return f"{name}, {os.cpu_count()} cores"


def run(command: list[str], environment: dict[str, str] | None = None) -> tuple[int, str, int]:
    """Run a command to its end; returns its exit code, what it printed, and its peak of resident memory, bytes."""
    process = subprocess.Popen(
        command, cwd=REPOSITORY, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    output = process.stdout.read() if process.stdout else ""
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    return process.returncode, output, usage.ru_maxrss * 1024


def train(arguments: list[str], ranks: int = 1) -> dict[str, Any]:
    """Run the job as a user would, in a new run directory; returns DONE, with its records and peak memory.

    Raises SystemExit with its output where it fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        command = [str(REPOSITORY / "launch" / "local.sh"), *arguments]
        command += [f"data_dir={data_dir()}", f"run_dir={folder}/run"]
        environment = os.environ | {"NPROC": str(ranks), "PYTHON": sys.executable}
        code, output, peak_bytes = run(command, environment)
        if code:
            raise SystemExit(output)
        done: dict[str, Any] = json.loads(Path(folder, "run/DONE").read_text())
        lines = [json.loads(line) for line in Path(folder, "run/metrics.jsonl").read_text().splitlines()]
        done["evaluations"] = [line for line in lines if line["event"] == "eval"]
        done["steps"] = [line for line in lines if line["event"] == "step"]
        done["images"] = next(line["images"] for line in lines if line["event"] == "start")
        done["precision"] = next(line["precision"] for line in lines if line["event"] == "start")
        done["peak_bytes"] = peak_bytes
        return done


def show(row: dict[str, Any]) -> None:
    """Print one row of figures at once."""
    print("  ".join(f"{k} {v:.6g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()), flush=True)


def write(path: str, results: dict[str, Any]) -> None:
    """Write a comparison's results as JSON, with what they were made on, if a path is given."""
    about = {"command": " ".join(sys.orig_argv[1:]), "processor": processor(), "versions": versions()}
    if path:
        content = {"date": time.strftime("%Y-%m-%d"), **about, **results}
        Path(path).write_text(json.dumps(content, indent=2) + "\n")
