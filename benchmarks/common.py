"""What the comparisons share: running the job as a user would, and saying on what it ran."""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

from mnist_dist.distributed.device import processor_name
from mnist_dist.versions import commit, library_versions

REPOSITORY = Path(__file__).parents[1]


def data_dir() -> str:
    """The folder with MNIST in it: MNIST_DIST_DATA_DIR, or data."""
    return str(Path(os.environ.get("MNIST_DIST_DATA_DIR") or "data").absolute())


class Ended(NamedTuple):
    """A process that has ended."""

    code: int
    output: str
    errors: str  # what it wrote to the standard error stream
    peak_bytes: int  # of resident memory


def run(command: list[str], environment: dict[str, str] | None = None) -> Ended:
    """Run a command to its end, in the repository."""
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            command, cwd=REPOSITORY, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True
        )
        output = process.stdout.read() if process.stdout else ""
        _, status, usage = os.wait4(process.pid, 0)  # unlike Popen.wait, it tells the memory
        process.returncode = os.waitstatus_to_exitcode(status)
        errors.seek(0)
        return Ended(process.returncode, output, errors.read(), usage.ru_maxrss * 1024)


def train(arguments: list[str], ranks: int = 1, repository: Path = REPOSITORY) -> dict[str, Any]:
    """Run the job as a user would, in a new run directory; returns DONE, with its records and peak memory.

    `repository` is where its code lies. Raises SystemExit with its output where it fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        command = [str(repository / "launch" / "local.sh"), *arguments]
        command += [f"data_dir={data_dir()}", f"run_dir={folder}/run"]
        environment = os.environ | {"NPROC": str(ranks), "PYTHON": sys.executable}
        ended = run(command, environment)
        if ended.code:
            raise SystemExit(ended.output + ended.errors)
        done: dict[str, Any] = json.loads(Path(folder, "run/DONE").read_text())
        lines = [json.loads(line) for line in Path(folder, "run/metrics.jsonl").read_text().splitlines()]
        done["evaluations"] = [line for line in lines if line["event"] == "eval"]
        done["steps"] = [line for line in lines if line["event"] == "step"]
        done["images"] = next(line["images"] for line in lines if line["event"] == "start")
        done["precision"] = next(line["precision"] for line in lines if line["event"] == "start")
        done["peak_bytes"] = ended.peak_bytes
        return done


def show(row: dict[str, Any]) -> None:
    """Print one row of figures at once."""
    print("  ".join(f"{k} {v:.6g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()), flush=True)


def write(path: str, results: dict[str, Any]) -> None:
    """Write a comparison's results as JSON, with what they were made on, if a path is given."""
    about = {
        "command": " ".join(sys.orig_argv[1:]),
        "processor": processor_name(),
        "versions": {**library_versions(), "commit": commit()},
    }
    if path:
        content = {"date": time.strftime("%Y-%m-%d"), **about, **results}
        Path(path).write_text(json.dumps(content, indent=2) + "\n")
