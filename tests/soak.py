"""The soak: half an hour of two ranks that are stopped and started again every 20 seconds.

    python -m tests.soak [--minutes 30]

At the end a rank's memory must be within 5 % of what it was after the first minute, and no process, file handle or
temporary file may be left over.
"""

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.conftest import REPOSITORY, clean_environment, has_steps, make_data, metrics, wait_for
from tests.processes import is_alive, processes_of

PERIOD_S = 20.0


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=30)
    minutes = parser.parse_args().minutes
    with tempfile.TemporaryDirectory() as name:
        soak(Path(name), minutes)


def soak(folder: Path, minutes: float) -> None:
    """Run it in a folder, and print what was seen. Raises AssertionError."""
    data_dir = make_data(folder / "data", num_train=10_000)
    what = ["dataset=synthetic", "epochs=1000000", "precision=fp32", "run_dir=run"]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = clean_environment(PATH=path, MNIST_DIST_DATA_DIR=str(data_dir), NPROC="2", HF_HOME=str(folder))
    began_s, seen = time.monotonic(), []
    while (age_s := time.monotonic() - began_s) < 60 * minutes:
        with (folder / "output.txt").open("ab") as output:
            command = [str(REPOSITORY / "launch/local.sh"), *what]
            job = subprocess.Popen(command, cwd=folder, env=environment, stdout=output, stderr=subprocess.STDOUT)
        done = len(metrics(folder / "run", "step")) if seen else 0
        wait_for(has_steps(folder / "run", done + 2), timeout_s=60)
        time.sleep(max(PERIOD_S - (time.monotonic() - began_s - age_s), 1))
        rank_0 = int((folder / "run/lock").read_text().split()[1])
        status = Path(f"/proc/{rank_0}/status").read_text()
        memory = next(int(line.split()[1]) / 1024 for line in status.splitlines() if line.startswith("VmRSS"))
        seen.append((age_s, memory, len(list(Path(f"/proc/{rank_0}/fd").iterdir()))))
        job.send_signal(signal.SIGTERM)
        assert job.wait(60) == 3, (folder / "output.txt").read_text()[-3000:]
        wait_for(lambda: not processes_of(folder))
        assert not is_alive(rank_0)
        left = {p.name for p in (folder / "run").iterdir()}
        assert left == {"config.yaml", "versions.json", "metrics.jsonl", "console.log", "checkpoints", "lock"}, left
        assert len(list((folder / "run/checkpoints").iterdir())) == 2
    first = next(row for row in seen if row[0] >= 60 or row is seen[-1])
    print(f"{minutes:g} minutes, {len(seen)} starts, {metrics(folder / 'run', 'stop')[-1]['step']} steps")
    print(
        f"rank 0: {first[1]:.0f} MB after a minute, {seen[-1][1]:.0f} MB at the end; handles {first[2]}, {seen[-1][2]}"
    )
    assert abs(seen[-1][1] / first[1] - 1) < 0.05
    assert seen[-1][2] == first[2]


if __name__ == "__main__":
    main()
