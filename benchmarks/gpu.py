"""All that only a GPU can show, in one command: `make gpu`.

    python -m benchmarks.gpu [--output docs/gpu-results.json] [--minutes 9] [--only PART ...]

Each part is a process of its own that may take a limited time: what fails or hangs there costs its own figures alone.
Those that it had printed are kept, and its last words stand beside them. The file is written anew after each part. The
images are those of MNIST_DIST_DATA_DIR, or data/: MNIST as `mnist-dist fetch` leaves it, for other loops as torchvision
does. With ACCELERATE_USE_CPU=true everything runs on the CPU, to rehearse.
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from benchmarks.common import REPOSITORY, data_dir, write
from mnist_dist.distributed.device import choose_device, driver_version
from mnist_dist.distributed.launch_env import read_launch_env
from mnist_dist.errors import JobError

Rows = list[dict[str, Any]]
BATCH_SIZES, LOOP_STEPS = "64,512,4096", "200"
OTHERS = {"bare": "fp32,tf32,bf16", "tutorial": "fp32", "lightning": "fp32,bf16", "keras_torch": "fp32"}
NUM_SEEDS = 30
LOG_WIDTH = 120  # of the tables, where they are not printed on a terminal
# What a launcher gives a lone rank: bench then starts no others, and nothing listens on the port.
LONE_RANK = {
    "RANK": "0",
    "LOCAL_RANK": "0",
    "WORLD_SIZE": "1",
    "LOCAL_WORLD_SIZE": "1",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29500",
}


class PartError(Exception):
    """Why a part is not whole, in words."""

    def __init__(self, reason: str, output: str = "") -> None:
        """`output` is what it had printed."""
        super().__init__(reason)
        self.rows = parse_rows(output)


def parse_rows(output: str) -> Rows:
    """The rows that a part has printed, each a JSON object on a line of its own, among other lines."""
    return [json.loads(line) for line in output.splitlines(keepends=True) if line[0] == "{" and line.endswith("}\n")]


class Part(NamedTuple):
    """One part: its name, the most seconds that it may take, and how it is run within them."""

    name: str
    limit_s: float
    run: Callable[[float], Rows]


def call(limit_s: float, *arguments: str, environment: dict[str, str] | None = None) -> str:
    """What a Python program prints. Raises PartError where it fails, with the last lines that it wrote."""
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            [sys.executable, *arguments],
            cwd=REPOSITORY,
            env=os.environ | (environment or {}),
            stdout=output,
            stderr=errors,
            start_new_session=True,
        )
        try:
            code: int | None = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        said = []
        for stream in (output, errors):
            stream.seek(0)
            said.append(stream.read())
    if code != 0:
        what = f"it took more than {limit_s:.0f} s" if code is None else f"exit code {code}"
        words = [line for line in (said[0] + said[1]).splitlines() if line.strip() and line[0] != "{"]  # rows are kept
        raise PartError(" / ".join([what, *words[-2:]]), said[0])
    return said[0]


def run_tests(*arguments: str) -> Callable[[float], Rows]:
    """How many tests pass, fail and are skipped; those that failed by name."""

    def run(limit_s: float) -> Rows:
        with tempfile.TemporaryDirectory() as folder:
            report = Path(folder) / "report.xml"
            problem = ""
            workers = str(min(8, max(2, (os.cpu_count() or 2) // 2)))
            try:
                call(limit_s, "-m", "pytest", "-q", f"-n{workers}", "--dist=load", f"--junitxml={report}", *arguments)
            except PartError as error:
                problem = str(error)
            if not report.exists():
                raise PartError(problem or "pytest wrote no report")
            cases = ElementTree.parse(report).getroot().iter("testcase")
            outcomes: dict[str, list[str]] = {"passed": [], "failed": [], "skipped": []}
            for case in cases:
                kinds = {child.tag for child in case}
                outcome = "failed" if kinds & {"failure", "error"} else "skipped" if "skipped" in kinds else "passed"
                outcomes[outcome].append(case.get("name") or "?")
        return [{name: len(cases) for name, cases in outcomes.items()} | {"names_of_failed": outcomes["failed"]}]

    return run


def run_verb(verb: str, *arguments: str, environment: dict[str, str] | None = None) -> Callable[[float], Rows]:
    """What a verb of the job says with --json."""

    def run(limit_s: float) -> Rows:
        output = call(limit_s, "-m", "mnist_dist", verb, "--json", *arguments, environment=environment)
        return [json.loads(output.splitlines()[-1])]

    return run


def run_bench(*arguments: str, on_all_gpus: bool = False) -> Callable[[float], Rows]:
    """The steps that bench measures on one GPU, or on each number of GPUs up to all (several times as long)."""

    def run(limit_s: float) -> Rows:
        (summary,) = run_verb("bench", *arguments, environment={} if on_all_gpus else LONE_RANK)(limit_s)
        return [
            {
                "model": step["model"],
                "batch_size": step["batch_size"],
                "ranks": step["ranks"],
                "step_s": step["step_s"]["median"],
                "images_per_s": step["images_per_s"]["median"],
                "is_cuda_graph": step["is_cuda_graph"],
            }
            for step in summary["steps"]
        ]

    return run


def run_loop(loop: str) -> Callable[[float], Rows]:
    """Another way to train the same networks."""
    arguments = (loop, "mlp,cnn", OTHERS[loop], data_dir(), BATCH_SIZES, LOOP_STEPS)
    return lambda limit_s: parse_rows(call(limit_s, "-m", "benchmarks.loops", *arguments))


def run_measurement(*arguments: str) -> Callable[[float], Rows]:
    """One of benchmarks.gpu_parts."""
    return lambda limit_s: parse_rows(call(limit_s, "-m", "benchmarks.gpu_parts", *arguments))


def list_parts() -> list[Part]:
    """All parts, what matters most first."""
    bench = [
        Part(f"bench {precision} graph={graph}", 60, run_bench(f"precision={precision}", f"graph={graph}"))
        for precision in ("fp32", "bf16", "tf32")
        for graph in ("auto", "off")
    ]
    is_scaling = torch.cuda.device_count() > 1
    scaling = [Part("bench fp32 all GPUs", 150, run_bench("precision=fp32", on_all_gpus=True))] if is_scaling else []
    shards = [
        Part(f"bench bit_exact={number}", 40, run_bench(f"bit_exact={number}", "batch_size=64", "precision=fp32"))
        for number in (1, 2, 4, 8)
    ]
    return [
        Part("tests/gpu", 150, run_tests("tests/gpu")),
        Part("busy", 60, run_measurement("busy")),
        *bench[:4],
        *scaling,
        *(
            Part(f"seeds {name}", 90, run_measurement("seeds", f"configs/{name}.yaml", str(NUM_SEEDS)))
            for name in ("cnn-fast", "cnn")
        ),
        *(Part(f"loop {loop}", 60, run_loop(loop)) for loop in OTHERS),
        *bench[4:],
        Part("verify", 60, run_verb("verify")),
        Part("doctor", 60, run_verb("doctor", f"data_dir={data_dir()}")),
        *shards,
        Part("tests/unit", 150, run_tests("tests/unit")),
    ]


def draw_table(parts: dict[str, Any]) -> list[Table]:
    """Images a second of all ways side by side; seeds; and how each part ended."""
    ways: dict[tuple[str, int, str], dict[str, float]] = {}
    for name, part in parts.items():
        kind, _, rest = name.partition(" ")
        for row in part["rows"] if kind in ("bench", "loop") and "bit_exact" not in name else []:
            precision = row.get("precision") or rest.split()[0]
            way = rest if kind == "loop" else "graph" if row["is_cuda_graph"] else "one by one"
            if row.get("ranks", 1) == 1:
                ways.setdefault((row["model"], row["batch_size"], precision), {})[way] = row["images_per_s"]
    speeds = Table("network", "batch", "precision", "graph", "one by one", *OTHERS, title="training, images/s")
    for (model, batch_size, precision), found in sorted(ways.items()):
        cells = [f"{found[way]:,.0f}" if way in found else "" for way in ("graph", "one by one", *OTHERS)]
        speeds.add_row(model, str(batch_size), precision, *cells)
    seeds = Table("recipe", "seeds", "test, %", "training, s", title="accuracy: mean, and least to most")
    for part in parts.values():
        if rows := [row for row in part["rows"] if "seed" in row]:
            cells = [describe([row[key] for row in rows]) for key in ("test", "seconds")]
            seeds.add_row(Path(rows[0]["recipe"]).stem, str(len(rows)), *cells)
    ends = Table("part", "seconds", "outcome", title="parts")
    for name, part in parts.items():
        tests = [f"{row['passed']} passed, {row['failed']} failed" for row in part["rows"] if "passed" in row]
        ends.add_row(name, f"{part['seconds']:.0f}", escape(part["problem"]) or "; ".join(tests) or "ok")
    return [speeds, seeds, ends]


def any_failed(rows: Rows) -> bool:
    """Whether a test failed."""
    return any(row.get("failed") for row in rows)


def describe(values: list[float]) -> str:
    """Mean, least and most."""
    return f"{statistics.mean(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def main() -> None:
    """Run it."""
    parts = list_parts()
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", default=str(REPOSITORY / "docs/gpu-results.json"), metavar="FILE")
    parser.add_argument("--minutes", type=float, default=9)
    parser.add_argument("--only", nargs="+", default=[part.name for part in parts], metavar="PART")
    options = parser.parse_args()
    try:
        on_gpu = choose_device(read_launch_env(os.environ)).type == "cuda"
    except JobError as error:
        raise SystemExit(f"benchmarks.gpu: {error}") from None
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())] if on_gpu else ["cpu"]
    results: dict[str, Any] = {"devices": names, "driver": driver_version(), "cuda": torch.version.cuda, "parts": {}}
    console = Console(width=None if sys.stdout.isatty() else LOG_WIDTH)
    ends_s = time.monotonic() + 60 * options.minutes
    console.print(f"{', '.join(names)}; results go to {options.output}", highlight=False)
    for part in parts:
        if part.name not in options.only:
            continue
        began_s = time.monotonic()
        limit_s, rows, problem = min(part.limit_s, ends_s - began_s), [], ""
        if limit_s < 5:
            problem = f"the {options.minutes:g} minutes are over"
        else:
            try:
                rows = part.run(limit_s)
            except PartError as error:
                problem, rows = str(error), error.rows
            except (OSError, ValueError, KeyError) as error:
                problem = str(error) or type(error).__name__
        took_s = time.monotonic() - began_s
        results["parts"][part.name] = {"seconds": took_s, "problem": problem, "rows": rows}
        write(options.output, results)
        console.print(f"{part.name}: {problem or 'ok'} ({took_s:.0f} s)", highlight=False, markup=False)
    for table in draw_table(results["parts"]):
        if table.row_count:
            console.print(table)
    failed = [name for name, part in results["parts"].items() if part["problem"] or any_failed(part["rows"])]
    if failed:
        raise SystemExit(f"not as it should be: {', '.join(failed)}; {options.output} has the reasons")


if __name__ == "__main__":
    main()
