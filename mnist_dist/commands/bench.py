"""The verb `bench`: how fast does it train here, and how does it scale?

Started alone, it starts one rank a GPU, or one a core, each a process; under a launcher the ranks are those that it was
given. They measure on drawn digits, smaller worlds as the first of these ranks; rank 0 writes and speaks.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from mnist_dist.config.paths import expand_path
from mnist_dist.config.schema import Config
from mnist_dist.distributed.device import choose_device, tune_cpu, usable_cores
from mnist_dist.distributed.launch_env import LaunchEnv
from mnist_dist.distributed.rendezvous import meet_ranks
from mnist_dist.distributed.setup import choose_threads, init_distributed
from mnist_dist.distributed.world import World
from mnist_dist.errors import RequestError, StorageError
from mnist_dist.files import find_obstacle, write_atomically, write_json
from mnist_dist.run import stop
from mnist_dist.speed.changes import check_format, compare
from mnist_dist.speed.measure import Measurement
from mnist_dist.speed.plan import Plan, largest_world_size, make_plan
from mnist_dist.speed.plot import draw_png
from mnist_dist.speed.summary import summarize
from mnist_dist.speed.tables import print_comparison, print_summary
from mnist_dist.versions import SOURCE

LINE_EVERY_S = 5.0  # of progress, where there is no bar
LEAVE_S = 10.0  # how long the other ranks may take to end by themselves, and this one to hear why they do


def run(options: argparse.Namespace, config: Config, env: LaunchEnv) -> int:
    """Measure, print, and write what is asked for: 0. Raises JobError."""
    began_s = time.monotonic()
    if env.world_size == 1:
        read_files(options)  # what is wrong there is said before anything is started
    tune_cpu()
    num_ranks = count_ranks(config, env)
    with OtherRanks(config, env, num_ranks) as others:  # a signal is heard once they are started: none is left behind
        with stop.interruptible("waiting for the other ranks"):
            meeting = meet_ranks(config, others.env)  # collective
        others.remove_request()
        with init_distributed(config, others.env, meeting) as world:  # collective
            with others.ended_on_error(), stop.interruptible("measuring"):
                summary = measure(options, config, world, began_s)  # collective
            if world.is_main and not options.json:
                print_all(options, summary)
            elif world.is_main:
                print(json.dumps(summary))
    return 0


def measure(options: argparse.Namespace, config: Config, world: World, began_s: float) -> dict[str, Any]:
    """Measure, compare, and write the files; what was measured, on rank 0. Collective. Raises JobError."""
    with world.shared_errors():  # collective
        before = read_files(options) if world.is_main else None
    plan = world.broadcast(plan_for(config, world))  # collective
    with Reporter(is_silent=not world.is_main) as reporter:
        samples = Measurement(config, world, plan, reporter.report).run()  # collective
    summary: dict[str, Any] = {}
    with world.shared_errors():  # collective
        if world.is_main:
            summary = summarize(samples, plan, config, world, time.monotonic() - began_s)
            if before:
                summary["against"] = {"file": options.against, **dataclasses.asdict(compare(before, summary))}
            if options.output:
                write_files(output_path(options), summary)
    return summary


def count_ranks(config: Config, env: LaunchEnv) -> int:
    """How many ranks there are to be: a launcher's, or as many as this machine has GPUs or cores for.

    Raises RequestError.
    """
    if env.master_addr:
        return env.world_size
    is_cpu = choose_device(env).type == "cpu"
    return largest_world_size(config, len(usable_cores()) if is_cpu else torch.accelerator.device_count())


def plan_for(config: Config, world: World) -> Plan:
    """What these ranks measure; rank 0's counts."""
    threads = all_threads = torch.get_num_threads()
    on_cpu = world.device.type == "cpu"
    if on_cpu and not config.threads:
        all_threads = choose_threads(world.members[:1], 0, world.device, bit_exact=bool(config.bit_exact))
    return make_plan(config, world.size, threads, all_threads, on_cpu=on_cpu)


class OtherRanks:
    """The other ranks of this machine, each a process that this one starts; none under a launcher."""

    def __init__(self, config: Config, env: LaunchEnv, num_ranks: int) -> None:
        """Start them; `env` becomes this process's place among them."""
        self.env, self.processes = env, list[subprocess.Popen[bytes]]()
        self.folder: tempfile.TemporaryDirectory[str] | None = None  # of the request, until all ranks have read it
        self.is_over = threading.Event()
        if num_ranks == env.world_size:
            return
        self.folder = tempfile.TemporaryDirectory(prefix="mnist-dist-bench-")
        recipe = Path(self.folder.name) / "bench.yaml"
        recipe.write_text(config.to_yaml())
        with socket.create_server(("127.0.0.1", 0)) as listener:
            port = listener.getsockname()[1]  # free again when this ends
        self.env = dataclasses.replace(
            env, world_size=num_ranks, master_addr="127.0.0.1", master_port=str(port), launcher_hosts_store=False
        )
        words = {"WORLD_SIZE": num_ranks, "LOCAL_WORLD_SIZE": num_ranks, "MASTER_PORT": port}
        shared = {name: str(number) for name, number in words.items()} | {"MASTER_ADDR": "127.0.0.1"}
        paths = [str(SOURCE.parent), *filter(None, [os.environ.get("PYTHONPATH")])]  # this code, from any folder
        for rank in range(1, num_ranks):
            place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "PYTHONPATH": os.pathsep.join(paths)}
            command = [sys.executable, "-m", "mnist_dist", "bench", str(recipe)]
            # A session of its own: a terminal's Ctrl-C is for this process, which ends the others.
            self.processes.append(
                subprocess.Popen(
                    command, env=os.environ | shared | place, stdin=subprocess.DEVNULL, start_new_session=True
                )
            )

        threading.Thread(target=self.watch, name="ranks", daemon=True).start()

    def watch(self) -> None:
        """End this process where another rank ends alone: nobody else would say so before all ranks have met."""
        while not self.is_over.wait(0.2):
            for rank, process in enumerate(self.processes, 1):
                if process.poll() and not self.is_over.wait(LEAVE_S):
                    print(
                        f"mnist-dist: rank {rank}, a process that this one started, ended with exit code "
                        f"{process.returncode} and without the others",
                        file=sys.stderr,
                        flush=True,
                    )
                    self.end()
                    self.remove_request()
                    os._exit(1)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Let them leave, as they do when all is done."""
        self.is_over.set()
        deadline_s = time.monotonic() + (0 if kind else LEAVE_S)
        for process in self.processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(deadline_s - time.monotonic(), 0))
        self.end()
        self.remove_request()

    def remove_request(self) -> None:
        """Delete the file that they read when they start."""
        if self.folder:
            self.folder.cleanup()

    def end(self) -> None:
        """Kill those that are still there."""
        for process in self.processes:
            process.kill()
            process.wait()

    @contextlib.contextmanager
    def ended_on_error(self) -> Iterator[None]:
        """Where this rank is to stop, the others go first, so that none of them reports a rank that is lost."""
        try:
            yield
        except BaseException:
            self.end()
            raise


class Reporter:
    """Progress on the standard error stream: a bar on a terminal, or else a line every few seconds."""

    def __init__(self, *, is_silent: bool) -> None:
        self.is_silent = is_silent
        self.bar: Progress | None = None
        self.said_s = -LINE_EVERY_S
        console = Console(stderr=True)
        if not is_silent and sys.stderr.isatty() and not console.is_dumb_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(bar_width=None), MofNCompleteColumn())
            self.bar = Progress(*columns, console=console, transient=True)
            self.task = self.bar.add_task("")

    def __enter__(self) -> Self:
        if self.bar:
            self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar:
            self.bar.stop()

    def report(self, name: str, num_done: int, total: int) -> None:
        """What is measured now, how many measurements are done, and how many there are."""
        now_s = time.monotonic()
        if self.bar:
            self.bar.update(self.task, completed=num_done, total=total, description=name)
        elif not self.is_silent and now_s - self.said_s >= LINE_EVERY_S:
            self.said_s = now_s
            print(f"bench: {num_done} of {total} measurements; {name}", file=sys.stderr, flush=True)


def read_files(options: argparse.Namespace) -> dict[str, Any] | None:
    """The earlier measurement of --against, or None; --output is looked at as well. Raises RequestError."""
    if options.output:
        path = output_path(options)
        if path.suffix != ".json":
            raise RequestError(f"--output {path} must end in .json; the plot is written beside it, as .png")
        if not path.parent.is_dir():
            raise RequestError(f"--output {path}: there is no folder {path.parent}")
        for file in (path, path.with_suffix(".png")):
            if obstacle := find_obstacle(file):
                raise RequestError(f"--output {path} cannot be written ({obstacle}); give another file")
        if not os.access(path.parent, os.W_OK | os.X_OK):
            raise RequestError(f"--output {path}: {path.parent} cannot be written into; give another folder")
    if not options.against:
        return None
    path = Path(expand_path(options.against, "--against"))
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise RequestError(f"--against {path} cannot be read: {error.strerror}") from None
    except ValueError:
        raise RequestError(f"--against {path} is no JSON") from None
    return check_format(content, str(path))


def output_path(options: argparse.Namespace) -> Path:
    """Where the JSON is to be written. Raises RequestError."""
    return Path(expand_path(options.output, "--output"))


def write_files(path: Path, summary: dict[str, Any]) -> None:
    """Write it as JSON, and the plot beside that. Raises StorageError."""
    picture = draw_png(summary)
    try:
        write_json(path, summary)
        write_atomically(path.with_suffix(".png"), picture)
    except OSError as error:
        raise StorageError(f"{error.filename} cannot be written: {error.strerror}") from None


def print_all(options: argparse.Namespace, summary: dict[str, Any]) -> None:
    """Tables, what has changed, and what to do next."""
    is_terminal = sys.stdout.isatty()  # this alone decides, as FORCE_COLOR would colour a log
    console = Console(highlight=False, soft_wrap=not is_terminal, force_terminal=is_terminal)
    print_summary(console, summary)
    if against := summary.get("against"):
        print_comparison(console, against)
    end = f"in {output_path(options)} and {output_path(options).with_suffix('.png').name}" if options.output else ""
    console.print(f"\nmeasured in {summary['seconds']:.0f} s{'; everything is ' if end else ''}{end}", markup=False)
    if not options.output:
        console.print("next: --output FILE.json keeps it, with a plot; --against FILE.json compares", markup=False)
