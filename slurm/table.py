"""The table of a sweep or a scaling run: one row for each run of a folder. Needs nothing but Python itself.

    python slurm/table.py FOLDER

Prints it, and keeps it in FOLDER/table.txt. The jobs of slurm/sweep.sh and slurm/scaling.sh call it as they end.
"""

import contextlib
import json
import statistics
import sys
from pathlib import Path
from typing import Any


def read_run(run_dir: Path) -> dict[str, Any]:
    """What a run's metrics.jsonl says about it."""
    path = run_dir / "metrics.jsonl"
    records = []
    for line in path.read_text("utf-8").splitlines() if path.exists() else []:
        with contextlib.suppress(json.JSONDecodeError):  # a crash cut it short, or it is being written
            records.append(json.loads(line))
    begun = [r for r in records if r["event"] in ("start", "resume")]
    steps = [r for r in records if r["event"] == "step"]
    done = next((r for r in reversed(records) if r["event"] == "done"), None)
    ended = next((r for r in reversed(records) if r["event"] in ("start", "resume", "stop", "failed", "done")), None)
    states = {None: "not started", "start": "running", "resume": "running"}
    event = ended and ended["event"]
    return {
        "run": run_dir.name,
        "hosts": len(begun[-1]["hosts"]) if begun else None,
        "ranks": begun[-1]["world_size"] if begun else None,
        "starts": len(begun),
        "step": max((r["step"] for r in records), default=None),
        "accuracy": done and done["accuracy"],
        "seconds": done and done["seconds"],
        # The middle one of the records: the first steps and the short last batch of an epoch are not typical.
        "images/s": statistics.median(r["images_per_s"] for r in steps) if steps else None,
        "state": states.get(event, event),
    }


def table(folder: Path) -> str:
    """The rows of a folder's runs, in the order of their names, and what they show together."""
    runs = [read_run(path) for path in sorted(folder.iterdir()) if path.is_dir()]
    if not runs:
        return f"there is no run in {folder}\n"
    sizes = {run["ranks"] for run in runs if run["ranks"]}
    first = next((run for run in runs if run["images/s"]), None)
    if len(sizes) > 1 and first:  # the same job on more and more ranks
        for run in runs:
            faster = run["images/s"] / first["images/s"] if run["images/s"] else None
            run["speed-up"] = faster
            run["per rank"] = faster * first["ranks"] / run["ranks"] if faster else None
    columns = [key for key in runs[0] if key != "state"] + ["state"]
    rows = [columns, *([_text(key, run[key]) for key in columns] for run in runs)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(columns))]
    lines = [
        "  ".join(
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    accuracies = [100 * run["accuracy"] for run in runs if run["accuracy"] is not None]
    if len(accuracies) > 1:
        mean, spread = statistics.mean(accuracies), statistics.stdev(accuracies)
        lines.append(f"accuracy of {len(accuracies)} runs: mean {mean:.2f} %, standard deviation {spread:.2f}")
    return "\n".join(lines) + "\n"


def _text(key: str, value: Any) -> str:
    if value is None:
        return "-"
    if key == "accuracy":
        return f"{100 * value:.2f} %"
    if isinstance(value, float):
        return f"{value:.2f}" if key in ("speed-up", "per rank") else f"{value:,.1f}"
    return str(value)


if __name__ == "__main__":
    if len(sys.argv) != 2 or not Path(sys.argv[1]).is_dir():
        sys.exit("usage: python slurm/table.py FOLDER, the folder of a sweep or a scaling run")
    text = table(Path(sys.argv[1]))
    print(text, end="")
    temporary = Path(sys.argv[1]) / ".table.txt"
    temporary.write_text(text, "utf-8")
    temporary.replace(Path(sys.argv[1]) / "table.txt")
