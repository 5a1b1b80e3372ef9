"""The kill campaign: run, hurt at a random moment, start again, until it finishes; then compare with a calm run.

    python -m tests.torture [--one-rank 160] [--two-ranks 40] [--bit-exact 50] [--seed 0]

Every run must end with the undisturbed run's weights: bit for bit with one rank, within 1e-5 with two. With bit_exact
each start has one, two or four ranks, and the bits are those of an undisturbed run of one rank.
"""

import argparse
import collections
import os
import random
import signal
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file

from mnist_dist.run import stop
from tests.conftest import FORKS, become, clean_environment, free_port, losses, make_data, rank_environment, wait_for
from tests.processes import is_alive

ARGUMENTS = [
    *("dataset=synthetic", "epochs=3", "precision=fp32", "threads=1", "log_every_steps=1"),
    *("optimizer=sgd", "lr=2e-3", "checkpoint_every_s=0.05", "timeout_s=20", "run_dir=run"),
]
LAST = "step-00000060"
MAX_FAULTS = 4  # a run; then it may finish
FAULTS = ("kill one rank", "kill all ranks", "kill the launcher", "kill in a save", "SIGTERM", "SIGUSR1", "STOP")


@dataclass(frozen=True)
class Kind:
    """What a campaign's runs are."""

    world_sizes: tuple[int, ...]  # each start has one of them
    arguments: tuple[str, ...] = ("batch_size=50",)
    tolerance: float = 0.0  # to the undisturbed run's weights and losses


KINDS = {
    "one rank": Kind((1,)),
    "two ranks": Kind((2,), tolerance=1e-5),
    "bit_exact": Kind((1, 2, 4), ("batch_size=52", "bit_exact=4")),
}


def _be_launcher(folder: Path, arguments: list[str], world_size: int) -> None:
    """In a process of its own: start the ranks, write down who they are, and end as they end."""
    stop.LAUNCHERS = {Path(sys.executable).name}  # which is what this process is called
    port = free_port()
    children = []
    for rank in range(world_size):
        pid = os.fork()
        if not pid:
            ranks = rank_environment(rank, world_size, port) if world_size > 1 else {"RANK": "0", "WORLD_SIZE": "1"}
            environment = clean_environment(**ranks)
            try:
                become(["train", *arguments], folder, folder / "output.txt", environment)
            except SystemExit as end:
                os._exit(int(end.code or 0))
            finally:
                os._exit(1)
        children.append(pid)
    (folder / "pids.new").write_text(" ".join(map(str, children)))
    (folder / "pids.new").rename(folder / "pids")
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]
    os._exit(max(code % 256 for code in codes))


def start(folder: Path, arguments: list[str], world_size: int) -> tuple[object, list[int]]:
    """Start the launcher; returns its process and the ranks' pids."""
    (folder / "pids").unlink(missing_ok=True)
    launcher = FORKS.Process(target=_be_launcher, args=(folder, arguments, world_size))
    launcher.start()
    wait_for((folder / "pids").exists)
    return launcher, [int(pid) for pid in (folder / "pids").read_text().split()]


def send(pid: int, number: signal.Signals) -> None:
    """Send a signal to a process that may be gone by now."""
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return


def hurt(fault: str, launcher: object, pids: list[int], run_dir: Path, generator: random.Random) -> None:
    """Do one fault to a running job, and wait for its end."""
    match fault:
        case "kill one rank":
            send(generator.choice(pids), signal.SIGKILL)
            if generator.random() < 0.5:  # as an impatient launcher would
                for pid in pids:
                    send(pid, signal.SIGKILL)
        case "kill all ranks":
            for pid in pids:
                send(pid, signal.SIGKILL)
        case "kill the launcher":
            send(launcher.pid, signal.SIGKILL)  # type: ignore[attr-defined]
        case "kill in a save":
            while is_alive(pids[0]) and not list((run_dir / "checkpoints").glob(".tmp-step-*")):
                time.sleep(0.0002)
            time.sleep(generator.random() * 0.01)
            for pid in pids:
                send(pid, signal.SIGKILL)
        case "STOP":
            run_dir.mkdir(exist_ok=True)
            (run_dir / "STOP").touch()
        case name:
            send(generator.choice(pids), signal.Signals[name])


def finish(launcher: object, pids: list[int]) -> int:
    """Wait for the end of all processes; the launcher's exit code."""
    wait_for(lambda: not any(map(is_alive, pids)))
    launcher.join()  # type: ignore[attr-defined]
    return launcher.exitcode or 0  # type: ignore[attr-defined, no-any-return]


def same(run_dir: Path, calm: Path, tolerance: float) -> bool:
    """Whether two finished runs have the same weights and the same curve."""
    one, other = (load_file(next((d / "checkpoints").glob(LAST)) / "model.safetensors") for d in (run_dir, calm))
    weights = max(float((one[name] - other[name]).abs().max()) for name in one)
    curve = max(abs(a - b) for a, b in zip(losses(run_dir), losses(calm), strict=True))
    return max(weights, curve) <= tolerance


def campaign(folder: Path, num_runs: int, kind: Kind, seed: int) -> dict[str, int]:
    """Run it; returns how often each fault was done. Raises AssertionError at the first run that ends otherwise."""
    generator = random.Random(seed)
    arguments = [*ARGUMENTS, *kind.arguments, f"data_dir={make_data(folder / 'data')}"]
    calm = folder / "calm"
    calm.mkdir()
    began_s = time.monotonic()
    assert finish(*start(calm, arguments, kind.world_sizes[0])) == 0, (calm / "output.txt").read_text()
    length_s = time.monotonic() - began_s

    counts: collections.Counter[str] = collections.Counter()
    for number in range(num_runs):
        case = folder / f"run-{number}"
        case.mkdir()
        run_dir, faults = case / "run", []
        while True:
            before = (case / "output.txt").read_text() if (case / "output.txt").exists() else ""
            launcher, pids = start(case, arguments, generator.choice(kind.world_sizes))
            if len(faults) == MAX_FAULTS:
                assert finish(launcher, pids) == 0, (faults, (case / "output.txt").read_text())
                break
            faults.append(generator.choice(FAULTS))
            time.sleep(generator.random() * length_s)
            hurt(faults[-1], launcher, pids, run_dir, generator)
            code, output = finish(launcher, pids), (case / "output.txt").read_text()
            # Finished, lost a rank, stopped; the launcher was killed, a rank was killed.
            allowed = {0, 1, 3, -signal.SIGKILL, 256 - signal.SIGKILL}
            if "epoch     step" not in output[len(before) :]:  # not begun: a rank may be too young to hear a signal
                allowed |= {256 - signal.SIGTERM, 256 - signal.SIGUSR1}
            assert code in allowed, (faults, code, output)
            assert "Traceback" not in output, (faults, output)
            if code == 0:
                break
        counts.update(faults)
        assert same(run_dir, calm / "run", kind.tolerance), faults
        left = [p.name for p in (run_dir / "checkpoints").iterdir() if not p.name.startswith("step-")]
        assert not left, (faults, left)
    return dict(counts)


def main() -> None:
    """The whole campaign."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--one-rank", type=int, default=160, help="runs with one rank")
    parser.add_argument("--two-ranks", type=int, default=40, help="runs with two ranks")
    parser.add_argument("--bit-exact", type=int, default=50, help="runs with bit_exact, one to four ranks")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    print(f"torch {torch.__version__}, seed {options.seed}")
    for (name, kind), num_runs in zip(
        KINDS.items(), (options.one_rank, options.two_ranks, options.bit_exact), strict=True
    ):
        with tempfile.TemporaryDirectory() as folder:
            counts = campaign(Path(folder), num_runs, kind, options.seed)
        done = ", ".join(f"{fault} {count}" for fault, count in sorted(counts.items()))
        print(f"{name}: {num_runs} runs ended with the undisturbed weights; faults: {done}", flush=True)


if __name__ == "__main__":
    main()
