"""The pictures of README.md, drawn from runs that are made here, on drawn digits: no network, some minutes.

    make pictures       =       python -m benchmarks.pictures [curves] [terminal]

docs/pictures/curves-light.svg and curves-dark.svg: one request on 1, 2 and 4 ranks, and on 2 ranks that are killed and
resumed on 4. docs/pictures/terminal.svg: what the console says when one of two ranks is killed, and after that.
"""

import hashlib
import itertools
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure
from rich.console import Console
from rich.terminal_theme import TerminalTheme
from rich.text import Text

from benchmarks.common import REPOSITORY
from mnist_dist.run.metrics import Record, read_record

PICTURES = REPOSITORY / "docs" / "pictures"
COMMON = ["mlp", "dataset=synthetic", "epochs=3", "precision=fp32", "threads=1"]
KILLED_AT = 600  # step, of 1,407
MEAN_OF = 25  # steps that a point of the curve is the mean of
# Text, grid and curves for the light and the dark page of GitHub, whose background shows through. The contrast with it
# is at least 4.5 for text and 3 for curves (WCAG 2.1).
THEMES = {
    "light": ("#1f2328", "#d1d9e0", ("#4493f8", "#0a3069", "#ffa657", "#000000")),
    "dark": ("#f0f6fc", "#3d444d", ("#1f6feb", "#a5d6ff", "#db6d28", "#ffffff")),
}
WIDTHS, DASHES = (9, 5, 2.2, 2.2), ("-", "-", "-", (0, (1, 3)))  # the narrower lies on the wider
WINDOW = TerminalTheme(
    (13, 17, 23),
    (240, 246, 252),
    [  # black, red, green, yellow, blue, magenta, cyan, white
        (72, 79, 88),
        (255, 123, 114),
        (63, 185, 80),
        (210, 153, 34),
        (88, 166, 255),
        (188, 140, 255),
        (57, 197, 207),
        (177, 186, 196),
    ],
)
COLUMNS = 74  # of the table of epochs


def environment(ranks: int, rank: int = 0, port: int = 0) -> dict[str, str]:
    """This process's environment, with what a launcher sets for a rank of this machine."""
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_PORT": port}
    launcher = {"MASTER_ADDR": "127.0.0.1", **{key: str(value) for key, value in place.items()}} if ranks > 1 else {}
    return os.environ | {"ACCELERATE_USE_CPU": "true", "TORCH_CPP_LOG_LEVEL": "ERROR"} | launcher


def start(ranks: int, folder: Path, *arguments: str) -> "list[subprocess.Popen[bytes]]":
    """Start the ranks of a run in `folder`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, str(REPOSITORY / "train.py"), *COMMON, *arguments]
    with (folder / "output.txt").open("ab") as output:
        return [
            subprocess.Popen(command, cwd=folder, env=environment(ranks, rank, port), stdout=output, stderr=output)
            for rank in range(ranks)
        ]


def finish(processes: "list[subprocess.Popen[bytes]]", folder: Path) -> None:
    """Wait for a run's ranks. Raises SystemExit with their output where one fails."""
    if any([process.wait() for process in processes]):
        raise SystemExit((folder / "output.txt").read_text())


def wait_for(condition: Callable[[], Any]) -> Any:
    """What the condition returns, once that is something."""
    while not (result := condition()):
        time.sleep(0.02)
    return result


def last_step(run_dir: Path) -> int:
    """The last step that is recorded, or 0."""
    try:
        steps = read_record(run_dir / "metrics.jsonl").steps
    except OSError:
        return 0
    return steps[-1].step if steps else 0


def make_runs(folder: Path) -> tuple[dict[str, Record], str]:
    """Train; the record of each run by what it is, and the hash of the weights that all of them end with."""
    request = ["bit_exact=4", "log_every_steps=1", "checkpoint_every_s=1"]
    for ranks in (1, 2, 4):
        finish(start(ranks, folder, *request, f"run_dir={ranks}"), folder)
    processes = start(2, folder, *request, "run_dir=killed")
    wait_for(lambda: last_step(folder / "killed") >= KILLED_AT)
    for process in processes:
        process.kill()
        process.wait()
    finish(start(4, folder, *request, "run_dir=killed"), folder)
    names = {"1": "1 rank", "2": "2 ranks", "4": "4 ranks"}
    names["killed"] = "2 ranks, killed, and resumed on 4 (dashed line)"
    newest = [max((folder / run / "checkpoints").glob("step-*")) / "model.safetensors" for run in names]
    sums = {hashlib.sha256(path.read_bytes()).hexdigest() for path in newest}
    records = {name: read_record(folder / run / "metrics.jsonl") for run, name in names.items()}
    if len(sums) > 1 or len({tuple(step.loss for step in record.steps) for record in records.values()}) > 1:
        raise SystemExit("the runs are not equal, which bit_exact promises")
    return records, sums.pop()


def draw_curves(records: dict[str, Record], sha256: str) -> None:
    """Loss and accuracy of all runs on one another, in a picture for light pages and one for dark."""
    for theme, (text, grid, colours) in THEMES.items():
        settings: Any = {key: text for key in ("text.color", "axes.labelcolor", "xtick.labelcolor", "ytick.labelcolor")}
        settings |= {key: grid for key in ("axes.edgecolor", "grid.color", "xtick.color", "ytick.color")}
        settings |= {"font.size": 11, "axes.grid": True, "svg.hashsalt": theme}
        with mpl.rc_context(settings):
            figure = Figure(figsize=(5.2, 6.6), facecolor="none", layout="constrained")
            loss, accuracy = figure.subplots(2, 1, sharex=True, subplot_kw={"facecolor": "none"})
            for (name, record), colour, width, dash in zip(records.items(), colours, WIDTHS, DASHES, strict=True):
                style: Any = {"color": colour, "linewidth": width, "linestyle": dash, "label": name}
                groups = [record.steps[i : i + MEAN_OF] for i in range(0, len(record.steps), MEAN_OF)]
                points = [(group[-1].step, sum(step.loss for step in group) / len(group)) for group in groups]
                loss.plot(*zip(*points, strict=True), **style)
                evals = [(each.step, 100 * each.accuracy) for each in record.evals]
                accuracy.plot(*zip(*evals, strict=True), **style, marker="o", markersize=width + 3)
                for axes, resume in itertools.product((loss, accuracy), record.starts[1:]):
                    axes.axvline(resume.step, color=text, linestyle="--", linewidth=1)
            loss.set(ylabel="training loss", yscale="log")
            loss.set_yticks([0.5, 0.6, 0.8, 1, 1.5, 2], ["0.5", "0.6", "0.8", "1", "1.5", "2"])
            loss.minorticks_off()
            accuracy.set(xlabel="step", ylabel="test accuracy, %", xlim=(0, None))
            for axes in (loss, accuracy):
                axes.spines[["top", "right"]].set_visible(False)
            figure.legend(*loss.get_legend_handles_labels(), loc="outside upper left", frameon=False, handlelength=3)
            figure.text(0.02, 0.0, f"all four end with weights of sha256 {sha256[:16]}…", fontsize=10, va="bottom")
            figure.supxlabel(" ", fontsize=10)  # room for it
            figure.savefig(PICTURES / f"curves-{theme}.svg", metadata={"Date": None})


def draw_terminal(folder: Path) -> None:
    """Kill rank 1 of two in the second epoch, give the same command again, and draw the console."""
    (folder / "launch").symlink_to(REPOSITORY / "launch")
    command = ["launch/local.sh", "mlp", "dataset=synthetic", "run_dir=runs/demo"]
    settings = environment(1) | {"NPROC": "2", "PYTHON": sys.executable}
    shown = []
    for is_killed in (True, False):
        process = subprocess.Popen(
            command, cwd=folder, env=settings, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        if is_killed:
            wait_for(lambda: last_step(folder / "runs/demo") >= KILLED_AT)
            os.kill(wait_for(lambda: find_rank(1, folder)), signal.SIGKILL)
        lines = (process.communicate()[0] or "").splitlines()
        if is_killed:  # after the job's last word torchrun reports, at length
            lines = [line for line in lines if not re.match(r"W\d{4} ", line)]
            last = next(i for i, line in enumerate(lines) if line.startswith("mnist-dist:"))
            lines = [*lines[:last], "# rank 1 is killed here, by kill -9 in another terminal", lines[last], ""]
        shown += [f"$ NPROC=2 {' '.join(command)}", *lines]
    console = Console(record=True, width=COLUMNS, file=Path(os.devnull).open("w"), highlight=False)  # noqa: SIM115
    for line in shown:
        styles = {"$": "bold", "#": "cyan", "m": "bold red" if line.startswith("mnist-dist:") else ""}
        console.print(Text(line, style=styles.get(line[:1], "")))
    svg = console.export_svg(title="one of two ranks is killed", theme=WINDOW, unique_id="terminal")
    svg = re.sub(r"@font-face \{.*?\}", "", svg, flags=re.DOTALL)  # a picture on a page may load nothing
    (PICTURES / "terminal.svg").write_text(re.sub(r"[ \t]+$", "", svg, flags=re.MULTILINE))


def find_rank(rank: int, folder: Path) -> int:
    """The process of a rank that works in `folder`, or 0."""
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            is_here = (entry / "cwd").readlink() == folder
            if is_here and f"\0LOCAL_RANK={rank}\0".encode() in (entry / "environ").read_bytes():
                return int(entry.name)
        except OSError:
            continue
    return 0


def main() -> None:
    """Draw those that are asked for, or all."""
    wanted = sys.argv[1:] or ["curves", "terminal"]
    PICTURES.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name).resolve()
        if "curves" in wanted:
            draw_curves(*make_runs(folder))
        if "terminal" in wanted:
            draw_terminal(folder)


if __name__ == "__main__":
    main()
